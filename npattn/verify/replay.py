"""A failing case by itself: replayed with its seed, made as small as it still fails, and saved for another program to read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

import npattn
from npattn.masks import as_mask
from npattn.verify.candidates import Candidate, canonical
from npattn.verify.judge import Result, Settings, call_backward, call_forward, examine
from npattn.verify.precision import of_dtype


def fails(candidate: Candidate, case: Any, seed: int, settings: Settings) -> bool:
    """Whether a case of these sizes can be drawn and is wrong."""
    try:
        return examine(candidate, case, seed, settings).status == "wrong"
    except (ValueError, IndexError, ZeroDivisionError):  # options that leave nothing to draw, or a twist that does not fit
        return False


def shrink(candidate: Candidate, case: Any, seed: int, settings: Settings) -> Any:
    """The smallest case found that is still wrong: each letter in turn is halved, then lowered by one, until nothing helps.

    Heads and groups stay what they are to each other. An empty axis would be another case: no letter goes below 1.
    """
    settings = dataclasses.replace(settings, power=False)
    if not hasattr(case, "sizes") or not fails(candidate, case, seed, settings):
        return case
    best, again = case, True
    while again:
        again = False
        for smaller in _smaller(best):
            if fails(candidate, smaller, seed, settings):
                best, again = smaller, True
                break
    return best


def _smaller(case: Any) -> list[Any]:
    """The next cases to try, the greatest steps first."""
    sizes, found = dict(case.sizes), []
    if len(case.lead) == 1 and case.lead[0] > 1:
        found += [dataclasses.replace(case, lead=(n,)) for n in dict.fromkeys((1, case.lead[0] // 2, case.lead[0] - 1))]
    together = [("H", "G")] if sizes["H"] == sizes["G"] else [("G",)]
    groups = [*together, ("L", "S"), ("L",), ("S",), *([("D", "E")] if sizes["D"] == sizes["E"] else []), ("D",), ("E",)]
    for halve in (True, False):
        for letters in groups:
            new = {**sizes, **{n: max(1, sizes[n] // 2) if halve else sizes[n] - 1 for n in letters}}
            if new != sizes and all(new[letter] >= 1 for letter in letters):
                found.append(dataclasses.replace(case, sizes=new))
    return found


def shapes(case: Any) -> str:
    """The sizes of a case in words."""
    lead = ", ".join(map(str, case.lead))
    return f"B={lead or '-'}, " + ", ".join(f"{letter}={n}" for letter, n in case.sizes.items())


def save(path: Path, candidate: Candidate, case: Any, seed: int, settings: Settings, result: Result) -> None:
    """Everything about one case in an npz file: inputs and options as given, the truth, sigma, and what was returned."""
    problem, precision = case.problem(seed), settings.precision or of_dtype(case.problem(seed).dtype)
    if settings.precision is not None:
        problem, precision = problem.stored(precision), precision.declared()
    problem = canonical(problem)
    arrays: dict[str, Any] = {**problem.inputs, **problem.cotangents}
    given, _ = candidate.arguments(problem, candidate.forward)
    options = given | dict(problem.options)
    if problem.op == "attention" and problem.parts:
        options["allowed"] = as_mask("mask", problem.mask).bind(problem.shape).dense()
    plain = {n: x for n, x in options.items() if isinstance(x, (int, float, str, bool))}
    arrays |= {n: x for n, x in options.items() if n not in plain and x is not None}
    truth = candidate.truth(problem, precision)
    if truth is not None:
        arrays |= {f"want_{n}": np.asarray(x, np.float64) for n, x in truth.values.items()}
        arrays |= {f"sigma_{n}": x for n, x in truth.sigma.items()}
    forward = call_forward(candidate, problem)
    backward = call_backward(candidate, problem, forward.values) if forward.values else forward
    got = {**forward.values, **backward.values}
    arrays |= {f"got_{n}": x for n, x in got.items() if isinstance(x, np.ndarray)}
    about = {
        "npattn": npattn.__version__, "candidate": candidate.name, "op": problem.op, "case": case.name, "seed": seed,
        "sizes": dict(getattr(case, "sizes", {})), "lead": list(getattr(case, "lead", ())), "options": plain,
        "level": settings.level, "precision": precision.name, "status": result.status,
        "wrong": [c.text for c in result.checks if c.status == "wrong"],
        "diagnosis": [e.text for e in result.explanations],
    }  # fmt: skip
    flat: dict[str, Any] = {"about": np.array(json.dumps(about))}
    for name, x in arrays.items():
        parts = x.items() if isinstance(x, dict) else x._asdict().items() if hasattr(x, "_asdict") else [("", x)]
        for part, value in parts:
            if value is not None:
                flat[f"{name}_{part}" if part else name] = np.asarray(value)
    np.savez(path, **flat)
