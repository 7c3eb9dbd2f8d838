"""The command line: one verb a function.

    npattn verify [CANDIDATE]     is this implementation right, and if not, what does it do instead?
    npattn peers                  what the installed libraries do
    npattn env                    versions, BLAS and its kernels, threads
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import npattn
from npattn import environment
from npattn.verify import CandidateError, Report, Result, Settings, load, verify
from npattn.verify.candidates import OPS
from npattn.verify.conditions import CONDITIONS
from npattn.verify.conventions import FIELDS, PRESETS, near, parse
from npattn.verify.diagnose import Diagnostician
from npattn.verify.judge import LEVELS, RULES
from npattn.verify.precision import PRECISIONS
from npattn.verify.report import CASES_OF, check_features, examine_all

OK, WRONG, USAGE = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="npattn", description="The reference for attention.")
    parser.add_argument("--version", action="version", version=f"npattn {npattn.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _verify_arguments(verbs)
    p = verbs.add_parser("peers", help="verify the installed libraries and say what they do")
    p.add_argument("--write", metavar="FILE", type=Path, help="write the page there instead of printing it")
    p.add_argument("--only", metavar="NAME", action="append", default=[], help="this built-in candidate alone")
    p.set_defaults(run=peers_command)
    verbs.add_parser("env", help="what this machine computes with").set_defaults(run=env_command)
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except CandidateError as error:
        print(f"npattn verify: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        # The reader of the pipe has gone; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE


def _verify_arguments(verbs: Any) -> None:
    v = verbs.add_parser(
        "verify",
        help="verify an implementation against the reference",
        description="Exit status: 0 = all that was tested holds, 1 = something falls short, or a required feature was not "
        "tested, or an expected failure holds, 2 = usage, nothing importable or nothing tested.",
    )
    names = "blockwise (default), another of --list-candidates, package.module:function or path/to/file.py:function"
    v.add_argument("candidate", nargs="?", help=names)
    v.add_argument("--backward", metavar="FUNCTION", help="its backward: (dout, q, k, v, *, ...) -> (dq, dk, dv) or a mapping")
    v.add_argument("--op", choices=OPS, help="what it implements (default attention, or that of a built-in name)")
    v.add_argument("--level", choices=(*LEVELS, "bounded"), default="good", help="how good it has to be (default good)")
    classes = f"what it computes in: {', '.join(PRECISIONS)}"
    v.add_argument("--precision", choices=tuple(PRECISIONS), metavar="CLASS", help=classes)
    v.add_argument("--convention", metavar="NAMES", default="npattn",
                   help=f"PRESET or field=value,...: {', '.join(PRESETS)} (--list-conventions)")  # fmt: skip
    v.add_argument("--causal", choices=tuple(FIELDS["causal"].values), help="short for --convention causal=...")
    v.add_argument("--rule", choices=tuple(RULES), action="append", default=[], help="also say what this suite's rule says")
    v.add_argument("--expect-failure", metavar="CASE=REASON", action="append", default=[],
                   help="this case is known to fail; it still runs, and is an error once it holds")  # fmt: skip
    v.add_argument("--json", metavar="FILE", type=Path, help="write all results there")
    v.add_argument("-k", dest="text", metavar="TEXT", default="", help="only cases with TEXT in their name, or of that feature")
    v.add_argument("--case", metavar="NAME", help="this case alone")
    v.add_argument("--seed", type=int, default=0, metavar="N", help="draw the inputs with this seed (default 0)")
    v.add_argument("--deep", action="store_true", help="three seeds, and options in random combinations")
    v.add_argument("--shrink", action="store_true", help="make the first case that is wrong as small as it still fails")
    v.add_argument("--save", metavar="FILE", type=Path, help="write that case there, as .npz")
    v.add_argument("-x", dest="stop", action="store_true", help="stop at the first case that is wrong")
    v.add_argument("--require", metavar="FEATURE", action="append", default=[], help="fail if FEATURE was not tested")
    v.add_argument("--no-diagnosis", dest="diagnose", action="store_false", help="do not look for what it does instead")
    v.add_argument("--self-test", action="store_true", help="verify verify: seeded bugs have to be caught and named")
    v.add_argument("--list", action="store_true", help="list the cases and their features, run nothing")
    v.add_argument("--list-candidates", action="store_true", help="list the built-in candidates")
    v.add_argument("--list-conventions", action="store_true", help="list the fields of a convention, their values and presets")
    v.set_defaults(run=verify_command)


# --- verify ---------------------------------------------------------------------------------------------------------------


def verify_command(given: argparse.Namespace) -> int:
    if given.list_candidates or given.list_conventions:
        print("\n".join(_candidates() if given.list_candidates else _conventions()))
        return OK
    if given.seed < 0:
        raise CandidateError(f"--seed {given.seed}: expected 0 or more")
    if given.self_test:
        from npattn.verify.selftest import run_self_test

        return OK if run_self_test(print) else WRONG
    convention = given.convention if given.causal is None else f"{given.convention},causal={given.causal}"
    try:
        parsed = parse(convention)
    except ValueError as error:
        raise CandidateError(str(error)) from None
    candidate = load(given.candidate or DEFAULTS[given.op or "attention"], given.backward, parsed, given.op)
    cases = _chosen(given, candidate.op)
    if given.list:
        for case in cases:
            print(f"{case.name:40} {', '.join(case.features)}")
        return OK
    for name in ("json", "save"):
        _writable(getattr(given, name), name)
    started = time.perf_counter()
    seeds = range(given.seed, given.seed + (3 if given.deep else 1))
    with _lines(len(cases) * len(seeds)) as line:

        def show(result: Result) -> None:
            for text in describe(result, given.seed):
                line(text)
            line(None)

        report = verify(
            candidate, level=given.level, precision=given.precision, cases=cases, seeds=seeds, rules=given.rule,
            expected_failures=_failures(given.expect_failure, [case.name for case in cases]), stop=given.stop,
            diagnose=given.diagnose, on_result=show,
        )  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(report.as_json(), indent=1, allow_nan=False) + "\n")
    print("\n".join(summary(report, len(cases) * len(seeds))))
    print("\n".join(report.hints()), end="\n" * bool(report.hints()))
    if given.shrink or given.save:
        print("\n".join(_one(given, candidate, cases, report)))
    untested = report.untested(given.require)
    verdict, status = _verdict(report, untested)
    print(f"\n{verdict} ({time.perf_counter() - started:.1f} s)")
    return status


DEFAULTS = {"attention": "blockwise", "multi_head": "multi-head-blockwise", "rnn": "rnn", "softmax": "softmax"}


def _chosen(given: argparse.Namespace, op: str) -> list[Any]:
    """The cases that are asked for."""
    text, table = given.text.lower(), list(CASES_OF[op])
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
    found = {}
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
            path.open("ab").close()
            if new:
                path.unlink()  # perhaps there will be nothing to write
        except OSError as error:
            raise CandidateError(f"--{option} {path}: {error.strerror}") from None


def _one(given: argparse.Namespace, candidate: Any, cases: list[Any], report: Report) -> Iterator[str]:
    """The first case that is wrong, or the only one: made small, and saved."""
    from npattn.verify import replay

    by_name = {case.name: case for case in cases}
    wrong = next(iter(report.wrong), report.results[0] if len(cases) == 1 else None)
    if wrong is None:
        yield "\nno case is wrong: nothing to shrink or save"
        return
    case = by_name[wrong.case]
    settings = Settings(given.level, None if given.precision is None else PRECISIONS[given.precision])
    if given.shrink and wrong.status != "wrong":
        yield f"\n{case.name} is not wrong: nothing to shrink"
    elif given.shrink and candidate.op != "attention":
        yield f"\n{case.name}: cases of {candidate.op} are not made smaller"
    elif given.shrink:
        case = replay.shrink(candidate, case, wrong.seed, settings)
        yield f"\n{case.name}, as small as it still fails: {replay.shapes(case, wrong.seed)}"
        diagnostician = Diagnostician(candidate.align) if given.diagnose else None
        wrong = examine_all(candidate, case, wrong.seed, settings, diagnostician)
        yield from describe(wrong, given.seed)
    if given.save:
        replay.save(given.save, candidate, case, wrong.seed, settings, wrong)
        yield f"saved {case.name}, seed {wrong.seed}, to {given.save}"


def _verdict(report: Report, untested: list[str]) -> tuple[str, int]:
    expected = sum(bool(r.expected) and r.status == "wrong" for r in report.results)
    known = f", {expected} expected to fail" if expected else ""
    if not report.tested:
        return f"NOTHING TESTED: {report.candidate} supports none of these cases", USAGE
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
    if untested:
        return f"NOT TESTED: {', '.join(untested)}, which --require asks for", WRONG
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


def summary(report: Report, cases: int) -> Iterator[str]:
    """The table by feature, the diagnosis, and the coverage."""
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
    if report.diagnosis:
        yield f"\n{'it looks like':58} cases"
        for text, names in report.diagnosis.items():
            yield f"  {text:56} {len(names):5}  {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    yield from _rules(report)
    yield f"\n{'; '.join(_coverage(report, cases))}"
    yield "worst: the largest error in units of the rounding error that is predicted there (sigma)"


def _coverage(report: Report, cases: int) -> Iterator[str]:
    def texts(status: str) -> dict[str, None]:
        return dict.fromkeys(c.text for r in report.results for c in r.checks if c.status == status)

    yield f"tested {report.tested} of {report.total}"
    blind = sum(c.status == "no power" for r in report.results for c in r.checks)
    if blind:
        yield f"no power in {blind}: there the judge could not have failed"
    unsupported = texts("not supported")
    if unsupported:
        yield f"not supported: {', '.join(dict.fromkeys(name for text in unsupported for name in text.split(', ')))}"
    yield from texts("not given")
    if len(report.results) < cases:
        yield f"stopped after {len(report.results)} of {cases} cases"


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
def _lines(total: int) -> Iterator[Callable[[str | None], None]]:
    """Prints lines; on a terminal, where rich is there, above a progress bar. None: a case is done."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.progress import Progress

            with Progress() as bar:
                task = bar.add_task("verify", total=total)

                def line(text: str | None) -> None:
                    if text is None:
                        bar.advance(task)
                    else:
                        bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

                yield line
            return
    yield lambda text: None if text is None else print(text)


# --- peers ----------------------------------------------------------------------------------------------------------------


def peers_command(given: argparse.Namespace) -> int:
    from npattn.verify.peer_report import page

    _writable(given.write, "write")
    text = page(given.only, lambda line: print(line, file=sys.stderr))
    if given.write:
        given.write.write_text(text)
    else:
        print(text)
    return OK


# --- env ------------------------------------------------------------------------------------------------------------------


def env_command(given: argparse.Namespace) -> int:
    for name, value in environment.describe().items():
        print(f"{name:12} {value}")
    return OK
