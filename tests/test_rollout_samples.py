"""What samples.jsonl holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from stages.data.rows import Prompt
from stages.rollout.generate import Sampling, generate
from stages.rollout.samples import show_samples
from stages.training.devices import Ranks
from tests.parts import open_tiny_text, roles_on, session_of, sft_config

RANKS = Ranks(torch.device("cpu"))
PROMPTS = [Prompt("p.jsonl:1", "the cat"), Prompt("p.jsonl:2", "once upon a time " * 40), Prompt("p.jsonl:3", "a bird")]


class Out:
    def __init__(self):
        self.rows = []

    def samples(self, rows):
        self.rows += rows


def show(out, roles, text, prompts, step, ranks=RANKS):
    session = session_of(sft_config(seed=0), roles, ranks=ranks)
    session.inputs, session.text = SimpleNamespace(run=out), text
    show_samples(session, "policy", prompts, step)


@pytest.fixture(scope="module")
def shown(model_folder, open_tiny):
    return roles_on(open_tiny("llama")), open_tiny_text(model_folder("llama"))


def test_prompts_that_leave_room_are_answered_under_the_role(shown):
    roles, text = shown
    out = Out()
    show(out, roles, text, PROMPTS, 3)
    assert [(r["step"], r["prompt"], r["where"]) for r in out.rows] == [
        (3, "the cat", "p.jsonl:1"),
        (3, "a bird", "p.jsonl:3"),
    ]
    rows = [text.prompt(PROMPTS[i], 100) for i in (0, 2)]
    with roles.use("policy"):
        said = generate(
            roles.base, [r.ids for r in rows], [(0, "samples", 0), (0, "samples", 1)], text.stop_ids, Sampling(0.7, 64)
        )
    for row, response, shown_row in zip(rows, said, out.rows, strict=True):
        assert len(response) <= 64  # half of the context of 128
        assert shown_row["response"] == text.response_text(row.ids, response)


def test_every_step_is_sampled_with_the_same_noise(shown):
    roles, text = shown
    out = Out()
    for step in (0, 5):
        show(out, roles, text, PROMPTS[:1], step)
    assert out.rows[0]["response"] == out.rows[1]["response"]


def test_only_the_first_rank_writes_and_nothing_without_prompts(shown):
    roles, text = shown
    out, second = Out(), Ranks(torch.device("cpu"))
    second.rank = 1
    show(out, roles, text, PROMPTS, 0, second)
    show(out, roles, text, [], 0)
    assert out.rows == []
