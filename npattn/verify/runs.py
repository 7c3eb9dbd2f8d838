"""All cases of a run, on all processors: the named ones, and those that are drawn from the space of the op."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from npattn.environment import processors
from npattn.verify import limits
from npattn.verify.judge import Result
from npattn.verify.space import Coverage, Drawer, Drawn, Row, Space
from npattn.verify.worker import LostError, Spec, Worker

MANY = 4  # processes at most: each may hold a library of gigabytes, or a compiler
TESTED = ("ok", "wrong")
PAIRS, TRIPLES = "pairs", "triples"


class Drawing:
    """Rounds of cases, each made from what came of the rounds before. The same for the same candidate and seed."""

    def __init__(self, space: Space, seed: int) -> None:
        self.drawer, self.seed = Drawer(space, seed), seed

    def rounds(self, takes: Any, until: str) -> Iterator[list[Drawn]]:
        """The cases of one round after the other; `saw` is called with each before the next round is asked for.

        takes : whether the candidate accepts a case; until : "pairs", "triples", or "" for rounds without end
        """
        yield from self._cases([self.drawer.space.plain])
        if not self.drawer.accepted.any():
            self._move(takes)
            yield from self._cases([self.drawer.space.plain])
            if not self.drawer.accepted.any():
                return
        rows = self.drawer.one_by_one(mixed=not until)
        for few in [rows] if until else [rows[i : i + 8] for i in range(0, len(rows), 8)]:
            yield from self._cases(few)
            if not until:  # there may be no time for all pairs
                yield from self._cases(self.drawer.some_at_once(8))
        if refused := self._refused(rows):
            sized = {name for name, _ in refused if any(x for c in self.drawer.space.dimensions[name].values() for x in c)}
            if sized - {"heads", "batch"} and not self.drawer.limits:
                self._learn(takes)
                rows = self.drawer.one_by_one()
                yield from self._cases(rows)
                refused = self._refused(rows)
            for name, cls in refused:
                self.drawer.close(name, cls)
        for rows in self.drawer.pairs():
            yield from self._cases(rows)
        if until == TRIPLES:
            for rows in self.drawer.triples():
                yield from self._cases(rows)
        if not until:
            for rows in self.drawer.at_random():
                yield from self._cases(rows)

    def _cases(self, rows: list[Row]) -> Iterator[list[Drawn]]:
        found = [(row, self.drawer.space.case(row, self.drawer.rng)) for row in rows]
        for row, case in found:
            if case is None:
                self.drawer.saw(row, False)
        if any(case is not None for _, case in found):
            yield [case for _, case in found if case is not None]

    def saw(self, case: Drawn, tested: bool) -> None:
        self.drawer.saw(case.row, tested)

    def _refused(self, rows: list[Row]) -> list[tuple[str, str]]:
        """The classes of rows that differ from the plain one in one class, and that were not taken."""
        plain, number = self.drawer.space.plain, self.drawer.number
        other = [(n, c) for row in rows for n, c in row.items() if c != plain[n]]
        return [pair for pair in other if self.drawer.drawn[number[pair]] and not self.drawer.accepted[number[pair]]]

    def _move(self, takes: Any) -> None:
        """Go on from another plain row, or from other sizes, since those of the space are refused."""
        plain, cases = limits.near(self.drawer.space, takes), self.drawer.cases
        if plain not in (None, self.drawer.space.plain):
            self.drawer = Drawer(self.drawer.space._replace(plain=plain), self.seed)
            self.drawer.cases = cases
        space = self.drawer.space
        if plain is not None and ((case := space.sized(plain, space.smallest(plain))) is None or not takes(case)):
            self._learn(takes)

    def _learn(self, takes: Any) -> None:
        """Find out which sizes the candidate takes, and go on with those alone."""
        conditions = limits.found(self.drawer.space, takes)
        if conditions:
            space = limits.restricted(self.drawer.space, conditions)
            cases = self.drawer.cases
            self.drawer = Drawer(space, self.seed)
            self.drawer.cases, self.drawer.limits = cases, [c.text for c in conditions]


CHANCE = 1e-3  # that all wrong cases have a class which has nothing to do with it; there are some 200 classes


def in_common(wrong: list[Row], right: list[Row], usual: Row) -> tuple[str, ...]:
    """The classes that all wrong rows have and few right ones, the rarest first; or "not" and a class that none of them has."""
    share: dict[str, float] = {}
    for name, cls in wrong[0].items() if wrong else ():
        if all(row[name] == cls for row in wrong):
            share[f"{name} {cls}"] = sum(row[name] == cls for row in right) / max(len(right), 1)
        elif all(row[name] != usual[name] for row in wrong):
            share[f"{name} not {usual[name]}"] = sum(row[name] != usual[name] for row in right) / max(len(right), 1)
    found = [t for t, part in share.items() if len(wrong) > 1 and right and part <= 0.5 and part ** len(wrong) <= CHANCE]
    return tuple(sorted(found, key=lambda text: share[text])[:5])


class Runs:
    """Use it in a ``with`` statement, which starts and ends a process of the candidate for each processor.

    cases, seeds : the named cases, which one process runs in their order, since explanations build on earlier cases
    space : from which the other processes draw, and the first too when it is done; None: nothing is drawn
    until : "pairs", "triples", or "" to go on until the time is over or a case is wrong
    If a named case is wrong, nothing is drawn any more: what is wrong in general is mended first.
    """

    def __init__(
        self, spec: Spec, timeout: float, cases: list[Any], seeds: Iterable[int], expected: Mapping[str, str], *,
        space: Space | None, until: str = PAIRS, seconds: float = float("inf"), stop: bool = False,
    ) -> None:  # fmt: skip
        seeds = list(seeds)
        self.spec, self.named, self.seeds, self.expected, self.stop = spec, cases, seeds, expected, stop
        self.until, self.seconds = until, seconds
        self.drawing = None if space is None else Drawing(space, seeds[0])
        self.reported = not cases  # whether results of drawn cases are handed out
        count = min(processors(), MANY) if self.drawing else 1
        self.workers = [Worker(spec, timeout, one_thread=number > 0) for number in range(count)]
        self.free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self.results_of_drawn: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        self.drawn: dict[str, Drawn] = {}
        self.status: dict[str, str] = {}  # of their results, but of those that are expected to fail
        self.found, self.end = 0, float("inf")  # results of drawn cases, and when no more is drawn
        self.over, self.stack = threading.Event(), contextlib.ExitStack()

    def __enter__(self) -> Runs:
        self.stack.enter_context(self.workers[0])
        if self.drawing and not self.workers[0].facts.backward:
            self.drawing = Drawing(self.drawing.drawer.space.of_forward(), self.drawing.seed)
        return self

    def __exit__(self, *what: object) -> None:
        self._end()
        self.stack.close()

    @property
    def worker(self) -> Worker:
        """The one that is asked about a case afterwards."""
        return self.workers[0]

    @property
    def faults(self) -> list[str]:
        return [fault for worker in self.workers for fault in worker.faults]

    @property
    def count(self) -> int:
        """How many results of drawn cases a complete report has."""
        return self.found if self.reported else 0

    def case(self, name: str) -> Any:
        return self.drawn[name] if name in self.drawn else next(case for case in self.named if case.name == name)

    def coverage(self) -> Coverage | None:
        """What was met of the space; None if nothing was drawn, or no result of it is in the report."""
        if self.drawing is None or not self.drawn or not self.reported:
            return None
        wrong = [self.drawn[name].row for name, status in self.status.items() if status == "wrong"]
        right = [self.drawn[name].row for name, status in self.status.items() if status == "ok"]
        common = in_common(wrong, right, self.drawing.drawer.space.usual)
        return self.drawing.drawer.coverage(self.until)._replace(wrong=len(wrong), common=common)

    def results(self) -> Iterator[Result]:
        """First of the named cases, then of those that were drawn."""
        thread = threading.Thread(target=self._draw) if self.drawing else None
        if not self.named:
            self.free.put(self.workers[0])
        try:
            if thread:
                thread.start()
            wrong = False
            for seed in self.seeds:
                for case in self.named:
                    result = self._expecting(self.workers[0].examine(case, seed))
                    wrong |= result.status == "wrong" and not result.expected
                    yield result
                    if wrong and self.stop:
                        return
            if wrong or thread is None:
                return
            self.reported = True
            if self.named:
                self.free.put(self.workers[0])
            while (found := self.results_of_drawn.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
                if self.stop and found.status == "wrong" and not found.expected:
                    return
        except BaseException:  # an interrupt: no answer is waited for
            self.workers[0].kill()
            raise
        finally:
            self._end()
            if thread:
                thread.join()

    def _end(self) -> None:
        """No more cases are drawn, and no answers are waited for."""
        if self.drawing and not self.over.is_set():
            self.over.set()
            for worker in self.workers[1:]:
                worker.kill()

    def _expecting(self, result: Result) -> Result:
        reason = self.expected.get(result.case) or next(
            (why for pattern, why in self.expected.items() if fnmatch.fnmatch(result.case, pattern)), "")  # fmt: skip
        return dataclasses.replace(result, expected=reason)

    def _draw(self) -> None:
        """In a thread of its own: one round after the other, each on all processes that are free."""
        assert self.drawing is not None
        try:
            with ThreadPoolExecutor(len(self.workers)) as pool:
                starting = [pool.submit(self._start, worker) for worker in self.workers[1:]]
                if not self.named:
                    for started in starting:
                        started.result()
                self.end = time.monotonic() + self.seconds  # of drawing, not of imports
                for cases in self.drawing.rounds(self._takes, self.until):
                    futures = [(case, pool.submit(self._one, case)) for case in cases]
                    for case, future in futures:
                        result = future.result()
                        if result is None:  # the time is over
                            continue
                        self.drawn[case.name], self.found = case, self.found + 1
                        self.drawing.saw(case, result.status in TESTED)
                        result = self._expecting(result)
                        if not result.expected:
                            self.status[case.name] = result.status
                        self.results_of_drawn.put(result)
                        if not self.until and result.status == "wrong" and not result.expected:
                            self.end = 0.0
                    if self.over.is_set() or time.monotonic() > self.end:
                        break
            self.results_of_drawn.put(None)
        except BaseException as error:
            self.results_of_drawn.put(error)

    def _start(self, worker: Worker) -> None:
        with contextlib.suppress(Exception):  # as if there were one processor less
            self.stack.enter_context(worker)
            self.free.put(worker)

    def _with_worker(self, ask: Any, otherwise: Any) -> Any:
        while not self.over.is_set():
            with contextlib.suppress(queue.Empty):
                worker = self.free.get(timeout=0.2)
                try:
                    return ask(worker)
                finally:
                    self.free.put(worker)
        return otherwise

    def _one(self, case: Drawn) -> Result | None:
        if time.monotonic() > self.end:
            return None
        found: Result | None = self._with_worker(lambda worker: worker.examine(case, self.seeds[0]), None)
        return found

    def _takes(self, case: Drawn) -> bool:
        def ask(worker: Worker) -> bool:
            try:
                return worker.takes(case, self.seeds[0])
            except LostError:
                return False

        return bool(self._with_worker(ask, False))


__all__ = ["PAIRS", "TRIPLES", "Drawing", "Runs", "in_common"]
