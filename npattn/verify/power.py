"""The power of the judge: whether it rejects zeros, an error of 1e-3 and the likely mistakes on the same inputs.

A verdict counts only if all of them are rejected. How large the errors of the likely mistakes are does not depend on the
candidate. For the cases and seeds of npattn these errors are stored in power.json, by a digest of the inputs and the call; for
others they are computed. ``make power`` writes the file anew, and tests/test_power.py compares it with what is computed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npattn.ops.allowed import quiet
from npattn.ops.checks import Array
from npattn.tolerances import PLANTED
from npattn.verify.candidate import Candidate
from npattn.verify.op import Change, Problem, Truth, facts, parts
from npattn.verify.ops import OPS
from npattn.verify.precision import Precision, of_dtype
from npattn.verify.rounding import LEVELS, accepts, units
from npattn.verify.search import LARGE
from npattn.verify.stages import NOT_APPLICABLE, Variants

Reach = dict[str, tuple[float, float]]  # by tensor: the largest error in sigma, and the rms; inf if the shape differs
POWER_FILE = Path(__file__).parent / "power.json"
SEEDS = range(3)  # those of --deep


@quiet
def blind_spots(
    problem: Problem, given: dict[str, Any], align: str, truth: Truth, tested: list[str], level: str, precision: Precision,
    base: list[Change], likely: bool = True,
) -> dict[str, str]:  # fmt: skip
    """By tensor: what the judge would accept in its place, of zeros, a small error and, if asked for, the likely mistakes."""
    scale = truth.det if level == "bounded" else truth.sigma
    planted = max(PLANTED, 16 * precision.coarsest)

    def rejects(t: str, value: Array) -> bool:
        return value.shape != truth.values[t].shape or not accepts(level, units(value, truth.values[t], scale[t]))

    blind: dict[str, str] = {}
    for t in tested:
        want = truth.values[t]
        some = np.isfinite(want) & (want != 0)
        if not some.any():
            # All is 0, -inf or NaN. Anything else is rejected if sigma is 0; if it is not, the tensor is not tested.
            if want.size and (scale[t][np.isfinite(want)] > 0).any():
                blind[t] = "the true value is 0"
        elif not rejects(t, np.where(some, 0, want)):
            blind[t] = "zeros would pass"
        elif not rejects(t, np.where(some, want * (1 + planted), want)):
            blind[t] = f"a relative error of {planted:.2g} would pass"
    if not likely:
        return blind
    kept = None if level == "bounded" else _kept().get(digest(problem, given, align, precision, base))
    others = _computed(problem, given, align, truth, scale, tested, level, base) if kept is None else kept
    for name, reach in others.items():
        seen = {t: reach[t] for t in tested if t in reach}
        worst = max(seen, key=lambda t: seen[t][0], default="")
        # Below 1 sigma the mistake changes nothing here but rounding.
        if worst and seen[worst][0] >= 1 and not any(_rejected(level, *seen[t]) for t in seen):
            blind.setdefault(worst, f"{name!r} would pass")
    return blind


def _rejected(level: str, most: float, rms: float) -> bool:
    limits = (1.0, math.inf) if level == "bounded" else LEVELS[level][::-1]
    return most > limits[0] or rms > limits[1]


def likely_mistakes(problem: Problem, given: Mapping[str, Any]) -> list[Change]:
    """The likely mistakes that can show in a call."""
    present = facts(problem, given)
    return [c for c in problem.op.changes.values() if c.likely and c.needs <= present]


def _computed(
    problem: Problem, given: dict[str, Any], align: str, truth: Truth, scale: Mapping[str, Array], tested: Iterable[str],
    level: str, base: list[Change],
) -> dict[str, Reach]:  # fmt: skip
    """How far the likely mistakes are from the truth, without those whose outputs, which are cheap to compute, are rejected."""
    found: dict[str, Reach] = {}
    if not math.prod(problem.shape):
        return found
    try:
        variants = Variants(problem, given, align, base)
    except NOT_APPLICABLE:  # the equations of attention are for rank 4
        return found
    least = 16 if problem.dtype == np.float64 else 0  # sigma; less may be rounding of these runs, which are in float64, too
    for change in likely_mistakes(problem, given)[: 6 if math.prod(problem.shape) > LARGE else None]:
        with contextlib.suppress(*NOT_APPLICABLE):
            outputs = variants.outputs(change)
            reach = _reach(outputs or {}, truth, scale)
            if outputs is None or any(_rejected(level, *reach[t]) for t in tested if t in reach):
                continue
            values = variants.everything(change)
            moved = {t: x for t, x in values.items() if _moved(x, variants.unchanged.get(t), truth.sigma.get(t), least)}
            if moved:
                found[change.name] = _reach(moved, truth, scale)
    return found


@quiet
def _reach(values: Mapping[str, Array], truth: Truth, scale: Mapping[str, Array]) -> Reach:
    found: Reach = {}
    for t, x in values.items():
        want = truth.values.get(t)
        if want is None or x.shape != want.shape:
            found[t] = (math.inf, math.inf)
        elif (off := units(x, want, scale[t])).size:
            found[t] = (float(off.max()), float(np.sqrt(np.square(off).mean())))
    return found


def _moved(a: Array, b: Array | None, sigma: Array | None, least: float) -> bool:
    """Whether a change has moved any element by more than ``least`` sigma."""
    if b is None or sigma is None or a.shape != b.shape or a.shape != sigma.shape:
        return True
    return bool((units(a, b, np.maximum(sigma, 1e-300)) > least).any())


# --- what is kept -----------------------------------------------------------------------------------------------------------


def digest(problem: Problem, given: Mapping[str, Any], align: str, precision: Precision, base: list[Change]) -> str:
    """A hash of everything that `Reach` depends on besides the code: the call, its numbers, the mistakes, the precision."""
    names = [c.name for c in likely_mistakes(problem, given)]
    call = (sorted(facts(problem, given)), align, precision, [c.name for c in base], names)
    text = hashlib.blake2b(repr(call).encode(), digest_size=8)
    arrays = {**problem.inputs, **problem.cotangents, **problem.options}
    if "mask" in problem.options:
        del arrays["mask"]
        arrays["mask"] = problem.op.as_arrays(problem)["mask"]
    for name, _, x in parts(arrays):
        text.update(f"{name} {getattr(x, 'shape', '')} {getattr(x, 'dtype', x)}".encode())
        text.update(x.tobytes() if isinstance(x, np.ndarray) else b"")
    return text.hexdigest()


@functools.cache
def _kept() -> dict[str, dict[str, Reach]]:
    return dict(json.loads(POWER_FILE.read_text())) if POWER_FILE.exists() else {}


def calls(seeds: Iterable[int] = SEEDS) -> Iterable[tuple[Problem, dict[str, Any], Precision]]:
    """Every case of attention, once with all masks as one array, once with causal, window and key_lengths as keywords."""
    op = OPS["attention"]
    candidate, in_words = Candidate("", print), set(op.calls.keywords) - set(op.calls.assumed)
    for seed, case in itertools.product(seeds, op.cases):
        problem = op.canonical(case.problem(seed))
        for takes in (op.calls.assumed, op.calls.keywords):
            given, _ = op.calls.arguments(candidate, problem, frozenset(takes), False)
            if takes is op.calls.assumed or given.keys() & in_words:
                yield problem, given, of_dtype(problem.dtype)


def reaches(problem: Problem, given: dict[str, Any], precision: Precision) -> dict[str, Reach] | None:
    """What is stored of one call: the mistakes that move some tensor by 1 sigma or more and are accepted there as "good"."""
    truth = problem.truth(precision)
    if truth is None:
        return None
    found = _computed(problem, given, "top_left", truth, truth.sigma, (), "good", [])
    weak = {
        name: reach for name, reach in found.items()
        if any(most >= 1 and not _rejected("good", most, rms) for most, rms in reach.values())
    }  # fmt: skip
    return {name: {t: (_short(most), _short(rms)) for t, (most, rms) in reach.items()} for name, reach in weak.items()}


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def write() -> None:
    """Write power.json anew."""
    found = {}
    for problem, given, precision in calls():
        reach = reaches(problem, given, precision)
        if reach is not None:
            found[digest(problem, given, "top_left", precision, [])] = reach
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found))
    POWER_FILE.write_text(f"{{\n{lines}\n}}\n")
    print(f"{len(found)} calls, {sum(map(len, found.values()))} mistakes that some tensor does not tell: {POWER_FILE.name}")
