"""What the training stages work on: rows to train on and held-out ones, reward sources, the output folder."""

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
from stages.data.splits import (
    held_out_everywhere,
    is_held_out,
    shared_prompts,
    split_held_out,
    warn_of_trained_prompts,
)
from stages.errors import ConfigError, DatasetError, RewardError
from stages.inputs.parts import (
    Inputs,
    Reader,
    check_response_fits,
    describe_left_out,
    open_first,
    read_rows,
    refuse_idle,
)
from stages.launch import read_launch
from stages.models.candidates import ADAPTERS, POLICIES
from stages.models.model_ref import ModelRef, read_adapter_shape
from stages.reading import read_json
from stages.rollout.reward_specs import open_rewards


def sft_inputs(config: SftConfig, overwrite: bool) -> Inputs:
    source = open_first(config, POLICIES)
    return _training("sft", config, overwrite, source, files.read_demonstrations)


def reward_inputs(config: RewardConfig, overwrite: bool) -> Inputs:
    source = open_first(config, ADAPTERS)
    demonstrations = None
    if config.demonstrations:
        demonstrations = files.read_demonstrations(config.demonstrations, skip_bad_rows=config.skip_bad_rows)
    digests = {"demonstrations": demonstrations.digest} if demonstrations else {}
    found = _training(
        "reward", config, overwrite, source, _comparison_reader(config), digests, demonstrations=demonstrations
    )
    _refuse_idle_ratings(config, found.data)
    if config.loss_margin and not any(pair.margin for row in found.data.rows for pair in row.pairs):
        why, fix = f"no row of {config.dataset} has a margin", "give rows with `margin`, or ratings"
        refuse_idle(config, ("loss_margin",), why, fix)
    return found


def dpo_inputs(config: DpoConfig, overwrite: bool) -> Inputs:
    source = open_first(config, POLICIES)
    found = _training("dpo", config, overwrite, source, _comparison_reader(config))
    _refuse_idle_ratings(config, found.data)
    return found


def ppo_inputs(config: PpoConfig, overwrite: bool) -> Inputs:
    source = open_first(config, POLICIES)
    rewards = open_rewards(config.reward, source, trust_remote_code=config.trust_remote_code)
    check_response_fits(config, source)
    digests = {f"reward {spec.name}": spec.digest for spec in rewards}
    ptx = []
    if config.ptx_dataset:
        texts = files.read_demonstrations(config.ptx_dataset, skip_bad_rows=config.skip_bad_rows)
        digests["ptx_dataset"], ptx = texts.digest, list(texts.rows)
    found = _training("ppo", config, overwrite, source, files.read_prompts, digests, rewards=rewards, ptx=ptx)
    found = found if config.eval_dataset else _without_held_out_ptx(found, config)
    return found if found.done else _with_verdicts(found, config.force)


def _comparison_reader(config: RewardConfig | DpoConfig) -> Reader:
    ratings = {"rating_threshold": config.rating_threshold, "normalise_raters": config.normalise_raters}
    return functools.partial(files.read_comparisons, **ratings)


def _training(
    stage: str,
    config: TrainingKnobs,
    overwrite: bool,
    source: ModelRef,
    read: Reader,
    digests: dict[str, str] | None = None,
    **more: Any,
) -> Inputs:
    """Rows split into training and held-out, and the output folder, for a stage that trains.

    `digests` are those of further inputs; `more` are further fields of `Inputs`.
    """
    _check_adapter_fits(config, source)
    data = read_rows(read, config, config.dataset)
    inputs = {"dataset": data.digest, "model": source.digest, **(digests or {})}
    warnings, notes, unmeasured = describe_left_out(data), (), 0
    if config.eval_dataset:
        held = read_rows(read, config, config.eval_dataset)
        inputs["eval_dataset"] = held.digest
        train, held_out = list(data.rows), list(held.rows)[: config.eval_limit]
        trained_on = [*train, *more.get("ptx", [])]
        warnings += (*describe_left_out(held), *warn_of_trained_prompts(config.eval_dataset, held_out, trained_on))
    else:
        train, held_out = split_held_out(data.rows, config.eval_fraction, config.eval_limit)
        unmeasured = len(data.rows) - len(train) - len(held_out)
        checkpoints = [source, *(spec.checkpoint for spec in more.get("rewards", []))]
        parents = [one.manifest for one in checkpoints if one is not None and one.manifest is not None]
        warnings += warn_of_another_split(config.dataset, held_out, config.eval_fraction, parents)
    if unmeasured:
        notes += (f"{unmeasured} more rows have held-out prompts: not trained on, nor measured (--eval-limit)",)
    writer = read_launch().rank == 0
    run = open_run(config.output, stage, config, inputs, overwrite=overwrite, writer=writer)
    return Inputs(source, data, train, held_out, run, warnings=warnings, notes=notes, unmeasured=unmeasured, **more)


def _without_held_out_ptx(inputs: Inputs, config: PpoConfig) -> Inputs:
    """PPO's demonstrations without those of prompts that are held out, here or in every stage.

    Raises DatasetError if none are left.
    """
    here = {row.where for row in shared_prompts(inputs.ptx, inputs.held_out)}
    kept = [row for row in inputs.ptx if row.where not in here and not is_held_out(row, config.eval_fraction)]
    left_out = len(inputs.ptx) - len(kept)
    if not left_out:
        return inputs
    if not kept:
        raise DatasetError(
            f"every row's prompt is held out for evaluation, so no row of {config.ptx_dataset} can be trained on",
            where="--ptx-dataset",
            fix="give demonstrations of other prompts, another --eval-fraction, or an --eval-dataset of its own",
        )
    note = f"{left_out} of {len(inputs.ptx)} rows of --ptx-dataset have held-out prompts and are not trained on"
    return replace(inputs, ptx=kept, notes=(*inputs.notes, note))


def _refuse_idle_ratings(config: RewardConfig | DpoConfig, data: Dataset) -> None:
    if data.kind != "rating":
        why, fix = f"{data.source} holds comparisons, not ratings", "give rows with prompt, response and rating"
        refuse_idle(config, ("rating_threshold", "normalise_raters"), why, fix)


def _check_adapter_fits(config: TrainingKnobs, source: ModelRef) -> None:
    if source.folder is None or (config.lora_rank is None and config.lora_type is None):
        return
    stored, _, lora_type = read_adapter_shape(source.folder)
    if config.lora_type not in (None, lora_type):
        raise ConfigError(
            f"lora_type is {config.lora_type}, but the adapter of {source.name} is {lora_type}",
            where="lora_type",
            fix="leave lora_type out to continue with that adapter, or start from the base",
        )
    if config.lora_rank is not None and config.lora_rank < stored:
        raise ConfigError(
            f"lora_rank {config.lora_rank} is smaller than {stored}, the rank of {source.name}",
            where="lora_rank",
            fix=f"leave lora_rank out, or give at least {stored}",
        )


def _with_verdicts(inputs: Inputs, force: bool) -> Inputs:
    """Repeat the verdict on every reward model; raises RewardError for a no-go without `force`."""
    notes, warnings = inputs.notes, inputs.warnings
    for spec in inputs.rewards:
        if spec.checkpoint is None:
            continue
        decision, reasons = verdict_of(spec.checkpoint.folder)
        line = f"verdict on {spec.name}: {decision}" + (f"; {'; '.join(reasons)}" if reasons else "")
        if decision == "no-go" and not force:
            raise RewardError(
                f"the verdict on {spec.name} is no-go: {'; '.join(reasons)}",
                where="--reward",
                fix="train it on more or better comparisons, or pass --force to go on all the same",
            )
        if decision in ("no-go", "caution"):
            warnings += (line,)
        else:
            notes += (line,)
    return replace(inputs, notes=notes, warnings=warnings)


def verdict_of(folder: Path) -> tuple[str, list[str]]:
    """The decision and its reasons that `rlhf reward` left in a checkpoint; ("none", why) if it left none."""
    try:
        verdict = read_json(folder / "report.json")["verdict"]
        return str(verdict["decision"]), [str(reason) for reason in verdict["reasons"]]
    except (OSError, ValueError, KeyError, TypeError):
        return "none", ["its report.json has no verdict, so nothing is known of how good it is"]


def warn_of_another_split(dataset: str, held_out: list, fraction: float, parents: list[Manifest]) -> tuple[str, ...]:
    """Warnings if another stage may train, or a parent was possibly trained, on prompts that are held out here."""
    warnings = [_describe_parent(parent, fraction) for parent in parents]
    if not held_out_everywhere(held_out, fraction):
        warnings.insert(
            0,
            f"{dataset} has too few prompts, or too many rows of one, to hold out those that every stage does at "
            f"--eval-fraction {fraction:g}, so another stage may train on what is measured here; give --eval-dataset "
            "to be sure",
        )
    return tuple(warning for warning in warnings if warning)


def _describe_parent(parent: Manifest, fraction: float) -> str:
    """How a parent may have been trained on prompts that are held out here; "" if it was not."""
    share = parent.config.get("eval_fraction")
    if not fraction or not isinstance(share, (int, float)):
        return ""
    if parent.config.get("eval_dataset"):
        why = "was tested on an --eval-dataset and trained on all of its dataset"
    elif share < fraction:
        why = f"held out {share:g} of the prompts, this run {fraction:g}"
    elif parent.versions.get("split") != SPLIT:
        why = "was made by an earlier rlhf, which held out other prompts"
    else:
        return ""
    return f"{parent.folder} {why}: it may have been trained on prompts that are held out here"
