"""The embedding and the head that shares its table, forwards and backwards, against explicit loops."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close, random
from oracles import embedding_loops, linear_layer_loops

import npattn
from npattn import (
    embedding,
    embedding_backward,
    embedding_forward,
    gradcheck,
    tied_head,
    tied_head_backward,
    tied_head_forward,
)

V, M = 5, 4
LEADS = [(), (6,), (2, 6), (2, 3, 2), (0,), (3, 0)]
HALVES = [np.float16, ml_dtypes.bfloat16]
DTYPES = [*HALVES, np.float32, np.longdouble]


def computing_of(dtype):
    return {np.float32: None, np.longdouble: np.float64}.get(dtype, np.float32)  # the loops are in float64


# --- embedding ------------------------------------------------------------------------------------------------------------


def problem(lead=(2, 6), dtype=np.float64, V=V, M=M, integers=np.int64):
    """Repeated ids, of which some rows of the table have none."""
    ids = np.random.default_rng(3).integers(0, max(V - 1, 1), lead)
    return np.asarray(ids, integers), random((V, M), 0, dtype), random((*lead, M), 1, dtype)


def results(ids, table, dy):
    y, cache = embedding_forward(ids, table)
    return y, embedding_backward(dy, cache).table


def check(ids, table, dy, computing=None):
    y, dtable = results(ids, table, dy)
    want, terms = embedding_loops(ids, table, dy.astype(float)), embedding_loops(ids, table, np.abs(dy.astype(float)))
    assert np.array_equal(y, want["y"].astype(table.dtype), equal_nan=True)
    assert y.dtype == dtable.dtype == table.dtype
    assert_close(dtable, want["table"], terms["table"], computing=computing)
    return y, dtable


@pytest.mark.parametrize("lead", LEADS)
def test_it_is_that_of_loops(lead):
    ids, table, dy = problem(lead)
    y, _ = check(ids, table, dy)
    assert np.array_equal(embedding(ids, table), y)


@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("lead", LEADS[:4])
def test_its_gradient_is_the_derivative(lead, method):
    ids, table, _ = problem(lead)
    gradcheck(lambda table: embedding_forward(ids, table), embedding_backward, {"table": table}, method=method)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_come_out_as_they_go_in(dtype):
    check(*problem(dtype=dtype), computing=computing_of(dtype))


@pytest.mark.parametrize("dtype", [np.complex128, np.clongdouble])
def test_complex_numbers_are_continued(dtype):
    ids, table, dy = problem(dtype=dtype)
    y, dtable = results(ids, table, dy)
    assert y.dtype == dtable.dtype == dtype
    for part in (np.real, np.imag):
        assert np.array_equal(part(y), embedding(ids, part(table).copy()))
        assert np.array_equal(part(dtable), results(ids, part(table).copy(), part(dy).copy())[1])


@pytest.mark.parametrize("integers", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_of_every_integer_dtype(integers):
    for lead in ((2, 6), ()):
        check(*problem(lead, integers=integers))


@pytest.mark.parametrize(("V", "M"), [(1, 4), (5, 1), (5, 0), (4, 4)])
def test_small_tables(V, M):
    check(*problem(V=V, M=M))


def test_a_table_without_rows_has_no_ids():
    ids, table = np.zeros((2, 0), np.int64), np.zeros((0, M))
    y, dtable = results(ids, table, np.zeros((2, 0, M)))
    assert y.shape == (2, 0, M)
    assert dtable.shape == (0, M)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_its_own_row_alone(bad):
    ids, table, dy = problem()
    table[0, 1] = dy[0, 0, 2] = bad
    y, dtable = check(ids, table, dy)
    where = np.zeros((V, M), bool)
    where[ids[0, 0], 2] = True
    assert np.array_equal(~np.isfinite(dtable), where)
    assert np.array_equal(np.isfinite(y).all(-1), ids != 0)


def test_many_tokens_of_few_ids():
    check(*problem((4, 500), np.float32, V=3, M=2))


def test_inputs_may_be_views_and_nothing_is_modified():
    ids, table, dy = problem()
    views = [np.broadcast_to(ids[:1], ids.shape), table[::-1, ::-1], np.broadcast_to(dy[:, :1], dy.shape)]
    check(*views)
    check(ids[:, ::-2], np.asfortranarray(table), dy[:, ::2])
    for a in (ids, table, dy):
        a.flags.writeable = False
    y, cache = embedding_forward(ids, table)
    assert y.flags.writeable
    assert not np.shares_memory(embedding(ids[0, 0, ...], table), table)  # one id gives no view of its row
    assert np.array_equal(embedding_backward(dy, cache).table, embedding_backward(dy, cache).table)


# --- tied head ------------------------------------------------------------------------------------------------------------


def head_problem(lead=(2, 3), dtype=np.float64, V=V, M=M):
    return random((*lead, M), 0, dtype), random((V, M), 1, dtype), random((*lead, V), 2, dtype)


def check_head(x, table, dy, computing=None):
    y, cache = tied_head_forward(x, table)
    grads = tied_head_backward(dy, cache)
    wide = [a.astype(float) for a in (x, table.T, dy)]
    want, terms = (linear_layer_loops(x, w, None, dy) for x, w, dy in (wide, map(np.abs, wide)))
    for value, name in ((y, "y"), (grads.x, "x"), (grads.table, "w")):
        assert value.dtype == x.dtype
        found = [a[name].T if name == "w" else a[name] for a in (want, terms)]
        assert_close(value, *found, name=name, computing=computing)


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3), (0,)])
def test_the_head_is_that_of_loops(lead):
    given = head_problem(lead)
    check_head(*given)
    assert np.array_equal(tied_head(*given[:2]), tied_head_forward(*given[:2])[0])


@pytest.mark.parametrize("method", ["complex", "central"])
def test_the_gradient_of_the_head_is_the_derivative(method):
    x, table, _ = head_problem()
    gradcheck(tied_head_forward, tied_head_backward, {"x": x, "table": table}, method=method)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_the_head(dtype):
    check_head(*head_problem(dtype=dtype), computing=computing_of(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_table_of_the_head_may_have_the_computing_dtype(dtype):
    x, table, dy = head_problem(dtype=dtype)
    y, cache = tied_head_forward(x, table.astype(np.float32))
    grads = tied_head_backward(dy, cache)
    assert y.dtype == grads.x.dtype == dtype
    assert grads.table.dtype == np.float32
    assert np.array_equal(y, tied_head(x, table))


def test_a_dead_token_of_the_head_has_no_gradient_and_adds_none():
    x, table, dy = head_problem()
    x[0, 1], dy[0, 1] = np.nan, 0
    grads = tied_head_backward(dy, tied_head_forward(x, table)[1])
    rest = [np.delete(a.reshape(-1, a.shape[-1]), 1, 0) for a in (x, dy)]
    assert not grads.x[0, 1].any()
    want = tied_head_backward(rest[1], tied_head_forward(rest[0], table)[1]).table
    assert_close(grads.table, want, np.abs(rest[1]).T @ np.abs(rest[0]))


@pytest.mark.parametrize("method", ["complex", "central"])
def test_a_table_that_both_share_has_the_sum_of_their_gradients(method):
    ids, table, _ = problem()

    def forward(table):
        y, first = embedding_forward(ids, table)
        logits, second = tied_head_forward(y, table)
        return logits, (first, second)

    def backward(dlogits, caches):
        first, second = caches
        head = tied_head_backward(dlogits, second)
        return {"table": embedding_backward(head.x, first).table + head.table}

    gradcheck(forward, backward, {"table": table}, method=method)


# --- both -----------------------------------------------------------------------------------------------------------------

IDS, TABLE = np.array([[1, 2]]), np.ones((V, M))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: embedding(np.array([0, 5]), TABLE), ValueError, "embedding: ids holds 5, expected 0 to V - 1 = 4: fixed by table"),
    (lambda: embedding(np.array([0, -1]), TABLE), ValueError, "embedding: ids holds -1, expected 0 to V - 1 = 4"),
    (lambda: embedding(np.array([2**63], np.uint64), TABLE), ValueError, "embedding: ids holds 9223372036854775808"),
    (lambda: embedding(np.array([0]), TABLE[:0]), ValueError, "embedding: ids holds 0, expected 0 to V - 1 = -1"),
    (lambda: embedding(np.array([0.0]), TABLE), TypeError, "embedding: ids has dtype float64, expected integers"),
    (lambda: embedding(np.array([True]), TABLE), TypeError, "embedding: ids has dtype bool, expected integers"),
    (lambda: embedding([0, 1], TABLE), TypeError, r"ids is a list, expected a numpy.ndarray: np.array\(ids, int\)"),
    (lambda: embedding(IDS, weight=TABLE), TypeError, r"embedding: got the keyword weight, expected table, \(V, M\); needed a"),
    (lambda: embedding(IDS, TABLE[0]), ValueError, r"embedding: table has shape \(4,\), expected \(V, M\)"),
    (lambda: embedding(IDS, TABLE.astype(int)), TypeError, "embedding: table has dtype int64, expected float16"),
    (lambda: embedding(IDS, TABLE, padding_idx=0), TypeError, "embedding: got the keyword padding_idx, expected nothing: set"),
    (lambda: embedding_backward(TABLE, embedding_forward(IDS, TABLE)[1]), ValueError,
     r"embedding: dy has shape \(5, 4\), expected \(1, 2, 4\)"),
    (lambda: embedding_backward(TABLE, None), TypeError, "embedding: cache is a NoneType, expected npattn.EmbeddingCache"),
    (lambda: tied_head(TABLE.T, TABLE), ValueError, r"tied_head: table has shape \(5, 4\), expected \(V, M=5\)"),
    (lambda: tied_head(TABLE, TABLE.astype(np.float32)), TypeError, "tied_head: table has dtype float32, expected float64"),
    (lambda: tied_head_backward(TABLE, tied_head_forward(TABLE, TABLE)[1]), ValueError,
     r"tied_head: dy has shape \(5, 4\), expected \(5, 5\)"),
    (lambda: tied_head_backward(TABLE, None), TypeError, "tied_head: cache is a NoneType, expected npattn.TiedHeadCache"),
])  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_verify_knows_them():
    for op in ("embedding", "tied_head"):
        report = npattn.verify.verify(op)
        assert report.passed, report.lines()

    def overwritten(dy, ids, table):
        dtable = np.zeros_like(table)
        dtable[ids] += dy
        return dtable

    report = npattn.verify.verify(embedding, overwritten, op="embedding", cases=npattn.verify.CASES_OF["embedding"][:4])
    assert list(report.diagnosis) == ["a repeated id is overwritten"]
    scaled = npattn.verify.verify(lambda x, table: x @ table.T / x.shape[-1] ** 0.5, op="tied_head")
    assert list(scaled.diagnosis) == ["divided by sqrt(M)"]
