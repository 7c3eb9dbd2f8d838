"""Functions of one token, or of one element, over many: in groups of rows that stay in the cache.

A function such as gelu makes some twenty passes over its array. An array of some megabytes would come from memory each time;
a group of rows stays in the second-level cache, as do the arrays between. More threads were tried: they wait for Python's lock
between the passes of a group, and gain nothing below groups that no cache holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from npattn.ops.checks import Array

GROUP = 1 << 15  # elements: 128 KiB in float32, with seven more of them between, in a cache of 1 MiB


def in_rows(f: Callable[..., Any], *arrays: Array) -> Any:
    """f(*arrays), where row n of what f returns depends on row n of its arguments alone.

    arrays : (..., M), of one shape but for M   f : (n, M), ... -> (n, K), or a tuple of such
    Returns (..., K), or a tuple of them. The result does not depend on the groups.
    """
    width = max((x.shape[-1] for x in arrays if x.ndim), default=0)
    lead = arrays[0].shape[:-1]
    rows = math.prod(lead)
    if arrays[0].ndim < 2 or rows * width <= GROUP:
        return f(*arrays)
    flat, size = [x.reshape(rows, x.shape[-1]) for x in arrays], max(GROUP // width, 1)
    results: tuple[Array, ...] = ()
    for start in range(0, rows, size):
        here = slice(start, start + size)
        found = f(*(x[here] for x in flat))
        parts = found if isinstance(found, tuple) else (found,)
        results = results or tuple(np.empty((rows, part.shape[-1]), part.dtype) for part in parts)
        for result, part in zip(results, parts, strict=True):
            result[here] = part
    shaped = tuple(result.reshape(*lead, result.shape[-1]) for result in results)
    return shaped if isinstance(found, tuple) else shaped[0]


__all__ = ["in_rows"]
