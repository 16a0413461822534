"""Checks that the files of a base and of an adapter belong together and hold finite numbers."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from stages.errors import CheckpointError, ModelError
from stages.models.model_ref import ModelRef


def check_config(ref: ModelRef, *, trust_remote_code: bool, build: bool = False) -> None:
    """Raise ModelError if transformers cannot read a base's config.json or, with `build`, make an empty model of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(ref.base, trust_remote_code=trust_remote_code)
            if build:
                AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as many kinds as there are architectures
        raise ModelError(
            "the base cannot be loaded: its config.json describes no causal language model: " + library_reason(error),
            where=str(ref.base),
            fix="restore config.json, or update transformers",
        ) from None


def library_reason(error: BaseException) -> str:
    """A library's message in one line: its first two lines, since some name the cause in the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason, kind = " ".join(lines[:2])[:300], type(error).__name__
    return f"{kind} {reason}" if reason and isinstance(error, KeyError) else reason or kind


def check_tensors(model: nn.Module, loading: dict, ref: ModelRef) -> None:
    """Raise ModelError if the files' tensors are not those of the model that config.json describes.

    `loading` is transformers' report of its loading, which fills missing tensors with random numbers.
    """

    def refuse(what: str, names: list[str], fix: str) -> None:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(what.format(names[0] + more), where=str(ref.base), fix=fix)

    def without_number(name: str) -> str:
        return re.sub(r"\.\d+\.", ".0.", name)

    other = sorted(f"{name} ({tuple(a)} in the files, {tuple(b)} by it)" for name, a, b in loading["mismatched_keys"])
    if other:
        refuse("its weights do not have the shapes of its config.json: {}", other, "use the files of one model")
    missing = sorted(loading["missing_keys"])
    if missing:
        refuse("its weights lack {}", missing, "give a whole causal language model, not a classifier or a bare body")
    layers = {without_number(name) for name, _ in model.named_parameters()}
    extra = sorted(name for name in loading["unexpected_keys"] if without_number(name) in layers)
    if extra and "nextn" not in str(ref.config):  # layers that predict later tokens are not loaded
        refuse("its weights have layers that its config.json does not count: {}", extra, "use the files of one model")


@torch.no_grad()
def check_finite(model: nn.Module, *, where: str) -> None:
    """Raise ModelError if a weight is not finite: first by its sum, which reads every weight only once."""
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.itemsize == 1 or torch.isfinite(weight.sum(dtype=torch.float32)):
            continue
        if not torch.isfinite(weight).all():
            precision = str(weight.dtype).removeprefix("torch.")
            raise ModelError(
                f"its weights are not finite numbers in {precision}: {name}",
                where=where,
                fix="restore the files" if precision != "float16" else "restore the files, or give --dtype bfloat16",
            )


def check_stored(
    tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...] | None], subject: str, where: str
) -> None:
    """Raise CheckpointError unless stored tensors have these names and shapes and are finite; `subject` is theirs."""
    if any(name not in tensors or tensors[name].shape != shape for name, shape in shapes.items()):
        raise CheckpointError(f"{subject} do not fit the base", where=where, fix="train it again on this base")
    if not all(torch.isfinite(tensors[name].float()).all() for name in shapes):
        raise CheckpointError(
            f"{subject} are not finite numbers",
            where=where,
            fix="train it again with a lower --learning-rate; the run that wrote it had diverged",
        )
