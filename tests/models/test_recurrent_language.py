"""Recurrent language models: every gradient, loops over the layers, chunks of a text, and decoding."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close, check_model, first, leaves
from oracles import gru_loops, lstm_loops, rnn_loops

from npattn import GRUParams, LinearParams, LSTMParams, NormParams, RNNParams
from npattn.models.recurrent import (
    RecurrentConfig,
    RecurrentParams,
    RecurrentPast,
    recurrent_model_backward,
    recurrent_model_decode,
    recurrent_model_forward,
)
from npattn.models.transformer import EmbedParams, HeadParams, StackDropout

B, T, V, M, N1, N2 = 3, 5, 11, 4, 6, 7  # N1, N2: hidden units of two layers
IDS = np.random.default_rng(3).integers(0, V, (B, T))
RAGGED = np.array([4, 0, 5])
GATES = {RNNParams: 1, GRUParams: 3, LSTMParams: 4}
KINDS = {
    "rnn": ((RNNParams, RNNParams), RecurrentConfig()),
    "relu": ((RNNParams, RNNParams), RecurrentConfig(nonlinearity="relu")),
    "gru": ((GRUParams, GRUParams), RecurrentConfig(embedding_scale=2.0)),
    "gru, reset before": ((GRUParams, GRUParams), RecurrentConfig(reset_after=False, norm="rms", norm_eps=0.01)),
    "lstm": ((LSTMParams, LSTMParams), RecurrentConfig(head_scale=0.5)),
    "lstm, then gru, then rnn": ((LSTMParams, GRUParams, RNNParams), RecurrentConfig(norm_eps=0.01)),
    "one lstm": ((LSTMParams,), RecurrentConfig()),
}
KIND = pytest.mark.parametrize("name", KINDS)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def params_of(name, tied=False):
    """All that parameters may hold; a norm where the kind has one in its config."""
    kinds, config = KINDS[name]
    widths, layers = [*[M, N1, N2][: len(kinds)], M if tied else 9], []
    for n, (kind, i, o) in enumerate(zip(kinds, widths[:-1], widths[1:], strict=True)):
        width = GATES[kind] * o
        biases = [normal([n, b], width) for b in range(len(kind._fields) - 2)]
        layers.append(kind(0.6 * normal([n, 7], i, width), 0.6 * normal([n, 8], o, width), *biases))
    last = widths[-1]
    norm = NormParams(1 + 0.3 * normal(1, last), normal(2, last) if config.norm == "layer" else None)
    embed = EmbedParams(normal(9, V, M), normal(4, T + 2, M) if name == "gru" else None)
    head = HeadParams(None if tied else normal(5, last, V), normal(6, V))
    return RecurrentParams(embed, tuple(layers), head, norm if config.norm_eps == 0.01 else None)


def past_of(params, batch=B):
    """States before the first token."""
    states = [[normal([20, n, k], batch, len(p.w_h)) for k in range(1 + isinstance(p, LSTMParams))]
              for n, p in enumerate(params.layers)]  # fmt: skip
    return RecurrentPast(tuple(map(tuple, states)), 2)


def masks_of(params):
    """Dropout of the embedding and behind each layer, but for the first of several."""
    widths = [M, *(len(p.w_h) for p in params.layers)]
    embed, *masks = ((np.random.default_rng(n).random((B, T, width)) < 0.7) / 0.7 for n, width in enumerate(widths))
    return StackDropout(embed, (None, *masks[1:]) if len(masks) > 1 else tuple(masks))


def mapped(f, *trees):
    """f of the arrays of nested NamedTuples and tuples."""
    a = trees[0]
    if a is None or isinstance(a, np.ndarray):
        return None if a is None else f(*trees)
    parts = [mapped(f, *parts) for parts in zip(*trees, strict=True)]
    return type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)


def of_states(grads):
    """The gradients as `check_model` looks for them."""
    return {"params": grads.params, "states": grads.past.states}


# --- gradients --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", first(1, ["complex", "central"]))
@pytest.mark.parametrize("tied", [True, False])
@KIND
def test_gradients(name, tied, method):
    params, config = params_of(name, tied), KINDS[name][1]
    given = {"lengths": RAGGED, "dropout": masks_of(params)} if tied else {}

    def forward(params, states):
        return recurrent_model_forward(IDS, params, config, past=RecurrentPast(states, 2), **given)

    inputs = {"params": params, "states": past_of(params).states}
    check_model(forward, lambda d, cache: of_states(recurrent_model_backward(d, cache)), inputs, method=method)


@KIND
def test_chunks_have_the_logits_and_gradients_of_the_whole(name):
    """Dropout and lengths are those of the whole: one sequence ends inside of the first chunk, one at the end of the second."""
    params, config, lengths = params_of(name), KINDS[name][1], np.array([4, 1, 5])
    masks, dlogits, pieces = masks_of(params), normal(8, B, T, V), [(0, 2), (2, 4), (4, 5)]

    def chunks(params, states):
        past, outs, caches = RecurrentPast(states, 2), [], []
        for start, end in pieces:
            some = {"lengths": np.clip(lengths - start, 0, end - start), "past": past,
                    "dropout": mapped(lambda m, some=slice(start, end): m[:, some], masks)}  # fmt: skip
            logits, cache = recurrent_model_forward(IDS[:, start:end], params, config, **some)
            past = cache.past
            outs.append(logits)
            caches.append(cache)
        return np.concatenate(outs, 1), caches

    def chunks_backward(dlogits, caches):
        dpast, dparams = None, None
        for cache, (start, end) in zip(caches[::-1], pieces[::-1], strict=True):
            grads = recurrent_model_backward(dlogits[:, start:end], cache, dpast)
            dpast, dparams = grads.past, grads.params if dparams is None else mapped(np.add, dparams, grads.params)
        return {"params": dparams, "states": dpast.states}

    start = past_of(params)
    whole, cache = recurrent_model_forward(IDS, params, config, lengths=lengths, past=start, dropout=masks)
    logits, caches = chunks(params, start.states)
    assert_close(logits, whole, 40 * np.abs(whole).max())
    assert caches[-1].past.length == cache.past.length == start.length + T
    for a, b in zip(leaves(caches[-1].past.states), leaves(cache.past.states), strict=True):
        assert_close(a, b, 40 * (1 + np.abs(b).max()))
    grads = recurrent_model_backward(dlogits, cache)
    assert grads.past.length == start.length
    top = max(np.abs(x).max() for x in leaves(of_states(grads)))
    for a, b in zip(leaves(chunks_backward(dlogits, caches)), leaves(of_states(grads)), strict=True):
        assert_close(a, b, 40 * top)
    if name in ("gru", "lstm, then gru, then rnn"):
        check_model(chunks, chunks_backward, {"params": params, "states": start.states})


# --- values -----------------------------------------------------------------------------------------------------------------


@KIND
def test_against_loops(name):
    params, config = params_of(name), KINDS[name][1]
    past, masks = past_of(params), masks_of(params)
    loops = {RNNParams: (rnn_loops, {"nonlinearity": config.nonlinearity}), LSTMParams: (lstm_loops, {}),
             GRUParams: (gru_loops, {"reset_after": config.reset_after})}  # fmt: skip
    logits, cache = recurrent_model_forward(IDS, params, config, lengths=RAGGED, past=past, dropout=masks)
    x = config.embedding_scale * params.embed.table[IDS]
    if params.embed.positions is not None:
        x = x + params.embed.positions[past.length + np.arange(T)]
    x = x * masks.embed
    for n, layer in enumerate(params.layers):
        run, options = loops[type(layer)]
        found = run(x, *past.states[n], **layer._asdict(), lengths=RAGGED, **options)
        x = found["h"] if masks.blocks[n] is None else found["h"] * masks.blocks[n]
        for got, want in zip(cache.past.states[n], ("h_last", "c_last"), strict=False):
            assert_close(got, found[want], 1e3 * (1 + np.abs(found[want]).max()), name=want)  # as in tests/test_recurrent.py
    if params.norm is not None:
        x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * params.norm[0]
        x = x if params.norm[1] is None else x + params.norm[1]
    want = config.head_scale * x @ params.head.w + params.head.b
    assert_close(logits, want, 1e3 * (1 + np.abs(want).max()))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
@KIND
def test_dtypes_and_inputs_that_stay(name, dtype):
    def to_dtype(x):
        return x.astype(dtype)

    config, wide = KINDS[name][1], params_of(name)
    params, masks = mapped(to_dtype, wide), mapped(to_dtype, masks_of(wide))
    past = RecurrentPast(mapped(to_dtype, past_of(wide).states), 2)
    given = [*leaves(params), *leaves(past.states), *leaves(masks)]
    before = [x.tobytes() for x in given]
    logits, cache = recurrent_model_forward(IDS, params, config, past=past, dropout=masks)
    one, two = (recurrent_model_backward(np.ones_like(logits), cache, cache.past) for _ in range(2))
    found = [logits, *leaves(cache.past.states), *leaves(of_states(one))]
    assert {x.dtype for x in found} == {np.dtype(dtype)}
    assert [x.shape for x in leaves(one.params)] == [x.shape for x in leaves(params)]
    assert all(map(np.array_equal, leaves(of_states(one)), leaves(of_states(two))))
    assert [x.tobytes() for x in given] == before


# --- decoding ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1), (3, 1, 1), (2, 3)])
@KIND
def test_decoding_gives_the_logits_of_the_whole_text(name, steps):
    params, config = params_of(name), KINDS[name][1]
    whole, _ = recurrent_model_forward(IDS, params, config)
    past, at = None, 0
    for n in steps:
        logits, past = recurrent_model_decode(IDS[:, at : at + n], params, config, past)
        assert_close(logits, whole[:, at : at + n], 40 * np.abs(whole).max())
        at += n
    assert past.length == T


@KIND
def test_decoding_with_padding_anywhere_and_rows_that_are_mixed(name):
    params, config = params_of(name), KINDS[name][1]
    params = params._replace(embed=params.embed._replace(positions=None))  # these count padding
    inside = np.array([[True, True, True, False, False], [False, False, True, True, True], [True, False, True, False, True]])
    logits, past = recurrent_model_decode(IDS, params, config, inside=inside)
    order = np.array([2, 0, 2, 1])
    after, _ = recurrent_model_decode(IDS[order, :2], params, config, past.rows(order))
    for b in range(B):
        alone = np.concatenate([IDS[b, inside[b]], IDS[b, :2]])[None]
        want, _ = recurrent_model_forward(alone, params, config)
        assert_close(logits[b, inside[b]], want[0, :-2], 40 * np.abs(want).max())
        for row in np.flatnonzero(order == b):
            assert_close(after[row], want[0, -2:], 40 * np.abs(want).max())


# --- errors -----------------------------------------------------------------------------------------------------------------


def refused(error, text, name="lstm", tied=False, run=recurrent_model_forward, ids=IDS, config=None, change=None, **options):
    params = params_of(name, tied)
    with pytest.raises(error, match=text):
        run(ids, params if change is None else change(params), KINDS[name][1] if config is None else config, **options)


def test_bad_input_is_named():
    refused(TypeError, r"recurrent_model: params is a tuple, expected npattn.RecurrentParams", change=tuple)
    refused(TypeError, r"recurrent_model: config is a dict, expected npattn.RecurrentConfig", config={})
    refused(ValueError, r"recurrent_model: ids has shape \(5,\), expected \(B, T\)", ids=IDS[0])
    refused(TypeError, r"params.layers\[0\] is a npattn.ops.linear.LinearParams, expected one of npattn.RNNParams",
            change=lambda p: p._replace(layers=(LinearParams(p.head.w),)))  # fmt: skip
    refused(ValueError, r"the table has shape \(11, 4\), expected \(V, N=9\): it is the head, as params.head.w is None",
            change=lambda p: p._replace(head=HeadParams()))  # fmt: skip
    refused(TypeError, r"recurrent_model: dropout is a list, expected npattn.StackDropout", dropout=[None, None])
    refused(ValueError, r"dropout has masks for 1 layers, expected 2", dropout=StackDropout(None, [None]))
    refused(ValueError, r"dropout: mask has shape", dropout=StackDropout(None, [np.ones((B, T, M)), None]))
    refused(ValueError, r"recurrent_model: past has \[1, 1\] states of the layers, expected \[2, 2\]",
            past=past_of(params_of("gru")))  # fmt: skip
    refused(ValueError, r"lstm: h0 has shape \(2, 6\), expected \(B=3, N=6\)", past=past_of(params_of("lstm"), 2))
    refused(ValueError, r"lstm: lengths reaches from 1 to 6, expected 0 to T=5", lengths=[1, 2, 6])
    refused(ValueError, r"lstm: w_x has shape", change=lambda p: p._replace(layers=p.layers[::-1]))
    cache = recurrent_model_forward(IDS, params_of("lstm"), RecurrentConfig())[1]
    with pytest.raises(ValueError, match=r"recurrent_model: dpast has \[2\] states of the layers, expected \[2, 2\]"):
        recurrent_model_backward(np.ones((B, T, V)), cache, past_of(params_of("one lstm")))
    decode = {"run": recurrent_model_decode}
    refused(TypeError, r"recurrent_model_decode: inside is a list", **decode, inside=[[True] * T] * B)
    refused(ValueError, r"inside is an array of dtype int64 and shape \(3, 5\), expected booleans of shape \(3, 5\)", **decode,
            inside=np.ones((B, T), np.int64))  # fmt: skip
    for backward in (lambda: recurrent_model_backward(IDS, None), lambda: RecurrentConfig(reset_after=1)):
        with pytest.raises(TypeError, match=r"cache is a NoneType|RecurrentConfig: reset_after is an int"):
            backward()
    with pytest.raises(ValueError, match="RecurrentConfig: nonlinearity is 'sine', expected one of 'tanh', 'relu'"):
        RecurrentConfig(nonlinearity="sine")
    with pytest.raises(ValueError, match="Config: norm is 'batch'"):
        RecurrentConfig(norm="batch")
