"""Does PPO, through the real command, reach the known optimum of small problems?

    python benchmarks/optimum.py [--task NAME] [--estimator NAME] [--quick] [--output FILE.json]

Each task is a tiny language model whose responses can all be listed, a reward for each of them, and a weight beta of
the KL. The objective E_pi[R] - beta KL(pi || pi_ref) then has one optimum, pi* ~ pi_ref exp(R / beta). The policy that
`rlhf ppo` learns from sampled responses is compared with that optimum, and with what exact gradients of the objective
reach on the same adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LETTERS = "abcdefghijklmnopqrstuvwxyz"
EOS = 0
SEED = 0
RANK = 16
REWARD_FILE = """import json
from pathlib import Path

TABLE = json.loads(Path(__file__).with_suffix(".json").read_text())


def score(prompts, responses, **columns):
    return [TABLE[prompt][response] for prompt, response in zip(prompts, responses)]
"""


# --- tasks


@dataclass(frozen=True)
class Task:
    """A model, prompts and a reward whose optimum is known; V = `vocabulary` tokens, the end of text among them."""

    name: str
    vocabulary: int
    length: int  # longest response in tokens
    beta: float
    prompts: tuple[str, ...]
    steps: int = 100
    responses: int = 512  # per update, over all prompts
    scale: float = 1.0  # rewards are drawn evenly between 0 and this
    architecture: str = "llama"
    width: int = 64

    @property
    def response_ids(self) -> list[tuple[int, ...]]:
        """Every response there is: those that end, and those cut at the longest length."""
        letters = range(1, self.vocabulary)
        ended = [(*y, EOS) for n in range(self.length) for y in product(letters, repeat=n)]
        return ended + list(product(letters, repeat=self.length))

    def text(self, response: tuple[int, ...]) -> str:
        return "".join(LETTERS[i - 1] for i in response if i != EOS)


# Two letters at least in every prompt: a Llama tells "c" from "ccc" neither by position nor by content.
PROMPTS = ("ab", "ba", "dea", "ced")
TASKS = {
    task.name: task
    for task in (
        Task("16 tokens, length 1, gpt2", 16, 1, 0.1, PROMPTS, steps=120, responses=256, architecture="gpt2"),
        Task("10 tokens, length 2, llama", 10, 2, 0.3, PROMPTS),
        Task("6 tokens, length 3, llama", 6, 3, 1.0, PROMPTS, steps=200, scale=3.0),
        Task("6 tokens, length 2, llama", 6, 2, 0.1, PROMPTS, steps=240, responses=256),
    )
}
QUICK = (tuple(TASKS)[0], tuple(TASKS)[-1])
CONTROL = "rloo, k3 in reward"
# By measurement: with eight steps on each batch, or one, these two were still up to .05 away after as many updates.
FOUR_PASSES = ("--ppo-epochs", "4", "--minibatches", "1", "--learning-rate", "5e-3")  # as rlhf ppo does by default
ESTIMATORS = {
    "gae": FOUR_PASSES,
    "rloo": ("--advantage", "rloo"),
    "reinforce++": ("--advantage", "reinforce++", *FOUR_PASSES),
    CONTROL: ("--advantage", "rloo", "--kl-estimator", "k3", "--kl-placement", "reward", "--force"),
}
LIMITS = {"gae": 0.02, "rloo": 0.03, "reinforce++": 0.03}  # of total variation beyond what exact gradients reach
WITHIN = 0.01  # of the objective that exact gradients reach
MISSED = 0.03  # total variation by which the control has to miss at least
GROUP = 4  # responses to one prompt, where they are compared
# What every run is given. The learning rate suits a model this small; everything else follows from the question:
# responses are drawn from the policy itself, a missing end costs nothing, no prompt is kept out of training.
KNOBS = (
    "--temperature", 1, "--missing-eos-penalty", 0, "--eval-fraction", 0, "--seed", SEED, "--lora-rank", RANK,
    "--learning-rate", "3e-3", "--ppo-epochs", 2, "--minibatches", 4, "--rollout-batch-size", 1024,
)  # fmt: skip


def build_base(folder: Path, task: Task) -> Path:
    """A random model of two layers with a tokenizer of single letters, whose responses are far from uniform."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

    words = {"<eos>": EOS} | {LETTERS[i - 1]: i for i in range(1, task.vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    if task.architecture == "gpt2":
        config = GPT2Config(
            vocab_size=task.vocabulary, n_embd=task.width, n_layer=2, n_head=4, n_positions=32, bos_token_id=EOS,
            eos_token_id=EOS,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            vocab_size=task.vocabulary, hidden_size=task.width, intermediate_size=2 * task.width, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None,
            eos_token_id=EOS, pad_token_id=None, tie_word_embeddings=False,
        )  # fmt: skip
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.2)
        if task.architecture == "llama":
            model.get_input_embeddings().weight.normal_(0.0, 0.3)
        model.get_output_embeddings().weight.normal_(0.0, 1.2 / task.width**0.5)
    model.save_pretrained(folder)
    return folder


def rewards_of(task: Task) -> Tensor:
    """R (prompts, responses) of every response to every prompt."""
    generator = torch.Generator().manual_seed(SEED + 1)
    shape = len(task.prompts), len(task.response_ids)
    return task.scale * torch.rand(shape, generator=generator, dtype=torch.float64)


def write_task(folder: Path, task: Task) -> None:
    """base/, prompts.jsonl, and reward.py with its table."""
    folder.mkdir(parents=True, exist_ok=True)
    build_base(folder / "base", task)
    rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in task.prompts]
    (folder / "prompts.jsonl").write_text("".join(rows))
    (folder / "reward.py").write_text(REWARD_FILE)
    table = {
        prompt: {task.text(y): r for y, r in zip(task.response_ids, row, strict=True)}
        for prompt, row in zip(task.prompts, rewards_of(task).tolist(), strict=True)
    }
    (folder / "reward.json").write_text(json.dumps(table))


# --- exact distributions


class Enumeration:
    """Every response of a task, and the exact log-probability that a role on a base gives to each."""

    def __init__(self, task: Task):
        # A padded response is read only up to its end, so only whole prefixes are run: (letters ^ (length - 1), ...).
        self.task = task
        responses = task.response_ids
        tails = list(product(range(1, task.vocabulary), repeat=task.length - 1))
        first = {tail[:n]: i for i, tail in enumerate(tails) for n in range(task.length)}  # some tail with the prefix
        self.tails = torch.tensor(tails, dtype=torch.long).reshape(len(tails), task.length - 1)
        rows = [[first[y[:t]] if t < len(y) else 0 for t in range(task.length)] for y in responses]
        tokens = [list(y) + [EOS] * (task.length - len(y)) for y in responses]
        self.rows, self.tokens = torch.tensor(rows), torch.tensor(tokens)
        self.mask = torch.arange(task.length) < torch.tensor([len(y) for y in responses])[:, None]

    def logprobs(self, base, prompts: list[Tensor]) -> Tensor:
        """(prompts, responses) under the active role, with gradient."""
        found = []
        for prompt in prompts:
            ids = torch.cat([prompt.expand(len(self.tails), -1), self.tails], dim=1)
            states = base.body(input_ids=ids, use_cache=False).last_hidden_state[:, len(prompt) - 1 :]
            steps = base.logits(states).log_softmax(-1)  # (tails, length, V)
            times = torch.arange(self.task.length).expand_as(self.rows)
            chosen = steps[self.rows, times, self.tokens].masked_fill(~self.mask, 0)
            found.append(chosen.sum(dim=1))
        return torch.stack(found)


@dataclass(frozen=True)
class Problem:
    """A task's objective, exactly: all (prompts, responses) in float64."""

    reference: Tensor  # log pi_ref
    rewards: Tensor
    beta: float

    @property
    def optimum(self) -> Tensor:
        return (self.reference + self.rewards / self.beta).softmax(-1)

    def objective(self, logprobs: Tensor) -> Tensor:
        """E[R] - beta KL, averaged over prompts."""
        gain = self.rewards - self.beta * (logprobs - self.reference)
        return (logprobs.exp() * gain).sum(-1).mean()

    def distance(self, logprobs: Tensor) -> float:
        """Total variation to the optimum, averaged over prompts."""
        return float((logprobs.exp() - self.optimum).abs().sum(-1).mean()) / 2


def open_roles(model: Path, task: Task):
    """The base of a folder with the adapter that `rlhf ppo` starts from there, or ended with; and encoded prompts."""
    from stages.models.base import load_base
    from stages.models.model_ref import open_model
    from stages.models.roles import Roles, adapter_of, new_adapter
    from stages.training.seeds import derive

    source = open_model(str(model), stages=("ppo",), what="--model")
    base = load_base(source, device=torch.device("cpu"), dtype=torch.float32)
    roles = Roles(base)
    if source.manifest is None:
        adapter = new_adapter(base, RANK, None, [], derive(SEED, "ppo", "adapter"))
    else:
        adapter = adapter_of(base, source, trainable=False)
    roles.add("policy", adapter)
    prompts = [torch.tensor([LETTERS.index(c) + 1 for c in prompt]) for prompt in task.prompts]
    return roles, prompts


def exact_gradients(roles, prompts: list[Tensor], listed: Enumeration, problem: Problem, steps: int) -> Tensor:
    """Log-probabilities that Adam on the exact objective reaches from the start of `rlhf ppo`."""
    parameters = roles.parameters("policy")
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with roles.use("policy"):
        for _ in range(steps):
            optimizer.zero_grad()
            (-problem.objective(listed.logprobs(roles.base, prompts).double())).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return listed.logprobs(roles.base, prompts).double()


def of_checkpoint(folder: Path, task: Task, listed: Enumeration) -> Tensor:
    """Log-probabilities (prompts, responses) of a policy that was written to disk."""
    roles, prompts = open_roles(folder, task)
    with roles.use("policy"), torch.no_grad():
        return listed.logprobs(roles.base, prompts).double()


# --- runs


@dataclass(frozen=True)
class Row:
    """How one run of the real command ended."""

    task: str
    estimator: str
    beta: float
    tv_start: float  # of the reference: total variation to the optimum, averaged over prompts
    tv_exact: float
    tv_reached: float
    objective_start: float
    objective_exact: float
    objective_reached: float
    seconds: float

    @property
    def difference(self) -> float:
        return self.tv_reached - self.tv_exact

    @property
    def ratio(self) -> float:
        return self.objective_reached / self.objective_exact

    @property
    def passed(self) -> bool:
        if self.estimator == CONTROL:
            return self.difference > MISSED
        return self.difference <= LIMITS[self.estimator] and abs(self.ratio - 1) <= WITHIN


class Bench:
    """A task written to a folder, its exact optimum, and what exact gradients reach."""

    def __init__(self, folder: Path, task: Task, exact_steps: int = 500):
        self.folder, self.task = folder, task
        write_task(folder, task)
        self.listed = Enumeration(task)
        roles, prompts = open_roles(folder / "base", task)
        with roles.use("policy"), torch.no_grad():
            reference = self.listed.logprobs(roles.base, prompts).double()
        self.problem = Problem(reference, rewards_of(task), task.beta)
        self.exact = exact_gradients(roles, prompts, self.listed, self.problem, exact_steps)

    def command(self, estimator: str, output: Path) -> list[str]:
        """The command line that trains with an estimator."""
        task, folder = self.task, self.folder
        group = 1 if estimator in ("gae", "reinforce++") else GROUP
        responses = task.responses * (2 if group == 1 else 1)
        words = (
            "ppo", "--model", folder / "base", "--reward", f"{folder / 'reward.py'}:score",
            "--dataset", folder / "prompts.jsonl", "--output", output, "--kl-coef", task.beta,
            "--max-response-tokens", task.length, "--max-steps", task.steps, "--batch-size", responses // group,
            "--responses-per-prompt", group, *KNOBS, *ESTIMATORS[estimator],
        )  # fmt: skip
        return [sys.executable, "-m", "rlhf_cli", *map(str, words)]

    def run(self, estimator: str) -> Row:
        """Train with the real command in a process of its own, and measure what it wrote."""
        output = self.folder / estimator.replace(" ", "-")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        began = time.perf_counter()
        ended = subprocess.run(self.command(estimator, output), capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - began
        if ended.returncode:
            raise RuntimeError(f"rlhf ppo ended with {ended.returncode}:\n{ended.stderr}")
        reached, problem = of_checkpoint(output, self.task, self.listed), self.problem
        policies = (problem.reference, self.exact, reached)
        distances = [problem.distance(policy) for policy in policies]
        objectives = [float(problem.objective(policy)) for policy in policies]
        return Row(self.task.name, estimator, self.task.beta, *distances, *objectives, seconds)


HEAD = ("task", "estimator", "beta", "TV start", "TV exact", "TV reached", "difference", "J start", "J exact",
        "J reached", "ratio", "seconds", "")  # fmt: skip


def line(row: Row) -> str:
    """A row of the table, in Markdown."""
    cells = (
        row.task, row.estimator, f"{row.beta:g}", f"{row.tv_start:.3f}", f"{row.tv_exact:.4f}",
        f"{row.tv_reached:.4f}", f"{row.difference:+.4f}", f"{row.objective_start:.4f}", f"{row.objective_exact:.4f}",
        f"{row.objective_reached:.4f}", f"{row.ratio:.4f}", f"{row.seconds:.0f}", "PASS" if row.passed else "FAIL",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, help="run only this one")
    parser.add_argument("--estimator", choices=ESTIMATORS, help="run only this one")
    parser.add_argument("--quick", action="store_true", help="only the two smallest tasks, about two minutes")
    parser.add_argument("--output", type=Path, help="also write the rows to this .json file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|", flush=True)
    for name in [given.task] if given.task else (QUICK if given.quick else TASKS):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder) / "task", TASKS[name])
            for estimator in [given.estimator] if given.estimator else ESTIMATORS:
                rows.append(bench.run(estimator))
                print(line(rows[-1]), flush=True)
    if given.output:
        extra = ("difference", "ratio", "passed")
        found = [asdict(row) | {name: getattr(row, name) for name in extra} for row in rows]
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
