"""``python -m benchmarks memory``: what a call needs beyond its inputs and outputs, against L.

Each figure comes from a process of its own (worker.py): the most memory that it held during the call, and what tracemalloc saw
of NumPy's arrays. Threads and their buffers were made before, by a small call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import harness, table
from benchmarks.cases import Case
from benchmarks.worker import Worker

Row = dict[str, Any]
COLUMNS = ("blockwise", "dense", "torch flash", "torch math", "jax", "onnxruntime")
LINEAR = ("blockwise", "torch flash")  # who need no array of all scores
LONGEST = 65536
MIB = 2.0**20


def grid(size: str) -> list[tuple[Case, Sequence[str]]]:
    """One head, causal, forward and forward + backward; who needs an array of all scores stays below 8192."""
    if size == "tiny":
        return [(Case(16, 4, mask="causal", backward=True), ("blockwise",))]
    if size == "longest":
        return [(Case(LONGEST, 64, mask="causal", backward=True), LINEAR)]
    lengths = (1024, 4096) if size == "quick" else (1024, 2048, 4096, 8192, 16384, LONGEST)
    return [(Case(L, 64, mask="causal", backward=b), COLUMNS if L <= 8192 else LINEAR) for b in (False, True) for L in lengths]


def measure(case: Case, names: Sequence[str]) -> Row:
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in names:
        with Worker() as worker:
            try:
                worker.load(case, name)
                worker.receive()
                found[name] = worker.ask(do="memory")
            except RuntimeError as error:
                left_out[name] = str(error)
    return {
        "verb": "memory", "name": case.name, "case": asdict(case), "bytes": found, "left_out": left_out,
        "restless": [], "errors": {},
    }  # fmt: skip


def mib(x: float | None) -> str:
    if x is None:
        return "-"
    return f"{x / MIB:.1f}" if x < 100 * MIB else f"{x / MIB:.0f}"


def run(size: str, text: str = "", done: Callable[[Row], None] = harness.nobody) -> list[Row]:
    print("\nmemory beyond inputs and outputs, MiB: peak of the process (peak by tracemalloc)")
    print(f"{'':36}" + "".join(f"{name:>18}" for name in COLUMNS), flush=True)
    rows = []
    for case, names in grid(size):
        if not harness.matches(text, case.name):
            continue
        rows.append(measure(case, names))
        line = f"{case.name:36}"
        for name in COLUMNS:
            x = rows[-1]["bytes"].get(name)
            traced = "" if x is None or x["tracemalloc"] is None else f" ({mib(x['tracemalloc'])})"
            line += f"{'-' if x is None else mib(x['process']) + traced:>18}"
        print(line.rstrip(), flush=True)
        done(rows[-1])
    table.notes(rows)
    return rows
