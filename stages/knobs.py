"""What a knob is: a dataclass field that carries its help, panel and bounds. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass, field, fields

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Knob:
    """A knob's properties, except its name, type and default."""

    help: str
    panel: str
    low: float | None = None  # smallest value allowed
    above: float | None = None  # value must be strictly greater
    high: float | None = None  # largest value allowed
    choices: tuple[str, ...] = ()
    auto: str = ""  # what `null`/"auto" means, for --help
    may_change_on_resume: bool = False  # True: does not change the result, so it may differ when a run is resumed
    paths: bool = False  # True for a list of files and folders, whose names may hold commas


def knob(default: object, help: str, panel: str, **about: object) -> typing.Any:
    """A dataclass field that carries its `Knob`; `default` may be `dataclasses.MISSING` for a required one."""
    metadata = {"knob": Knob(help=help, panel=panel, **about)}  # type: ignore[arg-type]
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@functools.cache
def knobs(cls: type) -> dict[str, tuple[dataclasses.Field, Knob, object]]:
    """Field, `Knob` and type of every knob of a config class, in declaration order."""
    hints = typing.get_type_hints(cls)
    return {f.name: (f, f.metadata["knob"], hints[f.name]) for f in fields(cls)}


def default_of(f: dataclasses.Field) -> object:
    """A field's default, or `REQUIRED`."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def as_dict(config: object) -> dict[str, object]:
    """Every knob of a config by name, ready for YAML or JSON."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]
