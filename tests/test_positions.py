"""Sinusoids and rotary positions, forwards and backwards, against complex numbers in loops."""

from __future__ import annotations

import itertools

import ml_dtypes
import mpmath
import numpy as np
import pytest
from helpers import assert_close
from oracles import frequency_loops, rotary_loops

import npattn
from npattn import (
    LinearScaling,
    Llama3Scaling,
    Rotary,
    gradcheck,
    rotary,
    rotary_backward,
    rotary_forward,
    sinusoidal,
)

B, H, L, D = 2, 3, 4, 10
LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 64)  # the 5 pairs at base 100 are slow, between and fast
OPTIONS = {
    "plain": {},
    "width": {"width": 6},
    "base": {"base": 500000.0},
    "linear": {"scaling": LinearScaling(4.0)},
    "llama3": {"scaling": LLAMA3, "base": 100.0},
}
EXCLUSIVE = {("linear", "llama3"), ("base", "llama3")}
PAIRS = [(a,) for a in OPTIONS] + [p for p in itertools.combinations(OPTIONS, 2) if p not in EXCLUSIVE]
POSITIONS = {
    "0 to L - 1": np.arange(L),
    "of each sequence": np.array([[3, 0, -2, 3], [10**6, 1, 7, 131071]]),
    "unsigned": np.arange(L, dtype=np.uint8)[::-1],
}


def drawn(seed=0, shape=(B, H, L, D)):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), rng.standard_normal(shape)


def of(names, layout):
    return {"layout": layout} | {k: v for name in names for k, v in OPTIONS[name].items()}


def bounds(z, positions, how):
    """Of each element the sum of |terms|: those of (3) and (4), and their slopes times the angle, which is rounded."""
    d = z.shape[-1] if how.get("width") is None else how["width"]
    f = np.array([float(x) for x in frequency_loops(d, how.get("base", 10000.0), how.get("scaling"))])
    t = np.abs(np.asarray(positions, np.float64))[..., None] * f
    t = t[..., None, :, :] if t.ndim > 2 else t
    a, b = ((slice(0, d // 2), slice(d // 2, d)) if how["layout"] == "half" else (slice(0, d, 2), slice(1, d, 2)))
    terms = np.zeros(z.shape)
    terms[..., a] = terms[..., b] = (np.abs(z[..., a]) + np.abs(z[..., b])) * (1 + t)
    return terms


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=list(POSITIONS))
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_rotary_is_that_of_complex_numbers(names, layout, positions):
    x, dy = drawn()
    how = of(names, layout)
    want, (y, cache) = rotary_loops(x, positions, dy, **how), rotary_forward(x, positions, Rotary(**how))
    assert_close(y, want["y"], bounds(x, positions, how), name="y")
    assert_close(rotary_backward(dy, cache).x, want["x"], bounds(dy, positions, how), name="dx")
    assert np.array_equal(rotary(x, positions, Rotary(**how)), y)


@pytest.mark.parametrize("shape", [(L, D), (H, L, D), (2, 1, H, L, D)], ids=str)
def test_ranks(shape):
    x, dy = drawn(shape=shape)
    for positions in (np.arange(L), np.arange(2 * L).reshape(2, 1, L)) if len(shape) == 5 else (np.arange(L),):
        y, cache = rotary_forward(x, positions, Rotary("half"))
        want = rotary_loops(x, positions, dy, layout="half")
        assert_close(y, want["y"], bounds(x, positions, {"layout": "half"}))
        assert_close(rotary_backward(dy, cache).x, want["x"], bounds(dy, positions, {"layout": "half"}))


@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_its_gradient_is_the_derivative(names, layout, method):
    how = Rotary(**of(names, layout))
    forward = lambda x: rotary_forward(x, POSITIONS["of each sequence"], how)  # noqa: E731
    gradcheck(forward, rotary_backward, {"x": drawn()[0]}, method=method)


def test_scores_depend_on_differences_of_positions():
    q, k = drawn(1)
    for layout in ("half", "interleaved"):
        how = Rotary(layout, base=100.0)
        near, far = (
            rotary(q, np.arange(L) + n, how) @ rotary(k, np.arange(L) + n, how).swapaxes(-1, -2) for n in (0, 1000)
        )
        terms = (np.abs(q) @ np.abs(k).swapaxes(-1, -2)) * 2 * (1000 + L)  # an angle rounds by eps of itself
        assert_close(far, near, terms)


def test_an_angle_of_a_large_position_is_that_of_float64():
    """A million times 0.1 in float32 is off by 0.006, and 1e9 by 6: the sine would be any number."""
    x = np.tile(np.float32([1, 0]), (3, 32))
    p = np.array([10**6, 10**9, -(10**9)])
    y = rotary(x, p, Rotary("interleaved"))
    want = rotary_loops(x, p, x, layout="interleaved")["y"]
    angle = np.abs(p).max() * np.finfo(float).eps
    assert np.abs(y - want).max() <= np.finfo(np.float32).eps / 2 + 4 * angle


def test_llama3_keeps_fast_pairs_and_slows_the_others():
    plain, scaled = (Rotary("half", base=500000.0, scaling=s).frequencies(128) for s in (None, Llama3Scaling(8, 1, 4, 8192)))
    ratio = plain / scaled
    assert (np.diff(ratio) >= 0).all()
    assert ratio[0] == 1
    assert ratio[-1] == 8
    assert ((ratio > 1) & (ratio < 8)).sum() == 6
    assert np.array_equal(Rotary("half", scaling=LinearScaling(4.0)).frequencies(8), Rotary("half").frequencies(8) / 4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.longdouble, np.complex128])
def test_dtypes_come_out_as_they_go_in(dtype):
    x, dy = (a.astype(dtype) for a in drawn(2))
    for how in (Rotary("half", width=6), Rotary("interleaved", width=6)):
        y, cache = rotary_forward(x, np.arange(L), how)
        dx = rotary_backward(dy, cache).x
        wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
        y_wide, cache_wide = rotary_forward(x.astype(wide), np.arange(L), how)
        assert y.dtype == dx.dtype == x.dtype
        assert np.array_equal(y, y_wide.astype(dtype))
        assert np.array_equal(dx, rotary_backward(dy.astype(wide), cache_wide).x.astype(dtype))
        assert np.array_equal(y[..., 6:], x[..., 6:])


def test_longdouble_angles_are_longdouble():
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("longdouble is float64 here")
    x, p = np.longdouble([[[1, 0, 1, 0]]]), np.array([10**6])
    how = Rotary("interleaved", base=100.0, scaling=Llama3Scaling(8, 1, 4, 100))
    y = rotary(x, p, how)[0, 0]
    with mpmath.workdps(40):
        for i, f in enumerate(frequency_loops(4, 100.0, how.scaling)):
            off = mpmath.mpf(10**6) * f
            error = abs(mpmath.mpf(str(np.format_float_positional(y[2 * i], 30))) - mpmath.cos(off))
            assert error < 8 * float(np.finfo(np.longdouble).eps) * float(off)


def test_what_is_not_seen_reaches_nothing():
    x, dy = drawn(3)
    clean, _ = rotary_forward(x, np.arange(L), Rotary("half"))
    x[0, 1, 2], x[1, 0, 3] = np.nan, np.inf
    y, cache = rotary_forward(x, np.arange(L), Rotary("half"))
    same = np.ones(x.shape[:-1], bool)
    same[0, 1, 2] = same[1, 0, 3] = False
    assert np.array_equal(y[same], clean[same])
    assert np.isnan(y[0, 1, 2]).all()
    dy[0, 1, 2] = 0
    dx = rotary_backward(dy, cache).x
    assert not dx[0, 1, 2].any()
    assert np.isfinite(dx).all()


def test_extremes():
    x = np.float32([[[3e38, 1e-38, np.inf, 1.0]], [[2e38, 2e38, 1e-45, -1e-45]]])
    y = rotary(x, [0], Rotary("half"))
    assert np.array_equal(y, x)  # at position 0 an inf does not become NaN in its partner
    assert np.isfinite(rotary(x[1], [1], Rotary("interleaved"))).all()
    assert np.array_equal(rotary(np.ones((1, 2)), [2**60], Rotary("half")).shape, (1, 2))


@pytest.mark.parametrize("shape", [(0, H, L, D), (B, 0, L, D), (B, H, 0, D), (B, H, L, 0)], ids=str)
def test_empty(shape):
    x = np.zeros(shape)
    for p in (np.arange(shape[-2]), np.zeros((shape[0], shape[-2]), int)):
        y, cache = rotary_forward(x, p, Rotary("half"))
        assert y.shape == rotary_backward(y, cache).x.shape == shape


def test_inputs_may_be_views_and_are_not_modified():
    x = np.broadcast_to(np.arange(8.0), (H, L, 8))
    how, p = Rotary("interleaved"), np.broadcast_to(np.int32(7), (L,))
    y, cache = rotary_forward(x, p, how)
    assert np.array_equal(y, rotary(x.copy(), p.copy(), how))
    assert np.array_equal(rotary(x[:, ::-1, ::-2], p, how), rotary(x[:, ::-1, ::-2].copy(), p, how))
    first, second = rotary_backward(x, cache).x, rotary_backward(x, cache).x
    assert np.array_equal(first, second)
    assert not x.flags.writeable


X = np.ones((2, 3, 4, 6))
CACHE = rotary_forward(X, np.arange(4), Rotary("half"))[1]


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: rotary([1.0], [0], Rotary("half")), TypeError, "rotary: x is a list, expected a numpy.ndarray"),
    (lambda: rotary(X[0, 0, 0], [0], Rotary("half")), ValueError, r"rotary: x has shape \(6,\), expected \(..., L, D\)"),
    (lambda: rotary(X, np.arange(4.0), Rotary("half")), TypeError, "rotary: positions has dtype float64, expected integers"),
    (lambda: rotary(X, np.arange(3), Rotary("half")), ValueError,
     r"rotary: positions has shape \(3,\), expected \(L=4,\) or one row a sequence, \(2, 4\): fixed by x"),
    (lambda: rotary(X, [[0, 1, 2, 3]], Rotary("half")), ValueError, r"rotary: positions has shape \(1, 4\)"),
    (lambda: rotary(X, np.arange(4)), TypeError, "rotary"),
    (lambda: rotary(X, np.arange(4), "half"), TypeError, "rotary: rotary is a str, expected npattn.Rotary"),
    (lambda: rotary(X, np.arange(4), Rotary("half"), theta=1.0), TypeError, "rotary: got the keyword theta"),
    (lambda: rotary(X, np.arange(4), Rotary("half", width=8)), ValueError, "rotary: rotary.width is 8, expected at most D=6"),
    (lambda: rotary(X[..., :5], np.arange(4), Rotary("half")), ValueError, "the width D of a head is 5, expected an even"),
    (lambda: Rotary("neox"), ValueError, "Rotary: layout is 'neox', expected one of 'half', 'interleaved'"),
    (lambda: Rotary("half", width=3), ValueError, "Rotary: width is 3, expected an even number"),
    (lambda: Rotary("half", base=0.0), ValueError, "Rotary: base is 0.0, expected a positive finite number$"),
    (lambda: Rotary("half", scaling={"factor": 8}), TypeError, "Rotary: scaling is a dict, expected npattn.LinearScaling"),
    (lambda: LinearScaling(-1), ValueError, "LinearScaling: factor is -1, expected a positive finite number$"),
    (lambda: Llama3Scaling(8, 4, 4, 8192), ValueError, "high_freq_factor is 4, expected more than low_freq_factor=4"),
    (lambda: rotary_backward(X[0], CACHE), ValueError, r"rotary: dy has shape \(3, 4, 6\), expected \(2, 3, 4, 6\)"),
    (lambda: rotary_backward(X.astype(np.float32), CACHE), TypeError, "rotary: dy has dtype float32, expected float64"),
    (lambda: rotary_backward(X, None), TypeError, "rotary: cache is a NoneType, expected npattn.RotaryCache"),
    (lambda: sinusoidal([0.5], 4), TypeError, "sinusoidal: positions has dtype float64, expected integers"),
    (lambda: sinusoidal([0], 5), ValueError, "sinusoidal: width is 5, expected an even number"),
    (lambda: sinusoidal([0], 4, layout="sin"), ValueError, "sinusoidal: layout is 'sin', expected one of"),
    (lambda: sinusoidal([0], 4, dtype=int), TypeError, "sinusoidal: dtype is int64, expected a dtype of real numbers"),
    (lambda: sinusoidal([0], 4, theta=1), TypeError, "sinusoidal: got the keyword theta"),
])  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- sinusoids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("positions", [np.arange(6), np.array([[0, 5, -3], [10**6, 2, 2]]), np.array(7)], ids=str)
def test_sinusoids_are_those_of_loops(positions, layout):
    width = 8
    got = sinusoidal(positions, width, base=1000.0, layout=layout)
    assert got.shape == (*positions.shape, width)
    f = frequency_loops(width, 1000.0)
    for at in np.ndindex(*positions.shape):
        for i in range(width // 2):
            with mpmath.workdps(40):
                t = int(positions[at]) * f[i]
                want = float(mpmath.sin(t)), float(mpmath.cos(t))
            columns = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + width // 2)
            for column, value in zip(columns, want, strict=True):
                assert abs(got[(*at, column)] - value) <= 4 * np.finfo(float).eps * (1 + abs(float(t)))


def test_sinusoids_of_tensor2tensor():
    """Its frequencies are 10000^(-i / (n - 1)) for n sines: the last one is 1 / 10000."""
    width, n = 12, 6
    got = sinusoidal(np.arange(5), width, base=10000 ** (n / (n - 1)), layout="half")
    angle = np.arange(5)[:, None] * np.exp(-np.arange(n) * np.log(10000) / (n - 1))
    assert np.abs(got - np.concatenate([np.sin(angle), np.cos(angle)], -1)).max() <= 16 * np.finfo(float).eps * angle.max()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.longdouble])
def test_sinusoids_are_rounded_once(dtype):
    got = sinusoidal(np.arange(50), 6, dtype=dtype)
    assert got.dtype == dtype
    if np.dtype(dtype).itemsize <= 8:
        assert np.array_equal(got, sinusoidal(np.arange(50), 6).astype(dtype))
    assert sinusoidal(np.arange(0), 6, dtype=dtype).shape == (0, 6)


def test_verify_knows_it():
    report = npattn.verify.verify("rotary")
    assert report.passed, report.lines()


CASES = {case.name: case for case in npattn.verify.CASES_OF["rotary"]}


def found(function, *names, **how):
    return npattn.verify.verify(function, op="rotary", cases=[CASES[name] for name in names], **how)


def test_verify_names_a_mistake():
    wrong = found(lambda x, positions, **how: rotary(x, positions + 1, Rotary(**how)), "half")
    assert list(wrong.diagnosis) == ["positions begin at 1"]


def in_float32(x, positions, *, layout, base=10000.0):
    """As models have it: frequencies, angles, cosines and sines in float32."""
    f = np.float32(base) ** (-np.arange(0, x.shape[-1], 2, dtype=np.float32) / np.float32(x.shape[-1]))
    t = positions.astype(np.float32)[..., None] * f
    t = t[:, None] if t.ndim == 3 else t
    y, half = np.empty_like(x), x.shape[-1] // 2
    a, b = (np.s_[..., :half], np.s_[..., half:]) if layout == "half" else (np.s_[..., ::2], np.s_[..., 1::2])
    y[a], y[b] = x[a] * np.cos(t) - x[b] * np.sin(t), x[b] * np.cos(t) + x[a] * np.sin(t)
    return y


def test_verify_names_angles_in_float32():
    for case in ("of each sequence, half", "at random", "around 1e6, interleaved"):
        assert list(found(in_float32, case).diagnosis) == ["angles in float32"], case


def test_a_function_of_one_layout_is_given_its_own():
    def interleaved(x, positions, base=10000.0):
        return rotary(x, positions, Rotary("interleaved", base=base))

    def turned_back(dy, x, positions, base=10000.0):
        return rotary_backward(dy, rotary_forward(x, positions, Rotary("interleaved", base=base))[1]).x

    names = ("half", "interleaved", "base, half", "of each sequence, interleaved", "NaN", "rank 2")
    assert found(interleaved, *names, backward=turned_back, convention="rope=interleaved").passed
    wrong = found(interleaved, "half", "of each sequence, interleaved", backward=turned_back)
    assert list(wrong.diagnosis) == ["half for interleaved, interleaved for half", "another layout than rope= says"]
