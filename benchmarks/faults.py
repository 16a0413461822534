"""Kills, signals and full disks: does every stage resume from them to the same bits?

    python benchmarks/faults.py [--kills N] [--output FILE.json]

A stage runs once undisturbed. Then it runs again and again, each time in its own process with one fault: SIGKILL just
before a system call that changes a file, half-way through a write, or after a random time; a full disk at one of these
calls; or SIGTERM at a random time. After each fault the same command runs again. It must end with the same adapter,
heads, metrics (each step once) and samples, to the bit, and leave no other files behind.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

STAGES = ("sft", "reward", "ppo", "dpo")
# Every call by which a stage changes what is on disk.
CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "ftruncate")
RUN = (
    "--batch-size", "8", "--max-steps", "5", "--lora-rank", "4", "--samples", "2", "--eval-fraction", "0.2",
    "--eval-limit", "6", "--eval-every", "2", "--save-every", "2", "--micro-batch-size", "3", "--learning-rate", "1e-2",
    "--limit-rows", "40",
)  # fmt: skip
PPO = ("--max-response-tokens", "4", "--ppo-epochs", "2", "--minibatches", "2", "--kl-target", "0.1")
MORE = {"ppo": (*PPO, "--normalise-scores")}
KINDS = ("killed before a write", "killed in a write", "killed at a random time", "disk full", "asked to end")


def command(data: Path, stage: str, output: Path) -> list[str]:
    """The command line of a stage on the tiny chain in `data`."""
    inputs = {
        "sft": ("--model", data / "base", "--dataset", data / "demonstrations.jsonl"),
        "reward": ("--model", data / "sft", "--dataset", data / "comparisons.jsonl"),
        "dpo": ("--model", data / "sft", "--dataset", data / "comparisons.jsonl"),
        "ppo": ("--model", data / "sft", "--reward", data / "reward", "--dataset", data / "prompts.jsonl"),
    }
    return [str(word) for word in (stage, *inputs[stage], "--output", output, *RUN, *MORE.get(stage, ()))]


def warm(base: Path) -> None:
    """Import, before any fork, all that a stage imports: libraries, ours, and what they load late."""
    import torch
    import transformers

    from stages.inputs import open_inputs  # noqa: F401

    for module in STAGES:
        __import__(f"stages.{module}")
    torch.set_num_threads(1)
    transformers.AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        transformers.AutoModelForCausalLM.from_pretrained(base)(torch.tensor([[1, 2, 3]]))


def prepare(data: Path) -> None:
    """A tiny random model, its data, and a finished sft and reward run to start the later stages from."""
    from tests.commands import write_data
    from tests.tiny import build_model

    build_model(data / "base", "llama")
    warm(data / "base")
    write_data(data)
    for stage in ("sft", "reward"):
        assert run(command(data, stage, data / stage)) == 0, f"{stage} cannot be prepared; see {LOG}"


# --- a run in a process of its own


LOG = Path(tempfile.gettempdir()) / f"rlhf-faults-{os.getpid()}.log"


def run(line: list[str], fault: Callable[[], None] = lambda: None, after: tuple[float, int] | None = None) -> int:
    """Run a command line in a forked process; returns its exit code, negative for the signal that ended it.

    `fault()` is called in that process first; `after` sends it a signal after so many seconds.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _become(line, fault)
    if after is not None:
        seconds, number = after
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _become(line: list[str], fault: Callable[[], None]) -> None:
    """The rest of a forked process: the command, its words in a log, and its exit code."""
    code = 1
    try:
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import torch

        torch.set_num_threads(1)
        from rlhf_cli.main import app

        fault()
        code = app(line, standalone_mode=False) or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def counted(found: Path) -> Callable[[], None]:
    """A fault that only counts the calls, byte by byte into a file."""

    def begin() -> None:
        write, tally = os.write, os.open(found, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        _wrap(lambda name, real, args: write(tally, name[:1].encode()) and None)

    return begin


def at_call(number: int, act: Callable[[str, Callable, tuple], None]) -> Callable[[], None]:
    """A fault at the `number`-th call (from 0) that changes a file."""
    left = [number]

    def meet(name: str, real: Callable, args: tuple) -> None:
        left[0] -= 1
        if left[0] == -1:
            act(name, real, args)

    return lambda: _wrap(meet)


def _wrap(meet: Callable[[str, Callable, tuple], None]) -> None:
    """Call `meet(name, real, args)` before every call that changes a file."""

    def wrapped(name: str, real: Callable) -> Callable:
        def call(*args: object, **more: object) -> object:
            writes = name != "open" or (len(args) > 1 and int(args[1]) & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
            if writes:
                meet(name, real, args)
            return real(*args, **more)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def kill(name: str, real: Callable, args: tuple) -> None:
    """The power goes."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_write(name: str, real: Callable, args: tuple) -> None:
    """The power goes when half of the bytes are there."""
    if name == "write":
        real(args[0], bytes(args[1])[: len(args[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(name: str, real: Callable, args: tuple) -> None:
    """The disk is full: nothing new fits, while what is there can still be renamed and removed."""
    if name in ("write", "mkdir", "fsync"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- the campaign


def lost(folder: Path, whole: Path) -> str:
    """What differs from an undisturbed run, in words; empty where nothing was lost."""
    from tests.commands import contents, lines_of, weights, without_times

    mine, theirs = weights(folder), weights(whole)
    if mine.keys() != theirs.keys() or any(not bool((mine[n] == theirs[n]).all()) for n in mine):
        return "other weights"
    if [line["step"] for line in lines_of(folder / "metrics.jsonl")] != list(range(6)):
        return "a step is missing or stands twice"
    if without_times(folder / "metrics.jsonl") != without_times(whole / "metrics.jsonl"):
        return "other metrics"
    if contents(folder).keys() != contents(whole).keys():
        return f"other files: {sorted(contents(folder).keys() ^ contents(whole).keys())}"
    for name in ("samples.jsonl", "report.json"):
        if (whole / name).exists() and (folder / name).read_bytes() != (whole / name).read_bytes():
            return f"another {name}"
    return ""


def disturb(line: list[str], kind: str, calls: int, seconds: float, chance: random.Random, place: int) -> int:
    """Run a command line with a fault of a kind; `place` is the call at which it comes. Returns the exit code."""
    if kind == "killed at a random time":
        return run(line, after=(chance.uniform(0, seconds), signal.SIGKILL))
    if kind == "asked to end":
        return run(line, after=(chance.uniform(0, seconds), signal.SIGTERM))
    act = {"killed before a write": kill, "killed in a write": kill_in_write, "disk full": no_space}[kind]
    return run(line, at_call(place, act))


def expected(kind: str, code: int) -> bool:
    """Whether a disturbed run ended as it should: killed, asked and saved, told of the full disk, or done already."""
    ends = {"disk full": (2, 0), "asked to end": (143, -15, 0)}
    return code in ends.get(kind, (-9, 0))


def campaign(stages: tuple[str, ...], per_stage: int, seed: int, say: Callable[[str], None]) -> list[dict]:
    """Disturb every stage `per_stage` times; a record per fault."""
    records, chance = [], random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="rlhf-faults-") as name:
        data = Path(name)
        prepare(data)
        for stage in stages:
            whole, tally, out = data / f"whole-{stage}", data / "tally", data / f"out-{stage}"
            began = time.monotonic()
            assert run(command(data, stage, whole), counted(tally)) == 0, f"{stage} fails undisturbed; see {LOG}"
            seconds, calls = time.monotonic() - began, tally.stat().st_size
            places = _places(calls, per_stage, chance)
            for number in range(per_stage):
                kind = KINDS[number % len(KINDS)]
                shutil.rmtree(out, ignore_errors=True)
                code = disturb(command(data, stage, out), kind, calls, seconds, chance, places[number])
                said = LOG.read_text(errors="replace")
                again = run(command(data, stage, out))
                loss = lost(out, whole) if again == 0 else f"the same command then ended with {again}; see {LOG}"
                if not loss and not expected(kind, code):
                    loss = f"it ended with {code}"
                if not loss and "Traceback" in said:
                    loss = "a traceback"
                records.append({"stage": stage, "kind": kind, "code": code, "place": places[number], "lost": loss})
                if loss:
                    say(f"LOST: {stage}, {kind}, at call {places[number]} of {calls}: {loss}\n{said[-2000:]}")
            say(
                f"{stage}: {per_stage} faults over {calls} calls, {sum(bool(r['lost']) for r in records)} losses so far"
            )
    LOG.unlink(missing_ok=True)
    return records


def _places(calls: int, count: int, chance: random.Random) -> list[int]:
    """A call for every fault: each kind sweeps evenly over all of them, from a random first one."""
    per_kind = max(1, count // len(KINDS))
    first = chance.random()
    return [int((i // len(KINDS) + first) / per_kind * calls) % calls for i in range(count)]


def table(records: list[dict]) -> str:
    """Faults and losses by stage and kind, in Markdown."""
    stages = list(dict.fromkeys(record["stage"] for record in records))
    lines = ["| fault | " + " | ".join(stages) + " |", "|---" * (len(stages) + 1) + "|"]
    for kind in KINDS:
        cells = []
        for stage in stages:
            mine = [r for r in records if (r["stage"], r["kind"]) == (stage, kind)]
            cells.append(f"{len(mine)}, {sum(bool(r['lost']) for r in mine)} lost")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=240, help="faults in all, over the four stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write every record to this .json file")
    args = parser.parse_args()
    began = time.monotonic()
    records = campaign(STAGES, args.kills // len(STAGES), args.seed, lambda text: print(text, flush=True))
    losses = sum(bool(record["lost"]) for record in records)
    print(table(records))
    print(f"{len(records)} faults, {losses} losses, {time.monotonic() - began:.0f} s")
    if args.output:
        args.output.write_text(json.dumps(records, indent=1), encoding="utf-8")
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
