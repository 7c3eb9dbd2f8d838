"""Seeded bugs: one honest implementation of each layer with one bad line at a time, for the tests of the tests.

Everything here is written a second time and shares no code with the package. `dense` and `tiled` are two implementations of
attention as candidates of `npattn.verify`, `rnn` and `multi_head` two small layers. Each takes the name of a bug; with None it
is right, so undoing a bug changes one line and nothing else. The tables below the code say what each bug is, and which check
has to reject it. A bug given to the backward alone leaves the forward right, whatever line it is in.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from npattn.multihead import MultiHeadParams
from npattn.rnn import RNNParams
from npattn.verify.candidates import Candidate
from npattn.verify.cases import CASES
from npattn.verify.conventions import Convention

QUIET = {"divide": "ignore", "over": "ignore", "under": "ignore", "invalid": "ignore"}
ROWS, COLS = 32, 16  # a tile: the 37 queries and 53 keys of most cases need several, and the last ones are cut short


@dataclass
class Options:
    """The arguments of one call; ``state`` is what a candidate keeps from call to call, which an honest one does not touch."""

    mask: Any = None
    bias: Any = None
    scale: Any = None
    softcap: Any = None
    sink: Any = None
    drop: Any = None
    causal: bool = False
    window: Any = None
    key_lengths: Any = None
    align: str = "top_left"
    width: int = 0  # E
    state: dict[str, Any] = field(default_factory=dict)


def swap(x):
    return x.swapaxes(-1, -2)


def half(x):
    """Rounded to float16."""
    return x.astype(np.float16).astype(x.dtype)


def bfloat16(x):
    """Rounded to the 8 bits of bfloat16."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32).astype(x.dtype)


def tf32(x):
    """Rounded to the 11 bits of TF32."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(x.dtype)


def flat(x):
    """The memory behind a view, read as if the view were contiguous."""
    owner = x if x.base is None else x.base
    return np.resize(owner.ravel(order="K"), x.shape)


def over_allowed(w, x, allowed):
    """w @ x for w that is 0 where not allowed: what is not finite in x_j reaches row i only where (i, j) is allowed."""
    bad = ~np.isfinite(x)
    if not bad.any():
        return w @ x
    j = np.flatnonzero(bad.any(-1).reshape(-1, x.shape[-2]).any(0))
    seen = allowed[..., j, None] & bad[..., None, j, :]
    return w @ np.where(bad, 0, x) + np.where(seen, w[..., j, None] * x[..., None, j, :], 0).sum(-2)


# --- what both implementations of attention share ---------------------------------------------------------------------


def check(q, k, v, o, bug):
    """Bad input is refused."""
    if q.dtype.kind != "f" and bug != "accepts integers":
        raise TypeError("q, k and v must be floating")
    if not q.dtype == k.dtype == v.dtype and bug != "accepts mixed dtypes":
        raise TypeError("q, k and v must have one dtype")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError("k and v must have one length")
    if k.shape[-3] != v.shape[-3] and bug != "accepts other heads of v":
        raise ValueError("k and v must have the same heads")
    if q.shape[-3] % k.shape[-3] and bug != "accepts heads that do not divide":
        raise ValueError("the heads of k must divide those of q")
    if o.mask is not None and o.mask.dtype != bool and bug != "accepts an additive mask":
        raise TypeError("mask must be boolean")
    if o.mask is not None and o.mask.ndim not in (2, q.ndim) and bug != "accepts a mask of rank 3":
        raise ValueError("mask must have rank 2 or that of the scores")
    if o.softcap is not None and not o.softcap > 0 and bug != "accepts softcap 0":
        raise ValueError("softcap must be positive")
    if o.window is not None and min(n or 0 for n in o.window) < 0 and bug != "accepts a window of -1":
        raise ValueError("window must not be negative")
    if o.key_lengths is not None and np.max(o.key_lengths, initial=0) > k.shape[-2] and bug != "accepts lengths above S":
        raise ValueError("key_lengths must not be above S")
    if o.drop is not None and not isinstance(o.drop, np.ndarray) and bug != "accepts a dropout probability":
        raise TypeError("dropout_mask must be an array")
    if o.sink is not None and o.sink.shape != q.shape[-3:-2] and bug != "accepts one sink for all heads":
        raise ValueError("sink must have one number a head")


def attended(shape, o, bug):
    """Which pairs are allowed, (B, H, L, S)."""
    L, S = shape[-2:]
    i, j = np.arange(L)[:, None], np.arange(S)
    shift = S - L if o.align == "bottom_right" else 0
    if bug == "anchored at key 0":
        shift = 0
    if bug == "shift never negative":
        shift = max(shift, 0)
    if bug == "shift of the other sign":
        shift = -shift
    ahead = j - i - shift  # how far key j stands ahead of query i
    allowed = np.ones(shape, bool)
    causal = o.causal
    if bug == "causal dropped beside a mask":
        causal = causal and o.mask is None
    if bug == "causal dropped beside dropout":
        causal = causal and o.drop is None
    if bug == "causal dropped beside a bias":
        causal = causal and o.bias is None
    if bug == "causal dropped beside key_lengths":
        causal = causal and o.key_lengths is None
    if bug == "always causal":
        causal = True
    if causal:
        seen = ahead <= 0
        if bug == "causal excludes the own key":
            seen = ahead < 0
        if bug == "causal sees one ahead":
            seen = ahead <= 1
        if bug == "causal block by block":
            seen = j // COLS <= (i + shift) // COLS
        if bug == "causal the other way":
            seen = ahead >= 0
        allowed = allowed & seen
    if o.window is not None:
        left, right = (shape[-2] + shape[-1] if n is None else n for n in o.window)
        if bug == "window counts one more":
            left = left + 1
        if bug == "window's ends swapped":
            left, right = right, left
        if bug == "window symmetric":
            right = left
        if bug == "window of the wrong sign":
            left = -left
        if bug == "window of 0 is no limit":
            right = right or S
        if bug == "window ignores the alignment":
            ahead = j - i
        allowed = allowed & (ahead >= -left) & (ahead <= right)
    if o.key_lengths is not None:
        n = o.key_lengths[..., None, None, None]
        if bug == "lengths counted up in place":
            o.key_lengths += 1
            n = n - 1
        if bug == "one key too many":
            n = n + 1
        if bug == "lengths of the first sequence":
            n = n[:1]
        if bug == "length 0 is no limit":
            n = np.where(n == 0, S, n)
        if bug == "lengths of the first call":
            n = o.state.setdefault("lengths", n)
        padded = j >= n
        if bug == "padding on the left":
            padded = j < S - n
        if bug == "lengths on the queries":
            padded = i >= n
        allowed = allowed & ~padded
    if o.mask is not None:
        mask = o.mask if o.mask.dtype == bool else o.mask != 0
        if bug == "mask inverted":
            mask = ~mask
        if bug == "mask of the first sequence":
            mask = mask[:1]
        if bug == "mask of the first head":
            mask = mask[:, :1]
        if bug == "mask transposed where L = S":
            mask = swap(mask) if L == S else mask
        if bug == "mask read flat":
            mask = np.resize(mask, (L, S))
        if bug == "mask of one column ignored" and mask.shape[-1] == 1:
            mask = True
        if bug == "mask of one row for the first row" and mask.shape[-2] == 1:
            mask = mask | (i > 0)
        if bug == "mask of the last call":
            mask = o.state.setdefault(("mask", L, S), mask)
        if bug == "mask or causal":
            allowed, mask = allowed | mask, True
        if bug == "mask ignored":
            mask = True
        allowed = allowed & mask
    if o.bias is not None:
        allowed = allowed & (o.bias != -np.inf)
    return np.broadcast_to(allowed, shape)


def logits(q, k, bias, allowed, o, bug):
    """Scores of a tile or of all pairs, -inf where not allowed; before the mask; the tanh of the softcap; the scale."""
    D = q.shape[-1]
    scale = D**-0.5 if o.scale is None else o.scale
    if bug == "scale of 1 by default":
        scale = 1.0 if o.scale is None else o.scale
    if bug == "given scale ignored":
        scale = D**-0.5
    if bug == "scale 0 is no scale":
        scale = o.scale or D**-0.5
    if bug == "scale 1/sqrt(E)":
        scale = o.width**-0.5
    if bug == "divided by the scale":
        scale = 1 / scale
    if bug == "scale 1/D":
        scale = 1 / D
    if bug == "scale of the padded width":
        scale = (8 * -(-D // 8)) ** -0.5
    if bug == "scale without its sign":
        scale = abs(scale)
    if bug == "scale of the last call":
        scale = o.state["scale"] = o.state.get("scale", scale) if o.scale is None else o.scale
    if bug == "scale a NumPy float64":
        scale = np.float64(scale)
    if bug == "key bias":  # no bug: the same for all keys of a row
        k = k + k.dtype.type(0.5)
    if bug in ("scale off by 1e-4", "scale off by 1e-5"):
        scale = scale * (1 + float(bug[-4:]))
    s = scale * (q @ swap(k))
    if bug == "scores in half precision":
        s = scale * half(q @ swap(k))
    if bug == "scores in bfloat16":
        s = bfloat16(s)
    if bug == "bias before the softcap" and bias is not None:
        s = s + bias
    t = None
    if o.softcap is not None and bug != "softcap ignored":
        t = np.tanh(s / o.softcap)
        if bug == "softcap before the scale":
            t = np.tanh(s / scale / o.softcap) * scale
        if bug == "tanh by exponentials":
            e = np.exp(2 * s / o.softcap)
            t = (e - 1) / (e + 1)
        s = o.softcap * t
        if bug == "softcap not multiplied back":
            s = t
    if bias is not None and bug not in ("bias before the softcap", "bias ignored"):
        if bug == "bias scaled":
            bias = scale * bias
        if bug == "bias as a boolean mask":
            bias = np.where(bias != 0, -np.inf, 0).astype(s.dtype)
        s = s + bias
    if bug == "+1 on all logits":  # no bug where lse is not returned
        s = s + 1
    raw = s
    if bug == "mask multiplied":
        return s * allowed, raw, t, scale
    if bug == "mask added as 0 and 1":
        return s + allowed.astype(s.dtype), raw, t, scale
    if bug == "filled with +inf":
        return np.where(allowed, s, np.inf), raw, t, scale
    if bug == "mask before the softcap":
        return np.where(allowed, s, -np.inf if o.softcap is None else -o.softcap), raw, t, scale
    if bug == "score 0 is masked":
        return np.where(allowed & (s != 0), s, -np.inf), raw, t, scale
    if bug == "scores clamped":
        s = np.clip(s, -50, 50)
    if bug == "mask added to NaN":
        return s + np.where(allowed, 0, -np.inf).astype(s.dtype), raw, t, scale
    if bug == "filled with finfo.min":
        return np.where(allowed, s, np.finfo(s.dtype).min), raw, t, scale
    if bug == "filled with -1e4":  # with dead rows handled
        return np.where(allowed, s, np.where(allowed.any(-1, keepdims=True), -1e4, -np.inf).astype(s.dtype)), raw, t, scale
    if bug == "filled with -1e9":
        return np.where(allowed, s, s.dtype.type(-1e9)), raw, t, scale
    return np.where(allowed, s, -np.inf), raw, t, scale


def each_head(x, H, bug):
    """(B, G, S, D) -> (B, H, S, D): head h reads group h // (H // G)."""
    G = x.shape[-3]
    group = np.arange(H) // (H // G)
    if bug == "heads interleaved":
        group = np.arange(H) % G
    if bug == "head h reads h // G":
        group = np.arange(H) // G
    if bug == "groups in reverse":
        group = group[::-1]
    group = np.minimum(group, G - 1)
    return x if G == H and np.array_equal(group, np.arange(H)) else x[..., group, :, :]


def sum_of_group(name, dx, like, bug):
    """(B, H, S, D) -> (B, G, S, D), for dk or dv."""
    *lead, G, S, D = like.shape
    if dx.shape[-3] == G:
        return dx
    if bug == f"groups interleaved in {name}":
        return dx.reshape(*lead, dx.shape[-3] // G, G, S, D).sum(-4)
    split = dx.reshape(*lead, G, dx.shape[-3] // G, S, D)
    if bug == f"mean of the group in {name}":
        return split.mean(-3)
    if bug == f"first head of the group in {name}":
        return split[..., 0, :, :].copy()
    if bug == f"last head of the group in {name}":
        return split[..., -1, :, :].copy()
    if bug == f"first head of one group in {name}" and G == 1:
        return split[..., 0, :, :].copy()
    return split.sum(-3)


def of_heads(sink, bug):
    """(H,) -> (H, 1, 1)"""
    if bug == "sinks in reverse":
        sink = sink[::-1]
    if bug == "sink of the first head":
        sink = np.repeat(sink[:1], len(sink))
    return sink[:, None, None]


def spread(x, shape, bug):
    """An array over pairs in full."""
    if x is None:
        return None
    if bug == "bias indexed by (b H + h) mod its length":
        x = np.resize(x.reshape(-1, *x.shape[-2:]), (math.prod(shape[:-2]), *x.shape[-2:])).reshape(*shape[:-2], *x.shape[-2:])
    if bug == "bias read flat":
        x = np.resize(x, shape[-2:])
    if bug == "bias of the first sequence":
        x = x[:1] if x.ndim > 2 else x
    if bug == "bias of the first row":
        x = x[..., :1, :]
    return np.broadcast_to(x, shape)


def sum_to(terms, like, bug):
    """The gradient of an array over pairs: the sum over the axes along which it was broadcast."""
    full = like.reshape((1,) * (terms.ndim - like.ndim) + like.shape)
    axes = tuple(a for a in range(terms.ndim) if full.shape[a] == 1)
    if bug == "dbias of the first sequence" and 0 in axes:
        terms = terms[:1]
    if bug == "dbias of the last row" and terms.ndim - 2 in axes:
        terms = terms[..., -1:, :]
    if bug == "dbias a mean":
        return terms.mean(axes, keepdims=True).reshape(like.shape)
    if bug == "dbias not summed over the heads":
        return terms
    total = terms.sum(axes, keepdims=True).reshape(like.shape)
    if bug == "dbias in float64":
        return total.astype(np.float64)
    return total


# --- attention with all pairs at once ---------------------------------------------------------------------------------


def dense_forward(q, k, v, o, bug):
    """(out, lse)"""
    if bug == "shorter of k and v":
        k, v = k[..., : v.shape[-2], :], v[..., : k.shape[-2], :]
    check(q, k, v, o, bug)
    if bug == "q scaled in place":
        q *= q.dtype.type(q.shape[-1] ** -0.5)
        o.scale = 1.0
    if bug == "NaN in k cleaned in place":
        np.nan_to_num(k, copy=False)
    if bug == "bias masked in place" and o.bias is not None and o.mask is not None:
        np.copyto(o.bias, -np.inf, where=~o.mask)
    if bug == "v read flat":
        v = flat(v)
    if bug == "q read flat":
        q = flat(q)
    if bug == "operands in TF32":
        q, k, v = tf32(q), tf32(k), tf32(v)
    if bug == "inputs in bfloat16":
        q, k, v = bfloat16(q), bfloat16(k), bfloat16(v)
    shape = (*q.shape[:-1], k.shape[-2])
    H = shape[-3]
    kf, vf = each_head(k, H, bug), each_head(v, H, None if bug == "groups in reverse" else bug)
    if bug == "keys tiled, values repeated":
        kf = each_head(k, H, "heads interleaved")
    if bug == "values tiled, keys repeated":
        vf = each_head(v, H, "heads interleaved")
    bias = spread(o.bias, shape, bug)
    if bug == "k laid out as (B, S, H, D)":
        kf = np.ascontiguousarray(kf).reshape(kf.shape[0], *kf.shape[2:0:-1], kf.shape[3]).swapaxes(1, 2)
    allowed = attended(shape, o, bug)
    s, raw, _, _ = logits(q, kf, bias, allowed, o, bug)
    m = s.max(-1, keepdims=True, initial=-np.inf)
    if bug == "max over all rows":
        m = s.max(initial=-np.inf)
    if bug == "max over masked keys too":
        m = np.fmax.reduce(raw, -1, keepdims=True, initial=-np.inf)
    if bug == "max before a negative scale" and bias is None and o.softcap is None:
        scale = q.shape[-1] ** -0.5 if o.scale is None else o.scale
        m = np.fmax.reduce(q @ swap(kf), -1, keepdims=True, initial=-np.inf) * scale
    if bug == "max not below -5e4":
        m = np.maximum(m, -5e4)
    if bug == "no max":
        m = np.zeros_like(m)
    sink = None if o.sink is None else of_heads(o.sink, bug)
    if sink is not None and bug != "max without the sink":
        m = np.maximum(m, sink)
    if bug != "dead rows unguarded":
        m = np.where(m == -np.inf, 0, m)
    e = np.exp(s - m)
    if bug in ("exp off by 1e-4", "exp off by 1e-5"):
        e = e * (1 + float(bug[-4:]) * (-1.0) ** np.arange(e.shape[-1])).astype(e.dtype)
    total = e.sum(-1, keepdims=True)
    if bug == "one key missing from one sum":
        total[0, 0, 0] -= e[0, 0, 0, :1]
    if bug == "softmax over the sequences":
        total = e.sum(0, keepdims=True)
    if bug == "softmax over the queries":
        total = e.sum(-2, keepdims=True)
    if bug == "sum after dropout" and o.drop is not None:
        e = e * o.drop
        total = e.sum(-1, keepdims=True)
    if sink is not None and bug != "sink ignored":
        total = total + np.exp(sink - m)
    p = np.where(total == 0, 0, e / total)
    if bug == "sum of 0 unguarded":
        p = e / total
    if bug == "1e-6 beside the sum":
        p = e / (total + 1e-6)
    if bug == "1e-9 beside the sum":  # no bug in float32: the sum is at least 1
        p = e / np.where(total == 0, 1, total + 1e-9)
    if bug == "NaN weights are 0":
        p = np.nan_to_num(p)
    if bug == "mask after the softmax":
        p = e / np.exp(raw - m).sum(-1, keepdims=True)
    if bug == "no softmax":
        p = np.where(allowed, s, 0)
    drop = 1.0 if o.drop is None else o.drop
    if bug == "dropout without 1/(1-p)":
        drop = drop != 0
    if bug == "dropout of the first head" and o.drop is not None:
        drop = drop[:, :1]
    if bug == "dropout ignored":
        drop = 1.0
    w = p * drop
    if bug == "sum after dropout":
        w = p
    if bug == "weights in half precision":
        w = half(w)
    if bug == "weights in bfloat16":
        w = bfloat16(w)
    if bug == "operands in TF32":
        w = tf32(w)
    out = over_allowed(w, vf, allowed)
    if bug == "0 times NaN":
        out = w @ vf
    if bug == "NaN output is 0":
        out = np.nan_to_num(out)
    if bug == "heads merged without a transpose":
        out = out.swapaxes(1, 2).reshape(out.shape)
    if bug == "first sequence alone":
        out = np.where(np.arange(len(out))[:, None, None, None] == 0, out, 0)
    if bug == "batch and heads swapped":
        out = out.swapaxes(0, 1).reshape(out.shape)
    if bug == "out of q's width":
        out = out[..., : q.shape[-1]]
    if bug == "v padded to D":
        out = np.pad(out, [(0, 0)] * 3 + [(0, max(q.shape[-1] - o.width, 0))])
    if bug == "one element of out off by 1e-4":
        out[0, 0, 0, 0] *= 1 + 1e-4
    lse = (m + np.log(total))[..., 0]
    if bug == "lse without the max":
        lse = np.log(total)[..., 0]
    if bug == "lse in base 2":
        lse = lse / math.log(2)
    if bug == "lse of the weights":
        lse = np.log(np.exp(p).sum(-1))
    if bug == "lse without the sink":
        lse = (m + np.log(e.sum(-1, keepdims=True)))[..., 0]
    if bug == "lse of a dead row 0":
        lse = np.where(lse == -np.inf, 0, lse)
    if bug == "lse of a dead row -inf in spite of a sink":
        lse = np.where(allowed.any(-1), lse, -np.inf)
    if bug == "out in float64":
        out = out.astype(np.float64)
    if bug == "lse with a last axis of 1":
        lse = lse[..., None]
    if bug == "out a view of a scratch array":
        scratch = o.state.setdefault(out.shape, np.empty_like(out))
        scratch[...] = out
        out = scratch
    o.state["p"] = p  # kept as many kernels do; nothing honest reads it
    return out, lse


def dense_backward(dout, q, k, v, o, out, lse, dlse, bug):
    """A mapping with dq, dk, dv, dbias and dsink: the weights are made again from lse, as fused kernels do."""
    if dout.shape != (*q.shape[:-1], v.shape[-1]) and bug != "accepts any dout that broadcasts":
        raise ValueError("dout must have the shape of out")
    if dlse is not None and dlse.shape != q.shape[:-1] and bug != "accepts any dlse that broadcasts":
        raise ValueError("dlse must have the shape of lse")
    if bug == "nothing done without dout" and not dout.any():
        return {"dq": np.zeros_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    if bug == "dout read flat":
        dout = flat(dout)
    if bug == "dead dout cleared in place":
        dout[lse == -np.inf] = 0
    if bug == "lse cleared in place":
        lse[lse == -np.inf] = 0
    shape = (*q.shape[:-1], k.shape[-2])
    H, S = shape[-3], shape[-1]
    kf, vf = each_head(k, H, bug), each_head(v, H, bug)
    allowed = attended(shape, o, bug)
    s, _, t, scale = logits(q, kf, spread(o.bias, shape, bug), allowed, o, bug)
    sink = None if o.sink is None else of_heads(o.sink, bug)
    alive = (lse != -np.inf)[..., None]
    if bug == "lse kept in half precision":
        lse = half(lse)
    dout = np.where(alive, dout, 0)
    dl = 0.0 if dlse is None else np.where(alive, dlse[..., None], 0)
    if bug == "dlse ignored":
        dl = 0.0
    if bug == "dlse of the other sign":
        dl = -dl
    if bug == "dlse in base 2":
        dl = dl / math.log(2)
    if bug == "dlse times the scale":
        dl = dl * q.dtype.type(scale)
    if bug == "dlse of the first head of a group" and dlse is not None:
        dl = each_head(dl[:, :: H // k.shape[-3]], H, None)

    lse_ = np.where(alive, lse[..., None], 0)
    if bug == "dead rows NaN in the backward":
        lse_ = lse[..., None]
    p = np.exp(s - lse_)
    if bug == "lse of before the sink":
        p = np.exp(s - np.log(np.exp(s).sum(-1, keepdims=True)))
    if bug == "shifted by the max, not by lse":
        p = np.exp(s - s.max(-1, keepdims=True))
    if bug == "weights below 1e-4 dropped":
        p = np.where(p < 1e-4, 0, p)
    if bug == "weights of the last forward":
        p = o.state["p"]
    if bug == "kept weights cleared after use":
        p = o.state["p"].copy()
        o.state["p"][...] = 0
    drop = 1.0 if o.drop is None else o.drop
    if bug == "dropout of the first sequence in the backward" and o.drop is not None:
        drop = drop[:1]
    w = p * drop
    if bug == "dv of weights before dropout":
        w = p
    if bug == "dv of half weights":
        w = half(w)
    if bug == "dv of bfloat16 weights":
        w = bfloat16(w)
    if bug == "dropout twice in dv":
        w = w * drop
    dv = over_allowed(swap(w), dout, swap(allowed))
    if bug == "dv of its neighbour head":
        dv = np.roll(dv, 1, -3)
    if bug == "dv of dout's mean":
        dv = swap(w) @ np.broadcast_to(dout.mean(-2, keepdims=True), dout.shape)

    if bug == "divided by the largest |dout|":
        dv = dv / np.abs(dout).max(initial=0) * np.abs(dout).max(initial=0)
    dp = np.where(allowed, dout @ swap(vf), 0)
    if bug == "dp in bfloat16":
        dp = bfloat16(dp)
    if bug == "dropout twice in dp":
        dp = dp * drop
    if bug == "dp without dropout":
        drop = 1.0
    dp = dp * drop
    if bug == "dp clipped":
        dp = np.clip(dp, -10, 10)
    delta = (dout * out).sum(-1, keepdims=True)
    if bug == "Delta 0":
        delta = np.zeros_like(delta)
    if bug == "Delta a mean":
        delta = (dout * out).mean(-1, keepdims=True)
    if bug == "Delta of sum dP P":  # no bug: the same number
        delta = (p * dp).sum(-1, keepdims=True)
    if bug == "Delta of masked values":
        delta = (p * (dout @ swap(vf)) * drop).sum(-1, keepdims=True)
    if bug == "Delta over the queries":
        delta = (p * dp).sum(-2, keepdims=True)
    if bug == "Delta of the output before dropout":
        delta = (dout * over_allowed(p, vf, allowed)).sum(-1, keepdims=True)
    if bug == "Delta of an output in bfloat16":
        delta = (dout * bfloat16(out)).sum(-1, keepdims=True)
    if bug == "Delta of D columns":
        delta = (dout * out)[..., : q.shape[-1]].sum(-1, keepdims=True)
    if bug == "Delta of the next row":
        delta = np.roll(delta, -1, -2)
    pulled = dp - delta + dl
    if bug == "dlse not times p":
        pulled = dp - delta + dl / np.where(p == 0, 1, p)
    if bug == "dlse times dropout":
        pulled = dp - delta + dl * drop
    ds = p * pulled
    if bug == "softmax backward by dropped weights":
        ds = w * pulled
    if bug == "Delta not times p":
        ds = p * dp - delta
    if bug == "ds in bfloat16":
        ds = bfloat16(ds)
    ds = np.where(allowed, ds, 0)
    if bug == "masked pairs keep their gradient":
        ds = dp - delta

    dsink = None
    if sink is not None:
        p_sink = np.where(sink == -np.inf, 0, np.exp(sink - lse_))
        if bug == "dsink without p_sink":
            p_sink = 1.0
        if bug == "dsink of before the sink in lse":
            p_sink = np.exp(sink - np.log(np.exp(s).sum(-1, keepdims=True)))
        rows = p_sink * (dl - delta)
        if bug == "dsink of the other sign":
            rows = -rows
        if bug == "dsink without Delta":
            rows = p_sink * (dl + 0 * delta)
        if bug == "dsink without dlse":
            rows = p_sink * -delta
        if bug == "dsink of dead rows lost":
            rows = np.where(allowed.any(-1, keepdims=True), rows, 0)
        if bug == "dsink of the first sequence":
            rows = rows[:1]
        if bug == "dsink of the first query":
            rows = rows[..., :1, :]
        if bug == "dsink a mean":
            rows = rows / (rows.shape[0] * rows.shape[-2])
        dsink = rows.sum((0, 2, 3))
        if bug == "dsink summed over the heads":
            dsink = np.full_like(dsink, dsink.sum())
    if bug == "dbias behind the softcap" and t is not None:
        ds = ds * (1 - t * t)
    dbias = None if o.bias is None else sum_to(ds, o.bias, bug)
    if bug == "dbias times the scale" and o.bias is not None:
        dbias = scale * dbias
    if bug == "dbias without Delta" and o.bias is not None:
        dbias = sum_to(np.where(allowed, p * dp, 0), o.bias, bug)
    if bug == "dbias of the dropped weights" and o.bias is not None:
        dbias = sum_to(np.where(allowed, ds * (1.0 if o.drop is None else o.drop), 0), o.bias, bug)
    if t is not None and bug not in ("softcap derivative forgotten", "dbias behind the softcap"):
        slope = 1 - t * t
        if bug == "softcap derivative 1 - t":
            slope = 1 - t
        if bug == "softcap derivative of the capped score":
            slope = 1 - np.square(np.tanh(t))
        if bug == "softcap derivative over the cap":
            slope = slope / o.softcap
        if bug == "softcap derivative of the raw score":
            slope = 1 - np.square(scale * (q @ swap(kf)) / o.softcap)
        if bug == "softcap derivative of the score with its bias" and o.bias is not None:
            slope = 1 - np.square(s / o.softcap)
        ds = np.where(allowed, ds * slope, 0)

    dq = scale * over_allowed(ds, kf, allowed)
    dk = scale * over_allowed(swap(ds), q, swap(allowed))
    if bug == "0 times NaN in dq":
        dq = scale * (ds @ kf)
    if bug == "0 times NaN in dk":
        dk = scale * (swap(ds) @ q)
    if bug == "scale squared in dk":
        dk = scale * dk
    if bug == "dq without the scale":
        dq = dq / scale
    if bug == "dq of the default scale":
        dq = dq / scale * q.shape[-1] ** -0.5
    if bug == "ds transposed where L = S" and ds.shape[-2] == S:
        dk = scale * over_allowed(ds, q, swap(allowed))
    if bug == "dq of the first S queries":
        dq[..., S:, :] = 0
    if bug == "dk of the first L keys":
        dk[..., q.shape[-2] :, :] = 0
    if bug == "dq by the first sequence's keys":
        dq = scale * (ds @ kf[:1])
    if bug == "dq of the first head":
        dq[:, 1:] = dq[:, :1]
    if bug == "dk and dv exchanged":
        dk, dv = dv, dk
    if bug == "dk minus its mean":
        dk = dk - dk.mean(-1, keepdims=True)
    if bug == "gradients summed over the batch":
        dk = np.broadcast_to(dk.sum(0), dk.shape)
    dk, dv = sum_of_group("dk", dk, k, bug), sum_of_group("dv", dv, v, bug)
    if bug == "dv of k's width":
        dv = np.concatenate([dv[..., : k.shape[-1]], np.zeros_like(dv[..., k.shape[-1] :])], -1)
    if bug == "dk added to that of the last call":
        dk = o.state[dk.shape] = dk + o.state.get(dk.shape, 0)
    if bug == "dq in float64":
        dq = dq.astype(np.float64)
    if bug == "dq off by 1e-3":
        dq = dq * dq.dtype.type(1.001)
    if bug == "dv off by 1e-5":
        dv = dv * dv.dtype.type(1.00001)
    if bug == "dq not returned":
        dq = None
    return {"dq": dq, "dk": dk, "dv": dv, "dbias": dbias, "dsink": dsink}


# --- attention in tiles -----------------------------------------------------------------------------------------------


def padded(x, rows, cols=None, value=0, mode="constant"):
    """x (..., R, C) with its last two axes filled up to whole tiles."""
    fill = (0, rows - x.shape[-2]), (0, 0 if cols is None else cols - x.shape[-1])
    values = {"constant_values": value} if mode == "constant" else {}
    return np.pad(x, [(0, 0)] * (x.ndim - 2) + list(fill), mode=mode, **values)


def end(n, tile, bug):
    """Where the last tile ends."""
    if bug == "last tile left out":
        return n // tile * tile
    if bug == "tail of one left out":
        return n - 1 if n % tile == 1 and n > 1 else -(-n // tile) * tile
    return -(-n // tile) * tile


def tiled_forward(q, k, v, o, bug):
    """(out, lse) by an online softmax over tiles of keys."""
    check(q, k, v, o, bug)
    shape, E = (*q.shape[:-1], k.shape[-2]), v.shape[-1]
    lead, L, S = shape[:-2], shape[-2], shape[-1]
    rows, cols = -(-L // ROWS) * ROWS, -(-S // COLS) * COLS
    allowed = padded(attended(shape, o, bug), rows, cols, bug == "padded keys allowed")
    q_ = padded(q, rows)
    kf, vf = (padded(each_head(x, lead[-1], bug), cols) for x in (k, v))
    if bug == "keys past the end read":
        kf, vf = (padded(each_head(x, lead[-1], bug), cols, mode="wrap") for x in (k, v))
        allowed = padded(attended(shape, o, bug), rows, cols, True)
    bias, drop = (None if x is None else padded(np.broadcast_to(x, shape), rows, cols) for x in (o.bias, o.drop))
    out, lse = np.zeros((*lead, rows, E), q.dtype), np.zeros((*lead, rows), q.dtype)
    for i in range(0, rows, ROWS):
        a = slice(i, i + ROWS)
        m = np.full((*lead, ROWS, 1), -np.inf, q.dtype)
        if bug == "first max -5e4":
            m = np.full_like(m, -5e4)
        if bug == "first max 0":
            m = np.zeros_like(m)
        total, acc = np.zeros_like(m), np.zeros((*lead, ROWS, E), q.dtype)
        if o.sink is not None:
            m = np.maximum(m, o.sink[:, None, None])
            total = np.where(m == -np.inf, 0, np.ones_like(m))
            if bug == "sink once a tile of keys":
                total = total * (cols // COLS)
        for j in range(0, end(S, COLS, bug), COLS):
            b = slice(j, j + COLS)
            seen = allowed[..., a, b]
            if bug == "tiles skipped by their first row" and o.causal and j > i:
                continue
            if bug == "tiles skipped by their last row" and o.window is not None and j + COLS <= i + ROWS - o.window[0]:
                continue
            if bug == "keys of the last tile counted by S % tile" and S - j <= COLS:
                seen = seen & (np.arange(COLS) < S % COLS)
            if bug == "rows of the last tile counted by L % tile" and L - i <= ROWS:
                seen = seen & (np.arange(ROWS) < L % ROWS)[:, None]
            if not seen.any() and bug != "empty tiles unguarded":
                continue
            tile = None if bias is None else bias[..., a, b]
            if bug == "bias tile of the first rows" and bias is not None:
                tile = bias[..., :ROWS, b]
            if bug == "bias tile of the first columns" and bias is not None:
                tile = bias[..., a, :COLS]
            s = logits(q_[..., a, :], kf[..., b, :], tile, seen, o, bug)[0]
            new = np.maximum(m, s.max(-1, keepdims=True))
            safe = np.where(new == -np.inf, 0, new)
            if bug == "empty tiles unguarded":
                safe = new
            e, shrink = np.exp(s - safe), np.exp(m - safe)
            before = total * shrink
            if bug == "sum not rescaled":
                before = total
            total = before + e.sum(-1, keepdims=True)
            if drop is not None:
                e = e * drop[..., a, b if bug != "dropout tile of the first columns" else slice(COLS)]
            before = acc * shrink
            if bug == "out not rescaled":
                before = acc
            acc = before + over_allowed(e, vf[..., b, :], seen)
            m = new
            if bug == "max of the last tile":
                m = s.max(-1, keepdims=True)
        out[..., a, :] = np.where(total == 0, 0, acc / total)
        if bug == "sum of 0 unguarded":
            out[..., a, :] = acc / total
        lse[..., a] = np.where(total == 0, -np.inf, m + np.log(total))[..., 0]
    return out[..., :L, :], lse[..., :L]


def tiled_backward(dout, q, k, v, o, out, lse, dlse, bug):
    """A mapping with the gradients: keys in the outer loop, queries in the inner one."""
    shape, D, E = (*q.shape[:-1], k.shape[-2]), q.shape[-1], v.shape[-1]
    lead, L, S = shape[:-2], shape[-2], shape[-1]
    rows, cols = -(-L // ROWS) * ROWS, -(-S // COLS) * COLS
    alive = (lse != -np.inf)[..., None]
    dout = np.where(alive, dout, 0)
    delta = (dout * np.where(alive, out, 0)).sum(-1, keepdims=True)
    dl = np.zeros_like(delta) if dlse is None else np.where(alive, dlse[..., None], 0)
    lse_ = np.where(alive, lse[..., None], 0)
    dsink = None
    if o.sink is not None:
        sink = o.sink[:, None, None]
        p_sink = np.where(sink == -np.inf, 0, np.exp(sink - lse_))
        dsink = (p_sink * (dl - delta)).sum((0, 2, 3))
        if bug == "dsink once a tile of keys":
            dsink = dsink * (cols // COLS)
    seen_by = padded(attended(shape, o, bug), rows, cols)
    filling = "constant"
    if bug == "padding rows enter":
        filling, seen_by = "wrap", padded(attended(shape, o, bug), rows, cols, True)
    q_, dout, delta, dl, lse_ = (padded(x, rows, mode=filling) for x in (q, dout, delta, dl, lse_))
    if bug == "lse of the padding rows not set":
        lse_[..., L:, :], seen_by[..., L:, :] = np.nan, True
    kf, vf = (padded(each_head(x, lead[-1], bug), cols) for x in (k, v))
    bias, drop = (None if x is None else padded(np.broadcast_to(x, shape), rows, cols) for x in (o.bias, o.drop))
    dbias = None if bias is None else np.zeros_like(bias)
    dq = np.zeros((*lead, rows, D), q.dtype)
    dk, dv = np.zeros((*lead, cols, D), q.dtype), np.zeros((*lead, cols, E), q.dtype)
    for j in range(0, end(S, COLS, bug), COLS):
        b = slice(j, j + COLS)
        for i in range(0, rows, ROWS):
            a = slice(i, i + ROWS)
            seen = seen_by[..., a, b]
            if bug == "tiles skipped by their first row" and o.causal and j > i:
                continue
            if bug == "last queries left out" and i + ROWS > L:
                continue
            if not seen.any():
                continue
            s, _, t, scale = logits(q_[..., a, :], kf[..., b, :], None if bias is None else bias[..., a, b], seen, o, bug)
            p = np.exp(s - lse_[..., a, :])
            if bug == "weights normalised tile by tile":
                p = np.where(seen, p / p.sum(-1, keepdims=True), 0)
            d = 1.0 if drop is None else drop[..., a, b if bug != "dropout tile of the first columns" else slice(COLS)]
            if bug == "dv of the last tile of queries":
                dv[..., b, :] = 0
            dv[..., b, :] += over_allowed(swap(p * d), dout[..., a, :], swap(seen))
            dp = np.where(seen, dout[..., a, :] @ swap(vf[..., b, :]), 0) * d
            mean, more = delta[..., a, :], dl[..., a, :]
            if bug == "Delta of the first tile":
                mean = delta[..., :ROWS, :]
            if bug == "Delta tile by tile":
                mean = (p * dp).sum(-1, keepdims=True)
            if bug == "dlse of the first tile":
                more = dl[..., :ROWS, :]
            if bug == "dlse in the first tile of keys alone" and j:
                more = 0.0
            ds = np.where(seen, p * (dp - mean + more), 0)
            if dbias is not None:
                dbias[..., a, b] = ds
            if bug == "dbias a column late" and dbias is not None:
                dbias[..., a, b] = np.roll(ds, 1, -1)
            if t is not None:
                ds = np.where(seen, ds * (1 - t * t), 0)
            if bug == "dk of the last tile of queries":
                dk[..., b, :] = 0
            dk[..., b, :] += scale * over_allowed(swap(ds), q_[..., a, :], swap(seen))
            if bug == "dq of the last tile of keys":
                dq[..., a, :] = 0
            if bug == "dq in the wrong row of the last tile" and i + ROWS > L >= ROWS:
                a = slice(L - ROWS, L)
            dq[..., a, :] += scale * over_allowed(ds, kf[..., b, :], seen)
    dk, dv = sum_of_group("dk", dk[..., :S, :], k, bug), sum_of_group("dv", dv[..., :S, :], v, bug)
    dbias = None if dbias is None else sum_to(dbias[..., :L, :S], o.bias, bug)
    return {"dq": dq[..., :L, :], "dk": dk, "dv": dv, "dbias": dbias, "dsink": dsink}


IMPLEMENTATIONS = {"dense": (dense_forward, dense_backward), "tiles": (tiled_forward, tiled_backward)}


def candidate(implementation="dense", *, align="top_left", forward=None, backward=None, lse=True):
    """A candidate for verify with these bugs in its forward and backward, and a state of its own."""
    state, functions = {}, IMPLEMENTATIONS[implementation]

    def run_forward(
        q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, causal=False, window=None,
        key_lengths=None,
    ):  # fmt: skip
        o = Options(mask, bias, scale, softcap, sink, dropout_mask, causal, window, key_lengths, align, v.shape[-1], state)
        with np.errstate(**QUIET):
            out, log = functions[0](q, k, v, o, forward)
        return (out, log) if lse else out

    def run_backward(
        dout, q, k, v, *, out, lse, dlse=None, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None,
        causal=False, window=None, key_lengths=None,
    ):  # fmt: skip
        o = Options(mask, bias, scale, softcap, sink, dropout_mask, causal, window, key_lengths, align, v.shape[-1], state)
        with np.errstate(**QUIET):
            if lse is None:
                out, lse = functions[0](q, k, v, o, forward)
            return functions[1](dout, q, k, v, o, out, lse, dlse, backward)

    return Candidate(f"{implementation}, {align}", run_forward, run_backward, Convention(causal=align))


# --- the table --------------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """One bug, and the check that has to reject it."""

    name: str
    kind: str  # the section of bugs.md, "1" to "11", or "own"
    where: str  # "forward" (the backward may have it too) or "backward" (alone)
    text: str
    case: str | tuple[str, str]  # the case of verify that rejects it; two, in this order, where it takes two calls
    tensors: str  # what they find wrong
    bug: str | None = None  # the line in the code above, where it is not the mutant's name
    tiles: bool = False
    bottom_right: bool = False

    def is_named(self, said, texts):
        """Whether a diagnosis, or what is said of a tensor, names this bug."""
        patterns, told = NAMED.get(self.name, ()), TOLD.get(self.name)
        return any(fnmatch.filter(said, p) for p in patterns) or (told is not None and any(told in text for text in texts))

    @property
    def cases(self):
        return (self.case,) if isinstance(self.case, str) else self.case

    @property
    def align(self):
        return "bottom_right" if self.bottom_right else "top_left"

    @property
    def implementation(self):
        return "tiles" if self.tiles else "dense"


def make(name, *, undone=False):
    """The candidate of a row of MUTANTS, or the same with its bug undone."""
    mutant = MUTANTS[name]
    bug = None if undone else mutant.bug or name
    forward = bug if mutant.where == "forward" else None
    return candidate(mutant.implementation, align=mutant.align, forward=forward, backward=bug)


MUTANTS: dict[str, Mutant] = {}
TILES, BOTTOM_RIGHT = {"tiles": True}, {"bottom_right": True}


def _add(kind, where, rows):
    for name, (text, case, tensors, *more) in rows.items():
        assert name not in MUTANTS, name
        MUTANTS[name] = Mutant(name, kind, where, text, case, tensors, **(more[0] if more else {}))


_add("1", "forward", {
    "anchored at key 0": ("top-left where bottom-right is meant", "causal bottom_right + L < S", "out lse", BOTTOM_RIGHT),
    "shift never negative": ("S - L cut off at 0", "causal bottom_right + L > S", "out lse", BOTTOM_RIGHT),
    "shift of the other sign": ("L - S for S - L", "causal bottom_right", "out lse", BOTTOM_RIGHT),
    "causal excludes the own key": ("j < i", "causal top_left", "out lse"),
    "causal sees one ahead": ("j <= i + 1", "causal top_left", "out lse"),
    "causal block by block": ("the own block is seen in full", "causal top_left", "out lse"),
    "causal the other way": ("j >= i", "causal top_left", "out lse"),
    "causal dropped beside a mask": ("the given mask replaces it", "causal bottom_right + mask array", "out lse", BOTTOM_RIGHT),
    "causal dropped beside dropout": ("a path without causality", "causal top_left + dropout_mask", "out lse"),
    "causal dropped beside a bias": ("a path without causality", "causal top_left + bias BHLS", "out lse"),
    "causal dropped beside key_lengths": ("one mask wins", "causal top_left + key_lengths", "out lse"),
    "window counts one more": ("i - j <= W where < is meant", "window", "out lse"),
    "window's ends swapped": ("(right, left)", "window", "out lse"),
    "window symmetric": ("looks ahead as far as back", "window", "out lse"),
    "window of the wrong sign": ("+left for -left", "window", "out lse"),
    "window of 0 is no limit": ("right = 0 taken for None", "window (5, 0)", "out lse"),
    "window ignores the alignment": ("counted from key 0", "window bottom_right", "out lse", BOTTOM_RIGHT),
})  # fmt: skip
_add("2", "forward", {
    "mask before the softcap": ("-inf becomes -softcap", "mask array + softcap", "out lse"),
    "mask multiplied": ("a masked key has logit 0", "mask array", "out lse"),
    "filled with +inf": ("-float('-inf')", "mask array", "out lse"),
    "mask ignored": ("the result of masked_fill thrown away", "mask array", "out lse"),
    "mask inverted": ("True = masked", "mask array", "out lse"),
    "mask added as 0 and 1": ("a boolean mask taken as a bias", "mask array", "out lse"),
    "mask or causal": ("either of two masks is enough", "causal bottom_right + mask array", "out lse", BOTTOM_RIGHT),
    "mask after the softmax": ("not normalised again", "mask array", "out"),
    "score 0 is masked": ("every score of 0 set to -inf", "scale 0", "out lse"),
    "mask transposed where L = S": ("(S, L)", "mask array, L = S", "out lse"),
    "bias as a boolean mask": ("what is not 0 is masked", "bias BHLS", "out lse"),
    "bias before the softcap": ("the order of (2) and (3)", "softcap + bias BHLS", "out lse"),
    "bias scaled": ("added before the scale", "bias BHLS", "out lse"),
    "one key too many": ("j <= n", "key_lengths", "out lse"),
    "padding on the left": ("the last n keys", "key_lengths", "out lse"),
    "lengths on the queries": ("the wrong axis", "key_lengths", "out lse"),
    "length 0 is no limit": ("a length of 0 taken for none", "key_lengths 0 and S", "out lse"),
})  # fmt: skip
_add("3", "forward", {
    "bias indexed by (b H + h) mod its length": ("strides of a bias (B, 1, L, S)", "bias BLS", "out lse"),
    "bias read flat": ("a bias (L, 1) read as (L, S)", "bias L", "out lse"),
    "bias of the first sequence": ("batch stride 0", "bias BS", "out lse"),
    "bias of the first row": ("row stride 0", "bias BHL", "lse"),
    "mask of the first sequence": ("batch stride 0", "mask array", "out lse"),
    "mask of the first head": ("head stride 0", "mask HLS", "out lse"),
    "mask read flat": ("a mask (B, 1, L, S) read as (L, S)", "mask array", "out lse"),
    "mask of one column ignored": ("a mask (L, 1)", "mask of one column", "out lse"),
    "mask of one row for the first row": ("a mask (1, 1, 1, S)", "mask of one row", "out lse"),
    "lengths of the first sequence": ("batch stride 0", "key_lengths", "out lse"),
    "first sequence alone": ("zeros for the others", "plain", "out"),
    "v read flat": ("a stride of 0 not known", "strided", "out"),
    "q read flat": ("the memory of a transposed view", "strided", "out lse"),
    "k laid out as (B, S, H, D)": ("the wrong layout", "plain", "out lse"),
    "batch and heads swapped": ("(H, B, L, E) written out", "plain", "out"),
    "out of q's width": ("an output like q", "E != D", "out"),
    "v padded to D": ("and not cut", "E < D", "out"),
    "out in float64": ("a constant of NumPy that promotes", "plain", "out"),
    "scale a NumPy float64": ("np.sqrt(D) promotes all", "plain", "out lse"),
    "lse with a last axis of 1": ("keepdims left on", "plain", "lse"),
})  # fmt: skip
_add("4", "forward", {
    "keys past the end read": ("what lies behind k and v", "plain", "out lse", TILES),
    "padded keys allowed": ("the mask padded with True", "plain", "out lse", TILES),
    "last tile left out": ("S // tile tiles", "plain", "out lse", TILES),
    "tail of one left out": ("a last tile of one key", "one more than a tile", "out lse", TILES),
    "keys of the last tile counted by S % tile": ("0 where S is a multiple", "whole tiles", "out lse", TILES),
    "rows of the last tile counted by L % tile": ("0 where L is a multiple", "whole tiles", "out lse", TILES),
    "tiles skipped by their first row": ("the last rows see more", "causal top_left", "out lse", TILES),
    "tiles skipped by their last row": ("the first rows of a window see more", "window", "out lse", TILES),
    "bias tile of the first rows": ("no row offset", "bias BHLS", "out lse", TILES),
    "bias tile of the first columns": ("no column offset", "bias S", "out lse", TILES),
    "dropout tile of the first columns": ("no column offset", "dropout_mask", "out", TILES),
    "sum not rescaled": ("online softmax", "plain", "out lse", TILES),
    "out not rescaled": ("online softmax", "plain", "out", TILES),
    "max of the last tile": ("not of all so far", "inputs x30", "out", TILES),
    "sink once a tile of keys": ("counted too often", "sink", "out lse", TILES),
})  # fmt: skip
_add("5", "forward", {
    "no max": ("exp of the scores themselves", "inputs x30", "out lse"),
    "max not below -5e4": ("a sentinel that is not low enough", "scores of -1e5", "out lse"),
    "first max -5e4": ("the same in tiles", "scores of -1e5", "out lse", TILES),
    "first max 0": ("a max that cannot be negative", "scores of -1e5", "out lse", TILES),
    "max over all rows": ("one shift for the whole array", "inputs x30", "out lse"),
    "max over masked keys too": ("what is masked pushes the rest to 0", "inputs x30 + mask array", "out lse"),
    "max before a negative scale": ("the smallest score instead", "inputs x30 + negative scale", "out lse"),
    "max without the sink": ("exp(sink - max) overflows", "sinks far off", "lse"),
    "tanh by exponentials": ("inf / inf", "inputs x30 + softcap", "out lse"),
    "filled with -1e4": ("above the scores that are allowed", "scores of -1e5 and a mask", "out lse"),
    "1e-6 beside the sum": ("rows do not sum to 1", "S = 1", "out"),
    "weights in half precision": ("rounded for the product, not for the sum", "plain", "out"),
    "scores in half precision": ("rounded", "plain", "out lse"),
    "scale of 1 by default": ("1/sqrt(D) forgotten", "plain", "out lse"),
    "divided by the scale": ("sqrt(D) for 1/sqrt(D)", "plain", "out lse"),
    "scale 1/D": ("no root", "plain", "out lse"),
    "scores clamped": ("to +-50, against overflow", "inputs x30", "out lse"),
    "scale 1/sqrt(E)": ("the values' width", "E != D", "out lse"),
    "scale of the padded width": ("D filled up to a multiple of 8", "D = 17", "out lse"),
    "scale without its sign": ("|scale|", "negative scale", "out lse"),
    "given scale ignored": ("the default", "negative scale", "out lse"),
    "scale 0 is no scale": ("taken for None", "scale 0", "out lse"),
    "softcap ignored": ("no (2)", "softcap", "out lse"),
    "softcap before the scale": ("the order of (1) and (2)", "softcap", "out lse"),
    "softcap not multiplied back": ("tanh(s / c)", "softcap", "out lse"),
    "no softmax": ("weights = scores", "plain", "out"),
    "softmax over the sequences": ("axis 0", "plain", "out lse"),
    "softmax over the queries": ("axis -2", "plain", "out lse"),
    "sink ignored": ("not in the sum", "sink", "out lse"),
    "lse without the sink": ("the sum of before it", "sink", "lse"),
    "lse without the max": ("log of the shifted sum", "plain", "lse"),
    "lse in base 2": ("log2", "plain", "lse"),
    "lse of the weights": ("not of the scores", "plain", "lse"),
})  # fmt: skip
_add("6", "forward", {
    "dead rows unguarded": ("-inf - -inf", "dead rows", "out lse"),
    "sum of 0 unguarded": ("0 / 0", "dead rows", "out"),
    "empty tiles unguarded": ("-inf - -inf in a tile", "segments", "out lse", TILES),
    "no key at all": ("0 / 0 where S = 0", "S = 0", "out", {**TILES, "bug": "sum of 0 unguarded"}),
    "filled with finfo.min": ("a dead row is the mean of v", "dead rows", "out lse"),
    "filled with -1e9": ("a dead row is the mean of v", "dead rows", "out lse"),
    "lse of a dead row 0": ("log 1", "dead rows", "lse"),
    "lse of a dead row -inf in spite of a sink": ("the sink is a logit", "dead rows + sink", "lse"),
    "NaN weights are 0": ("hides a NaN that is seen", "NaN in a key that is seen", "out"),
    "NaN output is 0": ("hides a NaN that is seen", "NaN seen later", "out"),
    "0 times NaN": ("a masked value", "NaN behind the mask", "out"),
    "mask added to NaN": ("a masked key", "NaN behind the mask", "out lse"),
})  # fmt: skip
_add("7", "backward", {
    "mean of the group in dv": ("not the sum", "G < H", "dv"),
    "mean of the group in dk": ("not the sum", "G < H", "dk"),
    "first head of the group in dk": ("not the sum", "G < H", "dk"),
    "last head of the group in dv": ("= for +=", "G < H", "dv"),
    "first head of one group in dk": ("a path for G = 1", "G = 1", "dk"),
    "backward always causal": ("whatever the flag", "plain", "dq dk dv", {"bug": "always causal"}),
    "backward anchored at key 0": (
        "another alignment than the forward's", "causal bottom_right", "dq dk dv",
        {"bug": "anchored at key 0", **BOTTOM_RIGHT}),
    "softmax backward by dropped weights": ("p for p drop", "dropout_mask", "dq dk"),
    "dp without dropout": ("no (6)", "dropout_mask", "dq dk"),
    "Delta of the output before dropout": ("another output", "dropout_mask", "dq dk"),
    "Delta 0": ("no row dot product", "plain", "dq dk"),
    "backward without the sink": ("the sum of before it", "sink", "dq dk dv", {"bug": "lse of before the sink"}),
    "dlse in base 2": ("natural log expected", "dlse", "dq dk"),
    "padding rows enter": ("their dout is not 0", "plain", "dk dv", TILES),
    "lse of the padding rows not set": ("0 times NaN", "plain", "dk dv", TILES),
    "divided by the largest |dout|": ("0 / 0 without a cotangent", "every row dead", "dv"),
    "dead rows NaN in the backward": ("the output alone was cleared", "dead rows", "dv"),
    "dout read flat": ("a stride of 0 not known", "strided", "dq dk dv"),
    "dv of k's width": ("a buffer like k", "E != D", "dv"),
    "dbias in float64": ("another dtype than the bias", "bias LS", "dbias"),
})  # fmt: skip
_add("8", "forward", {
    "heads interleaved": ("head h reads h % G", "G < H", "out lse"),
    "keys tiled, values repeated": ("h % G for k alone", "G < H", "out lse"),
    "values tiled, keys repeated": ("h % G for v alone", "G < H", "out"),
    "head h reads h // G": ("for h // (H // G)", "G < H", "out lse"),
    "groups in reverse": ("the wrong keys", "plain", "out lse"),
    "heads merged without a transpose": ("reshape of (L, H, E)", "plain", "out"),
    "sinks in reverse": ("another head's", "sink", "out lse"),
    "sink of the first head": ("for all", "sink", "out lse"),
    "dropout of the first head": ("for all", "dropout_mask", "out"),
    "dropout ignored": ("no (6)", "dropout_mask", "out"),
    "dropout without 1/(1-p)": ("a boolean mask", "dropout_mask", "out"),
    "sum after dropout": ("normalised by what is left", "dropout_mask", "out"),
})  # fmt: skip
_add("8", "backward", {
    "groups interleaved in dk": ("(H / G, G) for (G, H / G)", "G < H", "dk"),
    "groups interleaved in dv": ("(H / G, G) for (G, H / G)", "G < H", "dv"),
    "heads interleaved in the backward": ("h % G", "G < H", "dq dk dv", {"bug": "heads interleaved"}),
    "dlse of the first head of a group": ("for the group", "G < H + dlse", "dq dk"),
    "dq of the first head": ("for all", "plain", "dq"),
    "dv of its neighbour head": ("h + 1", "plain", "dv"),
})  # fmt: skip
_add("9", "forward", {
    "q scaled in place": ("the caller's q", "plain", "out"),
    "NaN in k cleaned in place": ("the caller's k", "NaN behind the mask", "out"),
    "bias masked in place": ("the caller's bias", "float64 mask array + bias BHLS", "out"),
    "lengths counted up in place": ("the caller's lengths", "key_lengths", "out"),
    "mask of the last call": ("kept by its shape", ("mask array", "mask array + dropout_mask"), "out lse"),
    "lengths of the first call": ("kept", ("key_lengths", "causal top_left + key_lengths"), "out lse"),
    "scale of the last call": ("kept", ("negative scale", "plain"), "out lse"),
})  # fmt: skip
_add("9", "backward", {
    "dk added to that of the last call": ("a buffer never cleared", ("plain", "dlse"), "dk"),
    "dead dout cleared in place": ("the caller's dout", "dead rows", "dq"),
    "lse cleared in place": ("what the forward returned", "dead rows", "dq"),
})  # fmt: skip
_add("own", "backward", {
    "backward without the mask": ("the forward has it", "mask array", "dq dk dv", {"bug": "mask ignored"}),
    "backward mask of the first sequence": ("batch stride 0", "mask array", "dq dk dv", {"bug": "mask of the first sequence"}),
    "backward causal excludes the own key": ("j < i", "causal top_left", "dq dk dv", {"bug": "causal excludes the own key"}),
    "backward window counts one more": ("off by one", "window", "dq dk dv", {"bug": "window counts one more"}),
    "backward of one key too many": ("j <= n", "key_lengths", "dq dk dv", {"bug": "one key too many"}),
    "backward without the bias": ("weights made again", "bias BHLS", "dq dk dv dbias", {"bug": "bias ignored"}),
    "backward without the softcap": ("weights made again", "softcap", "dq dk dv", {"bug": "softcap ignored"}),
    "backward of the default scale": ("weights made again", "negative scale", "dq dk dv", {"bug": "given scale ignored"}),
    "backward scale of the padded width": (
        "only D % 8 == 0 is right", "D = 17", "dq dk dv",
        {"bug": "scale of the padded width"}),
    "shifted by the max, not by lse": ("not normalised", "plain", "dq dk dv"),
    "weights below 1e-4 dropped": ("taken for 0", "plain", "dq dk dv"),
    "dv of half weights": ("rounded too early", "plain", "dv"),
    "dv of weights before dropout": ("w for p", "dropout_mask", "dv"),
    "dropout twice in dv": ("drop^2", "dropout_mask", "dv"),
    "dropout twice in dp": ("drop^2", "dropout_mask", "dq dk"),
    "dropout of the first sequence in the backward": ("batch stride 0", "dropout_mask", "dq dk dv"),
    "dv of dout's mean": ("over the queries", "plain", "dv"),
    "dp clipped": ("a gradient that is large is right too", "inputs x5", "dq dk"),
    "Delta a mean": ("over E", "plain", "dq dk"),
    "Delta over the queries": ("the wrong axis", "plain", "dq dk"),
    "Delta of D columns": ("out has E", "E != D", "dq dk"),
    "Delta of the next row": ("off by one", "plain", "dq dk"),
    "Delta of an output in bfloat16": ("rounded too early", "plain", "dq dk"),
    "Delta not times p": ("p dp - Delta", "plain", "dq dk"),
    "ds in bfloat16": ("rounded too early", "plain", "dq dk"),
    "masked pairs keep their gradient": ("p forgotten", "mask array", "dq dk"),
    "dlse ignored": ("lse has no gradient", "dlse", "dq dk"),
    "dlse of the other sign": ("with Delta", "dlse", "dq dk"),
    "dlse not times p": ("added behind the softmax", "dlse", "dq dk"),
    "dlse times the scale": ("as if it were a score", "dlse", "dq dk"),
    "dlse times dropout": ("lse knows of none", "dropout_mask + dlse", "dq dk"),
    "dsink without p_sink": ("a sum of Delta", "sink", "dsink"),
    "dsink of before the sink in lse": ("p_sink of another sum", "sink", "dsink"),
    "dsink of the other sign": ("+Delta", "sink", "dsink"),
    "dsink without Delta": ("dlse alone", "sink + dlse", "dsink"),
    "dsink without dlse": ("Delta alone", "sink + dlse", "dsink"),
    "dsink of dead rows lost": ("their lse is the sink", "dead rows + sink", "dsink"),
    "dsink of the first sequence": ("not summed", "sink", "dsink"),
    "dsink of the first query": ("not summed", "sink", "dsink"),
    "dsink a mean": ("not a sum", "sink", "dsink"),
    "dsink summed over the heads": ("the wrong axes", "sink", "dsink"),
    "dbias of the first sequence": ("not summed", "bias LS", "dbias"),
    "dbias of the last row": ("= for +=", "bias S", "dbias"),
    "dbias a mean": ("not a sum", "bias LS", "dbias"),
    "dbias not summed over the heads": ("the shape of the scores", "bias BLS", "dbias"),
    "dbias behind the softcap": ("the derivative of (2) too early", "softcap + bias BHLS", "dbias"),
    "dbias times the scale": ("the bias is not scaled", "bias BHLS", "dbias"),
    "dbias without Delta": ("p dp", "bias BHLS", "dbias"),
    "dbias of the dropped weights": ("ds drop", "dropout_mask + bias BHLS", "dbias"),
    "softcap derivative forgotten": ("no (2)", "softcap", "dq dk"),
    "softcap derivative 1 - t": ("no square", "softcap", "dq dk"),
    "softcap derivative of the capped score": ("tanh twice", "softcap", "dq dk"),
    "softcap derivative over the cap": ("d tanh(s / c) / ds", "softcap", "dq dk"),
    "softcap derivative of the raw score": ("1 - s^2", "softcap", "dq dk"),
    "softcap derivative of the score with its bias": ("behind (3)", "softcap + bias BHLS", "dq dk"),
    "scale squared in dk": ("q was scaled already", "plain", "dk"),
    "dq without the scale": ("forgotten", "plain", "dq"),
    "dq of the default scale": ("the given one forgotten", "negative scale", "dq"),
    "ds transposed where L = S": ("ds q for ds^T q", "mask array, L = S", "dk"),
    "dq of the first S queries": ("a loop to the wrong end", "L > S", "dq"),
    "dk of the first L keys": ("a loop to the wrong end", "L < S", "dk"),
    "dq by the first sequence's keys": ("batch stride 0", "plain", "dq"),
    "dk and dv exchanged": ("the order of the results", "plain", "dk dv"),
    "dk minus its mean": ("over D", "plain", "dk"),
    "gradients summed over the batch": ("as for a parameter", "plain", "dk"),
    "dq in float64": ("promoted", "plain", "dq"),
    "dq not returned": ("None", "plain", "dq"),
    "0 times NaN in dq": ("a masked key", "NaN behind the mask", "dq"),
    "0 times NaN in dk": ("a dead query", "NaN in a dead query", "dk"),
    "Delta of masked values": ("p dp where dp may be NaN", "NaN behind the mask", "dq dk"),
    "nothing done without dout": ("lse has a gradient of its own", "dlse alone", "dq dk"),
    "tiles skipped by their first row in the backward": (
        "the last rows see more", "causal top_left", "dq dk dv",
        {"bug": "tiles skipped by their first row", **TILES}),
    "last tile of keys left out of the backward": (
        "S // tile tiles", "plain", "dq dk dv",
        {"bug": "last tile left out", **TILES}),
    "last queries left out": ("L // tile tiles", "plain", "dq dk dv", TILES),
    "tail of one left out of the backward": (
        "a last tile of one key", "one more than a tile", "dq dk dv",
        {"bug": "tail of one left out", **TILES}),
    "dropout tile of the first columns in the backward": (
        "no offset", "dropout_mask", "dq dk dv",
        {"bug": "dropout tile of the first columns", **TILES}),
    "weights normalised tile by tile": ("no lse", "plain", "dq dk dv", TILES),
    "dv of the last tile of queries": ("= for +=", "plain", "dv", TILES),
    "dk of the last tile of queries": ("= for +=", "plain", "dk", TILES),
    "dq of the last tile of keys": ("= for +=", "plain", "dq", TILES),
    "dq in the wrong row of the last tile": ("a tile moved back to fit", "plain", "dq", TILES),
    "Delta of the first tile": ("no offset", "plain", "dq dk", TILES),
    "Delta tile by tile": ("not of the whole row", "plain", "dq dk", TILES),
    "dlse of the first tile": ("no offset", "dlse", "dq dk", TILES),
    "dlse in the first tile of keys alone": ("counted once", "dlse", "dq dk", TILES),
    "dsink once a tile of keys": ("counted too often", "sink", "dsink", TILES),
    "dbias a column late": ("off by one", "bias BHLS", "dbias", TILES),
})  # fmt: skip

_add("12", "forward", {
    "operands in TF32": ("all that enters a product", "plain", "out"),
    "inputs in bfloat16": ("as they are read", "plain", "out lse"),
    "weights in bfloat16": ("rounded for the product", "plain", "out"),
    "scores in bfloat16": ("as they are stored", "plain", "out lse"),
    "exp off by 1e-4": ("a short polynomial", "plain", "out lse"),
    "exp off by 1e-5": ("a short polynomial", "plain", "out"),
    "scale off by 1e-4": ("a constant with four digits", "plain", "out"),
    "scale off by 1e-5": ("a constant with five digits", "inputs x5", "lse"),
    "one key missing from one sum": ("the first of the first row", "plain", "out lse"),
    "one element of out off by 1e-4": ("a store that races", "plain", "out"),
})  # fmt: skip
_add("12", "backward", {
    "lse kept in half precision": ("saved low", "plain", "dq dk dv"),
    "dv of bfloat16 weights": ("rounded for the product", "plain", "dv"),
    "dp in bfloat16": ("as it is stored", "plain", "dq dk"),
    "dq off by 1e-3": ("a factor", "plain", "dq"),
    "dv off by 1e-5": ("a factor", "plain", "dv"),
})  # fmt: skip


# What a diagnosis has to say of a bug to have named it (a * stands for anything, as for the size of a tile that only a larger
# problem would tell), and what is said of a tensor where no diagnosis is needed.
NAMED: dict[str, tuple[str, ...]] = {
    "anchored at key 0": ("causal=top_left",),
    "shift never negative": ("S - L is cut off at 0", "causal=top_left",),
    "shift of the other sign": ("queries shifted by L - S instead of S - L",),
    "causal excludes the own key": ("causal excludes the own key",),
    "causal sees one ahead": ("causal sees one key ahead",),
    "causal block by block": ("causal by whole blocks of 16 keys",),
    "causal the other way": ("causal runs the other way",),
    "causal dropped beside a mask": ("causal is ignored",),
    "causal dropped beside dropout": ("causal is ignored",),
    "causal dropped beside a bias": ("causal is ignored",),
    "causal dropped beside key_lengths": ("causal is ignored",),
    "window counts one more": ("window counts one more key",),
    "window's ends swapped": ("window's ends are exchanged",),
    "window symmetric": ("window looks ahead as far as back",),
    "window of the wrong sign": ("window has the wrong sign",),
    "window of 0 is no limit": ("window's 0 is taken for no limit",),
    "window ignores the alignment": ("window is anchored at key 0", "causal=top_left",),
    "mask before the softcap": ("softcap=after_mask",),
    "mask multiplied": ("the mask multiplies the scores",),
    "filled with +inf": ("masked scores are +inf",),
    "mask ignored": ("mask is ignored",),
    "mask inverted": ("mask=drop",),
    "mask added as 0 and 1": ("the mask is added as 0 and 1",),
    "mask or causal": ("either the mask or causal is enough",),
    "mask after the softmax": ("masked weights are not normalised again",),
    "score 0 is masked": ("a score of exactly 0 is masked",),
    "mask transposed where L = S": ("mask is transposed",),
    "bias as a boolean mask": ("bias is a boolean mask",),
    "bias before the softcap": ("softcap=after_bias",),
    "bias scaled": ("bias is scaled",),
    "one key too many": ("one key too many",),
    "padding on the left": ("padding is taken to be on the left",),
    "lengths on the queries": ("lengths count queries, not keys",),
    "length 0 is no limit": ("length 0 is taken for no limit",),
    "bias indexed by (b H + h) mod its length": ("bias indexed by (b H + h) modulo its length",),
    "bias read flat": ("bias read as (L, S), its broadcast axes ignored",),
    "bias of the first sequence": ("bias of the first sequence for all",),
    "bias of the first row": ("bias of the first row for all",),
    "mask of the first sequence": ("mask of the first sequence for all",),
    "mask of the first head": ("mask of the first head for all",),
    "mask read flat": ("mask read as (L, S), its broadcast axes ignored",),
    "mask of one column ignored": ("mask of one column is ignored",),
    "mask of one row for the first row": ("mask of one row holds for the first row alone",),
    "lengths of the first sequence": ("lengths of the first sequence for all",),
    "first sequence alone": ("only the first sequence is computed",),
    "v read flat": ("v is read as if it were contiguous",),
    "q read flat": ("q is read as if it were contiguous",),
    "k laid out as (B, S, H, D)": ("k is laid out as (B, S, H, D)",),
    "batch and heads swapped": ("batch and heads are exchanged",),
    "padded keys allowed": ("padding to a multiple of 16 keys is counted in the sum",),
    "last tile left out": ("the last * keys or less, a partial tile, are left out",),
    "tail of one left out": ("a tail of one key behind tiles of * is left out",),
    "keys of the last tile counted by S % tile": ("a last tile of 16 keys is counted by S % 16",),
    "rows of the last tile counted by L % tile": ("a last tile of 32 queries is counted by L % 32",),
    "tiles skipped by their first row": ("causal tiles of 32 x 16 are skipped by their first row",),
    "tiles skipped by their last row": ("window tiles of 32 x 16 are skipped by their last row",),
    "bias tile of the first rows": ("bias of the first 32 rows for every tile",),
    "bias tile of the first columns": ("bias of the first 16 columns for every tile",),
    "dropout tile of the first columns": ("dropout mask of the first 16 columns for every tile",),
    "sum not rescaled": ("the sum is not rescaled between tiles of 16 keys",),
    "out not rescaled": ("the output is not rescaled between tiles of 16 keys",),
    "sink once a tile of keys": ("sink is counted once a tile of 16 keys",),
    "no max": ("no maximum is subtracted",),
    "max not below -5e4": ("the maximum is not below -5e4", "the maximum is not below 0",),
    "first max -5e4": ("the maximum is not below -5e4", "the maximum is not below 0",),
    "first max 0": ("the maximum is not below -5e4", "the maximum is not below 0",),
    "max over all rows": ("one maximum for all rows",),
    "max over masked keys too": ("the maximum is taken over masked keys too",),
    "max before a negative scale": ("the maximum is taken before a negative scale",),
    "max without the sink": ("the maximum leaves the sink out",),
    "tanh by exponentials": ("tanh is made of exponentials that overflow",),
    "filled with -1e4": ("masked scores are -1e4",),
    "1e-6 beside the sum": ("1e-06 is added to the sum",),
    "scale of 1 by default": ("scale=none",),
    "divided by the scale": ("scale is sqrt(D), not 1/sqrt(D)",),
    "scale 1/D": ("scale is 1/D",), "scores clamped": ("scores are cut off at +-50",),
    "scale 1/sqrt(E)": ("scale is 1/sqrt(E)",),
    "scale of the padded width": ("scale of a width padded to a multiple of 8",),
    "scale without its sign": ("scale loses its sign",),
    "given scale ignored": ("scale is the default, whatever is given",),
    "scale 0 is no scale": ("scale 0 is taken for the default",),
    "softcap ignored": ("softcap is ignored",),
    "softcap before the scale": ("softcap comes before the scale",),
    "softcap not multiplied back": ("softcap is not multiplied back",),
    "no softmax": ("no softmax at all",),
    "softmax over the sequences": ("the softmax runs over the sequences",),
    "softmax over the queries": ("the softmax runs over the queries",),
    "sink ignored": ("sink is ignored",),
    "lse without the sink": ("sink=not_in_lse",),
    "lse without the max": ("lse leaves the maximum out",),
    "lse in base 2": ("lse=log2",),
    "lse of the weights": ("lse of the weights, not of the scores",),
    "dead rows unguarded": ("dead rows are NaN",),
    "sum of 0 unguarded": ("dead rows are NaN",),
    "empty tiles unguarded": ("dead rows are NaN*",),
    "no key at all": ("dead rows are NaN",),
    "filled with finfo.min": ("dead_out=mean_v",),
    "filled with -1e9": ("dead_out=mean_v",),
    "lse of a dead row 0": ("dead_lse=zero",),
    "lse of a dead row -inf in spite of a sink": ("dead rows have lse -inf in spite of the sink",),
    "NaN weights are 0": ("NaN weights become 0",),
    "NaN output is 0": ("NaN in the output becomes 0",),
    "0 times NaN": ("masked_nan=poisons",),
    "mask added to NaN": ("-inf is added to masked scores, and NaN stays NaN",),
    "mean of the group in dv": ("dv is the mean of a group",),
    "mean of the group in dk": ("dk is the mean of a group",),
    "first head of the group in dk": ("dk of the first head of a group alone",),
    "last head of the group in dv": ("dv of the last head of a group alone",),
    "first head of one group in dk": ("dk of the first head of a group alone",),
    "backward always causal": ("always causal",),
    "backward anchored at key 0": ("causal=top_left",),
    "softmax backward by dropped weights": ("the softmax backward uses weights after dropout",),
    "dp without dropout": ("dp knows no dropout",),
    "Delta of the output before dropout": ("Delta of the output before dropout",),
    "Delta 0": ("Delta is missing",),
    "backward without the sink": ("weights of the backward leave the sink out",),
    "dlse in base 2": ("dlse is taken in base 2",),
    "dead rows NaN in the backward": ("dead rows are NaN in the backward",),
    "dout read flat": ("dout is read as if it were contiguous",),
    "dv of k's width": ("dv has k's width",),
    "heads interleaved": ("heads=tile",),
    "keys tiled, values repeated": ("keys are tiled over the heads, values are not",),
    "values tiled, keys repeated": ("values are tiled over the heads, keys are not",),
    "head h reads h // G": ("head h reads key head h // G",),
    "groups in reverse": ("key heads are read in reverse",),
    "heads merged without a transpose": ("heads are merged without a transpose",),
    "sinks in reverse": ("sinks are read in reverse",),
    "sink of the first head": ("sink of the first head for all",),
    "dropout of the first head": ("dropout mask of the first head for all",),
    "dropout ignored": ("dropout is ignored",),
    "dropout without 1/(1-p)": ("dropout is not divided by 1 - p",),
    "sum after dropout": ("the sum is taken after dropout",),
    "groups interleaved in dk": ("dk sums heads g, g + G, ..., not those of its group",),
    "groups interleaved in dv": ("dv sums heads g, g + G, ..., not those of its group",),
    "heads interleaved in the backward": ("heads=tile",),
    "dlse of the first head of a group": ("dlse of the first head of a group for all",),
    "dq of the first head": ("dq of the first head for all",),
    "dv of its neighbour head": ("dv of the neighbouring head",),
    "mask of the last call": ("the mask of an earlier call is used",),
    "lengths of the first call": ("the key_lengths of an earlier call is used",),
    "scale of the last call": ("the scale of an earlier call is used",),
    "dk added to that of the last call": ("dk is added to that of the call before",),
    "backward without the mask": ("mask is ignored",),
    "backward mask of the first sequence": ("mask of the first sequence for all",),
    "backward causal excludes the own key": ("causal excludes the own key",),
    "backward window counts one more": ("window counts one more key",),
    "backward of one key too many": ("one key too many",),
    "backward without the bias": ("bias is ignored",),
    "backward without the softcap": ("softcap is ignored",),
    "backward of the default scale": ("scale is the default, whatever is given",),
    "backward scale of the padded width": ("scale of a width padded to a multiple of 8",),
    "shifted by the max, not by lse": ("weights are shifted by the maximum, not by lse",),
    "weights below 1e-4 dropped": ("weights below 1e-4 are taken for 0",),
    "dv of weights before dropout": ("dv is made of weights before dropout",),
    "dropout twice in dv": ("dropout is applied twice in dv",),
    "dropout twice in dp": ("dropout is applied twice to dp",),
    "dropout of the first sequence in the backward": ("dropout mask of the first sequence for all",),
    "dv of dout's mean": ("dv is made of the mean of dout",),
    "dp clipped": ("dp is cut off at 10",),
    "Delta a mean": ("Delta is a mean over E",),
    "Delta over the queries": ("Delta runs over the queries",),
    "Delta of D columns": ("Delta of the first D columns of the output",),
    "Delta of the next row": ("Delta of the next row",),
    "Delta not times p": ("Delta is not multiplied by the weight",),
    "masked pairs keep their gradient": ("neither weight nor mask in the softmax backward",),
    "dlse ignored": ("dlse=ignored",),
    "dlse of the other sign": ("dlse has the other sign",),
    "dlse not times p": ("dlse is not multiplied by the weight",),
    "dlse times the scale": ("dlse is multiplied by the scale",),
    "dlse times dropout": ("dlse is multiplied by dropout",),
    "dsink without p_sink": ("dsink lacks the sink's weight",),
    "dsink of before the sink in lse": ("the sink's weight in dsink is that of a sum without it",),
    "dsink of the other sign": ("dsink has the other sign",),
    "dsink without Delta": ("Delta is missing in dsink",),
    "dsink without dlse": ("dlse is missing in dsink",),
    "dsink of dead rows lost": ("dsink leaves dead rows out",),
    "dsink of the first sequence": ("dsink of the first sequence alone",),
    "dsink of the first query": ("dsink of the first query alone",),
    "dsink a mean": ("dsink is a mean",),
    "dsink summed over the heads": ("dsink is summed over the heads",),
    "dbias of the first sequence": ("dbias of the first sequence alone",),
    "dbias of the last row": ("dbias of the last row alone",),
    "dbias a mean": ("dbias is a mean",),
    "dbias behind the softcap": ("dbias is multiplied by the slope of the softcap",),
    "dbias times the scale": ("dbias is multiplied by the scale",),
    "dbias without Delta": ("Delta is missing in dbias",),
    "dbias of the dropped weights": ("dbias is multiplied by dropout",),
    "softcap derivative forgotten": ("the derivative of the softcap is missing",),
    "softcap derivative 1 - t": ("the derivative of the softcap is 1 - t",),
    "softcap derivative of the capped score": ("the derivative of the softcap takes the tanh of the capped score",),
    "softcap derivative over the cap": ("the derivative of the softcap is divided by the cap",),
    "softcap derivative of the raw score": ("the derivative of the softcap is 1 - (s / cap)^2 of the raw score",),
    "softcap derivative of the score with its bias": ("the derivative of the softcap is taken at the score with its bias",),
    "scale squared in dk": ("dk has the scale twice",),
    "dq without the scale": ("dq lacks the scale",),
    "dq of the default scale": ("dq has the default scale",),
    "ds transposed where L = S": ("dk is made of ds, not of its transpose",),
    "dq of the first S queries": ("dq of rows from S on is missing",),
    "dk of the first L keys": ("dk of keys from L on is missing",),
    "dq by the first sequence's keys": ("dq is made of the keys of the first sequence",),
    "dk and dv exchanged": ("dk and dv are exchanged",),
    "dk minus its mean": ("dk lacks its mean over D",),
    "gradients summed over the batch": ("dk is summed over the batch",),
    "0 times NaN in dq": ("masked_nan=poisons",),
    "0 times NaN in dk": ("masked_nan=poisons",),
    "Delta of masked values": ("masked_nan=poisons",),
    "nothing done without dout": ("nothing is done where dout is 0",),
    "tiles skipped by their first row in the backward": ("causal tiles of 32 x 16 are skipped by their first row",),
    "last tile of keys left out of the backward": ("the last * keys or less, a partial tile, are left out",),
    "last queries left out": ("the last * queries or less, a partial tile, are left out",),
    "tail of one left out of the backward": ("a tail of one key behind tiles of * is left out",),
    "dropout tile of the first columns in the backward": ("dropout mask of the first 16 columns for every tile",),
    "weights normalised tile by tile": ("weights are normalised in each tile of 16 keys",),
    "dv of the last tile of queries": ("dv of the last tile of * queries alone",),
    "dk of the last tile of queries": ("dk of the last tile of * queries alone",),
    "dq of the last tile of keys": ("dq of the last tile of * keys alone",),
    "dq in the wrong row of the last tile": ("dq of the last tile of * queries is written too early",),
    "Delta of the first tile": ("Delta of the first 32 rows for every tile",),
    "Delta tile by tile": ("Delta of each tile of 16 keys alone",),
    "dlse of the first tile": ("dlse of the first 32 rows for every tile",),
    "dlse in the first tile of keys alone": ("dlse is added in the first tile of 16 keys alone",),
    "dsink once a tile of keys": ("dsink is counted once a tile of 16 keys",),
    "dbias a column late": ("dbias is one column late in each tile of 16 keys",),
    "divided by the largest |dout|": ("0 / 0 where dout is 0",),
    "weights in half precision": ("weights rounded to 11 bits*",),
    "scores in half precision": ("scores rounded to 11 bits*",),
    "dv of half weights": ("weights rounded to 11 bits*",),
    "Delta of an output in bfloat16": ("the output rounded to 8 bits before Delta*",),
    "ds in bfloat16": ("dscores rounded to 8 bits*",),
}  # fmt: skip
NAMED |= {
    "operands in TF32": ("*tf32*",), "inputs in bfloat16": ("inputs rounded to 8 bits*",),
    "weights in bfloat16": ("weights rounded to 8 bits*",), "scores in bfloat16": ("scores rounded to 8 bits*",),
    "scale off by 1e-4": ("scale is off by a factor of 1.0001*",),
    "scale off by 1e-5": ("scale is off by a factor of 1.00001*",),
    "lse kept in half precision": ("lse rounded to 11 bits*",), "dv of bfloat16 weights": ("weights rounded to 8 bits*",),
    "dp in bfloat16": ("dweights rounded to 8 bits*",), "dq off by 1e-3": ("dq is 1.001 times*",),
    "dv off by 1e-5": ("dv is 1.00001 times*",),
}  # fmt: skip
TOLD: dict[str, str] = {
    "out of q's width": "has shape", "v padded to D": "has shape", "out in float64": "has dtype float64",
    "scale a NumPy float64": "has dtype float64", "lse with a last axis of 1": "has shape",
    "dbias in float64": "has dtype float64",
    "q scaled in place": "an input was modified", "NaN in k cleaned in place": "an input was modified",
    "bias masked in place": "an input was modified", "lengths counted up in place": "an input was modified",
    "dead dout cleared in place": "modifies an input", "lse cleared in place": "modifies an input",
    "one element of out off by 1e-4": "in 1 of",
    "dbias not summed over the heads": "has shape", "dq in float64": "has dtype float64",
    "dq not returned": "dq is not returned",
}  # fmt: skip


# --- what verify cannot see ---------------------------------------------------------------------------------------------

REPEATS = {
    "weights of the last forward": "the backward uses what the last forward kept, whosever it was",
    "kept weights cleared after use": "a second backward finds nothing",
    "out a view of a scratch array": "the second call overwrites the result of the first",
}
"""Section 9: a candidate that is right as long as it is called once: forward, backward, and no other in between."""


class Call(NamedTuple):
    """Arguments that have to be refused."""

    text: str
    q: Any
    k: Any
    v: Any
    options: dict[str, Any]
    cotangents: tuple[Any, Any] | None = None  # of the backward, which then has to refuse


def bad_calls():
    """By the bug that accepts it: section 11, forwards and backwards."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape)

    q, k, v, dout, dlse = normal(2, 2, 4, 3), normal(2, 2, 5, 3), normal(2, 2, 5, 3), normal(2, 2, 4, 3), normal(2, 2, 4)
    additive = np.where(rng.random((4, 5)) < 0.7, 0.0, -np.inf)
    return {
        "accepts integers": Call("dtype int64", *(np.rint(x).astype(np.int64) for x in (q, k, v)), {}),
        "accepts mixed dtypes": Call("k in float32", q, k.astype(np.float32), v, {}),
        "shorter of k and v": Call("v longer than k", q, k, normal(2, 2, 6, 3), {}),
        "accepts other heads of v": Call("one head of v", q, k, v[:, :1], {}),
        "accepts heads that do not divide": Call("H = 3, G = 2", normal(2, 3, 4, 3), k, v, {}),
        "accepts an additive mask": Call("mask of 0 and -inf", q, k, v, {"mask": additive}),
        "accepts a mask of rank 3": Call("(B, L, S), lands on H", q, k, v, {"mask": rng.random((2, 4, 5)) < 0.7}),
        "accepts softcap 0": Call("0 is not off", q, k, v, {"softcap": 0.0}),
        "accepts a window of -1": Call("-1 is not no limit", q, k, v, {"window": (-1, 0)}),
        "accepts lengths above S": Call("6 of 5 keys", q, k, v, {"key_lengths": np.array([6, 2])}),
        "accepts a dropout probability": Call("no mask", q, k, v, {"dropout_mask": 0.1}),
        "accepts one sink for all heads": Call("shape (1,)", q, k, v, {"sink": normal(1)}),
        "accepts any dout that broadcasts": Call("dout of one head", q, k, v, {}, (dout[:, :1], None)),
        "accepts any dlse that broadcasts": Call("dlse of one head", q, k, v, {}, (dout, dlse[:, :1])),
    }


# --- what no test can kill ----------------------------------------------------------------------------------------------


class Equivalent(NamedTuple):
    """A change that is no bug, as long as nothing else makes it one."""

    reason: str
    bug: str
    where: str
    passes: tuple[str, ...]  # cases that cannot reject it
    rejected: str = ""  # one that can: a near miss
    lse: bool = True  # whether lse is returned
    tiles: bool = False


EQUIVALENT = {
    "a bias on all keys": Equivalent(
        "softmax does not see what is the same for a whole row; a softcap, a sink or lse does",
        "key bias", "forward", ("plain", "mask array", "G < H", "causal top_left", "bias BHLS"), "softcap", lse=False),
    "+1 on all logits": Equivalent(
        "the same; only lse or a sink tells", "+1 on all logits", "forward", ("plain", "mask array", "dropout_mask", "softcap"),
        "sink", lse=False),
    "Delta as sum dP P": Equivalent(
        "sum_j p_j dp_j = dout . out, with dropout, sink and dlse too",
        "Delta of sum dP P", "backward", ("plain", "dropout_mask", "sink + dlse", "dead rows", "everything", "long")),
    "masked scores of -1e9": Equivalent(
        "exp(-1e9 - max) is 0 unless the max is there too: dead rows",
        "filled with -1e9", "forward", ("mask array", "causal top_left", "mask array + softcap", "inputs x30"), "dead rows"),
    "mask after the softmax, normalised again": Equivalent(
        "the sum over the masked keys cancels, unless one of them is larger by 88, or 745 in float64",
        "max over masked keys too", "forward", ("mask array", "causal top_left"), "inputs x30 + mask array"),
    "tile for repeat where G = H": Equivalent(
        "h // (H // G) = h % G = h", "heads interleaved", "forward", ("plain", "causal top_left", "G = 1"), "G < H"),
    "groups summed in another order where G = H": Equivalent(
        "nothing is summed", "groups interleaved in dk", "backward", ("plain", "G = 1"), "G < H"),
    "scale of E where E = D": Equivalent("the same number", "scale 1/sqrt(E)", "forward", ("plain",), "E != D"),
    "scale of a padded D that is a multiple of 8": Equivalent(
        "the same number", "scale of the padded width", "forward", ("plain", "long"), "D = 17"),
    "a shift cut off at 0 where L < S": Equivalent(
        "S - L is positive", "shift never negative", "forward", ("causal bottom_right",), "causal bottom_right + L > S"),
    "no tail where there is none": Equivalent(
        "S is a multiple of the tile", "last tile left out", "forward", ("whole tiles",), "plain", tiles=True),
    "no rescaling where the max does not grow": Equivalent(
        "one tile", "sum not rescaled", "forward", ("S = 1", "inputs tiny"), "plain", tiles=True),
    "1e-9 beside a sum of at least 1": Equivalent(
        "below half a unit in the last place of float32", "1e-9 beside the sum", "forward", ("plain", "S = 1"), "float64"),
}  # fmt: skip
"""Also equivalent: `b_k` in multi-head attention, forgotten or without a gradient (the tests of layers show it), the initial
state where h0 = 0, w_h or its transpose where it is symmetric, = or += where T = 1. Not to be seeded at these sizes: indices of
32 bits that overflow, races between threads."""


# --- a recurrent layer --------------------------------------------------------------------------------------------------


def rnn_forward(x, h0, w_x, w_h, b, *, lengths, bug=None):
    """((h, h_last), cache) of h_t = tanh(x_t w_x + h_{t-1} w_h + b)."""
    T, h = x.shape[1], h0
    if bug == "initial state ignored":
        h = np.zeros_like(h0)
    if bug == "lengths of the first sequence":
        lengths = np.repeat(lengths[:1], len(lengths))
    states, outs = [h], []
    for t in range(T):
        z = x[:, t] @ w_x + h @ w_h + b
        if bug == "no bias in the first step" and t == 0:
            z = x[:, t] @ w_x + h @ w_h
        if bug == "input and state multiplied":
            z = (x[:, t] @ w_x + b) * (h @ w_h)
        if bug == "w_h transposed":
            z = x[:, t] @ w_x + h @ w_h.T + b
        if bug == "input of the next step":
            z = x[:, min(t + 1, T - 1)] @ w_x + h @ w_h + b
        new, now = np.tanh(z), (t < lengths)[:, None]
        if bug == "one step too many":
            now = (t <= lengths)[:, None]
        out = np.where(now, new, 0)
        if bug == "output goes on after the length":
            out = new
        if bug == "last state repeated after the length":
            out = np.where(now, new, h)
        h = np.where(now, new, h)
        if bug == "state goes on after the length":
            h = new
        states.append(h)
        outs.append(out)
    h_all, h_last = np.stack(outs, 1), h
    if bug == "h_last of step T":
        h_last = h_all[:, -1]
    if bug == "time and batch swapped":
        h_all = np.stack(outs).reshape(h_all.shape)
    return (h_all, h_last), (x, w_x, w_h, states, lengths)


def rnn_backward(d, cache, *, bug=None):
    """A mapping with the gradients of sum(dh * h) + sum(dh_last * h_last)."""
    (dh, carry), (x, w_x, w_h, states, lengths) = d, cache
    if bug == "dh_last ignored":
        carry = np.zeros_like(carry)
    T, dx = x.shape[1], np.zeros_like(x)
    dw_x, dw_h, db = np.zeros_like(w_x), np.zeros_like(w_h), np.zeros_like(w_h[0])
    for t in reversed(range(T)):
        before, h, now = states[t], states[t + 1], (t < lengths)[:, None]
        slope = 1 - h * h
        if bug == "slope of the state before":
            slope = 1 - before * before
        if bug == "slope 1 - h":
            slope = 1 - h
        if bug == "slope forgotten":
            slope = np.ones_like(h)
        if bug == "steps after the length take part":
            now = np.ones_like(now)
        dz = np.where(now, (dh[:, t] + carry) * slope, 0)
        if bug == "dh times slope, carry without":
            dz = np.where(now, dh[:, t] * slope + carry, 0)
        back = dz @ w_h.T
        if bug == "carried by w_h, not its transpose":
            back = dz @ w_h
        if bug == "not carried":
            back = np.zeros_like(back)
        last, carry = carry, np.where(now, back, carry)
        if bug == "carry lost after the length":
            carry = back
        dx[:, t] = dz @ w_x.T
        dw_x += x[:, t].T @ dz
        if bug == "w_h by the new state":
            before = h
        if bug == "= for += in w_h":
            dw_h[...] = 0
        dw_h += before.T @ dz
        if bug == "b of the first sequence":
            dz = dz[:1]
        if bug == "b of the last step alone":
            dz = dz * (t == T - 1)
        db += dz.sum(0)
    if bug == "h0 of one step too few":
        carry = last
    if bug == "dx a step late":
        dx = np.roll(dx, 1, 1)
    return {"x": dx, "h0": carry, "w_x": dw_x, "w_h": dw_h, "b": db}


# --- a multi-head layer -------------------------------------------------------------------------------------------------


def split(x, heads):
    """(B, L, H D) -> (B, H, L, D)"""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def merge(x):
    """(B, H, L, E) -> (B, L, H E)"""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def multi_head_forward(x_q, x_k, x_v, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, *, heads, groups, mask, bug=None):
    """(out, cache)"""
    if bug == "values of x_k":
        x_v = x_k
    if bug == "b_k forgotten":  # no bug: the same for all keys of a row
        b_k = 0 * b_k
    q, k, v = split(x_q @ w_q + b_q, heads), split(x_k @ w_k + b_k, groups), split(x_v @ w_v + b_v, groups)
    if bug == "b_q forgotten":
        q = split(x_q @ w_q, heads)
    if bug == "b_v forgotten":
        v = split(x_v @ w_v, groups)
    if bug == "head's columns interleaved":
        q = (x_q @ w_q + b_q).reshape(*x_q.shape[:2], -1, heads).transpose(0, 3, 1, 2)
    if bug == "one projection for all heads":
        q = np.repeat(q[:, :1], heads, 1)
    group = np.arange(heads) // (heads // groups)
    if bug == "head h reads h % G":
        group = np.arange(heads) % groups
    if bug == "head h reads h // G":
        group = np.minimum(np.arange(heads) // groups, groups - 1)
    scale = q.shape[-1] ** -0.5
    if bug == "scale of the model's width":
        scale = x_q.shape[-1] ** -0.5
    s = np.where(mask, scale * (q @ swap(k[:, group])), -np.inf)
    e = np.where(mask, np.exp(s - s.real.max(-1, keepdims=True, initial=-1e300)), 0)
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    o = p @ v[:, group]
    c = merge(o)
    if bug == "merged without a transpose":
        c = o.reshape(c.shape)
    if bug == "merged as if (H, B)":
        c = merge(o.reshape(heads, len(o), *o.shape[2:]).swapaxes(0, 1))
    if bug == "concat over E":
        c = o.transpose(0, 2, 3, 1).reshape(c.shape)
    if bug == "w_o transposed":
        w_o = w_o.T
    out = c @ w_o + b_o
    if bug == "b_o once a head":
        out = out + (heads - 1) * b_o
    if bug == "a dead query gives 0":
        out = np.where(mask.any(-1)[:, 0, :, None], out, 0)
    return out, (x_q, x_k, x_v, w_q, w_k, w_v, w_o, q, k, v, p, c, group, scale)


def multi_head_backward(dout, cache, *, bug=None):
    """A mapping with the gradients."""
    x_q, x_k, x_v, w_q, w_k, w_v, w_o, q, k, v, p, c, group, scale = cache
    groups = k.shape[1]

    def linear(dy, x, w):
        return dy @ w.T, np.einsum("blm,bln->mn", x, dy), dy.sum((0, 1))

    dc, dw_o, db_o = linear(dout, c, w_o)
    if bug == "b_o a mean":
        db_o = dout.mean((0, 1))
    do = split(dc, q.shape[1])
    if bug == "split without a transpose":
        do = dc.reshape(do.shape)
    if bug == "w_o by the heads as they lie":
        dw_o = linear(dout, (p @ v[:, group]).reshape(c.shape), w_o)[1]
    dv = swap(p) @ do
    dp = do @ swap(v[:, group])
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    dq, dk = scale * (ds @ k[:, group]), scale * (swap(ds) @ q)

    def of_groups(x):
        return x.reshape(len(x), groups, -1, *x.shape[2:]).sum(2)

    if bug == "first head of the group in dk":
        dk[:, np.arange(len(group)) % (len(group) // groups) > 0] = 0
    if bug == "mean of the group in dv":
        dv = dv / (len(group) // groups)
    if bug == "groups interleaved in dk":
        dk = dk.reshape(len(dk), -1, groups, *dk.shape[2:]).swapaxes(1, 2).reshape(dk.shape)
    dk, dv = of_groups(dk), of_groups(dv)
    dx_q, dw_q, db_q = linear(merge(dq), x_q, w_q)
    dx_k, dw_k, db_k = linear(merge(dk), x_k, w_k)
    dx_v, dw_v, db_v = linear(merge(dv), x_v, w_v)
    if bug == "w_q without a gradient":
        dw_q = np.zeros_like(w_q)
    if bug == "w_q of the first sequence":
        dw_q = linear(merge(dq)[:1], x_q[:1], w_q)[1]
    if bug == "w_k by x_v":
        dw_k = linear(merge(dk), x_v, w_k)[1]
    if bug == "b_v of the first sequence":
        db_v = merge(dv)[0].sum(0)
    if bug == "b_q of the heads as they lie":
        db_q = dq.sum((0, 2)).T.ravel()
    if bug == "x_k gets that of x_v":
        dx_k = dx_k + dx_v
    if bug == "b_k without a gradient":  # no bug: it is 0
        db_k = np.zeros_like(db_k)
    return {"x_q": dx_q, "x_k": dx_k, "x_v": dx_v, "w_q": dw_q, "w_k": dw_k, "w_v": dw_v, "w_o": dw_o,
            "b_q": db_q, "b_k": db_k, "b_v": db_v, "b_o": db_o}  # fmt: skip


def layer_candidate(op, *, forward=None, backward=None):
    """The layer with these bugs as a candidate for verify."""
    names = MultiHeadParams._fields if op == "multi_head" else RNNParams._fields

    def flat_params(params):
        return {n: np.zeros(0) if x is None else x for n, x in zip(names, params, strict=True)}

    def multi_head(x_q, x_k, x_v, params, *, num_heads, num_kv_heads=None, mask=None):
        if any(p is None for p in params):
            raise NotImplementedError("no biases")
        shape = (len(x_q), 1, x_q.shape[1], x_k.shape[1])
        mask = np.broadcast_to(True if mask is None else mask, shape) if np.ndim(mask) < 4 else mask
        return multi_head_forward(
            x_q, x_k, x_v, **flat_params(params), heads=num_heads, groups=num_kv_heads or num_heads, mask=mask, bug=forward
        )

    def multi_head_grads(dout, x_q, x_k, x_v, params, *, num_heads, num_kv_heads=None, mask=None):
        cache = multi_head(x_q, x_k, x_v, params, num_heads=num_heads, num_kv_heads=num_kv_heads, mask=mask)[1]
        return {f"d{n}": x for n, x in multi_head_backward(dout, cache, bug=backward).items()}

    def rnn(x, h0, params, *, lengths=None, nonlinearity="tanh"):
        if nonlinearity != "tanh" or params.b is None:
            raise NotImplementedError("tanh with a bias only")
        h0 = np.zeros((len(x), params.w_h.shape[0]), x.dtype) if h0 is None else h0
        lengths = np.full(len(x), x.shape[1]) if lengths is None else lengths
        return rnn_forward(x, h0, *params, lengths=lengths, bug=forward)

    def rnn_grads(dh, x, h0, params, *, lengths=None, nonlinearity="tanh", dh_last=None):
        (_, last), cache = rnn(x, h0, params, lengths=lengths, nonlinearity=nonlinearity)
        dh_last = np.zeros_like(last) if dh_last is None else dh_last
        grads = rnn_backward((dh, dh_last), cache, bug=backward)
        return {f"d{n}": g for n, g in grads.items() if h0 is not None or n != "h0"}

    def run(function):
        def quietly(*inputs, **options):
            with np.errstate(**QUIET):
                return function(*inputs, **options)

        return functools.wraps(function)(quietly)

    if op == "rnn":
        return Candidate("rnn", run(without_cache(rnn)), run(rnn_grads), op=op)
    return Candidate("multi_head", run(without_cache(multi_head)), run(multi_head_grads), op=op)


def without_cache(function):
    """The forward without its cache."""

    @functools.wraps(function)
    def forward(*inputs, **options):
        return function(*inputs, **options)[0]

    return forward


class LayerMutant(NamedTuple):
    """One bug of a layer. A forward is compared with the package's, a backward with derivatives of the honest forward."""

    kind: str
    where: str
    text: str
    tensor: str  # what the check names


def _layer(kind, forward, backward):
    rows = {name: LayerMutant(kind, "forward", *row) for name, row in forward.items()}
    assert not set(rows) & set(backward)
    return rows | {name: LayerMutant(kind, "backward", *row) for name, row in backward.items()}


RNN_MUTANTS = _layer("10", {
    "initial state ignored": ("h0 = 0", "h"),
    "lengths of the first sequence": ("for all", "h"),
    "no bias in the first step": ("the hidden term skipped with its bias", "h"),
    "input and state multiplied": ("* for +", "h"),
    "w_h transposed": ("h w_h^T", "h"),
    "input of the next step": ("t + 1", "h"),
    "one step too many": ("t <= length", "h"),
    "output goes on after the length": ("not 0", "h"),
    "last state repeated after the length": ("not 0", "h"),
    "state goes on after the length": ("the returned state taken at T", "h_last"),
    "h_last of step T": ("not of the length", "h_last"),
    "time and batch swapped": ("(T, B, N) taken for (B, T, N)", "h"),
}, {
    "dh_last ignored": ("the state is an output too", "x"),
    "slope of the state before": ("1 - h_{t-1}^2", "x"),
    "slope 1 - h": ("no square", "x"),
    "slope forgotten": ("no (3)", "x"),
    "steps after the length take part": ("0 is not their state", "x"),
    "dh times slope, carry without": ("the parenthesis", "x"),
    "carried by w_h, not its transpose": ("the Jacobian's order", "x"),
    "not carried": ("every step alone", "x"),
    "carry lost after the length": ("padding passes it on", "x"),
    "w_h by the new state": ("h_t for h_{t-1}", "w_h"),
    "= for += in w_h": ("the first step alone", "w_h"),
    "b of the first sequence": ("not summed", "b"),
    "b of the last step alone": ("not summed", "b"),
    "h0 of one step too few": ("before the last product", "h0"),
    "dx a step late": ("off by one", "x"),
})  # fmt: skip

MULTI_HEAD_MUTANTS = _layer("8", {
    "values of x_k": ("one input for both", "out"),
    "b_q forgotten": ("no bias", "out"),
    "b_v forgotten": ("no bias", "out"),
    "head's columns interleaved": ("(D, H) for (H, D)", "out"),
    "one projection for all heads": ("the first head's", "out"),
    "head h reads h % G": ("for h // (H // G)", "out"),
    "head h reads h // G": ("for h // (H // G)", "out"),
    "scale of the model's width": ("1/sqrt(M)", "out"),
    "merged without a transpose": ("reshape alone", "out"),
    "merged as if (H, B)": ("data is (B, H)", "out"),
    "concat over E": ("(E, H) for (H, E)", "out"),
    "w_o transposed": ("a square matrix", "out"),
    "b_o once a head": ("added too often", "out"),
    "a dead query gives 0": ("not b_o", "out"),
}, {
    "b_o a mean": ("over the tokens", "b_o"),
    "split without a transpose": ("reshape alone", "x_q"),
    "w_o by the heads as they lie": ("(B, H, L, E) for (B, L, H E)", "w_o"),
    "first head of the group in dk": ("not the sum", "x_k"),
    "mean of the group in dv": ("not the sum", "x_v"),
    "groups interleaved in dk": ("(H / G, G) for (G, H / G)", "x_k"),
    "w_q without a gradient": ("the graph cut", "w_q"),
    "w_q of the first sequence": ("not summed", "w_q"),
    "w_k by x_v": ("the wrong input", "w_k"),
    "b_v of the first sequence": ("not summed", "b_v"),
    "b_q of the heads as they lie": ("(D, H) for (H, D)", "b_q"),
    "x_k gets that of x_v": ("as if they were one array", "x_k"),
})  # fmt: skip


BY_NAME = {case.name: case for case in CASES}
