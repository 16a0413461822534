"""How samples of the policy score under a reward model."""

from __future__ import annotations

import pytest
import torch

from stages.data.rows import Prompt
from stages.models.outputs import sequence_scores
from stages.rollout.experience import sample_rollout
from stages.rollout.generate import Sampling
from stages.rollout.policy_scores import score_policy_responses
from tests.parts import open_tiny_text, roles_on

PROMPTS = [
    Prompt("p:1", "the cat"),
    Prompt("p:2", "once upon a time " * 40),
    Prompt("p:3", "a bird"),
    Prompt("p:4", "x"),
]


@pytest.fixture(scope="module")
def parts(model_folder, open_tiny):
    return roles_on(open_tiny("llama")), open_tiny_text(model_folder("llama"), stop_ids=(2, *range(7, 47)))


def test_scores_of_two_answers_to_each_prompt_that_fits(parts):
    """The first two prompts that leave room, answered twice at temperature 1, and scored one by one."""
    roles, text = parts
    found = score_policy_responses(roles, text, PROMPTS, 2, 5)
    rows = [text.prompt(PROMPTS[i], 64) for i in (0, 0, 2, 2)]
    keys = [(5, "reward", "spread", i, k) for i in (0, 1) for k in (0, 1)]
    rollout = sample_rollout(roles, "policy", text, rows, keys, Sampling(1.0, 64))
    assert len(set(rollout.texts)) == 4 and rollout.ended.all()  # each of its answers differs
    wholes = [torch.cat([p.ids, r[:-1], torch.tensor([2])]) for p, r in zip(rows, rollout.responses, strict=True)]
    with torch.no_grad(), roles.use("reward"):
        a, b, c, d = (float(sequence_scores(roles, "reward", [whole])[0]) for whole in wholes)
    mean = (a + b + c + d) / 4
    assert (found["prompts"], found["count"], found["eos_rate"]) == (2, 4, 1.0)
    assert found["mean"] == pytest.approx(mean, abs=1e-5)
    assert found["std"] ** 2 == pytest.approx(sum((x - mean) ** 2 for x in (a, b, c, d)) / 4, rel=1e-3)
    assert found["within_std"] ** 2 == pytest.approx(((a - b) ** 2 + (c - d) ** 2) / 8, rel=1e-3)


def test_no_prompt_that_fits_gives_nothing(parts):
    assert score_policy_responses(*parts, PROMPTS[1:2], 32, 0) == {} == score_policy_responses(*parts, PROMPTS, 0, 0)
