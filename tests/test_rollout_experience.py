"""Rollouts and what the roles say of them."""

from __future__ import annotations

import pytest
import torch

from stages.models.base import Base
from stages.models.heads import ScalarHead
from stages.models.outputs import read_targets
from stages.models.roles import Roles, new_adapter
from stages.rollout.experience import (
    collect_token_stats,
    lay_out,
    read_values,
    role_logprobs,
    role_values,
    rollout_kl,
    sample_rollout,
)
from stages.rollout.generate import Sampling, generate
from tests.marks import full
from tests.parts import in_passes_of, open_tiny_text, prompt_rows, random_adapter, roles_on, sequences_of

PROMPTS = prompt_rows(sequences_of([9, 3, 14, 6]))
KEYS = [(0, i) for i in range(4)]


@pytest.fixture(scope="module")
def text(model_folder):
    return open_tiny_text(model_folder("llama"))


@pytest.fixture
def roles(open_tiny):
    return roles_on(open_tiny("llama"))


def roll(roles, text, tokens=10, temperature=0.7):
    return sample_rollout(roles, "policy", text, PROMPTS, KEYS, Sampling(temperature, tokens))


# --- layout


def test_a_rollout_is_laid_out_by_response():
    prompts = prompt_rows([torch.tensor([5, 6, 7]), torch.tensor([8])])
    responses = [torch.tensor([9, 2]), torch.tensor([10, 11, 12])]
    rollout = lay_out(prompts, responses, ["a", "b"], torch.tensor([True, False]))
    assert [s.tolist() for s in rollout.sequences] == [[5, 6, 7, 9, 2], [8, 10, 11, 12]]
    assert [t.tolist() for t in rollout.targets] == [[False] * 3 + [True] * 2, [False] + [True] * 3]
    assert rollout.mask.tolist() == [[True, True, False], [True, True, True]]
    assert rollout.lengths == [2, 3] and rollout.sizes == [5, 4]


def test_lengths_and_sizes_are_counted_once():
    """A step looks them up for every row: counted anew each time, a batch of many short responses is quadratic."""
    rollout = lay_out(prompt_rows([torch.tensor([3, 4])]), [torch.tensor([5, 6, 2])], ["x"], torch.tensor([True]))
    assert (rollout.lengths, rollout.sizes) == ([3], [5])
    assert rollout.lengths is rollout.lengths and rollout.sizes is rollout.sizes


def test_responses_are_sampled_under_the_role_and_read_back(roles, text, monkeypatch):
    logits = roles.base.logits
    ends = torch.where(torch.arange(300) == 2, 5.5, 0.0)
    monkeypatch.setattr(roles.base, "logits", lambda hidden: logits(hidden) + ends)
    rollout = roll(roles, text, temperature=1.0)
    with roles.use("policy"):
        expected = generate(roles.base, [p.ids for p in PROMPTS], KEYS, text.stop_ids, Sampling(1.0, 10))
    assert [r.tolist() for r in rollout.responses] == [r.tolist() for r in expected]
    assert rollout.ended.tolist() == [r.tolist()[-1] == 2 for r in expected]
    assert rollout.ended.any()
    assert rollout.texts == [text.response_text(p.ids, r) for p, r in zip(PROMPTS, expected, strict=True)]
    assert rollout.prompts is PROMPTS
    bare = Roles(roles.base)
    bare.add("bare", None)
    other = sample_rollout(bare, "bare", text, PROMPTS, KEYS, Sampling(1.0, 10))
    assert [r.tolist() for r in other.responses] != [r.tolist() for r in expected]


def test_a_response_may_end_with_the_very_last_token_it_has_room_for(roles, text):
    whole = roll(roles, text, tokens=10).responses
    places = [r.tolist().index(int(r[9])) for r in whole]
    row = next(i for i, place in enumerate(places) if place == 9)
    text = open_tiny_text(roles.base.ref.base, stop_ids=(int(whole[row][9]),))
    rollout = roll(roles, text, tokens=10)
    assert len(rollout.responses[row]) == 10 and rollout.ended[row]
    assert rollout.ended.tolist() == [r.tolist()[-1] in text.stop_ids for r in rollout.responses]


# --- what roles say


@pytest.mark.parametrize("size", [1, *full(2, "auto")])
def test_numbers_come_back_in_the_batchs_order_however_it_was_cut(roles, text, size):
    rollout = roll(roles, text)
    logprobs, entropy = role_logprobs(in_passes_of(roles, size), "policy", rollout, 0.7, want_entropy=True)
    values = role_values(roles, "critic", "critic", rollout)
    assert logprobs.shape == entropy.shape == values.shape == rollout.mask.shape
    for row, (sequence, target) in enumerate(zip(rollout.sequences, rollout.targets, strict=True)):
        n = rollout.lengths[row]
        with torch.no_grad(), roles.use("policy"):
            alone = read_targets(roles.base, [sequence], [target], temperature=0.7, want_entropy=True)
        with torch.no_grad(), roles.use("critic"):
            value = read_values(roles, "critic", [sequence], [target])
        assert (logprobs[row, :n] - alone.logprobs).abs().max() <= 1e-5
        assert (entropy[row, :n] - alone.entropy).abs().max() <= 1e-5
        assert (values[row, :n] - value).abs().max() <= 1e-5
    assert not logprobs.requires_grad and not values.requires_grad


def test_off_the_mask_numbers_are_zero(roles, text):
    prompts = prompt_rows(sequences_of([4, 5]))
    responses = sequences_of([2, 6], seed=1)
    rollout = lay_out(prompts, responses, ["", ""], torch.tensor([False, False]))
    logprobs, entropy = role_logprobs(roles, "policy", rollout, 1.0, want_entropy=True)
    values = role_values(roles, "critic", "critic", rollout)
    for found in (logprobs, entropy, values):
        assert (found[0, 2:] == 0).all() and (found[rollout.mask] != 0).all()


def test_a_shared_critic_reads_the_policys_states(roles, text):
    roles.heads["shared"] = ScalarHead(roles.base.width).randomise(8)
    rollout = roll(roles, text)
    shared = role_values(roles, "policy", "shared", rollout)
    with torch.no_grad(), roles.use("policy"):
        first = roles.base.hidden([rollout.sequences[0]])[8]
    assert shared[0, 0].item() == pytest.approx(roles.heads["shared"](first).item(), abs=1e-5)


# --- what sampling knew


def passes_of(monkeypatch):
    """Rows of every forward pass over sampled responses."""
    seen, hidden = [], Base.hidden
    monkeypatch.setattr(Base, "hidden", lambda base, rows, *rest: seen.append(len(rows)) or hidden(base, rows, *rest))
    return seen


def test_what_sampling_knew_is_kept_where_a_spot_check_agrees(roles, text, monkeypatch):
    """One response of four is read again; log-probabilities, entropies and values are those of a whole pass."""
    rollout = sample_rollout(roles, "policy", text, PROMPTS, KEYS, Sampling(0.7, 10), head="critic")
    logprobs, entropy = role_logprobs(roles, "policy", rollout, 0.7, want_entropy=True)
    values = role_values(roles, "policy", "critic", rollout)
    seen = passes_of(monkeypatch)
    known, apart = collect_token_stats(roles, rollout, 0.7, head="critic")
    assert seen == [1] and 0 <= apart <= 1e-5
    for kept, again in zip((known.logprobs, known.entropy, known.values), (logprobs, entropy, values), strict=True):
        assert (kept - again).abs().max() <= 2e-5


def test_what_sampling_knew_is_read_again_where_it_is_off(roles, text, monkeypatch):
    rollout = roll(roles, text)
    logprobs, entropy = role_logprobs(roles, "policy", rollout, 0.7, want_entropy=True)
    values = role_values(roles, "policy", "critic", rollout)
    rollout.sampled_stats.logprobs[0, 3] -= 0.01  # as if sampling had computed in half precision
    seen = passes_of(monkeypatch)
    known, apart = collect_token_stats(roles, rollout, 0.7, head="critic")
    assert seen == [1, 4, 4] and apart == pytest.approx(0.01, abs=1e-5)
    assert torch.equal(known.logprobs, logprobs) and torch.equal(known.entropy, entropy)
    assert torch.equal(known.values, values)


# --- KL to the reference


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_before_the_first_update_kl_is_exactly_zero(open_tiny, text, architecture):
    """Check 2: a fresh policy adapter (B = 0) against the base alone."""
    base = open_tiny(architecture)
    roles = Roles(base)
    roles.add("policy", new_adapter(base, 8, None, [], seed=0))
    roles.add("reference", None)
    rollout = roll(roles, text)
    assert rollout_kl(roles, rollout, 0.7).tolist() == [0.0] * 4


def test_an_unmerged_sft_adapter_is_its_own_reference_and_not_the_bare_base(roles, text):
    """Check 3: KL to the frozen copy of the SFT adapter is 0, to the base with adapters off it is not."""
    rollout = roll(roles, text)
    assert rollout_kl(roles, rollout, 0.7).tolist() == [0.0] * 4
    roles.add("reference", None)
    kl = rollout_kl(roles, rollout, 0.7)
    assert kl.mean() > 1e-3 and kl.abs().min() > 1e-3


def test_kl_is_the_sum_of_log_ratios_over_the_response(roles, text):
    roles.add("reference", random_adapter(roles.base, 9))
    rollout = roll(roles, text)
    kl = rollout_kl(in_passes_of(roles, 2), rollout, 0.7)
    policy, _ = role_logprobs(roles, "policy", rollout, 0.7)
    reference, _ = role_logprobs(roles, "reference", rollout, 0.7)
    for row, n in enumerate(rollout.lengths):
        assert kl[row].item() == pytest.approx(float((policy - reference)[row, :n].sum()), abs=1e-4)
