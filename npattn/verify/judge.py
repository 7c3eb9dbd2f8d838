"""Whether what a candidate returns is right: the comparison, its levels, and whether it could have failed.

An error counts in sigma, what an honest implementation of the same precision is predicted to have in that very element. A
verdict counts only if the same judge rejects zeros, an error of 1e-3 and the likely mistakes on the same inputs: its power.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npattn._checks import Array, kind
from npattn._sums import quiet
from npattn.tolerances import GOOD_MAX, GOOD_RMS, PLANTED, TIGHT_MAX, TIGHT_RMS
from npattn.verify import layer_mistakes
from npattn.verify.candidates import Candidate, canonical
from npattn.verify.cases import Problem, Truth, dense_mask
from npattn.verify.diagnose import CANNOT, LARGE, UNKNOWN, Diagnostician, Explanation, places
from npattn.verify.mistakes import CHANGES
from npattn.verify.precision import PRECISIONS, Precision, of_dtype
from npattn.verify.rounded import rounded
from npattn.verify.stages import Change, facts, run

LEVELS = {"tight": (TIGHT_RMS, TIGHT_MAX), "good": (GOOD_RMS, GOOD_MAX)}  # and "bounded": no element above det


@dataclass(frozen=True)
class Settings:
    """What is asked of a candidate."""

    level: str = "good"  # "tight", "good" or "bounded"
    precision: Precision | None = None  # the declared class; None: that of the inputs' dtype
    rules: tuple[str, ...] = ()  # names of RULES, reported beside the verdict
    power: bool = True


@dataclass(frozen=True)
class Check:
    """One tensor of one case, or one exact condition: right, wrong, or not tested and why."""

    tensor: str
    status: str  # "ok", "wrong", "no power", "not supported" or "not given"
    text: str = ""
    rms: float = 0.0  # of error / sigma
    worst: float = 0.0  # largest error / sigma
    index: tuple[int, ...] = ()
    level: str = ""  # the best that it reaches: "tight", "good", "bounded" or "broken"
    rules: dict[str, bool] = field(default_factory=dict)  # what other suites' rules say


@dataclass(frozen=True)
class Result:
    """All checks of one case."""

    case: str
    features: list[str]
    checks: list[Check] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)
    expected: str = ""  # the reason why it is expected to fail
    seed: int = 0

    @property
    def status(self) -> str:
        statuses = {c.status for c in self.checks}
        for status in ("wrong", "ok", "no power", "not given"):
            if status in statuses:
                return status
        return "not supported"

    @property
    def tested(self) -> list[Check]:
        return [c for c in self.checks if c.status in ("ok", "wrong")]


# --- one tensor -----------------------------------------------------------------------------------------------------------


@quiet
def units(got: Array, want: Array, sigma: Array, rest: Any = 0.0) -> Array:
    """|error| / sigma; 0 where equal, inf where NaN and inf do not stand as they should."""
    x, y = np.asarray(got, want.dtype), want
    same = ((x == y) & (rest == 0)) | (np.isnan(x) & np.isnan(y)) | ((x == y) & np.isinf(x))
    finite = np.isfinite(x) & np.isfinite(y)
    return np.asarray(np.where(same, 0.0, np.where(finite, np.abs(x - y - rest) / sigma, np.inf)), np.float64)


@quiet
def accepts(level: str, off: Array) -> bool:
    """Whether errors in sigma are good enough; for "bounded" they are errors over det."""
    if not off.size:
        return True
    if level == "bounded":
        return bool(off.max() <= 1)
    rms, worst = LEVELS[level]
    return bool(off.max() <= worst and np.sqrt(np.square(off).mean()) <= rms)


@quiet
def compare(
    tensor: str, got: Any, want: Array, sigma: Array, dtypes: Iterable[Any], level: str = "good",
    det: Callable[[], Array | None] = lambda: None, letters: str = "", rest: Any = 0.0,
) -> Check:  # fmt: skip
    """One tensor against the truth, in units of sigma. NaN and inf have to be where the truth has them."""
    if not isinstance(got, np.ndarray):
        return Check(tensor, "wrong", f"is {kind(got)}, expected a numpy.ndarray: np.asarray(x)", worst=math.inf)
    if got.shape != want.shape:
        return Check(tensor, "wrong", f"has shape {got.shape}, expected {want.shape}", worst=math.inf)
    dtypes = [np.dtype(d) for d in dtypes]
    if got.dtype not in dtypes:
        return Check(tensor, "wrong", f"has dtype {got.dtype}, expected {' or '.join(map(str, dtypes))}", worst=math.inf)
    if np.isnan(np.where(np.isfinite(want), sigma, 1.0)).any():
        raise ArithmeticError(f"{tensor}: the predicted error is NaN where the truth is finite: a fault of npattn's own")
    off = units(got, want, sigma, rest)
    if not off.size:
        return Check(tensor, "ok", "empty", level="tight")
    index = tuple(map(int, np.unravel_index(off.argmax(), off.shape)))
    worst, rms = float(off[index]), float(np.sqrt(np.square(off).mean())) if np.isfinite(off.max()) else math.inf
    reached = next((name for name in LEVELS if accepts(name, off)), "")
    if not reached or level == "bounded":
        bound = det()
        reached = reached or ("bounded" if bound is not None and accepts("bounded", units(got, want, bound)) else "broken")
    enough = ("tight", "good", "bounded")
    if reached in enough[: enough.index(level) + 1]:
        return Check(tensor, "ok", "", rms, worst, index, reached)
    where = f"[{', '.join(map(str, index))}]"
    most, mean = (LEVELS["good"] if level == "bounded" else LEVELS[level])[::-1]
    bad = np.isinf(off) if np.isinf(worst) else off > (most if worst > most else mean)
    if np.isinf(worst):
        text = f"{tensor}{where} is {np.asarray(got, want.dtype)[index]:.6g}, expected {want[index]:.6g}"
    else:
        text = (
            f"{tensor}{where} is {np.asarray(got, want.dtype)[index]:.9g}, expected {want[index]:.9g}, off by {worst:.3g} sigma"
        )
        text += f" (rms {rms:.3g}; {reached})"
    return Check(
        tensor, "wrong", f"{text}; {places(letters, WORDS, bad)}", rms, worst, index, reached
    )


WORDS = {"B": "batch", "H": "heads", "G": "key heads", "L": "queries", "S": "keys", "T": "steps"}


# --- rules of other suites ------------------------------------------------------------------------------------------------


def _allclose(got: Array, want: Array, rtol: float, atol: float) -> bool:
    return bool(np.allclose(got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol, equal_nan=True))


def _largest(x: Array) -> float:
    return float(np.nanmax(np.abs(np.where(np.isfinite(x), x, 0.0)), initial=0.0))


def _flash(got: Array, want: Array, low: Array, name: str, storage: str = "") -> bool:
    """max |x - ref| <= 2 max |pt - ref| + 1e-5: twice the error of an eager implementation in the candidate's own precision."""
    return _same_pattern(got, want) and _largest(got - want) <= 2 * _largest(low - want) + 1e-5


def _torch(got: Array, want: Array, low: Array, name: str, storage: str = "") -> bool:
    """atol and rtol of the eager implementation's own error, times a factor of the tensor (PyTorch's test_transformers)."""
    factor = {"out": 4, "dq": 180, "dk": 16, "dv": 4}.get(name, 16)
    rtol, atol = _defaults(storage or low.dtype.name)
    with np.errstate(all="ignore"):
        relative = _largest((low - want) / np.where(want == 0, 1, want))
    return _allclose(got, want, factor * max(relative, rtol), factor * max(_largest(low - want), atol))


def _defaults(storage: str) -> tuple[float, float]:
    """torch.testing.assert_close's (rtol, atol)."""
    table = {"float64": (1e-7, 1e-7), "float32": (1.3e-6, 1e-5), "float16": (1e-3, 1e-5)}
    return table.get(storage, (1.6e-2, 1e-5))


def _same_pattern(got: Array, want: Array) -> bool:
    return bool(((got == want) | (np.isnan(got) & np.isnan(want)) | (np.isfinite(got) & np.isfinite(want))).all())


RULES: dict[str, Callable[..., bool]] = {
    "flash2x": _flash,
    "torch": _torch,
    "onnx": lambda got, want, low, name, storage="": _allclose(got, want, 1e-3, 1e-7),
    "allclose": lambda got, want, low, name, storage="": _allclose(got, want, *_defaults(storage or low.dtype.name)),
}
"""The acceptance rules of FlashAttention 2, PyTorch's attention tests, ONNX's backend tests and torch.testing.assert_close."""


# --- power ----------------------------------------------------------------------------------------------------------------


def neighbours(present: frozenset[str]) -> list[Change]:
    """The likely mistakes of a call with these facts: those that need one of them, and no size of a tile."""
    return [
        c for c in CHANGES.values()
        if c.needs <= present and (c.needs or c.stage in ("scale", "lse", "delta")) and not c.sized
    ]  # fmt: skip


def other_values(
    problem: Any, given: dict[str, Any], align: str, truth: Truth, base: list[Change]
) -> Iterator[tuple[str, dict[str, Array]]]:
    """What the likely mistakes would return."""
    if problem.op != "attention":
        for name in LAYER_NEIGHBOURS[problem.op]:
            with contextlib.suppress(*CANNOT):
                yield name, layer_mistakes.MISTAKES[problem.op][name](problem)
        return
    large = math.prod(problem.shape) > LARGE
    if not math.prod(problem.shape):
        return
    unchanged = run(problem, given, align, base)
    least = 16 if problem.dtype == np.float64 else 0  # these runs are in float64 themselves: less is their own rounding
    for change in neighbours(facts(problem, given))[: 6 if large else None]:
        with contextlib.suppress(*CANNOT):
            values = run(problem, given, align, [*base, change])
            if any(_moved(x, unchanged.get(t), truth.sigma.get(t), least) for t, x in values.items()):
                yield change.name, values


def _moved(a: Array, b: Array | None, sigma: Array | None, least: float) -> bool:
    """Whether a change has changed anything: by more than ``least`` sigma."""
    if b is None or sigma is None or a.shape != b.shape or a.shape != sigma.shape:
        return True
    return bool((units(a, b, np.maximum(sigma, 1e-300)) > least).any())


LAYER_NEIGHBOURS = {
    "multi_head": ["merged without a transpose", "scale of the model's width", "b_q forgotten", "mask ignored"],
    "rnn": ["initial state ignored", "w_h transposed", "lengths ignored", "not carried"],
    "softmax": ["mask ignored", "axis -2", "Delta 0"],
}  # fmt: skip


@quiet
def power(
    others: Iterable[tuple[str, dict[str, Array]]], truth: Truth, tested: list[str], level: str, planted: float = PLANTED
) -> dict[str, str]:
    """For each tensor what its judge could not tell from the truth, or nothing: zeros, a small error, likely mistakes."""
    scale = truth.det if level == "bounded" else truth.sigma

    def rejects(t: str, value: Array) -> bool:
        return value.shape != truth.values[t].shape or not accepts(level, units(value, truth.values[t], scale[t]))

    blind: dict[str, str] = {}
    for t in tested:
        want = truth.values[t]
        some = np.isfinite(want) & (want != 0)
        if not some.any():
            # Exactly 0, -inf or NaN by convention: anything else is rejected. Where rounding is allowed for, nothing is tested.
            if want.size and (scale[t][np.isfinite(want)] > 0).any():
                blind[t] = "the true value is 0"
            continue
        if not rejects(t, np.where(some, 0, want)):
            blind[t] = "zeros would pass"
        elif not rejects(t, np.where(some, want * (1 + planted), want)):
            blind[t] = f"a relative error of {planted:.2g} would pass"
    for name, values in others:
        same = [t for t in tested if t in values and values[t].shape == truth.values[t].shape]
        if any(t in tested and t not in same for t in values):
            continue  # another shape: rejected
        seen = {t: float(o.max()) for t in same if (o := units(values[t], truth.values[t], scale[t])).size}
        if not seen or max(seen.values()) < 1:
            continue  # the same here, within an honest rounding error
        if not any(rejects(t, values[t]) for t in seen):
            worst = max(seen, key=lambda t: seen[t])
            blind.setdefault(worst, f"{name!r} would pass")
    return blind


# --- one case -------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of calling a candidate once: its tensors, or why there are none."""

    values: dict[str, Any] = field(default_factory=dict)
    status: str = ""  # of all tensors that are not there
    text: str = ""
    missing: dict[str, str] = field(default_factory=dict)  # tensors that were not returned, and what is said of it


def call_forward(candidate: Candidate, problem: Problem) -> Outcome:
    """The outputs by name."""
    names = list(problem.outputs)
    given, missing = candidate.arguments(problem, candidate.forward)
    if missing:
        return Outcome(status="not supported", text=", ".join(missing))
    before = _bytes(problem, given)
    try:
        returned = candidate.run_forward(problem, given)
    except NotImplementedError as error:
        return Outcome(status="not supported", text=str(error) or "raises NotImplementedError")
    except (Exception, SystemExit) as error:
        return Outcome(status="wrong", text=f"raises {_said(error)}")
    if written := _written(before, _bytes(problem, given)):
        return Outcome(status="wrong", text=f"an input was modified: {written}")
    if isinstance(returned, tuple) and len(returned) <= len(names):
        values = dict(zip(names, returned, strict=False))
    else:
        values = {names[0]: returned}
    return Outcome(values, missing={n: f"{n} is not returned" for n in names if values.get(n) is None and n != names[0]})


def call_backward(candidate: Candidate, problem: Problem, values: dict[str, Any]) -> Outcome:
    """The gradients by name."""
    if candidate.backward is None:
        return Outcome(status="not given", text="backward not given")
    given, missing = candidate.arguments(problem, candidate.backward, backward=True)
    if missing:
        return Outcome(status="not supported", text=", ".join(missing))
    before = _bytes(problem, given, values)
    try:
        returned = candidate.run_backward(problem, given, values)
    except NotImplementedError as error:
        return Outcome(status="not supported", text=str(error) or "backward")
    except (Exception, SystemExit) as error:
        return Outcome(status="wrong", text=f"the backward raises {_said(error)}")
    if written := _written(before, _bytes(problem, given, values)):
        return Outcome(status="wrong", text=f"the backward modifies an input: {written}")
    if not isinstance(returned, dict):
        return Outcome(status="wrong", text=str(returned))
    optional = ("dbias", "dsink")
    missing_text = {t: f"{t} is not returned" for t in problem.gradients if returned.get(t) is None}
    present = {t: x for t, x in returned.items() if t in problem.gradients and x is not None}
    lost = {t: text for t, text in missing_text.items() if t in optional}
    wrong = {t: None for t in missing_text if t not in optional}
    return Outcome({**present, **wrong}, missing=lost)


def as_given(case: Any, seed: int, settings: Settings) -> tuple[Any, Precision]:
    """The problem of a case as a candidate sees it, and the class of precision that it is judged by."""
    problem = case.problem(seed)
    if settings.precision is None:
        return canonical(problem), of_dtype(problem.dtype)
    return canonical(problem.stored(settings.precision)), settings.precision.declared()


def examine(
    candidate: Candidate, case: Any, seed: int = 0, settings: Settings | None = None,
    diagnostician: Diagnostician | None = None,
) -> Result:  # fmt: skip
    """Run one case and judge all that the candidate returns for it."""
    settings = settings or Settings()
    problem, precision = as_given(case, seed, settings)
    result = Result(case.name, case.features, seed=seed)
    wanted = [*problem.outputs, *problem.gradients]

    def all_of(status: str, text: str) -> Result:
        result.checks.extend(Check(t, status, text) for t in wanted)
        return result

    if settings.precision is not None and np.dtype(case.dtype) == np.float64 and precision.dtype != np.float64:
        return all_of("not supported", f"float64 inputs, under {settings.precision.name}")
    reason = candidate.undefined(problem, case.features)
    if reason:
        return all_of("not supported", f"undefined by the convention {reason}")
    if problem.op == "attention" and problem.overflows(precision):
        return all_of("not supported", f"scores or dP overflow {precision.storage}")
    forward = call_forward(candidate, problem)
    if forward.status:
        result.checks.append(
            Check(wanted[0], forward.status, forward.text, worst=math.inf if forward.status == "wrong" else 0.0)
        )
        rest = "not given" if forward.status == "wrong" else forward.status
        text = "the forward is wrong before" if forward.status == "wrong" else forward.text
        result.checks.extend(Check(t, rest, text) for t in wanted[1:])
        return result
    returned = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in forward.values.items()}
    backward = call_backward(candidate, problem, forward.values)
    try:
        truth = candidate.truth(problem, precision)
    except NotImplementedError as error:  # a precision class that this op has no model of
        return all_of("not supported", str(error))
    if truth is None:
        return all_of("not supported", f"no dtype better than {problem.dtype} on this machine, and no mpmath")
    judged = {**returned, **backward.values}
    for t in wanted:
        outcome = forward if t in problem.outputs else backward
        if t in judged:
            dtypes = problem.dtypes(t, precision)
            det = (lambda t=t: truth.det[t]) if problem.op == "attention" else (lambda: None)
            if judged[t] is None:
                result.checks.append(Check(t, "wrong", f"{t} is not returned", worst=math.inf))
            elif t not in truth.values:
                result.checks.append(Check(t, "not supported", "undefined by the convention"))
            else:
                check = compare(t, judged[t], truth.values[t], truth.sigma[t], dtypes, settings.level, det, problem.letters(t),
                                truth.rest.get(t, 0.0))  # fmt: skip
                result.checks.append(check)
        elif t in outcome.missing:
            result.checks.append(Check(t, "not given", outcome.missing[t]))
        else:
            bad = outcome.status == "wrong" and t == problem.gradients[0]
            status = "wrong" if bad else "not given" if outcome.status == "wrong" else outcome.status
            result.checks.append(Check(t, status, outcome.text, worst=math.inf if bad else 0.0))
    return _more(candidate, problem, precision, truth, judged, result, settings, diagnostician)


def _more(
    candidate: Candidate, problem: Problem, precision: Precision, truth: Truth, judged: dict[str, Any], result: Result,
    settings: Settings, diagnostician: Diagnostician | None,
) -> Result:  # fmt: skip
    """What other rules say, whether the judge could have failed, and what a candidate that is wrong does instead."""
    checks = result.checks
    if settings.rules:
        checks = [_with_rules(c, problem, truth, judged, settings) for c in checks]
    given, _ = candidate.arguments(problem, candidate.forward)
    base = candidate.changes()
    if settings.power:
        tested = [c.tensor for c in checks if c.status == "ok" and c.text != "empty"]
        changed = other_values(problem, given, candidate.align, truth, base)
        blind = power(changed, truth, tested, settings.level, max(PLANTED, 16 * precision.coarsest))
        checks = [
            dataclasses.replace(c, status="no power", text=blind[c.tensor]) if c.status == "ok" and c.tensor in blind else c
            for c in checks
        ]
    explanations = []
    wrong = [c.tensor for c in checks if c.status == "wrong"]
    if diagnostician is not None and wrong:
        explanations = diagnostician.explain(problem, given, truth.sigma, judged, wrong, base)
        explanations = _or_state(candidate, problem, truth, explanations, settings.level)
    if diagnostician is not None and problem.op == "attention":
        diagnostician.saw(problem, given, truth.sigma, truth.values, judged, wrong)
    return dataclasses.replace(result, checks=checks, explanations=explanations)


KEPT = "holds when called again: state is kept between calls"


def _or_state(
    candidate: Candidate, problem: Any, truth: Truth, explanations: list[Explanation], level: str
) -> list[Explanation]:
    """Where there is no explanation: whether the same call holds when it is made again, after a call with other options."""
    unknown = {t for e in explanations if UNKNOWN in e.names for t in e.tensors}
    if not unknown or problem.op != "attention":
        return explanations
    other = dataclasses.replace(problem, q=-problem.q, parts=[], options={})
    forward = call_forward(candidate, other)
    call_backward(candidate, other, forward.values)
    forward = call_forward(candidate, problem)
    values = {**forward.values, **call_backward(candidate, problem, forward.values).values}
    for t in unknown:
        got, want = values.get(t), truth.values[t]
        if not isinstance(got, np.ndarray) or got.shape != want.shape or not np.issubdtype(got.dtype, np.floating):
            return explanations
        if not accepts("good" if level == "bounded" else level, units(got, want, truth.sigma[t])):
            return explanations
    return [dataclasses.replace(e, names=(KEPT,), where="") if UNKNOWN in e.names else e for e in explanations]


def _with_rules(c: Check, problem: Problem, truth: Truth, judged: dict[str, Any], settings: Settings) -> Check:
    rules = settings.rules
    if c.status not in ("ok", "wrong") or not isinstance(judged.get(c.tensor), np.ndarray) or problem.op != "attention":
        return c
    got, want = judged[c.tensor], truth.values[c.tensor]
    if got.shape != want.shape:
        return dataclasses.replace(c, rules=dict.fromkeys(rules, False))
    low, storage = _eager(problem, settings.precision)[c.tensor], settings.precision.storage if settings.precision else ""
    with np.errstate(all="ignore"):
        said = {name: RULES[name](got.astype(np.float64), want.astype(np.float64), low, c.tensor, storage) for name in rules}
    return dataclasses.replace(c, rules=said)


def _eager(problem: Problem, declared: Precision | None = None) -> dict[str, Array]:
    """What an eager implementation in the precision of the problem's inputs, or of the declared class, returns."""
    storage = declared.storage if declared and declared.storage != "float32" else problem.dtype.name
    eager = PRECISIONS.get(f"{storage}-M3") or (declared if declared and declared.dtype == problem.dtype else None)
    forward, backward = rounded(eager or PRECISIONS[problem.dtype.name])
    options = dict(problem.options)
    if problem.parts:
        options["mask"] = dense_mask(problem)
    out, lse = forward(problem.q, problem.k, problem.v, **options)
    grads = backward(problem.dout, problem.q, problem.k, problem.v, **options, dlse=problem.dlse)
    return {"out": out, "lse": lse, **{n: x for n, x in grads.items() if x is not None}}


def _bytes(problem: Any, *more: dict[str, Any]) -> dict[str, bytes]:
    """The contents of all arrays that a function is given, by name."""
    found: dict[str, bytes] = {}
    for name, x in [item for given in (problem.inputs, problem.cotangents, *more) for item in given.items()]:
        parts = x if isinstance(x, dict) else x._asdict() if hasattr(x, "_asdict") else {name: x}
        found |= {n: y.tobytes() for n, y in parts.items() if isinstance(y, np.ndarray)}
    return found


def _written(before: dict[str, bytes], after: dict[str, bytes]) -> str:
    return ", ".join(name for name, x in before.items() if after[name] != x)


def _said(error: BaseException) -> str:
    """An exception: what and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_line(error)}{where}"


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else ""


__all__ = ["LEVELS", "RULES", "Check", "Result", "Settings", "accepts", "compare", "examine", "power", "units"]
