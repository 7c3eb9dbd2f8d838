"""The built-in candidates: what `npattn verify` finds in each library, and that the adapters compute what npattn does.

That it is the library and not its adapter is shown by the findings: plain code of the library, run by test_peer_page.py.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

for library in ("torch", "jax", "onnx", "onnxruntime", "transformers"):
    pytest.importorskip(library, reason="needs the peers extra: pip install npattn[peers]")

import npattn as na
from npattn.convert import multi_head_to_torch, rnn_to_onnx, rnn_to_torch
from npattn.peers import PEERS
from npattn.tolerances import TERMS_EPS
from npattn.verify import CASES, Candidate, Settings, examine
from peers.agree import multi_head_terms, rnn_terms

# --- what is wrong, by our conventions, and why -----------------------------------------------------------------------------

# The weights of what is masked are 0, and 0 * NaN = NaN in a plain product with v, dout or k.
NAN_TIMES_0 = {"NaN behind the mask", "NaN seen later", "NaN in values that are seen"}
# The masked scores of a NaN in q or k meet -inf by addition, or their gradients a product.
NAN_KEY, NAN_QUERY = {"NaN in a key that is seen"}, {"NaN in a dead query"}
# Masks are a large finite number: a query without keys gets the mean of all values, and hands its gradient to them.
DEAD_ROWS = {
    "query_lengths", "packed", "causal bottom_right + L > S", "dead rows", "every row dead", "query_lengths 0 and L",
    "key_lengths 0 and S", "mask of one column", "dead rows + dlse", "dead rows + G < H", "dead rows + causal L > S",
}  # fmt: skip
DEAD_BY_BIAS = {"bias of -inf"}  # -inf - (-inf) = NaN in a softmax of a row of -inf
FLOAT32_SOFTMAX = {
    "float64", "float64 causal bottom_right + G < H", "float64 mask array + bias BHLS", "float64, inputs near-tie",
    "scores of -1e10 and a mask",
}  # fmt: skip
# The square root of the scale multiplies q and k.
ROOT_OF_NEGATIVE = {"negative scale", "softcap + negative scale", "inputs x30 + negative scale"}
NO_KEYS = {"S = 0"}  # the maximum of an empty row raises

TORCH = NAN_TIMES_0 | NAN_KEY | NAN_QUERY
FINDINGS = {
    "torch": TORCH,
    "torch-math": TORCH,
    "torch-flash": TORCH,
    "torch-flex": NAN_TIMES_0,
    "jax": TORCH | DEAD_ROWS | DEAD_BY_BIAS | FLOAT32_SOFTMAX,
    "onnx": NAN_TIMES_0 | NAN_KEY | ROOT_OF_NEGATIVE | NO_KEYS,
    "onnxruntime": NAN_TIMES_0 | NAN_KEY,
    "transformers-eager": TORCH | DEAD_ROWS | DEAD_BY_BIAS | FLOAT32_SOFTMAX | {"dead rows + softcap"},
    "transformers-sink": set(),
}
# How many cases are right at least: a candidate that supports nothing has no findings either.
RIGHT = {
    "torch": 100, "torch-math": 100, "torch-flash": 95, "torch-flex": 100, "jax": 80, "onnx": 105, "onnxruntime": 100,
    "transformers-eager": 95, "transformers-sink": 9,
}  # fmt: skip


@pytest.mark.parametrize("name", FINDINGS)
@pytest.mark.slow
def test_findings(name):
    candidate = Candidate(name, *PEERS[name].load())
    status = {case.name: examine(candidate, case, settings=Settings(power=False)).status for case in CASES}
    assert {case for case, s in status.items() if s == "wrong"} == FINDINGS[name]
    assert sum(s == "ok" for s in status.values()) >= RIGHT[name]


def test_all_attention_peers_have_a_table():
    assert {name for name, peer in PEERS.items() if peer.op == "attention"} == set(FINDINGS) == set(RIGHT)


def test_jax_computes_float16():
    """A compiled call raises on a CPU, so the adapter does not compile it; see the findings in npattn/peers/jax_nn.py."""
    forward, backward = PEERS["jax"].load()
    x = np.ones((1, 2, 1, 4), np.float16)
    for result in (forward(x, x, x)[0], *list(backward(x, x, x, x).values())[:3]):
        assert result.dtype == np.float16
        assert np.isfinite(result).all()


# --- the adapters of the layers ----------------------------------------------------------------------------------------------


def near(name, got, want, terms):
    """A peer's array is ours to the bound of agree.py, in the peer's own precision."""
    assert got.shape == want.shape, name
    bound = 2 * TERMS_EPS * float(np.finfo(got.dtype).eps) * float(np.max(terms))
    assert np.abs(got - want).max(initial=0.0) <= bound < np.abs(want).max(initial=0.0), name


MULTI_HEAD_MASKS = {"no mask": None, "LS": (5, 7), "B1LS": (2, 1, 5, 7), "BHLS": (2, 4, 5, 7), "B11S": (2, 1, 1, 7)}


def _mask(shape, rng):
    if shape is None:
        return None
    mask = rng.random(shape) < 0.7
    mask[..., 0] = True
    return mask


def _multi_head(rng, widths, biases):
    M, Mk, Mv = widths
    weights = [rng.standard_normal(s) for s in ((M, M), (Mk, M), (Mv, M), (M, M))]
    return na.MultiHeadParams(*weights, *(rng.standard_normal((4, M)) if biases else [None] * 4))


@pytest.mark.parametrize("mask", MULTI_HEAD_MASKS)
@pytest.mark.parametrize("widths", [(12, 12, 12), (12, 9, 10)])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("name", ["torch-mha", "torch-mha-weights"])
def test_torch_multi_head(name, biases, widths, mask):
    rng = np.random.default_rng(1)
    params, mask = _multi_head(rng, widths, biases), _mask(MULTI_HEAD_MASKS[mask], rng)
    x = [rng.standard_normal((2, n, m)) for n, m in zip((5, 7, 7), widths, strict=True)]
    dout = rng.standard_normal((2, 5, 12))
    out, cache = na.multi_head_forward(*x, params, 4, mask=mask)
    grads = na.multi_head_backward(dout, cache)
    terms = multi_head_terms(cache, dout)
    forward, backward = PEERS[name].load()
    state = multi_head_to_torch(params)
    near("out", forward(*x, state, num_heads=4, mask=mask), out, terms["out"])
    got = backward(dout, *x, state, num_heads=4, mask=mask)
    for n in ("x_q", "x_k", "x_v"):
        near(n, got[f"d{n}"], getattr(grads, n), terms[n])
    expected = multi_head_to_torch(grads.params)
    assert set(got["state_dict"]) == set(expected)
    for n, want in expected.items():
        largest = max(float(np.max(terms[f"{'b' if 'bias' in n else 'w'}_{p}"])) for p in ("o" if "out" in n else "qkv"))
        near(n, got["state_dict"][n], want, largest)


@pytest.mark.parametrize("mask", [None, (7, 7), (2, 1, 7, 7), (2, 4, 7, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torch_multi_head_fast_path(dtype, mask, monkeypatch):
    import torch

    taken, native = [], torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: taken.append(1) or native(*args))
    rng = np.random.default_rng(2)
    params, mask, x = _multi_head(rng, (12, 12, 12), True), _mask(mask, rng), rng.standard_normal((2, 7, 12))
    x = x.astype(dtype)
    params = na.MultiHeadParams(*(p.astype(dtype).astype(float) for p in params if p is not None))
    out, cache = na.multi_head_forward(*[x.astype(float)] * 3, params, 4, mask=mask)
    forward = PEERS["torch-mha-fast"].load()[0]
    state = {n: p.astype(dtype) for n, p in multi_head_to_torch(params).items()}
    got = forward(x, x, x, state, num_heads=4, mask=mask)
    assert taken
    assert got.dtype == dtype
    near("out", got, out, multi_head_terms(cache, np.ones_like(out))["out"])
    with pytest.raises(NotImplementedError, match="self-attention"):
        forward(x, x + 1, x, state, num_heads=4)
    with pytest.raises(NotImplementedError, match="even"):
        forward(x, x, x, state, num_heads=3)


def _rnn(M, N, *, biases=True):
    rng = np.random.default_rng(3)
    w_x, w_h, b = rng.standard_normal((M, N)), 0.4 * rng.standard_normal((N, N)), rng.standard_normal(N)
    return na.RNNParams(w_x, w_h, b if biases else None)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("lengths", [None, (6, 2, 4), (0, 3, 6)])
@pytest.mark.parametrize("name", ["torch-rnn", "onnx-rnn", "onnxruntime-rnn"])
def test_rnn(name, lengths, first, biases, nonlinearity):
    rng, params, n = np.random.default_rng(4), _rnn(4, 5, biases=biases), None if lengths is None else np.array(lengths)
    dtype = np.float32 if name == "onnxruntime-rnn" else np.float64

    def low(a):
        return None if a is None else a.astype(dtype)

    def same(a):
        return None if a is None else low(a).astype(float)

    x, h0 = same(rng.standard_normal((3, 6, 4))), same(rng.standard_normal((3, 5))) if first else None
    dh, dh_last = rng.standard_normal((3, 6, 5)), rng.standard_normal((3, 5))
    params = na.RNNParams(*map(same, params))
    options = {"lengths": n, "nonlinearity": nonlinearity}
    h, cache = na.rnn_forward(x, h0, params, **options)
    terms = rnn_terms(cache, dh, dh_last)
    forward, backward = PEERS[name].load()
    state = (rnn_to_torch if name == "torch-rnn" else rnn_to_onnx)(params)
    state = {key: low(a) for key, a in state.items()}
    arguments = (low(x), low(h0), state) if name == "torch-rnn" else (low(x), low(h0), *state.values())
    if (name == "torch-rnn" and lengths == (0, 3, 6)) or (name == "onnx-rnn" and nonlinearity == "relu"):
        with pytest.raises(NotImplementedError):
            forward(*arguments, **options)
        return
    got, last = forward(*arguments, **options)
    if name == "onnx-rnn" and lengths:  # a finding: see above
        assert np.abs(got - h).max() > 0.1
        return
    near("h", got, h, terms["h"])
    want_last = cache.h_last
    if name == "onnxruntime-rnn" and lengths == (0, 3, 6):  # a finding: 0, where nothing was read, and not h0
        want_last = np.where(n[:, None] == 0, 0, want_last)
    near("h_last", last, want_last, terms["h_last"])
    if name == "torch-rnn":
        grads, got = na.rnn_backward(dh, cache, dh_last), backward(dh, *arguments, dh_last=dh_last, **options)
        near("dx", got["dx"], grads.x, terms["x"])
        if first:
            near("dh0", got["dh0"], grads.h0, terms["h0"])
        expected = rnn_to_torch(grads.params, gradients=True)
        assert set(got["state_dict"]) == set(expected)
        for key, want in expected.items():
            near(key, got["state_dict"][key], want, terms["b" if "bias" in key else "w_x" if "ih" in key else "w_h"])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary(layout):
    rng, how = np.random.default_rng(0), na.Rotary(layout, base=500.0)
    x, dy, positions = rng.standard_normal((2, 3, 5, 8)), rng.standard_normal((2, 3, 5, 8)), rng.integers(-9, 99, (2, 5))
    forward, backward = PEERS["transformers-rotary"].load()
    y, cache = na.rotary_forward(x, positions, how)
    room = TERMS_EPS * np.finfo(float).eps * (1 + np.abs(positions).max())  # an angle rounds by eps of itself
    assert np.abs(forward(x, positions, layout=layout, base=500.0) - y).max() <= room * np.abs(x).max() * 2
    dx = backward(dy, x, positions, layout=layout, base=500.0)["dx"]
    assert np.abs(dx - na.rotary_backward(dy, cache).x).max() <= room * np.abs(dy).max() * 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["scipy-softmax", "torch-softmax", "jax-softmax"])
def test_softmax(name, dtype):
    rng = np.random.default_rng(5)
    scores, mask, dweights = rng.standard_normal((3, 4, 6)).astype(dtype), rng.random((3, 4, 6)) < 0.7, rng.standard_normal(6)
    mask[..., 0] = True
    dweights = np.broadcast_to(dweights.astype(dtype), scores.shape).copy()
    forward, backward = PEERS[name].load()
    for given in (None, mask):
        want, cache = na.softmax_forward(scores.astype(float), mask=given)
        got = forward(scores, mask=given)
        assert got.dtype == dtype
        near("weights", got, want, want * (1 + np.abs(scores) + np.abs(scores).max(-1, keepdims=True)))
        if backward is not None:
            grads = na.softmax_backward(dweights.astype(float), cache)
            got = backward(dweights, scores, mask=given)["dscores"]
            assert got.dtype == dtype
            near("dscores", got, grads.scores, 4 * np.abs(dweights).max() * (1 + np.abs(scores).max()))
    mask[0, 0] = False  # of rows without any: NaN, but for jax with its own mask
    dead = forward(scores, mask=mask)[0, 0]
    assert (dead == 0).all() if name == "jax-softmax" else np.isnan(dead).all()


ACTIVATIONS = [name for name, peer in PEERS.items() if peer.op in ("silu", "gelu", "relu", "squared_relu")]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, dtype):
    rng, op = np.random.default_rng(6), PEERS[name].op
    if dtype == np.float64 and name.startswith("onnx"):
        pytest.skip("a finding: Gelu of float64 has its constants in float32")
    x, dy = (rng.standard_normal((3, 4, 6)).astype(dtype) for _ in range(2))
    forward, backward = PEERS[name].load()
    for options in ({}, {"approximate": "none"}, {"approximate": "tanh"}) if op == "gelu" else ({},):
        want, cache = getattr(na, f"{op}_forward")(x.astype(float), **options)
        got = forward(x, **options)
        assert got.dtype == dtype
        near("y", got, want, 1 + np.abs(x))
        if backward is not None:
            grads = getattr(na, f"{op}_backward")(dy.astype(float), cache)
            near("dx", backward(dy, x, **options)["dx"], grads.x, np.abs(dy) * (1 + x * x))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction, dtype):
    rng = np.random.default_rng(6)
    logits, targets, mask = rng.standard_normal((3, 4, 6)).astype(dtype), rng.integers(0, 6, (3, 4)), rng.random((3, 4)) < 0.7
    dloss = rng.standard_normal((3, 4) if reduction == "none" else ())
    forward, backward = PEERS["torch-cross-entropy"].load()
    for given in (None, mask):
        options = {"mask": given, "reduction": reduction, "label_smoothing": 0.2}
        want, cache = na.cross_entropy_forward(logits.astype(float), targets, **options)
        got, size = forward(logits, targets, **options), 2 + 2 * np.abs(logits).max()
        assert got.dtype == dtype
        near("loss", got, np.asarray(want), size * (targets.size if reduction == "sum" else 1))
        grad = na.cross_entropy_backward(np.asarray(dloss), cache).logits
        got = backward(np.asarray(dloss, dtype), logits, targets, **options)["dlogits"]
        assert got.dtype == dtype
        near("dlogits", got, grad, size * np.abs(dloss).max())
    assert np.isnan(forward(logits, targets, mask=np.zeros_like(mask)))  # the mean of nothing, which is 0 here


# --- what holds for all of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FINDINGS)
def test_threads_and_fresh_arrays(name):
    """The same bits from four threads at once; nothing that is returned shares memory with an input or an earlier result."""
    rng, (forward, _) = np.random.default_rng(6), PEERS[name].load()
    calls = []
    for n in (3, 4, 5, 6):
        q, k, v = (rng.standard_normal((2, 2, m, 8)).astype(np.float32) for m in (n, n + 1, n + 1))
        mask = np.arange(n + 1) <= np.arange(n)[:, None] + 1
        calls.append(((q, k, v), {"mask": mask, **({"sink": np.float32([0.5, -1])} if name == "transformers-sink" else {})}))

    def run(i):
        result = forward(*calls[i][0], **calls[i][1])
        return result if isinstance(result, tuple) else (result,)

    alone, seen = [run(i) for i in range(4)], {}

    def work(start):
        for step in range(20):
            i = (start + step) % 4
            seen[start, step] = (i, run(i))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80
    for i, result in seen.values():
        for a, b in zip(result, alone[i], strict=True):
            assert a.dtype == np.float32
            assert np.array_equal(a, b)
            assert not any(np.shares_memory(a, x) for x in (b, *calls[i][0]))


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "npattn.peers.jax_nn", raising=False)
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError, match=r"jax is not installed: pip install npattn\[peers\], or jax alone"):
        PEERS["jax"].load()


def test_forced_flash_says_what_it_refuses():
    forward, backward = PEERS["torch-flash"].load()
    q, v = np.ones((1, 1, 2, 4), np.float32), np.ones((1, 1, 2, 3), np.float32)
    with pytest.raises(NotImplementedError, match="same last dimension"):
        forward(q, q, v)
    with pytest.raises(NotImplementedError, match="no FLASH_ATTENTION kernel"):
        backward(q, q, q, q, bias=np.zeros((1, 1, 2, 2), np.float32))
