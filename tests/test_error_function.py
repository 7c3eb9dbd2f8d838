"""The normal distribution against mpmath.

Run as a program, this file prints the coefficients of float32 and the figures that stand in npattn/ops/error_function.py.
"""

from __future__ import annotations

import time

import mpmath
import numpy as np
import pytest
from helpers import first
from scipy.special import erf, erfc, erfcx

from npattn.ops import error_function
from npattn.ops.error_function import normal
from npattn.tolerances import TERMS_EPS

DIGITS = 60
REAL = [np.float32, np.float64, np.longdouble]
COMPLEX = [np.complex128, np.clongdouble]


def exact(x):
    """A number of any precision as one of mpmath."""
    part, exponent = np.frexp(x)
    high = float(part)
    return mpmath.ldexp(mpmath.mpf(high) + float(part - type(x)(high)), int(exponent))


def phi(z):
    return mpmath.erfc(-z / mpmath.sqrt(2)) / 2


def worst(x, part=abs):
    """The largest error of Phi, in units of eps (1 + |x|^2 / 2) of its size; where x.real > 0 without x^2."""
    found, worst, eps = normal(x), 0.0, float(np.finfo(x.dtype).eps)
    with mpmath.workdps(DIGITS):
        for v, y in zip(x, found, strict=True):
            v, y = (mpmath.mpc(exact(n.real), exact(n.imag)) if x.dtype.kind == "c" else exact(n) for n in (v, y))
            want, size = phi(v), 1 + (abs(v) ** 2 / 2 if x.dtype.kind == "c" or v < 0 else 0)
            worst = max(worst, float(part(y - want) / abs(part(want)) / size) / eps)
    return worst


@pytest.mark.parametrize("dtype", REAL)
def test_relative_error_down_to_underflow(dtype):
    # z^2, an exp and a quotient of two polynomials of positive terms, or a sum of 15 positive terms: a dozen roundings each.
    end = {np.float32: 13.0, np.float64: 37.5, np.longdouble: 150.0}[dtype]
    x = np.concatenate([np.linspace(-end, 9, 300), np.random.default_rng(0).standard_normal(300), [-1e-20, 1e-20]])
    assert worst(x.astype(dtype)) < TERMS_EPS


@pytest.mark.parametrize("dtype", COMPLEX)
def test_the_plane(dtype):
    real = np.dtype(dtype).type(0).real.dtype
    rng = np.random.default_rng(1)
    x = (3 * rng.standard_normal(300)).astype(real) + 1j * (3 * rng.standard_normal(300)).astype(real)
    axis = 1j * np.linspace(-5, 5, 101).astype(real) + np.array([0, 1e-3], real)[:, None]  # beside and on the poles
    assert worst(np.concatenate([x, axis.ravel()]).astype(dtype)) < TERMS_EPS


@pytest.mark.parametrize("dtype", COMPLEX)
def test_a_complex_step_is_the_density(dtype):
    x = np.linspace(-12, 6, 90) + 1e-40j
    assert worst(x.astype(dtype), lambda z: abs(z.imag)) < TERMS_EPS


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_limits(dtype):
    with np.errstate(all="ignore"):
        top = np.finfo(dtype).max
        assert normal(np.array([-top, -1e20, -300, 0, 300, 1e20, top], dtype)).tolist() == [0, 0, 0, 0.5, 1, 1, 1]
        assert np.isnan(normal(np.array([np.nan], dtype))).all()
        if np.dtype(dtype).kind == "f":
            assert normal(np.array([-np.inf, np.inf], dtype)).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", REAL)
def test_blocks_and_views(dtype, monkeypatch):
    x = np.random.default_rng(3).standard_normal((5, 14)).astype(dtype)
    whole = normal(x)
    assert np.array_equal(normal(x.T), whole.T)
    assert np.array_equal(normal(x[:, ::-2]), whole[:, ::-2])
    assert normal(x[:0]).shape == (0, 14)
    assert normal(x[0, 0]) == whole[0, 0]
    monkeypatch.setattr(error_function, "BLOCK", 7 * x.itemsize)
    assert np.array_equal(normal(x), whole)


# --- the coefficients of float32 --------------------------------------------------------------------------------------------

END = 14.5  # exp(-END^2 / 2) is less than half of the least float32


def q(z):
    return erfcx(z / np.sqrt(2)) / 2


def off(top, bottom, z):
    return np.polyval(top, z) / np.polyval(bottom, z) / q(z) - 1


def fit(n=4, m=5, steps=400):
    """P and R of degrees n and m with the least relative error of P / R: linear least squares, reweighted (Lawson 1961)."""
    z = END * ((np.cos(np.pi * (np.arange(2000) + 0.5) / 2000) + 1) / 2) ** 2
    columns = np.concatenate([z[:, None] ** np.arange(n + 1) / q(z)[:, None], -(z[:, None] ** np.arange(1, m + 1))], 1)
    weight, bottom, best = np.ones_like(z), np.ones_like(z), (np.inf, (), ())
    for _ in range(steps):
        scale = weight / bottom
        a = columns * scale[:, None]
        size = np.sqrt(np.square(a).sum(0))
        c = np.linalg.lstsq(a / size, scale, rcond=1e-17)[0] / size
        top, low = c[n::-1], np.append(c[:n:-1], 1.0)
        bottom, error = np.polyval(low, z), np.abs(off(top, low, z))
        best = min(best, (float(error.max()), tuple(top.tolist()), tuple(low.tolist())))
        weight = weight * np.sqrt(error / error.max() + 1e-3)
        weight /= weight.max()
    return best


def test_the_fit_is_far_below_a_rounding_of_float32():
    z = np.linspace(0, END, 20001)
    assert np.abs(off(error_function.P, error_function.R, z)).max() < np.finfo(np.float32).eps / 2 / 8
    assert min(error_function.P + error_function.R) > 0


@pytest.mark.parametrize("steps", first(1, [20, 400]))
def test_a_fit_made_anew_is_no_better(steps):
    error, _, _ = fit(steps=steps)
    z = np.linspace(0, END, 20001)
    assert np.abs(off(error_function.P, error_function.R, z)).max() < 1.25 * error


def nanoseconds(function, x, times=200):
    """The least processor time for an element."""
    found = []
    for _ in range(times):
        start = time.thread_time()
        function(x)
        found.append(time.thread_time() - start)
    return min(found) / x.size * 1e9


def main():
    error, top, bottom = fit()
    print(f"P = {top}\nR = {bottom}\nerror {error:.2g}, {error / 2**-24:.2g} units of roundoff of float32")
    x = np.random.default_rng(0).standard_normal(1 << 18)
    for dtype in (np.float32, np.float64):
        speeds = {f.__name__: f"{nanoseconds(f, x.astype(dtype)):.1f}" for f in (normal, erf, erfc, np.tanh, np.exp)}
        print(np.dtype(dtype), "ns an element:", speeds)


if __name__ == "__main__":
    main()
