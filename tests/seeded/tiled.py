"""Attention in tiles, with the loops of a kernel; the backward makes the weights again from lse.

All heads of all sequences go through the loops together. Arrays are padded to whole tiles, and `scores` masks the rest.
"""

import numpy as np

from .dense import Attention, bfloat16, padded, swap, total_of

ROWS, COLS = 32, 16


class Tiled(Attention):
    tile = (ROWS, COLS)

    def tiles_of_keys(self, S):
        """The first key of each tile."""
        if self.bug == "last tile of keys moved back":
            return [max(min(c, S - COLS), 0) for c in range(0, S, COLS)]
        return range(0, S, COLS)

    def skipped(self, r, c, o, backward=False):
        """Whether no query of this tile sees a key of it."""
        first, last = r, r + ROWS - 1
        if o.causal and c > (first if self.bug == "causal backward starts a tile late" and backward else last):
            return True
        left = None if o.window is None else o.window[0]
        return left is not None and c + COLS - 1 < (last if self.bug == "window starts a tile late" else first) - left

    def scores(self, q, k, o, r, c, backward=False):
        """(scores of the tile at r and c, -inf where masked; the tanh of the softcap)"""
        bug, (L, S), rows, cols = self.bug, o.sizes, slice(r, r + ROWS), slice(c, c + COLS)
        i, column = r + np.arange(ROWS)[:, None], np.arange(COLS)
        j, seen = c + column, (i < L) & ((c + column < S) | (bug == "padding counted"))
        if o.causal and bug != "tile of the diagonal seen in full":
            row = i // o.group if bug == "R7 row of causal divided by H / G" else i
            seen = seen & ((column if bug == "causal by the column in the tile" else j) <= row)
        if o.window is not None:
            left, right = (L + S if n is None else n for n in o.window)
            if bug == "R23 backward of a sink knows the left limit alone" and backward and o.sink is not None:
                right = L + S
            seen = seen & (i - j <= left) & (j - i <= right)
        if o.key_lengths is not None:
            end = o.key_lengths[:, None, None, None]
            seen = seen & ((column if bug == "lengths by the column in the tile" else j) < end)
        if o.mask is not None:
            seen = seen & o.mask[:, :, slice(ROWS) if bug == "mask of the first rows" else rows, cols]
        s = o.scale * (q[:, :, rows] @ swap(k[:, :, cols]))
        t = 0 if o.softcap is None else np.tanh(s / o.softcap)
        s = s if o.softcap is None else o.softcap * t
        if o.bias is not None:
            s = s + o.bias[:, :, rows, slice(COLS) if bug == "bias of the first columns" else cols]
        return np.where(seen, s, -np.inf).astype(q.dtype), t

    def outputs(self, q, k, v, o):
        if self.bug == "strides of k ignored":
            k = np.resize((k if k.base is None else k.base).ravel("K"), k.shape)
        out, lse = self.out_and_lse(q, k, v, o)
        if self.bug == "R9 lse lacks the mean of K" and o.softcap is None and o.sink is None:
            mean = np.repeat(k.sum(2, keepdims=True) / max(o.sizes[1], 1), o.group, 1)
            lse = lse - o.scale * (q * mean).sum(-1, keepdims=True)
        return out, lse[..., 0]

    def out_and_lse(self, q, k, v, o):
        bug, (L, S) = self.bug, o.sizes
        q, k, v = padded(q, ROWS, 1), padded(np.repeat(k, o.group, 1), COLS, 1), padded(np.repeat(v, o.group, 1), COLS, 1)
        out, lse = np.zeros((*q.shape[:3], v.shape[3]), q.dtype), np.zeros((*q.shape[:3], 1), q.dtype)
        sink = np.full((1, 1, 1), -np.inf, q.dtype) if o.sink is None else o.sink[:, None, None]
        if bug == "R3 sink over the softcap" and o.softcap is not None:
            sink = sink / o.softcap
        for r in range(0, L, ROWS):
            m, acc = np.broadcast_to(sink, lse[:, :, :ROWS].shape), np.zeros_like(out[:, :, :ROWS])
            if r == 0 or bug != "sum not cleared for the next rows":
                total = np.full(m.shape, o.sink is not None, q.dtype)
            for c in (c for c in self.tiles_of_keys(S) if not self.skipped(r, c, o)):
                s, _ = self.scores(q, k, o, r, c)
                top = s.max(-1, keepdims=True)
                new = top if bug == "maximum of the last tile" else np.maximum(m, top)
                new = np.zeros_like(new) if bug == "R11 merged by exp of lse itself" else new
                safe = np.where(new == -np.inf, 0, new)
                own = top if bug == "masked tile not guarded" else np.where(top == -np.inf, 0, top)
                e, old, now = np.exp(s - own), np.exp(m - safe), np.exp(top - safe)
                total = (total if bug == "sum not rescaled" else old * total) + now * e.sum(-1, keepdims=True)
                if bug == "sink in every tile" and c > 0:
                    total = total + np.exp(sink - safe)
                e = e if o.dropout_mask is None else e * o.dropout_mask[:, :, r : r + ROWS, c : c + COLS]
                acc = (acc if bug == "output not rescaled" else old * acc) + now * (e @ v[:, :, c : c + COLS])
                m = new
            at = max(min(r, L - ROWS), 0) if bug == "last rows stored too early" else r
            out[:, :, at : at + ROWS] = acc / np.where(total == 0, 1, total)
            lse[:, :, at : at + ROWS] = m + np.log(total)
        return out[:, :, :L], lse[:, :, :L]

    def gradients(self, dout, q, k, v, o):
        bug, (L, S), (out, lse), G = self.bug, o.sizes, self.out_and_lse(q, k, v, o), k.shape[1]
        delta = (dout * out).sum(-1, keepdims=True) - (0 if o.dlse is None else o.dlse[..., None])
        q, dout, lse, delta = (padded(x, ROWS, 1) for x in (q, dout, lse, delta))
        k, v = (padded(np.repeat(x, o.group, 1), COLS, 1) for x in (k, v))
        dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
        dbias = np.full((*q.shape[:3], k.shape[2]), np.nan if bug == "dbias of skipped tiles not written" else 0, q.dtype)
        for c in self.tiles_of_keys(S):
            cols = slice(c, c + COLS)
            kt, vt = (x[:, :, slice(COLS) if bug == "R1 keys of step 0 in every step" else cols] for x in (k, v))
            if c == 0 or bug != "dv not cleared for the next keys":
                dvt = np.zeros_like(vt)
            for r in range(0, L - L % ROWS if bug == "last rows left out of the backward" else L, ROWS):
                if self.skipped(r, c, o, True):
                    continue
                rows = slice(r, r + ROWS)
                lt = lse[:, :, slice(ROWS) if bug == "lse of the first rows" else rows]
                dt = delta[:, :, slice(ROWS) if bug == "Delta of the first rows" else rows]
                s, t = self.scores(q, k, o, r, c, True)
                p = np.where(s == -np.inf, 0, np.exp(s - lt))
                drop = 1 if o.dropout_mask is None else o.dropout_mask[:, :, rows, cols]
                dvt = dvt + swap(bfloat16(p * drop) if bug == "dv of weights in bfloat16" else p * drop) @ dout[:, :, rows]
                ds = p * ((dout[:, :, rows] @ swap(vt)) * drop - dt)
                dbias[:, :, rows, cols] = ds
                ds = o.scale * (ds * (1 - t * t))
                dk[:, :, cols] += swap(ds) @ q[:, :, rows]
                dq[:, :, rows] = (0 if bug == "dq of the last keys" else dq[:, :, rows]) + ds @ kt
            dv[:, :, cols] = dvt
        dk, dv = (x[:, :, :S].reshape(len(x), G, o.group, S, x.shape[3]) for x in (dk, dv))
        dk, dv = (x[:, :, -1] if bug == "group overwritten, not added" else x.sum(2) for x in (dk, dv))
        for b, n in enumerate(o.key_lengths if o.key_lengths is not None else ()):
            if bug == "R13 dq of all sequences in the first" and b > 0:
                dq[0] += dq[b]
                dq[b] = 0
            if bug == "R17 gradients behind the lengths not written":
                dk[b, :, n:] = dv[b, :, n:] = np.nan
        if bug == "R5 dq read with another stride" and q.shape[3] > 64:  # rows of D rounded up to 16, and to 32
            memory = padded(padded(dq, 1, 16).reshape(*dq.shape[:2], -1, 1), dq.shape[2] * 32, 1)
            dq = memory.reshape(*dq.shape[:2], dq.shape[2], -1)[..., : q.shape[3]]
        grads = {"dq": dq[:, :, :L], "dk": dk, "dv": dv}
        if o.bias is not None:
            grads["dbias"] = total_of(dbias[:, :, :L, :S], o.given_bias)
        if o.sink is not None:
            weight = np.where(lse == -np.inf, 0, np.exp(o.sink[:, None, None] - lse))[:, :, :L]
            grads["dsink"] = -(weight * delta[:, :, :L]).sum((0, 2, 3))
        return grads
