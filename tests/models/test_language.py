"""Causal language models: every gradient, and decoding token by token against the whole text."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close, check_model
from test_blocks import M, dropped, encoder_params, normal
from test_stacks import SOURCE, TARGET, S, V, norm, params_of

from npattn import Rotary, keys
from npattn.models.blocks import EncoderDropout
from npattn.models.config import Config, Relative
from npattn.models.language import (
    LanguageModelParams,
    language_model_backward,
    language_model_decode,
    language_model_forward,
)
from npattn.models.transformer import (
    EmbedParams,
    EncoderParams,
    HeadParams,
    StackDropout,
    transformer_decode,
    transformer_forward,
    transformer_memory,
)

H, G, B, L = 4, 2, 2, 6
IDS = np.random.default_rng(3).integers(0, V, (B, L))
CONFIGS = {
    "as GPT-2": Config(H, G, causal=True),
    "as Llama": Config(H, G, causal=True, norm="rms", rotary=Rotary("half")),
    "as Mistral": Config(H, G, causal=True, norm="rms", rotary=Rotary("half"), window=2),
    "relative": Config(H, G, causal=True, relative=Relative(6, 8), head_scale=0.5, embedding_scale=2.0),
    "post-norm": Config(H, G, causal=True, pre_norm=False, sinusoidal="half", first_position=2),
}


def params(name, tied):
    learned = normal(5, L + 3, M) if name in ("as GPT-2", "post-norm") else None
    bias = normal(6, 6, H) if name == "relative" else None
    head = HeadParams(None if tied else normal(7, M, V), normal(8, V) if name == "post-norm" else None)
    blocks = (encoder_params(), encoder_params())
    return LanguageModelParams(EmbedParams(normal(9, V, M), learned), EncoderParams(blocks, norm(3), bias), head)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_a_language_model(name, tied):
    def forward(params):
        return language_model_forward(IDS, params, CONFIGS[name], dropout=drop if tied else StackDropout())

    blocks = [EncoderDropout(dropped(n, B, H, L, L), dropped(n + 1, B, L, M), None, dropped(n + 2, B, L, M)) for n in (20, 30)]
    drop = StackDropout(dropped(10, B, L, M), blocks)
    zero = () if "rotary" in repr(CONFIGS[name]) and CONFIGS[name].rotary else ("b_k",)
    names = tuple(f"params.encoder.blocks.{n}.attention.{b}" for n in (0, 1) for b in zero)
    check_model(forward, language_model_backward, {"params": params(name, tied)}, zero=names)


@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1, 1), (4, 1, 1), (1, 5), (2, 2, 2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_gives_the_logits_of_the_whole_text(name, steps):
    """With padding before the second text, as a batch of prompts has it."""
    inside = np.array([[True] * L, [False, False, *[True] * (L - 2)]])
    positions = np.maximum(inside.cumsum(-1) - 1, 0)
    whole, _ = language_model_forward(IDS, params(name, True), CONFIGS[name], mask=keys(inside), positions=positions)
    past, at = None, 0
    for n in steps:
        some = slice(at, at + n)
        seen = {"mask": keys(inside[:, : at + n]), "positions": positions[:, some]}
        logits, past = language_model_decode(IDS[:, some], params(name, True), CONFIGS[name], past, **seen)
        at += n
        for row in (0, 1):
            real = inside[row, some]
            assert_close(logits[row][real], whole[row, some][real], np.abs(whole).max() * 40)
    assert past.length == L


def test_decoding_of_a_cache_whose_rows_are_mixed():
    config, p = CONFIGS["as Llama"], params("as Llama", True)
    _, past = language_model_decode(IDS[:, :4], p, config)
    order = np.array([1, 0, 1])
    logits, _ = language_model_decode(IDS[order, 4:5], p, config, past.rows(order))
    assert_close(logits[:, 0], language_model_forward(IDS, p, config)[0][order, 4], 40 * np.abs(logits).max())


@pytest.mark.parametrize("row", [(True, True, True, True), (False, False, False, True)])
def test_decoding_of_an_encoder_decoder(row):
    config, p, inside = Config(H, G), params_of(*row), np.arange(S) < np.array([[S], [S - 3]])
    masks = {"source_mask": keys(inside)}
    whole, _ = transformer_forward(SOURCE, TARGET, p, config, **masks, cross_mask=keys(inside))
    past = transformer_memory(SOURCE, p, config, **masks)
    for n in range(TARGET.shape[1]):
        logits, past = transformer_decode(TARGET[:, n : n + 1], p, config, past, cross_mask=keys(inside))
        assert_close(logits[:, 0], whole[:, n], 40 * np.abs(whole).max())
    assert past.length == TARGET.shape[1]


def test_what_is_no_language_model_is_refused():
    p = params("as GPT-2", True)
    with pytest.raises(ValueError, match=r"language_model: config.causal is False, expected True"):
        language_model_forward(IDS, p, Config(H, G))
    with pytest.raises(ValueError, match=r"encoder: params.bias and config.relative go together"):
        language_model_forward(IDS, p, CONFIGS["relative"])
