"""What --reward names, opened and checked before torch is imported: checkpoints, Python functions, built-in ones."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import itertools
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from stages.builtin import catalogue
from stages.builtin.catalogue import Builtin, open_builtin, short_name
from stages.checkpoint.digests import file_digest
from stages.data.rows import Prompt
from stages.errors import ConfigError, RewardError, StopRequested, words_of
from stages.models.candidates import SCORERS
from stages.models.model_ref import ModelRef, open_model, same_base
from stages.places import BUILTIN, absolute, describe_special, is_function
from stages.rollout.settings import ImportChanges, recording_changes
from stages.rollout.user_code import user_code
from stages.training.signals import Signals

if TYPE_CHECKING:
    from stages.models.classifier_text import ClassifierText


@dataclass(frozen=True)
class RewardSpec:
    """A --reward flag: a checkpoint, a sequence classifier, a function in a file or a built-in one, and its weight."""

    name: str
    weight: float
    checkpoint: ModelRef | None
    function: Callable[..., object] | None
    digest: str  # of the checkpoint or classifier, or of the function's file
    flag: str = "--reward"  # that names it
    builtin: Builtin | None = None
    classifier: ModelRef | None = None

    @functools.cached_property
    def reader(self) -> ClassifierText:
        """How the classifier reads texts. Imports torch."""
        from stages.models.classifier_text import ClassifierText

        return ClassifierText(self.classifier)


def parse_reward(flag: str, what: str = "--reward") -> tuple[str, float]:
    """Name and weight of `source=weight`; the weight is 1 if none is given."""
    name, equals, weight = flag.rpartition("=")
    if not equals:
        return flag, 1.0
    try:
        number = float(weight)
    except ValueError:
        return flag, 1.0  # an '=' that belongs to a path
    if not math.isfinite(number) or not name:
        raise ConfigError(f"`{flag}` has no finite weight", where=what, fix="write source=0.5")
    return name, number


def open_rewards(
    flags: list[str], policy: ModelRef | None, *, what: str = "--reward", trust_remote_code: bool = False
) -> list[RewardSpec]:
    """Every reward source, checked before a model loads.

    Raises CheckpointError if a reward checkpoint does not share the policy's base, RewardError if a function cannot be
    loaded.
    """
    specs = []
    for flag in flags:
        name, weight = parse_reward(flag, what)
        if is_function(name):
            function = load_function(name, what)
            specs.append(RewardSpec(name, weight, None, function, file_digest(python_file(name)), what))
            continue
        if name.startswith(BUILTIN):
            digest = hashlib.sha256(f"{name} {catalogue.VERSION}".encode()).hexdigest()
            specs.append(RewardSpec(name, weight, None, None, digest, what, open_builtin(name, what)))
            continue
        if re.match(r"https?://", name):
            reason = "a judge's verdicts are never a training reward, nor scores"
            fix = "compare policies with it: rlhf evaluate --judge URL --judge-model NAME --against CHECKPOINT"
            raise RewardError(f"{name} is the address of a service; {reason}", where=what, fix=fix)
        source = open_model(name, stages=SCORERS, what=what, trust_remote_code=trust_remote_code)
        if source.is_classifier:
            specs.append(RewardSpec(name, weight, None, None, source.digest, what, classifier=source))
            continue
        if source.manifest is None:
            raise RewardError(
                f"{name} is a base model, not a reward source",
                where=what,
                fix="give a checkpoint of `rlhf reward`, a classifier of one label, file.py:function, or builtin:NAME",
            )
        if policy is not None:
            same_base(policy, source, first_flag="--model", second_flag=what)
        specs.append(RewardSpec(name, weight, source, None, source.digest, what))
    return specs


def check_columns(specs: list[RewardSpec], row: Prompt) -> None:
    """Raise DatasetError, with the field, unless a row has the columns that the built-in functions need."""
    for spec in specs:
        if spec.builtin is not None:
            spec.builtin.check(row.columns, row.where, spec.flag)


def source_names(specs: list[RewardSpec]) -> list[str]:
    """A short name for each source, all different, for the names of metrics."""
    names: list[str] = []
    for spec in specs:
        short = short_name(spec.name)
        numbered = (f"{short}_{number}" if number > 1 else short for number in itertools.count(1))
        names.append(next(name for name in numbered if name not in names))
    return names


def python_file(name: str) -> Path:
    """The file of a function source."""
    return Path(os.path.expanduser(name if name.endswith(".py") else name[: name.rindex(".py:") + 3]))


class UserFunction:
    """A function from a user's file, which runs with the settings of the process that importing the file changed."""

    def __init__(self, function: Callable[..., object], imported: ImportChanges):
        functools.update_wrapper(self, function)  # so that its signature is the function's
        self.imported = imported

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the function itself."""
        return self.__wrapped__(*args, **kwargs)


def load_function(name: str, what: str) -> UserFunction:
    """Import `path/to/file.py:function` (function `score` if none is named); raises RewardError if that fails."""
    path = python_file(name)
    function_name = ("" if name.endswith(".py") else name.rpartition(":")[2]) or "score"
    place, where = absolute(path, what), f"{what} {name}"
    if not place.is_file():
        special = describe_special(place)
        state = "is a folder" if place.is_dir() else f"is {special}" if special else "does not exist"
        raise RewardError(f"{path} {state}", where=what, fix="give path/to/file.py:function")
    imported = ImportChanges()
    try:
        with user_code(where, Signals()), recording_changes(imported):
            module = _import(path)
            function = getattr(module, function_name, None)
    except StopRequested:
        raise
    except BaseException as error:
        raise RewardError(f"importing it failed: {reason_of(error, path)}", where=where, fix="fix the file") from None
    if not callable(function):
        names = [n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")]
        fix = f"name a function that it has: {', '.join(names)}" if names else "define the function in it"
        raise RewardError(f"{path} has no function `{function_name}`", where=what, fix=fix)
    return UserFunction(function, imported)


def _import(path: Path) -> ModuleType:
    """The module of a file, with the file's folder first on the path."""
    spec = importlib.util.spec_from_file_location(_module_name(path), absolute(path, "--reward"))
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    return module


def _module_name(path: Path) -> str:
    """The file's own name, by which its worker processes can import it, unless another module has that name."""
    name = path.stem
    if name.isidentifier() and name not in sys.modules:
        other = importlib.util.find_spec(name)
        if other is None or (other.origin and Path(other.origin).resolve() == path.resolve()):
            return name
    names = (f"rlhf_reward_{name}{number or ''}" for number in itertools.count())
    return next(name for name in names if name not in sys.modules)


def reason_of(error: BaseException, path: Path) -> str:
    """An exception in one line: its type, its text, and the line of the user's file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == path.name]
    line = f" ({path}:{lines[-1]})" if lines else ""
    words = words_of(error)
    return f"{type(error).__name__}{': ' if words else ''}{words}{line}"
