"""The feed-forward layer of a Transformer, plain and gated.

    a = x w_in + b_in                    (..., M) -> (..., F)        (1)    the value
    u = x w_gate + b_gate                (..., M) -> (..., F)        (2)    the gate, if there is one
    h = f(a)    or, gated,    f(u) a     (..., F)                    (3)    f is the activation
    h * dropout                          (..., F)                    (4)    where there is a dropout mask
    y = h w_out + b_out                  (..., F) -> (..., M_out)    (5)

Vaswani et al. 2017, section 3.3. Gated, it is GLU with "sigmoid" (Dauphin et al. 2017), SwiGLU with "silu", GeGLU with "gelu",
and ReGLU with "relu" (Shazeer 2020).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.activations import ACTIVATIONS, ELSEWHERE
from npattn.ops.allowed import quiet, select
from npattn.ops.checks import Array, Dims, check_class, check_cotangent, check_dtype, check_one_of, check_other_dtype, kind
from npattn.ops.dropout import check_dropout_mask, masked
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.linear import project, project_backward


class FeedForwardParams(NamedTuple):
    """Weights (in, out), applied as x @ w. A bias may be None; the layer is gated if w_gate is given."""

    w_in: Array  # (M, F)
    w_out: Array  # (F, M_out)
    b_in: Array | None = None  # (F,)
    b_out: Array | None = None  # (M_out,)
    w_gate: Array | None = None  # (M, F)
    b_gate: Array | None = None  # (F,)


class FeedForwardCache(NamedTuple):
    """What the backward needs; what the forward computed is in the computing dtype."""

    x: Array  # (..., M)
    params: FeedForwardParams
    activation: str
    inner: Any  # the cache of f
    value: Array | None  # (..., F) a, where the layer is gated
    gate: Array | None  # (..., F) f(u), where the layer is gated
    dropout_mask: Array | None  # (..., F)
    hidden: Array  # (..., F) h, after dropout


class FeedForwardGrads(NamedTuple):
    """The gradients of `feed_forward`; those of params have its names."""

    x: Array
    params: FeedForwardParams


@explain_keywords
@quiet
def feed_forward_forward(
    x: Array, params: FeedForwardParams, *, activation: str = "gelu", dropout_mask: Array | None = None
) -> tuple[Array, FeedForwardCache]:
    """Two products and an activation between them, equations (1) to (5) of this page.

    x          : (..., M), any rank   params : see `FeedForwardParams`
    activation : "gelu", "gelu_tanh", "relu", "squared_relu", "silu" or "sigmoid"
    dropout_mask : (..., F), 0 or 1 / (1 - p), as ``Dropout(p, seed).mask((*x.shape[:-1], F), x.dtype)``
    Returns y (..., M_out), and the cache. Raises TypeError, ValueError.
    """
    check_one_of("feed_forward", "activation", activation, ACTIVATIONS, ELSEWHERE)
    computing, p = _check(x, params, dropout_mask), params
    f, _ = ACTIVATIONS[activation]
    a = project(x, p.w_in, p.b_in, computing)  # (1)
    if p.w_gate is None:
        value, gate = None, None
        h, inner = f(a)  # (3)
    else:
        u = project(x, p.w_gate, p.b_gate, computing)  # (2)
        value, (gate, inner) = a, f(u)
        h = gate * value  # (3)
    h = h if dropout_mask is None else masked(h, dropout_mask)  # (4)
    y = project(h, p.w_out, p.b_out, computing)  # (5)
    return y.astype(x.dtype, copy=False), FeedForwardCache(x, params, activation, inner, value, gate, dropout_mask, h)


@quiet
def feed_forward_backward(dy: Array, cache: FeedForwardCache) -> FeedForwardGrads:
    """The gradients of sum(dy * y) for x and the parameters, from (5) to (1).

    dy : (..., M_out), as y. Raises TypeError, ValueError.
    """
    check_class("feed_forward", "cache", cache, FeedForwardCache, ", from feed_forward_forward")
    c, p, computing = cache, cache.params, cache.hidden.dtype
    dy = check_cotangent("feed_forward", "dy", dy, (*c.x.shape[:-1], p.w_out.shape[1]), c.x.dtype, computing)
    x, (_, f_backward) = c.x.astype(computing, copy=False), ACTIVATIONS[c.activation]

    dh, dw_out, db_out = project_backward(dy, c.hidden, p.w_out, p.b_out)  # (5)
    dh = dh if c.dropout_mask is None else masked(dh, c.dropout_mask)  # (4)
    if p.w_gate is None:
        dw_gate, db_gate = None, None
        dx, dw_in, db_in = project_backward(f_backward(dh, c.inner).x, x, p.w_in, p.b_in)  # (3), (1)
    else:
        dgate, da = (select(dh != 0, dh * other) for other in (c.value, c.gate))  # (3); a dead token may hold NaN
        dx_gate, dw_gate, db_gate = project_backward(f_backward(dgate, c.inner).x, x, p.w_gate, p.b_gate)  # (3), (2)
        dx, dw_in, db_in = project_backward(da, x, p.w_in, p.b_in)  # (1)
        dx += dx_gate  # x is in (1) and in (2)
    return FeedForwardGrads(dx.astype(c.x.dtype, copy=False), FeedForwardParams(dw_in, dw_out, db_in, db_out, dw_gate, db_gate))


def _check(x: Any, params: Any, dropout_mask: Any) -> np.dtype[Any]:
    op = "feed_forward"
    check_class(op, "params", params, FeedForwardParams)
    computing, dims = check_dtype(op, x=x), Dims(op)
    dims.fit("x", x, "... M")
    if params.w_gate is None and params.b_gate is not None:
        raise ValueError(f"{op}: b_gate is {kind(params.b_gate)}, expected None: w_gate is None")
    specs = {"w_in": "M F", "b_in": "F", "w_gate": "M F", "b_gate": "F", "w_out": "F M_out", "b_out": "M_out"}
    for name, spec in specs.items():
        p = getattr(params, name)
        if p is not None or name in ("w_in", "w_out"):
            dims.fit(name, check_other_dtype(op, name, p, x.dtype, computing), spec)
    if dropout_mask is not None:
        dims.fit("dropout_mask", check_dropout_mask(op, "dropout_mask", dropout_mask, x.dtype, computing), "... F")
    return computing


feed_forward = without_cache(feed_forward_forward)


__all__ = [
    "FeedForwardCache",
    "FeedForwardGrads",
    "FeedForwardParams",
    "feed_forward",
    "feed_forward_backward",
    "feed_forward_forward",
]
