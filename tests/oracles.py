"""What the package must compute, written a second time: explicit loops over scalars, sharing no code with it.

Nothing here is fast, and nothing is clever. Arrays over pairs (allowed, bias, dropout_mask) have their full shape
(..., H, L, S); a pair that is not allowed is skipped, so that what lies there reaches nothing. Results are dicts of
float64 arrays. The softmax backward is the whole Jacobian, dp_j / ds_l = p_j (delta_jl - p_l). ``attention_mpmath``
goes further: it has 50 digits, does not shift its exponentials, and differentiates its forward numerically.
"""

from __future__ import annotations

import functools
import math
import pickle

import mpmath
import numpy as np

INF, NAN = math.inf, math.nan
DIGITS = 50


def add(terms):
    """The sum, rounded once; inf - inf is NaN and not an error."""
    terms = list(terms)
    try:
        return math.fsum(terms)
    except (ValueError, OverflowError):
        return sum(terms)


def dot(a, b):
    return add(x * y for x, y in zip(a, b, strict=True))


def largest(values):
    """The maximum, NaN where one of them is NaN, -inf of nothing."""
    return NAN if any(x != x for x in values) else max(values, default=-INF)


def lists(*shape):
    """Nested lists of that shape with an empty list of terms in each place."""
    return [] if not shape else [lists(*shape[1:]) for _ in range(shape[0])]


def sums(terms, *shape):
    """The sums of such lists of terms, as an array of that shape."""
    result = np.zeros(shape)
    for at in np.ndindex(*shape):
        cell = terms
        for i in at:
            cell = cell[i]
        result[at] = add(cell)
    return result


def softmax_row(scores, sink=None):
    """Weights of the scores of one row, weight of its sink, and lse; no score at all has lse -inf."""
    logits = scores if sink is None else [*scores, sink]
    top = largest(logits)
    if top == -INF:
        return [0.0] * len(scores), 0.0, -INF
    e = [math.exp(s - top) for s in logits]
    total = add(e)
    p = [x / total for x in e]
    return p[: len(scores)], p[len(scores)] if sink is not None else 0.0, top + math.log(total)


def jacobian_product(p, dp):
    """ds_l = sum_j dp_j p_j (delta_jl - p_l)."""
    size = range(len(p))
    return [add(dp[j] * p[j] * ((1.0 if j == l else 0.0) - p[l]) for j in size) for l in size]


def remembered(function):
    """The same call again, as another implementation makes it, has the same result; loops are slow."""
    last = {}

    @functools.wraps(function)
    def call(*args, **kwargs):
        key = pickle.dumps((args, kwargs))
        if key not in last:
            if len(last) > 50:
                last.clear()
            last[key] = function(*args, **kwargs)
        return {name: x if x is None else x.copy() for name, x in last[key].items()}

    return call


@remembered
def attention_loops(
    q, k, v, *, allowed=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, dout=None, dlse=None
):
    """out, weights, lse; with dout also the gradients q, k, v, bias (..., H, L, S), sink (None without one), scale."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    one_head = q.ndim == 2
    full = (*q.shape[:-1], k.shape[-2])
    pairs = [None if x is None else np.asarray(x) for x in (allowed, bias, dropout_mask)]
    assert all(x is None or x.shape == full for x in pairs), "arrays over pairs have their full shape here"
    if one_head:
        q, k, v = q[None], k[None], v[None]
        pairs = [None if x is None else x[None] for x in pairs]
    allowed, bias, dropout_mask = pairs
    lead, (H, L, D), (G, S, E) = q.shape[:-3], q.shape[-3:], v.shape[-3:]
    scale = (1.0 / math.sqrt(D) if D else 1.0) if scale is None else float(scale)
    dout = None if dout is None else np.asarray(dout, dtype=np.float64).reshape(*lead, H, L, E)
    dlse = np.zeros((*lead, H, L)) if dlse is None else np.asarray(dlse, dtype=np.float64).reshape(*lead, H, L)

    out, weights, lse = np.zeros((*lead, H, L, E)), np.zeros((*lead, H, L, S)), np.zeros((*lead, H, L))
    grads = {"q": np.zeros(q.shape), "k": np.zeros(k.shape), "v": np.zeros(v.shape), "bias": np.zeros(weights.shape)}
    sink_terms, scale_terms = lists(H), []
    for at in np.ndindex(*lead):
        k_terms, v_terms = lists(G, S, D), lists(G, S, E)
        for h in range(H):
            g = h // (H // G)
            Q, K, V = q[at][h].tolist(), k[at][g].tolist(), v[at][g].tolist()
            for i in range(L):
                seen, scores, slopes, raw = [], [], [], []
                for j in range(S):
                    if allowed is not None and not allowed[at][h, i, j]:
                        continue
                    if bias is not None and bias[at][h, i, j] == -INF:
                        continue
                    raw.append(dot(Q[i], K[j]))
                    s, slope = scale * raw[-1], 1.0
                    if softcap is not None:
                        t = math.tanh(s / softcap)
                        s, slope = softcap * t, 1.0 - t * t
                    if bias is not None:
                        s += float(bias[at][h, i, j])
                    seen.append(j)
                    scores.append(s)
                    slopes.append(slope)
                p, p_sink, row_lse = softmax_row(scores, None if sink is None else float(sink[h]))
                drop = [1.0 if dropout_mask is None else float(dropout_mask[at][h, i, j]) for j in seen]
                lse[at][h, i] = row_lse
                for j, x in zip(seen, p, strict=True):
                    weights[at][h, i, j] = x
                for e in range(E):
                    out[at][h, i, e] = add(p[n] * drop[n] * V[j][e] for n, j in enumerate(seen))
                if dout is None or row_lse == -INF:
                    continue
                dO, dl = dout[at][h, i].tolist(), float(dlse[at][h, i])
                dp = [dot(dO, V[j]) * drop[n] for n, j in enumerate(seen)]
                ds = [x + dl * y for x, y in zip(jacobian_product(p, dp), p, strict=True)]
                sink_terms[h] += [p_sink * dl, *(-dp[n] * p[n] * p_sink for n in range(len(seen)))]
                q_terms = lists(D)
                for n, j in enumerate(seen):
                    grads["bias"][at][h, i, j] = ds[n]
                    dr = ds[n] * slopes[n]
                    scale_terms.append(dr * raw[n])
                    for d in range(D):
                        q_terms[d].append(scale * dr * K[j][d])
                        k_terms[g][j][d].append(scale * dr * Q[i][d])
                    for e in range(E):
                        v_terms[g][j][e].append(p[n] * drop[n] * dO[e])
                grads["q"][at][h, i] = sums(q_terms, D)
        grads["k"][at], grads["v"][at] = sums(k_terms, G, S, D), sums(v_terms, G, S, E)
    results = {"out": out, "weights": weights, "lse": lse} | (grads if dout is not None else {})
    if one_head:
        results = {name: x[0] for name, x in results.items()}
    if dout is not None:
        results["sink"] = None if sink is None else sums(sink_terms, H)
        results["scale"] = np.array(add(scale_terms))
    return results


# --- 50 digits -------------------------------------------------------------------------------------------------------


def to_mp(x):
    """The number, exactly: a longdouble is the sum of two floats."""
    if isinstance(x, (complex, np.complexfloating)):
        return mpmath.mpc(to_mp(x.real), to_mp(x.imag))
    high = float(x)
    return mpmath.mpf(high) + (mpmath.mpf(float(x - type(x)(high))) if math.isfinite(high) else 0)


def from_mp(x, dtype):
    """An array of numbers of mpmath in a dtype of NumPy, correctly rounded."""
    dtype = np.dtype(dtype)
    if dtype.kind == "c":
        real = np.empty(0, dtype).real.dtype
        return from_mp(np.vectorize(mpmath.re, otypes=[object])(x), real) + dtype.type(1j) * from_mp(
            np.vectorize(mpmath.im, otypes=[object])(x), real
        )
    return np.array([dtype.type(mpmath.nstr(y, DIGITS)) for y in np.ravel(x)], dtype).reshape(np.shape(x))


def attention_mpmath(
    q, k, v, *, allowed=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, dout=None, dlse=None
):
    """`attention_loops` for one head, (L, D), (S, D), (S, E), to 50 digits, also for complex inputs.

    The gradients are numeric derivatives of the forward along each element (mpmath.diff raises the precision for them).
    The default scale is the Python float D ** -0.5, which has 16 digits.
    """
    with mpmath.workdps(DIGITS):
        return _attention_mpmath(q, k, v, allowed, bias, scale, softcap, sink, dropout_mask, dout, dlse)


def _attention_mpmath(q, k, v, allowed, bias, scale, softcap, sink, dropout_mask, dout, dlse):
    (L, D), (S, E) = q.shape, v.shape
    x = {
        name: np.vectorize(to_mp, otypes=[object])(a)
        for name, a in {"q": q, "k": k, "v": v, "bias": bias, "sink": sink}.items()
        if a is not None
    }
    x["scale"] = np.array([to_mp(D**-0.5 if scale is None else scale)], object)
    see = [
        [j for j in range(S) if (allowed is None or allowed[i, j]) and (bias is None or bias[i, j] != -INF)]
        for i in range(L)
    ]

    def forward():
        out, weights, lse = (np.full(shape, mpmath.mpf(0), object) for shape in ((L, E), (L, S), (L,)))
        for i in range(L):
            e = {}
            for j in see[i]:
                s = x["scale"][0] * sum((x["q"][i, d] * x["k"][j, d] for d in range(D)), mpmath.mpf(0))
                if softcap is not None:
                    s = softcap * mpmath.tanh(s / softcap)
                e[j] = mpmath.exp(s + (x["bias"][i, j] if bias is not None else 0))
            total = sum(e.values(), mpmath.mpf(0) if sink is None else mpmath.exp(x["sink"][0]))
            lse[i] = mpmath.log(total) if total != 0 else -mpmath.inf
            for j in e:
                weights[i, j] = e[j] / total
                for c in range(E):
                    out[i, c] += (
                        weights[i, j] * (1 if dropout_mask is None else to_mp(dropout_mask[i, j])) * x["v"][j, c]
                    )
        return {"out": out, "weights": weights, "lse": lse}

    results = forward()
    if dout is None:
        return results

    def objective():
        y = forward()
        terms = [to_mp(dout[i, c]) * y["out"][i, c] for i in range(L) for c in range(E)]
        if dlse is not None:
            terms += [to_mp(dlse[i]) * y["lse"][i] for i in range(L) if y["lse"][i] != -mpmath.inf]
        return sum(terms, mpmath.mpf(0))

    for name, a in x.items():
        results[name] = np.full(a.shape, mpmath.mpf(0), object)
        for at in np.ndindex(*a.shape):
            old = a[at]
            if old == -mpmath.inf:
                continue

            def along(t, a=a, at=at):
                a[at] = t
                return objective()

            results[name][at] = mpmath.diff(along, old)
            a[at] = old
    results["scale"] = results["scale"][0]
    return results


# --- softmax and cross-entropy ---------------------------------------------------------------------------------------


def softmax_loops(scores, allowed=None, dweights=None, dlse=None):
    """weights and lse over the last axis, and the gradient scores of sum(dweights * weights) + sum(dlse * lse)."""
    scores = np.asarray(scores, dtype=np.float64)
    weights, lse, dscores = np.zeros(scores.shape), np.zeros(scores.shape[:-1]), np.zeros(scores.shape)
    for at in np.ndindex(*scores.shape[:-1]):
        seen = [j for j in range(scores.shape[-1]) if allowed is None or allowed[at][j]]
        p, _, lse[at] = softmax_row([float(scores[at][j]) for j in seen])
        dp = [0.0 if dweights is None else float(dweights[at][j]) for j in seen]
        dl = 0.0 if dlse is None or not seen else float(dlse[at])
        ds = jacobian_product(p, dp)
        for n, j in enumerate(seen):
            weights[at][j] = p[n]
            dscores[at][j] = ds[n] + dl * p[n]
    return {"weights": weights, "lse": lse, "scores": dscores}


def silu_loops(x, dy):
    """x s with s = 1 / (1 + exp(-x)), and the gradient x of sum(dy * y): dy (s + x s t), where t = 1 - s."""
    y, dx = np.zeros(np.shape(x)), np.zeros(np.shape(x))
    for at in np.ndindex(*np.shape(x)):
        value, up = float(np.asarray(x)[at]), float(np.asarray(dy)[at])
        s, t = (0.0 if z > 700 else 1 / (1 + math.exp(z)) for z in (-value, value))
        y[at] = value * s if s else 0.0
        dx[at] = up * (s + value * s * t if s and t else s)
    return {"y": y, "x": dx}


def sigmoid_loops(x, dy):
    """1 / (1 + exp(-x)), and the gradient x of sum(dy * y): dy s t, where t = 1 - s."""
    y, dx = np.zeros(np.shape(x)), np.zeros(np.shape(x))
    for at in np.ndindex(*np.shape(x)):
        value, up = float(np.asarray(x)[at]), float(np.asarray(dy)[at])
        s, t = (0.0 if z > 700 else 1 / (1 + math.exp(z)) for z in (-value, value))
        y[at], dx[at] = s, up * s * t
    return {"y": y, "x": dx}


def frequency_loops(width, base, scaling=None):
    """The angle of each pair at position 1, in mpmath: base^(-2i / width). scaling : as `npattn.Rotary` has it

    Llama 3: with lambda = 2 pi / f the wavelength, f / factor for lambda > length / low, f for lambda < length / high, and
    between them (1 - s) f / factor + s f with s = (length / lambda - low) / (high - low).
    """
    found = []
    with mpmath.workdps(40):
        for i in range(width // 2):
            f = mpmath.mpf(base) ** (mpmath.mpf(-2 * i) / width)
            if hasattr(scaling, "original_length"):
                low, high, n = (mpmath.mpf(x) for x in (scaling.low_freq_factor, scaling.high_freq_factor,
                                                        scaling.original_length))  # fmt: skip
                wave = 2 * mpmath.pi / f
                if wave > n / low:
                    f = f / scaling.factor
                elif wave >= n / high:
                    s = (n / wave - low) / (high - low)
                    f = (1 - s) * f / scaling.factor + s * f
            elif scaling is not None:
                f = f / scaling.factor
            found.append(f)
    return found


def turn(position, frequency):
    """exp(i p f)"""
    with mpmath.workdps(40):
        return complex(mpmath.expj(position * frequency))


def rotary_loops(x, positions, dy, *, layout, width=None, base=10000.0, scaling=None):
    """y, and the gradient x of sum(dy * y): each pair as one complex number, times exp(i p f) or exp(-i p f)."""
    D = x.shape[-1]
    R = D if width is None else width
    f, y, dx = frequency_loops(R, base, scaling), np.array(x, np.float64), np.array(dy, np.float64)
    turns = {p: [turn(p, each) for each in f] for p in set(np.asarray(positions).ravel().tolist())}
    for at in np.ndindex(*x.shape[:-1]):
        row = at[-1:] if positions.ndim == 1 else (*at[:-2], at[-1])
        for i in range(R // 2):
            a, b = (i, i + R // 2) if layout == "half" else (2 * i, 2 * i + 1)
            forwards = turns[int(positions[row])][i]
            for out, z, w in ((y, x, forwards), (dx, dy, forwards.conjugate())):
                turned = complex(z[(*at, a)], z[(*at, b)]) * w
                out[(*at, a)], out[(*at, b)] = turned.real, turned.imag
    return {"y": y, "x": dx}
@np.errstate(invalid="ignore")  # a dead token may be inf
def norm_loops(x, g, b, eps, dy, centred=True):
    """y of layer norm, or without ``centred`` of RMS norm; and the gradients x, g, b of sum(dy * y), term by term.

    With v_m = c_m^2 / M summed and r = (v + eps)^(-1/2): dn_m / dx_l = r (delta_ml - a) - r^3 c_m c_l / M, a = 1 / M or 0.
    """
    x, dy = np.asarray(x, np.longdouble), np.asarray(dy, np.longdouble)
    M = x.shape[-1]
    g, b = (np.full(M, z, np.longdouble) if p is None else np.asarray(p, np.longdouble) for z, p in ((1, g), (0, b)))
    y, dx, dg, db = np.zeros(x.shape, x.dtype), np.zeros(x.shape, x.dtype), np.zeros(M, x.dtype), np.zeros(M, x.dtype)
    for at in np.ndindex(*x.shape[:-1]):
        mean = sum(x[at]) / M if centred else np.longdouble(0)
        c = [x[at][m] - mean for m in range(M)]
        r = 1 / np.sqrt(sum(z * z for z in c) / M + np.longdouble(eps))
        for m in range(M):
            y[at][m] = c[m] * r * g[m] + b[m]
        if not any(dy[at]):
            continue
        for m in range(M):
            dg[m] += dy[at][m] * c[m] * r
            db[m] += dy[at][m]
            for k in range(M):
                slope = r * ((m == k) - (1 / np.longdouble(M) if centred else 0)) - r**3 * c[m] * c[k] / M
                dx[at][k] += dy[at][m] * g[m] * slope
    return {"y": y, "x": dx, "g": dg, "b": db}
def gelu_loops(x, dy, approximate="none"):
    """x Phi(x), or its approximation by tanh, and the gradient x of sum(dy * y), all with 50 digits and rounded once."""
    y, dx = np.zeros(np.shape(x)), np.zeros(np.shape(x))
    with mpmath.workdps(DIGITS):
        for at in np.ndindex(*np.shape(x)):
            v, up = mpmath.mpf(float(np.asarray(x)[at])), mpmath.mpf(float(np.asarray(dy)[at]))
            if not mpmath.isfinite(v):
                y[at], dx[at] = (float(v), float(up * (v > 0))) if v != -INF else (0.0, 0.0)
                dx[at] = NAN if mpmath.isnan(v) and up else dx[at]
                continue
            if approximate == "tanh":
                a, b = mpmath.sqrt(2 / mpmath.pi), mpmath.mpf("0.044715")
                cdf = 1 / (1 + mpmath.exp(-2 * a * (v + b * v**3)))
                slope = 2 * cdf * (1 - cdf) * a * (1 + 3 * b * v**2)
            else:
                cdf = mpmath.erfc(-v / mpmath.sqrt(2)) / 2
                slope = mpmath.exp(-(v**2) / 2) / mpmath.sqrt(2 * mpmath.pi)
            y[at], dx[at] = float(v * cdf), float(up * (cdf + v * slope))
    return {"y": y, "x": dx}


def relu_loops(x, dy, power=1):
    """max(x, 0)^power, NaN of NaN, and the gradient x of sum(dy * y). A dead element has no gradient, whatever x is."""
    y, dx = np.zeros(np.shape(x)), np.zeros(np.shape(x))
    for at in np.ndindex(*np.shape(x)):
        value, up = float(np.asarray(x)[at]), float(np.asarray(dy)[at])
        if value > 0:
            y[at] = value**power
            dx[at] = power * value ** (power - 1) * up if up else 0.0
        elif value != value:
            y[at], dx[at] = NAN, NAN if up else 0.0
    return {"y": y, "x": dx}


def cross_entropy_loops(logits, targets, mask=None, reduction="mean", dloss=None, label_smoothing=0.0, z_loss=0.0):
    """loss; with dloss the gradient logits. What lies where mask is False, or its dloss is 0, is not looked at.

    At each position the share 1 - s of -log p goes to the target, and s / V to every class; a share of 0 costs nothing.
    """
    logits, targets = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    V, losses, dlogits = logits.shape[-1], np.zeros(targets.shape), np.zeros(logits.shape)
    counted = [at for at in np.ndindex(*targets.shape) if mask is None or mask[at]]
    share = 1.0 / len(counted) if reduction == "mean" and counted else 1.0
    for at in counted:
        row, target = logits[at].tolist(), int(targets[at])
        top = largest(row)
        below = [value - top for value in row]  # NaN where all are -inf
        p, _, log_z = softmax_row(below)
        lse = top + log_z
        q = [label_smoothing / V + (1 - label_smoothing if c == target else 0.0) for c in range(V)]
        terms = [q[c] * (log_z - below[c]) for c in range(V) if q[c] != 0]
        losses[at] = add([*terms, z_loss * lse * lse] if z_loss else terms)
        if dloss is not None:
            upstream = float(dloss[at]) if reduction == "none" else float(dloss) * share
            for c in range(V if upstream != 0 else 0):
                dlse = 1 + (2 * z_loss * lse if z_loss else 0)
                dlogits[at][c] = (p[c] * dlse - q[c]) * upstream
    total = losses if reduction == "none" else np.array(add(losses[at] * share for at in counted))
    return {"loss": total, "logits": dlogits}


# --- dropout ---------------------------------------------------------------------------------------------------------


def dropout_loops(x, mask, dy):
    """y, and the gradient x of sum(dy * y). What is dropped is not looked at."""
    y, dx = np.zeros(np.shape(x)), np.zeros(np.shape(x))
    for at in np.ndindex(*np.shape(x)):
        if float(mask[at]) != 0:
            y[at], dx[at] = float(x[at]) * float(mask[at]), float(dy[at]) * float(mask[at])
    return {"y": y, "x": dx}


def dropout_bits(p, seed, step, layer, batch, head, row, column):
    """Whether a pair is dropped, by whole numbers of Python."""

    def absorb(state, n):
        x = (state + (n + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    state = 0
    for n in (seed, step, layer, batch, head, row, column // 2):
        state = absorb(state, n)
    return (state >> 32 if column % 2 else state % 2**32) < round(p * 2**32)


# --- layers ----------------------------------------------------------------------------------------------------------


def rnn_loops(x, h0, w_x, w_h, b=None, lengths=None, nonlinearity="tanh", dh=None, dh_last=None):
    """h (B, T, N), h_last (B, N); with dh or dh_last also the gradients x, h0, w_x, w_h, b (h0, b also if None).

    h_t = f(x_t W_x + h_{t-1} W_h + b) for t < length; later outputs are 0, and h_last is the last state that there was.
    """
    x, w_x, w_h = (np.asarray(a, dtype=np.float64) for a in (x, w_x, w_h))
    (B, T, M), N = x.shape, w_h.shape[0]
    start = np.zeros((B, N)) if h0 is None else np.asarray(h0, dtype=np.float64)
    offset = [0.0] * N if b is None else [float(y) for y in b]
    h, h_last = np.zeros((B, T, N)), np.zeros((B, N))
    back = dh is not None or dh_last is not None
    dx, dh0 = np.zeros(x.shape), np.zeros((B, N))
    x_terms, h_terms, b_terms = lists(M, N), lists(N, N), lists(N)
    for s in range(B):
        steps = T if lengths is None else int(lengths[s])
        states = [start[s].tolist()]
        for t in range(steps):
            state = []
            for n in range(N):
                a = add(
                    [
                        *(float(x[s, t, m]) * float(w_x[m, n]) for m in range(M)),
                        *(states[t][m] * float(w_h[m, n]) for m in range(N)),
                        offset[n],
                    ]
                )
                state.append(math.tanh(a) if nonlinearity == "tanh" else 0.0 if a <= 0 else a)
            states.append(state)
            h[s, t] = state
        h_last[s] = states[-1]
        if not back:
            continue
        g = [0.0 if dh_last is None else float(dh_last[s, n]) for n in range(N)]  # what reaches the state after step t
        for t in reversed(range(steps)):
            total = [g[n] + (0.0 if dh is None else float(dh[s, t, n])) for n in range(N)]
            y = states[t + 1]
            slope = [1.0 - z * z if nonlinearity == "tanh" else z if z != z else float(z > 0) for z in y]
            da = [total[n] * slope[n] for n in range(N)]
            for n in range(N):
                b_terms[n].append(da[n])
                for m in range(M):
                    x_terms[m][n].append(float(x[s, t, m]) * da[n])
                for m in range(N):
                    h_terms[m][n].append(states[t][m] * da[n])
            dx[s, t] = [dot(da, w_x[m].tolist()) for m in range(M)]
            g = [dot(da, w_h[m].tolist()) for m in range(N)]
        dh0[s] = g
    results = {"h": h, "h_last": h_last}
    if back:
        results |= {"x": dx, "h0": dh0}
        results |= {"w_x": sums(x_terms, M, N), "w_h": sums(h_terms, N, N), "b": sums(b_terms, N)}
    return results


def logistic_of(p):
    return 1.0 / (1.0 + math.exp(-p)) if p >= 0 else math.exp(p) / (1.0 + math.exp(p))


class Cells:
    """What the loops of gru and lstm sum up: terms of the gradients of w_x (M, gates N), w_h (N, gates N) and of biases."""

    def __init__(self, x, w_x, w_h, biases, gates):
        self.x, self.w_x, self.w_h = (np.asarray(a, dtype=np.float64) for a in (x, w_x, w_h))
        (self.B, self.T, self.M), self.N, self.gates = self.x.shape, self.w_h.shape[0], gates
        width = gates * self.N
        self.biases = [[0.0] * width if b is None else [float(y) for y in b] for b in biases]
        self.h, self.dx = np.zeros((self.B, self.T, self.N)), np.zeros(self.x.shape)
        self.x_terms, self.h_terms = lists(self.M, width), lists(self.N, width)
        self.b_terms = [lists(width) for _ in biases]

    def first(self, state):
        return np.zeros((self.B, self.N)) if state is None else np.asarray(state, dtype=np.float64)

    def steps(self, lengths, s):
        return self.T if lengths is None else int(lengths[s])

    def from_x(self, s, t, column):
        return [float(self.x[s, t, m]) * float(self.w_x[m, column]) for m in range(self.M)]

    def from_h(self, h, column):
        return [h[m] * float(self.w_h[m, column]) for m in range(self.N)]

    def back_to_x(self, s, t, d):
        """d by column: the gradient of x_t w_x."""
        for m in range(self.M):
            self.dx[s, t, m] = dot(d, self.w_x[m].tolist())
            for column, y in enumerate(d):
                self.x_terms[m][column].append(float(self.x[s, t, m]) * y)

    def results(self, names):
        width = self.gates * self.N
        found = {"x": self.dx, "w_x": sums(self.x_terms, self.M, width), "w_h": sums(self.h_terms, self.N, width)}
        return found | {name: sums(terms, width) for name, terms in zip(names, self.b_terms, strict=True)}


def gru_loops(x, h0, w_x, w_h, b_x=None, b_h=None, lengths=None, reset_after=True, dh=None, dh_last=None):
    """h (B, T, N), h_last (B, N); with dh or dh_last also the gradients x, h0, w_x, w_h, b_x, b_h (all of them, always).

    Columns are r, z, n. h' = (1 - z) n + z h with n = tanh(a + r (h W + b)), or n = tanh(a + (r h) W + b).
    """
    c = Cells(x, w_x, w_h, (b_x, b_h), 3)
    start, N, (bx, bh) = c.first(h0), c.N, c.biases
    h_last, dh0 = np.zeros((c.B, N)), np.zeros((c.B, N))
    for s in range(c.B):
        states, seen = [start[s].tolist()], []
        for t in range(c.steps(lengths, s)):
            h = states[-1]
            r, z = ([logistic_of(add([*c.from_x(s, t, k), bx[k], *c.from_h(h, k), bh[k]])) for k in range(g * N, g * N + N)]
                    for g in (0, 1))  # fmt: skip
            read = h if reset_after else [r[m] * h[m] for m in range(N)]
            inner = [add([*c.from_h(read, k), bh[k]]) for k in range(2 * N, 3 * N)]
            fresh = [math.tanh(add([*c.from_x(s, t, 2 * N + i), bx[2 * N + i], (r[i] if reset_after else 1.0) * inner[i]]))
                     for i in range(N)]  # fmt: skip
            states.append([(1.0 - z[i]) * fresh[i] + z[i] * h[i] for i in range(N)])
            c.h[s, t] = states[-1]
            seen.append((r, z, fresh, read, inner))
        h_last[s] = states[-1]
        g = [0.0 if dh_last is None else float(dh_last[s, i]) for i in range(N)]
        for t in reversed(range(len(seen))):
            (r, z, fresh, read, inner), h = seen[t], states[t]
            d = [g[i] + (0.0 if dh is None else float(dh[s, t, i])) for i in range(N)]
            d_n = [d[i] * (1.0 - z[i]) * (1.0 - fresh[i] ** 2) for i in range(N)]
            d_z = [d[i] * (h[i] - fresh[i]) * z[i] * (1.0 - z[i]) for i in range(N)]
            d_inner = [d_n[i] * r[i] for i in range(N)] if reset_after else d_n
            d_read = [dot(d_inner, c.w_h[m, 2 * N :].tolist()) for m in range(N)]
            times = inner if reset_after else h
            d_r = [(d_n[i] if reset_after else d_read[i]) * times[i] * r[i] * (1.0 - r[i]) for i in range(N)]
            c.back_to_x(s, t, [*d_r, *d_z, *d_n])
            g = []
            for m in range(N):
                for column, y in enumerate([*d_r, *d_z, *d_inner]):
                    c.h_terms[m][column].append((h if column < 2 * N else read)[m] * y)
                through = d_read[m] if reset_after else d_read[m] * r[m]
                g.append(add([d[m] * z[m], dot([*d_r, *d_z], c.w_h[m, : 2 * N].tolist()), through]))
            for terms, given in zip(c.b_terms, ([*d_r, *d_z, *d_n], [*d_r, *d_z, *d_inner]), strict=True):
                for column, y in enumerate(given):
                    terms[column].append(y)
        dh0[s] = g
    return {"h": c.h, "h_last": h_last, "h0": dh0, **c.results(("b_x", "b_h"))}


def lstm_loops(x, h0, c0, w_x, w_h, b=None, lengths=None, dh=None, dh_last=None, dc_last=None):
    """h (B, T, N), h_last and c_last (B, N), and the gradients x, h0, c0, w_x, w_h, b (all of them, always).

    Columns are i, f, g, o. c' = f c + i g, h' = o tanh(c').
    """
    c = Cells(x, w_x, w_h, (b,), 4)
    start_h, start_c, N, (bias,) = c.first(h0), c.first(c0), c.N, c.biases
    lasts, firsts = (np.zeros((2, c.B, N)) for _ in range(2))
    for s in range(c.B):
        hs, cells, seen = [start_h[s].tolist()], [start_c[s].tolist()], []
        for t in range(c.steps(lengths, s)):
            p = [add([*c.from_x(s, t, k), bias[k], *c.from_h(hs[-1], k)]) for k in range(4 * N)]
            gates = [math.tanh(y) if 2 * N <= k < 3 * N else logistic_of(y) for k, y in enumerate(p)]
            i, f, g, o = (gates[k * N : (k + 1) * N] for k in range(4))
            cells.append([f[n] * cells[-1][n] + i[n] * g[n] for n in range(N)])
            hs.append([o[n] * math.tanh(cells[-1][n]) for n in range(N)])
            c.h[s, t] = hs[-1]
            seen.append((i, f, g, o))
        lasts[:, s] = hs[-1], cells[-1]
        to_h, to_c = ([0.0 if d is None else float(d[s, n]) for n in range(N)] for d in (dh_last, dc_last))
        for t in reversed(range(len(seen))):
            i, f, g, o = seen[t]
            d = [to_h[n] + (0.0 if dh is None else float(dh[s, t, n])) for n in range(N)]
            shown = [math.tanh(y) for y in cells[t + 1]]
            d_c = [to_c[n] + d[n] * o[n] * (1.0 - shown[n] ** 2) for n in range(N)]
            d_p = [d_c[n] * g[n] * i[n] * (1.0 - i[n]) for n in range(N)]
            d_p += [d_c[n] * cells[t][n] * f[n] * (1.0 - f[n]) for n in range(N)]
            d_p += [d_c[n] * i[n] * (1.0 - g[n] ** 2) for n in range(N)]
            d_p += [d[n] * shown[n] * o[n] * (1.0 - o[n]) for n in range(N)]
            c.back_to_x(s, t, d_p)
            for column, y in enumerate(d_p):
                c.b_terms[0][column].append(y)
                for m in range(N):
                    c.h_terms[m][column].append(hs[t][m] * y)
            to_h = [dot(d_p, c.w_h[m].tolist()) for m in range(N)]
            to_c = [d_c[n] * f[n] for n in range(N)]
        firsts[:, s] = to_h, to_c
    return {"h": c.h, "h_last": lasts[0], "c_last": lasts[1], "h0": firsts[0], "c0": firsts[1], **c.results(("b",))}


def linear_loops(x, w, b=None):
    """x @ w + b for x (n, M), w (M, N)."""
    x, w = np.asarray(x, dtype=np.float64), np.asarray(w, dtype=np.float64)
    y = np.zeros((x.shape[0], w.shape[1]))
    for i in range(x.shape[0]):
        for n in range(w.shape[1]):
            y[i, n] = dot(x[i].tolist(), w[:, n].tolist()) + (0.0 if b is None else float(b[n]))
    return y


def linear_layer_loops(x, w, b, dy):
    """y = x w + b for x (..., M), and the gradients x, w, b of sum(dy * y). A token whose dy or x is 0 adds nothing to w."""
    x, w, dy = (np.asarray(a, dtype=np.float64) for a in (x, w, dy))
    (M, N), y, dx = w.shape, np.zeros(dy.shape), np.zeros(x.shape)
    w_terms, b_terms = lists(M, N), lists(N)
    for at in np.ndindex(*x.shape[:-1]):
        y[at] = linear_loops(x[at][None], w, b)[0]
        for m in range(M):
            dx[(*at, m)] = dot(dy[at].tolist(), w[m].tolist())
        for n in range(N):
            b_terms[n].append(float(dy[at][n]))
            for m in range(M):
                if x[at].any() and dy[at].any():
                    w_terms[m][n].append(float(x[at][m]) * float(dy[at][n]))
    return {"y": y, "x": dx, "w": sums(w_terms, M, N), "b": sums(b_terms, N)}


ACTIVATED = {  # name -> f and f' of a number
    "gelu": (
        lambda z: z * 0.5 * math.erfc(-z / math.sqrt(2)),
        lambda z: 0.5 * math.erfc(-z / math.sqrt(2)) + z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi),
    ),
    "gelu_tanh": (
        lambda z: z * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        lambda z: 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        + z * 0.5 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
        / math.cosh(min(math.sqrt(2 / math.pi) * abs(z + 0.044715 * z**3), 300.0)) ** 2,
    ),
    "relu": (lambda z: z if z > 0 or z != z else 0.0, lambda z: z if z != z else float(z > 0)),
    "squared_relu": (lambda z: z * z if z > 0 or z != z else 0.0, lambda z: 2 * z if z > 0 or z != z else 0.0),
    "silu": (lambda z: z * logistic(z), lambda z: logistic(z) * (1 + z * logistic(-z))),
    "sigmoid": (lambda z: logistic(z), lambda z: logistic(z) * logistic(-z)),
}  # fmt: skip


def logistic(z):
    return 0.0 if z < -700 else 1 / (1 + math.exp(-z))


def feed_forward_loops(x, w_in, w_out, b_in=None, b_out=None, w_gate=None, b_gate=None, dy=None, activation="gelu"):
    """y = f(x w_in + b_in) w_out + b_out, or (f(x w_gate + b_gate) * (x w_in + b_in)) w_out + b_out; with dy all gradients."""
    f, slope = ACTIVATED[activation]
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    F, result = np.shape(w_in)[1], {}
    a = linear_layer_loops(x, w_in, b_in, np.zeros((*x.shape[:-1], F)))["y"]
    u = a if w_gate is None else linear_layer_loops(x, w_gate, b_gate, np.zeros(a.shape))["y"]
    h, da, du = np.zeros(a.shape), np.zeros(a.shape), np.zeros(a.shape)
    for at in np.ndindex(*a.shape):
        h[at] = f(float(u[at])) * (1.0 if w_gate is None else float(a[at]))
    out = linear_layer_loops(h, w_out, b_out, dy)
    for at in np.ndindex(*a.shape):
        dh = float(out["x"][at])
        if dh != 0:
            da[at] = dh * f(float(u[at])) if w_gate is not None else dh * slope(float(u[at]))
            du[at] = dh * slope(float(u[at])) * float(a[at])
    first = linear_layer_loops(x, w_in, b_in, da)
    result = {"y": out["y"], "x": first["x"], "w_in": first["w"], "w_out": out["w"]}
    if w_gate is not None:
        second = linear_layer_loops(x, w_gate, b_gate, du)
        result |= {"x": first["x"] + second["x"], "w_gate": second["w"]}
        result |= {} if b_gate is None else {"b_gate": second["b"]}
    return result | {n: g["b"] for n, g, b in (("b_in", first, b_in), ("b_out", out, b_out)) if b is not None}


def embedding_loops(ids, table, dy=None):
    """y (..., M); with dy the gradient table: each row gets the dy of all places that hold its number."""
    table = np.asarray(table, dtype=np.float64)
    (V, M), y = table.shape, np.zeros((*np.shape(ids), table.shape[1]))
    terms = lists(V, M)
    for at in np.ndindex(*np.shape(ids)):
        row = int(np.asarray(ids)[at])
        y[at] = table[row]
        for m in range(M if dy is not None else 0):
            terms[row][m].append(float(dy[at][m]))
    return {"y": y} if dy is None else {"y": y, "table": sums(terms, V, M)}


def multi_head_loops(
    x_q, x_k, x_v, w_q, w_k, w_v, w_o, b_q=None, b_k=None, b_v=None, b_o=None, q_norm=None, k_norm=None, *,
    num_heads, num_kv_heads=None, allowed=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None,
    rotary=None, q_pos=None, k_pos=None, norm_eps=1e-6,
):  # fmt: skip
    """Concat(head_1 .. head_h) W^O, head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V): out (..., L, M), lse (..., H, L).

    Head i has columns i D to (i + 1) D of w_q, its group has its own of w_k and w_v. Pair arrays are (..., H, L, S).
    Each row of q and k of each head is normed, then turned by its position. rotary : the options of `rotary_loops`
    """
    H = num_heads
    G = H if num_kv_heads is None else num_kv_heads
    D, E = np.shape(w_q)[1] // H, np.shape(w_v)[1] // G
    lead, L = np.shape(x_q)[:-2], np.shape(x_q)[-2]
    out, lse = np.zeros((*lead, L, np.shape(w_o)[1])), np.zeros((*lead, H, L))

    def part(b, i, size):
        return None if b is None else b[i * size : (i + 1) * size]

    def placed(x, norm, positions, at):
        for row in range(len(x)) if norm is not None else ():
            size = math.sqrt(add(float(y) ** 2 for y in x[row]) / D + norm_eps)
            for c in range(D):
                x[row][c] = x[row][c] / size * (1.0 if norm.g is None else float(norm.g[c]))
        if rotary is None:
            return x
        row = np.arange(len(x)) if positions is None else row_of(positions, at)
        return rotary_loops(np.asarray(x), row, np.asarray(x), **rotary)["y"]

    for at in np.ndindex(*lead):
        concat = np.zeros((L, H * E))
        for i in range(H):
            g = i // (H // G)
            head = attention_loops(
                placed(linear_loops(x_q[at], w_q[:, i * D : (i + 1) * D], part(b_q, i, D)), q_norm, q_pos, at),
                placed(linear_loops(x_k[at], w_k[:, g * D : (g + 1) * D], part(b_k, g, D)), k_norm, k_pos, at),
                linear_loops(x_v[at], w_v[:, g * E : (g + 1) * E], part(b_v, g, E)),
                allowed=None if allowed is None else allowed[at][i],
                bias=None if bias is None else bias[at][i],
                scale=scale,
                softcap=softcap,
                sink=None if sink is None else sink[i : i + 1],
                dropout_mask=None if dropout_mask is None else dropout_mask[at][i],
            )
            concat[:, i * E : (i + 1) * E], lse[at][i] = head["out"], head["lse"]
        out[at] = linear_loops(concat, w_o, b_o)
    return {"out": out, "lse": lse}


# --- masks -----------------------------------------------------------------------------------------------------------


def alibi_loops(slopes, shape, align):
    """A dense bias of shape (..., H, L, S): -slope |q_pos - k_pos|, pair by pair."""
    result = np.zeros(shape)
    for at in np.ndindex(*shape):
        h, i, j = at[-3] if len(shape) > 2 else 0, at[-2], at[-1]
        result[at] = -float(slopes[h]) * abs(i + (shape[-1] - shape[-2] if align == "bottom_right" else 0) - j)
    return result


def mask_loops(kind, shape, **options):
    """A dense boolean mask of shape (..., H, L, S), pair by pair. ``kind`` is the name of the package's mask.

    causal, window (left, right): q_pos, k_pos, align, offset;  key_lengths, query_lengths: n;  keys: allowed;
    segments: q_ids, k_ids;  packed: cu_q, cu_k, align;  blocks: array, size;  where: function(i, j) of two Python ints
    """
    result = np.zeros(shape, dtype=bool)
    for at in np.ndindex(*shape):
        sequence, head = tuple(at[:-3]), at[-3:-2]
        result[at] = _PAIRS[kind](sequence, head, at[-2], at[-1], shape[-2], shape[-1], **options)
    return result


def row_of(x, sequence):
    """The row of one sequence in x, which has one row for all or one a sequence."""
    x = np.asarray(x)
    return x if x.ndim == 1 else x[sequence]


def number_of(x, sequence):
    """The number of one sequence in x, which is one for all or one a sequence."""
    x = np.asarray(x)
    return int(x if x.ndim == 0 else x[sequence])


def position_loops(sequence, i, j, L, S, q_pos=None, k_pos=None, align=None, offset=None):
    """Where query i and key j of a sequence stand."""
    at_q = i if q_pos is None else int(row_of(q_pos, sequence)[i])
    at_k = j if k_pos is None else int(row_of(k_pos, sequence)[j])
    if align == "bottom_right":
        at_q += S - L
    if offset is not None:
        at_q += number_of(offset, sequence)
    return at_q, at_k


def _causal(sequence, head, i, j, L, S, **positions):
    at_q, at_k = position_loops(sequence, i, j, L, S, **positions)
    return at_k <= at_q


def _window(sequence, head, i, j, L, S, left, right, **positions):
    at_q, at_k = position_loops(sequence, i, j, L, S, **positions)
    if left is not None and at_q - at_k > left:
        return False
    return right is None or at_k - at_q <= right


def _key_lengths(sequence, head, i, j, L, S, n):
    return j < number_of(n, sequence)


def _query_lengths(sequence, head, i, j, L, S, n):
    return i < number_of(n, sequence)


def _keys(sequence, head, i, j, L, S, allowed):
    return bool(row_of(allowed, sequence)[j])


def _segments(sequence, head, i, j, L, S, q_ids, k_ids):
    return int(row_of(q_ids, sequence)[i]) == int(row_of(k_ids, sequence)[j])


def _packed(sequence, head, i, j, L, S, cu_q, cu_k, align=None):
    for n in range(len(cu_q) - 1):
        if cu_q[n] <= i < cu_q[n + 1]:
            if not cu_k[n] <= j < cu_k[n + 1]:
                return False
            at_q, at_k = i - cu_q[n], j - cu_k[n]
            if align == "bottom_right":  # the last query stands at the last key
                at_q += (cu_k[n + 1] - cu_k[n]) - (cu_q[n + 1] - cu_q[n])
            return align is None or at_k <= at_q
    raise AssertionError("cu_q ends before L")


def _blocks(sequence, head, i, j, L, S, array, size):
    rows, cols = size if isinstance(size, tuple) else (size, size)
    array = np.asarray(array)
    lead = () if array.ndim == 2 else (*sequence, *head)
    lead = tuple(0 if n == 1 else at for at, n in zip(lead, array.shape, strict=False))
    return bool(array[lead][i // rows, j // cols])


def _where(sequence, head, i, j, L, S, function):
    return bool(function(i, j))


_PAIRS = {
    "causal": _causal,
    "window": _window,
    "key_lengths": _key_lengths,
    "query_lengths": _query_lengths,
    "keys": _keys,
    "segments": _segments,
    "packed": _packed,
    "blocks": _blocks,
    "where": _where,
}
