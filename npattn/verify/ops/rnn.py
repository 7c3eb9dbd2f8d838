"""The record of the recurrent layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn import convert
from npattn.ops.allowed import swap
from npattn.ops.checks import Array
from npattn.ops.rnn import RNNParams, rnn_backward, rnn_forward
from npattn.tolerances import TANH_ULPS
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.ops.layers import (
    BATCH,
    SIZES,
    LayerCalls,
    Mistake,
    Rng,
    Route,
    adjoint,
    case,
    changes,
    exchanged,
    normal,
    of_first_sequence,
    of_params,
    plain_outer,
    same,
    space,
    sum_of_first_sequence,
    times,
    to_value,
    weight,
    zero,
)  # fmt: skip
from npattn.verify.space import sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding


def _recurrent(
    rng: Rng, *, B: int = 3, T: int = 13, M: int = 6, N: int = 10, state: float | None = 1.0, bias: bool = True,
    lengths: tuple[int, ...] | None = None, last: bool = False, dh: float = 1.0, nonlinearity: str = "tanh",
    weights: float = 1.0, inputs: float = 1.0, behind: float | None = None,
) -> Problem:  # fmt: skip
    """A problem of the recurrent layer.

    state : the size of h0; last : whether dh_last is given; behind : what x holds after the end of each sequence
    """
    x = inputs * normal(rng, B, T, M)
    w_x, w_h, b = weights * weight(rng, M, N), 0.9 * weights * weight(rng, N, N), 0.5 * normal(rng, N)
    h0, dh_all, dh_last = normal(rng, B, N), dh * normal(rng, B, T, N), normal(rng, B, N)
    options: dict[str, Any] = {} if lengths is None else {"lengths": np.array(lengths)}
    if nonlinearity != "tanh":
        options["nonlinearity"] = nonlinearity
    if behind is not None:
        x[np.arange(T) >= options["lengths"][:, None]] = behind
    params = RNNParams(w_x, w_h, b if bias else None)
    given = {"x": x, "h0": None if state is None else state * h0, "params": params}
    return Problem(Op.known["rnn"], given, options, {"dh": dh_all} | ({"dh_last": dh_last} if last else {}))


_case = partial(case, "rnn", _recurrent)
RAGGED, WITH_NONE = (9, 13, 4), (5, 0, 13)
CASES = [
    _case("plain"),
    _case("no initial state", "initial state", state=None),
    _case("initial state 0", "initial state", state=0.0),
    _case("no bias", "bias", bias=False),
    _case("relu", nonlinearity="relu"),
    _case("relu + lengths + dh_last", "relu", nonlinearity="relu", lengths=RAGGED, last=True),
    _case("lengths", lengths=RAGGED),
    _case("lengths 0 and T", "lengths", lengths=WITH_NONE),
    _case("lengths of 1", "lengths", lengths=(1, 1, 1)),
    _case("lengths of T", "lengths", lengths=(13, 13, 13)),
    _case("NaN after the length", "NaN containment", lengths=RAGGED, behind=np.nan),
    _case("inf after the length", "NaN containment", lengths=WITH_NONE, behind=np.inf, last=True),
    _case("dh_last", last=True),
    _case("dh_last alone", "dh_last", last=True, dh=0.0),
    _case("dh_last + lengths", "dh_last", last=True, lengths=RAGGED),
    _case("dh_last + lengths 0 and T", "dh_last", last=True, lengths=WITH_NONE),
    _case("dh_last, no bias, no initial state", "dh_last", last=True, bias=False, state=None),
    _case("T = 1", "small sizes", T=1),
    _case("T = 2", "small sizes", T=2),
    _case("B = 1", "small sizes", B=1),
    _case("M = 1", "small sizes", M=1),
    _case("N = 1", "small sizes", N=1),
    _case("M = N", "small sizes", M=10),
    _case("B = T = M = N", "small sizes", B=5, T=5, M=5, N=5),
    _case("N = 96", "long", M=64, N=96),
    _case("long", "long", T=200),
    _case("long + lengths", "long", T=200, lengths=(200, 150, 3), last=True),
    _case("long, dh_last alone", "long", T=200, last=True, dh=0.0),
    _case("saturated", "hard inputs", inputs=5.0, weights=2.0),
    _case("inputs tiny", "hard inputs", inputs=1e-3, state=1e-3),
    _case("float64", dtype="float64"),
    _case("float64 lengths + dh_last", "float64", dtype="float64", lengths=WITH_NONE, last=True),
    _case("float64 relu", "float64", dtype="float64", nonlinearity="relu"),
]


ENDS: dict[str, Callable[[Rng, int, int], Array | None]] = {
    "T": lambda rng, B, T: None, "some": lambda rng, B, T: rng.integers(1, T + 1, B), "1": lambda rng, B, T: np.ones(B, int),
    "0 and T": lambda rng, B, T: np.where(np.arange(B) % 2 == 0, 0, T), "all T": lambda rng, B, T: np.full(B, T),
}  # fmt: skip


def _of_sizes(rng: Rng, *, B: int, T: int, M: int, N: int, ends: str = "T", **given: Any) -> Problem:
    lengths = ENDS[ends](rng, B, T)
    return _recurrent(rng, B=B, T=T, M=M, N=N, lengths=None if lengths is None else tuple(lengths.tolist()), **given)


def _possible(row: dict[str, str]) -> bool:
    """What stands behind a sequence needs a length. With large weights, or equal ones, relu grows without end."""
    inputs = row.get("inputs", "normal")
    behind, large = inputs.endswith("behind"), inputs == "saturated" or row.get("memory") == "strides of 0"
    return not (behind and row.get("lengths") == "none") and not (large and row.get("nonlinearity") == "relu")


SPACE = space(
    "rnn", _of_sizes,
    {"B": sizes_of("B", BATCH), "T": sizes_of("T", {**SIZES, "above 200": (201,)}), "M": sizes_of("M", SIZES),
     "N": sizes_of("N", SIZES)},
    {"lengths": {"none": {}, **{n: {"ends": n} for n in ("some", "1", "0 and T", "all T")}},
     "h0": {"given": {}, "none": {"state": None}, "0": {"state": 0.0}}, "b": {"given": {}, "none": {"bias": False}},
     "cotangents": {"dh": {}, "dh_last": {"last": True}, "dh_last alone": {"last": True, "dh": 0.0}},
     "nonlinearity": {"tanh": {}, "relu": {"nonlinearity": "relu"}},
     "inputs": {"normal": {}, "saturated": {"inputs": 5.0, "weights": 2.0}, "tiny": {"inputs": 1e-3},
                "NaN behind": {"behind": np.nan}, "inf behind": {"behind": np.inf}}},
    lambda n: n.get("B", 1) * n.get("T", 1) * (200 + n.get("N", 1) * (n.get("M", 1) + n.get("N", 1)) / 64),
    _possible,
)  # fmt: skip


def reference(p: Problem) -> Values:
    h, cache = rnn_forward(**p.inputs, **p.options)
    return {"h": h, "h_last": cache.h_last, **_gradients(p.cotangents["dh"], cache, p.cotangents.get("dh_last"))}


def _gradients(dh: Array, cache: Any, dh_last: Any) -> Values:
    g = rnn_backward(dh, cache, dh_last)
    return {"dx": g.x, "dh0": g.h0, **of_params(g.params)}


def forward(x: Any) -> None:
    """Equations (1) to (3) of `npattn.ops.rnn`."""
    inputs, params = x.problem.inputs, x.problem.inputs["params"]
    (B, T, _), N = inputs["x"].shape, params.w_h.shape[0]
    x.keep("tanh", lambda: x.options.get("nonlinearity", "tanh") == "tanh")
    x.input("x", inputs["x"])
    x.input("h0", np.zeros((B, N), inputs["x"].dtype) if inputs["h0"] is None else inputs["h0"])
    for name, p in params._asdict().items():
        x.input(name, p)
    x.keep("w_h as used", lambda: same)
    x.used = getattr(x, "w_h as used")(x.w_h)
    lengths = x.options.get("lengths")
    x.keep("lengths", lambda: np.full(B, T) if lengths is None else np.asarray(lengths))
    x.keep("valid", lambda: np.arange(T) < x.lengths[:, None])
    valid = x.valid[..., None]
    x.keep("shown", lambda: valid)  # where the output is the new state; elsewhere it is 0, or with ``repeat`` the last state
    x.keep("moves", lambda: valid)  # where the state is the new one; elsewhere it stays
    x.keep("repeat", lambda: False)
    x.keep("biased", lambda: np.ones((T, 1)))
    x.keep("steps", lambda: same)
    x.keep("xs", lambda: np.where(x.shown | x.moves, x.steps(x.x), 0))
    b = None if x.b is None else (x.b[:, None, None] * x.biased).astype(inputs["x"].dtype)
    x.linear("a", x.xs, x.w_x[:, None], b)  # (1)
    states, outs, x.reached = [x.h0], [], []
    for t in range(T):
        x.t, h = t, states[-1]
        x.product("r", h, x.used)
        x.sum_of_two("z", x.a[:, :, t], x.r)  # (2)
        if x.tanh:
            new = x.rounded("new", lambda: np.tanh(x.z), TANH_ULPS)  # (3)
        else:
            new = x.keep("new", lambda: np.where(x.z <= 0, 0, x.z))  # (3)
        outs.append(np.where(x.shown[:, t], new, h if x.repeat else 0))
        x.reached.append(np.where((x.shown | x.moves)[:, t], new, h))
        states.append(np.where(x.moves[:, t], new, h))
    x.states = np.stack(np.broadcast_arrays(*states), 2)  # (.., B, T + 1, N)
    x.keep("arrange", lambda: same)
    x.keep("h", lambda: x.arrange(np.stack(outs, 2)))
    x.keep("h_last", lambda: states[-1])


def backward(x: Any) -> None:
    """The backward, from (3) to (1), back through time."""
    inputs, params = x.problem.inputs, x.problem.inputs["params"]
    (B, T, _), N = inputs["x"].shape, params.w_h.shape[0]
    last = x.problem.cotangents.get("dh_last")
    x.input("dh_last", np.zeros_like(inputs["x"], shape=(B, N)) if last is None else last)
    carry = x.keep("start of the carry", lambda: x.dh_last)
    x.input("dh_", x.problem.cotangents["dh"])
    x.keep("dh", lambda: adjoint(x.arrange, x.dh_.shape, x.dh_))
    shown, moves = x.keep("shown in the backward", lambda: x.shown), x.keep("moves in the backward", lambda: x.moves)
    da, dr = [], []
    for t in reversed(range(T)):
        x.t, h = t, x.reached[t]
        if x.tanh:
            x.keep("slope", lambda h=h: 1 - h * h, lambda _, h=h: _slope_error(x, h[0]))
        else:
            x.keep("slope", lambda h=h: np.where(h > 0, 1, 0 * h))
        x.d_out, x.d_state = np.where(shown[:, t], x.dh[:, :, t], 0), np.where(moves[:, t], carry, 0)
        both = x.sum_of_two("both", x.d_out, x.d_state)
        x.rounded("dz", lambda t=t, both=both: np.where((shown | moves)[:, t], both * x.slope, 0))  # (3)
        da.append(x.keep("da", lambda: x.dz))
        dr.append(x.keep("dr", lambda: x.dz))
        x.product("back", x.dr, swap(x.used))  # (2)
        x.entering = carry
        carry = np.where(moves[:, t], 0, carry) + x.back
        if x.repeat:
            carry = carry + np.where(shown[:, t], 0, x.dh[:, :, t])
        carry = x.keep("carry", lambda carry=carry: carry)
    x.da, x.dr = (np.stack(np.broadcast_arrays(*each[::-1]), 2) for each in (da, dr))
    x.product("dxs", x.da, swap(x.w_x)[:, None])
    x.keep("dx", lambda: adjoint(x.steps, (len(x.da), *inputs["x"].shape), x.dxs))
    taken = x.keep("xs in the backward", lambda: np.where(shown | moves, x.steps(x.x), 0))
    x.outer("dw_x", taken, x.da)  # (1)
    dw = x.outer("dw_h as used", x.keep("before", lambda: x.states[:, :, :T]), x.dr)
    x.keep("dw_h", lambda: adjoint(getattr(x, "w_h as used"), (len(dw), N, N), dw))  # (2)
    x.total("db", x.da * x.biased, (-3, -2))  # (1)
    x.keep("dh0", lambda: carry)


def _slope_error(x: Any, h: Array) -> Array:
    return np.asarray(x.unit * np.hypot(h * h, 1 - h * h))


# -- the recurrent layer


def _last_of_outputs(x: Any, value: Array) -> Array:
    return np.asarray(x.h[:, :, -1])


def _next_input(x: Any, route: Route) -> Route:
    """Step t takes the input of step t + 1; the last step takes its own."""
    return lambda a: a[:, :, np.minimum(np.arange(a.shape[2]) + 1, a.shape[2] - 1)]


def _turned(a: Array) -> Array:
    return np.flip(a, 2)


def _swapped_memory(a: Array) -> Array:
    """An array that lies in memory as (T, B, N), read as (B, T, N)."""
    result: Array = a.swapaxes(1, 2).reshape(a.shape)
    return result


def _not_first(x: Any, biased: Array) -> Array:
    return np.where(np.arange(len(biased))[:, None] == 0, 0, biased)


def _dh_with_last(x: Any, dh: Array) -> Array:
    dh = dh.copy()
    dh[:, :, -1] += x.dh_last
    return dh


def _every_step(x: Any, value: Array) -> Array:
    return np.ones_like(value)


def _lengths(change: Callable[[Array, int], Array]) -> Mistake:
    return {"lengths": lambda x, n: change(n, x.x.shape[2])}


_LAST_OF_T: Mistake = {  # the gradient of the last state goes to the last output
    "h_last": _last_of_outputs, "dh": lambda x, dh: _dh_with_last(x, dh) if "dh_last" in x.problem.cotangents else dh,
    "start of the carry": zero,
}  # fmt: skip

_MISTAKES: dict[str, Mistake] = {
    # forward
    "initial state ignored": {"h0": zero, "dh0": zero},
    "lengths ignored": _lengths(lambda n, T: np.full_like(n, T)),
    "lengths of the first sequence": _lengths(lambda n, T: np.full_like(n, n[0])),
    "one step too many": _lengths(lambda n, T: n + 1),
    "one step too few": _lengths(lambda n, T: n - 1),
    "sequences padded in front": {"valid": lambda x, valid: valid[:, ::-1]},
    "no bias in the first step": {"biased": _not_first},
    "b forgotten": {"b": zero, "db": zero},
    "b added twice": {"b": times(lambda x: 2), "db": times(lambda x: 2)},
    "input and state multiplied": {
        "z": lambda x, _: x.a[:, :, x.t] * x.r, "da": lambda x, dz: dz * x.r_all[x.t],
        "dr": lambda x, dz: dz * x.a[:, :, x.t], "r": lambda x, r: _kept(x, r)},
    "w_h transposed": {"w_h as used": to_value(swap)},
    "w_x transposed": {"w_x": lambda x, w: swap(w), "finish": lambda x, d: d | {"dw_x": swap(d["dw_x"])}},
    "w_x and w_h exchanged": exchanged("w_x", "w_h"),
    "input of the next step": {"steps": _next_input},
    "time runs backwards": {"steps": to_value(_turned), "arrange": to_value(_turned)},
    "output goes on after the length": {"shown": _every_step},
    "last state repeated after the length": {"repeat": to_value(True)},
    "state goes on after the length": {"moves": _every_step},
    "h_last of step T": _LAST_OF_T,
    "h_last is 0 where the length is 0": {
        "h_last": lambda x, h: np.where(x.lengths[:, None] == 0, 0, h),
        "start of the carry": lambda x, carry: np.where(x.lengths[:, None] == 0, 0, carry)},
    "h_last of the first step": {"h_last": lambda x, _: x.h[:, :, 0]},
    "time and batch swapped": {"arrange": to_value(_swapped_memory)},
    "relu for tanh, tanh for relu": {"tanh": lambda x, tanh: not tanh},
    "no nonlinearity": {"new": lambda x, _: x.z, "slope": lambda x, slope: np.ones_like(slope)},
    "state not carried in the forward": {"r": zero, "dr": zero},
    # backward
    "dh_last ignored": {"start of the carry": zero},
    "dh ignored": {"dh": zero},
    "dh_last at step T": {"start of the carry": zero, "dh": _dh_with_last},
    "slope of the state before": {"slope": lambda x, _: _slope(x, x.states[:, :, x.t])},
    "slope 1 - h": {"slope": lambda x, _: 1 - x.states[:, :, x.t + 1]},
    "slope forgotten": {"slope": lambda x, slope: np.ones_like(slope)},
    "slope of the sum before the nonlinearity": {
        "z": lambda x, z: _kept(x, z, "z_all"), "slope": lambda x, _: _slope(x, x.z_all[x.t])},
    "steps after the length take part": {"shown in the backward": _every_step, "moves in the backward": _every_step},
    "dh times slope, carry without": {"dz": lambda x, dz: np.where(dz != 0, x.d_out * x.slope + x.d_state, 0)},
    "carry times slope, dh without": {"dz": lambda x, dz: np.where(dz != 0, x.d_out + x.d_state * x.slope, 0)},
    "carried by w_h, not its transpose": {"back": lambda x, _: x.dr @ x.w_h},
    "not carried": {"back": zero},
    "carry lost after the length": {"carry": lambda x, _: x.back},
    "carry added up": {"carry": lambda x, carry: carry + x.entering},
    "w_h by the new state": {"before": lambda x, _: x.states[:, :, 1:]},
    "= for += in w_h": {"dw_h": lambda x, _: plain_outer(x.before[:, :, :1], x.dr[:, :, :1])},
    "= for += in w_x": {"dw_x": lambda x, _: plain_outer(x.xs[:, :, :1], x.da[:, :, :1])},
    **{f"{n} without a gradient": {f"d{n}": zero} for n in ("w_x", "w_h", "b", "h0", "x")},
    **{f"gradient of {w} transposed": {f"d{w}": lambda x, g: swap(g)} for w in ("w_x", "w_h")},
    "w_x of the first sequence": {"dw_x": of_first_sequence("xs", "da")},
    "w_h of the first sequence": {"dw_h": of_first_sequence("before", "dr")},
    "w_h without the initial state": {"before": lambda x, h: np.where(np.arange(h.shape[2])[:, None] == 0, 0, h)},
    "b of the first sequence": {"db": sum_of_first_sequence("da")},
    "b of the last step alone": {"db": lambda x, _: x.da[:, :, -1].sum(-2)},
    "b a mean": {"db": lambda x, g: g / np.prod(x.da.shape[1:3])},
    "b summed over the steps alone, a mean over the batch": {"db": lambda x, g: g / x.da.shape[1]},
    "h0 of one step too few": {"dh0": lambda x, _: x.entering},
    "dx a step late": {"dx": lambda x, dx: np.roll(dx, 1, 2)},
    "dx a step early": {"dx": lambda x, dx: np.roll(dx, -1, 2)},
    "by w_x, not its transpose": {"dxs": lambda x, _: x.da @ x.w_x[:, None]},
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


def _candidate() -> Pair:
    def forward(x: Array, h0: Any, params: Any, **options: Any) -> tuple[Array, Array]:
        h, cache = rnn_forward(x, h0, params, **options)
        return h, cache.h_last

    def backward(dh: Array, x: Array, h0: Any, params: Any, *, dh_last: Any = None, **options: Any) -> Values:
        return _gradients(dh, rnn_forward(x, h0, params, **options)[1], dh_last)

    return forward, backward


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
    reference=reference,
    forward=forward,
    backward=backward,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("initial state ignored", "w_h transposed", "lengths ignored", "not carried")),
    cases=CASES,
    candidates={"rnn": _candidate},
    calls=LayerCalls(
        "forward(x, h0, params, *, lengths, ...) and backward(dh, x, h0, params, *, lengths, ..., dh_last)",
        ("lengths", "nonlinearity"), ("dh_last",),
        to={"W": _to_onnx, "state_dict": lambda params: [convert.rnn_to_torch(params)]},
        back={"state_dict": lambda found: _one_bias(convert.rnn_from_torch(found.pop("state_dict"))), "dW": _from_onnx},
    ),
    space=SPACE,
)  # fmt: skip
