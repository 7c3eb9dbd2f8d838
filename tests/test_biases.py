"""Biases and their gradients against explicit loops, whole and in tiles."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from helpers import EACH, IMPLEMENTATIONS, SHAPES, assert_close, check_attention, pair_shape, qkv, random, sum_to
from oracles import add, mask_loops, position_loops

from npattn import (
    Alibi,
    MultiHeadParams,
    RelativeTable,
    alibi_slopes,
    attention_forward,
    causal,
    multi_head_forward,
)
from npattn.ops.calls import bind_bias

ALL = slice(None)
BUCKETS = 5


def clipped(relative):
    """Buckets of relative positions -2 and less .. 2 and more; more than one position a bucket."""
    return np.clip(relative, -2, 2) + 2


# --- loops -----------------------------------------------------------------------------------------------------------


def head_of(at):
    return at[-3] if len(at) > 2 else 0


def distance_loops(shape, **positions):
    """(..., H, L, S): k_pos - q_pos of each pair."""
    result = np.zeros(shape, np.int64)
    for at in np.ndindex(*shape):
        q, k = position_loops(tuple(at[:-3]), at[-2], at[-1], shape[-2], shape[-1], **positions)
        result[at] = k - q
    return result


def alibi_loops(slopes, distance):
    result = np.zeros(distance.shape)
    for at in np.ndindex(*distance.shape):
        result[at] = -float(slopes[head_of(at)]) * abs(int(distance[at]))
    return result


def alibi_gradient_loops(distance, dscores, heads):
    terms = [[] for _ in range(heads)]
    for at in np.ndindex(*distance.shape):
        terms[head_of(at)].append(-abs(int(distance[at])) * float(dscores[at]))
    return np.array([add(t) for t in terms])


def table_loops(table, buckets):
    result = np.zeros(buckets.shape)
    for at in np.ndindex(*buckets.shape):
        result[at] = table[int(buckets[at]), head_of(at)]
    return result


def table_gradient_loops(buckets, dscores, table_shape):
    terms = {at: [] for at in np.ndindex(*table_shape)}
    for at in np.ndindex(*buckets.shape):
        terms[int(buckets[at]), head_of(at)].append(float(dscores[at]))
    result = np.zeros(table_shape)
    for at, t in terms.items():
        result[at] = add(t)
    return result


def positions_for(shape, seed=3):
    """Every way to say where tokens stand."""
    rng, (L, S), lead = np.random.default_rng(seed), shape[-2:], shape[:-3]
    return {
        "top_left": {"align": "top_left"},
        "bottom_right": {"align": "bottom_right"},
        "offset": {"offset": 3},
        "offsets": {"offset": rng.integers(-3, 4, lead)},
        "positions": {"q_pos": rng.integers(-4, 9, L), "k_pos": rng.integers(-4, 9, S)},
        "rows": {"q_pos": rng.integers(-4, 9, (*lead, L)), "k_pos": rng.integers(-4, 9, (*lead, S))},
    }


def heads_in(shape):
    return shape[-3] if len(shape) > 2 else 1


def buckets_for(shape, form):
    """An array of buckets of that form: axes of size 1 where it says 1."""
    return np.random.default_rng(6).integers(
        0, BUCKETS, tuple(n if x != "1" else 1 for n, x in zip(shape[-len(form) :], form, strict=True))
    )


# --- values ----------------------------------------------------------------------------------------------------------


def test_slopes_of_the_paper():
    """Press et al. 2022: 1/2 .. 1/256 for 8 heads; for 12 those of 8 and then every other one of 16, from 2^-0.5 on."""
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(8).tolist() == eight
    between = [0.7071067811865476, 0.35355339059327384, 0.17677669529663692, 0.08838834764831849]
    assert_close(alibi_slopes(12), np.array(eight + between), np.array(eight + between))
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(2).tolist() == [2.0**-4, 2.0**-8]
    assert_close(alibi_slopes(3), np.array([2.0**-4, 2.0**-8, 2.0**-2]), np.ones(3))
    sixteen = [2.0 ** (-(n + 1) / 2) for n in range(16)]
    assert_close(alibi_slopes(16), np.array(sixteen), np.array(sixteen))
    assert alibi_slopes(8, np.float32).dtype == np.float32


def slopes_of_the_rule(heads):
    """The paper's words: geometric from 2^(-8/n) on with that ratio, n a power of two.

    For other numbers of heads, those of the power below, then the 1st, 3rd, 5th ... of the power above.
    """
    below = 1 << (heads.bit_length() - 1)
    some = [2.0 ** (-8 * i / below) for i in range(1, below + 1)]
    return some + [2.0 ** (-8 * i / (2 * below)) for i in range(1, 2 * below + 1)][::2][: heads - below]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 12, 20, 31, 40, 64])
def test_slopes_of_any_number_of_heads(heads):
    expected = np.array(slopes_of_the_rule(heads))
    assert_close(alibi_slopes(heads), expected, expected)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_buckets_of_any_integers(dtype):
    shape = SHAPES["rank4"]
    table, buckets = random((BUCKETS, 6), 2), buckets_for(shape, "LS").astype(dtype)
    dense = RelativeTable(table, buckets).bind(shape).dense()
    assert np.array_equal(dense, table_loops(table, np.broadcast_to(buckets, shape)))


def test_function_of_relative_positions():
    """It is asked with k_pos - q_pos, whose sign matters: T5 has buckets for before and after."""
    table = np.array([[10.0], [20.0]])
    dense = RelativeTable(table, lambda r: (r > 0).astype(int)).bind((3, 3)).dense()
    assert dense.tolist() == [[10, 20, 20], [10, 10, 20], [10, 10, 10]]


# --- tiles and gradients ---------------------------------------------------------------------------------------------


def make(kind, shape):
    """A bias, its value and its gradient for given dscores by loops, its parameter."""
    heads = heads_in(shape)
    if kind == "array":
        values = random(shape, 4)
        return values, values, lambda d: d, values
    if kind.startswith("array "):
        small = tuple(n if x != "1" else 1 for n, x in zip(shape[-len(kind[6:]) :], kind[6:], strict=True))
        values = random(small, 4)
        return values, np.broadcast_to(values, shape), lambda d: sum_to(d, small), values
    place, name = kind.split(" ", 1)
    if place == "alibi":
        positions, slopes = positions_for(shape)[name], random((heads,), 2)
        distance = distance_loops(shape, **positions)
        return (
            Alibi(slopes, **positions), alibi_loops(slopes, distance),
            lambda d: alibi_gradient_loops(distance, d, heads), slopes,
        )  # fmt: skip
    table = random((BUCKETS, heads), 2)
    if place == "function":
        positions = positions_for(shape)[name]
        buckets, bias = clipped(distance_loops(shape, **positions)), RelativeTable(table, clipped, **positions)
    else:
        some = buckets_for(shape, name)
        buckets, bias = np.broadcast_to(some, shape), RelativeTable(table, some)
    return bias, table_loops(table, buckets), lambda d: table_gradient_loops(buckets, d, table.shape), table


KINDS = [
    "array",
    *(f"{kind} {place}" for kind in ("alibi", "function") for place in positions_for((4, 5))),
    *(f"{kind} {form}" for kind in ("array", "buckets") for form in ("LS", "1S", "L1", "11")),
]
FULL_FORMS = ["".join(form) for form in itertools.product("1B", "1H", "1L", "1S")]
CASES = [
    *((kind, shape) for kind in KINDS for shape in SHAPES.values()),
    *((f"{kind} {form}", SHAPES["rank4"]) for kind in ("array", "buckets") for form in FULL_FORMS),
]
CASE = pytest.mark.parametrize(("kind", "shape"), CASES, ids=[f"{kind} {len(shape)}" for kind, shape in CASES])


def bound(bias, shape):
    return bind_bias("attention", bias, shape, np.dtype(np.float64), np.dtype(np.float64))


def grid(shape, rows, cols):
    """Tiles of each head that cover all pairs once."""
    for index in np.ndindex(*shape[:-2]):
        for top in range(0, shape[-2], rows):
            for left in range(0, shape[-1], cols):
                yield index, slice(top, min(top + rows, shape[-2])), slice(left, min(left + cols, shape[-1]))


@CASE
def test_tiles(kind, shape):
    bias, values, _, _ = make(kind, shape)
    b = bound(bias, shape)
    assert values.any()
    assert np.array_equal(np.broadcast_to(b.tile((), ALL, ALL), shape), values)
    assert np.array_equal(b.dense(), values)
    for rows, cols in ((1, 1), (3, 2), (4, 5)):
        for index, i, j in grid(shape, rows, cols):
            expected = values[index][i, j]
            assert np.array_equal(np.broadcast_to(b.tile(index, i, j), expected.shape), expected)


@CASE
def test_gradient_of_tiles(kind, shape):
    """Added up tile by tile, in any order, it is that of the whole; both against loops."""
    bias, _, gradient, parameter = make(kind, shape)
    b, dscores = bound(bias, shape), random(shape, 9)
    expected, terms = gradient(dscores), np.abs(gradient(np.abs(dscores)))
    whole = b.new_gradient()
    assert whole.shape == parameter.shape
    assert not whole.any()
    b.add_gradient(whole, (), ALL, ALL, dscores)
    assert_close(whole, expected, terms)
    assert whole.any()
    for rows, cols in ((1, 1), (3, 2), (4, 5)):
        total = b.new_gradient()
        for index, i, j in reversed(list(grid(shape, rows, cols))):
            b.add_gradient(total, index, i, j, dscores[index][i, j])
        assert_close(total, expected, terms)
    finished = b.finish(whole)
    if isinstance(bias, np.ndarray):
        assert finished.dtype == bias.dtype
        assert np.array_equal(finished, whole)
    else:
        assert type(finished) is type(bias)
        assert finished.parameter is not bias.parameter
        assert np.array_equal(finished.parameter, whole)
        assert np.array_equal(bias.parameter, parameter)


@CASE
def test_gradient_of_all_heads_at_once_is_added_to_what_was_there(kind, shape):
    """The index of a tile may name a sequence and leave its heads together, as it may for the values of the tile."""
    bias, values, gradient, parameter = make(kind, shape)
    b, dscores = bound(bias, shape), random(shape, 9)
    before = random(parameter.shape, 10)
    total = before.copy()
    for index in np.ndindex(*shape[:-3]):
        tile = b.tile(index, ALL, slice(1, 3))
        assert np.array_equal(np.broadcast_to(tile, values[index][..., 1:3].shape), values[index][..., 1:3])
        for cols in (slice(0, 2), slice(2, 5)):
            b.add_gradient(total, index, ALL, cols, dscores[index][..., cols])
    assert_close(total, before + gradient(dscores), np.abs(before) + np.abs(gradient(np.abs(dscores))))


# --- in attention ----------------------------------------------------------------------------------------------------

ATTENTION_KINDS = ["alibi bottom_right", "alibi offsets", "alibi rows", "function top_left", "function rows",
                   "buckets LS", "buckets 1HLS", "buckets BH1S"]  # fmt: skip


@EACH
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize("more", [False, True], ids=["plain", "more"])
def test_in_attention(implementation, kind, more):
    """Values, and the gradient of the parameter from the loops' gradient of every single score."""
    x = qkv()
    shape = pair_shape(x)
    bias, values, gradient, parameter = make(kind, shape)
    options = {}
    if more:
        options = {
            "mask": causal(align="top_left"),
            "softcap": 1.3,
            "sink": random((6,), 1),
            "allowed": mask_loops("causal", shape, align="top_left"),
        }
    result = check_attention(implementation, x, bias=bias, values=values, **options)
    grads, dscores = result["grads"].bias, result["expected"]["bias"]
    assert type(grads) is type(bias)
    # a score's gradient is p (dp - mean + dlse), whose parts may cancel: bounded by the largest part of any
    largest = np.abs(x["dout"]).sum(-1).max() * np.abs(x["v"]).max() + np.abs(x["dlse"]).max()
    size = 1 + np.abs(values).max() + np.abs(x["q"]).max() * np.abs(x["k"]).sum(-1).max()
    terms = np.abs(gradient(result["expected"]["weights"] * largest * size))
    assert_close(grads.parameter, gradient(dscores), terms)
    assert grads.parameter.shape == parameter.shape


@EACH
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bucket_of_minus_infinity_is_a_mask(implementation, poison):
    """Keys after the query have a bucket of -inf: nothing of them reaches anything, and its gradient is 0."""
    x = qkv(L=5, S=5)
    shape = pair_shape(x)
    table = random((3, 6), 1)
    table[2] = -np.inf
    bias = RelativeTable(table, lambda r: np.sign(r) + 1)
    values = bias.bind(shape).dense()
    assert np.array_equal(values > -np.inf, mask_loops("causal", shape))
    last = np.where(np.arange(5) == 4, poison, 0)[:, None]
    x |= {"k": x["k"] + last, "v": x["v"] + last}
    forward, backward = IMPLEMENTATIONS[implementation]
    out, cache = forward(x["q"], x["k"], x["v"], bias=bias)
    grads = backward(x["dout"], cache, x["dlse"])
    first = {name: a[..., :4, :] for name, a in x.items() if name != "dlse"} | {"dlse": x["dlse"][..., :4]}
    result = check_attention(implementation, first, bias=bias, values=values[..., :4, :4])
    assert_close(out[..., :4, :], result["out"], np.abs(result["out"]) + 1)
    assert np.isnan(out[..., 4, :]).all()
    assert np.isfinite(grads.q[..., :4, :]).all()
    assert np.isfinite(result["grads"].bias.table).all()
    assert not result["grads"].bias.table[2].any()
    assert result["grads"].bias.table[:2].all()


@EACH
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["inputs' dtype", "computing dtype"])
def test_halves(implementation, dtype, own):
    """Parameters in either dtype, computed in float32, gradients in their own."""
    x = qkv(dtype=dtype)
    kind = dtype if own else np.float32
    forward, backward = IMPLEMENTATIONS[implementation]
    exact = {name: a.astype(np.float32) for name, a in x.items()}
    for make_bias in (
        lambda d: Alibi(alibi_slopes(6).astype(kind).astype(d), align="top_left"),
        lambda d: RelativeTable(random((BUCKETS, 6), 1).astype(kind).astype(d), clipped, align="top_left"),
        lambda d: random((6, 4, 5), 1)[None].astype(kind).astype(d),
    ):
        (_, lse), cache = forward(x["q"], x["k"], x["v"], bias=make_bias(kind), return_lse=True)
        grads = backward(x["dout"], cache, x["dlse"]).bias
        (_, lse32), cache = forward(exact["q"], exact["k"], exact["v"], bias=make_bias(np.float32), return_lse=True)
        expected = backward(exact["dout"], cache, exact["dlse"]).bias
        grads, expected = (getattr(g, "parameter", g) for g in (grads, expected))
        assert grads.dtype == kind
        assert expected.dtype == np.float32
        assert np.array_equal(lse, lse32)  # the same float32 computation
        assert np.array_equal(grads, expected.astype(kind))


# --- values that stay, and what is refused ---------------------------------------------------------------------------


def test_positions_counted_up_afterwards():
    """What was bound in a forward does not move on with the caller's offset."""
    x = qkv()
    offset = np.array([1, 2])
    forward, backward = IMPLEMENTATIONS["dense"]
    for bias in (Alibi(random((6,), 1), offset=offset), RelativeTable(random((BUCKETS, 6), 1), clipped, offset=offset)):
        offset[:] = 1, 2
        _, cache = forward(x["q"], x["k"], x["v"], bias=bias)
        expected = backward(x["dout"], cache).bias.parameter
        offset += 1
        assert np.array_equal(backward(x["dout"], cache).bias.parameter, expected)


def test_gradients_are_new_arrays():
    bias = np.zeros((4, 5))
    b = bound(bias, SHAPES["rank4"])
    total = b.new_gradient()
    b.add_gradient(total, (), ALL, ALL, np.ones(SHAPES["rank4"]))
    assert not bias.any()
    assert total.tolist() == [[12.0] * 5] * 4


SHAPE4 = (2, 6, 4, 5)
ZEROS = np.zeros((BUCKETS, 6))


def test_buckets_of_another_shape_than_asked_for():
    bias, x = RelativeTable(ZEROS, lambda r: np.zeros((1, 3), int), align="top_left"), qkv()
    with pytest.raises(ValueError, match="buckets returns shape"):
        attention_forward(x["q"], x["k"], x["v"], bias=bias)


def test_buckets_beyond_the_first_tile():
    """A function whose buckets leave the table only far away is refused when it is asked there."""
    bias = RelativeTable(ZEROS, lambda r: np.abs(r), q_pos=np.zeros(4, int), k_pos=np.array([0, 1, 2, 3, 9]))
    x = qkv()
    with pytest.raises(ValueError, match="buckets reaches from 0 to 9"):
        attention_forward(x["q"], x["k"], x["v"], bias=bias)


def test_buckets_as_a_list():
    """As the integers of masks may be (the table checks it when it is made)."""
    buckets = np.random.default_rng(1).integers(0, BUCKETS, (4, 5))
    table = random((BUCKETS, 6), 1)
    dense = RelativeTable(table, buckets.tolist()).bind(SHAPE4).dense()
    assert np.array_equal(dense, RelativeTable(table, buckets).bind(SHAPE4).dense())


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize(
    "make",
    [
        lambda slopes, at, table: Alibi(slopes, offset=at),
        lambda slopes, at, table: Alibi(slopes, q_pos=at, k_pos=at),
        lambda slopes, at, table: RelativeTable(table, lambda r: np.clip(r, -2, 2) + 2, q_pos=at, k_pos=at),
        lambda slopes, at, table: RelativeTable(table, np.abs(at - at[:, None]).clip(0, 4)),
    ],
    ids=["offset", "positions", "table of positions", "table of buckets"],
)
def test_a_bias_is_a_value(make, implementation):
    """What it was made of may change after that: in attention, in a layer, and where its parameter is replaced."""
    rng = np.random.default_rng(0)
    slopes, at, table = rng.random(4), np.arange(2), rng.standard_normal((5, 4))
    x = rng.standard_normal((2, 2, 8))
    q = rng.standard_normal((2, 4, 2, 2))
    params = MultiHeadParams(*(rng.standard_normal((8, 8)) for _ in range(4)))
    bias = make(slopes, at, table)

    def results():
        layer = multi_head_forward(x, x, x, params, 4, bias=bias, implementation=implementation)[0]
        replaced = bias.with_parameter(bias.parameter.astype(np.float32))
        low = attention_forward(*(q.astype(np.float32),) * 3, bias=replaced)[0]
        return layer, attention_forward(q, q, q, bias=bias)[0], low

    before = results()
    slopes += 1
    table += 1
    at += 7
    for old, new in zip(before, results(), strict=True):
        assert np.array_equal(old, new)
