"""The linear layer: one matrix product for all tokens.

    y = x w + b          (..., M) -> (..., M_out)      (1)

Its gradients are dx = dy w^T, and dw = x^T dy and db = dy summed over all tokens. Multi-head attention and the feed-forward
layer are made of it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, swap, weight_gradient
from npattn.ops.checks import Array, Dims, check_class, check_cotangent, check_dtype, check_other_dtype
from npattn.ops.edge import explain_keywords, without_cache


class LinearParams(NamedTuple):
    """A weight (in, out), applied as x @ w."""

    w: Array  # (M, M_out)
    b: Array | None = None  # (M_out,)


class LinearCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., M)
    params: LinearParams


class LinearGrads(NamedTuple):
    """The gradients of `linear`; those of params have its names."""

    x: Array
    params: LinearParams


@explain_keywords
@quiet
def linear_forward(x: Array, params: LinearParams) -> tuple[Array, LinearCache]:
    """x w + b, equation (1) of this page.

    x : (..., M), any rank   params : see `LinearParams`
    Returns y (..., M_out), and the cache. Raises TypeError, ValueError.

    >>> y, cache = linear_forward(np.array([1.0, 2.0]), LinearParams(np.array([[1.0, 0.0], [3.0, 1.0]]), np.array([0.5, 0.0])))
    >>> y.tolist()
    [7.5, 2.0]
    """
    check_class("linear", "params", params, LinearParams)
    computing, dims = check_dtype("linear", x=x), Dims("linear")
    dims.fit("x", x, "... M")
    dims.fit("w", check_other_dtype("linear", "w", params.w, x.dtype, computing), "M M_out")
    if params.b is not None:
        dims.fit("b", check_other_dtype("linear", "b", params.b, x.dtype, computing), "M_out")
    y = project(x, params.w, params.b, computing)  # (1)
    return y.astype(x.dtype, copy=False), LinearCache(x, params)


@quiet
def linear_backward(dy: Array, cache: LinearCache) -> LinearGrads:
    """The gradients of sum(dy * y) for x and the parameters.

    dy : (..., M_out), as y. Raises TypeError, ValueError.
    """
    check_class("linear", "cache", cache, LinearCache, ", from linear_forward")
    x, (w, b) = cache.x, cache.params
    dy = check_cotangent("linear", "dy", dy, (*x.shape[:-1], w.shape[1]), x.dtype, check_dtype("linear", x=x))
    dx, dw, db = project_backward(dy, x, w, b)  # (1)
    return LinearGrads(dx, LinearParams(dw, db))


linear = without_cache(linear_forward)


# --- for layers that are made of it -----------------------------------------------------------------------------------------


def project(x: Array, w: Array, b: Array | None, computing: np.dtype[Any]) -> Array:
    """y = x w + b, in the computing dtype."""
    y = _all_tokens(x.astype(computing, copy=False), w.astype(computing, copy=False))
    if b is not None:
        y += b.astype(computing, copy=False)
    return y


def project_backward(
    dy: Array, x: Array, w: Array, b: Array | None, heads: int = 1, axis: int = 1
) -> tuple[Array, Array, Array | None]:
    """The backward of y = x w + b: dx = dy w^T; dw = x^T dy and db = dy are summed over all tokens, see `weight_gradient`."""
    dx = _all_tokens(dy, swap(w.astype(dy.dtype, copy=False))).astype(x.dtype, copy=False)
    dw = weight_gradient(x, dy, heads, axis).astype(w.dtype, copy=False)
    db = None if b is None else dy.sum(tuple(range(dy.ndim - 1))).astype(b.dtype, copy=False)
    return dx, dw, db


def _all_tokens(x: Array, w: Array) -> Array:
    """x w as one product for all sequences; for x of rank 3 NumPy would compute one product for each."""
    result: Array = np.matmul(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), w)
    return result.reshape(*x.shape[:-1], w.shape[-1])


__all__ = [
    "LinearCache",
    "LinearGrads",
    "LinearParams",
    "linear",
    "linear_backward",
    "linear_forward",
    "project",
    "project_backward",
]
