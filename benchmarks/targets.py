"""The numbers that are aimed at, and whether the rows of a run reach them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks import attention, memory
from benchmarks import rnn as rnn_
from benchmarks.attention import AIMED
from benchmarks.machine import has_avx2_kernels

Row = dict[str, Any]


class Target(NamedTuple):
    text: str
    needed: float
    values: list[float]  # of the rows that were measured
    rows: int  # that are needed for a verdict
    join: Callable[[list[float]], float]
    least: bool = True  # at least what is needed, or at most
    unit: str = "x"

    @property
    def value(self) -> float | None:
        return self.join(self.values) if self.values else None

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        reached = self.value >= self.needed if self.least else self.value <= self.needed
        return ("reached" if reached else "NOT REACHED") + ("" if len(self.values) >= self.rows else " so far")


def mean(x: list[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, x)) / len(x))


def best_of_torch(row: Row) -> float | None:
    name = row.get("best_of", {}).get("torch")
    found = row["ratios"].get(name)
    return found["median"] if found else None


def median(row: Row, name: str) -> float | None:
    found = row["ratios"].get(name)
    return found["median"] if found else None


def known(x: Iterable[float | None]) -> list[float]:
    return [v for v in x if v is not None]


def targets(rows: Sequence[Row], avx2: bool | None = None) -> list[Target]:
    avx2 = has_avx2_kernels() if avx2 is None else avx2
    grid = [r for r in rows if r["verb"] == "attention" and "roofline" in r]
    aimed = [r for r in grid if r["case"]["dtype"] == "float32" and all(r["case"][n] in x for n, x in AIMED.items())
             and r["case"]["G"] in (0, r["case"]["H"])]  # fmt: skip
    forward, both = ([r for r in aimed if r["case"]["backward"] is b] for b in (False, True))
    all_of_them = len(AIMED["L"]) * len(AIMED["D"]) * len(AIMED["mask"])
    found = []
    for text, some, high, low in (("forward", forward, 1.4, 1.0), ("forward + backward", both, 1.7, 1.25)):
        values = known(best_of_torch(r) for r in some)
        found.append(Target(f"torch SDPA's best CPU backend, {text}", low if avx2 else high, values, all_of_them, mean))
    for text, some in (("forward", forward), ("forward + backward", both)):
        values = known(median(r, "jax") for r in some)
        found.append(Target(f"jax dot_product_attention, jitted, {text}", 4.0, values, all_of_them, mean))
    values = known(median(r, "onnxruntime") for r in forward)
    found.append(Target("onnxruntime Attention, forward", 0.75 if avx2 else 1.05, values, all_of_them, mean))
    for text, some in (("forward", forward), ("forward + backward", both)):
        values = [100 * r["roofline"]["own"]["median"] for r in some if "own" in r["roofline"]]
        name = f"roofline of its own products and exponentials, {text}"
        found.append(Target(name, 85.0, values, all_of_them, mean, unit="%"))
    found += _rnn(rows) + _masks(rows) + _memory(rows)
    every = known(best_of_torch(r) for r in grid if r["case"]["L"] >= 256)
    needed = sum(case.L >= 256 for case in attention.grid("full"))
    found.append(Target("every row of the grid with L >= 256, of torch's best", 0.8, every, needed, min))
    return found


def _rnn(rows: Sequence[Row]) -> list[Target]:
    found = []
    for text, backward, needed in (("forward", False, 1.3), ("forward + backward", True, 1.5)):
        some = [r for r in rows if r["verb"] == "rnn" and r["case"]["backward"] is backward]
        count = sum(s.backward is backward for s in rnn_.grid("full"))
        found.append(Target(f"torch.nn.RNN, {text}", needed, known(median(r, "torch.nn.RNN") for r in some), count, mean))
    return found


def _masks(rows: Sequence[Row]) -> list[Target]:
    some = [r for r in rows if r["verb"] == "attention" and "gained" in r]

    def of(mask: str, *lengths: int) -> list[float]:
        return [r["gained"][mask]["median"] for r in some if mask in r["gained"] and r["case"]["L"] in lengths]

    return [
        Target("causal over full, L = 2048", 1.5, of("causal", 2048), 2, min),
        Target("causal over full, L >= 8192", 1.8, of("causal", 8192, 16384), 4, min),
        Target("a window of 1024 over causal, L = 16384", 5.0, of("window", 16384), 2, min),
    ]


def _memory(rows: Sequence[Row]) -> list[Target]:
    some = [r for r in rows if r["verb"] == "memory" and r["case"]["L"] == memory.LONGEST and r["case"]["backward"]]
    peaks = [max(x["process"], x["tracemalloc"]) / memory.MIB for r in some if (x := r["bytes"].get("blockwise"))]
    text = f"memory at L = {memory.LONGEST}, one head, D = 64, causal, forward + backward"
    return [Target(text, 64.0, peaks, 1, max, least=False, unit=" MiB")]


def as_rows(found: Sequence[Target]) -> list[dict[str, Any]]:
    return [
        {"text": t.text, "needed": t.needed, "value": t.value, "verdict": t.verdict, "rows": [len(t.values), t.rows]}
        for t in found
    ]


def show(found: Sequence[Target]) -> None:
    print("\nwhat is aimed at: the geometric mean over the rows, or the worst of them")
    for t in found:
        value = "" if t.value is None else f"{t.value:.{1 if t.unit == '%' else 2}f}{t.unit}"
        sign, needed = ">=" if t.least else "<=", f"{t.needed:g}{t.unit}"
        print(f"{t.verdict:20}{value:>10} {sign} {needed:8} {t.text} ({len(t.values)} of {t.rows} rows)")
