"""What is known of each pair (query i, key j): the protocol, where tokens stand, sums over allowed pairs and heads.

A mask, bias or dropout mask knows nothing of shapes until an operation *binds* it once to the shape of its scores
(..., H, L, S).  What is bound never needs the whole L x S array:

    dense()                    all pairs, (..., H, L, S)
    tile(index, rows, cols)    those of ``scores[index][..., rows, cols]``, or what broadcasts to it; an index is integers,
                               and perhaps slices behind them
    state(index, rows, cols)   EMPTY, PARTIAL or FULL (masks only; PARTIAL is always a right answer)
    varies(axis)               whether the pairs depend on this axis before (L, S) (masks only; True is always right)
    alike(index, rows, cols)   a key: where it is equal for the same index, so are the tiles (masks only)

`blockwise` asks for tiles from several threads, in any order, some of them twice, and keeps those of masks for a while: what is
asked for twice must be the same, and an array that was returned must not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from npattn.ops.checks import Array, Shape, as_array, broadcast_pairs, check_one_of, check_other_dtype, converted, kind

EMPTY, PARTIAL, FULL = 0, 1, 2
Index: TypeAlias = tuple[int | slice, ...]
ALL = slice(None)
AT_ONCE = 1 << 18  # pairs of a mask that are looked at together
FAR = 1 << 61  # positions stay below this, so that differences of two fit into int64


def slices(n: int, size: int) -> list[slice]:
    """0 to n in pieces of ``size``, the last perhaps shorter."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


class Bound:
    """What is known of each pair of scores of one shape. A subclass gives ``tile``."""

    shape: Shape

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        raise NotImplementedError

    def dense(self) -> Array:
        return np.broadcast_to(self.tile((), ALL, ALL), self.shape)

    def state(self, index: Index, rows: slice, cols: slice) -> int:
        rows, cols = (slice(*x.indices(n)[:2]) for x, n in zip((rows, cols), self.shape[-2:], strict=True))
        if rows.stop <= rows.start or cols.stop <= cols.start or not all(self.shape):
            return FULL  # no pair that is not allowed
        return int(self.states(index, [rows], [cols])[0, 0])

    def states(self, index: Index, rows: Sequence[slice], cols: Sequence[slice]) -> Array:
        """``state`` of each of these queries with each of these keys, which lie side by side."""
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
        """Queries and keys before which what is allowed changes, if that is the same for all: good places to end a tile."""
        return np.empty(0, int), np.empty(0, int)

    def varies(self, axis: int) -> bool:
        """Whether what is known depends on this axis before (L, S). True is always a right answer."""
        return True

    def alike(self, index: Index, rows: slice, cols: slice) -> Any:
        """A key that is equal for equal tiles of the same size and index, or for none."""
        return rows.start, cols.start


class DenseBound(Bound):
    """Values that are there already, as a view over all pairs."""

    def __init__(self, view: Array) -> None:
        self.view, self.shape = view, view.shape

    def dense(self) -> Array:
        return self.view

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        result: Array = self.view[index][..., rows, cols]
        return result

    def varies(self, axis: int) -> bool:
        return self.view.strides[axis] != 0


class ForeignMask(Bound):
    """A bound mask of somebody else's: it needs a tile, and what else it has is used."""

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
"""What is known of each pair, as an argument: an array, an object of the protocol, or nothing."""


def is_bindable(x: object) -> bool:
    """An object of the protocol, and not its class."""
    return isinstance(x, Bindable) and not isinstance(x, type)


def is_bias(x: object) -> bool:
    """A bias object of ours: it has a parameter with a gradient."""
    return hasattr(x, "with_parameter")


def bind_dropout(op: str, mask: object, shape: Shape, dtype: np.dtype[Any], computing: np.dtype[Any]) -> Any:
    """The dropout mask, checked against scores of this shape (None stays None)."""
    if mask is None:
        return None
    if isinstance(mask, Bindable) and is_bindable(mask) and not (is_bias(mask) or hasattr(mask, "__invert__")):
        return mask.bind(shape)
    expected = "expected an array that the caller drew, 0 or 1/(1-p) for each pair"
    if not isinstance(mask, np.ndarray):
        way = converted("dropout_mask", mask) or ": (rng.random(shape) >= p) / (1 - p)"
        raise TypeError(f"{op}: dropout_mask is {kind(mask)}, {expected}{way}")
    real = np.empty(0, computing).real.dtype
    mask = check_other_dtype(op, "dropout_mask", mask, real if dtype.kind == "c" else dtype, real)
    view = broadcast_pairs(op, "dropout_mask", mask, shape)
    if mask.size and not (mask.min() >= 0 and mask.max() < np.inf):  # not so for NaN
        raise ValueError(f"{op}: dropout_mask reaches from {mask.min()} to {mask.max()}, {expected}")
    return DenseBound(view)


# --- where tokens stand -----------------------------------------------------------------------------------------------


def integers(op: str, name: str, x: object) -> Array:
    """A copy as int64."""
    a = as_array(op, name, x, "integers")
    if a.size == 0 and not isinstance(x, np.ndarray):
        a = a.astype(np.int64)  # an empty list has no dtype of its own
    if a.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} has dtype {a.dtype}, expected integers")
    if a.size and not (int(a.min()) > -FAR and int(a.max()) < FAR):
        raise ValueError(f"{op}: {name} reaches from {a.min()} to {a.max()}, expected values below 2**61 in size")
    return np.array(a, dtype=np.int64)


def per_token(op: str, name: str, x: Array, shape: Shape, letter: str) -> Array:
    """x of shape (L,), or one row a sequence, as a view over (..., H, L); likewise S."""
    n = shape[-2] if letter == "L" else shape[-1]
    rows = (*shape[:-3], n)
    if x.shape not in ((n,), rows):
        each = f" or one row a sequence, {rows}" if len(rows) > 1 else ""
        raise ValueError(f"{op}: {name} has shape {x.shape}, expected ({letter}={n},){each}: fixed by q and k")
    heads = x[..., None, :] if x.ndim > 1 else x
    return np.broadcast_to(heads, (*shape[:-2], n))


def per_sequence(op: str, name: str, n: Array, shape: Shape) -> Array:
    """n of shape () or q.shape[:-3] as a view over (..., H, 1)."""
    if n.shape not in ((), shape[:-3]):
        raise ValueError(
            f"{op}: {name} has shape {n.shape}, expected one number a sequence, {shape[:-3]}: fixed by q"
        )
    return np.broadcast_to(n[..., None, None] if n.ndim else n, (*shape[:-2], 1))


@dataclass(frozen=True, eq=False)
class Positions:
    """Where queries and keys stand: given, or counted from 0 with the queries shifted by an alignment or an offset."""

    op: str
    q_pos: Array | None = None
    k_pos: Array | None = None
    align: str | None = None
    offset: Array | None = None

    @classmethod
    def make(cls, op: str, q_pos: object, k_pos: object, align: Any, offset: object) -> Positions:
        check_one_of(op, "align", align, (None, "top_left", "bottom_right"))
        ways = [positions for positions in ((q_pos, k_pos), (align,), (offset,)) if any(x is not None for x in positions)]
        if len(ways) > 1:
            raise ValueError(f"{op}: got more than one of positions, align and offset, expected at most one of them")
        q, k, shift = (
            None if x is None else integers(op, name, x)
            for name, x in (("q_pos", q_pos), ("k_pos", k_pos), ("offset", offset))
        )
        return cls(op, q, k, align, shift)

    def bind(self, shape: Shape) -> tuple[Array, Array]:
        """Positions of the queries, (..., H, L), and of the keys, (..., H, S), as views."""
        L, S = shape[-2:]
        q = np.arange(L) if self.q_pos is None else self.q_pos
        k = np.arange(S) if self.k_pos is None else self.k_pos
        if self.offset is not None:
            shift = per_sequence(self.op, "offset", self.offset, shape)
            return q + shift, per_token(self.op, "k_pos", k, shape, "S")
        if self.align == "bottom_right":
            q = q + (S - L)
        elif self.align is None and self.q_pos is None and self.k_pos is None and L != S:
            raise ValueError(
                f"{self.op}: got L={L} queries and S={S} keys, and how they are aligned is not given; expected "
                f'align="top_left" (query 0 stands at key 0), align="bottom_right" (the last query stands at the last '
                f"key), offset=n (query 0 stands at key n), or q_pos and k_pos"
            )
        return per_token(self.op, "q_pos", q, shape, "L"), per_token(self.op, "k_pos", k, shape, "S")
