"""Texts, initial models, the n-gram model, and pre-training from the command line."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from npattn import keys, segments
from npattn.cli import INTERRUPTED, OK, USAGE, WRONG, main
from npattn.environment import keep_memory
from npattn.models import load
from npattn.models.layouts import layout_of
from npattn.models.trees import named_leaves
from npattn.ops.cross_entropy import cross_entropy, cross_entropy_backward, cross_entropy_forward
from npattn.tolerances import MODEL_GRADIENT
from npattn.training import checkpoints, lm, loop, texts
from npattn.training.initial import initial
from npattn.training.lm import PRESETS, bits_per_byte, loss_of, nats, settings_of, size_of
from npattn.training.ngram import KneserNey
from npattn.training.texts import of_files, of_python, packed_rows, tokens_of, windows

ARCHS = ("transformer", "rnn", "gru", "lstm")
SMALL = replace(PRESETS["tiny"], layers=2, M=12, H=3, F=20, T=8, B=3)


def model_of(arch, dtype="float64"):
    return initial(settings_of(arch, SMALL, 17, 16), seed=3, dtype=dtype)


# --- texts ---------------------------------------------------------------------------------------------------------------


def test_texts_of_python(tmp_path, monkeypatch):
    """Of a small library: topics and docstrings, each paragraph once, nothing imported, and split by the name of a document."""
    library = tmp_path / "lib"
    for name in ("pydoc_data", "test", "deep"):
        (library / name).mkdir(parents=True)
    (library / "pydoc_data" / "topics.py").write_text("topics = {'b': 'On b.\\n\\nTwice.', 'a': 'On a.'}")
    (library / "one.py").write_text('"""One."""\nraise SystemExit\ndef f():\n    """Twice.\n\n    Only f.\n    """\n')
    (library / "deep" / "two.py").write_text('class C:\n    """C."""\n    async def g(self):\n        """Only\n        f."""\n')
    (library / "test" / "test_one.py").write_text('"""Of a test."""')
    (library / "broken.py").write_text("def")
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    found = of_python()
    assert sorted((*found.train, *found.held_out)) == ["C.\n\nOnly\nf.\n", "On a.\n", "On b.\n\nTwice.\n", "One.\n"]
    assert found.sha256 == of_python().sha256
    monkeypatch.setattr(texts, "SHARE", 1)
    assert not of_python().train
    assert of_python().sha256 != found.sha256


def test_docstrings_are_those_that_python_sees():
    found = texts.docstrings(Path(lm.__file__))
    assert found[0] == lm.__doc__.strip()
    assert lm.sample.__doc__ in found
    nodes = ast.walk(ast.parse(Path(lm.__file__).read_text()))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    assert len(found) == sum(ast.get_docstring(node) is not None for node in nodes if isinstance(node, kinds))


def test_texts_of_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {n}\n" for n in range(100)))
    found = of_files([path])
    assert "".join((*found.train, *found.held_out)) == path.read_text()
    assert len(path.read_text()) / 25 < len(found.held_out[0]) <= len(path.read_text()) / 20
    assert found.train[0].endswith("\n")
    with pytest.raises(ValueError, match=r"none.txt: No such file"):
        of_files([tmp_path / "none.txt"])


def test_tokens_and_windows():
    assert tokens_of(["né", "x"]).tolist() == [110, 195, 169, 256, 120, 256]
    tokens = np.arange(100)
    batch = windows(tokens, 5, 7, seed=1, n=2)
    assert batch.shape == (5, 8)
    assert (np.diff(batch, axis=1) == 1).all()
    assert np.array_equal(batch, windows(tokens, 5, 7, seed=1, n=2))
    assert not np.array_equal(batch, windows(tokens, 5, 7, seed=1, n=3))
    assert {int(x) for n in range(200) for x in windows(tokens[:9], 5, 7, 0, n)[:, 0]} == {0, 1}
    with pytest.raises(ValueError, match="there are 7 tokens, expected more than T=7"):
        windows(tokens[:7], 1, 7, 0, 0)


def test_packed_sequences_do_not_see_each_other():
    """Loss and gradients of the rows are the sum over the sequences, each alone."""
    model, rng = model_of("transformer"), np.random.default_rng(5)
    sequences = [rng.integers(0, 17, n) for n in (3, 7, 2, 6, 5, 1)]
    rows = packed_rows(sequences, 9)
    assert (len(rows.ids), int(rows.counts.sum())) == (3, 24 - 6)

    def loss_and_grads(ids, targets, counts, **options):
        logits, cache = model.forward(ids, **options)
        loss, of_loss = cross_entropy_forward(logits, targets, mask=counts, reduction="sum")
        return loss, named_leaves(model.backward(cross_entropy_backward(None, of_loss).logits, cache).params)

    mask = segments(rows.numbers, rows.numbers)
    loss, grads = loss_and_grads(rows.ids, rows.targets, rows.counts, mask=mask, positions=rows.positions)
    alone = [loss_and_grads(s[None, :-1], s[None, 1:], np.ones((1, len(s) - 1), bool)) for s in sequences if len(s) > 1]
    assert math.isclose(loss, sum(x for x, _ in alone), rel_tol=MODEL_GRADIENT)
    top = max(float(np.abs(g).max()) for g in grads.values())
    for name, g in grads.items():
        assert np.abs(g - sum(of[name] for _, of in alone)).max() <= MODEL_GRADIENT * top
    with pytest.raises(ValueError, match="a sequence has 7 tokens, expected at most T=6"):
        packed_rows(sequences, 6)


# --- counts --------------------------------------------------------------------------------------------------------------


def kneser_ney(text, V, order):
    """p(w | h) with dictionaries, one token at a time, from the equations of Chen and Goodman."""
    counts = {order: Counter(tuple(text[n : n + order]) for n in range(len(text) - order + 1))}
    for k in range(order - 1, 0, -1):
        counts[k] = Counter(gram[1:] for gram in counts[k + 1])
    tables = {}
    for k, of in counts.items():
        n1, n2, n3, n4 = (sum(c == i for c in of.values()) for i in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        tables[k] = {1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}
    behind = {k: defaultdict(dict) for k in counts}
    for k, of in counts.items():
        for gram, c in of.items():
            behind[k][gram[:-1]][gram[-1]] = c

    def p(w, h, k):
        if k == 0:
            return 1 / V
        seen = behind[k].get(tuple(h[len(h) - k + 1 :]))
        if seen is None:
            return p(w, h, k - 1)
        discount = [tables[k][min(c, 3)] for c in seen.values()]
        c = seen.get(w, 0)
        return (max(c - (tables[k][min(c, 3)] if c else 0), 0) + sum(discount) * p(w, h, k - 1)) / sum(seen.values())

    return p


def test_kneser_ney_against_dictionaries():
    rng = np.random.default_rng(0)
    text = np.minimum(rng.zipf(1.5, 2000), 300)  # with tokens and n-grams that are seen once, twice, three and four times
    V, order, held_out = 310, 3, np.concatenate([text[:9], np.minimum(rng.zipf(1.5, 40), 309), [309, 309, 1]])
    model, p = KneserNey(text, V, order), kneser_ney(text.tolist(), V, order)
    found = model.log2(held_out)
    expected = [math.log2(p(w, held_out[:n].tolist(), min(n + 1, order))) for n, w in enumerate(held_out.tolist())]
    assert np.abs(found - expected).max() < 100 * np.finfo(float).eps * np.abs(expected).max()
    for n in (0, 9, 30):
        after = (model.log2(np.array([*held_out[:n], w]))[-1] for w in range(V))
        assert math.isclose(math.fsum(2**x for x in after), 1, rel_tol=MODEL_GRADIENT)
    with pytest.raises(ValueError, match="order is 8, expected at most 7 for V=257"):
        KneserNey(text, 257, 8)


# --- models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_of_the_loss_and_with_dropout(arch):
    """The whole model's gradient; masks depend on the number of the batch, and on nothing else."""
    model, ids = model_of(arch), np.random.default_rng(0).integers(0, 17, (3, 9))
    loop.check_gradients(model.params, loss_of(model), ids)
    dropped = loss_of(model, dropout=0.3, seed=1)
    loop.check_gradients(model.params, dropped, ids, n=4)
    losses = [float(dropped(model.params, ids, n)[0]) for n in (4, 4, 5)]
    assert losses[0] == losses[1] != losses[2]
    logits, _ = model.forward(ids[:, :-1])
    assert float(loss_of(model)(model.params, ids, 0)[0]) == float(cross_entropy(logits, ids[:, 1:]))


@pytest.mark.parametrize("arch", ARCHS)
def test_initial_models_predict_little_and_have_equal_sizes(arch):
    model = model_of(arch)
    ids = np.random.default_rng(0).integers(0, 17, (3, 40))
    assert abs(float(loss_of(model)(model.params, ids, 0)[0]) - math.log(17)) < 0.7
    goal, size = (size_of(settings_of(a, PRESETS["small"], 257, 256)) for a in ("transformer", arch))
    assert abs(size / goal - 1) < 0.05
    assert model.size == size_of(model.settings) == sum(x.size for x in named_leaves(model.params).values())
    if arch == "lstm":
        N = len(model.params.layers[0].w_h)
        assert model.params.layers[0].b.tolist() == [0.0] * N + [1.0] * N + [0.0] * 2 * N


def test_bits_per_byte_are_those_of_windows_written_out():
    model, tokens, T = model_of("gru"), np.random.default_rng(1).integers(0, 17, 29), 8
    logs = [0.0] * len(tokens)
    for n in range(1, len(tokens)):  # the first window, of 4 steps' distance, that has token n, with 4 tokens before it
        start = 0 if n <= T else 4 * math.ceil((n - T) / 4)
        logits, _ = model.forward(tokens[None, start:n])
        logs[n] = float(cross_entropy(logits[0, -1:], tokens[n : n + 1]))
    total, count = nats(model, tokens, T, B=2)
    assert count == 28
    assert math.isclose(total, math.fsum(logs), rel_tol=MODEL_GRADIENT)
    assert math.isclose(bits_per_byte(model, tokens, 100, T), total / math.log(2) / 100)
    assert nats(model, tokens, T, stride=T, most=2)[1] == 16
    assert nats(model, tokens[:5], T)[1] == 4


@pytest.mark.parametrize("arch", ARCHS[1:])
def test_decoding_of_recurrent_models_leaves_padding_out(arch):
    """As `npattn.models.generation` calls it: a mask of keys, and positions."""
    model, ids = model_of(arch), np.random.default_rng(2).integers(0, 17, (2, 5))
    inside = np.array([[True] * 5, [False, False, True, True, True]])
    logits, past = model.decode(ids, mask=keys(inside), positions=np.zeros((2, 5), int))
    more, _ = model.decode(ids[:, :1], past, mask=keys(np.pad(inside, ((0, 0), (0, 1)), constant_values=True)))
    alone, of_alone = model.decode(ids[1:, 2:])
    assert np.abs(logits[1, 2:] - alone[0]).max() < MODEL_GRADIENT
    assert np.abs(more[1] - model.decode(ids[1:, :1], of_alone)[0][0]).max() < MODEL_GRADIENT


def test_layouts_of_recurrent_models():
    with pytest.raises(ValueError, match=r"embedding_size is 4, expected hidden_size=5: tie_word_embeddings is true"):
        layout_of({"model_type": "npattn-gru", "embedding_size": 4, "hidden_size": 5, "vocab_size": 7, "num_hidden_layers": 1,
                   "tie_word_embeddings": True})  # fmt: skip
    with pytest.raises(ValueError, match="nonlinearity"):
        layout_of({**model_of("rnn").settings, "nonlinearity": "sine"})


def test_memory_is_kept_or_not():
    assert keep_memory() in (True, False)


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text of a few words, and a preset that is through in a moment."""
    for name in ("safetensors", "tokenizers"):
        pytest.importorskip(name, reason="needs the models extra: pip install npattn[models]")
    monkeypatch.setitem(PRESETS, "tiny", replace(SMALL, steps=6))
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta"], 800)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words))
    return path


def train(text, out, *more):
    return main(["train", "lm", "--text", str(text), "--preset", "tiny", "--out", str(out), *more])


@pytest.mark.parametrize("arch", ["transformer", "gru"])
def test_train_resume_and_sample(arch, text, tmp_path, capsys):
    out = tmp_path / "model"
    assert train(text, out, "--arch", arch, "--check-gradients", "--baselines") == OK
    printed = capsys.readouterr().out
    for expected in ("text.txt: ", "agrees with a complex step", "step 6 of 6", "bits per byte of", "Kneser-Ney of order 6: "):
        assert expected in printed
    assert main(["run", "text-generation", "--model", str(out), "al", "--max-new-tokens", "5", "--sample", "--seed", "1"]) == OK
    assert capsys.readouterr().out.startswith("al")
    assert train(text, out, "--arch", arch) == USAGE
    assert "has a checkpoint, step-000006" in capsys.readouterr().err
    assert train(text, out, "--arch", arch, "--resume") == OK
    assert train(text, out, "--resume", "--seed", "3") == USAGE
    assert "the checkpoint has seed 0, which cannot become 3" in capsys.readouterr().err
    assert train(text, out, "--resume", "--steps", "7") == USAGE


def test_an_interrupted_training_goes_on_with_the_same_losses(text, tmp_path, monkeypatch, capsys):
    def losses(out):
        return [json.loads(line)["loss"] for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]

    assert train(text, tmp_path / "whole", "--bpe", "270") == OK
    real = lm.windows

    def interrupting(tokens, B, T, seed, n):
        if n == 7:  # of step 4, which has two parts
            os.kill(os.getpid(), 15)
        return real(tokens, B, T, seed, n)

    with monkeypatch.context() as m:
        m.setattr(lm, "windows", interrupting)
        m.setattr(lm, "useful", lambda parts: 1)  # the signal is for this process
        assert train(text, tmp_path / "parts", "--bpe", "270") == INTERRUPTED
    assert "interrupted after step 4 of 6" in capsys.readouterr().out
    assert main(["train", "lm", "--out", str(tmp_path / "parts"), "--resume"]) == OK
    assert losses("parts") == losses("whole")
    assert checkpoints.described(tmp_path / "parts")["about"]["options"]["bpe"] == 270


def test_minutes_become_steps(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "steps_in", lambda seconds, *more, **options: int(seconds) // 30)
    plot = ("--plot", str(tmp_path / "loss.png")) if importlib.util.find_spec("matplotlib") else ()
    assert train(text, tmp_path / "m", "--minutes", "2", *plot) == OK
    assert "4 steps in 2 minutes" in capsys.readouterr().out
    assert (tmp_path / "loss.png").exists() == bool(plot)


def test_what_goes_wrong_has_its_status(text, tmp_path, monkeypatch, capsys):
    assert train(tmp_path / "none.txt", tmp_path / "m") == USAGE
    assert train(text, tmp_path / "m", "--bpe", "5") == USAGE
    assert "size is 5, expected at least 257" in capsys.readouterr().err

    def spoiled(*args, **options):
        raise loop.NotFiniteError("train: step 3: the loss is nan")

    monkeypatch.setattr(loop, "train", spoiled)
    assert train(text, tmp_path / "m") == WRONG
    assert "npattn train: train: step 3: the loss is nan" in capsys.readouterr().err


def test_the_example(text, tmp_path, capsys):
    """It goes on where it was, and what it wrote opens."""
    path = Path(__file__).parents[2] / "examples" / "pretrain.py"
    spec = importlib.util.spec_from_file_location("pretrain", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    first = example.pretrain(tmp_path / "m", of_files([text]), SMALL, 4)
    assert first.startswith("The ")
    assert example.pretrain(tmp_path / "m", of_files([text]), SMALL, 4) == first
    assert "goes on from" in capsys.readouterr().out
    assert load(tmp_path / "m").tokenizer.size == 257
