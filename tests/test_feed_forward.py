"""The feed-forward layer, plain and gated, forwards and backwards, against explicit loops."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from helpers import abs_finite, assert_close, first, leaves, random
from oracles import feed_forward_loops

import npattn
from npattn import FeedForwardParams, feed_forward, feed_forward_backward, feed_forward_forward, gradcheck
from npattn.ops.activations import ACTIVATIONS

M, F, OUT = 4, 5, 3
LEADS = [(2, 3), (), (6,), (2, 1, 3), (0,)]
SOME = {"all": ("b_in", "b_out", "b_gate"), "none": (), **{n: (n,) for n in ("b_in", "b_out", "b_gate")}}
# Each pair of options: an activation, plain or gated, and which biases there are. A gate's bias needs a gate.
OPTIONS = [(name, gated, some) for name, gated, some in itertools.product(ACTIVATIONS, (False, True), SOME)
           if gated or some != "b_gate"]  # fmt: skip
METHOD = pytest.mark.parametrize("method", ["complex", "central"])
GATED = pytest.mark.parametrize("gated", [True, False])


def problem(gated=True, some="all", lead=(2, 3), dtype=np.float64, M=M, F=F, OUT=OUT):
    shapes = {"w_in": (M, F), "w_out": (F, OUT), "b_in": (F,), "b_out": (OUT,), "w_gate": (M, F), "b_gate": (F,)}
    given = {n for n in shapes if (n[0] == "w" or n in SOME[some]) and (gated or "gate" not in n)}
    params = {n: random(s, (1, i)).astype(dtype) for i, (n, s) in enumerate(shapes.items()) if n in given}
    return random((*lead, M), 0).astype(dtype), FeedForwardParams(**params), random((*lead, OUT), 2).astype(dtype)


def results(x, params, dy, activation="gelu"):
    y, cache = feed_forward_forward(x, params, activation=activation)
    grads = feed_forward_backward(dy, cache)
    return {"y": y, "x": grads.x} | {name: g for name, g in grads.params._asdict().items() if g is not None}


# For |z| <= U, the terms of f(z) and those of f'(z): |f| + |f'| U and |f'| + |f''| U, since z is rounded, too.
TERMS = {
    **dict.fromkeys(("gelu", "gelu_tanh", "silu"), (lambda U: 2.2 * U, lambda U: 1.2 + U)),
    "relu": (lambda U: 2 * U, lambda U: 1 + 0 * U),
    "squared_relu": (lambda U: 3 * U * U, lambda U: 4 * U),
    "sigmoid": (lambda U: 1 + 0.25 * U, lambda U: 0.25 + 0.1 * U),
}


def terms(x, params, dy, activation):
    """For every result the sum of the |terms| that make up each element."""
    of_f, of_slope = TERMS[activation]
    x, dy, p = abs_finite(x), abs_finite(dy), FeedForwardParams(*(0.0 if w is None else abs_finite(w) for w in params))
    A, dH = x @ p.w_in + p.b_in, dy @ p.w_out.T
    U = A if params.w_gate is None else x @ p.w_gate + p.b_gate
    A = 1.0 if params.w_gate is None else A
    H, dA, dU = of_f(U) * A, dH * of_f(U), dH * of_slope(U) * A
    dA = dU if params.w_gate is None else dA

    def rows(a):
        return a.reshape(math.prod(a.shape[:-1]), a.shape[-1])

    found = {"y": H @ p.w_out + p.b_out, "x": dA @ p.w_in.T, "w_in": rows(x).T @ rows(dA), "w_out": rows(H).T @ rows(dy),
             "b_in": rows(dA).sum(0), "b_out": rows(dy).sum(0)}  # fmt: skip
    if params.w_gate is not None:
        found |= {"x": found["x"] + dU @ p.w_gate.T, "w_gate": rows(x).T @ rows(dU), "b_gate": rows(dU).sum(0)}
    return found


def check(x, params, dy, activation, got):
    want, sizes = feed_forward_loops(x, *params, dy, activation), terms(x, params, dy, activation)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == x.dtype
        assert_close(value, want[name], sizes[name], name=name)


@pytest.mark.parametrize(("activation", "gated", "some"), OPTIONS)
def test_it_is_that_of_loops(activation, gated, some):
    given = problem(gated, some)
    got = results(*given, activation)
    check(*given, activation, got)
    assert np.array_equal(feed_forward(*given[:2], activation=activation), got["y"])


@GATED
@pytest.mark.parametrize("lead", LEADS)
def test_inputs_of_every_rank(lead, gated):
    given = problem(gated, lead=lead)
    check(*given, "silu", results(*given, "silu"))


@METHOD
@pytest.mark.parametrize(("activation", "gated", "some"), first(18, sorted(OPTIONS, key=lambda o: o[2] not in ("all", "b_in"))))
def test_its_gradient_is_the_derivative(activation, gated, some, method):
    x, params, _ = problem(gated, some)
    gradcheck(lambda x, params: feed_forward_forward(x, params, activation=activation), feed_forward_backward,
              {"x": x, "params": params}, method=method, elements=2)  # fmt: skip


def test_gelu_is_the_default():
    x, params, _ = problem()
    assert np.array_equal(feed_forward(x, params), feed_forward(x, params, activation="gelu"))


def test_a_gate_that_is_1_is_none():
    x, params, _ = problem(some="none")
    plain = feed_forward(x, FeedForwardParams(params.w_gate, np.eye(F)), activation="silu")
    one = feed_forward(x, FeedForwardParams(0 * params.w_in, np.eye(F), np.ones(F), None, params.w_gate), activation="silu")
    assert np.array_equal(plain, one)


@GATED
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, gated):
    given = problem(gated, dtype=dtype)
    x, params, dy = given
    wide = x.astype(np.float32), FeedForwardParams(*(p if p is None else p.astype(np.float32) for p in params)), dy.astype("f4")
    got, want = results(*given), results(*wide)
    for name, value in got.items():
        assert value.dtype == dtype
        assert np.array_equal(value, want[name].astype(dtype)), name
    mixed = results(x, wide[1], dy)  # parameters may have the computing dtype
    assert mixed["x"].dtype == mixed["y"].dtype == dtype
    assert np.array_equal(mixed["w_in"], want["w_in"])


@GATED
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_dropout_mask_has_the_dtype_of_the_inputs_or_of_the_computing(dtype, gated):
    x, params, dy = problem(gated, dtype=dtype)
    mask = npattn.Dropout(0.5, 1).mask((2, 3, F), dtype)
    (y, cache), (y2, cache2) = (feed_forward_forward(x, params, dropout_mask=m) for m in (mask, mask.astype(np.float32)))
    assert np.array_equal(y, y2)
    assert all(map(np.array_equal, *(leaves(feed_forward_backward(dy, c)) for c in (cache, cache2))))


@GATED
def test_float32_and_longdouble(gated):
    given = problem(gated, dtype=np.float32)
    check(*given, "silu", results(*given, "silu"))
    assert {a.dtype for a in results(*problem(gated, dtype=np.longdouble), "silu").values()} == {np.dtype(np.longdouble)}


@GATED
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_a_dead_token_has_no_gradient_and_adds_none(activation, bad, gated):
    x, params, dy = problem(gated)
    x[0, 1], dy[0, 1] = bad, 0
    got = results(x, params, dy, activation)
    rest = [np.delete(a.reshape(-1, a.shape[-1]), 1, 0) for a in (x, dy)]
    assert not got["x"][0, 1].any()
    alone = {n: a if n not in ("x", "y") else np.delete(a.reshape(-1, a.shape[-1]), 1, 0) for n, a in got.items()}
    check(rest[0], params, rest[1], activation, alone)


@GATED
def test_nan_of_one_token_reaches_no_other(gated):
    x, params, dy = problem(gated)
    clean, bad = results(x, params, dy, "silu"), np.zeros(x.shape[:-1], bool)
    bad[1, 2] = True
    x[bad] = np.nan
    got = results(x, params, dy, "silu")
    for name in ("y", "x"):
        assert np.isnan(got[name][bad]).all()
        assert np.array_equal(got[name][~bad], clean[name][~bad])


@GATED
@pytest.mark.parametrize(("M", "F", "OUT"), [(0, 5, 3), (4, 0, 3), (4, 5, 0), (1, 1, 1)])
def test_empty_and_small_widths(M, F, OUT, gated):
    given = problem(gated, M=M, F=F, OUT=OUT)
    check(*given, "silu", results(*given, "silu"))


@GATED
def test_inputs_may_be_views_and_nothing_is_modified(gated):
    x, params, dy = problem(gated)
    views = np.broadcast_to(x[:1], x.shape), FeedForwardParams(*(None if p is None else p[::-1] for p in params)), dy[:, ::-1]
    check(*views, "silu", results(*views, "silu"))
    for a in (x, dy, *params):
        if a is not None:
            a.flags.writeable = False
    _, cache = feed_forward_forward(x, params)
    one, two = feed_forward_backward(dy, cache), feed_forward_backward(dy, cache)
    assert np.array_equal(one.x, two.x)
    assert all(a is b is None or np.array_equal(a, b) for a, b in zip(one.params, two.params, strict=True))


@GATED
def test_large_numbers_saturate_and_do_not_become_nan(gated):
    x, params, dy = problem(gated, dtype=np.float32)
    for size in (1e15, 1e-30):
        assert all(np.isfinite(a).all() for a in results(x * np.float32(size), params, dy, "silu").values())


X, P = np.ones((2, M)), FeedForwardParams(np.ones((M, F)), np.ones((F, OUT)))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: feed_forward([1.0], P), TypeError, "feed_forward: x is a list, expected a numpy.ndarray"),
    (lambda: feed_forward(X, P.w_in), TypeError, "params is an array of dtype float64, expected npattn.FeedForwardParams"),
    (lambda: feed_forward(X, P, activation="swish"), ValueError, "activation is 'swish', expected one of .*; 'swish' is 'silu"),
    (lambda: feed_forward(X, P, activation="gelu_new"), ValueError, "expected one of 'gelu', .*; 'gelu_new' is 'gelu_tanh' he"),
    (lambda: feed_forward(X, P, activation="mish"), ValueError, "activation is 'mish', expected one of .*'sigmoid'$"),
    (lambda: feed_forward(X, P, dropout=0.1), TypeError, r"got the keyword dropout, expected dropout_mask=.*mask\(\(..., F\),"),
    (lambda: feed_forward(X, P, dropout_mask=X), ValueError, r"dropout_mask has shape \(2, 4\), expected \(B=2, F=5\): F is"),
    (lambda: feed_forward(X, P, dropout_mask=X[:, :1] - 2), ValueError, "feed_forward: dropout_mask reaches from -1.0 to -1.0"),
    (lambda: feed_forward(X, P, dropout_mask=X.astype("f4")), TypeError, "feed_forward: dropout_mask has dtype float32, expec"),
    (lambda: feed_forward(X, P, activation=None), ValueError, "feed_forward: activation is None, expected one of 'gelu'"),
    (lambda: feed_forward(X, P._replace(w_out=None)), TypeError, "feed_forward: w_out is a NoneType, expected a numpy.ndarray"),
    (lambda: feed_forward(X, P._replace(w_in=P.w_in.T)), ValueError, r"w_in has shape \(5, 4\), expected \(M=4, F\)"),
    (lambda: feed_forward(X, P._replace(w_gate=P.w_in[:, :2])), ValueError, r"w_gate has shape \(4, 2\), expected \(M=4, F="),
    (lambda: feed_forward(X, P._replace(w_out=P.w_in)), ValueError, r"w_out has shape \(4, 5\), expected \(F=5, M_out\)"),
    (lambda: feed_forward(X, P._replace(b_in=np.ones(M))), ValueError, r"b_in has shape \(4,\), expected \(F=5,\)"),
    (lambda: feed_forward(X, P._replace(b_out=np.ones(M))), ValueError, r"b_out has shape \(4,\), expected \(M_out=3,\)"),
    (lambda: feed_forward(X, P._replace(b_gate=np.ones(F))), ValueError, "b_gate is an array of dtype float64, expected None"),
    (lambda: feed_forward(X, P._replace(b_in=np.ones(F, "f4"))), TypeError, "b_in has dtype float32, expected float64"),
    (lambda: feed_forward(X, P, act="gelu"), TypeError, "feed_forward: got the keyword act, expected one of activation"),
    (lambda: feed_forward_backward(X, feed_forward_forward(X, P)[1]), ValueError, r"dy has shape \(2, 4\), expected \(2, 3\)"),
    (lambda: feed_forward_backward(X, None), TypeError, "cache is a NoneType, expected npattn.FeedForwardCache"),
])  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_verify_knows_it():
    for op in ("feed_forward", "gated_feed_forward"):
        report = npattn.verify.verify(op)
        assert report.passed, report.lines()

    def swiglu_packed_the_other_way(x, w_in, w_out, b_in=None, b_out=None, w_gate=None, b_gate=None, *, activation):
        if activation != "silu" or any(b is not None for b in (b_in, b_out, b_gate)):
            raise NotImplementedError("silu, gated, without biases")
        gate, value = np.split(x @ np.concatenate([w_in, w_gate], 1), 2, -1)
        return npattn.silu(gate) * value @ w_out

    report = npattn.verify.verify(swiglu_packed_the_other_way, op="gated_feed_forward")
    assert list(report.diagnosis) == ["gate and value exchanged"]
