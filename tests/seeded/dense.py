"""Attention with all pairs at once, as a library without kernels has it."""

import time
from types import SimpleNamespace

import numpy as np

from npattn.verify import Candidate, Convention


def swap(x):
    return x.swapaxes(-1, -2)


def bfloat16(x):
    return ((x.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32) if x.itemsize == 4 else x


def total_of(x, like):
    """Summed over the axes along which ``like`` was broadcast."""
    axes = tuple(a for a in range(-x.ndim, 0) if -a > like.ndim or like.shape[a] == 1)
    return x.sum(axes, keepdims=True).reshape(like.shape)


def padded(x, *sizes):
    """Zeros behind the axes after the heads, up to a multiple of these sizes."""
    return np.pad(x, [(0, 0), (0, 0), *((0, -n % size) for n, size in zip(x.shape[2:], sizes, strict=True))])


class Attention:
    """What both have: the arguments."""

    tile = (1, 1)

    def __init__(self, bug=""):
        self.bug, self.kept = bug, {}  # what a wrong one keeps from call to call
        self.candidate = Candidate(bug or type(self).__name__, self.forward, self.backward, Convention(masked_nan="poisons"))

    def bound(self, q, k, options):
        """The options of a call, arrays over pairs in full."""
        names = ("mask", "bias", "scale", "softcap", "sink", "dropout_mask", "dlse")
        o = SimpleNamespace(**{**dict.fromkeys(names), **options})
        shape = (*q.shape[:3], k.shape[2])
        for name in ("mask", "bias", "dropout_mask"):
            if name in options:
                setattr(o, name, padded(np.broadcast_to(options[name], shape), *self.tile))
        width = q.shape[3] + (-q.shape[3] % 8 if self.bug == "scale of the width padded to 8" else 0)
        o.scale = width**-0.5 if o.scale is None else o.scale
        o.sizes, o.group, o.given_bias = shape[2:], shape[1] // k.shape[1], options.get("bias")
        return o

    @np.errstate(all="ignore")
    def forward(self, q, k, v, *, causal=None, window=None, key_lengths=None, **options):
        options |= {"causal": causal, "window": window, "key_lengths": key_lengths}
        return self.outputs(q, k, v, self.bound(q, k, options))

    @np.errstate(all="ignore")
    def backward(self, dout, q, k, v, *, causal=None, window=None, key_lengths=None, dlse=None, **options):
        options |= {"causal": causal, "window": window, "key_lengths": key_lengths, "dlse": dlse}
        return self.gradients(dout, q, k, v, self.bound(q, k, options))


class Dense(Attention):
    def scores(self, q, k, o, backward):
        """(scores, -inf where masked; the tanh of the softcap; which key head each head reads)"""
        bug, (L, S), heads = self.bug, o.sizes, np.arange(q.shape[1])
        ahead, allowed = np.arange(S) - np.arange(L)[:, None], np.ones((L, S), bool)
        causal = o.causal and (bug != "causal dropped beside a bias" or o.bias is None)
        if causal or (bug == "backward always causal" and backward):
            allowed = ahead <= (S - L if bug == "backward aligned at the last key" and backward else 0)
        if o.window is not None:
            left, right = (L + S if n is None else n for n in o.window)
            allowed = allowed & (-ahead <= left) & (ahead <= right + (bug == "window one too wide ahead"))
        if o.key_lengths is not None:
            allowed = allowed & (np.arange(S) < o.key_lengths[:, None, None, None])
        if o.mask is not None:
            kept = self.kept.setdefault(o.mask.shape, o.mask) if bug == "mask of the first call of that shape" else o.mask
            allowed = allowed & (swap(kept) if bug == "square mask transposed" and L == S else kept)
        group = heads % k.shape[1] if bug == "heads interleaved" else heads // o.group
        s = o.scale * (q @ swap(k[:, group]))
        t = 0 if o.softcap is None else np.tanh(s / o.softcap)
        s = s if o.softcap is None else o.softcap * t
        if o.bias is not None:
            bias = np.resize(o.given_bias, s.shape) if bug == "bias read without its broadcast axes" else o.bias
            s = np.where(bias != 0, -np.inf, s) if bug == "bias cast to a boolean mask" else s + bias
        lowest = np.finfo(s.dtype).min if bug == "masked by the lowest number" else -np.inf
        return np.where(allowed, s, lowest).astype(s.dtype), t, group

    def weights(self, q, k, o, backward=False):
        """(p, lse, the sink's weight, the tanh of the softcap, which key head each head reads)"""
        bug, (s, t, group) = self.bug, self.scores(q, k, o, backward)
        sink = np.full((1, 1, 1), -np.inf, s.dtype) if o.sink is None else o.sink[:, None, None]
        top = np.maximum(s.max(-1, keepdims=True, initial=-np.inf), sink)
        top = np.maximum(top, s.dtype.type(-5e4)) if bug == "maximum starts at -5e4" else top
        top = np.where((top == -np.inf) | (bug == "no maximum where there is no mask" and o.mask is None), 0, top)
        e, e_sink = np.exp(s - top), np.exp(sink - top)
        total = e.sum(-1, keepdims=True) + e_sink
        lse = (top + np.log(total))[..., 0]
        total = np.where((total == 0) & (bug != "dead rows zeroed too late"), 1, total)
        return e / total, lse, e_sink / total, t, group

    def outputs(self, q, k, v, o):
        bug = self.bug
        if bug == "options shared by threads":
            self.kept["options"] = o
            time.sleep(1e-3)
            o = self.kept["options"]
        if bug == "q scaled in place":
            q *= o.scale
            o.scale = 1.0
        p, lse, _, _, group = self.weights(q, k, o)
        self.kept["p"] = p
        w = p if o.dropout_mask is None else p * o.dropout_mask
        out = w @ v[:, group]
        if bug == "dead rows zeroed too late":
            out = np.where(lse[..., None] == -np.inf, 0, out)
        if bug == "out in a scratch array":
            scratch = self.kept.setdefault(out.shape, out)
            scratch[...] = out
            out = scratch
        return out, lse / np.log(2).astype(lse.dtype) if bug == "lse in base 2" else lse

    def gradients(self, dout, q, k, v, o):
        bug, (p, _, p_sink, t, group) = self.bug, self.weights(q, k, o, True)
        p = self.kept["p"] if bug == "weights of the last forward" else p
        drop = 1 if o.dropout_mask is None else o.dropout_mask
        delta = (dout * (p * drop @ v[:, group])).sum(-1, keepdims=True) - (0 if o.dlse is None else o.dlse[..., None])
        dbias = p * ((dout @ swap(v[:, group])) * drop - (0 if bug == "Delta forgotten" else delta))
        ds = o.scale * (dbias * (1 - t * t))
        dk, dv = (x.reshape(*k.shape[:2], o.group, *x.shape[2:]).sum(2) for x in (swap(ds) @ q, swap(p * drop) @ dout))
        grads = {"dq": ds @ k[:, group], "dk": dk, "dv": dv}
        if o.bias is not None:
            grads["dbias"] = total_of(dbias, o.given_bias)
        if o.sink is not None:
            terms = (-p_sink * delta)[..., 0]
            grads["dsink"] = (bfloat16(terms) if bug == "R15 terms of dsink in bfloat16" else terms).sum((0, 2))
        return grads
