from __future__ import annotations

import math

import pytest
import torch

from stages.maths.statistics import (
    accuracy_by_length_difference,
    accuracy_of_pairs,
    calibration_bins,
    calibration_error,
    cluster_error,
    clustered_interval,
    correlation,
    distinct_ngrams,
    effective_clusters,
    expected_accuracy_of_pairs,
    explained_variance,
    lead_of_pairs,
    log_loss_of_pairs,
    mean_with_error,
    repeated_ngrams,
    shared_response_rate,
    student_quantile,
    wilson_interval,
)


def logit(p):
    return math.log(p / (1 - p))


def test_wilson_interval_of_8_in_10():
    # (.8 + 3.8416/20 -+ 1.96 sqrt(.016 + 3.8416/400)) / 1.38416
    assert wilson_interval(8, 10) == pytest.approx((0.490157, 0.943319), abs=1e-6)


def test_wilson_interval_at_the_ends():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.38416 / 1.38416))
    assert wilson_interval(10, 10) == pytest.approx((1 / 1.38416, 1.0))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for n in range(1, 50):
        assert 0.0 <= wilson_interval(0, n)[0] <= wilson_interval(n, n)[1] <= 1.0


def test_wilson_bounds_are_z_deviations_from_what_was_seen():
    for bound in wilson_interval(30.5, 41, z=2.5):
        assert abs(30.5 / 41 - bound) == pytest.approx(2.5 * math.sqrt(bound * (1 - bound) / 41))


def test_mean_with_error():
    # squared deviations of 1..4 sum to 5: sqrt(5 / 3) / sqrt(4)
    assert mean_with_error(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx((2.5, math.sqrt(5 / 12)))
    assert mean_with_error(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, 1.0))
    assert mean_with_error(torch.tensor([7.0])) == (7.0, 0.0)
    assert all(math.isnan(number) for number in mean_with_error(torch.tensor([])))


def test_mean_with_error_is_computed_in_float64():
    x = torch.full((1000,), 16777216.0)
    x[0] += 2
    assert mean_with_error(x) == pytest.approx((16777216.002, 0.002), abs=1e-6)


def test_correlation():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert correlation(x, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    assert correlation(x, torch.tensor([1, 3, 2, 4]) * 100 + 7) == pytest.approx(0.8)
    assert correlation(x, -3 * x) == pytest.approx(-1.0)
    assert correlation(x.reshape(2, 2), 2 * x.reshape(2, 2)) == pytest.approx(1.0)


def test_correlation_with_what_does_not_vary_is_0():
    x = torch.tensor([1.0, 2.0, 3.0])
    tenths = torch.full((3,), 0.1, dtype=torch.float64)  # their mean is not 0.1, so their variance is not 0
    assert tenths.mean().item() != 0.1
    assert correlation(x, tenths) == correlation(tenths, x) == 0.0
    assert correlation(x, torch.full((3,), 5)) == correlation(torch.full((3,), 5), x) == 0.0
    assert correlation(torch.tensor([5.0]), torch.tensor([6.0])) == 0.0
    assert correlation(torch.tensor([]), torch.tensor([])) == 0.0


def test_log_loss_of_pairs():
    assert log_loss_of_pairs(torch.zeros(3)) == pytest.approx(math.log(2))
    delta = torch.tensor([math.log(3), -math.log(3)], dtype=torch.float64)
    assert log_loss_of_pairs(delta) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert log_loss_of_pairs(delta[:1]) == pytest.approx(-math.log(0.75))
    assert math.isnan(log_loss_of_pairs(torch.tensor([])))


def test_accuracy_of_pairs_counts_a_tie_half():
    assert accuracy_of_pairs(torch.tensor([0.1, 2.0, 0.0, -1.0])) == 0.625
    assert accuracy_of_pairs(torch.tensor([1.0, -1.0, -1.0])) == 1 / 3
    assert math.isnan(accuracy_of_pairs(torch.tensor([])))


def test_calibration_bins():
    # predicted .55 right, .55 wrong, a tie; .65 right; .95 right twice and wrong once, and one certainty, right
    deltas = [logit(0.55), -logit(0.55), 0.0, logit(0.65), logit(0.95), logit(0.95), -logit(0.95), 1000.0]
    bins = calibration_bins(torch.tensor(deltas, dtype=torch.float64))
    assert [(b["low"], b["high"], b["count"]) for b in bins] == [
        (0.5, 0.6, 3),
        (0.6, 0.7, 1),
        (0.7, 0.8, 0),
        (0.8, 0.9, 0),
        (0.9, 1.0, 4),
    ]
    filled = [bins[0], bins[1], bins[4]]
    assert [b["predicted"] for b in filled] == pytest.approx([1.6 / 3, 0.65, 3.85 / 4])
    assert [b["observed"] for b in filled] == pytest.approx([0.5, 1.0, 0.75])
    assert math.isnan(bins[2]["predicted"])
    assert math.isnan(bins[2]["observed"])


def test_calibration_error_weighs_bins_by_their_count():
    bins = [
        {"count": 3, "predicted": 0.55, "observed": 0.35},
        {"count": 0, "predicted": math.nan, "observed": math.nan},
        {"count": 1, "predicted": 0.9, "observed": 1.0},
    ]
    assert calibration_error(bins) == pytest.approx((3 * 0.2 + 0.1) / 4)
    assert math.isnan(calibration_error(bins[1:2]))


def test_a_lead_is_measured_pair_by_pair():
    # wins 1, 1, 0, .5 against 0, 1, 0, 1: differences 1, 0, 0, -.5, mean .125
    found = lead_of_pairs(torch.tensor([1.0, 2.0, -1.0, 0.0]), torch.tensor([-1.0, 1.0, -1.0, 3.0]), z=2.0)
    error = math.sqrt((0.875**2 + 2 * 0.125**2 + 0.625**2) / 3 / 4)
    assert found == pytest.approx((0.125, 0.125 - 2 * error, 0.125 + 2 * error))


def test_soft_labels_count_the_likelier_winner_and_a_half_is_a_tie():
    delta, p = torch.tensor([1.0, -1.0, 2.0, -3.0]), torch.tensor([0.9, 0.6, 0.5, 0.5])
    assert accuracy_of_pairs(delta, p) == (1 + 0 + 0.5 + 0.5) / 4
    assert expected_accuracy_of_pairs(delta, p) == pytest.approx((0.9 + 0.4 + 0.5 + 0.5) / 4)
    assert expected_accuracy_of_pairs(delta) == accuracy_of_pairs(delta) == 0.5
    losses = [p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d)) for d, p in zip(delta, p, strict=True)]
    assert log_loss_of_pairs(delta, p) == pytest.approx(sum(losses) / 4)
    # Right for sure, wrong for sure, tied twice: the other is wrong, right, right, wrong.
    found = lead_of_pairs(delta, torch.tensor([-1.0, 1.0, 1.0, -1.0]), p, z=2.0)
    error = math.sqrt((1 + 1) / 3 / 4)
    assert found == pytest.approx((0.0, -2 * error, 2 * error))


def test_scores_that_are_the_log_odds_of_soft_labels_are_calibrated():
    p = torch.tensor([0.55] * 3 + [0.8] * 5 + [0.5] * 2, dtype=torch.float64)
    bins = calibration_bins(torch.logit(p), probability=p)
    assert [b["count"] for b in bins] == [5, 0, 0, 5, 0] and calibration_error(bins) == pytest.approx(0, abs=1e-12)
    assert bins[3]["observed"] == pytest.approx(0.8)
    wrong = calibration_bins(-torch.logit(p), probability=p)
    assert wrong[3]["observed"] == pytest.approx(0.2)


# --- numbers that depend on each other


def test_students_quantile_against_the_table():
    for freedom, quantile in ((2, 4.303), (3, 3.182), (5, 2.571), (19, 2.093), (99, 1.984)):
        assert student_quantile(1.96, freedom) == pytest.approx(quantile, rel=0.01 if freedom == 2 else 1.5e-3)
    assert student_quantile(1.96, 1e9) == pytest.approx(1.96)


def test_the_error_of_a_clustered_mean_by_hand():
    """Clusters 1 1 0, 1, 0 0; mean 1/2. Without each: 1/3, 2/5, 3/4, off by -1/6, -1/10, 1/4; times sqrt(2/3)."""
    x, clusters = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), [7, 7, 7, 3, 5, 5]
    assert cluster_error(x, clusters) == pytest.approx(math.sqrt(2 / 3 * (1 / 36 + 1 / 100 + 1 / 16)))
    assert cluster_error(x, range(6)) == pytest.approx(mean_with_error(x)[1])
    assert cluster_error(x, [1] * 6) == math.inf
    assert effective_clusters(clusters) == 36 / (9 + 1 + 4) and effective_clusters([4, 4, 9, 9]) == 2


def test_an_interval_of_single_pairs_is_wilsons():
    x = torch.tensor([1.0] * 7 + [0.5] + [0.0] * 2)
    assert clustered_interval(x, range(10)) == (*wilson_interval(7.5, 10), 10)


def test_copies_within_a_cluster_add_nothing():
    """20 clusters of 9 equal numbers are worth 19 x (1.96 / t of 19 degrees)^2 independent ones, not 180."""
    x, clusters = torch.tensor([1.0] * 14 + [0.0] * 6).repeat_interleave(9), [n // 9 for n in range(180)]
    low, high, effective = clustered_interval(x, clusters)
    assert effective == pytest.approx(19 * (1.96 / 2.093) ** 2, rel=1e-3)
    assert (low, high) == wilson_interval(0.7 * effective, effective)
    assert clustered_interval(torch.ones(180), clusters) == (*wilson_interval(20, 20), 20)
    assert clustered_interval(torch.ones(36), [0] * 36) == (*wilson_interval(1, 1), 1)
    mixed = torch.tensor([1.0, 0.0]).repeat(90)  # no cluster says more than a pair of its own would
    assert clustered_interval(mixed, clusters)[2] <= 180


def test_random_scores_of_ranked_lists_clear_a_half_in_one_run_of_forty():
    """20 prompts x 9 responses, 720 pairs: Wilson's interval would be cleared three to five times as often."""
    draw = torch.Generator().manual_seed(0)
    one, other = torch.combinations(torch.arange(9)).T
    clusters = [n // 36 for n in range(720)]
    cleared = naive = 0
    for _ in range(1200):
        scores = torch.randn(20, 9, generator=draw)
        wins = (scores[:, one] > scores[:, other]).double().flatten()
        cleared += clustered_interval(wins, clusters)[0] > 0.5
        naive += wilson_interval(wins.sum().item(), 720)[0] > 0.5
    assert 0.014 <= cleared / 1200 <= 0.039  # 0.025 +- 3 standard errors
    assert naive / 1200 > 0.07


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_independent_pairs_are_covered_as_often_as_promised(rate):
    draw = torch.Generator().manual_seed(1)
    for clusters in (list(range(200)), [n // 5 for n in range(200)]):
        missed = 0
        for _ in range(600):
            low, high, _ = clustered_interval((torch.rand(200, generator=draw) < rate).double(), clusters)
            missed += not low <= rate <= high
        assert missed / 600 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)


def test_a_lead_on_clusters():
    """Three prompts twice: leads 1, 0, 0; the error is that of three, and t has two degrees of freedom."""
    delta, other = torch.tensor([1.0] * 6), torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    mean, low, high = lead_of_pairs(delta, other, None, [0, 0, 1, 1, 2, 2])
    error = math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2 / 3)
    assert mean == pytest.approx(1 / 3) and high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(4.303 * error, rel=0.01)
    assert lead_of_pairs(delta, other, None, [0] * 6) == (pytest.approx(1 / 3), -1.0, 1.0)
    assert lead_of_pairs(delta, other, None, range(6)) == lead_of_pairs(delta, other)


def test_calibration_bins_follow_their_edges():
    bins = calibration_bins(torch.tensor([math.log(3), -math.log(3), 3.0]).double(), edges=(0.5, 0.75, 1.0))
    assert [b["count"] for b in bins] == [0, 3]  # sigmoid(ln 3) = .75 belongs to the upper bin
    assert bins[1]["observed"] == pytest.approx(2 / 3)


def test_accuracy_by_length_difference():
    delta = torch.tensor([1.0, -1.0, 0.0, 2.0, -2.0, 5.0, 5.0])
    difference = torch.tensor([-5, -1, 0, 9, 10, 20, -11])  # the last two lie outside
    bins = accuracy_by_length_difference(delta, difference, (-10, 0, 5, 10))
    assert [(b["low"], b["high"], b["count"]) for b in bins] == [(-10, 0, 2), (0, 5, 1), (5, 10, 2)]
    assert [b["accuracy"] for b in bins] == [0.5, 0.5, 0.5]
    wide = accuracy_by_length_difference(delta, difference, (-math.inf, 0, 10, math.inf))
    assert [(b["count"], b["accuracy"]) for b in wide] == [(3, 2 / 3), (2, 0.75), (2, 0.5)]


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns + 7, returns) == pytest.approx(1.0)  # a constant error explains it all
    assert explained_variance(returns / 2, returns) == pytest.approx(0.75)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(torch.zeros(4), returns) == pytest.approx(0.0)


def test_explained_variance_of_what_does_not_vary_is_nan():
    constant = torch.full((3,), 0.1, dtype=torch.float64)
    assert math.isnan(explained_variance(torch.tensor([1.0, 2.0, 3.0]), constant))
    assert math.isnan(explained_variance(torch.zeros(0), torch.zeros(0)))


def test_distinct_runs_are_counted_over_all_sequences():
    """Tokens 1 2 1, 2: {1, 2} of 4. Pairs (1 2), (2 1): 2 of 2; runs of four: none."""
    sequences = [[1, 2, 1], [2], []]
    assert distinct_ngrams(sequences, 1) == 0.5 and distinct_ngrams(sequences, 2) == 1.0
    assert math.isnan(distinct_ngrams(sequences, 4))
    assert distinct_ngrams([[7, 7, 7, 7], [7, 7]], 2) == 0.25


def test_a_run_is_repeated_if_it_ended_shortly_before():
    said = [1, 2, 3, 1, 2, 3, 1, 2]  # 123 231 312 123 231 312: the last three repeat what ended 3 tokens before
    assert repeated_ngrams(said, 3, 64) == (3, 6) and repeated_ngrams(said, 3, 3) == (3, 6)
    assert repeated_ngrams(said, 3, 2) == (0, 6)
    assert repeated_ngrams([7] * 6, 3, 64) == (3, 4)  # overlapping runs count
    assert repeated_ngrams([1, 2, 3, 9, 9, 1, 2, 3], 3, 5) == (1, 6) and repeated_ngrams([1, 2], 3, 64) == (0, 0)
    far = [1, 2, 3, *range(10, 20), 1, 2, 3, 1, 2, 3]  # 123 13 tokens later, and then 3 later
    assert repeated_ngrams(far, 3, 10) == (1, 17) and repeated_ngrams(far, 3, 13) == (2, 17)


def test_a_response_is_shared_if_a_different_prompt_has_it():
    assert shared_response_rate(["a", "a", "b", "b", "c"], [1, 2, 3, 3, 4]) == 0.4  # "b" answers one prompt twice
    assert shared_response_rate(["a", "a", "a"], ["x", "y", "x"]) == 1.0 and shared_response_rate(["a"], ["x"]) == 0.0
