"""A sequence classifier as a reward model: loaded beside the base, and run on batches of texts of any length."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.checkpoint.tensors import load_tensors
from stages.errors import ModelError
from stages.models.adapter_config import SCORE, read_adapter_shape
from stages.models.adapter_files import ADAPTER, PEFT_PREFIX
from stages.models.base import NO_ADAPTER, is_close, quiet
from stages.models.checks import check_finite, library_reason
from stages.models.classifier_ref import ANOTHER, score_bias_of
from stages.models.classifier_text import ClassifierRow
from stages.models.lora import LoraLayers, adapter_from
from stages.models.model_ref import ModelRef
from stages.models.passes import Passes

PROBE = ((5, 3, 9, 4, 8, 6, 7), (4, 8, 3))  # two short texts, reduced modulo the vocabulary


class Classifier:
    """A frozen classifier; `scores` gives what it gives each text alone, without padding."""

    def __init__(self, model: nn.Module, ref: ModelRef, passes: Passes):
        self.model = model.eval().requires_grad_(False)
        self.passes = passes
        self.config = model.config.get_text_config()
        self.bias = score_bias_of(ref.config, ref.name)
        stated = self.config.pad_token_id
        usable = self.bias is None and stated is not None and 0 <= stated < self.config.vocab_size
        self.padding: int | None = stated if usable else None
        self.has_segments = "token_type_ids" in inspect.signature(model.forward).parameters
        self.pads = True
        self.pads = self._pads_right(ref)

    @torch.no_grad()
    def _pads_right(self, ref: ModelRef) -> bool:
        """True if texts in one padded batch have the scores that each has alone. Raises ModelError if it cannot run."""
        texts = [torch.tensor(text) % self.config.vocab_size for text in PROBE]
        rows = [ClassifierRow(ids, torch.ones(len(ids), dtype=torch.bool), False) for ids in texts]
        try:
            alone = torch.cat([self._run([row]) for row in rows])
        except Exception as error:  # whatever an architecture's own code may raise
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise
            why = f"`{ref.config['model_type']}` cannot score a plain text: {library_reason(error)}"
            raise ModelError(why, where=ref.name, fix=ANOTHER) from error
        try:
            return is_close(self._run(rows), alone, self.model.dtype, fp32_tolerance=1e-5)
        except (RuntimeError, ValueError, IndexError):
            return False

    def scores(self, rows: Sequence[ClassifierRow]) -> Tensor:
        """Scores (N,) fp32 on the CPU."""
        found = self.passes.collect(rows, [row.size for row in rows], lambda batch: list(self._batch(batch)))
        return torch.stack(found)

    def _batch(self, rows: list[ClassifierRow]) -> Tensor:
        return self._run(rows) if self.pads else torch.cat([self._run([row]) for row in rows])

    def _run(self, rows: list[ClassifierRow]) -> Tensor:
        """Scores (B,) of texts padded on the right.

        A decoder reads the score at the last token that is not the padding token of its config. Without one, or if the
        classifier is ours, that is a token that ends none of the texts.
        """
        lasts = {int(row.ids[-1]) for row in rows}
        pad = next(i for i in range(len(lasts) + 1) if i not in lasts) if self.padding is None else self.padding
        self.config.pad_token_id = pad
        device = self.model.device

        def laid(parts: list[Tensor], filler: int) -> Tensor:
            return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=filler).to(device)

        batch = {"input_ids": laid([row.ids for row in rows], pad)}
        batch["attention_mask"] = laid([torch.ones_like(row.ids) for row in rows], 0)
        if self.has_segments and rows[0].segments is not None:
            batch["token_type_ids"] = laid([row.segments for row in rows], 0)
        logits = self.model(**batch).logits
        return logits[:, 0].float().cpu() + (self.bias or 0.0)


def load_classifier(ref: ModelRef, *, device: torch.device, dtype: torch.dtype, passes: Passes) -> Classifier:
    """Load a one-label classifier, or a base with the adapter of one; raises ModelError if transformers cannot.

    So it does if the files lack any weight.
    """
    from transformers import AutoModelForSequenceClassification

    options = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True, "ignore_mismatched_sizes": True}
    options |= {"num_labels": 1} if ref.folder else {}
    options["adapter_kwargs"] = {"subfolder": NO_ADAPTER}
    with quiet():
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                ref.base, output_loading_info=True, **options
            )
        except Exception as error:  # many kinds: unknown architecture, a damaged file
            why = f"the classifier cannot be loaded: {library_reason(error)}"
            raise ModelError(why, where=str(ref.base), fix="check the folder's files") from None
    if ref.folder is not None:
        loading["missing_keys"] -= {SCORE}
        _merge_adapter(model, ref.folder)
    wrong = sorted(loading["missing_keys"]) + sorted(key for key, *_ in loading["mismatched_keys"])
    if wrong:
        why = f"its weights lack {wrong[0]}, or hold it in another shape than config.json says"
        raise ModelError(why, where=str(ref.base), fix="give a whole classifier, with its score layer")
    check_finite(model, where=str(ref.base))
    return Classifier(model.to(device), ref, passes)


def _merge_adapter(model: nn.Module, folder: Path) -> None:
    """Fold an adapter into a classifier made of its base, and give it the adapter's output layer."""
    layers, shape, tensors = LoraLayers(model), read_adapter_shape(folder), load_tensors(folder / ADAPTER)
    score = tensors.pop(PEFT_PREFIX + SCORE)
    about = {"where": str(folder / ADAPTER), "trainable": False, "factors": shape.factors}
    layers.add("scores", adapter_from(layers.linear, tensors, shape.rank, shape.alpha, shape.lora_type, **about))
    layers.merge_and_unload("scores")
    model.score.weight.data.copy_(score)
