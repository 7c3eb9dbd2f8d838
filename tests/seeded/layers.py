"""A multi-head and a recurrent layer, forwards alone."""

import numpy as np

from npattn.verify import Candidate

from .dense import swap


def multi_head(bug=""):
    def forward(x_q, x_k, x_v, params, *, num_heads, num_kv_heads=None, mask=None):
        if not all(np.isfinite(x).all() for x in (x_q, x_k, x_v)):
            raise NotImplementedError("NaN and inf")

        def heads(x, n, heads):
            w, b = getattr(params, f"w_{n}"), getattr(params, f"b_{n}")
            y = x @ w if b is None else x @ w + b
            return y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2)

        groups = num_kv_heads or num_heads
        group, both_by_k = np.arange(num_heads) // (num_heads // groups), params.w_k.shape == params.w_v.shape
        q, k = heads(x_q, "q", num_heads), heads(x_k, "k", groups)[:, group]
        v = heads(x_v, "k" if bug == "R21 v is projected by w_k" and both_by_k else "v", groups)[:, group]
        s = np.where(True if mask is None else mask, q @ swap(k) * q.shape[3] ** -0.5, -np.inf).astype(q.dtype)
        e = np.exp(s - np.maximum(s.max(-1, keepdims=True), np.finfo(s.dtype).min))
        e[s == -np.inf] = 0
        o = e / np.maximum(e.sum(-1, keepdims=True), np.finfo(s.dtype).tiny) @ v
        c = (o if bug == "merged without a transpose" else o.swapaxes(1, 2)).reshape(*x_q.shape[:2], -1)
        return c @ params.w_o if params.b_o is None else c @ params.w_o + params.b_o

    return Candidate(bug or "multi_head", forward, op="multi_head")


def rnn(bug=""):
    @np.errstate(all="ignore")
    def forward(x, h0, params, *, lengths=None, nonlinearity="tanh"):
        f = np.tanh if nonlinearity == "tanh" else lambda z: np.maximum(z, 0)
        last, hs = np.zeros((len(x), params.w_h.shape[0]), x.dtype) if h0 is None else h0, []
        for t in range(x.shape[1]):
            new = f(x[:, t] @ params.w_x + last @ params.w_h + (0 if params.b is None else params.b))
            now = np.full((len(x), 1), True) if lengths is None else (t < lengths)[:, None]
            hs.append(np.where(now, new, 0))
            last = new if bug == "state goes on after the length" else np.where(now, new, last)
        h = np.stack(hs, 1)
        if bug == "R19 last state read at step -1" and lengths is not None:
            last = h.reshape(-1, h.shape[2])[np.arange(len(x)) * x.shape[1] + lengths - 1]
        return h, last

    return Candidate(bug or "rnn", forward, op="rnn")
