"""How far an honest implementation of attention may be from the truth, element by element: sigma and det.

    sigma    one standard deviation: each rounding has a standard deviation of 0.43 u, and independent errors add in quadrature
    det      a bound in any order of summation and any tiling: each rounding is at most u, and errors add up

Both follow every rounding through equations (1) to (7) of `npattn.ops.attention` and back. Each section of docs/error-model.md
is one function here, under the same heading and with the same notation; x (+) y adds errors (`Rounding.add`). All is computed
in float64 from the values of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.allowed import quiet, select, swap
from npattn.ops.calls import AttentionCache, AttentionGrads, visible, zero_dead_rows
from npattn.ops.checks import Array
from npattn.ops.heads import each_head, heads_first
from npattn.tolerances import DELTA_ROUNDING, EXP_ULPS
from npattn.verify.precision import Precision, of_dtype, round_to
from npattn.verify.rounding import Rounding


class Errors(NamedTuple):
    """The predicted error of every element of an output and of the gradients; None where there is no such tensor."""

    out: Array
    lse: Array
    q: Array | None = None
    k: Array | None = None
    v: Array | None = None
    bias: Any = None
    sink: Array | None = None


@quiet
def predict(
    c: AttentionCache, out: Array, dout: Array | None = None, dlse: Array | None = None,
    grads: AttentionGrads | None = None, *, dtype: Any = None, precision: Precision | None = None, rigorous: bool = False,
) -> Errors:  # fmt: skip
    """sigma (or det) of each element for an implementation of this precision, or that computes in ``dtype``.

    c, out, grads : what the dense reference returned, in float64 or better
    """
    x = _call(c, out, precision or of_dtype(dtype), rigorous)
    s = _scores(x)
    p = _softmax(x, s)
    o = _out(x, p)
    e_out, e_lse = _returned(x, o.error, x.o), _lse(x, s, p)
    alive = x.lse != -np.inf  # the other rows, without a key or sink, are exact
    forward = Errors(select(alive, e_out), select(alive, e_lse)[..., 0])
    if dout is None or grads is None:
        return forward
    b = _backward(x, *zero_dead_rows(c.lse, dout, dlse))
    pi, zeta = _weights(x, p), _dweights(x, b)
    mean = _mean(x, b, pi, zeta, o)
    ds = _dscores(x, b, pi, zeta, mean)
    products = _dproducts(x, s, ds)
    return forward._replace(
        q=_returned(x, _dq(x, s, p, products, mean, grads.q), grads.q),
        k=_returned(x, _dk(x, products), grads.k),
        v=_returned(x, _dv(x, b, pi), grads.v),
        bias=_returned(x, _dbias(x, ds, mean, grads.bias), grads.bias) if isinstance(grads.bias, np.ndarray) else None,
        sink=None if grads.sink is None else _returned(x, _dsink(x, p, b, mean, grads.sink), grads.sink),
    )


@dataclass(frozen=True)
class Call:
    """What the reference computed, in float64 and with a key/value head for each query head, and the precision class."""

    c: AttentionCache
    low: Precision
    rounding: Rounding
    q: Array
    k: Array
    v: Array
    allowed: Any  # (..., H, L, S), or None: all
    bias: Any
    p: Array  # (..., H, L, S), the weights
    drop: Any  # (..., H, L, S), the dropout mask, or 1.0
    w: Array  # p times drop
    o: Array
    lse: Array  # (..., H, L, 1)

    @property
    def a(self) -> float:
        """|scale|."""
        return abs(float(self.c.scale))

    @property
    def exp(self) -> float:
        """exp and log are off by EXP_ULPS units in the last place, of up to 2 u each."""
        return (2 if self.rounding.rigorous else 1) * EXP_ULPS * self.rounding.unit

    def stored(self, roundoff: float, x: Array) -> Any:
        """The error of storing x in the format of the class."""
        return self.rounding.low(roundoff, x, self.low.subnormal)

    def rounded_right(self, x: Array, y: Array) -> Any:
        """What rounding y to the format of the inputs adds to x @ y."""
        if not self.low.inputs:
            return 0.0
        error = self.rounding.through(np.abs(x), self.stored(self.low.inputs, y))
        # Roundings of equal numbers are equal, not independent: so the actual rounding of y is added.
        return error if self.rounding.rigorous else np.hypot(error, x @ (round_to(y, self.low.format) - y))

    def rounded_factors(self, x: Array, y: Array) -> Any:
        """What rounding x and y to the format of the inputs adds to x @ y."""
        if not self.low.inputs:
            return 0.0
        return self.rounding.add(self.rounding.through(self.stored(self.low.inputs, x), y), self.rounded_right(x, y))


def _call(c: AttentionCache, out: Array, low: Precision, rigorous: bool) -> Call:
    heads = c.q.shape[-3] if c.q.ndim > 2 else 1
    q, k, v = (_finite(each_head(x, heads, np.dtype(np.float64))) for x in (c.q, c.k, c.v))
    assert c.weights is not None  # the dense reference keeps them
    p = _f64(c.weights)
    allowed, bias = visible(c)
    drop = 1.0 if c.dropout is None else _f64(c.dropout.dense())
    rounding = Rounding(rigorous, low.u, float(np.finfo(low.dtype).smallest_normal))
    return Call(c, low, rounding, q, k, v, allowed, bias, p, drop, p * drop, _f64(out), _f64(c.lse)[..., None])


# --- forward: each function a section of docs/error-model.md ------------------------------------------------------------


class Scores(NamedTuple):
    """(1) to (3): the scores that go into the softmax, and the error of each."""

    z: Array  # -inf where not allowed
    eta: Array
    slope: Any = 1.0  # of the softcap: 1 - t^2
    slope_error: Any = 0.0  # the error of the slope


def _scores(x: Call) -> Scores:
    """(1) to (3): eta, the error of a score.

    eta = a chain(D; q k) (+) 2 unit s (+) low(s) (+) a rounded_factors(q, k^T)       s = scale q k^T
    e_t = eta slope / softcap (+) 4 unit t,  eta = softcap e_t (+) low(softcap t)     where there is a softcap
    eta = eta (+) unit z (+) low(z)                                                   where there is a bias
    """
    r, unit, scores, softcap = x.rounding, x.rounding.unit, x.low.scores, x.c.softcap
    z: Any = float(x.c.scale) * (x.q @ swap(x.k))
    eta = r.add(x.a * r.product(x.q, swap(x.k)), 2 * unit * z, r.low(scores, z), x.a * x.rounded_factors(x.q, swap(x.k)))
    slope: Any = 1.0
    slope_error: Any = 0.0
    if softcap is not None:
        t = np.tanh(z / softcap)
        slope = 1 - t * t
        e_t = r.add(eta * slope / softcap, 4 * unit * t)
        slope_error = 2 * np.abs(t) * r.add(e_t, 4 * unit * t)
        z = softcap * t
        eta = r.add(softcap * e_t, r.low(scores, z))
    if x.bias is not None:
        z = z + _finite(_f64(x.bias))
        eta = r.add(eta, unit * z, r.low(scores, z))
    return Scores(select(x.allowed, z, -np.inf), select(x.allowed, eta), slope, slope_error)


class Softmax(NamedTuple):
    """(5): relative errors of the exps, and of their sum."""

    rho: Array  # (..., H, L, S) of exp(z - top)
    linear: Array  # the same to first order
    p_sink: Array  # (..., H, L, 1), as the fields below
    rho_sink: Any
    top: Array
    of_z: Array  # the rounding of the sum of exp
    total: Array  # the error of that sum
    least_sum: Any  # a lower bound of the computed sum over the true one
    shift: Any  # the error that all weights of a row share beside a sink; 0 in det, where everything adds up


def _softmax(x: Call, s: Scores) -> Softmax:
    """(5): rho, the relative error of an exp, and total, that of their sum.

    rho   = eta (+) unit (top - z) (+) exp (+) rescale,  then `_of_exp`
    of_z  = chain(S; p and p_sink),   mean_rho = sum_j p_j rho_j (+) p_sink rho_sink
    total = mean_rho (+) of_z (+) 4 unit,   least_sum = 1 - mean_rho in det, 1 in sigma
    """
    r, unit, p, S = x.rounding, x.rounding.unit, x.p, x.p.shape[-1]
    sink = np.asarray(-np.inf) if x.c.sink is None else heads_first(_f64(x.c.sink), p.shape)
    top = np.maximum(s.z.max(-1, keepdims=True, initial=-np.inf), sink)
    top = select(np.isfinite(top), top)
    p_sink = select(sink != -np.inf, np.exp(sink - x.lse))
    # An online softmax in tiles of 64 keys or more rescales its sums once a tile, by an exp and two roundings.
    rescale = 2 * (max(S - 1, 0) // 64) * (x.exp + 2 * unit) if r.rigorous else 0.0
    rho_sink = r.add(unit * select(p_sink != 0, top - sink), x.exp, rescale)
    linear = r.add(s.eta, unit * select(p != 0, top - s.z), x.exp, rescale)
    rho = _of_exp(x, linear, (p * linear).sum(-1, keepdims=True) + p_sink * rho_sink)
    mean_rho = r.add(r.sum(p * rho, -1), p_sink * rho_sink)
    terms = p if x.c.sink is None else np.concatenate([np.broadcast_to(p_sink, (*p.shape[:-1], 1)), p], -1)
    of_z = r.rounding_of_sum(terms, -1)
    least_sum = np.maximum(1 - mean_rho, 2.0**-20) if r.rigorous else 1.0
    shift = 0.0 if r.rigorous or x.c.sink is None else _shift(x, s, p_sink)
    return Softmax(rho, linear, p_sink, rho_sink, top, of_z, r.add(mean_rho, of_z, 4 * unit), least_sum, shift)


def _shift(x: Call, s: Scores, p_sink: Array) -> Array:
    """(5): shift, the error that all weights of a row share beside a sink.

    shift = p_sink a (sum_d (unit q_d mean_d)^2)^(1/2),   mean_d = sum_j p_j slope_j k_jd / sum_j p_j         sigma
    The rounding of a q_d is the same for all keys. Without a sink it cancels, as any shift of all scores does.
    """
    total = x.p.sum(-1, keepdims=True)
    mean = ((x.p / np.where(total == 0, 1.0, total)) * s.slope) @ x.k
    return np.asarray(p_sink * x.a * np.sqrt(np.square(x.rounding.unit * x.q * mean).sum(-1, keepdims=True)))


def _of_exp(x: Call, rho: Array, common: Array) -> Array:
    """(5): rho where it is not small.

    rho <- expm1(rho)                                                       det
    rho <- rho expm1(both) / both,  both = 3 (rho (+) common),  rho <= 1 / p    sigma; common = sum_j p_j rho_j
    """
    if x.rounding.rigorous:
        return np.asarray(np.expm1(np.minimum(rho, 700.0)))
    both = 3 * np.hypot(rho, common)
    return _at_most_one(x.p, rho * np.where(both == 0, 1.0, np.expm1(np.minimum(both, 300.0)) / np.where(both == 0, 1.0, both)))


class Out(NamedTuple):
    """(6), (7): the error of the output, before it is rounded to the format in which it is stored."""

    error: Array
    sums: Array  # the part of the error that comes from the rounding of sums


def _out(x: Call, p: Softmax) -> Out:
    """(6), (7): e_out, the error of the output.

    e_out = centred (+) shift o (+) sums (+) through(low(w), v) (+) rounded_right(w, v),  and S tiny (1 + hull)
    sums  = chain(S; w v) (+) of_z o (+) 5 unit o                 w = p dropout_mask, hull = max_j |v_j|
    """
    r, low = x.rounding, x.low
    hull = np.abs(x.v).max(-2, keepdims=True, initial=0.0)
    centred = _bound_of_centred(x, p, hull) if r.rigorous else _sigma_of_centred(x, p)
    sums = r.add(r.product(x.w, x.v), p.of_z * x.o, 5 * r.unit * x.o)
    coarse = r.add(r.through(x.stored(low.weights, x.w), x.v), x.rounded_right(x.w, x.v))
    return Out(r.add(centred, p.shift * x.o, sums, coarse) + x.p.shape[-1] * r.tiny * (1 + hull), sums)


def _sigma_of_centred(x: Call, p: Softmax) -> Array:
    """(6), (7): sigma of the centred sum.

    (sum_j (p_j rho_j)^2 (v_j - o)^2 + (p_sink rho_sink o)^2)^(1/2), multiplied out, where v_j is dropout_mask_j v_j.
    w and o are in units of about the largest w_j of the row. Beside a sink, or a key that dropout takes, all of them may be
    below 1e-154, where squares underflow.
    """
    top = np.maximum(x.w.max(-1, keepdims=True, initial=0.0), np.finfo(x.w.dtype).smallest_normal)
    unit = np.exp2(np.floor(np.log2(top)))  # so that to divide by it rounds nothing
    weights, kept, o = x.p * p.rho, x.w / unit * p.rho, x.o / unit
    others = np.square(weights).sum(-1, keepdims=True) + np.square(p.p_sink * p.rho_sink)
    spread = np.square(kept) @ np.square(x.v) - 2 * o * ((weights * kept) @ x.v) + np.square(o) * others
    return np.asarray(unit * np.sqrt(np.maximum(spread, 0.0)))


def _bound_of_centred(x: Call, p: Softmax, hull: Array) -> Array:
    """(6), (7): det of the centred sum.

    sum_j w_j rho_j |v_j - centre| + sum_j p_j rho_j |centre - o| + sum_j p_j rho_j |dropout_mask_j - 1| |centre|,
    over least_sum, at most (hull + |o|) (1 + max dropout_mask);  and p_sink rho_sink |o| / least_sum
                                                                                           centre = the mean of the v_j
    """
    o, v = x.o, x.v
    centre = v.mean(-2, keepdims=True) if v.shape[-2] else np.zeros_like(hull)
    moved = (x.w * p.rho) @ np.abs(v - centre) + (x.p * p.rho).sum(-1, keepdims=True) * np.abs(centre - o)
    if x.c.dropout is not None:
        moved = moved + (np.abs(x.drop - 1) * x.p * p.rho) @ np.abs(centre + 0 * v)
    moved = np.minimum(moved / p.least_sum, (hull + np.abs(o)) * (np.max(x.drop, initial=1.0) + 1))
    return np.asarray(moved + p.p_sink * p.rho_sink * np.abs(o) / p.least_sum)


def _lse(x: Call, s: Scores, p: Softmax) -> Array:
    """(5): e_lse, the error of lse.

    e_lse = total (+) unit lse (+) log (lse - top) (+) unit top
    sigma: total with `linear` for rho, and (+) shift = a (sum_d (low(q_d) sum_j p_j slope_j k_jd)^2)^(1/2)
    """
    r, unit = x.rounding, x.rounding.unit
    log = (x.exp if r.rigorous else unit) * (x.lse - p.top)
    total: Any = p.total
    if not r.rigorous:
        total = r.add(r.sum(x.p * p.linear, -1), p.p_sink * p.rho_sink, p.of_z, 4 * unit)
        if x.low.inputs:
            shift = np.square(x.stored(x.low.inputs, x.q) * ((x.p * s.slope) @ x.k)).sum(-1, keepdims=True)
            total = r.add(total, x.a * np.sqrt(shift))
    return np.asarray(r.add(total, unit * x.lse, log, unit * p.top))


# --- backward, from (7) to (1) ------------------------------------------------------------------------------------------


class Backward(NamedTuple):
    """What the backward of the reference computes from (7) to (5), in float64."""

    do: Array
    dl: Array  # (..., H, L, 1), or 0
    dp: Array  # (..., H, L, S)
    mean: Array  # (..., H, L, 1), sum_j p_j dp_j


def _backward(x: Call, dout: Array, dlse: Any) -> Backward:
    do = _f64(dout)
    dp = select(x.allowed, do @ swap(x.v)) * x.drop
    return Backward(do, _f64(dlse), dp, (x.p * dp).sum(-1, keepdims=True))


def _weights(x: Call, p: Softmax) -> Array:
    """(7): pi, the relative error of a weight in the backward.

    pi = (rho (+) total (+) unit lse) / least_sum,   in sigma pi <= 1 / p            also of a weight that is exp(s - lse)
    """
    pi = x.rounding.add(p.rho, p.total, x.rounding.unit * select(x.lse != -np.inf, x.lse)) / p.least_sum
    return np.asarray(pi if x.rounding.rigorous else _at_most_one(x.p, pi))


def _dv(x: Call, b: Backward, pi: Array) -> Array:
    """(7): e_v, the error of dv.

    e_v = through((w pi)^T, dout) (+) chain(L; w^T dout) (+) through(low(w)^T, dout) (+) rounded_right(w^T, dout),
          and tiny (L + sum_i |dout_i|);  then groups
    """
    r, w, do = x.rounding, x.w, b.do
    error = r.add(
        r.through(swap(w * pi), do), r.product(swap(w), do),
        r.through(swap(x.stored(x.low.weights, w)), do), x.rounded_right(swap(w), do),
    )  # fmt: skip
    error = error + r.tiny * (do.shape[-2] + np.abs(do).sum(-2, keepdims=True))
    return _group_sum(r, error, swap(w) @ do, x.c.v.shape)


def _dweights(x: Call, b: Backward) -> Array:
    """(7), (6): zeta, the error of dp.

    zeta = (chain(E; dout v) (+) rounded_factors(dout, v^T)) dropout_mask (+) low(dp)
    """
    r, vt = x.rounding, swap(x.v)
    zeta = select(x.allowed, r.add(r.product(b.do, vt), x.rounded_factors(b.do, vt))) * x.drop
    return np.asarray(r.add(zeta, x.stored(x.low.dweights, b.dp)))


class Mean(NamedTuple):
    """(5): the error of sum_j p_j dp_j, often called Delta."""

    delta: Array  # (..., H, L, 1)
    common: Any  # the part that is the same for all keys of a row, so that it adds up; 0 in det, where everything adds up


def _mean(x: Call, b: Backward, pi: Array, zeta: Array, o: Out) -> Mean:
    """(5): delta, the error of mean = sum_j p_j dp_j.

    by_weights = sum_j p_j pi_j |dp_j - mean| (+) sum_j p_j zeta_j (+) chain(S; p dp)        from sum_j p_j dp_j
    by_output  = sum_e |dout_e| e_out_e (+) chain(E; dout o) (+) sum_e |dout_e| low(o_e)     from dout . out
    delta      = the larger one;  in det by_weights also has mean sum_j p_j pi_j, since exp(s - lse) does not sum to 1
    """
    r, p, do, dp, mean = x.rounding, x.p, b.do, b.dp, b.mean
    unnormalized = r.sum(p * pi, -1) * mean if r.rigorous else 0.0
    of_mean = r.rounding_of_sum(p * dp, -1)
    by_weights = r.add(r.sum(p * pi * np.abs(dp - mean), -1), r.sum(p * zeta, -1), of_mean, unnormalized)
    of_output = r.add(r.rounding_of_sum(do * x.o, -1), r.sum(np.abs(do) * x.stored(x.low.delta_out, x.o), -1))
    by_output = r.add(r.sum(np.abs(do) * o.error, -1), of_output)
    common = 0.0 if r.rigorous else np.maximum(of_mean, r.add(r.sum(np.abs(do) * o.sums, -1), of_output))
    return Mean(np.maximum(by_weights, by_output), common)


class Dscores(NamedTuple):
    """dscores as the reference computes them, and the error of each."""

    value: Array
    error: Array


def _dscores(x: Call, b: Backward, pi: Array, zeta: Array, mean: Mean) -> Dscores:
    """(5): e_s, the error of dscores.

    e_s = p pi |pull| (+) p zeta (+) p delta (+) 3 unit p (|dp - mean| + |dl|) (+) unit ds,  and tiny (1 + |pull|)
    """
    r, p, pull = x.rounding, x.p, b.dp - b.mean + b.dl
    ds = p * pull
    steps = DELTA_ROUNDING * r.unit * p * (np.abs(b.dp - b.mean) + np.abs(b.dl))
    error = r.add(p * pi * np.abs(pull), p * zeta, p * mean.delta, steps, r.unit * ds) + r.tiny * (1 + np.abs(pull))
    return Dscores(ds, select(x.allowed, error))


def _dsink(x: Call, p: Softmax, b: Backward, mean: Mean, dsink: Array) -> Array:
    """(5): e_sink, the error of dsink.

    e_sink = sum of (row (total (+) unit lse (+) rho_sink) (+) p_sink delta (+) 3 unit row,  and tiny)  (+) chain(row)
    """
    r, row = x.rounding, p.p_sink * (b.dl - b.mean)
    share = select(row != 0, row * r.add(p.total, r.unit * x.lse, p.rho_sink))  # lse of a row without anything is -inf
    error = r.add(share, p.p_sink * mean.delta, 3 * r.unit * row) + r.tiny
    axes = tuple(a for a in range(row.ndim) if a != row.ndim - 3)
    result: Array = r.add(r.sum(error, axes), r.rounding_of_sum(row, axes)).reshape(dsink.shape)
    return result


def _dbias(x: Call, ds: Dscores, mean: Mean, dbias: Array) -> Array:
    """(3): e_bias, the error of dbias.

    e_bias = sum of (e_s (+) low(ds)) (+) chain(ds) (+) common sum_j p_j        over the axes along which the bias does not vary
    """
    r, scores = x.rounding, ds.value
    full = (1,) * (scores.ndim - dbias.ndim) + dbias.shape
    axes = tuple(a for a in range(scores.ndim) if full[a] == 1)
    error = r.add(ds.error, x.stored(x.low.dscores, scores))
    of_rows: Any = 0.0
    if scores.ndim - 1 in axes:  # `common` adds up along a row, and is independent from row to row
        of_rows = r.sum((x.p * mean.common).sum(-1, keepdims=True), axes)
    result: Array = r.add(r.sum(error, axes), r.rounding_of_sum(scores, axes), of_rows).reshape(dbias.shape)
    return result


def _dproducts(x: Call, s: Scores, ds: Dscores) -> Dscores:
    """(2): e_s before the products with q and k.

    e_s = e_s (slope + slope_error) (+) ds slope_error (+) 2 unit ds,  slope_error = 2 |t| (e_t (+) 4 unit t)    with a softcap
    e_s = e_s (+) low(ds)

    Beside a sink ds and the slope may both be smaller than a unit: then the product of their errors is all that there is.
    """
    r, (value, error) = x.rounding, ds
    if x.c.softcap is not None:
        error = select(x.allowed, r.add(error * (s.slope + s.slope_error), value * s.slope_error, 2 * r.unit * value))
        value = value * s.slope
    return Dscores(value, r.add(error, x.stored(x.low.dscores, value)))


def _dq(x: Call, s: Scores, p: Softmax, ds: Dscores, mean: Mean, dq: Array) -> Array:
    """(1): e_q, the error of dq.

    e_q = a (through(e_s, k) (+) chain(S; ds k) (+) common sum_j p_j slope_j k_j (+) rounded_right(ds, k)),
          and shift |dq| + 2 unit |dq| + S tiny
    """
    r, k = x.rounding, x.k
    common = mean.common * ((x.p * s.slope) @ k)
    error = x.a * r.add(r.through(ds.error, k), r.product(ds.value, k), common, x.rounded_right(ds.value, k))
    return np.asarray(error + (p.shift + 2 * r.unit) * np.abs(_f64(dq)) + x.p.shape[-1] * r.tiny)


def _dk(x: Call, ds: Dscores) -> Array:
    """(1): e_k, the error of dk.

    e_k = a (through(e_s^T, q) (+) chain(L; ds^T q) (+) rounded_right(ds^T, q)),  and L tiny;  then groups
    """
    r, q, value = x.rounding, x.q, swap(ds.value)
    error = r.add(r.through(swap(ds.error), q), r.product(value, q), x.rounded_right(value, q))
    return _group_sum(r, x.a * error + x.p.shape[-2] * r.tiny, x.a * (value @ q), x.c.k.shape)


# --- what several of them need -------------------------------------------------------------------------------------------


def _f64(x: Any) -> Array:
    return np.asarray(x, np.float64)


def _finite(x: Array) -> Array:
    """0 in place of NaN and inf: they are masked, or make the truth NaN. Neither has a rounding error."""
    return select(np.isfinite(x), x)


def _at_most_one(p: Array, relative: Array) -> Array:
    """The relative error of a weight is at most 1 / p, since the weight is at most 1."""
    return np.minimum(relative, 1 / np.maximum(p, 1e-300))


def _returned(x: Call, error: Array, value: Any) -> Array:
    """The error of a result, together with that of storing it in the format in which it is returned."""
    return np.asarray(x.rounding.add(error, x.stored(x.low.out, _f64(value))))


def _group_sum(r: Rounding, error: Array, terms: Array, shape: tuple[int, ...]) -> Array:
    """The error of the sum over the heads that read one group."""
    if error.shape == shape:
        return np.asarray(r.add(error, 2 * r.unit * terms))
    split = (*shape[:-2], error.shape[-3] // shape[-3], *shape[-2:])
    error, terms = error.reshape(split), terms.reshape(split)
    both: Array = r.add(r.sum(error, -3), r.rounding_of_sum(terms, -3))
    return both[..., 0, :, :]
