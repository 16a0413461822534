"""Inputs of the training stages: training and held-out rows, reward sources, the output folder."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.checkpoint.manifest import SPLIT, Manifest
from stages.checkpoint.run import open_run
from stages.config import DpoConfig, PpoConfig, RewardConfig, SftConfig, TrainingKnobs
from stages.data import rows as files
from stages.data.rows import Dataset
from stages.data.splits import held_out_everywhere, is_held_out, shared_prompts, split_held_out, warn_of_trained_prompts
from stages.errors import ConfigError, DatasetError, RewardError, counted, verb_for
from stages.inputs.fitting import fitting
from stages.inputs.forms import check_text_as, describe_form
from stages.inputs.parts import (
    Inputs,
    Reader,
    check_response_fits,
    describe_left_out,
    open_first,
    read_beside,
    read_rows,
    refuse_idle,
)
from stages.launch import read_launch
from stages.models.adapter_config import read_adapter_shape
from stages.models.candidates import ADAPTERS, POLICIES
from stages.models.model_ref import ModelRef
from stages.reading import read_json
from stages.rollout.reward_specs import check_columns, open_rewards


def sft_inputs(config: SftConfig, overwrite: bool) -> Inputs:
    source = open_first(config, POLICIES)
    return _training("sft", config, overwrite, source, files.read_demonstrations, {})


def reward_inputs(config: RewardConfig, overwrite: bool) -> Inputs:
    source = open_first(config, ADAPTERS)
    demonstrations = None
    if config.demonstrations:
        demonstrations = read_beside(config, config.demonstrations)
    inputs = _comparisons("reward", config, overwrite, source, demonstrations)
    if config.loss_margin and not any(pair.margin for row in inputs.data.rows for pair in row.pairs):
        why, fix = f"no row of {config.dataset} has a margin", "give rows with `margin`, or ratings"
        refuse_idle(config, ("loss_margin",), why, fix)
    return inputs


def dpo_inputs(config: DpoConfig, overwrite: bool) -> Inputs:
    return _comparisons("dpo", config, overwrite, open_first(config, POLICIES))


def _comparisons(
    stage: str,
    config: RewardConfig | DpoConfig,
    overwrite: bool,
    source: ModelRef,
    demonstrations: Dataset | None = None,
) -> Inputs:
    """Inputs of a stage that trains on comparisons or ratings."""
    ratings = {"rating_threshold": config.rating_threshold, "normalise_raters": config.normalise_raters}
    read = functools.partial(files.read_comparisons, **ratings)
    digests = {"demonstrations": demonstrations.digest} if demonstrations else {}
    inputs = _training(stage, config, overwrite, source, read, digests, demonstrations=demonstrations)
    if inputs.data.kind != "rating":
        why, fix = f"{config.dataset} holds comparisons, not ratings", "give rows with prompt, response and rating"
        refuse_idle(config, ("rating_threshold", "normalise_raters"), why, fix)
    return inputs


def ppo_inputs(config: PpoConfig, overwrite: bool) -> Inputs:
    source = open_first(config, POLICIES)
    rewards = open_rewards(config.reward, source, trust_remote_code=config.trust_remote_code)
    check_response_fits(config, source, [spec.checkpoint for spec in rewards])
    digests = {f"reward {spec.name}": spec.digest for spec in rewards}
    ptx = []
    if config.ptx_dataset:
        texts = read_beside(config, config.ptx_dataset)
        digests["ptx_dataset"], ptx = texts.digest, list(texts.rows)
    read = functools.partial(files.read_prompts, check=functools.partial(check_columns, rewards))
    inputs = _training("ppo", config, overwrite, source, read, digests, rewards=rewards, ptx=ptx)
    if not config.eval_dataset:
        inputs = _without_held_out_ptx(inputs, config)
    return inputs if inputs.done else with_verdicts(inputs, config.force)


def _training(
    stage: str,
    config: TrainingKnobs,
    overwrite: bool,
    source: ModelRef,
    read: Reader,
    digests: dict[str, str],
    **more: Any,
) -> Inputs:
    """Inputs of a stage that trains: rows split into training and held-out rows, and the output folder.

    `digests` are digests of further inputs, `more` further fields of `Inputs`.
    """
    _check_adapter_fits(config, source)
    check_text_as(config, source)
    fits = fitting(config, source)
    data = read_rows(read, config, config.dataset, fits)
    inputs = {"dataset": data.digest, "model": source.digest, **digests}
    warnings, notes = describe_form(config, source, data, more.get("rewards", ()))
    warnings, unmeasured = describe_left_out(data) + warnings, 0
    if config.eval_dataset:
        evaluation = read_rows(read, config, config.eval_dataset, fits)
        inputs["eval_dataset"] = evaluation.digest
        train, held_out = list(data.rows), evaluation.rows[: config.eval_limit]
        warnings += describe_left_out(evaluation)
        warnings += warn_of_trained_prompts(config.eval_dataset, held_out, [*train, *more.get("ptx", [])])
    else:
        train, held_out = split_held_out(data.rows, config.eval_fraction, config.eval_limit)
        unmeasured = len(data.rows) - len(train) - len(held_out)
        models = [source, *(spec.checkpoint for spec in more.get("rewards", []))]
        parents = [model.manifest for model in models if model is not None and model.manifest is not None]
        warnings += _warn_of_another_split(config, held_out, parents)
    if unmeasured:
        more_rows = f"{counted(unmeasured, 'more rows')} {verb_for(unmeasured, 'have')} held-out prompts"
        notes += (f"{more_rows}: not trained on, nor measured (--eval-limit)",)
    writer = read_launch().rank == 0
    run = open_run(config.output, stage, config, inputs, overwrite=overwrite, writer=writer)
    about = {"warnings": warnings, "notes": notes, "unmeasured": unmeasured, "eval_is_apart": bool(config.eval_dataset)}
    return Inputs(source, data, train, held_out, run, **about, **more)


def _without_held_out_ptx(inputs: Inputs, config: PpoConfig) -> Inputs:
    """PPO's demonstrations without those of held-out prompts, of this run or of every stage.

    Raises DatasetError if none are left.
    """
    shared = {row.where for row in shared_prompts(inputs.ptx, inputs.held_out)}
    ptx = [row for row in inputs.ptx if row.where not in shared and not is_held_out(row, config.eval_fraction)]
    if len(ptx) == len(inputs.ptx):
        return inputs
    if not ptx:
        what = f"every row's prompt is held out for evaluation, so no row of {config.ptx_dataset} can be trained on"
        fix = "give demonstrations of other prompts, another --eval-fraction, or an --eval-dataset"
        raise DatasetError(what, where="--ptx-dataset", fix=fix)
    left_out = len(inputs.ptx) - len(ptx)
    have, are = verb_for(left_out, "have"), verb_for(left_out, "are")
    rows = f"{left_out} of {counted(len(inputs.ptx), 'rows')} of --ptx-dataset"
    note = f"{rows} {have} held-out prompts and {are} not trained on"
    return replace(inputs, ptx=ptx, notes=(*inputs.notes, note))


def _check_adapter_fits(config: TrainingKnobs, source: ModelRef) -> None:
    if source.folder is None or (config.lora_rank is None and config.lora_type is None):
        return
    stored = read_adapter_shape(source.folder)
    if config.lora_type not in (None, stored.lora_type):
        what = f"lora_type is {config.lora_type}, but the adapter of {source.name} is {stored.lora_type}"
        fix = "leave lora_type out to continue with that adapter, or start from the base"
        raise ConfigError(what, where="lora_type", fix=fix)
    if config.lora_rank is not None and config.lora_rank < stored.rank:
        what = f"lora_rank {config.lora_rank} is smaller than {stored.rank}, the rank of {source.name}"
        raise ConfigError(what, where="lora_rank", fix=f"leave lora_rank out, or give at least {stored.rank}")


def with_verdicts(inputs: Inputs, force: bool) -> Inputs:
    """Inputs with the verdict on every reward model as a note or warning.

    Raises RewardError for a no-go without `force`.
    """
    notes, warnings = inputs.notes, inputs.warnings
    for spec in inputs.rewards:
        if spec.classifier is not None:
            notes += (f"{spec.name} is no reward model of this tool, so it has no verdict; evaluate it on comparisons",)
        if spec.checkpoint is None:
            continue
        decision, reasons = _read_verdict(spec.checkpoint.folder)
        if decision == "no-go" and not force:
            what = f"the verdict on {spec.name} is no-go: {reasons}"
            fix = "train it on more or better comparisons, or pass --force to use it anyway"
            raise RewardError(what, where="--reward", fix=fix)
        line = f"verdict on {spec.name}: {decision}" + (f"; {reasons}" if reasons else "")
        if decision in ("no-go", "caution"):
            warnings += (line,)
        else:
            notes += (line,)
    return replace(inputs, notes=notes, warnings=warnings)


def _read_verdict(folder: Path) -> tuple[str, str]:
    """The decision and the reasons in a reward checkpoint's report.json; ("none", why) if it has no verdict."""
    try:
        verdict = read_json(folder / "report.json")["verdict"]
        return str(verdict["decision"]), "; ".join(map(str, verdict["reasons"]))
    except (OSError, ValueError, KeyError, TypeError):
        return "none", "its report.json has no verdict, so its quality is unknown"


def _warn_of_another_split(config: TrainingKnobs, held_out: list, parents: list[Manifest]) -> tuple[str, ...]:
    """Warnings if another stage may train, or a parent may have been trained, on prompts that are held out here."""
    fraction, warnings = config.eval_fraction, ()
    if not held_out_everywhere(held_out, fraction):
        warnings += (
            f"{config.dataset} has too few prompts, or too many rows of one, to hold out the prompts that every stage "
            f"holds out at --eval-fraction {fraction:g}, so another stage may train on rows that are evaluated here; "
            "give --eval-dataset to be sure",
        )
    for parent in parents:
        share = parent.config.get("eval_fraction")
        if not fraction or not isinstance(share, (int, float)):
            continue
        if parent.config.get("eval_dataset"):
            why = "was evaluated on an --eval-dataset and trained on all of its dataset"
        elif share < fraction:
            why = f"held out {share:g} of the prompts, this run {fraction:g}"
        elif parent.versions.get("split") != SPLIT:
            why = "was made by an earlier rlhf, which held out other prompts"
        else:
            continue
        warnings += (f"{parent.folder} {why}: it may have been trained on prompts that are held out here",)
    return warnings
