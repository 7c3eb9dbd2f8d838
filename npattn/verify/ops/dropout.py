"""The record of dropout by a given mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.ops.dropout import dropout_backward, dropout_forward
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.ops.layers import BATCH, SIZES, LayerCalls, Mistake, Rng, case, changes, normal, space, zero
from npattn.verify.space import sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding


def _masked(
    rng: Rng, *, shape: tuple[int, ...] = (2, 5, 7), p: float = 0.25, size: float = 1.0, dropped: float | None = None,
    kept: float | None = None, dy_dropped: float | None = None, dy_kept: float | None = None,
) -> Problem:  # fmt: skip
    """dropped : what x holds where the mask is 0; kept : what the first other element is; dy_dropped, dy_kept : of dy"""
    x, dy = size * normal(rng, *shape), normal(rng, *shape)
    mask = (rng.random(shape) >= p) / (1 - p if p < 1 else 1.0)
    if dropped is not None:
        x[mask == 0] = dropped
    if dy_dropped is not None:
        dy[mask == 0] = dy_dropped
    for a, value in ((x, kept), (dy, dy_kept)):
        if value is not None and mask.any():
            a.reshape(-1)[np.flatnonzero(mask)[0]] = value
    return Problem(Op.known["dropout"], {"x": x}, {"mask": mask}, {"dy": dy})


_case = partial(case, "dropout", _masked)
CASES = [
    _case("plain"),
    *(_case(f"rank {len(n)}", "rank", shape=n) for n in ((64,), (5, 7), (2, 3, 5, 7))),
    _case("p = 0", "rates", p=0.0),
    _case("p = 0.1", "rates", p=0.1, shape=(2, 13, 17)),
    _case("p = 0.5", "rates", p=0.5),
    _case("p = 0.9", "rates", p=0.9, shape=(2, 13, 17)),
    _case("all dropped", "rates", p=1.0),
    _case("NaN that is dropped", "NaN containment", dropped=np.nan),
    _case("inf that is dropped", "NaN containment", dropped=np.inf),
    _case("NaN in dy that is dropped", "NaN containment", dy_dropped=np.nan),
    _case("NaN that is kept", "NaN containment", kept=np.nan),
    _case("NaN in dy that is kept", "NaN containment", dy_kept=np.nan),
    _case("inf that is kept", "NaN containment", kept=-np.inf),
    _case("x1e30", "hard inputs", size=1e30),
    _case("tiny", "hard inputs", size=1e-30),
    _case("M = 1", "small sizes", shape=(2, 5, 1)),
    _case("B = L = M", "small sizes", shape=(5, 5, 5)),
    _case("no rows", "empty", shape=(0, 7)),
    _case("long", shape=(3, 4096)),
    _case("float64", dtype="float64"),
    _case("float64, NaN that is dropped", "float64", dtype="float64", dropped=np.nan),
]


def _of_sizes(rng: Rng, *, B: int, L: int, M: int, rank: int = 3, **given: Any) -> Problem:
    return _masked(rng, shape=(B, L, M)[3 - rank :], **given)


def _possible(row: dict[str, str]) -> bool:
    """Of one row in place of all, what is dropped is another. What is dropped needs a few elements to be there."""
    inputs = row.get("inputs", "normal")
    few = {"1", "2 or 3"}
    if inputs != "normal" and row.get("M") in few and (row.get("rank") == "1" or row.get("L") in few):
        return False
    return inputs == "normal" or (row.get("memory") != "strides of 0" and row.get("rate") not in ("0", "1"))


SPACE = space(
    "dropout", _of_sizes, {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "M": sizes_of("M", SIZES)},
    {"rank": {"3": {}, "1": {"rank": 1}, "2": {"rank": 2}},
     "rate": {"0.25": {}, "0": {"p": 0.0}, "0.5": {"p": 0.5}, "0.8": {"p": 0.8}, "1": {"p": 1.0}},
     "inputs": {"normal": {}, "NaN dropped": {"dropped": np.nan}, "inf dropped": {"dropped": np.inf},
                "NaN kept": {"kept": np.nan}, "NaN in dy dropped": {"dy_dropped": np.nan}}},
    lambda n: n.get("B", 1) * n.get("L", 1) * n.get("M", 1), _possible,
)  # fmt: skip


def reference(p: Problem) -> Values:
    y, cache = dropout_forward(p.inputs["x"], p.options["mask"])
    return {"y": y, "dx": dropout_backward(p.cotangents["dy"], cache).x}


def forward(x: Any) -> None:
    """Equation (1) of `npattn.ops.dropout`."""
    x.input("x", x.problem.inputs["x"])
    x.keep("mask", lambda: np.asarray(x.options["mask"], x.x.dtype))
    x.keep("kept", lambda: x.mask != 0)
    x.rounded("y", lambda: np.where(x.kept, x.x * x.mask, 0))  # (1)


def backward(x: Any) -> None:
    x.input("dy", x.problem.cotangents["dy"])
    x.keep("mask_back", lambda: x.mask)
    x.keep("kept_back", lambda: x.mask_back != 0)
    x.rounded("dx", lambda: np.where(x.kept_back, x.dy * x.mask_back, 0))  # (1)


def _scale(x: Any) -> float:
    """1 / (1 - p), which is read off the mask."""
    top = float(np.asarray(x.mask).max(initial=0))
    if not top > 1:
        raise ValueError("nothing is scaled")
    return top


def _in_both(f: Any) -> Mistake:
    """Another mask, in the backward too."""
    return {"mask": lambda x, m: f(x, m)}


def _in_backward(f: Any) -> Mistake:
    return {"mask_back": lambda x, m: f(x, m)}


_FORMS: dict[str, Any] = {
    "not scaled": lambda x, m: m / _scale(x),
    "scaled twice": lambda x, m: m * _scale(x),
    "scaled by 1 - p": lambda x, m: m / _scale(x) ** 2,
    "scaled by 1 / p": lambda x, m: (m != 0) / (1 - 1 / _scale(x)),
    "scaled where it is dropped, too": lambda x, m: np.where(m == 0, _scale(x), m),
    "of the first row for all": lambda x, m: np.broadcast_to(m[..., :1, :], m.shape),
    "of the first sequence for all": lambda x, m: np.broadcast_to(m[:1], m.shape),
    "of the first column for all": lambda x, m: np.broadcast_to(m[..., :1], m.shape),
    "moved by one element": lambda x, m: np.roll(m.ravel(), 1).reshape(m.shape),
    "squared": lambda x, m: m * m,
}
_MISTAKES: dict[str, Mistake] = {
    "mask inverted": _in_both(lambda x, m: (m == 0) * _scale(x)),
    "mask ignored": _in_both(lambda x, m: np.ones_like(m)),
    **{f"mask {name}": _in_both(f) for name, f in _FORMS.items() if name != "scaled where it is dropped, too"},
    "0 times NaN is NaN": {"kept": lambda x, k: np.ones_like(k), "kept_back": lambda x, k: np.ones_like(k)},
    "dropped elements are left as they are": {
        "y": lambda x, y: np.where(x.kept, y, x.x), "dx": lambda x, d: np.where(x.kept, d, x.dy)},
    # backward
    "backward without the mask": _in_backward(lambda x, m: np.ones_like(m)),
    "backward with the mask inverted": _in_backward(lambda x, m: (m == 0) * _scale(x)),
    **{f"backward with the mask {name}": _in_backward(f) for name, f in _FORMS.items()},
    "dx is y": {"dx": lambda x, _: x.y},
    "times x": {"dx": lambda x, d: d * x.x},
    "dy forgotten": {"dx": lambda x, _: np.broadcast_to(x.mask_back, x.dy.shape) * 1.0},
    "gradient of another sign": {"dx": lambda x, d: -d},
    "no gradient": {"dx": zero},
}  # fmt: skip


def _candidate() -> Pair:
    def forward(x: Array, *, mask: Array) -> Array:
        return dropout_forward(x, mask)[0]

    def backward(dy: Array, x: Array, *, mask: Array) -> Array:
        return dropout_backward(dy, dropout_forward(x, mask)[1]).x

    return forward, backward


DROPOUT = Op(
    name="dropout",
    outputs=("y",),
    axes={"y": "BHLM", "dx": "BHLM"},
    reference=reference,
    forward=forward,
    backward=backward,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("mask ignored", "mask not scaled", "backward without the mask")),
    cases=CASES,
    candidates={"dropout": _candidate},
    calls=LayerCalls("forward(x, *, mask) and backward(dy, x, *, mask)", ("mask",)),
    space=SPACE,
)
