"""Masks against explicit loops, as tiles, as an algebra and as values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import SHAPE
from oracles import mask_loops

from npattn import (
    Mask,
    attention_backward,
    attention_forward,
    blocks,
    causal,
    key_lengths,
    keys,
    packed,
    query_lengths,
    segments,
    where,
    window,
)
from npattn.ops.masks import EMPTY, FULL, PARTIAL

SQUARE = (2, 3, 5, 5)


def bits(*shape):
    return np.random.default_rng(shape).random(shape) < 0.5


# --- each mask, in each rank -----------------------------------------------------------------------------------------


def masks_for(shape):
    """name -> (mask, kind of the loops, its options), all that fit scores of this shape."""
    L, S, lead = shape[-2], shape[-1], shape[:-3]
    rng = np.random.default_rng(shape)

    def ints(low, high, *size):
        return rng.integers(low, high, size)

    q, k, q_rows, k_rows = ints(-3, 6, L), ints(-3, 6, S), ints(-3, 6, *lead, L), ints(-3, 6, *lead, S)
    offset, n, m = ints(-3, 6, *lead), ints(0, S + 1, *lead), ints(0, L + 1, *lead)
    ids_q, ids_k = np.sort(ints(0, 3, *lead, L)), np.sort(ints(0, 3, *lead, S))
    allowed, rows = bits(S), bits(*lead, S)
    few, each = bits(2, 3), bits(*shape[:-2], 2, 3)
    some = bits(*(1,) * (len(shape) - 2), 2, 3)

    def rule(i, j):
        return (i * 3 + j) % 4 < 2

    cu_q, cu_k = [0, 0, 3, L], [0, 2, 2, S]
    cases = {
        "causal top_left": (causal(align="top_left"), "causal", {"align": "top_left"}),
        "causal bottom_right": (causal(align="bottom_right"), "causal", {"align": "bottom_right"}),
        "causal offset": (causal(offset=2), "causal", {"offset": 2}),
        "causal offset behind": (causal(offset=-2), "causal", {"offset": -2}),
        "causal offsets": (causal(offset=offset), "causal", {"offset": offset}),
        "causal positions": (causal(q, k), "causal", {"q_pos": q, "k_pos": k}),
        "causal rows": (causal(q_rows, k_rows), "causal", {"q_pos": q_rows, "k_pos": k_rows}),
        "causal q_pos": (causal(q_pos=q), "causal", {"q_pos": q}),
        "causal k_pos": (causal(k_pos=k_rows), "causal", {"k_pos": k_rows}),
        "key_lengths": (key_lengths(n), "key_lengths", {"n": n}),
        "key_lengths all": (key_lengths(S), "key_lengths", {"n": S}),
        "key_lengths none": (key_lengths(0), "key_lengths", {"n": 0}),
        "query_lengths": (query_lengths(m), "query_lengths", {"n": m}),
        "query_lengths one": (query_lengths(3), "query_lengths", {"n": 3}),
        "keys": (keys(allowed), "keys", {"allowed": allowed}),
        "keys rows": (keys(rows), "keys", {"allowed": rows}),
        "segments": (segments(ids_q, ids_k), "segments", {"q_ids": ids_q, "k_ids": ids_k}),
        "segments mixed": (segments(q, k), "segments", {"q_ids": q, "k_ids": k}),
        "blocks": (blocks(few, (2, 2)), "blocks", {"array": few, "size": (2, 2)}),
        "blocks each": (blocks(each, 2), "blocks", {"array": each, "size": 2}),
        "blocks for all heads": (blocks(some, 2), "blocks", {"array": some, "size": 2}),
        "blocks oblong": (blocks(bits(2, 1) | True, (3, 7)), "blocks", {"array": [[True], [True]], "size": (3, 7)}),
        "where": (where(rule), "where", {"function": rule}),
        "where j": (where(lambda i, j: j > 1), "where", {"function": lambda i, j: j > 1}),
    }
    for left, right in ((0, 0), (1, 0), (0, 2), (2, 1), (None, 1), (1, None), (None, None), (10**20, 0)):
        sides = {"left": left, "right": right}
        cases[f"window {left} {right}"] = window(left, right, align="top_left"), "window", sides
        cases[f"window {left} {right} bottom_right"] = (
            window(left, right, align="bottom_right"), "window", sides | {"align": "bottom_right"}
        )  # fmt: skip
        cases[f"window {left} {right} rows"] = (
            window(left, right, q_rows, k_rows), "window", sides | {"q_pos": q_rows, "k_pos": k_rows}
        )  # fmt: skip
    for align in (None, "top_left", "bottom_right"):
        cases[f"packed {align}"] = packed(cu_q, cu_k, align), "packed", {"cu_q": cu_q, "cu_k": cu_k, "align": align}
    return cases


NAMES = list(masks_for((2, 6, 4, 5)))
MASK = pytest.mark.parametrize("name", NAMES)


@SHAPE
@MASK
def test_against_loops(name, shape):
    mask, kind, options = masks_for(shape)[name]
    dense, expected = mask.bind(shape).dense(), mask_loops(kind, shape, **options)
    assert isinstance(mask, Mask)
    assert dense.dtype == np.bool_
    assert dense.shape == shape
    assert np.array_equal(dense, expected)


def test_the_loops_tell_masks_apart():
    """The cases are not all the same array, nor empty or full (those that are say so)."""
    shape = (2, 6, 4, 5)
    dense = {name: mask.bind(shape).dense() for name, (mask, _, _) in masks_for(shape).items()}
    plain = {name for name, a in dense.items() if a.all() or not a.any()}
    full = {"key_lengths all", "key_lengths none", "blocks oblong"}
    assert plain == full | {f"window None None{tail}" for tail in ("", " bottom_right", " rows")}
    assert len({a.tobytes() for a in dense.values()}) > len(dense) / 2


@pytest.mark.parametrize("n", [1, 2, 5])
def test_square_needs_no_alignment(n):
    shape = (2, 3, n, n)
    for align in ("top_left", "bottom_right"):
        assert np.array_equal(causal().bind(shape).dense(), mask_loops("causal", shape, align=align))
    assert np.array_equal(window(1, 1).bind(shape).dense(), mask_loops("window", shape, left=1, right=1))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_sizes_of_0(shape):
    L, S = shape[-2:]
    masks = [
        causal(align="bottom_right"),
        causal(offset=3),
        window(1, 1, align="top_left"),
        key_lengths(S),
        query_lengths(L),
        keys(np.ones(S, bool)),
        segments(np.zeros(L, int), np.zeros(S, int)),
        packed([0, L], [0, S], "bottom_right"),
        blocks(np.ones((-(-L // 2), -(-S // 2)), bool), 2),
        where(lambda i, j: i >= j),
        ~key_lengths(0),
        key_lengths(0) | np.ones((1, 1), bool),
    ]
    for mask in masks:
        bound = mask.bind(shape)
        assert bound.dense().shape == shape
        assert bound.state((), slice(None), slice(None)) in (EMPTY, PARTIAL, FULL)


def test_positions_far_away():
    """Differences of positions do not overflow, and one that could is refused."""
    far = 2**60
    mask = causal(np.array([far, -far]), np.array([-far, far, 0])).bind((2, 3)).dense()
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert window(2**61 + 5, 0, [far], [-far]).bind((1, 1)).dense().all()
    with pytest.raises(ValueError, match=r"q_pos reaches from .* expected values below 2\*\*61"):
        causal(np.array([2**61]), np.array([0]))
    with pytest.raises(ValueError, match="k_pos reaches from"):
        causal(np.array([0]), np.array([2**64 - 1], np.uint64))


# --- tiles -----------------------------------------------------------------------------------------------------------


def random_tile(shape, rng):
    """An index of some of the leading axes, rows and columns; sometimes empty ones."""
    index = tuple(int(rng.integers(n)) for n in shape[: rng.integers(len(shape) - 1)])
    rows, cols = (slice(*map(int, np.sort(rng.integers(0, n + 1, 2)))) for n in shape[-2:])
    return index, rows, cols


def check_tiles(mask, shape, count):
    """Any tile is that part of the dense mask, and its state is true of it; returns the states that there were."""
    bound, rng = mask.bind(shape), np.random.default_rng(5)
    dense, states = bound.dense(), set()
    assert bound.shape == shape
    for _ in range(count):
        index, rows, cols = random_tile(shape, rng)
        expected = dense[index][..., rows, cols]
        tile, state = bound.tile(index, rows, cols), bound.state(index, rows, cols)
        assert np.array_equal(np.broadcast_to(tile, expected.shape), expected), (index, rows, cols)
        if state == FULL:
            assert expected.all(), (index, rows, cols)
        elif state == EMPTY:
            assert not expected.any(), (index, rows, cols)
        else:
            assert state == PARTIAL
        if expected.size:
            states.add(int(state))
    return states


@SHAPE
@MASK
def test_tiles(name, shape):
    mask, _, _ = masks_for(shape)[name]
    states = check_tiles(mask, shape, 30)
    check_tiles(~mask, shape, 10)
    if name.startswith(("causal top", "causal bottom", "key_lengths one", "query_lengths one", "blocks each", "where")):
        assert len(states) > 1  # not PARTIAL for everything


@pytest.mark.parametrize(
    "mask", [causal(align="top_left"), causal(align="bottom_right"), causal(offset=3), window(3, 1, align="top_left"),
             window(None, 2, align="bottom_right"), key_lengths(5), query_lengths(4), packed([0, 4, 7], [0, 3, 9]),
             keys(np.arange(9) % 4 < 2), blocks(np.eye(4, 5, dtype=bool), 2)],
)  # fmt: skip
def test_states_are_sharp(mask):
    """Where tokens stand in order, every tile without a pair is EMPTY and every whole one FULL: work that is saved."""
    bound = mask.bind((7, 9))
    dense, seen = bound.dense(), set()
    for top, bottom in ((a, b) for a in range(7) for b in range(a + 1, 8)):
        for first, last in ((a, b) for a in range(9) for b in range(a + 1, 10)):
            tile = dense[top:bottom, first:last]
            expected = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
            assert bound.state((), slice(top, bottom), slice(first, last)) == expected
            seen.add(expected)
    assert seen == {EMPTY, PARTIAL, FULL}


def kinds_of_tiles(mask, shape, size):
    """How many tiles of this size there are, and how many keys `tile_key` gives them: equal ones only for equal tiles."""
    bound, count, found = mask.bind(shape), 0, {}
    for index in {(), (0,) * (len(shape) - 2), tuple(n - 1 for n in shape[:-2])}:
        for top, first in itertools.product(*(range(n - m + 1) for n, m in zip(shape[-2:], size, strict=True))):
            rows, cols = slice(top, top + size[0]), slice(first, first + size[1])
            tile, key = bound.tile(index, rows, cols), (index, bound.tile_key(index, rows, cols))
            same = found.setdefault(key, tile)
            assert np.array_equal(tile, same), (index, rows, cols)
            count += 1
    return count, len(found)


@SHAPE
@MASK
def test_tiles_that_are_called_alike_are(name, shape):
    mask, _, _ = masks_for(shape)[name]
    for size in ((1, 1), (2, 3), (3, 1)):
        if all(n >= m for n, m in zip(shape[-2:], size, strict=True)):
            kinds_of_tiles(mask, shape, size)
            kinds_of_tiles(~mask & causal(align="top_left"), shape, size)


def test_a_diagonal_has_one_kind_of_tile():
    for mask in (causal(), window(2, 1), ~window(3, 0), causal() & packed([0, 9], [0, 9], align="top_left")):
        assert kinds_of_tiles(mask, (9, 9), (2, 2)) == (64, 15)


@SHAPE
def test_tiles_of_combinations(shape):
    masks = [mask for mask, _, _ in masks_for(shape).values()]
    array = bits(*shape)
    for a, b in zip(masks[::3], masks[1::3], strict=False):
        check_tiles((a & ~b) | (~a & array), shape, 20)


def test_states_of_combinations():
    """What is known of the parts decides where it can."""
    a, b = causal(offset=-4), key_lengths(3)  # the upper half, and the columns from 3 on, are empty
    rows, cols = slice(0, 4), slice(3, 9)
    for mask, state in ((a & b, EMPTY), (~a | b, FULL), (~(a & b), FULL), (~(a | b), FULL), (~a & ~b, FULL)):
        assert mask.bind((8, 9)).state((), rows, cols) == state


# --- the algebra -----------------------------------------------------------------------------------------------------

A, B = causal(), window(1, 2)  # their laws: test_laws_of_the_mask_algebra in test_properties


def test_operators_against_numpy():
    a, b = A.bind(SQUARE).dense(), B.bind(SQUARE).dense()
    assert np.array_equal((A & B).bind(SQUARE).dense(), a & b)
    assert np.array_equal((A | B).bind(SQUARE).dense(), a | b)
    assert np.array_equal((~A).bind(SQUARE).dense(), ~a)


@pytest.mark.parametrize("form", [(5, 5), (1, 5), (5, 1), (1, 1), SQUARE, (2, 1, 1, 5), (1, 3, 5, 1)])
def test_arrays_both_ways(form):
    array, dense = bits(*form), A.bind(SQUARE).dense()
    for mask, expected in (
        (A & array, dense & array), (array & A, dense & array), (A | array, dense | array), (array | A, dense | array)
    ):  # fmt: skip
        assert isinstance(mask, Mask)
        assert np.array_equal(mask.bind(SQUARE).dense(), expected)
        check_tiles(mask, SQUARE, 10)


def test_streaming():
    """The example of the design: 2 keys that stay, and the last 3."""
    mask = ((key_lengths(2) | window(3, 0)) & causal()).bind((8, 8)).dense()
    expected = [[j <= i and (j < 2 or i - j <= 3) for j in range(8)] for i in range(8)]
    assert mask.tolist() == expected


def test_no_truth_value():
    for mask in (A, A & B, ~A, key_lengths(3)):
        with pytest.raises(TypeError, match=r"no truth value; combine masks with & \| ~"):
            bool(mask)
    with pytest.raises(TypeError, match="no truth value"):
        _ = A and B


@pytest.mark.parametrize("other", [None, True, 1, "causal", [[True]], np.True_])
def test_what_is_no_mask(other):
    with pytest.raises(TypeError, match="mask is"):
        _ = A & other
    with pytest.raises(TypeError, match="mask is"):
        _ = other | A


def test_arrays_that_are_no_mask():
    with pytest.raises(TypeError, match=r"mask has dtype float64, expected bool \(True = may attend\)"):
        _ = A & np.ones((5, 5))
    with pytest.raises(TypeError, match="mask has dtype int64"):
        _ = np.ones((5, 5), int) | A
    with pytest.raises(ValueError, match=r"mask has shape \(3, 5, 5\), expected"):
        (A & np.ones((3, 5, 5), bool)).bind(SQUARE)


# --- masks are values ------------------------------------------------------------------------------------------------

EYE = np.eye(5, dtype=bool)
MADE_OF = {  # an array, what it is changed to, and a mask of it
    "offset": ([1, 2], [2, 3], lambda a: causal(offset=a)),
    "q_pos": ([3, 1, 4, 2, 0], [0, 1, 2, 3, 4], lambda a: causal(q_pos=a)),
    "k_pos": ([3, 1, 4, 2, 0], [0, 1, 2, 3, 4], lambda a: window(1, 1, k_pos=a)),
    "key_lengths": ([3, 4], [4, 4], key_lengths),
    "query_lengths": ([3, 4], [4, 4], query_lengths),
    "keys": ([True, False, True, True, False], [True] * 5, keys),
    "q_ids": ([0, 0, 1, 1, 2], [0, 1, 1, 1, 2], lambda a: segments(a, [0, 1, 1, 2, 2])),
    "k_ids": ([0, 0, 1, 1, 2], [0, 1, 1, 1, 2], lambda a: segments([0, 1, 1, 2, 2], a)),
    "cu_seqlens_q": ([0, 2, 5], [0, 1, 5], lambda a: packed(a, [0, 3, 5])),
    "cu_seqlens_k": ([0, 2, 5], [0, 1, 5], lambda a: packed([0, 3, 5], a, "bottom_right")),
    "blocks": (EYE, ~EYE, lambda a: blocks(a, 1)),
    "mask & array": (EYE, ~EYE, lambda a: causal() & a),
    "array | mask": (EYE, ~EYE, lambda a: a | window(0, 1)),
}


@pytest.mark.parametrize("name", MADE_OF)
def test_masks_are_values(name):
    """An array that is counted up, or filled again, after a mask was made of it does not change the mask."""
    before, after, make = MADE_OF[name]
    array = np.array(before)
    mask = make(array)
    expected = mask.bind(SQUARE).dense().copy()
    array[...] = after
    assert not np.array_equal(make(array).bind(SQUARE).dense(), expected), "this change would not show"
    assert np.array_equal(mask.bind(SQUARE).dense(), expected)
    assert np.array_equal((~~mask).bind(SQUARE).dense(), expected)


def test_offset_counted_up_between_forward_and_backward():
    """The loop of a decoder: the position array is one buffer, and the backward comes when it has moved on."""
    rng = np.random.default_rng(2)
    q, k, v, dout = (rng.standard_normal((2, 1, 3, 4)) for _ in range(4))
    offset = np.array([0, -1])
    _, cache = attention_forward(q, k, v, mask=causal(offset=offset))
    expected = attention_backward(dout, cache)
    offset += 1
    grads = attention_backward(dout, cache)
    assert all(np.array_equal(a, b) for a, b in zip(expected[:3], grads[:3], strict=True))


def test_lists_and_numbers_do():
    shape = (2, 3, 5, 5)
    assert np.array_equal(key_lengths([3, 4]).bind(shape).dense(), key_lengths(np.array([3, 4])).bind(shape).dense())
    assert np.array_equal(causal(offset=[1, 0]).bind(shape).dense(), mask_loops("causal", shape, offset=[1, 0]))
    assert np.array_equal(
        keys([True, False, True, False, True]).bind(shape).dense(), mask_loops("keys", shape, allowed=[1, 0, 1, 0, 1])
    )
    for dtype in (np.int8, np.uint8, np.uint64):
        n = np.array([3, 4], dtype)
        assert np.array_equal(key_lengths(n).bind(shape).dense(), mask_loops("key_lengths", shape, n=[3, 4]))
        assert np.array_equal(
            causal(np.arange(5, dtype=dtype), np.arange(5, dtype=dtype)).bind(shape).dense(),
            mask_loops("causal", shape),
        )
