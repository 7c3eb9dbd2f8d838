"""Two implementations of attention with one bad line at a time: `dense`, with all pairs at once, and `tiles`.

Everything here is written a second time and shares no code with the package. Each takes the name of a bug; with None it is
right, so undoing a bug changes one line and nothing else. A bug given to the backward alone leaves the forward right, whatever
line it is in. What each bug is, and which check has to reject it: `npattn.verify.mutants`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npattn.verify.candidates import Candidate
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
        if bug == "window without the own key":
            left = left - 1
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
            t = np.tanh(s / scale / o.softcap)
        if bug == "tanh by exponentials":
            e = np.exp(2 * s / o.softcap)
            t = (e - 1) / (e + 1)
        s = o.softcap * t
        if bug == "softcap before the scale":
            s = scale * s
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
    if bug == "sink twice":
        sink = sink + sink.dtype.type(math.log(2))
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
    if bug == "Delta of dout alone":
        delta = (dout * dout).sum(-1, keepdims=True)
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


__all__ = ["candidate"]
