"""Heads: H query heads read G key/value heads, and their gradients are summed back into these."""

from __future__ import annotations

from typing import Any

import numpy as np

from npattn.ops.checks import Array, Shape


def each_head(x: Array, heads: int, computing: np.dtype[Any]) -> Array:
    """(..., G, S, D) -> (..., H, S, D): head h reads group h // (H // G)."""
    x = x.astype(computing, copy=False)
    return x if x.ndim == 2 or x.shape[-3] == heads else np.repeat(x, heads // x.shape[-3], axis=-3)


def group_sum(dx: Array, groups: int) -> Array:
    """(..., H, S, D) -> (..., G, S, D): the sum over the heads that read each group."""
    *lead, heads, n, width = dx.shape
    return dx if heads == groups else dx.reshape(*lead, groups, heads // groups, n, width).sum(-3)


def heads_first(x: Array, shape: Shape) -> Array:
    """One number for each head, (H,), as (H, 1, 1), to be broadcast with scores (..., H, L, S); (1, 1) for rank 2."""
    return x.reshape((*shape[-3:-2], 1, 1))


def head_sum(x: Array) -> Array:
    """(..., H, L, S) -> (H,), summed over everything else."""
    total: Array = x.sum(tuple(a for a in range(x.ndim) if a != x.ndim - 3))
    return total
