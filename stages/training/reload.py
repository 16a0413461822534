"""Reads back what a stage has just written and compares it with memory before it is published."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from stages.checkpoint.digests import tokenizer_content_digest, tokenizer_digest
from stages.checkpoint.tensors import load_tensors
from stages.errors import ModelError, OutputError, UserError
from stages.models.base import Base, is_close
from stages.models.heads import ScalarHead
from stages.models.lora import Adapter
from stages.models.roles import ADAPTER, SCORE_KEY, Roles, adapter_of, head_of, new_adapter, save_adapter
from stages.models.tokens import Text, load_text
from stages.native.limits import out_of_memory

SAID = "Human: what is the time?\n\nAssistant: it is 12:34 — thank you!"  # what both tokenizers have to agree on


def probe_sequences(base: Base) -> list[Tensor]:
    """Two fixed short texts that saved and loaded weights are compared on."""
    return [torch.arange(3, 3 + n) * 7 % base.vocabulary for n in (9, 5)]


@torch.no_grad()
def check_reload(
    base: Base, folder: Path, adapter: Adapter, head: ScalarHead | None = None, *, trunk: Path | None = None
) -> None:
    """Load an adapter, and a head where there is one, from `folder` and score a fixed batch.

    Weights must equal memory's to the bit, states up to rounding: products of narrow layers round by where in memory
    their weights lie. `trunk` is where the adapter lies if not beside its head, as for a critic that shares the
    policy's. Raises AssertionError, whose text names what differs: a file that does not come back is a defect of ours.
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
            found = base.hidden(probe_sequences(base))
    finally:
        roles.remove("in memory")
        roles.remove("on disk")
    # The numbers too: one bit of one weight need not show in the states of a short text.
    same = _equal(adapter.tensors(), stored.tensors()) and is_close(found, expected, base.dtype)
    _expect(same, f"the adapter written to {trunk or folder} is not the one in memory")
    if head is not None:
        same = _equal(head.tensors(), stored_head.tensors())
        _expect(same, f"the head written to {folder} is not the one in memory")
    if score is not None:
        same = torch.equal(score[0], head.weight.cpu())
        _expect(same, f"the head written beside the adapter in {folder} is not the one in memory")


def check_adaptable(base: Base, targets: list[str], lora_type: str = "lora") -> None:
    """Save and load a small adapter on the layers of a base, so that no run is lost at its end for not reading back.

    Raises ModelError if what is written is not what is read. Without room for the trial, on disk or in memory, there is
    none: the run itself says what is missing.
    """
    adapter = new_adapter(base, 1, 1.0, targets, 0, lora_type)
    for parameter in adapter.parameters():
        parameter.data.add_(0.01)  # B is not zero, which would change nothing wherever it is put
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
        return  # a disk that takes nothing is for the run's own folder to tell
    except RuntimeError as error:
        if not out_of_memory(error):  # of which training's own passes say how much they need
            raise


def check_tokenizer(folder: Path, text: Text, *, trust_remote_code: bool) -> None:
    """Load the tokenizer from `folder`: its content, encoding, chat template and stop tokens must equal memory's.

    Raises AssertionError as `check_reload` does.
    """
    try:
        stored = load_text(folder, chat_template=None, stop_ids=text.stop_ids, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise AssertionError(f"the tokenizer written to {folder} cannot be read back: {error}") from error
    mine = _facts(text) | {"tokenizer.json": _content(text)}
    theirs = _facts(stored) | {"tokenizer.json": tokenizer_digest(folder)}
    different = ", ".join(name for name in mine if mine[name] != theirs[name])
    _expect(not different, f"the tokenizer written to {folder} is not the one in memory: {different}")


def _facts(text: Text) -> dict[str, object]:
    return {
        "vocabulary": text.tokenizer.get_vocab(),
        "encoding": text.encode(SAID, rendered=False),
        "chat template": text.tokenizer.chat_template,
        "end of text": text.eos_id,
        "stop tokens": text.stop_ids,
    }


def _content(text: Text) -> str:
    return tokenizer_content_digest(json.loads(text.tokenizer.backend_tokenizer.to_str()))


def _equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _expect(true: bool, otherwise: str) -> None:
    if not true:  # no `assert`, which `python -O` leaves out
        raise AssertionError(otherwise)
