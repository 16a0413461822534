"""Where the gold score turns, in words; the rest is read through evaluate and report."""

from __future__ import annotations

import pytest

from stages.diagnostics.kl_curve import by_run, describe_over_optimisation, plot_kl_curve, turning_point


def rows(*numbers):
    return [{"model": f"m{i}", "kl": kl, "score": s, "gold": g} for i, (kl, s, g) in enumerate(numbers)]


def test_gold_peaks_while_the_score_goes_on():
    found = rows((0, 1.0, 0.0), (2, 2.0, 0.8), (5, 3.0, 0.7), (9, 4.0, 0.25), (12, 3.5, 0.3))
    peak, beyond = turning_point(found)
    assert (peak["model"], beyond["model"]) == ("m1", "m3")
    said = describe_over_optimisation(found, 0.05)
    assert "peaks at KL 2.00 (m1)" in said and "to KL 9.00 (m3)" in said
    assert "rises by 2.000" in said and "falls by 0.550 ± 0.050" in said and "chance" not in said
    assert "it may be chance" in describe_over_optimisation(found, 0.3)


@pytest.mark.parametrize(
    "numbers",
    [
        [(0, 1.0, 0.0), (2, 2.0, 0.8), (5, 3.0, 0.9)],  # gold goes on rising
        [(0, 1.0, 0.0), (2, 2.0, 0.8), (5, 1.5, 0.3)],  # both fall
        [(0, 1.0, 0.9), (2, 0.5, 0.8)],
        [(3, 5.0, 0.1), (4, 1.0, 0.9)],  # the higher score comes before the peak
        [],
    ],
)
def test_nothing_turns(numbers):
    assert turning_point(rows(*numbers)) is None
    assert "no over-optimisation" in describe_over_optimisation(rows(*numbers), None)


def test_rows_without_gold_are_passed_over():
    assert turning_point([{"model": "m", "kl": 1.0, "score": 2.0}, {"model": "n", "kl": 2.0, "gold": None}]) is None


def test_the_states_of_a_run_are_one_line_with_its_checkpoint():
    models = ["a/sft", "r/ppo/state/step-000002", "r/ppo", "q/ppo/state/step-000001", "x/dpo/state/step-000003", "x/rm"]
    found = by_run([{"model": model} for model in models])
    assert {name: [row["model"] for row in rows] for name, rows in found.items()} == {
        "checkpoints": ["a/sft", "x/rm"],
        "r/ppo": ["r/ppo/state/step-000002", "r/ppo"],
        "q/ppo": ["q/ppo/state/step-000001"],
        "dpo": ["x/dpo/state/step-000003"],
    }


@pytest.mark.full
def test_a_picture_needs_no_gold():
    (axes,) = plot_kl_curve([{"model": "m", "kl": 1.0, "score": 2.0, "score_error": 0.5}], [], "a < b").axes
    assert [one.get_label() for one in axes.containers] == ["score, checkpoints"] and axes.get_title() == "a < b"
    assert axes.containers[0][0].get_xydata().tolist() == [[1, 2]]
