"""What every training stage does around its algorithm: open its inputs, lay out the run, publish the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from stages.config import as_dict
from stages.errors import CheckpointError, DatasetError, ModelError
from stages.files import atomic
from stages.files.manifest import MANIFEST, Manifest, Parent, checkpoint_digest, versions
from stages.files.rows import Dataset
from stages.files.run import Run, write_config
from stages.models.base import Base, load_base, stop_ids_of
from stages.models.checks import check_config
from stages.models.coverage import measure_coverage, sample_texts
from stages.models.heads import ScalarHead
from stages.models.lora import Adapter
from stages.models.roles import Roles, save_adapter
from stages.models.source import ModelRef, lora_type_of
from stages.models.tokens import Text, TokenRow, load_text
from stages.results import Reporter
from stages.training.comparing import TokenComparison
from stages.training.devices import Ranks, free_memory, peak_memory_gb, pick_device, pick_dtype
from stages.training.loop import Progress, diverged
from stages.training.optimizer import AdamW
from stages.training.passes import limit_tokens
from stages.training.plan import Work, choose_passes, source_shapes
from stages.training.reload import check_adaptable, check_reload, check_tokenizer, probe_sequences

Row = TypeVar("Row")
Out = TypeVar("Out")


def open_text(source: ModelRef, config: Any, reporter: Reporter | None = None) -> Text:
    """The tokenizer of a source, with the chat template that the config asks for; odd ones are warned of.

    Raises CheckpointError where a checkpoint's stop tokens are none of the vocabulary.
    """
    check_config(source, trust_remote_code=config.trust_remote_code)  # a tokenizer is loaded by it as well
    stop_ids = stop_ids_of(source)
    text = load_text(
        source.tokenizer,
        chat_template=config.chat_template,
        stop_ids=stop_ids,
        trust_remote_code=config.trust_remote_code,
    )
    stated = source.config.get("vocab_size")
    vocabulary = max(len(text.tokenizer), stated if type(stated) is int else 0)
    if source.manifest is not None and max(stop_ids, default=0) >= vocabulary:
        raise CheckpointError(
            f"`{MANIFEST}` is damaged at `stop_token_ids`: there is no token {max(stop_ids)}",
            where=str(source.folder),
            fix="copy the checkpoint again, or run the command that made it with --overwrite",
        )
    for line in text.warnings if reporter is not None else ():
        reporter.warn(line)
    return text


def encode_all(
    rows: list[Row], encode: Callable[[Row], Out], *, skip_bad: bool, reporter: Reporter, what: str
) -> list[Out]:
    """Tokenise rows; a row that cannot be used is an error, or dropped and counted with --skip-bad-rows."""
    out: list[Out] = []
    problems: list[DatasetError] = []
    for row in rows:
        try:
            out.append(encode(row))
        except DatasetError as error:
            problem = DatasetError(error.what, where=error.where or row.where, fix=error.fix)
            if not skip_bad:
                raise problem from None
            problems.append(problem)
    if rows and not out:
        first = problems[0]
        raise DatasetError(
            f"none of the {len(rows)} {what} can be used; {first.what}", where=first.where, fix=first.fix
        )
    if problems:
        first = f"{problems[0].where}: {problems[0].what}"
        reporter.warn(f"{len(problems)} of {len(rows)} {what} cannot be used and were dropped; {first}")
    return out


def report_cuts(rows: Sequence[TokenRow | TokenComparison], limit: int, reporter: Reporter, what: str) -> None:
    """Say how many rows were too long and lost a part."""
    cut = sum(row.cut for row in rows)
    if cut:
        reporter.note(f"{cut} of {len(rows)} {what} were cut to {limit} tokens")


def check_coverage(text: Text, rows: list, reporter: Reporter, *, what: str) -> str:
    """Warn of rows in a language that the tokenizer does not know; returns why they are unreadable, empty if not."""
    cause = measure_coverage(text.tokenizer, sample_texts(rows)).cause
    if cause:
        reporter.warn(
            f"the base can hardly read the {what}: {cause}. Losses, scores and responses on them mean little; choose a "
            "base whose tokenizer was made for this language"
        )
    return cause


def context_limit(wanted: int, source: ModelRef, reporter: Reporter) -> int:
    """Longest row in tokens: what was asked for, or what the base's context allows."""
    if wanted > source.context:
        reporter.note(f"the base attends over {source.context} tokens; max_tokens is {source.context}")
    return min(wanted, source.context)


def open_base(source: ModelRef, config: Any, text: Text) -> tuple[Base, Ranks]:
    """Load the base on the configured device and find this process's rank.

    Raises ModelError where the tokenizer has tokens that the base has no embedding for.
    """
    device = pick_device(config.device)
    base = load_base(
        source,
        device=device,
        dtype=pick_dtype(config.dtype, device),
        four_bit=config.load_in_4bit,
        trust_remote_code=config.trust_remote_code,
    )
    if lora_type_of(config, source) == "dora":
        base.prepare_for_dora()
    if len(text.tokenizer) > base.model.get_input_embeddings().weight.shape[0]:
        raise ModelError(
            f"the tokenizer has {len(text.tokenizer)} tokens, the base has embeddings for "
            f"{base.model.get_input_embeddings().weight.shape[0]}",
            where="--model",
            fix="use the tokenizer that belongs to the base",
        )
    limit_tokens(None)
    return base, Ranks(device)


def open_for_training(source: ModelRef, config: Any, text: Text, work: Work, reporter: Reporter) -> tuple[Base, Ranks]:
    """`open_base`, and passes of the size that the plan of `work` finds room for beside it.

    Raises ModelError for a base whose adapters could not be saved in the end.
    """
    base, ranks = open_base(source, config, text)
    check_adaptable(base, [] if source.folder else config.lora_targets, lora_type_of(config, source))
    if base.has_dora:
        reporter.note("DoRA adapters run through transformers, which is slower than the pass for other adapters")
    free, shapes = free_memory(base.device), source_shapes(source, config)
    passes = choose_passes(config, work, source, shapes, free)
    if passes.checkpointing:
        try:
            base.checkpoint_activations()
        except ModelError as error:
            if config.gradient_checkpointing is True:
                raise
            reporter.note(f"memory is short, but {error.what}")
            passes = choose_passes(replace(config, gradient_checkpointing=False), work, source, shapes, free)
        else:
            reporter.note(f"activations are computed again, in passes of up to {passes.tokens} tokens")
    limit_tokens(passes.tokens)
    return base, ranks


def open_progress(config: Any, trained: dict[str, list[torch.nn.Parameter]]) -> Progress:
    """One optimiser per named group of parameters."""
    adam = {"beta1": config.adam_beta1, "beta2": config.adam_beta2, "eps": config.adam_eps}
    return Progress({n: AdamW(p, **adam, weight_decay=config.weight_decay) for n, p in trained.items()})


# --- publishing


def publish_checkpoint(
    run: Run,
    stage: str,
    config: Any,
    roles: Roles,
    text: Text,
    *,
    adapter: Adapter,
    head: ScalarHead | None = None,
    critic: tuple[Adapter | None, ScalarHead] | None = None,
    parents: list[tuple[str, ModelRef]],
    datasets: dict[str, Dataset],
    metrics: dict[str, Any],
    lines: list[dict[str, float]],
    extra_files: tuple[str, ...] = (),
) -> None:
    """Write the checkpoint, load it back, compare, and only then publish its manifest.

    Raises TrainingStopped where the model has come to give anything but numbers.
    """
    base = roles.base
    _stop_if_states_overflow(roles, adapter, step=len(lines) - 1)
    files = save_adapter(run.folder, base, adapter, head)
    check_reload(base, run.folder, adapter, head)
    if critic is not None:
        files += _save_critic(run.folder, base, *critic)
        own, value_head = critic
        check_reload(base, run.folder / "critic", own or adapter, value_head, trunk=None if own else run.folder)
    files += save_tokenizer(run.folder, text)
    check_tokenizer(run.folder, text, trust_remote_code=config.trust_remote_code)
    write_config(run, config)
    files += ["config.yaml", *extra_files]
    files += [name for name in ("metrics.jsonl", "samples.jsonl") if (run.folder / name).exists()]
    steps = [line for line in lines if line["step"] > 0]
    seconds = sum(line.get("seconds", 0.0) for line in steps)
    rates = {w: sum(line.get(w, 0) for line in steps) / max(seconds, 1e-9) for w in ("tokens", "samples")}
    manifest = Manifest(
        stage=stage,
        base=base.source.base_ref,
        parents=tuple(
            Parent(role, str(s.folder.resolve()), s.manifest.stage, checkpoint_digest(s.folder))
            for role, s in parents
            if s.folder is not None
        ),
        tokenizer_digest=base.source.tokenizer_digest,
        stop_token_ids=text.stop_ids,
        config=as_dict(config),
        datasets={role: {"source": d.source, "digest": d.digest, "rows": len(d.rows)} for role, d in datasets.items()},
        metrics=metrics,
        throughput={f"{what}_per_second": rate for what, rate in rates.items()}
        | {"memory_gb": peak_memory_gb(base.device)},
        versions=versions(),
        device=torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else "cpu",
        dtype=str(base.dtype).removeprefix("torch."),
        steps=len(steps),
        seconds=seconds,
    )
    run.finish(manifest, files)


@torch.no_grad()
def _stop_if_states_overflow(roles: Roles, adapter: Adapter, step: int) -> None:
    """Raise TrainingStopped where a trained adapter makes of a short text states that are not finite."""
    with roles.use(next(role for role, own in roles.adapters.items() if own is adapter)):
        states = roles.base.hidden(probe_sequences(roles.base))
    if not torch.isfinite(states).all():
        raise diverged("the trained model gives states that are not finite", step)


def _save_critic(folder: Path, base: Base, adapter: Adapter | None, head: ScalarHead) -> list[str]:
    """The critic's folder; a critic that shares the policy's trunk has a head alone."""
    if adapter is not None:
        return [f"critic/{name}" for name in save_adapter(folder / "critic", base, adapter, head)]
    from stages.files.tensors import save_tensors

    save_tensors(folder / "critic" / "head.safetensors", head.tensors())
    return ["critic/head.safetensors"]


def save_tokenizer(folder: Path, text: Text) -> list[str]:
    """Save the tokenizer, each file written whole before it gets its name; returns the names."""
    with atomic.filling(folder) as temporary:
        text.tokenizer.save_pretrained(temporary)
        names = sorted(p.name for p in Path(temporary).iterdir() if p.is_file())
    return names
