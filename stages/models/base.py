"""Loads the frozen base once and measures how it may be run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.errors import ModelError
from stages.models.checks import check_config, check_finite, check_tensors, library_reason
from stages.models.lora import LoraLayers
from stages.models.model_ref import ModelRef
from stages.models.passes import Passes
from stages.models.quantised import four_bit_options, keep_gradients
from stages.models.rotary import LengthBands
from stages.native import attention
from stages.native.forward import Native, native_of
from stages.native.prefixes import pack

PROBE_TOKENS = ((5, 3, 9, 4, 8, 6, 7, 11, 2, 10), (4, 8, 3))  # two short texts, reduced modulo the vocabulary
NO_ADAPTER = "no adapter of PEFT"  # no folder of a base has this name: transformers looks for an adapter in it
ANOTHER = "use another architecture (Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX and alike work)"
DORA_NOTE = "DoRA adapters run through transformers, which is slower"
NO_CHECKPOINTING = "leave --gradient-checkpointing out"


class Base:
    """The frozen model, its linear layers and their adapters, and its body and output layer taken apart.

    `hidden` runs the body over ragged sequences; `logits` applies the output layer. Sequences are packed in one row
    without padding if that was measured to give the same hidden states, else padded on the right; a prefix that several
    of them share runs once, if that was measured too. Sequences whose lengths lie in different `bands` never share a
    pass.
    """

    def __init__(self, model: nn.Module, ref: ModelRef):
        self.model = model.eval().requires_grad_(False)
        self.ref = ref
        self.lora = LoraLayers(model)
        self.layers = self.lora.linear
        self.body: nn.Module = model.base_model
        self.output: nn.Module = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.vocabulary, self.width = self.output.weight.shape  # V, H
        self.context = ref.context
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._logit_scale = getattr(config, "logit_scale", None)
        self._logit_divisor = getattr(config, "logits_scaling", None)
        self.bands = LengthBands(model)
        self.packs = self.shares = self.checkpoints = self.has_dora = False
        self.caches: bool | None = None  # True if decoding with transformers' cache is right; None: not measured
        self.native: Native | None = None
        self.passes = Passes(on_cuda=self.device.type == "cuda")
        self._probe()

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.output.weight.dtype

    def prepare_for_dora(self) -> None:
        """Run through transformers from here on: the native forward pass does not support DoRA."""
        self.has_dora, self.native = True, None
        if self.checkpoints:
            self.checkpoint_activations()

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass.

        Transformers does so in train mode only, so every dropout is set to 0. Raises ModelError if the base cannot, or
        if train mode changes what it computes.
        """
        self.checkpoints = self.native is not None
        if self.checkpoints:
            return
        for part in (self.model.config, self.model.config.get_text_config(), *self.model.modules()):
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            for name, value in list(vars(part).items()):
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(part, name, 0.0)
        sequences = self._probe_texts()
        before = self.hidden(sequences)
        try:  # the first name came with a later transformers than the oldest we run on
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        except ValueError:
            raise self._refusal("cannot recompute its activations", NO_CHECKPOINTING) from None
        self.model.enable_input_require_grads()
        self.checkpoints = True
        if not is_close(self.hidden(sequences), before, self.dtype):
            self.checkpoints = False
            raise self._refusal("computes something else in train mode", NO_CHECKPOINTING)

    # --- running it

    def hidden(self, sequences: list[Tensor], wanted: Tensor | None = None) -> Tensor:
        """Final hidden states of ragged sequences (L_i,), laid end to end: (sum L_i, H).

        `wanted` (M,) are the indices, in that row, of the states to return, in their order: (M, H).
        """
        if self.native is not None and self.packs:
            return self._hidden_native(sequences, wanted)
        run = self._hidden_packed if self.packs else self._hidden_padded
        if not (self.checkpoints and torch.is_grad_enabled()):
            return _select(self._by_band(run, sequences), wanted)
        self.model.train()  # only here: in train mode a checkpointing layer ignores its cache, and sampling needs it
        try:
            return _select(self._by_band(run, sequences), wanted)
        finally:
            self.model.eval()

    def _by_band(self, run: Callable[[list[Tensor]], Tensor], sequences: list[Tensor]) -> Tensor:
        """States of sequences laid end to end, from one run for every band of lengths that is among them."""
        lengths = [len(s) for s in sequences]
        parts: dict[int, Tensor] = {}
        for rows in self.bands.group(lengths):
            self.bands.forget()
            states = run([sequences[i] for i in rows])
            if len(rows) == len(sequences):
                return states
            parts |= zip(rows, states.split([lengths[i] for i in rows]), strict=True)
        return torch.cat([parts[i] for i in range(len(sequences))])

    def _hidden_native(self, sequences: list[Tensor], wanted: Tensor | None) -> Tensor:
        row = pack(sequences, share=self.shares)
        indices = wanted if row.indices is None else row.indices if wanted is None else row.indices[wanted.cpu()]
        if indices is None:
            return self.native.hidden(row, None, recompute=self.checkpoints)
        needed, inverse = indices.to(self.device).unique(return_inverse=True)  # sequences may share a state
        return _select(self.native.hidden(row, needed, recompute=self.checkpoints), inverse)

    def _hidden_packed(self, sequences: list[Tensor]) -> Tensor:
        row = pack(sequences, share=self.shares)
        with attention.packed(row.groups, self.device):
            return _select(self._run_body(row.ids[None], row.positions[None])[0], row.indices)

    def _hidden_padded(self, sequences: list[Tensor]) -> Tensor:
        lengths = torch.tensor([len(s) for s in sequences])
        ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        mask = (positions < lengths[:, None]).to(self.device)
        return self._run_body(ids, positions, attention_mask=mask.long())[mask]

    def _alone(self, sequence: Tensor) -> Tensor:
        self.bands.forget()
        return self._run_body(sequence[None], torch.arange(len(sequence))[None])[0]

    def _run_body(self, ids: Tensor, positions: Tensor, **mask: Tensor) -> Tensor:
        """Transformers' final hidden states (B, T, H) of tokens (B, T) at positions (B, T)."""
        ids, positions = ids.to(self.device), positions.to(self.device)
        return self.body(input_ids=ids, position_ids=positions, use_cache=False, **mask).last_hidden_state

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
    def _probe(self) -> None:
        """Measure how the model may run; raises ModelError if even plain, padded passes are not understood."""
        if self.body is self.model:
            raise self._refusal("does not come apart into a body and an output layer", ANOTHER)
        texts = self._probe_texts()
        long, short = texts
        if len(self.bands.group([len(s) for s in texts])) > 1:
            texts.append(long.flip(0))  # as long as another, so that two rows meet in a pass
        self._check(texts)
        self.packs = self._packs_right(texts)
        self.shares = self.packs  # so that the next pass shares
        self.shares = self.packs and self._packs_right([torch.cat([long, end]) for end in (long, short, short[:1])])
        self.native = self._probe_native() if self.shares else None

    def _check(self, sequences: list[Tensor]) -> None:
        """Raise ModelError unless the model is causal, has a plain output layer and keeps padded sequences apart."""
        plain = torch.cat([self._alone(s) for s in sequences])
        first = sequences[0]
        whole = self.model(input_ids=first.to(self.device)[None], use_cache=False).logits[0]
        if not (torch.isfinite(plain).all() and torch.isfinite(whole).all()):
            raise self._refusal(
                f"gives states that are not finite in {str(self.dtype).removeprefix('torch.')}",
                "give another --dtype (float32 has the widest range), or check the weights",
            )
        if not is_close(self.logits(plain[: len(first)]), whole, self.dtype):
            raise self._refusal("has an output layer of an unsupported kind", ANOTHER)
        if self._sees_ahead(first):
            raise self._refusal(
                "is no causal language model: a token's state depends on later tokens",
                "give a causal model; if this is an encoder trained as a decoder, set is_decoder in its config.json",
            )
        if not is_close(self._by_band(self._hidden_padded, sequences), plain, self.dtype):
            raise self._refusal("does not keep padded sequences apart", ANOTHER)

    def _packs_right(self, sequences: list[Tensor]) -> bool:
        plain = torch.cat([self._alone(s) for s in sequences])
        try:
            return is_close(self._by_band(self._hidden_packed, sequences), plain, self.dtype)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False  # an architecture with an attention of its own: padding is always right

    def _sees_ahead(self, sequence: Tensor) -> bool:
        """True if a state changes with a later token: by a derivative, which is zero in a causal model.

        Exactly zero, in any precision, while values may move by rounding (experts round as they share their tokens).
        """
        embedded: list[Tensor] = []

        def record(module: nn.Module, inputs: object, out: Tensor) -> Tensor:
            embedded.append(out.detach().requires_grad_())
            return embedded[0].clone()  # a model may change it in place

        middle = len(sequence) // 2  # not the last token: some encoders mask it by its number
        hook = self.model.get_input_embeddings().register_forward_hook(record)
        try:
            with torch.enable_grad():
                states = self._alone(sequence)[:middle].float()
                weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
                (gradient,) = torch.autograd.grad((states * weights).sum(), embedded[0])
        finally:
            hook.remove()
        return bool(gradient.reshape(len(sequence), -1)[middle:].any())

    @torch.no_grad()
    def _probe_native(self) -> Native | None:
        """The native forward pass, if it gives the states of transformers."""
        native = native_of(self.model)
        if native is None:
            return None
        long, short = self._probe_texts()
        sequences = [torch.cat([long, end]) for end in (long, short)]
        row, expected = pack(sequences, share=True), self._hidden_packed(sequences)
        states = native.hidden(row, row.indices.to(self.device))
        return native if is_close(states, expected, self.dtype, fp32_tolerance=1e-4) else None

    def _probe_texts(self) -> list[Tensor]:
        return [torch.tensor(text) % self.vocabulary for text in PROBE_TOKENS]

    def _refusal(self, why: str, fix: str) -> ModelError:
        return ModelError(f"`{self.ref.config['model_type']}` {why}", where="--model", fix=fix)


def _select(states: Tensor, indices: Tensor | None) -> Tensor:
    """States (N, H) at indices (M,), which may repeat; None selects all."""
    if indices is None:
        return states
    # Not states[indices]: if threads meet at a repeated index, its gradient is added up in any order.
    return functional.embedding(indices.to(states.device), states)


def is_close(a: Tensor, b: Tensor, dtype: torch.dtype, fp32_tolerance: float = 1e-3) -> bool:
    """True if two ways to compute states or logits in a precision agree, relative to the largest number in `b`."""
    if a.shape != b.shape or not torch.isfinite(a).all():
        return False
    tolerance = fp32_tolerance if dtype == torch.float32 else 0.1
    scale = b.float().abs().max().clamp(min=1.0)
    return bool((a.float() - b.float()).abs().max() <= tolerance * scale)


def load_base(
    ref: ModelRef, *, device: torch.device, dtype: torch.dtype, four_bit: bool = False, trust_remote_code: bool = False
) -> Base:
    """Load a base onto a device, frozen; raises ModelError if transformers cannot load it as a causal LM.

    With `four_bit` its linear layers are held in 4 bits and compute in `dtype`; everything else has `dtype`.
    """
    from transformers import AutoModelForCausalLM

    options = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "low_cpu_mem_usage": True,
        "ignore_mismatched_sizes": True,  # `check_tensors` names them
        "adapter_kwargs": {"subfolder": NO_ADAPTER},
        **(four_bit_options(device, dtype) if four_bit else {}),
    }
    with quiet():
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(ref.base, output_loading_info=True, **options)
        except Exception as error:  # many kinds: unknown architecture, missing tensors, a damaged file
            check_config(ref, trust_remote_code=trust_remote_code, build=True)
            why = f"the base cannot be loaded: {library_reason(error)}"
            raise ModelError(why, where=str(ref.base), fix="check the folder's files") from None
    check_tensors(model, loading, ref)
    check_finite(model, where=str(ref.base))
    return base_of(keep_gradients(model) if four_bit else model.to(device), ref)


def base_of(model: nn.Module, ref: ModelRef) -> Base:
    """A loaded model as a frozen base with our attention; raises ModelError if it is not understood."""
    attention.register()
    try:
        _choose_attention(model.eval())
        return Base(model, ref)
    except Exception as error:  # whatever an architecture's own code may raise
        if isinstance(error, (ModelError, MemoryError)) or "memory" in str(error):
            raise
        why = f"`{ref.config['model_type']}` cannot be run on a plain text: {library_reason(error)}"
        raise ModelError(why, where="--model", fix=ANOTHER) from error


@torch.no_grad()
def _choose_attention(model: nn.Module) -> None:
    """Give a model our attention, else its default, else the eager one: the first with the logits of the eager one.

    A fused kernel may leave out a part that it does not support: sdpa of transformers 5.17 the soft cap of Gemma 2,
    ours the sinks of GPT-OSS. A model without an eager attention to choose is left as it is.
    """
    ids = torch.tensor([PROBE_TOKENS[0]], device=model.device) % model.get_output_embeddings().weight.shape[0]
    default, plain = model.config._attn_implementation, "eager"
    _use_attention(model, plain)
    expected = model(input_ids=ids, use_cache=False).logits
    for name in (attention.ATTENTION_NAME, default):
        _use_attention(model, name)
        if is_close(model(input_ids=ids, use_cache=False).logits, expected, model.dtype):
            return
    _use_attention(model, plain)


def _use_attention(model: nn.Module, name: str) -> None:
    with suppress(ValueError, AttributeError), quiet():
        model.set_attn_implementation(name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading bar and notes off the terminal."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
