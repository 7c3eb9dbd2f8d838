"""The record of the linear layer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.allowed import swap
from npattn.ops.checks import Array
from npattn.ops.linear import LinearParams, linear_backward, linear_forward
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.ops.layers import (
    BATCH,
    SIZES,
    LayerCalls,
    Mistake,
    Rng,
    adjoint,
    by_sequence,
    case,
    changes,
    normal,
    of_first_sequence,
    of_params,
    plain_outer,
    same,
    space,
    sum_of_first_sequence,
    times,
    to_value,
    tokens_differ,
    weight,
    zero,
)  # fmt: skip
from npattn.verify.space import sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding


def _linear(
    rng: Rng, *, lead: tuple[int, ...] = (3, 5), M: int = 6, N: int = 10, bias: bool = True, size: float = 1.0,
    shift: float = 0.0, spoilt: float | None = None, dead: float | None = None,
) -> Problem:  # fmt: skip
    """A problem of the linear layer. spoilt : what a number of the first token is; dead : likewise, and its dy is 0"""
    x, dy = size * normal(rng, *lead, M) + shift, normal(rng, *lead, N)
    params = LinearParams(weight(rng, M, N), normal(rng, N) if bias else None)
    if x.size:
        if spoilt is not None:
            x[(0,) * x.ndim] = spoilt
        if dead is not None:
            x[(0,) * x.ndim], dy[(0,) * len(lead)] = dead, 0
    return Problem(Op.known["linear"], {"x": x, "params": params}, {}, {"dy": dy})


_case = partial(case, "linear", _linear)
CASES = [
    _case("plain"),
    _case("no bias", "bias", bias=False),
    *(_case(f"rank {len(lead) + 1}", "rank", lead=lead) for lead in ((), (5,), (2, 3, 5))),
    _case("M = N", "square", M=7, N=7),
    _case("M = N, no bias", "square", M=7, N=7, bias=False),
    _case("B = L = M = N", "square", lead=(5, 5), M=5, N=5),
    _case("M = 1", "small sizes", M=1),
    _case("N = 1", "small sizes", N=1),
    _case("one token", "small sizes", lead=(1, 1)),
    _case("no tokens", "empty", lead=(0, 5)),
    _case("mean 100", "hard inputs", shift=100.0),
    _case("x1e15", "hard inputs", size=1e15),
    _case("tiny", "hard inputs", size=1e-20),
    _case("NaN", "NaN containment", spoilt=np.nan),
    _case("inf", "NaN containment", spoilt=np.inf),
    _case("NaN in a dead token", "NaN containment", dead=np.nan),
    _case("inf in a dead token", "NaN containment", dead=np.inf),
    _case("M = 500", "long", lead=(2, 3), M=500),
    _case("many tokens", "long", lead=(2, 500)),
    _case("float64", dtype="float64"),
    _case("float64 M = N", "float64", dtype="float64", M=7, N=7),
]


def _of_sizes(rng: Rng, *, B: int, L: int, M: int, N: int, rank: int = 3, **given: Any) -> Problem:
    return _linear(rng, lead=(B, L)[3 - rank :], M=M, N=N, **given)


SPACE = space(
    "linear", _of_sizes,
    {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "M": sizes_of("M", SIZES),
     "N": {**sizes_of("N", SIZES), "M": ({"N": "M"},)}},
    {"rank": {"3": {}, "1": {"rank": 1}, "2": {"rank": 2}}, "b": {"given": {}, "none": {"bias": False}},
     "inputs": {"normal": {}, "mean 100": {"shift": 100.0}, "x1e15": {"size": 1e15}, "tiny": {"size": 1e-20},
                "NaN": {"spoilt": np.nan}, "NaN in a dead token": {"dead": np.nan}}},
    lambda n: n.get("B", 1) * n.get("L", 1) * (n.get("M", 1) + n.get("N", 1)),
    tokens_differ, ("NaN in a dead token",),
)  # fmt: skip


def reference(p: Problem) -> Values:
    y, cache = linear_forward(**p.inputs)
    return {"y": y, **_gradients(p.cotangents["dy"], cache)}


def _gradients(dy: Array, cache: Any) -> Values:
    g = linear_backward(dy, cache)
    return {"dx": g.x, **of_params(g.params)}


def forward(x: Any) -> None:
    """Equation (1) of `npattn.ops.linear`."""
    given, params = x.problem.inputs["x"], x.problem.inputs["params"]
    x.input("x", by_sequence(given))
    x.input("w", params.w)
    x.input("b", params.b)
    x.keep("w as used", lambda: same)
    x.used = getattr(x, "w as used")(x.w)
    x.keep("added", lambda: None if x.b is None else x.b[:, None, None])
    x.linear("rows", x.x, x.used[:, None], x.added)  # (1)
    x.keep("y", lambda: x.rows.reshape(len(x.rows), *given.shape[:-1], params.w.shape[1]))


def backward(x: Any) -> None:
    given, params = x.problem.inputs["x"], x.problem.inputs["params"]
    x.input("dy", by_sequence(x.problem.cotangents["dy"]))
    x.product("back", x.dy, swap(x.used)[:, None])
    x.keep("dx", lambda: x.back.reshape(len(x.back), *given.shape))
    dw = x.outer("dw as used", x.x, x.dy)
    x.keep("dw", lambda: adjoint(getattr(x, "w as used"), (len(dw), *params.w.shape), dw))
    if params.b is not None:
        x.total("db", x.dy, (-3, -2))


def _tokens(x: Any) -> float:
    return float(max(math.prod(x.dy.shape[1:3]), 1))


_MISTAKES: dict[str, Mistake] = {
    # forward
    "w transposed": {"w as used": to_value(swap)},
    "b forgotten": {"b": zero, "db": zero},
    "b subtracted": {"b": times(lambda x: -1), "db": times(lambda x: -1)},
    "b added twice": {"b": times(lambda x: 2), "db": times(lambda x: 2)},
    "b added along the tokens": {
        "added": lambda x, _: x.b[:, None, :, None] + 0 * x.x[..., :1],
        "db": lambda x, _: x.dy.sum((1, 3))},
    "b of the first element for all": {
        "added": lambda x, b: b[..., :1] + 0 * b,
        "db": lambda x, db: np.where(np.arange(db.shape[-1]) == 0, db.sum(-1, keepdims=True), 0)},
    "y rounded to float16": {"y": lambda x, y: y.astype(np.float16).astype(y.dtype)},
    # backward
    "dx by w, not its transpose": {"back": lambda x, _: x.dy @ x.used[:, None]},
    "gradient of w transposed": {"dw": lambda x, g: swap(g)},
    "w a mean over the tokens": {"dw": lambda x, g: g / _tokens(x)},
    "w a mean over the batch": {"dw": lambda x, g: g / x.dy.shape[1]},
    "w of the first sequence": {"dw as used": of_first_sequence("x", "dy")},
    "w of the last token": {"dw as used": lambda x, _: swap(x.x[:, -1, -1:]) @ x.dy[:, -1, -1:]},
    "b a mean over the tokens": {"db": lambda x, g: g / _tokens(x)},
    "b a mean over the batch": {"db": lambda x, g: g / x.dy.shape[1]},
    "b of the first sequence": {"db": sum_of_first_sequence("dy")},
    "b of the last token": {"db": lambda x, _: x.dy[:, -1, -1]},
    "b by the inputs": {"db": lambda x, _: x.x.sum((1, 2))},
    "NaN of a dead token reaches w": {"dw as used": lambda x, _: plain_outer(x.x, x.dy)},
    **{f"{n} without a gradient": {f"d{n}": zero} for n in ("w", "b", "x")},
}  # fmt: skip


def _candidate() -> Pair:
    def forward(x: Array, params: LinearParams) -> Array:
        return linear_forward(x, params)[0]

    def backward(dy: Array, x: Array, params: LinearParams) -> Values:
        return _gradients(dy, linear_forward(x, params)[1])

    return forward, backward


def _of_torch(found: dict[str, Any]) -> LinearParams:
    return LinearParams(swap(found.pop("dweight")), found.pop("dbias", None))


LINEAR = Op(
    name="linear",
    outputs=("y",),
    axes={"y": "KBLN", "dx": "KBLM", "dw": "MN", "db": "N"},
    reference=reference,
    forward=forward,
    backward=backward,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("b forgotten", "w transposed", "w of the first sequence", "dx by w, not its transpose")),
    cases=CASES,
    candidates={"linear": _candidate},
    calls=LayerCalls(
        "forward(x, params) and backward(dy, x, params); x, w, b or torch's x, weight, bias in place of them",
        (),
        to={"w": list, "weight": lambda params: [params.w.T, params.b]},
        back={"dweight": _of_torch},
    ),
    space=SPACE,
)  # fmt: skip
