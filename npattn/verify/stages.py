"""Attention once more, stage by stage: every stage may be changed, so that a known mistake or another convention can be tried.

This is not the reference and shares no code with it: with nothing changed both agree to the last bits, which the tests hold
it to. A `Change` replaces the value of one stage; `run` computes what comes out. Two changes at once are simply both applied.
The names of the stages are those of `npattn.attention`; x collects their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from npattn.ops.checks import Array

Stage = tuple[str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Change:
    """What somebody does instead in one stage."""

    name: str
    stage: str
    value: Callable[[Any], Any]  # of all that is known so far, with the honest value of the stage in its place
    needs: frozenset[str] = frozenset()  # without these in the call it changes nothing
    convention: bool = False  # another convention, not a mistake
    sized: bool = False  # depends on the size of a tile, which is only tried


def _function(name: str) -> Callable[[Any], Any]:
    """A function of NumPy, or on arrays of objects that of mpmath."""

    def apply(a: Any) -> Any:
        if getattr(a, "dtype", None) != np.dtype(object):
            return getattr(np, name)(a)
        import mpmath

        return np.frompyfunc(getattr(mpmath, {"exp": "exp", "log": "ln", "tanh": "tanh", "isfinite": "isfinite"}[name]), 1, 1)(
            a
        )

    return apply


exp, log, tanh = _function("exp"), _function("log"), _function("tanh")


def is_finite(a: Array) -> Array:
    return np.asarray(_function("isfinite")(a), bool)


def swap(a: Array) -> Array:
    result: Array = np.swapaxes(a, -1, -2)
    return result


def where(condition: Any, a: Any, b: Any = 0) -> Any:
    return np.where(condition, a, b)


def exp_low(x: Any, a: Array) -> Array:
    """exp that overflows and underflows where the candidate's does."""
    info = np.finfo(x.low)
    e, least = exp(a), float(info.smallest_subnormal)
    if e.dtype != np.dtype(object):  # what is subnormal has fewer digits
        e = np.where(e < float(info.smallest_normal), np.rint(e / least) * least, e)
    return np.asarray(where(a > math.log(info.max), np.inf, where(e < least / 2, e * 0, e)))


def over_allowed(w: Array, a: Array, allowed: Array) -> Array:
    """w @ a, where what is not finite in a reaches only the rows that may see it."""
    bad = ~is_finite(a)
    if not bad.any():
        result: Array = w @ a
        return result
    out: Array = w @ where(bad, 0, a)
    for j in np.flatnonzero(bad.any(-1).reshape(-1, a.shape[-2]).any(0)):
        one = slice(j, j + 1)
        out += where(allowed[..., one] & bad[..., one, :], w[..., one] * a[..., one, :])
    return out


def sum_to(terms: Array, like: Array) -> Array:
    """The sum over the axes along which ``like`` was broadcast."""
    full = (1,) * (terms.ndim - like.ndim) + like.shape
    result: Array = terms.sum(tuple(a for a, n in enumerate(full) if n == 1), keepdims=True).reshape(like.shape)
    return result


def group_sum(terms: Array, x: Any, group: Array) -> Array:
    """(B, H, S, D) -> (B, G, S, D), by the groups that the heads have read."""
    total = np.zeros((*terms.shape[:-3], x.G, *terms.shape[-2:]), terms.dtype)
    for h in range(x.H):
        total[..., int(group[h]), :, :] += terms[..., h, :, :]
    return total


SHAPE: list[Stage] = [
    ("q", lambda x: x.q),
    ("shift", lambda x: x.S - x.L if x.align == "bottom_right" else 0),
    ("sides", lambda x: None if x.window is None else tuple(math.inf if n is None else n for n in x.window)),
    ("lengths", lambda x: None if x.key_lengths is None else np.asarray(x.key_lengths)[..., None, None, None]),
    ("array", lambda x: None if x.mask is None else np.asarray(x.mask)),
    ("bias", lambda x: None if x.bias is None else np.asarray(x.bias).reshape((1,) * (4 - np.ndim(x.bias)) + np.shape(x.bias))),
    ("drop", lambda x: 1.0 if x.dropout_mask is None else x.dropout_mask),
    ("scale", lambda x: x.D**-0.5 if x.scale is None else x.scale),
    ("sink", lambda x: None if x.sink is None else np.asarray(x.sink)[:, None, None]),
    ("group", lambda x: np.arange(x.H) // (x.H // x.G)),
    ("k_group", lambda x: x.group),
    ("v_group", lambda x: x.group),
]
MASKS: list[Stage] = [
    ("ahead", lambda x: np.arange(x.S) - np.arange(x.L)[:, None] - x.shift),
    ("by_causal", lambda x: x.ahead <= 0 if x.causal else True),
    ("by_window", lambda x: True if x.sides is None else (x.ahead >= -x.sides[0]) & (x.ahead <= x.sides[1])),
    ("by_lengths", lambda x: True if x.lengths is None else np.arange(x.S) < x.lengths),
    ("by_array", lambda x: True if x.array is None else x.array),
    ("by_bias", lambda x: True if x.bias is None else x.bias != -np.inf),
    ("allowed", lambda x: np.broadcast_to(x.by_causal & x.by_window & x.by_lengths & x.by_array & x.by_bias, x.shape)),
]
SCORES: list[Stage] = [
    ("kh", lambda x: x.k[..., x.k_group, :, :]),
    ("vh", lambda x: x.v[..., x.v_group, :, :]),
    ("raw", lambda x: x.scale * (x.q @ swap(x.kh))),  # (1)
    ("t", lambda x: None if x.softcap is None else tanh(x.raw / x.softcap)),
    ("capped", lambda x: x.raw if x.softcap is None else x.softcap * x.t),  # (2)
    ("inside", lambda x: True),  # where a score was not cut off
    ("biased", lambda x: x.capped if x.bias is None else x.capped + x.bias),  # (3)
    ("scores", lambda x: where(x.allowed, x.biased, -np.inf)),  # (4)
]
SOFTMAX: list[Stage] = [
    ("top", lambda x: _top(x)),
    ("e", lambda x: exp_low(x, x.scores - x.top)),
    ("e_sink", lambda x: 0.0 if x.sink is None else exp_low(x, x.sink - x.top)),
    ("z", lambda x: x.e.sum(-1, keepdims=True) + x.e_sink),
    ("weights", lambda x: where(x.allowed, x.e / where(x.z == 0, 1, x.z), 0)),  # (5)
    ("lse", lambda x: (x.top + log(x.z))[..., 0]),
    ("dropped", lambda x: x.weights * x.drop),  # (6)
    ("out", lambda x: over_allowed(x.dropped, x.vh, x.allowed)),  # (7)
]
FORWARD = SHAPE + MASKS + SCORES + SOFTMAX

BACKWARD: list[Stage] = [
    ("kept_out", lambda x: x.saved_out),
    ("kept_lse", lambda x: x.saved_lse),
    ("alive", lambda x: (x.saved_lse != -np.inf)[..., None]),
    ("do", lambda x: where(x.alive, x.dout)),
    ("dl", lambda x: 0.0 if x.dlse is None else where(x.alive, x.dlse[..., None])),
    ("p", lambda x: exp_low(x, x.scores - where(x.alive, x.kept_lse[..., None]))),  # made again from lse, as fused kernels do
    ("dropped", lambda x: x.p * x.drop),
    ("dvh", lambda x: over_allowed(swap(x.dropped), x.do, swap(x.allowed))),  # (7)
    ("dp", lambda x: where(x.allowed, x.do @ swap(x.vh)) * x.drop),  # (7), (6)
    ("delta", lambda x: (x.do * where(x.alive, x.kept_out)).sum(-1, keepdims=True)),
    ("ds", lambda x: where(x.allowed & x.inside, x.p * (x.dp - x.delta + x.dl))),  # (5), (4)
    ("p_sink", lambda x: 0.0 if x.sink is None else exp_low(x, x.sink - where(x.alive, x.kept_lse[..., None]))),
    ("sink_rows", lambda x: x.p_sink * (_of_row(x.dl) - _of_row(x.delta))),
    ("dsink", lambda x: None if x.sink is None else np.broadcast_to(x.sink_rows, (*x.shape[:-1], 1)).sum((0, 2, 3))),
    ("dbias", lambda x: None if x.bias is None else sum_to(x.ds, x.given_bias)),  # (3)
    ("slope", lambda x: 1.0 if x.softcap is None else 1 - x.t * x.t),
    ("dcap", lambda x: where(x.allowed, x.ds * x.slope)),  # (2)
    ("dq", lambda x: x.scale * over_allowed(x.dcap, x.kh, x.allowed)),  # (1)
    ("dkh", lambda x: x.scale * over_allowed(swap(x.dcap), x.q, swap(x.allowed))),  # (1)
    ("dk", lambda x: group_sum(x.dkh, x, x.k_group)),
    ("dv", lambda x: group_sum(x.dvh, x, x.v_group)),
]
FORWARD_STAGES = frozenset(name for name, _ in FORWARD)


def _of_row(a: Any) -> Any:
    """One number a row, where a change has made it one a key."""
    return a[..., :1] if np.ndim(a) and a.shape[-1] > 1 else a


def _top(x: Any) -> Array:
    top = x.scores.max(-1, keepdims=True, initial=-np.inf)
    if x.sink is not None:
        top = np.maximum(top, x.sink)
    return np.asarray(where(top == -np.inf, 0.0, top))


def facts(problem: Any, given: dict[str, Any]) -> frozenset[str]:
    """What a call has in it: the names that `Change.needs` speaks of."""
    found = {name for name, value in given.items() if value is not None and value is not False}
    L, S = problem.shape[-2:]
    found |= {"L = S"} if L == S else {"L != S"}
    if problem.q.shape[-3] != problem.k.shape[-3]:
        found.add("grouped heads")
    if problem.dlse is not None:
        found.add("dlse")
    return frozenset(found)


def prepare(problem: Any, given: dict[str, Any], align: str, dtype: Any) -> SimpleNamespace:
    """The call that a candidate gets, as the first values of x."""
    x = SimpleNamespace(causal=False, **dict.fromkeys(("window", "key_lengths", "mask", "bias", "scale", "softcap", "sink")))
    x.dropout_mask, x.align, x.low = None, align, problem.q.dtype  # low: what the candidate computes in
    for name, value in given.items():
        wide = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        setattr(x, name, to(value, dtype) if wide else value)
    x.given_bias, x.given_scale = x.bias, x.scale
    x.problem, x.dtype = problem, dtype
    x.q, x.k, x.v, x.dout = (to(a, dtype) for a in (problem.q, problem.k, problem.v, problem.dout))
    x.dlse = None if problem.dlse is None else to(problem.dlse, dtype)
    x.shape = problem.shape
    x.B, x.H, x.L, x.S = problem.shape
    x.G, x.D, x.E = problem.k.shape[-3], problem.q.shape[-1], problem.v.shape[-1]
    return x


def to(a: Array, dtype: Any) -> Array:
    """In another dtype; object stands for the numbers of mpmath."""
    if dtype is not object:
        return a.astype(dtype)
    import mpmath

    return np.asarray(np.frompyfunc(lambda number: mpmath.mpf(float(number)), 1, 1)(a), object)


def exact(problem: Any, given: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Outputs and gradients in 40 digits, as float64 and what it leaves; for small float64 problems. Needs mpmath."""
    import mpmath

    with mpmath.workdps(40):
        found = run(problem, given, "top_left", dtype=object)
        high = {n: np.asarray(x, np.float64) for n, x in found.items()}
        rest = {n: np.asarray(where(np.isfinite(high[n]), x - high[n], 0), np.float64) for n, x in found.items()}
    return high, rest


def perform(x: SimpleNamespace, stages: Iterable[Stage], changes: Iterable[Change]) -> SimpleNamespace:
    """All stages in their order, each with what is changed of it."""
    by_stage: dict[str, list[Change]] = {}
    for change in changes:
        by_stage.setdefault(change.stage, []).append(change)
    for name, value in stages:
        setattr(x, name, value(x))
        for change in by_stage.get(name, ()):
            setattr(x, name, change.value(x))
    return x


def run(
    problem: Any, given: dict[str, Any], align: str, changes: Iterable[Change] = (), *,
    dtype: Any = np.float64, backward: Iterable[Change] | None = None, gradients: bool = True, fused: bool = True,
    returned: Array | None = None,
) -> dict[str, Array]:  # fmt: skip
    """out, lse and the gradients with these changes, computed in ``dtype``.

    given    : the keyword arguments as the candidate gets them
    changes  : of the forward, and of the backward too, unless ``backward`` gives others for it
    fused    : the backward uses the out and lse of the forward; else it makes its own
    returned : the out that the candidate kept: what is rounded once more is rounded from there
    """
    here = facts(problem, given)
    changes = [c for c in changes if c.needs <= here]
    in_backward = changes if backward is None else [c for c in backward if c.needs <= here]
    with np.errstate(all="ignore"):
        x = perform(prepare(problem, given, align, dtype), FORWARD, changes)
        found = {"out": x.out, "lse": x.lse}
        if not gradients:
            return found
        x = _before_backward(x, problem, given, align, changes, in_backward, dtype, fused)
        if returned is not None and fused:
            x.saved_out = returned.astype(dtype)
        x = perform(x, BACKWARD, _of_backward(in_backward))
    return _named(found, x)


def _before_backward(
    x: SimpleNamespace, problem: Any, given: dict[str, Any], align: str, changes: list[Change], in_backward: list[Change],
    dtype: Any, fused: bool,
) -> SimpleNamespace:  # fmt: skip
    """What the backward starts from: what its own changes make of the forward, and the out and lse that were kept."""
    out, lse = x.out, x.lse
    if in_backward != changes or any(c.stage == "lse" for c in changes):
        # A convention of the lse that is handed out is not one of the lse that is kept.
        inner = [c for c in in_backward if c.stage in FORWARD_STAGES and c.stage != "lse"]
        x = perform(prepare(problem, given, align, dtype), FORWARD, inner)
        if not fused or in_backward == changes:
            out, lse = x.out, x.lse
    x.saved_out, x.saved_lse = out, lse
    return x


def _of_backward(changes: Iterable[Change]) -> list[Change]:
    return [c for c in changes if c.stage not in FORWARD_STAGES or c.stage == "dropped"]


def _named(found: dict[str, Any], x: SimpleNamespace) -> dict[str, Array]:
    found = found | {"dq": x.dq, "dk": x.dk, "dv": x.dv, "dbias": x.dbias, "dsink": x.dsink}
    return {name: value for name, value in found.items() if value is not None}


class Variants:
    """What `run` returns with one change more, where only the stages from the changed one on are computed again."""

    def __init__(self, problem: Any, given: dict[str, Any], align: str, base: Iterable[Change]) -> None:
        here = facts(problem, given)
        self.call, self.base = (problem, given, align), [c for c in base if c.needs <= here]
        with np.errstate(all="ignore"):
            self.forwards = perform(prepare(*self.call, np.float64), FORWARD, self.base)
            start = SimpleNamespace(**vars(self.forwards))
            start = _before_backward(start, *self.call, self.base, self.base, np.float64, True)
            self.backwards = perform(start, BACKWARD, _of_backward(self.base))
        self.unchanged = _named({"out": self.forwards.out, "lse": self.forwards.lse}, self.backwards)

    def outputs(self, change: Change) -> dict[str, Array] | None:
        """out and lse with this change; nothing where it does not reach them, None where it changes nothing at all."""
        if change.stage not in FORWARD_STAGES:
            return None if _same_stage(self.backwards, change) else {}
        if _same_stage(self.forwards, change):
            return None
        x = _go_on(self.forwards, FORWARD, change, self.base)
        return {"out": x.out, "lse": x.lse}

    def everything(self, change: Change) -> dict[str, Array]:
        """What `run` returns with this change."""
        if change.stage in FORWARD_STAGES:
            return run(*self.call, [*self.base, change])
        x = _go_on(self.backwards, BACKWARD, change, _of_backward(self.base))
        return _named({name: self.unchanged[name] for name in ("out", "lse")}, x)


def _go_on(x: SimpleNamespace, stages: list[Stage], change: Change, base: list[Change]) -> SimpleNamespace:
    """All stages from the changed one on."""
    first = [name for name, _ in stages].index(change.stage)
    with np.errstate(all="ignore"):
        return perform(SimpleNamespace(**vars(x)), stages[first:], [*base, change])


def _same_stage(x: SimpleNamespace, change: Change) -> bool:
    """Whether the changed stage is what it was, as a mask that is ignored where it masks nothing."""
    tried = SimpleNamespace(**vars(x))
    with np.errstate(all="ignore"):
        value, was = change.value(tried), getattr(x, change.stage)
    others = all(y is getattr(x, name, None) for name, y in vars(tried).items())
    return others and type(value) is type(was) and bool(np.array_equal(value, was, equal_nan=np.asarray(was).dtype.kind == "f"))
