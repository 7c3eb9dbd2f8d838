"""The sigmoid, forwards and backwards, against its loops."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracles import ACTIVATED

from npattn import gradcheck, sigmoid, sigmoid_backward, sigmoid_forward
from npattn.tolerances import EXP_ULPS

SHAPES = [(7,), (5, 7), (2, 3, 7), (0, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_that_of_loops(shape):
    rng = np.random.default_rng(0)
    x, dy = 3 * rng.standard_normal(shape), rng.standard_normal(shape)
    y, cache = sigmoid_forward(x)
    want, slope = (np.array([f(float(z)) for z in x.ravel()]).reshape(shape) for f in ACTIVATED["sigmoid"])
    eps = np.finfo(float).eps
    assert (np.abs(y - want) <= (EXP_ULPS + 4) * eps * want).all()  # an exp, a sum and a division
    assert (np.abs(sigmoid_backward(dy, cache).x - dy * slope) <= (2 * EXP_ULPS + 8) * eps * np.abs(dy) * slope).all()
    assert np.array_equal(sigmoid(x), y)


@pytest.mark.parametrize("method", ["complex", "central"])
def test_its_gradient_is_the_derivative(method):
    x = 3 * np.random.default_rng(1).standard_normal((3, 4, 5))
    gradcheck(sigmoid_forward, sigmoid_backward, {"x": x}, method=method)


def test_limits_and_dead_elements():
    x = np.array([np.inf, -np.inf, np.nan, -1e4, 1e4, 0.0, -40.0])
    y, cache = sigmoid_forward(x)
    assert np.array_equal(y, [1, 0, np.nan, 0, 1, 0.5, np.exp(-40.0)], equal_nan=True)
    assert np.array_equal(sigmoid_backward(np.ones(7), cache).x, [0, 0, np.nan, 0, 0, 0.25, np.exp(-40.0)], equal_nan=True)
    assert not sigmoid_backward(np.zeros(7), cache).x.any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.longdouble])
def test_dtypes_come_out_as_they_go_in(dtype):
    x = np.random.default_rng(2).standard_normal((4, 5)).astype(dtype)
    y, cache = sigmoid_forward(x)
    wide, wide_cache = sigmoid_forward(x.astype(np.float32 if np.dtype(dtype).itemsize == 2 else dtype))
    assert y.dtype == sigmoid_backward(x, cache).x.dtype == x.dtype
    assert np.array_equal(y, wide.astype(dtype))
    assert np.array_equal(sigmoid_backward(x, cache).x, sigmoid_backward(x.astype(wide.dtype), wide_cache).x.astype(dtype))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: sigmoid([1.0]), TypeError, "sigmoid: x is a list, expected a numpy.ndarray"),
    (lambda: sigmoid(np.arange(3)), TypeError, "sigmoid: x has dtype int64, expected float16"),
    (lambda: sigmoid_backward(np.ones(3), sigmoid_forward(np.ones(4))[1]), ValueError, r"sigmoid: dy has shape \(3,\)"),
    (lambda: sigmoid_backward(np.ones(3), None), TypeError, "sigmoid: cache is a NoneType, expected npattn.SigmoidCache"),
])  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
