"""The gated recurrent layers against explicit loops, their gradients, what lies after a sequence's length, and composition."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close
from oracles import gru_loops, lstm_loops

import npattn
from npattn import GRUParams, LSTMParams, gradcheck, gru_backward, gru_forward, lstm_backward, lstm_forward, reversed_steps
from npattn.ops import recurrent
from npattn.tolerances import ROUNDING_STD

B, T, M, N = 3, 6, 4, 5
LENGTHS = {"full": None, "ragged": np.array([4, 0, 6]), "one": np.array([1, 6, 2])}
OPS = {
    "gru": (GRUParams, 3, 2, ("h",), gru_forward, gru_backward, gru_loops),
    "lstm": (LSTMParams, 4, 1, ("h", "c"), lstm_forward, lstm_backward, lstm_loops),
}
EACH = pytest.mark.parametrize("op", OPS)
FORMS = [("gru", {}), ("gru", {"reset_after": False}), ("lstm", {})]
FORM = pytest.mark.parametrize(("op", "options"), FORMS, ids=["gru", "gru, reset before", "lstm"])


def problem(op, seed=0, *, biases=None, states=True, dtype=np.float64, shape=(B, T, M, N)):
    """biases : which are given; all if None"""
    (make, gates, count, names, *_), (B, T, M, N) = OPS[op], shape
    rng, biases = np.random.default_rng(seed), (True,) * count if biases is None else biases
    params = [0.6 * rng.standard_normal(s) for s in ((M, gates * N), (N, gates * N), *[(gates * N,)] * count)]
    kept = [w.astype(dtype) if used else None for w, used in zip(params, (True, True, *biases), strict=True)]
    x, *firsts = (rng.standard_normal(s).astype(dtype) for s in ((B, T, M), *[(B, N)] * len(names)))
    return {"x": x, **{f"{n}0": s if states else None for n, s in zip(names, firsts, strict=True)}, "params": make(*kept)}


def all_outputs(op, **options):
    """A pair whose outputs are h and the last states."""
    names, forward, backward = OPS[op][3:6]

    def run(**given):
        h, cache = forward(**{f"{n}0": None for n in names} | given, **options)
        return (h, *(getattr(cache, f"{n}_last") for n in names)), cache

    return run, lambda d, cache: backward(d[0], cache, *d[1:])


def named(grads):
    return {n: g for n, g in {**grads._asdict(), **grads.params._asdict()}.items() if isinstance(g, np.ndarray)}


def results(op, given, dh, lasts, **options):
    run, backward = all_outputs(op, **options)
    (h, *states), cache = run(**given)
    return {"h": h, **{f"{n}_last": s for n, s in zip(OPS[op][3], states, strict=True)}, **named(backward((dh, *lasts), cache))}


def small_pieces(monkeypatch, wide=1, deep=1, steps=1):
    """Products of one step in pieces of these sizes, however small they are."""
    for name, value in {"SMALL": 0, "WIDTHS": (wide,), "DEPTHS": (deep,), "STEPS": steps, "has_avx512": lambda: True}.items():
        monkeypatch.setattr(recurrent, name, value)


# --- gradients and values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@FORM
def test_gradients(op, options, lengths, states, method):
    for biases in itertools.product([True, False], repeat=OPS[op][2]):
        given = problem(op, 3, biases=biases, states=states)
        pair = all_outputs(op, lengths=LENGTHS[lengths], **options)
        gradcheck(*pair, given, method=method, elements=4 if method == "complex" else 1)


@FORM
def test_gradients_of_each_output_alone(op, options):
    run, backward = all_outputs(op, lengths=LENGTHS["ragged"], **options)
    for n in range(1 + len(OPS[op][3])):
        def one(n=n, **given):
            outputs, cache = run(**given)
            return outputs[n], (cache, outputs)

        def back(d, kept, n=n):
            cache, outputs = kept
            return backward([d if k == n else np.zeros_like(y) for k, y in enumerate(outputs)], cache)

        gradcheck(one, back, problem(op, 1), elements=8)


@pytest.mark.parametrize("steps", ["whole", "pieces"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("biases", [True, False])
@FORM
def test_against_loops(op, options, biases, lengths, steps, monkeypatch):
    if steps == "pieces":
        small_pieces(monkeypatch)
    n, rng = LENGTHS[lengths], np.random.default_rng(6)
    given = problem(op, 5, biases=(biases,) * OPS[op][2])
    dh, *lasts = (rng.standard_normal(s) for s in ((B, T, N), *[(B, N)] * len(OPS[op][3])))
    got = results(op, given, dh, lasts, lengths=n, **options)
    *inputs, params = given.values()
    last = {f"d{k}_last": d for k, d in zip(OPS[op][3], lasts, strict=True)}
    want = OPS[op][6](*inputs, **params._asdict(), lengths=n, dh=dh, **last, **options)
    assert biases or not {"b", "b_x", "b_h"} & set(got)
    for name, value in got.items():
        # The slopes of a gate and of tanh are at most 1, and so are gates: 6 steps of sums of 9 terms below 4 in size, through
        # weights of spectral norm below 3. This is the bound of tests/test_rnn.py.
        size = 1e3 * (1 + np.abs(want[name]).max())
        assert_close(value, want[name], size, name=name)
    assert np.array_equal(getattr(npattn, op)(*given.values(), lengths=n, **options), got["h"])


def test_the_forms_of_gru_agree_where_the_reset_gate_is_open():
    """r = 1 - exp(-50) = 1 in float64."""
    given = problem("gru", 2)
    params = given["params"]
    b_x = np.concatenate([np.full(N, 1e3), params.b_x[N:]])
    given["params"] = params._replace(b_x=b_x)
    assert np.array_equal(npattn.gru(**given), npattn.gru(**given, reset_after=False))


@pytest.mark.parametrize(("gate", "size", "want"), [(1, 1e4, "kept"), (1, -1e4, "new")])
def test_the_update_gate_of_gru_keeps_the_state_or_takes_the_new_one(gate, size, want):
    given = problem("gru", 2, dtype=np.float32)
    b_x = given["params"].b_x.copy()
    b_x[gate * N : (gate + 1) * N] = size
    h, cache = gru_forward(**given | {"params": given["params"]._replace(b_x=b_x)})
    expected = np.broadcast_to(given["h0"][:, None], h.shape) if want == "kept" else cache.gates[..., 2 * N :].swapaxes(0, 1)
    assert np.array_equal(h, expected)
    g = gru_backward(np.ones_like(h), cache)
    assert all(np.isfinite(y).all() for y in named(g).values())
    assert want == "new" or np.array_equal(g.h0, np.full_like(g.h0, T))


def test_a_cell_of_lstm_is_kept_whole_and_may_be_large():
    given = problem("lstm", 2, dtype=np.float32)
    b = np.concatenate([np.full(N, -1e4), np.full(N, 1e4), given["params"].b[2 * N :]]).astype(np.float32)  # i = 0, f = 1
    c0 = np.float32(1e38) * np.sign(given["c0"])
    h, cache = lstm_forward(**given | {"c0": c0, "params": given["params"]._replace(b=b)})
    assert np.array_equal(cache.c_last, c0)
    assert np.array_equal(h, cache.gates[..., 3 * N :].swapaxes(0, 1) * np.sign(c0)[:, None])
    g = lstm_backward(np.zeros_like(h), cache, None, np.ones_like(c0))
    assert np.array_equal(g.c0, np.ones_like(c0))
    assert all(np.isfinite(y).all() for y in named(g).values())


# --- what must not be reached -----------------------------------------------------------------------------------------------


@FORM
def test_what_lies_after_the_length_reaches_nothing(op, options):
    n, rng = LENGTHS["ragged"], np.random.default_rng(0)
    after = np.arange(T) >= n[:, None]
    clean, spoilt = problem(op, 2), problem(op, 2)
    spoilt["x"][after] = np.nan
    dh = rng.standard_normal((B, T, N))
    bad, lasts = np.where(after[..., None], np.inf, dh), [rng.standard_normal((B, N)) for _ in OPS[op][3]]
    one, other = (results(op, *given, lasts, lengths=n, **options) for given in ((clean, dh), (spoilt, bad)))
    assert not one["h"][after].any()
    assert not other["x"][after].any()
    for k in OPS[op][3]:
        assert np.array_equal(one[f"{k}_last"][1], clean[f"{k}0"][1])
        assert np.array_equal(one[f"{k}0"][1], lasts[OPS[op][3].index(k)][1])
    assert all(np.array_equal(one["h_last"][b], one["h"][b, n[b] - 1]) for b in (0, 2))
    for name, value in one.items():
        assert_close(other[name], value, 100, name=name)


@FORM
def test_nan_reaches_later_steps_of_its_sequence_and_only_gradients_that_come_from_there(op, options):
    given = problem(op, 2)
    given["x"][1, 3] = np.nan
    run, backward = all_outputs(op, **options)
    (h, *_), cache = run(**given)
    assert np.isnan(h[1, 3:]).all()
    assert np.isfinite(np.delete(h.reshape(-1, N), range(T + 3, 2 * T), 0)).all()
    dh = np.ones_like(h)
    lasts = [np.ones((B, N)) for _ in OPS[op][3]]
    for d in (*lasts, dh[:, 3:].swapaxes(0, 1).reshape(-1, B, N).swapaxes(0, 1)):
        assert d.any()
    dh[1, 3:] = 0
    for d in lasts:
        d[1] = 0
    g = named(backward((dh, *lasts), cache))
    assert all(np.isfinite(y).all() for y in g.values())
    assert not g["x"][1, 3:].any()
    shorter = {**given, "x": given["x"].copy()}
    shorter["x"][1, 3:] = 0
    n = np.array([T, 3, T])
    (_, *_), cache = all_outputs(op, lengths=n, **options)[0](**shorter)
    for name, want in named(backward((dh, *lasts), cache)).items():
        assert_close(g[name], want, 100, name=name)
    dh[1, 4] = 1
    assert np.isnan(named(backward((dh, *lasts), cache_of(run, given)))["x"][1, 3]).all()


def cache_of(run, given):
    return run(**given)[1]


@EACH
def test_no_initial_state_is_zeros(op):
    none = problem(op, 4, states=False)
    zeros = {k: np.zeros((B, N)) if v is None else v for k, v in none.items()}
    dh, lasts = np.ones((B, T, N)), [np.ones((B, N)) for _ in OPS[op][3]]
    one, other = (results(op, given, dh, lasts) for given in (none, zeros))
    assert all(np.array_equal(one[name], other[name]) for name in other)
    assert all(one[f"{k}0"].any() for k in OPS[op][3])


# --- dtypes, views, empty axes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.longdouble])
@FORM
def test_dtypes(op, options, dtype):
    given, rng = problem(op, dtype=dtype), np.random.default_rng(1)
    dh, *lasts = (rng.standard_normal(s).astype(dtype) for s in ((B, T, N), *[(B, N)] * len(OPS[op][3])))
    computing = np.float32 if np.dtype(dtype).itemsize == 2 else dtype

    def wide(x, to):
        return type(x)(*(wide(y, to) for y in x)) if isinstance(x, tuple) else x if x is None else x.astype(to)

    got = results(op, given, dh, lasts, lengths=LENGTHS["ragged"], **options)
    assert {a.dtype for a in got.values()} == {np.dtype(dtype)}
    low = results(op, {k: wide(v, computing) for k, v in given.items()}, dh.astype(computing),
                  [d.astype(computing) for d in lasts], lengths=LENGTHS["ragged"], **options)  # fmt: skip
    assert all(np.array_equal(got[name], want.astype(dtype)) for name, want in low.items())  # rounded once
    mixed = results(op, {k: wide(v, computing) if k == "params" else v for k, v in given.items()}, dh, lasts, **options)
    assert mixed["w_x"].dtype == computing
    assert mixed["x"].dtype == dtype
    exact = results(op, {k: wide(v, float) for k, v in given.items()}, dh.astype(float), [d.astype(float) for d in lasts],
                    lengths=LENGTHS["ragged"], **options)  # fmt: skip
    for name, want in exact.items():
        least = float if dtype is np.longdouble else dtype
        assert_close(got[name], want, 1e3 * (1 + np.abs(want).max()), dtype=least,
                     computing=float if dtype is np.longdouble else computing, name=name)  # fmt: skip


@FORM
def test_complex_numbers_are_continued_where_exp_would_overflow(op, options):
    given = problem(op, dtype=np.complex128)
    given["x"] = 1e3 * given["x"]
    given["x"][0, 0, 0] += 1e-3j
    got = results(op, given, np.ones((B, T, N), complex), [np.ones((B, N), complex) for _ in OPS[op][3]], **options)
    assert all(np.isfinite(y).all() for y in got.values())


@pytest.mark.parametrize("size", [1e20, 1e38, 1e-30])
@FORM
def test_large_and_small_inputs(op, options, size):
    """Gates and candidates saturate, or are those of the biases."""
    given = problem(op, dtype=np.float32)
    given["x"] = np.float32(size) * np.sign(given["x"])
    given["params"] = given["params"]._replace(w_x=np.abs(given["params"].w_x) / 4)
    given["x"] = np.abs(given["x"])  # sums of one sign: they may be inf, and not NaN
    got = results(op, given, np.ones((B, T, N), np.float32), [np.ones((B, N), np.float32) for _ in OPS[op][3]], **options)
    assert all(np.isfinite(got[name]).all() for name in ("h", "x", "h0", "w_h"))


@pytest.mark.parametrize("shape", [(0, T, M, N), (B, 0, M, N), (0, 0, M, N), (B, T, 0, N), (B, T, M, 0)], ids=str)
@FORM
def test_empty(op, options, shape):
    given = problem(op, shape=shape)
    (B, T, M, N), gates = shape, OPS[op][1]
    lasts = [np.ones((B, N)) for _ in OPS[op][3]]
    got = results(op, given, np.ones((B, T, N)), lasts, lengths=np.full(B, T), **options)
    assert got["h"].shape == (B, T, N)
    assert got["x"].shape == (B, T, M)
    assert got["w_h"].shape == (N, gates * N)
    for k in OPS[op][3]:
        assert got[f"{k}0"].shape == (B, N)
        assert T > 0 or np.array_equal(got[f"{k}_last"], given[f"{k}0"])
        assert T > 0 or np.array_equal(got[f"{k}0"], np.ones((B, N)))


@FORM
def test_inputs_stay_and_a_second_backward_gives_the_same_bits(op, options):
    given = problem(op)
    given["x"] = np.broadcast_to(given["x"][:1], (B, T, M))
    given["params"] = given["params"]._replace(w_h=np.asfortranarray(given["params"].w_h)[:, ::-1])
    arrays = [a for v in given.values() for a in (v if isinstance(v, tuple) else (v,))]
    for a in arrays:
        a.flags.writeable = False
    before, run = [a.tobytes() for a in arrays], all_outputs(op, **options)
    dh, lasts = np.broadcast_to(np.float64(0.5), (B, T, N)), [np.ones((B, N)) for _ in OPS[op][3]]
    for d in lasts:
        d.flags.writeable = False
    outputs, cache = run[0](**given)
    kept = [a.tobytes() for a in (*outputs, *(a for a in cache if isinstance(a, np.ndarray)))]
    first, second = (named(run[1]((dh, *lasts), cache)) for _ in range(2))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert [a.tobytes() for a in arrays] == before
    assert [a.tobytes() for a in (*outputs, *(a for a in cache if isinstance(a, np.ndarray)))] == kept
    plain = {k: type(v)(*map(np.array, v)) if isinstance(v, tuple) else v.copy() for k, v in given.items()}
    for name, want in results(op, plain, dh.copy(), lasts, **options).items():
        assert_close(results(op, given, dh, lasts, **options)[name], want, 100, name=name)


# --- the product of a step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("rows", "inner", "width", "pieces"), [
    (2, 6, 4, (2, 2)), (3, 3, 8, (1, 4)), (16, 9, 2, (3, 1)),
    (1, 6, 4, None), (17, 6, 4, None), (2, 7, 4, None), (2, 6, 5, None), (0, 6, 4, None), (2, 0, 4, None), (2, 6, 0, None),
])  # fmt: skip
def test_the_product_of_a_step_is_that_of_numpy(rows, inner, width, pieces, steps, monkeypatch):
    small_pieces(monkeypatch, wide=2, deep=3, steps=3)
    cut, real = [], recurrent.gates_of
    monkeypatch.setattr(recurrent, "gates_of", lambda p, count: cut.append(count) or real(p, count))
    rng = np.random.default_rng(rows + inner + width)
    for dtype in (np.float32, np.float64, np.longdouble, np.complex128):
        x, w = (rng.standard_normal(shape).astype(dtype) for shape in ((rows, 2 * inner), (inner, 3 * width)))
        for given in (w[:, width : 2 * width], np.asfortranarray(w)[:, :width], w[:, :width][:, ::-1]):
            cut.clear()
            product = recurrent.product_with(given, rows, steps)
            for part in (x[:, :inner], np.ascontiguousarray(x[:, inner:])):
                assert_close(product(part), part @ given, np.abs(part) @ np.abs(given))
            some = pieces is not None and dtype in (np.float32, np.float64)
            assert cut == ([pieces[1], pieces[0], pieces[0]] if some else [])
            assert not np.shares_memory(product(part), given)


@pytest.mark.parametrize(("inner", "width"), [(256, 1024), (1024, 256), (300, 480)])
@pytest.mark.parametrize("steps", [1, 100])
def test_sums_of_large_products_have_chains_of_256_at_most(inner, width, steps, monkeypatch):
    """A chain of n random terms rounds n partial sums of size sqrt(k): sqrt(1/2) n in all, beside 2/pi n for the |terms|."""
    monkeypatch.setattr(recurrent, "has_avx512", lambda: True)
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, inner), (inner, width)))
    exact, terms = x.astype(float) @ w.astype(float), np.abs(x).astype(float) @ np.abs(w).astype(float)
    error = (recurrent.product_with(w, 16, steps)(x) - exact) / terms
    chain = ROUNDING_STD * np.finfo(np.float32).eps / 2 * np.sqrt(1 / 2) * np.pi / 2
    assert np.sqrt((error**2).mean()) < 1.2 * chain * np.sqrt(256 / inner)


# --- reversed_steps and composition -----------------------------------------------------------------------------------------


def test_reversed_steps_turns_each_sequence_within_its_length():
    x, n = np.random.default_rng(0).standard_normal((B, T, M)), LENGTHS["ragged"]
    y = reversed_steps(x, n)
    for b in range(B):
        for t in range(T):
            assert np.array_equal(y[b, t], x[b, n[b] - 1 - t if t < n[b] else t])
    assert np.array_equal(reversed_steps(y, n), x)
    assert np.array_equal(reversed_steps(x), x[:, ::-1])
    assert not np.shares_memory(reversed_steps(x), x)
    gradcheck(lambda x: (reversed_steps(x, n), None), lambda d, _: {"x": reversed_steps(d, n)}, {"x": x})
    assert reversed_steps(np.zeros((0, 0, 2)), np.zeros(0, int)).shape == (0, 0, 2)


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: reversed_steps([1]), TypeError, "reversed_steps: x is a list"),
    (lambda: reversed_steps(np.ones(3)), ValueError, r"reversed_steps: x has shape \(3,\), expected \(B, T, ...\)"),
    (lambda: reversed_steps(np.ones((2, 3)), [1, 4]), ValueError, "lengths reaches from 1 to 4, expected 0 to T=3: fixed by x"),
    (lambda: reversed_steps(np.ones((2, 3)), [1.0, 4.0]), TypeError, "reversed_steps: lengths has dtype float64"),
    (lambda: reversed_steps(np.ones((2, 3)), [1]), ValueError, r"lengths has shape \(1,\), expected \(B=2,\)"),
])  # fmt: skip
def test_bad_input_of_reversed_steps_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


@EACH
def test_verify_knows_it(op):
    cases = [c for c in npattn.verify.CASES_OF[op] if c.name in ("plain", "lengths 0 and T", "M = N")]
    assert npattn.verify.verify(op, cases=cases).passed
