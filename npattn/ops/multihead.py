"""Multi-head attention: projections, heads, concat and the output projection.

    MultiHead(x_q, x_k, x_v) = Concat(head_1 .. head_H) W^O + b^O,   head_h = Attention(q_h, k_g, v_g),   g = h // (H // G)

    q = heads(x_q w_q + b_q)     (..., L, M)  -> (..., H, L, D)      (1)
    k = heads(x_k w_k + b_k)     (..., S, Mk) -> (..., G, S, D)      (2)
    v = heads(x_v w_v + b_v)     (..., S, Mv) -> (..., G, S, E)      (3)
    o = attention(q, k, v)                       (..., H, L, E)      (4)
    c = concat(o)                                (..., L, H E)       (5)
    out = c w_o + b_o                            (..., L, M_out)     (6)

Vaswani et al. 2017, section 3.2.2; grouped heads (G < H): Ainslie et al. 2023.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, swap, weight_gradient
from npattn.ops.attention import AttentionCache, attention_backward, attention_forward
from npattn.ops.blockwise import blockwise_backward, blockwise_forward
from npattn.ops.checks import (
    Array,
    Dims,
    check_class,
    check_cotangent,
    check_dtype,
    check_integer,
    check_one_of,
    check_other_dtype,
    computing_dtype,
)
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.pairs import Pairs, is_bias

IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "dense": (attention_forward, attention_backward),
    "blockwise": (blockwise_forward, blockwise_backward),
}


class MultiHeadParams(NamedTuple):
    """Weights (in, out), applied as x @ w; head h of H owns the columns h D to (h + 1) D. A bias may be None."""

    w_q: Array  # (M, H D)
    w_k: Array  # (Mk, G D)
    w_v: Array  # (Mv, G E)
    w_o: Array  # (H E, M_out)
    b_q: Array | None = None  # (H D,)
    b_k: Array | None = None  # (G D,)
    b_v: Array | None = None  # (G E,)
    b_o: Array | None = None  # (M_out,)


class MultiHeadCache(NamedTuple):
    """What the backward needs: the inputs, and what the forward computed from them."""

    x_q: Array
    x_k: Array
    x_v: Array
    params: MultiHeadParams
    attention: AttentionCache  # of (4): it holds the weights of the heads, before dropout, and their lse
    concat: Array  # (..., L, H E)
    implementation: str
    options: tuple[Any, Any]  # the bias and the sink as they were given


class MultiHeadGrads(NamedTuple):
    """The gradients of `multi_head`; those of params have its names."""

    x_q: Array
    x_k: Array
    x_v: Array
    params: MultiHeadParams
    bias: Any
    sink: Array | None


def split_heads(x: Array, heads: int) -> Array:
    """(..., L, H D) -> (..., H, L, D), as a view: the columns are split into heads, then the axes of heads and tokens swap."""
    result: Array = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads if heads else 0).swapaxes(-3, -2)
    return result


def merge_heads(x: Array) -> Array:
    """(..., H, L, E) -> (..., L, H E): the inverse of `split_heads`."""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _check(x_q: Any, x_k: Any, x_v: Any, params: Any, num_heads: Any, num_kv_heads: Any) -> tuple[int, int]:
    op, H = "multi_head", check_integer("multi_head", "num_heads", num_heads, least=1)
    G = H if num_kv_heads is None else check_integer(op, "num_kv_heads", num_kv_heads, least=1)
    if H % G:
        raise ValueError(f"{op}: num_kv_heads is {G}, expected a number that divides num_heads={H}")
    check_class(op, "params", params, MultiHeadParams)
    dtype, dims = check_dtype(op, x_q=x_q, x_k=x_k, x_v=x_v), Dims(op)
    for name, x, spec in (("x_q", x_q, "... L M"), ("x_k", x_k, "... S Mk"), ("x_v", x_v, "... S Mv")):
        dims.fit(name, x, spec)
    widths = {"w_q": ("M", "H*D", H), "w_k": ("Mk", "G*D", G), "w_v": ("Mv", "G*E", G), "w_o": ("H*E", "M_out", 1)}
    for name, (rows, columns, heads) in widths.items():
        w = dims.fit(name, check_other_dtype(op, name, getattr(params, name), x_q.dtype, dtype), f"{rows} {columns}")
        if w.shape[1] % heads:
            raise ValueError(f"{op}: {name} has shape {w.shape}, expected a number of columns that {heads} heads divide")
        if name == "w_q":
            dims.fix("w_q", **{"G*D": w.shape[1] // H * G})
        if name == "w_v":
            dims.fix("w_v", **{"H*E": w.shape[1] // G * H})
    for name, letter in (("b_q", "H*D"), ("b_k", "G*D"), ("b_v", "G*E"), ("b_o", "M_out")):
        if getattr(params, name) is not None:
            dims.fit(name, check_other_dtype(op, name, getattr(params, name), x_q.dtype, dtype), letter)
    return H, G


def _project(x: Array, w: Array, b: Array | None, computing: np.dtype[Any]) -> Array:
    """y = x w + b."""
    y = _all_tokens(x.astype(computing, copy=False), w.astype(computing, copy=False))
    if b is not None:
        y += b.astype(computing, copy=False)
    return y


def _all_tokens(x: Array, w: Array) -> Array:
    """x w as one product for all sequences; for x of rank 3 NumPy would compute one product for each."""
    result: Array = np.matmul(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), w)
    return result.reshape(*x.shape[:-1], w.shape[-1])


def _computed(name: str, option: Any, dtype: np.dtype[Any], computing: np.dtype[Any]) -> Any:
    """An option in the computing dtype, since (4) is computed in it; the option may have the dtype of the inputs."""
    if is_bias(option):
        return option.with_parameter(_computed(name, option.parameter, dtype, computing))
    if isinstance(option, np.ndarray) and computing.kind != "c":  # a dropout mask of complex inputs is real
        check_other_dtype("multi_head", name, option, dtype, computing)
    return option.astype(computing) if isinstance(option, np.ndarray) and computing_dtype(option.dtype) == computing else option


def _as_given(grad: Any, given: Any) -> Any:
    """The gradient of an option in the dtype in which it was given."""
    if is_bias(given):
        return grad.with_parameter(_as_given(grad.parameter, given.parameter))
    return grad.astype(given.dtype, copy=False) if isinstance(grad, np.ndarray) else grad


@explain_keywords
@quiet
def multi_head_forward(
    x_q: Array, x_k: Array, x_v: Array, params: MultiHeadParams, num_heads: int, *, num_kv_heads: int | None = None,
    mask: Pairs = None, bias: Pairs = None, scale: float | None = None, softcap: float | None = None,
    sink: Array | None = None, dropout_mask: Pairs = None, implementation: str = "dense",
) -> tuple[Array, MultiHeadCache]:  # fmt: skip
    """Multi-head attention, equations (1) to (6) of this page; self-attention where x_q, x_k and x_v are one array.

    x_q : (..., L, M)   x_k : (..., S, Mk)   x_v : (..., S, Mv)
    params, num_heads H, num_kv_heads G (H unless given) : see `MultiHeadParams`
    mask, bias, scale, softcap, sink, dropout_mask : as in `npattn.attention_forward`, for scores (..., H, L, S)
    implementation : "dense" or "blockwise" (no array of L x S elements)
    Returns out (..., L, M_out) and the cache; the output of a query that may see no key is b_o. Raises TypeError, ValueError.
    """
    check_one_of("multi_head", "implementation", implementation, IMPLEMENTATIONS)
    H, G = _check(x_q, x_k, x_v, params, num_heads, num_kv_heads)
    computing = check_dtype("multi_head", x_q=x_q)
    q = split_heads(_project(x_q, params.w_q, params.b_q, computing), H)  # (1)
    k = split_heads(_project(x_k, params.w_k, params.b_k, computing), G)  # (2)
    v = split_heads(_project(x_v, params.w_v, params.b_v, computing), G)  # (3)
    forward, _ = IMPLEMENTATIONS[implementation]
    options = {"bias": bias, "sink": sink, "dropout_mask": dropout_mask}
    options = {name: _computed(name, x, x_q.dtype, computing) for name, x in options.items()}
    o, attention_cache = forward(q, k, v, mask=mask, scale=scale, softcap=softcap, **options)  # (4)
    concat = merge_heads(o)  # (5)
    out = _project(concat, params.w_o, params.b_o, computing)  # (6)
    cache = MultiHeadCache(x_q, x_k, x_v, params, attention_cache, concat, implementation, (bias, sink))
    return out.astype(x_q.dtype, copy=False), cache


@quiet
def multi_head_backward(dout: Array, cache: MultiHeadCache) -> MultiHeadGrads:
    """The gradients of sum(dout * out) for every input and parameter, from (6) to (1).

    dout : (..., L, M_out), as out. Raises TypeError, ValueError.
    """
    check_class("multi_head", "cache", cache, MultiHeadCache, ", from multi_head_forward")
    params, inner, computing = cache.params, cache.attention, cache.concat.dtype
    shape = (*cache.x_q.shape[:-1], params.w_o.shape[1])
    dout = check_cotangent("multi_head", "dout", dout, shape, cache.x_q.dtype, computing)
    _, backward = IMPLEMENTATIONS[cache.implementation]

    H, G = inner.q.shape[-3], inner.k.shape[-3]
    dconcat, dw_o, db_o = _project_backward(dout, cache.concat, params.w_o, params.b_o, H, axis=0)  # (6)
    do = split_heads(dconcat, H)  # (5)
    grads = backward(do, inner)  # (4)
    dx_v, dw_v, db_v = _project_backward(merge_heads(grads.v), cache.x_v, params.w_v, params.b_v, G)  # (3)
    dx_k, dw_k, db_k = _project_backward(merge_heads(grads.k), cache.x_k, params.w_k, params.b_k, G)  # (2)
    dx_q, dw_q, db_q = _project_backward(merge_heads(grads.q), cache.x_q, params.w_q, params.b_q, H)  # (1)
    dbias, dsink = (_as_given(g, x) for g, x in zip((grads.bias, grads.sink), cache.options, strict=True))
    return MultiHeadGrads(
        dx_q, dx_k, dx_v, MultiHeadParams(dw_q, dw_k, dw_v, dw_o, db_q, db_k, db_v, db_o), dbias, dsink
    )


def _project_backward(
    dy: Array, x: Array, w: Array, b: Array | None, heads: int, axis: int = 1
) -> tuple[Array, Array, Array | None]:
    """The backward of y = x w + b: dx = dy w^T; dw = x^T dy and db = dy are summed over all tokens."""
    dx = _all_tokens(dy, swap(w.astype(dy.dtype, copy=False))).astype(x.dtype, copy=False)
    dw = weight_gradient(x, dy, heads, axis).astype(w.dtype, copy=False)
    db = None if b is None else dy.sum(tuple(range(dy.ndim - 1))).astype(b.dtype, copy=False)
    return dx, dw, db


multi_head = without_cache(multi_head_forward)


__all__ = [
    "MultiHeadCache",
    "MultiHeadGrads",
    "MultiHeadParams",
    "multi_head",
    "multi_head_backward",
    "multi_head_forward",
]
