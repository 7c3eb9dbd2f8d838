"""What the records of rnn, gru and lstm share: their problems, the stages around a step, and mistakes that know no cell.

A record adds its cell, `step` and `step_backward`. In a run of the equations, h is the state that is also the output, and an
lstm has a second one, c. Of each state s there are the stages ``old_s`` (s_{t-1} as the step takes it) and ``back_s`` (the
gradient that the step hands to s_{t-1}).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.tolerances import TANH_ULPS
from npattn.verify.op import Case, Op, Pair, Problem, Values
from npattn.verify.ops.layers import (
    BATCH,
    SIZES,
    Mistake,
    Rng,
    Route,
    adjoint,
    case,
    exchanged,
    normal,
    of_params,
    plain_outer,
    same,
    space,
    times,
    to_value,
    weight,
    zero,
)  # fmt: skip
from npattn.verify.space import Row, Space, sizes_of


def _states_and_gradients(x: Any) -> list[tuple[Array, Array]]:
    return [(x.before, x.dr)]


@dataclass(frozen=True)
class Layer:
    """What verify has to know of a recurrent layer to draw its problems and to run it."""

    op: str
    params: Callable[..., Any]  # w_x, w_h, then the biases
    gates: int  # blocks of N columns
    biases: tuple[str, ...]
    states: tuple[str, ...]  # the first is the output
    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[..., Any]
    factors: Callable[[Any], list[tuple[Array, Array]]] = _states_and_gradients
    """(left, right) of the products left^T right that are, side by side, the gradient of w_h."""

    @property
    def first_bias(self) -> str:
        """That of x_t w_x."""
        return self.biases[0]


# --- problems ----------------------------------------------------------------------------------------------------------------


def draw(
    layer: Layer, rng: Rng, *, B: int = 3, T: int = 13, M: int = 6, N: int = 10, state: float | None = 1.0, without: str = "",
    bias: bool | str = True, lengths: tuple[int, ...] | None = None, last: bool | str = False, dh: float = 1.0,
    weights: float = 1.0, inputs: float = 1.0, behind: float | None = None, **options: Any,
) -> Problem:  # fmt: skip
    """A problem of a recurrent layer.

    state  : the size of the first states, None: they are not given; without : a state that is not given
    bias   : whether the biases are given, or the one that is; behind : what x holds after the end of each sequence
    last   : whether the gradients of the last states are given, or the state of which it is
    """
    x, width = inputs * normal(rng, B, T, M), layer.gates * N
    w_x, w_h = weights * weight(rng, M, width), 0.9 * weights * weight(rng, N, width)
    biases = {name: 0.5 * normal(rng, width) for name in layer.biases}
    states = {name: normal(rng, B, N) for name in layer.states}
    cotangents = {"dh": dh * normal(rng, B, T, N)}
    lasts = {name: normal(rng, B, N) for name in layer.states}
    if lengths is not None:
        options["lengths"] = np.array(lengths)
    if behind is not None:
        x[np.arange(T) >= options["lengths"][:, None]] = behind
    params = layer.params(w_x, w_h, *(b if bias in (True, name) else None for name, b in biases.items()))
    firsts = {f"{n}0": None if state is None or n == without else state * y for n, y in states.items()}
    cotangents |= {f"d{name}_last": y for name, y in lasts.items() if last in (True, name)}
    return Problem(Op.known[layer.op], {"x": x, **firsts, "params": params}, options, cotangents)


RAGGED, WITH_NONE = (9, 13, 4), (5, 0, 13)


def cases(layer: Layer, more: Callable[[Callable[..., Case]], list[Case]]) -> list[Case]:
    """The cases of every recurrent layer, and those that ``more`` adds."""
    c = partial(case, layer.op, partial(draw, layer))
    return [
        c("plain"),
        c("no initial state", "initial state", state=None),
        c("initial state 0", "initial state", state=0.0),
        c("no bias", "bias", bias=False),
        *more(c),
        c("lengths", lengths=RAGGED),
        c("lengths 0 and T", "lengths", lengths=WITH_NONE),
        c("lengths of 1", "lengths", lengths=(1, 1, 1)),
        c("lengths of T", "lengths", lengths=(13, 13, 13)),
        c("NaN after the length", "NaN containment", lengths=RAGGED, behind=np.nan),
        c("inf after the length", "NaN containment", lengths=WITH_NONE, behind=np.inf, last=True),
        c("dh_last", last=True),
        c("dh_last alone", "dh_last", last=True, dh=0.0),
        c("dh_last + lengths", "dh_last", last=True, lengths=RAGGED),
        c("dh_last + lengths 0 and T", "dh_last", last=True, lengths=WITH_NONE),
        c("dh_last, no bias, no initial state", "dh_last", last=True, bias=False, state=None),
        c("T = 1", "small sizes", T=1),
        c("T = 2", "small sizes", T=2),
        c("B = 1", "small sizes", B=1),
        c("M = 1", "small sizes", M=1),
        c("N = 1", "small sizes", N=1),
        c("M = N", "small sizes", M=10),
        c("B = T = M = N", "small sizes", B=5, T=5, M=5, N=5),
        c("N = 96", "long", M=64, N=96),
        c("long", "long", T=200),
        c("long + lengths", "long", T=200, lengths=(200, 150, 3), last=True),
        c("long, dh_last alone", "long", T=100, last=True, dh=0.0),
        c("saturated", "hard inputs", inputs=5.0, weights=2.0),
        c("inputs tiny", "hard inputs", inputs=1e-3, state=1e-3),
        c("float64", dtype="float64"),
        c("float64 lengths + dh_last", "float64", dtype="float64", lengths=WITH_NONE, last=True),
    ]


ENDS: dict[str, Callable[[Rng, int, int], Array | None]] = {
    "T": lambda rng, B, T: None, "some": lambda rng, B, T: rng.integers(1, T + 1, B), "1": lambda rng, B, T: np.ones(B, int),
    "0 and T": lambda rng, B, T: np.where(np.arange(B) % 2 == 0, 0, T), "all T": lambda rng, B, T: np.full(B, T),
}  # fmt: skip


def _of_sizes(layer: Layer, rng: Rng, *, B: int, T: int, M: int, N: int, ends: str = "T", **given: Any) -> Problem:
    lengths = ENDS[ends](rng, B, T)
    return draw(layer, rng, B=B, T=T, M=M, N=N, lengths=None if lengths is None else tuple(lengths.tolist()), **given)


Settings = Mapping[str, Mapping[str, Mapping[str, Any]]]


def space_of(layer: Layer, own: Settings, possible: Callable[[Row], bool] = lambda row: True) -> Space:
    """The space of a recurrent layer; ``own`` are its own dimensions, or classes of its own in one of these."""
    shared: Settings = {
        "lengths": {"none": {}, **{n: {"ends": n} for n in ("some", "1", "0 and T", "all T")}},
        "h0": {"given": {}, "none": {"state": None}, "0": {"state": 0.0}}, "b": {"given": {}, "none": {"bias": False}},
        "cotangents": {"dh": {}, "dh_last": {"last": True}, "dh_last alone": {"last": True, "dh": 0.0}},
        "inputs": {"normal": {}, "saturated": {"inputs": 5.0, "weights": 2.0}, "tiny": {"inputs": 1e-3},
                   "NaN behind": {"behind": np.nan}, "inf behind": {"behind": np.inf}},
    }  # fmt: skip

    def allowed(row: Row) -> bool:
        """What stands behind a sequence needs a length, and steps of its own. Where the arrays have strides of 0 all sequences
        are one: their errors are the same, and add up in the gradients of parameters, where sigma takes them for independent.
        """
        behind, one = row.get("inputs", "normal").endswith("behind"), row.get("memory") == "strides of 0"
        crowded = one and (behind or row.get("B", "2") in ("3", "5"))
        return possible(row) and not crowded and not (behind and row.get("lengths") == "none")

    return space(
        layer.op, partial(_of_sizes, layer),
        {"B": sizes_of("B", BATCH), "T": sizes_of("T", {**SIZES, "above 200": (201,)}), "M": sizes_of("M", SIZES),
         "N": sizes_of("N", SIZES)},
        {**{name: {**some, **own.get(name, {})} for name, some in shared.items()},
         **{name: some for name, some in own.items() if name not in shared}},
        lambda n: n.get("B", 1) * n.get("T", 1) * (200 + layer.gates * n.get("N", 1) * (n.get("M", 1) + n.get("N", 1)) / 64),
        allowed, ("NaN behind", "inf behind"),
    )  # fmt: skip


# --- the reference, and the candidate that comes with npattn -----------------------------------------------------------------


def gradients(layer: Layer, dh: Array, cache: Any, lasts: Mapping[str, Any]) -> Values:
    """lasts : dh_last ..., where they are given"""
    g = layer.backward(dh, cache, **lasts)
    return {"dx": g.x, **{f"d{n}0": getattr(g, f"{n}0") for n in layer.states}, **of_params(g.params)}


def reference(layer: Layer, p: Problem) -> Values:
    h, cache = layer.forward(**p.inputs, **p.options)
    outputs = {"h": h, **{f"{name}_last": getattr(cache, f"{name}_last") for name in layer.states}}
    dh, *lasts = p.cotangents
    return outputs | gradients(layer, p.cotangents[dh], cache, {name: p.cotangents[name] for name in lasts})


def candidate(layer: Layer) -> Pair:
    """npattn's own functions as a candidate."""

    def forward(x: Array, *inputs: Any, **options: Any) -> tuple[Array, ...]:
        h, cache = layer.forward(x, *inputs, **options)
        return h, *(getattr(cache, f"{name}_last") for name in layer.states)

    def backward(dh: Array, x: Array, *inputs: Any, dh_last: Any = None, dc_last: Any = None, **options: Any) -> Values:
        lasts = {name: d for name, d in (("dh_last", dh_last), ("dc_last", dc_last)) if d is not None}
        return gradients(layer, dh, layer.forward(x, *inputs, **options)[1], lasts)

    return forward, backward


# --- stages ------------------------------------------------------------------------------------------------------------------

Cell = Callable[[Any], Any]


def blocks(w: Array, gates: int) -> Array:
    """(..., gates N) -> (..., gates, N)"""
    return np.asarray(w.reshape(*w.shape[:-1], gates, -1))


def transposed(w: Array, gates: int) -> Array:
    """Each block of a weight, (.., M, gates N) -> (.., N, gates M)."""
    parts = blocks(w, gates).swapaxes(-1, -3)
    return np.asarray(parts.reshape(*parts.shape[:-2], -1))


def forward(layer: Layer, begin: Cell, step: Cell, x: Any) -> None:
    """begin(x): stages of the options. step(x): the new states, from ``x.a_t`` and ``x.old_h`` ..., which it may store."""
    inputs, params = x.problem.inputs, x.problem.inputs["params"]
    (B, T, _), N = inputs["x"].shape, params.w_h.shape[0]
    x.layer, x.N, x.saved = layer, N, []
    begin(x)
    x.input("x", inputs["x"])
    firsts = [f"{name}0" for name in layer.states]
    for name in firsts:
        x.input(name, np.zeros((B, N), inputs["x"].dtype) if inputs[name] is None else inputs[name])
    for name, p in params._asdict().items():
        x.input(name, p)
    x.keep("w_h as used", lambda: same)
    x.used = getattr(x, "w_h as used")(x.w_h)
    lengths = x.options.get("lengths")
    x.keep("lengths", lambda: np.full(B, T) if lengths is None else np.asarray(lengths))
    x.keep("valid", lambda: np.arange(T) < x.lengths[:, None])
    valid = x.valid[..., None]
    x.keep("shown", lambda: valid)  # where the output is the new state; elsewhere it is 0, or with ``repeat`` the last state
    x.keep("moves", lambda: valid)  # where the states are the new ones; elsewhere they stay
    x.keep("repeat", lambda: False)
    x.keep("biased", lambda: np.ones((T, 1)))
    x.keep("steps", lambda: same)
    x.keep("xs", lambda: np.where(x.shown | x.moves, x.steps(x.x), 0))
    b = getattr(x, layer.first_bias)
    x.linear("a", x.xs, x.w_x[:, None], None if b is None else (b[:, None, None] * x.biased).astype(inputs["x"].dtype))
    states, outs, x.reached = [tuple(getattr(x, name) for name in firsts)], [], []
    for t in range(T):
        x.t, x.a_t, before = t, x.a[:, :, t], states[-1]
        for name, s in zip(layer.states, before, strict=True):
            x.keep(f"old_{name}", lambda s=s: s)
        new = step(x)
        outs.append(np.where(x.shown[:, t], new[0], before[0] if x.repeat else 0))
        x.reached.append(np.where((x.shown | x.moves)[:, t], new[0], before[0]))
        states.append(tuple(np.where(x.moves[:, t], n, s) for n, s in zip(new, before, strict=True)))
    x.states = np.stack(np.broadcast_arrays(*(s[0] for s in states)), 2)  # h: (.., B, T + 1, N)
    x.final = dict(zip(layer.states, states[-1], strict=True))
    x.keep("arrange", lambda: same)
    x.keep("h", lambda: x.arrange(np.stack(outs, 2)))
    for name in layer.states:
        x.keep(f"{name}_last", lambda name=name: x.final[name])


def backward(layer: Layer, step_backward: Cell, x: Any) -> None:
    """step_backward(x): from the stages ``d`` and ``d_c``, the gradients of the new states, to the stages ``da`` and ``dr``,
    the gradients of both products, and ``back_h`` ..."""
    inputs, params = x.problem.inputs, x.problem.inputs["params"]
    (B, T, _), N = inputs["x"].shape, params.w_h.shape[0]
    for name in layer.states:
        last = x.problem.cotangents.get(f"d{name}_last")
        x.input(f"d{name}_last", np.zeros_like(inputs["x"], shape=(B, N)) if last is None else last)
    carry = {n: x.keep(f"carry of {n} at the end", lambda n=n: getattr(x, f"d{n}_last")) for n in layer.states}
    x.input("dh_", x.problem.cotangents["dh"])
    x.keep("dh", lambda: adjoint(x.arrange, x.dh_.shape, x.dh_))
    shown, moves = x.keep("shown in the backward", lambda: x.shown), x.keep("moves in the backward", lambda: x.moves)
    da, dr = [], []
    for t in reversed(range(T)):
        x.t, on = t, (shown | moves)[:, t]
        x.d_out, x.d_state = np.where(shown[:, t], x.dh[:, :, t], 0), np.where(moves[:, t], carry["h"], 0)
        x.sum_of_two("both", x.d_out, x.d_state)
        x.keep("d", lambda on=on: np.where(on, x.both, 0))
        for name in layer.states[1:]:
            x.keep(f"d_{name}", lambda name=name, t=t: np.where(moves[:, t], carry[name], 0))
        step_backward(x)
        da.append(x.da)
        dr.append(x.dr)
        x.entering = dict(carry)
        for name in layer.states:
            handed = np.where(moves[:, t], 0, carry[name]) + getattr(x, f"back_{name}")
            if x.repeat and name == "h":
                handed = handed + np.where(shown[:, t], 0, x.dh[:, :, t])
            carry[name] = x.keep(f"carry of {name}", lambda handed=handed: handed)
    x.da, x.dr = (np.stack(np.broadcast_arrays(*each[::-1]), 2) for each in (da, dr))
    x.product("dxs", x.da, x.w_x.swapaxes(-1, -2)[:, None])
    x.keep("dx", lambda: adjoint(x.steps, (len(x.da), *inputs["x"].shape), x.dxs))
    taken = x.keep("xs in the backward", lambda: np.where(shown | moves, x.steps(x.x), 0))
    x.outer("dw_x", taken, x.da)
    x.keep("before", lambda: x.states[:, :, :T])
    for n, (left, right) in enumerate(layer.factors(x)):
        x.outer(f"part {n} of dw_h", left, right)
    dw = np.concatenate([getattr(x, f"part {n} of dw_h") for n in range(len(layer.factors(x)))], -1)
    x.keep("dw_h", lambda: adjoint(getattr(x, "w_h as used"), (len(dw), *params.w_h.shape), dw))
    for name in layer.biases:
        terms = x.da * x.biased if name == layer.first_bias else x.dr
        x.total(f"d{name}", terms, (-3, -2))
    for name in layer.states:
        x.keep(f"d{name}0", lambda name=name: carry[name])


def product_backward(x: Any, d: Array, w: Array) -> Any:
    """The stage "back": the gradient d of h_{t-1} w, handed to h_{t-1}."""
    x.carried = d, w
    return x.product("back", d, w.swapaxes(-1, -2))


def tanh_slope_error(x: Any, h: Array) -> Array:
    """Of 1 - h^2."""
    return np.asarray(x.unit * np.hypot(h * h, 1 - h * h))


def gate(x: Any, name: str, p: Array) -> Any:
    """The logistic function of p: as 1 / (1 + exp(-p)) it has an error of its own size, as (1 + tanh(p / 2)) / 2 one of 1/2."""
    return x.keep(name, lambda: logistic(p), lambda s: x.unit * (s + 0.5))


def logistic(p: Array) -> Array:
    e = np.exp(-np.abs(p))
    return np.asarray(np.where(p >= 0, 1, e) / (1 + e))


def tanh(x: Any, name: str, p: Array) -> Any:
    return x.rounded(name, lambda: np.tanh(p), TANH_ULPS)


def tanh_slope(x: Any, name: str, h: Array) -> Any:
    return x.keep(name, lambda: 1 - h * h, lambda _: tanh_slope_error(x, h[0]))


GATE_SLOPE = 2.5  # roundings of a d s (1 - s): three products and 1 - s, which counts more where s is near 1


def sum_of_products(x: Any, name: str, *pairs: tuple[Array, Array]) -> Any:
    """a b + c d: each product and the sum is rounded."""

    def error(y: Array) -> Array:
        return np.asarray(x.unit * np.sqrt(sum(np.square(a[0] * b[0]) for a, b in pairs) + np.square(y)))

    return x.keep(name, lambda: sum(a * b for a, b in pairs), error)


# --- mistakes ----------------------------------------------------------------------------------------------------------------


def _last_of_outputs(x: Any, value: Array) -> Array:
    return np.asarray(x.h[:, :, -1])


def _next_input(x: Any, route: Route) -> Route:
    """Step t takes the input of step t + 1; the last step takes its own."""
    return lambda a: a[:, :, np.minimum(np.arange(a.shape[2]) + 1, a.shape[2] - 1)]


def _turned(a: Array) -> Array:
    return np.flip(a, 2)


def _swapped_memory(a: Array) -> Array:
    """An array that lies in memory as (T, B, N), read as (B, T, N)."""
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


def _outer_of(layer: Layer, part: Callable[[Array], Array]) -> Callable[[Any, Any], Any]:
    """The gradient of w_h by a part of the steps or sequences."""
    return lambda x, _: np.concatenate([plain_outer(part(a), part(b)) for a, b in layer.factors(x)], -1)


def _by_blocks(d: Array, w: Array, gates: int) -> Array:
    """d times the blocks of w, not their transposes; they have to be square."""
    return np.asarray(np.einsum("...gn,...ngk->...k", blocks(d, gates), blocks(w, gates)))


def _carried_by_w_h(x: Any, back: Array) -> Array:
    d, w = x.carried
    return _by_blocks(d, w, d.shape[-1] // x.N)


def mistakes_of(layer: Layer) -> dict[str, Mistake]:
    """The mistakes that any recurrent layer can have."""
    first, g = layer.first_bias, layer.gates
    turned = {"w_h as used": to_value(lambda w: transposed(w, g))}
    return {
        # forward
        "initial state ignored": {
            stage: zero for n in layer.states for stage in (f"{n}0", f"d{n}0")},
        "lengths ignored": _lengths(lambda n, T: np.full_like(n, T)),
        "lengths of the first sequence": _lengths(lambda n, T: np.full_like(n, n[0])),
        "one step too many": _lengths(lambda n, T: n + 1),
        "one step too few": _lengths(lambda n, T: n - 1),
        "sequences padded in front": {"valid": lambda x, valid: valid[:, ::-1]},
        f"no {'bias' if first == 'b' else first} in the first step": {"biased": _not_first},
        **{f"{b} forgotten": {b: zero, f"d{b}": zero} for b in layer.biases},
        **{f"{b} added twice": {b: times(lambda x: 2), f"d{b}": times(lambda x: 2)} for b in layer.biases},
        "w_h transposed": turned,
        "w_x transposed": {"w_x": lambda x, w: transposed(w, g),
                           "finish": lambda x, d: d | {"dw_x": transposed(d["dw_x"], g)}},
        "w_x and w_h exchanged": exchanged("w_x", "w_h"),
        "input of the next step": {"steps": _next_input},
        "time runs backwards": {"steps": to_value(_turned), "arrange": to_value(_turned)},
        "output goes on after the length": {"shown": _every_step},
        "last state repeated after the length": {"repeat": to_value(True)},
        "state goes on after the length": {"moves": _every_step},
        "h_last of step T": {  # the gradient of the last state goes to the last output
            "h_last": _last_of_outputs, "carry of h at the end": zero,
            "dh": lambda x, dh: _dh_with_last(x, dh) if "dh_last" in x.problem.cotangents else dh},
        "h_last is 0 where the length is 0": {
            "h_last": lambda x, h: np.where(x.lengths[:, None] == 0, 0, h),
            "carry of h at the end": lambda x, carry: np.where(x.lengths[:, None] == 0, 0, carry)},
        "h_last of the first step": {"h_last": lambda x, _: x.h[:, :, 0]},
        "time and batch swapped": {"arrange": to_value(_swapped_memory)},
        "state not carried in the forward": {"old_h": zero, "back_h": zero, "before": zero},
        # backward
        "dh_last ignored": {"carry of h at the end": zero},
        "dh ignored": {"dh": zero},
        "dh_last at step T": {"carry of h at the end": zero, "dh": _dh_with_last},
        "steps after the length take part": {"shown in the backward": _every_step, "moves in the backward": _every_step},
        "carried by w_h, not its transpose": {"back": _carried_by_w_h},
        "not carried": {"back_h": zero},
        "carry lost after the length": {"carry of h": lambda x, _: x.back_h},
        "carry added up": {"carry of h": lambda x, carry: carry + x.entering["h"]},
        "w_h by the new state": {"before": lambda x, _: x.states[:, :, 1:]},
        "= for += in w_h": {"dw_h": _outer_of(layer, lambda a: a[:, :, :1])},
        "= for += in w_x": {"dw_x": lambda x, _: plain_outer(x.xs[:, :, :1], x.da[:, :, :1])},
        **{f"{n} without a gradient": {f"d{n}": zero}
           for n in ("w_x", "w_h", *layer.biases, *(f"{s}0" for s in layer.states), "x")},
        **{f"gradient of {w} transposed": {f"d{w}": lambda x, dw: transposed(dw, g)} for w in ("w_x", "w_h")},
        "w_x of the first sequence": {"dw_x": lambda x, _: plain_outer(x.xs[:, :1], x.da[:, :1])},
        "w_h of the first sequence": {"dw_h": _outer_of(layer, lambda a: a[:, :1])},
        "w_h without the initial state": {"before": lambda x, h: np.where(np.arange(h.shape[2])[:, None] == 0, 0, h)},
        **{name: row for b in layer.biases for name, row in _of_bias(b, "da" if b == first else "dr").items()},
        "h0 of one step too few": {"dh0": lambda x, _: x.entering["h"]},
        "dx a step late": {"dx": lambda x, dx: np.roll(dx, 1, 2)},
        "dx a step early": {"dx": lambda x, dx: np.roll(dx, -1, 2)},
        "by w_x, not its transpose": {"dxs": lambda x, _: _by_blocks(x.da, x.w_x[:, None], g)},
    }  # fmt: skip


def _of_bias(b: str, terms: str) -> dict[str, Mistake]:
    """terms : the gradients that are summed"""
    return {
        f"{b} of the first sequence": {f"d{b}": lambda x, _: getattr(x, terms)[:, 0].sum(-2)},
        f"{b} of the last step alone": {f"d{b}": lambda x, _: getattr(x, terms)[:, :, -1].sum(-2)},
        f"{b} a mean": {f"d{b}": lambda x, g: g / np.prod(x.da.shape[1:3])},
        f"{b} summed over the steps alone, a mean over the batch": {f"d{b}": lambda x, g: g / x.da.shape[1]},
    }


def permuted(layer: Layer, names: str, order: str) -> Mistake:
    """The columns are read in another order than ``names``: the first block as the gate that ``order`` names first."""
    take = [order.index(gate) for gate in names]
    back = [names.index(gate) for gate in order]

    def moved(w: Array, by: list[int]) -> Array:
        return np.asarray(blocks(w, layer.gates)[..., by, :].reshape(w.shape))

    params = ("w_x", "w_h", *layer.biases)
    return {
        **{n: lambda x, w: None if w is None else moved(w, take) for n in params},
        "finish": lambda x, d: d | {f"d{n}": moved(d[f"d{n}"], back) for n in params if f"d{n}" in d},
    }


def of_block(layer: Layer, block: int, change: Callable[[Array], Array]) -> Callable[[Any, Any], Any]:
    """A change of one block of columns."""

    def changed(x: Any, w: Any) -> Any:
        parts = blocks(w, layer.gates).copy()
        parts[..., block, :] = change(parts[..., block, :])
        return parts.reshape(w.shape)

    return changed
