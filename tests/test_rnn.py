"""The recurrent baseline against explicit loops, its gradients, and what lies after a sequence's length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import assert_close, leaves
from oracles import rnn_loops
from test_recurrent import small_pieces

from npattn import RNNParams, gradcheck, rnn, rnn_backward, rnn_forward
from npattn.tolerances import TERMS_EPS

B, T, M, N = 3, 6, 4, 5
LENGTHS = {"full": None, "ragged": np.array([4, 0, 6]), "one": np.array([1, 6, 2])}


def problem(seed=0, *, bias=True, state=True, dtype=np.float64):
    rng = np.random.default_rng(seed)
    w = RNNParams(*(0.6 * rng.standard_normal(s) for s in ((M, N), (N, N), (N,))))
    w = RNNParams(*(None if a is None else a.astype(dtype) for a in (w.w_x, w.w_h, w.b if bias else None)))
    x, h0 = rng.standard_normal((B, T, M)).astype(dtype), rng.standard_normal((B, N)).astype(dtype)
    return {"x": x, "h0": h0 if state else None, "params": w}


def both_outputs(lengths, nonlinearity):
    def forward(x, params, h0=None):
        h, cache = rnn_forward(x, h0, params, lengths=lengths, nonlinearity=nonlinearity)
        return (h, cache.h_last), cache

    return forward, lambda d, cache: rnn_backward(d[0], cache, d[1])


@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize(("lengths", "bias", "state"), list(itertools.product(LENGTHS, [True, False], [True, False])))
def test_gradients(lengths, bias, state, nonlinearity, method):
    forward, backward = both_outputs(LENGTHS[lengths], nonlinearity)
    given = problem(3, bias=bias, state=state)
    gradcheck(forward, backward, given, method=method, elements=20 if method == "complex" else 1)


def test_gradients_of_h_alone_and_of_h_last_alone():
    given = problem(1)
    forward, _ = both_outputs(LENGTHS["ragged"], "tanh")
    gradcheck(lambda **x: (lambda o, c: (o[0], c))(*forward(**x)), rnn_backward, given, elements=20)
    gradcheck(
        lambda **x: (lambda o, c: (o[1], c))(*forward(**x)),
        lambda d, c: rnn_backward(np.zeros_like(c.x @ c.params.w_x), c, d),
        given,
        elements=20,
    )


@pytest.mark.parametrize("steps", ["whole", "pieces"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_against_loops(lengths, nonlinearity, steps, monkeypatch):
    if steps == "pieces":
        small_pieces(monkeypatch)
    given, rng = problem(5), np.random.default_rng(6)
    n = LENGTHS[lengths]
    h, cache = rnn_forward(**given, lengths=n, nonlinearity=nonlinearity)
    dh, dh_last = rng.standard_normal(h.shape), rng.standard_normal((B, N))
    g = rnn_backward(dh, cache, dh_last)
    e = rnn_loops(given["x"], given["h0"], *given["params"], n, nonlinearity, dh, dh_last)
    got = {"h": h, "h_last": cache.h_last, "x": g.x, "h0": g.h0, "w_x": g.params.w_x, "w_h": g.params.w_h, "b": g.params.b}
    for name, value in got.items():
        expected = np.asarray(e[name])
        # 6 steps of sums of 9 terms below 4 in size, through weights of spectral norm below 3
        size = 1e3 * (1 + np.abs(expected).max())
        assert np.abs(value - expected).max() <= TERMS_EPS * np.finfo(float).eps * size, name
    assert np.array_equal(rnn(**given, lengths=n, nonlinearity=nonlinearity), h)


def test_what_lies_after_the_length_reaches_nothing():
    n, rng = LENGTHS["ragged"], np.random.default_rng(0)
    after = np.arange(T) >= n[:, None]
    clean, spoilt = problem(2), problem(2)
    spoilt["x"][after] = np.nan
    dh = rng.standard_normal((B, T, N))
    bad = np.where(after[..., None], np.inf, dh)
    (h, cache), (h2, cache2) = (rnn_forward(**p, lengths=n) for p in (clean, spoilt))
    assert np.array_equal(h, h2)
    assert not h[after].any()
    assert np.array_equal(cache.h_last, cache2.h_last)
    assert np.array_equal(cache.h_last[1], clean["h0"][1])
    for b in (0, 2):
        assert np.array_equal(cache.h_last[b], h[b, n[b] - 1])
    g, g2 = rnn_backward(dh, cache), rnn_backward(bad, cache2)
    for a, b in zip((g.x, g.h0, *g.params), (g2.x, g2.h0, *g2.params), strict=True):
        assert np.isfinite(b).all()
        assert np.abs(a - b).max() <= TERMS_EPS * np.finfo(float).eps * 100
    assert not g2.x[after].any()


def test_nan_at_one_step_reaches_that_step_and_later_ones_of_its_sequence():
    p = problem(2)
    p["x"][1, 3] = np.nan
    for nonlinearity in ("tanh", "relu"):
        h, _cache = rnn_forward(**p, nonlinearity=nonlinearity)
        wrong = np.isnan(h).any(-1)
        assert wrong[1, 3:].all()
        assert wrong.sum() == T - 3


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nan_reaches_only_gradients_that_come_from_there(nonlinearity):
    p, shorter, dh = problem(2), problem(2), np.ones((B, T, N))
    p["x"][1, 3], dh[1, 3:] = np.nan, 0
    _, cache = rnn_forward(**p, nonlinearity=nonlinearity)
    got = rnn_backward(dh, cache)
    want = rnn_backward(dh, rnn_forward(**shorter, lengths=np.array([T, 3, T]), nonlinearity=nonlinearity)[1])
    assert not got.x[1, 3:].any()
    for a, b in zip(leaves(got), leaves(want), strict=True):
        assert_close(a, b, 100)
    dh[1, 4] = 1
    assert np.isnan(rnn_backward(dh, cache).x[1, 3]).all()


def test_no_initial_state_is_zeros():
    p = problem(4)
    zeros = {**p, "h0": np.zeros((B, N))}
    none = {**p, "h0": None}
    for given in (zeros, none):
        h, cache = rnn_forward(**given)
        g = rnn_backward(np.ones_like(h), cache)
        if given is zeros:
            expected, grads = h, g
    assert np.array_equal(h, expected)
    assert np.array_equal(g.h0, grads.h0)
    assert g.h0.any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
def test_dtypes(dtype):
    p = problem(0, dtype=dtype)
    h, cache = rnn_forward(**p, lengths=LENGTHS["ragged"])
    g = rnn_backward(h, cache, cache.h_last)
    assert {a.dtype for a in (h, cache.h_last, g.x, g.h0, *g.params)} == {np.dtype(dtype)}
    assert cache.states.dtype == (np.float32 if dtype is np.float16 else dtype)
    exact = rnn(**problem(0), lengths=LENGTHS["ragged"])
    if dtype is np.float16:  # the weights and inputs were rounded, so compare with the same ones in float64
        wide = {n: (RNNParams(*(w.astype(float) for w in a)) if n == "params" else a.astype(float)) for n, a in p.items()}
        exact = rnn(**wide, lengths=LENGTHS["ragged"])
    assert (
        np.abs(h.astype(float) - exact).max()
        <= float(np.finfo(dtype).eps if dtype is not np.longdouble else np.finfo(float).eps) * 8
    )


@pytest.mark.parametrize("shape", [(0, T, M), (B, 0, M), (0, 0, M), (B, T, 0)], ids=str)
def test_empty(shape):
    rng = np.random.default_rng(0)
    w = RNNParams(rng.standard_normal((shape[2], N)), rng.standard_normal((N, N)), rng.standard_normal(N))
    h0 = rng.standard_normal((shape[0], N))
    h, cache = rnn_forward(np.zeros(shape), h0, w)
    assert h.shape == (*shape[:2], N)
    if shape[1] == 0:
        assert np.array_equal(cache.h_last, h0)
    g = rnn_backward(np.ones_like(h), cache, np.ones_like(h0))
    assert g.x.shape == shape
    assert [a.shape for a in g.params] == [a.shape for a in w]
    if shape[1] == 0:
        assert np.array_equal(g.h0, np.ones_like(h0))


def test_inputs_stay_and_a_second_backward_gives_the_same_bits():
    p = problem(0)
    arrays = [p["x"], p["h0"], *p["params"]]
    for a in arrays:
        a.flags.writeable = False
    before = [a.tobytes() for a in arrays]
    dh = np.broadcast_to(np.float64(0.5), (B, T, N))
    _, cache = rnn_forward(**p)
    first, second = rnn_backward(dh, cache), rnn_backward(dh, cache)
    assert [a.tobytes() for a in (first.x, first.h0, *first.params)] == [
        a.tobytes() for a in (second.x, second.h0, *second.params)
    ]
    assert [a.tobytes() for a in arrays] == before
