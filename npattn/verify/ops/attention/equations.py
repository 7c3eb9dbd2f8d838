"""The equations of attention as stages for `npattn.verify.stages`: every value has a name, so that it can be changed.

This is not the reference and shares no code with it. Unchanged, both agree up to the last bits; the tests check that. A stage
has the name that `npattn.ops.attention` uses for its value, if it has one there; x holds the values. The backward is that of
fused kernels: it computes the weights again, from the log-sum-exp that the forward has kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.op import Problem


def _function(name: str) -> Callable[[Any], Any]:
    """A function of NumPy; for arrays of objects it calls that of mpmath."""

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
    """exp that overflows and underflows as in the candidate's dtype."""
    info = np.finfo(x.low)
    e, least = exp(a), float(info.smallest_subnormal)
    if e.dtype != np.dtype(object):  # subnormal numbers have fewer digits
        e = np.where(e < float(info.smallest_normal), np.rint(e / least) * least, e)
    return np.asarray(where(a > math.log(info.max), np.inf, where(e < least / 2, e * 0, e)))


def over_allowed(w: Array, a: Array, allowed: Array) -> Array:
    """w @ a, where NaN and inf in a reach only the rows that may see them."""
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
    """(B, H, S, D) -> (B, G, S, D): the sum over the heads that read each group. group : the group of each head"""
    total = np.zeros((*terms.shape[:-3], x.G, *terms.shape[-2:]), terms.dtype)
    for h in range(x.H):
        total[..., int(group[h]), :, :] += terms[..., h, :, :]
    return total


def forward(x: Any) -> None:
    """Equations (1) to (7)."""
    _arguments(x)
    x.keep("q", lambda: x.problem.q)
    x.keep("shift", lambda: x.S - x.L if x.align == "bottom_right" else 0)
    x.keep("sides", lambda: None if x.window is None else tuple(math.inf if n is None else n for n in x.window))
    x.keep("lengths", lambda: None if x.key_lengths is None else np.asarray(x.key_lengths)[..., None, None, None])
    x.keep("array", lambda: None if x.mask is None else np.asarray(x.mask))
    x.keep("bias", lambda: None if x.bias is None else _full_rank(x.bias))
    x.keep("drop", lambda: 1.0 if x.dropout_mask is None else x.dropout_mask)
    x.keep("scale", lambda: x.D**-0.5 if x.scale is None else x.scale)
    x.keep("sink", lambda: None if x.sink is None else np.asarray(x.sink)[:, None, None])
    x.keep("group", lambda: np.arange(x.H) // (x.H // x.G))
    x.keep("k_group", lambda: x.group)
    x.keep("v_group", lambda: x.group)

    # which keys a query may see
    x.keep("ahead", lambda: np.arange(x.S) - np.arange(x.L)[:, None] - x.shift)
    x.keep("by_causal", lambda: x.ahead <= 0 if x.causal else True)
    x.keep("by_window", lambda: True if x.sides is None else (x.ahead >= -x.sides[0]) & (x.ahead <= x.sides[1]))
    x.keep("by_lengths", lambda: True if x.lengths is None else np.arange(x.S) < x.lengths)
    x.keep("by_array", lambda: True if x.array is None else x.array)
    x.keep("by_bias", lambda: True if x.bias is None else x.bias != -np.inf)
    x.keep("allowed", lambda: np.broadcast_to(x.by_causal & x.by_window & x.by_lengths & x.by_array & x.by_bias, x.shape))

    # scores
    x.keep("kh", lambda: x.k[..., x.k_group, :, :])
    x.keep("vh", lambda: x.v[..., x.v_group, :, :])
    x.keep("raw", lambda: x.scale * (x.q @ swap(x.kh)))  # (1)
    x.keep("t", lambda: None if x.softcap is None else tanh(x.raw / x.softcap))
    x.keep("capped", lambda: x.raw if x.softcap is None else x.softcap * x.t)  # (2)
    x.keep("inside", lambda: True)  # False where a change clips the score: there its gradient is 0
    x.keep("biased", lambda: x.capped if x.bias is None else x.capped + x.bias)  # (3)
    x.keep("scores", lambda: where(x.allowed, x.biased, -np.inf))  # (4)

    # softmax and output
    x.keep("top", lambda: _top(x))
    x.keep("e", lambda: exp_low(x, x.scores - x.top))
    x.keep("e_sink", lambda: 0.0 if x.sink is None else exp_low(x, x.sink - x.top))
    x.keep("z", lambda: x.e.sum(-1, keepdims=True) + x.e_sink)
    x.keep("weights", lambda: where(x.allowed, x.e / where(x.z == 0, 1, x.z), 0))  # (5)
    x.keep("lse", lambda: (x.top + log(x.z))[..., 0])
    x.keep("dropped", lambda: x.weights * x.drop)  # (6)
    x.keep("out", lambda: over_allowed(x.dropped, x.vh, x.allowed))  # (7)


def backward(x: Any) -> None:
    """The backward, from (7) to (1), with the output and lse that the forward has kept."""
    x.dout, x.dlse = x.problem.dout, x.problem.cotangents.get("dlse")
    x.keep("kept_out", lambda: x.saved_out)
    x.keep("kept_lse", lambda: x.saved_lse)
    x.keep("alive", lambda: (x.saved_lse != -np.inf)[..., None])
    x.keep("do", lambda: where(x.alive, x.dout))
    x.keep("dl", lambda: 0.0 if x.dlse is None else where(x.alive, x.dlse[..., None]))
    x.keep("p", lambda: exp_low(x, x.scores - where(x.alive, x.kept_lse[..., None])))
    x.keep("dropped", lambda: x.p * x.drop)
    x.keep("dvh", lambda: over_allowed(swap(x.dropped), x.do, swap(x.allowed)))  # (7)
    x.keep("dp", lambda: where(x.allowed, x.do @ swap(x.vh)) * x.drop)  # (7), (6)
    x.keep("delta", lambda: (x.do * where(x.alive, x.kept_out)).sum(-1, keepdims=True))
    x.keep("ds", lambda: where(x.allowed & x.inside, x.p * (x.dp - x.delta + x.dl)))  # (5), (4)
    x.keep("p_sink", lambda: 0.0 if x.sink is None else exp_low(x, x.sink - where(x.alive, x.kept_lse[..., None])))
    x.keep("sink_rows", lambda: x.p_sink * (_of_row(x.dl) - _of_row(x.delta)))
    x.keep("dsink", lambda: None if x.sink is None else np.broadcast_to(x.sink_rows, (*x.shape[:-1], 1)).sum((0, 2, 3)))
    x.keep("dbias", lambda: None if x.bias is None else sum_to(x.ds, x.given_bias))  # (3)
    x.keep("slope", lambda: 1.0 if x.softcap is None else 1 - x.t * x.t)
    x.keep("dcap", lambda: where(x.allowed, x.ds * x.slope))  # (2)
    x.keep("dq", lambda: x.scale * over_allowed(x.dcap, x.kh, x.allowed))  # (1)
    x.keep("dkh", lambda: x.scale * over_allowed(swap(x.dcap), x.q, swap(x.allowed)))  # (1)
    x.keep("dk", lambda: group_sum(x.dkh, x, x.k_group))
    x.keep("dv", lambda: group_sum(x.dvh, x, x.v_group))


def _arguments(x: Any) -> None:
    """The arguments of the call as values of x; options that are not given are None."""
    names = ("window", "key_lengths", "mask", "bias", "scale", "softcap", "sink", "dropout_mask")
    vars(x).update({"causal": False, **dict.fromkeys(names), **x.options})
    x.given_bias, x.given_scale = x.bias, x.scale
    x.k, x.v = x.problem.k, x.problem.v
    x.shape = x.problem.shape
    x.B, x.H, x.L, x.S = x.shape
    x.G, x.D, x.E = x.k.shape[-3], x.problem.q.shape[-1], x.v.shape[-1]


def facts(problem: Problem, given: Mapping[str, Any]) -> set[str]:
    """What a call contains besides its options, in the names of `Change.needs`."""
    q, k = problem.q.shape, problem.k.shape
    found = {"L = S"} if q[-2] == k[-2] else {"L != S"}
    found |= {"grouped heads"} if q[-3:-2] != k[-3:-2] else set()
    return found | ({"dlse"} if "dlse" in problem.cotangents else set())


def _full_rank(bias: Any) -> Array:
    full: Array = np.asarray(bias).reshape((1,) * (4 - np.ndim(bias)) + np.shape(bias))
    return full


def _of_row(a: Any) -> Any:
    """One number for each row, also if a change has made it one for each key."""
    return a[..., :1] if np.ndim(a) and a.shape[-1] > 1 else a


def _top(x: Any) -> Array:
    top = x.scores.max(-1, keepdims=True, initial=-np.inf)
    if x.sink is not None:
        top = np.maximum(top, x.sink)
    return np.asarray(where(top == -np.inf, 0.0, top))


