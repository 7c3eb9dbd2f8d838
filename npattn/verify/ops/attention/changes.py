"""Known mistakes, and other conventions, of attention: what they share. The tables are
forward_changes.py and backward_changes.py.

The classes are those of real bugs in published kernels. A name is what the reader of a report sees. What depends on the size of
a tile, which nobody outside a kernel knows, is tried for each size of TILES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.op import Change

TILES = (8, 16, 32, 64, 128)
MOVES, MAKES = "moves", "makes"  # see `Change.nan`
LIKELY = ("scale", "lse", "delta")  # stages of every call, in which mistakes are common

CHANGES: dict[str, Change] = {}


def add(
    stage: str, rows: dict[str, Any], needs: str = "", *, convention: bool = False, tile: int = 0,
    companions: dict[str, tuple[str, ...]] | None = None,
) -> None:  # fmt: skip
    """Changes of one stage by name: a function of (x, honest), or that and what it does with NaN.

    needs : names of facts, separated by commas; companions : by name, see `Change`
    """
    facts = frozenset(n.strip() for n in needs.split(",") if n)
    likely = not tile and bool(facts or stage in LIKELY)
    for name, row in rows.items():
        assert name not in CHANGES, name
        value, nan = row if isinstance(row, tuple) else (row, "")
        CHANGES[name] = Change(name, {stage: value}, facts, convention, (companions or {}).get(name, ()), tile, likely, nan)


def each(*values: Any) -> Callable[[Callable[[Any], None]], None]:
    """Registers what depends on a number, for each of these."""

    def decorate(register: Callable[[Any], None]) -> None:
        for value in values:
            register(value)

    return decorate


# --- what several of them need ---------------------------------------------------------------------------------------------


def memory(x: Any, name: str) -> Array:
    """What lies in memory where a view begins, read without its strides."""
    view: Array = getattr(x.original, name)
    owner = view
    while owner.base is not None and isinstance(owner.base, np.ndarray):
        owner = owner.base
    return np.resize(owner.ravel(order="K"), view.shape).astype(x.dtype)


def rows_of(x: Any) -> Array:
    return np.arange(x.L)[:, None]


def roll(axis: int, by: int = 1) -> Callable[[Array], Array]:
    return lambda a: np.roll(a, by, axis)



def read_flat(a: Array, L: int, S: int) -> Array:
    """The first L S elements, read as if nothing were broadcast."""
    return np.resize(a, (L, S))


def first_of(a: Array, axis: int) -> Array:
    return np.take(a, [0], axis)


def tiled(a: Array, n: int, axis: int) -> Array:
    """The first n along the axis, over and over: a tile without its offset."""
    return np.take(a, np.arange(a.shape[axis]) % min(n, a.shape[axis]), axis) if a.shape[axis] > 1 else a


def tile_of(n: int, size: int) -> Array:
    return np.arange(n) // size


def log_sum(s: Array) -> Array:
    """log of the sum of exp, each less its maximum: nothing overflows."""
    top = s.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    return np.asarray(top + np.log(np.exp(s - top).sum(-1, keepdims=True)))
