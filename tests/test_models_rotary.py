"""Rotary embeddings that depend on a text's length: every text has the numbers that it has alone."""

from __future__ import annotations

import pytest
import torch

from stages.models.roles import Roles
from stages.models.rotary import LengthBands
from stages.rollout.generate import Sampling, respond
from tests.marks import full
from tests.parts import gradient, random_adapter, sequences_of, whole_model
from tests.test_models_base import open_folder, save_model

LIMIT = 16  # tokens up to which the models were trained, as they say
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 8.0, 16.0, 32.0],
    "rope_theta": 1e4,
}  # fmt: skip
LENGTHS = [10, 3, 40, 23, 1, 16, 17, 23]
NEVER = (-1,)


def config_of(name: str):
    import transformers as t

    shape = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if name == "phi3":
        limits = {"max_position_embeddings": 128, "original_max_position_embeddings": LIMIT}
        return t.Phi3Config(**shape, **limits, rope_parameters=dict(LONG))
    if name == "llama longrope":
        rope = LONG | {"original_max_position_embeddings": LIMIT, "factor": 8.0}
        return t.LlamaConfig(**shape, max_position_embeddings=128, rope_parameters=rope)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return t.LlamaConfig(**shape, max_position_embeddings=LIMIT, rope_parameters=rope)


NAMES = ["llama longrope", "llama dynamic", *full("phi3")]


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("rotary"), config_of(request.param))


def texts() -> list:
    """Short and long ones; two long ones share their beginning, and one length stands twice."""
    found = sequences_of(LENGTHS)
    found[-1] = torch.cat([found[3][:-1], torch.tensor([9])])
    return found


@torch.no_grad()
def states_alone(folder, sequences: list) -> list:
    """Final states of each text by a model that has seen no other."""
    return [whole_model(folder).base_model(s[None], use_cache=False).last_hidden_state[0] for s in sequences]


def test_every_text_of_a_batch_has_the_states_that_it_has_alone(folder):
    base, sequences = open_folder(folder), texts()
    expected = torch.cat(states_alone(folder, sequences))
    wanted = torch.tensor([0, 20, 52, 52, 53, 76, 100, 132])
    with torch.no_grad():
        for packs, shares in ((True, True), (True, False), (False, False)):
            base.packs, base.shares = packs, shares
            for order in (list(range(len(sequences))), [2, 0, 7, 6, 5, 4, 3, 1], [1]):
                found = base.hidden([sequences[i] for i in order])
                ends = torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()
                right = torch.cat([expected[ends[i] - len(sequences[i]) : ends[i]] for i in order])
                assert (found - right).abs().max() <= 1e-5 * right.abs().max()
            assert (base.hidden(sequences, wanted) - expected[wanted]).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.full
def test_gradients_are_those_of_texts_that_run_alone(folder):
    base, sequences = open_folder(folder), texts()
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    with roles.use("policy"):
        base.hidden(sequences).pow(3).sum().backward()
        together = gradient(roles.parameters("policy"))
        for sequence in sequences:
            base.hidden([sequence]).pow(3).sum().backward()
        alone = gradient(roles.parameters("policy"))
        base.checkpoint_activations()
        base.hidden(sequences).pow(3).sum().backward()
        again = gradient(roles.parameters("policy"))
    assert (together - alone).norm() <= 1e-5 * alone.norm() and (again - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.full
def test_responses_that_grow_beyond_the_limit_follow_the_law_of_whole_texts(folder):
    """Every token by a model that reads the text so far from its beginning, whatever is sampled beside it."""
    base, prompts = open_folder(folder), sequences_of([3, 10, 14, 12, 20])
    keys = [(0, i) for i in range(len(prompts))]
    found = respond(base, prompts, keys, NEVER, Sampling(1.0, 10))
    for prompt, key, response in zip(prompts, keys, found, strict=True):
        text = torch.cat([prompt, response.tokens])
        beginnings = [text[: len(prompt) + n] for n in range(10)]
        states = torch.stack([s[-1] for s in states_alone(folder, beginnings)])
        law = base.logits(states).log_softmax(-1)
        expected = law.gather(-1, response.tokens[:, None])[:, 0]
        assert (response.logprobs - expected).abs().max() <= 1e-4
        alone = respond(base, [prompt], [key], NEVER, Sampling(1.0, 10))[0]
        assert alone.tokens.tolist() == response.tokens.tolist()


def test_rows_that_leave_the_batch_take_nothing_of_the_others_with_them(folder):
    """Stop tokens at many places: rows leave within a band, at its end and after it."""
    base, prompts = open_folder(folder), sequences_of([3, 10, 14, 12, 20, 15, 9, 16])
    keys, stops = [(0, i) for i in range(len(prompts))], tuple(range(0, 300, 6))
    found = respond(base, prompts, keys, stops, Sampling(1.0, 16))
    assert len({len(r.tokens) for r in found}) > 3
    for prompt, key, response in zip(prompts, keys, found, strict=True):
        alone = respond(base, [prompt], [key], stops, Sampling(1.0, 16))[0]
        assert alone.tokens.tolist() == response.tokens.tolist()


def test_our_own_pass_leaves_such_models_to_transformers(folder):
    assert open_folder(folder).native is None


def test_bands(open_tiny, folder):
    plain = open_tiny("llama").bands
    assert not plain.differ and plain.group([5, 500, 1]) == [[0, 1, 2]]
    bands = LengthBands(whole_model(folder))
    assert bands.differ and bands.group([16, 17, 1]) == [[0, 2], [1]]
    dynamic = bands.band_of(17) != bands.band_of(18)
    assert bands.group([30, 2, 31, 30]) == ([[1], [0, 3], [2]] if dynamic else [[1], [0, 2, 3]])


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rotations_that_depend_on_the_position_alone_are_one_band(kind):
    from types import SimpleNamespace

    text = SimpleNamespace(rope_parameters={"rope_type": kind}, max_position_embeddings=LIMIT)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text), modules=list)
    assert not LengthBands(model).differ


def test_layers_of_several_kinds_each_have_their_limit():
    from types import SimpleNamespace

    kinds = {"full": {"rope_type": "longrope", "original_max_position_embeddings": 8}, "near": {"rope_type": "dynamic"}}
    text = SimpleNamespace(rope_parameters=kinds, max_position_embeddings=12)
    bands = LengthBands(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text), modules=list))
    assert bands.group([8, 9, 12, 13, 14, 13]) == [[0], [1, 2], [3, 5], [4]]
