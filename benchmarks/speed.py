"""Speed and memory of every stage beside a peer's on the same work, on one core.

    python benchmarks/speed.py --assets DIR [--peer CMD] [--rounds 3] [--stages sft,reward,dpo,ppo] [--output FILE.json]

Both run in turn, several rounds; the results are ratios with their range. `--assets` holds base/, sft256/train.jsonl,
pref256/train.jsonl and prompts/train.jsonl; the policy of the ppo runs is `--policy` (default: the base). `--peer` is a
command that takes the name of a stage and prints one JSON line with samples_per_cpu_s, tokens_per_cpu_s and
peak_rss_mb, for 8 rows per step (ppo: 32 rollouts of 64 tokens, 4 epochs). Samples are counted per second of CPU time,
which varies less than wall time on shared cores. Start-up is measured in wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = {"sft": 5, "reward": 5, "dpo": 5, "ppo": 1}  # steps before the clock starts
STEPS = {"sft": 25, "reward": 25, "dpo": 25, "ppo": 4}
LORA = ("--lora-rank", "16", "--lora-alpha", "32", "--learning-rate", "1e-4", "--device", "cpu", "--seed", "1")
ROWS = ("--batch-size", "8", "--max-tokens", "256", "--eval-fraction", "0", "--samples", "0")
PPO = (
    "--batch-size", "32", "--max-response-tokens", "64", "--ppo-epochs", "4", "--minibatches", "1", "--eval-fraction",
    "0", "--target-approx-kl", "null", "--missing-eos", "replace", "--force", "--stop-on", "none",
)  # fmt: skip
VARIANTS = {"ppo": {"ppo": (), "ppo, shared critic": ("--critic", "shared")}}
# What is asked of every stage: samples per CPU second against the peer's, and peak memory against its.
TARGETS = {"sft": 2.5, "reward": 3.5, "dpo": 5.0, "ppo": 2.0, "ppo, shared critic": 3.0}
MEMORY = 0.7


def environment() -> dict[str, str]:
    """One thread, nothing from the network, and this checkout first."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | quiet | {"PYTHONPATH": str(ROOT)}


def command(stage: str, assets: Path, policy: Path, reward: Path, output: Path) -> list[str]:
    """The command line of a stage on the assets."""
    model, pairs = ("--model", assets / "base"), ("--dataset", assets / "pref256" / "train.jsonl")
    steps = ("--max-steps", WARM_UP[stage] + STEPS[stage], "--save-every", 1000)
    words = {
        "sft": (*model, "--dataset", assets / "sft256" / "train.jsonl", "--mask", "assistant", *ROWS),
        "reward": (*model, *pairs, *ROWS),
        "dpo": (*model, *pairs, *ROWS),
        "ppo": ("--model", policy, "--reward", reward, "--dataset", assets / "prompts" / "train.jsonl", *PPO),
    }[stage]
    return [str(word) for word in (stage, *words, *steps, *LORA, "--output", output)]


# --- a measured run, in a process of its own


def child(stage: str, line: list[str]) -> None:
    """Run a command line, noting the clocks at the end of every step; prints one JSON object."""
    import torch

    torch.set_num_threads(1)
    from rlhf_cli.main import app
    from stages.checkpoint.run import Run

    marks: dict[int, tuple[float, float, float]] = {}
    log = Run.log

    def marked(run: Run, step: int, metrics: dict[str, object]) -> None:
        log(run, step, metrics)
        marks[step] = (time.perf_counter(), time.process_time(), float(metrics.get("tokens", 0)))

    Run.log = marked
    code = app(line, standalone_mode=False)
    if code:
        sys.exit(code)
    first, last = WARM_UP[stage], WARM_UP[stage] + STEPS[stage]
    wall, cpu = (marks[last][i] - marks[first][i] for i in (0, 1))
    samples = STEPS[stage] * (32 if stage == "ppo" else 8)
    tokens = sum(marks[step][2] for step in range(first + 1, last + 1))
    found = {"samples_per_s": samples / wall, "samples_per_cpu_s": samples / cpu, "tokens_per_cpu_s": tokens / cpu}
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def measure(stage: str, line: list[str]) -> dict[str, float]:
    """The figures of one run of ours."""
    words = [sys.executable, __file__, "--child", stage, "--", *line]
    return last_object(subprocess.run(words, capture_output=True, text=True, env=environment()), words)


def measure_peer(peer: str, stage: str) -> dict[str, float]:
    """The figures of one run of the peer's."""
    words = [*shlex.split(peer), stage, *(("--value", "lora") if stage == "ppo" else ())]
    return last_object(subprocess.run(words, capture_output=True, text=True), words)


def last_object(ended: subprocess.CompletedProcess, words: list[str]) -> dict[str, float]:
    """The JSON object in a process's last line that is one."""
    for text in reversed(ended.stdout.splitlines()):
        if text.startswith("{"):
            return json.loads(text)
    raise SystemExit(f"`{shlex.join(words)}` ended with {ended.returncode}:\n{ended.stderr[-3000:]}")


def reward_model(assets: Path, policy: Path, folder: Path) -> Path:
    """A reward model of a few steps on the policy's base."""
    line = command("reward", assets, policy, folder, folder / "rm")
    line[line.index("--model") + 1], line[line.index("--max-steps") + 1] = str(policy), "5"
    ended = subprocess.run([sys.executable, "-m", "rlhf_cli", *line], capture_output=True, text=True, env=environment())
    if ended.returncode:
        raise SystemExit(f"the reward model ended with {ended.returncode}:\n{ended.stderr}")
    return folder / "rm"


def start_up(assets: Path, policy: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of wall time, the least of several: help, a mistake, and a whole command of one step."""
    bad = folder / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\n')
    model = ("--model", str(assets / "base"))
    lines = {
        "--help": ["--help"],
        "--version": ["--version"],
        "ppo --help": ["ppo", "--help"],
        "a mistake in a knob": [
            "sft",
            *model,
            "--dataset",
            str(bad),
            "--output",
            str(folder / "x"),
            "--batch-size",
            "x",
        ],
        "a mistake in a row": ["sft", *model, "--dataset", str(bad), "--output", str(folder / "x")],
    }
    found = {name: min(_seconds(line) for _ in range(rounds)) for name, line in lines.items()}
    reward = reward_model(assets, policy, folder) if not (folder / "rm").exists() else folder / "rm"
    for stage in ("sft", "reward", "dpo", "ppo"):
        line = command(stage, assets, policy, reward, folder / "one")
        line[line.index("--max-steps") + 1] = "1"
        line[line.index("--output") + 1] = str(folder / f"one-{stage}")
        found[f"{stage}, one step"] = min(_seconds([*line, "--overwrite", "--seed", str(i)], 0) for i in range(rounds))
    return found


def _seconds(line: list[str], code: int | None = None) -> float:
    """How long a command takes; `code` is what it has to end with."""
    began = time.perf_counter()
    ended = subprocess.run([sys.executable, "-m", "rlhf_cli", *line], capture_output=True, text=True, env=environment())
    if code not in (None, ended.returncode):
        raise SystemExit(f"`{shlex.join(line)}` ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    return time.perf_counter() - began


# --- the comparison


def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """A row per stage and variant: ours, the peer's, and their ratios round by round."""
    policy = policy_of(args)
    rows = []
    for stage in args.stages.split(","):
        reward = reward_model(args.assets, policy, folder) if stage == "ppo" else folder
        for name, flags in VARIANTS.get(stage, {stage: ()}).items():
            ours, peers = [], []
            for number in range(args.rounds):  # alternately, so that a slow moment meets both
                out = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{number}"
                ours.append(measure(stage, [*command(stage, args.assets, policy, reward, out), *flags]))
                peers += [measure_peer(args.peer, stage)] if args.peer else []
            rows.append({"stage": name, "ours": ours, "peer": peers})
            print(line_of(rows[-1]), flush=True)
    return rows


def policy_of(args: argparse.Namespace) -> Path:
    """The model of the ppo runs."""
    return args.policy or args.assets / "base"


def line_of(row: dict) -> str:
    """A row of the table, in Markdown."""

    def median(runs: list[dict], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    ours, peers = row["ours"], row["peer"]
    cells = [row["stage"], f"{median(ours, 'samples_per_cpu_s'):.1f}", f"{median(ours, 'tokens_per_cpu_s'):,.0f}"]
    cells += [f"{median(ours, 'peak_rss_mb'):.0f}"]
    if peers:
        speed = [a["samples_per_cpu_s"] / b["samples_per_cpu_s"] for a, b in zip(ours, peers, strict=True)]
        memory = median(ours, "peak_rss_mb") / median(peers, "peak_rss_mb")
        spread = f"{statistics.median(speed):.2f} ({min(speed):.2f} to {max(speed):.2f})"
        cells += [f"{median(peers, 'samples_per_cpu_s'):.1f}", spread, f"{TARGETS[row['stage']]:g}", f"{memory:.2f}"]
    return "| " + " | ".join(cells) + " |"


HEAD = ("stage", "samples per CPU s", "tokens per CPU s", "peak MB", "peer's samples per CPU s", "ratio (spread)",
        "wanted", "memory ratio")  # fmt: skip


def main() -> None:
    if "--child" in sys.argv:
        at = sys.argv.index("--child")
        sys.path.insert(0, str(ROOT))
        return child(sys.argv[at + 1], sys.argv[at + 3 :])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--policy", type=Path, help="model of the ppo runs (default: the base)")
    parser.add_argument("--peer", help="command that runs a peer on a stage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", default="sft,reward,dpo,ppo")
    parser.add_argument("--output", type=Path, help="also write every figure to this .json file")
    args = parser.parse_args()
    head = HEAD if args.peer else HEAD[:4]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        rows = compare(args, Path(name))
        started = start_up(args.assets, policy_of(args), Path(name), args.rounds)
    print("\n| start-up | s |\n|---|---|")
    print("\n".join(f"| {what} | {seconds:.2f} |" for what, seconds in started.items()))
    if args.output:
        record = {"machine": platform.processor(), "python": platform.python_version(), "rows": rows, "start": started}
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
