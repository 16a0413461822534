"""Runs the real command inside the test's process, on data small enough for a second."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import write_jsonl

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five"]
WORDS += ["six", "cat", "dog", "bird", "song", "park", "mat", "sun"]
AFTER = dict(zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True))  # the rule that demonstrations follow
GENTLE = ("--learning-rate", 1e-4)  # three steps leave the responses as the base writes them
SMALL = ("--batch-size", "8", "--max-steps", "3", "--lora-rank", "4", "--samples", "2", "--eval-fraction", "0.2")
SHORT = ("--max-response-tokens", "6")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict:
        """The one object of --json."""
        return json.loads(self.stdout)


def rlhf(*arguments: object) -> Ended:
    """Run a command line in this process."""
    from typer.testing import CliRunner

    from rlhf_cli.main import app

    ended = CliRunner().invoke(app, [str(a) for a in arguments])
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return Ended(ended.exit_code, ended.stdout, ended.stderr)


def done(*arguments: object) -> Ended:
    """Run a command line that has to end well."""
    ended = rlhf(*arguments)
    assert ended.code == 0, ended.stderr
    return ended


def result(*arguments: object) -> dict:
    """The --json object of a command that has to end well."""
    return done(*arguments, "--json").json


def refused(*arguments: object) -> str:
    """What a command says that has to be refused as the user's mistake: one message, no traceback, no result."""
    ended = rlhf(*arguments)
    assert (ended.code, ended.stdout) == (2, ""), (ended.code, ended.stdout, ended.stderr)
    assert ended.stderr.count("error: ") == 1 and "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr


# --- data ---------------------------------------------------------------------------------------------------------


def as_prompt(text: str, chat: bool) -> object:
    """A prompt as text, or as a conversation of one message."""
    return [{"role": "user", "content": text}] if chat else text


def demonstrations(*, chat: bool = False) -> list[dict]:
    """Each pair of words is answered by the word that comes after the second one: 256 rows."""
    pairs = itertools.product(WORDS, WORDS)
    if chat:
        answer = [{"role": "assistant"}]
        return [{"messages": [*as_prompt(f"{a} {b}", True), answer[0] | {"content": AFTER[b]}]} for a, b in pairs]
    return [{"prompt": f"{a} {b}", "completion": f" {AFTER[b]}"} for a, b in pairs]


def comparisons(*, chat: bool = False) -> list[dict]:
    """Thanks are preferred to none, whichever answer is the longer one: 256 rows."""
    rows = []
    for i, (a, b) in enumerate(itertools.product(WORDS, WORDS)):
        chosen, rejected = (f"{b} thank you", f"{a}") if i % 2 else ("thank you", f"{a} the {b} mat sat")
        space = "" if chat else " "
        rows.append({"prompt": as_prompt(f"{a} {b}", chat), "chosen": space + chosen, "rejected": space + rejected})
    return rows


def soft_comparisons() -> list[dict]:
    """The same preference as soft labels of 0.95; every other row calls the curt response `chosen`, at 0.05."""
    rows = [row | {"probability": 0.95} for row in comparisons()]
    for row in rows[::2]:
        row |= {"chosen": row["rejected"], "rejected": row["chosen"], "probability": 0.05}
    return rows


def prompts(*, chat: bool = False) -> list[dict]:
    """64 prompts with a column for reward functions."""
    return [
        {"prompt": as_prompt(f"{a} {b}", chat), "answer": AFTER[b]} for a, b in itertools.product(WORDS[:8], WORDS[8:])
    ]


def write_data(folder: Path, *, chat: bool = False) -> None:
    """demonstrations.jsonl, comparisons.jsonl and prompts.jsonl in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("demonstrations", demonstrations), ("comparisons", comparisons), ("prompts", prompts)):
        write_jsonl(folder / f"{name}.jsonl", rows(chat=chat))


# --- the chain ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """Every stage run once, in a folder: sft, reward, ppo, evaluate.json, samples.jsonl, exported, exported_reward."""

    folder: Path
    base: Path
    ended: dict[str, Ended]

    @property
    def sft(self) -> Path:
        return self.folder / "sft"

    @property
    def reward(self) -> Path:
        return self.folder / "reward"

    @property
    def ppo(self) -> Path:
        return self.folder / "ppo"

    @property
    def demonstrations(self) -> Path:
        return self.folder / "demonstrations.jsonl"

    @property
    def comparisons(self) -> Path:
        return self.folder / "comparisons.jsonl"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"


def run_chain(folder: Path, base: Path, *, chat: bool = False) -> Chain:
    """Run sft, reward, ppo, evaluate, sample and export on a base, each reading the folders of those before."""
    write_data(folder, chat=chat)
    data = {name: ("--dataset", folder / f"{name}.jsonl") for name in ("demonstrations", "comparisons", "prompts")}
    sft, reward, ppo = (folder / name for name in ("sft", "reward", "ppo"))
    lines = {
        "sft": ("sft", "--model", base, *data["demonstrations"], "--output", sft, *SMALL, *GENTLE),
        # Three steps teach nothing; on so few held-out rows that is not known either, so PPO takes it.
        "reward": (
            "reward", "--model", sft, *data["comparisons"], "--output", reward, *SMALL, *GENTLE, "--eval-limit", 16,
        ),
        "ppo": ("ppo", "--model", sft, "--reward", reward, *data["prompts"], "--output", ppo, *SMALL, *GENTLE, *SHORT),
        "evaluate": (
            "evaluate", "--model", ppo, "--against", sft, "--reward", reward, *data["prompts"],
            "--output", folder / "evaluate.json", "--limit-rows", 16,
        ),
        "sample": ("sample", "--model", ppo, *data["prompts"], "--output", folder / "samples.jsonl", *SHORT),
        "export": ("export", "--model", ppo, "--output", folder / "exported"),
        "export reward": ("export", "--model", reward, "--output", folder / "exported_reward"),
    }  # fmt: skip
    return Chain(folder, base, {name: done(*line) for name, line in lines.items()})


# --- looking at what was written ----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by its name relative to it; a file that stands alone under its own name.

    Without what Python keeps of the files that it imported.
    """
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path.parent.name != "__pycache__"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def manifest(folder: Path) -> dict:
    """A checkpoint's manifest."""
    return json.loads((folder / "checkpoint.json").read_text())


def lines_of(path: Path) -> list[dict]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict:
    """Every tensor of a checkpoint: adapter, head and critic, by file and name."""
    from safetensors.torch import load_file

    files = [path for path in sorted(folder.rglob("*.safetensors")) if "state" not in path.parts]
    return {f"{path.relative_to(folder)}:{name}": t for path in files for name, t in load_file(path).items()}


def assert_same_weights(one: Path, other: Path, *, within: float = 0.0) -> None:
    """Two checkpoints hold the same tensors, bit by bit or within a difference."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys() and mine
    for name, tensor in mine.items():
        difference = float((tensor - theirs[name]).abs().max())
        assert difference <= within, f"{name} differs by {difference}"


TIMES = ("seconds", "tokens_per_second", "samples_per_second", "memory_gb")


def without_times(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl without what a clock or the machine's memory says."""
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("time_")} for line in lines_of(path)]
