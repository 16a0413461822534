"""A LoRA adapter's files, ours or of another tool: what adapter_config.json says, and the header of the weights.

They are data from strangers: checked before torch is imported, and no name in them is imported or run as a pattern.
"""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path

from stages.checkpoint.tensors import shapes_in
from stages.errors import CheckpointError
from stages.models.adapter_files import ADAPTER, ADAPTER_CONFIG, LORA_A, LORA_B, MAGNITUDE, PEFT_PREFIX
from stages.reading import read_json
from stages.recipe import damaged_knob

PICKLED_ADAPTER = "adapter_model.bin"
UNSUPPORTED = (  # keys of adapter_config.json that change what an adapter computes, or on what
    "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens",
    "megatron_config", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
HEADS = ("score", "classifier")  # names under which PEFT saves a sequence classifier's output layer
SCORE = "score.weight"
PATTERNS = {"rank_pattern": "lora_rank", "alpha_pattern": "lora_alpha"}  # and the knob whose bounds their values have
LAYER_NAME = re.compile(r"\^?(?:\w|\\?\.)+\$?")  # a key of a pattern: a layer's name or its end


@dataclass(frozen=True)
class AdapterShape:
    """What distinguishes LoRA adapters on the same layers.

    PEFT can give layers ranks and scales of their own. Here all of them get the largest rank and the scale of the
    config's own `r` and `lora_alpha`, so a layer's B has to be multiplied by its `factors`.
    """

    rank: int
    alpha: float
    lora_type: str
    factors: dict[str, float] = field(default_factory=dict)  # by layer: own scale / common scale, if there are patterns


def read_adapter_shape(folder: Path) -> AdapterShape:
    """The shape of an adapter, from adapter_config.json. Raises CheckpointError if it cannot be used here."""
    config = read_adapter_config(folder)
    lora_type = next((name for name in ("dora", "rslora") if config.get(f"use_{name}")), "lora")
    rank, alpha = config["r"], float(config["lora_alpha"])
    if not any(config.get(name) for name in PATTERNS):
        return AdapterShape(rank, alpha, lora_type)

    def root(number: int) -> float:
        return math.sqrt(number) if lora_type == "rslora" else number

    layers = _expected_layers(folder, config)
    largest = max(own for own, _ in layers.values())
    scale = alpha / root(rank)
    factors = {path: a / root(r) / scale for path, (r, a) in layers.items()}
    return AdapterShape(largest, scale * root(largest), lora_type, factors)


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json, checked; CheckpointError names what is wrong, or what one shared base cannot hold."""
    try:
        config = read_json(folder / ADAPTER_CONFIG)
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        rank, alpha = config["r"], config["lora_alpha"]
        damaged = damaged_knob("sft", {"lora_rank": rank, "lora_alpha": alpha}) or rank is None or alpha is None
        problem = f"r is {reprlib.repr(rank)}, lora_alpha is {reprlib.repr(alpha)}" if damaged else ""
    except KeyError as error:
        problem = f"it has no {error}"
    except (OSError, ValueError, TypeError) as error:
        problem = str(getattr(error, "strerror", None) or error)
    if problem:
        problem, fix = f"cannot be read: {problem}", "copy it again, or train the checkpoint again"
    else:
        problem, fix = _why_unsupported(config), "merge that adapter into its base with PEFT, and give that folder"
    if problem:
        raise CheckpointError(f"{ADAPTER_CONFIG} {problem}", where=str(folder), fix=fix)
    return config


def _why_unsupported(config: dict) -> str:
    """Why an adapter of PEFT cannot be one of several on one frozen base, empty if it can."""
    start, heads = config.get("init_lora_weights", True), config.get("modules_to_save") or []
    is_classifier = isinstance(heads, list) and all(head in HEADS for head in heads) and scores(config)
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
        *((key, not _is_pattern(config.get(key), knob), "of which only layers' names and numbers are read")
          for key, knob in PATTERNS.items()),
    )  # fmt: skip
    return next((f"sets {key} {reprlib.repr(config[key])}, {why}" for key, found, why in problems if found), "")


def scores(config: dict) -> bool:
    """True if this is adapter_config.json of a sequence classifier."""
    return config.get("task_type") == "SEQ_CLS"


def _is_pattern(value: object, knob: str) -> bool:
    """True for layers' names with numbers within a knob's bounds; PEFT would run any regular expression."""
    if not value:
        return True
    return isinstance(value, dict) and all(
        LAYER_NAME.fullmatch(name) and number is not None and not damaged_knob("sft", {knob: number})
        for name, number in value.items()
    )


def _pattern_value(pattern: dict | None, path: str, default: float) -> float:
    """The number that a pattern gives a layer: of its first key that is the layer's name or, without ^, its end."""
    for key, number in (pattern or {}).items():
        name = key.strip("^$").replace("\\", "")
        if path == name or (not key.startswith("^") and path.endswith(f".{name}")):
            return number
    return default


def _expected_layers(folder: Path, config: dict) -> dict[str, tuple[int, float]]:
    """Rank and alpha that adapter_config.json gives every layer of the weights; CheckpointError if they differ."""
    layers = {}
    for path, rank in read_layers(folder, has_score=scores(config)).items():
        expected = _pattern_value(config.get("rank_pattern"), path, config["r"])
        if rank != expected:
            what = f"the weights of {path} have rank {rank}, {ADAPTER_CONFIG} says {expected}"
            raise CheckpointError(what, where=str(folder), fix="use the two files of one adapter")
        layers[path] = (rank, float(_pattern_value(config.get("alpha_pattern"), path, config["lora_alpha"])))
    return layers


def read_layers(folder: Path, *, has_score: bool = False) -> dict[str, int]:
    """The rank of every adapted layer, by its path, from the header of the weights.

    Raises CheckpointError if weights are missing, pickled, damaged, or of anything but LoRA's matrices and, with
    `has_score`, the output layer of a sequence classifier of one label.
    """
    path = folder / ADAPTER
    if not path.exists() and (folder / PICKLED_ADAPTER).exists():
        what = f"its weights are pickled ({PICKLED_ADAPTER}), which can run code when loaded, and are refused"
        raise CheckpointError(what, where=str(folder), fix="save the adapter again, with safe_serialization=True")
    shapes = {name.removeprefix(PEFT_PREFIX): list(shape) for name, shape in shapes_in(path).items()}
    score = shapes.pop(SCORE, []) if has_score else [1]
    if score[:1] != [1]:
        many = f"has {score[0]} labels; a reward model has one, its score" if score else f"lacks {SCORE}"
        raise CheckpointError(f"the classifier {many}", where=str(path), fix="give a classifier with one label")
    layers = {name.removesuffix(LORA_A): shape[0] for name, shape in shapes.items() if name.endswith(LORA_A) and shape}
    for name, shape in shapes.items():
        suffix = next((suffix for suffix in (LORA_A, LORA_B, MAGNITUDE) if name.endswith(suffix)), None)
        rank = layers.get(name.removesuffix(suffix)) if suffix else None
        if rank is None or (suffix == LORA_B and shape[1:] != [rank]):
            what = f"its weights hold {reprlib.repr(name)} {shape}, which is no matrix of LoRA on a linear layer"
            fix = "merge the adapter into its base with PEFT, and give that folder"
            raise CheckpointError(what, where=str(path), fix=fix)
    lacking = [layer for layer in layers if layer + LORA_B not in shapes]
    if lacking or not layers:
        what = f"its weights lack {(lacking[0] if lacking else 'any layer') + LORA_B}"
        raise CheckpointError(what, where=str(path), fix="copy or save the adapter again")
    return layers


def check_adapter(folder: Path, *, policy: bool, scorer: bool) -> tuple[dict, dict[str, int]]:
    """adapter_config.json of a policy's or a classifier's adapter, and its layers' ranks, as `read_layers` has them.

    Raises CheckpointError for one of another kind than is wanted, and unless the two files agree.
    """
    config = read_adapter_config(folder)
    task = config.get("task_type")
    wanted = {None: policy, "CAUSAL_LM": policy, "SEQ_CLS": scorer}
    if not isinstance(task, str | None) or not wanted.get(task):
        tasks = " or ".join(name for name in ("CAUSAL_LM", "SEQ_CLS") if wanted[name])
        what = f"it is an adapter of task_type {reprlib.repr(task)}, which is not what is asked for here"
        raise CheckpointError(what, where=str(folder), fix=f"give an adapter of task_type {tasks}")
    return config, {path: rank for path, (rank, _) in _expected_layers(folder, config).items()}
