"""Masks that are bound to the shape of the scores: which pairs of a tile are allowed, and the states of whole tiles.

`npattn.ops.masks` makes them: for each kind of mask there is a class here. Where possible, a mask has one number for each query
and each key. A tile is computed from these, and its state from the least and the largest of them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npattn.ops.checks import Array, Shape
from npattn.ops.pairs import ALL, EMPTY, FULL, PARTIAL, Bound, Index

NEAR = 1 << 29  # numbers below this have differences that fit into int32


@dataclass(eq=False)
class BothBound(Bound):
    a: Bound
    b: Bound
    shape: Shape

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        return self.a.tile(index, rows, cols) & self.b.tile(index, rows, cols)

    def states(self, index: Index, rows: Sequence[slice], cols: Sequence[slice]) -> Array:
        return np.minimum(self.a.states(index, rows, cols), self.b.states(index, rows, cols))

    def cuts(self) -> tuple[Array, Array]:
        (q, k), (r, s) = self.a.cuts(), self.b.cuts()
        return np.union1d(q, r), np.union1d(k, s)

    def varies(self, axis: int) -> bool:
        return self.a.varies(axis) or self.b.varies(axis)

    def tile_key(self, index: Index, rows: slice, cols: slice) -> Any:
        return self.a.tile_key(index, rows, cols), self.b.tile_key(index, rows, cols)


@dataclass(eq=False)
class InverseBound(Bound):
    a: Bound

    def __post_init__(self) -> None:
        self.shape = self.a.shape

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        return ~self.a.tile(index, rows, cols)

    def states(self, index: Index, rows: Sequence[slice], cols: Sequence[slice]) -> Array:
        return FULL - self.a.states(index, rows, cols)

    def cuts(self) -> tuple[Array, Array]:
        return self.a.cuts()

    def varies(self, axis: int) -> bool:
        return self.a.varies(axis)

    def tile_key(self, index: Index, rows: slice, cols: slice) -> Any:
        return self.a.tile_key(index, rows, cols)


def narrow(*views: Array) -> list[Array]:
    """The same views as int32 if all numbers are small enough, because int32 is compared twice as fast."""
    once = [x[tuple(slice(0, 1) if n == 0 else ALL for n in x.strides)] for x in views]
    small = all(x.size == 0 or (x.min() > -NEAR and x.max() < NEAR) for x in once)
    return [np.broadcast_to(x.astype(np.int32), view.shape) for x, view in zip(once, views, strict=True)] if small else [*views]


def extremes(x: Array, parts: Sequence[slice]) -> tuple[Array, Array]:
    """The least and the largest of x in each of these adjacent parts of the last axis, over all other axes."""
    others, first = tuple(range(x.ndim - 1)), parts[0].start
    if x.shape[-1] == 1:  # one number stands for all
        return x.min(others).repeat(len(parts)), x.max(others).repeat(len(parts))
    x, starts = x[..., first : parts[-1].stop], np.array([part.start for part in parts]) - first
    return np.minimum.reduceat(x.min(others), starts), np.maximum.reduceat(x.max(others), starts)


@dataclass(eq=False)
class TokensBound(Bound):
    """A mask that depends on one number for each query minus one for each key: views (..., H, L) and (..., H, S)."""

    shape: Shape
    q: Array
    k: Array

    def __post_init__(self) -> None:
        self.q, self.k = narrow(self.q, self.k)

    def varies(self, axis: int) -> bool:
        return self.q.strides[axis] != 0 or self.k.strides[axis] != 0

    def tile_key(self, index: Index, rows: slice, cols: slice) -> Any:
        q, k = (x if x.shape[-1] == 1 else x[..., some] for x, some in ((self.q[index], rows), (self.k[index], cols)))
        first = k.flat[0]
        return (q - first).tobytes(), (k - first).tobytes()


@dataclass(eq=False)
class WindowBound(TokensBound):
    """-left <= k - q <= right, with q (..., H, L or 1) and k (..., H, S or 1)."""

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q.dtype == np.int32:  # a larger limit would overflow, and no distance reaches it
            self.left, self.right = (None if x is None else min(x, 2 * NEAR) for x in (self.left, self.right))

    def _holds(self, distance: Any) -> Any:
        right = True if self.right is None else distance <= self.right
        return right if self.left is None else right & (distance >= -self.left)

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        q, k = self.q[index], self.k[index]
        q = q[..., rows, None] if q.shape[-1] > 1 else q[..., None]
        k = k[..., None, cols] if k.shape[-1] > 1 else k[..., None, :]
        right: Any = np.True_ if self.right is None else k <= q + self.right
        result: Any = right if self.left is None else right & (k >= q - self.left)
        return result if result.ndim else np.broadcast_to(result, np.broadcast_shapes(q.shape, k.shape))

    def states(self, index: Index, rows: Sequence[slice], cols: Sequence[slice]) -> Array:
        q, k = extremes(self.q[index], rows), extremes(self.k[index], cols)
        return np.broadcast_to(self._between(k[0] - q[1][:, None], k[1] - q[0][:, None]), (len(rows), len(cols)))

    def _between(self, nearest: Any, farthest: Any) -> Any:
        """The state of a tile whose distances lie between these two."""
        beyond = False if self.right is None else nearest > self.right
        beyond = beyond if self.left is None else beyond | (farthest < -self.left)
        within = self._holds(nearest) & self._holds(farthest)
        return np.where(within, FULL, np.where(beyond, EMPTY, PARTIAL))


@dataclass(eq=False)
class SegmentsBound(TokensBound):
    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        result: Array = np.equal(self.q[index][..., rows, None], self.k[index][..., None, cols])
        return result

    def states(self, index: Index, rows: Sequence[slice], cols: Sequence[slice]) -> Array:
        q, k = extremes(self.q[index], rows), extremes(self.k[index], cols)
        return np.asarray(self._between(q[0][:, None], q[1][:, None], *k))

    def cuts(self) -> tuple[Array, Array]:
        if any(self.varies(axis) for axis in range(len(self.shape) - 2)) or not all(self.shape):
            return super().cuts()
        q, k = (np.flatnonzero(np.diff(x[(0,) * (x.ndim - 1)])) + 1 for x in (self.q, self.k))
        return q, k

    def _between(self, first: Any, last: Any, least: Any, most: Any) -> Any:
        """The state of a tile from the ranges of ids of its queries (first to last) and its keys (least to most)."""
        apart = np.maximum(first, least) > np.minimum(last, most)
        same = np.minimum(first, least) == np.maximum(last, most)
        return np.where(apart, EMPTY, np.where(same, FULL, PARTIAL))


@dataclass(eq=False)
class BlocksBound(Bound):
    shape: Shape
    view: Array
    size: tuple[int, int]

    def varies(self, axis: int) -> bool:
        return self.view.strides[axis] != 0

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        i = np.arange(self.shape[-2])[rows] // self.size[0]
        j = np.arange(self.shape[-1])[cols] // self.size[1]
        result: Array = self.view[index][..., i[:, None], j]
        return result


@dataclass(eq=False)
class WhereBound(Bound):
    shape: Shape
    function: Callable[[Array, Array], Array]

    def varies(self, axis: int) -> bool:
        return False

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        i, j = np.arange(self.shape[-2])[rows, None], np.arange(self.shape[-1])[None, cols]
        tile = np.asarray(self.function(i, j))
        pairs = (i.size, j.size)
        if tile.dtype != np.bool_:
            raise TypeError(f"where: function returns dtype {tile.dtype}, expected bool (True = may attend)")
        if tile.ndim > 2 or any(n not in (1, full) for n, full in zip(tile.shape[::-1], pairs[::-1], strict=False)):
            raise ValueError(f"where: function returns shape {tile.shape} for i {i.shape} and j {j.shape}, expected {pairs}")
        return np.broadcast_to(tile, pairs)
