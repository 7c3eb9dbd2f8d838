"""The record of the gated recurrent unit."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from npattn import convert
from npattn.ops.checks import Array
from npattn.ops.gru import GRUParams, gru_backward, gru_forward
from npattn.verify.op import Change, Op
from npattn.verify.ops.layers import LayerCalls, Mistake, changes, zero
from npattn.verify.ops.recurrent import (
    GATE_SLOPE,
    RAGGED,
    WITH_NONE,
    Layer,
    backward,
    candidate,
    cases,
    forward,
    gate,
    logistic,
    mistakes_of,
    permuted,
    product_backward,
    reference,
    space_of,
    sum_of_products,
    tanh,
    tanh_slope,
)
from npattn.verify.stages import by_noise, no_inner_rounding

GATES = "rzn"


def _factors(x: Any) -> list[tuple[Array, Array]]:
    """In the original form the columns of n are multiplied with r h."""
    n = 2 * x.N
    if x.after:
        return [(x.before, x.dr)]
    return [(x.before, x.dr[..., :n]), (np.stack([s["r"] for s in x.saved], 2) * x.before, x.dr[..., n:])]


LAYER = Layer("gru", GRUParams, 3, ("b_x", "b_h"), ("h",), gru_forward, gru_backward, _factors)
CASES = cases(LAYER, lambda case: [
    case("b_x alone", "bias", bias="b_x"),
    case("b_h alone", "bias", bias="b_h"),
    case("reset before the product", reset_after=False),
    case("reset before + lengths + dh_last", "reset before the product", reset_after=False, lengths=WITH_NONE, last=True),
    case("reset before, no bias", "reset before the product", reset_after=False, bias=False, lengths=RAGGED),
    case("float64 reset before", "float64", dtype="float64", reset_after=False),
])  # fmt: skip


# --- equations (2) to (5) of `npattn.ops.gru` --------------------------------------------------------------------------------


def _begin(x: Any) -> None:
    x.keep("after", lambda: x.options.get("reset_after", True))


def _step(x: Any) -> tuple[Array]:
    two, h, b = 2 * x.N, x.old_h, None if x.b_h is None else x.b_h[:, None]
    wide = slice(None if x.after else two)
    x.linear("m", h, x.used[..., wide], None if b is None else b[..., wide])  # (2)
    x.sum_of_two("p", x.a_t[..., :two], x.m[..., :two])
    gate(x, "gates", x.p)  # (3)
    x.keep("r", lambda: x.gates[..., : x.N])
    x.keep("z", lambda: x.gates[..., x.N :])
    if x.after:
        x.keep("m_n", lambda: x.m[..., two:])
        x.rounded("reset", lambda: x.r * x.m_n)
        x.sum_of_two("p_n", x.a_t[..., two:], x.reset)
    else:
        x.rounded("reset", lambda: x.r * h)
        x.linear("m_n", x.reset, x.used[..., two:], None if b is None else b[..., two:])  # (2')
        x.sum_of_two("p_n", x.a_t[..., two:], x.m_n)
    tanh(x, "n", x.p_n)  # (4)
    x.rounded("fresh", lambda: 1 - x.z)
    x.keep("stale", lambda: x.z)
    sum_of_products(x, "new", (x.fresh, x.n), (x.stale, h))  # (5)
    x.saved.append({name: getattr(x, name) for name in ("old_h", "r", "z", "m_n", "n", "p", "p_n", "fresh", "stale", "new")})
    return (x.new,)


def _step_backward(x: Any) -> None:
    two, d = 2 * x.N, x.d
    vars(x).update(x.saved[x.t])
    h = x.old_h
    x.keep("dn", lambda: d * x.fresh)  # (5)
    sum_of_products(x, "dz", (d, h), (-d, x.n))  # (5)
    x.rounded("direct", lambda: d * x.stale)  # (5)
    tanh_slope(x, "slope_n", x.n)
    x.rounded("dp_n", lambda: x.dn * x.slope_n, 1.5)  # (4); two products
    if x.after:
        x.rounded("dm_n", lambda: x.dp_n * x.r)
        x.keep("d_r", lambda: x.dp_n * x.m_n)
    else:
        x.keep("dm_n", lambda: x.dp_n)
        x.product("dreset", x.dm_n, x.used[..., two:].swapaxes(-1, -2))  # (2')
        x.rounded("through", lambda: x.dreset * x.r)
        x.keep("d_r", lambda: x.dreset * h)
    x.keep("slope_r", lambda: x.r * (1 - x.r))
    x.keep("slope_z", lambda: x.z * (1 - x.z))
    x.rounded("dp", lambda: np.concatenate([x.d_r * x.slope_r, x.dz * x.slope_z], -1), GATE_SLOPE)  # (3)
    x.keep("da", lambda: np.concatenate([x.dp, x.dp_n], -1))
    x.keep("dr", lambda: np.concatenate([x.dp, x.dm_n], -1))
    wide = slice(None if x.after else two)
    product_backward(x, x.dr[..., wide], x.used[..., wide])  # (2)
    x.sum_of_two("back_h", x.back, x.direct if x.after else x.direct + x.through)


def _outside(x: Any) -> Array:
    """The last block of b_h, where the form has it inside of the reset."""
    return np.asarray(x.b_h[:, None, 2 * x.N :] * (1.0 if x.after else np.nan))


def _ones(x: Any, value: Array) -> Array:
    return np.ones_like(value)


def _hard(p: Array) -> Array:
    return np.asarray(np.clip(0.2 * p + 0.5, 0, 1))


def _hard_slope(p: Array) -> Array:
    return np.asarray(np.where(np.abs(p) < 2.5, 0.2, 0))


def _sum(g: Array) -> Array:
    return np.asarray(g.sum((-3, -2)))


EXCHANGED = "z and 1 - z exchanged"
_MISTAKES: dict[str, Mistake] = {
    EXCHANGED: {"fresh": lambda x, _: x.z, "stale": lambda x, _: 1 - x.z, "dz": lambda x, dz: -dz},
    **mistakes_of(LAYER),
    # forward
    **{f"columns in the order {order}": permuted(LAYER, GATES, order) for order in ("zrn", "rnz", "znr", "nrz", "nzr")},
    "reset before the product for after, after for before": {"after": lambda x, after: not after},
    "hidden bias of n outside of the reset": {
        "m_n": lambda x, m: m - _outside(x), "p_n": lambda x, p: p + _outside(x),
        "db_h": lambda x, g: np.concatenate([g[..., : 2 * x.N], _sum(x.da)[..., 2 * x.N :]], -1)},
    "no reset": {"r": _ones},
    "no update gate": {"fresh": _ones, "stale": zero, "dz": zero},
    "the old state added whole": {"stale": _ones, "dz": lambda x, _: -x.d * x.n},
    "z h added to n": {"fresh": _ones, "dz": lambda x, _: x.d * x.old_h},
    "candidate by the logistic function": {"n": lambda x, _: logistic(x.p_n), "slope_n": lambda x, _: x.n * (1 - x.n)},
    "candidate without tanh": {"n": lambda x, _: x.p_n, "slope_n": _ones},
    "gates by tanh": {"gates": lambda x, _: np.tanh(x.p), "slope_r": lambda x, _: 1 - x.r * x.r,
                      "slope_z": lambda x, _: 1 - x.z * x.z},
    "hard sigmoid": {"gates": lambda x, _: _hard(x.p), "slope_r": lambda x, _: _hard_slope(x.p[..., : x.N]),
                     "slope_z": lambda x, _: _hard_slope(x.p[..., x.N :])},
    # backward
    "r without a gradient": {"d_r": zero},
    "z without a gradient": {"dz": zero},
    "z without the gradient through n": {"dz": lambda x, _: x.d * x.old_h},
    "z without the gradient through the old state": {"dz": lambda x, _: -x.d * x.n},
    "gradient of z of the other sign": {"dz": lambda x, dz: -dz},
    "gradients of z and 1 - z exchanged": {"dn": lambda x, _: x.d * x.stale, "direct": lambda x, _: x.d * x.fresh},
    "not carried by z": {"direct": zero},
    "carried by z alone": {"back": zero},
    "not carried through r h": {"through": zero},
    "r forgotten in the gradient of m_n": {"dm_n": lambda x, _: x.dp_n if x.after else x.no_such_stage},
    "gradient of r by the state": {"d_r": lambda x, _: x.dp_n * x.old_h},
    "gradient of r without the hidden bias": {"d_r": lambda x, _: x.dp_n * (x.m_n - _outside(x))},
    "slope of the gates as that of tanh": {"slope_r": lambda x, _: 1 - x.r * x.r, "slope_z": lambda x, _: 1 - x.z * x.z},
    "slopes of r and z exchanged": {"slope_r": lambda x, _: x.z * (1 - x.z), "slope_z": lambda x, _: x.r * (1 - x.r)},
    "slope of r forgotten": {"slope_r": _ones},
    "slope of z forgotten": {"slope_z": _ones},
    "slope of n as that of a gate": {"slope_n": lambda x, _: x.n * (1 - x.n)},
    "slope of n forgotten": {"slope_n": _ones},
    "slope of n by h": {"slope_n": lambda x, _: 1 - x.new * x.new},
    "the gradient of b_x as that of b_h": {"db_x": lambda x, _: _sum(x.dr)},
    "the gradient of b_h as that of b_x": {"db_h": lambda x, _: _sum(x.da)},
}  # fmt: skip


# --- the record --------------------------------------------------------------------------------------------------------------


def _to_onnx(params: GRUParams) -> list[Any]:
    onnx = convert.gru_to_onnx(params)
    return [onnx["W"], onnx["R"], onnx.get("B")]


def _changes() -> dict[str, Change]:
    found = changes(_MISTAKES, (EXCHANGED, "columns in the order zrn", "r without a gradient", "not carried by z"))
    exchanged = Change(EXCHANGED, _MISTAKES[EXCHANGED], convention=True, likely=True)
    return {**found, EXCHANGED: exchanged}


GRU = Op(
    name="gru",
    outputs=("h", "h_last"),
    axes={"h": "BTN", "h_last": "BN", "dx": "BTM", "dh0": "BN", "dw_x": "MN", "dw_h": "NN", "db_x": "N", "db_h": "N"},
    reference=partial(reference, LAYER),
    forward=partial(forward, LAYER, _begin, _step),
    backward=partial(backward, LAYER, _step_backward),
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=_changes(),
    cases=CASES,
    candidates={"gru": partial(candidate, LAYER)},
    calls=LayerCalls(
        "forward(x, h0, params, *, lengths, ...) and backward(dh, x, h0, params, *, lengths, ..., dh_last)",
        ("lengths", "reset_after"), ("dh_last",),
        to={"W": _to_onnx, "state_dict": lambda params: [convert.gru_to_torch(params)]},
        back={
            "state_dict": lambda found: convert.gru_from_torch(found.pop("state_dict")),
            "dW": lambda found: convert.gru_from_onnx(found.pop("dW"), found.pop("dR"), found.pop("dB", None)),
        },
    ),
    space=space_of(LAYER, {
        "b": {"b_x alone": {"bias": "b_x"}, "b_h alone": {"bias": "b_h"}},
        "reset_after": {"True": {}, "False": {"reset_after": False}},
    }),
)  # fmt: skip
