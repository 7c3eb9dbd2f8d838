"""What translation and summarization share: pairs of texts, batches of them, the loss of an encoder-decoder, and its outputs.

A model is one of BART's shape (`npattn.models.layouts`), or one that copies from the source as well (model_type
"npattn-copying", `npattn.models.copying`). Both read `Pairs`, and `npattn.training.loop.train` trains both:

    source            tokens of the source, with the special ones of the tokenizer        (B, S)
    target            </s> t_1 ... t_n      what the decoder sees                         (B, L)
    targets           t_1 ... t_n </s>      what it is asked for                          (B, L)
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npattn.models.blocks import DecoderDropout, EncoderDropout
from npattn.models.copying import copy_loss_backward, copy_loss_forward
from npattn.models.folder import save
from npattn.models.generation import Generation, generate
from npattn.models.model import KINDS, Model
from npattn.models.transformer import StackDropout, TransformerDropout
from npattn.models.trees import tree_map
from npattn.ops.checks import Array
from npattn.ops.cross_entropy import cross_entropy, cross_entropy_backward, cross_entropy_forward
from npattn.ops.masks import keys
from npattn.training import checkpoints
from npattn.training.loop import Trained, Training, check_gradients, draw, steps_in, train

COPYING = "copying encoder-decoder"
BUCKET = 50  # batches: pairs of like lengths stand together inside so many, so that there is little padding


class Pair(NamedTuple):
    """A text and what is to be written about it."""

    source: str
    target: str
    group: str = ""  # what it came from: a catalogue or a module


class Batch(NamedTuple):
    """Pairs as tokens."""

    source: Array  # (B, S)
    inside: Array  # (B, S) bool, False in padding
    target: Array  # (B, L)
    targets: Array  # (B, L)
    counts: Array  # (B, L) bool, which targets count


def numbers(count: int, batch: int, seed: int, lengths: Sequence[int]) -> Callable[[int], Array]:
    """The pairs of batch n, as a pure function: every pair once an epoch, in another order in each.

    >>> pairs = numbers(5, 2, 0, [1, 2, 3, 4, 5])
    >>> sorted(int(i) for n in range(3) for i in pairs(n))
    [0, 1, 2, 3, 4]
    """

    @functools.lru_cache(maxsize=2)
    def epoch(e: int) -> list[Array]:
        rng = np.random.default_rng((seed, e))
        order = rng.permutation(count)
        chunks = [order[i : i + BUCKET * batch] for i in range(0, count, BUCKET * batch)]
        ordered = [c[np.argsort(np.asarray(lengths)[c], kind="stable")] for c in chunks]
        batches = [c[i : i + batch] for c in ordered for i in range(0, len(c), batch)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def of(n: int) -> Array:
        e, at = divmod(n, len(epoch(0)))
        return epoch(e)[at]

    return of


class Pairs:
    """Pairs as tokens; ``pairs(n)`` is batch n of a training, a pure function of n and the seed.

    longest : tokens of a source with the special ones, and of a target; what is longer is cut
    start, end : the token that the decoder begins with, and that behind a target
    written : how many of the first words of the vocabulary the model can write, None: all. A target that it can neither write
              nor copy does not count
    """

    def __init__(
        self, pairs: Sequence[Pair], tokenizer: Any, longest: tuple[int, int], *, start: int, end: int, batch: int = 32,
        seed: int = 0, written: int | None = None,
    ) -> None:  # fmt: skip
        self.pairs, self.start, self.written, self.pad = pairs, start, written, tokenizer.special.pad or 0
        self.sources = rows_of(tokenizer, [p.source for p in pairs], max_length=longest[0])
        targets = rows_of(tokenizer, [p.target for p in pairs], special=False, max_length=longest[1] - 1)
        self.targets = [np.append(row, end) for row in targets]
        lengths = [len(a) + len(b) for a, b in zip(self.sources, self.targets, strict=True)]
        self.numbers = numbers(len(pairs), batch, seed, lengths)

    def __call__(self, n: int) -> Batch:
        return self.batch(self.numbers(n))

    def batch(self, rows: Array | Sequence[int]) -> Batch:
        """These pairs as a batch."""
        source, inside = padded([self.sources[i] for i in rows], self.pad)
        targets, counts = padded([self.targets[i] for i in rows], self.pad)
        target = np.concatenate([np.full((len(targets), 1), self.start), targets[:, :-1]], 1)
        if self.written is not None:
            there = (targets[:, :, None] == np.where(inside, source, -1)[:, None]).any(-1)
            counts &= there | (targets < self.written)
        return Batch(source, inside, target, targets, counts)

    def first(self, count: int) -> Pairs:
        """So many of them, in their order."""
        part = copy.copy(self)
        part.pairs, part.sources, part.targets = self.pairs[:count], self.sources[:count], self.targets[:count]
        return part

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\0".join(text for p in self.pairs for text in p[:2]).encode()).hexdigest()


def rows_of(tokenizer: Any, texts: Sequence[str], some: int = 256, **options: Any) -> list[Array]:
    """The tokens of each text; some of them at a time, because a batch has padding."""
    found: list[Array] = []
    for start in range(0, len(texts), some):
        encoded = tokenizer.encode(list(texts[start : start + some]), **options)
        found += [ids[inside] for ids, inside in zip(encoded.ids, encoded.inside, strict=True)]
    return found


def padded(rows: Sequence[Array], pad: int) -> tuple[Array, Array]:
    """Rows of different lengths as one array, and what is no padding."""
    longest = max(map(len, rows))
    ids, inside = np.full((len(rows), longest), pad, np.int64), np.zeros((len(rows), longest), bool)
    for b, row in enumerate(rows):
        ids[b, : len(row)], inside[b, : len(row)] = row, True
    return ids, inside


# --- the model and its loss --------------------------------------------------------------------------------------------------


def settings_of(
    vocabulary: int, width: int, layers: tuple[int, int], heads: int, positions: int, **more: Any
) -> dict[str, Any]:
    """The config.json of a model of BART's shape. more : what else it has, or has otherwise; layers : encoder, decoder"""
    return {
        "model_type": "bart", "architectures": ["BartForConditionalGeneration"], "vocab_size": vocabulary, "d_model": width,
        "encoder_layers": layers[0], "decoder_layers": layers[1], "encoder_attention_heads": heads,
        "decoder_attention_heads": heads, "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width,
        "max_position_embeddings": positions, "activation_function": "gelu", "scale_embedding": False,
        "is_encoder_decoder": True, "dropout": 0.0, "tie_word_embeddings": True, "forced_eos_token_id": None,
        **more}  # fmt: skip


def copying_settings(settings: Mapping[str, Any], written: int) -> dict[str, Any]:
    """The same with what copies from the source. written : how many of the first words of the vocabulary have a logit"""
    own = {"model_type": "npattn-copying", "architectures": ["CopyingForConditionalGeneration"], "tie_word_embeddings": False}
    return {**settings, **own, "written_words": written, "copy_width": 64}


def loss_and_grads_of(
    model: Model, *, dropout: float = 0.0, label_smoothing: float = 0.0, seed: int = 0, encoder: bool = True
) -> Callable[[Any, Batch, int], tuple[Any, Any, int]]:
    """The loss of a batch and the gradients, for `npattn.training.loop.train`. Dropout masks come from (seed, n).

    encoder : False: it stays as it is, with the tables: see `of_encoder`. Its gradients are 0, and it drops nothing
    """
    copies, config = model.kind == COPYING, model.config
    kind = KINDS[model.kind]

    def loss_and_grads(params: Any, batch: Batch, n: int) -> tuple[Any, Any, int]:
        inside = keys(batch.inside)
        masks: dict[str, Any] = {"source_mask": inside, "cross_mask": inside}
        if dropout:
            of = params.transformer if copies else params
            masks["dropout"] = dropped(of, config, batch, dropout, np.random.default_rng((seed, n)), encoder)
        out, cache = kind.forward(batch.source, batch.target, params, config, **masks)
        options: dict[str, Any] = {"mask": batch.counts, "label_smoothing": label_smoothing}
        dout: Any
        if copies:
            loss, of_copies = copy_loss_forward(out, batch.source, batch.targets, **options)
            dout = copy_loss_backward(None, of_copies).scores
        else:
            loss, of_words = cross_entropy_forward(out, batch.targets, **options)
            dout = cross_entropy_backward(None, of_words).logits
        grads = kind.backward(dout, cache, encoder=encoder).params
        if not encoder:
            grads = _with_zeros(params, grads)
        return loss, grads, int(batch.counts.sum())

    return loss_and_grads


def of_encoder(name: str) -> bool:
    """Whether a parameter is the encoder's, or of the tables that it shares with the decoder: which stay where it is frozen."""
    return name.removeprefix("transformer.").startswith(("source.", "encoder."))


def _with_zeros(params: Any, grads: Any) -> Any:
    """Gradients of 0 for what has none, without memory for them."""
    if params is None or grads is None:
        return tree_map(lambda p: np.broadcast_to(p.dtype.type(0), p.shape), params)
    if not isinstance(params, tuple):
        return grads
    parts = [_with_zeros(p, g) for p, g in zip(params, grads, strict=True)]
    return type(params)(*parts) if hasattr(params, "_fields") else tuple(parts)


def dropped(
    params: Any, config: Any, batch: Batch, p: float, rng: np.random.Generator, encoder: bool = True
) -> TransformerDropout:
    """Masks of the vectors: of the embeddings and of what each sublayer gives."""
    M, dtype = params.source.table.shape[1], np.float32
    real = params.source.table.real.dtype if params.source.table.dtype.kind == "c" else params.source.table.dtype

    def mask(ids: Array) -> Array:
        kept: Array = (rng.random((*ids.shape, M), dtype) >= p) / np.float32(1 - p)
        return kept.astype(real, copy=False)

    s, t = batch.source, batch.target
    source = [EncoderDropout(attention=mask(s), feed_forward=mask(s)) for _ in params.encoder.blocks] if encoder else []
    target = [DecoderDropout(attention=mask(t), cross=mask(t), feed_forward=mask(t)) for _ in params.decoder.blocks]
    return TransformerDropout(StackDropout(mask(s), source) if encoder else StackDropout(), StackDropout(mask(t), target))


def held_out_loss(model: Model, params: Any, pairs: Pairs, batch: int = 64) -> float:
    """The loss in nats a token of the target."""
    kind, total, count = KINDS[model.kind], 0.0, 0
    order = np.argsort([len(row) for row in pairs.sources], kind="stable")
    for start in range(0, len(order), batch):
        b = pairs.batch(order[start : start + batch])
        inside = keys(b.inside)
        out, _ = kind.forward(b.source, b.target, params, model.config, source_mask=inside, cross_mask=inside)
        if model.kind == COPYING:
            loss, _ = copy_loss_forward(out, b.source, b.targets, mask=b.counts, reduction="sum")
        else:
            loss = cross_entropy(out, b.targets, mask=b.counts, reduction="sum")
        total, count = total + float(loss), count + int(b.counts.sum())
    return total / max(count, 1)


def written(model: Model, params: Any, pairs: Pairs, settings: Generation, batch: int = 50) -> list[str]:
    """What the model writes about each source."""
    kind, found = KINDS[model.kind], [""] * len(pairs.sources)
    if kind.memory is None or kind.decode is None:
        raise ValueError(f"written: the model is of kind {model.kind!r}, expected one that reads and writes")
    order = np.argsort([len(row) for row in pairs.sources], kind="stable")
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        source, inside = padded([pairs.sources[i] for i in some], pairs.pad)
        past = kind.memory(source, params, model.config, source_mask=keys(inside))
        decode = functools.partial(kind.decode, params=params, config=model.config)
        ids = generate(decode, np.full((len(some), 1), pairs.start), settings, past=past, source_inside=inside)
        for i, row in zip(some, ids, strict=True):
            found[i] = model.tokenizer.target.decode(row)
    return found


# --- training ----------------------------------------------------------------------------------------------------------------


def fit(task: Any, given: argparse.Namespace, options: Mapping[str, Any], show: Callable[[str], None]) -> Trained:
    """Trains the model of a task as the options of ``npattn train`` say, and saves it."""
    whole = loss_and_grads_of(task.model)
    if given.resume and checkpoints.found(given.out) is not None:
        settings = Training(**checkpoints.described(given.out)["settings"])
        if given.steps not in (None, settings.steps):
            raise ValueError(f"{given.out}: the checkpoint has steps {settings.steps}, which cannot become {given.steps}")
    else:
        minutes = given.minutes or task.minutes
        settings = task.training(given.steps or steps_in(
            60 * minutes, task.model.params, task.loss_and_grads, task.batches, task.training(10)))  # fmt: skip
        show(f"{settings.steps} steps" + ("" if given.steps else f" in {minutes:g} minutes at the speed of this moment"))
    if given.check_gradients:
        check_gradients(task.model.params, whole, task.batches.batch([0, 1]))
        show("the gradient of all parameters agrees with a complex step")

    def keep(folder: Path, params: Any) -> None:
        save(folder, replace(task.model, params=params))

    about = {"task": given.task, "options": dict(options), "pairs": task.held_out.sha256 + task.batches.sha256}
    trained = train(task.model.params, task.loss_and_grads, task.batches, settings, folder=given.out, save=keep,
                    evaluate=task.evaluate, frozen=task.frozen, about=about, resume=given.resume, show=show)  # fmt: skip
    keep(given.out, trained.params)
    if given.plot:
        draw(trained.log, given.plot)
    return trained


# --- scores ------------------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the mean of values, by the bootstrap. Efron 1979

    >>> [round(x, 2) for x in interval([0.0, 1.0] * 200)]
    [0.45, 0.55]
    """
    x = np.asarray(values, np.float64)
    means = [float(x[i].mean()) for i in np.random.default_rng(seed).integers(0, len(x), (draws, len(x)))]
    low, high = np.quantile(means, [0.025, 0.975])
    return round(float(low), 4), round(float(high), 4)


def split(pairs: Sequence[Pair], held_out: int, seed: int, key: Callable[[Pair], str]) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs. No key of the one is among those of the other, whatever pairs share it.

    >>> train, test = split([Pair("a", "x"), Pair("a", "y"), Pair("b", "z")], 1, 0, key=lambda p: p.source)
    >>> {p.source for p in train} & {p.source for p in test}
    set()
    """
    names = sorted({key(p) for p in pairs})
    order, there = np.random.default_rng(seed).permutation(len(names)), dict.fromkeys(names, 0)
    for p in pairs:
        there[key(p)] += 1
    chosen, count = set(), 0
    for i in order:
        if count >= held_out:
            break
        chosen.add(names[i])
        count += there[names[i]]
    return [p for p in pairs if key(p) not in chosen], [p for p in pairs if key(p) in chosen]


def needs(package: str, what: str) -> ImportError:
    """The error of a missing package."""
    return ImportError(f"{package} is missing, {what}: pip install 'npattn[tasks]'")


__all__ = [
    "Batch",
    "Pair",
    "Pairs",
    "copying_settings",
    "dropped",
    "fit",
    "held_out_loss",
    "interval",
    "loss_and_grads_of",
    "needs",
    "of_encoder",
    "padded",
    "rows_of",
    "settings_of",
    "split",
    "written",
]
