"""Folders that transformers saves: the same logits, loss and gradients, in float64; and folders that it opens again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")
pytest.importorskip("safetensors", reason="needs the peers extra: pip install npattn[peers]")

import safetensors.numpy

import npattn
from npattn.models.encoders import TextHeadParams
from npattn.models.folder import as_tensors, load, save
from npattn.tolerances import MODEL_GRADIENT

V, M, F, L, S = 53, 24, 40, 9, 7
LLAMA = {"hidden_size": M, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2}
GPT2 = {"n_embd": M, "n_layer": 2, "n_head": 3, "n_positions": 20}
T5 = {"d_model": M, "d_ff": F, "d_kv": 5, "num_layers": 2, "num_heads": 3, "num_decoder_layers": 3}
BART = {"d_model": M, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": F, "decoder_ffn_dim": 30,
        "encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 20,
        "pad_token_id": 1}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
BERT = {"hidden_size": M, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 3,
        "max_position_embeddings": 20}  # fmt: skip
TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
CASES = {
    **{f"{name.lower()}, {task}": (f"{name}{task}", BERT | ({"num_labels": 5} if "Classification" in task else {}))
       for name in ("Bert", "Roberta") for task in TASKS},
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"n_inner": F}),
    "gpt2, relu": ("GPT2LMHeadModel", GPT2 | {"activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama, biases": ("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "llama, llama3": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LINEAR, "hidden_act": "gelu"}),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 3}),
    "mistral, no window": ("MistralForCausalLM", LLAMA | {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "gemma": ("GemmaForCausalLM", LLAMA | {"head_dim": 10}),
    "gemma, relu": ("GemmaForCausalLM", LLAMA | {"hidden_act": "relu"}),
    "gpt2, untied": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "mt5, relu": ("MT5ForConditionalGeneration", T5 | {"feed_forward_proj": "relu"}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5, gated": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False}),
    "t5, few buckets": ("T5ForConditionalGeneration", T5 | {"relative_attention_num_buckets": 8,
                                                            "relative_attention_max_distance": 8}),
    "bart": ("BartForConditionalGeneration", BART),
    "bart, scaled": ("BartForConditionalGeneration", BART | {"scale_embedding": True, "activation_function": "relu"}),
    "marian": ("MarianMTModel", BART | {"scale_embedding": True, "activation_function": "swish", "decoder_start_token_id": 2}),
}  # fmt: skip


def made(name, seed=0):
    """A model of random weights, in float64."""
    cls, options = CASES[name]
    torch.manual_seed(seed)
    kind = getattr(transformers, cls)
    config = kind.config_class(vocab_size=V, attn_implementation="eager", **options)
    model = kind(config).double().eval()
    with torch.no_grad():
        for n, p in model.named_parameters():  # no parameter is 0 or 1, so that each is seen
            if "marian" in name and "embed_positions" in n:  # sinusoids, which were rounded to float32
                angles = torch.arange(len(p))[:, None] * 10000.0 ** (-torch.arange(0, M, 2, dtype=torch.float64) / M)
                p.copy_(torch.cat([angles.sin(), angles.cos()], 1))
            else:
                p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5) + (p.ndim == 1))
        for n, b in model.named_buffers():
            if n == "final_logits_bias":
                b.copy_(torch.randn_like(b))
        for module in model.modules():  # there torch leaves out the gradient of the row of padding
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None
        for n, b in model.named_buffers():
            if n.endswith("embed_scale"):  # of Gemma: rounded to float32
                b.fill_(M**0.5)
    return model


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory, float64_everywhere):
    place, model = tmp_path_factory.mktemp(request.param.split(",")[0]), made(request.param)
    model.save_pretrained(place)
    return place, model


@pytest.fixture(autouse=True, scope="module")
def float64_everywhere(tmp_path_factory):
    """transformers computes RMS norms, rotary positions and the softmax of some models in float32, whatever the model has."""
    small = transformers.GPT2Config(n_embd=2, n_layer=1, n_head=1, vocab_size=3, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(small).save_pretrained(place := tmp_path_factory.mktemp("small"))
    transformers.GPT2LMHeadModel.from_pretrained(place)  # imports what has tables of dtypes
    with pytest.MonkeyPatch.context() as patched:
        for name in ("float", "float32"):
            patched.setattr(torch, name, torch.float64)
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


ids = np.random.default_rng(0).integers(3, V, (3, L))
source = np.random.default_rng(1).integers(3, V, (3, S))
right = np.arange(S) < np.array([[S], [S - 3], [S - 1]])  # the source has padding on the right
left = np.arange(L) >= np.array([[0], [2], [3]])  # a text has padding on the left


def loss_of(model):
    """Logits, loss and the gradients of npattn, by the names of the file."""
    if model.kind == "encoder-decoder":
        inputs, mask = (source, ids[:, :-1]), {"source_mask": npattn.keys(right), "cross_mask": npattn.keys(right)}
        counts = np.ones((3, L - 1), bool)
    else:
        mask = {"mask": npattn.keys(left), "positions": np.maximum(left.cumsum(-1) - 1, 0)[:, :-1]}
        inputs, mask["mask"], counts = (ids[:, :-1],), npattn.keys(left[:, :-1]), left[:, :-1]
    logits, cache = model.forward(*inputs, **mask)
    loss, loss_cache = npattn.cross_entropy_forward(logits, ids[:, 1:], mask=counts)
    dlogits = npattn.cross_entropy_backward(np.ones(()), loss_cache).logits
    return logits, float(loss), as_tensors(model, model.backward(dlogits, cache).params), counts


def theirs(model, kind):
    t = torch.tensor
    if kind == "encoder-decoder":
        inputs = {"input_ids": t(source), "attention_mask": t(right).long(), "decoder_input_ids": t(ids[:, :-1])}
        counts = np.ones((3, L - 1), bool)
    else:
        counts, places = left[:, :-1], np.maximum(left.cumsum(-1) - 1, 0)[:, :-1]
        inputs = {"input_ids": t(ids[:, :-1]), "attention_mask": t(counts).long(), "position_ids": t(places)}
    logits = model(**inputs).logits
    loss = torch.nn.functional.cross_entropy(logits[t(counts)], t(ids[:, 1:])[t(counts)])
    loss.backward()
    return logits.detach().numpy(), loss.item(), {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


def same(got, expected):
    """Every gradient, in units of the largest."""
    largest = max(np.abs(g).max() for g in expected.values())
    assert set(expected) <= set(got)
    for name, g in expected.items():
        assert np.abs(got[name] - g).max() < MODEL_GRADIENT * largest, name


ENCODERS = [name for name in CASES if "bert" in name]


@pytest.mark.parametrize("folder", ENCODERS, indirect=True)
def test_the_output_of_an_encoder_and_every_gradient(folder):
    """Of a random sum of what the head gives, with padding on the right, and the two texts of a pair."""
    place, torch_model = folder
    model, rng, types = load(place), np.random.default_rng(4), (np.arange(S) > 3).astype(int) * np.ones((3, 1), int)
    out, cache = model.forward(source, inside=right, types=types)
    given = {"input_ids": source, "attention_mask": right.astype(int), "token_type_ids": types}
    theirs = torch_model(**{name: torch.tensor(x) for name, x in given.items()})
    expected = theirs.pooler_output if "Model" in type(torch_model).__name__ else theirs[0]
    if "start_logits" in theirs:
        expected = torch.stack([theirs.start_logits, theirs.end_logits], -1)
    dout = rng.standard_normal(out.shape)
    if out.ndim == 3:
        dout *= right[..., None]
        out, expected = out * right[..., None], expected * torch.tensor(right)[..., None]
    expected.backward(torch.tensor(dout))
    assert np.abs(out - expected.detach().numpy()).max() < MODEL_GRADIENT * np.abs(out).max()
    same(as_tensors(model, model.backward(dout, cache).params),
         {n: p.grad.numpy() for n, p in torch_model.named_parameters() if p.grad is not None})  # fmt: skip


@pytest.mark.parametrize("folder", [name for name in CASES if name not in ENCODERS], indirect=True)
def test_logits_loss_and_every_gradient(folder):
    place, torch_model = folder
    model = load(place)
    logits, loss, gradients, counts = loss_of(model)
    torch_model.zero_grad()
    expected, expected_loss, expected_gradients = theirs(torch_model, model.kind)
    assert np.abs(logits - expected)[counts].max() < MODEL_GRADIENT * np.abs(expected).max()
    assert abs(loss - expected_loss) < MODEL_GRADIENT * loss
    same(gradients, expected_gradients)


@pytest.mark.parametrize("folder", CASES, indirect=True)
def test_a_folder_that_npattn_saves_opens_in_transformers(folder, tmp_path):
    place, torch_model = folder
    save(tmp_path / "saved", load(place))
    again = type(torch_model).from_pretrained(tmp_path / "saved", attn_implementation="eager")
    state, before = again.state_dict(), torch_model.state_dict()
    assert set(state) == set(before)
    for n in state:
        if "embed_positions" not in n or "bart" in place.name:  # Marian computes them again, in float32
            # Gemma stores g - 1, and (1 + x) - 1 is not x to the last bit.
            bound = torch.finfo(torch.float64).eps * (1 + before[n].abs()) if "gemma" in place.name and "norm" in n else 0
            assert ((state[n] - before[n]).abs() <= bound).all(), n
    configs = [type(torch_model).from_pretrained(where).config.to_dict() for where in (place, tmp_path / "saved")]
    assert configs[0] | {"_name_or_path": ""} == configs[1] | {"_name_or_path": ""}


WITH = {  # keys of config.json that make another model than the one that npattn would compute
    "llama": [{"is_causal": False}, {"architectures": ["LlamaForSequenceClassification"]}, {"quantization_config": {"bits": 4}},
              {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}],
    "gpt2": [{"is_causal": False}],
    "t5": [{"is_gated_act": True}, {"dense_act_fn": "gelu"}],
    "roberta, ForMaskedLM": [{"hidden_act": "relu"}, {"tie_word_embeddings": False}],
    "bart": [{"architectures": ["BartForSequenceClassification"]}],
}


ROWS = [(name, more) for name, rows in WITH.items() for more in rows]


@pytest.mark.parametrize(("folder", "more"), ROWS, indirect=["folder"], ids=str)
def test_what_would_be_another_model_is_refused(folder, more, tmp_path):
    shutil.copytree(folder[0], tmp_path / "copy")
    config = json.loads((tmp_path / "copy/config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps(config | more))
    with pytest.raises(ValueError, match=f"config.json: .*{next(iter(more))}"):
        load(tmp_path / "copy")


@pytest.mark.parametrize("folder", ["bert, Model"], indirect=True)
def test_first_files_of_bert_and_second_saves_of_sentence_transformers(folder, tmp_path):
    """gamma and beta are old names of weight and bias; a folder with pooling is replaced as a whole."""
    place = tmp_path / "copy"
    shutil.copytree(folder[0], place)
    tensors = safetensors.numpy.load_file(place / "model.safetensors")
    for name in [name for name in tensors if "LayerNorm" in name]:
        tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)
    safetensors.numpy.save_file(tensors, place / "model.safetensors")
    model = load(place)
    ids = np.arange(12).reshape(2, 6)
    assert np.array_equal(model.forward(ids)[0], load(folder[0]).forward(ids)[0])
    pooled = replace(model, config=replace(model.config, pooling="mean", normalize=True),
                     params=model.params._replace(head=TextHeadParams()), longest=17)  # fmt: skip
    inside = np.arange(6) < np.array([[6], [4]])
    for _ in range(2):
        save(tmp_path / "sentences", pooled)
        again = load(tmp_path / "sentences")
        assert again.longest == 17
        assert np.array_equal(again.forward(ids, inside=inside)[0], pooled.forward(ids, inside=inside)[0])


@pytest.mark.parametrize("folder", ["llama", "t5"], indirect=True)
def test_padding_by_inside(folder):
    """The same as masks and positions by hand."""
    model, kind = load(folder[0]), load(folder[0]).kind
    if kind == "encoder-decoder":
        got, _ = model.forward(source, ids, inside=right)
        want, _ = model.forward(source, ids, source_mask=npattn.keys(right), cross_mask=npattn.keys(right))
    else:
        got, _ = model.forward(ids, inside=left)
        want, _ = model.forward(ids, mask=npattn.keys(left), positions=np.maximum(left.cumsum(-1) - 1, 0))
    assert np.array_equal(got, want)
    with pytest.raises(TypeError, match="forward: got 3 arrays of tokens, expected"):
        model.forward(ids, ids, ids)
