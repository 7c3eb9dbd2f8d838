"""Cross-entropy of logits with one target class for each position, with label smoothing and z-loss.

    m = max_c x_c                    y_c = x_c - m                                      (1)
    z = sum_c exp(y_c)               p_c = exp(y_c) / z        lse = m + log z          (2)
    q_c = (1 - s) [c = target] + s / V                                                  (3)    s: label smoothing
    loss = sum_c q_c (log z - y_c)                                                      (4)    log z - y_c = -log p_c
    loss = loss + a lse^2                                                               (5)    a: z-loss
    loss = the mean or the sum over the positions that count                            (6)

The q_c sum to 1, so that (4) has the gradient p_c - q_c. (4) takes y and not x: lse - x of logits near 1e6 would lose all
digits below 0.1. Label smoothing: Szegedy et al. 2016, section 7. z-loss: Chowdhery et al. 2022 (PaLM), section 5.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select
from npattn.ops.checks import (
    Array,
    Dims,
    check_array,
    check_class,
    check_cotangent,
    check_dtype,
    check_from_0,
    check_one_of,
)
from npattn.ops.edge import explain_keywords, without_cache


class CrossEntropyCache(NamedTuple):
    """What the backward of `cross_entropy` needs."""

    p: Array  # (..., V) softmax of the logits, in the computing dtype
    lse: Array  # (..., 1)
    targets: Array  # (...)
    counts: Array | None  # (...) the positions that count
    options: tuple[str, float, float]  # reduction, label_smoothing, z_loss
    dtype: np.dtype[Any]


class CrossEntropyGrads(NamedTuple):
    """The gradient of `cross_entropy`."""

    logits: Array  # (..., V)


def smoothed_shares(smoothing: float, V: int, computing: np.dtype[Any]) -> tuple[Any, Any]:
    """1 - s and s / V of equation (3), each rounded once."""
    s = np.longdouble(smoothing)
    return computing.type(1 - s), computing.type(s / max(V, 1))


def divisor(reduction: str, targets: Array, counts: Array | None) -> int:
    """By how many positions a sum is divided: 1 unless it is a mean."""
    return max(targets.size if counts is None else int(counts.sum()), 1) if reduction == "mean" else 1


@explain_keywords
@quiet
def cross_entropy_forward(
    logits: Array, targets: Array, *, mask: Array | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, CrossEntropyCache]:  # fmt: skip
    """The cross-entropy of logits with one target class for each position, in nats: equations (1) to (6) of this page.

    logits    : (..., V)
    targets   : (...), integers 0 .. V - 1
    mask      : (...), boolean, True = counts; other positions may hold anything (NaN, a target of -100)
    reduction : "mean" (0 if no position counts), "sum" or "none" (the loss of each position, 0 where it does not count)
    label_smoothing : s from 0 to 1, spread over all V classes; z_loss : a, at least 0
    Returns the loss in the computing dtype, shape () or (...), and the cache. Raises TypeError, ValueError.

    A class whose logit is -inf has probability 0. The loss is inf if it is the target, or with label smoothing; the gradient
    stays finite. If all logits of a position are -inf, loss and gradient are NaN.

    >>> logits, targets = np.log([[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]]), np.array([0, 2])
    >>> loss, cache = cross_entropy_forward(logits, targets, reduction="none")
    >>> np.exp(-loss).round(4).tolist()
    [0.7, 0.6]
    """
    op, computing = "cross_entropy", check_dtype("cross_entropy", logits=logits)
    dims = Dims(op)
    V = dims.fit("logits", logits, "... V").shape[-1]
    if dims.fit("targets", check_array(op, "targets", targets, "int"), "...").dtype.kind not in "iu":
        raise TypeError(f"{op}: targets has dtype {targets.dtype}, expected integers")
    if mask is not None and dims.fit("mask", check_array(op, "mask", mask, "bool"), "...").dtype != np.bool_:
        raise TypeError(f"{op}: mask has dtype {mask.dtype}, expected bool (True = counts)")
    classes = targets if mask is None else np.where(mask, targets, 0)
    if classes.size and not V:
        raise ValueError(f"{op}: logits has shape {logits.shape}, expected at least one class for a position")
    if classes.size and not (classes.min() >= 0 and classes.max() < V):
        raise ValueError(
            f"{op}: targets reaches from {classes.min()} to {classes.max()}, expected 0 to V - 1 = {V - 1}; "
            f"positions that do not count are False in mask"
        )
    check_one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    s, a = check_from_0(op, "label_smoothing", label_smoothing, most=1.0), check_from_0(op, "z_loss", z_loss)

    x = logits.astype(computing, copy=False)  # (..., V)
    m = x.real.max(-1, keepdims=True, initial=-np.inf)  # (1)  (..., 1)
    y = x - m  # (1)  (..., V)
    p = np.exp(y)
    z = p.sum(-1, keepdims=True)  # (2)  (..., 1)
    p /= z  # (2)  (..., V)
    log_z = np.log(z)
    lse = m + log_z  # (2)  (..., 1)
    of_target, of_each = smoothed_shares(s, V, computing)  # (3)
    loss = log_z - np.take_along_axis(y, classes[..., None], -1)  # (4)  (..., 1)
    if s:
        loss = (of_target * loss if of_target else 0) + of_each * (log_z - y).sum(-1, keepdims=True)  # (4); 0 inf would be NaN
    if a:
        loss = loss + a * lse * lse  # (5)
    loss = select(mask, loss[..., 0])  # (...)
    if reduction != "none":
        loss = np.asarray((loss / divisor(reduction, classes, mask)).sum())  # (6)  (), divided first: a sum may overflow
    return loss, CrossEntropyCache(p, lse, classes, mask, (reduction, s, a), logits.dtype)


@quiet
def cross_entropy_backward(dloss: Array | float | None, cache: CrossEntropyCache) -> CrossEntropyGrads:
    """The gradient of sum(dloss * loss): dlogits = dloss (p (1 + 2 a lse) - q), for the mean divided by what counts.

    dloss : as the loss, () or (...); for () also a Python float, and None means 1, for each position where there are several
    Returns the gradient of the logits, (..., V), which is 0 where a position does not count and where its dloss is 0. Raises
    TypeError, ValueError.
    """
    check_class("cross_entropy", "cache", cache, CrossEntropyCache, ", from cross_entropy_forward")
    p, lse, targets, counts, (reduction, s, a), dtype = cache
    shape = targets.shape if reduction == "none" else ()
    if dloss is None:
        dloss = np.ones(shape, p.dtype)
    elif type(dloss) in (int, float):  # a NumPy scalar has a dtype, which has to be that of the loss
        dloss = np.asarray(dloss, p.dtype)
    given = np.asarray(dloss) if isinstance(dloss, np.generic) else dloss
    dloss = check_cotangent("cross_entropy", "dloss", given, shape, p.dtype, p.dtype)
    each = np.broadcast_to(dloss / divisor(reduction, targets, counts), targets.shape)[..., None]  # (6)  (..., 1)
    of_target, of_each = smoothed_shares(s, p.shape[-1], p.dtype)  # (3)
    dlogits = (p * (1 + 2 * a * lse) if a else p) - of_each  # (5), (4), (2): d lse / d x_c = p_c  (..., V)
    at = targets[..., None]
    np.put_along_axis(dlogits, at, np.take_along_axis(dlogits, at, -1) - of_target, -1)  # (4), (1)
    dlogits *= each  # (6)
    alive = each != 0 if counts is None else (each != 0) & counts[..., None]
    return CrossEntropyGrads(select(alive, dlogits).astype(dtype, copy=False))


cross_entropy = without_cache(cross_entropy_forward)

__all__ = ["CrossEntropyCache", "CrossEntropyGrads", "cross_entropy", "cross_entropy_backward", "cross_entropy_forward"]
