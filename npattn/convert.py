"""Parameters from and to other layouts: torch nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.RNN, nn.GRU and
nn.LSTM, the norm of Gemma, the MLP of Llama, ONNX RNN, GRU and LSTM.

Tensors are arrays, or anything that NumPy can read. A CPU tensor of torch is detached first; where it is bfloat16, which NumPy
has not, the array is float32, which holds the same numbers. torch and ONNX hold weights as (out, in) and apply x W^T. npattn
holds (in, out) and applies x @ w. Gradients are converted as parameters are, with one exception: torch and ONNX hold two biases
of a recurrent layer, npattn holds their sum b. The gradient of each of the two is that of b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from npattn.ops.checks import Array, check_class, check_integer, kind
from npattn.ops.feed_forward import FeedForwardParams
from npattn.ops.gru import GRUParams
from npattn.ops.linear import LinearParams
from npattn.ops.lstm import LSTMParams
from npattn.ops.multihead import MultiHeadParams
from npattn.ops.norms import NormParams
from npattn.ops.rnn import RNNParams


def _array(op: str, state: Mapping[str, Any], name: str, shape: tuple[int | None, ...]) -> Array:
    if not isinstance(state, Mapping):
        raise TypeError(f"{op}: state is {kind(state)}, expected a mapping of names to tensors")
    if name not in state:
        raise ValueError(f"{op}: {name} is missing, got {sorted(state)}")
    tensor = state[name]
    tensor = tensor.detach() if hasattr(tensor, "detach") else tensor
    a = np.asarray(tensor.float() if str(getattr(tensor, "dtype", "")) == "torch.bfloat16" else tensor)
    if len(a.shape) != len(shape) or any(n is not None and n != m for n, m in zip(shape, a.shape, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{op}: {name} has shape {a.shape}, expected ({expected}): fixed by the other parameters")
    return a


def _has(state: Mapping[str, Any], name: str) -> bool:
    return isinstance(state, Mapping) and state.get(name) is not None


def linear_from_torch(state: Mapping[str, Any], *, prefix: str = "") -> LinearParams:
    """The ``state_dict()`` of a torch.nn.Linear. prefix : what stands before its names, such as "lm_head." """
    op = "linear_from_torch"
    w = _array(op, state, f"{prefix}weight", (None, None))
    return LinearParams(w.T, _array(op, state, f"{prefix}bias", w.shape[:1]) if _has(state, f"{prefix}bias") else None)


def linear_to_torch(params: LinearParams, *, prefix: str = "") -> dict[str, Array]:
    """The state dict of a torch.nn.Linear with these parameters (or their gradients)."""
    check_class("linear_to_torch", "params", params, LinearParams)
    state = {f"{prefix}weight": params.w.T}
    return state if params.b is None else {**state, f"{prefix}bias": params.b}


def norm_from_torch(state: Mapping[str, Any], *, prefix: str = "", plus_one: bool = False) -> NormParams:
    """The ``state_dict()`` of a torch.nn.LayerNorm or nn.RMSNorm, or of a norm in transformers. prefix : as "model.norm."

    plus_one : the file holds g - 1, as Gemma's does. The 1 is added in float32 at least, as transformers has it: of float16 and
    bfloat16 comes float32.
    """
    op = "norm_from_torch"
    g = _array(op, state, f"{prefix}weight", (None,))
    b = _array(op, state, f"{prefix}bias", g.shape) if _has(state, f"{prefix}bias") else None
    if plus_one:
        g = 1 + (g.astype(np.float32) if g.dtype.itemsize == 2 else g)
    return NormParams(g, b)


def norm_to_torch(params: NormParams, *, prefix: str = "", plus_one: bool = False) -> dict[str, Array]:
    """The state dict of a norm with these parameters (or their gradients: without plus_one, as a constant has none).

    plus_one : the weight is g - 1, as in the files of Gemma
    """
    op = "norm_to_torch"
    check_class(op, "params", params, NormParams)
    if params.g is None:
        raise ValueError(f"{op}: g is None, expected an array: a bias alone is no norm of torch")
    state = {f"{prefix}weight": params.g - 1 if plus_one else params.g}
    return state if params.b is None else {**state, f"{prefix}bias": params.b}


def feed_forward_from_llama(state: Mapping[str, Any], *, prefix: str = "") -> FeedForwardParams:
    """The gated MLP of Llama in transformers: gate_proj, up_proj and down_proj, or packed as Phi-3's gate_up_proj, gate first.

    Its activation is "silu". prefix : what stands before the names, such as "model.layers.0.mlp."
    """
    op = "feed_forward_from_llama"
    out = linear_from_torch(state, prefix=f"{prefix}down_proj.")
    F = out.w.shape[0]
    if _has(state, f"{prefix}gate_up_proj.weight"):
        w = _array(op, state, f"{prefix}gate_up_proj.weight", (2 * F, None))
        b = _array(op, state, f"{prefix}gate_up_proj.bias", (2 * F,)) if _has(state, f"{prefix}gate_up_proj.bias") else None
        gate, up = (LinearParams(w[part].T, None if b is None else b[part]) for part in (slice(F), slice(F, None)))
    else:
        _array(op, state, f"{prefix}gate_proj.weight", (F, None))
        _array(op, state, f"{prefix}up_proj.weight", (F, None))
        gate, up = (linear_from_torch(state, prefix=f"{prefix}{name}_proj.") for name in ("gate", "up"))
    return FeedForwardParams(up.w, out.w, up.b, out.b, gate.w, gate.b)


def feed_forward_to_llama(params: FeedForwardParams, *, packed: bool = False, prefix: str = "") -> dict[str, Array]:
    """The state dict of Llama's MLP with these parameters (or their gradients). packed : gate_up_proj, gate first"""
    op, p = "feed_forward_to_llama", params
    check_class(op, "params", params, FeedForwardParams)
    if p.w_gate is None:
        raise ValueError(f"{op}: w_gate is None, expected the weight of a gate")
    up, gate = LinearParams(p.w_in, p.b_in), LinearParams(p.w_gate, p.b_gate)
    parts = {"gate": gate, "up": up}
    if packed:
        if (p.b_in is None) != (p.b_gate is None):
            raise ValueError(f"{op}: got one of b_in and b_gate, expected both or none: gate_up_proj has one bias")
        b = None if p.b_in is None or p.b_gate is None else np.concatenate([p.b_gate, p.b_in])
        parts = {"gate_up": LinearParams(np.concatenate([p.w_gate, p.w_in], 1), b)}
    parts["down"] = LinearParams(p.w_out, p.b_out)
    return {n: x for name, part in parts.items() for n, x in linear_to_torch(part, prefix=f"{prefix}{name}_proj.").items()}


def multi_head_from_torch(state: Mapping[str, Any]) -> MultiHeadParams:
    """The ``state_dict()`` of a torch.nn.MultiheadAttention, packed (in_proj_weight) or separate (q_proj_weight ...).

    ``num_heads`` means the same in torch. Its masks are True where a query may *not* attend to a key: invert them.
    """
    op = "multi_head_from_torch"
    if _has(state, "bias_k") or _has(state, "bias_v"):
        raise ValueError(f"{op}: got bias_k and bias_v (add_bias_kv=True), expected none: append them to k and v yourself")
    w_o = _array(op, state, "out_proj.weight", (None, None))
    M = w_o.shape[0]
    _array(op, state, "out_proj.weight", (M, M))
    if _has(state, "in_proj_weight"):
        weights = np.split(_array(op, state, "in_proj_weight", (3 * M, None)), 3)
    else:
        weights = [_array(op, state, f"{x}_proj_weight", (M, None)) for x in "qkv"]
    biases: list[Any] = [None] * 3
    if _has(state, "in_proj_bias"):
        biases = np.split(_array(op, state, "in_proj_bias", (3 * M,)), 3)
    b_o = _array(op, state, "out_proj.bias", (M,)) if _has(state, "out_proj.bias") else None
    w_q, w_k, w_v = (w.T for w in weights)
    b_q, b_k, b_v = biases
    return MultiHeadParams(w_q, w_k, w_v, w_o.T, b_q, b_k, b_v, b_o)


def multi_head_to_torch(params: MultiHeadParams, *, packed: bool | None = None) -> dict[str, Array]:
    """The state dict of a torch.nn.MultiheadAttention with these parameters (or their gradients).

    packed : in_proj_weight (True) or q_proj_weight, k_proj_weight and v_proj_weight (False). None does what torch does: packed
    if x_q, x_k and x_v have one width.
    """
    op = "multi_head_to_torch"
    check_class(op, "params", params, MultiHeadParams)
    M = params.w_o.shape[1]
    for name in ("w_q", "w_k", "w_v", "w_o"):
        w = getattr(params, name)
        if (w.shape[0] if name == "w_o" else w.shape[1]) != M:
            raise ValueError(f"{op}: {name} has shape {w.shape}, expected width {M} for all heads: torch has one embed_dim")
    weights, biases = [w.T for w in params[:3]], params[4:7]
    same = len({w.shape for w in weights}) == 1
    if packed and not same:
        raise ValueError(f"{op}: got inputs of different widths, expected one width where packed=True")
    missing = [b is None for b in biases]
    if any(missing) and not all(missing):
        raise ValueError(f"{op}: got some of b_q, b_k and b_v, expected all or none: torch has one in_proj_bias")
    state = {}
    if same if packed is None else packed:
        state["in_proj_weight"] = np.concatenate(weights)
    else:
        state.update({f"{x}_proj_weight": w for x, w in zip("qkv", weights, strict=True)})
    if not any(missing):
        state["in_proj_bias"] = np.concatenate([b for b in biases if b is not None])
    state["out_proj.weight"] = params.w_o.T
    if params.b_o is not None:
        state["out_proj.bias"] = params.b_o
    return state


def _suffix(op: str, layer: int, reverse: bool) -> str:
    return f"_l{check_integer(op, 'layer', layer, least=0)}{'_reverse' if reverse else ''}"


def _cell_from_torch(op: str, state: Mapping[str, Any], layer: int, reverse: bool, gates: int) -> tuple[Any, ...]:
    """w_x, w_h and both biases of one layer and direction, (in, out); the biases are None where there are none."""
    end = _suffix(op, layer, reverse)
    w_x = _array(op, state, f"weight_ih{end}", (None, None))
    N, rest = divmod(w_x.shape[0], gates)
    if rest:
        raise ValueError(f"{op}: weight_ih{end} has shape {w_x.shape}, expected ({gates} N, any)")
    w_h, biases = _array(op, state, f"weight_hh{end}", (gates * N, N)), list[Any]([None, None])
    if _has(state, f"bias_ih{end}"):
        biases = [_array(op, state, f"bias_{n}{end}", (gates * N,)) for n in ("ih", "hh")]
    return w_x.T, w_h.T, *biases


def _cell_to_torch(op: str, w_x: Array, w_h: Array, b_x: Any, b_h: Any, layer: int, reverse: bool) -> dict[str, Array]:
    end = _suffix(op, layer, reverse)
    biases = {} if b_x is None else {f"bias_ih{end}": b_x, f"bias_hh{end}": b_h}
    return {f"weight_ih{end}": w_x.T, f"weight_hh{end}": w_h.T, **biases}


def _cell_from_onnx(op: str, W: Any, R: Any, B: Any, direction: int, order: str, onnx: str) -> tuple[Any, ...]:
    """w_x, w_h and both biases of one direction, (in, out); order, onnx : the gates in npattn's order and in that of ONNX"""
    state, gates = {"W": W, "R": R, "B": B}, len(order)
    w_x = _array(op, state, "W", (None, None, None))
    directions, (N, rest) = w_x.shape[0], divmod(w_x.shape[1], gates)
    if rest:
        raise ValueError(f"{op}: W has shape {w_x.shape}, expected (any, {gates} N, any)")
    if check_integer(op, "direction", direction, least=0) >= directions:
        raise ValueError(f"{op}: direction is {direction}, expected less than {directions}: fixed by W")
    w_h, biases = _array(op, state, "R", (directions, gates * N, N)), list[Any]([None, None])
    if B is not None:
        biases = np.split(_array(op, state, "B", (directions, 2 * gates * N))[direction], 2)
    w = (_reordered(a, onnx, order) for a in (w_x[direction], w_h[direction]))
    return *(a.T for a in w), *(None if b is None else _reordered(b, onnx, order) for b in biases)


def _cell_to_onnx(w_x: Array, w_h: Array, b_x: Any, b_h: Any, order: str, onnx: str) -> dict[str, Array]:
    state = {"W": _reordered(w_x.T, order, onnx)[None], "R": _reordered(w_h.T, order, onnx)[None]}
    if b_x is not None:
        state["B"] = np.concatenate([_reordered(b, order, onnx) for b in (b_x, b_h)])[None]
    return state


def _reordered(a: Array, order: str, new: str) -> Array:
    """The blocks of rows of a in another order; the array itself where the order stays."""
    parts = np.split(a, len(order))
    return a if order == new else np.concatenate([parts[order.index(gate)] for gate in new])


def _sum(b_x: Any, b_h: Any) -> Any:
    return None if b_x is None else b_x + b_h


def _two(b: Array | None, gradients: bool) -> tuple[Any, Any]:
    """One bias as two: the second is 0; as gradients both are the same."""
    return (None, None) if b is None else (b, b if gradients else np.zeros_like(b))


def _both(params: GRUParams) -> tuple[Any, Any]:
    """Both biases, or none: one that is None is 0."""
    b_x, b_h = params.b_x, params.b_h
    if b_x is None and b_h is not None:
        b_x = np.zeros_like(b_h)
    if b_h is None and b_x is not None:
        b_h = np.zeros_like(b_x)
    return b_x, b_h


def rnn_from_torch(state: Mapping[str, Any], *, layer: int = 0, reverse: bool = False) -> RNNParams:
    """One layer and direction of the ``state_dict()`` of a torch.nn.RNN; b is the sum of its two biases."""
    w_x, w_h, *b = _cell_from_torch("rnn_from_torch", state, layer, reverse, 1)
    return RNNParams(w_x, w_h, _sum(*b))


def rnn_to_torch(
    params: RNNParams, *, layer: int = 0, reverse: bool = False, gradients: bool = False
) -> dict[str, Array]:
    """One layer and direction of a torch.nn.RNN's state dict. bias_hh is 0; for gradients it equals bias_ih."""
    op = "rnn_to_torch"
    check_class(op, "params", params, RNNParams)
    return _cell_to_torch(op, params.w_x, params.w_h, *_two(params.b, gradients), layer, reverse)


def rnn_from_onnx(W: Any, R: Any, B: Any = None, *, direction: int = 0) -> RNNParams:
    """One direction of an ONNX RNN: W (directions, N, M), R (directions, N, N), B (directions, 2 N) = [Wb, Rb].

    The second direction of a bidirectional node runs backwards in time: flip x before the call, and h after it.
    """
    w_x, w_h, *b = _cell_from_onnx("rnn_from_onnx", W, R, B, direction, "h", "h")
    return RNNParams(w_x, w_h, _sum(*b))


def rnn_to_onnx(params: RNNParams, *, gradients: bool = False) -> dict[str, Array]:
    """W, R and B of an ONNX RNN of one direction. Rb is 0; for gradients it equals Wb. There is no B without biases."""
    check_class("rnn_to_onnx", "params", params, RNNParams)
    return _cell_to_onnx(params.w_x, params.w_h, *_two(params.b, gradients), "h", "h")


def gru_from_torch(state: Mapping[str, Any], *, layer: int = 0, reverse: bool = False) -> GRUParams:
    """One layer and direction of the ``state_dict()`` of a torch.nn.GRU, which is ``reset_after=True``."""
    return GRUParams(*_cell_from_torch("gru_from_torch", state, layer, reverse, 3))


def gru_to_torch(params: GRUParams, *, layer: int = 0, reverse: bool = False) -> dict[str, Array]:
    """One layer and direction of a torch.nn.GRU's state dict, or its gradients. If one bias is None, it is 0 there."""
    op = "gru_to_torch"
    check_class(op, "params", params, GRUParams)
    return _cell_to_torch(op, params.w_x, params.w_h, *_both(params), layer, reverse)


def gru_from_onnx(W: Any, R: Any, B: Any = None, *, direction: int = 0) -> GRUParams:
    """One direction of an ONNX GRU: W (directions, 3 N, M), R (directions, 3 N, N), B (directions, 6 N) = [Wb, Rb].

    Its gates stand in the order z, r, h. ``linear_before_reset=1`` is ``reset_after=True``; 0, the default of ONNX, is False.
    """
    return GRUParams(*_cell_from_onnx("gru_from_onnx", W, R, B, direction, "rzh", "zrh"))


def gru_to_onnx(params: GRUParams) -> dict[str, Array]:
    """W, R and B of an ONNX GRU of one direction, or their gradients. There is no B without biases."""
    check_class("gru_to_onnx", "params", params, GRUParams)
    return _cell_to_onnx(params.w_x, params.w_h, *_both(params), "rzh", "zrh")


def lstm_from_torch(state: Mapping[str, Any], *, layer: int = 0, reverse: bool = False) -> LSTMParams:
    """One layer and direction of the ``state_dict()`` of a torch.nn.LSTM without proj_size; b is the sum of its two biases."""
    w_x, w_h, *b = _cell_from_torch("lstm_from_torch", state, layer, reverse, 4)
    return LSTMParams(w_x, w_h, _sum(*b))


def lstm_to_torch(
    params: LSTMParams, *, layer: int = 0, reverse: bool = False, gradients: bool = False
) -> dict[str, Array]:
    """One layer and direction of a torch.nn.LSTM's state dict. bias_hh is 0; for gradients it equals bias_ih."""
    op = "lstm_to_torch"
    check_class(op, "params", params, LSTMParams)
    return _cell_to_torch(op, params.w_x, params.w_h, *_two(params.b, gradients), layer, reverse)


def lstm_from_onnx(W: Any, R: Any, B: Any = None, *, direction: int = 0) -> LSTMParams:
    """One direction of an ONNX LSTM without peepholes: W (directions, 4 N, M), R (directions, 4 N, N), B (directions, 8 N).

    Its gates stand in the order i, o, f, c; B is [Wb, Rb], and b is their sum.
    """
    w_x, w_h, *b = _cell_from_onnx("lstm_from_onnx", W, R, B, direction, "ifco", "iofc")
    return LSTMParams(w_x, w_h, _sum(*b))


def lstm_to_onnx(params: LSTMParams, *, gradients: bool = False) -> dict[str, Array]:
    """W, R and B of an ONNX LSTM of one direction. Rb is 0; for gradients it equals Wb. There is no B without biases."""
    check_class("lstm_to_onnx", "params", params, LSTMParams)
    return _cell_to_onnx(params.w_x, params.w_h, *_two(params.b, gradients), "ifco", "iofc")


__all__ = [
    "feed_forward_from_llama",
    "feed_forward_to_llama",
    "gru_from_onnx",
    "gru_from_torch",
    "gru_to_onnx",
    "gru_to_torch",
    "linear_from_torch",
    "linear_to_torch",
    "lstm_from_onnx",
    "lstm_from_torch",
    "lstm_to_onnx",
    "lstm_to_torch",
    "multi_head_from_torch",
    "multi_head_to_torch",
    "norm_from_torch",
    "norm_to_torch",
    "rnn_from_onnx",
    "rnn_from_torch",
    "rnn_to_onnx",
    "rnn_to_torch",
]
