"""`select` on the bits of numbers, and functions of rows in groups: the same as np.where, and as all rows at once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from npattn.ops import rows
from npattn.ops.allowed import quiet, select
from npattn.ops.rows import in_rows

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.longdouble, np.complex64, np.complex128, ">f4", ">f8"]


@quiet
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", [0.0, -np.inf, 1.0])
def test_select_is_where(dtype, other):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 6)).astype(dtype)
    x[0, 0], x[1, 1, 1], x[2, 2, 2] = np.nan, np.inf, -0.0
    some = rng.random((3, 4, 6)) < 0.5
    strided = (rng.random((3, 4, 12)) < 0.5)[..., ::2]
    for allowed in (some, some[1:2, :, :1], some[0, 0], np.array(True), np.array(False), strided):
        for given in (x, x.swapaxes(0, 1)[:3, :3], x[..., ::-1]):
            a = allowed if allowed.ndim < 3 else allowed[: given.shape[0], : given.shape[1]]
            got, expected = select(a, given, other), np.where(a, given, np.asarray(other).astype(given.dtype))
            assert got.dtype == given.dtype
            assert got.shape == expected.shape
            assert np.array_equal(got.astype(complex), expected.astype(complex), equal_nan=True)
            assert not np.shares_memory(got, given)
    assert select(None, x) is x


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (7, 5), (3, 4, 5), (2, 0, 5), (5,), (), (3, 0)])
def test_groups_of_rows_give_what_all_rows_give(shape, monkeypatch):
    monkeypatch.setattr(rows, "GROUP", 11)  # two rows
    x = np.random.default_rng(0).standard_normal(shape)
    y, s = in_rows(lambda a, b: (a * b, a.sum(-1, keepdims=True) if a.ndim else a), x, x + 1)
    assert np.array_equal(y, x * (x + 1))
    assert np.array_equal(s, x.sum(-1, keepdims=True) if x.ndim else x)
    assert np.array_equal(in_rows(np.square, x), x * x)


def test_groups_have_rows_of_each_array(monkeypatch):
    monkeypatch.setattr(rows, "GROUP", 8)
    x, of_row = np.arange(15.0).reshape(5, 3), np.arange(5.0).reshape(5, 1)
    seen = []

    def f(a, b):
        seen.append(len(a))
        return a + b

    assert np.array_equal(in_rows(f, x, np.broadcast_to(of_row, (5, 1))), x + of_row)
    assert seen == [2, 2, 1]
