"""Attention in tiles, by online softmax: the contract of `npattn.attention` in O(L + S) memory.

For a tile of queries the keys are visited a tile at a time. With the top score m seen so far, e_j = exp(s_j - m):

    m' = max(m, max_j s_j)             r = exp(m - m')               (5a)   what was summed up is rescaled to the new top
    z' = r z + sum_j e_j               a' = r a + sum_j e_j v_j      (5b)
    out = a / z                        lse = m + log z               (5c)   after the last tile

(1) to (4), (6) and (7) are those of `npattn.attention`, tile by tile. The backward visits the keys twice: once for m, z and
the mean of dp under p, once for the gradients with p_j = exp(s_j - m) / z, which is as accurate as the dense weights
(exp(s_j - lse) would lose u |lse|). Milakov and Gimelshein 2018; Dao et al. 2022.

Two disjoint sets of keys are merged by their lse alone: `merge`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from npattn._checks import Array, Dims, Shape, check_class, check_cotangent, check_dtype, check_other_dtype
from npattn._pairs import EMPTY, FULL, Pairs, product, quiet, select, swap
from npattn.attention import AttentionCache, AttentionGrads, bind, check_cotangents, live, visible

TILE = (256, 512)  # queries, keys


class _Tile(NamedTuple):
    """One tile of scores of one head, after (4), and what the backward needs of it."""

    cols: slice
    k: Array  # (keys, D)
    v: Array  # (keys, E)
    scores: Array  # (queries, keys)
    allowed: Array | None
    capped: Any  # tanh of (2)
    drop: Any


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _heads(c: AttentionCache) -> Iterator[tuple[Shape, Shape, int]]:
    """The index of every query head, of the group of keys that it reads, and its number."""
    if c.q.ndim == 2:
        return iter([((), (), 0)])
    readers = c.q.shape[-3] // c.k.shape[-3] if c.k.shape[-3] else 1
    return ((i, (*i[:-1], i[-1] // readers), i[-1]) for i in np.ndindex(c.q.shape[:-2]))


def _tiles(c: AttentionCache, index: Shape, group: Shape, rows: slice) -> Iterator[_Tile]:
    """The tiles of scores of one head and its queries ``rows``, those without an allowed pair left out."""
    q = c.q[index][rows].astype(c.computing, copy=False)
    for cols in _slices(c.k.shape[-2], TILE[1]):
        state = FULL if c.mask is None else c.mask.state(index, rows, cols)
        if state == EMPTY:
            continue
        k, v = (x[group][cols].astype(c.computing, copy=False) for x in (c.k, c.v))
        allowed, bias = visible(c if state != FULL else c._replace(mask=None), index, rows, cols)
        scores, capped = c.scale * (q @ swap(k)), None  # (1)
        if c.softcap is not None:
            capped = np.tanh(scores / c.softcap)
            scores = c.softcap * capped  # (2)
        if bias is not None:
            scores = scores + bias  # (3)
        scores = select(allowed, scores, -np.inf)  # (4)
        drop = None if c.dropout is None else c.dropout.tile(index, rows, cols)
        yield _Tile(cols, k, v, scores, allowed, capped, drop)


class _Sums:
    """m, z and a of (5a) to (5c) for a tile of queries: the online softmax."""

    def __init__(self, c: AttentionCache, rows: int, width: int, head: int) -> None:
        self.m = np.full((rows, 1), -np.inf, np.empty(0, c.computing).real.dtype)
        self.z = np.zeros((rows, 1), c.computing)
        self.a = np.zeros((rows, width), c.computing)
        self.seen = np.zeros((rows, 1), bool)  # a query without keys has output 0, whatever the sink is
        if c.sink is not None:  # one more logit, without a value
            self.m = np.maximum(self.m, c.sink[head].real)
            self.z = np.exp(c.sink[head].astype(c.computing) - self.shift()) + self.z

    def shift(self) -> Array:
        """m, and 0 in rows that have no logit yet."""
        return select(self.m != -np.inf, self.m)

    def add(self, scores: Array, allowed: Array | None) -> Array:
        """(5a), and z' of (5b): rescale to the new top, count the scores, return their e_j, which the caller adds to a."""
        old, self.m = self.m, np.maximum(self.m, scores.real.max(-1, keepdims=True, initial=-np.inf))
        rescale = np.exp(old - self.shift())
        e: Array = np.exp(scores - self.shift())
        self.z = rescale * self.z + e.sum(-1, keepdims=True)
        self.a = rescale * self.a
        self.seen = self.seen | (True if allowed is None else np.asarray(allowed.any(-1, keepdims=True)))
        return e

    def divisor(self) -> Array:
        """z, and 1 in rows without a key or sink."""
        return select(self.z != 0, self.z, 1.0)

    def mean(self) -> Array:
        """(5c): a / z, and 0 in rows without a key."""
        return select(self.seen, self.a / self.divisor())


@quiet
def blockwise_forward(
    q: Array, k: Array, v: Array, *, mask: Pairs = None, bias: Pairs = None, scale: float | None = None,
    softcap: float | None = None, sink: Array | None = None, dropout_mask: Pairs = None, return_lse: bool = False,
) -> tuple[Any, AttentionCache]:  # fmt: skip
    """`npattn.attention_forward` without an array of L x S elements; ``cache.weights`` is None.

    Beyond inputs and outputs it needs a fixed number of tiles. Masks, biases and dropout masks are asked for their tiles, and
    tiles without an allowed pair are skipped.
    """
    c = bind("blockwise", q, k, v, mask, bias, scale, softcap, sink, dropout_mask)
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    lse = np.empty(q.shape[:-1], c.computing)
    for index, group, head in _heads(c):
        for rows in _slices(q.shape[-2], TILE[0]):
            sums = _Sums(c, rows.stop - rows.start, v.shape[-1], head)
            for tile in _tiles(c, index, group, rows):
                e = sums.add(tile.scores, tile.allowed)
                dropped = e if tile.drop is None else e * tile.drop  # (6)
                sums.a += product(dropped, tile.v, tile.allowed)  # (7), (5b)
            out[index][rows] = sums.mean()  # (5c)
            lse[index][rows] = (sums.shift() + np.log(sums.z))[:, 0]  # (5c)
    return (out, lse) if return_lse else out, c._replace(lse=lse)


@quiet
def blockwise_backward(dout: Array, cache: AttentionCache, dlse: Array | None = None) -> AttentionGrads:
    """`npattn.attention_backward` without an array of L x S elements."""
    c = cache
    check_cotangents("blockwise", c, dout, dlse)
    dq, dk, dv = (np.zeros(x.shape, c.computing) for x in (c.q, c.k, c.v))
    dbias = None if c.bias is None else c.bias.new_gradient()
    dsink: Any = None if c.sink is None else np.zeros(c.sink.shape, c.computing)
    dscale = c.computing.type(0)
    for index, group, head in _heads(c):
        for rows in _slices(c.q.shape[-2], TILE[0]):
            q, (do, dl) = c.q[index][rows].astype(c.computing, copy=False), live(c, dout, dlse, index, rows)
            sums = _Sums(c, rows.stop - rows.start, 1, head)
            for tile in _tiles(c, index, group, rows):
                e = sums.add(tile.scores, tile.allowed)
                sums.a += (e * _dweights(do, tile)).sum(-1, keepdims=True)
            mean = sums.mean()  # sum_j p_j dp_j
            for tile in _tiles(c, index, group, rows):
                allowed_t = None if tile.allowed is None else swap(tile.allowed)
                weights = select(tile.allowed, np.exp(tile.scores - sums.shift()) / sums.divisor())
                dropped = weights if tile.drop is None else weights * tile.drop
                dv[group][tile.cols] += product(swap(dropped), do, allowed_t)  # (7)
                dscores = select(tile.allowed, weights * (_dweights(do, tile) - mean + dl))  # (5), (4)
                if dbias is not None:
                    c.bias.add_gradient(dbias, index, rows, tile.cols, dscores)  # (3)
                if c.softcap is not None:
                    dscores = select(tile.allowed, dscores * (1 - tile.capped * tile.capped))  # (2)
                dq[index][rows] += product(dscores, tile.k, tile.allowed)  # (1), times scale below
                dk[group][tile.cols] += c.scale * product(swap(dscores), q, allowed_t)  # (1)
            if c.sink is not None:
                sink = c.sink[head].astype(c.computing)
                p_sink = np.exp(sink - sums.shift()) / sums.divisor()
                dsink[head] += select(sink != -np.inf, p_sink * (dl - mean)).sum()  # (5)
            dscale += (q * dq[index][rows]).sum(where=dq[index][rows] != 0)  # (1)
            dq[index][rows] *= c.scale
    return AttentionGrads(
        dq.astype(c.q.dtype, copy=False),
        dk.astype(c.k.dtype, copy=False),
        dv.astype(c.v.dtype, copy=False),
        None if dbias is None else c.bias.finish(dbias),
        None if c.sink is None else dsink.astype(c.sink.dtype, copy=False),
        dscale,
    )


def _dweights(dout: Array, tile: _Tile) -> Array:
    """The gradient of the weights through (7) and (6)."""
    dweights = select(tile.allowed, dout @ swap(tile.v))
    return dweights if tile.drop is None else dweights * tile.drop


def blockwise(
    q: Array, k: Array, v: Array, *, mask: Pairs = None, bias: Pairs = None, scale: float | None = None,
    softcap: float | None = None, sink: Array | None = None, dropout_mask: Pairs = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """`blockwise_forward` without its cache."""
    return blockwise_forward(
        q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap, sink=sink, dropout_mask=dropout_mask,
        return_lse=return_lse,
    )[0]  # fmt: skip


class MergeCache(NamedTuple):
    out_a: Array  # (..., L, E), 0 where that part has no key; likewise out_b
    out_b: Array
    weight_a: Array  # (..., L, 1) share of that part in the sum of exp; 0 where it has no key
    weight_b: Array
    lse: Array  # (..., L)
    dtype: np.dtype[Any]


class MergeGrads(NamedTuple):
    out_a: Array
    lse_a: Array
    out_b: Array
    lse_b: Array


@quiet
def merge_forward(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[tuple[Array, Array], MergeCache]:
    """Attention over two disjoint sets of keys from that over each.

        lse = log(exp(lse_a) + exp(lse_b))                                                          (1)
        w_a = exp(lse_a - lse),  w_b = exp(lse_b - lse)                                             (2)
        out = w_a out_a + w_b out_b                                                                 (3)

    out_a, out_b : (..., L, E)   lse_a, lse_b : (..., L) in nats, in the computing dtype; -inf = no key, and then what stands
    in that part's out is ignored. At most one part carries the sink: it would be counted twice.
    Returns (out, lse), and the cache.
    """
    op, dims = "merge", Dims("merge")
    computing = check_dtype(op, out_a=out_a, out_b=out_b)
    for out_name, out, lse_name, lse in (("out_a", out_a, "lse_a", lse_a), ("out_b", out_b, "lse_b", lse_b)):
        dims.fit(out_name, out, "... L E")
        dims.fit(lse_name, check_other_dtype(op, lse_name, lse, computing, computing), "... L")
    top = np.maximum(lse_a.real, lse_b.real)
    top = select(top != -np.inf, top)
    e_a, e_b = np.exp(lse_a - top), np.exp(lse_b - top)
    total = e_a + e_b
    lse = top + np.log(total)  # (1)
    w_a, w_b = ((e / select(total != 0, total, 1.0))[..., None] for e in (e_a, e_b))  # (2)
    a, b = (
        select(part[..., None] != -np.inf, out.astype(computing, copy=False))
        for part, out in ((lse_a, out_a), (lse_b, out_b))
    )
    out = (w_a * a + w_b * b).astype(out_a.dtype, copy=False)  # (3)
    return (out, lse), MergeCache(a, b, w_a, w_b, lse, out_a.dtype)


@quiet
def merge_backward(dout: Array, cache: MergeCache, dlse: Array | None = None) -> MergeGrads:
    """The gradients of sum(dout * out) + sum(dlse * lse), both ignored in rows whose lse is -inf. (2) is a softmax of two."""
    check_class("merge", "cache", cache, MergeCache, ", from merge_forward")
    c, computing = cache, cache.lse.dtype
    alive = c.lse[..., None] != -np.inf
    dout = select(alive, check_cotangent("merge", "dout", dout, c.out_a.shape, c.dtype, computing))
    dl: Any = 0.0
    if dlse is not None:
        dl = select(alive, check_cotangent("merge", "dlse", dlse, c.lse.shape, computing, computing)[..., None])
    dw_a, dw_b = ((dout * x).sum(-1, keepdims=True) for x in (c.out_a, c.out_b))  # (3)
    mean = c.weight_a * dw_a + c.weight_b * dw_b
    dlse_a, dlse_b = (
        select(w != 0, w * (dw - mean + dl))[..., 0] for w, dw in ((c.weight_a, dw_a), (c.weight_b, dw_b))
    )  # (2), (1)
    dout_a, dout_b = (select(w != 0, w * dout).astype(c.dtype, copy=False) for w in (c.weight_a, c.weight_b))  # (3)
    return MergeGrads(dout_a, dlse_a, dout_b, dlse_b)


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """`merge_forward` without its cache: (out, lse)."""
    return merge_forward(out_a, lse_a, out_b, lse_b)[0]


__all__ = [
    "MergeCache",
    "MergeGrads",
    "blockwise",
    "blockwise_backward",
    "blockwise_forward",
    "merge",
    "merge_backward",
    "merge_forward",
]
