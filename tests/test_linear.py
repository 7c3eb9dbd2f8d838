"""The linear layer, forwards and backwards, against explicit loops."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close, random
from oracles import linear_layer_loops

import npattn
from npattn import LinearParams, gradcheck, linear, linear_backward, linear_forward

M, N = 4, 3
LEADS = [(), (5,), (2, 5), (2, 1, 5), (0,), (2, 0)]
BIAS = pytest.mark.parametrize("bias", [True, False])
HALVES = [np.float16, ml_dtypes.bfloat16]


def problem(lead=(2, 5), bias=True, dtype=np.float64, M=M, N=N):
    shapes = [(*lead, M), (M, N), (N,), (*lead, N)]
    x, w, b, dy = (random(n, (0, i)).astype(dtype) for i, n in enumerate(shapes))
    return x, LinearParams(w, b if bias else None), dy


def check(x, params, dy, got, computing=None):
    """y and the gradients against the loops; the sums of |terms| are those of the same loops on |numbers|."""
    wide = [None if a is None else a.astype(float) for a in (x, *params, dy)]
    sizes = [None if a is None else np.abs(a) for a in wide]
    want, terms = linear_layer_loops(*wide), linear_layer_loops(*sizes)
    assert (got["b"] is None) == (params.b is None)
    for name, value in got.items():
        if value is not None:
            assert value.dtype == x.dtype
            assert_close(value, want[name], terms[name], name=name, computing=computing)


def results(x, params, dy):
    y, cache = linear_forward(x, params)
    grads = linear_backward(dy, cache)
    return {"y": y, "x": grads.x, "w": grads.params.w, "b": grads.params.b}


@BIAS
@pytest.mark.parametrize("lead", LEADS)
def test_it_is_that_of_loops(lead, bias):
    given = problem(lead, bias)
    check(*given, results(*given))
    assert np.array_equal(linear(*given[:2]), results(*given)["y"])


@BIAS
@pytest.mark.parametrize("method", ["complex", "central"])
def test_its_gradient_is_the_derivative(method, bias):
    x, params, _ = problem(bias=bias)
    gradcheck(linear_forward, linear_backward, {"x": x, "params": params}, method=method)


@BIAS
@pytest.mark.parametrize("dtype", [*HALVES, np.float32, np.longdouble])
def test_dtypes_come_out_as_they_go_in(dtype, bias):
    given = problem(bias=bias, dtype=dtype)
    computing = {np.float32: None, np.longdouble: np.float64}.get(dtype, np.float32)  # the loops are in float64
    check(*given, results(*given), computing=computing)


@pytest.mark.parametrize("dtype", HALVES)
def test_parameters_may_have_the_computing_dtype_and_so_have_their_gradients(dtype):
    x, params, dy = problem(dtype=dtype)
    wide = LinearParams(*(p.astype(np.float32) for p in params))
    got, same = results(x, wide, dy), results(x, params, dy)
    assert np.array_equal(got["y"], same["y"])
    assert got["x"].dtype == got["y"].dtype == dtype
    assert got["w"].dtype == got["b"].dtype == np.float32
    assert np.array_equal(got["w"].astype(dtype), same["w"])


def test_complex_numbers_are_continued_without_conjugation():
    x, params, dy = (problem(dtype=np.complex128)[i] for i in range(3))
    x, w = x + 0.5j * x[::-1], params.w * (1 - 2j)
    y, cache = linear_forward(x, LinearParams(w, params.b))
    re, im = (linear(a, LinearParams(b)) for a, b in ((x.real, w.real), (x.imag, w.imag)))
    assert_close(y.real, re - im + params.b.real, np.abs(x) @ np.abs(w) + np.abs(params.b))
    grads = linear_backward(dy * 1j, cache)
    assert_close(grads.x.imag, dy.real @ w.real.T, np.abs(dy) @ np.abs(w).T)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_dead_token_has_no_gradient_and_adds_none(bad):
    x, params, dy = problem()
    x[0, 1], dy[0, 1] = bad, 0
    without = np.delete(x.reshape(-1, M), 1, 0), params, np.delete(dy.reshape(-1, N), 1, 0)
    got = results(x, params, dy)
    assert not got["x"][0, 1].any()
    check(*without, {name: a if name in "wb" else np.delete(a.reshape(-1, a.shape[-1]), 1, 0) for name, a in got.items()})


def test_nan_of_one_token_reaches_no_other():
    x, params, dy = problem()
    clean, bad = results(x, params, dy), np.zeros(x.shape[:-1], bool)
    bad[1, 2] = True
    x[bad], dy[bad] = np.nan, np.nan
    got = results(x, params, dy)
    for name in ("y", "x"):
        assert np.isnan(got[name][bad]).all()
        assert np.array_equal(got[name][~bad], clean[name][~bad])


@pytest.mark.parametrize(("M", "N"), [(0, 3), (4, 0), (1, 1)])
def test_empty_and_small_widths(M, N):
    given = problem(M=M, N=N)
    check(*given, results(*given))


def test_inputs_may_be_views_and_nothing_is_modified():
    x, params, dy = problem()
    views = np.broadcast_to(x[:1], x.shape), LinearParams(params.w[::-1, ::-1], np.broadcast_to(params.b[:1], N)), dy[:, ::-1]
    copies = views[0].copy(), LinearParams(*(p.copy() for p in views[1])), views[2].copy()
    for a in (*views[1], x, dy):
        a.flags.writeable = False
    check(*copies, results(*views))
    _, cache = linear_forward(x, params)
    first, second = linear_backward(dy, cache), linear_backward(dy, cache)
    assert np.array_equal(first.x, second.x)
    assert np.array_equal(first.params.w, second.params.w)


def test_large_and_tiny_numbers():
    w = LinearParams(np.full((1, 1), 1e-30, np.float32))
    x = np.array([1e38, -1e20, np.inf, -np.inf], np.float32)[:, None]
    assert_close(linear(x, w), (x.astype(float) * float(w.w[0, 0])), np.abs(x[:, 0])[:, None] * 1e-30)
    grads = linear_backward(np.full((2, 1), 1e38, np.float32), linear_forward(x[:2] * 0 + np.float32(1e-30), w)[1])
    assert np.isfinite(grads.x).all()
    assert np.isfinite(grads.params.w).all()


X, W = np.ones((2, 4)), LinearParams(np.ones((4, 3)), np.ones(3))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: linear([1.0], W), TypeError, r"linear: x is a list, expected a numpy.ndarray: np.array\(x, np.float32\)"),
    (lambda: linear(np.ones((2, 4), int), W), TypeError, "linear: x has dtype int64, expected float16"),
    (lambda: linear(X, W.w), TypeError, "linear: params is an array of dtype float64, expected npattn.LinearParams"),
    (lambda: linear(X, LinearParams(None)), TypeError, "linear: w is a NoneType, expected a numpy.ndarray"),
    (lambda: linear(X, LinearParams(W.w.astype(np.float32))), TypeError, "linear: w has dtype float32, expected float64"),
    (lambda: linear(X, LinearParams(W.w.T)), ValueError, r"linear: w has shape \(3, 4\), expected \(M=4, M_out\): M is fixed"),
    (lambda: linear(X, LinearParams(W.w, np.ones(4))), ValueError, r"linear: b has shape \(4,\), expected \(M_out=3,\)"),
    (lambda: linear(np.ones(()), W), ValueError, r"linear: x has shape \(\), expected \(..., M\)"),
    (lambda: linear(X, W, bias=None), TypeError, r"keyword bias, expected params=LinearParams\(weight.T, bias\); needed are"),
    (lambda: linear(X), TypeError, "linear: got no params, expected x, params"),
    (lambda: linear_backward(X, linear_forward(X, W)[1]), ValueError, r"linear: dy has shape \(2, 4\), expected \(2, 3\)"),
    (lambda: linear_backward(X, None), TypeError, "linear: cache is a NoneType, expected npattn.LinearCache"),
])  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_verify_knows_it():
    report = npattn.verify.verify("linear")
    assert report.passed, report.lines()
    for function in (lambda x, w, b: x @ w, lambda x, weight, bias=None: x @ weight.T, lambda x, params: x @ params.w):
        wrong = npattn.verify.verify(function, op="linear", cases=npattn.verify.CASES_OF["linear"][:1])
        assert list(wrong.diagnosis) == ["b forgotten"]
