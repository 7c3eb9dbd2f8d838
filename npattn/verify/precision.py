"""Precision classes: what an implementation rounds to a smaller format, and where."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from npattn.ops.checks import Array


@dataclass(frozen=True)
class Precision:
    """The unit roundoff of each value that is stored in a smaller format; 0.0 where only the accumulation rounds."""

    name: str
    dtype: np.dtype[Any]  # of accumulation
    inputs: float = 0.0  # q, k, v, dout as they enter products
    scores: float = 0.0  # logits as stored
    weights: float = 0.0  # P before the product with v, and in dv
    dweights: float = 0.0  # dP
    dscores: float = 0.0  # dS before the products to dq and dk
    delta_out: float = 0.0  # O before Delta
    out: float = 0.0  # every output and gradient, but not lse
    storage: str = "float32"  # the format in which the inputs are stored
    subnormal: float = 0.0  # half the spacing of that format's subnormal numbers

    @property
    def u(self) -> float:
        """The unit roundoff of accumulation."""
        return float(np.finfo(self.dtype).eps) / 2

    @property
    def coarsest(self) -> float:
        """The largest unit roundoff of what is stored."""
        names = ("inputs", "scores", "weights", "dweights", "dscores", "delta_out", "out")
        return float(max(getattr(self, name) for name in names))

    @property
    def format(self) -> str:
        """The name of the smaller format, for `round_to`."""
        return "tf32" if self.name == "tf32" else self.storage

    def declared(self) -> Precision:
        """The class for inputs that its format can hold: they are not rounded again. TF32 rounds whatever enters a product."""
        return self if self.name == "tf32" else dataclasses.replace(self, inputs=0.0)


def _classes(storage: str, u: float, subnormal: float) -> dict[str, Precision]:
    f4 = np.dtype(np.float32)
    one = Precision(f"{storage}-M1", f4, inputs=u, out=u, storage=storage, subnormal=subnormal)
    two = dataclasses.replace(one, name=f"{storage}-M2", weights=u, dweights=u, dscores=u, delta_out=u)
    return {p.name: p for p in (one, two, dataclasses.replace(two, name=f"{storage}-M3", scores=u))}


PRECISIONS: dict[str, Precision] = {
    "float64": Precision("float64", np.dtype(np.float64), storage="float64"),
    "float32": Precision("float32", np.dtype(np.float32)),
    "tf32": Precision("tf32", np.dtype(np.float32), inputs=2.0**-11, weights=2.0**-11, dscores=2.0**-11),
    **_classes("float16", 2.0**-11, 2.0**-25),
    **_classes("bfloat16", 2.0**-8, 0.0),
    "float8": Precision("float8", np.dtype(np.float32), inputs=2.0**-4, storage="float8_e4m3fn", subnormal=2.0**-10),
}


def of_dtype(dtype: Any) -> Precision:
    """The class of an implementation in this dtype; float16 and bfloat16 are computed in float32 and rounded once."""
    name = np.dtype(dtype).name
    return PRECISIONS.get(name) or PRECISIONS[f"{name}-M1"]


def round_to(x: Array, storage: str) -> Array:
    """x rounded to a format, in x's own dtype. inf and NaN stay as they are; float8 saturates at 448.

    bfloat16 and TF32 are rounded from float32.
    """
    if storage in ("float32", "float64", "float16"):
        with np.errstate(over="ignore"):
            return x.astype(storage).astype(x.dtype)
    bits = {"bfloat16": 16, "tf32": 13}
    if storage in bits:
        n = np.uint32(bits[storage])
        raw = np.asarray(x, np.float32).view(np.uint32)
        half = (np.uint32(1) << (n - np.uint32(1))) - np.uint32(1) + ((raw >> n) & np.uint32(1))
        kept = ((raw + half) >> n) << n
        return np.where(np.isfinite(x), kept.view(np.float32), x).astype(x.dtype)
    _, e = np.frexp(x.astype(np.float64))
    step = np.ldexp(1.0, np.maximum(e - 4, -9))
    return np.where(np.isfinite(x), np.clip(np.rint(x / step) * step, -448, 448), x).astype(x.dtype)
