"""Whether what a candidate returns is right: the truth, the comparison, and what is said of a difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from npattn._checks import Array, kind
from npattn._pairs import quiet
from npattn.attention import attention_backward, attention_forward
from npattn.tolerances import GOOD_MAX, GOOD_RMS
from npattn.verify.candidates import Candidate, canonical, keywords
from npattn.verify.cases import CASES, Case, Problem
from npattn.verify.errors import Errors, predict

GRADIENTS = ("dq", "dk", "dv", "dbias", "dsink")


@dataclass(frozen=True)
class Check:
    """One tensor of one case: right, wrong, or not tested and why."""

    tensor: str
    status: str  # "ok", "wrong", "not supported" or "not given"
    text: str = ""
    rms: float = 0.0  # of error / sigma
    worst: float = 0.0  # largest error / sigma
    index: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """All checks of one case."""

    case: str
    features: list[str]
    checks: list[Check] = field(default_factory=list)

    @property
    def status(self) -> str:
        statuses = {c.status for c in self.checks}
        for status in ("wrong", "ok", "not given"):
            if status in statuses:
                return status
        return "not supported"

    @property
    def tested(self) -> list[Check]:
        return [c for c in self.checks if c.status in ("ok", "wrong")]


@dataclass(frozen=True)
class Truth:
    """The reference's values in a precision above the candidate's, and the error that is predicted for the candidate's."""

    out: Array
    lse: Array
    grads: dict[str, Array]
    sigma: Errors


def better(dtype: np.dtype[Any]) -> Any:
    """A dtype in which the truth about ``dtype`` can be computed, or None where this machine has none."""
    if dtype == np.float32:
        return np.float64
    return np.longdouble if np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant else None


@quiet
def truth(problem: Problem, dtype: Any = None) -> Truth:
    """What the dense reference says of a problem, computed in ``dtype`` (`better` unless given)."""
    p = problem.astype(better(problem.q.dtype) if dtype is None else dtype)
    (out, lse), cache = attention_forward(p.q, p.k, p.v, **p.arguments, return_lse=True)
    g = attention_backward(p.dout, cache, p.dlse)
    grads = dict(zip(GRADIENTS, (g.q, g.k, g.v, g.bias, g.sink), strict=True))
    sigma = predict(cache, out, p.dout, p.dlse, g, dtype=problem.q.dtype)
    return Truth(out, lse, {name: x for name, x in grads.items() if x is not None}, sigma)


@quiet
def compare(tensor: str, got: Any, want: Array, sigma: Array, dtype: Any) -> Check:
    """One tensor against the truth, in units of sigma. NaN and inf have to be where the truth has them."""
    if not isinstance(got, np.ndarray):
        return Check(tensor, "wrong", f"is {kind(got)}, expected a numpy.ndarray: np.asarray(x)", worst=math.inf)
    if got.shape != want.shape:
        return Check(tensor, "wrong", f"has shape {got.shape}, expected {want.shape}", worst=math.inf)
    if got.dtype != dtype:
        return Check(tensor, "wrong", f"has dtype {got.dtype}, expected {dtype}", worst=math.inf)
    x, y = np.asarray(got, want.dtype), want
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    finite = np.isfinite(x) & np.isfinite(y)
    if np.isnan(np.where(finite, sigma, 1.0)).any():
        raise ArithmeticError(f"{tensor}: the predicted error is NaN where the truth is finite: a fault of npattn's own")
    units = np.where(same, 0.0, np.where(finite, np.abs(x - y) / sigma, np.inf)).astype(np.float64)
    if not units.size:
        return Check(tensor, "ok", "empty")
    index = tuple(map(int, np.unravel_index(units.argmax(), units.shape)))
    worst, rms = float(units[index]), float(np.sqrt(np.square(units).mean()))
    if worst <= GOOD_MAX and rms <= GOOD_RMS:
        return Check(tensor, "ok", "", rms, worst, index)
    where = f"[{', '.join(map(str, index))}]"
    off = np.isinf(units) if np.isinf(worst) else units > (GOOD_MAX if worst > GOOD_MAX else GOOD_RMS)
    if np.isinf(worst) and not finite[index]:
        text = f"{tensor}{where} is {x[index]:.6g}, expected {y[index]:.6g}"
    else:
        text = f"{tensor}{where} is {x[index]:.9g}, expected {y[index]:.9g}, off by {worst:.3g} sigma (rms {rms:.3g})"
    return Check(tensor, "wrong", f"{text}; {_places(tensor, off)}", rms, worst, index)


LETTERS = {"out": "BHLE", "lse": "BHL", "dq": "BHLD", "dk": "BGSD", "dv": "BGSE", "dbias": "BHLS", "dsink": "H"}
WORDS = {"B": "batch", "H": "heads", "G": "key heads", "L": "queries", "S": "keys"}


def _places(tensor: str, off: Array) -> str:
    """Where in a tensor the elements lie that are off."""
    parts = [f"{off.sum()} of {off.size} elements"]
    for axis, letter in enumerate(LETTERS[tensor][-off.ndim :]):
        hit = np.flatnonzero(off.any(tuple(a for a in range(off.ndim) if a != axis)))
        if 0 < len(hit) < off.shape[axis] and letter in WORDS:
            word = WORDS[letter]
            shown = ", ".join(map(str, hit[:6])) + (", ..." if len(hit) > 6 else "")
            parts.append(f"{word} {shown}")
    return "in " + "; ".join(parts)


def examine(candidate: Candidate, case: Case, seed: int = 0) -> Result:
    """Run one case and judge all that the candidate returns for it."""
    problem = canonical(case.problem(seed))
    result = Result(case.name, case.features)
    wanted = ["out", "lse", "dq", "dk", "dv", *(f"d{n}" for n in ("bias", "sink") if n in problem.options)]

    def rest(status: str, text: str, first: int = 0) -> Result:
        result.checks.extend(Check(t, status, text) for t in wanted[first:])
        return result

    if better(problem.q.dtype) is None:
        return rest("not supported", f"no dtype better than {problem.q.dtype} on this machine")
    given, missing = candidate.arguments(problem, candidate.forward)
    if missing:
        return rest("not supported", ", ".join(missing))
    before = _bytes(problem, given)
    try:
        returned = candidate.forward(problem.q, problem.k, problem.v, **given)
    except NotImplementedError as error:
        return rest("not supported", str(error) or ", ".join(case.features))
    except (Exception, SystemExit) as error:
        result.checks.append(Check("out", "wrong", f"raises {type(error).__name__}: {_line(error)}", worst=math.inf))
        return rest("not given", "the forward raises", 1)
    if _bytes(problem, given) != before:
        result.checks.append(Check("out", "wrong", "an input was modified", worst=math.inf))
        return rest("not given", "the forward modifies its inputs", 1)
    want, dtype = truth(problem), problem.q.dtype
    both = isinstance(returned, tuple) and len(returned) == 2
    out, lse = returned if both else (returned, None)
    result.checks.append(compare("out", out, want.out, want.sigma.out, dtype))
    if both:
        result.checks.append(compare("lse", lse, want.lse, want.sigma.lse, dtype))
    else:
        result.checks.append(Check("lse", "not given", "lse is not returned"))
    result.checks.extend(_examine_backward(candidate, problem, want, out, lse, wanted[2:]))
    return result


def _examine_backward(
    candidate: Candidate, problem: Problem, want: Truth, out: Any, lse: Any, wanted: list[str]
) -> Iterable[Check]:
    backward = candidate.backward
    if backward is None:
        return [Check(t, "not given", "backward not given") for t in wanted]
    given, missing = candidate.arguments(problem, backward)
    takes = keywords(backward)
    if problem.dlse is not None:
        missing += [] if "dlse" in takes else ["dlse"]
        given["dlse"] = problem.dlse
    if missing:
        return [Check(t, "not supported", ", ".join(missing)) for t in wanted]
    given |= {name: x for name, x in (("out", out), ("lse", lse)) if name in takes}
    before = _bytes(problem, given)
    try:
        returned = backward(problem.dout, problem.q, problem.k, problem.v, **given)
    except NotImplementedError as error:
        return [Check(t, "not supported", str(error) or "backward") for t in wanted]
    except (Exception, SystemExit) as error:
        return _all(wanted, f"the backward raises {type(error).__name__}: {_line(error)}")
    if _bytes(problem, given) != before:
        return _all(wanted, "the backward modifies an input")
    try:
        named = _named(returned)
    except TypeError as error:
        return _all(wanted, str(error))
    checks = []
    for tensor in wanted:
        if named.get(tensor) is None:
            status = "not given" if tensor in ("dbias", "dsink") else "wrong"
            checks.append(Check(tensor, status, f"{tensor} is not returned"))
        else:
            sigma = getattr(want.sigma, tensor[1:])
            checks.append(compare(tensor, named[tensor], want.grads[tensor], sigma, problem.q.dtype))
    return checks


def _all(wanted: list[str], text: str) -> list[Check]:
    """The first of the gradients is wrong for a reason that is all of theirs."""
    return [Check(wanted[0], "wrong", text, worst=math.inf)] + [Check(t, "not given", text) for t in wanted[1:]]


def _named(returned: Any) -> dict[str, Any]:
    """Gradients as a mapping from dq, dk ...; a tuple is (dq, dk, dv)."""
    if hasattr(returned, "_asdict"):
        returned = returned._asdict()
    if isinstance(returned, dict):
        return {n if n in GRADIENTS else f"d{n}": x for n, x in returned.items()}
    if isinstance(returned, (tuple, list)) and len(returned) == 3:
        return dict(zip(GRADIENTS, returned, strict=False))
    raise TypeError(f"the backward returns a {type(returned).__name__}, expected (dq, dk, dv) or a mapping with these names")


def _bytes(problem: Problem, given: dict[str, Any]) -> list[bytes]:
    arrays = [problem.q, problem.k, problem.v, problem.dout, *given.values()]
    return [x.tobytes() for x in arrays if isinstance(x, np.ndarray)]


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else ""


@dataclass(frozen=True)
class Report:
    """What was found out about one candidate."""

    candidate: str
    results: list[Result]

    @property
    def wrong(self) -> list[Result]:
        return [r for r in self.results if r.status == "wrong"]

    @property
    def tested(self) -> int:
        return sum(len(r.tested) for r in self.results)

    @property
    def total(self) -> int:
        return sum(len(r.checks) for r in self.results)

    def features(self) -> dict[str, list[Result]]:
        """The results by feature; the gradients and lse are features of their own."""
        found: dict[str, list[Result]] = {}
        for r in self.results:
            for feature in r.features:
                found.setdefault(feature, []).append(r)
            for name, tensors in {"lse": ["lse"], "backward": GRADIENTS, "dbias": ["dbias"], "dsink": ["dsink"]}.items():
                own = [c for c in r.checks if c.tensor in tensors]
                if own:
                    found.setdefault(name, []).append(Result(r.case, [name], own))
        return found

    def untested(self, features: Iterable[str]) -> list[str]:
        """Those of the features for which nothing was tested."""
        found = self.features()
        return [f for f in features if not any(r.tested for r in found.get(f, []))]

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is null."""

        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: plain(y) for name, y in x.items()}
            if isinstance(x, (list, tuple)):
                return [plain(y) for y in x]
            return None if isinstance(x, float) and not math.isfinite(x) else x

        results = [{**plain(asdict(r)), "status": r.status} for r in self.results]
        return {"candidate": self.candidate, "tested": self.tested, "total": self.total, "results": results}


def verify(candidate: Candidate, cases: Iterable[Case] = CASES, *, stop: bool = False) -> Iterator[Result]:
    """Examine the candidate case by case; with ``stop``, no further than the first that is wrong."""
    for case in cases:
        result = examine(candidate, case)
        yield result
        if stop and result.status == "wrong":
            return


def check(
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    require: Iterable[str] = (),
    align: str = "top_left",
) -> Report:
    """Verify a function of yours; raises AssertionError with what is wrong, or where nothing (of ``require``) was tested.

    >>> from npattn import attention
    >>> check(attention, require=["causal", "grouped heads"]).wrong
    []
    """
    report = Report(getattr(forward, "__name__", str(forward)), list(verify(Candidate("candidate", forward, backward, align))))
    lines = [f"{r.case}: {c.tensor}: {c.text}" for r in report.wrong for c in r.checks if c.status == "wrong"]
    if lines:
        more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise AssertionError("\n".join([f"{report.candidate} falls short in {len(report.wrong)} cases:", *lines[:10], *more]))
    untested = report.untested(require) if report.tested else ["anything"]
    if untested:
        raise AssertionError(f"{report.candidate}: not tested: {', '.join(untested)}")
    return report
