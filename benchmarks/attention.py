"""``python -m benchmarks attention``: blockwise attention, its rivals and its limits over a grid of sizes and masks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from benchmarks import harness, rivals, roofline, table
from benchmarks.cases import TOLERANCE, Case, draw, heads, sized, truth

Row = dict[str, Any]
COLUMNS = ("dense", *rivals.TORCH, "jax", "onnxruntime")
LENGTHS = tuple(1 << n for n in range(7, 15))  # 128 to 16384
AIMED = {"L": (512, 1024, 2048, 4096, 8192), "D": (64, 128), "mask": ("full", "causal")}  # of the geometric means


def grid(size: str) -> list[Case]:
    """Size is full, quick or tiny."""
    if size == "tiny":
        shapes = [Case(8, 4, 1, 2, mask="causal"), Case(8, 4, 1, 2, mask="causal", backward=True)]
        others = [Case(8, 4, 2, 4, 2, mask="lengths"), Case(72, 4, 1, 1, mask="packed"), Case(16, 4, mask="window", width=4)]
        return shapes + others
    passes = (False, True)
    if size == "quick":
        some = itertools.product((512, 2048, 4096), (64,), ("full", "causal"), passes)
        return [sized(L, D, mask, b) for L, D, mask, b in some] + [sized(2048, 128, "causal", b) for b in passes]
    cases = [sized(L, D, mask, b) for D, mask, b, L in itertools.product((32, 64, 128), ("full", "causal"), passes, LENGTHS)]
    for b in passes:
        cases += [sized(L, 64, "window", b) for L in (4096, 16384)]
        cases += [replace(sized(L, 64, "causal", b), B=heads(L, 64)[0], H=8, G=2) for L in (1024, 4096)]
        cases += [Case(L, 64, 4, 4, mask="lengths", backward=b) for L in (1024, 2048)]
        cases += [Case(L, 64, 1, 8, mask="packed", backward=b) for L in (4096, 8192)]
        cases += [sized(L, D, mask, b, dtype="float64") for L, D, mask in ((512, 64, "full"), (2048, 64, "causal"))]
        cases += [sized(L, 128, "causal", b, dtype="float64") for L in (2048,)]
    return cases


def measure(case: Case, plan: harness.Plan, names: Sequence[str] | None = None, verb: str = "attention") -> Row:
    """One row: everybody who can, and the limits."""
    x = draw(case)
    found, left_out = rivals.attention(case, x, names)
    limits = roofline.of_attention(case, x)
    m = harness.measure([*found, *limits.rivals()], "blockwise", TOLERANCE[case.dtype], plan)
    m.left_out = {**left_out, **m.left_out}
    best = m.best(rivals.TORCH)
    return harness.row(
        verb, case.name, asdict(case), m, flops=case.flops(), roofline=limits.fractions(m),
        best_of={"torch": best} if best else {},
    )  # fmt: skip


def skipping(L: int, backward: bool, width: int, plan: harness.Plan) -> Row:
    """What is won by masks: blockwise alone, in turns without a mask, causal, and in a window."""
    B, H = heads(L, 64) if L > 64 else (1, 1)
    base = Case(L, 64, B, H, backward=backward, width=width)
    kinds = ("full", "causal", "window") if 8 * width < L else ("full", "causal")
    found = []
    for mask in kinds:
        case = replace(base, mask=mask)
        rival = rivals.blockwise(case, draw(case))
        found.append(harness.Rival(mask, rival.call, rival.result, truth(case)))
    m = harness.measure(found, "causal", TOLERANCE["float32"], plan)
    name = f"masks: {base.name.replace(' full', '')}"
    gained = {"causal": harness.spread(m.ratios("full"))} if "full" in m.times and "causal" in m.times else {}
    if "window" in m.times and "causal" in m.times:
        gained["window"] = harness.spread(m.ratios("causal", "window"))
    return harness.row("attention", name, {**asdict(base), "mask": "masks"}, m, gained=gained)


def run(size: str, plan: harness.Plan, text: str = "", done: Callable[[Row], None] = harness.nobody) -> list[Row]:
    title = "attention, float32 unless it says so; both = forward + backward"
    rows = table.measured(title, COLUMNS, grid(size), partial(measure, plan=plan), text, done, until=plan.until)
    sizes = {"tiny": ((64, 4),), "quick": ((2048, 1024), (16384, 1024))}
    wanted = [
        (L, b, width)
        for (L, width), b in itertools.product(
            sizes.get(size, ((2048, 1024), (8192, 1024), (16384, 1024))), (False,) if size == "quick" else (False, True)
        )
        if harness.matches(text, f"masks: L={L} {'both' if b else 'forward'}")
    ]
    if wanted:
        print("\nwhat blockwise gains by a mask: its time without one over that with causal(), and that over a window's")
    more = []
    for L, b, width in wanted:
        if time.monotonic() > plan.until:
            print(f"left out, because the time is over: masks: L={L}")
            continue
        row = skipping(L, b, width, plan)
        gained = "".join(f"  {name} {table.ratio(x)}" for name, x in row["gained"].items())
        print(f"{row['name']:44}{table.duration(row['seconds']['causal']) if row['seconds'] else '-':>10}{gained}")
        more.append(row)
        done(row)
    table.notes(more)
    return rows + more
