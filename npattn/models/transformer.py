"""Stacks of blocks, and the encoder-decoder of the paper.

    x = norm(table[source] scale + positions)    (..., S) -> (..., S, M)     (1)    all but the table may be left out
    m = encoder(x)                               (..., S, M)                 (2)    blocks; pre-norm: and a norm
    t = norm(table[target] scale + positions)    (..., L) -> (..., L, M)     (3)
    y = decoder(t, m)                            (..., L, M)                 (4)    blocks; pre-norm: and a norm
    logits = y w + b, or y table^T               (..., L, V)                 (5)

Vaswani et al. 2017, figure 1. `npattn.cross_entropy` of the logits and the target shifted by one is the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from npattn.models.blocks import (
    DecoderBlockCache,
    DecoderBlockParams,
    DecoderDropout,
    EncoderBlockCache,
    EncoderBlockParams,
    EncoderDropout,
    decoder_block_backward,
    decoder_block_forward,
    encoder_block_backward,
    encoder_block_forward,
)
from npattn.models.config import NORMS, Config
from npattn.ops.checks import Array, check_class
from npattn.ops.embedding import (
    EmbeddingCache,
    TiedHeadCache,
    embedding_backward,
    embedding_forward,
    tied_head_backward,
    tied_head_forward,
)
from npattn.ops.linear import LinearParams, linear_backward, linear_forward
from npattn.ops.norms import NormParams
from npattn.ops.positions import sinusoidal


class EmbedParams(NamedTuple):
    """The parameters of (1) and (3)."""

    table: Array  # (V, M)
    positions: Array | None = None  # (P, M), of learned positions 0 to P - 1
    norm: NormParams | None = None


class EncoderParams(NamedTuple):
    """The parameters of an encoder."""

    blocks: tuple[EncoderBlockParams, ...]
    norm: NormParams | None = None


class DecoderParams(NamedTuple):
    """The parameters of a decoder."""

    blocks: tuple[DecoderBlockParams, ...]
    norm: NormParams | None = None


class TransformerParams(NamedTuple):
    """The parameters of an encoder-decoder."""

    source: EmbedParams
    encoder: EncoderParams
    decoder: DecoderParams
    target: EmbedParams | None = None  # None: that of the source
    head: LinearParams | None = None  # None: the table of the target


class EmbedCache(NamedTuple):
    """What the backward needs."""

    tokens: EmbeddingCache
    places: EmbeddingCache | None
    norm: Any
    config: Config


class EncoderCache(NamedTuple):
    """What the backward needs: the caches of the blocks, and of the norm."""

    blocks: tuple[EncoderBlockCache, ...]
    norm: Any
    config: Config


class DecoderCache(NamedTuple):
    """What the backward needs: the caches of the blocks, and of the norm."""

    blocks: tuple[DecoderBlockCache, ...]
    norm: Any
    config: Config


class TransformerCache(NamedTuple):
    """What the backward needs."""

    source: EmbedCache
    encoder: EncoderCache
    target: EmbedCache
    decoder: DecoderCache
    head: Any
    shared: bool  # whether source and target have one embedding


class EncoderGrads(NamedTuple):
    """The gradients of `encoder`."""

    x: Array
    params: EncoderParams
    bias: Any  # summed over the blocks, which have one bias


class DecoderGrads(NamedTuple):
    """The gradients of `decoder`."""

    x: Array
    memory: Array
    params: DecoderParams
    bias: Any


class TransformerGrads(NamedTuple):
    """The gradients of `transformer`; those of params have its shape and names."""

    params: TransformerParams


# --- (1), (3): embedding -----------------------------------------------------------------------------------------------------


def embed_forward(ids: Array, params: EmbedParams, config: Config, *, positions: Any = None) -> tuple[Array, EmbedCache]:
    """Tokens and their positions as vectors, equation (1) of this page.

    ids : (..., L) integers   positions : (L,) or (..., L), 0 to L - 1 unless given
    Returns x (..., L, M) and the cache. Raises TypeError, ValueError.
    """
    check_class("embed", "params", params, EmbedParams)
    x, tokens = embedding_forward(ids, params.table)
    if config.embedding_scale != 1:
        x = x * x.dtype.type(config.embedding_scale)
    positions, places, norm = np.arange(np.shape(ids)[-1]) if positions is None else positions, None, None
    if params.positions is not None:
        learned, places = embedding_forward(np.broadcast_to(positions, np.shape(ids)), params.positions)
        x = x + learned
    if config.sinusoidal:
        x = x + sinusoidal(positions, x.shape[-1]).astype(x.dtype)
    if params.norm is not None:
        x, norm = NORMS[config.norm][0](x, params.norm, eps=config.norm_eps)
    return x, EmbedCache(tokens, places, norm, config)


def embed_backward(dx: Array, cache: EmbedCache) -> EmbedParams:
    """The gradients of the parameters: numbers of tokens have none."""
    check_class("embed", "cache", cache, EmbedCache, ", from embed_forward")
    dnorm = None
    if cache.norm is not None:
        grads = NORMS[cache.config.norm][1](dx, cache.norm)
        dx, dnorm = grads.x, grads.params
    dplaces = None if cache.places is None else embedding_backward(dx, cache.places).table
    return EmbedParams(embedding_backward(dx * dx.dtype.type(cache.config.embedding_scale), cache.tokens).table, dplaces, dnorm)


# --- (2): the encoder --------------------------------------------------------------------------------------------------------


def encoder_forward(
    x: Array, params: EncoderParams, config: Config, *, mask: Any = None, bias: Any = None, positions: Any = None,
    dropout: Sequence[EncoderDropout] | None = None,
) -> tuple[Array, EncoderCache]:  # fmt: skip
    """Encoder blocks one after the other, and the norm behind them, if there is one.

    mask, bias, positions : of each block, as in `encoder_block_forward`   dropout : masks for each block
    """
    check_class("encoder", "params", params, EncoderParams)
    caches = []
    for block, drop in zip(params.blocks, _each(dropout, params.blocks), strict=True):
        x, cache = encoder_block_forward(x, block, config, mask=mask, bias=bias, positions=positions, dropout=drop)
        caches.append(cache)
    x, norm = _last_norm_forward(x, params.norm, config)
    return x, EncoderCache(tuple(caches), norm, config)


def encoder_backward(dy: Array, cache: EncoderCache) -> EncoderGrads:
    """The gradients of sum(dy * y), from the norm to the first block."""
    check_class("encoder", "cache", cache, EncoderCache, ", from encoder_forward")
    dx, dnorm = _last_norm_backward(dy, cache)
    blocks, dbias = [], None
    for block in reversed(cache.blocks):
        grads = encoder_block_backward(dx, block)
        dx, dbias = grads.x, _sum(dbias, grads.bias)
        blocks.append(grads.params)
    return EncoderGrads(dx, EncoderParams(tuple(reversed(blocks)), dnorm), dbias)


# --- (4): the decoder --------------------------------------------------------------------------------------------------------


def decoder_forward(
    x: Array, memory: Array, params: DecoderParams, config: Config, *, mask: Any = None, bias: Any = None,
    positions: Any = None, cross_mask: Any = None, dropout: Sequence[DecoderDropout] | None = None,
) -> tuple[Array, DecoderCache]:  # fmt: skip
    """Decoder blocks one after the other, each with the same memory, and the norm behind them, if there is one.

    mask, bias, positions, cross_mask : of each block, as in `decoder_block_forward`   dropout : masks for each block
    """
    check_class("decoder", "params", params, DecoderParams)
    caches, of_all = [], {"mask": mask, "bias": bias, "positions": positions, "cross_mask": cross_mask}
    for block, drop in zip(params.blocks, _each(dropout, params.blocks), strict=True):
        x, cache = decoder_block_forward(x, memory, block, config, dropout=drop, **of_all)
        caches.append(cache)
    x, norm = _last_norm_forward(x, params.norm, config)
    return x, DecoderCache(tuple(caches), norm, config)


def decoder_backward(dy: Array, cache: DecoderCache) -> DecoderGrads:
    """The gradients of sum(dy * y), from the norm to the first block; that of the memory is summed over the blocks."""
    check_class("decoder", "cache", cache, DecoderCache, ", from decoder_forward")
    dx, dnorm = _last_norm_backward(dy, cache)
    blocks, dbias = [], None
    dmemory: Any = None
    for block in reversed(cache.blocks):
        grads = decoder_block_backward(dx, block)
        dx, dbias, dmemory = grads.x, _sum(dbias, grads.bias), _sum(dmemory, grads.memory)
        blocks.append(grads.params)
    return DecoderGrads(dx, dmemory, DecoderParams(tuple(reversed(blocks)), dnorm), dbias)


def _each(dropout: Sequence[Any] | None, blocks: Sequence[Any]) -> Sequence[Any]:
    """The dropout masks of each block."""
    if dropout is None:
        return [None] * len(blocks)
    if len(dropout) != len(blocks):
        raise ValueError(f"dropout has masks for {len(dropout)} blocks, expected {len(blocks)}")
    return dropout


def _last_norm_forward(x: Array, norm: NormParams | None, config: Config) -> tuple[Array, Any]:
    return (x, None) if norm is None else NORMS[config.norm][0](x, norm, eps=config.norm_eps)


def _last_norm_backward(dy: Array, cache: EncoderCache | DecoderCache) -> tuple[Array, NormParams | None]:
    if cache.norm is None:
        return dy, None
    grads = NORMS[cache.config.norm][1](dy, cache.norm)
    return grads.x, grads.params


def _sum(a: Any, b: Any) -> Any:
    """The sum of two gradients of one array or bias; None is nothing."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tuple):
        return type(a)(*map(_sum, a, b))
    return a.with_parameter(a.parameter + b.parameter) if hasattr(a, "with_parameter") else a + b


# --- the whole ---------------------------------------------------------------------------------------------------------------


def transformer_forward(
    source: Array, target: Array, params: TransformerParams, config: Config, *, source_mask: Any = None,
    target_mask: Any = None, cross_mask: Any = None,
) -> tuple[Array, TransformerCache]:  # fmt: skip
    """The encoder-decoder, equations (1) to (5) of this page.

    source : (..., S) integers   target : (..., L) integers, of which position l sees those up to l
    source_mask, target_mask, cross_mask : of the three kinds of attention; of padding ``npattn.key_lengths(n)``, or
    ``npattn.keys(inside)``
    Returns logits (..., L, V) and the cache. Raises TypeError, ValueError.
    """
    check_class("transformer", "params", params, TransformerParams)
    p, target_params = params, params.source if params.target is None else params.target
    x, source_cache = embed_forward(source, p.source, config)  # (1)
    memory, encoder_cache = encoder_forward(x, p.encoder, config, mask=source_mask)  # (2)
    t, target_cache = embed_forward(target, target_params, config)  # (3)
    y, decoder_cache = decoder_forward(t, memory, p.decoder, config, mask=target_mask, cross_mask=cross_mask)  # (4)
    logits, head = tied_head_forward(y, target_params.table) if p.head is None else linear_forward(y, p.head)  # (5)
    return logits, TransformerCache(source_cache, encoder_cache, target_cache, decoder_cache, head, p.target is None)


def transformer_backward(dlogits: Array, cache: TransformerCache) -> TransformerGrads:
    """The gradients of sum(dlogits * logits) for every parameter, from (5) to (1). A table that is used twice gets the sum."""
    check_class("transformer", "cache", cache, TransformerCache, ", from transformer_forward")
    c, of_head, dtable = cache, None, None
    if isinstance(c.head, TiedHeadCache):
        dy, dtable = tied_head_backward(dlogits, c.head)  # (5)
    else:
        dy, of_head = linear_backward(dlogits, c.head)  # (5)
    of_decoder = decoder_backward(dy, c.decoder)  # (4)
    of_target: Any = embed_backward(of_decoder.x, c.target)  # (3)
    of_target = of_target._replace(table=_sum(of_target.table, dtable))
    of_encoder = encoder_backward(of_decoder.memory, c.encoder)  # (2)
    of_source = embed_backward(of_encoder.x, c.source)  # (1)
    if c.shared:
        of_source, of_target = _sum(of_source, of_target), None
    return TransformerGrads(TransformerParams(of_source, of_encoder.params, of_decoder.params, of_target, of_head))


__all__ = [
    "DecoderCache",
    "DecoderGrads",
    "DecoderParams",
    "EmbedCache",
    "EmbedParams",
    "EncoderCache",
    "EncoderGrads",
    "EncoderParams",
    "TransformerCache",
    "TransformerGrads",
    "TransformerParams",
    "decoder_backward",
    "decoder_forward",
    "embed_backward",
    "embed_forward",
    "encoder_backward",
    "encoder_forward",
    "transformer_backward",
    "transformer_forward",
]
