"""Loads the frozen base once and finds out, by measurement, how it may be run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.errors import ModelError
from stages.models.checks import check_finite, check_tensors, config_problem, library_reason
from stages.models.lora import LoraLayers
from stages.models.model_ref import ModelRef
from stages.models.passes import Passes
from stages.models.quantised import four_bit_options, keep_gradients
from stages.models.rotary import LengthBands
from stages.native import attention
from stages.native.forward import Native, native_of
from stages.native.prefixes import pack
from stages.reading import read_text

PROBE = ((5, 3, 9, 4, 8, 6, 7, 11, 2, 10), (4, 8, 3))  # two short texts, reduced modulo the vocabulary
NO_ADAPTER = "no adapter of PEFT"  # a folder inside the base's that is not there: where transformers is to look for one
ANOTHER = "use another architecture (Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX and alike work)"


class Base:
    """The frozen model, its linear layers and their adapters, and its body and readout taken apart.

    `hidden` runs the body over ragged sequences; `logits` reads hidden states out. Sequences run packed in one row
    without padding where that was measured to give the same hidden states, padded on the right elsewhere; a beginning
    that several of them share runs once, where that was measured too. Sequences whose lengths lie in different `bands`
    never share a pass.
    """

    def __init__(self, model: nn.Module, source: ModelRef):
        self.model = model.eval().requires_grad_(False)
        self.source = source
        self.lora = LoraLayers(model)
        self.layers = self.lora.linear
        self.body: nn.Module = model.base_model
        self.output: nn.Module = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.width: int = self.output.weight.shape[1]
        self.vocabulary: int = self.output.weight.shape[0]
        self.context = source.context
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._logit_scale = getattr(config, "logit_scale", None)
        self._logit_divisor = getattr(config, "logits_scaling", None)
        self.bands = LengthBands(model)
        self.packs = self.shares = self.checkpoints = False
        self.caches: bool | None = None  # whether decoding with transformers' cache is right; None: not measured
        self.native: Native | None = None
        self.has_dora = False
        self.passes = Passes(on_cuda=self.device.type == "cuda")
        self.packs = self._probe()
        self.shares = self.packs and self._probe_sharing()
        self.native = self._probe_native() if self.shares else None

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.output.weight.dtype

    def prepare_for_dora(self) -> None:
        """Run through transformers from here on: our own forward pass does not cover DoRA."""
        self.has_dora, self.native = True, None
        if self.checkpoints:
            self.checkpoints = False
            self.checkpoint_activations()

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass.

        Transformers does so in train mode alone, so there every dropout becomes 0. Raises ModelError where the base
        cannot, or where train mode changes what it computes.
        """
        if self.native is not None:
            self.checkpoints = True
            return
        config = self.model.config
        for part in (config, config.get_text_config(), *self.model.modules()):
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            for name, value in list(vars(part).items()):
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(part, name, 0.0)
        sequences = [self._probe_text(text) for text in PROBE]
        before = self.hidden(sequences)
        try:  # the first name came with a later transformers than the oldest we run on
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        except ValueError:
            raise self._refusal("cannot recompute its activations", "leave --gradient-checkpointing out") from None
        self.model.enable_input_require_grads()
        self.checkpoints = True
        if not _close(self.hidden(sequences), before, self._tolerance):
            self.checkpoints = False
            raise self._refusal("computes something else in train mode", "leave --gradient-checkpointing out")

    # --- running it

    def hidden(self, sequences: list[Tensor], wanted: Tensor | None = None) -> Tensor:
        """Final hidden states of ragged sequences (L_i,), laid end to end: (sum L_i, H).

        `wanted` (M,) names the places of that row whose states are asked for, in their order: (M, H).
        """
        if self.native is not None and self.packs:
            return self._hidden_native(sequences, wanted)
        run = self._hidden_packed if self.packs else self._hidden_padded
        if not (self.checkpoints and torch.is_grad_enabled()):
            return _taken(self._by_band(run, sequences), wanted)
        self.model.train()  # only here: in train mode a checkpointing layer ignores its cache, and sampling needs it
        try:
            return _taken(self._by_band(run, sequences), wanted)
        finally:
            self.model.eval()

    def _by_band(self, run: Callable[[list[Tensor]], Tensor], sequences: list[Tensor]) -> Tensor:
        """States of sequences laid end to end, from one run for every band of lengths that is among them."""
        lengths = [len(s) for s in sequences]
        groups, states = self.bands.group(lengths), []
        for rows in groups:
            self.bands.forget()
            states.append(run([sequences[i] for i in rows]))
        if len(groups) == 1:
            return states[0]
        order = [i for rows in groups for i in rows]
        places = torch.arange(sum(lengths)).split([lengths[i] for i in order])
        back = [part for _, part in sorted(zip(order, places, strict=True), key=lambda pair: pair[0])]
        return _taken(torch.cat(states), torch.cat(back))

    def _hidden_native(self, sequences: list[Tensor], wanted: Tensor | None) -> Tensor:
        row = pack(sequences, share=self.shares)
        places = wanted if row.places is None else row.places if wanted is None else row.places[wanted.cpu()]
        if places is None:
            return self.native.hidden(row, None, recompute=self.checkpoints)
        needed, again = places.to(self.device).unique(return_inverse=True)  # sequences may share a place
        return _taken(self.native.hidden(row, needed, recompute=self.checkpoints), again)

    def _hidden_packed(self, sequences: list[Tensor]) -> Tensor:
        row = pack(sequences, share=self.shares)
        ids, positions = row.ids.to(self.device)[None], row.positions.to(self.device)[None]
        with attention.packed(row.trees, self.device):
            states = self.body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        return _taken(states, row.places)

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
        """True where packed rows give the same states; raises ModelError where the model is not understood."""
        if self.body is self.model:
            raise self._refusal("does not come apart into a body and an output layer", ANOTHER)
        sequences = [self._probe_text(text) for text in PROBE]
        if len(self.bands.group([len(s) for s in sequences])) > 1:
            sequences.append(sequences[0].flip(0))  # of one length with another, so that two rows meet in a pass
        plain = torch.cat([self._alone(s) for s in sequences])
        padded = self._by_band(self._hidden_padded, sequences)
        whole = self.model(input_ids=sequences[0].to(self.device)[None], use_cache=False).logits[0]
        if not (torch.isfinite(plain).all() and torch.isfinite(whole).all()):
            raise self._refusal(
                f"gives states that are not finite in {str(self.dtype).removeprefix('torch.')}",
                "give another --dtype (float32 has the widest range), or check the weights",
            )
        if not _close(self.logits(plain[: len(sequences[0])]), whole, self._tolerance):
            raise self._refusal("has an output layer that does more than this tool knows of", ANOTHER)
        if self._sees_ahead(sequences[0]):
            raise self._refusal(
                "lets a token see those that come after it, so it is no causal language model",
                "give a causal one; of an encoder that was trained as a decoder, config.json has to say is_decoder",
            )
        if not _close(padded, plain, self._tolerance):
            raise self._refusal("does not keep padded sequences apart", ANOTHER)
        try:
            return _close(self._by_band(self._hidden_packed, sequences), plain, self._tolerance)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False  # an architecture with an attention of its own: padding is always right

    def _sees_ahead(self, sequence: Tensor) -> bool:
        """True where a state changes with a token that comes after it: a derivative that is zero in a causal model.

        Exactly zero, in any precision, while values may move by rounding (experts round as they share their tokens).
        """
        kept: list[Tensor] = []

        def keep(module: nn.Module, given: object, out: Tensor) -> Tensor:
            kept.append(out.detach().requires_grad_())
            return kept[0].clone()  # which a model may go on to change in place

        middle = len(sequence) // 2  # not the last token: of some encoders it may be masked by its number
        hook = self.model.get_input_embeddings().register_forward_hook(keep)
        try:
            with torch.enable_grad():
                states = self._alone(sequence)[:middle].float()
                weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
                (gradient,) = torch.autograd.grad((states * weights).sum(), kept[0])
        finally:
            hook.remove()
        return bool(gradient.reshape(len(sequence), -1)[middle:].any())

    @torch.no_grad()
    def _probe_sharing(self) -> bool:
        """True where a beginning that lies in the row once gives the states that it gives in every sequence."""
        whole = self._probe_text(PROBE[0])
        sequences = [torch.cat([whole, self._probe_text(text)]) for text in (*PROBE, PROBE[1][:1])]
        plain = torch.cat([self._alone(s) for s in sequences])
        self.shares = True
        try:
            return _close(self._by_band(self._hidden_packed, sequences), plain, self._tolerance)
        except (RuntimeError, TypeError, ValueError):
            return False

    @torch.no_grad()
    def _probe_native(self) -> Native | None:
        """Our own forward pass, where it gives the states that transformers' gives."""
        native = native_of(self.model)
        if native is None:
            return None
        whole = self._probe_text(PROBE[0])
        sequences = [torch.cat([whole, self._probe_text(text)]) for text in PROBE]
        row, expected = pack(sequences, share=True), self._hidden_packed(sequences)
        found = native.hidden(row, row.places.to(self.device))
        exact = 1e-4 if self.dtype == torch.float32 else self._tolerance
        return native if _close(found, expected, exact) else None

    @property
    def _tolerance(self) -> float:
        return tolerance_of(self.dtype)

    def _probe_text(self, text: tuple[int, ...]) -> Tensor:
        return torch.tensor([i % self.vocabulary for i in text])

    def _refusal(self, why: str, fix: str) -> ModelError:
        return ModelError(f"`{self.source.config['model_type']}` {why}", where="--model", fix=fix)

    def _alone(self, sequence: Tensor) -> Tensor:
        self.bands.forget()
        positions = torch.arange(len(sequence), device=self.device)[None]
        ids = sequence.to(self.device)[None]
        return self.body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]


def _taken(states: Tensor, places: Tensor | None) -> Tensor:
    """States (N, H) at places (M,), which may repeat; all of them where there are none."""
    if places is None:
        return states
    # Not states[places]: where several threads meet at a place, indexing adds up its gradient in any order.
    return functional.embedding(places.to(states.device), states)


def tolerance_of(dtype: torch.dtype) -> float:
    """How far two ways of computing the same states may be apart, relative to the largest."""
    return 1e-3 if dtype == torch.float32 else 0.1


def is_close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """True where two ways of computing states or logits in a precision agree."""
    return _close(a, b, tolerance_of(dtype))


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or not torch.isfinite(a).all():
        return False
    scale = b.float().abs().max().clamp(min=1.0)
    return bool((a.float() - b.float()).abs().max() <= tolerance * scale)


def load_base(
    source: ModelRef,
    *,
    device: torch.device,
    dtype: torch.dtype,
    four_bit: bool = False,
    trust_remote_code: bool = False,
) -> Base:
    """Load a base onto a device, frozen; raises ModelError where transformers cannot load it as a causal LM.

    With `four_bit` its linear layers are held in 4 bits and compute in `dtype`; all else has `dtype`.
    """
    from transformers import AutoModelForCausalLM

    options = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "low_cpu_mem_usage": True,
        "ignore_mismatched_sizes": True,  # they are named below
        "adapter_kwargs": {"subfolder": NO_ADAPTER},
        **(four_bit_options(device, dtype) if four_bit else {}),
    }
    try:
        with _quiet():
            model, loading = AutoModelForCausalLM.from_pretrained(source.base, output_loading_info=True, **options)
    except Exception as error:  # many kinds: unknown architecture, missing tensors, a damaged file
        with _quiet():
            problem = config_problem(source, trust_remote_code=trust_remote_code, build=True)
        raise ModelError(
            f"the base cannot be loaded: {problem or library_reason(error)}",
            where=str(source.base),
            fix="check the folder's files",
        ) from None
    check_tensors(model, loading, source)
    check_finite(model, where=str(source.base))
    return base_of(keep_gradients(model) if four_bit else model.to(device), source)


def base_of(model: nn.Module, source: ModelRef) -> Base:
    """A loaded model as a frozen base with our attention; raises ModelError where it is not understood."""
    attention.register()
    try:
        _choose_attention(model.eval())
        return Base(model, source)
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an architecture's own code may raise
        if "memory" in str(error):
            raise
        raise ModelError(
            f"`{source.config['model_type']}` cannot be run on a plain text: {library_reason(error)}",
            where="--model",
            fix=ANOTHER,
        ) from error


@torch.no_grad()
def _choose_attention(model: nn.Module) -> None:
    """Give a model our attention, or else its own, or the plain one, whichever first gives the plain one's logits.

    A fused kernel may leave out a part that it does not know: sdpa of transformers 5.17 the soft cap of Gemma 2, ours
    the sinks of GPT-OSS. A model that has no plain attention to choose is taken as it comes.
    """
    ids = torch.tensor([PROBE[0]], device=model.device) % model.get_output_embeddings().weight.shape[0]
    own, plain = model.config._attn_implementation, "eager"
    _use_attention(model, plain)
    expected = model(input_ids=ids, use_cache=False).logits
    for name in (attention.NAME, own):
        _use_attention(model, name)
        if _close(model(input_ids=ids, use_cache=False).logits, expected, tolerance_of(model.dtype)):
            return
    _use_attention(model, plain)


def _use_attention(model: nn.Module, name: str) -> None:
    with suppress(ValueError, AttributeError), _quiet():
        model.set_attn_implementation(name)


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


def stop_ids_of(source: ModelRef) -> tuple[int, ...]:
    """Token ids that end generation: the checkpoint's, or those that the base's config files name."""
    if source.manifest is not None:
        return tuple(source.manifest.stop_token_ids)
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = source.base / name
        if path.exists():
            found.update(_eos_ids(path))
    return tuple(sorted(found))


def _eos_ids(path: Path) -> list[int]:
    """What a config file calls its end of sequence: one id, several, or none. Raises ModelError."""
    try:
        content = json.loads(read_text(path))
        ids = content.get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise ModelError("not a JSON object", where=str(path), fix="restore the file") from None
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(number) is int and 0 <= number < 2**31 for number in ids):
        raise ModelError("eos_token_id is no token's number", where=str(path), fix="restore the file")
    return ids
