"""Exponentials to the base that this processor computes fastest.

exp(x) = 2^(x log2 e), and log2 e can be multiplied into the scores for nothing, because they are scaled anyway. Where NumPy has
found AVX-512 its float32 exp2 takes about 0.6 of the time of exp, and its errors are smaller: at most 1.0 unit in the last
place, where exp has 2.5. Elsewhere exp is the faster one.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.checks import Array


class Base(NamedTuple):
    """The base of some exponentials: power(scaled(x)) = exp(x), and unscaled(log(exp(x))) = x."""

    unit: float  # log of e to this base: 1, or log2 e

    def power(self, x: Any, out: Any = None) -> Any:
        return np.exp(x, out=out) if self.unit == 1 else np.exp2(x, out=out)

    def log(self, x: Any) -> Any:
        return np.log(x) if self.unit == 1 else np.log2(x)

    def scaled(self, x: Any) -> Any:
        return x if self.unit == 1 else x * self.unit

    def unscaled(self, x: Any, out: Any = None) -> Any:
        return x if self.unit == 1 else np.divide(x, self.unit, out=out)


LEAST = -60.0
"""exp2 takes a hundred times as long where its result is below 2^-126, the least normal number. So base e is taken where a
sample of the scores goes below this."""

BASE_E, BASE_2 = Base(1.0), Base(1 / math.log(2))


@functools.cache
def has_avx512() -> bool:
    """Whether NumPy has found AVX-512; NumPy 2.4 names the level of the architecture instead (X86_V4)."""
    config: Any = np.show_config
    found = config(mode="dicts").get("SIMD Extensions", {})
    return bool({"AVX512_SKX", "X86_V4"} & {*found.get("baseline", ()), *found.get("found", ())})


def fastest(dtype: np.dtype[Any]) -> Base:
    return BASE_2 if dtype == np.float32 and has_avx512() else BASE_E


def total_of(z: Array, m: Array, shift: Array, base: Base) -> Array:
    """z, a sum of powers of s - m, as one of powers of s - shift."""
    wide = np.float64 if z.dtype == np.float32 else z.dtype
    total: Array = z.astype(wide) * base.power(m.astype(wide) - shift.astype(wide))
    return total.astype(z.dtype)
