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


def cross_entropy_loops(logits, targets, mask=None, reduction="mean", dloss=None):
    """loss; with dloss the gradient logits. What lies where mask is False is not looked at."""
    logits, targets = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    V, losses, dlogits = logits.shape[-1], np.zeros(targets.shape), np.zeros(logits.shape)
    counted = [at for at in np.ndindex(*targets.shape) if mask is None or mask[at]]
    share = 1.0 / len(counted) if reduction == "mean" and counted else 1.0
    for at in counted:
        row, target = logits[at].tolist(), int(targets[at])
        p, _, lse = softmax_row(row)
        losses[at] = lse - row[target]
        if dloss is not None:
            upstream = float(dloss[at]) if reduction == "none" else float(dloss) * share
            for c in range(V):
                dlogits[at][c] = (p[c] - (1.0 if c == target else 0.0)) * upstream
    total = losses if reduction == "none" else np.array(add(losses[at] * share for at in counted))
    return {"loss": total, "logits": dlogits}


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


def linear_loops(x, w, b=None):
    """x @ w + b for x (n, M), w (M, N)."""
    x, w = np.asarray(x, dtype=np.float64), np.asarray(w, dtype=np.float64)
    y = np.zeros((x.shape[0], w.shape[1]))
    for i in range(x.shape[0]):
        for n in range(w.shape[1]):
            y[i, n] = dot(x[i].tolist(), w[:, n].tolist()) + (0.0 if b is None else float(b[n]))
    return y


def multi_head_loops(
    x_q, x_k, x_v, w_q, w_k, w_v, w_o, b_q=None, b_k=None, b_v=None, b_o=None, *, num_heads, num_kv_heads=None,
    allowed=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None,
):  # fmt: skip
    """Concat(head_1 .. head_h) W^O, head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V): out (..., L, M), lse (..., H, L).

    Head i has columns i D to (i + 1) D of w_q, its group has its own of w_k and w_v. Pair arrays are (..., H, L, S).
    """
    H = num_heads
    G = H if num_kv_heads is None else num_kv_heads
    D, E = np.shape(w_q)[1] // H, np.shape(w_v)[1] // G
    lead, L = np.shape(x_q)[:-2], np.shape(x_q)[-2]
    out, lse = np.zeros((*lead, L, np.shape(w_o)[1])), np.zeros((*lead, H, L))

    def part(b, i, size):
        return None if b is None else b[i * size : (i + 1) * size]

    for at in np.ndindex(*lead):
        concat = np.zeros((L, H * E))
        for i in range(H):
            g = i // (H // G)
            head = attention_loops(
                linear_loops(x_q[at], w_q[:, i * D : (i + 1) * D], part(b_q, i, D)),
                linear_loops(x_k[at], w_k[:, g * D : (g + 1) * D], part(b_k, g, D)),
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
