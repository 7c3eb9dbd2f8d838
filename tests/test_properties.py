"""Hypothesis draws options and shapes: the same claims as the grid, the algebra of attention, and of its masks."""

from __future__ import annotations

from functools import partial

import numpy as np
from helpers import IMPLEMENTATIONS, blockwise_of
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from test_grid import check, leaves_two_keys

import npattn
from npattn import (
    attention,
    blockwise_backward,
    causal,
    key_lengths,
    merge,
    packed,
    segments,
    window,
)
from npattn.ops.pairs import FULL, PARTIAL
from npattn.ops.tiles import Sizes
from npattn.tolerances import TERMS_EPS
from npattn.verify.ops.attention.draw import OPTIONS, SMALL, compatible, draw, parts_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
implementations = st.sampled_from(sorted(IMPLEMENTATIONS))


@st.composite
def option_sets(draw_, most=6, without=()):
    """Options that can stand in one call, by name."""
    known = [n for n in sorted(OPTIONS) if OPTIONS[n].feature not in without]
    names = draw_(st.lists(st.sampled_from(known), unique=True, max_size=most))
    chosen: list[str] = []
    for name in names:
        if all(compatible(name, other) for other in chosen):
            chosen.append(name)
    return tuple(sorted(chosen))


@st.composite
def sizes(draw_):
    """Every letter of its own; H is G or a multiple of it."""
    G = draw_(st.integers(1, 3))
    size = st.integers(2, 9)
    return {"H": G, "G": G, "L": draw_(size), "S": draw_(size), "D": draw_(size), "E": draw_(size)}


def close(got, expected, size, name=""):
    """To TERMS_EPS eps of ``size``, which bounds the sum of |terms| of an element; NaN and inf in the same places."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{name}: {got.shape}, expected {expected.shape}"
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(got - expected))
    assert error.max(initial=0.0) <= TERMS_EPS * EPS * size, f"{name}: {error.max():.3g} beside a size of {size:.3g}"


def run(problem, implementation="dense", **changes):
    """out, lse and gradients of a problem. implementation : a name, or a forward of blockwise"""
    forward, backward = IMPLEMENTATIONS.get(implementation, (implementation, blockwise_backward))
    arguments = {**problem.arguments, **changes}
    (out, lse), cache = forward(problem.q, problem.k, problem.v, **arguments, return_lse=True)
    return out, lse, backward(problem.dout, cache, problem.dlse)


def size_of(problem):
    """A bound of the sums of |terms| of out, lse and every gradient: norms multiplied up."""
    top = [float(np.abs(x).max(initial=0.0)) for x in (problem.q, problem.k, problem.v, problem.dout)]
    q, k, v, dout = (max(1.0, x) for x in top)
    D, E = problem.q.shape[-1], problem.v.shape[-1]
    dlse = 0.0 if problem.dlse is None else float(np.abs(problem.dlse).max(initial=0.0))
    ds = 4 * (E * dout * v + dlse) * (1 + D * q * k)
    return ds * max(problem.shape[-2:]) * max(q, k) * problem.shape[-2] * 6


@settings(max_examples=settings.default.max_examples // 5)  # each takes 0.25 s, and test_grid has its own, marked slow
@given(option_sets(), seeds)
def test_gradients_of_any_options(options, seed):
    assume(leaves_two_keys(options, seed))
    event(f"{len(options)} options")
    check(options, seed, elements=4, central=seed % 8 == 0)


@given(option_sets(), seeds, sizes(), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.booleans())
def test_tiles_of_every_size_are_dense(options, seed, letters, tile, together):
    """One head at a time, or as many as fill a tile."""
    problem = draw_or_reject(options, seed, letters)
    few = {"few_rows": 1, "few_features": 1, "bundle": 1 << 30, "tasks": 1} if together else {}
    got = run(problem, partial(blockwise_of, Sizes(tile=tile, **few)))
    expected = run(problem)
    size = size_of(problem)
    close(got[0], expected[0], size, "out")
    close(got[1], expected[1], size, "lse")
    for name, g, e in zip(expected[2]._fields, got[2], expected[2], strict=True):
        if e is not None:
            close(getattr(g, "parameter", g), getattr(e, "parameter", e), size, name)


def draw_or_reject(options, seed, letters=SMALL):
    assume(leaves_two_keys(options, seed, letters))
    return draw(options, seed, sizes=letters)


@given(seeds, sizes(), implementations)
def test_permuting_the_keys_changes_nothing(seed, letters, implementation):
    options = ("mask array", "bias BHLS", "dropout_mask", "sink")
    problem, moved = draw_or_reject(options, seed, letters), draw_or_reject(options, seed, letters)
    order = np.random.default_rng(seed).permutation(letters["S"])
    moved.k, moved.v = moved.k[..., order, :], moved.v[..., order, :]
    parts_of(moved)[0].mask = parts_of(moved)[0].mask[..., order]
    for name in ("bias", "dropout_mask"):
        moved.options[name] = moved.options[name][..., order]
    first, second, size = run(problem, implementation), run(moved, implementation), size_of(problem)
    close(second[0], first[0], size)
    close(second[1], first[1], size)
    close(second[2].q, first[2].q, size)
    close(second[2].k, first[2].k[..., order, :], size)
    close(second[2].v, first[2].v[..., order, :], size)
    close(second[2].bias, first[2].bias[..., order], size)


@given(seeds, sizes(), implementations, st.floats(-50, 50))
def test_shifting_all_scores_of_a_row_shifts_only_lse(seed, letters, implementation, shift):
    problem = draw_or_reject(("mask array", "dlse"), seed, letters)
    rows = np.full((letters["L"], 1), shift)
    plain, shifted = run(problem, implementation, bias=np.zeros_like(rows)), run(problem, implementation, bias=rows)
    size = size_of(problem) * (1 + abs(shift))
    close(shifted[0], plain[0], size)
    close(shifted[1], plain[1] + shift, size)
    for name in "qkv":
        close(getattr(shifted[2], name), getattr(plain[2], name), size, name)


@given(seeds, sizes(), implementations, st.data())
def test_causal_prefix_knows_nothing_of_what_comes_after(seed, letters, implementation, data):
    L = letters["L"]
    t = data.draw(st.integers(0, L - 2))
    problem = draw(("dlse",), seed, sizes={**letters, "S": L})
    before = run(problem, implementation, mask=causal())
    k, v = problem.k.copy(), problem.v.copy()
    k[..., t + 1 :, :], v[..., t + 1 :, :] = np.nan, np.inf
    (out, lse), cache = IMPLEMENTATIONS[implementation][0](problem.q, k, v, mask=causal(), return_lse=True)
    size = size_of(problem)
    close(out[..., : t + 1, :], before[0][..., : t + 1, :], size)
    close(lse[..., : t + 1], before[1][..., : t + 1], size)
    assert np.isnan(out[..., t + 1 :, :]).all()
    dout, dlse = problem.dout.copy(), problem.dlse.copy()
    grads = IMPLEMENTATIONS[implementation][1](dout, cache, dlse)
    close(grads.q[..., : t + 1, :], before[2].q[..., : t + 1, :], size)


@given(option_sets(most=4, without=("grouped heads", "rank")), seeds, implementations)
def test_grouped_heads_are_repeated_heads(options, seed, implementation):
    problem = draw_or_reject((*options, "G < H"), seed)
    repeated = problem.astype(np.float64)
    R = problem.q.shape[-3] // problem.k.shape[-3]
    repeated.k, repeated.v = (np.repeat(x, R, axis=-3) for x in (problem.k, problem.v))
    first, second, size = run(problem, implementation), run(repeated, implementation), size_of(problem)
    close(first[0], second[0], size)
    for name in "kv":
        g = getattr(second[2], name)
        summed = g.reshape(*g.shape[:-3], g.shape[-3] // R, R, *g.shape[-2:]).sum(-3)
        close(getattr(first[2], name), summed, size, name)


@given(option_sets(most=4), seeds, implementations)
def test_backward_is_linear_in_the_cotangents(options, seed, implementation):
    problem = draw_or_reject((*options, "dlse") if "dlse" not in options else options, seed)
    rng = np.random.default_rng(seed)
    forward, backward = IMPLEMENTATIONS[implementation]
    _, cache = forward(problem.q, problem.k, problem.v, **problem.arguments)
    other, dl = rng.standard_normal(problem.dout.shape), rng.standard_normal(problem.dlse.shape)
    a, b = 0.75, -1.5
    one, two = backward(problem.dout, cache, problem.dlse), backward(other, cache, dl)
    both = backward(a * problem.dout + b * other, cache, a * problem.dlse + b * dl)
    size = 4 * size_of(problem) * (1 + np.abs(other).max() + np.abs(dl).max())
    for name, x, y, z in zip(one._fields, one, two, both, strict=True):
        if x is not None:
            x, y, z = (np.asarray(getattr(g, "parameter", g)) for g in (x, y, z))
            close(z, a * x + b * y, size, name)


@given(option_sets(most=4), seeds, implementations)
def test_zero_cotangents_give_zero_gradients(options, seed, implementation):
    problem = draw_or_reject(options, seed)
    forward, backward = IMPLEMENTATIONS[implementation]
    _, cache = forward(problem.q, problem.k, problem.v, **problem.arguments)
    for g in backward(np.zeros_like(problem.dout), cache):
        if g is not None:
            assert not np.any(getattr(g, "parameter", g))


@given(option_sets(most=4, without=("dropout", "sink", "dlse")), seeds, implementations)
def test_constant_values_give_no_gradient_to_queries_and_keys(options, seed, implementation):
    problem = draw_or_reject(options, seed)
    problem.inputs["v"] = np.full_like(problem.v, 0.25)  # a power of two: dp is the same for all keys, to the bit
    out, _, grads = run(problem, implementation)
    live = np.abs(out).max(-1) > 0
    close(out[live], np.full_like(out[live], 0.25), 1.0)
    for g in (grads.q, grads.k):
        close(g, np.zeros_like(g), size_of(problem))


@given(
    seeds,
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=4),
    implementations,
    st.sampled_from([None, "top_left", "bottom_right"]),
)
def test_packed_sequences_are_attended_to_one_by_one(seed, lengths, implementation, align):
    rng = np.random.default_rng(seed)
    cu_q, cu_k = (np.cumsum([0, *ns]) for ns in zip(*lengths, strict=True))
    q, k, v = (rng.standard_normal((2, cu[-1], 3)) for cu in (cu_q, cu_k, cu_k))
    dout = rng.standard_normal(q.shape)
    forward, backward = IMPLEMENTATIONS[implementation]
    out, cache = forward(q, k, v, mask=packed(cu_q, cu_k, align))
    grads = backward(dout, cache)
    for n in range(len(lengths)):
        i, j = slice(*cu_q[n : n + 2]), slice(*cu_k[n : n + 2])
        alone, own = forward(q[:, i], k[:, j], v[:, j], mask=None if align is None else causal(align=align))
        g = backward(dout[:, i], own)
        size = 1000 * (1 + sum(float(np.abs(x).max(initial=0.0)) for x in (q, k, v, dout))) ** 2
        close(out[:, i], alone, size)
        close(grads.q[:, i], g.q, size)
        close(grads.k[:, j], g.k, size)
        close(grads.v[:, j], g.v, size)


@given(seeds, sizes(), implementations, st.data())
def test_keys_that_are_split_and_merged_are_whole(seed, letters, implementation, data):
    S = letters["S"]
    cut = data.draw(st.integers(0, S))
    problem = draw_or_reject(("mask array",), seed, letters)
    forward, _ = IMPLEMENTATIONS[implementation]
    mask = np.asarray(parts_of(problem)[0].mask)
    whole, lse = forward(problem.q, problem.k, problem.v, mask=mask, return_lse=True)[0]
    halves = [
        forward(problem.q, problem.k[..., j, :], problem.v[..., j, :], mask=mask[..., j], return_lse=True)[0]
        for j in (slice(0, cut), slice(cut, S))
    ]
    out, merged = merge(*halves[0], *halves[1])
    close(out, whole, size_of(problem))
    close(merged, lse, size_of(problem))


@given(option_sets(), seeds, implementations)
def test_a_second_call_gives_the_same_bits(options, seed, implementation):
    problem = draw_or_reject(options, seed)
    arrays = [
        x for x in (problem.q, problem.k, problem.v, problem.dout, *problem.options.values()) if isinstance(x, np.ndarray)
    ]
    before = [x.tobytes() for x in arrays]
    first, second = run(problem, implementation), run(problem, implementation)
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()
    for x, y in zip(first[2], second[2], strict=True):
        assert np.asarray(getattr(x, "parameter", x)).tobytes() == np.asarray(getattr(y, "parameter", y)).tobytes() or x is None
    assert [x.tobytes() for x in arrays] == before


@given(seeds, st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_concat_is_the_sum_of_projections_by_head(seed, heads, L, S, D, E, M):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, L, M)), rng.standard_normal((2, S, M))
    shapes = [(M, heads * D), (M, heads * D), (M, heads * E), (heads * E, M)]
    params = npattn.MultiHeadParams(*(rng.standard_normal(s) for s in shapes))
    out = npattn.multi_head(x, y, y, params, heads)
    total = np.zeros_like(out)
    for h in range(heads):
        d, e = slice(h * D, (h + 1) * D), slice(h * E, (h + 1) * E)
        q, k, v = ((z @ w)[:, None] for z, w in ((x, params.w_q[:, d]), (y, params.w_k[:, d]), (y, params.w_v[:, e])))
        total += attention(q, k, v)[:, 0] @ params.w_o[e]
    size = heads * E * M * 100 * np.abs(y).max() * np.abs(params.w_v).max() * np.abs(params.w_o).max()
    size *= 1 + M * M * D * np.abs(x).max() * np.abs(y).max() * np.abs(params.w_q).max() * np.abs(params.w_k).max()
    close(out, total, size)


@given(seeds, st.integers(1, 7), st.integers(1, 7))
def test_laws_of_the_mask_algebra(seed, L, S):
    rng = np.random.default_rng(seed)
    shape = (2, 3, L, S)
    nothing, everything = key_lengths(0), ~key_lengths(0)
    a = causal(offset=rng.integers(-3, 4, 2))
    b = key_lengths(rng.integers(0, S + 1, 2)) | segments(rng.integers(0, 2, L), rng.integers(0, 2, S))
    c = window(int(rng.integers(0, 4)), None, align="top_left")

    def dense(mask):
        return mask.bind(shape).dense()

    for left, right in [
        (~(a & b), ~a | ~b),
        (~(a | b), ~a & ~b),
        (~~a, a),
        (a & b, b & a),
        (a | b, b | a),
        (a & (b | c), (a & b) | (a & c)),
        (a | (b & c), (a | b) & (a | c)),
        (a & (b & c), (a & b) & c),
        (a & a, a),
        (a | a, a),
        (a & (a | b), a),
        (a | (a & b), a),
        ((a | b) | c, a | (b | c)),
        (a & everything, a),
        (a | nothing, a),
    ]:
        assert np.array_equal(dense(left), dense(right))
    assert not dense(a & ~a).any()
    assert dense(a | ~a).all()
    rows, cols = slice(int(rng.integers(0, L)), L), slice(0, int(rng.integers(1, S + 1)))
    for mask in (a, b, c, a & b, (a | b) & ~c):
        bound = mask.bind(shape)
        for index in np.ndindex(shape[:2]):
            tile = np.broadcast_to(bound.tile(index, rows, cols), (L - rows.start, cols.stop))
            assert np.array_equal(tile, bound.dense()[index][rows, cols])
            state = bound.state(index, rows, cols)
            assert state == PARTIAL or (tile.all() if state == FULL else not tile.any())
