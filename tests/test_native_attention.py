"""Attention over packed rows, against attention written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stages.native import attention
from stages.native.attention import PrefixGroup, attention_forward, make_mask, packed
from tests.parts import PACKING, sequences_of


class Layer(nn.Module):
    is_causal = True

    def __init__(self, groups: int = 1):
        super().__init__()
        self.num_key_value_groups = groups


def by_hand(q, k, v, *, scale, window=None, softcap=None):
    """(heads, L, D) each -> (L, heads, D): one query, one key at a time."""
    groups = q.shape[0] // k.shape[0]
    out = torch.zeros(q.shape[1], q.shape[0], v.shape[2])
    for head in range(q.shape[0]):
        for i in range(q.shape[1]):
            first = 0 if window is None else max(0, i - window + 1)
            scores = []
            for j in range(first, i + 1):
                score = scale * torch.dot(q[head, i], k[head // groups, j])
                scores.append(score if softcap is None else softcap * torch.tanh(score / softcap))
            weights = torch.stack(scores).softmax(0)
            out[i, head] = weights @ v[head // groups, first : i + 1]
    return out


def qkv(length, heads=4, kv_heads=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, length, 8) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator) * 1.5 for shape in shapes]


def segments_of(*groups):
    with packed(list(groups), torch.device("cpu")):
        return make_mask()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lengths", [(5, 1, 7), (4, 4, 1, 1, 1, 2)])  # neighbours of one length attend side by side
def test_segments_attend_causally_to_themselves_alone(kv_heads, window, softcap, lengths):
    q, k, v = qkv(13, kv_heads=kv_heads)
    segments = segments_of(*map(PrefixGroup, lengths))
    found, weights = attention_forward(
        Layer(4 // kv_heads), q, k, v, segments, scaling=0.4, sliding_window=window, softcap=softcap
    )
    assert weights is None and found.shape == (1, 13, 4, 8)
    parts = zip(q[0].split(lengths, 1), k[0].split(lengths, 1), v[0].split(lengths, 1), strict=True)
    expected = torch.cat([by_hand(a, b, c, scale=0.4, window=window, softcap=softcap) for a, b, c in parts])
    assert (found[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "groups",
    [
        [PrefixGroup(4, (3, 1, 5))],
        [PrefixGroup(2), PrefixGroup(3, (2, 2)), PrefixGroup(3, (2, 2)), PrefixGroup(1, (1,))],
    ],
)
def test_continuations_attend_to_their_beginning_and_to_themselves(kv_heads, window, softcap, groups):
    total = sum(group.size for group in groups)
    q, k, v = qkv(total, kv_heads=kv_heads)
    layer, options = Layer(4 // kv_heads), {"scaling": 0.4, "sliding_window": window, "softcap": softcap}
    found, _ = attention_forward(layer, q, k, v, segments_of(*groups), **options)
    expected, start = [], 0
    for group in groups:
        beginning = list(range(start, start + group.prefix))
        ends = [start + group.prefix + sum(group.suffixes[:i]) for i in range(len(group.suffixes) + 1)]
        for own in [[], *(list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False))]:
            rows = beginning + own  # the sequence as it would be by itself
            alone = by_hand(q[0, :, rows], k[0, :, rows], v[0, :, rows], scale=0.4, window=window, softcap=softcap)
            expected.append(alone[-len(own) :] if own else alone)
        start += group.size
    assert (found[0] - torch.cat(expected)).abs().max() < 1e-5


def test_the_kernels_bounds_of_shared_beginnings():
    """Worked out by hand: a group of 2 with continuations of 1 and 2, then a sequence of 3."""
    segments = segments_of(PrefixGroup(2, (1, 2)), PrefixGroup(3))
    assert segments.offsets.tolist() == [0, 2, 3, 5, 8]
    assert segments.key_offsets.tolist() == [0, 2, 5, 9, 12]
    assert segments.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert segments.longest == (3, 4)
    assert segments_of(PrefixGroup(3)).keys is None


def test_the_scale_is_that_of_the_head_size_where_none_is_given():
    q, k, v = qkv(6)
    found, _ = attention_forward(Layer(), q, k, v, segments_of(PrefixGroup(6)))
    assert (found[0] - by_hand(q[0], k[0], v[0], scale=1 / math.sqrt(8))).abs().max() < 1e-5
    capped, _ = attention_forward(Layer(), q, k, v, segments_of(PrefixGroup(6)), softcap=2.0)
    assert (capped[0] - by_hand(q[0], k[0], v[0], scale=1 / math.sqrt(8), softcap=2.0)).abs().max() < 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_capped_attention_without_a_mask_is_causal_from_the_last_key_on(kv_heads):
    """One new token, or a whole prompt, before a cache: query i of N stands at key i + (keys - N)."""
    q, k, v = qkv(6, kv_heads=kv_heads)
    whole = by_hand(q[0], k[0], v[0], scale=0.3, softcap=2.0)
    found, _ = attention_forward(Layer(4 // kv_heads), q, k, v, None, scaling=0.3, softcap=2.0)
    assert (found[0] - whole).abs().max() < 1e-5
    last, _ = attention_forward(Layer(4 // kv_heads), q[:, :, -2:], k, v, None, scaling=0.3, softcap=2.0)
    assert (last[0] - whole[-2:]).abs().max() < 1e-5


def test_capped_attention_keeps_to_the_mask_it_is_given():
    q, k, v = qkv(6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[:, :2] = False  # two keys of padding on the left
    found, _ = attention_forward(Layer(), q, k, v, mask[None, None], scaling=0.3, softcap=2.0)
    expected = by_hand(q[0, :, 2:], k[0, :, 2:], v[0, :, 2:], scale=0.3, softcap=2.0)
    assert (found[0, 2:] - expected).abs().max() < 1e-5
    assert torch.isfinite(found).all()


def test_plain_attention_is_transformers_own():
    q, k, v = qkv(6, kv_heads=2)
    found, _ = attention_forward(Layer(2), q, k, v, None, scaling=0.3)
    assert (found[0] - by_hand(q[0], k[0], v[0], scale=0.3)).abs().max() < 1e-5


def test_a_packed_block_says_where_segments_lie_and_ends_even_after_an_error():
    with packed([PrefixGroup(2), PrefixGroup(3)], torch.device("cpu")):
        mask = make_mask()
        assert mask.groups == (PrefixGroup(2), PrefixGroup(3))
        assert mask.offsets.tolist() == [0, 2, 5] and mask.offsets.dtype == torch.int32
    with pytest.raises(KeyError), packed([PrefixGroup(2)], torch.device("cpu")):
        raise KeyError
    assert attention._packed_row.get() is None


@pytest.mark.parametrize("architecture", PACKING)
def test_perturbing_one_segment_leaves_its_neighbours_alone(open_tiny, architecture):
    """Check 28: changing segment A changes nothing that is read from segments B and C."""
    base = open_tiny(architecture)
    assert base.packs
    a, b, c = sequences_of([9, 4, 12])
    other = sequences_of([9], seed=7)[0]
    with torch.no_grad():
        first, second = base.logits(base.hidden([a, b, c])), base.logits(base.hidden([other, b, c]))
        middle = base.logits(base.hidden([b, other, c]))
    assert (first[9:] - second[9:]).abs().max() <= 1e-6
    assert (first[:9] - second[:9]).abs().max() > 0.1
    assert (middle[:4] - first[9:13]).abs().max() <= 1e-6
    assert (middle[13:] - first[13:]).abs().max() <= 1e-6


# --- the layout for CUDA's kernel, with a stand-in for the kernel


def kernel(q, k, v, q_ends, k_ends, longest_q, longest_k, scale=None, window_size=(-1, -1), enable_gqa=False):
    """torch's varlen_attn as of 2.13, by hand: (N, heads, D) each, the last key of a part under its last query."""
    assert all(x.is_contiguous() for x in (q, k, v)) and window_size[1] == 0
    assert longest_q == int(q_ends.diff().max()) and longest_k == int(k_ends.diff().max())
    assert enable_gqa or q.shape[1] == k.shape[1]
    out, bounds = [], zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)
    for q_from, q_to, k_from, k_to in bounds:
        part, keys, values = q[q_from:q_to], k[k_from:k_to], v[k_from:k_to]
        ahead = torch.zeros(len(keys) - len(part), *part.shape[1:])  # queries of keys that are only attended to
        whole = [x.transpose(0, 1) for x in (torch.cat([ahead, part]), keys, values)]
        window = None if window_size[0] < 0 else window_size[0] + 1
        out.append(by_hand(*whole, scale=scale or 1 / math.sqrt(q.shape[2]), window=window)[len(ahead) :])
    return torch.cat(out)


def older_kernel(q, k, v, q_ends, k_ends, longest_q, longest_k, scale=None, window_size=(-1, -1)):
    """As of 2.11, without grouped heads."""
    return kernel(q, k, v, q_ends, k_ends, longest_q, longest_k, scale, window_size)


@pytest.mark.parametrize("version", [kernel, older_kernel])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "groups",
    [[PrefixGroup(5), PrefixGroup(1), PrefixGroup(7)], [PrefixGroup(2), PrefixGroup(3, (2, 4)), PrefixGroup(1, (1,))]],
)
def test_the_kernel_is_given_what_belongs_together(monkeypatch, version, kv_heads, window, groups):
    """Heads, keys and bounds as they would be on CUDA."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", version)
    q, k, v = qkv(13, kv_heads=kv_heads)
    segments = segments_of(*groups)
    found = attention._attend_varlen(q, k, v, segments, attention.Rule(0.4, window))
    expected, _ = attention_forward(Layer(4 // kv_heads), q, k, v, segments, scaling=0.4, sliding_window=window)
    assert found.shape == expected.shape == (1, 13, 4, 8)
    assert (found - expected).abs().max() < 1e-5
