"""The record of gelu."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.special import erfc

from npattn.ops.activations import gelu_backward, gelu_forward
from npattn.ops.checks import Array
from npattn.tolerances import EXP_ULPS, TANH_ULPS
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.ops.layers import (
    BATCH,
    SIZES,
    LayerCalls,
    Mistake,
    Rng,
    case,
    changes,
    normal,
    space,
    times,
    to_value,
    zero,
)
from npattn.verify.precision import round_to
from npattn.verify.space import sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding


def _numbers(
    rng: Rng, *, shape: tuple[int, ...] = (2, 5, 7), size: float = 1.0, shift: float = 0.0, put: tuple[float, ...] = (),
    approximate: str | None = None,
) -> Problem:  # fmt: skip
    """put: the first numbers of every row"""
    x = size * normal(rng, *shape) + shift
    x[..., : len(put)] = put
    options = {} if approximate is None else {"approximate": approximate}
    return Problem(Op.known["gelu"], {"x": x}, options, {"dy": normal(rng, *shape)})


_case = partial(case, "gelu", _numbers)
TANH = {"approximate": "tanh"}
CASES = [
    _case("plain"),
    _case("tanh", **TANH),
    _case("approximate none", "approximate", approximate="none"),
    *(_case(f"rank {len(n)}", "rank", shape=n) for n in ((7,), (5, 7), (2, 3, 5, 7))),
    _case("x3", "hard inputs", size=3.0),
    _case("tanh x3", "hard inputs", size=3.0, **TANH),
    _case("x100", "hard inputs", size=100.0),
    _case("tanh x100", "hard inputs", size=100.0, **TANH),
    _case("x1e15", "hard inputs", size=1e15),
    _case("tanh x1e15", "hard inputs", size=1e15, **TANH),
    _case("tiny", "hard inputs", size=1e-20),
    _case("tanh tiny", "hard inputs", size=1e-20, **TANH),
    _case("below 0", "hard inputs", shift=-3.0),
    _case("tanh below 0", "hard inputs", shift=-3.0, **TANH),
    _case("around the minimum", "hard inputs", size=1e-3, shift=-0.7517916),
    _case("tanh around the minimum", "hard inputs", size=1e-3, shift=-0.7524614, **TANH),
    _case("inf and -inf", "limits", put=(np.inf, -np.inf, 0.0)),
    _case("tanh inf and -inf", "limits", put=(np.inf, -np.inf, 0.0), **TANH),
    _case("NaN", "NaN containment", put=(np.nan,)),
    _case("tanh NaN", "NaN containment", put=(np.nan,), **TANH),
    _case("F = 1", "small sizes", shape=(2, 5, 1)),
    _case("no rows", "empty", shape=(0, 7)),
    _case("long", shape=(3, 4096)),
    _case("float64", dtype="float64"),
    _case("float64 tanh", "float64", dtype="float64", **TANH),
    _case("float64 x3", "float64", dtype="float64", size=3.0),
]


def _of_sizes(rng: Rng, *, B: int, L: int, F: int, rank: int = 3, **given: Any) -> Problem:
    return _numbers(rng, shape=(B, L, F)[3 - rank :], **given)


SPACE = space(
    "gelu", _of_sizes, {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "F": sizes_of("F", SIZES)},
    {"rank": {"3": {}, "1": {"rank": 1}, "2": {"rank": 2}},
     "approximate": {"not given": {}, "tanh": TANH, "none": {"approximate": "none"}},
     "inputs": {"normal": {}, "x3": {"size": 3.0}, "x100": {"size": 100.0}, "x1e15": {"size": 1e15}, "tiny": {"size": 1e-20},
                "below 0": {"shift": -3.0}, "around the minimum": {"size": 1e-3, "shift": -0.752},
                "inf": {"put": (np.inf,)}, "NaN": {"put": (np.nan,)}}},
    lambda n: n.get("B", 1) * n.get("L", 1) * n.get("F", 1),
)  # fmt: skip


def reference(p: Problem) -> Values:
    y, cache = gelu_forward(p.inputs["x"], **p.options)
    return {"y": y, "dx": gelu_backward(p.cotangents["dy"], cache).x}


def _normal_distribution(a: Array) -> Array:
    """(1 + erf(a)) / 2; of longdouble by the power series, which is exact to eps of 1, and by erfc of float64 far below 0."""
    low = erfc(-a.astype(np.float64)) / 2
    if a.dtype != np.longdouble:
        return np.asarray(low)
    term = np.where(np.abs(a) < 4, a, 0)
    square, total, n = term * term, term, 0
    while n < 100:
        n += 1
        term = term * square * 2 / (2 * n + 1)
        total = total + term
    pi = np.arctan(np.longdouble(1)) * 4
    return np.asarray(np.where(np.abs(a) < 4, np.longdouble(0.5) + np.exp(-square) * total / np.sqrt(pi), low))


def forward(x: Any) -> None:
    """Equations (3) to (5) of `npattn.ops.activations`."""
    x.input("x", x.problem.inputs["x"])
    x.keep("tanh", lambda: x.options.get("approximate", "none") == "tanh")
    x.keep("root", lambda: _root(x))  # what a becomes near 0, divided by x
    x.keep("cubic", lambda: 0.044715 if x.tanh else 0.0)
    x.rounded("a", lambda: x.root * (x.x + _product(x.x**3, x.cubic)), 2.0)
    x.keep("s", lambda: _distribution(x, x.a), lambda s: _error(x, s))  # (3), (4)
    x.rounded("y", lambda: _product(x.x, x.s))  # (5)


def backward(x: Any) -> None:
    x.input("dy", x.problem.cotangents["dy"])
    x.keep("three", lambda: 3.0)
    x.rounded("da", lambda: x.root * (1 + _product(x.x**2, x.three * x.cubic)), 2.0)
    x.keep("density", lambda: _density(x, x.a), lambda d: _density_error(x, d))
    x.rounded("ds", lambda: _product(_product(x.x, x.density), x.da), 3.0)  # (3) or (4)
    # The sum may begin with 1/2, as torch's does, and then has the rounding error of 1, but at most all of it is lost.
    x.keep("slope", lambda: x.s + x.ds, lambda _: np.minimum(x.unit, np.abs(x.s[0]) + np.abs(x.ds[0])))
    x.rounded("dx", lambda: x.dy * x.slope)  # (5)


def _root(x: Any) -> Any:
    """1 / sqrt 2, or sqrt(2 / pi), in the dtype of the run."""
    one = x.x.dtype.type(1)
    return np.sqrt(one / (2 * np.arctan(one)) if x.tanh else one / 2)


def _distribution(x: Any, a: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-2 * a)) if x.tanh else _normal_distribution(a))


def _density(x: Any, a: Array) -> Array:
    """The derivative of s by a."""
    return np.asarray(1 / np.cosh(a) ** 2 / 2 if x.tanh else np.exp(-a * a) / np.sqrt(4 * np.arctan(a.dtype.type(1))))


def _error(x: Any, s: Array) -> Array:
    """If s is computed as 1 + tanh or 1 + erf, it has the rounding error of 1, but at most all of it is lost."""
    return np.asarray(np.minimum((1 + TANH_ULPS / 2) * x.unit, s) + x.rounding.tiny)


def _density_error(x: Any, d: Array) -> Array:
    """exp of a square, which is rounded; or 1 - tanh^2, with the rounding error of 1, but at most all of it is lost."""
    error = np.minimum((1 + TANH_ULPS) * x.unit, d) if x.tanh else (EXP_ULPS + x.a[0] ** 2) * x.unit * d
    return np.asarray(error + x.rounding.tiny)


def _product(x: Array, s: Any) -> Array:
    """x s, where inf times 0 is 0, the limit."""
    return np.where((x == 0) | (s == 0), 0, x * s)


# --- mistakes --------------------------------------------------------------------------------------------------------------


def _logistic(x: Any, factor: float) -> Array:
    return np.asarray(1 / (1 + np.exp(-factor * x.x)))


def _gate(factor: float) -> Mistake:
    """x times a logistic function, as silu has it."""
    return {"s": lambda x, _: _logistic(x, factor),
            "ds": lambda x, _: _product(factor * x.x, x.s * _logistic(x, -factor))}  # fmt: skip


def _erf_only(change: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda x, v: v if x.tanh else change(x, v)


def _tanh_only(change: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda x, v: change(x, v) if x.tanh else v


def _slope(x: Any, v: Array, tanh: bool) -> Array:
    """The slope at v, by tanh or by erf."""
    y = SimpleNamespace(x=v, tanh=tanh)
    root, cubic = _root(y), 0.044715 if tanh else 0.0
    a, da = root * (v + _product(v**3, cubic)), root * (1 + _product(v**2, 3 * cubic))
    return np.asarray(_distribution(y, a) + _product(_product(v, _density(y, a)), da))


_MISTAKES: dict[str, Mistake] = {
    # forward
    "tanh for erf": {"tanh": to_value(True)},
    "erf for tanh": {"tanh": to_value(False)},
    "tanh unless approximate is given": {"tanh": lambda x, _: x.options.get("approximate", "tanh") == "tanh"},
    "a logistic function (1.702 x)": _gate(1.702),
    "silu": _gate(1.0),
    "relu": {"y": lambda x, _: np.maximum(x.x, 0), "slope": lambda x, _: (x.x > 0) * 1.0},
    "s without x": {"y": lambda x, _: x.s, "slope": lambda x, _: _product(x.density, x.da)},
    "erf without 1 / sqrt 2": {"root": _erf_only(lambda x, root: root * 0 + 1)},
    "tanh without sqrt(2 / pi)": {"root": _tanh_only(lambda x, root: root * 0 + 1)},
    "2 / pi without a root": {"root": _tanh_only(lambda x, root: root**2)},
    "0.044715 x^3 forgotten": {"cubic": zero},
    "0.44715 for 0.044715": {"cubic": times(lambda x: 10)},
    "x^2 for x^3": {"a": _tanh_only(lambda x, _: x.root * (x.x + x.cubic * x.x**2)),
                    "da": _tanh_only(lambda x, _: x.root * (1 + 2 * x.cubic * x.x))},
    "1/2 forgotten": {"s": times(lambda x: 2), "density": times(lambda x: 2)},
    "x of the other sign": {"a": lambda x, a: -a, "da": lambda x, da: -da},
    "-inf times 0 is NaN": {"y": lambda x, _: x.x * x.s},
    "inf times 0 is NaN in dx": {"ds": lambda x, _: x.x * x.density * x.da},
    "s in float16": {"s": lambda x, s: s.astype(np.float16).astype(s.dtype)},
    "s in bfloat16": {"s": lambda x, s: round_to(s, "bfloat16")},
    # backward
    "s alone": {"slope": lambda x, _: x.s},
    "the density's term alone": {"slope": lambda x, _: x.ds},
    "the density without x": {"ds": lambda x, _: _product(x.density, x.da)},
    "the density with the other sign": {"slope": lambda x, _: x.s - x.ds},
    "the density without 1 / sqrt(2 pi)": {"density": _erf_only(lambda x, d: d * math.sqrt(2 * math.pi))},
    "the density with 1 / sqrt pi": {"density": _erf_only(lambda x, d: d * math.sqrt(2))},
    "exp(-x^2) for exp(-x^2 / 2)": {"density": _erf_only(lambda x, d: d * np.exp(-x.a * x.a))},
    "1 for 3 in the derivative of x^3": {"three": to_value(1.0)},
    "the derivative of x^3 forgotten": {"three": zero},
    "1 - tanh^2 forgotten": {"density": _tanh_only(lambda x, d: 0 * d + 0.5)},
    "1 - tanh for 1 - tanh^2": {"density": _tanh_only(lambda x, _: (1 - np.tanh(x.a)) / 2)},
    "1 + tanh^2 for 1 - tanh^2": {"density": _tanh_only(lambda x, _: (1 + np.tanh(x.a) ** 2) / 2)},
    "the derivative of the argument forgotten": {"da": _tanh_only(lambda x, da: 0 * da + 1)},
    "dx by tanh": {"slope": lambda x, _: _slope(x, x.x, True)},
    "dx by erf": {"slope": lambda x, _: _slope(x, x.x, False)},
    "the slope of the output": {"slope": lambda x, _: _slope(x, x.y, x.tanh)},
    "dy forgotten": {"dx": lambda x, _: x.slope},
    "no gradient": {"dx": zero},
}  # fmt: skip


def _candidate() -> Pair:
    def forward(x: Array, **options: Any) -> Array:
        return gelu_forward(x, **options)[0]

    def backward(dy: Array, x: Array, **options: Any) -> Array:
        return gelu_backward(dy, gelu_forward(x, **options)[1]).x

    return forward, backward


GELU = Op(
    name="gelu",
    outputs=("y",),
    axes={"y": "BHLF", "dx": "BHLF"},
    reference=reference,
    forward=forward,
    backward=backward,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("tanh for erf", "erf for tanh", "s alone", "the density without x")),
    cases=CASES,
    candidates={"gelu": _candidate},
    calls=LayerCalls("forward(x, *, approximate) and backward(dy, x, *, approximate)", ("approximate",)),
    space=SPACE,
)
