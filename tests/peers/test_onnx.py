"""The node cases that the onnx package ships, each translated into npattn's options and held to its own rtol and atol.

They are forward only. onnx computes them with its NumPy evaluator; they are what a runtime has to reproduce.
"""

import importlib
import re

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the peers extra: pip install npattn[peers]")

from onnx.backend.test.case import node as onnx_cases

import npattn as na
from npattn.convert import rnn_from_onnx
from npattn.ops.positions import turned

# The file of an operator registers its cases when it is imported; collecting those of all operators takes 13 s.
FILES = {"Attention": "attention", "RNN": "rnn", "RotaryEmbedding": "rotaryembedding", "Softmax": "softmax",
         "SoftmaxCrossEntropyLoss": "softmax_cross_entropy_loss"}  # fmt: skip
from npattn.convert import gru_from_onnx, lstm_from_onnx

# The file of an operator registers its cases when it is imported; collecting those of all operators takes 13 s.
FILES = {
    "Attention": "attention", "RNN": "rnn", "GRU": "gru", "LSTM": "lstm", "Softmax": "softmax",
    "SoftmaxCrossEntropyLoss": "softmax_cross_entropy_loss",
}  # fmt: skip
for file in FILES.values():
    importlib.import_module(f"{onnx_cases.__name__}.{file}")
CASES = {
    case.name: case
    for case in onnx_cases._NodeTestCases
    if case.model.graph.node[0].op_type in FILES and not case.name.endswith("_expanded")
}


NOT_EXPRESSED = {  # a pattern of names -> the reason
    r"test_sce_(?!.*no_weight).*weight.*": "class weights: multiply cross_entropy(reduction='none') by them",
    r"test_lstm_with_peepholes": "peepholes: gates that read the cell",
}


def listed(name):
    return any(re.fullmatch(pattern, name) for pattern in NOT_EXPRESSED)


def of(op):
    """The parameters of a test over all cases of one operator that are expressed."""
    names = [name for name, case in CASES.items() if case.model.graph.node[0].op_type == op]
    return pytest.mark.parametrize("name", [name for name in names if not listed(name)])


def open_case(name):
    """The inputs by the names of the operator's schema, the attributes, and the expected outputs likewise."""
    case, (node,) = CASES[name], CASES[name].model.graph.node
    schema = onnx.defs.get_schema(node.op_type, CASES[name].model.opset_import[0].version)
    (inputs, outputs), given, wanted = case.data_sets[0], iter(case.data_sets[0][0]), iter(case.data_sets[0][1])
    arrays = {slot.name: next(given) for slot, used in zip(schema.inputs, node.input, strict=False) if used}
    expected = {slot.name: next(wanted) for slot, used in zip(schema.outputs, node.output, strict=False) if used}
    assert len(arrays) == len(inputs)
    assert len(expected) == len(outputs) > 0
    return arrays, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}, expected


def check(name, results, expected):
    """All outputs of a case, as onnx's own runner compares them: bfloat16 in float32 and to two of its ulps."""
    case = CASES[name]
    for slot, want in expected.items():
        got, rtol = results[slot], case.rtol
        assert got.dtype == want.dtype, slot
        assert got.shape == want.shape, slot
        if want.dtype.name == "bfloat16":
            got, want, rtol = got.astype(np.float32), want.astype(np.float32), max(rtol, 2.0**-6)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=case.atol, err_msg=f"{name}: {slot}")


# --- Attention ------------------------------------------------------------------------------------------------------


def canonical(arrays, attributes):
    """An ONNX Attention node in npattn's words: (q, k, v) with heads, and the options."""
    q, k, v = (arrays[name] for name in "QKV")
    if q.ndim == 3:  # (B, L, H D) -> (B, H, L, D)
        H, G = attributes["q_num_heads"], attributes["kv_num_heads"]
        q, k, v = (x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2) for x, n in ((q, H), (k, G), (v, G)))
    past = 0
    if "past_key" in arrays:
        past = arrays["past_key"].shape[2]
        k, v = np.concatenate([arrays["past_key"], k], 2), np.concatenate([arrays["past_value"], v], 2)
    L, S = q.shape[2], k.shape[2]
    options, masks, offset = {}, [], past

    if "nonpad_kv_seqlen" in arrays:  # a cache of fixed size: its last valid key is the last query's own
        lengths = arrays["nonpad_kv_seqlen"]
        offset = lengths - L
        masks.append(na.key_lengths(lengths))
    if "attn_mask" in arrays:
        mask = arrays["attn_mask"]
        mask = mask.reshape((1,) * (2 - mask.ndim) + mask.shape) if mask.ndim < 3 else mask
        mask = mask[None] if mask.ndim == 3 else mask  # rank 3 are heads
        short = [(0, 0)] * (mask.ndim - 1) + [(0, S - mask.shape[-1])]
        if mask.dtype == np.bool_:
            masks.append(np.pad(mask, short, constant_values=False))
        else:
            options["bias"] = np.pad(mask, short, constant_values=-np.inf)
    if attributes.get("is_causal"):
        masks.append(na.causal(offset=offset))
    sides = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    if any(side >= 0 for side in sides):
        masks.append(na.window(*(None if side < 0 else side for side in sides), offset=offset))
    for mask in masks:
        options["mask"] = mask if "mask" not in options else options["mask"] & mask
    options |= {name: attributes[name] for name in ("scale", "softcap") if attributes.get(name)}
    return q, k, v, options


def matmul_output(mode, cache, options):
    """0: scaled scores, 1: with softcap, 2: with bias and mask, all from the cache as log w + lse; 3: the weights."""
    if mode == 3:
        return cache.weights
    with np.errstate(divide="ignore"):
        scores = np.log(cache.weights) + cache.lse[..., None]
    if mode == 2:
        return scores
    assert "mask" not in options, "the cache does not hold the scores of masked pairs"
    assert mode == 1 or "softcap" not in options, "nor those before a softcap"
    return scores - options.get("bias", 0.0)


@of("Attention")
def test_attention(name):
    arrays, attributes, expected = open_case(name)
    q, k, v, options = canonical(arrays, attributes)
    out, cache = na.attention_forward(q, k, v, **options)
    for y in (out, na.blockwise(q, k, v, **options)):
        results = {"Y": y, "present_key": k, "present_value": v}
        if arrays["Q"].ndim == 3:
            results["Y"] = y.swapaxes(1, 2).reshape(*arrays["Q"].shape[:2], -1)
        if "qk_matmul_output" in expected:
            mode = attributes.get("qk_matmul_output_mode", 0)
            results["qk_matmul_output"] = matmul_output(mode, cache, options).astype(q.dtype)
        check(name, results, expected)


# --- RNN, GRU and LSTM ----------------------------------------------------------------------------------------------


def check_recurrent(name, from_onnx, forward, states, attributes_known=(), **options):
    """A node of one or two directions, in either layout. states : those that it may be given, and returns the last of"""
    arrays, attributes, expected = open_case(name)
    assert not arrays.keys() - {"X", "W", "R", "B", "sequence_lens", *(f"initial_{s}" for s in states)}
    assert not attributes.keys() - {"hidden_size", "direction", "layout", *attributes_known}
    layout = attributes.get("layout", 0)
    x = arrays["X"] if layout == 1 else arrays["X"].swapaxes(0, 1)  # (B, T, M)
    n = arrays.get("sequence_lens")
    n = None if n is None else n.astype(np.int64)
    backwards = {b"forward": [False], b"reverse": [True], b"bidirectional": [False, True]}
    hs, lasts = [], []
    for direction, flip in enumerate(backwards[attributes.get("direction", b"forward")]):
        params = from_onnx(arrays["W"], arrays["R"], arrays.get("B"), direction=direction)
        firsts = [arrays.get(f"initial_{s}") for s in states]
        firsts = [s if s is None else (s[:, direction] if layout == 1 else s[direction]) for s in firsts]
        h, cache = forward(na.reversed_steps(x, n) if flip else x, *firsts, params, lengths=n, **options)
        hs.append(na.reversed_steps(h, n) if flip else h)
        lasts.append([getattr(cache, f"{s}_last") for s in states])
    y = np.stack(hs, 2)  # (B, T, directions, N), as layout 1 has it
    results = {f"Y_{s}": np.stack([last[k] for last in lasts], 1 if layout else 0) for k, s in enumerate(states)}
    check(name, {"Y": y if layout else y.transpose(1, 2, 0, 3), **results}, expected)


@of("RNN")
def test_rnn(name):
    check_recurrent(name, rnn_from_onnx, na.rnn_forward, "h")


@of("GRU")
def test_gru(name):
    reset_after = bool(open_case(name)[1].get("linear_before_reset", 0))
    check_recurrent(name, gru_from_onnx, na.gru_forward, "h", {"linear_before_reset"}, reset_after=reset_after)


@of("LSTM")
def test_lstm(name):
    check_recurrent(name, lstm_from_onnx, na.lstm_forward, "hc")


# --- rotary positions -----------------------------------------------------------------------------------------------


@of("RotaryEmbedding")
def test_rotary(name):
    """The cosines and sines are inputs, drawn at random: what is tested is how pairs are turned by them."""
    arrays, attributes, expected = open_case(name)
    x, cos, sin = (arrays[n] for n in ("X", "cos_cache", "sin_cache"))
    if x.ndim == 3:  # (B, L, H D)
        x = x.reshape(*x.shape[:2], attributes["num_heads"], -1).swapaxes(1, 2)
    if "position_ids" in arrays:
        cos, sin = cos[arrays["position_ids"]], sin[arrays["position_ids"]]
    width = attributes.get("rotary_embedding_dim", 0) or x.shape[-1]
    assert cos.shape[-1] == width // 2
    y = turned(x, cos[:, None], sin[:, None], "interleaved" if attributes.get("interleaved") else "half", x.dtype)
    check(name, {"Y": y if arrays["X"].ndim == 4 else y.swapaxes(1, 2).reshape(arrays["X"].shape)}, expected)


# --- Softmax and cross-entropy --------------------------------------------------------------------------------------


@of("Softmax")
def test_softmax(name):
    arrays, attributes, expected = open_case(name)
    axis = attributes.get("axis", -1)
    weights = na.softmax(np.moveaxis(arrays["input"], axis, -1))
    check(name, {"output": np.moveaxis(weights, -1, axis)}, expected)


@of("SoftmaxCrossEntropyLoss")
def test_cross_entropy(name):
    arrays, attributes, expected = open_case(name)
    logits, targets = np.moveaxis(arrays["scores"], 1, -1), arrays["labels"]  # (B, V, ...) -> (B, ..., V)
    mask = targets != attributes["ignore_index"] if "ignore_index" in attributes else None
    loss = na.cross_entropy(logits, targets, mask=mask, reduction=attributes["reduction"].decode())
    log_prob = logits - na.log_sum_exp(logits)[..., None]
    check(name, {"output": loss, "log_prob": np.moveaxis(log_prob, -1, 1)}, expected)


# --- all of them ----------------------------------------------------------------------------------------------------


def test_every_case_is_tested_or_listed():
    # in onnx 1.23; more are welcome
    tests = {test_attention: 93, test_rnn: 6, test_rotary: 8, test_softmax: 7, test_cross_entropy: 18}
    tests = {  # in onnx 1.23; more are welcome
        test_attention: 93, test_rnn: 6, test_gru: 6, test_lstm: 5, test_softmax: 7, test_cross_entropy: 18,
    }  # fmt: skip
    tested = [name for test in tests for name in test.pytestmark[0].args[1]]
    assert sorted([*tested, *filter(listed, CASES)]) == sorted(CASES)
    assert all(len(test.pytestmark[0].args[1]) >= least for test, least in tests.items())
    for pattern in NOT_EXPRESSED:
        assert any(re.fullmatch(pattern, name) for name in CASES), f"{pattern} lists nothing"


def test_only_cases_with_class_weights_and_peepholes_are_listed():
    inputs = {name: case.model.graph.node[0].input for name, case in CASES.items()}
    weighted = {name for name, given in inputs.items() if len(given) == 3 and name.startswith("test_sce")}
    peepholes = {name for name, given in inputs.items() if len(given) == 8 and given[7] and name.startswith("test_lstm")}
    assert {name for name in CASES if listed(name)} == weighted | peepholes
