"""jax: jax.nn.dot_product_attention, compiled for each shape, jax.nn.softmax, activations and take.

The layout of its attention is (B, L, H, D), that of lse (B, L, H).
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import jax
import numpy as np

from npattn.ops.checks import Array
from npattn.peers import Function, Pair, rank_4
from npattn.peers.findings import Finding


def _attend(q: Any, k: Any, v: Any, bias: Any, mask: Any, lengths: Any, **options: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, bias, mask, key_value_seq_lengths=lengths, return_residual=True, **options)


def _pull(dout: Any, q: Any, k: Any, v: Any, bias: Any, *rest: Any, **options: Any) -> Any:
    return jax.vjp(lambda *inputs: _attend(*inputs, *rest, **options)[0], q, k, v, bias)[1](dout)


_compiled = {f: jax.jit(f, static_argnames=("scale", "is_causal", "local_window_size")) for f in (_attend, _pull)}


def _in_its_words(
    function: Function, *arrays: Array, mask: Any = None, bias: Any = None, scale: Any = None, causal: bool = False,
    window: Any = None, key_lengths: Any = None,
) -> Any:  # fmt: skip
    """(out, lse) of q, k and v by _attend, the gradients of dout, q, k and v by _pull."""
    q, v = arrays[-3], arrays[-1]
    rank_4(q, "jax.nn.dot_product_attention")
    if v.shape[-1] != q.shape[-1]:
        raise NotImplementedError("jax.nn.dot_product_attention has one width for q, k and v")
    if window is not None and None in window:
        raise NotImplementedError("a window is two numbers")
    lengths = None if key_lengths is None else np.asarray(key_lengths, np.int32)
    window = None if window is None else tuple(map(int, window))
    chosen = function if q.dtype == np.float16 else _compiled[function]  # float16 cannot be compiled for a CPU
    with jax.enable_x64(bool(q.dtype == np.float64)):
        result = chosen(*arrays, bias, mask, lengths, scale=scale, is_causal=causal, local_window_size=window)
        found = tuple(None if x is None else np.array(x) for x in result)
    return found if function is _attend else dict(zip(("dq", "dk", "dv", "dbias"), found, strict=True))


@wraps(_in_its_words)
def _attention(function: Function, *arrays: Array, window: Any = None, **options: Any) -> Any:
    rank_4(arrays[-1], "jax.nn.dot_product_attention")
    if window is not None:  # no limit is a window that holds all
        window = [max(x.shape[-2] for x in arrays) if side is None else side for side in window]
    found = _in_its_words(function, *(np.swapaxes(x, 1, 2) for x in arrays), window=window, **options)
    if function is _attend:
        return tuple(np.swapaxes(x, 1, 2) for x in found)
    return {name: x if name == "dbias" else np.swapaxes(x, 1, 2) for name, x in found.items()}


def _softmax(scores: Array, *, mask: Any = None) -> Array:
    with jax.enable_x64(bool(scores.dtype == np.float64)):
        return np.array(jax.nn.softmax(scores, where=mask))


def _softmax_backward(dweights: Array, scores: Array, *, mask: Any = None) -> dict[str, Array]:
    with jax.enable_x64(bool(scores.dtype == np.float64)):
        _, back = jax.vjp(lambda s: jax.nn.softmax(s, where=mask), scores)
        return {"dscores": np.array(back(dweights)[0])}


def _elementwise(function: Function) -> Pair:
    def forward(x: Array, **options: Any) -> Array:
        with jax.enable_x64(bool(x.dtype == np.float64)):
            return np.array(function(x, **options))

    def backward(dy: Array, x: Array, **options: Any) -> dict[str, Array]:
        with jax.enable_x64(bool(x.dtype == np.float64)):
            return {"dx": np.array(jax.vjp(partial(function, **options), x)[1](dy)[0])}

    return forward, backward


def _gelu(x: Any, *, approximate: str = "none") -> Any:
    return jax.nn.gelu(x, approximate=approximate == "tanh")
def _embedding(ids: Array, table: Array) -> Array:
    with jax.enable_x64(bool(table.dtype == np.float64)):
        return np.array(jax.numpy.take(table, ids, axis=0))


def _embedding_backward(dy: Array, ids: Array, table: Array) -> dict[str, Array]:
    with jax.enable_x64(bool(table.dtype == np.float64)):
        _, back = jax.vjp(lambda t: jax.numpy.take(t, ids, axis=0), table)
        return {"dtable": np.array(back(dy)[0])}


ADAPTERS: dict[str, Pair] = {
    "jax": (partial(_attention, _attend), partial(_attention, _pull)),
    "jax-softmax": (_softmax, _softmax_backward),
    "jax-silu": _elementwise(jax.nn.silu),
    "jax-sigmoid": _elementwise(jax.nn.sigmoid),
    "jax-gelu": _elementwise(_gelu),
    "jax-relu": _elementwise(jax.nn.relu),
    "jax-embedding": (_embedding, _embedding_backward),
}
OWN_WORDS: dict[str, Pair] = {"jax": (partial(_in_its_words, _attend), partial(_in_its_words, _pull))}

# --- findings -------------------------------------------------------------------------------------------------------------

PRELUDE = """
    import jax, numpy as np
    from jax.nn import dot_product_attention as attend
    x, no = np.float32([[[[1]], [[3]]]]), np.zeros((1, 1, 2, 2), bool)  # two keys, one head; a mask that allows nothing"""
FINDINGS = [
    Finding("A query that may see no key gets the mean of all values, and an lse of 0.7 times the least float32", """
        out, lse = attend(x, x, x, mask=no, return_residual=True)
        print(out.ravel().tolist(), "%.3g" % lse.ravel()[0])
        """, r"\[2.0, 2.0\] -2.38e\+38"),
    Finding("A query that may see no key hands its gradient to all values", """
        print(jax.grad(lambda v: attend(x, x, v, mask=no).sum())(x).ravel().tolist())
        """, r"\[1.0, 1.0\]"),
    Finding("A bias of -inf in all of a row gives NaN, where a mask does not", """
        print(attend(x, x, x, bias=np.where(no, 0, -np.inf).astype(np.float32)).ravel().tolist())
        """, r"\[nan, nan\]"),
    Finding("The softmax of float64 inputs is computed in float32", """
        with jax.enable_x64(True):
            y = np.float64([[[[0.1]], [[0.2]]]]); out = np.asarray(attend(y, y, y)); w = np.exp(y[0, :, 0] * y[0, :, 0].T)
        print(out.dtype, "%.0e" % abs(out[0, :, 0] - w / w.sum(1, keepdims=True) @ y[0, :, 0]).max())
        """, r"float64 \de-0[789]"),
    Finding("float16 raises on a CPU when it is compiled, and works when it is not", """
        y = x.astype(np.float16)
        print(attend(y, y, y).dtype)
        jax.jit(attend)(y, y, y)
        """, r"float16\nValueError: The precision .F16_F16_F32. is not supported.*"),
    Finding("lse has no gradient", """
        print(jax.grad(lambda q: attend(q, x, x, return_residual=True)[1].sum())(x).ravel().tolist())
        """, r"\[0.0, 0.0\]", "edge"),
    Finding("`jax.nn.gelu` is the approximation by tanh unless `approximate=False` is given; torch's is the exact one", """
        print(*("%.5f" % jax.nn.gelu(np.float32(-1), **o) for o in ({}, {"approximate": True}, {"approximate": False})))
        """, "-0.15881 -0.15881 -0.15866", "edge"),
    Finding("GELU and SiLU of -inf are NaN, and their gradients at inf and -inf; the limits are 0, 1 and 0", """
        for f in jax.nn.gelu, jax.nn.silu:
            print(*(f(z).item() for z in (np.float32(np.inf), np.float32(-np.inf))), jax.grad(f)(np.float32(np.inf)))
        """, r"inf nan nan\ninf nan nan", "edge"),
    Finding("NaN in a value that is masked reaches the output, as 0 times NaN", """
        v, mask = np.float32([[[[1]], [[np.nan]]]]), np.array([True, False]).reshape(1, 1, 1, 2)
        print(attend(x, x, v, mask=mask).ravel().tolist())
        """, r"\[nan, nan\]", "edge"),
]  # fmt: skip
