"""Multi-head attention against explicit heads, its gradients by complex step and central differences, and its edges."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
from helpers import IMPLEMENTATIONS as PAIRS
from helpers import assert_close
from oracles import multi_head_loops

import npattn
from npattn import (
    Alibi,
    MultiHeadParams,
    NormParams,
    Rotary,
    causal,
    gradcheck,
    keys,
    multi_head,
    multi_head_backward,
    multi_head_decode,
    multi_head_forward,
)
from npattn.ops.multihead import IMPLEMENTATIONS
from npattn.tolerances import ANGLE_ROUNDINGS, TERMS_EPS

B, H, G, L, S, D, E, M, Mk, Mv, OUT = 2, 4, 2, 3, 5, 6, 7, 8, 9, 10, 11


def params(rng, *, H=H, G=G, biases=True, dtype=np.float64, complete=None):
    shapes = {"w_q": (M, H * D), "w_k": (Mk, G * D), "w_v": (Mv, G * E), "w_o": (H * E, OUT)}
    shapes |= {"b_q": (H * D,), "b_k": (G * D,), "b_v": (G * E,), "b_o": (OUT,)} if biases else {}
    if complete is not None:
        shapes = {n: s for n, s in shapes.items() if n.startswith("w") or n in complete}
    return MultiHeadParams(**{n: (rng.standard_normal(s) * (s[0] ** -0.5)).astype(dtype) for n, s in shapes.items()})


def arrays_of(params):
    """All arrays of parameters or gradients, those of the norms of q and k, too."""
    return [y for x in params if x is not None for y in (x if isinstance(x, tuple) else (x,)) if y is not None]


def inputs(rng, lead=(B,), dtype=np.float64):
    return {n: rng.standard_normal((*lead, *s)).astype(dtype) for n, s in (("x_q", (L, M)), ("x_k", (S, Mk)), ("x_v", (S, Mv)))}


OPTIONS = {
    "plain": {},
    "mask": {"mask": np.random.default_rng(7).random((L, S)) < 0.7},
    "causal": {"mask": causal(offset=1)},
    "keys": {"mask": keys(np.array([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]], bool))},
    "bias": {"bias": np.random.default_rng(8).standard_normal((H, 1, S))[None]},
    "alibi": {"bias": Alibi(np.linspace(0.1, 0.4, H), align="bottom_right")},
    "scale": {"scale": -0.3},
    "softcap": {"softcap": 1.2},
    "sink": {"sink": np.random.default_rng(9).standard_normal(H)},
    "dropout": {"dropout_mask": (np.random.default_rng(10).random((B, H, L, S)) < 0.8) / 0.8},
}
# Each option alone, and all that fit together: every pair stands in one of these, and test_grid has each pair alone.
COMBINATIONS = [(name,) for name in OPTIONS] + [
    (mask, bias, "scale", "softcap", "sink", "dropout")
    for mask, bias in itertools.product(("mask", "causal", "keys"), ("bias", "alibi"))
]


def functions(names, implementation, groups):
    options = {key: x for name in names for key, x in OPTIONS[name].items() if key not in ("bias", "sink")}
    inputs = {key: x for name in names for key, x in OPTIONS[name].items() if key in ("bias", "sink")}

    def forward(**x):
        return multi_head_forward(**x, **options, num_heads=H, num_kv_heads=groups, implementation=implementation)

    return forward, multi_head_backward, inputs


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("names", COMBINATIONS, ids=" + ".join)
def test_every_gradient(names, implementation):
    rng = np.random.default_rng(COMBINATIONS.index(names))
    forward, backward, extra = functions(names, implementation, G)
    given = inputs(rng) | {"params": params(rng)} | extra
    # A key bias shifts all scores of a row: without softcap or sink nothing sees it.
    zero = () if {"softcap", "sink"} & set(names) else ("b_k",)
    with mock.patch.dict(IMPLEMENTATIONS, blockwise=PAIRS["tiles"]):
        gradcheck(forward, backward, given, zero=zero, elements=4 if implementation == "dense" else 0)
        if implementation == "dense":
            gradcheck(forward, backward, given, zero=zero, elements=0, method="central")


@pytest.mark.parametrize("biases", [(), ("b_q",), ("b_k", "b_v"), ("b_o",), ("b_q", "b_k", "b_v", "b_o")], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_with_some_biases_and_groups(groups, biases):
    rng = np.random.default_rng(groups)
    forward, backward, _ = functions(("plain",), "dense", groups)
    given = inputs(rng) | {"params": params(rng, G=groups, complete=biases)}
    gradcheck(forward, backward, given, zero=("b_k",) if "b_k" in biases else (), elements=6)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lead", [(), (B,), (2, 3)], ids=str)
def test_forward_is_that_of_explicit_heads(lead, groups, implementation):
    rng = np.random.default_rng(0)
    p, x = params(rng, G=groups), inputs(rng, lead)
    options = {**x, "params": p, "num_heads": H, "num_kv_heads": groups, "mask": causal(offset=2)}
    options["implementation"] = implementation
    out, cache = multi_head_forward(**options)
    allowed = np.broadcast_to(np.arange(S) <= np.arange(L)[:, None] + 2, (*lead, H, L, S))
    expected = multi_head_loops(*x.values(), *p, num_heads=H, num_kv_heads=groups, allowed=allowed)["out"]
    size = np.abs(x["x_v"]).max() * np.abs(p.w_v).max() * np.abs(p.w_o).max() * H * E * Mv * 20
    assert np.abs(out - expected).max() <= TERMS_EPS * np.finfo(float).eps * size
    assert out.shape == (*lead, L, OUT)
    assert cache.attention.lse.shape == (*lead, H, L)
    assert np.array_equal(out, multi_head(**options))


def test_self_attention_adds_up():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, L, M))
    p = MultiHeadParams(*(rng.standard_normal(s) for s in ((M, H * D), (M, H * D), (M, H * E), (H * E, M))))
    rows = gradcheck(
        lambda x, params: multi_head_forward(x, x, x, params, H, mask=causal()),
        lambda d, c: (lambda g: {"x": g.x_q + g.x_k + g.x_v, "params": g.params})(multi_head_backward(d, c)),
        {"x": x, "params": p},
        elements=50,
    )
    assert min(row.size for row in rows) > 0


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_a_query_without_keys_gives_b_o_and_nothing_reaches_anything(implementation):
    rng = np.random.default_rng(0)
    p, x = params(rng), inputs(rng)
    mask = np.ones((L, S), bool)
    mask[1] = False  # query 1 sees nothing
    mask[:, 3] = False  # key 3 is seen by nobody
    clean = multi_head_forward(**x, params=p, num_heads=H, num_kv_heads=G, mask=mask, implementation=implementation)
    dout = rng.standard_normal(clean[0].shape)
    grads = multi_head_backward(dout, clean[1])
    for a in x.values():
        a.flags.writeable = True
    x["x_q"][:, 1], x["x_k"][:, 3], x["x_v"][:, 3] = np.nan, np.inf, np.nan
    out, cache = multi_head_forward(**x, params=p, num_heads=H, num_kv_heads=G, mask=mask, implementation=implementation)
    assert np.array_equal(out, clean[0])
    assert np.array_equal(out[:, 1], np.broadcast_to(p.b_o, (B, OUT)))
    spoilt = multi_head_backward(dout, cache)
    for name, before in clean[1].params._asdict().items():
        assert before is getattr(p, name)
    for name in MultiHeadParams._fields[:8]:
        assert np.isfinite(getattr(spoilt.params, name)).all(), name
        near(getattr(spoilt.params, name), getattr(grads.params, name))
    for name in ("x_q", "x_k", "x_v"):
        near(getattr(spoilt, name), getattr(grads, name))
    assert not spoilt.x_q[:, 1].any()
    assert not spoilt.x_k[:, 3].any()
    assert not spoilt.x_v[:, 3].any()
    # b_o is what that query's output is, so its cotangent reaches b_o, and b_o alone
    dout[:, 1] = np.nan
    last = multi_head_backward(dout, cache)
    assert np.isnan(last.params.b_o).all()
    assert all(np.isfinite(x).all() for n, x in last.params._asdict().items() if n != "b_o" and x is not None)
    assert all(np.isfinite(x).all() for x in (last.x_q, last.x_k, last.x_v))


def near(x, y):
    assert np.abs(x - y).max() <= TERMS_EPS * np.finfo(float).eps * 100 * max(1.0, np.abs(y).max())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_dtypes(dtype):
    rng = np.random.default_rng(0)
    p, x = params(rng, dtype=dtype), inputs(rng, dtype=dtype)
    bias, sink = (
        rng.standard_normal((1, H, L, S)).astype(dtype),
        rng.standard_normal(H).astype(np.float32 if dtype is np.float16 else dtype),
    )
    out, cache = multi_head_forward(**x, params=p, num_heads=H, num_kv_heads=G, bias=bias, sink=sink)
    g = multi_head_backward(out, cache)
    assert {x.dtype for x in (out, g.x_q, g.x_k, g.x_v, g.bias, *arrays_of(g.params))} == {np.dtype(dtype)}
    assert g.sink.dtype == sink.dtype
    # rounded once: float16 inputs give what float32 gives, to the last bit of float16
    wide = [MultiHeadParams(*(w.astype(np.float64) for w in arrays_of(p))), {n: a.astype(np.float64) for n, a in x.items()}]
    exact = multi_head(
        **wide[1], params=wide[0], num_heads=H, num_kv_heads=G, bias=bias.astype(np.float64), sink=sink.astype(np.float64)
    )
    ulp = max(float(np.finfo(dtype).eps), float(np.finfo(np.float64).eps))  # exact is a float64
    # one rounding at the end, and those of the computing dtype before it
    assert (
        np.abs(out.astype(np.float64) - exact).max() <= (0.51 if dtype is np.float16 else 40) * ulp * np.abs(exact).max() * 1.01
    )


def test_alibi_in_float16_keeps_its_class_and_dtype():
    rng = np.random.default_rng(0)
    p, x = params(rng, dtype=np.float16), inputs(rng, dtype=np.float16)
    bias = Alibi(np.linspace(0.1, 0.4, H).astype(np.float16), align="bottom_right")
    out, cache = multi_head_forward(**x, params=p, num_heads=H, num_kv_heads=G, bias=bias)
    g = multi_head_backward(out, cache)
    assert isinstance(g.bias, Alibi)
    assert g.bias.slopes.dtype == np.float16
    assert g.bias.slopes.any()


@pytest.mark.parametrize("letter", ["B", "L", "S"])
def test_empty(letter):
    rng = np.random.default_rng(0)
    sizes = {"B": B, "L": L, "S": S} | {letter: 0}
    x = {n: rng.standard_normal((sizes["B"], sizes[a], w)) for n, a, w in (("x_q", "L", M), ("x_k", "S", Mk), ("x_v", "S", Mv))}
    p = params(rng)
    for implementation in ("dense", "blockwise"):
        out, cache = multi_head_forward(**x, params=p, num_heads=H, num_kv_heads=G, implementation=implementation)
        assert out.shape == (sizes["B"], sizes["L"], OUT)
        assert np.array_equal(out, np.broadcast_to(p.b_o, out.shape))
        g = multi_head_backward(np.ones_like(out), cache)
        assert [a.shape for a in arrays_of(g.params)] == [a.shape for a in arrays_of(p)]
        assert not g.params.w_v.any()


def test_the_second_backward_gives_the_same_bits_and_inputs_stay():
    rng = np.random.default_rng(0)
    p, x = params(rng), inputs(rng)
    arrays = [*x.values(), *arrays_of(p)]
    for a in arrays:
        a.flags.writeable = False
    before = [a.tobytes() for a in arrays]
    out, cache = multi_head_forward(**x, params=p, num_heads=H, num_kv_heads=G)
    first, second = multi_head_backward(out, cache), multi_head_backward(out, cache)
    for a, b in zip((*arrays_of(first.params), *first[:3]), (*arrays_of(second.params), *second[:3]), strict=True):
        assert a.tobytes() == b.tobytes()
    assert [a.tobytes() for a in arrays] == before
    assert npattn.MultiHeadGrads._fields == ("x_q", "x_k", "x_v", "params", "bias", "sink")


# --- norms of q and k, rotary positions ---------------------------------------------------------------------------------


TURNED = {
    "half": {"rotary": Rotary("half", width=4), "q_pos": np.arange(2, 5), "k_pos": np.arange(S)},
    "interleaved": {"rotary": Rotary("interleaved"), "q_pos": np.array([[7, 8, 1], [0, 0, 2]]),
                    "k_pos": np.arange(B * S).reshape(B, S)},
    "none": {},
}  # fmt: skip
NORMS = {"none": (), "q": ("q_norm",), "both": ("q_norm", "k_norm")}


def with_norms(rng, p, names):
    return p._replace(**{n: NormParams(1 + 0.3 * rng.standard_normal(D)) for n in names})


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("turned", TURNED)
def test_norms_and_rotary_are_those_of_explicit_heads(turned, norms, groups):
    rng = np.random.default_rng(groups)
    p, x = with_norms(rng, params(rng, G=groups), NORMS[norms]), inputs(rng)
    options = {"num_heads": H, "num_kv_heads": groups, **TURNED[turned], "norm_eps": 1e-3}
    out = multi_head(**x, params=p, **options)
    how = vars(options["rotary"]) if "rotary" in options else None
    expected = multi_head_loops(*x.values(), *p, **options | {"rotary": how})["out"]
    size = np.abs(x["x_v"]).max() * np.abs(p.w_v).max() * np.abs(p.w_o).max() * H * E * Mv * 20
    assert np.abs(out - expected).max() <= TERMS_EPS * np.finfo(float).eps * size


@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("turned", TURNED)
def test_gradients_through_norms_and_rotary(turned, norms, method):
    rng = np.random.default_rng(5)
    given = inputs(rng) | {"params": with_norms(rng, params(rng), NORMS[norms])}
    mask = np.random.default_rng(7).random((L, S)) < 0.7
    zero = ("b_k",) if turned == norms == "none" or (norms == "q" and turned == "none") else ()

    def forward(**x):
        return multi_head_forward(**x, num_heads=H, num_kv_heads=G, mask=mask, **TURNED[turned])

    gradcheck(forward, multi_head_backward, given, zero=zero, elements=4, method=method)


def test_positions_are_counted_from_0_where_l_is_s():
    rng = np.random.default_rng(0)
    shapes = ((M, H * D), (M, H * D), (M, H * E), (H * E, M))
    x, p = rng.standard_normal((B, L, M)), MultiHeadParams(*(rng.standard_normal(s) for s in shapes))
    for how in (Rotary("half"), Rotary("interleaved")):
        out = multi_head(x, x, x, p, H, rotary=how)
        assert np.array_equal(out, multi_head(x, x, x, p, H, rotary=how, q_pos=np.arange(L), k_pos=np.arange(L)))
        assert not np.allclose(out, multi_head(x, x, x, p, H))
    far = multi_head(x, x, x, p, H, rotary=how, q_pos=np.arange(L) + 100, k_pos=np.arange(L) + 100)
    assert_close(far, out, (100 + L) * ANGLE_ROUNDINGS * np.abs(out).max())  # an angle of 100 is off by 100 units


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
def test_norms_have_a_dtype_of_their_own(dtype):
    rng = np.random.default_rng(0)
    computing = np.float32 if dtype is np.float16 else dtype
    p, x = params(rng, dtype=dtype), inputs(rng, dtype=dtype)
    for own in {dtype, computing}:
        q = p._replace(q_norm=NormParams(np.ones(D, own)), k_norm=NormParams())
        out, cache = multi_head_forward(**x, params=q, num_heads=H, num_kv_heads=G, **TURNED["half"])
        grads = multi_head_backward(out, cache)
        assert out.dtype == grads.x_q.dtype == dtype
        assert grads.params.q_norm.g.dtype == own
        assert grads.params.k_norm == NormParams()


def test_nan_in_what_is_not_seen_reaches_no_norm():
    rng = np.random.default_rng(0)
    p, x = with_norms(rng, params(rng), NORMS["both"]), inputs(rng)
    mask = np.ones((L, S), bool)
    mask[1], mask[:, 3] = False, False
    call = {"num_heads": H, "num_kv_heads": G, "mask": mask, **TURNED["half"]}
    clean, cache = multi_head_forward(**x, params=p, **call)
    dout = rng.standard_normal(clean.shape)
    want = multi_head_backward(dout, cache)
    x["x_q"][:, 1], x["x_k"][:, 3], x["x_v"][:, 3] = np.nan, np.inf, np.nan
    out, cache = multi_head_forward(**x, params=p, **call)
    got = multi_head_backward(dout, cache)
    assert np.array_equal(out, clean)
    for a, b in zip((*got[:3], *arrays_of(got.params)), (*want[:3], *arrays_of(want.params)), strict=True):
        near(a, b)


@pytest.mark.parametrize(("options", "text"), [
    ({"rotary": Rotary("half")}, "got L=3 queries and S=5 keys, and where they stand is not given; expected q_pos"),
    ({"q_pos": np.arange(L)}, "multi_head: got q_pos or k_pos without rotary"),
    ({"rotary": Rotary("half"), "q_pos": np.arange(4)}, r"multi_head: q_pos has shape \(4,\), expected \(L=3,\) or one row"),
    ({"rotary": Rotary("half"), "q_pos": np.arange(3), "k_pos": np.arange(3)}, r"multi_head: k_pos has shape \(3,\)"),
    ({"rotary": Rotary("half", width=8), "q_pos": np.arange(3)}, "multi_head: rotary.width is 8, expected at most D=6"),
])  # fmt: skip
def test_wrong_positions_are_named(options, text):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=text):
        multi_head(**inputs(rng), params=params(rng), num_heads=H, num_kv_heads=G, **options)


def test_a_norm_of_all_heads_together_is_named():
    rng = np.random.default_rng(0)
    p = params(rng)._replace(q_norm=NormParams(np.ones(H * D)))
    with pytest.raises(ValueError, match=r"multi_head: q_norm.g has shape \(24,\), expected \(D=6,\): each head"):
        multi_head(**inputs(rng), params=p, num_heads=H, num_kv_heads=G)
    with pytest.raises(TypeError, match=r"multi_head: q_norm is an array of dtype float64, expected npattn\.Norm"):
        multi_head(**inputs(rng), params=p._replace(q_norm=np.ones(D)), num_heads=H, num_kv_heads=G)


# --- decoding -------------------------------------------------------------------------------------------------------------


def decoder(dtype=np.float64, tokens=11):
    rng = np.random.default_rng(3)
    shapes = ((M, H * D), (M, G * D), (M, G * E), (H * E, M), (H * D,), (G * D,), (G * E,), (M,))
    p = MultiHeadParams(*((rng.standard_normal(s) * s[0] ** -0.5).astype(dtype) for s in shapes))
    norms = {n: NormParams((1 + 0.3 * rng.standard_normal(D)).astype(dtype)) for n in NORMS["both"]}
    return rng.standard_normal((B, tokens, M)).astype(dtype), p._replace(**norms)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("chunks", [(1,) * 11, (4, 1, 6), (11,), (0, 5, 0, 6)], ids=str)
@pytest.mark.parametrize("how", [Rotary("half"), Rotary("interleaved", width=2), None], ids=str)
def test_decoding_gives_the_whole_forward(how, chunks, implementation):
    x, p = decoder()
    options = {"num_kv_heads": G, "rotary": how, "implementation": implementation, "softcap": 3.0, "sink": np.arange(4.0)}
    whole = multi_head(x, x, x, p, H, mask=causal(), **options)
    past, outs = None, []
    for part in np.split(x, np.cumsum(chunks)[:-1], 1):
        out, past = multi_head_decode(part, p, H, past, mask=causal(align="bottom_right"), **options)
        outs.append(out)
    assert past.length == past.k.shape[-2] == 11
    near(np.concatenate(outs, 1), whole)


def test_decoding_copies_each_token_a_few_times_at_most():
    x, p = decoder(np.float32, tokens=200)
    past, copied, memory = None, 0, None
    for i in range(200):
        _, past = multi_head_decode(x[:, i : i + 1], p, H, past, num_kv_heads=G)
        if past.k.base is not memory:
            memory, copied = past.k.base, copied + past.length
    assert copied < 3 * 200


def test_a_cache_never_changes_and_may_be_continued_twice():
    x, p = decoder()
    call = {"num_kv_heads": G, "rotary": Rotary("half")}
    _, past = multi_head_decode(x[:, :3], p, H, **call)
    _, past = multi_head_decode(x[:, 3:4], p, H, past, **call)
    before = past.k.copy(), past.v.copy()
    one, first = multi_head_decode(x[:, 4:5], p, H, past, **call)
    kept = first.k.copy()
    two, second = multi_head_decode(x[:, 5:6], p, H, past, **call)
    assert np.array_equal(first.k, kept)
    assert not np.array_equal(first.k, second.k)
    assert np.array_equal(past.k, before[0])
    assert np.array_equal(past.v, before[1])
    assert np.array_equal(multi_head_decode(x[:, 4:5], p, H, past, **call)[0], one)
    with pytest.raises(ValueError, match="read-only"):
        past.k[...] = 0
    assert one.shape == two.shape


def test_positions_of_decoding_may_be_those_of_each_sequence():
    """Sequences that are padded in front, so that their positions begin later."""
    x, p = decoder()
    how, at = {"num_kv_heads": G, "rotary": Rotary("half")}, np.array([np.arange(11), np.maximum(np.arange(11) - 4, 0)])
    whole = multi_head(x, x, x, p, H, mask=causal(), q_pos=at, k_pos=at, **how)
    past, outs = None, []
    for i in range(11):
        out, past = multi_head_decode(x[:, i : i + 1], p, H, past, positions=at[:, i : i + 1], **how)
        outs.append(out)
    near(np.concatenate(outs, 1), whole)


def test_what_decoding_refuses():
    x, p = decoder()
    _, past = multi_head_decode(x[:, :3], p, H, num_kv_heads=G)
    with pytest.raises(TypeError, match=r"cache is a npattn\.ops\.multihead\.KVCache, .* decoding has no backward"):
        multi_head_backward(x, past)
    with pytest.raises(TypeError, match=r"multi_head_decode: past is a tuple, expected npattn\.KVCache"):
        multi_head_decode(x, p, H, (past.k, past.v), num_kv_heads=G)
    with pytest.raises(ValueError, match=r"past has keys of shape \(2, 2, 3, 6\), float64, expected \(1, 2, 'any', 6\)"):
        multi_head_decode(x[:1], p, H, past, num_kv_heads=G)
    with pytest.raises(ValueError, match="multi_head_decode: got positions without rotary"):
        multi_head_decode(x, p, H, past, num_kv_heads=G, positions=np.arange(11))
