"""How rounding errors add up in sums and products, and which errors are accepted. Nothing here knows of attention.

docs/error-model.md derives the formulas, in its sections on sums and on precision classes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from npattn.ops.allowed import quiet
from npattn.ops.checks import Array
from npattn.tolerances import GOOD_MAX, GOOD_RMS, ROUNDING_STD, TIGHT_MAX, TIGHT_RMS

LEVELS = {"tight": (TIGHT_RMS, TIGHT_MAX), "good": (GOOD_RMS, GOOD_MAX)}  # and "bounded": no element above det


@quiet
def units(got: Array, want: Array, sigma: Array, remainder: Any = 0.0) -> Array:
    """|got - want - remainder| / sigma; 0 where equal, inf where got and want differ in NaN or inf.

    inf is right, too, for a number that the dtype of got does not hold, or may not hold after an error of GOOD_MAX sigma.
    """
    x, y = np.asarray(got, want.dtype), want
    same = ((x == y) & (remainder == 0)) | (np.isnan(x) & np.isnan(y)) | ((x == y) & np.isinf(x))
    if np.isinf(x).any() and got.dtype.kind == "f":
        same |= np.isinf(x) & (np.sign(x) == np.sign(y)) & (np.abs(y) + GOOD_MAX * sigma > np.finfo(got.dtype).max)
    finite = np.isfinite(x) & np.isfinite(y)
    return np.asarray(np.where(same, 0.0, np.where(finite, np.abs(x - y - remainder) / sigma, np.inf)), np.float64)


@quiet
def accepts(level: str, off: Array) -> bool:
    """Whether a level accepts these errors. They are in units of sigma, for "bounded" in units of det."""
    if not off.size:
        return True
    if level == "bounded":
        return bool(off.max() <= 1)
    rms, worst = LEVELS[level]
    return bool(off.max() <= worst and np.sqrt(np.square(off).mean()) <= rms)


class Rounding:
    """How errors add up: in quadrature (sigma) or by their absolute values (det)."""

    def __init__(self, rigorous: bool, u: float, tiny: float) -> None:
        self.rigorous, self.tiny = rigorous, tiny
        self.unit = u if rigorous else ROUNDING_STD * u

    def add(self, *errors: Any) -> Any:
        if self.rigorous:
            return sum(np.abs(e) for e in errors)
        return _root_of_squares(*errors)

    def low(self, roundoff: float, x: Array, subnormal: float = 0.0) -> Any:
        """The error of rounding x to a smaller format. subnormal : half the spacing of the format's subnormal numbers"""
        if not roundoff:
            return 0.0 * x
        if self.rigorous:
            return np.maximum(roundoff * (1 + 4 * roundoff) * np.abs(x), np.where(x == 0, 0.0, subnormal))
        return np.maximum(ROUNDING_STD * roundoff * np.abs(x), np.where(x == 0, 0.0, subnormal / math.sqrt(3)))

    def through(self, error: Array, x: Array) -> Array:
        """The error of a matrix product whose left factor has this error."""
        if self.rigorous:
            return np.asarray(error @ np.abs(x))
        top, rows = _scaled(error)
        result: Array = top * np.sqrt(np.square(rows) @ np.square(x))
        return result

    def sum(self, error: Array, axis: Any) -> Array:
        """The error of a sum whose terms have these errors."""
        if self.rigorous:
            return np.asarray(error.sum(axis, keepdims=True))
        top, scaled = _scaled(error, axis)
        result: Array = top * np.sqrt(np.square(scaled).sum(axis, keepdims=True))
        return result

    def product(self, x: Array, y: Array) -> Array:
        """The rounding of the matrix product x @ y of exact factors."""
        return self._chain(x.shape[-1], self.through(np.abs(x), y), x @ y)

    def rounding_of_sum(self, terms: Array, axis: Any) -> Array:
        """The rounding of a sum of exact terms.

        Terms that stand together may be alike, such as those of all keys of a sequence: then the partial sums grow more than
        those of `_chain`, which takes the terms in any order. So those in the order of the axes count, too, in sigma.
        """
        axes = axis if isinstance(axis, tuple) else (axis,)
        n = math.prod(terms.shape[a] for a in axes)
        chain = self._chain(n, self.sum(np.abs(terms), axis), terms.sum(axis, keepdims=True))
        if self.rigorous or len(axes) == 1:
            return chain
        in_order = np.moveaxis(terms, axes, range(-len(axes), 0))
        partial = in_order.reshape(*in_order.shape[: terms.ndim - len(axes)], n).cumsum(-1)
        return np.asarray(np.maximum(chain, self.unit * np.sqrt(np.square(partial).sum(-1)).reshape(chain.shape)))

    def _chain(self, n: int, size: Array, total: Array) -> Array:
        """The rounding of a sum of n products that are added one after the other: each partial sum s_m is rounded.

        size  : the sum of |products| in det, the root of the sum of their squares in sigma;  total : the sum itself

        For n terms of mean mu and standard deviation sd, the sum of E s_m^2 over m is (n^2 / 2) sd^2 + (n^3 / 3) mu^2. It is
        replaced by (n / 2) sum t^2 + (n / 3) (sum t)^2, which is up to 5/3 too large.
        """
        if self.rigorous:
            gamma = (n + 2) * self.unit / (1 - min((n + 2) * self.unit, 0.5))
            return np.asarray(gamma * size + n * self.tiny)
        return np.asarray(self.unit * np.hypot(math.sqrt(n / 2 + 1) * size, math.sqrt(n / 3) * total) + n * self.tiny)


def _root_of_squares(*errors: Any) -> Any:
    """As by np.hypot, which takes 35 ns an element, and was a third of the time of the error model."""
    squares = functools.reduce(np.add, map(np.square, errors))
    outside = ~((squares > 1e-290) & (squares < 1e290))  # or NaN
    if outside.any() and any((outside & (e != 0)).any() for e in errors):
        return functools.reduce(np.hypot, errors)
    return np.sqrt(squares)


def _scaled(x: Array, axis: Any = -1) -> tuple[Array, Array]:
    """The largest |x| along the axis, and x divided by it: without that, squares of weights below 1e-154 would underflow."""
    top = np.abs(x).max(axis, keepdims=True, initial=0.0)
    top = np.where(top == 0, 1.0, top)
    return top, x / top
