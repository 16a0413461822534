"""Loss on held-out demonstrations."""

from __future__ import annotations

import math

import pytest
import torch

from stages.data.prompts import prompt_of
from stages.data.rows import Demonstration
from stages.models.roles import Roles
from stages.training.language import count_targets, held_out_loss
from tests.parts import LENGTHS, STARTS, in_passes_of, roles_on, token_rows, whole_model


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_the_loss_is_the_mean_over_all_target_tokens(model_folder, open_tiny, size):
    base, model = open_tiny("llama"), whole_model(model_folder("llama"))
    roles = Roles(base)
    roles.add("policy", None)
    total = 0.0
    for row in token_rows():
        with torch.no_grad():
            logprobs = model(row.ids[None]).logits[0].double().log_softmax(-1)
        total -= sum(logprobs[t - 1, row.ids[t]].item() for t in row.targets.nonzero().flatten())
    expected = total / sum(n - s for n, s in zip(LENGTHS, STARTS, strict=True))
    found = held_out_loss(in_passes_of(roles, size), "policy", token_rows())
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_it_is_measured_under_the_role(open_tiny):
    roles = roles_on(open_tiny("llama"))
    roles.add("bare", None)
    policy, bare = (held_out_loss(roles, role, token_rows())["eval_loss"] for role in ("policy", "bare"))
    assert abs(policy - bare) > 0.01


def test_no_rows_give_no_loss(open_tiny):
    assert held_out_loss(roles_on(open_tiny("llama")), "policy", []) == {}
    assert count_targets([]) == 0


def test_the_prompt_of_a_demonstration():
    row = prompt_of(Demonstration("d:1", "the cat", " sat"))
    assert (row.where, row.prompt, row.messages) == ("d:1", "the cat", ())
    assert prompt_of(Demonstration("d:1", "", "the cat sat")) is None
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    row = prompt_of(Demonstration("d:1", "", "", (user, answer, user, answer, user)))
    assert row.prompt == (user, answer, user)  # before the last assistant turn
    assert prompt_of(Demonstration("d:1", "", "", (answer,))) is None
    row = prompt_of(Demonstration("d:1", "### Instruction", "b", (user, answer)))
    assert row.prompt == "### Instruction" and row.messages == (user,)
