"""What sequences share at their beginnings is found, laid in the row once, and changes no number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.models.outputs import read_targets
from stages.models.roles import Roles
from stages.native.attention import PrefixGroup
from stages.native.prefixes import pack, shared_beginnings
from tests.marks import full
from tests.parts import PACKING, gradient, random_adapter, relative, sequences_of


def rows(*texts):
    return [torch.tensor([ord(letter) for letter in text]) for text in texts]


def test_a_pair_lies_in_the_row_as_prompt_response_response():
    found = pack(rows("prompt:yes", "prompt:nope"), share=True)
    assert "".join(map(chr, found.ids)) == "prompt:nopeyes" and found.groups == [PrefixGroup(7, (4, 3))]
    assert found.positions.tolist() == [*range(7), 7, 8, 9, 10, 7, 8, 9]
    assert found.indices.tolist() == [*range(7), 11, 12, 13, *range(7), 7, 8, 9, 10]


def test_groups_are_those_that_save_most():
    # Two prompts under one short header: each prompt's responses belong together.
    found = shared_beginnings(rows("head:aaaaaaaa1", "head:bbbbbbbb1", "head:aaaaaaaa22", "head:bbbbbbbb22"))
    assert sorted((sorted(group), prefix) for group, prefix in found) == [([0, 2], 13), ([1, 3], 13)]


def test_each_sequence_keeps_a_token_to_itself():
    """Also where one is the beginning of another, or the same."""
    found = pack(rows("abcdefg", "abcdefg", "abcdefgh"), share=True)
    assert [(group.prefix, sorted(group.suffixes)) for group in found.groups] == [(6, [1, 1, 2])]


def test_what_shares_nothing_is_laid_end_to_end():
    sequences = rows("abc", "abd", "xyzxyz")  # two letters in common are too few
    found = pack(sequences, share=True)
    assert found.indices is None and found.groups == [PrefixGroup(3), PrefixGroup(3), PrefixGroup(6)]
    assert pack(rows("prompt:yes", "prompt:nope"), share=False).indices is None


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=14), min_size=1, max_size=8))
def test_every_sequence_can_be_read_off_the_row(texts):
    sequences = rows(*texts)
    found = pack(sequences, share=True)
    assert sum(group.size for group in found.groups) == len(found.ids) == len(found.positions)
    indices = torch.arange(len(found.ids)) if found.indices is None else found.indices
    assert found.ids[indices].tolist() == torch.cat(sequences).tolist()
    assert found.positions[indices].tolist() == [i for s in sequences for i in range(len(s))]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", *full(*PACKING[2:], "qwen2", "gemma")])
def test_values_and_gradients_are_those_of_separate_rows(open_tiny, architecture):
    """To 1e-5: log-probabilities and the adapter's gradient, for a pair, a group of four, and a row alone."""
    base = open_tiny(architecture)
    assert base.shares
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    prompts = sequences_of([11, 20])
    tails = sequences_of([5, 1, 3, 3, 8, 2], seed=4)
    sequences = [torch.cat([prompts[i // 2 if i < 2 else 1], tail]) for i, tail in enumerate(tails)]
    sequences.append(sequences_of([9], seed=9)[0])
    targets = [torch.arange(len(s)) >= start for s, start in zip(sequences, [11, 11, 20, 20, 20, 20, 2], strict=True)]
    weights = torch.linspace(-1, 1, sum(int(t.sum()) for t in targets))

    def read(share):
        base.shares = share
        with roles.use("policy"):
            logprobs = read_targets(base, sequences, targets).logprobs
            (weights * logprobs).sum().backward()
        return logprobs.detach(), gradient(roles.parameters("policy"))

    (shared, its), (separate, theirs) = read(True), read(False)
    assert (shared - separate).abs().max() <= 1e-5
    assert relative(its, theirs) <= 1e-5


def test_a_base_that_cannot_share_does_without(open_tiny, monkeypatch):
    from stages.native import attention

    real = attention._attend_suffixes
    monkeypatch.setattr(attention, "_attend_suffixes", lambda *args: real(*args) + 1)
    base = open_tiny("llama")
    assert base.packs and not base.shares
