"""Biases: what is added to the scores, and the gradients of their parameters.

A bias is an array over pairs, (L, S) or (..., H, L, S) with axes of size 1 where it does not vary, or an object that never
needs the whole L x S array. Bound to the shape of the scores, both have these methods:

    tile(index, rows, cols)                         the values of ``scores[index][..., rows, cols]``
    new_gradient()                                  zeros, in the computing dtype
    add_gradient(total, index, rows, cols, dscores) adds what one tile of score gradients contributes
    finish(total)                                   the gradient in the form in which the bias was given

The gradient of an object is an object of the same class that holds the gradients of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from npattn.ops.checks import (
    Array,
    Shape,
    broadcast_pairs,
    check_array,
    check_dtype,
    check_integer,
    computing_dtype,
    integers,
)
from npattn.ops.heads import heads_first
from npattn.ops.pairs import ALL, Bound, Index
from npattn.ops.tokens import Positions


class ParameterBound(Bound):
    """A bias with one differentiable parameter. A subclass gives ``tile`` and ``add_gradient``."""

    def __init__(self, bias: Any, parameter: Array, shape: Shape) -> None:
        self.bias, self.shape, self.dtype = bias, shape, parameter.dtype
        self.value = parameter.astype(check_dtype("bias", bias=parameter), copy=False)

    def new_gradient(self) -> Array:
        return np.zeros(self.value.shape, self.value.dtype)

    def finish(self, total: Array) -> Any:
        return self.bias.with_parameter(total.astype(self.dtype, copy=False))


class ArrayBound(ParameterBound):
    def __init__(self, op: str, bias: Array, shape: Shape) -> None:
        self.shape, self.dtype, self.computing = shape, bias.dtype, check_dtype("bias", bias=bias)
        self.view = broadcast_pairs(op, "bias", bias, shape)
        self.bias_shape = bias.shape
        # The shape of a view of the gradient with full rank. Axes of size 1 are those along which dscores is summed.
        self.full_shape = (1,) * (len(shape) - bias.ndim) + bias.shape

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        result: Array = self.view[index][..., rows, cols]
        return result

    def new_gradient(self) -> Array:
        return np.zeros(self.bias_shape, self.computing)

    def add_gradient(self, total: Array, index: Index, rows: slice, cols: slice, dscores: Array) -> None:
        here = total.reshape(self.full_shape)  # a view: total is contiguous
        alone = [ALL if isinstance(i, slice) else 0 for i in index]
        place: Any = (*(i if n > 1 else one for i, one, n in zip(index, alone, self.full_shape, strict=False)), ...)
        at = here[place][..., rows if self.full_shape[-2] > 1 else ALL, cols if self.full_shape[-1] > 1 else ALL]
        sums = tuple(a - at.ndim for a in range(at.ndim) if at.shape[a] == 1)
        at += dscores.sum(sums, keepdims=True)

    def finish(self, total: Array) -> Any:
        return total.astype(self.dtype, copy=False)


def check_heads(op: str, name: str, x: object, shape: Shape, axis: int) -> Array:
    """x, after a check that its axis of heads has H elements."""
    a, H = check_array(op, name, x), shape[-3] if len(shape) > 2 else 1
    if a.shape[axis] != H:
        expected = f"(H={H},)" if a.ndim == 1 else f"({a.shape[0]}, H={H})"
        raise ValueError(f"{op}: {name} has shape {a.shape}, expected {expected}: H is fixed by q")
    return a


def alibi_slopes(num_heads: int, dtype: Any = np.float64) -> Array:
    """The slopes of the ALiBi paper, (H,): 2^(-8 h / H) for h = 1 .. H where H is a power of two.

    Otherwise those of the next lower power of two, then every other slope of the next higher one (Press et al. 2022).

    >>> alibi_slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    """
    H = check_integer("alibi_slopes", "num_heads", num_heads, least=1)
    whole = 1 << (H.bit_length() - 1)
    exponents = [8 * h / whole for h in range(1, whole + 1)] + [4 * h / whole for h in range(1, 2 * whole, 2)]
    if computing_dtype(np.dtype(dtype)) is None:
        raise TypeError(f"alibi_slopes: dtype is {np.dtype(dtype)}, expected a floating dtype")
    return np.array([2.0**-e for e in exponents[:H]], dtype)


def _keep(bias: Any, parameter: str) -> None:
    """Copies the parameter and the positions when a bias is made, so that later writes to them do not change it."""
    object.__setattr__(bias, parameter, np.array(getattr(bias, parameter)))
    positions = Positions.make(type(bias).__name__, bias.q_pos, bias.k_pos, bias.align, bias.offset)
    for name in ("q_pos", "k_pos", "offset"):  # `replace` makes the positions again from these copies
        object.__setattr__(bias, name, getattr(positions, name))
    object.__setattr__(bias, "positions", positions)


@dataclass(frozen=True, eq=False)
class Alibi:
    """Attention with linear biases: bias_hij = -slopes_h |q_pos_i - k_pos_j| (Press et al. 2022).

    slopes : (H,), such as ``alibi_slopes(H, q.dtype)``, in the dtype of q or its computing dtype. Positions, ``align`` and
    ``offset`` are as in `npattn.causal`.
    """

    slopes: Array
    q_pos: object = None
    k_pos: object = None
    align: str | None = None
    offset: object = None
    positions: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if check_array("Alibi", "slopes", self.slopes).ndim != 1:
            raise ValueError(f"Alibi: slopes has shape {self.slopes.shape}, expected (H,)")
        _keep(self, "slopes")

    @property
    def parameter(self) -> Array:
        return self.slopes

    def with_parameter(self, slopes: Array) -> Alibi:
        return replace(self, slopes=slopes)

    def bind(self, shape: Shape) -> Any:
        check_heads("Alibi", "slopes", self.slopes, shape, 0)
        return AlibiBound(self, shape)


class AlibiBound(ParameterBound):
    def __init__(self, bias: Alibi, shape: Shape) -> None:
        super().__init__(bias, bias.slopes, shape)
        self.q, self.k = bias.positions.bind(shape)
        self.heads = np.broadcast_to(np.arange(len(self.value)) if len(shape) > 2 else 0, shape[:-2])

    def _distance(self, index: Index, rows: slice, cols: slice) -> Array:
        distance = np.abs(self.q[index][..., rows, None] - self.k[index][..., None, cols])
        result: Array = distance.astype(self.value.dtype)
        return result

    def _slopes(self, values: Array, index: Index) -> Array:
        result: Array = np.broadcast_to(heads_first(values, self.shape), (*self.shape[:-2], 1, 1))[index]
        return result

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        return -self._slopes(self.value, index) * self._distance(index, rows, cols)

    def add_gradient(self, total: Array, index: Index, rows: slice, cols: slice, dscores: Array) -> None:
        terms = (dscores * self._distance(index, rows, cols)).sum((-2, -1))
        np.subtract.at(total, self.heads[index], terms)


@dataclass(frozen=True, eq=False)
class RelativeTable:
    """A learned table of biases, with one row for each bucket of relative positions: bias_hij = table[bucket_ij, h].

    table   : (number of buckets, H), as T5 and Swin store it
    buckets : integers over pairs, (L, S) or (..., H, L, S) with axes of size 1; or a function from relative positions
              k_pos - q_pos (an integer array) to buckets, for which the whole array is never made
    Positions, ``align`` and ``offset`` are as in `npattn.causal`; only a function uses them.

    >>> table = RelativeTable(np.zeros((9, 2)), lambda r: np.clip(r, -4, 4) + 4)
    """

    table: Array
    buckets: Array | Callable[[Array], Array]
    q_pos: object = None
    k_pos: object = None
    align: str | None = None
    offset: object = None
    positions: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if check_array("RelativeTable", "table", self.table).ndim != 2:
            raise ValueError(f"RelativeTable: table has shape {self.table.shape}, expected (number of buckets, H)")
        _keep(self, "table")
        if not callable(self.buckets):
            if any(x is not None for x in (self.q_pos, self.k_pos, self.align, self.offset)):
                raise ValueError("RelativeTable: got positions, expected none where buckets is an array")
            object.__setattr__(self, "buckets", self._check(integers("RelativeTable", "buckets", self.buckets)))

    @property
    def parameter(self) -> Array:
        return self.table

    def with_parameter(self, table: Array) -> RelativeTable:
        return replace(self, table=table)

    def _check(self, buckets: Array) -> Array:
        if buckets.dtype.kind not in "iu":
            raise TypeError(f"RelativeTable: buckets has dtype {buckets.dtype}, expected integers")
        if buckets.size and not (buckets.min() >= 0 and buckets.max() < len(self.table)):
            raise ValueError(
                f"RelativeTable: buckets reaches from {buckets.min()} to {buckets.max()}, expected 0 to "
                f"{len(self.table) - 1}: fixed by table"
            )
        return buckets

    def bind(self, shape: Shape) -> Any:
        check_heads("RelativeTable", "table", self.table, shape, 1)
        return RelativeBound(self, shape)


class RelativeBound(ParameterBound):
    def __init__(self, bias: RelativeTable, shape: Shape) -> None:
        super().__init__(bias, bias.table, shape)
        if callable(bias.buckets):
            self.q, self.k = bias.positions.bind(shape)
            self._buckets(tuple(0 for _ in shape[:-2]) if all(shape) else (), slice(0, 1), slice(0, 1))  # checks one pair
        else:
            self.view = broadcast_pairs("RelativeTable", "buckets", bias.buckets, shape)
        self.heads = np.broadcast_to(heads_first(np.arange(self.value.shape[1]), shape), (*shape[:-2], 1, 1))

    def _buckets(self, index: Index, rows: slice, cols: slice) -> Array:
        if not callable(self.bias.buckets):
            result: Array = self.view[index][..., rows, cols]
            return result
        relative = self.k[index][..., None, cols] - self.q[index][..., rows, None]
        buckets = np.asarray(self.bias.buckets(relative))
        if buckets.shape != relative.shape:
            raise ValueError(
                f"RelativeTable: buckets returns shape {buckets.shape}, expected {relative.shape}: fixed by its argument"
            )
        checked: Array = self.bias._check(buckets)
        return checked

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        tile: Array = self.value[self._buckets(index, rows, cols), self.heads[index]]
        return tile

    def add_gradient(self, total: Array, index: Index, rows: slice, cols: slice, dscores: Array) -> None:
        buckets, heads = np.broadcast_arrays(self._buckets(index, rows, cols), self.heads[index])
        np.add.at(total, (buckets, heads), dscores)


__all__ = ["Alibi", "RelativeTable", "alibi_slopes"]
