"""Products of few rows by many, as of a query with a long cache: with AVX-512 they are computed in pieces."""

import numpy as np
import pytest

from npattn.ops import products
from npattn.tolerances import TERMS_EPS


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
