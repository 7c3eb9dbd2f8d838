"""The record of masked softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.allowed import swap
from npattn.ops.checks import Array
from npattn.ops.softmax import softmax_backward, softmax_forward
from npattn.tolerances import EXP_ULPS
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.ops.layers import BATCH, MASKS, SIZES, LayerCalls, Mistake, Rng, case, changes, normal, space, to_value, zero
from npattn.verify.space import sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding

Change = Callable[[Any, Any], Any]
Shape = tuple[int, ...]


def _rows_of_scores(
    rng: Rng, *, shape: Shape = (2, 3, 7, 13), size: float = 1.0, shift: float = 0.0, mask: str = "", ties: bool = False,
    put: dict[int, float] | None = None, row: float | None = None, last_dweights: float | None = None,
) -> Problem:  # fmt: skip
    """A problem of softmax. put: index -> value in every row; row: the value of all elements of row 1"""
    scores = size * normal(rng, *shape) + shift
    if ties:
        scores[..., 1::2] = scores[..., : shape[-1] - 1 : 2] + 1e-6 * normal(rng, *shape)[..., 1::2]
    for index, value in (put or {}).items():
        scores[..., index] = value
    if row is not None:
        scores[..., 1, :] = row
    four = (1,) * (4 - len(shape)) + shape
    seen = MASKS[mask](rng, four) if mask else None
    options = {} if seen is None else {"mask": seen if seen.ndim == 2 else seen.reshape(seen.shape[4 - len(shape) :])}
    dweights = normal(rng, *shape)
    if last_dweights is not None:
        dweights[..., -1] = last_dweights
    return Problem(Op.known["softmax"], {"scores": scores}, options, {"dweights": dweights})


_case = partial(case, "softmax", _rows_of_scores)
CASES = [
    _case("plain"),
    *(_case(f"rank {len(n)}", "rank", shape=n) for n in ((13,), (7, 13), (3, 7, 13))),
    _case("mask", mask="mask"),
    _case("mask (L, S)", "mask", mask="mask (L, S)"),
    _case("mask (L, S), L = S", "mask", mask="mask (L, S)", shape=(2, 3, 9, 9)),
    _case("mask, rank 2", "mask", mask="mask (L, S)", shape=(7, 13)),
    _case("mask of each head", "mask", mask="mask of each head"),
    _case("mask of keys", "mask", mask="mask of keys"),
    _case("causal", "mask", mask="causal", shape=(2, 3, 9, 9)),
    _case("dead rows", mask="dead rows"),
    _case("every row dead", "dead rows", mask="every row dead"),
    _case("row of -inf", "dead rows", row=-np.inf),
    _case("scores of -inf", put={2: -np.inf, 5: -np.inf}),
    _case("scores of -inf and a mask", "scores of -inf", put={2: -np.inf}, mask="mask"),
    _case("row of NaN", "NaN containment", row=np.nan),
    _case("NaN behind the mask", "NaN containment", mask="last third", put={-1: np.nan, -2: np.inf}),
    _case("NaN behind the mask, in dweights", "NaN containment", mask="last third", last_dweights=np.nan),
    _case("x5", "hard inputs", size=5.0),
    _case("x30", "hard inputs", size=30.0),
    _case("x1e4", "hard inputs", size=1e4),
    _case("scores of 1e4", "hard inputs", shift=1e4),
    _case("scores of -1e4", "hard inputs", shift=-1e4),
    _case("scores of -1e5 and a mask", "hard inputs", shift=-1e5, mask="mask"),
    _case("one score far above", "hard inputs", put={3: 300.0}),
    _case("mask over the largest", "hard inputs", mask="last third", put={-1: 300.0}),
    _case("tiny", "hard inputs", size=1e-20),
    _case("near ties", "hard inputs", ties=True, size=10.0),
    _case("constant rows", "hard inputs", size=0.0, shift=3.0),
    _case("S = 1", "small sizes", shape=(2, 3, 7, 1)),
    _case("S = 2", "small sizes", shape=(2, 3, 7, 2)),
    _case("L = 1", "small sizes", shape=(2, 3, 1, 13)),
    _case("H = L = S", "small sizes", shape=(5, 5, 5, 5)),
    _case("S = 1025", "long", shape=(2, 1, 3, 1025)),
    _case("S = 16384", "long", shape=(3, 16384)),
    _case("float64", dtype="float64"),
    _case("float64 mask", "float64", dtype="float64", mask="mask"),
    _case("float64 x30", "float64", dtype="float64", size=30.0),
    _case("everything", mask="mask of each head", size=5.0, shift=-100.0, put={2: -np.inf}, row=-np.inf),
]
def _of_sizes(rng: Rng, *, B: int, H: int, L: int, S: int, rank: int = 4, **given: Any) -> Problem:
    return _rows_of_scores(rng, shape=(B, H, L, S)[4 - rank :], **given)


def _possible(row: dict[str, str]) -> bool:
    """A mask of each sequence or head needs these axes; a row of its own needs two rows, and keys to mask."""
    rank, mask, inputs = row.get("rank", "4"), row.get("mask", "none"), row.get("inputs", "normal")
    if rank != "4" and mask in ("mask", "mask of each head", "mask of keys"):
        return False
    if row.get("S") == "1" and (mask != "none" or inputs != "normal"):
        return False
    second_row = inputs in ("row of -inf", "row of NaN") or mask == "dead rows"
    return not (second_row and (row.get("L") == "1" or rank == "1")) and not (rank == "1" and mask != "none")


SPACE = space(
    "softmax", _of_sizes,
    {"B": sizes_of("B", BATCH), "H": sizes_of("H", BATCH), "L": sizes_of("L", SIZES),
     "S": sizes_of("S", {**SIZES, "above 1024": (1030, 1500)})},
    {"rank": {"4": {}, "1": {"rank": 1}, "2": {"rank": 2}, "3": {"rank": 3}},
     "mask": {"none": {}, **{n: {"mask": n} for n in ("mask", "mask (L, S)", "mask of each head", "mask of keys", "causal",
                                                      "dead rows")}},
     "inputs": {"normal": {}, "x30": {"size": 30.0}, "x1000": {"size": 1000.0}, "tiny": {"size": 1e-20},
                "far above 0": {"shift": 1e4}, "far below 0": {"shift": -1e4}, "ties": {"ties": True},
                "some -inf": {"put": {0: -np.inf}}, "row of -inf": {"row": -np.inf}, "row of NaN": {"row": np.nan}}},
    lambda n: n.get("B", 1) * n.get("H", 1) * n.get("L", 1) * n.get("S", 1), _possible,
)  # fmt: skip


def reference(p: Problem) -> Values:
    weights, cache = softmax_forward(p.inputs["scores"], **p.options)
    return {"weights": weights, "dscores": softmax_backward(p.cotangents["dweights"], cache).scores}


def forward(x: Any) -> None:
    """The equations of `npattn.ops.softmax`."""
    x.input("given", x.problem.inputs["scores"])
    x.keep("mask", lambda: x.options.get("mask"))
    x.keep("allowed", lambda: (x.given != -np.inf) if x.mask is None else (x.given != -np.inf) & x.mask)
    x.keep("axis", lambda: -1)
    x.keep("scores", lambda: np.where(x.allowed, x.given, -np.inf))
    x.keep("top", lambda: _top(x))
    x.keep("e", lambda: np.exp(x.scores - x.top), lambda _: _exp_error(x))
    x.total("z", x.e, x.axis, True)
    x.rounded("ratio", lambda: x.e / np.where(x.z == 0, 1, x.z), 2.0)
    x.keep("weights", lambda: np.where(x.allowed, x.ratio, 0))


def backward(x: Any) -> None:
    x.input("dweights", x.problem.cotangents["dweights"])
    x.keep("dp", lambda: np.where(x.allowed, x.dweights, 0))
    x.rounded("terms", lambda: x.weights * x.dp)
    x.total("delta", x.terms, x.axis, True)
    x.rounded("centred", lambda: x.dp - x.delta)
    x.rounded("ds", lambda: x.weights * x.centred)
    x.keep("dscores", lambda: np.where(x.allowed, x.ds, 0))


def _top(x: Any) -> Array:
    top = x.scores.max(x.axis, keepdims=True)
    return np.where(top == -np.inf, 0, top)


def _exp_error(x: Any) -> Array:
    """exp turns the rounding of s - top into a relative error. A result below the smallest normal number may become 0."""
    below = np.where(x.allowed[0], x.scores[0] - x.top[0], 0)
    error = np.exp(below) * np.hypot(x.unit * below, EXP_ULPS * x.unit) + x.rounding.tiny
    return np.where(x.allowed[0], error, 0)


# -- softmax


def _in_low(x: Any, value: Array) -> Array:
    """In the candidate's dtype and back, so that the value overflows and underflows as it does there."""
    return value.astype(x.low).astype(value.dtype)


def _filled(fill: float) -> Mistake:
    """Masked scores are a finite number instead of -inf, and their weights count."""

    def scores(x: Any, _: Array) -> Array:
        return np.where(x.allowed, x.given, max(fill, float(np.finfo(x.low).min)))

    return {"scores": scores, "weights": lambda x, _: x.ratio, "dp": lambda x, _: x.dweights}


def _plus(small: float) -> Change:
    return lambda x, value: value + small


def _with_seen(f: Callable[[Any], Array]) -> Mistake:
    return {"allowed": lambda x, _: f(x) & (x.given != -np.inf)}


_MISTAKES: dict[str, Mistake] = {
    "no max": {"top": zero, "e": lambda x, e: _in_low(x, e), "ratio": lambda x, r: _in_low(x, r)},
    "max over the whole array": {"top": lambda x, top: np.full_like(top, x.scores.max()),
                                 "e": lambda x, e: _in_low(x, e)},
    "max over masked scores too": {"top": lambda x, _: x.given.max(-1, keepdims=True), "e": lambda x, e: _in_low(x, e)},
    "mask added as 0 and 1": {"allowed": lambda x, _: x.given != -np.inf, "scores": lambda x, s: s + x.mask},
    "mask multiplied into the scores": {
        "allowed": lambda x, _: x.given != -np.inf, "scores": lambda x, s: s * x.mask, "ds": lambda x, ds: ds * x.mask},
    **{f"masked scores of -1e{n}": _filled(-(10.0**n)) for n in (3, 4, 9)},
    "masked scores of the smallest number": _filled(-np.inf),
    "mask after the softmax, not normalised again": {
        "allowed": lambda x, _: x.given != -np.inf, "weights": lambda x, w: np.where(x.mask & True, w, 0),
        "dp": lambda x, dp: np.where(x.mask, dp, 0), "ds": lambda x, _: x.ratio * x.centred},
    "masked scores counted in the sum": {
        "z": lambda x, _: np.exp(x.given - x.top).sum(-1, keepdims=True),
        "dscores": lambda x, ds: np.where(x.allowed, ds, -np.exp(x.given - x.top) / x.z * x.delta)},
    "mask=drop": _with_seen(lambda x: ~x.mask),
    "mask ignored": _with_seen(lambda x: np.ones_like(x.given, bool)),
    "mask of the first sequence": _with_seen(lambda x: np.broadcast_to(x.mask, x.given.shape)[:, :1]),
    "mask of the first row": _with_seen(lambda x: np.broadcast_to(x.mask, x.given.shape)[..., :1, :]),
    "mask transposed": _with_seen(lambda x: swap(x.mask)),
    "a dead row gives NaN": {"ratio": lambda x, _: x.e / x.z, "weights": lambda x, w: np.where(_no_score(x), x.ratio, w),
                             "dscores": lambda x, ds: np.where(_no_score(x), np.nan, ds)},
    "a dead row gives 1 / S": {"weights": lambda x, w: np.where(_no_score(x), 1 / w.shape[-1], w)},
    "axis -2": {"axis": to_value(-2)},
    "axis 0": {"axis": to_value(1)},
    "over the whole array": {"z": lambda x, z: np.broadcast_to((x.e * np.exp(x.top - x.top.max())).sum(), z.shape)
                             * np.exp(x.top.max() - x.top),
                             "delta": lambda x, delta: np.full_like(delta, (x.weights * x.dp).sum())},
    "base 2": {"e": lambda x, _: np.exp2(x.scores - x.top), "ds": lambda x, ds: ds * np.log(2)},
    "divided by the root of S": {"scores": lambda x, s: s * s.shape[-1] ** -0.5, "ds": lambda x, ds: ds * ds.shape[-1] ** -0.5},
    "not normalised": {"ratio": lambda x, _: x.e, "delta": zero},
    "log of the weights": {"weights": lambda x, w: np.log(w), "ds": lambda x, _: x.dp - x.ratio * x.dp.sum(-1, keepdims=True)},
    "one score more in the sum": {"z": lambda x, z: z + np.exp(-x.top)},
    **{f"1e-{n} beside the sum": {"z": _plus(10.0**-n)} for n in (3, 5, 6, 8)},
    # backward
    "Delta 0": {"delta": zero},
    "Delta over the rows": {"delta": lambda x, _: x.terms.sum(-2, keepdims=True)},
    "Delta a mean": {"delta": lambda x, delta: delta / x.terms.shape[-1]},
    "Delta not times p": {"ds": lambda x, _: x.weights * x.dp - x.delta},
    "Delta of the sum of dp": {"delta": lambda x, _: x.dp.sum(-1, keepdims=True)},
    "Delta with the wrong sign": {"delta": lambda x, delta: -delta},
    "p (1 - p) dp": {"ds": lambda x, _: x.weights * (1 - x.weights) * x.dp},
    "not times p": {"ds": lambda x, _: x.centred},
    "p squared": {"ds": lambda x, ds: x.weights * ds},
    "dweights as they are": {"ds": lambda x, _: x.dp},
    "gradient of another sign": {"dscores": lambda x, ds: -ds},
    "no gradient": {"dscores": zero},
}  # fmt: skip


def _no_score(x: Any) -> Array:
    return np.asarray(~x.allowed.any(-1, keepdims=True))


# --- the record ------------------------------------------------------------------------------------------------------------


def _candidate() -> Pair:
    def forward(scores: Array, *, mask: Any = None) -> Array:
        return softmax_forward(scores, mask=mask)[0]

    def backward(dweights: Array, scores: Array, *, mask: Any = None) -> dict[str, Any]:
        return {"dscores": softmax_backward(dweights, softmax_forward(scores, mask=mask)[1]).scores}

    return forward, backward


def _clean(x: Any) -> Any:
    """As `finite`, but -inf stays: a score of -inf is masked."""
    return np.where(x < np.inf, x, 0) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


SOFTMAX = Op(
    name="softmax",
    outputs=("weights",),
    axes={"weights": "BHLS", "dscores": "BHLS"},
    reference=reference,
    forward=forward,
    backward=backward,
    truth=partial(by_noise, clean=_clean),
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("mask ignored", "axis -2", "Delta 0")),
    cases=CASES,
    candidates={"softmax": _candidate},
    calls=LayerCalls("forward(scores, *, mask) and backward(dweights, scores, *, mask)", ("mask",)),
    space=SPACE,
)
