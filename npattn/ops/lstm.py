"""Long short-term memory: a cell c carries what the layer remembers, and three gates write to it, erase it and show it.

The columns of w_x, w_h and b are four blocks of N, in this order: i (input), f (forget), g (cell), o (output), as in torch.

    a_t = x_t w_x + b                              (B, 4N)   (1)    for all t in one product
    p_t = a_t + h_{t-1} w_h                        (B, 4N)   (2)    its blocks are p_i, p_f, p_g, p_o
    i_t, f_t, o_t = s(p_i), s(p_f), s(p_o)         (B, N)    (3)    s(u) = 1 / (1 + exp(-u))
    g_t = tanh(p_g)                                (B, N)    (4)
    c_t = f_t c_{t-1} + i_t g_t                    (B, N)    (5)
    h_t = o_t tanh(c_t)                            (B, N)    (6)

Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000 and without peepholes. There is one bias: torch and
ONNX have two, of which only the sum counts. TensorFlow's ``forget_bias=1`` is 1 in the second block of b.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select, swap
from npattn.ops.checks import Array, check_class, check_cotangent
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


class LSTMParams(NamedTuple):
    """Weights (in, out), applied as x @ w. The columns are those of i, then f, then g, then o."""

    w_x: Array  # (M, 4N)
    w_h: Array  # (N, 4N)
    b: Array | None = None  # (4N,)


class LSTMCache(NamedTuple):
    """What the backward needs, and the last valid states. Gates and states are in the computing dtype."""

    x: Array  # (B, T, M)
    h0: Array | None  # (B, N)
    c0: Array | None  # (B, N)
    params: LSTMParams
    valid: Array | None  # (B, T, 1) True for the steps within a sequence's length; None: all
    gates: Array  # (T, B, 4N) i_t, f_t, g_t, o_t
    cells: Array  # (B, T, N) c_t, 0 after a sequence's length
    states: Array  # (B, T, N) h_t, 0 after a sequence's length
    h_last: Array  # (B, N) the last valid h, h0 where the length is 0; in the dtype of x
    c_last: Array  # (B, N) the last valid c, likewise


class LSTMGrads(NamedTuple):
    """The gradients of `lstm`; those of params have its names."""

    x: Array
    h0: Array  # also if h0 was None, which means zeros
    c0: Array  # likewise
    params: LSTMParams


@explain_keywords
@quiet
def lstm_forward(
    x: Array, h0: Array | None, c0: Array | None, params: LSTMParams, *, lengths: Any = None
) -> tuple[Array, LSTMCache]:
    """A layer of long short-term memory over T steps, equations (1) to (6) of this page.

    x : (B, T, M)   h0, c0 : (B, N), None = zeros   params : see `LSTMParams`
    lengths : integers (B,), 0 to T: later steps have output 0 and leave states and gradients as they are, whatever x holds
    Returns h (B, T, N), and the cache; ``cache.h_last`` and ``cache.c_last`` (B, N) are the last valid states. Raises
    TypeError, ValueError.
    """
    valid, computing = check_recurrent("lstm", x, {"h0": h0, "c0": c0}, params, LSTMParams, 4, lengths)
    (B, T, _), N = x.shape, params.w_h.shape[0]
    times_w_h = product_with(params.w_h.astype(computing, copy=False), B, T)
    gates = all_steps(x, params.w_x, params.b, computing)  # (1); a_t at first
    cells, states = np.empty((T, B, N), computing), np.empty((T, B, N), computing)
    h, c = first_state(h0, B, N, computing), first_state(c0, B, N, computing)
    for t, p in enumerate(gates):
        p += times_w_h(h)  # (2)
        i, f, g, o = gates_of(p, 4)
        gate(p[:, : 2 * N])  # (3)
        gate(o)  # (3)
        np.tanh(g, out=g)  # (4)
        new_c = f * c + i * g  # (5)
        new_h = o * np.tanh(new_c)  # (6)
        now = None if valid is None else valid[:, t]
        cells[t], states[t] = select(now, new_c), select(now, new_h)
        h, c = (new_h, new_c) if now is None else (np.where(now, new_h, h), np.where(now, new_c, c))
    out = np.ascontiguousarray(swap_steps(states), x.dtype)
    last = h.astype(x.dtype), c.astype(x.dtype)
    return out, LSTMCache(x, h0, c0, params, valid, gates, swap_steps(cells), swap_steps(states), *last)


@quiet
def lstm_backward(
    dh: Array, cache: LSTMCache, dh_last: Array | None = None, dc_last: Array | None = None
) -> LSTMGrads:
    """The gradients of sum(dh * h) + sum(dh_last * h_last) + sum(dc_last * c_last), backwards through time.

    dh : (B, T, N); dh_last, dc_last : (B, N). ``carry_h`` and ``carry_c`` are the gradients of h_t and c_t through all later
    steps; steps after a sequence's length do not change them. Raises TypeError, ValueError.
    """
    check_class("lstm", "cache", cache, LSTMCache, ", from lstm_forward")
    k, params, computing = cache, cache.params, cache.states.dtype
    dh, (B, T, N) = check_cotangent("lstm", "dh", dh, k.states.shape, k.x.dtype, computing), k.states.shape
    carries = []
    for name, last in (("dh_last", dh_last), ("dc_last", dc_last)):
        given = None if last is None else check_cotangent("lstm", name, last, (B, N), k.x.dtype, computing)
        carries.append(first_state(given, B, N, computing))
    carry_h, carry_c = carries
    times_back_h = product_with(swap(params.w_h.astype(computing, copy=False)), B, T)
    before, cells_before, shown = states_before(k.h0, k.states), states_before(k.c0, k.cells), np.tanh(swap_steps(k.cells))
    finite, dp = bool(np.isfinite(k.gates).all()), np.empty((T, B, 4 * N), computing)
    for t in reversed(range(T)):
        now = None if k.valid is None else k.valid[:, t]
        d, dc, p, c, u = select(now, dh[:, t] + carry_h), select(now, carry_c), k.gates[t], cells_before[t], shown[t]
        if not finite:  # NaN of a step that no gradient reaches stays there
            p, c, u = (select(reached(d, dc), y) for y in (p, c, u))
        i, f, g, o = gates_of(p, 4)
        slope = p * (1 - p)  # of (3)
        gates_of(slope, 4)[2] = 1 - g * g  # of (4)
        dc = dc + d * o * (1 - u * u)  # (6)
        di, df, dg, do = gates_of(dp[t], 4)
        np.multiply(d, u, out=do)  # (6)
        np.multiply(dc, g, out=di)  # (5)
        np.multiply(dc, c, out=df)  # (5)
        np.multiply(dc, i, out=dg)  # (5)
        dp[t] *= slope  # (4), (3)
        back, back_c = times_back_h(dp[t]), dc * f  # (2), (5)
        carry_h, carry_c = (back, back_c) if now is None else (np.where(now, back, carry_h), np.where(now, back_c, carry_c))
    grads = LSTMParams(
        weight_gradients(by_step(k.x, computing), dp, params.w_x),  # (1)
        weight_gradients(before, dp, params.w_h),  # (2)
        bias_gradient(params.b, dp),  # (1)
    )
    return LSTMGrads(
        input_gradient(dp, params.w_x, k.x.dtype), carry_h.astype(k.x.dtype), carry_c.astype(k.x.dtype), grads  # (1)
    )


lstm = without_cache(lstm_forward)

__all__ = ["LSTMCache", "LSTMGrads", "LSTMParams", "lstm", "lstm_backward", "lstm_forward"]
