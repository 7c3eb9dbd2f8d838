"""The command line: one verb a function.

    npattn verify [CANDIDATE]     is this implementation right, and if not, what does it do instead?
    npattn peers                  what the installed libraries do
    npattn env                    versions, BLAS and its kernels, threads
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import npattn
from npattn import environment
from npattn.verify import CandidateError, Report, Result, Settings
from npattn.verify.candidates import OPS, op_of
from npattn.verify.conditions import CONDITIONS
from npattn.verify.conventions import FIELDS, PRESETS, near, parse
from npattn.verify.judge import LEVELS, RULES, WRONG_BEFORE
from npattn.verify.precision import PRECISIONS
from npattn.verify.report import CASES_OF, check_features, check_names, check_op, each_result, expected_reasons
from npattn.verify.worker import TIMEOUT, LostError, Spec, Worker

OK, WRONG, USAGE, LITTLE, UNWRITTEN, INTERRUPTED = 0, 1, 2, 3, 4, 130
STATUSES = {
    OK: "right: all that was tested holds",
    WRONG: "wrong: something falls short, crashes or hangs, or an expected failure holds",
    USAGE: "usage: nothing to verify, or nothing tested",
    LITTLE: "too little tested: most was refused, or what --require names was not tested",
    UNWRITTEN: "a report could not be written, or npattn itself failed; whatever the verdict is",
    INTERRUPTED: "interrupted; what was done so far is reported",
}


class UnwrittenError(Exception):
    """A report could not be written."""


def main(arguments: list[str] | None = None) -> int:
    _open_what_is_closed()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a candidate says may not be in the terminal's alphabet
    parser = argparse.ArgumentParser(prog="npattn", description="The reference for attention.")
    parser.add_argument("--version", action="version", version=f"npattn {npattn.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _verify_arguments(verbs)
    p = verbs.add_parser("peers", help="verify the installed libraries and say what they do")
    p.add_argument("--write", metavar="FILE", type=_file, help="write the page there instead of printing it")
    p.add_argument("--only", metavar="NAME", action="append", type=_text, default=[], help="this built-in candidate alone")
    p.set_defaults(run=peers_command)
    verbs.add_parser("env", help="what this machine computes with").set_defaults(run=env_command)
    given = parser.parse_args(arguments)
    try:
        with _ended_is_interrupted():
            return int(given.run(given))
    except CandidateError as error:
        return _failed(f"npattn {given.verb}: {error}", USAGE)
    except UnwrittenError as error:
        return _failed(f"npattn {given.verb}: {error}", UNWRITTEN)
    except KeyboardInterrupt:
        return _failed(f"npattn {given.verb}: interrupted", INTERRUPTED)
    except Exception:
        return _failed(f"{traceback.format_exc()}npattn {given.verb}: a fault of npattn's own, and no verdict", UNWRITTEN)


def _failed(text: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)
    return status


def _open_what_is_closed() -> None:
    """0, 1 and 2 exist: where one was closed, a pipe or file of ours would get its number, and what is printed there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


@contextlib.contextmanager
def _ended_is_interrupted() -> Iterator[None]:
    """SIGTERM, by which a CI ends what takes too long, is an interrupt as Ctrl-C is."""

    def interrupt(*what: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(*lines: str) -> None:
    """Prints, or raises UnwrittenError: stdout may be closed, full, or a pipe that nobody reads any more."""
    try:
        if sys.stdout is None:
            raise OSError("stdout is closed")
        for line in lines:
            print(line)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # Python would try, and complain, again when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UnwrittenError(f"the report could not be printed: {getattr(error, 'strerror', None) or error}") from None


class _Once(argparse.Action):
    """An option that is given once, or with the same value."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        once = vars(namespace).setdefault("once", {})
        if once.setdefault(self.dest, value) != value:
            parser.error(f"{option} is given twice: {once[self.dest]} and {value}")
        setattr(namespace, self.dest, value)


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: is a variable of the shell unset?")
    return text


def _file(text: str) -> Path:
    return Path(_text(text))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text}, expected a number of seconds above 0")
    return seconds


def _verify_arguments(verbs: Any) -> None:
    v = verbs.add_parser(
        "verify",
        help="verify an implementation against the reference",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Verify an implementation against the reference.\n\nexit status:\n"
        + "\n".join(f"  {status:<4} {text}" for status, text in STATUSES.items()),
    )
    once: Any = {"action": _Once}
    names = "blockwise (default), another of --list-candidates, package.module:function or path/to/file.py:function"
    v.add_argument("candidate", nargs="?", type=_text, help=names)
    v.add_argument("--backward", metavar="FUNCTION", type=_text, **once,
                   help="its backward: (dout, q, k, v, *, ...) -> (dq, dk, dv) or a mapping")  # fmt: skip
    v.add_argument("--op", choices=OPS, **once, help="what it implements (default attention, or that of a built-in name)")
    v.add_argument("--level", choices=(*LEVELS, "bounded"), default="good", **once, help="how good it has to be (default good)")
    classes = f"what it computes in: {', '.join(PRECISIONS)}"
    v.add_argument("--precision", choices=tuple(PRECISIONS), metavar="CLASS", **once, help=classes)
    v.add_argument("--convention", metavar="NAMES", type=_text, default="npattn", **once,
                   help=f"PRESET or field=value,...: {', '.join(PRESETS)} (--list-conventions)")  # fmt: skip
    v.add_argument("--causal", choices=tuple(FIELDS["causal"].values), **once, help="short for --convention causal=...")
    v.add_argument("--rule", choices=tuple(RULES), action="append", default=[], help="also say what this suite's rule says")
    v.add_argument("--expect-failure", metavar="CASE=REASON", action="append", type=_text, default=[],
                   help="this case is known to fail; it still runs, and is an error once it holds")  # fmt: skip
    v.add_argument("--json", metavar="FILE", type=_file, **once, help="write all results there")
    v.add_argument("-v", "--verbose", action="store_true", help="a line for each case, and the table by feature")
    v.add_argument("-k", dest="text", metavar="TEXT", type=_text, **once,
                   help="only cases with TEXT in their name, or of that feature")  # fmt: skip
    v.add_argument("--case", metavar="NAME", type=_text, **once, help="this case alone")
    v.add_argument("--seed", type=int, default=0, metavar="N", **once, help="draw the inputs with this seed (default 0)")
    v.add_argument("--timeout", type=_seconds, default=TIMEOUT, metavar="SECONDS", **once,
                   help=f"a call that takes longer hangs (default {TIMEOUT:g})")  # fmt: skip
    v.add_argument("--deep", action="store_true", help="three seeds, and options in random combinations")
    v.add_argument("--shrink", action="store_true", help="make the first case that is wrong as small as it still fails")
    v.add_argument("--save", metavar="FILE", type=_file, **once, help="write that case there, as .npz")
    v.add_argument("-x", dest="stop", action="store_true", help="stop at the first case that is wrong")
    v.add_argument("--require", metavar="FEATURE", action="append", type=_text, default=[],
                   help="fail if FEATURE was not tested")  # fmt: skip
    v.add_argument("--no-diagnosis", dest="diagnose", action="store_false", help="do not look for what it does instead")
    v.add_argument("--self-test", action="store_true", help="verify verify: seeded bugs have to be caught and named")
    v.add_argument("--list", action="store_true", help="list the cases and their features, run nothing")
    v.add_argument("--list-candidates", action="store_true", help="list the built-in candidates")
    v.add_argument("--list-conventions", action="store_true", help="list the fields of a convention, their values and presets")
    v.set_defaults(run=verify_command)


# --- verify ---------------------------------------------------------------------------------------------------------------

ALONE = ("self_test", "list_candidates", "list_conventions")  # what has nothing to do with a candidate
NAMED = {"candidate": "a candidate", "text": "-k", "stop": "-x", "diagnose": "--no-diagnosis"}


def verify_command(given: argparse.Namespace) -> int:
    _check_together(given)
    if given.list_candidates or given.list_conventions:
        say(*(_candidates() if given.list_candidates else _conventions()))
        return OK
    if given.self_test:
        from npattn.verify.selftest import run_self_test

        return OK if run_self_test(say) else WRONG
    try:
        convention = parse(given.convention if given.causal is None else f"{given.convention},causal={given.causal}")
    except ValueError as error:
        raise CandidateError(str(error)) from None
    check_names(given.level, given.precision, given.rule)
    name = DEFAULTS[given.op or "attention"] if given.candidate is None else given.candidate
    op = op_of(name, given.op)
    check_op(op, name, given.level, given.rule)
    cases = _chosen(given, op)
    expected = expected_reasons(_failures(given.expect_failure, [case.name for case in cases]), cases)
    if given.list:
        width = max(len(case.name) for case in cases)
        say(*(f"{case.name:{width}}  {', '.join(case.features)}" for case in cases))
        return OK
    for option in ("json", "save"):
        _writable(getattr(given, option), option)
    settings = Settings(given.level, None if given.precision is None else PRECISIONS[given.precision], tuple(given.rule))
    with Worker(Spec(name, given.backward, convention, op, settings, given.diagnose), given.timeout) as worker:
        return _run(given, worker, cases, expected)


def _run(given: argparse.Namespace, worker: Worker, cases: list[Any], expected: dict[str, str]) -> int:
    """All cases, and the reports of what was done: also where that was interrupted, or nobody reads any more."""
    started, seeds = time.perf_counter(), range(given.seed, given.seed + (3 if given.deep else 1))
    asked, results = len(cases) * len(seeds), list[Result]()
    interrupted, unwritten, unread = False, list[str](), False
    try:
        with _progress(asked, given.verbose) as shown:
            for result in each_result(worker.examine, cases, seeds, expected, given.stop):
                results.append(result)
                shown(describe(result, given.seed) if given.verbose else ())
    except KeyboardInterrupt:
        interrupted = True
    except UnwrittenError as error:
        unwritten.append(str(error))
        unread = True
    report = Report(results=results, level=given.level, precision=given.precision or "", rules=tuple(given.rule), asked=asked,
                    interrupted=interrupted or unread, **dataclasses.asdict(worker.facts))  # fmt: skip
    more: list[str] = []
    if not interrupted and not unwritten:
        try:
            report = dataclasses.replace(report, fits=worker.fits(report, cases))
            more = list(_one(given, worker, cases, report, unwritten))
        except KeyboardInterrupt:
            interrupted, report = True, dataclasses.replace(report, interrupted=True)
    if worker.faults:
        unwritten.append(f"{worker.faults[0]}npattn verify: a fault of npattn's own in {len(worker.faults)} questions")
    if given.json:
        try:
            given.json.write_text(json.dumps(report.as_json(), indent=1, allow_nan=False) + "\n")
        except OSError as error:
            unwritten.append(f"--json {given.json}: {error.strerror or error}")
    verdict, status = _verdict(report, report.untested(given.require))
    verdict += f" ({time.perf_counter() - started:.1f} s)"
    try:
        say(*([*table(report), ""] if given.verbose else []), verdict, *summary(report, given.verbose), *more)
    except UnwrittenError as error:
        unwritten.append(str(error))
        unread = True
    if unread:
        unwritten[-1] += f". {verdict}"
    for text in dict.fromkeys(unwritten):
        _failed(f"npattn verify: {text}", UNWRITTEN)
    return INTERRUPTED if interrupted else UNWRITTEN if unwritten else status


def _check_together(given: argparse.Namespace) -> None:
    """Options that contradict each other, or that would be ignored, are errors."""
    once = getattr(given, "once", {})
    others = ("deep", "shrink", "stop", "self_test", "list", "list_candidates", "list_conventions", "rule", "require",
              "expect_failure")  # fmt: skip
    set_ = {*once, *(name for name in others if getattr(given, name))}
    set_ |= {"candidate"} if given.candidate is not None else set()
    set_ |= {"diagnose"} if not given.diagnose else set()

    def said(name: str) -> str:
        return NAMED.get(name, f"--{name.replace('_', '-')}")

    def refuse(a: str, others: Iterable[str]) -> None:
        for b in others:
            if a in set_ and b in set_ and a != b:
                raise CandidateError(f"{said(a)} and {said(b)} contradict each other: give one of them")

    for alone in ALONE:
        refuse(alone, sorted(set_))
    refuse("list", ("json", "save", "shrink", "stop", "require", "expect_failure", "rule", "diagnose", "backward", "level",
                    "precision", "convention", "causal", "timeout"))  # fmt: skip
    refuse("case", ("text",))
    refuse("causal", ("convention",) if "causal=" in given.convention else ())
    if given.json is not None and given.save is not None and given.json.resolve() == given.save.resolve():
        raise CandidateError(f"--json and --save name one file, {given.json}: give each its own")
    for option, path in (("--json", given.json), ("--save", given.save)):
        for name in (given.candidate, given.backward):
            if path is not None and name is not None and path.resolve() == Path(name.rpartition(":")[0] or name).resolve():
                raise CandidateError(f"{option} {path}: that is the file of the candidate")
    if given.seed < 0:
        raise CandidateError(f"--seed {given.seed}: expected 0 or more")


DEFAULTS = {"attention": "blockwise", "multi_head": "multi-head-blockwise", "rnn": "rnn", "softmax": "softmax"}


def _chosen(given: argparse.Namespace, op: str) -> list[Any]:
    """The cases that are asked for."""
    text, table = (given.text or "").lower(), list(CASES_OF[op])
    if given.deep and op == "attention":
        from npattn.verify.cases import random_cases

        table += random_cases(given.seed, 150)
    check_features("--require", given.require, op, [f for case in table for f in case.features])
    if given.case is not None:
        named = [case for case in table if case.name == given.case]
        if not named:
            meant = near(given.case, [case.name for case in table])
            raise CandidateError(f"--case {given.case}: no such case{meant}; --list lists them")
        return named
    cases = [case for case in table if text in case.name.lower() or text in map(str.lower, case.features)]
    if not cases:
        raise CandidateError(f"-k {given.text}: no case has that in its name; --list lists them")
    return cases


def _failures(given: list[str], names: list[str]) -> dict[str, str]:
    """CASE=REASON; either may have a = in it. The first that stands behind the name of a case, else the last one, is meant."""
    found: dict[str, str] = {}
    for text in given:
        at = [i for i, letter in enumerate(text) if letter == "=" and text[:i].strip()]
        ways = [(text[:i].strip(), text[i + 1 :].strip()) for i in at]
        if not ways:
            raise CandidateError(f"--expect-failure {text}: expected CASE=REASON")
        name, reason = next((way for way in ways if fnmatch.filter(names, way[0])), ways[-1])
        found[name] = reason
    return found


def _writable(path: Path | None, option: str) -> None:
    if path is not None:
        try:
            new = not path.exists()
            if path.is_fifo():  # whoever reads it may come later
                return
            path.open("ab").close()
            if new:
                path.unlink()  # perhaps there will be nothing to write
        except OSError as error:
            raise CandidateError(f"--{option} {path}: {error.strerror}") from None


def _one(
    given: argparse.Namespace, worker: Worker, cases: list[Any], report: Report, unwritten: list[str]
) -> Iterator[str]:
    """The first case that is wrong, or the only one: made small, and saved."""
    if not (given.shrink or given.save):
        return
    by_name = {case.name: case for case in cases}
    wrong = next(iter(report.wrong), report.results[0] if len(cases) == 1 else None)
    if wrong is None:
        yield "\nno case is wrong: nothing to shrink or save"
        return
    case = by_name[wrong.case]
    try:
        if given.shrink and wrong.status != "wrong":
            yield f"\n{case.name} is not wrong: nothing to shrink"
        elif given.shrink and report.op != "attention":
            yield f"\n{case.name}: cases of {report.op} are not made smaller"
        elif given.shrink:
            case, shapes, wrong = worker.shrink(case, wrong.seed)
            yield f"\n{case.name}, as small as it still fails: {shapes}"
            yield from describe(wrong, given.seed)
        if given.save and (failure := worker.save(given.save.absolute(), case, wrong)):
            unwritten.append(f"--save {given.save}: {failure}")
        elif given.save:
            yield f"saved {case.name}, seed {wrong.seed}, to {given.save}"
    except LostError as error:
        yield f"\n{case.name} was not {'saved' if not given.shrink else 'made smaller'}: {error}"
        if given.save:
            unwritten.append(f"--save {given.save}: {error}")


def _verdict(report: Report, untested: list[str]) -> tuple[str, int]:
    expected = sum(bool(r.expected) and r.status == "wrong" for r in report.results)
    known = f", {expected} expected to fail" if expected else ""
    if report.unexpected:
        names = ", ".join(dict.fromkeys(r.case for r in report.unexpected))  # one case may be there with several seeds
        return f"UNEXPECTED: {names} holds, and was expected to fail: take it off the list", WRONG
    if report.wrong:
        cases = list(dict.fromkeys(r.case for r in report.wrong))
        names = ", ".join(cases[:4]) + (", ..." if len(cases) > 4 else "")
        what = f"WRONG: {report.candidate} falls short in {len(report.wrong)} of {len(report.results)} cases{known}: {names}"
        if report.fits:
            fits = report.fits
            what += f"\nIts errors are those of {fits}: if that is what it computes in, declare --precision {fits}"
        return what, WRONG
    if report.interrupted:
        if not report.tested:
            return f"INTERRUPTED: {report.candidate} was not tested", OK
        count = f"{report.tested} of {report.total}"
        return f"INTERRUPTED: {report.candidate} holds in what was tested before that, {count}", OK
    if not report.tested:
        return f"NOTHING TESTED: {report.candidate} supports none of these cases", USAGE
    if report.too_little:
        return f"TOO LITTLE TESTED: {report.candidate}: {report.little}", LITTLE
    if untested:
        return f"NOT TESTED: {', '.join(untested)}, which --require asks for", LITTLE
    return f"RIGHT: {report.candidate} holds in all that was tested, {report.tested} of {report.total}{known}", OK


def describe(result: Result, first_seed: int = 0) -> Iterator[str]:
    """A line for the case, and one for each tensor that is wrong, and for what it looks like."""
    name = result.case if result.seed == first_seed else f"{result.case} (seed {result.seed})"
    worst = max(result.tested, key=lambda c: c.worst, default=None)
    if worst is None:
        reasons = dict.fromkeys(c.text for c in result.checks)
        yield f"  --     {name:40} {result.status}: {', '.join(reasons)}"
        return
    mark = "ok    " if result.status != "wrong" else "known " if result.expected else "WRONG "
    conditions = [c.tensor for c in result.tested if c.tensor in CONDITIONS]
    tensors = ", ".join(c.tensor for c in result.tested if c.tensor not in CONDITIONS)
    units = f"{worst.worst:9.3g}" if worst.worst < math.inf else f"{'-':>9}"
    also = f"; {len(conditions)} conditions" if conditions else ""
    yield f"  {mark} {name:40} {units} sigma in {worst.tensor:5} of {tensors}{also}"
    blind = [f"{c.tensor} ({c.text})" for c in result.checks if c.status == "no power"]
    if blind:
        yield f"           no power: {', '.join(blind)}"
    for check in result.checks:
        if check.status == "wrong":
            text = check.text if check.text.startswith(check.tensor) else f"{check.tensor} {check.text}"
            yield f"           {text}"
    for explanation in result.explanations:
        yield f"           => {explanation.text}"


def table(report: Report) -> Iterator[str]:
    """What was tested of each feature, and the largest error in it."""
    yield f"\n{'feature':18} {'tested':>11}  {'worst':>9}  where"
    for feature, results in report.features().items():
        checks = [(r.case, c) for r in results for c in r.checks]
        known = {r.case for r in report.results if r.expected}
        tested = [(name, c) for name, c in checks if c.status in ("ok", "wrong")]
        if not tested:
            reasons = dict.fromkeys(name for _, c in checks for name in c.text.split(", "))
            yield f"{feature:18} {f'0 of {len(checks)}':>11}  {'':9}  {', '.join(reasons)}"
            continue
        name, worst = max(tested, key=lambda pair: (pair[1].status == "wrong", pair[0] not in known, pair[1].worst))
        where = f"{worst.tensor}[{', '.join(map(str, worst.index))}] in {name}" if worst.index else name
        note = "" if worst.status != "wrong" else "  known" if name in known else "  WRONG"
        units = f"{worst.worst:9.3g}" if worst.worst < math.inf else f"{'-':>9}"
        yield f"{feature:18} {f'{len(tested)} of {len(checks)}':>11}  {units}  {where}{note}"
    yield "worst: the largest error in units of the rounding error that is predicted there (sigma)"


SHOWN = 3  # wrong cases on the first screen


def summary(report: Report, verbose: bool) -> Iterator[str]:
    """What stands below the verdict: how much was tested, what it looks like, and the first that are wrong."""
    yield from _coverage(report)
    if report.diagnosis:
        yield f"\n{'it looks like':58} cases"
        for text, names in list(report.diagnosis.items())[: None if verbose else 8]:
            yield f"  {text:56} {len(names):5}  {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    yield from _rules(report)
    if not verbose and report.wrong:
        yield ""
        for result in report.wrong[:SHOWN]:
            yield from describe(result, report.results[0].seed)
        more = len(report.wrong) - SHOWN
        yield f"  {f'and {more} more cases; ' if more > 0 else ''}-v shows all"
    hints = report.hints()
    if hints:
        yield ""
        yield from hints


def _coverage(report: Report) -> Iterator[str]:
    def texts(status: str) -> dict[str, None]:
        return dict.fromkeys(c.text for r in report.results for c in r.checks if c.status == status)

    cases = sum(bool(r.tested) for r in report.results)
    yield f"tested {report.tested} of {report.total} tensors and conditions, in {cases} of {report.asked} cases"
    worst = max(((c.worst, c.tensor, r.case) for r in report.results for c in r.checks if c.status == "ok"), default=None)
    if worst and worst[0]:
        yield f"largest error that holds: {worst[0]:.3g} sigma, in {worst[1]} of {worst[2]}"
    blind = sum(c.status == "no power" for r in report.results for c in r.checks)
    if blind:
        yield f"no power in {blind}: there the judge could not have failed"
    if report.refused:
        yield f"refused: {report.refusals()}"
    unsupported = dict.fromkeys(name for text in texts("not supported") for name in text.split(", "))
    if unsupported:
        yield f"not supported: {', '.join(unsupported)}"
    missing = [text for text in texts("not given") if text != WRONG_BEFORE]
    if missing:
        yield f"not given: {'; '.join(missing)}"
    if lost := texts("lost"):
        yield f"lost: {'; '.join(lost)}"
    if report.unused:
        yield f"in the signature, and tested in no case: {', '.join(report.unused)}"
    if report.unsettled:
        yield f"expected to fail, and only partly tested: {', '.join(dict.fromkeys(r.case for r in report.unsettled))}"
    if len(report.results) < report.asked:
        yield f"stopped after {len(report.results)} of {report.asked} cases"


def _rules(report: Report) -> Iterator[str]:
    """What the rules of other suites say of the same tensors."""
    for rule in report.rules:
        judged = [(r.case, c) for r in report.results for c in r.checks if rule in c.rules]
        refused = [(name, c) for name, c in judged if not c.rules[rule]]
        apart = [f"{name}: {c.tensor}" for name, c in judged if c.rules[rule] != (c.status != "wrong")]
        yield f"\nrule {rule}: rejects {len(refused)} of {len(judged)} tensors; npattn rejects " + str(
            sum(c.status == "wrong" for _, c in judged)
        ) + (f"; they differ in {len(apart)}: {', '.join(apart[:5])}{', ...' if len(apart) > 5 else ''}" if apart else "")


def _candidates() -> Iterator[str]:
    from npattn.verify.candidates import BUILT_IN
    from npattn.verify.peers import PEERS

    for name, (op, _) in BUILT_IN.items():
        yield f"{name:24} {op:12} npattn"
    for name, peer in PEERS.items():
        yield f"{name:24} {peer.op:12} {peer.library}"


def _conventions() -> Iterator[str]:
    for name, values in FIELDS.items():
        yield f"{name:18} {values.conflict:4} {values.use:10} {values.meaning}"
        for value, meaning in values.values.items():
            yield f"    {name}={value:18} {meaning}"
    yield "\npresets"
    for name, preset in PRESETS.items():
        changes = ", ".join(f"{n}={v}" for n, v in preset.convention.changes().items())
        yield f"{name:14} {changes or 'the first value of each'}"
        yield f"{'':14} {preset.source}{'; ' + preset.note if preset.note else ''}"


@contextlib.contextmanager
def _progress(total: int, verbose: bool) -> Iterator[Callable[[Iterable[str]], None]]:
    """Takes the lines of each case when it is done. On a terminal, where rich is there, they stand above a progress bar."""
    if sys.stdout is not None and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.progress import Progress

            with Progress(transient=True) as bar:
                task = bar.add_task("verify", total=total)

                def advance(lines: Iterable[str]) -> None:
                    for line in lines:
                        bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
                    bar.advance(task)

                yield advance
            return
    done, counts = 0, not verbose and sys.stderr is not None and sys.stderr.isatty()

    def count(lines: Iterable[str]) -> None:
        nonlocal done
        done += 1
        if lines := list(lines):
            say(*lines)
        tell(f"\r{done} of {total} cases")

    def tell(text: str) -> None:
        if counts:
            with contextlib.suppress(OSError, ValueError):
                print(text, end="", file=sys.stderr, flush=True)

    try:
        yield count
    finally:
        tell("\r\033[K")


# --- peers ----------------------------------------------------------------------------------------------------------------


def peers_command(given: argparse.Namespace) -> int:
    from npattn.verify.peer_report import page

    _writable(given.write, "write")
    text = page(given.only, lambda line: print(line, file=sys.stderr))
    if not given.write:
        say(text)
        return OK
    try:
        given.write.write_text(text)
    except OSError as error:
        raise UnwrittenError(f"--write {given.write}: {error.strerror or error}") from None
    return OK


# --- env ------------------------------------------------------------------------------------------------------------------


def env_command(given: argparse.Namespace) -> int:
    say(*(f"{name:12} {value}" for name, value in environment.describe().items()))
    return OK
