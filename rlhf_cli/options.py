"""Config fields become command-line options: same name, help, default and panel as in `stages.config`.

--help shows the required and the main knobs of a command, --help-all shows every knob under the heading of its panel.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing

import typer
from typer.core import TyperCommand

from stages.config import DATA, DEVICE, LORA, MODEL, OPTIMISER, OUTPUT, TRAINING
from stages.knobs import REQUIRED, Knob, default_of, knobs
from stages.measuring_config import STAGES

REQUIRED_KNOBS, MAIN_KNOBS, THIS_RUN = "Required", "Main knobs", "This run"
SHOW_ALL = "rlhf.help_all"  # key of a context whose help page shows every knob
PANELS_FIRST = (MODEL, DATA, OUTPUT)
PANELS_LAST = (TRAINING, OPTIMISER, LORA, DEVICE, THIS_RUN)
TYPE_NAMES = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


def knob_options(cls: type) -> list[inspect.Parameter]:
    """One keyword parameter per knob of a config class, in panel order; the default None means "not given"."""
    knobs_by_name = knobs(cls)
    panels = [about.panel for _, about, _ in knobs_by_name.values()]
    others = [p for p in dict.fromkeys(panels) if p not in PANELS_FIRST + PANELS_LAST]
    order = {panel: place for place, panel in enumerate((*PANELS_FIRST, *others, *PANELS_LAST))}
    by_panel = sorted(knobs_by_name, key=lambda name: order[knobs_by_name[name][1].panel])
    return [_parameter(name, *knobs_by_name[name]) for name in by_panel]


def option(
    name: str, flag: str, help: str, annotation: object, metavar: str | None = None, panel: str = THIS_RUN
) -> inspect.Parameter:
    """A keyword parameter that Typer reads as an option without a default."""
    about = typer.Option(None, flag, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=about)


def _parameter(name: str, field: dataclasses.Field, about: Knob, kind: object) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    repeatable = " (repeatable)" if kind == list[str] else ""
    text = f"{about.help}{repeatable}  {shown_default(default_of(field), about)}".rstrip()
    if kind is bool:
        return option(name, f"{flag}/--no-{flag[2:]}", text, bool | None, panel=about.panel)
    # Numbers stay text here, so that the same code reads and checks flags and recipes.
    annotation = list[str] | None if typing.get_origin(kind) in (list, dict) else str | None
    return option(name, flag, text, annotation, metavar(about, kind), about.panel)


def metavar(about: Knob, kind: object) -> str:
    """The placeholder of an option's value in --help: its choices, else its type."""
    if typing.get_origin(kind) is dict:
        return "NAME=COLUMN,..."
    if typing.get_origin(kind) is list:
        if about.choices:
            return "NAME,..."
        return "N,N,..." if kind == list[int] else "TEXT"
    if about.choices:
        return "|".join(about.choices)
    kinds = [k for k in typing.get_args(kind) or (kind,) if k is not type(None)]
    return "INTEGER|auto" if kinds == [int, str] else TYPE_NAMES[kinds[0]]


def shown_default(default: object, about: Knob) -> str:
    """A knob's default in brackets for --help; "" if there is none."""
    if default is REQUIRED:
        return "[required]"
    if default is None or default in ([], {}):
        return f"[default: {about.auto}]" if about.auto else ""
    if isinstance(default, list):
        return f"[default: {','.join(map(str, default))}]"
    if isinstance(default, bool):
        return f"[default: {str(default).lower()}]"
    return f"[default: {default:g}]" if isinstance(default, float) else f"[default: {default}]"


def given(cls: type, values: dict[str, object]) -> dict[str, object]:
    """The knobs among `values` that were given, for `stages.recipe.resolve` (repeated pairs as one text)."""
    kinds = {name: kind for name, (_, _, kind) in knobs(cls).items()}
    flags = {name: values[name] for name in kinds if values.get(name) not in (None, [])}
    return {n: ",".join(v) if typing.get_origin(kinds[n]) is dict else v for n, v in flags.items()}  # type: ignore


def nearest(wrong: str, flags: list[str]) -> str | None:
    """The existing flag that is most similar to an unknown one; None if none is similar."""
    near = difflib.get_close_matches(wrong.replace("_", "-"), flags, n=1, cutoff=0.6)
    return near[0] if near else None


def help_all_option() -> inspect.Parameter:
    """The flag --help-all, which acts before any other option is read."""
    text = "show every knob and exit"
    about = typer.Option(False, "--help-all", help=text, is_eager=True, callback=_show_all, rich_help_panel=THIS_RUN)
    return inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, annotation=bool, default=about)


def _show_all(ctx: typer.Context, show: bool) -> None:
    if show:
        ctx.meta[SHOW_ALL] = True
        typer.echo(ctx.get_help())
        raise typer.Exit(0)


class PanelCommand(TyperCommand):
    """A command whose help page lists its options under headings, readable at 80 columns."""

    def format_options(self, ctx: typer.Context, formatter: typing.Any) -> None:
        """Write the main options and the number of the others, or with --help-all every option by panel."""
        params = self.get_params(ctx)
        cls = STAGES.get(self.name or "")
        if cls is None or not cls.main or ctx.meta.get(SHOW_ALL):
            write_panels(params, formatter)
            return
        by_name = {param.name: param for param in params}
        all_knobs = knobs(cls)
        required = [name for name in by_name if name in all_knobs and default_of(all_knobs[name][0]) is REQUIRED]
        shown = [(REQUIRED_KNOBS, by_name[name]) for name in required]
        shown += [(MAIN_KNOBS, by_name[name]) for name in cls.main]
        shown += [(THIS_RUN, param) for param in params if param.name not in all_knobs]
        _write_sections(shown, formatter)
        left_out = len(all_knobs) - len(required) - len(cls.main)
        formatter.write_paragraph()
        formatter.write_text(f"{left_out} more knobs: {ctx.command_path} --help-all")


def write_panels(params: typing.Iterable[typing.Any], formatter: typing.Any, rest: str = THIS_RUN) -> None:
    """Write a help section per panel; `rest` is for options that have none."""
    _write_sections([(getattr(param, "rich_help_panel", None) or rest, param) for param in params], formatter)


def _write_sections(params: list[tuple[str, typing.Any]], formatter: typing.Any) -> None:
    """Write pairs of heading and option, a section per heading, in the order in which headings first appear."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for panel, param in params:
        panels.setdefault(panel, []).append((_label(param), getattr(param, "help", None) or ""))
    for panel, rows in panels.items():
        with formatter.section(panel):
            formatter.write_dl(rows, col_max=34)


def _label(param: typing.Any) -> str:
    if param.param_type_name == "argument":
        return f"{param.metavar}..."
    if param.secondary_opts:
        return f"--[no-]{param.opts[0][2:]}"
    value = f" {param.metavar}" if param.metavar else ""
    return ", ".join(sorted(param.opts, key=len)) + value
