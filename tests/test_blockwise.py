"""What is blockwise's own: memory, its three ways through exp, and what it leaves to dense attention.

Its values under all options are tested beside those of dense attention (test_attention, test_grid, test_error_model).
"""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from helpers import blockwise_of, bound, first

from npattn import (
    attention_backward,
    attention_forward,
    blockwise,
    blockwise_backward,
    blockwise_forward,
    causal,
    key_lengths,
    query_lengths,
    where,
    window,
)
from npattn.ops import blockwise as tiled
from npattn.ops.pairs import Bound
from npattn.ops.products import Buffers
from npattn.ops.tiles import SIZES, Plan, Sizes
from npattn.tolerances import EXP_ULPS


class NeverWhole:
    """A mask that refuses to be asked for more than a tile."""

    def __init__(self, mask):
        self.mask = mask

    def bind(self, shape):
        bound = self.mask.bind(shape)

        class Tiles:
            state = staticmethod(bound.state)

            @staticmethod
            def tile(index, rows, cols):
                assert (rows.stop - rows.start) * (cols.stop - cols.start) <= math.prod(SIZES.tile)
                return bound.tile(index, rows, cols)

        return Tiles


def peak_beyond_outputs(function):
    """Bytes that were held at the worst moment, less what is returned."""
    tracemalloc.start()
    try:
        returned = function()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    seen, size = set(), 0
    for x in returned:
        if isinstance(x, np.ndarray) and id(x) not in seen:
            seen.add(id(x))
            size += x.nbytes
    return peak - size


@pytest.mark.parametrize(
    ("direction", "mask"),
    [("forward", None), ("forward", window(100, 0)), ("backward", causal()), ("backward", window(100, 0))],
    ids=["forward", "forward-window", "backward-causal", "backward-window"],
)
def test_memory_does_not_grow_with_the_length(direction, mask):
    peaks = []
    for n in (2048, 4096):
        rng = np.random.default_rng(0)
        q, k, v, dout = (rng.standard_normal((n, 16), np.float32) for _ in range(4))
        options = {} if mask is None else {"mask": NeverWhole(mask)}
        _out, cache = blockwise_forward(q, k, v, **options)
        assert cache.weights is None
        if direction == "forward":
            peaks.append(peak_beyond_outputs(lambda q=q, k=k, v=v, o=options: forward_arrays(q, k, v, o)))
        else:
            peaks.append(peak_beyond_outputs(lambda dout=dout, cache=cache: blockwise_backward(dout, cache)[:3]))
    assert max(peaks) <= 16 * 4 * math.prod(SIZES.tile)
    # A copy of out or of dout / total, a few numbers a query and a key, and the plan of the tiles: no more than that grows.
    tiles = (4096**2 - 2048**2) // math.prod(SIZES.tile)
    allowed = (4096 - 2048) * 4 * (16 + 24) + 250 * tiles
    assert peaks[1] - peaks[0] <= allowed, f"{peaks[0]} bytes at 2048, {peaks[1]} at 4096"


@pytest.mark.slow
def test_the_memory_of_a_long_sequence():
    """One head of 65536 tokens, causal, forwards and backwards, in less than 64 MiB beyond inputs and outputs."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 1, 65536, 64), np.float32) for _ in range(4))

    def run():
        out, cache = blockwise_forward(q, k, v, mask=causal())
        return out, cache.lse, *blockwise_backward(dout, cache)[:3]

    assert peak_beyond_outputs(run) < 64 * 2**20


def forward_arrays(q, k, v, options):
    out, cache = blockwise_forward(q, k, v, **options)
    return out, cache.lse


def test_tiles_without_an_allowed_pair_are_not_computed():
    asked = []

    class Counted(NeverWhole):
        def bind(self, shape):
            bound = super().bind(shape)

            class Tiles(bound):
                @staticmethod
                def tile(index, rows, cols):
                    asked.append((rows, cols))
                    return bound.tile(index, rows, cols)

            return Tiles

    x = np.random.default_rng(0).standard_normal((3 * SIZES.tile[1], 4))
    blockwise_forward(x, x, x, mask=Counted(causal()))
    assert sum((r.stop - r.start) * (c.stop - c.start) for r, c in asked) < len(x) ** 2 / 2
    assert all(c.start <= r.stop - 1 for r, c in asked)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_caller_may_write_into_out_and_only_the_forward_of_a_backward_keeps_a_copy(dtype):
    q, k, v, dout = (x.astype(dtype) for x in inputs(L=40))
    out, cache = blockwise_forward(q, k, v, return_lse=False)
    want = blockwise_backward(dout, cache)
    out[...] = np.nan
    for a, b in zip(want, blockwise_backward(dout, cache), strict=True):
        assert a is b is None or np.array_equal(a, b)
    if dtype == np.float32:
        plain, kept = tiled.forward(bound(q, k, v), keep=False)
        assert kept.kept.out is plain
    plain, lse = blockwise(q, k, v, return_lse=True)
    (again, same), _ = blockwise_forward(q, k, v, return_lse=True)
    assert (plain.dtype, lse.dtype) == (again.dtype, same.dtype)
    assert plain.tobytes() == again.tobytes()
    assert lse.tobytes() == same.tobytes()


def test_what_is_the_same_for_all_heads_is_asked_for_once():
    """A mask without heads: as many tiles as for one head."""
    asked = []

    class Counted(NeverWhole):
        def bind(self, shape):
            inner = causal().bind(shape)

            class Tiles(Bound):
                states, varies = staticmethod(inner.states), staticmethod(inner.varies)

                def tile(self, index, rows, cols):
                    asked.append((rows, cols))
                    return inner.tile(index, rows, cols)

            return Tiles()

    x = np.random.default_rng(0).standard_normal((6, 1100, 4), np.float32)
    counts = []
    for heads in (1, 6):
        asked.clear()
        blockwise_forward(x[:heads], x[:heads], x[:heads], mask=Counted(causal()))
        counts.append(len(asked))
    assert 0 < counts[1] <= 2 * counts[0]  # once a thread


def near_dense(q, k, v, dout, bound=1e-4, sizes=SIZES, **options):
    """Against dense attention in float64, relative to the largest element; which ways were gone."""
    ways = []
    plain = tiled.attend

    def attend(plan, heads, i, buffers, a, steady, *base):
        found = plain(plan, heads, i, buffers, a, steady, *base)
        ways.append((steady, found is not None))
        return found

    with pytest.MonkeyPatch.context() as m:
        m.setattr(tiled, "attend", attend)
        (out, lse), cache = blockwise_of(sizes, q, k, v, return_lse=True, **options)
    grads = blockwise_backward(dout, cache)
    wide = [x.astype(np.float64) for x in (q, k, v, dout)]
    (want, want_lse), reference = attention_forward(*wide[:3], return_lse=True, **options)
    expected = attention_backward(wide[3], reference)
    for got, true in zip((out, lse, *grads[:3]), (want, want_lse, *expected[:3]), strict=True):
        assert np.isfinite(got).all()
        assert np.abs(got - true).max() <= bound * np.abs(true).max()
    return set(ways)


def inputs(seed=0, L=600, D=16, **size):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, L, D), np.float32) * np.float32(size.get(n, 1)) for n in ("q", "k", "v", "dout")]


def first_rows_see_less(L, S):
    """The first 8 queries see one key alone, the next 8 all; every third of the others sees every second key."""
    allowed = np.ones((L, S), bool)
    allowed[:8, 1:], allowed[16::3, 1::2] = False, False
    return allowed


@pytest.mark.parametrize(
    "mask",
    [np.random.default_rng(0).random((2, 40, 8)) < np.array([0.9, 0.5])[:, None, None], first_rows_see_less(40, 24),
     key_lengths(5), causal(offset=3) | key_lengths(2), window(20, 4, align="top_left")],
    ids=["each head its own", "rows that see less", "key lengths", "offset", "window"],
)  # fmt: skip
def test_what_is_kept_of_a_mask_is_used_where_it_holds(mask):
    """Tiles of 16, 16 and 8 queries of one head after the other, in one thread: what was kept of one meets the next."""
    q, _, _, dout = inputs(L=40, D=4)
    _, k, v, _ = inputs(L=mask.shape[-1] if isinstance(mask, np.ndarray) else 24, D=4)
    if isinstance(mask, np.ndarray):
        mask[..., 0] = True  # nobody is without a key
    near_dense(q, k, v, dout, mask=mask, sizes=Sizes(tile=(16, 8), parts=(2, 1), long=16, bundle=0, tasks=1, threads=1))


def test_a_query_without_a_key_is_known_as_one_beside_others_with_some():
    """total is 0, so that the backward takes it for what it is and leaves no head to attention."""
    q, k, v, _ = inputs(L=600)
    _, cache = blockwise_forward(q, k, v, mask=~key_lengths(600) | causal(offset=-3))
    assert (cache.kept.total[:, :3] == 0).all()
    # What total makes good is an error of lse: of the logarithm, by a unit in its last place. Rounding total is another eps.
    off = np.abs(cache.kept.total[:, 3:].astype(np.float64) - 1)
    assert (off <= (np.abs(cache.lse[:, 3:]) + 1) * np.finfo(np.float32).eps).all()


@pytest.mark.parametrize("hidden", ["k", "v"])
def test_a_key_that_is_seen_and_not_finite_is_found_beside_a_hidden_one(hidden):
    q, k, v, _ = inputs(L=600)
    _, cache = blockwise_forward(q, k, v, mask=key_lengths(500))
    plan, buffers = Plan(cache.call), Buffers(cache.computing)

    def found():
        return [tiled.all_seen_are_finite(plan, heads, buffers) for heads in plan.heads]

    assert all(found())
    {"k": k, "v": v}[hidden][0, 550] = np.inf  # the cache has these arrays
    assert all(found())
    {"k": v, "v": k}[hidden][0, 450] = np.inf
    assert not all(found())


def test_scores_of_ordinary_size_need_no_shift():
    assert near_dense(*inputs()) == {(True, True)}
    assert near_dense(*inputs(), mask=causal()) == {(True, True)}


@pytest.mark.parametrize("mean", [6.0, -6.0])
def test_scores_beyond_the_range_of_exp_are_shifted(mean):
    """All near 144, or near -144: exp overflows, or all of it is lost."""
    q, k, v, dout = inputs()
    q, k = np.abs(q) * np.float32(0.01) + np.float32(mean), np.abs(k) * np.float32(0.01) + np.float32(6)
    assert near_dense(q, k, v, dout, bound=1e-2) == {(True, False), (False, True)}


def test_one_row_that_needs_a_shift():
    q, k, v, dout = inputs()
    q[0, 300] *= 100
    assert (False, True) in near_dense(q, k, v, dout, bound=1e-3)


def test_large_values_overflow_without_a_shift_alone():
    q, k, v, dout = inputs(q=3, k=3)
    ways = near_dense(q, k, v * np.float32(1e15), dout * np.float32(1e-15), bound=1e-2)
    assert (False, True) in ways


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_nobody_sees_does_not_change_the_way(bad):
    q, k, v, dout = inputs()
    mask = key_lengths(300) & causal()
    clean = blockwise_forward(q, k, v, mask=mask)
    grads = blockwise_backward(dout, clean[1])
    k[:, 300:], v[:, 300:] = bad, -bad
    out, cache = blockwise_forward(q, k, v, mask=mask)
    assert out.tobytes() == clean[0].tobytes()
    assert not np.isnan(cache.kept.total).any()
    for got, want in zip(blockwise_backward(dout, cache)[:3], grads[:3], strict=True):
        assert got.tobytes() == want.tobytes()


def test_a_hidden_pair_whose_dout_v_overflows_gives_nothing():
    q, k, v, dout = inputs(L=8)
    v[:, 7], dout[:, 2] = 3e30, 1e20  # dout_2 . v_7 is inf, and query 2 does not see key 7
    grads = blockwise_backward(dout, blockwise_forward(q, k, v, mask=causal())[1])
    wide = [x.astype(np.float64) for x in (q, k, v)]
    expected = attention_backward(dout.astype(np.float64), attention_forward(*wide, mask=causal())[1])
    for got, true in zip(grads[:3], expected[:3], strict=True):
        assert np.abs(got - true).max() <= 64 * np.finfo(np.float32).eps * np.abs(true).max()


def test_a_nan_that_is_seen_is_left_to_attention():
    q, k, v, dout = inputs()
    v[0, 100] = np.nan
    out, cache = blockwise_forward(q, k, v, mask=causal())
    want, reference = attention_forward(q, k, v, mask=causal())
    assert np.array_equal(np.isnan(out), np.isnan(want))
    assert np.isnan(out[0, 100:]).all()
    assert np.isfinite(out[0, :100]).all()
    grads, expected = blockwise_backward(dout, cache), attention_backward(dout, reference)
    for got, true in zip(grads[:3], expected[:3], strict=True):
        assert np.array_equal(np.isnan(got), np.isnan(true))


@pytest.mark.parametrize(("name", "value"), [("k", -np.inf), ("k", np.inf), ("v", np.inf), ("k", np.nan), ("q", np.inf)])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0}, {"sink": np.float32([0.5, 1])}, {"mask": causal()}, {"softcap": 2.0, "mask": causal()}],
    ids=str,
)
def test_what_is_seen_and_not_finite_is_as_in_attention(name, value, options):
    """Also where nothing shows it: a score of -inf has weight 0, and a softcap makes a number of inf."""
    q, k, v, dout = (np.abs(x) for x in inputs(L=40))
    q = q[:, :, :4].copy()
    k, v, dout = k[:, :, :4].copy(), v[:, :, :4].copy(), dout[:, :, :4].copy()
    {"q": q, "k": k, "v": v}[name][0, 7, 2] = value
    (out, lse), cache = blockwise_forward(q, k, v, return_lse=True, **options)
    (want, want_lse), reference = attention_forward(q, k, v, return_lse=True, **options)
    grads, expected = blockwise_backward(dout, cache), attention_backward(dout, reference)
    for got, true in zip((out, lse, *grads[:3]), (want, want_lse, *expected[:3]), strict=True):
        assert np.array_equal(np.isfinite(got), np.isfinite(true))
        eps = np.finfo(np.float32).eps
        assert np.allclose(got, true, 64 * eps, 64 * eps, equal_nan=True)


def test_half_precision_is_summed_up_in_single_where_attention_takes_over():
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 300, 8)).astype(np.float16) for _ in range(4))
    v[0, 299, 0] = np.inf  # the last query alone sees it
    got = blockwise_backward(dout, blockwise_of(Sizes(dense=40), q, k, v, mask=causal())[1])  # a query at a time
    want = attention_backward(dout, attention_forward(q, k, v, mask=causal())[1])
    error = np.abs(got.v.astype(float) - want.v.astype(float))[0, :299]
    assert error.max() <= 2 * np.finfo(np.float16).eps * np.abs(want.v[0, :299].astype(float)).max()


LAYOUTS = {
    "C": lambda x: x,
    "F": np.asfortranarray,
    "between others": lambda x: np.concatenate([x, x], 1)[:, : x.shape[1]],
    "backwards": lambda x: x[::-1],
    "the same row": lambda x: np.broadcast_to(x[0], x.shape),
}


@pytest.mark.parametrize("L", [1, 2, 40, 1540])
@pytest.mark.parametrize("D", [3, 8, 63, 64])
@pytest.mark.parametrize("size", first(1, [1e4, 1e2, 1e6]))
@pytest.mark.parametrize(("S", "layout"), [(7, "C"), (600, "C"), *((20, layout) for layout in LAYOUTS)])
def test_weights_of_large_scores_add_up_to_1_backwards(L, D, size, S, layout):
    """sum_j dv_j = sum_i dout_i: the weights of the backward are those of the forward, whatever the rounding of a score."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((n, D), np.float32) for n in (L, S, S, L))
    q *= np.float32(size)
    k = LAYOUTS[layout](k)
    got = blockwise_backward(dout, blockwise_forward(q, k, v)[1])
    wide = dout.astype(np.float64)
    assert (np.abs(got.v.sum(0, np.float64) - wide.sum(0)) <= 3 * np.finfo(np.float32).eps * np.abs(wide).sum(0)).all()


def among_others(x):
    """x as a field of records: rows of an odd number of bytes."""
    records = np.zeros(x.shape[:-1], np.dtype([("x", x.dtype, x.shape[-1:]), ("tag", np.int8)]))
    records["x"] = x
    return records["x"]


@pytest.mark.parametrize("D", first(3, [1, 3, 16, 2, 5, 8]))
@pytest.mark.parametrize("L", [1, 2, 513])
@pytest.mark.parametrize("S", [20, 300])
@pytest.mark.parametrize("layout", [
    lambda x: x, lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1), among_others, lambda x: x[:, ::-1],
    lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
], ids=["by heads", "heads in a row", "among others", "backwards", "columns"])  # fmt: skip
def test_the_weights_backwards_are_those_of_the_forward(layout, S, L, D):
    """To the last bits, though scores of 1e6 are rounded by 0.1: BLAS has to get the same arrays, or copies, both times."""
    rng, heads = np.random.default_rng(0), 60 if L < 3 else 3
    q, k = (1e3 * rng.standard_normal((heads, n, D), np.float32) for n in (L, S))
    k = layout(k)
    weights = blockwise(q, k, np.broadcast_to(np.eye(S, dtype=np.float32), (heads, S, S)))
    _, cache = blockwise_forward(q, k, np.zeros((heads, S, L), np.float32))
    dv = blockwise_backward(np.broadcast_to(np.eye(L, dtype=np.float32), (heads, L, L)), cache).v
    # exp on each side; the difference that it is of, the total and the quotient, by half an eps each, of a weight of at most 1.
    assert np.abs(weights - dv.swapaxes(1, 2)).max() <= (2 * EXP_ULPS + 2) * np.finfo(np.float32).eps
    assert cache.k is k


@pytest.mark.parametrize("options", [{}, {"softcap": 1000.0}, {"sink": np.float32([-1e9])}])
@pytest.mark.parametrize(
    ("q", "k", "scale"), [(1e30, [-1e-30, -3e-30], 1e10), (1e20, [2e-38, 9e-38], 1e20), (3e38, [-1, 2], 2.0)]
)
def test_scale_q_may_overflow_where_the_scores_do_not(q, k, scale, options):
    q, k, v, dout = (np.asarray(x, np.float32).reshape(-1, 1) for x in (q, k, [1, 3], 1))
    (out, lse), cache = blockwise_forward(q, k, v, scale=scale, return_lse=True, **options)
    (want, want_lse), reference = attention_forward(q, k, v, scale=scale, return_lse=True, **options)
    grads, expected = blockwise_backward(dout, cache), attention_backward(dout, reference)
    for got, true in zip((out, lse, *grads[:3]), (want, want_lse, *expected[:3]), strict=True):
        assert np.array_equal(got, true, equal_nan=True), "it is left to attention"


def test_scale_q_may_overflow_where_nobody_sees_it():
    q, k, v, _ = inputs(L=40)
    q[:, 30:] = 3e38
    (out, lse), cache = blockwise_forward(q, k, v, mask=query_lengths(30), scale=4.0, return_lse=True)
    assert np.isfinite(out).all()
    assert np.isfinite(cache.kept.total).all(), "nothing is left to attention, which is slow"
    assert (lse[:, 30:] == -np.inf).all()


def test_a_bias_and_a_dropout_mask_are_not_copied():
    L, D = 2048, 8
    x, pairs = np.ones((1, L, D), np.float16), L * L
    bias, drop = np.zeros((L, L), np.float16), np.broadcast_to(np.float32(1), (4, L, L))
    assert peak_beyond_outputs(lambda: (blockwise(x, x, x, bias=bias),)) < pairs
    y = np.ones((4, L, D), np.float32)
    assert peak_beyond_outputs(lambda: (blockwise(y, y, y, dropout_mask=drop),)) < 2 * pairs


def test_a_mask_without_states_is_asked_for_some_pairs_at_a_time():
    most = []
    mask = where(lambda i, j: (most.append(i.size * j.size), j % 3 != i % 2)[1])
    x = np.zeros((2, 6000, 4), np.float32)
    blockwise_forward(x[:, :300], x, x, mask=mask)
    assert max(most) <= 2 * math.prod(SIZES.tile)


def test_the_cache_of_attention_is_refused():
    x = np.ones((3, 2))
    out, cache = attention_forward(x, x, x)
    with pytest.raises(ValueError, match="blockwise: cache is that of the other forward, expected that of blockwise_forward"):
        blockwise_backward(out, cache)


def test_what_is_returned_may_be_written_on():
    q, k, v, dout = inputs()
    out, cache = blockwise_forward(q, k, v)
    before = blockwise_backward(dout, cache)
    out[:] = 7
    assert all(np.array_equal(a, b) for a, b in zip(before[:3], blockwise_backward(dout, cache)[:3], strict=True))
