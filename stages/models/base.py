"""Loads the frozen base once and finds out, by measurement, how it may be run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from stages.errors import ModelError
from stages.models import attention
from stages.models.lora import LoraLinear, Switch, wrap
from stages.models.source import Source

PROBE = ((5, 3, 9, 4, 8, 6, 7), (4, 8, 3))  # two short texts, reduced modulo the vocabulary


class Base:
    """The frozen model, its LoRA layers, and its body and readout taken apart.

    `hidden` runs the body over ragged sequences; `logits` reads hidden states out. Sequences run packed in one row
    without padding where that was measured to give the same hidden states, padded on the right elsewhere.
    """

    def __init__(self, model: nn.Module, source: Source):
        self.model = model.eval().requires_grad_(False)
        self.source = source
        self.switch = Switch()
        self.layers: dict[str, LoraLinear] = wrap(model, self.switch)
        self.body: nn.Module = model.base_model
        self.output: nn.Module = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.width: int = self.output.weight.shape[1]
        self.vocabulary: int = self.output.weight.shape[0]
        self.context = source.context
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._logit_scale = getattr(config, "logit_scale", None)
        self._logit_divisor = getattr(config, "logits_scaling", None)
        self.packs = False
        self.packs = self._probe()

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.output.weight.dtype

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass. Needs train mode, so every dropout is set to 0 first."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        self.model.train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.enable_input_require_grads()

    # --- running it

    def hidden(self, sequences: list[Tensor]) -> Tensor:
        """Final hidden states of ragged sequences (L_i,), laid end to end: (sum L_i, H)."""
        return self._hidden_packed(sequences) if self.packs else self._hidden_padded(sequences)

    def _hidden_packed(self, sequences: list[Tensor]) -> Tensor:
        lengths = [len(s) for s in sequences]
        ids = torch.cat(sequences).to(self.device)[None]
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)[None]
        with attention.packed(lengths, self.device):
            return self.body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]

    def _hidden_padded(self, sequences: list[Tensor]) -> Tensor:
        lengths = torch.tensor([len(s) for s in sequences])
        ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self.device)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).to(self.device)
        positions = torch.arange(ids.shape[1], device=self.device)[None].expand_as(ids)
        states = self.body(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        return states[mask]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (M, V) of hidden states (M, H), as the whole model would give them."""
        out = self.output(hidden.to(self.dtype))
        if self._logit_scale is not None:
            out = out * self._logit_scale
        if self._logit_divisor is not None:
            out = out / self._logit_divisor
        return out if self._softcap is None else self._softcap * torch.tanh(out / self._softcap)

    # --- proving it

    @torch.no_grad()
    def _probe(self) -> bool:
        """True where packed rows give the same states; raises ModelError where the readout is not understood."""
        sequences = [torch.tensor([i % self.vocabulary for i in text]) for text in PROBE]
        plain = torch.cat([self._alone(s) for s in sequences])
        padded = self._hidden_padded(sequences)
        whole = self.model(input_ids=sequences[0].to(self.device)[None], use_cache=False).logits[0]
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        if not _close(self.logits(plain[: len(sequences[0])]), whole, tolerance):
            raise ModelError(
                f"the output layer of `{self.source.config['model_type']}` does more than this tool knows of",
                where="--model",
                fix="use another architecture (Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX and alike work)",
            )
        if not _close(padded, plain, tolerance):
            raise ModelError(
                f"`{self.source.config['model_type']}` does not keep padded sequences apart",
                where="--model",
                fix="use another base",
            )
        try:
            return _close(self._hidden_packed(sequences), plain, tolerance)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False  # an architecture with an attention of its own: padding is always right

    def _alone(self, sequence: Tensor) -> Tensor:
        positions = torch.arange(len(sequence), device=self.device)[None]
        ids = sequence.to(self.device)[None]
        return self.body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or not torch.isfinite(a).all():
        return False
    scale = b.float().abs().max().clamp(min=1.0)
    return bool((a.float() - b.float()).abs().max() <= tolerance * scale)


def load_base(source: Source, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False) -> Base:
    """Load a base onto a device, frozen; raises ModelError where transformers cannot load it as a causal LM."""
    from transformers import AutoModelForCausalLM

    attention.register()
    options = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "low_cpu_mem_usage": True,
    }
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(source.base, **options)
    except Exception as error:  # many kinds: unknown architecture, missing tensors, a damaged file
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the base cannot be loaded: {reason}", where=str(source.base), fix="check the folder's files"
        ) from None
    with suppress(ValueError, AttributeError):  # an architecture without exchangeable attention runs padded
        model.set_attn_implementation(attention.NAME)
    return Base(model.to(device), source)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading bar and notes off the terminal."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def stop_ids_of(source: Source) -> tuple[int, ...]:
    """Token ids that end generation: the checkpoint's, or those that the base's config files name."""
    if source.manifest is not None:
        return tuple(source.manifest.stop_token_ids)
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = source.base / name
        if not path.exists():
            continue
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(found))
