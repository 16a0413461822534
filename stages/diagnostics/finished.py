"""The tables of a finished training run. They are read from its folder, so a repeated command prints the same ones."""

from __future__ import annotations

from stages.checkpoint.output_folder import REPORT
from stages.checkpoint.run import Run, read_metrics
from stages.diagnostics.conditions import CONDITION_ADVICE
from stages.diagnostics.verdict import Verdict
from stages.diagnostics.watchdog import alarms_in
from stages.reading import read_json
from stages.results import Table
from stages.tables import alarm_table, before_and_after_table, comparison_tables, metrics_table

TITLES = {"reward": "reward model", "dpo": "dpo on held-out comparisons, by its implicit reward"}


def finished_tables(run: Run) -> tuple[Table, ...]:
    """What a run measured at its end: as its stage shows it, or all metrics if files of another version lack that."""
    manifest = run.manifest
    try:
        tables = _ppo_tables(run) if manifest.stage == "ppo" else _comparison_tables(run)
    except (OSError, ValueError, KeyError, TypeError):
        tables = ()
    return tables or (metrics_table(manifest.stage, manifest.metrics),)


def _ppo_tables(run: Run) -> tuple[Table, ...]:
    manifest, alarms = run.manifest, alarms_in(read_metrics(run))
    measured = before_and_after_table(manifest.metrics)
    first = measured if measured.rows else metrics_table(manifest.stage, manifest.metrics)
    return (first, alarm_table(alarms, manifest.steps, CONDITION_ADVICE)) if alarms else (first,)


def _comparison_tables(run: Run) -> tuple[Table, ...]:
    """The report on held-out comparisons, if there were any, and the verdict of a reward model; () for SFT."""
    if run.manifest.stage not in TITLES:
        return ()
    report = read_json(run.folder / REPORT)
    tables = comparison_tables(report, TITLES[run.manifest.stage]) if "pairs" in report else ()
    return (*tables, Verdict(**report["verdict"]).table()) if "verdict" in report else tables
