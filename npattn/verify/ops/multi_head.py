"""The record of multi-head attention: projections, heads, concat and the output projection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn import convert
from npattn.ops.allowed import swap
from npattn.ops.attention import AttentionCache, attention_backward, attention_forward
from npattn.ops.checks import Array
from npattn.ops.multihead import merge_heads, multi_head_backward, multi_head_forward, split_heads
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.op import parts as of_nested
from npattn.verify.ops import multi_head_parts as parts
from npattn.verify.ops.attention.errors import predict
from npattn.verify.ops.layers import (
    LayerCalls,
    Mistake,
    Route,
    adjoint,
    changes,
    exchanged,
    of_first_sequence,
    of_params,
    plain_outer,
    product,
    same,
    sum_of_first_sequence,
    times,
    to_value,
    zero,
)  # fmt: skip
from npattn.verify.ops.multi_head_space import CASES, OPTIONS, SPACE
from npattn.verify.stages import by_noise, no_inner_rounding

Change = Callable[[Any, Any], Any]


def reference(p: Problem) -> Values:
    out, cache = multi_head_forward(**p.inputs, **p.options)
    return {"out": out, **_gradients(p.cotangents["dout"], cache)}


def _gradients(dout: Array, cache: Any) -> Values:
    g = multi_head_backward(dout, cache)
    found = {**of_params(g.params), "dx_q": g.x_q, "dx_k": g.x_k, "dx_v": g.x_v, "dbias": g.bias, "dsink": g.sink}
    return {name: x for name, x in found.items() if x is not None}


def forward(x: Any) -> None:
    """Equations (1) to (8) of `npattn.ops.multihead`. For (6) the key and value heads are repeated, one for each query head."""
    params, options = x.problem.inputs["params"], dict(x.options)
    x.H = H = options.pop("num_heads")
    x.G = G = options.pop("num_kv_heads", None) or H
    for name in ("x_q", "x_k", "x_v"):
        x.input(name, x.problem.inputs[name])
    for _, name, p in of_nested({"params": params}):
        x.input(name, None if p is None else p.reshape((1,) * (3 - p.ndim) + p.shape))
    for name in ("w_q", "w_k", "w_v", "w_o"):
        x.keep(f"{name} as used", lambda: same)
    for n, heads in (("q", H), ("k", G), ("v", G)):
        y = x.linear(f"y_{n}", getattr(x, f"x_{n}"), _used(x, f"w_{n}"), getattr(x, f"b_{n}"))  # (1), (2), (3)
        split = x.keep(f"split_{n}", lambda heads=heads: partial(split_heads, heads=heads))
        z = x.keep(f"split {n}", lambda split=split, y=y: split(y))
        x.keep(n, lambda n=n, z=z: z if n == "v" else parts.forward(x, n, z, options))  # (4), (5)
    x.keep("group", lambda: lambda a: np.take(a, np.arange(H) // (H // G), -3))
    x.keep("scale", lambda: options.pop("scale", None))
    x.keep("mask", lambda: options.pop("mask", None))
    others = {n: value for n, value in options.items() if n not in (*parts.OPTIONS, "scale", "mask")}
    rest = {n: x.keep(n, lambda value=value: value) for n, value in others.items()}
    x.keep("o", lambda: _attend(x, rest | {"scale": x.scale, "mask": x.mask}), lambda _: _errors(x).out)  # (6)
    x.keep("merge", lambda: merge_heads)
    x.keep("c", lambda: x.merge(x.o))  # (7)
    x.linear("out", x.c, _used(x, "w_o"), x.b_o)  # (8)


def backward(x: Any) -> None:
    """The backward, from (8) to (1)."""
    params, H, G = x.problem.inputs["params"], x.H, x.G
    x.input("dout", x.problem.cotangents["dout"])
    x.product("dc", x.dout, swap(_used(x, "w_o")))  # (8)
    dw = x.outer("dw_o as used", x.c, x.dout, H, 0)
    x.keep("dw_o", lambda: adjoint(getattr(x, "w_o as used"), (len(dw), *params.w_o.shape), dw))
    x.total("db_o", x.dout, (-3, -2))
    x.keep("do", lambda: adjoint(x.merge, x.o.shape, x.dc))  # (7)
    grads = [attention_backward(x.do[i], cache) for i, cache in enumerate(x.caches)]  # (6)
    errors = _errors(x, grads[0]) if x.rng is not None else None
    for n, stage in (("q", "dq"), ("k", "dkh"), ("v", "dvh"), ("bias", "dbias"), ("sink", "dsink")):
        if getattr(grads[0], n) is not None:
            x.keep(stage, lambda n=n: np.stack([getattr(g, n) for g in grads]), lambda _, n=n: getattr(errors, n))
    if errors is not None:
        x.dkh = x.dkh + _common_to_rows(x, x.caches[0], errors.out)
    for n, g in (("k", x.dkh), ("v", x.dvh)):
        like = getattr(x, n).shape[1:]
        rounding = partial(_group_rounding, x, g[0], like) if G != H else None
        x.keep(f"d{n}", lambda g=g, like=like: adjoint(x.group, (len(x.q), *like), g), rounding)
    for n in ("v", "k", "q"):
        w, inner, split = f"w_{n}", getattr(x, f"y_{n}").shape, getattr(x, f"split_{n}")
        dz = getattr(x, f"d{n}")
        dz = dz if n == "v" else parts.backward(x, n, dz)  # (5), (4)
        dy = x.keep(f"dy_{n}", lambda inner=inner, split=split, dz=dz: adjoint(split, inner, dz))
        x.product(f"dx_{n}", dy, swap(_used(x, w)))  # (3), (2), (1)
        dw = x.outer(f"d{w} as used", getattr(x, f"x_{n}"), dy, H if n == "q" else G)
        shape = (len(dw), *getattr(params, w).shape)
        x.keep(f"d{w}", lambda w=w, shape=shape, dw=dw: adjoint(getattr(x, f"{w} as used"), shape, dw))
        x.total(f"db_{n}", dy, (-3, -2))


def _used(x: Any, name: str) -> Array:
    """A weight as it enters the product."""
    return np.asarray(getattr(x, f"{name} as used")(getattr(x, name)))


def _attend(x: Any, options: dict[str, Any]) -> Array:
    """(6) for every sample of the noise."""
    kh, vh = x.group(x.k), x.group(x.v)
    calls = [attention_forward(x.q[i], kh[i], vh[i], **options) for i in range(len(x.q))]
    x.caches = [cache for _, cache in calls]
    x.lse, x.first_o = np.stack([cache.lse for cache in x.caches]), calls[0][0]
    return np.stack([o for o, _ in calls])


def _errors(x: Any, grads: Any = None) -> Any:
    """The predicted rounding errors within (6), from the sample without noise."""
    of_backward = () if grads is None else (x.do[0], None, grads)
    return predict(x.caches[0], x.first_o, *of_backward, dtype=x.precision.dtype)


def _common_to_rows(x: Any, cache: AttentionCache, e_out: Array) -> Array:
    """Noise in dk from the error of sum_j p_j dp_j, which is the same for all keys of a query and so adds up over them."""
    p, do, o = np.asarray(cache.weights), x.do[0], x.o[0]
    by_weights = x.rounding.rounding_of_sum(p * (do @ swap(cache.v)), -1)
    by_output = np.hypot(x.rounding.sum(do * e_out, -1), x.rounding.rounding_of_sum(do * o, -1))
    rows = np.maximum(by_weights, by_output) * x.noise(*p.shape[:-1], 1)
    return np.asarray(cache.scale * (swap(p * rows) @ cache.q))


def _group_rounding(x: Any, g: Array, shape: tuple[int, ...], _: Any) -> Array:
    """The rounding of the sum over the heads that read one group."""
    heads = g.reshape(*shape[:-2], -1, *shape[-2:])
    rounding: Array = x.rounding.rounding_of_sum(heads, -3)
    return rounding.reshape(shape)


def _moved(source: str, target: str) -> Change:
    """The gradient of ``source`` is added to that of ``target``. For the stage "finish"."""
    return lambda x, d: d | {target: d[target] + d[source], source: 0 * d[source]}


def _shared(used: str, letters: str, biases: bool) -> Mistake:
    """The parameters of ``used`` take the place of those of ``letters``: they get both gradients, the others get 0."""
    pairs = [(f"{kind}_{used}", f"{kind}_{letters}") for kind in ("wb" if biases else "w")]

    def given(name: str) -> Change:
        return lambda x, value: getattr(x.problem.inputs["params"], name).reshape(value.shape)

    def finish(x: Any, d: Any) -> Any:
        return d | {f"d{a}": d[f"d{a}"] + d[f"d{b}"] for a, b in pairs} | {f"d{b}": 0 * d[f"d{b}"] for _, b in pairs}

    return {**{b: given(a) for a, b in pairs}, "finish": finish}


def _interleaved(x: Any, route: partial[Array]) -> Route:
    """A split with the heads innermost: (.., L, D H) -> (.., H, L, D)"""
    heads = route.keywords["heads"]
    return lambda a: np.moveaxis(a.reshape(*a.shape[:-1], -1, heads), -1, -3)


def _as_it_lies(x: Any, route: partial[Array]) -> Route:
    """A split without a transpose: (B, L, H D) read as (B, H, L, D)"""
    heads = route.keywords["heads"]
    return lambda a: a.reshape(*a.shape[:-2], heads, a.shape[-2], -1)


def _groups(index: Callable[[Any], Array]) -> Change:
    return lambda x, route: lambda a: np.take(a, index(x), -3)


def _by_modulo(x: Any) -> Array:
    return np.asarray(np.arange(x.H) % x.G)


def _flat_merge(o: Array) -> Array:
    return o.reshape(*o.shape[:-3], o.shape[-2], -1)


def _heads_before_batch(o: Array) -> Array:
    n, B, H, L, E = o.shape
    return merge_heads(o.reshape(n, H, B, L, E).swapaxes(1, 2))


def _interleaved_merge(o: Array) -> Array:
    """A merge with the heads innermost: (.., H, L, E) -> (.., L, E H)"""
    o = np.moveaxis(o, -3, -1)
    return o.reshape(*o.shape[:-2], -1)


def _full_mask(x: Any, mask: Array) -> Array:
    (B, L), S = x.x_q.shape[1:3], x.x_k.shape[2]
    return np.broadcast_to(mask, (B, x.H, L, S))


def _tiled_mask(x: Any, mask: Array) -> Array:
    """For scores (B H, L, S) the masks of the sequences are tiled, b0 b1 b0 b1; right would be b0 b0 b1 b1."""
    mask = _full_mask(x, mask)[:, :1]
    B, _, L, S = mask.shape
    return np.tile(mask[:, 0], (x.H, 1, 1)).reshape(B, x.H, L, S)


def _dead(x: Any) -> Array:
    """(.., B, L, 1): the queries that see no key in any head."""
    return np.asarray((x.lse == -np.inf).all(-2)[..., None])


def _mean_where_dead(x: Any, o: Array) -> Array:
    return np.where((x.lse == -np.inf)[..., None], x.group(x.v).mean(-2, keepdims=True), o)


def _nan_where_dead(x: Any, rows: Array) -> Array:
    return np.where((x.lse == -np.inf)[..., None], np.nan, rows)


def _nan_beside_dead(x: Any, keys: Array) -> Array:
    """NaN in all keys of a head with a dead query: the sum over the queries has 0 * NaN."""
    return np.where((x.lse == -np.inf).any(-1)[..., None, None], np.nan, keys)


def _poisoned(x: Any, value: Array) -> Array:
    """NaN in a whole row if its query, or any key or value of its head, is not finite."""
    q, k, v = (np.isfinite(a).all(-1, keepdims=True) for a in (x.q, x.group(x.k), x.group(x.v)))
    return np.where(q & (k & v).all(-2, keepdims=True), value, np.nan)


def _poisoned_keys(x: Any, value: Array) -> Array:
    """NaN in all keys of a head if one of its rows is `_poisoned`: the sum over the queries includes that row."""
    clean = np.isfinite(_poisoned(x, x.q)).all((-2, -1), keepdims=True)
    return np.where(clean, value, np.nan)


def _leak_of_dead(x: Any, dv: Array) -> Array:
    dead = np.where((x.lse == -np.inf)[..., None], x.do, 0)
    return np.asarray(dv + dead.sum(-2, keepdims=True) / dv.shape[-2])


def _some_heads(x: Any, g: Array) -> Array:
    """Zero in all heads but the first of each group."""
    first: Array = np.arange(x.H) % (x.H // x.G) == 0
    return np.where(first[:, None, None], g, 0)


def _other_groups(name: str) -> Change:
    """The sum over the heads h with the same h % G, instead of those of the group."""
    return lambda x, g: adjoint(lambda a: np.take(a, _by_modulo(x), -3), g.shape, getattr(x, name))


_NO_MASK: Mistake = {"mask": to_value(None)}
_DEAD_ZERO: Mistake = {
    "finish": lambda x, d: d | {"out": np.where(_dead(x), 0, d["out"])},
    "dout": lambda x, dout: np.where(_dead(x), 0, dout),
}

_MISTAKES: dict[str, Mistake] = {
    # inputs and parameters
    "values of x_k": {"x_v": lambda x, _: x.x_k, "finish": _moved("dx_v", "dx_k")},
    "keys of x_v": {"x_k": lambda x, _: x.problem.inputs["x_v"][None], "finish": _moved("dx_k", "dx_v")},
    "keys of x_q": {"x_k": lambda x, _: x.x_q, "finish": _moved("dx_k", "dx_q")},
    **{f"{b} forgotten": {b: zero, f"d{b}": zero} for b in ("b_q", "b_k", "b_v", "b_o")},
    "all biases forgotten": {n: zero for b in ("b_q", "b_k", "b_v", "b_o") for n in (b, f"d{b}")},
    **{f"{b} added twice": {b: times(lambda x: 2), f"d{b}": times(lambda x: 2)} for b in ("b_q", "b_v", "b_o")},
    "b_o once a head": {b: times(lambda x: x.H) for b in ("b_o", "db_o")},
    "b_q added behind the scale": {
        b: times(lambda x: (x.problem.inputs["params"].w_q.shape[1] / x.H) ** 0.5) for b in ("b_q", "db_q")},
    **{f"{w} transposed": {f"{w} as used": to_value(swap)} for w in ("w_q", "w_k", "w_v", "w_o")},
    "all weights transposed": {f"{w} as used": to_value(swap) for w in ("w_q", "w_k", "w_v", "w_o")},
    "w_q, w_k and w_v transposed": {f"{w} as used": to_value(swap) for w in ("w_q", "w_k", "w_v")},
    "w_q and w_k exchanged": exchanged("w_q", "w_k"),
    "w_k and w_v exchanged": exchanged("w_k", "w_v"),
    "b_q and b_k exchanged": exchanged("b_q", "b_k"),
    "b_k and b_v exchanged": exchanged("b_k", "b_v"),
    **{f"{b} is projected by w_{a}{' and b_' + a if both else ''}": _shared(a, b, both)
       for a, b in (("k", "v"), ("q", "k"), ("q", "v"), ("v", "k"), ("k", "q"), ("v", "q")) for both in (False, True)},
    # heads
    "head's columns interleaved": {"split_q": _interleaved},
    "columns of q, k and v interleaved": {f"split_{n}": _interleaved for n in "qkv"},
    "heads of q, k and v split without a transpose": {f"split_{n}": _as_it_lies for n in "qkv"},
    "split and merged without a transpose": {f"split_{n}": _as_it_lies for n in "qkv"} | {"merge": to_value(_flat_merge)},
    "columns of all heads interleaved, and merged so": {f"split_{n}": _interleaved for n in "qkv"}
    | {"merge": to_value(_interleaved_merge)},
    "one projection for all heads": {
        "split_q": lambda x, route: lambda a: np.repeat(route(a)[..., :1, :, :], route(a).shape[-3], -3)},
    "one key head for all": {"group": _groups(lambda x: np.zeros(x.H, int))},
    "head h reads h % G": {"group": _groups(_by_modulo)},
    "head h reads h // G": {"group": _groups(lambda x: np.minimum(np.arange(x.H) // x.G, x.G - 1))},
    "scale of the model's width": {"scale": lambda x, _: x.x_q.shape[-1] ** -0.5},
    "scale forgotten": {"scale": to_value(1.0)},
    "scale twice": {"scale": lambda x, _: 1 / x.q.shape[-1]},
    "scale of the default": {"scale": to_value(None)},
    "merged without a transpose": {"merge": to_value(_flat_merge)},
    "merged as if (H, B)": {"merge": to_value(_heads_before_batch)},
    "concat over E": {"merge": to_value(_interleaved_merge)},
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
    **{f"{n} ignored": {n: to_value(None)} for n in ("bias", "softcap", "sink", "dropout_mask")},
    "a dead query gives 0": _DEAD_ZERO,
    "a dead query gives the mean of the values": {"o": _mean_where_dead, "dvh": _leak_of_dead},
    "a dead query gives NaN": {"o": _nan_where_dead, "dq": _nan_where_dead, "dkh": _nan_beside_dead, "dvh": _nan_beside_dead},
    # backward
    **{f"{b} a mean": {f"d{b}": lambda x, g: g / np.prod(x.dout.shape[1:3])} for b in ("b_q", "b_o")},
    **{f"{b} a mean": {f"d{b}": lambda x, g: g / np.prod(x.x_k.shape[1:3])} for b in ("b_k", "b_v")},
    "split without a transpose": {"do": lambda x, do: x.dc.reshape(do.shape)},
    "w_o by the heads as they lie": {"dw_o": lambda x, _: plain_outer(x.o.reshape(x.c.shape), x.dout)},
    "first head of the group in dk": {"dkh": _some_heads},
    "first head of the group in dv": {"dvh": _some_heads},
    "mean of the group in dk": {"dk": lambda x, g: g / (x.H // x.G)},
    "mean of the group in dv": {"dv": lambda x, g: g / (x.H // x.G)},
    "groups interleaved in dk": {"dk": _other_groups("dkh")},
    "groups interleaved in dv": {"dv": _other_groups("dvh")},
    **{f"{n} without a gradient": {f"d{n}": zero}
       for n in ("w_q", "w_k", "w_v", "w_o", "b_q", "b_v", "b_o", "x_q", "x_k", "x_v")},
    **{f"w_{n} of the first sequence": {f"dw_{n}": of_first_sequence(f"x_{n}", f"dy_{n}")} for n in "qkv"},
    "w_o of the first sequence": {"dw_o": of_first_sequence("c", "dout")},
    "w_k by x_v": {"dw_k": lambda x, _: plain_outer(x.x_v, x.dy_k)},
    "w_v by x_k": {"dw_v": lambda x, _: plain_outer(x.x_k, x.dy_v)},
    "w_k by x_q": {"dw_k": lambda x, _: plain_outer(x.x_q, x.dy_k)},
    **{f"gradient of {w} transposed": {f"d{w}": lambda x, g: swap(g)} for w in ("w_q", "w_k", "w_v", "w_o")},
    **{f"b_{n} of the first sequence": {f"db_{n}": sum_of_first_sequence(f"dy_{n}")} for n in "qkv"},
    "b_o of the first sequence": {"db_o": sum_of_first_sequence("dout")},
    "b_q of the heads as they lie": {"db_q": lambda x, g: swap(x.dq.sum((1, 3))).reshape(g.shape)},
    "x_k gets that of x_v": {"finish": lambda x, d: d | {"dx_k": d["dx_k"] + d["dx_v"]}},
    "x_q gets all three": {"finish": lambda x, d: d | {"dx_q": d["dx_q"] + d["dx_k"] + d["dx_v"]}},
    "by w_o, not its transpose": {"dc": product("dout", "w_o")},
    **{f"by w_{n}, not its transpose": {f"dx_{n}": product(f"dy_{n}", f"w_{n}")} for n in "qkv"},
    "dq without the scale": {"dq": times(lambda x: x.q.shape[-1] ** 0.5)},
    "scale squared in dk": {"dkh": times(lambda x: x.q.shape[-1] ** -0.5)},
    **parts.MISTAKES,
    "dk and dv exchanged": {"finish": lambda x, d: d | {"dx_k": d["dx_v"], "dx_v": d["dx_k"]}},
}  # fmt: skip


# --- the record ------------------------------------------------------------------------------------------------------------


def _candidate(implementation: str) -> Pair:
    def forward(x_q: Array, x_k: Array, x_v: Array, params: Any, **options: Any) -> Any:
        return multi_head_forward(x_q, x_k, x_v, params, implementation=implementation, **options)[0]

    def backward(dout: Array, x_q: Array, x_k: Array, x_v: Array, params: Any, **options: Any) -> Any:
        return _gradients(dout, multi_head_forward(x_q, x_k, x_v, params, implementation=implementation, **options)[1])

    return forward, backward


MULTI_HEAD = Op(
    name="multi_head",
    outputs=("out",),
    axes={"out": "BLM", "dx_q": "BLM", "dx_k": "BSM", "dx_v": "BSM", "dbias": "BHLS", "dsink": "H",
          "dq_norm_g": "D", "dk_norm_g": "D"},
    reference=reference,
    forward=forward,
    backward=backward,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("merged without a transpose", "scale of the model's width", "b_q forgotten", "mask ignored")),
    cases=CASES,
    candidates={"multi-head-blockwise": partial(_candidate, "blockwise"), "multi-head": partial(_candidate, "dense")},
    calls=LayerCalls(
        "forward(x_q, x_k, x_v, params, *, num_heads, ...) and backward(dout, x_q, x_k, x_v, params, *, ...)",
        ("num_heads", "num_kv_heads", "mask", *parts.OPTIONS, *(name for name in OPTIONS if " " not in name)),
        to={"state_dict": lambda params: [convert.multi_head_to_torch(params)]},
        back={"state_dict": lambda found: convert.multi_head_from_torch(found.pop("state_dict"))},
    ),
    differentiable=("bias", "sink"),
    optional=("dbias", "dsink"),
    space=SPACE,
)
