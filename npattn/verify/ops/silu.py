"""The record of silu."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from npattn.ops.activations import silu_backward, silu_forward
from npattn.ops.checks import Array
from npattn.tolerances import EXP_ULPS
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.ops.layers import BATCH, SIZES, LayerCalls, Rng, case, changes, normal, space, zero
from npattn.verify.space import sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding


def _numbers(
    rng: Rng, *, shape: tuple[int, ...] = (2, 5, 7), size: float = 1.0, shift: float = 0.0, put: tuple[float, ...] = ()
) -> Problem:
    """put: the first numbers of every row"""
    x = size * normal(rng, *shape) + shift
    x[..., : len(put)] = put
    return Problem(Op.known["silu"], {"x": x}, {}, {"dy": normal(rng, *shape)})


_case = partial(case, "silu", _numbers)
CASES = [
    _case("plain"),
    *(_case(f"rank {len(n)}", "rank", shape=n) for n in ((7,), (5, 7), (2, 3, 5, 7))),
    _case("x5", "hard inputs", size=5.0),
    _case("x100", "hard inputs", size=100.0),
    _case("tiny", "hard inputs", size=1e-20),
    _case("far below 0", "hard inputs", shift=-80.0),
    _case("around the minimum", "hard inputs", size=1e-3, shift=-1.2784645),
    _case("inf and -inf", "limits", put=(np.inf, -np.inf, 0.0)),
    _case("NaN", "NaN containment", put=(np.nan,)),
    _case("F = 1", "small sizes", shape=(2, 5, 1)),
    _case("no rows", "empty", shape=(0, 7)),
    _case("long", shape=(3, 4096)),
    _case("float64", dtype="float64"),
    _case("float64 x5", "float64", dtype="float64", size=5.0),
]


def _of_sizes(rng: Rng, *, B: int, L: int, F: int, rank: int = 3, **given: Any) -> Problem:
    return _numbers(rng, shape=(B, L, F)[3 - rank :], **given)


SPACE = space(
    "silu", _of_sizes, {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "F": sizes_of("F", SIZES)},
    {"rank": {"3": {}, "1": {"rank": 1}, "2": {"rank": 2}},
     "inputs": {"normal": {}, "x5": {"size": 5.0}, "x100": {"size": 100.0}, "tiny": {"size": 1e-20},
                "far below 0": {"shift": -80.0}, "around the minimum": {"size": 1e-3, "shift": -1.2784645},
                "inf": {"put": (np.inf,)}, "NaN": {"put": (np.nan,)}}},
    lambda n: n.get("B", 1) * n.get("L", 1) * n.get("F", 1),
)  # fmt: skip


def reference(p: Problem) -> Values:
    y, cache = silu_forward(p.inputs["x"])
    return {"y": y, "dx": silu_backward(p.cotangents["dy"], cache).x}


def forward(x: Any) -> None:
    """Equations (1) and (2) of `npattn.ops.activations`."""
    x.input("x", x.problem.inputs["x"])
    x.keep("inside", lambda: x.x)
    x.keep("e", lambda: np.exp(-np.abs(x.inside)), lambda e: EXP_ULPS * x.unit * e + x.rounding.tiny)
    x.rounded("s", lambda: np.where(x.inside >= 0, 1, x.e) / (1 + x.e), 2.0)  # (1): a sum and a division
    # If t is computed as 1 - s, as torch does, it has the rounding error of s, but at most all of t is lost.
    x.keep("t", lambda: np.where(x.inside >= 0, x.e, 1) / (1 + x.e),
           lambda t: 2 * x.unit * t + np.minimum(2 * x.unit * x.s[0], t))  # fmt: skip
    x.rounded("y", lambda: _times(x.x, x.s))  # (2)


def backward(x: Any) -> None:
    x.input("dy", x.problem.cotangents["dy"])
    x.rounded("xt", lambda: _times(x.x, x.t))
    x.rounded("inner", lambda: 1 + x.xt)
    x.rounded("slope", lambda: np.where(x.s == 0, 0, x.s * x.inner))
    x.rounded("dx", lambda: x.dy * x.slope)


def _times(x: Array, s: Array) -> Array:
    """x s, where inf times 0 is 0, the limit."""
    return np.where(s == 0, 0, x * s)


_MISTAKES = {
    # forward
    "the logistic function alone": {"y": lambda x, _: x.s, "slope": lambda x, _: x.s * x.t},
    "x of the other sign in the exp": {"inside": lambda x, v: -v, "xt": lambda x, v: -v},
    "gelu by a logistic function (1.702 x)": {"inside": lambda x, v: 1.702 * v, "xt": lambda x, v: 1.702 * v},
    "relu": {"y": lambda x, _: np.maximum(x.x, 0), "slope": lambda x, _: (x.x > 0) * 1.0},
    "exp overflows": {"s": lambda x, s: np.where(np.isinf(np.exp(-x.x.astype(x.low))), np.nan, s)},
    "-inf times 0 is NaN": {"y": lambda x, _: x.x * x.s},
    # backward
    "s alone": {"slope": lambda x, _: x.s},
    "s (1 - s)": {"slope": lambda x, _: x.s * x.t},
    "1 - y for 1 - s": {"slope": lambda x, _: x.s * (1 + x.x * (1 - x.y))},
    "1 + x (1 - s) without s": {"slope": lambda x, _: x.inner},
    "x forgotten": {"slope": lambda x, _: x.s * (1 + x.t)},
    "the slope of the output": {"slope": lambda x, _: 1 / (1 + np.exp(-x.y))},
    "inf times 0 is NaN in dx": {"slope": lambda x, _: x.s * (1 + x.x * x.t)},
    "dy forgotten": {"dx": lambda x, _: x.slope},
    "no gradient": {"dx": zero},
}  # fmt: skip


def _candidate() -> Pair:
    def forward(x: Array) -> Array:
        return silu_forward(x)[0]

    def backward(dy: Array, x: Array) -> Array:
        return silu_backward(dy, silu_forward(x)[1]).x

    return forward, backward


SILU = Op(
    name="silu",
    outputs=("y",),
    axes={"y": "BHLF", "dx": "BHLF"},
    reference=reference,
    forward=forward,
    backward=backward,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("the logistic function alone", "s alone", "1 - y for 1 - s")),
    cases=CASES,
    candidates={"silu": _candidate},
    calls=LayerCalls("forward(x) and backward(dy, x)", ()),
    space=SPACE,
)
