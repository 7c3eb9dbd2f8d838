"""Attention in tiles, by online softmax, on all cores: the contract of `npattn.attention` in O(L + S) memory.

A tile of scores fits into the second-level cache. For a tile of queries the keys are visited a tile at a time. With the top
score m seen so far, and e_j = exp(s_j - m'):

    m' = max(m, max_j s_j)             r = exp(m - m')               (5a)   what was summed up is rescaled to the new top
    z' = r z + sum_j e_j               a' = r a + sum_j e_j v_j      (5b)
    out = a / z                        lse = m + log z               (5c)   after the last tile

It is tried with m = 0, where (5a) is nothing: z shows in the end whether exp has left its range. The backward visits each tile
once, with p_j = exp(s_j - lse) / total: total, the sum of exp(s_j - lse), is 1 but for the rounding of lse, and is kept beside
it, so that p is as good as the dense weights. sum_j p_j dp_j is dout . out; that it is subtracted from dp is one more column of
the product: [do, -off] [v, 1]^T = do v^T - off (both over total).

(1) to (4), (6) and (7) are those of `npattn.ops.attention`. What sees NaN, inf or numbers that overflow is left to it: forwards
a tile of queries, backwards all heads that read the same keys. docs/blockwise.md derives all of it. Milakov and
Gimelshein 2018; Dao et al. 2022. Which blocks are computed: npattn/ops/tiles.py.

Two disjoint sets of keys are merged by their lse alone: `merge`.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select, swap
from npattn.ops.attention import (
    AttentionCache,
    AttentionGrads,
    attention_backward,
    attention_forward,
    bind,
    check_cotangents,
)
from npattn.ops.checks import Array, Dims, Shape, check_class, check_cotangent, check_dtype, check_other_dtype
from npattn.ops.edge import own_keywords, without_cache
from npattn.ops.pairs import Bound, Index, Pairs, slices
from npattn.ops.threads import Turns, share
from npattn.ops.tiles import (
    FEW_ROWS,
    Block,
    Heads,
    Hidden,
    bundles,
    by_group,
    each_index,
    group_of,
    pairs_of,
    plan,
    small,
    tiles_of,
    who_sees,
    within,
)

FEW = 1 << 20  # scores at a time of what is left to `npattn.attention`
MANY = 1 << 20  # numbers: the gradients of a bias that are summed up apart from each other
LIGHT = 1 << 20  # numbers: what is done once a query or key is not worth threads for fewer


@own_keywords
@quiet
def blockwise_forward(
    q: Array, k: Array, v: Array, *, mask: Pairs = None, bias: Pairs = None, scale: float | None = None,
    softcap: float | None = None, sink: Array | None = None, dropout_mask: Pairs = None, return_lse: bool = False,
) -> tuple[Any, AttentionCache]:  # fmt: skip
    """`npattn.attention_forward` without an array of L x S elements; ``cache.weights`` is None.

    Beyond inputs and outputs it needs a copy of out, a few numbers a query, some tiles a thread, and a copy of a k that does
    not lie by rows. Masks, biases and dropout masks are asked for their tiles, and tiles without an allowed pair are skipped.
    The result does not depend on the number of threads.
    """
    c = bind("blockwise", q, k, v, mask, bias, scale, softcap, sink, dropout_mask, return_lse)
    out, cache = attend_all(c, keep=True)
    return (out, cache.lse) if return_lse else out, cache


def attend_all(c: AttentionCache, keep: bool) -> tuple[Array, AttentionCache]:
    """out, and the cache. keep : the backward is to follow, whatever the caller writes into out"""
    given, c = c, c._replace(k=by_rows(c.k))
    kept = np.empty((*c.q.shape[:-1], c.v.shape[-1]), c.computing)
    out = np.empty(kept.shape, c.q.dtype) if keep or c.q.dtype != c.computing else kept
    lse, total = (np.empty(c.q.shape[:-1], c.computing) for _ in range(2))
    (of_rows, of_cols), plans = tiles_of(c), dict[Any, list[list[Block]]]()

    def work(task: tuple[Heads, list[slice]], tiles: Tiles) -> None:
        heads, parts = task
        rows = slice(parts[0].start, parts[-1].stop)
        if (key := (heads.pattern, rows.start)) not in plans:
            plans[key] = plan(c, heads, parts, of_cols)
        a, blocks = kept[heads.index][..., rows, :], list(itertools.chain(*plans[key]))
        lse[heads.index][..., rows], total[heads.index][..., rows] = (
            attend(c, heads, rows, blocks, tiles, a, True)
            or attend(c, heads, rows, blocks, tiles, a, False)
            or attend_by_rows(c, heads, rows, a)
        )
        if kept is not out:
            out[heads.index][..., rows, :] = a

    tasks, buffers = [(heads, parts) for parts in reversed(of_rows) for heads in bundles(c)], partial(Tiles, c.computing)
    share(work, tasks, buffers, most=1 if small(c) else None)
    return out, given._replace(lse=lse, kept=Kept(kept, total))


def attend(
    c: AttentionCache, heads: Heads, rows: slice, blocks: list[Block], tiles: Tiles, a: Array, steady: bool
) -> tuple[Array, Array] | None:
    """lse and total of some queries of a head (or of small heads), and their out in a; None where a number is not finite.

    steady : m stays 0, and None is returned where that loses digits, too
    """
    given = c.q[heads.index][..., rows, :].astype(c.computing, copy=False)
    q = np.multiply(c.scale, given, out=tiles.take(0, *given.shape))
    if abs(c.scale) > 1:  # scale q may overflow where scale (q . k) is a number
        over = (np.isfinite(given) & ~np.isfinite(q)).any(-1)
        if over.any() and (over & who_sees(c, heads, rows, blocks, tiles.hidden)).any():
            return None
    n, E = q.shape[:-2], c.v.shape[-1]
    k, v = c.k[heads.group], c.v[heads.group]
    sink = sink_of(c, heads)
    m = np.zeros(q.shape[:-1], c.computing).real + (0.0 if steady else sink.real)
    alone = select(sink != -np.inf, np.exp(sink - m))  # one more logit, without a value
    z, a[...] = alone.copy(), 0
    for block in blocks:
        at, cols = within(block.rows, rows), block.cols
        high, wide = at.stop - at.start, cols.stop - cols.start
        pairs = pairs_of(c, heads, block, tiles.hidden)
        k_j, v_j = (x[..., cols, :].astype(c.computing, copy=False) for x in (k, v))
        s = dots(q[..., at, :], k_j, tiles.take(1, *n, high, wide))  # (1)
        if c.softcap is not None:
            s /= c.softcap
            np.tanh(s, out=s)
            s *= c.softcap  # (2)
        if pairs.bias is not None:
            s += pairs.bias  # (3)
        pairs.hide(s)  # (4)
        if not steady:
            top = np.maximum(m[..., at], s.real.max(-1, initial=-np.inf))  # (5a)
            shift = finite(top)
            r = np.exp(m[..., at] - shift)
            m[..., at] = top
            z[..., at] *= r
            a[..., at, :] *= r[..., None]
            s -= shift[..., None]
        e = np.exp(s, out=s)
        z[..., at] += e @ tiles.ones(wide)  # (5b)
        if c.dropout is not None:
            e *= c.dropout.tile(heads.index, block.rows, cols)  # (6)
        a[..., at, :] += times(e, only(pairs.seen, v_j), tiles.take(2, *n, high, E))  # (7), (5b)
        if steady and block is blocks[0] and not np.isfinite(z).all():
            return None  # as soon as that shows
    least = np.finfo(c.computing).eps if steady else 0.0  # below it, terms that are lost as subnormal numbers would count
    seen: Any = (z != alone) & (z.real >= least)
    if not seen.all():
        seen = who_sees(c, heads, rows, blocks, tiles.hidden)
    if not (np.isfinite(z).all() and np.isfinite(a).all() and (z.real >= least).all(where=seen)):
        return None
    a /= np.where(z == 0, 1, z)[..., None]  # (5c)
    lse = finite(m) + np.log(z)  # (5c)
    lse = np.where(seen & (z != 0), lse, sink)  # to the last bit
    return lse, np.where(seen, total_of(z, finite(m), lse), 0)


@quiet
def blockwise_backward(dout: Array, cache: AttentionCache, dlse: Array | None = None) -> AttentionGrads:
    """`npattn.attention_backward` without an array of L x S elements, and independent of the number of threads.

    dout : (..., H, L, E), as out; dlse : (..., H, L) in the computing dtype; both are ignored in rows whose lse is -inf.
    Raises TypeError, ValueError, as the forward does.
    """
    check_cotangents("blockwise", cache, dout, dlse)
    c = cache._replace(k=by_rows(cache.k))
    of_rows, of_cols = tiles_of(c)
    known = Known(
        np.empty((*dout.shape[:-1], dout.shape[-1] + 1), c.computing), *(np.empty_like(c.kept.total) for _ in range(2))
    )
    dq, dk, dv = (np.zeros(x.shape, dtype) for x, dtype in ((c.q, c.computing), (c.k, c.k.dtype), (c.v, c.v.dtype)))
    plans, turns, sound = dict[Any, list[list[list[Block]]]](), Turns(), set[int]()
    dscales, dsinks = dict[int, Any](), dict[int, Array]()
    dbias: Any = None if c.bias is None else c.bias.new_gradient()

    def before(heads: Heads, tiles: Tiles) -> None:
        if heads.pattern not in plans:
            plans[heads.pattern] = [plan(c, heads, parts, of_cols) for parts in of_rows]
        spans = [slice(parts[0].start, parts[-1].stop) for parts in of_rows]
        if prepare(c, known, heads, spans, dout, dlse, tiles) and all_seen_are_finite(c, heads, plans[heads.pattern], tiles):
            sound.add(heads.number)

    def work(task: tuple[int, int, slice, list[Heads]], tiles: Tiles) -> None:
        number, j, cols, group = task
        differentiate(c, known, plans, turns, j, cols, group, tiles, dq, dk, dv, dbiases[number])

    def after(heads: Heads, tiles: Tiles) -> None:
        x, y = c.q[heads.index].astype(c.computing, copy=False), dq[heads.index]
        dscale = np.einsum("...ld,...ld->...l", x, y).sum()  # (1): sum_ij dscores_ij q_i . k_j
        dscales[heads.number] = dscale if np.isfinite(dscale) else (x * y).sum(where=y != 0)
        y *= c.scale  # (1)
        if c.sink is not None:
            some = np.asarray(sink_of(c, heads) != -np.inf)  # a sink of -inf is none, also beside NaN
            dsinks[heads.number] = -select(some, sink_weight(c, heads) * known.off[heads.index]).sum(-1)  # (5)

    def left(group: list[Heads], tiles: Tiles) -> None:
        found = differentiate_by_rows(c, group, dout, dlse, dq, dk, dv, dbias)
        for heads, (dscale, dsink) in zip(group, found, strict=True):
            dscales[heads.number], dsinks[heads.number] = dscale, dsink

    groups = [list(same) for _, same in itertools.groupby(bundles(c), lambda heads: heads.group)]
    buffers, most = partial(Tiles, c.computing), 1 if small(c) else None
    light = 1 if max(c.q.size, c.k.size, c.v.size) < LIGHT else most
    alone = 1 if dbias is not None else most
    share(before, itertools.chain(*groups), buffers, None, light)
    whole = [group for group in groups if all(heads.number in sound for heads in group)]
    rest = [group for group in groups if not all(heads.number in sound for heads in group)]
    spans = [(j, slice(x[0].start, x[-1].stop)) for j, x in enumerate(of_cols)]
    tasks = [(number, *span, group) for number, (span, group) in enumerate(itertools.product(spans, whole))]
    # Each task has a total of its own if that is not much; otherwise one thread adds to the same.
    apart = isinstance(dbias, np.ndarray) and dbias.size * len(tasks) <= MANY
    dbiases = [c.bias.new_gradient() if apart else dbias for _ in tasks]
    share(work, tasks, buffers, turns, most if apart else alone)
    share(after, itertools.chain(*whole), buffers, None, light)
    share(left, rest, buffers, None, alone)

    for part in dbiases if apart else ():
        dbias += part
    dsink: Any = None if c.sink is None else np.zeros(c.sink.shape, c.computing)
    for heads in itertools.chain(*groups) if dsink is not None else ():
        np.add.at(dsink, heads.names, dsinks[heads.number])
    return AttentionGrads(
        dq.astype(c.q.dtype, copy=False), dk, dv,
        None if dbias is None else c.bias.finish(dbias),
        None if c.sink is None else dsink.astype(c.sink.dtype, copy=False),
        sum((dscales[number] for number in sorted(dscales)), c.computing.type(0)),
    )  # fmt: skip


def prepare(
    c: AttentionCache, known: Known, heads: Heads, spans: list[slice], dout: Array, dlse: Array | None, tiles: Tiles
) -> bool:  # fmt: skip
    """What is known of each query; True if all of it is finite."""
    index, E = heads.index, c.v.shape[-1]
    do, off, total, lse = (x[index] for x in (dout, known.off, c.kept.total, c.lse))
    alive, total = total != 0, select(total != 0, total, 1.0)
    do = only(alive, do.astype(c.computing, copy=False))
    np.einsum("...le,...le->...l", do, c.kept.out[index], out=off)  # (7), (5): sum_j p_j dp_j = dout . out
    if dlse is not None:
        off -= select(lse != -np.inf, dlse[index])  # what dp is less of in (5)
    do1 = known.do1[index]
    np.divide(do, total[..., None], out=do1[..., :E])
    known.lse[index], do1[..., E] = select(lse != -np.inf, lse), -off / total
    scaled = (scaled_queries(c, heads, rows, tiles) for rows in spans)
    return all(bool(np.isfinite(x).all()) for x in itertools.chain((total, do1), scaled))


def scaled_queries(c: AttentionCache, heads: Heads, rows: slice, tiles: Tiles) -> Array:
    """scale q, as in the forward, and 0 in rows without a key."""
    q = only(c.kept.total[heads.index][..., rows] != 0, c.q[heads.index][..., rows, :].astype(c.computing, copy=False))
    result = tiles.take(10, *q.shape)
    np.multiply(c.scale, q, out=result)
    return result


def finite_or_not(x: Array) -> Array | None:
    """Which rows of x are finite. None: all."""
    finite = np.isfinite(x)
    return None if finite.all() else np.asarray(finite.all(-1))


def all_seen_are_finite(c: AttentionCache, heads: Heads, rows: list[list[list[Block]]], tiles: Tiles) -> bool:
    """Whether nobody sees a key or value that is not finite: its score may be -inf, or capped, and nothing else shows it."""
    good = [some for some in (finite_or_not(x[heads.group]) for x in (c.k, c.v)) if some is not None]
    if not good:
        return True
    bad = ~(good[0] & good[-1])
    for block in itertools.chain(*(itertools.chain(*row) for row in rows)):
        if bad[..., block.cols].any():
            pairs = pairs_of(c, heads, block, tiles.hidden)
            if (bad[..., block.cols] & (True if pairs.seen is None else pairs.seen)).any():
                return False
    return True


def differentiate(
    c: AttentionCache, known: Known, plans: dict[Any, list[list[list[Block]]]], turns: Turns, j: int, cols: slice,
    group: list[Heads], tiles: Tiles, dq: Array, dk: Array, dv: Array, dbias: Any,
) -> None:  # fmt: skip
    """dk and dv of some keys of one group (or of small heads), and what these keys give to dq and dbias."""
    D, E = c.k.shape[-1], c.v.shape[-1]
    k = c.k[group[0].group][..., cols, :].astype(c.computing, copy=False)
    finite_k, v = only(finite_or_not(k), k), with_ones(c.v[group[0].group][..., cols, :], tiles)
    sum_k, sum_v = tiles.take(2, *k.shape[:-1], D), tiles.take(3, *v.shape[:-1], E)
    sum_k[...], sum_v[...] = 0, 0
    for heads, i in itertools.product(group, range(len(plans[group[0].pattern]))):
        row, do = plans[heads.pattern][i], known.do1[heads.index]
        earlier = sum(map(bool, row[:j]))
        for block in row[j]:
            rows, near = block.rows, within(block.cols, cols)
            pairs = pairs_of(c, heads, block, tiles.hidden)
            q_i, do_i, k_j, v_j = scaled_queries(c, heads, rows, tiles), do[..., rows, :], k[..., near, :], v[..., near, :]
            n, high, wide = q_i.shape[:-2], rows.stop - rows.start, near.stop - near.start
            s, dp = tiles.take(4, *n, high, wide), tiles.take(5, *n, high, wide)
            dots(q_i, k_j, s)  # (1), of the same arrays as forwards: the last bit of a large score counts
            if c.softcap is not None:
                s /= c.softcap
                t = np.tanh(s, out=tiles.take(6, *n, high, wide))
                np.multiply(t, c.softcap, out=s)  # (2)
            if pairs.bias is not None:
                s += pairs.bias  # (3)
            pairs.hide(s)  # (4)
            s -= known.lse[heads.index][..., rows, None]
            p = np.exp(s, out=s)  # (5), times total
            if c.dropout is None:
                dropped = p
                dots(do_i, v_j, dp)  # (7): dp less its mean
            else:
                drop = c.dropout.tile(heads.index, rows, block.cols)
                dropped = np.multiply(p, drop, out=tiles.take(7, *n, high, wide))  # (6)
                dots(do_i[..., :E], v_j[..., :E], dp)  # (7)
                dp *= drop  # (6)
                dp += do_i[..., E:]
            sum_v[..., near, :] += sum_rows(dropped, do_i[..., :E], tiles.take(8, *k.shape[:-2], wide, E))  # (7)
            ds = np.multiply(p, dp, out=s)  # (5)
            pairs.select(ds, dp)  # (4)
            if dbias is not None:
                c.bias.add_gradient(dbias, heads.index, rows, block.cols, ds)  # (3)
            if c.softcap is not None:
                np.square(t, out=t)
                ds *= np.subtract(1, t, out=t)  # (2)
                pairs.select(ds, t)
            sum_k[..., near, :] += sum_rows(ds, q_i, tiles.take(8, *k.shape[:-2], wide, D))  # (1)
            of_q = times(ds, finite_k[..., near, :], tiles.take(9, *n, high, D))  # (1)
            turns.wait((heads.number, i), earlier)
            dq[heads.index][..., rows, :] += of_q
        if row[j]:
            turns.next((heads.number, i))
    dk[group[0].group][..., cols, :], dv[group[0].group][..., cols, :] = sum_k, sum_v


# --- the small print: buffers, products, and what is left to `npattn.attention` ------------------------------------------


class Kept(NamedTuple):
    """What the forward keeps for the backward beside the inputs and lse."""

    out: Array  # (..., H, L, E) in the computing dtype
    total: Array  # (..., H, L) sum of exp(scores - lse): 1 but for rounding, 0 without a key, NaN where not all is finite


class Known(NamedTuple):
    """What the backward knows of each query. Rows without a key are 0."""

    do1: Array  # (..., H, L, E + 1) [dout, -off] / total
    off: Array  # (..., H, L) sum_j p_j dp_j - dlse
    lse: Array  # (..., H, L), 0 where it is -inf


class Tiles:
    """The arrays that one thread computes in, allocated once."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype, self.flat, self.one = dtype, dict[int, Array](), np.empty(0, dtype)
        self.hidden: Hidden = {}

    def take(self, number: int, *shape: int) -> Array:
        flat, size = self.flat.get(number), math.prod(shape)
        if flat is None or flat.size < size:
            flat = self.flat[number] = np.empty(size, self.dtype)
        return flat[:size].reshape(shape)

    def ones(self, n: int) -> Array:
        if self.one.size < n:
            self.one = np.ones(n, self.dtype)
        return self.one[:n]


def by_rows(x: Array) -> Array:
    """x, or a copy where BLAS cannot read it row by row: NumPy would make one for each product, or do without BLAS."""
    row, one = x.strides[-2:]
    fits = x.flags.aligned and one == x.itemsize and row % one == 0 and row >= x.shape[-1] * one
    return x if fits else np.ascontiguousarray(x)


def times(x: Array, y: Array, out: Array) -> Array:
    """x @ y for x of each head, (..., H, n, m), and y of each group, (..., G, m, o): heads of a group are more rows."""
    np.matmul(by_group(x, y), y, out=by_group(out, y))
    return out


def dots(x: Array, y: Array, out: Array) -> Array:
    """x @ y^T, for y (..., G, o, m)."""
    x, result = by_group(x, y), by_group(out, y)
    if 1 < x.shape[-2] <= FEW_ROWS < y.shape[-2]:
        result[...] = swap(np.matmul(y, swap(x)))  # BLAS would copy all of y to turn it, for few rows of x
    else:
        np.matmul(x, swap(y), out=result)
    return out


def sum_rows(x: Array, y: Array, out: Array) -> Array:
    """x^T @ y summed over the heads of each group: (..., H, n, m) and (..., H, n, o) to (..., G, m, o)."""
    return np.matmul(swap(by_group(x, out)), by_group(y, out), out=out)


def only(some: Array | None, x: Array) -> Array:
    """x, and 0 in its other rows, which may be NaN: nobody sees them, or they see nobody. None: all."""
    return x if some is None or some.all() else select(some[..., None], x)


def finite(m: Array) -> Array:
    """The top score, and 0 in rows without one."""
    return select(np.asarray(m != -np.inf), m)


def total_of(z: Array, shift: Array, lse: Array) -> Array:
    """The sum of exp(scores - lse): 1, but for the rounding of lse."""
    wide = np.float64 if z.dtype == np.float32 else z.dtype
    total: Array = z.astype(wide) * np.exp(shift.astype(wide) - lse.astype(wide))
    return total.astype(z.dtype)


def with_ones(x: Array, tiles: Tiles) -> Array:
    """[x, 1], and 0 in rows of x that are not finite, which nobody sees."""
    result = tiles.take(1, *x.shape[:-1], x.shape[-1] + 1)
    result[..., :-1], result[..., -1] = only(finite_or_not(x), x), 1
    return result


def sink_of(c: AttentionCache, heads: Heads) -> Array:
    """The sink of each of these heads, beside (..., L); -inf where there is none."""
    if c.sink is None:
        return np.asarray(-np.inf, c.computing)
    return np.asarray(c.sink.astype(c.computing, copy=False)[heads.names][..., None])


def sink_weight(c: AttentionCache, heads: Heads) -> Array:
    """p_sink = exp(sink - lse) / total; 0 where there is no sink."""
    sink, lse, total = sink_of(c, heads), c.lse[heads.index], c.kept.total[heads.index]
    return select(sink != -np.inf, np.exp(sink - select(lse != -np.inf, lse)) / select(total != 0, total, 1.0))


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

    def tile(self, index: Index, rows: slice, cols: slice) -> Array:
        result: Array = self.whole.tile(*self._of_whole(rows, cols))
        return result

    def new_gradient(self) -> Any:
        return self.total  # what all parts add to

    def add_gradient(self, total: Any, index: Index, rows: slice, cols: slice, dscores: Array) -> None:
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


def attend_by_rows(c: AttentionCache, heads: Heads, rows: slice, a: Array) -> tuple[Array, Array]:
    """lse, and out in a, as `npattn.attention` has them. Their total is NaN: the backward is left to it, too."""
    lse = np.empty(a.shape[:-1], c.computing)
    for index, own in zip(each_index(c, heads), np.ndindex(a.shape[:-2]), strict=True):
        for few in some_rows(c, rows):
            at = within(few, rows)
            (a[own][at], lse[own][at]), _ = dense_rows(c, index, few)
    return lse, np.full(lse.shape, np.nan, lse.dtype)


def some_rows(c: AttentionCache, rows: slice) -> list[slice]:
    few = max(FEW // max(c.k.shape[-2], 1), 1)
    return [slice(rows.start + x.start, rows.start + x.stop) for x in slices(rows.stop - rows.start, few)]


def differentiate_by_rows(
    c: AttentionCache, group: list[Heads], dout: Array, dlse: Array | None, dq: Array, dk: Array, dv: Array, dbias: Any
) -> list[tuple[Any, Array]]:
    """Heads that read the same keys, by `npattn.attention_backward`. Returns for each the part of dscale, and of dsink."""
    sums = {place: (np.zeros(dk[place].shape, c.computing), np.zeros(dv[place].shape, c.computing))
            for place in {group_of(c, index) for heads in group for index in each_index(c, heads)}}  # fmt: skip
    found = []
    for heads in group:
        dscale, dsink = c.computing.type(0), np.zeros(np.shape(heads.names), c.computing)
        for index, own in zip(each_index(c, heads), np.ndindex(dsink.shape), strict=True):
            sum_k, sum_v = sums[group_of(c, index)]
            for rows in some_rows(c, slice(0, c.q.shape[-2])):
                _, cache = dense_rows(c, index, rows, dbias)
                do, dl = dout[index][rows].astype(c.computing, copy=False), None if dlse is None else dlse[index][rows]
                g: Any = attention_backward(do, cache, dl)
                dq[index][rows] = g.q
                sum_k += g.k
                sum_v += g.v
                dscale += g.scale
                dsink[own] += 0 if g.sink is None else g.sink[0]
        found.append((dscale, dsink))
    for place, (sum_k, sum_v) in sums.items():
        dk[place], dv[place] = sum_k, sum_v
    return found


@own_keywords
@quiet
def blockwise(
    q: Array, k: Array, v: Array, *, mask: Pairs = None, bias: Pairs = None, scale: float | None = None,
    softcap: float | None = None, sink: Array | None = None, dropout_mask: Pairs = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """`blockwise_forward` without its cache, and without the copy of out that the backward needs (float16: in float32)."""
    c = bind("blockwise", q, k, v, mask, bias, scale, softcap, sink, dropout_mask, return_lse)
    out, cache = attend_all(c, keep=False)
    return (out, cache.lse) if return_lse else out


class MergeCache(NamedTuple):
    """What `merge_backward` needs."""

    out_a: Array  # (..., L, E), 0 where that part has no key; likewise out_b
    out_b: Array
    weight_a: Array  # (..., L, 1) share of that part in the sum of exp; 0 where it has no key
    weight_b: Array
    lse: Array  # (..., L)
    dtype: np.dtype[Any]


class MergeGrads(NamedTuple):
    """The gradients of `merge`."""

    out_a: Array
    lse_a: Array
    out_b: Array
    lse_b: Array


@own_keywords
@quiet
def merge_forward(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[tuple[Array, Array], MergeCache]:
    """Attention over two disjoint sets of keys from that over each.

        lse = log(exp(lse_a) + exp(lse_b))                                                          (1)
        w_a = exp(lse_a - lse),  w_b = exp(lse_b - lse)                                             (2)
        out = w_a out_a + w_b out_b                                                                 (3)

    out_a, out_b : (..., L, E)   lse_a, lse_b : (..., L) in nats, in the computing dtype; -inf = no key, and then what stands
    in that part's out is ignored. At most one part carries the sink: it would be counted twice.
    Returns (out, lse), and the cache. Raises TypeError, ValueError.
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
    dw_a, dw_b = ((dout * x).sum(-1, keepdims=True) for x in (c.out_a, c.out_b))  # (3)
    mean = c.weight_a * dw_a + c.weight_b * dw_b
    dlse_a, dlse_b = (
        select(w != 0, w * (dw - mean + dl))[..., 0] for w, dw in ((c.weight_a, dw_a), (c.weight_b, dw_b))
    )  # (2), (1)
    dout_a, dout_b = (select(w != 0, w * dout).astype(c.dtype, copy=False) for w in (c.weight_a, c.weight_b))  # (3)
    return MergeGrads(dout_a, dlse_a, dout_b, dlse_b)


merge = without_cache(merge_forward)

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
