"""Attention by everybody who is installed, each called as its users would, with its own arrays made before the clock starts.

An adapter is handed a case and its arrays, and returns a `Rival`; ImportError or NotImplementedError says why it cannot.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import npattn as na
from benchmarks.cases import Arrays, Case, truth
from benchmarks.harness import Array, Rival
from benchmarks.machine import free_memory, library, threads

NAMES = ("out", "dq", "dk", "dv")


def first(case: Case, arrays: Sequence[Array]) -> dict[str, Array]:
    """Of out, dq, dk, dv the heads that `truth` knows."""
    n = case.H // case.groups
    return {name: x[0, : n if name in ("out", "dq") else 1] for name, x in zip(NAMES, arrays, strict=False)}


def room(case: Case, copies: int) -> None:
    """For whoever makes arrays of all scores: copies of them, at the worst."""
    needed = copies * case.scores
    if needed > free_memory() / 2:
        raise NotImplementedError(f"its arrays of {case.L} x {case.keys} scores would need {needed / 2**30:.0f} GiB")


# --- npattn --------------------------------------------------------------------------------------------------------------


def of_npattn(name: str, attend: Any, forward: Any, backward: Any, case: Case, x: Arrays) -> Rival:
    mask = case.own_mask()

    def call() -> tuple[Array, ...]:
        if not case.backward:
            return (attend(x.q, x.k, x.v, mask=mask),)
        out, cache = forward(x.q, x.k, x.v, mask=mask)
        g = backward(x.dout, cache)
        return out, g.q, g.k, g.v

    return Rival(name, call, lambda found: first(case, found))


def blockwise(case: Case, x: Arrays) -> Rival:
    return of_npattn("blockwise", na.blockwise, na.blockwise_forward, na.blockwise_backward, case, x)


def dense(case: Case, x: Arrays) -> Rival:
    room(case, 8 if case.backward else 5)
    return of_npattn("dense", na.attention, na.attention_forward, na.attention_backward, case, x)


# --- torch ---------------------------------------------------------------------------------------------------------------


def torch(backend: str) -> Callable[[Case, Arrays], Rival]:
    """scaled_dot_product_attention by one of its backends for a CPU, and its autograd."""

    def make(case: Case, x: Arrays) -> Rival:
        t = library("torch")
        t.set_num_threads(threads())
        if backend == "math":
            room(case, 8 if case.backward else 4)
        q, k, v, dout = (t.from_numpy(a) for a in x)
        for leaf in (q, k, v) if case.backward else ():
            leaf.requires_grad_(True)
        sdpa, grouped = t.nn.functional.scaled_dot_product_attention, case.groups != case.H
        mask = None
        if case.mask == "window":
            mask = t.from_numpy(np.array(case.allowed(slice(None))))
        elif case.mask == "lengths":
            mask = t.from_numpy((np.arange(case.keys) < case.lengths()[:, None])[:, None, None])

        def attend() -> Any:
            if case.mask == "packed":  # it has no packed batches on a CPU: a sequence at a time, as who knows that would
                ends = case.ends().tolist()
                parts = [
                    sdpa(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], is_causal=True, enable_gqa=grouped)
                    for a, b in itertools.pairwise(ends)
                    if a < b
                ]
                return t.cat(parts, dim=-2)
            return sdpa(q, k, v, attn_mask=mask, is_causal=case.mask == "causal", enable_gqa=grouped)

        def call() -> Any:
            if case.backward:
                out = attend()
                return out, *t.autograd.grad(out, (q, k, v), dout)
            with t.no_grad():
                return (attend(),)

        def before() -> None:
            t.backends.cuda.enable_flash_sdp(backend == "flash")  # the switches of the CPU's backends, too
            t.backends.cuda.enable_math_sdp(backend == "math")

        return Rival(f"torch {backend}", call, lambda f: first(case, [a.detach().numpy() for a in f]), before=before)

    return make


# --- jax -----------------------------------------------------------------------------------------------------------------


def jax(case: Case, x: Arrays) -> Rival:
    """jax.nn.dot_product_attention, compiled, and its vjp. Its layout is (B, L, H, D)."""
    j = library("jax")
    room(case, 6 if case.backward else 4)
    attention: Any = j.nn.dot_product_attention
    wide = case.dtype == "float64"
    with j.enable_x64(wide):
        q, k, v, dout = (j.numpy.asarray(np.ascontiguousarray(a.swapaxes(1, 2))) for a in x)
        options: dict[str, Any] = {"is_causal": case.mask == "causal"}
        given: dict[str, Any] = {}
        if case.mask == "window":
            options |= {"local_window_size": (case.width - 1, 0)}
        elif case.mask == "lengths":
            given = {"key_value_seq_lengths": j.numpy.asarray(case.lengths().astype(np.int32))}
        elif case.mask == "packed":
            given = {"mask": j.numpy.asarray(np.array(case.allowed(slice(None)))[None, None])}

        def forward(q: Any, k: Any, v: Any, dout: Any, given: Any) -> Any:
            return (attention(q, k, v, **given, **options),)

        def both(q: Any, k: Any, v: Any, dout: Any, given: Any) -> Any:
            out, pull = j.vjp(lambda *leaves: attention(*leaves, **given, **options), q, k, v)
            return out, *pull(dout)

        compiled = j.jit(both if case.backward else forward).lower(q, k, v, dout, given).compile()

    def call() -> Any:
        with j.enable_x64(wide):
            return j.block_until_ready(compiled(q, k, v, dout, given))

    return Rival("jax", call, lambda found: first(case, [np.asarray(a).swapaxes(1, 2) for a in found]))


# --- onnxruntime ---------------------------------------------------------------------------------------------------------


def session(op: str, inputs: Mapping[str, Array], outputs: Sequence[str], attributes: Mapping[str, Any], opset: int) -> Any:
    """A session of one node with as many threads as all others have, none of which spins, and its bound inputs."""
    ort, onnx = library("onnxruntime"), library("onnx")
    helper = onnx.helper

    def value(name: str, dtype: Any) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)

    dtype = next(iter(inputs.values())).dtype
    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), list(outputs), **attributes)], op,
        [value(n, x.dtype) for n, x in inputs.items()], [value(n, dtype) for n in outputs if n],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it refuses is raised, too
    options.intra_op_num_threads = threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    bound = made.io_binding()
    for name, x in inputs.items():
        bound.bind_cpu_input(name, np.ascontiguousarray(x))
    for name in outputs:
        if name:
            bound.bind_output(name, "cpu")
    return made, bound


def onnxruntime(case: Case, x: Arrays) -> Rival:
    """The operator Attention, version 24."""
    library("onnxruntime")
    if case.backward:
        raise NotImplementedError("onnxruntime has no backward of Attention")
    room(case, 4)
    inputs = {"Q": x.q, "K": x.k, "V": x.v}
    if case.mask in ("window", "lengths", "packed"):
        batches = range(case.B if case.mask == "lengths" else 1)
        inputs["attn_mask"] = np.stack([np.array(case.allowed(slice(None), b)) for b in batches])[:, None]
    made, bound = session("Attention", inputs, ("Y",), {"is_causal": int(case.mask == "causal")}, 24)

    def call() -> Any:
        made.run_with_iobinding(bound)
        return bound

    return Rival("onnxruntime", call, lambda b: first(case, b.copy_outputs_to_cpu()))


ADAPTERS: dict[str, Callable[[Case, Arrays], Rival]] = {
    "blockwise": blockwise,
    "dense": dense,
    "torch flash": torch("flash"),
    "torch math": torch("math"),
    "jax": jax,
    "onnxruntime": onnxruntime,
}
TORCH = ("torch flash", "torch math")


def attention(
    case: Case, x: Arrays, names: Sequence[str] | None = None, checked: bool = True
) -> tuple[list[Rival], dict[str, str]]:
    """Everybody who can, and why the others cannot."""
    found, left_out = list[Rival](), dict[str, str]()
    expected = truth(case) if checked else None
    for name in names or ADAPTERS:
        try:
            rival = ADAPTERS[name](case, x)
        except ImportError as error:
            left_out[name] = f"absent: {error}"
        except NotImplementedError as error:
            left_out[name] = f"cannot: {error}"
        except Exception as error:  # of a library that refuses the case
            left_out[name] = f"cannot: {(str(error).strip().splitlines() or [type(error).__name__])[0][:160]}"
        else:
            found.append(Rival(rival.name, rival.call, rival.result, expected, rival.before))
    return found, left_out
