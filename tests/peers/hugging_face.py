"""Tiny random models of transformers in float64, and their parameters and gradients by name, for comparisons with npattn.

What reads parameters here reads gradients, too: ``tree(get)`` calls ``get(name)`` for each array of the state dict.
"""

from __future__ import annotations

import numpy as np
import torch
from helpers import leaves

from npattn import FeedForwardParams, LinearParams, MultiHeadParams, NormParams
from npattn.models.blocks import EncoderBlockParams
from npattn.models.transformer import EmbedParams, EncoderParams
from npattn.tolerances import MODEL_GRADIENT


def made(cls, config, seed=0):
    """A model whose parameters are all random, the biases and norms, too."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = cls(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5 + (p.ndim == 1))
    for module in model.modules():
        # With padding_idx torch leaves out the gradient of the row of the padding token; npattn gives the true one.
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model


class ByName:
    """The parameters of a model, or their gradients, and which of them were asked for."""

    def __init__(self, model, gradients=False):
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.arrays = {name: (p.grad if gradients else p.detach()).numpy() for name, p in params.items()}
        self.asked = set()

    def __call__(self, name):
        self.asked.add(name)
        return self.arrays[name]


def read(tree, model, gradients=False):
    """The tree of all parameters of the model: none is left out."""
    get = ByName(model, gradients)
    params = tree(get)
    assert get.asked == get.arrays.keys()
    return params


def linear(get, name, bias=True):
    return LinearParams(get(f"{name}.weight").T, get(f"{name}.bias") if bias else None)


def norm(get, name, bias=True):
    return NormParams(get(f"{name}.weight"), get(f"{name}.bias") if bias else None)


def multi_head(get, names, bias=True):
    """names : of the projections of queries, keys and values, and of the output"""
    w, b = zip(*(linear(get, name, bias) for name in names), strict=True)
    return MultiHeadParams(*w, *b)


def bert(get, layers, prefix=""):
    """The embedding and the encoder of BERT and of RoBERTa."""
    p = f"{prefix}embeddings."
    table, positions, types = (get(f"{p}{x}_embeddings.weight") for x in ("word", "position", "token_type"))
    embed = EmbedParams(table, positions, norm(get, f"{p}LayerNorm"), types)
    return embed, EncoderParams(tuple(bert_block(get, f"{prefix}encoder.layer.{n}.") for n in range(layers)))


def bert_block(get, p):
    attention = multi_head(get, [f"{p}attention.{x}" for x in ("self.query", "self.key", "self.value", "output.dense")])
    (w_in, b_in), (w_out, b_out) = linear(get, f"{p}intermediate.dense"), linear(get, f"{p}output.dense")
    norms = [norm(get, f"{p}{x}.LayerNorm") for x in ("attention.output", "output")]
    return EncoderBlockParams(attention, norms[0], FeedForwardParams(w_in, w_out, b_in, b_out), norms[1])


def assert_same(got, want):
    assert np.abs(got - want).max() <= MODEL_GRADIENT * np.abs(want).max()


def assert_same_gradients(grads, tree, model):
    """Every parameter's gradient, within MODEL_GRADIENT of the largest of the model."""
    wanted = list(leaves(read(tree, model, gradients=True)))
    top = max(np.abs(x).max() for x in wanted)
    for number, (got, want) in enumerate(zip(leaves(grads), wanted, strict=True)):
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= MODEL_GRADIENT * top, f"gradient {number}, {want.shape}"
