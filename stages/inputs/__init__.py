"""Inputs of a command, opened and checked before torch is imported: models, rows, reward sources, the output.

Every user error that can be found without a tokenizer is found here, within a second, and nothing is written.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

from stages.diagnostics.finished import finished_tables
from stages.errors import ConfigError
from stages.inputs.measuring import evaluate_inputs, export_inputs, sample_inputs
from stages.inputs.parts import Inputs
from stages.inputs.previewing import preview_inputs
from stages.inputs.training import dpo_inputs, ppo_inputs, reward_inputs, sft_inputs
from stages.models.base_files import adapter_beside
from stages.models.gguf import missing_template
from stages.results import Result, next_commands


def open_inputs(stage: str, config: Any, *, overwrite: bool = False) -> Inputs:
    """The inputs that a stage's config names. Raises a UserError for the first one that is wrong."""
    if getattr(config, "load_in_4bit", False):
        _check_4bit_packages()
    openers = {
        "sft": sft_inputs,
        "reward": reward_inputs,
        "ppo": ppo_inputs,
        "dpo": dpo_inputs,
        "evaluate": evaluate_inputs,
        "sample": sample_inputs,
        "export": export_inputs,
        "preview": preview_inputs,
    }
    inputs = openers[stage](config, overwrite)
    source = inputs.source
    template = missing_template(source.base_name, source.tokenizer, config.chat_template)
    return replace(inputs, warnings=inputs.warnings + adapter_beside(source.base) + template)


def already_done(stage: str, config: Any, inputs: Inputs) -> Result:
    """The result of a command whose run is already finished."""
    inputs.run.tidy()
    manifest = inputs.run.manifest
    data = {"metrics": manifest.metrics, "steps": manifest.steps, "seconds": manifest.seconds}
    following = next_commands(stage, config, manifest.metrics)
    return Result(stage, "already done", config.output, data, finished_tables(inputs.run), following)


def _check_4bit_packages() -> None:
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        what = f"a base in 4 bits needs {' and '.join(missing)}, which is not installed"
        raise ConfigError(what, where="--load-in-4bit", fix="run pip install 'rlhf[4bit]', or leave --load-in-4bit out")
