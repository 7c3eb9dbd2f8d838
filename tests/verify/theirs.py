"""Functions to be verified, right and wrong ones. The command finds them as ``theirs:right``."""

import numpy as np

from npattn import attention_backward, attention_forward
from npattn.verify import PRECISIONS
from npattn.verify.rounded import rounded


def right(q, k, v, *, mask=None, softcap=None):
    return attention_forward(q, k, v, mask=mask, softcap=softcap)[0]


def backward(dout, q, k, v, *, mask=None, softcap=None):
    g = attention_backward(dout, attention_forward(q, k, v, mask=mask, softcap=softcap)[1])
    return g.q, g.k, g.v


def wrong(q, k, v, *, mask=None, softcap=None):
    return 1.5 * right(q, k, v, mask=mask, softcap=softcap)


def wrong_shape(q, k, v):
    return q[1:]


def uncapped(q, k, v, *, mask=None, softcap=None):
    return right(q, k, v, mask=mask)


def uncapped_from_five_queries(q, k, v, *, softcap=None):
    return right(q, k, v, softcap=softcap if q.shape[-2] < 5 else None)


def refusing(q, k, v):
    raise NotImplementedError("no such device")


def nearly(q, k, v):
    """Off by some hundred sigma, and by less than ONNX's rule allows."""
    return right(q, k, v) * np.float32(1 + 1e-5)


def without_alignment(q, k, v, *, causal=False, window=None):
    L, S = q.shape[-2], k.shape[-2]
    return right(q, k, v, mask=np.tri(L, S, S - L, dtype=bool) if causal else None)


def with_names_of_torch(q, k, v, attn_mask=None, *, is_causal=False):
    return right(q, k, v)


def unsteady(q, k, v, calls=[0]):  # noqa: B006
    """Each call returns other bits than the one before."""
    calls[0] += 1
    return np.nextafter(right(q, k, v), np.float32(9 if calls[0] % 2 else -9))


def scores_themselves(scores):
    return scores


low, low_backward = rounded(PRECISIONS["float16-M2"])


# --- one that takes every option, written out once more -------------------------------------------------------------------


def dense(q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None):
    """Plain NumPy in the inputs' precision: (out, lse)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    with np.errstate(all="ignore"):
        s = scale * (q @ k.swapaxes(-1, -2))
        if softcap is not None:
            s = softcap * np.tanh(s / softcap)
        allowed = np.ones(s.shape, bool) if mask is None else np.broadcast_to(mask, s.shape)
        if bias is not None:
            s, allowed = s + bias, allowed & (bias > -np.inf)
        s = np.where(allowed, s, -np.inf)
        top = s.max(-1, keepdims=True, initial=-np.inf)
        if sink is not None:
            top = np.maximum(top, sink[:, None, None])
        top = np.where(top == -np.inf, s.dtype.type(0), top)
        e = np.exp(s - top)
        z = e.sum(-1, keepdims=True) + (0 if sink is None else np.exp(sink[:, None, None] - top))
        p = np.where(allowed, e / np.where(z == 0, s.dtype.type(1), z), s.dtype.type(0))
        w = p if dropout_mask is None else p * dropout_mask
        # A value that is not finite reaches the queries that see it, and no other.
        finite = np.isfinite(v).all((0, 1, 3))
        out = w @ np.where(finite[:, None], v, v.dtype.type(0))
        for j in np.flatnonzero(~finite):
            out += np.where(allowed[..., j : j + 1], w[..., j : j + 1] * v[:, :, j : j + 1], v.dtype.type(0))
        return out, (top + np.log(z))[..., 0]


def dense_backward(dout, q, k, v, *, dlse=None, **options):
    g = attention_backward(dout, attention_forward(q, k, v, **options)[1], dlse)
    return {"dq": g.q, "dk": g.k, "dv": g.v, "dbias": g.bias, "dsink": g.sink}


def causal_at_the_end(q, k, v, *, mask=None, scale=None, causal=False):
    """Aligned with the last key."""
    if causal:
        lower = np.tri(q.shape[-2], k.shape[-2], k.shape[-2] - q.shape[-2], dtype=bool)
        mask = lower if mask is None else mask & lower
    return dense(q, k, v, mask=mask, scale=scale)


def group_forgotten(dout, q, k, v, **options):
    """dk of one head of each group in place of their sum."""
    g, group = dense_backward(dout, q, k, v, **options), q.shape[1] // k.shape[1] if k.shape[1] else 1
    if group > 1:
        of_heads = {n: x[:, ::group] if np.ndim(x) >= 3 and np.shape(x)[1] > 1 else x[::group] if n == "sink" else x
                    for n, x in options.items()}  # fmt: skip
        g["dk"] = dense_backward(dout[:, ::group], q[:, ::group], k, v, **of_heads)["dk"]
    return g


def dlse_ignored(dout, q, k, v, *, dlse=None, **options):
    return dense_backward(dout, q, k, v, **options)


def half_inside(q, k, v, **options):
    def half(x):
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(x.dtype) if getattr(x, "dtype", None) in ("f4", "f8") else x

    return dense(half(q), half(k), half(v), **{n: half(x) for n, x in options.items()})
