"""The records of the embedding and of the head that shares its table."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.allowed import swap
from npattn.ops.checks import Array
from npattn.ops.embedding import embedding_backward, embedding_forward, tied_head_backward, tied_head_forward
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.ops.layers import (
    BATCH,
    SIZES,
    LayerCalls,
    Mistake,
    Rng,
    adjoint,
    by_sequence,
    case,
    changes,
    normal,
    of_first_sequence,
    plain_outer,
    same,
    space,
    times,
    to_value,
    tokens_differ,
    zero,
)  # fmt: skip
from npattn.verify.space import sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding

# --- embedding --------------------------------------------------------------------------------------------------------------

IDS: dict[str, Callable[[Rng, tuple[int, ...], int], Array]] = {
    "any": lambda rng, lead, V: rng.integers(0, V, lead),
    "all one": lambda rng, lead, V: np.full(lead, V // 2),
    "0 and the last": lambda rng, lead, V: rng.integers(0, 2, lead) * (V - 1),
    "lower half": lambda rng, lead, V: rng.integers(0, V // 2 + 1, lead),
    "different": lambda rng, lead, V: rng.permutation(max(math.prod(lead), V))[: math.prod(lead)].reshape(lead) % V,
}


def _embedding(
    rng: Rng, *, lead: tuple[int, ...] = (3, 5), V: int = 11, M: int = 6, ids: str = "any", dtype_of_ids: str = "int64",
    size: float = 1.0, shift: float = 0.0, spoilt: float | None = None,
) -> Problem:  # fmt: skip
    """A problem of the embedding. spoilt : what a number of row 0, and of the first token's dy, is"""
    table, dy = size * normal(rng, V, M) + shift, normal(rng, *lead, M) + shift
    if spoilt is not None:
        table[0, 0] = dy[(0,) * dy.ndim] = spoilt
    numbers = np.asarray(IDS[ids](rng, lead, V), dtype_of_ids)
    return Problem(Op.known["embedding"], {"ids": numbers, "table": table}, {}, {"dy": dy})


_case = partial(case, "embedding", _embedding)
CASES = [
    _case("plain"),
    *(_case(f"ids of rank {len(lead)}", "rank", lead=lead) for lead in ((), (5,), (2, 3, 4))),
    _case("all ids one", "repeated ids", ids="all one"),
    _case("0 and the last", "repeated ids", ids="0 and the last"),
    _case("all ids different", "ids", ids="different", V=20),
    _case("rows that are not used", "ids", ids="lower half", V=40),
    _case("int32 ids", "dtype of ids", dtype_of_ids="int32"),
    _case("uint8 ids", "dtype of ids", dtype_of_ids="uint8"),
    _case("V = 1", "small sizes", V=1),
    _case("M = 1", "small sizes", M=1),
    _case("V = M", "square", V=7, M=7),
    _case("B = L", "square", lead=(5, 5)),
    _case("no tokens", "empty", lead=(0, 5)),
    _case("mean 100", "hard inputs", shift=100.0),
    _case("tiny", "hard inputs", size=1e-20),
    _case("NaN", "NaN containment", spoilt=np.nan, ids="0 and the last"),
    _case("inf in a row that is not used", "NaN containment", spoilt=np.inf, ids="all one"),
    _case("V = 5000", "long", V=5000, M=3, lead=(2, 20)),
    _case("many tokens", "long", lead=(4, 1000)),
    _case("float64", dtype="float64"),
    _case("float64 all ids one", "float64", dtype="float64", ids="all one"),
]


def _of_sizes(rng: Rng, *, B: int, L: int, V: int, M: int, rank: int = 2, **given: Any) -> Problem:
    return _embedding(rng, lead=(B, L)[2 - rank :], V=V, M=M, **given)


def _possible(row: dict[str, str]) -> bool:
    """A large table is not square, and not all tokens are the same (see `tokens_differ`)."""
    same_tokens = row.get("memory") == "strides of 0" and row.get("rank of ids") == "1"
    return not same_tokens and not (row.get("V") == "above 1000" and row.get("M") == "V")


SPACE = space(
    "embedding", _of_sizes,
    {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "V": {**sizes_of("V", SIZES), "above 1000": ({"V": 1031},)},
     "M": {**sizes_of("M", SIZES), "V": ({"M": "V"},)}},
    {"rank of ids": {"2": {}, "0": {"rank": 0}, "1": {"rank": 1}}, "ids": {name: {"ids": name} for name in IDS},
     "dtype of ids": {"int64": {}, "int32": {"dtype_of_ids": "int32"}, "uint16": {"dtype_of_ids": "uint16"}},
     "inputs": {"normal": {}, "mean 100": {"shift": 100.0}, "tiny": {"size": 1e-20}, "NaN": {"spoilt": np.nan},
                "inf": {"spoilt": np.inf}}},
    lambda n: n.get("M", 1) * (n.get("B", 1) * n.get("L", 1) + n.get("V", 1)),
    _possible,
)  # fmt: skip


def reference(p: Problem) -> Values:
    y, cache = embedding_forward(**p.inputs)
    return {"y": y, "dtable": embedding_backward(p.cotangents["dy"], cache).table}


def forward(x: Any) -> None:
    """Equation (1) of `npattn.ops.embedding`."""
    x.input("table", x.problem.inputs["table"])
    x.keep("table as used", lambda: same)
    x.used = getattr(x, "table as used")(x.table)
    x.keep("ids", lambda: x.problem.inputs["ids"].astype(np.int64))
    x.keep("factor", lambda: 1.0)
    x.keep("y", lambda: x.factor * x.used[:, x.ids])  # (1)


def backward(x: Any) -> None:
    x.input("dy", x.problem.cotangents["dy"])
    (V, M), tokens = x.problem.inputs["table"].shape, x.ids.size
    x.rows = x.factor * x.dy.reshape(len(x.dy), tokens, M)
    x.keep("counted", lambda: x.ids.ravel())  # the id of each token; -1 for one that adds nothing
    sums = x.keep("rows of the table", lambda: _summed(x.rows, x.counted, V), lambda _: _error(x, V))  # (1)
    x.keep("dtable", lambda: adjoint(getattr(x, "table as used"), (len(sums), V, M), sums))


def _summed(rows: Array, ids: Array, V: int) -> Array:
    """By id the sum of rows (.., tokens, M): (.., V, M)."""
    result = np.zeros((len(rows), V, rows.shape[-1]), rows.dtype)
    for i in np.unique(ids[ids >= 0]):
        result[:, i] = rows[:, ids == i].sum(1)
    return result


def _error(x: Any, V: int) -> Array:
    """The rounding of a sum of n numbers, one after the other; of one number there is none."""
    rows, ids = x.rows[:1], x.counted
    n = np.bincount(ids[ids >= 0], minlength=V)[:, None]
    size, total = np.sqrt(_summed(np.square(rows), ids, V)[0]), _summed(rows, ids, V)[0]
    return np.asarray(np.where(n > 1, x.unit * np.hypot(np.sqrt(n / 2 + 1) * size, np.sqrt(n / 3) * total), 0))


def _no_gradient_of(row: int) -> Mistake:
    return {"dtable": lambda x, g: np.where(np.arange(g.shape[1])[:, None] == row % g.shape[1], 0, g)}


def _is_zero(row: int) -> Mistake:
    """This row counts as 0, whatever the table holds."""

    def without(x: Any, table: Array) -> Array:
        return np.where(np.arange(table.shape[1])[:, None] == row % table.shape[1], 0, table)

    return {"table": without, "dtable": without}


def _kept(x: Any, keep: Callable[[list[int]], int]) -> Array:
    """The ids, but of all tokens with the same one only one counts."""
    ids = x.ids.ravel()
    one = [keep(np.flatnonzero(ids == i).tolist()) for i in np.unique(ids)]
    return np.where(np.isin(np.arange(ids.size), one), ids, -1)


def _last_in_each_sequence(x: Any, counted: Array) -> Array:
    ids = x.ids.reshape(x.ids.shape[0] if x.ids.ndim > 1 else 1, -1)
    again = [[i in row[t + 1 :] for t, i in enumerate(row)] for row in ids.tolist()]
    return np.where(again, -1, ids).ravel()


def _mean_of_each(x: Any, g: Array) -> Array:
    n = np.bincount(x.ids.ravel(), minlength=g.shape[1])[:, None]
    return np.asarray(g / np.maximum(n, 1))


def _shifted(ids: Array, V: int, by: int, clipped: bool = False) -> Array:
    return np.clip(ids + by, 0, V - 1) if clipped else (ids + by) % V


def _rows_of(x: Any) -> int:
    return int(x.table.shape[1])


def _first_sequence(x: Any, counted: Array) -> Array:
    part = math.prod(x.ids.shape[1:]) if x.ids.ndim > 1 else counted.size
    return np.where(np.arange(counted.size) < part, counted, -1)


_MISTAKES: dict[str, Mistake] = {
    # forward
    "ids one too large": {"ids": lambda x, ids: _shifted(ids, _rows_of(x), 1)},
    "ids one too large, the last clipped": {"ids": lambda x, ids: _shifted(ids, _rows_of(x), 1, True)},
    "ids one too small": {"ids": lambda x, ids: _shifted(ids, _rows_of(x), -1)},
    "ids one too small, 0 clipped": {"ids": lambda x, ids: _shifted(ids, _rows_of(x), -1, True)},
    "ids counted from the end": {"ids": lambda x, ids: _rows_of(x) - 1 - ids},
    "ids of the first sequence": {"ids": lambda x, ids: np.broadcast_to(ids[:1], ids.shape)},
    "ids transposed": {"ids": lambda x, ids: swap(ids) if ids.shape[-1] == ids.shape[-2] else None},
    "ids in 8 bits": {"ids": lambda x, ids: ids & 255},
    "ids in float16": {"ids": lambda x, ids: np.minimum(ids.astype(np.float16).astype(np.int64), _rows_of(x) - 1)},
    "table transposed": {"table as used": to_value(swap)},
    "times sqrt(M)": {"factor": times(lambda x: math.sqrt(x.table.shape[-1]))},
    "divided by sqrt(M)": {"factor": times(lambda x: 1 / math.sqrt(x.table.shape[-1]))},
    "row 0 is 0": _is_zero(0),
    # backward
    "a repeated id is overwritten": {"counted": lambda x, _: _kept(x, max)},
    "the first of a repeated id alone": {"counted": lambda x, _: _kept(x, min)},
    "a repeated id is overwritten within a sequence": {"counted": _last_in_each_sequence},
    "a mean over the tokens of an id": {"dtable": _mean_of_each},
    "a mean over all tokens": {"dtable": lambda x, g: g / max(x.ids.size, 1)},
    "a mean over the batch": {"dtable": lambda x, g: g / (len(x.ids) if x.ids.ndim > 1 else 1)},
    "of the first sequence": {"counted": _first_sequence},
    "of the last token": {"counted": lambda x, c: np.where(np.arange(c.size) == c.size - 1, c, -1)},
    "row 0 without a gradient": _no_gradient_of(0),
    "the last row without a gradient": _no_gradient_of(-1),
    "gradient of the next row": {"counted": lambda x, ids: _shifted(ids, _rows_of(x), 1)},
    "gradient of the row before": {"counted": lambda x, ids: _shifted(ids, _rows_of(x), -1)},
    "gradient transposed": {"dtable": lambda x, g: swap(g)},
    "no gradient": {"dtable": zero},
}


def _candidate() -> Pair:
    def forward(ids: Array, table: Array) -> Array:
        return embedding_forward(ids, table)[0]

    def backward(dy: Array, ids: Array, table: Array) -> Array:
        return embedding_backward(dy, embedding_forward(ids, table)[1]).table

    return forward, backward


EMBEDDING = Op(
    name="embedding",
    outputs=("y",),
    axes={"y": "KBLM", "dtable": "VM"},
    reference=reference,
    forward=forward,
    backward=backward,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("a repeated id is overwritten", "a mean over the tokens of an id", "ids one too large")),
    cases=CASES,
    candidates={"embedding": _candidate},
    calls=LayerCalls("forward(ids, table) and backward(dy, ids, table)", ()),
    space=SPACE,
)

# --- tied head --------------------------------------------------------------------------------------------------------------


def _tied_head(
    rng: Rng, *, lead: tuple[int, ...] = (3, 5), M: int = 6, V: int = 11, size: float = 1.0, shift: float = 0.0,
    spoilt: float | None = None, dead: float | None = None,
) -> Problem:  # fmt: skip
    """A problem of the tied head. spoilt : what a number of the first token is; dead : likewise, and its dy is 0"""
    x, table, dy = size * normal(rng, *lead, M) + shift, normal(rng, V, M), normal(rng, *lead, V)
    if spoilt is not None:
        x[(0,) * x.ndim] = spoilt
    if dead is not None:
        x[(0,) * x.ndim], dy[(0,) * len(lead)] = dead, 0
    return Problem(Op.known["tied_head"], {"x": x, "table": table}, {}, {"dy": dy})


_head = partial(case, "tied_head", _tied_head)
HEAD_CASES = [
    _head("plain"),
    *(_head(f"rank {len(lead) + 1}", "rank", lead=lead) for lead in ((), (5,), (2, 3, 5))),
    _head("V = M", "square", V=7, M=7),
    _head("M = 1", "small sizes", M=1),
    _head("V = 1", "small sizes", V=1),
    _head("no tokens", "empty", lead=(0, 5)),
    _head("mean 100", "hard inputs", shift=100.0),
    _head("tiny", "hard inputs", size=1e-20),
    _head("NaN", "NaN containment", spoilt=np.nan),
    _head("NaN in a dead token", "NaN containment", dead=np.nan),
    _head("V = 500", "long", lead=(2, 3), V=500),
    _head("float64", dtype="float64"),
]


def _head_of_sizes(rng: Rng, *, B: int, L: int, M: int, V: int, rank: int = 3, **given: Any) -> Problem:
    return _tied_head(rng, lead=(B, L)[3 - rank :], M=M, V=V, **given)


HEAD_SPACE = space(
    "tied_head", _head_of_sizes,
    {"B": sizes_of("B", BATCH), "L": sizes_of("L", SIZES), "M": sizes_of("M", SIZES),
     "V": {**sizes_of("V", SIZES), "M": ({"V": "M"},)}},
    {"rank": {"3": {}, "1": {"rank": 1}, "2": {"rank": 2}},
     "inputs": {"normal": {}, "mean 100": {"shift": 100.0}, "tiny": {"size": 1e-20}, "NaN": {"spoilt": np.nan},
                "NaN in a dead token": {"dead": np.nan}}},
    lambda n: n.get("B", 1) * n.get("L", 1) * (n.get("M", 1) + n.get("V", 1)),
    tokens_differ, ("NaN in a dead token",),
)  # fmt: skip


def head_reference(p: Problem) -> Values:
    y, cache = tied_head_forward(**p.inputs)
    return {"y": y, **_head_gradients(p.cotangents["dy"], cache)}


def _head_gradients(dy: Array, cache: Any) -> Values:
    g = tied_head_backward(dy, cache)
    return {"dx": g.x, "dtable": g.table}


def head_forward(x: Any) -> None:
    """Equation (2) of `npattn.ops.embedding`."""
    given = x.problem.inputs["x"]
    x.input("x", by_sequence(given))
    x.input("table", x.problem.inputs["table"])
    x.keep("table as used", lambda: same)
    x.used = getattr(x, "table as used")(x.table)
    x.keep("factor", lambda: 1.0)
    x.product("rows", x.x, swap(x.used)[:, None])  # (2)
    x.keep("y", lambda: x.factor * x.rows.reshape(len(x.rows), *given.shape[:-1], -1 if x.rows.size else x.rows.shape[-1]))


def head_backward(x: Any) -> None:
    given = x.problem.inputs["x"]
    x.input("dy", by_sequence(x.problem.cotangents["dy"]))
    x.drows = x.factor * x.dy
    x.product("back", x.drows, x.used[:, None])
    x.keep("dx", lambda: x.back.reshape(len(x.back), *given.shape))
    dtable = x.outer("sum", x.drows, x.x)
    x.keep("dtable", lambda: adjoint(getattr(x, "table as used"), (len(dtable), *x.problem.inputs["table"].shape), dtable))


_HEAD_MISTAKES: dict[str, Mistake] = {
    # forward
    "table transposed": {"table as used": to_value(swap)},
    "divided by sqrt(M)": {"factor": times(lambda x: 1 / math.sqrt(x.table.shape[-1]))},
    "times sqrt(M)": {"factor": times(lambda x: math.sqrt(x.table.shape[-1]))},
    "row 0 is 0": _is_zero(0),
    "row 0 is masked": {"y": lambda x, y: np.where(np.arange(y.shape[-1]) == 0, -np.inf, y),
                        "dy": lambda x, dy: np.where(np.arange(dy.shape[-1]) == 0, 0, dy)},
    # backward
    "dx by the transposed table": {"back": lambda x, _: x.drows @ swap(x.used)[:, None]},
    "gradient of the table transposed": {"dtable": lambda x, g: swap(g)},
    "table a mean over the tokens": {"dtable": lambda x, g: g / max(math.prod(x.dy.shape[1:3]), 1)},
    "table a mean over the batch": {"dtable": lambda x, g: g / x.dy.shape[1]},
    "table of the first sequence": {"sum": of_first_sequence("drows", "x")},
    "table of the last token": {"sum": lambda x, _: swap(x.drows[:, -1, -1:]) @ x.x[:, -1, -1:]},
    "NaN of a dead token reaches the table": {"sum": lambda x, _: plain_outer(x.drows, x.x)},
    "row 0 without a gradient": _no_gradient_of(0),
    "table without a gradient": {"dtable": zero},
    "x without a gradient": {"dx": zero},
}  # fmt: skip


def _head_candidate() -> Pair:
    def forward(x: Array, table: Array) -> Array:
        return tied_head_forward(x, table)[0]

    def backward(dy: Array, x: Array, table: Array) -> Values:
        return _head_gradients(dy, tied_head_forward(x, table)[1])

    return forward, backward


TIED_HEAD = Op(
    name="tied_head",
    outputs=("y",),
    axes={"y": "KBLV", "dx": "KBLM", "dtable": "VM"},
    reference=head_reference,
    forward=head_forward,
    backward=head_backward,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_HEAD_MISTAKES, ("table transposed", "table of the first sequence", "divided by sqrt(M)")),
    cases=HEAD_CASES,
    candidates={"tied_head": _head_candidate},
    calls=LayerCalls("forward(x, table) and backward(dy, x, table)", ()),
    space=HEAD_SPACE,
)
