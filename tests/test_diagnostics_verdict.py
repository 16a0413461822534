"""The verdict on a reward model, for each thing that can speak against it."""

from __future__ import annotations

import math

import pytest

from stages.diagnostics.verdict import reach_verdict

LEAD = {"lead": 0.3, "lead_low": 0.2, "lead_high": 0.4}
GOOD = {
    "pairs": 100, "accuracy": 0.8, "accuracy_low": 0.711, "accuracy_high": 0.867, "log_loss": 0.45,
    "margin_mean": 1.2, "margin_std": 1.6, "score_length_corr": 0.2, "label_length_corr": 0.1,
    "calibration_error": 0.03, "confidence": 0.82, "agreement_ceiling": 1.0, "demonstrations_mean": 0.0,
    "demonstrations_std": 1.5, "samples": {"count": 64, "mean": -0.6, "std": 1.4, "within_std": 0.9},
    "baselines": {
        "longer wins": {"accuracy": 0.45} | LEAD, "shorter wins": {"accuracy": 0.55} | LEAD,
        "majority": {"accuracy": 0.5} | LEAD,
    },
}  # fmt: skip


def changed(**parts: object) -> dict:
    return {**GOOD, **parts}


def test_a_good_model_may_go_and_says_why():
    found = reach_verdict(GOOD)
    assert found.decision == "go"
    assert found.reasons == (
        "accuracy 0.800 (95 % interval 0.711 to 0.867) on 100 held-out pairs is better than chance (0.5)",
        "it is above the accuracy of the rule 'shorter wins' (0.550): difference on the same pairs 0.300 "
        "(95 % interval 0.200 to 0.400)",
    )
    assert found.notes == (
        "64 sampled responses score -0.6 on average, -0.4 standard deviations from the demonstrations; their standard "
        "deviation is 1.4 overall and 0.9 among responses to one prompt",
    )


@pytest.mark.parametrize(("low", "decision"), [(0.501, "go"), (0.5, "no-go"), (0.3, "no-go")])
def test_no_better_than_chance_is_no_go(low, decision):
    assert reach_verdict(changed(accuracy_low=low)).decision == decision


def test_below_chance_is_no_go_too():
    found = reach_verdict(changed(accuracy=0.25, accuracy_low=0.16, accuracy_high=0.37))
    assert found.decision == "no-go"
    assert found.reasons == (
        "accuracy 0.250 (95 % interval 0.160 to 0.370) on 100 held-out pairs is no better than chance (0.5)",
    )


@pytest.mark.parametrize(("pairs", "decision"), [(0, "unknown"), (19, "unknown"), (20, "no-go")])
def test_few_pairs_say_nothing(pairs, decision):
    found = reach_verdict(changed(pairs=pairs, accuracy_low=0.2))
    assert found.decision == decision
    if pairs < 20:
        assert found.reasons[0].startswith(f"{pairs} held-out pairs are too few, 20 are needed: ")
        assert "--eval-fraction" in found.reasons[0] and "--eval-dataset" in found.reasons[0]


@pytest.mark.parametrize(("prompts", "decision"), [(1, "unknown"), (5, "unknown"), (6, "no-go"), (100, "no-go")])
def test_few_prompts_say_nothing_however_many_pairs_they_have(prompts, decision):
    found = reach_verdict(changed(clusters=prompts, accuracy_low=0.2))
    assert found.decision == decision
    if decision == "unknown":
        start = (
            f"100 held-out pairs of {'1 prompt' if prompts == 1 else '5 prompts'} are too few, 6 prompts are needed: "
        )
        assert found.reasons[0].startswith(start) and "--eval-dataset" in found.reasons[0]


def test_pairs_of_fewer_prompts_are_told_and_are_worth_less():
    found = reach_verdict(changed(clusters=25))
    assert "on 100 held-out pairs of 25 prompts is better than chance" in found.reasons[0]
    assert reach_verdict(changed(clusters=25, confidence=0.95)).decision == "caution"
    # The noise of 16 pairs: 1.96 x sqrt(.16 / 16) = .196.
    assert reach_verdict(changed(clusters=25, confidence=0.95, effective_pairs=16)).decision == "go"


def test_over_confidence_is_measured_against_what_labels_allow():
    """Right on every pair, with labels of 0.7: 0.95 sure is too sure, and the note compares like with like."""
    found = reach_verdict(changed(accuracy=1.0, expected_accuracy=0.7, agreement_ceiling=0.7, confidence=0.95))
    assert found.decision == "caution" and "mean confidence 0.95 but accuracy 0.70" in found.reasons[0]
    said = (
        "the labels are uncertain: against single judgements the expected accuracy is at most 0.700 (this model: 0.700)"
    )
    assert any(note.endswith(said) for note in found.notes)


def test_without_held_out_rows_nothing_is_known():
    found = reach_verdict({"demonstrations_mean": 0.0, "demonstrations_std": 1.0})
    assert found.decision == "unknown" and found.reasons[0].startswith("0 held-out pairs") and found.notes == ()


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (
            {"baselines": {"majority": {"accuracy": 0.78, "lead": 0.02, "lead_low": -0.01, "lead_high": 0.05}}},
            "accuracy 0.800 is not clearly above that of the rule 'majority' (0.780): difference on the same pairs "
            "0.020 (95 % interval -0.010 to 0.050)",
        ),
        (
            {"confidence": 0.91},
            "over-confident: mean confidence 0.91 but accuracy 0.80 (allowed difference 0.1), calibration error 0.03",
        ),
        ({"log_loss": 0.7}, "log-loss 0.700 is above 0.693"),
        (
            {"score_length_corr": 0.55},
            "scores follow length: correlation 0.55 (limit 0.5); the labels' correlation with length is 0.10",
        ),
        ({"score_length_corr": -0.55}, "scores follow length: correlation -0.55"),
        (
            {"samples": {"count": 2, "mean": 0.0, "std": 1.0, "within_std": 0.09}},
            "the policy's responses to a prompt score almost alike: standard deviation 0.09, against 1 within ",
        ),
        (
            {"samples": {"count": 2, "mean": -4.6, "std": 1.0, "within_std": 1.0}},
            "sampled responses score -4.6 on average, -3.1 standard deviations from the demonstrations (limit 3)",
        ),
    ],
    ids=["majority", "confident", "log-loss", "length", "short", "no spread", "far"],
)
def test_each_caution(parts, says):
    found = reach_verdict(changed(**parts))
    assert found.decision == "caution" and len(found.reasons) == 1 and found.reasons[0].startswith(says)
    assert found.notes[0].endswith("is better than chance (0.5)")


@pytest.mark.parametrize(
    "parts",
    [
        {"confidence": 0.89},
        {"score_length_corr": 0.6, "label_length_corr": 0.45},  # the labels themselves favour length
        {"score_length_corr": 0.5, "label_length_corr": 0.0},
        {"samples": {"count": 2, "mean": 4.4, "std": 1.0, "within_std": 0.11}},
        {"samples": {}},
        {"pairs": 20, "accuracy": 0.8, "confidence": 0.95},  # noise of 20 pairs: 1.96 x sqrt(.16 / 20) = .175
        {"demonstrations_std": 0.0, "samples": {"count": 2, "mean": 2.9, "std": 1.0, "within_std": 1.0}},
    ],
)
def test_what_is_no_caution(parts):
    assert reach_verdict(changed(**parts)).decision == "go"


def test_cautions_come_along_with_a_no_go():
    found = reach_verdict(changed(accuracy_low=0.4, log_loss=math.inf))
    assert found.decision == "no-go" and len(found.reasons) == 1 and found.notes[0].startswith("log-loss inf")


def test_how_far_people_agree_is_told():
    found = reach_verdict(changed(agreement_ceiling=0.9, annotator_agreement=0.75, annotator_pairs=40))
    assert found.decision == "go" and found.notes[:2] == (
        "the labels are uncertain: against single judgements the expected accuracy is at most 0.900 "
        "(this model: 0.800)",
        "two annotators agree on 0.750 of 40 pairs (accuracy of this model: 0.800)",
    )


def test_a_verdict_as_a_table():
    table = reach_verdict(GOOD).table()
    assert all(table.columns)
    assert table.title == "verdict: go" and [row[0] for row in table.rows] == ["reason", "reason", "note"]
    assert reach_verdict(GOOD).stored()["decision"] == "go"
