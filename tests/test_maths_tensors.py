from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from stages.maths.tensors import (
    entropy_of,
    last_index,
    masked_moments,
    masked_sum,
    scale_to_unit_variance,
    token_logprobs,
    whiten,
)

RAGGED = torch.tensor([[True, True, False], [True, False, False], [True, False, False]])
FOUR = torch.tensor([[1.0, 2.0, 1e6], [3.0, 1e6, 1e6], [4.0, 1e6, 1e6]], dtype=torch.float64)  # 1, 2, 3, 4 count


def in_shards(work, shards):
    """`work(shard, reduce)` for all shards at once, with a `reduce` that sums what each of them hands in."""
    barrier = Barrier(len(shards), timeout=60)
    handed_in = [None] * len(shards)

    def run(rank):
        def reduce(x):
            handed_in[rank] = x
            barrier.wait()
            total = sum(handed_in)
            barrier.wait()
            return total

        return work(shards[rank], reduce)

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(run, range(len(shards))))


def ragged_batch(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) * 3 + 5
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return x, torch.arange(width) < lengths[:, None]


def test_masked_sum_sees_only_the_mask():
    assert masked_sum(FOUR, RAGGED).item() == 10


def test_masked_sum_ignores_infinities_and_nan_under_the_padding_also_in_the_gradient():
    x = torch.tensor([[2.0, math.inf, math.nan]], requires_grad=True)
    total = masked_sum(x, torch.tensor([[True, False, False]]))
    total.backward()
    assert total.item() == 2
    assert x.grad.tolist() == [[1, 0, 0]]


def test_a_single_token_is_its_own_mean():
    one = torch.tensor([[False, True, False], [False] * 3, [False] * 3])
    assert [moment.item() for moment in masked_moments(FOUR, one)] == [2, 0, 1]


def test_nothing_masked_means_zero_and_not_nan():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert [moment.item() for moment in masked_moments(torch.ones(2, 3), nothing)] == [0, 0, 0]
    assert whiten(torch.ones(2, 3), nothing).tolist() == [[0, 0, 0]] * 2


def test_masked_moments_are_those_of_the_population():
    mean, variance, count = masked_moments(FOUR, RAGGED)
    assert (mean.item(), variance.item(), count.item()) == (2.5, 1.25, 4)


def test_masked_moments_do_not_cancel_in_fp32():
    x = torch.tensor([[9999.0, 10001.0, 9999.0, 10001.0]])  # mean of squares minus squared mean is off by 8 here
    mean, variance, _ = masked_moments(x, torch.ones_like(x, dtype=torch.bool))
    assert (mean.item(), variance.item()) == (10000, 1)


def test_whitened_values_have_mean_0_and_variance_1_and_are_0_off_mask():
    """Check 10: the masked moments of whitened advantages, ragged."""
    x, mask = ragged_batch(16, 9)
    white = whiten(x.float(), mask).double()
    assert white[mask].mean().abs() < 1e-5
    assert abs(white[mask].var(correction=0) - 1) < 1e-5
    assert (white[~mask] == 0).all()


def test_whitening_by_hand():
    for options, variance in (({}, 1.25 + 1e-8), ({"eps": 0.31}, 1.56)):
        expected = [(v - 2.5) / math.sqrt(variance) for v in (1, 2, 3, 4)]
        torch.testing.assert_close(whiten(FOUR, RAGGED, **options)[RAGGED].tolist(), expected, rtol=1e-12, atol=0)


def test_whitening_equal_values_gives_zeros():
    assert whiten(torch.full((2, 3), 7.0), torch.ones(2, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]] * 2


def test_scaling_to_unit_variance_keeps_the_mean():
    for options, variance in (({}, 1.25 + 1e-8), ({"eps": 0.31}, 1.56)):
        scaled = scale_to_unit_variance(FOUR, RAGGED, **options)
        sigma = math.sqrt(variance)
        expected = [r / sigma + 2.5 * (1 - 1 / sigma) for r in (1, 2, 3, 4)]
        torch.testing.assert_close(scaled[RAGGED].tolist(), expected, rtol=1e-12, atol=0)
        assert (scaled[~RAGGED] == 0).all()


def test_whitening_in_shards_is_whitening_at_once():
    """Check 11: three ranks of unequal size, for both kinds of whitening."""
    x, mask = ragged_batch(12, 7)
    pieces = list(zip(x.split([6, 4, 2]), mask.split([6, 4, 2]), strict=True))
    for function in (whiten, scale_to_unit_variance):
        whole = function(x, mask)
        together = in_shards(lambda piece, reduce, function=function: function(*piece, reduce), pieces)
        torch.testing.assert_close(torch.cat(together), whole, rtol=0, atol=1e-12)
        alone = torch.cat([function(*piece) for piece in pieces])
        assert (alone - whole).abs().max() > 1e-3  # averaging per rank is a different number


def test_moments_in_shards_are_the_same_on_every_rank():
    """Check 11: the statistics behind the whitening, with one rank that has nothing to add."""
    x, _ = ragged_batch(4, 5)
    mask = torch.tensor([[False] * 5, [False] * 5, [True] * 4 + [False], [True] * 2 + [False] * 3])
    pieces = list(zip(x.split(2), mask.split(2), strict=True))
    expected = [x[mask].mean().item(), x[mask].var(correction=0).item(), 6.0]
    for moments in in_shards(lambda piece, reduce: masked_moments(*piece, reduce), pieces):
        torch.testing.assert_close([moment.item() for moment in moments], expected)


def test_last_index_is_found_by_position_and_not_by_counting():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert last_index(mask).tolist() == [1, 3, 2, 0, -1]


def test_token_logprobs_by_hand():
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]], dtype=torch.float64)  # p = .75, .25 and .5, .5
    found = token_logprobs(logits, torch.tensor([[1, 0]]))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.tolist(), [[math.log(0.25), math.log(0.5)]])


def test_logprobs_are_fp32_even_under_autocast():
    """Check 50: bf16 logits under autocast, against float64 on the same logits."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 16, 64, generator=generator) * 3).bfloat16()
    tokens = torch.randint(64, (4, 16), generator=generator)
    truth = logits.double().log_softmax(-1)
    chosen = truth.gather(-1, tokens[..., None])[..., 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, spread = token_logprobs(logits, tokens), entropy_of(logits.float().log_softmax(-1))
    assert found.dtype == spread.dtype == torch.float32
    assert (found - chosen).abs().max() < 1e-5
    assert (spread + (truth.exp() * truth).sum(-1)).abs().max() < 1e-5
    in_bf16 = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert (in_bf16 - chosen).abs().max() > 1e-3


def test_token_logprobs_send_back_one_hot_minus_probability():
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    token_logprobs(logits, torch.tensor([1])).sum().backward()
    torch.testing.assert_close(logits.grad.tolist(), [[-0.75, 0.75]])


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0], [0.0, -math.inf, -math.inf]], dtype=torch.float64)
    torch.testing.assert_close(entropy_of(logits.log_softmax(-1)).tolist(), [math.log(3), 1.5 * math.log(2), 0.0])


def test_entropy_has_a_finite_gradient_where_a_token_is_impossible():
    logits = torch.tensor([math.log(3), 0.0, -math.inf, -2000.0], dtype=torch.float64, requires_grad=True)
    entropy_of(logits.log_softmax(-1)).backward()
    spread = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    expected = [-p * (math.log(p) + spread) for p in (0.75, 0.25)] + [0.0, 0.0]  # dH/dz = -p (log p + H)
    torch.testing.assert_close(logits.grad.tolist(), expected)
