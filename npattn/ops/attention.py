"""Scaled dot-product attention, forwards and backwards: the page that everything else explains.

    scores = scale * q k^T                      (..., H, L, S)      (1)
    scores = softcap * tanh(scores / softcap)                       (2)    where a softcap is given
    scores = scores + bias                                          (3)
    scores = scores where allowed, else -inf                        (4)
    weights = softmax(scores)                                       (5)    a sink is one more logit, without a value
    dropped = weights * dropout_mask                                (6)
    out = dropped v                             (..., H, L, E)      (7)

The backward takes the same lines from (7) to (1). Only (5) mixes the elements of a row: with p the weights,
dscores_j = sum_l dp_l p_l ([l = j] - p_j) = p_j (dp_j - sum_l p_l dp_l), and p_sink = exp(sink - lse) is the sink's weight.
docs/attention-backward.md derives all of it. (5) is `normalize`, in softmax.py. What may not be seen is selected away
(`select`, `product`), never multiplied by 0: 0 * NaN = NaN. Vaswani et al. 2017, "Attention is all you need", section 3.2.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import product, quiet, select, swap
from npattn.ops.biases import bind_bias
from npattn.ops.checks import (
    Array,
    Dims,
    check_class,
    check_cotangent,
    check_dtype,
    check_flag,
    check_number,
    check_other_dtype,
)
from npattn.ops.edge import own_keywords, says_layout, without_cache
from npattn.ops.heads import each_head, group_sum, head_sum, heads_first
from npattn.ops.masks import bind_mask
from npattn.ops.pairs import ALL, Pairs, bind_dropout
from npattn.ops.softmax import normalize


class AttentionCache(NamedTuple):
    """What the backward needs: references to the inputs, the bound options, and what was computed."""

    q: Array  # (..., H, L, D)
    k: Array  # (..., G, S, D)
    v: Array  # (..., G, S, E)
    mask: Any  # bound to (..., H, L, S), or None; likewise bias and dropout
    bias: Any
    scale: Any
    softcap: Any
    sink: Array | None  # (H,)
    dropout: Any
    computing: np.dtype[Any]
    weights: Array | None = None  # (..., H, L, S) before dropout; None where they were never all there (blockwise)
    lse: Any = None  # (..., H, L) natural log of the sum of exp(scores) over the allowed keys, and of exp(sink)
    kept: Any = None  # of blockwise: out and total, see `npattn.ops.blockwise.Kept`


class AttentionGrads(NamedTuple):
    """The gradients of `attention`, as its inputs were given. That of scale is always there, the others if the input was."""

    q: Array
    k: Array
    v: Array
    bias: Any  # as the bias was given: an array of its shape, or an object that holds its parameters' gradients
    sink: Array | None
    scale: Any  # a NumPy scalar in the computing dtype


@own_keywords
@quiet
def attention_forward(
    q: Array, k: Array, v: Array, *, mask: Pairs = None, bias: Pairs = None, scale: float | None = None,
    softcap: float | None = None, sink: Array | None = None, dropout_mask: Pairs = None, return_lse: bool = False,
) -> tuple[Any, AttentionCache]:  # fmt: skip
    """Scaled dot-product attention, equations (1) to (7) of this page.

    q : (..., H, L, D)   k : (..., G, S, D)   v : (..., G, S, E); rank 2 means one head. Head h reads group h // (H // G).
    mask         : boolean, (L, S) or (..., H, L, S), axes may be 1, True = may attend; or a mask of `npattn.ops.masks`
    bias         : is added to the scores; an array of such a shape, or an object of `npattn.ops.biases`
    scale        : a Python float, D ** -0.5 unless given; softcap : a positive float
    sink         : (H,), one more logit for every query of a head
    dropout_mask : 0 or 1/(1-p) for each pair, drawn by the caller
    Returns out (..., H, L, E), or (out, lse) with lse (..., H, L) in nats, and the cache.

    A query that may see no key has output 0 and lse -inf (with a sink: the sink). Raises TypeError, ValueError.

    >>> out, cache = attention_forward(np.eye(2), np.eye(2), np.array([[1.0], [3.0]]), scale=1.0)
    >>> out.round(4).tolist()
    [[1.5379], [2.4621]]
    """
    c = bind("attention", q, k, v, mask, bias, scale, softcap, sink, dropout_mask, return_lse)
    heads = q.shape[-3] if q.ndim > 2 else 1
    q_, k_, v_ = (each_head(x, heads, c.computing) for x in (q, k, v))
    allowed, b = visible(c)
    scores = c.scale * (q_ @ swap(k_))  # (1)
    if softcap is not None:
        scores = c.softcap * np.tanh(scores / c.softcap)  # (2)
    if b is not None:
        scores = scores + b  # (3)
    scores = select(allowed, scores, -np.inf)  # (4)
    weights, lse = normalize(scores, allowed, None if sink is None else heads_first(sink, scores.shape))  # (5)
    dropped = weights if c.dropout is None else weights * c.dropout.dense()  # (6)
    out = product(dropped, v_, allowed).astype(q.dtype, copy=False)  # (7)
    return (out, lse) if return_lse else out, c._replace(weights=weights, lse=lse)


@quiet
def attention_backward(dout: Array, cache: AttentionCache, dlse: Array | None = None) -> AttentionGrads:
    """The gradients of sum(dout * out) + sum(dlse * lse), by the equations of this page from (7) to (1).

    dout : (..., H, L, E), as out; dlse : (..., H, L) in the computing dtype; ignored where lse is -inf. Raises as the forward.
    """
    check_cotangents("attention", cache, dout, dlse)
    c, heads = cache, cache.q.shape[-3] if cache.q.ndim > 2 else 1
    q, k, v = (each_head(x, heads, c.computing) for x in (c.q, c.k, c.v))
    dout, dl = live(c, dout, dlse)
    allowed, b = visible(c)
    allowed_t = None if allowed is None else swap(allowed)
    weights: Any = c.weights
    drop = None if c.dropout is None else c.dropout.dense()
    dropped = weights if drop is None else weights * drop  # as in (6)

    dv = product(swap(dropped), dout, allowed_t)  # (7)
    dweights = select(allowed, dout @ swap(v))  # (7)
    if drop is not None:
        dweights = dweights * drop  # (6)
    mean = (weights * dweights).sum(-1, keepdims=True)  # (5): sum_j p_j dp_j, often called Delta
    dscores = weights * (dweights - mean + dl)  # (5): softmax, and d lse / d scores_j = p_j
    dsink = dbias = None
    if c.sink is not None:
        sink = heads_first(c.sink, dscores.shape)
        terms = np.exp(sink - c.lse[..., None]) * (dl - mean)  # p_sink times the rest
        dsink = head_sum(select(sink != -np.inf, terms), heads).astype(c.sink.dtype, copy=False)  # (5)
    dscores = select(allowed, dscores)  # (4)
    if b is not None:
        total = c.bias.new_gradient()
        c.bias.add_gradient(total, (), ALL, ALL, dscores)
        dbias = c.bias.finish(total)  # (3)
    if c.softcap is not None:
        t = np.tanh(c.scale * (q @ swap(k)) / c.softcap)
        dscores = select(allowed, dscores * (1 - t * t))  # (2)
    sums = product(dscores, k, allowed)
    dq = (c.scale * sums).astype(c.q.dtype, copy=False)  # (1)
    dk = c.scale * product(swap(dscores), q, allowed_t)  # (1)
    dscale = (q * sums).sum(where=sums != 0)  # (1): sum_ij dscores_ij q_i . k_j; a query without keys may be NaN
    return AttentionGrads(dq, group_sum(dk, c.k), group_sum(dv, c.v), dbias, dsink, dscale)


attention = without_cache(attention_forward)


# --- the small print: checks, masks, grouped heads, rows without keys --------------------------------------------------


@says_layout
def bind(
    op: str, q: Any, k: Any, v: Any, mask: Any, bias: Any, scale: Any, softcap: Any, sink: Any, dropout_mask: Any,
    return_lse: Any = False,
) -> AttentionCache:  # fmt: skip
    """All checks of one call, and its options bound to the shape of the scores."""
    check_flag(op, "return_lse", return_lse)
    dims, computing = Dims(op), check_dtype(op, q=q, k=k, v=v)
    head, group = ("... H ", "... G ") if q.ndim > 2 else ("", "")
    dims.fit("q", q, head + "L D")
    dims.fit("k", k, group + "S D")
    dims.fit("v", v, group + "S E")
    H, G = (dims["H"], dims["G"]) if q.ndim > 2 else (1, 1)
    if H % G if G else H:
        raise ValueError(f"{op}: k has G={G} heads, expected a number that divides H={H}: H is fixed by q")
    shape = (*q.shape[:-1], dims["S"])
    scale = check_number(op, "scale", (dims["D"] or 1) ** -0.5 if scale is None else scale, computing)
    if softcap is not None:
        softcap = check_number(op, "softcap", softcap, computing, positive=True)
    if sink is not None:
        dims.fix("q", H=H)
        dims.fit("sink", check_other_dtype(op, "sink", sink, q.dtype, computing), "H")
    return AttentionCache(
        q, k, v, bind_mask(op, mask, shape), bind_bias(op, bias, shape, q.dtype, computing), scale, softcap, sink,
        bind_dropout(op, dropout_mask, shape, q.dtype, computing), computing,
    )  # fmt: skip


def check_cotangents(op: str, c: AttentionCache, dout: Any, dlse: Any) -> None:
    check_class(op, "cache", c, AttentionCache, f", from {op}_forward")
    if (c.weights if op == "attention" else c.kept) is None:
        raise ValueError(f"{op}: cache is that of the other forward, expected that of {op}_forward")
    check_cotangent(op, "dout", dout, (*c.q.shape[:-1], c.v.shape[-1]), c.q.dtype, c.computing)
    if dlse is not None:
        check_cotangent(op, "dlse", dlse, c.lse.shape, c.computing, c.computing)


def visible(c: AttentionCache, index: Any = (), rows: slice = ALL, cols: slice = ALL) -> tuple[Any, Any]:
    """Which pairs are allowed (None: all), and the bias, of ``scores[index][..., rows, cols]``."""
    allowed = None if c.mask is None else c.mask.tile(index, rows, cols)
    bias = None if c.bias is None else c.bias.tile(index, rows, cols)
    if bias is not None and (masked := bias.real == -np.inf).any():  # a bias of -inf is a mask in every respect
        allowed = ~masked if allowed is None else allowed & ~masked
    return allowed, bias


def live(c: AttentionCache, dout: Array, dlse: Any) -> tuple[Array, Any]:
    """dout (..., L, E) and dlse (..., L, 1) in the computing dtype, 0 in rows whose lse is -inf."""
    alive = c.lse[..., None] != -np.inf
    dout = select(alive, dout.astype(c.computing, copy=False))
    return dout, 0.0 if dlse is None else select(alive, dlse[..., None])


__all__ = ["AttentionCache", "AttentionGrads", "attention", "attention_backward", "attention_forward"]
