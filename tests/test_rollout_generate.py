"""Sampling: the law it follows, and that a response is a function of its prompt and its noise alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from stages.errors import NotFiniteError
from stages.maths.tensors import entropy_of
from stages.models.outputs import read_targets
from stages.models.roles import Roles
from stages.rollout import generate as sampling
from stages.rollout.generate import Sampling, compute_log_probs, generate
from stages.training.seeds import noise
from tests.marks import full, full_but
from tests.parts import PACKING, random_adapter, sequences_of, whole_model

PROMPTS = sequences_of([9, 3, 14, 6])
KEYS = [(0, "row", i) for i in range(4)]
NEVER = (10**6,)  # a stop token that is not in the vocabulary


def draw(logits, uniform, temperature, top_p=1.0):
    """A draw from logits."""
    return sampling.draw(compute_log_probs(logits, temperature), uniform, temperature, top_p)


def spy(base, monkeypatch):
    """Records the logits that sampling reads, step by step, each (rows in the cache, V)."""
    seen, logits = [], base.logits
    monkeypatch.setattr(base, "logits", lambda hidden: seen.append(logits(hidden)) or seen[-1])
    return seen


def as_lists(responses):
    return [r.tolist() for r in responses]


# --- one draw


def test_draws_follow_the_tempered_law_that_the_trainer_computes():
    """Check 22: 50,000 draws from five tokens at temperature 0.7 against the trainer's log-probabilities, chi squared.

    18.47 is what four degrees of freedom exceed once in a thousand times. Negative: untempered ones do not match.
    """
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -2.5])
    n = 50_000
    tokens = draw(logits.expand(n, 5), noise([("seed", 1)], n)[0], 0.7)
    counts = torch.bincount(tokens, minlength=5)
    # A stub whose states are the logits: what remains is the trainer's own reading of them.
    stub = SimpleNamespace(
        device=torch.device("cpu"),
        vocabulary=5,
        logits=lambda hidden: hidden,
        hidden=lambda sequences, wanted: logits.expand(len(wanted), 5),
    )
    sequences = [torch.tensor([0, token]) for token in range(5)]
    targets = [torch.tensor([False, True])] * 5

    def chi_squared(temperature):
        expected = n * read_targets(stub, sequences, targets, temperature=temperature).logprobs.double().exp()
        assert expected.sum().item() == pytest.approx(n, rel=1e-5)
        return float(((counts - expected).square() / expected).sum())

    assert chi_squared(0.7) < 18.47
    assert chi_squared(1.0) > 1000


def test_draws_of_different_responses_follow_the_law_too():
    """The first tokens of 5,000 responses, each with its own noise."""
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    uniform = noise([(7, i) for i in range(5000)], 3)[:, 0]
    counts = torch.bincount(draw(probabilities.log().expand(5000, 3), uniform, 1.0), minlength=3)
    expected = 5000 * probabilities
    assert float(((counts - expected).square() / expected).sum()) < 13.82  # two degrees of freedom, p 1e-3


def test_a_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.25, 0.25, 0.5]).log().expand(6, 3)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.9999], dtype=torch.float64)
    assert draw(logits, uniform, 1.0).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_draw_never_takes_an_impossible_token():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(4, 5)
    uniform = torch.tensor([0.0, 0.4999999, 0.5000001, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform, 1.0).tolist() == [1, 1, 3, 3]


def test_the_law_is_tempered_and_its_entropy_counts_impossible_tokens_for_nothing():
    """Odds 4 : 1 at temperature 0.5 are 16 : 1."""
    law = compute_log_probs(torch.tensor([[4.0, 1.0, 0.0]]).log(), 0.5)
    assert law.exp()[0].tolist() == pytest.approx([16 / 17, 1 / 17, 0.0], abs=1e-6)
    expected = 16 / 17 * math.log(17 / 16) + math.log(17) / 17
    assert float(entropy_of(law)) == pytest.approx(expected, abs=1e-6)
    assert (
        torch.equal(compute_log_probs(law, 0.0), law.log_softmax(-1))
        and compute_log_probs(law.half(), 1.0).dtype == torch.float32
    )


def test_temperature_0_takes_the_likeliest_token():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 1.0, 0.0]])
    assert draw(logits, torch.tensor([0.999, 0.999]), 0.0).tolist() == [1, 0]


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, [2]), (0.41, [0, 2]), (0.69, [0, 2]), (0.71, [0, 2, 3])])
def test_top_p_keeps_the_smallest_set_of_likeliest_tokens(top_p, kept):
    probabilities = torch.tensor([0.3, 0.1, 0.4, 0.15, 0.05])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.bincount(draw(probabilities.log().expand(1000, 5), uniform, 1.0, top_p), minlength=5)
    expected = torch.zeros(5)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()  # renormalised
    assert (counts / 1000 - expected).abs().max() <= 0.002


# --- the model under it


@pytest.mark.parametrize("architecture", full_but(("llama", "gpt2", "gemma3"), PACKING))
def test_the_left_padded_prompts_logits_are_those_of_each_prompt_alone(open_tiny, architecture, monkeypatch):
    """Check 12: 0, 5, 8 and 11 tokens of padding on the left, longer than the sliding window of some."""
    base = open_tiny(architecture)
    seen = spy(base, monkeypatch)
    generate(base, PROMPTS, KEYS, NEVER, Sampling(1.0, 1))
    padded = seen[0]
    with torch.no_grad():
        for row, i in enumerate([2, 0, 3, 1]):  # longest first
            alone = base.logits(base.hidden([PROMPTS[i]])[-1:])[0]
            assert (padded[row] - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", *full(*PACKING[2:])])
@pytest.mark.parametrize("temperature", [0.0, 0.7, *full(1.3)])
def test_the_samplers_own_logprobs_are_the_trainers(open_tiny, architecture, temperature, monkeypatch):
    """Check 23: greedy and sampled, under an adapter, through the cache and past any sliding window."""
    base = open_tiny(architecture)
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    seen = spy(base, monkeypatch)
    scale = temperature or 1.0
    with roles.use("policy"):
        responses = generate(base, PROMPTS, KEYS, NEVER, Sampling(temperature, 12))
        assert len(seen) == 12
        sampled = torch.stack(seen, dim=1).double() / (scale + 1e-7)  # (4, 12, V), longest prompt first
        sequences = [torch.cat([p, r]) for p, r in zip(PROMPTS, responses, strict=True)]
        targets = [torch.arange(len(s)) >= len(p) for p, s in zip(PROMPTS, sequences, strict=True)]
        with torch.no_grad():
            trainers = read_targets(base, sequences, targets, temperature=scale).logprobs.view(4, 12)
    assert torch.isfinite(trainers).all()
    for row, i in enumerate([2, 0, 3, 1]):
        own = sampled[row].log_softmax(-1).gather(-1, responses[i][:, None])[:, 0]
        assert torch.isfinite(own).all() and (own - trainers[i]).abs().max() <= 1e-4
        if temperature == 0:
            assert torch.equal(responses[i], sampled[row].argmax(-1))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_greedy_responses_are_those_of_a_loop_without_cache_or_padding(model_folder, open_tiny, architecture):
    base, model = open_tiny(architecture), whole_model(model_folder(architecture))
    responses = generate(base, PROMPTS, KEYS, NEVER, Sampling(0.0, 6))
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = prompt
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids[None]).logits[0, -1].argmax()[None]])
        assert response.tolist() == ids[len(prompt) :].tolist()


# --- stopping


@pytest.fixture(scope="module")
def free(open_tiny):
    """A base and what it says to PROMPTS in 20 tokens if nothing stops it."""
    base = open_tiny("llama")
    return base, generate(base, PROMPTS, KEYS, NEVER, Sampling(1.0, 20))


def cut_at(response, stops):
    """The response up to and including its first stop token."""
    places = [i for i, token in enumerate(response.tolist()) if token in stops]
    return response.tolist()[: places[0] + 1] if places else response.tolist()


@pytest.mark.parametrize("places", [[(0, 0)], [(0, 4), (1, 9)], [(2, 19)], [(0, 3), (1, 3), (2, 3)]])
def test_a_response_ends_with_its_first_stop_token(free, places):
    base, whole = free
    stops = tuple(sorted({int(whole[row][place]) for row, place in places}))
    found = generate(base, PROMPTS, KEYS, stops, Sampling(1.0, 20))
    assert as_lists(found) == [cut_at(r, stops) for r in whole]
    assert any(r[-1] in stops for r in as_lists(found))


def test_a_response_without_a_stop_token_has_all_its_tokens(free):
    assert [len(r) for r in free[1]] == [20] * 4


def test_token_0_may_be_a_stop_token(open_tiny, monkeypatch):
    """Some bases end with token 0, which is also what unfilled places of the batch hold."""
    base = open_tiny("llama")
    logits = base.logits
    monkeypatch.setattr(base, "logits", lambda h: logits(h) + torch.where(torch.arange(300) == 0, 5.5, 0.0))
    whole = generate(base, PROMPTS, KEYS, NEVER, Sampling(1.0, 20))
    found = generate(base, PROMPTS, KEYS, (0,), Sampling(1.0, 20))
    assert as_lists(found) == [cut_at(r, (0,)) for r in whole]
    assert sum(r[-1] == 0 for r in as_lists(found)) >= 2 and len({len(r) for r in found}) > 1


def test_sampling_stops_once_every_row_has_ended(free, monkeypatch):
    base, whole = free
    stops = tuple({int(r[2]) for r in whole})
    seen = spy(base, monkeypatch)
    found = generate(base, PROMPTS, KEYS, stops, Sampling(1.0, 20))
    assert max(len(r) for r in found) <= 3
    assert len(seen) == max(len(r) for r in found)


# --- neighbours


def test_a_response_does_not_depend_on_its_batch(free):
    base, whole = free
    for rows in ([0], [3, 1], [2, 3, 0]):
        found = generate(base, [PROMPTS[i] for i in rows], [KEYS[i] for i in rows], NEVER, Sampling(1.0, 20))
        assert as_lists(found) == [whole[i].tolist() for i in rows]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral"])
def test_rows_that_have_ended_leave_the_cache_and_change_nothing(open_tiny, architecture, monkeypatch):
    base = open_tiny(architecture)
    prompts = sequences_of([9, 3, 14, 6, 6, 2, 11, 5], seed=3)
    keys = [(1, i) for i in range(8)]
    whole = generate(base, prompts, keys, NEVER, Sampling(1.0, 16))
    stops = tuple({int(whole[i][place]) for i, place in ((0, 2), (1, 2), (4, 3), (6, 6), (2, 7))})
    seen = spy(base, monkeypatch)
    found = generate(base, prompts, keys, stops, Sampling(1.0, 16))
    assert as_lists(found) == [cut_at(r, stops) for r in whole]
    rows = [len(logits) for logits in seen]
    assert rows[0] == 8 and rows == sorted(rows, reverse=True) and rows[-1] < 6


def test_the_noise_is_named_by_the_key_alone(free):
    base, whole = free
    swapped = generate(base, PROMPTS, [KEYS[1], *KEYS[1:]], NEVER, Sampling(1.0, 20))
    assert swapped[0].tolist() != whole[0].tolist()
    assert as_lists(swapped[1:]) == as_lists(whole[1:])
    torch.manual_seed(123)  # the global generator has no part in it
    assert as_lists(generate(base, PROMPTS, KEYS, NEVER, Sampling(1.0, 20))) == as_lists(whole)


@pytest.mark.parametrize(("rows", "batches"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (4, [4]), ("auto", [4])])
def test_rows_at_once_is_how_many_share_a_batch(free, monkeypatch, rows, batches):
    base, whole = free
    seen, done = spy(base, monkeypatch), []
    sampling = Sampling(1.0, 20, rollout_batch_size=rows)
    found = generate(base, PROMPTS, KEYS, NEVER, sampling, progress=done.append)
    assert as_lists(found) == as_lists(whole)
    assert [len(logits) for logits in seen[::20]] == batches
    assert done == torch.tensor(batches).cumsum(0).tolist()


def test_no_prompts_give_no_responses(free):
    assert generate(free[0], [], [], NEVER, Sampling(1.0, 20)) == []


def test_filtering_reaches_the_sampler(free):
    """With a tiny top_p only the likeliest token is left, whatever the noise."""
    base = free[0]
    greedy = generate(base, PROMPTS, KEYS, NEVER, Sampling(0.0, 8))
    assert as_lists(generate(base, PROMPTS, KEYS, NEVER, Sampling(1.0, 8, top_p=1e-9))) == as_lists(greedy)
    assert as_lists(generate(base, PROMPTS, KEYS, NEVER, Sampling(1.0, 8, top_p=0.9999999))) != as_lists(greedy)


def test_responses_can_be_learned_from(free):
    """What inference mode made must not leak into training."""
    base, whole = free
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    sequence = torch.cat([PROMPTS[0], whole[0]])
    with roles.use("policy"):
        read_targets(base, [sequence], [torch.arange(29) >= 9]).logprobs.sum().backward()
    assert roles.parameters("policy")[1].grad.abs().sum() > 0
    roles.remove("policy")


def test_a_model_whose_numbers_overflow_is_named(open_tiny):
    """One weight of 3e38 is finite, and no state behind it is."""
    roles = Roles(open_tiny("llama"))
    adapter = random_adapter(roles.base, 1)
    list(adapter.parameters())[1].data[0, 0] = 3e38
    roles.add("policy", adapter)
    with roles.use("policy"), pytest.raises(NotFiniteError, match="log-probabilities that are not finite"):
        generate(roles.base, sequences_of([5, 3]), [(0,), (1,)], (2,), Sampling(1.0, 4))
