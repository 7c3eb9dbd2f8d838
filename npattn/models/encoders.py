"""Encoders such as BERT and RoBERTa, and the heads that stand on them.

    x = embed(ids)                 (..., L) -> (..., L, M)     (1)    `npattn.models.transformer` (1)
    y = encoder(x)                 (..., L, M)                 (2)    every token sees every other

    one answer for a text: `TextHeadParams`
    c = sum_l p_l y_l              (..., M)                    (3)    p picks the first or the last token, or is a mean
    t = tanh(c w + b)              (..., M)                    (4)    BERT's pooler
    u = t / |t|                    (..., M)                    (5)    with ``Config.normalize``
    logits = u w + b               (..., V)                    (6)    V classes

    one answer for each token: `npattn.LinearParams`
    logits = y w + b               (..., L, V)                 (7)    V classes; 2 of them, start and end, for an answer's span

    masked tokens: `MaskedHeadParams`
    n = norm(f(y w + b))           (..., L, M)                 (8)    f is ``Config.activation``
    logits = n table^T + b         (..., L, V)                 (9)    the table of (1), unless there is another

(4), (5) and (6) are left out where there is nothing for them. `npattn.cross_entropy` of the logits is the loss; of spans it is
`span_loss`. Devlin et al. 2019 (BERT); Liu et al. 2019 (RoBERTa); Reimers and Gurevych 2019 (the mean, and its length).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.models.config import NORMS, Config
from npattn.models.transformer import (
    NOTHING_DROPPED,
    EmbedCache,
    EmbedParams,
    EncoderCache,
    EncoderParams,
    HeadCache,
    HeadParams,
    StackDropout,
    embed_backward,
    embed_forward,
    encoder_backward,
    encoder_forward,
    head_backward,
    head_forward,
)
from npattn.ops import masks
from npattn.ops.activations import ACTIVATIONS
from npattn.ops.allowed import quiet, select
from npattn.ops.checks import Array, Dims, check_array, check_class, check_cotangent, check_dtype, check_integer
from npattn.ops.cross_entropy import CrossEntropyCache, cross_entropy_backward, cross_entropy_forward
from npattn.ops.linear import LinearCache, LinearParams, linear_backward, linear_forward
from npattn.ops.norms import NormParams, RMSNormCache, rms_norm_backward, rms_norm_forward

SHORTEST = 1e-12  # of (5): a text whose t is 0 has u = 0; torch's F.normalize divides by this, too


class TextHeadParams(NamedTuple):
    """The parameters of (4) and (6); what is None is left out."""

    pooler: LinearParams | None = None  # (M, M)
    out: LinearParams | None = None  # (M, V)


class MaskedHeadParams(NamedTuple):
    """The parameters of (8) and (9)."""

    dense: LinearParams  # (M, M)
    norm: NormParams
    head: HeadParams = HeadParams()


class EncoderModelParams(NamedTuple):
    """The parameters of an encoder. Without a head its output are the states y."""

    embed: EmbedParams
    encoder: EncoderParams
    head: TextHeadParams | LinearParams | MaskedHeadParams | None = None


class TextHeadCache(NamedTuple):
    """What the backward needs."""

    weights: Array  # (..., L) p of (3), in the computing dtype
    pooler: LinearCache | None
    t: Array  # (..., M) of (4), or c
    normal: RMSNormCache | None
    out: LinearCache | None
    shape: tuple[int, ...]  # of the logits


class MaskedHeadCache(NamedTuple):
    """What the backward needs."""

    dense: LinearCache
    activation: Any
    norm: Any
    head: HeadCache
    config: Config


class EncoderModelCache(NamedTuple):
    """What the backward needs."""

    embed: EmbedCache
    encoder: EncoderCache
    head: TextHeadCache | LinearCache | MaskedHeadCache | None


class TextHeadGrads(NamedTuple):
    """The gradients of `text_head`."""

    y: Array
    params: TextHeadParams


class MaskedHeadGrads(NamedTuple):
    """The gradients of `masked_head`."""

    y: Array
    params: MaskedHeadParams
    table: Array | None  # None where params.head.w is in its place


class EncoderModelGrads(NamedTuple):
    """The gradients of `encoder_model`; those of params have its shape and names."""

    params: EncoderModelParams


# --- the whole model ---------------------------------------------------------------------------------------------------------


def encoder_model_forward(
    ids: Array, params: EncoderModelParams, config: Config, *, inside: Array | None = None, mask: Any = None,
    positions: Any = None, types: Array | None = None, dropout: StackDropout = NOTHING_DROPPED,
) -> tuple[Array, EncoderModelCache]:  # fmt: skip
    """An encoder and its head, equations (1) to (9) of this page.

    ids : (..., L) integers   config : BERT's is Config(H, pre_norm=False, norm_eps=1e-12)
    inside : (L,) or (..., L) booleans, False for padding: no token sees it, and it is not pooled
    mask : what else is not seen, for scores (..., H, L, L), as `npattn.packed`
    positions : (L,) or (..., L), 0 to L - 1 unless given; RoBERTa's are ``inside.cumsum(-1) - 1`` with first_position=2
    types : (..., L), of the first and the second text of a pair, 0 unless given
    dropout : masks
    Returns y (..., L, M), or the logits of the head, and the cache. Raises TypeError, ValueError.
    """
    op, p = "encoder_model", params
    check_class(op, "params", params, EncoderModelParams)
    check_class(op, "config", config, Config)
    if inside is not None:
        _check_inside(op, inside, np.shape(ids))
        mask = masks.keys(inside) if mask is None else masks.keys(inside) & mask
    x, embed = embed_forward(ids, p.embed, config, positions=positions, types=types, dropout=dropout.embed)  # (1)
    y, encoder = encoder_forward(x, p.encoder, config, mask=mask, positions=positions, dropout=dropout.blocks)  # (2)
    if p.head is None:
        return y, EncoderModelCache(embed, encoder, None)
    head: Any
    if isinstance(p.head, TextHeadParams):
        logits, head = text_head_forward(y, p.head, config, inside=inside)  # (3) to (6)
    elif isinstance(p.head, MaskedHeadParams):
        logits, head = masked_head_forward(y, p.head, p.embed.table, config)  # (8), (9)
    else:
        logits, head = linear_forward(y, p.head)  # (7)
    return logits, EncoderModelCache(embed, encoder, head)


def encoder_model_backward(dlogits: Array, cache: EncoderModelCache) -> EncoderModelGrads:
    """The gradients of sum(dlogits * logits), or of sum(dy * y), for every parameter, from (9) to (1).

    A table that is also the head gets the sum of both. Raises TypeError, ValueError.
    """
    check_class("encoder_model", "cache", cache, EncoderModelCache, ", from encoder_model_forward")
    dy, dtable = dlogits, None
    dhead: Any = None
    if isinstance(cache.head, TextHeadCache):
        dy, dhead = text_head_backward(dlogits, cache.head)  # (6) to (3)
    elif isinstance(cache.head, MaskedHeadCache):
        dy, dhead, dtable = masked_head_backward(dlogits, cache.head)  # (9), (8)
    elif cache.head is not None:
        dy, dhead = linear_backward(dlogits, cache.head)  # (7)
    of_encoder = encoder_backward(dy, cache.encoder)  # (2)
    dembed = embed_backward(of_encoder.x, cache.embed).params  # (1)
    if dtable is not None:
        dembed = dembed._replace(table=dembed.table + dtable)
    return EncoderModelGrads(EncoderModelParams(dembed, of_encoder.params, dhead))


# --- (3) to (6): one answer for a text ---------------------------------------------------------------------------------------


@quiet
def text_head_forward(
    y: Array, params: TextHeadParams, config: Config, *, inside: Array | None = None
) -> tuple[Array, TextHeadCache]:
    """Pooling, and what stands behind it, equations (3) to (6) of this page. Without an output layer u are the logits.

    y : (..., L, M)   config : its ``pooling`` and ``normalize`` are used   inside : (L,) or (..., L) booleans, all unless given
    Returns logits (..., V) and the cache. Raises TypeError, ValueError.

    >>> y = np.array([[3.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    >>> inside = np.array([True, True, False])
    >>> text_head_forward(y, TextHeadParams(), Config(1, pooling="mean"), inside=inside)[0].tolist()
    [1.5, 0.5]
    """
    check_class("text_head", "params", params, TextHeadParams)
    computing = check_dtype("text_head", y=y)
    Dims("text_head").fit("y", y, "... L M")
    weights = _weights("text_head", inside, y.shape[:-1], config.pooling).astype(computing)
    counted = select(weights[..., None] != 0, y.astype(computing, copy=False))  # padding may be NaN
    t = (weights[..., None, :] @ counted)[..., 0, :].astype(y.dtype, copy=False)  # (3)
    pooler, normal, out = None, None, None
    if params.pooler is not None:
        t, pooler = linear_forward(t, params.pooler)
        t = np.tanh(t)  # (4)
    logits = t
    if config.normalize:
        # t / |t| is an RMS norm, divided by the root of M.
        width = t.shape[-1]
        logits, normal = rms_norm_forward(t, NormParams(np.full(width, computing.type(width) ** -0.5)), eps=SHORTEST**2)  # (5)
    if params.out is not None:
        logits, out = linear_forward(logits, params.out)  # (6)
    return logits, TextHeadCache(weights, pooler, t, normal, out, logits.shape)


@quiet
def text_head_backward(dlogits: Array, cache: TextHeadCache) -> TextHeadGrads:
    """The gradients of sum(dlogits * logits), from (6) to (3); dt of (4) is multiplied by 1 - t^2.

    dlogits : as the logits. A token with p = 0 has gradient 0. Raises TypeError, ValueError.
    """
    check_class("text_head", "cache", cache, TextHeadCache, ", from text_head_forward")
    weights, pooler, t, normal, out, shape = cache
    dt = check_cotangent("text_head", "dlogits", dlogits, shape, t.dtype, t.dtype)
    dpooler, dout = None, None
    if out is not None:
        dt, dout = linear_backward(dt, out)  # (6)
    if normal is not None:
        dt = rms_norm_backward(dt, normal).x  # (5)
    if pooler is not None:
        dt, dpooler = linear_backward(dt * (1 - t * t), pooler)  # (4)
    w = weights[..., None]
    dy = select(w != 0, w * dt[..., None, :]).astype(t.dtype, copy=False)  # (3)
    return TextHeadGrads(dy, TextHeadParams(dpooler, dout))


def _check_inside(op: str, inside: Array, shape: tuple[int, ...]) -> Array:
    """The tokens that are inside, (..., L)."""
    if check_array(op, "inside", inside).dtype != np.bool_:
        raise TypeError(f"{op}: inside has dtype {inside.dtype}, expected bool (False for padding): inside.astype(bool)")
    if inside.shape not in (shape, shape[-1:]):
        raise ValueError(f"{op}: inside has shape {inside.shape}, expected {shape} or {shape[-1:]}")
    inside = np.broadcast_to(inside, shape)
    if not inside.any(-1).all():
        raise ValueError(f"{op}: inside has a text of padding alone, expected a token in each")
    return inside


def _weights(op: str, inside: Array | None, shape: tuple[int, ...], pooling: str | None) -> Array:
    """p of (3), (..., L)."""
    within = _check_inside(op, np.ones(shape[-1:], bool) if inside is None else inside, shape)
    count = within.cumsum(-1)
    if pooling == "mean":
        return np.asarray(within / count[..., -1:].astype(np.longdouble))  # divided once, whatever the dtype
    return np.asarray(within & (count == (count[..., -1:] if pooling == "last" else 1)))


# --- (8), (9): masked tokens -------------------------------------------------------------------------------------------------


def masked_head_forward(
    y: Array, params: MaskedHeadParams, table: Array, config: Config
) -> tuple[Array, MaskedHeadCache]:
    """The logits of what stood in the place of each token, equations (8) and (9) of this page.

    y : (..., M)   table : (V, M), used where params.head.w is None. Returns logits (..., V) and the cache.
    """
    check_class("masked_head", "params", params, MaskedHeadParams)
    a, dense = linear_forward(y, params.dense)  # (8)
    h, activation = ACTIVATIONS[config.activation][0](a)  # (8)
    n, norm = NORMS[config.norm][0](h, params.norm, eps=config.norm_eps)  # (8)
    logits, head = head_forward(n, params.head, table, config)  # (9)
    return logits, MaskedHeadCache(dense, activation, norm, head, config)


def masked_head_backward(dlogits: Array, cache: MaskedHeadCache) -> MaskedHeadGrads:
    """The gradients of sum(dlogits * logits), from (9) to (8). dlogits : (..., V), as the logits"""
    check_class("masked_head", "cache", cache, MaskedHeadCache, ", from masked_head_forward")
    config = cache.config
    dn, dhead, dtable = head_backward(dlogits, cache.head)  # (9)
    dh, dnorm = NORMS[config.norm][1](dn, cache.norm)  # (8)
    da = ACTIVATIONS[config.activation][1](dh, cache.activation).x  # (8)
    dy, ddense = linear_backward(da, cache.dense)  # (8)
    return MaskedHeadGrads(dy, MaskedHeadParams(ddense, dnorm, dhead), dtable)


# --- answer spans: what is done with the logits of (7) -----------------------------------------------------------------------


class SpanLossCache(NamedTuple):
    """What the backward needs."""

    inner: CrossEntropyCache


class SpanLossGrads(NamedTuple):
    """The gradient of `span_loss`."""

    logits: Array


class Span(NamedTuple):
    """Where an answer starts and ends, both included, and the sum of the two logits."""

    start: Array  # (...)
    end: Array  # (...)
    score: Array  # (...)


def span_loss_forward(
    logits: Array, spans: Array, *, inside: Array | None = None, mask: Array | None = None
) -> tuple[Array, SpanLossCache]:
    """The mean of two cross-entropies over the tokens of a text: of where its answer starts, and of where it ends.

    logits : (..., L, 2), for start and end   spans : (..., 2) integers, the first and the last token of the answer
    inside : (L,) or (..., L) booleans, False where no answer can be, as padding; all unless given
    mask   : (...) booleans, False for a text that does not count; its span may be anything
    Returns the loss () and the cache. Raises TypeError, ValueError.
    """
    by_token = _by_token("span_loss", logits, inside)  # (..., 2, L)
    if check_array("span_loss", "spans", spans).shape != by_token.shape[:-1]:
        raise ValueError(f"span_loss: spans has shape {spans.shape}, expected {by_token.shape[:-1]}: fixed by logits")
    if mask is not None and check_array("span_loss", "mask", mask).shape != spans.shape[:-1]:
        raise ValueError(f"span_loss: mask has shape {mask.shape}, expected {spans.shape[:-1]}: fixed by logits")
    counts = None if mask is None else np.repeat(mask[..., None], 2, -1)
    loss, inner = cross_entropy_forward(by_token, spans, mask=counts)
    if inside is not None:
        within = np.broadcast_to(inside, logits.shape[:-1])
        found = np.take_along_axis(within, inner.targets, -1)  # the starts and the ends
        if not select(counts, found, True).all():
            raise ValueError("span_loss: spans has a token that is not inside, expected inside; mask= leaves a text out")
    return loss, SpanLossCache(inner)


def span_loss_backward(dloss: Array, cache: SpanLossCache) -> SpanLossGrads:
    """The gradient of dloss * loss for the logits, (..., L, 2); it is 0 where a token is not inside. dloss : ()"""
    check_class("span_loss", "cache", cache, SpanLossCache, ", from span_loss_forward")
    return SpanLossGrads(cross_entropy_backward(dloss, cache.inner).logits.swapaxes(-1, -2))


def best_span(logits: Array, *, inside: Array | None = None, max_length: int | None = None) -> Span:
    """The answer with the largest start logit + end logit that does not end before it starts.

    logits : (..., L, 2)   inside : as in `span_loss_forward`   max_length : the largest number of tokens, L unless given
    Of answers with the same sum it is the shortest, and of these the first. Raises TypeError, ValueError.

    >>> logits = np.array([[0.0, 9.0], [5.0, 0.0], [4.0, 3.0], [0.0, 7.0]])
    >>> start, end, score = best_span(logits)
    >>> int(start), int(end), float(score)
    (1, 3, 12.0)
    >>> best_span(logits, max_length=2).start.tolist()
    2
    """
    by_token = _by_token("best_span", logits, inside)
    start, end, L = by_token[..., 0, :], by_token[..., 1, :], by_token.shape[-1]
    most = L if max_length is None else min(check_integer("best_span", "max_length", max_length, least=1), L)
    if np.isnan(by_token).any():
        raise ValueError("best_span: logits has NaN, expected numbers")
    best = [np.zeros(start.shape[:-1], int), np.zeros(start.shape[:-1], int), np.full(start.shape[:-1], -np.inf, start.dtype)]
    for more in range(most):
        scores = start[..., : L - more] + end[..., more:]
        at = scores.argmax(-1)
        score = np.take_along_axis(scores, at[..., None], -1)[..., 0]
        better = score > best[2]
        best = [np.where(better, new, old) for new, old in zip((at, at + more, score), best, strict=True)]
    return Span(*best)


def _by_token(op: str, logits: Array, inside: Array | None) -> Array:
    """The logits as (..., 2, L), -inf where a token is not inside."""
    check_dtype(op, logits=logits)
    if logits.ndim < 2 or logits.shape[-1] != 2 or logits.shape[-2] == 0:
        raise ValueError(f"{op}: logits has shape {logits.shape}, expected (..., L, 2), for start and end")
    within = None if inside is None else _check_inside(op, inside, logits.shape[:-1])[..., None, :]
    return select(within, logits.swapaxes(-1, -2), -np.inf)


__all__ = [
    "EncoderModelCache",
    "EncoderModelGrads",
    "EncoderModelParams",
    "MaskedHeadCache",
    "MaskedHeadGrads",
    "MaskedHeadParams",
    "Span",
    "SpanLossCache",
    "SpanLossGrads",
    "TextHeadCache",
    "TextHeadGrads",
    "TextHeadParams",
    "best_span",
    "encoder_model_backward",
    "encoder_model_forward",
    "masked_head_backward",
    "masked_head_forward",
    "span_loss_backward",
    "span_loss_forward",
    "text_head_backward",
    "text_head_forward",
]
