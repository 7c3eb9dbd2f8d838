"""Dropout by a given mask, and the counter-based masks of `Dropout`: which elements, how good, and inside attention."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close, blockwise_of, qkv, random
from oracles import dropout_bits, dropout_loops
from scipy import stats
from test_blockwise import forward_arrays, peak_beyond_outputs

import npattn
from npattn import (
    Dropout,
    MultiHeadParams,
    attention_backward,
    attention_forward,
    blockwise_backward,
    blockwise_forward,
    causal,
    dropout,
    dropout_backward,
    dropout_forward,
    gradcheck,
    multi_head_backward,
    multi_head_forward,
)
from npattn.ops.dropout import absorb
from npattn.ops.tiles import SIZES, Sizes
from npattn.tolerances import BEYOND

# --- by a given mask -------------------------------------------------------------------------------------------------------

SHAPES = [(), (7,), (5, 7), (2, 3, 7), (0, 7), (2, 0)]


def drawn(shape, p=0.4, seed=3, dtype=np.float64):
    return np.asarray((np.random.default_rng(seed).random(shape) >= p) / (1 - p)).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_is_that_of_loops(shape, dtype):
    x, dy, mask = np.asarray(random(shape, 0, dtype)), np.asarray(random(shape, 1, dtype)), drawn(shape, dtype=dtype)
    want, (y, cache) = dropout_loops(x, mask, dy), dropout_forward(x, mask)
    assert_close(y, want["y"], np.abs(want["y"]))
    assert_close(dropout_backward(dy, cache).x, want["x"], np.abs(want["x"]))
    assert np.array_equal(dropout(x, mask), y)
    assert y.shape == x.shape


@pytest.mark.parametrize("method", ["complex", "central"])
def test_its_gradient_is_the_derivative(method):
    mask = drawn((3, 4, 5))
    gradcheck(lambda x: dropout_forward(x, mask), dropout_backward, {"x": random((3, 4, 5), 1)}, method=method)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_dropped_reaches_nothing(poison):
    x, mask = np.array([1.0, poison, 3.0, poison]), np.array([2.0, 0.0, 2.0, 2.0])
    y, cache = dropout_forward(x, mask)
    assert np.array_equal(y, [2, 0, 6, poison], equal_nan=True)
    assert np.array_equal(dropout_backward(np.array([1.0, poison, 0.0, 0.0]), cache).x, [2, 0, 0, 0])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.longdouble])
def test_dtypes(dtype):
    x, mask = random((4, 5), 1, np.float64).astype(dtype), drawn((4, 5)).astype(dtype)
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    y, cache = dropout_forward(x, mask)
    assert y.dtype == dropout_backward(x, cache).x.dtype == dtype
    assert np.array_equal(y, (x.astype(wide) * mask.astype(wide)).astype(dtype))
    of_computing, _ = dropout_forward(x, drawn((4, 5)).astype(wide))  # the mask may be in the computing dtype
    assert of_computing.dtype == dtype


def test_complex_numbers_take_a_real_mask():
    x, mask = random((4, 5), 1, np.complex128), drawn((4, 5))
    y, cache = dropout_forward(x, mask)
    assert np.array_equal(y, x * mask)
    assert np.array_equal(dropout_backward(x, cache).x, x * mask)


def test_views_and_inputs():
    x, mask = np.broadcast_to(np.arange(5.0), (4, 5)), np.broadcast_to(drawn((4, 1)), (4, 5))
    assert np.array_equal(dropout(x, mask), dropout(x.copy(), mask.copy()))
    assert np.array_equal(dropout(np.arange(10.0)[::-2], mask[0]), dropout(np.arange(10.0)[::-2].copy(), mask[0]))


X = np.ones((3, 4))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: dropout([1.0], X), TypeError, "dropout: x is a list, expected a numpy.ndarray"),
    (lambda: dropout(X, X > 0), TypeError, "dropout: mask has dtype bool, expected float64"),
    (lambda: dropout(X, X[0]), ValueError, r"dropout: mask has shape \(4,\), expected \(3, 4\): it is fixed by x"),
    (lambda: dropout(X, -X), ValueError, r"dropout: mask reaches from -1.0 to -1.0, expected 0 or 1/\(1-p\) for each element"),
    (lambda: dropout(X, X * np.nan), ValueError, "dropout: mask reaches from nan to nan"),
    (lambda: dropout(X, X * np.inf), ValueError, "dropout: mask reaches from inf to inf"),
    (lambda: dropout(X, X, p=0.1), TypeError, r"keyword p, expected mask=npattn.Dropout\(p, seed\).mask\(x.shape, x.dtype\)"),
    (lambda: dropout(X, Dropout(0.1, 1)), TypeError, "dropout: mask is a npattn.ops.dropout.Dropout, expected a numpy.ndarray"),
    (lambda: dropout_backward(np.ones(3), dropout_forward(X, X)[1]), ValueError, r"dropout: dy has shape \(3,\), expected \(3"),
    (lambda: dropout_backward(X, None), TypeError, "dropout: cache is a NoneType, expected npattn.DropoutCache"),
    (lambda: Dropout(1.0, 0), ValueError, "Dropout: p is 1.0, expected at least 0 and less than 1"),
    (lambda: Dropout(-0.1, 0), ValueError, "Dropout: p is -0.1, expected at least 0 and less than 1"),
    (lambda: Dropout(np.nan, 0), ValueError, "Dropout: p is nan, expected at least 0"),
    (lambda: Dropout("0.1", 0), TypeError, "Dropout: p is a str, expected a Python float"),
    (lambda: Dropout(0.1, -1), ValueError, "Dropout: seed is -1, expected an integer of at least 0"),
    (lambda: Dropout(0.1, 2**64), ValueError, "Dropout: seed is 18446744073709551616, expected less than"),
    (lambda: Dropout(0.1, 1.5), TypeError, "Dropout: seed is a float, expected an integer"),
    (lambda: Dropout(0.1, 0, step=None), TypeError, "Dropout: step is a NoneType, expected an integer"),
    (lambda: Dropout(0.1, 0, layer=-2), ValueError, "Dropout: layer is -2, expected an integer of at least 0"),
    (lambda: Dropout(0.1, 0).mask((2, 3), int), TypeError, "Dropout: dtype is int64, expected a floating dtype"),
    (lambda: Dropout(0.1, 0).mask(5), TypeError, "Dropout: shape is an int, expected a tuple of integers"),
    (lambda: Dropout(0.1, 0).mask((2, 0.5)), TypeError, "Dropout: shape is a float, expected an integer"),
    (lambda: Dropout(0.1, 0).bind((5,)), ValueError, r"Dropout: shape is \(5,\), expected rank 2 or more"),
    (lambda: npattn.attention(X, X, X, dropout_mask=Dropout), TypeError, "attention: dropout_mask is a type, expected an"),
])  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_verify_knows_it():
    report = npattn.verify.verify("dropout")
    assert report.passed, report.lines()


# --- which elements are dropped --------------------------------------------------------------------------------------------


def test_a_mask_is_what_the_page_says():
    """Every number is part of the counter: batch and head, row and column, seed, step and layer."""
    for seed, step, layer in ((0, 0, 0), (5, 3, 2), (2**64 - 1, 2**40, 7)):
        mask = Dropout(0.3, seed, step, layer).bind((2, 3, 5, 7)).dense()
        for b, h, i, j in np.ndindex(2, 3, 5, 7):
            assert (mask[b, h, i, j] == 0) == dropout_bits(0.3, seed, step, layer, b, h, i, j)
    assert np.array_equal(Dropout(0.3, 1).bind((5, 7)).dense(), Dropout(0.3, 1).bind((1, 1, 5, 7)).dense()[0, 0])
    assert np.array_equal(Dropout(0.3, 1).bind((3, 5, 7)).dense(), Dropout(0.3, 1).bind((1, 3, 5, 7)).dense()[0])
    two = Dropout(0.3, 1).bind((2, 2, 3, 5, 7)).dense()
    assert np.array_equal(two.reshape(4, 3, 5, 7), Dropout(0.3, 1).bind((4, 3, 5, 7)).dense())


def test_an_element_does_not_depend_on_the_shape():
    mask = Dropout(0.4, 1, 2, 3).bind((3, 4, 70, 90)).dense()
    assert np.array_equal(Dropout(0.4, 1, 2, 3).bind((2, 4, 50, 33)).dense(), mask[:2, :, :50, :33])


@pytest.mark.parametrize(("rows", "cols"), [
    (slice(0, 9), slice(0, 8)), (slice(3, 70), slice(5, 90)), (slice(4, 5), slice(7, 8)), (slice(5, 5), slice(0, 3)),
    (slice(0, 4), slice(6, 6)), (slice(None), slice(None)),
])  # fmt: skip
def test_a_tile_is_that_part_of_the_whole(rows, cols):
    bound = Dropout(0.4, 1).bind((3, 4, 70, 90), np.float32)
    whole = bound.dense()
    for index in ((), (1,), (1, 2), (slice(0, 2),), (2, slice(1, 3))):
        tile = bound.tile(index, rows, cols)
        assert np.array_equal(tile, whole[index][..., rows, cols])
        assert tile.dtype == np.float32


def test_a_large_tile_is_made_of_parts():
    """More words than are made at a time."""
    bound = Dropout(0.4, 1).bind((300, 500))
    assert np.array_equal(bound.dense()[150:], bound.tile((), slice(150, 300), slice(0, 500)))
    wide = Dropout(0.4, 1).bind((2, 70_001))
    assert np.array_equal(wide.dense()[:, 3:], wide.tile((), slice(0, 2), slice(3, 70_001)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.longdouble])
def test_masks_of_activations(dtype):
    for shape in SHAPES:
        mask = Dropout(0.1, 5).mask(shape, dtype)
        assert mask.shape == shape
        assert mask.dtype == dtype
    mask, scale = Dropout(0.1, 5).mask((4, 50), dtype), (1 / (1 - np.longdouble(0.1))).astype(dtype)
    assert set(mask.ravel().tolist()) == {0.0, np.asarray(scale).item()}
    dropout(np.ones((4, 50), dtype), mask)
    assert np.array_equal(mask != 0, Dropout(0.1, 5).bind((4, 50)).dense() != 0)


def test_nothing_and_nearly_everything_dropped():
    assert (Dropout(0.0, 1).mask((50, 50)) == 1).all()
    assert Dropout(0, 1) == Dropout(0.0, 1)
    assert not Dropout(1 - 2**-53, 1).mask((50, 50)).any()


def test_it_is_a_value():
    assert Dropout(0.1, 5, 2, 3) == Dropout(p=0.1, seed=5, step=2, layer=3)
    assert len({Dropout(0.1, 5), Dropout(0.1, 5), Dropout(0.1, 6)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Dropout(0.1, 5).p = 0.2
    assert dataclasses.replace(Dropout(0.1, 5), step=9) == Dropout(0.1, 5, 9)


# --- how good the generator is ---------------------------------------------------------------------------------------------

N = 512  # queries and keys: 2^18 pairs


def signs(p=0.5, seed=0, step=0, layer=0, shape=(N, N)):
    """Independent numbers of mean 0 and variance 1, if the generator is good: 1 where dropped, less p, over the deviation."""
    dropped = Dropout(p, seed, step, layer).bind(shape).dense() == 0
    return (dropped - p) / math.sqrt(p * (1 - p))


def within(z, tests=1):
    """Whether sums of very many such numbers over the root of their number, standard normal, are where they should be."""
    return np.abs(z).max() <= stats.norm.isf(BEYOND / 2 / tests / np.size(z))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_share_that_is_dropped(p, seed):
    """Of all, of each row, each column, and of each of the columns by their number modulo 2 to 64."""
    x = signs(p, seed)
    assert within(x.sum() / N)
    for axis in (0, 1):
        sums = np.square(x.sum(axis)).sum() / N  # chi-square with N degrees of freedom, if a sum of N is normal
        assert stats.chi2.isf(1 - BEYOND, N) < sums < stats.chi2.isf(BEYOND, N) * (1 + 1 / (N * p * (1 - p)))
    for k in (2, 4, 8, 16, 32, 64):
        assert within(x.reshape(N, -1, k).sum((0, 1)) / math.sqrt(N * N / k), tests=6)
        assert within(x.reshape(-1, k, N).sum((0, 2)) / math.sqrt(N * N / k), tests=6)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_near_pairs_are_independent(p):
    """Pairs that lie apart by few rows and columns, or by powers of two."""
    x, lags = signs(p), [*range(6), 8, 16, 64, 256]
    found = []
    for rows, cols in itertools.product(lags, lags):
        if rows + cols:
            found.append(x[: N - rows, : N - cols] * x[rows:, cols:])  # to the right
            found.append(x[: N - rows, cols:] * x[rows:, : N - cols])  # and to the left
    found = [products.sum() / math.sqrt(products.size) for products in found]
    assert len(found) == 2 * (10**2 - 1)
    assert within(np.array(found))


def test_there_is_no_lattice():
    """The power at each frequency of white noise is exponential: no wave in any direction stands out."""
    power = np.square(np.abs(np.fft.rfft2(signs()))) / N**2
    assert power[:, 1:-1].max() < math.log(power.size / BEYOND)
    assert power.max() < 2 * math.log(power.size / BEYOND)  # those of real waves are chi-square with one degree of freedom


def test_corners_of_rectangles_are_independent():
    """Keys of rows and columns that are only added or xored have the same relation in all rectangles."""
    rng, x = np.random.default_rng(0), signs()
    (i, k), (j, m) = (np.sort(np.argsort(rng.random((1 << 12, N)), 1)[:, :2], 1).T for _ in range(2))
    corners = x[i, j] * x[i, m] * x[k, j] * x[k, m]
    assert within(corners.sum() / math.sqrt(len(corners)))


def test_heads_batches_steps_layers_and_seeds_are_independent():
    """The same pairs of any two of them, also of numbers that are exchanged, or that differ in one bit."""
    some = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (2, 0, 0), (0, 2, 0), (0, 0, 2), (3, 5, 7), (7, 5, 3),
            (2**63, 0, 0), (0, 2**32, 0), (0, 0, 2**31), (2**64 - 1, 0, 0)]  # fmt: skip
    x = [signs(0.5, *numbers) for numbers in some]
    x += [*signs(shape=(2, 3, N, N)).reshape(6, N, N)[1:]]  # the first of these is that of (0, 0, 0)
    x += [x[0].T, x[0][::-1], x[0][:, ::-1]]  # rows and columns are not the same either
    found = [(a * b).sum() / N for a, b in itertools.combinations(x, 2)]
    assert within(np.array(found))
    shifted = [(a[1:] * b[:-1]).sum() / math.sqrt(a[1:].size) for a, b in itertools.permutations(x[:12], 2)]
    assert within(np.array(shifted))


def test_each_bit_of_a_counter_turns_half_of_the_bits():
    """Avalanche: of 64 x 64 pairs of an input bit and an output bit."""
    n, samples = np.arange(1 << 12, dtype=np.uint64), 1 << 12
    state = absorb(np.zeros(1, np.uint64), 1)
    plain = absorb(state, n)
    turned = np.array([absorb(state, n ^ np.uint64(1 << bit)) ^ plain for bit in range(63)])
    ones = np.array([((turned >> np.uint64(bit)) & np.uint64(1)).sum(1, dtype=np.int64) for bit in range(64)])
    assert within((ones - samples / 2) / math.sqrt(samples / 4))


# --- in attention ----------------------------------------------------------------------------------------------------------

DROP = Dropout(0.4, seed=7, step=3, layer=1)
PAIRS = {"attention": (attention_forward, attention_backward), "blockwise": (blockwise_forward, blockwise_backward)}


def inputs(dtype=np.float64, **sizes):
    return {name: x for name, x in qkv(dtype=dtype, **sizes).items() if name in "qkv"}


@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("implementation", PAIRS)
@pytest.mark.parametrize("options", [{}, {"mask": causal(align="bottom_right")}, {"softcap": 2.0, "scale": 0.7}], ids=str)
def test_gradcheck_of_attention(implementation, method, options):
    forward, backward = PAIRS[implementation]
    x = inputs(H=2, G=1, L=3, D=2, E=3)
    gradcheck(lambda q, k, v: forward(q, k, v, dropout_mask=DROP, **options), backward, x, method=method)


def results(implementation, x, dout, **options):
    out, cache = implementation[0](*x.values(), **options)
    grads = implementation[1](dout, cache)
    return [out, *grads[:3]]


@pytest.mark.parametrize("implementation", PAIRS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_it_is_its_array(implementation, dtype):
    """The same bits as with the array in its place, which other implementations may be given."""
    x = inputs(dtype, L=40, S=37)
    dout = random((*x["q"].shape[:-1], x["v"].shape[-1]), 5, dtype)
    wide = np.float32 if dtype == np.float16 else dtype
    array = DROP.bind((*x["q"].shape[:-1], x["k"].shape[-2]), wide).dense()
    for got, want in zip(*(results(PAIRS[implementation], x, dout, dropout_mask=d) for d in (DROP, array)), strict=True):
        assert got.dtype == dtype
        assert np.array_equal(got, want)


def test_rank_2_is_one_head():
    q, k, v = random((6, 4), 1), random((5, 4), 2), random((5, 3), 3)
    for forward, backward in PAIRS.values():
        out, cache = forward(q, k, v, dropout_mask=DROP)
        of_head, head_cache = forward(q[None], k[None], v[None], dropout_mask=DROP)
        assert np.array_equal(out, of_head[0])
        assert np.array_equal(backward(out, cache).q, backward(of_head, head_cache).q[0])


def which_pairs(forward, backward, L=50, S=40, **options):
    """Which pairs are not dropped, from out and from dv: with q = 0 all weights are alike, and v and dout are unit matrices."""
    q, k = np.zeros((2, 4, L, 3)), np.zeros((2, 2, S, 3))
    v = np.broadcast_to(np.eye(S), (2, 2, S, S))
    out, cache = forward(q, k, v, dropout_mask=DROP, **options)
    dout = np.zeros_like(out)
    dout[..., 0] = np.arange(1, L + 1)
    return out, backward(dout, cache)


@pytest.mark.parametrize("sizes", [
    SIZES, Sizes(tile=(4, 3), parts=(2, 1), long=8), Sizes(tile=(16, 7), parts=(1, 1)), Sizes(threads=1),
    Sizes(tile=(3, 5), threads=2),
], ids=lambda sizes: f"{sizes.tile} on {sizes.threads}")  # fmt: skip
def test_the_same_pairs_whatever_the_tiles_and_threads_are(sizes):
    out, grads = which_pairs(functools.partial(blockwise_of, sizes), blockwise_backward)
    dense_out, dense_grads = which_pairs(attention_forward, attention_backward)
    kept = DROP.bind((2, 4, 50, 40)).dense() != 0
    assert np.array_equal(out != 0, kept)
    assert np.array_equal(dense_out != 0, kept)
    terms = np.abs(dense_grads.v).max()
    assert_close(grads.v, dense_grads.v, terms)
    assert np.array_equal(grads.v != 0, dense_grads.v != 0)


def test_the_same_bits_twice_and_with_other_threads():
    x = inputs(np.float32, L=300, S=290)
    dout = random((*x["q"].shape[:-1], x["v"].shape[-1]), 5, np.float32)
    first, *others = (results(PAIRS["blockwise"], x, dout, dropout_mask=DROP) for _ in range(2))
    _, cache = blockwise_forward(*x.values(), dropout_mask=DROP)
    others += [[first[0], *blockwise_backward(dout, cache)[:3]] for _ in range(2)]
    one, two = (blockwise_of(dataclasses.replace(SIZES, threads=n), *x.values(), dropout_mask=DROP) for n in (1, 2))
    assert np.array_equal(one[0], two[0])
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_multi_head(implementation):
    rng, (M, H) = np.random.default_rng(0), (12, 3)
    params = MultiHeadParams(*(rng.standard_normal((M, M)) for _ in range(4)))
    x = rng.standard_normal((2, 5, M))
    array = DROP.bind((2, H, 5, 5)).dense()
    outs = []
    for drop in (DROP, array):
        out, cache = multi_head_forward(x, x, x, params, H, dropout_mask=drop, implementation=implementation)
        outs.append([out, *multi_head_backward(out, cache)[:3]])
    assert all(np.array_equal(a, b) for a, b in zip(*outs, strict=True))
    low = x.astype(np.float16)
    p16 = MultiHeadParams(*(w.astype(np.float16) for w in params[:4]))
    assert multi_head_forward(low, low, low, p16, H, dropout_mask=DROP, implementation=implementation)[0].dtype == np.float16


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_does_not_grow_with_the_number_of_pairs(direction):
    """As in test_blockwise.py: beyond a few tiles and their words, a few numbers for each query and key."""
    peaks = []
    for n in (2048, 4096):
        rng = np.random.default_rng(0)
        q, k, v, dout = (rng.standard_normal((n, 16), np.float32) for _ in range(4))
        _, cache = blockwise_forward(q, k, v, dropout_mask=DROP)
        if direction == "forward":
            peaks.append(peak_beyond_outputs(lambda q=q, k=k, v=v: forward_arrays(q, k, v, {"dropout_mask": DROP})))
        else:
            peaks.append(peak_beyond_outputs(lambda dout=dout, cache=cache: blockwise_backward(dout, cache)[:3]))
    assert max(peaks) <= 24 * 4 * math.prod(SIZES.tile)
    tiles = (4096**2 - 2048**2) // math.prod(SIZES.tile)
    assert peaks[1] - peaks[0] <= (4096 - 2048) * 4 * (16 + 24) + 250 * tiles
