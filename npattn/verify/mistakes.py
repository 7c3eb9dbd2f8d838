"""Known mistakes, and other conventions, as changes of one stage of `npattn.verify.stages`: what a diagnosis tries.

The classes are those of real bugs in published kernels. A name is what the reader of a report sees. What depends on the size of
a tile, which nobody outside a kernel knows, is tried for each size of TILES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.precision import round_to
from npattn.verify.stages import Change, exp_low, over_allowed, sum_to, swap, tanh, where

TILES = (8, 16, 32, 64, 128)

CHANGES: dict[str, Change] = {}


def add(stage: str, rows: dict[str, Callable[[Any], Any]], needs: str = "", convention: bool = False) -> None:
    """Changes of one stage by name; ``needs``: names of facts, separated by commas."""
    for name, value in rows.items():
        assert name not in CHANGES, name
        facts = frozenset(n.strip() for n in needs.split(",") if n)
        sized = any(f"{n} " in f"{name} " for n in TILES)
        CHANGES[name] = Change(name, stage, value, facts, convention, sized)


def each(*values: Any) -> Callable[[Callable[[Any], None]], None]:
    """Registers what depends on a number, for each of these."""

    def decorate(register: Callable[[Any], None]) -> None:
        for value in values:
            register(value)

    return decorate


def _memory(x: Any, name: str) -> Array:
    """What lies in memory where a view begins, read without its strides."""
    view: Array = getattr(x.problem, name)
    owner = view
    while owner.base is not None and isinstance(owner.base, np.ndarray):
        owner = owner.base
    return np.resize(owner.ravel(order="K"), view.shape).astype(x.dtype)


def _exchanged(x: Any) -> Array:
    dk: Array = x.dk
    x.dk = x.dv
    return dk


def _rows(x: Any) -> Array:
    return np.arange(x.L)[:, None]


def _roll(axis: int, by: int = 1) -> Callable[[Array], Array]:
    return lambda a: np.roll(a, by, axis)


def _spread(x: Any, a: Array) -> Array:
    return np.broadcast_to(a, x.shape)


def _flat(a: Array, L: int, S: int) -> Array:
    """The first L S elements, read as if nothing were broadcast."""
    return np.resize(a, (L, S))


def _first(a: Array, axis: int) -> Array:
    return np.take(a, [0], axis)


def _tiled(a: Array, n: int, axis: int) -> Array:
    """The first n along the axis, over and over: a tile without its offset."""
    return np.take(a, np.arange(a.shape[axis]) % min(n, a.shape[axis]), axis) if a.shape[axis] > 1 else a


def _blocks(n: int, size: int) -> Array:
    return np.arange(n) // size


# --- which keys a query may see ---------------------------------------------------------------------------------------

add("shift", {"causal=top_left": lambda x: 0, "causal=bottom_right": lambda x: x.S - x.L}, "L != S", convention=True)
add("by_causal", {
    "causal excludes the own key": lambda x: x.ahead < 0,
    "causal sees one key ahead": lambda x: x.ahead <= 1,
    "causal runs the other way": lambda x: x.ahead >= 0,
    "causal is ignored": lambda x: True,
}, "causal")  # fmt: skip
add("by_causal", {"always causal": lambda x: x.ahead <= 0})


@each(*TILES)
def _(n: int) -> None:
    add("by_causal", {
        f"causal by whole blocks of {n} keys": lambda x: np.arange(x.S) // n <= (_rows(x) + x.shift) // n,
    }, "causal")  # fmt: skip


add("shift", {
    "S - L is cut off at 0": lambda x: max(x.shift, 0),
    "queries shifted by L - S instead of S - L": lambda x: -x.shift,
    "queries shifted by one": lambda x: x.shift + 1,
}, "L != S")  # fmt: skip
add("sides", {
    "window=total": lambda x: (max(x.sides[0] - 1, 0), x.sides[1]),
}, "window", convention=True)  # fmt: skip
add("sides", {
    "window counts one key less, and of 0 none": lambda x: (x.sides[0] - 1, x.sides[1]),
    "window counts one more key": lambda x: (x.sides[0] + 1, x.sides[1]),
    "window counts one more key ahead": lambda x: (x.sides[0], x.sides[1] + 1),
    "window counts one key less ahead": lambda x: (x.sides[0], max(x.sides[1] - 1, 0)),
    "window's ends are exchanged": lambda x: x.sides[::-1],
    "window looks ahead as far as back": lambda x: (x.sides[0], x.sides[0]),
    "window has the wrong sign": lambda x: (-x.sides[0], x.sides[1]),
    "window's 0 is taken for no limit": lambda x: tuple(n or math.inf for n in x.sides),
    "window's limit ahead is ignored": lambda x: (x.sides[0], math.inf),
    "window's limit back is ignored": lambda x: (math.inf, x.sides[1]),
    "window is ignored": lambda x: (math.inf, math.inf),
}, "window")  # fmt: skip
add("by_window", {
    "window is anchored at key 0": lambda x: (x.ahead + x.shift >= -x.sides[0]) & (x.ahead + x.shift <= x.sides[1]),
    "window is anchored at the last key": lambda x: (x.ahead - (x.S - x.L - x.shift) >= -x.sides[0])
    & (x.ahead - (x.S - x.L - x.shift) <= x.sides[1]),
}, "window, L != S")  # fmt: skip
add("lengths", {
    "one key too many": lambda x: x.lengths + 1,
    "one key too few": lambda x: x.lengths - 1,
    "lengths of the first sequence for all": lambda x: x.lengths[:1],
    "length 0 is taken for no limit": lambda x: where(x.lengths == 0, x.S, x.lengths),
}, "key_lengths")  # fmt: skip
add("by_lengths", {
    "padding is taken to be on the left": lambda x: np.arange(x.S) >= x.S - x.lengths,
    "lengths count queries, not keys": lambda x: _rows(x) < x.lengths,
    "lengths are ignored": lambda x: True,
}, "key_lengths")  # fmt: skip
add("array", {"mask=drop": lambda x: ~x.array}, "mask", convention=True)
add("array", {
    "mask of the first sequence for all": lambda x: x.array[:1] if x.array.ndim == 4 else x.array,
    "mask of the first head for all": lambda x: x.array[:, :1] if x.array.ndim == 4 else x.array,
    "mask read as (L, S), its broadcast axes ignored": lambda x: _flat(x.array, x.L, x.S),
    "mask of one column is ignored": lambda x: True if x.array.shape[-1] == 1 else x.array,
    "mask of one row holds for the first row alone": lambda x: x.array | (_rows(x) > 0) if x.array.shape[-2] == 1 else x.array,
    "mask is ignored": lambda x: True,
}, "mask")  # fmt: skip
add("array", {"mask is transposed": lambda x: swap(x.array)}, "mask, L = S")
add("by_bias", {"bias is a boolean mask": lambda x: x.bias == 0}, "bias")
add("allowed", {
    "either the mask or causal is enough": lambda x: np.broadcast_to(
        (x.by_causal | x.by_array) & x.by_window & x.by_lengths & x.by_bias, x.shape),
}, "causal, mask")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("allowed", {
        f"the last {n} keys or less, a partial tile, are left out": lambda x: x.allowed & (np.arange(x.S) < x.S // n * n),
        f"a last tile of {n} keys is counted by S % {n}": lambda x: x.allowed
        & ((np.arange(x.S) < x.S - n) | (x.S % n > 0)),
        f"a last tile of {n} queries is counted by L % {n}": lambda x: x.allowed
        & ((_rows(x) < x.L - n) | (x.L % n > 0)),
        f"a tail of one key behind tiles of {n} is left out": lambda x: x.allowed
        & ((np.arange(x.S) < x.S - 1) | (x.S % n != 1)),
    })  # fmt: skip


@each(*((n, m) for n in TILES for m in TILES[1:]))
def _(tile: tuple[int, int]) -> None:
    n, m = tile
    add("allowed", {
        f"causal tiles of {n} x {m} are skipped by their first row": lambda x: x.allowed
        & (m * _blocks(x.S, m) <= n * _blocks(x.L, n)[:, None] + x.shift),
    }, "causal")  # fmt: skip
    add("allowed", {
        f"window tiles of {n} x {m} are skipped by their last row": lambda x: x.allowed
        & (m * _blocks(x.S, m) + m > n * _blocks(x.L, n)[:, None] + n + x.shift - x.sides[0]),
    }, "window")  # fmt: skip


# --- scores -------------------------------------------------------------------------------------------------------------

add("scale", {"scale=none": lambda x: 1.0 if x.given_scale is None else x.given_scale}, convention=True)
add("scale", {
    "scale is the default, whatever is given": lambda x: x.D**-0.5,
    "scale 0 is taken for the default": lambda x: x.scale or x.D**-0.5,
    "scale is sqrt(D), not 1/sqrt(D)": lambda x: 1 / x.scale if x.scale else x.scale,
    "scale is 1/D": lambda x: 1 / x.D,
    "scale is 1/sqrt(E)": lambda x: x.E**-0.5,
    "scale is applied twice": lambda x: x.scale * x.scale,
    "scale loses its sign": lambda x: abs(x.scale),
})  # fmt: skip


@each(8, 16, 32, 64, 128)
def _(n: int) -> None:
    add("scale", {f"scale of a width padded to a multiple of {n}": lambda x: (n * -(-x.D // n)) ** -0.5})


add("group", {"heads=tile": lambda x: np.arange(x.H) % x.G}, "grouped heads", convention=True)
add("group", {
    "head h reads key head h // G": lambda x: np.minimum(np.arange(x.H) // x.G, x.G - 1),
    "all heads read key head 0": lambda x: 0 * x.group,
}, "grouped heads")  # fmt: skip
add("k_group", {"keys are tiled over the heads, values are not": lambda x: np.arange(x.H) % x.G}, "grouped heads")
add("v_group", {"values are tiled over the heads, keys are not": lambda x: np.arange(x.H) % x.G}, "grouped heads")
add("q", {"q is read as if it were contiguous": lambda x: _memory(x, "q")})
add("kh", {
    "k is read as if it were contiguous": lambda x: _memory(x, "k")[..., x.group, :, :],
    "key heads are read in reverse": lambda x: x.k[..., x.group[::-1], :, :],
    "k is laid out as (B, S, H, D)": lambda x: np.ascontiguousarray(x.kh).reshape(x.B, x.S, x.H, x.D).swapaxes(1, 2),
})  # fmt: skip
add("vh", {"v is read as if it were contiguous": lambda x: _memory(x, "v")[..., x.group, :, :]})
add("capped", {"softcap=after_bias": lambda x: _cap_behind_bias(x)}, "softcap, bias", convention=True)
add("capped", {
    "softcap is ignored": lambda x: x.raw,
    "softcap comes before the scale": lambda x: _capped_first(x),
    "softcap is not multiplied back": lambda x: x.t,
    "tanh is made of exponentials that overflow": lambda x: x.softcap * where(_exp_overflows(x), np.nan, x.t),
}, "softcap")  # fmt: skip
add("biased", {
    "bias is ignored": lambda x: x.capped,
    "bias is scaled": lambda x: x.capped + x.scale * x.bias,
    "bias has the other sign": lambda x: x.capped - x.bias,
    "bias of the first sequence for all": lambda x: x.capped + _first(x.bias, 0),
    "bias of the first head for all": lambda x: x.capped + _first(x.bias, 1),
    "bias of the first row for all": lambda x: x.capped + _first(x.bias, 2),
    "bias read as (L, S), its broadcast axes ignored": lambda x: x.capped + _flat(x.bias, x.L, x.S),
    "bias indexed by (b H + h) modulo its length": lambda x: x.capped + _wrapped(x),
}, "bias")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("biased", {
        f"bias of the first {n} rows for every tile": lambda x: x.capped + _tiled(x.bias, n, 2),
        f"bias of the first {n} columns for every tile": lambda x: x.capped + _tiled(x.bias, n, 3),
    }, "bias")  # fmt: skip


@each(10, 20, 50, 80, 100)
def _(n: int) -> None:
    add("biased", {
        f"scores are cut off at +-{n}": lambda x: np.clip(x.biased, -n, n),
        f"scores are cut off at +-{n}, and their gradients there": lambda x: _cut_off(x, n),
    })  # fmt: skip


def _cut_off(x: Any, n: float) -> Array:
    x.inside = np.abs(x.biased) < n
    return np.asarray(np.clip(x.biased, -n, n))


add("scores", {"softcap=after_mask": lambda x: _cap_behind_mask(x)}, "softcap", convention=True)


def _cap_behind_bias(x: Any) -> Array:
    """Less the bias that is added to it; -inf in a bias masks wherever it stands."""
    bias = where(x.bias == -np.inf, 0, x.bias)
    x.t = tanh((x.raw + bias) / x.softcap)
    return np.asarray(x.softcap * x.t - bias)


def _cap_behind_mask(x: Any) -> Array:
    """-inf becomes -softcap: from there on all keys are seen."""
    x.t = where(x.allowed, tanh((x.raw + (0 if x.bias is None else x.bias)) / x.softcap), -1)
    x.allowed = np.ones_like(x.allowed)
    return np.asarray(x.softcap * x.t)


add("scores", {
    "the mask multiplies the scores": lambda x: x.biased * x.allowed,
    "the mask is added as 0 and 1": lambda x: x.biased + x.allowed,
    "masked scores are +inf": lambda x: where(x.allowed, x.biased, np.inf),
    "masked scores are -1e4": lambda x: where(x.allowed, x.biased, where(x.allowed.any(-1, keepdims=True), -1e4, -np.inf)),
    "masked scores are -1e4, in dead rows too": lambda x: where(x.allowed, x.biased, -1e4),
    "masked scores are -1e9": lambda x: where(x.allowed, x.biased, -1e9),
    "masked scores are finfo.min": lambda x: where(x.allowed, x.biased, float(np.finfo(x.low).min)),
    "-inf is added to masked scores, and NaN stays NaN": lambda x: x.biased + where(x.allowed, 0, -np.inf),
    "a score of exactly 0 is masked": lambda x: where(x.biased == 0, -np.inf, x.scores),
})  # fmt: skip
add("sink", {
    "sink is ignored": lambda x: None,
    "sinks are read in reverse": lambda x: x.sink[::-1],
    "sink of the first head for all": lambda x: np.repeat(x.sink[:1], x.H, 0),
    "sink is scaled": lambda x: x.scale * x.sink,
    "sink is counted twice": lambda x: x.sink + math.log(2),
}, "sink")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("e_sink", {f"sink is counted once a tile of {n} keys": lambda x: x.e_sink * -(-x.S // n)}, "sink")
    add("dsink", {f"dsink is counted once a tile of {n} keys": lambda x: x.dsink * -(-x.S // n)}, "sink")


def _exp_overflows(x: Any) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(np.isinf(np.exp((2 * x.raw / x.softcap).astype(x.low))))


def _wrapped(x: Any) -> Array:
    matrices = x.bias.reshape(-1, *x.bias.shape[-2:])
    index = np.arange(x.B * x.H).reshape(x.B, x.H) % len(matrices)
    result: Array = matrices[index]
    return result


# --- softmax ------------------------------------------------------------------------------------------------------------

add("top", {
    "no maximum is subtracted": lambda x: np.zeros_like(x.top),
    "one maximum for all rows": lambda x: np.full_like(x.top, x.scores.max(initial=-np.inf)),
    "the maximum is not below -5e4": lambda x: np.maximum(x.top, -5e4),
    "the maximum is not below 0": lambda x: np.maximum(x.top, 0),
    "the maximum is taken over masked keys too": lambda x: np.fmax.reduce(x.biased, -1, keepdims=True, initial=-np.inf),
    "the maximum is taken before a negative scale": lambda x: x.raw.min(-1, keepdims=True, initial=np.inf),
})  # fmt: skip
add("top", {"the maximum leaves the sink out": lambda x: _own_top(x)}, "sink")
add("z", {
    "the softmax runs over the sequences": lambda x: x.e.sum(0, keepdims=True),
    "the softmax runs over the heads": lambda x: x.e.sum(1, keepdims=True),
    "the softmax runs over the queries": lambda x: x.e.sum(-2, keepdims=True),
    "masked keys are counted in the sum": lambda x: np.exp(x.biased - x.top).sum(-1, keepdims=True) + x.e_sink,
})  # fmt: skip


@each(1e-5, 1e-6, 1e-8)
def _(eps: float) -> None:
    add("z", {f"{eps:g} is added to the sum": lambda x: x.z + eps})


@each(*TILES)
def _(n: int) -> None:
    add("z", {f"padding to a multiple of {n} keys is counted in the sum": lambda x: x.z + (-x.S % n) * np.exp(-x.top)})
    add("z", {f"the sum is not rescaled between tiles of {n} keys": lambda x: _online(x, n)[0]})


add("z", {"the sum is taken after dropout": lambda x: (x.e * x.drop).sum(-1, keepdims=True)}, "dropout_mask")
add("weights", {
    "dead rows are NaN (dead_out=nan)": lambda x: where(x.z == 0, np.nan, x.weights),
    "the maximum is not below 0, and 0 / 0 where all underflows": lambda x: _from_zero(x),
    "no softmax at all": lambda x: where(x.allowed, x.scores),
    "NaN weights become 0": lambda x: np.nan_to_num(x.weights),
})  # fmt: skip
add("weights", {"dead_out=mean_v": lambda x: where(x.allowed.any(-1, keepdims=True), x.weights, 1 / max(x.S, 1))}, "",
    convention=True)  # fmt: skip
add("drop", {
    "dropout is ignored": lambda x: 1.0,
    "dropout is not divided by 1 - p": lambda x: (x.drop != 0).astype(x.drop.dtype),
    "dropout mask of the first head for all": lambda x: _first(x.drop, 1),
    "dropout mask of the first sequence for all": lambda x: _first(x.drop, 0),
}, "dropout_mask")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("drop", {
        f"dropout mask of the first {n} rows for every tile": lambda x: _tiled(x.drop, n, 2),
        f"dropout mask of the first {n} columns for every tile": lambda x: _tiled(x.drop, n, 3),
    }, "dropout_mask")  # fmt: skip


add("lse", {
    "lse=log2": lambda x: x.lse / math.log(2),
    "dead_lse=+inf": lambda x: where(x.lse == -np.inf, np.inf, x.lse),
    "dead_lse=zero": lambda x: where(x.lse == -np.inf, 0.0, x.lse),
    "dead_lse=fill": lambda x: where(x.lse == -np.inf, float(np.finfo(x.low).min) * 0.7, x.lse),
}, convention=True)  # fmt: skip
add("lse", {"sink=not_in_lse": lambda x: (x.top + np.log(x.e.sum(-1, keepdims=True)))[..., 0]}, "sink", convention=True)
add("lse", {
    "lse leaves the maximum out": lambda x: np.log(x.z)[..., 0],
    "lse of the weights, not of the scores": lambda x: np.log(np.exp(x.weights).sum(-1)),
    "lse is the maximum alone": lambda x: x.top[..., 0],
    "lse is the sum, not its log": lambda x: x.z[..., 0],
    "lse of a dead row is NaN": lambda x: where(x.z[..., 0] == 0, np.nan, x.lse),
    "dead rows have lse -inf in spite of the sink": lambda x: where(x.allowed.any(-1), x.lse, -np.inf),
    "lse of scores without the scale": lambda x: _log_sum(where(x.allowed, x.biased / (x.scale or 1.0), -np.inf))[..., 0],
})  # fmt: skip
add("out", {
    "heads are merged without a transpose": lambda x: x.out.swapaxes(1, 2).reshape(x.out.shape),
    "batch and heads are exchanged": lambda x: x.out.swapaxes(0, 1).reshape(x.out.shape),
    "only the first sequence is computed": lambda x: where(np.arange(x.B)[:, None, None, None] == 0, x.out),
    "NaN in the output becomes 0": lambda x: np.nan_to_num(x.out),
    "masked weights are not normalised again": lambda x: over_allowed(
        where(x.allowed, x.e / np.exp(x.biased - x.top).sum(-1, keepdims=True)) * x.drop, x.vh, x.allowed),
})  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("out", {f"the output is not rescaled between tiles of {n} keys": lambda x: _online(x, n)[1] / x.z})


def _nan_rows(x: Any) -> Array:
    x.allowed = x.allowed | ~x.alive
    return np.asarray(where(x.alive, x.p, np.nan))


def _capped_first(x: Any) -> Array:
    x.t = np.tanh(x.raw / x.scale / x.softcap)
    return np.asarray(x.scale * x.softcap * x.t)


def _from_zero(x: Any) -> Array:
    x.top = np.maximum(x.top, 0)
    x.e = exp_low(x, x.scores - x.top)
    x.z = x.e.sum(-1, keepdims=True) + (0.0 if x.sink is None else exp_low(x, x.sink - x.top))
    return np.asarray(where(x.allowed, x.e / x.z))


def _log_sum(s: Array) -> Array:
    """log of the sum of exp, each less its maximum: nothing overflows."""
    top = s.max(-1, keepdims=True, initial=-np.inf)
    top = where(np.isfinite(top), top, 0.0)
    return np.asarray(top + np.log(np.exp(s - top).sum(-1, keepdims=True)))


def _own_top(x: Any) -> Array:
    top = x.scores.max(-1, keepdims=True, initial=-np.inf)
    return np.asarray(where(top == -np.inf, 0.0, top))


def _online(x: Any, n: int) -> tuple[Array, Array]:
    """Sum and output of an online softmax over tiles of n keys, each tile as it stands at its own maximum."""
    total, out, top = np.zeros_like(x.top), np.zeros((*x.shape[:-1], x.E), x.dtype), np.full_like(x.top, -np.inf)
    for j in range(0, x.S, n):
        tile = slice(j, j + n)
        top = np.maximum(top, x.scores[..., tile].max(-1, keepdims=True))
        e = np.exp(x.scores[..., tile] - where(top == -np.inf, 0, top))
        total = total + e.sum(-1, keepdims=True)
        drop = x.drop if isinstance(x.drop, float) else x.drop[..., tile]
        out = out + (e * drop) @ x.vh[..., tile, :]
    return total, out


# --- backward -------------------------------------------------------------------------------------------------------------


@each((8, "bfloat16"), (11, "float16"))
def _(low: tuple[int, str]) -> None:
    bits, storage = low
    add("kept_lse", {f"lse rounded to {bits} bits before the backward": lambda x: round_to(x.kept_lse, storage)})
    add("kept_out", {f"the output rounded to {bits} bits before Delta": lambda x: round_to(x.kept_out, storage)})


add("dl", {"dlse=ignored": lambda x: 0.0}, "dlse", convention=True)
add("dl", {
    "dlse has the other sign": lambda x: -x.dl,
    "dlse is taken in base 2": lambda x: x.dl / math.log(2),
    "dlse is multiplied by ln 2": lambda x: x.dl * math.log(2),
    "dlse is multiplied by the scale": lambda x: x.dl * x.scale,
    "dlse of the first head of a group for all": lambda x: x.dl[:, np.arange(x.H) // (x.H // x.G) * (x.H // x.G)],
}, "dlse")  # fmt: skip
add("ds", {
    "dlse is not multiplied by the weight": lambda x: where(x.allowed, x.p * (x.dp - x.delta) + x.dl),
    "dlse is multiplied by dropout": lambda x: where(x.allowed, x.p * (x.dp - x.delta + x.dl * x.drop)),
}, "dlse")  # fmt: skip
add("ds", {
    "dlse flows through weights without the sink": lambda x: where(x.allowed, x.p * (x.dp - x.delta)
    + x.dl * x.p / where(x.p.sum(-1, keepdims=True) == 0, 1, x.p.sum(-1, keepdims=True))),
}, "dlse, sink")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("dl", {
        f"dlse of the first {n} rows for every tile": lambda x: _tiled(x.dl, n, 2),
        f"dlse is added in the first tile of {n} keys alone": lambda x: x.dl * (np.arange(x.S) < n),
    }, "dlse")  # fmt: skip


add("do", {
    "dout is read as if it were contiguous": lambda x: where(x.alive, _memory(x, "dout")),
})  # fmt: skip
add("p", {
    "weights are shifted by the maximum, not by lse": lambda x: np.exp(x.scores - x.top),
    "weights below 1e-4 are taken for 0": lambda x: where(x.p < 1e-4, 0, x.p),
    "dead rows are NaN in the backward": lambda x: where(x.alive, x.p, np.nan),
    "dead rows are NaN in the backward, and in dq and dk": lambda x: _nan_rows(x),
})  # fmt: skip
add("p", {"weights of the backward leave the sink out": lambda x: np.exp(
    x.scores - np.log(np.exp(x.scores - x.top).sum(-1, keepdims=True)) - x.top)}, "sink")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("p", {f"weights are normalised in each tile of {n} keys": lambda x: _tilewise(x, n)})


add("dvh", {
    "dead_grad=leak": lambda x: x.dvh
    + where(x.allowed.any(-1, keepdims=True), 0, x.dout).sum(-2, keepdims=True) / max(x.S, 1),
}, convention=True)  # fmt: skip
add("dvh", {
    "dv is made of weights before dropout": lambda x: swap(x.p) @ x.do,
    "dropout is applied twice in dv": lambda x: swap(x.dropped * x.drop) @ x.do,
    "dv is made of the mean of dout": lambda x: swap(x.dropped) @ np.broadcast_to(x.do.mean(-2, keepdims=True), x.do.shape),
    "dv of the neighbouring head": lambda x: _roll(-3)(x.dvh),
    "0 / 0 where dout is 0": lambda x: where(x.do.any(), x.dvh, np.nan),
})  # fmt: skip
add("dp", {
    "dropout is applied twice to dp": lambda x: x.dp * x.drop,
    "dp knows no dropout": lambda x: where(x.allowed, x.do @ swap(x.vh)),
}, "dropout_mask")  # fmt: skip


@each(1, 10, 100)
def _(n: int) -> None:
    add("dp", {f"dp is cut off at {n}": lambda x: np.clip(x.dp, -n, n)})


add("delta", {
    "Delta is missing": lambda x: 0 * x.delta,
    "Delta is a mean over E": lambda x: x.delta / max(x.E, 1),
    "Delta runs over the queries": lambda x: (x.p * x.dp).sum(-2, keepdims=True),
    "Delta of the first D columns of the output": lambda x: (x.do * x.kept_out)[..., : x.D].sum(-1, keepdims=True),
    "Delta of the next row": lambda x: _roll(-2, -1)(x.delta),
    "Delta of the row before": lambda x: _roll(-2)(x.delta),
    "Delta of the first head for all": lambda x: np.repeat(x.delta[:, :1], x.H, 1),
    "Delta has the other sign": lambda x: -x.delta,
    "Delta is the square of dout": lambda x: (x.do * x.do).sum(-1, keepdims=True),
    "Delta counts masked values": lambda x: (x.p * (x.do @ swap(x.vh)) * x.drop).sum(-1, keepdims=True),
    "Delta is made of the weights of the backward": lambda x: (x.p * x.dp).sum(-1, keepdims=True),
})  # fmt: skip
add("delta", {
    "Delta of the output before dropout": lambda x: (x.do * over_allowed(x.p, x.vh, x.allowed)).sum(-1, keepdims=True),
}, "dropout_mask")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("delta", {
        f"Delta of the first {n} rows for every tile": lambda x: _tiled(x.delta, n, 2),
        f"Delta of each tile of {n} keys alone": lambda x: _sum_by_tile(x.p * x.dp, n),
    })  # fmt: skip


add("ds", {
    "Delta is not multiplied by the weight": lambda x: where(x.allowed, x.p * x.dp - x.delta),
    "nothing is done where dout is 0": lambda x: x.ds if x.do.any() else 0 * x.ds,
    "the weight is forgotten in the softmax backward": lambda x: x.dp - x.delta,
    "the softmax backward uses weights after dropout": lambda x: where(x.allowed, x.dropped * (x.dp - x.delta + x.dl)),
    "masked pairs keep their gradient": lambda x: x.p * (x.dp - x.delta + x.dl),
})  # fmt: skip
add("dsink", {
    "dsink has the other sign": lambda x: -x.dsink,
    "dsink of the first sequence alone": lambda x: _sink_sum(x, x.sink_rows[:1]),
    "dsink of the first query alone": lambda x: _sink_sum(x, x.sink_rows[..., :1, :]),
    "dsink is a mean": lambda x: x.dsink / (x.B * max(x.L, 1)),
    "dsink is summed over the heads": lambda x: np.full_like(x.dsink, x.dsink.sum()),
    "dsink leaves dead rows out": lambda x: _sink_sum(x, where(x.allowed.any(-1, keepdims=True), x.sink_rows)),
    "Delta is missing in dsink": lambda x: _sink_sum(x, x.p_sink * (x.dl + 0 * x.delta)),
    "dlse is missing in dsink": lambda x: _sink_sum(x, -x.p_sink * x.delta),
    "dsink lacks the sink's weight": lambda x: _sink_sum(x, x.dl - x.delta),
    "the sink's weight in dsink is that of a sum without it": lambda x: _sink_sum(
        x, np.exp(x.sink - _log_sum(x.scores)) * (x.dl - x.delta)),
}, "sink")  # fmt: skip
add("dbias", {
    "dbias of the first sequence alone": lambda x: _bias_sum(x, x.ds, "first"),
    "dbias of the first row alone": lambda x: _bias_sum(x, x.ds[..., :1, :]),
    "dbias of the last row alone": lambda x: _bias_sum(x, x.ds[..., -1:, :]),
    "dbias is a mean": lambda x: x.dbias * (x.dbias.size / x.ds.size),
    "dbias is multiplied by the scale": lambda x: x.scale * x.dbias,
    "dbias is multiplied by the slope of the softcap": lambda x: sum_to(where(x.allowed, x.ds * _slope(x)), x.given_bias),
    "Delta is missing in dbias": lambda x: sum_to(where(x.allowed, x.p * x.dp), x.given_bias),
    "dbias is multiplied by dropout": lambda x: sum_to(where(x.allowed, x.ds * x.drop), x.given_bias),
    "dbias is one column late": lambda x: sum_to(_roll(-1)(x.ds), x.given_bias),
}, "bias")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("dbias", {f"dbias is one column late in each tile of {n} keys": lambda x: sum_to(
        _roll_in_tiles(x.ds, n), x.given_bias)}, "bias")  # fmt: skip


add("slope", {
    "the derivative of the softcap is missing": lambda x: 1.0,
    "the derivative of the softcap is 1 - t": lambda x: 1 - x.t,
    "the derivative of the softcap takes the tanh of the capped score": lambda x: 1 - np.square(np.tanh(x.t)),
    "the derivative of the softcap is divided by the cap": lambda x: x.slope / x.softcap,
    "the derivative of the softcap is 1 - (s / cap)^2 of the raw score": lambda x: 1 - np.square(x.raw / x.softcap),
    "the derivative of the softcap is taken at the score with its bias": lambda x: 1 - np.square(x.scores / x.softcap),
}, "softcap")  # fmt: skip
add("dcap", {"neither weight nor mask in the softmax backward": lambda x: (x.dp - x.delta) * x.slope})
add("dq", {
    "dq lacks the scale": lambda x: x.dq / (x.scale or 1.0),
    "dq has the scale twice": lambda x: x.scale * x.dq,
    "dq has the default scale": lambda x: x.dq / (x.scale or 1.0) * x.D**-0.5,
    "dq of rows from S on is missing": lambda x: where(_rows(x) < x.S, x.dq),
    "dq is made of the keys of the first sequence": lambda x: x.scale * (x.dcap @ x.kh[:1]),
    "dq of the first head for all": lambda x: np.repeat(x.dq[:, :1], x.H, 1),
})  # fmt: skip
add("dkh", {
    "dk lacks the scale": lambda x: x.dkh / (x.scale or 1.0),
    "dk has the scale twice": lambda x: x.scale * x.dkh,
    "dk has the default scale": lambda x: x.dkh / (x.scale or 1.0) * x.D**-0.5,
    "dk of keys from L on is missing": lambda x: where(np.arange(x.S)[:, None] < x.L, x.dkh),
    "dk of the neighbouring head": lambda x: _roll(-3)(x.dkh),
    "dk lacks its mean over D": lambda x: x.dkh - x.dkh.mean(-1, keepdims=True),
})  # fmt: skip
add("dkh", {"dk is made of ds, not of its transpose": lambda x: x.scale * (x.dcap @ x.q)}, "L = S")


@each(("dk", "dkh"), ("dv", "dvh"))
def _(names: tuple[str, str]) -> None:
    d, h = names
    add(d, {
        f"{d} of the first head of a group alone": lambda x: _of_group(getattr(x, h), x)[..., 0, :, :],
        f"{d} of the last head of a group alone": lambda x: _of_group(getattr(x, h), x)[..., -1, :, :],
        f"{d} is the mean of a group": lambda x: _of_group(getattr(x, h), x).mean(-3),
        f"{d} sums heads g, g + G, ..., not those of its group": lambda x: getattr(x, h).reshape(
            x.B, x.H // x.G, x.G, *getattr(x, h).shape[-2:]).sum(1),
    }, "grouped heads")  # fmt: skip
    add(d, {f"{d} is summed over the batch": lambda x: np.broadcast_to(getattr(x, d).sum(0), getattr(x, d).shape)})


add("dv", {"dk and dv are exchanged": lambda x: _exchanged(x), "dv has k's width": lambda x: where(np.arange(x.E) < x.D, x.dv)})


@each(*TILES)
def _(n: int) -> None:
    add("dvh", {f"dv of the last tile of {n} queries alone": lambda x: swap(x.dropped[..., _last(x.L, n), :])
                @ x.do[..., _last(x.L, n), :]})  # fmt: skip
    add("dkh", {f"dk of the last tile of {n} queries alone": lambda x: x.scale
                * (swap(x.dcap[..., _last(x.L, n), :]) @ x.q[..., _last(x.L, n), :])})  # fmt: skip
    add("dq", {
        f"dq of the last tile of {n} keys alone": lambda x: x.scale
        * (x.dcap[..., _last(x.S, n)] @ x.kh[..., _last(x.S, n), :]),
        f"dq of the last tile of {n} queries is written too early": lambda x: _written_early(x.dq, n),
    })  # fmt: skip
    add("allowed", {
        f"the last {n} queries or less, a partial tile, are left out": lambda x: x.allowed & (_rows(x) < x.L // n * n),
    })  # fmt: skip


def _last(size: int, n: int) -> slice:
    """The last tile of n, perhaps cut short."""
    return slice((size - 1) // n * n, size)


def _tilewise(x: Any, n: int) -> Array:
    return np.asarray(where(x.allowed, x.p / _sum_by_tile(x.p, n)))


def _sum_by_tile(terms: Array, n: int) -> Array:
    """The sum of each tile of n keys, at each of its keys."""
    starts = np.arange(0, terms.shape[-1], n)
    sums = np.add.reduceat(terms, starts, -1) if len(starts) else terms
    result: Array = sums[..., _blocks(terms.shape[-1], n)]
    return result


def _roll_in_tiles(terms: Array, n: int) -> Array:
    out = np.empty_like(terms)
    for j in range(0, terms.shape[-1], n):
        tile = terms[..., j : j + n]
        out[..., j : j + n] = np.roll(tile, 1, -1)
        if tile.shape[-1] < n:  # filled up with zeros, of which the last comes first
            out[..., j] = 0
    return out


def _written_early(dq: Array, n: int) -> Array:
    """The last tile, filled up with zeros, put where it ends with the array."""
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


# 0 times NaN: products whose weight 0 does not keep out what is masked.
UNPROTECTED = (
    Change("masked_nan=poisons", "out", lambda x: x.dropped @ x.vh),
    Change("masked_nan=poisons", "dvh", lambda x: swap(x.dropped) @ x.dout),
    Change("masked_nan=poisons", "dq", lambda x: x.scale * (x.dcap @ x.kh)),
    Change("masked_nan=poisons", "dkh", lambda x: x.scale * (swap(x.dcap) @ x.q)),
)
# What is still said where nothing but the places of NaN and inf differ.
OF_NAN = frozenset(
    name for name in CHANGES
    if "NaN" in name or name in ("0 / 0 where dout is 0", "dead_lse=+inf", "masked scores are +inf", "dead_grad=leak")
)  # fmt: skip
# What may give NaN everywhere where no input is NaN.
MAKES_NAN = OF_NAN | {name for name in CHANGES if "maximum" in name or "overflow" in name}

# What else a convention changes in the backward, where all of it follows the convention.
GOES_WITH: dict[str, tuple[str, ...]] = {
    "lse=log2": ("dlse is taken in base 2",),
    "softcap=after_bias": ("dbias is multiplied by the slope of the softcap",),
    "softcap=after_mask": ("dbias is multiplied by the slope of the softcap",),
    "sink=not_in_lse": ("dlse flows through weights without the sink", "dlse is missing in dsink"),
}
