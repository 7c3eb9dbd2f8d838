"""A failing case by itself: replayed with its seed, made as small as it still fails, and saved for another program to read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

import npattn
from npattn.verify.candidates import Candidate
from npattn.verify.cases import Truth, dense_mask
from npattn.verify.judge import Result, Settings, as_given, call_backward, call_forward
from npattn.verify.precision import Precision
from npattn.verify.report import examine_all


def fails(candidate: Candidate, case: Any, seed: int, settings: Settings) -> bool:
    """Whether a case of these sizes can be drawn and is wrong."""
    try:
        return examine_all(candidate, case, seed, settings).status == "wrong"
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
            new = {**sizes, **{n: min(sizes[n], max(1, sizes[n] // 2)) if halve else sizes[n] - 1 for n in letters}}
            if new != sizes and all(new[letter] >= 1 for letter in letters):
                found.append(dataclasses.replace(case, sizes=new))
    return found


def sizes_of(problem: Any) -> dict[str, int]:
    """What the letters stand for in a problem of attention; its options may have changed the sizes of the case."""
    q, k, v = problem.inputs.values()
    heads = {"H": q.shape[-3], "G": k.shape[-3]} if q.ndim > 2 else {}
    return {**heads, "L": q.shape[-2], "S": k.shape[-2], "D": q.shape[-1], "E": v.shape[-1]}


def shapes(case: Any, seed: int = 0) -> str:
    """The sizes of a case in words."""
    problem = case.problem(seed)
    lead = ", ".join(map(str, problem.q.shape[:-3]))
    return f"B={lead or '-'}, " + ", ".join(f"{letter}={n}" for letter, n in sizes_of(problem).items())


def save(path: Path, candidate: Candidate, case: Any, seed: int, settings: Settings, result: Result) -> None:
    """Everything about one case in an npz file: inputs and options as given, the truth, sigma, and what was returned."""
    problem, precision = as_given(case, seed, settings)
    arrays: dict[str, Any] = {**problem.inputs, **problem.cotangents}
    options, _ = candidate.arguments(problem, candidate.forward)
    if problem.op == "attention":
        options = candidate.present(options, problem.shape)
        if problem.parts:
            options["allowed"] = dense_mask(problem)
    plain = {n: x for n, x in options.items() if isinstance(x, (int, float, str, bool, tuple))}  # a window may hold None
    arrays |= {n: x for n, x in options.items() if n not in plain}
    truth = _truth(candidate, problem, precision)
    if truth is not None:
        arrays |= {f"want_{n}": np.asarray(x, np.float64) for n, x in truth.values.items()}
        arrays |= {f"sigma_{n}": x for n, x in truth.sigma.items()}
    about = {
        "npattn": npattn.__version__, "candidate": candidate.name, "op": problem.op, "case": case.name, "seed": seed,
        "sizes": sizes_of(problem) if problem.op == "attention" else {}, "lead": list(getattr(case, "lead", ())),
        "options": plain, "convention": candidate.convention.changes(), "level": settings.level, "precision": precision.name,
        "status": result.status,
        "wrong": [c.text for c in result.checks if c.status == "wrong"],
        "diagnosis": [e.text for e in result.explanations],
    }  # fmt: skip
    flat = {"about": np.array(json.dumps(about)), **_flat(arrays)}  # copies: a candidate may write on what it is given
    forward = call_forward(candidate, problem)
    flat |= _flat({f"got_{n}": x for n, x in forward.values.items() if isinstance(x, np.ndarray)})
    if forward.values:
        backward = call_backward(candidate, problem, forward.values)
        flat |= _flat({f"got_{n}": x for n, x in backward.values.items() if isinstance(x, np.ndarray)})
    with path.open("wb") as file:  # by its name, numpy would add .npz to it
        np.savez(file, **flat)


def _truth(candidate: Candidate, problem: Any, precision: Precision) -> Truth | None:
    try:
        return candidate.truth(problem, precision)
    except NotImplementedError:  # a precision class that this op has no model of
        return None


def _flat(arrays: dict[str, Any]) -> dict[str, Any]:
    """Copies of the arrays, those of parameters by the names of both."""
    flat: dict[str, Any] = {}
    for name, x in arrays.items():
        parts = x.items() if isinstance(x, dict) else x._asdict().items() if hasattr(x, "_asdict") else [("", x)]
        flat |= {f"{name}_{part}" if part else name: np.array(value) for part, value in parts if value is not None}
    return flat
