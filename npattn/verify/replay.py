"""One failing case: run again with its seed, shrunk for as long as it fails, and saved for another program to read."""

from __future__ import annotations

import dataclasses
import functools
import json
import keyword
from collections.abc import Iterator
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
    options = {n: dataclasses.astuple(x) if _is_plain(x) else x for n, x in options.items()}
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


def _is_plain(x: Any) -> bool:
    """Whether x is a dataclass of numbers and words, such as the scaling of rotary positions."""
    return dataclasses.is_dataclass(x) and not any(isinstance(y, np.ndarray) for y in vars(x).values())


FEW = 3000  # numbers that are printed; what is larger is for --save


def code(candidate: Candidate, spec: Any, case: Any, result: Result, settings: Settings) -> list[str]:
    """A program that makes the call of a case without npattn, and prints how far its first wrong tensor is off.

    spec : the names of the candidate and its backward, as they were given. Empty if the arrays are too large.
    """
    problem, precision = as_given(case, result.seed, settings)
    wrong = next((c.tensor for c in result.checks if c.status == "wrong"), "")
    backward = wrong in problem.gradients and spec.backward is not None
    truth = None if problem.op.undefined(problem, precision) else candidate.truth(problem, precision)
    positional, named = _given(candidate, problem, backward)
    given = {**positional, **named}
    arrays = [x for x in given.values() if isinstance(x, np.ndarray)]
    plain = all(x is None or isinstance(x, (np.ndarray, int, float, str, bool, tuple)) for x in given.values())
    if truth is None or wrong not in truth.values or not plain or sum(x.size for x in arrays) > FEW:
        return []
    where, _, name = spec.name.rpartition(":")
    if backward:
        name = spec.backward.rpartition(":")[2]
        where = spec.backward.rpartition(":")[0] or where
    at = (problem.gradients if backward else problem.outputs).index(wrong)
    call = ", ".join([*positional, *(f"{n}={n}" for n in named)])
    by_name = ['got = got._asdict() if hasattr(got, "_asdict") else got',
               f'got = got.get("{wrong}", got.get("{wrong[1:]}")) if isinstance(got, dict) else got']  # fmt: skip
    return [
        "import numpy as np", "from numpy import inf, nan", *_imported(where, name), "",
        *_assigned(given, getattr(case, "row", {})),
        f"want = {_literal(truth.values[wrong].astype(np.float64))}  # {wrong}",
        f"got = {name}({call})", *(by_name if backward else []),
        f"got = got[{at}] if isinstance(got, (tuple, list)) else got",
        *_turned_back(candidate, wrong, truth.values[wrong].ndim),
        "print(np.abs(got - want).max())",
    ]  # fmt: skip


def _given(candidate: Candidate, problem: Problem, backward: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a function is given, by position and by name, as it is called. It is not called for that."""
    function = candidate.backward if backward else candidate.forward
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @functools.wraps(function)  # type: ignore[arg-type]  # its signature says how it is called
    def note(*args: Any, **options: Any) -> None:
        seen.append((args, options))

    if backward:
        values = call_forward(candidate, problem).values
        call_backward(dataclasses.replace(candidate, backward=note), problem, values)
    else:
        call_forward(dataclasses.replace(candidate, forward=note), problem)
    args, options = seen[0] if seen else ((), {})
    names = [*([next(iter(problem.cotangents))] if backward else []), *problem.inputs]
    if len(names) != len(args):  # parameters one by one, in the layout of another library
        names = [f"x{i}" for i in range(len(args))]
    return dict(zip(names, args, strict=True)), options


def _assigned(given: dict[str, Any], row: dict[str, str]) -> Iterator[str]:
    """The lines that make what a function is given: each array once, in the memory layout of the row."""
    names: dict[int, str] = {}
    for name, x in given.items():
        if isinstance(x, np.ndarray) and id(x) in names:
            yield f"{name} = {names[id(x)]}"
            continue
        names[id(x)] = name
        yield f"{name} = {_literal(x)}"
        if isinstance(x, np.ndarray) and not (x.flags.c_contiguous and x.flags.writeable):
            layout = LAYOUT_LINES.get(row.get(f"{name} in memory", row.get("memory", "plain")), "")
            a, b = (-3, -2) if x.ndim > 2 else (-1, -2)
            yield from [layout.format(name, a, b)] if layout else []


LAYOUT_LINES = {
    "axes swapped": "{0} = np.ascontiguousarray({0}.swapaxes({1}, {2})).swapaxes({1}, {2})",
    "Fortran": "{0} = np.asfortranarray({0})", "backwards": "{0} = {0}[..., ::-1, :].copy()[..., ::-1, :]",
    "every second row": "{0} = np.repeat({0}, 2, axis=-2)[..., ::2, :]",
    "strides of 0": "{0} = np.broadcast_to({0}[:1], {0}.shape)", "read-only": "{0}.flags.writeable = False",
}  # fmt: skip
"""`LAYOUTS` as lines of a program."""


def _turned_back(candidate: Candidate, tensor: str, rank: int) -> list[str]:
    """The line that brings a tensor from the layout of the candidate's convention into npattn's."""
    c = candidate.convention
    turned = c.lse_layout == "BLH" and rank == 3 if tensor == "lse" else c.layout == "BLHD" and rank == 4
    return ["got = got.swapaxes(1, 2)"] if turned and tensor not in ("dbias", "dsink") else []


def _imported(where: str, name: str) -> list[str]:
    """The lines that import a function from a module or a file."""
    if not where.endswith(".py"):
        return [f"from {where} import {name}"] if where else [f"# {name} is what npattn verify knows by that name"]
    path = Path(where).resolve()
    if not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        return [
            "import sys", "from importlib.util import module_from_spec, spec_from_file_location",
            f"sys.path.insert(0, {str(path.parent)!r})", f'spec = spec_from_file_location("mine", {str(path)!r})',
            "module = module_from_spec(spec)", "spec.loader.exec_module(module)", f"{name} = module.{name}",
        ]  # fmt: skip
    return ["import sys", f"sys.path.insert(0, {str(path.parent)!r})", f"from {path.stem} import {name}"]


def _literal(x: Any) -> str:
    return f"np.array({x.tolist()}, np.{x.dtype.name})" if isinstance(x, np.ndarray) else repr(x)


def _flat(arrays: dict[str, Any]) -> dict[str, Any]:
    """Copies of the arrays; a parameter has the names of the whole and of its part."""
    return {f"{name}_{part}" if part else name: np.array(x) for name, part, x in parts(arrays) if x is not None}
