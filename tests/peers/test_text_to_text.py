"""Summaries and translations: the pipelines beside generate and the tokenizer of transformers, on folders that it saved."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")
pytest.importorskip("tokenizers", reason="needs the peers extra: pip install npattn[peers]")

import npattn
from npattn.cli import main
from peers.test_pipelines import BART, TEXTS, tokenizer

T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
SPECIFIC = {"summarization": {"prefix": "summarize: ", "num_beams": 3, "min_length": 7, "max_length": 20, "length_penalty": 2.0,
                              "no_repeat_ngram_size": 3, "early_stopping": True},
            "translation_en_to_de": {"prefix": "translate English to German: ", "max_length": 15},
            "translation_en_to_fr": {"prefix": "translate English to French: ", "max_length": 12}}  # fmt: skip
MODELS = {
    "bart": ("BartForConditionalGeneration", {**BART, "decoder_start_token_id": 2, "tie_word_embeddings": False}),
    "marian": ("MarianMTModel", {**BART, "decoder_start_token_id": 0, "tie_word_embeddings": False}),
    "t5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0, "task_specific_params": SPECIFIC}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place, words = tmp_path_factory.mktemp("models"), tokenizer()
    for name, (cls, options) in MODELS.items():
        torch.manual_seed(1)
        kind = getattr(transformers, cls)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = kind(kind.config_class(vocab_size=len(words), **ids, **options)).eval()
        with torch.no_grad():  # far from ties, and each text has another summary
            for of, p in model.named_parameters():
                large = 0.3 if p.ndim == 1 else 2 * p.shape[-1] ** -0.5
                p.copy_(torch.randn_like(p) * large + ("norm" in of and of.endswith("weight")))
            if name != "t5":
                for side in (model.model.encoder, model.model.decoder):
                    side.embed_tokens.weight.copy_(model.model.shared.weight)
        model.save_pretrained(place / name)
        words.save_pretrained(place / name)
    return place


def theirs(folder, texts, prefix="", **settings):
    """What transformers writes about each text alone."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    found = []
    for text in texts:
        ids = words(prefix + text, return_tensors="pt").input_ids
        with torch.no_grad():
            written = model.generate(ids, **settings)
        found += [words.decode(row, skip_special_tokens=True) for row in written]
    return found


@pytest.mark.parametrize("name", ["bart", "marian"])
@pytest.mark.parametrize("settings", [
    {"max_length": 14}, {"max_length": 30, "min_length": 25}, {"max_new_tokens": 9, "num_beams": 3},
    {"max_length": 12, "num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5}], ids=str)  # fmt: skip
def test_the_same_texts_as_transformers(folders, name, settings):
    expected = theirs(folders / name, TEXTS, **settings)
    assert len(set(expected)) > 1
    for task, key in (("summarization", "summary_text"), ("translation", "translation_text")):
        got = npattn.pipeline(task, model=folders / name)(TEXTS, **settings)
        rows = got if "num_return_sequences" not in settings else [row for rows in got for row in rows]
        assert [row[key] for row in rows] == expected
    alone = npattn.pipeline("summarization", model=folders / name)(TEXTS[0], **settings)
    assert alone == npattn.pipeline("summarization", model=folders / name)([TEXTS[0]], **settings)


@pytest.mark.parametrize(("task", "specific"), [
    ("summarization", "summarization"), ("translation", "translation_en_to_de"),
    ("translation_en_to_fr", "translation_en_to_fr")])  # fmt: skip
def test_t5_has_a_prefix_and_settings_for_each_task(folders, task, specific):
    options = dict(SPECIFIC[specific])
    prefix = options.pop("prefix")
    expected = theirs(folders / "t5", TEXTS, prefix, **options)
    pipeline = npattn.pipeline(task, model=folders / "t5")
    assert [next(iter(row.values())) for row in pipeline(TEXTS)] == expected
    assert [row[pipeline.key] for row in pipeline(TEXTS, max_length=9, min_length=0)] == theirs(
        folders / "t5", TEXTS, prefix, **(options | {"max_length": 9, "min_length": 0}))  # fmt: skip


def test_run_prints_what_the_pipeline_writes(folders, capsys, tmp_path):
    (tmp_path / "text").write_text(TEXTS[2])
    command = ["--model", str(folders / "bart"), "--max-length", "14", "--num-beams", "2"]
    assert main(["run", "summarization", *command, TEXTS[0], "--file", str(tmp_path / "text")]) == 0
    expected = theirs(folders / "bart", [TEXTS[0], TEXTS[2]], max_length=14, num_beams=2)
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)
    assert main(["run", "translation", *command, TEXTS[1]]) == 0
    assert capsys.readouterr().out == theirs(folders / "bart", [TEXTS[1]], max_length=14, num_beams=2)[0] + "\n"


def test_errors(folders):
    with pytest.raises(ValueError, match=r"positions reach from 0 to \d+, expected -2 to 63"):
        npattn.pipeline("summarization", model=folders / "bart")("x " * 200)
    assert npattn.pipeline("summarization", model=folders / "bart")("x " * 200, truncation=True, max_length=5)
    with pytest.raises(TypeError, match="length is no setting"):
        npattn.pipeline("summarization", model=folders / "bart")("x", length=3)
    with pytest.raises(ValueError, match="task is 'summarize', expected one of"):
        npattn.pipeline("summarize", model=folders / "bart")
    settings = json.loads((folders / "bart" / "config.json").read_text())
    assert settings["model_type"] == "bart"
