"""Shows rows as a stage's model will see them. Loads a tokenizer, no weights and no torch if it can."""

from __future__ import annotations

from stages.inputs import Inputs
from stages.inputs.previewing import stage_config, stage_of
from stages.measuring_config import PreviewConfig
from stages.results import Reporter, Result
from stages.training.preview import build_preview
from stages.training.row_tokens import open_encoder


def run(config: PreviewConfig, inputs: Inputs, reporter: Reporter, *, dry_run: bool = False) -> Result:
    """The rows of a dataset as a stage will see them; a dry run shows the same."""
    stage = stage_of(config, inputs.data.kind)
    encoder = open_encoder(stage_config(stage, config), inputs.source)
    preview = build_preview(stage, encoder, inputs.data.rows, config.show_rows)
    for line in preview.warnings:
        reporter.warn(line)
    lines = {"warnings": [*inputs.warnings, *preview.warnings], "notes": list(inputs.notes)}
    data = {"stage": stage, **preview.data, "rows_left_out": inputs.count_left_out(), **lines}
    return Result("preview", "done", None, data, preview.tables, passages=preview.passages)
