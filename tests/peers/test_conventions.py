"""Presets that say "run by" are what their libraries do: each library in its own words holds under its preset alone.

An adapter here hands arguments on as they are and returns what comes back: polarity and shape of masks, layout, counting of
windows and the base and layout of lse are for the preset to say. What a library has no argument for is not in the signature.
"""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import numpy as np
import pytest

for library in ("torch", "jax", "onnx", "onnxruntime", "transformers"):
    pytest.importorskip(library, reason="needs the peers extra: pip install npattn[peers]")

import jax
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from torch.nn.attention import flex_attention as flex
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.llama.modeling_llama import eager_attention_forward

from npattn.verify import CASES, PRESETS, verify

# --- the libraries in their own words -------------------------------------------------------------------------------------


def tensors(*arrays):
    return [None if x is None else torch.tensor(np.ascontiguousarray(x), requires_grad=x.dtype.kind == "f") for x in arrays]


def pulled(run):
    """The forward of a function of tensors that returns (out, leaves), and a backward by autograd."""

    def forward(q, k, v, **options):
        return run(*tensors(q, k, v), **options)[0].detach().numpy()

    def backward(dout, q, k, v, **options):
        leaves = tensors(q, k, v)
        out, more = run(*leaves, **options)
        out.backward(torch.tensor(dout))
        return {n: x.grad.numpy() for n, x in zip(("dq", "dk", "dv", "dbias"), (*leaves, *more), strict=False)}

    return forward, backward


def one_argument(mask, bias):
    """The libraries that have one argument for a boolean mask and a bias."""
    if mask is not None and bias is not None:
        raise NotImplementedError("one attn_mask, boolean or added")
    return mask if bias is None else bias


def torch_sdpa():
    def run(q, k, v, mask, bias, scale, causal):
        if causal and bias is not None:
            raise NotImplementedError("is_causal, or a bias")
        (attn_mask,) = tensors(one_argument(mask, bias))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=causal, scale=scale, enable_gqa=True
        )
        return out, [] if bias is None else [attn_mask]

    one, back = pulled(run)

    def forward(q, k, v, *, mask=None, bias=None, scale=None, causal=False):
        return one(q, k, v, mask=mask, bias=bias, scale=scale, causal=causal)

    def backward(dout, q, k, v, *, mask=None, bias=None, scale=None, causal=False):
        return back(dout, q, k, v, mask=mask, bias=bias, scale=scale, causal=causal)

    return forward, backward


def torch_mha():
    """nn.functional.multi_head_attention_forward with the weights, and with projections that change nothing."""

    def run(q, k, v, mask, bias):
        B, H, L, D = q.shape
        if k.shape[1] != H or v.shape[-1] != D:
            raise NotImplementedError("as many key heads as heads, of one width")
        (attn_mask,) = tensors(one_argument(mask, bias))
        if not B * L * k.shape[2]:
            raise NotImplementedError("nothing to attend to")
        one = torch.eye(H * D, dtype=q.dtype)
        out, _ = torch.nn.functional.multi_head_attention_forward(
            *(x.permute(2, 0, 1, 3).flatten(2) for x in (q, k, v)), H * D, H, torch.cat([one] * 3), None, None, None, False,
            0.0, one, None, attn_mask=None if attn_mask is None else attn_mask.flatten(0, 1), need_weights=True,
        )  # fmt: skip
        return out.unflatten(-1, (H, D)).permute(1, 2, 0, 3), []

    one, back = pulled(run)

    def forward(q, k, v, *, mask=None, bias=None):
        return one(q, k, v, mask=mask, bias=bias)

    def backward(dout, q, k, v, *, mask=None, bias=None):
        grads = back(dout, q, k, v, mask=mask, bias=bias)
        return {n: grads[n] for n in ("dq", "dk", "dv")}  # that of the bias has the full shape

    return forward, backward


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch):
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # it would compile for each shape


def torch_flex():
    def forward(q, k, v, *, mask=None, bias=None, scale=None, softcap=None):
        shape = (*q.shape[:-1], k.shape[-2])
        if 0 in shape:
            raise NotImplementedError("no block mask without elements")
        seen, added = (None if x is None else torch.tensor(x).expand(shape) for x in (mask, bias))
        block_mask = None if mask is None else flex.create_block_mask(lambda b, h, i, j: seen[b, h, i, j], *shape, device="cpu")

        def score_mod(score, b, h, i, j):
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            return score if added is None else score + added[b, h, i, j]

        out, aux = flex.flex_attention(
            *(torch.tensor(np.ascontiguousarray(x)) for x in (q, k, v)), score_mod=score_mod, block_mask=block_mask,
            scale=scale, enable_gqa=True, return_aux=flex.AuxRequest(lse=True),
        )  # fmt: skip
        return out.numpy(), aux.lse.numpy()

    return forward, None


def jax_nn():
    static = ("scale", "is_causal", "local_window_size")

    @jax.jit(static_argnames=static)
    def attend(q, k, v, bias, mask, n, **options):
        return jax.nn.dot_product_attention(q, k, v, bias, mask, key_value_seq_lengths=n, return_residual=True, **options)

    @jax.jit(static_argnames=static)
    def pull(dout, q, k, v, bias, mask, n, **options):
        return jax.vjp(lambda *x: attend(*x, mask, n, **options)[0], q, k, v, bias)[1](dout)

    def run(function, *arrays, mask, bias, scale, causal, window, key_lengths):
        if window is not None and None in window:
            raise NotImplementedError("two numbers")
        if arrays[-1].shape[-1] != arrays[-2].shape[-1]:
            raise NotImplementedError("one width")
        n = None if key_lengths is None else np.asarray(key_lengths, np.int32)
        window = None if window is None else tuple(map(int, window))
        with jax.enable_x64(arrays[0].dtype == np.float64):
            result = function(*arrays, bias, mask, n, scale=scale, is_causal=causal, local_window_size=window)
            return tuple(None if x is None else np.array(x) for x in result)

    def forward(q, k, v, *, mask=None, bias=None, scale=None, causal=False, window=None, key_lengths=None):
        return run(attend, q, k, v, mask=mask, bias=bias, scale=scale, causal=causal, window=window, key_lengths=key_lengths)

    def backward(dout, q, k, v, *, mask=None, bias=None, scale=None, causal=False, window=None, key_lengths=None):
        options = {"mask": mask, "bias": bias, "scale": scale, "causal": causal, "window": window, "key_lengths": key_lengths}
        return tuple(run(pull, dout, q, k, v, **options)[:3])  # that of the bias has the full shape

    return forward, backward


def node(opset, given, attributes):
    """A model of one Attention."""
    code = onnx.helper.np_dtype_to_tensor_dtype
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Attention", list(given), ["Y"], **attributes)],
        "attention",
        [value(name, code(x.dtype), None) for name, x in given.items()],
        [value("Y", code(given["Q"].dtype), None)],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def onnx_attention(run):
    def attend(q, k, v, mask, bias, **attributes):
        attn_mask = one_argument(mask, bias)
        given = {"Q": q, "K": k, "V": v} | ({} if attn_mask is None else {"attn_mask": attn_mask})
        with np.errstate(all="ignore"):
            given = {n: np.ascontiguousarray(x) for n, x in given.items()}
            return run(given, {n: x for n, x in attributes.items() if x is not None})

    return attend


def onnx_reference():
    attend = onnx_attention(lambda given, attributes: ReferenceEvaluator(node(25, given, attributes)).run(None, given)[0])

    def forward(q, k, v, *, mask=None, bias=None, scale=None, softcap=None, causal=False, window=None):
        left, right = window or (None, None)
        return attend(
            q, k, v, mask, bias, scale=scale, softcap=softcap, is_causal=int(causal), left_window_size=left,
            right_window_size=right,
        )  # fmt: skip

    return forward, None


def onnxruntime_cpu():
    def run(given, attributes):
        if not all(x.size for x in given.values()) or attributes.get("scale", 1) <= 0:
            raise NotImplementedError("no empty inputs, and a scale above 0")
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(
                node(24, given, attributes).SerializeToString(), quiet, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            if "NOT_IMPLEMENTED" not in str(error):
                raise
            raise NotImplementedError("no kernel of this dtype") from error
        return session.run(None, given)[0]

    attend = onnx_attention(run)

    def forward(q, k, v, *, mask=None, bias=None, scale=None, softcap=None, causal=False):
        return attend(q, k, v, mask, bias, scale=scale, softcap=softcap, is_causal=int(causal))

    return forward, None


def transformers_eager():
    """eager_attention_forward; a mask and a window become what masking_utils.eager_mask makes of them: 0 and finfo.min."""

    def run(q, k, v, mask, bias, scale, window):
        L, S = q.shape[2], k.shape[2]
        if window is not None:
            if window[0] is None or window[1] != 0:
                raise NotImplementedError("sliding windows are causal, with a limit")
            i, j = torch.arange(L)[:, None], torch.arange(S)
            own = sliding_window_causal_mask_function(int(window[0]))(0, 0, i, j)
            mask = own.numpy() if mask is None else mask & own.numpy()
        (added,) = tensors(bias)
        if mask is not None:
            low = torch.where(torch.tensor(mask), torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
            low = low.expand(*q.shape[:3], S)
            added = low if added is None else added + low
        layer = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
        out, _ = eager_attention_forward(layer, q, k, v, added, scaling=q.shape[-1] ** -0.5 if scale is None else scale)
        return out.transpose(1, 2), [] if bias is None else [added]

    one, back = pulled(run)

    def forward(q, k, v, *, mask=None, scale=None, window=None):
        return one(q, k, v, mask=mask, bias=None, scale=scale, window=window)

    def backward(dout, q, k, v, *, mask=None, scale=None, window=None):
        return back(dout, q, k, v, mask=mask, bias=None, scale=scale, window=window)

    return forward, backward


RAW = {
    "torch_sdpa": torch_sdpa, "torch_mha": torch_mha, "torch_flex": torch_flex, "jax": jax_nn, "onnx25": onnx_reference,
    "onnxruntime": onnxruntime_cpu, "hf_eager": transformers_eager,
}  # fmt: skip

# --- what holds ----------------------------------------------------------------------------------------------------------

DEFECTS = {  # what no convention describes
    "jax": {
        "bias of -inf": "a softmax of a row of -inf is NaN, where masks are a finite number",
        "S = 0": "lse is -inf where there is no key, and a number where all are masked",
    },
    "onnx25": {"S = 0": "the maximum of an empty row raises"},
}

# Cases of ordinary inputs and small sizes: how exact a library is does not depend on the words that it is spoken to in.
SMALL = [
    c
    for c in CASES
    if c.sizes["S"] * c.sizes["L"] < 10_000 and not {"hard inputs", "head widths", "long", "sink", "dropout"} & set(c.features)
]


@functools.cache
def adapter(name):
    return RAW[name]()


@pytest.mark.parametrize("name", RAW)
def test_preset(name):
    report = verify(*adapter(name), convention=name, cases=SMALL, expected_failures=DEFECTS.get(name), diagnose=False)
    assert report.lines() == []
    assert report.tested > 60


# A feature of which cases are wrong where a library is taken to speak npattn's words, and how many at least.
FOREIGN = {
    "torch_sdpa": ("NaN containment", 5),
    "torch_mha": ("mask", 5),
    "torch_flex": ("NaN containment", 3),
    "jax": ("plain", 1),
    "onnx25": ("mask", 1),
    "onnxruntime": ("mask", 2),
    "hf_eager": ("dead rows", 4),
}


@pytest.mark.parametrize("name", RAW)
def test_without_the_preset(name):
    feature, count = FOREIGN[name]
    cases = [c for c in SMALL if feature in c.features]
    assert len(verify(*adapter(name), cases=cases, diagnose=False).wrong) >= count


def test_all_presets_that_were_run():
    assert {name for name, preset in PRESETS.items() if "tests/peers/test_conventions.py" in preset.source} == set(RAW)
    for name, preset in PRESETS.items():
        assert re.match(r"run by [\w/.]+: \w+ \d+\.\d+|run: this package$|read from source, not run: ", preset.source), name
