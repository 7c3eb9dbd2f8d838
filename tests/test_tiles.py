"""What blockwise computes: which heads together, which tiles, and which blocks of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import bound

from npattn import causal, key_lengths, packed, segments, window
from npattn.ops.calls import with_heads
from npattn.ops.pairs import ALL
from npattn.ops.products import dots, sum_rows, times
from npattn.ops.tiles import SIZES, Plan, Sizes


def plan_of(q_shape, k_shape, mask=None, sizes=SIZES):
    q, k = np.zeros(q_shape, np.float32), np.zeros(k_shape, np.float32)
    return Plan(with_heads(bound(q, k, k, mask=mask)), sizes)


def bundles(*given):
    return len(plan_of(*given).heads)


ENDS = 4096 * np.arange(9) * np.arange(1, 10) // 72  # of eight sequences, the last eight times as long as the first


@pytest.mark.parametrize(
    ("mask", "most"),
    [
        (causal(), 1.3), (window(1024, 0), 1.3), (window(1024, 1024), 1.3), (key_lengths(1000), 1.3), (None, 1.0),
        (packed([0, 1024, 2048, 4096], [0, 1024, 2048, 4096]), 1.0), (packed([0, 700, 1500, 4096], [0, 700, 1500, 4096]), 1.0),
        (packed(ENDS, ENDS, align="top_left"), 1.3), (causal() & packed(ENDS, ENDS), 1.3),
    ],
    ids=["causal", "window", "window ahead", "key lengths", "none", "packed", "unequal", "packed, causal", "both"],
)  # fmt: skip
def test_the_work_is_that_of_the_pairs_that_are_allowed(mask, most):
    """Elements of the tiles that are computed, over the pairs that the mask allows, at L = S = 4096."""
    plan = plan_of((8, 4096, 64), (8, 4096, 64), mask)
    computed = sum(
        (block.rows.stop - block.rows.start) * (block.cols.stop - block.cols.start)
        for i in range(len(plan.rows))
        for block in itertools.chain(*plan.blocks(plan.heads[0], i))
    )
    pairs = 4096 * 4096 if mask is None else int(mask.bind((4096, 4096)).dense().sum())
    assert pairs <= computed <= most * pairs


def covered(mask, L, S, sizes):
    """How often each pair is computed, which are not masked, and what is allowed."""
    plan = plan_of((L, 3), (S, 3), mask, sizes)
    computed, unmasked = np.zeros((L, S), int), np.zeros((L, S), bool)
    for i in range(len(plan.rows)):
        for block in itertools.chain(*plan.blocks(plan.heads[0], i)):
            computed[block.rows, block.cols] += 1
            unmasked[block.rows, block.cols] = True
            unmasked[block.masked_rows, block.cols] = False
    return computed, unmasked, plan.call.mask.tile((), ALL, ALL)


@pytest.mark.parametrize("seed", range(60))
def test_blocks_are_apart_and_hold_all_that_is_allowed(seed):
    """Random parts that are empty, full or neither, and packed sequences: each pair is computed at most once."""
    rng = np.random.default_rng(seed)
    L, S = (int(n) for n in rng.integers(1, 60, 2))
    states = rng.choice([0, 1, 2], (20, 20), p=[[0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.6, 0.2, 0.2]][seed % 3])
    for j in range(1, 20):
        if rng.random() < 0.5:  # like the keys before, but for some queries
            n = rng.integers(1, 21)
            states[:n, j] = states[:n, j - 1]
    dense = states.repeat(3, 0).repeat(3, 1)[:L, :S]
    dense = (dense == 2) | ((dense == 1) & (rng.random((L, S)) < 0.5))
    q_ids, k_ids = (np.sort(rng.integers(0, 5, n)) for n in (L, S))
    mask = [dense, segments(q_ids, k_ids), segments(q_ids, k_ids) & dense, window(L // 4, 2, align="top_left")][seed % 4]
    rows, cols = (int(n) for n in rng.integers(1, 9, 2))  # parts of a tile, first as large as the states
    tile = (3 * rows, 3 * cols) if seed < 40 else (2 * rows, 5 * cols)
    tasks = int(rng.integers(0, 9))
    share = {"tasks": tasks, "small": 0} if tasks else {}
    computed, unmasked, whole = covered(mask, L, S, Sizes(tile, parts=(rows, cols), **share))
    assert computed.max() <= 1
    assert (computed[whole] == 1).all()
    assert whole[unmasked].all()


@pytest.mark.parametrize("before", [(1, 2, 0, 0), (1, 2, 1, 2), (2, 2, 2, 2), (0, 0, 1, 2), (1, 2, 2, 1)])
@pytest.mark.parametrize("state", [(1, 2, 1, 2), (1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 2, 0)])
def test_a_block_in_two_pieces_beside_any_other(before, state):
    """0 empty, 1 partial, 2 full, from the first queries to the last."""
    half = np.tile([True, False], (2, 1))
    kinds = [np.zeros((2, 2), bool), half, np.ones((2, 2), bool)]
    mask = np.hstack([np.vstack([kinds[x] for x in column]) for column in (before, state)])
    computed, unmasked, whole = covered(mask, 8, 4, Sizes((8, 4), parts=(4, 2)))
    assert computed.max() <= 1
    assert (computed[whole] == 1).all()
    assert whole[unmasked].all()


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "mask"),
    [
        ((64, 8, 32, 4), (64, 8, 32, 4), None), ((2, 3, 12, 64, 4), (2, 3, 4, 64, 4), None),
        ((7, 5, 40, 4), (7, 1, 40, 4), None), ((16, 512, 4), (16, 512, 4), causal()),
        ((4, 600, 4), (4, 600, 4), None), ((1, 32, 1, 4), (1, 8, 4096, 4), None),
        ((16, 64, 4), (2, 64, 4), None),
        ((600, 4), (600, 4), None), ((2, 0, 8, 4), (2, 0, 8, 4), None), ((9, 3, 8, 4), (9, 3, 8, 4), causal()),
    ],
    ids=str,
)  # fmt: skip
def test_each_head_is_in_one_bundle_and_groups_are_whole(q_shape, k_shape, mask):
    plan = plan_of(q_shape, k_shape, mask)
    lead, groups = plan.lead, np.zeros(plan.call.k.shape[:-2], int)
    heads = np.zeros(lead, int)
    for bundle in plan.heads:
        heads[bundle.index] += 1
        groups[bundle.group] += 1
        assert heads[bundle.index].size * groups.size == groups[bundle.group].size * heads.size or heads[bundle.index].ndim == 0
        assert np.array_equal(np.broadcast_to(np.arange(lead[-1]), lead)[bundle.index], bundle.head_numbers)
        assert [x for x in np.ndindex(lead) if mark(lead, x)[bundle.index].any()] == plan.each_index(bundle)
    assert (heads == 1).all()
    assert (groups >= 1).all()


def mark(shape, index):
    found = np.zeros(shape, bool)
    found[index] = True
    return found


def test_small_heads_are_computed_together_and_large_ones_are_not():
    assert bundles((64, 8, 32, 4), (64, 8, 32, 4)) < 64
    assert bundles((64, 512, 4), (64, 512, 4), causal()) < 64
    assert bundles((64, 1024, 4), (64, 1024, 4)) == 64
    assert bundles((32, 1, 4), (8, 8192, 4)) == 8  # a group at a time
    assert bundles((32, 1, 4), (32, 8192, 4)) == 16  # few queries, but many keys
    assert bundles((64, 512, 4), (64, 512, 4)) == bundles((64, 512, 32), (64, 512, 32))
    assert bundles((64, 512, 64), (64, 512, 64)) == 16
    assert bundles((8, 600, 64), (2, 600, 64)) == 8  # two would fit, and a group is not divided


def test_long_heads_are_computed_together_if_their_blocks_are_small_and_the_same():
    shape, ends = (8, 4096, 64), np.arange(0, 4097, 512)
    assert bundles(shape, shape, packed(ends, ends)) == 2
    assert bundles(shape, shape, packed([0, 4096], [0, 4096])) == 4
    assert bundles(shape, shape, np.ones((8, 1, 4096), bool)) == 8  # each has a mask of its own
    many, long = np.arange(0, 1025, 32), (64, 1024, 64)  # not as many heads as for tiles of 32 rows: tiles are larger
    assert bundles(long, long, packed(many, many)) == 16
    assert bundles(shape[1:], shape[1:], packed(ends, ends)) == 1
    assert bundles((2, 4096, 64), (2, 4096, 64), packed(ends, ends)) == 2  # something to share


@pytest.mark.parametrize(
    ("H", "L", "tiles"), [(1, 1024, 2), (1, 2048, 4), (1, 8192, 8), (2, 2048, 4), (4, 1024, 2), (8, 1024, 1)]
)
def test_few_heads_leave_enough_to_share(H, L, tiles):
    """Tiles of queries forwards, and of keys backwards."""
    plan = plan_of((H, L, 64), (H, L, 64), causal())
    assert len(plan.rows) == tiles
    assert len(plan.cols) >= tiles


@pytest.mark.parametrize(
    ("q", "k", "most"),
    [((4, 16, 64), (4, 16, 64), 1), ((8, 1024, 64), (8, 1024, 64), None), ((32, 1, 128), (8, 128, 128), 1),
     ((32, 1, 128), (8, 1024, 128), None)],
)  # fmt: skip
def test_a_second_thread_is_for_many_multiplications_or_many_keys(q, k, most):
    assert plan_of(q, k).most == most


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("lead", [(), (6,), (2, 6)])
def test_products_of_grouped_heads(rows, lead):
    rng = np.random.default_rng(0)
    groups = (*lead[:-1], 3) if lead else ()
    x, y = rng.standard_normal((*lead, rows, 5)), rng.standard_normal((*groups, 50, 5))
    z = rng.standard_normal((*lead, rows, 50))
    each = np.repeat(y, 2, axis=-3) if lead else y  # of each head
    got = dots(x, y, np.empty((*lead, rows, 50)))
    assert np.allclose(got, np.einsum("...ld,...sd->...ls", x, each))
    assert np.allclose(times(z, y, np.empty((*lead, rows, 5))), np.einsum("...ls,...sd->...ld", z, each))
    sums = np.einsum("...ls,...ld->...sd", z, x)
    if lead:
        sums = sums.reshape(*lead[:-1], 3, 2, 50, 5).sum(-3)
    assert np.allclose(sum_rows(z, x, np.empty((*groups, 50, 5))), sums)
