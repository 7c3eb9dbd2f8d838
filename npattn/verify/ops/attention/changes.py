"""What the known mistakes and other conventions of attention share. The tables are forward_changes.py and backward_changes.py.

Each kind of mistake has occurred in published kernels. Reports print a change by its name. A kernel's tile size is not known
from outside, so a mistake that depends on it is tried with each size in TILES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.op import Change

TILES = (8, 16, 32, 64, 128)
MOVES, MAKES = "moves", "makes"  # see `Change.nan`
LIKELY = ("scale", "lse", "delta")  # stages that every call has, and in which mistakes are common

CHANGES: dict[str, Change] = {}


def add(
    stage: str, rows: dict[str, Any], needs: str = "", *, convention: bool = False, tile: int = 0,
    companions: dict[str, tuple[str, ...]] | None = None, rounds: bool = False,
) -> None:  # fmt: skip
    """Register changes of one stage. rows : name -> a function of (x, honest value), or (function, `Change.nan`)

    needs : names of facts, separated by commas; companions : name -> `Change.companions`
    """
    facts = frozenset(n.strip() for n in needs.split(",") if n)
    likely = not tile and bool(facts or stage in LIKELY)
    for name, row in rows.items():
        assert name not in CHANGES, name
        value, nan = row if isinstance(row, tuple) else (row, "")
        CHANGES[name] = Change(name, {stage: value}, facts, convention, (companions or {}).get(name, ()), tile, likely, nan,
                               rounds)  # fmt: skip


def each(*values: Any) -> Callable[[Callable[[Any], None]], None]:
    """Call a function that registers changes with each of these values."""

    def decorate(register: Callable[[Any], None]) -> None:
        for value in values:
            register(value)

    return decorate


# --- what several of them need ---------------------------------------------------------------------------------------------


def memory(x: Any, name: str) -> Array:
    """What a kernel reads that ignores the strides of a view: the elements in the order in which they lie in memory."""
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
    """The elements read one after the other as an array (L, S), as if no axis were broadcast."""
    return np.resize(a, (L, S))


def first_of(a: Array, axis: int) -> Array:
    return np.take(a, [0], axis)


def tiled(a: Array, n: int, axis: int) -> Array:
    """The first n along the axis, repeated: every tile reads the first one, because its offset is missing."""
    return np.take(a, np.arange(a.shape[axis]) % min(n, a.shape[axis]), axis) if a.shape[axis] > 1 else a


def tile_of(n: int, size: int) -> Array:
    return np.arange(n) // size


def log_sum(s: Array) -> Array:
    """log of the sum of exp over the keys, without overflow: the maximum is subtracted first."""
    top = s.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    return np.asarray(top + np.log(np.exp(s - top).sum(-1, keepdims=True)))
