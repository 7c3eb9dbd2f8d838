"""`npattn verify --fuzz`: cases drawn from the space of an op, on all processors, until the time is over or one is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from npattn.environment import processors
from npattn.verify.candidate import CandidateError
from npattn.verify.judge import Result
from npattn.verify.ops import OPS
from npattn.verify.space import Drawer, Row
from npattn.verify.worker import Spec, Worker

TESTED = ("ok", "wrong")


class Fuzz:
    """Use it in a ``with`` statement, which starts and ends a process of the candidate for each processor."""

    def __init__(self, spec: Spec, timeout: float, seconds: float, seed: int) -> None:
        space = OPS[spec.op or "attention"].space
        if space is None:
            known = ", ".join(name for name, op in OPS.items() if op.space is not None)
            raise CandidateError(f"--fuzz: there is no space of calls of {spec.op} to draw from, only of {known}")
        settings = dataclasses.replace(spec.settings, power=False)  # it costs as much as all else, and is said of named cases
        self.seconds, self.seed, self.drawer, self.lock = seconds, seed, Drawer(space, seed), threading.Lock()
        self.workers = [Worker(dataclasses.replace(spec, settings=settings), timeout) for _ in range(processors())]
        self.cases: list[Any] = []  # as they were drawn
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Fuzz:
        for worker in self.workers:
            self.stack.enter_context(worker)
        return self

    def __exit__(self, *what: object) -> None:
        self.stack.close()

    def results(self) -> Iterator[Result]:
        """The results as they come in; the last one may be wrong."""
        end = time.monotonic() + self.seconds
        with ThreadPoolExecutor(len(self.workers)) as pool:
            running: dict[Future[tuple[Row, Result]], Worker] = {pool.submit(self._one, w): w for w in self.workers}
            try:
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        worker, (row, result) = running.pop(future), future.result()
                        self.drawer.saw(row, result.status in TESTED)
                        if result.status == "wrong":
                            end = 0.0
                        if time.monotonic() < end:
                            running[pool.submit(self._one, worker)] = worker
                        yield result
            except BaseException:  # an interrupt: their answers are not waited for
                for worker in self.workers:
                    if worker.process is not None:
                        worker.process.kill()
                raise

    def _one(self, worker: Worker) -> tuple[Row, Result]:
        with self.lock:
            row, case = self.drawer.draw()
            self.cases.append(case)
        return row, worker.examine(case, self.seed)

    def coverage(self) -> Iterator[str]:
        """What was met of the space, and what of it was never taken, in words."""
        met, every = self.drawer.coverage()
        if every:
            yield f"{len(self.cases)} cases drawn; of the pairs of classes that it takes {met} of {every} were met"
        for name, classes in self.drawer.not_taken().items():
            yield f"  never taken: {name} {', '.join(classes)}"


__all__ = ["Fuzz"]
