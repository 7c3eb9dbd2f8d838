"""Masked softmax, log-sum-exp and cross-entropy, each with its backward.

    m = max_j s_j        e_j = exp(s_j - m)        z = sum_j e_j        p_j = e_j / z        lse = m + log z

over the last axis and the allowed j only. If none is allowed, p = 0 and lse = -inf. Subtracting m changes only the range of
exp: any m gives the same p and the same derivative of p.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select
from npattn.ops.calls import bind_mask
from npattn.ops.checks import Array, Dims, check_array, check_class, check_cotangent, check_dtype, check_one_of
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


class CrossEntropyCache(NamedTuple):
    """What the backward of `cross_entropy` needs."""

    weights: Array  # (..., V) softmax of the logits, in the computing dtype
    targets: Array  # (...)
    counts: Array | None  # (...) the positions that count
    reduction: str
    dtype: np.dtype[Any]


class CrossEntropyGrads(NamedTuple):
    """The gradient of `cross_entropy`."""

    logits: Array  # (..., V)


@explain_keywords
@quiet
def cross_entropy_forward(
    logits: Array, targets: Array, *, mask: Array | None = None, reduction: str = "mean"
) -> tuple[Array, CrossEntropyCache]:
    """The cross-entropy of logits with one target class for each position, in nats.

        loss = lse(logits) - logits[target]                                                         (1)
        reduced: the mean or the sum over the positions that count                                  (2)

    logits    : (..., V)
    targets   : (...), integers 0 .. V - 1
    mask      : (...), boolean, True = counts; other positions may hold anything (NaN, a target of -100)
    reduction : "mean" (0 if no position counts), "sum" or "none" (the loss of each position, 0 where it does not count)
    Returns the loss in the computing dtype, shape () or (...), and the cache; NaN if all logits of a position are -inf.
    Raises TypeError, ValueError.
    """
    op = "cross_entropy"
    check_one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    dims = Dims(op)
    x, _ = _scores(op, "logits", logits, None)
    dims.fit("logits", logits, "... V")
    top = x.real.max(-1, keepdims=True, initial=-np.inf)
    x = x - select(top != -np.inf, top)  # else lse - logits[target] of logits near 1e6 would lose all digits below 0.1
    if dims.fit("targets", targets, "...").dtype.kind not in "iu":
        raise TypeError(f"{op}: targets has dtype {targets.dtype}, expected integers")
    if mask is not None and dims.fit("mask", mask, "...").dtype != np.bool_:
        raise TypeError(f"{op}: mask has dtype {mask.dtype}, expected bool (True = counts)")
    classes = targets if mask is None else np.where(mask, targets, 0)
    if classes.size and not (classes.min() >= 0 and classes.max() < x.shape[-1]) and (mask is None or mask.any()):
        raise ValueError(
            f"{op}: targets reaches from {classes.min()} to {classes.max()}, expected 0 to V - 1 = {x.shape[-1] - 1}; "
            f"positions that do not count are False in mask"
        )
    weights, lse = normalize(x)
    hit = np.arange(x.shape[-1]) == classes[..., None]
    loss = select(mask, lse - select(hit, x).sum(-1))  # (1)
    cache = CrossEntropyCache(weights, classes, mask, reduction, logits.dtype)
    if reduction != "none":
        loss = loss.sum() / _divisor(cache)  # (2)
    return loss, cache


def _divisor(cache: CrossEntropyCache) -> int:
    count = cache.targets.size if cache.counts is None else int(cache.counts.sum())
    return max(count, 1) if cache.reduction == "mean" else 1


@quiet
def cross_entropy_backward(dloss: Array, cache: CrossEntropyCache) -> CrossEntropyGrads:
    """dlogits = (p - onehot(target)) dloss; for the mean, divided by the number of positions that count.

    dloss : as the loss, () or (...). Returns the gradient of the logits, (..., V). Raises TypeError, ValueError.
    """
    check_class("cross_entropy", "cache", cache, CrossEntropyCache, ", from cross_entropy_forward")
    weights = cache.weights
    shape = cache.targets.shape if cache.reduction == "none" else ()
    dloss = check_cotangent("cross_entropy", "dloss", np.asarray(dloss), shape, weights.dtype, weights.dtype)
    each = (dloss / _divisor(cache))[..., None]  # (2)
    hit = np.arange(weights.shape[-1]) == cache.targets[..., None]
    dlogits = np.where(hit, weights - 1, weights) * each  # (1)
    counts = None if cache.counts is None else cache.counts[..., None]
    return CrossEntropyGrads(select(counts, dlogits).astype(cache.dtype, copy=False))


cross_entropy = without_cache(cross_entropy_forward)


__all__ = [
    "CrossEntropyCache",
    "CrossEntropyGrads",
    "LogSumExpGrads",
    "SoftmaxCache",
    "SoftmaxGrads",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "log_sum_exp",
    "log_sum_exp_backward",
    "log_sum_exp_forward",
    "softmax",
    "softmax_backward",
    "softmax_forward",
]
