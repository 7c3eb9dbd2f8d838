"""The search for what explains one wrong case: how near the returned tensors are to those that a change gives.

A hypothesis is a function of a `Search`. It returns explanations of some tensors that are not explained yet. `Op.hypotheses`
lists those of an op in the order in which they are tried; those for every op are in `npattn.verify.explain`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet
from npattn.ops.checks import Array
from npattn.tolerances import GOOD_RMS, MATCH_MAX, MATCH_NEARER, MATCH_RMS, ROUGH_MAX, ROUGH_NEARER, ROUGH_RMS
from npattn.verify.op import Change, Problem, Values, facts
from npattn.verify.stages import NOT_APPLICABLE, Variants, attempt

LARGE = 200_000  # elements of the scores; in larger cases the search may end after the changes that were found before
UNKNOWN = "nothing that is known"
NEVER_WRITTEN = "wrong for keys that nobody sees, and for no other: never written?"
DETACHED = "a gradient of 0 everywhere: detached, or not computed"


@dataclass(frozen=True)
class Explanation:
    """One explanation of wrong tensors: a change that gives the same, or a text that names what is seen."""

    names: tuple[str, ...]  # one change, or two together
    tensors: tuple[str, ...]
    distance: float  # rms, in sigma
    where: str = ""  # "in the backward", or nothing
    others: tuple[str, ...] = ()  # changes that fit here as well
    rounds: bool = False  # what is seen is a rounding, which a class of precision may allow

    @property
    def text(self) -> str:
        name = " and ".join(self.names)
        if self.distance == math.inf:  # no change was matched
            return f"{', '.join(self.tensors)}: {name}{self.where}"
        where = f" {self.where}" if self.where else ""
        more = f"{'; '.join(self.others[:3])}{'; ...' if len(self.others) > 3 else ''}"
        others = f" (here the same as: {more})" if self.others else ""
        return f"{', '.join(self.tensors)}: matches {name}{where} to {self.distance:.2g} sigma{others}"


class Hypothesis(NamedTuple):
    """A kind of explanation."""

    name: str
    cost: str  # "a run", "a run a change", "a run a pair of changes": how many runs of the equations it takes
    test: Callable[[Search], list[Explanation]]


# --- how near --------------------------------------------------------------------------------------------------------------


class Measure:
    """How far arrays are from one that was returned, in sigma.

    sigma is that of the reference, but at least its median: a change may put a rounded number where the reference is exactly 0.
    """

    SAMPLE = 256  # elements that are looked at first: the results of most changes are far away, and these show it

    def __init__(self, got: Any, sigma: Array) -> None:
        self.got = got if isinstance(got, np.ndarray) and got.shape == sigma.shape else None
        if self.got is not None:
            self.x = np.asarray(got, np.float64)
            self.least = np.maximum(np.where(np.isfinite(sigma), sigma, 0), median(sigma, got.dtype))
            self.unit = float(np.finfo(got.dtype).eps) if got.dtype.kind == "f" else 2.0**-23

    @quiet  # where sigma is 0, a difference may have a square above every float
    def of(self, value: Array) -> tuple[float, float]:
        """rms and maximum of the difference in sigma; inf if shapes differ, or the places of NaN or inf do."""
        if self.got is None or self.got.shape != value.shape:
            return np.inf, np.inf
        units = self._units(self.x, np.asarray(value, np.float64), self.least)
        if units is None:
            return np.inf, np.inf
        return (float(np.sqrt(np.square(units).mean())), float(units.max())) if units.size else (0.0, 0.0)

    def is_far(self, value: Array) -> bool:
        """Whether some elements alone make the rms larger than any that `is_match` accepts."""
        if self.got is None or self.got.shape != value.shape:
            return True
        some = slice(None, None, max(1, value.size // self.SAMPLE))
        x, y, least = (a.reshape(-1)[some] for a in (self.x, value, self.least))
        units = self._units(x, np.asarray(y, np.float64), least)
        return units is None or float(np.square(units).sum()) > ROUGH_RMS**2 * value.size

    def _units(self, x: Array, y: Array, least: Array) -> Array | None:
        """|x - y| in sigma; None if they are not finite at the same places."""
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        if not (same | (np.isfinite(x) & np.isfinite(y))).all():
            return None
        with np.errstate(all="ignore"):
            return np.where(same, 0.0, np.abs(x - y) / np.maximum(least, self.unit * np.abs(y) + 1e-300))


def distance(got: Any, value: Array, sigma: Array) -> tuple[float, float]:
    """rms and maximum of the difference of one value, see `Measure`."""
    return Measure(got, sigma).of(value)


def is_match(apart: tuple[float, float], before: float) -> bool:
    """Whether a tensor matches a change: within rounding, and clearly nearer to it than ``before``, its rms to the reference.

    A change may make the problem worse conditioned. Then a larger distance is allowed, if it is nearer by a far larger factor.
    """
    rms, most = apart
    matches = rms <= MATCH_RMS and most <= MATCH_MAX and rms < before / MATCH_NEARER
    return matches or (rms <= ROUGH_RMS and most <= ROUGH_MAX and rms < before / ROUGH_NEARER)


def median(sigma: Array, dtype: Any) -> float:
    """The median of sigma, without elements near the smallest normal number, which allow for underflow in exp alone."""
    tiny = float(np.finfo(np.float64 if np.dtype(dtype) == np.float64 else np.float32).smallest_normal)  # else of float32
    known = sigma[np.isfinite(sigma) & (sigma > 1e6 * tiny)]
    return float(np.median(known)) if known.size else 0.0


def constant_tensors(wrong: Iterable[str], got: dict[str, Any], right: Values, outputs: Iterable[str]) -> dict[str, str]:
    """Tensors that are NaN or one number everywhere, though the truth is not; each with the text to report."""
    found: dict[str, str] = {}
    for t in wrong:
        x, want = np.asarray(got[t], np.float64), right.get(t)
        if want is None or x.size < 2 or np.array_equal(want, np.broadcast_to(want.flat[0], want.shape), equal_nan=True):
            continue
        if np.isnan(x).all():
            found[t] = "NaN everywhere"
        elif (x == x.flat[0]).all():
            found[t] = DETACHED if t not in outputs and not x.any() else f"{x.flat[0] + 0.0:.6g} everywhere"
    return found


# --- one case --------------------------------------------------------------------------------------------------------------


class Memory:
    """What a search knows of earlier cases: the part of `npattn.verify.explain.Diagnostician` that it uses."""

    align: str
    seconds: float  # for one search
    seconds_left: float  # for all searches; below 0 only changes that were found before are tried
    pairs_left: int
    known: Any  # how often each name was found
    bits: set[int]  # to which roundings were found
    earlier: list[dict[str, Any]]  # the options of calls before this one
    returned: list[tuple[dict[str, Any], Values]]  # what calls before this one returned, and what was right there

    right_cases: dict[Any, Any]  # one for each set of facts

    def excluded(self, change: Change, base: list[Change], in_backward: bool) -> bool:
        raise NotImplementedError

    def contradicted(self, change: Change) -> bool:
        raise NotImplementedError


class Search:
    """The search in one case: what was returned, which changes may be tried, and what is explained so far."""

    def __init__(
        self, memory: Memory, problem: Problem, given: dict[str, Any], sigma: Values, got: dict[str, Any], wrong: list[str],
        base: list[Change], more: Iterable[Change] = (),
    ) -> None:  # fmt: skip
        self.memory, self.problem, self.given, self.sigma, self.got = memory, problem, given, sigma, got
        self.wrong, self.found = wrong, list[Explanation]()
        here = facts(problem, given)
        self.base = [c for c in base if c.needs <= here]
        changes = [c for c in problem.op.changes.values() if c.needs <= here and c not in base] + list(more)
        changes.sort(key=lambda c: (-memory.known[c.name], not c.convention, bool(c.tile)))
        self.known = sum(c.name in memory.known for c in changes)
        self.changes = changes if memory.seconds_left >= 0 else changes[: self.known]
        self.large = math.prod(problem.shape) > LARGE
        self.dtype = np.longdouble if problem.dtype == np.float64 else np.float64
        self.returned = [t for t in sigma if isinstance(got.get(t), np.ndarray)]
        self.variants: Variants | None = None
        with contextlib.suppress(*NOT_APPLICABLE):
            self.variants = Variants(problem, given, memory.align, base, self.dtype)
        self.right_values = {} if self.variants is None else self.variants.unchanged
        self.measures = {t: Measure(got[t], sigma[t]) for t in self.returned}
        right, unknown = self.right_values, (np.inf, np.inf)
        off = {t: measure.of(right[t]) if t in right else unknown for t, measure in self.measures.items()}
        self.rms_to_right, self.max_to_right = ({t: x[n] for t, x in off.items()} for n in range(2))  # rms and maximum
        self.only_nan = False  # whether only the places of NaN and inf are wrong
        self.forward_changes: tuple[Change, ...] = ()  # the changes found in the forward; the backward may make them, too
        self.explained_alone: dict[str, list[tuple[float, Change]]] = {}  # by output: changes that explain it alone
        self.backward_done = False  # whether the search in the backward is over
        self.row_factor: Array | None = None
        self.until = time.thread_time() + max(memory.seconds, memory.seconds_left / 2)
        self.cut_short = False  # whether the time was up before all changes were tried

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.problem.outputs

    @property
    def unexplained(self) -> list[str]:
        """The wrong tensors that are not explained yet."""
        explained = {t for e in self.found for t in e.tensors}
        return [t for t in self.wrong if t not in explained]

    @property
    def clearly_wrong(self) -> list[str]:
        """Those of `unexplained` whose error is clearly larger than rounding."""
        return [t for t in self.unexplained if self.rms_to_right[t] > GOOD_RMS]

    def values(self, changes: Iterable[Change], **options: Any) -> Values:
        call = (self.problem, self.given, self.memory.align)
        return attempt(*call, [*self.base, *changes], dtype=self.dtype, low=self.problem.dtype, **options)

    def changes_forward(self, change: Change) -> bool:
        return self.variants is not None and self.variants.changes_forward(change)

    def outputs_with(self, change: Change) -> Values:
        """The outputs with one change of the forward."""
        with contextlib.suppress(*NOT_APPLICABLE):
            return {} if self.variants is None else self.variants.forward(change)
        return {}

    def variants_from(self, returned: Array | None) -> Variants | None:
        """The runs with the changes found so far, whose backward starts from this output; what they share is computed once."""
        with contextlib.suppress(*NOT_APPLICABLE):
            base = [*self.base, *self.forward_changes]
            return Variants(self.problem, self.given, self.memory.align, base, self.dtype, returned)
        return None

    def matches(self, t: str, apart: tuple[float, float]) -> bool:
        """Whether a tensor is so near to what a change gives. What was right has to be right with the change."""
        if self.rms_to_right[t] > GOOD_RMS:
            return is_match(apart, self.rms_to_right[t])
        # Wrong in a few elements: the rms is small with any change that does nothing.
        nearer = t not in self.wrong or apart[1] <= min(MATCH_MAX, self.max_to_right[t] / MATCH_NEARER)
        return apart[0] <= MATCH_RMS and nearer

    def largest_distance(self, tensors: Iterable[str], values: Values) -> float:
        """The largest rms distance of these tensors from ``values``; inf if one of them does not match."""
        worst = 0.0
        for t in tensors:
            if t not in values or self.measures[t].is_far(values[t]):
                return np.inf
            apart = self.measures[t].of(values[t])
            if not self.matches(t, apart):
                return np.inf
            worst = max(worst, apart[0])
        return worst

    def enough(self, tried: int, matches: list[Any]) -> bool:
        """Whether to stop: the time is over, or in a large case a match is among the changes that were found before."""
        late = time.thread_time() > self.until
        self.cut_short |= late
        return late or (self.large and tried >= self.known and bool(matches))

    def best(
        self, matches: list[tuple[float, Change]], backward: bool = False
    ) -> tuple[tuple[float, Change], tuple[str, ...]]:
        """The nearest match that no earlier case excludes, and the names of others as near, in the order of their trial."""
        ties = nearest(matches)
        if len(ties) > 1:
            ties = [m for m in ties if not self.memory.excluded(m[1], self.base, backward)] or ties
        return ties[0], tuple(m[1].name for m in ties[1:])


def nearest(matches: list[tuple[float, Change]]) -> list[tuple[float, Change]]:
    """The nearest match, and those that are about as near; in their order."""
    least = min(d for d, _ in matches)
    return [m for m in matches if m[0] <= max(1.3 * least, least + 0.05)]


def joined(explanations: Iterable[Explanation]) -> list[Explanation]:
    """Explanations of the same names become one, of all their tensors."""
    found: dict[tuple[str, ...], Explanation] = {}
    for e in explanations:
        old = found.get(e.names)
        if old is not None:
            e = dataclasses.replace(e, tensors=(*old.tensors, *e.tensors), distance=max(old.distance, e.distance))
        found[e.names] = e
    return list(found.values())


def offset(s: Search, tensor: str) -> list[Explanation]:
    """Whether a tensor is right up to one number that was added to all of its finite elements."""
    got, want = np.asarray(s.got[tensor], np.float64), s.right_values[tensor]
    finite = np.isfinite(want) & np.isfinite(got)
    added = float(np.median(got[finite] - want[finite])) if finite.sum() > 1 else 0.0
    apart = distance(s.got[tensor], np.asarray(want + added), s.sigma[tensor])
    if added and is_match(apart, s.rms_to_right[tensor]):
        return [Explanation((f"{tensor} is off by {added:.6g} everywhere",), (tensor,), apart[0])]
    return []


def factor(s: Search, tensor: str) -> list[Explanation]:
    """Whether a tensor is right up to a constant factor."""
    got, want = np.asarray(s.got[tensor], np.float64), s.right_values[tensor]
    finite = np.isfinite(want) & np.isfinite(got)
    norm = float(np.square(want[finite]).sum())
    factor = float((got[finite] * want[finite]).sum()) / norm if norm else 1.0
    apart = distance(s.got[tensor], np.asarray(factor * want), s.sigma[tensor])
    if abs(factor - 1) > 1e-6 and factor and is_match(apart, s.rms_to_right[tensor]):
        return [Explanation((f"{tensor} is {factor:.6g} times what it should be",), (tensor,), apart[0])]
    return []
