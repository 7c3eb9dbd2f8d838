"""NaN and inf reach what may see them and nothing else, and objects of the user's own keep to the protocol."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import IMPLEMENTATIONS

from npattn import (
    MultiHeadParams,
    RNNParams,
    causal,
    cross_entropy,
    merge_backward,
    merge_forward,
    multi_head_backward,
    multi_head_forward,
    rnn_backward,
    rnn_forward,
    softmax_backward,
    softmax_forward,
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sink", [np.nan, np.inf, -np.inf])
def test_a_query_without_keys_gives_0_whatever_the_sink(implementation, sink):
    forward, backward = IMPLEMENTATIONS[implementation]
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 2, 5, 3))
    mask = np.ones((5, 5), bool)
    mask[1] = False
    sinks = np.array([sink, 0.5])
    (out, _), cache = forward(q, k, v, mask=mask, sink=sinks, return_lse=True)
    grads = backward(dout, cache)
    assert not out[:, 1].any()
    assert not grads.q[:, 1].any()
    assert np.isnan(out[0, 0]).all() == (sink != -np.inf)
    assert np.isfinite(out[1]).all()
    for g in (grads.q, grads.k, grads.v):
        assert np.isfinite(g[1]).all()
    if sink == -np.inf:
        assert grads.sink[0] == 0
        assert grads.sink[1] != 0


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_heads_see_for_themselves_in_the_gradients_of_their_weights(implementation):
    rng = np.random.default_rng(0)
    H, L, S, D, M = 2, 3, 5, 4, 6
    params = MultiHeadParams(*(rng.standard_normal(s) for s in ((M, H * D), (M, H * D), (M, H * D), (H * D, M))))
    mask = np.ones((1, H, L, S), bool)
    mask[:, 0, :, 3] = False  # head 0 does not see key 3
    mask[:, 0, 1] = False  # and its query 1 sees nothing
    clean = [rng.standard_normal(s) for s in ((1, L, M), (1, S, M), (1, S, M))]
    dout = rng.standard_normal((1, L, M))

    def gradients(which, token):
        x = [a.copy() for a in clean]
        if which is not None:
            x[which][0, token] = np.nan
        _, cache = multi_head_forward(*x, params, H, mask=mask, implementation=implementation)
        return multi_head_backward(dout, cache).params

    expected = gradients(None, 0)
    for which, token, name in ((0, 1, "w_q"), (1, 3, "w_k"), (2, 3, "w_v")):
        got = getattr(gradients(which, token), name)
        head, other = got[:, :D], got[:, D:]
        assert np.isfinite(head).all(), name
        assert np.abs(head - getattr(expected, name)[:, :D]).max() < 1e-11 * np.abs(head).max()  # another way through it
        assert np.isnan(other).any(), f"{name}: head 1 sees that token"
    _, cache = multi_head_forward(*clean, params, H, mask=mask, implementation=implementation)
    spoilt = dout.copy()
    spoilt[0, 1] = np.nan
    w_o = multi_head_backward(spoilt, cache).params.w_o
    assert np.isfinite(w_o[:D]).all()
    assert np.isnan(w_o[D:]).all()


def test_a_nan_is_not_hidden_by_relu():
    rng = np.random.default_rng(0)
    params = RNNParams(rng.standard_normal((2, 3)), rng.standard_normal((3, 3)), rng.standard_normal(3))
    x = rng.standard_normal((1, 3, 2))
    x[0, 1, 0] = np.nan
    for nonlinearity in ("tanh", "relu"):
        h, cache = rnn_forward(x, None, params, nonlinearity=nonlinearity)
        grads = rnn_backward(np.ones_like(h), cache)
        for g in (grads.x, grads.h0, *grads.params):
            assert np.isnan(g).any(), nonlinearity


def test_a_row_of_minus_infinity_is_a_row_without_scores():
    p, cache = softmax_forward(np.full((2, 3), -np.inf))
    assert not p.any()
    assert not softmax_backward(np.full((2, 3), np.nan), cache).scores.any()


def test_cross_entropy_keeps_its_digits_where_logits_are_large():
    rng = np.random.default_rng(0)
    x, targets = rng.standard_normal((5, 7)).astype(np.float32), rng.integers(0, 7, 5)
    far = x + np.float32(2**14)  # exact differences of what float32 holds there
    exact = cross_entropy(far.astype(np.float64), targets)
    assert abs(cross_entropy(far, targets) - exact) <= 8 * np.finfo(np.float32).eps * exact


@pytest.mark.parametrize("option", [{"softcap": 1e39}, {"softcap": 1e-46}, {"scale": 1e39}])
def test_numbers_that_float32_cannot_hold_are_refused(option):
    x = np.ones((2, 1), np.float32)
    (name,) = option
    for op, _ in IMPLEMENTATIONS.values():
        with pytest.raises(ValueError, match=rf"{name} is .*, expected a .*finite number"):
            op(x, x, x, **option)
        wide, _ = op(*(x.astype(np.float64),) * 3, **option)
        assert np.isfinite(wide).all()


def test_empty_parts_and_merges():
    out, lse = np.full((2, 3), np.nan), np.full(2, -np.inf)
    (merged, both), cache = merge_forward(out, lse, out, lse)
    assert not merged.any()
    assert (both == -np.inf).all()
    assert all(not g.any() for g in merge_backward(np.full((2, 3), np.nan), cache, np.full(2, np.nan)))


def test_rnn_gives_nothing_of_its_arguments_back():
    params = RNNParams(np.ones((2, 3)), np.ones((3, 3)))
    h0, dh_last = np.ones((1, 3)), np.ones((1, 3))
    _, cache = rnn_forward(np.ones((1, 0, 2)), h0, params)
    grads = rnn_backward(np.ones((1, 0, 3)), cache, dh_last)
    assert not np.shares_memory(cache.h_last, h0)
    assert not np.shares_memory(grads.h0, dh_last)


class OnlyTiles:
    """A mask of the user's own: every second pair, and nothing but a tile."""

    def __init__(self, dtype=bool):
        self.dtype = dtype

    def bind(self, shape):
        outer = self

        class Tiles:
            @staticmethod
            def tile(index, rows, cols):
                i, j = np.arange(shape[-2])[rows, None], np.arange(shape[-1])[cols]
                return ((i + j) % 2 == 0).astype(outer.dtype)

        return Tiles()


def test_masks_of_ones_own_take_part_in_the_algebra():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 5, 5, 4))
    i, j = np.arange(5)[:, None], np.arange(5)
    own, lower = (i + j) % 2 == 0, j <= i
    for forward, _ in IMPLEMENTATIONS.values():
        for mask, dense in (
            (OnlyTiles(), own),
            (causal() | OnlyTiles(), lower | own),
            (~(causal() & OnlyTiles()), ~(lower & own)),
        ):
            assert np.array_equal(forward(q, k, v, mask=mask)[0], forward(q, k, v, mask=dense)[0])
        with pytest.raises(TypeError, match=r"mask.tile returns dtype int64, expected bool"):
            forward(q, k, v, mask=OnlyTiles(np.int64))
