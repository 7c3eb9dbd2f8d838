"""The normal distribution Phi(x) = (1 + erf(x / sqrt 2)) / 2, in every dtype.

1 + erf loses all digits where x is far below 0. So the tail is computed by itself, for z = |x| as a product and a sum without
cancellation, and Phi(x) is the tail where x <= 0, and 1 - the tail elsewhere:

    tail(z) = Phi(-z) = exp(-z^2 / 2) q(z),      q(z) = erfcx(z / sqrt 2) / 2 falls from 1/2 to 1 / (z sqrt(2 pi))

The relative error of the tail is a few eps (1 + z^2 / 2): z^2 is rounded before the exp. A change of x by eps changes the tail
as much.

float64 and complex128 come from scipy.special.erfc. It takes as long for float32 as for float64, and has no longdouble:
these have forms of their own.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from scipy.special import erfc

from npattn.ops.checks import Array

BLOCK = 1 << 16  # bytes that are computed at a time, so that what is in between stays in the processor's cache
TAIL_END = 200.0  # the tail is 0 in every dtype from here on, and no power of z overflows below

# q of float32 is P(z) / R(z), least relative error on 0 <= z <= 14.5, where the tail of float32 ends: 5.9e-9 (0.1 units of
# roundoff). All coefficients are positive, so nothing cancels. `python tests/test_error_function.py` fits and prints them.
P = (0.0041162738703023295, 0.0406330153598736, 0.18323455361158525, 0.43829422960688974, 0.5000000029523508)
R = (0.010317848726022975, 0.101858312269268, 0.4694690763370203, 1.2025008234974053, 1.6744734403445802, 1.0)


def normal(x: Array) -> Array:
    """Phi(x), with a relative error of a few eps (1 + x^2 / 2) where x < 0 and of a few eps elsewhere."""
    if x.dtype in (np.float64, np.complex128):
        return np.asarray(erfc(x * -(0.5**0.5)) / 2)
    result = np.empty(x.shape, x.dtype)
    flat, out, function = x.reshape(-1), result.reshape(-1), _by_fit if x.dtype == np.float32 else _by_integral
    step = BLOCK // x.itemsize
    for start in range(0, flat.size, step):
        out[start : start + step] = function(flat[start : start + step])
    return result


def _by_fit(x: Array) -> Array:
    """Phi of float32, in half the time of scipy.special.erf and erfc: `python tests/test_error_function.py` measures it.

    Its errors: P and R round at most 9 times together, of terms that are all positive; then a quotient, a product, an exp, and
    the 1/2 eps of z^2.
    """
    z = np.minimum(np.abs(x), TAIL_END)
    e = z * z
    e *= -0.5
    tail = _polynomial(P, z)
    tail /= _polynomial(R, z)
    tail *= np.exp(e, out=e)
    np.subtract(x > 0, tail, out=tail)  # -tail or 1 - tail; with np.where, whose branches are random, all takes twice as long
    return np.abs(tail, out=tail)


def _polynomial(coefficients: tuple[float, ...], z: Array) -> Array:
    y = z * coefficients[0]
    for c in coefficients[1:-1]:
        y += c
        y *= z
    y += coefficients[-1]
    return y


def _by_integral(x: Array) -> Array:
    """Phi in any precision and of complex x, as of clongdouble, by the trapezoidal rule for an integral over the real axis.

        q(z) = (z / 2 pi) integral of exp(-t^2 / 2) / (z^2 + t^2) dt
        tail(z) = exp(-z^2 / 2) (k z / pi) sum over n >= 0 of exp(-t_n^2 / 2) / (z^2 + t_n^2)  +  1 / (1 + exp(2 pi z / k))

    with t_n = (n + 1/2) k. The last term is the residue at t = i z, which counts where z.real < 2 pi / k. What is left of the
    error is exp(-2 pi^2 / k^2) of q (Hunter and Regan 1972), so that k = pi sqrt(2 / log(8 / eps)) makes it eps / 8, with
    15 terms in longdouble of 80 bits. For real z all terms are positive. A complex z may be near a pole i t_n: there t_n
    is n k, the term n = 0 counts half, and the residue has 1 - exp (Al Azah and Chandler-Wilde 2021).
    """
    k, count = _rule(x.dtype)
    low, pi, half = x.real <= 0, pi_of(x.dtype), type(k)(0.5)
    z = np.where(low, -x, x)
    z = np.where(z.real > np.maximum(TAIL_END, 2 * np.abs(z.imag)), z.dtype.type(TAIL_END), z)  # so that no z^2 overflows
    if z.dtype.kind == "c":
        half = np.where(np.abs(np.abs(z.imag) / k % 1 - half) <= half / 2, 0 * half, half)
    square, total = z * z, np.zeros_like(z)
    for n in range(count):
        t2 = ((n + half) * k) ** 2
        total += np.exp(t2 * -0.5) * np.where(n + half == 0, 0.5, 1) / (square + t2)
    turn = np.exp(z * (2 * pi / k))
    residue = np.where(z.real < 2 * pi / k, 1 / (1 + np.where(half == 0, -turn, turn)), 0)
    tail = np.exp(square * -0.5) * (z * total) * (k / pi) + residue
    return np.asarray(np.where(low, tail, 1 - tail))


@functools.cache
def _rule(dtype: np.dtype[Any]) -> tuple[Any, int]:
    """k and the number of terms."""
    info = np.finfo(dtype)
    digits = math.log(8 / float(info.eps))
    k = math.pi * math.sqrt(2 / digits)
    return info.dtype.type(k), math.ceil(math.sqrt(2 * digits) / k)


def pi_of(dtype: np.dtype[Any]) -> Any:
    """pi in the precision of a dtype: a Python float has too few digits for longdouble."""
    return 4 * np.arctan(np.finfo(dtype).dtype.type(1))
