"""npattn train translation and summarization on tiny data: resume, and what pipelines and transformers make of the folders."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")
pytest.importorskip("tokenizers", reason="needs the peers extra: pip install npattn[peers]")

import npattn
from npattn.cli import main
from npattn.models import load
from npattn.models.trees import named_leaves
from npattn.training import summarization, translation
from npattn.training.text_to_text import Pair

PLACES = {"Spain": "Espagne", "Peru": "Pérou", "Chile": "Chili", "Brazil": "Brésil", "Norway": "Norvège", "Egypt": "Égypte"}
PAIRS = [Pair(f"{kind} {a}", f"{b} ({of})", kind) for a, b in PLACES.items()
         for kind, of in (("North", "nord"), ("South", "sud"), ("East", "est"), ("West", "ouest"))]  # fmt: skip
BODIES = [Pair(f"The {kind} of the {thing} is given back, and nothing of the {thing} is changed by that.",
               f"Return the {kind} of the {thing}.", f"m{n}")
          for n, kind in enumerate(("length", "sum", "mean", "norm", "rank"))
          for thing in ("list", "array", "matrix", "tree")]  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Tiny data and models, and scores without the libraries that compute them."""
    monkeypatch.setattr(translation, "catalogues", lambda language: PAIRS)
    monkeypatch.setattr(translation, "HELD_OUT", 4)
    init = translation.Task.__init__
    tiny = {"held_out": 4, "width": 32, "layers": (1, 1), "batch": 4}
    monkeypatch.setattr(translation.Task, "__init__", lambda self, pairs, **given: init(self, pairs, **tiny, **given))
    monkeypatch.setattr(translation, "scores", lambda sources, targets, found: dict.fromkeys(
        ("chrf", "exact", "exact from", "exact to"), float(len(found))))  # fmt: skip
    monkeypatch.setattr(summarization, "docstrings", lambda: BODIES)
    monkeypatch.setattr(summarization, "nearest", lambda pairs, sources: [pairs[0].target] * len(sources))
    monkeypatch.setattr(summarization, "scores", lambda targets, found: dict.fromkeys(
        (*summarization.NAMES, "rouge1 from", "rouge1 to"), float(len(found))))  # fmt: skip
    begin = summarization.Task.__init__
    few = {"held_out": 4, "layers": (1, 1), "batch": 4}
    monkeypatch.setattr(summarization.Task, "__init__", lambda self, *data, **given: begin(self, *data, **few, **given))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny random BERT with the words of the bodies."""
    place = tmp_path_factory.mktemp("bert")
    words = sorted({w.strip(".,").lower() for p in BODIES for w in f"{p.source} {p.target}".split()})
    names = ["[PAD]", *(f"[unused{n}]" for n in range(3)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "other", *words]
    (place / "vocab.txt").write_text("".join(f"{name}\n" for name in names))
    transformers.BertTokenizerFast(str(place / "vocab.txt")).save_pretrained(place)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(names), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=48, max_position_embeddings=80)  # fmt: skip
    transformers.BertModel(config).save_pretrained(place)
    return place


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("copying", [True, False])
def test_translation(small, tmp_path, capsys, copying):
    plain = [] if copying else ["--no-copying"]
    command = ["train", "translation", "--bpe", "60", *plain, "--out", str(tmp_path / "a"), "--steps", "12"]
    assert main([*command, "--check-gradients"]) == 0
    out = capsys.readouterr().out
    assert "20 pairs to train with, 4 held out" in out
    assert "the gradient of all parameters agrees with a complex step" in out
    assert "copying the source: chrF 4.0" in out
    assert "the model: chrF 4.0" in out
    found = losses(tmp_path / "a")
    assert np.mean(found[-4:]) < 0.97 * np.mean(found[:4])

    words = load(tmp_path / "a")
    assert words.kind == ("copying encoder-decoder" if copying else "encoder-decoder")
    texts = [p.source for p in PAIRS[:5]]
    written = [row["translation_text"] for row in npattn.pipeline("translation", model=tmp_path / "a")(texts, num_beams=2)]
    assert main(["run", "translation", "--model", str(tmp_path / "a"), "--num-beams", "2", *texts]) == 0
    assert capsys.readouterr().out.splitlines() == [text.strip("\n") for text in written]
    if not copying:
        model = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "a").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
        ids = tokenizer(texts[0], return_tensors="pt").input_ids
        with torch.no_grad():
            theirs = model.generate(ids, num_beams=2)
        assert tokenizer.decode(theirs[0], skip_special_tokens=True) == written[0]


def test_translation_goes_on_to_the_last_bit(small, tmp_path, monkeypatch):
    from npattn.training import checkpoints

    command = ["train", "translation", "--bpe", "60", "--steps", "12", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    write = checkpoints.write

    def ends(*given):
        write(*given)
        raise OSError("the disk is full")

    with monkeypatch.context() as m:
        m.setattr(checkpoints, "write", ends)
        assert main([*command, str(tmp_path / "part")]) != 0
    assert 0 < len(losses(tmp_path / "part")) < 12
    assert main([*command, str(tmp_path / "part"), "--resume"]) == 0
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    one, other = (named_leaves(load(tmp_path / name).params) for name in ("part", "whole"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("options", [[], ["--no-copying"], ["--from-scratch"]], ids=str)
def test_summarization(small, bert, tmp_path, capsys, options):
    out, command = tmp_path / "a", ["train", "summarization", "--encoder", str(bert), "--steps", "12", *options]
    assert main([*command, "--out", str(out), "--check-gradients"]) == 0
    shown = capsys.readouterr().out
    assert "first sentence: ROUGE-1/2/L 4.0/4.0/4.0" in shown
    found = losses(out)
    assert np.mean(found[-4:]) < 0.97 * np.mean(found[:4])
    assert set(summarization.NAMES) <= set(json.loads((out / "log.jsonl").read_text().splitlines()[-1]))

    model, theirs = load(out), load(bert)
    p = model.params if options == ["--no-copying"] else model.params.transformer
    ours, wanted = (list(named_leaves(x.encoder.blocks[:1]).values()) for x in (p, theirs.params))
    is_bert = all(np.array_equal(a, b) for a, b in zip(ours, wanted, strict=True))
    assert is_bert == (options != ["--from-scratch"]), "the encoder stays that of BERT"
    text = BODIES[0].source
    assert model.tokenizer.token(5) not in summarization.SPECIAL
    for word in ("length", "list"):  # another id, the same vector
        a, b = model.tokenizer.id(word), theirs.tokenizer.id(word)
        assert a != b
        assert np.array_equal(p.source.table[a], theirs.params.embed.table[b]) == (options != ["--from-scratch"])
    summary = npattn.pipeline("summarization", model=out)(text, max_length=12, min_length=4)[0]["summary_text"]
    assert 2 <= len(summary.split()) <= 12
    if options == ["--no-copying"]:
        torch_model = transformers.BartForConditionalGeneration.from_pretrained(out).eval()
        ids = torch.tensor(model.tokenizer.encode([text]).ids)
        with torch.no_grad():
            row = torch_model.generate(ids, max_length=12, min_length=4)[0]
        assert model.tokenizer.decode(row.numpy()) == summary


def test_scores():
    pytest.importorskip("sacrebleu", reason="needs the tasks extra: pip install npattn[tasks]")
    pytest.importorskip("rouge_score", reason="needs the tasks extra: pip install npattn[tasks]")
    found = translation.scores(["a", "b"], ["chat noir", "chien"], ["chat noir", "chat"])
    assert found["exact"] == 50
    assert 30 < found["chrf"] < 100
    rouge = summarization.scores(["return the sum"], ["returns the mean"])
    assert {name: round(rouge[name]) for name in summarization.NAMES} == {"rouge1": 67, "rouge2": 50, "rougeL": 67}
    if importlib.util.find_spec("sklearn"):
        assert summarization.nearest(BODIES[1:], [BODIES[1].source]) == [BODIES[1].target]


def test_the_example(bert, tmp_path):
    path = Path(__file__).parents[2] / "examples" / "summarize.py"
    spec = importlib.util.spec_from_file_location("summarize", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.learn(tmp_path, BODIES, load(bert), 3, held_out=4, layers=(1, 1), batch=4)
    assert npattn.pipeline("summarization", model=tmp_path)(BODIES[0].source, max_length=8)[0]["summary_text"]
