"""The forms in which transformers stores one model: dtypes, shards, with and without a head; and what it reads of ours."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")
pytest.importorskip("safetensors", reason="needs the peers extra: pip install npattn[peers]")
pytest.importorskip("ml_dtypes", reason="needs the models extra: pip install npattn[models]")

from npattn.models import load, save
from npattn.models.folder import as_tensors

GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 20}
LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2}  # fmt: skip
BART = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 30,
        "encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 20,
        "pad_token_id": 1}  # fmt: skip
T5 = {"d_model": 24, "d_ff": 40, "d_kv": 5, "num_layers": 2, "num_heads": 3}
HEADS = {"GPT2LMHeadModel": GPT2, "LlamaForCausalLM": LLAMA, "GemmaForCausalLM": LLAMA, "BartForConditionalGeneration": BART,
         "T5ForConditionalGeneration": T5}  # fmt: skip
BARE = {"GPT2Model": GPT2, "GemmaModel": LLAMA, "BartModel": BART, "MarianModel": BART, "T5Model": T5}


def made(name, dtype=torch.float32, bare=False):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = cls.config_class(vocab_size=53, attn_implementation="eager", **(BARE if bare else HEADS)[name])
    return cls(config).to(dtype).eval()


def arrays(model, dtype=torch.float32):
    return {name: x.to(dtype).numpy() for name, x in model.state_dict().items()}


def assert_same_tensors(tensors, expected):
    assert tensors
    for name, x in tensors.items():
        # Gemma's norms store g - 1: (1 + x) - 1 in float32 is x of bfloat16 and float16 but for its last bits.
        assert np.abs(x - expected[name]).max() <= (np.finfo(np.float32).eps if "norm" in name else 0), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_dtypes(name, dtype, tmp_path):
    theirs = made(name, dtype)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    assert_same_tensors(as_tensors(model), arrays(theirs, torch.float64 if dtype == torch.float64 else torch.float32))
    assert load(tmp_path, dtype=np.float64).dtype == np.float64


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", HEADS)
def test_transformers_opens_what_is_saved_in_a_dtype(name, dtype, tmp_path):
    made(name).save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs").astype(dtype)
    assert load(tmp_path / "theirs", dtype=dtype).dtype == model.dtype == np.dtype(dtype)
    save(tmp_path / "ours", model)
    assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == dtype
    again, note = type(made(name)).from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not any(note.values()), note
    kept = {torch.float32} if name.startswith("T5") and dtype == "float16" else set()  # transformers widens some of T5
    assert {x.dtype for x in again.parameters()} == {getattr(torch, dtype)} | kept
    assert_same_tensors(as_tensors(load(tmp_path / "ours")), arrays(again))
    for n, x in as_tensors(model).items():
        assert np.array_equal(x.astype(np.float32), again.state_dict()[n].to(torch.float32).numpy()), n


@pytest.mark.parametrize("name", HEADS)
def test_shards(name, tmp_path):
    theirs = made(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) > 2
    model = load(tmp_path / "theirs")
    assert_same_tensors(as_tensors(model), arrays(theirs))
    save(tmp_path / "ours", model, shard_bytes=10_000)
    assert len([*(tmp_path / "ours").glob("*.safetensors")]) > 2
    again, note = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(note.values()), note
    assert_same_tensors(arrays(again), arrays(theirs))


@pytest.mark.parametrize("name", BARE)
def test_a_model_without_a_head(name, tmp_path):
    theirs = made(name, bare=True)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    state = arrays(theirs)
    tensors = as_tensors(model)
    assert set(tensors) - {"final_logits_bias"} <= set(state)
    assert_same_tensors({n: x for n, x in tensors.items() if n in state}, state)
    save(tmp_path / "ours", model)
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert_same_tensors({n: x for n, x in arrays(again).items() if "embed_positions" not in n}, state)
