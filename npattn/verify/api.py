"""What a user calls: `verify`, `check`, and `parametrize` for pytest."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from npattn.verify.candidate import OWN, Candidate, CandidateError, call_forward, load, op_of
from npattn.verify.conditions import examine_conditions
from npattn.verify.conventions import Convention, parse
from npattn.verify.explain import Diagnostician
from npattn.verify.judge import Result, Settings, examine
from npattn.verify.precision import PRECISIONS, Precision, round_to
from npattn.verify.report import Facts, Report
from npattn.verify.request import (
    CASES_OF,
    check_cases,
    check_features,
    check_names,
    check_op,
    check_supported,
    expected_reasons,
)
from npattn.verify.text import unknown_keywords


def verify(
    function: Callable[..., Any] | Candidate | str, backward: Callable[..., Any] | None = None, *, op: str | None = None,
    level: str = "good", precision: str | None = None, convention: str | Convention = "npattn",
    cases: Iterable[Any] | None = None, seeds: Iterable[int] = (0,), rules: Iterable[str] = (),
    expected_failures: Mapping[str, str] | None = None, stop: bool = False, diagnose: bool = True,
    on_result: Callable[[Result], None] | None = None,
) -> Report:  # fmt: skip
    """Verify a function of yours, a `Candidate`, or a built-in candidate by its name.

    op, level, precision, convention, rules : names, as for ``npattn verify``; a `Candidate` has its own op and convention
    cases, seeds      : what to run; unless given, all cases of the op (``npattn.verify.CASES``) with seed 0. A case comes from
                        that table, or is a `Case` of your own, such as ``Case("mine", ("causal top_left",), sizes={"H": 8,
                        "G": 2, "L": 512, "S": 512, "D": 96, "E": 96})``; its options are names of ``npattn.verify.OPTIONS``
    expected_failures : case (or a pattern with *) -> reason; these cases still run, and are reported when they pass
    stop              : stop after the first wrong case
    diagnose          : look for what the function does instead
    on_result         : is called with each `Result`
    The function runs in this process: if it ends the process or hangs, so does your program. The shell command runs it in a
    process of its own. Raises CandidateError for an unknown name.

    >>> from npattn import attention
    >>> from npattn.verify import CASES
    >>> report = verify(attention, level="tight", cases=CASES[:3])
    >>> report.passed, report.lines()
    (True, [])
    """
    rules = tuple(rules)
    check_names(level, precision, rules)
    candidate = _candidate(function, backward, convention, op)
    check_supported(candidate.op, candidate.name, level, rules)
    settings = Settings(level, None if precision is None else PRECISIONS[precision], rules)
    chosen, seeds = list(CASES_OF[candidate.op] if cases is None else cases), list(seeds)
    check_cases(candidate.op, chosen, seeds)
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
    return dataclasses.replace(report, fits=fitting_precision(candidate, report, chosen, settings))


def check(
    forward: Callable[..., Any], backward: Callable[..., Any] | None = None, *, require: Iterable[str] = (), **options: Any
) -> Report:
    """`verify`, then raise AssertionError if something is wrong, if nothing was tested, or if a feature of ``require`` was not.

    Raises CandidateError for a feature that no case has. Warns if no mask was tested and the function has keywords that verify
    does not know.

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
    if masks and report.unknown_parameters and report.untested(masks) == masks:
        warnings.warn(f"{report.candidate}: no mask was tested. {unknown_keywords(report)[0]}", stacklevel=2)
    return report


def parametrize(
    function: Callable[..., Any] | Candidate | str, backward: Callable[..., Any] | None = None, *,
    expected_failures: Mapping[str, str] | None = None, **options: Any,
) -> Callable[[Callable[..., None]], Any]:  # fmt: skip
    """For pytest: one test for each case, with the case's name as its id. The test function takes the report or no argument.

    @npattn.verify.parametrize(my_attention, backward=my_backward, expected_failures={"NaN seen later": "issue 12"})
    def test_my_attention(report):
        assert report.passed

    A test fails if the case is wrong. It is skipped if the case is refused or not supported. An expected failure still runs,
    and its test fails once the case passes.
    """
    import pytest

    check_op(options.get("op"))
    op = function.op if isinstance(function, Candidate) else op_of(str(function), options.get("op"))
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
                reasons = (f"{c.status}: {c.text}" if c.text else c.status for c in report.results[0].checks)
                pytest.skip(", ".join(dict.fromkeys(reasons)))
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


def _candidate(function: Any, backward: Any, convention: str | Convention, op: str | None) -> Candidate:
    check_op(op)
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


def each_result(
    examined: Callable[[Any, int], Result], cases: Iterable[Any], seeds: Iterable[int], expected: Mapping[str, str], stop: bool
) -> Iterator[Result]:
    """The results of all cases and seeds. With ``stop`` they end at the first case that is wrong and not expected to be."""
    for seed, case in itertools.product(seeds, cases):
        result = dataclasses.replace(examined(case, seed), expected=expected.get(case.name, ""))
        yield result
        if stop and result.status == "wrong" and not result.expected:
            return


def examine_all(
    candidate: Candidate, case: Any, seed: int, settings: Settings, diagnostician: Diagnostician | None = None
) -> Result:
    """`examine`; if the case passes, its exact conditions are examined too."""
    result = examine(candidate, case, seed, settings, diagnostician)
    if result.status != "ok":
        return result
    return dataclasses.replace(result, checks=[*result.checks, *examine_conditions(candidate, case, seed, settings)])


def fitting_precision(candidate: Candidate, report: Report, cases: list[Any], settings: Settings) -> str:
    """The name of another precision class under which the wrong cases would pass; "" if there is none.

    A kernel that rounds to a small format does so everywhere, also in the forward. So a few small cases are enough. Each class
    is tried on inputs that its format can hold, as with `--precision`: the rounding of other inputs would hide the other
    roundings. The classes of a format are tried from the strictest to the laxest.
    """
    declared = settings.precision
    if candidate.record.eager is None:
        return ""
    rounds = {name for name, change in candidate.record.changes.items() if change.rounds}
    wrong = {
        r.case for r in report.wrong
        if any(math.isfinite(c.worst) for c in r.checks if c.status == "wrong" and c.tensor in ("out", "lse"))
        and all(e.rounds or e.distance == math.inf or rounds.issuperset(e.names) for e in r.explanations)
    }  # fmt: skip
    small = [c for c in cases if c.name in wrong and c.dtype == "float32" and not c.twist]
    some = [c for c in small if c.family == "normal"][:5]
    if declared is None and (not some or some[0].name != "plain"):
        return ""
    some += [c for c in small if c.family in ("x5", "x30")][:2]  # rounded scores show only where scores are large
    holds: dict[str, int] = {}
    for name, precision in PRECISIONS.items():
        if precision.dtype == np.float32 and name not in ("float32", "float8") and precision != declared:
            holds[name] = sum(_passes_under(candidate, case, precision) for case in some)
    best = max(holds, key=lambda name: holds[name])
    if 2 * holds[best] <= len(some):  # half of them: some may contain another mistake, too
        return ""
    # If short sums are kept in a small format, the errors of a few cases look like those of a class. So the class also has to
    # fit every other small case without options, among them those with long sums and hard inputs.
    last = Settings(power=False, precision=PRECISIONS[best])
    return "" if any(examine(candidate, c, 0, last).status == "wrong" for c in small if not c.options) else best


def _passes_under(candidate: Candidate, case: Any, precision: Precision) -> bool:
    """Whether a case passes under a class. The digits of its output must be rounded if the class rounds it, and only then."""
    outcome = call_forward(candidate, candidate.record.canonical(case.problem(0))).values.get("out")
    if not isinstance(outcome, np.ndarray) or outcome.dtype.kind != "f":
        return False
    out = outcome.astype(np.float32)
    if bool(precision.out) != bool((round_to(out, precision.format) == out).all()):
        return False
    return examine(candidate, case, 0, Settings(power=False, precision=precision)).status == "ok"


__all__ = ["check", "each_result", "examine_all", "fitting_precision", "parametrize", "verify"]
