"""``python -m benchmarks scaling``: time should grow as L^2, and memory as L. Both are fitted here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import harness, memory, table
from benchmarks.attention import measure
from benchmarks.cases import Case

Row = dict[str, Any]
NAMES = ("blockwise", "torch flash")


def exponent(lengths: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """a of y ~ L^a by least squares of the logarithms, and its standard error."""
    x, z = np.log(np.asarray(lengths, float)), np.log(np.maximum(np.asarray(y, float), 1e-12))
    x = x - x.mean()
    slope = float((x * z).sum() / (x * x).sum())
    rest = z - z.mean() - slope * x
    error = float(np.sqrt((rest**2).sum() / max(len(x) - 2, 1) / (x * x).sum()))
    return slope, error


def line(lengths: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """The least y, the slope of y = a + b L, and the largest part of y by which it is missed."""
    A = np.stack([np.ones(len(lengths)), np.asarray(lengths, float)], 1)
    weight = 1 / np.maximum(np.abs(np.asarray(y, float)), 1e-12)  # relative errors
    (a, b), *_ = np.linalg.lstsq(A * weight[:, None], np.asarray(y, float) * weight, rcond=None)
    return float(a), float(b), float(np.abs((A @ (a, b)) * weight - np.sign(y)).max())


def run(size: str, plan: harness.Plan, text: str = "", done: Callable[[Row], None] = harness.nobody) -> list[Row]:
    lengths = {"tiny": (8, 16), "quick": (256, 512, 1024, 2048, 4096)}.get(size, (256, 512, 1024, 2048, 4096, 8192, 16384))
    D, H = (4, 1) if size == "tiny" else (64, 2)
    rows = []
    table.head("scaling: the same heads, longer and longer", NAMES[1:])
    fits = []
    for mask in ("full", "causal"):
        for backward in (False, True):
            cases = [Case(L, D, 1, H, mask=mask, backward=backward) for L in lengths]
            some = []
            for case in cases:
                if harness.matches(text, case.name):
                    some.append(measure(case, plan, NAMES, "scaling"))
                    table.line(some[-1], NAMES[1:])
                    done(some[-1])
            rows += some
            for name in NAMES:
                points = [(r["case"]["L"], r["seconds"][name]) for r in some if name in r["seconds"]]
                if len(points) > 1:
                    what = f"{name}, {mask}, {'both' if backward else 'forward'}"
                    fits.append((what, points[0][0], points[-1][0], *exponent(*zip(*points, strict=True))))
    table.notes(rows)
    print()
    for what, first, last, slope, error in fits:
        print(f"time of {what}: ~ L^{slope:.2f} (+- {error:.2f}), from L = {first} to {last}")
    rows += _memory(lengths, D, size, text, done)
    rows.append({"verb": "scaling", "name": "fits", "fits": {what: fit for what, _, _, *fit in fits}})
    done(rows[-1])
    return rows


def _memory(lengths: Sequence[int], D: int, size: str, text: str, done: Callable[[Row], None]) -> list[Row]:
    found = []
    for L in lengths:
        case = Case(L, D, mask="causal", backward=True)
        if harness.matches(text, case.name):
            found.append({**memory.measure(case, ("blockwise",)), "verb": "scaling"})
            done(found[-1])
    for kind in ("tracemalloc", "process"):
        points = [(r["case"]["L"], r["bytes"]["blockwise"][kind]) for r in found if "blockwise" in r["bytes"]]
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            slope, error = exponent(x, y)
            a, b, missed = line(x, y)
            print(
                f"memory of blockwise, causal, both, by {kind}: ~ L^{slope:.2f} (+- {error:.2f}); "
                f"{a / memory.MIB:.1f} MiB + {b:.0f} bytes a token (within {100 * missed:.0f}%)"
            )
    return found
