"""Merges a checkpoint's adapter into plain weights that transformers loads by itself, and scores what it wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from stages.checkpoint import atomic
from stages.data.rows import Demonstration
from stages.errors import ModelError, NotFiniteError
from stages.inputs import Inputs
from stages.measuring_config import ExportConfig
from stages.models.base import Base, load_base
from stages.models.checks import check_finite
from stages.models.heads import ScalarHead
from stages.models.model_ref import ModelRef
from stages.models.roles import Roles, adapter_of, head_of
from stages.models.templates import PROBE_MESSAGES, scored_template
from stages.models.tokens import Text
from stages.places import absolute
from stages.results import Reporter, Result, Table
from stages.tables import facts_table
from stages.training.devices import TORCH_DTYPES, pick_device
from stages.training.opening import open_text
from stages.training.reload import probe_sequences

# Largest difference allowed from rounding weights, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


def run(config: ExportConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """Write the merged model in the wanted precision, load it back with transformers, and compare."""
    source, output = inputs.source, absolute(config.output, "--output")
    text = open_text(source, config, reporter)
    stored = TORCH_DTYPES.get(
        str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32"), torch.float32
    )
    is_reward = source.manifest.stage == "reward"
    # Rounding to bfloat16 moves a score by a hundredth of its size.
    wanted = TORCH_DTYPES.get(config.dtype, torch.float32 if is_reward else stored)
    kind = "AutoModelForSequenceClassification" if is_reward else "AutoModelForCausalLM"
    facts = {"kind": kind, "dtype": str(wanted).removeprefix("torch.")}
    if dry_run:
        return Result("export", "dry run", None, {"plan": facts}, (facts_table("export: the plan", facts),))
    dtype = stored if wanted == stored else torch.float32  # rounding happens once, after the merge
    base = load_base(source, device=pick_device(config.device), dtype=dtype, trust_remote_code=config.trust_remote_code)
    head = head_of(base, source.folder) if is_reward else None
    sequences = probe_sequences(base)
    reporter.note(f"merging the adapter of {source.name} into {source.base_name}")
    expected = merge(base, source, head, sequences)
    model = base.model.to(wanted) if head is None else as_classifier(base, head, wanted)
    check_finite(model, where="--dtype")  # a merged weight may be larger than the wanted precision can hold
    set_special_tokens(model, text)
    if head is None:
        model.generation_config.eos_token_id = list(text.stop_ids)
    elif text.has_template:
        end_where_scored(text, reporter)
    atomic.clear_leftovers(output.parent, of=output.name)
    with atomic.folder(output) as folder:
        model.save_pretrained(folder, safe_serialization=True)
        text.tokenizer.save_pretrained(folder)
        difference = largest_difference(folder, head, sequences, expected, base.device, wanted)
    data = {**facts, "largest_difference": difference, "score_bias": float(head.bias) if head else None}
    hint = f"transformers.{kind}.from_pretrained({config.output!r})"
    return Result("export", "done", config.output, data, (export_table(facts, difference, head, text),), (hint,))


def export_table(facts: dict[str, str], difference: float, head: ScalarHead | None, text: Text) -> Table:
    """What was written, and for a reward model how its score is read."""
    rows = [("class", facts["kind"]), ("precision", facts["dtype"])]
    rows.append(("largest difference after reloading", f"{difference:.2e}"))
    if head is not None:
        ends = dict.fromkeys(text.tokenizer.convert_ids_to_tokens([text.eos_id, text.turn_end_id]))
        rows.append(("score = its logit +", f"{float(head.bias):.4f} (score_bias in config.json)"))
        rows.append(("the score is read at the last token", f"end a text with {', a conversation with '.join(ends)}"))
    return Table("export", ("what", "value"), tuple(rows))


def merge(base: Base, source: ModelRef, head: ScalarHead | None, sequences: list[Tensor]) -> list[Tensor]:
    """Merge the adapter of `source` into the base; returns what `read_out` gave of each sequence before.

    Raises NotFiniteError if any of it is not finite.
    """
    roles = Roles(base)
    roles.add("merged", adapter_of(base, source, trainable=False))
    with roles.use("merged"), torch.no_grad():
        expected = [read_out(base, head, sequence) for sequence in sequences]
    if not all(numbers.isfinite().all() for numbers in expected):
        raise NotFiniteError(
            "it computes numbers that are not finite: its weights are too large",
            where=source.name,
            fix="train it again with a lower --learning-rate",
        )
    base.lora.merge_and_unload("merged")
    return expected


def read_out(base: Base, head: ScalarHead | None, sequence: Tensor) -> Tensor:
    """Logits (L, V) of a sequence, or, with a head, the score (1,) of its end without the head's bias."""
    hidden = base.hidden([sequence])
    return base.logits(hidden).float() if head is None else (head(hidden[-1:]) - head.bias)


def as_classifier(base: Base, head: ScalarHead, dtype: torch.dtype) -> nn.Module:
    """The merged body with the head as transformers' sequence classifier of one label.

    Its output layer has no bias: scores are the logit + `score_bias`, which config.json carries.
    """
    from transformers import AutoModelForSequenceClassification

    config = base.model.config
    config.num_labels, config.score_bias = 1, float(head.bias)
    try:
        model = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise ModelError(
            f"transformers has no sequence classifier for `{config.model_type}`",
            where="--model",
            fix="load the adapter with PEFT, or score with rlhf evaluate",
        ) from None
    model.base_model.load_state_dict(base.body.state_dict())
    model.score.weight.data.copy_(head.weight.detach()[None])
    return model.to(base.device, dtype).eval()


def end_where_scored(text: Text, reporter: Reporter) -> None:
    """Make the chat template end a conversation at the token that the reward model's score is read at.

    A classifier reads the last token, and most templates write a line break after the last turn's end token.
    """
    template = text.tokenizer.get_chat_template()
    judged = text.judged(Demonstration("", "", "", PROBE_MESSAGES), 2**30).ids.tolist()
    ids = text.encode(text.render(PROBE_MESSAGES), rendered=True).ids
    if ids == judged:
        return
    text.tokenizer.chat_template = scored_template(template, writes_end=judged == ids[: len(judged)])
    if text.encode(text.render(PROBE_MESSAGES), rendered=True).ids != judged:
        last = text.tokenizer.convert_ids_to_tokens(judged[-1])
        reporter.warn(f"the score of a conversation is read at {last}; cut what the chat template writes after it")


def set_special_tokens(model: nn.Module, text: Text) -> None:
    """Give the model a padding token that is no stop token: a classifier finds the last token by skipping padding."""
    pad = text.tokenizer.pad_token_id
    if pad is None or pad in text.stop_ids:
        others = [text.tokenizer.unk_token_id, *text.tokenizer.all_special_ids, 0]
        pad = next((i for i in others if i is not None and i not in text.stop_ids), None)
        if pad is not None:
            text.tokenizer.pad_token = text.tokenizer.convert_ids_to_tokens(pad)
    model.config.pad_token_id = pad
    model.config.eos_token_id = text.eos_id


@torch.no_grad()
def largest_difference(
    folder: Path,
    head: ScalarHead | None,
    sequences: list[Tensor],
    expected: list[Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Largest difference, in logits or score, of the written model in transformers from the adapter on its base."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loader = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    model = loader.from_pretrained(folder, dtype=dtype).to(device).eval()
    largest, scale = 0.0, 1.0
    for sequence, wanted in zip(sequences, expected, strict=True):
        logits = model(input_ids=sequence[None].to(device)).logits[0].float()
        largest = max(largest, float((logits - wanted).abs().max()))
        scale = max(scale, float(wanted.abs().max()))
    if not largest <= TOLERANCE[dtype] * scale:
        raise AssertionError(f"the exported model differs by {largest} from the checkpoint")
    return largest
