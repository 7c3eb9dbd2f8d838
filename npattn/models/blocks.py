"""The encoder block and the decoder block of a Transformer.

Every sublayer f stands beside a residual connection. A block is two or three of them, one after the other:

    pre-norm                             post-norm
    n = norm(x)                          a = f(x)                   (..., L, M)   (a)
    a = f(n)                             s = x + a                  (..., L, M)   (b)
    y = x + a                            y = norm(s)                (..., L, M)   (c)

    encoder block                        decoder block
    h = x with self-attention            h = x with causal self-attention         (1)
                                         c = h with attention to the memory       (2)
    y = h with feed-forward              y = c with feed-forward                  (3)

An encoder block with ``Config.causal`` is the block of a decoder-only language model. Vaswani et al. 2017, section 3.1 and
figure 1; pre-norm: Xiong et al. 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from npattn.models.config import NORMS, Config
from npattn.ops import masks
from npattn.ops.allowed import quiet
from npattn.ops.checks import Array, check_class
from npattn.ops.dropout import DropoutCache, dropout_backward, dropout_forward
from npattn.ops.feed_forward import FeedForwardCache, FeedForwardParams, feed_forward_backward, feed_forward_forward
from npattn.ops.multihead import (
    KVCache,
    MultiHeadCache,
    MultiHeadParams,
    multi_head_backward,
    multi_head_decode,
    multi_head_forward,
    multi_head_memory,
)
from npattn.ops.norms import NormParams

FEW = 1 << 14  # scores of a step of decoding below which tiles cost more than they save: 0.2 of 0.8 ms a layer here

Sublayer = Callable[[Array], tuple[Array, Any]]  # f: its output and its cache


class EncoderBlockParams(NamedTuple):
    """The parameters of an encoder block."""

    attention: MultiHeadParams
    attention_norm: NormParams
    feed_forward: FeedForwardParams
    feed_forward_norm: NormParams


class DecoderBlockParams(NamedTuple):
    """The parameters of a decoder block."""

    attention: MultiHeadParams
    attention_norm: NormParams
    cross: MultiHeadParams
    cross_norm: NormParams
    feed_forward: FeedForwardParams
    feed_forward_norm: NormParams


class EncoderDropout(NamedTuple):
    """Dropout masks of an encoder block: each holds 0 or 1 / (1 - p), or is None."""

    weights: Any = None  # (..., H, L, L) of the attention weights, or `npattn.Dropout`
    attention: Array | None = None  # (..., L, M) of the output of attention
    hidden: Array | None = None  # (..., L, F) inside the feed-forward layer
    feed_forward: Array | None = None  # (..., L, M) of its output


class DecoderDropout(NamedTuple):
    """Dropout masks of a decoder block."""

    weights: Any = None
    attention: Array | None = None
    cross_weights: Any = None  # (..., H, L, S)
    cross: Array | None = None
    hidden: Array | None = None
    feed_forward: Array | None = None


class SublayerCache(NamedTuple):
    """What the backward of one sublayer needs."""

    norm: Any
    inner: Any  # the cache of f
    dropout: DropoutCache | None


class EncoderBlockCache(NamedTuple):
    """What the backward needs: the caches of the sublayers, in their order."""

    attention: SublayerCache
    feed_forward: SublayerCache
    config: Config


class DecoderBlockCache(NamedTuple):
    """What the backward needs: the caches of the sublayers, in their order."""

    attention: SublayerCache
    cross: SublayerCache
    feed_forward: SublayerCache
    config: Config


class EncoderBlockGrads(NamedTuple):
    """The gradients of `encoder_block`; those of params have its shape and names."""

    x: Array
    params: EncoderBlockParams
    bias: Any


class DecoderBlockGrads(NamedTuple):
    """The gradients of `decoder_block`; those of params have its shape and names."""

    x: Array
    memory: Array
    params: DecoderBlockParams
    bias: Any
    cross_bias: Any


# --- one sublayer ------------------------------------------------------------------------------------------------------------


def sublayer_forward(
    x: Array, f: Sublayer, norm: NormParams, config: Config, drop: Array | None
) -> tuple[Array, SublayerCache]:
    """f beside its residual connection, equations (a) to (c) of this page. drop : the dropout mask of a"""
    norm_forward, _ = NORMS[config.norm]
    if config.pre_norm:
        n, norm_cache = norm_forward(x, norm, eps=config.norm_eps)  # (a)
        a, inner = _width(f(n), x)  # (b)
        a, dropout = (a, None) if drop is None else dropout_forward(a, drop)
        y = x + a  # (c)
    else:
        a, inner = _width(f(x), x)  # (a)
        a, dropout = (a, None) if drop is None else dropout_forward(a, drop)
        y, norm_cache = norm_forward(x + a, norm, eps=config.norm_eps)  # (b), (c)
    return y, SublayerCache(norm_cache, inner, dropout)


def _width(found: tuple[Array, Any], x: Array) -> tuple[Array, Any]:
    if found[0].shape != x.shape:
        got, expected = found[0].shape[-1], x.shape[-1]
        raise ValueError(f"a sublayer gives vectors of width {got}, expected M={expected}: they are added to x")
    return found


def sublayer_backward(
    dy: Array, cache: SublayerCache, f_backward: Callable[[Array, Any], tuple[Array, Any]], config: Config
) -> tuple[Array, Any, NormParams]:
    """The gradients of x, those that f_backward gives beside that of f's input, and those of the norm."""
    _, norm_backward = NORMS[config.norm]
    if config.pre_norm:
        da = dy if cache.dropout is None else dropout_backward(dy, cache.dropout).x  # (c)
        dn, grads = f_backward(da, cache.inner)  # (b)
        through = norm_backward(dn, cache.norm)  # (a)
        return dy + through.x, grads, through.params
    through = norm_backward(dy, cache.norm)  # (c)
    ds = through.x
    da = ds if cache.dropout is None else dropout_backward(ds, cache.dropout).x  # (b)
    dx, grads = f_backward(da, cache.inner)  # (a)
    return ds + dx, grads, through.params


def self_attention_backward(da: Array, cache: MultiHeadCache) -> tuple[Array, Any]:
    grads = multi_head_backward(da, cache)
    return grads.x_q + grads.x_k + grads.x_v, grads  # queries, keys and values are of one array


def cross_attention_backward(da: Array, cache: MultiHeadCache) -> tuple[Array, Any]:
    grads = multi_head_backward(da, cache)
    return grads.x_q, grads


def hidden_backward(da: Array, cache: FeedForwardCache) -> tuple[Array, Any]:
    grads = feed_forward_backward(da, cache)
    return grads.x, grads


# --- blocks ------------------------------------------------------------------------------------------------------------------


@quiet
def encoder_block_forward(
    x: Array, params: EncoderBlockParams, config: Config, *, mask: Any = None, bias: Any = None, positions: Any = None,
    dropout: EncoderDropout | None = None,
) -> tuple[Array, EncoderBlockCache]:  # fmt: skip
    """Self-attention and a feed-forward layer, equations (1) and (3) of this page.

    x : (..., L, M)   params, config : see `EncoderBlockParams` and `Config`
    mask, bias : as in `npattn.attention_forward`, for scores (..., H, L, L); the mask is beside that of ``config.causal``
    positions : (L,) or (..., L), of the rotary positions   dropout : masks
    Returns y (..., L, M) and the cache. Raises TypeError, ValueError.
    """
    check_class("encoder_block", "params", params, EncoderBlockParams)
    check_class("encoder_block", "config", config, Config)
    p, drop = params, dropout or EncoderDropout()
    attend = _self_attention(p.attention, config, _seen(config, mask, config.causal), bias, positions, drop.weights)
    h, attention = sublayer_forward(x, attend, p.attention_norm, config, drop.attention)  # (1)
    hidden = _hidden(p.feed_forward, config, drop.hidden)
    y, feed_forward = sublayer_forward(h, hidden, p.feed_forward_norm, config, drop.feed_forward)  # (3)
    return y, EncoderBlockCache(attention, feed_forward, config)


@quiet
def encoder_block_backward(dy: Array, cache: EncoderBlockCache) -> EncoderBlockGrads:
    """The gradients of sum(dy * y), from (3) to (1). dy : (..., L, M), as y. Raises TypeError, ValueError."""
    check_class("encoder_block", "cache", cache, EncoderBlockCache, ", from encoder_block_forward")
    c = cache
    dh, of_hidden, d_hidden_norm = sublayer_backward(dy, c.feed_forward, hidden_backward, c.config)  # (3)
    dx, of_attention, d_norm = sublayer_backward(dh, c.attention, self_attention_backward, c.config)  # (1)
    params = EncoderBlockParams(of_attention.params, d_norm, of_hidden.params, d_hidden_norm)
    return EncoderBlockGrads(dx, params, of_attention.bias)


@quiet
def decoder_block_forward(
    x: Array, memory: Array, params: DecoderBlockParams, config: Config, *, mask: Any = None, bias: Any = None,
    positions: Any = None, cross_mask: Any = None, cross_bias: Any = None, dropout: DecoderDropout | None = None,
) -> tuple[Array, DecoderBlockCache]:  # fmt: skip
    """Causal self-attention, attention to the memory and a feed-forward layer, equations (1) to (3) of this page.

    x : (..., L, M)   memory : (..., S, Mk), what the encoder returned; it gets no norm here
    mask, bias, positions, dropout : as in `encoder_block_forward`; cross_mask, cross_bias : for scores (..., H, L, S)
    Returns y (..., L, M) and the cache. Raises TypeError, ValueError.
    """
    check_class("decoder_block", "params", params, DecoderBlockParams)
    check_class("decoder_block", "config", config, Config)
    p, drop = params, dropout or DecoderDropout()

    def look(n: Array) -> tuple[Array, MultiHeadCache]:
        options = {"mask": cross_mask, "bias": cross_bias, "dropout_mask": drop.cross_weights}
        return multi_head_forward(n, memory, memory, p.cross, config.num_heads, **options, **_options(config))

    attend = _self_attention(p.attention, config, _seen(config, mask, True), bias, positions, drop.weights)
    h, attention = sublayer_forward(x, attend, p.attention_norm, config, drop.attention)  # (1)
    c, cross = sublayer_forward(h, look, p.cross_norm, config, drop.cross)  # (2)
    hidden = _hidden(p.feed_forward, config, drop.hidden)
    y, feed_forward = sublayer_forward(c, hidden, p.feed_forward_norm, config, drop.feed_forward)  # (3)
    return y, DecoderBlockCache(attention, cross, feed_forward, config)


@quiet
def decoder_block_backward(dy: Array, cache: DecoderBlockCache) -> DecoderBlockGrads:
    """The gradients of sum(dy * y), from (3) to (1). dy : (..., L, M), as y. Raises TypeError, ValueError."""
    check_class("decoder_block", "cache", cache, DecoderBlockCache, ", from decoder_block_forward")
    c = cache
    dc, of_hidden, d_hidden_norm = sublayer_backward(dy, c.feed_forward, hidden_backward, c.config)  # (3)
    dh, of_cross, d_cross_norm = sublayer_backward(dc, c.cross, cross_attention_backward, c.config)  # (2)
    dx, of_attention, d_norm = sublayer_backward(dh, c.attention, self_attention_backward, c.config)  # (1)
    dmemory = of_cross.x_k + of_cross.x_v  # keys and values are of one array
    params = DecoderBlockParams(of_attention.params, d_norm, of_cross.params, d_cross_norm, of_hidden.params, d_hidden_norm)
    return DecoderBlockGrads(dx, dmemory, params, of_attention.bias, of_cross.bias)


def _seen(config: Config, mask: Any, causal: bool, align: str | None = None) -> Any:
    """The mask of self-attention: what the block and the caller allow."""
    if config.window is not None:
        near = masks.window(config.window, 0 if causal else config.window, align=align)
    elif causal:
        near = masks.causal(align=align)
    else:
        return mask
    return near if mask is None else near & mask


def _self_attention(params: MultiHeadParams, config: Config, mask: Any, bias: Any, positions: Any, drop: Any) -> Sublayer:
    def attend(n: Array) -> tuple[Array, MultiHeadCache]:
        turn = {} if config.rotary is None else {"rotary": config.rotary, "q_pos": positions, "k_pos": positions}
        options = {"mask": mask, "bias": bias, "dropout_mask": drop, **turn}
        return multi_head_forward(n, n, n, params, config.num_heads, **options, **_options(config))

    return attend


# --- decoding ----------------------------------------------------------------------------------------------------------------


class DecoderPast(NamedTuple):
    """What a decoder block keeps of the tokens so far, and of the memory."""

    attention: KVCache | None
    cross: KVCache

    def rows(self, index: Array) -> DecoderPast:
        """These sequences of the batch, in this order."""
        return DecoderPast(None if self.attention is None else self.attention.rows(index), self.cross.rows(index))


def encoder_block_decode(
    x: Array, params: EncoderBlockParams, config: Config, past: KVCache | None, *, mask: Any = None, bias: Any = None,
    positions: Any = None,
) -> tuple[Array, KVCache]:  # fmt: skip
    """A causal encoder block for L more tokens, behind those of past: equations (1) and (3), without a backward.

    x : (..., L, M)   past : what the call before returned, None at the start
    mask, bias : for scores (..., H, L, S), where S counts the tokens of past and of x   positions : of x alone
    Returns y (..., L, M), and the past with these tokens. Raises TypeError, ValueError.
    """
    if not config.causal:
        raise ValueError("encoder_block_decode: config.causal is False, expected True: later tokens would change earlier ones")
    attend = _more(params.attention, config, past, mask, bias, positions)
    h, kept = sublayer_forward(x, attend, params.attention_norm, config, None)  # (1)
    y, _ = sublayer_forward(h, _hidden(params.feed_forward, config, None), params.feed_forward_norm, config, None)  # (3)
    return y, kept.inner


def decoder_block_memory(memory: Array, params: DecoderBlockParams, config: Config) -> DecoderPast:
    """What a decoder block keeps before the first token. memory : (..., S, Mk)"""
    H, G = config.num_heads, config.num_kv_heads
    return DecoderPast(None, multi_head_memory(memory, params.cross, H, num_kv_heads=G, norm_eps=config.norm_eps))


def decoder_block_decode(
    x: Array, params: DecoderBlockParams, config: Config, past: DecoderPast, *, mask: Any = None, bias: Any = None,
    positions: Any = None, cross_mask: Any = None, cross_bias: Any = None,
) -> tuple[Array, DecoderPast]:  # fmt: skip
    """A decoder block for L more tokens, behind those of past: equations (1) to (3), without a backward.

    past : from `decoder_block_memory` or from the call before; all else is as in `encoder_block_decode`
    """
    attend = _more(params.attention, config, past.attention, mask, bias, positions)

    def look(n: Array) -> tuple[Array, KVCache]:
        options = {"mask": cross_mask, "bias": cross_bias, "cross": True, **_options(config)}
        return multi_head_decode(n, params.cross, config.num_heads, past.cross, **options)

    h, kept = sublayer_forward(x, attend, params.attention_norm, config, None)  # (1)
    c, _ = sublayer_forward(h, look, params.cross_norm, config, None)  # (2)
    y, _ = sublayer_forward(c, _hidden(params.feed_forward, config, None), params.feed_forward_norm, config, None)  # (3)
    return y, DecoderPast(kept.inner, past.cross)


def _more(params: MultiHeadParams, config: Config, past: KVCache | None, mask: Any, bias: Any, positions: Any) -> Sublayer:
    """Causal self-attention of more tokens."""
    turn = {} if config.rotary is None else {"rotary": config.rotary, "positions": positions}
    options = {"mask": _seen(config, mask, True, "bottom_right"), "bias": bias, **turn, **_options(config)}

    def attend(n: Array) -> tuple[Array, KVCache]:
        scores = config.num_heads * n[..., 0].size * (n.shape[-2] + (0 if past is None else past.length))
        if scores < FEW:
            options["implementation"] = "dense"
        return multi_head_decode(n, params, config.num_heads, past, **options)

    return attend


# --- what the blocks above share ---------------------------------------------------------------------------------------------


def _hidden(params: FeedForwardParams, config: Config, drop: Array | None) -> Sublayer:
    return lambda n: feed_forward_forward(n, params, activation=config.activation, dropout_mask=drop)


def _options(config: Config) -> dict[str, Any]:
    """The options that both kinds of attention have."""
    return {"num_kv_heads": config.num_kv_heads, "scale": config.scale, "softcap": config.softcap,
            "implementation": config.implementation, "norm_eps": config.norm_eps}  # fmt: skip


__all__ = [
    "DecoderBlockCache",
    "DecoderBlockGrads",
    "DecoderBlockParams",
    "DecoderDropout",
    "DecoderPast",
    "EncoderBlockCache",
    "EncoderBlockGrads",
    "EncoderBlockParams",
    "EncoderDropout",
    "decoder_block_backward",
    "decoder_block_decode",
    "decoder_block_forward",
    "decoder_block_memory",
    "encoder_block_backward",
    "encoder_block_decode",
    "encoder_block_forward",
]
