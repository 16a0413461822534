"""Plain files read whole, as bytes, text, JSON or a digest; and JSON as it is written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import typing
from pathlib import Path

from stages.places import describe_special

DEEPEST = 100  # levels of objects and lists in JSON


def read_bytes(path: str | Path) -> bytes:
    """A plain file's content. Raises OSError, also for a pipe, a socket or a device, which might never end."""
    _check_plain(path)
    return Path(path).read_bytes()


def read_text(path: str | Path) -> str:
    """A plain file's UTF-8 text. Raises OSError as `read_bytes` does, and UnicodeDecodeError."""
    return read_bytes(path).decode("utf-8")


def read_json(path: str | Path) -> typing.Any:
    """JSON as this tool writes it, from a plain file. Raises OSError, and ValueError in words.

    NaN, infinities and values nested too deeply for whoever goes through them are none of it.
    """
    try:
        value = json.loads(read_text(path), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def sha256_of(path: str | Path) -> str:
    """sha256 of a plain file's content, in hex; raises OSError as it comes."""
    _check_plain(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: object, indent: int | None = None) -> str:
    """JSON text that every reader takes: NaN and infinities become null, and it always encodes to UTF-8."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and UTF-8 cannot hold
        text = json.dumps(_finite(value), indent=indent, allow_nan=False)
    return text


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _check_plain(path: str | Path) -> None:
    special = describe_special(path)
    if special:
        raise OSError(errno.EINVAL, f"it is {special}, not a file", str(path))


def _refuse_constant(name: str) -> typing.NoReturn:
    raise ValueError(f"{name} is no number")


def _check_depth(value: object) -> None:
    """Raise ValueError for JSON nested more than `DEEPEST` levels deep, without recursion: a level at a time."""
    level = [value]
    for _ in range(DEEPEST):
        level = [item for found in level if isinstance(found, (dict, list)) for item in _items(found)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _items(found: dict | list) -> typing.Iterable[object]:
    return found.values() if isinstance(found, dict) else found
