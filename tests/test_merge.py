"""merge: attention over two disjoint sets of keys, from that over each."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from npattn import attention_forward, gradcheck, merge, merge_backward, merge_forward
from npattn.tolerances import TERMS_EPS


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
    assert np.abs(x[finite] - y[finite]).max(initial=0) <= TERMS_EPS * np.finfo(float).eps * size


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

    def only_out(**parts):  # one output of two
        (out, _), cache = merge_forward(**parts)
        return out, cache

    gradcheck(only_out, merge_backward, inputs, method=method)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
def test_merge_dtypes(dtype):
    computing = np.float32 if dtype is np.float16 else dtype
    rng = np.random.default_rng(0)
    outs, lses = ([rng.standard_normal(s).astype(t) for _ in "ab"] for s, t in (((3, 4), dtype), ((3,), computing)))
    (out, lse), cache = merge_forward(outs[0], lses[0], outs[1], lses[1])
    grads = merge_backward(out, cache, lse)
    assert [x.dtype for x in (out, lse, *grads)] == [dtype, computing, dtype, computing, dtype, computing]
