"""The gated recurrent unit: two gates decide how much of its state a layer reads and how much it keeps.

The columns of w_x, w_h, b_x and b_h are three blocks of N, in this order: r (reset), z (update), n (new), as in torch.

    a_t = x_t w_x + b_x                       (B, 3N)   (1)    for all t in one product; its blocks are a_r, a_z, a_n
    m_t = h_{t-1} w_h + b_h                   (B, 3N)   (2)    its blocks are m_r, m_z, m_n
    r_t, z_t = s(a_r + m_r), s(a_z + m_z)     (B, N)    (3)    s(u) = 1 / (1 + exp(-u))
    n_t = tanh(a_n + r_t m_n)                 (B, N)    (4)
    h_t = (1 - z_t) n_t + z_t h_{t-1}         (B, N)    (5)

This is the form of cuDNN, torch and Keras (``reset_after=True``): the reset gate acts after the product (2). In the original,
Cho et al. 2014, it acts on the state before the product, which is then made for the new block by itself:

    m_n = (r_t h_{t-1}) w_hn + b_hn           (B, N)    (2')
    n_t = tanh(a_n + m_n)                     (B, N)    (4')

Some papers write z for 1 - z: their (5) is h_t = z_t n_t + (1 - z_t) h_{t-1}.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select, swap
from npattn.ops.checks import Array, check_class, check_cotangent, check_flag
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.recurrent import (
    all_steps,
    bias_gradient,
    by_step,
    check_recurrent,
    first_state,
    gate,
    gates_of,
    input_gradient,
    product_with,
    reached,
    states_before,
    swap_steps,
    weight_gradients,
)


class GRUParams(NamedTuple):
    """Weights (in, out), applied as x @ w. The columns are those of r, then z, then n."""

    w_x: Array  # (M, 3N)
    w_h: Array  # (N, 3N)
    b_x: Array | None = None  # (3N,)
    b_h: Array | None = None  # (3N,) its last block stands inside of r_t m_n where reset_after is True


class GRUCache(NamedTuple):
    """What the backward needs, and the last valid state. All but h_last is in the computing dtype."""

    x: Array  # (B, T, M)
    h0: Array | None  # (B, N)
    params: GRUParams
    valid: Array | None  # (B, T, 1) True for the steps within a sequence's length; None: all
    reset_after: bool
    gates: Array  # (T, B, 3N) r_t, z_t, n_t
    m_n: Array  # (T, B, N)
    states: Array  # (B, T, N) h_t, 0 after a sequence's length
    h_last: Array  # (B, N) the last valid state, h0 where the length is 0; in the dtype of x


class GRUGrads(NamedTuple):
    """The gradients of `gru`; those of params have its names."""

    x: Array
    h0: Array  # also if h0 was None, which means zeros
    params: GRUParams


@explain_keywords
@quiet
def gru_forward(
    x: Array, h0: Array | None, params: GRUParams, *, lengths: Any = None, reset_after: bool = True
) -> tuple[Array, GRUCache]:
    """A layer of gated recurrent units over T steps, equations (1) to (5) of this page.

    x : (B, T, M)   h0 : (B, N), None = zeros   params : see `GRUParams`
    lengths     : integers (B,), 0 to T: later steps have output 0 and leave state and gradients as they are, whatever x holds
    reset_after : the reset gate multiplies m_n (True), or the state before the product, (2') and (4') (False)
    Returns h (B, T, N), and the cache; ``cache.h_last`` (B, N) is the last valid state. Raises TypeError, ValueError.
    """
    reset_after = check_flag("gru", "reset_after", reset_after)
    valid, computing = check_recurrent("gru", x, {"h0": h0}, params, GRUParams, 3, lengths)
    (B, T, _), N = x.shape, params.w_h.shape[0]
    w_h, b_h = params.w_h.astype(computing, copy=False), np.zeros(3 * N, computing)
    if params.b_h is not None:
        b_h = params.b_h.astype(computing, copy=False)
    first = 3 * N if reset_after else 2 * N  # columns that are made before the gates
    times_w_h, times_w_n = product_with(w_h[:, :first], B, T), product_with(w_h[:, 2 * N :], B, T)
    b_h, b_n = b_h[:first], b_h[2 * N :]
    gates = all_steps(x, params.w_x, params.b_x, computing)  # (1); a_t at first
    states, m_n = np.empty((T, B, N), computing), np.empty((T, B, N), computing)
    h = first_state(h0, B, N, computing)
    for t in range(T):
        m, rz, n = times_w_h(h), gates[t, :, : 2 * N], gates[t, :, 2 * N :]
        m += b_h  # (2)
        rz += m[:, : 2 * N]
        gate(rz)  # (3)
        r, z = rz[:, :N], rz[:, N:]
        m_n[t] = m[:, 2 * N :] if reset_after else times_w_n(r * h) + b_n  # (2) or (2')
        n += r * m_n[t] if reset_after else m_n[t]
        np.tanh(n, out=n)  # (4) or (4')
        now, new = None if valid is None else valid[:, t], (1 - z) * n + z * h  # (5)
        states[t] = select(now, new)
        h = new if now is None else np.where(now, new, h)
    out = np.ascontiguousarray(swap_steps(states), x.dtype)
    cache = GRUCache(x, h0, params, valid, reset_after, gates, m_n, swap_steps(states), h.astype(x.dtype))
    return out, cache


@quiet
def gru_backward(dh: Array, cache: GRUCache, dh_last: Array | None = None) -> GRUGrads:
    """The gradients of sum(dh * h) + sum(dh_last * h_last), backwards through time. dh : (B, T, N); dh_last : (B, N).

    ``carry`` is the gradient of h_t through all later steps; steps after a sequence's length do not change it. Raises
    TypeError, ValueError.
    """
    check_class("gru", "cache", cache, GRUCache, ", from gru_forward")
    c, params, computing = cache, cache.params, cache.states.dtype
    dh, (B, T, N) = check_cotangent("gru", "dh", dh, c.states.shape, c.x.dtype, computing), c.states.shape
    if dh_last is not None:
        dh_last = check_cotangent("gru", "dh_last", dh_last, (B, N), c.x.dtype, computing)
    carry = first_state(dh_last, B, N, computing)
    back_h = swap(params.w_h.astype(computing, copy=False))
    first = 3 * N if c.reset_after else 2 * N
    times_back_h, times_back_n = product_with(back_h[:first], B, T), product_with(back_h[2 * N :], B, T)
    before, finite = states_before(c.h0, c.states), bool(np.isfinite(c.gates).all())
    da, dm = np.empty((T, B, 3 * N), computing), np.empty((T, B, 3 * N), computing)
    for t in reversed(range(T)):
        now = None if c.valid is None else c.valid[:, t]
        d, p, m_n, h = select(now, dh[:, t] + carry), c.gates[t], c.m_n[t], before[t]
        if not finite:  # NaN of a step that no gradient reaches stays there
            p, m_n, h = (select(reached(d), y) for y in (p, m_n, h))
        (r, z, n), (dr, dz, dn), dm_n = gates_of(p, 3), gates_of(da[t], 3), dm[t, :, 2 * N :]
        rz, drz = p[:, : 2 * N], da[t, :, : 2 * N]
        np.multiply(d, h - n, out=dz)  # (5)
        np.multiply(d * (1 - z), 1 - n * n, out=dn)  # (5), (4)
        back = d * z  # (5)
        if c.reset_after:
            np.multiply(dn, m_n, out=dr)  # (4)
            np.multiply(dn, r, out=dm_n)  # (4)
        else:
            dreset = times_back_n(dn)  # (4'), (2')
            np.multiply(dreset, h, out=dr)  # (2')
            dm_n[...] = dn  # (4')
            back += dreset * r  # (2')
        drz *= rz * (1 - rz)  # (3)
        dm[t, :, : 2 * N] = drz
        back += times_back_h(dm[t, :, :first])  # (2)
        carry = back if now is None else np.where(now, back, carry)
    dw_h = weight_gradients(before, dm, params.w_h)  # (2)
    if not c.reset_after:
        dw_h[:, 2 * N :] = weight_gradients(c.gates[..., :N] * before, dm[..., 2 * N :], params.w_h)  # (2')
    dw_x = weight_gradients(by_step(c.x, computing), da, params.w_x)  # (1)
    grads = GRUParams(dw_x, dw_h, bias_gradient(params.b_x, da), bias_gradient(params.b_h, dm))  # (1), (2)
    return GRUGrads(input_gradient(da, params.w_x, c.x.dtype), carry.astype(c.x.dtype), grads)


gru = without_cache(gru_forward)

__all__ = ["GRUCache", "GRUGrads", "GRUParams", "gru", "gru_backward", "gru_forward"]
