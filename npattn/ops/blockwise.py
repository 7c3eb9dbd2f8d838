"""Attention in tiles, by online softmax, on all cores: the results of `npattn.attention` in O(L + S) memory.

A tile of scores fits into the second-level cache. For a tile of queries the keys are visited a tile at a time. With m the
largest score so far, and e_j = exp(s_j - m'):

    m' = max(m, max_j s_j)             r = exp(m - m')               (5a)   earlier sums are rescaled to the new maximum
    z' = r z + sum_j e_j               a' = r a + sum_j e_j v_j      (5b)
    out = a / z                        lse = m + log z               (5c)   after the last tile

First it is tried with m = 0, without (5a): z shows in the end whether exp has left its range. Where exp2 is faster than exp it
is 2^(s_j log2 e), with log2 e in the scale (npattn/ops/exponentials.py). The backward visits each tile
once, with p_j = exp(s_j - lse) / total. Here total is the sum of exp(s_j - lse): it is 1 up to the rounding of lse, and is kept
so that p is as exact as the dense weights. sum_j p_j dp_j is dout . out. One more column in the product subtracts it from dp:
[do, -offset] [v, 1]^T = do v^T - offset (both divided by total).

(1) to (4), (6) and (7) are those of `npattn.ops.attention`. If NaN, inf or an overflow is seen, its dense code takes over: in
the forward for a tile of queries, in the backward for all heads that read the same keys. docs/blockwise.md derives all of it.
Milakov and Gimelshein 2018; Dao et al. 2022. Which blocks are computed: npattn/ops/tiles.py.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npattn.ops import attention as dense
from npattn.ops.allowed import quiet, select
from npattn.ops.calls import (
    AttentionCache,
    AttentionGrads,
    Call,
    add_head_axis,
    as_given,
    bind,
    check_cotangents,
    grads_of,
    with_heads,
)
from npattn.ops.checks import Array, Shape
from npattn.ops.edge import explain_keywords
from npattn.ops.exponentials import BASE_2, BASE_E, LEAST, Base, total_of
from npattn.ops.pairs import Pairs, Part
from npattn.ops.products import (
    Buffers,
    dots,
    finite_maximum,
    finite_or_not,
    sum_rows,
    times,
    with_contiguous_rows,
    with_ones,
    zero_other_rows,
)
from npattn.ops.threads import Turns, share
from npattn.ops.tiles import SIZES, Heads, Plan, Sizes, in_parts, within


class Kept(NamedTuple):
    """What the forward keeps for the backward besides the call and lse. Always with an axis of heads."""

    out: Array  # (..., H, L, E) in the computing dtype
    total: Array  # (..., H, L) sum of exp(scores - lse): 1 up to rounding, 0 without a key, NaN if the dense code took over
    sizes: Sizes
    bases: dict[tuple[int, int], Base]  # of the exponentials, by number of heads and of tile of queries


# --- the public edge -----------------------------------------------------------------------------------------------------


@explain_keywords
@quiet
def blockwise_forward(
    q: Array, k: Array, v: Array, *, mask: Pairs = None, bias: Pairs = None, scale: float | None = None,
    softcap: float | None = None, sink: Array | None = None, dropout_mask: Pairs = None, return_lse: bool = False,
) -> tuple[Any, AttentionCache]:  # fmt: skip
    """`npattn.attention_forward` without an array of L x S elements; ``cache.weights`` is None.

    Beyond inputs and outputs it needs a copy of out, a few numbers for each query, some tiles for each thread, and a copy of k
    if its rows are not contiguous. Masks, biases and dropout masks are asked for their tiles, and tiles without an allowed pair
    are skipped. The result does not depend on the number of threads.
    """
    out, cache = forward(bind("blockwise", q, k, v, mask, bias, scale, softcap, sink, dropout_mask, return_lse))
    return (out, cache.lse) if return_lse else out, cache


@quiet
def blockwise_backward(dout: Array, cache: AttentionCache, dlse: Array | None = None) -> AttentionGrads:
    """`npattn.attention_backward` without an array of L x S elements, and independent of the number of threads.

    dout : (..., H, L, E), as out; dlse : (..., H, L) in the computing dtype; both are ignored in rows whose lse is -inf.
    Raises TypeError, ValueError, as the forward does.
    """
    check_cotangents("blockwise", "kept", cache, dout, dlse)
    call = cache.call
    return grads_of(call, *Backward(with_heads(call), cache.kept, *add_head_axis(call, cache.lse, dout, dlse)).run())


@explain_keywords
@quiet
def blockwise(
    q: Array, k: Array, v: Array, *, mask: Pairs = None, bias: Pairs = None, scale: float | None = None,
    softcap: float | None = None, sink: Array | None = None, dropout_mask: Pairs = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """`blockwise_forward` without its cache, and without the copy of out that the backward needs (float16: in float32)."""
    call = bind("blockwise", q, k, v, mask, bias, scale, softcap, sink, dropout_mask, return_lse)
    out, cache = forward(call, keep=False)
    return (out, cache.lse) if return_lse else out


# --- forwards ------------------------------------------------------------------------------------------------------------


def forward(call: Call, sizes: Sizes = SIZES, keep: bool = True) -> tuple[Array, AttentionCache]:
    """out, and the cache. keep : the cache gets a copy of out, so that the caller may write into out before the backward"""
    c = with_heads(call)
    plan = Plan(c._replace(k=with_contiguous_rows(c.k)), sizes)
    kept = np.empty((*c.q.shape[:-1], c.v.shape[-1]), c.computing)
    out = np.empty(kept.shape, c.q.dtype) if keep or c.q.dtype != c.computing else kept
    lse, total = (np.empty(c.q.shape[:-1], c.computing) for _ in range(2))

    def work(task: tuple[int, Heads], buffers: Buffers) -> None:
        i, heads = task
        rows = plan.rows[i]
        a = kept[heads.index][..., rows, :]
        lse[heads.index][..., rows], total[heads.index][..., rows] = (
            attend(plan, heads, i, buffers, a, True)
            or attend(plan, heads, i, buffers, a, False)
            or attend_by_rows(plan, heads, i, a)
        )
        if kept is not out:
            out[heads.index][..., rows, :] = a

    tasks = itertools.product(reversed(range(len(plan.rows))), plan.heads)
    share(work, tasks, partial(Buffers, c.computing), most=plan.most, threads=sizes.threads)
    out, lse = as_given(call, out, lse)
    return out, AttentionCache(call, None, lse, Kept(kept, total, sizes, plan.bases))


def attend(
    plan: Plan, heads: Heads, i: int, buffers: Buffers, a: Array, steady: bool, base: Base | None = None
) -> tuple[Array, Array] | None:
    """lse and total of the queries of tile i of some heads; their out is written into a. None if a number is not finite.

    steady : m stays 0; None is also returned if that loses digits.  base : of the exponentials, if it is not the fastest one
    """
    c, rows, blocks = plan.call, plan.rows[i], list(itertools.chain(*plan.blocks(heads, i)))
    base = base or (plan.base if steady else BASE_E)
    scale, softcap = in_base(base, c)
    given = c.q[heads.index][..., rows, :].astype(c.computing, copy=False)
    q = np.multiply(scale, given, out=buffers.take("q", *given.shape))
    if abs(scale) > 1:  # scale q may overflow where scale (q . k) is a number
        over = (np.isfinite(given) & ~np.isfinite(q)).any(-1)
        if over.any() and (over & plan.queries_with_keys(heads, i, buffers)).any():
            return None
    n, E = q.shape[:-2], c.v.shape[-1]
    k, v = c.k[heads.group], c.v[heads.group]
    sink, sink_term, m = base.scaled(sink_of(c, heads)), np.zeros((), c.computing), np.zeros((), c.computing).real
    if not steady:
        m = np.zeros(q.shape[:-1], m.dtype) + sink.real
    if c.sink is not None:
        sink_term = select(sink != -np.inf, base.power(sink - m))  # of z: the sink is one more logit, without a value
    z = np.zeros(q.shape[:-1], c.computing) + sink_term
    a[...] = 0
    for block in blocks:
        at, cols = within(block.rows, rows), block.cols
        high, wide = at.stop - at.start, cols.stop - cols.start
        pairs = plan.pairs_of(heads, block, buffers)
        k_j, v_j = (x[..., cols, :].astype(c.computing, copy=False) for x in (k, v))
        s = dots(q[..., at, :], k_j, buffers.take("scores", *n, high, wide))  # (1)
        if c.softcap is not None:
            s /= c.softcap
            np.tanh(s, out=s)
            s *= softcap  # (2)
        if pairs.bias is not None:
            s += pairs.bias  # (3)
        if base is BASE_2 and block is blocks[0] and pairs.sample(s).min(initial=0.0) < LEAST:
            return attend(plan, heads, i, buffers, a, steady, BASE_E)
        if not steady:
            pairs.hide(s)  # (4)
            top = np.maximum(m[..., at], s.real.max(-1, initial=-np.inf))  # (5a)
            shift = finite_maximum(top)
            r = base.power(m[..., at] - shift)
            m[..., at] = top
            z[..., at] *= r
            a[..., at, :] *= r[..., None]
            s -= shift[..., None]
        e = base.power(s, out=s)
        pairs.clear(e)  # (4): behind the exponential, because exp2 is slow where it has to give 0
        z[..., at] += e @ buffers.ones(wide)  # (5b)
        if c.dropout is not None:
            e *= c.dropout.tile(heads.index, block.rows, cols)  # (6)
        a[..., at, :] += times(e, zero_other_rows(pairs.seen_keys, v_j), buffers.take("e v", *n, high, E))  # (7), (5b)
        if steady and block is blocks[0] and not np.isfinite(z).all():
            return None  # early: the rest would be for nothing
    least = np.finfo(c.computing).eps if steady else 0.0  # below it, lost subnormal terms would count
    if not (np.isfinite(z).all() and np.isfinite(a).all()):
        return None
    plan.bases[heads.number, i], m = base, m if steady else finite_maximum(m)
    if ((z != sink_term) & (z.real >= least)).all():
        a /= z[..., None]  # (5c)
        lse = base.unscaled(m + base.log(z))  # (5c)
        return lse, total_of(z, m, base.scaled(lse), base)
    seen = plan.queries_with_keys(heads, i, buffers)
    if not (z.real >= least).all(where=seen):
        return None
    a /= np.where(z == 0, 1, z)[..., None]
    lse = np.where(seen & (z != 0), base.unscaled(m + base.log(z)), sink_of(c, heads))  # exactly the sink
    return lse, np.where(seen, total_of(z, m, base.scaled(lse), base), 0)


def in_base(base: Base, c: Call) -> tuple[Any, Any]:
    """scale and softcap for scores in the unit of a base: it is multiplied into the one that comes last."""
    return (base.scaled(c.scale), None) if c.softcap is None else (c.scale, base.scaled(c.softcap))


def sink_of(c: Call, heads: Heads) -> Array:
    """The sink of each of these heads, (..., 1) to be broadcast over L; -inf if there is none."""
    if c.sink is None:
        return np.asarray(-np.inf, c.computing)
    return np.asarray(c.sink.astype(c.computing, copy=False)[heads.head_numbers][..., None])


# --- backwards -----------------------------------------------------------------------------------------------------------


class Backward:
    """The gradients of one call with an axis of heads. Everything about a query without keys is set to 0."""

    def __init__(self, c: Call, kept: Kept, lse: Array, dout: Array, dlse: Array | None) -> None:
        self.c, self.kept, self.lse, self.dout, self.dlse = c._replace(k=with_contiguous_rows(c.k)), kept, lse, dout, dlse
        self.plan, self.turns = Plan(self.c, kept.sizes), Turns()
        self.do1 = np.empty((*dout.shape[:-1], dout.shape[-1] + 1), c.computing)  # (..., H, L, E + 1) [dout, -offset] / total
        self.offset = np.empty_like(kept.total)  # (..., H, L) sum_j p_j dp_j - dlse
        self.shift = np.empty_like(kept.total)  # (..., H, L) lse, in the unit of the scores
        self.dq, self.dk, self.dv = (np.zeros(x.shape, c.computing) for x in (c.q, c.k, c.v))
        self.dbias: Any = None if c.bias is None else c.bias.new_gradient()
        self.dscales, self.dsinks = dict[int, Any](), dict[int, Array]()  # by `Heads.number`
        self.finite_heads = set[int]()  # numbers of the heads that see only finite numbers

    def run(self) -> tuple[Array, Array, Array, Any, Any, Any]:
        """dq, dk, dv, dbias, dsink and dscale."""
        c, plan, sizes, dbias = self.c, self.plan, self.kept.sizes, self.dbias
        on_threads = partial(share, buffers=partial(Buffers, c.computing), threads=sizes.threads)
        most = plan.most
        light = 1 if max(c.q.size, c.k.size, c.v.size) < sizes.light else most
        one_adds = 1 if dbias is not None else most
        on_threads(self.prepare, plan.heads, most=light)
        groups = [list(same) for _, same in itertools.groupby(plan.heads, lambda heads: heads.group)]
        tiled = [group for group in groups if all(heads.number in self.finite_heads for heads in group)]
        others = [group for group in groups if not all(heads.number in self.finite_heads for heads in group)]
        tasks = list(itertools.product(range(len(plan.cols)), tiled))
        # Each task has a gradient of the bias of its own if they are small; otherwise one thread adds to a single one.
        own_gradients = isinstance(dbias, np.ndarray) and dbias.size * len(tasks) <= sizes.own_gradients
        totals = [c.bias.new_gradient() if own_gradients else dbias for _ in tasks]
        adders = most if own_gradients else one_adds
        on_threads(self.differentiate, zip(tasks, totals, strict=True), turns=self.turns, most=adders)
        on_threads(self.finish, itertools.chain(*tiled), most=light)
        on_threads(self.dense_by_rows, others, most=one_adds)

        for total in totals if own_gradients else ():
            dbias += total
        dsink: Any = None if c.sink is None else np.zeros(c.sink.shape, c.computing)
        for heads in plan.heads if dsink is not None else ():
            np.add.at(dsink, heads.head_numbers, self.dsinks[heads.number])
        dscale = sum((self.dscales[number] for number in sorted(self.dscales)), c.computing.type(0))
        return self.dq, self.dk, self.dv, dbias, dsink, dscale

    def prepare(self, heads: Heads, buffers: Buffers) -> None:
        """What each query needs in all its tiles, and whether everything that these heads see is finite."""
        index, E = heads.index, self.c.v.shape[-1]
        do, offset, total, lse = (x[index] for x in (self.dout, self.offset, self.kept.total, self.lse))
        alive, total = total != 0, select(total != 0, total, 1.0)
        do = zero_other_rows(alive, do.astype(self.c.computing, copy=False))
        np.einsum("...le,...le->...l", do, self.kept.out[index], out=offset)  # (7), (5): sum_j p_j dp_j = dout . out
        if self.dlse is not None:
            offset -= select(lse != -np.inf, self.dlse[index])  # (5) subtracts offset from dp
        do1 = self.do1[index]
        np.divide(do, total[..., None], out=do1[..., :E])
        do1[..., E] = -offset / total
        for i, rows in enumerate(self.plan.rows):
            self.shift[index][..., rows] = self.base(heads, i).scaled(select(lse != -np.inf, lse)[..., rows])
        scaled = (self.scaled_queries(heads, i, rows, buffers) for i, rows in enumerate(self.plan.rows))
        finite = all(np.isfinite(x).all() for x in itertools.chain((total, do1), scaled))
        if finite and all_seen_are_finite(self.plan, heads, buffers):
            self.finite_heads.add(heads.number)

    def base(self, heads: Heads, i: int) -> Base:
        return self.kept.bases.get((heads.number, i), BASE_E)

    def scaled_queries(self, heads: Heads, i: int, rows: slice, buffers: Buffers) -> Array:
        """scale q, as in the forward, and 0 in rows without a key."""
        alive = self.kept.total[heads.index][..., rows] != 0
        q = zero_other_rows(alive, self.c.q[heads.index][..., rows, :].astype(self.c.computing, copy=False))
        result = buffers.take("q", *q.shape)
        np.multiply(in_base(self.base(heads, i), self.c)[0], q, out=result)
        return result

    def differentiate(self, task: tuple[tuple[int, list[Heads]], Any], buffers: Buffers) -> None:
        """dk and dv of a tile of keys of one group (or of small heads), and what these keys add to dq and dbias."""
        ((j, group), dbias), c, plan, turns = task, self.c, self.plan, self.turns
        cols, (D, E) = plan.cols[j], (c.k.shape[-1], c.v.shape[-1])
        k = c.k[group[0].group][..., cols, :].astype(c.computing, copy=False)
        finite_k, v = zero_other_rows(finite_or_not(k), k), with_ones(c.v[group[0].group][..., cols, :], buffers)
        dk, dv = (x[group[0].group][..., cols, :] for x in (self.dk, self.dv))
        for heads, i in itertools.product(group, range(len(plan.rows))):
            row, do, base = plan.blocks(heads, i), self.do1[heads.index], self.base(heads, i)
            earlier = sum(map(bool, row[:j]))
            for block in row[j]:
                rows, near = block.rows, within(block.cols, cols)
                pairs = plan.pairs_of(heads, block, buffers)
                q_i, do_i = self.scaled_queries(heads, i, rows, buffers), do[..., rows, :]
                k_j, v_j = k[..., near, :], v[..., near, :]
                n, high, wide = q_i.shape[:-2], rows.stop - rows.start, near.stop - near.start
                s, dp = buffers.take("scores", *n, high, wide), buffers.take("dp", *n, high, wide)
                dots(q_i, k_j, s)  # (1), from the same arrays as in the forward: the last bit of a large score counts
                if c.softcap is not None:
                    s /= c.softcap
                    t = np.tanh(s, out=buffers.take("tanh", *n, high, wide))
                    np.multiply(t, in_base(base, c)[1], out=s)  # (2)
                if pairs.bias is not None:
                    s += pairs.bias  # (3)
                s -= self.shift[heads.index][..., rows, None]
                p = base.power(s, out=s)  # (5), times total
                pairs.clear(p)  # (4)
                if c.dropout is None:
                    dropped = p
                    dots(do_i, v_j, dp)  # (7): dp less its mean
                else:
                    drop = c.dropout.tile(heads.index, rows, block.cols)
                    dropped = np.multiply(p, drop, out=buffers.take("dropped", *n, high, wide))  # (6)
                    dots(do_i[..., :E], v_j[..., :E], dp)  # (7)
                    dp *= drop  # (6)
                    dp += do_i[..., E:]
                more = buffers.take("more", *k.shape[:-2], wide, E)
                dv[..., near, :] += sum_rows(dropped, do_i[..., :E], more)  # (7)
                ds = np.multiply(p, dp, out=s)  # (5)
                pairs.select(ds, dp)  # (4)
                if dbias is not None:
                    c.bias.add_gradient(dbias, heads.index, rows, block.cols, ds)  # (3)
                if c.softcap is not None:
                    np.square(t, out=t)
                    ds *= np.subtract(1, t, out=t)  # (2)
                    pairs.select(ds, t)
                of_k = sum_rows(ds, q_i, buffers.take("more", *k.shape[:-2], wide, D))  # (1)
                dk[..., near, :] += of_k if c.softcap is not None else base.unscaled(of_k, of_k)
                of_q = times(ds, finite_k[..., near, :], buffers.take("dq", *n, high, D))  # (1)
                turns.wait((heads.number, i), earlier)
                self.dq[heads.index][..., rows, :] += of_q
            if row[j]:
                turns.next((heads.number, i))

    def finish(self, heads: Heads, buffers: Buffers) -> None:
        """What is done once for each query, after the sums over its keys."""
        x, y = self.c.q[heads.index].astype(self.c.computing, copy=False), self.dq[heads.index]
        dscale = np.einsum("...ld,...ld->...l", x, y).sum()  # (1): sum_ij dscores_ij q_i . k_j
        self.dscales[heads.number] = dscale if np.isfinite(dscale) else (x * y).sum(where=y != 0)
        y *= self.c.scale  # (1)
        if self.c.sink is not None:
            sink, total = sink_of(self.c, heads), self.kept.total[heads.index]
            some = np.asarray(sink != -np.inf)  # a sink of -inf is none, even if other numbers are NaN
            e_sink = np.empty_like(total)
            for i, rows in enumerate(self.plan.rows):
                base = self.base(heads, i)
                e_sink[..., rows] = base.power(base.scaled(sink) - self.shift[heads.index][..., rows])
            p_sink = select(some, e_sink / select(total != 0, total, 1.0))
            self.dsinks[heads.number] = -select(some, p_sink * self.offset[heads.index]).sum(-1)  # (5)

    def dense_by_rows(self, group: list[Heads], buffers: Buffers) -> None:
        """Heads that read the same keys, by the code of `npattn.ops.attention`, a few queries at a time."""
        c, plan = self.c, self.plan
        places = {plan.group_of(index) for heads in group for index in plan.each_index(heads)}
        sums = {place: tuple(np.zeros(x[place].shape, c.computing) for x in (self.dk, self.dv)) for place in places}
        for heads in group:
            dscale, dsinks = c.computing.type(0), np.zeros(np.shape(heads.head_numbers), c.computing)
            for index, own in zip(plan.each_index(heads), np.ndindex(dsinks.shape), strict=True):
                sum_k, sum_v = sums[plan.group_of(index)]
                for rows in some_rows(plan, slice(0, plan.L)):
                    part = dense_rows(plan, index, rows)
                    _, weights, lse = dense.forward(part)
                    do = self.dout[index][rows][None].astype(c.computing, copy=False)
                    dl = None if self.dlse is None else self.dlse[index][rows][None]
                    dq, dk, dv, dsink, more = dense.backward(part, weights, lse, do, dl, self.dbias)
                    self.dq[index][rows] = dq[0]
                    sum_k += dk[0]
                    sum_v += dv[0]
                    dscale += more
                    dsinks[own] += 0 if dsink is None else dsink[0]
            self.dscales[heads.number], self.dsinks[heads.number] = dscale, dsinks
        for place, (sum_k, sum_v) in sums.items():
            self.dk[place], self.dv[place] = sum_k, sum_v


def all_seen_are_finite(plan: Plan, heads: Heads, buffers: Buffers) -> bool:
    """Whether all keys and values that are seen are finite. Scores need not show it: they may be -inf, or capped."""
    good = [some for some in (finite_or_not(x[heads.group]) for x in (plan.call.k, plan.call.v)) if some is not None]
    if not good:
        return True
    bad = ~(good[0] & good[-1])
    for block in itertools.chain(*(itertools.chain(*plan.blocks(heads, i)) for i in range(len(plan.rows)))):
        if bad[..., block.cols].any():
            pairs = plan.pairs_of(heads, block, buffers)
            if (bad[..., block.cols] & (True if pairs.seen_keys is None else pairs.seen_keys)).any():
                return False
    return True


# --- what the code of `npattn.ops.attention` takes over --------------------------------------------------------------------


def attend_by_rows(plan: Plan, heads: Heads, i: int, a: Array) -> tuple[Array, Array]:
    """lse of the queries of tile i; out is written into a. Their total is NaN, so that the backward uses dense code, too."""
    lse = np.empty(a.shape[:-1], plan.call.computing)
    for index, own in zip(plan.each_index(heads), np.ndindex(a.shape[:-2]), strict=True):
        for few in some_rows(plan, plan.rows[i]):
            at = within(few, plan.rows[i])
            out, _, of_rows = dense.forward(dense_rows(plan, index, few))
            a[own][at], lse[own][at] = out[0], of_rows[0]
    return lse, np.full(lse.shape, np.nan, lse.dtype)


def some_rows(plan: Plan, rows: slice) -> list[slice]:
    few = max(plan.sizes.dense // max(plan.S, 1), 1)
    return [slice(rows.start + x.start, rows.start + x.stop) for x in in_parts(rows.stop - rows.start, few)]


def dense_rows(plan: Plan, index: Shape, rows: slice) -> Call:
    """The call for some queries of one head alone."""
    c, group = plan.call, plan.group_of(index)
    q, k, v = (x.astype(c.computing, copy=False)[None] for x in (c.q[index][rows], c.k[group], c.v[group]))
    mask, bias, dropout = (None if x is None else Part(x, index, rows, plan.S) for x in (c.mask, c.bias, c.dropout))
    sink = None if c.sink is None else c.sink[index[-1] :][:1].astype(c.computing, copy=False)
    return Call(q, k, v, mask, bias, c.scale, c.softcap, sink, dropout, c.computing)


__all__ = ["blockwise", "blockwise_backward", "blockwise_forward"]
