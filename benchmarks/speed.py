"""The tables and the plot of docs/speed.md, written by the run that measured them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots, table
from benchmarks.machine import vendor
from benchmarks.targets import Target, best_of_torch, median

Row = dict[str, Any]
BEGIN, END = "<!-- benchmark {} -->", "<!-- /benchmark {} -->"  # for each kind of processor
PLOT = "speed-{}.png"  # beside the page
D, MASK = 64, "causal"


def times(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}x" if x < 10 else f"{x:.0f}x"


def text(rows: Sequence[Row], facts: Mapping[str, str], found: Sequence[Target], command: str) -> str:
    """Between the two comments: what was measured on what, the rows of one shape, and the means over all that are aimed at."""
    lines = [
        f"Causal attention, D = {D}, float32, on {facts['processor']} with {facts['threads']} threads for everybody; BLAS",
        f"{facts['BLAS']} with its {facts['kernels']} kernels; {plots.versions(facts)}.",
        f"Products of tiles alone, one thread, NumPy's rate over torch's: {facts.get('products', 'not measured')}.",
        f"Written by `{command}` on {facts['time'].partition(' ')[0]}.",
        "How many times longer the others take, in the same rounds on the same arrays:",
        "",
        "| | L | batch x heads | ours | GFLOP/s | of its own products and exp | torch SDPA, best | jax, jitted | onnxruntime |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, backward in plots.KINDS.items():
        for r in plots.chosen(rows, D, MASK, backward):
            limits = r["roofline"]
            lines.append(
                f"| {kind} | {r['case']['L']} | {r['case']['B']} x {r['case']['H']} "
                f"| {table.duration(r['seconds']['blockwise'])} | {limits['gflops']:.0f} "
                f"| {table.percent(limits.get('own'))} | {times(best_of_torch(r))} | {times(median(r, 'jax'))} "
                f"| {times(median(r, 'onnxruntime'))} |"
            )
    aimed = "Geometric means over L = 512 to 8192, D = 64 and 128, causal and not, or the rows of these that were measured;"
    lines += ["", f"{aimed} the worst row where it says so:", ""]
    lines += ["| | measured | aimed at |", "|---|---:|---:|"]
    for t in found:
        if t.value is not None:
            worst = "" if t.join is not min else ", worst row"
            worst += "" if len(t.values) >= t.rows else f" ({len(t.values)} of {t.rows} rows)"
            digits, sign = 1 if t.unit == "%" else 2, "at least" if t.least else "at most"
            lines.append(f"| {t.text}{worst} | {t.value:.{digits}f}{t.unit} | {sign} {t.needed:g}{t.unit} |")
    return "\n".join(lines)


def check(file: Path, kind: str) -> None:
    """Before an hour of measuring: is there a place to write to? kind : see `benchmarks.machine.vendor`"""
    try:
        page = file.read_text()
    except OSError as error:
        raise SystemExit(f"{file}: {error}") from None
    begin, end = BEGIN.format(kind), END.format(kind)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise SystemExit(f"{file}: expected one {begin} and behind it one {end}, between which the table goes")


def write(file: Path, rows: Sequence[Row], facts: Mapping[str, str], found: Sequence[Target], command: str) -> list[Path]:
    """Fills the page, and draws the plot that it shows; returns what was written."""
    kind = vendor(facts["processor"])
    check(file, kind)
    if not any(plots.chosen(rows, D, MASK, backward) for backward in plots.KINDS.values()):
        raise SystemExit(f"{file}: nothing to write, no row of attention with D = {D} and {MASK} was measured")
    written, picture = [file], file.parent / PLOT.format(kind.lower())
    shown = ""
    try:
        if plots.throughput(rows, facts, picture, [(D, MASK)]):
            written.append(picture)
            shown = f"\n![GFLOP/s against L: npattn, its limits and its peers]({picture.name})\n"
    except ImportError as error:
        print(error)
    page = file.read_text()
    begin, end = BEGIN.format(kind), END.format(kind)
    before, rest = page.split(begin)
    _, after = rest.split(end)
    file.write_text(f"{before}{begin}\n{text(rows, facts, found, command)}\n{shown}{end}{after}")
    return written
