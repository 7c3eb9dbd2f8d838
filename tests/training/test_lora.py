"""Adapters of low rank: their gradients, against the merged matrix, and in the loop."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close, check_model, random

from npattn import LinearParams, linear_backward, linear_forward
from npattn.models.trees import named_leaves
from npattn.training.loop import Training, check_gradients, train
from npattn.training.lora import LoraParams, adapted_loss, adapters, lora_backward, lora_forward

M, N, R, O, ALPHA = 5, 7, 2, 3, 6.0
PARAMS = (LinearParams(random((M, N), 0), random((N,), 1)), LinearParams(random((N, O), 2)))
X, Y = random((4, M), 3), random((4, O), 4)


def drawn():
    """The first matrix has an adapter, its bias is trained itself, and the second matrix stays."""
    made = adapters(PARAMS, R, lambda name: name == "0.w", whole=lambda name: name == "0.b", seed=1)
    return (made[0]._replace(w=LoraParams(made[0].w.a, random((R, N), 5))), made[1])


def forward(params):
    hidden, first = linear_forward(X.astype(params[0].w.dtype), params[0])
    out, second = linear_forward(hidden * hidden, params[1])
    return out, (hidden, first, second)


def backward(dout, cache):
    hidden, first, second = cache
    of_second = linear_backward(dout, second)
    return linear_backward(2 * hidden * of_second.x, first).params, of_second.params


def loss_and_grads(params, batch, n):
    out, cache = forward(params)
    return ((out - Y) ** 2).mean(), backward(2 * (out - Y) / Y.size, cache), len(X)


@pytest.mark.parametrize("method", ["complex", "central"])
def test_gradients(method):
    def adapted(adapters, b):
        tree = (LinearParams(adapters, b), LinearParams(None))
        dtype = np.result_type(adapters.a, adapters.b, b)
        merged, of_merge = lora_forward(tree, tuple(LinearParams(*(None if x is None else x.astype(dtype) for x in p))
                                                    for p in PARAMS), ALPHA)  # fmt: skip
        out, cache = forward(merged)
        return out, (cache, of_merge)

    def of_adapted(dout, cache):
        grads = lora_backward(backward(dout, cache[0]), cache[1]).adapters
        return {"adapters": grads[0].w, "b": grads[0].b}

    tree = drawn()
    check_model(adapted, of_adapted, {"adapters": tree[0].w, "b": tree[0].b}, method=method)


def test_the_merged_matrix_and_the_gradients_of_what_is_merged():
    tree = drawn()
    merged, cache = lora_forward(tree, PARAMS, ALPHA)
    a, b = tree[0].w
    expected = PARAMS[0].w + ALPHA / R * np.einsum("mr,rn->mn", a, b)
    assert_close(merged[0].w, expected, np.abs(PARAMS[0].w) + ALPHA / R * np.abs(a) @ np.abs(b))
    assert merged[0].b is tree[0].b
    assert merged[1].w is PARAMS[1].w
    dparams = (LinearParams(random((M, N), 6), random((N,), 7)), LinearParams(random((N, O), 8)))
    grads = lora_backward(dparams, cache)
    assert grads.params[0].w is dparams[0].w
    assert not grads.params[0].b.any()
    assert set(named_leaves(grads.adapters)) == {"0.w.a", "0.w.b", "0.b"} == set(named_leaves(tree))


def test_training_moves_the_adapters_alone():
    start = adapters(PARAMS, R, lambda name: name.endswith("w"))
    assert np.array_equal(lora_forward(start, PARAMS, ALPHA)[0][0].w, PARAMS[0].w), "b is 0 at first"
    loss = adapted_loss(loss_and_grads, PARAMS, ALPHA)
    before = [x.copy() for x in named_leaves(PARAMS).values()]
    check_gradients(drawn(), loss, None)
    trained = train(start, loss, lambda n: None, Training(steps=50, lr=0.02))
    assert trained.log[-1]["loss"] < trained.log[0]["loss"] / 4
    assert all(np.array_equal(a, b) for a, b in zip(before, named_leaves(PARAMS).values(), strict=True))


def test_bad_input():
    with pytest.raises(ValueError, match=r"adapters: 0.b has shape \(7,\), expected \(M, N\)"):
        adapters(PARAMS, R, lambda name: name == "0.b")
    first, second = drawn()
    wrong = (first._replace(w=LoraParams(first.w.a, np.zeros((2, 6)))), second)
    with pytest.raises(ValueError, match=r"lora: a and b have shapes \(5, 2\) and \(2, 6\)"):
        lora_forward(wrong, PARAMS, ALPHA)
    with pytest.raises(TypeError, match="lora: cache"):
        lora_backward(PARAMS, None)
