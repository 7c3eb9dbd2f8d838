"""Parameter layouts to and fro, without the libraries that they are of; tests/peers runs those."""

from __future__ import annotations

import numpy as np
import pytest

from npattn import MultiHeadParams, RNNParams, convert

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
