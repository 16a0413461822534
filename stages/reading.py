"""Reading of plain files, whole, as bytes, text, JSON or a digest; and JSON text for writing."""

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
    """A plain file's content. Raises OSError, also for a pipe, a socket or a device, which may never end."""
    _check_plain(path)
    return Path(path).read_bytes()


def read_text(path: str | Path) -> str:
    """A plain file's UTF-8 text. Raises OSError as `read_bytes` does, and UnicodeDecodeError."""
    return read_bytes(path).decode("utf-8")


def read_json(path: str | Path) -> typing.Any:
    """JSON as this tool writes it, from a plain file. Raises OSError, and ValueError with the reason.

    NaN, infinities and values nested more than `DEEPEST` levels deep are refused.
    """

    def refuse_constant(name: str) -> typing.NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        value = json.loads(read_text(path), parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):  # one level at a time, since recursion could fail
        nested = [item for item in level if isinstance(item, (dict, list))]
        level = [item for parent in nested for item in (parent.values() if isinstance(parent, dict) else parent)]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def read_object(path: str | Path) -> dict[str, typing.Any]:
    """A JSON object of any tool, from a plain file. Raises OSError, and ValueError with the reason."""
    try:
        content = json.loads(read_text(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def sha256_of(path: str | Path) -> str:
    """sha256 of a plain file's content, in hex. Raises OSError as `read_bytes` does."""
    _check_plain(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: object, indent: int | None = None) -> str:
    """Standard JSON text: NaN and infinities become null, and it can always be encoded as UTF-8."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape but UTF-8 cannot encode
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
