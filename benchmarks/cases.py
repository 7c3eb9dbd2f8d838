"""The rows of attention: sizes, masks, arrays, the truth about the first heads, and how much has to be computed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import npattn as na
from benchmarks.harness import Array

WORK = 2.0**33  # floating point operations of a forward without a mask: some 0.05 s on two cores
MOST_HEADS = 512
CHUNK = 1 << 22  # pairs at a time for the truth
TOLERANCE = {"float32": 1e-4, "float64": 1e-11}  # of the largest element: sums of thousands of terms, and room for any order


@dataclass(frozen=True)
class Case:
    L: int
    D: int
    B: int = 1
    H: int = 1
    G: int = 0  # 0: as many as H
    S: int = 0  # 0: as many as L
    mask: str = "full"  # full, causal, window, lengths (of keys), packed (causal in each sequence)
    dtype: str = "float32"
    backward: bool = False
    width: int = 1024  # of the window: the query's own key and those before it

    @property
    def groups(self) -> int:
        return self.G or self.H

    @property
    def keys(self) -> int:
        return self.S or self.L

    @property
    def name(self) -> str:
        size = f"L={self.L}" if not self.S else f"L={self.L} S={self.S}"
        heads = f"{self.B}x{self.H}" if self.groups == self.H else f"{self.B}x{self.H}/{self.G}"
        mask = f"window {self.width}" if self.mask == "window" else self.mask
        kind = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{size} D={self.D} {mask} {heads}{kind} {'both' if self.backward else 'forward'}"

    @property
    def scores(self) -> float:
        """Bytes of one array of all scores."""
        return float(self.B * self.H) * self.L * self.keys * np.dtype(self.dtype).itemsize

    def lengths(self) -> Array:
        """How many keys each sequence of the batch has: from half of them to all but a few."""
        n: Array = self.keys // 2 + (self.keys // 2) * np.arange(self.B) // max(self.B, 1)
        return n

    def ends(self) -> Array:
        """Where the packed sequences begin and end: eight of them, the last eight times as long as the first."""
        ends: Array = (self.L * np.arange(9) * np.arange(1, 10)) // 72
        return ends

    def allowed(self, rows: slice, batch: int = 0) -> Array | None:
        """Which pairs of these queries are allowed, from the words and not from `npattn.ops.masks`; None: all."""
        i: Array
        j: Array
        i, j = np.arange(self.L)[rows, None], np.arange(self.keys)
        if self.mask == "full":
            return None
        if self.mask == "causal":
            return j <= i
        if self.mask == "window":
            return (j <= i) & (j > i - self.width)
        if self.mask == "lengths":
            return np.broadcast_to(j < self.lengths()[batch], (i.size, j.size))
        ends = self.ends()[1:]
        same: Array = np.searchsorted(ends, i, "right") == np.searchsorted(ends, j, "right")
        return (j <= i) & same

    def own_mask(self) -> Any:
        """As npattn is told."""
        if self.mask == "full":
            return None
        if self.mask == "causal":
            return na.causal()
        if self.mask == "window":
            return na.window(self.width - 1, 0)
        if self.mask == "lengths":
            return na.key_lengths(self.lengths())
        return na.packed(self.ends(), self.ends(), align="top_left")

    def pairs(self) -> float:
        """Allowed pairs of all heads."""
        i = np.arange(self.L, dtype=np.float64)
        if self.mask == "full":
            n = self.B * self.L * float(self.keys)
        elif self.mask == "causal":
            n = self.B * float((i + 1).sum())
        elif self.mask == "window":
            n = self.B * float(np.minimum(i + 1, self.width).sum())
        elif self.mask == "lengths":
            n = self.L * float(self.lengths().sum())
        else:
            d = np.diff(self.ends()).astype(np.float64)
            n = self.B * float((d * (d + 1) / 2).sum())
        return n * self.H

    def flops(self) -> float:
        """Of the matrix products that are needed: two of them forwards, five more backwards."""
        return (14 if self.backward else 4) * self.pairs() * self.D

    def exponentials(self) -> float:
        return (2 if self.backward else 1) * self.pairs()


class Arrays(NamedTuple):
    q: Array
    k: Array
    v: Array
    dout: Array


def draw(case: Case) -> Arrays:
    rng, dtype = np.random.default_rng(0), np.dtype(case.dtype)
    of_q, of_k = (case.B, case.H, case.L, case.D), (case.B, case.groups, case.keys, case.D)
    return Arrays(*(rng.standard_normal(shape, dtype=dtype) for shape in (of_q, of_k, of_k, of_q)))


def truth(case: Case) -> dict[str, Array]:
    """out, and the gradients, of the query heads that read the first group of the first sequence: `npattn.attention`, float64.

    Some queries at a time: a row of the scores needs no other, and dk and dv are sums over them.
    """
    found = _truth(case)
    return found if case.backward else {"out": found["out"]}


@functools.lru_cache(maxsize=4)
def _truth(case: Case) -> dict[str, Array]:
    x, n = draw(case), case.H // case.groups
    q, do = x.q[0, :n].astype(np.float64), x.dout[0, :n].astype(np.float64)
    k, v = x.k[0, :1].astype(np.float64), x.v[0, :1].astype(np.float64)
    found = {"out": np.empty_like(q)}
    if case.backward:
        found |= {"dq": np.empty_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    step = max(CHUNK // (case.keys * n), 1)
    for start in range(0, case.L, step):
        rows = slice(start, start + step)
        found["out"][:, rows], cache = na.attention_forward(q[:, rows], k, v, mask=case.allowed(rows))
        if case.backward:
            g = na.attention_backward(do[:, rows], cache)
            found["dq"][:, rows] = g.q
            found["dk"] += g.k
            found["dv"] += g.v
    return found


def heads(L: int, D: int, S: int = 0, work: float = WORK) -> tuple[int, int]:
    """B and H, a power of two together, that make a row long enough to be timed."""
    n = min(MOST_HEADS, max(1, int(work / (4 * L * (S or L) * D))))
    n = 1 << (n.bit_length() - 1)
    return n // min(n, 16), min(n, 16)


def sized(L: int, D: int, mask: str = "full", backward: bool = False, **more: Any) -> Case:
    B, H = heads(L, D)
    return Case(L, D, B, H, mask=mask, backward=backward, **more)
