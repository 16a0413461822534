"""Digests that are equal for equal bases, tokenizers or files. No torch: headers and samples are enough."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from stages.checkpoint.tensors import read_header
from stages.errors import CheckpointError, ModelError, UserError
from stages.reading import read_object, sha256_of

_SAMPLE = 4096  # bytes read at each end of a tensor
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_VOLATILE_CONFIG = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
_TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
_VOCABULARIES = ("vocab.*", "merges.txt", "*.model", "added_tokens.json", "special_tokens_map.json")
_VOLATILE_TOKENIZER = {
    "chat_template", "transformers_version", "name_or_path", "_name_or_path", "tokenizer_file", "vocab_file",
    "merges_file", "special_tokens_map_file", "is_local", "local_files_only", "model_max_length", "padding_side",
    "truncation_side", "processor_class", "auto_map",
}  # fmt: skip


def base_digest(folder: str | Path) -> str:
    """sha256 of a base model: config, and name, dtype, shape and sampled content of every tensor.

    It does not depend on how the weights are split into files. Raises ModelError if the folder holds no safetensors
    weights, or damaged ones.
    """
    folder = Path(folder)
    lines = []
    for path in weight_files(folder):
        lines += _tensor_lines(path)
    config = _without(_read_json(folder / "config.json"), _VOLATILE_CONFIG)
    return _digest([_canonical(config), *sorted(lines)])


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights; as in transformers, one whole file precedes an index, and an index other files."""
    if not folder.is_dir():
        raise ModelError("no such folder", where=str(folder), fix="give a model folder or a hub id")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(_is_inside(name) for name in names.values()):
            raise ModelError("not an index of weights", where=str(index), fix="download the model again")
        return [folder / name for name in sorted(set(names.values()))]
    files = set(folder.glob("*.safetensors"))
    weights = sorted(files - {folder / "adapter_model.safetensors"})
    if weights:
        return weights
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if files:
        what = "holds an adapter, not a base model"
        fix = "merge it into its base first, or give the checkpoint folder that this tool wrote"
    elif pickled:
        what = f"holds only pickled weights ({pickled[0]}), which can run code when loaded and are refused"
        fix = "convert them to safetensors (load them on a machine where you trust them, then save_pretrained)"
    else:
        what, fix = "holds no weights (*.safetensors)", "give a model folder or a hub id"
    raise ModelError(what, where=str(folder), fix=fix)


def _is_inside(name: object) -> bool:
    """True for the name of a file that cannot be outside its folder."""
    return isinstance(name, str) and name != "" and not {"..", "/"} & {*Path(name).parts}


def _tensor_lines(path: Path) -> list[str]:
    """One line per tensor: name, dtype, shape, and the sha256 of the first and the last bytes of its content."""
    try:
        header, start = read_header(path)
        lines = []
        with open(path, "rb") as file:
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                first, last = (start + offset for offset in entry["data_offsets"])
                file.seek(first)
                sample = file.read(min(_SAMPLE, last - first))
                file.seek(max(first, last - _SAMPLE))
                sample += file.read(min(_SAMPLE, last - first))
                lines.append(_canonical([name, entry["dtype"], entry["shape"], hashlib.sha256(sample).hexdigest()]))
    except CheckpointError as error:
        fix = error.fix if "LFS" in error.what else "download or copy the model again"
        raise ModelError(error.what, where=error.where, fix=fix) from error
    except OSError as error:
        raise ModelError(f"cannot read: {error.strerror or error}", where=str(path), fix="check the file") from error
    return lines


def tokenizer_digest(folder: str | Path) -> str:
    """sha256 of what maps text to tokens: vocabulary, merges, normalisation; not the chat template.

    Only tokenizer.json is hashed if it exists, so that two saves of one tokenizer agree; else the vocabulary files and
    the settings. Raises ModelError if the folder holds no tokenizer.
    """
    folder = Path(folder)
    fast, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if fast.exists():
        content = _read_json(fast)
        if not isinstance(content.get("model"), dict):
            raise ModelError("not a tokenizer", where=str(fast), fix="download or save the tokenizer again")
        return tokenizer_content_digest(content)
    vocabularies = sorted({path for pattern in _VOCABULARIES for path in folder.glob(pattern)})
    lines = [f"{path.name} {file_digest(path)}" for path in vocabularies]
    if settings.exists():
        lines.append(_canonical(_without(_read_json(settings), _VOLATILE_TOKENIZER)))
    if not lines:
        fix = "save the model's tokenizer there as well"
        raise ModelError("holds no tokenizer (tokenizer.json)", where=str(folder), fix=fix)
    return _digest(lines)


def tokenizer_content_digest(content: dict) -> str:
    """`tokenizer_digest` of the content of a tokenizer.json.

    Older files write merges as texts and omit options that are off; both spellings have one digest.
    """
    model = {key: value for key, value in content["model"].items() if value is not None and value is not False}
    if isinstance(model.get("merges"), list):
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    return _digest([_canonical({part: content.get(part) for part in _TOKENIZER_PARTS} | {"model": model})])


def file_digest(path: str | Path) -> str:
    """sha256 of a file's content, or of the names and contents of a folder's files. Raises UserError if unreadable."""
    path = Path(path)
    try:
        if not path.is_dir():
            return sha256_of(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _digest([f"{file.relative_to(path).as_posix()} {sha256_of(file)}" for file in files])
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror or error}", where=str(path), fix="check the path") from error


def _read_json(path: Path) -> dict:
    try:
        return read_object(path)
    except OSError as error:
        what = f"cannot read: {error.strerror or error}"
    except ValueError:
        what = "damaged: not a JSON object"
    raise ModelError(what, where=str(path), fix="download or save the model again")


def _without(value: object, names: set[str]) -> object:
    """A JSON value without the keys of these names, at every depth."""
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    if isinstance(value, list):
        return [_without(item, names) for item in value]
    return value


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
