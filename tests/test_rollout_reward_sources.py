"""Scores of reward models and of users' functions, and every way in which a function can fail."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest
import torch

from stages.errors import RewardError
from stages.models.model_ref import open_model
from stages.models.roles import Roles
from stages.models.tokens import PromptRow
from stages.rollout import reward_sources as sources
from stages.rollout.reward_sources import RewardSources, call_function
from stages.rollout.reward_specs import RewardSpec, load_function
from stages.training.signals import Signals
from tests.marks import full
from tests.parts import in_passes_of, publish_checkpoint, random_adapter, random_head, sequences_of

ROWS = [
    PromptRow(torch.tensor([1, 20, 21]), "two and two?", 2, {"answer": "4", "level": 1}, "p.jsonl:1"),
    PromptRow(torch.tensor([1, 22]), [{"role": "user", "content": "three?"}], 6, {"answer": "3"}, "p.jsonl:2"),
]
TEXTS = ["4", " three"]


def function_spec(function, weight=1.0, name="f.py:score"):
    return RewardSpec(name, weight, None, function, "")


def call(function):
    return call_function(function_spec(function), ROWS, TEXTS, Signals())


def refused(function, name="f.py:score"):
    with pytest.raises(RewardError) as caught:
        call_function(function_spec(function, name=name), ROWS, TEXTS, Signals())
    assert caught.value.where == f"--reward {name}" and caught.value.fix
    return caught.value.what


# --- what a function is given


def test_a_function_sees_prompts_as_the_dataset_had_them_and_plain_responses():
    seen = {}

    def score(prompts, responses):
        seen.update(prompts=prompts, responses=responses)
        return [0.0, 1.0]

    assert call(score).tolist() == [0.0, 1.0]
    assert seen == {"prompts": ["two and two?", [{"role": "user", "content": "three?"}]], "responses": ["4", " three"]}


def test_columns_are_passed_to_those_who_take_them():
    def every(prompts, responses, **columns):
        assert columns == {"answer": ["4", "3"], "level": [1, None]}
        return [float(a == r) for a, r in zip(columns["answer"], responses, strict=True)]

    def one(prompts, responses, answer):
        return [float(a == r) for a, r in zip(answer, responses, strict=True)]

    def optional(prompts, responses, level=None, other="x"):
        assert level == [1, None] and other == "x"
        return [2.0, 3.0]

    assert call(every).tolist() == call(one).tolist() == [1.0, 0.0]
    assert call(optional).tolist() == [2.0, 3.0]


def test_a_column_that_no_row_has_is_missed_by_name():
    def score(prompts, responses, solution):
        return [0.0, 0.0]

    assert "TypeError" in refused(score) and "solution" in refused(score)


def test_columns_named_like_the_first_two_parameters_do_not_clash():
    rows = [PromptRow(torch.tensor([1]), "p", 2, {"prompts": "x", "responses": "y", "a": 1}, "p:1")]

    def score(prompts, responses, **columns):
        assert (prompts, responses, columns) == (["p"], ["r"], {"a": [1]})
        return [5.0]

    assert call_function(function_spec(score), rows, ["r"], Signals()).tolist() == [5.0]


def test_a_function_may_spoil_the_lists_it_is_given():
    texts = list(TEXTS)
    call_function(function_spec(lambda prompts, responses: [responses.pop() and 1.0, 2.0]), ROWS, texts, Signals())
    assert texts == TEXTS


# --- what it may return


@pytest.mark.parametrize(
    "result",
    [
        [1, -2.5],
        (1.0, -2.5),
        np.array([1.0, -2.5]),
        np.array([1.0, -2.5], dtype=np.float32),
        torch.tensor([1.0, -2.5]),
        [np.float32(1.0), np.float64(-2.5)],
        [np.int64(1), -2.5],
    ],
    ids=["list", "tuple", "float64", "float32", "tensor", "numpy scalars", "numpy integer"],
)
def test_numbers_may_come_in_any_usual_form(result):
    found = call(lambda prompts, responses: result)
    assert found.tolist() == [1.0, -2.5] and found.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None, "1.0", True, [1.0], 1e39, 10**400])
def test_anything_but_a_finite_number_is_refused_with_its_prompt(bad):
    said = refused(lambda prompts, responses: [1.0, bad])
    assert said.startswith(f"it returned {bad!r} for the response ' three' to ")
    assert "three?" in said and "(p.jsonl:2)" in said


@pytest.mark.parametrize(
    ("result", "got"),
    [([1.0], "1 number"), ([1.0] * 3, "3 numbers"), (None, "NoneType"), (1.0, "float"), ({0: 1.0, 1: 2.0}, "dict")],
)
def test_anything_but_one_number_each_is_refused(result, got):
    assert refused(lambda prompts, responses: result) == f"it returned {got} for 2 responses"


def test_a_generator_and_a_scalar_tensor_are_no_lists():
    assert "generator" in refused(lambda prompts, responses: (1.0 for _ in responses))
    assert "float" in refused(lambda prompts, responses: torch.tensor(1.0))


def test_a_function_that_raises_is_named_with_its_line(tmp_path):
    path = tmp_path / "f.py"
    path.write_text("def score(prompts, responses):\n    x = {}\n    return [x[r] for r in responses]\n")
    name = f"{path}:score"
    said = refused(load_function(name, "--reward"), name)
    assert said == f"it raised KeyError: '4' ({path}:3) for the response '4' to 'two and two?' (p.jsonl:1)"


# --- several sources


@pytest.fixture
def base(open_tiny):
    return open_tiny("llama")


@pytest.fixture
def roles(base):
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    return roles


def reward_spec(base, folder, seed, weight):
    adapter, head = random_adapter(base, seed), random_head(base.width, seed)
    publish_checkpoint(folder, base, "reward", adapter, head=head)
    return RewardSpec(str(folder), weight, open_model(str(folder), stages=("reward",), what="--reward"), None, ""), (
        adapter,
        head,
    )


@torch.no_grad()
def score_by_hand(base, adapter, head, sequence):
    roles = Roles(base)
    roles.add("by hand", adapter)
    with roles.use("by hand"):
        return float(head(base.hidden([sequence])[-1]))


RESPONSES = [torch.tensor([40, 41, 2]), torch.tensor([50, 2])]


def test_scores_are_added_up_with_their_weights(base, roles, tmp_path):
    first, one = reward_spec(base, tmp_path / "a", 5, 0.5)
    second, other = reward_spec(base, tmp_path / "b", 6, -2.0)
    rewards = RewardSources([first, function_spec(lambda p, r: [10.0, 20.0], 0.1), second], roles)
    found = rewards.score(ROWS, RESPONSES, TEXTS, torch.tensor([True, True]))
    ends = [2, 6]
    for row, (prompt, response) in enumerate(zip(ROWS, RESPONSES, strict=True)):
        sequence = torch.cat([prompt.ids, response[:-1], torch.tensor([ends[row]])])
        expected = 0.5 * score_by_hand(base, *one, sequence) - 2.0 * score_by_hand(base, *other, sequence)
        assert found[row].item() == pytest.approx(expected + (1.0, 2.0)[row], abs=1e-4)
    assert found.dtype == torch.float32 and found.shape == (2,)


def test_a_reward_model_reads_the_end_that_it_was_trained_on(base, roles, tmp_path):
    """Several tokens may stop a response; the one that this prompt's template writes is what is read."""
    spec, model = reward_spec(base, tmp_path / "a", 5, 1.0)
    rewards = RewardSources([spec], roles)
    stopped_by_2 = rewards.score(ROWS, RESPONSES, TEXTS, torch.tensor([True, True]))
    by_6 = [torch.cat([r[:-1], torch.tensor([6])]) for r in RESPONSES]
    assert torch.equal(rewards.score(ROWS, by_6, TEXTS, torch.tensor([True, True])), stopped_by_2)
    never = rewards.score(ROWS, RESPONSES, TEXTS, torch.tensor([False, False]))  # cut off: nothing is replaced
    assert never[0].item() == stopped_by_2[0].item()  # its last token is its prompt's own end anyway
    assert abs(never[1].item() - stopped_by_2[1].item()) > 1e-3
    expected = score_by_hand(base, *model, torch.tensor([1, 22, 50, 2]))
    assert never[1].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size", [1, *full(2, "auto")])
def test_scores_do_not_depend_on_the_cut(base, roles, tmp_path, size):
    spec, model = reward_spec(base, tmp_path / "a", 5, 1.0)
    prompts = [PromptRow(ids, "", 2, {}, "") for ids in sequences_of([5, 2, 9])]
    responses = sequences_of([3, 8, 1], seed=1)
    found = RewardSources([spec], in_passes_of(roles, size)).score(
        prompts, responses, [""] * 3, torch.tensor([False] * 3)
    )
    expected = [score_by_hand(base, *model, torch.cat([p.ids, r])) for p, r in zip(prompts, responses, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_sources_of_two_lists_stand_side_by_side(base, roles, tmp_path):
    first, _ = reward_spec(base, tmp_path / "a", 5, 1.0)
    second, _ = reward_spec(base, tmp_path / "b", 6, 1.0)
    ended = torch.tensor([True, True])
    alone = RewardSources([first], roles).score(ROWS, RESPONSES, TEXTS, ended)
    rewards, gold = RewardSources([first], roles), RewardSources([second, first], roles, prefix="gold")
    assert torch.equal(rewards.score(ROWS, RESPONSES, TEXTS, ended), alone)
    assert not torch.equal(gold.score(ROWS, RESPONSES, TEXTS, ended), alone)
    assert not any(p.requires_grad for role in ("reward", "gold", "gold1") for p in roles.parameters(role))
    assert base.lora.active == []


# --- a function that fails or hangs at one response


def endless():
    while True:
        pass


def test_the_response_at_which_a_function_fails_is_named():
    def score(prompts, responses):
        return [float(text) for text in responses[:-1]] + [1 / (len(responses[-1]) - len(" three"))]

    said = refused(score)
    assert "ZeroDivisionError" in said and "for the response ' three' to \"[{'role': 'user'" in said
    assert said.endswith("(p.jsonl:2)")


def test_a_function_that_fails_at_all_of_them_together_names_none():
    def score(prompts, responses):
        if len(responses) > 1:
            raise ValueError("too many")
        return [0.0]

    assert refused(score) == "it raised ValueError: too many"


def test_a_function_that_hangs_is_stopped_and_the_response_named(monkeypatch):
    monkeypatch.setattr(sources, "CULPRIT_SECONDS", 0.1)

    def score(prompts, responses):
        try:
            return [endless() if "three" in text else 0.0 for text in responses]
        except Exception:  # a user's function may swallow what it likes
            return [0.0] * len(responses)

    with pytest.raises(RewardError) as caught:
        call_function(RewardSpec("f.py:score", 1.0, None, score, "", "--gold"), ROWS, TEXTS, Signals(), timeout=0.1)
    assert caught.value.where == "--gold f.py:score" and "--reward-timeout" in caught.value.fix
    assert caught.value.what.startswith("it took longer than 0.1 seconds for 2 responses for the response ' three' to")


def test_a_function_that_is_quick_enough_is_left_alone():
    before, threads = {number: signal.getsignal(number) for number in signal.valid_signals()}, threading.active_count()
    found = call_function(function_spec(lambda p, r: [1.0, 2.0]), ROWS, TEXTS, Signals(), timeout=5)
    assert found.tolist() == [1.0, 2.0]
    assert before == {number: signal.getsignal(number) for number in signal.valid_signals()}
    assert threading.active_count() == threads
