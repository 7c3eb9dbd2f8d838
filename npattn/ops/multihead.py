"""Multi-head attention: projections, heads, concat and the output projection.

    MultiHead(x_q, x_k, x_v) = Concat(head_1 .. head_H) W^O + b^O,   head_h = Attention(q_h, k_g, v_g),   g = h // (H // G)

    q = heads(x_q w_q + b_q)     (..., L, M)  -> (..., H, L, D)      (1)
    k = heads(x_k w_k + b_k)     (..., S, Mk) -> (..., G, S, D)      (2)
    v = heads(x_v w_v + b_v)     (..., S, Mv) -> (..., G, S, E)      (3)
    q, k = rms_norm(q), rms_norm(k)              over D              (4)    with q_norm, k_norm
    q, k = turn(q), turn(k)                      by their positions  (5)    with rotary
    o = attention(q, k, v)                       (..., H, L, E)      (6)
    c = concat(o)                                (..., L, H E)       (7)
    out = c w_o + b_o                            (..., L, M_out)     (8)

Vaswani et al. 2017, section 3.2.2; grouped heads (G < H): Ainslie et al. 2023. Norms of q and k, and their order before rotary
positions: Henry et al. 2020; as Qwen3 and Gemma 3 have it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet
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
from npattn.ops.linear import project, project_backward
from npattn.ops.norms import NormParams, RMSNormCache, rms_norm_backward, rms_norm_forward
from npattn.ops.pairs import Pairs, is_bias
from npattn.ops.positions import Rotary, RotaryCache, rotary_backward, turn_of, turned

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
    q_norm: NormParams | None = None  # g (D,), the same for all heads
    k_norm: NormParams | None = None  # g (D,)


class MultiHeadCache(NamedTuple):
    """What the backward needs: the inputs, and what the forward computed from them."""

    x_q: Array
    x_k: Array
    x_v: Array
    params: MultiHeadParams
    attention: AttentionCache  # of (6): it holds the weights of the heads, before dropout, and their lse
    concat: Array  # (..., L, H E)
    implementation: str
    options: tuple[Any, Any]  # the bias and the sink as they were given
    norms: tuple[RMSNormCache | None, RMSNormCache | None]  # of (4), for q and k
    turns: tuple[RotaryCache | None, RotaryCache | None]  # of (5), for q and k


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


def _check(op: str, x_q: Any, x_k: Any, x_v: Any, params: Any, num_heads: Any, num_kv_heads: Any) -> tuple[int, int]:
    H = check_integer(op, "num_heads", num_heads, least=1)
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
    D = params.w_q.shape[1] // H
    for name in ("q_norm", "k_norm"):
        norm = getattr(params, name)
        if norm is not None:
            check_class(op, name, norm, NormParams)
            for part, p in norm._asdict().items():
                if p is not None and check_other_dtype(op, f"{name}.{part}", p, x_q.dtype, dtype).shape != (D,):
                    raise ValueError(f"{op}: {name}.{part} has shape {p.shape}, expected (D={D},): each head has its own norm")
    for name, letter in (("b_q", "H*D"), ("b_k", "G*D"), ("b_v", "G*E"), ("b_o", "M_out")):
        if getattr(params, name) is not None:
            dims.fit(name, check_other_dtype(op, name, getattr(params, name), x_q.dtype, dtype), letter)
    return H, G


def _computed(name: str, option: Any, dtype: np.dtype[Any], computing: np.dtype[Any]) -> Any:
    """An option in the computing dtype, since (6) is computed in it; the option may have the dtype of the inputs."""
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


def _norm(x: Array, norm: NormParams | None, eps: float) -> tuple[Array, RMSNormCache | None]:
    """(4) of q or k, whose dtype is the computing dtype."""
    if norm is None:
        return x, None
    return rms_norm_forward(x, NormParams(*(None if p is None else p.astype(x.dtype, copy=False) for p in norm)), eps=eps)


def _norm_backward(dy: Array, cache: RMSNormCache | None, norm: NormParams | None) -> tuple[Array, NormParams | None]:
    if cache is None or norm is None:
        return dy, None
    dx, grads = rms_norm_backward(dy, cache)
    given = zip(grads, norm, strict=True)
    return dx, NormParams(*(None if g is None or p is None else g.astype(p.dtype, copy=False) for g, p in given))


def _turn(op: str, name: str, x: Array, positions: Any, rotary: Rotary | None) -> tuple[Array, RotaryCache | None]:
    """(5) of q or k."""
    if rotary is None:
        return x, None
    cache = turn_of(op, name, positions, x, rotary, x.dtype)
    return turned(x, cache.cos, cache.sin, cache.layout, x.dtype), cache


def _turn_backward(dy: Array, cache: RotaryCache | None) -> Array:
    return dy if cache is None else rotary_backward(dy, cache).x


def _positions(rotary: Any, q_pos: Any, k_pos: Any, L: int, S: int) -> tuple[Any, Any]:
    """The positions of queries and keys, counted from 0 where they are not given."""
    if rotary is None and not (q_pos is None and k_pos is None):
        raise ValueError("multi_head: got q_pos or k_pos without rotary, expected rotary, too: masks have their own positions")
    if rotary is not None and q_pos is None and k_pos is None and L != S:
        raise ValueError(
            f"multi_head: got L={L} queries and S={S} keys, and where they stand is not given; expected q_pos and k_pos, as "
            f"q_pos=np.arange({S - L}, {S}) if the last query stands at the last key"
        )
    return np.arange(L) if q_pos is None else q_pos, np.arange(S) if k_pos is None else k_pos


@explain_keywords
@quiet
def multi_head_forward(
    x_q: Array, x_k: Array, x_v: Array, params: MultiHeadParams, num_heads: int, *, num_kv_heads: int | None = None,
    mask: Pairs = None, bias: Pairs = None, scale: float | None = None, softcap: float | None = None,
    sink: Array | None = None, dropout_mask: Pairs = None, rotary: Rotary | None = None, q_pos: object = None,
    k_pos: object = None, norm_eps: float = 1e-6, implementation: str = "dense",
) -> tuple[Array, MultiHeadCache]:  # fmt: skip
    """Multi-head attention, equations (1) to (8) of this page; self-attention where x_q, x_k and x_v are one array.

    x_q : (..., L, M)   x_k : (..., S, Mk)   x_v : (..., S, Mv)
    params, num_heads H, num_kv_heads G (H unless given) : see `MultiHeadParams`
    mask, bias, scale, softcap, sink, dropout_mask : as in `npattn.attention_forward`, for scores (..., H, L, S)
    rotary : see `npattn.Rotary`; q_pos, k_pos : integers (L,) and (S,), or one row a sequence; counted from 0 if L = S
    norm_eps : eps of q_norm and k_norm
    implementation : "dense" or "blockwise" (no array of L x S elements)
    Returns out (..., L, M_out) and the cache; the output of a query that may see no key is b_o. Raises TypeError, ValueError.
    """
    check_one_of("multi_head", "implementation", implementation, IMPLEMENTATIONS)
    H, G = _check("multi_head", x_q, x_k, x_v, params, num_heads, num_kv_heads)
    computing = check_dtype("multi_head", x_q=x_q)
    q = split_heads(project(x_q, params.w_q, params.b_q, computing), H)  # (1)
    k = split_heads(project(x_k, params.w_k, params.b_k, computing), G)  # (2)
    v = split_heads(project(x_v, params.w_v, params.b_v, computing), G)  # (3)
    q, q_norm = _norm(q, params.q_norm, norm_eps)  # (4)
    k, k_norm = _norm(k, params.k_norm, norm_eps)  # (4)
    q_pos, k_pos = _positions(rotary, q_pos, k_pos, q.shape[-2], k.shape[-2])
    q, q_turn = _turn("multi_head", "q_pos", q, q_pos, rotary)  # (5)
    k, k_turn = _turn("multi_head", "k_pos", k, k_pos, rotary)  # (5)
    forward, _ = IMPLEMENTATIONS[implementation]
    options = {"bias": bias, "sink": sink, "dropout_mask": dropout_mask}
    options = {name: _computed(name, x, x_q.dtype, computing) for name, x in options.items()}
    o, attention_cache = forward(q, k, v, mask=mask, scale=scale, softcap=softcap, **options)  # (6)
    concat = merge_heads(o)  # (7)
    out = project(concat, params.w_o, params.b_o, computing)  # (8)
    cache = MultiHeadCache(x_q, x_k, x_v, params, attention_cache, concat, implementation, (bias, sink), (q_norm, k_norm),
                           (q_turn, k_turn))  # fmt: skip
    return out.astype(x_q.dtype, copy=False), cache


@quiet
def multi_head_backward(dout: Array, cache: MultiHeadCache) -> MultiHeadGrads:
    """The gradients of sum(dout * out) for every input and parameter, from (8) to (1).

    dout : (..., L, M_out), as out. Raises TypeError, ValueError.
    """
    why = ": decoding has no backward" if isinstance(cache, KVCache) else ""
    check_class("multi_head", "cache", cache, MultiHeadCache, f", from multi_head_forward{why}")
    params, inner, computing = cache.params, cache.attention, cache.concat.dtype
    shape = (*cache.x_q.shape[:-1], params.w_o.shape[1])
    dout = check_cotangent("multi_head", "dout", dout, shape, cache.x_q.dtype, computing)
    _, backward = IMPLEMENTATIONS[cache.implementation]

    H, G = inner.q.shape[-3], inner.k.shape[-3]
    dconcat, dw_o, db_o = project_backward(dout, cache.concat, params.w_o, params.b_o, H, axis=0)  # (8)
    do = split_heads(dconcat, H)  # (7)
    grads = backward(do, inner)  # (6)
    dq, dk = map(_turn_backward, (grads.q, grads.k), cache.turns)  # (5)
    dk, dk_norm = _norm_backward(dk, cache.norms[1], params.k_norm)  # (4)
    dq, dq_norm = _norm_backward(dq, cache.norms[0], params.q_norm)  # (4)
    dx_v, dw_v, db_v = project_backward(merge_heads(grads.v), cache.x_v, params.w_v, params.b_v, G)  # (3)
    dx_k, dw_k, db_k = project_backward(merge_heads(dk), cache.x_k, params.w_k, params.b_k, G)  # (2)
    dx_q, dw_q, db_q = project_backward(merge_heads(dq), cache.x_q, params.w_q, params.b_q, H)  # (1)
    dbias, dsink = (_as_given(g, x) for g, x in zip((grads.bias, grads.sink), cache.options, strict=True))
    dparams = MultiHeadParams(dw_q, dw_k, dw_v, dw_o, db_q, db_k, db_v, db_o, dq_norm, dk_norm)
    return MultiHeadGrads(dx_q, dx_k, dx_v, dparams, dbias, dsink)


multi_head = without_cache(multi_head_forward)


# --- decoding ---------------------------------------------------------------------------------------------------------------


class Buffer:
    """Memory for keys and values, with room for more; the first ``used`` tokens are taken."""

    def __init__(self, k: Array, v: Array, room: int) -> None:
        self.k, self.v = (np.empty((*x.shape[:-2], room, x.shape[-1]), x.dtype) for x in (k, v))
        self.used = 0

    def write(self, start: int, k: Array, v: Array) -> None:
        self.used = start + k.shape[-2]
        self.k[..., start : self.used, :], self.v[..., start : self.used, :] = k, v


class KVCache:
    """The keys and values of all tokens so far, after norm and rotary positions, in the computing dtype. It never changes.

    A cache with more tokens shares its memory where that has room, and has twice the room where it has not: n tokens cost O(n)
    copies in all. Two continuations of one cache, as in a beam search, are two caches: the second of them copies.
    """

    def __init__(self, buffer: Buffer, length: int) -> None:
        self._buffer, self.length = buffer, length  # the number of tokens

    @property
    def k(self) -> Array:
        """(..., G, S, D), read-only."""
        return _read_only(self._buffer.k[..., : self.length, :])

    @property
    def v(self) -> Array:
        """(..., G, S, E), read-only."""
        return _read_only(self._buffer.v[..., : self.length, :])

    def rows(self, index: Array) -> KVCache:
        """The cache of these sequences of the batch, in this order; one may come twice, as in a beam search. A copy."""
        k, v = self.k[index], self.v[index]
        return KVCache(Buffer(k, v, 0), 0).appended(k, v)

    def appended(self, k: Array, v: Array) -> KVCache:
        buffer, length = self._buffer, self.length + k.shape[-2]
        if buffer.used != self.length or buffer.k.shape[-2] < length:
            buffer = Buffer(k, v, max(length, 2 * self.length))
            buffer.write(0, self.k, self.v)
        buffer.write(self.length, k, v)
        return KVCache(buffer, length)


def _read_only(x: Array) -> Array:
    x = x.view()
    x.flags.writeable = False
    return x


def _keys_and_values(
    x: Array, params: MultiHeadParams, G: int, computing: np.dtype[Any], norm_eps: float
) -> tuple[Array, Array]:
    k = split_heads(project(x, params.w_k, params.b_k, computing), G)  # (2)
    v = split_heads(project(x, params.w_v, params.b_v, computing), G)  # (3)
    return _norm(k, params.k_norm, norm_eps)[0], v  # (4)


def _of_width(x: Array, w: Array) -> Array:
    """An array like x with the width that w takes, for checks: what it holds does not count."""
    return np.broadcast_to(x[..., :1], (*x.shape[:-1], len(w)))


@explain_keywords
@quiet
def multi_head_memory(
    x: Array, params: MultiHeadParams, num_heads: int, *, num_kv_heads: int | None = None, norm_eps: float = 1e-6
) -> KVCache:
    """The keys and values of a sequence that `multi_head_decode` with cross=True looks at, computed once.

    x : (..., S, Mk), as of an encoder   params, num_heads, num_kv_heads, norm_eps : as in `multi_head_forward`
    Raises TypeError, ValueError.
    """
    op = "multi_head_memory"
    _, G = _check(op, _of_width(x, params.w_q), x, x, params, num_heads, num_kv_heads)
    k, v = _keys_and_values(x, params, G, check_dtype(op, x=x), norm_eps)
    return KVCache(Buffer(k, v, 0), 0).appended(k, v)


@explain_keywords
@quiet
def multi_head_decode(
    x: Array, params: MultiHeadParams, num_heads: int, past: KVCache | None = None, *, num_kv_heads: int | None = None,
    mask: Pairs = None, bias: Pairs = None, scale: float | None = None, softcap: float | None = None,
    sink: Array | None = None, rotary: Rotary | None = None, positions: object = None, norm_eps: float = 1e-6,
    implementation: str = "dense", cross: bool = False,
) -> tuple[Array, KVCache]:  # fmt: skip
    """Self-attention of L more tokens, which see those of ``past`` and themselves, without computing the past again.

    With mask=None all L tokens see each other, later ones too: for a causal model give a mask wherever L > 1.

    x : (..., L, M); past : what the call before returned, None at the start
    cross : attention to a memory: ``past`` is what `multi_head_memory` returned, and nothing is added to it
    mask, bias : for scores (..., H, L, S) with the S keys of ``past`` and of x, as mask=causal(align="bottom_right")
    positions : integers (L,), or one row a sequence, for ``rotary``; counted on from the number of tokens in ``past``
    Returns out (..., L, M_out) and the cache with these tokens. It has no backward. Raises TypeError, ValueError.
    """
    op = "multi_head_decode"
    check_one_of(op, "implementation", implementation, IMPLEMENTATIONS)
    others = _of_width(x, params.w_k) if cross else x
    H, G = _check(op, x, others, others, params, num_heads, num_kv_heads)
    computing = check_dtype(op, x=x)
    q = split_heads(project(x, params.w_q, params.b_q, computing), H)  # (1)
    q, _ = _norm(q, params.q_norm, norm_eps)  # (4)
    k, v = _keys_and_values(others[..., :0, :] if cross else x, params, G, computing, norm_eps)  # (2), (3), (4)
    kept: Any = KVCache(Buffer(k, v, 0), 0) if past is None and not cross else past
    check_class(op, "past", kept, KVCache, f", from {'multi_head_memory' if cross else op}")
    for name, old, new in (("keys", kept.k, k), ("values", kept.v, v)):
        if (*old.shape[:-2], old.shape[-1], old.dtype) != (*new.shape[:-2], new.shape[-1], new.dtype):
            got, expected = f"{name} of shape {old.shape}, {old.dtype}", (*new.shape[:-2], "any", new.shape[-1])
            raise ValueError(f"{op}: past has {got}, expected {expected}, {new.dtype}: fixed by x")
    if rotary is None and positions is not None:
        raise ValueError(f"{op}: got positions without rotary, expected rotary, too: masks have their own positions")
    if not cross:
        positions = np.arange(kept.length, kept.length + x.shape[-2]) if positions is None else positions
        q, _ = _turn(op, "positions", q, positions, rotary)  # (5)
        k, _ = _turn(op, "positions", k, positions, rotary)  # (5)
        kept = kept.appended(k, v)
    elif rotary is not None:
        raise ValueError(f"{op}: got rotary and cross=True, expected rotary=None: a memory has no positions here")
    forward, _ = IMPLEMENTATIONS[implementation]
    options = {"bias": _computed("bias", bias, x.dtype, computing), "sink": _computed("sink", sink, x.dtype, computing)}
    o, _ = forward(q, kept.k, kept.v, mask=mask, scale=scale, softcap=softcap, **options)  # (6)
    out = project(merge_heads(o), params.w_o, params.b_o, computing)  # (7), (8)
    return out.astype(x.dtype, copy=False), kept


__all__ = [
    "KVCache",
    "MultiHeadCache",
    "MultiHeadGrads",
    "MultiHeadParams",
    "multi_head",
    "multi_head_backward",
    "multi_head_decode",
    "multi_head_forward",
    "multi_head_memory",
]
