"""Inputs of `rlhf preview`: rows, and a model of which only config and tokenizer are needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stages.data import rows as files
from stages.errors import ModelError
from stages.inputs.fitting import fitting
from stages.inputs.forms import check_text_as, describe_form
from stages.inputs.parts import Inputs, check_response_fits, describe_left_out, read_rows
from stages.knobs import as_dict, default_of, knobs
from stages.measuring_config import STAGES, PreviewConfig
from stages.models.candidates import ADAPTERS
from stages.models.model_ref import open_model

STAGE_OF_KIND = {"demonstration": "sft", "comparison": "reward", "rating": "reward", "prompt": "ppo"}
READERS = {
    "sft": files.read_demonstrations,
    "reward": files.read_comparisons,
    "dpo": files.read_comparisons,
    "ppo": files.read_prompts,
}


def stage_of(config: PreviewConfig, kind: str) -> str:
    """The stage that will read the rows: the given one, or that of their kind."""
    return config.stage or STAGE_OF_KIND[kind]


def stage_config(stage: str, config: PreviewConfig) -> Any:
    """The knobs of a stage: as given to the preview, else its defaults."""
    defaults = {name: default_of(f) for name, (f, _, _) in knobs(STAGES[stage]).items()}
    return SimpleNamespace(**defaults | {name: value for name, value in as_dict(config).items() if value is not None})


def preview_inputs(config: PreviewConfig, overwrite: bool) -> Inputs:
    """The rows as the stage reads them, and the model without its weights."""
    trusted = config.trust_remote_code
    about = {"trust_remote_code": trusted, "base": config.base, "weights": False}
    source = open_model(config.model, stages=ADAPTERS, what="--model", **about)
    if source.is_classifier:
        what, fix = (
            f"{config.model} is a sequence classifier, from which no stage starts",
            "give a base or a checkpoint",
        )
        raise ModelError(what, where="--model", fix=fix)
    check_text_as(config, source)
    stage = stage_of(config, files.detect_kind(config.dataset, map=config.map))
    knobs_of_stage = stage_config(stage, config)
    if stage == "ppo":
        check_response_fits(knobs_of_stage, source)
    data = read_rows(READERS[stage], config, config.dataset, fitting(knobs_of_stage, source))
    warnings, notes = describe_form(config, source, data)
    return Inputs(source, data, warnings=describe_left_out(data) + warnings + _idle(config, stage), notes=notes)


def _idle(config: PreviewConfig, stage: str) -> tuple[str, ...]:
    """A warning for each knob that was given and that the stage does not have."""
    names = ("mask", "max_tokens", "max_prompt_tokens", "max_response_tokens")
    idle = [name for name in names if getattr(config, name) is not None and name not in knobs(STAGES[stage])]
    return tuple(f"--{name.replace('_', '-')} has no effect on what rlhf {stage} reads" for name in idle)
