"""The truth for attention: the dense reference in a better dtype or in 40 digits, and the predicted error of each element."""

from __future__ import annotations

import importlib.util
import math

import numpy as np

from npattn.ops.allowed import quiet
from npattn.ops.attention import AttentionCache, AttentionGrads, attention_backward, attention_forward
from npattn.ops.checks import Array
from npattn.verify.op import Problem, Truth, Values, better_dtype
from npattn.verify.ops.attention.draw import options_as_arrays
from npattn.verify.ops.attention.errors import predict
from npattn.verify.precision import Precision
from npattn.verify.rounded import rounded
from npattn.verify.stages import run

EXACT = 40_000  # elements of the scores; up to this size mpmath is used if long double is no better than float64


def reference(problem: Problem) -> Values:
    return _with_cache(problem)[0]


@quiet
def _with_cache(p: Problem) -> tuple[Values, tuple[AttentionCache, Array, AttentionGrads]]:
    (out, lse), cache = attention_forward(**p.inputs, **p.arguments, return_lse=True)
    g = attention_backward(p.dout, cache, p.cotangents.get("dlse"))
    values = {"out": out, "lse": lse, "dq": g.q, "dk": g.k, "dv": g.v, "dbias": g.bias, "dsink": g.sink}
    return {name: x for name, x in values.items() if isinstance(x, np.ndarray)}, (cache, out, g)


@quiet
def truth(problem: Problem, precision: Precision) -> Truth | None:
    """The reference's values, and sigma by the formulas of docs/error-model.md; None if no better precision is available."""
    dtype = better_dtype(problem.dtype)
    if dtype is None and (importlib.util.find_spec("mpmath") is None or math.prod(problem.shape) > EXACT):
        return None
    p = problem.astype(dtype or problem.dtype)
    values, (cache, out, g) = _with_cache(p)

    def predicted(rigorous: bool) -> dict[str, Array]:
        errors = predict(cache, out, p.dout, p.cotangents.get("dlse"), g, precision=precision, rigorous=rigorous)
        return {name: getattr(errors, name if name in ("out", "lse") else name[1:]) for name in values}

    sigma, bound = predicted(False), quiet(lambda: predicted(True))
    if dtype is None:
        high, remainder = exact(problem)
        return Truth({n: high[n] for n in values}, sigma, remainder, bound)
    return Truth(values, sigma, bound=bound)


def exact(problem: Problem) -> tuple[Values, Values]:
    """Outputs and gradients in 40 digits: as float64, and the rest that float64 cannot hold. Needs mpmath; it is slow."""
    import mpmath

    with mpmath.workdps(40):
        found = run(problem, options_as_arrays(problem), dtype=object)
        high = {n: np.asarray(x, np.float64) for n, x in found.items()}
        remainder = {n: np.asarray(np.where(np.isfinite(high[n]), x - high[n], 0), np.float64) for n, x in found.items()}
    return high, remainder


@quiet
def overflow(problem: Problem, precision: Precision) -> str:
    """Why a precision class is not tested here: scores or dP may overflow float16. "" if they do not."""
    if precision.storage != "float16":
        return ""
    largest, top = float(np.finfo(np.float16).max), 0.0
    if precision.dweights:
        top = np.abs(problem.dout.astype(np.float64)).sum(-1).max(initial=0.0) * np.nanmax(np.abs(problem.v), initial=0.0)
    bias = problem.options.get("bias")
    if precision.scores and isinstance(bias, np.ndarray):
        top = max(top, float(np.abs(np.where(np.isfinite(bias), bias, 0)).max(initial=0.0)))
    return f"scores or dP overflow {precision.storage}" if np.isfinite(top) and top > largest else ""


def eager(problem: Problem, precision: Precision) -> Values:
    """What an honest dense implementation of this class returns. The rules of other suites compare with it."""
    forward, backward = rounded(precision)
    options = options_as_arrays(problem)
    out, lse = forward(**problem.inputs, **options)
    grads = backward(problem.dout, **problem.inputs, **options, dlse=problem.cotangents.get("dlse"))
    return {"out": out, "lse": lse, **{n: x for n, x in grads.items() if x is not None}}
