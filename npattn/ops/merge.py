"""Attention over two disjoint sets of keys, from the out and lse of each.

So keys can be spread over processes, or come one after the other, and each part can be computed by any implementation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select
from npattn.ops.checks import Array, Dims, check_class, check_cotangent, check_dtype, check_other_dtype
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.softmax import normalize, normalize_backward


class MergeCache(NamedTuple):
    """What `merge_backward` needs."""

    out_a: Array  # (..., L, E), 0 in rows for which that part has no key; likewise out_b
    out_b: Array
    weights: Array  # (..., L, 2) w_a and w_b of (2); 0 where a part has no key
    lse: Array  # (..., L)
    dtype: np.dtype[Any]


class MergeGrads(NamedTuple):
    """The gradients of `merge`."""

    out_a: Array
    lse_a: Array
    out_b: Array
    lse_b: Array


@explain_keywords
@quiet
def merge_forward(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[tuple[Array, Array], MergeCache]:
    """Attention over the union of two disjoint sets of keys, from that over each.

        lse = log(exp(lse_a) + exp(lse_b))                                                          (1)
        w_a = exp(lse_a - lse),  w_b = exp(lse_b - lse)                                             (2)
        out = w_a out_a + w_b out_b                                                                 (3)

    out_a, out_b : (..., L, E)   lse_a, lse_b : (..., L) in nats, in the computing dtype; -inf = no key: then that row of the
    part's out is ignored. At most one part may have the sink, which would be counted twice.
    Returns (out, lse), and the cache. Raises TypeError, ValueError.
    """
    op, dims = "merge", Dims("merge")
    computing = check_dtype(op, out_a=out_a, out_b=out_b)
    for out_name, out, lse_name, lse in (("out_a", out_a, "lse_a", lse_a), ("out_b", out_b, "lse_b", lse_b)):
        dims.fit(out_name, out, "... L E")
        dims.fit(lse_name, check_other_dtype(op, lse_name, lse, computing, computing), "... L")
    weights, lse = normalize(np.stack([lse_a, lse_b], -1))  # (1), (2)
    a, b = (
        select(part[..., None] != -np.inf, out.astype(computing, copy=False))
        for part, out in ((lse_a, out_a), (lse_b, out_b))
    )
    out = (weights[..., :1] * a + weights[..., 1:] * b).astype(out_a.dtype, copy=False)  # (3)
    return (out, lse), MergeCache(a, b, weights, lse, out_a.dtype)


@quiet
def merge_backward(dout: Array, cache: MergeCache, dlse: Array | None = None) -> MergeGrads:
    """The gradients of sum(dout * out) + sum(dlse * lse), both ignored in rows whose lse is -inf. (2) is a softmax of two.

    dout : (..., L, E), as out; dlse : (..., L) in the computing dtype. Raises TypeError, ValueError.
    """
    check_class("merge", "cache", cache, MergeCache, ", from merge_forward")
    c, computing = cache, cache.lse.dtype
    alive = c.lse[..., None] != -np.inf
    dout = select(alive, check_cotangent("merge", "dout", dout, c.out_a.shape, c.dtype, computing))
    dl: Any = 0.0
    if dlse is not None:
        dl = select(alive, check_cotangent("merge", "dlse", dlse, c.lse.shape, computing, computing)[..., None])
    dweights = np.stack([(dout * x).sum(-1) for x in (c.out_a, c.out_b)], -1)  # (3)
    dlses = select(c.weights != 0, normalize_backward(c.weights, dweights, dl)[0])  # (2), (1)
    dout_a, dout_b = (
        select(w != 0, w * dout).astype(c.dtype, copy=False) for w in (c.weights[..., :1], c.weights[..., 1:])
    )  # (3)
    return MergeGrads(dout_a, dlses[..., 0], dout_b, dlses[..., 1])


merge = without_cache(merge_forward)

__all__ = ["MergeCache", "MergeGrads", "merge", "merge_backward", "merge_forward"]
