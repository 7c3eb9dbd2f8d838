"""onnx: the operators Attention, RNN, GRU, LSTM and Gelu by its reference evaluator.

What builds models of one node serves onnxruntime, too.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from onnx import ModelProto, helper
from onnx.defs import onnx_opset_version
from onnx.reference import ReferenceEvaluator

from npattn.ops.checks import Array
from npattn.peers import Function, Pair, one_of, rank_4
from npattn.peers.findings import Finding


@cache
def node(
    op: str, inputs: tuple[tuple[str, str], ...], outputs: tuple[str, ...], attributes: tuple[Any, ...], opset: int
) -> ModelProto:
    """A model of one node: inputs are (name, dtype), in the order of the operator, "" for one that is left out."""
    named = [*((name, dtype) for name, dtype in inputs if name), *((name, inputs[0][1]) for name in outputs)]
    info = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(t)), None) for name, t in named]
    one = helper.make_node(op, [name for name, _ in inputs], outputs, **dict(attributes))
    graph = helper.make_graph([one], op, info[: -len(outputs)], info[-len(outputs) :])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@cache
def evaluator(*described: Any) -> ReferenceEvaluator:
    return ReferenceEvaluator(node(*described))


def run(engine: Function, op: str, slots: dict[str, Any], outputs: tuple[str, ...], attributes: Any, opset: int) -> Any:
    """The outputs of a node; the slots are the operator's inputs in order, None for one that is left out."""
    while slots[last := list(slots)[-1]] is None:
        del slots[last]
    inputs = tuple((name, str(x.dtype)) if x is not None else ("", "") for name, x in slots.items())
    made = engine(op, inputs, outputs, tuple((name, x) for name, x in attributes.items() if x is not None), opset)
    with np.errstate(all="ignore"):
        return made.run(None, {name: np.ascontiguousarray(x) for name, x in slots.items() if x is not None})


def _attend(
    engine: Function, opset: int, q: Array, k: Array, v: Array, attn_mask: Any, scale: Any, softcap: Any, causal: bool,
    window: Any,
) -> Any:  # fmt: skip
    left, right = window or (None, None)
    attributes = {
        "scale": scale, "softcap": softcap, "is_causal": int(causal), "left_window_size": left, "right_window_size": right,
    }  # fmt: skip
    return np.array(run(engine, "Attention", {"Q": q, "K": k, "V": v, "attn_mask": attn_mask}, ("Y",), attributes, opset)[0])


def attention(
    engine: Function, opset: int, q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None,
    softcap: Any = None, causal: bool = False, window: Any = None,
) -> Any:  # fmt: skip
    rank_4(q, "Attention without q_num_heads")
    if bias is not None:  # the operator has one input for both
        mask = bias if mask is None else np.where(mask, bias, bias.dtype.type(-np.inf))
    if mask is not None:  # a last axis of size 1 would not be broadcast, but filled up with -inf
        mask = np.broadcast_to(mask, (*mask.shape[:-2], q.shape[-2], k.shape[-2]))
    return _attend(engine, opset, q, k, v, mask, scale, softcap, causal, window)


def in_its_words(
    engine: Function, opset: int, q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None,
    softcap: Any = None, causal: bool = False, window: Any = None,
) -> Any:  # fmt: skip
    if None in (window or ()):
        raise NotImplementedError("a window is two numbers")
    return _attend(engine, opset, q, k, v, one_of(mask, bias), scale, softcap, causal, window)


def _recurrent(
    engine: Function, op: str, x: Array, states: dict[str, Any], W: Array, R: Array, B: Any, lengths: Any, **attributes: Any
) -> Any:
    """One direction of RNN, GRU or LSTM, whose layout is (T, B, M): h, and the last states."""
    if not x.size:
        raise NotImplementedError(f"{op} takes no empty batch or sequence")
    slots = {
        "X": x.swapaxes(0, 1), "W": W, "R": R, "B": B,
        "sequence_lens": None if lengths is None else np.asarray(lengths, np.int32),
        **{f"initial_{name}": None if s is None else s[None] for name, s in states.items()},
    }  # fmt: skip
    outputs = ("Y", *(f"Y_{name}" for name in states))
    h, *last = run(engine, op, slots, outputs, {"hidden_size": R.shape[-1], **attributes}, 22)
    return np.ascontiguousarray(h[:, 0].swapaxes(0, 1)), *(np.array(y[0]) for y in last)


def rnn(
    engine: Function, x: Array, h0: Any, W: Array, R: Array, B: Any = None, *, lengths: Any = None, nonlinearity: str = "tanh"
) -> Any:
    if engine is evaluator and nonlinearity != "tanh":
        raise NotImplementedError(f"the reference of onnx has no {nonlinearity}")
    return _recurrent(engine, "RNN", x, {"h": h0}, W, R, B, lengths, activations=(nonlinearity.capitalize(),))


def gru(
    engine: Function, x: Array, h0: Any, W: Array, R: Array, B: Any = None, *, lengths: Any = None, reset_after: bool = True
) -> Any:
    return _recurrent(engine, "GRU", x, {"h": h0}, W, R, B, lengths, linear_before_reset=int(reset_after))


def lstm(engine: Function, x: Array, h0: Any, c0: Any, W: Array, R: Array, B: Any = None, *, lengths: Any = None) -> Any:
    return _recurrent(engine, "LSTM", x, {"h": h0, "c": c0}, W, R, B, lengths)


def gelu(engine: Function, x: Array, *, approximate: str | None = None) -> Array:
    return np.array(run(engine, "Gelu", {"X": x}, ("Y",), {"approximate": approximate}, 20)[0])


ADAPTERS: dict[str, Pair] = {
    "onnx": (partial(attention, evaluator, onnx_opset_version()), None),
    "onnx-rnn": (partial(rnn, evaluator), None),
    "onnx-gelu": (partial(gelu, evaluator), None),
    "onnx-gru": (partial(gru, evaluator), None),
    "onnx-lstm": (partial(lstm, evaluator), None),
}
OWN_WORDS: dict[str, Pair] = {"onnx": (partial(in_its_words, evaluator, 25), None)}

# --- findings -------------------------------------------------------------------------------------------------------------

RUN = """
    def model(op, inputs, outputs, opset, **attributes):
        info = [h.make_tensor_value_info(n, h.np_dtype_to_tensor_dtype(x.dtype), None) for n, x in inputs.items() if n]
        out = [h.make_tensor_value_info(n, info[0].type.tensor_type.elem_type, None) for n in outputs]
        graph = h.make_graph([h.make_node(op, list(inputs), outputs, **attributes)], op, info, out)
        return h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=10)
    def run(op, outputs, opset, attributes={}, **inputs):
        inputs = {n.strip("_"): x for n, x in inputs.items()}
        given = {n: x for n, x in inputs.items() if n}"""
X = """
    x = np.float32([[[[1], [3]]]])"""
PRELUDE = f"""
    import numpy as np
    from onnx import helper as h
    from onnx.reference import ReferenceEvaluator{RUN}
        return ReferenceEvaluator(model(op, inputs, outputs, opset, **attributes)).run(None, given){X}"""
FINDINGS = [
    Finding("A negative scale gives NaN: its root multiplies Q and K", """
        with np.errstate(invalid="ignore"):
            print(run("Attention", ["Y"], 25, {"scale": -1.0}, Q=x, K=x, V=x)[0].ravel().tolist())
        """, r"\[nan, nan\]"),
    Finding("No key at all raises, where a query whose keys are all masked gives 0", """
        run("Attention", ["Y"], 25, Q=x, K=x[:, :, :0], V=x[:, :, :0])
        """, "ValueError: zero-size array to reduction operation maximum which has no identity"),
    Finding("RNN ignores `sequence_lens`: steps behind a sequence are computed, and `Y_h` is the last of them", """
        w, step = np.ones((1, 1, 1), np.float32), np.ones((3, 1, 1), np.float32)
        inputs = {"X": step, "W": w, "R": w, "_": np.zeros(0), "sequence_lens": np.int32([1])}
        h, last = run("RNN", ["Y", "Y_h"], 22, {"hidden_size": 1}, **inputs)
        print("%.3f %.3f %.3f" % tuple(h.ravel()), "and %.3f" % last.item())
        """, r"0.762 0.943 0.960 and 0.960"),
    Finding("Gelu of float64 has its constants in float32", """
        from math import erf
        print("%.0e" % abs(run("Gelu", ["Y"], 20, X=np.float64([1.0]))[0][0] - (1 + erf(0.5**0.5)) / 2))
        """, r"\de-0[89]"),
    Finding("A mask (1, 1, L, 1) is not broadcast but filled up, as specified: all queries see key 0 alone", """
        print(run("Attention", ["Y"], 25, Q=x, K=x, V=x, attn_mask=np.ones((1, 1, 2, 1), bool))[0].ravel().tolist())
        """, r"\[1.0, 1.0\]", "edge"),
    Finding("NaN in a value that is masked reaches the output, as 0 times NaN", """
        v, mask = np.float32([[[[1], [np.nan]]]]), np.array([[True, False]] * 2)
        print(run("Attention", ["Y"], 25, Q=x, K=x, V=v, attn_mask=mask)[0].ravel().tolist())
        """, r"\[nan, nan\]", "edge"),
]  # fmt: skip
