"""A GGUF file as a base: dequantised once by transformers, into a folder of plain weights in the user's cache.

Everything else sees that folder: digests, adapters' base paths, PEFT, export. It is named by the file's content, so the
same file gives the same folder, with the same digest, wherever it lies; a folder that was deleted is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from stages.checkpoint import atomic
from stages.errors import ModelError

SUFFIX, MAGIC = ".gguf", b"GGUF"
SAMPLES, SAMPLE = 1024, 4096  # parts of a file that its name in the cache depends on, and their bytes
BEGINNING = 2**24  # bytes read whole: names, shapes and, mostly, the vocabulary


def is_gguf(path: Path) -> bool:
    """True for a plain file whose name ends in .gguf."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def dequantised(path: Path, what: str) -> Path:
    """The folder with the weights, config and tokenizer of a GGUF file, made if it is not there yet.

    Raises ModelError if the file or its architecture cannot be read, or if the package gguf is missing.
    """
    try:
        digest = _digest_of(path)
    except OSError as error:
        raise ModelError(f"cannot read: {error.strerror or error}", where=str(path), fix="check the file") from None
    if digest is None:
        raise ModelError(f"{path} is no GGUF file", where=what, fix="download it again")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home, "rlhf", "gguf", f"{path.stem}-{digest[:16]}")
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        fix = "run pip install 'rlhf[gguf]', or give the model as safetensors"
        raise ModelError("a GGUF file needs the package gguf, which is not installed", where=what, fix=fix)
    from filelock import FileLock

    atomic.make_folder(folder.parent)
    with FileLock(f"{folder}.lock"):  # the ranks of one run open it at the same time
        if not folder.is_dir():
            _convert(path, folder, what)
    return folder


def _digest_of(path: Path) -> str | None:
    """sha256 of a file's size, its beginning and parts from all over it; None for a file of another kind."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        start = file.read(BEGINNING)
        if not start.startswith(MAGIC):
            return None
        digest.update(f"{size}\n".encode() + start)
        for number in range(SAMPLES):
            file.seek(max(0, size - SAMPLE) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _convert(path: Path, folder: Path, what: str) -> None:
    from stages.models.checks import library_reason

    try:
        model, tokenizer, missing = _load(path)
    except Exception as error:  # many kinds: unknown architecture or quantisation, a damaged file
        problem = f"{path} cannot be read by transformers: {library_reason(error)}"
        fix = "give the model as safetensors, in full precision, or check the file"
        raise ModelError(problem, where=what, fix=fix) from None
    if missing:
        raise ModelError(f"{path} lacks {missing[0]}", where=what, fix="download it again, whole and in one file")
    with atomic.folder(folder) as place:
        model.save_pretrained(place, safe_serialization=True)
        tokenizer.save_pretrained(place)
        _drop_tokens_from(model.get_input_embeddings().weight.shape[0], place / "tokenizer.json")


def _drop_tokens_from(size: int, path: Path) -> None:
    """Remove the added tokens behind the last row of the embeddings: transformers adds defaults of its own."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _load(path: Path) -> tuple[Any, Any, list[str]]:
    """The model in float32, its tokenizer, and the names of weights that the file lacks."""
    import torch
    import transformers

    from stages.models.base import NO_ADAPTER, quiet

    options: dict[str, Any] = {"dtype": torch.float32, "adapter_kwargs": {"subfolder": NO_ADAPTER}}
    if hasattr(transformers, "GgufConfig"):  # versions that have it may keep the weights packed without
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    progress = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with quiet(), progress:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(**place, output_loading_info=True, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    template = str(tokenizer.chat_template or "")  # the special tokens that it writes: so the end of a turn is found
    tokenizer.add_special_tokens({"additional_special_tokens": [token for token in special if token in template]})
    model.hf_quantizer = None  # the weights are plain now, and saved as such
    vars(model.config).pop("quantization_config", None)
    return model, tokenizer, sorted(loading["missing_keys"])


def missing_template(base_name: str, tokenizer: Path, chat_template: str | None) -> tuple[str, ...]:
    """A warning if a GGUF base brings no chat template and none is given."""
    from stages.models.templates import stored_template

    if not base_name.endswith(SUFFIX) or chat_template is not None or stored_template(tokenizer):
        return ()
    name = Path(base_name).name
    fix = "for rows of messages, give --chat-template chatml, plain or a .jinja file"
    return (f"{name} brings no chat template, so rows of messages cannot be read; {fix}",)
