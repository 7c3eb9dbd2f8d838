"""T5, BART and Marian of transformers with the same parameters, in float64: outputs, losses and every gradient."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")

from helpers import assert_close

from npattn import FeedForwardParams, cross_entropy_backward, cross_entropy_forward, keys, sinusoidal
from npattn.models.blocks import DecoderBlockParams, EncoderBlockParams
from npattn.models.config import Config, Relative
from npattn.models.transformer import (
    DecoderParams,
    EmbedParams,
    EncoderParams,
    HeadParams,
    TransformerParams,
    decoder_backward,
    decoder_forward,
    embed_backward,
    embed_forward,
    encoder_backward,
    encoder_forward,
    transformer_backward,
    transformer_forward,
)
from peers.hugging_face import assert_same, assert_same_gradients, linear, made, multi_head, norm, read

B, S, L, M, F, H, D, V, LAYERS, PADDING = 3, 7, 5, 12, 10, 3, 6, 17, 2, 1
ENDS = np.array([[S], [4], [1]])
SIDES = {"right": np.arange(S) < ENDS, "left": np.arange(S) >= S - ENDS}
RNG = np.random.default_rng(0)
SOURCE, TARGET, LABELS = (RNG.integers(PADDING + 1, V, (B, n)) for n in (S, L, L))
SIDE = pytest.mark.parametrize("side", SIDES)


def check(model, tree, config, inside):
    """Logits, loss and every gradient of a model with a head."""
    params, source = read(tree, model), np.where(inside, SOURCE, PADDING)
    if hasattr(model, "final_logits_bias"):  # of BART: 0 in a new model, and a buffer, which has no gradient in torch
        bias = RNG.standard_normal(V)
        model.final_logits_bias.copy_(torch.tensor(bias))
        params = params._replace(head=HeadParams(None, bias))
    masks = {"source_mask": keys(inside), "cross_mask": keys(inside)}
    logits, cache = transformer_forward(source, TARGET, params, config, **masks)
    ids = {"input_ids": source, "attention_mask": inside.astype(int), "decoder_input_ids": TARGET, "labels": LABELS}
    out = model(**{name: torch.tensor(x) for name, x in ids.items()})
    loss, of_loss = cross_entropy_forward(logits, LABELS)
    assert_same(logits, out.logits.detach().numpy())
    assert_same(loss, out.loss.detach().numpy())
    out.loss.backward()
    grads = transformer_backward(cross_entropy_backward(np.array(1.0), of_loss).logits, cache).params
    assert_same_gradients(grads._replace(head=HeadParams()), tree, model)


def check_stacks(model, tree, config, inside):
    """The states of both stacks, and every gradient, of a model without a head."""
    params, source = read(tree, model), np.where(inside, SOURCE, PADDING)
    target = params.target or params.source
    x, of_x = embed_forward(source, params.source, config)
    memory, of_memory = encoder_forward(x, params.encoder, config, mask=keys(inside))
    t, of_t = embed_forward(TARGET, target._replace(table=params.source.table), config)
    y, of_y = decoder_forward(t, memory, params.decoder, config, cross_mask=keys(inside))
    ids = {"input_ids": source, "attention_mask": inside.astype(int), "decoder_input_ids": TARGET}
    out = model(**{name: torch.tensor(x) for name, x in ids.items()})
    assert_same(memory, out.encoder_last_hidden_state.detach().numpy())
    assert_same(y, out.last_hidden_state.detach().numpy())
    dy, dmemory = RNG.standard_normal(y.shape), RNG.standard_normal(memory.shape)
    sums = [(a * torch.tensor(b)).sum() for a, b in ((out.last_hidden_state, dy), (out.encoder_last_hidden_state, dmemory))]
    sum(sums).backward()
    decoder = decoder_backward(dy, of_y)
    encoder = encoder_backward(dmemory + decoder.memory, of_memory)
    of_source, of_target = embed_backward(encoder.x, of_x).params, embed_backward(decoder.x, of_t).params
    of_source = of_source._replace(table=of_source.table + of_target.table)
    grads = TransformerParams(of_source, encoder.params, decoder.params, params.target and of_target._replace(table=None))
    assert_same_gradients(grads, tree, model)


# --- T5 ----------------------------------------------------------------------------------------------------------------------


def t5(task, gated, buckets, distance):
    """A model, the tree of its parameters and its `Config`."""
    config = transformers.T5Config(
        vocab_size=V, d_model=M, d_kv=D, d_ff=F, num_layers=LAYERS, num_decoder_layers=LAYERS + 1, num_heads=H,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=distance, pad_token_id=PADDING,
        feed_forward_proj="gated-gelu" if gated else "relu", layer_norm_epsilon=1e-3, scale_decoder_outputs=True,
        decoder_start_token_id=PADDING)  # fmt: skip

    def attention(get, name):
        return multi_head(get, [f"{name}.{x}" for x in "qkvo"], bias=False)

    def feed_forward(get, p):
        first, out = (linear(get, f"{p}DenseReluDense.{x}", bias=False).w for x in ("wi_1" if gated else "wi", "wo"))
        return FeedForwardParams(first, out, w_gate=linear(get, f"{p}DenseReluDense.wi_0", bias=False).w if gated else None)

    def block(get, stack, number):
        p = f"{stack}.block.{number}.layer."
        parts = [attention(get, f"{p}0.SelfAttention"), norm(get, f"{p}0.layer_norm", bias=False)]
        if stack == "decoder":
            parts += [attention(get, f"{p}1.EncDecAttention"), norm(get, f"{p}1.layer_norm", bias=False)]
        last = f"{p}{len(parts) // 2}."
        parts += [feed_forward(get, last), norm(get, f"{last}layer_norm", bias=False)]
        return (DecoderBlockParams if stack == "decoder" else EncoderBlockParams)(*parts)

    def stack(get, name, cls, layers):
        bias = get(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        blocks = tuple(block(get, name, number) for number in range(layers))
        return cls(blocks, norm(get, f"{name}.final_layer_norm", bias=False), bias)

    def tree(get):
        stacks = stack(get, "encoder", EncoderParams, LAYERS), stack(get, "decoder", DecoderParams, LAYERS + 1)
        return TransformerParams(EmbedParams(get("shared.weight")), *stacks)

    mine = Config(H, norm="rms", norm_eps=1e-3, activation="gelu_tanh" if gated else "relu", scale=1.0,
                  relative=Relative(buckets, distance), head_scale=M**-0.5)  # fmt: skip
    model = made(getattr(transformers, task), config)
    for module in model.modules():
        if type(module).__name__ == "T5LayerNorm":  # it takes the mean square in float32, whatever the dtype
            module.forward = partial(torch.nn.functional.rms_norm, normalized_shape=(M,), weight=module.weight, eps=1e-3)
    return model, tree, mine


@SIDE
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("buckets", "distance"), [(6, 8), (32, 128)])
def test_t5(gated, buckets, distance, side):
    check_stacks(*t5("T5Model", gated, buckets, distance), SIDES[side])
    check(*t5("T5ForConditionalGeneration", gated, buckets, distance), SIDES[side])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 64), (32, 17), (6, 8), (8, 16), (4, 3), (33, 129)])
def test_the_buckets_are_those_of_t5(buckets, distance, causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-2000, 2001)
    given = {"bidirectional": not causal, "num_buckets": buckets, "max_distance": distance}
    want = T5Attention._relative_position_bucket(torch.tensor(distances), **given).numpy()
    found = Relative(buckets, distance).of(distances, causal=causal)
    assert np.array_equal(found, want)


# --- BART and Marian ---------------------------------------------------------------------------------------------------------


def bart(family, task, activation="gelu", scaled=False):
    """A model, the tree of its parameters and its `Config`. Marian has sinusoids where BART has positions and a norm."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=V, d_model=M, encoder_layers=LAYERS, decoder_layers=LAYERS + 1, encoder_attention_heads=H,
        decoder_attention_heads=H, encoder_ffn_dim=F, decoder_ffn_dim=F, max_position_embeddings=9, pad_token_id=PADDING,
        decoder_start_token_id=PADDING, eos_token_id=0, activation_function=activation, scale_embedding=scaled)  # fmt: skip
    prefix = "" if task == "Model" else "model."

    def attention(get, name):
        return multi_head(get, [f"{name}.{x}" for x in ("q_proj", "k_proj", "v_proj", "out_proj")])

    def block(get, stack, number):
        p = f"{prefix}{stack}.layers.{number}."
        parts = [attention(get, f"{p}self_attn"), norm(get, f"{p}self_attn_layer_norm")]
        if stack == "decoder":
            parts += [attention(get, f"{p}encoder_attn"), norm(get, f"{p}encoder_attn_layer_norm")]
        (w_in, b_in), (w_out, b_out) = linear(get, f"{p}fc1"), linear(get, f"{p}fc2")
        parts += [FeedForwardParams(w_in, w_out, b_in, b_out), norm(get, f"{p}final_layer_norm")]
        return (DecoderBlockParams if stack == "decoder" else EncoderBlockParams)(*parts)

    def embed(get, stack, table):
        p = f"{prefix}{stack}."
        return EmbedParams(table, get(f"{p}embed_positions.weight"), norm(get, f"{p}layernorm_embedding"))

    def tree(get):
        table = get(f"{prefix}shared.weight")
        encoder = EncoderParams(tuple(block(get, "encoder", number) for number in range(LAYERS)))
        decoder = DecoderParams(tuple(block(get, "decoder", number) for number in range(LAYERS + 1)))
        if family == "Marian":
            return TransformerParams(EmbedParams(table), encoder, decoder)
        return TransformerParams(embed(get, "encoder", table), encoder, decoder, embed(get, "decoder", None))

    positions = {"sinusoidal": "half"} if family == "Marian" else {"first_position": 2}
    mine = Config(H, pre_norm=False, activation={"swish": "silu"}.get(activation, activation),
                  embedding_scale=M**0.5 if scaled else 1.0, **positions)  # fmt: skip
    return made(getattr(transformers, f"{family}{task}"), config), tree, mine


@SIDE
@pytest.mark.parametrize(("activation", "scaled"), [("gelu", False), ("relu", True)])
def test_bart(activation, scaled, side):
    check_stacks(*bart("Bart", "Model", activation, scaled), SIDES[side])
    check(*bart("Bart", "ForConditionalGeneration", activation, scaled), SIDES[side])


def sines(positions, width):
    """Marian's positions in float64, element by element: sines in the first half, cosines in the second."""
    angles = np.array([[p / 10000 ** (2 * i / width) for i in range(width // 2)] for p in range(positions)])
    return np.concatenate([np.vectorize(math.sin)(angles), np.vectorize(math.cos)(angles)], -1)


@SIDE
@pytest.mark.parametrize(("activation", "scaled"), [("swish", True), ("relu", False)])
def test_marian(activation, scaled, side):
    for task, compare in (("Model", check_stacks), ("MTModel", check)):
        model, tree, config = bart("Marian", task, activation, scaled)
        for stack in (model.get_encoder(), model.get_decoder()):
            table = stack.embed_positions.weight
            table.copy_(torch.tensor(sines(*table.shape)))  # made above from random numbers
        compare(model, tree, config, SIDES[side])


def test_the_sinusoids_of_marian():
    """transformers rounds them to float32."""
    embedding = transformers.models.marian.modeling_marian.MarianSinusoidalPositionalEmbedding(50, M)
    table = embedding.create_weight().numpy()
    assert_close(sinusoidal(np.arange(50), M, layout="half"), table, 1, dtype=np.float32)
    assert_close(sinusoidal(np.arange(50), M, layout="half"), sines(50, M), 50)
