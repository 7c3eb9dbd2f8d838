"""sigma and det of `npattn.verify.ops.attention.errors`: honest float32 kernels stay within them, planted errors do not.

The truth is the dense reference in float64 (longdouble for float64). Kernels: the two of this package, blockwise in tiles of
2 x 3, and one written here that adds everything up in sequence, as a kernel on one thread would.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import HARD_FIRST, IMPLEMENTATIONS, first

from npattn.ops.allowed import quiet, swap
from npattn.tolerances import TIGHT_MAX, TIGHT_RMS
from npattn.verify.ops.attention import errors as model
from npattn.verify.ops.attention.cases import Case
from npattn.verify.ops.attention.draw import FAMILIES, LONG, MEDIUM, Part, dense_mask, draw, problem_of
from npattn.verify.ops.attention.errors import predict
from npattn.verify.rounding import Rounding

TENSORS = ("out", "lse", "q", "k", "v", "bias", "sink")
BOTH = ("dense", "blockwise")  # of this package


# --- truth, kernels and units -----------------------------------------------------------------------------------------


NO_BETTER = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant, reason="longdouble is no better here"
)


def run(problem, implementation):
    """Outputs and gradients by name."""
    forward, backward = IMPLEMENTATIONS[implementation]
    (out, lse), cache = forward(problem.q, problem.k, problem.v, **problem.arguments, return_lse=True)
    g = backward(problem.dout, cache, problem.dlse)
    return {"out": out, "lse": lse, "q": g.q, "k": g.k, "v": g.v, "bias": g.bias, "sink": g.sink}, cache, g


def reference(problem, better=np.float64):
    """What is right, and a function of ``rigorous``: sigma (or det) for an implementation in the problem's own dtype."""
    p = problem.astype(better)
    right, cache, grads = run(p, "dense")
    return right, partial(predict, cache, right["out"], p.dout, p.dlse, grads, dtype=problem.q.dtype)


def truth(problem, *, rigorous=False):
    right, predicted = reference(problem)
    return right, predicted(rigorous=rigorous)


@quiet
def units(got, right, errors):
    """|got - right| over the predicted error, for every tensor that there is; 0 where they are equal."""
    found = {}
    for name in TENSORS:
        x, y = got.get(name), right[name]
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            error = getattr(errors, name)
            assert error.shape == y.shape, f"{name}: the prediction has shape {error.shape}, expected {y.shape}"
            assert not np.isnan(error).any(), f"{name}: the prediction is NaN"
            found[name] = np.where(x == y, 0.0, np.abs(x.astype(y.dtype) - y) / error).astype(np.float64).ravel()
    return found


def rms(x):
    return float(np.sqrt(np.square(x).mean()))


@quiet
def in_sequence(p, *, from_lse=False, from_out=False, flush=False, weights=lambda x: x):
    """Attention in the dtype of the problem, every sum from its first term to the last, a rounding a step.

    from_lse : the weights of the backward are exp(s - lse); from_out : its mean is rowsum(dout * out)
    flush    : what is below the smallest normal number becomes 0
    weights  : what becomes of the weights before they are used
    """
    f, options = p.q.dtype.type, p.options
    least = np.finfo(f).smallest_normal if flush else f(0)

    def z(x):
        return np.where(np.abs(x) < least, f(0), x)

    def total(x, axis=-1):
        return np.cumsum(z(x), axis).take([-1], axis)

    def dot(x, y):
        return total(x[..., :, :, None] * y[..., None, :, :], -2)[..., 0, :]

    r = p.q.shape[-3] // p.k.shape[-3]
    q, k, v = p.q, np.repeat(p.k, r, -3), np.repeat(p.v, r, -3)
    allowed = dense_mask(p) if "mask" in p.options else np.True_
    drop, scale = options.get("dropout_mask", f(1)), f(options.get("scale", p.q.shape[-1] ** -0.5))
    logits, slope = z(scale * dot(q, swap(k))), f(1)
    if "softcap" in options:
        t = np.tanh(logits / f(options["softcap"]))
        logits, slope = f(options["softcap"]) * t, 1 - t * t
    logits = np.where(allowed, logits + options.get("bias", f(0)), f(-np.inf))
    if "sink" in options:
        column = np.broadcast_to(options["sink"][:, None, None], (*logits.shape[:-1], 1))
        logits = np.concatenate([column, logits], -1)
    top = logits.max(-1, keepdims=True)
    e = z(np.exp(logits - top))
    lse = top + np.log(total(e))
    shares = weights(z(e / total(e)))
    out = dot(shares[..., -k.shape[-2] :] * drop, v)

    shares = z(np.exp(logits - lse)) if from_lse else shares
    w = shares[..., -k.shape[-2] :]
    dl = f(0) if p.dlse is None else p.dlse[..., None]
    dp = np.where(allowed, dot(p.dout, swap(v)) * drop, f(0))
    mean = total(p.dout * out) if from_out else total(w * dp)
    ds = z(w * (dp - mean + dl))
    bias = sink = None
    if "bias" in options:
        full = (1,) * (ds.ndim - options["bias"].ndim) + options["bias"].shape
        axes = [a for a, n in enumerate(full) if n == 1]
        rest = np.moveaxis(ds, axes, range(-len(axes), 0)) if axes else ds[..., None]
        bias = total(rest.reshape(*(n for n in full if n > 1), -1)).reshape(options["bias"].shape)
    if "sink" in options:
        sink = total(np.moveaxis(shares[..., :1] * (dl - mean), -3, 0).reshape(p.q.shape[-3], -1))[:, 0]
    ds = z(ds * slope)

    def group(x):  # the queries of all heads that read one group, in one row
        return x.reshape(*p.k.shape[:-2], -1, x.shape[-1])

    dq, dk = z(scale * dot(ds, k)), z(scale * dot(swap(group(ds)), group(q)))
    dv = dot(swap(group(w * drop)), group(p.dout))
    return {"out": out, "lse": lse[..., 0], "q": dq, "k": dk, "v": dv, "bias": bias, "sink": sink}


KERNELS = {
    "dense": lambda p: run(p, "dense")[0],
    "blockwise": lambda p: run(p, "blockwise")[0],
    "tiles": lambda p: run(p, "tiles")[0],
    "in sequence": in_sequence,
    "from lse": lambda p: in_sequence(p, from_lse=True),
    "from lse and out": lambda p: in_sequence(p, from_lse=True, from_out=True),
    "flushed": lambda p: in_sequence(p, flush=True),
}


# --- det: a bound -----------------------------------------------------------------------------------------------------

OPTION_SETS = [
    (),
    ("mask array",),
    ("causal top_left",),
    ("bias BHLS",),
    ("bias LS",),
    ("bias S",),
    ("bias BHL",),
    ("bias H",),
    ("negative scale",),
    ("softcap",),
    ("sink",),
    ("dropout_mask",),
    ("dlse",),
    ("G < H",),
    ("sink", "dropout_mask"),
    ("softcap", "bias BHLS", "dlse"),
    ("G < H", "E != D", "mask array", "bias HLS", "negative scale", "softcap", "sink", "dropout_mask", "dlse"),
]
LITTLE = {"H": 2, "G": 2, "L": 7, "S": 24, "D": 6, "E": 6}


@pytest.mark.parametrize("family", first(3, HARD_FIRST))
def test_det_is_never_exceeded(family):
    worst = dict.fromkeys(TENSORS, 0.0)
    for options, (sizes, kernels) in itertools.product(OPTION_SETS, ((MEDIUM, BOTH), (LITTLE, KERNELS))):
        problem = draw(options, 0, sizes=sizes, family=family, dtype=np.float32)
        right, det = truth(problem, rigorous=True)
        for kernel in kernels:
            for name, x in units(KERNELS[kernel](problem), right, det).items():
                assert x.max() <= 1, f"{kernel}, {options}: {name} is {x.max():.3g} det off"
                worst[name] = max(worst[name], x.max())
    assert all(x > 1e-4 for x in worst.values()), f"a bound that is never nearly reached bounds nothing: {worst}"


def test_det_is_not_exceeded_where_sums_are_short():
    """Few terms leave the bound the least room."""
    rng = np.random.default_rng(0)
    for seed in range(150):
        sizes = {n: int(rng.integers(1, 9)) for n in ("L", "S", "D", "E")} | {"H": 2, "G": 2}
        options = OPTION_SETS[seed % len(OPTION_SETS)] if min(sizes["L"], sizes["S"]) > 2 else ()
        problem = draw(options, seed, sizes=sizes, family=list(FAMILIES)[seed % len(FAMILIES)], dtype=np.float32)
        right, det = truth(problem, rigorous=True)
        for kernel in BOTH:
            for name, x in units(KERNELS[kernel](problem), right, det).items():
                assert x.max() <= 1, f"{kernel}, {sizes}, {options}, seed {seed}: {name} is {x.max():.3g} det off"


def under_a_sink():
    """4096 keys that have 16 % of the weight, behind a sink: the sum that each is added to is 1 from the start."""
    rng, ones = np.random.default_rng(0), np.ones((1, 4096, 1), np.float32)
    v, one = rng.standard_normal(ones.shape, np.float32), np.ones((1, 1, 1), np.float32)
    return problem_of(-10 * one, ones, v, one, {"sink": np.zeros(1, np.float32), "scale": 1.0})


def far_from_zero():
    """lse = 1000, so that exp(s - lse) does not sum to 1, and a dp of large mean, from which it therefore is not taken."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, n, 16), np.float32) for n in (16, 8, 8, 16))
    return problem_of(q, k, v + np.float32(1e4), dout, {"bias": np.full((1, 1, 1), 1e3, np.float32)})


def near_underflow():
    """Weights of 1e-38, which a processor may take for 0, times dp of 1e4, which is far from it."""
    rng, one = np.random.default_rng(0), np.ones((1, 1, 1), np.float32)
    k = np.array([0, -87.8, -88.5, -1], np.float32).reshape(1, 4, 1)
    v, dout = (rng.standard_normal((1, n, 16), np.float32) for n in (4, 1))
    return problem_of(one, k, v * np.float32(1e4), dout, {"scale": 1.0})


@pytest.mark.parametrize("make", [under_a_sink, far_from_zero, near_underflow], ids=lambda f: f.__name__)
def test_det_is_not_exceeded_where_it_is_hard(make):
    problem = make()
    right, det = truth(problem, rigorous=True)
    for kernel in KERNELS:
        for name, x in units(KERNELS[kernel](problem), right, det).items():
            assert x.max() <= 1, f"{kernel}: {name} is {x.max():.3g} det off"


# --- sigma: one standard deviation ---------------------------------------------------------------------------------------

SQUARE = {"H": 2, "G": 2, "L": 128, "S": 128, "D": 64, "E": 64}


@pytest.mark.parametrize(
    ("options", "sizes", "least", "most"), [((), SQUARE, 0.5, 1.0), (OPTION_SETS[-1], MEDIUM, 0.2, TIGHT_RMS)]
)
def test_sigma_is_calibrated(options, sizes, least, most):
    """Where sigma is far too large, nothing is tested."""
    problem = draw(options, 0, sizes=sizes, lead=(2,), dtype=np.float32)
    right, sigma = truth(problem)
    for implementation in BOTH:
        for name, x in units(KERNELS[implementation](problem), right, sigma).items():
            assert least <= rms(x) <= most, f"{implementation}: rms of error / sigma is {rms(x):.3g} for {name}"


def tight(found):
    return {name: bool(rms(x) <= TIGHT_RMS and x.max() <= TIGHT_MAX) for name, x in found.items()}


def bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)


def scaled(p, factor=1 + 1e-5):
    return dataclasses.replace(p, options={**p.options, "scale": factor * p.q.shape[-1] ** -0.5})


PLANTED = {
    "scale x (1 + 1e-5)": lambda p: run(scaled(p), "dense")[0],
    "weights in bfloat16": lambda p: in_sequence(p, weights=bfloat16),
    "dq x (1 + 1e-3)": lambda p: (lambda r: r | {"q": r["q"] * np.float32(1 + 1e-3)})(run(p, "dense")[0]),
}
SEEN_IN = {"scale x (1 + 1e-5)": {"lse", "out"}, "weights in bfloat16": {"out", "q", "k", "v"}, "dq x (1 + 1e-3)": {"q"}}


@pytest.mark.parametrize("seed", range(2))
def test_planted_errors_are_rejected(seed):
    problem = draw((), seed, sizes=SQUARE | {"H": 1, "G": 1}, lead=(1,), dtype=np.float32)
    right, sigma = truth(problem)
    for planted, kernel in PLANTED.items():
        verdict = tight(units(kernel(problem), right, sigma))
        assert SEEN_IN[planted] <= {name for name, good in verdict.items() if not good}, planted
    assert all(tight(units(run(problem, "dense")[0], right, sigma)).values()), "the same without the error is rejected too"


CASES = {family: Case(family, family=family, sizes=SQUARE, lead=(1,)) for family in FAMILIES}
CASES["mask 50 %"] = Case("mask 50 %", sizes=SQUARE, lead=(1,))
CASES["causal with dead rows"] = Case("dead", ("causal bottom_right",), sizes=SQUARE | {"L": 130}, lead=(1,))
CASES["long and tiny"] = Case("long", sizes=LONG | {"L": 64, "S": 16384}, lead=(1,), family="tiny")


def problem_named(name, seed):
    problem = CASES[name].problem(seed)
    if name == "mask 50 %":
        problem.options["mask"] = [Part(np.random.default_rng(seed).random(problem.shape[-2:]) < 0.5)]
    return problem


@pytest.mark.parametrize("name", first(len(CASES) - 1, CASES))
def test_own_kernels_are_tight(name):
    """Tensors of fewer than 256 elements are judged over several seeds."""
    found, seed = {}, 0
    while not found or min(sum(map(len, parts)) for parts in found.values()) < 256:
        problem = problem_named(name, seed)
        right, sigma = truth(problem)
        for implementation in BOTH:
            for tensor, x in units(KERNELS[implementation](problem), right, sigma).items():
                found.setdefault((implementation, tensor), []).append(x)
        seed += 1
    assert len(found) == 10
    for (implementation, tensor), parts in found.items():
        x = np.concatenate(parts)
        assert x.max() <= TIGHT_MAX, f"{implementation}: {tensor} is off by {x.max():.3g} sigma"
        if name != "constant V":  # the errors of a row are the same
            assert rms(x) <= TIGHT_RMS, f"{implementation}: {tensor} has rms {rms(x):.3g} sigma"


def test_the_dead_rows_are_dead():
    right, _ = truth(CASES["causal with dead rows"].problem(0))
    assert np.isneginf(right["lse"]).any(-1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_that_all_scores_of_a_row_share_does_not_cancel_beside_a_sink(dtype):
    """Keys with a large mean, and a sink with most of the weight: found by drawing."""
    found = []
    for seed in range(3):
        problem = draw(("sink", "dlse"), seed, sizes={"H": 8, "G": 8, "L": 5, "S": 300, "D": 8, "E": 4}, family="K mean",
                       dtype=dtype)  # fmt: skip
        problem.dout[...] = 0
        right, sigma = truth(problem)
        small = right["lse"] - problem.options["sink"][:, None] < 1e-6  # the sink has all the weight, but for a millionth
        for implementation in BOTH:
            off = units(KERNELS[implementation](problem), right, sigma)["q"]
            found.append(off.reshape(problem.q.shape)[np.asarray(small)].ravel())
    found = np.concatenate(found)
    assert len(found) > 100
    assert rms(found) <= TIGHT_RMS


@NO_BETTER
def test_the_errors_of_a_slope_and_of_what_it_is_multiplied_by_are_multiplied_too():
    """Both are smaller than a unit of float64: 1 - p = 4e-18 beside a sink, and 1 - t^2 = 3e-17. Found by drawing."""
    rng = np.random.default_rng(0)
    q, k = np.ones((1, 1, 1)), np.full((1, 1, 1), -590.0)
    v, dout = 100 * rng.standard_normal((2, 1, 1, 16))
    problem = problem_of(q, k, v, dout, {"scale": 1.0, "softcap": 30.0, "sink": np.array([-70.0])})
    right, predicted = reference(problem, np.longdouble)
    for implementation in BOTH:
        off = units(KERNELS[implementation](problem), right, predicted(rigorous=False))
        assert off["q"].max() <= TIGHT_MAX, implementation


def test_sigma_holds_for_sums_of_terms_that_stand_beside_their_like():
    """All keys of a sequence may have one gradient, of any sign: so many equal terms, and then others."""
    rng, rounding, found = np.random.default_rng(0), Rounding(False, 2.0**-24, 0.0), []
    for _ in range(50):
        terms = (rng.standard_normal((5, 1, 30)) * (1 + 0.1 * rng.standard_normal((5, 64, 30)))).astype(np.float32)
        total = np.zeros(30, np.float32)
        for term in terms.reshape(-1, 30):
            total += term
        exact = terms.astype(float)
        sigma = rounding.rounding_of_sum(exact, (0, 1)).reshape(30)
        found.append((total - exact.sum((0, 1))) / sigma)
    assert 1 / 3 <= rms(np.array(found)) <= TIGHT_RMS


@pytest.mark.parametrize("name", first(1, ["V mean, bias of a row", "K mean and V mean"]))
def test_sigma_holds_where_errors_common_to_a_row_add_up(name):
    """The rounding of sum_j p_j dp_j is the same for all keys of a row: in a sum over them it does not average out."""
    found = {}
    for seed in range(2):
        if name == "K mean and V mean":
            problem = draw((), seed, sizes=LONG | {"L": 8, "S": 16384}, lead=(1,), family="V mean", dtype=np.float32)
            problem.k += np.float32(100)
        else:
            problem = draw(("bias BHL",), seed, sizes=LONG, lead=(1,), family="V mean", dtype=np.float32)
        right, sigma = truth(problem)
        for implementation in BOTH:
            for tensor, x in units(KERNELS[implementation](problem), right, sigma).items():
                found.setdefault((implementation, tensor), []).append(x)
    for tensor, parts in found.items():
        x = np.concatenate(parts)
        assert rms(x) <= TIGHT_RMS, f"{tensor} has rms {rms(x):.3g} sigma"
        assert x.max() <= TIGHT_MAX, f"{tensor} is off by {x.max():.3g} sigma"


def test_the_flush_of_small_numbers_is_no_error():
    problem = near_underflow()
    right, sigma = truth(problem)
    for name, x in units(in_sequence(problem, flush=True), right, sigma).items():
        assert x.max() <= TIGHT_MAX, f"{name} is off by {x.max():.3g} sigma"


# --- what the dense backward keeps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_one_hot_gradients_vanish(seed):
    """The true gradients are far below the least float32: what is left of dp - mean must not be multiplied by more."""
    problem = draw((), seed, sizes=SQUARE, lead=(1,), family="one-hot", dtype=np.float32)
    got, _, _ = run(problem, "dense")
    assert max(np.abs(truth(problem)[0][name]).max() for name in "qk") < 1e-45
    assert np.abs(got["q"]).max() <= 1e-37
    assert np.abs(got["k"]).max() <= 1e-37


@pytest.mark.parametrize("seed", range(2))
def test_saturated_weights_are_accurate(seed):
    """Logits of 900, in rows with a clear winner; rows without one are wrong by u |s| anyway."""
    problem = draw((), seed, sizes=SQUARE, lead=(1,), family="x30", dtype=np.float32)
    scores = np.sort(problem.q.astype(np.float64) @ swap(problem.k) * problem.q.shape[-1] ** -0.5, -1)
    problem.cotangents["dout"] = np.where(scores[..., -1:] - scores[..., -2:-1] > 20, problem.dout, np.float32(0))
    right, got = truth(problem)[0]["v"], run(problem, "dense")[0]["v"]
    assert np.abs(got - right).max() <= 2e-7 * np.abs(right).max()


# --- predict itself -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rigorous", [False, True])
def test_predict_modifies_nothing(rigorous):
    problem = draw(OPTION_SETS[-1], 0)
    right, cache, grads = run(problem, "dense")
    arrays = [problem.q, problem.k, problem.v, problem.dout, problem.dlse, *problem.options.values(), *cache, *grads]
    arrays += list(right.values())
    arrays = [x for x in arrays if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in arrays]
    given = (cache, right["out"], problem.dout, problem.dlse, grads)
    first, second = (predict(*given, dtype=np.float32, rigorous=rigorous) for _ in range(2))
    assert [x.tobytes() for x in arrays] == before
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    alone = predict(cache, right["out"], dtype=np.float32, rigorous=rigorous)
    assert np.array_equal(alone.out, first.out)
    assert np.array_equal(alone.lse, first.lse)
    assert alone[2:] == (None,) * 5


@NO_BETTER
@pytest.mark.parametrize("family", ["normal", "x5", "V mean", "near-tie"])
def test_float64_against_longdouble(family):
    for options in ((), OPTION_SETS[-1]):
        problem = draw(options, 0, sizes=MEDIUM, family=family)
        right, predicted = reference(problem, np.longdouble)
        check_float64(problem, right, predicted(), predicted(rigorous=True), family == "normal" and not options)


def check_float64(problem, right, sigma, det, calibrated):
    for implementation in BOTH:
        got = KERNELS[implementation](problem)
        for name, x in units(got, right, sigma).items():
            if name != "sink":  # three elements
                assert rms(x) <= TIGHT_RMS, f"rms of error / sigma is {rms(x):.3g} for {name}"
            if calibrated:
                assert rms(x) >= 0.4, f"rms of error / sigma is {rms(x):.3g} for {name}"
            assert x.max() <= TIGHT_MAX, f"{name} is off by {x.max():.3g} sigma"
        assert all(x.max() <= 1 for x in units(got, right, det).values())


@pytest.mark.parametrize("rigorous", [False, True])
def test_sink_of_minus_infinity(rigorous):
    """No sink: the same prediction as without it, and none for its gradient, which is exactly 0."""
    problem = draw(("dlse",), 0)
    predictions = []
    for options in ({}, {"sink": np.full(problem.q.shape[-3], -np.inf)}):
        p = dataclasses.replace(problem, options=options)
        right, cache, grads = run(p, "dense")
        predictions.append(predict(cache, right["out"], p.dout, p.dlse, grads, dtype=np.float32, rigorous=rigorous))
    for name in ("out", "lse", "q", "k", "v"):
        without, with_sink = (getattr(errors, name) for errors in predictions)
        assert np.all(with_sink >= without), f"{name}: one more term, of weight 0, cannot make the prediction smaller"
        assert np.all(with_sink <= 1.5 * without), f"{name}: one more term, of weight 0, cannot make it that much larger"
    assert not np.isnan(predictions[1].sink).any()
    assert np.all(predictions[1].sink < 1e-30)


def test_dead_rows_are_exact():
    problem = draw(("causal bottom_right", "L > S"), 0, sizes=MEDIUM, dtype=np.float32)
    for rigorous in (False, True):
        right, errors = truth(problem, rigorous=rigorous)
        dead = np.isneginf(right["lse"])
        assert dead.any()
        assert not errors.out[dead].any()
        assert not errors.lse[dead].any()


def test_each_section_of_the_page_is_one_function():
    """The title of a section about an equation is the first line of its function's docstring, in the same order."""
    page = (Path(__file__).parent.parent / "docs/error-model.md").read_text()
    functions = [f for f in ast.parse(Path(model.__file__).read_text()).body if isinstance(f, ast.FunctionDef)]
    titles = [(ast.get_docstring(f) or "").split("\n")[0].rstrip(".") for f in functions]
    assert [title for title in titles if title.startswith("(")] == re.findall(r"^##+ (\(.*)", page, re.M)
    assert all(f.end_lineno - f.lineno < 40 for f in functions)
