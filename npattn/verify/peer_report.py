"""The page on what the installed libraries do: every sentence of it is a result of the run that writes it.

Three kinds of runs. All cases of `npattn verify` say what is supported and how exact it is. Small probes, each library called
in its own words, say which conventions it follows. Findings are plain code of the library that is run as it stands on the page,
with what it prints beside it: one that prints something else than it did when it was written down is reported as such.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import math
import platform
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from npattn.ops.attention import attention
from npattn.ops.checks import Array
from npattn.tolerances import GOOD_MAX, GOOD_RMS
from npattn.verify.candidates import CANONICAL, OWN_KEYWORDS, CandidateError, load
from npattn.verify.conventions import FIELDS, PRESETS, Convention
from npattn.verify.judge import Settings, examine
from npattn.verify.peers import PEERS
from npattn.verify.report import CASES_OF, Report

Call = Callable[..., tuple[Array, Array | None]]  # (q, k, v, **options in the library's words) -> out, lse


# --- the libraries in their own words, for the probes ---------------------------------------------------------------------


def _tensors(*arrays: Any) -> list[Any]:
    torch: Any = importlib.import_module("torch")
    return [None if x is None else torch.tensor(np.ascontiguousarray(x)) for x in arrays]


def _sdpa(backend: str | None) -> Call:
    torch: Any = importlib.import_module("torch")
    choice: Any = importlib.import_module("torch.nn.attention")

    def call(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, causal: bool = False
    ) -> tuple[Array, Array | None]:
        forced = contextlib.nullcontext() if backend is None else choice.sdpa_kernel(getattr(choice.SDPBackend, backend))
        with forced:
            attn_mask = _tensors(bias if mask is None else mask)[0]
            out = torch.nn.functional.scaled_dot_product_attention(
                *_tensors(q, k, v), attn_mask=attn_mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out.numpy(), None

    return call


def _multi_head(weights: bool) -> Call:
    torch: Any = importlib.import_module("torch")

    def call(q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None) -> tuple[Array, Array | None]:
        """With projections that change nothing."""
        (B, H, _, D), S = q.shape, k.shape[2]
        one = torch.eye(H * D, dtype=_tensors(q)[0].dtype)
        added = _tensors(bias if mask is None else mask)[0]
        if added is not None and added.ndim == 4:
            added = added.expand(B, H, added.shape[2], S).flatten(0, 1)
        out, _ = torch.nn.functional.multi_head_attention_forward(
            *(x.permute(2, 0, 1, 3).flatten(2) for x in _tensors(q, k, v)), H * D, H, torch.cat([one] * 3), None, None, None,
            False, 0.0, one, None, attn_mask=added, need_weights=weights,
        )  # fmt: skip
        return out.unflatten(-1, (H, D)).permute(1, 2, 0, 3).numpy(), None

    return call


def _jax() -> Call:
    jax: Any = importlib.import_module("jax")

    def call(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, causal: bool = False,
        window: Any = None,
    ) -> tuple[Array, Array | None]:  # fmt: skip
        with jax.enable_x64(bool(q.dtype == np.float64)):
            out, lse = jax.nn.dot_product_attention(
                q, k, v, bias, mask, scale=scale, is_causal=causal, local_window_size=window, return_residual=True
            )
            return np.array(out), np.array(lse)

    return call


def _adapter(name: str) -> Call:
    """An adapter of `npattn.verify.peers` that translates nothing but names."""
    forward, _ = PEERS[name].load()

    def call(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array | None]:
        result = forward(q, k, v, **options)
        return result if isinstance(result, tuple) else (result, None)

    return call


def _onnx(run: Any, opset: int, windows: bool) -> Call:
    onnx: Any = importlib.import_module("onnx")
    helper = onnx.helper

    def call(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None,
        causal: bool = False, **more: Any,
    ) -> tuple[Array, Array | None]:  # fmt: skip
        if mask is not None and bias is not None:
            raise TypeError("one attn_mask")
        given = {"Q": q, "K": k, "V": v, "attn_mask": bias if mask is None else mask}
        given = {n: x for n, x in given.items() if x is not None}
        sides = dict(zip(("left_window_size", "right_window_size"), more.pop("window", None) or (), strict=False))
        if (sides and not windows) or more or None in sides.values():
            raise TypeError("no such attribute")
        attributes = {"scale": scale, "softcap": softcap, "is_causal": int(causal), **sides}
        code = helper.np_dtype_to_tensor_dtype
        info = [helper.make_tensor_value_info(n, code(x.dtype), None) for n, x in given.items()]
        node = helper.make_node("Attention", list(given), ["Y"], **{n: x for n, x in attributes.items() if x is not None})
        graph = helper.make_graph([node], "g", info, [helper.make_tensor_value_info("Y", code(q.dtype), None)])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        with np.errstate(all="ignore"):
            return np.array(run(model, {n: np.ascontiguousarray(x) for n, x in given.items()})), None

    return call


def _reference(model: Any, given: dict[str, Array]) -> Any:
    return importlib.import_module("onnx.reference").ReferenceEvaluator(model).run(None, given)[0]


def _session(model: Any, given: dict[str, Array]) -> Any:
    runtime: Any = importlib.import_module("onnxruntime")
    quiet = runtime.SessionOptions()
    quiet.log_severity_level = 4
    return runtime.InferenceSession(model.SerializeToString(), quiet, providers=["CPUExecutionProvider"]).run(None, given)[0]


def _eager(model: str) -> Call:
    torch: Any = importlib.import_module("torch")
    eager = importlib.import_module(f"transformers.models.{model}.modeling_{model}").eager_attention_forward

    def call(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, sink: Any = None, **more: Any
    ) -> tuple[Array, Array | None]:
        if more.keys() - ({"softcap"} if model == "gemma2" else set()) or (mask is not None and mask.ndim != 4):
            raise TypeError("no such argument")
        tq, tk, tv, added, sinks = _tensors(q, k, v, bias, sink)
        if mask is not None:
            low = torch.where(_tensors(mask)[0], torch.zeros((), dtype=tq.dtype), torch.finfo(tq.dtype).min)
            added = low if added is None else added + low
        if model == "gpt_oss" and sinks is None:  # it always has one: as good as none
            sinks = torch.full((q.shape[1],), -1e4, dtype=tq.dtype)
        layer = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False, sinks=sinks)
        scaling = q.shape[-1] ** -0.5 if scale is None else scale
        return eager(layer, tq, tk, tv, added, scaling=scaling, **more)[0].transpose(1, 2).numpy(), None

    return call


CALLS: dict[str, Callable[[], Call]] = {
    "torch": lambda: _sdpa(None),
    "torch-math": lambda: _sdpa("MATH"),
    "torch-flash": lambda: _sdpa("FLASH_ATTENTION"),
    "torch-flex": lambda: _adapter("torch-flex"),
    "jax": _jax,
    "onnx": lambda: _onnx(_reference, 25, True),
    "onnxruntime": lambda: _onnx(_session, 24, False),
    "transformers-eager": lambda: _eager("gemma2"),
    "transformers-sink": lambda: _eager("gpt_oss"),
    "torch-mha": lambda: _multi_head(False),
    "torch-mha-weights": lambda: _multi_head(True),
}


# --- probes ---------------------------------------------------------------------------------------------------------------


class Probes:
    """What one library does in each conflict, by asking it; a field that it has no argument for is not in `found`."""

    def __init__(self, name: str) -> None:
        self.name, self.call, self.found = name, CALLS[name](), dict[str, str]()
        rng = np.random.default_rng(0)
        self.q, self.k, self.v = (rng.standard_normal((1, 2, n, 4)).astype(np.float32) for n in (3, 5, 5))
        for probe in (
            self.layout, self.mask, self.mask_shape, self.causal, self.mask_with_causal, self.dead, self.dead_grad, self.lse,
            self.softcap, self.window, self.heads, self.scale, self.scale_on, self.masked_nan, self.float64,
        ):  # fmt: skip
            # An argument that it does not take is a TypeError, a call that it refuses anything.
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.found |= {n: x for n, x in probe().items() if x}

    def ask(self, q: Array | None = None, k: Array | None = None, v: Array | None = None, **options: Any) -> Array:
        out: Array = self.both(q, k, v, **options)[0]
        return out

    def both(self, q: Any = None, k: Any = None, v: Any = None, **options: Any) -> tuple[Array, Any]:
        """out and lse in npattn's layout; a mask is True where a key is seen."""
        turn = self.found.get("layout") == "BLHD"
        given = [own if x is None else x for x, own in ((q, self.q), (k, self.k), (v, self.v))]
        if self.found.get("mask") == "drop" and options.get("mask") is not None:
            options["mask"] = ~options["mask"]
        out: Any
        out, lse = self.call(*(np.ascontiguousarray(x.swapaxes(1, 2)) if turn else x for x in given), **options)
        return (out.swapaxes(1, 2), lse) if turn else (out, lse)

    def which(self, got: Array, values: dict[str, Array]) -> str:
        """The value whose result this is."""
        return next((n for n, x in values.items() if np.allclose(got, x, rtol=1e-4, atol=1e-5, equal_nan=True)), "")

    def right(self, mask: Array) -> Array:
        """What is right where a query may see the keys of this mask."""
        out: Array = attention(self.q, self.k, self.v, mask=mask)
        return out

    def layout(self) -> dict[str, str]:
        x = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
        values = {"BHLD": x.mean(2, keepdims=True) + 0 * x, "BLHD": x.mean(1, keepdims=True) + 0 * x}
        return {"layout": self.which(self.call(0 * x, 0 * x, x)[0], values)}

    def seen(self, *shape: int) -> Array:
        return np.asarray(np.random.default_rng(1).random(shape) < (0.6 if shape[-1] > 1 else 1.1))

    def full(self) -> Array:
        mask: Array = np.broadcast_to(self.seen(3, 5), (1, 2, 3, 5)).copy()
        mask[..., 0] = True
        return mask

    def mask(self) -> dict[str, str]:
        mask = self.full()
        return {"mask": self.which(self.ask(mask=mask), {"keep": self.right(mask), "drop": self.right(~mask)})}

    def mask_shape(self) -> dict[str, str]:
        for shape in ((3, 5), (1, 1, 1, 5), (1, 1, 3, 1)):
            mask = self.seen(*shape)
            mask[..., 0] = True
            try:
                got = self.ask(mask=mask)
            except Exception:
                return {"mask_shape": "full"}
            if not self.which(got, {"broadcast": self.right(mask)}):
                return {"mask_shape": "full"}
        return {"mask_shape": "broadcast"}

    def causal(self) -> dict[str, str]:
        values = {n: self.right(np.tri(3, 5, d, dtype=bool)) for n, d in (("top_left", 0), ("bottom_right", 2))}
        return {"causal": self.which(self.ask(causal=True), values)}

    def mask_with_causal(self) -> dict[str, str]:
        if "causal" not in self.found:
            return {}
        lower = np.tri(3, 5, 0 if self.found["causal"] == "top_left" else 2, dtype=bool)
        try:
            got = self.ask(mask=self.full(), causal=True)
        except Exception:
            return {"mask_with_causal": "error"}
        return {"mask_with_causal": self.which(got, {"intersect": self.right(self.full() & lower)})}

    def dead(self) -> dict[str, str]:
        mask = self.full()
        mask[..., 1, :] = False
        out, lse = self.both(mask=mask)
        row = out[..., 1, :]
        values = {"zero": np.zeros_like(row), "mean_v": self.v.mean(2), "nan": np.full(row.shape, np.nan, row.dtype)}
        found = {"dead_out": self.which(row, values)}
        if lse is not None:
            number = float(np.ravel(lse.swapaxes(1, 2) if lse.shape == (1, 3, 2) else lse)[1])
            found["dead_lse"] = {-math.inf: "-inf", math.inf: "+inf", 0.0: "zero"}.get(number, "fill" if number < -1e30 else "")
            found["lse_layout"] = "BLH" if lse.shape == (1, 3, 2) else "BHL"
        return found

    def dead_grad(self) -> dict[str, str]:
        backward = load(self.name).backward
        if PEERS[self.name].op != "attention" or backward is None:
            return {}
        mask, dout = np.zeros((1, 2, 3, 5), bool), np.ones_like(self.q)
        options = {"sink": np.zeros(2, np.float32)} if self.name == "transformers-sink" else {}
        grads = backward(dout, self.q, self.k, self.v, mask=mask, **options)
        if all((grads[n] == 0).all() for n in ("dq", "dk", "dv")):
            return {"dead_grad": "zero"}
        alone = (grads["dq"] == 0).all() and (grads["dk"] == 0).all() and np.allclose(grads["dv"], 3 / 5)
        return {"dead_grad": "leak" if alone else "undefined"}

    def lse(self) -> dict[str, str]:
        _, lse = self.both()
        _, natural = attention(self.q, self.k, self.v, return_lse=True)
        lse = lse.swapaxes(1, 2) if lse.shape == (1, 3, 2) else lse
        return {"lse": self.which(lse, {"natural": natural, "log2": natural / math.log(2)})}

    def softcap(self) -> dict[str, str]:
        bias = np.random.default_rng(2).standard_normal((1, 2, 3, 5)).astype(np.float32)
        raw = self.q @ self.k.swapaxes(-1, -2) / 2

        def cap(x: Array) -> Array:
            return np.tanh(x)

        def of(scores: Array) -> Array:
            e = np.exp(scores - scores.max(-1, keepdims=True))
            return np.asarray((e / e.sum(-1, keepdims=True)) @ self.v)

        values = {"before_bias": of(cap(raw) + bias), "after_bias": of(cap(raw + bias))}
        order = self.which(self.ask(bias=bias, softcap=1.0), values)
        mask = self.full()
        got = self.ask(mask=mask, softcap=1.0)
        leaks = np.allclose(got, of(np.where(mask, cap(raw), -1.0)), atol=1e-5)
        return {"softcap": "after_mask" if leaks else order}

    def window(self) -> dict[str, str]:
        far = np.arange(5) - np.arange(3)[:, None]
        values = {n: self.right((far >= -d) & (far <= 0)) for n, d in (("inclusive", 2), ("total", 1))}
        found = {"window": self.which(self.ask(window=(2, 0)), values)}
        right = self.right(far <= 0)
        for text, number in (("None", None), ("-1", -1)):
            with contextlib.suppress(Exception):
                if self.which(self.ask(window=(number, 0)), {text: right}):
                    found.setdefault("no_limit", text)
        return found

    def heads(self) -> dict[str, str]:
        q = np.concatenate([self.q, -self.q], 1)
        tile = attention(q, np.tile(self.k, (1, 2, 1, 1)), np.tile(self.v, (1, 2, 1, 1)))
        return {"heads": self.which(self.ask(q), {"repeat": attention(q, self.k, self.v), "tile": tile})}

    def scale(self) -> dict[str, str]:
        if "transformers" in self.name:  # it has no default
            return {}
        values = {"rsqrt": attention(self.q, self.k, self.v), "none": attention(self.q, self.k, self.v, scale=1.0)}
        return {"scale": self.which(self.ask(), values)}

    def scale_on(self) -> dict[str, str]:
        got = self.ask(scale=-0.5)
        values = {"scores": attention(self.q, self.k, self.v, scale=-0.5)}
        return {"scale_on": "both" if np.isnan(got).all() else self.which(got, values)}

    def masked_nan(self) -> dict[str, str]:
        mask, v = self.full(), self.v.copy()
        mask[..., 2], v[..., 2, :] = False, np.nan
        return {"masked_nan": "poisons" if np.isnan(self.ask(v=v, mask=mask)).any() else "contained"}

    def float64(self) -> dict[str, str]:
        x = [a.astype(np.float64) / 3 for a in (self.q, self.k, self.v)]
        error = np.abs(self.ask(*x) - attention(*x)).max()
        return {"float64": "float32" if error > 1e-11 else "float64"}


PRESET_OF = {
    "torch": "torch_sdpa", "torch-math": "torch_sdpa", "torch-flash": "torch_sdpa", "torch-flex": "torch_flex", "jax": "jax",
    "onnx": "onnx25", "onnxruntime": "onnxruntime", "transformers-eager": "hf_eager", "transformers-sink": "hf_eager",
    "torch-mha": "torch_mha", "torch-mha-weights": "torch_mha",
}  # fmt: skip


def agreement(peer: str, found: dict[str, str]) -> str:
    """Whether the library's preset says what was measured."""
    convention = PRESETS[PRESET_OF[peer]].convention
    apart = [f"{n}={value}" for n, value in found.items() if getattr(convention, n) != value]
    return f"`{PRESET_OF[peer]}`" + (f" but for {', '.join(apart)}" if apart else "")


# --- findings: plain code, run as it stands -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    library: str
    title: str
    code: str
    prints: str  # a pattern of what it printed when it was found
    kind: str = "defect"  # or "edge": what no specification settles


PRELUDES = {
    "torch": """
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa
        x, no = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[True, False]] * 2)""",
    "jax": """
        import jax, numpy as np
        from jax.nn import dot_product_attention as attend
        x, no = np.float32([[[[1]], [[3]]]]), np.zeros((1, 1, 2, 2), bool)  # two keys, one head; a mask that allows nothing""",
    "onnx": """
        import numpy as np
        from onnx import helper as h
        from onnx.reference import ReferenceEvaluator
        def model(op, inputs, outputs, opset, **attributes):
            info = [h.make_tensor_value_info(n, h.np_dtype_to_tensor_dtype(x.dtype), None) for n, x in inputs.items() if n]
            out = [h.make_tensor_value_info(n, info[0].type.tensor_type.elem_type, None) for n in outputs]
            graph = h.make_graph([h.make_node(op, list(inputs), outputs, **attributes)], op, info, out)
            return h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=10)
        def run(op, outputs, opset, attributes={}, **inputs):
            inputs = {n.strip("_"): x for n, x in inputs.items()}
            given = {n: x for n, x in inputs.items() if n}
            return ReferenceEvaluator(model(op, inputs, outputs, opset, **attributes)).run(None, given)
        x = np.float32([[[[1], [3]]]])""",
    "transformers": """
        import torch
        from types import SimpleNamespace
        from transformers.models.llama.modeling_llama import eager_attention_forward as eager
        from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sink
        layer = SimpleNamespace(num_key_value_groups=1, training=False)
        x, low = torch.tensor([[[[1.0], [3.0]]]]), torch.full((1, 1, 2, 2), torch.finfo(torch.float32).min)""",
    "scipy": """
        import numpy as np
        from scipy.special import softmax""",
}
PRELUDES["onnxruntime"] = (
    PRELUDES["onnx"].replace("from onnx.reference import ReferenceEvaluator", "import onnxruntime as ort")
    .replace("return ReferenceEvaluator(", "options = ort.SessionOptions(); options.log_severity_level = 4\n            m = ")
    .replace("**attributes)).run(None, given)", "**attributes)\n            "
             "return ort.InferenceSession(m.SerializeToString(), options).run(None, given)")
)  # fmt: skip

FINDINGS = [
    Finding("torch", "`is_causal` with a negative scale gives NaN: masked scores are -inf, and the scale makes them +inf", """
        print(sdpa(x, x, x, is_causal=True, scale=-1.0).isnan().flatten().tolist())
        print(sdpa(x, x, x, attn_mask=torch.ones(2, 2, dtype=torch.bool).tril(), scale=-1.0).isnan().any().item())
        """, r"\[True, False\]\nFalse"),
    Finding("torch", "A query without keys in `nn.MultiheadAttention`: NaN with weights, 0 without, NaN on the fast path", """
        layer = torch.nn.MultiheadAttention(4, 2, batch_first=True).eval()
        y, drop = torch.ones(1, 2, 4), torch.ones(2, 2, dtype=torch.bool)
        print(*(layer(y, y, y, attn_mask=drop, need_weights=w)[0][0, 0, 0].item() for w in (True, False)))
        print(torch.no_grad()(layer)(y, y, y, attn_mask=drop, need_weights=False)[0][0, 0, 0].item())
        """, r"nan 0.0\nnan"),
    Finding("torch", "`attn_mask` and `is_causal` in one call, documented as an error: the chosen kernel takes both", """
        print(sdpa(x, x, x, attn_mask=no, is_causal=True).flatten().tolist())
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            sdpa(x, x, x, attn_mask=no, is_causal=True)
        """, r"\[1.0, 1.0\]\nRuntimeError: .*"),
    Finding("torch", "NaN in a value that is masked reaches the output, as 0 times NaN", """
        v = torch.tensor([[[[1.0], [torch.nan]]]])
        print(sdpa(x, x, v, attn_mask=no).flatten().tolist())
        """, r"\[nan, nan\]", "edge"),
    Finding("torch", "NaN in a value that is masked reaches the output of `flex_attention`, too", """
        from torch.nn.attention.flex_attention import flex_attention
        v = torch.tensor([[[[1.0], [torch.nan]]]])
        print(flex_attention(x, x, v, score_mod=lambda s, b, h, i, j: torch.where(j == 0, s, -torch.inf)).flatten().tolist())
        """, r"\[nan, nan\]", "edge"),
    Finding("jax", "A query that may see no key gets the mean of all values, and an lse of 0.7 times the least float32", """
        out, lse = attend(x, x, x, mask=no, return_residual=True)
        print(out.ravel().tolist(), "%.3g" % lse.ravel()[0])
        """, r"\[2.0, 2.0\] -2.38e\+38"),
    Finding("jax", "A query that may see no key hands its gradient to all values", """
        print(jax.grad(lambda v: attend(x, x, v, mask=no).sum())(x).ravel().tolist())
        """, r"\[1.0, 1.0\]"),
    Finding("jax", "A bias of -inf in all of a row gives NaN, where a mask does not", """
        print(attend(x, x, x, bias=np.where(no, 0, -np.inf).astype(np.float32)).ravel().tolist())
        """, r"\[nan, nan\]"),
    Finding("jax", "The softmax of float64 inputs is computed in float32", """
        with jax.enable_x64(True):
            y = np.float64([[[[0.1]], [[0.2]]]]); out = np.asarray(attend(y, y, y)); w = np.exp(y[0, :, 0] * y[0, :, 0].T)
        print(out.dtype, "%.0e" % abs(out[0, :, 0] - w / w.sum(1, keepdims=True) @ y[0, :, 0]).max())
        """, r"float64 \de-0[789]"),
    Finding("jax", "float16 raises on a CPU when it is compiled, and works when it is not", """
        y = x.astype(np.float16)
        print(attend(y, y, y).dtype)
        jax.jit(attend)(y, y, y)
        """, r"float16\nValueError: The precision .F16_F16_F32. is not supported.*"),
    Finding("jax", "lse has no gradient", """
        print(jax.grad(lambda q: attend(q, x, x, return_residual=True)[1].sum())(x).ravel().tolist())
        """, r"\[0.0, 0.0\]", "edge"),
    Finding("jax", "NaN in a value that is masked reaches the output, as 0 times NaN", """
        v, mask = np.float32([[[[1]], [[np.nan]]]]), np.array([True, False]).reshape(1, 1, 1, 2)
        print(attend(x, x, v, mask=mask).ravel().tolist())
        """, r"\[nan, nan\]", "edge"),
    Finding("onnx", "A negative scale gives NaN: its root multiplies Q and K", """
        with np.errstate(invalid="ignore"):
            print(run("Attention", ["Y"], 25, {"scale": -1.0}, Q=x, K=x, V=x)[0].ravel().tolist())
        """, r"\[nan, nan\]"),
    Finding("onnx", "No key at all raises, where a query whose keys are all masked gives 0", """
        run("Attention", ["Y"], 25, Q=x, K=x[:, :, :0], V=x[:, :, :0])
        """, "ValueError: zero-size array to reduction operation maximum which has no identity"),
    Finding("onnx", "RNN ignores `sequence_lens`: steps behind a sequence are computed, and `Y_h` is the last of them", """
        w, step = np.ones((1, 1, 1), np.float32), np.ones((3, 1, 1), np.float32)
        inputs = {"X": step, "W": w, "R": w, "_": np.zeros(0), "sequence_lens": np.int32([1])}
        h, last = run("RNN", ["Y", "Y_h"], 22, {"hidden_size": 1}, **inputs)
        print("%.3f %.3f %.3f" % tuple(h.ravel()), "and %.3f" % last.item())
        """, r"0.762 0.943 0.960 and 0.960"),
    Finding("onnx", "A mask (1, 1, L, 1) is not broadcast but filled up, as specified: all queries see key 0 alone", """
        print(run("Attention", ["Y"], 25, Q=x, K=x, V=x, attn_mask=np.ones((1, 1, 2, 1), bool))[0].ravel().tolist())
        """, r"\[1.0, 1.0\]", "edge"),
    Finding("onnx", "NaN in a value that is masked reaches the output, as 0 times NaN", """
        v, mask = np.float32([[[[1], [np.nan]]]]), np.array([[True, False]] * 2)
        print(run("Attention", ["Y"], 25, Q=x, K=x, V=v, attn_mask=mask)[0].ravel().tolist())
        """, r"\[nan, nan\]", "edge"),
    Finding("onnxruntime", "Attention of opset 25 has no kernel and is expanded: a negative scale gives NaN", """
        print(run("Attention", ["Y"], 25, {"scale": -1.0}, Q=x, K=x, V=x)[0].ravel().tolist())
        """, r"\[nan, nan\]"),
    Finding("onnxruntime", "Attention of opset 25: no key at all raises, where a query whose keys are all masked gives 0", """
        run("Attention", ["Y"], 25, Q=x, K=x[:, :, :0], V=x[:, :, :0])
        """, r"Fail: .*"),
    Finding("onnxruntime", "A mask of one row for all queries is refused, though ONNX broadcasts it", """
        run("Attention", ["Y"], 24, Q=x, K=x, V=x, attn_mask=np.ones((1, 1, 1, 2), bool))
        """, r"Fail: .*Attention node.*"),
    Finding("onnxruntime", "float64 has no kernel: expanded, with the scale's root in float32: exact for D = 16, not 32", """
        for D in 16, 32:
            y = np.random.default_rng(0).standard_normal((4, D)); w = np.exp(y @ y.T / D**0.5); z = y.reshape(1, 1, 4, D)
            print("%.0e" % abs(run("Attention", ["Y"], 24, Q=z, K=z, V=z)[0] - w / w.sum(1, keepdims=True) @ y).max())
        """, r"\de-1[56]\n\de-0[789]"),
    Finding("onnxruntime", "Near 0 the tanh of its RNN is off by far more than float32 rounds; its operator Tanh is not", """
        t, one = np.linspace(5e-4, 1e-3, 100, dtype=np.float32), np.ones((1, 1, 1), np.float32)
        outs = [run("RNN", ["Y"], 22, {"hidden_size": 1}, X=t.reshape(1, 100, 1), W=one, R=one), run("Tanh", ["Y"], 13, X=t)]
        print(*("%.0e" % abs(y[0].ravel() / np.tanh(t.astype(float)) - 1).max() for y in outs))
        """, r"\de-0[345] \de-0[78]"),
    Finding("onnxruntime", "`Y_h` of a sequence of length 0 is 0 and not `initial_h`", """
        one = np.ones((1, 1, 1), np.float32)
        inputs = {"X": one, "W": one, "R": one, "_": one, "sequence_lens": np.int32([0]), "initial_h": 5 * one}
        print(run("RNN", ["Y", "Y_h"], 22, {"hidden_size": 1}, **inputs)[1].ravel().tolist())
        """, r"\[0.0\]"),
    Finding("onnxruntime", "NaN in a value that is masked reaches the output, as 0 times NaN", """
        v, mask = np.float32([[[[1], [np.nan]]]]), np.array([[True, False]] * 2)
        print(run("Attention", ["Y"], 24, Q=x, K=x, V=v, attn_mask=mask)[0].ravel().tolist())
        """, r"\[nan, nan\]", "edge"),
    Finding("transformers", "A query that may see no key gets the mean of all values", """
        print(eager(layer, x, x, x, low, scaling=1.0)[0].flatten().tolist())
        """, r"\[2.0, 2.0\]"),
    Finding("transformers", "The gradient of such a query reaches q and k, as a mask is added to the scores", """
        q = x.clone().requires_grad_()
        eager(layer, q, x, x, low, scaling=1.0)[0].sum().backward()
        print(q.grad.flatten().tolist())
        """, r"\[1.0, 1.0\]"),
    Finding("transformers", "The softmax of float64 inputs is computed in float32", """
        y = torch.tensor([[[[0.1], [0.2]]]], dtype=torch.float64)
        out, want = eager(layer, y, y, y, None, scaling=1.0)[0].flatten(), (torch.softmax(y @ y.mT, -1) @ y).flatten()
        print(out.dtype, "%.0e" % (out - want).abs().max())
        """, r"torch.float64 \de-0[789]"),
    Finding("transformers", "gpt-oss: the sink's gradient loses two digits, as the maximum is not detached", """
        torch.manual_seed(0); v, dout = torch.randn(2, 1, 64, 1)  # all scores are 0, and the sink of 1 is the maximum
        def dsink(attend, t):
            layer.sinks = torch.ones(1, dtype=t, requires_grad=True)
            (attend(0 * v.to(t), v.to(t)).flatten() * dout.to(t).flatten()).sum().backward()
            return layer.sinks.grad.item()
        theirs = lambda q, v: with_sink(layer, q[None], q[None], v[None], None, scaling=1.0)[0]
        plain = lambda q, v: torch.softmax(torch.cat([q @ q.mT, layer.sinks.expand(1, 64, 1)], -1), -1)[..., :-1] @ v
        print(*("%.0e" % abs(dsink(f, torch.float32) / dsink(f, torch.float64) - 1) for f in (theirs, plain)))
        """, r"\de-0[56] \de-0[78]"),
    Finding("scipy", "softmax of a row of -inf is NaN", """
        with np.errstate(invalid="ignore"):
            print(softmax(np.array([-np.inf, -np.inf])).tolist())
        """, r"\[nan, nan\]", "edge"),
]  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A finding, and what it printed now."""

    finding: Finding
    printed: str

    @property
    def holds(self) -> bool:
        return re.fullmatch(self.finding.prints, self.printed, re.DOTALL) is not None


def show(finding: Finding) -> Shown:
    """Run the code of a finding."""
    names: dict[str, Any] = {}
    text = io.StringIO()
    with contextlib.redirect_stdout(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(textwrap.dedent(PRELUDES[finding.library]), names)
        try:
            exec(textwrap.dedent(finding.code), names)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            print(f"{type(error).__name__}: {textwrap.shorten(first, 100, placeholder=' ...')}")
    return Shown(finding, text.getvalue().strip())


# --- the page -------------------------------------------------------------------------------------------------------------


@dataclass
class Peer:
    """What was found out about one candidate."""

    name: str
    report: Report
    conventions: dict[str, str] = field(default_factory=dict)
    under_preset: int | None = None  # tensors that are rejected under the library's own preset, too

    @property
    def rejected(self) -> list[tuple[str, list[str]]]:
        """Case and tensors."""
        return [(r.case, [c.tensor for c in r.checks if c.status == "wrong"]) for r in self.report.wrong]

    def cell(self, feature: str) -> str:
        """The worst error of a feature in what holds, and how much of it is rejected."""
        results = self.report.features().get(feature, [])
        tested = [c for r in results for c in r.tested]
        if not tested:
            return "no"
        held = [c.worst for c in tested if c.status == "ok"]
        wrong = len(tested) - len(held)
        parts = [f"{max(held):.1f}"] if held else []
        return "; ".join(parts + ([f"{wrong} rejected"] if wrong else []))

    @property
    def refusals(self) -> list[str]:
        """What it does not support: keywords that it does not take, and its own words."""
        texts = dict.fromkeys(c.text for r in self.report.results for c in r.checks if c.status in ("not supported", "refused"))
        words = {*CANONICAL, *OWN_KEYWORDS, "dlse", "num_kv_heads", "lengths", "nonlinearity"}
        listed: dict[str, None] = {}
        for text in texts:
            parts = text.split(", ")
            own = re.sub(r"^\w+: ", "", text)  # without the name of what says so
            if "_to_torch: " in text:
                own = "parameters that torch's layout cannot hold"
            for part in parts if set(parts) <= words else [re.split(r"[.:] ", own.rstrip("."))[0]]:
                listed[part] = None
        return list(listed)

    @property
    def worst(self) -> float:
        return max((c.worst for r in self.report.results for c in r.tested if c.status == "ok"), default=0.0)


def version(library: str) -> str:
    """The installed version, or nothing."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def examined(name: str) -> Peer:
    """All cases, and the probes."""
    candidate = load(name)
    settings = Settings(power=False)
    report = Report(name, [examine(candidate, case, 0, settings) for case in CASES_OF[candidate.op]], candidate.op)
    peer = Peer(name, report, Probes(name).found if name in CALLS else {})
    if candidate.op == "attention":
        # The adapters speak npattn's words, so that of a preset only what is expected, or open, counts.
        convention = PRESETS[PRESET_OF[name]].convention
        said = {n: v for use in ("expected", "undefined") for n, v in convention.changes(use).items() if n != "dlse"}
        own = dataclasses.replace(candidate, convention=Convention(**said))
        wrong = [case for case in CASES_OF["attention"] if case.name in {r.case for r in report.wrong}]
        again = [examine(own, case, 0, settings) for case in wrong]
        peer.under_preset = sum(c.status == "wrong" for r in again for c in r.checks)
    return peer


def page(only: list[str], progress: Callable[[str], None]) -> str:
    """The page as Markdown; only: these built-in candidates and no others."""
    for name in only:
        if name not in PEERS:
            raise CandidateError(f"--only {name}: expected one of {', '.join(PEERS)}")
    names = only or list(PEERS)
    libraries = list(dict.fromkeys(PEERS[name].library for name in names))
    absent = [library for library in libraries if not version(library)]
    peers: list[Peer] = []
    for name in names:
        if PEERS[name].library not in absent:
            progress(name)
            peers.append(examined(name))
    shown = []
    for finding in FINDINGS:
        if finding.library in libraries and finding.library not in absent:
            progress(f"{finding.library}: {finding.title}")
            shown.append(show(finding))
    lines = [*_head(only, libraries, absent), *_summary(peers, shown), *_conventions(peers)]
    for library in libraries:
        own = [p for p in peers if PEERS[p.name].library == library]
        if own:
            lines += _library(library, own, [s for s in shown if s.finding.library == library])
    return "\n".join(lines).rstrip() + "\n"


def _head(only: list[str], libraries: list[str], absent: list[str]) -> Iterator[str]:
    command = "npattn peers" + "".join(f" --only {name}" for name in only)
    yield "# What the installed libraries do\n"
    yield f"Written by `{command}`. Every sentence below the first heading is a result of that run: of the cases"
    yield "of `npattn verify` (each figure), of small questions to each library in its own words (the conventions), and of code"
    yield "that was run as it stands here (the findings, with what it printed). An error counts in sigma, the rounding error"
    yield "that is predicted for an honest implementation in that element ([error-model.md](error-model.md)):"
    yield f"{GOOD_MAX:g} is the most that passes, and {GOOD_RMS:g} in the root mean square. Rejected: not as npattn defines it."
    yield "What a team may follow as a convention has a name there ([conventions.md](conventions.md)); what contradicts the"
    yield "library's own documentation, its other paths or arithmetic stands under Defects. All of it on the CPU, in float32"
    yield "but for the rows of float64.\n"
    installed = ", ".join(f"{n} {version(n)}" for n in ["numpy", *libraries] if version(n))
    yield f"Python {platform.python_version()}, {installed}."
    if absent:
        yield f"Not installed, and not on this page: {', '.join(absent)}."
    yield ""


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    yield _row(head)
    yield _row("---" for _ in head)
    for row in rows:
        yield _row(row)
    yield ""


def _summary(peers: list[Peer], shown: list[Shown]) -> Iterator[str]:
    yield "## Summary\n"
    rows = []
    for p in peers:
        held = sum(c.status == "ok" for r in p.report.results for c in r.tested)
        rows.append((
            f"`{p.name}`", PEERS[p.name].op, f"{held} of {p.report.tested}", f"{p.worst:.1f}",
            "-" if p.under_preset is None else p.under_preset, p.conventions.get("dead_out", "-"),
            agreement(p.name, p.conventions) if p.conventions else "-",
        ))  # fmt: skip
    head = [
        "candidate", "op", "tensors that hold", "largest error of these (sigma)", "rejected under its preset",
        "a query without keys", "its preset",
    ]  # fmt: skip
    yield from _table(head, rows)
    counts = {lib: [s for s in shown if s.finding.library == lib] for lib in dict.fromkeys(s.finding.library for s in shown)}
    yield from _table(["library", "defects", "edges that no specification settles"], (
        (f"{lib} {version(lib)}", *(sum(s.holds for s in found if s.finding.kind == kind) for kind in ("defect", "edge")))
        for lib, found in counts.items()
    ))  # fmt: skip


def _conventions(peers: list[Peer]) -> Iterator[str]:
    asked = [p for p in peers if p.conventions]
    if not asked:
        return
    yield "## Conventions\n"
    yield "Measured, each by one call. A dash: it has no argument for that, or returns nothing of the kind.\n"
    rows = []
    for name, values in FIELDS.items():
        if any(name in p.conventions for p in asked):
            rows.append([f"{name}: {values.meaning}", *(p.conventions.get(name, "-") for p in asked)])
    yield from _table(["convention", *(f"`{p.name}`" for p in asked)], rows)


def _library(library: str, peers: list[Peer], shown: list[Shown]) -> Iterator[str]:
    yield f"## {library} {version(library)}\n"
    for op in dict.fromkeys(p.report.op for p in peers):
        own = [p for p in peers if p.report.op == op]
        yield f"### {op}: what is supported, and the largest error in sigma\n"
        features = dict.fromkeys(f for p in own for f in p.report.features() if f != "conditions")
        rows = [[f, *(p.cell(f) for p in own)] for f in features]
        yield from _table(["feature", *(f"`{p.name}`" for p in own)], (r for r in rows if set(r[1:]) != {"no"}))
        for p in own:
            if p.refusals:
                yield f"- `{p.name}` does not support: {'; '.join(p.refusals)}."
            if p.rejected:
                cases = "; ".join(f"{case} ({', '.join(tensors)})" for case, tensors in p.rejected)
                yield f"- `{p.name}`, rejected in {len(p.rejected)} of {len(p.report.results)} cases: {cases}."
        yield ""
    if not shown:
        return
    yield "### Findings: the code before each of them\n"
    yield from _code(PRELUDES[library])
    for kind, title in (("defect", "Defects"), ("edge", "Edges that no specification settles")):
        found = [s for s in shown if s.finding.kind == kind and s.holds]
        if found:
            yield f"### {title}\n"
        for n, s in enumerate(found, 1):
            yield f"{n}. {s.finding.title}.\n"
            yield from _code(s.finding.code)
            yield from _code(s.printed, "text")
    gone = [s for s in shown if not s.holds]
    if gone:
        yield "### No longer so\n"
        for s in gone:
            yield f"- {s.finding.title}: this version prints another thing than the one in which it was found.\n"
            yield from _code(s.finding.code)
            yield from _code(s.printed, "text")


def _code(text: str, language: str = "python") -> Iterator[str]:
    yield f"```{language}\n{textwrap.dedent(text).strip()}\n```\n"
