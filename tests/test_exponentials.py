"""The base of blockwise's exponentials: 2 where that is faster, and the results are as good as with e."""

from __future__ import annotations

import numpy as np
import pytest

from npattn import attention_backward, attention_forward, blockwise_backward, blockwise_forward, causal, key_lengths
from npattn.ops import exponentials
from npattn.ops.exponentials import TWO, E

OPTIONS = {
    "plain": {},
    "causal": {"mask": causal()},
    "lengths and a sink": {"mask": key_lengths([0, 300]), "sink": np.array([-1.0, 2.0, -np.inf], np.float32)},
    "softcap": {"mask": causal(), "softcap": 2.0},
    "negative scale": {"scale": -0.3},
}


def bases(cache):
    return {*cache.kept.bases.values()}


def arrays(size=1.0, shape=(2, 3, 520, 16)):
    rng = np.random.default_rng(0)
    return [(x * rng.standard_normal(shape)).astype(np.float32) for x in (size, size, 1, 1)]


@pytest.fixture(params=[True, False], ids=["AVX-512", "none"])
def avx512(request, monkeypatch):
    monkeypatch.setattr(exponentials, "has_avx512", lambda: request.param)
    return request.param


@pytest.mark.parametrize("options", OPTIONS)
def test_both_bases_are_as_good(options, avx512):
    q, k, v, dout = arrays()
    more = {n: x.astype(np.float64) if isinstance(x, np.ndarray) else x for n, x in OPTIONS[options].items()}
    wide, reference = attention_forward(*(x.astype(np.float64) for x in (q, k, v)), **more)
    out, cache = blockwise_forward(q, k, v, **OPTIONS[options])
    assert bases(cache) == {TWO if avx512 else E}
    assert np.abs(out - wide).max() < 2e-6
    alive = reference.lse != -np.inf
    assert np.array_equal(alive, cache.lse != -np.inf)
    assert np.abs(cache.lse[alive] - reference.lse[alive]).max() < 2e-6
    want, got = attention_backward(dout.astype(np.float64), reference), blockwise_backward(dout, cache)
    for name in ("q", "k", "v", "sink"):
        g, w = getattr(got, name), getattr(want, name)
        assert (g is None) == (w is None)
        assert g is None or np.abs(g - w).max() < 3e-6 * max(np.abs(w).max(), 1), name


@pytest.mark.parametrize("dtype", [np.float64, np.complex128, np.longdouble])
def test_other_dtypes_have_base_e(dtype):
    q, k, v, _ = (x[..., :20, :].astype(dtype) for x in arrays())
    assert bases(blockwise_forward(q, k, v)[1]) == {E}


def test_a_bias_and_low_scores_have_base_e(monkeypatch):
    """exp2 takes a hundred times as long where it has no normal number to give."""
    monkeypatch.setattr(exponentials, "has_avx512", lambda: True)
    q, k, v, _ = arrays()
    assert bases(blockwise_forward(q, k, v, bias=np.zeros((520, 520), np.float32))[1]) == {E}
    assert bases(blockwise_forward(*arrays(size=6.0)[:3])[1]) == {E}


def test_scores_that_no_query_sees_choose_no_base(monkeypatch):
    monkeypatch.setattr(exponentials, "has_avx512", lambda: True)
    q, k, v, _ = arrays()
    k[:, :, 300:] *= 1000
    assert bases(blockwise_forward(q, k, v, mask=key_lengths([300, 300]))[1]) == {TWO}
