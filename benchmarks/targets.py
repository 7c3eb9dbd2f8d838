"""The numbers that are aimed at, and whether the rows of a run reach them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from benchmarks import attention, decode, memory, multihead
from benchmarks import rnn as rnn_
from benchmarks.attention import AIMED

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


def targets(rows: Sequence[Row], intel: bool) -> list[Target]:
    """intel : whether the processor is Intel's, where torch has a faster BLAS than NumPy"""
    grid = [r for r in rows if r["verb"] == "attention" and "roofline" in r]
    aimed = [r for r in grid if r["case"]["dtype"] == "float32" and all(r["case"][n] in x for n, x in AIMED.items())
             and r["case"]["G"] in (0, r["case"]["H"])]  # fmt: skip
    forward, both = ([r for r in aimed if r["case"]["backward"] is b] for b in (False, True))
    all_of_them = len(AIMED["L"]) * len(AIMED["D"]) * len(AIMED["mask"])
    found = []
    for text, some in (("forward", forward), ("forward + backward", both)):
        values = known(best_of_torch(r) for r in some)
        found.append(Target(f"torch SDPA's best CPU backend, {text}", 0.95 if intel else 1.25, values, all_of_them, mean))
    for text, some in (("forward", forward), ("forward + backward", both)):
        values = known(median(r, "jax") for r in some)
        found.append(Target(f"jax dot_product_attention, jitted, {text}", 3.5, values, all_of_them, mean))
    values = known(median(r, "onnxruntime") for r in forward)
    found.append(Target("onnxruntime Attention, forward", 1.5, values, all_of_them, mean))
    for text, some, needed in (("forward", forward, 90.0), ("forward + backward", both, 88.0)):
        values = [100 * r["roofline"]["own"]["median"] for r in some if "own" in r["roofline"]]
        name = f"roofline of its own products and exponentials, {text}"
        found.append(Target(name, needed, values, all_of_them, mean, unit="%"))
    found += _decode(rows) + _layers(rows, intel) + _rnn(rows, intel) + _masks(rows) + _memory(rows)
    worst, short, wide = (0.8, 0.9, 0.95) if intel else (0.9, 1.0, 1.2)
    found += [
        _best("every row of the grid with L >= 256", worst, grid, lambda c: c["dtype"] == "float32" and c["L"] >= 256, min),
        _best("L = 128, many heads, with gradients", short, grid, lambda c: c["L"] == 128 and c["backward"], mean),
        _best("float64", wide, grid, lambda c: c["dtype"] == "float64", mean),
    ]
    return found


def _best(
    text: str, needed: float, rows: Sequence[Row], counts: Callable[[Any], bool], join: Callable[[list[float]], float]
) -> Target:
    """Of torch's best, over those rows of the grid that count."""
    values = known(best_of_torch(r) for r in rows if counts(r["case"]))
    return Target(f"{text}, of torch's best", needed, values, sum(counts(asdict(c)) for c in attention.grid("full")), join)


def _decode(rows: Sequence[Row]) -> list[Target]:
    some = [r for r in rows if r["verb"] == "decode" and r["case"]["L"] == 1]
    every = [case for case in decode.grid("full") if case.L == 1]
    return [
        Target("one query, S = 1024, of torch's best", 1.0, known(best_of_torch(r) for r in some if r["case"]["S"] == 1024),
               sum(case.S == 1024 for case in every), mean),
        Target("one query, S >= 4096, of torch's best", 2.0, known(best_of_torch(r) for r in some if r["case"]["S"] >= 4096),
               sum(case.S >= 4096 for case in every), mean),
    ]  # fmt: skip


def _layers(rows: Sequence[Row], intel: bool) -> list[Target]:
    values = known(median(r, "torch") for r in rows if r["verb"] == "multihead")
    return [Target("torch.nn.MultiheadAttention", 0.95 if intel else 1.1, values, len(multihead.grid("full")), mean)]


def _rnn(rows: Sequence[Row], intel: bool) -> list[Target]:
    found = []
    for text, backward in (("forward", False), ("forward + backward", True)):
        needed = 1.3 if intel else 1.6
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
