"""Our own decoder against transformers' and against a whole forward pass per token."""

from __future__ import annotations

import pytest
import torch

from stages.errors import ModelError
from stages.models.heads import ScalarHead
from stages.models.roles import Roles
from stages.native import decode, graphs
from stages.native.fused import Linear
from stages.rollout.generate import Sampling, check_engine, generate, respond
from tests.marks import full_but
from tests.parts import random_adapter, sequences_of

COVERED = ["llama", "qwen2", "qwen3", "mistral"]
PROMPTS = sequences_of([9, 3, 14, 6, 3])
KEYS = [(0, "row", i) for i in range(5)]
NEVER = (10**6,)


def adapted(base):
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    return roles


@pytest.mark.parametrize("architecture", full_but(("llama", "mistral"), COVERED))
@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[2]] * 3 + PROMPTS[:2]], ids=["all different", "some alike"])
def test_the_engines_give_the_same_responses(open_tiny, architecture, prompts):
    """Under an adapter, past a sliding window of 6, with stops that some rows meet early."""
    base = open_tiny(architecture)
    stops = tuple(range(0, base.vocabulary, 9))
    with adapted(base).use("policy"):
        ours, theirs = (
            respond(base, prompts, KEYS, stops, Sampling(0.9, 20, engine=engine))
            for engine in ("native", "transformers")
        )
    assert len({len(r.tokens) for r in theirs}) > 1  # rows leave at different times
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert (a.logprobs - b.logprobs).abs().max() <= 1e-5 and (a.entropy - b.entropy).abs().max() <= 1e-5


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_neither_batching_nor_compaction_changes_a_response(open_tiny, rows, monkeypatch):
    base = open_tiny("llama")
    stops = tuple(range(0, base.vocabulary, 7))
    with adapted(base).use("policy"):
        whole = generate(base, PROMPTS, KEYS, stops, Sampling(1.0, 16))
        monkeypatch.setattr("stages.native.limits.TOKENS_AT_ONCE_CPU", 10)  # prompts are read a few at a time
        again = generate(base, PROMPTS, KEYS, stops, Sampling(1.0, 16, rollout_batch_size=rows))
    assert [r.tolist() for r in again] == [r.tolist() for r in whole]


def test_what_sampling_knows_is_what_a_whole_pass_says(open_tiny):
    """Log-probability, entropy and value of every token, each from a forward pass of its own without any cache."""
    base = open_tiny("qwen3")
    roles, head = adapted(base), ScalarHead(base.width).randomise(3)
    with roles.use("policy"), torch.no_grad():
        found = respond(base, PROMPTS, KEYS, NEVER, Sampling(0.7, 6), head=head)
        for prompt, response in zip(PROMPTS, found, strict=True):
            for place in range(6):
                state = base.hidden([torch.cat([prompt, response.tokens[:place]])])[-1:]
                law = (base.logits(state)[0].double() / (0.7 + 1e-7)).log_softmax(-1)
                token = int(response.tokens[place])
                assert float(response.logprobs[place]) == pytest.approx(float(law[token]), abs=2e-5)
                assert float(response.entropy[place]) == pytest.approx(float(-(law.exp() * law).sum()), abs=2e-5)
                assert float(response.values[place]) == pytest.approx(float(head(state)), abs=2e-5)


def test_without_a_head_values_are_zero_and_nothing_follows_the_first_stop(open_tiny):
    base = open_tiny("llama")
    stops = tuple(range(0, base.vocabulary, 5))
    for response in respond(base, PROMPTS, KEYS, stops, Sampling(1.0, 12)):
        ends = [int(t) in stops for t in response.tokens]
        assert not any(ends[:-1]) and (ends[-1] or len(ends) == 12)
        assert len(response.tokens) == len(response.logprobs) == len(response.entropy) and not response.values.any()


def test_the_engine_is_ours_where_it_can_be(open_tiny, monkeypatch):
    used = []
    for name in ("TransformersDecoder", "NativeDecoder"):
        kind = getattr(__import__("stages.rollout.generate", fromlist=[name]), name)
        monkeypatch.setattr(
            f"stages.rollout.generate.{name}", lambda *a, kind=kind, name=name: used.append(name) or kind(*a)
        )
    for architecture, engine in (("llama", "auto"), ("llama", "transformers"), ("gpt2", "auto")):
        generate(open_tiny(architecture), PROMPTS[:1], KEYS[:1], NEVER, Sampling(1.0, 2, engine=engine))
    assert used == ["NativeDecoder", "TransformersDecoder", "TransformersDecoder"]


def test_a_base_that_is_not_covered_is_said_to_be_sampled_by_transformers(open_tiny):
    covered, other = open_tiny("llama"), open_tiny("gpt2")
    assert check_engine(covered, "auto") == check_engine(covered, "native") == check_engine(other, "transformers") == ()
    assert check_engine(other, "auto") == (
        "the native decoder does not support `gpt2`; sampling with transformers, which is slower",
    )
    with pytest.raises(ModelError, match="does not support `gpt2`") as caught:
        generate(other, PROMPTS[:1], KEYS[:1], NEVER, Sampling(1.0, 2, engine="native"))
    assert caught.value.where == "rollout_engine"


def test_layers_keep_their_delta_beside_weights_of_half_precision():
    """W = 1 and delta 2^-10 in bfloat16, where their sum would round to 1; of three layers the second has none."""
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    a, b = torch.tensor([[2.0**-10, 0.0]]), torch.ones(2, 1)
    layer = decode.stack_linears(
        [Linear(weight, None, a, b, 2.0), Linear(weight, None, None, None), Linear(weight, None, a, b)]
    )
    out = decode.apply_stacked(torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16), layer)
    assert out.tolist() == [[2.0**-9] * 2 + [0.0] * 2 + [2.0**-10] * 2]


def test_layers_fold_their_delta_into_fp32_weights():
    weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
    one = Linear(weight, bias, torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0]]), 2.0)
    layer = decode.stack_linears([one, one._replace(a=None, b=None)])
    assert len(layer.weights) == 1 and layer.down is None
    # 1 x 10 + 2 x 20 + 0.5 + 2 x 3 x (10 - 20), and without the delta
    assert decode.apply_stacked(torch.tensor([[10.0, 20.0]]), layer).tolist() == [[-9.5, 50.5]]


# --- steps of fixed shape, as CUDA graphs need them


def counted(captured):
    """A capture that counts: its step runs anew each time, as a graph would, on the same memory."""
    return lambda step: captured.append(step) or step


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_steps_of_fixed_shape_give_the_same_responses(open_tiny, architecture, monkeypatch):
    """Five rows run as five, and three as four once two have ended; slots are read in steps of 8."""
    base = open_tiny(architecture)
    stops = tuple(range(0, base.vocabulary, 25))
    captured = []
    with adapted(base).use("policy"):
        expected = respond(base, PROMPTS, KEYS, stops, Sampling(0.9, 40))
        monkeypatch.setattr("stages.rollout.generate.capture_for", lambda device, tokens: counted(captured))
        monkeypatch.setattr(graphs, "SLOT_STEP", 8)
        found = respond(base, PROMPTS, KEYS, stops, Sampling(0.9, 40))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.tokens, b.tokens) and (a.logprobs - b.logprobs).abs().max() <= 1e-5
    shapes = [(len(step.args[3]), step.args[5]) for step in captured]
    assert shapes[0] == (5, 16) and len(set(shapes)) == len(shapes) > 3  # captured once each
    assert {rows for rows, _ in shapes} <= {1, 2, 4, 5} and all(n % 8 == 0 or n == 54 for _, n in shapes)


def test_where_capturing_fails_steps_run_as_they_are(open_tiny, monkeypatch):
    def failing(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    base = open_tiny("llama")
    expected = generate(base, PROMPTS, KEYS, NEVER, Sampling(0.9, 6))
    monkeypatch.setattr("stages.rollout.generate.capture_for", lambda device, tokens: failing)
    found = generate(base, PROMPTS, KEYS, NEVER, Sampling(0.9, 6))
    assert [r.tolist() for r in found] == [r.tolist() for r in expected]
    assert "not permitted" in base.native.capture_failure
    monkeypatch.setattr("stages.rollout.generate.capture_for", lambda device, tokens: pytest.fail("it was tried again"))
    generate(base, PROMPTS, KEYS, NEVER, Sampling(0.9, 2))


def test_captures_are_for_cuda_and_for_many_tokens(monkeypatch):
    monkeypatch.setattr(graphs, "cuda_graph", lambda: "captured")
    assert graphs.capture_for(torch.device("cpu"), 999) is None
    assert graphs.capture_for(torch.device("cuda"), 15) is None
    assert graphs.capture_for(torch.device("cuda"), 16) == "captured"


def test_rows_are_padded_to_powers_of_two():
    assert [graphs.at_least(n, 256) for n in (1, 2, 3, 4, 5, 8, 9, 200, 256)] == [1, 2, 4, 4, 8, 8, 16, 256, 256]
    assert [graphs.at_least(n, 100) for n in (60, 65, 100)] == [64, 100, 100]
