"""The conditions that PPO is watched for, at their thresholds."""

from __future__ import annotations

import math

import pytest

from stages.config import CONDITION_NAMES as NAMES
from stages.diagnostics.conditions import CONDITION_CHECKS, MetricsHistory, check_conditions
from stages.diagnostics.watchdog import Watchdog, add_resume_advice, alarms_in
from stages.errors import TrainingStopped
from stages.results import Silent

HEALTHY = {
    "reward_score": 0.5, "reward_score_std": 1.0, "reward_kl": 3.0, "reward_kl_std": 2.0, "entropy": 1.5, "loss": 0.1,
    "policy_loss": 0.1, "value_loss": 0.2, "response_length": 40.0, "truncated_rate": 0.05, "score_length_corr": 0.3,
    "explained_variance": 0.4, "dead_group_rate": 0.3, "ratio_first_error": 1e-6, "ratio_first_std": 1e-7,
    "nonfinite_steps": 0.0, "nonfinite_in_a_row": 0.0, "samples": 64.0, "repetition_rate": 0.02,
}  # fmt: skip


def course(*changes: dict, count: int = 12, **about: bool) -> MetricsHistory:
    """A healthy run whose last updates differ by these changes, one each."""
    lines = [HEALTHY] * (count - len(changes)) + [HEALTHY | change for change in changes]
    return MetricsHistory(lines, **about)


def names(found: MetricsHistory) -> list[str]:
    return [alarm.condition for alarm in check_conditions(found)]


def test_the_names_are_those_that_stop_on_takes():
    assert tuple(CONDITION_CHECKS) == NAMES


@pytest.mark.parametrize("count", [1, 2, 12, 100])
def test_a_healthy_run_is_quiet(count):
    assert names(course(count=count)) == []


def test_one_update_without_any_number_is_quiet():
    assert names(MetricsHistory([{}])) == [] and names(MetricsHistory([{"reward_kl": None}])) == ["nan"]


@pytest.mark.parametrize(
    ("tokens", "warns", "stops"),
    [(1, 20, 50), (32, 20, 50), (50, 20, 50), (100, 40, 50), (128, 51.2, 64), (2000, 800, 1000)],
)
def test_how_far_is_too_far_grows_with_the_response(tokens, warns, stops):
    def found(nats: float) -> list[tuple[str, bool]]:
        exact = {"reward_kl": nats, "reward_kl_std": 0.0, "response_length": tokens}
        return [(a.condition, a.may_stop) for a in check_conditions(course(exact))]

    assert found(warns) == [] and found(warns + 0.1) == [("kl", False)]
    assert found(stops) == [("kl", False)] and found(stops + 0.1) == [("kl", True)]


def test_a_kl_that_is_too_far_by_chance_is_waited_for():
    """Of 64 responses with a deviation of 40 the mean is known to 5: beyond 20 for sure from 30 on."""
    noisy = {"reward_kl": 29.9, "reward_kl_std": 40.0}
    assert names(course(noisy)) == [] and names(course(*[noisy] * 2)) == []
    assert names(course(*[noisy] * 3)) == ["kl"] and names(course(noisy | {"reward_kl": 30.1})) == ["kl"]
    outlier = {"reward_kl": 60.0, "reward_kl_std": 456.0}  # one response of 64 at 3680 nats, the others at 2.5
    assert names(course(outlier)) == [] and [a.may_stop for a in check_conditions(course(*[outlier] * 3))] == [True]
    unmeasured = {"reward_kl": 20.1, "reward_kl_std": None}
    assert names(course(unmeasured)) == ["kl"]


def test_reasoning_without_a_charge_for_kl_is_no_alarm():
    """1500 tokens at 0.2 nats each, which learning with kl_coef 0 reaches."""
    assert names(course({"reward_kl": 300.0, "response_length": 1500.0, "kl_coef": 0.0})) == []


def test_a_negative_kl_must_last_and_exceed_its_noise():
    below = {"reward_kl": -0.2, "reward_kl_std": 0.5}  # error of a mean of 5 x 64: 0.5 / sqrt(320) = 0.028
    assert names(course(*[below] * 5)) == ["negative-kl"]
    assert names(course(*[below] * 4)) == []
    assert names(course(*[below] * 4, below | {"reward_kl": 0.01})) == []
    noisy = below | {"reward_kl_std": 1.0}  # error 0.056, four of which are 0.22
    assert names(course(*[noisy] * 5)) == []
    assert names(course(*[{"reward_kl": -0.04, "reward_kl_std": 0.01}] * 5)) == []


def test_the_first_ratio_by_precision():
    off = {"ratio_first_error": 2e-3, "ratio_first_std": 0.04}
    assert names(course(off)) == ["ratio"] and names(course(off | {"ratio_first_error": 9e-4})) == []
    coarse = {"ratio_first_error": 0.8, "ratio_first_std": 0.04}  # single tokens in bf16
    assert names(course(coarse, half_precision=True)) == []
    assert names(course(coarse | {"ratio_first_std": 0.06}, half_precision=True)) == ["ratio"]


def test_entropy_is_compared_with_the_first_update():
    assert names(course(*[{"entropy": 0.14}] * 3)) == ["entropy"]  # under a tenth of 1.5
    assert names(course(*[{"entropy": 0.14}] * 2)) == [] and names(course(*[{"entropy": 0.16}] * 3)) == []
    sure = [HEALTHY | {"entropy": 0.04}] + [HEALTHY | {"entropy": 0.001}] * 5
    assert names(MetricsHistory(sure)) == []  # it never had any to lose


def test_length_alarms_where_scores_follow_it_and_it_grew():
    longer = {"score_length_corr": 0.7, "response_length": 53.0}
    assert names(course(*[longer] * 3)) == ["length"] and names(course(*[longer] * 2)) == []
    assert names(course(*[longer | {"response_length": 51.0}] * 3)) == []  # 1.3 x 40 is 52
    assert names(course(*[longer | {"score_length_corr": 0.6}] * 3)) == []


def test_length_alarms_where_scores_fall_with_it_and_it_shrank():
    shrinking = [{"score_length_corr": -0.8, "response_length": length} for length in (38.0, 35.0, 32.0)]
    assert names(course(*shrinking)) == []
    assert names(course(*shrinking, {"score_length_corr": -0.8, "response_length": 30.0})) == ["length"]  # 40 / 1.3
    assert names(course(*shrinking, {"score_length_corr": -0.6, "response_length": 30.0})) == []


def test_length_alarms_where_all_responses_have_come_to_one_length():
    """A correlation of 0 is that of equal lengths: all a single token, or all at the limit."""
    shrinking = [{"score_length_corr": -0.8, "response_length": length} for length in (38.0, 20.0, 5.0)]
    nothing = {"score_length_corr": 0.0, "response_length": 1.0}
    assert names(course(*shrinking, *[nothing] * 5)) == ["length"]
    assert names(course(*shrinking[:2], *[nothing] * 5)) == []  # it did not hold three times in a row
    assert names(course(*[nothing] * 5)) == []  # a policy that learned to end, for which scores do not pay
    growing = [{"score_length_corr": 0.8, "response_length": length} for length in (45.0, 50.0, 60.0)]
    limit = {"score_length_corr": 0.0, "response_length": 64.0}
    assert names(course(*growing, *[limit] * 5)) == ["length"]


def test_missing_ends_alarm_where_they_matter():
    cut = [{"truncated_rate": 0.11}] * 3
    assert names(course(*cut)) == ["no-eos"] and names(course(*cut, eos_expected=False)) == []
    assert names(course(*cut[:2])) == [] and names(course(*[{"truncated_rate": 0.1}] * 3)) == []


def test_a_critic_is_given_ten_updates():
    bad = [{"explained_variance": -0.1}] * 5
    assert names(course(*bad, count=10)) == ["critic"] and names(course(*bad, count=9)) == []
    assert names(course(*bad[:4], {"explained_variance": 0.0})) == []
    assert names(course(*bad[:4], {"explained_variance": math.nan})) == []  # returns that do not vary


def test_groups_are_dead_where_four_of_five_are():
    assert names(course(*[{"dead_group_rate": 0.81}] * 3)) == ["dead-groups"]
    assert names(course(*[{"dead_group_rate": 0.8}] * 3)) == []


def test_not_finite_is_said_at_once_and_stops_at_five_in_a_row():
    def found(steps: float, in_a_row: float):
        return check_conditions(course({"nonfinite_steps": steps, "nonfinite_in_a_row": in_a_row}))

    assert [(a.condition, a.may_stop) for a in found(1, 0)] == [("nan", False)]
    assert [(a.condition, a.may_stop) for a in found(4, 4)] == [("nan", False)]
    assert [(a.condition, a.may_stop) for a in found(4, 5)] == [("nan", True)]
    for value in (math.nan, math.inf, None):
        assert names(course({"reward_kl": value})) == ["nan"]


def moved(*scores: float, std: float = 1.0, before: int = 9) -> list[str]:
    """Conditions after a run at a score of 0.5 whose last updates have these mean scores."""
    return names(course(*[{"reward_score": s, "reward_score_std": std} for s in scores], count=before + len(scores)))


def test_the_reward_has_moved_far_against_its_widest_spread():
    assert moved(4.6, 4.6, 4.6) == ["reward-range"] and moved(4.4, 4.4, 4.4) == []
    assert moved(-3.6, -3.6, -3.6) == ["reward-range"]
    assert moved(4.6, 4.6, 4.6, std=2.0) == []
    rare = [{"reward_score": p, "reward_score_std": math.sqrt(p * (1 - p))} for p in (0.01, 0.2, 0.5, 0.9, 0.99)]
    assert names(MetricsHistory(rare)) == []  # answers that are right or wrong: 0.98 is less than 4 x 0.5
    assert names(MetricsHistory([{"reward_score": 1.0, "reward_score_std": 0.0}] * 3)) == []


def test_an_answer_learned_within_two_updates_is_no_move():
    """The deviation is wide in a single update: 0.1, 0.5, then 0.1 again; 0.98 is less than 4 x 0.5."""
    shares = (0.01, 0.5, *[0.99] * 10)
    assert (
        names(MetricsHistory([{"reward_score": p, "reward_score_std": math.sqrt(p * (1 - p))} for p in shares])) == []
    )


def test_a_reward_without_spread_at_first_is_measured_once_it_has_some():
    flat = [{"reward_score": 0.0, "reward_score_std": 0.0}] * 3
    assert names(MetricsHistory([*flat, *[{"reward_score": 0.3, "reward_score_std": 0.1}] * 3])) == []
    assert names(MetricsHistory([*flat, *[{"reward_score": 0.5, "reward_score_std": 0.1}] * 3])) == ["reward-range"]


def test_one_update_with_an_outlier_neither_makes_nor_hides_a_move():
    """One response of 64 at -1000: mean -15, standard deviation 124."""
    outlier = {"reward_score": -15.0, "reward_score_std": 124.0}
    assert names(course(outlier)) == []
    start = [HEALTHY | outlier, *[HEALTHY] * 11]
    assert names(MetricsHistory(start)) == []  # in the first update, against which nothing else may be measured
    gone = [HEALTHY | {"reward_score": 41.0}] * 3  # 40.5 from the start: beyond 4 x 10 x the usual 1
    assert names(MetricsHistory([HEALTHY, HEALTHY, HEALTHY | outlier, *[HEALTHY] * 9, *gone])) == ["reward-range"]


def test_repetition_is_compared_with_the_first_update():
    assert names(course(*[{"repetition_rate": 0.13}] * 3)) == ["repetition"]  # 0.02 + 0.1
    assert (
        names(course(*[{"repetition_rate": 0.11}] * 3)) == [] and names(course(*[{"repetition_rate": 0.9}] * 2)) == []
    )
    tables = [HEALTHY | {"repetition_rate": 0.4}] + [HEALTHY | {"repetition_rate": 0.48}] * 5
    assert names(MetricsHistory(tables)) == []  # text that repeats itself by nature
    earlier = [{k: v for k, v in HEALTHY.items() if k != "repetition_rate"}] * 5
    assert names(MetricsHistory(earlier)) == []  # lines of a version that did not measure it


def test_one_response_to_many_prompts_is_repetition():
    same = {"shared_response_rate": 0.3, "response_length": 6.0}
    first = HEALTHY | {"shared_response_rate": 0.03, "response_length": 6.0}
    assert names(MetricsHistory([first, *[HEALTHY | same] * 3])) == ["repetition"]
    assert names(MetricsHistory([first, *[HEALTHY | same | {"shared_response_rate": 0.27}] * 3])) == []
    assert names(MetricsHistory([first, *[HEALTHY | same] * 2])) == []
    label = {"shared_response_rate": 1.0, "response_length": 3.0}  # yes or no
    assert names(MetricsHistory([first, *[HEALTHY | label] * 3])) == []


def test_the_words_of_a_list_again_and_again_are_warned_of():
    """Seen: "The fun was happy. The fun was very happy", 32 tokens at 32.8 nats, warned of by two conditions."""
    hacked = {"response_length": 32.0, "reward_kl": 32.8, "repetition_rate": 0.2}
    alarms = check_conditions(course(*[hacked] * 3))
    assert [(alarm.condition, alarm.may_stop) for alarm in alarms] == [("kl", False), ("repetition", True)]


# --- what a run says of them


class Said(Silent):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


FAR = HEALTHY | {"reward_kl": 60.0}


def walk(lines: list[dict], stop_on: tuple[str, ...] = (), resumed_at: int = 0) -> tuple[list[str], list[dict]]:
    """What is said over some updates, and their metrics; a resumed watch reads the earlier ones back."""
    said, logged = Said(), []
    watch = Watchdog(stop_on, said, earlier=lambda: list(logged))
    for step, line in enumerate(lines):
        if step == resumed_at:
            watch = Watchdog(stop_on, said, earlier=lambda: list(logged))
        logged.append({"step": step + 1} | line | watch.check_update(step, line))
    return said.warnings, logged


@pytest.mark.parametrize("resumed_at", range(10))
def test_a_warning_comes_when_a_condition_begins_and_again_after_it_was_away(resumed_at):
    warnings, logged = walk([HEALTHY, FAR, FAR, HEALTHY, FAR, *[HEALTHY] * 3, FAR, FAR], resumed_at=resumed_at)
    assert [warning.partition(": the")[0] for warning in warnings] == ["update 2: kl", "update 9: kl"]
    assert warnings[0].endswith("\n  -> raise --kl-coef or lower --learning-rate")
    assert alarms_in(logged) == {"kl": [2, 3, 5, 9, 10]}
    assert [line["alarms"] for line in logged[:3]] == [0.0, 1.0, 1.0] and "alarm_kl" not in logged[0]


def test_a_stop_names_number_cause_knob_and_the_way_on():
    with pytest.raises(TrainingStopped) as caught:
        walk([HEALTHY, FAR], stop_on=("nan", "kl"))
    assert caught.value.step == 2 and caught.value.exit_code == 3
    words = str(add_resume_advice(caught.value, 1, "runs/x", ["nan", "kl"]))
    assert words.startswith("stopped at step 2: kl: the sequence KL to the reference is 60.0 nats, 1.50 per token (")
    assert "raise --kl-coef" in words and "the state before this update (step 1) is saved in runs/x" in words
    assert words.endswith("with --stop-on nan")
    assert str(add_resume_advice(caught.value, 1, "x", ["kl"])).endswith("with --stop-on none")


def test_one_bad_gradient_is_warned_of_and_does_not_stop():
    lost = HEALTHY | {"nonfinite_steps": 1.0, "nonfinite_in_a_row": 1.0}
    warnings, _ = walk([HEALTHY, lost], stop_on=("nan",))
    assert len(warnings) == 1 and warnings[0].startswith("update 2: nan: non-finite gradients skipped")
    with pytest.raises(TrainingStopped):
        walk([HEALTHY, lost, lost | {"nonfinite_in_a_row": 5.0}], stop_on=("nan",))
