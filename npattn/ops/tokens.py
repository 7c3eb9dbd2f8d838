"""Positions of tokens, and views with one number for each head of numbers that are given for each token or sequence.

Positions are integers: given (``q_pos``, ``k_pos``), or counted from 0, with the queries shifted by ``align`` or ``offset``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from npattn.ops.checks import Array, Shape, check_one_of, integers


def per_token(op: str, name: str, x: Array, shape: Shape, letter: str, fixed_by: str = "q and k") -> Array:
    """x of shape (L,), or with one row for each sequence, as a view of shape (..., H, L); likewise for S."""
    n = shape[-2] if letter == "L" else shape[-1]
    rows = (*shape[:-3], n)
    if x.shape not in ((n,), rows):
        each = f" or one row a sequence, {rows}" if len(rows) > 1 else ""
        raise ValueError(f"{op}: {name} has shape {x.shape}, expected ({letter}={n},){each}: fixed by {fixed_by}")
    heads = x[..., None, :] if x.ndim > 1 else x
    return np.broadcast_to(heads, (*shape[:-2], n))


def per_sequence(op: str, name: str, n: Array, shape: Shape) -> Array:
    """n of shape () or q.shape[:-3] as a view of shape (..., H, 1)."""
    if n.shape not in ((), shape[:-3]):
        raise ValueError(
            f"{op}: {name} has shape {n.shape}, expected one number a sequence, {shape[:-3]}: fixed by q"
        )
    return np.broadcast_to(n[..., None, None] if n.ndim else n, (*shape[:-2], 1))


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions of queries and keys: given, or counted from 0 with the queries shifted by an alignment or an offset."""

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
