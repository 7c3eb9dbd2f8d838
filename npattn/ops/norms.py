"""Layer norm and RMS norm: each token is brought to mean 0 and variance 1, or to mean square 1, over its M features.

    layer norm                                                      RMS norm
    mu  = sum_m x_m / M                      (...,)    (1)
    c   = x - mu                             (..., M)  (2)          c = x
    var = sum_m c_m^2 / M                    (...,)    (3)          the mean square of x
    r   = 1 / sqrt(var + eps)                (...,)    (4)
    n   = c r                                (..., M)  (5)
    y   = n g + b                            (..., M)  (6)

Ba et al. 2016; Zhang and Sennrich 2019. Gemma keeps g - 1 in its files: `npattn.convert.norm_from_torch` adds the 1.

The variance is that of the token itself, divided by M and not by M - 1. Where the largest |x| of a token is beyond 2^50, or
below 2^-50, x and sqrt(eps) are first divided by a power of two near it, so that no square overflows or vanishes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select
from npattn.ops.checks import Array, Dims, check_class, check_cotangent, check_dtype, check_number, check_other_dtype
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.rows import in_rows

USUAL = 50  # exponents of 2 whose squares, and sums of them, no dtype loses


class NormParams(NamedTuple):
    """The weight and bias of a norm; either may be None, which leaves it out."""

    g: Array | None = None  # (M,)
    b: Array | None = None  # (M,)


class NormCache(NamedTuple):
    """What the backward needs. Each norm has a class of its own, so that neither takes what the other kept."""

    n: Array  # (..., M), in the computing dtype
    r: Array  # (..., 1), of x / unit
    unit: Array | None  # (..., 1), a power of two; None where it is 1 for all tokens
    params: NormParams
    dtype: np.dtype[Any]


class LayerNormCache(NormCache):
    """That of `layer_norm`."""


class RMSNormCache(NormCache):
    """That of `rms_norm`."""


class NormGrads(NamedTuple):
    """The gradients of `layer_norm` or `rms_norm`; those of params have its names."""

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
    wide, unit, root = _scaled("layer_norm", x, params, eps)
    y, n, r = in_rows(partial(_layer_norm, *_computed(params, wide.dtype)), wide, root)
    return y.astype(x.dtype, copy=y is n), LayerNormCache(n, r, unit, params, x.dtype)


def _layer_norm(g: Array | None, b: Array | None, x: Array, root: Array) -> tuple[Array, Array, Array]:
    c = x - _mean(x)  # (1), (2)
    n, r = _normalized(c, root)  # (3) to (5)
    return _affine(n, g, b), n, r  # (6)


@quiet
def layer_norm_backward(dy: Array, cache: LayerNormCache) -> NormGrads:
    """The gradients of sum(dy * y). With dn = dy g, and means over the M features of a token:

        dx = r (dn - mean(dn) - n mean(dn n))

    mean(dn n) comes from r, whose derivative is -r^3 c / M, and mean(dn) from (2) and (1). dg and db are sums over all tokens.

    dy : (..., M), as y. A token with dy = 0 adds nothing, even if it is NaN. Raises TypeError, ValueError.
    """
    check_class("layer_norm", "cache", cache, LayerNormCache, ", from layer_norm_forward")
    dy, g, params = _affine_backward("layer_norm", dy, cache)  # (6)
    dx = in_rows(partial(_layer_norm_backward, g), dy, cache.n, cache.r)
    return NormGrads(_of_living(dx, dy, cache), params)


def _layer_norm_backward(g: Array | None, dy: Array, n: Array, r: Array) -> Array:
    dn = dy if g is None else dy * g  # (6)
    dc = _normalized_backward(dn, n, r)  # (5) to (3)
    dc -= _mean(dc)  # (2), (1)
    return dc


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
    wide, unit, root = _scaled("rms_norm", x, params, eps)
    y, n, r = in_rows(partial(_rms_norm, *_computed(params, wide.dtype)), wide, root)
    return y.astype(x.dtype, copy=y is n), RMSNormCache(n, r, unit, params, x.dtype)


def _rms_norm(g: Array | None, b: Array | None, x: Array, root: Array) -> tuple[Array, Array, Array]:
    n, r = _normalized(x, root)  # (3) to (5)
    return _affine(n, g, b), n, r  # (6)


@quiet
def rms_norm_backward(dy: Array, cache: RMSNormCache) -> NormGrads:
    """The gradients of sum(dy * y): with dn = dy g, dx = r (dn - n mean(dn n)). dg and db are sums over all tokens.

    dy : (..., M), as y. A token with dy = 0 adds nothing, even if it is NaN. Raises TypeError, ValueError.
    """
    check_class("rms_norm", "cache", cache, RMSNormCache, ", from rms_norm_forward")
    dy, g, params = _affine_backward("rms_norm", dy, cache)  # (6)
    dx = in_rows(partial(_rms_norm_backward, g), dy, cache.n, cache.r)
    return NormGrads(_of_living(dx, dy, cache), params)


def _rms_norm_backward(g: Array | None, dy: Array, n: Array, r: Array) -> Array:
    return _normalized_backward(dy if g is None else dy * g, n, r)  # (6) to (3)


# --- the equations that both have --------------------------------------------------------------------------------------------


def _mean(x: Array) -> Array:
    """The mean of each token, (..., 1)."""
    mean: Array = x.sum(-1, keepdims=True) / max(x.shape[-1], 1)
    return mean


def _normalized(c: Array, root: Array) -> tuple[Array, Array]:
    """n and r. root : (..., 1) sqrt(eps), in the unit of c"""
    r = 1 / np.sqrt(_mean(np.square(c)) + np.square(root))  # (3), (4)
    return c * r, r  # (5)


def _normalized_backward(dn: Array, n: Array, r: Array) -> Array:
    dc = n * _mean(dn * n)
    np.subtract(dn, dc, out=dc)
    dc *= r
    return dc


def _affine(n: Array, g: Array | None, b: Array | None) -> Array:
    y = n if g is None else n * g
    return y if b is None else np.add(y, b, out=None if y is n else y)


def _computed(params: NormParams, computing: np.dtype[Any]) -> tuple[Array | None, Array | None]:
    """g and b in the computing dtype."""
    g, b = (None if p is None else p.astype(computing, copy=False) for p in params)
    return g, b


def _affine_backward(op: str, dy: Array, cache: NormCache) -> tuple[Array, Array | None, NormParams]:
    """dy and g in the computing dtype, and the gradients of the parameters."""
    n, (g, b) = cache.n, cache.params
    dy = check_cotangent(op, "dy", dy, n.shape, cache.dtype, n.dtype)
    M, dg, db = n.shape[-1], None, None
    rows, of_rows = dy.reshape(-1, M) if M else dy.reshape(0, 0), n.reshape(-1, M) if M else n.reshape(0, 0)
    if g is not None:
        total = np.einsum("nm,nm->m", rows, of_rows)
        if not np.isfinite(total.sum()):  # a token with dy = 0 may be NaN
            total = select(np.asarray(rows.any(-1, keepdims=True)), rows * of_rows).sum(0)
        dg = total.astype(g.dtype, copy=False)
    if b is not None:
        db = rows.sum(0).astype(b.dtype, copy=False)
    return dy, _computed(cache.params, n.dtype)[0], NormParams(dg, db)


def _of_living(dx: Array, dy: Array, cache: NormCache) -> Array:
    """dx in units of x, 0 where dy is 0 for the whole token, in the dtype of x."""
    if not np.isfinite(dx.sum()):
        dx = select(np.asarray(dy.any(-1, keepdims=True)), dx)
    return (dx if cache.unit is None else dx / cache.unit).astype(cache.dtype, copy=False)


def _scaled(op: str, x: Array, params: NormParams, eps: float) -> tuple[Array, Array | None, Array]:
    """x / unit in the computing dtype, the unit, and sqrt(eps) / unit for each token (..., 1), after all checks."""
    check_class(op, "params", params, NormParams)
    computing, dims = check_dtype(op, x=x), Dims(op)
    dims.fit("x", x, "... M")
    for name, p in params._asdict().items():
        if p is not None:
            dims.fit(name, check_other_dtype(op, name, p, x.dtype, computing), "M")
    real = np.zeros(0, computing).real.dtype
    eps = check_number(op, "eps", eps, real)
    if eps < 0:
        raise ValueError(f"{op}: eps is {eps}, expected 0 or more")
    wide = x.astype(computing, copy=False)
    root = real.type(np.sqrt(np.longdouble(eps)))
    largest = np.maximum(wide.real.max(-1, keepdims=True, initial=0), -wide.real.min(-1, keepdims=True, initial=0))
    exponent = np.frexp(np.maximum(largest, root))[1] - 1
    exponent *= np.abs(exponent) > USUAL
    roots = np.broadcast_to(root, largest.shape)
    if not exponent.any():
        return wide, None, roots
    unit = np.ldexp(np.ones_like(largest), exponent)
    return wide / unit, unit, roots / unit


layer_norm = without_cache(layer_norm_forward)
rms_norm = without_cache(rms_norm_forward)

__all__ = [
    "LayerNormCache",
    "NormGrads",
    "NormParams",
    "RMSNormCache",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
]
