"""Does a true reward rise that no method sees? PPO, RLOO, GRPO, DPO and best of n on one reward model.

    python benchmarks/learning.py --base MODEL --demonstrations ROWS.jsonl --prompts ROWS.jsonl --output DIR

A story model is fine-tuned. A noisy judge (Bradley-Terry on `gold.py`) compares pairs of its continuations, and a
reward model learns from these comparisons alone. Every method then optimises that reward model, or learns from the
comparisons. The result is the gold reward on prompts that nothing was trained on: at equal KL to the reference, and at
equal seconds of training. Every step is an `rlhf` command, so run the benchmark again to resume it. Reference for the
curve: Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization".
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gold import cheerfulness
from outcomes import Point, draw, of_texts, summarise, tables

HERE = Path(__file__).resolve().parent
GOLD = HERE / "gold.py"
SHARPNESS = 4.0  # of the judge: P(a preferred to b) = sigmoid(SHARPNESS * (gold a - gold b))
BEST_OF = "1,2,4,8,16"
TOKENS = "64"  # of a response

SFT = {"learning_rate": "3e-3", "batch_size": "32", "max_tokens": "256", "samples": "0"}
REWARD = {"learning_rate": "3e-3", "batch_size": "32", "epochs": "2", "eval_fraction": "0.1"}
POLICY = {
    "max_response_tokens": TOKENS, "temperature": "1.0", "missing_eos_penalty": "0", "lr_schedule": "constant",
    "max_steps": "32", "eval_every": "4", "learning_rate": "4e-4",
}  # fmt: skip
# 64 responses per update each. Scores of these reward models spread over about 3, so the KL costs more than usual;
# grpo divides scores by their spread, so there it costs less.
ONLINE = {
    "ppo": {"batch_size": "64", "kl_coef": "0.3", "critic_warmup": "3", "critic_learning_rate": "1e-3"},
    "rloo": {"batch_size": "16", "kl_coef": "0.3", "responses_per_prompt": "4", "advantage": "rloo"},
    "grpo": {"batch_size": "16", "kl_coef": "0.1", "responses_per_prompt": "4", "advantage": "grpo"},
}
DPO = {"learning_rate": "1e-3", "batch_size": "32", "eval_fraction": "0.05", "samples": "0"}
DPO_BETAS = ("0.3", "0.1", "0.03")


@dataclass
class Bench:
    """Where everything is, and what was asked for."""

    base: str
    demonstrations: str
    prompts: str
    folder: Path
    seeds: list[int]
    held_out: int
    quick: bool
    commands: list[str] = field(default_factory=list)

    def rlhf(self, command: str, **knobs: object) -> None:
        """Run an `rlhf` command, saying what is run; its own progress goes to a log."""
        flags = [part for name, value in knobs.items() for part in flag(name, value)]
        line = [sys.executable, "-m", "rlhf_cli", command, *flags]
        self.commands.append(" ".join(["rlhf", command, *flags]))
        print(f"  rlhf {command} -> {knobs.get('output')}", flush=True)
        with (self.folder / "commands.log").open("a", encoding="utf-8") as log:
            ended = subprocess.run(line, stdout=log, stderr=log, check=False)
        if ended.returncode:
            raise SystemExit(f"`{self.commands[-1]}` ended with {ended.returncode}; see {log.name}")


def flag(name: str, value: object) -> list[str]:
    """A knob as the command line takes it; a list is the same flag several times."""
    name = "--" + name.replace("_", "-")
    if isinstance(value, list):
        return [part for item in value for part in (name, str(item))]
    return [name] if value is True else [name, str(value)]


# --- what is trained on


def split_prompts(bench: Bench) -> tuple[Path, Path]:
    """Training and held-out prompts, each text once."""
    texts = list(dict.fromkeys(row["prompt"] for row in read_rows(Path(bench.prompts))))
    random.Random(0).shuffle(texts)
    held, train = texts[: bench.held_out], texts[bench.held_out :]
    if bench.quick:
        train = train[:256]
    write_rows(bench.folder / "held_out.jsonl", [{"prompt": text} for text in held])
    write_rows(bench.folder / "train.jsonl", [{"prompt": text} for text in train])
    return bench.folder / "train.jsonl", bench.folder / "held_out.jsonl"


def judge_pairs(drawn: Path, seed: int, target: Path) -> float:
    """Two comparisons per prompt, judged with Bradley-Terry noise; returns the best accuracy anyone could have."""
    by_prompt: dict[str, list[str]] = {}
    for row in read_rows(drawn):
        by_prompt.setdefault(row["prompt"], []).append(row["response"])
    rng, rows, ceiling = random.Random(seed), [], []
    for prompt, responses in by_prompt.items():
        for a, b in zip(responses[::2], responses[1::2], strict=True):
            chance = 1 / (1 + math.exp(-SHARPNESS * (cheerfulness(a) - cheerfulness(b))))
            chosen, rejected = (a, b) if rng.random() < chance else (b, a)
            ceiling.append(max(chance, 1 - chance))
            if a.strip() and b.strip() and a != b:
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_rows(target, rows)
    return statistics.mean(ceiling)


def prepare(bench: Bench) -> tuple[Path, Path, dict[int, dict[str, object]]]:
    """SFT, samples, comparisons and a reward model per seed; what is known of each reward model."""
    train, held = split_prompts(bench)
    sft, drawn = bench.folder / "sft", bench.folder / "drawn.jsonl"
    steps = {"max_steps": 20} if bench.quick else {}
    bench.rlhf("sft", model=bench.base, dataset=bench.demonstrations, output=sft, **SFT, **steps)
    if not drawn.exists():
        sampled = {"responses_per_prompt": 4, "max_response_tokens": TOKENS, "temperature": "1.0"}
        bench.rlhf("sample", model=sft, dataset=train, output=drawn, **sampled)
    known = {}
    for seed in bench.seeds:
        pairs, model = bench.folder / f"pairs-{seed}.jsonl", bench.folder / f"reward-{seed}"
        ceiling = judge_pairs(drawn, seed, pairs)
        bench.rlhf("reward", model=sft, dataset=pairs, output=model, seed=seed, **REWARD)
        metrics = json.loads((model / "checkpoint.json").read_text(encoding="utf-8"))
        names = ("accuracy", "accuracy_low", "accuracy_high", "longer_wins_accuracy", "pairs")
        found = {name: metrics["metrics"][name] for name in names}
        known[seed] = found | {"ceiling": ceiling, "seconds": metrics["seconds"]}
    return sft, held, known


# --- the methods


def run_online(bench: Bench, method: str, seed: int, sft: Path, held: Path) -> list[Point]:
    """Train with rollouts; a point for every evaluation on the way."""
    out = bench.folder / f"{method}-{seed}"
    knobs = POLICY | ONLINE[method] | {"eval_dataset": held, "eval_limit": bench.held_out, "samples": bench.held_out}
    knobs |= {"max_steps": "8", "force": True} if bench.quick else {}  # its reward model has hardly been trained
    bench.rlhf(
        "ppo", model=sft, reward=bench.folder / f"reward-{seed}", dataset=bench.folder / "train.jsonl",
        output=out, seed=seed, **knobs,
    )  # fmt: skip
    return points_of(out, method, seed)


def points_of(out: Path, method: str, seed: int) -> list[Point]:
    """A point for every evaluation of a PPO run."""
    said: dict[int, list[str]] = {}
    for row in read_rows(out / "samples.jsonl"):
        said.setdefault(row["step"], []).append(row["response"])
    points, seconds = [], 0.0
    for line in read_rows(out / "metrics.jsonl"):
        seconds += line.get("seconds", 0.0)
        if "eval_kl" in line:
            measured = {"kl": line["eval_kl"], "proxy": line["eval_score"], "length": line["eval_length"]}
            points.append(Point(method, seed, line["step"], seconds, **measured, **of_texts(said[line["step"]])))
    return points


def run_dpo(bench: Bench, beta: str, seed: int, sft: Path, held: Path) -> Point:
    """Train on the comparisons alone; one point, at the end."""
    out = bench.folder / f"dpo-{beta}-{seed}"
    knobs = DPO | ({"max_steps": "8"} if bench.quick else {})
    bench.rlhf(
        "dpo", model=sft, dataset=bench.folder / f"pairs-{seed}.jsonl", output=out, seed=seed, beta=beta, **knobs
    )
    found = evaluate(bench, out, seed, held)["policy"]
    manifest = json.loads((out / "checkpoint.json").read_text(encoding="utf-8"))
    said = [row["response"] for row in read_rows(sample(bench, out, held))]
    measured = {"kl": found["kl"], "proxy": found["score"], "length": found["length"]}
    return Point("dpo", seed, manifest["steps"], manifest["seconds"], **measured, **of_texts(said))


def run_best_of(bench: Bench, seed: int, sft: Path, held: Path, sizes: str = BEST_OF) -> list[dict[str, float]]:
    """Best of n samples of the SFT model by the reward model."""
    return evaluate(bench, sft, seed, held, best_of=sizes, name=f"best-of-{seed}")["best_of"]


def evaluate(bench: Bench, model: Path, seed: int, held: Path, name: str | None = None, **more: object) -> dict:
    """What `rlhf evaluate` measures of a policy on the held-out prompts, by the reward model and by gold."""
    target = bench.folder / f"{name or model.name}.json"
    sampling = {"temperature": "1.0", "max_response_tokens": TOKENS, "reference": bench.folder / "sft"}
    bench.rlhf(
        "evaluate", model=model, reward=bench.folder / f"reward-{seed}", gold=GOLD, dataset=held,
        output=target, **sampling, **more,
    )  # fmt: skip
    return json.loads(target.read_text(encoding="utf-8"))


def sample(bench: Bench, model: Path, held: Path) -> Path:
    """Responses of a policy to the held-out prompts."""
    target = bench.folder / f"{model.name}.responses.jsonl"
    if not target.exists():
        bench.rlhf("sample", model=model, dataset=held, output=target, temperature="1.0", max_response_tokens=TOKENS)
    return target


def read_rows(path: Path) -> list[dict]:
    """Every object of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a .jsonl file, unless it stands there already: what was trained on must not change under a run."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, 1 thread"
    found = {"device": device, "python": platform.python_version()}
    return found | {"torch": torch.__version__, "transformers": transformers.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="story model (folder)")
    parser.add_argument("--demonstrations", required=True, help="rows with prompt and completion")
    parser.add_argument("--prompts", required=True, help="rows with prompt")
    parser.add_argument("--output", required=True, type=Path, help="folder for all runs, tables and plots")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of everything after SFT")
    parser.add_argument("--held-out", type=int, default=200, help="prompts that every policy is measured on")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    args = parser.parse_args()
    import matplotlib.figure  # noqa: F401  # fails now rather than after hours of training

    args.output.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    bench = Bench(args.base, args.demonstrations, args.prompts, args.output.resolve(), seeds, args.held_out, args.quick)
    sft, held, known = prepare(bench)
    points: list[Point] = []
    best_of: dict[int, list[dict]] = {}
    for seed in seeds:
        print(f"seed {seed}", flush=True)
        best_of[seed] = run_best_of(bench, seed, sft, held)
        for method in ONLINE:
            points += run_online(bench, method, seed, sft, held)
        points += [run_dpo(bench, beta, seed, sft, held) for beta in DPO_BETAS]
        found = summarise(points, best_of, known, seeds[: len(best_of)])  # after every seed: what is there is shown
        write_results(bench, found, points, best_of)
    print(tables(found))
    print(f"wrote {bench.folder}/learning.json, learning.md, gold.svg, proxy.svg")


def write_results(bench: Bench, found: dict, points: list[Point], best_of: dict[int, list[dict]]) -> None:
    """Numbers as JSON, tables as Markdown, and two plots."""
    from stages.diagnostics.plot import write_plot

    about = {"machine": machine(), "commands": bench.commands, "knobs": {"policy": POLICY, **ONLINE, "dpo": DPO}}
    record = {**about, **found, "points": [asdict(p) for p in points], "best_of_by_seed": best_of}
    (bench.folder / "learning.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (bench.folder / "learning.md").write_text(tables(found), encoding="utf-8")
    for measure, title in (("gold", "The true reward, never trained on"), ("proxy", "The reward model's score")):
        write_plot(bench.folder / f"{measure}.svg", draw(points, best_of, measure, title))


if __name__ == "__main__":
    main()
