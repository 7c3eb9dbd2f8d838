"""A table of bad calls: each is refused by us, with the operation, the argument, what was got and what was expected.

One row a call; those of attention run for blockwise too. A message that comes from the inside of NumPy, or none, is a failure,
and so is an input that has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import npattn
from npattn import (
    Alibi,
    GradcheckError,
    GRUParams,
    LSTMParams,
    Mask,
    MultiHeadParams,
    RelativeTable,
    RNNParams,
    alibi_slopes,
    blocks,
    causal,
    convert,
    gradcheck,
    hessian_vector_product,
    key_lengths,
    keys,
    packed,
    query_lengths,
    segments,
    where,
    window,
)

B, H, G, L, S, D, E = 2, 4, 2, 3, 5, 6, 7
FLOATS = "float16, bfloat16, float32, float64, longdouble, complex128 or clongdouble"


def f64(*shape: int) -> Any:
    """No two elements alike, so that nothing can be done to them that does not show."""
    return np.asarray(1 + np.arange(np.prod(shape, dtype=int)).reshape(shape) / 1024)


def f32(*shape: int) -> Any:
    return np.asarray(f64(*shape), np.float32)


def bits(*shape: int) -> Any:
    return np.ones(shape, bool)


def ints(*shape: int) -> Any:
    return np.zeros(shape, np.int64)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    id: str
    function: Any
    arguments: dict[str, Any]  # of the bad call; all arrays in them must be the same afterwards
    error: type[Exception]
    fragments: list[str]  # of the message


TABLE: list[Row] = []


def row(id: str, error: type[Exception], fragments: list[str], function: Any, /, **arguments: Any) -> None:
    TABLE.append(Row(id, function, arguments, error, fragments))


def attention(id: str, error: type[Exception], fragments: list[str], **change: Any) -> None:
    """A bad call of attention and blockwise: what is changed in a good one. {op} in a fragment is the operation."""
    arguments = {"q": f32(B, H, L, D), "k": f32(B, G, S, D), "v": f32(B, G, S, E)} | change
    for op, function in (("attention", npattn.attention_forward), ("blockwise", npattn.blockwise_forward)):
        row(f"{op}: {id}", error, [f.format(op=op) if "{op}" in f else f for f in fragments], function, **arguments)


def masked(id: str, error: type[Exception], fragments: list[str], make: Any, /, **arguments: Any) -> None:
    """A bad mask or bias, made from its arguments when it is used; L is 3 and S is 5."""
    x = {"q": f32(B, H, L, D), "k": f32(B, G, S, D), "v": f32(B, G, S, E)}
    for op, function in (("attention", npattn.attention_forward), ("blockwise", npattn.blockwise_forward)):
        row(f"{op}: {id}", error, fragments, functools.partial(_attend, function, make, x), **arguments)


def _attend(attend: Any, make: Any, x: dict[str, Any], /, **given: Any) -> Any:
    made = make(**given)
    return attend(**x, **{"bias" if isinstance(made, (Alibi, RelativeTable)) else "mask": made})


def backward(id: str, error: type[Exception], fragments: list[str], dtype: Any = np.float32, **change: Any) -> None:
    for op, forward, function in (
        ("attention", npattn.attention_forward, npattn.attention_backward),
        ("blockwise", npattn.blockwise_forward, npattn.blockwise_backward),
    ):
        _, cache = forward(*(x.astype(dtype) for x in (f32(B, H, L, D), f32(B, G, S, D), f32(B, G, S, E))))
        arguments = {"dout": f32(B, H, L, E).astype(dtype), "cache": cache} | change
        row(f"{op}_backward: {id}", error, [f"{op}: ", *fragments], function, **arguments)


# fmt: off  (a row is a row)
# --- attention: shapes ------------------------------------------------------------------------------------------------

attention("q of rank 1", ValueError, ["{op}: q has shape (6,)", "expected (L, D)"], q=f32(D))
attention("q of rank 0", ValueError, ["{op}: q has shape ()", "expected (L, D)"], q=f32())
attention("k of lower rank", ValueError, ["{op}: k has shape (2, 5, 6)", "expected (B=2, G, S, D=6)"], k=f32(G, S, D))
attention("k of rank 1", ValueError, ["{op}: k has shape (6,)", "expected (B=2, G, S, D=6)"], k=f32(D))
attention("k of higher rank", ValueError, ["{op}: k has shape (1, 2, 2, 5, 6)", "expected (B=2, G, S, D=6)"],
    k=f32(1, B, G, S, D))
attention("v of lower rank", ValueError, ["{op}: v has shape (5, 7)", "expected (B=2, G=2, S=5, E)"], v=f32(S, E))
attention("rank 2 with heads in k", ValueError, ["{op}: k has shape (1, 5, 6)", "expected (S, D=6)"], q=f32(L, D),
    k=f32(1, S, D))
attention("rank 2, D", ValueError, ["{op}: k has shape (5, 7)", "expected (S, D=6)", "D is fixed by q"], q=f32(L, D),
    k=f32(S, 7))
attention("rank 3, D", ValueError, ["{op}: k has shape (2, 5, 7)", "G, S, D=6", "D is fixed by q"], q=f32(H, L, D),
    k=f32(G, S, 7))
attention("B of k", ValueError, ["{op}: k has shape (3, 2, 5, 6)", "expected (B=2, G, S, D=6)", "B is fixed by q"],
    k=f32(3, G, S, D))
attention("B of k is 1", ValueError, ["{op}: k has shape (1, 2, 5, 6)", "B is fixed by q"], k=f32(1, G, S, D))
attention("B of v", ValueError, ["{op}: v has shape (3, 2, 5, 7)", "expected (B=2, G=2, S=5, E)", "B is fixed by q"],
    v=f32(3, G, S, E))
attention(
    "leading dims of k",
    ValueError,
    ["{op}: k has shape (3, 2, 2, 5, 6)", "expected (2, 3, G, S, D=6)", "fixed by q"],
    q=f32(2, 3, H, L, D),
    k=f32(3, 2, G, S, D),
)
attention(
    "leading dims of v",
    ValueError,
    ["{op}: v has shape (2, 1, 2, 5, 7)", "expected (2, 3, G=2, S=5, E)", "fixed by q"],
    q=f32(2, 3, H, L, D),
    k=f32(2, 3, G, S, D),
    v=f32(2, 1, G, S, E),
)
attention("D of k", ValueError, ["{op}: k has shape (2, 2, 5, 7)", "expected (B=2, G, S, D=6)", "D is fixed by q"],
    k=f32(B, G, S, 7))
attention("B and D of k", ValueError, ["B and D are fixed by q"], k=f32(3, G, S, 7))
attention("G of v", ValueError, ["{op}: v has shape (2, 4, 5, 7)", "expected (B=2, G=2, S=5, E)", "G is fixed by k"],
    v=f32(B, 4, S, E))
attention("S of v", ValueError, ["{op}: v has shape (2, 2, 6, 7)", "expected (B=2, G=2, S=5, E)", "S is fixed by k"],
    v=f32(B, G, 6, E))
attention("S of v is 1", ValueError, ["{op}: v has shape (2, 2, 1, 7)", "S is fixed by k"], v=f32(B, G, 1, E))
attention("G that does not divide H", ValueError, ["{op}: k has G=3 heads", "divides H=4"], k=f32(B, 3, S, D),
    v=f32(B, 3, S, E))
attention("G above H", ValueError, ["{op}: k has G=8 heads", "divides H=4"], k=f32(B, 8, S, D), v=f32(B, 8, S, E))
attention("G = 0", ValueError, ["{op}: k has G=0 heads", "divides H=4"], k=f32(B, 0, S, D), v=f32(B, 0, S, E))

# --- attention: kinds and dtypes --------------------------------------------------------------------------------------

ARRAY = "expected a numpy.ndarray"
for name, shape in (("q", (B, H, L, D)), ("k", (B, G, S, D)), ("v", (B, G, S, E))):
    attention(f"{name} is a list", TypeError, [f"{{op}}: {name} is a list", ARRAY], **{name: f32(*shape).tolist()})
    attention(f"{name} is a number", TypeError, [f"{{op}}: {name} is a float", ARRAY], **{name: 1.0})
    attention(f"{name} is None", TypeError, [f"{{op}}: {name} is a NoneType", ARRAY], **{name: None})
    attention(f"{name} is masked", TypeError, [f"{{op}}: {name} is a numpy.ma", "MaskedArray", ARRAY],
        **{name: np.ma.masked_array(f32(*shape))})
    attention(f"{name} is a NumPy scalar", TypeError, [f"{{op}}: {name} is a numpy.float32", ARRAY], **{name: np.float32(1)})
attention("q is a matrix", TypeError, ["{op}: q is a numpy", "matrix", ARRAY], q=f32(L, D).view(np.matrix), k=f32(S, D),
    v=f32(S, E))
attention("v is a matrix", TypeError, ["{op}: v is a numpy", "matrix", ARRAY], q=f32(L, D), k=f32(S, D),
    v=f32(S, E).view(np.matrix))
for dtype in ("int64", "bool", "complex64", "object", "U1", ">f4", ">f8", "datetime64[s]", "uint8"):
    arrays = {"q": np.zeros((B, H, L, D), dtype), "k": np.zeros((B, G, S, D), dtype), "v": np.zeros((B, G, S, E), dtype)}
    attention(f"all of dtype {dtype}", TypeError, [f"{{op}}: q has dtype {np.dtype(dtype)}", f"expected {FLOATS}"], **arrays)
for dtype in ("float64", "float16", "int32", "complex128", ">f4"):
    text = f"has dtype {np.dtype(dtype)}, expected float32: it is fixed by q"
    attention(f"k of dtype {dtype}", TypeError, ["{op}: k " + text], k=np.zeros((B, G, S, D), dtype))
    attention(f"v of dtype {dtype}", TypeError, ["{op}: v " + text], v=np.zeros((B, G, S, E), dtype))
attention(
    "float16 beside bfloat16",
    TypeError,
    ["{op}: k has dtype bfloat16", "expected float16", "fixed by q"],
    q=f32(B, H, L, D).astype(np.float16),
    k=f32(B, G, S, D).astype(ml_dtypes.bfloat16),
)

# --- attention: what people bring from other libraries ----------------------------------------------------------------


class ForeignTensor:
    """An array of another framework, as far as an error message looks at it."""

    def __init__(self, library: str, dtype: str = "float32") -> None:
        self.__class__ = type("Tensor", (ForeignTensor,), {"__module__": library})
        self.dtype = dtype


BROUGHT = {
    "causal": "mask=npattn.causal()", "is_causal": "mask=npattn.causal()", "attn_mask": "mask= for booleans",
    "dropout": "dropout_mask=(rng.random(", "dropout_p": "dropout_mask=(rng.random(",
    "key_padding_mask": "mask=npattn.keys(allowed)", "window_size": "mask=npattn.window(left, right)",
    "enable_gqa": "nothing: k and v may have fewer heads", "softmax_scale": "expected scale=", "need_weights": "in its cache",
    "nonsense": "one of mask, bias, scale, softcap, sink, dropout_mask, return_lse",
}
for name, instead in BROUGHT.items():
    attention(f"keyword {name}", TypeError, [f"{{op}}: got the keyword {name}, expected", instead], **{name: None})
for library, way in (
    ("torch", "q.detach().cpu().numpy()"), ("jaxlib._jax", "np.asarray(q)"), ("tensorflow.python", "q.numpy()"),
    ("cupy", "q.get()"), ("mlx.core", "np.asarray(q)"),
):
    attention(f"q of {library}", TypeError, [f"{{op}}: q is a {library}.Tensor", f"{ARRAY}: {way}"], q=ForeignTensor(library))
attention("q of torch in bfloat16", TypeError, ["q.detach().cpu().float().numpy()"],
    q=ForeignTensor("torch", "torch.bfloat16"))
for name in ("mask", "bias", "sink", "dropout_mask"):
    attention(f"{name} of torch", TypeError, [f"{{op}}: {name} is a torch.Tensor", f"{name}.detach().cpu().numpy()"],
        **{name: ForeignTensor("torch")})
attention("a list has a way", TypeError, ["np.array(k, np.float32)"], k=[[1.0]])
row("multi_head: keyword causal", TypeError, ["multi_head: got the keyword causal", "mask=npattn.causal()"], npattn.multi_head,
    causal=True)
row("multi_head: keyword num_key_value_heads", TypeError, ["expected num_kv_heads="], npattn.multi_head_forward,
    num_key_value_heads=2)
row("softmax: keyword axis", TypeError, ["softmax: got the keyword axis", "np.moveaxis"], npattn.softmax, axis=1)
row("cross_entropy: keyword ignore_index", TypeError, ["mask=targets != ignore_index"], npattn.cross_entropy, ignore_index=-100)
row("rnn: keyword hx", TypeError, ["rnn: got the keyword hx, expected h0"], npattn.rnn, hx=None)
row("lstm: keyword hx", TypeError, ["lstm: got the keyword hx, expected h0 and c0", "needed are x, h0, c0, params"],
    npattn.lstm,
    hx=None)
row("lstm: both states as one", TypeError, ["lstm: got no params, expected x, h0, c0, params"],
    lambda x: npattn.lstm(x, (x, x), None), x=f32(B, L, D))
row("gru: keyword batch_first", TypeError, ["gru: got the keyword batch_first, expected nothing: x is (B, T, M)"], npattn.gru,
    batch_first=True)
row("multi_head: keyword n_head", TypeError, ["expected num_heads; needed are x_q, x_k, x_v, params, num_heads"],
    npattn.multi_head, n_head=4)
for name, ours in (("target", "targets"), ("labels", "targets"), ("input", "logits")):
    row(f"cross_entropy: keyword {name}", TypeError, [f"got the keyword {name}, expected {ours}", "needed are logits, targets"],
        npattn.cross_entropy, **{name: None})
row("merge: keyword causal", TypeError, ["merge: got the keyword causal, expected one of "], npattn.merge, causal=True)
row("softmax: keyword causal", TypeError, ["got the keyword causal, expected one of mask"], npattn.softmax, causal=True)
row("merge: keyword with nothing to say", TypeError, ["expected one of out_a, lse_a, out_b, lse_b"], npattn.merge, causal=True)
row("merge: one too many", TypeError, ["merge: got 5 arguments without a name, expected out_a, lse_a, out_b, lse_b"],
    lambda x: npattn.merge(x, x, x, x, x), x=f32(L, E))
row("cross_entropy: keyword attention_mask", TypeError, ["expected one of mask, reduction"], npattn.cross_entropy,
    attention_mask=None)
for name, out in (("complex", np.ones(3, complex)), ("masked", np.ma.masked_array(np.ones(3)))):
    row(f"gradcheck: an out that is {name}", TypeError, ["gradcheck: forward returns an out that is"],
        gradcheck, forward=lambda x, out=out: (out, None), backward=lambda dout, cache: dout, inputs={"x": np.ones(3)})
LAYOUT = "the layout is (B, H, L, D): if yours is (B, L, H, D), give x.swapaxes(-3, -2)"
attention("(B, L, H, D)", ValueError, ["{op}: k has G=5 heads", LAYOUT], q=f32(B, L, H, D), k=f32(B, S, G, D),
    v=f32(B, S, G, E))
attention("(B, L, H, D) seen by a sink", ValueError, ["{op}: sink has shape (4,), expected (H=3,)", LAYOUT],
    q=f32(B, L, H, D), k=f32(B, L, H, D), v=f32(B, L, H, D), sink=f32(H))
attention("(B, L, H, D) seen by a mask", ValueError, ["{op}: mask has shape (3, 3)", LAYOUT],
    q=f32(B, L, H, D), k=f32(B, L, H, D), v=f32(B, L, H, D), mask=bits(L, L))
for bad in ("no", 1, None, np.ones(3)):
    attention(f"return_lse={bad}", TypeError, ["{op}: return_lse is a", "expected True or False"], return_lse=bad)
for op, function in (("attention", npattn.attention), ("blockwise", npattn.blockwise)):
    row(f"{op}: return_lse of the short form", TypeError, [f"{op}: return_lse is a str"], function, q=f32(L, D), k=f32(S, D),
        v=f32(S, E), return_lse="no")
for out in (None, (np.ones(3), None), "text", np.ones(3, int)):
    row(f"gradcheck: a forward that returns {out}", TypeError, ["gradcheck: forward returns an out that is a", "of floats"],
        gradcheck, forward=lambda x, out=out: (out, None), backward=lambda dout, cache: dout, inputs={"x": np.ones(3)})

# --- attention: masks that are arrays ---------------------------------------------------------------------------------

FORMS = "expected (L=3, S=5) or (B=2, H=4, L=3, S=5)"
NOT_BOOL = "expected bool (True = may attend)"
attention("mask of 0 and 1", TypeError, ["{op}: mask has dtype int64", NOT_BOOL, "keys(mask.astype(bool))"], mask=ints(L, S))
attention("mask of uint8", TypeError, ["{op}: mask has dtype uint8", NOT_BOOL], mask=bits(L, S).astype(np.uint8))
attention("mask of 0 and -inf", TypeError, ["{op}: mask has dtype float32", NOT_BOOL, "given as bias"], mask=f32(L, S))
attention("mask of objects", TypeError, ["{op}: mask has dtype object", NOT_BOOL], mask=bits(L, S).astype(object))
attention("mask of rank 1", ValueError, ["{op}: mask has shape (5,)", FORMS], mask=bits(S))
attention("mask of rank 0", ValueError, ["{op}: mask has shape ()", FORMS], mask=np.array(True))
attention("mask of rank 5", ValueError, ["{op}: mask has shape (1, 2, 4, 3, 5)", FORMS], mask=bits(1, B, H, L, S))
attention("mask transposed", ValueError, ["{op}: mask has shape (5, 3)", FORMS], mask=bits(S, L))
for axis, letter in enumerate("BHLS"):
    shape = [B, H, L, S]
    shape[axis] += 1
    attention(f"{letter} of mask", ValueError, [f"{{op}}: mask has shape {tuple(shape)}", FORMS], mask=bits(*shape))
attention("mask of rank 3, of batch", ValueError, ["{op}: mask has shape (2, 3, 5)", FORMS, "mask.reshape(2, 1, 3, 5)"],
    mask=bits(B, L, S))
attention("mask of keys", ValueError, ["{op}: mask has shape (2, 5)", FORMS, "one row of keys for each sequence is keys(mask)"],
    mask=bits(B, S))  # fmt: skip
attention("mask of rank 3, of heads", ValueError, ["{op}: mask has shape (4, 3, 5)", FORMS, "mask.reshape(1, 4, 3, 5)"],
    mask=bits(H, L, S))
attention(
    "mask of rank 3 where B = H",
    ValueError,
    ["{op}: mask has shape (4, 3, 5)", "expected (L=3, S=5) or (B=4, H=4, L=3, S=5)", "mask.reshape(4, 1, 3, 5)",
        "mask.reshape(1, 4, 3, 5)"],
    q=f32(4, 4, L, D),
    k=f32(4, 4, S, D),
    v=f32(4, 4, S, E),
    mask=bits(4, L, S),
)
attention("mask is a list", TypeError, ["{op}: mask is a list", "expected a boolean array"], mask=bits(L, S).tolist())
attention("mask is a word", TypeError, ["{op}: mask is a str", "expected a boolean array"], mask="causal")
attention("mask is True", TypeError, ["{op}: mask is a bool", "expected a boolean array"], mask=True)
attention("mask is masked", TypeError, ["{op}: mask is a numpy.ma", "MaskedArray"], mask=np.ma.masked_array(bits(L, S)))
attention("mask is a matrix", TypeError, ["{op}: mask is a numpy", "matrix"], mask=bits(L, S).view(np.matrix))
attention("mask is a function", TypeError, ["{op}: mask is a function", "expected a boolean array"], mask=causal)
attention("mask is a class", TypeError, ["{op}: mask is", "expected a boolean array"], mask=Mask)
attention("mask is a bias", TypeError, ["{op}: mask is", "Alibi", "expected a boolean array"],
    mask=Alibi(f32(H), align="top_left"))

# --- attention: bias, sink, scale, softcap, dropout, options ----------------------------------------------------------

attention("bias that does not broadcast", ValueError, ["{op}: bias has shape (3, 4)", FORMS], bias=f32(L, 4))
attention("bias of rank 1", ValueError, ["{op}: bias has shape (5,)", FORMS], bias=f32(S))
attention("bias of rank 0", ValueError, ["{op}: bias has shape ()", FORMS], bias=f32())
attention("bias of rank 3", ValueError, ["{op}: bias has shape (4, 3, 5)", FORMS, "bias.reshape(1, 4, 3, 5)"],
    bias=f32(H, L, S))
for axis, letter in enumerate("BHLS"):
    shape = [B, H, L, S]
    shape[axis] += 1
    attention(f"{letter} of bias", ValueError, [f"{{op}}: bias has shape {tuple(shape)}", FORMS], bias=f32(*shape))
for dtype in ("float64", "float16", "int64", "bool", "complex128", ">f4", "longdouble"):
    attention(
        f"bias of dtype {dtype}",
        TypeError,
        [f"{{op}}: bias has dtype {np.dtype(dtype)}", "expected float32", "fixed by the inputs"],
        bias=np.zeros((L, S), dtype),
    )
attention("bias is a number", TypeError, ["{op}: bias is a float", "expected an array, Alibi or RelativeTable"],
    bias=0.5)
attention("bias is a list", TypeError, ["{op}: bias is a list", "expected an array"], bias=f32(L, S).tolist())
attention("bias is masked", TypeError, ["{op}: bias is a numpy.ma", "MaskedArray"], bias=np.ma.masked_array(f32(L, S)))
attention("bias is a matrix", TypeError, ["{op}: bias is a numpy", "matrix"], bias=f32(L, S).view(np.matrix))
attention("bias is a mask", TypeError, ["{op}: bias is", "Window", "expected an array, Alibi or RelativeTable"],
    bias=causal(align="top_left"))
attention("bias is a class", TypeError, ["{op}: bias is", "expected an array, Alibi or RelativeTable"], bias=Alibi)

for shape in ((G,), (H + 1,), (1,), (H, 1), (B, H), ()):
    attention(f"sink of shape {shape}", ValueError, [f"{{op}}: sink has shape {shape}", "expected (H=4,)"], sink=f32(*shape))
attention("sink of rank 2 inputs", ValueError, ["{op}: sink has shape (2,)", "expected (H=1,)"], q=f32(L, D), k=f32(S, D),
    v=f32(S, E), sink=f32(2))
for dtype in ("float64", "float16", "int64", "bool"):
    attention(f"sink of dtype {dtype}", TypeError, [f"{{op}}: sink has dtype {dtype}", "expected float32"],
        sink=np.zeros(H, dtype))
attention("sink is a number", TypeError, ["{op}: sink is a float", ARRAY], sink=0.5)
attention("sink is a list", TypeError, ["{op}: sink is a list", ARRAY], sink=[0.0] * H)

NUMBER = "expected a Python float or None"
for name in ("scale", "softcap"):
    for x, text in (
        ("0.5", "a str"),
        (True, "a bool"),
        (np.True_, "a numpy.bool"),
        (0.5j, "a complex"),
        ([0.5], "a list"),
        (np.array(0.5), "an array of dtype float64"),
        (np.array([0.5, 0.5]), "an array of dtype float64"),
        (ml_dtypes.bfloat16(0.5), "bfloat16"),
    ):
        attention(f"{name} is {x!r}", TypeError, [f"{{op}}: {name} is ", text, NUMBER], **{name: x})
for x in (np.nan, np.inf, -np.inf, 10**400):
    attention(f"scale is {str(x)[:5]}", ValueError, ["{op}: scale is ", str(x)[:5], "expected a finite number"], scale=x)
for x in (0, 0.0, -1.0, np.nan, np.inf, 10**400):
    text = ["{op}: softcap is ", str(x)[:5], "expected a positive finite number", "softcap=None"]
    attention(f"softcap is {str(x)[:5]}", ValueError, text, softcap=x)

DRAWN = "expected an array that the caller drew, 0 or 1/(1-p) for each pair"
attention("dropout_mask is a rate", TypeError,
    ["{op}: dropout_mask is a float", DRAWN, "(rng.random(shape) >= p) / (1 - p)"], dropout_mask=0.1)
attention("dropout_mask is boolean", TypeError, ["{op}: dropout_mask has dtype bool", "expected float32"],
    dropout_mask=bits(L, S))
attention("dropout_mask of dtype float64", TypeError, ["{op}: dropout_mask has dtype float64", "expected float32"],
    dropout_mask=f64(L, S))
attention("dropout_mask of dtype int64", TypeError, ["{op}: dropout_mask has dtype int64", "expected float32"],
    dropout_mask=ints(L, S))
attention("dropout_mask negative", ValueError, ["{op}: dropout_mask reaches from -1.0 to", DRAWN],
    dropout_mask=f32(L, S) - 2)
attention("dropout_mask with NaN", ValueError, ["{op}: dropout_mask", "nan", DRAWN],
    dropout_mask=f32(L, S) + np.float32(np.nan))
attention("dropout_mask with inf", ValueError, ["{op}: dropout_mask", "inf", DRAWN],
    dropout_mask=f32(L, S) + np.float32(np.inf))
attention("dropout_mask of rank 3", ValueError,
    ["{op}: dropout_mask has shape (4, 3, 5)", FORMS, "dropout_mask.reshape(1, 4, 3, 5)"], dropout_mask=f32(H, L, S))
attention("dropout_mask is a list", TypeError, ["{op}: dropout_mask is a list", DRAWN],
    dropout_mask=f32(L, S).tolist())
attention("dropout_mask is a mask", TypeError, ["{op}: dropout_mask is", "Window"], dropout_mask=causal(align="top_left"))
attention("dropout_mask is a bias", TypeError, ["{op}: dropout_mask is", "Alibi"], dropout_mask=Alibi(f32(H), align="top_left"))
for axis, letter in enumerate("BHLS"):
    shape = [B, H, L, S]
    shape[axis] += 1
    attention(f"{letter} of dropout_mask", ValueError, [f"{{op}}: dropout_mask has shape {tuple(shape)}", FORMS],
        dropout_mask=f32(*shape))
for op, function in (("attention", npattn.attention), ("blockwise", npattn.blockwise)):
    row(f"{op}: mask by position", TypeError, [f"{op}: got 4 arguments without a name, expected q, k, v"],
        lambda q, mask, f=function: f(q, q, q, mask),
        q=f32(L, D), mask=bits(L, L))

# --- masks over positions ---------------------------------------------------------------------------------------------

TWO = 'align="top_left"', 'align="bottom_right"', "offset=n", "q_pos and k_pos"
masked("causal() where L != S", ValueError, ["causal: got L=3 queries and S=5 keys", *TWO], causal)
masked("window() where L != S", ValueError, ["window: got L=3 queries and S=5 keys", *TWO], window, left=1, right=0)
masked("align=left", ValueError, ["causal: align is 'left'", "'top_left', 'bottom_right'"], causal, align="left")
masked("align=True", ValueError, ["causal: align is True", "'top_left', 'bottom_right'"], causal, align=True)
ONE_OF = "causal: got more than one of positions, align and offset"
masked("align and offset", ValueError, [ONE_OF, "at most one"], causal, align="top_left", offset=1)
masked("align and positions", ValueError, [ONE_OF], causal, align="top_left", q_pos=np.arange(L))
masked("offset and positions", ValueError, [ONE_OF], causal, offset=1, k_pos=np.arange(S))
masked("align by position", TypeError, ["causal: q_pos has dtype <U12", "expected integers"], causal, q_pos="bottom_right")
masked("q_pos of float dtype", TypeError, ["causal: q_pos has dtype float64", "expected integers"], causal,
    q_pos=np.arange(3.0))
masked("k_pos of bool dtype", TypeError, ["causal: k_pos has dtype bool", "expected integers"], causal, k_pos=bits(S))
masked("q_pos of wrong L", ValueError, ["causal: q_pos has shape (4,)", "expected (L=3,) or one row a sequence, (2, 3)"],
    causal, q_pos=ints(4))
masked("q_pos of wrong batch", ValueError, ["causal: q_pos has shape (3, 3)", "one row a sequence, (2, 3)"], causal,
    q_pos=ints(3, L))
masked("q_pos of heads", ValueError, ["causal: q_pos has shape (2, 4, 3)", "one row a sequence, (2, 3)"], causal,
    q_pos=ints(B, H, L))
masked("k_pos of wrong batch", ValueError, ["causal: k_pos has shape (4, 5)", "expected (S=5,) or one row a sequence, (2, 5)"],
    causal, k_pos=ints(4, S))
masked("k_pos of wrong S", ValueError, ["causal: k_pos has shape (3,)", "expected (S=5,)"], causal, k_pos=ints(3))
masked("q_pos beyond 2**61", ValueError, ["causal: q_pos reaches from", "2**61"], causal, q_pos=np.array([0, 1, 2**61]))
masked("k_pos beyond -2**61", ValueError, ["causal: k_pos reaches from", "2**61"], causal,
    k_pos=np.array([0, 1, 2, 3, -(2**62)]))
masked("q_pos of uint64 beyond", ValueError, ["causal: q_pos reaches from", "2**61"], causal,
    q_pos=np.array([0, 1, 2**64 - 1], np.uint64))
masked("q_pos of Python integers beyond", TypeError, ["causal: q_pos has dtype object", "expected integers"], causal,
    q_pos=[0, 1, 2**70])
masked("q_pos in rows of two lengths", ValueError, ["causal: q_pos", "expected"], causal, q_pos=[[0, 1, 2], [0, 1]])
masked("q_pos is masked", TypeError, ["causal: q_pos is a numpy.ma", "MaskedArray"], causal,
    q_pos=np.ma.masked_array(np.arange(L)))
masked("offset of float dtype", TypeError, ["causal: offset has dtype float64", "expected integers"], causal, offset=1.5)
masked("offset of wrong batch", ValueError, ["causal: offset has shape (3,)", "expected one number a sequence, (2,)"], causal,
    offset=[1, 2, 3])
masked("offset beyond 2**61", ValueError, ["causal: offset reaches from", "2**61"], causal, offset=2**61)

LIMIT = "expected an integer of at least 0, or None for no limit"
masked("window(-1, 0)", ValueError, ["window: left is -1", LIMIT], window, left=-1, right=0)
masked("window(0, -2)", ValueError, ["window: right is -2", LIMIT], window, left=0, right=-2)
masked("window(1.5, 0)", TypeError, ["window: left is a float", "expected an integer"], window, left=1.5, right=0)
masked("window(True, 0)", TypeError, ["window: left is a bool", "expected an integer"], window, left=True, right=0)
masked("window(0, np.True_)", TypeError, ["window: right is a numpy.bool", "expected an integer"], window, left=0,
    right=np.True_)
masked("window('1', 0)", TypeError, ["window: left is a str", "expected an integer"], window, left="1", right=0)
masked("window of an array", TypeError, ["window: left is an array of dtype int64", "expected an integer"], window,
    left=np.array([1, 2]), right=0)
masked("window without right", TypeError, ["missing 1 required positional argument: 'right'"], window, left=1)

for op, make, letter, n in (("key_lengths", key_lengths, "S", S), ("query_lengths", query_lengths, "L", L)):
    masked(f"{op} negative", ValueError, [f"{op}: n reaches from -1 to 2", f"expected 0 to {letter}={n}"], make,
        n=np.array([-1, 2]))
    masked(f"{op} beyond", ValueError, [f"{op}: n reaches from 1 to {n + 1}", f"expected 0 to {letter}={n}"], make,
        n=np.array([1, n + 1]))
    masked(f"{op} of floats", TypeError, [f"{op}: n has dtype float64", "expected integers"], make, n=np.array([1.0, 2.0]))
    masked(f"{op} of booleans", TypeError, [f"{op}: n has dtype bool", "expected integers"], make, n=np.array([True, False]))
    masked(f"{op} of the wrong batch", ValueError, [f"{op}: n has shape (3,)", "expected one number a sequence, (2,)"], make,
        n=ints(3))
    masked(f"{op} of rank 2", ValueError, [f"{op}: n has shape (2, 1)", "expected one number a sequence, (2,)"], make,
        n=ints(B, 1))
    masked(f"{op} is None", TypeError, [f"{op}: n has dtype object", "expected integers"], make, n=None)
    masked(f"{op} is masked", TypeError, [f"{op}: n is a numpy.ma", "MaskedArray"], make, n=np.ma.masked_array(ints(B)))

masked("keys of ints", TypeError, ["keys: allowed has dtype int64", NOT_BOOL, "allowed.astype(bool)"], keys, allowed=ints(S))
masked("keys of floats", TypeError, ["keys: allowed has dtype float32", NOT_BOOL], keys, allowed=f32(B, S))
masked("keys of wrong S", ValueError, ["keys: allowed has shape (4,)", "expected (S=5,) or one row a sequence, (2, 5)"], keys,
    allowed=bits(4))
masked("keys of wrong batch", ValueError, ["keys: allowed has shape (3, 5)", "one row a sequence, (2, 5)"], keys,
    allowed=bits(3, S))
masked("keys over pairs", ValueError, ["keys: allowed has shape (2, 3, 5)", "one row a sequence, (2, 5)"], keys,
    allowed=bits(B, L, S))
masked("keys is one", ValueError, ["keys: allowed has shape ()", "expected (S=5,)"], keys, allowed=True)
masked("keys in rows of two lengths", ValueError, ["keys: allowed", "expected"], keys, allowed=[[True] * 5, [True] * 4])
masked("keys is masked", TypeError, ["keys: allowed is a numpy.ma", "MaskedArray"], keys, allowed=np.ma.masked_array(bits(S)))

masked("segments, L", ValueError, ["segments: q_ids has shape (4,)", "expected (L=3,) or one row a sequence, (2, 3)"],
    segments, q_ids=ints(4), k_ids=ints(S))
masked("segments, S", ValueError, ["segments: k_ids has shape (3,)", "expected (S=5,) or one row a sequence, (2, 5)"],
    segments, q_ids=ints(L), k_ids=ints(3))
masked("segments, batch", ValueError, ["segments: k_ids has shape (3, 5)", "one row a sequence, (2, 5)"], segments,
    q_ids=ints(B, L), k_ids=ints(3, S))
masked("segments of floats", TypeError, ["segments: q_ids has dtype float64", "expected integers"], segments, q_ids=f64(L),
    k_ids=ints(S))
masked("segments of words", TypeError, ["segments: k_ids has dtype <U1", "expected integers"], segments, q_ids=ints(L),
    k_ids=["a"] * S)

ENDS = "expected (n + 1,) ends that start at 0 and never fall"
masked("packed does not start at 0", ValueError, ["packed: cu_seqlens_q is [1, 3]", ENDS], packed, cu_seqlens_q=[1, 3],
    cu_seqlens_k=[0, 5])
masked("packed falls", ValueError, ["packed: cu_seqlens_k is [0, 6, 5]", ENDS], packed, cu_seqlens_q=[0, 1, 3],
    cu_seqlens_k=[0, 6, 5])
masked("packed of rank 2", ValueError, ["packed: cu_seqlens_q is [[0, 3]]", ENDS], packed, cu_seqlens_q=[[0, 3]],
    cu_seqlens_k=[0, 5])
masked("packed of rank 0", ValueError, ["packed: cu_seqlens_q is 3", ENDS], packed, cu_seqlens_q=3, cu_seqlens_k=[0, 5])
masked("packed empty", ValueError, ["packed: cu_seqlens_q is []", ENDS], packed, cu_seqlens_q=ints(0), cu_seqlens_k=[0, 5])
masked("packed ends before L", ValueError, ["packed: cu_seqlens_q ends at 2", "expected L=3"], packed, cu_seqlens_q=[0, 2],
    cu_seqlens_k=[0, 5])
masked("packed ends beyond S", ValueError, ["packed: cu_seqlens_k ends at 6", "expected S=5"], packed, cu_seqlens_q=[0, 3],
    cu_seqlens_k=[0, 6])
masked("packed of two counts", ValueError, ["packed: cu_seqlens_k has 2 ends", "expected 3", "cu_seqlens_q"], packed,
    cu_seqlens_q=[0, 1, 3], cu_seqlens_k=[0, 5])
masked("packed of floats", TypeError, ["packed: cu_seqlens_q has dtype float64", "expected integers"], packed,
    cu_seqlens_q=[0.0, 3.0], cu_seqlens_k=[0, 5])
masked("packed, align", ValueError, ["packed: align is 'left'", "'top_left', 'bottom_right'"], packed, cu_seqlens_q=[0, 3],
    cu_seqlens_k=[0, 5], align="left")

masked("blocks of wrong counts", ValueError, ["blocks: array has shape (3, 5)", "expected (L=2, S=3)"], blocks,
    array=bits(L, S), size=2)
masked("blocks of wrong heads", ValueError, ["blocks: array has shape (2, 3, 2, 3)", "(B=2, H=4, L=2, S=3)"], blocks,
    array=bits(B, 3, 2, 3), size=2)
masked("blocks of size 0", ValueError, ["blocks: size is 0", "expected an integer of at least 1"], blocks, array=bits(L, S),
    size=0)
masked("blocks of size (2, -1)", ValueError, ["blocks: size is -1", "at least 1"], blocks, array=bits(L, S), size=(2, -1))
masked("blocks of three sizes", ValueError, ["blocks: size is (1, 1, 1)", "expected an integer or (rows, cols)"], blocks,
    array=bits(L, S), size=(1, 1, 1))
masked("blocks of float size", TypeError, ["blocks: size is a float", "expected an integer"], blocks,
    array=bits(L, S), size=1.0)
masked("blocks of a list of sizes", TypeError, ["blocks: size is a list", "expected an integer"], blocks,
    array=bits(L, S), size=[1, 1])
masked("blocks of ints", TypeError, ["blocks: array has dtype int64", NOT_BOOL], blocks, array=ints(L, S), size=1)
masked("blocks of rank 1", ValueError, ["blocks: array has shape (3,)", "expected (L=2, S=3)"], blocks, array=bits(3), size=2)

masked("where() of ints", TypeError, ["where: function returns dtype int64", NOT_BOOL], where, function=lambda i, j: i - j)
masked("where() of floats", TypeError, ["where: function returns dtype float64", NOT_BOOL], where, function=lambda i,
    j: (i - j) * 1.0)
masked("where() of None", TypeError, ["where: function returns dtype object", NOT_BOOL], where, function=lambda i, j: None)
masked("where() of wrong shape", ValueError, ["where: function returns shape (2, 2)", "expected"], where, function=lambda i,
    j: bits(2, 2))
masked("where() of wrong shape, if there is more than one pair", ValueError,
    ["where: function returns shape (15,)", "expected (3, 5)"], where, function=lambda i, j: (i >= j).ravel())
masked("where() of one axis too many", ValueError, ["where: function returns shape (1, 1, 1)", "expected"], where,
    function=lambda i, j: (i >= j)[None])
masked("where() of an array", TypeError, ["where: function is an array of dtype bool", "expected a function of (i, j)"], where,
    function=bits(L, S))
masked("where() of None itself", TypeError, ["where: function is a NoneType", "expected a function of (i, j)"], where,
    function=None)

masked("and in place of &", TypeError, ["mask: a mask has no truth value", "& | ~", "not with and, or, not"],
    lambda: causal() and key_lengths(3))
masked("or in place of |", TypeError, ["mask: a mask has no truth value", "& | ~"], lambda: causal() or key_lengths(3))
masked("not in place of ~", TypeError, ["mask: a mask has no truth value", "& | ~"], lambda: not causal())
masked("mask & ints", TypeError, ["mask & mask: mask has dtype int64", NOT_BOOL],
    lambda array: causal(align="top_left") & array, array=ints(L, S))
masked("mask | True", TypeError, ["mask | mask: mask is a bool", "expected a boolean array"],
    lambda: causal(align="top_left") | True)
masked("array & mask", ValueError, ["mask & mask: mask has shape (5, 3)", FORMS],
    lambda array: array & causal(align="top_left"), array=bits(S, L))
masked("mask & bias", TypeError, ["mask & mask: mask is", "Alibi", "expected a boolean array"],
    lambda slopes: causal(align="top_left") & Alibi(slopes, align="top_left"), slopes=f32(H))

# --- biases -----------------------------------------------------------------------------------------------------------

masked("Alibi, slopes of rank 2", ValueError, ["Alibi: slopes has shape (4, 1)", "expected (H,)"], Alibi, slopes=f32(H, 1))
masked("Alibi, slopes of rank 0", ValueError, ["Alibi: slopes has shape ()", "expected (H,)"], Alibi, slopes=f32())
masked("Alibi, H + 1 slopes", ValueError, ["Alibi: slopes has shape (5,)", "expected (H=4,)", "fixed by q"], Alibi,
    slopes=f32(H + 1), align="top_left")
masked("Alibi, a list of slopes", TypeError, ["Alibi: slopes is a list", ARRAY], Alibi, slopes=[0.5] * H)
masked("Alibi, slopes of float64", TypeError, ["bias has dtype float64", "expected float32"], Alibi, slopes=f64(H),
    align="top_left")
masked("Alibi, slopes of integers", TypeError, ["bias has dtype int64", "expected float32"], Alibi, slopes=ints(H),
    align="top_left")
masked("Alibi where L != S", ValueError, ["Alibi: got L=3 queries and S=5 keys", *TWO], Alibi, slopes=f32(H))
masked("Alibi, q_pos of wrong batch", ValueError, ["Alibi: q_pos has shape (4, 3)", "one row a sequence, (2, 3)"], Alibi,
    slopes=f32(H), q_pos=ints(4, L))
masked("Alibi, k_pos of floats", TypeError, ["Alibi: k_pos has dtype float64", "expected integers"], Alibi, slopes=f32(H),
    k_pos=f64(S))
masked("Alibi, align", ValueError, ["Alibi: align is 'left'", "'top_left', 'bottom_right'"], Alibi, slopes=f32(H), align="left")
masked("Alibi, align and offset", ValueError, ["Alibi: got more than one of positions, align and offset"], Alibi,
    slopes=f32(H), align="top_left", offset=1)
row("alibi_slopes(0)", ValueError, ["alibi_slopes: num_heads is 0", "expected an integer of at least 1"], alibi_slopes,
    num_heads=0)
row("alibi_slopes(2.0)", TypeError, ["alibi_slopes: num_heads is a float", "expected an integer"], alibi_slopes,
    num_heads=2.0)

BUCKETS = "RelativeTable: buckets"
masked("RelativeTable, table of rank 1", ValueError,
    ["RelativeTable: table has shape (9,)", "expected (number of buckets, H)"], RelativeTable, table=f32(9), buckets=ints(L, S))
masked("RelativeTable, H + 1 columns", ValueError, ["RelativeTable: table has shape (9, 5)", "H=4"], RelativeTable,
    table=f32(9, H + 1), buckets=ints(L, S))
masked("RelativeTable, a list", TypeError, ["RelativeTable: table is a list", ARRAY], RelativeTable,
    table=[[0.0] * H], buckets=ints(L, S))
masked("RelativeTable, table of float64", TypeError, ["bias has dtype float64", "expected float32"], RelativeTable,
    table=f64(9, H), buckets=ints(L, S))
masked("RelativeTable, buckets negative", ValueError,
    [f"{BUCKETS} reaches from -1 to -1", "expected 0 to 8", "fixed by table"], RelativeTable, table=f32(9, H), buckets=ints(L,
    S) - 1)
masked("RelativeTable, buckets beyond", ValueError, [f"{BUCKETS} reaches from 9 to 9", "expected 0 to 8"], RelativeTable,
    table=f32(9, H), buckets=ints(L, S) + 9)
masked("RelativeTable, buckets of floats", TypeError, [f"{BUCKETS} has dtype float64", "expected integers"], RelativeTable,
    table=f32(9, H), buckets=f64(L, S))
masked("RelativeTable, buckets of booleans", TypeError, [f"{BUCKETS} has dtype bool", "expected integers"], RelativeTable,
    table=f32(9, H), buckets=bits(L, S))
masked("RelativeTable, buckets of wrong S", ValueError, ["RelativeTable: buckets has shape (3, 4)", FORMS], RelativeTable,
    table=f32(9, H), buckets=ints(L, 4))
masked("RelativeTable, buckets of rank 3", ValueError,
    ["RelativeTable: buckets has shape (4, 3, 5)", "buckets.reshape(1, 4, 3, 5)"], RelativeTable, table=f32(9, H),
    buckets=ints(H, L, S))
masked("RelativeTable, positions with array buckets", ValueError,
    ["RelativeTable: got positions", "expected none where buckets is an array"], RelativeTable, table=f32(9, H),
    buckets=ints(L, S), align="top_left")
masked("RelativeTable, buckets is None", TypeError, [f"{BUCKETS} has dtype object", "expected integers"], RelativeTable,
    table=f32(9, H), buckets=None)
masked("RelativeTable, function of floats", TypeError, [f"{BUCKETS} has dtype float64", "expected integers"], RelativeTable,
    table=f32(9, H), buckets=lambda r: r * 0.5, align="top_left")
masked("RelativeTable, function beyond the table", ValueError, [f"{BUCKETS} reaches from", "expected 0 to 8"], RelativeTable,
    table=f32(9, H), buckets=lambda r: r * r, align="top_left")
masked("RelativeTable, function negative", ValueError, [f"{BUCKETS} reaches from -2", "expected 0 to 8"], RelativeTable,
    table=f32(9, H), buckets=lambda r: r, align="top_left")
masked("RelativeTable, function of wrong shape", ValueError, [f"{BUCKETS} returns shape (2,)", "expected"], RelativeTable,
    table=f32(9, H), buckets=lambda r: ints(2), align="top_left")
masked("RelativeTable where L != S", ValueError, ["RelativeTable: got L=3 queries and S=5 keys", *TWO], RelativeTable,
    table=f32(9, H), buckets=lambda r: r * 0)

# --- attention backward -----------------------------------------------------------------------------------------------

FORWARD = "it is fixed by the forward"
for axis, letter in enumerate("BHLE"):
    shape = [B, H, L, E]
    shape[axis] += 1
    backward(f"{letter} of dout", ValueError, [f"dout has shape {tuple(shape)}", "expected (2, 4, 3, 7)", FORWARD],
        dout=f32(*shape))
backward("dout that would broadcast", ValueError, ["dout has shape (3, 7)", "expected (2, 4, 3, 7)", FORWARD], dout=f32(L, E))
backward("dout of float64", TypeError, ["dout has dtype float64", "expected float32", FORWARD], dout=f64(B, H, L, E))
backward("dout of float16", TypeError, ["dout has dtype float16", "expected float32", FORWARD],
    dout=f32(B, H, L, E).astype(np.float16))
backward("dout is a list", TypeError, ["dout is a list", ARRAY], dout=f32(B, H, L, E).tolist())
backward("dout is (dout, dlse)", TypeError, ["dout is a tuple", ARRAY], dout=(f32(B, H, L, E), f32(B, H, L)))
backward("dout is None", TypeError, ["dout is a NoneType", ARRAY], dout=None)
backward("dlse of float64", TypeError, ["dlse has dtype float64", "expected float32", FORWARD], dlse=f64(B, H, L))
backward("dlse of float16 inputs in float16", TypeError, ["dlse has dtype float16", "expected float32"], np.float16,
    dlse=f32(B, H, L).astype(np.float16))
backward("dout of float16 inputs in float32", TypeError, ["dout has dtype float32", "expected float16"], np.float16,
    dout=f32(B, H, L, E))
backward("dlse with a last axis", ValueError, ["dlse has shape (2, 4, 3, 1)", "expected (2, 4, 3)", FORWARD],
    dlse=f32(B, H, L, 1))
backward("dlse is a number", TypeError, ["dlse is a float", ARRAY], dlse=1.0)
backward("cache is None", TypeError, ["cache is", "AttentionCache"], cache=None)
backward("cache is the output", TypeError, ["cache is", "AttentionCache"], cache=f32(B, H, L, E))
row(
    "attention_backward: cache of blockwise",
    (TypeError, ValueError),
    ["attention: ", "cache", "expected that of attention_forward"],
    lambda q: npattn.attention_backward(q, npattn.blockwise_forward(q, q, q)[1]),
    q=f32(L, D),
)
row(
    "blockwise_backward: cache of attention",
    (TypeError, ValueError),
    ["blockwise: ", "cache", "expected that of blockwise_forward"],
    lambda q: npattn.blockwise_backward(q, npattn.attention_forward(q, q, q)[1]),
    q=f32(L, D),
)

# --- softmax, log-sum-exp, cross-entropy ------------------------------------------------------------------------------

for op, function in (("softmax", npattn.softmax_forward), ("log_sum_exp", npattn.log_sum_exp_forward)):
    row(f"{op} of rank 0", ValueError, [f"{op}: scores has shape ()", "expected (..., S)"], function, scores=f32())
    row(f"{op} of a list", TypeError, [f"{op}: scores is a list", ARRAY], function, scores=[0.0, 1.0])
    row(f"{op} of integers", TypeError, [f"{op}: scores has dtype int64", f"expected {FLOATS}"], function, scores=ints(L, S))
    row(f"{op}, mask of ints", TypeError, [f"{op}: mask has dtype int64", NOT_BOOL], function, scores=f32(L, S),
        mask=ints(L, S))
    row(f"{op}, mask of wrong rank", ValueError, [f"{op}: mask has shape (4, 3, 5)", FORMS, "mask.reshape(1, 4, 3, 5)"],
        function, scores=f32(B, H, L, S), mask=bits(H, L, S))
    row(f"{op}, mask of rank 2 for rank 1", ValueError, [f"{op}: mask has shape (3, 5)", "expected (5,)"], function,
        scores=f32(S), mask=bits(L, S))
    row(f"{op}, mask of wrong S", ValueError, [f"{op}: mask has shape (3, 4)", "expected (L=3, S=5)"], function,
        scores=f32(L, S), mask=bits(L, 4))
    row(f"{op}, positions for rank 1", ValueError, [f"{op}: scores has shape (5,)", "expected (..., L, S)"], function,
        scores=f32(S), mask=causal())
softmax_cache, lse_cache = npattn.softmax_forward(f32(L, S))[1], npattn.log_sum_exp_forward(f32(L, S))[1]
row("softmax_backward, shape", ValueError, ["softmax: dweights has shape (5,)", "expected (3, 5)", FORWARD],
    npattn.softmax_backward, dweights=f32(S), cache=softmax_cache)
row("softmax_backward, dtype", TypeError, ["softmax: dweights has dtype float64", "expected float32"], npattn.softmax_backward,
    dweights=f64(L, S), cache=softmax_cache)
row("log_sum_exp_backward, shape", ValueError, ["log_sum_exp: dlse has shape (3, 1)", "expected (3,)", FORWARD],
    npattn.log_sum_exp_backward, dlse=f32(L, 1), cache=lse_cache)
row("log_sum_exp_backward, dtype", TypeError, ["log_sum_exp: dlse has dtype float64", "expected float32"],
    npattn.log_sum_exp_backward, dlse=f64(L), cache=lse_cache)

entropy, RANGE = npattn.cross_entropy_forward, "expected 0 to V - 1 = 4"
row("cross_entropy, targets beyond", ValueError, ["cross_entropy: targets reaches from 5 to 5", RANGE], entropy,
    logits=f32(L, 5), targets=ints(L) + 5)
row("cross_entropy, targets of -100", ValueError, ["cross_entropy: targets reaches from -100 to -100", RANGE, "mask"], entropy,
    logits=f32(L, 5), targets=ints(L) - 100)
row("cross_entropy, targets of floats", TypeError, ["cross_entropy: targets has dtype float64", "expected integers"], entropy,
    logits=f32(L, 5), targets=f64(L))
row("cross_entropy, targets of booleans", TypeError, ["cross_entropy: targets has dtype bool", "expected integers"], entropy,
    logits=f32(L, 5), targets=bits(L))
row("cross_entropy, one-hot targets", ValueError,
    ["cross_entropy: targets has shape (3, 5)", "expected (B=3,)", "fixed by logits"], entropy, logits=f32(L, 5),
    targets=ints(L, 5))
row("cross_entropy, targets of wrong batch", ValueError, ["cross_entropy: targets has shape (4,)", "fixed by logits"], entropy,
    logits=f32(L, 5), targets=ints(4))
row("cross_entropy, a list of targets", TypeError, ["cross_entropy: targets is a list", f"{ARRAY}: np.array(targets, int)"],
    entropy, logits=f32(L, 5), targets=[0] * L)
row("cross_entropy, reduction", ValueError, ["cross_entropy: reduction is 'avg'", "'mean', 'sum', 'none'"], entropy,
    logits=f32(L, 5), targets=ints(L), reduction="avg")
row("cross_entropy, mask of ints", TypeError, ["cross_entropy: mask has dtype int64", "expected bool (True = counts)"],
    entropy, logits=f32(L, 5), targets=ints(L), mask=ints(L))
row("cross_entropy, mask of wrong shape", ValueError, ["cross_entropy: mask has shape (4,)", "fixed by logits"], entropy,
    logits=f32(L, 5), targets=ints(L), mask=bits(4))
row("cross_entropy, mask is a list", TypeError, ["cross_entropy: mask is a list", f"{ARRAY}: np.array(mask, bool)"], entropy,
    logits=f32(L, 5), targets=ints(L), mask=[True] * L)
row("cross_entropy, logits of rank 0", ValueError, ["cross_entropy: logits has shape ()"], entropy, logits=f32(),
    targets=ints())
row("cross_entropy, logits of integers", TypeError, ["cross_entropy: logits has dtype int64", f"expected {FLOATS}"], entropy,
    logits=ints(L, 5), targets=ints(L))
for reduction, shape in (("none", ()), ("mean", (L,))):
    _, cache = entropy(f32(L, 5), ints(L), reduction=reduction)
    text = [f"cross_entropy: dloss has shape {shape}", f"expected {(L,) if reduction == 'none' else ()}"]
    row(f"cross_entropy_backward, {reduction}", ValueError, text, npattn.cross_entropy_backward, dloss=f32(*shape), cache=cache)

# --- merge ------------------------------------------------------------------------------------------------------------

PARTS = {"out_a": f32(B, L, E), "lse_a": f32(B, L), "out_b": f32(B, L, E), "lse_b": f32(B, L)}


def merge(id: str, error: type[Exception], fragments: list[str], **change: Any) -> None:
    row(f"merge: {id}", error, fragments, npattn.merge_forward, **PARTS | change)


merge("out_a of rank 1", ValueError, ["merge: out_a has shape (7,)", "expected (..., L, E)"], out_a=f32(E))
merge("L of lse_a", ValueError, ["merge: lse_a has shape (2, 4)", "expected (B=2, L=3)", "L is fixed by out_a"],
    lse_a=f32(B, 4))
merge("lse_a with a last axis", ValueError, ["merge: lse_a has shape (2, 3, 1)", "expected (B=2, L=3)"], lse_a=f32(B, L, 1))
merge("B of out_b", ValueError, ["merge: out_b has shape (3, 3, 7)", "expected (B=2, L=3, E=7)", "B is fixed by out_a"],
    out_b=f32(3, L, E))
merge("L of out_b", ValueError, ["merge: out_b has shape (2, 4, 7)", "L is fixed by out_a"], out_b=f32(B, 4, E))
merge("E of out_b", ValueError, ["merge: out_b has shape (2, 3, 8)", "E is fixed by out_a"], out_b=f32(B, L, 8))
merge("L of lse_b", ValueError, ["merge: lse_b has shape (2, 4)", "expected (B=2, L=3)"], lse_b=f32(B, 4))
merge("out_a is a list", TypeError, ["merge: out_a is a list", ARRAY], out_a=f32(L, E).tolist())
merge("out_b of float64", TypeError, ["merge: out_b has dtype float64", "expected float32", "fixed by out_a"],
    out_b=f64(B, L, E))
merge("lse_a of float64", TypeError, ["merge: lse_a has dtype float64", "expected float32"], lse_a=f64(B, L))
merge("lse_b is a number", TypeError, ["merge: lse_b is a float", ARRAY], lse_b=0.0)
merge("outputs of integers", TypeError, ["merge: out_a has dtype int64", f"expected {FLOATS}"], out_a=ints(B, L, E),
    out_b=ints(B, L, E))
half = {name: f32(B, L, E).astype(np.float16) for name in ("out_a", "out_b")}
merge("lse of float16 outputs in float16", TypeError, ["merge: lse_a has dtype float16", "expected float32"], **half,
    lse_a=f32(B, L).astype(np.float16))
_, merged = npattn.merge_forward(**PARTS)
row("merge_backward, dout", ValueError, ["merge: dout has shape (3, 7)", "expected (2, 3, 7)", FORWARD], npattn.merge_backward,
    dout=f32(L, E), cache=merged)
row("merge_backward, dlse", TypeError, ["merge: dlse has dtype float64", "expected float32"], npattn.merge_backward,
    dout=f32(B, L, E), cache=merged, dlse=f64(B, L))

# --- multi-head -------------------------------------------------------------------------------------------------------

M, MK, MV, OUT = 10, 11, 9, 13
PARAMS = MultiHeadParams(
    f32(M, H * D), f32(MK, G * D), f32(MV, G * E), f32(H * E, OUT), f32(H * D), f32(G * D), f32(G * E), f32(OUT)
)  # fmt: skip


def heads(id: str, error: type[Exception], fragments: list[str], **change: Any) -> None:
    arguments = {"x_q": f32(B, L, M), "x_k": f32(B, S, MK), "x_v": f32(B, S, MV), "params": PARAMS, "num_heads": H,
        "num_kv_heads": G}
    row(f"multi_head: {id}", error, fragments, npattn.multi_head_forward, **arguments | change)


def weights(id: str, error: type[Exception], fragments: list[str], **change: Any) -> None:
    heads(id, error, fragments, params=PARAMS._replace(**change))


heads("x_q of rank 1", ValueError, ["multi_head: x_q has shape (10,)", "expected (..., L, M)"], x_q=f32(M))
heads("B of x_k", ValueError, ["multi_head: x_k has shape (3, 5, 11)", "B is fixed by x_q"], x_k=f32(3, S, MK))
heads("S of x_v", ValueError, ["multi_head: x_v has shape (2, 6, 9)", "S is fixed by x_k"], x_v=f32(B, 6, MV))
heads("M of x_q", ValueError, ["multi_head: w_q has shape (10, 24)", "M=8", "fixed by x_q"], x_q=f32(B, L, 8))
heads("x_q is a list", TypeError, ["multi_head: x_q is a list", ARRAY], x_q=f32(B, L, M).tolist())
heads("x_k of float64", TypeError, ["multi_head: x_k has dtype float64", "expected float32", "fixed by x_q"], x_k=f64(B, S, MK))
heads("x of integers", TypeError, ["multi_head: x_q has dtype int64", f"expected {FLOATS}"], x_q=ints(B, L, M))
heads("params is a tuple", TypeError, ["multi_head: params is a tuple", "expected npattn.MultiHeadParams"],
    params=tuple(PARAMS))
heads("params is a mapping", TypeError, ["multi_head: params is a dict", "expected npattn.MultiHeadParams"],
    params=PARAMS._asdict())
heads("params is None", TypeError, ["multi_head: params is a NoneType", "expected npattn.MultiHeadParams"], params=None)
heads("num_heads is 0", ValueError, ["multi_head: num_heads is 0", "expected an integer of at least 1"], num_heads=0)
heads("num_heads is negative", ValueError, ["multi_head: num_heads is -4", "at least 1"], num_heads=-4)
heads("num_heads is a float", TypeError, ["multi_head: num_heads is a float", "expected an integer"], num_heads=4.0)
heads("num_heads is True", TypeError, ["multi_head: num_heads is a bool", "expected an integer"], num_heads=True)
heads("num_heads is None", TypeError, ["multi_head: num_heads is a NoneType", "expected an integer"], num_heads=None)
heads("num_heads does not divide w_q", ValueError, ["multi_head: w_q has shape (10, 24)", "10 heads divide"], num_heads=10)
heads("num_kv_heads does not divide num_heads", ValueError, ["multi_head: num_kv_heads is 3", "divides num_heads=4"],
    num_kv_heads=3)
heads("num_kv_heads is 0", ValueError, ["multi_head: num_kv_heads is 0", "at least 1"], num_kv_heads=0)
heads("num_kv_heads is a word", TypeError, ["multi_head: num_kv_heads is a str", "expected an integer"],
    num_kv_heads="2")
heads("num_kv_heads forgotten", ValueError, ["multi_head: w_k has shape (11, 12)", "G*D=24", "fixed by w_q"], num_kv_heads=None)
heads("implementation", ValueError, ["multi_head: implementation is 'flash'", "'dense', 'blockwise'"], implementation="flash")
heads("mask of rank 3", ValueError, ["mask has shape (2, 3, 5)", FORMS, "mask.reshape(2, 1, 3, 5)"], mask=bits(B, L, S))
heads("bias of float64", TypeError, ["bias has dtype float64", "expected float32"], bias=f64(L, S))
heads("sink of G", ValueError, ["sink has shape (2,)", "expected (H=4,)"], sink=f32(G))
heads("softcap of 0", ValueError, ["softcap is 0", "expected a positive finite number"], softcap=0)
heads("unknown option", TypeError, ["multi_head: got the keyword need_weights", "weights are in its cache"],
    need_weights=True)
weights("rows of w_q", ValueError, ["multi_head: w_q has shape (9, 24)", "expected (M=10, H*D)", "M is fixed by x_q"],
    w_q=f32(9, H * D))
weights("columns of w_q", ValueError, ["multi_head: w_q has shape (10, 23)", "4 heads divide"], w_q=f32(M, 23))
weights("columns of w_q, all heads", ValueError,
    ["multi_head: w_k has shape (11, 12)", "expected (Mk=11, G*D=14)", "fixed by w_q"], w_q=f32(M, 28))
weights("w_q of rank 1", ValueError, ["multi_head: w_q has shape (24,)", "expected (M=10, H*D)"], w_q=f32(24))
weights("w_q transposed", ValueError, ["multi_head: w_q has shape (24, 10)", "expected (M=10, H*D)"], w_q=f32(H * D, M))
weights("rows of w_k", ValueError, ["multi_head: w_k has shape (12, 12)", "expected (Mk=11, G*D=12)", "Mk is fixed by x_k"],
    w_k=f32(12, G * D))
weights("columns of w_k", ValueError, ["multi_head: w_k has shape (11, 14)", "expected (Mk=11, G*D=12)", "fixed by w_q"],
    w_k=f32(MK, 14))
weights("rows of w_v", ValueError, ["multi_head: w_v has shape (10, 14)", "expected (Mv=9, G*E)", "Mv is fixed by x_v"],
    w_v=f32(10, G * E))
weights("columns of w_v", ValueError, ["multi_head: w_v has shape (9, 15)", "2 heads divide"], w_v=f32(MV, 15))
weights("rows of w_o", ValueError, ["multi_head: w_o has shape (24, 13)", "expected (H*E=28, M_out)", "fixed by w_v"],
    w_o=f32(H * D, OUT))
weights("w_k is None", TypeError, ["multi_head: w_k is a NoneType", ARRAY], w_k=None)
weights("w_o is a list", TypeError, ["multi_head: w_o is a list", ARRAY], w_o=f32(H * E, OUT).tolist())
weights("w_v of float64", TypeError, ["multi_head: w_v has dtype float64", "expected float32"], w_v=f64(MV, G * E))
for name, n, text in (("b_q", H * D, "H*D=24"), ("b_k", G * D, "G*D=12"), ("b_v", G * E, "G*E=14"), ("b_o", OUT, "M_out=13")):
    weights(f"length of {name}", ValueError, [f"multi_head: {name} has shape ({n + 1},)", f"expected ({text},)"],
        **{name: f32(n + 1)})
    weights(f"rank of {name}", ValueError, [f"multi_head: {name} has shape (1, {n})", f"expected ({text},)"],
        **{name: f32(1, n)})
    weights(f"dtype of {name}", TypeError, [f"multi_head: {name} has dtype float16", "expected float32"],
        **{name: f32(n).astype(np.float16)})
_, many = npattn.multi_head_forward(f32(B, L, M), f32(B, S, MK), f32(B, S, MV), PARAMS, H, num_kv_heads=G)
row("multi_head_backward, shape", ValueError, ["multi_head: dout has shape (2, 3, 10)", "expected (2, 3, 13)", FORWARD],
    npattn.multi_head_backward, dout=f32(B, L, M), cache=many)
row("multi_head_backward, dtype", TypeError, ["multi_head: dout has dtype float64", "expected float32"],
    npattn.multi_head_backward, dout=f64(B, L, OUT), cache=many)

# --- rnn --------------------------------------------------------------------------------------------------------------

T, N = 4, 8
RNN = RNNParams(f32(M, N), f32(N, N), f32(N))


def rnn(id: str, error: type[Exception], fragments: list[str], **change: Any) -> None:
    row(f"rnn: {id}", error, fragments, npattn.rnn_forward, **{"x": f32(B, T, M), "h0": None, "params": RNN} | change)


def cells(id: str, error: type[Exception], fragments: list[str], **change: Any) -> None:
    rnn(id, error, fragments, params=RNN._replace(**change))


rnn("x of rank 2", ValueError, ["rnn: x has shape (4, 10)", "expected (B, T, M)"], x=f32(T, M))
rnn("x is a list", TypeError, ["rnn: x is a list", ARRAY], x=f32(B, T, M).tolist())
rnn("x of integers", TypeError, ["rnn: x has dtype int64", f"expected {FLOATS}"], x=ints(B, T, M))
rnn("params is a tuple", TypeError, ["rnn: params is a tuple", "expected npattn.RNNParams"], params=tuple(RNN))
rnn("nonlinearity", ValueError, ["rnn: nonlinearity is 'sigmoid'", "'tanh', 'relu'"], nonlinearity="sigmoid")
rnn("lengths beyond T", ValueError, ["rnn: lengths reaches from 1 to 5", "expected 0 to T=4", "fixed by x"],
    lengths=np.array([1, 5]))
rnn("lengths negative", ValueError, ["rnn: lengths reaches from -1 to 2", "expected 0 to T=4"], lengths=np.array([2, -1]))
rnn("lengths of floats", TypeError, ["rnn: lengths has dtype float64", "expected integers"], lengths=np.array([1.0, 2.0]))
rnn("lengths of booleans", TypeError, ["rnn: lengths has dtype bool", "expected integers"], lengths=np.array([True, True]))
rnn("lengths of the wrong batch", ValueError, ["rnn: lengths has shape (3,)", "expected (B=2,)", "B is fixed by x"],
    lengths=np.array([1, 2, 3]))
rnn("lengths is a number", ValueError, ["rnn: lengths has shape ()", "expected (B=2,)"], lengths=3)
rnn("lengths is masked", TypeError, ["rnn: lengths is a numpy.ma", "MaskedArray"], lengths=np.ma.masked_array(ints(B)))
rnn("B of h0", ValueError, ["rnn: h0 has shape (3, 8)", "expected (B=2, N=8)", "B is fixed by x"], h0=f32(3, N))
rnn("N of h0", ValueError, ["rnn: h0 has shape (2, 9)", "expected (B=2, N=8)", "N is fixed by w_x"], h0=f32(B, 9))
rnn("h0 of torch's rank 3", ValueError, ["rnn: h0 has shape (1, 2, 8)", "expected (B=2, N=8)"], h0=f32(1, B, N))
rnn("h0 of float64", TypeError, ["rnn: h0 has dtype float64", "expected float32", "fixed by x"], h0=f64(B, N))
rnn("h0 is a number", TypeError, ["rnn: h0 is an int", ARRAY], h0=0)
cells("rows of w_x", ValueError, ["rnn: w_x has shape (9, 8)", "expected (M=10, N)", "M is fixed by x"], w_x=f32(9, N))
cells("w_x of rank 1", ValueError, ["rnn: w_x has shape (8,)", "expected (M=10, N)"], w_x=f32(N))
cells("columns of w_x", ValueError, ["rnn: w_h has shape (8, 8)", "expected (N=7, N=7)", "fixed by w_x"], w_x=f32(M, 7))
cells("rows of w_h", ValueError, ["rnn: w_h has shape (7, 8)", "expected (N=8, N=8)"], w_h=f32(7, N))
cells("columns of w_h", ValueError, ["rnn: w_h has shape (8, 7)", "expected (N=8, N=8)"], w_h=f32(N, 7))
cells("length of b", ValueError, ["rnn: b has shape (9,)", "expected (N=8,)", "N is fixed by w_x"], b=f32(9))
cells("b of both torch biases", ValueError, ["rnn: b has shape (2, 8)", "expected (N=8,)"], b=f32(2, N))
cells("w_x of float64", TypeError, ["rnn: w_x has dtype float64", "expected float32"], w_x=f64(M, N))
cells("w_h is None", TypeError, ["rnn: w_h is a NoneType", ARRAY], w_h=None)
cells("b is a list", TypeError, ["rnn: b is a list", ARRAY], b=[0.0] * N)
_, steps = npattn.rnn_forward(f32(B, T, M), None, RNN)
row("rnn_backward, dh", ValueError, ["rnn: dh has shape (2, 3, 8)", "expected (2, 4, 8)", FORWARD], npattn.rnn_backward,
    dh=f32(B, 3, N), cache=steps)
row("rnn_backward, dh of float64", TypeError, ["rnn: dh has dtype float64", "expected float32"], npattn.rnn_backward,
    dh=f64(B, T, N), cache=steps)
row("rnn_backward, dh_last", ValueError, ["rnn: dh_last has shape (1, 2, 8)", "expected (2, 8)"], npattn.rnn_backward,
    dh=f32(B, T, N), cache=steps, dh_last=f32(1, B, N))
row("rnn_backward, dh_last of float64", TypeError, ["rnn: dh_last has dtype float64", "expected float32"], npattn.rnn_backward,
    dh=f32(B, T, N), cache=steps, dh_last=f64(B, N))

# --- parameter layouts ------------------------------------------------------------------------------------------------


# --- gru, lstm --------------------------------------------------------------------------------------------------------

GRU = GRUParams(f32(M, 3 * N), f32(N, 3 * N), f32(3 * N), f32(3 * N))
LSTM = LSTMParams(f32(M, 4 * N), f32(N, 4 * N), f32(4 * N))


def gru(id: str, error: type[Exception], fragments: list[str], **change: Any) -> None:
    row(f"gru: {id}", error, fragments, npattn.gru_forward, **{"x": f32(B, T, M), "h0": None, "params": GRU} | change)


def lstm(id: str, error: type[Exception], fragments: list[str], **change: Any) -> None:
    given = {"x": f32(B, T, M), "h0": None, "c0": None, "params": LSTM} | change
    row(f"lstm: {id}", error, fragments, npattn.lstm_forward, **given)


gru("x of rank 2", ValueError, ["gru: x has shape (4, 10)", "expected (B, T, M)"], x=f32(T, M))
gru("params of lstm", TypeError, ["gru: params is a npattn.ops.lstm.LSTMParams", "expected npattn.GRUParams"], params=LSTM)
gru("reset_after", TypeError, ["gru: reset_after is an int", "expected True or False"], reset_after=1)
gru("blocks of w_x", ValueError, ["gru: w_x has shape (10, 25)", "expected (M=10, 3N)"], params=GRU._replace(w_x=f32(M, 25)))
gru("w_h of torch's layout", ValueError, ["gru: w_h has shape (24, 8)", "expected (N=8, 3N=24)", "fixed by w_x"],
    params=GRU._replace(w_h=f32(3 * N, N)))
gru("b_h", ValueError, ["gru: b_h has shape (8,)", "expected (3N=24,)", "fixed by w_x"], params=GRU._replace(b_h=f32(N)))
gru("b_x of float64", TypeError, ["gru: b_x has dtype float64", "expected float32"], params=GRU._replace(b_x=f64(3 * N)))
gru("N of h0", ValueError, ["gru: h0 has shape (2, 9)", "expected (B=2, N=8)"], h0=f32(B, 9))
gru("lengths beyond T", ValueError, ["gru: lengths reaches from 1 to 5", "expected 0 to T=4"], lengths=np.array([1, 5]))
lstm("c0 of rank 3", ValueError, ["lstm: c0 has shape (1, 2, 8)", "expected (B=2, N=8)"], c0=f32(1, B, N))
lstm("c0 of float64", TypeError, ["lstm: c0 has dtype float64", "expected float32", "fixed by x"], c0=f64(B, N))
lstm("blocks of w_x", ValueError, ["lstm: w_x has shape (10, 30)", "expected (M=10, 4N)"], params=LSTM._replace(w_x=f32(M, 30)))
lstm("both biases of torch", ValueError, ["lstm: b has shape (2, 32)", "expected (4N=32,)"],
    params=LSTM._replace(b=f32(2, 4 * N)))
lstm("w_h is None", TypeError, ["lstm: w_h is a NoneType", ARRAY], params=LSTM._replace(w_h=None))
_, steps_of_gru = npattn.gru_forward(f32(B, T, M), None, GRU)
_, steps_of_lstm = npattn.lstm_forward(f32(B, T, M), None, None, LSTM)
row("gru_backward, dh", ValueError, ["gru: dh has shape (2, 3, 8)", "expected (2, 4, 8)", FORWARD], npattn.gru_backward,
    dh=f32(B, 3, N), cache=steps_of_gru)
row("gru_backward, a cache of lstm", TypeError, ["gru: cache is a npattn.ops.lstm.LSTMCache", "expected npattn.GRUCache"],
    npattn.gru_backward, dh=f32(B, T, N), cache=steps_of_lstm)
row("gru_backward, dh_last", ValueError, ["gru: dh_last has shape (1, 2, 8)", "expected (2, 8)"], npattn.gru_backward,
    dh=f32(B, T, N), cache=steps_of_gru, dh_last=f32(1, B, N))
row("lstm_backward, dc_last", ValueError, ["lstm: dc_last has shape (2, 9)", "expected (2, 8)"], npattn.lstm_backward,
    dh=f32(B, T, N), cache=steps_of_lstm, dc_last=f32(B, 9))
row("lstm_backward, dh of float64", TypeError, ["lstm: dh has dtype float64", "expected float32"], npattn.lstm_backward,
    dh=f64(B, T, N), cache=steps_of_lstm)
row("gru_from_torch: an LSTM", ValueError, ["gru_from_torch: weight_ih_l0 has shape (32, 10)", "expected (3 N, any)"],
    convert.gru_from_torch, state={"weight_ih_l0": f32(32, M), "weight_hh_l0": f32(32, N)})
row("lstm_from_torch: proj_size", ValueError, ["lstm_from_torch: weight_hh_l0 has shape (32, 5)", "expected (32, 8)"],
    convert.lstm_from_torch, state={"weight_ih_l0": f32(32, M), "weight_hh_l0": f32(32, 5)})
row("gru_from_onnx: B", ValueError, ["gru_from_onnx: B has shape (1, 24)", "expected (1, 48)"], convert.gru_from_onnx,
    W=f32(1, 24, M), R=f32(1, 24, N), B=f32(1, 24))
row("lstm_from_onnx: W", ValueError, ["lstm_from_onnx: W has shape (1, 30, 10)", "expected (any, 4 N, any)"],
    convert.lstm_from_onnx, W=f32(1, 30, M), R=f32(1, 32, N))
row("lstm_to_onnx: a tuple", TypeError, ["lstm_to_onnx: params is a", "expected npattn.LSTMParams"], convert.lstm_to_onnx,
    params=tuple(LSTM))
row("gru_to_torch: layer", ValueError, ["gru_to_torch: layer is -1", "at least 0"], convert.gru_to_torch, params=GRU, layer=-1)

TORCH = {"in_proj_weight": f32(24, 8), "in_proj_bias": f32(24), "out_proj.weight": f32(8, 8), "out_proj.bias": f32(8)}
CELL = {"weight_ih_l0": f32(N, M), "weight_hh_l0": f32(N, N), "bias_ih_l0": f32(N), "bias_hh_l0": f32(N)}


def without(state: dict[str, Any], *names: str, **change: Any) -> dict[str, Any]:
    return {name: x for name, x in state.items() if name not in names} | change


def from_torch(id: str, error: type[Exception], fragments: list[str], state: Any) -> None:
    row(f"multi_head_from_torch: {id}", error, ["multi_head_from_torch: ", *fragments], convert.multi_head_from_torch,
        state=state)


def cell_from_torch(id: str, error: type[Exception], fragments: list[str], state: Any, **options: Any) -> None:
    row(f"rnn_from_torch: {id}", error, ["rnn_from_torch: ", *fragments], convert.rnn_from_torch, state=state, **options)


def from_onnx(id: str, error: type[Exception], fragments: list[str], **change: Any) -> None:
    arguments = {"W": f32(1, N, M), "R": f32(1, N, N), "B": f32(1, 2 * N)} | change
    row(f"rnn_from_onnx: {id}", error, ["rnn_from_onnx: ", *fragments], convert.rnn_from_onnx, **arguments)


from_torch("no out_proj", ValueError, ["out_proj.weight is missing", "in_proj_weight"], without(TORCH, "out_proj.weight"))
from_torch("no in_proj", ValueError, ["q_proj_weight is missing"], without(TORCH, "in_proj_weight"))
from_torch("bias_k", ValueError, ["got bias_k and bias_v", "add_bias_kv=True"], without(TORCH, bias_k=f32(1, 1, 8)))
from_torch("bias_v", ValueError, ["got bias_k and bias_v"], without(TORCH, bias_v=f32(1, 1, 8)))
from_torch("rows of in_proj_weight", ValueError, ["in_proj_weight has shape (16, 8)", "expected (24, any)"],
    without(TORCH, in_proj_weight=f32(16, 8)))
from_torch("in_proj_bias", ValueError, ["in_proj_bias has shape (8,)", "expected (24)"], without(TORCH, in_proj_bias=f32(8)))
from_torch("out_proj.weight of rank 1", ValueError, ["out_proj.weight has shape (8,)", "expected (any, any)"],
    without(TORCH, **{"out_proj.weight": f32(8)}))
from_torch("out_proj.weight not square", ValueError, ["out_proj.weight has shape (8, 7)", "expected (8, 8)"],
    without(TORCH, **{"out_proj.weight": f32(8, 7)}))
from_torch("out_proj.bias", ValueError, ["out_proj.bias has shape (7,)", "expected (8)"],
    without(TORCH, **{"out_proj.bias": f32(7)}))
from_torch("state is a list", TypeError, ["state is a list", "expected a mapping"], list(TORCH.items()))
to_torch = convert.multi_head_to_torch
SAME = MultiHeadParams(f32(8, 8), f32(8, 8), f32(8, 8), f32(8, 8), f32(8), f32(8), f32(8), f32(8))
row("multi_head_to_torch: widths", ValueError, ["multi_head_to_torch: w_q has shape (10, 24)", "expected width 13"], to_torch,
    params=PARAMS)
row("multi_head_to_torch: packed", ValueError, ["multi_head_to_torch: got inputs of different widths", "packed=True"],
    to_torch, params=SAME._replace(w_k=f32(7, 8)), packed=True)
row("multi_head_to_torch: one bias", ValueError, ["multi_head_to_torch: got some of b_q, b_k and b_v", "all or none"],
    to_torch, params=SAME._replace(b_k=None))
row("multi_head_to_torch: a tuple", TypeError, ["multi_head_to_torch: params is a", "expected npattn.MultiHeadParams"],
    to_torch, params=tuple(SAME))
cell_from_torch("no weight_hh", ValueError, ["weight_hh_l0 is missing", "weight_ih_l0"], without(CELL, "weight_hh_l0"))
cell_from_torch("no bias_hh", ValueError, ["bias_hh_l0 is missing"], without(CELL, "bias_hh_l0"))
cell_from_torch("no such layer", ValueError, ["weight_ih_l1 is missing"], CELL, layer=1)
cell_from_torch("no such direction", ValueError, ["weight_ih_l0_reverse is missing"], CELL, reverse=True)
cell_from_torch("layer -1", ValueError, ["layer is -1", "expected an integer of at least 0"], CELL, layer=-1)
cell_from_torch("layer 0.0", TypeError, ["layer is a float", "expected an integer"], CELL, layer=0.0)
cell_from_torch("an LSTM", ValueError, ["weight_hh_l0 has shape (32, 8)", "expected (32, 32)"],
    without(CELL, weight_ih_l0=f32(4 * N, M), weight_hh_l0=f32(4 * N, N)))
cell_from_torch("bias_ih", ValueError, ["bias_ih_l0 has shape (9,)", "expected (8)"], without(CELL, bias_ih_l0=f32(9)))
cell_from_torch("state is None", TypeError, ["state is a NoneType", "expected a mapping"], None)
row("rnn_to_torch: layer", ValueError, ["rnn_to_torch: layer is -1", "at least 0"], convert.rnn_to_torch, params=RNN, layer=-1)
row("rnn_to_torch: a tuple", TypeError, ["rnn_to_torch: params is a", "expected npattn.RNNParams"], convert.rnn_to_torch,
    params=tuple(RNN))
row("rnn_to_onnx: a tuple", TypeError, ["rnn_to_onnx: params is a", "expected npattn.RNNParams"], convert.rnn_to_onnx,
    params=tuple(RNN))
from_onnx("W of rank 2", ValueError, ["W has shape (8, 10)", "expected (any, any, any)"], W=f32(N, M))
from_onnx("R", ValueError, ["R has shape (1, 8, 9)", "expected (1, 8, 8)"], R=f32(1, N, 9))
from_onnx("B", ValueError, ["B has shape (1, 8)", "expected (1, 16)"], B=f32(1, N))
from_onnx("directions of R", ValueError, ["R has shape (2, 8, 8)", "expected (1, 8, 8)"], R=f32(2, N, N))
from_onnx("direction 1", ValueError, ["direction is 1", "expected less than 1", "fixed by W"], direction=1)
from_onnx("direction -1", ValueError, ["direction is -1", "expected an integer of at least 0"], direction=-1)
from_onnx("direction True", TypeError, ["direction is a bool", "expected an integer"], direction=True)
from_onnx("W is None", (TypeError, ValueError), ["W"], W=None)

# --- gradcheck --------------------------------------------------------------------------------------------------------


def square(x: Any) -> Any:
    return x * x, x


def slope(dy: Any, x: Any) -> Any:
    return (2 * x * dy,)


def check(id: str, error: type[Exception], fragments: list[str], forward: Any = square, back: Any = slope,
    **change: Any) -> None:
    arguments = {"forward": forward, "backward": back, "inputs": {"x": np.array([1.0, 2.0])}} | change
    row(f"gradcheck: {id}", error, ["gradcheck: ", *fragments], gradcheck, **arguments)


class Unsteady:
    """A forward that is another one each time."""

    calls = 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return x * x + self.calls, x


def greedy(dy: Any, x: Any) -> Any:
    x *= 2
    return (x * dy,)


check("method", ValueError, ["method is 'x'", "'complex', 'central'"], method="x")
check("float32 inputs", TypeError, ["x has dtype float32", "expected float64 or longdouble"], inputs={"x": f32(2)})
check("integer inputs", TypeError, ["x has dtype int64", "expected float64 or longdouble"], inputs={"x": np.array([1, 2])})
check("complex inputs", TypeError, ["x has dtype complex128", "expected float64 or longdouble"], inputs={"x": np.array([1j])})
check("no inputs", GradcheckError, ["no inputs", "nothing can be tested"], inputs={})
check("zero names an unknown input", ValueError, ["zero names ['y']", "expected names out of ['x']"], zero=("y",))
check("zero names what is not zero", GradcheckError, ["the gradient of x", "zero names x"], zero=("x",))
check("terms without an input", ValueError, ["terms", "x"], terms={"y": 1.0})
check("not repeatable", GradcheckError, ["the forward is not repeatable"], Unsteady())
check("backward not repeatable", GradcheckError, ["the backward is not repeatable"], lambda x: (x * x, {"n": 0, "x": x}),
    lambda dy, c: (c.update(n=c["n"] + 1), (2 * c["x"] * dy + c["n"],))[1])
check("the forward modifies its input", GradcheckError, ["input was modified"],
    lambda x: (np.multiply(x, 1 + 1e-9, out=x) * 0 + 1.0, x), lambda dy, x: (x * 0,))
check("real-only forward", TypeError, ["out is real for complex inputs", 'method="central"'], lambda x: (np.abs(x) * x.real, x))
check("NaN", GradcheckError, ["the forward returns NaN"], lambda x: (x * np.nan, x))
check("no gradient of an input", GradcheckError, ["the backward gives no gradient of w"], lambda x, w: (x * w, (x, w)),
    lambda dy, c: {"x": c[1] * dy}, inputs={"x": np.ones(2), "w": np.ones(2)})
check("gradient of wrong shape", GradcheckError, ["the gradient of x has shape ()", "expected (2,)"], back=lambda dy,
    x: (np.float64(1),))
check("gradient of NaN", GradcheckError, ["the gradient of x holds NaN or inf"], back=lambda dy, x: (x * np.nan,))
check("gradient of zero", GradcheckError, ["the gradient of x is zero everywhere", 'zero=("x",)'], lambda x: (x * 0 + 1.0, x),
    lambda dy, x: (0 * dy,))
check("wrong gradient", GradcheckError, ["gradient of x[0]: backward gives", "complex step", "they differ by"], back=lambda dy,
    x: (2.001 * x * dy,))
check("wrong gradient, central", GradcheckError, ["gradient of x[0]: backward gives", "central step"], back=lambda dy,
    x: (2.001 * x * dy,), method="central")
for n in (2, 3):  # an array of two unpacks into two
    inputs, kinds = {"x": np.ones(n)}, (TypeError, ValueError, GradcheckError)
    check(f"forward without a cache, {n}", kinds, ["forward", "(out, cache)"], lambda x: x * x, inputs=inputs)
row("hessian_vector_product: direction", ValueError,
    ["hessian_vector_product: direction has shapes [(3,)]", "expected [(2,)]"], hessian_vector_product, forward=square,
    backward=slope, inputs=[np.ones(2)], direction=[np.ones(3)], dout=np.ones(2))


def test_gradcheck_sees_a_backward_that_modifies():
    """It works on copies of nothing: the input itself changes, and that is what it reports."""
    x = np.array([1.0, 2.0])
    with pytest.raises(GradcheckError, match=r"gradcheck: (an input was modified|the backward is not repeatable)"):
        gradcheck(square, greedy, {"x": x})


# fmt: on
# --- the test ---------------------------------------------------------------------------------------------------------

CHANGES_ITS_INPUT = {"gradcheck: the forward modifies its input"}


def arrays_in(x: Any) -> list[Any]:
    if isinstance(x, np.ndarray):
        return [x]
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else vars(x).values() if isinstance(x,
        (Alibi, RelativeTable)) else ()
    return [a for part in parts for a in arrays_in(part)]


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_bad_call(bad):
    arrays = arrays_in(bad.arguments)
    before = [(a.shape, a.dtype, a.tobytes()) for a in arrays]
    with pytest.raises(bad.error) as caught:
        bad.function(**bad.arguments)
    message = str(caught.value)
    missing = [fragment for fragment in bad.fragments if fragment not in message]
    assert not missing, f"{missing} not in: {message}"
    if bad.id not in CHANGES_ITS_INPUT:
        assert [(a.shape, a.dtype, a.tobytes()) for a in arrays] == before


def test_the_table_is_a_table():
    names = [bad.id for bad in TABLE]
    assert len(set(names)) == len(names) >= 80
    assert all(bad.fragments and all(bad.fragments) for bad in TABLE)
