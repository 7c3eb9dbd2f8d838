"""``python -m benchmarks decode``: one new query, or a few, against a long cache of keys; many heads, and grouped ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import harness, table
from benchmarks.attention import COLUMNS, measure
from benchmarks.cases import Case

Row = dict[str, Any]


def grid(size: str) -> list[Case]:
    if size == "tiny":
        return [Case(1, 4, 1, 4, 2, S=40)]
    if size == "quick":
        return [Case(1, 128, 1, 32, 8, S=8192), Case(4, 128, 1, 32, 8, S=8192)]
    few = [Case(L, 128, 1, 32, 8, S=S) for S in (1024, 8192, 32768) for L in (1, 4, 16)]
    return [*few, *(Case(1, 128, B, 32, 8, S=4096) for B in (8, 32)), Case(1, 64, 8, 16, S=4096), Case(1, 64, 1, 1, S=65536)]


def run(size: str, plan: harness.Plan, text: str = "", done: Callable[[Row], None] = harness.nobody) -> list[Row]:
    title = "attention of a few queries to a long cache, float32"
    return table.measured(title, COLUMNS, grid(size), partial(measure, plan=plan, verb="decode"), text, done, 48, plan.until)
