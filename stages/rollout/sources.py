"""Scores responses: reward models on the shared base and Python functions, added up with their weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from stages.errors import RewardError
from stages.models.forward import sequence_scores
from stages.models.roles import Roles, adapter_of, head_of
from stages.models.tokens import PromptRow
from stages.rollout.specs import Spec, python_file, reason_of
from stages.training.passes import collect

LARGEST = torch.finfo(torch.float32).max


class Rewards:
    """Scores responses with every source and adds them up, weighted."""

    def __init__(self, specs: list[Spec], roles: Roles, micro_batch_size: int | str, prefix: str = "reward"):
        self.specs, self.roles, self.micro_batch_size = specs, roles, micro_batch_size
        self.names = {id(s): f"{prefix}{i or ''}" for i, s in enumerate(x for x in specs if x.checkpoint)}
        for spec in specs:
            if spec.checkpoint is not None:
                adapter = adapter_of(roles.base, spec.checkpoint, trainable=False)
                roles.add(self.names[id(spec)], adapter, head_of(roles.base, spec.checkpoint.folder))

    def score(self, prompts: list[PromptRow], responses: list[Tensor], texts: list[str], ended: Tensor) -> Tensor:
        """Weighted scores (B,) fp32 on the CPU.

        responses: token ids (L_i,); texts: the same without special tokens, for functions; ended (B,): True where the
        response stopped by itself, in which case reward models read the prompt's own end token in its place.
        """
        total = torch.zeros(len(prompts))
        for spec in self.specs:
            if spec.checkpoint is not None:
                role = self.names[id(spec)]
                total += spec.weight * model_scores(self.roles, role, prompts, responses, ended, self.micro_batch_size)
            else:
                total += spec.weight * call_function(spec.function, spec.name, prompts, texts)
        return total


def model_scores(
    roles: Roles,
    role: str,
    prompts: list[PromptRow],
    responses: list[Tensor],
    ended: Tensor,
    micro_batch_size: int | str,
) -> Tensor:
    """Scores (B,) fp32 on the CPU of a reward model's role, for the arguments of `Rewards.score`."""
    whole = []
    for prompt, response, done in zip(prompts, responses, ended.tolist(), strict=True):
        closed = torch.cat([response[:-1], torch.tensor([prompt.end_id])]) if done else response
        whole.append(torch.cat([prompt.ids, closed]))

    def forward(rows: list[int]) -> list[Tensor]:
        return list(sequence_scores(roles, role, [whole[i] for i in rows]).cpu())

    with roles.use(role):
        on_cuda = roles.base.device.type == "cuda"
        return torch.stack(collect([len(w) for w in whole], micro_batch_size, forward, on_cuda=on_cuda))


def call_function(function: Callable[..., object], name: str, prompts: list[PromptRow], texts: list[str]) -> Tensor:
    """Scores (B,) from a user's function; raises RewardError, with the prompt, for anything but finite numbers."""
    columns = {key: [p.columns.get(key) for p in prompts] for key in sorted({k for p in prompts for k in p.columns})}
    try:
        result = function([p.text for p in prompts], list(texts), **_accepted(function, columns))
    except Exception as error:
        path = python_file(name)
        raise RewardError(
            f"it raised {reason_of(error, path)}", where=f"--reward {name}", fix="mend the function"
        ) from None
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, (list, tuple)) or len(result) != len(prompts):
        got = f"{len(result)} numbers" if isinstance(result, (list, tuple)) else type(result).__name__
        raise RewardError(
            f"it returned {got} for {len(prompts)} responses",
            where=f"--reward {name}",
            fix="return a list with one number each",
        )
    for prompt, text, number in zip(prompts, texts, result, strict=True):
        if isinstance(number, bool) or not isinstance(number, Real) or not abs(number) <= LARGEST:
            raise RewardError(
                f"it returned {number!r} for the response {text[:80]!r} to {str(prompt.text)[:80]!r} ({prompt.where})",
                where=f"--reward {name}",
                fix="return a finite number for every response",
            )
    return torch.tensor(result, dtype=torch.float32)


def _accepted(function: Callable[..., object], columns: dict[str, list]) -> dict[str, list]:
    """The columns that a function takes: all with **columns, else those it names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return columns
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return {k: v for k, v in columns.items() if k not in {p.name for p in list(parameters)[:2]}}
    named = {p.name for p in list(parameters)[2:]}
    return {k: v for k, v in columns.items() if k in named}
