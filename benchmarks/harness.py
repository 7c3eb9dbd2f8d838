"""Rivals in turns: check, warm up, then rounds in which each has its turn, with the others' threads at rest.

A round gives one time for each rival, measured within a second or so of each other. What is compared is the ratio within a
round: a drift of the machine's speed hits both sides. Its median and its spread over the rounds are what is reported.
"""

from __future__ import annotations

import gc
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SHORT = 0.02  # seconds that a sample should last; shorter calls are repeated
COLD = 0.05  # calls shorter than this are warmed up by one that is not timed: the caches held the arrays of others
SLOW = 4.0  # a rival this many times slower than the fastest has its turn only in the first rounds
QUIET = 0.15  # processors that a process at rest uses at most; a thread that spins uses a whole one
WINDOW = 0.006  # seconds; the times of other threads are counted at the ticks of the kernel, 1 to 4 ms apart


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Rival:
    name: str
    call: Callable[[], Any]  # what is timed
    result: Callable[[Any], Mapping[str, Array]] | None = None  # what the call returned, as arrays in our layout
    expected: Mapping[str, Array] | None = None  # of the first head; the same names
    before: Callable[[], None] = nothing  # ahead of each sample, and not timed
    clock: bool = False  # the call returns the seconds it took: a limit, and nobody's rival


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    budget: float = 3.0  # seconds a row
    least: int = 5  # rounds
    least_slow: int = 3  # rounds of those that are SLOW
    most: int = 50
    until: float = math.inf  # of time.monotonic: rows that have not begun by then are left out


QUICK = Plan(budget=0.5, least=3, least_slow=1)
TINY = Plan(budget=0.0, least=2, least_slow=1)


@dataclass
class Measured:
    base: str  # whose speed is compared
    times: dict[str, list[float]] = field(default_factory=dict)  # in the order of the rounds, from the first on
    errors: dict[str, float] = field(default_factory=dict)  # max |error| / max |expected|, of the tensor that is worst
    processors: dict[str, float] = field(default_factory=dict)  # seconds of all threads over seconds
    left_out: dict[str, str] = field(default_factory=dict)  # rival -> why
    restless: set[str] = field(default_factory=set)  # whose threads went on running

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratios(self, name: str, base: str | None = None) -> list[float]:
        """The rival's time over that of the base, round by round: above 1 the base is faster."""
        return [a / b for a, b in zip(self.times[name], self.times[base or self.base], strict=False)]

    def best(self, names: Sequence[str]) -> str | None:
        """The fastest of these."""
        found = [n for n in names if n in self.times]
        return min(found, key=self.median) if found else None


def spread(x: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and ends."""
    lower, middle, upper = np.quantile(x, (0.25, 0.5, 0.75))
    return {"median": float(middle), "least": min(x), "lower": float(lower), "upper": float(upper), "most": max(x)}


def settle(limit: float = 0.5) -> bool:
    """Waits until no thread of this process runs on, as idle threads do that wait for more work; whether it came to that."""
    end, quiet = time.perf_counter() + limit, 0
    while quiet < 2:
        start, used = time.perf_counter(), time.process_time()
        if start > end:
            return False
        time.sleep(WINDOW)
        quiet = quiet + 1 if time.process_time() - used < QUIET * (time.perf_counter() - start) else 0
    return True


def sample(rival: Rival, repeats: int, warm: bool) -> tuple[float, float, float]:
    """Seconds of one call, by its own clock if it has one; by ours; and how many processors it used."""
    rival.before()
    if warm:
        rival.call()
    on = gc.isenabled()
    gc.disable()
    try:
        used, start = time.process_time(), time.perf_counter()
        told = [rival.call() for _ in range(repeats)] if rival.clock else []
        for _ in range(0 if rival.clock else repeats):
            rival.call()
        seconds, used = time.perf_counter() - start, time.process_time() - used
    finally:
        if on:
            gc.enable()
    return (statistics.mean(told) if told else seconds / repeats), seconds / repeats, used / seconds


def examine(rival: Rival, tolerance: float) -> tuple[float, str, float]:
    """The rival's error, what is wrong with it ("" where nothing is), and how long it took: its first call warms it up, too."""
    seconds = 0.0
    try:
        rival.before()
        start = time.perf_counter()
        returned = rival.call()
        seconds = time.perf_counter() - start
        found = rival.result(returned) if rival.result else {}
    except Exception as error:  # whatever a rival raises, the others go on
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return math.nan, f"cannot: {lines[0][:160]}", seconds
    worst, where = 0.0, ""
    for name, expected in (rival.expected or {}).items():
        got = np.asarray(found[name], np.float64)
        if got.shape != expected.shape:
            return math.nan, f"WRONG: {name} has shape {got.shape}, expected {expected.shape}", seconds
        off = float(np.abs(got - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-300))
        if not off <= worst:  # a NaN is the worst
            worst, where = off, name
    wrong = "" if worst <= tolerance else f"WRONG: {where} is off by {worst:.1e}, {tolerance:.0e} is allowed"
    return worst, wrong, seconds


def measure(rivals: Sequence[Rival], base: str, tolerance: float, plan: Plan) -> Measured:
    """Rounds of all rivals that are right."""
    m, good, previous, took = Measured(base), list[Rival](), "", dict[str, float]()
    for rival in rivals:
        settle()
        error, wrong, took[rival.name] = (0.0, "", 0.0) if rival.clock else examine(rival, tolerance)
        if not rival.clock:
            m.errors[rival.name] = error
        if wrong:
            m.left_out[rival.name] = wrong
        else:
            good.append(rival)
    if all(rival.clock for rival in good):
        return m
    for rival in good if plan.budget else ():
        if took[rival.name] < 10 * SHORT:  # the first call is not like the others
            settle()
            took[rival.name] = max(sample(rival, 2, True)[1], 1e-6)
    repeats = {r.name: max(1, math.ceil(SHORT / took[r.name])) if plan.budget else 1 for r in good}
    warm = {r.name: took[r.name] < COLD for r in good}
    fastest = min(took[r.name] for r in good if not r.clock)
    slow = {r.name for r in good if not r.clock and r.name != base and took[r.name] > SLOW * fastest}
    cost = sum(took[n] * (repeats[n] + warm[n]) + 3 * WINDOW for n in repeats if n not in slow)
    rounds = max(plan.least, min(plan.most, int(plan.budget / cost)))
    used: dict[str, list[float]] = {r.name: [] for r in good}
    m.times = {r.name: [] for r in good}
    for number in range(rounds):
        turns = good if number % 2 == 0 else good[::-1]  # nobody always follows the same one
        for rival in turns:
            if rival.name in slow and number >= plan.least_slow:
                continue
            if not settle() and previous:
                m.restless.add(previous)
            seconds, _, processors = sample(rival, repeats[rival.name], warm[rival.name])
            m.times[rival.name].append(seconds)
            used[rival.name].append(processors)
            previous = rival.name
    m.processors = {n: statistics.median(x) for n, x in used.items()}
    return m


def gather(
    makers: Mapping[str, Callable[[], Rival]], expected: Mapping[str, Array]
) -> tuple[list[Rival], dict[str, str]]:
    """Those that are there and can, and why others are missing."""
    found, left_out = list[Rival](), dict[str, str]()
    for name, make in makers.items():
        try:
            rival = make()
        except (ImportError, NotImplementedError) as error:
            left_out[name] = f"{'absent' if isinstance(error, ImportError) else 'cannot'}: {error}"
        else:
            found.append(replace(rival, expected=expected))
    return found, left_out


def nobody(row: Mapping[str, Any]) -> None:
    """Who is told of each row as soon as it is there, where nobody is."""


def matches(pattern: str, name: str) -> bool:
    """Whether a row is one of those that were asked for; without a pattern all are."""
    return re.search(pattern, name) is not None


def row(verb: str, name: str, case: Mapping[str, Any], m: Measured, **more: Any) -> dict[str, Any]:
    """One result as it is stored: everything that was measured, and why somebody is missing."""
    measured = m.base in m.times
    return {
        "verb": verb,
        "name": name,
        "case": dict(case),
        "base": m.base,
        "seconds": {n: m.median(n) for n in m.times},
        "ratios": {n: spread(m.ratios(n)) for n in m.times if n != m.base} if measured else {},
        "times": m.times,
        "errors": {n: e if math.isfinite(e) else None for n, e in m.errors.items()},
        "processors": m.processors,
        "left_out": m.left_out,
        "restless": sorted(m.restless),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # ours, too, when the row was done
        **more,
    }
