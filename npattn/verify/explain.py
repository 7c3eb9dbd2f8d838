"""What a wrong implementation does instead: known mistakes and other conventions are tried until one gives the same result.

For each wrong case the hypotheses of its op are tried in order (`Op.hypotheses`; those for every op are here). Most of them run
the equations again with a change and compare the result with what the candidate returned. A match is reported with its distance
in sigma. If nothing matches, the report says in which places of a tensor the error lies.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from npattn.ops.allowed import quiet
from npattn.ops.checks import Array
from npattn.tolerances import MATCH_RMS, ROUGH_RMS
from npattn.verify.op import Change, Problem, Values, facts
from npattn.verify.search import (
    LARGE,
    UNKNOWN,
    Explanation,
    Hypothesis,
    Memory,
    Search,
    constant_tensors,
    distance,
    factor,
    joined,
    offset,
)  # fmt: skip
from npattn.verify.stages import attempt

NOTICEABLE = 30  # sigma: a mistake that moves a tensor this far from the truth would have been noticed

# --- the hypotheses of every op --------------------------------------------------------------------------------------------


def one_change(s: Search) -> list[Explanation]:
    """One change that explains everything that was returned, or else one change for each tensor."""
    whole: list[tuple[float, Change]] = []
    partly: dict[str, list[tuple[float, Change]]] = {t: [] for t in s.unexplained}
    for change in s.changes if s.unexplained else ():
        values = {} if s.memory.contradicted(change) else s.values([change])
        if not values:
            continue
        off = {t: distance(s.got[t], values[t], s.sigma[t]) if t in values else (np.inf, np.inf) for t in s.returned}
        fits = {t: s.matches(t, off[t]) for t in s.returned}
        if all(fits.values()):
            whole.append((max(o[0] for o in off.values()), change))
        for t in s.unexplained:
            if fits[t]:
                partly[t].append((off[t][0], change))
    found = []
    for t, some in ({"": whole} if whole else partly).items():
        if some:
            (apart, change), others = s.best(some)
            found.append(Explanation((change.name,), (t,) if t else tuple(s.unexplained), apart, others=others))
    # Many changes give a constant tensor. So it counts only if the change also explains a tensor that is not constant.
    flat = constant_tensors(s.returned, s.got, s.right_values, s.outputs).keys()
    return [e for e in joined(found) if not set(e.tensors) <= flat or (whole and set(s.returned) > flat)]


def a_factor(s: Search) -> list[Explanation]:
    """A tensor that is right up to a constant factor."""
    return [e for t in s.clearly_wrong if np.isfinite(s.rms_to_right[t]) for e in factor(s, t)]


def a_constant(s: Search) -> list[Explanation]:
    """A tensor that is right up to a constant that was added to all of it."""
    return [e for t in s.clearly_wrong if np.isfinite(s.rms_to_right[t]) for e in offset(s, t)]


def one_number_everywhere(s: Search) -> list[Explanation]:
    """Names a tensor that is NaN, 0 or one other number everywhere."""
    flat = {t: name for t, name in constant_tensors(s.wrong, s.got, s.right_values, s.outputs).items() if t in s.unexplained}
    return [Explanation((n,), tuple(t for t in flat if flat[t] == n), math.inf) for n in dict.fromkeys(flat.values())]


def hidden_nan(s: Search) -> list[Explanation]:
    """A tensor that has 0 where NaN would be right, and is right elsewhere."""
    found = []
    for t in s.unexplained:
        nan = np.isnan(s.right_values.get(t, np.zeros(0)))
        if nan.any() and not s.got[t][nan].any():
            apart = distance(s.got[t], np.where(nan, 0, s.right_values[t]), s.sigma[t])[0]
            found += [Explanation(("NaN becomes 0",), (t,), apart)] if apart <= MATCH_RMS else []
    return joined(found)


def the_same_again(s: Search) -> list[Explanation]:
    """A tensor that is equal to what an earlier call returned, to the last bit, though another result was due there."""
    seen = [
        t for t in s.unexplained for returned, due in s.memory.returned
        if t in returned and t in due and np.array_equal(returned[t], s.got[t], equal_nan=True)
        and t in s.right_values and not np.array_equal(due[t], s.right_values[t], equal_nan=True)
    ]
    return joined(Explanation(("what an earlier call returned: state is kept",), (t,), 0.0) for t in dict.fromkeys(seen))


OF_EVERY_OP = (
    Hypothesis("NaN is hidden", "nothing more", hidden_nan),
    Hypothesis("it is one number everywhere", "nothing more", one_number_everywhere),
    Hypothesis("what an earlier call returned is returned again", "nothing more", the_same_again),
)
"""They are tried last, for every op."""

HYPOTHESES = (
    Hypothesis("one thing is done otherwise", "a run a change", one_change),
    Hypothesis("a tensor is off by a constant", "nothing more", a_constant),
    Hypothesis("a tensor is off by a factor", "nothing more", a_factor),
)

# --- case after case -------------------------------------------------------------------------------------------------------


class Diagnostician(Memory):
    """Explains case after case. What it found in one case is tried first in the next."""

    def __init__(self, align: str = "top_left", seconds: float = 2.0, pairs: int = 3, total: float = 12.0) -> None:
        self.align, self.seconds = align, seconds
        self.seconds_left = total  # seconds of computing for all cases; then only changes that were already found are tried
        self.pairs_left = pairs  # a search for two changes at once is expensive: only the first few cases get one
        self.known: Counter[str] = Counter()
        self.bits = set[int]()
        self.right_cases: dict[frozenset[str], tuple[Any, ...]] = {}  # right cases, one for each set of facts
        self.ruled_out: dict[str, bool] = {}
        self.earlier: list[dict[str, Any]] = []
        self.returned: list[tuple[dict[str, Any], Values]] = []
        self.sought = False  # whether a right case was looked for
        self.unnamed: list[tuple[Problem, dict[str, Any], Values, Values, Values]] = []  # a few cases that were not explained

    def saw(
        self, problem: Problem, given: dict[str, Any], sigma: Values, values: Values, got: dict[str, Any], wrong: Iterable[str]
    ) -> None:
        """Remember a call. If it was right, the candidate does not make any mistake that would show in it."""
        here = facts(problem, given)
        if not list(wrong) and math.prod(problem.shape) <= LARGE and here not in self.right_cases:
            self.right_cases[here] = (problem, given, sigma, values, [t for t in values if t in got])
            self.ruled_out.clear()
        self.earlier = [*self.earlier[-7:], given]
        self.returned = [*self.returned[-7:], (got, values)]

    def excluded(self, change: Change, base: list[Change], in_backward: bool) -> bool:
        """Whether a case that was right would have been wrong with this change."""
        key = f"{change.name} {in_backward}"
        if key not in self.ruled_out:
            self.ruled_out[key] = any(self._shows(change, base, in_backward, *case) for case in self.right_cases.values())
        return self.ruled_out[key]

    def _shows(
        self, change: Change, base: list[Change], in_backward: bool, problem: Problem, given: dict[str, Any], sigma: Values,
        values: Values, tested: list[str],
    ) -> bool:  # fmt: skip
        if not change.needs <= facts(problem, given):
            return False
        changes = [*base, change]
        other = attempt(problem, given, self.align, base if in_backward else changes, backward=changes, dtype=np.float64)
        return any(distance(values[t].astype(problem.dtype), other[t], sigma[t])[0] > NOTICEABLE for t in tested if t in other)

    def contradicted(self, change: Change) -> bool:
        """Whether this change is visible in a case that was not explained, but does not give what was returned there."""
        for problem, given, got, truth, sigma in self.unnamed:
            dtype = np.longdouble if problem.dtype == np.float64 else np.float64
            values = attempt(problem, given, self.align, [change], dtype=dtype, low=problem.dtype)
            shows = [
                t for t in got if t in values and distance(truth[t].astype(got[t].dtype), values[t], sigma[t])[0] > NOTICEABLE
            ]
            if any(distance(got[t], values[t], sigma[t])[0] > ROUGH_RMS for t in shows):
                return True
        return False

    @quiet
    def explain(
        self, problem: Problem, given: dict[str, Any], sigma: Values, got: dict[str, Any], wrong: Iterable[str],
        base: Iterable[Change] = (),
    ) -> list[Explanation]:  # fmt: skip
        """What the candidate does instead, as far as it is recognised.

        got   : what it returned, by tensor; wrong : those of the tensors that are wrong
        base  : the changes that its declared convention makes
        """
        # A wrong shape or dtype has been reported already.
        wrong = [t for t in wrong if t in sigma and isinstance(got.get(t), np.ndarray) and got[t].shape == sigma[t].shape]
        if not wrong:
            return []
        started, op = time.thread_time(), problem.op
        s = Search(self, problem, given, sigma, got, wrong, list(base), op.more_changes(self.earlier, given))
        own = (*(op.hypotheses or HYPOTHESES), *op.more_hypotheses)
        own = own if s.variants is not None else ()  # they need the equations, which may be of rank 4
        for hypothesis in (*own, *OF_EVERY_OP):
            more = hypothesis.test(s)  # `no_evidence` replaces s.found
            s.found = [*s.found, *more]
        self.seconds_left -= time.thread_time() - started
        self.known.update(name for e in s.found if e.distance < math.inf for name in e.names)
        named = any(e.distance < math.inf for e in s.found)
        if not named and len(self.unnamed) < 3 and all(np.isfinite(got[t]).all() for t in s.returned):
            flat = {t for e in s.found for t in e.tensors}
            copies = {t: got[t].copy() for t in s.returned if t not in flat}
            self.unnamed.append((problem, given, copies, s.right_values, sigma))
        return [*s.found, _unknown(s.unexplained, self.seconds_left >= 0 and not s.cut_short)] if s.unexplained else s.found


class Listener(Diagnostician):
    """Hands what it sees to another diagnostician, and explains nothing itself."""

    def __init__(self, owner: Diagnostician) -> None:
        super().__init__(owner.align)
        self.owner = owner

    def saw(self, *what: Any) -> None:
        self.owner.saw(*what)

    def explain(self, *what: Any, **more: Any) -> list[Any]:
        return []


def _unknown(tensors: Iterable[str], searched: bool = True) -> Explanation:
    """The entry that says that there is no explanation."""
    where = " matches; see the places above"
    if not searched:
        where = " matches of what was tried: the time to look for more is up; see the places above"
    return Explanation((UNKNOWN,), tuple(tensors), math.inf, where)


# --- places ----------------------------------------------------------------------------------------------------------------


def places(letters: str, words: dict[str, str], off: Array) -> str:
    """Where in a tensor the wrong elements lie: which rows, columns and heads, and whether a tile begins there."""
    parts = [f"{off.sum()} of {off.size} elements"]
    named = letters[max(len(letters) - off.ndim, 0) :]
    for axis, letter in enumerate(named, off.ndim - len(named)):  # a case of rank 5 has another axis in front
        hit = np.flatnonzero(off.any(tuple(a for a in range(off.ndim) if a != axis)))
        n = off.shape[axis]
        if 0 < len(hit) < n and letter in words:
            parts.append(f"{words[letter]} {_which(hit, n)}")
    return "in " + "; ".join(parts)


def _which(hit: Array, n: int) -> str:
    """A set of indices below n in words."""
    first, last = int(hit[0]), int(hit[-1])
    if len(hit) == 1:
        return f"{first} (the last)" if first == n - 1 else str(first)
    if len(hit) == last - first + 1:
        sizes = [size for size in (128, 64, 32, 16, 8) if first and first % size == 0]
        tile = f", where a tile of {sizes[0]} begins" if sizes else ""
        return f"from {first} on{tile}" if last == n - 1 else f"{first} to {last}"
    steps = np.diff(hit)
    if len(hit) > 2 and (steps == steps[0]).all():
        return f"{first}, {first + int(steps[0])}, ... every {int(steps[0])}th"
    return ", ".join(map(str, hit[:6])) + (", ..." if len(hit) > 6 else "")
