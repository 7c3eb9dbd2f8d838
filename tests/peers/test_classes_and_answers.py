"""Classes of texts and answers to questions on folders that transformers saved, and the folders of the two tasks there."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")
tokenizers = pytest.importorskip("tokenizers", reason="needs the peers extra: pip install npattn[peers]")

import npattn
from npattn.cli import main
from npattn.models import load
from npattn.tolerances import MODEL_GRADIENT
from npattn.training import question_answering, sentiment

TEXTS = ["What a wonderful film.", "bad", "The plot and the actors were dull, and it took three hours of my life."]
QUESTION = "Where did they go?"
CONTEXT = "The actors went to the harbour. It was dull there, and they left in the morning."
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CLASSES = {
    "bert": ("BertForSequenceClassification", {"id2label": {0: "bad", 1: "good", 2: "neither"}}),
    "roberta": ("RobertaForSequenceClassification", {"num_labels": 3, "pad_token_id": 1}),
    "several": ("BertForSequenceClassification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "one": ("BertForSequenceClassification", {"num_labels": 1}),
}


def word_pieces(place):
    letters = sorted({c for text in (*TEXTS, QUESTION, CONTEXT) for c in text.lower() if not c.isspace()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), "the", "dull", "##tor"]
    place.mkdir()
    (place / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return transformers.BertTokenizerFast(vocab=str(place / "vocab.txt"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    words = word_pieces(place / "words")
    for name, (cls, options) in {**CLASSES, "answers": ("BertForQuestionAnswering", {})}.items():
        torch.manual_seed(1)
        kind = getattr(transformers, cls)
        given = {"vocab_size": len(words), "pad_token_id": 0, "max_position_embeddings": 130, **SIZES, **options}
        model = kind(kind.config_class(**given)).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else 0.5)
        if name == "answers":  # else all answers are about as good, and their order is one of rounding errors
            torch.nn.init.normal_(model.qa_outputs.weight, std=3.0)
        model.save_pretrained(place / name)
        words.save_pretrained(place / name)
    return place


def same(got, want):
    """The same classes in the same order, and scores of float32 that differ by rounding."""
    for a, b in zip(got, want, strict=True):
        assert a["label"] == b["label"]
        assert abs(a["score"] - b["score"]) <= MODEL_GRADIENT / np.finfo(np.float64).eps * np.finfo(np.float32).eps


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_those_of_transformers(folders, name):
    theirs = transformers.pipeline("text-classification", model=str(folders / name))
    ours = npattn.pipeline("sentiment-analysis", model=folders / name)
    same(ours(TEXTS), theirs(TEXTS))
    same(ours(TEXTS, batch_size=1), theirs(TEXTS))
    same(ours(TEXTS[0]), theirs(TEXTS[0]))
    for k in (None, 2):
        same(ours(TEXTS[2], top_k=k), theirs(TEXTS[2], top_k=k))
        for a, b in zip(ours(TEXTS, top_k=k), theirs(TEXTS, top_k=k), strict=True):
            same(a, b)


def answers_by_loops(folder, question, context, most):
    """All answers, the best first, from the logits of transformers: version 4 did the same."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertForQuestionAnswering.from_pretrained(folder).eval()
    e = words(question, context, return_offsets_mapping=True, return_tensors="pt")
    offsets = e.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        out = model(**e)
    parts = e.sequence_ids(0)
    counted = [n for n, part in enumerate(parts) if part == 1 or n == 0]
    start, end = (torch.softmax(x[0, counted].double(), 0).numpy() for x in (out.start_logits, out.end_logits))
    of = {n: i for i, n in enumerate(counted)}
    found = {}
    for i, a in enumerate(counted):
        for b in counted[i : i + most]:
            if parts[a] == parts[b] == 1:
                first, last = e.word_to_chars(0, e.token_to_word(0, a), 1)[0], e.word_to_chars(0, e.token_to_word(0, b), 1)[1]
                found[first, last] = max(found.get((first, last), 0), start[of[a]] * end[of[b]])
    assert offsets[counted[-1]][1] == len(context)
    return sorted(((score, *at) for at, score in found.items()), key=lambda x: -x[0])


@pytest.mark.parametrize("most", [1, 4, 15])
def test_answers_are_those_of_the_logits_of_transformers(folders, most):
    answerer = npattn.pipeline("question-answering", model=folders / "answers")
    for question, context in ((QUESTION, CONTEXT), ("dull?", TEXTS[2])):
        want = answers_by_loops(folders / "answers", question, context, most)
        got = answerer(question=question, context=context, top_k=5, max_answer_len=most)
        for a, (score, start, end) in zip(got, want, strict=False):
            assert (a["start"], a["end"], a["answer"]) == (start, end, context[start:end])
            assert abs(a["score"] - score) <= MODEL_GRADIENT / np.finfo(np.float64).eps * np.finfo(np.float32).eps
        assert answerer(question=question, context=context, max_answer_len=most) == got[0]
    both = answerer(question=[QUESTION, "dull?"], context=CONTEXT, max_answer_len=most)
    assert both == [answerer(question=q, context=CONTEXT, max_answer_len=most) for q in (QUESTION, "dull?")]


def test_an_answer_in_a_long_text_is_the_best_of_its_parts(folders):
    answerer = npattn.pipeline("question-answering", model=folders / "answers")
    long = " ".join([CONTEXT] * 5)
    found = answerer(question="why?", context=long, top_k=20)
    assert all(long[a["start"] : a["end"]] == a["answer"] for a in found)
    assert [a["score"] for a in found] == sorted((a["score"] for a in found), reverse=True)
    assert max(a["end"] for a in found) > 200, "only the beginning was read"
    with pytest.raises(ValueError, match="the question leaves"):
        answerer(question=CONTEXT * 2, context=long)
    with pytest.raises(ValueError, match="the context has no token"):
        answerer(question="why?", context=" ")


def test_models_without_the_head_are_refused(folders):
    with pytest.raises(ValueError, match="no head with a class for a whole text"):
        npattn.pipeline("sentiment-analysis", model=folders / "answers")
    with pytest.raises(ValueError, match="no head for start and end"):
        npattn.pipeline("question-answering", model=folders / "bert")


def test_npattn_run(folders, tmp_path, capsys):
    assert main(["run", "sentiment-analysis", "--model", str(folders / "bert"), *TEXTS[:2]]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == TEXTS[:2]
    assert {line["label"] for line in lines} <= {"bad", "good", "neither"}
    (tmp_path / "story").write_text(CONTEXT)
    model = ["run", "question-answering", "--model", str(folders / "answers"), "--file", str(tmp_path / "story")]
    assert main([*model, "--question", QUESTION]) == 0
    found = json.loads(capsys.readouterr().out)
    assert CONTEXT[found["start"] : found["end"]] == found["answer"]
    assert main(model) == 2
    assert "--question" in capsys.readouterr().err
    assert main([*model, "--question", QUESTION, "--pooling", "mean"]) == 2
    assert "--pooling is no option of question-answering" in capsys.readouterr().err


# --- the tasks ---------------------------------------------------------------------------------------------------------------


def agrees_with(ours, theirs):
    top = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= MODEL_GRADIENT / np.finfo(np.float64).eps * np.finfo(np.float32).eps * top


@pytest.fixture
def reviews(tmp_path):
    folder = tmp_path / "sentiment" / "test" / "fixtures"
    folder.mkdir(parents=True)
    for name in sentiment.FILES:
        rows = [{"text": f"{name} {'dull' if n % 2 else 'the film'} {n}", "class": n % 2} for n in range(20)]
        (folder / name).write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def encoder(tmp_path):
    words = word_pieces(tmp_path / "words")
    torch.manual_seed(2)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), max_position_embeddings=40, **SIZES))
    model.save_pretrained(tmp_path / "encoder")
    words.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize("way", ["head", "lora", "all"])
def test_npattn_train_sentiment_goes_on_to_the_last_bit_and_opens_in_transformers(reviews, encoder, tmp_path, capsys, way):
    command = ["train", "sentiment", "--data", str(reviews), "--encoder", str(encoder), "--train", way, "--steps", "6"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "held-out accuracy" in said
    assert "the label that most sentences have" in said
    _interrupted(tmp_path)
    assert main([*command, "--out", str(tmp_path / "b"), "--resume"]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    assert type(theirs).__name__ == "BertForSequenceClassification"
    with torch.no_grad():
        want = theirs(**words(TEXTS, padding=True, truncation=True, max_length=40, return_tensors="pt")).logits.numpy()
    e = load(tmp_path / "a").tokenizer.encode(TEXTS, max_length=40)
    agrees_with(load(tmp_path / "a").forward(e.ids, inside=e.inside)[0], want)
    assert npattn.pipeline("sentiment-analysis", model=tmp_path / "a")(TEXTS[0])[0]["label"] in sentiment.LABELS


def test_npattn_train_question_answering_goes_on_to_the_last_bit_and_opens_in_transformers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(question_answering, "BATCH", 8)
    monkeypatch.setattr(question_answering, "TESTED", 10)
    command = ["train", "question-answering", "--steps", "6"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert "the place that is named last" in capsys.readouterr().out
    _interrupted(tmp_path)
    assert main([*command, "--out", str(tmp_path / "b"), "--resume"]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    s = question_answering.held_out(2, 1, 0)[0]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "a").eval()
    e = load(tmp_path / "a").tokenizer.encode(s.question, s.context)
    given = {"input_ids": torch.tensor(e.ids), "token_type_ids": torch.tensor(e.types)}
    assert words(s.question, s.context)["input_ids"] == e.ids[0].tolist()
    with torch.no_grad():
        out = theirs(**given)
    ours, _ = load(tmp_path / "a").forward(e.ids, types=e.types)
    agrees_with(ours, torch.stack([out.start_logits, out.end_logits], -1).numpy())
    answer = npattn.pipeline("question-answering", model=tmp_path / "a")(question=s.question, context=s.context)
    assert s.context[answer["start"] : answer["end"]] == answer["answer"]


def _interrupted(place):
    """A copy of the training in a, in which the last steps were never made."""
    shutil.copytree(place / "a", place / "b")
    steps = sorted(p.name for p in (place / "b").glob("step-*"))
    assert len(steps) == 2
    shutil.rmtree(place / "b" / steps[-1])
    (place / "b" / "latest").write_text(steps[0] + "\n")
    for name in ("model.safetensors", "config.json"):
        (place / "b" / name).unlink()


def test_the_words_of_the_stories_are_all_known():
    words = question_answering.word_tokenizer()
    for facts in (1, 2):
        for s in question_answering.held_out(facts, 50, 0):
            e = words.encode(s.question, s.context)
            assert words.special.unk not in e.ids
            assert e.ids.shape[1] == question_answering.QUESTION + 3 * s.context.count(".") + 1, "three words a sentence"
