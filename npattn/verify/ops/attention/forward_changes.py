"""Known mistakes of the forward of attention, and other conventions: the masks, the scores, the softmax, the output."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.ops.attention.changes import (
    MAKES,
    MOVES,
    TILES,
    add,
    each,
    first_of,
    log_sum,
    memory,
    read_flat,
    rows_of,
    tile_of,
    tiled,
)  # fmt: skip
from npattn.verify.ops.attention.equations import exp_low, over_allowed, swap, tanh, where

# --- which keys a query may see ---------------------------------------------------------------------------------------

add("shift", {"causal=top_left": lambda x, _: 0, "causal=bottom_right": lambda x, _: x.S - x.L}, "L != S", convention=True)
add("by_causal", {
    "causal excludes the own key": lambda x, _: x.ahead < 0,
    "causal sees one key ahead": lambda x, _: x.ahead <= 1,
    "causal runs the other way": lambda x, _: x.ahead >= 0,
    "causal is ignored": lambda x, _: True,
}, "causal")  # fmt: skip
add("by_causal", {"always causal": lambda x, _: x.ahead <= 0})


@each(*TILES)
def _(n: int) -> None:
    add("by_causal", {
        f"causal by whole blocks of {n} keys": lambda x, _: np.arange(x.S) // n <= (rows_of(x) + x.shift) // n,
    }, "causal", tile=n)  # fmt: skip


add("shift", {
    "S - L is cut off at 0": lambda x, _: max(x.shift, 0),
    "queries shifted by L - S instead of S - L": lambda x, _: -x.shift,
    "queries shifted by one": lambda x, _: x.shift + 1,
}, "L != S")  # fmt: skip
add("sides", {
    "window=total": lambda x, _: (max(x.sides[0] - 1, 0), x.sides[1]),
}, "window", convention=True)  # fmt: skip
add("sides", {
    "window counts one key less, and of 0 none": lambda x, _: (x.sides[0] - 1, x.sides[1]),
    "window counts one more key": lambda x, _: (x.sides[0] + 1, x.sides[1]),
    "window counts one more key ahead": lambda x, _: (x.sides[0], x.sides[1] + 1),
    "window counts one key less ahead": lambda x, _: (x.sides[0], max(x.sides[1] - 1, 0)),
    "window's ends are exchanged": lambda x, _: x.sides[::-1],
    "window looks ahead as far as back": lambda x, _: (x.sides[0], x.sides[0]),
    "window has the wrong sign": lambda x, _: (-x.sides[0], x.sides[1]),
    "window's 0 is taken for no limit": lambda x, _: tuple(n or math.inf for n in x.sides),
    "window's limit ahead is ignored": lambda x, _: (x.sides[0], math.inf),
    "window's limit back is ignored": lambda x, _: (math.inf, x.sides[1]),
    "window is ignored": lambda x, _: (math.inf, math.inf),
}, "window")  # fmt: skip
add("by_window", {
    "window is anchored at key 0": lambda x, _: (x.ahead + x.shift >= -x.sides[0]) & (x.ahead + x.shift <= x.sides[1]),
    "window is anchored at the last key": lambda x, _: (x.ahead - (x.S - x.L - x.shift) >= -x.sides[0])
    & (x.ahead - (x.S - x.L - x.shift) <= x.sides[1]),
}, "window, L != S")  # fmt: skip
add("lengths", {
    "one key too many": lambda x, _: x.lengths + 1,
    "one key too few": lambda x, _: x.lengths - 1,
    "lengths of the first sequence for all": lambda x, _: x.lengths[:1],
    "length 0 is taken for no limit": lambda x, _: where(x.lengths == 0, x.S, x.lengths),
}, "key_lengths")  # fmt: skip
add("by_lengths", {
    "padding is taken to be on the left": lambda x, _: np.arange(x.S) >= x.S - x.lengths,
    "lengths count queries, not keys": lambda x, _: rows_of(x) < x.lengths,
    "lengths are ignored": lambda x, _: True,
}, "key_lengths")  # fmt: skip
add("array", {"mask=drop": lambda x, _: ~x.array}, "mask", convention=True)
add("array", {
    "mask of the first sequence for all": lambda x, _: x.array[:1] if x.array.ndim == 4 else x.array,
    "mask of the first head for all": lambda x, _: x.array[:, :1] if x.array.ndim == 4 else x.array,
    "mask read as (L, S), its broadcast axes ignored": lambda x, _: read_flat(x.array, x.L, x.S),
    "mask of one column is ignored": lambda x, _: True if x.array.shape[-1] == 1 else x.array,
    "mask of one row holds for the first row alone": lambda x, m: m | (rows_of(x) > 0) if m.shape[-2] == 1 else m,
    "mask is ignored": lambda x, _: True,
}, "mask")  # fmt: skip
add("array", {"mask is transposed": lambda x, _: swap(x.array)}, "mask, L = S")
add("by_bias", {"bias is a boolean mask": lambda x, _: x.bias == 0}, "bias")
add("allowed", {
    "either the mask or causal is enough": lambda x, _: np.broadcast_to(
        (x.by_causal | x.by_array) & x.by_window & x.by_lengths & x.by_bias, x.shape),
}, "causal, mask")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("allowed", {
        f"the last {n} keys or less, a partial tile, are left out": lambda x, _: x.allowed & (np.arange(x.S) < x.S // n * n),
        f"a last tile of {n} keys is counted by S % {n}": lambda x, _: x.allowed
        & ((np.arange(x.S) < x.S - n) | (x.S % n > 0)),
        f"a last tile of {n} queries is counted by L % {n}": lambda x, _: x.allowed
        & ((rows_of(x) < x.L - n) | (x.L % n > 0)),
        f"a tail of one key behind tiles of {n} is left out": lambda x, _: x.allowed
        & ((np.arange(x.S) < x.S - 1) | (x.S % n != 1)),
    }, tile=n)  # fmt: skip


@each(*((n, m) for n in TILES for m in TILES[1:]))
def _(tile: tuple[int, int]) -> None:
    n, m = tile
    add("allowed", {
        f"causal tiles of {n} x {m} are skipped by their first row": lambda x, _: x.allowed
        & (m * tile_of(x.S, m) <= n * tile_of(x.L, n)[:, None] + x.shift),
    }, "causal", tile=m)  # fmt: skip
    add("allowed", {
        f"window tiles of {n} x {m} are skipped by their last row": lambda x, _: x.allowed
        & (m * tile_of(x.S, m) + m > n * tile_of(x.L, n)[:, None] + n + x.shift - x.sides[0]),
    }, "window", tile=m)  # fmt: skip


# --- scores -------------------------------------------------------------------------------------------------------------

add("scale", {"scale=none": lambda x, _: 1.0 if x.given_scale is None else x.given_scale}, convention=True)
add("scale", {
    "scale is the default, whatever is given": lambda x, _: x.D**-0.5,
    "scale 0 is taken for the default": lambda x, _: x.scale or x.D**-0.5,
    "scale is sqrt(D), not 1/sqrt(D)": lambda x, _: 1 / x.scale if x.scale else x.scale,
    "scale is 1/D": lambda x, _: 1 / x.D,
    "scale is 1/sqrt(E)": lambda x, _: x.E**-0.5,
    "scale is applied twice": lambda x, _: x.scale * x.scale,
    "scale loses its sign": lambda x, _: abs(x.scale),
})  # fmt: skip


@each(8, 16, 32, 64, 128)
def _(n: int) -> None:
    add("scale", {f"scale of a width padded to a multiple of {n}": lambda x, _: (n * -(-x.D // n)) ** -0.5}, tile=n)


add("group", {"heads=tile": lambda x, _: np.arange(x.H) % x.G}, "grouped heads", convention=True)
add("group", {
    "head h reads key head h // G": lambda x, _: np.minimum(np.arange(x.H) // x.G, x.G - 1),
    "all heads read key head 0": lambda x, _: 0 * x.group,
}, "grouped heads")  # fmt: skip
add("k_group", {"keys are tiled over the heads, values are not": lambda x, _: np.arange(x.H) % x.G}, "grouped heads")
add("v_group", {"values are tiled over the heads, keys are not": lambda x, _: np.arange(x.H) % x.G}, "grouped heads")
add("q", {"q is read as if it were contiguous": lambda x, _: memory(x, "q")})
add("kh", {
    "k is read as if it were contiguous": lambda x, _: memory(x, "k")[..., x.group, :, :],
    "key heads are read in reverse": lambda x, _: x.k[..., x.group[::-1], :, :],
    "k is laid out as (B, S, H, D)": lambda x, _: np.ascontiguousarray(x.kh).reshape(x.B, x.S, x.H, x.D).swapaxes(1, 2),
})  # fmt: skip
add("vh", {"v is read as if it were contiguous": lambda x, _: memory(x, "v")[..., x.group, :, :]})
add("capped", {"softcap=after_bias": lambda x, _: _cap_behind_bias(x)}, "softcap, bias", convention=True,
    companions={"softcap=after_bias": ("dbias is multiplied by the slope of the softcap",)})  # fmt: skip
add("capped", {
    "softcap is ignored": lambda x, _: x.raw,
    "softcap comes before the scale": lambda x, _: _capped_first(x),
    "softcap is not multiplied back": lambda x, _: x.t,
    "tanh is made of exponentials that overflow": (lambda x, _: x.softcap * where(_exp_overflows(x), np.nan, x.t), MAKES),
}, "softcap")  # fmt: skip
add("biased", {
    "bias is ignored": lambda x, _: x.capped,
    "bias is scaled": lambda x, _: x.capped + x.scale * x.bias,
    "bias has the other sign": lambda x, _: x.capped - x.bias,
    "bias of the first sequence for all": lambda x, _: x.capped + first_of(x.bias, 0),
    "bias of the first head for all": lambda x, _: x.capped + first_of(x.bias, 1),
    "bias of the first row for all": lambda x, _: x.capped + first_of(x.bias, 2),
    "bias read as (L, S), its broadcast axes ignored": lambda x, _: x.capped + read_flat(x.bias, x.L, x.S),
    "bias indexed by (b H + h) modulo its length": lambda x, _: x.capped + _wrapped(x),
}, "bias")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("biased", {
        f"bias of the first {n} rows for every tile": lambda x, _: x.capped + tiled(x.bias, n, 2),
        f"bias of the first {n} columns for every tile": lambda x, _: x.capped + tiled(x.bias, n, 3),
    }, "bias", tile=n)  # fmt: skip


@each(10, 20, 50, 80, 100)
def _(n: int) -> None:
    add("biased", {
        f"scores are cut off at +-{n}": lambda x, _: np.clip(x.biased, -n, n),
        f"scores are cut off at +-{n}, and their gradients there": lambda x, _: _cut_off(x, n),
    })  # fmt: skip


def _cut_off(x: Any, n: float) -> Array:
    x.inside = np.abs(x.biased) < n
    return np.asarray(np.clip(x.biased, -n, n))


add("scores", {"softcap=after_mask": lambda x, _: _cap_behind_mask(x)}, "softcap", convention=True,
    companions={"softcap=after_mask": ("dbias is multiplied by the slope of the softcap",)})  # fmt: skip


def _cap_behind_bias(x: Any) -> Array:
    """The capped sum of score and bias, less the bias, which the next stage adds. A bias of -inf masks as before."""
    bias = where(x.bias == -np.inf, 0, x.bias)
    x.t = tanh((x.raw + bias) / x.softcap)
    return np.asarray(x.softcap * x.t - bias)


def _cap_behind_mask(x: Any) -> Array:
    """A masked score becomes -softcap instead of -inf, so from here on every key is allowed."""
    x.t = where(x.allowed, tanh((x.raw + (0 if x.bias is None else x.bias)) / x.softcap), -1)
    x.allowed = np.ones_like(x.allowed)
    return np.asarray(x.softcap * x.t)


add("scores", {
    "the mask multiplies the scores": lambda x, _: x.biased * x.allowed,
    "the mask is added as 0 and 1": lambda x, _: x.biased + x.allowed,
    "masked scores are +inf": (lambda x, _: where(x.allowed, x.biased, np.inf), MOVES),
    "masked scores are -1e4": lambda x, _: where(x.allowed, x.biased, where(x.allowed.any(-1, keepdims=True), -1e4, -np.inf)),
    "masked scores are -1e4, in dead rows too": lambda x, _: where(x.allowed, x.biased, -1e4),
    "masked scores are -1e9": lambda x, _: where(x.allowed, x.biased, -1e9),
    "masked scores are finfo.min": lambda x, _: where(x.allowed, x.biased, float(np.finfo(x.low).min)),
    "-inf is added to masked scores, and NaN stays NaN": (lambda x, _: x.biased + where(x.allowed, 0, -np.inf), MOVES),
    "a score of exactly 0 is masked": lambda x, _: where(x.biased == 0, -np.inf, x.scores),
})  # fmt: skip
add("sink", {
    "sink is ignored": lambda x, _: None,
    "sinks are read in reverse": lambda x, _: x.sink[::-1],
    "sink of the first head for all": lambda x, _: np.repeat(x.sink[:1], x.H, 0),
    "sink is scaled": lambda x, _: x.scale * x.sink,
    "sink is counted twice": lambda x, _: x.sink + math.log(2),
}, "sink")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("e_sink", {f"sink is counted once a tile of {n} keys": lambda x, _: x.e_sink * -(-x.S // n)}, "sink", tile=n)
    add("dsink", {f"dsink is counted once a tile of {n} keys": lambda x, _: x.dsink * -(-x.S // n)}, "sink", tile=n)


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
    "no maximum is subtracted": (lambda x, _: np.zeros_like(x.top), MAKES),
    "one maximum for all rows": (lambda x, _: np.full_like(x.top, x.scores.max(initial=-np.inf)), MAKES),
    "the maximum is not below -5e4": (lambda x, _: np.maximum(x.top, -5e4), MAKES),
    "the maximum is not below 0": (lambda x, _: np.maximum(x.top, 0), MAKES),
    "the maximum is taken over masked keys too": (
        lambda x, _: np.fmax.reduce(x.biased, -1, keepdims=True, initial=-np.inf), MAKES),
    "the maximum is taken before a negative scale": (lambda x, _: x.raw.min(-1, keepdims=True, initial=np.inf), MAKES),
})  # fmt: skip
add("top", {"the maximum leaves the sink out": (lambda x, _: _own_top(x), MAKES)}, "sink")
add("z", {
    "the softmax runs over the sequences": lambda x, _: x.e.sum(0, keepdims=True),
    "the softmax runs over the heads": lambda x, _: x.e.sum(1, keepdims=True),
    "the softmax runs over the queries": lambda x, _: x.e.sum(-2, keepdims=True),
    "masked keys are counted in the sum": lambda x, _: np.exp(x.biased - x.top).sum(-1, keepdims=True) + x.e_sink,
})  # fmt: skip


@each(1e-5, 1e-6, 1e-8)
def _(eps: float) -> None:
    add("z", {f"{eps:g} is added to the sum": lambda x, _: x.z + eps})


@each(*TILES)
def _(n: int) -> None:
    add("z", {f"padding to a multiple of {n} keys is counted in the sum": lambda x, z: z + (-x.S % n) * np.exp(-x.top)}, tile=n)
    add("z", {f"the sum is not rescaled between tiles of {n} keys": lambda x, _: _online(x, n)[0]}, tile=n)


add("z", {"the sum is taken after dropout": lambda x, _: (x.e * x.drop).sum(-1, keepdims=True)}, "dropout_mask")
add("weights", {
    "dead rows are NaN (dead_out=nan)": (lambda x, _: where(x.z == 0, np.nan, x.weights), MOVES),
    "the maximum is not below 0, and 0 / 0 where all underflows": (lambda x, _: _from_zero(x), MAKES),
    "no softmax at all": lambda x, _: where(x.allowed, x.scores),
    "NaN weights become 0": (lambda x, _: np.nan_to_num(x.weights), MOVES),
})  # fmt: skip
add("weights", {"dead_out=mean_v": lambda x, _: where(x.allowed.any(-1, keepdims=True), x.weights, 1 / max(x.S, 1))}, "",
    convention=True)  # fmt: skip
add("drop", {
    "dropout is ignored": lambda x, _: 1.0,
    "dropout is not divided by 1 - p": lambda x, _: (x.drop != 0).astype(x.drop.dtype),
    "dropout mask of the first head for all": lambda x, _: first_of(x.drop, 1),
    "dropout mask of the first sequence for all": lambda x, _: first_of(x.drop, 0),
}, "dropout_mask")  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("drop", {
        f"dropout mask of the first {n} rows for every tile": lambda x, _: tiled(x.drop, n, 2),
        f"dropout mask of the first {n} columns for every tile": lambda x, _: tiled(x.drop, n, 3),
    }, "dropout_mask", tile=n)  # fmt: skip


add("lse", {
    "lse=log2": lambda x, _: x.lse / math.log(2),
    "dead_lse=+inf": (lambda x, _: where(x.lse == -np.inf, np.inf, x.lse), MOVES),
    "dead_lse=zero": lambda x, _: where(x.lse == -np.inf, 0.0, x.lse),
    "dead_lse=fill": lambda x, _: where(x.lse == -np.inf, float(np.finfo(x.low).min) * 0.7, x.lse),
}, convention=True, companions={"lse=log2": ("dlse is taken in base 2",)})  # fmt: skip
add("lse", {"sink=not_in_lse": lambda x, _: (x.top + np.log(x.e.sum(-1, keepdims=True)))[..., 0]}, "sink", convention=True,
    companions={"sink=not_in_lse": ("dlse flows through weights without the sink", "dlse is missing in dsink")})  # fmt: skip
add("lse", {
    "lse leaves the maximum out": lambda x, _: np.log(x.z)[..., 0],
    "lse of the weights, not of the scores": lambda x, _: np.log(np.exp(x.weights).sum(-1)),
    "lse is the maximum alone": lambda x, _: x.top[..., 0],
    "lse is the sum, not its log": lambda x, _: x.z[..., 0],
    "lse of a dead row is NaN": (lambda x, _: where(x.z[..., 0] == 0, np.nan, x.lse), MOVES),
    "dead rows have lse -inf in spite of the sink": lambda x, _: where(x.allowed.any(-1), x.lse, -np.inf),
    "lse of scores without the scale": lambda x, _: log_sum(where(x.allowed, x.biased / (x.scale or 1.0), -np.inf))[..., 0],
})  # fmt: skip
add("out", {
    "heads are merged without a transpose": lambda x, _: x.out.swapaxes(1, 2).reshape(x.out.shape),
    "batch and heads are exchanged": lambda x, _: x.out.swapaxes(0, 1).reshape(x.out.shape),
    "only the first sequence is computed": lambda x, _: where(np.arange(x.B)[:, None, None, None] == 0, x.out),
    "NaN in the output becomes 0": (lambda x, _: np.nan_to_num(x.out), MOVES),
    "masked weights are not normalised again": lambda x, _: over_allowed(
        where(x.allowed, x.e / np.exp(x.biased - x.top).sum(-1, keepdims=True)) * x.drop, x.vh, x.allowed),
})  # fmt: skip


@each(*TILES)
def _(n: int) -> None:
    add("out", {f"the output is not rescaled between tiles of {n} keys": lambda x, _: _online(x, n)[1] / x.z}, tile=n)



def _capped_first(x: Any) -> Array:
    x.t = np.tanh(x.raw / x.scale / x.softcap)
    return np.asarray(x.scale * x.softcap * x.t)


def _from_zero(x: Any) -> Array:
    x.top = np.maximum(x.top, 0)
    x.e = exp_low(x, x.scores - x.top)
    x.z = x.e.sum(-1, keepdims=True) + (0.0 if x.sink is None else exp_low(x, x.sink - x.top))
    return np.asarray(where(x.allowed, x.e / x.z))



def _own_top(x: Any) -> Array:
    top = x.scores.max(-1, keepdims=True, initial=-np.inf)
    return np.asarray(where(top == -np.inf, 0.0, top))


def _online(x: Any, n: int) -> tuple[Array, Array]:
    """Sum and output of an online softmax over tiles of n keys that does not rescale earlier tiles to a new maximum."""
    total, out, top = np.zeros_like(x.top), np.zeros((*x.shape[:-1], x.E), x.dtype), np.full_like(x.top, -np.inf)
    for j in range(0, x.S, n):
        tile = slice(j, j + n)
        top = np.maximum(top, x.scores[..., tile].max(-1, keepdims=True))
        e = np.exp(x.scores[..., tile] - where(top == -np.inf, 0, top))
        total = total + e.sum(-1, keepdims=True)
        drop = x.drop if isinstance(x.drop, float) else x.drop[..., tile]
        out = out + (e * drop) @ x.vh[..., tile, :]
    return total, out
