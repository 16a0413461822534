"""The files of a base: where a name leads, and what is refused before a library reads them. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stages.data.raw_rows import first_line
from stages.errors import ModelError
from stages.models.adapter_files import ADAPTER, ADAPTER_CONFIG
from stages.models.gguf import dequantised, is_gguf
from stages.places import absolute, describe_special
from stages.reading import read_object

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spm.model")


def find_base(name: str, what: str, weights: bool = True) -> tuple[Path, str]:
    """The folder of a base, and its name in manifests; a hub id is downloaded, a GGUF file dequantised.

    Without `weights`, none of a base are downloaded; those of an adapter are. Raises ModelError if there is none.
    """
    path = absolute(name, what)
    if ".." in path.parts and not path.exists():
        path = Path(os.path.realpath(path))
    if path.is_dir():
        return path, str(path)
    if is_gguf(path):
        return dequantised(path, what), str(path)
    kind = describe_special(path) or ("a file" if path.is_file() else "")
    if kind:
        raise ModelError(f"{name} is {kind}", where=what, fix="give the model's folder")
    if name.startswith((".", "/", "~")) or not HUB_ID.match(name):
        raise ModelError(
            f"{name} does not exist", where=what, fix="give a model folder, a checkpoint folder, or a hub id org/name"
        )
    return download(name, what, weights), name


def refuse_special(folder: Path, what: str) -> None:
    """Raise ModelError for a pipe or device in a model's folder, for which a library might wait for ever."""
    for file in sorted(os.listdir(folder)):
        kind = describe_special(folder / file)
        if kind and not kind.startswith("a link"):  # whatever needs a broken link's file will miss it
            raise ModelError(f"{file} is {kind}, not a file", where=f"{what} {folder}", fix="restore the file")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in TOKENIZER_FILES)


def read_settings(path: Path, where: str) -> dict:
    """The JSON object in a model's file. Raises FileNotFoundError, and ModelError if it cannot be read."""
    try:
        return read_object(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}", where=where, fix="restore the file") from None


def read_config(base: Path, what: str) -> dict:
    """config.json of a decoder in full precision; raises ModelError for anything else."""
    try:
        config = read_settings(base / "config.json", f"{what} {base}")
    except FileNotFoundError:
        problem, fix = f"{base} holds no config.json, so it is no model", "give a folder saved by save_pretrained"
        raise ModelError(problem, where=what, fix=fix) from None
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            "config.json names no model_type", where=f"{what} {base}", fix="give a transformers model folder"
        )
    if config.get("is_encoder_decoder"):
        problem = f"{base} is an encoder-decoder ({config['model_type']})"
        raise ModelError(problem, where=what, fix="give a decoder-only causal language model")
    quantised = _quantisation(config)
    if quantised is not None:
        raise ModelError(
            f"{base} holds quantised weights ({quantised}), on which adapters are neither trained nor merged",
            where=what,
            fix="give the model in full precision; --load-in-4bit holds it in 4 bits while it is used",
        )
    return config


def _quantisation(config: dict) -> str | None:
    """How a base's weights are quantised, by its config.json; None if they are not."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        how = part.get("quantization_config") or part.get("compression_config")
        if isinstance(how, dict):
            if how.get("quant_method"):
                return str(how["quant_method"])
            return next((name for name in ("load_in_4bit", "load_in_8bit") if how.get(name)), "quantization_config")
    return None


def refuse_code(folder: Path, file: str, settings: dict, what: str) -> None:
    """Raise ModelError if a file of a model's folder names Python code to run."""
    kernel = settings.get("_attn_implementation") or settings.get("attn_implementation")
    if settings.get("auto_map"):
        code = "auto_map"
    elif isinstance(kernel, str) and "/" in kernel:  # transformers fetches such a kernel from the hub and runs it
        code = f"attn_implementation {kernel}"
    else:
        return
    raise ModelError(
        f"{folder} brings Python code of its own ({code} in {file}), which is not run",
        where=what,
        fix="use a model that transformers supports, or pass --trust-remote-code if you trust its author",
    )


def adapter_beside(base: Path) -> tuple[str, ...]:
    """A warning if a base's folder also holds an adapter of PEFT, which is never loaded with it."""
    if not (base / ADAPTER_CONFIG).exists():
        return ()
    return (
        f"{base} also holds an adapter of PEFT ({ADAPTER_CONFIG}), which is not used: only the weights of the base "
        "are; to use the adapter, merge it into them first",
    )


def download(name: str, what: str, weights: bool) -> Path:
    """Fetch a hub model's config, tokenizer and safetensors; nothing that could execute."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES if weights else [ADAPTER, *HUB_FILES[1:]]))
    except Exception as error:  # the hub client raises many kinds; each means the model cannot be had
        raise ModelError(
            f"{name} is no local folder, and the hub did not give it: {first_line(error)}",
            where=what,
            fix="check the name, or give a local folder",
        ) from None
