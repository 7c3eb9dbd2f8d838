"""Timings: rivals on the same arrays, in turns, in one run. A benchmark is not a test.

    python -m benchmarks attention     blockwise attention, its peers and its limits; then what is aimed at, reached or not
    python -m benchmarks multihead     a layer, and torch's nn.MultiheadAttention
    python -m benchmarks rnn           the recurrent layer, and torch.nn.RNN
    python -m benchmarks decode        a few queries against a long cache
    python -m benchmarks models        a step of training, encoding and decoding, beside torch and transformers
    python -m benchmarks memory        what a call needs beyond its inputs and outputs
    python -m benchmarks scaling       time against L^2, memory against L
    python -m benchmarks accuracy      errors of both kernels in sigma
    python -m benchmarks tasks         what models learn in 15 minutes each: hours, and only where it is asked for

Without a verb all of them, which takes an hour; with --quick the first four, in 5 minutes at most. Where other work keeps the
processors busy nothing is measured. NumPy is imported after the number of threads is set.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

VERBS = ("attention", "multihead", "rnn", "decode", "models", "memory", "scaling", "accuracy")
QUICK = {"attention": 0.6, "multihead": 0.8, "rnn": 0.9, "decode": 1.0}  # without a verb; when each has to be done
LIMIT = 270.0  # seconds of --quick for all rows to begin; the last one and the start take the rest of 5 minutes


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", nargs="?", choices=(*VERBS, "tasks"), help="all of them unless given")
    parser.add_argument("--quick", action="store_true", help="fewer rows, and fewer rounds: at most 5 minutes")
    parser.add_argument("--busy", action="store_true", help="measure although other work keeps the processors busy")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help='only rows with this in their name, as "L=2048 D=64" or "window|packed"'
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="store all results there, with the environment")
    parser.add_argument(
        "--from", dest="stored", metavar="FILE", type=Path, nargs="+",
        help="--plot or --write what was stored; of rows with the same name those of the last file",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="DIR", type=Path, help="draw what was measured (needs matplotlib)")
    parser.add_argument("--write", metavar="PAGE", type=Path, help="fill docs/speed.md, and draw a plot beside it")
    parser.add_argument("--threads", metavar="N", type=int, help="for everybody (default: as many as there are processors)")
    parser.add_argument("--no-company", action="store_true", help="do not check that figures are the same alone and in company")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests
    given = parser.parse_args(arguments)
    if given.write and given.verb not in (None, "attention"):
        parser.error("--write is for attention")
    if given.stored and (given.verb or given.only or given.json or not (given.plot or given.write)):
        parser.error("--from takes --plot or --write, and nothing else")
    try:
        re.compile(given.only)
    except re.error as error:
        parser.error(f"--only is {given.only}, which is no regular expression: {error}")
    if given.threads is not None and given.threads < 1:
        parser.error(f"--threads is {given.threads}, expected at least 1")
    if given.json and not given.json.parent.is_dir():
        parser.error(f"--json: there is no directory {given.json.parent}")
    if given.plot and given.plot.exists() and not given.plot.is_dir():
        parser.error(f"--plot: {given.plot} is not a directory")
    return given


def stored(file: Path) -> dict[str, Any]:
    """What --json has stored."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        if not {"environment", "command", "results"} <= found.keys():
            raise ValueError("it is not what --json stores")
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"--from {file}: {error}") from None
    return found


def together(files: list[Path]) -> tuple[dict[str, Any], list[str]]:
    """What was stored in parts, on one machine, and the commands that did."""
    parts = [stored(file) for file in files]
    measured = ("time", "load", "products")
    same = [{n: x for n, x in part["environment"].items() if n not in measured} for part in parts]
    for file, facts in zip(files, same, strict=True):
        if facts != same[0]:
            other = next(n for n in [*facts, *same[0]] if facts.get(n) != same[0].get(n))
            raise SystemExit(f"--from {file}: {other} is {facts.get(other)}, and in {files[0]} it is {same[0].get(other)}")
    rows = {(row["verb"], row["name"]): row for part in parts for row in part["results"]}
    return {**parts[-1], "results": list(rows.values())}, [part["command"] for part in parts]


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    from benchmarks import machine

    if "numpy" not in sys.modules:
        machine.limit(given.threads)
    from benchmarks import plots, speed
    from npattn import environment

    if given.write and not given.stored:
        speed.check(given.write, machine.vendor(machine.processor()))
    if given.plot:
        try:
            plots.pyplot()
        except ImportError as error:
            raise SystemExit(f"--plot: {error}") from None
    if given.stored:
        summarize(given, *together(given.stored))
        return 0
    started, facts = time.monotonic(), machine.facts()
    machine.print_facts(facts)
    if not (given.tiny or given.busy) and (busy := environment.busy()):
        raise SystemExit(f"too busy to measure: {busy}. --busy measures all the same")
    verbs = QUICK if given.quick and not given.verb else dict.fromkeys([given.verb] if given.verb else VERBS, 1.0)
    if given.quick:
        others = [v for v in VERBS if v not in verbs] if not given.verb else []
        print("this takes 5 minutes at most" + (f"; not measured unless asked for: {', '.join(others)}" if others else ""))
    results: dict[str, Any] = {"environment": facts, "command": command(arguments), "results": []}

    def done(row: dict[str, Any]) -> None:  # what was measured is not lost when a run is stopped
        results["results"].append(row)
        store(given, results)

    for verb, part in verbs.items():
        run(verb, given, results, done, started + part * LIMIT if given.quick else math.inf)
    if not results["results"]:
        raise SystemExit(f"no row has {given.only!r} in its name")
    summarize(given, results, [results["command"]])
    store(given, results)
    return 0


def store(given: argparse.Namespace, results: dict[str, Any]) -> None:
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


def command(arguments: list[str] | None) -> str:
    return f"python -m benchmarks {shlex.join(sys.argv[1:] if arguments is None else arguments)}".strip()


def run(
    verb: str, given: argparse.Namespace, results: dict[str, Any], done: Callable[[dict[str, Any]], None], until: float
) -> None:
    """One verb; ``done`` gets its rows as soon as they are there. until : when the last row has to begin, by time.monotonic"""
    from benchmarks import accuracy, attention, company, decode, harness, memory, models, multihead, rnn, scaling, tasks
    from benchmarks.cases import Case

    size = "tiny" if given.tiny else "quick" if given.quick else "full"
    plan = replace({"tiny": harness.TINY, "quick": harness.QUICK, "full": harness.Plan()}[size], until=until)
    text = given.only
    if verb == "attention":
        asked = any(harness.matches(text, case.name) for case in attention.grid(size))
        if size != "quick" and not given.no_company and asked:
            case = Case(8, 4, 1, 2, mask="causal") if size == "tiny" else Case(1024, 64, 1, 8, mask="causal")
            names = ("blockwise",) if size == "tiny" else None
            results["company"] = company.report(case, {"tiny": 1, "full": 15}[size], names)
            store(given, results)
        attention.run(size, plan, text, done)
        if given.verb and not text and size != "tiny":  # what else is aimed at
            rnn.run(size, plan, "", done)
            if size == "full":
                memory.run("longest", "", done)
    elif verb == "memory":
        memory.run(size, text, done)
    elif verb == "accuracy":
        print()
        accuracy.main(size != "full", lambda row: done({"verb": "accuracy", "name": row["inputs"], **row}))
    else:
        module: Any = {"multihead": multihead, "rnn": rnn, "scaling": scaling, "decode": decode, "models": models,
                       "tasks": tasks}[verb]  # fmt: skip
        module.run(size, plan, text, done)


def how(commands: list[str], page: str) -> str:
    """The commands that measure all of it once more and write the page; where files were, is nobody's business."""
    paths, plain = ("--json", "--plot", "--write", "--from"), list[str]()
    for command in commands:
        words = shlex.split(command)
        plain.append(shlex.join(x for before, x in zip(["", *words], words, strict=False) if not {before, x} & {*paths}))
    if len(plain) == 1:
        return f"{plain[0]} --write {page}"
    files = [f"{number}.json" for number, _ in enumerate(plain, 1)]
    parts = [f"{command} --json {file}" for command, file in zip(plain, files, strict=True)]
    return " && ".join([*parts, f"python -m benchmarks --from {' '.join(files)} --write {page}"])


def summarize(given: argparse.Namespace, results: dict[str, Any], commands: list[str]) -> None:
    """What is aimed at, the plots and the page."""
    from benchmarks import machine, plots, speed, targets

    rows, facts = results["results"], results["environment"]
    found = targets.targets(rows, machine.vendor(facts["processor"]) == "Intel")
    results["targets"] = targets.as_rows(found)
    asked = [(next((word for word in words if word in (*VERBS, "tasks")), ""), words) for words in map(shlex.split, commands)]
    if any(verb in ("", "attention") and "--only" not in words for verb, words in asked):
        targets.show(found)
    elif any(t.values for t in found):
        targets.show([t for t in found if t.values])
    written = plots.draw_all(rows, facts, given.plot) if given.plot else []
    if given.plot and not written:
        print(f"--plot: there is no picture of {' and '.join(sorted({row['verb'] for row in rows}))}")
    if given.write:
        written += speed.write(given.write, rows, facts, found, how(commands, given.write.name))
    for file in written:
        print(f"written: {file}")


if __name__ == "__main__":
    raise SystemExit(main())
