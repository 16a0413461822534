"""Randomness as a function of names."""

from __future__ import annotations

import hashlib

import torch

from stages.training.seeds import derive, noise, permutation


def test_a_seed_depends_on_every_name_and_on_their_order():
    names = [(0, "ppo", 1), (0, "ppo", 2), (0, "sft", 1), (1, "ppo", 1), ("ppo", 0, 1), (0, "ppo", 1, 0), (0, "ppo1")]
    found = [derive(*n) for n in names]
    assert len(set(found)) == len(names)
    assert derive(12, 3) != derive(1, 23)
    assert found == [derive(*n) for n in names]
    assert all(0 <= seed < 2**63 for seed in found)


def test_a_seed_is_the_same_on_every_machine():
    """The first eight bytes of sha256 of the joined names, halved; worked out with hashlib alone."""
    assert derive(0, "ppo", 1) == int(hashlib.sha256(b"0\x1fppo\x1f1").hexdigest()[:16], 16) // 2


def test_a_permutation_is_a_shuffle_named_by_its_seed():
    first = permutation(50, 0, "order", 1)
    assert sorted(first) == list(range(50)) and first != list(range(50))
    torch.manual_seed(5)
    assert permutation(50, 0, "order", 1) == first
    assert permutation(50, 0, "order", 2) != first
    assert permutation(0, 0) == []


def test_a_row_of_noise_depends_on_its_key_alone():
    keys = [(0, "a", i) for i in range(5)]
    whole = noise(keys, 12)
    assert whole.shape == (5, 12) and whole.dtype == torch.float64
    assert torch.equal(noise([keys[3], keys[1]], 12), whole[[3, 1]])
    torch.manual_seed(5)
    assert torch.equal(noise(keys, 12), whole)
    assert not torch.equal(noise([(0, "b", 0)], 12)[0], whole[0])
    assert torch.equal(noise(keys, 40)[:, :12], whole)  # a longer response begins alike


def test_noise_is_uniform():
    drawn = noise([(1, i) for i in range(2000)], 10)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean().item() - 1 / 2) < 0.01 and abs(drawn.var().item() - 1 / 12) < 0.003
    neighbours = torch.corrcoef(torch.stack([drawn[:-1, 0], drawn[1:, 0]]))[0, 1]
    assert abs(neighbours.item()) < 0.08


def test_no_keys_give_no_noise():
    assert noise([], 7).shape == (0, 7)
