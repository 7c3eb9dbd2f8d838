"""Which keys a query may see: an algebra (``&``, ``|``, ``~``) over positions, True = may attend.

    (key_lengths(4) | window(1024, 0)) & causal()      # streaming: the first 4 keys, a query's own, and 1024 before it

A mask is a value: it copies its arguments, so that a later change of an offset array does not change the mask.
An object of your own is a mask, too, if its ``bind(shape)`` returns an object with ``tile(index, rows, cols)``, and optionally
``dense`` and ``state``; index is what ``scores[index]`` takes: integers, which slices may follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npattn.ops.bound_masks import BlocksBound, BothBound, InverseBound, SegmentsBound, WhereBound, WindowBound
from npattn.ops.checks import (
    FAR,
    Array,
    Shape,
    as_array,
    broadcast_pairs,
    check_array,
    check_integer,
    check_one_of,
    conversion_hint,
    integers,
    kind,
)
from npattn.ops.pairs import EMPTY, FULL, PARTIAL, Bound, DenseBound, ForeignMask, is_bias, is_bindable
from npattn.ops.tokens import Positions, per_sequence, per_token


class Mask:
    """Which keys a query may see. Combine masks, and boolean arrays, with ``&``, ``|`` and ``~``."""

    __array_ufunc__ = None  # so that array & mask comes here and not element by element to NumPy

    def bind(self, shape: Shape) -> Bound:
        raise NotImplementedError

    def __and__(self, other: object) -> Mask:
        return Both(self, _operand("mask & mask", other))

    def __or__(self, other: object) -> Mask:
        return Either(self, _operand("mask | mask", other))

    def __rand__(self, other: object) -> Mask:
        return Both(_operand("mask & mask", other), self)

    def __ror__(self, other: object) -> Mask:
        return Either(_operand("mask | mask", other), self)

    def __invert__(self) -> Mask:
        return Inverse(self)

    def __bool__(self) -> bool:
        raise TypeError("mask: a mask has no truth value; combine masks with & | ~ and not with and, or, not")


def as_mask(op: str, mask: object) -> Any:
    """The mask itself; a boolean array becomes an `ArrayMask`."""
    if is_bindable(mask) and not is_bias(mask):
        return mask
    if isinstance(mask, np.ndarray):
        check_array(op, "mask", mask)
        if mask.dtype != np.bool_:
            raise TypeError(
                f"{op}: mask has dtype {mask.dtype}, expected bool (True = may attend); what is added to the scores is "
                f"given as bias, a tokenizer's 0/1 mask as keys(mask.astype(bool))"
            )
        return ArrayMask(mask, op)
    expected = "expected a boolean array or a mask of npattn.masks, as causal()"
    raise TypeError(f"{op}: mask is {kind(mask)}, {expected}{conversion_hint('mask', mask, 'bool')}")


def _operand(op: str, other: object) -> Any:
    """One side of an & or |. An array is copied, since a mask is a value."""
    return as_mask(op, other.copy() if isinstance(other, np.ndarray) else other)


def bound_mask(mask: Any, shape: Shape, op: str = "mask") -> Bound:
    """The bound mask; that of a class that is not npattn's is wrapped in a `ForeignMask`."""
    bound = mask.bind(shape)
    return bound if isinstance(bound, Bound) else ForeignMask(op, bound, shape)


@dataclass(frozen=True, eq=False)
class ArrayMask(Mask):
    array: Array
    op: str = "mask"

    def bind(self, shape: Shape) -> Bound:
        return DenseBound(broadcast_pairs(self.op, "mask", self.array, shape))


@dataclass(frozen=True, eq=False)
class Both(Mask):
    a: Mask
    b: Mask

    def bind(self, shape: Shape) -> Bound:
        return BothBound(bound_mask(self.a, shape), bound_mask(self.b, shape), shape)


@dataclass(frozen=True, eq=False)
class Either(Mask):
    a: Mask
    b: Mask

    def bind(self, shape: Shape) -> Bound:
        # a | b = ~(~a & ~b)
        return InverseBound(
            BothBound(InverseBound(bound_mask(self.a, shape)), InverseBound(bound_mask(self.b, shape)), shape)
        )


@dataclass(frozen=True, eq=False)
class Inverse(Mask):
    a: Mask

    def bind(self, shape: Shape) -> Bound:
        return InverseBound(bound_mask(self.a, shape))


@dataclass(frozen=True, eq=False)
class Window(Mask):
    positions: Positions
    left: int | None
    right: int | None

    def bind(self, shape: Shape) -> Bound:
        return WindowBound(shape, *self.positions.bind(shape), self.left, self.right)


def causal(
    q_pos: object = None, k_pos: object = None, *, align: str | None = None, offset: object = None
) -> Mask:
    """Keys that do not stand after the query: k_pos <= q_pos.

    Positions are integers, (L,) and (S,), or (..., L) and (..., S) with one row for each sequence. Without them both count from
    0. If L and S differ, that would be a guess, so say ``align="top_left"``, ``align="bottom_right"`` or ``offset=n`` (query 0
    stands at key n; one number, or one for each sequence).

    >>> causal(align="bottom_right").bind((2, 4)).dense().astype(int)
    array([[1, 1, 1, 0],
           [1, 1, 1, 1]])
    """
    return Window(Positions.make("causal", q_pos, k_pos, align, offset), None, 0)


def window(
    left: int | None,
    right: int | None,
    q_pos: object = None,
    k_pos: object = None,
    *,
    align: str | None = None,
    offset: object = None,
) -> Mask:
    """Keys near the query: -left <= k_pos - q_pos <= right, both inclusive; None = no limit.

    ``window(W, 0)`` allows W + 1 keys: the query's own and W before it. Positions are as in `causal`.

    >>> window(1, 0).bind((3, 3)).dense().astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """
    for name, x in (("left", left), ("right", right)):
        if x is not None:
            if isinstance(x, (int, np.integer)) and not isinstance(x, bool) and x < 0:
                raise ValueError(f"window: {name} is {x}, expected an integer of at least 0, or None for no limit")
            check_integer("window", name, x, least=0)
    sides = (None if x is None else min(int(x), 2 * FAR) for x in (left, right))
    return Window(Positions.make("window", q_pos, k_pos, align, offset), *sides)


@dataclass(frozen=True, eq=False)
class Lengths(Mask):
    n: Array
    op: str
    letter: str

    def bind(self, shape: Shape) -> Bound:
        full = shape[-2] if self.letter == "L" else shape[-1]
        if self.n.size and not (self.n.min() >= 0 and self.n.max() <= full):
            raise ValueError(
                f"{self.op}: n reaches from {self.n.min()} to {self.n.max()}, expected 0 to {self.letter}={full}"
            )
        # A length is a window: index < n means that the index is not after position n - 1.
        last = per_sequence(self.op, "n", self.n, shape) - 1
        count = np.broadcast_to(np.arange(full), (*shape[:-2], full))
        if self.letter == "L":
            return WindowBound(shape, count, last, 0, None)
        return WindowBound(shape, last, count, None, 0)


def key_lengths(n: object) -> Mask:
    """The first n keys of each sequence; n has shape q.shape[:-3], or is one number for all.

    >>> key_lengths([1, 3]).bind((2, 1, 1, 3)).dense().astype(int).tolist()
    [[[[1, 0, 0]]], [[[1, 1, 1]]]]
    """
    return Lengths(integers("key_lengths", "n", n), "key_lengths", "S")


def query_lengths(n: object) -> Mask:
    """The first n queries of each sequence; n has shape q.shape[:-3], or is one number for all."""
    return Lengths(integers("query_lengths", "n", n), "query_lengths", "L")


@dataclass(frozen=True, eq=False)
class Keys(Mask):
    allowed: Array

    def bind(self, shape: Shape) -> Bound:
        view = per_token("keys", "allowed", self.allowed, shape, "S")
        return DenseBound(np.broadcast_to(view[..., None, :], shape))


def keys(allowed: object) -> Mask:
    """The keys that are True in ``allowed``, (S,) or (..., S) with one row for each sequence: the mask of a tokenizer."""
    a = as_array("keys", "allowed", allowed, "(S,) or one row a sequence")
    if a.dtype != np.bool_:
        raise TypeError(f"keys: allowed has dtype {a.dtype}, expected bool (True = may attend): allowed.astype(bool)")
    return Keys(a.copy())


@dataclass(frozen=True, eq=False)
class Segments(Mask):
    q_ids: Array
    k_ids: Array

    def bind(self, shape: Shape) -> Bound:
        q = per_token("segments", "q_ids", self.q_ids, shape, "L")
        return SegmentsBound(shape, q, per_token("segments", "k_ids", self.k_ids, shape, "S"))


def segments(q_ids: object, k_ids: object) -> Mask:
    """Keys of the query's own segment. ids : integers, (L,) and (S,), or with one row for each sequence"""
    return Segments(integers("segments", "q_ids", q_ids), integers("segments", "k_ids", k_ids))


@dataclass(frozen=True, eq=False)
class Blocks(Mask):
    array: Array
    size: tuple[int, int]

    def bind(self, shape: Shape) -> Bound:
        counts = tuple(-(-n // size) for n, size in zip(shape[-2:], self.size, strict=True))
        view = broadcast_pairs("blocks", "array", self.array, shape[:-2] + counts)
        return BlocksBound(shape, view, self.size)


def blocks(array: object, size: int | tuple[int, int]) -> Mask:
    """Blocks of size x size pairs (or (rows, cols)) that are allowed or not; the last blocks may be smaller.

    ``array`` is boolean, of rank 2, (ceil(L / rows), ceil(S / cols)), or with the leading dims (..., H) before it.
    """
    a = as_array("blocks", "array", array, "booleans, one a block")
    if a.dtype != np.bool_:
        raise TypeError(f"blocks: array has dtype {a.dtype}, expected bool (True = may attend)")
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"blocks: size is {size}, expected an integer or (rows, cols)")
    rows, cols = (check_integer("blocks", "size", n, least=1) for n in pair)
    return Blocks(a.copy(), (rows, cols))


@dataclass(frozen=True, eq=False)
class Where(Mask):
    function: Callable[[Array, Array], Array]

    def bind(self, shape: Shape) -> Bound:
        bound = WhereBound(shape, self.function)
        bound.tile((), slice(0, 1), slice(0, 1))
        return bound


def where(function: Callable[[Array, Array], Array]) -> Mask:
    """Pairs for which ``function(i, j)`` is True. i (L, 1) and j (1, S) are indices of queries and keys, or parts of them.

    The result for a pair may depend on its own i and j alone, since blockwise asks for one tile after the other.

    >>> where(lambda i, j: (i + j) % 2 == 0).bind((2, 3)).dense().astype(int)
    array([[1, 0, 1],
           [0, 1, 0]])
    """
    if not callable(function):
        raise TypeError(f"where: function is {kind(function)}, expected a function of (i, j)")
    return Where(function)


@dataclass(frozen=True, eq=False)
class Packed(Mask):
    mask: Mask
    totals: tuple[int, int]

    def bind(self, shape: Shape) -> Bound:
        for name, letter, total, n in zip(("q", "k"), "LS", self.totals, shape[-2:], strict=True):
            if total != n:
                raise ValueError(
                    f"packed: cu_seqlens_{name} ends at {total}, expected {letter}={n}: {letter} is fixed by {name}"
                )
        return self.mask.bind(shape)


def packed(cu_seqlens_q: object, cu_seqlens_k: object, align: str | None = None) -> Mask:
    """Sequences packed one after the other: each sees only itself, and ``align`` makes it causal.

    ``cu_seqlens`` are n + 1 numbers for n sequences: 0, then the end of each; the last is L (or S). ``align`` is None (not
    causal), "top_left" (first query at first key) or "bottom_right" (last query at last key, as with a cache).

    >>> packed([0, 1, 3], [0, 2, 4], align="bottom_right").bind((3, 4)).dense().astype(int)
    array([[1, 1, 0, 0],
           [0, 0, 1, 0],
           [0, 0, 1, 1]])
    """
    check_one_of("packed", "align", align, (None, "top_left", "bottom_right"))
    ends = []
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        a = integers("packed", name, cu)
        if a.ndim != 1 or a.size == 0 or a[0] != 0 or (np.diff(a) < 0).any():
            raise ValueError(f"packed: {name} is {a.tolist()}, expected (n + 1,) ends that start at 0 and never fall")
        ends.append(a)
    q, k = ends
    if len(q) != len(k):
        raise ValueError(f"packed: cu_seqlens_k has {len(k)} ends, expected {len(q)}: fixed by cu_seqlens_q")
    q_len, k_len = np.diff(q), np.diff(k)
    q_ids, k_ids = np.repeat(np.arange(len(q_len)), q_len), np.repeat(np.arange(len(k_len)), k_len)
    mask: Mask = Segments(q_ids, k_ids)
    if align is not None:
        shift = k_len - q_len if align == "bottom_right" else np.zeros_like(q_len)
        q_pos, k_pos = np.arange(q[-1]) - q[q_ids] + shift[q_ids], np.arange(k[-1]) - k[k_ids]
        mask = mask & causal(q_pos, k_pos)
    return Packed(mask, (int(q[-1]), int(k[-1])))


__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Mask",
    "blocks",
    "causal",
    "key_lengths",
    "keys",
    "packed",
    "query_lengths",
    "segments",
    "where",
    "window",
]

