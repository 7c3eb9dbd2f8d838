"""An encoder-decoder whose decoder can copy words of the source: a pointer-generator.

    y, m = states and memory of the encoder-decoder        (..., L, M), (..., S, M)   (1)    `npattn.models.transformer`
    x = y w + b                                            (..., L, K)                (2)    the words that it can write itself
    s = (y w_q) (m w_k)^T D ** -0.5                        (..., L, S)                (3)    one more head of attention ...
    a = y w_g + b_g                                        (..., L)                   (4)
    g = sigmoid(a)                                         (..., L)                   (5)    ... and how much it is asked
    p_v = g softmax(x)_v + (1 - g) sum_j [source_j = v] softmax(s)_j                  (6)    (..., L, V)

Tokens 0 to K - 1 have a logit in (2); all others, up to V - 1, can only come from the source. So V may be as large as one likes
at the price of a table: a vocabulary whose rare words stand behind its common ones needs no list of words that are missing.

The loss is -log p of the target. It is computed in logs, and p of all V words is never formed:

    u = log g + x_t - lse(x)                               (7)    -inf where t >= K
    c = log (1 - g) + lse(s_j with source_j = t) - lse(s)  (8)    -inf where the source does not have t
    loss = -log(exp u + exp c)                             (9)

With r = exp(u - log p), the share of (7) in p, the gradients are

    dx_v = r (softmax(x)_v - [v = t])                      through (7)
    ds_j = (1 - r) (softmax(s)_j - softmax of those with source_j = t)        through (8)
    da = g - r                                             through (5)

See, Liu and Manning 2017, section 2.2; here the attention that copies has weights of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npattn.models.config import Config
from npattn.models.transformer import (
    NO_DROPOUT,
    HeadParams,
    TransformerCache,
    TransformerDropout,
    TransformerParams,
    TransformerPast,
    encoded,
    memory_past,
    states_backward,
    states_decode,
    states_forward,
)
from npattn.ops.allowed import quiet, select, swap
from npattn.ops.checks import Array, Dims, check_class, check_dtype, check_from_0, check_one_of, integers
from npattn.ops.cross_entropy import divisor
from npattn.ops.linear import LinearCache, LinearParams, linear_backward, linear_forward
from npattn.ops.masks import as_mask
from npattn.ops.softmax import log_sum_exp, normalize


class CopyParams(NamedTuple):
    """The parameters of (3) and (4)."""

    w_q: Array  # (M, D)
    w_k: Array  # (M, D)
    gate: LinearParams  # (M, 1) and (1,)


class CopyingParams(NamedTuple):
    """The parameters of a copying encoder-decoder. ``transformer.head`` has the w and the b of (2), (M, K) and (K,)."""

    transformer: TransformerParams
    copy: CopyParams


class CopyScores(NamedTuple):
    """What says where the next word comes from, before any softmax; their gradients have the same names."""

    logits: Array  # (..., L, K) of (2)
    copies: Array  # (..., L, S) of (3); -inf at places of padding
    gate: Array  # (..., L) of (4)


class CopyingCache(NamedTuple):
    """What the backward needs."""

    transformer: TransformerCache
    head: LinearCache
    queries: LinearCache
    keys: LinearCache
    gate: LinearCache
    q: Array
    k: Array


class CopyingGrads(NamedTuple):
    """The gradients of `copying`; those of params have its shape and names."""

    params: CopyingParams


class CopyLossCache(NamedTuple):
    """What the backward of `copy_loss` needs."""

    scores: CopyScores
    shares: tuple[Array, Array, Array, Array]  # softmax of logits, of copies, of the copies of the target; g
    sources: Array  # (..., L, 2), r of this page and 1 - r; both 0 where p is 0
    targets: Array
    counts: Array | None
    options: tuple[str, float]  # reduction, label_smoothing


class CopyLossGrads(NamedTuple):
    """The gradients of `copy_loss`."""

    scores: CopyScores


# --- the model ---------------------------------------------------------------------------------------------------------------


def copying_forward(
    source: Array, target: Array, params: CopyingParams, config: Config, *, source_mask: Any = None, target_mask: Any = None,
    cross_mask: Any = None, dropout: TransformerDropout = NO_DROPOUT,
) -> tuple[CopyScores, CopyingCache]:  # fmt: skip
    """Where the next word comes from, equations (1) to (4) of this page.

    source : (..., S) integers   target : (..., L) integers, of which position l sees those up to l
    source_mask, target_mask, cross_mask : as in `transformer_forward`; no word is copied from where cross_mask is False
    Returns `CopyScores` and the cache. Raises TypeError, ValueError.
    """
    check_class("copying", "params", params, CopyingParams)
    masks = {"source_mask": source_mask, "target_mask": target_mask, "cross_mask": cross_mask}
    y, memory, of_states = states_forward(source, target, params.transformer, config, **masks, dropout=dropout)  # (1)
    k, of_keys = linear_forward(memory, LinearParams(params.copy.w_k))  # (3)
    scores, head, queries, gate, q = _scores_forward(y, k, params, cross_mask)
    return scores, CopyingCache(of_states, head, queries, of_keys, gate, q, k)


@quiet
def _scores_forward(y: Array, k: Array, params: CopyingParams, mask: Any) -> tuple[CopyScores, Any, Any, Any, Array]:
    w, b = params.transformer.head
    if w is None:
        raise ValueError("copying: params.transformer.head.w is None, expected an array (M, K)")
    logits, head = linear_forward(y, LinearParams(w, b))  # (2)
    q, queries = linear_forward(y, LinearParams(params.copy.w_q))
    copies = q @ swap(k) * q.shape[-1] ** -0.5  # (3)
    if mask is not None:
        bound = as_mask("copying", mask).bind((*copies.shape[:-2], 1, *copies.shape[-2:]))  # as one head
        copies = select(bound.dense()[..., 0, :, :], copies, -np.inf)
    a, gate = linear_forward(y, params.copy.gate)  # (4)
    return CopyScores(logits, copies, a[..., 0]), head, queries, gate, q


@quiet
def copying_backward(dscores: CopyScores, cache: CopyingCache, *, encoder: bool = True) -> CopyingGrads:
    """The gradients of sum(dlogits * logits) + sum(dcopies * copies) + sum(dgate * gate), from (4) to (1).

    encoder : False: those of the encoder and its embedding are not needed, and None
    """
    check_class("copying", "cache", cache, CopyingCache, ", from copying_forward")
    c, D = cache, cache.q.shape[-1]
    of_gate = linear_backward(dscores.gate[..., None], c.gate)  # (4)
    ds = dscores.copies * D**-0.5  # (3)
    of_queries, of_keys = linear_backward(ds @ c.k, c.queries), linear_backward(swap(ds) @ c.q, c.keys)
    of_head = linear_backward(dscores.logits, c.head)  # (2)
    dy = of_head.x + of_queries.x + of_gate.x
    grads = states_backward(dy, of_keys.x, c.transformer, encoder=encoder).params  # (1)
    copy = CopyParams(of_queries.params.w, of_keys.params.w, of_gate.params)
    return CopyingGrads(CopyingParams(grads._replace(head=HeadParams(*of_head.params)), copy))


# --- the loss ----------------------------------------------------------------------------------------------------------------


@quiet
def copy_loss_forward(
    scores: CopyScores, source: Array, targets: Array, *, mask: Array | None = None, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Array, CopyLossCache]:  # fmt: skip
    """-log p of the targets in nats, equations (5) to (9) of this page.

    source  : (..., S) integers, the words at the places of ``scores.copies``   targets : (..., L) integers from 0 on
    mask    : (..., L), boolean, True = counts   reduction : "mean", "sum" or "none", as in `npattn.cross_entropy_forward`
    label_smoothing : s from 0 to 1: the loss is (1 - s) of (9) and s of the mean of -log softmax(x) over the K words of (2)
    Returns the loss in the computing dtype, shape () or (..., L), and the cache. It is inf where p is 0: the target has no
    logit, and the source does not have it. Raises TypeError, ValueError.
    """
    op = "copy_loss"
    check_class(op, "scores", scores, CopyScores)
    computing, dims = check_dtype(op, **scores._asdict()), Dims(op)
    K = dims.fit("scores.logits", scores.logits, "... L K").shape[-1]
    dims.fit("scores.copies", scores.copies, "... L S")
    dims.fit("scores.gate", scores.gate, "... L")
    words = dims.fit("source", integers(op, "source", source), "... S")
    targets = dims.fit("targets", integers(op, "targets", targets), "... L")
    if mask is not None and dims.fit("mask", mask, "... L").dtype != np.bool_:
        raise TypeError(f"{op}: mask has dtype {mask.dtype}, expected bool (True = counts)")
    check_one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    s = check_from_0(op, "label_smoothing", label_smoothing, most=1.0)
    x, copies, a = (part.astype(computing, copy=False) for part in scores)
    if targets.size and select_ints(mask, targets).min() < 0:
        raise ValueError(f"{op}: targets has {targets.min()}, expected integers from 0 on; False in mask where none counts")

    nothing = np.zeros_like(a)
    log_g, log_not = -log_sum_exp(np.stack([nothing, -a], -1)), -log_sum_exp(np.stack([nothing, a], -1))  # (5)
    of_words, lse_x = normalize(x)
    of_places, lse_s = normalize(copies)
    inside = (targets >= 0) & (targets < K)
    x_t = np.take_along_axis(x, np.where(inside, targets, 0)[..., None], -1)[..., 0]
    u = select(inside, log_g + x_t - lse_x, -np.inf)  # (7)
    same = (targets[..., None] == words[..., None, :]) & (copies.real != -np.inf)
    of_same, lse_t = normalize(select(same, copies, -np.inf), same)
    some = same.any(-1)
    c = select(some, log_not + lse_t - lse_s, -np.inf)  # (8)
    both, log_p = normalize(np.stack([u, c], -1))  # (9)  r and 1 - r beside it
    loss = -log_p
    if s:
        loss = (1 - s) * loss + s * (lse_x - x.mean(-1))
    loss = select(mask, loss)
    if reduction != "none":
        loss = np.asarray((loss / divisor(reduction, targets, mask)).sum())
    shares = (of_words, of_places, of_same, np.exp(log_g))
    return loss, CopyLossCache(scores, shares, both, targets, mask, (reduction, s))


def select_ints(mask: Array | None, x: Array) -> Array:
    """x where it counts, else 0."""
    return x if mask is None else np.where(mask, x, 0)


@quiet
def copy_loss_backward(dloss: Any, cache: CopyLossCache) -> CopyLossGrads:
    """The gradients of sum(dloss * loss), as this page derives them. dloss : as the loss, or None for 1."""
    check_class("copy_loss", "cache", cache, CopyLossCache, ", from copy_loss_forward")
    (of_words, of_places, of_same, g), both, targets, counts, (reduction, s) = cache[1:]
    r, copied = both[..., 0], both[..., 1]
    each = np.asarray(1.0 if dloss is None else dloss, r.dtype) / divisor(reduction, targets, counts)
    each = select(counts, np.broadcast_to(each, targets.shape).copy())
    K = of_words.shape[-1]
    dlogits = ((1 - s) * r + s)[..., None] * of_words - (np.asarray(s / K, r.dtype) if s else 0)
    inside = (targets >= 0) & (targets < K)
    at = np.where(inside, targets, 0)[..., None]
    np.put_along_axis(dlogits, at, np.take_along_axis(dlogits, at, -1) - (1 - s) * select(inside, r)[..., None], -1)
    dcopies = ((1 - s) * copied)[..., None] * (of_places - of_same)
    dgate = (1 - s) * ((r + copied) * g - r)
    alive = None if counts is None else counts[..., None]
    grads = select(alive, dlogits * each[..., None]), select(alive, dcopies * each[..., None]), select(counts, dgate * each)
    given = cache.scores
    return CopyLossGrads(CopyScores(*(x.astype(y.dtype, copy=False) for x, y in zip(grads, given, strict=True))))


# --- generation --------------------------------------------------------------------------------------------------------------


@quiet
def copy_log_probabilities(scores: CopyScores, source: Array, V: int) -> Array:
    """log p of each of V words, equation (6): (..., L, V). It has no backward; `copy_loss` has.

    >>> scores = CopyScores(np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]]), np.array([0.0]))
    >>> np.exp(copy_log_probabilities(scores, np.array([1, 3]), 4)).round(2).tolist()
    [[0.45, 0.3, 0.0, 0.25]]
    """
    x, copies, a = scores
    of_words, _ = normalize(x)
    of_places, _ = normalize(copies)
    g = 1 / (1 + np.exp(-a))
    words = np.broadcast_to(source[..., None, :], of_places.shape)
    p = np.zeros((*x.shape[:-1], V), x.dtype)
    p[..., : x.shape[-1]] = g[..., None] * of_words
    flat, weights = p.reshape(-1, V), ((1 - g)[..., None] * of_places).reshape(-1, words.shape[-1])
    np.add.at(flat, (np.arange(len(flat))[:, None], words.reshape(len(flat), -1)), weights)
    return np.log(p)


class CopyingPast(NamedTuple):
    """What the decoder keeps of the tokens so far, and of the source."""

    states: TransformerPast
    keys: Array  # (..., S, D) of (3)
    source: Array  # (..., S)

    @property
    def length(self) -> int:
        return self.states.length

    def rows(self, index: Array) -> CopyingPast:
        """These sequences of the batch, in this order."""
        return CopyingPast(self.states.rows(index), self.keys[index], self.source[index])


def copying_memory(source: Array, params: CopyingParams, config: Config, *, source_mask: Any = None) -> CopyingPast:
    """The encoder, and what the decoder needs of it before the first token."""
    check_class("copying_memory", "params", params, CopyingParams)
    memory = encoded(source, params.transformer, config, source_mask)  # (1)
    k, _ = linear_forward(memory, LinearParams(params.copy.w_k))  # (3)
    return CopyingPast(memory_past(memory, params.transformer, config), k, np.asarray(source))


def copying_decode(
    target: Array, params: CopyingParams, config: Config, past: CopyingPast, *, target_mask: Any = None,
    cross_mask: Any = None, positions: Any = None,
) -> tuple[Array, CopyingPast]:  # fmt: skip
    """The decoder for L more tokens; all is as in `npattn.models.transformer.transformer_decode`.

    Returns log p (..., L, V), equation (6), and the past with these tokens. Raises TypeError, ValueError.
    """
    check_class("copying_decode", "past", past, CopyingPast, ", from copying_memory")
    options = {"target_mask": target_mask, "cross_mask": cross_mask, "positions": positions}
    y, states = states_decode(target, params.transformer, config, past.states, **options)  # (1)
    scores, *_ = _scores_forward(y, past.keys, params, cross_mask)
    V = len(params.transformer.source.table)
    return copy_log_probabilities(scores, past.source, V), past._replace(states=states)


__all__ = [
    "CopyLossCache",
    "CopyLossGrads",
    "CopyParams",
    "CopyScores",
    "CopyingCache",
    "CopyingGrads",
    "CopyingParams",
    "CopyingPast",
    "copy_log_probabilities",
    "copy_loss_backward",
    "copy_loss_forward",
    "copying_backward",
    "copying_decode",
    "copying_forward",
    "copying_memory",
]
