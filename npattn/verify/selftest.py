"""The test of verify itself: the functions that judge a candidate have to catch all seeded bugs, and to name most of them.

The seeds are made from the records of the ops. Each `Change` of an op becomes a candidate: the op's equations, run in float32
with that change. Wrappers around the unchanged equations are bugs that any op can have. The diagnosis runs the same changes, so
that a bug named here proves little. How well bugs are named is therefore measured on other implementations: tests/seeded.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npattn.tolerances import GOOD_MAX
from npattn.verify.candidate import Candidate
from npattn.verify.conditions import examine_conditions
from npattn.verify.conventions import Convention
from npattn.verify.explain import Diagnostician, Listener
from npattn.verify.judge import Result, Settings, examine
from npattn.verify.op import Change, Op, Problem, Values, facts, holds_integers
from npattn.verify.ops import OPS
from npattn.verify.precision import of_dtype
from npattn.verify.search import distance
from npattn.verify.stages import NOT_APPLICABLE, Variants, run

SETTINGS = Settings(power=False)
NAMED = 0.9  # at least this share of the seeds has to be named
SMALL = 50_000  # elements of the scores: cases of at least this size are not used


class Seed(NamedTuple):
    """One bug, and the texts that count as its name."""

    op: Op
    kind: str  # "change", "in the backward" or "wrapper"
    name: str
    candidate: Candidate
    name_patterns: tuple[str, ...]  # patterns for the name in a diagnosis, or for the text of a check
    cases: tuple[str, ...]  # the cases on which it is examined


@dataclass(frozen=True)
class Caught:
    """The result for one seed."""

    seed: Seed
    by: str = ""  # the case and tensor that caught it
    diagnosis: tuple[str, ...] = ()  # what the diagnosis says
    named: bool = False


# --- candidates made of the equations --------------------------------------------------------------------------------------


def from_equations(
    op: Op, changes: Iterable[Change] = (), backward: Iterable[Change] | None = None, align: str = "top_left"
) -> Candidate:
    """A candidate made of the op's equations with these changes; it computes in the dtype of its inputs."""
    names = list(op.cases[0].problem().inputs)
    first, *others = (f"d{t}" for t in op.outputs)

    def values(inputs: tuple[Any, ...], given: dict[str, Any], gradients: bool, cotangents: Values) -> Values:
        problem = Problem(op, dict(zip(names, inputs, strict=True)), given, cotangents)
        found = run(problem, given, align, changes, backward=backward, gradients=gradients, dtype=problem.dtype)
        return {t: np.asarray(x, problem.dtype) for t, x in found.items()}

    def forward(*inputs: Any, **given: Any) -> Any:
        found = values(inputs, given, False, {})
        return tuple(found.values()) if others else found[op.outputs[0]]

    def gradients(dout: Any, *inputs: Any, **given: Any) -> Values:
        more = {name: given.pop(name) for name in others if name in given}
        found = values(inputs, given, True, {first: dout, **more})
        return {t: x for t, x in found.items() if t not in op.outputs}

    backward_ = _with_signature(gradients, [first, *names], (*op.calls.keywords, *others))
    convention = Convention() if op.calls.conventions is not None else Convention(causal=align)
    return Candidate("seeded", _with_signature(forward, names, op.calls.keywords), backward_, convention, op.name)


def _with_signature(function: Callable[..., Any], names: list[str], keywords: Iterable[str]) -> Callable[..., Any]:
    """The function, with a signature of these positional names and keywords."""
    P = inspect.Parameter
    parameters = [P(n, P.POSITIONAL_ONLY) for n in names] + [P(n, P.KEYWORD_ONLY, default=None) for n in keywords]
    vars(function)["__signature__"] = inspect.Signature(parameters)
    return function


# --- wrappers --------------------------------------------------------------------------------------------------------------


def _changing_each_array(change: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper that changes each array that a function returns."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*inputs: Any, **given: Any) -> Any:
            found = function(*inputs, **given)
            if isinstance(found, dict):
                return {t: change(x) for t, x in found.items()}
            return tuple(map(change, found)) if isinstance(found, tuple) else change(found)

        return wrapped

    return wrap


def _writes(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*inputs: Any, **given: Any) -> Any:
        next(x for x in inputs if isinstance(x, np.ndarray) and not holds_integers(x))[..., 0] += 1
        return function(*inputs, **given)

    return wrapped


def _keeps_state(function: Callable[..., Any]) -> Callable[..., Any]:
    """For inputs of known shapes it returns again what it returned the first time."""
    seen: dict[Any, Any] = {}

    @functools.wraps(function)
    def wrapped(*inputs: Any, **given: Any) -> Any:
        key = tuple(np.shape(x) for x in inputs if isinstance(x, np.ndarray))
        return seen.setdefault(key, function(*inputs, **given))

    return wrapped


STATE = ("*state is kept*", "*of an earlier call is used*", "*in a second call*", "*in a call after others*",
         "*overwritten by the next call*", "*for another mask*")  # fmt: skip
WITHOUT_NAN = _changing_each_array(np.nan_to_num)
WRAPPERS: dict[str, tuple[Callable[[Callable[..., Any]], Callable[..., Any]], tuple[str, ...]]] = {
    "writes into an input": (_writes, ("*modifie*",)),
    "keeps state": (_keeps_state, STATE),
    "returns float64": (_changing_each_array(lambda x: x.astype(np.float64)), ("*has dtype float64*",)),
    "returns an axis more": (_changing_each_array(lambda x: x[..., None]), ("*has shape*",)),
    "returns None": (_changing_each_array(lambda x: None), ("*is not returned*", "*NoneType*")),
    "returns a list": (_changing_each_array(lambda x: x.tolist()), ("*is a list*",)),
    "times 1.001": (_changing_each_array(lambda x: x * x.dtype.type(1.001)), ("* is 1.001 times what it should be",)),
    "zeros": (_changing_each_array(lambda x: 0 * x), ("*0 everywhere*", "no gradient", "dh ignored")),
    "NaN becomes 0": (WITHOUT_NAN, ("NaN * become* 0", "NaN becomes 0")),
}


# --- the seeds -------------------------------------------------------------------------------------------------------------


def seeds(ops: Iterable[Op] = OPS.values()) -> Iterator[Seed]:
    """All seeds of these ops."""
    for op in ops:
        both = [_Cases(op, align) for align in ("top_left", "bottom_right")]
        for change in op.changes.values():
            # "causal=top_left" changes nothing in equations that are aligned in that way: so both alignments are tried.
            cases, shown = next(((c, names) for c in both if (names := c.showing(change))), (both[0], ()))
            if shown:  # else it needs larger tiles than these cases have, or changes only the order of a sum
                yield Seed(op, "change", change.name, from_equations(op, [change], align=cases.align), (change.name,), shown)
            if shown and op.output_only_stages and change.likely and (alone := cases.showing(change, backward=True)):
                tested = from_equations(op, (), [change], cases.align)
                yield Seed(op, "in the backward", change.name, tested, (change.name,), alone)
        for name, (wrap, name_patterns) in WRAPPERS.items():
            if wrap is WITHOUT_NAN and not both[0].have_nan():
                continue
            honest = from_equations(op)
            assert honest.backward is not None
            for side in ("forward", "backward"):
                functions = {"forward": honest.forward, "backward": honest.backward}
                functions[side] = wrap(functions[side])
                tested = Candidate("seeded", functions["forward"], functions["backward"], op=op.name)
                yield Seed(op, "wrapper", f"{side}: {name}", tested, name_patterns, both[0].names)


class _Cases:
    """The cases that are not large, those in float32 first; it finds one in which a change shows."""

    def __init__(self, op: Op, align: str) -> None:
        self.op, self.align, self.honest = op, align, from_equations(op, align=align)
        ordered = sorted(op.cases, key=lambda c: (c.dtype, c.name not in op.basics))
        self.names = tuple(c.name for c in ordered if math.prod(c.problem().shape) < SMALL)
        self.prepared = functools.cache(self._prepare)

    def _prepare(self, name: str) -> tuple[Variants, Values, Values]:
        """One case: its equations, truth and sigma."""
        problem = self.op.canonical(self.op.by_name[name].problem())
        given, _ = self.honest.arguments(problem, self.honest.forward)
        truth = problem.truth(of_dtype(problem.dtype))
        assert truth is not None
        return Variants(problem, given, self.align), truth.values, truth.sigma

    def showing(self, change: Change, backward: bool = False) -> tuple[str, ...]:
        """The first case in which the change is far off, or else the first in which NaN or inf differ; empty if there is none.

        backward : the change is made in the backward alone
        """
        with_nan = ""
        if backward and not self.prepared(self.names[0])[0].changes_forward(change):
            return ()
        for name in self.names:
            variants, want, sigma = self.prepared(name)
            problem = variants.call[0]
            if not change.needs <= facts(problem, variants.call[1]):
                continue
            try:
                values = variants.everything(change) if not backward else run(
                    *variants.call, (), backward=[change], dtype=np.float64, low=problem.dtype)  # fmt: skip
            except NOT_APPLICABLE:
                continue
            far = [distance(want[t].astype(problem.dtype), x, sigma[t])[1] for t, x in values.items() if t in want]
            if any(4 * GOOD_MAX < off < np.inf for off in far):
                return (name,)
            with_nan = with_nan or name * (np.inf in far)
        return (with_nan,) if with_nan else ()

    def have_nan(self) -> bool:
        """Whether NaN is the right value anywhere in these cases."""
        return any(np.isnan(x).any() for name in self.names for x in self.prepared(name)[1].values())


def examined(seed: Seed) -> Caught:
    """Examine a seed on its own cases, after a few others (`Op.basics`) in which most bugs do not show."""
    op, diagnostician = seed.op, Diagnostician(seed.candidate.align, pairs=0)
    silent = Listener(diagnostician)
    for name in op.basics:
        if name not in seed.cases:
            examine(seed.candidate, op.by_name[name], 0, SETTINGS, silent)
    for name in seed.cases:
        result = examine(seed.candidate, op.by_name[name], 0, SETTINGS, diagnostician)
        wrong = [c for c in result.checks if c.status == "wrong"]
        if not wrong:
            wrong = [c for c in examine_conditions(seed.candidate, op.by_name[name], 0, SETTINGS) if c.status == "wrong"]
        if wrong:
            return _caught_by(seed, result, wrong)
    return Caught(seed)


def _caught_by(seed: Seed, result: Result, wrong: list[Any]) -> Caught:
    texts = [c.text for c in wrong]
    shown = tuple(dict.fromkeys(n for e in result.explanations for n in (*e.names, *e.others[:3])))
    named = any(text == name or fnmatch.fnmatchcase(text, name) for text in (*shown, *texts) for name in seed.name_patterns)
    diagnosis = tuple(dict.fromkeys(" and ".join(e.names) for e in result.explanations)) or (texts[0],)
    return Caught(seed, f"{result.case}: {wrong[0].tensor}", diagnosis, named)


def run_self_test(line: Callable[[str], None], chosen: Iterable[Seed] | None = None) -> bool:
    """Print a line for each seed, and a table. Returns whether all seeds were caught and enough of them named."""
    started = time.perf_counter()
    found: list[Caught] = []
    for seed in seeds() if chosen is None else chosen:
        one = examined(seed)
        found.append(one)
        mark = "NOT CAUGHT" if not one.by else "named" if one.named else "caught"
        line(f"  {mark:10} {seed.op.name:10} {seed.name:60} {one.by:40} {'; '.join(one.diagnosis)[:100]}")
    groups: dict[tuple[str, str], list[Caught]] = {}
    for one in found:
        groups.setdefault((one.seed.op.name, one.seed.kind), []).append(one)
    line(f"\n{'op':12} {'seeds':16} {'seeded':>6} {'caught':>6} {'named':>6}")
    for (op, kind), rows in groups.items():
        line(f"{op:12} {kind:16} {len(rows):6} {sum(bool(c.by) for c in rows):6} {sum(c.named for c in rows):6}")
    caught, named = sum(bool(c.by) for c in found), sum(c.named for c in found)
    line(f"{'all':29} {len(found):6} {caught:6} {named:6}")
    enough = caught == len(found) and named >= NAMED * len(found)
    verdict = "RIGHT" if enough else "WRONG"
    line(f"\n{verdict}: {caught} of {len(found)} caught, {named} named ({named / len(found):.0%}), "
         f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    return enough


__all__ = ["Caught", "Seed", "examined", "from_equations", "run_self_test", "seeds"]
