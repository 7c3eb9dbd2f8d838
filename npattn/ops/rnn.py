"""The recurrent layer, the baseline with which attention is compared.

    a_t = x_t w_x + b                 (B, N)      (1)    for all t in one product
    z_t = a_t + h_{t-1} w_h           (B, N)      (2)
    h_t = tanh(z_t)  or  relu(z_t)    (B, N)      (3)

Elman 1990. The derivative of (3) is written with its output: 1 - h_t^2, or 1 where h_t > 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select, swap, weight_gradient
from npattn.ops.checks import Array, Dims, check_class, check_cotangent, check_dtype, check_one_of, check_other_dtype, integers
from npattn.ops.edge import explain_keywords, without_cache


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
    valid, computing = _check(x, h0, params, lengths)
    (B, T, M), N = x.shape, params.w_h.shape[0]
    w_x, w_h = (p.astype(computing, copy=False) for p in params[:2])
    states = np.empty((T, B, N), computing)  # each step is contiguous
    np.matmul(by_step(x, computing).reshape(T * B, M), w_x, out=states.reshape(T * B, N))  # (1)
    if params.b is not None:
        states += params.b.astype(computing, copy=False)  # (1)
    h, z = np.zeros((B, N), computing) if h0 is None else h0.astype(computing), np.empty((B, N), computing)
    for t, h_t in enumerate(states):  # h_t holds a_t at first
        z = np.add(h_t, np.matmul(h, w_h, out=z), out=z)  # (2)
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
    dh = check_cotangent("rnn", "dh", dh, h.shape, c.x.dtype, computing)
    B, T, N = h.shape
    carry = np.zeros((B, N), computing)
    if dh_last is not None:
        carry = check_cotangent("rnn", "dh_last", dh_last, (B, N), c.x.dtype, computing).copy()
    w_x, w_h = (p.astype(computing, copy=False) for p in params[:2])
    back_h = np.ascontiguousarray(swap(w_h))  # products with few rows read it faster
    h, dz, slope = by_step(h, computing), np.empty((T, B, N), computing), np.empty((B, N), computing)
    for t in reversed(range(T)):
        if c.nonlinearity == "tanh":
            np.subtract(1, np.square(h[t], out=slope), out=slope)
        else:
            slope = np.where(h[t].real > 0, computing.type(1), 0 * h[t])  # NaN is passed on
        now, d = None if c.valid is None else c.valid[:, t], np.add(dh[:, t], carry, out=dz[t])
        d *= slope  # (3)
        d[...] = select(now, d)
        back = np.matmul(d, back_h, out=carry if now is None else None)  # (2)
        carry = back if now is None else np.where(now, back, carry)
    first = weight_gradient(c.h0, dz[0]) if c.h0 is not None and T else computing.type(0)  # h_{t-1} of the first step
    grads = RNNParams(
        weight_gradient(by_step(c.x, computing), dz).astype(params.w_x.dtype, copy=False),  # (1)
        (first + weight_gradient(h[: max(T - 1, 0)], dz[1:])).astype(params.w_h.dtype, copy=False),  # (2)
        None if params.b is None else dz.sum((0, 1)).astype(params.b.dtype, copy=False),  # (1)
    )
    dx = np.matmul(dz.reshape(T * B, N), swap(w_x)).reshape(T, B, w_x.shape[0])  # (1), for all steps at once
    dx = swap_steps(dx).astype(c.x.dtype, order="C")
    return RNNGrads(dx, carry.astype(c.x.dtype), grads)


def swap_steps(x: Array) -> Array:
    """(B, T, N) -> (T, B, N) and back, as a view."""
    result: Array = x.swapaxes(0, 1)
    return result


def by_step(x: Array, computing: np.dtype[Any]) -> Array:
    """(B, T, N) -> (T, B, N), contiguous, since the steps are computed one by one."""
    return np.ascontiguousarray(swap_steps(x), computing)


def _check(x: Any, h0: Any, params: Any, lengths: Any) -> tuple[Array | None, np.dtype[Any]]:
    op = "rnn"
    check_class(op, "params", params, RNNParams)
    computing, dims = check_dtype(op, x=x), Dims(op)
    dims.fit("x", x, "B T M")
    for name, spec in (("w_x", "M N"), ("w_h", "N N"), ("b", "N")):
        p = getattr(params, name)
        if p is not None or name != "b":
            dims.fit(name, check_other_dtype(op, name, p, x.dtype, computing), spec)
    if h0 is not None:
        dims.fit("h0", h0, "B N")
        check_dtype(op, x=x, h0=h0)
    if lengths is None:
        return None, computing
    n = dims.fit("lengths", integers(op, "lengths", lengths), "B")
    if n.size and not (n.min() >= 0 and n.max() <= dims["T"]):
        raise ValueError(f"{op}: lengths reaches from {n.min()} to {n.max()}, expected 0 to T={dims['T']}: fixed by x")
    return (np.arange(dims["T"]) < n[:, None])[..., None], computing


rnn = without_cache(rnn_forward)


__all__ = ["RNNCache", "RNNGrads", "RNNParams", "rnn", "rnn_backward", "rnn_forward"]
