"""Activations, forwards and backwards, against explicit loops."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracles import silu_loops

import npattn
from npattn import gradcheck, silu, silu_backward, silu_forward
from npattn.tolerances import EXP_ULPS

SHAPES = [(7,), (5, 7), (2, 3, 7), (0, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_silu_is_that_of_loops(shape):
    rng = np.random.default_rng(0)
    x, dy = 3 * rng.standard_normal(shape), rng.standard_normal(shape)
    want, (y, cache) = silu_loops(x, dy), silu_forward(x)
    # Of s: an exp, a sum and a division. Of dx: 1 + x (1 - s) has the sum of |terms| 1 + |x|.
    eps = np.finfo(float).eps
    assert (np.abs(y - want["y"]) <= (EXP_ULPS + 4) * eps * np.abs(want["y"])).all()
    assert (np.abs(silu_backward(dy, cache).x - want["x"]) <= (2 * EXP_ULPS + 8) * eps * np.abs(dy) * (1 + np.abs(x))).all()
    assert np.array_equal(silu(x), y)


@pytest.mark.parametrize("method", ["complex", "central"])
def test_its_gradient_is_the_derivative(method):
    gradcheck(silu_forward, silu_backward, {"x": 3 * np.random.default_rng(1).standard_normal((3, 4, 5))}, method=method)


def test_limits_and_nan():
    x = np.array([np.inf, -np.inf, np.nan, -1e4, 1e4, 0.0])
    y, cache = silu_forward(x)
    assert np.array_equal(y, [np.inf, 0, np.nan, 0, 1e4, 0], equal_nan=True)
    assert np.array_equal(silu_backward(np.ones(6), cache).x, [1, 0, np.nan, 0, 1, 0.5], equal_nan=True)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.longdouble])
def test_dtypes_come_out_as_they_go_in(dtype):
    x = np.random.default_rng(2).standard_normal((4, 5)).astype(dtype)
    y, cache = silu_forward(x)
    wide, wide_cache = silu_forward(x.astype(np.float32 if np.dtype(dtype).itemsize == 2 else dtype))
    assert y.dtype == silu_backward(x, cache).x.dtype == x.dtype
    assert np.array_equal(y, wide.astype(dtype))
    assert np.array_equal(silu_backward(x, cache).x, silu_backward(x.astype(wide.dtype), wide_cache).x.astype(dtype))


def test_complex_numbers_are_continued_where_exp_would_overflow():
    x = np.array([-800 + 1e-3j, 800 + 1e-3j])
    y, _ = silu_forward(x)
    assert np.isfinite(y).all()
    assert y[1] == x[1]


def test_inputs_may_be_views_and_are_not_modified():
    x = np.broadcast_to(np.arange(5.0), (4, 5))
    assert np.array_equal(silu(x), silu(x.copy()))
    assert np.array_equal(silu(np.arange(10.0)[::-2]), silu(np.arange(10.0)[::-2].copy()))
    assert not x.flags.writeable


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: silu([1.0]), TypeError, r"silu: x is a list, expected a numpy.ndarray: np.array\(x, np.float32\)"),
    (lambda: silu(np.arange(3)), TypeError, "silu: x has dtype int64, expected float16"),
    (lambda: silu(np.ones(3), inplace=True), TypeError, "silu: got the keyword inplace, expected one of x"),
    (lambda: silu_backward(np.ones(3), silu_forward(np.ones(4))[1]), ValueError, r"silu: dy has shape \(3,\), expected \(4,\)"),
    (lambda: silu_backward(np.ones(3), None), TypeError, "silu: cache is a NoneType, expected npattn.SiluCache"),
])  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_verify_knows_it():
    report = npattn.verify.verify("silu")
    assert report.passed, report.lines()
    wrong = npattn.verify.verify(lambda x: np.maximum(x, 0), op="silu", cases=npattn.verify.CASES_OF["silu"][:1])
    assert list(wrong.diagnosis) == ["relu"]
