"""Verification as a whole: all cases of a candidate, what is expected to fail, and the report."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import npattn
from npattn.verify import layers
from npattn.verify.candidates import (
    CANONICAL,
    OPS,
    OWN,
    OWN_KEYWORDS,
    Candidate,
    CandidateError,
    built_in,
    canonical,
    keywords,
    library_of,
    load,
)
from npattn.verify.cases import CASES
from npattn.verify.conditions import CONDITIONS, examine_conditions
from npattn.verify.conventions import Convention, parse
from npattn.verify.diagnose import Diagnostician
from npattn.verify.judge import LEVELS, RULES, Check, Result, Settings, call_forward, examine
from npattn.verify.precision import PRECISIONS, Precision, round_to

GRADIENTS = ("dq", "dk", "dv", "dbias", "dsink")
CALLS = {
    "attention": "forward(q, k, v, *, mask, ...) and backward(dout, q, k, v, *, mask, ..., out, lse, dlse)",
    "multi_head": "forward(x_q, x_k, x_v, params, *, num_heads, ...) and backward(dout, x_q, x_k, x_v, params, *, ...)",
    "rnn": "forward(x, h0, params, *, lengths, ...) and backward(dh, x, h0, params, *, lengths, ..., dh_last)",
    "softmax": "forward(scores, *, mask) and backward(dweights, scores, *, mask)",
}
WANTS_TENSORS = (
    "axes don't match array", "must be Tensor", "'numpy.ndarray' object has no attribute", "'int' object is not callable",
    "not numpy.ndarray", "expected Tensor",
)  # fmt: skip
"""What a function says that was written for tensors and got arrays: x.transpose(1, 2), x.size(0), a call of the library."""
CASES_OF: dict[str, list[Any]] = {"attention": CASES, **layers.CASES}


LEAST_SHARE = 1 / 3
"""Of the cases that its signature takes, so many a candidate has to take: the backward too, where one is given.

Of the built-in candidates all take four fifths but two, which are for one kind of call alone: gpt-oss' attention, which always
has a sink, and the fast path of torch's layer. What takes less is a narrower thing than its signature says.
"""


@dataclass(frozen=True)
class Facts:
    """What is known of a candidate before it is called."""

    candidate: str
    op: str = "attention"
    options: tuple[str, ...] = ()  # the keywords of its forward that verify gives values to
    strangers: tuple[str, ...] = ()  # see `Candidate.strangers`
    library: str = ""  # of whose tensors its module knows
    backward: bool = False  # whether there is one

    @classmethod
    def of(cls, candidate: Candidate) -> Facts:
        known = (*CANONICAL, *OWN_KEYWORDS) if candidate.op == "attention" else layers.KEYWORDS[candidate.op]
        options = tuple(sorted(keywords(candidate.forward) & set(known)))
        library, backward = library_of(candidate.forward), candidate.backward is not None
        return cls(candidate.name, candidate.op, options, tuple(candidate.strangers), library, backward)


@dataclass(frozen=True)
class Report:
    """What was found out about one candidate."""

    candidate: str
    results: list[Result]
    op: str = "attention"
    level: str = "good"
    precision: str = ""  # the declared class
    strangers: tuple[str, ...] = ()  # this and the next three: see `Facts`
    fits: str = ""  # the class that the errors fit best, where it is another
    rules: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    library: str = ""
    backward: bool = False
    asked: int = 0  # how many results there would have been
    interrupted: bool = False

    @property
    def wrong(self) -> list[Result]:
        """What is wrong, and not expected to be."""
        return [r for r in self.results if r.status == "wrong" and not r.expected]

    @property
    def unexpected(self) -> list[Result]:
        """What was expected to fail and holds, all of it."""
        return [r for r in self.results if r.expected and r.status == "ok" and not r.partly]

    @property
    def unsettled(self) -> list[Result]:
        """What was expected to fail and holds in a part: the failure may lie in what was not tested."""
        return [r for r in self.results if r.expected and r.partly and r.status != "wrong"]

    @property
    def passed(self) -> bool:
        return bool(self.tested) and not (self.wrong or self.unexpected or self.too_little or self.interrupted)

    def shares(self) -> dict[str, tuple[int, int]]:
        """How many cases were tested, of those that the signature takes: by the forward and, if there is one, the backward."""
        found = dict.fromkeys(("forward", "backward")[:1 + self.backward], (0, 0))
        for side, r in itertools.product(found, self.results):
            own = {c.status for c in r.checks if c.tensor not in CONDITIONS and (c.tensor[0] == "d") == (side == "backward")}
            tested = bool(own & {"ok", "wrong", "no power"})
            found[side] = found[side][0] + tested, found[side][1] + (tested or bool(own & {"refused", "lost"}))
        return found

    @property
    def too_little(self) -> bool:
        """Whether the verdict says little of what the signature claims: of one case alone it is not asked to.

        So much was refused, or is lost; or all that was tested is expected to fail.
        """
        if len({r.case for r in self.results}) < 2:
            return False
        none_holds = bool(self.tested) and not any(c.status == "ok" for r in self.results for c in r.checks)
        return none_holds or any(tested < LEAST_SHARE * claimed for tested, claimed in self.shares().values())

    @property
    def little(self) -> str:
        """How much was tested of what the signature takes."""
        counts = " and ".join(f"its {side} took {a} of {b} cases" for side, (a, b) in self.shares().items())
        return f"{counts} that its signature takes; a third is the least, and something has to hold"

    def refusals(self) -> str:
        """What it refused, and how often; the commonest five."""
        said = [f"{text} ({n} case{'s'[: n > 1]})" for text, n in self.refused.items()]
        return "; ".join(said[:5]) + (f"; and {len(said) - 5} more" if len(said) > 5 else "")

    @property
    def refused(self) -> dict[str, int]:
        """What was said when a case was refused, and how often; the commonest first."""
        texts = Counter(text for r in self.results for text in {c.text for c in r.checks if c.status == "refused"})
        return dict(texts.most_common())

    @property
    def unused(self) -> list[str]:
        """Options in the signature that were given in no case that was tested."""
        given = {name for r in self.results if r.tested for name in r.options}
        return [name for name in self.options if name not in given]

    @property
    def tested(self) -> int:
        return sum(len(r.tested) for r in self.results)

    @property
    def total(self) -> int:
        return sum(len(r.checks) for r in self.results)

    @property
    def diagnosis(self) -> dict[str, list[str]]:
        """What was recognised, and the cases in which it was; the commonest first."""
        found: dict[str, list[str]] = {}
        for r in self.results:
            for e in r.explanations:
                cases = found.setdefault(" and ".join(e.names) + (f" {e.where}" if e.where == "in the backward" else ""), [])
                if r.case not in cases:
                    cases.append(r.case)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def features(self) -> dict[str, list[Result]]:
        """The results by feature; the gradients and lse are features of their own."""
        found: dict[str, list[Result]] = {}
        for r in self.results:
            for feature in r.features:
                found.setdefault(feature, []).append(r)
            groups: dict[str, Iterable[str]] = {
                "lse": ["lse"],
                "backward": GRADIENTS,
                "dbias": ["dbias"],
                "dsink": ["dsink"],
                "conditions": CONDITIONS,
            }
            groups = groups if self.op == "attention" else {"backward": [c.tensor for c in r.checks if c.tensor[:1] == "d"]}
            for name, tensors in groups.items():
                own = [c for c in r.checks if c.tensor in tensors]
                if own:
                    found.setdefault(name, []).append(Result(r.case, [name], own))
        return found

    def untested(self, features: Iterable[str]) -> list[str]:
        """Those of the features for which nothing was tested."""
        found = self.features()
        return [f for f in features if not any(r.tested for r in found.get(f, []))]

    def lines(self) -> list[str]:
        """What is wrong, a line each."""
        return [f"{case}: {text}" for case, text in self._said()]

    def _said(self) -> list[tuple[str, str]]:
        said = [(r.case, f"{c.tensor}: {c.text}") for r in self.wrong for c in r.checks if c.status == "wrong"]
        return said + [(r.case, f"was expected to fail ({r.expected}), and holds") for r in self.unexpected]

    def _grouped(self) -> list[str]:
        """`lines`, where the same is said of several cases in one."""
        cases: dict[str, list[str]] = {}
        for case, text in self._said():
            cases.setdefault(text, []).append(case)
        return [f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: {text}" for text, names in cases.items()]

    def hints(self) -> list[str]:
        """What to do about a candidate that cannot be called as verify calls it."""
        texts, found = [c.text for r in self.wrong for c in r.checks if c.status == "wrong" and "raises " in c.text], []
        called = [r for r in self.results if r.tested]
        strange = any(word in text for text in texts for word in WANTS_TENSORS)
        if strange or (texts and self.library and len(self.wrong) == len(called)):
            library = self.library or "another library"
            found.append(f"verify gives NumPy arrays and expects them back, and this function may want tensors of {library}: "
                         "wrap it (docs/verifying.md, What a candidate is). For torch's own attention: npattn verify torch")
        elif any("positional argument" in text or "unexpected keyword argument" in text for text in texts):
            found.append(f"verify calls {CALLS[self.op]}, the backward with the options of the forward (docs/verifying.md).")
        elif texts:
            found.append("Where it raises because something is not supported (grouped heads, empty arrays), let it raise "
                         "NotImplementedError: that is left out.")  # fmt: skip
        if self.strangers:
            names = ", ".join((*CANONICAL, *OWN_KEYWORDS))
            found.append(f"It also takes {', '.join(self.strangers)}, which verify never gives: its names are {names}")
        return found

    def require(self, features: Iterable[str] = ()) -> Report:
        """Itself, or AssertionError with what is wrong, what it is taken to be, and what was not tested."""
        __tracebackhide__ = True
        features = list(features)
        check_features("require", features, self.op, self.features())
        lines = self._grouped()
        if lines:
            count = len(self.wrong) + len(self.unexpected)
            named = [f"  it looks like: {name} ({len(cases)} cases)" for name, cases in list(self.diagnosis.items())[:3]]
            more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
            first = f"{self.candidate} falls short in {count} case{'s'[: count > 1]}:"
            raise AssertionError("\n".join([first, *named, *lines[:10], *more, *self.hints()]))
        if self.tested and self.too_little:
            raise AssertionError(f"{self.candidate}: too little tested: {self.little}. It refused: {self.refusals()}")
        untested = self.untested(features) if self.tested else ["anything"]
        if untested:
            raise AssertionError(f"{self.candidate}: not tested: {', '.join(untested)}")
        return self

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is null."""

        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: plain(y) for name, y in x.items()}
            if isinstance(x, (list, tuple)):
                return [plain(y) for y in x]
            return None if isinstance(x, float) and not math.isfinite(x) else x

        results = [{**plain(asdict(r)), "status": r.status} for r in self.results]
        return {
            "npattn": npattn.__version__, "passed": self.passed, "candidate": self.candidate, "op": self.op,
            "level": self.level, "precision": self.precision, "fits": self.fits,
            "tested": self.tested, "total": self.total, "asked": self.asked, "interrupted": self.interrupted,
            "too_little": self.too_little, "refused": self.refused, "unused": self.unused,
            "diagnosis": self.diagnosis, "results": results,
        }  # fmt: skip


def verify(
    function: Callable[..., Any] | Candidate | str, backward: Callable[..., Any] | None = None, *, op: str | None = None,
    level: str = "good", precision: str | None = None, convention: str | Convention = "npattn",
    cases: Iterable[Any] | None = None, seeds: Iterable[int] = (0,), rules: Iterable[str] = (),
    expected_failures: Mapping[str, str] | None = None, stop: bool = False, diagnose: bool = True,
    on_result: Callable[[Result], None] | None = None,
) -> Report:  # fmt: skip
    """Verify a function of yours, a `Candidate`, or a built-in one by its name.

    op, level, precision, convention, rules : names, as for ``npattn verify``; a `Candidate` has its own op and convention
    cases, seeds      : what is run, in place of all cases of the op (``npattn.verify.CASES``) with seed 0: cases of that table,
                        or a `Case` of your own, as ``Case("mine", ("causal top_left",), sizes={"H": 8, "G": 2, "L": 512, "S":
                        512, "D": 96, "E": 96})``; options are the names of ``npattn.verify.OPTIONS``
    expected_failures : case (or a pattern with *) -> reason; they still run, and are reported when they hold
    stop              : go no further than the first case that is wrong
    diagnose          : look for what it does instead; on_result : is called with each `Result`
    The function runs in this process: one that ends it, or hangs, ends or hangs you. The shell command has one of its own.
    Raises CandidateError for a name that is not known.

    >>> from npattn import attention
    >>> report = verify(attention, level="tight", cases=CASES[:3])
    >>> report.passed, report.lines()
    (True, [])
    """
    rules = tuple(rules)
    check_names(level, precision, rules)
    candidate = _candidate(function, backward, convention, op)
    check_op(candidate.op, candidate.name, level, rules)
    settings = Settings(level, None if precision is None else PRECISIONS[precision], rules)
    chosen, seeds = list(CASES_OF[candidate.op] if cases is None else cases), list(seeds)
    expected = expected_reasons(expected_failures or {}, [*CASES_OF[candidate.op], *chosen])
    diagnostician = Diagnostician(candidate.align) if diagnose else None
    results = []
    for result in each_result(lambda case, seed: examine_all(candidate, case, seed, settings, diagnostician), chosen, seeds,
                              expected, stop):  # fmt: skip
        results.append(result)
        if on_result is not None:
            on_result(result)
    report = Report(results=results, level=level, precision=precision or "", rules=rules, asked=len(chosen) * len(seeds),
                    **asdict(Facts.of(candidate)))  # fmt: skip
    return dataclasses.replace(report, fits=fits(candidate, report, chosen, settings))


def each_result(
    examined: Callable[[Any, int], Result], cases: Iterable[Any], seeds: Iterable[int], expected: Mapping[str, str], stop: bool
) -> Iterator[Result]:
    """The results of all cases and seeds; with ``stop`` up to the first that is wrong and not known."""
    for seed, case in itertools.product(seeds, cases):
        result = dataclasses.replace(examined(case, seed), expected=expected.get(case.name, ""))
        yield result
        if stop and result.status == "wrong" and not result.expected:
            return


def examine_all(
    candidate: Candidate, case: Any, seed: int, settings: Settings, diagnostician: Diagnostician | None = None
) -> Result:
    """`examine`, and the conditions where that holds."""
    result = examine(candidate, case, seed, settings, diagnostician)
    if result.status != "ok":
        return result
    return dataclasses.replace(result, checks=[*result.checks, *examine_conditions(candidate, case, seed, settings)])


def check_features(what: str, names: Iterable[str], op: str, more: Iterable[str] = ()) -> None:
    """A feature that no case has is an error: nothing of it could ever be tested."""
    known = {*(f for case in CASES_OF[op] for f in case.features), *more, "lse", "backward", "dbias", "dsink", "conditions"}
    for name in names:
        if name not in known:
            raise CandidateError(f"{what} {name}: no such feature, expected one of {', '.join(sorted(known))}")


def check_names(level: str, precision: str | None, rules: Iterable[str]) -> None:
    if level not in (*LEVELS, "bounded"):
        raise CandidateError(f"level {level!r}, expected one of tight, good, bounded")
    for rule in rules:
        if rule not in RULES:
            raise CandidateError(f"rule {rule!r}, expected one of {', '.join(RULES)}")
    if precision is not None and precision not in PRECISIONS:
        raise CandidateError(f"precision {precision!r}, expected one of {', '.join(PRECISIONS)}")


def check_op(op: str, name: str, level: str, rules: Iterable[str]) -> None:
    if op != "attention" and (level == "bounded" or list(rules)):
        what = "level bounded is" if level == "bounded" else "rules are"
        raise CandidateError(f"{what} for attention, and {name} is {op}")


def _candidate(function: Any, backward: Any, convention: str | Convention, op: str | None) -> Candidate:
    if op not in (None, *OPS):
        raise CandidateError(f"op {op!r}, expected one of {', '.join(OPS)}")
    try:
        values = parse(convention) if isinstance(convention, str) else convention
    except ValueError as error:
        raise CandidateError(str(error)) from None
    if isinstance(function, Candidate):
        if backward is not None or values != OWN or op not in (None, function.op):
            raise CandidateError(f"{function.name} is a Candidate, with a backward, a convention and an op of its own")
        return function
    if not isinstance(function, str):
        return Candidate(getattr(function, "__name__", str(function)), function, backward, values, op or "attention")
    candidate = load(function, None, values, op)
    if backward is not None and candidate.backward is not None:
        raise CandidateError(f"the built-in candidate {function} has a backward of its own")
    return candidate if backward is None else dataclasses.replace(candidate, backward=backward)


def expected_reasons(failures: Mapping[str, str], cases: Iterable[Any]) -> dict[str, str]:
    """The reason by case. A name that no case has is an error: it would never fail."""
    names = [case.name for case in cases]
    found: dict[str, str] = {}
    for pattern, reason in failures.items():
        hit = [n for n in names if n == pattern] or fnmatch.filter(names, pattern)
        if not hit:
            raise CandidateError(f"expected failure {pattern!r}: no such case; npattn verify --list lists them")
        if not reason.strip():
            raise CandidateError(f"expected failure {pattern!r} has no reason")
        found |= dict.fromkeys(hit, reason)
    return found


def fits(candidate: Candidate, report: Report, cases: list[Any], settings: Settings) -> str:
    """The precision class under which what is wrong would hold, where the declared one (or that of the inputs) does not.

    A kernel that rounds low rounds low everywhere, forwards as well: a few small cases tell. Each class is tried on inputs that
    its format holds, as `--precision` gives them, from the strictest of a format to its laxest: the rounding of other inputs
    would hide the rest.
    """
    declared = settings.precision
    if candidate.op != "attention":
        return ""
    wrong = {
        r.case for r in report.wrong
        if any(math.isfinite(c.worst) for c in r.checks if c.status == "wrong" and c.tensor in ("out", "lse"))
        and all("round" in n or e.distance == math.inf for e in r.explanations for n in e.names)
    }  # fmt: skip
    small = [c for c in cases if c.name in wrong and c.dtype == "float32" and not c.twist]
    some = [c for c in small if c.family == "normal"][:5]
    if declared is None and (not some or some[0].name != "plain"):
        return ""
    some += [c for c in small if c.family in ("x5", "x30")][:2]  # only there are scores that are rounded told from others
    holds: dict[str, int] = {}
    for name, precision in PRECISIONS.items():
        if precision.dtype == np.float32 and name not in ("float32", "float8") and precision != declared:
            holds[name] = sum(_under(candidate, case, precision) for case in some)
    best = max(holds, key=lambda name: holds[name])
    if 2 * holds[best] <= len(some):  # another mistake may hide in some
        return ""
    # Sums that are kept in a small format look like a class where they are short: what fits has to fit all without options,
    # the long ones and the hard inputs, too.
    last = Settings(power=False, precision=PRECISIONS[best])
    return "" if any(examine(candidate, c, 0, last).status == "wrong" for c in small if not c.options) else best


def _under(candidate: Candidate, case: Any, precision: Precision) -> bool:
    """Whether a case holds under a class, and is rounded as it says: what is rounded last is seen in every digit."""
    outcome = call_forward(candidate, canonical(case.problem(0))).values.get("out")
    if not isinstance(outcome, np.ndarray) or outcome.dtype.kind != "f":
        return False
    out = outcome.astype(np.float32)
    if bool(precision.out) != bool((round_to(out, precision.format) == out).all()):
        return False
    return examine(candidate, case, 0, Settings(power=False, precision=precision)).status == "ok"


def check(
    forward: Callable[..., Any], backward: Callable[..., Any] | None = None, *, require: Iterable[str] = (), **options: Any
) -> Report:
    """`verify`, then raise AssertionError with what is wrong, or where nothing (of ``require``) was tested.

    Raises CandidateError for a feature that no case has; warns where masks were to be tested, and it takes them by other names.

    >>> from npattn import attention
    >>> check(attention, require=["causal", "grouped heads"]).wrong
    []
    """
    __tracebackhide__ = True
    candidate = _candidate(forward, backward, options.pop("convention", "npattn"), options.pop("op", None))
    require, given = list(require), options.pop("cases", None)
    cases = list(CASES_OF[candidate.op] if given is None else given)
    check_features("require", require, candidate.op, [f for case in cases for f in case.features])
    report = verify(candidate, cases=cases, **options).require(require)
    masks = [name for name in ("mask", "causal") if name in report.features()]
    if masks and report.strangers and report.untested(masks) == masks:
        warnings.warn(f"{report.candidate}: no mask was tested. {report.hints()[-1]}", stacklevel=2)
    return report


def parametrize(
    function: Callable[..., Any] | Candidate | str, backward: Callable[..., Any] | None = None, *,
    expected_failures: Mapping[str, str] | None = None, **options: Any,
) -> Callable[[Callable[..., None]], Any]:  # fmt: skip
    """For pytest: one test for each case, with the case's name as its id. The test itself may take the report, or nothing.

    @npattn.verify.parametrize(my_attention, backward=my_backward, expected_failures={"NaN seen later": "issue 12"})
    def test_my_attention(report):
        assert report.passed

    It fails with what is wrong; what is not supported, or refused, is skipped; an expected failure still runs, and fails once
    it holds.
    """
    import pytest

    op = function.op if isinstance(function, Candidate) else options.get("op")
    if op not in (None, *OPS):
        raise CandidateError(f"op {op!r}, expected one of {', '.join(OPS)}")
    op = op or next((name for name in OPS if function in built_in(name)), "attention")
    given = options.pop("cases", None)
    chosen = list(CASES_OF[op] if given is None else given)
    expected = expected_reasons(expected_failures or {}, [*CASES_OF[op], *chosen])

    def decorate(test: Callable[..., None]) -> Any:
        def run(case: Any) -> None:
            reason = {case.name: expected[case.name]} if case.name in expected else {}
            report = verify(function, backward, cases=[case], expected_failures=reason, **options)
            if report.unexpected:
                pytest.fail(report.lines()[0], pytrace=False)
            if not report.tested:
                pytest.skip(", ".join(dict.fromkeys(c.text for c in report.results[0].checks)))
            if report.unsettled:
                pytest.skip(f"expected to fail ({reason[case.name]}), and only partly tested")
            if reason:
                pytest.xfail(reason[case.name])
            report.require()
            test(*[report] if inspect.signature(test).parameters else [])

        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        run.__dict__.update(test.__dict__)  # marks
        return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in chosen])(run)

    return decorate


__all__ = ["CASES_OF", "GRADIENTS", "Check", "Report", "check", "parametrize", "verify"]
