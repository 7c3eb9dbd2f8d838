"""onnxruntime: the operators Attention, RNN, GRU, LSTM and Gelu on the CPU."""

from __future__ import annotations

from functools import cache, partial, wraps
from inspect import signature
from typing import Any

import onnxruntime

from npattn.ops.checks import Array
from npattn.peers import Function, Pair
from npattn.peers.findings import Finding
from npattn.peers.onnx_reference import RUN, X, attention, gelu, gru, in_its_words, lstm, node, rnn


@cache
def _session(*described: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it refuses is raised, too
    try:
        return onnxruntime.InferenceSession(node(*described).SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise
        raise NotImplementedError(f"onnxruntime has no kernel for {described[0]} of {described[1][0][1]}") from error


def _in_float32(op: Function) -> Pair:
    """GRU and LSTM: a session of float64 can be made, but raises when it runs."""

    @wraps(op)
    def forward(x: Array, *inputs: Any, **options: Any) -> Any:
        if x.dtype != "float32":
            raise NotImplementedError(f"onnxruntime has no {op.__name__} of {x.dtype}")
        return op(_session, x, *inputs, **options)

    vars(forward)["__signature__"] = signature(partial(op, _session))
    return forward, None


def _attention(
    run: Function, q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None,
    causal: bool = False,
) -> Any:  # fmt: skip
    """Attention-24: for Attention-25, with windows, it has no kernel and expands the operator."""
    try:
        return run(_session, 24, q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap, causal=causal)
    except Exception as error:
        if "must be greater than 0" not in str(error):  # so it says of the scale, and of empty axes
            raise
        raise NotImplementedError(f"onnxruntime: {str(error).rpartition('was false. ')[2].strip()}") from error


ADAPTERS: dict[str, Pair] = {
    "onnxruntime": (partial(_attention, attention), None),
    "onnxruntime-rnn": (partial(rnn, _session), None),
    "onnxruntime-gelu": (partial(gelu, _session), None),
    "onnxruntime-gru": _in_float32(gru),
    "onnxruntime-lstm": _in_float32(lstm),
}
OWN_WORDS: dict[str, Pair] = {"onnxruntime": (partial(_attention, in_its_words), None)}

# --- findings -------------------------------------------------------------------------------------------------------------

PRELUDE = f"""
    import numpy as np
    from onnx import helper as h
    import onnxruntime as ort{RUN}
        options = ort.SessionOptions(); options.log_severity_level = 4
        m = model(op, inputs, outputs, opset, **attributes)
        return ort.InferenceSession(m.SerializeToString(), options).run(None, given){X}"""
FINDINGS = [
    Finding("Attention of opset 25 has no kernel and is expanded: a negative scale gives NaN", """
        print(run("Attention", ["Y"], 25, {"scale": -1.0}, Q=x, K=x, V=x)[0].ravel().tolist())
        """, r"\[nan, nan\]"),
    Finding("Attention of opset 25: no key at all raises, where a query whose keys are all masked gives 0", """
        run("Attention", ["Y"], 25, Q=x, K=x[:, :, :0], V=x[:, :, :0])
        """, r"Fail: .*"),
    Finding("A mask of one row for all queries is refused, though ONNX broadcasts it", """
        run("Attention", ["Y"], 24, Q=x, K=x, V=x, attn_mask=np.ones((1, 1, 1, 2), bool))
        """, r"Fail: .*Attention node.*"),
    Finding("float64 has no kernel: expanded, with the scale's root in float32: exact for D = 16, not 32", """
        for D in 16, 32:
            y = np.random.default_rng(0).standard_normal((4, D)); w = np.exp(y @ y.T / D**0.5); z = y.reshape(1, 1, 4, D)
            print("%.0e" % abs(run("Attention", ["Y"], 24, Q=z, K=z, V=z)[0] - w / w.sum(1, keepdims=True) @ y).max())
        """, r"\de-1[56]\n\de-0[789]"),
    Finding("Near 0 the tanh of its RNN is off by far more than float32 rounds; its operator Tanh is not", """
        t, one = np.linspace(5e-4, 1e-3, 100, dtype=np.float32), np.ones((1, 1, 1), np.float32)
        outs = [run("RNN", ["Y"], 22, {"hidden_size": 1}, X=t.reshape(1, 100, 1), W=one, R=one), run("Tanh", ["Y"], 13, X=t)]
        print(*("%.0e" % abs(y[0].ravel() / np.tanh(t.astype(float)) - 1).max() for y in outs))
        """, r"\de-0[345] \de-0[78]"),
    Finding("`Y_h` of a sequence of length 0 is 0 and not `initial_h`", """
        one = np.ones((1, 1, 1), np.float32)
        inputs = {"X": one, "W": one, "R": one, "_": one, "sequence_lens": np.int32([0]), "initial_h": 5 * one}
        print(run("RNN", ["Y", "Y_h"], 22, {"hidden_size": 1}, **inputs)[1].ravel().tolist())
        """, r"\[0.0\]"),
    Finding("NaN in a value that is masked reaches the output, as 0 times NaN", """
        v, mask = np.float32([[[[1], [np.nan]]]]), np.array([[True, False]] * 2)
        print(run("Attention", ["Y"], 24, Q=x, K=x, V=v, attn_mask=mask)[0].ravel().tolist())
        """, r"\[nan, nan\]", "edge"),
]  # fmt: skip
