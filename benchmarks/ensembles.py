"""What does an ensemble of small reward models save? Gold against KL for one reward model, mean, min and mean-std.

    python benchmarks/ensembles.py --base MODEL --demonstrations ROWS.jsonl --prompts ROWS.jsonl --output DIR

The task is that of `learning.py`, with fewer noisy comparisons and a low kl_coef, so that a policy exploits what its
reward model gets wrong. All members learn from the same comparisons and differ by their seed. Each of them is also
trained against alone, and the row `one` is the mean of these runs. (400 comparisons are too few: three members ended at
held-out accuracies of 0.38 to 0.52 on 60 pairs, and the best of 16 by two of them at a gold of 0.28 and 0.27, from
0.21.) Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization". Every step is an `rlhf`
command: run the benchmark again to resume it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from learning import (
    GOLD,
    POLICY,
    REWARD,
    SFT,
    TOKENS,
    Bench,
    judge_pairs,
    machine,
    points_of,
    read_rows,
    split_prompts,
    write_rows,
)
from outcomes import Point, interpolate, line_of

KLS = (2.0, 5.0, 10.0, 15.0)  # nats at which arms are compared
ARMS = ("mean", "min", "mean-std")
# Critic-free, since many runs are compared; little KL penalty, so that the reward model's errors show.
RUN = {
    "batch_size": "16", "responses_per_prompt": "4", "advantage": "rloo", "kl_coef": "0.05", "learning_rate": "6e-4",
    "force": True,
}  # fmt: skip


def train_members(bench: Bench, seed: int, members: int, comparisons: int) -> list[Path]:
    """SFT, comparisons by a noisy judge, and reward models that differ by their seed."""
    train, _ = split_prompts(bench)
    sft, drawn = bench.folder / "sft", bench.folder / "drawn.jsonl"
    steps = {"max_steps": 20} if bench.quick else {}
    bench.rlhf("sft", model=bench.base, dataset=bench.demonstrations, output=sft, **SFT, **steps)
    if not drawn.exists():
        sampled = {"responses_per_prompt": 4, "max_response_tokens": TOKENS, "temperature": "1.0"}
        bench.rlhf("sample", model=sft, dataset=train, output=drawn, **sampled, limit_rows=comparisons)
    pairs = bench.folder / f"pairs-{seed}.jsonl"
    judge_pairs(drawn, seed, pairs)
    write_rows(pairs, read_rows(pairs)[:comparisons])
    folders = [bench.folder / f"member-{seed}-{member}" for member in range(members)]
    for member, folder in enumerate(folders):
        bench.rlhf("reward", model=sft, dataset=pairs, output=folder, seed=100 * seed + member, **REWARD)
    return folders


def run_policy(bench: Bench, arm: str, seed: int, rewards: list[Path], updates: int) -> list[Point]:
    """Train against reward models; a point for every evaluation on the way."""
    out, held = bench.folder / f"{arm}-{seed}", bench.folder / "held_out.jsonl"
    combine = {"reward_combine": arm} if len(rewards) > 1 else {}
    knobs = POLICY | RUN | {"max_steps": updates, "eval_every": max(1, updates // 8)} | combine
    bench.rlhf(
        "ppo", model=bench.folder / "sft", reward=rewards, dataset=bench.folder / "train.jsonl", output=out, seed=seed,
        eval_dataset=held, eval_limit=bench.held_out, samples=bench.held_out, **knobs,
    )  # fmt: skip
    return points_of(out, arm, seed)


def run_best_of(bench: Bench, arm: str, seed: int, rewards: list[Path], sizes: str) -> list[dict[str, float]]:
    """Gold of the best of n samples of the SFT model by the same scores."""
    target = bench.folder / f"best-of-{arm}-{seed}.json"
    combine = {"reward_combine": arm} if len(rewards) > 1 else {}
    bench.rlhf(
        "evaluate", model=bench.folder / "sft", reward=rewards, gold=GOLD, dataset=bench.folder / "held_out.jsonl",
        output=target, best_of=sizes, temperature="1.0", max_response_tokens=TOKENS, **combine,
    )  # fmt: skip
    return json.loads(target.read_text(encoding="utf-8"))["best_of"]


def summarise(runs: dict[str, list[list[Point]]]) -> list[dict[str, object]]:
    """A row per arm, each number the mean over its runs: gold at equal KL, its peak, and what is left at the end."""
    rows = []
    for arm, paths in runs.items():
        row: dict[str, object] = {"arm": arm, "runs": len(paths)}
        for kl in KLS:
            reached = [gold for path in paths if (gold := interpolate(path, "kl", kl, "gold")) is not None]
            row[f"gold at {kl:g}"] = statistics.mean(reached) if len(reached) == len(paths) else None
        row["peak gold"] = statistics.mean(max(point.gold for point in path) for path in paths)
        for name in ("gold", "kl", "proxy"):
            row[f"last {name}"] = statistics.mean(getattr(path[-1], name) for path in paths)
        rows.append(row)
    return rows


def mean_gold(found: list[list[dict[str, float]]]) -> list[tuple[float, float]]:
    """Each n with gold's mean over runs."""
    return [(rows[0]["n"], statistics.mean(row["gold"] for row in rows)) for rows in zip(*found, strict=True)]


def table(rows: list[dict[str, object]]) -> str:
    """Rows as Markdown."""
    cells = [
        ["" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    names = tuple(rows[0])
    return "\n".join([line_of(names), "|---" * len(names) + "|", *(line_of(tuple(row)) for row in cells)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--demonstrations", "--prompts"):
        parser.add_argument(name, required=True)
    parser.add_argument("--output", required=True, type=Path, help="folder for all runs and tables")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of comparisons, members and policies")
    parser.add_argument("--members", type=int, default=5, help="reward models of an ensemble")
    parser.add_argument("--comparisons", type=int, default=1500, help="that the reward models learn from")
    parser.add_argument("--updates", type=int, default=64, help="of every policy; 0: best of n alone, without training")
    parser.add_argument("--best-of", default="1,4,16,64", help="n of best-of-n sampling by the same scores")
    parser.add_argument("--held-out", type=int, default=200, help="prompts that every policy is measured on")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    bench = Bench(args.base, args.demonstrations, args.prompts, args.output.resolve(), seeds, args.held_out, args.quick)
    runs: dict[str, list[list[Point]]] = {"one": [], **{arm: [] for arm in ARMS}}
    best: dict[str, list[list[dict]]] = {arm: [] for arm in runs}
    for seed in seeds:
        members = train_members(bench, seed, args.members, args.comparisons)
        arms = [("one", f"one-{m}", [member]) for m, member in enumerate(members)]
        for arm, name, rewards in [*arms, *((arm, arm, members) for arm in ARMS)]:
            if args.updates:
                runs[arm].append(run_policy(bench, name, seed, rewards, args.updates))
            best[arm].append(run_best_of(bench, name, seed, rewards, args.best_of))
    rows = summarise(runs) if args.updates else []
    sizes = [
        {"arm": arm}
        | {f"best of {r['n']}": statistics.mean(each[i]["gold"] for each in found) for i, r in enumerate(found[0])}
        for arm, found in best.items()
    ]
    trained = f"## Trained policies\n\n{table(rows)}\n\n" if rows else ""
    text = f"{trained}## Gold of the best of n by score\n\n{table(sizes)}\n"
    record = {
        "machine": machine(),
        "commands": bench.commands,
        "policies": rows,
        "best_of": sizes,
        "knobs": POLICY | RUN,
    }
    (bench.folder / "ensembles.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (bench.folder / "ensembles.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
