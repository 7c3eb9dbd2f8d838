"""The recurrent layer, the baseline with which attention is compared.

    a_t = x_t w_x + b                 (B, N)      (1)    for all t in one product
    z_t = a_t + h_{t-1} w_h           (B, N)      (2)
    h_t = tanh(z_t)  or  relu(z_t)    (B, N)      (3)

Elman 1990. The derivative of (3) is written with its output: 1 - h_t^2, or 1 where h_t > 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select, swap
from npattn.ops.checks import Array, check_class, check_cotangent, check_one_of
from npattn.ops.edge import explain_keywords, without_cache
from npattn.ops.recurrent import (
    all_steps,
    bias_gradient,
    by_step,
    check_recurrent,
    first_state,
    input_gradient,
    product_with,
    reached,
    states_before,
    swap_steps,
    weight_gradients,
)


class RNNParams(NamedTuple):
    """Weights (in, out), applied as x @ w."""

    w_x: Array  # (M, N)
    w_h: Array  # (N, N)
    b: Array | None = None  # (N,)


class RNNCache(NamedTuple):
    """What the backward needs, and the last valid state."""

    x: Array  # (B, T, M)
    h0: Array | None  # (B, N)
    params: RNNParams
    valid: Array | None  # (B, T, 1) True for the steps within a sequence's length; None: all
    nonlinearity: str
    states: Array  # (B, T, N) h_t in the computing dtype, 0 after a sequence's length
    h_last: Array  # (B, N) the last valid state, h0 where the length is 0; in the dtype of x


class RNNGrads(NamedTuple):
    """The gradients of `rnn`; those of params have its names."""

    x: Array
    h0: Array  # also if h0 was None, which means zeros
    params: RNNParams


@explain_keywords
@quiet
def rnn_forward(
    x: Array, h0: Array | None, params: RNNParams, *, lengths: Any = None, nonlinearity: str = "tanh"
) -> tuple[Array, RNNCache]:
    """A recurrent layer over T steps, equations (1) to (3) of this page.

    x : (B, T, M)   h0 : (B, N), None = zeros   params : see `RNNParams`   nonlinearity : "tanh" or "relu"
    lengths : integers (B,), 0 to T: later steps have output 0 and leave state and gradients as they are, whatever x holds there
    Returns h (B, T, N), and the cache; ``cache.h_last`` (B, N) is the last valid state. Raises TypeError, ValueError.
    """
    check_one_of("rnn", "nonlinearity", nonlinearity, ("tanh", "relu"))
    valid, computing = check_recurrent("rnn", x, {"h0": h0}, params, RNNParams, 1, lengths)
    (B, T, _), N = x.shape, params.w_h.shape[0]
    states = all_steps(x, params.w_x, params.b, computing)  # (1)
    times_w_h, h = product_with(params.w_h.astype(computing, copy=False), B, T), first_state(h0, B, N, computing)
    for t, h_t in enumerate(states):  # h_t holds a_t at first
        z = times_w_h(h)
        z += h_t  # (2)
        new = np.tanh(z, out=h_t) if nonlinearity == "tanh" else select(~(z.real <= 0), z)  # (3); a NaN is passed on
        if valid is not None:
            new, h = select(valid[:, t], new), np.where(valid[:, t], new, h)
        h_t[...] = new
        h = h_t if valid is None else h
    out = np.ascontiguousarray(swap_steps(states), x.dtype)
    return out, RNNCache(x, h0, params, valid, nonlinearity, swap_steps(states), h.astype(x.dtype))


@quiet
def rnn_backward(dh: Array, cache: RNNCache, dh_last: Array | None = None) -> RNNGrads:
    """The gradients of sum(dh * h) + sum(dh_last * h_last), backwards through time. dh : (B, T, N); dh_last : (B, N).

    ``carry`` is the gradient of h_t through all later steps; steps after a sequence's length do not change it. Raises
    TypeError, ValueError.
    """
    check_class("rnn", "cache", cache, RNNCache, ", from rnn_forward")
    c, params, h, computing = cache, cache.params, cache.states, cache.states.dtype
    dh, (B, T, N) = check_cotangent("rnn", "dh", dh, h.shape, c.x.dtype, computing), h.shape
    if dh_last is not None:
        dh_last = check_cotangent("rnn", "dh_last", dh_last, (B, N), c.x.dtype, computing)
    carry = first_state(dh_last, B, N, computing)
    times_back_h = product_with(swap(params.w_h.astype(computing, copy=False)), B, T)
    h, dz, slope = by_step(h, computing), np.empty((T, B, N), computing), np.empty((B, N), computing)
    finite = bool(np.isfinite(h).all())
    for t in reversed(range(T)):
        if c.nonlinearity == "tanh":
            np.subtract(1, np.square(h[t], out=slope), out=slope)
        else:
            slope = np.where(h[t].real > 0, computing.type(1), 0 * h[t])  # NaN is passed on
        now, d = None if c.valid is None else c.valid[:, t], np.add(dh[:, t], carry, out=dz[t])
        if now is not None:
            d[...] = select(now, d)
        d *= slope if finite else select(reached(d), slope)  # (3); NaN of a step that no gradient reaches stays there
        back = times_back_h(d)  # (2)
        carry = back if now is None else np.where(now, back, carry)
    grads = RNNParams(
        weight_gradients(by_step(c.x, computing), dz, params.w_x),  # (1)
        weight_gradients(states_before(c.h0, c.states), dz, params.w_h),  # (2)
        bias_gradient(params.b, dz),  # (1)
    )
    return RNNGrads(input_gradient(dz, params.w_x, c.x.dtype), carry.astype(c.x.dtype), grads)  # (1), for all steps at once


rnn = without_cache(rnn_forward)


__all__ = ["RNNCache", "RNNGrads", "RNNParams", "rnn", "rnn_backward", "rnn_forward"]
