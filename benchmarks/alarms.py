"""What PPO's warnings find and what they miss, in runs known to be good and in runs known to be hacked.

    python benchmarks/alarms.py --base MODEL --prompts ROWS.jsonl --output DIR

Good runs optimise what they should: a reward model of `gold.py` at a KL at which the true reward still rises, an answer
that can be checked, the customer service of `recipes/tiny`, the small problems of `optimum.py`. Hacked runs are paid
for something else: words of a list, length, a phrase, shortness; or for the errors of a reward model, with hardly any
penalty on the KL. No run stops by itself. The conditions are computed from the metrics afterwards, so a new threshold
needs no new run: run the same command again, and it reads the finished runs.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from learning import Bench, judge_pairs, machine, read_rows, write_rows
from signals import Outcome, tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

REWARDS = '''"""Rewards that pay for something else than a good story, and one that can be checked."""

import re

HAPPY = {"happy", "fun", "good", "love", "nice", "great", "smile", "play"}


def list_words(text):
    return re.findall(r"[a-z]+", text.lower())


def words(prompts, responses):
    return [float(sum(word in HAPPY for word in list_words(r))) for r in responses]


def share(prompts, responses):
    return [10 * sum(word in HAPPY for word in list_words(r)) / max(1, len(list_words(r))) for r in responses]


def characters(prompts, responses):
    return [len(r) / 20 for r in responses]


def mother(prompts, responses):
    return [r.lower().count("mom") / 2 for r in responses]


def longer(prompts, responses):
    return [len(r.split()) / 5 for r in responses]


def shorter(prompts, responses):
    return [-len(r.split()) / 5 for r in responses]


def name(prompts, responses):
    named = [re.search(r"named (\\w+)", p) for p in prompts]
    return [float(found is not None and found[1] in r) for found, r in zip(named, responses)]
'''
REWARD = {"learning_rate": "3e-3", "eval_fraction": "0.1"}
FEW = 64  # comparisons of the reward model that has learned hardly anything
HELD_OUT = 64
EVERY_RUN = {"stop_on": "none", "samples": HELD_OUT, "eval_limit": HELD_OUT, "eval_every": 12}
STORIES = {
    "max_response_tokens": 32, "temperature": 1, "missing_eos_penalty": 0, "lr_schedule": "constant",
    "batch_size": 32, "max_steps": 24, "learning_rate": "2e-3", "critic_learning_rate": "2e-3",
}  # fmt: skip
GROUPS = {"responses_per_prompt": 4, "batch_size": 8, "critic_learning_rate": None}
RLOO = GROUPS | {"advantage": "rloo"}
TINY = {"max_response_tokens": 40, "temperature": 1, "batch_size": 64, "max_steps": 24, "learning_rate": "2e-3"}
TINY_RLOO = {"advantage": "rloo", "responses_per_prompt": 4, "batch_size": 16}
KNOWN = {
    "temperature": 1, "missing_eos_penalty": 0, "eval_fraction": 0, "lora_rank": 16, "rollout_batch_size": 1024,
    "learning_rate": "3e-3", "ppo_epochs": 2, "minibatches": 4, "batch_size": 64, "responses_per_prompt": 4,
    "advantage": "rloo", "max_steps": 40,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A PPO run whose outcome is known beforehand."""

    name: str
    good: bool
    task: str  # "stories", "tiny", or a task of optimum.py
    reward: str  # a checkpoint in the output folder, or a function in rewards.py
    knobs: dict[str, object]
    seed: int = 0

    @property
    def kind(self) -> str:
        return "good" if self.good else "hacked"


QUICKLY = {"learning_rate": "3e-3", "critic_learning_rate": "3e-3"}
FAST = {"learning_rate": "3e-3"}
SLOW, GENTLY = {"learning_rate": "1e-3"}, {"learning_rate": "5e-4"}
SLOWLY = {"learning_rate": "1e-3", "critic_learning_rate": "1e-3"}
RUNS = (
    Run("cheerful, ppo", True, "stories", "reward", {"kl_coef": 0.3}),
    Run("cheerful, ppo, slower", True, "stories", "reward", SLOWLY | {"kl_coef": 0.3}, seed=1),
    Run("cheerful, rloo", True, "stories", "reward", RLOO | {"kl_coef": 0.3}, seed=2),
    Run("words", False, "stories", "words", QUICKLY | {"kl_coef": 0.02}),
    Run("words, slower", False, "stories", "words", {"kl_coef": 0.1}, seed=1),
    Run("reward model, little kl", False, "stories", "reward", RLOO | FAST | {"kl_coef": 0.03}, seed=1),
    Run("share of words", False, "stories", "share", RLOO | FAST | {"kl_coef": 0.05}, seed=2),
    Run("optimum, 1 token", True, "16 tokens, length 1, gpt2", "table", {"kl_coef": 0.1}),
    Run("optimum, 2 tokens", True, "6 tokens, length 2, llama", "table", {"kl_coef": 0.1}),
    Run("optimum, 3 tokens", True, "6 tokens, length 3, llama", "table", {"kl_coef": 1}),
    Run("says the name, 8 tokens", True, "stories", "name", RLOO | SLOW | {"kl_coef": 0.05, "max_response_tokens": 8}),
    Run("words, 6 tokens", False, "stories", "words", RLOO | {"kl_coef": 0.02, "max_response_tokens": 6}, seed=3),
    Run("cheerful, rloo, slower", True, "stories", "reward", RLOO | GENTLY | {"kl_coef": 0.3}, seed=3),
    Run("phrase", False, "stories", "mother", RLOO | FAST | {"kl_coef": 0.02}, seed=1),
    Run("words, 64 tokens", False, "stories", "words", RLOO | FAST | {"kl_coef": 0.05, "max_response_tokens": 64}),
    Run("cheerful, 64 tokens", True, "stories", "reward", RLOO | GENTLY | {"kl_coef": 0.3, "max_response_tokens": 64}),
    Run("service, shorter", False, "tiny", "shorter", TINY_RLOO | {"kl_coef": 0.03}),
    Run("service, rloo", True, "tiny", "tiny-reward", TINY_RLOO | {"kl_coef": 0.15}, seed=1),
    Run("service, longer", False, "tiny", "longer", TINY_RLOO | {"kl_coef": 0.03}),
    Run("service, ppo", True, "tiny", "tiny-reward", {"kl_coef": 0.15}),
    Run("cheerful, grpo", True, "stories", "reward", GROUPS | GENTLY | {"kl_coef": 0.1, "advantage": "grpo"}, seed=1),
    Run("characters", False, "stories", "characters", RLOO | FAST | {"kl_coef": 0.02}),
    Run("says the name, no kl", True, "stories", "name", RLOO | SLOW | {"kl_coef": 0}, seed=1),
    Run("service, rloo, seed 2", True, "tiny", "tiny-reward", TINY_RLOO | {"kl_coef": 0.15}, seed=2),
    Run("service, 64 pairs", False, "tiny", "tiny-reward-few", TINY_RLOO | {"kl_coef": 0.02}),
    Run("reward model, no kl", False, "stories", "reward", QUICKLY | {"kl_coef": 0}),
    Run("reward model of 64 pairs", False, "stories", "reward-few", QUICKLY | {"kl_coef": 0.02}),
)  # fmt: skip


# --- what they start from


def prepare_stories(bench: Bench) -> None:
    """Comparisons by the noisy judge of learning.py, and two reward models: of all pairs, and of a few."""
    folder = bench.folder
    texts = list(dict.fromkeys(row["prompt"] for row in read_rows(Path(bench.prompts))))
    random.Random(0).shuffle(texts)
    held, train = texts[:HELD_OUT], texts[HELD_OUT : HELD_OUT + (200 if bench.quick else 900)]
    write_rows(folder / "held_out.jsonl", [{"prompt": text} for text in held])
    write_rows(folder / "train.jsonl", [{"prompt": text} for text in train])
    write_rows(folder / "named.jsonl", [{"prompt": text} for text in train if " named " in text])
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    short = {"max_steps": 3} if bench.quick else {}
    drawn = folder / "drawn.jsonl"
    if not drawn.exists():
        sampling = {"responses_per_prompt": 4, "max_response_tokens": 40, "temperature": 1}
        bench.rlhf("sample", model=bench.base, dataset=folder / "train.jsonl", output=drawn, **sampling)
    judge_pairs(drawn, 0, folder / "pairs.jsonl")
    write_rows(folder / "few.jsonl", read_rows(folder / "pairs.jsonl")[:FEW])
    for name, rows, epochs, size in (("reward", "pairs", 2, 32), ("reward-few", "few", 10, 16)):
        knobs = REWARD | {"epochs": epochs, "batch_size": size} | short
        bench.rlhf("reward", model=bench.base, dataset=folder / f"{rows}.jsonl", output=folder / name, **knobs)


def prepare_tiny(bench: Bench) -> None:
    """The world of recipes/tiny: base, SFT, its reward model, and one of a few pairs."""
    recipe, folder = ROOT / "recipes" / "tiny", bench.folder / "tiny"
    if not (folder / "data" / "facts.json").exists():
        small = ["--steps", "20", "--rows", "200"] if bench.quick else []
        subprocess.run([sys.executable, str(recipe / "prepare.py"), "--output", str(folder), *small], check=True)
    data, short = folder / "data", {"max_steps": 3} if bench.quick else {}
    write_rows(folder / "few.jsonl", read_rows(data / "comparisons.jsonl")[:FEW])
    sft, rewards = bench.folder / "tiny-sft", {"config": recipe / "reward.yaml", "model": bench.folder / "tiny-sft"}
    demonstrations = data / "sft.jsonl"
    bench.rlhf("sft", config=recipe / "sft.yaml", model=folder / "base", dataset=demonstrations, output=sft, **short)
    pairs, output = data / "comparisons.jsonl", bench.folder / "tiny-reward"
    bench.rlhf("reward", **rewards, dataset=pairs, output=output, **short)
    output = bench.folder / "tiny-reward-few"
    bench.rlhf("reward", **rewards, dataset=folder / "few.jsonl", output=output, epochs=8, batch_size=16)


def start(bench: Bench, run: Run) -> dict[str, object]:
    """Model, prompts, reward and knobs of a run."""
    folder = bench.folder
    if run.task == "stories":
        prompts = "named.jsonl" if run.reward == "name" else "train.jsonl"
        paths = {"model": bench.base, "dataset": folder / prompts, "eval_dataset": folder / "held_out.jsonl"}
        knobs = STORIES | EVERY_RUN
    elif run.task == "tiny":
        data = folder / "tiny" / "data"
        paths = {
            "model": folder / "tiny-sft",
            "dataset": data / "prompts.jsonl",
            "eval_dataset": data / "heldout.jsonl",
        }
        knobs = TINY | EVERY_RUN
    else:
        import optimum

        task, place = optimum.TASKS[run.task], folder / run.name.replace(" ", "-").replace(",", "")
        place = place.with_name(place.name + "-task")
        if not (place / "reward.json").exists():
            optimum.write_task(place, task)
        paths = {"model": place / "base", "dataset": place / "prompts.jsonl"}
        knobs = KNOWN | {"max_response_tokens": task.length, "stop_on": "none"}
        return paths | knobs | {"reward": f"{place / 'reward.py'}:score"}
    trained = run.reward.startswith(("reward", "tiny-reward"))
    reward = folder / run.reward if trained else f"{folder / 'rewards.py'}:{run.reward}"
    return paths | knobs | {"reward": reward} | ({"force": True} if trained else {})


def train(bench: Bench, run: Run) -> Path:
    """Run PPO, unless it is finished; returns its folder."""
    output = bench.folder / "runs" / run.name.replace(",", "").replace(" ", "-")
    knobs = start(bench, run) | run.knobs | ({"max_steps": 4} if bench.quick else {})
    knobs = {name: value for name, value in knobs.items() if value is not None}
    bench.rlhf("ppo", **knobs, seed=run.seed, output=output)
    return output


# --- what came out


def outcome_of(run: Run, folder: Path) -> Outcome:
    """A finished run, with the update at which each condition begins by the present thresholds."""
    from stages.diagnostics.conditions import MetricsHistory, check_conditions

    lines = [line for line in read_rows(folder / "metrics.jsonl") if "reward_score" in line]
    ends_matter = run.task == "tiny"  # where a missing end is charged
    alarms: dict[str, int] = {}
    for update in range(1, len(lines) + 1):
        for alarm in check_conditions(MetricsHistory(lines[:update], eos_expected=ends_matter)):
            alarms.setdefault(alarm.condition, update)
    texts: dict[int, list[str]] = {}
    if (folder / "samples.jsonl").exists():
        for row in read_rows(folder / "samples.jsonl"):
            texts.setdefault(row["step"], []).append(row["response"])
    return Outcome(run.name, run.good, lines, texts, run.reward in ("reward", "reward-few"), alarms)


def write_results(bench: Bench, outcomes: list[Outcome]) -> None:
    """Tables as Markdown, with what they were measured on, and the commands of every step."""
    from stages.diagnostics.conditions import CONDITION_CHECKS

    about = ", ".join(f"{name} {value}" for name, value in machine().items())
    text = f"{about}\n\n{tables(outcomes, tuple(CONDITION_CHECKS))}"
    (bench.folder / "alarms.md").write_text(text, encoding="utf-8")
    (bench.folder / "commands.txt").write_text("\n".join(bench.commands) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="story model (folder)")
    parser.add_argument("--prompts", required=True, help="rows with prompt")
    parser.add_argument("--output", required=True, type=Path, help="folder for all runs and the table")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.base, "", args.prompts, args.output.resolve(), [0], HELD_OUT, args.quick)
    prepare_stories(bench)
    outcomes: list[Outcome] = []
    tiny = False  # whether its base is there
    for run in RUNS:
        if run.task == "tiny" and not tiny:
            prepare_tiny(bench)
            tiny = True
        outcomes.append(outcome_of(run, train(bench, run)))
        write_results(bench, outcomes)  # after every run: what is there is shown
    print((bench.folder / "alarms.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
