"""What a model looks at: the weights of every head, and the gradient of one logit with respect to each token of a text."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from npattn.models.encoders import (
    EncoderModelParams,
    MaskedHeadParams,
    TextHeadParams,
    masked_head_backward,
    masked_head_forward,
    text_head_backward,
    text_head_forward,
)
from npattn.models.model import Model
from npattn.models.transformer import (
    decoder_backward,
    decoder_forward,
    embed_backward,
    embed_forward,
    encoder_backward,
    encoder_forward,
    head_backward,
    head_forward,
    target_embedding,
)
from npattn.ops.checks import Array


class Weights(NamedTuple):
    """The weights of the heads of one layer."""

    name: str  # such as "layer 3"
    queries: list[str]  # the tokens of the rows
    keys: list[str]  # and of the columns
    heads: Array  # (H, L, S)


class Look(NamedTuple):
    """What `look` sees."""

    weights: list[Weights]
    tokens: list[str]  # of the text
    gradient: Array | None  # (L, M) of the logit with respect to the row of the table that each token has
    logit: str  # which logit that is
    value: float


def look(model: Model, text: str, *, token: str | None = None, target: str | None = None) -> Look:
    """The weights of every head, and the gradient of a logit.

    text   : of an encoder-decoder the source
    token  : the token, or the class, whose logit it is: of the last position, of the first masked token, or of the whole text.
             The one with the largest logit unless given
    target : of an encoder-decoder what it writes; its logit is that of the token behind that. Nothing unless given
    An encoder without a head has no logit, and one whose head has logits for each token has no first one: then gradient is
    None. Raises TypeError, ValueError.
    """
    if model.tokenizer is None:
        raise ValueError("look: the model has no tokenizer, expected one: the text has to become tokens")
    if model.kind not in ("encoder", "language model", "encoder-decoder"):
        raise ValueError(f"look: the model is a {model.kind}, expected an encoder, a language model or an encoder-decoder")
    config = replace(model.config, implementation="dense")  # it keeps the weights
    encoded = model.tokenizer.encode(text)
    ids, tokens = encoded.ids, _names(model.tokenizer, encoded.ids[0])
    if model.kind == "encoder-decoder":
        return _of_encoder_decoder(model, config, ids, tokens, token, target)
    p = model.params
    types = encoded.types if p.embed.types is not None else None
    x, embed = embed_forward(ids, p.embed, config, types=types)
    y, cache = encoder_forward(x, p.encoder, config)
    weights = _of_blocks("layer", tokens, tokens, [block.attention for block in cache.blocks])
    if isinstance(p, EncoderModelParams):
        dy, logit, value = _through_head(model, config, ids, y, token)
    else:
        logits, head = head_forward(y, p.head, p.embed.table, config)
        dlogits, logit, value = _chosen(logits, (0, -1), token, model)
        dy = head_backward(dlogits, head)[0]
    gradient = None if dy is None else embed_backward(encoder_backward(dy, cache).x, embed).tokens[0]
    return Look(weights, tokens, gradient, logit, value)


def _names(tokenizer: Any, ids: Array) -> list[str]:
    return [tokenizer.token(int(i)) or str(i) for i in ids]


def _of_blocks(name: str, queries: list[str], keys: list[str], sublayers: list[Any]) -> list[Weights]:
    return [Weights(f"{name} {n}", queries, keys, s.inner.attention.weights[0]) for n, s in enumerate(sublayers)]


def _chosen(logits: Array, at: tuple[int, ...], token: str | None, model: Model) -> tuple[Array, str, float]:
    """The cotangent that picks one logit at a place, what it is called, and the logit."""
    row, classes = logits[at], None
    labels = model.settings.get("id2label") or {}
    if len(labels) == len(row):
        classes = {str(label): int(n) for n, label in labels.items()}
    if token is None:
        best = int(row.argmax())
    else:
        found = classes.get(token) if classes is not None else model.tokenizer.id(token)
        if found is None and classes is None:
            new = model.tokenizer.encode(token, special=False).ids[0]
            found = int(new[0]) if len(new) == 1 else None
        if found is None:
            raise ValueError(f"look: token is {token!r}, expected one {'of ' + ', '.join(classes) if classes else 'token'}")
        best = found
    dlogits = np.zeros_like(logits)
    dlogits[at][best] = 1
    name = next((n for n, i in (classes or {}).items() if i == best), None) or _names(model.tokenizer, np.array([best]))[0]
    return dlogits, name, float(row[best])


def _through_head(model: Model, config: Any, ids: Array, y: Array, token: str | None) -> tuple[Array | None, str, float]:
    """The gradient of the states of an encoder, from one logit of its head."""
    p, head = model.params, model.params.head
    if isinstance(head, TextHeadParams) and head.out is not None:
        logits, cache = text_head_forward(y, head, config)
        dlogits, name, value = _chosen(logits, (0,), token, model)
        return text_head_backward(dlogits, cache).y, name, value
    if isinstance(head, MaskedHeadParams):
        masked = np.flatnonzero(ids[0] == model.tokenizer.special.mask)
        if not masked.size:
            raise ValueError("look: the text has no masked token, expected one for a model of masked tokens")
        logits, of_masked = masked_head_forward(y, head, p.embed.table, config)
        dlogits, name, value = _chosen(logits, (0, int(masked[0])), token, model)
        return masked_head_backward(dlogits, of_masked).y, name, value
    return None, "", math.nan


def _of_encoder_decoder(
    model: Model, config: Any, source: Array, tokens: list[str], token: str | None, target: str | None
) -> Look:
    p, tokenizer = model.params, model.tokenizer
    start = model.generation.get("decoder_start_token_id", model.settings.get("decoder_start_token_id"))
    start = tokenizer.special.pad if start is None else start
    new = [] if target is None else tokenizer.target.encode(target, special=False).ids[0].tolist()
    ids = np.array([[start, *new]])
    written = _names(tokenizer.target, ids[0])
    x, of_source = embed_forward(source, p.source, config)
    memory, of_encoder = encoder_forward(x, p.encoder, config)
    embedding = target_embedding(p)
    t, _ = embed_forward(ids, embedding, config)
    y, of_decoder = decoder_forward(t, memory, p.decoder, config)
    logits, head = head_forward(y, p.head, embedding.table, config)
    dlogits, logit, value = _chosen(logits, (0, -1), token, replace(model, tokenizer=tokenizer.target))
    grads = decoder_backward(head_backward(dlogits, head)[0], of_decoder)
    weights = [
        *_of_blocks("encoder layer", tokens, tokens, [b.attention for b in of_encoder.blocks]),
        *_of_blocks("decoder layer", written, written, [b.attention for b in of_decoder.blocks]),
        *_of_blocks("decoder layer to source", written, tokens, [b.cross for b in of_decoder.blocks]),
    ]
    gradient = embed_backward(encoder_backward(grads.memory, of_encoder).x, of_source).tokens[0]
    return Look(weights, tokens, gradient, logit, value)


def described(seen: Look) -> Iterator[str]:
    """For each layer and head the key that gets the most weight of all queries; and the gradient at each token."""
    for layer in seen.weights:
        for h, head in enumerate(layer.heads):
            mean = head.mean(0)
            best = int(mean.argmax())
            yield f"{layer.name}, head {h}: {100 * mean[best]:3.0f} % of the weight is on {layer.keys[best]!r}"
    if seen.gradient is not None:
        yield f"the logit of {seen.logit!r} is {seen.value:.4g}; the length of its gradient at each token:"
        lengths = np.linalg.norm(seen.gradient, axis=-1)
        yield from (f"{length:10.3g}  {token}" for token, length in zip(seen.tokens, lengths, strict=True))


def draw(seen: Look, path: str | os.PathLike[str]) -> None:
    """Draws a row for each layer with its heads, and below them the length of the gradient at each token."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("matplotlib is missing, which draws: pip install 'npattn[plots]'") from None
    columns = max(len(w.heads) for w in seen.weights)
    rows = len(seen.weights) + (seen.gradient is not None)
    size = 0.9 + 0.13 * max(len(seen.tokens), 8)
    figure = Figure(figsize=(columns * size + 1, rows * size + 0.5), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    for i, layer in enumerate(seen.weights):
        for h, head in enumerate(layer.heads):
            axes = figure.add_subplot(grid[i, h])
            axes.imshow(head, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
            axes.set_title(f"{layer.name}, head {h}", fontsize=6)
            _label(axes.set_xticks, layer.keys, rotation=90)
            _label(axes.set_yticks, layer.queries if h == 0 else [""] * len(layer.queries))
    if seen.gradient is not None:
        axes = figure.add_subplot(grid[-1, :])
        axes.bar(range(len(seen.tokens)), np.linalg.norm(seen.gradient, axis=-1), color="tab:orange")
        what = f"length of the gradient of the logit of {_plain(seen.logit)} ({seen.value:.3g}) at each token"
        axes.set_title(what, fontsize=7)
        _label(axes.set_xticks, seen.tokens, rotation=90)
    figure.savefig(path, dpi=110)


def _label(set_ticks: Any, tokens: list[str], **options: Any) -> None:
    set_ticks(range(len(tokens)), [_plain(t) for t in tokens], fontsize=5, **options)


def _plain(token: str) -> str:
    """matplotlib takes what stands between two $ for mathematics, and its fonts lack the signs for spaces."""
    return token.replace("$", r"\$").replace("\u0120", "_").replace("\u2581", "_")


__all__ = ["Look", "Weights", "described", "draw", "look"]
