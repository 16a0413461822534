"""The measurements of benchmarks/gpu.py on one model: decoding, training, memory, and a whole PPO iteration."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from roofline import Ceilings, Iteration, iteration_seconds, step_bytes, training_flops

from stages.config import PpoConfig
from stages.models.base import Base
from stages.models.heads import ScalarHead
from stages.models.roles import Roles, new_adapter
from stages.models.tokens import PromptRow, TokenRow
from stages.results import Silent
from stages.rollout.clipped import ExperienceWithAdvantages, clipped_steps
from stages.rollout.estimate import estimate_advantages
from stages.rollout.experience import Experience, lay_out, role_logprobs, role_values
from stages.rollout.generate import ROWS_AT_ONCE, Sampling, generate
from stages.rollout.reward_sources import model_scores
from stages.training.devices import Ranks, free_memory
from stages.training.language import learn_rows
from stages.training.memory import Shapes
from stages.training.plan import (
    PassPlan,
    Work,
    choose_passes,
    largest_pass,
    memory_by_part,
    peak_of,
    resident_bytes,
    rollout_rows,
)
from stages.training.progress import Progress, open_progress
from stages.training.session import Session

NEVER = (-1,)  # a stop token that is never drawn: every response has its full length
RANK = 32


@dataclass(frozen=True)
class Sizes:
    """How much work is measured."""

    matrix: int  # rows and columns of the large matrix product
    copied: int  # bytes of the large copy
    batches: tuple[int, ...]  # responses decoded side by side
    context: int  # tokens of the prompts before what is decoded
    new: int  # tokens that are decoded
    row: int  # tokens of a demonstration


SIZES = {
    "cuda": Sizes(8192, 2**32, (64, 256), 512, 64, 1024),
    "cpu": Sizes(256, 2**22, (2, 4), 8, 4, 16),
}


@dataclass(frozen=True)
class Model:
    """A model of random weights with the four roles of PPO on it."""

    base: Base
    shapes: Shapes
    roles: Roles
    progress: Progress
    config: PpoConfig
    memory: dict[str, float]  # bytes after each thing was added

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def width(self) -> int:
        return self.base.dtype.itemsize


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of some work, with all that it left for the device to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def ceilings(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Ceilings:
    """The best of several large matrix products and copies, on random numbers."""
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=dtype) for _ in range(2))
    product = min(seconds_of(lambda: a @ b, device) for _ in range(10))
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))
    return Ceilings(2 * sizes.matrix**3 / product, 2 * sizes.copied / copied)


def allocated(device: torch.device) -> int:
    """Bytes of tensors on the device; 0 on the CPU, which does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class UnlimitedRatios(PpoConfig):
    """PPO that takes a step on every minibatch: random weights may have any ratio."""

    ratio_limit = 1e9


def open_model(base: Base, shapes: Shapes, tokens: int) -> Model:
    """Policy, reference, critic and reward on a base, with the optimisers of the two that are trained."""
    device = base.device
    config = UnlimitedRatios(
        model="random-weights",
        dataset="random-tokens",
        output="nowhere",
        learning_rate=1e-5,
        reward=["random-reward"],
        device=str(device),
        dtype=str(base.dtype).removeprefix("torch."),
        lora_rank=RANK,
        ppo_epochs=1,
        max_response_tokens=tokens,
        target_approx_kl=None,
    )
    memory = {"base": float(allocated(device))}
    roles = Roles(base)
    for number, role in enumerate(("policy", "reference", "critic", "reward")):
        adapter = new_adapter(base, RANK, None, [], number)
        if role in ("reference", "reward"):
            adapter = adapter.copy(trainable=False)
        head = ScalarHead(base.width).randomise(number).to(device) if role in ("critic", "reward") else None
        roles.add(role, adapter, head)
        memory[role] = float(allocated(device))
    progress = open_progress(config, {name: roles.parameters(name) for name in ("policy", "critic")})
    memory["gradients and moments"] = float(allocated(device))
    return Model(base, shapes, roles, progress, config, memory)


def random_rows(count: int, length: int, vocabulary: int) -> list[torch.Tensor]:
    """Rows of random tokens on the CPU, where batches are made."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, vocabulary, (count, length), generator=generator))


def decode(model: Model, rows: int, sizes: Sizes, limit: Ceilings) -> dict[str, float]:
    """Tokens per second once the prompts are computed, and how near that is to reading every byte once per token."""
    prompts, keys = random_rows(rows, sizes.context, model.base.vocabulary), [("bench", i) for i in range(rows)]

    def run(tokens: int) -> None:
        with model.roles.use("policy"):
            generate(model.base, prompts, keys, NEVER, Sampling(1.0, tokens, rollout_batch_size=rows))

    run(2)
    first = seconds_of(lambda: run(1), model.device)
    step = (seconds_of(lambda: run(1 + sizes.new), model.device) - first) / sizes.new
    least = step_bytes(model.shapes, rows, sizes.context + sizes.new / 2, model.width) / limit.bytes
    return {"tokens_per_s": rows / step, "step_ms": 1e3 * step, "share_of_bandwidth": least / step, "prefill_s": first}


def free_beside_base(model: Model, work: Work) -> float | None:
    """What was free before the roles were there: the plan counts them itself."""
    free, held = (
        free_memory(model.device),
        resident_bytes(work.stage, model.config, model.base.ref, model.shapes, model.width),
    )
    return None if free is None else free + held.adapters + held.moments


def planned(model: Model, work: Work) -> PassPlan:
    """Passes as the plan cuts them for this device; activations are recomputed from here on where it says so."""
    passes = choose_passes(model.config, work, model.base.ref, model.shapes, free_beside_base(model, work))
    if passes.checkpointing and not model.base.checkpoints:
        model.base.checkpoint_activations()
    model.base.passes.tokens = passes.tokens
    return passes


def train(model: Model, sizes: Sizes, limit: Ceilings, rounds: int = 2) -> dict[str, float]:
    """Supervised fine-tuning, forward and backward: tokens per second and the share of the matrix-product rate."""
    lengths = [sizes.row] * 64
    passes = planned(model, Work("sft", lengths, 64))
    rows = max(1, passes.tokens // sizes.row)
    ids = random_rows(rows, sizes.row, model.base.vocabulary)
    batch = [TokenRow(row, torch.arange(sizes.row) >= 1, False) for row in ids]

    def run() -> None:
        learn_rows(model.roles, "policy", batch, rows * sizes.row)

    run()
    took = min(seconds_of(run, model.device) for _ in range(rounds))
    model.progress.optimizers["policy"].zero()
    tokens = rows * sizes.row
    flops = training_flops(model.shapes, tokens, sizes.row, rows * (sizes.row - 1))
    return {
        "tokens_per_s": tokens / took,
        "tokens_per_pass": float(tokens),
        "recomputed": float(passes.checkpointing),
        "share_of_matmul": flops / took / limit.flops,
    }


# --- a whole PPO iteration


def work_of(model: Model, it: Iteration) -> Work:
    """The iteration as the memory plan sees it."""
    share = it.response / (it.prompt + it.response)
    sizes = [it.prompt + it.response] * it.prompts
    at_once = min(ROWS_AT_ONCE[model.device.type], it.prompts)
    return Work("ppo", sizes, it.prompts, read=share, prompt=it.prompt, response=it.response, at_once=at_once)


def iterate(model: Model, it: Iteration, limit: Ceilings) -> dict[str, object]:
    """Sample, judge and learn once: seconds of each phase beside the least, peak of memory beside the plan's."""
    device, roles, config = model.device, model.roles, replace(model.config, batch_size=it.prompts)
    work = work_of(model, it)
    rows = rollout_rows(config, work, model.base.ref, model.shapes, free_beside_base(model, work))
    passes = planned(model, work)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took: dict[str, float] = {}
    found: dict[str, object] = {}

    def phase(name: str, work: Callable[[], object]) -> None:
        took[name] = seconds_of(lambda: found.update({name: work()}), device)

    prompts = random_rows(it.prompts, it.prompt, model.base.vocabulary)
    asked = [PromptRow(ids, "", 0, {}, "") for ids in prompts]
    keys = [("ppo", i) for i in range(it.prompts)]

    def sample() -> object:
        with roles.use("policy"):
            return generate(model.base, prompts, keys, NEVER, Sampling(1.0, it.response, rollout_batch_size=rows))

    phase("rollout", sample)
    rollout = lay_out(asked, found["rollout"], [""] * it.prompts, torch.zeros(it.prompts, dtype=torch.bool))
    phase("policy", lambda: role_logprobs(roles, "policy", rollout, 1.0))
    phase("reference", lambda: role_logprobs(roles, "reference", rollout, 1.0))
    phase("value", lambda: role_values(roles, "critic", "critic", rollout))
    phase("reward", lambda: model_scores(roles, "reward", asked, rollout.responses, rollout.ended))
    (logprobs, spread), (reference, _) = found["policy"], found["reference"]
    score, mask = found["reward"].to(device), rollout.mask.to(device)
    experience = Experience(rollout, mask, logprobs, reference, found["value"], score, spread)
    groups = torch.arange(it.prompts, device=device)

    def update() -> object:
        advantages, returns = estimate_advantages(config, experience, score, config.kl_coef, groups, lambda x: x)
        judged = ExperienceWithAdvantages(experience, advantages, returns, config.kl_coef)
        session = Session("ppo", config, None, Silent())
        session.roles, session.ranks, session.progress, session.total = roles, Ranks(device), model.progress, 1
        return clipped_steps(session, judged, 0.0, 0)

    phase("update", update)
    at_once = work.at_once if rows == "auto" else rows
    least = iteration_seconds(model.shapes, replace(it, at_once=at_once), limit, model.width)
    parts = memory_by_part(config, work, model.base.ref, model.shapes, passes=passes)
    parts["adapters (weights)"] *= 4 / 3  # the reference, which the plan leaves out where there is no checkpoint
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "prompts": it.prompts,
        "tokens": [it.prompt, it.response],
        "responses_at_once": at_once,
        "tokens_per_pass": largest_pass(config, work, passes.tokens),
        "recomputed": passes.checkpointing,
        "seconds": took,
        "total_s": sum(took.values()),
        "least": least,
        "least_s": sum(least.values()),
        "times_roofline": sum(took.values()) / sum(least.values()),
        "planned_peak": peak_of(parts),
        "planned_parts": parts,
        "measured_peak": peak,
    }


def expected_seconds(model: Model, it: Iteration, step_s: float, tokens_per_s: float) -> float:
    """What an iteration will take, by what decoding and training took; a forward pass costs half of a training pass."""
    at_once = min(ROWS_AT_ONCE[model.device.type], it.prompts)
    sampling = -(-it.prompts // at_once) * it.response * step_s
    passes = 4 * 0.5 + 2
    return sampling + (passes * it.tokens + 0.5 * it.prompts * it.prompt) / tokens_per_s
