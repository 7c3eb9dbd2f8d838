"""Layer norm and RMS norm: each token is brought to mean 0 and variance 1, or to mean square 1, over its M features.

    layer norm                                                      RMS norm
    mu  = sum_m x_m / M                      (...,)    (1)
    c   = x - mu                             (..., M)  (2)          c = x
    var = sum_m c_m^2 / M                    (...,)    (3)          the mean square of x
    r   = 1 / sqrt(var + eps)                (...,)    (4)
    n   = c r                                (..., M)  (5)
    y   = n g + b                            (..., M)  (6)

Ba et al. 2016; Zhang and Sennrich 2019. Gemma keeps g - 1 in its files: `npattn.convert` adds the 1.

The variance is that of the token itself, divided by M and not by M - 1. x and sqrt(eps) are first divided by a power of two
near the largest |x| of the token: it does not change n by a bit, and no square overflows or vanishes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select
from npattn.ops.checks import Array, Dims, check_class, check_cotangent, check_dtype, check_number, check_other_dtype
from npattn.ops.edge import explain_keywords, without_cache


class NormParams(NamedTuple):
    """The weight and bias of a norm; either may be None, which leaves it out."""

    g: Array | None = None  # (M,)
    b: Array | None = None  # (M,)


class LayerNormCache(NamedTuple):
    """What the backward needs."""

    n: Array  # (..., M), in the computing dtype
    r: Array  # (..., 1), of x / unit
    unit: Array  # (..., 1), a power of two
    params: NormParams
    dtype: np.dtype[Any]


class RMSNormCache(NamedTuple):
    """What the backward needs, as in `LayerNormCache`."""

    n: Array
    r: Array
    unit: Array
    params: NormParams
    dtype: np.dtype[Any]


class LayerNormGrads(NamedTuple):
    """The gradients of `layer_norm`."""

    x: Array
    params: NormParams


class RMSNormGrads(NamedTuple):
    """The gradients of `rms_norm`."""

    x: Array
    params: NormParams


@explain_keywords
@quiet
def layer_norm_forward(x: Array, params: NormParams, *, eps: float = 1e-5) -> tuple[Array, LayerNormCache]:
    """Layer norm over the last axis, equations (1) to (6) of this page.

    x : (..., M); params : g and b, (M,) each or None; eps : added to the variance, 0 or more
    Returns y (..., M) and the cache. Raises TypeError, ValueError.

    >>> y, cache = layer_norm_forward(np.array([[1.0, 2.0, 3.0]]), NormParams(), eps=0.0)
    >>> y.round(4).tolist()
    [[-1.2247, 0.0, 1.2247]]
    """
    wide, unit, eps = _scaled("layer_norm", x, params, eps)
    c = wide - _mean(wide)  # (1), (2)
    n, r = _normalized(c, eps, unit)  # (3) to (5)
    return _affine(n, params, x.dtype), LayerNormCache(n, r, unit, params, x.dtype)  # (6)


@quiet
def layer_norm_backward(dy: Array, cache: LayerNormCache) -> LayerNormGrads:
    """The gradients of sum(dy * y). With dn = dy g, and means over the M features of a token:

        dx = r (dn - mean(dn) - n mean(dn n))

    mean(dn n) comes from r, whose derivative is -r^3 c / M, and mean(dn) from (2) and (1). dg and db are sums over all tokens.

    dy : (..., M), as y. A token with dy = 0 adds nothing, even if it is NaN. Raises TypeError, ValueError.
    """
    check_class("layer_norm", "cache", cache, LayerNormCache, ", from layer_norm_forward")
    dn, alive, params = _affine_backward("layer_norm", dy, cache)  # (6)
    dc = _normalized_backward(dn, cache)  # (5) to (3)
    dx = (dc - _mean(dc)) / cache.unit  # (2), (1)
    return LayerNormGrads(select(alive, dx).astype(cache.dtype, copy=False), params)


@explain_keywords
@quiet
def rms_norm_forward(x: Array, params: NormParams, *, eps: float = 1e-6) -> tuple[Array, RMSNormCache]:
    """RMS norm over the last axis: layer norm without its mean, equations (3) to (6) of this page with c = x.

    x : (..., M); params : g and b, (M,) each or None; eps : added to the mean square, 0 or more
    Returns y (..., M) and the cache. Raises TypeError, ValueError.

    >>> y, cache = rms_norm_forward(np.array([[3.0, 4.0]]), NormParams(np.array([1.0, 10.0])), eps=0.0)
    >>> y.round(4).tolist()
    [[0.8485, 11.3137]]
    """
    wide, unit, eps = _scaled("rms_norm", x, params, eps)
    n, r = _normalized(wide, eps, unit)  # (3) to (5)
    return _affine(n, params, x.dtype), RMSNormCache(n, r, unit, params, x.dtype)  # (6)


@quiet
def rms_norm_backward(dy: Array, cache: RMSNormCache) -> RMSNormGrads:
    """The gradients of sum(dy * y): with dn = dy g, dx = r (dn - n mean(dn n)). dg and db are sums over all tokens.

    dy : (..., M), as y. A token with dy = 0 adds nothing, even if it is NaN. Raises TypeError, ValueError.
    """
    check_class("rms_norm", "cache", cache, RMSNormCache, ", from rms_norm_forward")
    dn, alive, params = _affine_backward("rms_norm", dy, cache)  # (6)
    dx = _normalized_backward(dn, cache) / cache.unit  # (5) to (3)
    return RMSNormGrads(select(alive, dx).astype(cache.dtype, copy=False), params)


# --- the equations that both have --------------------------------------------------------------------------------------------


def _mean(x: Array) -> Array:
    """The mean of each token, (..., 1)."""
    mean: Array = x.sum(-1, keepdims=True) / max(x.shape[-1], 1)
    return mean


def _normalized(c: Array, eps: float, unit: Array) -> tuple[Array, Array]:
    r = 1 / np.sqrt(_mean(np.square(c)) + np.square(math.sqrt(eps) / unit))  # (3), (4)
    return c * r, r  # (5)


def _normalized_backward(dn: Array, cache: LayerNormCache | RMSNormCache) -> Array:
    dc: Array = cache.r * (dn - cache.n * _mean(dn * cache.n))
    return dc


def _affine(n: Array, params: NormParams, dtype: np.dtype[Any]) -> Array:
    y = n if params.g is None else n * params.g.astype(n.dtype, copy=False)
    y = y if params.b is None else y + params.b.astype(n.dtype, copy=False)
    return y.astype(dtype, copy=y is n)


def _affine_backward(op: str, dy: Array, cache: LayerNormCache | RMSNormCache) -> tuple[Array, Array, NormParams]:
    """dn; the tokens with a dy that is not 0; and the gradients of the parameters."""
    n, (g, b) = cache.n, cache.params
    dy = check_cotangent(op, "dy", dy, n.shape, cache.dtype, n.dtype)
    alive: Any = dy.any(-1, keepdims=True)
    tokens = tuple(range(n.ndim - 1))
    dg = None if g is None else select(alive, dy * n).sum(tokens).astype(g.dtype, copy=False)
    db = None if b is None else dy.sum(tokens).astype(b.dtype, copy=False)
    return dy if g is None else dy * g.astype(n.dtype, copy=False), alive, NormParams(dg, db)


def _scaled(op: str, x: Array, params: NormParams, eps: float) -> tuple[Array, Array, float]:
    """x / unit in the computing dtype, the unit of each token (..., 1), and eps, after all checks."""
    check_class(op, "params", params, NormParams)
    computing, dims = check_dtype(op, x=x), Dims(op)
    dims.fit("x", x, "... M")
    for name, p in params._asdict().items():
        if p is not None:
            dims.fit(name, check_other_dtype(op, name, p, x.dtype, computing), "M")
    eps = check_number(op, "eps", eps, np.zeros(0, computing).real.dtype)
    if eps < 0:
        raise ValueError(f"{op}: eps is {eps}, expected 0 or more")
    wide = x.astype(computing, copy=False)
    top = np.maximum(np.abs(wide.real).max(-1, keepdims=True, initial=0), math.sqrt(eps))
    unit = np.ldexp(np.ones_like(top), np.frexp(top)[1] - 1)
    return wide / unit, unit, eps


layer_norm = without_cache(layer_norm_forward)
rms_norm = without_cache(rms_norm_forward)

__all__ = [
    "LayerNormCache",
    "LayerNormGrads",
    "NormParams",
    "RMSNormCache",
    "RMSNormGrads",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
]
