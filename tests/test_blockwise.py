"""What is blockwise's own: its memory, and merging two sets of keys. Its values are tested beside those of dense attention."""

from __future__ import annotations

import itertools
import sys
import tracemalloc

import numpy as np
import pytest
from helpers import TEST_EPS

from npattn import (
    attention_forward,
    blockwise_backward,
    blockwise_forward,
    causal,
    gradcheck,
    merge,
    merge_backward,
    merge_forward,
    window,
)

tiled = sys.modules["npattn.blockwise"]
TILE_BYTES = tiled.TILE[0] * tiled.TILE[1] * np.dtype(np.float32).itemsize


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
                assert rows.stop - rows.start <= tiled.TILE[0]
                assert cols.stop - cols.start <= tiled.TILE[1]
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
    for n in (2048, 8192):
        rng = np.random.default_rng(0)
        q, k, v, dout = (rng.standard_normal((n, 16), np.float32) for _ in range(4))
        options = {} if mask is None else {"mask": NeverWhole(mask)}
        _out, cache = blockwise_forward(q, k, v, **options)
        assert cache.weights is None
        if direction == "forward":
            peaks.append(peak_beyond_outputs(lambda q=q, k=k, v=v, o=options: forward_arrays(q, k, v, o)))
        else:
            peaks.append(peak_beyond_outputs(lambda dout=dout, cache=cache: blockwise_backward(dout, cache)[:3]))
    assert max(peaks) <= 64 * TILE_BYTES
    assert abs(peaks[1] - peaks[0]) <= 0.05 * peaks[0], f"{peaks[0]} bytes at 2048, {peaks[1]} at 8192"


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

    x = np.random.default_rng(0).standard_normal((3 * tiled.TILE[1], 4))
    blockwise_forward(x, x, x, mask=Counted(causal()))
    rows, cols = len(x) // tiled.TILE[0], len(x) // tiled.TILE[1]
    assert len(asked) < rows * cols
    assert all(c.start <= r.stop - 1 for r, c in asked)


# --- merge ----------------------------------------------------------------------------------------------------------------


def parts(rng, *cuts, lead=(2, 3), L=4, S=7, D=5, E=6, **options):
    """q, and (out, lse) of attention over each stretch of the keys and over all."""
    q, k, v = (rng.standard_normal((*lead, n, width)) for n, width in ((L, D), (S, D), (S, E)))
    ends = [0, *cuts, S]
    some = [
        attention_forward(q, k[..., a:b, :], v[..., a:b, :], return_lse=True)[0] for a, b in itertools.pairwise(ends)
    ]
    return some, attention_forward(q, k, v, return_lse=True)[0]


def loops(out_a, lse_a, out_b, lse_b):
    """Merging by explicit sums, one number after the other."""
    out, lse = np.zeros_like(out_a), np.full_like(lse_a, -np.inf)
    for i in np.ndindex(lse_a.shape):
        weights = [np.exp(x - max(lse_a[i], lse_b[i])) if x > -np.inf else 0.0 for x in (lse_a[i], lse_b[i])]
        if sum(weights) > 0:
            lse[i] = max(lse_a[i], lse_b[i]) + np.log(sum(weights))
            for w, o in zip(weights, (out_a, out_b), strict=True):
                if w > 0:
                    out[i] += w / sum(weights) * o[i]
    return out, lse


def near(x, y, size):
    assert np.array_equal(np.isinf(x), np.isinf(y))
    finite = np.isfinite(y)
    assert np.abs(x[finite] - y[finite]).max(initial=0) <= TEST_EPS * np.finfo(float).eps * size


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_merge_of_two_parts_is_the_whole(cut):
    (a, b), (out, lse) = parts(np.random.default_rng(cut), cut)
    merged = merge(*a, *b)
    near(merged[0], out, 20)
    near(merged[1], lse, 20)
    near(merge(*b, *a)[0], out, 20)


def test_merge_is_associative():
    (a, b, c), (out, lse) = parts(np.random.default_rng(0), 2, 5)
    for merged in (merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))):
        near(merged[0], out, 20)
        near(merged[1], lse, 20)


def test_merge_against_loops_with_parts_without_keys():
    rng = np.random.default_rng(0)
    out_a, out_b, lse_a, lse_b = (rng.standard_normal(s) for s in ((3, 5, 4), (3, 5, 4), (3, 5), (3, 5)))
    lse_a[0, 1] = lse_b[1, 2] = lse_a[2, 3] = lse_b[2, 3] = -np.inf
    lse_a[1, 0], lse_b[1, 1] = 1e4, -1e4
    out_a[0, 1] = out_b[1, 2] = np.nan  # a part without keys is ignored, whatever it holds
    out_a[2, 3] = out_b[2, 3] = np.nan
    (out, lse), cache = merge_forward(out_a, lse_a, out_b, lse_b)
    expected = loops(out_a, lse_a, out_b, lse_b)
    near(out, expected[0], 10)
    near(lse, expected[1], 1e4)
    assert (out[2, 3] == 0).all()
    assert lse[2, 3] == -np.inf
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    dout[2, 3], dlse[2, 3] = np.nan, np.inf
    grads = merge_backward(dout, cache, dlse)
    assert all(np.isfinite(g).all() for g in grads)
    for g in (grads.out_a[0, 1], grads.lse_a[0, 1], grads.out_b[1, 2], grads.lse_b[1, 2], *(g[2, 3] for g in grads)):
        assert not np.any(g)
    assert grads.out_a[0, 0].any()


@pytest.mark.parametrize("method", ["complex", "central"])
def test_merge_gradients(method):
    rng = np.random.default_rng(0)
    inputs = {
        n: rng.standard_normal((2, 3, 4) if n.startswith("out") else (2, 3)) for n in ("out_a", "lse_a", "out_b", "lse_b")
    }
    gradcheck(merge_forward, lambda d, c: merge_backward(d[0], c, d[1]), inputs, method=method)
    only_out = lambda **x: (lambda o, c: (o[0], c))(*merge_forward(**x))  # noqa: E731  # one output of two
    gradcheck(only_out, merge_backward, inputs, method=method)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
def test_merge_dtypes(dtype):
    computing = np.float32 if dtype is np.float16 else dtype
    rng = np.random.default_rng(0)
    outs, lses = ([rng.standard_normal(s).astype(t) for _ in "ab"] for s, t in (((3, 4), dtype), ((3,), computing)))
    (out, lse), cache = merge_forward(outs[0], lses[0], outs[1], lses[1])
    grads = merge_backward(out, cache, lse)
    assert [x.dtype for x in (out, lse, *grads)] == [dtype, computing, dtype, computing, dtype, computing]
