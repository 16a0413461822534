"""Comparisons as tokens and the report on how well scores predict them."""

from __future__ import annotations

import math

import pytest
import torch

from stages import ppo, reward
from stages.data.comparisons import Comparison, Pair
from stages.inputs import Inputs
from stages.maths.statistics import wilson_interval
from stages.models.model_ref import open_model
from stages.models.outputs import sequence_scores
from stages.models.roles import Roles
from stages.models.tokens import TokenRow
from stages.rollout.experience import lay_out, role_values
from stages.rollout.reward_sources import RewardSources
from stages.rollout.reward_specs import open_rewards
from stages.tables import comparison_tables
from stages.training.comparing import (
    TokenComparison,
    build_comparison_report,
    ceiling,
    clusters_of,
    encode_comparison,
    pair_sums,
    pairs_of,
    score_rows,
)
from tests.parts import (
    in_passes_of,
    open_tiny_text,
    ppo_config,
    prompt_rows,
    publish_checkpoint,
    random_adapter,
    random_head,
    roles_on,
    sequences_of,
    session_of,
    token_comparisons,
    token_rows,
)


def row(length, response):
    """A row whose targets are its last `response` tokens."""
    return TokenRow(torch.arange(length), torch.arange(length) >= length - response, False)


def test_a_comparison_knows_its_size_its_cut_and_its_best(model_folder):
    text = open_tiny_text(model_folder("llama"))
    found = encode_comparison(Comparison("c:1", "the cat", (" ran", " sat on"), (Pair(1, 0, 0.9, 2.0),)), text, 100)
    assert found.pairs == (Pair(1, 0, 0.9, 2.0),) and found.best is found.responses[1]
    assert found.size == len(found.responses[0].ids) + len(found.responses[1].ids) and not found.cut
    assert encode_comparison(Comparison("c:1", "the cat", (" ran", " sat on"), (Pair(1, 0),)), text, 4).cut


@pytest.mark.parametrize("size", [1, 2, "auto"])
def test_scores_come_in_the_order_of_the_rows(open_tiny, size):
    roles = roles_on(open_tiny("gpt2"))
    rows = token_rows()
    with torch.no_grad(), roles.use("reward"):
        expected = torch.stack([sequence_scores(roles, "reward", [r.ids])[0] for r in rows])
    found = score_rows(in_passes_of(roles, size), "reward", rows)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert (found - expected).abs().max() <= 1e-5


def test_the_report_by_hand():
    """Three prompts, five pairs; scores and response lengths are made up so that every number can be worked out."""
    comparisons = [
        TokenComparison([row(9, 3), row(9, 5)], (Pair(0, 1),)),
        TokenComparison([row(9, 4), row(9, 1)], (Pair(1, 0),)),
        TokenComparison([row(9, 2), row(9, 6), row(9, 7)], (Pair(0, 1), Pair(0, 2), Pair(2, 1))),
    ]
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, 3.0, 1.0, 1.0])
    found = build_comparison_report(scores, comparisons)
    leads = [1.0, -0.5, 2.0, 2.0, 0.0]
    assert found["pairs"] == 5 and found["accuracy"] == 0.7  # three wins and a tie
    assert found["accuracy_low"] < 0.7 < found["accuracy_high"]
    assert found["log_loss"] == pytest.approx(sum(math.log1p(math.exp(-x)) for x in leads) / 5)
    assert found["margin_mean"] == pytest.approx(0.9)
    assert found["margin_std"] == pytest.approx(math.sqrt(sum((x - 0.9) ** 2 for x in leads) / 5))
    assert found["score_chosen_mean"] == pytest.approx((2.0 + 0.0 + 3.0 + 3.0 + 1.0) / 5)
    assert found["score_rejected_mean"] == pytest.approx((1.0 + 0.5 + 1.0 + 1.0 + 1.0) / 5)
    # Preferred minus rejected, in response tokens: -2, -3, -4, -5, 1.
    assert found["longer_wins_accuracy"] == 0.2
    lengths = torch.tensor([3.0, 5.0, 4.0, 1.0, 2.0, 6.0, 7.0])
    assert found["score_length_corr"] == pytest.approx(torch.corrcoef(torch.stack([scores, lengths]))[0, 1].item())
    won = torch.tensor([1.0] * 5 + [0.0] * 5)  # of each side of each pair, with its length
    sides = torch.tensor([3.0, 1.0, 2.0, 2.0, 7.0, 5.0, 4.0, 6.0, 7.0, 6.0])
    assert found["label_length_corr"] == pytest.approx(torch.corrcoef(torch.stack([won, sides]))[0, 1].item())
    assert found["confidence"] == pytest.approx(sum(1 / (1 + math.exp(-abs(x))) for x in leads) / 5)
    assert found["agreement_ceiling"] == 1.0
    counts = {(b["low"], b["high"]): (b["count"], b["accuracy"]) for b in found["by_length_difference"] if b["count"]}
    assert counts == {(-10, 0): (4, 0.75), (0, 10): (1, 0.5)}
    assert sum(b["count"] for b in found["calibration"]) == 5


def test_the_best_response_wins_most():
    rows = [row(9, n) for n in (1, 2, 3)]
    assert TokenComparison(rows[:2], (Pair(0, 1, 0.3),)).best is rows[1]
    pair = [row(9, 1), row(10, 2)]
    tie, turned = (TokenComparison(both, (Pair(0, 1, 0.5),)) for both in (pair, pair[::-1]))
    assert tie.best is turned.best  # whichever way round it is written
    ranked = TokenComparison(rows, (Pair(0, 1), Pair(2, 0), Pair(2, 1)))  # the first pair is not of the best
    assert ranked.best is rows[2]


def soft(probability: list[float]) -> list[TokenComparison]:
    lengths = [(3, 5), (4, 1), (6, 2), (2, 8)]
    both = zip(lengths, probability, strict=True)
    return [TokenComparison([row(9, a), row(9, b)], (Pair(0, 1, p),)) for (a, b), p in both]


SOFT, SOFT_SCORES = [0.9, 0.2, 0.3, 0.5], torch.tensor([2.0, 1.0, 0.0, 0.5, 1.0, 3.0, 4.0, 1.0])


def test_the_report_on_soft_labels_by_hand():
    """Each pair is ranked by its likelier winner; the last is a tie, and the model is sure of it."""
    found = build_comparison_report(SOFT_SCORES, soft(SOFT))
    leads = [(1.0, 0.9), (0.5, 0.8), (2.0, 0.7), (3.0, 0.5)]  # of the likelier one, and how likely
    assert found["accuracy"] == 3.5 / 4 and found["pairs"] == 4
    assert found["expected_accuracy"] == pytest.approx(found["agreement_ceiling"]) == pytest.approx(2.9 / 4)
    assert found["log_loss"] == pytest.approx(
        sum(p * math.log1p(math.exp(-x)) + (1 - p) * math.log1p(math.exp(x)) for x, p in leads) / 4
    )
    # The tie is half a pair each way: 4 - 1 and 1 - 4, 4 and 1 chosen, 1 and 4 rejected.
    assert found["margin_mean"] == pytest.approx((1 + 0.5 + 2) / 4)
    assert found["margin_std"] == pytest.approx(math.sqrt((1 + 0.25 + 4 + 9) / 4 - 0.875**2))
    assert found["score_chosen_mean"] == pytest.approx((2 + 0.5 + 3 + 2.5) / 4)
    assert found["score_rejected_mean"] == pytest.approx((1 + 0 + 1 + 2.5) / 4)
    assert found["longer_wins_accuracy"] == (0 + 0 + 0 + 0.5) / 4
    assert sum(b["count"] for b in found["by_length_difference"]) == 3
    assert found["calibration_error"] == pytest.approx(
        # .5 is 62 % sure and .8 is expected; 1.0 73 % and .9; 2.0 88 % and .7; 3.0 95 % and .5
        sum(abs(1 / (1 + math.exp(-x)) - p) for x, p in leads) / 4
    )


def test_which_response_a_soft_label_calls_chosen_does_not_matter():
    """The same judgements with chosen and rejected exchanged: the tie too."""
    order = [1, 0, 3, 2, 5, 4, 7, 6]
    turned = [TokenComparison(c.responses[::-1], (Pair(0, 1, 1 - p),)) for c, p in zip(soft(SOFT), SOFT, strict=True)]
    one, other = build_comparison_report(SOFT_SCORES, soft(SOFT)), build_comparison_report(SOFT_SCORES[order], turned)
    for name, value in one.items():
        expected = pytest.approx(value, abs=1e-12) if isinstance(value, float) else value
        assert isinstance(value, list) or other[name] == expected, name


def test_labels_that_are_all_ties_say_nothing():
    found = build_comparison_report(torch.tensor([2.0, 1.0, 0.0, 0.5]), soft([0.5, 0.5, 0.5, 0.5])[:2])
    assert (found["accuracy"], found["expected_accuracy"], found["longer_wins_accuracy"]) == (0.5, 0.5, 0.5)
    assert found["margin_mean"] == 0 and found["score_chosen_mean"] == found["score_rejected_mean"] == 0.875
    assert found["label_length_corr"] == 0 and found["ties"] == 2


def test_a_steps_metrics_mean_what_the_reports_do():
    comparisons = [*soft(SOFT), TokenComparison([row(9, n) for n in (1, 2, 3)], (Pair(1, 0), Pair(2, 0), Pair(2, 1)))]
    scores = torch.cat([SOFT_SCORES, torch.tensor([0.3, -0.2, 0.9])])
    sums, report = (
        pair_sums(torch.tensor(0.7), scores, pairs_of(comparisons)),
        build_comparison_report(scores, comparisons),
    )
    assert sums["pairs"] == report["pairs"] == 7 and sums["loss"] == pytest.approx(0.7)
    names = {"accuracy": "accuracy", "margin": "margin_mean"}
    names |= {"score_chosen": "score_chosen_mean", "score_rejected": "score_rejected_mean"}
    for mine, theirs in names.items():
        assert sums[mine] / 7 == pytest.approx(report[theirs], abs=1e-6), mine


def response(prompt: list[int], *tokens: int) -> TokenRow:
    ids = torch.tensor([*prompt, *tokens])
    return TokenRow(ids, torch.arange(len(ids)) >= len(prompt), False)


def test_pairs_of_one_prompt_are_one_cluster_in_whatever_rows_they_stand(model_folder):
    text = open_tiny_text(model_folder("llama"))
    three = (Pair(0, 1), Pair(0, 2), Pair(1, 2))
    rows = [
        Comparison("c:1", "the cat", (" a", " b", " c"), three),
        Comparison("c:2", "the dog", (" a", " b"), (Pair(0, 1),)),
        Comparison("c:3", "Human: the cat\n\nAssistant:", (" d", " e"), (Pair(0, 1),)),
        Comparison("c:4", "the sun", (" a", " b"), (Pair(0, 1),)),
    ]
    assert clusters_of([encode_comparison(row, text, 100) for row in rows]) == [0, 0, 0, 1, 0, 2]
    bare = [TokenComparison([response([n], 1), response([n], 2)], (Pair(0, 1),)) for n in (5, 6, 5, 7)]
    assert clusters_of(bare) == [0, 1, 0, 2]


def test_a_single_prompts_rows_are_apart_unless_they_share_a_response():
    """1 and 2, 2 and 3, 5 and 3 hang together; 6 and 7 do not."""
    pairs = [(1, 2), (6, 7), (2, 3), (5, 3), (8, 9)]
    rows = [TokenComparison([response([4], a), response([4], b)], (Pair(0, 1),)) for a, b in pairs]
    assert clusters_of(rows) == [0, 1, 0, 0, 2]


def test_the_reports_interval_counts_prompts():
    """Five prompts, each right on all of its three pairs or wrong on all: 15 pairs, worth fewer than five."""
    pairs = (Pair(0, 1), Pair(0, 2), Pair(1, 2))
    rows = [TokenComparison([response([n, 4], k) for k in (1, 2, 3)], pairs) for n in range(5)]
    found = build_comparison_report(torch.tensor([3.0, 2.0, 1.0] * 4 + [1.0, 2.0, 3.0]), rows)
    assert (found["pairs"], found["clusters"], found["accuracy"]) == (15, 5, 0.8)
    worth = 4 * (1.96 / 2.776) ** 2  # (5 - 1) x (z / t of 4 degrees)^2
    assert found["effective_pairs"] == pytest.approx(worth, rel=2e-3)
    low, high = wilson_interval(0.8 * worth, worth)
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((low, high), abs=1e-3)
    assert ("held-out pairs", "15 of 5 prompts") in comparison_tables(found, "reward model")[0].rows


def test_the_ceiling_of_uncertain_labels():
    assert ceiling([1.0, 0.8, 0.3, 0.5]) == pytest.approx((1 + 0.8 + 0.7 + 0.5) / 4)


def test_the_report_is_shown_without_empty_bins():
    comparisons = [TokenComparison([row(99, 90), row(99, 5)], (Pair(0, 1),))]
    report = build_comparison_report(torch.tensor([1.0, -1.0]), comparisons)
    summary, calibration, by_length = comparison_tables(report, "reward model")
    assert ("held-out pairs", "1") in summary.rows
    assert dict(summary.rows)["accuracy [95 % interval]"].startswith("1.000 [0.207, 1.000]")
    assert calibration.rows == (("0.80-0.90", "1", "0.881", "1.000"),)
    assert by_length.rows == (("50 or more", "1", "1.000"),)


# --- the bias of a reward model, and the critic that starts from it


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_served_scores_of_demonstrations_have_mean_0_and_the_critic_begins_there(open_tiny, tmp_path, architecture):
    """Check 45: after centring, saving and loading, demonstrations score 0 on average, through PPO's own sources.

    The critic of a PPO run on that checkpoint gives the same numbers at its start, bias included.
    """
    base = open_tiny(architecture)
    trained = Roles(base)
    trained.add("reward", random_adapter(base, 1), random_head(base.width, 2, bias=1.7))
    demonstrations = [c.best for c in token_comparisons()]
    before = score_rows(trained, "reward", demonstrations)
    assert abs(before.mean()) > 0.1
    reward.centre(trained, demonstrations)
    folder = publish_checkpoint(
        tmp_path / "reward", base, "reward", trained.adapters["reward"], head=trained.heads["reward"]
    )
    sft = publish_checkpoint(tmp_path / "sft", base, "sft", random_adapter(base, 3))
    source = open_model(str(sft), stages=("sft",), what="--model")
    specs = open_rewards([str(folder)], source)
    session = session_of(ppo_config(), Roles(base))
    session.inputs = Inputs(source, rewards=specs)
    ppo.open_roles(session)
    roles = session.roles
    # A demonstration as prompt and response; the score is read at its last token, the value there too.
    splits = [int(r.targets.nonzero()[0]) for r in demonstrations]
    prompts = prompt_rows([r.ids[:at] for r, at in zip(demonstrations, splits, strict=True)])
    responses = [r.ids[at:] for r, at in zip(demonstrations, splits, strict=True)]
    ended = torch.tensor([False] * len(responses))
    served = RewardSources(specs, roles).score(prompts, responses, [""] * len(responses), ended)
    assert abs(served.mean().item()) <= 1e-5
    assert (served - (before - before.mean())).abs().max() <= 1e-5
    longer = [torch.cat([r, r[:1]]) for r in responses]  # the value before one token more is the score of the rest
    rollout = lay_out(prompts, longer, [""] * len(longer), ended)
    values = role_values(roles, "critic", "critic", rollout)
    last = torch.stack([values[i, len(r)] for i, r in enumerate(responses)])
    assert (last - served).abs().max() <= 1e-5
    assert all(p.requires_grad for p in roles.parameters("critic"))
    assert not any(p.requires_grad for p in (*roles.parameters("reward"), *roles.parameters("reference")))


def test_without_a_reward_model_the_critic_begins_at_zero_on_the_policys_trunk(open_tiny, tmp_path):
    base = open_tiny("llama")
    sft = publish_checkpoint(tmp_path / "sft", base, "sft", random_adapter(base, 3))
    source = open_model(str(sft), stages=("sft",), what="--model")
    (tmp_path / "f.py").write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    session = session_of(ppo_config(), Roles(base))
    session.inputs = Inputs(source, rewards=open_rewards([str(tmp_path / "f.py")], source))
    ppo.open_roles(session)
    roles = session.roles
    rollout = lay_out(prompt_rows(sequences_of([4])), sequences_of([5]), [""], torch.tensor([False]))
    assert role_values(roles, "critic", "critic", rollout).abs().max() == 0
    policy, critic = roles.adapters["policy"], roles.adapters["critic"]
    for one, other in zip(policy.parameters(), critic.parameters(), strict=True):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
