"""Recurrent language models: the logits of the next token, after each token of a text.

    x = embed(ids)                 (B, T) -> (B, T, M)           (1)    as in `npattn.models.transformer` (1)
    x = layer(x, state)            (B, T, M) -> (B, T, N)        (2)    for each layer: `npattn.rnn`, `gru` or `lstm`
    y = norm(x)                    (B, T, N)                     (3)    if the parameters have a norm
    logits = head(y)               (B, T, N) -> (B, T, V)        (4)    as in `npattn.models.transformer` (5)

The class of its parameters says what a layer is. The loss is `npattn.cross_entropy` of the logits of step t and the token at
t + 1. Mikolov et al. 2010; with the LSTM and dropout between layers: Zaremba et al. 2014.

A long text is read in chunks. The states after a chunk are the ``past`` of the next. Their gradient goes back in the same way;
where it is left out, backpropagation through time is truncated there:

>>> from npattn import GRUParams
>>> rng = np.random.default_rng(0)
>>> V, M, N = 5, 3, 4
>>> layer = GRUParams(rng.standard_normal((M, 3 * N)), rng.standard_normal((N, 3 * N)))
>>> params = RecurrentParams(EmbedParams(rng.standard_normal((V, M))), (layer,), HeadParams(rng.standard_normal((N, V))))
>>> config, ids, dlogits = RecurrentConfig(), rng.integers(0, V, (2, 7)), rng.standard_normal((2, 7, V))
>>> _, whole = recurrent_model_forward(ids, params, config)
>>> _, first = recurrent_model_forward(ids[:, :4], params, config)
>>> _, second = recurrent_model_forward(ids[:, 4:], params, config, past=first.past)
>>> of_second = recurrent_model_backward(dlogits[:, 4:], second)
>>> of_first = recurrent_model_backward(dlogits[:, :4], first, of_second.past)  # without of_second.past: truncated
>>> both = of_first.params.layers[0].w_h + of_second.params.layers[0].w_h
>>> np.allclose(both, recurrent_model_backward(dlogits, whole).params.layers[0].w_h)
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npattn.models.config import NORMS, Config
from npattn.models.transformer import (
    NOTHING_DROPPED,
    EmbedCache,
    EmbedParams,
    HeadCache,
    HeadParams,
    StackDropout,
    embed_backward,
    embed_forward,
    head_backward,
    head_forward,
)
from npattn.ops.checks import Array, check_array, check_class, check_flag, check_one_of, kind
from npattn.ops.dropout import DropoutCache, dropout_backward, dropout_forward
from npattn.ops.gru import GRUCache, GRUParams, gru_backward, gru_forward
from npattn.ops.lstm import LSTMCache, LSTMParams, lstm_backward, lstm_forward
from npattn.ops.norms import NormParams
from npattn.ops.rnn import RNNCache, RNNParams, rnn_backward, rnn_forward


@dataclass(frozen=True)
class RecurrentConfig:
    """What a recurrent model computes. Sizes and kinds of layers are not here: they are those of the parameters.

    It is not `Config`, where the number of heads is required, and of which a recurrent model reads only the fields below.

    reset_after     : of every `npattn.gru`
    nonlinearity    : of every `npattn.rnn`, "tanh" or "relu"
    norm, norm_eps, embedding_scale, head_scale : as in `Config`

    Raises TypeError, ValueError.
    """

    reset_after: bool = True
    nonlinearity: str = "tanh"
    norm: str = "layer"
    norm_eps: float = 1e-5
    embedding_scale: float = 1.0
    head_scale: float = 1.0

    def __post_init__(self) -> None:
        check_flag("RecurrentConfig", "reset_after", self.reset_after)
        check_one_of("RecurrentConfig", "nonlinearity", self.nonlinearity, ("tanh", "relu"))
        self.of_embed_and_head()  # checks the others

    def of_embed_and_head(self) -> Config:
        """What the embedding, the norm and the head read."""
        return Config(
            1, norm=self.norm, norm_eps=self.norm_eps, embedding_scale=self.embedding_scale, head_scale=self.head_scale
        )


class RecurrentParams(NamedTuple):
    """The parameters of a recurrent language model. N of a layer is M of the next."""

    embed: EmbedParams
    layers: tuple[RNNParams | GRUParams | LSTMParams, ...]
    head: HeadParams = HeadParams()  # without w the table is the head, where N of the last layer is M of the table
    norm: NormParams | None = None  # (N,), behind the last layer


class RecurrentPast(NamedTuple):
    """What a recurrent model keeps of the tokens so far; also its gradient."""

    states: tuple[tuple[Array, ...], ...]  # of each layer (h,), or (h, c) of an LSTM, each (B, N)
    length: int  # of all sequences, with their padding

    def rows(self, index: Array) -> RecurrentPast:
        """These sequences of the batch, in this order."""
        return self._replace(states=tuple(tuple(x[index] for x in state) for state in self.states))


class RecurrentCache(NamedTuple):
    """What the backward needs, and the states after the last token."""

    embed: EmbedCache
    layers: tuple[RNNCache | GRUCache | LSTMCache, ...]
    dropout: tuple[DropoutCache | None, ...]  # behind each layer
    norm: Any
    head: HeadCache
    config: RecurrentConfig
    past: RecurrentPast  # for the call with the tokens that follow; after its length the states of a sequence do not change


class RecurrentGrads(NamedTuple):
    """The gradients of `recurrent_model`; those of params have its shape and names."""

    params: RecurrentParams
    past: RecurrentPast  # also if past was None, which means zeros


class Layer(NamedTuple):
    """A kind of layer: its pair, its states, and which options of the config are its own."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    states: tuple[str, ...]
    options: tuple[str, ...] = ()


LAYERS: dict[type, Layer] = {
    RNNParams: Layer(rnn_forward, rnn_backward, ("h",), ("nonlinearity",)),
    GRUParams: Layer(gru_forward, gru_backward, ("h",), ("reset_after",)),
    LSTMParams: Layer(lstm_forward, lstm_backward, ("h", "c")),
}


def recurrent_model_forward(
    ids: Array, params: RecurrentParams, config: RecurrentConfig, *, lengths: Any = None,
    past: RecurrentPast | None = None, dropout: StackDropout = NOTHING_DROPPED,
) -> tuple[Array, RecurrentCache]:  # fmt: skip
    """Logits of the next token, equations (1) to (4) of this page.

    ids     : (B, T) integers   params : see `RecurrentParams`   config : see `RecurrentConfig`
    lengths : integers (B,), 0 to T: later tokens leave the states as they are, and their logits mean nothing
    past    : the states before the first token, ``cache.past`` of the tokens before these; None = zeros
    dropout : masks; its ``blocks`` holds a mask (B, T, N) or None for what each layer gives. torch.nn.LSTM(dropout=p) has none
              behind the last
    Returns logits (B, T, V), and the cache. Raises TypeError, ValueError.
    """
    _check("recurrent_model", ids, params, config, past)
    check_class("recurrent_model", "dropout", dropout, StackDropout)
    masks = [None] * len(params.layers) if dropout.blocks is None else dropout.blocks
    if len(masks) != len(params.layers):
        raise ValueError(f"recurrent_model: dropout has masks for {len(masks)} layers, expected {len(params.layers)}")
    shared, start = config.of_embed_and_head(), 0 if past is None else past.length
    positions = start + np.arange(ids.shape[1])
    x, embed = embed_forward(ids, params.embed, shared, positions=positions, dropout=dropout.embed)  # (1)
    layers, drops, states = [], [], []
    for n, (layer, mask) in enumerate(zip(params.layers, masks, strict=True)):
        of_kind = LAYERS[type(layer)]
        state = (None,) * len(of_kind.states) if past is None else past.states[n]
        x, cache = of_kind.forward(x, *state, layer, lengths=lengths, **{k: getattr(config, k) for k in of_kind.options})  # (2)
        x, drop = (x, None) if mask is None else dropout_forward(x, mask)
        layers.append(cache)
        drops.append(drop)
        states.append(tuple(getattr(cache, f"{name}_last") for name in of_kind.states))
    norm = None
    if params.norm is not None:
        x, norm = NORMS[config.norm][0](x, params.norm, eps=config.norm_eps)  # (3)
    logits, head = head_forward(x, params.head, params.embed.table, shared)  # (4)
    now = RecurrentPast(tuple(states), start + ids.shape[1])
    return logits, RecurrentCache(embed, tuple(layers), tuple(drops), norm, head, config, now)


def recurrent_model_backward(
    dlogits: Array, cache: RecurrentCache, dpast: RecurrentPast | None = None
) -> RecurrentGrads:
    """The gradients of sum(dlogits * logits), from (4) to (1). A table that is also the head gets the sum of both.

    dpast : the gradient of ``cache.past``, which is ``grads.past`` of the tokens behind these; None = zeros
    Raises TypeError, ValueError.
    """
    check_class("recurrent_model", "cache", cache, RecurrentCache, ", from recurrent_model_forward")
    if dpast is not None:
        check_class("recurrent_model", "dpast", dpast, RecurrentPast, ", from recurrent_model_backward")
        _check_states("recurrent_model", "dpast", dpast, [layer.params for layer in cache.layers])
    dx, dhead, dtable = head_backward(dlogits, cache.head)  # (4)
    dnorm = None
    if cache.norm is not None:
        dx, dnorm = NORMS[cache.config.norm][1](dx, cache.norm)  # (3)
    dlayers: list[Any] = []
    dstates: list[Any] = []
    for n, layer in reversed([*enumerate(cache.layers)]):
        drop = cache.dropout[n]
        dx = dx if drop is None else dropout_backward(dx, drop).x
        dlast = () if dpast is None else dpast.states[n]
        dx, *dstate, dlayer = LAYERS[type(layer.params)].backward(dx, layer, *dlast)  # (2)
        dlayers.insert(0, dlayer)
        dstates.insert(0, tuple(dstate))
    dembed = embed_backward(dx, cache.embed).params  # (1)
    if dtable is not None:
        dembed = dembed._replace(table=dembed.table + dtable)
    before = RecurrentPast(tuple(dstates), cache.past.length - dlogits.shape[1])
    return RecurrentGrads(RecurrentParams(dembed, tuple(dlayers), dhead, dnorm), before)


def recurrent_model_decode(
    ids: Array, params: RecurrentParams, config: RecurrentConfig, past: RecurrentPast | None = None, *, inside: Any = None
) -> tuple[Array, RecurrentPast]:
    """The logits after T more tokens. It has no backward.

    ids    : (B, T)   past : what the call before returned, None at the start
    inside : (B, T) booleans, False for padding, on whichever side: it leaves the states as they are
    Returns logits (B, T, V), which mean nothing at padding, and the past with these tokens. Raises TypeError, ValueError.
    """
    if inside is None:
        logits, cache = recurrent_model_forward(ids, params, config, past=past)
        return logits, cache.past
    _check("recurrent_model_decode", ids, params, config, past)
    if check_array("recurrent_model_decode", "inside", inside).dtype != bool or inside.shape != ids.shape:
        given = f"{kind(inside)} and shape {inside.shape}"
        raise ValueError(f"recurrent_model_decode: inside is {given}, expected booleans of shape {ids.shape}: fixed by ids")
    # Padding goes behind the tokens, where lengths leave it out, and its logits come back to where it stood.
    rows, order = np.arange(len(ids))[:, None], np.argsort(~inside, axis=1, kind="stable")
    moved, cache = recurrent_model_forward(ids[rows, order], params, config, past=past, lengths=inside.sum(1))
    logits = np.empty_like(moved)
    logits[rows, order] = moved
    return logits, cache.past


def _check(op: str, ids: Any, params: Any, config: Any, past: Any) -> None:
    check_class(op, "params", params, RecurrentParams)
    check_class(op, "config", config, RecurrentConfig)
    if check_array(op, "ids", ids).ndim != 2:
        raise ValueError(f"{op}: ids has shape {ids.shape}, expected (B, T)")
    for n, layer in enumerate(params.layers):
        if type(layer) not in LAYERS:
            expected = ", ".join(f"npattn.{cls.__name__}" for cls in LAYERS)
            raise TypeError(f"{op}: params.layers[{n}] is {kind(layer)}, expected one of {expected}")
    table = np.shape(params.embed.table)
    if params.head.w is None and params.layers and table[1:] != (N := np.shape(params.layers[-1].w_h)[:1]):
        raise ValueError(f"{op}: the table has shape {table}, expected (V, N={N[0]}): it is the head, as params.head.w is None")
    if past is not None:
        check_class(op, "past", past, RecurrentPast, f", from {op}")
        _check_states(op, "past", past, params.layers)


def _check_states(op: str, name: str, past: RecurrentPast, layers: Sequence[Any]) -> None:
    got, counts = [len(state) for state in past.states], [len(LAYERS[type(layer)].states) for layer in layers]
    if got != counts:
        raise ValueError(f"{op}: {name} has {got} states of the layers, expected {counts}: fixed by params.layers")


__all__ = [
    "RecurrentCache",
    "RecurrentConfig",
    "RecurrentGrads",
    "RecurrentParams",
    "RecurrentPast",
    "recurrent_model_backward",
    "recurrent_model_decode",
    "recurrent_model_forward",
]
