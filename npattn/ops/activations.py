"""Activations: elementwise functions, each with its backward.

    s = 1 / (1 + exp(-x))                            (1)    the logistic function
    y = s                                            (1)    sigmoid
    y = x s                                          (2)    silu, also called swish

    s = Phi(x) = (1 + erf(x / sqrt 2)) / 2           (3)    the normal distribution; or its approximation
    s = (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)),      (4)    u = sqrt(2 / pi) (x + 0.044715 x^3)
    y = x s                                          (5)    gelu

    y = max(x, 0)                                    (6)    relu
    y = max(x, 0)^2                                  (7)    squared relu

silu: Hendrycks and Gimpel 2016 (section 2), Elfwing et al. 2018. gelu, both forms: Hendrycks and Gimpel 2016. relu: Nair and
Hinton 2010. Squared relu: So et al. 2021 (Primer).

An element whose dy is 0 has dx 0, even where x or the slope is NaN or inf.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from npattn.ops.allowed import quiet, select
from npattn.ops.checks import Array, check_class, check_cotangent, check_dtype, check_one_of
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.error_function import normal, pi_of

CUBIC = 0.044715  # of (4)


def logistic(x: Array) -> Array:
    """1 / (1 + exp(-x)), computed with an exp that never overflows."""
    e = np.exp(np.where(x.real >= 0, -x, x))
    return np.asarray(np.where(x.real >= 0, 1, e) / (1 + e))


def times(a: Array, b: Array) -> Array:
    """a b, and 0 where one of them is 0, whatever the other is: the limit at inf, and what a dead element or unit needs."""
    return select((a != 0) & (b != 0), a * b)


# --- silu -------------------------------------------------------------------------------------------------------------------


class SiluCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)
    s: Array  # (..., F) in the computing dtype


class SiluGrads(NamedTuple):
    """The gradient of `silu`."""

    x: Array


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
    y = times(wide, s)  # (2)
    return y.astype(x.dtype, copy=False), SiluCache(x, s)


@quiet
def silu_backward(dy: Array, cache: SiluCache) -> SiluGrads:
    """The gradient of sum(dy * y): dx = dy s (1 + x (1 - s)), in which 1 - s is the logistic function of -x.

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    check_class("silu", "cache", cache, SiluCache, ", from silu_forward")
    x, s = cache.x.astype(cache.s.dtype, copy=False), cache.s
    dy = check_cotangent("silu", "dy", dy, x.shape, cache.x.dtype, s.dtype)
    ds = times(x, logistic(-x))  # (1): x ds/dx = s (x (1 - s))
    dx = times(times(1 + ds, s), dy)  # (2), (1)
    return SiluGrads(dx.astype(cache.x.dtype, copy=False))


silu = without_cache(silu_forward)


# --- sigmoid ----------------------------------------------------------------------------------------------------------------


class SigmoidCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)
    s: Array  # (..., F) in the computing dtype


class SigmoidGrads(NamedTuple):
    """The gradient of `sigmoid`."""

    x: Array


@explain_keywords
@quiet
def sigmoid_forward(x: Array) -> tuple[Array, SigmoidCache]:
    """The logistic function 1 / (1 + exp(-x)), equation (1) of this page.

    x : (..., F), any rank. Returns y (..., F), and the cache. Raises TypeError.

    >>> y, cache = sigmoid_forward(np.array([-1.0, 0.0, 1.0]))
    >>> y.round(4).tolist()
    [0.2689, 0.5, 0.7311]
    """
    computing = check_dtype("sigmoid", x=x)
    s = logistic(x.astype(computing, copy=False))  # (1)
    return s.astype(x.dtype, copy=False), SigmoidCache(x, s)


@quiet
def sigmoid_backward(dy: Array, cache: SigmoidCache) -> SigmoidGrads:
    """The gradient of sum(dy * y): dx = dy s (1 - s), in which 1 - s is the logistic function of -x.

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    check_class("sigmoid", "cache", cache, SigmoidCache, ", from sigmoid_forward")
    x, s = cache.x.astype(cache.s.dtype, copy=False), cache.s
    dy = check_cotangent("sigmoid", "dy", dy, x.shape, cache.x.dtype, s.dtype)
    dx = times(s * logistic(-x), dy)  # (1)
    return SigmoidGrads(dx.astype(cache.x.dtype, copy=False))


sigmoid = without_cache(sigmoid_forward)


# --- gelu -------------------------------------------------------------------------------------------------------------------


class GeluCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)
    s: Array  # (..., F) in the computing dtype
    approximate: str


class GeluGrads(NamedTuple):
    """The gradient of `gelu`."""

    x: Array


@explain_keywords
@quiet
def gelu_forward(x: Array, *, approximate: str = "none") -> tuple[Array, GeluCache]:
    """x Phi(x), equations (3) and (5) of this page, or (4) and (5): 0 at -inf.

    x           : (..., F), any rank
    approximate : "none" for (3), "tanh" for (4), as in torch. jax.nn.gelu has (4) by default; GPT-2 has (4), BERT (3)
    Returns y (..., F), which is exact to a few eps where x is far below 0, too, and the cache. Raises TypeError, ValueError.

    >>> y, cache = gelu_forward(np.array([-1.0, 0.0, 1.0]))
    >>> y.round(4).tolist()
    [-0.1587, 0.0, 0.8413]
    """
    check_one_of("gelu", "approximate", approximate, ("none", "tanh"))
    computing = check_dtype("gelu", x=x)
    wide = x.astype(computing, copy=False)
    s = normal(wide) if approximate == "none" else logistic(_twice_u(wide))  # (3), (4)
    y = times(wide, s)  # (5)
    return y.astype(x.dtype, copy=False), GeluCache(x, s, approximate)


@quiet
def gelu_backward(dy: Array, cache: GeluCache) -> GeluGrads:
    """The gradient of sum(dy * y): dx = dy (s + x ds/dx).

    ds/dx is exp(-x^2 / 2) / sqrt(2 pi), the density, by (3), and s (1 - s) d(2 u)/dx by (4).

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    check_class("gelu", "cache", cache, GeluCache, ", from gelu_forward")
    x, s = cache.x.astype(cache.s.dtype, copy=False), cache.s
    dy = check_cotangent("gelu", "dy", dy, x.shape, cache.x.dtype, s.dtype)
    if cache.approximate == "none":
        ds = times(x, np.exp(x * x * -0.5) * (2 * pi_of(x.dtype)) ** -0.5)  # (3)
    else:
        slope = (1 + 3 * (CUBIC * x * x)) * (8 / pi_of(x.dtype)) ** 0.5
        ds = times(x * slope, s * logistic(-_twice_u(x)))  # (4): x ds/dx = x d(2 u)/dx s (1 - s)
    dx = times(s + ds, dy)  # (5), (3) or (4)
    return GeluGrads(dx.astype(cache.x.dtype, copy=False))


def _twice_u(x: Array) -> Array:
    """2 u of (4)."""
    return np.asarray(x * (1 + CUBIC * x * x) * (8 / pi_of(x.dtype)) ** 0.5)


gelu = without_cache(gelu_forward)


# --- relu -------------------------------------------------------------------------------------------------------------------


class ReluCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)


class ReluGrads(NamedTuple):
    """The gradient of `relu`."""

    x: Array


@explain_keywords
@quiet
def relu_forward(x: Array) -> tuple[Array, ReluCache]:
    """max(x, 0), equation (6) of this page: NaN of NaN.

    x : (..., F), any rank. Returns y (..., F), and the cache. Raises TypeError.

    >>> y, cache = relu_forward(np.array([-1.0, 0.0, 2.0]))
    >>> y.tolist()
    [0.0, 0.0, 2.0]
    """
    check_dtype("relu", x=x)
    return _positive(x), ReluCache(x)  # (6)


@quiet
def relu_backward(dy: Array, cache: ReluCache) -> ReluGrads:
    """The gradient of sum(dy * y): dx = dy where x > 0, elsewhere 0. That it is 0 at 0 is a convention, torch's and jax's too.

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    check_class("relu", "cache", cache, ReluCache, ", from relu_forward")
    x = cache.x
    dy = check_cotangent("relu", "dy", dy, x.shape, x.dtype, x.dtype)
    slope = np.where(x.real > 0, x.dtype.type(1), 0 * _positive(x))  # (6); 0 * NaN is NaN
    return ReluGrads(times(slope, dy).astype(x.dtype, copy=False))


def _positive(x: Array) -> Array:
    """max(x, 0), of complex x by the real part."""
    return np.asarray(np.where(x.real <= 0, x.dtype.type(0), x))


relu = without_cache(relu_forward)


# --- squared relu -----------------------------------------------------------------------------------------------------------


class SquaredReluCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)


class SquaredReluGrads(NamedTuple):
    """The gradient of `squared_relu`."""

    x: Array


@explain_keywords
@quiet
def squared_relu_forward(x: Array) -> tuple[Array, SquaredReluCache]:
    """max(x, 0)^2, equation (7) of this page: NaN of NaN.

    x : (..., F), any rank. Returns y (..., F), and the cache. Raises TypeError.

    >>> y, cache = squared_relu_forward(np.array([-1.0, 0.0, 3.0]))
    >>> y.tolist()
    [0.0, 0.0, 9.0]
    """
    computing = check_dtype("squared_relu", x=x)
    r = _positive(x.astype(computing, copy=False))
    return (r * r).astype(x.dtype, copy=False), SquaredReluCache(x)  # (7)


@quiet
def squared_relu_backward(dy: Array, cache: SquaredReluCache) -> SquaredReluGrads:
    """The gradient of sum(dy * y): dx = 2 max(x, 0) dy.

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    op = "squared_relu"
    check_class(op, "cache", cache, SquaredReluCache, ", from squared_relu_forward")
    computing = check_dtype(op, x=cache.x)
    x = cache.x.astype(computing, copy=False)
    dy = check_cotangent(op, "dy", dy, x.shape, cache.x.dtype, computing)
    dx = 2 * times(_positive(x), dy)  # (7); 2 x may overflow where 2 x dy does not
    return SquaredReluGrads(dx.astype(cache.x.dtype, copy=False))


squared_relu = without_cache(squared_relu_forward)


# --- by name ----------------------------------------------------------------------------------------------------------------

Activation: TypeAlias = tuple[Callable[[Array], tuple[Array, Any]], Callable[[Array, Any], Any]]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": (gelu_forward, gelu_backward),
    "gelu_tanh": (partial(gelu_forward, approximate="tanh"), gelu_backward),
    "relu": (relu_forward, relu_backward),
    "squared_relu": (squared_relu_forward, squared_relu_backward),
    "silu": (silu_forward, silu_backward),
    "sigmoid": (sigmoid_forward, sigmoid_backward),
}
"""The forward and backward of each activation, for layers that have one: they take x alone, and dy and the cache."""

__all__ = [
    "ACTIVATIONS",
    "GeluCache",
    "GeluGrads",
    "ReluCache",
    "ReluGrads",
    "SigmoidCache",
    "SigmoidGrads",
    "SiluCache",
    "SiluGrads",
    "SquaredReluCache",
    "SquaredReluGrads",
    "gelu",
    "gelu_backward",
    "gelu_forward",
    "relu",
    "relu_backward",
    "relu_forward",
    "sigmoid",
    "sigmoid_backward",
    "sigmoid_forward",
    "silu",
    "silu_backward",
    "silu_forward",
    "squared_relu",
    "squared_relu_backward",
    "squared_relu_forward",
]
