"""Is a rival's figure the same in company as alone? Asked of the harness itself, in each run.

In company: in this process, in turn with all others, as every figure here is taken. Alone: in a process that has loaded no
other library and does nothing else. Both once a round, so that the machine is the same for both.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import harness, rivals, table
from benchmarks.cases import Case, draw
from benchmarks.harness import COLD, SHORT
from benchmarks.machine import threads
from benchmarks.worker import Worker

ROUGHLY = 0.1  # medians that differ by less are the same


def compare(
    case: Case, rounds: int, names: Sequence[str] | None = None
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Rival -> its time in company over its time alone; and rival -> how many processors it used in company."""
    found, _ = rivals.attention(case, draw(case), names, checked=False)
    with contextlib.ExitStack() as stack:
        workers = {rival.name: stack.enter_context(Worker()) for rival in found}
        for name, worker in workers.items():
            worker.load(case, name)
        for worker in workers.values():
            worker.receive()
        counts, warm = dict[str, int](), dict[str, bool]()
        company, alone, used = (dict[str, list[float]]((rival.name, []) for rival in found) for _ in range(3))
        for rival in found:
            harness.settle()
            seconds = harness.sample(rival, 1, True)[1]
            counts[rival.name], warm[rival.name] = max(1, math.ceil(SHORT / seconds)), seconds < COLD
        for number in range(rounds):
            turns = found if number % 2 == 0 else found[::-1]
            for rival in turns:
                harness.settle()
                seconds, _, processors = harness.sample(rival, counts[rival.name], warm[rival.name])
                company[rival.name].append(seconds)
                used[rival.name].append(processors)
            harness.settle()
            for rival in turns:
                name = rival.name
                answer = workers[name].ask(do="time", repeats=counts[name], warm=warm[name])
                alone[name].append(answer["seconds"])
    ratios = {n: harness.spread([a / b for a, b in zip(company[n], alone[n], strict=True)]) for n in company}
    return ratios, {n: statistics.median(x) for n, x in used.items()}


def same(x: dict[str, float]) -> bool:
    return abs(x["median"] - 1) <= ROUGHLY or x["lower"] <= 1 <= x["upper"]


def report(case: Case, rounds: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    found, used = compare(case, rounds, names)
    print(f"\ntime in company / alone in a process of its own, {case.name}: median (min-max)")
    for name, x in found.items():
        verdict = "same" if same(x) else "NOT THE SAME: its ratios below are to be doubted"
        print(f"  {name:14}{table.ratio(x):>18}  on {used[name]:.1f} of {threads()} processors  {verdict}")
    print(f"  same: the median is within {100 * ROUGHLY:.0f} % of 1, or 1 is between the quartiles")
    if max(used.values(), default=0.0) < 0.8 * threads():
        print("nobody got all processors: something else is running here")
    return {"case": case.name, "ratios": found, "processors": used, "same": {name: same(x) for name, x in found.items()}}
