"""Is `learning_rate: auto` near the best rate? One stage, trained at several rates around it, with several seeds.

    python benchmarks/learning_rates.py --stage sft --model MODEL --dataset ROWS.jsonl --eval-dataset ROWS.jsonl \
        --output DIR [--factors 0.25,0.5,1,2,4] [--seeds 0,1] [-- FLAGS OF THE STAGE]

What counts is the held-out loss (sft), the held-out accuracy (reward, dpo) or, for ppo, the score where the policy's
path reaches so many nats of KL: give ppo a `--reward` function that is the goal itself, and `--eval-every`. Every run
is an `rlhf` command, so run the benchmark again to resume it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MEASURE = {"sft": "eval_loss", "reward": "eval_accuracy", "dpo": "eval_accuracy", "ppo": "eval_score"}
LOWER_IS_BETTER = ("eval_loss",)


@dataclass(frozen=True)
class Trial:
    """One run: its rate as a multiple of auto, its seed, and what it reached."""

    factor: float
    rate: float
    seed: int
    value: float  # nan if the run diverged, or never reached the KL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=MEASURE)
    for name in ("--model", "--dataset", "--eval-dataset"):
        parser.add_argument(name, required=True)
    parser.add_argument("--output", required=True, type=Path, help="folder for all runs and the table")
    parser.add_argument("--factors", default="0.25,0.5,1,2,4", help="rates as multiples of auto")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--at-kl", type=float, default=4.0, help="ppo: nats at which the score is read")
    args, rest = parser.parse_known_args()
    inputs = ["--model", args.model, "--dataset", args.dataset, "--eval-dataset", args.eval_dataset]
    command = [args.stage, *inputs, *(flag for flag in rest if flag != "--")]
    args.output.mkdir(parents=True, exist_ok=True)
    auto = auto_rate(command, args.output)
    trials = []
    for seed in map(int, args.seeds.split(",")):
        for factor in map(float, args.factors.split(",")):
            folder = args.output / f"{factor:g}-{seed}"
            rate = float(f"{auto * factor:.3g}")
            flags = ["--learning-rate", f"{rate:g}", "--seed", str(seed), "--output", str(folder)]
            ended = rlhf([*command, *flags], may_fail=True)
            value = reached(folder, args.stage, args.at_kl) if ended else math.nan
            trials.append(Trial(factor, rate, seed, value))
            print(f"  {args.stage} at {rate:g} (auto x {factor:g}), seed {seed}: {value:.4f}", flush=True)
    text = table(trials, args.stage, MEASURE[args.stage])
    (args.output / "learning_rates.md").write_text(text, encoding="utf-8")
    print(text)


def rlhf(arguments: list[str], *, may_fail: bool = False) -> str:
    """Run an `rlhf` command with --json; its output, empty if it failed and may."""
    line = [sys.executable, "-m", "rlhf_cli", *arguments, "--json"]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    if ended.returncode and not may_fail:
        raise SystemExit(f"`rlhf {' '.join(arguments)}` ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return "" if ended.returncode else ended.stdout


def auto_rate(command: list[str], folder: Path) -> float:
    """What `auto` is for this stage and base."""
    plan = json.loads(rlhf([*command, "--output", str(folder / "plan"), "--dry-run"]))
    return plan["plan"]["learning_rate"]


def reached(folder: Path, stage: str, kl: float) -> float:
    """The last held-out measure of a finished run; for ppo, its score where its path first reaches a KL."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    path = [line for line in lines if MEASURE[stage] in line]
    if stage != "ppo":
        return path[-1][MEASURE[stage]]
    for before, after in zip(path, path[1:], strict=False):
        low, high = before["eval_kl"], after["eval_kl"]
        if low <= kl <= high and high > low:
            share = (kl - low) / (high - low)
            return before["eval_score"] * (1 - share) + after["eval_score"] * share
    return math.nan


def table(trials: list[Trial], stage: str, measure: str) -> str:
    """The trials as Markdown: a row for every rate, a column for every seed."""
    seeds = sorted({trial.seed for trial in trials})
    factors = sorted({trial.factor for trial in trials})
    lines = [
        f"| rate | x auto | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    means = {}
    for factor in factors:
        row = {trial.seed: trial.value for trial in trials if trial.factor == factor}
        rate = next(trial.rate for trial in trials if trial.factor == factor)
        means[factor] = statistics.mean(row.values())
        cells = " | ".join(f"{row[seed]:.4f}" for seed in seeds)
        lines.append(f"| {rate:g} | {factor:g} | {cells} | {means[factor]:.4f} |")
    known = {factor: mean for factor, mean in means.items() if math.isfinite(mean)}
    if known and math.isfinite(means.get(1.0, math.nan)):
        best = (min if measure in LOWER_IS_BETTER else max)(known, key=known.__getitem__)
        lines += ["", f"{stage}: auto {known[1.0]:.4f}, best {known[best]:.4f} (auto x {best:g}) by {measure}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
