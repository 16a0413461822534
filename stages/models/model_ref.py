"""What --model names: a base or one of our checkpoints. Checked on disk before torch is imported."""

from __future__ import annotations

import os
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.checkpoint.digests import base_digest, tokenizer_digest
from stages.checkpoint.manifest import BaseRef, Manifest, checkpoint_digest, is_checkpoint, locate, read_manifest
from stages.data.raw_rows import first_line
from stages.errors import CheckpointError, ModelError
from stages.models.adapter_files import ADAPTER_CONFIG, check_adapter_header
from stages.places import absolute, describe_special
from stages.reading import read_json, read_object
from stages.recipe import damaged_knob

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
UNSUPPORTED = (  # keys of adapter_config.json that change what an adapter computes, or on what
    "rank_pattern", "alpha_pattern", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "megatron_config", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config",
)  # fmt: skip
LOOKALIKES = {  # files of folders that are no model: what such a folder is, and the fix
    "run.json": ("an unfinished run", "run its command again to finish it, or give another checkpoint"),
    ADAPTER_CONFIG: ("a bare adapter without checkpoint.json", "merge it into its base first, and give that folder"),
}
TOKENIZER_CONFIG = "tokenizer_config.json"
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")


@dataclass(frozen=True)
class ModelRef:
    """A model to start from: the base's folder and, if it is one of our checkpoints, its manifest."""

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
        """The digest of everything that is loaded: of the checkpoint's manifest, or of the base's content."""
        return checkpoint_digest(self.folder) if self.folder else f"{self.base_digest}:{self.tokenizer_digest}"

    @property
    def base_ref(self) -> BaseRef:
        """The base as a manifest names it; a hub id is kept without the cache's path."""
        path = str(self.base.resolve()) if Path(self.base_name).exists() else None
        return BaseRef(self.base_name, path, self.base_digest)

    @property
    def context(self) -> int:
        """Positions that the base can attend over; 2^30 if its config states no limit."""
        inner = self.config.get("text_config")
        text = inner if isinstance(inner, dict) and inner else self.config
        limits = [text[key] for key in CONTEXT_KEYS if isinstance(text.get(key), int) and text[key] > 0]
        return min(limits, default=2**30)


def open_model(
    name: str, *, stages: tuple[str, ...], what: str, trust_remote_code: bool = False, weights: bool = True
) -> ModelRef:
    """The model that a --model-like flag names, checked on disk; `stages` are the checkpoint kinds accepted.

    Without `weights` the base may lack them, and digests are left empty. Raises ModelError or CheckpointError naming
    the flag `what`.
    """
    how = {"what": what, "trust_remote_code": trust_remote_code, "weights": weights}
    path = absolute(name, what)
    if ".." in path.parts and not path.exists():  # `a/../x` exists even if `a` does not, as for an output
        path = Path(os.path.realpath(path))
    if path.is_dir() and is_checkpoint(path):
        return _open_checkpoint(name, path, stages, how)
    kind = describe_special(path) or ("a file" if path.is_file() else "")
    if kind:
        raise ModelError(f"{name} is {kind}", where=what, fix="give the model's folder")
    if path.is_dir():
        for file, (kind, fix) in LOOKALIKES.items():
            if (path / file).exists() and not (path / "config.json").exists():
                raise CheckpointError(f"{name} is {kind}", where=what, fix=fix)
        return _open_base(name, path, str(path), None, **how)
    if name.startswith((".", "/", "~")) or not HUB_ID.match(name):
        raise ModelError(
            f"{name} does not exist", where=what, fix="give a model folder, a checkpoint folder, or a hub id org/name"
        )
    return _open_base(name, _download(name, what, weights), name, None, **how)


def _open_checkpoint(name: str, path: Path, stages: tuple[str, ...], how: dict[str, Any]) -> ModelRef:
    manifest, what, weights = read_manifest(path), how["what"], how["weights"]
    if manifest.stage not in stages:
        raise CheckpointError(
            f"{name} is a `{manifest.stage}` checkpoint",
            where=what,
            fix=f"give one of: {', '.join(stages)}" + (", or a base model" if stages != ("reward",) else ""),
        )
    adapters = [path / part for part in ("", "critic") if str(Path(part, ADAPTER_CONFIG)) in manifest.files]
    shapes = {folder: read_adapter_shape(folder) for folder in adapters}
    place = locate(path, manifest.base)
    base = Path(place) if Path(place).is_dir() else _download(str(place), what, weights)
    ref = _open_base(name, base, manifest.base.name, manifest, **how)
    if weights and ref.base_digest != manifest.base.digest:
        raise CheckpointError(
            f"the base model at {base} is not the one that {name} was trained on (its weights differ)",
            where=what,
            fix="put the original base back, or train the checkpoint again on this one",
        )
    for folder, shape in shapes.items():
        check_adapter_header(folder, base, shape.rank, shape.lora_type)
    return ref


class AdapterShape(NamedTuple):
    """What distinguishes LoRA adapters on the same layers."""

    rank: int
    alpha: float
    lora_type: str


def read_adapter_shape(folder: Path) -> AdapterShape:
    """The shape of a checkpoint's adapter, from adapter_config.json. Raises CheckpointError if it is none of ours."""
    try:
        config = read_json(folder / ADAPTER_CONFIG)
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        rank, alpha = config["r"], config["lora_alpha"]
        damaged = damaged_knob("sft", {"lora_rank": rank, "lora_alpha": alpha}) or rank is None or alpha is None
        problem = f"r is {reprlib.repr(rank)}, lora_alpha is {reprlib.repr(alpha)}" if damaged else ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(getattr(error, "strerror", None) or error)
    if problem:
        problem, fix = f"cannot be read: {problem}", "train the checkpoint again"
    else:
        problem, fix = _why_unsupported(config), "merge that adapter into its base with PEFT"
    if problem:
        raise CheckpointError(f"{ADAPTER_CONFIG} {problem}", where=str(folder), fix=fix)
    lora_type = next((name for name in ("dora", "rslora") if config.get(f"use_{name}")), "lora")
    return AdapterShape(rank, float(alpha), lora_type)


def _why_unsupported(config: dict) -> str:
    """Why an adapter of PEFT cannot be one of several on one frozen base, empty if it can."""
    start, heads = config.get("init_lora_weights", True), config.get("modules_to_save") or []
    is_classifier = heads == ["score"] and config.get("task_type") == "SEQ_CLS"
    problems = (
        ("peft_type", config.get("peft_type", "LORA") != "LORA", "of which only LORA is supported"),
        (
            "init_lora_weights",
            start not in (True, False, "gaussian"),
            "which may rewrite the base that all roles share",
        ),
        ("modules_to_save", heads and not is_classifier, "which replaces parts of the base that all roles share"),
        ("bias", config.get("bias", "none") != "none", "which trains parts of the base that all roles share"),
        ("use_dora", config.get("use_dora") and config.get("use_rslora"), "which is not supported with use_rslora"),
        *((key, config.get(key), "which is not supported") for key in UNSUPPORTED),
    )
    return next((f"sets {key} {reprlib.repr(config[key])}, {why}" for key, found, why in problems if found), "")


def lora_type_of(config: Any, ref: ModelRef) -> str:
    """The kind of adapter that a command trains: the checkpoint's, else the one that its config has."""
    if ref.manifest is not None and ADAPTER_CONFIG in ref.manifest.files:
        return read_adapter_shape(ref.folder).lora_type
    return getattr(config, "lora_type", None) or "lora"


def stop_ids_of(ref: ModelRef) -> tuple[int, ...]:
    """Token ids that end generation: the checkpoint's, or those in the base's config files. Raises ModelError."""
    if ref.manifest is not None:
        return tuple(ref.manifest.stop_token_ids)
    stop_ids: set[int] = set()
    for path in (ref.base / "generation_config.json", ref.base / "config.json"):
        ids = _read_object(path, str(ref.base)).get("eos_token_id") if path.exists() else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(number) is int and 0 <= number < 2**31 for number in ids):
            raise ModelError("eos_token_id is no token's number", where=str(path), fix="restore the file")
        stop_ids.update(ids)
    return tuple(sorted(stop_ids))


def _open_base(
    name: str, base: Path, base_name: str, manifest: Manifest | None, what: str, trust_remote_code: bool, weights: bool
) -> ModelRef:
    for file in sorted(os.listdir(base)):  # a library might wait for a pipe for ever
        kind = describe_special(base / file)
        if kind and not kind.startswith("a link"):  # whatever needs a broken link's file will miss it
            raise ModelError(f"{file} is {kind}, not a file", where=f"{what} {base}", fix="restore the file")
    config = _read_config(base, what)
    if not trust_remote_code:
        _refuse_code(base, "config.json", config, what)
    folder = manifest.folder if manifest and (manifest.folder / TOKENIZER_CONFIG).exists() else base
    files = ("tokenizer.json", TOKENIZER_CONFIG, "vocab.json", "tokenizer.model")
    if not any((folder / file).exists() for file in files):
        raise ModelError(f"{folder} has no tokenizer", where=what, fix="save the tokenizer into the model's folder")
    if not trust_remote_code and (folder / TOKENIZER_CONFIG).exists():
        settings = _read_object(folder / TOKENIZER_CONFIG, f"{what} {folder}")
        _refuse_code(folder, TOKENIZER_CONFIG, settings, what)
    if base_name == str(base) or Path(base_name).exists():
        base_name = os.path.abspath(base_name)
    # A library may write a tokenizer in other words than it read, so the digest is that from before training.
    digests = ("", "")
    if weights:
        digests = base_digest(base), manifest.tokenizer_digest if manifest else tokenizer_digest(folder)
    return ModelRef(name, base, base_name, digests[0], folder, digests[1], manifest, config)


def _read_object(path: Path, where: str) -> dict:
    """The JSON object in a model's file. Raises FileNotFoundError, and ModelError if it cannot be read."""
    try:
        return read_object(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}", where=where, fix="restore the file") from None


def _read_config(base: Path, what: str) -> dict:
    """config.json of a decoder in full precision; raises ModelError for anything else."""
    try:
        config = _read_object(base / "config.json", f"{what} {base}")
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


def _refuse_code(folder: Path, file: str, settings: dict, what: str) -> None:
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


def _download(name: str, what: str, weights: bool) -> Path:
    """Fetch a hub model's config, tokenizer and safetensors; nothing that could execute."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES if weights else HUB_FILES[1:]))
    except Exception as error:  # the hub client raises many kinds; each means the model cannot be had
        raise ModelError(
            f"{name} is no local folder, and the hub did not give it: {first_line(error)}",
            where=what,
            fix="check the name, or give a local folder",
        ) from None


def same_base(first: ModelRef, second: ModelRef, *, first_flag: str, second_flag: str) -> None:
    """Raise CheckpointError unless two models share base weights and tokenizer."""
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
