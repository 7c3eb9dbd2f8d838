"""What is tested of multi-head attention, the recurrent layer and softmax: cases, their truth and sigma, known mistakes.

The truth is the reference op in a better dtype. sigma has no formula here: the equations are run once more, stage by stage,
with N(0, 1) times the error of each stage added behind it, for `SAMPLES` samples at once, and sigma is the root mean square of
what comes out less what comes out without noise. The same stages with one of them changed are the known mistakes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from npattn import convert
from npattn._checks import Array
from npattn._pairs import quiet, weight_gradient
from npattn.attention import AttentionCache, attention_backward, attention_forward
from npattn.multihead import MultiHeadParams, multi_head_backward, multi_head_forward
from npattn.rnn import RNNParams, rnn_backward, rnn_forward
from npattn.softmax import softmax_backward, softmax_forward
from npattn.tolerances import EXP_ULPS, ROUNDING_STD
from npattn.verify.cases import Truth, better
from npattn.verify.errors import _Kind, predict
from npattn.verify.precision import Precision, round_to

Rng = np.random.Generator
Values = dict[str, Array]

SAMPLES = 32  # of the noise: sigma is known to 1 / sqrt(64), 12 percent
TANH_ULPS = 2.0  # as for exp: libraries are off by up to 2 units in the last place
UNSUPPORTED = "precision classes of layers: float32 and float64, with inputs and outputs rounded (M1)"


# --- problems ----------------------------------------------------------------------------------------------------------


@dataclass
class LayerProblem:
    """The inputs, options and cotangents of one call; what is returned is a mapping from names."""

    op: str  # "multi_head", "rnn" or "softmax"
    inputs: dict[str, Any]  # the positional arguments, in order; an array, params or None
    options: dict[str, Any]
    cotangents: Values

    @property
    def outputs(self) -> tuple[str, ...]:
        return {"multi_head": ("out",), "rnn": ("h", "h_last"), "softmax": ("weights",)}[self.op]

    @property
    def gradients(self) -> tuple[str, ...]:
        """'d' and the name of what it belongs to, where that is given."""
        params = self.inputs.get("params")
        given = self.inputs | ({} if params is None else params._asdict()) | {"params": None}
        names = [name for name, x in given.items() if x is not None]
        return tuple(f"d{name}" for name in (*names, *(n for n in ("bias", "sink") if n in self.options)))

    @property
    def dtype(self) -> np.dtype[Any]:
        first: Array = next(iter(self.inputs.values()))
        return first.dtype

    def astype(self, dtype: Any) -> LayerProblem:
        """All floating arrays in another dtype."""
        return self._each(lambda x: x.astype(dtype) if x.dtype.kind == "f" else x)

    def _each(self, f: Callable[[Array], Array]) -> LayerProblem:
        done: dict[int, Array] = {}  # an array that is given twice stays one

        def of(x: Any) -> Any:
            if isinstance(x, tuple):
                return type(x)(*map(of, x))
            return done.setdefault(id(x), f(x)) if isinstance(x, np.ndarray) else x

        parts = ({name: of(x) for name, x in part.items()} for part in (self.inputs, self.options, self.cotangents))
        return LayerProblem(self.op, *parts)

    def letters(self, tensor: str) -> str:
        """The axes of an output or gradient."""
        params = {"dw_x": "MN", "dw_h": "NN", "db": "N", "dbias": "BHLS", "dsink": "H"}
        tokens = {"out": "BLM", "dx_q": "BLM", "dx_k": "BSM", "dx_v": "BSM", "weights": "BHLS", "dscores": "BHLS"}
        steps = {"h": "BTN", "dx": "BTM", "h_last": "BN", "dh0": "BN"}
        return (params | tokens | steps).get(tensor, "")

    def dtypes(self, tensor: str, precision: Precision) -> list[Any]:
        """In which dtypes a tensor may come back."""
        return [self.dtype] if self.dtype == precision.dtype else [self.dtype, precision.dtype]

    def stored(self, precision: Precision) -> LayerProblem:
        """The same with inputs that the storage of ``precision`` holds."""
        if precision.storage in ("float32", "float64"):
            return self
        low = self.astype(np.float32)._each(partial(_held, storage=precision.storage))
        return low.astype(np.float16) if precision.storage == "float16" else low

    @quiet
    def truth(self, precision: Precision) -> Truth | None:
        """The reference's values, and sigma for an implementation of that class; None where there is no better dtype."""
        if any((precision.scores, precision.weights, precision.dweights, precision.dscores, precision.delta_out)):
            raise NotImplementedError(UNSUPPORTED)
        dtype = better(precision.dtype)
        if dtype is None:
            return None
        wide = self.astype(dtype)
        found = REFERENCES[self.op](wide)
        values = {name: found[name] for name in (*self.outputs, *self.gradients)}
        noisy = run(_finite(wide), precision=precision)
        return Truth(values, {name: _spread(noisy[name], want, precision) for name, want in values.items()})


def _held(x: Array, storage: str) -> Array:
    return np.where(np.isfinite(x), round_to(x, storage), x) if x.dtype.kind == "f" else x


def _spread(samples: Array, want: Array, precision: Precision) -> Array:
    """The root mean square of samples less the first, which has no noise; and the rounding of what is returned."""
    error = np.asarray(samples[1:] - samples[:1], np.float64)
    top = np.maximum(np.abs(error).max(0), 1e-300)  # squares of what is below 1e-154 would underflow
    rms = top * np.sqrt(np.square(error / top).mean(0))
    size = np.where(np.isfinite(want), np.abs(want), 0).astype(np.float64)
    rounded = np.where(size > 0, np.hypot(ROUNDING_STD * precision.out * size, precision.subnormal), 0)
    return np.where(np.isfinite(want), np.hypot(rms, rounded), 0.0)


def _finite(problem: LayerProblem) -> LayerProblem:
    """What is NaN or inf reaches nothing, or makes the truth NaN; -inf among the scores of softmax is a mask, and stays."""

    def clean(x: Array) -> Array:
        return np.where(np.isfinite(x), x, 0) if x.dtype.kind == "f" else x

    if problem.op != "softmax":
        return problem._each(clean)
    scores = problem.inputs["scores"]
    return LayerProblem("softmax", {"scores": np.where(scores < np.inf, scores, 0)}, problem.options, problem.cotangents)


# --- candidates --------------------------------------------------------------------------------------------------------


def arguments(
    problem: LayerProblem, function: Callable[..., Any], takes: frozenset[str], backward: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """The keyword arguments of a call, and those that the function does not take."""
    given = dict(problem.options)
    if backward and "dh_last" in problem.cotangents:
        given["dh_last"] = problem.cotangents["dh_last"]
    return given, [name for name in given if name not in takes]


def _positional(problem: LayerProblem, function: Callable[..., Any]) -> list[Any]:
    """The inputs, with params in the layout that the function's own names ask for: ``params``, ``state_dict``, or W, R, B."""
    inputs = dict(problem.inputs)
    params, names = inputs.pop("params", None), _names(function)
    if params is None or not names & {"state_dict", "W"}:
        return list(problem.inputs.values())
    if "W" in names and problem.op == "rnn":
        onnx = convert.rnn_to_onnx(params)
        return [*inputs.values(), onnx["W"], onnx["R"], onnx.get("B")]
    to_torch: Any = convert.rnn_to_torch if problem.op == "rnn" else convert.multi_head_to_torch
    try:
        return [*inputs.values(), to_torch(params)]
    except ValueError as error:  # widths or biases that torch's layer cannot have
        raise NotImplementedError(str(error)) from error


def _names(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # compiled functions may have no signature
        return set()


def run_forward(problem: LayerProblem, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
    """What the forward returns."""
    return forward(*_positional(problem, forward), **given)


def run_backward(problem: LayerProblem, backward: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any] | str:
    """The gradients by our names, or a text that says what was returned instead."""
    first = next(iter(problem.cotangents.values()))
    returned = backward(first, *_positional(problem, backward), **given)
    if hasattr(returned, "_asdict"):
        returned = returned._asdict()
    if isinstance(returned, (tuple, list)) and len(returned) == len(problem.gradients):
        returned = dict(zip(problem.gradients, returned, strict=True))
    elif len(problem.gradients) == 1 and isinstance(returned, np.ndarray):
        returned = {problem.gradients[0]: returned}
    if not isinstance(returned, Mapping):
        kind = type(returned).__name__
        return f"the backward returns a {kind}, expected a mapping with {', '.join(problem.gradients)}"
    found = _by_our_names(problem, returned)
    return {name if name in problem.gradients else f"d{name}": x for name, x in found.items()}


def _by_our_names(problem: LayerProblem, returned: Mapping[str, Any]) -> dict[str, Any]:
    """torch's gradients in "state_dict", ONNX' dW, dR and dB, or npattn's in "params", one by one."""
    found = dict(returned)
    if "state_dict" in found:
        from_torch: Any = convert.rnn_from_torch if problem.op == "rnn" else convert.multi_head_from_torch
        params = from_torch(found.pop("state_dict"))
    elif "dW" in found:
        params = convert.rnn_from_onnx(found.pop("dW"), found.pop("dR"), found.pop("dB", None))
    else:
        params = found.pop("params", found.pop("dparams", None))
        return found if params is None else found | _d(params)
    if problem.op == "rnn" and params.b is not None:
        params = params._replace(b=params.b / 2)  # torch and ONNX have two biases, each with the gradient of their sum
    return found | _d(params)


# --- the truth ---------------------------------------------------------------------------------------------------------


def _multi_head_reference(p: LayerProblem) -> Values:
    out, cache = multi_head_forward(**p.inputs, **p.options)
    g = multi_head_backward(p.cotangents["dout"], cache)
    found = {"out": out, **_d(g.params), "dx_q": g.x_q, "dx_k": g.x_k, "dx_v": g.x_v, "dbias": g.bias, "dsink": g.sink}
    return {name: x for name, x in found.items() if x is not None}


def _rnn_reference(p: LayerProblem) -> Values:
    h, cache = rnn_forward(**p.inputs, **p.options)
    g = rnn_backward(p.cotangents["dh"], cache, p.cotangents.get("dh_last"))
    return {"h": h, "h_last": cache.h_last, "dx": g.x, "dh0": g.h0, **_d(g.params)}


def _softmax_reference(p: LayerProblem) -> Values:
    weights, cache = softmax_forward(p.inputs["scores"], **p.options)
    return {"weights": weights, "dscores": softmax_backward(p.cotangents["dweights"], cache).scores}


def _d(params: Any) -> Values:
    return {f"d{name}": x for name, x in params._asdict().items() if x is not None}


REFERENCES: dict[str, Callable[[LayerProblem], Values]] = {
    "multi_head": _multi_head_reference,
    "rnn": _rnn_reference,
    "softmax": _softmax_reference,
}


# --- the equations, stage by stage -------------------------------------------------------------------------------------

Change = Callable[[Any, Any], Any]  # of all that is known so far, and the honest value of the stage
Route = Callable[[Array], Array]  # moves, repeats or leaves out elements; its backward is `adjoint`


def swap(a: Array) -> Array:
    result: Array = np.swapaxes(a, -1, -2)
    return result


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
        self, problem: LayerProblem, changes: Mapping[str, Change], precision: Precision | None, low: Any
    ) -> None:
        self.problem, self.changes, self.options, self.precision = problem, changes, problem.options, precision
        self.rng = None if precision is None else np.random.default_rng(0)
        tiny = float(np.finfo(np.float64 if precision is None else precision.dtype).smallest_normal)
        self.kind = _Kind(False, 0.0 if precision is None else precision.u, tiny)
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
    problem: LayerProblem, changes: Mapping[str, Change] | None = None, *, precision: Precision | None = None, low: Any = None
) -> Values:
    """Outputs and gradients, with changed stages or with noise; an axis of samples comes first, of length 1 without noise.

    changes : by stage; "finish" is one of all that is returned
    low     : the dtype of the candidate, where another than the problem's
    """
    x = Run(problem, changes or {}, precision, low or problem.dtype)
    found = x.keep("finish", EQUATIONS[problem.op](x))
    return {name: found[name] for name in (*problem.outputs, *problem.gradients) if name in found}


def _split(x: Array, heads: int) -> Array:
    """(.., L, H D) -> (.., H, L, D)"""
    return np.moveaxis(x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads), -2, -3)


def _merge(x: Array) -> Array:
    """(.., H, L, E) -> (.., L, H E)"""
    x = np.moveaxis(x, -3, -2)
    return x.reshape(*x.shape[:-2], -1)


def _multi_head(x: Any) -> dict[str, Any]:
    """Equations (1) to (6) of `npattn.multihead` and back; attention has one key and value head for each query head here."""
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
        x.keep(n, x.keep(f"split_{n}", partial(_split, heads=heads))(y))
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
    x.keep("merge", _merge)
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
    """Equations (1) to (3) of `npattn.rnn` and back through time."""
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
    """The equations of `npattn.softmax` and back."""
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


# --- cases -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCase:
    """A named problem, and the features that it speaks for."""

    op: str
    name: str
    features: list[str]
    draw: Callable[[Rng], LayerProblem]
    dtype: str = "float32"

    @property
    def options(self) -> tuple[str, ...]:
        """The keyword arguments that it gives."""
        return tuple(self.problem().options)

    def problem(self, seed: int = 0) -> LayerProblem:
        return self.draw(np.random.default_rng([seed, *self.name.encode()])).astype(self.dtype)


def _normal(rng: Rng, *shape: int) -> Array:
    return rng.standard_normal(shape)


def _weight(rng: Rng, *shape: int) -> Array:
    """Of such a size that what comes out is as large as what goes in."""
    return np.asarray(rng.standard_normal(shape) * shape[0] ** -0.5)


def _heads(
    rng: Rng, *, B: int = 2, L: int = 11, S: int = 11, M: int = 24, Mk: int = 0, Mv: int = 0, H: int = 4, G: int = 0,
    D: int = 6, E: int = 0, out: int = 0, biases: str = "qkvo", inputs: float = 1.0, mask: str = "", twist: str = "",
    options: tuple[str, ...] = (),
) -> LayerProblem:  # fmt: skip
    """A problem of multi-head attention; sizes of 0 are those of the others, as in the paper."""
    Mk, Mv, G, E, out = Mk or M, Mv or Mk or M, G or H, E or D, out or M
    x = {"x_q": inputs * _normal(rng, B, L, M), "x_k": inputs * _normal(rng, B, S, Mk), "x_v": inputs * _normal(rng, B, S, Mv)}
    sizes = {"q": (M, H * D), "k": (Mk, G * D), "v": (Mv, G * E), "o": (H * E, out)}
    params = {f"w_{n}": _weight(rng, *shape) for n, shape in sizes.items()}
    params |= {f"b_{n}": 0.5 * _normal(rng, sizes[n][1]) for n in biases}
    given: dict[str, Any] = {"num_heads": H} | ({"num_kv_heads": G} if G != H else {})
    if mask:
        given["mask"] = MASKS[mask](rng, (B, H, L, S))
    for name in options:
        given[name.split()[0]] = OPTIONS[name](rng, (B, H, L, S))
    if twist:
        TWISTS[twist](x)
    return LayerProblem("multi_head", {**x, "params": MultiHeadParams(**params)}, given, {"dout": _normal(rng, B, L, out)})


Shape = tuple[int, ...]


def _rows(shape: Shape, dead: Callable[[Array], Array]) -> Array:
    """A mask (L, S) that leaves these queries without a key."""
    L, S = shape[-2:]
    return np.array(np.broadcast_to(~dead(np.arange(L))[:, None], (L, S)))


def _seen(shape: Shape) -> Array:
    """All keys but the last third."""
    L, S = shape[-2:]
    return np.array(np.broadcast_to(np.arange(S) < S - S // 3, (L, S)))


def _causal(shape: Shape) -> Array:
    """The last query stands at the last key."""
    L, S = shape[-2:]
    return np.tri(L, S, S - L, dtype=bool)


MASKS: dict[str, Callable[[Rng, Shape], Array]] = {
    "mask": lambda rng, n: rng.random((n[0], 1, *n[2:])) < 0.7,
    "mask (L, S)": lambda rng, n: rng.random(n[2:]) < 0.7,
    "mask of each head": lambda rng, n: rng.random(n) < 0.7,
    "mask of keys": lambda rng, n: rng.random((n[0], 1, 1, n[3])) < 0.7,
    "causal": lambda rng, n: _causal(n),
    "dead rows": lambda rng, n: _rows(n, lambda i: (i == 1) | (i == n[2] - 1)),
    "every row dead": lambda rng, n: np.zeros(n[2:], bool),
    "dead query 1": lambda rng, n: _rows(n, lambda i: i == 1),
    "last third": lambda rng, n: _seen(n),
}
OPTIONS: dict[str, Callable[[Rng, Shape], Any]] = {
    "bias": lambda rng, n: _normal(rng, 1, *n[1:]),
    "bias (L, S)": lambda rng, n: _normal(rng, *n[2:]),
    "scale": lambda rng, n: 0.3,
    "softcap": lambda rng, n: 1.5,
    "sink": lambda rng, n: _normal(rng, n[1]),
    "dropout_mask": lambda rng, n: (rng.random(n) >= 0.25) / 0.75,
}


def _one_array(x: dict[str, Array]) -> None:
    x["x_k"] = x["x_v"] = x["x_q"]


def _nan_behind(x: dict[str, Array]) -> None:
    S = x["x_k"].shape[1]
    x["x_k"][:, S - S // 3 :] = np.nan
    x["x_v"][:, S - S // 3 :] = np.inf


def _nan_in_dead_query(x: dict[str, Array]) -> None:
    x["x_q"][:, 1] = np.nan


def _nan_later(x: dict[str, Array]) -> None:
    x["x_k"][:, -1] = np.nan


TWISTS: dict[str, Callable[[dict[str, Array]], None]] = {
    "one array": _one_array, "NaN behind the mask": _nan_behind, "NaN in a dead query": _nan_in_dead_query,
    "NaN seen later": _nan_later,
}  # fmt: skip


def _case(op: str, draw: Callable[..., LayerProblem], name: str, feature: str, dtype: str, sizes: dict[str, Any]) -> LayerCase:
    return LayerCase(op, name, [feature or name], partial(draw, **sizes), dtype)


def _multi_head_case(name: str, feature: str = "", *, dtype: str = "float32", **sizes: Any) -> LayerCase:
    return _case("multi_head", _heads, name, feature, dtype, sizes)


MULTI_HEAD_CASES = [
    _multi_head_case("plain"),
    _multi_head_case("self-attention", "plain", twist="one array"),
    _multi_head_case("no biases", "biases", biases=""),
    _multi_head_case("b_o alone", "biases", biases="o"),
    _multi_head_case("b_q, b_k, b_v alone", "biases", biases="qkv"),
    _multi_head_case("b_q alone", "biases", biases="q"),
    _multi_head_case("b_v alone", "biases", biases="v"),
    _multi_head_case("cross-attention", L=7, S=13),
    _multi_head_case("memory of another width", "input widths", S=13, Mk=17),
    _multi_head_case("x_v of another width", "input widths", S=13, Mk=17, Mv=20),
    _multi_head_case("M_out of another width", "output width", out=19),
    _multi_head_case("E != D", E=9),
    _multi_head_case("H D != M", "head widths", D=5),
    _multi_head_case("grouped heads", G=2),
    _multi_head_case("G = 1", "grouped heads", G=1),
    _multi_head_case("grouped heads, G > H / G", "grouped heads", H=6, G=3, D=4),
    _multi_head_case("grouped heads + mask + E != D", "grouped heads", G=2, E=9, mask="mask", S=13),
    _multi_head_case("mask", mask="mask"),
    _multi_head_case("mask (L, S)", "mask", mask="mask (L, S)", S=13),
    _multi_head_case("mask of each head", "mask", mask="mask of each head"),
    _multi_head_case("mask of keys", "mask", mask="mask of keys", L=7, S=13),
    _multi_head_case("causal", mask="causal"),
    _multi_head_case("causal, self-attention", "causal", mask="causal", twist="one array"),
    _multi_head_case("causal, L < S", "causal", mask="causal", L=7),
    _multi_head_case("causal, L > S", "dead rows", mask="causal", S=7),
    _multi_head_case("dead rows", mask="dead rows"),
    _multi_head_case("dead rows, no b_o", "dead rows", mask="dead rows", biases="qkv"),
    _multi_head_case("dead rows, grouped heads", "dead rows", mask="dead rows", G=2),
    _multi_head_case("every row dead", "dead rows", mask="every row dead"),
    _multi_head_case("NaN behind the mask", "NaN containment", mask="last third", twist="NaN behind the mask"),
    _multi_head_case("NaN in a dead query", "NaN containment", mask="dead query 1", twist="NaN in a dead query"),
    _multi_head_case("NaN seen later", "NaN containment", mask="causal", twist="NaN seen later"),
    _multi_head_case("bias", options=("bias",)),
    _multi_head_case("bias (L, S)", "bias", options=("bias (L, S)",), S=13),
    _multi_head_case("scale", options=("scale",)),
    _multi_head_case("softcap", options=("softcap",)),
    _multi_head_case("sink", options=("sink",)),
    _multi_head_case("dead rows + sink", "sink", options=("sink",), mask="dead rows"),
    _multi_head_case("dropout_mask", "dropout", options=("dropout_mask",)),
    _multi_head_case("everything", G=2, E=9, S=13, Mk=17, Mv=20, out=19, mask="mask",
                     options=("bias", "scale", "softcap", "sink", "dropout_mask")),
    _multi_head_case("B = 1", "small sizes", B=1),
    _multi_head_case("H = 1", "small sizes", H=1, D=24),
    _multi_head_case("L = 1", "small sizes", L=1),
    _multi_head_case("S = 1", "small sizes", S=1),
    _multi_head_case("L = S = 1", "small sizes", L=1, S=1),
    _multi_head_case("D = 1", "small sizes", D=1, H=24),
    _multi_head_case("H = L = B", "small sizes", B=4, L=4, S=4),
    _multi_head_case("inputs x5", "hard inputs", inputs=5.0),
    _multi_head_case("inputs tiny", "hard inputs", inputs=1e-3),
    _multi_head_case("M = 96", "long", M=96, H=8, D=12, L=33, S=47),
    _multi_head_case("long", "long", L=130, S=150, B=1),
    _multi_head_case("float64", dtype="float64"),
    _multi_head_case("float64 mask + grouped heads", "float64", dtype="float64", mask="mask", G=2),
    _multi_head_case("float64 dead rows", "float64", dtype="float64", mask="dead rows"),
]  # fmt: skip


def _recurrent(
    rng: Rng, *, B: int = 3, T: int = 13, M: int = 6, N: int = 10, state: float | None = 1.0, bias: bool = True,
    lengths: tuple[int, ...] | None = None, last: bool = False, dh: float = 1.0, nonlinearity: str = "tanh",
    weights: float = 1.0, inputs: float = 1.0, behind: float | None = None,
) -> LayerProblem:  # fmt: skip
    """A problem of the recurrent layer.

    state : the size of h0; last : dh_last is given; behind : what x holds after the lengths
    """
    x = inputs * _normal(rng, B, T, M)
    w_x, w_h, b = weights * _weight(rng, M, N), 0.9 * weights * _weight(rng, N, N), 0.5 * _normal(rng, N)
    h0, dh_all, dh_last = _normal(rng, B, N), dh * _normal(rng, B, T, N), _normal(rng, B, N)
    options: dict[str, Any] = {} if lengths is None else {"lengths": np.array(lengths)}
    if nonlinearity != "tanh":
        options["nonlinearity"] = nonlinearity
    if behind is not None:
        x[np.arange(T) >= options["lengths"][:, None]] = behind
    params = RNNParams(w_x, w_h, b if bias else None)
    given = {"x": x, "h0": None if state is None else state * h0, "params": params}
    return LayerProblem("rnn", given, options, {"dh": dh_all} | ({"dh_last": dh_last} if last else {}))


def _rnn_case(name: str, feature: str = "", *, dtype: str = "float32", **sizes: Any) -> LayerCase:
    return _case("rnn", _recurrent, name, feature, dtype, sizes)


RAGGED, WITH_NONE = (9, 13, 4), (5, 0, 13)
RNN_CASES = [
    _rnn_case("plain"),
    _rnn_case("no initial state", "initial state", state=None),
    _rnn_case("initial state 0", "initial state", state=0.0),
    _rnn_case("no bias", "bias", bias=False),
    _rnn_case("relu", nonlinearity="relu"),
    _rnn_case("relu + lengths + dh_last", "relu", nonlinearity="relu", lengths=RAGGED, last=True),
    _rnn_case("lengths", lengths=RAGGED),
    _rnn_case("lengths 0 and T", "lengths", lengths=WITH_NONE),
    _rnn_case("lengths of 1", "lengths", lengths=(1, 1, 1)),
    _rnn_case("lengths of T", "lengths", lengths=(13, 13, 13)),
    _rnn_case("NaN after the length", "NaN containment", lengths=RAGGED, behind=np.nan),
    _rnn_case("inf after the length", "NaN containment", lengths=WITH_NONE, behind=np.inf, last=True),
    _rnn_case("dh_last", last=True),
    _rnn_case("dh_last alone", "dh_last", last=True, dh=0.0),
    _rnn_case("dh_last + lengths", "dh_last", last=True, lengths=RAGGED),
    _rnn_case("dh_last + lengths 0 and T", "dh_last", last=True, lengths=WITH_NONE),
    _rnn_case("dh_last, no bias, no initial state", "dh_last", last=True, bias=False, state=None),
    _rnn_case("T = 1", "small sizes", T=1),
    _rnn_case("T = 2", "small sizes", T=2),
    _rnn_case("B = 1", "small sizes", B=1),
    _rnn_case("M = 1", "small sizes", M=1),
    _rnn_case("N = 1", "small sizes", N=1),
    _rnn_case("M = N", "small sizes", M=10),
    _rnn_case("B = T = M = N", "small sizes", B=5, T=5, M=5, N=5),
    _rnn_case("N = 96", "long", M=64, N=96),
    _rnn_case("long", "long", T=200),
    _rnn_case("long + lengths", "long", T=200, lengths=(200, 150, 3), last=True),
    _rnn_case("long, dh_last alone", "long", T=200, last=True, dh=0.0),
    _rnn_case("saturated", "hard inputs", inputs=5.0, weights=2.0),
    _rnn_case("inputs tiny", "hard inputs", inputs=1e-3, state=1e-3),
    _rnn_case("float64", dtype="float64"),
    _rnn_case("float64 lengths + dh_last", "float64", dtype="float64", lengths=WITH_NONE, last=True),
    _rnn_case("float64 relu", "float64", dtype="float64", nonlinearity="relu"),
]


def _rows_of_scores(
    rng: Rng, *, shape: Shape = (2, 3, 7, 13), size: float = 1.0, shift: float = 0.0, mask: str = "", ties: bool = False,
    put: dict[int, float] | None = None, row: float | None = None,
) -> LayerProblem:  # fmt: skip
    """A problem of softmax. put: values of every row by index; row: what all of row 1 holds."""
    scores = size * _normal(rng, *shape) + shift
    if ties:
        scores[..., 1::2] = scores[..., : shape[-1] - 1 : 2] + 1e-6 * _normal(rng, *shape)[..., 1::2]
    for index, value in (put or {}).items():
        scores[..., index] = value
    if row is not None:
        scores[..., 1, :] = row
    four = (1,) * (4 - len(shape)) + shape
    seen = MASKS[mask](rng, four) if mask else None
    options = {} if seen is None else {"mask": seen if seen.ndim == 2 else seen.reshape(seen.shape[4 - len(shape) :])}
    return LayerProblem("softmax", {"scores": scores}, options, {"dweights": _normal(rng, *shape)})


def _softmax_case(name: str, feature: str = "", *, dtype: str = "float32", **sizes: Any) -> LayerCase:
    return _case("softmax", _rows_of_scores, name, feature, dtype, sizes)


SOFTMAX_CASES = [
    _softmax_case("plain"),
    *(_softmax_case(f"rank {len(n)}", "rank", shape=n) for n in ((13,), (7, 13), (3, 7, 13))),
    _softmax_case("mask", mask="mask"),
    _softmax_case("mask (L, S)", "mask", mask="mask (L, S)"),
    _softmax_case("mask (L, S), L = S", "mask", mask="mask (L, S)", shape=(2, 3, 9, 9)),
    _softmax_case("mask, rank 2", "mask", mask="mask (L, S)", shape=(7, 13)),
    _softmax_case("mask of each head", "mask", mask="mask of each head"),
    _softmax_case("mask of keys", "mask", mask="mask of keys"),
    _softmax_case("causal", "mask", mask="causal", shape=(2, 3, 9, 9)),
    _softmax_case("dead rows", mask="dead rows"),
    _softmax_case("every row dead", "dead rows", mask="every row dead"),
    _softmax_case("row of -inf", "dead rows", row=-np.inf),
    _softmax_case("scores of -inf", put={2: -np.inf, 5: -np.inf}),
    _softmax_case("scores of -inf and a mask", "scores of -inf", put={2: -np.inf}, mask="mask"),
    _softmax_case("row of NaN", "NaN containment", row=np.nan),
    _softmax_case("NaN behind the mask", "NaN containment", mask="last third", put={-1: np.nan, -2: np.inf}),
    _softmax_case("x5", "hard inputs", size=5.0),
    _softmax_case("x30", "hard inputs", size=30.0),
    _softmax_case("x1e4", "hard inputs", size=1e4),
    _softmax_case("scores of 1e4", "hard inputs", shift=1e4),
    _softmax_case("scores of -1e4", "hard inputs", shift=-1e4),
    _softmax_case("scores of -1e5 and a mask", "hard inputs", shift=-1e5, mask="mask"),
    _softmax_case("one score far above", "hard inputs", put={3: 300.0}),
    _softmax_case("mask over the largest", "hard inputs", mask="last third", put={-1: 300.0}),
    _softmax_case("tiny", "hard inputs", size=1e-20),
    _softmax_case("near ties", "hard inputs", ties=True, size=10.0),
    _softmax_case("constant rows", "hard inputs", size=0.0, shift=3.0),
    _softmax_case("S = 1", "small sizes", shape=(2, 3, 7, 1)),
    _softmax_case("S = 2", "small sizes", shape=(2, 3, 7, 2)),
    _softmax_case("L = 1", "small sizes", shape=(2, 3, 1, 13)),
    _softmax_case("H = L = S", "small sizes", shape=(5, 5, 5, 5)),
    _softmax_case("S = 1025", "long", shape=(2, 1, 3, 1025)),
    _softmax_case("S = 16384", "long", shape=(3, 16384)),
    _softmax_case("float64", dtype="float64"),
    _softmax_case("float64 mask", "float64", dtype="float64", mask="mask"),
    _softmax_case("float64 x30", "float64", dtype="float64", size=30.0),
    _softmax_case("everything", mask="mask of each head", size=5.0, shift=-100.0, put={2: -np.inf}, row=-np.inf),
]
CASES: dict[str, list[LayerCase]] = {"multi_head": MULTI_HEAD_CASES, "rnn": RNN_CASES, "softmax": SOFTMAX_CASES}


# --- known mistakes ----------------------------------------------------------------------------------------------------
# A change of a forward stage changes the backward with it, as automatic differentiation would: what moves elements is a
# route, of which the backward takes the adjoint, and parameters that are left out lose their gradient.

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


# -- multi-head attention


def _interleaved(x: Any, route: Route) -> Route:
    """(.., L, D H) -> (.., H, L, D)"""
    heads = route.keywords["heads"]  # type: ignore[attr-defined]
    return lambda a: np.moveaxis(a.reshape(*a.shape[:-1], -1, heads), -1, -3)


def _as_it_lies(x: Any, route: Route) -> Route:
    """(B, L, H D) read as (B, H, L, D)"""
    heads = route.keywords["heads"]  # type: ignore[attr-defined]
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
    return _merge(o.reshape(n, H, B, L, E).swapaxes(1, 2))


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

__all__ = [
    "CASES",
    "MISTAKES",
    "MULTI_HEAD_CASES",
    "RNN_CASES",
    "SOFTMAX_CASES",
    "LayerCase",
    "LayerProblem",
    "arguments",
    "run",
    "run_backward",
    "run_forward",
]
