"""Products of tiles, for all heads that are computed together, and the buffers of a thread for their results.

A tile of x belongs to query heads, (..., H, n, m), and a tile of y to the groups that they read, (..., G, m, o). The heads of
a group are stacked as further rows (`by_group`): one product with more rows is faster than many with few.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npattn.ops.allowed import select, swap
from npattn.ops.checks import Array
from npattn.ops.exponentials import has_avx512

FEW_ROWS, FEW_FEATURES = 16, 32  # rows of x, and columns of x or y: a product with fewer of them takes as long as with these
PIECE = 1 << 16  # multiplications: for so few OpenBLAS has kernels for AVX-512 that read y where it is; others copy all of it
# Multiplications: OpenBLAS sums products of fewer in one long chain, others in blocks. Of 2,080 rows of 8 heads the error of
# such a chain is 6 times that of each head by itself, so these are summed head by head.
UNBLOCKED = 1_000_000


class Buffers:
    """The arrays in which one thread computes, by name. Each is allocated once, and again when it is too small."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype, self.flat, self.one = dtype, dict[str, Array](), np.empty(0, dtype)
        self.kept_masks: dict[Any, tuple[Array, Array, Array]] = {}  # see `npattn.ops.tiles.Plan.pairs_of`

    def take(self, name: str, *shape: int) -> Array:
        flat, size = self.flat.get(name), math.prod(shape)
        if flat is None or flat.size < size:
            flat = self.flat[name] = np.empty(size, self.dtype)
        return flat[:size].reshape(shape)

    def ones(self, n: int) -> Array:
        if self.one.size < n:
            self.one = np.ones(n, self.dtype)
        return self.one[:n]


def with_contiguous_rows(x: Array) -> Array:
    """x, or a contiguous copy if BLAS cannot read its rows: else NumPy would copy x for each product, or not use BLAS."""
    row, one = x.strides[-2:]
    fits = x.flags.aligned and one == x.itemsize and row % one == 0 and row >= x.shape[-1] * one
    return x if fits else np.ascontiguousarray(x)


def by_group(x: Array, like: Array) -> Array:
    """(..., H, n, m) as (..., G, H / G n, m)."""
    if x.ndim < 3 or x.shape[-3] in (1, like.shape[-3]):
        return x  # size 1: the same for all heads
    H, n, m = x.shape[-3:]
    G = like.shape[-3]
    return x.reshape(*x.shape[:-3], G, H // max(G, 1) * n, m)


def times(x: Array, y: Array, out: Array) -> Array:
    """x @ y for x of each head, (..., H, n, m), and y of each group, (..., G, m, o)."""
    np.matmul(by_group(x, y), y, out=by_group(out, y))
    return out


def dots(x: Array, y: Array, out: Array) -> Array:
    """x @ y^T, for y (..., G, o, m)."""
    x, result = by_group(x, y), by_group(out, y)
    few, n = x.shape[-2], y.shape[-2]
    if not 1 < few <= FEW_ROWS < n:
        np.matmul(x, swap(y), out=result)
    elif has_avx512() and x.dtype in (np.float32, np.float64):
        wide = min(max(PIECE // max(few * x.shape[-1], 1), 1), n)
        count, whole = n // wide, n // wide * wide
        pieces = y[..., :whole, :].reshape(*y.shape[:-2], count, wide, y.shape[-1])
        of_pieces = result[..., :whole].reshape(*result.shape[:-1], count, wide).swapaxes(-3, -2)
        np.matmul(x[..., None, :, :], swap(pieces), out=of_pieces)
        np.matmul(x, swap(y[..., whole:, :]), out=result[..., whole:])
    else:
        result[...] = swap(np.matmul(y, swap(x)))  # else BLAS would copy all of y to transpose it
    return out


def sum_rows(x: Array, y: Array, out: Array) -> Array:
    """x^T @ y summed over the heads of each group: (..., H, n, m) and (..., H, n, o) to (..., G, m, o)."""
    x_group, y_group = by_group(x, out), by_group(y, out)
    if x_group is x or math.prod(x_group.shape[-2:]) * out.shape[-1] > UNBLOCKED:
        return np.matmul(swap(x_group), y_group, out=out)
    of_heads = np.matmul(swap(x), y)
    np.sum(of_heads.reshape(*out.shape[:-2], x.shape[-3] // out.shape[-3], *out.shape[-2:]), axis=-3, out=out)
    return out


def zero_other_rows(some: Array | None, x: Array) -> Array:
    """x with 0 in the rows that are not in ``some`` (None: all). These rows are not seen, or see no key, and may be NaN."""
    return x if some is None or some.all() else select(some[..., None], x)


def finite_or_not(x: Array) -> Array | None:
    """Which rows of x are finite; None if all are."""
    finite = np.isfinite(x)
    return None if finite.all() else np.asarray(finite.all(-1))


def finite_maximum(m: Array) -> Array:
    """The maximum m, and 0 in rows without a score, in which m is -inf."""
    return select(np.asarray(m != -np.inf), m)


def with_ones(x: Array, buffers: Buffers) -> Array:
    """[x, 1], with 0 for rows of x that are not finite, which no query sees."""
    result = buffers.take("v and 1", *x.shape[:-1], x.shape[-1] + 1)
    result[..., :-1], result[..., -1] = zero_other_rows(finite_or_not(x), x), 1
    return result
