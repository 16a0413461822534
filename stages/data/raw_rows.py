"""One row of a dataset as read from its file, and typed access to its cells."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from stages.data.cells import json_value
from stages.errors import DatasetError

Message = dict[str, str]  # {"role": one of MESSAGE_ROLES, "content": text}
Content = str | tuple[Message, ...]  # plain text, or turns for the chat template

MESSAGE_ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"developer": "system", "human": "user", "gpt": "assistant"}
NAME_SHOWN, NAMES_LISTED = 60, 20  # characters of a name, and how many names, in one message
ROW_FIX = "correct the row, or drop such rows with --skip-bad-rows"


@dataclass(frozen=True)
class RawRow:
    """One row as read from its file; `where` is "path:line" or "path: row N"."""

    values: dict[str, object]
    where: str

    def at(self, field: str) -> str:
        """The place of one field of this row, for messages."""
        return f"{self.where}: {field}"

    def get(self, field: str) -> object:
        """A cell that must exist. Raises DatasetError."""
        if field not in self.values:
            raise bad_row(f"`{field}` is missing; the row has {listed(self.values)}", self.at(field))
        return self.values[field]

    def text(self, field: str) -> str:
        """A text that is not blank, unchanged. Raises DatasetError."""
        return check_text(self.get(field), self.at(field))

    def number(self, field: str) -> float:
        """A finite number (CSV's texts are converted). Raises DatasetError."""
        return check_number(self.get(field), self.at(field))

    def content(self, field: str) -> Content:
        """A text that is not blank, or a list of messages. Raises DatasetError."""
        return check_content(self.get(field), self.at(field))

    def messages(self, field: str) -> tuple[Message, ...]:
        """A list of messages, role names unified. Raises DatasetError."""
        return check_messages(self.get(field), self.at(field))

    def prompt(self, field: str = "prompt") -> Content:
        """A prompt: text, or messages that an assistant turn can follow. Raises DatasetError."""
        return check_prompt(self.content(field), self.at(field))

    def others(self, *used: str) -> dict[str, object]:
        """Every other cell as JSON (stages/data/cells.py). Raises DatasetError for one that has no JSON form."""
        others = {}
        for name, value in self.values.items():
            if name not in used:
                try:
                    others[name] = json_value(value)
                except ValueError as error:
                    raise bad_row(str(error), self.at(quoted(name))) from None
        return others


def bad_row(what: str, where: str) -> DatasetError:
    """The error for a row that cannot be used."""
    return DatasetError(what, where=where, fix=ROW_FIX)


def check_text(value: object, where: str) -> str:
    """`value` if it is a text that is not blank. Raises DatasetError."""
    if not isinstance(value, str):
        raise bad_row(f"expected text, found {named(value)}", where)
    if not value.strip():
        raise bad_row("the text is empty", where)
    return value


def check_number(value: object, where: str) -> float:
    """`value` as a finite number. Raises DatasetError."""
    if isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    raise bad_row(f"expected a number, found {named(value)}", where)


def check_content(value: object, where: str) -> Content:
    """`value` as text or as messages, whichever it is. Raises DatasetError."""
    return check_messages(value, where) if isinstance(value, list) else check_text(value, where)


def check_messages(value: object, where: str) -> tuple[Message, ...]:
    """A list of {role, content} or ShareGPT {from, value} objects as messages. Raises DatasetError."""
    if not isinstance(value, list):
        raise bad_row(f"expected a list of messages, found {named(value)}", where)
    if not value:
        raise bad_row("the list of messages is empty", where)
    return tuple(_check_message(item, f"{where}[{index}]") for index, item in enumerate(value))


def _check_message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise bad_row(f"expected a message with `role` and `content`, found {named(item)}", where)
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    if item.get("tool_calls"):
        raise bad_row("tool calls are not supported; write the assistant's text into `content`", where)
    for key in (role_key, content_key):
        if not isinstance(item.get(key), str):
            raise bad_row(f"expected text in `{key}`, found {named(item.get(key))}", where)
    role = ROLE_ALIASES.get(item[role_key], item[role_key])
    if role not in MESSAGE_ROLES:
        raise bad_row(f"unknown role `{quoted(role)}`; roles are {', '.join(MESSAGE_ROLES)}", where)
    return {"role": role, "content": item[content_key]}


def check_prompt(content: Content, where: str) -> Content:
    """`content` if a response can follow it. Raises DatasetError."""
    if isinstance(content, str):
        return content
    if content[-1]["role"] == "assistant":
        raise bad_row("the prompt ends with an assistant turn, so there is nothing to answer", where)
    if not any(message["content"].strip() for message in content):
        raise bad_row("every message of the prompt is empty", where)
    return content


def quoted(name: object) -> str:
    """A name from a file, shortened and on one line, for messages."""
    text = str(name) if str(name).isprintable() else repr(str(name))[1:-1]
    return text if len(text) <= NAME_SHOWN else text[:NAME_SHOWN] + "..."


def listed(names: Iterable[str]) -> str:
    """Names in backticks, for messages; of many the first few."""
    names = list(names)
    more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
    return ", ".join(f"`{quoted(name)}`" for name in names[:NAMES_LISTED]) + more or "no fields"


def named(value: object) -> str:
    """The kind of a value, in the terms of JSON, for messages."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" + ("..." if len(value) > 40 else "")
    if hasattr(value, "as_py"):  # an Arrow scalar: a date, a time and the like
        return f"a {value.type}"  # type: ignore[attr-defined]
    names = {dict: "an object", list: "a list"}
    return names.get(type(value), f"a {type(value).__name__}")


def first_line(error: Exception) -> str:
    """An exception's message, cut to its first line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
