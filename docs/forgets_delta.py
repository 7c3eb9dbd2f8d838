"""An attention that is right, and a backward that forgets Delta, sum_j p_j dp_j: what README.md shows the verdict on."""

import numpy as np


def weights(q, k, mask, scale):
    scores = q.dtype.type(q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.swapaxes(-1, -2))
    scores = scores if mask is None else np.where(mask, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    e = np.exp(scores - np.where(np.isfinite(top), top, 0))
    z = e.sum(-1, keepdims=True)
    return e / np.where(z == 0, 1, z)


def attention(q, k, v, *, mask=None, scale=None):
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError("grouped heads")
    return weights(q, k, mask, scale) @ v


def backward(dout, q, k, v, *, mask=None, scale=None):
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError("grouped heads")
    p, scale = weights(q, k, mask, scale), q.dtype.type(q.shape[-1] ** -0.5 if scale is None else scale)
    ds = p * (dout @ v.swapaxes(-1, -2))  # less Delta, it should be
    return scale * (ds @ k), scale * (ds.swapaxes(-1, -2) @ q), p.swapaxes(-1, -2) @ dout
