"""Products of few rows by many, as of a query with a long cache: with AVX-512 they are computed in pieces."""

import numpy as np
import pytest

from npattn.ops import products
from npattn.ops.products import UNBLOCKED, sum_rows
from npattn.tolerances import TERMS_EPS, TIGHT_RMS


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble, np.complex64])
@pytest.mark.parametrize(
    ("lead", "group", "few", "n", "D"),
    [((), (), 2, 17, 5), ((2, 6), (2, 3), 1, 700, 128), ((2, 6), (2, 3), 2, 700, 128), ((4,), (2,), 8, 1025, 64),
     ((3,), (1,), 5, 40, 1000), ((), (), 4, 40, 0), ((), (), 16, 129, 1), ((2,), (2,), 4, 20_001, 1), ((2,), (2,), 17, 40, 8)],
)  # fmt: skip
def test_dots_of_few_rows(lead, group, few, n, D, dtype, avx512, monkeypatch):
    monkeypatch.setattr(products, "has_avx512", lambda: avx512)
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((*shape, D)).astype(dtype) for shape in ((*lead, few), (*group, n)))
    all_of_y = np.concatenate([y, np.full_like(y[..., :3, :], np.nan)], -2)[..., :n, :]  # not contiguous over the heads
    out = np.full((*lead, few, n), np.nan, dtype)
    assert products.dots(x, all_of_y, out) is out
    wide = np.result_type(dtype, np.float64)
    each = y if not lead else y.repeat(lead[-1] // group[-1], -3)
    want = np.einsum("...ld,...sd->...ls", x.astype(wide), each.astype(wide))
    terms = np.einsum("...ld,...sd->...ls", abs(x.astype(wide)), abs(each.astype(wide)))
    assert (abs(out - want) <= TERMS_EPS * np.finfo(dtype).eps * terms).all()


@pytest.mark.parametrize("n", [63, 64, 87, 260])
def test_rows_of_many_heads_are_summed_as_exactly_as_those_of_each_head(n):
    """OpenBLAS sums a small product in one chain, and terms of one sign let its error grow with n^1.5."""
    rng, m, o = np.random.default_rng(0), 8, 32
    assert 8 * n * m * o < UNBLOCKED
    x, y = (rng.random((8, n, k)).astype(np.float32) for k in (m, o))
    exact = np.einsum("hnm,hno->mo", x.astype(float), y.astype(float))
    of_each_head = sum(a.T @ b for a, b in zip(x, y, strict=True))
    together = sum_rows(x, y, np.empty((1, m, o), np.float32))[0]
    error, expected = (np.sqrt(np.square(a - exact).mean()) for a in (together, of_each_head))
    assert error <= TIGHT_RMS * expected
