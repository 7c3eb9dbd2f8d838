"""The page on what the installed libraries do: every sentence of it is a result of the run that writes it.

The run has three parts. All cases of `npattn verify` show what a library supports and how exact it is. Probes, small calls of
the library's own functions, show which conventions it follows. Findings are short programs that use the library: the page shows
each program and what it printed. A finding that prints something else than when it was recorded is reported as such.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from npattn.peers import MODULES, PEERS, module
from npattn.peers.findings import Shown, show
from npattn.peers.probes import Probes
from npattn.tolerances import GOOD_MAX, GOOD_RMS
from npattn.verify import CASES_OF, PRESETS, CandidateError, Convention, Report, Settings, examine, load
from npattn.verify.conventions import FIELDS
from npattn.verify.ops import OPS


@dataclass(frozen=True)
class Examined:
    """What was found out about one candidate."""

    name: str
    report: Report
    conventions: dict[str, str]  # what the probes found
    under_preset: int | None  # how many tensors are rejected also under the library's own preset; None if it has none

    @property
    def rejected(self) -> list[tuple[str, list[str]]]:
        """The wrong cases, each with its wrong tensors."""
        return [(r.case, [c.tensor for c in r.checks if c.status == "wrong"]) for r in self.report.wrong]

    def cell(self, feature: str) -> str:
        """For one feature, the largest error of the tensors that pass, and how many are rejected."""
        results = self.report.features().get(feature, [])
        tested = [c for r in results for c in r.tested]
        if not tested:
            return "no"
        held = [c.worst for c in tested if c.status == "ok"]
        wrong = len(tested) - len(held)
        parts = [f"{max(held):.1f}"] if held else []
        return "; ".join(parts + ([f"{wrong} rejected"] if wrong else []))

    @property
    def refusals(self) -> list[str]:
        """What it does not support: keywords that it does not take, and the messages of its refusals."""
        texts = dict.fromkeys(c.text for r in self.report.results for c in r.checks if c.status in ("not supported", "refused"))
        words = {"dlse", *(name for op in OPS.values() for name in op.calls.keywords)}
        listed: dict[str, None] = {}
        for text in texts:
            parts = text.split(", ")
            own = re.sub(r"^\w+: ", "", text)  # without the function's name
            if "_to_torch: " in text:
                own = "parameters that torch's layout cannot hold"
            for part in parts if set(parts) <= words else [re.split(r"[.:] ", own.rstrip("."))[0]]:
                listed[part] = None
        return list(listed)

    @property
    def held(self) -> list[float]:
        """The error of each tensor that passes."""
        return [c.worst for r in self.report.results for c in r.tested if c.status == "ok"]


def version(library: str) -> str:
    """The installed version, "" if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def examined(name: str) -> Examined:
    """Run all cases and the probes of one candidate."""
    candidate, preset = load(name), PEERS[name].preset
    settings, cases = Settings(power=False), CASES_OF[candidate.op]
    report = Report(name, [examine(candidate, case, 0, settings) for case in cases], candidate.op)
    under_preset = None
    if preset and candidate.record.calls.conventions is None:
        # The adapters take arguments in npattn's form. So only the "expected" and "undefined" fields of a preset count.
        convention = PRESETS[preset].convention
        declared = {n: v for use in ("expected", "undefined") for n, v in convention.changes(use).items() if n != "dlse"}
        own, wrong = dataclasses.replace(candidate, convention=Convention(**declared)), {r.case for r in report.wrong}
        again = [examine(own, case, 0, settings) for case in cases if case.name in wrong]
        under_preset = sum(c.status == "wrong" for r in again for c in r.checks)
    return Examined(name, report, Probes(name).found if preset else {}, under_preset)


def page(only: list[str], progress: Callable[[str], None]) -> str:
    """The page as Markdown. only : names of built-in candidates; all of them if it is empty"""
    for name in only:
        if name not in PEERS:
            raise CandidateError(f"--only {name}: expected one of {', '.join(PEERS)}")
    names = only or list(PEERS)
    libraries = list(dict.fromkeys(PEERS[name].library for name in names))
    absent = [library for library in libraries if not version(library)]
    peers: list[Examined] = []
    for name in names:
        if PEERS[name].library not in absent:
            progress(name)
            peers.append(examined(name))
    shown: dict[str, list[Shown]] = {}
    for library in (x for x in MODULES if x in libraries and x not in absent):
        shown[library] = []
        for finding in module(library).FINDINGS:
            progress(f"{library}: {finding.title}")
            shown[library].append(show(finding, module(library).PRELUDE))
    lines = [*_head(only, libraries, absent), *_summary(peers, shown), *_conventions(peers)]
    for library in libraries:
        if library not in absent:
            lines += _library(library, [p for p in peers if PEERS[p.name].library == library], shown[library])
    return "\n".join(lines).rstrip() + "\n"


def _head(only: list[str], libraries: list[str], absent: list[str]) -> Iterator[str]:
    command = "npattn peers" + "".join(f" --only {name}" for name in only)
    yield "# What the installed libraries do\n"
    yield f"Written by `{command}`. Every sentence below the first heading is a result of that run: of the cases"
    yield "of `npattn verify` (each figure), of small questions to each library in its own words (the conventions), and of code"
    yield "that was run as it stands here (the findings, with what it printed). An error counts in sigma, the rounding error"
    yield "that is predicted for an honest implementation in that element ([error-model.md](error-model.md)):"
    yield f"{GOOD_MAX:g} is the most that passes, and {GOOD_RMS:g} in the root mean square. Rejected: not as npattn defines it."
    yield "What a team may follow as a convention has a name there ([conventions.md](conventions.md)); what contradicts the"
    yield "library's own documentation, its other paths or arithmetic stands under Defects. All of it on the CPU, in float32"
    yield "but for the rows of float64.\n"
    installed = ", ".join(f"{n} {version(n)}" for n in ["numpy", *libraries] if version(n))
    yield f"Python {platform.python_version()}, {installed}."
    if absent:
        yield f"Not installed, and not on this page: {', '.join(absent)}."
    yield ""


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    yield _row(head)
    yield _row("---" for _ in head)
    for row in rows:
        yield _row(row)
    yield ""


def _summary(peers: list[Examined], shown: dict[str, list[Shown]]) -> Iterator[str]:
    yield "## Summary\n"
    head = [
        "candidate", "op", "tensors that hold", "largest error of these (sigma)", "rejected under its preset",
        "a query without keys", "its preset",
    ]  # fmt: skip
    yield from _table(head, (
        [f"`{p.name}`", p.report.op, f"{len(p.held)} of {p.report.tested}", f"{max(p.held, default=0.0):.1f}",
         "-" if p.under_preset is None else p.under_preset, p.conventions.get("dead_out", "-"), _agreement(p)]
        for p in peers
    ))  # fmt: skip
    yield from _table(["library", "defects", "edges that no specification settles"], (
        [f"{lib} {version(lib)}", *(sum(s.holds for s in found if s.finding.kind == kind) for kind in ("defect", "edge"))]
        for lib, found in shown.items()
    ))  # fmt: skip


def _agreement(p: Examined) -> str:
    """The library's preset, and the fields in which the probes measured something else."""
    if not p.conventions:
        return "-"
    preset = PEERS[p.name].preset
    preset_convention = PRESETS[preset].convention
    apart = [f"{n}={value}" for n, value in p.conventions.items() if getattr(preset_convention, n) != value]
    return f"`{preset}`" + (f" but for {', '.join(apart)}" if apart else "")


def _conventions(peers: list[Examined]) -> Iterator[str]:
    asked = [p for p in peers if p.conventions]
    if not asked:
        return
    yield "## Conventions\n"
    yield "Measured, each by one call. A dash: it has no argument for that, or returns nothing of the kind.\n"
    yield from _table(["convention", *(f"`{p.name}`" for p in asked)], (
        [f"{name}: {values.meaning}", *(p.conventions.get(name, "-") for p in asked)]
        for name, values in FIELDS.items() if any(name in p.conventions for p in asked)
    ))  # fmt: skip


def _library(library: str, peers: list[Examined], shown: list[Shown]) -> Iterator[str]:
    yield f"## {library} {version(library)}\n"
    for op in dict.fromkeys(p.report.op for p in peers):
        yield f"### {op}: what is supported, and the largest error in sigma\n"
        yield from _supported([p for p in peers if p.report.op == op])
    if not shown:
        return
    yield "### Findings: the code before each of them\n"
    yield from _code(module(library).PRELUDE)
    for kind, title in (("defect", "Defects"), ("edge", "Edges that no specification settles")):
        found = [s for s in shown if s.finding.kind == kind and s.holds]
        if found:
            yield f"### {title}\n"
        for n, s in enumerate(found, 1):
            yield from _finding(f"{n}. {s.finding.title}.", s)
    gone = [s for s in shown if not s.holds]
    if gone:
        yield "### No longer so\n"
    for s in gone:
        yield from _finding(f"- {s.finding.title}: this version prints another thing than the one in which it was found.", s)


def _supported(peers: list[Examined]) -> Iterator[str]:
    features = dict.fromkeys(f for p in peers for f in p.report.features() if f != "conditions")
    rows = [[f, *(p.cell(f) for p in peers)] for f in features]
    yield from _table(["feature", *(f"`{p.name}`" for p in peers)], (r for r in rows if set(r[1:]) != {"no"}))
    for p in peers:
        if p.refusals:
            yield f"- `{p.name}` does not support: {'; '.join(p.refusals)}."
        if p.rejected:
            cases = "; ".join(f"{case} ({', '.join(tensors)})" for case, tensors in p.rejected)
            yield f"- `{p.name}`, rejected in {len(p.rejected)} of {len(p.report.results)} cases: {cases}."
    yield ""


def _finding(title: str, shown: Shown) -> Iterator[str]:
    yield f"{title}\n"
    yield from _code(shown.finding.code)
    yield from _code(shown.printed, "text")


def _code(text: str, language: str = "python") -> Iterator[str]:
    yield f"```{language}\n{textwrap.dedent(text).strip()}\n```\n"
