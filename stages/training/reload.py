"""Compares what a stage has written with what it has in memory, before the checkpoint is published."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from stages.checkpoint.digests import tokenizer_content_digest, tokenizer_digest
from stages.checkpoint.tensors import load_tensors
from stages.errors import ModelError, OutputError, UserError
from stages.models.adapter_files import ADAPTER
from stages.models.base import Base, is_close
from stages.models.heads import ScalarHead
from stages.models.lora import Adapter
from stages.models.roles import SCORE_KEY, Roles, adapter_of, head_of, new_adapter, save_adapter
from stages.models.tokens import Text, load_text
from stages.native.limits import out_of_memory

PROBE_TEXT = "Human: what is the time?\n\nAssistant: it is 12:34 — thank you!"  # both tokenizers must encode it alike


def probe_sequences(base: Base) -> list[Tensor]:
    """Two fixed short token sequences on which saved and loaded weights are compared."""
    return [torch.arange(3, 3 + n) * 7 % base.vocabulary for n in (9, 5)]


@torch.no_grad()
def check_reload(
    base: Base, folder: Path, adapter: Adapter, head: ScalarHead | None = None, *, trunk: Path | None = None
) -> None:
    """Load an adapter, and a head if there is one, from `folder` and compare them with memory.

    Weights must be equal to the bit, hidden states of `probe_sequences` up to rounding, which depends on the address of
    the weights. `trunk` is the folder of the adapter if it is not beside its head, as for a critic on the policy's
    adapter. Raises AssertionError with what differs: that is an internal error.
    """
    roles = Roles(base)
    try:
        stored = adapter_of(base, base.ref, trainable=False, folder=trunk or folder)
        stored_head = head_of(base, folder) if head is not None else None
        score = load_tensors(folder / ADAPTER).get(SCORE_KEY) if head is not None and trunk is None else None
    except UserError as error:
        raise AssertionError(f"what was written to {folder} cannot be read back: {error}") from error
    roles.add("in memory", adapter)
    roles.add("on disk", stored)
    try:
        with roles.use("in memory"):
            expected = base.hidden(probe_sequences(base))
        with roles.use("on disk"):
            actual = base.hidden(probe_sequences(base))
    finally:
        roles.remove("in memory")
        roles.remove("on disk")
    # The weights too: one bit of one weight may not change the states of a short text.
    same = _equal(adapter.tensors(), stored.tensors()) and is_close(actual, expected, base.dtype)
    _expect(same, f"the adapter written to {trunk or folder} is not the one in memory")
    if head is not None:
        same = _equal(head.tensors(), stored_head.tensors())
        _expect(same, f"the head written to {folder} is not the one in memory")
    if score is not None:
        same = torch.equal(score[0], head.weight.cpu())
        _expect(same, f"the head written beside the adapter in {folder} is not the one in memory")


def check_adaptable(base: Base, targets: list[str], lora_type: str = "lora") -> None:
    """Save and load a small adapter on the layers of a base, so that no run fails only at its end.

    Raises ModelError if it does not come back as it was written. A full disk or too little memory for this trial is
    ignored: the run itself reports it.
    """
    adapter = new_adapter(base, 1, 1.0, targets, 0, lora_type)
    for parameter in adapter.parameters():
        parameter.data.add_(0.01)  # with B zero, an adapter on the wrong layer would have no effect
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(Path(folder), base, adapter)
            check_reload(base, Path(folder), adapter)
    except AssertionError as error:
        raise ModelError(
            f"an adapter on `{base.ref.config['model_type']}` does not read back as it was written: {error}",
            where="--model",
            fix="name other --lora-targets, or use another base",
        ) from None
    except (OSError, OutputError):
        return  # the run reports it for its own folder
    except RuntimeError as error:
        if not out_of_memory(error):  # the training passes report that, with the memory they need
            raise


def check_tokenizer(folder: Path, text: Text, *, trust_remote_code: bool) -> None:
    """Load the tokenizer from `folder`: its content, encoding, chat template and stop tokens must equal memory's.

    Raises AssertionError as `check_reload` does.
    """
    try:
        stored = load_text(folder, chat_template=None, stop_ids=text.stop_ids, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise AssertionError(f"the tokenizer written to {folder} cannot be read back: {error}") from error
    content = tokenizer_content_digest(json.loads(text.tokenizer.backend_tokenizer.to_str()))
    expected = _tokenizer_parts(text) | {"tokenizer.json": content}
    actual = _tokenizer_parts(stored) | {"tokenizer.json": tokenizer_digest(folder)}
    different = ", ".join(name for name in expected if expected[name] != actual[name])
    _expect(not different, f"the tokenizer written to {folder} is not the one in memory: {different}")


def _tokenizer_parts(text: Text) -> dict[str, object]:
    return {
        "vocabulary": text.tokenizer.get_vocab(),
        "encoding": text.encode(PROBE_TEXT, rendered=False),
        "chat template": text.tokenizer.chat_template,
        "end of text": text.eos_id,
        "stop tokens": text.stop_ids,
    }


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _expect(true: bool, otherwise: str) -> None:
    if not true:  # no `assert`, which `python -O` leaves out
        raise AssertionError(otherwise)
