"""The command line: one verb a function.

    npattn verify [CANDIDATE]     is this implementation of attention right?
    npattn env                    versions, BLAS and its kernels, threads
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import npattn
from npattn import environment
from npattn.verify import CASES, CandidateError, Case, Report, Result, load, verify
from npattn.verify.candidates import CANONICAL, OWN_KEYWORDS
from npattn.verify.judge import GRADIENTS

OK, WRONG, USAGE = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="npattn", description="The reference for attention.")
    parser.add_argument("--version", action="version", version=f"npattn {npattn.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    v = verbs.add_parser(
        "verify",
        help="verify an implementation of attention against the reference",
        description="Exit status: 0 = all that was tested holds, 1 = something falls short or a required feature was not "
        "tested, 2 = usage, nothing importable or nothing tested.",
    )
    names = "blockwise (default), torch, package.module:function or path/to/file.py:function"
    v.add_argument("candidate", nargs="?", default="blockwise", help=names)
    v.add_argument("--backward", metavar="FUNCTION", help="its backward: (dout, q, k, v, *, ...) -> (dq, dk, dv) or a mapping")
    aligned = "the alignment that its own causal and window keywords have where L != S (default top_left)"
    v.add_argument("--causal", choices=("top_left", "bottom_right"), default="top_left", help=aligned)
    v.add_argument("--json", metavar="FILE", type=Path, help="write all results there")
    v.add_argument("-k", dest="text", metavar="TEXT", default="", help="only cases with TEXT in their name, or of that feature")
    v.add_argument("-x", dest="stop", action="store_true", help="stop at the first case that is wrong")
    v.add_argument("--list", action="store_true", help="list the cases and their features, run nothing")
    v.add_argument("--require", metavar="FEATURE", action="append", default=[], help="fail if FEATURE was not tested")
    v.set_defaults(run=verify_command)
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


# --- verify ---------------------------------------------------------------------------------------------------------------


def verify_command(given: argparse.Namespace) -> int:
    text = given.text.lower()
    cases = [case for case in CASES if text in case.name.lower() or text in map(str.lower, case.features)]
    features = {f for case in CASES for f in case.features} | {"lse", "backward", "dbias", "dsink"}
    unknown = [f for f in given.require if f not in features]
    if unknown:
        raise CandidateError(f"--require {unknown[0]}: no such feature, expected one of {', '.join(sorted(features))}")
    if not cases:
        raise CandidateError(f"-k {given.text}: no case has that in its name; --list lists them")
    if given.list:
        for case in cases:
            print(f"{case.name:40} {', '.join(case.features)}")
        return OK
    candidate = load(given.candidate, given.backward, given.causal)
    if given.json:
        try:
            given.json.touch()
        except OSError as error:
            raise CandidateError(f"--json {given.json}: {error.strerror}") from None
    started, results = time.perf_counter(), []
    with _lines(len(cases)) as line:
        for result in verify(candidate, cases, stop=given.stop):
            results.append(result)
            for text in describe(result):
                line(text)
            line(None)
    report = Report(candidate.name, results)
    if given.json:
        given.json.write_text(json.dumps(report.as_json(), indent=1, allow_nan=False) + "\n")
    print("\n".join(summary(report, cases)))
    if candidate.strangers:
        names = ", ".join((*CANONICAL, *OWN_KEYWORDS))
        print(f"{candidate.name} also takes {', '.join(candidate.strangers)}, which verify never gives: its names are {names}")
    untested = report.untested(given.require)
    verdict, status = _verdict(report, untested)
    print(f"\n{verdict} ({time.perf_counter() - started:.1f} s)")
    return status


def _verdict(report: Report, untested: list[str]) -> tuple[str, int]:
    if not report.tested:
        return f"NOTHING TESTED: {report.candidate} supports none of these cases", USAGE
    if report.wrong:
        names = ", ".join(r.case for r in report.wrong[:4]) + (", ..." if len(report.wrong) > 4 else "")
        return f"WRONG: {report.candidate} falls short in {len(report.wrong)} of {len(report.results)} cases: {names}", WRONG
    if untested:
        return f"NOT TESTED: {', '.join(untested)}, which --require asks for", WRONG
    return f"RIGHT: {report.candidate} holds in all that was tested, {report.tested} of {report.total}", OK


def describe(result: Result) -> Iterator[str]:
    """A line for the case, and one for each tensor that is wrong."""
    worst = max(result.tested, key=lambda c: c.worst, default=None)
    if worst is None:
        reasons = dict.fromkeys(c.text for c in result.checks)
        yield f"  --     {result.case:40} {result.status}: {', '.join(reasons)}"
        return
    mark = "WRONG " if result.status == "wrong" else "ok    "
    tensors = ", ".join(c.tensor for c in result.tested)
    units = f"{worst.worst:9.3g}" if worst.worst < math.inf else f"{'-':>9}"
    yield f"  {mark} {result.case:40} {units} sigma in {worst.tensor:5} of {tensors}"
    for check in result.checks:
        if check.status == "wrong":
            text = check.text if check.text.startswith(check.tensor) else f"{check.tensor} {check.text}"
            yield f"           {text}"


def summary(report: Report, cases: list[Case]) -> Iterator[str]:
    """The table by feature, and the coverage."""
    yield f"\n{'feature':18} {'tested':>11}  {'worst':>9}  where"
    for feature, results in report.features().items():
        checks = [(r.case, c) for r in results for c in r.checks]
        tested = [(name, c) for name, c in checks if c.status in ("ok", "wrong")]
        if not tested:
            reasons = dict.fromkeys(name for _, c in checks for name in c.text.split(", "))
            yield f"{feature:18} {f'0 of {len(checks)}':>11}  {'':9}  {', '.join(reasons)}"
            continue
        name, worst = max(tested, key=lambda pair: (pair[1].status == "wrong", pair[1].worst))
        where = f"{worst.tensor}[{', '.join(map(str, worst.index))}] in {name}" if worst.index else name
        note = "  WRONG" if worst.status == "wrong" else ""
        units = f"{worst.worst:9.3g}" if worst.worst < math.inf else f"{'-':>9}"
        yield f"{feature:18} {f'{len(tested)} of {len(checks)}':>11}  {units}  {where}{note}"
    unsupported = dict.fromkeys(
        c.text for r in report.results for c in r.checks if c.status == "not supported"
    )
    absent = dict.fromkeys(
        c.text for r in report.results for c in r.checks if c.status == "not given" and (c.tensor in ("lse", *GRADIENTS))
    )
    parts = [f"tested {report.tested} of {report.total}"]
    if unsupported:
        names = dict.fromkeys(name for text in unsupported for name in text.split(", "))
        parts.append(f"not supported: {', '.join(names)}")
    parts += list(absent)
    if len(report.results) < len(cases):
        parts.append(f"stopped after {len(report.results)} of {len(cases)} cases")
    yield f"\n{'; '.join(parts)}"
    yield "worst: the largest error in units of the rounding error that is predicted there (sigma)"


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


# --- env ------------------------------------------------------------------------------------------------------------------


def env_command(given: argparse.Namespace) -> int:
    for name, value in environment.describe().items():
        print(f"{name:12} {value}")
    return OK


if __name__ == "__main__":
    sys.exit(main())

