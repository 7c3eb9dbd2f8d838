"""Known mistakes of multi-head attention, the recurrent layer and softmax: the stages of `layer_stages`, one or some changed.

A change of a forward stage changes the backward with it, as automatic differentiation would: what moves elements is a route, of
which the backward takes the adjoint, and parameters that are left out lose their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.allowed import swap
from npattn.ops.checks import Array
from npattn.ops.multihead import merge_heads
from npattn.verify.cases import better
from npattn.verify.layer_stages import Change, Route, Values, adjoint, run
from npattn.verify.layers import LayerProblem

Mistake = dict[str, Change]  # by stage


def _zero(x: Any, value: Any) -> Any:
    return 0 * value


def _times(factor: Callable[[Any], float]) -> Change:
    return lambda x, value: value * factor(x)


def _to(value: Any) -> Change:
    """Another value, or another route, whatever the honest one is."""
    return lambda x, _: value


def _plain_outer(a: Array, b: Array) -> Array:
    a, b = (y.reshape(len(y), -1, y.shape[-1]) for y in (a, b))
    result: Array = swap(a) @ b
    return result


def _of_first_sequence(left: str, right: str) -> Change:
    return lambda x, _: _plain_outer(getattr(x, left)[:, :1], getattr(x, right)[:, :1])


def _sum_of_first_sequence(name: str) -> Change:
    return lambda x, _: getattr(x, name)[:, 0].sum(-2)


def _product(left: str, right: str) -> Change:
    return lambda x, _: getattr(x, left) @ getattr(x, right)


def _moved(source: str, target: str) -> Change:
    """What belongs to one input is counted for another; for "finish"."""
    return lambda x, d: d | {target: d[target] + d[source], source: 0 * d[source]}


def _exchanged(a: str, b: str) -> Mistake:
    """Two parameters change places, as in a packed array of another order, and so do their gradients."""

    def given(name: str) -> Change:
        return lambda x, value: getattr(x.problem.inputs["params"], name).reshape(value.shape)

    return {a: given(b), b: given(a), "finish": lambda x, d: d | {f"d{a}": d[f"d{b}"], f"d{b}": d[f"d{a}"]}}


def _shared(used: str, letters: str, biases: bool) -> Mistake:
    """The parameters of ``used`` project another input, too: theirs have no gradient, and its own have that of both."""
    pairs = [(f"{kind}_{used}", f"{kind}_{letters}") for kind in ("wb" if biases else "w")]

    def given(name: str) -> Change:
        return lambda x, value: getattr(x.problem.inputs["params"], name).reshape(value.shape)

    def finish(x: Any, d: Any) -> Any:
        return d | {f"d{a}": d[f"d{a}"] + d[f"d{b}"] for a, b in pairs} | {f"d{b}": 0 * d[f"d{b}"] for _, b in pairs}

    return {**{b: given(a) for a, b in pairs}, "finish": finish}


# -- multi-head attention


def _interleaved(x: Any, route: partial[Array]) -> Route:
    """(.., L, D H) -> (.., H, L, D)"""
    heads = route.keywords["heads"]
    return lambda a: np.moveaxis(a.reshape(*a.shape[:-1], -1, heads), -1, -3)


def _as_it_lies(x: Any, route: partial[Array]) -> Route:
    """(B, L, H D) read as (B, H, L, D)"""
    heads = route.keywords["heads"]
    return lambda a: a.reshape(*a.shape[:-2], heads, a.shape[-2], -1)


def _first_head(x: Any, route: Route) -> Route:
    return lambda a: np.repeat(route(a)[..., :1, :, :], route(a).shape[-3], -3)


def _groups(index: Callable[[Any], Array]) -> Change:
    return lambda x, route: lambda a: np.take(a, index(x), -3)


def _by_modulo(x: Any) -> Array:
    return np.asarray(np.arange(x.H) % x.G)


def _by_group_count(x: Any) -> Array:
    return np.asarray(np.minimum(np.arange(x.H) // x.G, x.G - 1))


def _flat_merge(o: Array) -> Array:
    return o.reshape(*o.shape[:-3], o.shape[-2], -1)


def _heads_before_batch(o: Array) -> Array:
    n, B, H, L, E = o.shape
    return merge_heads(o.reshape(n, H, B, L, E).swapaxes(1, 2))


def _interleaved_merge(o: Array) -> Array:
    """(.., H, L, E) -> (.., L, E H)"""
    o = np.moveaxis(o, -3, -1)
    return o.reshape(*o.shape[:-2], -1)


def _full_mask(x: Any, mask: Array) -> Array:
    (B, L), S = x.x_q.shape[1:3], x.x_k.shape[2]
    return np.broadcast_to(mask, (B, x.H, L, S))


def _tiled_mask(x: Any, mask: Array) -> Array:
    """Of (B H, L, S): the masks of the sequences one after the other, and again, where each is due H times in a row."""
    mask = _full_mask(x, mask)[:, :1]
    B, _, L, S = mask.shape
    return np.tile(mask[:, 0], (x.H, 1, 1)).reshape(B, x.H, L, S)


def _dead(x: Any) -> Array:
    """(.., B, L, 1) queries that no head has a key for."""
    return np.asarray((x.lse == -np.inf).all(-2)[..., None])


def _mean_where_dead(x: Any, o: Array) -> Array:
    return np.where((x.lse == -np.inf)[..., None], x.group(x.v).mean(-2, keepdims=True), o)


def _nan_where_dead(x: Any, rows: Array) -> Array:
    return np.where((x.lse == -np.inf)[..., None], np.nan, rows)


def _nan_beside_dead(x: Any, keys: Array) -> Array:
    """0 * NaN in the sums over the queries."""
    return np.where((x.lse == -np.inf).any(-1)[..., None, None], np.nan, keys)


def _poisoned(x: Any, value: Array) -> Array:
    """NaN in all of a row whose query, or any key or value of whose head, is not finite."""
    q, k, v = (np.isfinite(a).all(-1, keepdims=True) for a in (x.q, x.group(x.k), x.group(x.v)))
    return np.where(q & (k & v).all(-2, keepdims=True), value, np.nan)


def _poisoned_keys(x: Any, value: Array) -> Array:
    """And in the sums over the queries, which take in all of them."""
    clean = np.isfinite(_poisoned(x, x.q)).all((-2, -1), keepdims=True)
    return np.where(clean, value, np.nan)


def _leak_of_dead(x: Any, dv: Array) -> Array:
    dead = np.where((x.lse == -np.inf)[..., None], x.do, 0)
    return np.asarray(dv + dead.sum(-2, keepdims=True) / dv.shape[-2])


def _some_heads(x: Any, g: Array) -> Array:
    """Zero but for the first head of each group."""
    first: Array = np.arange(x.H) % (x.H // x.G) == 0
    return np.where(first[:, None, None], g, 0)


def _group_mean(x: Any, g: Array) -> Array:
    return np.asarray(g / (x.H // x.G))


def _other_groups(name: str) -> Change:
    """The sum over the heads h % G instead."""
    return lambda x, g: adjoint(lambda a: np.take(a, _by_modulo(x), -3), g.shape, getattr(x, name))


_NO_MASK: Mistake = {"mask": _to(None)}
_DEAD_ZERO: Mistake = {
    "finish": lambda x, d: d | {"out": np.where(_dead(x), 0, d["out"])},
    "dout": lambda x, dout: np.where(_dead(x), 0, dout),
}

_MULTI_HEAD: dict[str, Mistake] = {
    # inputs and parameters
    "values of x_k": {"x_v": lambda x, _: x.x_k, "finish": _moved("dx_v", "dx_k")},
    "keys of x_v": {"x_k": lambda x, _: x.problem.inputs["x_v"][None], "finish": _moved("dx_k", "dx_v")},
    "keys of x_q": {"x_k": lambda x, _: x.x_q, "finish": _moved("dx_k", "dx_q")},
    **{f"{b} forgotten": {b: _zero, f"d{b}": _zero} for b in ("b_q", "b_k", "b_v", "b_o")},
    "all biases forgotten": {n: _zero for b in ("b_q", "b_k", "b_v", "b_o") for n in (b, f"d{b}")},
    **{f"{b} added twice": {b: _times(lambda x: 2), f"d{b}": _times(lambda x: 2)} for b in ("b_q", "b_v", "b_o")},
    "b_o once a head": {b: _times(lambda x: x.H) for b in ("b_o", "db_o")},
    "b_q added behind the scale": {
        b: _times(lambda x: (x.problem.inputs["params"].w_q.shape[1] / x.H) ** 0.5) for b in ("b_q", "db_q")},
    **{f"{w} transposed": {f"{w} as used": _to(swap)} for w in ("w_q", "w_k", "w_v", "w_o")},
    "all weights transposed": {f"{w} as used": _to(swap) for w in ("w_q", "w_k", "w_v", "w_o")},
    "w_q, w_k and w_v transposed": {f"{w} as used": _to(swap) for w in ("w_q", "w_k", "w_v")},
    "w_q and w_k exchanged": _exchanged("w_q", "w_k"),
    "w_k and w_v exchanged": _exchanged("w_k", "w_v"),
    "b_q and b_k exchanged": _exchanged("b_q", "b_k"),
    "b_k and b_v exchanged": _exchanged("b_k", "b_v"),
    **{f"{b} is projected by w_{a}{' and b_' + a if both else ''}": _shared(a, b, both)
       for a, b in (("k", "v"), ("q", "k"), ("q", "v"), ("v", "k"), ("k", "q"), ("v", "q")) for both in (False, True)},
    # heads
    "head's columns interleaved": {"split_q": _interleaved},
    "columns of q, k and v interleaved": {f"split_{n}": _interleaved for n in "qkv"},
    "heads of q, k and v split without a transpose": {f"split_{n}": _as_it_lies for n in "qkv"},
    "split and merged without a transpose": {f"split_{n}": _as_it_lies for n in "qkv"} | {"merge": _to(_flat_merge)},
    "one projection for all heads": {"split_q": _first_head},
    "one key head for all": {"group": _groups(lambda x: np.zeros(x.H, int))},
    "head h reads h % G": {"group": _groups(_by_modulo)},
    "head h reads h // G": {"group": _groups(_by_group_count)},
    "scale of the model's width": {"scale": lambda x, _: x.x_q.shape[-1] ** -0.5},
    "scale forgotten": {"scale": _to(1.0)},
    "scale twice": {"scale": lambda x, _: 1 / x.q.shape[-1]},
    "scale of the default": {"scale": _to(None)},
    "merged without a transpose": {"merge": _to(_flat_merge)},
    "merged as if (H, B)": {"merge": _to(_heads_before_batch)},
    "concat over E": {"merge": _to(_interleaved_merge)},
    "last head missing": {"o": lambda x, o: np.where(np.arange(x.H)[:, None, None] == x.H - 1, 0, o),
                          "do": lambda x, do: np.where(np.arange(x.H)[:, None, None] == x.H - 1, 0, do)},
    "mean of the heads": {"o": lambda x, o: o.mean(-3, keepdims=True) + 0 * o,
                          "do": lambda x, do: do.mean(-3, keepdims=True) + 0 * do},
    # what may be seen, and the options of attention
    "0 times NaN behind the mask": {
        "o": _poisoned, "dq": _poisoned, "dkh": _poisoned_keys, "dvh": _poisoned_keys},
    "mask=drop": {"mask": lambda x, mask: ~mask},
    "mask ignored": _NO_MASK,
    "mask of the first sequence": {"mask": lambda x, mask: _full_mask(x, mask)[:1]},
    "mask of the first head": {"mask": lambda x, mask: _full_mask(x, mask)[:, :1]},
    "mask of the first query": {"mask": lambda x, mask: _full_mask(x, mask)[..., :1, :]},
    "mask transposed": {"mask": lambda x, mask: swap(mask)},
    "masks of the sequences tiled over (B H)": {"mask": _tiled_mask},
    "always causal": {"mask": lambda x, mask: _full_mask(x, np.array(True) if mask is None else mask)
                      & np.tri(x.x_q.shape[2], x.x_k.shape[2], dtype=bool)},
    **{f"{n} ignored": {n: _to(None)} for n in ("bias", "softcap", "sink", "dropout_mask")},
    "a dead query gives 0": _DEAD_ZERO,
    "a dead query gives the mean of the values": {"o": _mean_where_dead, "dvh": _leak_of_dead},
    "a dead query gives NaN": {"o": _nan_where_dead, "dq": _nan_where_dead, "dkh": _nan_beside_dead, "dvh": _nan_beside_dead},
    # backward
    **{f"{b} a mean": {f"d{b}": lambda x, g: g / np.prod(x.dout.shape[1:3])} for b in ("b_q", "b_o")},
    **{f"{b} a mean": {f"d{b}": lambda x, g: g / np.prod(x.x_k.shape[1:3])} for b in ("b_k", "b_v")},
    "split without a transpose": {"do": lambda x, do: x.dc.reshape(do.shape)},
    "w_o by the heads as they lie": {"dw_o": lambda x, _: _plain_outer(x.o.reshape(x.c.shape), x.dout)},
    "first head of the group in dk": {"dkh": _some_heads},
    "first head of the group in dv": {"dvh": _some_heads},
    "mean of the group in dk": {"dk": _group_mean},
    "mean of the group in dv": {"dv": _group_mean},
    "groups interleaved in dk": {"dk": _other_groups("dkh")},
    "groups interleaved in dv": {"dv": _other_groups("dvh")},
    **{f"{n} without a gradient": {f"d{n}": _zero}
       for n in ("w_q", "w_k", "w_v", "w_o", "b_q", "b_v", "b_o", "x_q", "x_k", "x_v")},
    **{f"w_{n} of the first sequence": {f"dw_{n}": _of_first_sequence(f"x_{n}", f"dy_{n}")} for n in "qkv"},
    "w_o of the first sequence": {"dw_o": _of_first_sequence("c", "dout")},
    "w_k by x_v": {"dw_k": lambda x, _: _plain_outer(x.x_v, x.dy_k)},
    "w_v by x_k": {"dw_v": lambda x, _: _plain_outer(x.x_k, x.dy_v)},
    "w_k by x_q": {"dw_k": lambda x, _: _plain_outer(x.x_q, x.dy_k)},
    **{f"gradient of {w} transposed": {f"d{w}": lambda x, g: swap(g)} for w in ("w_q", "w_k", "w_v", "w_o")},
    **{f"b_{n} of the first sequence": {f"db_{n}": _sum_of_first_sequence(f"dy_{n}")} for n in "qkv"},
    "b_o of the first sequence": {"db_o": _sum_of_first_sequence("dout")},
    "b_q of the heads as they lie": {"db_q": lambda x, g: swap(x.dq.sum((1, 3))).reshape(g.shape)},
    "x_k gets that of x_v": {"finish": lambda x, d: d | {"dx_k": d["dx_k"] + d["dx_v"]}},
    "x_q gets all three": {"finish": lambda x, d: d | {"dx_q": d["dx_q"] + d["dx_k"] + d["dx_v"]}},
    "by w_o, not its transpose": {"dc": _product("dout", "w_o")},
    **{f"by w_{n}, not its transpose": {f"dx_{n}": _product(f"dy_{n}", f"w_{n}")} for n in "qkv"},
    "dq without the scale": {"dq": _times(lambda x: x.q.shape[-1] ** 0.5)},
    "scale squared in dk": {"dkh": _times(lambda x: x.q.shape[-1] ** -0.5)},
    "dk and dv exchanged": {"finish": lambda x, d: d | {"dx_k": d["dx_v"], "dx_v": d["dx_k"]}},
}  # fmt: skip


# -- the recurrent layer


def _last_of_outputs(x: Any, value: Array) -> Array:
    return np.asarray(x.h[:, :, -1])


def _next_input(x: Any, route: Route) -> Route:
    """Step t takes the input of the next one, and the last step its own."""
    return lambda a: a[:, :, np.minimum(np.arange(a.shape[2]) + 1, a.shape[2] - 1)]


def _turned(a: Array) -> Array:
    return np.flip(a, 2)


def _swapped_memory(a: Array) -> Array:
    """What lies as (T, B, N) read as (B, T, N)."""
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
    "start of the carry": _zero,
}  # fmt: skip

_RNN: dict[str, Mistake] = {
    # forward
    "initial state ignored": {"h0": _zero, "dh0": _zero},
    "lengths ignored": _lengths(lambda n, T: np.full_like(n, T)),
    "lengths of the first sequence": _lengths(lambda n, T: np.full_like(n, n[0])),
    "one step too many": _lengths(lambda n, T: n + 1),
    "one step too few": _lengths(lambda n, T: n - 1),
    "sequences padded in front": {"valid": lambda x, valid: valid[:, ::-1]},
    "no bias in the first step": {"biased": _not_first},
    "b forgotten": {"b": _zero, "db": _zero},
    "b added twice": {"b": _times(lambda x: 2), "db": _times(lambda x: 2)},
    "input and state multiplied": {
        "z": lambda x, _: x.a[:, :, x.t] * x.r, "da": lambda x, dz: dz * x.r_all[x.t],
        "dr": lambda x, dz: dz * x.a[:, :, x.t], "r": lambda x, r: _kept(x, r)},
    "w_h transposed": {"w_h as used": _to(swap)},
    "w_x transposed": {"w_x": lambda x, w: swap(w), "finish": lambda x, d: d | {"dw_x": swap(d["dw_x"])}},
    "w_x and w_h exchanged": _exchanged("w_x", "w_h"),
    "input of the next step": {"steps": _next_input},
    "time runs backwards": {"steps": _to(_turned), "arrange": _to(_turned)},
    "output goes on after the length": {"shown": _every_step},
    "last state repeated after the length": {"repeat": _to(True)},
    "state goes on after the length": {"moves": _every_step},
    "h_last of step T": _LAST_OF_T,
    "h_last is 0 where the length is 0": {
        "h_last": lambda x, h: np.where(x.lengths[:, None] == 0, 0, h),
        "start of the carry": lambda x, carry: np.where(x.lengths[:, None] == 0, 0, carry)},
    "h_last of the first step": {"h_last": lambda x, _: x.h[:, :, 0]},
    "time and batch swapped": {"arrange": _to(_swapped_memory)},
    "relu for tanh, tanh for relu": {"tanh": lambda x, tanh: not tanh},
    "no nonlinearity": {"new": lambda x, _: x.z, "slope": lambda x, slope: np.ones_like(slope)},
    "state not carried in the forward": {"r": _zero, "dr": _zero},
    # backward
    "dh_last ignored": {"start of the carry": _zero},
    "dh ignored": {"dh": _zero},
    "dh_last at step T": {"start of the carry": _zero, "dh": _dh_with_last},
    "slope of the state before": {"slope": lambda x, _: _slope(x, x.states[:, :, x.t])},
    "slope 1 - h": {"slope": lambda x, _: 1 - x.states[:, :, x.t + 1]},
    "slope forgotten": {"slope": lambda x, slope: np.ones_like(slope)},
    "slope of the sum before the nonlinearity": {
        "z": lambda x, z: _kept(x, z, "z_all"), "slope": lambda x, _: _slope(x, x.z_all[x.t])},
    "steps after the length take part": {"shown in the backward": _every_step, "moves in the backward": _every_step},
    "dh times slope, carry without": {"dz": lambda x, dz: np.where(dz != 0, x.d_out * x.slope + x.d_state, 0)},
    "carry times slope, dh without": {"dz": lambda x, dz: np.where(dz != 0, x.d_out + x.d_state * x.slope, 0)},
    "carried by w_h, not its transpose": {"back": lambda x, _: x.dr @ x.w_h},
    "not carried": {"back": _zero},
    "carry lost after the length": {"carry": lambda x, _: x.back},
    "carry added up": {"carry": lambda x, carry: carry + x.entering},
    "w_h by the new state": {"before": lambda x, _: x.states[:, :, 1:]},
    "= for += in w_h": {"dw_h": lambda x, _: _plain_outer(x.before[:, :, :1], x.dr[:, :, :1])},
    "= for += in w_x": {"dw_x": lambda x, _: _plain_outer(x.xs[:, :, :1], x.da[:, :, :1])},
    **{f"{n} without a gradient": {f"d{n}": _zero} for n in ("w_x", "w_h", "b", "h0", "x")},
    **{f"gradient of {w} transposed": {f"d{w}": lambda x, g: swap(g)} for w in ("w_x", "w_h")},
    "w_x of the first sequence": {"dw_x": _of_first_sequence("xs", "da")},
    "w_h of the first sequence": {"dw_h": _of_first_sequence("before", "dr")},
    "w_h without the initial state": {"before": lambda x, h: np.where(np.arange(h.shape[2])[:, None] == 0, 0, h)},
    "b of the first sequence": {"db": _sum_of_first_sequence("da")},
    "b of the last step alone": {"db": lambda x, _: x.da[:, :, -1].sum(-2)},
    "b a mean": {"db": lambda x, g: g / np.prod(x.da.shape[1:3])},
    "b summed over the steps alone, a mean over the batch": {"db": lambda x, g: g / x.da.shape[1]},
    "h0 of one step too few": {"dh0": lambda x, _: x.entering},
    "dx a step late": {"dx": lambda x, dx: np.roll(dx, 1, 2)},
    "dx a step early": {"dx": lambda x, dx: np.roll(dx, -1, 2)},
    "by w_x, not its transpose": {"dxs": lambda x, _: x.da @ x.w_x[:, None]},
}  # fmt: skip


def _kept(x: Any, value: Array, name: str = "r_all") -> Array:
    """The value, which is also kept for the backward by step."""
    if x.t == 0:
        setattr(x, name, [])
    getattr(x, name).append(value)
    return value


def _slope(x: Any, h: Array) -> Array:
    return np.asarray(1 - h * h if x.tanh else np.where(h > 0, 1, 0 * h))


# -- softmax


def _in_low(x: Any, value: Array) -> Array:
    """In the candidate's dtype and back: what overflows or underflows there."""
    return value.astype(x.low).astype(value.dtype)


def _filled(fill: float) -> Mistake:
    """What is masked by a number, and counted: nothing is -inf."""

    def scores(x: Any, _: Array) -> Array:
        return np.where(x.allowed, x.given, max(fill, float(np.finfo(x.low).min)))

    return {"scores": scores, "weights": lambda x, _: x.ratio, "dp": lambda x, _: x.dweights}


def _plus(small: float) -> Change:
    return lambda x, value: value + small


def _with_seen(f: Callable[[Any], Array]) -> Mistake:
    return {"allowed": lambda x, _: f(x) & (x.given != -np.inf)}


_SOFTMAX: dict[str, Mistake] = {
    "no max": {"top": _zero, "e": lambda x, e: _in_low(x, e), "ratio": lambda x, r: _in_low(x, r)},
    "max over the whole array": {"top": lambda x, top: np.full_like(top, x.scores.max()),
                                 "e": lambda x, e: _in_low(x, e)},
    "max over masked scores too": {"top": lambda x, _: x.given.max(-1, keepdims=True), "e": lambda x, e: _in_low(x, e)},
    "mask added as 0 and 1": {"allowed": lambda x, _: x.given != -np.inf, "scores": lambda x, s: s + x.mask},
    "mask multiplied into the scores": {
        "allowed": lambda x, _: x.given != -np.inf, "scores": lambda x, s: s * x.mask, "ds": lambda x, ds: ds * x.mask},
    **{f"masked scores of -1e{n}": _filled(-(10.0**n)) for n in (3, 4, 9)},
    "masked scores of the smallest number": _filled(-np.inf),
    "mask after the softmax, not normalised again": {
        "allowed": lambda x, _: x.given != -np.inf, "weights": lambda x, w: np.where(x.mask & True, w, 0),
        "dp": lambda x, dp: np.where(x.mask, dp, 0), "ds": lambda x, _: x.ratio * x.centred},
    "masked scores counted in the sum": {
        "z": lambda x, _: np.exp(x.given - x.top).sum(-1, keepdims=True),
        "dscores": lambda x, ds: np.where(x.allowed, ds, -np.exp(x.given - x.top) / x.z * x.delta)},
    "mask=drop": _with_seen(lambda x: ~x.mask),
    "mask ignored": _with_seen(lambda x: np.ones_like(x.given, bool)),
    "mask of the first sequence": _with_seen(lambda x: np.broadcast_to(x.mask, x.given.shape)[:, :1]),
    "mask of the first row": _with_seen(lambda x: np.broadcast_to(x.mask, x.given.shape)[..., :1, :]),
    "mask transposed": _with_seen(lambda x: swap(x.mask)),
    "a dead row gives NaN": {"ratio": lambda x, _: x.e / x.z, "weights": lambda x, w: np.where(_no_score(x), x.ratio, w),
                             "dscores": lambda x, ds: np.where(_no_score(x), np.nan, ds)},
    "a dead row gives 1 / S": {"weights": lambda x, w: np.where(_no_score(x), 1 / w.shape[-1], w)},
    "axis -2": {"axis": _to(-2)},
    "axis 0": {"axis": _to(1)},
    "over the whole array": {"z": lambda x, z: np.broadcast_to((x.e * np.exp(x.top - x.top.max())).sum(), z.shape)
                             * np.exp(x.top.max() - x.top),
                             "delta": lambda x, delta: np.full_like(delta, (x.weights * x.dp).sum())},
    "base 2": {"e": lambda x, _: np.exp2(x.scores - x.top), "ds": lambda x, ds: ds * np.log(2)},
    "divided by the root of S": {"scores": lambda x, s: s * s.shape[-1] ** -0.5, "ds": lambda x, ds: ds * ds.shape[-1] ** -0.5},
    "not normalised": {"ratio": lambda x, _: x.e, "delta": _zero},
    "log of the weights": {"weights": lambda x, w: np.log(w), "ds": lambda x, _: x.dp - x.ratio * x.dp.sum(-1, keepdims=True)},
    "one score more in the sum": {"z": lambda x, z: z + np.exp(-x.top)},
    **{f"1e-{n} beside the sum": {"z": _plus(10.0**-n)} for n in (3, 5, 6, 8)},
    # backward
    "Delta 0": {"delta": _zero},
    "Delta over the rows": {"delta": lambda x, _: x.terms.sum(-2, keepdims=True)},
    "Delta a mean": {"delta": lambda x, delta: delta / x.terms.shape[-1]},
    "Delta not times p": {"ds": lambda x, _: x.weights * x.dp - x.delta},
    "Delta of the sum of dp": {"delta": lambda x, _: x.dp.sum(-1, keepdims=True)},
    "Delta with the wrong sign": {"delta": lambda x, delta: -delta},
    "p (1 - p) dp": {"ds": lambda x, _: x.weights * (1 - x.weights) * x.dp},
    "not times p": {"ds": lambda x, _: x.centred},
    "p squared": {"ds": lambda x, ds: x.weights * ds},
    "dweights as they are": {"ds": lambda x, _: x.dp},
    "gradient of another sign": {"dscores": lambda x, ds: -ds},
    "no gradient": {"dscores": _zero},
}  # fmt: skip


def _no_score(x: Any) -> Array:
    return np.asarray(~x.allowed.any(-1, keepdims=True))


def _tried(mistake: Mistake) -> Callable[[LayerProblem], Values]:
    def values(problem: LayerProblem) -> Values:
        """What comes out, in a better dtype than the problem's; nothing where the mistake cannot be made in this call."""
        wide = problem.astype(better(problem.dtype) or problem.dtype)
        try:
            found = run(wide, mistake, low=problem.dtype)
        except (ValueError, IndexError, TypeError, AttributeError, KeyError):
            return {}
        return {name: x[0] for name, x in found.items()}

    return values


MISTAKES: dict[str, dict[str, Callable[[LayerProblem], Values]]] = {
    op: {name: _tried(mistake) for name, mistake in table.items()}
    for op, table in (("multi_head", _MULTI_HEAD), ("rnn", _RNN), ("softmax", _SOFTMAX))
}

__all__ = ["MISTAKES"]
