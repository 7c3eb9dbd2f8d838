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
from npattn.ops.rows import in_rows

CUBIC = 0.044715  # of (4)


def logistic(x: Array) -> Array:
    """1 / (1 + exp(-x)), computed with an exp that never overflows: exp(min(x, 0)) / (1 + exp(-|x|))."""
    if x.dtype.kind == "c":
        e = np.exp(np.where(x.real >= 0, -x, x))
        return np.asarray(np.where(x.real >= 0, 1, e) / (1 + e))
    e = np.asarray(np.abs(x))
    np.exp(np.negative(e, out=e), out=e)
    e += 1
    s = np.asarray(np.minimum(x, 0))
    return np.asarray(np.divide(np.exp(s, out=s), e, out=s))  # two exp take less time than one np.where


def logistic_slope(x: Array) -> Array:
    """s (1 - s) for the s of `logistic`, with all its digits: exp(-|x|) / (1 + exp(-|x|))^2."""
    if x.dtype.kind == "c":
        return logistic(x) * logistic(-x)
    e = np.asarray(np.abs(x))
    np.exp(np.negative(e, out=e), out=e)
    square = np.asarray(e + 1)
    square *= square
    return np.asarray(np.divide(e, square, out=e))


def times(a: Array, b: Array) -> Array:
    """a b, and 0 where one of them is 0, whatever the other is: the limit at inf, and what a dead element or unit needs."""
    y = np.asarray(a * b)
    return y if np.isfinite(y.sum()) else select((a != 0) & (b != 0), y)  # where all are finite, 0 times b is 0


class ActivationGrads(NamedTuple):
    """The gradient of any activation."""

    x: Array  # (..., F)


# --- silu -------------------------------------------------------------------------------------------------------------------


class SiluCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)
    s: Array  # (..., F) in the computing dtype


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
    y, s = in_rows(_silu, x.astype(computing, copy=False))
    return y.astype(x.dtype, copy=False), SiluCache(x, s)


def _silu(x: Array) -> tuple[Array, Array]:
    s = logistic(x)  # (1)
    return times(x, s), s  # (2)


@quiet
def silu_backward(dy: Array, cache: SiluCache) -> ActivationGrads:
    """The gradient of sum(dy * y): dx = dy (s + x ds/dx) with ds/dx = s (1 - s).

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    check_class("silu", "cache", cache, SiluCache, ", from silu_forward")
    x, s = cache.x.astype(cache.s.dtype, copy=False), cache.s
    dy = check_cotangent("silu", "dy", dy, x.shape, cache.x.dtype, s.dtype)
    dx = in_rows(lambda x, s, dy: times(s + times(x, logistic_slope(x)), dy), x, s, dy)  # (2), (1)
    return ActivationGrads(dx.astype(cache.x.dtype, copy=False))


silu = without_cache(silu_forward)


# --- sigmoid ----------------------------------------------------------------------------------------------------------------


class SigmoidCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)
    s: Array  # (..., F) in the computing dtype


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
def sigmoid_backward(dy: Array, cache: SigmoidCache) -> ActivationGrads:
    """The gradient of sum(dy * y): dx = dy s (1 - s).

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    check_class("sigmoid", "cache", cache, SigmoidCache, ", from sigmoid_forward")
    x, s = cache.x.astype(cache.s.dtype, copy=False), cache.s
    dy = check_cotangent("sigmoid", "dy", dy, x.shape, cache.x.dtype, s.dtype)
    dx = times(logistic_slope(x), dy)  # (1)
    return ActivationGrads(dx.astype(cache.x.dtype, copy=False))


sigmoid = without_cache(sigmoid_forward)


# --- gelu -------------------------------------------------------------------------------------------------------------------


class GeluCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)
    s: Array  # (..., F) in the computing dtype
    approximate: str


@explain_keywords
@quiet
def gelu_forward(x: Array, *, approximate: str = "none") -> tuple[Array, GeluCache]:
    """x Phi(x), equations (3) and (5) of this page, or (4) and (5): 0 at -inf.

    x           : (..., F), any rank
    approximate : "none" for (3), "tanh" for (4), as in torch. jax.nn.gelu has (4) by default; GPT-2 has (4), BERT (3)
    Returns y (..., F), and the cache. The relative error is a few eps (1 + x^2 / 2) where x < 0: down to underflow, y has the
    digits that x, rounded, leaves it (`npattn.ops.error_function`). Raises TypeError, ValueError.

    >>> y, cache = gelu_forward(np.array([-1.0, 0.0, 1.0]))
    >>> y.round(4).tolist()
    [-0.1587, 0.0, 0.8413]
    """
    check_one_of("gelu", "approximate", approximate, ("none", "tanh"))
    computing = check_dtype("gelu", x=x)
    y, s = in_rows(_gelu if approximate == "none" else _gelu_tanh, x.astype(computing, copy=False))
    return y.astype(x.dtype, copy=False), GeluCache(x, s, approximate)


def _gelu(x: Array) -> tuple[Array, Array]:
    s = normal(x)  # (3)
    return times(x, s), s  # (5)


def _gelu_tanh(x: Array) -> tuple[Array, Array]:
    s = logistic(_twice_u(x))  # (4)
    return times(x, s), s  # (5)


@quiet
def gelu_backward(dy: Array, cache: GeluCache) -> ActivationGrads:
    """The gradient of sum(dy * y): dx = dy (s + x ds/dx).

    ds/dx is exp(-x^2 / 2) / sqrt(2 pi), the density, by (3), and s (1 - s) d(2 u)/dx by (4).

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    check_class("gelu", "cache", cache, GeluCache, ", from gelu_forward")
    x, s = cache.x.astype(cache.s.dtype, copy=False), cache.s
    dy = check_cotangent("gelu", "dy", dy, x.shape, cache.x.dtype, s.dtype)
    dx = in_rows(_gelu_backward if cache.approximate == "none" else _gelu_tanh_backward, x, s, dy)
    return ActivationGrads(dx.astype(cache.x.dtype, copy=False))


def _gelu_backward(x: Array, s: Array, dy: Array) -> Array:
    density = np.asarray(x * x)
    density *= -0.5
    np.exp(density, out=density)
    density *= (2 * pi_of(x.dtype)) ** -0.5
    return times(s + times(x, density), dy)  # (5), (3)


def _gelu_tanh_backward(x: Array, s: Array, dy: Array) -> Array:
    slope = np.asarray(x * x)
    slope *= CUBIC
    slope *= 3  # not 3 * CUBIC, which is rounded to float64
    slope += 1
    slope *= x
    slope *= (8 / pi_of(x.dtype)) ** 0.5  # x d(2 u)/dx
    return times(s + times(slope, logistic_slope(_twice_u(x))), dy)  # (5), (4)


def _twice_u(x: Array) -> Array:
    """2 u of (4)."""
    u = np.asarray(x * x)
    u *= CUBIC
    u += 1
    u *= x
    u *= (8 / pi_of(x.dtype)) ** 0.5
    return u


gelu = without_cache(gelu_forward)


# --- relu -------------------------------------------------------------------------------------------------------------------


class ReluCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)


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
def relu_backward(dy: Array, cache: ReluCache) -> ActivationGrads:
    """The gradient of sum(dy * y): dx = dy where x > 0, elsewhere 0. That it is 0 at 0 is a convention, torch's and jax's too.

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    check_class("relu", "cache", cache, ReluCache, ", from relu_forward")
    x = cache.x
    dy = check_cotangent("relu", "dy", dy, x.shape, x.dtype, x.dtype)
    dx = select(np.asarray(x.real > 0), dy)
    if not np.isfinite(x.sum()):
        dx = np.asarray(dx + select(np.isnan(x) & (dy != 0), x))  # a NaN is passed on
    return ActivationGrads(dx.astype(x.dtype, copy=False))  # (6)


def _positive(x: Array) -> Array:
    """max(x, 0), of complex x by the real part."""
    return np.asarray(np.where(x.real <= 0, x.dtype.type(0), x) if x.dtype.kind == "c" else np.maximum(x, x.dtype.type(0)))


relu = without_cache(relu_forward)


# --- squared relu -----------------------------------------------------------------------------------------------------------


class SquaredReluCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., F)


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
    return np.asarray(r * r).astype(x.dtype, copy=False), SquaredReluCache(x)  # (7)


@quiet
def squared_relu_backward(dy: Array, cache: SquaredReluCache) -> ActivationGrads:
    """The gradient of sum(dy * y): dx = 2 max(x, 0) dy.

    dy : (..., F), as y. Raises TypeError, ValueError.
    """
    op = "squared_relu"
    check_class(op, "cache", cache, SquaredReluCache, ", from squared_relu_forward")
    computing = check_dtype(op, x=cache.x)
    x = cache.x.astype(computing, copy=False)
    dy = check_cotangent(op, "dy", dy, x.shape, cache.x.dtype, computing)
    dx = np.asarray(2 * times(_positive(x), dy))  # (7); 2 x may overflow where 2 x dy does not
    return ActivationGrads(dx.astype(cache.x.dtype, copy=False))


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

ELSEWHERE = {
    "swish": "silu", "relu2": "squared_relu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
}  # fmt: skip
"""What transformers calls an activation that has another name here."""

__all__ = [
    "ACTIVATIONS",
    "ActivationGrads",
    "GeluCache",
    "ReluCache",
    "SigmoidCache",
    "SiluCache",
    "SquaredReluCache",
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
