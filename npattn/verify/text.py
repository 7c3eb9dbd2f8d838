"""All texts that verify shows to people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from npattn.peers import PEERS
from npattn.verify.candidate import BUILT_IN
from npattn.verify.conditions import CONDITIONS
from npattn.verify.conventions import FIELDS, PRESETS
from npattn.verify.judge import WRONG_BEFORE, Check, Result
from npattn.verify.ops import OPS

if TYPE_CHECKING:
    from npattn.verify.report import Report

WANTS_TENSORS = (
    "axes don't match array", "must be Tensor", "'numpy.ndarray' object has no attribute", "'int' object is not callable",
    "not numpy.ndarray", "expected Tensor",
)  # fmt: skip
"""Messages of functions that were written for tensors and got arrays: x.transpose(1, 2), x.size(0), a call of the library."""

SHOWN = 3  # wrong cases below the verdict


# --- the verdict ----------------------------------------------------------------------------------------------------------


def verdict(report: Report, require: Iterable[str] = ()) -> str:
    """The verdict in a sentence. A second line names the precision class that the errors fit, if there is one."""
    who, require, word = report.candidate, list(require), report.verdict(require)
    tested = f"{report.tested} of {report.total}"
    expected = sum(bool(r.expected) and r.status == "wrong" for r in report.results)
    known = f", {expected} expected to fail" if expected else ""
    sentences = {
        "right": f"{who} holds in all that was tested, {tested}{known}",
        "wrong": f"{who} falls short in {len(report.wrong)} of {len(report.results)} cases{known}: "
                 f"{_short(4, _cases(report.wrong))}",
        "unexpected": f"{', '.join(_cases(report.unexpected))} holds, and was expected to fail: take it off the list",
        "interrupted": f"{who} holds in what was tested before that, {tested}" if report.tested else f"{who} was not tested",
        "nothing tested": f"{who} supports none of these cases",
        "too little tested": f"{who}: {_shares(report)}",
        "not tested": f"{', '.join(report.untested(require))}, which --require asks for",
    }  # fmt: skip
    text = f"{word.upper()}: {sentences[word]}"
    if word == "wrong" and report.fits:
        fits = report.fits
        text += f"\nIts errors are those of {fits}: if that is what it computes in, declare --precision {fits}"
    return text


def _shares(report: Report) -> str:
    """How many of the cases that the signature allows were tested."""
    found = report.coverage
    if found is not None and found.too_little:
        return f"of the pairs of classes that it takes {found.met} of {found.pairs} were met, and half of them is the least"
    counts = " and ".join(f"its {side} took {a} of {b} cases" for side, (a, b) in report.shares().items())
    return f"{counts} that its signature takes; a third is the least, and something has to hold"


def _refusals(report: Report) -> str:
    """The five commonest messages of refused cases, each with the number of cases."""
    messages = [f"{text} ({_count(n)})" for text, n in report.refused.items()]
    return "; ".join(messages[:5]) + (f"; and {len(messages) - 5} more" if len(messages) > 5 else "")


def summary(report: Report, verbose: bool) -> Iterator[str]:
    """The lines below the verdict: how much was tested, the diagnosis, and the first wrong cases."""
    yield from coverage(report)
    if report.diagnosis:
        yield f"\n{'it looks like':58} cases"
        for name, cases in list(report.diagnosis.items())[: None if verbose else 8]:
            yield f"  {name:56} {len(cases):5}  {_short(3, cases)}"
    yield from rules(report)
    if not verbose and report.wrong:
        yield ""
        for result in report.wrong[:SHOWN]:
            yield from describe(result, report.results[0].seed)
        more = len(report.wrong) - SHOWN
        yield f"  {f'and {more} more cases; ' if more > 0 else ''}-v shows all"
    if told := hints(report):
        yield ""
        yield from told


def space(report: Report) -> Iterator[str]:
    """What was met of the space from which cases were drawn."""
    found = report.coverage
    if found is None:
        return
    three = "" if found.triples is None else ", and of the triples of options and sizes {} of {}".format(*found.triples)
    yield f"{found.cases} cases drawn: of the pairs of classes that it takes, {found.met} of {found.pairs} were met{three}"
    if found.common:
        yield f"  common to all {found.wrong} wrong: {', '.join(found.common)}"
    if found.limits:
        yield f"  it takes only {'; '.join(found.limits)}"
    for name, classes in found.refused.items():
        yield f"  never tested: {name} {', '.join(classes)}"
    if found.left_out:
        yield f"  left out, as they cost too much: {'; '.join(found.left_out)}"


def coverage(report: Report) -> Iterator[str]:
    """How much was tested, and why the rest was not."""

    def texts(status: str) -> list[str]:
        return list(dict.fromkeys(c.text for r in report.results for c in r.checks if c.status == status))

    cases = sum(bool(r.tested) for r in report.results)
    yield f"tested {report.tested} of {report.total} tensors and conditions, in {cases} of {report.asked} cases"
    worst = max(((c.worst, c.tensor, r.case) for r in report.results for c in r.checks if c.status == "ok"), default=None)
    if worst and worst[0]:
        yield f"largest error that holds: {worst[0]:.3g} sigma, in {worst[1]} of {worst[2]}"
    blind = sum(c.status == "no power" for r in report.results for c in r.checks)
    if blind:
        yield f"no power in {blind}: there the judge could not have failed"
    if report.refused:
        yield f"refused: {_refusals(report)}"
    if unsupported := dict.fromkeys(name for text in texts("not supported") for name in text.split(", ")):
        yield f"not supported: {', '.join(unsupported)}"
    if missing := [text for text in texts("not given") if text != WRONG_BEFORE]:
        yield f"not given: {'; '.join(missing)}"
    if lost := texts("lost"):
        yield f"lost: {'; '.join(lost)}"
    if report.unused:
        yield f"in the signature, and tested in no case: {', '.join(report.unused)}"
    if report.unsettled:
        yield f"expected to fail, and only partly tested: {', '.join(_cases(report.unsettled))}"
    yield from space(report)
    if len(report.results) < report.asked:
        yield f"stopped after {len(report.results)} of {report.asked} cases"


def rules(report: Report) -> Iterator[str]:
    """What the rules of other suites say of the same tensors."""
    for rule in report.rules:
        judged = [(r.case, c) for r in report.results for c in r.checks if rule in c.rules]
        theirs = sum(not c.rules[rule] for _, c in judged)
        ours = sum(c.status == "wrong" for _, c in judged)
        apart = [f"{case}: {c.tensor}" for case, c in judged if c.rules[rule] != (c.status != "wrong")]
        differ = f"; they differ in {len(apart)}: {_first(5, apart)}" if apart else ""
        yield f"\nrule {rule}: rejects {theirs} of {len(judged)} tensors; npattn rejects {ours}{differ}"


def hints(report: Report) -> list[str]:
    """What to do about a candidate that cannot be called as verify calls it."""
    texts, found = [c.text for r in report.wrong for c in _wrong(r) if "raises " in c.text], []
    called = [r for r in report.results if r.tested]
    wants_tensors = any(word in text for text in texts for word in WANTS_TENSORS)
    if wants_tensors or (texts and report.library and len(report.wrong) == len(called)):
        found.append(f"verify gives NumPy arrays and expects them back, and this function may want tensors of "
                     f"{report.library or 'another library'}: wrap it (docs/verifying.md, What a candidate is). "
                     "For torch's own attention: npattn verify torch")  # fmt: skip
    elif any("positional argument" in text or "unexpected keyword argument" in text for text in texts):
        call = OPS[report.op].calls.text
        found.append(f"verify calls {call}, the backward with the options of the forward (docs/verifying.md).")
    elif texts:
        found.append("Where it raises because something is not supported (grouped heads, empty arrays), let it raise "
                     "NotImplementedError: that is left out.")  # fmt: skip
    return [*found, *unknown_keywords(report)]


def unknown_keywords(report: Report) -> list[str]:
    """A line on the candidate's keywords that are never given, because verify does not know them."""
    if not report.unknown_parameters:
        return []
    names = ", ".join(OPS[report.op].calls.keywords)
    return [f"It also takes {', '.join(report.unknown_parameters)}, which verify never gives: its names are {names}"]


# --- what is wrong --------------------------------------------------------------------------------------------------------


def lines(report: Report) -> list[str]:
    """One line for each thing that is wrong."""
    return [f"{case}: {text}" for case, text in _wrong_lines(report)]


def _wrong_lines(report: Report) -> list[tuple[str, str]]:
    """(case, text) for each wrong tensor, and for each case that is right though it was expected to fail."""
    wrong = [(r.case, f"{c.tensor}: {c.text}") for r in report.wrong for c in _wrong(r)]
    return wrong + [(r.case, f"was expected to fail ({r.expected}), and holds") for r in report.unexpected]


def failure(report: Report, require: Iterable[str] = ()) -> str:
    """Why `Report.require` raises; "" if it does not."""
    cases: dict[str, list[str]] = {}
    for case, text in _wrong_lines(report):
        cases.setdefault(text, []).append(case)
    if cases:
        looks = [f"  it looks like: {name} ({len(where)} cases)" for name, where in list(report.diagnosis.items())[:3]]
        wrong = [f"{_first(3, where)}: {text}" for text, where in cases.items()]
        more = [f"... and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        first = f"{report.candidate} falls short in {_count(len(report.wrong) + len(report.unexpected))}:"
        return "\n".join([first, *looks, *wrong[:10], *more, *hints(report)])
    if report.tested and report.too_little:
        return f"{report.candidate}: too little tested: {_shares(report)}. It refused: {_refusals(report)}"
    untested = report.untested(require) if report.tested else ["anything"]
    return f"{report.candidate}: not tested: {', '.join(untested)}" if untested else ""


# --- one case, and the table ----------------------------------------------------------------------------------------------


def describe(result: Result, first_seed: int = 0) -> Iterator[str]:
    """A line for the case, one for each wrong tensor, and one for each explanation."""
    name = result.case if result.seed == first_seed else f"{result.case} (seed {result.seed})"
    worst = max(result.tested, key=lambda c: c.worst, default=None)
    if worst is None:
        reasons = dict.fromkeys(c.text for c in result.checks)
        yield f"  --     {name:40} {result.status}: {', '.join(reasons)}"
        return
    mark = "ok    " if result.status != "wrong" else "known " if result.expected else "WRONG "
    conditions = [c.tensor for c in result.tested if c.tensor in CONDITIONS]
    tensors = ", ".join(c.tensor for c in result.tested if c.tensor not in CONDITIONS)
    also = f"; {len(conditions)} conditions" if conditions else ""
    yield f"  {mark} {name:40} {_sigma(worst)} sigma in {worst.tensor:5} of {tensors}{also}"
    blind = [f"{c.tensor} ({c.text})" for c in result.checks if c.status == "no power"]
    if blind:
        yield f"           no power: {', '.join(blind)}"
    for check in _wrong(result):
        text = check.text if check.text.startswith((f"{check.tensor} ", f"{check.tensor}[")) else f"{check.tensor} {check.text}"
        yield f"           {text}"
    for explanation in result.explanations:
        yield f"           => {explanation.text}"


def table(report: Report) -> Iterator[str]:
    """A table of features: how much of each was tested, and its largest error."""
    yield f"\n{'feature':18} {'tested':>11}  {'worst':>9}  where"
    known = {r.case for r in report.results if r.expected}
    for feature, results in report.features().items():
        checks = [(r.case, c) for r in results for c in r.checks]
        tested = [(case, c) for case, c in checks if c.status in ("ok", "wrong")]
        if not tested:
            reasons = dict.fromkeys(name for _, c in checks for name in c.text.split(", "))
            yield f"{feature:18} {f'0 of {len(checks)}':>11}  {'':9}  {', '.join(reasons)}"
            continue
        case, worst = max(tested, key=lambda pair: (pair[1].status == "wrong", pair[0] not in known, pair[1].worst))
        where = f"{worst.tensor}[{', '.join(map(str, worst.index))}] in {case}" if worst.index else case
        note = "" if worst.status != "wrong" else "  known" if case in known else "  WRONG"
        yield f"{feature:18} {f'{len(tested)} of {len(checks)}':>11}  {_sigma(worst)}  {where}{note}"
    yield "worst: the largest error in units of the rounding error that is predicted there (sigma)"


# --- one case alone -------------------------------------------------------------------------------------------------------

NOTHING_WRONG = "\nno case is wrong: nothing to shrink or save"


def not_shrunk(case: str, op: str, wrong: bool) -> str:
    return f"\n{case}: cases of {op} are not made smaller" if wrong else f"\n{case} is not wrong: nothing to shrink"


def smallest(shapes: str, result: Result, first_seed: int) -> Iterator[str]:
    """The report on a case that was made smaller."""
    yield f"\n{result.case}, as small as it still fails: {shapes}"
    yield from describe(result, first_seed)


def saved(case: str, seed: int, path: Any) -> str:
    return f"saved {case}, seed {seed}, to {path}"


def lost(case: str, what: str, error: Exception) -> str:
    return f"\n{case} was not {what}: {error}"


# --- lists ----------------------------------------------------------------------------------------------------------------


def cases(table: Sequence[Any]) -> Iterator[str]:
    width = max(len(case.name) for case in table)
    for case in table:
        yield f"{case.name:{width}}  {', '.join(case.features)}"


def candidates() -> Iterator[str]:
    for name, (op, _) in BUILT_IN.items():
        yield f"{name:24} {op:12} {PEERS[name].library if name in PEERS else 'npattn'}"


def conventions() -> Iterator[str]:
    for name, field in FIELDS.items():
        yield f"{name:18} {field.conflict:4} {field.use:10} {field.meaning}"
        for value, meaning in field.values.items():
            yield f"    {name}={value:18} {meaning}"
    yield "\npresets"
    for name, preset in PRESETS.items():
        changes = ", ".join(f"{n}={v}" for n, v in preset.convention.changes().items())
        yield f"{name:14} {changes or 'the first value of each'}"
        yield f"{'':14} {preset.source}{'; ' + preset.note if preset.note else ''}"


# --- pieces ---------------------------------------------------------------------------------------------------------------


def _wrong(result: Result) -> list[Check]:
    return [c for c in result.checks if c.status == "wrong"]


def _cases(results: Iterable[Result]) -> list[str]:
    """The names of the cases, each once: there is a result for every seed."""
    return list(dict.fromkeys(r.case for r in results))


def _short(most: int, names: Sequence[str]) -> str:
    """The first names; of drawn cases, whose names are long, how many there are."""
    named = [name for name in names if not name.startswith("drawn: ")]
    drawn = f"{len(names) - len(named)} drawn" if len(named) < len(names) else ""
    return ", ".join(text for text in (_first(most, named), drawn) if text)


def _first(most: int, names: Sequence[str]) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _count(n: int) -> str:
    return f"{n} case" if n == 1 else f"{n} cases"


def _sigma(check: Check) -> str:
    return f"{check.worst:9.3g}" if check.worst < math.inf else f"{'-':>9}"
