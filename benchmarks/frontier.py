"""Does PPO end on the frontier of gold against KL? Runs to convergence at several kl_coef, beside best of n.

    python benchmarks/frontier.py --base MODEL --demonstrations ROWS.jsonl --prompts ROWS.jsonl --output DIR

The task is that of `learning.py`: a reward model learns from noisy comparisons, and gold is what it never saw. The
policy that is best for its KL is the reference tilted by exp(score / kl_coef), so every kl_coef has one KL at which
training ends; a path on its way to a far lower kl_coef passes the same KL without being best for it. Each row is the
end of one run. Best of n is near the frontier by construction (Beirami et al. 2024), so it is the line to reach.
Every step is an `rlhf` command: run the benchmark again to resume it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from learning import POLICY, Bench, prepare, read_rows, run_best_of
from outcomes import line_of, of_texts

BEST_OF = "1,2,4,8,16,32,64"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--demonstrations", "--prompts"):
        parser.add_argument(name, required=True)
    parser.add_argument("--output", required=True, type=Path, help="folder for all runs and the table")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--kl-coef", default="1,1.5,2.5", help="one run for each")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--flags", default="", help='further knobs of every run, such as "batch_size=128,max_steps=96"')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    bench = Bench(args.base, args.demonstrations, args.prompts, args.output.resolve(), seeds, args.held_out, False)
    knobs = dict(flag.split("=", 1) for flag in args.flags.split(",") if flag)
    sft, held, _ = prepare(bench)
    rows = []
    for seed in seeds:
        best = run_best_of(bench, seed, sft, held, BEST_OF)
        for kl_coef in args.kl_coef.split(","):
            end = train(bench, seed, sft, held, kl_coef, knobs)
            line = gold_of_best(best, end["kl"])
            rows.append({"seed": seed, "kl_coef": kl_coef, **end, "best_of_n": line, "share": end["gold"] / line})
            print(rows[-1], flush=True)
    record = {"knobs": {**POLICY, **knobs}, "rows": rows, "commands": bench.commands}
    name = "frontier" + "".join(f"-{key}-{value}" for key, value in knobs.items())
    (args.output / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    names = tuple(rows[0])
    print("\n".join([line_of(names), "|---" * len(names) + "|"]))
    for row in rows:
        print(line_of(tuple(f"{value:.3f}" if isinstance(value, float) else value for value in row.values())))


def train(bench: Bench, seed: int, sft: Path, held: Path, kl_coef: str, knobs: dict[str, str]) -> dict[str, float]:
    """Run PPO to its end at one kl_coef; gold, score and KL of its last evaluation."""
    name = "-".join([f"ppo-{kl_coef}-{seed}", *(f"{key}-{value}" for key, value in knobs.items())])
    settings = POLICY | {"kl_coef": kl_coef, "eval_dataset": held, "eval_limit": bench.held_out}
    settings |= {"samples": bench.held_out, "max_steps": "64", "eval_every": "16", "lr_schedule": "linear"} | knobs
    bench.rlhf(
        "ppo", model=sft, reward=bench.folder / f"reward-{seed}", dataset=bench.folder / "train.jsonl",
        output=bench.folder / name, seed=seed, **settings,
    )  # fmt: skip
    last = [line for line in read_rows(bench.folder / name / "metrics.jsonl") if "eval_kl" in line][-1]
    said = [row["response"] for row in read_rows(bench.folder / name / "samples.jsonl") if row["step"] == last["step"]]
    return {"kl": last["eval_kl"], "score": last["eval_score"], "gold": of_texts(said)["gold"]}


def gold_of_best(best: list[dict[str, float]], kl: float) -> float:
    """Best of n's gold at a KL: on straight lines over the square root of KL, on which it is nearly linear."""
    points = [(math.sqrt(row["kl"]), row["gold"]) for row in best]
    at = math.sqrt(max(kl, 0.0))
    for (low, before), (high, after) in zip(points, points[1:], strict=False):
        if low <= at <= high:
            return before + (after - before) * (at - low) / (high - low)
    return math.nan


if __name__ == "__main__":
    main()
