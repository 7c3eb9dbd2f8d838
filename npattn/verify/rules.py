"""The acceptance rules of other projects' test suites. They are reported beside the verdict and do not change it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.op import Problem
from npattn.verify.precision import PRECISIONS, Precision

CLOSE = {"float64": (1e-7, 1e-7), "float32": (1.3e-6, 1e-5), "float16": (1e-3, 1e-5), "bfloat16": (1.6e-2, 1e-5)}
"""(rtol, atol) of torch.testing.assert_close."""


def _flash(got: Array, want: Array, low: Array, tensor: str, storage: str) -> bool:
    """max |x - ref| <= 2 max |pt - ref| + 1e-5: twice the error of an eager implementation in the candidate's own precision."""
    return _same_pattern(got, want) and _largest(got - want) <= 2 * _largest(low - want) + 1e-5


def _torch(got: Array, want: Array, low: Array, tensor: str, storage: str) -> bool:
    """atol and rtol are the eager implementation's own error times a factor for the tensor (PyTorch's test_transformers)."""
    factor = {"out": 4, "dq": 180, "dk": 16, "dv": 4}.get(tensor, 16)
    rtol, atol = _default_tolerances(storage)
    with np.errstate(all="ignore"):
        relative = _largest((low - want) / np.where(want == 0, 1, want))
    return _allclose(got, want, factor * max(relative, rtol), factor * max(_largest(low - want), atol))


def _allclose(got: Array, want: Array, rtol: float, atol: float) -> bool:
    return bool(np.allclose(got, want, rtol=rtol, atol=atol, equal_nan=True))


def _default_tolerances(storage: str) -> tuple[float, float]:
    return CLOSE.get(storage, CLOSE["bfloat16"])


def _largest(x: Array) -> float:
    return float(np.nanmax(np.abs(np.where(np.isfinite(x), x, 0.0)), initial=0.0))


def _same_pattern(got: Array, want: Array) -> bool:
    """Whether NaN and inf stand in the same places."""
    return bool(((got == want) | (np.isnan(got) & np.isnan(want)) | (np.isfinite(got) & np.isfinite(want))).all())


RULES: dict[str, Callable[[Array, Array, Array, str, str], bool]] = {
    "flash2x": _flash,
    "torch": _torch,
    "onnx": lambda got, want, low, tensor, storage: _allclose(got, want, 1e-3, 1e-7),
    "allclose": lambda got, want, low, tensor, storage: _allclose(got, want, *_default_tolerances(storage)),
}
"""The rules of FlashAttention 2, PyTorch's attention tests, ONNX's backend tests and torch.testing.assert_close.

Each takes what was returned, the truth, what an eager implementation returns, the tensor's name, and the format that the
candidate stores in; it says whether the suite would accept the tensor.
"""


def accepted(
    rules: Iterable[str], problem: Problem, want: Mapping[str, Array], judged: Mapping[str, Any], declared: Precision | None
) -> dict[str, dict[str, bool]]:
    """For each tensor that a candidate returned: tensor -> rule -> whether the suite of that rule would accept it.

    Only arrays of floats for which there is a truth are in it. No rule accepts a tensor of another shape.
    """
    rules = list(rules)
    floats = {t: x for t, x in judged.items() if t in want and getattr(getattr(x, "dtype", None), "kind", "") == "f"}
    if not rules or not floats or problem.op.eager is None:
        return {}
    low, found = _eager(problem, declared), {}
    for tensor, x in floats.items():
        if x.shape != want[tensor].shape:
            found[tensor] = dict.fromkeys(rules, False)
            continue
        storage = declared.storage if declared else low[tensor].dtype.name
        given = x.astype(np.float64), want[tensor].astype(np.float64), low[tensor], tensor, storage
        with np.errstate(all="ignore"):
            found[tensor] = {name: RULES[name](*given) for name in rules}
    return found


def _eager(problem: Problem, declared: Precision | None) -> dict[str, Array]:
    """What an eager implementation in the precision of the problem's inputs, or of the declared class, returns."""
    storage = declared.storage if declared and declared.storage != "float32" else problem.dtype.name
    eager = PRECISIONS.get(f"{storage}-M3") or (declared if declared and declared.dtype == problem.dtype else None)
    assert problem.op.eager is not None
    return problem.op.eager(problem, eager or PRECISIONS[problem.dtype.name])
