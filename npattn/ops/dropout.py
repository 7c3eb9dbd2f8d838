"""Dropout by a given mask, and masks from a counter-based generator for training.

    y = x mask                                                  (1)    mask: 0 or 1 / (1 - p) for each element

What is dropped is selected away: NaN in it reaches nothing. Srivastava et al. 2014; scaled in training, as everyone does now.

`Dropout` is a mask without an array. Whether an element is dropped is a function of where it stands. So any tile of the mask
can be made at any time, in any order, and the backward makes again what the forward had. With mix a bijection of 64-bit words:

    absorb(state, n) = mix(state + (n + 1) GOLDEN)                                      modulo 2^64
    key  = absorb over seed, step, layer, batch and head
    word = absorb(absorb(key, i), j // 2)                                               for query i and key j
    drop = half j % 2 of the word < p 2^32                                              the low half first

mix is the finaliser of SplitMix64 (Steele, Lea and Flood 2014; constants of Stafford's variant 13), and the words of one row
are a stream of that generator. tests/test_dropout.py tests what they did not: rows, columns, heads, steps and layers beside
each other. A word serves two elements: with one for each, a tile would take twice the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select
from npattn.ops.checks import (
    Array,
    Shape,
    check_class,
    check_cotangent,
    check_dtype,
    check_from_0,
    check_integer,
    check_other_dtype,
    computing_dtype,
    kind,
)
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.pairs import Bound, Index

# --- by a given mask ---------------------------------------------------------------------------------------------------------


class DropoutCache(NamedTuple):
    """What the backward needs."""

    mask: Array  # (..., M)
    dtype: np.dtype[Any]  # of x
    computing: np.dtype[Any]


class DropoutGrads(NamedTuple):
    """The gradient of `dropout`."""

    x: Array


def check_dropout_mask(
    op: str, name: str, mask: object, dtype: np.dtype[Any], computing: np.dtype[Any],
    expected: str = "0 or 1/(1-p) for each element",
) -> Array:  # fmt: skip
    """Check that a dropout mask has the inputs' dtype or their computing dtype, real, and finite numbers of at least 0."""
    real = np.empty(0, computing).real.dtype
    given = check_other_dtype(op, name, mask, real if dtype.kind == "c" else dtype, real)
    if given.size and not (given.min() >= 0 and given.max() < np.inf):  # not so for NaN
        raise ValueError(f"{op}: {name} reaches from {given.min()} to {given.max()}, expected {expected}")
    return given


@explain_keywords
@quiet
def dropout_forward(x: Array, mask: Array) -> tuple[Array, DropoutCache]:
    """x times the mask, and 0 where the mask is 0, whatever x is there.

    x : (..., M), any rank; mask : of that shape, 0 or 1/(1-p), as ``Dropout(p, seed).mask(x.shape, x.dtype)``
    Returns y (..., M), and the cache. Raises TypeError, ValueError.

    >>> y, cache = dropout_forward(np.array([1.0, np.nan, 3.0]), np.array([2.0, 0.0, 2.0]))
    >>> y.tolist()
    [2.0, 0.0, 6.0]
    """
    computing = check_dtype("dropout", x=x)
    mask = check_dropout_mask("dropout", "mask", mask, x.dtype, computing)
    if mask.shape != x.shape:
        raise ValueError(f"dropout: mask has shape {mask.shape}, expected {x.shape}: it is fixed by x")
    y = masked(x.astype(computing, copy=False), mask)  # (1)
    return y.astype(x.dtype, copy=False), DropoutCache(mask, x.dtype, computing)


@quiet
def dropout_backward(dy: Array, cache: DropoutCache) -> DropoutGrads:
    """The gradient of sum(dy * y): dx = dy mask.

    dy : (..., M), as y. Raises TypeError, ValueError.
    """
    check_class("dropout", "cache", cache, DropoutCache, ", from dropout_forward")
    dy = check_cotangent("dropout", "dy", dy, cache.mask.shape, cache.dtype, cache.computing)
    return DropoutGrads(masked(dy, cache.mask).astype(cache.dtype, copy=False))  # (1)


def masked(x: Array, mask: Array) -> Array:
    """x mask, (1), in the dtype of x."""
    return select(mask != 0, x * mask.astype(x.real.dtype, copy=False))


dropout = without_cache(dropout_forward)

# --- by a counter-based generator -------------------------------------------------------------------------------------------

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd
# mix: in each round the word is xored with itself shifted to the right, then multiplied. The last round has no product.
ROUNDS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)), (np.uint64(31), None),
)  # fmt: skip
WORDS = 1 << 14  # at a time: 128 KiB and as much for shifts, in a second-level cache. Half or twice as many are not faster.


def mixed(x: Array, spare: Array) -> Array:
    """mix of the words of x, in place; spare : an array like x"""
    for shift, factor in ROUNDS:
        np.right_shift(x, shift, out=spare)
        np.bitwise_xor(x, spare, out=x)
        if factor is not None:
            np.multiply(x, factor, out=x)
    return x


def absorb(state: Array, n: Any) -> Array:
    """absorb of this page; state and n are broadcast. At least one axis: NumPy warns where a number overflows."""
    x = np.atleast_1d(state + (np.atleast_1d(np.asarray(n, np.uint64)) + np.uint64(1)) * GOLDEN)
    return mixed(x, np.empty_like(x))


@dataclass(frozen=True)
class Dropout:
    """The dropout mask of one place in one step of training, for ``dropout_mask=``: 0 with probability p, else 1/(1-p).

    p     : from 0 to less than 1; it is rounded to a multiple of 2^-32
    seed  : of the training; step : its number; layer : of the place. Integers from 0. Places of one step (attention, and each
            activation) need numbers of their own, or they drop alike.

    No array of all pairs is made, and the same element of the same place and step is always dropped or not, in whatever tiles,
    threads or order it is asked for. Heads are query heads. ``bind(shape, dtype).dense()`` is the array, for other
    implementations.

    >>> Dropout(0.5, seed=1).mask((2, 6)).tolist()
    [[0.0, 2.0, 2.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 0.0, 2.0, 2.0]]
    """

    p: float
    seed: int
    step: int = 0
    layer: int = 0

    def __post_init__(self) -> None:
        check_from_0("Dropout", "p", self.p, below=1.0)
        for name in ("seed", "step", "layer"):
            if check_integer("Dropout", name, getattr(self, name), least=0) >> 64:
                raise ValueError(f"Dropout: {name} is {getattr(self, name)}, expected less than 2**64")

    def bind(self, shape: Shape, dtype: Any = np.float64) -> DropoutBound:
        """The mask of scores (..., H, L, S), or of any array of rank 2 or more."""
        return DropoutBound(self, _shape(shape, 2), np.dtype(dtype))

    def mask(self, shape: Shape, dtype: Any = np.float32) -> Array:
        """The array for an activation of this shape, as `dropout` takes it."""
        if computing_dtype(np.dtype(dtype)) is None or np.dtype(dtype).kind == "c":
            raise TypeError(f"Dropout: dtype is {np.dtype(dtype)}, expected a floating dtype")
        shape = _shape(shape, 0)
        return self.bind((1,) * (2 - len(shape)) + shape, dtype).dense().reshape(shape)


def _shape(shape: object, rank: int) -> Shape:
    """The shape, after a check that it is one, of this rank at least."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"Dropout: shape is {kind(shape)}, expected a tuple of integers")
    sizes = tuple(check_integer("Dropout", "shape", n, least=0) for n in shape)
    if len(sizes) < rank:
        raise ValueError(f"Dropout: shape is {sizes}, expected rank {rank} or more; mask(shape, dtype) takes any rank")
    return sizes


class DropoutBound(Bound):
    """`Dropout` bound to a shape: its tiles."""

    def __init__(self, of: Dropout, shape: Shape, dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        self.least = np.uint32(min(round(of.p * 2**32), 2**32 - 1))
        self.scale = np.asarray(1 / (1 - np.longdouble(of.p))).astype(dtype)
        H = shape[-3] if len(shape) > 2 else 1
        batch, head = np.divmod(np.arange(math.prod(shape[:-2])), max(H, 1))
        key = np.zeros(1, np.uint64)
        for n in (of.seed, of.step, of.layer, batch, head):
            key = absorb(key, n)
        self.keys = key.reshape(shape[:-2])  # (..., H)

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        (first, stop, _), (left, right, _) = rows.indices(self.shape[-2]), cols.indices(self.shape[-1])
        high, wide, keys = max(stop - first, 0), max(right - left, 0), np.asarray(self.keys[index])
        of_rows = absorb(keys[..., None], np.arange(first, first + high)).reshape(-1, 1)
        columns = (np.arange(left // 2, (left + wide + 1) // 2, dtype=np.uint64) + np.uint64(1)) * GOLDEN
        result, some = np.empty((len(of_rows), wide), self.dtype), max(WORDS // max(len(columns), 1), 1)
        words, spare = (np.empty((some, len(columns)), np.uint64) for _ in range(2))
        for start in range(0, len(of_rows), some):
            here = result[start : start + some]
            x = np.add(of_rows[start : start + some], columns, out=words[: len(here)])
            halves = mixed(x, spare[: len(here)]).astype("<u8", copy=False).view("<u4")
            here[...] = halves[:, left % 2 : left % 2 + wide] >= self.least
            here *= self.scale  # np.where takes 13 times as long
        return result.reshape(*keys.shape, high, wide)


__all__ = ["Dropout", "DropoutCache", "DropoutGrads", "dropout", "dropout_backward", "dropout_forward"]
