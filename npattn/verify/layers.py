"""What is tested of multi-head attention, the recurrent layer and softmax: problems, how they are called, their truth, cases.

The truth is the reference op in a better dtype. sigma has no formula here: `npattn.verify.layer_stages` runs the equations with
noise, and what comes out is its root mean square.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from npattn import convert
from npattn.ops.allowed import quiet
from npattn.ops.checks import Array
from npattn.ops.multihead import MultiHeadParams, multi_head_backward, multi_head_forward
from npattn.ops.rnn import RNNParams, rnn_backward, rnn_forward
from npattn.ops.softmax import softmax_backward, softmax_forward
from npattn.tolerances import ROUNDING_STD
from npattn.verify.cases import Truth, better
from npattn.verify.layer_stages import Values, run
from npattn.verify.precision import Precision, round_to

Rng = np.random.Generator
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
    problem: LayerProblem, takes: frozenset[str], backward: bool = False
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


def _case(
    op: str, draw: Callable[..., LayerProblem], name: str, feature: str = "", *, dtype: str = "float32", **sizes: Any
) -> LayerCase:
    return LayerCase(op, name, [feature or name], partial(draw, **sizes), dtype)


_multi_head_case = partial(_case, "multi_head", _heads)
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


_rnn_case = partial(_case, "rnn", _recurrent)
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


_softmax_case = partial(_case, "softmax", _rows_of_scores)
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
KEYWORDS = {
    "multi_head": ("num_heads", "num_kv_heads", "mask", *(name for name in OPTIONS if " " not in name)),
    "rnn": ("lengths", "nonlinearity"), "softmax": ("mask",),
}  # fmt: skip
"""The keywords of each op's forward."""
CASES: dict[str, list[LayerCase]] = {"multi_head": MULTI_HEAD_CASES, "rnn": RNN_CASES, "softmax": SOFTMAX_CASES}

__all__ = [
    "CASES",
    "MULTI_HEAD_CASES",
    "RNN_CASES",
    "SOFTMAX_CASES",
    "LayerCase",
    "LayerProblem",
    "arguments",
    "run_backward",
    "run_forward",
]
