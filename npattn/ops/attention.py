"""Scaled dot-product attention, forwards and backwards: the other modules refer to this page.

    scores = scale * q k^T                      (..., H, L, S)      (1)
    scores = softcap * tanh(scores / softcap)                       (2)    where a softcap is given
    scores = scores + bias                                          (3)
    scores = scores where allowed, else -inf                        (4)
    weights = softmax(scores)                                       (5)    a sink is one more logit, without a value
    dropped = weights * dropout_mask                                (6)
    out = dropped v                             (..., H, L, E)      (7)

The backward takes the same lines from (7) to (1). Only (5) mixes the elements of a row: with p the weights,
dscores_j = sum_l dp_l p_l ([l = j] - p_j) = p_j (dp_j - sum_l p_l dp_l), and p_sink = exp(sink - lse) is the sink's weight.
docs/attention-backward.md derives all of it. What may not be seen is selected away (`select`, `product`), never multiplied
by 0: 0 * NaN = NaN. Vaswani et al. 2017, "Attention is all you need", section 3.2.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npattn.ops.allowed import product, quiet, select, swap
from npattn.ops.calls import (
    AttentionCache,
    AttentionGrads,
    Call,
    add_head_axis,
    as_given,
    bind,
    check_cotangents,
    grads_of,
    visible,
    with_heads,
    zero_dead_rows,
)
from npattn.ops.checks import Array
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.heads import each_head, group_sum, head_sum, heads_first
from npattn.ops.pairs import ALL, Pairs
from npattn.ops.softmax import normalize, normalize_backward

# --- the plain case: no options, as many heads of k and v as of q --------------------------------------------------------


def plain_forward(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """out and weights. A test checks that it and its backward are equal to the code with all options."""
    scores = q.shape[-1] ** -0.5 * (q @ swap(k))  # (1)  (..., H, L, S)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    weights = e / e.sum(-1, keepdims=True)  # (5)  (..., H, L, S)
    return weights @ v, weights  # (7)  (..., H, L, E)


def plain_backward(dout: Array, q: Array, k: Array, v: Array, weights: Array) -> tuple[Array, Array, Array]:
    """dq, dk and dv of sum(dout * out)."""
    scale, dv = q.shape[-1] ** -0.5, swap(weights) @ dout  # (7)  (..., H, S, E)
    dweights = dout @ swap(v)  # (7)  (..., H, L, S)
    mean = (weights * dweights).sum(-1, keepdims=True)
    dscores = weights * (dweights - mean)  # (5)  (..., H, L, S)
    return scale * (dscores @ k), scale * (swap(dscores) @ q), dv  # (1)  (..., H, L, D), (..., H, S, D)


# --- with all options ----------------------------------------------------------------------------------------------------


def forward(c: Call) -> tuple[Array, Array, Array]:
    """out, weights and lse of a call with heads, in the computing dtype."""
    q, k, v = (each_head(x, c.q.shape[-3], c.computing) for x in (c.q, c.k, c.v))
    allowed, b = visible(c)
    scores = c.scale * (q @ swap(k))  # (1)  (..., H, L, S)
    if c.softcap is not None:
        scores = c.softcap * np.tanh(scores / c.softcap)  # (2)
    if b is not None:
        scores = scores + b  # (3)
    scores = select(allowed, scores, -np.inf)  # (4)
    sink = None if c.sink is None else heads_first(c.sink, scores.shape)
    weights, lse = normalize(scores, allowed, sink)  # (5)  (..., H, L, S), (..., H, L)
    dropped = weights if c.dropout is None else weights * c.dropout.tile((), ALL, ALL)  # (6)
    return product(dropped, v, allowed), weights, lse  # (7)  (..., H, L, E)


def backward(c: Call, weights: Array, lse: Array, dout: Array, dlse: Any, dbias: Any) -> tuple[Array, Array, Array, Any, Any]:
    """dq, dk, dv, dsink and dscale of a call with heads, in the computing dtype; the gradient of the bias is added to dbias."""
    q, k, v = (each_head(x, c.q.shape[-3], c.computing) for x in (c.q, c.k, c.v))
    dout, dl = zero_dead_rows(lse, dout, dlse)
    allowed, _ = visible(c)
    allowed_t = None if allowed is None else swap(allowed)
    drop = None if c.dropout is None else c.dropout.tile((), ALL, ALL)
    dropped = weights if drop is None else weights * drop  # as in (6)

    dv = product(swap(dropped), dout, allowed_t)  # (7)  (..., H, S, E)
    dweights = select(allowed, dout @ swap(v))  # (7)  (..., H, L, S)
    if drop is not None:
        dweights = dweights * drop  # (6)
    dscores, mean = normalize_backward(weights, dweights, dl)  # (5)  (..., H, L, S), (..., H, L, 1)
    dsink = None
    if c.sink is not None:
        sink = heads_first(c.sink, dscores.shape)
        terms = np.exp(sink - lse[..., None]) * (dl - mean)  # p_sink times the rest
        dsink = head_sum(select(sink != -np.inf, terms))  # (5)  (H,)
    dscores = select(allowed, dscores)  # (4)
    if c.bias is not None:
        c.bias.add_gradient(dbias, (), ALL, ALL, dscores)  # (3)
    if c.softcap is not None:
        t = np.tanh(c.scale * (q @ swap(k)) / c.softcap)
        dscores = select(allowed, dscores * (1 - t * t))  # (2)
    sums = product(dscores, k, allowed)  # (1)  (..., H, L, D)
    dk = c.scale * product(swap(dscores), q, allowed_t)  # (1)  (..., H, S, D)
    dscale = (q * sums).sum(where=sums != 0)  # (1)  sum_ij dscores_ij q_i . k_j; a query without keys may be NaN
    return c.scale * sums, group_sum(dk, c.k.shape[-3]), group_sum(dv, c.k.shape[-3]), dsink, dscale


# --- the public edge -----------------------------------------------------------------------------------------------------


@explain_keywords
@quiet
def attention_forward(
    q: Array, k: Array, v: Array, *, mask: Pairs = None, bias: Pairs = None, scale: float | None = None,
    softcap: float | None = None, sink: Array | None = None, dropout_mask: Pairs = None, return_lse: bool = False,
) -> tuple[Any, AttentionCache]:  # fmt: skip
    """Scaled dot-product attention, equations (1) to (7) of this page.

    q : (..., H, L, D)   k : (..., G, S, D)   v : (..., G, S, E); rank 2 means one head. Head h reads group h // (H // G).
    mask         : boolean, (L, S) or (..., H, L, S), axes may be 1, True = may attend; or a mask of `npattn.ops.masks`
    bias         : is added to the scores; an array of a shape as for mask, or an object of `npattn.ops.biases`
    scale        : a Python float, D ** -0.5 unless given; softcap : a positive float
    sink         : (H,), one more logit for every query of a head
    dropout_mask : 0 or 1/(1-p) for each pair, drawn by the caller; or a `Dropout`, of which no array is made
    Returns out (..., H, L, E), or (out, lse) with lse (..., H, L) in nats, and the cache.

    A query that may see no key has output 0 and lse -inf (with a sink: the sink). Raises TypeError, ValueError.

    >>> out, cache = attention_forward(np.eye(2), np.eye(2), np.array([[1.0], [3.0]]), scale=1.0)
    >>> out.round(4).tolist()
    [[1.5379], [2.4621]]
    """
    call = bind("attention", q, k, v, mask, bias, scale, softcap, sink, dropout_mask, return_lse)
    out, weights, lse = as_given(call, *forward(with_heads(call)))
    out = out.astype(q.dtype, copy=False)
    return (out, lse) if return_lse else out, AttentionCache(call, weights, lse)


@quiet
def attention_backward(dout: Array, cache: AttentionCache, dlse: Array | None = None) -> AttentionGrads:
    """The gradients of sum(dout * out) + sum(dlse * lse), by the equations of this page from (7) to (1).

    dout : (..., H, L, E), as out; dlse : (..., H, L) in the computing dtype; ignored where lse is -inf. Raises as the forward.
    """
    check_cotangents("attention", "weights", cache, dout, dlse)
    call = cache.call
    dbias = None if call.bias is None else call.bias.new_gradient()
    weights, lse, dout, dlse = add_head_axis(call, cache.weights, cache.lse, dout, dlse)
    dq, dk, dv, dsink, dscale = backward(with_heads(call), weights, lse, dout, dlse, dbias)
    return grads_of(call, dq, dk, dv, dbias, dsink, dscale)


attention = without_cache(attention_forward)

__all__ = ["AttentionCache", "AttentionGrads", "attention", "attention_backward", "attention_forward"]
