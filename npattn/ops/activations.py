"""Activations: elementwise functions, each with its backward.

    s = 1 / (1 + exp(-x))                            (1)    the logistic function
    y = x s                                          (2)    silu, also called swish

Hendrycks and Gimpel 2016 (section 2), Elfwing et al. 2018.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select
from npattn.ops.checks import Array, check_class, check_cotangent, check_dtype
from npattn.ops.edge import explain_keywords, without_cache


class SiluCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)
    s: Array  # (..., F) in the computing dtype


class SiluGrads(NamedTuple):
    """The gradient of `silu`."""

    x: Array


def logistic(x: Array) -> Array:
    """1 / (1 + exp(-x)), computed with an exp that never overflows."""
    e = np.exp(np.where(x.real >= 0, -x, x))
    return np.asarray(np.where(x.real >= 0, 1, e) / (1 + e))


@explain_keywords
@quiet
def silu_forward(x: Array) -> tuple[Array, SiluCache]:
    """x / (1 + exp(-x)), equations (1) and (2) of this page: 0 at -inf.

    x : (..., F), any rank. Returns y (..., F), and the cache. Raises TypeError.

    >>> y, cache = silu_forward(np.array([-1.0, 0.0, 1.0]))
    >>> y.round(4).tolist()
    [-0.2689, 0.0, 0.7311]
    """
    computing = check_dtype("silu", x=x)
    wide = x.astype(computing, copy=False)
    s = logistic(wide)  # (1)
    y = select(s != 0, wide * s)  # (2); -inf times 0 has the limit 0
    return y.astype(x.dtype, copy=False), SiluCache(x, s)


@quiet
def silu_backward(dy: Array, cache: SiluCache) -> SiluGrads:
    """The gradient of sum(dy * y): dx = dy s (1 + x (1 - s)), in which 1 - s is the logistic function of -x.

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    check_class("silu", "cache", cache, SiluCache, ", from silu_forward")
    x, s = cache.x.astype(cache.s.dtype, copy=False), cache.s
    dy = check_cotangent("silu", "dy", dy, x.shape, cache.x.dtype, s.dtype)
    t = logistic(-x)
    ds = select(t != 0, x * t)  # (2) through (1): x ds/dx = s x t; inf times 0 has the limit 0
    dx = dy * select(s != 0, s * (1 + ds))  # (2), (1)
    return SiluGrads(dx.astype(cache.x.dtype, copy=False))


silu = without_cache(silu_forward)

__all__ = ["SiluCache", "SiluGrads", "silu", "silu_backward", "silu_forward"]
