"""The records of the encoder block and of the decoder block, made of those of their sublayers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from npattn.models import torch_layout
from npattn.models.blocks import (
    DecoderBlockParams,
    EncoderBlockParams,
    decoder_block_backward,
    decoder_block_forward,
    encoder_block_backward,
    encoder_block_forward,
)
from npattn.models.config import Config
from npattn.ops.checks import Array
from npattn.ops.feed_forward import FeedForwardParams
from npattn.ops.multihead import MultiHeadParams
from npattn.ops.norms import NormParams
from npattn.verify.op import Change, Op, Pair, Problem, Values
from npattn.verify.ops.composed import Part, of_part
from npattn.verify.ops.feed_forward import FEED_FORWARD, GATED_FEED_FORWARD
from npattn.verify.ops.layers import BATCH, LayerCalls, Mistake, Rng, case, changes, normal, of_params, space, weight, zero
from npattn.verify.ops.multi_head import MULTI_HEAD
from npattn.verify.ops.norms import LAYER_NORM, RMS_NORM
from npattn.verify.precision import Precision
from npattn.verify.space import Space, sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding

ENCODER, DECODER = "encoder_block", "decoder_block"
OF_CONFIG = ("num_heads", "num_kv_heads", "norm", "norm_eps", "pre_norm", "activation", "causal")
NORMS = {"layer": LAYER_NORM, "rms": RMS_NORM}
ATTENTION, CROSS, HIDDEN = "attention", "cross", "feed_forward"  # the sublayers, as the parameters name them


# --- problems ----------------------------------------------------------------------------------------------------------------


def _heads(rng: Rng, M: int, Mk: int, H: int, G: int, D: int, bias: bool) -> MultiHeadParams:
    shapes = ((M, H * D), (Mk, G * D), (Mk, G * D), (H * D, M))
    biases = [0.5 * normal(rng, n) for n in (H * D, G * D, G * D, M)]
    weights: list[Any] = [weight(rng, *n) for n in shapes]
    return MultiHeadParams(*weights, *(biases if bias else ()))


def _norm(rng: Rng, M: int, norm: str) -> NormParams:
    g, b = 1 + 0.3 * normal(rng, M), normal(rng, M)
    return NormParams(g, b if norm == "layer" else None)


def _hidden(rng: Rng, M: int, F: int, gated: bool, bias: bool) -> FeedForwardParams:
    w_in, w_out, w_gate = weight(rng, M, F), weight(rng, F, M), weight(rng, M, F)
    b_in, b_out = (0.5 * normal(rng, F), 0.5 * normal(rng, M)) if bias else (None, None)
    return FeedForwardParams(w_in, w_out, b_in, b_out, w_gate if gated else None)


def _block(
    rng: Rng, op: str = ENCODER, *, B: int = 2, L: int = 6, S: int = 7, M: int = 12, F: int = 10, H: int = 3,
    G: int | None = None, D: int = 4, norm: str = "layer", gated: bool = False, bias: bool = True, mask: str = "",
    padded: bool = False, nan: bool = False, **config: Any,
) -> Problem:  # fmt: skip
    """mask : "array" or "padding"; padded : tokens behind the end are NaN, and their dy is 0; nan : the first token is NaN"""
    G = H if G is None else G
    x, memory, dy = normal(rng, B, L, M), normal(rng, B, S, M), normal(rng, B, L, M)
    parts: dict[str, Any] = {ATTENTION: _heads(rng, M, M, H, G, D, bias), "attention_norm": _norm(rng, M, norm)}
    if op == DECODER:
        parts |= {CROSS: _heads(rng, M, M, H, G, D, bias), "cross_norm": _norm(rng, M, norm)}
    parts |= {HIDDEN: _hidden(rng, M, F, gated, bias), "feed_forward_norm": _norm(rng, M, norm)}
    params = EncoderBlockParams(**parts) if op == ENCODER else DecoderBlockParams(**parts)
    options: dict[str, Any] = {"num_heads": H, **({"num_kv_heads": G} if G != H else {}), **config}
    if norm != "layer":
        options["norm"] = norm
    ends = np.maximum(L - np.arange(B) % 3, 1)  # a query without keys is a matter of multi_head
    inside = np.arange(L) < ends[:, None]
    if mask == "array":
        options["mask"] = (rng.random((B, 1, L, L)) < 0.6) | np.eye(L, dtype=bool)
    elif mask == "padding":
        options["mask"] = inside[:, None, None, :] & (inside[:, None, :, None] if padded else True)
    if nan:
        x[0, 0] = np.nan
    if padded:
        x[~inside], dy[~inside] = np.nan, 0
    if op == DECODER:
        if mask == "array":
            options["cross_mask"] = (rng.random((B, 1, L, S)) < 0.6) | (np.arange(S) == 0)
        elif mask:
            options["cross_mask"] = np.arange(S) < np.maximum(S - np.arange(B) % 3, 1)[:, None, None, None]
        return Problem(Op.known[op], {"x": x, "memory": memory, "params": params}, options, {"dy": dy})
    return Problem(Op.known[op], {"x": x, "params": params}, options, {"dy": dy})


def _cases(op: str) -> list[Any]:
    _case = partial(case, op, partial(_block, op=op))
    causal = [_case("causal", "causal", causal=True), _case("causal + padding", "causal", causal=True, mask="padding")]
    return [
        _case("plain"),
        _case("post-norm", "post-norm", pre_norm=False),
        *(causal if op == ENCODER else []),
        _case("mask", "mask", mask="array"),
        *([_case("mask, L = S", "mask", mask="array", L=7)] if op == DECODER else []),
        _case("post-norm + mask", "post-norm", pre_norm=False, mask="array"),
        _case("padding", "mask", mask="padding"),
        _case("padding of NaN", "NaN containment", mask="padding", padded=True),
        _case("a token of NaN", "NaN containment", nan=True),
        _case("relu", "activation", activation="relu"),
        _case("gated silu, RMS norm, no biases", "gated", activation="silu", gated=True, norm="rms", bias=False),
        _case("RMS norm", "norm", norm="rms"),
        _case("post-norm, RMS norm", "norm", norm="rms", pre_norm=False),
        _case("norm_eps 0.1", "eps", norm_eps=0.1),
        _case("grouped heads", "grouped heads", H=4, G=2, D=3),
        _case("one head", "small sizes", H=1, D=12),
        _case("L = 1", "small sizes", L=1),
        _case("no biases", "biases", bias=False),
        _case("L = M = F", "square", L=12, F=12),
        _case("long", "long", L=70, S=40, M=32, F=64, H=2, D=16),
        _case("float64", dtype="float64"),
        _case("float64 post-norm", "float64", dtype="float64", pre_norm=False, mask="array"),
    ]


FEW = {"multiple of 8": (8, 16), "1": (1,), "2 or 3": (2, 3), "small and odd": (5, 7), "prime": (13, 17)}


def _space(op: str) -> Space:
    sizes: dict[str, Any] = {"B": sizes_of("B", BATCH), "L": sizes_of("L", FEW)}
    sizes |= {"S": sizes_of("S", FEW)} if op == DECODER else {}
    more = {"causal": {"no": {}, "yes": {"causal": True}}} if op == ENCODER else {}
    return space(
        op, partial(_block, op=op),
        {**sizes, "M": sizes_of("M", {"even": (12, 16), "2": (2,), "odd": (7, 9)}), "F": sizes_of("F", FEW),
         "D": sizes_of("D", {"4": (4,), "1": (1,), "8": (8,)}),
         "heads": {"3 / 3": ({"H": 3, "G": 3},), "1 / 1": ({"H": 1, "G": 1},), "4 / 2": ({"H": 4, "G": 2},)}},
        {"order": {"pre-norm": {}, "post-norm": {"pre_norm": False}}, "norm": {"layer": {}, "rms": {"norm": "rms"}},
         "feed-forward": {"gelu": {}, "relu": {"activation": "relu"}, "gated silu": {"activation": "silu", "gated": True}},
         "biases": {"yes": {}, "no": {"bias": False}}, "norm_eps": {"default": {}, "0.1": {"norm_eps": 0.1}},
         "mask": {"none": {}, "array": {"mask": "array"}, "padding": {"mask": "padding"}}, **more},
        lambda n: n.get("B", 1) * n.get("L", 1) * (n.get("M", 1) + n.get("F", 1) + n.get("L", 1)), _possible,
    )  # fmt: skip


def _possible(row: dict[str, str]) -> bool:
    """If all sequences are equal, so are the roundings of what is summed over them."""
    return row.get("memory") != "strides of 0"


# --- the reference -----------------------------------------------------------------------------------------------------------


def _config(options: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """A `Config` of the options, and those that are none of it."""
    config = {n: x for n, x in options.items() if n in OF_CONFIG}
    return Config(**config), {n: x for n, x in options.items() if n not in config}


def _call(op: str, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Array, Any]:
    config, rest = _config(options)
    if op == ENCODER:
        return encoder_block_forward(inputs["x"], inputs["params"], config, **rest)
    return decoder_block_forward(inputs["x"], inputs["memory"], inputs["params"], config, **rest)


def _gradients(op: str, dy: Array, cache: Any) -> Values:
    g: Any = encoder_block_backward(dy, cache) if op == ENCODER else decoder_block_backward(dy, cache)
    memory = {"dmemory": g.memory} if op == DECODER else {}
    return {"dx": g.x, **memory, **of_params(g.params)}


def reference(p: Problem, op: str) -> Values:
    y, cache = _call(op, p.inputs, p.options)
    return {"y": y, **_gradients(op, p.cotangents["dy"], cache)}


# --- the equations -----------------------------------------------------------------------------------------------------------


def _order(op: str) -> tuple[str, ...]:
    return (ATTENTION, HIDDEN) if op == ENCODER else (ATTENTION, CROSS, HIDDEN)


def forward(x: Any, op: str) -> None:
    """Equations (a) to (c) of `npattn.models.blocks` for each sublayer."""
    x.input("x", x.problem.inputs["x"])
    if op == DECODER:
        x.input("memory", x.problem.inputs["memory"])
    x.keep("pre_norm", lambda: x.options.get("pre_norm", True))
    x.keep("causal", lambda: op == DECODER or x.options.get("causal", False))
    value = x.x
    for name in _order(op):
        value = _sublayer(x, name, value)
    x.keep("y", lambda: value)


def _sublayer(x: Any, name: str, value: Array) -> Any:
    params = x.problem.inputs["params"]
    norm = NORMS[x.options.get("norm", "layer")]
    eps = {"eps": x.options.get("norm_eps", 1e-5)}

    def normed(z: Array) -> Array:
        return Part(x, f"{name}_norm", norm, {"x": z}, {"x": z, "params": getattr(params, f"{name}_norm")}, eps).forward("y")

    setattr(x, f"{name} pre_norm", x.pre_norm)
    if x.pre_norm:
        n = normed(value)
        x.keep(f"{name} input", lambda: n)
        a = _inner(x, name, getattr(x, f"{name} input"))
        skip = x.keep(f"{name} skip", lambda: value)
        return x.sum_of_two(f"{name} sum", skip, a)
    x.keep(f"{name} input", lambda: value)
    a = _inner(x, name, getattr(x, f"{name} input"))
    skip = x.keep(f"{name} skip", lambda: value)
    s = x.sum_of_two(f"{name} sum", skip, a)
    y = normed(s)
    return x.keep(f"{name} out", lambda: y)


def _inner(x: Any, name: str, n: Array) -> Any:
    params = getattr(x.problem.inputs["params"], name)
    if name == HIDDEN:
        op = FEED_FORWARD if params.w_gate is None else GATED_FEED_FORWARD
        options = {"activation": x.options.get("activation", "gelu")}
        return Part(x, name, op, {"x": n}, {"x": n, "params": params}, options).forward("y")
    other = _sampled(x.memory, n) if name == CROSS else n
    given = {"x_q": n, "x_k": other, "x_v": other}
    options = {n: x.options[n] for n in ("num_heads", "num_kv_heads") if n in x.options}
    mask = x.options.get("cross_mask" if name == CROSS else "mask")
    if name == ATTENTION and x.causal:
        L = n.shape[-2]
        mask = np.tri(L, dtype=bool) & (True if mask is None else mask)
    return Part(x, name, MULTI_HEAD, given, {**given, "params": params},
                options | ({} if mask is None else {"mask": mask})).forward("out")  # fmt: skip


def _sampled(a: Array, like: Array) -> Array:
    """a, for as many samples of the noise."""
    return np.array(np.broadcast_to(a, (len(like), *a.shape[1:])))


def backward(x: Any, op: str) -> None:
    """Each sublayer in reverse: (c) to (a)."""
    x.input("dy", x.problem.cotangents["dy"])
    d, found = _sampled(x.dy, x.y), Values()
    for name in reversed(_order(op)):
        d = _sublayer_backward(x, name, d, found)
    x.keep("dx", lambda: d)
    for n, value in found.items():
        x.keep(n, lambda value=value: value)


def _sublayer_backward(x: Any, name: str, dy: Array, found: Values) -> Any:
    norm = vars(x)[f"part {name}_norm"].in_run(x)

    def through_norm(d: Array) -> Any:
        grads = norm.backward("dy", d)
        found.update({f"d{name}_norm_{n[1:]}": g for n, g in grads.items() if n != "dx"})
        return grads["dx"]

    if getattr(x, f"{name} pre_norm"):
        inner = _inner_backward(x, name, x.keep(f"{name} da", lambda: dy), found)
        dn = through_norm(x.keep(f"{name} dn", lambda: inner))
        skip = x.keep(f"{name} skip in the backward", lambda: dy)
        return x.sum_of_two(f"{name} d", skip, dn)
    ds = through_norm(x.keep(f"{name} d out", lambda: dy))
    skip = x.keep(f"{name} skip in the backward", lambda: ds)
    dn = _inner_backward(x, name, x.keep(f"{name} da", lambda: ds), found)
    return x.sum_of_two(f"{name} d", skip, dn)


def _inner_backward(x: Any, name: str, da: Array, found: Values) -> Any:
    part = vars(x)[f"part {name}"].in_run(x)
    grads = part.backward("dy" if name == HIDDEN else "dout", da)
    inputs = {f"d{n}" for n in part.given}
    found.update({f"d{name}_{n[1:]}": g for n, g in grads.items() if n not in inputs})
    if name == HIDDEN:
        return grads["dx"]
    if name == CROSS:
        found["dmemory"] = x.sum_of_two("cross dmemory", grads["dx_k"], grads["dx_v"])
        return x.keep("cross dn", lambda: grads["dx_q"])
    x.sum_of_two("attention dq dk", grads["dx_q"], grads["dx_k"])
    return x.sum_of_two("attention dn", getattr(x, "attention dq dk"), grads["dx_v"])


# --- mistakes ----------------------------------------------------------------------------------------------------------------


def _of_sublayer(name: str) -> dict[str, Mistake]:
    return {
        f"{name}: the residual connection is missing": {f"{name} skip": zero, f"{name} skip in the backward": zero},
        f"{name}: the residual connection begins behind the norm": {
            f"{name} skip": lambda x, v: getattr(x, f"{name} input"), f"{name} dn": lambda x, dn: dn + getattr(x, f"{name} da"),
            f"{name} skip in the backward": lambda x, d: 0 * d if x.pre_norm else d},
        f"{name}: the residual connection is missing in the backward": {f"{name} skip in the backward": zero},
        f"{name}: the residual connection twice": {
            f"{name} skip": lambda x, v: 2 * v, f"{name} skip in the backward": lambda x, v: 2 * v},
        f"{name}: the gradient goes through the residual connection alone": {f"{name} da": zero},
    }  # fmt: skip


_BOTH: dict[str, Mistake] = {
    "post-norm for pre-norm, pre-norm for post-norm": {"pre_norm": lambda x, pre: not pre},
    "self-attention: the gradient of the queries alone": {"attention dn": lambda x, _: vars(x)["attention: dx_q"]},
    "self-attention: the gradient of the values is missing": {"attention dn": lambda x, _: getattr(x, "attention dq dk")},
    "dx without a gradient": {"dx": zero},
}  # fmt: skip
_OF_ENCODER: dict[str, Mistake] = {
    "causal ignored": {"causal": lambda x, _: False},
    "always causal": {"causal": lambda x, _: True},
}
_OF_DECODER: dict[str, Mistake] = {
    "self-attention not causal": {"causal": lambda x, _: False},
    "memory: the gradient of the keys alone": {"dmemory": lambda x, _: vars(x)["cross: dx_k"]},
    "memory: the gradient of the values alone": {"dmemory": lambda x, _: vars(x)["cross: dx_v"]},
    "memory without a gradient": {"dmemory": zero},
}
OF_HEADS = (
    "b_q forgotten", "b_v forgotten", "b_o forgotten", "w_q transposed", "w_k transposed", "w_v transposed", "w_o transposed",
    "w_q and w_k exchanged", "w_k and w_v exchanged", "head's columns interleaved", "scale of the model's width",
    "scale forgotten", "head h reads h % G", "merged without a transpose", "mask ignored", "mask of the first sequence",
    "mask transposed", "by w_o, not its transpose", "by w_q, not its transpose", "w_o of the first sequence",
    "w_q of the first sequence", "dq without the scale", "first head of the group in dk", "0 times NaN behind the mask",
)  # fmt: skip
OF_HIDDEN = (
    "gelu for the activation", "gelu_tanh for the activation", "relu for the activation", "silu for the activation",
    "no activation", "b_in forgotten", "b_out forgotten", "slope forgotten",
    "w_out by what stands before the activation", "w_in of the first sequence", "w_out of the first sequence",
    "b_in of the first sequence",
)  # fmt: skip
OF_NORM = (
    "eps outside of the root", "eps forgotten", "eps of 1e-12", "eps of 1e-6", "divided by M - 1", "g forgotten", "b forgotten",
    "1 + g for g", "r taken as a constant", "g missing in dx", "dg of x, not of n", "dg of the first sequence",
    "db of the first sequence", "x without a gradient",
)  # fmt: skip


def _changes(op: str, own: dict[str, Mistake]) -> dict[str, Change]:
    found = changes({**_BOTH, **own, **{n: m for name in _order(op) for n, m in _of_sublayer(name).items()}})
    for name in _order(op):
        found |= of_part(name, FEED_FORWARD, OF_HIDDEN) if name == HIDDEN else of_part(name, MULTI_HEAD, OF_HEADS)
        found |= of_part(name, GATED_FEED_FORWARD, ("gate and value exchanged",)) if name == HIDDEN else {}
        found |= of_part(f"{name}_norm", LAYER_NORM, OF_NORM)
    return found


def _undefined(problem: Problem, precision: Precision) -> str:
    """Why a class of precision is not tested: a block of float16 is rounded between its layers, and each may choose where."""
    return "" if precision.storage in ("float32", "float64") and not no_inner_rounding(problem, precision) else UNSUPPORTED


UNSUPPORTED = "precision classes of blocks: float32 and float64"

# --- the records -------------------------------------------------------------------------------------------------------------


def _candidate(op: str) -> Pair:
    def forward(*inputs: Any, **options: Any) -> Any:
        return _call(op, _named(op, inputs), options)[0]

    def backward(dy: Array, *inputs: Any, **options: Any) -> Values:
        return _gradients(op, dy, _call(op, _named(op, inputs), options)[1])

    return forward, backward


def _named(op: str, inputs: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("x", "params") if op == ENCODER else ("x", "memory", "params"), inputs, strict=True))


def _record(op: str, own: dict[str, Mistake]) -> Op:
    to, back = (
        (torch_layout.encoder_block_to_torch, torch_layout.encoder_block_from_torch) if op == ENCODER
        else (torch_layout.decoder_block_to_torch, torch_layout.decoder_block_from_torch)
    )  # fmt: skip
    memory = "" if op == ENCODER else "memory, "
    options = (*OF_CONFIG[:-1], *(("causal", "mask") if op == ENCODER else ("mask", "cross_mask")))
    return Op(
        name=op,
        outputs=("y",),
        axes={"y": "BLM", "dx": "BLM", "dmemory": "BSM"},
        reference=partial(reference, op=op),
        forward=partial(forward, op=op),
        backward=partial(backward, op=op),
        truth=by_noise,
        undefined=_undefined,
        changes=_changes(op, own),
        cases=_cases(op),
        candidates={op.replace("_", "-"): partial(_candidate, op)},
        calls=LayerCalls(
            f"forward(x, {memory}params, *, num_heads, ...) and backward(dy, x, {memory}params, *, num_heads, ...)", options,
            to={"state_dict": lambda params: [to(params)]}, back={"state_dict": lambda found: back(found.pop("state_dict"))},
        ),
        space=_space(op),
    )  # fmt: skip


ENCODER_BLOCK, DECODER_BLOCK = _record(ENCODER, _OF_ENCODER), _record(DECODER, _OF_DECODER)
