"""Causal language models: the logits of the next token, after each token of a text.

    x = embed(ids)          (..., L) -> (..., L, M)     (1)    table, positions: `npattn.models.transformer` (1)
    y = encoder(x)          (..., L, M)                 (2)    causal: a token sees those before it
    logits = head(y)        (..., L, V)                 (3)

GPT-2, Llama and all that are built like them differ in `Config` and in which parameters are None. The loss is
`npattn.cross_entropy` of the logits of position l and the token at l + 1. Radford et al. 2019.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.models.config import Config
from npattn.models.transformer import (
    NOTHING_DROPPED,
    EmbedCache,
    EmbedParams,
    EncoderCache,
    EncoderParams,
    EncoderPast,
    HeadCache,
    HeadParams,
    StackDropout,
    embed_backward,
    embed_forward,
    encoder_backward,
    encoder_decode,
    encoder_forward,
    head_backward,
    head_forward,
)
from npattn.ops.checks import Array, check_class


class LanguageModelParams(NamedTuple):
    """The parameters of a causal language model."""

    embed: EmbedParams
    encoder: EncoderParams
    head: HeadParams = HeadParams()


class LanguageModelCache(NamedTuple):
    """What the backward needs."""

    embed: EmbedCache
    encoder: EncoderCache
    head: HeadCache


class LanguageModelGrads(NamedTuple):
    """The gradients of `language_model`; those of params have its shape and names."""

    params: LanguageModelParams


def language_model_forward(
    ids: Array, params: LanguageModelParams, config: Config, *, mask: Any = None, positions: Any = None,
    dropout: StackDropout = NOTHING_DROPPED,
) -> tuple[Array, LanguageModelCache]:  # fmt: skip
    """Logits of the next token, equations (1) to (3) of this page.

    ids : (..., L) integers   config : `Config` with causal=True
    mask : what else is not seen, as ``npattn.keys(inside)`` of padding   positions : (L,) or (..., L), 0 to L - 1 unless given
    dropout : masks
    Returns logits (..., L, V) and the cache. Raises TypeError, ValueError.
    """
    _check("language_model", params, config)
    x, embed = embed_forward(ids, params.embed, config, positions=positions, dropout=dropout.embed)  # (1)
    y, encoder = encoder_forward(x, params.encoder, config, mask=mask, positions=positions, dropout=dropout.blocks)  # (2)
    logits, head = head_forward(y, params.head, params.embed.table, config)  # (3)
    return logits, LanguageModelCache(embed, encoder, head)


def language_model_backward(dlogits: Array, cache: LanguageModelCache) -> LanguageModelGrads:
    """The gradients of sum(dlogits * logits), from (3) to (1). A table that is also the head gets the sum of both."""
    check_class("language_model", "cache", cache, LanguageModelCache, ", from language_model_forward")
    dy, dhead, dtable = head_backward(dlogits, cache.head)  # (3)
    of_encoder = encoder_backward(dy, cache.encoder)  # (2)
    dembed = embed_backward(of_encoder.x, cache.embed).params  # (1)
    if dtable is not None:
        dembed = dembed._replace(table=dembed.table + dtable)
    return LanguageModelGrads(LanguageModelParams(dembed, of_encoder.params, dhead))


def language_model_decode(
    ids: Array, params: LanguageModelParams, config: Config, past: EncoderPast | None = None, *, mask: Any = None,
    positions: Any = None,
) -> tuple[Array, EncoderPast]:  # fmt: skip
    """The logits after L more tokens, without computing those of ``past`` again. It has no backward.

    ids : (..., L)   past : what the call before returned, None at the start
    mask : for scores (..., H, L, S), where S counts the tokens of past and of ids   positions : counted on from past
    Returns logits (..., L, V), and the past with these tokens. Raises TypeError, ValueError.
    """
    _check("language_model_decode", params, config)
    if positions is None:
        positions = (0 if past is None else past.length) + np.arange(np.shape(ids)[-1])
    x, _ = embed_forward(ids, params.embed, config, positions=positions)  # (1)
    y, past = encoder_decode(x, params.encoder, config, past, mask=mask, positions=positions)  # (2)
    return head_forward(y, params.head, params.embed.table, config)[0], past  # (3)


def _check(op: str, params: Any, config: Any) -> None:
    check_class(op, "params", params, LanguageModelParams)
    check_class(op, "config", config, Config)
    if not config.causal:
        raise ValueError(f"{op}: config.causal is False, expected True: a token may not see the next one")


__all__ = [
    "LanguageModelCache",
    "LanguageModelGrads",
    "LanguageModelParams",
    "language_model_backward",
    "language_model_decode",
    "language_model_forward",
]
