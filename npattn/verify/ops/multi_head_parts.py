"""Of the record of multi-head attention what stands between projections and attention: norms of q and k, rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.ops.layers import Mistake, to_value, zero
from npattn.verify.ops.rotary import angle_error, one_a_token, order_of, scaled_by, turn

OPTIONS = ("rotary", "q_pos", "k_pos", "norm_eps")
Change = Callable[[Any, Any], Any]


def forward(x: Any, n: str, z: Array, options: dict[str, Any]) -> Array:
    """Equations (4) and (5) of `npattn.ops.multihead` for n = "q" or "k"."""
    order = x.keep(f"order of {n}", lambda: ("norm", "turn"))
    for step in order:
        z = (_norm if step == "norm" else _rotary)(x, n, z, options)
    return z


def backward(x: Any, n: str, dz: Array) -> Array:
    """(5) and (4), in reverse."""
    for step in reversed(getattr(x, f"order of {n}")):
        dz = (_norm_backward if step == "norm" else _rotary_backward)(x, n, dz)
    if getattr(x, f"{n}_norm_g", None) is not None and "norm" not in getattr(x, f"order of {n}"):
        setattr(x, f"d{n}_norm_g", np.zeros_like(getattr(x, f"{n}_norm_g"))[:, 0, 0])
    return dz


# --- (4)


def _norm(x: Any, n: str, z: Array, options: dict[str, Any]) -> Array:
    if getattr(x, f"{n}_norm_g", None) is None:
        return z
    x.keep(f"{n} axes", lambda: -1)  # over which the mean is taken
    c = x.keep(f"{n} centred", lambda: z)
    squares = x.rounded(f"{n} squares", lambda: c * c)
    mean = _mean(x, f"{n} mean", squares, n)
    eps = x.keep(f"{n} eps", lambda: options.get("norm_eps", 1e-6))
    r = x.rounded(f"{n} r", lambda: 1 / np.sqrt(mean + eps), 2.0)
    unit = x.rounded(f"{n} normed", lambda: c * r)
    g = x.keep(f"{n} g", lambda: getattr(x, f"{n}_norm_g")[:, None])
    return np.asarray(x.rounded(f"{n} weighed", lambda: unit * g))


def _norm_backward(x: Any, n: str, dy: Array) -> Array:
    if getattr(x, f"{n}_norm_g", None) is None:
        return dy
    unit, alive = getattr(x, f"{n} normed"), dy.any(-1, keepdims=True)  # NaN of a dead token adds nothing
    terms = x.rounded(f"terms of {n} g", lambda: np.where(alive, dy * unit, 0))
    x.total(f"d{n}_norm_g", terms, (-4, -3, -2))
    dn = x.rounded(f"{n} dn", lambda: dy * getattr(x, f"{n} g"))
    both = x.rounded(f"{n} dn n", lambda: dn * unit)
    pull = x.rounded(f"{n} pull", lambda: unit * _mean(x, f"{n} mean of dn n", both, n))
    inner = x.sum_of_two(f"{n} inner", dn, -pull)
    dc = x.rounded(f"{n} dc", lambda: getattr(x, f"{n} r") * inner)
    return np.asarray(x.keep(f"{n} d centred", lambda: np.where(alive, dc, 0)))


def _mean(x: Any, name: str, terms: Array, n: str) -> Array:
    axes = getattr(x, f"{n} axes")
    x.total(f"sum for {name}", terms, axes, keepdims=True)
    count = math.prod(terms.shape[a] for a in np.atleast_1d(axes))
    return np.asarray(x.rounded(name, lambda: getattr(x, f"sum for {name}") / count))


# --- (5)


def _rotary(x: Any, n: str, z: Array, options: dict[str, Any]) -> Array:
    how = options.get("rotary")
    if how is None:
        x.keep(f"{n} turns", lambda: False)
        return z
    D, wide = z.shape[-1], np.longdouble if x.dtype == np.longdouble else np.float64
    x.keep(f"{n} turns", lambda: True)
    layout = x.keep(f"{n} layout", lambda: how.layout)
    R = x.keep(f"{n} width", lambda: how.width or D)
    x.keep(f"{n} columns", lambda: order_of(layout, R, D))
    f = x.keep(f"{n} f", lambda: wide(how.base) ** -(np.arange(R // 2).astype(wide) * 2 / R))
    f = x.keep(f"{n} scaled", lambda: scaled_by(f, how.scaling))
    given = options.get(f"{n}_pos")
    at = x.keep(f"{n} positions", lambda: one_a_token(np.arange(z.shape[-2]) if given is None else given, z.ndim - 1))
    t = x.keep(f"{n} angles", lambda: (at * f)[None], angle_error)
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        x.rounded(f"{n} {name}", lambda function=function: np.tile(function(t), 2).astype(x.dtype))
    setattr(x, f"{n} sign", np.r_[-np.ones(R // 2, x.dtype), np.ones(R // 2, x.dtype)])
    return turn(x, f"{n} turned", z, *_cos_sin(x, n), getattr(x, f"{n} columns"))


def _cos_sin(x: Any, n: str) -> tuple[Array, Array]:
    return getattr(x, f"{n} cos"), getattr(x, f"{n} sign") * getattr(x, f"{n} sin")


def _rotary_backward(x: Any, n: str, dy: Array) -> Array:
    if not getattr(x, f"{n} turns"):
        return dy
    cos, sin = _cos_sin(x, n)
    sin = x.keep(f"{n} sin in the backward", lambda: -sin)
    return turn(x, f"{n} turned back", dy, cos, sin, getattr(x, f"{n} columns"))


# --- mistakes ---------------------------------------------------------------------------------------------------------------


def _both(stage: str, change: Change, of: str = "qk") -> Mistake:
    return {f"{n} {stage}": change for n in of}


def _without(step: str, of: str = "qk") -> Mistake:
    return {f"order of {n}": lambda x, order: tuple(s for s in order if s != step) for n in of}


def _as(source: str, target: str) -> Mistake:
    """The one is turned by the positions of the other."""

    def given(x: Any, at: Array) -> Array:
        other = x.options.get(f"{source}_pos")
        other = np.arange(at.shape[-2]) if other is None else other
        if other.shape[-1] != at.shape[-2]:
            raise ValueError("L and S differ")
        return one_a_token(other, at.ndim)

    return {f"{target} positions": given}


def _by_head(x: Any, at: Array) -> Array:
    if not (x.H == x.G == at.shape[-2]):
        raise ValueError("as many heads as tokens, to be mistaken")
    return np.arange(x.H)[None, :, None, None]


def _exchanged_weights(n: str) -> Change:
    def other(x: Any, g: Array) -> Array:
        norm = getattr(x.problem.inputs["params"], f"{n}_norm")
        if norm is None:
            raise ValueError("one norm alone")
        return np.asarray(norm.g.reshape(g.shape), g.dtype)

    return other


def _mean_subtracted(x: Any, z: Array) -> Array:
    return np.asarray(z - z.mean(-1, keepdims=True))


def _from_0(at: Array) -> Array:
    return one_a_token(np.arange(at.shape[-2]), at.ndim)


def _value(name: str) -> Change:
    return lambda x, _: getattr(x, name)


def _over(name: str) -> Change:
    return lambda x, value: value / getattr(x, name)


def _of_first(n: str, part: Any) -> Change:
    """The gradient of a norm's weight from this part of the tokens alone."""
    return lambda x, _: getattr(x, f"terms of {n} g")[part].sum((-4, -3, -2))


def _other(layout: str) -> str:
    return "interleaved" if layout == "half" else "half"


MISTAKES: dict[str, Mistake] = {
    # norms
    "norms of q and k forgotten": _without("norm"),
    **{f"norm of {n} forgotten": _without("norm", n) for n in "qk"},
    "norms after rotary positions": {f"order of {n}": to_value(("turn", "norm")) for n in "qk"},
    "norms over all heads together": _both("axes", to_value((-3, -1))),
    "norms of q and k subtract the mean": _both("centred", _mean_subtracted) | _both("d centred", _mean_subtracted),
    "weights of the norms forgotten": _both("g", lambda x, g: g * 0 + 1) | {f"d{n}_norm_g": zero for n in "qk"},
    "q_norm and k_norm exchanged": {
        "q g": _exchanged_weights("k"), "k g": _exchanged_weights("q"),
        "finish": lambda x, d: d | {"dq_norm_g": d["dk_norm_g"], "dk_norm_g": d["dq_norm_g"]}},
    "norms with eps = 1e-6, whatever is given": _both("eps", to_value(1e-6)),
    "norms with eps = 1e-5, whatever is given": _both("eps", to_value(1e-5)),
    "backward of the norms without the mean": _both("pull", zero),
    "backward of the norms without their weights": {f"{n} dn": _over(f"{n} g") for n in "qk"},
    "weights of the norms of the first sequence": {f"d{n}_norm_g": _of_first(n, np.s_[:, :1]) for n in "qk"},
    "weights of the norms of the first head": {f"d{n}_norm_g": _of_first(n, np.s_[:, :, :1]) for n in "qk"},
    "weights of the norms without a gradient": {f"d{n}_norm_g": zero for n in "qk"},
    # rotary positions
    "rotary positions forgotten": _without("turn"),
    **{f"{n} not turned": _without("turn", n) for n in "qk"},
    "rotary: half for interleaved, interleaved for half": _both("layout", lambda x, layout: _other(layout)),
    "rotary: all columns turned, whatever the width": _both("width", lambda x, R: x.problem.params.w_q.shape[1] // x.H),
    "rotary: scaling forgotten": {f"{n} scaled": _value(f"{n} f") for n in "qk"},
    "k turned by the positions of q": _as("q", "k"),
    "q turned by the positions of k": _as("k", "q"),
    "rotary: positions from 0, whatever is given": _both("positions", lambda x, at: _from_0(at)),
    "rotary: positions of the first sequence": _both("positions", lambda x, at: at[:1]),
    "rotary: the position is that of the head": _both("positions", _by_head),
    "rotary: q begins at 1": {"q positions": lambda x, at: at + 1},
    "rotary: turned the other way": _both("sin", lambda x, s: -s),
    **{f"rotary: {n} turned the other way": _both("sin", lambda x, s: -s, n) for n in "qk"},
    "rotary: the backward turns forwards": _both("sin in the backward", lambda x, s: -s),
    **{f"rotary: the backward of {n} turns forwards": _both("sin in the backward", lambda x, s: -s, n) for n in "qk"},
    **{f"rotary: the gradient of {n} is not turned back": {f"{n} turned back": _value(f"d{n}")} for n in "qk"},
}  # fmt: skip
