"""Pictures of results: throughput with its limits, speed against peers, memory. Needs matplotlib.

A time is the median of its rounds. A ratio is the median of the rounds' ratios, and its bar goes from quartile to quartile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.memory import MIB

Row = dict[str, Any]
COLORS = {
    "npattn blockwise": "#b2182b", "torch SDPA, best": "#e08214", "jax": "#2166ac", "onnxruntime": "#5aae61",
    "npattn dense": "#999999", "torch flash": "#e08214", "torch math": "#fdb863",
}  # fmt: skip
KINDS = {"forward": False, "forward + backward": True}
OTHERS = {"multihead": "a layer, with its projections", "rnn": "recurrent layer", "decode": "a few queries, long cache"}
BARS = "points: medians of the rounds' ratios, bars: their quartiles"


def versions(facts: Mapping[str, str]) -> str:
    found = {name: facts[name] for name in ("npattn", "NumPy", "torch", "jax", "onnxruntime")}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version != "absent")


def title(kind: str, D: int, mask: str) -> str:
    return f"{kind}, D = {D}, {'causal' if mask == 'causal' else 'no mask'}"


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("matplotlib is not installed, which draws the plots: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def seconds(row: Row) -> dict[str, float]:
    """By the names that a reader knows; torch's backends are one rival, the best one, as in the table."""
    found = {"npattn blockwise": "blockwise", "npattn dense": "dense", "jax": "jax", "onnxruntime": "onnxruntime"}
    found["torch SDPA, best"] = row.get("best_of", {}).get("torch", "")
    return {n: row["seconds"][key] for n, key in found.items() if key in row["seconds"]}


def color(name: str) -> str:
    """Of a rival, whatever it is there for."""
    known = [shade for key, shade in COLORS.items() if name.startswith(key)]
    if known:
        return known[0]
    return COLORS["torch SDPA, best" if name.startswith("torch") else "npattn dense"]


def chosen(rows: Sequence[Row], D: int, mask: str, backward: bool) -> list[Row]:
    """Of one line in a plot, by L; float32, no grouped heads."""
    wanted = {"D": D, "mask": mask, "backward": backward, "dtype": "float32", "G": 0, "S": 0}
    some = [
        r for r in rows
        if r["verb"] == "attention" and r.get("roofline") and all(r["case"][n] == x for n, x in wanted.items())
    ]  # fmt: skip
    return sorted(some, key=lambda r: r["case"]["L"])


def label(axes: Any, ends: Sequence[tuple[float, float, str, str]], log: bool = False) -> None:
    """Names at the right ends (x, y, name, color) of lines, moved apart where they would cover each other."""
    low, high = axes.get_ylim()
    bottom, top = (math.log(low), math.log(high)) if log else (low, high)
    for x in {end[0] for end in ends}:
        here = sorted((end for end in ends if end[0] == x), key=lambda end: end[1])
        wanted = [math.log(max(end[1], low)) if log else end[1] for end in here]
        heights = [(top - bottom) * (0.12 if "\n" in end[2] else 0.06) for end in here]
        gaps = [(below + above) / 2 for below, above in itertools.pairwise(heights)]
        for i, gap in enumerate(gaps):  # upwards ...
            wanted[i + 1] = max(wanted[i + 1], wanted[i] + gap)
        wanted[-1] = min(wanted[-1], top)
        for i in reversed(range(len(gaps))):  # ... and down again where there is no more room
            wanted[i] = min(wanted[i], wanted[i + 1] - gaps[i])
        for (_, y, name, color), place in zip(here, wanted, strict=True):
            at = (x * 1.12, math.exp(place) if log else place)
            axes.annotate(name, (x, y), at, color=color, fontsize=8, va="center", annotation_clip=False)


def finish(axes: Any, some: Sequence[Row], text: str) -> None:
    """The axis of L, which says how many heads there are, too: fewer where they are longer."""
    lengths = [r["case"]["L"] for r in some]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{r['case']['L']}\n{r['case']['B']}x{r['case']['H']}" for r in some], fontsize=8)
    axes.minorticks_off()
    axes.set_xlim(lengths[0] / 1.1, lengths[-1] * 1.1)
    axes.set_xlabel("sequence length L, batch x heads")
    axes.set_title(text, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def footer(figure: Any, facts: Mapping[str, str]) -> None:
    machine = f"{facts['processor']}, {facts['threads']} threads for everybody; BLAS kernels {facts['kernels']}"
    figure.text(0.01, 0.06 / figure.get_figheight(), f"{machine}\n{versions(facts)}", fontsize=7, color="#555555")


def save(figure: Any, facts: Mapping[str, str], text: str, file: Path) -> bool:
    inch = 1 / figure.get_figheight()
    figure.suptitle(text, x=0.01, y=1 - 0.1 * inch, ha="left", va="top", fontsize=12)
    figure.tight_layout(rect=(0, 0.35 * inch, 1, 1 - 0.05 * inch))
    footer(figure, facts)
    figure.savefig(file, dpi=130)
    pyplot().close(figure)
    return True


def throughput(rows: Sequence[Row], facts: Mapping[str, str], file: Path, panels: Sequence[tuple[int, str]]) -> bool:
    """GFLOP/s of the products that are needed, against L: a row of panels for each of (D, mask), a column for each pass."""
    plt = pyplot()
    panels = [p for p in panels if any(chosen(rows, *p, b) for b in KINDS.values())]
    if not panels:
        return False
    figure, grid = plt.subplots(len(panels), 2, figsize=(12, 4.2 * len(panels)), squeeze=False)
    for (D, mask), line in zip(panels, grid, strict=True):
        for (kind, backward), axes in zip(KINDS.items(), line, strict=True):
            draw_throughput(axes, chosen(rows, D, mask, backward), title(kind, D, mask))
    return save(figure, facts, "Attention on a CPU, float32: useful GFLOP/s (higher is better)", file)


def draw_throughput(axes: Any, some: Sequence[Row], text: str) -> None:
    if not some:
        axes.set_axis_off()
        return
    ends = []
    for key, limit, style in (
        ("best_limit_gflops", "limit: needed products\nat the best rate", ":"),
        ("own_limit_gflops", "limit: its own products\nand exponentials", "--"),
    ):
        points = [(r["case"]["L"], r["roofline"][key]) for r in some if key in r["roofline"]]
        if points:
            axes.plot(*zip(*points, strict=True), style, marker=".", color="#444444", linewidth=1, markersize=3)
            ends.append((*points[-1], limit, "#444444"))
    for name in COLORS:
        points = [(r["case"]["L"], r["flops"] / s[name] / 1e9) for r in some if name in (s := seconds(r))]
        if points:
            strong = name == "npattn blockwise"
            axes.plot(*zip(*points, strict=True), "o-", color=COLORS[name], linewidth=2.4 if strong else 1.4, markersize=4)
            ends.append((*points[-1], name, COLORS[name]))
    axes.set_ylim(0, None)
    axes.set_ylabel("GFLOP/s")
    finish(axes, some, text)
    label(axes, ends)


def speedup(rows: Sequence[Row], facts: Mapping[str, str], file: Path) -> bool:
    """How many times faster blockwise is than each peer, with the quartiles of the rounds."""
    plt = pyplot()
    panels = [(D, m, b) for D in (64, 128) for m in ("full", "causal") for b in KINDS.values() if chosen(rows, D, m, b)]
    if not panels:
        return False
    figure, grid = plt.subplots(-(-len(panels) // 2), 2, figsize=(12, 3.6 * -(-len(panels) // 2)), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for (D, mask, backward), axes in zip(panels, grid.flat, strict=False):
        some, ends = chosen(rows, D, mask, backward), []
        for name in ("torch SDPA, best", "jax", "onnxruntime", "npattn dense"):
            key = {"npattn dense": "dense"}.get(name, name)
            points = []
            for r in some:
                who = r.get("best_of", {}).get("torch", "") if name.startswith("torch") else key
                if who in r["ratios"]:
                    x = r["ratios"][who]
                    points.append((r["case"]["L"], x["median"], x["median"] - x["lower"], x["upper"] - x["median"]))
            if points:
                x_, y, down, up = zip(*points, strict=True)
                axes.errorbar(x_, y, (down, up), fmt="o-", color=COLORS[name], capsize=2, markersize=4, linewidth=1.4)
                ends.append((x_[-1], y[-1], name, COLORS[name]))
        axes.axhline(1, color=COLORS["npattn blockwise"], linewidth=2.4)
        ends.append((some[-1]["case"]["L"], 1.0, "npattn blockwise", COLORS["npattn blockwise"]))
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
        axes.set_ylabel("their time / npattn's")
        kind = "forward + backward" if backward else "forward"
        finish(axes, some, title(kind, D, mask))
        label(axes, ends, log=True)
    return save(figure, facts, f"npattn blockwise against its peers: above 1 it is faster ({BARS})", file)


def others(rows: Sequence[Row], facts: Mapping[str, str], verb: str, file: Path) -> bool:
    """The same of what has no axis of L: a line for each row of a layer, of the recurrent layer, of decoding."""
    plt = pyplot()
    some = [r for r in rows if r["verb"] == verb and r["ratios"]]
    if not some:
        return False
    figure, axes = plt.subplots(figsize=(12, 0.26 * len(some) + 1.9))
    names = dict.fromkeys(name for r in some for name in r["ratios"] if name in r["errors"])  # no limits, which have none
    shades = set[str]()
    for name in names:
        points = [(r["ratios"][name], len(some) - i) for i, r in enumerate(some) if name in r["ratios"]]
        middle = [x["median"] for x, _ in points]
        bars = [[x["median"] - x["lower"] for x, _ in points], [x["upper"] - x["median"] for x, _ in points]]
        face = "white" if color(name) in shades else color(name)  # the second of one library
        shades.add(color(name))
        axes.errorbar(
            middle, [y for _, y in points], xerr=bars, fmt="o", color=color(name), mfc=face, capsize=2, markersize=4,
            linewidth=1.2, label=name,
        )  # fmt: skip
    axes.axvline(1, color=COLORS["npattn blockwise"], linewidth=2.4, label="npattn")
    axes.set_yticks(range(len(some), 0, -1), [r["name"] for r in some], fontsize=8)
    axes.set_ylim(0.4, len(some) + 0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.set_xlabel("their time / npattn's", fontsize=8)
    axes.set_title(OTHERS[verb], fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return save(figure, facts, f"npattn against its peers: right of 1 it is faster ({BARS})", file)


def memory(rows: Sequence[Row], facts: Mapping[str, str], file: Path) -> bool:
    """MiB beyond inputs and outputs, against L."""
    plt = pyplot()
    some = [r for r in rows if r["verb"] == "memory"]
    kinds = {kind: b for kind, b in KINDS.items() if any(r["case"]["backward"] is b for r in some)}
    if not some:
        return False
    figure, grid = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.4), squeeze=False)
    names = {"blockwise": "npattn blockwise", "dense": "npattn dense"}
    for (kind, backward), axes in zip(kinds.items(), grid[0], strict=True):
        here = sorted((r for r in some if r["case"]["backward"] is backward), key=lambda r: r["case"]["L"])
        ends = []
        for name in ("blockwise", "torch flash", "torch math", "jax", "onnxruntime", "dense"):
            points = [(r["case"]["L"], max(r["bytes"][name]["process"], 1e4) / MIB) for r in here if name in r["bytes"]]
            if points:
                known = names.get(name, name)
                axes.plot(*zip(*points, strict=True), "o-", color=COLORS[known], linewidth=2.4 if name == "blockwise" else 1.4)
                ends.append((*points[-1], known, COLORS[known]))
        axes.set_yscale("log", base=10)
        axes.set_yticks([10.0**n for n in range(-2, 6)], [f"{10.0**n:g}" for n in range(-2, 6)])
        low, high = min(end[1] for end in ends), max(max(r["bytes"][n]["process"] for n in r["bytes"]) for r in here) / MIB
        axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        axes.set_ylabel("MiB beyond inputs and outputs")
        finish(axes, here, f"{kind}, one head, D = 64, causal")
        label(axes, ends, log=True)
    return save(figure, facts, "Memory of a call: peak of the process (lower is better)", file)


def draw_all(rows: Sequence[Row], facts: Mapping[str, str], folder: Path) -> list[Path]:
    """All plots that these results are enough for."""
    everything = [(D, mask) for D in (32, 64, 128) for mask in ("full", "causal")]
    made: list[tuple[str, Callable[[Path], bool]]] = [
        ("throughput.png", lambda f: throughput(rows, facts, f, everything)),
        ("speedup.png", lambda f: speedup(rows, facts, f)),
        *((f"{verb}.png", partial(others, rows, facts, verb)) for verb in OTHERS),
        ("memory.png", lambda f: memory(rows, facts, f)),
    ]
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name, draw in made if draw(folder / name)]
    if new and not written:
        folder.rmdir()
    return written
