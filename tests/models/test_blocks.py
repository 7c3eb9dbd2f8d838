"""Encoder and decoder blocks: their gradients by a complex step for every pair of options, and their forwards by loops."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from helpers import check_model, first, leaves
from oracles import multi_head_loops, norm_loops

import npattn
from npattn import FeedForwardParams, GradcheckError, MultiHeadParams, NormParams
from npattn.models.blocks import (
    DecoderBlockParams,
    DecoderDropout,
    EncoderBlockParams,
    EncoderDropout,
    decoder_block_backward,
    decoder_block_forward,
    encoder_block_backward,
    encoder_block_forward,
)
from npattn.models.config import Config
from npattn.ops.positions import Rotary
from npattn.tolerances import MODEL_GRADIENT

B, L, S, M, MK, F, H, G, D, E = 2, 5, 7, 6, 8, 9, 4, 2, 10, 3


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def multi_head(seed, width=M):
    shapes = [(M, H * D), (width, G * D), (width, G * E), (H * E, M), (H * D,), (G * D,), (G * E,), (M,)]
    return MultiHeadParams(*(normal([seed, n], *s) * s[0] ** (-0.5 * (len(s) > 1)) for n, s in enumerate(shapes)))


def norm(seed):
    return NormParams(1 + 0.3 * normal([seed, 0], M), normal([seed, 1], M))


def feed_forward(seed, gated=False):
    shapes = [(M, F), (F, M), (F,), (M,)] + ([(M, F), (F,)] if gated else [])
    return FeedForwardParams(*(normal([seed, n], *s) * s[0] ** (-0.5 * (len(s) > 1)) for n, s in enumerate(shapes)))


def encoder_params(gated=False):
    return EncoderBlockParams(multi_head(1), norm(2), feed_forward(3, gated), norm(4))


def decoder_params(gated=False):
    return DecoderBlockParams(multi_head(1), norm(2), multi_head(5, MK), norm(6), feed_forward(3, gated), norm(4))


def dropped(seed, *shape):
    return (np.random.default_rng(seed).random(shape) < 0.7) / 0.7


def encoder_dropout():
    return EncoderDropout(dropped(1, B, H, L, L), dropped(2, B, L, M), dropped(3, B, L, F), dropped(4, B, L, M))


def decoder_dropout():
    d = encoder_dropout()
    return DecoderDropout(d.weights, d.attention, dropped(5, B, H, L, S), dropped(6, B, L, M), d.hidden, d.feed_forward)


# An orthogonal array: any two columns have all four pairs of values.
PAIRS = [[(row >> 2) & 1, (row >> 1) & 1, row & 1, ((row >> 2) ^ (row >> 1)) & 1, ((row >> 2) ^ row) & 1,
          ((row >> 1) ^ row) & 1, ((row >> 2) ^ (row >> 1) ^ row) & 1] for row in range(8)]  # fmt: skip


def test_every_pair_of_options_is_there():
    for i in range(7):
        for j in range(i):
            assert {(row[i], row[j]) for row in PAIRS} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def config_of(row, **more):
    pre_norm, rms, gated, _, blockwise, _, rotary = row
    return Config(H, G, pre_norm=bool(pre_norm), norm=("layer", "rms")[rms], activation=("gelu", "silu")[gated],
                  implementation=("dense", "blockwise")[blockwise], rotary=Rotary(layout="half") if rotary else None,
                  norm_eps=0.01, **more)  # fmt: skip


@pytest.mark.parametrize("row", PAIRS)
@pytest.mark.parametrize("method", first(1, ["complex", "central"]))
def test_gradients_of_an_encoder_block(row, method):
    _, _, gated, biased, _, drop, rotary = row
    config = config_of(row, causal=bool(biased ^ drop), softcap=3.0 if drop else None)
    more = {"bias": normal(9, 1, H, L, L)} if biased else {}
    given = {"mask": npattn.key_lengths(np.array([L, L - 2])), "dropout": encoder_dropout() if drop else None}

    def forward(x, params, bias=None):
        return encoder_block_forward(x, params, config, bias=bias, **given)

    zero = () if rotary or config.softcap else ("params.attention.b_k",)
    inputs = {"x": normal(0, B, L, M), "params": encoder_params(gated), **more}
    check_model(forward, encoder_block_backward, inputs, zero, method)


@pytest.mark.parametrize("row", PAIRS)
@pytest.mark.parametrize("method", first(1, ["complex", "central"]))
def test_gradients_of_a_decoder_block(row, method):
    _, _, gated, biased, _, drop, rotary = row
    config = config_of(row)
    more = {"cross_bias": normal(9, 1, H, L, S)} if biased else {}
    given = {"mask": npattn.key_lengths(np.array([L, L - 2])), "cross_mask": npattn.key_lengths(np.array([S - 3, S])),
             "dropout": decoder_dropout() if drop else None}  # fmt: skip

    def forward(x, memory, params, cross_bias=None):
        return decoder_block_forward(x, memory, params, config, cross_bias=cross_bias, **given)

    zero = ("params.cross.b_k",) if rotary else ("params.attention.b_k", "params.cross.b_k")
    inputs = {"x": normal(0, B, L, M), "memory": normal(10, B, S, MK), "params": decoder_params(gated), **more}
    check_model(forward, decoder_block_backward, inputs, zero, method)


# --- forwards by loops -------------------------------------------------------------------------------------------------------


def gelu(x):
    return np.vectorize(lambda z: z * 0.5 * math.erfc(-z / math.sqrt(2)))(x)


def sublayer(x, f, params, pre_norm):
    normed = functools.partial(norm_loops, g=params.g, b=params.b, eps=1e-5, dy=np.zeros(x.shape))
    return x + f(normed(x)["y"]) if pre_norm else normed(x + f(x))["y"]


def hidden(p, n):
    return np.einsum("blf,fm->blm", gelu(np.einsum("blm,mf->blf", n, p.w_in) + p.b_in), p.w_out) + p.b_out


@pytest.mark.parametrize("pre_norm", [True, False])
def test_blocks_are_those_of_loops(pre_norm):
    x, memory, config = normal(0, B, L, M), normal(10, B, S, MK), Config(H, G, pre_norm=pre_norm)
    causal, seen = np.tri(L, dtype=bool), np.arange(S) < np.array([S - 3, S])[:, None, None, None]
    cross_seen = np.broadcast_to(seen, (B, H, L, S))

    def attend(params, allowed, n, other):
        seen = np.broadcast_to(allowed, (B, H, L, other.shape[1]))
        given = {**params._asdict(), "num_heads": H, "num_kv_heads": G, "allowed": seen}
        given = {name: x for name, x in given.items() if not name.endswith("_norm")}
        return multi_head_loops(n, other, other, **given)["out"]

    p = encoder_params()
    h = sublayer(x, lambda n: attend(p.attention, True, n, n), p.attention_norm, pre_norm)
    want = sublayer(h, functools.partial(hidden, p.feed_forward), p.feed_forward_norm, pre_norm)
    y, _ = encoder_block_forward(x, p, config)
    assert np.abs(y - want).max() <= MODEL_GRADIENT * np.abs(want).max()

    p = decoder_params()
    h = sublayer(x, lambda n: attend(p.attention, causal, n, n), p.attention_norm, pre_norm)
    c = sublayer(h, lambda n: attend(p.cross, cross_seen, n, memory), p.cross_norm, pre_norm)
    want = sublayer(c, functools.partial(hidden, p.feed_forward), p.feed_forward_norm, pre_norm)
    y, _ = decoder_block_forward(x, memory, p, config, cross_mask=npattn.key_lengths(np.array([S - 3, S])))
    assert np.abs(y - want).max() <= MODEL_GRADIENT * np.abs(want).max()


# --- the rules ---------------------------------------------------------------------------------------------------------------


def test_a_backward_twice_gives_the_same_bits_and_inputs_stay():
    x, p = normal(0, B, L, M), encoder_params()
    x.flags.writeable = False
    _, cache = encoder_block_forward(x, p, Config(H, G), dropout=encoder_dropout())
    dy = normal(1, B, L, M)
    dy.flags.writeable = False
    one, two = encoder_block_backward(dy, cache), encoder_block_backward(dy, cache)
    assert all(map(np.array_equal, leaves(one), leaves(two)))
    assert one.params._fields == p._fields
    assert [x.shape for x in leaves(one.params)] == [x.shape for x in leaves(p)]


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_padded_token_of_nan_changes_nothing(implementation, pre_norm):
    x, p, dy = normal(0, B, L, M), encoder_params(), normal(1, B, L, M)
    config, ends = Config(H, G, pre_norm=pre_norm, implementation=implementation), np.array([L, L - 2])
    mask = npattn.key_lengths(ends) & npattn.query_lengths(ends)  # a query of NaN would hand NaN to all its keys
    dy[1, L - 2 :] = 0
    want, cache = encoder_block_forward(x, p, config, mask=mask)
    grads = encoder_block_backward(dy, cache)
    x[1, L - 2 :] = np.nan
    y, cache = encoder_block_forward(x, p, config, mask=mask)
    again = encoder_block_backward(dy, cache)
    inside = np.arange(L) < ends[:, None]
    assert np.isnan(y[~inside]).all()
    assert np.abs(y - want)[inside].max() <= MODEL_GRADIENT * np.abs(want).max()
    assert not again.x[~inside].any()
    top = max(np.abs(x).max() for x in leaves(grads))
    assert all(np.abs(a - b).max() <= MODEL_GRADIENT * top for a, b in zip(leaves(again), leaves(grads), strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.longdouble])
def test_dtypes_come_out_as_they_go_in(dtype):
    cast = functools.partial(map_leaves, lambda x: x.astype(dtype))
    y, cache = encoder_block_forward(normal(0, B, L, M).astype(dtype), cast(encoder_params()), Config(H, G))
    grads = encoder_block_backward(y, cache)
    assert {x.dtype for x in leaves(grads)} == {np.dtype(dtype)} == {y.dtype}


def map_leaves(f, tree):
    if isinstance(tree, np.ndarray):
        return f(tree)
    return None if tree is None else type(tree)(*(map_leaves(f, x) for x in tree))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: Config(0), ValueError, "Config: num_heads is 0, expected an integer of at least 1"),
    (lambda: Config(2, norm="batch"), ValueError, "Config: norm is 'batch', expected one of 'layer', 'rms'"),
    (lambda: Config(2, activation="elu"), ValueError, "Config: activation is 'elu', expected one of"),
    (lambda: Config(2, pre_norm=1), TypeError, "Config: pre_norm is an int, expected True or False"),
    (lambda: encoder_block_forward(normal(0, L, M), decoder_params(), Config(H, G)), TypeError,
     "encoder_block: params is a npattn.models.blocks.DecoderBlockParams, expected npattn.EncoderBlockParams"),
    (lambda: encoder_block_forward(normal(0, B, L, M + 1), encoder_params(), Config(H, G)), ValueError,
     "layer_norm: g has shape"),
    (lambda: encoder_block_backward(normal(0, B, L, M), None), TypeError,
     "encoder_block: cache is a NoneType, expected npattn.EncoderBlockCache"),
])  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_wrong_gradient_is_caught():
    """The residual branch forgotten in the backward."""
    def backward(dy, cache):
        grads = encoder_block_backward(dy, cache)
        return grads._replace(x=grads.x - dy)

    with pytest.raises(GradcheckError):
        check_model(lambda x, params: encoder_block_forward(x, params, Config(H, G)), backward,
              {"x": normal(0, B, L, M), "params": encoder_params()}, ("params.attention.b_k",), "complex")  # fmt: skip


def test_a_sublayer_has_the_width_of_what_it_is_added_to():
    p = encoder_params()
    for width in (1, M - 2):
        wrong = p._replace(attention=p.attention._replace(w_o=normal(0, H * E, width), b_o=None))
        with pytest.raises(ValueError, match=f"a sublayer gives vectors of width {width}, expected M={M}"):
            encoder_block_forward(normal(1, B, L, M), wrong, Config(H, G))
    with pytest.raises(TypeError, match="encoder_block: config is a dict, expected npattn"):
        encoder_block_forward(normal(1, B, L, M), p, {"num_heads": H})


def test_norms_of_queries_and_keys_have_the_eps_of_the_config():
    x, p = 1e-3 * normal(1, B, L, M), encoder_params()
    p = p._replace(attention=p.attention._replace(q_norm=NormParams(np.ones(D)), k_norm=NormParams(np.ones(D))))
    # Without a norm before attention its input is x for every eps: only the norms of q and k see eps there.
    configs = [Config(H, G, pre_norm=False, norm_eps=eps) for eps in (1e-6, 1.0)]
    small, large = (np.abs(encoder_block_forward(x, p, c)[1].attention.inner.attention.q).max() for c in configs)
    assert large < 0.9 * small
