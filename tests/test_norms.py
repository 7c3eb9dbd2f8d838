"""Layer norm and RMS norm, forwards and backwards, against explicit loops."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close
from oracles import norm_loops

import npattn
from npattn import (
    NormParams,
    gradcheck,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)

NORMS = {"layer_norm": (layer_norm_forward, layer_norm_backward), "rms_norm": (rms_norm_forward, rms_norm_backward)}
EACH = pytest.mark.parametrize("name", NORMS)
PARAMS = pytest.mark.parametrize("given", ["gb", "g", "b", ""])


def drawn(shape, given="gb", seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x, dy, g, b = (rng.standard_normal(n) for n in (shape, shape, shape[-1], shape[-1]))
    params = NormParams(g if "g" in given else None, b if "b" in given else None)
    return x.astype(dtype), dy.astype(dtype), NormParams(*(None if p is None else p.astype(dtype) for p in params))


def terms_of(x, dy, params, eps, centred):
    """The sums of |terms|: c = x - mu is as exact as |x| + |mu|, and r as exact as c."""
    mu = np.abs(x).mean(-1, keepdims=True) if centred else 0
    c = x - (x.mean(-1, keepdims=True) if centred else 0)
    r = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + eps)
    n, g = (np.abs(x) + mu) * r, 1 if params.g is None else np.abs(params.g)
    more = 1 + (n * n).mean(-1, keepdims=True)
    spread = n * more
    dn = np.abs(dy) * g
    tokens = tuple(range(x.ndim - 1))
    return {
        "y": spread * g + (0 if params.b is None else np.abs(params.b)), "db": np.abs(dy).sum(tokens),
        "dx": 3 * r * more * (dn + dn.mean(-1, keepdims=True) + n * (dn * n).mean(-1, keepdims=True)),
        "dg": (np.abs(dy) * spread).sum(tokens),
    }  # fmt: skip


@EACH
@PARAMS
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (3, 1), (0, 7)])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("dtype", [np.float64, np.longdouble])
def test_norms_are_those_of_loops(name, given, shape, eps, dtype):
    forward, backward = NORMS[name]
    x, dy, params = drawn(shape, given, dtype=dtype)
    x += 2.0
    y, cache = forward(x, params, eps=eps)
    grads = backward(dy, cache)
    want, terms = norm_loops(x, *params, eps, dy, name == "layer_norm"), terms_of(x, dy, params, eps, name == "layer_norm")
    assert_close(y, want["y"], terms["y"], name="y")
    assert_close(grads.x, want["x"], terms["dx"], name="dx")
    for p, got in grads.params._asdict().items():
        assert (got is None) == (p not in given)
        if got is not None:
            assert_close(got, want[p], terms[f"d{p}"], name=p)


@EACH
@PARAMS
@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_gradients_are_the_derivatives(name, given, method, eps):
    forward, backward = NORMS[name]
    x, _, params = drawn((2, 3, 5), given, seed=1)
    gradcheck(lambda x, params: forward(x, params, eps=eps), backward, {"x": x, "params": params}, method=method)


def test_of_one_feature_layer_norm_has_no_gradient():
    x, _, params = drawn((3, 1))
    gradcheck(layer_norm_forward, layer_norm_backward, {"x": x, "params": params}, zero=("x", "params.g"))


@EACH
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-3, 1e18, 3e37])
def test_no_square_overflows_or_vanishes(name, size):
    """The norm of x is that of size times x, without eps; what a power of two scales has the same bits."""
    forward, backward = NORMS[name]
    x = np.array([[1, -2, 3, -4, 9]], np.float32)
    scale = np.float32(2.0 ** np.round(np.log2(size)))
    y, cache = forward(x * scale, NormParams(), eps=0.0)
    want, plain = forward(x, NormParams(), eps=0.0)
    assert np.array_equal(y, want)
    if size > 1e-38:
        dy = np.array([[1, 0, 2, -1, 5]], np.float32)
        assert np.array_equal(backward(dy * scale, cache).x, backward(dy, plain).x)


@EACH
def test_eps_below_the_smallest_square_still_counts(name):
    x = np.full((1, 4), 1e-30, np.float32) * np.arange(1, 5, dtype=np.float32)
    y, _ = NORMS[name][0](x, NormParams())
    c = x - x.mean() if name == "layer_norm" else x
    eps = 1e-5 if name == "layer_norm" else 1e-6
    assert_close(y, c.astype(float) / np.sqrt(eps), np.abs(x) / np.sqrt(eps))


@EACH
def test_a_dead_token_adds_nothing_and_nan_stays_in_its_token(name):
    forward, backward = NORMS[name]
    x, dy, params = drawn((2, 3, 5))
    y, cache = forward(x, params)
    want = backward(np.where(np.arange(3)[:, None] == 1, 0, dy), cache)
    x[:, 1], dy[:, 1] = [[np.nan], [np.inf]], 0
    y_nan, cache = forward(x, params)
    assert np.isnan(y_nan[:, 1]).all()
    assert np.array_equal(y_nan[:, ::2], y[:, ::2])
    got = backward(dy, cache)
    assert not got.x[:, 1].any()
    assert np.array_equal(got.x, want.x)
    assert all(map(np.array_equal, got.params, want.params))
    dy[:, 1] = 1
    got = backward(dy, cache)
    assert np.isnan(got.x[:, 1]).all()
    assert np.isfinite(got.x[:, ::2]).all()


@EACH
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.longdouble])
def test_dtypes_come_out_as_they_go_in(name, dtype):
    forward, backward = NORMS[name]
    x, dy, params = drawn((4, 5), dtype=dtype)
    computing = np.float32 if np.dtype(dtype).itemsize == 2 else np.dtype(dtype)
    for given in (params, NormParams(*(p.astype(computing) for p in params))):
        y, cache = forward(x, given)
        wide, wide_cache = forward(x.astype(computing), NormParams(*(p.astype(computing) for p in params)))
        grads, wide_grads = backward(dy, cache), backward(dy.astype(computing), wide_cache)
        assert y.dtype == grads.x.dtype == x.dtype
        assert np.array_equal(y, wide.astype(dtype))
        assert np.array_equal(grads.x, wide_grads.x.astype(dtype))
        for got, p, want in zip(grads.params, given, wide_grads.params, strict=True):
            assert got.dtype == p.dtype
            assert np.array_equal(got, want.astype(p.dtype))


@EACH
def test_inputs_may_be_views_and_nothing_is_modified(name):
    forward, backward = NORMS[name]
    x = np.broadcast_to(np.arange(5.0), (4, 5))
    y, cache = forward(x, NormParams())
    assert np.array_equal(y, forward(x.copy(), NormParams())[0])
    dy = np.random.default_rng(0).standard_normal((5, 4)).T
    first = backward(dy, cache)
    y[...] = 0  # what was returned is the caller's
    assert np.array_equal(first.x, backward(dy, cache).x)
    norm = getattr(npattn, name)
    assert np.array_equal(norm(x[:, ::-2], NormParams()), norm(x[:, ::-2].copy(), NormParams()))


PLAIN = NormParams(np.ones(4), np.zeros(4))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: layer_norm([1.0], PLAIN), TypeError, "layer_norm: x is a list, expected a numpy.ndarray"),
    (lambda: layer_norm(np.float64(1), PLAIN), TypeError, "layer_norm: x is a"),
    (lambda: layer_norm(np.ones((2, 3)), PLAIN), ValueError, r"layer_norm: g has shape \(4,\), expected \(M=3,\)"),
    (lambda: rms_norm(np.ones(4, np.float32), PLAIN), TypeError, "rms_norm: g has dtype float64, expected float32"),
    (lambda: rms_norm(np.ones(4), np.ones(4)), TypeError, "rms_norm: params is an array of dtype float64, expected"),
    (lambda: rms_norm(np.ones(4), PLAIN, eps=-1e-6), ValueError, "rms_norm: eps is -1e-06, expected 0 or more"),
    (lambda: rms_norm(np.ones(4), PLAIN, eps=None), TypeError, "rms_norm: eps is a NoneType, expected a Python float$"),
    (lambda: layer_norm(np.ones(4), weight=1, bias=1), TypeError, r"expected params=NormParams\(weight, bias\); needed are x,"),
    (lambda: rms_norm(np.ones(4), PLAIN, epsilon=0.1), TypeError, "rms_norm: got the keyword epsilon, expected eps="),
    (lambda: layer_norm(np.ones(4), normalized_shape=4), TypeError, "expected nothing: the mean is over the last axis; needed"),
    (lambda: layer_norm(np.ones(4), PLAIN, axis=0), TypeError, "layer_norm: got the keyword axis, expected"),
    (lambda: layer_norm_backward(np.ones(3), layer_norm_forward(np.ones(4), PLAIN)[1]), ValueError,
     r"layer_norm: dy has shape \(3,\), expected \(4,\)"),
    (lambda: layer_norm_backward(np.ones(4), rms_norm_forward(np.ones(4), PLAIN)[1]), TypeError,
     "layer_norm: cache is a npattn.ops.norms.RMSNormCache, expected npattn.LayerNormCache"),
])  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
