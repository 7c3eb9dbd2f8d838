"""An honest dense implementation of each precision class: the equations of attention with the roundings of that class.

Compare a low-precision kernel with it to see whether roundings alone explain the kernel's errors. What the class does not round
is in float32, as accumulators are (in float64 for the class float64). It shares no code with `npattn.verify.stages`; the tests
compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.precision import Precision, round_to


def swap(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def rounded(precision: Precision) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A forward and a backward that `npattn.verify` can call as a candidate."""
    p, work = precision, precision.dtype

    def low(x: Any, roundoff: float) -> Any:
        """x as the class stores it."""
        return round_to(x, p.format) if roundoff else x

    def weights(q: Array, k: Array, mask: Any, bias: Any, scale: Any, softcap: Any, sink: Any) -> tuple[Any, ...]:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        s = low(scale * (q @ swap(k)), p.scores)  # (1)
        t = None
        if softcap is not None:
            t = np.tanh(s / softcap)
            s = low(softcap * t, p.scores)  # (2)
        allowed = np.broadcast_to(True if mask is None else mask, s.shape)
        if bias is not None:
            s, allowed = low(s + bias.astype(work), p.scores), allowed & (bias != -np.inf)  # (3)
        s = np.where(allowed, s, work.type(-np.inf))  # (4)
        top = s.max(-1, keepdims=True, initial=-np.inf)
        logit = None if sink is None else sink.astype(work)[:, None, None]
        top = top if logit is None else np.maximum(top, logit)
        top = np.where(top == -np.inf, work.type(0), top)
        e = np.exp(s - top)
        z = e.sum(-1, keepdims=True)
        z = z if logit is None else z + np.exp(logit - top)
        w = np.where(allowed, e / np.where(z == 0, work.type(1), z), work.type(0))  # (5)
        return w, (top + np.log(z))[..., 0], allowed, t, scale, logit

    def inputs(*arrays: Array) -> list[Array]:
        return [low(x.astype(work), p.inputs) for x in arrays]

    def heads(x: Array, H: int) -> Array:
        return np.repeat(x, H // x.shape[-3], axis=-3) if x.shape[-3] != H else x

    def forward(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None,
        sink: Any = None, dropout_mask: Any = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        given, H = q.dtype, q.shape[-3]
        with np.errstate(all="ignore"):
            q, k, v = inputs(q, k, v)
            w, lse, allowed, *_ = weights(q, heads(k, H), mask, bias, scale, softcap, sink)
            w = w if dropout_mask is None else w * dropout_mask.astype(work)  # (6)
            out = product(low(w, p.weights), heads(v, H), allowed)  # (7)
        return low(out, p.out).astype(given), lse

    def backward(
        dout: Array, q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None,
        softcap: Any = None, sink: Any = None, dropout_mask: Any = None, dlse: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        given, H, G = q.dtype, q.shape[-3], k.shape[-3]
        with np.errstate(all="ignore"):
            dout, q, k, v = inputs(dout, q, k, v)
            kh, vh = heads(k, H), heads(v, H)
            w, lse, allowed, t, scale, logit = weights(q, kh, mask, bias, scale, softcap, sink)
            alive = (lse != -np.inf)[..., None]
            dout = np.where(alive, dout, work.type(0))
            dl = work.type(0) if dlse is None else np.where(alive, dlse.astype(work)[..., None], work.type(0))
            drop = work.type(1) if dropout_mask is None else dropout_mask.astype(work)
            stored = low(w * drop, p.weights)
            dv = product(swap(stored), dout, swap(allowed))  # (7)
            dp = low(np.where(allowed, dout @ swap(vh), work.type(0)) * drop, p.dweights)  # (7), (6)
            if p.delta_out:
                delta = (dout * low(product(stored, vh, allowed), p.delta_out)).sum(-1, keepdims=True)
            else:
                delta = (w * dp).sum(-1, keepdims=True)
            ds = np.where(allowed, w * (dp - delta + dl), work.type(0))  # (5), (4)
            grads: dict[str, Any] = {"dbias": None, "dsink": None}
            if logit is not None:
                rows = np.where(logit == -np.inf, work.type(0), np.exp(logit - lse[..., None])) * (dl - delta)
                grads["dsink"] = low(rows.sum((0, 2, 3)), p.out).astype(sink.dtype)
            if bias is not None:
                grads["dbias"] = low(summed_to(low(ds, p.dscores), bias), p.out).astype(bias.dtype)  # (3)
            if t is not None:
                ds = np.where(allowed, ds * (1 - t * t), work.type(0))  # (2)
            ds = low(ds, p.dscores)
            dq = scale * product(ds, kh, allowed)  # (1)
            dk = scale * product(swap(ds), q, swap(allowed))  # (1)
            dk, dv = (x.reshape(len(x), G, H // G if G else 0, *x.shape[2:]).sum(2) if G != H else x for x in (dk, dv))
        return grads | {n: low(x, p.out).astype(given) for n, x in (("dq", dq), ("dk", dk), ("dv", dv))}

    return forward, backward


def product(w: Array, x: Array, allowed: Array) -> Array:
    """w @ x, where NaN and inf in x reach only the rows that may see them."""
    bad = ~np.isfinite(x)
    if not bad.any():
        return np.asarray(w @ x)
    out = np.asarray(w @ np.where(bad, x.dtype.type(0), x))
    for j in np.flatnonzero(bad.any(-1).reshape(-1, x.shape[-2]).any(0)):
        one = slice(j, j + 1)
        out += np.where(allowed[..., one] & bad[..., one, :], w[..., one] * x[..., one, :], x.dtype.type(0))
    return out


def summed_to(terms: Array, like: Array) -> Array:
    full = (1,) * (terms.ndim - like.ndim) + like.shape
    result: Array = terms.sum(tuple(a for a, n in enumerate(full) if n == 1), keepdims=True).reshape(like.shape)
    return result
