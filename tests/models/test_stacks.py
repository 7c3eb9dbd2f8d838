"""Stacks of blocks and the whole encoder-decoder: every parameter's gradient, whatever is shared or left out."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import check_model, leaves
from test_blocks import B, F, M, decoder_dropout, decoder_params, dropped, encoder_params, normal

import npattn
from npattn import NormParams
from npattn.models.blocks import DecoderDropout, EncoderDropout
from npattn.models.config import Config
from npattn.models.transformer import (
    DecoderParams,
    EmbedParams,
    EncoderParams,
    HeadParams,
    StackDropout,
    TransformerDropout,
    TransformerParams,
    embed_backward,
    embed_forward,
    encoder_backward,
    encoder_forward,
    transformer_backward,
    transformer_forward,
)

S, L, V, H, G = 7, 5, 11, 4, 2
SOURCE, TARGET = (np.random.default_rng(n).integers(0, V, (B, length)) for n, length in ((0, S), (1, L)))


def norm(seed):
    return NormParams(1 + 0.3 * normal([seed, 0], M), normal([seed, 1], M))


def square(params):
    """The decoder's memory has the width of the encoder."""
    w_k, w_v = normal(20, M, params.cross.w_k.shape[1]), normal(21, M, params.cross.w_v.shape[1])
    return params._replace(cross=params.cross._replace(w_k=w_k, w_v=w_v))


def params_of(shared, tied, positions, norms):
    def embed(seed):
        learned = normal([seed, 1], S + 2, M) if positions else None
        return EmbedParams(normal(seed, V, M), learned, norm(seed) if norms else None)

    last = norm(30) if norms else None
    return TransformerParams(
        embed(1), EncoderParams((encoder_params(), encoder_params()), last),
        DecoderParams((square(decoder_params()), square(decoder_params())), last),
        None if shared else embed(2),
        HeadParams(None if tied else normal(3, M, V), normal(4, V)))  # fmt: skip


ROWS = [(False, False, False, False), (True, True, False, True), (True, False, True, False), (False, True, True, True)]


@pytest.mark.parametrize("row", [ROWS[1], ROWS[2], *(pytest.param(row, marks=pytest.mark.slow) for row in (ROWS[0], ROWS[3]))])
def test_gradients_of_a_transformer(row):
    padding = npattn.key_lengths(np.array([S, S - 3]))
    config = Config(H, G, sinusoidal=None if row[2] else "interleaved", embedding_scale=1.5, norm_eps=0.01)

    def forward(params):
        masks = {"source_mask": padding, "cross_mask": padding}
        return transformer_forward(SOURCE, TARGET, params, config, **masks, dropout=drop if row[1] else TransformerDropout())

    def of_encoder(n):
        return EncoderDropout(dropped(n, B, H, S, S), dropped(n + 1, B, S, M), dropped(n + 2, B, S, F), dropped(n + 3, B, S, M))

    source = StackDropout(dropped(40, B, S, M), [of_encoder(50), of_encoder(60)])
    drop = TransformerDropout(source, StackDropout(dropped(70, B, L, M), [decoder_dropout(), DecoderDropout()]))
    kinds = (("encoder", "attention"), ("decoder", "attention"), ("decoder", "cross"))
    zero = [f"params.{stack}.blocks.{n}.{kind}.b_k" for stack, kind in kinds for n in (0, 1)]
    check_model(forward, transformer_backward, {"params": params_of(*row)}, zero=tuple(zero))


def test_an_encoder_has_one_bias_for_all_its_blocks():
    config, length = Config(H, G), 6
    x, params = normal(5, B, length, M), EncoderParams((encoder_params(), encoder_params()))
    masks = [EncoderDropout(attention=dropped(n, B, length, M)) for n in (1, 2)]
    for bias in (normal(6, 1, H, length, length), npattn.RelativeTable(normal(7, 5, H), lambda r: np.clip(r, -2, 2) + 2)):

        def forward(x, params, bias):
            return encoder_forward(x, params, config, bias=bias, dropout=masks)

        inputs = {"x": x, "params": params, "bias": bias}
        zero = ("params.blocks.0.attention.b_k", "params.blocks.1.attention.b_k")
        check_model(forward, encoder_backward, inputs, zero=zero)
    with pytest.raises(ValueError, match="dropout has masks for 1 blocks, expected 2"):
        encoder_forward(x, params, config, dropout=masks[:1])


def test_positions_may_be_given():
    ids, params = np.array([[3, 1, 1]]), EmbedParams(normal(0, V, M), normal(1, 9, M))
    x, cache = embed_forward(ids, params, Config(1), positions=np.array([4, 8, 0]))
    assert np.array_equal(x, params.table[ids] + params.positions[[4, 8, 0]])
    grads = embed_backward(np.ones_like(x), cache).params
    assert np.array_equal(grads.table.sum(-1) / M, np.bincount([3, 1, 1], minlength=V))
    assert np.array_equal(grads.positions.sum(-1) / M, np.bincount([4, 8, 0], minlength=9))
    with pytest.raises(ValueError, match="embedding: ids"):
        embed_forward(np.full((1, 3), V), params, Config(1))
    for positions, message in (
        (None, "positions reach from 0 to 9, expected 0 to 8: there are 9 learned ones"),
        (np.zeros((1,), int), r"positions has shape \(1,\), expected \(10,\) or \(1, 10\)"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_forward(np.zeros((1, 10), int), params, Config(1), positions=positions)
    with pytest.raises(ValueError, match="got types, expected None"):
        embed_forward(ids, params, Config(1), types=ids)


def test_the_gradients_have_the_shape_of_the_parameters():
    params = params_of(True, True, True, True)
    logits, cache = transformer_forward(SOURCE, TARGET, params, Config(H, G))
    grads = transformer_backward(np.ones_like(logits), cache)
    assert [x.shape for x in leaves(grads.params)] == [x.shape for x in leaves(params)]
    again = transformer_backward(np.ones_like(logits), cache)
    assert all(map(np.array_equal, leaves(again), leaves(grads)))


def test_a_target_does_not_see_what_is_behind():
    params, config = params_of(True, True, True, True), Config(H, G)
    logits, _ = transformer_forward(SOURCE, TARGET, params, config)
    other = TARGET.copy()
    other[:, -1] = (other[:, -1] + 1) % V
    changed, _ = transformer_forward(SOURCE, other, params, config)
    assert np.array_equal(changed[:, :-1], logits[:, :-1])
    assert not np.array_equal(changed[:, -1], logits[:, -1])


def test_an_embedding_in_float16_is_rounded_once():
    table, places, kinds = (normal(n, 9, M).astype(np.float16) for n in range(3))
    ids = np.arange(9)
    x, _ = embed_forward(ids, EmbedParams(table, places, None, kinds), Config(1, embedding_scale=3.3), types=ids)
    exact = table.astype(np.float64) * 3.3 + places.astype(np.float64) + kinds.astype(np.float64)
    assert x.dtype == np.float16
    assert np.mean(x != exact.astype(np.float16)) < 0.01  # float32 is a little off, which seldom matters
