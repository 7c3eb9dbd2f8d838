"""The command line: one verb a function.

    npattn verify [CANDIDATE]     is this implementation right, and if not, what does it do instead?
    npattn peers                  what the installed libraries do
    npattn run TASK --model DIR   texts through a model: summarization, translation, sentiment-analysis, text-generation ...
    npattn train TASK --out DIR   pre-training and fine-tuning: lm, sentiment, question-answering, translation ...
    npattn show --model DIR TEXT  what the heads of a model look at, and the gradient of one logit
    npattn env                    versions, BLAS and its kernels, threads
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

import npattn
from npattn import environment
from npattn.arguments import (
    add_run,
    add_show,
    add_train,
    add_verify,
    asked,
    check_together,
    check_writable,
    file,
    model_settings,
    some_text,
)
from npattn.verify import CandidateError, Report, Result, text
from npattn.verify.ops import OPS
from npattn.verify.runs import PAIRS, TRIPLES, Runs
from npattn.verify.worker import LostError

OK, WRONG, USAGE, LITTLE, UNWRITTEN, INTERRUPTED = 0, 1, 2, 3, 4, 130
STATUSES = {
    OK: "right: all that was tested holds",
    WRONG: "wrong: something falls short, crashes or hangs, or an expected failure holds",
    USAGE: "usage: nothing to verify, or nothing tested",
    LITTLE: "too little tested: most was refused, or what --require names was not tested",
    UNWRITTEN: "a report could not be written, or npattn itself failed; whatever the verdict is",
    INTERRUPTED: "interrupted; what was done so far is reported",
}
STATUS_OF = {
    "right": OK, "wrong": WRONG, "unexpected": WRONG, "interrupted": INTERRUPTED, "nothing tested": USAGE,
    "too little tested": LITTLE, "not tested": LITTLE,
}  # fmt: skip
"""The exit status of each of `Report.verdict`."""


class UnwrittenError(Exception):
    """A report could not be written."""


def main(arguments: list[str] | None = None) -> int:
    _open_what_is_closed()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a candidate may say what the terminal's encoding does not have
    parser = argparse.ArgumentParser(prog="npattn", description="The reference for attention.")
    parser.add_argument("--version", action="version", version=f"npattn {npattn.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_verify(verbs, STATUSES).set_defaults(run=verify_command)
    p = verbs.add_parser("peers", help="verify the installed libraries and say what they do")
    p.add_argument("--write", metavar="FILE", type=file, help="write the page there instead of printing it")
    p.add_argument("--only", metavar="NAME", action="append", type=some_text, default=[], help="this built-in candidate alone")
    p.set_defaults(run=peers_command)
    p = verbs.add_parser("run", help="texts through a model: a text, files, or standard input")
    add_run(p)
    p.set_defaults(run=run_command)
    p = verbs.add_parser("train", help="train a model: pre-training and fine-tuning")
    add_train(p)
    p.set_defaults(run=train_command)
    p = verbs.add_parser("show", help="draw what the heads of a model look at, and the gradient of one logit")
    add_show(p)
    p.set_defaults(run=show_command)
    verbs.add_parser("env", help="what this machine computes with, and what would be faster").set_defaults(run=env_command)
    given, more = parser.parse_known_args(arguments)
    if more and (given.verb != "run" or any(text.startswith("-") for text in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        given.text += more  # argparse takes texts behind options for unknown
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


def _failed(what: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(what, file=sys.stderr, flush=True)
    return status


def _open_what_is_closed() -> None:
    """Opens 0, 1 and 2 where they are closed. Else a pipe or file of ours would get that number, and what is printed there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


@contextlib.contextmanager
def _ended_is_interrupted() -> Iterator[None]:
    """Makes SIGTERM, with which a CI ends what takes too long, an interrupt as Ctrl-C is."""

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
    """Prints, or raises UnwrittenError where stdout is closed, full, or a pipe that nobody reads any more."""
    try:
        if sys.stdout is None:
            raise OSError("stdout is closed")
        for line in lines:
            print(line)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # Python would try again, and complain, when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UnwrittenError(f"the report could not be printed: {getattr(error, 'strerror', None) or error}") from None


# --- verify ---------------------------------------------------------------------------------------------------------------


def verify_command(given: argparse.Namespace) -> int:
    check_together(given)
    if given.list_candidates or given.list_conventions:
        say(*(text.candidates() if given.list_candidates else text.conventions()))
        return OK
    if given.self_test:
        from npattn.verify.selftest import run_self_test, seeds

        return OK if run_self_test(say, seeds([OPS[given.op]] if given.op else OPS.values())) else WRONG
    spec, cases, expected, space = asked(given)
    numbers = range(given.seed, given.seed + (3 if given.deep else 1))
    if given.list:
        say(*text.cases(cases))
        return OK
    for option in ("json", "save"):
        check_writable(getattr(given, option), option)
    until = "" if given.fuzz else TRIPLES if given.deep else PAIRS
    with Runs(spec, given.timeout, cases, numbers, expected, space=space, until=until, seconds=given.fuzz or math.inf,
              stop=given.stop) as runs:  # fmt: skip
        return _run(given, runs, len(cases) * len(numbers))


def _run(given: argparse.Namespace, runs: Runs, named: int) -> int:
    """All results, and a report of what was done, even if the run is interrupted or nobody reads what it prints.

    named : how many results of named cases there will be
    """
    started, results, unwritten = time.perf_counter(), list[Result](), list[str]()
    interrupted = unread = False
    try:
        with _progress(None if runs.drawing else named, given.verbose) as shown:
            for result in runs.results():
                results.append(result)
                shown(text.describe(result, given.seed) if given.verbose else ())
    except KeyboardInterrupt:
        interrupted = True
    except UnwrittenError as error:
        unwritten.append(str(error))
        unread = True
    worker, coverage = runs.worker, runs.coverage()
    report = Report(results=results, level=given.level, precision=given.precision or "", rules=tuple(given.rule),
                    asked=named + runs.count, interrupted=interrupted or unread, coverage=coverage,
                    **dataclasses.asdict(worker.facts))  # fmt: skip
    more: list[str] = []
    if not report.interrupted:
        try:
            report = dataclasses.replace(report, fits=worker.fitting_precision(report, runs.named))
            more = [*_one(given, runs, report, unwritten)]
        except KeyboardInterrupt:
            interrupted, report = True, dataclasses.replace(report, interrupted=True)
    if runs.faults:
        unwritten.append(f"{runs.faults[0]}npattn verify: a fault of npattn's own in {len(runs.faults)} questions")
    if given.json:
        try:
            given.json.write_text(json.dumps(report.as_json(), indent=1, allow_nan=False) + "\n")
        except OSError as error:
            unwritten.append(f"--json {given.json}: {error.strerror or error}")
    verdict = f"{text.verdict(report, given.require)} ({time.perf_counter() - started:.1f} s)"
    try:
        say(*([*text.table(report), ""] if given.verbose else []), verdict, *text.summary(report, given.verbose), *more)
    except UnwrittenError as error:
        unwritten.append(str(error))
        unread = True
    if unread:
        unwritten[-1] += f". {verdict}"
    for failure in dict.fromkeys(unwritten):
        _failed(f"npattn verify: {failure}", UNWRITTEN)
    return INTERRUPTED if interrupted else UNWRITTEN if unwritten else STATUS_OF[report.verdict(given.require)]


def _one(given: argparse.Namespace, runs: Runs, report: Report, unwritten: list[str]) -> Iterator[str]:
    """The first case that is wrong, or the only one: made small, and saved. Yields what to say about that."""
    if not (given.shrink or given.save or given.fuzz):
        return
    worker = runs.worker
    result = next(iter(report.wrong), report.results[0] if len(report.results) == 1 else None)
    if result is None:
        if given.shrink or given.save:
            yield text.NOTHING_WRONG
        return
    case = runs.case(result.case)
    try:
        if given.shrink and (result.status != "wrong" or not case.smaller()):
            yield text.not_shrunk(case.name, report.op, result.status == "wrong")
        elif given.shrink or given.fuzz:
            case, shapes, result = worker.shrink(case, result.seed)
            yield from text.smallest(shapes, result, given.seed)
        if given.fuzz:
            yield from ["", *(worker.code(case, result) or ["its arrays are too large to be printed: give --save"])]
        if given.save and (failure := worker.save(given.save.absolute(), case, result)):
            unwritten.append(f"--save {given.save}: {failure}")
        elif given.save:
            yield text.saved(case.name, result.seed, given.save)
    except LostError as error:
        yield text.lost(case.name, "made smaller" if given.shrink else "saved", error)
        if given.save:
            unwritten.append(f"--save {given.save}: {error}")


@contextlib.contextmanager
def _progress(total: int | None, verbose: bool) -> Iterator[Callable[[Iterable[str]], None]]:
    """Takes the lines of each case when it is done. On a terminal they stand above a progress bar, if rich is installed."""
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
        tell(f"\r{done} of {total} cases" if total else f"\r{done} cases")

    def tell(what: str) -> None:
        if counts:
            with contextlib.suppress(OSError, ValueError):
                print(what, end="", file=sys.stderr, flush=True)

    try:
        yield count
    finally:
        tell("\r\033[K")


# --- peers ----------------------------------------------------------------------------------------------------------------


def peers_command(given: argparse.Namespace) -> int:
    from npattn.verify.peer_page import page

    check_writable(given.write, "write")
    written = page(given.only, lambda line: print(line, file=sys.stderr))
    if not given.write:
        say(written)
        return OK
    try:
        given.write.write_text(written)
    except OSError as error:
        raise UnwrittenError(f"--write {given.write}: {error.strerror or error}") from None
    return OK


# --- models ---------------------------------------------------------------------------------------------------------------


def run_command(given: argparse.Namespace) -> int:
    from npattn.applications import run

    with _models_errors_are_usage():
        for piece in run(given.task, given.model, _texts(given), model_settings(given), given.seed):
            _write(piece)
    return OK


def train_command(given: argparse.Namespace) -> int:
    check_writable(given.plot, "plot")
    environment.keep_memory()
    with _models_errors_are_usage():
        task = importlib.import_module(f"npattn.training.{given.task.replace('-', '_')}")
        try:
            return OK if task.run(given, say) else INTERRUPTED
        except OSError as error:
            raise UnwrittenError(str(error)) from None
        except ArithmeticError as error:  # `npattn.training.loop.NotFiniteError`
            return _failed(f"npattn train: {error}", WRONG)


def show_command(given: argparse.Namespace) -> int:
    from npattn.models.folder import load
    from npattn.models.look import described, draw, look

    check_writable(given.plot, "plot")
    with _models_errors_are_usage():
        seen = look(load(given.model), given.text, token=given.token, target=given.target)
        say(*described(seen))
        if given.plot:
            draw(seen, given.plot)
    return OK


def _texts(given: argparse.Namespace) -> list[str]:
    """The texts of the command line, then those of files; else what standard input holds."""
    try:
        texts = [*given.text, *(path.read_text(encoding="utf-8") for path in given.file)]
        return texts or [sys.stdin.read().removesuffix("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise CandidateError(str(error)) from None


def _write(what: str) -> None:
    """Text that is shown as soon as it is known."""
    try:
        sys.stdout.write(what)
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError) as error:
        raise UnwrittenError(f"the text could not be printed: {getattr(error, 'strerror', None) or error}") from None


@contextlib.contextmanager
def _models_errors_are_usage() -> Iterator[None]:
    """A damaged folder or a wrong setting is the caller's affair, and no fault of npattn's."""
    try:
        yield
    except (TypeError, ValueError, ImportError) as error:
        raise CandidateError(str(error)) from None


# --- env ------------------------------------------------------------------------------------------------------------------


def env_command(given: argparse.Namespace) -> int:
    say(*(f"{name:12} {value}" for name, value in environment.describe().items()))
    if busy := environment.busy():
        say(f"{'busy':12} {busy}: what follows is measured, and may be wrong")
    say(*(f"{'faster':12} {text}" for text in environment.advice() or ["nothing that was tried"]))
    return OK
