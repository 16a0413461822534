"""What a command leaves on stdout: tables and where to go next, or one JSON object."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import TextIO

from rlhf_cli.console import is_terminal, plain
from stages.results import Result, Table

PIPED_WIDTH = 100  # columns, where there is no terminal to ask
NUMERIC = re.compile(r"[-+−]?[\d.,]+( ?[%s])?( ± [\d.,]+( ?%)?)?|[-–]?|nan|inf|-inf")


def show(result: Result, as_json: bool, stream: TextIO | None = None) -> None:
    """Print a result, with `as_json` as one JSON object and nothing else; raises OSError from a stdout that is gone."""
    stream = stream or sys.stdout
    if as_json:
        print(json.dumps(payload(result), indent=2), file=stream)
    else:
        show_tables(result.tables, stream)
        for line in closing(result):
            print(plain(line), file=stream)
    stream.flush()


def payload(result: Result) -> dict[str, object]:
    """The object of --json: the result's data, with command, status, output and next; non-finite numbers as null."""
    about = {
        "command": result.command,
        "status": result.status,
        "output": result.output,
        "next": list(result.next),
    }
    return jsonable({**about, **result.data, **about})  # type: ignore[return-value]


def jsonable(value: object) -> object:
    """A value as JSON has it: NaN and infinities are null, scalars of other libraries plain numbers, the rest text."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return jsonable(value.item()) if hasattr(value, "item") else str(value)


def closing(result: Result) -> list[str]:
    """The lines under the tables: what was written, and commands worth running now."""
    lines = []
    if result.status == "dry run":
        lines.append("dry run: nothing was written")
    elif result.output is not None:
        lines.append(f"wrote {result.output}" if result.status == "done" else f"{result.status}: {result.output}")
    elif result.status != "done":
        lines.append(result.status)
    return lines + [f"next: {command}" for command in result.next]


def show_tables(tables: tuple[Table, ...], stream: TextIO) -> None:
    """Print tables: on a terminal with its width and rules, elsewhere as aligned plain text."""
    if not tables:
        return
    from rich.console import Console

    terminal = is_terminal(stream)
    width = None if terminal else PIPED_WIDTH
    console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False, force_terminal=terminal)
    for table in tables:
        if terminal:
            console.print(*_rendered(table, terminal), "", sep="\n")
            continue
        with console.capture() as captured:
            console.print(*_rendered(table, terminal), sep="\n")
        # Cells are padded to their column; spaces at a line's end help nobody.
        stream.write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n\n")


def _rendered(table: Table, terminal: bool) -> list[object]:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    rows = [[plain(cell) for cell in row] for row in table.rows]
    tall = any("\n" in cell or len(cell) > 60 for row in rows for cell in row)
    grid = Grid(
        box=(box.ROUNDED if tall else box.SIMPLE_HEAD) if terminal else None,
        show_lines=tall,
        show_edge=terminal and tall,
        pad_edge=terminal and tall,
        padding=(0, 1) if terminal else (0, 2, 0, 0),
        header_style="bold",
    )
    for place, name in enumerate(table.columns):
        cells = [row[place] for row in rows if place < len(row)]
        numeric = not tall and bool(cells) and all(NUMERIC.fullmatch(cell) for cell in cells)
        grid.add_column(Text(plain(name)), justify="right" if numeric else "left", overflow="fold")
    for place, row in enumerate(rows):
        gap = "\n" if tall and not terminal and place < len(rows) - 1 else ""  # where no rule divides tall rows
        grid.add_row(*(Text(cell + gap) for cell in row))
    return [Text(plain(table.title), style="bold"), grid] if table.title else [grid]
