"""Known mistakes of the backward of attention, and other conventions, from (7) to (1)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.op import Change
from npattn.verify.ops.attention.changes import (
    CHANGES,
    MAKES,
    MOVES,
    TILES,
    add,
    each,
    log_sum,
    memory,
    roll,
    rows_of,
    tile_of,
    tiled,
)  # fmt: skip
from npattn.verify.ops.attention.equations import over_allowed, sum_to, swap, where
from npattn.verify.precision import round_to


@each((8, "bfloat16"), (11, "float16"))
def _(low: tuple[int, str]) -> None:
    bits, storage = low
    of_lse, of_out = f"lse rounded to {bits} bits before the backward", f"the output rounded to {bits} bits before Delta"
    add("kept_lse", {of_lse: lambda x, _: round_to(x.kept_lse, storage)}, rounds=True)
    add("kept_out", {of_out: lambda x, _: round_to(x.kept_out, storage)}, rounds=True)


add("dl", {"dlse=ignored": lambda x, _: 0.0}, "dlse", convention=True)
add("dl", {
    "dlse has the other sign": lambda x, _: -x.dl,
    "dlse is taken in base 2": lambda x, _: x.dl / math.log(2),
    "dlse is multiplied by ln 2": lambda x, _: x.dl * math.log(2),
    "dlse is multiplied by the scale": lambda x, _: x.dl * x.scale,
    "dlse of the first head of a group for all": lambda x, _: x.dl[:, np.arange(x.H) // (x.H // x.G) * (x.H // x.G)],
}, "dlse")  # fmt: skip
add("ds", {
    "dlse is not multiplied by the weight": lambda x, _: where(x.allowed, x.p * (x.dp - x.delta) + x.dl),
    "dlse is multiplied by dropout": lambda x, _: where(x.allowed, x.p * (x.dp - x.delta + x.dl * x.drop)),
}, "dlse")  # fmt: skip
add("ds", {
    "dlse flows through weights without the sink": lambda x, _: where(x.allowed, x.p * (x.dp - x.delta)
    + x.dl * x.p / where(x.p.sum(-1, keepdims=True) == 0, 1, x.p.sum(-1, keepdims=True))),
}, "dlse, sink")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("dl", {
        f"dlse of the first {n} rows for every tile": lambda x, _: tiled(x.dl, n, 2),
        f"dlse is added in the first tile of {n} keys alone": lambda x, _: x.dl * (np.arange(x.S) < n),
    }, "dlse", tile=n)  # fmt: skip


add("do", {
    "dout is read as if it were contiguous": lambda x, _: where(x.alive, memory(x, "dout")),
})  # fmt: skip
add("p", {
    "weights are shifted by the maximum, not by lse": (lambda x, _: np.exp(x.scores - x.top), MAKES),
    "weights below 1e-4 are taken for 0": lambda x, _: where(x.p < 1e-4, 0, x.p),
    "dead rows are NaN in the backward": (lambda x, _: where(x.alive, x.p, np.nan), MOVES),
    "dead rows are NaN in the backward, and in dq and dk": (lambda x, _: _nan_rows(x), MOVES),
})  # fmt: skip
add("p", {"weights of the backward leave the sink out": lambda x, _: np.exp(
    x.scores - np.log(np.exp(x.scores - x.top).sum(-1, keepdims=True)) - x.top)}, "sink")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("p", {f"weights are normalised in each tile of {n} keys": lambda x, _: _tilewise(x, n)}, tile=n)


add("dvh", {
    "dead_grad=leak": (lambda x, _: x.dvh
        + where(x.allowed.any(-1, keepdims=True), 0, x.dout).sum(-2, keepdims=True) / max(x.S, 1), MOVES),
}, convention=True)  # fmt: skip
add("dvh", {
    "dv is made of weights before dropout": lambda x, _: swap(x.p) @ x.do,
    "dropout is applied twice in dv": lambda x, _: swap(x.dropped * x.drop) @ x.do,
    "dv is made of the mean of dout": lambda x, _: swap(x.dropped) @ np.broadcast_to(x.do.mean(-2, keepdims=True), x.do.shape),
    "dv of the neighbouring head": lambda x, _: roll(-3)(x.dvh),
    "0 / 0 where dout is 0": (lambda x, _: where(x.do.any(), x.dvh, np.nan), MOVES),
})  # fmt: skip
add("dp", {
    "dropout is applied twice to dp": lambda x, _: x.dp * x.drop,
    "dp knows no dropout": lambda x, _: where(x.allowed, x.do @ swap(x.vh)),
}, "dropout_mask")  # fmt: skip


@each(1, 10, 100)
def _(n: int) -> None:
    add("dp", {f"dp is cut off at {n}": lambda x, _: np.clip(x.dp, -n, n)})


add("delta", {
    "Delta is missing": lambda x, _: 0 * x.delta,
    "Delta is a mean over E": lambda x, _: x.delta / max(x.E, 1),
    "Delta runs over the queries": lambda x, _: (x.p * x.dp).sum(-2, keepdims=True),
    "Delta of the first D columns of the output": lambda x, _: (x.do * x.kept_out)[..., : x.D].sum(-1, keepdims=True),
    "Delta of the next row": lambda x, _: roll(-2, -1)(x.delta),
    "Delta of the row before": lambda x, _: roll(-2)(x.delta),
    "Delta of the first head for all": lambda x, _: np.repeat(x.delta[:, :1], x.H, 1),
    "Delta has the other sign": lambda x, _: -x.delta,
    "Delta is the square of dout": lambda x, _: (x.do * x.do).sum(-1, keepdims=True),
    "Delta counts masked values": lambda x, _: (x.p * (x.do @ swap(x.vh)) * x.drop).sum(-1, keepdims=True),
    "Delta is made of the weights of the backward": lambda x, _: (x.p * x.dp).sum(-1, keepdims=True),
})  # fmt: skip
add("delta", {
    "Delta of the output before dropout": lambda x, _: (x.do * over_allowed(x.p, x.vh, x.allowed)).sum(-1, keepdims=True),
}, "dropout_mask")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("delta", {
        f"Delta of the first {n} rows for every tile": lambda x, _: tiled(x.delta, n, 2),
        f"Delta of each tile of {n} keys alone": lambda x, _: _sum_by_tile(x.p * x.dp, n),
    }, tile=n)  # fmt: skip


add("ds", {
    "Delta is not multiplied by the weight": lambda x, _: where(x.allowed, x.p * x.dp - x.delta),
    "nothing is done where dout is 0": lambda x, _: x.ds if x.do.any() else 0 * x.ds,
    "the weight is forgotten in the softmax backward": lambda x, _: x.dp - x.delta,
    "the softmax backward uses weights after dropout": lambda x, _: where(x.allowed, x.dropped * (x.dp - x.delta + x.dl)),
})  # fmt: skip
add("dsink", {
    "dsink has the other sign": lambda x, _: -x.dsink,
    "dsink of the first sequence alone": lambda x, _: _sink_sum(x, x.sink_rows[:1]),
    "dsink of the first query alone": lambda x, _: _sink_sum(x, x.sink_rows[..., :1, :]),
    "dsink is a mean": lambda x, _: x.dsink / (x.B * max(x.L, 1)),
    "dsink is summed over the heads": lambda x, _: np.full_like(x.dsink, x.dsink.sum()),
    "dsink leaves dead rows out": lambda x, _: _sink_sum(x, where(x.allowed.any(-1, keepdims=True), x.sink_rows)),
    "Delta is missing in dsink": lambda x, _: _sink_sum(x, x.p_sink * (x.dl + 0 * x.delta)),
    "dlse is missing in dsink": lambda x, _: _sink_sum(x, -x.p_sink * x.delta),
    "dsink lacks the sink's weight": lambda x, _: _sink_sum(x, x.dl - x.delta),
    "the sink's weight in dsink is that of a sum without it": lambda x, _: _sink_sum(
        x, np.exp(x.sink - log_sum(x.scores)) * (x.dl - x.delta)),
}, "sink")  # fmt: skip
add("dbias", {
    "dbias of the first sequence alone": lambda x, _: _bias_sum(x, x.ds, "first"),
    "dbias of the first row alone": lambda x, _: _bias_sum(x, x.ds[..., :1, :]),
    "dbias of the last row alone": lambda x, _: _bias_sum(x, x.ds[..., -1:, :]),
    "dbias is a mean": lambda x, _: x.dbias * (x.dbias.size / x.ds.size),
    "dbias is multiplied by the scale": lambda x, _: x.scale * x.dbias,
    "dbias is multiplied by the slope of the softcap": lambda x, _: sum_to(where(x.allowed, x.ds * _slope(x)), x.given_bias),
    "Delta is missing in dbias": lambda x, _: sum_to(where(x.allowed, x.p * x.dp), x.given_bias),
    "dbias is multiplied by dropout": lambda x, _: sum_to(where(x.allowed, x.ds * x.drop), x.given_bias),
    "dbias is one column late": lambda x, _: sum_to(roll(-1)(x.ds), x.given_bias),
}, "bias")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("dbias", {f"dbias is one column late in each tile of {n} keys": lambda x, _: sum_to(
        _roll_in_tiles(x.ds, n), x.given_bias)}, "bias", tile=n)  # fmt: skip


add("slope", {
    "the derivative of the softcap is missing": lambda x, _: 1.0,
    "the derivative of the softcap is 1 - t": lambda x, _: 1 - x.t,
    "the derivative of the softcap takes the tanh of the capped score": lambda x, _: 1 - np.square(np.tanh(x.t)),
    "the derivative of the softcap is divided by the cap": lambda x, _: x.slope / x.softcap,
    "the derivative of the softcap is 1 - (s / cap)^2 of the raw score": lambda x, _: 1 - np.square(x.raw / x.softcap),
    "the derivative of the softcap is taken at the score with its bias": lambda x, _: 1 - np.square(x.scores / x.softcap),
}, "softcap")  # fmt: skip
add("dcap", {"neither weight nor mask in the softmax backward": lambda x, _: (x.dp - x.delta) * x.slope})
add("dq", {
    "dq lacks the scale": lambda x, _: x.dq / (x.scale or 1.0),
    "dq has the scale twice": lambda x, _: x.scale * x.dq,
    "dq has the default scale": lambda x, _: x.dq / (x.scale or 1.0) * x.D**-0.5,
    "dq of rows from S on is missing": lambda x, _: where(rows_of(x) < x.S, x.dq),
    "dq is made of the keys of the first sequence": lambda x, _: x.scale * (x.dcap @ x.kh[:1]),
    "dq of the first head for all": lambda x, _: np.repeat(x.dq[:, :1], x.H, 1),
})  # fmt: skip
add("dkh", {
    "dk lacks the scale": lambda x, _: x.dkh / (x.scale or 1.0),
    "dk has the scale twice": lambda x, _: x.scale * x.dkh,
    "dk has the default scale": lambda x, _: x.dkh / (x.scale or 1.0) * x.D**-0.5,
    "dk of keys from L on is missing": lambda x, _: where(np.arange(x.S)[:, None] < x.L, x.dkh),
    "dk of the neighbouring head": lambda x, _: roll(-3)(x.dkh),
    "dk lacks its mean over D": lambda x, _: x.dkh - x.dkh.mean(-1, keepdims=True),
})  # fmt: skip
add("dkh", {"dk is made of ds, not of its transpose": lambda x, _: x.scale * (x.dcap @ x.q)}, "L = S")


@each(("dk", "dkh"), ("dv", "dvh"))
def _(names: tuple[str, str]) -> None:
    d, h = names
    add(d, {
        f"{d} of the first head of a group alone": lambda x, _: _of_group(getattr(x, h), x)[..., 0, :, :],
        f"{d} of the last head of a group alone": lambda x, _: _of_group(getattr(x, h), x)[..., -1, :, :],
        f"{d} is the mean of a group": lambda x, _: _of_group(getattr(x, h), x).mean(-3),
        f"{d} sums heads g, g + G, ..., not those of its group": lambda x, _: getattr(x, h).reshape(
            x.B, x.H // x.G, x.G, *getattr(x, h).shape[-2:]).sum(1),
    }, "grouped heads")  # fmt: skip
    add(d, {f"{d} is summed over the batch": lambda x, _: np.broadcast_to(getattr(x, d).sum(0), getattr(x, d).shape)})


add("dv", {
    "dk and dv are exchanged": lambda x, _: _exchanged(x),
    "dv has k's width": lambda x, _: where(np.arange(x.E) < x.D, x.dv),
})  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("dvh", {f"dv of the last tile of {n} queries alone": lambda x, _: swap(x.dropped[..., _last(x.L, n), :])
                @ x.do[..., _last(x.L, n), :]}, tile=n)  # fmt: skip
    add("dkh", {f"dk of the last tile of {n} queries alone": lambda x, _: x.scale
                * (swap(x.dcap[..., _last(x.L, n), :]) @ x.q[..., _last(x.L, n), :])}, tile=n)  # fmt: skip
    add("dq", {
        f"dq of the last tile of {n} keys alone": lambda x, _: x.scale
        * (x.dcap[..., _last(x.S, n)] @ x.kh[..., _last(x.S, n), :]),
        f"dq of the last tile of {n} queries is written too early": lambda x, _: _written_early(x.dq, n),
    }, tile=n)  # fmt: skip
    first = f"keys and values of the first {n} for every tile, where the weights are right"
    CHANGES[first] = Change(first, {
        "dp": lambda x, _: where(x.allowed, x.do @ swap(tiled(x.vh, n, 2))) * x.drop,
        "dq": lambda x, _: x.scale * over_allowed(x.dcap, tiled(x.kh, n, 2), x.allowed),
    }, tile=n)  # fmt: skip
    add("allowed", {
        f"the last {n} queries or less, a partial tile, are left out": lambda x, _: x.allowed & (rows_of(x) < x.L // n * n),
    }, tile=n)  # fmt: skip


def _last(size: int, n: int) -> slice:
    """The last tile of n, which may be shorter."""
    return slice((size - 1) // n * n, size)


def _tilewise(x: Any, n: int) -> Array:
    return np.asarray(where(x.allowed, x.p / _sum_by_tile(x.p, n)))


def _sum_by_tile(terms: Array, n: int) -> Array:
    """Each term is replaced by the sum of its tile of n keys."""
    starts = np.arange(0, terms.shape[-1], n)
    sums = np.add.reduceat(terms, starts, -1) if len(starts) else terms
    result: Array = sums[..., tile_of(terms.shape[-1], n)]
    return result


def _roll_in_tiles(terms: Array, n: int) -> Array:
    out = np.empty_like(terms)
    for j in range(0, terms.shape[-1], n):
        tile = terms[..., j : j + n]
        out[..., j : j + n] = np.roll(tile, 1, -1)
        if tile.shape[-1] < n:  # it is padded with zeros, and the last of them moves to the front
            out[..., j] = 0
    return out


def _written_early(dq: Array, n: int) -> Array:
    """The last tile, padded with zeros, is written so early that its padding still fits into the array."""
    L = dq.shape[-2]
    start = (L - 1) // n * n
    if n > L or start == L - n:
        return dq
    out: Array = dq.copy()
    out[..., start:, :] = 0
    part = dq[..., start:, :]
    out[..., L - n : L - n + part.shape[-2], :] += part
    return out


def _sink_sum(x: Any, rows: Array) -> Array:
    wide = np.broadcast_to(rows, (rows.shape[0], x.H, rows.shape[-2], 1))
    result: Array = wide.sum((0, 2, 3))
    return result


def _slope(x: Any) -> Any:
    return 1.0 if x.softcap is None else 1 - x.t * x.t


def _bias_sum(x: Any, terms: Array, which: str = "") -> Array:
    full = (1,) * (terms.ndim - x.given_bias.ndim) + x.given_bias.shape
    if which == "first" and full[0] == 1:
        terms = terms[:1]
    if terms.shape[-2] == 1 and full[-2] != 1:
        return np.asarray(x.dbias)
    return sum_to(terms, x.given_bias)


def _of_group(terms: Array, x: Any) -> Array:
    return terms.reshape(x.B, x.G, x.H // x.G, *terms.shape[-2:])


def _exchanged(x: Any) -> Array:
    dk: Array = x.dk
    x.dk = x.dv
    return dk


def _nan_rows(x: Any) -> Array:
    x.allowed = x.allowed | ~x.alive
    return np.asarray(where(x.alive, x.p, np.nan))
