"""torch in float64 with autograd: scaled_dot_product_attention, nn.MultiheadAttention, nn.RNN, npattn's equations."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")

from torch.nn.attention import SDPBackend, sdpa_kernel

import npattn as na
from npattn.convert import (
    gru_from_torch,
    gru_to_torch,
    lstm_from_torch,
    lstm_to_torch,
    multi_head_from_torch,
    multi_head_to_torch,
    rnn_from_torch,
    rnn_to_torch,
)
from npattn.ops.multihead import IMPLEMENTATIONS as PAIRS
from npattn.tolerances import GRADCHECK_EPS
from peers.agree import agree, attention_terms, multi_head_terms, rnn_terms, summed_to

B, H, G, L, S, D, E = 2, 6, 3, 5, 7, 4, 3


def normal(rng, *shape):
    return rng.standard_normal(shape)


def leaf(x):
    return None if x is None else torch.tensor(x, requires_grad=True)


# --- scaled_dot_product_attention -----------------------------------------------------------------------------------


def sdpa_case(*, q=(B, H, L, D), k=(B, H, S, D), E=None, **options):
    return q, k, (*k[:-1], E or k[-1]), options


def allowed(*shape):
    """A boolean mask in which query 1 may see no key, and the others some."""
    mask = np.random.default_rng(7).random(shape) < 0.6
    mask[..., 0] = True
    mask[..., 1, :] = False
    return mask


SDPA = {
    "plain": sdpa_case(),
    "rank_2": sdpa_case(q=(L, D), k=(S, D)),
    "rank_3": sdpa_case(q=(H, L, D), k=(H, S, D)),
    "E_differs": sdpa_case(E=E),
    "one_query": sdpa_case(q=(B, H, 1, D)),
    "bool_mask": sdpa_case(mask=allowed(L, S)),
    "bool_mask_of_each_sequence": sdpa_case(mask=allowed(B, 1, L, S)),
    "bool_mask_of_each_head": sdpa_case(mask=allowed(B, H, L, S), E=E),
    "bool_mask_rank_3": sdpa_case(q=(H, L, D), k=(H, S, D), mask=allowed(H, L, S)),
    "bias": sdpa_case(bias=(L, S)),
    "bias_of_each_sequence": sdpa_case(bias=(B, 1, L, S)),
    "bias_of_each_head": sdpa_case(bias=(1, H, 1, S), E=E),
    "bias_rank_3": sdpa_case(q=(H, L, D), k=(H, S, D), bias=(H, 1, S)),
    "bias_of_each_query": sdpa_case(bias=(L, 1)),  # shifts whole rows: its gradient is 0
    "bias_of_minus_inf": sdpa_case(bias=(B, 1, L, S), minus_inf=True),
    "causal": sdpa_case(k=(B, H, L, D), causal=True),
    "causal_more_keys": sdpa_case(causal=True),
    "causal_more_queries": sdpa_case(q=(B, H, S, D), k=(B, H, L, D), causal=True),
    "causal_rank_3": sdpa_case(q=(H, L, D), k=(H, S, D), causal=True),
    "scale": sdpa_case(scale=0.7),
    "scale_negative": sdpa_case(scale=-0.3, mask=allowed(L, S)),
    "scale_zero": sdpa_case(scale=0.0),
    "grouped": sdpa_case(k=(B, G, S, D), gqa=True),
    "one_group": sdpa_case(k=(B, 1, S, D), gqa=True, E=E),
    "grouped_mask": sdpa_case(k=(B, G, S, D), gqa=True, mask=allowed(B, H, L, S), scale=1.5),
    "grouped_bias": sdpa_case(k=(B, G, S, D), gqa=True, bias=(B, H, L, S), E=E),
    "grouped_causal": sdpa_case(k=(B, G, S, D), gqa=True, causal=True),
}


def compare_sdpa(q, k, v, bias, dout, torch_out, leaves, options, pair, zero):
    """One pair against torch's output and the gradients in the leaves."""
    forward, backward = PAIRS[pair]
    out, cache = forward(q, k, v, bias=bias, **options)
    grads = backward(dout, cache)
    _, dense = na.attention_forward(q, k, v, bias=bias, **options)
    terms = attention_terms(dense, dout, bias=0.0 if bias is None else bias)
    agree("out", out, torch_out, terms.out)
    for name in "qkv":
        agree(f"d{name}", getattr(grads, name), leaves[name].grad, getattr(terms, name), zero=name in zero)
    if bias is not None:
        agree("dbias", grads.bias, leaves["bias"].grad, summed_to(terms.scores, bias.shape), zero="bias" in zero)
    return out, grads


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kernel", ["torch's choice", "math"])
@pytest.mark.parametrize("name", SDPA)
def test_scaled_dot_product_attention(name, kernel, pair):
    shape_q, shape_k, shape_v, case = SDPA[name]
    rng = np.random.default_rng(list(SDPA).index(name))
    q, k, v, dout = (normal(rng, *shape) for shape in (shape_q, shape_k, shape_v, (*shape_q[:-1], shape_v[-1])))
    bias = normal(rng, *case["bias"]) if "bias" in case else None
    if case.get("minus_inf"):
        bias[~allowed(*bias.shape)] = -np.inf
    leaves = {name: leaf(x) for name, x in {"q": q, "k": k, "v": v, "bias": bias}.items()}
    mask = leaves["bias"] if "mask" not in case else torch.tensor(case["mask"])
    with sdpa_kernel(list(SDPBackend.__members__.values()) if kernel != "math" else [SDPBackend.MATH]):
        expected = torch.nn.functional.scaled_dot_product_attention(
            leaves["q"], leaves["k"], leaves["v"], attn_mask=mask, is_causal=case.get("causal", False),
            scale=case.get("scale"), enable_gqa=case.get("gqa", False),
        )  # fmt: skip
        expected.backward(torch.tensor(dout))

    options = {key: case[key] for key in ("mask", "scale") if key in case}
    if case.get("causal"):
        options["mask"] = na.causal(align="top_left")
    zero = {"scale_zero": ("q", "k"), "bias_of_each_query": ("bias",)}.get(name, ())
    out, grads = compare_sdpa(q, k, v, bias, dout, expected, leaves, options, pair, zero)
    if "mask" in case or case.get("minus_inf"):  # query 1 sees nothing
        assert not out[..., 1, :].any()
        assert not grads.q[..., 1, :].any()


def torch_samples():
    """torch's own samples of scaled_dot_product_attention, those without dropout."""
    pytest.importorskip("expecttest", reason="torch's samples need it: pip install --no-deps expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    return [sample for sample in samples if not sample.kwargs.get("dropout_p")]


@pytest.mark.parametrize("pair", PAIRS)
def test_samples_of_torch(pair):
    samples = torch_samples()
    assert len(samples) >= 13
    for i, sample in enumerate(samples):
        tensors = dict(zip("qkv", (sample.input, *sample.args), strict=True))
        options = {"mask": na.causal(align="top_left")} if sample.kwargs["is_causal"] else {}
        bias = sample.kwargs.get("attn_mask")
        tensors |= {} if bias is None else {"bias": bias}
        expected = torch.nn.functional.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
        dout = normal(np.random.default_rng(i), *expected.shape)
        grads = torch.autograd.grad(expected, list(tensors.values()), torch.tensor(dout))
        leaves = dict(zip(tensors, (SimpleNamespace(grad=g) for g in grads), strict=True))
        q, k, v = (tensors[x].detach().numpy() for x in "qkv")
        if q.ndim < k.ndim:  # torch broadcasts q over sequences; npattn is given the view, and its gradient is summed
            lead = k.shape[: k.ndim - q.ndim]
            view = np.broadcast_to(q, lead + q.shape)
            out, cache = PAIRS[pair][0](view, k, v, **options)
            got = PAIRS[pair][1](dout, cache)
            terms = attention_terms(na.attention_forward(view, k, v, **options)[1], dout)
            agree(f"sample {i}: out", out, expected, terms.out)
            agree(f"sample {i}: dq", got.q.sum(0), leaves["q"].grad, terms.q.sum(0))
            agree(f"sample {i}: dk", got.k, leaves["k"].grad, terms.k)
            agree(f"sample {i}: dv", got.v, leaves["v"].grad, terms.v)
        else:
            bias = None if bias is None else bias.detach().numpy()
            compare_sdpa(q, k, v, bias, dout, expected, leaves, options, pair, ())


# --- npattn's equations in torch, all options at once ---------------------------------------------------------------

EQUATIONS = {
    "all": {"softcap", "bias", "mask", "sink", "dropout", "lse", "grouped"},
    "without_sink": {"softcap", "bias", "mask", "dropout", "lse"},
    "without_softcap": {"bias", "mask", "sink", "dropout", "lse", "grouped"},
    "sink_of_dead_rows": {"mask", "sink", "lse"},
    "lse_alone": {"mask", "lse", "no_dout"},
    "alibi": {"alibi", "mask", "softcap", "lse"},
    "relative_table": {"table", "mask", "sink"},
}


def equations(q, k, v, *, mask, bias, scale, softcap, sink, dropout):
    """(1) to (7) of npattn/ops/attention.py, and lse, with nothing left out: torch differentiates them."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = scale * q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).masked_fill(~mask, -torch.inf)
    logits = scores if sink is None else torch.cat([scores, sink[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    dead = (logits == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)[..., : scores.shape[-1]]
    lse = torch.logsumexp(logits.masked_fill(dead, 0.0), -1).masked_fill(dead[..., 0], -torch.inf)
    return weights * dropout @ v, lse


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_differentiated_by_torch(name, pair):
    has, rng = EQUATIONS[name], np.random.default_rng(5)
    groups = G if "grouped" in has else H
    q, k, v = normal(rng, B, H, L, D), normal(rng, B, groups, S, D), normal(rng, B, groups, S, E)
    dout = normal(rng, B, H, L, E) * ("no_dout" not in has)
    mask = allowed(B, 1, L, S)
    dropout = (rng.random((B, H, L, S)) > 0.3) / 0.7 if "dropout" in has else None
    sink = normal(rng, H) if "sink" in has else None
    dlse = normal(rng, B, H, L) if "lse" in has else None
    softcap, scale = 1.3 if "softcap" in has else None, 0.8
    bias = parameter = normal(rng, 1, H, L, S) if "bias" in has else None
    relative = np.arange(S) - np.arange(L)[:, None]
    buckets = np.clip(relative, -2, 3) + 2
    if "alibi" in has:
        parameter = na.alibi_slopes(H)
        bias = na.Alibi(parameter, align="top_left")
    if "table" in has:
        parameter = normal(rng, 6, H)
        bias = na.RelativeTable(parameter, lambda r: np.clip(r, -2, 3) + 2, align="top_left")

    names = {"q": q, "k": k, "v": v, "sink": sink, "bias": parameter, "scale": np.array(scale)}
    leaves = {key: leaf(x) for key, x in names.items()}
    dense = leaves["bias"] if "bias" in has else torch.zeros(())
    if "alibi" in has:
        dense = -leaves["bias"][:, None, None] * torch.tensor(np.abs(relative))
    if "table" in has:
        dense = leaves["bias"][torch.tensor(buckets)].permute(2, 0, 1)
    expected, lse = equations(
        *(leaves[key] for key in "qkv"), mask=torch.tensor(mask), bias=dense, scale=leaves["scale"], softcap=softcap,
        sink=leaves["sink"], dropout=torch.tensor(1.0 if dropout is None else dropout),
    )  # fmt: skip
    loss = (expected * torch.tensor(dout)).sum()
    if dlse is not None:
        loss = loss + (lse * torch.tensor(dlse))[lse != -torch.inf].sum()
    loss.backward()

    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink, "dropout_mask": dropout}
    forward, backward = PAIRS[pair]
    out, cache = forward(q, k, v, **options)
    grads = backward(dout, cache, dlse)
    _, plain = na.attention_forward(q, k, v, **options)
    terms = attention_terms(plain, dout, 0.0 if dlse is None else dlse[..., None], bias=dense.detach().numpy())
    agree("out", out, expected, terms.out)
    agree("lse", cache.lse, lse, terms.lse)
    for key in "qkv":
        zero = key == "v" and not dout.any()  # lse knows nothing of v
        agree(f"d{key}", getattr(grads, key), leaves[key].grad, getattr(terms, key), zero=zero)
    agree("dscale", grads.scale, leaves["scale"].grad, terms.scale)
    if sink is not None:
        agree("dsink", grads.sink, leaves["sink"].grad, terms.sink)
    if "bias" in has:
        agree("dbias", grads.bias, leaves["bias"].grad, summed_to(terms.scores, bias.shape))
    if "alibi" in has:
        slopes = (terms.scores * np.abs(relative)).sum((0, 2, 3))
        agree("dslopes", grads.bias.slopes, leaves["bias"].grad, slopes)
    if "table" in has:
        rows = [terms.scores[..., buckets == bucket].sum((0, 2)) for bucket in range(6)]
        agree("dtable", grads.bias.table, leaves["bias"].grad, np.stack(rows))


# --- nn.MultiheadAttention ------------------------------------------------------------------------------------------

M, KDIM, VDIM, HEADS = 12, 7, 5, 3
MULTI_HEAD = {
    "self": {"self"},
    "self_without_biases": {"self", "no_biases"},
    "cross": set(),
    "widths_differ": {"separate"},
    "widths_differ_without_biases": {"separate", "no_biases"},
    "sequence_first": {"sequence_first"},
    "unbatched": {"unbatched"},
    "padding": {"padding"},
    "padding_self": {"padding", "self"},
    "bool_mask": {"bool_mask"},
    "mask_of_each_head": {"mask_of_each_head", "separate"},
    "float_mask": {"float_mask"},
    "float_mask_of_each_head": {"float_mask_of_each_head"},
    "causal_and_padding": {"self", "causal", "padding"},
    "dead_rows": {"dead_rows"},
}


# A query without keys has NaN weights and output in torch where need_weights=True: another convention, not compared.
MULTI_HEAD_RUNS = [(name, need) for name in MULTI_HEAD for need in (False, True) if not (need and name == "dead_rows")]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("name", "need_weights"), MULTI_HEAD_RUNS)
def test_multihead_attention(name, need_weights, pair):
    has, rng = MULTI_HEAD[name], np.random.default_rng(list(MULTI_HEAD).index(name))
    torch.manual_seed(list(MULTI_HEAD).index(name))
    separate = {"kdim": KDIM, "vdim": VDIM} if "separate" in has else {}
    layer = torch.nn.MultiheadAttention(
        M, HEADS, bias="no_biases" not in has, batch_first="sequence_first" not in has, dtype=torch.float64, **separate
    )
    with torch.no_grad():  # torch starts biases at 0, which would hide them
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.tensor(normal(rng, *parameter.shape)))
    lead = () if "unbatched" in has else (B,)
    x_q = normal(rng, *lead, L, M)
    x_k, x_v = normal(rng, *lead, S, separate.get("kdim", M)), normal(rng, *lead, S, separate.get("vdim", M))
    keys, shape = (L if "self" in has else S), (*lead, HEADS, L)
    padding = np.arange(keys) >= np.array([[keys - 2], [keys]]) if "padding" in has else None  # True = dropped
    mask, bias = None, None
    if "bool_mask" in has or "dead_rows" in has:
        mask = allowed(L, keys)
        mask[1] |= "dead_rows" not in has
    if "mask_of_each_head" in has:
        mask = allowed(B, HEADS, L, keys)
        mask[..., 1, 2] = True
    if "causal" in has:
        mask = np.tri(L, keys, dtype=bool)
    if "float_mask" in has:
        bias = normal(rng, L, keys)
        bias[2, 1] = -np.inf
    if "float_mask_of_each_head" in has:
        bias = normal(rng, B, HEADS, L, keys)

    # torch: True = dropped, one leading axis for sequences and heads, and masks of one kind
    leaves = {"x_q": leaf(x_q)}
    leaves |= {key: leaves["x_q"] if "self" in has else leaf(x) for key, x in (("x_k", x_k), ("x_v", x_v))}
    torch_bias = leaf(bias)
    attn_mask = torch_bias if mask is None else torch.tensor(~mask)
    if attn_mask is not None and attn_mask.ndim == 4:
        attn_mask = attn_mask.flatten(0, 1)

    def turned(x):
        return x.transpose(0, 1) if "sequence_first" in has else x

    expected, weights = layer(
        *(turned(leaves[key]) for key in ("x_q", "x_k", "x_v")), attn_mask=attn_mask, need_weights=need_weights,
        key_padding_mask=None if padding is None else torch.tensor(padding), average_attn_weights=False,
    )  # fmt: skip
    dout = normal(rng, *lead, L, M)
    turned(expected).backward(torch.tensor(dout))

    if padding is not None:
        mask = na.keys(~padding) if mask is None else na.keys(~padding) & mask
    params = multi_head_from_torch(layer.state_dict())
    inputs = (x_q, x_q, x_q) if "self" in has else (x_q, x_k, x_v)
    out, cache = na.multi_head_forward(*inputs, params, HEADS, mask=mask, bias=bias, implementation=pair)
    grads = na.multi_head_backward(dout, cache)
    _, dense = na.multi_head_forward(*inputs, params, HEADS, mask=mask, bias=bias)
    terms = multi_head_terms(dense, dout)
    agree("out", out, turned(expected), terms["out"])
    if need_weights:
        assert weights.shape == (*shape, keys)
        agree("weights", dense.attention.weights, weights, terms["weights"])
    if "self" in has:
        both = terms["x_q"] + terms["x_k"] + terms["x_v"]
        agree("dx", grads.x_q + grads.x_k + grads.x_v, leaves["x_q"].grad, both)
    else:
        for key in ("x_q", "x_k", "x_v"):
            agree(f"d{key}", getattr(grads, key), leaves[key].grad, terms[key])
    if bias is not None:
        agree("dbias", grads.bias, torch_bias.grad, summed_to(terms["scores"], bias.shape))
    got, bounds = multi_head_to_torch(grads.params), {key: terms[key] for key in na.MultiHeadParams._fields if key in terms}
    if "no_biases" in has:
        bounds = {key: None if key.startswith("b_") else x for key, x in bounds.items()}
    bounds = multi_head_to_torch(na.MultiHeadParams(**bounds))
    assert got.keys() == {key for key, _ in layer.named_parameters()}
    for key, parameter in layer.named_parameters():
        agree(f"d{key}", got[key], parameter.grad, bounds[key])
    if "dead_rows" in has:
        np.testing.assert_array_equal(out[:, 1], np.broadcast_to(params.b_o, out[:, 1].shape))


@pytest.mark.parametrize("pair", PAIRS)
def test_multihead_attention_fast_path(monkeypatch, pair):
    """torch's kernel for inference, which an even number of heads can take; need_weights gives their mean over heads."""
    native, calls = torch._native_multi_head_attention, []
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: calls.append(args) or native(*args))
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(M, 4, batch_first=True, dtype=torch.float64).eval()
    x = normal(np.random.default_rng(0), B, L, M)
    with torch.no_grad():
        expected, weights = layer(*[torch.tensor(x)] * 3)
    assert len(calls) == 1
    params = multi_head_from_torch(layer.state_dict())
    out, _ = na.multi_head_forward(x, x, x, params, 4, implementation=pair)
    _, dense = na.multi_head_forward(x, x, x, params, 4)
    terms = multi_head_terms(dense, np.zeros_like(out))
    agree("out", out, expected, terms["out"])
    agree("weights", dense.attention.weights.mean(1), weights, terms["weights"])


def test_multihead_parameters_come_back():
    torch.manual_seed(0)
    for separate in ({}, {"kdim": KDIM, "vdim": VDIM}):
        state = torch.nn.MultiheadAttention(M, HEADS, **separate).state_dict()
        back = multi_head_to_torch(multi_head_from_torch(state))
        assert back.keys() == state.keys()
        for key, x in state.items():
            np.testing.assert_array_equal(back[key], x)


# --- nn.RNN ---------------------------------------------------------------------------------------------------------

T, N = 6, 4
RNN = {
    "tanh": set(),
    "relu": {"relu"},
    "no_bias": {"no_bias"},
    "relu_no_bias": {"relu", "no_bias"},
    "h0": {"h0"},
    "lengths": {"lengths"},
    "lengths_h0": {"lengths", "h0"},
    "lengths_relu": {"lengths", "relu", "h0"},
}
LENGTHS = np.array([4, 6, 1])


def run_torch_rnn(layer, x, h0, lengths):
    """h (B, T, N directions) and h_last (layers directions, B, N), with leaves for x and h0."""
    x, h0 = leaf(x), leaf(h0)
    if lengths is None:
        h, last = layer(x, h0)
    else:
        pack, unpack = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
        h, last = layer(pack(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False), h0)
        h, _ = unpack(h, batch_first=True, total_length=x.shape[1])
    return x, h0, h, last


def compare_rnn_params(torch_layer, grads, terms, **which):
    got = rnn_to_torch(grads, gradients=True, **which)
    bounds = na.RNNParams(terms["w_x"], terms["w_h"], None if grads.b is None else terms["b"])
    for key, bound in rnn_to_torch(bounds, gradients=True, **which).items():
        agree(f"d{key}", got[key], torch_layer.get_parameter(key).grad, bound)
    return set(got)


def torch_rnn(has, **options):
    torch.manual_seed(3)
    return torch.nn.RNN(
        M, N, nonlinearity="relu" if "relu" in has else "tanh", bias="no_bias" not in has, batch_first=True,
        dtype=torch.float64, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", RNN)
def test_rnn(name):
    has, rng = RNN[name], np.random.default_rng(list(RNN).index(name))
    layer, lengths = torch_rnn(has), LENGTHS if "lengths" in has else None
    x, dh, dh_last = normal(rng, 3, T, M), normal(rng, 3, T, N), normal(rng, 3, N)
    h0 = normal(rng, 3, N) if "h0" in has else None
    torch_x, torch_h0, expected, last = run_torch_rnn(layer, x, None if h0 is None else h0[None], lengths)
    ((expected * torch.tensor(dh)).sum() + (last[0] * torch.tensor(dh_last)).sum()).backward()

    if lengths is not None:
        x[np.arange(T) >= lengths[:, None]] = np.nan  # what lies behind the end reaches nothing
    nonlinearity = "relu" if "relu" in has else "tanh"
    h, cache = na.rnn_forward(x, h0, rnn_from_torch(layer.state_dict()), lengths=lengths, nonlinearity=nonlinearity)
    grads, terms = na.rnn_backward(dh, cache, dh_last), rnn_terms(cache, dh, dh_last)
    agree("h", h, expected, terms["h"])
    agree("h_last", cache.h_last, last[0], terms["h_last"])
    agree("dx", grads.x, torch_x.grad, terms["x"])
    if h0 is not None:
        agree("dh0", grads.h0, torch_h0.grad[0], terms["h0"])
    assert compare_rnn_params(layer, grads.params, terms) == {key for key, _ in layer.named_parameters()}


def turned_in_time(x, lengths):
    """Each sequence backwards within its length, padding where it was."""
    t = np.arange(x.shape[1])
    order = np.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)
    return np.take_along_axis(x, order[..., None], 1)


@pytest.mark.parametrize("lengths", [np.array([T, T, T]), LENGTHS], ids=["full", "lengths"])
def test_directions_of_a_bidirectional_rnn(lengths):
    rng, layer = np.random.default_rng(1), torch_rnn(set(), bidirectional=True)
    x, h0, dh, dh_last = normal(rng, 3, T, M), normal(rng, 2, 3, N), normal(rng, 3, T, 2 * N), normal(rng, 2, 3, N)
    torch_x, torch_h0, expected, last = run_torch_rnn(layer, x, h0, lengths)
    ((expected * torch.tensor(dh)).sum() + (last * torch.tensor(dh_last)).sum()).backward()
    dx, dx_terms, seen = 0.0, 0.0, set()
    for direction, reverse in enumerate((False, True)):
        half = slice(direction * N, (direction + 1) * N)
        turn = (lambda a: turned_in_time(a, lengths)) if reverse else (lambda a: a)
        params, d = rnn_from_torch(layer.state_dict(), reverse=reverse), turn(dh[..., half])
        h, cache = na.rnn_forward(turn(x), h0[direction], params, lengths=lengths)
        grads, terms = na.rnn_backward(d, cache, dh_last[direction]), rnn_terms(cache, d, dh_last[direction])
        agree("h", turn(h), expected[..., half], terms["h"])
        agree("h_last", cache.h_last, last[direction], terms["h_last"])
        agree("dh0", grads.h0, torch_h0.grad[direction], terms["h0"])
        seen |= compare_rnn_params(layer, grads.params, terms, reverse=reverse)
        dx, dx_terms = dx + turn(grads.x), dx_terms + turn(terms["x"])
    agree("dx", dx, torch_x.grad, dx_terms)
    assert seen == {key for key, _ in layer.named_parameters()}


def test_layers_of_a_deep_rnn():
    rng, layer = np.random.default_rng(2), torch_rnn(set(), num_layers=2)
    x, h0, dh, dh_last = normal(rng, 3, T, M), normal(rng, 2, 3, N), normal(rng, 3, T, N), normal(rng, 2, 3, N)
    torch_x, torch_h0, expected, last = run_torch_rnn(layer, x, h0, LENGTHS)
    ((expected * torch.tensor(dh)).sum() + (last * torch.tensor(dh_last)).sum()).backward()
    p0, p1 = (rnn_from_torch(layer.state_dict(), layer=i) for i in (0, 1))
    h_0, cache_0 = na.rnn_forward(x, h0[0], p0, lengths=LENGTHS)
    h_1, cache_1 = na.rnn_forward(h_0, h0[1], p1, lengths=LENGTHS)
    grads_1 = na.rnn_backward(dh, cache_1, dh_last[1])
    grads_0 = na.rnn_backward(grads_1.x, cache_0, dh_last[0])
    terms_1 = rnn_terms(cache_1, dh, dh_last[1], x=rnn_terms(cache_0, dh, dh_last[0])["h"])
    terms_0 = rnn_terms(cache_0, terms_1["x"], dh_last[0])
    agree("h", h_1, expected, terms_1["h"])
    agree("dx", grads_0.x, torch_x.grad, terms_0["x"])
    for i, (cache, grads, terms) in enumerate([(cache_0, grads_0, terms_0), (cache_1, grads_1, terms_1)]):
        agree("h_last", cache.h_last, last[i], terms["h_last"])
        agree("dh0", grads.h0, torch_h0.grad[i], terms["h0"])
        assert compare_rnn_params(layer, grads.params, terms, layer=i)


def test_rnn_parameters_come_back():
    params = rnn_from_torch(torch_rnn(set(), num_layers=2, bidirectional=True).state_dict(), layer=1, reverse=True)
    back = rnn_from_torch(rnn_to_torch(params, layer=1, reverse=True), layer=1, reverse=True)
    for x, y in zip(params, back, strict=True):
        np.testing.assert_array_equal(x, y)


# --- nn.GRU and nn.LSTM ---------------------------------------------------------------------------------------------

GATED = {
    "gru": (torch.nn.GRU, gru_from_torch, gru_to_torch, na.gru_forward, na.gru_backward, 1),
    "lstm": (torch.nn.LSTM, lstm_from_torch, lstm_to_torch, na.lstm_forward, na.lstm_backward, 2),
}


def in_both_directions(op, x, firsts, state, layer, lengths):
    """One layer of a bidirectional nn.GRU or nn.LSTM. firsts : h0, or h0 and c0, each (directions, B, N)"""
    _, from_torch, _, forward, *_ = GATED[op]
    hs, caches = [], []
    for reverse in (False, True):
        given = na.reversed_steps(x, lengths) if reverse else x
        params = from_torch(state, layer=layer, reverse=reverse)
        h, cache = forward(given, *(s[int(reverse)] for s in firsts), params, lengths=lengths)
        hs.append(na.reversed_steps(h, lengths) if reverse else h)
        caches.append(cache)
    return np.concatenate(hs, -1), caches


def in_both_directions_backward(op, dh, lasts, caches, layer, lengths):
    """dx, the gradients of the first states, and the state dict of gradients."""
    _, _, to_torch, _, backward, _ = GATED[op]
    dx, firsts, state, halves = 0.0, [], {}, np.split(dh, 2, -1)
    for reverse, (d, cache) in enumerate(zip(halves, caches, strict=True)):
        g = backward(na.reversed_steps(d, lengths) if reverse else d, cache, *(s[reverse] for s in lasts))
        dx = dx + (na.reversed_steps(g.x, lengths) if reverse else g.x)
        firsts.append([getattr(g, name) for name in ("h0", "c0")[: len(lasts)]])
        options = {"gradients": True} if op == "lstm" else {}
        state |= to_torch(g.params, layer=layer, reverse=bool(reverse), **options)
    return dx, [np.stack(s) for s in zip(*firsts, strict=True)], state


@pytest.mark.parametrize("lengths", [np.array([T, T, T]), LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", GATED)
def test_two_layers_in_both_directions(op, bias, lengths):
    make, *_, states = GATED[op]
    rng = np.random.default_rng(5)
    torch.manual_seed(3)
    layers = make(M, N, num_layers=2, bidirectional=True, bias=bias, batch_first=True, dtype=torch.float64)
    x, dh = normal(rng, 3, T, M), normal(rng, 3, T, 2 * N)
    firsts, lasts = ([normal(rng, 4, 3, N) for _ in range(states)] for _ in range(2))  # (layers directions, B, N)
    leaves = [leaf(s) for s in firsts]
    start = leaves[0] if states == 1 else tuple(leaves)
    torch_x, pack, unpack = leaf(x), torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
    h, last = layers(pack(torch_x, torch.tensor(lengths), batch_first=True, enforce_sorted=False), start)
    h, _ = unpack(h, batch_first=True, total_length=T)
    last = (last,) if states == 1 else last
    ((h * torch.tensor(dh)).sum() + sum((y * torch.tensor(d)).sum() for y, d in zip(last, lasts, strict=True))).backward()

    state = layers.state_dict()
    x[np.arange(T) >= lengths[:, None]] = np.nan  # what lies behind the end reaches nothing
    h1, caches1 = in_both_directions(op, x, [s[:2] for s in firsts], state, 0, lengths)
    h2, caches2 = in_both_directions(op, h1, [s[2:] for s in firsts], state, 1, lengths)
    dh1, firsts2, grads = in_both_directions_backward(op, dh, [s[2:] for s in lasts], caches2, 1, lengths)
    dx, firsts1, more = in_both_directions_backward(op, dh1, [s[:2] for s in lasts], caches1, 0, lengths)
    grads |= more
    want = {"h": h, "dx": torch_x.grad, **{name: p.grad for name, p in layers.named_parameters()}}
    got = {"h": h2, "dx": dx, **grads}
    for n, name in enumerate(("h", "c")[:states]):
        want |= {f"{name}_last": last[n], f"d{name}0": leaves[n].grad}
        got[f"{name}_last"] = np.stack([getattr(c, f"{name}_last") for c in (*caches1, *caches2)])
        got[f"d{name}0"] = np.concatenate([firsts1[n], firsts2[n]])
    assert got.keys() == want.keys()
    for name, y in got.items():
        expected = want[name].detach().numpy()
        # gradcheck's rule for recurrences: relative to the largest element
        assert np.abs(y - expected).max() <= GRADCHECK_EPS * np.finfo(float).eps * np.abs(expected).max(), name
