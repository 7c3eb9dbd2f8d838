"""The records of the feed-forward layer, plain and gated."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy.special import erfc

from npattn import convert
from npattn.ops.allowed import swap
from npattn.ops.checks import Array
from npattn.ops.feed_forward import FeedForwardParams, feed_forward_backward, feed_forward_forward
from npattn.tolerances import EXP_ULPS
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.ops.layers import (
    BATCH,
    SIZES,
    LayerCalls,
    Mistake,
    Rng,
    by_sequence,
    case,
    changes,
    normal,
    of_first_sequence,
    of_params,
    plain_outer,
    space,
    sum_of_first_sequence,
    to_value,
    tokens_differ,
    weight,
    zero,
)  # fmt: skip
from npattn.verify.space import Space, sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding

# --- activations ------------------------------------------------------------------------------------------------------------


class Activated(NamedTuple):
    """f(z) and f'(z), and the rounding errors of both.

    In what comes near 0, such as 1 - s, 1 - tanh^2 or 1 + erf, a rounding of 1 may be lost, but at most all of it: these
    formulas are common, and right.
    """

    value: Array
    slope: Array
    value_error: Array
    slope_error: Array


def _logistic(z: Array) -> Array:
    e = np.exp(-np.abs(z))
    return np.asarray(np.where(z < 0, e, 1) / (1 + e))


def _silu(z: Array, unit: float) -> Activated:
    s, t = _logistic(z), _logistic(-z)
    lost = np.abs(z) * s * np.minimum(unit, t)
    return Activated(z * s, s * (1 + z * t), EXP_ULPS * unit * np.abs(z) * s, EXP_ULPS * unit * s * (1 + np.abs(z) * t) + lost)


def _gelu(z: Array, unit: float) -> Activated:
    s, density = erfc(-z.astype(np.float64) / math.sqrt(2)).astype(z.dtype) / 2, np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    # What exp and erf get is rounded: that counts z^2 times.
    error = EXP_ULPS * unit * (s + np.abs(z) * density) + np.minimum(unit, s)
    lost = unit * np.abs(z**3) * density + np.minimum(unit, np.abs(z) * density)  # torch's slope at -9 is 0
    return Activated(z * s, s + z * density, np.abs(z) * error, error + lost)


def _gelu_tanh(z: Array, unit: float) -> Activated:
    root = math.sqrt(2 / math.pi)
    u, du = 2 * root * (z + 0.044715 * z**3), 2 * root * (1 + 3 * 0.044715 * z * z)
    s, t = _logistic(u), _logistic(-u)
    error = EXP_ULPS * unit * s * (1 + t * np.abs(u)) + np.minimum(unit, s)
    lost = np.abs(z) * du * (EXP_ULPS * unit * s * t * (1 + np.abs(u)) + np.minimum(unit, s * t))
    return Activated(z * s, s + z * du * s * t, np.abs(z) * error, error + lost)


def _relu(z: Array, unit: float) -> Activated:
    return Activated(np.where(z <= 0, 0, z), np.where(z > 0, 1.0, 0 * z), 0 * z, 0 * z)


def _squared_relu(z: Array, unit: float) -> Activated:
    r = np.where(z <= 0, 0, z)
    return Activated(r * r, 2 * r, unit * r * r, 0 * z)


def _sigmoid(z: Array, unit: float) -> Activated:
    s, t = _logistic(z), _logistic(-z)
    return Activated(s, s * t, EXP_ULPS * unit * s, s * (EXP_ULPS * unit * t + np.minimum(unit, t)))


def _identity(z: Array, unit: float) -> Activated:
    return Activated(z, 1 + 0 * z, 0 * z, 0 * z)


ACTIVATED: dict[str, Callable[[Array, float], Activated]] = {
    "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": _relu, "squared_relu": _squared_relu, "silu": _silu, "sigmoid": _sigmoid,
}  # fmt: skip


# --- problems ---------------------------------------------------------------------------------------------------------------


def _feed_forward(
    rng: Rng, op: str = "feed_forward", *, lead: tuple[int, ...] = (3, 5), M: int = 6, F: int = 12, N: int | None = None,
    activation: str = "gelu", biases: tuple[str, ...] = ("in", "out"), size: float = 1.0, spoilt: float | None = None,
    dead: float | None = None,
) -> Problem:  # fmt: skip
    """A problem of the feed-forward layer, N is M_out. spoilt : what a number of the first token is; dead : and its dy is 0"""
    N = M if N is None else N
    x, dy = size * normal(rng, *lead, M), normal(rng, *lead, N)
    w_in, w_gate, w_out = weight(rng, M, F), weight(rng, M, F), weight(rng, F, N)
    b_in, b_gate, b_out = (0.5 * normal(rng, n) if name in biases else None for name, n in (("in", F), ("gate", F), ("out", N)))
    if spoilt is not None:
        x[(0,) * x.ndim] = spoilt
    if dead is not None:
        x[(0,) * x.ndim], dy[(0,) * len(lead)] = dead, 0
    params = FeedForwardParams(w_in, w_out, b_in, b_out, *((w_gate, b_gate) if op.startswith("gated") else ()))
    return Problem(Op.known[op], {"x": x, "params": params}, {"activation": activation}, {"dy": dy})


def _gated(rng: Rng, *, activation: str = "silu", biases: tuple[str, ...] = (), **given: Any) -> Problem:
    return _feed_forward(rng, "gated_feed_forward", activation=activation, biases=biases, **given)


def _cases(op: str, draw: Callable[..., Problem], first: str, biases: dict[str, tuple[str, ...]]) -> list[Any]:
    _case = partial(case, op, draw)
    return [
        _case("plain"),
        *(_case(name, "activation", activation=name) for name in ACTIVATED if name != first),
        *(_case(name, "biases", biases=some) for name, some in biases.items()),
        *(_case(f"rank {len(lead) + 1}", "rank", lead=lead) for lead in ((), (5,), (2, 3, 5))),
        _case("M_out of another width", "widths", N=9),
        _case("M = F", "square", F=6),
        _case("F = 1", "small sizes", F=1),
        _case("M = 1", "small sizes", M=1),
        _case("no tokens", "empty", lead=(0, 5)),
        _case("x10", "hard inputs", size=10.0),
        _case("tiny", "hard inputs", size=1e-15),
        _case("NaN", "NaN containment", spoilt=np.nan),
        _case("NaN in a dead token", "NaN containment", dead=np.nan),
        _case("F = 256", "long", F=256),
        _case("float64", dtype="float64"),
        _case("float64 silu", "float64", dtype="float64", activation="silu"),
        _case("float64 relu", "float64", dtype="float64", activation="relu"),
    ]


BIASES = {"no biases": (), "b_in alone": ("in",), "b_out alone": ("out",)}
CASES = _cases("feed_forward", _feed_forward, "gelu", BIASES)
GATED_BIASES = {"all biases": ("in", "out", "gate"), "b_in alone": ("in",), "b_out alone": ("out",), "b_gate alone": ("gate",)}
GATED_CASES = _cases("gated_feed_forward", _gated, "silu", GATED_BIASES)


def _space(op: str, draw: Callable[..., Problem], first: str, biases: dict[str, tuple[str, ...]]) -> Space:
    def of_sizes(rng: Rng, *, B: int, L: int, M: int, F: int, N: int, rank: int = 3, **given: Any) -> Problem:
        return draw(rng, lead=(B, L)[3 - rank :], M=M, F=F, N=N, **given)

    return space(
        op, of_sizes,
        {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "M": sizes_of("M", SIZES), "F": sizes_of("F", SIZES),
         "M_out": {"M": ({"N": "M"},), **sizes_of("N", SIZES)}},
        {"rank": {"3": {}, "1": {"rank": 1}, "2": {"rank": 2}},
         "activation": {name: {"activation": name} for name in (first, *(n for n in ACTIVATED if n != first))},
         "biases": {"usual": {}, **{name: {"biases": some} for name, some in biases.items()}},
         "inputs": {"normal": {}, "x10": {"size": 10.0}, "tiny": {"size": 1e-6}, "NaN": {"spoilt": np.nan},
                    "NaN in a dead token": {"dead": np.nan}}},
        lambda n: n.get("B", 1) * n.get("L", 1) * (n.get("M", 1) + 3 * n.get("F", 1) + n.get("N", 1)),
        tokens_differ, ("NaN in a dead token",),
    )  # fmt: skip


def reference(p: Problem) -> Values:
    y, cache = feed_forward_forward(**p.inputs, **p.options)
    return {"y": y, **_gradients(p.cotangents["dy"], cache)}


def _gradients(dy: Array, cache: Any) -> Values:
    g = feed_forward_backward(dy, cache)
    return {"dx": g.x, **of_params(g.params)}


_PARTS = {"in": "da", "gate": "du", "out": "dy"}  # what the gradients of the parameters of each product are made of

# --- the equations ----------------------------------------------------------------------------------------------------------


def forward(x: Any) -> None:
    """Equations (1) to (4) of `npattn.ops.feed_forward`."""
    given, params = x.problem.inputs["x"], x.problem.inputs["params"]
    x.input("x", by_sequence(given))
    for name, p in params._asdict().items():
        x.input(name, p)
    x.gated = params.w_gate is not None
    x.keep("act", lambda: ACTIVATED[x.options["activation"]])
    x.linear("a", x.x, x.w_in[:, None], _row(x.b_in))  # (1)
    if x.gated:
        x.linear("u", x.x, x.w_gate[:, None], _row(x.b_gate))  # (2)
    x.keep("exchanged", lambda: False)  # whether the value goes through f, and the gate does not
    x.keep("z", lambda: x.u if x.gated and not x.exchanged else x.a)  # what goes through f
    x.keep("f", lambda: x.act(x.z, 0).value, lambda _: x.act(x.z[0], x.unit).value_error)
    x.keep("other", lambda: (x.a, x.u)[x.exchanged] if x.gated else 1.0)
    x.rounded("h", lambda: x.f * x.other, 1.0 if x.gated else 0.0)  # (3)
    x.linear("rows", x.h, x.w_out[:, None], _row(x.b_out))  # (4)
    x.keep("y", lambda: x.rows.reshape(len(x.rows), *given.shape[:-1], x.rows.shape[-1]))


def _row(b: Any) -> Any:
    return None if b is None else b[:, None, None]


def backward(x: Any) -> None:
    given = x.problem.inputs["x"]
    x.input("dy", by_sequence(x.problem.cotangents["dy"]))
    x.outer("dw_out", x.keep("h in the backward", lambda: x.h), x.dy)  # (4)
    x.product("dh", x.dy, swap(x.w_out)[:, None])
    x.keep("slope", lambda: x.act(x.z, 0).slope, lambda _: x.act(x.z[0], x.unit).slope_error)
    x.rounded("df", lambda: _times(x.dh, x.other), 1.0 if x.gated else 0.0)  # (3)
    x.rounded("dz", lambda: _times(x.df, x.slope))
    x.da = x.dz
    if x.gated:
        x.rounded("dother", lambda: _times(x.dh, x.f))
        x.da, x.du = (x.dz, x.dother) if x.exchanged else (x.dother, x.dz)
    back = x.product("back from a", x.da, swap(x.w_in)[:, None])  # (1)
    x.outer("dw_in", x.x, x.da)
    if x.gated:
        from_u = x.product("back from u", x.du, swap(x.w_gate)[:, None])  # (2)
        x.outer("dw_gate", x.x, x.du)
        back = x.sum_of_two("back", back, from_u)
    x.keep("dx", lambda: back.reshape(len(back), *given.shape))
    for name, terms in _PARTS.items():
        if getattr(x, f"b_{name}") is not None:
            x.total(f"db_{name}", getattr(x, terms), (-3, -2))


def _times(d: Array, x: Any) -> Array:
    """d x, and 0 where d is 0, whatever x is."""
    return np.where(d == 0, 0, d * x)


# --- mistakes ---------------------------------------------------------------------------------------------------------------


def _named(x: Any) -> Callable[[Array, float], Activated]:
    """The right activation."""
    return ACTIVATED[x.options["activation"]]


def _instead(of: Callable[[Array, float], Activated]) -> Mistake:
    return {"act": lambda x, _: of}


def _after(x: Any, rows: Array) -> Array:
    x.before = rows
    return _named(x)(rows, 0).value


def _product_slope(x: Any) -> Array:
    return _named(x)(x.z * x.other, 0).slope


def _tokens(x: Any) -> float:
    return float(max(math.prod(x.dy.shape[1:3]), 1))


_MISTAKES: dict[str, Mistake] = {
    # forward
    **{f"{name} for the activation": _instead(of) for name, of in ACTIVATED.items()},
    "no activation": _instead(_identity),
    "activation after the second product": {
        **_instead(_identity), "rows": _after, "dy": lambda x, dy: dy * _named(x)(x.before, 0).slope},
    "x added to y": {"y": lambda x, y: y + x.x.reshape(y.shape), "dx": lambda x, dx: dx + x.dy.reshape(dx.shape)},
    # backward
    "slope forgotten": {"slope": lambda x, s: np.ones_like(s)},
    "slope of f(z)": {"slope": lambda x, _: x.act(x.f, 0).slope},
    "dx by w_in, not its transpose": {"back from a": lambda x, _: x.da @ x.w_in[:, None]},
    "w_out by what stands before the activation": {"h in the backward": lambda x, _: x.z},
    "NaN of a dead token reaches the parameters": {
        "dz": lambda x, _: x.df * x.slope, "df": lambda x, _: x.dh * x.other, "dother": lambda x, _: x.dh * x.f,
        "dw_out": lambda x, _: plain_outer(x.h, x.dy), "dw_in": lambda x, _: plain_outer(x.x, x.da),
        "dw_gate": lambda x, _: plain_outer(x.x, x.du)},
    "x without a gradient": {"dx": zero},
}  # fmt: skip

_GATED_MISTAKES: dict[str, Mistake] = {
    # forward
    "gate and value exchanged": {"exchanged": to_value(True)},
    "activation of both branches": {
        "other": lambda x, other: x.act(other, 0).value,
        "dother": lambda x, d: d * x.act(x.u if x.exchanged else x.a, 0).slope},
    "activation of the product of both branches": {
        **_instead(_identity), "h": lambda x, h: _named(x)(h, 0).value, "dh": lambda x, dh: dh * _product_slope(x)},
    "gate and value added": {
        "h": lambda x, _: x.f + x.other, "df": lambda x, _: x.dh, "dother": lambda x, _: x.dh},
    "gate forgotten": {"f": lambda x, f: np.ones_like(f), "slope": zero},
    "value forgotten": {"other": lambda x, other: np.ones_like(other), "dother": zero},
    # backward
    "slope of the value": {"slope": lambda x, _: x.act(x.other, 0).slope},
    "gate's gradient by the gate": {"df": lambda x, _: _times(x.dh, x.f)},
    "gate's gradient without the value": {"df": lambda x, _: x.dh},
    "value's gradient without the gate": {"dother": lambda x, _: x.dh},
    "value's gradient by the gate before the activation": {"dother": lambda x, _: _times(x.dh, x.z)},
    "dx of the gate missing": {"back from u": zero},
    "dx of the value missing": {"back from a": zero},
    "w_out by f(u) without the value": {"h in the backward": lambda x, _: x.f},
    "gradients of w_in and w_gate exchanged": {"finish": lambda x, d: d | {"dw_in": d["dw_gate"], "dw_gate": d["dw_in"]}},
}  # fmt: skip


def _of_parameters(*parts: str) -> dict[str, Mistake]:
    """Mistakes that any of the products can have."""
    inputs = {"in": "x", "gate": "x", "out": "h"}
    return {
        **{f"b_{n} forgotten": {f"b_{n}": zero, f"db_{n}": zero} for n in parts},
        **{f"w_{n} of the first sequence": {f"dw_{n}": of_first_sequence(inputs[n], _PARTS[n])} for n in parts},
        **{f"w_{n} a mean over the tokens": {f"dw_{n}": lambda x, g: g / _tokens(x)} for n in parts},
        **{f"b_{n} of the first sequence": {f"db_{n}": sum_of_first_sequence(_PARTS[n])} for n in parts},
        **{f"b_{n} a mean over the tokens": {f"db_{n}": lambda x, g: g / _tokens(x)} for n in parts},
        **{f"{w}_{n} without a gradient": {f"d{w}_{n}": zero} for n in parts for w in "wb"},
    }


# --- the record -------------------------------------------------------------------------------------------------------------


def _candidate() -> Pair:
    def forward(x: Array, params: FeedForwardParams, *, activation: str) -> Array:
        return feed_forward_forward(x, params, activation=activation)[0]

    def backward(dy: Array, x: Array, params: FeedForwardParams, *, activation: str) -> Values:
        return _gradients(dy, feed_forward_forward(x, params, activation=activation)[1])

    return forward, backward


def _record(name: str, cases: list[Any], drawn: Space, mistakes: dict[str, Mistake], **calls: Any) -> Op:
    return Op(
        name=name,
        outputs=("y",),
        axes={
            "y": "KBLN", "dx": "KBLM", "dw_in": "MF", "db_in": "F", "dw_gate": "MF", "db_gate": "F", "dw_out": "FN",
            "db_out": "N",
        },
        reference=reference,
        forward=forward,
        backward=backward,
        truth=by_noise,
        undefined=no_inner_rounding,
        changes=changes(mistakes, ("gate and value exchanged", "no activation", "slope forgotten")),
        cases=cases,
        candidates={name: _candidate},
        calls=LayerCalls(
            "forward(x, params, *, activation) and backward(dy, x, params, *, activation)", ("activation",), **calls
        ),
        space=drawn,
    )  # fmt: skip


FEED_FORWARD = _record(
    "feed_forward", CASES, _space("feed_forward", _feed_forward, "gelu", BIASES), {**_MISTAKES, **_of_parameters("in", "out")},
    to={"w_in": lambda params: list(params[:4])},
)  # fmt: skip
GATED_FEED_FORWARD = _record(
    "gated_feed_forward", GATED_CASES, _space("gated_feed_forward", _gated, "silu", GATED_BIASES),
    {**_MISTAKES, **_GATED_MISTAKES, **_of_parameters("in", "gate", "out")},
    to={"w_in": list, "state_dict": lambda params: [convert.feed_forward_to_llama(params)]},
    back={"state_dict": lambda found: convert.feed_forward_from_llama(found.pop("state_dict"))},
)  # fmt: skip
