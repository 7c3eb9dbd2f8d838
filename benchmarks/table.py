"""One line a row, aligned: sizes, time, rate, both limits, and everybody's time over ours."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import harness

Row = dict[str, Any]

WIDTH = 18


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def ratio(x: Mapping[str, float] | None) -> str:
    """Median (min - max)."""
    if not x:
        return "-"
    digits = 2 if x["median"] < 10 else 1
    if x["least"] == x["most"]:
        return f"{x['median']:.{digits}f}"  # of one round
    return f"{x['median']:.{digits}f} ({x['least']:.{digits}f}-{x['most']:.{digits}f})"


def percent(x: Mapping[str, float] | None) -> str:
    return f"{100 * x['median']:.0f}%" if x else "-"


def head(title: str, rivals: Sequence[str], width: int = 44, limits: bool = True) -> None:
    print(f"\n{title}; BxH or BxH/G: batch, heads, groups")
    print("their time / ours, round by round: median (min-max), or that of the one round there was; * torch's best here")
    if limits:
        print("GFLOP/s of ours; own, best: its part of its own products and exponentials alone, and of the best product's rate")
    columns = f"{'ours':>10}{'GFLOP/s':>9}{'own':>5}{'best':>6}" if limits else f"{'ours':>10}"
    print(f"{'':{width}}{columns}" + "".join(f" {name + ' ':>{WIDTH}}" for name in rivals), flush=True)


def line(row: Mapping[str, Any], rivals: Sequence[str], width: int = 44, limits: bool = True) -> None:
    own = row["seconds"].get(row["base"])
    text = f"{row['name']:{width}}{duration(own) if own else '-':>10}"
    if limits:
        r = row.get("roofline", {})
        rate = f"{r['gflops']:.0f}" if r else "-"
        text += f"{rate:>9}{percent(r.get('own')):>5}{percent(r.get('best')):>6}"
    for name in rivals:
        wrong = row["left_out"].get(name, "")
        shown = "WRONG" if wrong.startswith("WRONG") else ratio(row["ratios"].get(name))
        text += f" {shown + ('*' if name == row.get('best_of', {}).get('torch') else ' '):>{WIDTH}}"
    print(text.rstrip(), flush=True)


def notes(rows: Sequence[Mapping[str, Any]]) -> None:
    """Why somebody is missing, what was wrong, and whose threads ran on: each reason once."""
    seen: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, why in row["left_out"].items():
            seen.setdefault((name, why), []).append(row["name"])
        for name in row["restless"]:
            seen.setdefault((name, "its threads ran on in the next one's time"), []).append(row["name"])
    for (name, why), where in seen.items():
        some = f"{where[0]}" + (f" and {len(where) - 1} more" if len(where) > 1 else "")
        print(f"{name}: {why}" + ("" if why.startswith("absent") else f" [{some}]"))
    errors = [(e, name, row["name"]) for row in rows for name, e in row["errors"].items() if e is not None]
    if errors:
        e, name, where = max(errors)
        print(f"largest error / largest element: {e:.1e}, of {name} [{where}]")


def measured(
    title: str, rivals: Sequence[str], cases: Sequence[Any], measure: Callable[[Any], Row], text: str,
    done: Callable[[Row], None], width: int = 44, until: float = math.inf,
) -> list[Row]:  # fmt: skip
    """The rows that were asked for, each printed and given to ``done`` as soon as it is there."""
    rows: list[Row] = []
    head(title, rivals, width)
    asked = [case for case in cases if harness.matches(text, case.name)]
    for case in asked:
        if time.monotonic() > until:
            print(f"left out, because the time is over: {', '.join(case.name for case in asked[len(rows):])}")
            break
        rows.append(measure(case))
        line(rows[-1], rivals, width)
        done(rows[-1])
    notes(rows)
    return rows
