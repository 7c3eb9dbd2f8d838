"""Masked softmax and log-sum-exp, each with its backward.

    m = max_j s_j        e_j = exp(s_j - m)        z = sum_j e_j        p_j = e_j / z        lse = m + log z

over the last axis and the allowed j only. If none is allowed, p = 0 and lse = -inf. Subtracting m changes only the range of
exp: any m gives the same p and the same derivative of p.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select
from npattn.ops.calls import bind_mask
from npattn.ops.checks import Array, check_array, check_class, check_cotangent, check_dtype
from npattn.ops.edge import explain_keywords, without_cache


def normalize(scores: Array, allowed: Array | None = None, sink: Array | None = None) -> tuple[Array, Array]:
    """Weights and lse of scores that are -inf where not allowed. sink : one more logit in each row; its weight is left out"""
    top = scores.real.max(-1, keepdims=True, initial=-np.inf)
    some = top != -np.inf
    if sink is not None:
        top = np.maximum(top, sink.real)
    top = select(top != -np.inf, top)  # a row without any logit: exp(-inf - 0) = 0
    e = np.subtract(scores, top)
    np.exp(e, out=e)
    z = e.sum(-1, keepdims=True)
    if sink is not None:
        z = z + np.exp(sink - top)
    e /= select(z != 0, z, 1.0)
    lse = top + np.log(z)
    if sink is not None:
        lse = np.where(some, lse, sink)  # exactly the sink; log would move a complex one to |Im| <= pi
    return select(allowed, e), lse[..., 0]


def normalize_backward(weights: Array, dweights: Array, dlse: Any = None) -> tuple[Array, Array]:
    """The gradient of the scores, and the mean of dweights under the weights, often called Delta. dlse : (..., 1)

        ds_j = p_j (dp_j - sum_l p_l dp_l + dlse)

    The mean comes from p p^T in the Jacobian diag(p) - p p^T; d lse / d s_j = p_j. docs/attention-backward.md derives it.
    """
    dscores = weights * dweights
    mean = dscores.sum(-1, keepdims=True)
    np.subtract(dweights, mean, out=dscores)
    if dlse is not None:
        dscores += dlse
    return np.multiply(weights, dscores, out=dscores), mean


def _scores(op: str, name: str, scores: object, mask: object) -> tuple[Array, Array | None]:
    """The scores in their computing dtype, -inf where not allowed, and what is allowed."""
    computing = check_dtype(op, **{name: scores})
    x = check_array(op, name, scores).astype(computing, copy=False)
    if x.ndim == 0:
        raise ValueError(f"{op}: {name} has shape (), expected (..., S)")
    if x.ndim == 1 and mask is not None and not isinstance(mask, np.ndarray):
        raise ValueError(f"{op}: {name} has shape {x.shape}, expected (..., L, S): a mask over positions has two axes")
    bound = bind_mask(op, mask, x.shape)
    allowed = None if bound is None else bound.dense()
    if (masked := x.real == -np.inf).any():  # a score of -inf masks exactly like a mask
        allowed = ~masked if allowed is None else allowed & ~masked
    return select(allowed, x, -np.inf), allowed


class SoftmaxCache(NamedTuple):
    """What the backward of `softmax` and of `log_sum_exp` needs."""

    weights: Array  # (..., S), in the computing dtype
    allowed: Array | None  # (..., S)
    dtype: np.dtype[Any]


class SoftmaxGrads(NamedTuple):
    """The gradient of `softmax`."""

    scores: Array  # (..., S)


@explain_keywords
@quiet
def softmax_forward(scores: Array, *, mask: Any = None) -> tuple[Array, SoftmaxCache]:
    """Softmax over the last axis.

        p_j = exp(s_j - m) / sum_l exp(s_l - m)                                                     (1)

    scores : (..., S); mask : boolean array of that rank (axes may be 1), or rank 2, or a mask of npattn.masks; True = counts.
    Returns p (..., S), which is 0 where the mask is False, even in a whole row, and the cache. Raises TypeError, ValueError.
    """
    x, allowed = _scores("softmax", "scores", scores, mask)
    weights, _ = normalize(x, allowed)  # (1)
    return weights.astype(scores.dtype, copy=False), SoftmaxCache(weights, allowed, scores.dtype)


@quiet
def softmax_backward(dweights: Array, cache: SoftmaxCache) -> SoftmaxGrads:
    """ds_j = p_j (dp_j - sum_l p_l dp_l): p times dp minus its mean under p, see `normalize_backward`.

    dweights : (..., S), as the weights. Returns the gradient of the scores, (..., S). Raises TypeError, ValueError.
    """
    check_class("softmax", "cache", cache, SoftmaxCache, ", from softmax_forward")
    dp = check_cotangent("softmax", "dweights", dweights, cache.weights.shape, cache.dtype, cache.weights.dtype)
    dscores, _ = normalize_backward(cache.weights, select(cache.allowed, dp))
    return SoftmaxGrads(select(cache.allowed, dscores).astype(cache.dtype, copy=False))  # (1)


softmax = without_cache(softmax_forward)


class LogSumExpGrads(NamedTuple):
    """The gradient of `log_sum_exp`."""

    scores: Array  # (..., S)


@explain_keywords
@quiet
def log_sum_exp_forward(scores: Array, *, mask: Any = None) -> tuple[Array, SoftmaxCache]:
    """Log-sum-exp over the last axis.

        lse = m + log sum_j exp(s_j - m)                                                            (1)

    Arguments as in `softmax_forward`. Returns lse (...), in the computing dtype, -inf where no score is allowed, and the cache.
    Raises TypeError, ValueError.
    """
    x, allowed = _scores("log_sum_exp", "scores", scores, mask)
    weights, lse = normalize(x, allowed)  # (1)
    return lse, SoftmaxCache(weights, allowed, scores.dtype)


@quiet
def log_sum_exp_backward(dlse: Array, cache: SoftmaxCache) -> LogSumExpGrads:
    """ds_j = p_j dlse: the derivative of lse is the softmax. dlse is ignored in rows without an allowed score.

    dlse : (...), as lse. Returns the gradient of the scores, (..., S). Raises TypeError, ValueError.
    """
    check_class("log_sum_exp", "cache", cache, SoftmaxCache, ", from log_sum_exp_forward")
    weights = cache.weights
    dlse = check_cotangent("log_sum_exp", "dlse", dlse, weights.shape[:-1], weights.dtype, weights.dtype)
    some = None if cache.allowed is None else np.asarray(cache.allowed.any(-1, keepdims=True))
    dscores = select(cache.allowed, weights * select(some, dlse[..., None]))  # (1)
    return LogSumExpGrads(dscores.astype(cache.dtype, copy=False))


log_sum_exp = without_cache(log_sum_exp_forward)


__all__ = [
    "LogSumExpGrads",
    "SoftmaxCache",
    "SoftmaxGrads",
    "log_sum_exp",
    "log_sum_exp_backward",
    "log_sum_exp_forward",
    "softmax",
    "softmax_backward",
    "softmax_forward",
]
