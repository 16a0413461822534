"""What stages read out of a forward pass, and that no layout of a batch changes it."""

from __future__ import annotations

import pytest
import torch

from stages.models import outputs as forward
from stages.models.heads import ScalarHead
from stages.models.outputs import TargetLogprobs, pad, predictors, read_targets, sequence_scores
from stages.models.roles import Roles
from stages.rollout.experience import read_values
from tests.marks import full
from tests.parts import (
    PACKING,
    gradient,
    random_adapter,
    random_head,
    relative,
    roles_on,
    sequences_of,
    targets_from,
    unpacked,
    whole_model,
)

SEQUENCES = sequences_of([9, 4, 17])
TARGETS = targets_from(SEQUENCES, [4, 1, 9])
COUNTS = [5, 3, 8]


@torch.no_grad()
def everything(roles, sequences, targets):
    """Log-probabilities under the policy, values of the critic, scores of the reward model."""
    with roles.use("policy"):
        logprobs = read_targets(roles.base, sequences, targets, temperature=0.7).logprobs
    with roles.use("critic"):
        values = read_values(roles, "critic", sequences, targets)
    with roles.use("reward"):
        return logprobs, values, sequence_scores(roles, "reward", sequences)


# --- against loops


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_logprobs_are_those_of_a_loop_over_single_tokens(model_folder, open_tiny, architecture):
    """Check 16: one token, one forward pass of the whole model on what stands before it, at a time."""
    base, model = open_tiny(architecture), whole_model(model_folder(architecture))
    found = read_targets(base, SEQUENCES, TARGETS, temperature=0.7, want_entropy=True)
    expected, spread = [], []
    for sequence, wanted in zip(SEQUENCES, TARGETS, strict=True):
        for t in wanted.nonzero().flatten().tolist():
            with torch.no_grad():
                logits = model(sequence[None, :t]).logits[0, -1].double() / 0.7
            probabilities = logits.exp() / logits.exp().sum()
            expected.append(probabilities[sequence[t]].log())
            spread.append(-(probabilities * probabilities.log()).sum())
    assert found.logprobs.shape == (16,)
    assert torch.allclose(found.logprobs.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert (found.entropy - torch.stack(spread)).abs().max() <= 1e-5
    summed = [part.sum() for part in found.logprobs.split(COUNTS)]
    assert summed[1].item() == pytest.approx(float(sum(expected[5:8])), abs=1e-5)


def test_values_belong_to_the_state_before_each_token(open_tiny):
    roles = roles_on(open_tiny("llama"))
    _, values, scores = everything(roles, SEQUENCES, TARGETS)
    head, reward = roles.heads["critic"], roles.heads["reward"]
    with torch.no_grad():
        with roles.use("critic"):
            hidden = [roles.base.hidden([s]) for s in SEQUENCES]
        with roles.use("reward"):
            last = [roles.base.hidden([s])[-1] for s in SEQUENCES]
    before = [(0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (1, 0), (1, 1), (1, 2), *((2, t) for t in range(8, 16))]
    expected = torch.stack([hidden[row][t] @ head.weight + head.bias for row, t in before])
    assert (values - expected).abs().max() <= 1e-5
    assert (scores - torch.stack([h @ reward.weight + reward.bias for h in last])).abs().max() <= 1e-5


def test_predictors_stand_one_before_each_target():
    targets = [torch.tensor([False, True, False, True]), torch.tensor([False, False, True])]
    assert predictors(targets).tolist() == [0, 2, 5]


# --- layouts


@pytest.mark.parametrize("architecture", ["llama", "gpt2", *full(*PACKING[2:])])
def test_no_layout_changes_logprobs_values_or_scores(open_tiny, architecture):
    """Checks 12 and 14: alone, packed with others, or padded on the right by 0 to 13 tokens.

    The left-padded layout, which sampling alone uses, is compared in the tests of generation.
    """
    roles = roles_on(open_tiny(architecture))
    parts = [everything(roles, [s], [t]) for s, t in zip(SEQUENCES, TARGETS, strict=True)]
    alone = [torch.cat(column) for column in zip(*parts, strict=True)]
    assert roles.base.packs
    together = everything(roles, SEQUENCES, TARGETS)
    with unpacked(roles.base):
        padded = everything(roles, SEQUENCES, TARGETS)
    for expected, one, other in zip(alone, together, padded, strict=True):
        assert (one - expected).abs().max() <= 1e-5
        assert (other - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_left_padded_states_with_positions_are_those_without_padding(open_tiny, architecture):
    """Check 12, with 0, 1 and 7 tokens of padding on the left: states, and so log-probabilities, values and scores."""
    base = open_tiny(architecture)
    sequence = SEQUENCES[0]
    with torch.no_grad():
        expected = base.hidden([sequence])
        for pads in (0, 1, 7):
            ids = torch.nn.functional.pad(sequence, (pads, 0))[None]
            mask = (torch.arange(ids.shape[1]) >= pads)[None].long()
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            states = base.body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            assert (states.last_hidden_state[0, pads:] - expected).abs().max() <= 1e-5


def test_left_padding_without_positions_is_wrong_on_gpt2_alone(open_tiny):
    """Check 13, negative: GPT-2's positions are absolute, so it must be told them; Llama's are relative."""
    worst = {}
    for architecture in ("gpt2", "llama"):
        base = open_tiny(architecture)
        ids = torch.nn.functional.pad(SEQUENCES[0], (7, 0))[None]
        mask = (torch.arange(16) >= 7)[None].long()
        with torch.no_grad():
            states = base.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0, 7:]
            wrong, right = (base.logits(h).log_softmax(-1) for h in (states, base.hidden([SEQUENCES[0]])))
        worst[architecture] = float((wrong - right).abs().max())
    assert worst["gpt2"] > 0.1
    assert worst["llama"] <= 1e-4


@pytest.mark.parametrize("packs", [True, False])
def test_the_order_of_rows_is_the_order_of_results(open_tiny, packs):
    """Check 15: permuting the rows of a batch permutes what is read from them."""
    roles = roles_on(open_tiny("gpt2"))
    roles.base.packs = packs
    order = [2, 0, 1]
    first = everything(roles, SEQUENCES, TARGETS)
    second = everything(roles, [SEQUENCES[i] for i in order], [TARGETS[i] for i in order])
    for a, b in zip(first[:2], second[:2], strict=True):
        rows = a.split(COUNTS)
        assert (torch.cat([rows[i] for i in order]) - b).abs().max() <= 1e-5
    assert (first[2][order] - second[2]).abs().max() <= 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", *full("mistral", "gemma2")])
@pytest.mark.parametrize("packs", [True, False])
def test_nothing_read_at_a_token_depends_on_later_ones(open_tiny, architecture, packs):
    """Check 17: log-probability and value of token t ignore tokens after t; the value ignores token t itself."""
    roles = roles_on(open_tiny(architecture))
    roles.base.packs = packs
    sequence, wanted = SEQUENCES[2], TARGETS[2]
    changed = sequence.clone()
    changed[13:] = (changed[13:] + 11) % 290 + 7
    first, second = (everything(roles, [s], [wanted]) for s in (sequence, changed))
    # Targets are tokens 9 to 16: tokens 9 to 12 stayed, and so did the state before token 13.
    assert (first[0][:4] - second[0][:4]).abs().max() <= 1e-6
    assert (first[1][:5] - second[1][:5]).abs().max() <= 1e-6
    assert (first[0][4:] - second[0][4:]).abs().min() > 1e-3
    assert (first[1][5:] - second[1][5:]).abs().min() > 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", *full(*PACKING[2:])])
def test_packed_and_padded_rows_give_one_loss_and_gradient(open_tiny, architecture):
    """Check 27: a packed row and a padded batch agree in loss and in the gradient of adapter and head."""
    roles = roles_on(open_tiny(architecture))

    def loss_and_gradient():
        with roles.use("policy"):
            loss = -read_targets(roles.base, SEQUENCES, TARGETS).logprobs.sum() / 16
            loss.backward()
        with roles.use("critic"):
            value = read_values(roles, "critic", SEQUENCES, TARGETS).square().sum() / 16
            value.backward()
        both = [*roles.parameters("policy"), *roles.parameters("critic")]
        return torch.stack([loss, value]).detach(), gradient(both)

    packed_loss, packed_gradient = loss_and_gradient()
    with unpacked(roles.base):
        padded_loss, padded_gradient = loss_and_gradient()
    assert (packed_loss - padded_loss).abs().max() <= 1e-5 * packed_loss.abs().max()
    assert relative(packed_gradient, padded_gradient) <= 1e-5


# --- the readout


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_logits_in_chunks_give_the_same_values_and_gradient(open_tiny, architecture, monkeypatch):
    base = open_tiny(architecture)
    roles = roles_on(base)

    def read():
        with roles.use("policy"):
            found = read_targets(base, SEQUENCES, TARGETS, temperature=0.7, want_entropy=True)
            (found.logprobs * torch.arange(16)).sum().backward()
        return found, gradient(roles.parameters("policy"))

    whole, expected = read()
    sizes = []
    logits = base.logits
    monkeypatch.setattr(base, "logits", lambda hidden: sizes.append(len(hidden)) or logits(hidden))
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 5 * base.vocabulary + 299)
    chunked, found = read()
    assert sizes[:4] == [5, 5, 5, 1]
    assert (chunked.logprobs - whole.logprobs).abs().max() <= 1e-6
    assert (chunked.entropy - whole.entropy).abs().max() <= 1e-6
    assert relative(found, expected) <= 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradients_of_logprobs_and_entropies_are_autograds(open_tiny, architecture, temperature):
    """Against torch's own derivative of log_softmax; gemma2 caps its logits."""
    base = open_tiny(architecture)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, base.width, generator=generator)
    tokens = torch.randint(base.vocabulary, (6,), generator=generator)
    weights = torch.randn(2, 6, generator=generator)

    def ours(states):
        return TargetLogprobs.apply(states, base, tokens, temperature, True)

    def plain(states):
        every = (base.logits(states) / (temperature if temperature == 1 else temperature + 1e-7)).log_softmax(-1)
        return every.gather(-1, tokens[:, None])[:, 0], -(every.exp() * every).sum(-1)

    found = []
    for read in (ours, plain):
        states = hidden.clone().requires_grad_()
        outs = read(states)
        both = [torch.autograd.grad((w * x).sum(), states, retain_graph=True)[0] for w, x in zip(weights, outs)]  # noqa: B905
        found.append((*outs, *both, torch.autograd.grad((weights * torch.stack(outs)).sum(), states)[0]))
    for a, b in zip(*found, strict=True):
        assert relative(a.detach(), b.detach()) <= 1e-5


def test_a_chunk_has_at_least_one_row(open_tiny, monkeypatch):
    base = open_tiny("llama")
    expected = read_targets(base, SEQUENCES, TARGETS).logprobs
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 1)
    assert (read_targets(base, SEQUENCES, TARGETS).logprobs - expected).abs().max() <= 1e-6


def test_capped_logits_are_the_whole_models(model_folder, open_tiny):
    """Gemma 2 squeezes its logits into +-3 here; a readout without that would give other log-probabilities."""
    base, model = open_tiny("gemma2"), whole_model(model_folder("gemma2"))
    found = read_targets(base, SEQUENCES, TARGETS).logprobs.split(COUNTS)
    with torch.no_grad():
        for sequence, wanted, logprobs in zip(SEQUENCES, TARGETS, found, strict=True):
            logits = model(sequence[None]).logits[0]
            assert logits.abs().max() <= 3
            expected = logits.log_softmax(-1)[wanted.nonzero().flatten() - 1, sequence[wanted]]
            assert (logprobs - expected).abs().max() <= 1e-5
        uncapped = base.output(base.hidden(SEQUENCES))
        assert uncapped.abs().max() > 3.5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_softmax_is_fp32_over_half_precision_logits(model_folder, temperature):
    from stages.models.base import load_base
    from stages.models.model_ref import open_model

    source = open_model(str(model_folder("llama")), stages=(), what="--model")
    base = load_base(source, device=torch.device("cpu"), dtype=torch.bfloat16)
    with torch.no_grad():
        found = read_targets(base, SEQUENCES, TARGETS, temperature=temperature)
        tokens = torch.cat([s[t] for s, t in zip(SEQUENCES, TARGETS, strict=True)])
        logits = base.logits(found.hidden).double() / temperature
        exact = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert found.logprobs.dtype == torch.float32
    assert (found.logprobs - exact).abs().max() <= 1e-5


def test_temperature_1_is_no_temperature_and_others_divide_the_logits(open_tiny):
    base = open_tiny("llama")
    with torch.no_grad():
        plain = read_targets(base, SEQUENCES, TARGETS)
        warm = read_targets(base, SEQUENCES, TARGETS, temperature=2.0, want_entropy=True)
        logits = base.logits(plain.hidden)
        tokens = torch.cat([s[t] for s, t in zip(SEQUENCES, TARGETS, strict=True)])
    for found, scaled in ((plain.logprobs, logits), (warm.logprobs, logits / 2)):
        expected = scaled.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        assert (found - expected).abs().max() <= 1e-5
    expected = torch.distributions.Categorical(logits=logits / 2).entropy()
    assert (warm.entropy - expected).abs().max() <= 1e-5
    assert plain.entropy.abs().max() == 0


def test_the_states_of_a_reading_serve_a_shared_head(open_tiny):
    base = open_tiny("llama")
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    roles.heads["critic"] = random_head(base.width, 2)
    with torch.no_grad(), roles.use("policy"):
        shared = roles.heads["critic"](read_targets(base, SEQUENCES, TARGETS).hidden)
        assert torch.equal(shared, read_values(roles, "critic", SEQUENCES, TARGETS))


def test_scores_read_each_sequences_last_token(open_tiny):
    base = open_tiny("llama")
    roles = Roles(base)
    roles.add("reward", None, ScalarHead(base.width).randomise(0))
    with torch.no_grad(), roles.use("reward"):
        before = sequence_scores(roles, "reward", SEQUENCES)
        changed = [torch.cat([s[:-1], torch.tensor([5])]) for s in SEQUENCES]
        assert (sequence_scores(roles, "reward", changed) - before).abs().min() > 1e-3
    assert before.shape == (3,)


def test_pad_lays_rows_out_and_lets_gradients_through():
    flat = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    rows = pad(flat, [1, 3])
    assert rows.tolist() == [[1.0, 0.0, 0.0], [2.0, 3.0, 4.0]]
    (rows * torch.tensor([[1.0, 9.0, 9.0], [2.0, 3.0, 4.0]])).sum().backward()
    assert flat.grad.tolist() == [1.0, 2.0, 3.0, 4.0]
