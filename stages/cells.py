"""Cells of tables: numbers, shares and texts from JSON, in which any of them may be missing or of another type."""

from __future__ import annotations

import math

ABSENT = "-"
SHOWN_CHARACTERS = 600  # of an example in a table
JsonRow = dict[str, object]


def is_number(value: object) -> bool:
    """Whether a value from JSON is a number that a float can represent; true and false are not."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)


def is_finite(value: object) -> bool:
    """Whether a value from JSON is a finite number."""
    return is_number(value) and math.isfinite(value)  # type: ignore[arg-type]


def format_number(value: object, digits: int) -> str:
    """A number with so many decimals, or a dash."""
    if not is_number(value):
        return ABSENT
    return f"{value:,.{digits}f}" if math.isfinite(value) else str(value)  # type: ignore[arg-type]


def format_share(rate: object, low: object = None, high: object = None, note: str = "") -> str:
    """A share in per cent, with its interval if there is one."""
    if not is_number(rate):
        return ABSENT
    interval = f"{100 * low:.1f} to {100 * high:.1f}" if is_number(low) and is_number(high) else ""  # type: ignore
    about = (interval + note).removeprefix(", ")
    return f"{100 * rate:.1f} %" + (f" ({about})" if about else "")  # type: ignore[operator]


def format_interval(report: JsonRow, name: str) -> str:
    """A share between 0 and 1 with its 95 % interval."""
    share, low, high = (format_number(report[f"{name}{end}"], 3) for end in ("", "_low", "_high"))
    return f"{share} [{low}, {high}]"


def format_text(value: object) -> str:
    """A prompt or response as text; a list of messages as `role: content` lines."""
    if isinstance(value, list):
        turns = [m for m in value if isinstance(m, dict)]
        return "\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" for m in turns)
    return ABSENT if value is None else str(value).strip() or "(empty)"


def beginning(text: str) -> str:
    """The first SHOWN_CHARACTERS of a response; --json has all of it."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rstrip() + " ..."


def ending(text: str) -> str:
    """The last SHOWN_CHARACTERS of a prompt, which a response answers."""
    return text if len(text) <= SHOWN_CHARACTERS else "... " + text[-SHOWN_CHARACTERS:].lstrip()


def inner(mapping: object, *keys: str) -> object:
    """A nested value; None if a key is missing or a value on the path is not a mapping."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping


def part(mapping: object, *keys: str) -> dict:
    """A nested mapping, empty if there is none."""
    value = inner(mapping, *keys)
    return value if isinstance(value, dict) else {}


def format_short(value: object) -> str:
    """A number with four significant digits, or a dash."""
    return f"{value:.4g}" if is_number(value) else ABSENT
