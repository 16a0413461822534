"""Attention over short pieces by plain products: what a token sees, and what is kept of masks."""

from __future__ import annotations

from math import inf

from stages.native.dense import LONGEST_DENSE, mask_of


def test_a_token_sees_itself_and_those_before_it():
    assert mask_of(0, 2, None, 1).tolist() == [[0, -inf], [0, 0]]
    assert mask_of(1, 2, None, 1).tolist() == [[0, 0, -inf], [0, 0, 0]]


def test_within_a_window_as_many_as_it_holds_and_once_for_every_head_that_shares_keys():
    assert mask_of(2, 1, 2, 1).tolist() == [[-inf, 0, 0]]
    assert mask_of(0, 2, 1, 2).tolist() == [[0, -inf], [0, -inf], [-inf, 0], [-inf, 0]]


def test_masks_of_all_lengths_lie_in_the_memory_of_one():
    """Those of every length, each by itself, took half a gigabyte where seven heads share their keys."""
    masks = [mask_of(before, 3, None, 7) for before in range(LONGEST_DENSE - 3)]
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 1
    assert masks[0].untyped_storage().nbytes() == 7 * LONGEST_DENSE * LONGEST_DENSE * 4
