"""One call of attention: its inputs, checked, and its options, bound once to the shape of the scores.

This happens before the first equation: `npattn.attention` and `npattn.blockwise` compute with a `Call`, and check nothing.
Inputs of rank 2 become one head (`with_heads`), and results get the rank of the inputs back (`as_given`, `grads_of`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import select
from npattn.ops.biases import ArrayBound
from npattn.ops.checks import (
    Array,
    Dims,
    Shape,
    broadcast_pairs,
    check_class,
    check_cotangent,
    check_dtype,
    check_flag,
    check_number,
    check_other_dtype,
    conversion_hint,
    kind,
)
from npattn.ops.dropout import Dropout, check_dropout_mask
from npattn.ops.edge import explain_layout
from npattn.ops.masks import as_mask, bound_mask
from npattn.ops.pairs import ALL, Bindable, DenseBound, Index, Part, is_bias, is_bindable


class Call(NamedTuple):
    """The inputs of one call, as they were given, and its options, bound to the scores (..., H, L, S); None where not given."""

    q: Array  # (..., H, L, D)
    k: Array  # (..., G, S, D)
    v: Array  # (..., G, S, E)
    mask: Any
    bias: Any
    scale: Any
    softcap: Any
    sink: Array | None  # (H,)
    dropout: Any
    computing: np.dtype[Any]


class AttentionCache(NamedTuple):
    """What the backward needs: the call, and what the forward computed. ``cache.q`` and so on are those of the call."""

    call: Call
    weights: Array | None  # (..., H, L, S) before dropout; None from blockwise, which never has all of them
    lse: Array  # (..., H, L) natural log of the sum of exp(scores) over the allowed keys, and of exp(sink)
    kept: Any = None  # of blockwise: see `npattn.ops.blockwise.Kept`

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call, name)


class AttentionGrads(NamedTuple):
    """The gradients of `attention`, in the form of its inputs. None for options that were not given, except scale."""

    q: Array
    k: Array
    v: Array
    bias: Any  # an array of the bias's shape, or a bias object that holds the gradients of its parameters
    sink: Array | None
    scale: Any  # a NumPy scalar in the computing dtype


@explain_layout
def bind(
    op: str, q: Any, k: Any, v: Any, mask: Any, bias: Any, scale: Any, softcap: Any, sink: Any, dropout_mask: Any,
    return_lse: Any = False,
) -> Call:  # fmt: skip
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
    scale = check_number(op, "scale", (dims["D"] or 1) ** -0.5 if scale is None else scale, computing, optional=True)
    if softcap is not None:
        softcap = check_number(op, "softcap", softcap, computing, positive=True, optional=True)
    if sink is not None:
        dims.fix("q", H=H)
        dims.fit("sink", check_other_dtype(op, "sink", sink, q.dtype, computing), "H")
    return Call(
        q, k, v, bind_mask(op, mask, shape), bind_bias(op, bias, shape, q.dtype, computing), scale, softcap, sink,
        bind_dropout(op, dropout_mask, shape, q.dtype, computing), computing,
    )  # fmt: skip


def bind_mask(op: str, mask: object, shape: Shape) -> Any:
    """The mask, checked against scores of this shape (None stays None)."""
    return None if mask is None else bound_mask(as_mask(op, mask), shape, op)


def bind_bias(op: str, bias: object, shape: Shape, dtype: np.dtype[Any], computing: np.dtype[Any]) -> Any:
    """The bias, checked against scores of this shape (None stays None)."""
    if bias is None:
        return None
    if isinstance(bias, np.ndarray):
        return ArrayBound(op, check_other_dtype(op, "bias", bias, dtype, computing), shape)
    if not is_bindable(bias) or hasattr(bias, "__invert__"):
        raise TypeError(f"{op}: bias is {kind(bias)}, expected an array, Alibi or RelativeTable{conversion_hint('bias', bias)}")
    given: Any = bias
    if is_bias(given):
        check_other_dtype(op, "bias", given.parameter, dtype, computing)
    bound = given.bind(shape)
    missing = [name for name in ("tile", "new_gradient", "add_gradient", "finish") if not hasattr(bound, name)]
    if missing:
        raise TypeError(f"{op}: bias.bind returns {kind(bound)} without {', '.join(missing)}, expected these four methods")
    return bound


def bind_dropout(op: str, mask: object, shape: Shape, dtype: np.dtype[Any], computing: np.dtype[Any]) -> Any:
    """The dropout mask, checked against scores of this shape (None stays None)."""
    if mask is None:
        return None
    real = np.empty(0, computing).real.dtype
    if isinstance(mask, Dropout):
        return mask.bind(shape, real)
    if isinstance(mask, Bindable) and is_bindable(mask) and not (is_bias(mask) or hasattr(mask, "__invert__")):
        return mask.bind(shape)
    drawn = "an array that the caller drew, 0 or 1/(1-p) for each pair"
    if not isinstance(mask, np.ndarray):
        way = conversion_hint("dropout_mask", mask) or ": (rng.random(shape) >= p) / (1 - p)"
        raise TypeError(f"{op}: dropout_mask is {kind(mask)}, expected {drawn}{way}, or npattn.Dropout(p, seed)")
    return DenseBound(broadcast_pairs(op, "dropout_mask", check_dropout_mask(op, "dropout_mask", mask, dtype, computing, drawn),
                                      shape))  # fmt: skip


def check_cotangents(op: str, own: str, cache: AttentionCache, dout: Any, dlse: Any) -> None:
    """Raises where they do not fit. own : the field of the cache that only the forward of this op fills"""
    check_class(op, "cache", cache, AttentionCache, f", from {op}_forward")
    if getattr(cache, own) is None:
        raise ValueError(f"{op}: cache is that of the other forward, expected that of {op}_forward")
    c = cache.call
    check_cotangent(op, "dout", dout, (*c.q.shape[:-1], c.v.shape[-1]), c.q.dtype, c.computing)
    if dlse is not None:
        check_cotangent(op, "dlse", dlse, cache.lse.shape, c.computing, c.computing)


# --- rank 2 as one head -----------------------------------------------------------------------------------------------------


def with_heads(c: Call) -> Call:
    """The call itself; if it has rank 2, the same call with an axis of one head, (1, L, D)."""
    if c.q.ndim > 2:
        return c
    (L, _), S = c.q.shape, len(c.k)
    mask, bias, dropout = (None if x is None else Part(x, (), slice(0, L), S) for x in (c.mask, c.bias, c.dropout))
    return c._replace(q=c.q[None], k=c.k[None], v=c.v[None], mask=mask, bias=bias, dropout=dropout)


def add_head_axis(c: Call, *arrays: Any) -> tuple[Any, ...]:
    """Arrays of this call with the axis of heads that `with_heads(c)` has."""
    return arrays if c.q.ndim > 2 else tuple(None if x is None else x[None] for x in arrays)


def as_given(c: Call, *arrays: Any) -> tuple[Any, ...]:
    """Results of `with_heads(c)` in the rank of this call: the inverse of `add_head_axis`."""
    return arrays if c.q.ndim > 2 else tuple(x[0] for x in arrays)


def grads_of(c: Call, dq: Array, dk: Array, dv: Array, dbias: Any, dsink: Any, dscale: Any) -> AttentionGrads:
    """The gradients, from the computing dtype and an axis of heads to the form of the inputs."""
    dq, dk, dv = as_given(c, dq, dk, dv)
    return AttentionGrads(
        dq.astype(c.q.dtype, copy=False), dk.astype(c.k.dtype, copy=False), dv.astype(c.v.dtype, copy=False),
        None if c.bias is None else c.bias.finish(dbias),
        None if c.sink is None else dsink.astype(c.sink.dtype, copy=False), dscale,
    )  # fmt: skip


# --- what every implementation needs of a call -------------------------------------------------------------------------------


def visible(c: Call | AttentionCache, index: Index = (), rows: slice = ALL, cols: slice = ALL) -> tuple[Any, Any]:
    """Which pairs are allowed (None: all), and the bias, of ``scores[index][..., rows, cols]``."""
    allowed = None if c.mask is None else c.mask.tile(index, rows, cols)
    bias = None if c.bias is None else c.bias.tile(index, rows, cols)
    if bias is not None and (masked := bias.real == -np.inf).any():  # a bias of -inf masks exactly like a mask
        allowed = ~masked if allowed is None else allowed & ~masked
    return allowed, bias


def zero_dead_rows(lse: Array, dout: Array, dlse: Any) -> tuple[Array, Any]:
    """dout (..., L, E) and dlse (..., L, 1) in the computing dtype, 0 in rows whose lse is -inf."""
    alive = lse[..., None] != -np.inf
    dout = select(alive, dout.astype(lse.dtype, copy=False))
    return dout, 0.0 if dlse is None else select(alive, dlse[..., None])
