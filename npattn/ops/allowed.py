"""Pairs that are not allowed are selected away, never multiplied by 0, because 0 * NaN = NaN. Sums over allowed pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npattn.ops.checks import Array

# inf and NaN may lie in places that are not allowed, and a row without keys has log 0: the caller needs no warning of these.
quiet = np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore")


BITS = {2: np.int16, 4: np.int32, 8: np.int64}  # integers of the size of a dtype


def select(allowed: Array | None, x: Array, other: float = 0.0) -> Array:
    """x where allowed, elsewhere ``other``: never a product with 0, because 0 * NaN = NaN. None allows all.

    It works on the bits: np.where branches on each element, and takes 5 to 15 times as long where the branches are random.
    """
    if allowed is None:
        return x
    bits = BITS.get(x.dtype.itemsize)
    if bits is None:  # longdouble, complex128
        return np.where(allowed, x, x.dtype.type(other))
    keep = np.asarray(np.negative(allowed, dtype=bits, casting="unsafe"))  # -1, which is all bits, or 0
    chosen = np.bitwise_and(x.view(bits), keep)
    if other:
        np.invert(keep, out=keep)
        keep &= np.asarray(other, x.dtype).view(bits)
        chosen = chosen | keep
    return np.asarray(chosen).view(x.dtype)


def product(w: Array, x: Array, allowed: Array | None) -> Array:
    """out_i = sum over the allowed j of w_ij x_j: the matrix product w @ x for weights w that are 0 elsewhere.

    If x is finite, it is that product. Otherwise the x_j that are not finite are added one by one, only where they are allowed.
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
    """x^T dy summed over all tokens, (..., M) and (..., N) -> (M, N). Tokens with x = 0 or dy = 0 add nothing, not even NaN.

    A token that no query sees has dy = 0 exactly, and a query without keys has x = 0; the other factor may be NaN. This is
    decided for each head: it owns an equal part of the rows (axis 0) or columns (axis 1) of the result.
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
