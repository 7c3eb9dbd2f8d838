"""Parameter layouts to and fro, without the libraries that they are of; tests/peers runs those."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from npattn import FeedForwardParams, GRUParams, LinearParams, LSTMParams, MultiHeadParams, NormParams, RNNParams, convert

rng = np.random.default_rng(0)
M, WIDTH, N = 5, 6, 7


def params(*, same, biases):
    widths = (WIDTH,) * 3 if same else (WIDTH, 3, 4)
    weights = [rng.standard_normal((w, WIDTH)) for w in (*widths, WIDTH)]
    return MultiHeadParams(*weights, *([rng.standard_normal(WIDTH) for _ in range(4)] if biases else []))


def same(a, b):
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("widths", "packed"), [(True, None), (True, True), (True, False), (False, None), (False, False)])
def test_multi_head_to_torch_and_back(widths, packed, biases):
    p = params(same=widths, biases=biases)
    state = convert.multi_head_to_torch(p, packed=packed)
    assert ("in_proj_weight" in state) == (widths if packed is None else packed)
    assert state["out_proj.weight"].shape == (WIDTH, WIDTH)
    assert same(convert.multi_head_from_torch(state), p)
    if "in_proj_weight" in state:  # rows: q, then k, then v; applied as x W^T
        assert np.array_equal(state["in_proj_weight"][WIDTH : 2 * WIDTH].T, p.w_k)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layer", "reverse", "end"), [(0, False, "_l0"), (2, False, "_l2"), (1, True, "_l1_reverse")])
def test_rnn_to_torch_and_back(layer, reverse, end, bias):
    p = RNNParams(*(rng.standard_normal(s) for s in ((M, N), (N, N), (N,))))
    p = p if bias else p._replace(b=None)
    state = convert.rnn_to_torch(p, layer=layer, reverse=reverse)
    assert state[f"weight_ih{end}"].shape == (N, M)
    assert same(convert.rnn_from_torch(state, layer=layer, reverse=reverse), p)
    grads = convert.rnn_to_torch(p, layer=layer, reverse=reverse, gradients=True)
    if bias:
        assert np.array_equal(grads[f"bias_ih{end}"], p.b)
        assert np.array_equal(grads[f"bias_hh{end}"], p.b)
        assert not state[f"bias_hh{end}"].any()


@pytest.mark.parametrize("bias", [True, False])
def test_rnn_to_onnx_and_back(bias):
    p = RNNParams(*(rng.standard_normal(s) for s in ((M, N), (N, N), (N,))))
    p = p if bias else p._replace(b=None)
    state = convert.rnn_to_onnx(p)
    assert state["W"].shape == (1, N, M)
    assert same(convert.rnn_from_onnx(**state), p)
    if bias:
        assert np.array_equal(convert.rnn_to_onnx(p, gradients=True)["B"], np.concatenate([p.b, p.b])[None])


def test_the_two_biases_of_onnx_are_summed_and_a_direction_is_picked():
    W, R, B = rng.standard_normal((2, N, M)), rng.standard_normal((2, N, N)), rng.standard_normal((2, 2 * N))
    p = convert.rnn_from_onnx(W, R, B, direction=1)
    assert np.array_equal(p.w_x, W[1].T)
    assert np.array_equal(p.w_h, R[1].T)
    assert np.array_equal(p.b, B[1, :N] + B[1, N:])


@pytest.mark.parametrize("bias", [True, False])
def test_linear_to_torch_and_back(bias):
    p = LinearParams(rng.standard_normal((M, N)), rng.standard_normal(N) if bias else None)
    state = convert.linear_to_torch(p, prefix="lm_head.")
    assert {n: x.shape for n, x in state.items()} == {"lm_head.weight": (N, M), **({"lm_head.bias": (N,)} if bias else {})}
    assert same(convert.linear_from_torch(state, prefix="lm_head."), p)
    assert same(convert.linear_from_torch(convert.linear_to_torch(p)), p)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("plus_one", [True, False])
def test_norm_to_torch_and_back(bias, plus_one):
    p = NormParams(1 + np.arange(M) / 8, rng.standard_normal(M) if bias else None)  # g - 1 is exact
    state = convert.norm_to_torch(p, prefix="norm.", plus_one=plus_one)
    assert list(state) == ["norm.weight", "norm.bias"][: 1 + bias]
    assert np.array_equal(state["norm.weight"], p.g - plus_one)
    assert same(convert.norm_from_torch(state, prefix="norm.", plus_one=plus_one), p)


def test_the_1_of_gemma_is_added_in_float32():
    stored = {"weight": np.array([2.0**-10, -0.5], ml_dtypes.bfloat16)}
    assert np.array_equal(convert.norm_from_torch(stored, plus_one=True).g, np.array([1 + 2.0**-10, 0.5], np.float32))
    assert convert.norm_from_torch(stored).g.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("biases", [("b_in", "b_out", "b_gate"), (), ("b_in", "b_gate"), ("b_out",), ("b_in",)])
@pytest.mark.parametrize("packed", [True, False])
def test_feed_forward_to_llama_and_back(packed, biases):
    shapes = {"w_in": (M, N), "w_out": (N, WIDTH), "w_gate": (M, N), "b_in": (N,), "b_out": (WIDTH,), "b_gate": (N,)}
    p = FeedForwardParams(**{n: rng.standard_normal(s) for n, s in shapes.items() if n[0] == "w" or n in biases})
    if packed and biases == ("b_in",):
        with pytest.raises(ValueError, match="feed_forward_to_llama: got one of b_in and b_gate, expected both or none"):
            convert.feed_forward_to_llama(p, packed=packed)
        return
    state = convert.feed_forward_to_llama(p, packed=packed, prefix="mlp.")
    assert same(convert.feed_forward_from_llama(state, prefix="mlp."), p)
    assert state["mlp.down_proj.weight"].shape == (WIDTH, N)
    assert ("mlp.down_proj.bias" in state) == (p.b_out is not None)
    if packed:  # rows: the gate, then the value
        assert np.array_equal(state["mlp.gate_up_proj.weight"][:N].T, p.w_gate)
    else:
        assert np.array_equal(state["mlp.up_proj.weight"].T, p.w_in)


def test_what_llama_does_not_hold_is_named():
    plain = FeedForwardParams(np.ones((M, N)), np.ones((N, M)))
    with pytest.raises(ValueError, match="feed_forward_to_llama: w_gate is None, expected the weight of a gate"):
        convert.feed_forward_to_llama(plain)
    with pytest.raises(ValueError, match=r"linear_from_torch: down_proj.weight is missing"):
        convert.feed_forward_from_llama({})
    with pytest.raises(ValueError, match=r"gate_proj.weight has shape \(5, 7\), expected \(7, any\)"):
        convert.feed_forward_from_llama({"down_proj.weight": np.ones((M, N)), "gate_proj.weight": np.ones((M, N))})
# --- gru and lstm -----------------------------------------------------------------------------------------------------------


def gated(gates, *, biases):
    make, width = (GRUParams, 3 * N) if gates == 3 else (LSTMParams, 4 * N)
    weights = [rng.standard_normal(s) for s in ((M, width), (N, width))]
    return make(*weights, *(rng.standard_normal(width) if biases else None for _ in make._fields[2:]))


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("layer", "reverse", "end"), [(0, False, "_l0"), (2, False, "_l2"), (1, True, "_l1_reverse")])
@pytest.mark.parametrize("gates", [3, 4])
def test_gru_and_lstm_to_torch_and_back(gates, layer, reverse, end, biases):
    p, op = gated(gates, biases=biases), "gru" if gates == 3 else "lstm"
    to, back = getattr(convert, f"{op}_to_torch"), getattr(convert, f"{op}_from_torch")
    state = to(p, layer=layer, reverse=reverse)
    assert list(state) == [f"{name}{end}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if biases else 2]]
    assert state[f"weight_ih{end}"].shape == (gates * N, M)
    assert same(back(state, layer=layer, reverse=reverse), p)
    if gates == 4 and biases:
        assert not state[f"bias_hh{end}"].any()
        grads = to(p, layer=layer, reverse=reverse, gradients=True)
        assert np.array_equal(grads[f"bias_ih{end}"], p.b)
        assert np.array_equal(grads[f"bias_hh{end}"], p.b)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("gates", "order"), [(3, (1, 0, 2)), (4, (0, 3, 1, 2))])  # z r h of r z h; i o f c of i f c o
def test_gru_and_lstm_to_onnx_and_back(gates, order, biases):
    p, op = gated(gates, biases=biases), "gru" if gates == 3 else "lstm"
    state = getattr(convert, f"{op}_to_onnx")(p)
    assert state["W"].shape == (1, gates * N, M)
    for place, gate in enumerate(order):
        ours = slice(gate * N, gate * N + N)
        theirs = slice(place * N, place * N + N)
        assert np.array_equal(state["W"][0, theirs].T, p.w_x[:, ours])
        assert np.array_equal(state["R"][0, theirs].T, p.w_h[:, ours])
        assert not biases or np.array_equal(state["B"][0, theirs], p[2][ours])
    assert same(getattr(convert, f"{op}_from_onnx")(**state), p)


def test_a_bias_of_gru_that_is_missing_is_0_in_other_layouts():
    p = gated(3, biases=True)
    for one in (p._replace(b_x=None), p._replace(b_h=None)):
        whole = p._replace(**{name: np.zeros(3 * N) for name in ("b_x", "b_h") if getattr(one, name) is None})
        assert same(convert.gru_from_torch(convert.gru_to_torch(one)), whole)
        assert same(convert.gru_from_onnx(**convert.gru_to_onnx(one)), whole)
    assert convert.gru_to_torch(p._replace(b_x=None, b_h=None)).keys() == {"weight_ih_l0", "weight_hh_l0"}


def test_the_biases_of_an_lstm_are_summed_and_a_direction_is_picked():
    W, R, B = rng.standard_normal((2, 4 * N, M)), rng.standard_normal((2, 4 * N, N)), rng.standard_normal((2, 8 * N))
    p = convert.lstm_from_onnx(W, R, B, direction=1)
    assert np.array_equal(p.w_h[:, :N], R[1, :N].T)
    assert np.array_equal(p.b[-N:], B[1, N : 2 * N] + B[1, 5 * N : 6 * N])
