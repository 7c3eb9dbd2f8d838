"""How far an honest implementation may be from the truth, element by element: sigma and det.

Both follow every rounding through equations (1) to (7) of `npattn.ops.attention` and back, by the same formulas:

    sigma    one standard deviation: independent roundings of 0.43 u each are added in quadrature
    det      a bound that holds in any order of summation and any tiling: roundings of u are added up

The notation is that of docs/error-model.md: a = |scale|, eta the error of a score, rho the relative error of an exp, pi of
a weight, zeta of dp, delta of sum_j p_j dp_j. All is computed in float64 from the reference's own values.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select, swap
from npattn.ops.attention import AttentionCache, AttentionGrads, live, visible
from npattn.ops.checks import Array
from npattn.ops.heads import each_head, heads_first
from npattn.tolerances import DELTA_ROUNDING, EXP_ULPS, GOOD_MAX, GOOD_RMS, ROUNDING_STD, TIGHT_MAX, TIGHT_RMS
from npattn.verify.precision import Precision, of_dtype, round_to

LEVELS = {"tight": (TIGHT_RMS, TIGHT_MAX), "good": (GOOD_RMS, GOOD_MAX)}  # and "bounded": no element above det


@quiet
def units(got: Array, want: Array, sigma: Array, rest: Any = 0.0) -> Array:
    """|error| / sigma; 0 where equal, inf where NaN and inf do not stand as they should."""
    x, y = np.asarray(got, want.dtype), want
    same = ((x == y) & (rest == 0)) | (np.isnan(x) & np.isnan(y)) | ((x == y) & np.isinf(x))
    finite = np.isfinite(x) & np.isfinite(y)
    return np.asarray(np.where(same, 0.0, np.where(finite, np.abs(x - y - rest) / sigma, np.inf)), np.float64)


@quiet
def accepts(level: str, off: Array) -> bool:
    """Whether errors in sigma are good enough; for "bounded" they are errors over det."""
    if not off.size:
        return True
    if level == "bounded":
        return bool(off.max() <= 1)
    rms, worst = LEVELS[level]
    return bool(off.max() <= worst and np.sqrt(np.square(off).mean()) <= rms)


class Errors(NamedTuple):
    """The predicted error of every element of an output and of the gradients; None where there is no such tensor."""

    out: Array
    lse: Array
    q: Array | None = None
    k: Array | None = None
    v: Array | None = None
    bias: Any = None
    sink: Array | None = None


class Rounding:
    """How errors add up: in quadrature (sigma) or one upon the other (det)."""

    def __init__(self, rigorous: bool, u: float, tiny: float) -> None:
        self.rigorous, self.tiny = rigorous, tiny
        self.unit = u if rigorous else ROUNDING_STD * u

    def add(self, *errors: Any) -> Any:
        if self.rigorous:
            return sum(np.abs(e) for e in errors)
        return functools.reduce(np.hypot, errors)

    def low(self, roundoff: float, x: Array, subnormal: float = 0.0) -> Any:
        """The rounding of x to a smaller format: roundoff relative, and half a spacing below its least normal number."""
        if not roundoff:
            return 0.0 * x
        if self.rigorous:
            return np.maximum(roundoff * (1 + 4 * roundoff) * np.abs(x), np.where(x == 0, 0.0, subnormal))
        return np.maximum(ROUNDING_STD * roundoff * np.abs(x), np.where(x == 0, 0.0, subnormal / math.sqrt(3)))

    def rounded_right(self, low: Precision, x: Array, y: Array) -> Any:
        """What rounding y to the format of the inputs adds to x @ y."""
        if not low.inputs:
            return 0.0
        error = self.through(np.abs(x), self.low(low.inputs, y, low.subnormal))
        # Where y is constant all its roundings are one: what this format makes of this very y is added.
        return error if self.rigorous else np.hypot(error, x @ (round_to(y, low.format) - y))

    def rounded_factors(self, low: Precision, x: Array, y: Array) -> Any:
        """What rounding x and y to the format of the inputs adds to x @ y."""
        if not low.inputs:
            return 0.0
        return self.add(self.through(self.low(low.inputs, x, low.subnormal), y), self.rounded_right(low, x, y))

    def through(self, error: Array, x: Array) -> Array:
        """The error of a matrix product whose left factor has this error."""
        if self.rigorous:
            return np.asarray(error @ np.abs(x))
        top, rows = _scaled(error)
        result: Array = top * np.sqrt(np.square(rows) @ np.square(x))
        return result

    def sum(self, error: Array, axis: Any) -> Array:
        """The error of a sum whose terms have these errors."""
        if self.rigorous:
            return np.asarray(error.sum(axis, keepdims=True))
        top, scaled = _scaled(error, axis)
        result: Array = top * np.sqrt(np.square(scaled).sum(axis, keepdims=True))
        return result

    def _chain(self, n: int, magnitude: Any, root: Any, total: Any) -> Any:
        """The rounding of a sum of n products, from the sum of their |.|, the root of that of their squares, and itself.

        In sequence each partial sum s_m is rounded. For n terms of mean mu and deviation sd, E sum_m s_m^2 is
        (n^2 / 2) sd^2 + (n^3 / 3) mu^2, taken for (n / 2) sum t^2 + (n / 3) (sum t)^2: up to 5/3 too large.
        """
        if self.rigorous:
            gamma = (n + 2) * self.unit / (1 - min((n + 2) * self.unit, 0.5))
            return gamma * magnitude + n * self.tiny
        return self.unit * np.hypot(math.sqrt(n / 2 + 1) * root, math.sqrt(n / 3) * total) + n * self.tiny

    def product(self, x: Array, y: Array) -> Array:
        """The rounding of the matrix product x @ y of exact factors."""
        magnitude = np.abs(x) @ np.abs(y) if self.rigorous else 0.0
        top, rows = _scaled(x)
        roots = top * np.sqrt(np.square(rows) @ np.square(y))
        result: Array = self._chain(x.shape[-1], magnitude, roots, x @ y)
        return result

    def rounding_of_sum(self, terms: Array, axis: Any) -> Array:
        """The rounding of a sum of exact terms."""
        n = math.prod(terms.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,)))
        top, scaled = _scaled(terms, axis)
        roots = top * np.sqrt(np.square(scaled).sum(axis, keepdims=True))
        sums = [f(terms).sum(axis, keepdims=True) for f in (np.abs, np.asarray)]
        result: Array = self._chain(n, sums[0], roots, sums[1])
        return result


def _scaled(x: Array, axis: Any = -1) -> tuple[Array, Array]:
    """The largest |x| along the axis, and x over it: the squares of weights below 1e-154 would underflow."""
    top = np.abs(x).max(axis, keepdims=True, initial=0.0)
    top = np.where(top == 0, 1.0, top)
    return top, x / top


@quiet
def predict(
    c: AttentionCache, out: Array, dout: Array | None = None, dlse: Array | None = None,
    grads: AttentionGrads | None = None, *, dtype: Any = None, precision: Precision | None = None, rigorous: bool = False,
) -> Errors:  # fmt: skip
    """sigma (or det) of each element for an implementation of this precision, or that computes in ``dtype``.

    c, out, grads : what the dense reference returned, in float64 or better
    """
    low = precision or of_dtype(dtype)
    kind = Rounding(rigorous, low.u, float(np.finfo(low.dtype).smallest_normal))
    unit, tiny = kind.unit, kind.tiny
    heads = c.q.shape[-3] if c.q.ndim > 2 else 1
    q, k, v = (_finite(each_head(x, heads, np.dtype(np.float64))) for x in (c.q, c.k, c.v))
    assert c.weights is not None  # the dense reference keeps them
    p, lse = np.asarray(c.weights, np.float64), np.asarray(c.lse, np.float64)
    o = np.asarray(out, np.float64)
    allowed, bias = visible(c)
    a, (L, S) = abs(float(c.scale)), p.shape[-2:]
    # det: exp and log are off by EXP_ULPS units in the last place, 2 u each; an online softmax in tiles of 64 keys or more
    # rescales its sums once a tile, by an exp and two roundings.
    exp = (2 if rigorous else 1) * EXP_ULPS * unit
    rescale = 2 * (max(S - 1, 0) // 64) * (exp + 2 * unit) if rigorous else 0.0

    # (1) to (3): eta, the error of a score
    s = a * (q @ swap(k))
    eta = kind.add(a * kind.product(q, swap(k)), 2 * unit * s, kind.low(low.scores, s))
    eta = kind.add(eta, a * kind.rounded_factors(low, q, swap(k)))
    slope: Any = 1.0
    t: Any = 0.0
    e_t: Any = 0.0
    if c.softcap is not None:
        t = np.tanh(math.copysign(1, c.scale) * s / c.softcap)
        slope = 1 - t * t
        e_t = kind.add(eta * slope / c.softcap, 4 * unit * t)
        eta = kind.add(c.softcap * e_t, kind.low(low.scores, c.softcap * t))
        s = c.softcap * t * math.copysign(1, c.scale)
    z = s * math.copysign(1, c.scale)
    if bias is not None:
        z = z + _finite(np.asarray(bias, np.float64))
        eta = kind.add(eta, unit * z, kind.low(low.scores, z))
    z, eta = select(allowed, z, -np.inf), select(allowed, eta)

    # (5): rho, the relative error of an exp after the shift by the top
    top = z.max(-1, keepdims=True, initial=-np.inf)
    p_sink: Any = 0.0
    if c.sink is not None:
        sink = heads_first(np.asarray(c.sink, np.float64), p.shape)
        top = np.maximum(top, sink)
        p_sink = select(sink != -np.inf, np.exp(sink - lse[..., None]))
    top = select(np.isfinite(top), top)
    below = select(p != 0, top - z)
    rho = kind.add(eta, unit * below, exp, rescale)
    rho_sink: Any = 0.0
    terms = p  # of z, over z
    if c.sink is not None:
        rho_sink = kind.add(unit * select(p_sink != 0, top - sink), exp, rescale)
        terms = np.concatenate([np.broadcast_to(p_sink, (*p.shape[:-1], 1)), p], -1)
    linear = rho
    if rigorous:
        rho = np.expm1(np.minimum(rho, 700.0))
    else:
        # exp of errors that are not small, as of large scores that are stored low: three deviations of its own and of that of
        # the sum, over three. Scores that are equal are rounded alike, so the latter is not taken in quadrature.
        both = 3 * np.hypot(rho, (p * rho).sum(-1, keepdims=True) + p_sink * rho_sink)
        rho = rho * np.where(both == 0, 1.0, np.expm1(np.minimum(both, 300.0)) / np.where(both == 0, 1.0, both))
        rho = np.minimum(rho, 1 / np.maximum(p, 1e-300))  # a weight is at most 1
    mean_rho = kind.add(kind.sum(p * rho, -1), p_sink * rho_sink)  # of the sum of exp ...
    of_z = kind.rounding_of_sum(terms, -1)  # ... and of its own summation
    total = kind.add(mean_rho, of_z, 4 * unit)
    left = np.maximum(1 - mean_rho, 2.0**-20) if rigorous else 1.0

    # (6), (7): the error of a weight multiplies the centred value, that of the sums the plain one
    drop = 1.0 if c.dropout is None else np.asarray(c.dropout.dense(), np.float64)
    w = p * drop
    hull = np.abs(v).max(-2, keepdims=True, initial=0.0)
    if rigorous:
        centre = v.mean(-2, keepdims=True) if S else np.zeros_like(hull)
        pulled = (w * rho) @ np.abs(v - centre) + (p * rho).sum(-1, keepdims=True) * np.abs(centre - o)
        pulled = pulled + ((np.abs(drop - 1) * p * rho) @ np.abs(centre + 0 * v) if c.dropout is not None else 0.0)
        pulled = np.minimum(pulled / left, (hull + np.abs(o)) * (np.max(drop, initial=1.0) + 1))
        pulled = pulled + p_sink * rho_sink * np.abs(o) / left
    else:
        squares = np.square(p * rho)
        spread = (squares * np.square(drop)) @ np.square(v) - 2 * o * ((squares * drop) @ v)
        spread = spread + np.square(o) * (squares.sum(-1, keepdims=True) + np.square(p_sink * rho_sink))
        pulled = np.sqrt(np.maximum(spread, 0.0))
    sums = kind.add(kind.product(w, v), of_z * o, 5 * unit * o)
    coarse = kind.add(kind.through(kind.low(low.weights, w, low.subnormal), v), kind.rounded_right(low, w, v))
    inside = kind.add(pulled, sums, coarse) + S * tiny * (1 + hull)
    e_out = kind.add(inside, kind.low(low.out, o, low.subnormal))
    log = (exp if rigorous else unit) * (lse[..., None] - top)
    of_sum = total if rigorous else kind.add(kind.sum(p * linear, -1), p_sink * rho_sink, of_z, 4 * unit)
    if low.inputs and not rigorous:  # the rounding of q is the same for all keys, and shifts their scores together
        shift = np.sqrt(np.square(kind.low(low.inputs, q, low.subnormal) * ((p * slope) @ k)).sum(-1, keepdims=True))
        of_sum = kind.add(of_sum, a * shift)
    e_lse = kind.add(of_sum, unit * lse[..., None], log, unit * top)[..., 0]
    if dout is None or grads is None:
        return Errors(_dead(c, e_out), _dead(c, e_lse[..., None])[..., 0])

    # backward, (7) and (6)
    do, dl = live(c, dout, dlse)
    do, dl = np.asarray(do, np.float64), np.asarray(dl, np.float64)
    pi = kind.add(rho, total, unit * select(lse[..., None] != -np.inf, lse[..., None])) / left  # an exp(s - lse) is as good
    pi = pi if rigorous else np.minimum(pi, 1 / np.maximum(p, 1e-300))
    dv = swap(w) @ do
    e_v = kind.add(kind.through(swap(w * pi), do), kind.product(swap(w), do))
    e_v = kind.add(e_v, kind.through(swap(kind.low(low.weights, w, low.subnormal)), do), kind.rounded_right(low, swap(w), do))
    dp = select(allowed, do @ swap(v)) * drop
    zeta = select(allowed, kind.add(kind.product(do, swap(v)), kind.rounded_factors(low, do, swap(v)))) * drop
    zeta = kind.add(zeta, kind.low(low.dweights, dp, low.subnormal))
    mean = (p * dp).sum(-1, keepdims=True)
    # exp(s - lse) does not sum to 1, and then dp counts that is not less its mean (sigma takes it that it does).
    unnormalized = kind.sum(p * pi, -1) * mean if rigorous else 0.0
    of_mean = kind.rounding_of_sum(p * dp, -1)
    by_weights = kind.add(kind.sum(p * pi * np.abs(dp - mean), -1), kind.sum(p * zeta, -1), of_mean, unnormalized)
    of_output = kind.add(kind.rounding_of_sum(do * o, -1), kind.sum(np.abs(do) * kind.low(low.delta_out, o, low.subnormal), -1))
    by_output = kind.add(kind.sum(np.abs(do) * inside, -1), of_output)
    delta = np.maximum(by_weights, by_output)
    # What of it is one number for all keys of a row: in sums over them it adds up, where sigma takes e_s for independent.
    common = 0.0 if rigorous else np.maximum(of_mean, kind.add(kind.sum(np.abs(do) * sums, -1), of_output))

    # (5): dscores, and with it bias (3), softcap (2), q and k (1)
    pull = dp - mean + dl
    ds = p * pull
    e_s = kind.add(
        p * pi * np.abs(pull), p * zeta, p * delta, DELTA_ROUNDING * unit * p * (np.abs(dp - mean) + np.abs(dl)),
        unit * ds,
    ) + tiny * (1 + np.abs(pull))  # fmt: skip
    e_s = select(allowed, e_s)
    e_bias = None
    if c.bias is not None:
        e_bias = _reduced(kind, ds, kind.add(e_s, kind.low(low.dscores, ds, low.subnormal)), p * common, grads.bias)
        if e_bias is not None:
            e_bias = kind.add(e_bias, kind.low(low.out, _f64(grads.bias), low.subnormal))
    e_sink = None
    if c.sink is not None:
        row = p_sink * (dl - mean)
        e_row = kind.add(row * kind.add(total, unit * lse[..., None], rho_sink), p_sink * delta, 3 * unit * row) + tiny
        axes = tuple(x for x in range(row.ndim) if x != row.ndim - 3)
        e_sink = kind.add(kind.sum(e_row, axes), kind.rounding_of_sum(row, axes)).reshape(c.sink.shape)
        e_sink = kind.add(e_sink, kind.low(low.out, _f64(grads.sink), low.subnormal))
    if c.softcap is not None:
        bend = 2 * np.abs(t) * kind.add(e_t, 4 * unit * t)
        e_s = kind.add(e_s * slope, ds * bend, 2 * unit * ds)
        ds = ds * slope
        e_s = select(allowed, e_s)
    e_s = kind.add(e_s, kind.low(low.dscores, ds, low.subnormal))
    e_q = a * kind.add(kind.through(e_s, k), kind.product(ds, k), common * ((p * slope) @ k), kind.rounded_right(low, ds, k))
    e_q = e_q + 2 * unit * np.abs(_f64(grads.q)) + S * tiny
    e_q = kind.add(e_q, kind.low(low.out, _f64(grads.q), low.subnormal))
    e_k = kind.add(kind.through(swap(e_s), q), kind.product(swap(ds), q), kind.rounded_right(low, swap(ds), q))
    e_k = _grouped(kind, a * e_k + L * tiny, a * (swap(ds) @ q), c.k.shape)
    e_k = kind.add(e_k, kind.low(low.out, _f64(grads.k), low.subnormal))
    e_v = _grouped(kind, e_v + tiny * (L + np.abs(do).sum(-2, keepdims=True)), dv, c.v.shape)
    e_v = kind.add(e_v, kind.low(low.out, _f64(grads.v), low.subnormal))
    return Errors(_dead(c, e_out), _dead(c, e_lse[..., None])[..., 0], e_q, e_k, e_v, e_bias, e_sink)


def _f64(x: Any) -> Array:
    return np.asarray(x, np.float64)


def _finite(x: Array) -> Array:
    """What is NaN or inf is either masked or makes the truth NaN; neither has a rounding error."""
    return select(np.isfinite(x), x)


def _dead(c: AttentionCache, error: Array) -> Array:
    """Rows without a key or sink are exact."""
    return select(np.asarray(c.lse)[..., None] != -np.inf, error)


def _grouped(kind: Rounding, error: Array, terms: Array, shape: tuple[int, ...]) -> Array:
    """The error of the sum over the heads that read one group."""
    if error.shape == shape:
        return np.asarray(kind.add(error, 2 * kind.unit * terms))
    split = (*shape[:-2], error.shape[-3] // shape[-3], *shape[-2:])
    error, terms = error.reshape(split), terms.reshape(split)
    both: Array = kind.add(kind.sum(error, -3), kind.rounding_of_sum(terms, -3))
    return both[..., 0, :, :]


def _reduced(kind: Rounding, terms: Array, error: Array, common: Array, like: Any) -> Any:
    """The error of a bias array's gradient: a sum over the axes along which it does not vary."""
    if not isinstance(like, np.ndarray):
        return None
    full = (1,) * (terms.ndim - like.ndim) + like.shape
    axes = tuple(x for x in range(terms.ndim) if full[x] == 1)
    of_rows: Any = 0.0
    if terms.ndim - 1 in axes:  # what is common to a row adds up along it, and is independent from row to row
        of_rows = kind.sum(common.sum(-1, keepdims=True), axes)
    return kind.add(kind.sum(error, axes), kind.rounding_of_sum(terms, axes), of_rows).reshape(like.shape)
