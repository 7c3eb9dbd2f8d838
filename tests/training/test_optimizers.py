"""AdamW, clipping and the schedule against loops; against torch in tests/peers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npattn.training.optimizers import AdamW, clip_factor, global_norm

SHAPES = {"w": (5, 3), "b": (3,), "table": (70_001,)}


def trees(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return tuple((rng.standard_normal(s).astype(dtype), None) for s in SHAPES.values())


def test_steps_are_those_of_the_equations():
    params, before = trees(0), trees(0)
    optimizer = AdamW(params, lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)
    p = [x.astype(np.longdouble) for x, _ in params]
    m, v = [0 * x for x in p], [0 * x for x in p]
    for t in range(1, 4):
        grads = trees(t)
        optimizer.step(grads, lr=0.01 * t, factor=0.5)
        for n, (g, _) in enumerate(grads):
            g = np.longdouble(0.5) * g
            m[n] = np.longdouble(0.8) * m[n] + (1 - np.longdouble(0.8)) * g
            v[n] = np.longdouble(0.95) * v[n] + (1 - np.longdouble(0.95)) * g * g
            if p[n].ndim == 2:
                p[n] = p[n] * (1 - np.longdouble(0.01 * t) * np.longdouble(0.3))
            m1, v1 = m[n] / (1 - np.longdouble(0.8) ** t), v[n] / (1 - np.longdouble(0.95) ** t)
            p[n] = p[n] - np.longdouble(0.01 * t) * m1 / (np.sqrt(v1) + np.longdouble(1e-3))
    for (got, _), expected in zip(optimizer.params, p, strict=True):
        assert np.abs(got - expected).max() < 20 * np.finfo(float).eps * np.abs(expected).max()
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(params, before, strict=True)), "the inputs are as they were"


def test_what_is_frozen_stays_and_has_no_state():
    optimizer = AdamW(trees(0), frozen=lambda name: name.startswith("1"))
    optimizer.step(trees(1))
    assert np.array_equal(optimizer.params[1][0], trees(0)[1][0])
    assert not np.array_equal(optimizer.params[0][0], trees(0)[0][0])
    assert set(optimizer.m) == {"0.0", "2.0"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_global_norm_is_that_of_all_elements(dtype):
    grads = trees(0, dtype)
    exact = math.sqrt(math.fsum(float(x) ** 2 for g, _ in grads for x in g.ravel()))
    assert abs(global_norm(grads) - exact) < 1e3 * np.finfo(float).eps * exact
    assert global_norm((np.full(3, 1e30, np.float32),)) == pytest.approx(math.sqrt(3) * 1e30)
    assert clip_factor(global_norm(grads), exact / 2) == pytest.approx(0.5)
    assert clip_factor(0.0, 1.0) == 1.0


def test_bad_input():
    with pytest.raises(TypeError, match="AdamW: parameters have to be float32, float64 or longdouble"):
        AdamW((np.ones(2, np.float16),))
    optimizer = AdamW(trees(0))
    with pytest.raises(ValueError, match=r"the gradient of 2.0 is missing"):
        optimizer.step(((trees(1)[0]), trees(1)[1], (None, None)))
    with pytest.raises(ValueError, match=r"the gradient of 0.0 has shape \(3, 5\), expected \(5, 3\)"):
        optimizer.step(((trees(1)[0][0].T, None), *trees(1)[1:]))
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        AdamW(trees(0), betas=(0.9, 1.0))
