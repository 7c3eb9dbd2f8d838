"""The records of sigmoid and silu, of which the first is a factor of the second."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.activations import ACTIVATIONS
from npattn.ops.checks import Array
from npattn.tolerances import EXP_ULPS
from npattn.verify.op import Case, Op, Pair, Problem, Values
from npattn.verify.ops.layers import BATCH, SIZES, LayerCalls, Mistake, Rng, case, changes, normal, space, zero
from npattn.verify.space import Space, sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding


def _numbers(
    rng: Rng, *, op: str, shape: tuple[int, ...] = (2, 5, 7), size: float = 1.0, shift: float = 0.0, put: tuple[float, ...] = ()
) -> Problem:
    """put: the first numbers of every row"""
    x = size * normal(rng, *shape) + shift
    x[..., : len(put)] = put
    return Problem(Op.known[op], {"x": x}, {}, {"dy": normal(rng, *shape)})


HARD: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("around the minimum", {"size": 1e-3, "shift": -1.2784645}),
    "sigmoid": ("far above 0", {"shift": 20.0}),
}


def _cases(op: str) -> list[Case]:
    one, (hard, of_hard) = partial(case, op, partial(_numbers, op=op)), HARD[op]
    return [
        one("plain"),
        *(one(f"rank {len(n)}", "rank", shape=n) for n in ((7,), (5, 7), (2, 3, 5, 7))),
        one("x5", "hard inputs", size=5.0),
        one("x100", "hard inputs", size=100.0),
        one("tiny", "hard inputs", size=1e-20),
        one("far below 0", "hard inputs", shift=-80.0),
        one(hard, "hard inputs", **of_hard),
        one("inf and -inf", "limits", put=(np.inf, -np.inf, 0.0)),
        one("NaN", "NaN containment", put=(np.nan,)),
        one("F = 1", "small sizes", shape=(2, 5, 1)),
        one("no rows", "empty", shape=(0, 7)),
        one("long", shape=(3, 4096)),
        one("float64", dtype="float64"),
        one("float64 x5", "float64", dtype="float64", size=5.0),
    ]


def _of_sizes(op: str, rng: Rng, *, B: int, L: int, F: int, rank: int = 3, **given: Any) -> Problem:
    return _numbers(rng, op=op, shape=(B, L, F)[3 - rank :], **given)


def _space(op: str) -> Space:
    hard, of_hard = HARD[op]
    return space(
        op, partial(_of_sizes, op), {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "F": sizes_of("F", SIZES)},
        {"rank": {"3": {}, "1": {"rank": 1}, "2": {"rank": 2}},
         "inputs": {"normal": {}, "x5": {"size": 5.0}, "x100": {"size": 100.0}, "tiny": {"size": 1e-20},
                    "far below 0": {"shift": -80.0}, hard: of_hard, "inf": {"put": (np.inf,)}, "NaN": {"put": (np.nan,)}}},
        lambda n: n.get("B", 1) * n.get("L", 1) * n.get("F", 1),
    )  # fmt: skip


def reference(p: Problem) -> Values:
    forward, backward = ACTIVATIONS[p.op.name]
    y, cache = forward(p.inputs["x"])
    return {"y": y, "dx": backward(p.cotangents["dy"], cache).x}


def sigmoid_forward(x: Any) -> None:
    """Equation (1) of `npattn.ops.activations`."""
    logistic(x)
    x.keep("y", lambda: x.s)


def sigmoid_backward(x: Any) -> None:
    x.input("dy", x.problem.cotangents["dy"])
    x.rounded("slope", lambda: x.s * x.t)
    # Below 0 the product may be below every normal number, which a processor may take for 0, as jax's does.
    x.keep("dx", lambda: x.dy * x.slope, lambda dx: x.unit * np.abs(dx) + x.rounding.tiny)


def silu_forward(x: Any) -> None:
    """Equations (1) and (2)."""
    logistic(x)
    x.rounded("y", lambda: _times(x.x, x.s))  # (2)


def silu_backward(x: Any) -> None:
    x.input("dy", x.problem.cotangents["dy"])
    x.rounded("xt", lambda: _times(x.x, x.t))
    x.rounded("inner", lambda: 1 + x.xt)
    x.rounded("slope", lambda: np.where(x.s == 0, 0, x.s * x.inner))
    x.rounded("dx", lambda: x.dy * x.slope)


def logistic(x: Any) -> None:
    """s of (1), and t = 1 - s."""
    x.input("x", x.problem.inputs["x"])
    x.keep("inside", lambda: x.x)
    x.keep("e", lambda: np.exp(-np.abs(x.inside)), lambda e: EXP_ULPS * x.unit * e + x.rounding.tiny)
    x.rounded("s", lambda: np.where(x.inside >= 0, 1, x.e) / (1 + x.e), 2.0)  # (1): a sum and a division
    # If t is computed as 1 - s, as torch does, it has the rounding error of s, but at most all of t is lost.
    x.keep("t", lambda: np.where(x.inside >= 0, x.e, 1) / (1 + x.e),
           lambda t: 2 * x.unit * t + np.minimum(2 * x.unit * x.s[0], t))  # fmt: skip


def _times(x: Array, s: Array) -> Array:
    """x s, where inf times 0 is 0, the limit."""
    return np.where(s == 0, 0, x * s)


_OF_SILU = {
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


_OF_SIGMOID = {
    # forward
    "tanh(x)": {"y": lambda x, _: np.tanh(x.x), "slope": lambda x, _: 1 - np.tanh(x.x) ** 2},
    "tanh(x) for tanh(x / 2)": {"inside": lambda x, v: 2 * v, "slope": lambda x, v: 2 * v},
    "the other sign in the exp": {"inside": lambda x, v: -v, "slope": lambda x, v: -v},
    "hard sigmoid, clip(x / 6 + 1/2)": {
        "y": lambda x, _: np.clip(x.x / 6 + 0.5, 0, 1), "slope": lambda x, _: (np.abs(x.x) < 3) / 6.0},
    "hard sigmoid, clip(0.2 x + 1/2)": {
        "y": lambda x, _: np.clip(0.2 * x.x + 0.5, 0, 1), "slope": lambda x, _: (np.abs(x.x) < 2.5) * 0.2},
    "silu": {"y": lambda x, _: np.where(x.s == 0, 0, x.x * x.s),
             "slope": lambda x, _: np.where(x.s == 0, 0, x.s * (1 + np.where(x.t == 0, 0, x.x * x.t)))},
    "its logarithm": {"y": lambda x, _: np.log(x.s), "slope": lambda x, _: x.t},
    "exp overflows": {"s": lambda x, s: np.where(np.isinf(np.exp(-x.x.astype(x.low))), np.nan, s)},
    # backward
    "s alone": {"slope": lambda x, _: x.s},
    "1 - s alone": {"slope": lambda x, _: x.t},
    "s (1 - x)": {"slope": lambda x, _: x.s * (1 - x.x)},
    "1 - s^2, as of tanh": {"slope": lambda x, _: 1 - x.s**2},
    "the slope at the output": {"slope": lambda x, _: np.exp(-x.y) / (1 + np.exp(-x.y)) ** 2},
    "dy forgotten": {"dx": lambda x, _: x.slope},
    "no gradient": {"dx": zero},
}  # fmt: skip


def _candidate(op: str) -> Pair:
    of_cache, backward_of_cache = ACTIVATIONS[op]

    def forward(x: Array) -> Array:
        return of_cache(x)[0]

    def backward(dy: Array, x: Array) -> Array:
        return backward_of_cache(dy, of_cache(x)[1]).x  # type: ignore[no-any-return]

    return forward, backward


def _op(
    name: str, forward: Callable[[Any], None], backward: Callable[[Any], None], mistakes: dict[str, Mistake],
    likely: tuple[str, ...],
) -> Op:  # fmt: skip
    return Op(
        name=name, outputs=("y",), axes={"y": "BHLF", "dx": "BHLF"}, reference=reference, forward=forward,
        backward=backward, truth=by_noise, undefined=no_inner_rounding, changes=changes(mistakes, likely),
        cases=_cases(name), candidates={name: partial(_candidate, name)},
        calls=LayerCalls("forward(x) and backward(dy, x)", ()), space=_space(name),
    )  # fmt: skip


SILU = _op("silu", silu_forward, silu_backward, _OF_SILU, ("the logistic function alone", "s alone", "1 - y for 1 - s"))
SIGMOID = _op("sigmoid", sigmoid_forward, sigmoid_backward, _OF_SIGMOID, ("tanh(x) for tanh(x / 2)", "silu", "s alone"))
