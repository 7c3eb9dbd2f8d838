"""Small random models of transformers in float64: q, k and v of each attention call go to npattn, and the results agree.

Only models that compute their softmax in float64 too: Llama, Gemma 2, Bloom and most others compute it in float32,
whatever the dtype, and are no oracle. transformers fills with finfo.min and not -inf: here every query has a key.
"""

import numpy as np
import pytest
from helpers import assert_close

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")

from transformers.models.bloom import modeling_bloom
from transformers.models.gemma import modeling_gemma
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.t5 import modeling_t5

import npattn as na
from npattn.convert import norm_from_torch
from npattn.ops.multihead import IMPLEMENTATIONS as PAIRS
from peers.agree import agree, attention_terms

PADDING = np.arange(9) < np.array([[9], [5]])  # (B, S), True = a token


def recorded(monkeypatch, modeling, model, *args, **inputs):
    """What each attention call of one run was given and gave, after a backward through the whole model."""
    calls, eager = [], modeling.eager_attention_forward

    def attention(module, q, k, v, mask, **options):
        out, weights = eager(module, q, k, v, mask, **options)
        for x in (q, k, v, out):
            x.retain_grad()
        calls.append((module, q, k, v, out, weights))
        return out, weights

    monkeypatch.setattr(modeling, "eager_attention_forward", attention)
    hidden = model.double().eval()(*args, **inputs).last_hidden_state
    hidden.backward(torch.tensor(np.random.default_rng(0).standard_normal(hidden.shape)))
    return calls


def compare(call, pair, *, dense_bias=0.0, **options):
    """One recorded call; returns npattn's gradients and the terms."""
    _, q, k, v, expected, weights = call
    arrays, dout = [x.detach().numpy() for x in (q, k, v)], expected.grad.numpy().swapaxes(1, 2)
    out, cache = PAIRS[pair][0](*arrays, **options)
    grads = PAIRS[pair][1](dout, cache)
    _, dense = na.attention_forward(*arrays, **options)
    terms = attention_terms(dense, dout, bias=dense_bias)
    agree("weights", dense.weights, weights, terms.weights)
    agree("out", out.swapaxes(1, 2), expected, terms.out)
    for name, x in (("q", q), ("k", k), ("v", v)):
        agree(f"d{name}", getattr(grads, name), x.grad, getattr(terms, name))
    return grads, terms


@pytest.mark.parametrize("pair", PAIRS)
def test_t5(monkeypatch, pair):
    """Relative tables (two directions in the encoder, one in the decoder), no scale, padding, causal and cross."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=5, d_ff=16, num_heads=3, num_layers=1, num_decoder_layers=1,
        initializer_factor=2.0, relative_attention_num_buckets=8, relative_attention_max_distance=6,
        attn_implementation="eager",
    )  # fmt: skip
    calls = recorded(
        monkeypatch, modeling_t5, transformers.T5Model(config), input_ids=torch.randint(1, 30, (2, 9)),
        decoder_input_ids=torch.randint(1, 30, (2, 7)), attention_mask=torch.tensor(PADDING), use_cache=False,
    )  # fmt: skip
    masks = (na.keys(PADDING), na.causal(), na.keys(PADDING))
    assert len(calls) == len(masks)
    for call, mask, has_table in zip(calls, masks, (True, True, False), strict=True):
        module, L = call[0], call[1].shape[2]
        if not has_table:
            compare(call, pair, mask=mask, scale=1.0)
            continue

        def buckets(relative, both=not module.is_decoder):
            relative = torch.from_numpy(np.ascontiguousarray(relative))
            return modeling_t5.T5Attention._relative_position_bucket(relative, both, 8, 6).numpy()

        table = module.relative_attention_bias.weight
        bias = na.RelativeTable(table.detach().numpy(), buckets)
        pairs = buckets(np.arange(L) - np.arange(L)[:, None])
        dense = bias.table[pairs].transpose(2, 0, 1)
        grads, terms = compare(call, pair, dense_bias=dense, bias=bias, mask=mask, scale=1.0)
        rows = [terms.scores[..., pairs == bucket].sum((0, 2)) for bucket in range(8)]
        agree("dtable", grads.bias.table, table.grad, np.stack(rows))


@pytest.mark.parametrize("pair", PAIRS)
def test_gpt_oss(monkeypatch, pair):
    """Sinks, grouped heads, causal, padding, and a window in one layer: W keys are window(W - 1, None)."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, head_dim=6, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1, sliding_window=3, initializer_range=0.5,
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    calls = recorded(
        monkeypatch, modeling_gpt_oss, transformers.GptOssModel(config), input_ids=torch.randint(1, 30, (2, 9)),
        attention_mask=torch.tensor(PADDING), use_cache=False,
    )  # fmt: skip
    whole = na.causal() & na.keys(PADDING)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    for call, mask in zip(calls, (whole & na.window(2, None), whole), strict=True):
        sinks = call[0].sinks
        grads, terms = compare(call, pair, mask=mask, sink=sinks.detach().numpy())
        agree("dsink", grads.sink, sinks.grad, terms.sink)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("heads", [4, 6, 8])  # Bloom has slopes in float32, which holds these
def test_alibi_of_bloom(heads, pair):
    """Bloom adds slope * j where npattn adds -slope * |i - j|: the same under a causal mask, but for a shift of rows."""
    L, rng = 9, np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 2, heads, L, 5))
    alibi = modeling_bloom.build_alibi_tensor(torch.ones(1, L), heads, torch.float64)
    np.testing.assert_array_equal(na.alibi_slopes(heads), alibi[:, 0, 1])
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    mask = alibi.masked_fill(~torch.ones(L, L, dtype=torch.bool).tril(), -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask)
    expected.backward(torch.tensor(dout))
    options = {"bias": na.Alibi(na.alibi_slopes(heads)), "mask": na.causal()}
    out, cache = PAIRS[pair][0](q, k, v, **options)
    grads = PAIRS[pair][1](dout, cache)
    terms = attention_terms(na.attention_forward(q, k, v, **options)[1], dout, bias=alibi.numpy())
    agree("out", out, expected, terms.out)
    for name, x in zip("qkv", leaves, strict=True):
        agree(f"d{name}", getattr(grads, name), x.grad, getattr(terms, name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "gemma"])
def test_norms_from_their_state_dict(kind, dtype):
    """Gemma keeps g - 1. Of bfloat16, in which weights come, the array is float32."""
    M, rng = 7, np.random.default_rng(0)
    make = {"layer_norm": torch.nn.LayerNorm, "rms_norm": torch.nn.RMSNorm, "gemma": modeling_gemma.GemmaRMSNorm}[kind]
    theirs, x = make(M, eps=0.01), rng.standard_normal((3, M)).astype(np.float32)
    state = {n: torch.tensor(rng.standard_normal(M)).to(getattr(torch, dtype)) for n in theirs.state_dict()}
    theirs.load_state_dict(state)
    params = norm_from_torch(state, plus_one=kind == "gemma")
    want = theirs(torch.tensor(x)).detach().numpy()
    got = (na.layer_norm if kind == "layer_norm" else na.rms_norm)(x, params, eps=0.01)
    terms = np.abs(x) + (np.abs(x).mean(-1, keepdims=True) if kind == "layer_norm" else 0)  # of c; r is as exact
    r = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) - (x.mean(-1, keepdims=True) ** 2 if kind == "layer_norm" else 0))
    assert_close(got, want, terms * r * np.abs(params.g) + (0 if params.b is None else np.abs(params.b)))
