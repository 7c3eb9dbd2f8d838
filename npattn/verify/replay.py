"""One failing case: run again with its seed, shrunk for as long as it fails, and saved for another program to read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

import npattn
from npattn.verify.api import examine_all
from npattn.verify.candidate import Candidate, call_backward, call_forward
from npattn.verify.judge import Result, Settings, as_given
from npattn.verify.op import Problem, parts


def fails(candidate: Candidate, case: Any, seed: int, settings: Settings) -> bool:
    """Whether a case can be drawn with these sizes and is wrong."""
    try:
        return examine_all(candidate, case, seed, settings).status == "wrong"
    except (ValueError, IndexError, ZeroDivisionError):  # nothing can be drawn with these options, or a twist does not fit
        return False


def shrink(candidate: Candidate, case: Any, seed: int, settings: Settings) -> Any:
    """A smaller case that is still wrong: `Case.smaller` is tried again and again, until every smaller case is right.

    An axis of size 0 would be another kind of case, so no letter goes below 1.
    """
    settings = dataclasses.replace(settings, power=False)
    if not case.smaller() or not fails(candidate, case, seed, settings):
        return case
    best, again = case, True
    while again:
        again = False
        for smaller in best.smaller():
            if fails(candidate, smaller, seed, settings):
                best, again = smaller, True
                break
    return best


LEGEND = "HGLSDEMFVTN"  # the letters of npattn/__init__.py in their order, without the batch


def sizes_of(problem: Problem) -> dict[str, int]:
    """The size for each letter, read off the inputs, since the options of a case may have changed its sizes."""
    found: dict[str, int] = {}
    for name, x in problem.inputs.items():
        if isinstance(x, np.ndarray):
            found |= dict(zip(problem.op.axes.get(f"d{name}", "")[::-1], x.shape[::-1], strict=False))
    return {letter: found[letter] for letter in LEGEND if letter in found}


def shapes(case: Any, seed: int = 0) -> str:
    """The sizes of a case as a text."""
    problem = case.problem(seed)
    (name, x), *_ = problem.inputs.items()
    lead = ", ".join(map(str, x.shape[: 1 - len(problem.op.axes[f"d{name}"])]))
    return f"B={lead or '-'}, " + ", ".join(f"{letter}={n}" for letter, n in sizes_of(problem).items())


def save(path: Path, candidate: Candidate, case: Any, seed: int, settings: Settings, result: Result) -> None:
    """Write everything about one case to an npz file: inputs and options as given, the truth, sigma, and what was returned."""
    problem, precision = as_given(case, seed, settings)
    arrays: dict[str, Any] = {**problem.inputs, **problem.cotangents}
    options, _ = candidate.arguments(problem, candidate.forward)
    options = candidate.in_convention(problem, options)
    if "mask" in problem.options:
        options["allowed"] = problem.op.as_arrays(problem)["mask"]
    plain = {n: x for n, x in options.items() if isinstance(x, (int, float, str, bool, tuple))}  # a window may hold None
    arrays |= {n: x for n, x in options.items() if n not in plain}
    truth = None if problem.op.undefined(problem, precision) else candidate.truth(problem, precision)
    if truth is not None:
        arrays |= {f"want_{n}": np.asarray(x, np.float64) for n, x in truth.values.items()}
        arrays |= {f"sigma_{n}": x for n, x in truth.sigma.items()}
    about = {
        "npattn": npattn.__version__, "candidate": candidate.name, "op": problem.op.name, "case": case.name, "seed": seed,
        "sizes": sizes_of(problem), "lead": list(getattr(case, "lead", ())),
        "options": plain, "convention": candidate.convention.changes(), "level": settings.level, "precision": precision.name,
        "status": result.status,
        "wrong": [c.text for c in result.checks if c.status == "wrong"],
        "diagnosis": [e.text for e in result.explanations],
    }  # fmt: skip
    flat = {"about": np.array(json.dumps(about)), **_flat(arrays)}  # copies: a candidate may write into its inputs
    forward = call_forward(candidate, problem)
    flat |= _flat({f"got_{n}": x for n, x in forward.values.items() if isinstance(x, np.ndarray)})
    if forward.values:
        backward = call_backward(candidate, problem, forward.values)
        flat |= _flat({f"got_{n}": x for n, x in backward.values.items() if isinstance(x, np.ndarray)})
    with path.open("wb") as file:  # given a path, numpy would append .npz to it
        np.savez(file, **flat)


FEW = 3000  # numbers that are printed; what is larger is for --save


def code(candidate: Candidate, spec: Any, case: Any, result: Result, settings: Settings) -> list[str]:
    """A program that makes the call of a case without npattn, and prints how far its first wrong tensor is off.

    spec : the names of the candidate and its backward, as they were given. Empty if the arrays are too large.
    """
    problem, precision = as_given(case, result.seed, settings)
    wrong = next((c.tensor for c in result.checks if c.status == "wrong"), "")
    backward = wrong in problem.gradients and spec.backward is not None
    function = candidate.backward if backward else candidate.forward
    options = candidate.in_convention(problem, candidate.arguments(problem, function, backward)[0]) if function else {}
    truth = None if problem.op.undefined(problem, precision) else candidate.truth(problem, precision)
    given = {**({"dout": problem.cotangents["dout"]} if backward else {}), **problem.inputs, **options}
    arrays = [x for x in given.values() if isinstance(x, np.ndarray)]
    plain = all(x is None or isinstance(x, (np.ndarray, int, float, str, bool, tuple)) for x in given.values())
    if truth is None or wrong not in truth.values or not plain or sum(x.size for x in arrays) > FEW:
        return []
    where, _, name = spec.name.rpartition(":")
    if backward:
        name = spec.backward.rpartition(":")[2]
        where = spec.backward.rpartition(":")[0] or where
    at = (problem.gradients if backward else problem.outputs).index(wrong)
    positional = [n for n in given if n not in options]
    call = ", ".join([*positional, *(f"{n}={n}" for n in options)])
    return [
        "import numpy as np", "from numpy import inf, nan", *_imported(where, name), "",
        *(f"{n} = {_literal(x)}" for n, x in given.items()),
        f"want = {_literal(truth.values[wrong].astype(np.float64))}  # {wrong}",
        f"got = {name}({call})",
        f"got = [*got.values()][{at}] if isinstance(got, dict) else got[{at}] if isinstance(got, tuple) else got",
        "print(np.abs(got - want).max())",
    ]  # fmt: skip


def _imported(where: str, name: str) -> list[str]:
    """The lines that import a function from a module or a file."""
    if not where.endswith(".py"):
        return [f"from {where} import {name}"] if where else [f"# {name} is what npattn verify knows by that name"]
    path = Path(where).resolve()
    return ["import sys", f"sys.path.insert(0, {str(path.parent)!r})", f"from {path.stem} import {name}"]


def _literal(x: Any) -> str:
    return f"np.array({x.tolist()}, np.{x.dtype.name})" if isinstance(x, np.ndarray) else repr(x)


def _flat(arrays: dict[str, Any]) -> dict[str, Any]:
    """Copies of the arrays; a parameter has the names of the whole and of its part."""
    return {f"{name}_{part}" if part else name: np.array(x) for name, part, x in parts(arrays) if x is not None}
