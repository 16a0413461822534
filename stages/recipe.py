"""Makes a config of recipe and flags: YAML, types, bounds, and precedence default < recipe < flag. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import typing
from pathlib import Path

from stages.config import AUTO, REMOVED
from stages.errors import ConfigError
from stages.knobs import REQUIRED, Knob, as_dict, default_of, knobs
from stages.measuring_config import STAGES
from stages.places import absolute, split_paths
from stages.reading import read_bytes

NONE = "none"
LARGEST = 10**12  # whole number for a knob without a bound; floats represent it exactly
OFF = {"gamma": 1.0, "top_p": 1.0}  # values that turn a knob off, if not 0
Recipe = dict[str, tuple[object, str]]  # knob: (value, "file:line")


def read_recipe(path: str | Path, cls: type) -> Recipe:
    """Read a YAML recipe with the safe loader.

    Raises ConfigError for a missing or malformed file, a tag, a repeated or an unknown key (naming the nearest).
    """
    import yaml

    text = _read_recipe_text(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) if node is not None else {}
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # All but YAMLError come from values that do not fit their tag (`!!bool x`).
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        problem = problem if isinstance(error, yaml.YAMLError) else f"a value cannot be read ({problem})"
        raise ConfigError(
            f"not valid YAML: {problem}", where=f"{path}{line}", fix="write plain `key: value` lines"
        ) from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise ConfigError("a recipe is a mapping of knobs to values", where=str(path), fix="write `key: value` lines")
    recipe: Recipe = {}
    for key_node, _ in node.value:
        name, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if name in recipe:
            raise ConfigError(f"`{name}` is given twice", where=where, fix="keep one of the two lines")
        if removal_of(name, cls) and values[name] == getattr(cls, name.replace("-", "_")):
            continue  # as config.yaml of an earlier rlhf has it
        if name not in knobs(cls):
            raise ConfigError(f"unknown knob `{name}`", where=where, fix=suggest(name, cls))
        recipe[name] = (values[name], where)
    return recipe


def _read_recipe_text(path: str | Path) -> str:
    try:
        return read_bytes(absolute(path, "--config")).decode("utf-8-sig")
    except OSError as error:
        what = f"cannot read the recipe: {error.strerror or error}"
        raise ConfigError(what, where=str(path), fix="give --config an existing .yaml file") from None
    except UnicodeDecodeError:
        raise ConfigError("the recipe is not UTF-8 text", where=str(path), fix="save it as UTF-8") from None


def suggest(name: str, cls: type) -> str:
    """Advice for an unknown knob: why it was removed, or the nearest existing name."""
    if advice := advice_on(name, cls):
        return advice
    near = difflib.get_close_matches(name.replace("-", "_"), knobs(cls), n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else "see --help-all for the knobs of this stage"


def advice_on(name: str, cls: type | None) -> str:
    """What to do about a knob that was removed, or that only another command has; "" for any other name."""
    if name.replace("-", "_").startswith("judge") and cls is not None and not hasattr(cls, "judge"):
        return "leave it out; a judge compares policies in `rlhf evaluate`, and is never a training reward"
    return removal_of(name, cls)


def removal_of(name: str, cls: type | None) -> str:
    """What replaces a removed knob of `cls`; "" for any other name."""
    former = name.replace("-", "_")
    if former not in REMOVED or not hasattr(cls, former):
        return ""
    return f"leave it out; it was removed: {REMOVED[former].format(getattr(cls, former))}"


def resolve(cls: type, recipe: Recipe, flags: dict[str, object]) -> typing.Any:
    """Build a config of `cls` from defaults, recipe values and flags (a flag that is None was not given).

    Raises ConfigError, with the flag or the recipe line, for a value that is missing, of a wrong type, out of bounds,
    in conflict with another one or without effect.
    """
    values: dict[str, object] = {}
    origin: dict[str, str] = {}
    for name, (f, about, kind) in knobs(cls).items():
        flag = "--" + name.replace("_", "-")
        if flags.get(name) is not None:
            raw, origin[name] = flags[name], flag
        elif name in recipe:
            raw, origin[name] = recipe[name][0], f"{recipe[name][1]}: {name}"
        elif default_of(f) is REQUIRED:
            raise ConfigError(f"{flag} is required", where=flag, fix=about.help)
        else:
            values[name] = default_of(f)
            continue
        if raw == AUTO and about.auto and type(None) in typing.get_args(kind):
            raw = None
        if raw is None and typing.get_origin(kind) in (list, dict):
            raw = default_of(f)
        values[name] = parse(raw, kind, origin[name])
        if kind == list[str]:
            values[name] = split_list(values[name], about)
        check_characters(values[name], origin[name])
        check_bounds(values[name], about, origin[name])
    config = cls(**values)
    for name, what, fix in config.conflicts():
        raise ConfigError(what, where=origin.get(name, name), fix=fix)
    check_idle(config, origin, {name for name in origin if flags.get(name) is not None})
    return config


def check_idle(config: typing.Any, origin: dict[str, str], flags: set[str]) -> None:
    """Raise ConfigError for a knob that was given and has no effect because of other knobs.

    A recipe may have the default of any knob, as a checkpoint's config.yaml does, and a knob that has no effect only
    because of a flag: recipes are shared, and flags win over them. A flag may turn off a knob that is already off.
    """
    default = {name: default_of(f) for name, (f, _, _) in knobs(type(config)).items()}
    recipe = dataclasses.replace(config, **{n: default[n] for n in flags if default[n] is not REQUIRED})
    idle_in_recipe = {name for names, _, _ in recipe.idle() for name in names}
    for names, why, fix in config.idle():
        for name in names:
            value = getattr(config, name)
            changed = value != default[name]
            off = not value or value == OFF.get(name)
            in_recipe = name in origin and name in idle_in_recipe
            if (changed or not off) if name in flags else (changed and in_recipe):
                what = f"{name} has no effect because {why}"
                raise ConfigError(what, where=origin[name], fix=f"leave it out, or {fix}")


# --- values


def parse(raw: object, kind: object, where: str) -> object:
    """A recipe or flag value in the knob's type: `3e-4` is a number, `64.0` a whole number, `yes` is no boolean."""
    options = (typing.get_args(kind) if typing.get_origin(kind) not in (list, dict) else ()) or (kind,)
    if raw is None or (isinstance(raw, str) and raw.lower() in ("null", "none") and type(None) in options):
        if type(None) in options:
            return None
        raise ConfigError("a value is missing", where=where, fix=f"give {describe(kind)}")
    for option in options:
        try:
            return _parse_one(raw, option)
        except (TypeError, ValueError, LookupError, OverflowError):
            continue
    raise ConfigError(f"{reprlib.repr(raw)} is not {describe(kind)}", where=where, fix=f"give {describe(kind)}")


def _parse_one(raw: object, kind: object) -> object:
    """A value as `kind`. Raises TypeError, ValueError, LookupError or OverflowError if it is not one."""
    if typing.get_origin(kind) is dict:
        return _parse_pairs(raw)
    if typing.get_origin(kind) is list:
        return _parse_list(raw, int if kind == list[int] else str)
    if kind is bool:
        return {"true": True, "false": False}[str(raw).lower()]
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        raise TypeError
    if kind is int:
        number = float(raw) if isinstance(raw, str) else raw
        if number != int(number):
            raise ValueError
        return int(raw) if not isinstance(raw, float) and str(raw).lstrip("+-").isdigit() else int(number)
    if kind is float and math.isfinite(float(raw)):
        return float(raw)
    if kind is str and str(raw).strip():
        return str(raw)
    raise ValueError


def _parse_list(raw: object, kind: type) -> list:
    """Whole numbers: `1,2,4`, one number, or a list of either. Texts: one or a list; `split_list` splits them."""
    items = list(raw) if isinstance(raw, (list, tuple)) else [raw]
    if kind is int:
        parts = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
        return [_parse_one(part, int) for part in parts]
    if not isinstance(raw, (str, list, tuple)) or any(type(item) not in (str, int, float) for item in items):
        raise TypeError
    return [str(item) for item in items]


def _parse_pairs(raw: object) -> dict[str, str]:
    if isinstance(raw, dict):
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in raw.items()):
            raise TypeError
        return dict(raw)
    if not isinstance(raw, str):
        raise TypeError
    pairs = [part.split("=") for part in raw.split(",") if part.strip()]
    if any(len(pair) != 2 or not pair[0].strip() or not pair[1].strip() for pair in pairs):
        raise ValueError
    if len({pair[0].strip() for pair in pairs}) < len(pairs):
        raise ValueError  # one name has two columns
    return {name.strip(): column.strip() for name, column in pairs}


def split_list(texts: list[str], about: Knob) -> list[str]:
    """The items of a list knob without repetitions; `a,b` is two items.

    A path that contains a comma is one item if it exists. `none` alone is the empty list.
    """
    if about.paths:
        return [item for text in texts for item in split_paths(text)]
    names = list(dict.fromkeys(word.strip() for text in texts for word in text.split(",") if word.strip()))
    return [] if about.choices and names == [NONE] else names


def check_characters(value: object, where: str) -> None:
    """Raise ConfigError for a text with a NUL or that is not UTF-8, which no manifest can store."""
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    for text in parts if isinstance(parts, list) else [parts]:
        if isinstance(text, str) and ("\0" in text or re.search("[\ud800-\udfff]", text)):
            what = f"{reprlib.repr(text)} contains a NUL or is not valid UTF-8"
            raise ConfigError(what, where=where, fix="remove that character; names of files must be UTF-8")


def check_bounds(value: object, about: Knob, where: str) -> None:
    """Raise ConfigError if a value, or an item of a list, lies outside its knob's bounds or choices."""
    if isinstance(value, list):
        if about.choices and NONE in value:
            fix = f"give {NONE}, or the conditions to stop on"
            raise ConfigError(f"`{NONE}` cannot be combined with other conditions", where=where, fix=fix)
        choices = (*about.choices, NONE) if about.choices else ()
        for item in value:
            check_bounds(item, dataclasses.replace(about, choices=choices), where)
        return
    named = str(value).lower() if isinstance(value, bool) else value
    if about.choices and value is not None and named not in about.choices:
        near = difflib.get_close_matches(str(value), about.choices, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        fix = f"choose from {', '.join(about.choices)}{hint}"
        raise ConfigError(f"`{value}` is not a choice", where=where, fix=fix)
    if isinstance(value, str) and (about.low is not None or about.above is not None) and value != AUTO:
        raise ConfigError(f"`{value}` is neither a number nor `auto`", where=where, fix="give a whole number, or auto")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    high = LARGEST if about.high is None and isinstance(value, int) else about.high
    shown = reprlib.repr(value) if isinstance(value, int) else value
    if about.low is not None and value < about.low:
        raise ConfigError(f"{shown} is too small", where=where, fix=f"the smallest value is {_plain(about.low)}")
    if about.above is not None and value <= about.above:
        raise ConfigError(f"{shown} is too small", where=where, fix=f"give a number above {_plain(about.above)}")
    if high is not None and value > high:
        raise ConfigError(f"{shown} is too large", where=where, fix=f"the largest value is {_plain(high)}")


def describe(kind: object) -> str:
    """A type in words, for messages."""
    if kind == list[int]:
        return "a list of whole numbers, such as 1,2,4"
    if typing.get_origin(kind) is list:
        return "a list of texts"
    if typing.get_origin(kind) is dict:
        return "name=column,name=column"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text that is not empty"}
    return " or ".join(names.get(option, "null") for option in typing.get_args(kind) or (kind,))


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


# --- stored configs


def damaged_knob(stage: str, stored: dict[str, typing.Any]) -> str:
    """The first knob of a stored config with a value that no version accepts; "" if there is none.

    Unknown knobs and choices are ignored, since other versions may have them.
    """
    for name, (_, about, kind) in knobs(STAGES[stage]).items() if stage in STAGES else ():
        if name not in stored:
            continue
        try:
            if not is_stored(stored[name], kind):
                return name
            check_bounds(stored[name], dataclasses.replace(about, choices=()), name)
        except ConfigError:
            return name
    return ""


def is_stored(value: object, kind: object) -> bool:
    """True for a value of a type as it is read from JSON: tuples as lists, dataclasses as objects."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (list, tuple):
        return isinstance(value, list) and all(is_stored(item, arguments[0]) for item in value)
    if typing.get_origin(kind) is dict:
        anything = arguments[1] is object
        return isinstance(value, dict) and (anything or all(is_stored(v, arguments[1]) for v in value.values()))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return isinstance(value, dict) and all(is_stored(value.get(name), hint) for name, hint in hints.items())
    options = arguments or (kind,)
    if isinstance(value, float):
        return float in options and math.isfinite(value)
    return type(value) in options or (type(value) is int and float in options and abs(value) <= LARGEST)


def differing(config: object, other: dict[str, object]) -> list[str]:
    """Names of the knobs that affect results and differ between a config and a stored one.

    A removed knob differs if its stored value is not its fixed value, and a knob that the stored config does not have,
    because it is newer, if its value is not its default.
    """
    newer = {name: default_of(f) for name, (f, _, _) in knobs(type(config)).items() if name not in other}
    other = {name: value for name, value in newer.items() if value is not REQUIRED} | other
    fixed = {name: getattr(config, name) for name in REMOVED.keys() & other.keys() if hasattr(config, name)}
    values = fixed | as_dict(config)
    free = {name for name, (_, about, _) in knobs(type(config)).items() if about.may_change_on_resume}
    return sorted(n for n in (values.keys() | other.keys()) - free if values.get(n) != other.get(n))
