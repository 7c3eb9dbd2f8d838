"""Whether what a candidate returns is right: the comparison, its levels, and whether it could have failed.

Errors are measured in sigma: the error that is predicted for an honest implementation of the same precision in that element. A
verdict counts only if the judge has power: on the same inputs it must reject zeros, an error of 1e-3 and the likely mistakes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npattn.ops.allowed import quiet
from npattn.ops.checks import Array, conversion_hint, kind
from npattn.tolerances import GOOD_MAX
from npattn.verify.candidate import Candidate, call_backward, call_forward, is_array
from npattn.verify.explain import Diagnostician, Listener, places
from npattn.verify.op import Problem, Truth
from npattn.verify.power import blind_spots
from npattn.verify.precision import Precision, of_dtype
from npattn.verify.rounding import LEVELS, accepts, units
from npattn.verify.rules import accepted
from npattn.verify.search import UNKNOWN, Explanation, constant_tensors
from npattn.verify.space import Drawn


@dataclass(frozen=True)
class Settings:
    """What is asked of a candidate."""

    level: str = "good"  # "tight", "good" or "bounded"
    precision: Precision | None = None  # the declared class; None: the class of the inputs' dtype
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
    level: str = ""  # the strictest level that it reaches: "tight", "good", "bounded" or "broken"
    rules: dict[str, bool] = field(default_factory=dict)  # by name of the rule: would the other suite accept it?


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
    det: Callable[[], Array | None] = lambda: None, letters: str = "", remainder: Any = 0.0,
) -> Check:  # fmt: skip
    """Compare one tensor with the truth, in units of sigma. NaN and inf have to be where the truth has them."""
    if not is_array(got):
        way = conversion_hint(tensor, got) or f": np.asarray({tensor})"
        return Check(tensor, "wrong", f"is {kind(got)}, expected a numpy.ndarray{way}", worst=math.inf)
    if got.shape != want.shape:
        return Check(tensor, "wrong", f"has shape {got.shape}, expected {want.shape}", worst=math.inf)
    dtypes = [np.dtype(d) for d in dtypes]
    if got.dtype not in dtypes:
        return Check(tensor, "wrong", f"has dtype {got.dtype}, expected {' or '.join(map(str, dtypes))}", worst=math.inf)
    if np.isnan(np.where(np.isfinite(want), sigma, 1.0)).any():
        raise ArithmeticError(f"{tensor}: the predicted error is NaN where the truth is finite: a fault of npattn's own")
    off = units(got, want, sigma, remainder)
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
    where = f"[{', '.join(map(str, index))}]" if index else ""
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
        tensor, "wrong", f"{text}; {places(letters, AXIS_WORDS, bad)}", rms, worst, index, reached
    )


AXIS_WORDS = {"B": "batch", "H": "heads", "G": "key heads", "L": "queries", "S": "keys", "T": "steps", "D": "columns",
              "E": "columns"}  # fmt: skip


# --- one case -------------------------------------------------------------------------------------------------------------


_last: dict[tuple[str, int], Problem] = {}  # the problem that was drawn last


def _drawn(case: Any, seed: int) -> Problem:
    """A new copy of the problem of a case. Three to five are asked for, one after the other, and drawing it costs more."""
    key = (f"{case.op}: {case!r}", seed)
    if key not in _last:
        _last.clear()
        _last[key] = case.problem(seed)
    return copy.deepcopy(_last[key], {id(_last[key].op): _last[key].op})


def as_given(case: Any, seed: int, settings: Settings) -> tuple[Any, Precision]:
    """The problem of a case as it is given to a candidate, and the class of precision by which it is judged."""
    problem, place = _drawn(case, seed), case.place if isinstance(case, Drawn) else lambda x: x
    if settings.precision is None:
        return place(problem.op.canonical(problem)), of_dtype(problem.dtype)
    return place(problem.op.canonical(problem.stored(settings.precision))), settings.precision.declared()


def examine(
    candidate: Candidate, case: Any, seed: int = 0, settings: Settings | None = None,
    diagnostician: Diagnostician | None = None,
) -> Result:  # fmt: skip
    """Run one case and judge all that the candidate returns for it.

    A run draws hundreds of cases, and in some all errors of a tensor are one error, as where one query sees one key. By chance
    one in 300 of these is above the limit. So a case that was drawn, and is wrong by little, is drawn with two other seeds: a
    mistake comes again in one of them.
    """
    found = _examine(candidate, case, seed, settings or Settings(), diagnostician)
    wrong = [c.worst for c in found.checks if c.status == "wrong"]
    if not isinstance(case, Drawn) or not wrong or max(wrong) > 2 * GOOD_MAX:
        return found
    others = [_examine(candidate, case, seed + n, settings or Settings(), diagnostician) for n in (1, 2)]
    return found if any(other.status == "wrong" for other in others) else others[0]


def _examine(
    candidate: Candidate, case: Any, seed: int, settings: Settings, diagnostician: Diagnostician | None
) -> Result:
    problem, precision = as_given(case, seed, settings)
    theirs, _ = as_given(case, seed, settings)  # a second copy: the candidate may write into it
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
    reason = problem.op.undefined(problem, precision)
    if reason:
        return all_of("not supported", reason)
    forward = call_forward(candidate, theirs)
    if forward.status:
        result.checks.append(
            Check(wanted[0], forward.status, forward.text, worst=math.inf if forward.status == "wrong" else 0.0)
        )
        of_others = "not given" if forward.status == "wrong" else forward.status
        text = WRONG_BEFORE if forward.status == "wrong" else forward.text
        result.checks.extend(Check(t, of_others, text) for t in wanted[1:])
        return result
    returned = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in forward.values.items()}
    backward = call_backward(candidate, theirs, forward.values)
    truth = candidate.truth(problem, precision)
    if truth is None:
        return all_of("not supported", f"no dtype better than {problem.dtype} on this machine, and no mpmath")
    judged = {**returned, **backward.values}
    for t in wanted:
        outcome = forward if t in problem.outputs else backward
        if t in judged:
            dtypes = problem.dtypes(t, precision)
            if judged[t] is None:
                result.checks.append(Check(t, "wrong", f"{t} is not returned", worst=math.inf))
            elif t not in truth.values:
                result.checks.append(Check(t, "not supported", "undefined by the convention"))
            else:
                det = functools.partial(_bound_of, truth, t)
                check = compare(t, judged[t], truth.values[t], truth.sigma[t], dtypes, settings.level, det,
                                problem.op.axes.get(t, ""), truth.remainder.get(t, 0.0))  # fmt: skip
                result.checks.append(check)
        elif t in outcome.missing:
            result.checks.append(Check(t, "not given", outcome.missing[t]))
        else:
            bad = outcome.status == "wrong" and t == problem.gradients[0]
            status = "wrong" if bad else "not given" if outcome.status == "wrong" else outcome.status
            result.checks.append(Check(t, status, outcome.text, worst=math.inf if bad else 0.0))
    likely = not isinstance(case, Drawn)  # what all mistakes do costs as much as all else: it is known of the named cases
    return _add_findings(candidate, problem, precision, truth, judged, result, settings, diagnostician, likely)


def _bound_of(truth: Truth, tensor: str) -> Array | None:
    return truth.det.get(tensor)


def _add_findings(
    candidate: Candidate, problem: Problem, precision: Precision, truth: Truth, judged: dict[str, Any], result: Result,
    settings: Settings, diagnostician: Diagnostician | None, likely: bool,
) -> Result:  # fmt: skip
    """Add the rules of other suites, the judge's power, and the explanations of what is wrong."""
    checks = result.checks
    if settings.rules:
        theirs = accepted(settings.rules, problem, truth.values, judged, settings.precision)
        checks = [dataclasses.replace(c, rules=theirs.get(c.tensor, {})) if c.status in ("ok", "wrong") else c for c in checks]
    given, _ = candidate.arguments(problem, candidate.forward)
    base = candidate.changes()
    if settings.power:
        tested = [c.tensor for c in checks if c.status == "ok" and c.text != "empty"]
        blind = blind_spots(problem, given, candidate.align, truth, tested, settings.level, precision, base, likely)
        checks = [
            dataclasses.replace(c, status="no power", text=blind[c.tensor]) if c.status == "ok" and c.tensor in blind else c
            for c in checks
        ]
    explanations = []
    judged = {t: x for t, x in judged.items() if is_array(x) and x.dtype.kind == "f"}  # others are explained already
    wrong = [c.tensor for c in checks if c.status == "wrong"]
    wrong = [t for t in wrong if not _wrong_only_in_dtype(t, problem, precision, truth, judged)]
    if diagnostician is not None and wrong:
        _find_evidence(candidate, diagnostician, problem, truth, judged, wrong, settings)
        explanations = diagnostician.explain(problem, given, truth.sigma, judged, wrong, base)
        explanations = _explain_by_state(candidate, problem, truth, explanations, settings.level)
    if diagnostician is not None:
        diagnostician.saw(problem, given, truth.sigma, truth.values, judged, wrong)
    return dataclasses.replace(result, checks=checks, explanations=explanations)


def _find_evidence(
    candidate: Candidate, diagnostician: Diagnostician, problem: Any, truth: Truth, judged: dict[str, Any], wrong: list[str],
    settings: Settings,
) -> None:  # fmt: skip
    """If a tensor is NaN or one number everywhere, look for a right case: without one no explanation of it is trusted."""
    there = [t for t in wrong if t in judged and t in truth.values and judged[t].shape == truth.values[t].shape]
    sought = isinstance(diagnostician, Listener) or diagnostician.sought
    if sought or not constant_tensors(there, judged, truth.values, problem.outputs):
        return
    diagnostician.sought, before = True, (diagnostician.earlier, diagnostician.returned)
    for name in problem.op.evidence:
        if not diagnostician.right_cases:
            settings = dataclasses.replace(settings, power=False, rules=())
            examine(candidate, problem.op.by_name[name], 0, settings, Listener(diagnostician))
    diagnostician.earlier, diagnostician.returned = before  # as if these calls had not been made


@quiet
def _wrong_only_in_dtype(t: str, problem: Any, precision: Precision, truth: Truth, judged: dict[str, Any]) -> bool:
    """Whether a tensor is wrong only in its dtype and by the rounding to that dtype. Then no explanation is looked for."""
    x, want = judged.get(t), truth.values.get(t)
    if not isinstance(x, np.ndarray) or want is None or x.shape != want.shape or x.dtype.kind != "f":
        return False
    if x.dtype in [np.dtype(d) for d in problem.dtypes(t, precision)]:
        return False
    unit = np.finfo(x.dtype).eps * np.where(np.isfinite(want), np.abs(want), 0)
    return accepts("good", units(x, want, np.maximum(truth.sigma[t], unit)))


WRONG_BEFORE = "the forward is wrong before"
STATE_KEPT = "holds when called again: state is kept between calls"


def _explain_by_state(
    candidate: Candidate, problem: Problem, truth: Truth, explanations: list[Explanation], level: str
) -> list[Explanation]:
    """If there is no explanation: is the result right when the call is repeated after a call with other options?"""
    unknown = {t for e in explanations if UNKNOWN in e.names for t in e.tensors}
    if not unknown:
        return explanations
    other = problem.op.another_call(problem)
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
    return [dataclasses.replace(e, names=(STATE_KEPT,), where="") if UNKNOWN in e.names else e for e in explanations]


__all__ = ["LEVELS", "Check", "Result", "Settings", "accepts", "compare", "examine", "units"]
