"""Softmax and log-sum-exp, forwards and backwards, against explicit loops."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close, random
from oracles import mask_loops, softmax_loops

import npattn
from npattn import (
    causal,
    gradcheck,
    key_lengths,
    log_sum_exp_backward,
    log_sum_exp_forward,
    softmax_backward,
    softmax_forward,
)

SHAPES = {"rank1": (5,), "rank2": (4, 5), "rank3": (3, 4, 5), "rank4": (2, 3, 4, 5)}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
DTYPES = [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
POISON = pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])


def computing(dtype):
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def holes(shape, seed=3):
    """A random mask whose first row is empty."""
    allowed = np.random.default_rng(seed).random(shape) < 0.6
    allowed[(0,) * (len(shape) - 1)] = False
    return allowed


def finite(x):
    x = np.abs(np.asarray(x, np.float64))
    return np.where(np.isfinite(x), x, 0)


def check_softmax(scores, allowed=None, mask=None, seed=5):
    """softmax and log_sum_exp with their gradients against the loops; inputs unchanged, a second backward the same."""
    mask = allowed if mask is None else mask
    allowed = None if allowed is None else np.broadcast_to(allowed, scores.shape)
    wide = computing(scores.dtype)
    dweights, dlse = random(scores.shape, seed, scores.dtype), random(scores.shape[:-1], seed + 1, wide)
    dlse = np.asarray(dlse)
    before = [a.tobytes() for a in (scores, dweights, dlse)]
    p, cache = softmax_forward(scores, mask=mask)
    ds = softmax_backward(dweights, cache).scores
    lse, lse_cache = log_sum_exp_forward(scores, mask=mask)
    dl = log_sum_exp_backward(dlse, lse_cache).scores
    assert ds.tobytes() == softmax_backward(dweights, cache).scores.tobytes()
    assert dl.tobytes() == log_sum_exp_backward(dlse, lse_cache).scores.tobytes()
    assert [a.tobytes() for a in (scores, dweights, dlse)] == before
    assert np.array_equal(npattn.softmax(scores, mask=mask), p, equal_nan=True)
    assert np.array_equal(npattn.log_sum_exp(scores, mask=mask), lse, equal_nan=True)

    exact = scores.astype(np.float64)
    expected = softmax_loops(exact, allowed, dweights=dweights)
    expected["dlse"] = softmax_loops(exact, allowed, dlse=dlse)["scores"]
    assert p.dtype == ds.dtype == dl.dtype == scores.dtype
    assert np.asarray(lse).dtype == cache.weights.dtype == wide
    # exp turns the rounding eps |s| of s - m into a relative error of its weight
    seen = finite(exact) if allowed is None else np.where(allowed, finite(exact), 0)
    s = 1 + seen.max(-1, keepdims=True, initial=0)
    w = finite(expected["weights"]) * s
    mean = (w * finite(dweights)).sum(-1, keepdims=True)
    for name, actual, e, terms in (
        ("weights", p, expected["weights"], w),
        ("lse", lse, expected["lse"], s[..., 0]),
        ("dweights", ds, expected["scores"], w * (finite(dweights) + mean)),
        ("dlse", dl, expected["dlse"], w * finite(dlse)[..., None]),
    ):
        assert_close(actual, e, terms, name=name, computing=wide)
    return {"p": p, "lse": np.asarray(lse), "dweights": ds, "dlse": dl}


# --- softmax and log-sum-exp -----------------------------------------------------------------------------------------


@SHAPE
@DTYPE
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_against_loops(shape, dtype, masked):
    result = check_softmax(random(shape, 1, dtype), holes(shape) if masked else None)
    if masked:  # the row without an allowed score
        row = (0,) * (len(shape) - 1)
        assert not result["p"][row].any()
        assert result["lse"][row] == -np.inf
        assert not result["dweights"][row].any()
        assert not result["dlse"][row].any()
    else:
        assert (result["p"] > 0).all()


@pytest.mark.parametrize("form", [(4, 5), (1, 5), (4, 1), (1, 1), (2, 3, 4, 5), (2, 1, 1, 5), (1, 3, 4, 1)])
def test_broadcast_masks(form):
    allowed = np.random.default_rng(2).random(form) < 0.6
    check_softmax(random((2, 3, 4, 5), 1), allowed)


def test_masks_over_positions():
    for shape in ((4, 5), (3, 4, 5), (2, 3, 4, 5)):
        check_softmax(
            random(shape, 1), mask_loops("causal", shape, align="bottom_right"), mask=causal(align="bottom_right")
        )
    lengths = np.array([0, 3])
    check_softmax(
        random((2, 3, 4, 5), 1), mask_loops("key_lengths", (2, 3, 4, 5), n=lengths), mask=key_lengths(lengths)
    )


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 5), (2, 0, 5), (1,), (3, 1)])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_sizes_of_0_and_1(shape, masked):
    result = check_softmax(random(shape, 1), np.ones(shape, bool) if masked else None)
    if shape[-1] == 0:
        assert (result["lse"] == -np.inf).all()
    if shape[-1] == 1:
        assert (result["p"] == 1).all()
        assert not result["dweights"].any()


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("level", [-1e30, -1e4, -800.0, 720.0, 1e4, 1e30])
def test_scores_beyond_the_range_of_exp(dtype, level):
    scores = random((4, 5), 1, dtype)
    scores[1] += dtype.type(level)
    scores[2, 3] = level
    result = check_softmax(scores)
    assert np.isfinite(result["lse"]).all()
    check_softmax(scores, holes((4, 5)))


def test_masked_scores_do_not_shift():
    """A score that does not count, however large, leaves the others as they are."""
    scores = random((4, 5), 1)
    scores[:, 2] = 1e4
    allowed = np.arange(5) != 2
    result = check_softmax(scores, np.broadcast_to(allowed, (4, 5)))
    assert result["p"][:, allowed].all()
    assert not result["p"][:, 2].any()


def test_float16_range():
    """log-sum-exp comes in float32: beyond float16's 65504; and exp(-20) is 0 in it, rounded once."""
    scores = np.full((1, 4), 65504, np.float16)
    lse, _ = log_sum_exp_forward(scores)
    assert_close(lse, np.array([65504 + np.log(4.0)]), 65506)
    assert lse[0] > 65504
    check_softmax(scores)
    check_softmax(np.array([[0, -20, -10, -5]], np.float16))


@POISON
def test_poison_that_is_not_allowed(poison):
    scores, allowed = random((4, 5), 1), holes((4, 5))
    scores[~allowed] = poison
    result = check_softmax(scores, allowed)
    clean = check_softmax(np.where(allowed, scores, 0), allowed)
    assert all(np.array_equal(result[name], clean[name]) for name in result)


def test_poison_stays_in_its_row():
    """NaN, or a score of +inf, gives NaN in that row and no other; one of -inf has weight 0."""
    for poison in (np.nan, np.inf):
        scores = random((4, 5), 1)
        scores[2, 3] = poison
        result = check_softmax(scores)
        for a in result.values():
            assert np.isnan(a[2]).all()
            assert np.isfinite(np.delete(a, 2, 0)).all()
    scores = random((4, 5), 1)
    scores[2, 3] = -np.inf
    result = check_softmax(scores)
    assert result["p"][2, 3] == 0
    assert np.isfinite(result["lse"]).all()
    without = check_softmax(np.where(np.isinf(scores), 0, scores), ~np.isinf(scores))
    assert np.array_equal(result["p"], without["p"])


def test_rows_of_minus_infinity():
    """Scores that are all -inf, without a mask: weights 0, lse -inf, gradient 0."""
    scores = random((4, 5), 1)
    scores[1] = -np.inf
    result = check_softmax(scores)
    assert result["lse"][1] == -np.inf
    for name in ("p", "dweights", "dlse"):
        assert not result[name][1].any()
        assert result[name][[0, 2, 3]].all()


def test_poison_in_cotangents():
    """Where nothing is allowed a cotangent is not looked at; elsewhere NaN stays in its row."""
    scores, allowed = random((4, 5), 1), holes((4, 5))
    assert allowed[1:].any(-1).all()
    _, cache = softmax_forward(scores, mask=allowed)
    _, lse_cache = log_sum_exp_forward(scores, mask=allowed)
    dweights, dlse = random((4, 5), 2), random((4,), 3)
    expected, expected_lse = softmax_backward(dweights, cache).scores, log_sum_exp_backward(dlse, lse_cache).scores
    poisoned, poisoned_lse = np.where(allowed, dweights, np.nan), dlse.copy()
    poisoned_lse[0] = np.nan
    assert np.array_equal(softmax_backward(poisoned, cache).scores, expected)
    assert np.array_equal(log_sum_exp_backward(poisoned_lse, lse_cache).scores, expected_lse)
    at = int(np.argmax(allowed[2]))
    dweights[2, at], dlse[2] = np.nan, np.nan
    for ds in (softmax_backward(dweights, cache).scores, log_sum_exp_backward(dlse, lse_cache).scores):
        assert np.array_equal(np.isnan(ds), allowed & (np.arange(4) == 2)[:, None])


def test_memory():
    """Read-only, strided, transposed and stride-0 scores and cotangents."""
    a = random((4, 5), 1)
    a.flags.writeable = False
    views = [
        a,
        np.repeat(a, 2, axis=1)[:, ::2],
        np.ascontiguousarray(a.T).T,
        a[:, ::-1],
        np.broadcast_to(a[:1], (4, 5)),
    ]
    dweights = np.broadcast_to(np.float64(0.7), (4, 5))
    for view in views:
        check_softmax(view)
        _, cache = softmax_forward(view)
        _, copied = softmax_forward(view.copy())
        strided = random((4, 10), 2)[:, ::2]
        assert np.array_equal(softmax_backward(strided, cache).scores, softmax_backward(strided.copy(), copied).scores)
        zero = softmax_backward(dweights, cache).scores  # the weights sum to 1: a constant has no gradient
        assert zero.shape == (4, 5)
        assert_close(zero, np.zeros((4, 5)), cache.weights * 0.7)


@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_gradcheck_softmax(method, masked):
    mask = holes((3, 4)) if masked else None
    rows = gradcheck(
        lambda scores: softmax_forward(scores, mask=mask),
        softmax_backward,
        {"scores": random((3, 4), 1)},
        method=method,
    )
    assert rows[0].derivatives == 13
    mask = np.arange(12).reshape(3, 4) % 3 > 0 if masked else None  # every row has a score: lse is finite
    rows = gradcheck(
        lambda scores: log_sum_exp_forward(scores, mask=mask),
        log_sum_exp_backward,
        {"scores": random((3, 4), 1)},
        method=method,
    )
    assert rows[0].derivatives == 13


@pytest.mark.parametrize("dtype", [np.longdouble, np.complex128, np.clongdouble], ids=lambda d: np.dtype(d).name)
def test_wide_dtypes_are_kept(dtype):
    scores = random((4, 5), 1, dtype)
    p, cache = softmax_forward(scores, mask=holes((4, 5)))
    lse, lse_cache = log_sum_exp_forward(scores, mask=holes((4, 5)))
    assert p.dtype == lse.dtype == dtype
    assert softmax_backward(random((4, 5), 2, dtype), cache).scores.dtype == dtype
    assert log_sum_exp_backward(random((4,), 2, dtype), lse_cache).scores.dtype == dtype
    assert_close(p[1:].sum(-1), np.ones(3, dtype), np.abs(p[1:]).sum(-1))
    assert_close(
        np.exp(scores - lse[:, None])[1:] * holes((4, 5))[1:], p[1:], np.abs(p[1:]) * (1 + np.abs(scores[1:]).max())
    )


# --- what is refused -------------------------------------------------------------------------------------------------

X = np.zeros((4, 5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: softmax_forward(X, mask=np.ones((4, 5))), TypeError, "softmax: mask has dtype float64, expected bool"),
        (lambda: softmax_backward(np.zeros((4, 1)), softmax_forward(X)[1]), ValueError, r"dweights has shape \(4, 1\)"),
    ],
)
def test_what_is_refused_beside_test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
