"""The base of blockwise's exponentials: 2 where that is faster, and the results are as exact as with e."""

from __future__ import annotations

import numpy as np
import pytest

from npattn import blockwise_forward, causal, key_lengths
from npattn.ops import exponentials
from npattn.ops.exponentials import BASE_2, BASE_E
from npattn.verify import CASES, verify

CALLS = {
    "plain": {},
    "causal": {"mask": causal()},
    "lengths and a sink": {"mask": key_lengths([0, 300]), "sink": np.array([-1.0, 2.0, -np.inf], np.float32)},
    "softcap": {"mask": causal(), "softcap": 2.0},
    "negative scale": {"scale": -0.3},
}
NO_BIAS = [c for c in CASES if c.dtype == "float32" and not any("bias" in option for option in c.options)]


def bases(cache):
    return {*cache.kept.bases.values()}


def arrays(size=1.0, shape=(2, 3, 520, 16)):
    rng = np.random.default_rng(0)
    return [(x * rng.standard_normal(shape)).astype(np.float32) for x in (size, size, 1)]


@pytest.fixture(params=[True, False], ids=["AVX-512", "none"])
def avx512(request, monkeypatch):
    monkeypatch.setattr(exponentials, "has_avx512", lambda: request.param)
    return request.param


@pytest.mark.parametrize("options", CALLS)
def test_the_processor_chooses_the_base(options, avx512):
    assert bases(blockwise_forward(*arrays(), **CALLS[options])[1]) == {BASE_2 if avx512 else BASE_E}


def test_results_are_tight_in_both(avx512):
    """In units of the predicted error, against the reference in float64: rms at most 1.5, and 8 at most."""
    report = verify("blockwise", level="tight", cases=NO_BIAS[:: 12 if avx512 else 24], diagnose=False)
    assert report.passed, report.lines()
    assert report.tested > 25


@pytest.mark.parametrize("dtype", [np.float64, np.complex128, np.longdouble])
def test_other_dtypes_have_base_e(dtype):
    q, k, v = (x[..., :20, :].astype(dtype) for x in arrays())
    assert bases(blockwise_forward(q, k, v)[1]) == {BASE_E}


def test_a_bias_and_low_scores_have_base_e(monkeypatch):
    """exp2 takes a hundred times as long where it has no normal number to give."""
    monkeypatch.setattr(exponentials, "has_avx512", lambda: True)
    q, k, v = arrays()
    assert bases(blockwise_forward(q, k, v, bias=np.zeros((520, 520), np.float32))[1]) == {BASE_E}
    low = np.full_like(k, -20)
    low[..., 0, :] = 0  # one score of 0 in each row, so that no maximum has to be subtracted; all others are -160
    assert bases(blockwise_forward(np.full_like(q, 2), low, v)[1]) == {BASE_E}


def test_scores_that_no_query_sees_choose_no_base(monkeypatch):
    monkeypatch.setattr(exponentials, "has_avx512", lambda: True)
    q, k, v = arrays()
    few = np.ones((520, 520), bool)
    few[:, [1, 300]] = False
    k[:, :, [1, 300]] *= 1000
    assert bases(blockwise_forward(q, k, v, mask=few)[1]) == {BASE_2}
    k[:, :, 300:] *= 1000
    assert bases(blockwise_forward(q, k, v, mask=few & np.asarray(np.arange(520) < 300))[1]) == {BASE_2}
