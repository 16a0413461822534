"""What --model names: a base, one of our checkpoints, or a LoRA adapter of another tool.

Checked on disk before torch is imported.
"""

from __future__ import annotations

import hashlib
import os
import reprlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.checkpoint.digests import base_digest, tokenizer_digest
from stages.checkpoint.manifest import BaseRef, Manifest, checkpoint_digest, is_checkpoint, locate, read_manifest
from stages.errors import CheckpointError, ConfigError, ModelError
from stages.models.adapter_config import check_adapter, read_adapter_shape, scores
from stages.models.adapter_files import ADAPTER, ADAPTER_CONFIG, check_adapter_header
from stages.models.base_files import (
    TOKENIZER_CONFIG,
    find_base,
    has_tokenizer,
    read_config,
    read_settings,
    refuse_code,
    refuse_special,
)
from stages.models.classifier_ref import CLASSIFIER, check_classifier, is_classifier
from stages.models.gguf import is_gguf
from stages.places import absolute
from stages.reading import sha256_of, to_json

FOREIGN = "adapter"  # the stage of a LoRA adapter that another tool trained; it is a policy
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")


@dataclass(frozen=True)
class ModelRef:
    """A model to start from: the base's folder and, if it is a checkpoint, its manifest.

    For an adapter of another tool the manifest is made in memory, with the stage FOREIGN or CLASSIFIER.
    """

    name: str  # as the user gave it
    base: Path  # folder with config.json and *.safetensors
    base_name: str  # local path or hub id of the base
    base_digest: str
    tokenizer: Path  # folder to load the tokenizer from
    tokenizer_digest: str
    manifest: Manifest | None
    config: dict  # the base's config.json
    chat_template: str | None = None  # a file that precedes the tokenizer's template

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder, None for a plain base."""
        return self.manifest.folder if self.manifest else None

    @property
    def digest(self) -> str:
        """The digest of everything that is loaded: of the checkpoint's manifest, or of the files' content."""
        content = f"{self.base_digest}:{self.tokenizer_digest}"
        if self.manifest is None:
            return content
        if self.manifest.stage in (FOREIGN, CLASSIFIER):
            return hashlib.sha256(to_json([content, self.manifest.files]).encode()).hexdigest()
        return checkpoint_digest(self.folder)

    @property
    def is_classifier(self) -> bool:
        """True for a sequence classifier, or an adapter of one, which scores texts and writes none."""
        return is_classifier(self.config) if self.manifest is None else self.manifest.stage == CLASSIFIER

    @property
    def base_ref(self) -> BaseRef:
        """The base as a manifest names it; a hub id is kept without the cache's path."""
        path = str(self.base.resolve()) if Path(self.base_name).exists() else None
        return BaseRef(self.base_name, path, self.base_digest)

    @property
    def loadable_name(self) -> str:
        """The base as other tools load it: its name, but the folder of a GGUF file."""
        return str(self.base) if is_gguf(Path(self.base_name)) else self.base_name

    @property
    def context(self) -> int:
        """Positions that the base can attend over; 2^30 if its config states no limit."""
        inner = self.config.get("text_config")
        text = inner if isinstance(inner, dict) and inner else self.config
        limits = [text[key] for key in CONTEXT_KEYS if isinstance(text.get(key), int) and text[key] > 0]
        return min(limits, default=2**30)


def open_model(
    name: str,
    *,
    stages: tuple[str, ...],
    what: str,
    trust_remote_code: bool = False,
    base: str | None = None,
    weights: bool = True,
) -> ModelRef:
    """The model that a --model-like flag names, checked on disk; `stages` are the checkpoint kinds accepted.

    `base` (--base) names the base of an adapter or checkpoint in place of the one that it names itself. Without
    `weights` the base may lack them, and digests are left empty. Raises ModelError or CheckpointError naming the flag
    `what`.
    """
    how = {"what": what, "trust_remote_code": trust_remote_code, "weights": weights}
    path = absolute(name, what)
    if ".." in path.parts and not path.exists():  # `a/../x` exists even if `a` does not, as for an output
        path = Path(os.path.realpath(path))
    if path.is_dir() and is_checkpoint(path):
        return _open_checkpoint(name, path, stages, base, how)
    place, label = find_base(name, what, weights)
    if (place / "run.json").exists() and not (place / "config.json").exists():
        fix = "run its command again to finish it, or give another checkpoint"
        raise CheckpointError(f"{name} is an unfinished run", where=what, fix=fix)
    if is_adapter(place):
        return _open_adapter(name, place, stages, base, how)
    if CLASSIFIER in stages and is_classifier(config := read_config(place, what)):
        check_classifier(name, config, what)
    if base is not None and what == "--model":
        fix = "leave --base out, or give an adapter as --model"
        raise ModelError(f"{name} is a base itself", where="--base", fix=fix)
    return _open_base(name, place, label, **how)


def _open_checkpoint(name: str, path: Path, stages: tuple[str, ...], base: str | None, how: dict[str, Any]) -> ModelRef:
    manifest, what, weights = read_manifest(path), how["what"], how["weights"]
    if manifest.stage not in stages:
        raise CheckpointError(
            f"{name} is a `{manifest.stage}` checkpoint",
            where=what,
            fix=f"give one of: {', '.join(stages)}" + (", or a base model" if stages != ("reward",) else ""),
        )
    adapters = [path / part for part in ("", "critic") if str(Path(part, ADAPTER_CONFIG)) in manifest.files]
    shapes = {folder: read_adapter_shape(folder) for folder in adapters}
    if base is None:
        again = is_gguf(Path(manifest.base.name))
        located = manifest.base.name if again else str(locate(path, manifest.base))
        place, label = find_base(located, what, weights)[0], manifest.base.name
    else:
        place, label = find_base(base, "--base", weights)
    ref = _open_base(name, place, label, **how, owner=path)
    if weights and ref.base_digest != manifest.base.digest:
        raise CheckpointError(
            f"the base model at {place} is not the one that {name} was trained on (its weights differ)",
            where=what,
            fix="put the original base back, or train the checkpoint again on this one",
        )
    for folder, shape in shapes.items() if weights else ():
        check_adapter_header(folder, place, shape.rank, shape.lora_type)
    # A library may write a tokenizer in other words than it read, so the digest is that from before training.
    return replace(ref, manifest=manifest, tokenizer_digest=manifest.tokenizer_digest)


def is_adapter(folder: Path) -> bool:
    """True for a folder with an adapter of PEFT and no whole base; some tools copy the base's config.json."""
    others = {path.name for path in folder.glob("*.safetensors")} - {ADAPTER}
    return (folder / ADAPTER_CONFIG).exists() and not (others and (folder / "config.json").exists())


def _open_adapter(name: str, folder: Path, stages: tuple[str, ...], base: str | None, how: dict[str, Any]) -> ModelRef:
    """A LoRA adapter of another tool, as a policy or a classifier. Code of a base runs only if the user names it."""
    what, weights = how["what"], how["weights"]
    if FOREIGN not in stages and CLASSIFIER not in stages:
        kinds = f"give {' or '.join(stages)}" if stages else "give a base model"
        raise CheckpointError(f"{name} is a LoRA adapter of another tool, which is a policy", where=what, fix=kinds)
    refuse_special(folder, what)
    if (folder / "head.safetensors").exists():  # without it, scores would lack their bias
        problem = f"{name} is a reward checkpoint without its checkpoint.json"
        raise CheckpointError(problem, where=what, fix="copy the whole folder again")
    adapter, ranks = check_adapter(folder, policy=FOREIGN in stages, scorer=CLASSIFIER in stages)
    stage, stated = CLASSIFIER if scores(adapter) else FOREIGN, adapter.get("base_model_name_or_path")
    place, label = find_base(base, "--base", weights) if base else _base_of_adapter(name, stated, what, weights)
    if is_checkpoint(place) or is_adapter(place):
        kind = f"the base of {name}, {label}, is an adapter itself"
        raise ModelError(kind, where=what, fix="give the base under both as --base, if it was merged into that")
    trusted = how["trust_remote_code"] and base is not None
    ref = _open_base(name, place, label, what, trusted, weights, owner=folder)
    if weights:
        check_adapter_header(folder, place, ranks, read_adapter_shape(folder).lora_type)
    template = folder / "chat_template.jinja"
    stops, files = stop_ids_of(ref), {file: sha256_of(folder / file) for file in (ADAPTER_CONFIG, ADAPTER)}
    manifest = Manifest(
        stage=stage, base=ref.base_ref, parents=(), tokenizer_digest=ref.tokenizer_digest, stop_token_ids=stops,
        config={}, datasets={}, metrics={}, throughput={}, versions={}, device="", dtype="", steps=0, seconds=0.0,
        files=files, folder=folder,
    )  # fmt: skip
    alone = str(template) if template.is_file() and ref.tokenizer != folder else None
    return replace(ref, manifest=manifest, chat_template=alone)


def _base_of_adapter(name: str, stated: object, what: str, weights: bool) -> tuple[Path, str]:
    """The base that adapter_config.json names: a path, as seen from here, or a hub id. Raises ModelError."""
    fix = "give the base's folder or hub id as --base"
    if not isinstance(stated, str) or not stated or not stated.isprintable():
        shown = reprlib.repr(stated)
        problem = f"{ADAPTER_CONFIG} of {name} names no base (base_model_name_or_path {shown})"
        raise ModelError(problem, where=what, fix=fix)
    try:
        return find_base(stated, what, weights)
    except (ModelError, ConfigError, OSError) as error:
        reason = getattr(error, "what", None) or error.strerror
        problem = f"the base of {name} (base_model_name_or_path in {ADAPTER_CONFIG}) cannot be had: {reason}"
        raise ModelError(problem, where=what, fix=fix) from None


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
        ids = read_settings(path, str(ref.base)).get("eos_token_id") if path.exists() else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(number) is int and 0 <= number < 2**31 for number in ids):
            raise ModelError("eos_token_id is no token's number", where=str(path), fix="restore the file")
        stop_ids.update(ids)
    return tuple(sorted(stop_ids))


def _open_base(
    name: str,
    base: Path,
    base_name: str,
    what: str,
    trust_remote_code: bool,
    weights: bool,
    owner: Path | None = None,
) -> ModelRef:
    """A base in its folder; the tokenizer in the folder of a checkpoint, `owner`, precedes its own."""
    refuse_special(base, what)
    config = read_config(base, what)
    if not trust_remote_code:
        refuse_code(base, "config.json", config, what)
    folder = owner if owner and (owner / TOKENIZER_CONFIG).exists() and has_tokenizer(owner) else base
    if not has_tokenizer(folder) and not (folder / TOKENIZER_CONFIG).exists():
        raise ModelError(f"{folder} has no tokenizer", where=what, fix="save the tokenizer into the model's folder")
    if not trust_remote_code and (folder / TOKENIZER_CONFIG).exists():
        settings = read_settings(folder / TOKENIZER_CONFIG, f"{what} {folder}")
        refuse_code(folder, TOKENIZER_CONFIG, settings, what)
    if base_name == str(base) or Path(base_name).exists():
        base_name = os.path.abspath(base_name)
    digests = (base_digest(base), tokenizer_digest(folder)) if weights else ("", "")
    return ModelRef(name, base, base_name, digests[0], folder, digests[1], None, config)


def same_base(first: ModelRef, second: ModelRef, *, first_flag: str, second_flag: str) -> None:
    """Raise CheckpointError unless two models share base weights and tokenizer."""
    if first.base_digest != second.base_digest:
        raise CheckpointError(
            f"{first.name} is on base {first.base_name}, {second.name} is on base {second.base_name}; "
            "they cannot share one frozen base",
            where=f"{first_flag}, {second_flag}",
            fix=f"train {second.name} with `rlhf reward --model {first.name}`, or choose checkpoints of one base; "
            "a reward model that `rlhf export` wrote goes with any policy",
        )
    if first.tokenizer_digest != second.tokenizer_digest:
        raise CheckpointError(
            f"{first.name} and {second.name} have different tokenizers",
            where=f"{first_flag}, {second_flag}",
            fix="choose checkpoints that were trained with one tokenizer",
        )
