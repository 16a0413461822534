"""A run that goes on to a later end: what becomes of its learning rate is said."""

from __future__ import annotations

import math

import pytest

from tests.commands import SHORT, done, lines_of

RATES = ("--learning-rate", "1e-3", "--warmup-ratio", 0)


def rates(out):
    return [line["lr"] for line in lines_of(out / "metrics.jsonl") if line["step"] > 0]


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "schedule", "end", "before", "after"),
    [
        ("sft", "linear", ("--max-steps", 8), 1 / 4, 1 - 4 / 8),
        ("sft", "cosine", ("--max-steps", 8), 0.5 * (1 + math.cos(math.pi * 3 / 4)), 0.5),
        ("dpo", "linear", ("--max-steps", 8), 1 / 4, 1 - 4 / 8),
        ("reward", "linear", ("--max-steps", 8), 1 / 4, 1 - 4 / 8),
        ("ppo", "linear", ("--max-steps", 8), 1 / 4, 1 - 4 / 8),
    ],
)
def test_a_later_end_says_where_the_learning_rate_rises(chain, tmp_path, stage, schedule, end, before, after):
    """Four steps of a falling schedule, then four more of one of eight."""
    found, out = chain(), tmp_path / "out"
    data = {"sft": found.demonstrations, "ppo": found.prompts}.get(stage, found.comparisons)
    line = (stage, "--model", found.sft, "--dataset", data, "--output", out, "--batch-size", 4, "--samples", 0)
    line += (*RATES, "--lr-schedule", schedule, "--keep-state", "--limit-rows", 24)
    line += ("--reward", found.reward, *SHORT) if stage == "ppo" else ()
    assert "rises" not in done(*line, "--max-steps", 4).stderr
    said = done(*line, *end).stderr
    assert rates(out)[3:5] == pytest.approx([1e-3 * before, 1e-3 * after])
    words = f"the learning rate rises from {1e-3 * before:.3g} at step 4 to {1e-3 * after:.3g} at step 5"
    assert said.count(words) == 1 and f"lr_schedule {schedule} now ends at step 8" in said


@pytest.mark.full
def test_more_epochs_say_so_too(chain, tmp_path):
    found, out = chain(), tmp_path / "out"
    line = ("sft", "--model", found.base, "--dataset", found.demonstrations, "--output", out, "--batch-size", 4)
    line += (*RATES, "--keep-state", "--limit-rows", 16, "--eval-fraction", 0, "--samples", 0, "--lora-rank", 2)
    done(*line, "--epochs", 1)
    assert "rises from 0.00025 at step 4 to 0.0005 at step 5" in done(*line, "--epochs", 2).stderr


@pytest.mark.full
@pytest.mark.parametrize("more", [("--lr-schedule", "constant"), ("--lr-schedule", "linear", "--max-steps", 5)])
def test_a_later_end_at_which_no_rate_rises_says_nothing(chain, tmp_path, more):
    """At a constant rate; and from four steps to five, where a quarter is followed by a fifth."""
    found, out = chain(), tmp_path / "out"
    line = ("sft", "--model", found.base, "--dataset", found.demonstrations, "--output", out, "--batch-size", 4)
    line += (*RATES, "--keep-state", "--limit-rows", 16, "--samples", 0, "--lora-rank", 2, *more[:2])
    done(*line, "--max-steps", 4)
    assert "rises" not in done(*line, "--max-steps", more[3] if len(more) > 2 else 8).stderr
