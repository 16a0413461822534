"""Small parts that tests of models, rollouts and training are put together from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from stages.checkpoint.manifest import Manifest, checkpoint_digest, write_manifest
from stages.config import REMOVED, DpoConfig, PpoConfig, RewardConfig, SftConfig
from stages.data.comparisons import Pair
from stages.models.adapter_files import LORA_B, MAGNITUDE
from stages.models.base import Base
from stages.models.heads import ScalarHead
from stages.models.lora import Adapter
from stages.models.roles import Roles, new_adapter, save_adapter
from stages.models.tokens import PromptRow, Text, TokenRow, load_text
from stages.results import Silent
from stages.rollout.clipped import ExperienceWithAdvantages, Minibatch
from stages.rollout.experience import Experience, role_logprobs, role_values, sample_rollout
from stages.rollout.generate import Sampling
from stages.training.comparing import TokenComparison
from stages.training.devices import Ranks
from stages.training.progress import Progress
from stages.training.session import Session

PACKING = ("llama", "gpt2", "gpt_neox", "gemma2", "gemma3", "mistral")
PLACES = {"model": "m", "dataset": "d", "output": "o"}


def config_of(cls: type, knobs: dict[str, object]):
    """A config; values that are fixed outside tests may be among `knobs`, and are set in a subclass."""
    fixed = {name: knobs[name] for name in knobs if name in REMOVED}
    cls = type(cls.__name__, (cls,), fixed) if fixed else cls
    return cls(**PLACES | {name: value for name, value in knobs.items() if name not in fixed})


def sft_config(**knobs: object) -> SftConfig:
    return config_of(SftConfig, knobs)


def reward_config(**knobs: object) -> RewardConfig:
    return config_of(RewardConfig, knobs)


def dpo_config(**knobs: object) -> DpoConfig:
    return config_of(DpoConfig, knobs)


def ppo_config(**knobs: object) -> PpoConfig:
    return config_of(PpoConfig, {"reward": ["r.py"], "learning_rate": 1e-5} | knobs)


def sequences_of(lengths: list[int], seed: int = 0, vocabulary: int = 300) -> list[Tensor]:
    """Random token rows of these lengths, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(7, vocabulary, (n,), generator=generator) for n in lengths]


def targets_from(sequences: list[Tensor], starts: list[int]) -> list[Tensor]:
    """Masks that are True from position `start` on."""
    return [torch.arange(len(s)) >= start for s, start in zip(sequences, starts, strict=True)]


def random_adapter(
    base: Base, seed: int, *, rank: int = 4, alpha: float = 8.0, targets: tuple[str, ...] = (), lora_type: str = "lora"
) -> Adapter:
    """A trainable adapter whose B is not zero, so that it changes what the base says."""
    adapter = new_adapter(base, rank, alpha, list(targets), seed, lora_type)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, weight in adapter.weights.items():
        if name.endswith(LORA_B):
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
        elif name.endswith(MAGNITUDE):
            weight.data.mul_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
    return adapter


def base_parameters(base: Base) -> list[torch.nn.Parameter]:
    """The base's own weights, without those of its adapters."""
    return [p for name, p in base.model.named_parameters() if ".lora_" not in name]


def random_head(width: int, seed: int, bias: float = 0.3) -> ScalarHead:
    head = ScalarHead(width).randomise(seed)
    head.bias.data.fill_(bias)
    return head


def roles_on(base: Base) -> Roles:
    """Policy and reference with the same adapter, a critic and a reward model with adapters and heads of their own."""
    roles = Roles(base)
    policy = random_adapter(base, 1)
    roles.add("policy", policy)
    roles.add("reference", policy.copy(trainable=False))
    roles.add("critic", random_adapter(base, 2), random_head(base.width, 3))
    reward, head = random_adapter(base, 4).copy(trainable=False), random_head(base.width, 5)
    roles.add("reward", reward, head.requires_grad_(False))
    return roles


LENGTHS, STARTS = (20, 5, 12, 8, 3, 17), (4, 4, 1, 7, 1, 15)


def token_rows(lengths=LENGTHS, starts=STARTS, seed: int = 0) -> list[TokenRow]:
    """Tokenised rows of these lengths that are learned from these places on."""
    sequences = sequences_of(list(lengths), seed)
    return [TokenRow(s, t, False) for s, t in zip(sequences, targets_from(sequences, list(starts)), strict=True)]


def token_comparisons() -> list[TokenComparison]:
    """A plain pair, a margin, a soft label, and three ranked responses with all their pairs."""
    rows = token_rows([9, 14, 6, 7, 11, 4, 8, 13, 5], [3] * 9, seed=2)
    return [
        TokenComparison(rows[:2], (Pair(0, 1),)),
        TokenComparison(rows[2:4], (Pair(1, 0, margin=0.7),)),
        TokenComparison(rows[4:6], (Pair(0, 1, probability=0.8),)),
        TokenComparison(rows[6:9], (Pair(0, 1), Pair(0, 2), Pair(2, 1))),
    ]


def session_of(
    config: object, roles: Roles, *, ranks: Ranks | None = None, progress: Progress | None = None
) -> Session:
    """A session whose base is loaded, with one step to make."""
    session = Session("test", config, None, Silent())
    session.roles, session.ranks, session.total = roles, ranks or Ranks(roles.base.device), 1
    roles.base.passes.micro_batch_size = config.micro_batch_size
    if progress is not None:
        session.progress = progress
    return session


def in_passes_of(roles: Roles, rows: int | str) -> Roles:
    """The same roles, whose batches are cut into passes of so many rows."""
    roles.base.passes.micro_batch_size = rows
    return roles


@contextmanager
def unpacked(base: Base) -> Iterator[None]:
    """Run the base with right-padding in this block."""
    before, base.packs = base.packs, False
    try:
        yield
    finally:
        base.packs = before


def whole_model(folder: Path):
    """The base as transformers alone loads and runs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def gradient(parameters) -> Tensor:
    """All gradients end to end, zero where there is none; they are forgotten afterwards."""
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(parts)


def relative(a: Tensor, b: Tensor) -> float:
    """How far `a` is from `b`, relative to the size of `b`."""
    return float((a - b).norm() / b.norm())


def prompt_rows(sequences: list[Tensor], end_id: int = 2) -> list[PromptRow]:
    return [PromptRow(ids, f"prompt {i}", end_id, {}, f"p.jsonl:{i + 1}") for i, ids in enumerate(sequences)]


def open_tiny_text(folder: Path, *, chat_template: str | None = None, stop_ids: tuple[int, ...] = (2,)) -> Text:
    return load_text(folder, chat_template=chat_template, stop_ids=stop_ids, trust_remote_code=False)


def experience_of(
    roles: Roles, text: Text, prompts: list[PromptRow], *, seed: int = 0, tokens: int = 12, temperature: float = 0.7
) -> Experience:
    """Experience sampled by the policy; scores are the responses' lengths."""
    keys = [(seed, i) for i in range(len(prompts))]
    rollout = sample_rollout(roles, "policy", text, prompts, keys, Sampling(temperature, tokens))
    logprobs, spread = role_logprobs(roles, "policy", rollout, temperature, want_entropy=True)
    reference, _ = role_logprobs(roles, "reference", rollout, temperature)
    values = role_values(roles, "critic", "critic", rollout)
    score = torch.tensor([float(n) for n in rollout.lengths])
    return Experience(rollout, rollout.mask, logprobs, reference, values, score, spread)


def judged_at_random(experience: Experience, seed: int = 0) -> ExperienceWithAdvantages:
    """Experience with advantages and returns drawn at random, zero off-mask."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, *experience.mask.shape, generator=generator) * experience.mask
    return ExperienceWithAdvantages(experience, draws[0], draws[1] + experience.values)


def all_rows(judged: ExperienceWithAdvantages) -> Minibatch:
    """The whole batch as one minibatch."""
    mask = judged.experience.mask
    return Minibatch(judged, tuple(range(len(mask))), float(mask.sum()), float(len(mask)))


def publish_checkpoint(
    folder: Path, base: Base, stage: str, adapter: Adapter, *, head: ScalarHead | None = None, stops: tuple = (2,)
) -> Path:
    """A finished checkpoint of a stage, as if trained."""
    source = base.ref
    files = save_adapter(folder, base, adapter, head)
    manifest = Manifest(
        stage=stage, base=source.base_ref, parents=(), tokenizer_digest=source.tokenizer_digest,
        stop_token_ids=stops, config={}, datasets={}, metrics={}, throughput={}, versions={}, device="cpu",
        dtype="float32", steps=1, seconds=1.0,
    )  # fmt: skip
    write_manifest(folder, manifest, files)
    assert checkpoint_digest(folder)
    return folder
