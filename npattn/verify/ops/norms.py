"""The records of layer_norm and rms_norm, which have most equations in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.ops.norms import NormParams, layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
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
    of_params,
    space,
    times,
    to_value,
    zero,
)  # fmt: skip
from npattn.verify.precision import round_to
from npattn.verify.space import Space, sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding

LAYER, RMS = "layer_norm", "rms_norm"
EPS = {LAYER: 1e-5, RMS: 1e-6}
PAIRS: dict[str, Any] = {LAYER: (layer_norm_forward, layer_norm_backward), RMS: (rms_norm_forward, rms_norm_backward)}


def _tokens(
    rng: Rng, op: str = LAYER, *, shape: tuple[int, ...] = (2, 5, 12), g: bool = True, b: bool | None = None,
    eps: float | None = None, size: float = 1.0, shift: float = 0.0, outlier: float = 1.0, constant: bool = False,
    dead: float | None = None, nan: bool = False, dy: float = 1.0,
) -> Problem:  # fmt: skip
    """b : whether there is one, usually so of layer norm alone
    outlier : times the first feature; constant : every second token has equal features; dead : the second token, dy is 0"""
    x = size * normal(rng, *shape) + shift
    up, weights, bias = dy * normal(rng, *shape), 1 + 0.5 * normal(rng, shape[-1]), normal(rng, shape[-1])
    x[..., :1] *= outlier
    if constant:
        x[..., ::2, :] = x[..., ::2, :1]
    if dead is not None:
        x[..., 1:2, :], up[..., 1:2, :] = dead, 0
    if nan:
        x.reshape(-1, shape[-1])[:1, -1] = np.nan
    params = NormParams(weights if g else None, bias if (op == LAYER if b is None else b) else None)
    return Problem(Op.known[op], {"x": x, "params": params}, {} if eps is None else {"eps": eps}, {"dy": up})


def _cases(op: str) -> list[Any]:
    _case = partial(case, op, partial(_tokens, op=op))
    return [
        _case("plain"),
        *(_case(f"rank {len(n)}", "rank", shape=n) for n in ((12,), (5, 12), (2, 3, 5, 12))),
        _case("no b", "parameters", b=False) if op == LAYER else _case("b", "parameters", b=True),
        _case("no g", "parameters", g=False),
        _case("no g and no b", "parameters", g=False, b=False),
        _case("eps 0.1", "eps", eps=0.1),
        _case("eps 0.1, no g", "eps", eps=0.1, g=False),
        _case("eps 0.1, b", "eps", eps=0.1, b=True),
        _case("eps 0", "eps", eps=0.0),
        _case("eps 1e-12", "hard inputs", eps=1e-12, size=1e-5),
        _case("inputs as small as the root of eps", "eps", size=3e-3),
        _case("x100", "hard inputs", size=100.0),
        _case("mean 100", "hard inputs", shift=100.0),
        _case("mean -1e4", "hard inputs", shift=-1e4),
        _case("tiny", "hard inputs", size=1e-20),
        _case("squares of 1e36", "hard inputs", size=1e17),
        _case("an outlier", "hard inputs", outlier=1e3),
        _case("constant tokens", "hard inputs", constant=True),
        _case("dy of 1e-6", "hard inputs", dy=1e-6),
        _case("dead token of NaN", "NaN containment", dead=np.nan),
        _case("dead token of inf", "NaN containment", dead=np.inf),
        _case("NaN in one token", "NaN containment", nan=True),
        _case("M = 1", "small sizes", shape=(2, 5, 1)),
        _case("M = 2", "small sizes", shape=(2, 5, 2)),
        _case("L = 1", "small sizes", shape=(2, 1, 12)),
        _case("L = M", "small sizes", shape=(2, 12, 12)),
        _case("no rows", "empty", shape=(0, 12)),
        _case("long", shape=(3, 4096)),
        _case("many tokens", "long", shape=(2, 500, 16)),
        _case("float64", dtype="float64"),
        _case("float64 mean 1e4", "float64", dtype="float64", shift=1e4),
        _case("float64 of rank 2, eps 0.1", "float64", dtype="float64", shape=(5, 12), eps=0.1),
    ]


def _space(op: str) -> Space:
    def of_sizes(rng: Rng, *, B: int, L: int, M: int, rank: int = 3, **given: Any) -> Problem:
        return _tokens(rng, op, shape=(B, L, M)[3 - rank :], **given)

    return space(
        op, of_sizes,
        {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "M": sizes_of("M", {**SIZES, "above 1000": (1025,)})},
        {"rank": {"3": {}, "1": {"rank": 1}, "2": {"rank": 2}}, "g": {"given": {}, "none": {"g": False}},
         "b": {"given": {}, "none": {"b": False}} if op == LAYER else {"none": {}, "given": {"b": True}},
         "eps": {"default": {}, "0.1": {"eps": 0.1}, "1e-12": {"eps": 1e-12}, "0": {"eps": 0.0}},
         "inputs": {"normal": {}, "x100": {"size": 100.0}, "mean 100": {"shift": 100.0}, "small": {"size": 3e-3},
                    "tiny": {"size": 1e-10}, "outlier": {"outlier": 1e3}, "NaN": {"nan": True}}},
        lambda n: n.get("B", 1) * n.get("L", 1) * n.get("M", 1), _possible,
    )  # fmt: skip


def _possible(row: dict[str, str]) -> bool:
    """Without eps, the norm of what is constant is 0 / 0. If all tokens are equal, the roundings of dg and db are, too."""
    equal = row.get("memory") == "strides of 0"
    return not (row.get("eps") == "0" and (row.get("M") == "1" or equal)) and not (row.get("rank") == "2" and equal)


def reference(p: Problem) -> Values:
    forward, backward = PAIRS[p.op.name]
    y, cache = forward(**p.inputs, **p.options)
    return {"y": y, **_gradients(backward(p.cotangents["dy"], cache))}


def _gradients(grads: Any) -> Values:
    return {"dx": grads.x, **of_params(grads.params)}


def forward(x: Any, op: str) -> None:
    """Equations (1) to (6) of `npattn.ops.norms`, without its unit."""
    x.input("x", x.problem.inputs["x"])
    for name, p in x.problem.inputs["params"]._asdict().items():
        x.input(name, None if p is None else p.reshape(*(1,) * (x.x.ndim - 2), len(p)))
    x.keep("axis", lambda: -1)
    x.keep("count", lambda: np.size(x.x[0]) // max(np.size(x.x[0].sum(x.axis)), 1))
    if op == LAYER:
        _mean(x, "mean", x.x)  # (1)
    else:
        x.keep("mean", lambda: 0 * x.x[..., :1])
    x.sum_of_two("c", x.x, -x.mean)  # (2)
    x.rounded("squares", lambda: x.c * x.c)
    _mean(x, "var", x.squares, x.count)  # (3)
    x.keep("eps", lambda: x.options.get("eps", EPS[op]))
    x.sum_of_two("shifted", x.var, np.full_like(x.var, x.eps))
    x.rounded("r", lambda: 1 / np.sqrt(x.shifted), 2.0)  # (4)
    x.keep("slope", lambda: 1.0)  # of r by var, in units of -r^3 / 2
    x.rounded("n", lambda: x.c * x.r)  # (5)
    x.rounded("scaled", lambda: x.n if x.g is None else x.n * x.g, 0.0 if x.g is None else 1.0)
    if x.b is None:
        x.keep("y", lambda: x.scaled)
    else:
        x.sum_of_two("y", x.scaled, x.b)  # (6)


def _mean(x: Any, name: str, terms: Array, count: Any = None) -> None:
    n = count or np.size(x.x[0]) // max(np.size(x.x[0].sum(x.axis)), 1)
    x.total(f"sum for {name}", terms, x.axis, keepdims=True)
    x.rounded(name, lambda: getattr(x, f"sum for {name}") / n)


def _other_order(x: Any, _: Array) -> Array:
    """What the mean subtracted last leaves of a large mean of x, as dc - mean(dc) with dc = r (dn - n mean(dn n)).

    The rounding of the mean is the same in all n of a token, so that mean(n) = d is not 0. In this order dx is wrong by
    r d n mean(dn), and in that of the stages by r d (mean(dn n) + n mean(dn)), which may be 0 where the former is not. torch
    multiplies x and its mean by r mean(dn n), each by itself, and both are rounded.
    """
    of_sum = x.rounding.rounding_of_sum(x.x[0], x.axis) / np.asarray(x.x[0] + 0 * x.mean[0]).size * x.mean[0].size
    d = x.r[0] * np.hypot(of_sum, x.unit * x.mean[0])
    apart = 2 * x.unit * x.r[0] * getattr(x, "mean of dn n")[0] * x.x[0] * (x.mean[0] != 0)
    return np.asarray(np.hypot(d * x.n[0] * getattr(x, "mean of dn")[0], apart))


def _over_tokens(x: Any, name: str, terms: Array, tokens: tuple[int, ...]) -> None:
    if tokens:
        x.total(name, terms, tokens)
    else:
        x.rounded(name, lambda: terms, 0.0)  # of one token


def backward(x: Any, op: str) -> None:
    """The backward, from (6) to (1)."""
    x.input("dy", x.problem.cotangents["dy"])
    x.keep("alive", lambda: x.dy.any(-1, keepdims=True))
    x.rounded("dn", lambda: x.dy if x.g is None else x.dy * x.g, 0.0 if x.g is None else 1.0)  # (6)
    tokens = tuple(range(-(x.x.ndim - 1), -1))
    if x.g is not None:
        x.rounded("by token", lambda: np.where(x.alive, x.dy * x.n, 0))
        _over_tokens(x, "dg", getattr(x, "by token"), tokens)
    if x.b is not None:
        x.keep("terms of db", lambda: x.dy)
        _over_tokens(x, "db", getattr(x, "terms of db"), tokens)
    x.rounded("dn n", lambda: x.dn * x.n)  # (5)
    _mean(x, "mean of dn n", getattr(x, "dn n"), x.count)
    x.rounded("pull", lambda: x.n * (x.slope * getattr(x, "mean of dn n")))  # (4), (3)
    if op == LAYER:
        _mean(x, "mean of dn", x.dn)  # (2), (1)
        x.sum_of_two("centred", x.dn, -getattr(x, "mean of dn"))
    else:
        x.keep("mean of dn", lambda: 0 * x.r)
        x.keep("centred", lambda: x.dn)
    x.sum_of_two("inner", x.centred, -x.pull)
    x.keep("either", lambda: x.inner, partial(_other_order, x))
    x.rounded("both", lambda: x.r * x.either)
    x.keep("dx", lambda: np.where(x.alive, x.both, 0))


# --- mistakes ----------------------------------------------------------------------------------------------------------------


def _r(value: Callable[[Any], Array], slope: Callable[[Any], Array]) -> Mistake:
    """Another r, and its slope by the variance."""
    return {"r": lambda x, _: value(x), "slope": lambda x, _: slope(x)}


def _eps(value: float) -> Mistake:
    return {"eps": to_value(value)}


def _low_moments(x: Any, var: Array) -> Array:
    """The variance as the mean of squares less the square of the mean, in the dtype of the candidate."""
    low = x.x.astype(x.low)
    mean, squares = (y.mean(x.axis, keepdims=True, dtype=x.low) for y in (low, low * low))
    return np.asarray(np.maximum(squares - mean * mean, 0), var.dtype)


def _axes(*axes: int) -> Mistake:
    def of(x: Any, axis: int) -> tuple[int, ...]:
        if x.x.ndim < 3:
            raise ValueError("one token")
        return axes

    return {"axis": of}


def _sequence(at: int) -> Callable[[Any, Array], Array]:
    """The terms of one sequence alone, or of one token where there is one sequence."""

    def of(x: Any, t: Array) -> Array:
        if t.ndim < 3:
            raise ValueError("one token")
        kept = np.zeros_like(t)
        kept[:, at] = t[:, at]
        return kept

    return of


def _rounded_to(dtype: Any) -> Callable[[Any, Array], Array]:
    return lambda x, value: round_to(value, dtype)


_BOTH: dict[str, Mistake] = {
    # forward
    "eps outside of the root": _r(lambda x: 1 / (np.sqrt(x.var) + x.eps), lambda x: 1 / (x.r * np.sqrt(x.var))),
    "eps forgotten": _eps(0.0),
    **{f"eps of {eps}": _eps(float(eps)) for eps in ("1e-12", "1e-6", "1e-5", "1e-3")},
    "eps rounded to float16": {"eps": lambda x, eps: float(np.float16(eps))},
    "divided by M - 1": {"count": lambda x, n: n - 1},
    "root forgotten": _r(lambda x: 1 / x.shifted, lambda x: 2 / x.r),
    "sum of squares, not their mean": {"count": to_value(1)},
    "over all tokens of a feature": _axes(-2),
    "over all tokens and features of a sequence": _axes(-2, -1),
    "g forgotten": {"scaled": lambda x, _: x.n, "dn": lambda x, _: x.dy, "dg": zero},
    "1 + g for g": {"g": lambda x, g: 1 + g},
    "b forgotten": {"y": lambda x, _: x.scaled, "db": zero},
    "b before g": {"y": lambda x, _: (x.n + x.b) * x.g, "by token": lambda x, _: x.dy * (x.n + x.b),
                   "terms of db": lambda x, _: x.dy * x.g},
    "b subtracted": {"y": lambda x, _: x.scaled - x.b, "terms of db": lambda x, _: -x.dy},
    # backward
    "r taken as a constant": {"pull": zero},
    "mean of dn n without n": {"pull": lambda x, _: getattr(x, "mean of dn n")},
    "mean of dn n of the other sign": {"pull": lambda x, pull: -pull},
    "sum of dn n, not its mean": {"mean of dn n": times(lambda x: x.count)},
    "g missing in the mean of dn n": {"dn n": lambda x, _: x.dy * x.n},
    "g missing in dx": {"dn": lambda x, _: x.dy},
    "r missing in dx": {"both": lambda x, both: both / x.r},
    "r once more in dx": {"both": lambda x, both: both * x.r},
    "dg of x, not of n": {"by token": lambda x, _: x.dy * x.x},
    "dg of y, not of n": {"by token": lambda x, _: x.dy * x.y},
    "dg times g": {"dg": lambda x, dg: dg * x.g.reshape(1, -1)},
    **{f"{d} of the {which} sequence": {of: _sequence(at)} for d, of in (("dg", "by token"), ("db", "terms of db"))
       for which, at in (("first", 0), ("last", -1))},
    "dg and db means over the tokens": {"dg": times(lambda x: _share(x)), "db": times(lambda x: _share(x))},
    "db times g": {"terms of db": lambda x, dy: dy * x.g},
    "dg and db exchanged": {"finish": lambda x, d: d | {"dg": d["db"], "db": d["dg"]}},
    "dx is dy": {"dx": lambda x, _: x.dy},
    **{f"{n} without a gradient": {f"d{n}": zero} for n in ("x", "g", "b")},
}  # fmt: skip
_OF_LAYER: dict[str, Mistake] = {
    "mean not subtracted": {"mean": zero, "mean of dn": zero},
    **{f"mean rounded to {n}": {"mean": _rounded_to(n)} for n in ("float16", "bfloat16")},
    "mean of dn without g": {"mean of dn": lambda x, _: x.dy.mean(-1, keepdims=True)},
    "variance as the mean of squares less the square of the mean": {"var": _low_moments},
    "variance about 0": {"var": lambda x, var: var + x.mean**2,
                         "pull": lambda x, _: x.x * x.r * getattr(x, "mean of dn n")},
    "mean taken as a constant": {"mean of dn": zero},
    "sum of dn, not its mean": {"mean of dn": times(lambda x: x.x.shape[-1])},
}  # fmt: skip
_OF_RMS: dict[str, Mistake] = {
    "mean subtracted, as layer norm does": {
        "mean": lambda x, _: x.x.mean(-1, keepdims=True), "both": lambda x, dc: dc - dc.mean(-1, keepdims=True)},
    "mean subtracted in the backward": {"both": lambda x, dc: dc - dc.mean(-1, keepdims=True)},
    "divided by the largest |x|": _r(lambda x: 1 / np.abs(x.x).max(-1, keepdims=True), lambda x: 0 * x.r),
    "divided by the mean of |x|": _r(lambda x: 1 / np.abs(x.x).mean(-1, keepdims=True), lambda x: 0 * x.r),
}  # fmt: skip


def _share(x: Any) -> float:
    return 1 / max(np.size(x.x[0, ..., 0]), 1)


# --- the records -------------------------------------------------------------------------------------------------------------


def _candidate(op: str) -> Pair:
    forward, backward = PAIRS[op]

    def norm(x: Array, params: Any, *, eps: float = EPS[op]) -> Any:
        return forward(x, params, eps=eps)[0]

    def norm_backward(dy: Array, x: Array, params: Any, *, eps: float = EPS[op]) -> Values:
        return _gradients(backward(dy, forward(x, params, eps=eps)[1]))

    return norm, norm_backward


def _given(found: dict[str, Any]) -> NormParams:
    return NormParams(found.pop("weight", found.pop("dweight", None)), found.pop("bias", found.pop("dbias", None)))


def _record(op: str, more: dict[str, Mistake]) -> Op:
    return Op(
        name=op,
        outputs=("y",),
        axes={"y": "BHLM", "dx": "BHLM", "dg": "M", "db": "M"},
        reference=reference,
        forward=partial(forward, op=op),
        backward=partial(backward, op=op),
        truth=by_noise,
        undefined=no_inner_rounding,
        changes=changes({**_BOTH, **more}, ("eps outside of the root", "r taken as a constant", "g missing in dx")),
        cases=_cases(op),
        candidates={op.replace("_", "-"): partial(_candidate, op)},
        calls=LayerCalls(
            "forward(x, params, *, eps) and backward(dy, x, params, *, eps)", ("eps",),
            to={"weight": list}, back=dict.fromkeys(("weight", "bias", "dweight", "dbias"), _given),
        ),
        space=_space(op),
    )  # fmt: skip


LAYER_NORM, RMS_NORM = _record(LAYER, _OF_LAYER), _record(RMS, _OF_RMS)
