"""Encoders and their heads: every gradient, and pooling, spans and packed texts against loops."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close, check_model, first, leaves
from oracles import norm_loops
from test_blocks import B, M, dropped, encoder_dropout, encoder_params, gelu, map_leaves, norm, normal

import npattn
from npattn import LinearParams
from npattn.models.config import Config
from npattn.models.encoders import (
    EncoderModelParams,
    MaskedHeadParams,
    TextHeadParams,
    best_span,
    encoder_model_backward,
    encoder_model_forward,
    masked_head_backward,
    masked_head_forward,
    span_loss_backward,
    span_loss_forward,
    text_head_backward,
    text_head_forward,
)
from npattn.models.transformer import EmbedParams, EncoderParams, HeadParams, StackDropout, encoder_forward
from npattn.tolerances import MODEL_GRADIENT

H, G, L, V, CLASSES, POOLED = 4, 2, 5, 11, 3, 7
IDS = np.random.default_rng(3).integers(0, V, (B, L))
TYPES = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
INSIDE = np.array([[True] * L, [False, True, True, True, False]])  # padding on both sides
BERT = {"pre_norm": False, "norm_eps": 0.01}


def linear(seed, rows, columns):
    return LinearParams(normal([seed, 0], rows, columns) * rows**-0.5, normal([seed, 1], columns))


HEADS = {
    "none": None,
    "pooler and classes": TextHeadParams(linear(1, M, POOLED), linear(2, POOLED, CLASSES)),
    "classes": TextHeadParams(None, linear(2, M, CLASSES)),
    "pooler": TextHeadParams(linear(1, M, POOLED)),
    "sentence": TextHeadParams(),
    "tokens": linear(2, M, CLASSES),
    "masked tokens": MaskedHeadParams(linear(1, M, M), norm(3), HeadParams(None, normal(4, V))),
    "masked tokens, untied": MaskedHeadParams(linear(1, M, M), norm(3), HeadParams(normal(5, M, V), normal(4, V))),
}


def params_of(head, blocks=1):
    embed = EmbedParams(normal(9, V, M), normal(5, L + 2, M), norm(6), normal(7, 2, M))
    return EncoderModelParams(embed, EncoderParams((encoder_params(),) * blocks), HEADS[head])


def keys_without_bias(blocks=1):
    """The bias of the keys moves whole rows of scores: its gradient is 0."""
    return tuple(f"params.encoder.blocks.{n}.attention.b_k" for n in range(blocks))


@pytest.mark.parametrize("method", first(1, ["complex", "central"]))
@pytest.mark.parametrize(("head", "pooling", "normalize"), [
    ("none", "first", False),
    ("pooler and classes", "first", False),
    ("pooler and classes", "mean", True),
    ("classes", "last", False),
    ("pooler", "last", True),
    ("sentence", "mean", True),
    ("tokens", "first", False),
    ("masked tokens", "first", False),
    ("masked tokens, untied", "first", False),
])  # fmt: skip
def test_gradients_of_an_encoder_with_a_head(head, pooling, normalize, method):
    config = Config(H, G, pooling=pooling, normalize=normalize, first_position=2, **BERT)
    positions = INSIDE.cumsum(-1) * INSIDE - 1  # as RoBERTa: padding has the row before the first

    def forward(params):
        return encoder_model_forward(IDS, params, config, inside=INSIDE, positions=positions, types=TYPES)

    check_model(forward, encoder_model_backward, {"params": params_of(head)}, keys_without_bias(), method)


def test_gradients_with_dropout_and_a_mask():
    config = Config(H, G, window=2, activation="relu", **BERT)
    drop = StackDropout(dropped(9, B, L, M), [encoder_dropout()])
    given = {"dropout": drop, "mask": npattn.segments(TYPES, TYPES), "inside": INSIDE}

    def forward(params):
        return encoder_model_forward(IDS, params, config, **given)

    y, _ = forward(params_of("none"))
    both = npattn.segments(TYPES, TYPES) & npattn.keys(INSIDE)
    assert np.array_equal(y, encoder_model_forward(IDS, params_of("none"), config, **given | {"inside": None, "mask": both})[0])
    # All tokens have type 0: that of the others gets nothing.
    embed = params_of("none").embed._replace(types=normal(7, 1, M))
    check_model(forward, encoder_model_backward, {"params": params_of("pooler")._replace(embed=embed)}, keys_without_bias())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_gradients_of_a_text_head(pooling, normalize):
    def forward(y, params):
        return text_head_forward(y, params, Config(1, pooling=pooling, normalize=normalize), inside=INSIDE)

    for head in ("pooler and classes", "classes"):
        check_model(forward, text_head_backward, {"y": normal(0, B, L, M), "params": HEADS[head]})


def test_gradients_of_a_head_for_masked_tokens():
    def forward(y, params, table=None):
        return masked_head_forward(y, params, table, Config(1, norm="rms", activation="silu"))

    tied = {"y": normal(0, B, L, M), "params": HEADS["masked tokens"], "table": normal(8, V, M)}
    check_model(forward, masked_head_backward, tied)
    check_model(forward, masked_head_backward, {"y": normal(0, B, L, M), "params": HEADS["masked tokens, untied"]})


# --- the parts, by hand --------------------------------------------------------------------------------------------------


def by_hand(head, y, table):
    """Equations (3) to (9) with NumPy, for Config(norm_eps=0.01, pooling="mean", normalize=True)."""
    if isinstance(head, LinearParams):
        return y @ head.w + head.b
    if isinstance(head, MaskedHeadParams):
        h = gelu(y @ head.dense.w + head.dense.b)
        n = norm_loops(h, head.norm.g, head.norm.b, eps=0.01, dy=np.zeros(h.shape))["y"]
        return n @ (table.T if head.head.w is None else head.head.w) + head.head.b
    c = pooled_loops(y, INSIDE, "mean")
    t = c if head.pooler is None else np.tanh(c @ head.pooler.w + head.pooler.b)
    u = t / np.sqrt((t * t).sum(-1, keepdims=True))
    return u if head.out is None else u @ head.out.w + head.out.b


@pytest.mark.parametrize("head", HEADS)
def test_a_model_is_its_parts(head):
    p, config = params_of(head), Config(H, G, pooling="mean", normalize=True, first_position=2, **BERT)
    positions, drop = np.array([[0, 1, 2, 1, 0], [3, 0, 1, 2, 3]]), [encoder_dropout()]
    x = p.embed.table[IDS] + p.embed.positions[positions + 2] + p.embed.types[TYPES]
    x = norm_loops(x, p.embed.norm.g, p.embed.norm.b, eps=0.01, dy=np.zeros(x.shape))["y"].astype(x.dtype)
    want, _ = encoder_forward(x, p.encoder, config, mask=npattn.keys(INSIDE), dropout=drop)
    if p.head is not None:
        want = by_hand(p.head, want, p.embed.table)
    given = {"inside": INSIDE, "positions": positions, "types": TYPES, "dropout": StackDropout(None, drop)}
    found, _ = encoder_model_forward(IDS, p, config, **given)
    assert np.abs(found - want).max() <= MODEL_GRADIENT * np.abs(want).max()


# --- pooling -----------------------------------------------------------------------------------------------------------------


def pooled_loops(y, inside, pooling):
    rows = []
    for states, real in zip(y, inside, strict=True):
        some = [state for state, counts in zip(states, real, strict=True) if counts]
        rows.append({"first": some[0], "last": some[-1], "mean": sum(some) / len(some)}[pooling])
    return np.array(rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_pooling_is_that_of_loops_and_padding_may_be_nan(pooling, dtype):
    y = normal(0, B, L, M).astype(dtype)
    y[~INSIDE] = np.nan
    want = pooled_loops(y, INSIDE, pooling)
    terms = pooled_loops(np.abs(y), INSIDE, pooling)
    c, cache = text_head_forward(y, TextHeadParams(), Config(1, pooling=pooling), inside=INSIDE)
    assert c.dtype == dtype
    assert_close(c, want, terms)
    u, _ = text_head_forward(y, TextHeadParams(), Config(1, pooling=pooling, normalize=True), inside=INSIDE)
    length = np.sqrt((want**2).sum(-1, keepdims=True))
    assert_close(u, want / length, terms / length + 1)
    for dc in (normal(1, B, M), np.full((B, M), np.inf)):
        dy = text_head_backward(dc.astype(dtype), cache).y
        assert dy.dtype == dtype
        assert not dy[~INSIDE].any()
    one, _ = text_head_forward(y[0], TextHeadParams(), Config(1, pooling=pooling))
    assert np.array_equal(one, c[0])


def test_a_text_of_length_0_stays_0():
    config = Config(1, normalize=True)
    u, cache = text_head_forward(np.zeros((B, L, M), np.float32), TextHeadParams(), config)
    assert not u.any()
    assert np.isfinite(text_head_backward(np.ones_like(u), cache).y).all()
    tiny, _ = text_head_forward(np.full((B, L, M), 1e-30, np.float64), TextHeadParams(), config)
    assert np.abs(tiny).max() < 1e-15


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_dtypes_come_out_as_they_go_in(head, dtype):
    params = map_leaves(lambda x: x.astype(dtype), params_of(head)._replace(encoder=None))
    blocks = tuple(map_leaves(lambda x: x.astype(dtype), block) for block in params_of(head).encoder.blocks)
    params = params._replace(encoder=EncoderParams(blocks))
    out, cache = encoder_model_forward(IDS, params, Config(H, G, normalize=True, **BERT), inside=INSIDE)
    grads = encoder_model_backward(out, cache)
    assert {x.dtype for x in leaves(grads)} == {np.dtype(dtype)} == {out.dtype}
    assert [x.shape for x in leaves(grads.params)] == [x.shape for x in leaves(params)]
    assert all(map(np.array_equal, leaves(encoder_model_backward(out, cache)), leaves(grads)))


# --- spans -------------------------------------------------------------------------------------------------------------------


SPANS = np.array([[1, 4], [2, 2], [3, 3]])
PLACES = np.array([[True] * L, [False, True, True, True, False], [True, False, False, True, False]])


def span_loss_loops(logits, spans, places):
    losses = []
    for text, span, inside in zip(logits, spans, places, strict=True):
        for side in (0, 1):
            some = [text[token, side] for token in range(len(text)) if inside[token]]
            losses.append(np.log(sum(np.exp(some))) - text[span[side], side])
    return sum(losses) / len(losses)


def test_the_loss_of_spans_is_that_of_loops_and_padding_may_be_nan():
    logits = normal(0, 3, L, 2)
    assert_close(span_loss_forward(logits, SPANS)[0], span_loss_loops(logits, SPANS, np.ones((3, L), bool)), 10)
    logits[~PLACES] = np.nan
    want = span_loss_loops(logits, SPANS, PLACES)
    loss, cache = span_loss_forward(logits, SPANS, inside=PLACES)
    assert_close(loss, want, 10)
    grad = span_loss_backward(np.array(1.0), cache).logits
    assert grad.shape == logits.shape
    assert not grad[~PLACES].any()
    # A text that does not count may have any span.
    some, wild = np.array([True, False, True]), np.where([[True], [False], [True]], SPANS, [[-1, 99]])
    loss, cache = span_loss_forward(logits, wild, inside=PLACES, mask=some)
    assert_close(loss, span_loss_loops(logits[some], SPANS[some], PLACES[some]), 10)
    assert not span_loss_backward(np.array(1.0), cache).logits[1].any()


@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("inside", [None, PLACES])
def test_gradients_of_the_loss_of_spans(inside, method):
    def forward(logits):
        return span_loss_forward(logits, SPANS, inside=inside)

    check_model(forward, span_loss_backward, {"logits": normal(0, 3, L, 2)}, method=method)


def best_span_loops(text, places, most):
    """Of equal sums the shortest, and of these the first."""
    found = [(-(text[i, 0] + text[j, 1]), j - i, i, j) for i in range(len(text)) for j in range(i, min(i + most, len(text)))
             if places[i] and places[j]]  # fmt: skip
    score, _, start, end = min(found)
    return start, end, -score


@pytest.mark.parametrize("most", [None, 1, 2, 4, 99])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_span_is_that_of_loops(most, ties):
    rng = np.random.default_rng(4)
    logits = rng.integers(-2, 3, (40, 9, 2)).astype(float) if ties else rng.standard_normal((40, 9, 2))
    places = rng.random((40, 9)) < 0.6
    places[:, 4] = True
    for inside in (places, np.ones((40, 9), bool)):
        found = best_span(logits, inside=inside, max_length=most)
        want = [best_span_loops(text, real, most or 9) for text, real in zip(logits, inside, strict=True)]
        for got, expected in zip(found, zip(*want, strict=True), strict=True):
            assert np.array_equal(got, expected)
    one = best_span(logits[0], inside=places[0], max_length=most)
    assert one.start.shape == () == one.score.shape


# --- packed texts ------------------------------------------------------------------------------------------------------------


LENGTHS = [3, 1, 5, 2]


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("kind", ["packed", "segments"])
def test_packed_texts_are_those_of_separate_rows(kind, implementation):
    """Several texts in one row, each with positions of its own, give the states and gradients of separate rows."""
    config, params = Config(H, G, implementation=implementation, **BERT), params_of("none", blocks=2)
    total, longest = sum(LENGTHS), max(LENGTHS)
    ids, types, dy = np.random.default_rng(5).integers(0, V, total), np.arange(total) % 2, normal(6, total, M)
    inside = np.arange(longest) < np.array(LENGTHS)[:, None]

    def rows(x):
        padded = np.zeros((*inside.shape, *x.shape[1:]), x.dtype)
        padded[inside] = x
        return padded

    y, cache = encoder_model_forward(rows(ids), params, config, inside=inside, types=rows(types))
    grads = encoder_model_backward(rows(dy), cache)  # padding has dy = 0

    text = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    ends = np.concatenate([[0], np.cumsum(LENGTHS)])
    mask = npattn.packed(ends, ends) if kind == "packed" else npattn.segments(text, text)
    positions = np.concatenate([np.arange(n) for n in LENGTHS])
    z, cache = encoder_model_forward(ids[None], params, config, mask=mask, positions=positions, types=types[None])
    again = encoder_model_backward(dy[None], cache)
    assert np.abs(z[0] - y[inside]).max() <= MODEL_GRADIENT * np.abs(y).max()
    top = max(np.abs(x).max() for x in leaves(grads))
    assert all(np.abs(a - b).max() <= MODEL_GRADIENT * top for a, b in zip(leaves(again), leaves(grads), strict=True))


# --- errors ------------------------------------------------------------------------------------------------------------------


def run(head="sentence", **given):
    return encoder_model_forward(IDS, params_of(head), Config(H, G), **given)


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: Config(1, pooling="max"), ValueError, "Config: pooling is 'max', expected one of 'first', 'last', 'mean'"),
    (lambda: Config(1, normalize=1), TypeError, "Config: normalize is an int, expected True or False"),
    (lambda: encoder_model_forward(IDS, params_of("none").embed, Config(1)), TypeError,
     "encoder_model: params is a npattn.models.transformer.EmbedParams, expected npattn.EncoderModelParams"),
    (lambda: encoder_model_forward(IDS, params_of("none"), None), TypeError, "encoder_model: config is a NoneType"),
    (lambda: encoder_model_backward(IDS, None), TypeError, "expected npattn.EncoderModelCache, from encoder_model_forward"),
    (lambda: run(inside=INSIDE.astype(int)), TypeError, "encoder_model: inside has dtype int64, expected bool"),
    (lambda: run(inside=INSIDE[:, :2]), ValueError, r"encoder_model: inside has shape \(2, 2\), expected \(2, 5\) or \(5,\)"),
    (lambda: run(positions=np.arange(-1, L - 1)), ValueError, "embed: positions reach from -1 to 3, expected 0 to 6"),
    (lambda: run(inside=INSIDE & [[True], [False]]), ValueError, "encoder_model: inside has a text of padding alone"),
    (lambda: text_head_backward(normal(0, B, M + 1), run()[1].head), ValueError, "text_head: dlogits has shape"),
    (lambda: span_loss_forward(normal(0, 3, L, 3), SPANS), ValueError,
     r"span_loss: logits has shape \(3, 5, 3\), expected \(..., L, 2\)"),
    (lambda: span_loss_forward(normal(0, 3, L, 2), SPANS[:2]), ValueError, r"spans has shape \(2, 2\), expected \(3, 2\)"),
    (lambda: span_loss_forward(normal(0, 3, L, 2), SPANS + 1), ValueError, "targets reaches from 2 to 5"),
    (lambda: span_loss_forward(normal(0, 3, L, 2), SPANS, inside=PLACES[::-1]), ValueError, "spans has a token that is not"),
    (lambda: best_span(np.full((3, L, 2), np.nan)), ValueError, "best_span: logits has NaN"),
    (lambda: best_span(np.zeros((3, L, 2)), max_length=0), ValueError, "best_span: max_length is 0"),
    (lambda: best_span(np.zeros((3, L, 2)), inside=np.zeros(L, bool)), ValueError, "inside has a text of padding alone"),
])  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_tied_table_gets_both_gradients():
    logits, cache = run("masked tokens")
    of_model = encoder_model_backward(np.ones_like(logits), cache).params
    of_head = masked_head_backward(np.ones_like(logits), cache.head).table
    untied = params_of("masked tokens")
    untied = untied._replace(head=untied.head._replace(head=HeadParams(untied.embed.table.T, untied.head.head.b)))
    logits, cache = encoder_model_forward(IDS, untied, Config(H, G))
    apart = encoder_model_backward(np.ones_like(logits), cache).params
    assert np.abs(of_model.embed.table - apart.embed.table - of_head).max() <= MODEL_GRADIENT * np.abs(of_head).max()
