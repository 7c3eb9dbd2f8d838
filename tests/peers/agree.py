"""How far npattn and a float64 peer may lie apart: for each array a bound derived from the terms that were summed.

T(x) is what a rounding on the way can move x by, in units of eps: the sum of the |terms| that x was computed from.

    inputs      T(x) = |x|
    A @ B       T = T(A) |B| + |A| T(B)                     what moves A or B moves the product; so does its own sum
    softmax     T(w) = w (1 + T(s) + sum_j w_j T(s_j))      dw = w (ds - sum_j w_j ds_j), and w itself is rounded
    backwards   the same rules over the equations of the backward, with |x| <= T(x) where that is simpler

Each side, npattn and the peer, is right to TERMS_EPS eps T (see npattn.tolerances); of its 18, the 400 terms of the longest
sum here take sqrt(400) / 2 = 10, their roundings of eps / 2 adding up like a random walk:

    |npattn - peer| <= 2 * TERMS_EPS * eps * max T        over the elements of one array

NaN and inf have to be in the same places. A comparison refuses to pass where the expected array is nothing but noise.
"""

from typing import NamedTuple

import numpy as np

from npattn.tolerances import TERMS_EPS

EPS = float(np.finfo(np.float64).eps)


def swap(x):
    return x.swapaxes(-1, -2)


def to_numpy(x):
    return x.detach().numpy() if hasattr(x, "detach") else np.asarray(x)


def agree(name, got, expected, terms, *, zero=False):
    """npattn's ``got`` equals the peer's ``expected`` to the bound of this page. zero: the truth is 0 everywhere."""
    __tracebackhide__ = True
    got, expected = to_numpy(got), to_numpy(expected)
    for side, x in (("npattn", got), ("the peer", expected)):
        if x.dtype != np.float64:
            raise AssertionError(f"{name}: {side} has dtype {x.dtype}, the bound is for float64")
    if got.shape != expected.shape:
        raise AssertionError(f"{name}: npattn has shape {got.shape}, the peer {expected.shape}")
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        raise AssertionError(f"{name}: NaN or inf in different places")
    bound = 2 * TERMS_EPS * EPS * float(np.max(terms))
    if not np.isfinite(bound):
        raise AssertionError(f"{name}: the bound is {bound}")
    size = float(np.abs(expected[finite]).max(initial=0.0))
    if (size <= bound) != zero:
        raise AssertionError(f"{name}: max |expected| is {size:.3g} beside a bound of {bound:.3g}, and zero={zero}")
    error = np.zeros(got.shape)
    error[finite] = np.abs(got[finite] - expected[finite])
    if error.max(initial=0.0) > bound:
        worst = np.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"{name}: npattn {got[worst]!r}, peer {expected[worst]!r} at {tuple(map(int, worst))}: they differ by "
            f"{error.max():.3g}, allowed {bound:.3g}; {(error > bound).sum()} of {error.size} elements do"
        )


def summed_to(x, shape):
    """x summed over the axes along which an array of this shape was broadcast to it."""
    full = (1,) * (x.ndim - len(shape)) + tuple(shape)
    return x.sum(tuple(a for a, n in enumerate(full) if n == 1), keepdims=True).reshape(shape)


class AttentionTerms(NamedTuple):
    """T of every array that attention computes; ``scores`` is T of the gradient of the biased scores."""

    out: np.ndarray
    weights: np.ndarray
    lse: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scores: np.ndarray
    sink: np.ndarray
    scale: np.ndarray


def attention_terms(cache, dout, dlse=0.0, *, bias=0.0, q=None, k=None, v=None, dout_terms=None):
    """T along the equations of npattn/ops/attention.py.

    cache : of the dense forward; bias : dense; q, k, v, dout_terms : T of what was itself computed
    """
    heads = cache.q.shape[-3] if cache.q.ndim > 2 else 1

    def each_head(x):
        x = np.abs(x)
        return x if x.ndim == 2 or x.shape[-3] == heads else x.repeat(heads // x.shape[-3], -3)

    def each_group(x):
        return x if x.shape == cache.k.shape[:-1] + x.shape[-1:] else x.reshape(
            *cache.k.shape[:-2], heads // cache.k.shape[-3], *x.shape[-2:]).sum(-3)  # fmt: skip

    absolute = [each_head(x) for x in (cache.q, cache.k, cache.v)]
    tq, tk, tv = (x if t is None else each_head(t) for t, x in zip((q, k, v), absolute, strict=True))
    q, k, v = absolute
    dout = np.abs(dout)
    tdout = dout if dout_terms is None else dout_terms
    a, w, drop = abs(cache.scale), cache.weights, 1.0 if cache.dropout is None else cache.dropout.dense()

    product = tq @ swap(k) + q @ swap(tk)
    ts = a * product + np.where(np.isfinite(bias), np.abs(bias), 0.0)
    mean_ts = (w * ts).sum(-1, keepdims=True)
    tw = w * (1 + ts + mean_ts)
    out = (tw * drop) @ v + (w * drop) @ tv
    lse = np.where(np.isfinite(cache.lse), np.abs(cache.lse), 0.0) + 1 + mean_ts[..., 0]
    if cache.sink is not None:
        lse = lse + np.abs(cache.sink)[:, None]

    tdp = (tdout @ swap(v) + dout @ swap(tv)) * drop
    mean = (tw * tdp).sum(-1, keepdims=True)
    tds = tw * (tdp + mean + np.abs(dlse)) + w * mean
    dsink = ((1 + mean_ts) * (mean + np.abs(dlse))).sum((-1, -2))
    tdx = tds
    if cache.softcap is not None:
        tdx = tds * (1 + 2 * a * product / cache.softcap)  # 1 - t^2 <= 1 moves by 2 |t| times what t moves by
    dq, dk = a * (tdx @ (k + tk)), a * (swap(tdx) @ (q + tq))
    dv = swap(tw * drop) @ tdout
    return AttentionTerms(
        out, tw, lse, dq, each_group(dk), each_group(dv), tds, dsink.reshape(-1, heads).sum(0), (tdx * product).sum()
    )


def multi_head_terms(cache, dout):
    """T of the outputs, weights and gradients of a multi-head layer by their names. cache : of the dense forward."""
    A, p, H = np.abs, cache.params, cache.attention.q.shape[-3]
    G = cache.attention.k.shape[-3]

    def split(x, heads):
        return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-3, -2)

    def merge(x):
        return x.swapaxes(-3, -2).reshape(*x.shape[:-3], x.shape[-2], -1)

    def project(x, w, b):
        return A(x) @ A(w) + (0.0 if b is None else A(b))

    def rows(x):
        return x.reshape(-1, x.shape[-1])

    tq, tk, tv = project(cache.x_q, p.w_q, p.b_q), project(cache.x_k, p.w_k, p.b_k), project(cache.x_v, p.w_v, p.b_v)
    heads = attention_terms(
        cache.attention, split(dout @ swap(p.w_o), H), q=split(tq, H), k=split(tk, G), v=split(tv, G),
        dout_terms=split(A(dout) @ A(swap(p.w_o)), H),
    )  # fmt: skip
    concat = merge(heads.out)
    terms = {"out": project(concat, p.w_o, p.b_o), "weights": heads.weights, "scores": heads.scores}
    terms["w_o"], terms["b_o"] = swap(rows(concat)) @ rows(A(dout)), rows(A(dout)).sum(0)
    for name in "qkv":
        x, w, d = getattr(cache, f"x_{name}"), getattr(p, f"w_{name}"), merge(getattr(heads, name))
        terms |= {f"x_{name}": d @ swap(A(w)), f"w_{name}": swap(rows(A(x))) @ rows(d), f"b_{name}": rows(d).sum(0)}
    return terms


def rnn_terms(cache, dh, dh_last, x=None):
    """T of the outputs and gradients of a recurrent layer by their names; h_t = f(z_t), |f'| <= 1.

    x, dh : T of what was itself computed
    """
    A, p, (B, T, N) = np.abs, cache.params, cache.states.shape
    h0 = np.zeros((B, N)) if cache.h0 is None else A(cache.h0)
    x, w_x, w_h, bias = A(cache.x) if x is None else x, A(p.w_x), A(p.w_h), 0.0 if p.b is None else A(p.b)
    valid = np.ones((B, T, 1), bool) if cache.valid is None else cache.valid
    x = np.where(valid, x, 0.0)
    slope, bend = (1 - cache.states**2, 2 * A(cache.states)) if cache.nonlinearity == "tanh" else (1.0, 0.0)
    slope, bend = np.broadcast_to(slope, (B, T, N)), np.broadcast_to(bend, (B, T, N))
    th, now = np.zeros((B, T, N)), h0
    for t in range(T):
        tz = x[:, t] @ w_x + bias + now @ w_h
        th[:, t] = np.where(valid[:, t], slope[:, t] * tz + A(cache.states[:, t]), 0.0)
        now = np.where(valid[:, t], th[:, t], now)
    dz, carry = np.zeros((B, T, N)), A(dh_last)
    for t in reversed(range(T)):
        dz[:, t] = np.where(valid[:, t], (A(dh[:, t]) + carry) * (slope[:, t] + bend[:, t] * th[:, t]), 0.0)
        carry = np.where(valid[:, t], dz[:, t] @ w_h, carry)
    before = np.concatenate([h0[:, None], th], 1)[:, :T]
    return {
        "h": th, "h_last": now, "x": dz @ w_x.T, "h0": carry, "b": dz.sum((0, 1)),
        "w_x": np.einsum("btm,btn->mn", x, dz), "w_h": np.einsum("btm,btn->mn", before, dz),
    }  # fmt: skip
