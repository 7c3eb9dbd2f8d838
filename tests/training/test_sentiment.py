"""The data, batches, losses and baselines of the sentiment task, with a small encoder and no library."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from helpers import leaves

from npattn.models.encoders import encoder_model_forward
from npattn.training import sentiment
from npattn.training.initial import initial
from npattn.training.loop import check_gradients
from npattn.training.measures import accuracy
from npattn.training.sentiment import Sentence, Split, batches, classifier, fine_tune, loss_of, majority, read, split

BERT = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 3, "intermediate_size": 20, "max_position_embeddings": 16}  # fmt: skip


class Words:
    """A tokenizer: a token for each letter, and 1 before the text."""

    def encode(self, texts, max_length=None):
        rows = [[1, *(2 + ord(c) % 21 for c in text)] for text in texts]
        L = max(map(len, rows))
        ids = np.array([row + [0] * (L - len(row)) for row in rows])
        return type("Encoded", (), {"ids": ids, "inside": np.arange(L) < np.array([[len(row)] for row in rows])})


def small(dtype="float64", **options):
    encoder = initial(BERT, 0, tokenizer=Words(), dtype=dtype)
    return classifier(encoder, seed=1, **options)


SENTENCES = [Sentence("good " + "x" * (n % 7), 1) if n % 2 else Sentence("bad " + "y" * (n % 5), 0) for n in range(40)]


def package(place, rows):
    folder = place / "node_modules" / "sentiment" / "test" / "fixtures"
    folder.mkdir(parents=True)
    for name, some in zip(("imdb.json", "yelp.json", "amazon.json"), rows, strict=True):
        (folder / name).write_text(json.dumps(some))
    return folder


def test_sentences_are_read_once_each_from_any_of_the_folders(tmp_path):
    last = {"text": "", "class": None}
    labels = (("Good.  ", 1), ("Bad.", 0), ("Good.", 1))
    rows = [[{"text": text, "class": label}, last] for text, label in labels]
    folder = package(tmp_path, rows)
    for place in (tmp_path, tmp_path / "node_modules", folder.parent.parent):
        assert read(place) == [("Good.", 1), ("Bad.", 0)]


def test_a_missing_package_is_refused_with_the_command_that_gets_it(tmp_path):
    with pytest.raises(ValueError, match=r"npm install --prefix .* sentiment@5\.0\.2"):
        read(tmp_path)


@pytest.mark.parametrize("rows", [{"text": "a"}, [{"text": "a"}], [{"text": 3, "class": 1}], [3]], ids=str)
def test_a_damaged_file_is_refused_by_name(tmp_path, rows):
    package(tmp_path, [rows, [], []])
    with pytest.raises(ValueError, match=r"imdb\.json: expected a list of objects with text and class"):
        read(tmp_path)


def test_a_split_depends_on_the_seed_alone_and_keeps_every_sentence_once():
    parts = split(SENTENCES, 3)
    assert len(parts.held_out) == 8
    assert Counter(parts.train + parts.held_out) == Counter(SENTENCES)
    assert parts == split(SENTENCES, 3) != split(SENTENCES, 4)


def test_an_epoch_has_each_sentence_once():
    batch = batches(SENTENCES, 4, 0, Words())
    whole = Words().encode([s.text for s in SENTENCES])
    for epoch in (0, 1):
        rows = [tuple(row[inside]) for n in range(10) for row, inside in zip(*batch(10 * epoch + n)[:2], strict=True)]
        assert Counter(rows) == Counter(tuple(row[inside]) for row, inside in zip(whole.ids, whole.inside, strict=True))
    assert any(batch(n)[2].tolist() != batch(10 + n)[2].tolist() for n in range(10)), "the second epoch has another order"


def test_the_new_block_begins_as_the_mean_of_the_states():
    model = small()
    bare = model.params._replace(head=None)
    e = Words().encode(["abc", "defgh"])
    before = bare._replace(encoder=bare.encoder._replace(blocks=bare.encoder.blocks[:-1]))
    y, _ = encoder_model_forward(e.ids, before, model.config, inside=e.inside)
    z, _ = encoder_model_forward(e.ids, bare, model.config, inside=e.inside)
    for b in range(2):
        n = e.inside[b].sum()
        s = y[b, 0] + 20 * sum(y[b, i] for i in range(n)) / n
        s = s - s.mean()
        # Two norms, as the feed-forward layer adds nothing; the second finds variance 1 and changes little.
        norm = s / np.sqrt((s * s).mean() + 1e-12)
        norm = norm / np.sqrt((norm * norm).mean() + 1e-12)
        assert np.abs(z[b, 0] - norm).max() <= 100 * np.finfo(float).eps * np.abs(norm).max()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_gradient_of_everything(p):
    model = small()
    check_gradients(model.params, loss_of(model, p, 5), batches(SENTENCES, 4, 0, Words())(0), 2)


def test_the_gradient_of_the_head():
    model = small()
    batch = sentiment._batches_of_states(model, SENTENCES, 0)
    check_gradients(model.params.head, sentiment.head_loss(model, 0.3, 5), batch(0))


@pytest.mark.parametrize("way", ["head", "lora", "all"])
def test_the_loss_falls_and_only_what_is_asked_for_moves(way):
    model = small("float32")
    trained, done = fine_tune(model, SENTENCES, way, steps=25)
    assert np.mean([line["loss"] for line in done.log[-5:]]) < np.mean([line["loss"] for line in done.log[:5]])
    same = [np.array_equal(a, b) for a, b in zip(leaves(model.params.embed), leaves(trained.params.embed), strict=True)]
    assert all(same) == (way != "all")
    w, before = (m.params.encoder.blocks[0].attention.w_q for m in (trained, model))
    assert np.array_equal(w, before) == (way == "head")
    if way == "lora":
        assert np.linalg.matrix_rank(w - before, tol=1e-5) <= sentiment.RANK


def test_another_way_and_another_model_are_refused():
    with pytest.raises(ValueError, match="way is 'half', expected one of head, lora, all"):
        fine_tune(small(), SENTENCES, "half")
    other = initial({"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 5}, 0)
    with pytest.raises(ValueError, match="expected 'bert'"):
        classifier(other)


def test_the_majority_and_an_interval():
    parts = Split([Sentence("a", 1), Sentence("b", 1), Sentence("c", 0)], [Sentence("d", 1), Sentence("e", 0)])
    assert majority(parts).score == 0.5
    for k, n in ((0, 7), (3, 7), (7, 7)):
        found = accuracy(k, n)
        for edge in {found.low, found.high} - {0.0, 1.0}:  # Wilson's interval ends where the score test rejects
            distance = abs(k / n - edge) / np.sqrt(edge * (1 - edge) / n)
            assert distance == pytest.approx(1.959963984540054)
    with pytest.raises(ValueError, match="right is 3, expected at most count=2"):
        accuracy(3, 2)
