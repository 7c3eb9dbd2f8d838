"""Built-in candidates from installed libraries, by name: each a loader of (forward, backward or None).

An adapter translates representation only: layout, polarity of masks, tensors, names. It repairs no value: what the library
does is what is judged. What a library has no argument for is not in the signature, or is a NotImplementedError with the
reason. Libraries are imported when a candidate is loaded; a missing one is an ImportError that says what to install.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from npattn.ops.checks import Array

Function = Callable[..., Any]
Pair = tuple[Function, Function | None]


@dataclass(frozen=True)
class Peer:
    op: str  # "attention", "multi_head", "rnn" or "softmax"
    load: Callable[[], Pair]
    library: str


def _module(name: str) -> Any:
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or library).partition(".")[0]
        raise ImportError(f"{missing} is not installed: pip install npattn[peers], or {missing} alone") from error


def _rank_4(q: Array, where: str) -> None:
    if q.ndim != 4:
        raise NotImplementedError(f"{where} takes inputs of rank 4")


# --- attention: torch ----------------------------------------------------------------------------------------------------


def _tensor(torch: Any, x: Any, gradients: bool = False) -> Any:
    """A copy as a tensor, which an input of ours stays apart from; None stays None."""
    return None if x is None else torch.tensor(np.ascontiguousarray(x), requires_grad=gradients)


def _gradients(names: tuple[str, ...], leaves: tuple[Any, ...]) -> dict[str, Any]:
    return {n: x.grad.numpy() for n, x in zip(names, leaves, strict=True) if x is not None and x.grad is not None}


_switches = threading.Lock()  # of torch's backends, which are those of the process: one thread at a time turns them


def _torch(backend: str | None = None) -> Pair:
    """torch.nn.functional.scaled_dot_product_attention, by the backend that torch chooses or by one of SDPBackend."""
    torch = _module("torch")

    def attend(*args: Any, **kwargs: Any) -> Any:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        if backend is None:
            return sdpa(*args, **kwargs)
        choice = torch.nn.attention
        forced = choice.sdpa_kernel(getattr(choice.SDPBackend, backend))
        with _switches, warnings.catch_warnings(record=True) as reasons, forced:
            warnings.simplefilter("always")  # torch warns why a backend cannot be used, then raises
            try:
                return sdpa(*args, **kwargs)
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                told = [str(w.message).partition(" (Triggered")[0] for w in reasons]
                told = [text for text in told if not text.endswith("because:")]
                raise NotImplementedError("; ".join(told) or f"torch has no {backend} kernel for this call") from error

    def run(q: Array, k: Array, v: Array, mask: Any, bias: Any, scale: Any, causal: bool, gradients: bool) -> Any:
        leaves = tuple(_tensor(torch, x, gradients) for x in (q, k, v, bias))
        attn_mask, whole = _tensor(torch, mask), mask is None and bias is None
        if causal and not whole:  # torch takes is_causal or attn_mask, not both
            lower = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
            attn_mask = lower if attn_mask is None else attn_mask & lower
        if bias is not None:
            attn_mask = leaves[3] if attn_mask is None else torch.where(attn_mask, leaves[3], -torch.inf)
        grouped = q.ndim > 2 and q.shape[-3] != k.shape[-3]
        out = attend(*leaves[:3], attn_mask=attn_mask, is_causal=causal and whole, scale=scale, enable_gqa=grouped)
        return out, leaves

    def forward(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, causal: bool = False
    ) -> Any:
        return run(q, k, v, mask, bias, scale, causal, False)[0].numpy()

    def backward(
        dout: Array, q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None,
        causal: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        out, leaves = run(q, k, v, mask, bias, scale, causal, True)
        out.backward(_tensor(torch, dout))
        return _gradients(("dq", "dk", "dv", "dbias"), leaves)

    return forward, backward


def _torch_flex() -> Pair:
    """flex_attention, not compiled: masks by mask_mod, softcap and bias by score_mod. On a CPU it has no backward."""
    torch, flex = _module("torch"), _module("torch.nn.attention.flex_attention")

    def forward(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None
    ) -> Any:
        _rank_4(q, "flex_attention")
        shape = (*q.shape[:-1], k.shape[-2])
        if 0 in shape:
            raise NotImplementedError("flex_attention makes no block mask without elements")
        tq, tk, tv, seen, added = (_tensor(torch, x) for x in (q, k, v, mask, bias))
        seen, added = (None if x is None else x.expand(shape) for x in (seen, added))

        def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return score if added is None else score + added[b, h, i, j]

        block_mask = None
        if seen is not None:
            block_mask = flex.create_block_mask(lambda b, h, i, j: seen[b, h, i, j], *shape, device="cpu")
        with _switches:
            before = flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
            flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # else it compiles for each shape, also when called eagerly
            try:
                out, aux = flex.flex_attention(
                    tq, tk, tv, score_mod=None if softcap is None and added is None else score_mod, block_mask=block_mask,
                    scale=scale, enable_gqa=q.shape[1] != k.shape[1], return_aux=flex.AuxRequest(lse=True),
                )  # fmt: skip
            finally:
                flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before
        return out.numpy(), aux.lse.numpy()

    return forward, None


def _transformers(model: str) -> Pair:
    """The eager attention of a model of transformers, called as its layers call it: masks are finfo.min, added.

    That of Gemma 2 is Llama's with a softcap; that of gpt-oss has a sink.
    """
    torch = _module("torch")
    eager = _module(f"transformers.models.{model}.modeling_{model}").eager_attention_forward

    def run(
        q: Array, k: Array, v: Array, mask: Any, bias: Any, scale: Any, sink: Any, options: dict[str, Any], gradients: bool
    ) -> Any:
        _rank_4(q, "eager_attention_forward")
        leaves = tuple(_tensor(torch, x, gradients) for x in (q, k, v, bias, sink))
        tq, tk, tv, added, sinks = leaves
        if mask is not None:
            low = torch.where(_tensor(torch, mask), torch.zeros((), dtype=tq.dtype), torch.finfo(tq.dtype).min)
            added = low if added is None else added + low
        layer = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False, sinks=sinks)
        scaling = q.shape[-1] ** -0.5 if scale is None else scale
        return eager(layer, tq, tk, tv, added, scaling=scaling, **options)[0].transpose(1, 2), leaves

    def forward(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None
    ) -> Any:
        return run(q, k, v, mask, bias, scale, None, {"softcap": softcap}, False)[0].numpy()

    def backward(
        dout: Array, q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None,
        softcap: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        out, leaves = run(q, k, v, mask, bias, scale, None, {"softcap": softcap}, True)
        out.backward(_tensor(torch, dout))
        return _gradients(("dq", "dk", "dv", "dbias", "dsink"), leaves)

    def forward_sink(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, sink: Any = None
    ) -> Any:
        _has_sink(sink)
        return run(q, k, v, mask, bias, scale, sink, {}, False)[0].numpy()

    def backward_sink(
        dout: Array, q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, sink: Any = None
    ) -> dict[str, Any]:
        _has_sink(sink)
        out, leaves = run(q, k, v, mask, bias, scale, sink, {}, True)
        out.backward(_tensor(torch, dout))
        return _gradients(("dq", "dk", "dv", "dbias", "dsink"), leaves)

    return (forward_sink, backward_sink) if model == "gpt_oss" else (forward, backward)


def _has_sink(sink: Any) -> None:
    if sink is None:
        raise NotImplementedError("the attention of gpt-oss always has a sink")


# --- attention: jax, ONNX ------------------------------------------------------------------------------------------------


def _jax() -> Pair:
    """jax.nn.dot_product_attention, compiled for each shape; its layout is (B, L, H, D), and lse (B, L, H)."""
    jax = _module("jax")

    def attend(q: Any, k: Any, v: Any, bias: Any, mask: Any, lengths: Any, **options: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, bias, mask, key_value_seq_lengths=lengths, return_residual=True, **options)

    def pull(dout: Any, q: Any, k: Any, v: Any, bias: Any, mask: Any, lengths: Any, **options: Any) -> Any:
        def out(q: Any, k: Any, v: Any, bias: Any) -> Any:
            return attend(q, k, v, bias, mask, lengths, **options)[0]

        return jax.vjp(out, q, k, v, bias)[1](dout)

    static = ("scale", "is_causal", "local_window_size")
    compiled = {f: jax.jit(f, static_argnames=static) for f in (attend, pull)}

    def run(function: Any, arrays: list[Array], bias: Any, mask: Any, scale: Any, causal: Any, window: Any, n: Any) -> Any:
        q, k, v = arrays[-3:]
        _rank_4(q, "jax.nn.dot_product_attention")
        if v.shape[-1] != q.shape[-1]:
            raise NotImplementedError("jax.nn.dot_product_attention has one width for q, k and v")
        if window is not None:  # no limit is a window that holds all
            window = tuple(max(q.shape[-2], k.shape[-2]) if side is None else int(side) for side in window)
        options = {"scale": scale, "is_causal": causal, "local_window_size": window}
        lengths = None if n is None else np.asarray(n, np.int32)
        chosen = function if q.dtype == np.float16 else compiled[function]  # float16 cannot be compiled for a CPU
        with jax.enable_x64(bool(q.dtype == np.float64)):
            result = chosen(*(np.swapaxes(x, 1, 2) for x in arrays), bias, mask, lengths, **options)
            return [None if x is None else np.array(x) for x in result]

    def forward(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, causal: bool = False,
        window: Any = None, key_lengths: Any = None,
    ) -> Any:  # fmt: skip
        out, lse = run(attend, [q, k, v], bias, mask, scale, causal, window, key_lengths)
        return np.swapaxes(out, 1, 2), np.swapaxes(lse, 1, 2)

    def backward(
        dout: Array, q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None,
        causal: bool = False, window: Any = None, key_lengths: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        dq, dk, dv, dbias = run(pull, [dout, q, k, v], bias, mask, scale, causal, window, key_lengths)
        return {"dq": np.swapaxes(dq, 1, 2), "dk": np.swapaxes(dk, 1, 2), "dv": np.swapaxes(dv, 1, 2), "dbias": dbias}

    return forward, backward


@cache
def _node(
    op: str, inputs: tuple[tuple[str, str], ...], outputs: tuple[str, ...], attributes: tuple[Any, ...], opset: int
) -> Any:
    """A model of one node: inputs are (name, dtype), in the order of the operator, "" for one that is left out."""
    onnx = _module("onnx")
    helper, code = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        [helper.make_node(op, [name for name, _ in inputs], outputs, **dict(attributes))],
        op,
        [helper.make_tensor_value_info(name, code(np.dtype(dtype)), None) for name, dtype in inputs if name],
        [helper.make_tensor_value_info(name, code(np.dtype(inputs[0][1])), None) for name in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@cache
def _reference(*node: Any) -> Any:
    return _module("onnx.reference").ReferenceEvaluator(_node(*node))


@cache
def _session(*node: Any) -> Any:
    ort = _module("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it refuses is raised, too
    try:
        return ort.InferenceSession(_node(*node).SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise
        raise NotImplementedError(f"onnxruntime has no kernel for {node[0]} of {node[1][0][1]}") from error


def _run(engine: Any, op: str, slots: dict[str, Any], outputs: tuple[str, ...], attributes: dict[str, Any], opset: int) -> Any:
    """The outputs of a node; the slots are the operator's inputs in order, None for one that is left out."""
    while slots[last := list(slots)[-1]] is None:
        del slots[last]
    inputs = tuple((name, str(x.dtype)) if x is not None else ("", "") for name, x in slots.items())
    node = engine(op, inputs, outputs, tuple((name, x) for name, x in attributes.items() if x is not None), opset)
    with np.errstate(all="ignore"):
        return node.run(None, {name: np.ascontiguousarray(x) for name, x in slots.items() if x is not None})


def _onnx_attention(engine: Any, opset: int, q: Array, k: Array, v: Array, mask: Any, bias: Any, **attributes: Any) -> Any:
    _rank_4(q, "Attention without q_num_heads")
    if bias is not None:  # the operator has one input for both
        mask = bias if mask is None else np.where(mask, bias, bias.dtype.type(-np.inf))
    if mask is not None:  # a last axis of size 1 would not be broadcast, but filled up with -inf
        mask = np.broadcast_to(mask, (*mask.shape[:-2], q.shape[-2], k.shape[-2]))
    (out,) = _run(engine, "Attention", {"Q": q, "K": k, "V": v, "attn_mask": mask}, ("Y",), attributes, opset)
    return np.array(out)


def _onnx() -> Pair:
    """The reference evaluator of onnx, Attention in its newest version."""
    _module("onnx.reference")
    opset = _module("onnx").defs.onnx_opset_version()

    def forward(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None,
        causal: bool = False, window: Any = None,
    ) -> Any:  # fmt: skip
        left, right = (None, None) if window is None else window
        return _onnx_attention(
            _reference, opset, q, k, v, mask, bias, scale=scale, softcap=softcap, is_causal=int(causal),
            left_window_size=left, right_window_size=right,
        )  # fmt: skip

    return forward, None


def _onnxruntime() -> Pair:
    """onnxruntime on the CPU, Attention-24: for Attention-25, with windows, it has no kernel and expands the operator."""
    _module("onnxruntime")
    _module("onnx")

    def forward(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None,
        causal: bool = False,
    ) -> Any:  # fmt: skip
        try:
            return _onnx_attention(
                _session, 24, q, k, v, mask, bias, scale=scale, softcap=softcap, is_causal=int(causal)
            )  # fmt: skip
        except Exception as error:
            if "must be greater than 0" not in str(error):  # so it says of the scale, and of empty axes
                raise
            raise NotImplementedError(f"onnxruntime: {str(error).rpartition('was false. ')[2].strip()}") from error

    return forward, None


# --- multi-head attention ------------------------------------------------------------------------------------------------


def _torch_state(torch: Any, state: Mapping[str, Any], gradients: bool = False) -> dict[str, Any]:
    arrays = {n: np.asarray(x.detach() if hasattr(x, "detach") else x) for n, x in state.items() if x is not None}
    return {n: _tensor(torch, x, gradients) for n, x in arrays.items()}


def _dropped(torch: Any, mask: Any, batch: int, heads: int) -> Any:
    """A mask that is True where a key may be attended to, as torch's: True where it is dropped, (L, S) or (B H, L, S)."""
    if mask is None:
        return None
    if mask.ndim == 4:
        mask = np.broadcast_to(mask, (batch, heads, *mask.shape[2:])).reshape(batch * heads, *mask.shape[2:])
    return ~_tensor(torch, mask)


def _torch_mha(weights: bool) -> Pair:
    """torch.nn.functional.multi_head_attention_forward, without or with the weights, which is another code path."""
    torch = _module("torch")

    def run(x: tuple[Array, ...], state: Mapping[str, Any], num_heads: int, mask: Any, gradients: bool) -> Any:
        if x[0].ndim != 3:
            raise NotImplementedError("the adapter takes (B, L, M)")
        inputs, p = [_tensor(torch, a, gradients) for a in x], _torch_state(torch, state, gradients)
        shape = (x[0].shape[1], x[1].shape[1])
        whole = None if mask is None else np.broadcast_to(mask, (*mask.shape[:-2], *shape))
        out, _ = torch.nn.functional.multi_head_attention_forward(
            *(a.transpose(0, 1) for a in inputs), x[0].shape[-1], num_heads, p.get("in_proj_weight"), p.get("in_proj_bias"),
            p.get("bias_k"), p.get("bias_v"), False, 0.0, p["out_proj.weight"], p.get("out_proj.bias"), training=False,
            need_weights=weights, attn_mask=_dropped(torch, whole, len(x[0]), num_heads), average_attn_weights=False,
            use_separate_proj_weight="in_proj_weight" not in p,
            **{f"{n}_proj_weight": p.get(f"{n}_proj_weight") for n in "qkv"},
        )  # fmt: skip
        return out.transpose(0, 1), inputs, p

    def forward(x_q: Array, x_k: Array, x_v: Array, state_dict: Mapping[str, Any], *, num_heads: int, mask: Any = None) -> Any:
        return run((x_q, x_k, x_v), state_dict, num_heads, mask, False)[0].numpy()

    def backward(
        dout: Array, x_q: Array, x_k: Array, x_v: Array, state_dict: Mapping[str, Any], *, num_heads: int, mask: Any = None
    ) -> dict[str, Any]:
        out, inputs, p = run((x_q, x_k, x_v), state_dict, num_heads, mask, True)
        out.backward(_tensor(torch, dout))
        state = _gradients(tuple(p), tuple(p.values()))
        return {**_gradients(("dx_q", "dx_k", "dx_v"), tuple(inputs)), "state_dict": state}

    return forward, backward


def _torch_mha_fast() -> Pair:
    """nn.MultiheadAttention in eval mode, which has a fast path of its own for self-attention."""
    torch = _module("torch")

    def forward(x_q: Array, x_k: Array, x_v: Array, state_dict: Mapping[str, Any], *, num_heads: int, mask: Any = None) -> Any:
        p = _torch_state(torch, state_dict)
        same = all(x is x_q or np.array_equal(x, x_q, equal_nan=True) for x in (x_k, x_v))
        for given, needed in (
            (x_q.ndim == 3, "inputs (B, L, M)"),
            (same, "self-attention: x_q, x_k and x_v the same"),
            (num_heads % 2 == 0, "an even number of heads"),
            ("in_proj_weight" in p and "in_proj_bias" in p, "in_proj_weight and in_proj_bias"),
        ):
            if not given:
                raise NotImplementedError(f"the fast path of nn.MultiheadAttention needs {needed}")
        x = _tensor(torch, x_q)
        layer = torch.nn.MultiheadAttention(x.shape[-1], num_heads, batch_first=True, dtype=x.dtype)
        layer.load_state_dict(p)
        whole = None if mask is None else np.broadcast_to(mask, (*mask.shape[:-2], x.shape[1], x.shape[1]))
        dropped = _dropped(torch, whole, x.shape[0], num_heads)
        with torch.no_grad():
            return layer.eval()(x, x, x, need_weights=False, attn_mask=dropped)[0].numpy()

    return forward, None


# --- recurrent networks --------------------------------------------------------------------------------------------------


def _torch_rnn() -> Pair:
    """torch.nn.RNN, one layer forwards; lengths by a PackedSequence."""
    torch = _module("torch")

    def run(x: Array, h0: Any, state: Mapping[str, Any], lengths: Any, nonlinearity: str, gradients: bool) -> Any:
        B, T, M = x.shape
        if not B or not T:
            raise NotImplementedError("nn.RNN takes no empty batch or sequence")
        if lengths is not None and not (np.asarray(lengths) > 0).all():
            raise NotImplementedError("a PackedSequence has no sequence of length 0")
        p = _torch_state(torch, state)
        if any("_l0" not in name or "reverse" in name for name in p):
            raise NotImplementedError("the adapter takes one layer, forwards")
        tx, th = (_tensor(torch, a, gradients) for a in (x, h0))
        bias, N = "bias_ih_l0" in p, p["weight_hh_l0"].shape[0]
        layer = torch.nn.RNN(M, N, nonlinearity=nonlinearity, bias=bias, batch_first=True, dtype=tx.dtype)
        layer.load_state_dict(p)
        layer.requires_grad_(gradients)
        packs, given = torch.nn.utils.rnn, tx
        if lengths is not None:
            n = torch.tensor(np.asarray(lengths, np.int64))
            given = packs.pack_padded_sequence(tx, n, batch_first=True, enforce_sorted=False)
        h, last = layer(given, None if th is None else th[None])
        if lengths is not None:
            h, _ = packs.pad_packed_sequence(h, batch_first=True, total_length=T)
        return h, last[0], tx, th, dict(layer.named_parameters())

    def forward(x: Array, h0: Any, state_dict: Mapping[str, Any], *, lengths: Any = None, nonlinearity: str = "tanh") -> Any:
        h, last, *_ = run(x, h0, state_dict, lengths, nonlinearity, False)
        return h.numpy(), last.numpy().copy()  # the last state is a view of h where there is one step

    def backward(
        dh: Array, x: Array, h0: Any, state_dict: Mapping[str, Any], *, dh_last: Any = None, lengths: Any = None,
        nonlinearity: str = "tanh",
    ) -> dict[str, Any]:  # fmt: skip
        h, last, tx, th, p = run(x, h0, state_dict, lengths, nonlinearity, True)
        both = [(h, dh)] if dh_last is None else [(h, dh), (last, dh_last)]
        torch.autograd.backward([y for y, _ in both], [_tensor(torch, d) for _, d in both])
        return {**_gradients(("dx", "dh0"), (tx, th)), "state_dict": _gradients(tuple(p), tuple(p.values()))}

    return forward, backward


def _onnx_rnn(engine: Any, library: str) -> Pair:
    """The RNN of ONNX, one direction; its layout is (T, B, M)."""
    _module(library)
    _module("onnx")

    def forward(
        x: Array, h0: Any, W: Array, R: Array, B: Any = None, *, lengths: Any = None, nonlinearity: str = "tanh"
    ) -> Any:
        if engine is _reference and nonlinearity != "tanh":
            raise NotImplementedError(f"the reference of onnx has no {nonlinearity}")
        if not x.size:
            raise NotImplementedError("RNN takes no empty batch or sequence")
        slots = {
            "X": x.swapaxes(0, 1), "W": W, "R": R, "B": B,
            "sequence_lens": None if lengths is None else np.asarray(lengths, np.int32),
            "initial_h": None if h0 is None else h0[None],
        }  # fmt: skip
        attributes = {"hidden_size": R.shape[-1], "activations": (nonlinearity.capitalize(),)}
        h, last = _run(engine, "RNN", slots, ("Y", "Y_h"), attributes, 22)
        return np.ascontiguousarray(h[:, 0].swapaxes(0, 1)), np.array(last[0])

    return forward, None


# --- softmax -------------------------------------------------------------------------------------------------------------


def _scipy_softmax() -> Pair:
    """scipy.special.softmax; a mask is a score of -inf."""
    special = _module("scipy.special")

    def forward(scores: Array, *, mask: Any = None) -> Any:
        with np.errstate(all="ignore"):
            return special.softmax(scores if mask is None else np.where(mask, scores, scores.dtype.type(-np.inf)), axis=-1)

    return forward, None


def _torch_softmax() -> Pair:
    """torch.softmax; a mask is masked_fill with -inf."""
    torch = _module("torch")

    def run(scores: Array, mask: Any, gradients: bool) -> Any:
        leaf, seen = _tensor(torch, scores, gradients), _tensor(torch, mask)
        return torch.softmax(leaf if seen is None else leaf.masked_fill(~seen, -torch.inf), -1), leaf

    def forward(scores: Array, *, mask: Any = None) -> Any:
        return run(scores, mask, False)[0].numpy()

    def backward(dweights: Array, scores: Array, *, mask: Any = None) -> dict[str, Any]:
        weights, leaf = run(scores, mask, True)
        weights.backward(_tensor(torch, dweights))
        return _gradients(("dscores",), (leaf,))

    return forward, backward


def _jax_softmax() -> Pair:
    """jax.nn.softmax with its own mask, ``where``."""
    jax = _module("jax")

    def forward(scores: Array, *, mask: Any = None) -> Any:
        with jax.enable_x64(bool(scores.dtype == np.float64)):
            return np.array(jax.nn.softmax(scores, where=mask))

    def backward(dweights: Array, scores: Array, *, mask: Any = None) -> dict[str, Any]:
        with jax.enable_x64(bool(scores.dtype == np.float64)):
            _, back = jax.vjp(lambda s: jax.nn.softmax(s, where=mask), scores)
            return {"dscores": np.array(back(dweights)[0])}

    return forward, backward


PEERS: dict[str, Peer] = {
    "torch": Peer("attention", _torch, "torch"),
    "torch-math": Peer("attention", partial(_torch, "MATH"), "torch"),
    "torch-flash": Peer("attention", partial(_torch, "FLASH_ATTENTION"), "torch"),
    "torch-flex": Peer("attention", _torch_flex, "torch"),
    "jax": Peer("attention", _jax, "jax"),
    "onnx": Peer("attention", _onnx, "onnx"),
    "onnxruntime": Peer("attention", _onnxruntime, "onnxruntime"),
    "transformers-eager": Peer("attention", partial(_transformers, "gemma2"), "transformers"),
    "transformers-sink": Peer("attention", partial(_transformers, "gpt_oss"), "transformers"),
    "torch-mha": Peer("multi_head", partial(_torch_mha, False), "torch"),
    "torch-mha-weights": Peer("multi_head", partial(_torch_mha, True), "torch"),
    "torch-mha-fast": Peer("multi_head", _torch_mha_fast, "torch"),
    "torch-rnn": Peer("rnn", _torch_rnn, "torch"),
    "onnx-rnn": Peer("rnn", partial(_onnx_rnn, _reference, "onnx"), "onnx"),
    "onnxruntime-rnn": Peer("rnn", partial(_onnx_rnn, _session, "onnxruntime"), "onnxruntime"),
    "scipy-softmax": Peer("softmax", _scipy_softmax, "scipy"),
    "torch-softmax": Peer("softmax", _torch_softmax, "torch"),
    "jax-softmax": Peer("softmax", _jax_softmax, "jax"),
}
