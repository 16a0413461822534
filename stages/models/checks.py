"""Whether a base's files belong together and hold numbers: each fault is named as what it is."""

from __future__ import annotations

import re

import torch
from torch import nn

from stages.errors import ModelError
from stages.models.model_ref import ModelRef


def check_config(source: ModelRef, *, trust_remote_code: bool) -> None:
    """Raise ModelError where transformers cannot read the base's config.json."""
    problem = config_problem(source, trust_remote_code=trust_remote_code, build=False)
    if problem:
        raise ModelError(
            f"the base cannot be loaded: {problem}",
            where=str(source.base),
            fix="restore config.json, or update transformers",
        )


def config_problem(source: ModelRef, *, trust_remote_code: bool, build: bool) -> str | None:
    """What is wrong with a config.json that transformers reads and, with `build`, makes an empty model of; or None."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(source.base, trust_remote_code=trust_remote_code)
            if build:
                AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as many kinds as there are architectures
        return f"its config.json describes no causal language model: {library_reason(error)}"
    return None


def library_reason(error: BaseException) -> str:
    """What a library's exception says, in one line; some put the matter into their second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2])[:300]
    if not said:
        return type(error).__name__
    return f"{type(error).__name__} {said}" if isinstance(error, KeyError) else said


def check_tensors(model: nn.Module, loading: dict, source: ModelRef) -> None:
    """Raise ModelError where the files' tensors are not those of the model that config.json describes.

    `loading` is what transformers tells of its loading: with it alone, random numbers would stand in for what lacks.
    """

    def refuse(what: str, names: list[str], fix: str) -> None:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(what.format(names[0] + more), where=str(source.base), fix=fix)

    other = sorted(f"{name} ({tuple(a)} in the files, {tuple(b)} by it)" for name, a, b in loading["mismatched_keys"])
    if other:
        refuse("its weights do not have the shapes of its config.json: {}", other, "use the files of one model")
    absent = sorted(loading["missing_keys"])
    if absent:
        refuse("its weights lack {}", absent, "give a whole causal language model, not a classifier or a bare body")
    layers = {_of_any_layer(name) for name, _ in model.named_parameters()}
    beyond = sorted(name for name in loading["unexpected_keys"] if _of_any_layer(name) in layers)
    if beyond and "nextn" not in str(source.config):  # layers that predict later tokens are rightly left out
        refuse("its weights have layers that its config.json does not count: {}", beyond, "use the files of one model")


def _of_any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", name)


@torch.no_grad()
def check_finite(model: nn.Module, *, where: str) -> None:
    """Raise ModelError where a weight is not finite. Sums tell, at the cost of reading every weight once."""
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
