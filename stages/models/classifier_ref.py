"""Sequence classifiers of one label as reward models: what their config.json must say. Imports no torch."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from stages.errors import ModelError

CLASSIFIER = "classifier"  # what stands for a stage's name where checkpoints have one
SCORE_BIAS = "score_bias"  # key of config.json by which `rlhf export` adds what a classifier's output layer cannot hold
ANOTHER = "give a sequence classifier of transformers with one label"


def is_classifier(config: dict) -> bool:
    """True if config.json names a model that scores whole texts."""
    named = config.get("architectures")
    names = named if isinstance(named, list) else []
    return any(isinstance(n, str) and n.endswith(("ForSequenceClassification", "RewardModel")) for n in names)


def check_classifier(name: str, config: dict, what: str) -> None:
    """Raise ModelError unless a classifier's config.json has one label and no Python code of its own."""
    if config.get("auto_map"):
        code = f"{name} brings Python code of its own (auto_map in config.json), which is never run in a reward model"
        raise ModelError(code, where=what, fix=ANOTHER)
    classes = [n for n in config["architectures"] if isinstance(n, str)]
    if not any(n.endswith("ForSequenceClassification") for n in classes):
        raise ModelError(f"{name} is a {classes[0]}, which transformers does not have", where=what, fix=ANOTHER)
    labels = _count_labels(config)
    if labels != 1:
        many = f"{labels} labels" if labels else "no label"
        raise ModelError(f"{name} has {many}; a reward model has one, its score", where=what, fix=ANOTHER)
    score_bias_of(config, what)


def _count_labels(config: dict) -> int:
    """The labels of a classifier, as transformers counts them: two if config.json does not say."""
    labels: Any = config.get("id2label")
    if isinstance(labels, dict):
        return len(labels)
    number = config.get("num_labels")
    return number if type(number) is int and number >= 0 else 2


def score_bias_of(config: dict, what: str) -> float | None:
    """What an exported reward model adds to its logit; None for a classifier of another tool."""
    bias = config.get(SCORE_BIAS)
    if bias is None:
        return None
    if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
        problem = f"{SCORE_BIAS} in its config.json is {reprlib.repr(bias)}, no number"
        raise ModelError(problem, where=what, fix="export the reward model again")
    return float(bias)
