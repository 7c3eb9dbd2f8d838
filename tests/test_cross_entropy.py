"""Cross-entropy, with label smoothing and z-loss, forwards and backwards, against explicit loops."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close, random
from oracles import cross_entropy_loops

import npattn
from npattn import cross_entropy, cross_entropy_backward, cross_entropy_forward, gradcheck

SHAPES = {"rank1": (5,), "rank2": (4, 5), "rank3": (3, 4, 5), "rank4": (2, 3, 4, 5)}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
DTYPES = [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
REDUCTIONS = ["mean", "sum", "none"]
REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)
OPTIONS = {
    "plain": {}, "smoothing": {"label_smoothing": 0.1}, "smoothing 1": {"label_smoothing": 1.0}, "z": {"z_loss": 0.03},
    "smoothing + z": {"label_smoothing": 0.3, "z_loss": 0.2},
}  # fmt: skip
OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def computing(dtype):
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def finite(x):
    x = np.abs(np.asarray(x, np.float64))
    return np.where(np.isfinite(x), x, 0)


def check(logits, targets, mask=None, reduction="mean", dloss=None, *, label_smoothing=0.0, z_loss=0.0):
    """loss and gradient against the loops; inputs unchanged, a second backward the same."""
    wide, options = computing(logits.dtype), {"label_smoothing": label_smoothing, "z_loss": z_loss}
    if dloss is None:
        dloss = np.asarray(random(targets.shape if reduction == "none" else (), 7, wide))
    arrays = [a for a in (logits, targets, mask, dloss) if a is not None]
    before = [a.tobytes() for a in arrays]
    loss, cache = cross_entropy_forward(logits, targets, mask=mask, reduction=reduction, **options)
    grad = cross_entropy_backward(dloss, cache).logits
    assert grad.tobytes() == cross_entropy_backward(dloss, cache).logits.tobytes()
    assert [a.tobytes() for a in arrays] == before
    assert np.array_equal(cross_entropy(logits, targets, mask=mask, reduction=reduction, **options), loss, equal_nan=True)
    assert np.asarray(loss).dtype == wide
    assert np.shape(loss) == dloss.shape
    assert grad.dtype == logits.dtype

    exact = logits.astype(np.float64)
    expected = cross_entropy_loops(exact, targets, mask, reduction, dloss, **options)
    counts = np.ones(targets.shape, bool) if mask is None else mask
    size = 1 + finite(exact).max(-1, initial=0)
    # lse and the target's logit; z_loss lse^2 has twice the relative error of lse, whose own is that of its largest term
    rows = np.where(counts, 2 * size + 2 * z_loss * size**2, 0)
    share = 1 / max(counts.sum(), 1) if reduction == "mean" else 1
    terms = rows if reduction == "none" else rows.sum() * share
    assert_close(loss, expected["loss"], terms, name="loss", computing=wide)
    rows = np.where(counts, 2 * size * (1 + 2 * z_loss * size), 0)
    terms = rows * (finite(dloss) if reduction == "none" else finite(dloss) * share)
    assert_close(grad, expected["logits"], np.broadcast_to(terms[..., None], logits.shape), name="dlogits", computing=wide)
    return loss, grad


def ids(shape, classes=5, seed=4, dtype=np.int64):
    return np.asarray(np.random.default_rng(seed).integers(0, classes, shape)).astype(dtype)


@DTYPE
def test_a_gradient_of_1_may_be_a_number_or_none(dtype):
    loss, cache = cross_entropy_forward(random((4, 5), 1, dtype), ids((4,)))
    assert type(loss) is np.ndarray
    want = cross_entropy_backward(np.ones((), loss.dtype), cache).logits
    assert all(np.array_equal(cross_entropy_backward(one, cache).logits, want) for one in (None, 1, 1.0, loss.dtype.type(1)))
    assert np.array_equal(cross_entropy_backward(loss, cache).logits, cross_entropy_backward(loss[()], cache).logits)
    loss, cache = cross_entropy_forward(random((4, 5), 1, dtype), ids((4,)), reduction="none")
    want = cross_entropy_backward(np.ones_like(loss), cache).logits
    assert np.array_equal(cross_entropy_backward(None, cache).logits, want)


@SHAPE
@DTYPE
@REDUCTION
@OPTION
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_it_is_that_of_loops(shape, dtype, reduction, masked, options):
    mask = np.asarray(np.random.default_rng(1).random(shape[:-1]) < 0.6) if masked else None
    loss, grad = check(random(shape, 1, dtype), ids(shape[:-1]), mask, reduction, **options)
    assert np.asarray(loss).any() == (mask is None or mask.any())
    if masked:
        assert not grad[~mask].any()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_targets_of_any_integer_dtype(dtype):
    check(random((3, 4, 5), 1), ids((3, 4), dtype=dtype), ids((3, 4), 2) == 1, label_smoothing=0.1)


@REDUCTION
@OPTION
@pytest.mark.parametrize("behind", [np.nan, np.inf, -np.inf])
def test_ignored_targets(reduction, options, behind):
    """-100, as padded labels come, and NaN in logits: where mask is False nothing is looked at."""
    logits, targets = random((3, 4, 5), 1), ids((3, 4))
    mask = np.random.default_rng(1).random((3, 4)) < 0.5
    clean_loss, clean_grad = check(logits, targets, mask, reduction, **options)
    targets, logits = np.where(mask, targets, -100), np.where(mask[..., None], logits, behind)
    loss, grad = check(logits, targets, mask, reduction, **options)
    assert np.array_equal(loss, clean_loss)
    assert np.array_equal(grad, clean_grad)
    if reduction == "none":
        assert not loss[~mask].any()
        _, cache = cross_entropy_forward(logits, targets, mask=mask, reduction=reduction, **options)
        dloss = random((3, 4), 8)
        poisoned = np.where(mask, dloss, np.nan)
        assert np.array_equal(
            cross_entropy_backward(poisoned, cache).logits, cross_entropy_backward(dloss, cache).logits
        )


@OPTION
def test_a_position_without_a_gradient_adds_none(options):
    """dloss 0, even where the logits are NaN, inf or all -inf."""
    logits, targets = random((5, 4), 1), ids((5,), 4)
    logits[1, 2], logits[2, 2], logits[3] = np.nan, np.inf, -np.inf
    dloss = np.array([0.5, 0, 0, 0, -1.5])
    _, grad = check(logits, targets, None, "none", dloss, **options)
    assert not grad[1:4].any()
    assert grad[[0, 4]].all()
    _, cache = cross_entropy_forward(logits, targets)
    assert not cross_entropy_backward(np.float64(0), cache).logits.any()


@REDUCTION
@OPTION
def test_nothing_counts(reduction, options):
    loss, grad = check(random((3, 5), 1), np.full(3, -100), np.zeros(3, bool), reduction, **options)
    assert not np.any(loss)
    assert not grad.any()


@REDUCTION
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 0), (3, 1), (1,)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sizes(shape, smoothing, reduction):
    loss, grad = check(random(shape, 1), ids(shape[:-1], max(shape[-1], 1)), None, reduction, label_smoothing=smoothing)
    assert not np.any(loss)  # nothing counts, or there is but one class
    assert not grad.any()


def test_the_mean_is_over_what_counts_with_all_its_parts():
    logits, targets = random((4, 5), 1), ids((4,))
    mask = np.array([True, False, True, False])
    for options in OPTIONS.values():
        each, _ = cross_entropy_forward(logits, targets, reduction="none", **options)
        mean, _ = cross_entropy_forward(logits, targets, mask=mask, **options)
        total, _ = cross_entropy_forward(logits, targets, mask=mask, reduction="sum", **options)
        assert_close(mean, np.array((each[0] + each[2]) / 2), each.sum())
        assert_close(total, np.array(each[0] + each[2]), each.sum())


def test_what_smoothing_and_z_loss_are():
    """Smoothing is the cross-entropy with a mixed target; z-loss the square of the log-sum-exp."""
    logits, targets, s = random((4, 5), 1), ids((4,)), 0.3
    plain = np.array([cross_entropy(logits, np.full(4, c), reduction="none") for c in range(5)])
    smooth = cross_entropy(logits, targets, reduction="none", label_smoothing=s)
    assert_close(smooth, (1 - s) * plain[targets, np.arange(4)] + s * plain.mean(0), plain.sum(0))
    both = cross_entropy(logits, targets, reduction="none", label_smoothing=s, z_loss=0.25)
    lse = npattn.log_sum_exp(logits)
    assert_close(both - smooth, 0.25 * lse**2, both + smooth)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@OPTION
def test_confident_logits(dtype, options):
    """A loss of thousands where the target is far below, an exact 0 where it is far above; never inf - inf."""
    logits = np.array([[1e4, 0, 0], [0, 1e4, 0], [-1e4, -1e4, -1e4]], dtype)
    loss, _ = check(logits, np.array([0, 0, 1]), None, "none", **options)
    if not options:
        assert loss[0] == 0
        assert loss[1] == 1e4
    check(logits, np.array([0, 0, 1]), **options)


@OPTION
def test_digits_where_logits_are_large(options):
    """A shift by 2^20 of all logits, exact here, changes nothing but lse."""
    logits = np.round(random((4, 5), 1) * 8).astype(np.float32) / 8
    targets, smoothing = ids((4,)), {n: x for n, x in options.items() if n == "label_smoothing"}
    shifted = logits + np.float32(2**20)
    for got, want in zip(check(shifted, targets, **smoothing), check(logits, targets, **smoothing), strict=True):
        assert np.array_equal(got, want)
    check(shifted, targets, **options)


@pytest.mark.parametrize("size", [1e20, 1e38, 1e-30])
def test_extreme_logits(size):
    """No overflow on the way to what float32 holds: the sum of these losses would be one, and lse^2 too."""
    logits = (np.array([[1, 0.5, -0.5], [-1, 0.25, 1], [0.25, 1, -1], [1, 0.5, -0.5]]) * size).astype(np.float32)
    targets = np.array([2, 0, 2, 2])
    assert np.isfinite(check(logits, targets, label_smoothing=0.1)[0])
    if size < 1e30:
        loss, grad = check(logits, targets, z_loss=1e-4 if size < 1e19 else 1e-4 / size)
        assert np.isfinite(loss)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=str)
def test_logits_of_minus_infinity(options):
    """Classes that are ruled out have gradient 0; one that is the target costs infinity."""
    logits = random((3, 4), 1)
    logits[:2, 1] = -np.inf
    loss, grad = check(logits, np.array([0, 1, 2]), None, "none", **options)
    assert loss[1] == np.inf
    assert np.isfinite(loss[[0, 2]]).all()
    assert np.isfinite(grad).all()
    assert grad[0, 1] == 0


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothing_over_a_class_that_is_ruled_out_costs_infinity(smoothing):
    """Its gradient is 0 - s / V, since its share is taken from the others."""
    logits = random((3, 4), 1)
    logits[0, 1] = -np.inf
    loss, grad = check(logits, np.array([0, 1, 2]), None, "none", np.ones(3), label_smoothing=smoothing)
    assert loss[0] == np.inf
    assert np.isfinite(loss[1:]).all()
    assert grad[0, 1] == -smoothing / 4
    loss, _ = check(logits, np.array([1, 1, 2]), None, "none", label_smoothing=smoothing)
    assert loss[0] == np.inf  # and not 0 inf where s = 1


@OPTION
def test_positions_without_a_class_are_nan_and_stay_alone(options):
    """All logits -inf: no probability is defined. NaN and inf likewise stay in their row."""
    logits = random((5, 4), 1)
    logits[1], logits[2, 2], logits[3, 0] = -np.inf, np.nan, np.inf
    loss, grad = check(logits, np.array([0, 1, 2, 3, 3]), None, "none", **options)
    bad = [False, True, True, True, False]
    assert np.isnan(loss).tolist() == np.isnan(grad).all(-1).tolist() == bad
    assert np.isfinite(grad[[0, 4]]).all()


@REDUCTION
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("method", ["complex", "central"])
@OPTION
def test_gradcheck(method, reduction, masked, options):
    targets, mask = ids((2, 3), 4), np.array([[True, False, True], [True, True, False]]) if masked else None

    def forward(logits):
        return cross_entropy_forward(logits, targets, mask=mask, reduction=reduction, **options)

    rows = gradcheck(
        forward, lambda d, c: cross_entropy_backward(d, c), {"logits": 2 * random((2, 3, 4), 1)}, method=method
    )
    assert rows[0].derivatives == 25


def test_a_target_share_is_rounded_once_in_longdouble():
    """1 - 0.1 is not a Python float: with one, the loss would have the error of float64."""
    logits, wide = random((4, 5), 1), np.longdouble
    loss, cache = cross_entropy_forward(logits.astype(wide), ids((4,)), reduction="none", label_smoothing=0.1)
    logp = np.log(cache.p)
    want = -(wide(1) - wide(0.1)) * logp[np.arange(4), ids((4,))] - wide(0.1) * logp.mean(-1)
    assert loss.dtype == wide
    assert_close(loss, want, np.abs(logp).sum(-1))
    assert cross_entropy_backward(wide(1) * np.ones(4, wide), cache).logits.dtype == wide


def test_complex_numbers_are_continued():
    logits = random((4, 5), 1, np.complex128)
    loss, cache = cross_entropy_forward(logits, ids((4,)), reduction="none", label_smoothing=0.2, z_loss=0.1)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    lse = np.log(np.exp(logits).sum(-1))
    want = -0.8 * np.log(p)[np.arange(4), ids((4,))] - 0.04 * np.log(p).sum(-1) + 0.1 * lse**2
    assert_close(loss, want, np.abs(np.log(p)).sum(-1) + np.abs(lse) ** 2)
    assert cross_entropy_backward(np.ones(4, complex), cache).logits.dtype == complex


def test_views():
    a, targets = random((4, 5), 1), ids((4,))
    a.flags.writeable = False
    views = [a, np.repeat(a, 2, axis=1)[:, ::2], np.ascontiguousarray(a.T).T, a[:, ::-1], np.broadcast_to(a[:1], (4, 5))]
    for view in views:
        loss, grad = check(view, targets, label_smoothing=0.1, z_loss=0.1)
        same_loss, same_grad = check(view.copy(), np.repeat(targets, 2)[::2], label_smoothing=0.1, z_loss=0.1)
        assert np.array_equal(loss, same_loss)
        assert np.array_equal(grad, same_grad)
    check(a, np.broadcast_to(targets[:1], 4), np.broadcast_to(np.True_, 4), "none", np.broadcast_to(np.float64(0.5), 4))


# --- what is refused -------------------------------------------------------------------------------------------------

X = np.zeros((4, 5))
T = np.zeros(4, int)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cross_entropy_forward(X, T, mask=np.ones(4)), TypeError, r"mask has dtype float64, expected bool"),
        (lambda: cross_entropy_forward(X, T, mask=np.ones((4, 1), bool)), ValueError, r"mask has shape \(4, 1\)"),
        (lambda: cross_entropy_backward(np.float32(1), cross_entropy_forward(X, T)[1]), TypeError, "dloss has dtype float32"),
        (lambda: cross_entropy_backward(X[0, 0], None), TypeError, "cross_entropy: cache is a NoneType, expected npattn.Cross"),
        (lambda: cross_entropy_forward(X, T, label_smoothing=1.5), ValueError, "label_smoothing is 1.5, expected a number"),
        (lambda: cross_entropy_forward(X, T, label_smoothing=-0.1), ValueError, "label_smoothing is -0.1, expected a"),
        (lambda: cross_entropy_forward(X, T, label_smoothing=np.nan), ValueError, "label_smoothing is nan, expected a"),
        (lambda: cross_entropy_forward(X, T, label_smoothing=True), TypeError, "label_smoothing is a bool, expected a"),
        (lambda: cross_entropy_forward(X, T, z_loss=-1e-4), ValueError, "z_loss is -0.0001, expected a finite number"),
        (lambda: cross_entropy_forward(X, T, z_loss=np.inf), ValueError, "z_loss is inf, expected a finite number"),
        (lambda: cross_entropy_forward(X, T, z_loss=None), TypeError, "z_loss is a NoneType, expected a Python float"),
        (lambda: cross_entropy_forward(X[:, :0], T), ValueError, r"logits has shape \(4, 0\), expected at least one class"),
        (lambda: cross_entropy_forward(X[:, :0], T, mask=T > 0), ValueError, "expected at least one class for a position"),
        (lambda: cross_entropy_backward(np.ma.masked_array(1.0), cross_entropy_forward(X, T)[1]), TypeError, "dloss is a nump"),
        (lambda: cross_entropy_backward(1.0, cross_entropy_forward(X, T, reduction="none")[1]), ValueError, r"dloss has shape"),
        (lambda: cross_entropy_backward(True, cross_entropy_forward(X, T)[1]), TypeError, "dloss is a bool, expected a numpy"),
    ],
)  # fmt: skip
def test_what_is_refused_beside_test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
