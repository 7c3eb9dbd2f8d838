"""What could explain a wrong case of attention, in the order in which it is tried: the forward first, then the backward.

A fused backward gets out and lse from the forward. So if the forward is wrong there are three kinds of backward: it makes the
same mistake, or it is right but starts from wrong values, or it makes another mistake.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.checks import Array
from npattn.tolerances import GOOD_RMS, MATCH_MAX, MATCH_RMS
from npattn.verify.op import Change
from npattn.verify.ops.attention.equations import swap
from npattn.verify.precision import PRECISIONS, Precision, round_to
from npattn.verify.search import (
    DETACHED,
    NEVER_WRITTEN,
    Explanation,
    Hypothesis,
    Search,
    constant_tensors,
    distance,
    factor,
    joined,
    median,
    offset,
)  # fmt: skip
from npattn.verify.stages import NOT_APPLICABLE, Run

UNPROTECTED = {  # products that let masked NaN through, since a weight of 0 times NaN is NaN
    "out": Change("masked_nan=poisons", {"out": lambda x, _: x.dropped @ x.vh}),
    "dv": Change("masked_nan=poisons", {"dvh": lambda x, _: swap(x.dropped) @ x.dout}),
    "dq": Change("masked_nan=poisons", {"dq": lambda x, _: x.scale * (x.dcap @ x.kh)}),
    "dk": Change("masked_nan=poisons", {"dkh": lambda x, _: x.scale * (swap(x.dcap) @ x.q)}),
}
KEPT_WEIGHTS = Change("the backward keeps the weights, and does not make them again from lse", {"p": lambda x, _: x.weights})
INPUTS = ("q", "k", "v", "dout")


def of_earlier_calls(earlier: list[dict[str, Any]], given: dict[str, Any]) -> list[Change]:
    """Changes that use an option of an earlier call instead of that of this call."""
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
            text += f" {len(found)}" * (text in found)
            found.setdefault(text, Change(text, {stage: _always(kept)}))
    return list(found.values())


def _always(value: Any) -> Callable[[Any, Any], Any]:
    return lambda x, _: value


# --- NaN, and what was never written ------------------------------------------------------------------------------------------


def masked_nan(s: Search) -> list[Explanation]:
    """Whether all that is wrong is NaN from masked places that came through an unprotected product.

    If only the places of NaN and inf are wrong for another reason, only changes that move NaN are tried from here on.
    """
    if all(np.isfinite(getattr(s.problem, n)).all() for n in INPUTS):
        return []
    places = [t for t in s.unexplained if t in s.right_values and _differ_in_nan(s.got[t], s.right_values[t], s.sigma[t])]
    through = {t: s.values([change]).get(t, np.array(0.0)) for t, change in UNPROTECTED.items()}
    found = [
        t for t in places
        if t in through and not ((~np.isfinite(s.right_values[t]) | np.isnan(through[t])) & np.isfinite(s.got[t])).any()
    ]  # fmt: skip
    if "lse" in s.unexplained:  # NaN among the scores themselves
        found = []
    if places and set(places) == set(s.unexplained):
        s.changes = [c for c in s.changes if c.nan == "moves"]
        s.only_nan = True
    s.returned = [t for t in s.returned if t not in found]
    return [Explanation(("masked_nan=poisons",), tuple(found), 0.0)] if found else []


def _differ_in_nan(got: Array, right: Array, sigma: Array) -> bool:
    """Whether some elements are finite in one array alone, and those that are finite in both are right."""
    both = np.isfinite(got) & np.isfinite(right)
    if (both == (np.isfinite(got) | np.isfinite(right))).all():
        return False
    rms, most = distance(np.where(both, got, 0), np.where(both, right, 0), np.where(both, sigma, 0))
    return rms <= MATCH_RMS and most <= MATCH_MAX


def unwritten(s: Search) -> list[Explanation]:
    """Whether dk or dv is wrong only for keys that no query sees, such as a buffer that is not written beyond a length."""
    if s.found or not set(s.unexplained) <= {"dk", "dv"} or not all(np.isfinite(getattr(s.problem, n)).all() for n in "kv"):
        return []
    x = Run(s.problem, s.given, s.memory.align, changes=s.base, dtype=np.float64)
    with np.errstate(all="ignore"):
        s.problem.op.forward(x)
    seen = x.allowed.reshape(x.B, x.G, x.H // x.G, *x.shape[2:]).any((2, 3)) if x.G and x.H % x.G == 0 else None
    if seen is None or seen.all() or not seen.any():
        return []
    found = []
    for t in s.unexplained:
        got, want, sigma = (np.where(seen[..., None], a, 0) for a in (s.got[t], s.right_values[t], s.sigma[t]))
        if s.got[t].shape[:-1] == seen.shape and distance(got.astype(s.got[t].dtype), want, sigma)[0] <= MATCH_RMS:
            found.append(t)
    return [Explanation((NEVER_WRITTEN,), tuple(found), math.inf)] if found else []


# --- the forward -----------------------------------------------------------------------------------------------------------


def _wrong_outputs(s: Search) -> list[str]:
    return [t for t in s.outputs if t in s.clearly_wrong]


def change_of_the_forward(s: Search) -> list[Explanation]:
    """One change that explains all outputs. Changes that explain one output are stored for `change_of_each_output`."""
    wrong, returned = _wrong_outputs(s), [t for t in s.outputs if t in s.returned]
    matches: list[tuple[float, Change]] = []
    s.explained_alone = {t: [] for t in wrong}
    for i, change in enumerate(s.changes if wrong else ()):
        if s.enough(i, matches):
            break
        if not s.changes_forward(change):
            continue
        values = s.outputs_with(change)
        if (apart := s.largest_distance(returned, values)) < np.inf:
            matches.append((apart, change))
        for t in wrong:
            if (alone := s.largest_distance([t], values)) < np.inf:
                s.explained_alone[t].append((alone, change))
    if not matches:
        return []
    (apart, change), others = s.best(matches)
    s.forward_changes = (change,)
    return [Explanation((change.name,), tuple(wrong), apart, others=others)]


def rounding_of_the_forward(s: Search) -> list[Explanation]:
    """Factors and roundings, if they explain all wrong outputs."""
    wrong = _wrong_outputs(s)
    rough = _factors_and_roundings(s, wrong) if wrong else []
    return rough if {t for e in rough for t in e.tensors} >= set(wrong) else []


def two_changes_of_the_forward(s: Search) -> list[Explanation]:
    """Two changes that together explain all outputs. Pairs are tried until the time is over, likely ones first."""
    wrong, returned, memory = _wrong_outputs(s), [t for t in s.outputs if t in s.returned], s.memory
    if not wrong or s.large or memory.pairs_left <= 0 or memory.seconds_left < 0 or not returned or s.only_nan:
        return []
    memory.pairs_left -= 1
    until = time.thread_time() + memory.seconds
    few = [c for c in s.changes if not c.tile and s.changes_forward(c)]
    for pair in itertools.combinations(few, 2):
        apart = s.largest_distance(returned, s.values(pair, gradients=False))
        if apart < np.inf:
            s.forward_changes = pair
            return [Explanation(tuple(c.name for c in pair), tuple(wrong), apart)]
        if time.thread_time() > until:
            break
    return []


def change_of_each_output(s: Search) -> list[Explanation]:
    found = []
    for t in _wrong_outputs(s):
        if s.explained_alone[t]:
            (apart, change), others = s.best(s.explained_alone[t])
            s.forward_changes = s.forward_changes or (change,)
            found.append(Explanation((change.name,), (t,), apart, others=others))
    return found


# --- the backward ----------------------------------------------------------------------------------------------------------


def _wrong_gradients(s: Search) -> list[str]:
    return [t for t in s.clearly_wrong if t not in s.outputs]


def the_same_in_the_backward(s: Search) -> list[Explanation]:
    """Whether the changes that explain the forward explain the backward, too."""
    wrong, returned, changes = _wrong_gradients(s), [t for t in s.returned if t not in s.outputs], s.forward_changes
    if not wrong or not changes:
        return []
    names = tuple(c.name for c in changes)
    tried = (
        (s.values(changes), "in the backward too"),
        (s.values(changes, backward=[*s.base, *changes, KEPT_WEIGHTS]), "in the backward too"),
        (s.values(changes, backward=s.base), "by way of its out and lse"),  # a right backward that starts from wrong values
    )
    for values, where in tried:
        if (apart := s.largest_distance(returned, values)) < np.inf:
            return [Explanation(names, tuple(wrong), apart, where)]
    nearest = {t: min(s.largest_distance([t], values) for values, _ in tried) for t in wrong}
    follow = {t: d for t, d in nearest.items() if d < np.inf}
    return [Explanation(names, tuple(follow), max(follow.values()), "in the backward too")] if follow else []


def added_to_the_call_before(s: Search) -> list[Explanation]:
    """Whether a gradient was added to that of the call before, in a buffer that was not cleared."""
    for t in _wrong_gradients(s):
        last = s.memory.returned[-1][0].get(t) if s.memory.returned else None
        if t not in s.right_values or not isinstance(last, np.ndarray) or last.shape != s.got[t].shape:
            continue
        if not np.isfinite(last).all():
            continue
        if distance(s.got[t] - last, s.right_values[t], s.sigma[t])[0] <= MATCH_RMS:
            s.backward_done = True
            return [Explanation((f"{t} is added to that of the call before",), (t,), 1.0)]
    return []


def change_of_the_backward(s: Search) -> list[Explanation]:
    """One change of the backward alone that explains all gradients, or else one for each gradient."""
    wrong, returned = _wrong_gradients(s), [t for t in s.returned if t not in s.outputs]
    if not wrong or s.backward_done:
        return []
    out = s.got.get("out") if s.rms_to_right.get("out", np.inf) <= GOOD_RMS else None
    matches: list[tuple[float, Change]] = []
    partly: dict[str, list[tuple[float, Change]]] = {t: [] for t in wrong}
    variants = s.variants_from(out)
    for i, change in enumerate(s.changes):
        if s.enough(i, matches):
            break
        best, alone = np.inf, dict.fromkeys(wrong, np.inf)
        with contextlib.suppress(*NOT_APPLICABLE):
            for values in variants.in_backward(change) if variants is not None else ():
                best = min(best, s.largest_distance(returned, values))
                alone = {t: min(d, s.largest_distance([t], values)) for t, d in alone.items()}
        if best < np.inf:
            matches.append((best, change))
        for t, d in alone.items():
            if d < np.inf:
                partly[t].append((d, change))
    found = []
    for t, some in ({"": matches} if matches else partly).items():
        if some:
            (apart, change), others = s.best(some, backward=True)
            where = "in the backward" if s.changes_forward(change) else ""
            found.append(Explanation((change.name,), (t,) if t else tuple(wrong), apart, where, others))
    return joined(found)


def no_evidence(s: Search) -> list[Explanation]:
    """Removes explanations with too little evidence: a tensor of NaN or one number nearly everywhere fits many mistakes."""
    changes = s.problem.op.changes
    poisoned = {t for e in s.found if e.names in (("masked_nan=poisons",), (NEVER_WRITTEN,)) for t in e.tensors}
    flat = constant_tensors(s.wrong, s.got, s.right_values, s.outputs)

    def supported(e: Explanation) -> bool:
        """Whether there is a right case, and no right case in which the mistake would show."""
        mistakes = [changes[n] for n in e.names if n in changes]
        in_backward = e.where == "in the backward"
        return bool(s.memory.right_cases) and not any(s.memory.excluded(c, s.base, in_backward) for c in mistakes)

    def only_nan(e: Explanation) -> bool:
        if not all(np.isnan(s.got[t]).mean() > 0.9 for t in e.tensors):
            return False
        makes = all(n in changes and changes[n].nan for n in e.names)
        return len(e.others) > 2 or (e.where == "in the backward" and not makes)

    found = [e for e in s.found if set(e.tensors) <= poisoned or not only_nan(e)]
    s.found = [_detached(s, e) for e in found if not set(e.tensors) <= flat.keys() or supported(e)]
    return []


def _detached(s: Search, e: Explanation) -> Explanation:
    """For gradients that are 0 everywhere a mistake of tiles is replaced by DETACHED."""
    changes = s.problem.op.changes
    tiles = all(n in changes and changes[n].tile for n in e.names)
    if not tiles or any(t in s.outputs or s.got[t].any() for t in e.tensors):
        return e
    return dataclasses.replace(e, names=(DETACHED,), where="", distance=math.inf, others=())


# --- a factor, or a rounding -------------------------------------------------------------------------------------------------


def factor_or_rounding(s: Search) -> list[Explanation]:
    return _factors_and_roundings(s, s.clearly_wrong)


def _factors_and_roundings(s: Search, wrong: list[str]) -> list[Explanation]:
    """Tensors that are right up to a factor, or rounded. A rounding is recognised by the size of errors, not by values."""
    wrong = [t for t in wrong if np.isfinite(s.rms_to_right[t])]
    if not wrong:
        return []
    if scale := _scale(s, wrong):
        return scale
    found = [e for t in wrong for e in offset(s, t) or factor(s, t)]
    for more in (_rows, _rounding):
        found += more(s, [t for t in wrong if t not in {x for e in found for x in e.tensors}])
    return found


def _scale(s: Search, wrong: list[str]) -> list[Explanation]:
    """Whether a slightly wrong scale explains everything. The derivative by the scale gives its size; a full run checks it."""

    def scaled(factor: float) -> Change:
        return Change("scale", {"scale": lambda x, scale: scale * factor})

    first, step = "out" if "out" in wrong else wrong[0], 1e-6
    slope = (s.values([scaled(1 + step)])[first] - s.right_values[first]) / step
    error = np.asarray(s.got[first], np.float64) - s.right_values[first]
    finite = np.isfinite(slope) & np.isfinite(error)
    norm = float(np.square(slope[finite]).sum())
    off = float((slope[finite] * error[finite]).sum()) / norm if norm else 0.0
    if abs(off) < 1e-6 or abs(off) > 0.05:
        return []
    apart = s.largest_distance(wrong, s.values([scaled(1 + off)]))
    return [Explanation((f"scale is off by a factor of {1 + off:.6g}",), tuple(wrong), apart)] if apart < np.inf else []


def rows_by_a_factor(s: Search) -> list[Explanation]:
    return _rows(s, s.unexplained)


def _rows(s: Search, wrong: list[str]) -> list[Explanation]:
    """Whether each row is right up to a factor near 1, as small as the rounding of lse makes it.

    The gradients have to follow from weights with the same factors.
    """
    out = s.got.get("out")
    if "out" in wrong and s.row_factor is None and isinstance(out, np.ndarray) and np.isfinite(out).all():
        s.row_factor = _factor_of_rows(s, out)
    factor = s.row_factor
    if factor is None or s.rms_to_right.get("lse", 0.0) > GOOD_RMS:
        return []
    forward = Change("rows", {"weights": lambda x, w: w * factor})  # Delta has it, too, if it is made of this output
    values = s.values([forward], backward=[*s.base, Change("rows", {"p": lambda x, p: p * factor})])
    found, worst = [], 0.0
    for t in [t for t in wrong if t in values]:
        apart = distance(s.got[t], values[t], s.sigma[t])
        unchanged = distance(s.got[t], s.right_values[t], s.sigma[t])
        if apart[0] <= MATCH_RMS and apart[1] <= MATCH_MAX and apart[1] < unchanged[1] / 2:
            found.append(t)
            worst = max(worst, apart[0])
    name = "each row is off by a factor, as of exp(s - lse) with a rounded lse"
    return [Explanation((name,), tuple(found), worst, rounds=True)] if found else []


def _factor_of_rows(s: Search, out: Array) -> Array | None:
    """(..., L, 1): the factor of each row of out, by least squares; None if one is not near 1, or if all are 1."""
    want, lse, sigma = s.right_values["out"], s.right_values["lse"], s.sigma["out"]
    unit = float(np.finfo(s.problem.dtype).eps) / 2
    near_one = 4 * unit * np.maximum(np.abs(np.where(np.isfinite(lse), lse, 0)), 4)[..., None]
    weight = np.where(np.isfinite(sigma) & (sigma > 0), 1 / np.maximum(sigma, 1e-300), 0)
    norm = np.square(want * weight).sum(-1, keepdims=True)
    norm = np.where(norm == 0, np.inf, norm)
    off = ((out - want) * want * weight * weight).sum(-1, keepdims=True) / norm
    if (np.abs(off) <= near_one + 6 / np.sqrt(norm)).all() and np.abs(off).max(initial=0.0) > 2 * unit:
        return np.asarray(1 + off, np.float64)
    return None


class _EarlyRounding(NamedTuple):
    """What may be rounded early: one field of a `Precision` to so many bits, or all that a class rounds."""

    name: str
    precision: Precision
    field: str = ""
    bits: int = 0


def _roundings() -> list[_EarlyRounding]:
    plain, found = PRECISIONS["float32"], list[_EarlyRounding]()
    for field in ("inputs", "scores", "weights", "dweights", "dscores", "out"):
        for bits, storage in ((11, "float16"), (8, "bfloat16")):
            low: dict[str, Any] = {field: 2.0**-bits}
            precision = dataclasses.replace(plain, storage=storage, **low)
            found.append(_EarlyRounding(f"{field} rounded to {bits} bits", precision, field, bits))
    left_out = ("float64", "float32", "float8")
    return found + [_EarlyRounding(f"all that {n} rounds", p) for n, p in PRECISIONS.items() if n not in left_out]


def _rounding(s: Search, wrong: list[str]) -> list[Explanation]:
    """The rounding, or the precision class, that predicts errors as large as those that are seen.

    All tensors that it reaches, of the side (forward or backward) that is searched, have to be wrong. If no single rounding
    explains everything, several may, each some of the tensors.
    """
    if not wrong or s.problem.dtype == np.float64 or s.large:
        return []
    tried, known = _roundings(), s.memory.known
    if s.memory.seconds_left < 0 or any(low.name in known for low in tried):  # a candidate rounds alike in all cases
        tried = [low for low in tried if low.name in known or (low.field == "out" and low.bits in s.memory.bits)]
    found = [fit for low in tried for fit in _explained_by(s, wrong, low)]
    best: list[Explanation] = []
    unexplained = set(wrong)
    while unexplained and found:
        whole = [f for f in found if set(f[1].tensors) >= unexplained] or found
        _, e, bits = min(whole, key=lambda f: (len(unexplained - set(f[1].tensors)), f[0]))
        if not unexplained & set(e.tensors):
            break
        s.memory.bits |= {bits} - {0}
        best.append(dataclasses.replace(e, tensors=tuple(t for t in e.tensors if t in unexplained)))
        unexplained -= set(e.tensors)
        found = [f for f in found if set(f[1].tensors) <= unexplained]
    return best


def _explained_by(s: Search, wrong: list[str], low: _EarlyRounding) -> list[tuple[float, Explanation, int]]:
    """Whether this rounding makes such errors: [(how far sizes differ, as a logarithm; explanation; bits)], or nothing."""
    truth = s.problem.truth(low.precision)
    if truth is None:
        return []
    dtype, bad, outputs = s.problem.dtype, {t for t in s.returned if s.rms_to_right[t] > GOOD_RMS}, set(s.outputs)
    off = {t: distance(s.got[t], truth.values[t], truth.sigma[t]) for t in s.returned}
    reached = {t for t in s.returned if median(truth.sigma[t], dtype) > 8 * median(s.sigma[t], dtype)}
    if low.field == "weights":
        reached -= {"dq", "dk", "dbias", "dsink"}  # it reaches them only through the output, if Delta is made of that
    backward = bool(reached & outputs) and not reached & outputs & bad
    reached = {t for t in reached if (t in outputs) in {t in outputs for t in wrong}}
    fits = {t for t in bad if 0.3 <= off[t][0] <= 1.7 and off[t][1] <= 16}
    errors = {t: np.asarray(s.got[t], np.float64) - truth.values[t] for t in fits}
    fits = {t for t in fits if _everywhere(errors[t], truth.sigma[t], 8 * s.sigma[t])}
    last = low.field == "out"
    if last:  # each tensor is rounded by itself, which its digits show
        fits = {t for t in fits if t != "lse" and (round_to(s.got[t], low.precision.format) == s.got[t]).all()}
    each = last and not (fits >= reached and "out" in bad)
    fits = set(wrong) & (fits if last or fits >= reached else set())
    if not fits:
        return []
    size = max(abs(math.log(off[t][0] / 0.85)) for t in fits) - last  # digits are better evidence than sizes
    order = tuple(t for t in s.returned if t in fits)
    name = f"{', '.join(order)} rounded to {low.bits} bits" if each else low.name
    where = "in the backward" if backward and low.field in ("weights", "inputs", "scores") else ""
    return [(size, Explanation((name,), order, max(off[t][0] for t in order), where, rounds=True), low.bits)]


def _everywhere(error: Array, sigma: Array, noticeable: Array) -> bool:
    """Whether there are errors wherever a rounding makes some: a mistake in some tiles leaves whole rows or keys as they are.

    sigma : what the rounding makes; it counts above ``noticeable``. A row with one key has a weight of 1, which nothing rounds:
    up to a quarter of the rows may be exact.
    """
    counts = (sigma > noticeable) & np.isfinite(error)
    size = np.where(counts, np.abs(error) / np.where(counts, sigma, 1), 0)
    rest = tuple(a for a in range(error.ndim) if a != error.ndim - 2)  # rows of out and dq, keys of dk and dv
    many = counts.sum(rest) >= 16
    exact = many & (size.max(rest, initial=0) < 0.1)
    return not exact.sum() > many.sum() / 4


HYPOTHESES = (
    Hypothesis("NaN came through a product with weight 0", "a run a product", masked_nan),
    Hypothesis("gradients of keys that nobody sees were never written", "a run", unwritten),
    Hypothesis("the forward does one thing otherwise", "a run a change", change_of_the_forward),
    Hypothesis("the forward is off by a factor, or rounds", "a truth a rounding", rounding_of_the_forward),
    Hypothesis("the forward does two things otherwise", "a run a pair of changes", two_changes_of_the_forward),
    Hypothesis("each output is wrong for a reason of its own", "nothing more", change_of_each_output),
    Hypothesis("the backward does what the forward does", "three runs", the_same_in_the_backward),
    Hypothesis("a buffer of gradients was not cleared", "nothing more", added_to_the_call_before),
    Hypothesis("the backward does one thing otherwise", "two runs a change", change_of_the_backward),
    Hypothesis("what is NaN or 0 everywhere is evidence of little", "nothing more", no_evidence),
    Hypothesis("what is left is off by a factor, or rounded", "a truth a rounding", factor_or_rounding),
    Hypothesis("each row is off by a factor", "a run", rows_by_a_factor),
)
