"""What an implementation is doing instead: known mistakes and other conventions, tried until one gives what it gives.

For each case that is wrong the equations are run again with one change (`npattn.verify.mistakes`), then with two, and compared
with what the candidate returned; then as if one quantity were rounded to a smaller format. What matches is named, with its
distance in sigma. Where nothing matches, the places of the error are described.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npattn.ops.allowed import quiet
from npattn.ops.checks import Array
from npattn.tolerances import GOOD_RMS, MATCH_MAX, MATCH_NEARER, MATCH_RMS, ROUGH_MAX, ROUGH_NEARER, ROUGH_RMS
from npattn.verify import layer_mistakes
from npattn.verify.mistakes import CHANGES, MAKES_NAN, OF_NAN, UNPROTECTED
from npattn.verify.precision import PRECISIONS, Precision, of_dtype, round_to
from npattn.verify.stages import FORWARD as EQUATIONS
from npattn.verify.stages import FORWARD_STAGES, Change, facts, perform, prepare, run

FORWARD = ("out", "lse")
CANNOT = (ValueError, IndexError, TypeError, AttributeError, ZeroDivisionError)  # a change that a call leaves no room for
LARGE = 200_000  # elements of the scores, above which only what has been seen in smaller cases is tried first


@dataclass(frozen=True)
class Explanation:
    """What matches what was returned."""

    names: tuple[str, ...]  # one change, or two together
    tensors: tuple[str, ...]
    distance: float  # rms, in sigma
    where: str = ""  # "in the backward", or nothing
    others: tuple[str, ...] = ()  # what cannot be told apart from it here

    @property
    def text(self) -> str:
        name = " and ".join(self.names)
        if self.distance == math.inf:  # it is no match
            return f"{', '.join(self.tensors)}: {name}{self.where}"
        where = f" {self.where}" if self.where else ""
        others = (
            f" (here the same as: {'; '.join(self.others[:3])}{'; ...' if len(self.others) > 3 else ''})" if self.others else ""
        )
        return f"{', '.join(self.tensors)}: matches {name}{where} to {self.distance:.2g} sigma{others}"


def distance(got: Any, value: Array, sigma: Array) -> tuple[float, float]:
    """rms and maximum of the difference in sigma, inf where shapes, NaN or inf differ.

    sigma is that of the reference, and never below its median: what a change makes of an exact 0 has a rounding error too.
    """
    if not isinstance(got, np.ndarray) or got.shape != value.shape:
        return np.inf, np.inf
    x, y = np.asarray(got, np.float64), np.asarray(value, np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    finite = np.isfinite(x) & np.isfinite(y)
    if not (same | finite).all():
        return np.inf, np.inf
    floor = _median(sigma, got.dtype)
    unit = float(np.finfo(got.dtype).eps) if got.dtype.kind == "f" else 2.0**-23
    scale = np.maximum(np.maximum(np.where(np.isfinite(sigma), sigma, 0), floor), unit * np.abs(y) + 1e-300)
    with np.errstate(all="ignore"):
        units = np.where(same, 0.0, np.abs(x - y) / scale)
    if not units.size:
        return 0.0, 0.0
    return float(np.sqrt(np.square(units).mean())), float(units.max())


def near(apart: tuple[float, float], before: float) -> bool:
    """Whether this is a match, for a tensor that is ``before`` sigma away from the reference.

    Within rounding and clearly nearer than the reference; or, since a change may make the problem worse
    conditioned, far nearer.
    """
    rms, most = apart
    matches = rms <= MATCH_RMS and most <= MATCH_MAX and rms < before / MATCH_NEARER
    return matches or (rms <= ROUGH_RMS and most <= ROUGH_MAX and rms < before / ROUGH_NEARER)


KEPT_WEIGHTS = Change("the backward keeps the weights, and does not make them again from lse", "p", lambda x: x.weights)
UNKNOWN = "nothing that is known"
NEVER_WRITTEN = "wrong for keys that nobody sees, and for no other: never written?"
DETACHED = "a gradient of 0 everywhere: detached, or not computed"


def _unknown(tensors: Iterable[str], searched: bool = True) -> Explanation:
    """Says that there is no explanation."""
    where = " matches; see the places above"
    if not searched:
        where = " matches of what was found before: the time to look for more is up; see the places above"
    return Explanation((UNKNOWN,), tuple(tensors), math.inf, where)


class Diagnostician:
    """Explains case after case; what it has found once is tried first in the next."""

    def __init__(self, align: str = "top_left", seconds: float = 2.0, pairs: int = 3, total: float = 12.0) -> None:
        self.align, self.seconds = align, seconds
        self.left = total  # seconds of computing for all cases; after them only what has been seen is tried
        self.pairs_left = pairs  # searches for two changes are expensive: only for the first few cases that need one
        self.known: Counter[str] = Counter()
        self.right: dict[frozenset[str], tuple[Any, ...]] = {}  # cases that hold, one for each set of facts
        self.ruled_out: dict[str, bool] = {}
        self.earlier: list[dict[str, Any]] = []  # the arguments of calls before this one
        self.last: dict[str, Any] = {}  # what the call before this one returned
        self.sought = False  # whether a case that holds was looked for
        self.unnamed: list[tuple[Any, dict[str, Any], dict[str, Array], dict[str, Array]]] = []  # of layers, a few cases

    def saw(
        self, problem: Any, given: dict[str, Any], sigma: dict[str, Array], values: dict[str, Array], got: dict[str, Any],
        wrong: Iterable[str],
    ) -> None:  # fmt: skip
        """Remember a call: whoever holds here does not make a mistake that would show here."""
        here = facts(problem, given)
        if not list(wrong) and math.prod(problem.shape) <= LARGE and here not in self.right:
            self.right[here] = (problem, given, sigma, values, [t for t in values if t in got])
            self.ruled_out.clear()
        self.earlier = [*self.earlier[-7:], given]
        self.last = got

    def excluded(self, change: Change, base: list[Change], in_backward: bool) -> bool:
        """Whether a case that holds would have been wrong with this change."""
        key = f"{change.name} {in_backward}"
        if key not in self.ruled_out:
            self.ruled_out[key] = any(self._shows(change, base, in_backward, *case) for case in self.right.values())
        return self.ruled_out[key]

    def _shows(
        self, change: Change, base: list[Change], in_backward: bool, problem: Any, given: dict[str, Any],
        sigma: dict[str, Array], values: dict[str, Array], tested: list[str],
    ) -> bool:  # fmt: skip
        if not change.needs <= facts(problem, given):
            return False
        changes = [*base, change]
        try:
            other = run(problem, given, self.align, base if in_backward else changes, backward=changes)
        except CANNOT:
            return False
        return any(distance(values[t].astype(problem.dtype), other[t], sigma[t])[0] > 30 for t in tested if t in other)

    @quiet
    def explain(
        self, problem: Any, given: dict[str, Any], sigma: dict[str, Array], got: dict[str, Any], wrong: Iterable[str],
        base: Iterable[Change] = (),
    ) -> list[Explanation]:  # fmt: skip
        """What the candidate is doing instead, as far as it can be named.

        got   : what it returned, by tensor; wrong : the tensors of it that are wrong
        base  : the changes that its declared convention makes
        """
        if problem.op != "attention":
            return self._layer(problem, sigma, got, list(wrong))
        started = time.thread_time()
        try:
            return self._explain(problem, given, sigma, got, list(wrong), list(base))
        finally:
            self.left -= time.thread_time() - started

    def _explain(
        self, problem: Any, given: dict[str, Any], sigma: dict[str, Array], got: dict[str, Any], wrong: list[str],
        base: list[Change],
    ) -> list[Explanation]:  # fmt: skip
        # What is wrong by its shape or dtype has been said.
        wrong = [t for t in wrong if t in sigma and isinstance(got.get(t), np.ndarray) and got[t].shape == sigma[t].shape]
        if not wrong:
            return []
        search = _Search(self, problem, given, sigma, got, base)
        found: list[Explanation] = search.nan(wrong) or search.unwritten(wrong)
        poisoned = {t for e in found for t in e.tensors}
        everything, wrong = wrong, [t for t in wrong if search.before[t] > GOOD_RMS and t not in poisoned]
        forward: tuple[Change, ...] = ()
        if set(wrong) & set(FORWARD):
            more, forward = search.forward([t for t in FORWARD if t in wrong])
            found += more
        gradients = [t for t in wrong if t not in FORWARD]
        if gradients:
            found += search.backward(gradients, forward)
        found = [e for e in found if set(e.tensors) <= poisoned or not _only_nan(e, got)]
        flat = flat_of(everything, got, search.values([]))
        found = [_detached(e, got) for e in found if not set(e.tensors) <= flat.keys() or self._supported(e, base)]
        explained = {t for e in found for t in e.tensors}
        found += search.roughly([t for t in wrong if t not in explained])
        explained = {t for e in found for t in e.tensors}
        found += search.rows([t for t in everything if t not in explained])
        explained = {t for e in found for t in e.tensors}
        found += _said_simply({t: name for t, name in flat.items() if t not in explained})
        self.known.update(name for e in found for name in e.names)
        explained = {t for e in found for t in e.tensors}
        left = [t for t in everything if t not in explained]
        return [*found, _unknown(left, self.left >= 0)] if left else found

    def _supported(self, e: Explanation, base: list[Change]) -> bool:
        """Whether a name for what is NaN, or one number, everywhere rests on more: on a case that holds, where it is silent.

        Without one there is no evidence at all: many mistakes, and a function that returns nothing else, give that.
        """
        changes = [CHANGES[n] for n in e.names if n in CHANGES]
        return bool(self.right) and not any(self.excluded(c, base, e.where == "in the backward") for c in changes)

    def _contradicted(self, name: str, op: str) -> bool:
        """Whether a case without a name would look otherwise: there the mistake shows, and does not give what was returned."""
        for problem, got, truth, sigma in self.unnamed:
            with np.errstate(all="ignore"):
                try:
                    values = layer_mistakes.MISTAKES[op][name](problem)
                except CANNOT:
                    continue
            shows = [t for t in got if t in values and distance(truth[t].astype(got[t].dtype), values[t], sigma[t])[0] > 30]
            if any(distance(got[t], values[t], sigma[t])[0] > ROUGH_RMS for t in shows):
                return True
        return False

    def _layer(self, problem: Any, sigma: dict[str, Array], got: dict[str, Any], wrong: list[str]) -> list[Explanation]:
        """The known mistakes of another op: one for all that is wrong, or one for each tensor."""
        returned = [t for t in sigma if isinstance(got.get(t), np.ndarray)]
        wrong = [t for t in wrong if t in returned and got[t].shape == sigma[t].shape]
        if not wrong:
            return []
        truth = problem.truth(of_dtype(problem.dtype))
        before = {t: distance(got[t], truth.values[t], sigma[t])[0] for t in returned}
        whole: list[tuple[float, str]] = []
        partly: dict[str, list[tuple[float, str]]] = {t: [] for t in wrong}
        names = sorted(layer_mistakes.MISTAKES[problem.op], key=lambda n: -self.known[n])
        for name in names:
            if self._contradicted(name, problem.op):
                continue
            try:
                values = layer_mistakes.MISTAKES[problem.op][name](problem)
            except CANNOT:
                continue
            off = {t: distance(got[t], values[t], sigma[t]) if t in values else (np.inf, np.inf) for t in returned}
            fits = {t: off[t][0] <= MATCH_RMS if before[t] <= GOOD_RMS else near(off[t], before[t]) for t in returned}
            if all(fits.values()):
                whole.append((max(o[0] for o in off.values()), name))
            for t in wrong:
                if fits[t]:
                    partly[t].append((off[t][0], name))
        found: dict[str, Explanation] = {}
        for t, some in {"": whole}.items() if whole else partly.items():
            if some:
                nearest = min(d for d, _ in some)
                ties = [m for m in some if m[0] <= max(1.3 * nearest, nearest + 0.05)]
                apart, name = ties[0]
                tensors = tuple(wrong) if not t else (*(found[name].tensors if name in found else ()), t)
                found[name] = Explanation((name,), tensors, apart, others=tuple(n for _, n in ties[1:]))
        self.known.update(found.keys())
        flat = flat_of(returned, got, truth.values)
        # What is flat is evidence of little: of a mistake only if it gives something else of what was returned, too.
        named = [e for e in found.values() if not set(e.tensors) <= flat.keys() or (whole and set(returned) > flat.keys())]
        explained = {t for e in named for t in e.tensors}
        simply = _said_simply({t: name for t, name in flat.items() if t in wrong and t not in explained})
        left = [t for t in wrong if t not in explained and t not in flat]
        finite = all(np.isfinite(got[t]).all() for t in returned)
        if set(left) == set(wrong) - flat.keys() and finite and len(self.unnamed) < 3:  # nothing has a name here
            copies = {t: got[t].copy() for t in returned if t not in flat}
            self.unnamed.append((problem, copies, truth.values, sigma))
        return [*named, *simply, *([_unknown(left)] if left else [])]


class Listener(Diagnostician):
    """Remembers for another, and explains nothing."""

    def __init__(self, owner: Diagnostician) -> None:
        super().__init__(owner.align)
        self.owner = owner

    def saw(self, *what: Any) -> None:
        self.owner.saw(*what)

    def explain(self, *what: Any, **more: Any) -> list[Any]:
        return []


def _only_nan(e: Explanation, got: dict[str, Any]) -> bool:
    """Whether the evidence is NaN nearly everywhere, which several mistakes would give."""
    if not all(np.isnan(got[t]).mean() > 0.9 for t in e.tensors):
        return False
    return len(e.others) > 2 or (e.where == "in the backward" and not set(e.names) <= MAKES_NAN)


def _detached(e: Explanation, got: dict[str, Any]) -> Explanation:
    """Gradients that are 0 everywhere are not said to be a matter of tiles."""
    sized = all(n in CHANGES and CHANGES[n].sized for n in e.names)
    if not sized or any(t in FORWARD or got[t].any() for t in e.tensors):
        return e
    return dataclasses.replace(e, names=(DETACHED,), where="", distance=math.inf, others=())


def flat_of(wrong: Iterable[str], got: dict[str, Any], right: dict[str, Array]) -> dict[str, str]:
    """Tensors that are NaN, or one number, everywhere, where the truth is not; and what to say of each."""
    found: dict[str, str] = {}
    for t in wrong:
        x, want = np.asarray(got[t], np.float64), right.get(t)
        if want is None or x.size < 2 or np.array_equal(want, np.broadcast_to(want.flat[0], want.shape), equal_nan=True):
            continue
        if np.isnan(x).all():
            found[t] = "NaN everywhere"
        elif (x == x.flat[0]).all():
            found[t] = DETACHED if t not in FORWARD and not x.any() else f"{x.flat[0]:.6g} everywhere"
    return found


def _said_simply(flat: dict[str, str]) -> list[Explanation]:
    names = dict.fromkeys(flat.values())
    return [Explanation((name,), tuple(t for t in flat if flat[t] == name), math.inf) for name in names]


class _Search:
    """One case."""

    def __init__(
        self, owner: Diagnostician, problem: Any, given: dict[str, Any], sigma: dict[str, Array], got: dict[str, Any],
        base: list[Change],
    ) -> None:  # fmt: skip
        self.owner, self.problem, self.given, self.sigma, self.got, self.base = owner, problem, given, sigma, got, base
        here = facts(problem, given)
        changes = [c for c in CHANGES.values() if c.needs <= here and c not in base]
        changes += _of_earlier_calls(owner.earlier, given)
        changes.sort(key=lambda c: (-owner.known[c.name], not c.convention, c.sized))
        self.large = math.prod(problem.shape) > LARGE
        self.changes = changes
        self.known = sum(c.name in owner.known for c in changes)
        if owner.left < 0:
            self.changes = changes[: self.known]
        self.dtype = np.longdouble if problem.q.dtype == np.float64 else np.float64
        self.returned = [t for t in sigma if isinstance(got.get(t), np.ndarray)]
        right = self.values([])
        self.before = {t: distance(got[t], right[t], sigma[t])[0] if t in right else np.inf for t in self.returned}
        self.only_nan = False
        self.row_factor: Array | None = None
        self.until = time.thread_time() + owner.seconds

    def values(self, changes: Iterable[Change], **options: Any) -> dict[str, Array]:
        try:
            return run(self.problem, self.given, self.owner.align, [*self.base, *changes], dtype=self.dtype, **options)
        except CANNOT:
            return {}

    def nan(self, wrong: list[str]) -> list[Explanation]:
        """NaN and inf in masked places: whether nothing is wrong but that they have come through unprotected products.

        If only the places of NaN and inf differ, and it is not that, no more is tried than what makes or hides them.
        """
        problem = self.problem
        if all(np.isfinite(x).all() for x in (problem.q, problem.k, problem.v, problem.dout)):
            return []
        right = self.values([])
        places = [t for t in wrong if t in right and _differ_in_nan(self.got[t], right[t], self.sigma[t])]
        through: dict[str, Array] = {}
        for change in UNPROTECTED:
            tensor = {"dvh": "dv", "dkh": "dk"}.get(change.stage, change.stage)
            through[tensor] = self.values([change]).get(tensor, np.array(0.0))
        found = [
            t for t in places
            if t in through and not ((~np.isfinite(right[t]) | np.isnan(through[t])) & np.isfinite(self.got[t])).any()
        ]  # fmt: skip
        if "lse" in wrong:  # NaN among the scores themselves
            found = []
        if places and set(places) == set(wrong):
            self.changes = [c for c in self.changes if c.name in OF_NAN]
            self.only_nan = True
        self.returned = [t for t in self.returned if t not in found]
        return [Explanation(("masked_nan=poisons",), tuple(found), 0.0)] if found else []

    def unwritten(self, wrong: list[str]) -> list[Explanation]:
        """Whether dk or dv is wrong for keys that nobody sees, and for no other: a buffer beyond a length, as it was."""
        if not set(wrong) <= {"dk", "dv"} or not all(np.isfinite(x).all() for x in (self.problem.k, self.problem.v)):
            return []
        x = perform(prepare(self.problem, self.given, self.owner.align, np.float64), EQUATIONS, self.base)
        groups = x.allowed.reshape(x.B, x.G, x.H // x.G, *x.shape[2:]) if x.G and x.H % x.G == 0 and len(x.shape) == 4 else None
        if groups is None or (seen := groups.any((2, 3))).all() or not seen.any():
            return []
        right = self.values([])
        found = []
        for t in wrong:
            got, want, sigma = (np.where(seen[..., None], a, 0) for a in (self.got[t], right[t], self.sigma[t]))
            if self.got[t].shape[:-1] == seen.shape and distance(got.astype(self.got[t].dtype), want, sigma)[0] <= MATCH_RMS:
                found.append(t)
        return [Explanation((NEVER_WRITTEN,), tuple(found), math.inf)] if found else []

    def away(self, tensors: Iterable[str], values: dict[str, Array]) -> float:
        """The largest distance of these tensors from what a change gives, inf where one does not match."""
        worst = 0.0
        for t in tensors:
            if t not in values:
                return np.inf
            apart = distance(self.got[t], values[t], self.sigma[t])
            right = self.before[t] <= GOOD_RMS  # then it has to stay right
            if not (apart[0] <= MATCH_RMS if right else near(apart, self.before[t])):
                return np.inf
            worst = max(worst, apart[0])
        return worst

    def enough(self, tried: int, matches: list[Any]) -> bool:
        """Whether to stop: all that is known was tried in a large case, or the time is over."""
        return (self.large and tried >= self.known and bool(matches)) or time.thread_time() > self.until

    # -- forward

    def forward(self, wrong: list[str]) -> tuple[list[Explanation], tuple[Change, ...]]:
        """What explains out and lse, together or each by itself, and the changes that the backward may have too."""
        returned = [t for t in FORWARD if t in self.returned]
        matches: list[tuple[float, Change]] = []
        partly: dict[str, list[tuple[float, Change]]] = {t: [] for t in wrong}
        for i, change in enumerate(self.changes):
            if self.enough(i, matches):
                break
            if change.stage not in FORWARD_STAGES:
                continue
            values = self.values([change], gradients=False)
            apart = self.away(returned, values)
            if apart < np.inf:
                matches.append((apart, change))
            for t in wrong:
                alone = self.away([t], values)
                if alone < np.inf:
                    partly[t].append((alone, change))
        if matches:
            best, others = self._best(matches)
            return [Explanation((best[1].name,), tuple(wrong), best[0], others=others)], (best[1],)
        rough = self.roughly(wrong)
        if {t for e in rough for t in e.tensors} >= set(wrong):
            return rough, ()
        pair = self._pair(returned)
        if pair is not None:
            return [Explanation(tuple(c.name for c in pair[1]), tuple(wrong), pair[0])], pair[1]
        found = []
        changes: list[Change] = []
        for t in wrong:
            if partly[t]:
                best, others = self._best(partly[t])
                found.append(Explanation((best[1].name,), (t,), best[0], others=others))
                changes.append(best[1])
        return found, tuple(changes[:1])

    def _best(
        self, matches: list[tuple[float, Change]], backward: bool = False
    ) -> tuple[tuple[float, Change], tuple[str, ...]]:
        """The nearest that no case before this one excludes; those that are as near stay in the order they were tried in."""
        nearest = min(d for d, _ in matches)
        ties = [m for m in matches if m[0] <= max(1.3 * nearest, nearest + 0.05)]
        if len(ties) > 1:
            ties = [m for m in ties if not self.owner.excluded(m[1], self.base, backward)] or ties
        return ties[0], tuple(m[1].name for m in ties[1:])

    def _pair(self, tensors: list[str]) -> tuple[float, tuple[Change, Change]] | None:
        """Two changes of the forward that together match; the commonest mistakes first, as long as there is time."""
        if self.large or self.owner.pairs_left <= 0 or self.owner.left < 0 or not tensors or self.only_nan:
            return None
        self.owner.pairs_left -= 1
        until = time.thread_time() + self.owner.seconds
        few = [c for c in self.changes if not c.sized and c.stage in FORWARD_STAGES]
        for a, b in itertools.combinations(few, 2):
            apart = self.away(tensors, self.values([a, b], gradients=False))
            if apart < np.inf:
                return apart, (a, b)
            if time.thread_time() > until:
                break
        return None

    # -- a factor, or a rounding

    def roughly(self, wrong: list[str]) -> list[Explanation]:
        """What is right but for a factor, or rounded too early: by the size of the errors, not by the values."""
        wrong = [t for t in wrong if np.isfinite(self.before[t])]
        if not wrong:
            return []
        right = self.values([])
        scale = self._scale(wrong, right)
        if scale:
            return scale
        found = [e for t in wrong for e in self._factor(t, right[t])]
        rest = [t for t in wrong if t not in {x for e in found for x in e.tensors}]
        found += self.rows(rest)
        rest = [t for t in rest if t not in {x for e in found for x in e.tensors}]
        return found + self._rounding(rest)

    def rows(self, wrong: list[str]) -> list[Explanation]:
        """Whether each row is right but for a factor that is as near to 1 as an lse that is rounded would make it.

        The gradients of the same weights follow.
        """
        right, out = self.values([]), self.got.get("out")
        if "out" in wrong and self.row_factor is None and isinstance(out, np.ndarray) and np.isfinite(out).all():
            unit = float(np.finfo(self.problem.dtype).eps) / 2
            near_one = 4 * unit * np.maximum(np.abs(np.where(np.isfinite(right["lse"]), right["lse"], 0)), 4)[..., None]
            sigma = self.sigma["out"]
            weight = np.where(np.isfinite(sigma) & (sigma > 0), 1 / np.maximum(sigma, 1e-300), 0)
            norm = np.square(right["out"] * weight).sum(-1, keepdims=True)
            norm = np.where(norm == 0, np.inf, norm)
            off = ((out - right["out"]) * right["out"] * weight * weight).sum(-1, keepdims=True) / norm
            most = np.abs(off).max(initial=0.0)
            if (np.abs(off) <= near_one + 6 / np.sqrt(norm)).all() and most > 2 * unit:
                self.row_factor = np.asarray(1 + off, np.float64)
        factor = self.row_factor
        if factor is None or self.before.get("lse", 0.0) > GOOD_RMS:
            return []
        forward = Change("rows", "weights", lambda x: x.weights * factor)  # and so Delta, if it is made of that output
        values = self.values([forward], backward=[*self.base, Change("rows", "p", lambda x: x.p * factor)])
        found, worst = [], 0.0
        for t in [t for t in wrong if t in values]:
            apart = distance(self.got[t], values[t], self.sigma[t])
            unchanged = distance(self.got[t], right[t], self.sigma[t])
            if apart[0] <= MATCH_RMS and apart[1] <= MATCH_MAX and apart[1] < unchanged[1] / 2:
                found.append(t)
                worst = max(worst, apart[0])
        name = "each row is off by a factor, as of exp(s - lse) with a rounded lse"
        return [Explanation((name,), tuple(found), worst)] if found else []

    def _factor(self, tensor: str, want: Array) -> list[Explanation]:
        got = np.asarray(self.got[tensor], np.float64)
        finite = np.isfinite(want) & np.isfinite(got)
        norm = float(np.square(want[finite]).sum())
        factor = float((got[finite] * want[finite]).sum()) / norm if norm else 1.0
        apart = distance(self.got[tensor], np.asarray(factor * want), self.sigma[tensor])
        if abs(factor - 1) > 1e-6 and factor and near(apart, self.before[tensor]):
            return [Explanation((f"{tensor} is {factor:.6g} times what it should be",), (tensor,), apart[0])]
        return []

    def _scale(self, wrong: list[str], right: dict[str, Array]) -> list[Explanation]:
        """Whether a scale that is a little off explains everything: by its derivative, then in full."""
        first = "out" if "out" in wrong else wrong[0]
        step = 1e-6
        moved = self.values([_scaled(1 + step)])
        slope = (moved[first] - right[first]) / step
        error = np.asarray(self.got[first], np.float64) - right[first]
        finite = np.isfinite(slope) & np.isfinite(error)
        norm = float(np.square(slope[finite]).sum())
        off = float((slope[finite] * error[finite]).sum()) / norm if norm else 0.0
        if abs(off) < 1e-6 or abs(off) > 0.05:
            return []
        values = self.values([_scaled(1 + off)])
        apart = self.away(wrong, values)
        if apart == np.inf:
            return []
        return [Explanation((f"scale is off by a factor of {1 + off:.6g}",), tuple(wrong), apart)]

    def _rounding(self, wrong: list[str]) -> list[Explanation]:
        """The one rounding, or the class of precision, whose predicted errors are as large as those that are seen.

        All tensors that it reaches have to be wrong, on the sides, forward or backward, that are asked for. Where no single one
        explains everything, each tensor gets its own.
        """
        if not wrong or self.problem.q.dtype == np.float64 or self.large:
            return []
        names = _roundings()
        if self.owner.left < 0 or any(n in self.owner.known for n in names):  # it rounds the same everywhere
            ends = tuple(n.partition(" ")[2] for n in self.owner.known if " rounded to " in n)
            names = {n: p for n, p in names.items() if n in self.owner.known or (n[:4] == "out " and n[4:] in ends)}
        bad = {t for t in self.returned if self.before[t] > GOOD_RMS}
        sides = {t in FORWARD for t in wrong}
        found: list[tuple[float, Explanation]] = []
        for name, precision in names.items():
            truth = self.problem.truth(precision)
            off = {t: distance(self.got[t], truth.values[t], truth.sigma[t]) for t in self.returned}
            high, low = (
                {t: _median(sigma[t], self.problem.dtype) for t in self.returned} for sigma in (truth.sigma, self.sigma)
            )
            reached = {t for t in self.returned if high[t] > 8 * low[t]}
            if name.startswith("weights"):
                reached -= {"dq", "dk", "dbias", "dsink"}  # by way of the output alone, if that is what Delta is made of
            backward = bool(reached & set(FORWARD)) and not reached & set(FORWARD) & bad
            reached = {t for t in reached if (t in FORWARD) in sides}
            fits = {t for t in bad if 0.3 <= off[t][0] <= 1.7 and off[t][1] <= 16}
            if name.startswith("out "):  # each tensor by itself, and seen in its digits
                fits = {t for t in fits if t != "lse" and (round_to(self.got[t], precision.format) == self.got[t]).all()}
                some = fits >= reached and "out" in bad
                text = name if some else f"{{}} {name.partition(' ')[2]}"
            else:
                some, text = fits >= reached, name
                fits = fits if some else set()
            fits &= set(wrong)
            if not fits:
                continue
            size = max(abs(math.log(off[t][0] / 0.85)) for t in fits) - name.startswith("out ")  # digits say more than sizes
            order = [t for t in self.returned if t in fits]
            text = text.format(", ".join(order))
            where = "in the backward" if backward and name.startswith(("weights", "inputs", "scores")) else ""
            found.append((size, Explanation((text,), tuple(order), max(off[t][0] for t in order), where)))
        best: list[Explanation] = []
        left = set(wrong)
        while left and found:
            whole = [f for f in found if set(f[1].tensors) >= left] or found
            e = min(whole, key=lambda f: (len(left - set(f[1].tensors)), f[0]))[1]
            if not left & set(e.tensors):
                break
            best.append(dataclasses.replace(e, tensors=tuple(t for t in e.tensors if t in left)))
            left -= set(e.tensors)
            found = [f for f in found if set(f[1].tensors) <= left]
        return best

    def _added(self, tensor: str, last: Array) -> bool:
        right = self.values([]).get(tensor)
        if right is None or not np.isfinite(last).all():
            return False
        return distance(self.got[tensor] - last, right, self.sigma[tensor])[0] <= MATCH_RMS

    # -- backward

    def backward(self, wrong: list[str], forward: tuple[Change, ...]) -> list[Explanation]:
        """What explains the gradients: the forward's own change, another one in the backward alone, or one for each tensor."""
        returned = [t for t in self.returned if t not in FORWARD]
        names = tuple(c.name for c in forward)
        if forward:
            tried = (
                (self.values(forward), "in the backward too"),
                (self.values(forward, backward=[*self.base, *forward, KEPT_WEIGHTS]), "in the backward too"),
                (self.values(forward, backward=self.base), "by way of its out and lse"),  # a right backward, of what is wrong
            )
            for values, where in tried:
                apart = self.away(returned, values)
                if apart < np.inf:
                    return [Explanation(names, tuple(wrong), apart, where)]
            near_by = {t: min(self.away([t], values) for values, _ in tried) for t in wrong}
            follow = [t for t in wrong if near_by[t] < np.inf]
            if follow:
                more = [t for t in wrong if t not in follow]
                apart = max(near_by[t] for t in follow)
                rest = self._alone(more, returned, forward) if more else []
                return [Explanation(names, tuple(follow), apart, "in the backward too"), *rest]
        return self._alone(wrong, returned, forward)

    def _alone(self, wrong: list[str], returned: list[str], forward: tuple[Change, ...]) -> list[Explanation]:
        """What explains these gradients beside what the forward does."""
        for t in wrong:  # a buffer that was not cleared
            last = self.owner.last.get(t)
            if isinstance(last, np.ndarray) and last.shape == self.got[t].shape and self._added(t, last):
                return [Explanation((f"{t} is added to that of the call before",), (t,), 1.0)]
        out = self.got.get("out") if self.before.get("out", np.inf) <= GOOD_RMS else None
        matches: list[tuple[float, Change]] = []
        partly: dict[str, list[tuple[float, Change]]] = {t: [] for t in wrong}
        for i, change in enumerate(self.changes):
            if self.enough(i, matches):
                break
            best, alone = np.inf, dict.fromkeys(wrong, np.inf)
            for fused in (True, False) if change.stage in FORWARD_STAGES else (True,):
                values = self.values(forward, backward=[*self.base, *forward, change], fused=fused, returned=out)
                best = min(best, self.away(returned, values))
                alone = {t: min(d, self.away([t], values)) for t, d in alone.items()}
            if best < np.inf:
                matches.append((best, change))
            for t, d in alone.items():
                if d < np.inf:
                    partly[t].append((d, change))
        if matches:
            partly = {"": matches}
        found: dict[str, Explanation] = {}
        for t, some in partly.items():
            if some:
                (apart, change), others = self._best(some, backward=True)
                old = found.get(change.name)
                tensors = tuple(wrong) if not t else (*old.tensors, t) if old else (t,)
                where = "in the backward" if change.stage in FORWARD_STAGES else ""
                apart = max(apart, old.distance if old else 0.0)
                found[change.name] = Explanation((change.name,), tensors, apart, where, others)
        return list(found.values())


def _differ_in_nan(got: Array, right: Array, sigma: Array) -> bool:
    """Whether what is finite in both is right, and something is finite in one alone."""
    both = np.isfinite(got) & np.isfinite(right)
    if (both == (np.isfinite(got) | np.isfinite(right))).all():
        return False
    rms, most = distance(np.where(both, got, 0), np.where(both, right, 0), np.where(both, sigma, 0))
    return rms <= MATCH_RMS and most <= MATCH_MAX


def _median(sigma: Array, dtype: Any) -> float:
    """The median over elements with an error of their own: near the smallest normal number is only what exp loses there."""
    tiny = float(np.finfo(np.float64 if np.dtype(dtype) == np.float64 else np.float32).smallest_normal)  # low ones: in float32
    known = sigma[np.isfinite(sigma) & (sigma > 1e6 * tiny)]
    return float(np.median(known)) if known.size else 0.0


def _scaled(factor: float) -> Change:
    return Change("scale", "scale", lambda x: x.scale * factor)


def _roundings() -> dict[str, Precision]:
    """One rounding at a time, and all of a class."""
    plain, found = PRECISIONS["float32"], {}
    for knob in ("inputs", "scores", "weights", "dweights", "dscores", "out"):
        for bits, storage in ((11, "float16"), (8, "bfloat16")):
            low: dict[str, Any] = {knob: 2.0**-bits}
            found[f"{knob} rounded to {bits} bits"] = dataclasses.replace(plain, storage=storage, **low)
    classes = {f"all that {n} rounds": p for n, p in PRECISIONS.items() if n not in ("float64", "float32", "float8")}
    return found | classes


def _of_earlier_calls(earlier: list[dict[str, Any]], given: dict[str, Any]) -> list[Change]:
    """An option that was kept from an earlier call, whatever this one says."""
    stages = {"mask": "array", "key_lengths": "lengths", "scale": "scale"}
    found: dict[str, Change] = {}
    for name, stage in stages.items():
        for call in reversed(earlier):
            value, now = call.get(name), given.get(name)
            same_kind = value is not None and (name == "scale" or (now is not None and np.shape(value) == np.shape(now)))
            if not same_kind or (now is not None and np.array_equal(value, now)):
                continue
            kept = np.asarray(value)[..., None, None, None] if name == "key_lengths" else value
            text = f"the {name} of an earlier call is used"
            found.setdefault(text + f" {len(found)}" * (text in found), _constant(text, stage, kept))
    return list(found.values())


def _constant(name: str, stage: str, value: Any) -> Change:
    return Change(name, stage, lambda x: value)


def places(letters: str, words: dict[str, str], off: Array) -> str:
    """Where in a tensor the elements lie that are off: which rows, columns, heads; the ends of tiles."""
    parts = [f"{off.sum()} of {off.size} elements"]
    for axis, letter in enumerate(letters[-off.ndim :]):
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
