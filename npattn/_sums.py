"""Sums over allowed pairs, where 0 * NaN = NaN must not matter, and over heads that read the same keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npattn._checks import Array, Shape

# Inf and NaN may lie in places that are not allowed, and a row without keys has log 0: that is not the caller's error.
quiet = np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore")


def select(allowed: Array | None, x: Array, other: float = 0.0) -> Array:
    """x where allowed, elsewhere ``other``: never a product with 0, because 0 * NaN = NaN. None allows all."""
    return x if allowed is None else np.where(allowed, x, x.dtype.type(other))


def product(w: Array, x: Array, allowed: Array | None) -> Array:
    """out_i = sum over the allowed j of w_ij x_j: the matrix product w @ x for weights w that are 0 elsewhere.

    Where x is finite that is all; otherwise the x_j that are not finite are added one by one where they are allowed.
    """
    finite: Any = np.isfinite(x).all(-1, keepdims=True)
    if allowed is None or finite.all():
        return w @ x
    allowed, bad = np.broadcast_to(allowed, w.shape), np.asarray(~finite)
    out: Array = w @ np.where(bad, x.dtype.type(0), x)
    for j in np.flatnonzero(bad.any(tuple(range(bad.ndim - 2)))):
        one = slice(j, j + 1)
        out += select(allowed[..., :, one] & bad[..., one, :], w[..., :, one] * x[..., one, :])
    return out


def swap(x: Array) -> Array:
    """The transpose of the last two axes, as a view."""
    result: Array = x.swapaxes(-1, -2)
    return result


def weight_gradient(x: Array, dy: Array, heads: int = 1, axis: int = 1) -> Array:
    """x^T dy summed over all tokens, (..., M) and (..., N) -> (M, N), where tokens of zeros count as nothing.

    A token that nobody sees has dy = 0 exactly, and a query without keys x = 0: what stands beside it may be NaN. Heads see
    for themselves: they own equal parts of the rows (axis 0) or columns (axis 1) of the result.
    """
    tokens = math.prod(x.shape[:-1])
    a, b = x.astype(dy.dtype, copy=False).reshape(tokens, x.shape[-1]), dy.reshape(tokens, dy.shape[-1])
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        if heads > 1:
            parts = [(a, part) for part in np.split(b, heads, 1)] if axis else [(part, b) for part in np.split(a, heads, 1)]
            return np.concatenate([weight_gradient(*part) for part in parts], axis)
        counts: Any = a.any(-1, keepdims=True) & b.any(-1, keepdims=True)
        a, b = select(counts, a), select(counts, b)
    result: Array = np.matmul(swap(a), b)
    return result


# --- heads ----------------------------------------------------------------------------------------------------------------


def each_head(x: Array, heads: int, computing: np.dtype[Any]) -> Array:
    """(..., G, S, D) -> (..., H, S, D): head h reads group h // (H // G)."""
    x = x.astype(computing, copy=False)
    return x if x.ndim == 2 or x.shape[-3] == heads else np.repeat(x, heads // x.shape[-3], axis=-3)


def group_sum(dx: Array, like: Array) -> Array:
    """(..., H, S, D) -> (..., G, S, D): every head that read a group gives to its gradient."""
    if dx.shape != like.shape:
        dx = dx.reshape(*like.shape[:-2], dx.shape[-3] // like.shape[-3], *like.shape[-2:]).sum(-3)
    return dx.astype(like.dtype, copy=False)


def heads_first(x: Array, shape: Shape) -> Array:
    """One number a head, (H,), beside scores (..., H, L, S); H = 1 where the scores have rank 2."""
    return x.reshape((*shape[-3:-2], 1, 1))


def head_sum(x: Array, heads: int) -> Array:
    """(..., H, L, S) or (L, S) -> (H,), summed over everything else."""
    total: Array = x.sum(tuple(a for a in range(x.ndim) if a != x.ndim - 3))
    return total.reshape(heads)
