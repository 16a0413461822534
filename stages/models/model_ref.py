"""What --model names: a base or one of our checkpoints. Checked on disk before torch is imported."""

from __future__ import annotations

import json
import os
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.checkpoint.digests import base_digest, tokenizer_digest
from stages.checkpoint.manifest import BaseRef, Manifest, checkpoint_digest, is_checkpoint, locate, read_manifest
from stages.errors import CheckpointError, ModelError
from stages.places import absolute, describe_special
from stages.reading import read_json, read_text
from stages.recipe import damaged_knob

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
ADAPTER_CONFIG = "adapter_config.json"
UNSUPPORTED = (  # keys of adapter_config.json that change what an adapter computes, or on what
    "rank_pattern", "alpha_pattern", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "megatron_config", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config",
)  # fmt: skip
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")


@dataclass(frozen=True)
class ModelRef:
    """A model to start from: the base's folder and, where it is one of our checkpoints, its manifest."""

    name: str  # as the user gave it
    base: Path  # folder with config.json and *.safetensors
    base_name: str  # local path or hub id of the base
    base_digest: str
    tokenizer: Path  # folder to load the tokenizer from
    tokenizer_digest: str
    manifest: Manifest | None
    config: dict  # the base's config.json

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder, None for a plain base."""
        return self.manifest.folder if self.manifest else None

    @property
    def digest(self) -> str:
        """Identifies everything that is loaded: the checkpoint's manifest, or the base's content."""
        return checkpoint_digest(self.folder) if self.folder else f"{self.base_digest}:{self.tokenizer_digest}"

    @property
    def base_ref(self) -> BaseRef:
        """The base as a manifest names it; a hub id is kept without the cache's path."""
        path = str(self.base.resolve()) if Path(self.base_name).exists() else None
        return BaseRef(self.base_name, path, self.base_digest)

    @property
    def context(self) -> int:
        """Positions that the base can attend over; 2^30 where it states no limit."""
        inner = self.config.get("text_config")
        text = inner if isinstance(inner, dict) and inner else self.config
        found = [text[key] for key in CONTEXT_KEYS if isinstance(text.get(key), int) and text[key] > 0]
        return min(found) if found else 2**30


def open_model(name: str, *, stages: tuple[str, ...], what: str, trust_remote_code: bool = False) -> ModelRef:
    """Find what a --model-like flag names and check it; `stages` are the checkpoint kinds accepted.

    Raises ModelError or CheckpointError naming the flag `what`.
    """
    path = absolute(name, what)
    if ".." in path.parts and not path.exists():  # `a/../x` stands where there is no `a`, as for an output
        path = Path(os.path.realpath(path))
    if path.is_dir() and is_checkpoint(path):
        return _open_checkpoint(name, path, stages, what, trust_remote_code)
    special = describe_special(path)
    if special:
        raise ModelError(f"{name} is {special}", where=what, fix="give the model's folder")
    if path.is_file():
        raise ModelError(f"{name} is a file", where=what, fix="give the model's folder")
    if path.is_dir():
        _refuse_lookalikes(path, name, what)
        return _open_base(name, path, str(path), None, what, trust_remote_code)
    if name.startswith((".", "/", "~")) or not HUB_ID.match(name):
        raise ModelError(
            f"{name} does not exist", where=what, fix="give a model folder, a checkpoint folder, or a hub id org/name"
        )
    return _open_base(name, _download(name, what), name, None, what, trust_remote_code)


def _open_checkpoint(name: str, path: Path, stages: tuple[str, ...], what: str, trust_remote_code: bool) -> ModelRef:
    manifest = read_manifest(path)
    if manifest.stage not in stages:
        raise CheckpointError(
            f"{name} is a `{manifest.stage}` checkpoint",
            where=what,
            fix=f"give one of: {', '.join(stages)}" + (", or a base model" if stages != ("reward",) else ""),
        )
    if ADAPTER_CONFIG in manifest.files:
        read_adapter_shape(path)
    located = locate(path, manifest.base)
    base = Path(located) if Path(located).is_dir() else _download(str(located), what)
    source = _open_base(name, base, manifest.base.name, manifest, what, trust_remote_code)
    if source.base_digest != manifest.base.digest:
        raise CheckpointError(
            f"the base model at {base} is not the one that {name} was trained on (its weights differ)",
            where=what,
            fix="put the original base back, or train the checkpoint again on this one",
        )
    return source


class AdapterShape(NamedTuple):
    """What tells one LoRA adapter on the same layers from another."""

    rank: int
    alpha: float
    lora_type: str


def read_adapter_shape(folder: Path) -> AdapterShape:
    """The shape of a checkpoint's adapter, from adapter_config.json. Raises CheckpointError if it is none of ours."""
    place, train_again = folder / ADAPTER_CONFIG, "train the checkpoint again"
    try:
        config = read_json(place)
        rank, alpha = config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{ADAPTER_CONFIG} cannot be read: {why}", where=str(folder), fix=train_again) from None
    wrong = damaged_knob("sft", {"lora_rank": rank, "lora_alpha": alpha})
    if wrong or rank is None or alpha is None:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} cannot be read: r is {reprlib.repr(rank)}, lora_alpha is {reprlib.repr(alpha)}",
            where=str(folder),
            fix=train_again,
        )
    problem = _why_unsupported(config)
    if problem:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} {problem}", where=str(folder), fix="merge that adapter into its base with PEFT"
        )
    lora_type = next((name for name in ("dora", "rslora") if config.get(f"use_{name}")), "lora")
    return AdapterShape(rank, float(alpha), lora_type)


def _why_unsupported(config: dict) -> str:
    """Why an adapter of PEFT cannot be one of several on one frozen base, empty if it can."""
    if config.get("peft_type", "LORA") != "LORA":
        return f"is of peft_type {reprlib.repr(config['peft_type'])}, and only LORA is supported"
    start = config.get("init_lora_weights", True)
    if start not in (True, False, "gaussian"):
        return f"sets init_lora_weights {reprlib.repr(start)}, which may rewrite the base that all roles share"
    heads = config.get("modules_to_save") or []
    if heads and not (heads == ["score"] and config.get("task_type") == "SEQ_CLS"):
        return f"sets modules_to_save {reprlib.repr(heads)}, which replaces parts of the base that all roles share"
    if config.get("bias", "none") != "none":
        return f"sets bias {reprlib.repr(config['bias'])}, which trains parts of the base that all roles share"
    if config.get("use_dora") and config.get("use_rslora"):
        return "sets use_dora and use_rslora together, of which one at a time is supported"
    found = next((name for name in UNSUPPORTED if config.get(name)), None)
    return f"sets {found}, which is not supported" if found else ""


def lora_type_of(config: Any, source: ModelRef) -> str:
    """The kind of adapter that a command has: the checkpoint's own, or the one asked for."""
    if source.manifest is not None and ADAPTER_CONFIG in source.manifest.files:
        return read_adapter_shape(source.folder).lora_type
    return getattr(config, "lora_type", None) or "lora"


def _open_base(
    name: str, base: Path, base_name: str, manifest: Manifest | None, what: str, trust_remote_code: bool
) -> ModelRef:
    _refuse_special_files(base, what)
    config = _read_config(base, what)
    _check_architecture(config, base, what, trust_remote_code)
    tokenizer = manifest.folder if manifest and (manifest.folder / "tokenizer_config.json").exists() else base
    _check_tokenizer(tokenizer, what, trust_remote_code)
    if base_name == str(base) or Path(base_name).exists():
        base_name = os.path.abspath(base_name)
    # A library may write a tokenizer in other words than it read: what counts is the one that training began with.
    same_tokenizer = manifest.tokenizer_digest if manifest else tokenizer_digest(tokenizer)
    return ModelRef(name, base, base_name, base_digest(base), tokenizer, same_tokenizer, manifest, config)


def _refuse_special_files(folder: Path, what: str) -> None:
    """Raise ModelError where a library that reads the folder might wait for ever, or come to nothing."""
    for name in sorted(os.listdir(folder)):
        special = describe_special(folder / name)
        if special and not special.startswith("a link"):  # one that is needed is missed by whoever reads it
            raise ModelError(f"{name} is {special}, not a file", where=f"{what} {folder}", fix="restore the file")


def _read_config(base: Path, what: str) -> dict:
    try:
        config = json.loads(read_text(base / "config.json"))
    except FileNotFoundError:
        raise ModelError(
            f"{base} holds no config.json, so it is no model", where=what, fix="give a folder saved by save_pretrained"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"config.json cannot be read: {error}", where=f"{what} {base}", fix="restore the file"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(
            "config.json names no model_type", where=f"{what} {base}", fix="give a transformers model folder"
        )
    return config


def _check_architecture(config: dict, base: Path, what: str, trust_remote_code: bool) -> None:
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{base} is an encoder-decoder ({config['model_type']})",
            where=what,
            fix="give a decoder-only causal language model",
        )
    quantised = _quantisation(config)
    if quantised is not None:
        raise ModelError(
            f"{base} holds quantised weights ({quantised}), on which adapters are neither trained nor merged",
            where=what,
            fix="give the model in full precision; --load-in-4bit holds it in 4 bits while it is used",
        )
    if trust_remote_code:
        return
    attention = config.get("_attn_implementation") or config.get("attn_implementation")
    if config.get("auto_map"):
        raise _brings_code(base, "auto_map in config.json", what)
    if isinstance(attention, str) and "/" in attention:  # transformers fetches such a kernel from the hub and runs it
        raise _brings_code(base, f"attn_implementation {attention} in config.json", what)


def _quantisation(config: dict) -> str | None:
    """How a base's weights are quantised, by its config.json; None where they are plain."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        how = part.get("quantization_config") or part.get("compression_config")
        if isinstance(how, dict):
            if how.get("quant_method"):
                return str(how["quant_method"])
            return next((name for name in ("load_in_4bit", "load_in_8bit") if how.get(name)), "quantization_config")
    return None


def adapter_beside(base: Path) -> tuple[str, ...]:
    """A warning where a base's folder holds an adapter of PEFT as well, which is never loaded with it."""
    if not (base / "adapter_config.json").exists():
        return ()
    return (
        f"{base} also holds an adapter of PEFT (adapter_config.json), which is left out: only the weights of the base "
        "itself are used; if the adapter is meant, merge it into them first",
    )


def _check_tokenizer(folder: Path, what: str, trust_remote_code: bool) -> None:
    if not any(
        (folder / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    ):
        raise ModelError(f"{folder} has no tokenizer", where=what, fix="save the tokenizer into the model's folder")
    settings = folder / "tokenizer_config.json"
    if trust_remote_code or not settings.exists():
        return
    try:
        content = json.loads(read_text(settings))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"tokenizer_config.json cannot be read: {error}", where=f"{what} {folder}", fix="restore the file"
        ) from None
    if isinstance(content, dict) and content.get("auto_map"):
        raise _brings_code(folder, "auto_map in tokenizer_config.json", what)


def _brings_code(folder: Path, which: str, what: str) -> ModelError:
    return ModelError(
        f"{folder} brings Python code of its own ({which}), which is not run",
        where=what,
        fix="use a model that transformers supports, or pass --trust-remote-code if you trust its author",
    )


def _refuse_lookalikes(path: Path, name: str, what: str) -> None:
    if (path / "run.json").exists() and not (path / "config.json").exists():
        raise CheckpointError(
            f"{name} is an unfinished run",
            where=what,
            fix="run its command again to finish it, or give another checkpoint",
        )
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise CheckpointError(
            f"{name} is a bare adapter without checkpoint.json",
            where=what,
            fix="merge it into its base first, and give that folder",
        )


def _download(name: str, what: str) -> Path:
    """Fetch a hub model's config, tokenizer and safetensors; nothing that could execute."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many kinds; each means the model cannot be had
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} is no local folder, and the hub did not give it: {reason}",
            where=what,
            fix="check the name, or give a local folder",
        ) from None


def same_base(first: ModelRef, second: ModelRef, *, first_flag: str, second_flag: str) -> None:
    """Raise CheckpointError unless two sources share base weights and tokenizer."""
    if first.base_digest != second.base_digest:
        raise CheckpointError(
            f"{first.name} is on base {first.base_name}, {second.name} is on base {second.base_name}; "
            "they cannot share one frozen base",
            where=f"{first_flag}, {second_flag}",
            fix=f"train {second.name} with `rlhf reward --model {first.name}`, or choose checkpoints of one base",
        )
    if first.tokenizer_digest != second.tokenizer_digest:
        raise CheckpointError(
            f"{first.name} and {second.name} have different tokenizers",
            where=f"{first_flag}, {second_flag}",
            fix="choose checkpoints that were trained with one tokenizer",
        )
