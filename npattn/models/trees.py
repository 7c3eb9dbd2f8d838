"""Trees of parameters: NamedTuples and tuples in one another, with arrays (or None) as leaves.

Parameters, gradients and what an optimiser keeps have one shape, so that one function serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def tree_map(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """f of each leaf, beside the leaves of other trees of the same shape. None stays None.

    >>> tree_map(lambda a, b: a + b, (1, (2, None)), (10, (20, None)))
    (11, (22, None))
    """
    if tree is None:
        return None
    if isinstance(tree, tuple):
        mapped = [tree_map(f, *parts) for parts in zip(tree, *others, strict=True)]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)
    return f(tree, *others)


def named_leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """The leaves by their names, such as "encoder.blocks.0.attention.w_q"; None is left out.

    >>> named_leaves((1, (2, None)))
    {'0': 1, '1.0': 2}
    """
    if tree is None:
        return {}
    if not isinstance(tree, tuple):
        return {name: tree}
    fields = getattr(tree, "_fields", range(len(tree)))
    parts = ((f"{name}.{field}" if name else str(field), part) for field, part in zip(fields, tree, strict=True))
    return {n: leaf for prefix, part in parts for n, leaf in named_leaves(part, prefix).items()}


__all__ = ["named_leaves", "tree_map"]
