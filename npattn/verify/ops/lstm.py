"""The record of long short-term memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from npattn import convert
from npattn.ops.checks import Array
from npattn.ops.lstm import LSTMParams, lstm_backward, lstm_forward
from npattn.verify.op import Op
from npattn.verify.ops.layers import LayerCalls, Mistake, changes, zero
from npattn.verify.ops.recurrent import (
    GATE_SLOPE,
    RAGGED,
    WITH_NONE,
    Layer,
    backward,
    blocks,
    candidate,
    cases,
    forward,
    gate,
    logistic,
    mistakes_of,
    of_block,
    permuted,
    product_backward,
    reference,
    space_of,
    sum_of_products,
    tanh,
    tanh_slope,
)
from npattn.verify.stages import by_noise, no_inner_rounding

GATES = "ifgo"
LAYER = Layer("lstm", LSTMParams, 4, ("b",), ("h", "c"), lstm_forward, lstm_backward)
CASES = cases(LAYER, lambda case: [
    case("no c0", "initial state", without="c"),
    case("no h0", "initial state", without="h"),
    case("dc_last", "dc_last", last="c"),
    case("dc_last alone", "dc_last", last="c", dh=0.0),
    case("dc_last + lengths 0 and T", "dc_last", last="c", lengths=WITH_NONE),
    case("dh_last without dc_last", "dh_last", last="h", lengths=RAGGED),
    case("large cells", "hard inputs", state=30.0),
])  # fmt: skip


# --- equations (2) to (6) of `npattn.ops.lstm` -------------------------------------------------------------------------------


def _begin(x: Any) -> None:
    pass


def _step(x: Any) -> tuple[Array, Array]:
    x.product("m", x.old_h, x.used)
    x.sum_of_two("p", x.a_t, x.m)  # (2)
    gate(x, "gates", x.p)  # (3); its block g is not used
    for n, name in enumerate(GATES):
        if name != "g":
            x.keep(name, lambda n=n: x.gates[..., n * x.N : (n + 1) * x.N])
    tanh(x, "g", _block(x, "g"))  # (4)
    sum_of_products(x, "c", (x.f, x.old_c), (x.i, x.g))  # (5)
    tanh(x, "u", x.c)
    x.rounded("new", lambda: x.o * x.u)  # (6)
    x.saved.append({name: getattr(x, name) for name in ("old_c", "p", "i", "f", "g", "o", "c", "u", "new")})
    return x.new, x.c


def _step_backward(x: Any) -> None:
    vars(x).update(x.saved[x.t])
    x.keep("du", lambda: x.d * x.o)  # (6)
    tanh_slope(x, "slope_u", x.u)
    x.rounded("from_h", lambda: x.du * x.slope_u, 1.5)  # two products
    x.sum_of_two("dc", x.d_c, x.from_h)
    x.keep("di", lambda: x.dc * x.g)  # (5)
    x.keep("df", lambda: x.dc * x.old_c)  # (5)
    x.keep("dg", lambda: x.dc * x.i)  # (5)
    x.keep("do", lambda: x.d * x.u)  # (6)
    x.rounded("back_c", lambda: x.dc * x.f)  # (5)
    tanh_slope(x, "slope_g", x.g)
    for name in "ifo":
        x.keep(f"slope_{name}", lambda name=name: getattr(x, name) * (1 - getattr(x, name)))
    parts = ((getattr(x, f"d{name}"), getattr(x, f"slope_{name}")) for name in GATES)
    x.rounded("da", lambda: np.concatenate([d * slope for d, slope in parts], -1), GATE_SLOPE)  # (3), (4)
    x.keep("dr", lambda: x.da)
    product_backward(x, x.dr, x.used)  # (2)
    x.keep("back_h", lambda: x.back)


def _ones(x: Any, value: Array) -> Array:
    return np.ones_like(value)


def _block(x: Any, name: str) -> Array:
    """p of one gate."""
    return blocks(x.p, 4)[..., GATES.index(name), :]


def _gates(f: Any, slope: Any) -> Mistake:
    """The gates by another function; slope(p, its value). f None: the right one."""

    def value(x: Any, s: Any, name: str) -> Any:
        return f(_block(x, name))

    def slope_of(x: Any, _: Any, name: str) -> Any:
        return slope(_block(x, name), getattr(x, name))

    slopes: Mistake = {f"slope_{name}": partial(slope_of, name=name) for name in "ifo"}
    return slopes if f is None else slopes | {name: partial(value, name=name) for name in "ifo"}


_MISTAKES: dict[str, Mistake] = {
    **mistakes_of(LAYER),
    # forward
    **{f"columns in the order {order}": permuted(LAYER, GATES, order)
       for order in ("iofg", "ifog", "igfo", "figo", "fiog", "gifo", "ofig")},
    "forget gate + 1": {"f": lambda x, _: logistic(_block(x, "f") + 1)},
    "forget bias twice": {"b": of_block(LAYER, 1, lambda b: 2 * b), "db": of_block(LAYER, 1, lambda b: 2 * b)},
    "no forget gate": {"f": _ones},
    "f = 1 - i": {"f": lambda x, _: 1 - x.i, "df": zero, "di": lambda x, di: di - x.dc * x.old_c},
    "no input gate": {"i": _ones},
    "output gate forgotten": {"o": _ones},
    "cell state not carried": {"old_c": zero, "back_c": zero},
    "tanh of the cell state forgotten": {"u": lambda x, _: x.c, "slope_u": _ones},
    "output of the cell state before": {
        "u": lambda x, _: np.tanh(x.old_c), "from_h": zero, "back_c": lambda x, back: back + x.du * x.slope_u},
    "h is the cell state": {"new": lambda x, _: x.c, "do": zero, "from_h": lambda x, _: x.d},
    "candidate by the logistic function": {"g": lambda x, _: logistic(_block(x, "g")), "slope_g": lambda x, _: x.g * (1 - x.g)},
    "candidate without tanh": {"g": lambda x, _: _block(x, "g"), "slope_g": _ones},
    "gates by tanh": _gates(np.tanh, lambda p, s: 1 - s * s),
    "hard sigmoid": _gates(lambda p: np.clip(0.2 * p + 0.5, 0, 1), lambda p, s: np.where(np.abs(p) < 2.5, 0.2, 0)),
    "h_last and c_last exchanged": {
        "h_last": lambda x, _: x.final["c"], "c_last": lambda x, _: x.final["h"],
        "carry of h at the end": lambda x, _: x.dc_last, "carry of c at the end": lambda x, _: x.dh_last},
    "c_last is h_last": {"c_last": lambda x, _: x.final["h"], "carry of h at the end": lambda x, dh: dh + x.dc_last,
                         "carry of c at the end": zero},
    "h0 and c0 exchanged": {
        "h0": lambda x, h: x.problem.inputs["c0"][None], "c0": lambda x, c: x.problem.inputs["h0"][None],
        "finish": lambda x, d: d | {"dh0": d["dc0"], "dc0": d["dh0"]}},
    "c0 ignored": {"c0": zero, "dc0": zero},
    "c_last is 0 where the length is 0": {
        "c_last": lambda x, c: np.where(x.lengths[:, None] == 0, 0, c),
        "carry of c at the end": lambda x, carry: np.where(x.lengths[:, None] == 0, 0, carry)},
    # backward
    "dc_last ignored": {"carry of c at the end": zero},
    "dh_last and dc_last ignored": {"carry of h at the end": zero, "carry of c at the end": zero},
    "gradient of c not carried": {"back_c": zero},
    "gradient of c carried without f": {"back_c": lambda x, _: x.dc},
    "gradient of c carried by i": {"back_c": lambda x, _: x.dc * x.i},
    "gradient of c of the output alone": {"dc": lambda x, _: x.from_h},
    "gradient of c of the later steps alone": {"dc": lambda x, _: x.d_c},
    "gradient of c lost after the length": {"carry of c": lambda x, _: x.back_c},
    "o forgotten in the gradient of c": {"du": lambda x, _: x.d},
    "f by the new cell state": {"df": lambda x, _: x.dc * x.c},
    "o by the cell state without tanh": {"do": lambda x, _: x.d * x.c},
    "i and g exchanged in their gradients": {"di": lambda x, _: x.dc * x.i, "dg": lambda x, _: x.dc * x.g},
    "slope of tanh at c forgotten": {"slope_u": _ones},
    "slope 1 - c^2": {"slope_u": lambda x, _: 1 - x.c * x.c},
    "slope of the gates as that of tanh": _gates(None, lambda p, s: 1 - s * s),
    "slope of g as that of a gate": {"slope_g": lambda x, _: x.g * (1 - x.g)},
    **{f"slope of {n} forgotten": {f"slope_{n}": _ones} for n in GATES},
    **{f"{n} without a gradient": {f"d{n}": zero} for n in GATES},
    "slopes of i and f exchanged": {"slope_i": lambda x, _: x.f * (1 - x.f), "slope_f": lambda x, _: x.i * (1 - x.i)},
    "c0 of one step too few": {"dc0": lambda x, _: x.entering["c"]},
}  # fmt: skip


# --- the record --------------------------------------------------------------------------------------------------------------


def _to_onnx(params: LSTMParams) -> list[Any]:
    onnx = convert.lstm_to_onnx(params)
    return [onnx["W"], onnx["R"], onnx.get("B")]


def _one_bias(params: LSTMParams) -> LSTMParams:
    """torch and ONNX have two biases, and each gets the whole gradient. The conversion adds them, so the sum is halved."""
    return params if params.b is None else params._replace(b=params.b / 2)


def _from_onnx(found: dict[str, Any]) -> LSTMParams:
    return _one_bias(convert.lstm_from_onnx(found.pop("dW"), found.pop("dR"), found.pop("dB", None)))


LSTM = Op(
    name="lstm",
    outputs=("h", "h_last", "c_last"),
    axes={
        "h": "BTN", "h_last": "BN", "c_last": "BN", "dx": "BTM", "dh0": "BN", "dc0": "BN", "dw_x": "MN", "dw_h": "NN",
        "db": "N",
    },
    reference=partial(reference, LAYER),
    forward=partial(forward, LAYER, _begin, _step),
    backward=partial(backward, LAYER, _step_backward),
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(
        _MISTAKES, ("columns in the order iofg", "dc_last ignored", "gradient of c carried without f", "not carried")),
    cases=CASES,
    candidates={"lstm": partial(candidate, LAYER)},
    calls=LayerCalls(
        "forward(x, h0, c0, params, *, lengths) and backward(dh, x, h0, c0, params, *, lengths, dh_last, dc_last)",
        ("lengths",), ("dh_last", "dc_last"),
        to={"W": _to_onnx, "state_dict": lambda params: [convert.lstm_to_torch(params)]},
        back={"state_dict": lambda found: _one_bias(convert.lstm_from_torch(found.pop("state_dict"))), "dW": _from_onnx},
    ),
    space=space_of(LAYER, {
        "h0": {"h0 alone": {"without": "c"}, "c0 alone": {"without": "h"}},
        "cotangents": {"dc_last alone": {"last": "c", "dh": 0.0}},
        "inputs": {"large cells": {"state": 30.0}},
    }),
)  # fmt: skip
