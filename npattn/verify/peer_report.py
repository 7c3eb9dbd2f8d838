"""The page about the installed libraries: what they support, their conventions, how exact they are, and their defects.

Every figure and every printed line of it is a result of the run that writes it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import npattn
from npattn._checks import Array
from npattn.verify.candidates import Candidate, CandidateError, load
from npattn.verify.cases import CASES
from npattn.verify.conventions import PRESETS
from npattn.verify.judge import call_backward, call_forward
from npattn.verify.peers import PEERS
from npattn.verify.report import Report, verify

# (library, what is shown, plain code of that library). Run when the page is written; what it prints stands beside it.
DEFECTS: list[tuple[str, str, str]] = [
    ("torch", "NaN in a value that is masked reaches the output, as 0 * NaN", """\
import torch
q, v = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 2, 4); v[..., 1, :] = torch.nan
print(torch.nn.functional.scaled_dot_product_attention(q, v.nan_to_num(), v, attn_mask=torch.tensor([[True, False]])))"""),
    ("torch", "nn.MultiheadAttention: a query without keys gives NaN, 0 and NaN on its three paths", """\
import torch; torch.manual_seed(0); x, dead = torch.ones(1, 2, 4), torch.tensor([[True, True], [False, False]])
m = torch.nn.MultiheadAttention(4, 2, batch_first=True).eval(); fast = torch.no_grad()(m)
print([f(x, x, x, attn_mask=dead, need_weights=w)[0][0, 0, 0].item() for f, w in ((m, True), (m, False), (fast, False))])"""),
    ("jax", "a query without keys gives the mean of all values, lse -2.4e38, and passes its gradient to them", """\
import jax; q, v = jax.numpy.ones((1, 1, 1, 2)), jax.numpy.array([[[[1.0, 0]], [[3.0, 0]]]])
attend = lambda v: jax.nn.dot_product_attention(q, v, v, mask=jax.numpy.zeros((1, 1, 1, 2), bool), return_residual=True)
print(attend(v)[0][0, 0, 0, 0], attend(v)[1][0, 0, 0], jax.grad(lambda v: attend(v)[0].sum())(v)[0, :, 0, 0])"""),
    ("jax", "the same query is NaN where a bias of -inf masks", """\
import jax; q = jax.numpy.ones((1, 1, 1, 2))
print(jax.nn.dot_product_attention(q, q, q, bias=jax.numpy.full((1, 1, 1, 1), -jax.numpy.inf)))"""),
    ("jax", "the softmax of float64 inputs is computed in float32", """\
import jax, numpy as np; x = np.random.default_rng(0).standard_normal((1, 5, 1, 8))
with jax.enable_x64(True): out = np.asarray(jax.nn.dot_product_attention(x, x, x))[0, :, 0]
s = x[0, :, 0] @ x[0, :, 0].T / 8**0.5; p = np.exp(s); print(abs(out - p / p.sum(1, keepdims=True) @ x[0, :, 0]).max())"""),
    ("jax", "float16 works eagerly and raises under jit on the CPU", """\
import jax, numpy as np; x = np.ones((1, 2, 1, 4), np.float16); print(jax.nn.dot_product_attention(x, x, x).dtype)
try: print(jax.jit(jax.nn.dot_product_attention)(x, x, x).dtype)
except Exception as error: print(type(error).__name__, str(error)[:90])"""),
    ("onnx", "the reference of Attention takes the root of the scale: a negative scale gives NaN", """\
import numpy as np, warnings; from onnx.reference.ops.op_attention import _compute_attention
x = np.ones((1, 1, 2, 4), np.float32); warnings.simplefilter("ignore")
print(_compute_attention(x, x, x, scale=-0.5)[0].ravel()[:3])"""),
    ("onnx", "the reference of RNN ignores sequence_lens: the second step of a sequence of length 1 is not 0", """\
import numpy as np; from onnx import helper as h; from onnx.reference import ReferenceEvaluator as R
n = h.make_node("RNN", ["X", "W", "R", "", "n"], ["Y"], hidden_size=1); x = np.ones((2, 1, 1), np.float32)
names = ("X", "W", "R", "n"); kinds = (1, 1, 1, 6); vi = h.make_tensor_value_info
g = h.make_graph([n], "g", [vi(i, k, None) for i, k in zip(names, kinds)], [vi("Y", 1, None)])
given = dict(zip(names, (x, x[:1], x[:1], np.array([1], np.int32)))); print(R(h.make_model(g)).run(None, given)[0].ravel())"""),
    ("onnxruntime", "tanh inside RNN loses relative precision near 0 (with one input, weight 1: the error of tanh(0.001))", """\
import numpy as np, onnxruntime as ort; from onnx import helper as h; vi = h.make_tensor_value_info
n = h.make_node("RNN", ["X", "W", "R"], ["Y"], hidden_size=1); names = ("X", "W", "R")
g = h.make_graph([n], "g", [vi(i, 1, None) for i in names], [vi("Y", 1, None)]); one = np.ones((1, 1, 1), np.float32)
m = h.make_model(g, opset_imports=[h.make_opsetid("", 22)], ir_version=10).SerializeToString()
y = ort.InferenceSession(m, providers=["CPUExecutionProvider"]).run(None, dict(zip(names, (0.001 * one, one, 0 * one))))[0]
print(abs(y.item() / np.tanh(np.float64(np.float32(0.001))) - 1))"""),
    ("transformers", "eager attention masks with finfo.min: a query without keys gives the mean of all values", """\
import torch; from types import SimpleNamespace as N
from transformers.models.llama.modeling_llama import eager_attention_forward
v = torch.tensor([[[[1.0], [3.0]]]]); low = torch.full((1, 1, 2, 2), torch.finfo(torch.float32).min)
print(eager_attention_forward(N(num_key_value_groups=1, training=False), v, v, v, low, scaling=1.0)[0].ravel())"""),
]  # fmt: skip


def version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def page(only: list[str], progress: Callable[[str], None]) -> str:
    """The page as Markdown; ``only``: these built-in candidates alone. Raises CandidateError for a name that is none."""
    unknown = [name for name in only if name not in PEERS]
    if unknown:
        raise CandidateError(f"--only {unknown[0]}: no such peer, expected one of {', '.join(PEERS)}")
    names = only or list(PEERS)
    reports: dict[str, Report] = {}
    candidates: dict[str, Candidate] = {}
    for name in names:
        progress(f"{name} ...")
        with contextlib.suppress(CandidateError):
            candidates[name] = load(name)
            reports[name] = verify(candidates[name])
    libraries = dict.fromkeys(PEERS[name].library for name in names)
    lines = [
        "# What the installed libraries do", "",
        "Written by `npattn peers --write docs/peers.md`: every figure, and what each piece of code prints, is a result of "
        "that run. sigma is the rounding error that is predicted for an honest implementation in the inputs' precision "
        "([error-model.md](error-model.md)); what is called wrong is wrong by npattn's conventions "
        "([conventions.md](conventions.md)), which not every library shares.", "",
        f"npattn {npattn.__version__}, NumPy {np.__version__}, "
        + ", ".join(f"{library} {version(library) or '(absent)'}" for library in libraries) + ".", "",
        "| candidate | tensors tested | wrong cases | worst error of what holds (sigma) | dead row: out, lse, gradients |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, report in reports.items():
        worst = max((c.worst for r in report.results for c in r.tested if c.status == "ok"), default=0.0)
        dead = dead_row(candidates[name]) if report.op == "attention" else ""
        lines.append(f"| {name} | {report.tested} | {len(report.wrong)} of {len(report.results)} | {worst:.1f} | {dead} |")
    for name, report in reports.items():
        lines += ["", *_section(name, report)]
    lines += ["", "## Defects, in plain code of the library", ""]
    for library, text, code in DEFECTS:
        if library in libraries and version(library):
            progress(f"{library}: {text}")
            lines += [
                f"**{library} {version(library)}**: {text}",
                "",
                "```python",
                code,
                "```",
                "```",
                printed(code),
                "```",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def dead_row(candidate: Candidate) -> str:
    """What a query that may see no key gets."""
    case = next(c for c in CASES if c.name == "dead rows")
    problem = case.problem(0)
    forward = call_forward(candidate, problem)
    if forward.status:
        return forward.text[:60]
    backward = call_backward(candidate, problem, forward.values)
    words = [_said(forward.values["out"][:, :, 1], problem.v.mean(-2))]
    words.append(_said(forward.values["lse"][:, :, 1]) if "lse" in forward.values else "no lse")
    words.append(f"dq {_said(backward.values['dq'][:, :, 1])}" if "dq" in backward.values else "no gradients")
    return ", ".join(words)


def _said(x: Array, mean: Array | None = None) -> str:
    if np.isnan(x).all():
        return "NaN"
    if not x.any():
        return "0"
    if mean is not None and np.allclose(x, mean, atol=1e-5):
        return "mean of v"
    return f"{x.ravel()[0]:.3g}"


def _section(name: str, report: Report) -> list[str]:
    peer = PEERS[name]
    lines = [
        f"## {name}",
        "",
        f"{peer.library} {version(peer.library)}, op {peer.op}: tested {report.tested} of {report.total} tensors.",
    ]
    untested = dict.fromkeys(
        word for r in report.results for c in r.checks if c.status == "not supported" for word in c.text.split(", ")
    )
    if untested:
        lines.append(f"Not supported: {', '.join(untested)}.")
    matching = [p for p, preset in PRESETS.items() if p.startswith(name.replace("-", "_")) and preset.source.startswith("run")]
    if matching:
        changes = PRESETS[matching[0]].convention.changes()
        lines.append(f"Its preset is `{matching[0]}`: {', '.join(f'{n}={v}' for n, v in changes.items()) or 'as npattn'}.")
    if report.wrong:
        lines += ["", "| case | what is wrong |", "|---|---|"]
        for r in report.wrong:
            text = "; ".join(e.text for e in r.explanations) or next(c.text for c in r.checks if c.status == "wrong")
            lines.append(f"| {r.case} | {text.replace('|', '/')[:200]} |")
    lines += ["", "| feature | worst error (sigma) |", "|---|---|"]
    for feature, results in report.features().items():
        held = [c.worst for r in results for c in r.tested if c.status == "ok" and math.isfinite(c.worst)]
        if held:
            lines.append(f"| {feature} | {max(held):.1f} |")
    return lines


def printed(code: str) -> str:
    """What a piece of code prints, or how it fails."""
    out = io.StringIO()
    scope: dict[str, Any] = {"__name__": "defect"}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            exec(compile(code, "defect", "exec"), scope)
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    return out.getvalue().strip()
