"""The rules that a reward model has to beat, on pairs worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stages.data.comparisons import Pair
from stages.diagnostics.baselines import baselines, response_key, win_shares
from stages.models.tokens import TokenRow
from stages.training.comparing import TokenComparison

PROMPTS = ([9, 8], [9], [7, 7, 7])


def row(prompt: list[int], response: list[int]) -> TokenRow:
    ids = torch.tensor(prompt + response)
    return TokenRow(ids, torch.arange(len(ids)) >= len(prompt), False)


def compare(prompt: list[int], better: list[int], worse: list[int], **about: float) -> TokenComparison:
    return TokenComparison([row(prompt, better), row(prompt, worse)], (Pair(0, 1, **about),))


A, B, C, D = [1], [2, 2], [3, 3, 3], [4]


def test_a_response_is_known_again_after_another_prompt():
    assert response_key(row([5, 6], A)) == response_key(row([9], A)) == (1,)


def test_shares_of_wins():
    train = [compare(PROMPTS[0], A, B), compare(PROMPTS[1], A, C), compare(PROMPTS[2], B, A, probability=0.75)]
    # A wins 1 + 1 + .25 of 3, B 0 + .75 of 2, C 0 of 1; each with one more win in two more.
    assert win_shares(train) == {(1,): 3.25 / 5, (2, 2): 1.75 / 4, (3, 3, 3): 1 / 3}


def test_a_lead_is_as_sure_as_its_prompts_allow():
    """The same three prompts and leads, once and with every row four times."""
    once = [compare(prompt, A, B) for prompt in PROMPTS]
    scores = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    found = [baselines(scores.repeat(n), once * n, [])["shorter wins"] for n in (1, 4)]
    assert found[0]["lead"] == pytest.approx(found[1]["lead"]) == pytest.approx(-1 / 3)
    assert found[1]["lead_high"] - found[1]["lead_low"] > found[0]["lead_high"] - found[0]["lead_low"]  # t, not z


def test_rules_on_soft_labels():
    """The second response is the likelier one; a label of a half is a tie for every rule and for the model."""
    held = [
        compare(PROMPTS[0], A, B, probability=0.2), compare(PROMPTS[1], B, C, probability=0.1),
        compare([5], A, C, probability=0.5), compare([6], C, A, probability=0.5),
    ]  # fmt: skip
    train = [compare(PROMPTS[0], A, B, probability=0.25)]  # B won 3/4 of a pair
    scores = torch.tensor([0.0, 1.0] * 4)
    found = baselines(scores, held, train)
    assert found["longer wins"]["accuracy"] == (1 + 1 + 0.5 + 0.5) / 4
    assert found["shorter wins"]["accuracy"] == (0 + 0 + 0.5 + 0.5) / 4
    assert found["majority"]["accuracy"] == (1 + 0 + 0.5 + 0.5) / 4  # B over A; B over unseen C
    assert found["longer wins"]["lead"] == 0 and found["majority"]["lead"] == 0.25


def test_rules_by_hand():
    train = [compare(PROMPTS[0], A, B), compare(PROMPTS[1], A, C), compare(PROMPTS[2], B, C)]
    held = [compare(PROMPTS[1], A, C), compare(PROMPTS[2], C, B), compare(PROMPTS[0], A, D), compare([5], B, D)]
    # A .75, B .5, C .25, D unseen .5.  majority: right, wrong, right, tie.  Lengths: -2, +1, 0, +1.
    scores = torch.tensor([1.0, 0.0] * 3 + [0.0, 1.0])  # right but for the last
    found = baselines(scores, held, train)
    assert [found[name]["accuracy"] for name in ("longer wins", "shorter wins", "majority")] == [0.625, 0.375, 0.625]
    # Model minus majority, pair by pair: 0, 1, 0, -.5; mean .125, deviation sqrt(.396), error that / 2.
    lead = found["majority"]
    spread = math.sqrt(sum((x - 0.125) ** 2 for x in (0, 1, 0, -0.5)) / 3) / 2
    assert lead["lead"] == pytest.approx(0.125)
    assert (lead["lead_low"], lead["lead_high"]) == pytest.approx((0.125 - 1.96 * spread, 0.125 + 1.96 * spread))
    assert found["longer wins"]["lead"] == pytest.approx(0.75 - 0.625)
