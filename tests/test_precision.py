"""Precision classes: formats, sigma and det of each class, and the honest implementation of it in `npattn.verify.rounded`.

Formats are compared with ml_dtypes, `rounded` with the loops of `oracles`, sigma and det with the errors that `rounded` makes.
"""

from __future__ import annotations

import dataclasses
import functools

import ml_dtypes
import numpy as np
import pytest
from helpers import HARD_FIRST, first
from oracles import attention_loops

from npattn.ops.allowed import quiet
from npattn.tolerances import GOOD_MAX, GOOD_RMS, GRADCHECK_EPS
from npattn.verify.op import better_dtype
from npattn.verify.ops.attention.draw import FAMILIES, MEDIUM, SMALL, Part, dense_mask, draw, parts_of
from npattn.verify.ops.attention.truth import overflow
from npattn.verify.precision import PRECISIONS, of_dtype, round_to
from npattn.verify.rounded import rounded

NO_BETTER = pytest.mark.skipif(better_dtype(np.float64) is None, reason="no dtype here is better than float64")
EACH = pytest.mark.parametrize("name", [pytest.param(n, marks=NO_BETTER if n == "float64" else ()) for n in PRECISIONS])
SQUARE = {"H": 1, "G": 1, "L": 128, "S": 128, "D": 64, "E": 64}
SINGLE_OPTIONS = ("mask array", "causal top_left", "softcap", "bias BHLS", "sink", "dropout_mask", "dlse", "G < H")


# --- formats --------------------------------------------------------------------------------------------------------------

FORMATS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


def values(storage):
    """All values of a format, in float32."""
    bits = 8 * np.dtype(FORMATS[storage]).itemsize
    return np.arange(2**bits).astype(f"u{bits // 8}").view(FORMATS[storage]).astype(np.float32)


def same(x, y):
    """Bit for bit, with one NaN as good as another."""
    return bool(np.all((np.isnan(x) & np.isnan(y)) | ((x == y) & (np.signbit(x) == np.signbit(y)))))


@quiet
def by_ml_dtypes(x, storage):
    y = x.astype(FORMATS[storage]).astype(np.float32)
    if storage == "float8_e4m3fn":  # it has no inf: ml_dtypes makes NaN of what is too large, round_to the largest value
        y = np.where(np.isfinite(x) & ~np.isfinite(y), np.copysign(np.float32(448), x), np.where(np.isinf(x), x, y))
    return y


@pytest.mark.parametrize("storage", FORMATS)
def test_formats_hold_their_values(storage):
    x = values(storage)
    assert same(round_to(x, storage), x)


@pytest.mark.parametrize("storage", FORMATS)
def test_rounding_is_that_of_ml_dtypes(storage):
    """Any float32, and all ties with what lies next to them."""
    finite = np.unique(values(storage)[np.isfinite(values(storage))])
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    any_bits = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    any_bits = np.where(np.isnan(any_bits), np.float32(np.nan), any_bits)  # a signalling NaN warns when it is cast
    for x in (ties, *beside, any_bits):
        assert same(round_to(x, storage), by_ml_dtypes(x, storage))


def test_tf32():
    """11 bits, ties to even."""
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    mantissa, exponent = np.frexp(x.astype(np.float64))
    assert np.array_equal(round_to(x, "tf32"), np.ldexp(np.rint(mantissa * 2**11), exponent - 11))
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11], np.float32)
    assert round_to(ties, "tf32").tolist() == [1.0, 1 + 2**-9]


@pytest.mark.parametrize("storage", [*FORMATS, "tf32", "float32", "float64"])
def test_rounding_keeps_shape_dtype_and_what_is_not_finite(storage):
    shapes = [np.array(1.0), np.zeros((0, 3), np.float32), np.ones((3, 4), np.float32).T[::2]]
    for x in (*shapes, np.array([-np.inf, np.nan, np.inf])):
        y = round_to(x, storage)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert np.array_equal(x, y, equal_nan=True)


@EACH
def test_roundoffs_are_those_of_the_formats(name):
    """No rounding is farther off than the class says, and one is nearly as far."""
    precision = PRECISIONS[name]
    x = np.random.default_rng(0).uniform(1, 2, 100_000).astype(np.float32)
    coarse = {getattr(precision, n) for n in ("inputs", "scores", "weights", "dweights", "dscores", "delta_out", "out")} - {0.0}
    for roundoff in coarse:
        off = np.abs(round_to(x, precision.format) - x).max()
        assert 0.99 * roundoff <= off <= roundoff
    if precision.subnormal:
        x = precision.subnormal * np.random.default_rng(0).uniform(0, 4, 100_000)
        assert 0.99 <= np.abs(round_to(x, precision.format) - x).max() / precision.subnormal <= 1


def test_classes_of_dtypes():
    for dtype, name in ((np.float64, "float64"), (np.float32, "float32"), (np.float16, "float16-M1")):
        assert of_dtype(dtype) is PRECISIONS[name]


@EACH
def test_declared_inputs_are_exact(name):
    precision = PRECISIONS[name]
    assert precision.declared().inputs == (2.0**-11 if name == "tf32" else 0.0)
    stored = draw((), 0, dtype=np.float32).stored(precision)
    if name != "tf32":
        assert all(np.array_equal(x, round_to(x, precision.storage)) for x in (*stored.inputs.values(), stored.dout))


# --- the honest implementation ---------------------------------------------------------------------------------------------


@quiet
def run(problem, precision):
    """Outputs and gradients of `rounded`."""
    forward, backward = rounded(precision)
    options = dict(problem.options)
    if parts_of(problem):
        options["mask"] = dense_mask(problem)
    out, lse = forward(problem.q, problem.k, problem.v, **options)
    grads = backward(problem.dout, problem.q, problem.k, problem.v, **options, dlse=problem.dlse)
    return {"out": out, "lse": lse} | grads


@pytest.mark.parametrize("options", [(), *((o,) for o in SINGLE_OPTIONS), ("softcap", "sink", "dropout_mask", "dlse", "G < H")])
def test_rounded_computes_attention(options):
    problem = draw(options, 0, sizes=SMALL)
    full = {n: np.broadcast_to(x, problem.shape) for n, x in problem.options.items() if n in ("bias", "dropout_mask")}
    if parts_of(problem):
        full["allowed"] = dense_mask(problem)
    want = attention_loops(
        problem.q, problem.k, problem.v, **{n: x for n, x in problem.options.items() if n != "mask"} | full,
        dout=problem.dout, dlse=problem.dlse,
    )  # fmt: skip
    got = run(problem, PRECISIONS["float64"])
    for name, x in got.items():
        if x is not None:
            y = want[name if name in ("out", "lse") else name[1:]]
            error = np.abs(x - np.asarray(y).reshape(x.shape)).max()
            assert error < GRADCHECK_EPS * np.finfo(float).eps * max(1, np.abs(y).max()), name


def test_rounded_in_dead_rows():
    problem = draw(("causal bottom_right", "L > S"), 0, dtype=np.float32)
    got = run(problem, PRECISIONS["bfloat16-M3"])
    dead = np.isneginf(got["lse"])
    assert dead.any()
    assert not got["out"][dead].any()
    assert not got["dq"][dead].any()
    assert all(np.isfinite(got[n]).all() for n in ("dq", "dk", "dv"))


def test_rounded_contains_nan():
    """NaN in a key and value that nobody sees reaches nothing."""
    problem = draw(("mask array",), 0, dtype=np.float32)
    mask = parts_of(problem)[0].mask.copy()
    mask[..., 2] = False
    problem.options["mask"] = [Part(mask)]
    want = run(problem, PRECISIONS["bfloat16-M2"])
    problem.k[..., 2, :] = problem.v[..., 2, :] = np.nan
    got = run(problem, PRECISIONS["bfloat16-M2"])
    assert all(np.array_equal(got[n], want[n]) for n in ("out", "lse", "dq", "dk", "dv"))


@EACH
def test_rounded_gives_values_of_its_format(name):
    precision = PRECISIONS[name]
    got = run(draw((), 0, dtype=np.float32).stored(precision), precision)
    held = [np.array_equal(x, round_to(x, precision.format)) for x in (got[n] for n in ("out", "dq", "dk", "dv"))]
    assert held == 4 * [bool(precision.out) or name in ("float32", "float64")]
    assert got["lse"].dtype == precision.dtype


# --- sigma and det ----------------------------------------------------------------------------------------------------------


@quiet
def off(problem, precision, predicted=None):
    """|error| / sigma and |error| / det of every tensor of `rounded`, under its own class or another."""
    problem = problem.stored(precision)
    got, truth = run(problem, precision), problem.truth((predicted or precision).declared())
    found = {}
    for name, right in truth.values.items():
        x = got[name].astype(right.dtype)
        found[name] = [np.where(x == right, 0.0, np.abs(x - right) / e[name]).astype(float) for e in (truth.sigma, truth.det)]
    return found


def rms(x):
    return float(np.sqrt(np.square(x).mean()))


def normal(options=(), seed=0, *, name, sizes=MEDIUM, family="normal"):
    return draw(options, seed, sizes=sizes, family=family, dtype=PRECISIONS[name].dtype)


# What float8 multiplies has 4 bits, so that products are exact and partial sums often are. sigma does not know.
BAND = {"float8": (0.3, 1.0), "float32": (0.4, 1.0), "float64": (0.4, 1.0)}


@EACH
@pytest.mark.parametrize("seed", range(2))
def test_sigma_is_calibrated(name, seed):
    """From 0.5, or where sigma's chain is known to be long (docs/error-model.md), 0.4, to 1: of what is rounded once, 1."""
    least, most = BAND.get(name, (0.5, 1.05))
    for sizes in (MEDIUM, SQUARE):
        for tensor, (x, _) in off(normal(seed=seed, name=name, sizes=sizes), PRECISIONS[name]).items():
            if tensor != "lse":
                assert least <= rms(x) <= most, f"{tensor}: rms of error / sigma is {rms(x):.3g}"
            else:
                assert 0.4 <= rms(x) <= 1.3


@EACH
@pytest.mark.parametrize("option", SINGLE_OPTIONS)
def test_sigma_is_calibrated_under_options(name, option):
    """A wider band: under a mask some rows see few keys, and some of their errors are exactly 0; dsink has three elements."""
    least = 0.2 if name == "float8" else 0.3
    for tensor, (x, _) in off(normal((option,), name=name), PRECISIONS[name]).items():
        if tensor not in ("lse", "dsink"):
            assert least <= rms(x) <= 1.2, f"{tensor}: rms of error / sigma is {rms(x):.3g}"


# Where each rounding shows.
POINTS = {
    "inputs": {"out", "dq", "dk", "dv"},
    "scores": {"out", "dq", "dk", "dv"},
    "weights": {"out", "dv"},
    "dweights": {"dq", "dk"},
    "dscores": {"dq", "dk"},
    "delta_out": {"dq", "dk"},
    "out": {"out", "dq", "dk", "dv"},
}


@pytest.mark.parametrize("point", POINTS)
def test_each_rounding_alone(point):
    """It is made and predicted where the class has it, and nowhere else."""
    plain = PRECISIONS["float32"]
    alone = dataclasses.replace(plain, name=point, storage="bfloat16", **{point: 2.0**-8})
    problem = normal(name="float32", sizes=SQUARE)
    got, without, truth, strict = run(problem, alone), run(problem, plain), problem.truth(alone), problem.truth(plain)
    for tensor in ("out", "dq", "dk", "dv"):
        error = np.abs(got[tensor] - truth.values[tensor])
        if tensor in POINTS[point]:
            assert 0.5 <= rms(error / truth.sigma[tensor]) <= 1.05, f"{tensor}: {rms(error / truth.sigma[tensor]):.3g}"
            assert (error <= truth.det[tensor]).all(), tensor
            assert rms(error / strict.sigma[tensor]) > GOOD_RMS, tensor
        elif point != "delta_out":  # where rowsum(dout o out) is another sum than that of the weights
            assert np.array_equal(got[tensor], without[tensor]), tensor


@EACH
@pytest.mark.parametrize("family", first(3, HARD_FIRST))
def test_honest_errors_are_good_and_within_det(name, family):
    precision = PRECISIONS[name]
    for options in ((), ("mask array", "bias BHLS", "dlse", "softcap", "sink", "dropout_mask", "G < H")):
        problem = normal(options, name=name, family=family)
        lost = ("dq", "dk", "dbias", "dsink") if overflow(problem.stored(precision), precision) else ()
        for tensor, (x, bound) in off(problem, precision).items():
            if tensor in lost:
                continue
            assert bound.max() <= 1, f"{options}, {tensor}: {bound.max():.3g} det"
            assert x.max() <= GOOD_MAX, f"{options}, {tensor}: {x.max():.3g} sigma"
            assert tensor == "dsink" or rms(x) <= GOOD_RMS, f"{options}, {tensor}: rms {rms(x):.3g} sigma"


def test_what_overflows():
    """dP beyond 65504 does not fit into float16: the only class and family in which the honest one is left alone."""
    found = set()
    for name, precision in PRECISIONS.items():
        found |= {(name, f) for f in FAMILIES if overflow(normal(name=name, family=f).stored(precision), precision)}
    assert found == {("float16-M2", "V mean"), ("float16-M3", "V mean")}
    got = run(normal(name="float16-M2", family="V mean").stored(PRECISIONS["float16-M2"]), PRECISIONS["float16-M2"])
    assert not np.isfinite(got["dq"]).all()


@functools.cache
def under(made, predicted, family="normal"):
    """rms of errors of one class in sigmas of another."""
    problem = normal(name="float32", sizes=SQUARE, family=family)
    return {t: rms(x) for t, (x, _) in off(problem, PRECISIONS[made], PRECISIONS[predicted]).items()}


STRICTER = [
    ("tf32", "float32", "normal"),
    ("float16-M1", "float32", "normal"),
    ("bfloat16-M1", "float16-M1", "normal"),
    ("float16-M2", "float16-M1", "normal"),
    ("bfloat16-M2", "bfloat16-M1", "normal"),
    ("float16-M3", "float16-M2", "x5"),
    ("bfloat16-M3", "bfloat16-M2", "x5"),
]


@pytest.mark.parametrize(("made", "predicted", "family"), STRICTER)
def test_a_class_is_not_taken_for_a_stricter_one(made, predicted, family):
    found = under(made, predicted, family)
    for tensor in ("out", "dq", "dk", "dv"):
        assert found[tensor] > GOOD_RMS, tensor
        assert under(made, made, family)[tensor] < 1.05, tensor


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_stored_logits_show_in_lse(storage):
    """On N(0, 1) the weights hardly tell M3 from M2. lse does: it is not rounded, but the logits in it are."""
    assert under(f"{storage}-M3", f"{storage}-M2")["lse"] > 100
    assert under(f"{storage}-M3", f"{storage}-M3")["lse"] < 1.3


@pytest.mark.parametrize(
    ("made", "predicted"), [("bfloat16-M1", "bfloat16-M2"), ("float16-M1", "float16-M2"), ("float32", "tf32")]
)
def test_a_stricter_class_is_better_than_predicted(made, predicted):
    found = under(made, predicted)
    assert all(found[tensor] < 0.7 for tensor in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("seed", range(4))
def test_large_logits_stored_low(seed):
    """Logits of 1000 in bfloat16 are off by up to 2: whichever weight is the largest may come out as the smallest."""
    name = "bfloat16-M3"
    for family in ("x30", "near-tie"):
        for sizes in (MEDIUM, SQUARE):
            problem = normal(seed=seed, name=name, family=family, sizes=sizes)
            for tensor, (x, _) in off(problem, PRECISIONS[name]).items():
                assert rms(x) <= GOOD_RMS, f"{family}, {tensor}: rms {rms(x):.3g} sigma"
                assert x.max() <= GOOD_MAX, f"{family}, {tensor}: {x.max():.3g} sigma"


def test_inputs_rounded_alike_for_all_keys():
    """TF32 rounds q once for all keys. Where these have a mean, their scores move together, and lse with them."""
    for options in ((), ("softcap",)):
        found = off(normal(options, name="tf32", family="K mean"), PRECISIONS["tf32"])
        assert rms(found["lse"][0]) <= 1.3
        assert rms(found["lse"][0]) >= 0.2, "where sigma is far too large, nothing is tested"
