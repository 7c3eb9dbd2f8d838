"""Attention in tiles, by online softmax, on all cores: the contract of `npattn.attention` in O(L + S) memory.

A tile of scores is as large as the second-level cache. For a tile of queries the keys are visited a tile at a time. With the
top score m seen so far, e_j = exp(s_j - m):

    m' = max(m, max_j s_j)             r = exp(m - m')               (5a)   what was summed up is rescaled to the new top
    z' = r z + sum_j e_j               a' = r a + sum_j e_j v_j      (5b)
    out = a / z                        lse = m + log z               (5c)   after the last tile

It is tried with m = 0, where (5a) is nothing: z shows in the end whether exp has left its range. The backward visits each tile
once, with p_j = exp(s_j - lse) / total: total, the sum of exp(s_j - lse), is 1 but for the rounding of lse, and is kept beside
it, so that p is as good as the dense weights. sum_j p_j dp_j is dout . out. What is subtracted from a score or from dp is one
more column of their product: [q, -lse] [k, 1]^T = q k^T - lse.

(1) to (4), (6) and (7) are those of `npattn.attention`. Rows that see NaN, inf or numbers that overflow are left to it, a few
at a time. docs/blockwise.md derives all of it. Milakov and Gimelshein 2018; Dao et al. 2022.

Two disjoint sets of keys are merged by their lse alone: `merge`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from npattn._checks import Array, Dims, Shape, check_class, check_cotangent, check_dtype, check_other_dtype
from npattn._pairs import EMPTY, FULL, Bound, Pairs, each_head, group_sum, quiet, select, slices, swap
from npattn._parallel import Turns, share
from npattn.attention import (
    AttentionCache,
    AttentionGrads,
    attention_backward,
    attention_forward,
    bind,
    check_cotangents,
    live,
    visible,
)

TILE = (512, 512)  # queries, keys
SMALL = 64 * 64  # heads with no more scores are computed together, as many as fill a tile
FEW = 1 << 20  # scores at a time of what is left to `npattn.attention`


@quiet
def blockwise_forward(
    q: Array, k: Array, v: Array, *, mask: Pairs = None, bias: Pairs = None, scale: float | None = None,
    softcap: float | None = None, sink: Array | None = None, dropout_mask: Pairs = None, return_lse: bool = False,
) -> tuple[Any, AttentionCache]:  # fmt: skip
    """`npattn.attention_forward` without an array of L x S elements; ``cache.weights`` is None.

    Beyond inputs and outputs it needs a copy of out, a few numbers a query, and some tiles a thread. Masks, biases and dropout
    masks are asked for their tiles, and tiles without an allowed pair are skipped. The result does not depend on the number of
    threads.
    """
    c = bind("blockwise", q, k, v, mask, bias, scale, softcap, sink, dropout_mask)
    out, kept = (np.empty((*q.shape[:-1], v.shape[-1]), dtype) for dtype in (q.dtype, c.computing))
    lse, total = (np.empty(q.shape[:-1], c.computing) for _ in range(2))

    def work(task: tuple[Shape, slice], tiles: Tiles) -> None:
        index, rows = task
        found = attend(c, index, rows, tiles, True) or attend(c, index, rows, tiles, False) or attend_by_rows(c, index, rows)
        kept[index][..., rows, :], lse[index][..., rows], total[index][..., rows] = found
        out[index][..., rows, :] = found[0]  # a copy: the caller may write into it

    tasks = [(index, rows) for rows in reversed(slices(q.shape[-2], TILE[0])) for index in bundles(c)]
    share(work, tasks, lambda: Tiles(c.computing))
    cache = c._replace(lse=lse, kept=Kept(kept, total))
    return (out, lse) if return_lse else out, cache


def attend(c: AttentionCache, index: Shape, rows: slice, tiles: Tiles, steady: bool) -> tuple[Array, Array, Array] | None:
    """out, lse and total of some queries of a head (or bundle of heads); None where a number is not finite.

    steady : m stays 0, and None is returned where that loses digits, too
    """
    q = c.scale * c.q[index][..., rows, :].astype(c.computing, copy=False)
    n, E = q.shape[:-1], c.v.shape[-1]
    ones = np.ones(TILE[1], c.computing)
    z, a, seen = np.zeros(n, c.computing), np.zeros((*n, E), c.computing), np.zeros(n, bool)
    sink = sink_of(c, index)
    m = np.zeros(n, z.real.dtype) + (0.0 if steady else sink.real)
    z += select(sink != -np.inf, np.exp(sink - m))  # one more logit, without a value
    for block in itertools.chain(*plan(c, index, rows)):
        at = slice(block.rows.start - rows.start, block.rows.stop - rows.start)
        k, v = (keys_of(c, x, index, block.cols) for x in (c.k, c.v))
        allowed, bias = pairs_of(c, index, block)
        shape, width = (*n[:-1], at.stop - at.start), block.cols.stop - block.cols.start
        s = np.matmul(q[..., at, :], swap(k), out=tiles.take(0, *shape, width))  # (1)
        if c.softcap is not None:
            s /= c.softcap
            np.tanh(s, out=s)
            s *= c.softcap  # (2)
        if bias is not None:
            s += bias  # (3)
        if allowed is not None:
            hide(s, allowed)  # (4)
            v = only(allowed.any(-2), v)
        seen[..., at] |= True if allowed is None else allowed.any(-1)
        if not steady:
            top = np.maximum(m[..., at], s.real.max(-1, initial=-np.inf))  # (5a)
            shift = finite(top)
            r = np.exp(m[..., at] - shift)
            m[..., at] = top
            z[..., at] *= r
            a[..., at, :] *= r[..., None]
            s -= shift[..., None]
        e = np.exp(s, out=s)
        z[..., at] += e @ ones[:width]  # (5b)
        if c.dropout is not None:
            e *= c.dropout.tile(index, block.rows, block.cols)  # (6)
        a[..., at, :] += np.matmul(e, v, out=tiles.take(1, *shape, E))  # (7), (5b)
        if steady and not np.isfinite(z).all():
            return None
    least = np.finfo(c.computing).eps if steady else 0.0  # below it, terms that are lost as subnormal numbers would count
    if not (np.isfinite(z).all() and np.isfinite(a).all() and (z.real[seen] >= least).all()):
        return None
    out = a / np.where(z == 0, 1, z)[..., None]  # (5c)
    lse = finite(m) + np.log(z)  # (5c)
    lse = np.where(seen & (z != 0), lse, sink)  # to the last bit
    return out, lse, np.where(seen, total_of(z, finite(m), lse), 0)


@quiet
def blockwise_backward(dout: Array, cache: AttentionCache, dlse: Array | None = None) -> AttentionGrads:
    """`npattn.attention_backward` without an array of L x S elements, and independent of the number of threads."""
    c = cache
    check_cotangents("blockwise", c, dout, dlse)
    alive, rows = c.kept.total != 0, slices(c.q.shape[-2], TILE[0])
    do, dl = live(c, dout, dlse)
    do, total = only(alive, do), select(alive, c.kept.total, 1.0)
    delta = np.einsum("...le,...le->...l", do, c.kept.out)  # (7), (5): sum_j p_j dp_j = dout . out
    off = delta - (dl[..., 0] if dlse is not None else 0)  # what dp is less of in (5)
    lse = select(c.lse != -np.inf, c.lse)
    known = Known(do / total[..., None], lse, off / total)
    dq, dk, dv = (np.zeros(x.shape, dtype) for x, dtype in ((c.q, c.computing), (c.k, c.k.dtype), (c.v, c.v.dtype)))
    dbias = None if c.bias is None else c.bias.new_gradient()
    dsink: Any = None if c.sink is None else np.zeros(c.sink.shape, c.computing)
    dscale = c.computing.type(0)
    plans, turns, sound = {i: [plan(c, i, r) for r in rows] for i in bundles(c)}, Turns(), owners(c)
    for owner in owners(c):
        indices = readers(c, owner)
        if all(np.isfinite(x[index]).all() for x in (c.kept.total, off, do) for index in indices):
            continue
        sound.remove(owner)  # what is not finite is left to `npattn.attention`
        for head in (head for index in indices for head in heads_of(c, index)):
            part = differentiate_by_rows(c, head, dout, dlse, dq, dk, dv, dbias)
            dscale += part[0]
            if dsink is not None:
                dsink[head[-1:] or ...] += part[1]

    def work(task: tuple[slice, Shape], tiles: Tiles) -> None:
        try:
            differentiate(c, known, plans, turns, task[1], task[0], tiles, dq, dk, dv, dbias)
        except BaseException:
            turns.stop()
            raise

    tasks = [(cols, owner) for cols in slices(c.k.shape[-2], TILE[1]) for owner in sound]
    share(work, tasks, lambda: Tiles(c.computing), 1 if dbias is not None else None)

    for index in (index for owner in sound for index in readers(c, owner)):
        for i in rows:
            x, y = c.q[index][..., i, :].astype(c.computing, copy=False), dq[index][..., i, :]
            dscale += (x * y).sum(where=y != 0)  # (1): sum_ij dscores_ij q_i . k_j
            y *= c.scale  # (1)
        if dsink is not None:
            sink = sink_of(c, index)
            p_sink = select(sink != -np.inf, np.exp(sink - lse[index]) / total[index])
            add_by_head(dsink, index, c, -(p_sink * off[index]).sum(-1))  # (5)
    return AttentionGrads(
        dq.astype(c.q.dtype, copy=False), dk, dv,
        None if dbias is None else c.bias.finish(dbias),
        None if c.sink is None else dsink.astype(c.sink.dtype, copy=False),
        dscale,
    )  # fmt: skip


def differentiate(
    c: AttentionCache, known: Known, plans: dict[Shape, list[list[list[Block]]]], turns: Turns, owner: Shape, cols: slice,
    tiles: Tiles, dq: Array, dk: Array, dv: Array, dbias: Any,
) -> None:  # fmt: skip
    """dk and dv of some keys of one group (or bundle of heads), and what these keys give to dq and dbias."""
    j, (D, E) = cols.start // TILE[1], (c.k.shape[-1], c.v.shape[-1])
    k, v = (with_ones(keys_of(c, x, readers(c, owner)[0], cols), c.computing) for x in (c.k, c.v))
    sum_k, sum_v = np.zeros((*k.shape[:-1], D), c.computing), np.zeros((*v.shape[:-1], E), c.computing)
    for index, i in itertools.product(readers(c, owner), range(-(-c.q.shape[-2] // TILE[0]))):
        row = plans[index][i]
        for block in row[j]:
            rows, near = block.rows, slice(block.cols.start - cols.start, block.cols.stop - cols.start)
            q, k1, v1 = c.q[index][..., rows, :].astype(c.computing, copy=False), k[..., near, :], v[..., near, :]
            n, width = q.shape[:-1], near.stop - near.start
            allowed, bias = pairs_of(c, index, block)
            if allowed is not None:
                q, k1, v1 = only(allowed.any(-1), q), only(allowed.any(-2), k1), only(allowed.any(-2), v1)
            q1, do1 = tiles.take(2, *n, D + 1), tiles.take(3, *n, E + 1)
            np.multiply(q, c.scale, out=q1[..., :D])
            np.negative(known.lse[index][..., rows], out=q1[..., D])
            do1[..., :E] = known.do[index][..., rows, :]
            np.negative(known.off[index][..., rows], out=do1[..., E])
            s, dp = tiles.take(0, *n, width), tiles.take(1, *n, width)
            if c.softcap is None:
                np.matmul(q1, swap(k1), out=s)  # (1), less lse
            else:
                t = np.matmul(q1[..., :D], swap(k1[..., :D]), out=tiles.take(4, *n, width))
                t /= c.softcap
                np.tanh(t, out=t)
                np.multiply(t, c.softcap, out=s)  # (2)
                s += q1[..., D:]
            if bias is not None:
                s += bias  # (3)
            if allowed is not None:
                hide(s, allowed)  # (4)
            p = np.exp(s, out=s)  # (5), times total
            if c.dropout is None:
                dropped = p
                np.matmul(do1, swap(v1), out=dp)  # (7): dp less its mean
            else:
                drop = c.dropout.tile(index, rows, block.cols)
                dropped = np.multiply(p, drop, out=tiles.take(5, *n, width))  # (6)
                np.matmul(do1[..., :E], swap(v1[..., :E]), out=dp)  # (7)
                dp *= drop  # (6)
                dp += do1[..., E:]
            sum_v[..., near, :] += np.matmul(swap(dropped), do1[..., :E], out=tiles.take(6, *n[:-1], width, E))  # (7)
            ds = np.multiply(p, dp, out=s)  # (5)
            if dbias is not None:
                c.bias.add_gradient(dbias, index, rows, block.cols, ds)  # (3)
            if c.softcap is not None:
                np.square(t, out=t)
                ds *= np.subtract(1, t, out=t)  # (2)
            sum_k[..., near, :] += np.matmul(swap(ds), q, out=tiles.take(6, *n[:-1], width, D))  # (1)
            of_q = np.matmul(ds, k1[..., :D], out=tiles.take(7, *n, D))  # (1)
            turns.wait((index, i), sum(map(bool, row[:j])))
            dq[index][..., rows, :] += of_q
        if row[j]:
            turns.next((index, i))
    sum_k *= c.scale
    dk[owner][..., cols, :] = group_sum(sum_k, dk[owner][..., cols, :])
    dv[owner][..., cols, :] = group_sum(sum_v, dv[owner][..., cols, :])


# --- the small print: which tiles, buffers, and what is left to `npattn.attention` ----------------------------------------

class Kept(NamedTuple):
    """What the forward keeps for the backward beside the inputs and lse."""

    out: Array  # (..., H, L, E) in the computing dtype
    total: Array  # (..., H, L) sum of exp(scores - lse): 1 but for rounding, 0 without a key, NaN where not all is finite


class Known(NamedTuple):
    """What the backward knows of each query."""

    do: Array  # (..., H, L, E) dout / total
    lse: Array  # (..., H, L), 0 in rows without a key
    off: Array  # (..., H, L) (sum_j p_j dp_j - dlse) / total


class Tiles:
    """The arrays that one thread computes in, allocated once."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype, self.flat = dtype, dict[int, Array]()

    def take(self, number: int, *shape: int) -> Array:
        flat, size = self.flat.get(number), math.prod(shape)
        if flat is None or flat.size < size:
            flat = self.flat[number] = np.empty(size, self.dtype)
        return flat[:size].reshape(shape)


def hide(s: Array, allowed: Array) -> None:
    """-inf where not allowed, without branches, and whatever stands there. NaN where allowed becomes inf."""
    if s.dtype.kind == "c":
        np.copyto(s, -np.inf, where=~allowed)
    else:
        edge = np.subtract(allowed, 0.5, dtype=s.dtype)
        edge *= np.inf
        np.fmin(s, edge, out=s)


def only(some: Array, x: Array) -> Array:
    """x, and 0 in its other rows, which may be NaN: nobody sees them, or they see nobody."""
    return x if some.all() else select(some[..., None], x)


def finite(m: Array) -> Array:
    """The top score, and 0 in rows without one."""
    return select(np.asarray(m != -np.inf), m)


def total_of(z: Array, shift: Array, lse: Array) -> Array:
    """The sum of exp(scores - lse): 1, but for the rounding of lse."""
    wide = np.float64 if z.dtype == np.float32 else z.dtype
    total: Array = z.astype(wide) * np.exp(shift.astype(wide) - lse.astype(wide))
    return total.astype(z.dtype)


def with_ones(x: Array, computing: np.dtype[Any]) -> Array:
    """x and one more column of ones."""
    result = np.empty((*x.shape[:-1], x.shape[-1] + 1), computing)
    result[..., :-1], result[..., -1] = x, 1
    return result


# An index of all axes before (L, D) is one head. A shorter one is a bundle: all heads that begin with it.


def bundles(c: AttentionCache) -> list[Shape]:
    """The indices of what is computed together: one head each, or heads that are small."""
    lead, (L, S) = c.q.shape[:-2], (c.q.shape[-2], c.k.shape[-2])
    if min(SMALL, math.prod(TILE)) < L * S:
        return list(np.ndindex(lead))
    n = next(n for n in range(len(lead) + 1) if n == len(lead) or math.prod((*lead[n:], L, S)) <= math.prod(TILE))
    return list(np.ndindex(lead[:n]))


def owners(c: AttentionCache) -> list[Shape]:
    """The indices of the keys of each bundle: a group for one head, or as long as the bundle's own."""
    return list(dict.fromkeys(group_of(c, index) for index in bundles(c)))


def group_of(c: AttentionCache, index: Shape) -> Shape:
    """The index of the keys that a head or bundle reads."""
    if not index or len(index) < c.q.ndim - 2:
        return index
    return (*index[:-1], index[-1] // (c.q.shape[-3] // c.k.shape[-3]))


def readers(c: AttentionCache, owner: Shape) -> list[Shape]:
    """The heads or bundle that read these keys."""
    if not owner or len(owner) < c.q.ndim - 2:
        return [owner]
    n = c.q.shape[-3] // c.k.shape[-3]
    return [(*owner[:-1], owner[-1] * n + h) for h in range(n)]


def heads_of(c: AttentionCache, index: Shape) -> list[Shape]:
    """The heads of a bundle."""
    return [(*index, *rest) for rest in np.ndindex(c.q.shape[len(index) : -2])]


def keys_of(c: AttentionCache, x: Array, index: Shape, cols: slice) -> Array:
    """Some keys or values of a head, or for each head of a bundle."""
    x = x[group_of(c, index)][..., cols, :]
    return each_head(x, c.q.shape[-3] if x.ndim > 2 else 1, c.computing)


def sink_of(c: AttentionCache, index: Shape) -> Array:
    """The sink of a head, or (H, 1) beside (..., H, L) of a bundle; -inf where there is none."""
    if c.sink is None:
        return np.asarray(-np.inf, c.computing)
    sink = c.sink.astype(c.computing, copy=False)
    return np.asarray(sink[index[-1] if index else 0] if len(index) == c.q.ndim - 2 else sink[:, None])


def add_by_head(total: Array, index: Shape, c: AttentionCache, x: Array) -> None:
    """x of a head, or (..., H) of a bundle, to total (H,)."""
    if len(index) == c.q.ndim - 2:
        total[index[-1] if index else 0] += x
    else:
        total += x.sum(tuple(range(x.ndim - 1)))


class Block(NamedTuple):
    """A part of a tile that has to be computed."""

    rows: slice
    cols: slice
    full: bool  # all of its pairs are allowed


def plan(c: AttentionCache, index: Shape, rows: slice) -> list[list[Block]]:
    """For each tile of keys what these queries may see of it, in halves: the empty ones are left out, equal ones are one."""
    spans = slices(c.k.shape[-2], TILE[1])
    if c.mask is None:
        return [[Block(rows, cols, True)] for cols in spans]
    high, wide = (max(n // 2, 1) for n in TILE)
    halves = [slice(rows.start + x.start, rows.start + x.stop) for x in slices(rows.stop - rows.start, high)]
    states = np.array([c.mask.states(index, x, wide) for x in halves]).T.tolist()
    found: list[list[Block]] = []
    for cols in spans:
        blocks: list[Block] = []
        for x in slices(cols.stop - cols.start, wide):
            part = slice(cols.start + x.start, cols.start + x.stop)
            state = states[part.start // wide]
            some = [n for n, s in enumerate(state) if s != EMPTY]
            if some:
                full = all(s == FULL for s in state[some[0] : some[-1] + 1])
                here = slice(halves[some[0]].start, halves[some[-1]].stop)
                last = blocks[-1] if blocks else None
                if last and (last.rows, last.cols.stop, last.full) == (here, part.start, full):
                    part = slice(blocks.pop().cols.start, part.stop)
                blocks.append(Block(here, part, full))
        found.append(blocks)
    return found


def pairs_of(c: AttentionCache, index: Shape, block: Block) -> tuple[Any, Any]:
    """Which pairs of a block are allowed (None: all), and their bias."""
    if block.full and c.bias is None:
        return None, None
    allowed, bias = visible(c._replace(mask=None) if block.full else c, index, block.rows, block.cols)
    shape = (*c.q.shape[len(index) : -2], block.rows.stop - block.rows.start, block.cols.stop - block.cols.start)
    return None if allowed is None else np.broadcast_to(allowed, shape), bias


class Part(Bound):
    """What is known of each pair, of some rows of one head alone."""

    def __init__(self, whole: Any, index: Shape, rows: slice, total: Any) -> None:
        self.whole, self.index, self.rows, self.total = whole, index, rows, total

    def bind(self, shape: Shape) -> Part:
        self.shape = shape
        return self

    def _of_whole(self, rows: slice, cols: slice) -> tuple[Shape, slice, slice]:
        start, stop, _ = rows.indices(self.shape[-2])
        return self.index, slice(self.rows.start + start, self.rows.start + stop), slice(*cols.indices(self.shape[-1])[:2])

    def tile(self, index: Shape, rows: slice, cols: slice) -> Array:
        result: Array = self.whole.tile(*self._of_whole(rows, cols))
        return result

    def new_gradient(self) -> Any:
        return self.total  # what all parts add to

    def add_gradient(self, total: Any, index: Shape, rows: slice, cols: slice, dscores: Array) -> None:
        self.whole.add_gradient(total, *self._of_whole(rows, cols), dscores)

    def finish(self, total: Any) -> Any:
        return total


def dense_rows(
    c: AttentionCache, index: Shape, rows: slice, dbias: Any = None
) -> tuple[tuple[Array, Array], AttentionCache]:
    """`npattn.attention_forward` of some queries of one head: out, lse, and its cache."""
    group, head = group_of(c, index), index[-1] if index else 0
    q, k, v = (x.astype(c.computing, copy=False) for x in (c.q[index][rows], c.k[group], c.v[group]))
    parts = {
        name: None if whole is None else Part(whole, index, rows, dbias)
        for name, whole in (("mask", c.mask), ("bias", c.bias), ("dropout_mask", c.dropout))
    }
    sink = None if c.sink is None else c.sink[head : head + 1].astype(c.computing, copy=False)
    found: tuple[tuple[Array, Array], AttentionCache] = attention_forward(
        q, k, v, scale=c.scale, softcap=c.softcap, sink=sink, return_lse=True, **parts
    )
    return found


def attend_by_rows(c: AttentionCache, index: Shape, rows: slice) -> tuple[Array, Array, Array]:
    """out and lse as `npattn.attention` has them. Their total is NaN: the backward is left to it, too."""
    shape = (*c.q.shape[len(index) : -2], rows.stop - rows.start)
    out, lse = np.empty((*shape, c.v.shape[-1]), c.computing), np.empty(shape, c.computing)
    for rest in np.ndindex(shape[:-1]):
        for few in some_rows(c, rows):
            at = slice(few.start - rows.start, few.stop - rows.start)
            (out[rest][at], lse[rest][at]), _ = dense_rows(c, (*index, *rest), few)
    return out, lse, np.full(lse.shape, np.nan, lse.dtype)


def some_rows(c: AttentionCache, rows: slice) -> list[slice]:
    few = max(FEW // max(c.k.shape[-2], 1), 1)
    return [slice(rows.start + x.start, rows.start + x.stop) for x in slices(rows.stop - rows.start, few)]


def differentiate_by_rows(
    c: AttentionCache, index: Shape, dout: Array, dlse: Array | None, dq: Array, dk: Array, dv: Array, dbias: Any
) -> tuple[Any, Any]:
    """One head by `npattn.attention_backward`, added to these gradients. Returns its part of dscale and dsink."""
    group, dscale, dsink = group_of(c, index), c.computing.type(0), c.computing.type(0)
    for rows in some_rows(c, slice(0, c.q.shape[-2])):
        _, cache = dense_rows(c, index, rows, dbias)
        do, dl = dout[index][rows].astype(c.computing, copy=False), None if dlse is None else dlse[index][rows]
        g: Any = attention_backward(do, cache, dl)
        dq[index][rows] = g.q
        dk[group] += g.k
        dv[group] += g.v
        dscale, dsink = dscale + g.scale, dsink + (0 if g.sink is None else g.sink[0])
    return dscale, dsink


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
