"""Positions: sinusoids that are added to the inputs, and rotary positions, which turn pairs of columns of queries and keys.

Sinusoids (`sinusoidal`), for column pair i of a width M:

    PE(p, 2i) = sin(p base^(-2i / M)),   PE(p, 2i + 1) = cos(p base^(-2i / M))

Rotary positions (`rotary`) turn pair i, (x_a, x_b), of the first R columns by an angle t that grows with the position:

    f_i = base^(-2i / R), or scaled                  (R / 2,)           (1)
    t = p_l f_i                                      (..., L, R / 2)    (2)
    y_a = x_a cos t - x_b sin t                      (..., H, L, D)     (3)
    y_b = x_b cos t + x_a sin t                                         (4)

and the other columns pass. So q_l . k_m depends on the positions by p_l - p_m alone. Pair i is (i, i + R / 2) in the layout
"half" and (2i, 2i + 1) in the layout "interleaved".

Vaswani et al. 2017, section 3.5; Su et al. 2021 (RoFormer), section 3.4.2; Chen et al. 2023 (position interpolation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select
from npattn.ops.checks import (
    Array,
    Dims,
    Shape,
    check_class,
    check_cotangent,
    check_dtype,
    check_integer,
    check_number,
    check_one_of,
    computing_dtype,
    integers,
    kind,
)
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.tokens import per_token

LAYOUTS = ("half", "interleaved")
FLOAT64 = np.dtype(np.float64)


def frequencies(width: int, base: float, dtype: Any = np.float64) -> Array:
    """base^(-2i / width) for i = 0 .. width / 2 - 1."""
    return np.asarray(np.dtype(dtype).type(base) ** (-np.arange(0, width, 2).astype(dtype) / max(width, 1)))


@explain_keywords
def sinusoidal(
    positions: object, width: int, *, base: float = 10000.0, layout: str = "interleaved", dtype: Any = np.float64
) -> Array:
    """The sines and cosines of each position, a constant that has no gradient.

    positions : integers of any shape, (L,) or (B, L). Returns (..., width) in ``dtype``; angles are in float64 or longdouble
    layout : "interleaved" (the paper's: even columns are sines, odd ones cosines) or "half" (first all sines, then all cosines)
    tensor2tensor and fairseq have the layout "half" and base ** (n / (n - 1)) for base, where n = width / 2.
    Raises TypeError, ValueError.

    >>> sinusoidal([0, 1], 4).round(4).tolist()
    [[0.0, 1.0, 0.0, 1.0], [0.8415, 0.5403, 0.01, 1.0]]
    """
    op, p = "sinusoidal", integers("sinusoidal", "positions", positions)
    check_integer(op, "width", width, least=0)
    check_one_of(op, "layout", layout, LAYOUTS)
    base = check_number(op, "base", base, FLOAT64, positive=True)
    if width % 2:
        raise ValueError(f"{op}: width is {width}, expected an even number")
    out = np.empty((*p.shape, width), dtype)
    if out.dtype.kind == "c" or computing_dtype(out.dtype) is None:
        raise TypeError(f"{op}: dtype is {out.dtype}, expected a dtype of real numbers that npattn computes with")
    angle = p[..., None] * frequencies(width, base, _wide(out.dtype))
    sines, cosines = pairs(out, width, layout)
    sines[...], cosines[...] = np.sin(angle), np.cos(angle)
    return out


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of angles: float64, or longdouble for that. float32 angles would be off by 0.06 at position 1e6."""
    return np.dtype(np.longdouble if dtype.char in "gG" else np.float64)


def pairs(x: Array, width: int, layout: str) -> tuple[Array, Array]:
    """The first and second members of the pairs among the first ``width`` columns, as views (..., width / 2)."""
    if layout == "half":
        return x[..., : width // 2], x[..., width // 2 : width]
    return x[..., 0:width:2], x[..., 1:width:2]


# --- rotary positions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: all frequencies, which is to say all positions, are divided by ``factor``."""

    factor: float

    def __post_init__(self) -> None:
        check_number("LinearScaling", "factor", self.factor, FLOAT64, positive=True)

    def scaled(self, f: Array) -> Array:
        return f / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: slow frequencies are divided by ``factor``, fast ones stay, and those between are a mixture of both.

    A frequency is fast if it makes more than ``high_freq_factor`` turns in ``original_length`` positions, and slow if it makes
    less than ``low_freq_factor``.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_length"):
            check_number("Llama3Scaling", name, getattr(self, name), FLOAT64, positive=True)
        low, high = self.low_freq_factor, self.high_freq_factor
        if not high > low:
            raise ValueError(f"Llama3Scaling: high_freq_factor is {high}, expected more than low_freq_factor={low}")

    def scaled(self, f: Array) -> Array:
        turns = self.original_length * f / (8 * np.arctan(f.dtype.type(1)))  # over 2 pi, in that dtype
        fast = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clip(0, 1)
        return np.asarray(fast * f + (1 - fast) * f / self.factor)


@dataclass(frozen=True)
class Rotary:
    """Which columns are turned, and how fast. What systems do differs, so that the layout has no default.

    layout : "half" (GPT-NeoX, Llama in transformers) or "interleaved" (Meta's Llama, GPT-J, RoFormer)
    width : R, the number of columns that are turned, the first ones; None turns all D
    base : 10000 in RoFormer, 500000 in Llama 3; scaling : None, `LinearScaling` or `Llama3Scaling`
    """

    layout: str
    width: int | None = None
    base: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | None = None

    def __post_init__(self) -> None:
        check_one_of("Rotary", "layout", self.layout, LAYOUTS)
        check_number("Rotary", "base", self.base, FLOAT64, positive=True)
        if self.width is not None and check_integer("Rotary", "width", self.width, least=2) % 2:
            raise ValueError(f"Rotary: width is {self.width}, expected an even number: columns are turned in pairs")
        if not isinstance(self.scaling, (LinearScaling, Llama3Scaling, type(None))):
            raise TypeError(f"Rotary: scaling is {kind(self.scaling)}, expected npattn.LinearScaling, Llama3Scaling or None")

    def frequencies(self, D: int, dtype: Any = np.float64) -> Array:
        """The angle of each pair at position 1, (R / 2,), for vectors of D columns: equation (1)."""
        f = frequencies(D if self.width is None else self.width, self.base, dtype)
        return f if self.scaling is None else self.scaling.scaled(f)


class RotaryCache(NamedTuple):
    """What the backward needs. The turn is linear: x is not among it."""

    cos: Array  # (..., 1, L, R / 2) or (L, R / 2), in the computing dtype or that of its real part
    sin: Array
    layout: str
    shape: Shape  # of x
    dtype: np.dtype[Any]  # of x


class RotaryGrads(NamedTuple):
    """The gradient of `rotary`; positions are integers and have none."""

    x: Array


def turn_of(op: str, name: str, positions: object, x: Array, rotary: Rotary, computing: np.dtype[Any]) -> RotaryCache:
    """Equations (1) and (2), and the cosine and sine of each angle, rounded once; after the checks."""
    check_class(op, "rotary", rotary, Rotary)
    D, wide = x.shape[-1], _wide(computing)
    if rotary.width is None and D % 2:
        raise ValueError(f"{op}: the width D of a head is {D}, expected an even number, or Rotary(width=...)")
    if rotary.width is not None and rotary.width > D:
        raise ValueError(f"{op}: rotary.width is {rotary.width}, expected at most D={D}")
    p = integers(op, name, positions)
    per_token(op, name, p, x.shape, "L", fixed_by="x")
    p = p[..., None, :] if p.ndim > 1 else p  # the same in all heads
    t = p[..., None] * rotary.frequencies(D, wide)  # (1), (2)
    real = np.empty(0, computing).real.dtype
    return RotaryCache(np.cos(t).astype(real), np.sin(t).astype(real), rotary.layout, x.shape, x.dtype)


def turned(x: Array, cos: Array, sin: Array, layout: str, computing: np.dtype[Any]) -> Array:
    """Equations (3) and (4). Where the sine is 0, at position 0, an inf in one column of a pair does not reach the other."""
    R = 2 * cos.shape[-1]
    y = np.empty(x.shape, x.dtype)
    (a, b), (y_a, y_b) = pairs(x, R, layout), pairs(y, R, layout)
    a, b, turns = a.astype(computing, copy=False), b.astype(computing, copy=False), sin != 0
    y_a[...] = a * cos - select(turns, b * sin)  # (3)
    y_b[...] = b * cos + select(turns, a * sin)  # (4)
    y[..., R:] = x[..., R:]
    return y


@explain_keywords
@quiet
def rotary_forward(x: Array, positions: object, rotary: Rotary) -> tuple[Array, RotaryCache]:
    """Rotary positions, equations (1) to (4) of this page.

    x : (..., H, L, D), or (L, D)
    positions : integers (L,), or one row a sequence, (..., L), the same in all heads of it
    rotary : see `Rotary`. Returns y, as x, and the cache. Raises TypeError, ValueError.

    >>> y, cache = rotary_forward(np.array([[1.0, 0.0], [1.0, 0.0]]), [0, 1], Rotary("half"))
    >>> y.round(4).tolist()
    [[1.0, 0.0], [0.5403, 0.8415]]
    """
    computing = check_dtype("rotary", x=x)
    Dims("rotary").fit("x", x, "... L D")
    cache = turn_of("rotary", "positions", positions, x, rotary, computing)  # (1), (2)
    return turned(x, cache.cos, cache.sin, cache.layout, computing), cache  # (3), (4)


@quiet
def rotary_backward(dy: Array, cache: RotaryCache) -> RotaryGrads:
    """The gradient of sum(dy * y): dy, turned back by the same angles. dy : as y. Raises TypeError, ValueError.

    dx_a = dy_a cos t + dy_b sin t,   dx_b = dy_b cos t - dy_a sin t
    """
    check_class("rotary", "cache", cache, RotaryCache, ", from rotary_forward")
    computing = check_dtype("rotary", dy=dy)
    check_cotangent("rotary", "dy", dy, cache.shape, cache.dtype, computing)
    return RotaryGrads(turned(dy, cache.cos, -cache.sin, cache.layout, computing))  # (4), (3)


rotary = without_cache(rotary_forward)

__all__ = ["LinearScaling", "Llama3Scaling", "Rotary", "RotaryCache", "RotaryGrads", "rotary", "rotary_backward",
           "rotary_forward", "sinusoidal"]  # fmt: skip
