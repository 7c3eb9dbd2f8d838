"""Stacks of blocks, and the encoder-decoder of the paper.

    x = norm(table[source] scale + positions + types)    (..., S) -> (..., S, M)    (1)    only the table has to be there
    m = encoder(x)                                       (..., S, M)                (2)    blocks; pre-norm: and a norm
    t = norm(table[target] scale + positions)            (..., L) -> (..., L, M)    (3)
    y = decoder(t, m)                                    (..., L, M)                (4)    blocks; pre-norm: and a norm
    logits = scale y w + b, or scale y table^T + b       (..., L, V)                (5)

`npattn.cross_entropy` of the logits and the target shifted by one is the loss. Vaswani et al. 2017, figure 1. With
``Config.relative`` the blocks of a stack share a table of biases of the scores: Raffel et al. 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npattn.models.blocks import (
    DecoderBlockCache,
    DecoderBlockParams,
    DecoderDropout,
    DecoderPast,
    EncoderBlockCache,
    EncoderBlockParams,
    EncoderDropout,
    decoder_block_backward,
    decoder_block_decode,
    decoder_block_forward,
    decoder_block_memory,
    encoder_block_backward,
    encoder_block_decode,
    encoder_block_forward,
)
from npattn.models.config import NORMS, Config
from npattn.ops.biases import RelativeTable
from npattn.ops.checks import Array, Dims, check_class, check_dtype, computing_dtype, integers, kind
from npattn.ops.dropout import DropoutCache, dropout_backward, dropout_forward
from npattn.ops.embedding import (
    EmbeddingCache,
    TiedHeadCache,
    embedding_backward,
    embedding_forward,
    tied_head_backward,
    tied_head_forward,
)
from npattn.ops.linear import LinearCache, LinearParams, linear_backward, linear_forward
from npattn.ops.multihead import KVCache
from npattn.ops.norms import NormParams
from npattn.ops.positions import sinusoidal


class EmbedParams(NamedTuple):
    """The parameters of (1) and (3)."""

    table: Any  # (V, M); None in a target: that of the source
    positions: Array | None = None  # (P, M), of learned positions, from row ``Config.first_position``
    norm: NormParams | None = None
    types: Array | None = None  # (number of types, M), of the first and the second text of a pair, as BERT has them


class EncoderParams(NamedTuple):
    """The parameters of an encoder."""

    blocks: tuple[EncoderBlockParams, ...]
    norm: NormParams | None = None
    bias: Array | None = None  # (number of buckets, H), with ``Config.relative``


class DecoderParams(NamedTuple):
    """The parameters of a decoder."""

    blocks: tuple[DecoderBlockParams, ...]
    norm: NormParams | None = None
    bias: Array | None = None  # (number of buckets, H), with ``Config.relative``, of self-attention


class HeadParams(NamedTuple):
    """The parameters of (5)."""

    w: Array | None = None  # (M, V); None: the table of the embedding
    b: Array | None = None  # (V,)


class TransformerParams(NamedTuple):
    """The parameters of an encoder-decoder."""

    source: EmbedParams
    encoder: EncoderParams
    decoder: DecoderParams
    target: EmbedParams | None = None  # None: that of the source
    head: HeadParams = HeadParams()


class StackDropout(NamedTuple):
    """Dropout masks of an embedding and of the blocks behind it: each holds 0 or 1 / (1 - p), or is None."""

    embed: Array | None = None  # (..., L, M) of the vectors that the first block takes
    blocks: Sequence[Any] | None = None  # `EncoderDropout` or `DecoderDropout` for each block


class TransformerDropout(NamedTuple):
    """Dropout masks of an encoder-decoder."""

    source: StackDropout = StackDropout()
    target: StackDropout = StackDropout()


NOTHING_DROPPED, NO_DROPOUT = StackDropout(), TransformerDropout()


class EmbedCache(NamedTuple):
    """What the backward needs."""

    tokens: EmbeddingCache
    places: EmbeddingCache | None
    norm: Any
    types: EmbeddingCache | None
    dropout: DropoutCache | None
    config: Config


class HeadCache(NamedTuple):
    """What the backward needs."""

    product: LinearCache | TiedHeadCache
    b: Array | None
    config: Config


class EncoderCache(NamedTuple):
    """What the backward needs: the caches of the blocks, and of the norm."""

    blocks: tuple[EncoderBlockCache, ...]
    norm: Any
    relative: bool  # whether the bias is that of the parameters
    config: Config


class DecoderCache(NamedTuple):
    """What the backward needs: the caches of the blocks, and of the norm."""

    blocks: tuple[DecoderBlockCache, ...]
    norm: Any
    relative: bool
    config: Config


class TransformerCache(NamedTuple):
    """What the backward needs."""

    source: EmbedCache
    encoder: EncoderCache
    target: EmbedCache
    decoder: DecoderCache
    head: HeadCache | None
    shared: tuple[bool, bool]  # whether source and target have one embedding, and one table


class EmbedGrads(NamedTuple):
    """The gradients of `embed`."""

    tokens: Array  # (..., L, M) of the row of the table that each token has
    params: EmbedParams


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


def embed_forward(
    ids: Array, params: EmbedParams, config: Config, *, positions: Any = None, types: Array | None = None,
    dropout: Array | None = None,
) -> tuple[Array, EmbedCache]:  # fmt: skip
    """Tokens and their positions as vectors, equation (1) of this page.

    ids : (..., L) integers   positions : (L,) or (..., L), 0 to L - 1 unless given
    types : (..., L), 0 for all tokens unless given; used where the parameters have types
    dropout : (..., L, M), the mask of x
    Returns x (..., L, M) and the cache. Raises TypeError, ValueError.
    """
    check_class("embed", "params", params, EmbedParams)
    check_class("embed", "config", config, Config)
    p, positions = params, _check_embed(ids, params, config, positions, types)
    x, tokens = embedding_forward(ids, p.table)
    dtype, computing, places, norm, kinds = x.dtype, computing_dtype(x.dtype), None, None, None
    x = x.astype(computing, copy=False)
    if config.embedding_scale != 1:
        x = x * config.embedding_scale
    if p.types is not None:
        of_type, kinds = embedding_forward(np.zeros_like(ids) if types is None else types, p.types)
        x = x + of_type
    if p.positions is not None:
        learned, places = embedding_forward(positions + config.first_position, p.positions)
        x = x + learned
    if config.sinusoidal is not None:
        x = x + sinusoidal(positions, x.shape[-1], layout=config.sinusoidal, dtype=x.real.dtype)
    x = x.astype(dtype, copy=False)
    if p.norm is not None:
        x, norm = NORMS[config.norm][0](x, p.norm, eps=config.norm_eps)
    x, drop = (x, None) if dropout is None else dropout_forward(x, dropout)
    return x, EmbedCache(tokens, places, norm, kinds, drop, config)


def _check_embed(ids: Any, params: EmbedParams, config: Config, positions: Any, types: Any) -> Array:
    """The position of each token, as an array like ids."""
    op, dims = "embed", Dims("embed")
    shape = dims.fit("ids", ids, "... L").shape
    M = dims.fit("table", params.table, "V M").shape[1]
    if types is not None and params.types is None:
        raise ValueError("embed: got types, expected None: params.types is None")
    p = integers(op, "positions", np.arange(shape[-1]) if positions is None else positions)
    if p.shape not in (shape, shape[-1:]):
        raise ValueError(f"{op}: positions has shape {p.shape}, expected {shape[-1:]} or {shape}: fixed by ids")
    for name, table in (("positions", params.positions), ("types", params.types)):
        if table is not None and table.shape[1:] != (M,):
            raise ValueError(f"{op}: params.{name} has shape {table.shape}, expected (rows, M={M}): fixed by the table")
    if params.positions is not None and p.size:
        least, most = -config.first_position, len(params.positions) - config.first_position - 1  # padding may stand before 0
        if p.min() < least or p.max() > most:
            there = f"there are {len(params.positions)} learned ones"
            raise ValueError(f"{op}: positions reach from {p.min()} to {p.max()}, expected {least} to {most}: {there}")
    return np.broadcast_to(p, shape)


def embed_backward(dx: Array, cache: EmbedCache) -> EmbedGrads:
    """The gradients of the parameters, and of the row of each token; numbers of tokens have none."""
    check_class("embed", "cache", cache, EmbedCache, ", from embed_forward")
    dnorm = None
    if cache.dropout is not None:
        dx = dropout_backward(dx, cache.dropout).x
    if cache.norm is not None:
        grads = NORMS[cache.config.norm][1](dx, cache.norm)
        dx, dnorm = grads.x, grads.params
    dplaces, dtypes = (None if c is None else embedding_backward(dx, c).table for c in (cache.places, cache.types))
    dtokens = (dx * cache.config.embedding_scale).astype(dx.dtype, copy=False)
    return EmbedGrads(dtokens, EmbedParams(embedding_backward(dtokens, cache.tokens).table, dplaces, dnorm, dtypes))


# --- (5): the head -----------------------------------------------------------------------------------------------------------


def head_forward(y: Array, params: HeadParams, table: Array, config: Config) -> tuple[Array, HeadCache]:
    """The logits of each token, equation (5) of this page. y : (..., M)   table : (V, M), used where params.w is None"""
    check_class("head", "params", params, HeadParams)
    product: LinearCache | TiedHeadCache
    if config.head_scale != 1:
        y = (y * config.head_scale).astype(y.dtype, copy=False)
    if params.w is not None:
        logits, product = linear_forward(y, LinearParams(params.w, params.b))
        return logits, HeadCache(product, params.b, config)
    logits, product = tied_head_forward(y, table)
    if params.b is not None:
        if check_dtype("head", y=y, b=params.b) and params.b.shape != logits.shape[-1:]:
            raise ValueError(f"head: b has shape {params.b.shape}, expected (V={logits.shape[-1]},)")
        logits += params.b
    return logits, HeadCache(product, params.b, config)


def head_backward(dlogits: Array, cache: HeadCache) -> tuple[Array, HeadParams, Array | None]:
    """The gradients of y, of the parameters, and of the table where that is used."""
    check_class("head", "cache", cache, HeadCache, ", from head_forward")
    dtable = None
    if isinstance(cache.product, TiedHeadCache):
        dy, dtable = tied_head_backward(dlogits, cache.product)
        db = None if cache.b is None else dlogits.reshape(-1, dlogits.shape[-1]).sum(0)
        grads = HeadParams(None, db)
    else:
        dy, of_linear = linear_backward(dlogits, cache.product)
        grads = HeadParams(*of_linear)
    return (dy * cache.config.head_scale).astype(dy.dtype, copy=False), grads, dtable


# --- (2): the encoder --------------------------------------------------------------------------------------------------------


def encoder_forward(
    x: Array, params: EncoderParams, config: Config, *, mask: Any = None, bias: Any = None, positions: Any = None,
    dropout: Sequence[EncoderDropout] | None = None,
) -> tuple[Array, EncoderCache]:  # fmt: skip
    """Encoder blocks one after the other, and the norm behind them, if there is one.

    mask, bias, positions : of each block, as in `encoder_block_forward`   dropout : masks for each block
    """
    check_class("encoder", "params", params, EncoderParams)
    relative = _relative("encoder", params.bias, bias, config, config.causal)
    bias, caches = bias if relative is None else relative, []
    for block, drop in zip(params.blocks, _each(dropout, params.blocks), strict=True):
        x, cache = encoder_block_forward(x, block, config, mask=mask, bias=bias, positions=positions, dropout=drop)
        caches.append(cache)
    x, norm = _last_norm_forward(x, params.norm, config)
    return x, EncoderCache(tuple(caches), norm, relative is not None, config)


def encoder_backward(dy: Array, cache: EncoderCache) -> EncoderGrads:
    """The gradients of sum(dy * y), from the norm to the first block."""
    check_class("encoder", "cache", cache, EncoderCache, ", from encoder_forward")
    dx, dnorm = _last_norm_backward(dy, cache)
    blocks, dbias = [], None
    for block in reversed(cache.blocks):
        grads = encoder_block_backward(dx, block)
        dx, dbias = grads.x, _sum(dbias, grads.bias)
        blocks.append(grads.params)
    dbias, dtable = (None, dbias.parameter) if cache.relative and dbias is not None else (dbias, None)
    return EncoderGrads(dx, EncoderParams(tuple(reversed(blocks)), dnorm, dtable), dbias)


# --- (4): the decoder --------------------------------------------------------------------------------------------------------


def decoder_forward(
    x: Array, memory: Array, params: DecoderParams, config: Config, *, mask: Any = None, bias: Any = None,
    positions: Any = None, cross_mask: Any = None, dropout: Sequence[DecoderDropout] | None = None,
) -> tuple[Array, DecoderCache]:  # fmt: skip
    """Decoder blocks one after the other, each with the same memory, and the norm behind them, if there is one.

    mask, bias, positions, cross_mask : of each block, as in `decoder_block_forward`   dropout : masks for each block
    """
    check_class("decoder", "params", params, DecoderParams)
    relative = _relative("decoder", params.bias, bias, config, True)
    bias = bias if relative is None else relative
    caches, of_all = [], {"mask": mask, "bias": bias, "positions": positions, "cross_mask": cross_mask}
    for block, drop in zip(params.blocks, _each(dropout, params.blocks), strict=True):
        x, cache = decoder_block_forward(x, memory, block, config, dropout=drop, **of_all)
        caches.append(cache)
    x, norm = _last_norm_forward(x, params.norm, config)
    return x, DecoderCache(tuple(caches), norm, relative is not None, config)


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
    dbias, dtable = (None, dbias.parameter) if cache.relative and dbias is not None else (dbias, None)
    return DecoderGrads(dx, dmemory, DecoderParams(tuple(reversed(blocks)), dnorm, dtable), dbias)


# --- what the stacks share ---------------------------------------------------------------------------------------------------


def _relative(
    op: str, table: Array | None, bias: Any, config: Config, causal: bool, align: str | None = None
) -> RelativeTable | None:
    """The bias that all blocks of a stack share, where the parameters have one."""
    if (table is None) != (config.relative is None):
        raise ValueError(f"{op}: params.bias and config.relative go together, got {kind(table)} and {kind(config.relative)}")
    if table is None or config.relative is None:
        return None
    if bias is not None:
        raise ValueError(f"{op}: got a bias, expected None: params.bias is one")
    return RelativeTable(table, partial(config.relative.of, causal=causal), align=align)


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
    target_mask: Any = None, cross_mask: Any = None, dropout: TransformerDropout = NO_DROPOUT,
) -> tuple[Array, TransformerCache]:  # fmt: skip
    """The encoder-decoder, equations (1) to (5) of this page.

    source : (..., S) integers   target : (..., L) integers, of which position l sees those up to l
    source_mask, target_mask, cross_mask : of the three kinds of attention; of padding ``npattn.key_lengths(n)``, or
    ``npattn.keys(inside)``   dropout : masks
    Returns logits (..., L, V) and the cache. Raises TypeError, ValueError.
    """
    y, _, cache = states_forward(source, target, params, config, source_mask=source_mask, target_mask=target_mask,
                                 cross_mask=cross_mask, dropout=dropout)  # fmt: skip
    logits, head = head_forward(y, params.head, target_embedding(params).table, config)  # (5)
    return logits, cache._replace(head=head)


def states_forward(
    source: Array, target: Array, params: TransformerParams, config: Config, *, source_mask: Any = None,
    target_mask: Any = None, cross_mask: Any = None, dropout: TransformerDropout = NO_DROPOUT,
) -> tuple[Array, Array, TransformerCache]:  # fmt: skip
    """What stands before the head, equations (1) to (4): the states y (..., L, M), the memory m (..., S, M), and the cache."""
    check_class("transformer", "params", params, TransformerParams)
    p, target_params, shared = params, target_embedding(params), (params.target is None, not _has_table(params.target))
    of_source, of_target = dropout
    x, source_cache = embed_forward(source, p.source, config, dropout=of_source.embed)  # (1)
    memory, encoder_cache = encoder_forward(x, p.encoder, config, mask=source_mask, dropout=of_source.blocks)  # (2)
    t, target_cache = embed_forward(target, target_params, config, dropout=of_target.embed)  # (3)
    options = {"mask": target_mask, "cross_mask": cross_mask, "dropout": of_target.blocks}
    y, decoder_cache = decoder_forward(t, memory, p.decoder, config, **options)  # (4)
    return y, memory, TransformerCache(source_cache, encoder_cache, target_cache, decoder_cache, None, shared)


def _has_table(params: EmbedParams | None) -> bool:
    return params is not None and params.table is not None


def target_embedding(params: TransformerParams) -> EmbedParams:
    """The parameters of (3), of which the table or all may be that of (1)."""
    own, source = params.target, params.source
    return source if own is None else own if own.table is not None else own._replace(table=source.table)


def transformer_backward(dlogits: Array, cache: TransformerCache, *, encoder: bool = True) -> TransformerGrads:
    """The gradients of sum(dlogits * logits) for every parameter, from (5) to (1). A table that is used twice gets the sum.

    encoder : False: those of the encoder and its embedding are not needed, and None
    """
    check_class("transformer", "cache", cache, TransformerCache, ", from transformer_forward")
    if cache.head is None:
        raise ValueError("transformer: the cache has no head, expected one from transformer_forward")
    dy, of_head, dtable = head_backward(dlogits, cache.head)  # (5)
    grads = states_backward(dy, None, cache, dtable, encoder=encoder)
    return grads._replace(params=grads.params._replace(head=of_head))


def states_backward(
    dy: Array, dmemory: Array | None, cache: TransformerCache, dtable: Array | None = None, *, encoder: bool = True
) -> TransformerGrads:
    """The gradients of sum(dy * y) + sum(dmemory * m), from (4) to (1).

    dtable : what is added to that of the target's table. The gradients of the head are None
    """
    c = cache
    of_decoder = decoder_backward(dy, c.decoder)  # (4)
    of_target: Any = embed_backward(of_decoder.x, c.target).params  # (3)
    of_target = of_target._replace(table=_sum(of_target.table, dtable))
    if not encoder:
        shown: Any = None if c.shared[0] else of_target._replace(table=None) if c.shared[1] else of_target
        return TransformerGrads(TransformerParams(None, None, of_decoder.params, shown))  # type: ignore[arg-type]
    of_encoder = encoder_backward(_sum(of_decoder.memory, dmemory), c.encoder)  # (2)
    of_source = embed_backward(of_encoder.x, c.source).params  # (1)
    if c.shared[0]:
        of_source, of_target = _sum(of_source, of_target), None
    elif c.shared[1]:
        of_source = of_source._replace(table=_sum(of_source.table, of_target.table))
        of_target = of_target._replace(table=None)
    return TransformerGrads(TransformerParams(of_source, of_encoder.params, of_decoder.params, of_target))


# --- decoding: token by token, without a backward ----------------------------------------------------------------------------


class EncoderPast(NamedTuple):
    """What a causal encoder keeps of the tokens so far: keys and values of each block."""

    blocks: tuple[KVCache, ...]

    @property
    def length(self) -> int:
        return self.blocks[0].length if self.blocks else 0

    def rows(self, index: Array) -> EncoderPast:
        """These sequences of the batch, in this order."""
        return EncoderPast(tuple(block.rows(index) for block in self.blocks))


class TransformerPast(NamedTuple):
    """What a decoder keeps of the tokens so far, and of the source."""

    blocks: tuple[DecoderPast, ...]

    @property
    def length(self) -> int:
        first = self.blocks[0].attention if self.blocks else None
        return 0 if first is None else first.length

    def rows(self, index: Array) -> TransformerPast:
        """These sequences of the batch, in this order."""
        return TransformerPast(tuple(block.rows(index) for block in self.blocks))


def encoder_decode(
    x: Array, params: EncoderParams, config: Config, past: EncoderPast | None, *, mask: Any = None, positions: Any = None
) -> tuple[Array, EncoderPast]:
    """A causal encoder for L more tokens. mask : for scores (..., H, L, S), where S counts the tokens of past and of x"""
    check_class("encoder_decode", "params", params, EncoderParams)
    bias = _relative("encoder_decode", params.bias, None, config, True, "bottom_right")
    kept = []
    for block, before in zip(params.blocks, [None] * len(params.blocks) if past is None else past.blocks, strict=True):
        x, cache = encoder_block_decode(x, block, config, before, mask=mask, bias=bias, positions=positions)
        kept.append(cache)
    return _last_norm_forward(x, params.norm, config)[0], EncoderPast(tuple(kept))


def transformer_memory(
    source: Array, params: TransformerParams, config: Config, *, source_mask: Any = None
) -> TransformerPast:
    """The encoder, equations (1) and (2) of this page, and what the decoder needs of it before the first token."""
    return memory_past(encoded(source, params, config, source_mask), params, config)


def encoded(source: Array, params: TransformerParams, config: Config, source_mask: Any) -> Array:
    """The memory (..., S, M), equations (1) and (2), without a backward."""
    check_class("transformer_memory", "params", params, TransformerParams)
    x, _ = embed_forward(source, params.source, config)  # (1)
    return encoder_forward(x, params.encoder, config, mask=source_mask)[0]  # (2)


def memory_past(memory: Array, params: TransformerParams, config: Config) -> TransformerPast:
    """What a decoder keeps of the memory before the first token."""
    return TransformerPast(tuple(decoder_block_memory(memory, block, config) for block in params.decoder.blocks))


def transformer_decode(
    target: Array, params: TransformerParams, config: Config, past: TransformerPast, *, target_mask: Any = None,
    cross_mask: Any = None, positions: Any = None,
) -> tuple[Array, TransformerPast]:  # fmt: skip
    """The decoder for L more tokens, equations (3) to (5) of this page.

    target : (..., L) integers, behind those of past   past : from `transformer_memory` or from the call before
    target_mask : for scores (..., H, L, S), where S counts the tokens of past and of target   cross_mask : for the source
    positions : (L,) or (..., L), counted on from past unless given
    Returns logits (..., L, V), and the past with these tokens. Raises TypeError, ValueError.
    """
    y, past = states_decode(target, params, config, past, target_mask=target_mask, cross_mask=cross_mask, positions=positions)
    return head_forward(y, params.head, target_embedding(params).table, config)[0], past  # (5)


def states_decode(
    target: Array, params: TransformerParams, config: Config, past: TransformerPast, *, target_mask: Any = None,
    cross_mask: Any = None, positions: Any = None,
) -> tuple[Array, TransformerPast]:  # fmt: skip
    """As `transformer_decode`, with the states (..., L, M) in place of the logits."""
    check_class("transformer_decode", "past", past, TransformerPast, ", from transformer_memory")
    p, target_params = params, target_embedding(params)
    positions = past.length + np.arange(np.shape(target)[-1]) if positions is None else positions
    y, _ = embed_forward(target, target_params, config, positions=positions)  # (3)
    bias = _relative("transformer_decode", p.decoder.bias, None, config, True, "bottom_right")
    options = {"mask": target_mask, "bias": bias, "positions": positions, "cross_mask": cross_mask}
    kept = []
    for block, before in zip(p.decoder.blocks, past.blocks, strict=True):
        y, cache = decoder_block_decode(y, block, config, before, **options)  # (4)
        kept.append(cache)
    y, _ = _last_norm_forward(y, p.decoder.norm, config)  # (4)
    return y, TransformerPast(tuple(kept))


__all__ = [
    "DecoderCache",
    "DecoderGrads",
    "DecoderParams",
    "EmbedCache",
    "EmbedGrads",
    "EmbedParams",
    "EncoderCache",
    "EncoderGrads",
    "EncoderParams",
    "EncoderPast",
    "HeadCache",
    "HeadParams",
    "StackDropout",
    "TransformerCache",
    "TransformerDropout",
    "TransformerGrads",
    "TransformerParams",
    "TransformerPast",
    "decoder_backward",
    "decoder_forward",
    "embed_backward",
    "embed_forward",
    "encoded",
    "encoder_backward",
    "encoder_decode",
    "encoder_forward",
    "head_backward",
    "head_forward",
    "memory_past",
    "states_backward",
    "states_decode",
    "states_forward",
    "target_embedding",
    "transformer_backward",
    "transformer_decode",
    "transformer_forward",
    "transformer_memory",
]
