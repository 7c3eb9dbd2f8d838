"""A candidate runs in a process of its own, so that nothing it does to that process harms verify.

It may end the process, crash it, hang, close its output, or start threads and processes. The process is spawned, not forked,
because BLAS and torch hang after a fork. Everything that a case needs happens there: the calls, the judgement, the diagnosis.
`Worker` asks for it, watches the time of each call, and starts a new process if one is lost. `LoadedCandidate` answers there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from npattn.verify import replay
from npattn.verify.api import examine_all, fitting_precision
from npattn.verify.candidate import REFUSALS, CandidateError, call_forward, load, message_of
from npattn.verify.conditions import examine_conditions
from npattn.verify.conventions import Convention
from npattn.verify.explain import Diagnostician
from npattn.verify.judge import Check, Result, Settings, as_given, examine
from npattn.verify.report import Facts, Report

TIMEOUT = 120.0  # seconds for a call: the first may compile, and Python loops take half a minute. An import has at least this
HANGS = 3  # after this many calls without an answer, or failed starts, nothing more is asked
QUIET = 600.0  # seconds without a message between calls of the candidate: judgement and diagnosis take a few seconds


@dataclass(frozen=True)
class Spec:
    """What is to be loaded, and how it is judged."""

    name: str
    backward: str | None
    convention: Convention
    op: str | None
    settings: Settings
    diagnose: bool
    options: tuple[str, ...] | None = None  # those that it takes; None: what its signature says
    refusals: str = REFUSALS[0]  # what counts as a refusal


class LostError(Exception):
    """The process ended, or was ended, before it answered."""

    def __init__(self, text: str, who: str) -> None:
        super().__init__(text)
        self.who = who  # the call that was running: "forward", "backward" or "import"; "" if none was


class GivenUpError(LostError):
    """Too many calls had no answer (HANGS): nothing more is asked."""


class FaultError(LostError):
    """An exception in verify's own code, with its traceback. A candidate that changes npattn or NumPy may cause it, too."""


class Worker:
    """The candidate's process, as seen from verify's. Use it in a ``with`` statement, which starts and ends the process."""

    def __init__(self, spec: Spec, timeout: float = TIMEOUT, one_thread: bool = False) -> None:
        """one_thread : the candidate's libraries are told to use one thread, since other processes use the other processors"""
        self.spec, self.timeout, self.one_thread, self.hangs = spec, timeout, one_thread, 0
        self.facts: Any = None  # `Facts`, once the candidate is loaded
        self.faults: list[str] = []  # tracebacks of verify's own exceptions
        self.process: Any = None
        self.connection: Any = None

    def __enter__(self) -> Worker:
        self.facts = self._start()
        return self

    def __exit__(self, *what: object) -> None:
        self._end()

    # -- what is asked

    def examine(self, case: Any, seed: int) -> Result:
        """One case and its conditions. If the process is lost, the result says so."""
        try:
            result: Result = self._ask("examine", case, seed)
        except GivenUpError as error:
            return _lost_result(case, seed, "lost", str(error))
        except FaultError as error:
            return _lost_result(case, seed, "lost", f"a fault of npattn's own: {str(error).strip().splitlines()[-1]}")
        except LostError as error:
            return _lost_result(case, seed, "wrong", str(error), error.who)
        if result.status != "ok":
            return result
        try:
            return dataclasses.replace(result, checks=[*result.checks, *self._ask("conditions", case, seed)])
        except (GivenUpError, FaultError) as error:
            last = Check("repeat", "lost", str(error).strip().splitlines()[-1])
        except LostError as error:
            last = Check("repeat", "wrong", f"{error}, when it is called again", worst=float("inf"))
        return dataclasses.replace(result, checks=[*result.checks, last])

    def takes(self, case: Any, seed: int) -> bool:
        """Whether the forward accepts a case, right or wrong. Raises LostError."""
        return bool(self._ask("takes", case, seed))

    def fitting_precision(self, report: Report, cases: list[Any]) -> str:
        with contextlib.suppress(LostError):
            return str(self._ask("fitting_precision", report, cases))
        return ""

    def shrink(self, case: Any, seed: int) -> tuple[Any, str, Result]:
        """The smallest case that is still wrong, its shapes, and its result. Raises LostError."""
        found: tuple[Any, str, Result] = self._ask("shrink", case, seed)
        return found

    def code(self, case: Any, result: Result) -> list[str]:
        """The call of a case as a program of its own. Raises LostError."""
        lines: list[str] = self._ask("code", case, result)
        return lines

    def save(self, path: Path, case: Any, result: Result) -> str:
        """Write a case to a file. Returns why that failed, "" if it did not. Raises LostError."""
        return str(self._ask("save", path, case, result))

    # -- how it is asked

    def _start(self) -> Facts:
        """A new process with the candidate loaded."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, sys.path), name="npattn candidate")
        with _no_interrupt(), _told_to_use_one_thread() if self.one_thread else contextlib.nullcontext():
            process.start()
        theirs.close()
        self.process = process
        try:
            facts: Facts = self._ask("load", self.spec)
            return facts
        except (LostError, CandidateError) as error:
            self._end()
            if self.facts is None:
                text = f"{self.spec.name} cannot be loaded: {error}" if isinstance(error, LostError) else str(error)
                raise CandidateError(text) from None
            self.hangs += 1
            raise LostError(f"it cannot be loaded again: {error}", "") from None  # no usage error: it was loaded once
        except BaseException:
            self._end()
            raise

    def kill(self) -> None:
        """No answer is waited for any more. Another thread may be waiting for one."""
        process = self.process
        if process is not None:
            process.kill()

    def _end(self) -> None:
        if self.process is None:
            return
        self.connection.close()
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and what it has started, even if it has ended itself
        self.process.kill()
        self.process.join()
        self.process = None

    def _ask(self, what: str, *given: Any) -> Any:
        """The answer to one question. Raises LostError, and CandidateError if the candidate cannot be loaded."""
        if self.hangs >= HANGS:
            raise GivenUpError(f"given up: {HANGS} times there was no answer", "")
        if self.process is None:
            self._start()
        heard = time.monotonic()
        running: dict[int, tuple[str, float]] = {}
        if what == "load":
            running[-1] = ("import", time.monotonic())
        try:
            self.connection.send((what, given))
            while True:
                first = min((start for _, start in running.values()), default=None)
                limit = max(self.timeout, TIMEOUT) if what == "load" else self.timeout
                left = max((heard + QUIET if first is None else first + limit) - time.monotonic(), 0)
                if not wait([self.connection], min(left, 1.0)):
                    if not self.process.is_alive():  # a fork of it may keep the connection open
                        raise EOFError
                    if left == 0:
                        raise self._hung(next((name for name, start in running.values() if start == first), ""))
                    continue
                kind, *rest = self.connection.recv()
                heard = time.monotonic()
                if kind == "begin":
                    running[rest[0]] = (rest[1], time.monotonic())
                elif kind == "end":
                    running.pop(rest[0], None)
                elif kind == "usage":
                    raise CandidateError(rest[0])
                elif kind == "fault":
                    self.faults.append(rest[0])
                    raise FaultError(rest[0], "")
                else:
                    return rest[0]
        except (EOFError, OSError, pickle.UnpicklingError):
            who = next((name for name, _ in running.values()), "")
            raise self._died(who) from None

    def _hung(self, who: str) -> LostError:
        self.hangs += 1
        if hasattr(signal, "SIGUSR1") and who != "import":
            print(f"npattn verify: no answer from the {who or 'judgement'}; it is here:", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                os.kill(self.process.pid, signal.SIGUSR1)
                time.sleep(0.3)  # until its traceback is written
        self._end()
        if not who:
            return LostError(f"its results cannot be judged within {QUIET:g} s", who)
        limit = max(self.timeout, TIMEOUT) if who == "import" else self.timeout
        return LostError(f"{_subject(who)}gives no answer within {limit:g} s (--timeout)", who)

    def _died(self, who: str) -> LostError:
        self.process.join(5)
        code = self.process.exitcode
        self._end()
        if code is None:
            how = "closes the connection of its process"
        elif code < 0:
            how = f"crashes its process ({_signal(-code)})"
        else:
            how = f"ends its process with exit status {code}"
        return LostError(f"{_subject(who)}{how}", who)


def _subject(who: str) -> str:
    return f"the {who} " if who else "what the candidate has started "


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _lost_result(case: Any, seed: int, status: str, text: str, who: str = "") -> Result:
    """The result of a case if the process is lost."""
    problem = case.problem(seed)
    tensors = [*problem.outputs, *problem.gradients]
    at = problem.gradients[0] if who == "backward" and problem.gradients else tensors[0]
    rest = "the process is lost before" if status == "wrong" else text
    checks = [Check(t, status, text, worst=float("inf") if status == "wrong" else 0.0) if t == at
              else Check(t, "lost", rest) for t in tensors]  # fmt: skip
    return Result(case.name, case.features, checks, seed=seed)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C is for verify's process: a process that is started in this context does not get it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def _told_to_use_one_thread() -> Iterator[None]:
    """A process that is started in this context finds these variables set. What the user has set stays."""
    new = [name for name in THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(new, "1"))
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


RAISED_INTERRUPT = type("KeyboardInterrupt", (Exception,), {})
"""Stands for a KeyboardInterrupt that the candidate itself raises: a real one would end the run."""

# --- in the process ----------------------------------------------------------------------------------------------------------


def _serve(connection: Connection, path: list[str]) -> None:
    """Answer one question after the other until the connection is closed."""
    sys.path[:] = path
    _isolate(connection)
    loaded: Any = None
    lock = threading.Lock()

    def send(*message: Any) -> None:
        with lock:
            connection.send(message)

    while True:
        try:
            what, given = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # without the candidate's exit handlers
        try:
            if what == "load":
                loaded = LoadedCandidate(given[0], send)
                answer: Any = Facts.of(loaded.candidate)
            else:
                answer = getattr(loaded, what)(*given)
        except CandidateError as error:
            send("usage", str(error))
        except BaseException as error:  # verify's own: those of the candidate are caught around its calls
            if what == "load":
                send("usage", f"{given[0].name} cannot be loaded: {type(error).__name__}: {message_of(error)}")
            else:
                send("fault", traceback.format_exc())
        else:
            send("answer", answer)


def _isolate(connection: Connection) -> None:
    """Give the process a group of its own, no interrupts, stderr as its output, and an end when its parent ends."""
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    with contextlib.suppress(AttributeError, OSError, ValueError):
        faulthandler.enable(all_threads=False)  # a crash prints a traceback
        faulthandler.register(signal.SIGUSR1, all_threads=False)  # and so does a process that hangs
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


class LoadedCandidate:
    """The loaded candidate in its process: each method is the answer to one kind of question."""

    def __init__(self, spec: Spec, send: Callable[..., None]) -> None:
        loaded = load(spec.name, spec.backward, spec.convention, spec.op)
        loaded = dataclasses.replace(loaded, options=spec.options, refusals=spec.refusals)
        numbers, pid = itertools.count(), os.getpid()

        def watched(function: Callable[..., Any] | None, who: str) -> Any:
            if function is None:
                return None

            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                number = next(numbers)
                send("begin", number, who)
                try:
                    return function(*args, **kwargs)
                except KeyboardInterrupt as error:  # it raised that itself: no interrupt reaches this process
                    raise RAISED_INTERRUPT(*error.args).with_traceback(error.__traceback__) from None
                finally:
                    if os.getpid() != pid:
                        os._exit(0)  # the candidate forked, and this is the child: the parent answers
                    send("end", number)

            return call

        self.candidate = dataclasses.replace(
            loaded, forward=watched(loaded.forward, "forward"), backward=watched(loaded.backward, "backward")
        )
        self.spec, self.settings = spec, spec.settings
        self.diagnostician = Diagnostician(self.candidate.align) if spec.diagnose else None

    def examine(self, case: Any, seed: int) -> Result:
        return examine(self.candidate, case, seed, self.settings, self.diagnostician)

    def takes(self, case: Any, seed: int) -> bool:
        return call_forward(self.candidate, as_given(case, seed, self.settings)[0]).status not in ("refused", "not supported")

    def conditions(self, case: Any, seed: int) -> list[Check]:
        return examine_conditions(self.candidate, case, seed, self.settings)

    def fitting_precision(self, report: Report, cases: list[Any]) -> str:
        return fitting_precision(self.candidate, report, cases, self.settings)

    def shrink(self, case: Any, seed: int) -> tuple[Any, str, Result]:
        smaller = replay.shrink(self.candidate, case, seed, self.settings)
        diagnostician = None if self.diagnostician is None else Diagnostician(self.candidate.align)
        result = examine_all(self.candidate, smaller, seed, self.settings, diagnostician)
        return smaller, replay.shapes(smaller, seed), result

    def code(self, case: Any, result: Result) -> list[str]:
        return replay.code(self.candidate, self.spec, case, result, self.settings)

    def save(self, path: Path, case: Any, result: Result) -> str:
        try:
            replay.save(path, self.candidate, case, result.seed, self.settings, result)
        except OSError as error:
            return str(error.strerror or error)
        return ""


__all__ = ["TIMEOUT", "LoadedCandidate", "Spec", "Worker"]
