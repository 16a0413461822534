"""Built-in scores of texts: equality, patterns, templates, length, and overlap with a reference."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest

from stages.builtin import texts
from stages.builtin.overlap import bleu_score, chrf_score, rouge_score
from stages.builtin.texts import exact_score, format_score, length_score, read_template, regex_score


@pytest.mark.parametrize(
    ("response", "reference", "score"),
    [
        (" Paris\n", "paris", 1),
        ("New  York", "new york", 1),
        ("ＡＢＣ", "abc", 1),
        ("Paris.", "Paris", 0),
        ("", "a", 0),
    ],
)
def test_exact_ignores_case_spacing_and_width(response, reference, score):
    assert exact_score(response, ("other", reference)) == score


def test_a_pattern_is_searched_for_anywhere():
    assert regex_score("it is YES indeed", "(?i)yes") == 1 and regex_score("no", "yes") == 0
    assert regex_score("yes, but", r"^yes$") == 0 and regex_score("a\nb", r"(?s)a.b") == 1


def test_a_catastrophic_pattern_ends_in_time(monkeypatch):
    monkeypatch.setattr(texts, "MATCH_SECONDS", 0.1)
    started = time.monotonic()
    assert regex_score("a" * 200 + "b", r"^(a|a|aa)+$") == 0
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>one and one</think> two", 1),
        ("\n<think>\na\n</think>\n\nb\n", 1),
        ("<think></think> two", 0),  # nothing between the marks
        ("<think>a</think>  ", 0),  # no answer
        ("so <think>a</think> b", 0),  # text before the first mark
        ("<think>a <think>b</think> c", 0),  # a mark twice
        ("</think>a<think> b", 0),
        ("two", 0),
    ],
)
def test_thinking_comes_before_an_answer(response, score):
    assert format_score(response, read_template("<think>...</think>...")) == score


def test_a_template_may_begin_or_end_with_a_gap():
    closed = read_template("<think>…</think><answer>…</answer>")
    assert format_score("<think>a</think>\n<answer>b</answer>", closed) == 1
    assert format_score("<think>a</think>\n<answer>b</answer> c", closed) == 0
    assert format_score("a</think>b", read_template("...</think>...")) == 1
    with pytest.raises(ValueError, match="no text"):
        read_template("...")
    with pytest.raises(ValueError, match="one text twice"):
        read_template("a...a")


def test_length_is_the_ratio_to_the_target():
    assert [length_score(n, 100) for n in (0, 50, 100, 200)] == [0, 0.5, 1, 0.5]


# --- overlap: formulas of the papers, on word lists


def lcs(a: list[str], b: list[str]) -> int:
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    one, other = ["the", "cat", "sat", "on", "the", "mat"], ["a", "cat", "lay", "on", "the", "old", "mat"]
    common = lcs(one, other)  # cat on the mat
    p, r = common / len(one), common / len(other)
    assert common == 4
    assert rouge_score(" ".join(one), ("x", " ".join(other)), "rougeL") == pytest.approx(2 * p * r / (p + r))


def test_rouge_of_ascii_is_that_of_the_library_and_chinese_counts_characters():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge2"])
    one, other = "It's 3 o'clock, Mr. X_y!", "it s three o'clock x y"
    assert rouge_score(one, (other,), "rouge2") == pytest.approx(scorer.score(other, one)["rouge2"].fmeasure)
    assert rouge_score("我爱北京", ("我爱上海",), "rouge1") == pytest.approx(0.5)


def test_bleu_is_the_geometric_mean_of_precisions_with_the_brevity_penalty():
    pytest.importorskip("sacrebleu")
    one, other = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "sat", "on", "the", "red", "mat"]
    logs = []
    for n in range(1, 5):
        mine, theirs = (Counter(tuple(w[i : i + n]) for i in range(len(w) - n + 1)) for w in (one, other))
        logs.append(math.log(sum((mine & theirs).values()) / sum(mine.values())))
    expected = math.exp(sum(logs) / 4) * math.exp(1 - 7 / 6)
    assert bleu_score(" ".join(one), (" ".join(other),)) == pytest.approx(expected)
    assert bleu_score("我爱北京天安门", ("我爱北京天安门",)) == pytest.approx(1)


def test_chrf_is_the_f2_of_character_ngrams():
    pytest.importorskip("sacrebleu")
    one, other = "cats", "cat"
    precisions, recalls = [], []
    for n in range(1, 7):
        mine, theirs = (Counter(w[i : i + n] for i in range(len(w) - n + 1)) for w in (one, other))
        if mine and theirs:  # orders that both have
            shared = sum((mine & theirs).values())
            precisions.append(shared / sum(mine.values()))
            recalls.append(shared / sum(theirs.values()))
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    assert chrf_score(one, (other,)) == pytest.approx(5 * p * r / (4 * p + r))
