"""The embedding of tokens, and the head that shares its table.

    y_t = table[ids_t]       (...) -> (..., M)      (1)    embedding
    y = x table^T            (..., M) -> (..., V)   (2)    tied head

The gradient of (1) for a row of the table is the sum of dy_t over all t that hold its number. Where the head is tied to the
embedding, the gradient of the table is the sum of those of (1) and (2). Press and Wolf 2017.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, swap, weight_gradient
from npattn.ops.checks import (
    Array,
    Dims,
    check_array,
    check_class,
    check_cotangent,
    check_dtype,
    check_other_dtype,
)
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.linear import project

# --- embedding --------------------------------------------------------------------------------------------------------------


class EmbeddingCache(NamedTuple):
    """What the backward needs."""

    ids: Array  # (...)
    table: Array  # (V, M)


class EmbeddingGrads(NamedTuple):
    """The gradient of `embedding`; integers have none."""

    table: Array


@explain_keywords
@quiet
def embedding_forward(ids: Array, table: Array) -> tuple[Array, EmbeddingCache]:
    """The rows of a table, equation (1) of this page.

    ids   : integers 0 .. V - 1, any shape; a negative one is an error, and not counted from the end
    table : (V, M)
    Returns y (..., M), and the cache. Raises TypeError, ValueError.

    >>> y, cache = embedding_forward(np.array([2, 0, 2]), np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    >>> y.tolist()
    [[4.0, 5.0], [0.0, 1.0], [4.0, 5.0]]
    """
    check_dtype("embedding", table=table)
    V = Dims("embedding").fit("table", table, "V M").shape[0]
    if check_array("embedding", "ids", ids, "int").dtype.kind not in "iu":
        raise TypeError(f"embedding: ids has dtype {ids.dtype}, expected integers")
    wrong = ids[(ids < 0) | (ids >= V)]
    if wrong.size:
        raise ValueError(f"embedding: ids holds {wrong[0]}, expected 0 to V - 1 = {V - 1}: fixed by table")
    return table.take(ids.astype(np.intp, copy=False), 0), EmbeddingCache(ids, table)  # (1)


@quiet
def embedding_backward(dy: Array, cache: EmbeddingCache) -> EmbeddingGrads:
    """The gradient of sum(dy * y) for the table. dy : (..., M), as y. Raises TypeError, ValueError."""
    # The sum is the product with a sparse matrix that has a 1 for each token, in the row of its id. In float32 np.add.at takes
    # 11 times as long for 100,000 tokens with M = 64 and V = 50,257, and twice as long for 8,192 with M = 768; np.add.reduceat
    # of sorted ids 20 and 5 times. scipy.sparse is imported here, as a program without this gradient can do without it.
    from scipy.sparse import csc_array

    check_class("embedding", "cache", cache, EmbeddingCache, ", from embedding_forward")
    ids, table = cache
    V, M = table.shape
    dy = check_cotangent("embedding", "dy", dy, (*ids.shape, M), table.dtype, check_dtype("embedding", table=table))
    places = csc_array((np.ones(ids.size, dy.dtype), ids.ravel(), np.arange(ids.size + 1)), (V, ids.size))
    dtable = places @ dy.reshape(ids.size, M)  # (1)
    return EmbeddingGrads(dtable.astype(table.dtype, copy=False))


embedding = without_cache(embedding_forward)

# --- tied head --------------------------------------------------------------------------------------------------------------


class TiedHeadCache(NamedTuple):
    """What the backward needs."""

    x: Array  # (..., M)
    table: Array  # (V, M)


class TiedHeadGrads(NamedTuple):
    """The gradients of `tied_head`."""

    x: Array
    table: Array


@explain_keywords
@quiet
def tied_head_forward(x: Array, table: Array) -> tuple[Array, TiedHeadCache]:
    """Logits by the table of the embedding, equation (2) of this page.

    x : (..., M), any rank   table : (V, M). Returns y (..., V), and the cache. Raises TypeError, ValueError.

    >>> y, cache = tied_head_forward(np.array([1.0, 2.0]), np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    >>> y.tolist()
    [2.0, 8.0, 14.0]
    """
    computing, dims = check_dtype("tied_head", x=x), Dims("tied_head")
    dims.fit("x", x, "... M")
    dims.fit("table", check_other_dtype("tied_head", "table", table, x.dtype, computing), "V M")
    y = project(x, swap(table), None, computing)  # (2)
    return y.astype(x.dtype, copy=False), TiedHeadCache(x, table)


@quiet
def tied_head_backward(dy: Array, cache: TiedHeadCache) -> TiedHeadGrads:
    """The gradients of sum(dy * y): dx = dy table, and for the table dy^T x summed over all tokens.

    dy : (..., V), as y. Raises TypeError, ValueError.
    """
    check_class("tied_head", "cache", cache, TiedHeadCache, ", from tied_head_forward")
    x, table = cache
    computing = check_dtype("tied_head", x=x)
    dy = check_cotangent("tied_head", "dy", dy, (*x.shape[:-1], len(table)), x.dtype, computing)
    dx = project(dy, table, None, computing).astype(x.dtype, copy=False)  # (2)
    dtable = weight_gradient(dy, x.astype(computing, copy=False)).astype(table.dtype, copy=False)  # (2)
    return TiedHeadGrads(dx, dtable)


tied_head = without_cache(tied_head_forward)


__all__ = [
    "EmbeddingCache",
    "EmbeddingGrads",
    "TiedHeadCache",
    "TiedHeadGrads",
    "embedding",
    "embedding_backward",
    "embedding_forward",
    "tied_head",
    "tied_head_backward",
    "tied_head_forward",
]
