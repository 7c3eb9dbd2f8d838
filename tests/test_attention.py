"""Attention, dense and in tiles, against explicit loops: every option, every edge, forwards and backwards."""

from __future__ import annotations

import itertools
import re

import ml_dtypes
import numpy as np
import pytest
from helpers import (
    IMPLEMENTATIONS,
    SIZES,
    assert_close,
    attention_terms,
    check_attention,
    info,
    pair_shape,
    qkv,
    random,
)
from oracles import alibi_loops, attention_loops, attention_mpmath, from_mp, mask_loops

import npattn
from npattn import Alibi, alibi_slopes, causal, gradcheck, hessian_vector_product, key_lengths, window
from npattn.ops.attention import plain_backward, plain_forward

H, L, S = SIZES["H"], SIZES["L"], SIZES["S"]
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
POISON = pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def holes(shape, seed=7, share=0.6):
    """A random mask with holes; queries 0 see nothing, so that there is always a row without keys."""
    allowed = np.random.default_rng(seed).random(shape) < share
    allowed[..., 0, :] = False
    return allowed


def dropped(shape, dtype=np.float64, seed=8, p=0.3):
    return ((np.random.default_rng(seed).random(shape) >= p) / (1 - p)).astype(dtype)


def option(name, shape, dtype=np.float64):
    """The value of one option for scores of this shape."""
    heads = shape[-3] if len(shape) > 2 else 1
    return {
        "mask": lambda: holes(shape),
        "bias": lambda: random(shape, 11, dtype),
        "scale": lambda: 0.7,
        "softcap": lambda: 1.3,
        "sink": lambda: random((heads,), 12, dtype),
        "dropout_mask": lambda: dropped(shape, dtype),
    }[name]()


NAMES = ("mask", "bias", "scale", "softcap", "sink", "dropout_mask")
COMBINATIONS = [
    (),
    *((name,) for name in NAMES),
    *itertools.combinations(NAMES, 2),
    ("mask", "softcap", "sink"),
    ("mask", "bias", "dropout_mask"),
    NAMES,
]


# --- the plain case ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("lead", [(), (2,)], ids=["rank3", "rank4"])
def test_the_plain_case_is_equal_to_the_whole(lead, dtype):
    """To the last bit: the fifteen lines that stand before all options compute what is left of the whole without them."""
    x = qkv(lead, dtype, G=H)
    q, k, v, dout = (x[name] for name in ("q", "k", "v", "dout"))
    out, weights = plain_forward(q, k, v)
    want, cache = npattn.attention_forward(q, k, v)
    assert np.array_equal(out, want)
    assert np.array_equal(weights, cache.weights)
    for got, grad in zip(plain_backward(dout, q, k, v, weights), npattn.attention_backward(dout, cache), strict=False):
        assert np.array_equal(got, grad)
        assert got.any()


# --- every option ----------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_options(implementation, names):
    x = qkv()
    check_attention(implementation, x, **{name: option(name, pair_shape(x)) for name in names})


@EACH
@pytest.mark.parametrize("lead", [None, (), (2,), (3, 2)], ids=["rank2", "rank3", "rank4", "rank5"])
@pytest.mark.parametrize("names", [(), NAMES], ids=["plain", "all"])
def test_ranks(implementation, lead, names):
    x = qkv(lead, H=4, G=2, L=3)
    check_attention(implementation, x, **{name: option(name, pair_shape(x)) for name in names})


@EACH
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_grouped_heads(implementation, groups):
    x = qkv(G=groups)
    check_attention(implementation, x, mask=option("mask", pair_shape(x)), sink=option("sink", pair_shape(x)))


FORMS = [tuple(form) for form in itertools.product([False, True], repeat=4)] + [(a, b) for a in (0, 1) for b in (0, 1)]


def shaped(form, shape):
    """The sizes of the last axes of shape, 1 where form is False."""
    return tuple(n if keep else 1 for n, keep in zip(shape[-len(form) :], form, strict=True))


@EACH
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "".join("x" if n else "1" for n in f))
def test_broadcast_forms(implementation, form):
    """Mask, bias and dropout mask with any of their axes of size 1; the gradient of the bias is summed over those."""
    x = qkv()
    small = shaped(form, pair_shape(x))
    allowed = np.random.default_rng(3).random(small) < 0.7
    check_attention(
        implementation,
        x,
        mask=allowed,
        bias=random(small[-2:] if len(form) == 2 else small, 4),
        dropout_mask=dropped(small),
    )


@EACH
def test_axes_of_one_size(implementation):
    """L = S = D = E = H: swapped axes do not show in a shape, but a mask that is not symmetric shows them."""
    x = qkv(H=4, G=4, L=4, S=4, D=4, E=4)
    options = {name: option(name, pair_shape(x)) for name in NAMES}
    check_attention(implementation, x, **options)
    check_attention(implementation, x, mask=causal(), allowed=mask_loops("causal", pair_shape(x)))


@EACH
@pytest.mark.parametrize(("queries", "keys"), [(4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("names", [(), ("softcap", "sink", "dropout_mask")], ids=["plain", "more"])
def test_causal(implementation, queries, keys, align, names):
    x = qkv(L=queries, S=keys)
    options = {name: option(name, pair_shape(x)) for name in names}
    allowed = mask_loops("causal", pair_shape(x), align=align)
    check_attention(implementation, x, mask=causal(align=align), allowed=allowed, **options)


@EACH
def test_masks_and_biases_that_are_objects(implementation):
    x = qkv(L=4, S=9)
    shape = pair_shape(x)
    mask = (key_lengths(2) | window(3, 0, align="bottom_right")) & causal(align="bottom_right") & key_lengths([9, 6])
    allowed = (
        (mask_loops("key_lengths", shape, n=2) | mask_loops("window", shape, left=3, right=0, align="bottom_right"))
        & mask_loops("causal", shape, align="bottom_right")
        & mask_loops("key_lengths", shape, n=[9, 6])
    )
    bias = Alibi(alibi_slopes(H), align="bottom_right")
    values = alibi_loops(bias.slopes, shape, "bottom_right")
    result = check_attention(
        implementation, x, mask=mask, allowed=allowed, bias=bias, values=values, dropout_mask=dropped(shape)
    )
    assert isinstance(result["grads"].bias, Alibi)
    assert result["grads"].bias.align == "bottom_right"


class Checkerboard:
    """A mask, bias or dropout mask of the caller's own: bind, and what is bound has dense, tile and state."""

    def __init__(self, values):
        self.values = values

    def bind(self, shape):
        assert self.values.shape == shape
        return self

    def dense(self):
        return self.values

    def tile(self, index, rows, cols):
        return self.values[index][..., rows, cols]

    def state(self, index, rows, cols):
        return 1


@EACH
def test_objects_of_the_callers_own(implementation):
    x = qkv()
    shape = pair_shape(x)
    allowed, drop = holes(shape), dropped(shape)
    forward, backward = IMPLEMENTATIONS[implementation]
    results = []
    for wrap in (Checkerboard, lambda values: values):
        (out, lse), cache = forward(
            x["q"], x["k"], x["v"], mask=wrap(allowed), dropout_mask=wrap(drop), return_lse=True
        )
        results.append((out, lse, *backward(x["dout"], cache, x["dlse"])[:3]))
    if implementation != "tiles":  # where it only says PARTIAL, a tile is not cut down
        for own, array in zip(*results, strict=True):
            assert np.array_equal(own, array)
    check_attention(implementation, x, mask=allowed, dropout_mask=drop)
    check_attention(implementation, x, mask=Checkerboard(allowed), dropout_mask=drop, allowed=allowed)
    check_attention(implementation, x, mask=Checkerboard(allowed) & causal(align="top_left"),
                    allowed=allowed & mask_loops("causal", shape, align="top_left"))  # fmt: skip


@EACH
@pytest.mark.parametrize("tile", [lambda cols: True, lambda cols: np.arange(S)[cols] < 3], ids=["one number", "a row of keys"])
def test_a_tile_of_the_callers_own_may_be_what_broadcasts(implementation, tile):
    class Own:
        def bind(self, shape):
            return self

        def tile(self, index, rows, cols):
            return tile(cols)

    x = qkv()
    check_attention(implementation, x, mask=Own(), allowed=np.broadcast_to(tile(slice(None)), pair_shape(x)))


@EACH
def test_names_without_cache_and_lse(implementation):
    x = qkv()
    plain = {"dense": npattn.attention}.get(implementation, npattn.blockwise)
    forward, backward = IMPLEMENTATIONS[implementation]
    out, cache = forward(x["q"], x["k"], x["v"])
    (same, lse), _ = forward(x["q"], x["k"], x["v"], return_lse=True)
    assert np.array_equal(out, same)
    assert np.array_equal(cache.lse, lse)
    if implementation != "tiles":
        assert np.array_equal(plain(x["q"], x["k"], x["v"]), out)
        assert all(map(np.array_equal, plain(x["q"], x["k"], x["v"], return_lse=True), (out, lse)))
    assert backward(x["dout"], cache)._fields == ("q", "k", "v", "bias", "sink", "scale")
    zero = backward(x["dout"], cache, np.zeros_like(lse))
    assert all(np.array_equal(a, b) for a, b in zip(backward(x["dout"], cache)[:3], zero[:3], strict=True))


@EACH
@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0, 3, np.float32(0.7), np.float64(-1.5)], ids=repr)
@pytest.mark.parametrize("softcap", [None, 0.9])
def test_scale_may_be_any_number(implementation, scale, softcap):
    x = qkv()
    result = check_attention(implementation, x, mask=holes(pair_shape(x)), scale=scale, softcap=softcap)
    if scale == 0:
        assert not result["q"].any()
        assert not result["k"].any()
        assert result["scale"] != 0
    single = qkv(dtype=np.float32)  # a NumPy scalar must not make it float64
    check_attention(implementation, single, scale=scale, softcap=softcap)


# --- 50 digits -------------------------------------------------------------------------------------------------------

SMALL = {"L": 2, "S": 3, "D": 2, "E": 2}
EIGHT = {
    "plain": {},
    "mask": {"mask": np.array([[True, False, True], [False, False, False]])},
    "dead with sink": {"mask": np.array([[True, True, False], [False, False, False]]), "sink": ()},
    "all": {
        "mask": np.array([[True, True, False], [True, True, True]]),
        "bias": (),
        "scale": 1.7,
        "softcap": 0.8,
        "sink": (),
        "dropout_mask": np.array([[2.0, 0.0, 2.0], [2.0, 2.0, 0.0]]),
    },
}


@EACH
@pytest.mark.parametrize(
    "dtype", [np.float64, np.longdouble, np.complex128, np.clongdouble], ids=lambda d: np.dtype(d).name
)
@pytest.mark.parametrize("case", EIGHT)
def test_fifty_digits(implementation, dtype, case):
    """The loops themselves, and the dtypes that they cannot hold: also the analytic continuation to complex inputs."""
    forward, backward = IMPLEMENTATIONS[implementation]
    x = qkv(None, dtype, **SMALL)
    options = dict(EIGHT[case])
    if "bias" in options:
        options["bias"] = random((2, 3), 21, dtype)
    if "sink" in options:
        options["sink"] = random((1,), 22, dtype)
    if "dropout_mask" in options:
        options["dropout_mask"] = options["dropout_mask"].astype(np.empty(0, dtype).real.dtype)
    (out, lse), cache = forward(x["q"], x["k"], x["v"], return_lse=True, **options)
    grads = backward(x["dout"], cache, x["dlse"])

    given = {name: value for name, value in options.items() if name != "mask"}
    allowed = options.get("mask", np.ones((2, 3), bool))
    expected = attention_mpmath(x["q"], x["k"], x["v"], allowed=allowed, dout=x["dout"], dlse=x["dlse"], **given)
    expected = {name: from_mp(np.asarray(value, object), dtype) for name, value in expected.items()}
    terms = attention_terms(
        x["q"], x["k"], x["v"], expected["weights"], bias=given.get("bias"), scale=given.get("scale", 2**-0.5),
        sink=given.get("sink"), dropout_mask=given.get("dropout_mask"), dout=x["dout"], dlse=x["dlse"], allowed=allowed,
    )  # fmt: skip
    results = {"out": out, "lse": lse} | {n: g for n, g in grads._asdict().items() if g is not None}
    for name, result in results.items():
        assert np.asarray(result).dtype == dtype
        assert_close(result, expected[name], terms[name], name=name)

    if dtype is np.float64:  # and the two oracles against each other
        loops = attention_loops(x["q"], x["k"], x["v"], allowed=allowed, dout=x["dout"], dlse=x["dlse"], **given)
        for name in ("out", "weights", "lse", "q", "k", "v", "scale"):
            assert_close(loops[name], expected[name], terms[name], name=f"loops {name}")


@pytest.mark.skipif(np.finfo(np.longdouble).eps == np.finfo(np.float64).eps, reason="longdouble is float64 here")
def test_fifty_digits_are_more_than_double():
    """The comparison in longdouble would see an error of one part in 1e17."""
    x = qkv(None, np.longdouble, **SMALL)
    out = from_mp(attention_mpmath(x["q"], x["k"], x["v"])["out"], np.longdouble)
    with pytest.raises(AssertionError, match="differ"):
        assert_close(out * (1 + np.longdouble(1e-17)), out, np.abs(out))


# --- gradients by complex step and central differences ---------------------------------------------------------------


@EACH
@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("names", [(), NAMES], ids=["plain", "all"])
def test_gradcheck(implementation, method, names):
    forward, backward = IMPLEMENTATIONS[implementation]
    x = qkv((2,), H=2, G=1, L=3, S=4, D=2, E=3)
    options = {name: option(name, pair_shape(x)) for name in names}
    inputs = {name: x[name] for name in "qkv"} | {n: options[n] for n in ("bias", "sink", "scale") if n in options}
    fixed = {name: value for name, value in options.items() if name not in inputs}

    def run(**given):
        return forward(**given, **fixed, return_lse=True)

    elements = 12 if method == "complex" else 2  # which costs six forwards or more each
    rows = gradcheck(run, lambda d, cache: backward(d[0], cache, d[1]), inputs, method=method, elements=elements)
    assert [row.name for row in rows] == list(inputs)
    assert all(row.derivatives >= 2 for row in rows)


@EACH
def test_hessian_is_symmetric(implementation):
    """<u, H w> = <w, H u>, with H w by a complex step through the backward."""
    forward, backward = IMPLEMENTATIONS[implementation]
    x = qkv((), H=2, G=1, L=3, S=4, D=2, E=3)
    shape = pair_shape(x)
    fixed = {"mask": holes(shape), "softcap": 1.3, "dropout_mask": dropped(shape)}
    inputs = {name: x[name] for name in "qkv"} | {"bias": option("bias", shape), "sink": option("sink", shape)}

    def run(**given):
        return forward(**given, **fixed, return_lse=True)

    def product(direction):
        return hessian_vector_product(
            run, lambda d, cache: backward(d[0], cache, d[1]), inputs, direction, (x["dout"], x["dlse"])
        )

    u, w = ({name: random(a.shape, (seed, n)) for n, (name, a) in enumerate(inputs.items())} for seed in (31, 32))
    Hu, Hw = product(u), product(w)
    terms = sum(np.abs(w[name] * Hu[name]).sum() + np.abs(u[name] * Hw[name]).sum() for name in inputs)
    left, right = (np.array(sum((a[name] * b[name]).sum() for name in inputs)) for a, b in ((w, Hu), (u, Hw)))
    assert abs(left) > 0.1
    assert_close(left, right, terms)


# --- dtypes ----------------------------------------------------------------------------------------------------------

HALVES = [np.dtype(np.float16), BFLOAT16]


@EACH
@pytest.mark.parametrize("dtype", [*HALVES, np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("names", [(), NAMES], ids=["plain", "all"])
def test_dtypes(implementation, dtype, names):
    """Out and gradients have the inputs' dtype (see check_attention), halves computed in float32 and rounded once."""
    x = qkv(dtype=dtype)
    check_attention(implementation, x, **{name: option(name, pair_shape(x), dtype) for name in names})


@EACH
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_parameters_in_the_computing_dtype(implementation, dtype):
    x = qkv(dtype=dtype)
    result = check_attention(
        implementation,
        x,
        **{name: option(name, pair_shape(x), np.float32) for name in ("bias", "sink", "dropout_mask")},
    )
    assert result["bias"].dtype == result["sink"].dtype == np.float32


@EACH
def test_float16_scores_beyond_float16(implementation):
    x = qkv(dtype=np.float16)
    x["q"][:, :, 1] = 300
    x["k"][:, :, 2] = 250  # 7 * 300 * 250 is 8 times the largest float16
    result = check_attention(implementation, x, mask=holes(pair_shape(x)))
    assert result["lse"].max() > np.finfo(np.float16).max
    assert np.isfinite(result["out"]).all()


@EACH
def test_float16_is_rounded_once(implementation):
    """The sum of 512 equal weights times 1 or 1 + 2^-10 (its eps) is exact in float32; in float16 it would not move."""
    q, k = np.zeros((1, 4), np.float16), np.zeros((512, 4), np.float16)
    v = np.ones((512, 1), np.float16)
    v[:257] += np.finfo(np.float16).eps
    out, _ = IMPLEMENTATIONS[implementation][0](q, k, v)
    assert out.item() == 1 + np.finfo(np.float16).eps


# --- queries without keys --------------------------------------------------------------------------------------------


def dead_by(way, shape):
    """Options that leave query 1 (of every head) without a key, the rows (..., H, L) and the pairs that are dead."""
    allowed = np.ones(shape, bool)
    if way == "one mask":
        allowed[..., 1, :] = False
        return {"mask": allowed}
    if way == "an intersection":  # each alone leaves it a key
        first, second = np.arange(shape[-1]) < 2, np.ones(shape[-2:], bool)
        second[1] = ~first
        return {"mask": npattn.keys(first) & second}
    if way == "a bias":
        bias = random(shape, 41)
        bias[..., 1, :] = -np.inf
        bias[..., 2, 1] = -np.inf
        return {"bias": bias}
    if way == "mask and bias":
        bias = random(shape, 42)
        bias[..., 1, 2:] = -np.inf
        allowed[..., 1, :2] = False
        return {"mask": allowed, "bias": bias}
    if way == "all by a mask":
        return {"mask": np.zeros(shape[-2:], bool)}
    if way == "all by a length":
        return {"mask": key_lengths(0)}
    return {"bias": np.full(shape[-2:], -np.inf)}


WAYS = ["one mask", "an intersection", "a bias", "mask and bias", "all by a mask", "all by a length", "all by a bias"]


def dense_mask(way, shape):
    """The dense form of dead_by's masks that are objects."""
    if way == "an intersection":
        allowed = np.zeros(shape, bool)
        allowed[..., :2] = True
        allowed[..., 1, :] = False
        return allowed
    return np.zeros(shape, bool) if way == "all by a length" else None


@EACH
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("names", [(), ("softcap", "dropout_mask")], ids=["plain", "more"])
def test_queries_without_keys(implementation, way, sink, names):
    x = qkv()
    shape = pair_shape(x)
    options = dead_by(way, shape) | {name: option(name, shape) for name in (*names, *(["sink"] if sink else []))}
    result = check_attention(implementation, x, allowed=dense_mask(way, shape), **options)
    rows = np.s_[...] if way.startswith("all") else np.s_[..., 1, :]
    row = np.s_[...] if way.startswith("all") else np.s_[..., 1]
    assert (result["out"][rows] == 0).all()
    assert (result["q"][rows] == 0).all()
    heads = options["sink"][:, None] if sink else -np.inf
    assert (result["lse"][row] == np.broadcast_to(heads, shape[:-1])[row]).all()
    if "bias" in options:
        assert (result["bias"][rows] == 0).all()
    if implementation == "dense":
        assert (result["weights"][rows] == 0).all()
    if way.startswith("all"):
        assert not result["k"].any()
        assert not result["v"].any()
        assert result["scale"] == 0
        if sink:  # the whole softmax is the sink: dlse flows into it, dout does not
            assert_close(result["sink"], x["dlse"].sum((0, 2)), np.abs(x["dlse"]).sum((0, 2)))
    else:
        assert np.isfinite(result["lse"][..., 0]).all()
        assert result["q"][..., 0, :].all()


@EACH
def test_a_sink_of_minus_infinity_is_no_sink(implementation):
    x = qkv()
    allowed = holes(pair_shape(x))
    without = check_attention(implementation, x, mask=allowed)
    result = check_attention(implementation, x, mask=allowed, sink=np.full(H, -np.inf))
    assert not result["sink"].any()
    assert (result["lse"][..., 0] == -np.inf).all()
    for name in ("out", "lse", "q", "k", "v"):
        assert np.array_equal(result[name], without[name])


@EACH
@pytest.mark.parametrize("sink", [-1000.0, -50.0, 50.0, 1000.0])
def test_sinks_far_from_the_scores(implementation, sink):
    x = qkv()
    check_attention(implementation, x, mask=holes(pair_shape(x)), sink=np.full(H, sink))


@EACH
@POISON
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
def test_poison_in_queries_without_keys(implementation, poison, way, sink):
    """NaN and inf in q, dout (and dlse, where lse is -inf) of a query that may see no key reach nothing."""
    clean = qkv()
    x = {name: a.copy() for name, a in clean.items()}
    shape = pair_shape(x)
    rows = slice(None) if way.startswith("all") else slice(1, 2)
    x["q"][..., rows, :] = poison
    x["dout"][..., rows, :] = poison
    if not sink:
        x["dlse"][..., rows] = poison
    options = dead_by(way, shape) | ({"sink": option("sink", shape)} if sink else {})
    result = check_attention(implementation, x, allowed=dense_mask(way, shape), **options)
    expected = check_attention(implementation, clean, allowed=dense_mask(way, shape), **options)
    for name in ("out", "lse", "q", "k", "v", "scale", "sink"):
        if name in result:
            assert np.isfinite(result[name][result[name] != -np.inf]).all(), name
            assert_close(result[name], expected[name], np.abs(np.where(np.isfinite(expected[name]), expected[name], 0)))


@EACH
def test_cotangents_of_dead_rows_are_ignored(implementation):
    """Whatever dout and dlse hold in rows whose lse is -inf, not one bit of a gradient changes."""
    x = qkv()
    forward, backward = IMPLEMENTATIONS[implementation]
    allowed = holes(pair_shape(x))
    allowed[..., 1, 0] = True  # a row that is alive
    _, cache = forward(x["q"], x["k"], x["v"], mask=allowed, bias=random(pair_shape(x), 5))
    dead = cache.lse == -np.inf
    assert dead[..., 0].all()
    assert not dead[..., 1].any()
    first = backward(x["dout"], cache, x["dlse"])
    for value in (np.nan, np.inf, 1e300, 0.0):
        dout, dlse = x["dout"].copy(), x["dlse"].copy()
        dout[dead], dlse[dead] = value, value
        again = backward(dout, cache, dlse)
        for name in ("q", "k", "v", "bias", "scale"):
            assert np.asarray(getattr(again, name)).tobytes() == np.asarray(getattr(first, name)).tobytes(), name


# --- NaN and inf -----------------------------------------------------------------------------------------------------


@EACH
@POISON
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize("names", [(), ("bias", "softcap", "sink", "dropout_mask")], ids=["plain", "more"])
def test_poison_in_masked_keys(implementation, poison, where, names):
    """Keys that nobody may see, here the padding of one sequence and one key of the other."""
    x = qkv()
    shape = pair_shape(x)
    allowed = np.ones((2, 1, 1, S), bool)
    allowed[0, ..., 3:] = False
    allowed[1, ..., 0] = False
    for name in where:
        x[name][0, :, 3:] = poison
        x[name][1, :, 0] = poison
    result = check_attention(implementation, x, mask=allowed, **{name: option(name, shape) for name in names})
    assert all(np.isfinite(result[name]).all() for name in ("out", "lse", "q", "k", "v", "scale"))
    assert not result["k"][0, :, 3:].any()
    assert not result["v"][1, :, 0].any()


@EACH
@POISON
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("by", ["mask", "bias"])
def test_poison_in_keys_masked_for_some(implementation, poison, where, by):
    """A key that a mask, or a bias of -inf, hides from some queries and heads: the others, and only they, get NaN."""
    x = qkv(G=6)
    shape = pair_shape(x)
    allowed = np.ones(shape, bool)
    allowed[0, 2, 1:, 3] = False
    allowed[..., 4] = False
    allowed[0, 2, 0, 4] = True
    x[where][:, :, 4] = poison
    x[where][0, 2, 3] = poison
    options = {"mask": allowed} if by == "mask" else {"bias": np.where(allowed, random(shape, 9), -np.inf)}
    result = attention_like_loops(implementation, x, allowed, options)
    touched = np.zeros(shape[:-1], bool)
    touched[0, 2, 0] = True  # only this query sees a key that is not finite
    assert np.isfinite(result["out"][~touched]).all()
    assert np.isfinite(result["q"][~touched]).all()
    assert not np.isfinite(result["out"][touched]).any()
    assert np.isnan(result["q"][touched]).all()
    other = np.ones(x["k"].shape[:2], bool)
    other[0, 2] = False
    assert np.isfinite(result["k"][other]).all()
    assert np.isfinite(result["v"][other]).all()
    assert np.isfinite(result["lse"][~touched]).all()


def attention_like_loops(implementation, x, allowed, options):
    """The results: finite in the same places as the loops, and equal to them there.

    Whether another element is inf or NaN is left open: inf - inf and the order of a sum decide it.
    """
    forward, backward = IMPLEMENTATIONS[implementation]
    (out, lse), cache = forward(x["q"], x["k"], x["v"], return_lse=True, **options)
    grads = backward(x["dout"], cache, x["dlse"])
    shape = pair_shape(x)
    bias = options.get("bias")
    given = {name: options.get(name) for name in ("softcap", "sink", "scale")}
    expected = attention_loops(
        x["q"], x["k"], x["v"], allowed=allowed, bias=None if bias is None else np.broadcast_to(bias, shape),
        dout=x["dout"], dlse=x["dlse"], **given,
    )  # fmt: skip
    terms = attention_terms(
        x["q"], x["k"], x["v"], expected["weights"], bias=bias, scale=given["scale"] or x["q"].shape[-1] ** -0.5,
        sink=given["sink"], dropout_mask=None, dout=x["dout"], dlse=x["dlse"], allowed=allowed,
    )  # fmt: skip
    result = {"out": out, "lse": lse, "q": grads.q, "k": grads.k, "v": grads.v}
    for name, a in result.items():
        e = expected[name]
        assert np.array_equal(np.isfinite(a), np.isfinite(e)), f"{name}: not finite in other places than the loops"
        assert_close(np.where(np.isfinite(a), a, 0), np.where(np.isfinite(e), e, 0), terms[name], name=name)
    return result


@EACH
@POISON
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("last", [4, 5])
def test_poison_in_keys_of_later_queries(implementation, poison, where, last):
    """Causal: a key that is not finite reaches the queries from its position on, whatever tile it lies in."""
    x = qkv(L=6, S=6)
    shape = pair_shape(x)
    x[where][:, :, last] = poison
    allowed = mask_loops("causal", shape)
    result = attention_like_loops(implementation, x, allowed, {"mask": causal()})
    assert np.isfinite(result["out"][..., :last, :]).all()
    assert np.isfinite(result["q"][..., :last, :]).all()
    assert not np.isfinite(result["out"][..., last:, :]).any()


@EACH
def test_poison_in_a_query_and_its_cotangents(implementation):
    """NaN in q_i, dout_i or dlse_i of a query with keys reaches the keys that it sees, and no other."""
    for name in ("q", "dout", "dlse"):
        x = qkv(L=6, S=6)
        x[name][0, 1, 3] = np.nan
        result = check_attention(implementation, x, mask=causal(), allowed=mask_loops("causal", pair_shape(x)))
        assert np.isnan(result["out"]).any(-1).sum() == (name == "q")
        assert np.isnan(result["q"]).any(-1).sum() == 1
        assert np.isnan(result["k"][0, 0, :4]).all()
        assert np.isfinite(result["k"][0, 0, 4:]).all()
        assert np.isfinite(result["k"][1]).all()
        assert np.isnan(result["v"][0, 0, :4]).all() == (name != "dlse")
        assert np.isfinite(result["v"][0, 0, 4:]).all()


@EACH
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
def test_a_score_of_nan_or_infinity(implementation, value, sink):
    """Through the bias: NaN in that row, and in the keys and values that it sees."""
    x = qkv(G=6)
    shape = pair_shape(x)
    bias = random(shape, 6)
    bias[1, 4, 2, 3] = value
    bias[1, 4, 2, 0] = -np.inf
    options = {"sink": option("sink", shape)} if sink else {}
    result = check_attention(implementation, x, bias=bias, **options)
    hit = np.zeros(shape[:-1], bool)
    hit[1, 4, 2] = True
    assert np.isnan(result["out"][hit]).all()
    assert np.isnan(result["lse"][hit]).all()
    assert np.isfinite(result["out"][~hit]).all()
    assert np.isfinite(result["q"][~hit]).all()
    assert np.isnan(result["k"][1, 4, 1:]).all()
    assert np.isfinite(result["k"][1, 4, 0]).all()
    assert result["bias"][1, 4, 2, 0] == 0


@EACH
def test_scores_that_are_all_minus_infinity(implementation):
    """Keys of -inf that no mask hides: weights and output 0, lse -inf, and the row's cotangents are ignored.

    What 0 * k is, in dq, is left open.
    """
    x = qkv()
    x["k"][0, 1, :, 0], x["q"][..., 0] = -np.inf, 1.0
    bias = random(pair_shape(x), 3)
    forward, backward = IMPLEMENTATIONS[implementation]
    (out, lse), cache = forward(x["q"], x["k"], x["v"], bias=bias, return_lse=True)
    dead = np.zeros((2, H), bool)
    dead[0, 2:4] = True  # the heads that read group 1
    assert (lse[dead] == -np.inf).all()
    assert np.isfinite(lse[~dead]).all()
    assert not out[dead].any()
    assert out[~dead].all()
    x["dout"][dead], x["dlse"][dead] = np.nan, np.nan
    grads = backward(x["dout"], cache, x["dlse"])
    for dk in (grads.k, grads.v):
        assert not dk[0, 1].any()
        assert np.isfinite(dk).all()
    assert not grads.bias[dead].any()
    assert np.isfinite(grads.bias).all()
    assert np.isfinite(grads.q[~dead]).all()
    if implementation == "dense":
        assert not cache.weights[dead].any()


# --- extreme scores --------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("names", [(), ("mask", "sink", "dropout_mask")], ids=["plain", "more"])
@pytest.mark.parametrize("level", [-1e4, -900.0, 720.0, 1e4])
def test_scores_beyond_the_range_of_exp(implementation, dtype, names, level):
    """All scores of a row near ``level``: exp of it is 0 or inf, the weights are as ever."""
    x = qkv(dtype=dtype)
    x["q"][..., 1, 0], x["k"][..., 0] = level, 1
    options = {name: option(name, pair_shape(x), dtype) for name in names}
    result = check_attention(implementation, x, scale=1.0, **options)
    assert np.isfinite(result["out"]).all()
    assert result["out"][..., 1, :].any() == ("sink" not in names or level > 0)


@EACH
def test_one_score_above_the_rest(implementation):
    """A weight of exactly 1 and others of exactly 0, in either order of the tiles."""
    for at in range(S):
        x = qkv()
        x["q"][..., 1, 0], x["k"][..., 0] = 1e4, 0
        x["k"][..., at, 0] = 1
        result = check_attention(implementation, x, scale=1.0)
        values = np.repeat(x["v"][:, :, at], H // SIZES["G"], axis=1)
        assert np.array_equal(result["out"][..., 1, :], values)


@EACH
def test_masked_scores_far_above_the_allowed(implementation):
    """A shift by the largest score of all, masked ones among them, would leave nothing of the others."""
    x = qkv()
    x["q"][..., 0], x["k"][..., 0] = 1, 0
    x["k"][..., 2, 0] = 1e4
    allowed = np.ones((L, S), bool)
    allowed[:, 2] = False
    result = check_attention(implementation, x, mask=allowed, scale=1.0)
    assert result["out"].all()


@EACH
@pytest.mark.parametrize("softcap", [1e-3, 2.0, 1e6])
def test_softcap_far_from_the_scores(implementation, softcap):
    """Saturated (scores 1e3 times the softcap and more) and as good as linear; what is masked stays masked."""
    x = qkv()
    x["q"][..., 1, :] *= 1e4
    result = check_attention(implementation, x, softcap=softcap, mask=holes(pair_shape(x)), bias=random((L, S), 3))
    assert np.isfinite(result["q"]).all()


@EACH
def test_large_finite_biases_are_not_masks(implementation):
    """finfo.min in a whole row is a constant: plain weights. Beside another score it is weight 0."""
    x = qkv(dtype=np.float32)
    bias = np.zeros((L, S), np.float32)
    bias[1] = np.finfo(np.float32).min
    bias[2, 3] = np.finfo(np.float32).min
    forward, backward = IMPLEMENTATIONS[implementation]
    (out, lse), cache = forward(x["q"], x["k"], x["v"], bias=bias, return_lse=True)
    mean = np.repeat(x["v"].mean(-2), 2, axis=1)  # the scores are lost beside it
    assert_close(out[..., 1, :], mean, np.repeat(np.abs(x["v"]).mean(-2), 2, axis=1))
    assert (lse[..., 1] == np.finfo(np.float32).min).all()
    grads = backward(x["dout"], cache, x["dlse"])
    assert all(np.isfinite(g).all() for g in (grads.q, grads.k, grads.v, grads.bias))
    assert grads.bias[2, 3] == 0


# --- gradients that are zero -----------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("names", [(), ("mask", "softcap")], ids=["plain", "more"])
def test_constant_values(implementation, names):
    """Where all v_j are one vector, out is that vector and weights do not matter: dq = dk = 0."""
    x = qkv()
    x["v"][:] = x["v"][:, :, :1]
    del x["dlse"]
    options = {name: option(name, pair_shape(x)) for name in names}
    result = check_attention(implementation, x, **options)
    alive = result["lse"] != -np.inf
    values = np.broadcast_to(np.repeat(x["v"][:, :, :1], 2, axis=1), result["out"].shape)
    assert_close(result["out"][alive], values[alive], np.abs(values[alive]))


@EACH
def test_zero_cotangent(implementation):
    """Zeros in, exact zeros out, and none of them NaN."""
    x = qkv()
    shape = pair_shape(x)
    x["dout"][:], x["dlse"][:] = 0, 0
    result = check_attention(implementation, x, **{name: option(name, shape) for name in NAMES})
    assert not any(result[name].any() for name in ("q", "k", "v", "bias", "sink", "scale"))


@EACH
def test_only_lse(implementation):
    """A loss of lse alone: no gradient of v, and that of the scores is the weights."""
    x = qkv()
    x["dout"][:] = 0
    result = check_attention(implementation, x, bias=random(pair_shape(x), 3), dropout_mask=dropped(pair_shape(x)))
    assert not result["v"].any()
    weights = result["expected"]["weights"]
    terms = weights * np.abs(x["dlse"])[..., None]
    assert_close(result["bias"], weights * x["dlse"][..., None], terms * (1 + np.abs(result["lse"]).max()))


# --- sizes -----------------------------------------------------------------------------------------------------------

EDGES = {
    "L=0": {"L": 0},
    "S=0": {"S": 0},
    "L=S=0": {"L": 0, "S": 0},
    "B=0": {"lead": (0,)},
    "H=G=0": {"H": 0, "G": 0},
    "H=0": {"H": 0},
    "E=0": {"E": 0},
    "D=0": {"D": 0},
    "L=1": {"L": 1},
    "S=1": {"S": 1},
    "L=S=1": {"L": 1, "S": 1},
    "D=E=1": {"D": 1, "E": 1},
    "L>S": {"L": 8, "S": 3},
    "L<S": {"L": 3, "S": 8},
    "rank2 L=0": {"lead": None, "L": 0},
    "rank2 S=0": {"lead": None, "S": 0},
}


@EACH
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("names", [(), ("sink",), NAMES], ids=["plain", "sink", "all"])
def test_sizes(implementation, edge, names):
    x = qkv(**EDGES[edge])
    shape = pair_shape(x)
    options = {name: option(name, shape) for name in names if name != "mask"}
    if "mask" in names:
        options["mask"] = np.random.default_rng(7).random(shape) < 0.6
    result = check_attention(implementation, x, **options)
    assert result["out"].shape == x["dout"].shape
    if shape[-1] == 0:  # no keys: every query is one without keys
        assert not result["out"].any()
        heads = options["sink"][:, None] if "sink" in names and len(shape) > 2 else options.get("sink", -np.inf)
        assert (result["lse"] == heads).all()
        assert result["scale"] == 0
    if shape[-1] == 1 and not names:
        value = np.repeat(x["v"], 2, axis=1)  # one key has weight 1; e v / e is not always v to the last bit
        assert_close(result["out"], np.broadcast_to(value, result["out"].shape), (implementation != "dense") * np.abs(value))
    if x["q"].shape[-1] == 0 and not names:
        mean = np.repeat(x["v"], 2, axis=1).mean(-2, keepdims=True)
        assert_close(
            result["out"],
            np.broadcast_to(mean, result["out"].shape),
            np.abs(np.repeat(x["v"], 2, axis=1)).sum(-2, keepdims=True),
        )


@EACH
@pytest.mark.parametrize("edge", EDGES)
def test_sizes_with_objects(implementation, edge):
    x = qkv(**EDGES[edge])
    shape = pair_shape(x)
    heads = shape[-3] if len(shape) > 2 else 1
    mask = causal(align="bottom_right") & window(2, None, align="top_left") & key_lengths(shape[-1])
    allowed = mask_loops("causal", shape, align="bottom_right") & mask_loops(
        "window", shape, left=2, right=None, align="top_left"
    )
    bias = Alibi(random((heads,), 1), align="top_left")
    values = alibi_loops(bias.slopes, shape, "top_left")
    result = check_attention(implementation, x, mask=mask, allowed=allowed, bias=bias, values=values)
    assert result["grads"].bias.slopes.shape == (heads,)


# --- memory ----------------------------------------------------------------------------------------------------------


def strided(a):
    big = np.full([2 * n + 1 for n in a.shape], np.nan, a.dtype)
    view = big[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS = {
    "read-only": read_only,
    "strided": strided,
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "backwards": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
}


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lead", [None, (2,)], ids=["rank2", "rank4"])
def test_layouts(implementation, layout, lead):
    x = {name: LAYOUTS[layout](a) for name, a in qkv(lead).items()}
    shape = pair_shape(x)
    options = {name: option(name, shape) for name in NAMES}
    options = {name: LAYOUTS[layout](a) if isinstance(a, np.ndarray) else a for name, a in options.items()}
    check_attention(implementation, x, **options)


@EACH
@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "dlse"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stride_0(implementation, name, axis):
    """A view with stride 0 is read, never written, and its gradient has the full shape of the view."""
    x = qkv()
    x[name] = np.broadcast_to(x[name].take([0], axis), x[name].shape)
    assert x[name].strides[axis] == 0
    options = {n: option(n, pair_shape(x)) for n in NAMES}
    check_attention(implementation, x, **options)


@EACH
def test_all_of_one_element(implementation):
    """The cotangent of a sum: ones of stride 0 everywhere, and so everything else."""
    x = {name: np.broadcast_to(a.flat[0], a.shape) for name, a in qkv().items()}
    shape = pair_shape(x)
    options = {"bias": np.broadcast_to(np.float64(0.3), shape), "sink": np.broadcast_to(np.float64(0.4), (H,))}
    check_attention(implementation, x, mask=np.broadcast_to(True, shape), **options)


@EACH
def test_one_array_for_all(implementation):
    """q, k and v may be the same array; their gradients are three."""
    x = qkv(None, L=5, S=5, D=7, E=7)
    x |= {"k": x["q"], "v": x["q"]}
    result = check_attention(implementation, x)
    assert not np.shares_memory(result["q"], result["k"])


@EACH
def test_caches_are_not_mixed_up(implementation):
    """Two forwards, then their backwards in the other order, with different shapes: no state outside the caches."""
    forward, backward = IMPLEMENTATIONS[implementation]
    cases = [(qkv(seed=s, L=n), n) for s, n in ((1, 4), (2, 6))]
    alone = []
    for x, _ in cases:
        _, cache = forward(x["q"], x["k"], x["v"])
        alone.append(backward(x["dout"], cache, x["dlse"]))
    caches = [forward(x["q"], x["k"], x["v"])[1] for x, _ in cases]
    for (x, _), cache, expected in reversed(list(zip(cases, caches, alone, strict=True))):
        grads = backward(x["dout"], cache, x["dlse"])
        assert all(np.array_equal(a, b) for a, b in zip(grads[:3], expected[:3], strict=True))


@EACH
def test_caches_hold_references(implementation):
    x = qkv()
    _, cache = IMPLEMENTATIONS[implementation][0](x["q"], x["k"], x["v"])
    assert all(getattr(cache, name) is x[name] for name in "qkv")


# --- the messages (test_bad_input has what is refused) -----------------------------------------------------------------------


def test_reshapes_in_messages_are_right():
    """The reshape that an error shows can be pasted."""
    x = qkv()
    bias = random((6, 4, 5), 1)
    with pytest.raises(ValueError, match="reshape") as caught:
        npattn.attention(x["q"], x["k"], x["v"], bias=bias)
    call = re.search(r"bias\.reshape\(([\d, ]+)\)", str(caught.value))
    x["bias"] = bias.reshape(tuple(map(int, call[1].split(","))))
    check_attention("dense", {name: x[name] for name in ("q", "k", "v", "dout", "dlse")}, bias=x["bias"])


# --- the comparison itself -------------------------------------------------------------------------------------------


def test_assert_close_sees_what_it_should():
    x = random((3, 4), 1)
    assert_close(x, x, np.abs(x))
    for wrong in (
        x * (1 + 20 * info(x.dtype).eps),
        np.where(x == x[1, 2], np.nan, x),
        np.where(x == x[1, 2], np.inf, x),
    ):
        with pytest.raises(AssertionError, match=r"\[\d, \d\] is"):
            assert_close(wrong, x, np.abs(x))
    with pytest.raises(AssertionError, match="expected nan"):
        assert_close(x, np.where(x == x[1, 2], np.nan, x), np.abs(x))
    with pytest.raises(AssertionError, match="shape"):
        assert_close(x[:2], x, 1)
    with pytest.raises(AssertionError, match="is"):
        assert_close(np.array([0.0, 1e-300]), np.zeros(2), 0)


@EACH
def test_a_sink_of_minus_infinity_has_no_gradient_beside_nan(implementation):
    """Its weight is 0 whatever the row sees; the gradient of a sink that is finite is NaN there."""
    x, (forward, backward) = qkv(), IMPLEMENTATIONS[implementation]
    x["q"][0, 1, 2] = x["q"][0, 2, 2] = np.nan
    sink = np.linspace(-1, 1, H)
    sink[1] = -np.inf
    out, cache = forward(x["q"], x["k"], x["v"], sink=sink)
    dsink = backward(np.ones_like(out), cache).sink
    assert dsink[1] == 0
    assert np.flatnonzero(np.isnan(dsink)).tolist() == [2]


@EACH
@pytest.mark.parametrize("imaginary", [0.0, 2.5, 9.0, -40.0])
def test_the_lse_of_a_dead_row_is_its_sink_also_where_it_is_complex(implementation, imaginary):
    x, (forward, _) = qkv(), IMPLEMENTATIONS[implementation]
    q, k, v = (a.astype(complex) for a in (x["q"], x["k"], x["v"]))
    sink = np.linspace(-1, 1, H) + 1j * imaginary
    allowed = np.ones((q.shape[-2], k.shape[-2]), bool)
    allowed[1] = False
    (_, lse), _ = forward(q, k, v, mask=allowed, sink=sink, return_lse=True)
    assert (lse[:, :, 1] == sink).all()
