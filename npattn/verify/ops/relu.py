"""The records of relu and squared relu."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.activations import relu_backward, relu_forward, squared_relu_backward, squared_relu_forward
from npattn.ops.checks import Array
from npattn.verify.op import Change, Op, Pair, Problem, Values
from npattn.verify.ops.layers import BATCH, SIZES, LayerCalls, Mistake, Rng, case, changes, normal, space, times, zero
from npattn.verify.space import Space, sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding

Function = Callable[..., Any]


def _numbers(
    op: str, rng: Rng, *, shape: tuple[int, ...] = (2, 5, 7), size: float = 1.0, shift: float = 0.0,
    put: tuple[float, ...] = (), put_dy: tuple[float, ...] = (),
) -> Problem:  # fmt: skip
    """put, put_dy : the first numbers of every row of x and of dy"""
    x, dy = size * normal(rng, *shape) + shift, normal(rng, *shape)
    for a, first in ((x, put), (dy, put_dy)):
        a[..., : len(first)] = first[: shape[-1]]
    return Problem(Op.known[op], {"x": x}, {}, {"dy": dy})


NAN: dict[str, dict[str, Any]] = {
    "relu": {"put": (np.nan, 1.0), "put_dy": (0.0, np.nan)},  # where x is NaN and dy is not 0, dx is dy in torch, 0 in jax
    "squared_relu": {"put": (np.nan, 1.0), "put_dy": (1.0, np.nan)},
}
"""NaN in x and in dy."""


def _cases(op: str) -> list[Any]:
    one = partial(case, op, partial(_numbers, op))
    return [
        one("plain"),
        *(one(f"rank {len(n)}", "rank", shape=n) for n in ((7,), (5, 7), (2, 3, 5, 7))),
        one("x100", "hard inputs", size=100.0),
        one("x1e15", "hard inputs", size=1e15),
        one("tiny", "hard inputs", size=1e-15),
        one("all below 0", shift=-20.0),
        one("all above 0", shift=20.0),
        one("around 6", shift=6.0),
        one("zeros", put=(0.0, -0.0, 0.0)),
        one("inf and -inf", "limits", put=(np.inf, -np.inf, 0.0)),
        one("NaN", "NaN containment", **NAN[op]),
        one("F = 1", "small sizes", shape=(2, 5, 1)),
        one("no rows", "empty", shape=(0, 7)),
        one("long", shape=(3, 4096)),
        one("float64", dtype="float64"),
        one("float64 x100", "float64", dtype="float64", size=100.0),
    ]


def _space(op: str) -> Space:
    def of_sizes(rng: Rng, *, B: int, L: int, F: int, rank: int = 3, **given: Any) -> Problem:
        return _numbers(op, rng, shape=(B, L, F)[3 - rank :], **given)

    return space(
        op, of_sizes, {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "F": sizes_of("F", SIZES)},
        {"rank": {"3": {}, "1": {"rank": 1}, "2": {"rank": 2}},
         "inputs": {"normal": {}, "x100": {"size": 100.0}, "x1e15": {"size": 1e15}, "tiny": {"size": 1e-15},
                    "all below 0": {"shift": -20.0}, "all above 0": {"shift": 20.0}, "around 6": {"shift": 6.0},
                    "zeros": {"put": (0.0,)}, "inf": {"put": (np.inf,)}, "NaN": NAN[op]}},
        lambda n: n.get("B", 1) * n.get("L", 1) * n.get("F", 1),
    )  # fmt: skip


def _reference(pair: tuple[Function, Function], p: Problem) -> Values:
    y, cache = pair[0](p.inputs["x"])
    return {"y": y, "dx": pair[1](p.cotangents["dy"], cache).x}


def _candidate(pair: tuple[Function, Function]) -> Pair:
    def forward(x: Array) -> Any:
        return pair[0](x)[0]

    def backward(dy: Array, x: Array) -> Any:
        return pair[1](dy, pair[0](x)[1]).x

    return forward, backward


# --- relu ------------------------------------------------------------------------------------------------------------------


def forward(x: Any) -> None:
    """Equation (6) of `npattn.ops.activations`."""
    x.input("x", x.problem.inputs["x"])
    x.rounded("y", lambda: np.where(x.x <= 0, 0, x.x))  # (6); NaN of NaN. It is exact, but its mistakes are rounded


def backward(x: Any) -> None:
    x.input("dy", x.problem.cotangents["dy"])
    x.keep("slope", lambda: np.where(x.x > 0, 1.0, 0.0))
    x.rounded("dx", lambda: np.where(x.slope == 0, 0, x.dy * x.slope))  # (6)


def _clipped(x: Any, y: Array) -> Array:
    return np.minimum(y, 6)


def _other_slope(below: float, at: float) -> Mistake:
    """Another slope for x < 0 and at 0, where y stays continuous."""
    return {"y": lambda x, y: np.where(x.x < 0, below * x.x, y),
            "slope": lambda x, s: np.where(x.x < 0, below, np.where(x.x == 0, at, s))}  # fmt: skip


_EVERY: dict[str, Mistake] = {  # of relu
    # forward
    "leaky, 0.01": _other_slope(0.01, 0.01),
    "|x|": _other_slope(-1.0, 0.0),
    "x": _other_slope(1.0, 1.0),
    "relu6": {"y": _clipped, "slope": lambda x, s: np.where(x.x < 6, s, 0)},
    "min for max": {"y": lambda x, _: np.minimum(x.x, 0), "slope": lambda x, _: (x.x < 0) * 1.0},
    "1 where x > 0": {"y": lambda x, _: (x.x > 0) * 1.0, "slope": zero},
    "elu": {"y": lambda x, y: np.where(x.x < 0, np.expm1(x.x), y), "slope": lambda x, s: np.where(x.x < 0, np.exp(x.x), s)},
    "NaN becomes 0": {"y": lambda x, _: np.where(x.x > 0, x.x, 0)},
    "x times 0 or 1": {"y": lambda x, _: x.x * (x.x > 0)},
    # backward
    "dy where dy > 0": {"slope": lambda x, _: np.where(x.dy > 0, 1.0, 0.0)},
    "dy where both are positive (guided)": {"slope": lambda x, s: np.where(x.dy > 0, s, 0.0)},
    "dy unchanged": {"slope": lambda x, s: 0 * s + 1},
    "dy where x < 0": {"slope": lambda x, _: np.where(x.x < 0, 1.0, 0.0)},
    "x for dy": {"dx": lambda x, _: x.y},
    "times x": {"slope": lambda x, s: s * x.y},
    "slope 0.01 below 0": {"slope": lambda x, s: np.where(x.x < 0, 0.01, s)},
    "slope -1 below 0": {"slope": lambda x, s: np.where(x.x < 0, -1.0, s)},
    "dy forgotten": {"dx": lambda x, _: x.slope},
    "no gradient": {"dx": zero},
}  # fmt: skip


def _slope_at_0(name: str, at: float) -> Change:
    """What the slope is at 0 is a convention: 0 in npattn, torch and jax."""
    return Change(name, {"slope": lambda x, s: np.where(x.x == 0, at, s)}, convention=True)


_AT_0 = {name: _slope_at_0(name, at) for name, at in (("slope 1 at 0", 1.0), ("slope 1/2 at 0", 0.5))}

RELU = Op(
    name="relu",
    outputs=("y",),
    axes={"y": "BHLF", "dx": "BHLF"},
    reference=partial(_reference, (relu_forward, relu_backward)),
    forward=forward,
    backward=backward,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_EVERY, ("leaky, 0.01", "dy unchanged")) | _AT_0,
    cases=_cases("relu"),
    candidates={"relu": partial(_candidate, (relu_forward, relu_backward))},
    calls=LayerCalls("forward(x) and backward(dy, x)", ()),
    space=_space("relu"),
)


# --- squared relu ----------------------------------------------------------------------------------------------------------


def forward_squared(x: Any) -> None:
    """Equation (7) of `npattn.ops.activations`."""
    x.input("x", x.problem.inputs["x"])
    x.keep("r", lambda: np.where(x.x <= 0, 0, x.x))
    x.rounded("y", lambda: x.r * x.r)  # (7)


def backward_squared(x: Any) -> None:
    x.input("dy", x.problem.cotangents["dy"])
    x.keep("slope", lambda: 2 * x.r)
    x.rounded("dx", lambda: np.where(x.dy == 0, 0, x.dy * x.slope))  # (7)


def _both(y: Function, slope: Function) -> Mistake:
    """Another function of x, and its slope."""
    return {"y": lambda x, _: y(x.x), "slope": lambda x, _: slope(x.x)}


_SQUARED: dict[str, Mistake] = {
    # forward
    "relu": {"y": lambda x, _: x.r, "slope": lambda x, _: (x.x > 0) * 1.0},
    "the square on both sides": _both(np.square, lambda x: 2 * x),
    "x |x|": _both(lambda x: x * np.abs(x), lambda x: 2 * np.abs(x)),
    "the square below 0": _both(lambda x: np.minimum(x, 0) ** 2, lambda x: 2 * np.minimum(x, 0)),
    "leaky, 0.01, then the square": _both(
        lambda x: np.where(x > 0, x, 0.01 * x) ** 2, lambda x: 2 * np.where(x > 0, x, 1e-4 * x)),
    "the cube": {"y": lambda x, _: x.r**3, "slope": lambda x, _: 3 * x.r**2},
    "half the square": {"y": times(lambda x: 0.5), "slope": times(lambda x: 0.5)},
    "relu6, then the square": {"y": lambda x, _: np.minimum(x.r, 6) ** 2, "slope": lambda x, s: np.where(x.x < 6, s, 0)},
    "NaN becomes 0": {"y": lambda x, y: np.where(x.x > 0, y, 0)},
    "the square before 0 or 1": {"y": lambda x, _: x.x * x.x * (x.x > 0)},
    # backward
    "2 forgotten": {"slope": times(lambda x: 0.5)},
    "2 x below 0, too": {"slope": lambda x, _: 2 * x.x},
    "2 |x|": {"slope": lambda x, _: 2 * np.abs(x.x)},
    "the slope of relu": {"slope": lambda x, _: (x.x > 0) * 1.0},
    "2 where x > 0": {"slope": lambda x, _: (x.x > 0) * 2.0},
    "2 y": {"slope": lambda x, _: 2 * x.y},
    "x^2": {"slope": lambda x, _: x.y},
    "3 x^2": {"slope": lambda x, _: 3 * x.y},
    "dy where dy > 0": {"slope": lambda x, s: np.where(x.dy > 0, s, 0)},
    "dy squared": {"dx": lambda x, dx: dx * x.dy},
    "dy forgotten": {"dx": lambda x, _: x.slope},
    "no gradient": {"dx": zero},
}  # fmt: skip

SQUARED_RELU = Op(
    name="squared_relu",
    outputs=("y",),
    axes={"y": "BHLF", "dx": "BHLF"},
    reference=partial(_reference, (squared_relu_forward, squared_relu_backward)),
    forward=forward_squared,
    backward=backward_squared,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_SQUARED, ("relu", "2 forgotten", "the square on both sides")),
    cases=_cases("squared_relu"),
    candidates={"squared_relu": partial(_candidate, (squared_relu_forward, squared_relu_backward))},
    calls=LayerCalls("forward(x) and backward(dy, x)", ()),
    space=_space("squared_relu"),
)
