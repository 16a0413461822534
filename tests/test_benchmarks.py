"""The learning benchmark's own arithmetic: the gold reward, the noisy judge, and what is read off the paths."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def learning(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import learning

    return learning


@pytest.fixture
def outcomes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import outcomes

    return outcomes


def test_gold_counts_words_once_per_sentence_and_holds_a_sentence_at_two(outcomes):
    assert outcomes.cheerfulness("She was happy. He was sad.") == 0
    assert outcomes.cheerfulness("Happy happy happy!") == 1
    assert outcomes.cheerfulness("A happy, kind, brave friend. The end.") == 1  # (2 + 0) / 2
    assert outcomes.cheerfulness("Sad and lost and cold! He cried") == -1.5  # (-2 - 1) / 2
    assert outcomes.cheerfulness(" ... ") == 0


def test_the_judge_prefers_the_better_response_as_often_as_bradley_and_terry_say(learning, tmp_path):
    drawn, pairs = tmp_path / "drawn.jsonl", tmp_path / "pairs.jsonl"
    rows = [{"prompt": str(i), "response": text} for i in range(2000) for text in ("Happy. No.", "No.", "x", "")]
    learning.write_rows(drawn, rows)
    ceiling = learning.judge_pairs(drawn, 0, pairs)
    judged = learning.read_rows(pairs)
    better = sum(row["chosen"] == "Happy. No." for row in judged) / len(judged)
    chance = 1 / (1 + math.exp(-4 * 0.5))
    assert len(judged) == 2000  # an empty response is compared with nothing
    assert abs(better - chance) < 4 * math.sqrt(chance * (1 - chance) / 2000)
    assert ceiling == pytest.approx((chance + 0.5) / 2)


def path(outcomes, method, seed, *triples):
    rest = {"proxy": 0.0, "length": 1.0, "distinct_1": 1.0, "distinct_2": 1.0, "duplicates": 0.0}
    return [
        outcomes.Point(method, seed, i, seconds, kl, gold=gold, **rest) for i, (seconds, kl, gold) in enumerate(triples)
    ]


def test_gold_is_read_where_a_path_first_reaches_a_kl(outcomes):
    points = path(outcomes, "ppo", 0, (0, 0, 0.0), (10, 2, 1.0), (20, 6, 2.0), (30, 3, 5.0), (40, 7, 9.0))
    assert outcomes.interpolate(points, "kl", 4, "gold") == 1.5
    assert outcomes.interpolate(points, "seconds", 25, "gold") == 3.5
    assert outcomes.interpolate(points, "kl", 8, "gold") is None


def test_methods_are_compared_over_the_seeds_that_got_there(outcomes):
    points = path(outcomes, "ppo", 0, (0, 0, 0.0), (10, 4, 1.0)) + path(outcomes, "ppo", 1, (0, 0, 0.0), (10, 4, 3.0))
    points += path(outcomes, "ppo", 2, (0, 0, 0.0), (10, 1, 9.0))
    (row,) = outcomes.at_equal(points, "kl", (2.0, 9.0))
    # golds 0.5 and 1.5: mean 1, sample deviation sqrt(0.5), standard error 0.5, times Student's 12.706
    assert row["2"] == {"gold": 1.0, "width": pytest.approx(12.706 * 0.5), "seeds": 2}
    assert row["9"]["seeds"] == 0


def test_what_is_kept_is_the_proxys_favourite_within_the_limit(outcomes):
    points = [
        outcomes.Point("dpo", 0, 1, 1.0, kl, proxy, gold, 1.0, 1.0, 1.0, 0.0)
        for kl, proxy, gold in ((12.0, 9.0, 3.0), (2.0, 1.0, 2.0), (8.0, 5.0, 1.0))
    ]
    assert [point.gold for point in outcomes.best_within(points, 10)["dpo"]] == [1.0]


def test_tables_and_pictures_hold_every_method(outcomes):
    points = path(outcomes, "ppo", 0, (0, 0, 0.0), (10, 4, 1.25)) + path(outcomes, "ppo", 1, (0, 0, 0.0), (10, 4, 1.75))
    best_of = {s: [{"n": n, "kl": 0.5, "score": 2.0, "gold": 0.75, "length": 9.0} for n in (1, 2)] for s in (0, 1)}
    names = ("accuracy", "accuracy_low", "accuracy_high", "longer_wins_accuracy", "pairs", "ceiling", "seconds")
    found = outcomes.summarise(points, best_of, dict.fromkeys((0, 1), dict.fromkeys(names, 0.5)), [0, 1])
    text = outcomes.tables(json.loads(json.dumps(found)))
    assert "| best of 2 | 0.750 ± 0.000 |" in text
    # At 4 nats, 1.25 and 1.75: standard error 0.25, times 12.706, of two seeds.
    (row,) = [line for line in text.partition("4 nats")[2].splitlines() if line.startswith("| ppo |")][:1]
    assert row.split(" | ")[2] == "1.500 ± 3.176 (2)"
    assert outcomes.draw(points, best_of, "gold", "x").count("polyline") >= 4
