"""Parameters from and to other layouts: torch nn.MultiheadAttention and nn.RNN, ONNX RNN.

Tensors are arrays, or anything that NumPy can read (a CPU tensor is detached first). torch and ONNX hold weights as (out, in)
and apply x W^T. npattn holds (in, out) and applies x @ w. Gradients are converted as parameters are, with one exception: torch
and ONNX hold two biases of a recurrent layer, npattn holds their sum b. The gradient of each of the two is that of b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from npattn.ops.checks import Array, check_class, check_integer, kind
from npattn.ops.multihead import MultiHeadParams
from npattn.ops.rnn import RNNParams


def _array(op: str, state: Mapping[str, Any], name: str, shape: tuple[int | None, ...]) -> Array:
    if not isinstance(state, Mapping):
        raise TypeError(f"{op}: state is {kind(state)}, expected a mapping of names to tensors")
    if name not in state:
        raise ValueError(f"{op}: {name} is missing, got {sorted(state)}")
    tensor = state[name]
    a = np.asarray(tensor.detach() if hasattr(tensor, "detach") else tensor)
    if len(a.shape) != len(shape) or any(n is not None and n != m for n, m in zip(shape, a.shape, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{op}: {name} has shape {a.shape}, expected ({expected}): fixed by the other parameters")
    return a


def _has(state: Mapping[str, Any], name: str) -> bool:
    return isinstance(state, Mapping) and state.get(name) is not None


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


def rnn_from_torch(state: Mapping[str, Any], *, layer: int = 0, reverse: bool = False) -> RNNParams:
    """One layer and direction of the ``state_dict()`` of a torch.nn.RNN; b is the sum of its two biases."""
    op, end = "rnn_from_torch", _suffix("rnn_from_torch", layer, reverse)
    w_x = _array(op, state, f"weight_ih{end}", (None, None))
    N = w_x.shape[0]
    w_h = _array(op, state, f"weight_hh{end}", (N, N))
    b = None
    if _has(state, f"bias_ih{end}"):
        b = _array(op, state, f"bias_ih{end}", (N,)) + _array(op, state, f"bias_hh{end}", (N,))
    return RNNParams(w_x.T, w_h.T, b)


def rnn_to_torch(
    params: RNNParams, *, layer: int = 0, reverse: bool = False, gradients: bool = False
) -> dict[str, Array]:
    """One layer and direction of a torch.nn.RNN's state dict. bias_hh is 0; for gradients it equals bias_ih."""
    check_class("rnn_to_torch", "params", params, RNNParams)
    end = _suffix("rnn_to_torch", layer, reverse)
    state = {f"weight_ih{end}": params.w_x.T, f"weight_hh{end}": params.w_h.T}
    if params.b is not None:
        state |= {f"bias_ih{end}": params.b, f"bias_hh{end}": params.b if gradients else np.zeros_like(params.b)}
    return state


def rnn_from_onnx(W: Any, R: Any, B: Any = None, *, direction: int = 0) -> RNNParams:
    """One direction of an ONNX RNN: W (directions, N, M), R (directions, N, N), B (directions, 2 N) = [Wb, Rb].

    The second direction of a bidirectional node runs backwards in time: flip x before the call, and h after it.
    """
    op, state = "rnn_from_onnx", {"W": W, "R": R, "B": B}
    w_x = _array(op, state, "W", (None, None, None))
    directions, N = w_x.shape[:2]
    if check_integer(op, "direction", direction, least=0) >= directions:
        raise ValueError(f"{op}: direction is {direction}, expected less than {directions}: fixed by W")
    w_h, b = _array(op, state, "R", (directions, N, N)), None
    if B is not None:
        b = _array(op, state, "B", (directions, 2 * N))[direction].reshape(2, N).sum(0)
    return RNNParams(w_x[direction].T, w_h[direction].T, b)


def rnn_to_onnx(params: RNNParams, *, gradients: bool = False) -> dict[str, Array]:
    """W, R and B of an ONNX RNN of one direction. Rb is 0; for gradients it equals Wb. There is no B without biases."""
    check_class("rnn_to_onnx", "params", params, RNNParams)
    state = {"W": params.w_x.T[None], "R": params.w_h.T[None]}
    if params.b is not None:
        state["B"] = np.concatenate([params.b, params.b if gradients else np.zeros_like(params.b)])[None]
    return state


__all__ = [
    "multi_head_from_torch",
    "multi_head_to_torch",
    "rnn_from_onnx",
    "rnn_from_torch",
    "rnn_to_onnx",
    "rnn_to_torch",
]
