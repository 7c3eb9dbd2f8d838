"""A recurrent and a multi-head layer with one bad line at a time, as `npattn.verify.mutant_attention`, and what each bug is."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from npattn.ops.multihead import MultiHeadParams
from npattn.ops.rnn import RNNParams
from npattn.verify.candidates import Candidate
from npattn.verify.mutant_attention import QUIET, swap

# --- a recurrent layer --------------------------------------------------------------------------------------------------


def rnn_forward(x, h0, w_x, w_h, b, *, lengths, bug=None):
    """((h, h_last), cache) of h_t = tanh(x_t w_x + h_{t-1} w_h + b)."""
    T, h = x.shape[1], h0
    if bug == "initial state ignored":
        h = np.zeros_like(h0)
    if bug == "lengths of the first sequence":
        lengths = np.repeat(lengths[:1], len(lengths))
    states, outs = [h], []
    for t in range(T):
        z = x[:, t] @ w_x + h @ w_h + b
        if bug == "no bias in the first step" and t == 0:
            z = x[:, t] @ w_x + h @ w_h
        if bug == "input and state multiplied":
            z = (x[:, t] @ w_x + b) * (h @ w_h)
        if bug == "w_h transposed":
            z = x[:, t] @ w_x + h @ w_h.T + b
        if bug == "input of the next step":
            z = x[:, min(t + 1, T - 1)] @ w_x + h @ w_h + b
        new, now = np.tanh(z), (t < lengths)[:, None]
        if bug == "one step too many":
            now = (t <= lengths)[:, None]
        out = np.where(now, new, 0)
        if bug == "output goes on after the length":
            out = new
        if bug == "last state repeated after the length":
            out = np.where(now, new, h)
        h = np.where(now, new, h)
        if bug == "state goes on after the length":
            h = new
        states.append(h)
        outs.append(out)
    h_all, h_last = np.stack(outs, 1), h
    if bug == "h_last of step T":
        h_last = h_all[:, -1]
    if bug == "time and batch swapped":
        h_all = np.stack(outs).reshape(h_all.shape)
    return (h_all, h_last), (x, w_x, w_h, states, lengths)


def rnn_backward(d, cache, *, bug=None):
    """A mapping with the gradients of sum(dh * h) + sum(dh_last * h_last)."""
    (dh, carry), (x, w_x, w_h, states, lengths) = d, cache
    if bug == "dh_last ignored":
        carry = np.zeros_like(carry)
    T, dx = x.shape[1], np.zeros_like(x)
    dw_x, dw_h, db = np.zeros_like(w_x), np.zeros_like(w_h), np.zeros_like(w_h[0])
    for t in reversed(range(T)):
        before, h, now = states[t], states[t + 1], (t < lengths)[:, None]
        slope = 1 - h * h
        if bug == "slope of the state before":
            slope = 1 - before * before
        if bug == "slope 1 - h":
            slope = 1 - h
        if bug == "slope forgotten":
            slope = np.ones_like(h)
        if bug == "steps after the length take part":
            now = np.ones_like(now)
        dz = np.where(now, (dh[:, t] + carry) * slope, 0)
        if bug == "dh times slope, carry without":
            dz = np.where(now, dh[:, t] * slope + carry, 0)
        back = dz @ w_h.T
        if bug == "carried by w_h, not its transpose":
            back = dz @ w_h
        if bug == "not carried":
            back = np.zeros_like(back)
        last, carry = carry, np.where(now, back, carry)
        if bug == "carry lost after the length":
            carry = back
        dx[:, t] = dz @ w_x.T
        dw_x += x[:, t].T @ dz
        if bug == "w_h by the new state":
            before = h
        if bug == "= for += in w_h":
            dw_h[...] = 0
        dw_h += before.T @ dz
        if bug == "b of the first sequence":
            dz = dz[:1]
        if bug == "b of the last step alone":
            dz = dz * (t == T - 1)
        db += dz.sum(0)
    if bug == "h0 of one step too few":
        carry = last
    if bug == "dx a step late":
        dx = np.roll(dx, 1, 1)
    return {"x": dx, "h0": carry, "w_x": dw_x, "w_h": dw_h, "b": db}


# --- a multi-head layer -------------------------------------------------------------------------------------------------


def split(x, heads):
    """(B, L, H D) -> (B, H, L, D)"""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def merge(x):
    """(B, H, L, E) -> (B, L, H E)"""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def multi_head_forward(x_q, x_k, x_v, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, *, heads, groups, mask, bug=None):
    """(out, cache)"""
    if bug == "values of x_k":
        x_v = x_k
    if bug == "b_k forgotten":  # no bug: the same for all keys of a row
        b_k = 0 * b_k
    q, k, v = split(x_q @ w_q + b_q, heads), split(x_k @ w_k + b_k, groups), split(x_v @ w_v + b_v, groups)
    if bug == "b_q forgotten":
        q = split(x_q @ w_q, heads)
    if bug == "b_v forgotten":
        v = split(x_v @ w_v, groups)
    if bug == "head's columns interleaved":
        q = (x_q @ w_q + b_q).reshape(*x_q.shape[:2], -1, heads).transpose(0, 3, 1, 2)
    if bug == "one projection for all heads":
        q = np.repeat(q[:, :1], heads, 1)
    group = np.arange(heads) // (heads // groups)
    if bug == "head h reads h % G":
        group = np.arange(heads) % groups
    if bug == "head h reads h // G":
        group = np.minimum(np.arange(heads) // groups, groups - 1)
    scale = q.shape[-1] ** -0.5
    if bug == "scale of the model's width":
        scale = x_q.shape[-1] ** -0.5
    s = np.where(mask, scale * (q @ swap(k[:, group])), -np.inf)
    e = np.where(mask, np.exp(s - s.real.max(-1, keepdims=True, initial=-1e300)), 0)
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    o = p @ v[:, group]
    c = merge(o)
    if bug == "merged without a transpose":
        c = o.reshape(c.shape)
    if bug == "merged as if (H, B)":
        c = merge(o.reshape(heads, len(o), *o.shape[2:]).swapaxes(0, 1))
    if bug == "concat over E":
        c = o.transpose(0, 2, 3, 1).reshape(c.shape)
    if bug == "w_o transposed":
        w_o = w_o.T
    out = c @ w_o + b_o
    if bug == "b_o once a head":
        out = out + (heads - 1) * b_o
    if bug == "a dead query gives 0":
        out = np.where(mask.any(-1)[:, 0, :, None], out, 0)
    return out, (x_q, x_k, x_v, w_q, w_k, w_v, w_o, q, k, v, p, c, group, scale)


def multi_head_backward(dout, cache, *, bug=None):
    """A mapping with the gradients."""
    x_q, x_k, x_v, w_q, w_k, w_v, w_o, q, k, v, p, c, group, scale = cache
    groups = k.shape[1]

    def linear(dy, x, w):
        return dy @ w.T, np.einsum("blm,bln->mn", x, dy), dy.sum((0, 1))

    dc, dw_o, db_o = linear(dout, c, w_o)
    if bug == "b_o a mean":
        db_o = dout.mean((0, 1))
    do = split(dc, q.shape[1])
    if bug == "split without a transpose":
        do = dc.reshape(do.shape)
    if bug == "w_o by the heads as they lie":
        dw_o = linear(dout, (p @ v[:, group]).reshape(c.shape), w_o)[1]
    dv = swap(p) @ do
    dp = do @ swap(v[:, group])
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    dq, dk = scale * (ds @ k[:, group]), scale * (swap(ds) @ q)

    def of_groups(x):
        return x.reshape(len(x), groups, -1, *x.shape[2:]).sum(2)

    if bug == "first head of the group in dk":
        dk[:, np.arange(len(group)) % (len(group) // groups) > 0] = 0
    if bug == "mean of the group in dv":
        dv = dv / (len(group) // groups)
    if bug == "groups interleaved in dk":
        dk = dk.reshape(len(dk), -1, groups, *dk.shape[2:]).swapaxes(1, 2).reshape(dk.shape)
    dk, dv = of_groups(dk), of_groups(dv)
    dx_q, dw_q, db_q = linear(merge(dq), x_q, w_q)
    dx_k, dw_k, db_k = linear(merge(dk), x_k, w_k)
    dx_v, dw_v, db_v = linear(merge(dv), x_v, w_v)
    if bug == "w_q without a gradient":
        dw_q = np.zeros_like(w_q)
    if bug == "w_q of the first sequence":
        dw_q = linear(merge(dq)[:1], x_q[:1], w_q)[1]
    if bug == "w_k by x_v":
        dw_k = linear(merge(dk), x_v, w_k)[1]
    if bug == "b_v of the first sequence":
        db_v = merge(dv)[0].sum(0)
    if bug == "b_q of the heads as they lie":
        db_q = dq.sum((0, 2)).T.ravel()
    if bug == "x_k gets that of x_v":
        dx_k = dx_k + dx_v
    if bug == "b_k without a gradient":  # no bug: it is 0
        db_k = np.zeros_like(db_k)
    return {"x_q": dx_q, "x_k": dx_k, "x_v": dx_v, "w_q": dw_q, "w_k": dw_k, "w_v": dw_v, "w_o": dw_o,
            "b_q": db_q, "b_k": db_k, "b_v": db_v, "b_o": db_o}  # fmt: skip


def layer_candidate(op, *, forward=None, backward=None):
    """The layer with these bugs as a candidate for verify."""
    names = MultiHeadParams._fields if op == "multi_head" else RNNParams._fields

    def flat_params(params):
        return {n: np.zeros(0) if x is None else x for n, x in zip(names, params, strict=True)}

    def multi_head(x_q, x_k, x_v, params, *, num_heads, num_kv_heads=None, mask=None):
        if any(p is None for p in params):
            raise NotImplementedError("no biases")
        shape = (len(x_q), 1, x_q.shape[1], x_k.shape[1])
        mask = np.broadcast_to(True if mask is None else mask, shape) if np.ndim(mask) < 4 else mask
        return multi_head_forward(
            x_q, x_k, x_v, **flat_params(params), heads=num_heads, groups=num_kv_heads or num_heads, mask=mask, bug=forward
        )

    def multi_head_grads(dout, x_q, x_k, x_v, params, *, num_heads, num_kv_heads=None, mask=None):
        cache = multi_head(x_q, x_k, x_v, params, num_heads=num_heads, num_kv_heads=num_kv_heads, mask=mask)[1]
        return {f"d{n}": x for n, x in multi_head_backward(dout, cache, bug=backward).items()}

    def rnn(x, h0, params, *, lengths=None, nonlinearity="tanh"):
        if nonlinearity != "tanh" or params.b is None:
            raise NotImplementedError("tanh with a bias only")
        h0 = np.zeros((len(x), params.w_h.shape[0]), x.dtype) if h0 is None else h0
        lengths = np.full(len(x), x.shape[1]) if lengths is None else lengths
        return rnn_forward(x, h0, *params, lengths=lengths, bug=forward)

    def rnn_grads(dh, x, h0, params, *, lengths=None, nonlinearity="tanh", dh_last=None):
        (_, last), cache = rnn(x, h0, params, lengths=lengths, nonlinearity=nonlinearity)
        dh_last = np.zeros_like(last) if dh_last is None else dh_last
        grads = rnn_backward((dh, dh_last), cache, bug=backward)
        return {f"d{n}": g for n, g in grads.items() if h0 is not None or n != "h0"}

    def run(function):
        def quietly(*inputs, **options):
            with np.errstate(**QUIET):
                return function(*inputs, **options)

        return functools.wraps(function)(quietly)

    if op == "rnn":
        return Candidate("rnn", run(without_cache(rnn)), run(rnn_grads), op=op)
    return Candidate("multi_head", run(without_cache(multi_head)), run(multi_head_grads), op=op)


def without_cache(function):
    """The forward without its cache."""

    @functools.wraps(function)
    def forward(*inputs, **options):
        return function(*inputs, **options)[0]

    return forward


class LayerMutant(NamedTuple):
    """One bug of a layer. A forward is compared with the package's, a backward with derivatives of the honest forward."""

    kind: str
    where: str
    text: str
    tensor: str  # what the check names


def _layer(kind, forward, backward):
    rows = {name: LayerMutant(kind, "forward", *row) for name, row in forward.items()}
    assert not set(rows) & set(backward)
    return rows | {name: LayerMutant(kind, "backward", *row) for name, row in backward.items()}


RNN_MUTANTS = _layer("10", {
    "initial state ignored": ("h0 = 0", "h"),
    "lengths of the first sequence": ("for all", "h"),
    "no bias in the first step": ("the hidden term skipped with its bias", "h"),
    "input and state multiplied": ("* for +", "h"),
    "w_h transposed": ("h w_h^T", "h"),
    "input of the next step": ("t + 1", "h"),
    "one step too many": ("t <= length", "h"),
    "output goes on after the length": ("not 0", "h"),
    "last state repeated after the length": ("not 0", "h"),
    "state goes on after the length": ("the returned state taken at T", "h_last"),
    "h_last of step T": ("not of the length", "h_last"),
    "time and batch swapped": ("(T, B, N) taken for (B, T, N)", "h"),
}, {
    "dh_last ignored": ("the state is an output too", "x"),
    "slope of the state before": ("1 - h_{t-1}^2", "x"),
    "slope 1 - h": ("no square", "x"),
    "slope forgotten": ("no (3)", "x"),
    "steps after the length take part": ("0 is not their state", "x"),
    "dh times slope, carry without": ("the parenthesis", "x"),
    "carried by w_h, not its transpose": ("the Jacobian's order", "x"),
    "not carried": ("every step alone", "x"),
    "carry lost after the length": ("padding passes it on", "x"),
    "w_h by the new state": ("h_t for h_{t-1}", "w_h"),
    "= for += in w_h": ("the first step alone", "w_h"),
    "b of the first sequence": ("not summed", "b"),
    "b of the last step alone": ("not summed", "b"),
    "h0 of one step too few": ("before the last product", "h0"),
    "dx a step late": ("off by one", "x"),
})  # fmt: skip

MULTI_HEAD_MUTANTS = _layer("8", {
    "values of x_k": ("one input for both", "out"),
    "b_q forgotten": ("no bias", "out"),
    "b_v forgotten": ("no bias", "out"),
    "head's columns interleaved": ("(D, H) for (H, D)", "out"),
    "one projection for all heads": ("the first head's", "out"),
    "head h reads h % G": ("for h // (H // G)", "out"),
    "head h reads h // G": ("for h // (H // G)", "out"),
    "scale of the model's width": ("1/sqrt(M)", "out"),
    "merged without a transpose": ("reshape alone", "out"),
    "merged as if (H, B)": ("data is (B, H)", "out"),
    "concat over E": ("(E, H) for (H, E)", "out"),
    "w_o transposed": ("a square matrix", "out"),
    "b_o once a head": ("added too often", "out"),
    "a dead query gives 0": ("not b_o", "out"),
}, {
    "b_o a mean": ("over the tokens", "b_o"),
    "split without a transpose": ("reshape alone", "x_q"),
    "w_o by the heads as they lie": ("(B, H, L, E) for (B, L, H E)", "w_o"),
    "first head of the group in dk": ("not the sum", "x_k"),
    "mean of the group in dv": ("not the sum", "x_v"),
    "groups interleaved in dk": ("(H / G, G) for (G, H / G)", "x_k"),
    "w_q without a gradient": ("the graph cut", "w_q"),
    "w_q of the first sequence": ("not summed", "w_q"),
    "w_k by x_v": ("the wrong input", "w_k"),
    "b_v of the first sequence": ("not summed", "b_v"),
    "b_q of the heads as they lie": ("(D, H) for (H, D)", "b_q"),
    "x_k gets that of x_v": ("as if they were one array", "x_k"),
})  # fmt: skip


__all__ = ["MULTI_HEAD_MUTANTS", "RNN_MUTANTS", "LayerMutant", "layer_candidate"]
