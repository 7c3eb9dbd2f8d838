"""Whether what a candidate returns is right: the comparison, its levels, and whether it could have failed.

An error counts in sigma, what an honest implementation of the same precision is predicted to have in that very element. A
verdict counts only if the same judge rejects zeros, an error of 1e-3 and the likely mistakes on the same inputs: its power.
"""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npattn.ops.allowed import quiet
from npattn.ops.checks import Array, converted, kind
from npattn.verify.candidates import Candidate, canonical, said
from npattn.verify.cases import BY_NAME, Problem, Truth, dense_mask
from npattn.verify.diagnose import UNKNOWN, Diagnostician, Explanation, Listener, flat_of, places
from npattn.verify.errors import LEVELS, accepts, units
from npattn.verify.power import blind_spots
from npattn.verify.precision import PRECISIONS, Precision, of_dtype
from npattn.verify.rounded import rounded


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
    status: str  # "ok", "wrong", "no power", "refused" (NotImplementedError), "lost", "not supported", "not given"
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
    options: tuple[str, ...] = ()  # the keywords that its forward was given

    @property
    def status(self) -> str:
        statuses = {c.status for c in self.checks}
        for status in ("wrong", "ok", "no power", "refused", "lost", "not given"):
            if status in statuses:
                return status
        return "not supported"

    @property
    def partly(self) -> bool:
        """Whether some of it was not tested."""
        return any(c.status in ("refused", "not supported") for c in self.checks)

    @property
    def tested(self) -> list[Check]:
        return [c for c in self.checks if c.status in ("ok", "wrong")]


# --- one tensor -----------------------------------------------------------------------------------------------------------


@quiet
def compare(
    tensor: str, got: Any, want: Array, sigma: Array, dtypes: Iterable[Any], level: str = "good",
    det: Callable[[], Array | None] = lambda: None, letters: str = "", rest: Any = 0.0,
) -> Check:  # fmt: skip
    """One tensor against the truth, in units of sigma. NaN and inf have to be where the truth has them."""
    if not is_array(got):
        way = converted(tensor, got) or f": np.asarray({tensor})"
        return Check(tensor, "wrong", f"is {kind(got)}, expected a numpy.ndarray{way}", worst=math.inf)
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
    returned = _called("", lambda: candidate.run_forward(problem, given), problem, given)
    if isinstance(returned, Outcome):
        return returned
    if isinstance(returned, tuple) and len(returned) <= len(names):
        values = dict(zip(names, map(_plain, returned), strict=False))
    else:
        values = {names[0]: _plain(returned)}
    return Outcome(values, missing={n: f"{n} is not returned" for n in names if values.get(n) is None and n != names[0]})


def call_backward(candidate: Candidate, problem: Problem, values: dict[str, Any]) -> Outcome:
    """The gradients by name."""
    if candidate.backward is None:
        return Outcome(status="not given", text="backward not given")
    given, missing = candidate.arguments(problem, candidate.backward, backward=True)
    if missing:
        return Outcome(status="not supported", text=", ".join(missing))
    returned = _called("the backward ", lambda: candidate.run_backward(problem, given, values), problem, given, values)
    if isinstance(returned, Outcome):
        return returned
    if not isinstance(returned, dict):
        return Outcome(status="wrong", text=str(returned))
    optional = ("dbias", "dsink")
    missing_text = {t: f"{t} is not returned" for t in problem.gradients if returned.get(t) is None}
    present = {t: _plain(x) for t, x in returned.items() if t in problem.gradients and x is not None}
    lost = {t: text for t, text in missing_text.items() if t in optional}
    wrong = {t: None for t in missing_text if t not in optional}
    return Outcome({**present, **wrong}, missing=lost)


def _plain(x: Any) -> Any:
    """An array of a subclass as what it is beneath, so that nothing of the subclass runs while it is judged.

    A masked array has no numbers where it masks, and a matrix multiplies otherwise: they stay, and are refused as no array.
    """
    return np.ndarray.view(x, np.ndarray) if is_array(x) else x


def is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) and not isinstance(x, (np.ma.MaskedArray, np.matrix))


def _called(who: str, call: Callable[[], Any], problem: Any, *given: dict[str, Any]) -> Any:
    """What a candidate returns, or an Outcome where it refuses, raises, or writes into what it was given."""
    before = _marks(problem, *given)
    try:
        with np.errstate():  # what it sets ends here
            returned = call()
    except NotImplementedError as error:
        return Outcome(status="refused", text=said(error) or f"{who}raises NotImplementedError")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit and GeneratorExit are answers of a candidate, too
        return Outcome(status="wrong", text=f"{who}raises {_said(error)}")
    if written := _written(before, _marks(problem, *given)):
        what = "the backward modifies an input" if who else "an input was modified"
        return Outcome(status="wrong", text=f"{what}: {written}")
    return returned


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
    theirs, _ = as_given(case, seed, settings)  # the same once more: whatever becomes of it, ours stays as it is
    result = Result(case.name, case.features, seed=seed, options=tuple(candidate.arguments(theirs, candidate.forward)[0]))
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
    forward = call_forward(candidate, theirs)
    if forward.status:
        result.checks.append(
            Check(wanted[0], forward.status, forward.text, worst=math.inf if forward.status == "wrong" else 0.0)
        )
        rest = "not given" if forward.status == "wrong" else forward.status
        text = WRONG_BEFORE if forward.status == "wrong" else forward.text
        result.checks.extend(Check(t, rest, text) for t in wanted[1:])
        return result
    returned = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in forward.values.items()}
    backward = call_backward(candidate, theirs, forward.values)
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
        blind = blind_spots(problem, given, candidate.align, truth, tested, settings.level, precision, base)
        checks = [
            dataclasses.replace(c, status="no power", text=blind[c.tensor]) if c.status == "ok" and c.tensor in blind else c
            for c in checks
        ]
    explanations = []
    judged = {t: x for t, x in judged.items() if is_array(x) and x.dtype.kind == "f"}  # of others all is said
    wrong = [c.tensor for c in checks if c.status == "wrong" and not _only_dtype(c.tensor, problem, precision, truth, judged)]
    if diagnostician is not None and wrong:
        _find_evidence(candidate, diagnostician, problem, truth, judged, wrong, settings)
        explanations = diagnostician.explain(problem, given, truth.sigma, judged, wrong, base)
        explanations = _or_state(candidate, problem, truth, explanations, settings.level)
    if diagnostician is not None and problem.op == "attention":
        diagnostician.saw(problem, given, truth.sigma, truth.values, judged, wrong)
    return dataclasses.replace(result, checks=checks, explanations=explanations)


EVIDENCE = ("plain", "whole tiles, D = 64")


def _find_evidence(
    candidate: Candidate, diagnostician: Diagnostician, problem: Any, truth: Truth, judged: dict[str, Any], wrong: list[str],
    settings: Settings,
) -> None:  # fmt: skip
    """For what is NaN, or one number, everywhere: a case that holds, without which it has no name."""
    there = [t for t in wrong if t in judged and t in truth.values and judged[t].shape == truth.values[t].shape]
    sought = problem.op != "attention" or isinstance(diagnostician, Listener) or diagnostician.sought
    if sought or not flat_of(there, judged, truth.values):
        return
    diagnostician.sought, before = True, (diagnostician.earlier, diagnostician.last)
    for name in EVIDENCE:
        if not diagnostician.right:
            examine(candidate, BY_NAME[name], 0, dataclasses.replace(settings, power=False, rules=()), Listener(diagnostician))
    diagnostician.earlier, diagnostician.last = before  # the call before this one is another


@quiet
def _only_dtype(t: str, problem: Any, precision: Precision, truth: Truth, judged: dict[str, Any]) -> bool:
    """Whether nothing but its dtype is wrong of a tensor, and what that dtype rounds: no other name is looked for."""
    x, want = judged.get(t), truth.values.get(t)
    if not isinstance(x, np.ndarray) or want is None or x.shape != want.shape or x.dtype.kind != "f":
        return False
    if x.dtype in [np.dtype(d) for d in problem.dtypes(t, precision)]:
        return False
    unit = np.finfo(x.dtype).eps * np.where(np.isfinite(want), np.abs(want), 0)
    return accepts("good", units(x, want, np.maximum(truth.sigma[t], unit)))


WRONG_BEFORE = "the forward is wrong before"
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
    number = getattr(getattr(judged.get(c.tensor), "dtype", None), "kind", "") == "f"
    if c.status not in ("ok", "wrong") or not number or problem.op != "attention":
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


def _marks(problem: Any, *more: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """All that a function could change of the arrays that it is given, by name."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, x in [item for given in (problem.inputs, problem.cotangents, *more) for item in given.items()]:
        parts = x if isinstance(x, dict) else x._asdict() if hasattr(x, "_asdict") else {name: x}
        found |= {n: (y.shape, y.dtype, y.flags.writeable, y.strides, y.tobytes())
                  for n, y in parts.items() if isinstance(y, np.ndarray)}  # fmt: skip
    return found


MARKS = ("has another shape", "has another dtype", "can be written or not, as it could not before", "has other strides", "")


def _written(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> str:
    """Which arrays are not what they were, and in what."""
    found = []
    for name, old in before.items():
        what = next((text for text, a, b in zip(MARKS, old, after[name], strict=True) if a != b), None)
        if what is not None:
            found.append(f"{name} {what}".strip())
    return ", ".join(found)


def _said(error: BaseException) -> str:
    """An exception: what and where."""
    try:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        return f"{type(error).__name__}: {said(error)}{where}"
    except BaseException:
        return "what cannot be described"


__all__ = ["LEVELS", "RULES", "Check", "Result", "Settings", "accepts", "compare", "examine", "units"]
