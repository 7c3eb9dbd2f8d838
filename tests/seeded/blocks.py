"""A layer norm, rotary positions and an encoder block, forwards and backwards, as people write them."""

import math

import numpy as np
from scipy.special import erf

from npattn.verify import Candidate, Convention

from .dense import swap

POISONS = Convention(masked_nan="poisons")


def normed(x, p, eps, bug=""):
    mean = x.mean(-1, keepdims=True)
    r = 1 / np.sqrt(np.square(x - mean).mean(-1, keepdims=True) + x.dtype.type(eps))
    if bug == "divided by the standard deviation and eps":
        r = 1 / (x.std(-1, keepdims=True) + x.dtype.type(eps))
    n = (x - mean) * r
    y = n if p.g is None else n * p.g
    return y if p.b is None else y + p.b, (n, r)


def normed_backward(dy, cache, p, bug=""):
    (n, r), tokens = cache, tuple(range(dy.ndim - 1))
    dn = dy if p.g is None else dy * p.g
    other = dy if bug == "the second mean without the weight" else dn
    dx = r * (dn - dn.mean(-1, keepdims=True) - n * (other * n).mean(-1, keepdims=True))
    dg, db = (dy * n).sum(tokens), dy.sum(tokens)
    if bug == "weights of the last sequence" and dy.ndim > 2:
        dg, db = (np.atleast_2d(t[-1]).reshape(-1, t.shape[-1]).sum(0) for t in (dy * n, dy))
    return dx, {name: d for name, d, w in (("g", dg, p.g), ("b", db, p.b)) if w is not None}


def layer_norm(bug=""):
    @np.errstate(all="ignore")
    def forward(x, params, *, eps=1e-5):
        return normed(x, params, eps, bug)[0]

    @np.errstate(all="ignore")
    def backward(dy, x, params, *, eps=1e-5):
        dx, others = normed_backward(dy, normed(x, params, eps, bug)[1], params, bug)
        return {"dx": dx, **{f"d{name}": d for name, d in others.items()}}

    return Candidate(bug or "layer_norm", forward, backward, POISONS, op="layer_norm")


def rotary(bug=""):
    def turn(x, positions, layout, width, base, back):
        D = x.shape[-1]
        R = D if width is None else width
        f = base ** (-np.arange(0, R, 2) / (D if bug == "frequencies of the whole width" else R))
        at = positions[..., None, :] if positions.ndim > 1 else positions
        t = (at + (bug == "positions from 1"))[..., None] * f
        cos, sin = np.cos(t).astype(x.dtype), np.sin(t).astype(x.dtype) * (-1 if back else 1)
        a, b = (slice(0, R // 2), slice(R // 2, R)) if layout == "half" else (slice(0, R, 2), slice(1, R, 2))
        y = x.copy()
        y[..., a], y[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
        return y

    @np.errstate(all="ignore")
    def forward(x, positions, *, layout="half", width=None, base=10000.0):
        return turn(x, positions, layout, width, base, False)

    @np.errstate(all="ignore")
    def backward(dy, x, positions, *, layout="half", width=None, base=10000.0):
        return {"dx": turn(dy, positions, layout, width, base, bug != "turned forwards in the backward")}

    return Candidate(bug or "rotary", forward, backward, POISONS, op="rotary")


def activated(z, name):
    """The activation, and its slope."""
    if name == "relu":
        return np.maximum(z, 0), (z > 0).astype(z.dtype)
    if name != "gelu":
        raise NotImplementedError(name)
    s = (0.5 * (1 + erf(z.astype(np.float64) / math.sqrt(2)))).astype(z.dtype)
    return z * s, s + z * np.exp(-z * z / 2) / z.dtype.type(math.sqrt(2 * math.pi))


class Block:
    def __init__(self, bug=""):
        self.bug = bug
        self.candidate = Candidate(bug or "encoder_block", self.forward, self.backward, POISONS, op="encoder_block")

    def forward(self, x, params, *, num_heads, mask=None, causal=False, pre_norm=True, activation="gelu", norm_eps=1e-5):
        return self.outputs(x, params, num_heads, mask, causal, pre_norm, activation, norm_eps)[0]

    def backward(self, dy, x, params, *, num_heads, mask=None, causal=False, pre_norm=True, activation="gelu", norm_eps=1e-5):
        _, kept = self.outputs(x, params, num_heads, mask, causal, pre_norm, activation, norm_eps)
        return self.gradients(dy, x, params, kept, pre_norm)

    @np.errstate(all="ignore")
    def outputs(self, x, p, H, mask, causal, pre_norm, activation, eps):
        if p.attention.b_q is None or p.feed_forward.w_gate is not None or p.attention.w_q.shape != p.attention.w_k.shape:
            raise NotImplementedError("no biases, a gate, or grouped heads")
        (B, L, M), a, f, kept = x.shape, p.attention, p.feed_forward, {}
        seen = np.tri(L, dtype=bool) if causal else np.ones((L, L), bool)
        seen = seen if mask is None else seen & mask

        def attend(n):
            q, k, v = (
                (n @ w + b).reshape(B, L, H, -1).swapaxes(1, 2) for w, b in ((a.w_q, a.b_q), (a.w_k, a.b_k), (a.w_v, a.b_v)))
            scale = x.dtype.type((M if self.bug == "scale of the model's width" else q.shape[3]) ** -0.5)
            s = np.where(seen, scale * (q @ swap(k)), -np.inf).astype(x.dtype)
            e = np.exp(s - s.max(-1, keepdims=True))
            w = e / e.sum(-1, keepdims=True)
            o = (w @ v).swapaxes(1, 2).reshape(B, L, -1)
            kept["attention"] = n, q, k, v, w, o, scale
            return o @ a.w_o + a.b_o

        def hidden(n):
            h, slope = activated(n @ f.w_in + f.b_in, activation)
            kept["hidden"] = n, h, slope
            return h @ f.w_out + f.b_out

        if pre_norm:
            n, kept["first"] = normed(x, p.attention_norm, eps)
            h = x + attend(n)
            n, kept["second"] = normed(h, p.feed_forward_norm, eps)
            y = (n if self.bug == "the second sum begins behind the norm" else h) + hidden(n)
        else:
            h, kept["first"] = normed(x + attend(x), p.attention_norm, eps)
            y, kept["second"] = normed(h + hidden(h), p.feed_forward_norm, eps)
        return y, kept

    @np.errstate(all="ignore")
    def gradients(self, dy, x, p, kept, pre_norm):
        (B, L, _), a, f, found = x.shape, p.attention, p.feed_forward, {}

        def flat(t):
            return t.reshape(B * L, -1)

        def hidden(d):
            n, h, slope = kept["hidden"]
            dz = (d @ f.w_out.T) * slope
            found.update(feed_forward_w_out=flat(h).T @ flat(d), feed_forward_b_out=d.sum((0, 1)),
                         feed_forward_w_in=flat(n).T @ flat(dz), feed_forward_b_in=dz.sum((0, 1)))  # fmt: skip
            return dz @ f.w_in.T

        def attend(d):
            n, q, k, v, w, o, scale = kept["attention"]
            found.update(attention_w_o=flat(o).T @ flat(d), attention_b_o=d.sum((0, 1)))
            do = (d @ a.w_o.T).reshape(B, L, q.shape[1], -1).swapaxes(1, 2)
            dw = do @ swap(v)
            ds = w * (dw - (w * dw).sum(-1, keepdims=True)) * scale
            dn = 0
            for name, g in (("q", ds @ k), ("k", swap(ds) @ q), ("v", swap(w) @ do)):
                g = g.swapaxes(1, 2).reshape(B, L, -1)
                found[f"attention_w_{name}"], found[f"attention_b_{name}"] = flat(n).T @ flat(g), g.sum((0, 1))
                if name != "v" or self.bug != "the gradient through the values is lost":
                    dn = dn + g @ getattr(a, f"w_{name}").T
            return dn

        def through(d, which, name):
            dx, others = normed_backward(d, kept[which], getattr(p, name))
            found.update({f"{name}_{n}": g for n, g in others.items()})
            return dx

        if pre_norm:
            straight = 0 if self.bug == "the second sum is forgotten in the backward" else dy
            dh = straight + through(hidden(dy), "second", "feed_forward_norm")
            dx = dh + through(attend(dh), "first", "attention_norm")
        else:
            d = through(dy, "second", "feed_forward_norm")
            d = through(d + hidden(d), "first", "attention_norm")
            dx = d + attend(d)
        return {"dx": dx, **{f"d{name}": g for name, g in found.items()}}
