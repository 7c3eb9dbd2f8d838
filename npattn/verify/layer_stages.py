"""Multi-head attention, the recurrent layer and softmax once more, stage by stage, as attention in `npattn.verify.stages`.

Every stage may be changed, which is how known mistakes are tried, or have N(0, 1) times its error added behind it, for
`SAMPLES` samples at once: the root mean square of what comes out less what comes out without noise is sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.allowed import quiet, swap, weight_gradient
from npattn.ops.attention import AttentionCache, attention_backward, attention_forward
from npattn.ops.checks import Array
from npattn.ops.multihead import merge_heads, split_heads
from npattn.tolerances import EXP_ULPS, ROUNDING_STD, TANH_ULPS
from npattn.verify.errors import Rounding, predict
from npattn.verify.precision import Precision

Values = dict[str, Array]
SAMPLES = 32  # of the noise: sigma is known to 1 / sqrt(64), 12 percent
Change = Callable[[Any, Any], Any]  # of all that is known so far, and the honest value of the stage
Route = Callable[[Array], Array]  # moves, repeats or leaves out elements; its backward is `adjoint`


def same(a: Array) -> Array:
    return a


def adjoint(route: Route, shape: tuple[int, ...], g: Array) -> Array:
    """The gradient of what was routed: each element collects what came of it."""
    total = np.zeros(int(np.prod(shape)), g.dtype)
    index = route(np.arange(total.size).reshape(shape))
    np.add.at(total, index.ravel(), g.ravel())
    return total.reshape(shape)


class Run:
    """One run of the equations. Every value has an axis of samples in front, of which the first has no noise."""

    def __init__(
        self, problem: Any, changes: Mapping[str, Change], precision: Precision | None, low: Any
    ) -> None:
        self.problem, self.changes, self.options, self.precision = problem, changes, problem.options, precision
        self.rng = None if precision is None else np.random.default_rng(0)
        tiny = float(np.finfo(np.float64 if precision is None else precision.dtype).smallest_normal)
        self.kind = Rounding(False, 0.0 if precision is None else precision.u, tiny)
        self.unit, self.of_inputs = self.kind.unit, ROUNDING_STD * (0.0 if precision is None else precision.inputs)
        self.low = low  # the candidate's dtype: what overflows or underflows there

    def __getattr__(self, name: str) -> Any:  # the values of the stages
        raise AttributeError(name)

    def keep(self, name: str, value: Any, error: Callable[[], Any] | None = None) -> Any:
        """A stage's value, with noise of this error (of the first sample) or changed."""
        if error is not None and self.rng is not None:
            value = value + self.noise(*value.shape[1:]) * error()
        if name in self.changes:
            value = self.changes[name](self, value)
        setattr(self, name, value)
        return value

    def noise(self, *shape: int) -> Array:
        """N(0, 1) in all samples but the first."""
        assert self.rng is not None
        noise = self.rng.standard_normal((SAMPLES + 1, *shape))
        noise[0] = 0
        return noise

    def input(self, name: str, x: Any) -> Any:
        """An input gets its axis of samples; None stays None."""
        if x is None:
            return self.keep(name, None)
        return self.keep(name, x[None], (lambda: self.of_inputs * np.abs(x)) if self.of_inputs else None)

    def rounded(self, name: str, value: Array, units: float = 1.0) -> Any:
        return self.keep(name, value, lambda: units * self.unit * np.abs(value[0]))

    def sum_of_two(self, name: str, a: Array, b: Array) -> Any:
        """a + b, which is exact where one of them is 0."""
        return self.keep(name, a + b, lambda: self._adding(a[0], b[0]))

    def _adding(self, a: Array, b: Array) -> Array:
        return np.where((a != 0) & (b != 0), self.unit * np.abs(a + b), 0)

    def product(self, name: str, a: Array, b: Array) -> Any:
        return self.keep(name, a @ b, lambda: self.kind.product(a[0], b[0]))

    def linear(self, name: str, x: Array, w: Array, b: Any) -> Any:
        """x w + b; b may be None."""
        y = x @ w
        if b is None:
            return self.keep(name, y, lambda: self.kind.product(x[0], w[0]))
        return self.keep(name, y + b, lambda: np.hypot(self.kind.product(x[0], w[0]), self._adding(y[0], b[0])))

    def total(self, name: str, terms: Array, axis: Any, keepdims: bool = False) -> Any:
        """A sum; the axis is counted from the end."""
        value = terms.sum(axis, keepdims=keepdims)
        return self.keep(name, value, lambda: self.kind.rounding_of_sum(terms[0], axis).reshape(value.shape[1:]))

    def outer(self, name: str, x: Array, dy: Array, heads: int = 1, axis: int = 1) -> Any:
        """x^T dy summed over all tokens: (.., B, L, M) and (.., B, L, N) -> (.., M, N)."""
        if not (np.isfinite(x).all() and np.isfinite(dy).all()):  # never where there is noise
            return self.keep(name, weight_gradient(x[0], dy[0], heads, axis)[None])
        a, b = (y.reshape(len(y), -1, y.shape[-1]) for y in (x, dy))
        return self.product(name, swap(a), b)


@quiet
def run(
    problem: Any, changes: Mapping[str, Change] | None = None, *, precision: Precision | None = None, low: Any = None
) -> Values:
    """Outputs and gradients, with changed stages or with noise; an axis of samples comes first, of length 1 without noise.

    changes : by stage; "finish" is one of all that is returned
    low     : the dtype of the candidate, where another than the problem's
    """
    x = Run(problem, changes or {}, precision, low or problem.dtype)
    found = x.keep("finish", EQUATIONS[problem.op](x))
    return {name: found[name] for name in (*problem.outputs, *problem.gradients) if name in found}


def _multi_head(x: Any) -> dict[str, Any]:
    """Equations (1) to (6) of `npattn.ops.multihead` and back; here each query head has a key and value head."""
    params, options = x.problem.inputs["params"], dict(x.options)
    H = options.pop("num_heads")
    G = options.pop("num_kv_heads", None) or H
    x.H, x.G, d = H, G, {}
    for name in ("x_q", "x_k", "x_v"):
        x.input(name, x.problem.inputs[name])
    for name, p in params._asdict().items():
        x.input(name, None if p is None else p.reshape((1,) * (3 - p.ndim) + p.shape))
    for name in ("w_q", "w_k", "w_v", "w_o"):
        x.keep(f"{name} as used", same)

    def used(name: str) -> Array:
        weights: Array = getattr(x, f"{name} as used")(getattr(x, name))
        return weights

    for n, heads in (("q", H), ("k", G), ("v", G)):
        y = x.linear(f"y_{n}", getattr(x, f"x_{n}"), used(f"w_{n}"), getattr(x, f"b_{n}"))  # (1), (2), (3)
        x.keep(n, x.keep(f"split_{n}", partial(split_heads, heads=heads))(y))
    x.keep("group", lambda a: np.take(a, np.arange(H) // (H // G), -3))
    kh, vh = x.group(x.k), x.group(x.v)
    x.keep("scale", options.pop("scale", None))
    x.keep("mask", options.pop("mask", None))
    options = {name: x.keep(name, value) for name, value in options.items()} | {"scale": x.scale, "mask": x.mask}
    count = len(x.q)
    calls = [attention_forward(x.q[i], kh[i], vh[i], **options) for i in range(count)]  # (4)
    caches = [cache for _, cache in calls]
    x.lse = np.stack([cache.lse for cache in caches])
    errors: Any = None
    if x.rng is not None:
        errors = predict(caches[0], calls[0][0], dtype=x.precision.dtype)
    x.keep("o", np.stack([o for o, _ in calls]), lambda: errors.out)
    x.keep("merge", merge_heads)
    x.keep("c", x.merge(x.o))  # (5)
    d["out"] = x.linear("out", x.c, used("w_o"), x.b_o)  # (6)

    x.input("dout", x.problem.cotangents["dout"])
    x.product("dc", x.dout, swap(used("w_o")))  # (6)
    dw = x.outer("dw_o as used", x.c, x.dout, H, 0)
    d["dw_o"] = x.keep("dw_o", adjoint(getattr(x, "w_o as used"), (len(dw), *params.w_o.shape), dw))
    d["db_o"] = x.total("db_o", x.dout, (-3, -2))
    x.keep("do", adjoint(x.merge, x.o.shape, x.dc))  # (5)
    grads = [attention_backward(x.do[i], cache) for i, cache in enumerate(caches)]  # (4)
    if x.rng is not None:
        errors = predict(caches[0], calls[0][0], x.do[0], None, grads[0], dtype=x.precision.dtype)
    for n, stage in (("q", "dq"), ("k", "dkh"), ("v", "dvh"), ("bias", "dbias"), ("sink", "dsink")):
        if getattr(grads[0], n) is not None:
            d[stage] = x.keep(stage, np.stack([getattr(g, n) for g in grads]), partial(getattr, errors, n))
    if x.rng is not None:
        x.dkh = x.dkh + _common_to_rows(x, caches[0], errors.out)
    for n, g in (("k", x.dkh), ("v", x.dvh)):
        rounding = partial(_group_rounding, x, g[0], getattr(x, n).shape[1:]) if G != H else None
        x.keep(f"d{n}", adjoint(x.group, (count, *getattr(x, n).shape[1:]), g), rounding)
    for n in ("v", "k", "q"):
        w, inner = f"w_{n}", getattr(x, f"y_{n}").shape
        dy = x.keep(f"dy_{n}", adjoint(getattr(x, f"split_{n}"), inner, getattr(x, f"d{n}")))
        d[f"dx_{n}"] = x.product(f"dx_{n}", dy, swap(used(w)))  # (3), (2), (1)
        dw = x.outer(f"d{w} as used", getattr(x, f"x_{n}"), dy, H if n == "q" else G)
        d[f"d{w}"] = x.keep(f"d{w}", adjoint(getattr(x, f"{w} as used"), (len(dw), *getattr(params, w).shape), dw))
        d[f"db_{n}"] = x.total(f"db_{n}", dy, (-3, -2))
    return d


def _common_to_rows(x: Any, cache: AttentionCache, e_out: Array) -> Array:
    """Noise in dk of the error of sum_j p_j dp_j: one number for all keys of a query, so that it adds up in a sum over them."""
    p, do, o = np.asarray(cache.weights), x.do[0], x.o[0]
    by_weights = x.kind.rounding_of_sum(p * (do @ swap(cache.v)), -1)
    by_output = np.hypot(x.kind.sum(do * e_out, -1), x.kind.rounding_of_sum(do * o, -1))
    rows = np.maximum(by_weights, by_output) * x.noise(*p.shape[:-1], 1)
    return np.asarray(cache.scale * (swap(p * rows) @ cache.q))


def _group_rounding(x: Any, g: Array, shape: tuple[int, ...]) -> Array:
    """Of the sum over the heads that read one group."""
    heads = g.reshape(*shape[:-2], -1, *shape[-2:])
    rounding: Array = x.kind.rounding_of_sum(heads, -3)
    return rounding.reshape(shape)


def _rnn(x: Any) -> dict[str, Any]:
    """Equations (1) to (3) of `npattn.ops.rnn` and back through time."""
    inputs, options = x.problem.inputs, x.options
    (B, T, _), params = inputs["x"].shape, inputs["params"]
    N, tanh = params.w_h.shape[0], x.keep("tanh", options.get("nonlinearity", "tanh") == "tanh")
    x.input("x", inputs["x"])
    x.input("h0", np.zeros((B, N), inputs["x"].dtype) if inputs["h0"] is None else inputs["h0"])
    for name, p in params._asdict().items():
        x.input(name, p)
    w_h = x.keep("w_h as used", same)(x.w_h)
    lengths = x.keep("lengths", np.full(B, T) if options.get("lengths") is None else np.asarray(options["lengths"]))
    valid = x.keep("valid", np.arange(T) < lengths[:, None])[..., None]
    x.keep("shown", valid)  # the output is the new state, else 0 (or the last state, where ``repeat`` says so)
    x.keep("moves", valid)  # the state is the new state, else the last one
    x.keep("repeat", False)
    x.keep("biased", np.ones((T, 1)))
    x.keep("steps", same)
    x.keep("xs", np.where(x.shown | x.moves, x.steps(x.x), 0))
    b = None if x.b is None else (x.b[:, None, None] * x.biased).astype(inputs["x"].dtype)
    x.linear("a", x.xs, x.w_x[:, None], b)  # (1)
    states, outs, reached = [x.h0], [], []
    for t in range(T):
        x.t, h = t, states[-1]
        x.product("r", h, w_h)
        x.sum_of_two("z", x.a[:, :, t], x.r)  # (2)
        new = x.rounded("new", np.tanh(x.z), TANH_ULPS) if tanh else x.keep("new", np.where(x.z <= 0, 0, x.z))  # (3)
        outs.append(np.where(x.shown[:, t], new, h if x.repeat else 0))
        reached.append(np.where((x.shown | x.moves)[:, t], new, h))
        states.append(np.where(x.moves[:, t], new, h))
    x.states = np.stack(np.broadcast_arrays(*states), 2)  # (.., B, T + 1, N)
    x.keep("arrange", same)
    d = {"h": x.keep("h", x.arrange(np.stack(outs, 2))), "h_last": x.keep("h_last", states[-1])}

    last = x.problem.cotangents.get("dh_last")
    x.input("dh_last", np.zeros_like(inputs["x"], shape=(B, N)) if last is None else last)
    carry = x.keep("start of the carry", x.dh_last)
    x.input("dh_", x.problem.cotangents["dh"])
    x.keep("dh", adjoint(x.arrange, x.dh_.shape, x.dh_))
    shown, moves = x.keep("shown in the backward", x.shown), x.keep("moves in the backward", x.moves)
    da, dr = [], []
    for t in reversed(range(T)):
        x.t, h = t, reached[t]
        x.keep("slope", 1 - h * h if tanh else np.where(h > 0, 1, 0 * h), partial(_slope_error, x, h[0]) if tanh else None)
        x.d_out, x.d_state = np.where(shown[:, t], x.dh[:, :, t], 0), np.where(moves[:, t], carry, 0)
        both = x.sum_of_two("both", x.d_out, x.d_state)
        x.rounded("dz", np.where((shown | moves)[:, t], both * x.slope, 0))  # (3)
        da.append(x.keep("da", x.dz))
        dr.append(x.keep("dr", x.dz))
        x.product("back", x.dr, swap(w_h))  # (2)
        x.entering = carry
        carry = np.where(moves[:, t], 0, carry) + x.back
        if x.repeat:
            carry = carry + np.where(shown[:, t], 0, x.dh[:, :, t])
        carry = x.keep("carry", carry)
    x.da, x.dr = (np.stack(np.broadcast_arrays(*each[::-1]), 2) for each in (da, dr))
    d["dx"] = x.keep("dx", adjoint(x.steps, (len(x.da), *inputs["x"].shape), x.product("dxs", x.da, swap(x.w_x)[:, None])))
    taken = x.keep("xs in the backward", np.where(shown | moves, x.steps(x.x), 0))
    d["dw_x"] = x.outer("dw_x", taken, x.da)  # (1)
    dw = x.outer("dw_h as used", x.keep("before", x.states[:, :, :T]), x.dr)
    d["dw_h"] = x.keep("dw_h", adjoint(getattr(x, "w_h as used"), (len(dw), N, N), dw))  # (2)
    d["db"] = x.total("db", x.da * x.biased, (-3, -2))  # (1)
    return d | {"dh0": x.keep("dh0", carry)}


def _slope_error(x: Any, h: Array) -> Array:
    return np.asarray(x.unit * np.hypot(h * h, 1 - h * h))


def _softmax(x: Any) -> dict[str, Any]:
    """The equations of `npattn.ops.softmax` and back."""
    x.input("given", x.problem.inputs["scores"])
    x.keep("mask", x.options.get("mask"))
    x.keep("allowed", (x.given != -np.inf) if x.mask is None else (x.given != -np.inf) & x.mask)
    x.keep("axis", -1)
    x.keep("scores", np.where(x.allowed, x.given, -np.inf))
    top = x.scores.max(x.axis, keepdims=True)
    x.keep("top", np.where(top == -np.inf, 0, top))
    x.keep("e", np.exp(x.scores - x.top), lambda: _exp_error(x))
    x.total("z", x.e, x.axis, True)
    x.rounded("ratio", x.e / np.where(x.z == 0, 1, x.z), 2.0)
    x.keep("weights", np.where(x.allowed, x.ratio, 0))

    x.input("dweights", x.problem.cotangents["dweights"])
    x.keep("dp", np.where(x.allowed, x.dweights, 0))
    x.total("delta", x.rounded("terms", x.weights * x.dp), x.axis, True)
    x.rounded("centred", x.dp - x.delta)
    x.rounded("ds", x.weights * x.centred)
    return {"weights": x.weights, "dscores": x.keep("dscores", np.where(x.allowed, x.ds, 0))}


def _exp_error(x: Any) -> Array:
    """exp multiplies the rounding of s - top; what is below the smallest normal number may be flushed to 0."""
    below = np.where(x.allowed[0], x.scores[0] - x.top[0], 0)
    error = np.exp(below) * np.hypot(x.unit * below, EXP_ULPS * x.unit) + x.kind.tiny
    return np.where(x.allowed[0], error, 0)


EQUATIONS: dict[str, Callable[[Any], dict[str, Any]]] = {"multi_head": _multi_head, "rnn": _rnn, "softmax": _softmax}

__all__ = ["Change", "Route", "Run", "Values", "adjoint", "run", "same"]
