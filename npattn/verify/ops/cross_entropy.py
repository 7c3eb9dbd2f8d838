"""The record of cross-entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from npattn.tolerances import EXP_ULPS
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.ops.layers import (
    BATCH,
    SIZES,
    LayerCalls,
    Mistake,
    Rng,
    case,
    changes,
    names_of,
    normal,
    space,
    times,
    to_value,
    zero,
)
from npattn.verify.space import sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding

IGNORED = -100  # the target of a position that does not count, in torch and transformers


def _logits(
    rng: Rng, *, shape: tuple[int, ...] = (3, 7, 13), size: float = 1.0, shift: float = 0.0, mask: str = "", behind: str = "",
    put: dict[int, float] | None = None, row: float | None = None, confident: float = 0.0,
    options: dict[str, Any] | None = None,
) -> Problem:  # fmt: skip
    """A problem of cross-entropy.

    put : index -> value in every position; row : the value of all logits of the second position; confident : what is added to
    the logit of the target; behind : what stands at positions that do not count, "-100" in the targets or "nan" in the logits
    """
    x, V = size * normal(rng, *shape) + shift, shape[-1]
    targets = np.asarray(rng.integers(0, V, shape[:-1]))
    x += confident * (np.arange(V) == targets[..., None])
    for index, value in (put or {}).items():
        x[..., index] = value
    if row is not None:
        x.reshape(-1, V)[1] = row
    given = dict(options or {})
    if mask:
        seen = given["mask"] = np.asarray(COUNTS[mask](rng, shape[:-1]))
        if behind:
            targets = np.where(seen, targets, IGNORED)
        if behind == "nan":
            x[~seen] = np.nan
    dloss = normal(rng, *(shape[:-1] if given.get("reduction") == "none" else ()))
    return Problem(Op.known["cross_entropy"], {"logits": x, "targets": targets}, given, {"dloss": np.asarray(dloss)})


COUNTS: dict[str, Callable[[Rng, tuple[int, ...]], Array]] = {
    "some": lambda rng, n: rng.random(n) < 0.6,
    "all": lambda rng, n: np.ones(n, bool),
    "none": lambda rng, n: np.zeros(n, bool),
    "one": lambda rng, n: np.arange(int(np.prod(n))).reshape(n) == 0,
    "the end of each": lambda rng, n: np.broadcast_to(np.arange(n[-1]) >= n[-1] // 3, n).copy(),
}
"""Which positions count."""
SMOOTH, Z = {"label_smoothing": 0.1}, {"z_loss": 0.01}
EACH, SUM = {"reduction": "none"}, {"reduction": "sum"}

_case = partial(case, "cross_entropy", _logits)
CASES = [
    _case("plain"),
    *(_case(f"rank {len(n)}", "rank", shape=n) for n in ((13,), (7, 13), (2, 3, 7, 13))),
    _case("sum", "reduction", options=SUM),
    _case("none", "reduction", options=EACH),
    _case("mask", mask="some"),
    _case("mask + sum", "mask", mask="some", options=SUM),
    _case("mask + none", "mask", mask="some", options=EACH),
    _case("mask of all", "mask", mask="all"),
    _case("mask of one", "mask", mask="one"),
    _case("the end of each", "mask", mask="the end of each"),
    _case("targets of -100", "ignored targets", mask="some", behind="-100"),
    _case("targets of -100 + sum", "ignored targets", mask="some", behind="-100", options=SUM),
    _case("nothing counts", mask="none", behind="-100"),
    _case("nothing counts + none", "nothing counts", mask="none", options=EACH),
    _case("NaN behind the mask", "NaN containment", mask="some", behind="nan"),
    _case("NaN behind the mask + none", "NaN containment", mask="some", behind="nan", options={**EACH, **SMOOTH, **Z}),
    _case("row of NaN", "NaN containment", row=np.nan, options=EACH),
    _case("label_smoothing", options=SMOOTH),
    _case("label_smoothing + sum", "label_smoothing", options={**SMOOTH, **SUM}),
    _case("label_smoothing + none", "label_smoothing", options={**SMOOTH, **EACH}),
    _case("label_smoothing + mask", "label_smoothing", mask="some", options=SMOOTH),
    _case("label_smoothing + mask + none", "label_smoothing", mask="some", options={**SMOOTH, **EACH}),
    _case("label_smoothing 0.7", "label_smoothing", options={"label_smoothing": 0.7}),
    _case("label_smoothing 1", "label_smoothing", options={"label_smoothing": 1.0}),
    _case("z_loss", options=Z),
    _case("z_loss + none", "z_loss", options={**Z, **EACH}),
    _case("z_loss + mask", "z_loss", mask="some", options=Z),
    _case("z_loss + mask + none", "z_loss", mask="some", options={**Z, **EACH}),
    _case("z_loss 1", "z_loss", options={"z_loss": 1.0}),
    _case("confident", "hard inputs", size=3.0, confident=10.0),
    _case("confident + label_smoothing", "hard inputs", size=3.0, confident=10.0, options=SMOOTH),
    _case("x5", "hard inputs", size=5.0),
    _case("x30", "hard inputs", size=30.0),
    _case("x30 + label_smoothing + none", "hard inputs", size=30.0, options={**SMOOTH, **EACH}),
    _case("logits of 1000", "hard inputs", shift=1e3, options=EACH),
    _case("logits of 1e6", "hard inputs", shift=1e6, options=EACH),
    _case("logits of -1e4", "hard inputs", shift=-1e4),
    _case("logits of 1000 + z_loss", "hard inputs", shift=1e3, options=Z),
    _case("one logit far above", "hard inputs", put={3: 300.0}, options=EACH),
    _case("tiny", "hard inputs", size=1e-20),
    _case("logits of -inf", put={0: -np.inf, 5: -np.inf}, options=EACH),
    _case("logits of -inf, mean", "logits of -inf", put={0: -np.inf}),
    _case("logits of -inf + label_smoothing", "logits of -inf", put={0: -np.inf}, options={**EACH, **SMOOTH}),
    _case("row of -inf", "logits of -inf", row=-np.inf, options=EACH),
    _case("V = 1", "small sizes", shape=(3, 7, 1)),
    _case("V = 2", "small sizes", shape=(3, 7, 2), options=SMOOTH),
    _case("L = 1", "small sizes", shape=(3, 1, 13)),
    _case("B = L = V", "small sizes", shape=(5, 5, 5), mask="some", options=SMOOTH),
    _case("no rows", "empty", shape=(0, 13)),
    _case("V = 1025", "long", shape=(2, 5, 1025)),
    _case("long", shape=(3, 16384), options=SMOOTH),
    _case("many positions", "long", shape=(2, 1500, 3)),
    _case("float64", dtype="float64"),
    _case("float64 + label_smoothing", "float64", dtype="float64", options=SMOOTH),
    _case("float64 + z_loss + mask", "float64", dtype="float64", mask="some", options={**Z, **EACH}),
    _case("everything", mask="some", size=3.0, shift=20.0, options={**SMOOTH, **Z}),
]


def _of_sizes(rng: Rng, *, B: int, L: int, V: int, rank: int = 3, **given: Any) -> Problem:
    options = given.pop("reduction", {}) | given.pop("smoothing", {}) | given.pop("z", {})
    return _logits(rng, shape=(B, L, V)[3 - rank :], options=options, **given)


CLASSES = {**{name: n for name, n in SIZES.items() if name != "1"}, "above 1024": (1030, 1500)}  # of one class the loss is 0


def _possible(row: dict[str, str]) -> bool:
    """A mask, and what one position has for itself, need another position."""
    one = row.get("rank") == "1" or (row.get("L") == "1" and (row.get("B") == "1" or row.get("rank") == "2"))
    inputs = row.get("inputs", "normal")
    if one and (row.get("mask", "none") != "none" or inputs.startswith("row")):
        return False
    # With strides of 0 all sequences have the logits and targets of the first, where its mask may be another.
    return row.get("memory") != "strides of 0" or row.get("mask") not in ("NaN behind", "-100 behind")


SPACE = space(
    "cross_entropy", _of_sizes,
    {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "V": sizes_of("V", CLASSES)},
    {"rank": {"3": {}, "1": {"rank": 1}, "2": {"rank": 2}},
     "reduction": {"mean": {}, "sum": {"reduction": SUM}, "none": {"reduction": EACH}},
     "mask": {"none": {}, **{n: {"mask": n} for n in ("some", "all", "one", "the end of each")}, "nothing": {"mask": "none"},
              "-100 behind": {"mask": "some", "behind": "-100"}, "NaN behind": {"mask": "some", "behind": "nan"}},
     "label_smoothing": {"0": {}, "0.1": {"smoothing": SMOOTH}, "1": {"smoothing": {"label_smoothing": 1.0}}},
     "z_loss": {"0": {}, "0.01": {"z": Z}},
     "inputs": {"normal": {}, "x30": {"size": 30.0}, "tiny": {"size": 1e-20}, "confident": {"size": 3.0, "confident": 10.0},
                "far above 0": {"shift": 1e4}, "far below 0": {"shift": -1e4}, "a class of -inf": {"put": {0: -np.inf}},
                "row of -inf": {"row": -np.inf}, "row of NaN": {"row": np.nan}}},
    lambda n: n.get("B", 1) * n.get("L", 1) * n.get("V", 1), _possible,
)  # fmt: skip


def reference(p: Problem) -> Values:
    loss, cache = cross_entropy_forward(**p.inputs, **p.options)
    return {"loss": np.asarray(loss), "dlogits": cross_entropy_backward(p.cotangents["dloss"], cache).logits}


# --- the equations -----------------------------------------------------------------------------------------------------------


def forward(x: Any) -> None:
    """Equations (1) to (6) of `npattn.ops.cross_entropy`. Positions (..., 1) and classes (..., V), samples in front."""
    given, options = x.problem.inputs, x.options
    x.input("logits", given["logits"])
    n, V, lead = x.logits.ndim, x.logits.shape[-1], given["targets"].shape
    mask = options.get("mask")
    x.keep("counts", lambda: (np.ones(lead, bool) if mask is None else np.asarray(mask))[..., None])
    x.keep("targets", lambda: given["targets"])
    x.keep("reduction", lambda: options.get("reduction", "mean"))
    x.keep("s", lambda: np.asarray(options.get("label_smoothing", 0.0), x.logits.dtype))
    x.keep("a", lambda: np.asarray(options.get("z_loss", 0.0), x.logits.dtype))
    x.keep("hit", lambda: np.arange(V) == x.targets[..., None])
    x.keep("top", lambda: x.logits.max(-1, keepdims=True, initial=-np.inf))
    x.keep("below", lambda: x.logits - x.top, lambda v: x.unit * _size(v))  # (1)
    x.keep("e", lambda: np.exp(x.below), lambda e: EXP_ULPS * x.unit * e + x.rounding.tiny)
    x.total("z", x.e, -1, True)  # (2)
    x.rounded("p", lambda: x.e / x.z, 2.0)
    x.rounded("log_z", lambda: np.log(x.z), EXP_ULPS)
    x.rounded("lse", lambda: x.top + x.log_z)
    x.keep("nlog_p", lambda: x.log_z - x.below, lambda v: x.unit * _size(v))
    one = (1,) * n
    x.rounded("share", lambda: (x.s / V).reshape(one), 2.0)  # one number for all: its error does not average out
    x.rounded("rest", lambda: (1 - x.s).reshape(one), 2.0)
    x.keep("q", lambda: x.rest * x.hit + x.share)  # (3)
    x.keep("sum_q", lambda: 1.0)
    shared = x.keep("spread", lambda: np.where(x.q == 0, 0, x.q * x.nlog_p), lambda v: x.unit * _size(v))
    if x.s == 0:
        x.keep("of_q", lambda: shared.sum(-1, keepdims=True))  # (4): one term and zeros
    else:
        x.total("of_q", shared, -1, True)  # (4)
    x.rounded("z_loss", lambda: x.a * x.lse * x.lse if x.a else 0 * x.top, 2.0)
    x.sum_of_two("both", x.of_q, x.z_loss)  # (5)
    x.keep("each", lambda: np.where(x.counts, x.both, 0))
    x.keep("divisor", lambda: max(int(x.counts.sum()), 1) if x.reduction == "mean" else 1)
    if x.reduction == "none":
        x.keep("loss", lambda: x.each[..., 0])
        return
    x.total("sum", x.each, tuple(range(1 - n, 0)))  # (6)
    x.rounded("loss", lambda: x.sum / x.divisor)


def backward(x: Any) -> None:
    n = x.logits.ndim - 1
    x.input("dloss", x.problem.cotangents["dloss"])
    x.keep("divisor_back", lambda: x.divisor)
    x.keep("by_loss", lambda: x.dloss[..., None] if x.dloss.ndim > 1 else x.dloss.reshape(-1, *(1,) * n))
    x.rounded("up", lambda: x.by_loss / x.divisor_back)  # (6)
    x.rounded("of_p", lambda: x.p * x.sum_q)
    x.rounded("of_log_p", lambda: x.of_p - x.q)  # (4)
    x.rounded("of_lse", lambda: 2 * x.a * x.lse * x.p if x.a else 0 * x.p, 3.0)  # (5)
    x.sum_of_two("slope", x.of_log_p, x.of_lse)
    x.rounded("by_position", lambda: x.slope * x.up)
    x.keep("dlogits", lambda: np.where(x.counts & (x.up != 0), x.by_position, 0))


def _size(value: Array) -> Array:
    """What a rounding error is relative to: inf has none."""
    return np.where(np.isfinite(value), np.abs(value), 0)


# --- mistakes ----------------------------------------------------------------------------------------------------------------


def _in_low(x: Any, value: Array) -> Array:
    """In the candidate's dtype and back, so that the value overflows and underflows as it does there."""
    return np.asarray(value.astype(x.low).astype(value.dtype))


def _plus(small: float) -> Mistake:
    def slope(x: Any, _: Array) -> Array:
        w = x.q * x.p / (x.p + small)
        return np.asarray(x.p * w.sum(-1, keepdims=True) - w)

    return {"nlog_p": lambda x, _: -np.log(x.p + small), "of_log_p": slope}


def _clipped(least: float) -> Mistake:
    def slope(x: Any, _: Array) -> Array:
        w = x.q * (x.p >= least)
        return np.asarray(x.p * w.sum(-1, keepdims=True) - w)

    return {"nlog_p": lambda x, _: -np.log(np.maximum(x.p, least)), "of_log_p": slope}


def _shares(q: Callable[[Any], Array]) -> Mistake:
    """Other shares of the classes."""
    return {"q": lambda x, _: q(x), "sum_q": lambda x, _: x.q.sum(-1, keepdims=True)}


def _where_ignored(loss: Callable[[Any], Array], slope: Callable[[Any], Array]) -> Mistake:
    """A part of the loss is not masked."""
    return {"each": lambda x, v: np.where(x.counts, v, loss(x)),
            "dlogits": lambda x, v: np.where(x.counts, v, slope(x) * x.up)}  # fmt: skip


def _mean_of_sequences(x: Any) -> Array:
    """(..., 1, 1): how many positions of each sequence count, times the number of sequences."""
    n = np.maximum(x.counts.sum((-2, -1), keepdims=True), 1)
    return np.asarray(n * n.size)


def _only_mean(x: Any) -> None:
    if x.reduction != "mean":
        raise ValueError("no mean")


def _divisor(f: Callable[[Any], int]) -> Mistake:
    def value(x: Any, _: int) -> int:
        _only_mean(x)
        return max(f(x), 1)

    return {"divisor": value}


def _by_sequence(x: Any, loss: Array) -> Array:
    _only_mean(x)
    return np.asarray((x.each / _mean_of_sequences(x)).sum(tuple(range(1 - x.each.ndim, 0))))


def _up_by_sequence(x: Any, up: Array) -> Array:
    return np.asarray(up * x.divisor / _mean_of_sequences(x))


def _v(x: Any) -> int:
    return int(x.logits.shape[-1])


_MISTAKES: dict[str, Mistake] = {
    # forward: what counts
    "mask ignored": {"counts": lambda x, c: np.ones_like(c)},
    "mask=ignore": {"counts": lambda x, _: ~x.options["mask"][..., None]},
    "ignored positions counted in the mean": _divisor(lambda x: x.counts.size),
    "NaN where nothing counts": {"divisor": lambda x, d: int(x.counts.sum()) if x.reduction == "mean" else d},
    "mean over positions and classes": _divisor(lambda x: x.counts.size * _v(x)),
    "sum for mean": {"reduction": lambda x, r: "sum" if r == "mean" else r},
    "mean for sum": {"reduction": lambda x, r: "mean" if r == "sum" else r},
    "mean of the means of the sequences": {"loss": _by_sequence, "up": _up_by_sequence},
    "divided by the number of sequences": _divisor(lambda x: int(np.prod(x.counts.shape[:-2]))),
    "the first sequence alone": {"counts": lambda x, c: c & _first(c)},
    "the last position left out": {"counts": lambda x, c: c & (np.arange(c.shape[-2]) < c.shape[-2] - 1)[:, None]},
    # forward: targets
    "targets of the next position": {"targets": lambda x, t: np.roll(t, -1, -1)},
    "classes counted from 1": {"targets": lambda x, t: (t - 1) % _v(x)},
    "classes counted from -1": {"targets": lambda x, t: (t + 1) % _v(x)},
    # forward: the logarithm
    "base 2": {"nlog_p": lambda x, v: v / np.log(2), "of_log_p": lambda x, v: v / np.log(2)},
    "p for log p": {"nlog_p": lambda x, _: -x.p,
                    "of_log_p": lambda x, _: x.p * (x.q * x.p).sum(-1, keepdims=True) - x.q * x.p},
    "softmax taken twice": {
        "nlog_p": lambda x, _: np.log(np.exp(x.p).sum(-1, keepdims=True)) - x.p, "of_log_p": lambda x, _: _of_softmax(x)},
    **{f"1e-{n} added to p": _plus(10.0**-n) for n in (5, 7, 8, 10, 12)},
    **{f"p at least 1e-{n}": _clipped(10.0**-n) for n in (7, 8, 12, 15)},
    "log of p where p is 0": {"nlog_p": lambda x, v: np.where(_in_low(x, x.p) == 0, np.inf, v)},
    "no max": {"top": zero, "e": lambda x, e: _in_low(x, e), "z": lambda x, z: _in_low(x, z)},
    "logits without their log-sum-exp": {"nlog_p": lambda x, _: -x.logits, "of_p": zero},
    "loss of another sign": {"loss": lambda x, loss: -loss, "up": lambda x, up: -up},
    # forward: label smoothing
    "label_smoothing ignored": {"s": zero},
    "smoothing spread over V - 1": _shares(lambda x: np.where(x.hit, 1 - x.s, x.s / max(_v(x) - 1, 1))),
    "smoothing leaves out the target": _shares(lambda x: np.where(x.hit, 1 - x.s, x.s / _v(x))),
    "smoothing added to the whole loss": _shares(lambda x: x.hit + x.s / _v(x)),
    "smoothing by the sum over classes": _shares(lambda x: (1 - x.s) * x.hit + x.s),
    "smoothing with s for 1 - s": {"s": lambda x, s: 1 - s if s else s},
    "smoothing of ignored positions": _where_ignored(
        lambda x: _mean_of_log(x), lambda x: x.s * (x.p - 1 / _v(x))),
    # forward: z-loss
    "z_loss ignored": {"a": zero},
    "z_loss of lse without a square": {"z_loss": lambda x, _: x.a * x.lse, "of_lse": lambda x, _: x.a * x.p},
    "z_loss of the logits less their maximum": {
        "lse": lambda x, _: x.log_z, "of_lse": lambda x, _: 2 * x.a * x.lse * (x.p - (x.logits == x.top))},
    "z_loss halved": {"a": times(lambda x: 0.5)},
    "z_loss of the square of the sum": {
        "z_loss": lambda x, _: x.a * np.exp(2 * x.lse), "of_lse": lambda x, _: 2 * x.a * np.exp(2 * x.lse) * x.p},
    "z_loss of ignored positions": _where_ignored(lambda x: x.z_loss, lambda x: 2 * x.a * x.lse * x.p),
    # backward
    "target not subtracted": {"of_log_p": lambda x, _: x.of_p},
    "the target's class alone": {"of_log_p": lambda x, v: np.where(x.hit, v, 0)},
    "p forgotten": {"of_p": zero},
    "slope of log p forgotten: -1 / p": {"of_log_p": lambda x, _: np.where(x.q == 0, 0, -x.q / x.p)},
    "gradient of another sign": {"slope": lambda x, v: -v},
    "p of the targets of the next position": {"of_log_p": lambda x, v: v + x.q - np.roll(x.q, -1, -2)},
    "gradient of the sum": {"divisor_back": to_value(1)},
    "gradient divided by all positions": {
        "divisor_back": lambda x, d: x.counts.size if x.reduction == "mean" else d},
    "gradient divided twice": {"divisor_back": lambda x, d: d * d},
    "gradient divided although it is a sum": {
        "divisor_back": lambda x, d: max(int(x.counts.sum()), 1) if x.reduction == "sum" else d},
    "dloss ignored": {"up": lambda x, up: np.ones_like(up) / x.divisor},
    "ignored positions get p": {"dlogits": lambda x, v: np.where(x.counts, v, x.p * x.up)},
    "ignored positions get p - q": {"dlogits": lambda x, _: x.by_position},
    "label_smoothing not in the gradient": {"of_log_p": lambda x, _: x.p - x.hit},
    "smoothing of the gradient over V - 1": {
        "of_log_p": lambda x, _: x.p - np.where(x.hit, 1 - x.s, x.s / max(_v(x) - 1, 1))},
    "smoothing of the gradient without the target's own": {
        "of_log_p": lambda x, _: x.p - np.where(x.hit, 1 - x.s, x.s / _v(x))},
    "z_loss not in the gradient": {"of_lse": zero},
    "z_loss gradient without the factor 2": {"of_lse": lambda x, v: v / 2},
    "z_loss gradient without lse": {"of_lse": lambda x, _: 2 * x.a * x.p},
    "z_loss gradient of the logits less their maximum": {"of_lse": lambda x, _: 2 * x.a * x.log_z * x.p},
    "z_loss gradient without p": {"of_lse": lambda x, v: 0 * v + 2 * x.a * x.lse},
    "z_loss gradient with p - q": {"of_lse": lambda x, v: v - 2 * x.a * x.lse * x.q if x.a else v},
    "no gradient": {"dlogits": zero},
}  # fmt: skip


def _first(counts: Array) -> Array:
    return np.asarray(np.arange(counts.shape[0]).reshape(-1, *(1,) * (counts.ndim - 1)) == 0)


def _mean_of_log(x: Any) -> Array:
    if not x.s:
        raise ValueError("no smoothing")
    return np.asarray(x.s * x.nlog_p.mean(-1, keepdims=True))


def _of_softmax(x: Any) -> Array:
    """The gradient through both: that of the outer in p, then the Jacobian of p."""
    outer = np.exp(x.p) / np.exp(x.p).sum(-1, keepdims=True) - x.q
    return np.asarray(x.p * (outer - (x.p * outer).sum(-1, keepdims=True)))


# --- the record --------------------------------------------------------------------------------------------------------------


class _Calls(LayerCalls):
    """A function that has ``ignore_index`` and no ``mask`` gets that number, and targets that have it where a mask is False."""

    def arguments(
        self, candidate: Any, problem: Problem, takes: frozenset[str], backward: bool
    ) -> tuple[dict[str, Any], list[str]]:
        return super().arguments(candidate, problem, takes | ({"mask"} if "ignore_index" in takes else set()), backward)

    def forward(self, candidate: Any, problem: Problem, given: dict[str, Any]) -> Any:
        loss = super().forward(candidate, *_ignoring(candidate.forward, problem, given))
        return np.asarray(loss) if isinstance(loss, np.generic) else loss  # a sum is a number of NumPy

    def backward(self, candidate: Any, problem: Problem, given: dict[str, Any], values: dict[str, Any]) -> Any:
        return super().backward(candidate, *_ignoring(candidate.backward, problem, given), values)


def _ignoring(function: Any, problem: Problem, given: dict[str, Any]) -> tuple[Problem, dict[str, Any]]:
    names, mask = names_of(function), given.get("mask")
    if mask is None or "mask" in names or "ignore_index" not in names:
        return problem, given
    targets = np.where(mask, problem.inputs["targets"], IGNORED)
    given = {"ignore_index": IGNORED, **{name: x for name, x in given.items() if name != "mask"}}
    return dataclasses.replace(problem, inputs={**problem.inputs, "targets": targets}), given


def _candidate() -> Pair:
    def forward(
        logits: Array, targets: Array, *, mask: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Any:  # fmt: skip
        options = {"mask": mask, "reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss}
        return cross_entropy_forward(logits, targets, **options)[0]

    def backward(
        dloss: Array, logits: Array, targets: Array, *, mask: Any = None, reduction: str = "mean",
        label_smoothing: float = 0.0, z_loss: float = 0.0,
    ) -> Array:  # fmt: skip
        options = {"mask": mask, "reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss}
        return cross_entropy_backward(dloss, cross_entropy_forward(logits, targets, **options)[1]).logits

    return forward, backward


def _clean(x: Any) -> Any:
    """As `finite`, but -inf stays: such a class has probability 0."""
    return np.where(x < np.inf, x, 0) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


CROSS_ENTROPY = Op(
    name="cross_entropy",
    outputs=("loss",),
    axes={"loss": "BHL", "dlogits": "BHLV"},
    reference=reference,
    forward=forward,
    backward=backward,
    truth=partial(by_noise, clean=_clean),
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("mask ignored", "ignored positions counted in the mean", "target not subtracted")),
    cases=CASES,
    candidates={"cross_entropy": _candidate},
    calls=_Calls(
        "forward(logits, targets, *, mask, reduction, label_smoothing, z_loss) and backward(dloss, logits, targets, *, ...)",
        ("mask", "reduction", "label_smoothing", "z_loss"),
    ),
    in_computing_dtype=("loss",),
    shape=lambda p: np.shape(p.inputs["logits"]),
    space=SPACE,
)
