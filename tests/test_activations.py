"""Activations, forwards and backwards, against explicit loops."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close, first
from oracles import gelu_loops, relu_loops, silu_loops

import npattn
from npattn import (
    gelu,
    gelu_backward,
    gelu_forward,
    gradcheck,
    relu,
    relu_backward,
    relu_forward,
    silu,
    silu_backward,
    silu_forward,
    squared_relu,
    squared_relu_backward,
    squared_relu_forward,
)
from npattn.ops.activations import ACTIVATIONS

SHAPES = [(7,), (5, 7), (2, 3, 7), (0, 7), (5, 0), ()]
LOOPS = {
    "gelu": gelu_loops, "gelu_tanh": partial(gelu_loops, approximate="tanh"), "relu": relu_loops,
    "squared_relu": partial(relu_loops, power=2), "silu": silu_loops,
}  # fmt: skip
EACH = pytest.mark.parametrize("name", LOOPS)  # sigmoid has tests/test_sigmoid.py
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.longdouble, np.complex128, np.clongdouble]


def terms(name, x):
    """The sums of |terms| of y = x s and of dy/dx = s + x ds/dx.

    The argument z of an exp has an error of eps |z|, which is a relative one of the exp: of s where that is small, and of ds.
    """
    found = LOOPS[name](x, np.ones_like(x))
    s, x = found["y"] / x, x.astype(float)
    z = {"silu": x, "gelu": x * x / 2, "gelu_tanh": np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)}.get(name, 0 * x)
    of_s = 1 + np.where(x < 0, np.abs(z), 0)
    return np.abs(found["y"]) * of_s, np.abs(s) * of_s + np.abs(found["x"] - s) * (1 + np.abs(z))


def numbers(name, shape=(4, 50), size=3.0, dtype=np.float64):
    rng = np.random.default_rng([7, *name.encode()])
    return (size * rng.standard_normal(shape)).astype(dtype), rng.standard_normal(shape).astype(dtype)


@EACH
@pytest.mark.parametrize("size", [1e-30, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_is_that_of_loops(name, size, dtype):
    forward, backward = ACTIVATIONS[name]
    x, dy = numbers(name, size=size, dtype=dtype)
    want, (y, cache) = LOOPS[name](x, dy), forward(x)
    of_y, of_slope = terms(name, x)
    assert_close(y, want["y"], of_y, name="y")
    assert_close(backward(dy, cache).x, want["x"], np.abs(dy) * of_slope, name="dx")


@EACH
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(name, shape):
    forward, backward = ACTIVATIONS[name]
    x, dy = numbers(name, shape)
    x, dy = np.asarray(x), np.asarray(dy)
    y, cache = forward(x)
    assert y.shape == backward(dy, cache).x.shape == shape
    assert np.allclose(y, LOOPS[name](x, dy)["y"])


@EACH
@pytest.mark.parametrize("method", ["complex", "central"])
def test_the_gradient_is_the_derivative(name, method):
    x = 3 * np.random.default_rng(1).standard_normal((3, 4, 5))
    x = np.where(np.abs(x) < 0.1, 0.5, x)  # relu has none at 0
    gradcheck(*ACTIVATIONS[name], {"x": x}, method=method)


@EACH
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble])
def test_limits_and_nan(name, dtype):
    forward, backward = ACTIVATIONS[name]
    top = float(np.finfo(np.float32).max) / 4
    x = np.array([np.inf, -np.inf, np.nan, -top, top, -1e20, 1e20, 0.0, -1e5], dtype)
    y, cache = forward(x)
    dx = backward(np.ones_like(x), cache).x
    zero, rest = [1, 3, 5, 7, 8], [0, 4, 6]
    assert not y[zero].any()
    assert np.isnan(y[2])
    assert np.isnan(dx[2])
    assert not dx[[1, 3, 5, 8]].any()
    if name == "squared_relu":
        with np.errstate(over="ignore"):
            assert np.array_equal(y[rest], x[rest] * x[rest])
        assert np.array_equal(dx[rest], 2 * x[rest])
        assert dx[7] == 0
    else:
        assert np.array_equal(y[rest], x[rest])
        assert np.array_equal(dx[rest], [1, 1, 1])
        assert dx[7] == (0 if name == "relu" else 0.5)


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dead_element_has_no_gradient(name, dtype):
    forward, backward = ACTIVATIONS[name]
    x = np.array([np.nan, np.inf, -np.inf, 1e4, -1e4, 2, -2], dtype)
    _, cache = forward(x)
    assert not backward(np.zeros_like(x), cache).x.any()
    dy = np.array([0, 0, 0, 0, 0, 1, 1], dtype)
    alone = backward(dy[5:], forward(x[5:])[1]).x
    assert np.array_equal(backward(dy, cache).x, [0, 0, 0, 0, 0, *alone])


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_come_out_as_they_go_in(name, dtype):
    forward, backward = ACTIVATIONS[name]
    x = np.random.default_rng(2).standard_normal((4, 5)).astype(dtype)
    y, cache = forward(x)
    wide, wide_cache = forward(x.astype(np.float32 if np.dtype(dtype).itemsize == 2 else dtype))
    assert y.dtype == backward(x, cache).x.dtype == x.dtype
    assert np.array_equal(y, wide.astype(dtype))
    assert np.array_equal(backward(x, cache).x, backward(x.astype(wide.dtype), wide_cache).x.astype(dtype))


@EACH
@pytest.mark.parametrize("dtype", [np.longdouble, np.complex128, np.clongdouble])
def test_wider_dtypes_have_the_same_values_and_more_digits(name, dtype):
    """In longdouble the derivative by a complex step has its precision, too."""
    forward, backward = ACTIVATIONS[name]
    x, dy = numbers(name)
    of_y, of_slope = terms(name, x)
    y, cache = forward(x.astype(dtype))
    narrow, narrow_cache = forward(x)
    assert_close(narrow, y.real.astype(np.longdouble), of_y, name="y")
    assert_close(backward(dy, narrow_cache).x, backward(dy.astype(dtype), cache).x.real, np.abs(dy) * of_slope, name="dx")
    if dtype == np.longdouble:
        h = np.longdouble(2) ** -300
        step = forward(x.astype(np.clongdouble) + 1j * h)[0].imag / h
        slope = backward(np.ones_like(x, dtype), cache).x
        assert_close(slope, step, of_slope, name="dx by a complex step")


@EACH
def test_complex_numbers_are_continued_where_exp_would_overflow(name):
    x = np.array([-800 + 1e-3j, 800 + 1e-3j, -1e150 + 1e-40j])
    y, _ = ACTIVATIONS[name][0](x)
    assert np.isfinite(y).all()
    assert y[1] == (x[1] ** 2 if name == "squared_relu" else x[1])
    assert y[0] == 0 if name != "silu" else abs(y[0]) < 1e-300


@EACH
def test_inputs_may_be_views_and_are_not_modified(name):
    forward, backward = ACTIVATIONS[name]
    x = np.broadcast_to(np.arange(-2, 3.0), (4, 5))
    assert not x.flags.writeable
    for view in (x, np.arange(10.0)[::-2], np.arange(12.0).reshape(3, 4).T):
        y, cache = forward(view)
        copied, copied_cache = forward(view.copy())
        assert np.array_equal(y, copied)
        one, two = (backward(view, cache).x for _ in range(2))
        assert one.tobytes() == two.tobytes() == backward(view, copied_cache).x.tobytes()
        assert cache.x is view


def test_the_option_chooses_and_the_cache_remembers_it():
    x, dy = numbers("gelu")
    for options, name in (({}, "gelu"), ({"approximate": "none"}, "gelu"), ({"approximate": "tanh"}, "gelu_tanh")):
        (y, cache), (want, other) = gelu_forward(x, **options), ACTIVATIONS[name][0](x)
        assert np.array_equal(y, want)
        assert np.array_equal(gelu(x, **options), want)
        assert np.array_equal(gelu_backward(dy, cache).x, gelu_backward(dy, other).x)
    assert np.abs(gelu(x) - gelu(x, approximate="tanh")).max() > 1e-4


def test_the_tail_of_gelu_is_exact_down_to_underflow():
    """1 + erf would give 0 below -5.5."""
    x = np.linspace(-13, -5, 200, dtype=np.float32)
    y, cache = gelu_forward(x)
    want = gelu_loops(x, np.ones_like(x))
    assert_close(y, want["y"], np.abs(want["y"]) * (1 + x.astype(float) ** 2 / 2))
    assert_close(gelu_backward(np.ones_like(x), cache).x, want["x"], np.abs(want["x"]) * (1 + x.astype(float) ** 2 / 2))
    assert (y != 0).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_of_one_number_comes_an_array(name):
    (forward, backward), x = ACTIVATIONS[name], np.array(2.0)
    y, cache = forward(x)
    assert type(y) is type(backward(x, cache).x) is np.ndarray


def test_squared_relu_overflows_only_where_its_result_does():
    x, dy = np.array([3e38, 1e20], np.float32), np.array([1e-30, 1e-30], np.float32)
    y, cache = squared_relu_forward(x)
    assert np.isinf(y).all()
    assert np.isfinite(squared_relu_backward(dy, cache).x).all()


def test_a_relu_that_is_off_hands_nothing_back():
    x, dy = np.array([-1.0, 0.0, -np.inf]), np.array([np.inf, np.nan, np.inf])
    for forward, backward in ((relu_forward, relu_backward), (squared_relu_forward, squared_relu_backward)):
        assert not backward(dy, forward(x)[1]).x.any()


class Bad(NamedTuple):
    call: object
    error: type
    text: str


BAD = [
    *(bad for f in (silu, gelu, relu, squared_relu) for bad in (
        Bad(lambda f=f: f([1.0]), TypeError, rf"{f.__name__}: x is a list, expected a numpy.ndarray: np.array\(x, "),
        Bad(lambda f=f: f(np.arange(3)), TypeError, f"{f.__name__}: x has dtype int64, expected float16"),
        Bad(lambda f=f: f(np.ones(3), inplace=True), TypeError, f"{f.__name__}: got the keyword inplace, expected one of "),
    )),
    *(bad for name, forward, backward, cache in (
        ("silu", silu_forward, silu_backward, "SiluCache"), ("gelu", gelu_forward, gelu_backward, "GeluCache"),
        ("relu", relu_forward, relu_backward, "ReluCache"),
        ("squared_relu", squared_relu_forward, squared_relu_backward, "SquaredReluCache"),
    ) for bad in (
        Bad(lambda f=forward, b=backward: b(np.ones(3), f(np.ones(4))[1]), ValueError,
            rf"{name}: dy has shape \(3,\), expected \(4,\)"),
        Bad(lambda f=forward, b=backward: b(np.ones(3, np.float32), f(np.ones(3))[1]), TypeError,
            f"{name}: dy has dtype float32, expected float64"),
        Bad(lambda b=backward: b(np.ones(3), None), TypeError, f"{name}: cache is a NoneType, expected npattn.{cache}"),
    )),
    Bad(lambda: gelu(np.ones(3), approximate=True), ValueError, "gelu: approximate is True, expected one of 'none', 'tanh'"),
    Bad(lambda: gelu(np.ones(3), "tanh"), TypeError, "gelu: got 2 arguments without a name, expected x: options are given by"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.text[:40])
def test_bad_input_is_named(bad):
    with pytest.raises(bad.error, match=bad.text):
        bad.call()


@pytest.mark.parametrize("op", first(1, ["relu", "squared_relu", "silu", "gelu"]))
def test_verify_knows_it(op):
    report = npattn.verify.verify(op)
    assert report.passed, report.lines()


@pytest.mark.parametrize(("op", "wrong", "mistake"), [
    ("silu", lambda x: np.maximum(x, 0), "relu"),
    ("gelu", lambda x: x / (1 + np.exp(-1.702 * x)), "a logistic function (1.702 x)"),
    ("relu", lambda x: np.where(x > 0, x, np.float32(0.01) * x), "leaky"),
    ("squared_relu", lambda x: x * x, "the square on both sides"),
])  # fmt: skip
def test_verify_names_a_mistake(op, wrong, mistake):
    report = npattn.verify.verify(wrong, op=op, cases=npattn.verify.CASES_OF[op][:1])
    assert any(mistake in name for name in report.diagnosis), report.diagnosis
