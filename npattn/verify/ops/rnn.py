"""The record of the recurrent layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from npattn import convert
from npattn.ops.checks import Array
from npattn.ops.rnn import RNNParams, rnn_backward, rnn_forward
from npattn.tolerances import TANH_ULPS
from npattn.verify.op import Op
from npattn.verify.ops.layers import LayerCalls, Mistake, changes
from npattn.verify.ops.recurrent import (
    RAGGED,
    Layer,
    backward,
    candidate,
    cases,
    forward,
    mistakes_of,
    product_backward,
    reference,
    space_of,
    tanh_slope_error,
)
from npattn.verify.space import Row
from npattn.verify.stages import by_noise, no_inner_rounding

LAYER = Layer("rnn", RNNParams, 1, ("b",), ("h",), rnn_forward, rnn_backward)
CASES = cases(LAYER, lambda case: [
    case("relu", nonlinearity="relu"),
    case("relu + lengths + dh_last", "relu", nonlinearity="relu", lengths=RAGGED, last=True),
    case("float64 relu", "float64", dtype="float64", nonlinearity="relu"),
])  # fmt: skip


def _possible(row: Row) -> bool:
    """With large weights, or equal ones, relu grows without end."""
    large = row.get("inputs") == "saturated" or row.get("memory") == "strides of 0"
    return not (large and row.get("nonlinearity") == "relu")


# --- equations (2) and (3) of `npattn.ops.rnn` -------------------------------------------------------------------------------


def _begin(x: Any) -> None:
    x.keep("tanh", lambda: x.options.get("nonlinearity", "tanh") == "tanh")


def _step(x: Any) -> tuple[Array]:
    x.product("r", x.old_h, x.used)
    x.sum_of_two("z", x.a_t, x.r)  # (2)
    if x.tanh:
        return (x.rounded("new", lambda: np.tanh(x.z), TANH_ULPS),)  # (3)
    return (x.keep("new", lambda: np.where(x.z <= 0, 0, x.z)),)  # (3)


def _step_backward(x: Any) -> None:
    h = x.reached[x.t]
    if x.tanh:
        x.keep("slope", lambda: 1 - h * h, lambda _: tanh_slope_error(x, h[0]))
    else:
        x.keep("slope", lambda: np.where(h > 0, 1, 0 * h))
    x.rounded("dz", lambda: x.d * x.slope)  # (3)
    x.keep("da", lambda: x.dz)
    x.keep("dr", lambda: x.dz)
    product_backward(x, x.dr, x.used)  # (2)
    x.keep("back_h", lambda: x.back)


_MISTAKES: dict[str, Mistake] = {
    **mistakes_of(LAYER),
    # forward
    "input and state multiplied": {
        "z": lambda x, _: x.a_t * x.r, "da": lambda x, dz: dz * x.r_all[x.t], "dr": lambda x, dz: dz * x.a[:, :, x.t],
        "r": lambda x, r: _kept(x, r)},
    "relu for tanh, tanh for relu": {"tanh": lambda x, tanh: not tanh},
    "no nonlinearity": {"new": lambda x, _: x.z, "slope": lambda x, slope: np.ones_like(slope)},
    # backward
    "slope of the state before": {"slope": lambda x, _: _slope(x, x.states[:, :, x.t])},
    "slope 1 - h": {"slope": lambda x, _: 1 - x.states[:, :, x.t + 1]},
    "slope forgotten": {"slope": lambda x, slope: np.ones_like(slope)},
    "slope of the sum before the nonlinearity": {
        "z": lambda x, z: _kept(x, z, "z_all"), "slope": lambda x, _: _slope(x, x.z_all[x.t])},
    "dh times slope, carry without": {"dz": lambda x, dz: np.where(dz != 0, x.d_out * x.slope + x.d_state, 0)},
    "carry times slope, dh without": {"dz": lambda x, dz: np.where(dz != 0, x.d_out + x.d_state * x.slope, 0)},
}  # fmt: skip


def _kept(x: Any, value: Array, name: str = "r_all") -> Array:
    """The value; it is also stored for the backward, in a list by step."""
    if x.t == 0:
        setattr(x, name, [])
    getattr(x, name).append(value)
    return value


def _slope(x: Any, h: Array) -> Array:
    return np.asarray(1 - h * h if x.tanh else np.where(h > 0, 1, 0 * h))


# --- the record ------------------------------------------------------------------------------------------------------------


def _to_onnx(params: RNNParams) -> list[Any]:
    onnx = convert.rnn_to_onnx(params)
    return [onnx["W"], onnx["R"], onnx.get("B")]


def _one_bias(params: RNNParams) -> RNNParams:
    """torch and ONNX have two biases, and each gets the whole gradient. The conversion adds them, so the sum is halved."""
    return params if params.b is None else params._replace(b=params.b / 2)


def _from_onnx(found: dict[str, Any]) -> RNNParams:
    return _one_bias(convert.rnn_from_onnx(found.pop("dW"), found.pop("dR"), found.pop("dB", None)))


RNN = Op(
    name="rnn",
    outputs=("h", "h_last"),
    axes={"h": "BTN", "h_last": "BN", "dx": "BTM", "dh0": "BN", "dw_x": "MN", "dw_h": "NN", "db": "N"},
    reference=partial(reference, LAYER),
    forward=partial(forward, LAYER, _begin, _step),
    backward=partial(backward, LAYER, _step_backward),
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("initial state ignored", "w_h transposed", "lengths ignored", "not carried")),
    cases=CASES,
    candidates={"rnn": partial(candidate, LAYER)},
    calls=LayerCalls(
        "forward(x, h0, params, *, lengths, ...) and backward(dh, x, h0, params, *, lengths, ..., dh_last)",
        ("lengths", "nonlinearity"), ("dh_last",),
        to={"W": _to_onnx, "state_dict": lambda params: [convert.rnn_to_torch(params)]},
        back={"state_dict": lambda found: _one_bias(convert.rnn_from_torch(found.pop("state_dict"))), "dW": _from_onnx},
    ),
    space=space_of(LAYER, {"nonlinearity": {"tanh": {}, "relu": {"nonlinearity": "relu"}}}, _possible),
)  # fmt: skip
