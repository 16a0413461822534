"""Inputs of the commands that use checkpoints: `rlhf evaluate`, `sample` and `export`."""

from __future__ import annotations

from functools import partial
from typing import Any

from stages.checkpoint.atomic import check_place
from stages.data import rows as files
from stages.diagnostics.judge import check_judge, open_judge
from stages.diagnostics.plot import METADATA, PLOT_MARK, check_matplotlib
from stages.errors import CheckpointError, ConfigError, DatasetError, OutputError, UserError
from stages.inputs.fitting import fitting
from stages.inputs.forms import check_text_as, describe_form
from stages.inputs.outputs import BEST_KEYS, REPORT_KEYS, RESPONSE_KEYS, check_output_file
from stages.inputs.parts import (
    Inputs,
    Reader,
    check_response_fits,
    describe_left_out,
    open_first,
    read_rows,
    refuse_idle,
)
from stages.inputs.training import with_verdicts
from stages.measuring_config import EvaluateConfig, ExportConfig, SampleConfig
from stages.models.candidates import (
    ADAPTERS,
    IMPLICIT,
    POLICIES,
    SCORERS,
    candidate_of,
    open_beside,
    parent_of,
    with_reference,
)
from stages.models.classifier_ref import CLASSIFIER
from stages.models.model_ref import ModelRef, open_model, same_base
from stages.places import absolute, describe_special
from stages.rollout.reward_specs import RewardSpec, check_columns, open_rewards


def evaluate_inputs(config: EvaluateConfig, overwrite: bool) -> Inputs:
    trusted = config.trust_remote_code
    source = open_first(config, (*ADAPTERS, CLASSIFIER))
    reference = _other(config, "reference", source)
    kind = files.detect_kind(config.dataset, map=config.map)
    scored = bool(config.reward or config.gold or config.judge)
    compares = kind in ("comparison", "rating") and not scored
    if compares or candidate_of(config.model, source).stage in SCORERS:
        return _comparing_inputs(config, source, reference, kind)
    against = _other(config, "against", source)
    rewards = open_rewards(config.reward, source, trust_remote_code=trusted)
    gold = open_rewards(config.gold, source, what="--gold", trust_remote_code=trusted)
    kinds = f"{config.dataset} holds {kind}s", "give another --dataset"
    samples = kind != "demonstration" or scored
    if kind != "demonstration":
        refuse_idle(config, ("mask", "max_tokens"), *kinds)
    if not samples:
        refuse_idle(config, ("reference",), *kinds)
    advice = "give --reward {} to score with it, or comparisons as --dataset"
    also = open_beside(config.also, source, POLICIES, advice, trust_remote_code=trusted, base=config.base)
    if also and not samples:
        what = f"{config.dataset} holds demonstrations; --also compares responses to prompts"
        fix = "give prompts, or --reward to sample and score responses to the demonstrations' prompts"
        raise DatasetError(what, where="--dataset", fix=fix)
    if config.max_response_tokens is not None or config.rollout_engine == "native":
        others = [against, reference, *(beside.ref for beside in also), *(spec.checkpoint for spec in rewards + gold)]
        check_response_fits(config, source, others)
    _check_outputs(config)
    read = partial(files.read_prompts, check=partial(check_columns, rewards + gold))
    if kind == "demonstration":
        _check_demonstrations(config.dataset, rewards + gold)
        read = files.read_demonstrations
    data, warnings, notes = _rows(read, config, [source], [*rewards, *gold])
    warnings += check_judge(open_judge(config)) if config.judge else ()
    if reference is None and samples:
        try:
            reference = parent_of(source, trusted)
        except UserError as error:
            if also or config.plot:
                fix = "give the model from which KL is measured"
                raise CheckpointError(f"KL cannot be measured: {error.what}", where="--reference", fix=fix) from None
            warnings += (f"KL is not measured: {error.what}; give another --reference",)
    more = {"rewards": rewards, "gold": gold, "against": against, "reference": reference, "also": also}
    return Inputs(source, data, warnings=warnings, notes=notes, **more)


def _comparing_inputs(config: EvaluateConfig, source: ModelRef, reference: ModelRef | None, kind: str) -> Inputs:
    """Inputs for reward models, or implicit rewards of policies, on comparisons."""
    model = candidate_of(config.model, source)
    if model.stage in SCORERS and kind not in ("comparison", "rating"):
        what = f"{config.dataset} holds {kind}s; a reward model is measured on comparisons"
        raise DatasetError(what, where="--dataset", fix="give rows with prompt, chosen and rejected")
    if model.stage not in (*SCORERS, *IMPLICIT):
        kinds = f"{config.model} is neither a reward model nor a DPO or PPO policy"
        what = f"{config.dataset} holds comparisons, but {kinds}"
        fix = "give prompts or demonstrations, or a reward, dpo or ppo checkpoint as --model"
        raise DatasetError(what, where="--dataset", fix=fix)
    for name in ("against", "best_of", "plot", "reward", "gold", "judge"):
        if getattr(config, name):
            what = f"{config.model} is measured on comparisons, and nothing is sampled"
            fix = "leave it out, use --also to compare, or give a policy as --model with prompts as --dataset"
            raise ConfigError(what, where=f"--{name.replace('_', '-')}", fix=fix)
    refuse_idle(config, ("mask",), f"{config.dataset} holds {kind}s", "give another --dataset")
    if source.is_classifier and not config.also:
        names = ("chat_template", "load_in_4bit", "reference")
        refuse_idle(config, names, f"{config.model} is a sequence classifier", "give a checkpoint of this tool")
    trust = {"trust_remote_code": config.trust_remote_code}
    advice = "give reward, dpo or ppo checkpoints, or --reward to sample from it"
    also = open_beside(config.also, source, (*SCORERS, *IMPLICIT), advice, base=config.base, **trust)
    models = [with_reference(candidate, reference, **trust) for candidate in (model, *also)]
    _check_outputs(config)
    refs = [source, *(candidate.ref for candidate in also)]
    readers = [ref for ref in refs if not ref.is_classifier][:1] + [ref for ref in refs if ref.is_classifier]
    data, warnings, notes = _rows(files.read_comparisons, config, readers)
    about = {"warnings": warnings, "notes": notes}
    return Inputs(source, data, also=models[1:], reference=models[0].reference, **about)


def _rows(
    read: Reader, config: Any, readers: list[ModelRef], rewards: list[RewardSpec] | tuple = ()
) -> tuple[files.Dataset, tuple[str, ...], tuple[str, ...]]:
    """The rows that all `readers` can read, with warnings and notes on them; what is said is said of the first."""
    check_text_as(config, readers[0])
    data = read_rows(read, config, config.dataset, fitting(config, *readers))
    warnings, notes = describe_form(config, readers[0], data, rewards)
    return data, describe_left_out(data) + warnings, notes


def _check_demonstrations(dataset: str, specs: list[RewardSpec]) -> None:
    """Raise DatasetError for a built-in function that needs another column than a demonstration's completion."""
    for spec in specs:
        if spec.builtin is not None and spec.builtin.columns and "completion" not in spec.builtin.columns:
            what = f"{spec.flag} {spec.name} needs a column that demonstrations do not keep"
            fix = f"give rows with `prompt` and `{spec.builtin.columns[0]}`, without `completion`"
            raise DatasetError(what, where=dataset, fix=fix)


def _other(config: EvaluateConfig, knob: str, source: ModelRef) -> ModelRef | None:
    """The model of --against or --reference, on the base of --model."""
    name, what = getattr(config, knob), f"--{knob}"
    if name is None:
        return None
    trusted = config.trust_remote_code
    other = open_model(name, stages=POLICIES, what=what, trust_remote_code=trusted, base=config.base)
    if not source.is_classifier:
        same_base(source, other, first_flag="--model", second_flag=what)
    return other


def _check_outputs(config: EvaluateConfig) -> None:
    if config.output:
        check_output_file(config.output, "--output", (".json",), REPORT_KEYS, config.dataset)
    if config.plot:
        check_output_file(config.plot, "--plot", tuple(METADATA), PLOT_MARK, config.dataset)
        check_matplotlib("--plot")


def sample_inputs(config: SampleConfig, overwrite: bool) -> Inputs:
    source = open_first(config, POLICIES)
    rewards = open_rewards(config.reward, source, trust_remote_code=config.trust_remote_code)
    check_response_fits(config, source, [spec.checkpoint for spec in rewards])
    keys = BEST_KEYS if config.best_of else RESPONSE_KEYS
    check_output_file(config.output, "--output", (".jsonl",), keys, config.dataset)
    read = partial(files.read_prompts, check=partial(check_columns, rewards))
    data, warnings, notes = _rows(read, config, [source], rewards)
    return with_verdicts(Inputs(source, data, rewards=rewards, warnings=warnings, notes=notes), force=True)


def export_inputs(config: ExportConfig, overwrite: bool) -> Inputs:
    source = open_first(config, ADAPTERS)
    if source.manifest is None:
        what = f"{config.model} is a base model; there is no adapter to merge"
        raise CheckpointError(what, where="--model", fix="give a checkpoint of this tool")
    output = absolute(config.output, "--output")
    special = describe_special(output)
    if special:
        raise OutputError(f"{output} is {special}", where="--output", fix="give a new folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} is not empty", where="--output", fix="give a new folder")
    check_place(output.parent, output.name)
    return Inputs(source)
