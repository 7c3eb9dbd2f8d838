"""Masks, biases and dropout masks as functions of pairs (query i, key j): the protocol by which operations ask for tiles.

A mask, bias or dropout mask does not depend on shapes until an operation *binds* it to the shape of its scores (..., H, L, S).
The bound object never needs the whole L x S array. Its methods:

    dense()                    all pairs, (..., H, L, S)
    tile(index, rows, cols)    those of ``scores[index][..., rows, cols]``, or an array that broadcasts to it; an index is
                               integers, which slices may follow
    state(index, rows, cols)   EMPTY, PARTIAL or FULL (masks only; PARTIAL is always a right answer)
    varies(axis)               whether the pairs depend on this axis before (L, S) (masks only; True is always right)
    tile_key(index, rows, cols) a key: tiles of the same index and size with equal keys are equal (masks only)

`blockwise` asks for tiles from several threads, in any order, for some of them twice, and keeps those of masks for a while. So
the same tile must always have the same values, and an array that was returned must not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from npattn.ops.checks import Array, Shape, kind

EMPTY, PARTIAL, FULL = 0, 1, 2
Index: TypeAlias = tuple[int | slice, ...]
ALL = slice(None)
AT_ONCE = 1 << 18  # pairs of a mask that `states` computes at once: 256 KiB of booleans, as many as a tile of scores has


class Bound:
    """A mask, bias or dropout mask that is bound to a shape. A subclass defines ``tile``."""

    shape: Shape

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        raise NotImplementedError

    def dense(self) -> Array:
        return np.broadcast_to(self.tile((), ALL, ALL), self.shape)

    def state(self, index: Index, rows: slice, cols: slice) -> int:
        rows, cols = (slice(*x.indices(n)[:2]) for x, n in zip((rows, cols), self.shape[-2:], strict=True))
        if rows.stop <= rows.start or cols.stop <= cols.start or not all(self.shape):
            return FULL  # there are no pairs, so none is forbidden
        return int(self.states(index, [rows], [cols])[0, 0])

    def states(self, index: Index, rows: Sequence[slice], cols: Sequence[slice]) -> Array:
        """``state`` of each part of the queries with each part of the keys. The parts of keys are adjacent."""
        if len(cols) > 1 and (rows[0].stop - rows[0].start) * (cols[-1].stop - cols[0].start) > AT_ONCE:
            halves = cols[: len(cols) // 2], cols[len(cols) // 2 :]
            return np.hstack([self.states(index, rows, half) for half in halves])
        found, starts = [], np.array([x.start for x in cols], int) - cols[0].start
        for x in rows:
            tile = self.tile(index, x, slice(cols[0].start, cols[-1].stop))
            others, shape = tuple(range(tile.ndim - 1)), (cols[-1].stop - cols[0].start,)
            some, every = (np.broadcast_to(by(tile, others), shape) for by in (np.any, np.all))
            found.append(np.add(np.logical_or.reduceat(some, starts), np.logical_and.reduceat(every, starts), dtype=np.int8))
        return np.array(found)

    def cuts(self) -> tuple[Array, Array]:
        """Queries and keys before which the mask changes, if that is so in all heads: good places to end a tile."""
        return np.empty(0, int), np.empty(0, int)

    def varies(self, axis: int) -> bool:
        """Whether the values depend on this axis before (L, S). True is always a right answer."""
        return True

    def tile_key(self, index: Index, rows: slice, cols: slice) -> Any:
        """A key: tiles of the same size and index with equal keys are equal. Equal tiles may have different keys."""
        return rows.start, cols.start


class DenseBound(Bound):
    """Values that exist as an array: a view over all pairs."""

    def __init__(self, view: Array) -> None:
        self.view, self.shape = view, view.shape

    def dense(self) -> Array:
        return self.view

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        result: Array = self.view[index][..., rows, cols]
        return result

    def varies(self, axis: int) -> bool:
        return self.view.strides[axis] != 0


class Part(Bound):
    """The part of a bound object for some queries of one head, bound to scores of shape (1, rows, S)."""

    def __init__(self, whole: Any, index: Index, rows: slice, keys: int) -> None:
        self.whole, self.index, self.rows, self.shape = whole, index, rows, (1, rows.stop - rows.start, keys)

    def _of_whole(self, rows: slice, cols: slice) -> tuple[Index, slice, slice]:
        start, stop, _ = rows.indices(self.shape[-2])
        return self.index, slice(self.rows.start + start, self.rows.start + stop), slice(*cols.indices(self.shape[-1])[:2])

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        result: Array = self.whole.tile(*self._of_whole(rows, cols))
        return result

    def states(self, index: Index, rows: Sequence[slice], cols: Sequence[slice]) -> Array:
        result: Array = self.whole.states(self.index, [self._of_whole(x, ALL)[1] for x in rows], cols)
        return result

    def cuts(self) -> tuple[Array, Array]:
        rows, cols = self.whole.cuts()
        return rows[(self.rows.start < rows) & (rows < self.rows.stop)] - self.rows.start, cols

    def varies(self, axis: int) -> bool:
        return False  # one head

    def tile_key(self, index: Index, rows: slice, cols: slice) -> Any:
        return self.whole.tile_key(*self._of_whole(rows, cols))

    def new_gradient(self) -> Any:
        return self.whole.new_gradient()

    def add_gradient(self, total: Any, index: Index, rows: slice, cols: slice, dscores: Array) -> None:
        self.whole.add_gradient(total, *self._of_whole(rows, cols), dscores.reshape(dscores.shape[-2:]))

    def finish(self, total: Any) -> Any:
        return self.whole.finish(total)


class ForeignMask(Bound):
    """A bound mask of a class that is not npattn's: it must have ``tile``; its other methods are used if it has them."""

    def __init__(self, op: str, mask: Any, shape: Shape) -> None:
        if not hasattr(mask, "tile"):
            raise TypeError(f"{op}: mask.bind returns {kind(mask)}, expected an object with tile(index, rows, cols)")
        self.op, self.mask, self.shape = op, mask, shape

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        tile = np.asarray(self.mask.tile(index, rows, cols))
        if tile.dtype != np.bool_:
            raise TypeError(f"{self.op}: mask.tile returns dtype {tile.dtype}, expected bool (True = may attend)")
        return np.atleast_2d(tile)

    def dense(self) -> Array:
        return np.asarray(self.mask.dense()) if hasattr(self.mask, "dense") else super().dense()

    def state(self, index: Index, rows: slice, cols: slice) -> int:
        if hasattr(self.mask, "state"):
            return int(self.mask.state(index, rows, cols))
        return super().state(index, rows, cols)

    def states(self, index: Index, rows: Sequence[slice], cols: Sequence[slice]) -> Array:
        if not hasattr(self.mask, "state"):
            return super().states(index, rows, cols)
        return np.array([[self.state(index, x, y) for y in cols] for x in rows], np.int8)

    def varies(self, axis: int) -> bool:
        return bool(self.mask.varies(axis)) if hasattr(self.mask, "varies") else True


@runtime_checkable
class Bindable(Protocol):
    """Anything that can be bound to the shape of the scores."""

    def bind(self, shape: Shape) -> Any: ...


Pairs: TypeAlias = Array | Bindable | None
"""The type of the arguments mask, bias and dropout_mask: an array, an object of the protocol, or None."""


def is_bindable(x: object) -> bool:
    """Whether x is an object of the protocol, not a class of such objects."""
    return isinstance(x, Bindable) and not isinstance(x, type)


def is_bias(x: object) -> bool:
    """Whether x is a bias object of npattn: it has a parameter with a gradient."""
    return hasattr(x, "with_parameter")
