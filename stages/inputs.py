"""What a command works on, opened and checked before torch is imported: models, rows, reward sources, the output.

Every mistake of the user's that can be seen without a tokenizer is found here, within a second, with nothing written.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stages.config import (
    DpoConfig,
    EvaluateConfig,
    ExportConfig,
    PpoConfig,
    RewardConfig,
    SampleConfig,
    SftConfig,
    TrainingKnobs,
    default_of,
    describe_special,
    knobs,
)
from stages.errors import CheckpointError, ConfigError, DatasetError, ModelError, OutputError, RewardError, UserError
from stages.files import rows as files
from stages.files.manifest import locate
from stages.files.rows import Dataset
from stages.files.run import Run, open_run
from stages.files.splits import SPLIT, held_out_everywhere, is_held_out, shared_prompts, split_held_out
from stages.launch import read_launch
from stages.models.candidates import Candidate, candidate_of, open_candidates
from stages.models.source import ModelRef, adapter_beside, lora_type_of, open_model, read_adapter_shape, same_base
from stages.places import absolute
from stages.reading import read_bytes, read_json, read_text
from stages.results import Result, metrics_table, next_commands
from stages.rollout.plot import MARK, METADATA, check_matplotlib
from stages.rollout.specs import RewardSpec, open_rewards

POLICIES = ("sft", "ppo", "dpo")
RESPONSE_KEYS = ("prompt", "response", "index", "ended", "tokens")  # of a line that `rlhf sample` writes
IMPLICIT = ("dpo", "ppo")  # policies that are optimal for a reward of their own: beta x log(policy / reference)
REPORT_KEYS = ("model", "dataset")  # of what `rlhf evaluate` writes


@dataclass(frozen=True)
class Inputs:
    """Everything a stage needs from disk; what a stage has no use for is empty."""

    source: ModelRef
    data: Dataset | None = None
    train: list = field(default_factory=list)
    held_out: list = field(default_factory=list)  # at most eval_limit
    run: Run | None = None  # the output folder of a training stage
    rewards: list[RewardSpec] = field(default_factory=list)
    gold: list[RewardSpec] = field(default_factory=list)
    demonstrations: Dataset | None = None
    against: ModelRef | None = None
    reference: ModelRef | None = None
    also: list[Candidate] = field(default_factory=list)  # measured beside `source`
    ptx: list = field(default_factory=list)  # demonstrations whose language-modelling loss PPO mixes in
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what is worth saying, though nothing is wrong
    unmeasured: int = 0  # rows held out beyond eval_limit: not trained on either

    @property
    def rows_left_out(self) -> dict[str, int]:
        """Rows of the dataset that are not trained on, by reason."""
        held_out = len(self.held_out) + self.unmeasured
        return {"held_out_rows": held_out, "skipped_rows": self.data.skipped if self.data else 0}

    @property
    def done(self) -> bool:
        """True where the output stands finished, made by the same knobs from the same inputs."""
        return self.run is not None and self.run.finished


def open_inputs(stage: str, config: Any, *, overwrite: bool = False) -> Inputs:
    """Open what a stage's config names; raises a UserError for the first thing that is wrong."""
    if getattr(config, "load_in_4bit", False):
        _four_bits_are_there()
    found = {
        "sft": sft_inputs,
        "reward": reward_inputs,
        "ppo": ppo_inputs,
        "dpo": dpo_inputs,
        "evaluate": evaluate_inputs,
        "sample": sample_inputs,
        "export": export_inputs,
    }[stage](config, overwrite)
    return replace(found, warnings=found.warnings + adapter_beside(found.source.base))


def already_done(stage: str, config: Any, inputs: Inputs) -> Result:
    """The result of a command whose work was done before."""
    inputs.run.tidy()
    manifest = inputs.run.manifest
    data = {"metrics": manifest.metrics, "steps": manifest.steps, "seconds": manifest.seconds}
    tables = (metrics_table(stage, manifest.metrics),)
    return Result(stage, "already done", config.output, data, tables, next_commands(stage, config))


def sft_inputs(config: SftConfig, overwrite: bool) -> Inputs:
    source = _policy(config, "--model")
    read = _reader(files.read_demonstrations, config)
    return _training("sft", config, overwrite, source, read)


def reward_inputs(config: RewardConfig, overwrite: bool) -> Inputs:
    source = open_model(
        config.model, stages=(*POLICIES, "reward"), what="--model", trust_remote_code=config.trust_remote_code
    )
    ratings = {"rating_threshold": config.rating_threshold, "normalise_raters": config.normalise_raters}
    read = _reader(files.read_comparisons, config, **ratings)
    demonstrations = None
    if config.demonstrations:
        demonstrations = files.read_demonstrations(config.demonstrations, skip_bad_rows=config.skip_bad_rows)
    more = {"demonstrations": demonstrations.digest} if demonstrations else {}
    found = _training("reward", config, overwrite, source, read, more, demonstrations=demonstrations)
    _refuse_idle_ratings(config, found.data)
    if config.loss_margin and not any(pair.margin for row in found.data.rows for pair in row.pairs):
        raise ConfigError(
            f"loss_margin has no effect: no row of {config.dataset} has a margin",
            where="--loss-margin",
            fix="leave it out, or give rows with `margin`, or ratings",
        )
    return found


def ppo_inputs(config: PpoConfig, overwrite: bool) -> Inputs:
    source = _policy(config, "--model")
    rewards = open_rewards(config.reward, source, trust_remote_code=config.trust_remote_code)
    _response_fits(config, source)
    more = {f"reward {spec.name}": spec.digest for spec in rewards}
    extra: dict[str, Any] = {"rewards": rewards}
    if config.ptx_dataset:
        ptx = files.read_demonstrations(config.ptx_dataset, skip_bad_rows=config.skip_bad_rows)
        more["ptx_dataset"], extra["ptx"] = ptx.digest, list(ptx.rows)
    found = _training("ppo", config, overwrite, source, _reader(files.read_prompts, config), more, **extra)
    found = found if config.eval_dataset else _without_held_out_ptx(found, config)
    return found if found.done else _with_verdicts(found, config.force)


def dpo_inputs(config: DpoConfig, overwrite: bool) -> Inputs:
    source = _policy(config, "--model")
    ratings = {"rating_threshold": config.rating_threshold, "normalise_raters": config.normalise_raters}
    found = _training("dpo", config, overwrite, source, _reader(files.read_comparisons, config, **ratings))
    _refuse_idle_ratings(config, found.data)
    return found


def _refuse_idle_ratings(config: RewardConfig | DpoConfig, data: Dataset) -> None:
    """Raise ConfigError for a knob of ratings where there are none."""
    for name in ("rating_threshold", "normalise_raters"):
        if getattr(config, name) and data.kind != "rating":
            raise ConfigError(
                f"{name} has no effect: {data.source} holds comparisons, not ratings",
                where=f"--{name.replace('_', '-')}",
                fix="leave it out, or give rows with prompt, response and rating",
            )


def evaluate_inputs(config: EvaluateConfig, overwrite: bool) -> Inputs:
    trusted = config.trust_remote_code
    source = open_model(config.model, stages=(*POLICIES, "reward"), what="--model", trust_remote_code=trusted)
    reference = _other(config.reference, "--reference", source, trusted)
    kind = files.detect_kind(config.dataset, map=config.map)
    stage = source.manifest.stage if source.manifest is not None else None
    compares = stage == "reward" or (kind in ("comparison", "rating") and not (config.reward or config.gold))
    if compares:
        return _comparing_inputs(config, source, reference, kind)
    against = _other(config.against, "--against", source, trusted)
    rewards = open_rewards(config.reward, source, trust_remote_code=trusted)
    gold = open_rewards(config.gold, source, what="--gold", trust_remote_code=trusted)
    if config.max_response_tokens is not None:
        _response_fits(config, source)
    answers = kind != "demonstration" or bool(rewards or gold)
    if kind != "demonstration":
        _refuse_idle(config, ("mask", "max_tokens"), kind)
    if not answers:
        _refuse_idle(config, ("reference",), kind)
    also = _also(config, source, POLICIES, "give --reward {} to score by it, or comparisons as --dataset")
    if also and not answers:
        raise DatasetError(
            f"{config.dataset} holds demonstrations; --also measures answers to prompts",
            where="--dataset",
            fix="give prompts, or --reward to have the demonstrations' prompts answered and scored",
        )
    _check_outputs(config)
    data = _reader(files.read_demonstrations if kind == "demonstration" else files.read_prompts, config)(config.dataset)
    warnings = _left_out(data)
    if reference is None and answers:
        try:
            reference = parent_of(source, trusted)
        except UserError as error:
            if also or config.plot:
                raise CheckpointError(
                    f"KL cannot be measured: {error.what}", where="--reference", fix="name where KL is measured from"
                ) from None
            warnings += (f"KL is not measured: {error.what}; name another --reference",)
    more = {"rewards": rewards, "gold": gold, "against": against, "reference": reference, "also": also}
    return Inputs(source, data, warnings=warnings, **more)


def _comparing_inputs(config: EvaluateConfig, source: ModelRef, reference: ModelRef | None, kind: str) -> Inputs:
    """Reward models and implicit rewards on comparisons."""
    model = candidate_of(config.model, source)
    if model.stage == "reward" and kind not in ("comparison", "rating"):
        raise DatasetError(
            f"{config.dataset} holds {kind}s; a reward model is measured on comparisons",
            where="--dataset",
            fix="give rows with prompt, chosen and rejected",
        )
    if model.stage not in ("reward", *IMPLICIT):
        raise DatasetError(
            f"{config.dataset} holds comparisons, but {config.model} is no reward model, and no DPO or PPO policy",
            where="--dataset",
            fix="give prompts or demonstrations, or a reward, dpo or ppo checkpoint as --model",
        )
    for name in ("against", "best_of", "plot", "reward", "gold"):
        if getattr(config, name):
            raise ConfigError(
                f"{config.model} is measured on comparisons, where nothing is sampled",
                where=f"--{name.replace('_', '-')}",
                fix="leave it out, use --also to compare, or give a policy as --model with prompts as --dataset",
            )
    _refuse_idle(config, ("mask",), kind)
    also = _also(config, source, ("reward", *IMPLICIT), "")
    models = [_with_reference(c, reference, config.trust_remote_code) for c in (model, *also)]
    _check_outputs(config)
    data = _reader(files.read_comparisons, config)(config.dataset)
    return Inputs(source, data, also=models[1:], reference=models[0].reference, warnings=_left_out(data))


def _refuse_idle(config: EvaluateConfig, names: tuple[str, ...], kind: str) -> None:
    """Raise ConfigError for a knob that means nothing for rows of this kind."""
    for name in names:
        if getattr(config, name) != default_of(knobs(type(config))[name][0]):
            raise ConfigError(
                f"{name} has no effect: {config.dataset} holds {kind}s",
                where=f"--{name.replace('_', '-')}",
                fix="leave it out, or give another --dataset",
            )


def _also(config: EvaluateConfig, source: ModelRef, stages: tuple[str, ...], advice: str) -> list[Candidate]:
    """What --also names, of one base with --model and of stages that can be measured beside it."""
    found: list[Candidate] = []
    for name in config.also:
        opened = open_candidates(name, (*POLICIES, "reward"), "--also", trust_remote_code=config.trust_remote_code)
        for candidate in opened:
            if candidate.stage not in stages and not (candidate.stage is None and "sft" in stages):
                what = f"a `{candidate.stage}` checkpoint" if candidate.stage else "a base model"
                policy = "which has no score of its own, and cannot be measured on comparisons"
                raise CheckpointError(
                    f"{name} is {what}, {policy if 'reward' in stages else 'no policy that could answer prompts'}",
                    where="--also",
                    fix=advice.format(name) or "give reward, dpo or ppo checkpoints, or --reward to have it answer",
                )
            same_base(source, candidate.source, first_flag="--model", second_flag="--also")
        found += opened
    return found


def _with_reference(candidate: Candidate, given: ModelRef | None, trusted: bool) -> Candidate:
    """A candidate with the reference of its implicit reward; raises a UserError where there is none to measure."""
    if candidate.stage == "reward":
        if candidate.state is not None:
            raise CheckpointError(
                f"{candidate.name} is of a `reward` run, whose states are not read",
                where="--also",
                fix="finish the run and give its folder",
            )
        return candidate
    if not candidate.beta:
        raise CheckpointError(
            f"{candidate.name} was trained with kl_coef 0, so it has no implicit reward",
            where="--model, --also",
            fix="leave it out, or give a --reward to have it answer the prompts",
        )
    parent = candidate.source if candidate.is_unfinished else parent_of(candidate.source, trusted)
    return replace(candidate, reference=given or parent)


def sample_inputs(config: SampleConfig, overwrite: bool) -> Inputs:
    source = _policy(config, "--model")
    _response_fits(config, source)
    _writable_file(config, ".jsonl", ours=RESPONSE_KEYS)
    data = _reader(files.read_prompts, config)(config.dataset)
    return Inputs(source, data, warnings=_left_out(data))


def export_inputs(config: ExportConfig, overwrite: bool) -> Inputs:
    source = open_model(
        config.model, stages=(*POLICIES, "reward"), what="--model", trust_remote_code=config.trust_remote_code
    )
    if source.manifest is None:
        raise CheckpointError(
            f"{config.model} is a base model; there is no adapter to merge",
            where="--model",
            fix="give a checkpoint of this tool",
        )
    output = absolute(config.output, "--output")
    special = describe_special(output)
    if special:
        raise OutputError(f"{output} is {special}", where="--output", fix="give a new folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} is not empty", where="--output", fix="give a new folder")
    return Inputs(source)


# --- what is known of reward models


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
    return dataclasses.replace(inputs, notes=notes, warnings=warnings)


def verdict_of(folder: Path) -> tuple[str, list[str]]:
    """The decision and its reasons that `rlhf reward` left in a checkpoint; ("none", why) where it left none."""
    try:
        verdict = read_json(folder / "report.json")["verdict"]
        return str(verdict["decision"]), [str(reason) for reason in verdict["reasons"]]
    except (OSError, ValueError, KeyError, TypeError):
        return "none", ["its report.json has no verdict, so nothing is known of how good it is"]


# --- parts


def _four_bits_are_there() -> None:
    """Raise ConfigError where a package is missing without which no base is held in 4 bits."""
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"a base in 4 bits needs {' and '.join(missing)}, which is not installed",
            where="--load-in-4bit",
            fix="pip install 'rlhf[4bit]', or leave it out",
        )


def _policy(config: Any, what: str) -> ModelRef:
    return open_model(config.model, stages=POLICIES, what=what, trust_remote_code=config.trust_remote_code)


def _other(name: str | None, what: str, source: ModelRef, trusted: bool) -> ModelRef | None:
    if name is None:
        return None
    other = open_model(name, stages=POLICIES, what=what, trust_remote_code=trusted)
    same_base(source, other, first_flag="--model", second_flag=what)
    return other


def parent_of(source: ModelRef, trusted: bool = False) -> ModelRef:
    """The checkpoint that a policy was trained from, else its base; raises UserError where it is gone."""
    if source.manifest is None:
        return source
    parent = next((p for p in source.manifest.parents if p.role == "model"), None)
    if parent is None:
        return open_model(str(source.base), stages=(), what="base", trust_remote_code=trusted)
    place = str(locate(source.folder, parent))
    return open_model(place, stages=(*POLICIES, "reward"), what="reference", trust_remote_code=trusted)


def _reader(read: Any, config: Any, **more: Any) -> Any:
    def opened(name: str) -> Dataset:
        return read(name, map=config.map, skip_bad_rows=config.skip_bad_rows, limit_rows=config.limit_rows, **more)

    return opened


def _training(
    stage: str,
    config: TrainingKnobs,
    overwrite: bool,
    source: ModelRef,
    read: Any,
    more_inputs: dict[str, str] | None = None,
    **more: Any,
) -> Inputs:
    """Rows split into training and held-out, and the output folder, for a stage that trains."""
    _adapter_fits(config, source)
    data = read(config.dataset)
    warnings = _left_out(data)
    inputs = {"dataset": data.digest, "model": source.digest, **(more_inputs or {})}
    unmeasured, notes = 0, ()
    if config.eval_dataset:
        held = read(config.eval_dataset)
        inputs["eval_dataset"] = held.digest
        train, held_out = list(data.rows), list(held.rows)[: config.eval_limit]
        warnings += (*_left_out(held), *_trained_on(config, held_out, [*train, *more.get("ptx", [])]))
    else:
        train, held_out = split_held_out(data.rows, config.eval_fraction, config.eval_limit)
        unmeasured = len(data.rows) - len(train) - len(held_out)
        warnings += _split_alone(config, held_out)
        warnings += _parents_split(config, [source, *(spec.checkpoint for spec in more.get("rewards", []))])
    if unmeasured:
        notes += (f"{unmeasured} more rows have held-out prompts: not trained on, nor measured (--eval-limit)",)
    writer = read_launch().rank == 0
    run = open_run(config.output, stage, config, inputs, overwrite=overwrite, writer=writer)
    return Inputs(source, data, train, held_out, run, warnings=warnings, notes=notes, unmeasured=unmeasured, **more)


def _without_held_out_ptx(inputs: Inputs, config: PpoConfig) -> Inputs:
    """PPO's demonstrations but for those of prompts that are held out, here or in every stage.

    Raises DatasetError where that is all of them.
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


def _trained_on(config: TrainingKnobs, held_out: list, train: list) -> tuple[str, ...]:
    """A warning where rows of --eval-dataset have prompts that are trained on."""
    shared = shared_prompts(held_out, train)
    if not shared:
        return ()
    return (
        f"{len(shared)} of {len(held_out)} rows of --eval-dataset {config.eval_dataset} have prompts that are trained "
        f"on, so what is measured on them is no test; the first is {shared[0].where}",
    )


def _split_alone(config: TrainingKnobs, held_out: list) -> tuple[str, ...]:
    """A warning where rows are held out in another way than every stage does it."""
    if held_out_everywhere(held_out, config.eval_fraction):
        return ()
    return (
        f"{config.dataset} has too few prompts, or too many rows of one, to hold out those that every stage does at "
        f"--eval-fraction {config.eval_fraction:g}, so another stage may train on what is measured here; "
        "give --eval-dataset to be sure",
    )


def _parents_split(config: TrainingKnobs, parents: list[ModelRef | None]) -> tuple[str, ...]:
    """A warning per checkpoint that may have been trained on prompts that this run holds out."""
    found = []
    for manifest in (source.manifest for source in parents if source is not None and source.manifest is not None):
        share = manifest.config.get("eval_fraction")
        if not config.eval_fraction or not isinstance(share, (int, float)):
            continue
        if manifest.config.get("eval_dataset"):
            why = "was tested on an --eval-dataset and trained on all of its dataset"
        elif share < config.eval_fraction:
            why = f"held out {share:g} of the prompts, this run {config.eval_fraction:g}"
        elif manifest.versions.get("split") != SPLIT:
            why = "was made by an earlier rlhf, which held out other prompts"
        else:
            continue
        found.append(f"{manifest.folder} {why}: it may have been trained on prompts that are held out here")
    return tuple(found)


def _left_out(data: Dataset) -> tuple[str, ...]:
    if not data.skipped:
        return ()
    return (f"{data.skipped} rows of {data.source} cannot be used and were dropped; {data.problems[0]}",)


def _adapter_fits(config: TrainingKnobs, source: ModelRef) -> None:
    if source.folder is None or (config.lora_rank is None and config.lora_type is None):
        return
    stored, _, lora_type = read_adapter_shape(source.folder)
    if config.lora_type not in (None, lora_type):
        raise ConfigError(
            f"lora_type is {config.lora_type}, but the adapter of {source.name} is {lora_type}",
            where="lora_type",
            fix="leave lora_type out to go on with that adapter, or start from the base",
        )
    if config.lora_rank is not None and config.lora_rank < stored:
        raise ConfigError(
            f"lora_rank {config.lora_rank} is smaller than {stored}, the rank of {source.name}",
            where="lora_rank",
            fix=f"leave lora_rank out, or give at least {stored}",
        )


def _response_fits(config: Any, source: ModelRef) -> None:
    tokens = config.max_response_tokens
    if config.rollout_engine == "native" and lora_type_of(config, source) == "dora":
        raise ModelError(
            "our own decoder does not cover DoRA adapters", where="rollout_engine", fix="leave --rollout-engine out"
        )
    if tokens >= source.context:
        raise ModelError(
            f"responses of {tokens} tokens leave no room for a prompt in a context of {source.context}",
            where="--max-response-tokens",
            fix=f"give fewer than {source.context}",
        )


def _check_outputs(config: EvaluateConfig) -> None:
    """The files that `rlhf evaluate` writes."""
    if config.output:
        _writable_file(config, ".json", ours=REPORT_KEYS)
    if config.plot:
        _writable_file(config, *METADATA, ours=MARK, knob="plot")
        check_matplotlib("--plot")


def _writable_file(config: Any, *suffixes: str, ours: tuple[str, ...] | str, knob: str = "output") -> None:
    """Raise OutputError unless a knob names a new file, or one that this command wrote before and does not read now."""
    name, flag, kinds = getattr(config, knob), f"--{knob}", " or ".join(suffixes)
    path, another = absolute(name, flag), f"give another file name ending in {kinds}"
    if path.is_dir():
        raise OutputError(f"{name} is a folder", where=flag, fix=another)
    if path.suffix not in suffixes:
        raise OutputError(f"{name} does not end in {kinds}", where=flag, fix=another)
    special = describe_special(path)
    if special and not special.startswith("a link to"):  # such a link is written through
        raise OutputError(f"{name} is {special}", where=flag, fix=another)
    if path.exists() and not _wrote(path, ours):
        raise OutputError(f"{name} belongs to something else, and stays as it is", where=flag, fix=another)
    read = Path(os.path.expanduser(config.dataset))
    if path.exists() and read.exists() and os.path.samefile(path, read):
        raise OutputError(f"{name} is the dataset that is read", where=flag, fix=another)
    inside = Path(os.path.realpath(path)).parent
    if path.suffix in files.SUFFIXES and read.is_dir() and os.path.realpath(read) == str(inside):
        raise OutputError(
            f"{name} lies in the dataset's folder, where it would be read as rows", where=flag, fix=another
        )
    place = next(parent for parent in (inside, *inside.parents) if parent.exists())
    if not place.is_dir():
        raise OutputError(f"{place} is a file", where=flag, fix="give a path inside a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"nothing can be written into {place}", where=flag, fix="choose another place")


def _wrote(path: Path, ours: tuple[str, ...] | str) -> bool:
    """True where a file is empty, holds a text of ours, or begins with a JSON object of these keys."""
    try:
        if isinstance(ours, str):
            content = read_bytes(path)
            return not content.strip() or ours.encode() in content
        text = read_text(path)
        value = json.loads(text if path.suffix == ".json" else text.partition("\n")[0]) if text.strip() else {}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and (not text.strip() or set(ours) <= value.keys())
