"""The copying encoder-decoder: every gradient by a complex step, and its probabilities and loss by loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import assert_close, check_model
from test_blocks import B, M, decoder_params, encoder_params, normal
from test_stacks import square

import npattn
from npattn.models.config import Config
from npattn.models.copying import (
    CopyingParams,
    CopyParams,
    CopyScores,
    copy_log_probabilities,
    copy_loss_backward,
    copy_loss_forward,
    copying_backward,
    copying_decode,
    copying_forward,
    copying_memory,
)
from npattn.models.transformer import DecoderParams, EmbedParams, EncoderParams, HeadParams, TransformerParams

S, L, V, K, D = 7, 5, 13, 9, 3
CONFIG = Config(4, 2, sinusoidal="interleaved", norm_eps=0.01)
RNG = np.random.default_rng(0)
SOURCE, TARGET = RNG.integers(0, V, (B, S)), RNG.integers(0, V, (B, L))
INSIDE = np.arange(S) < np.array([[S], [S - 3]])


def params():
    transformer = TransformerParams(
        EmbedParams(normal(1, V, M)), EncoderParams((encoder_params(),)), DecoderParams((square(decoder_params()),)), None,
        HeadParams(normal(3, M, K), normal(4, K)))  # fmt: skip
    gate = npattn.LinearParams(normal(7, M, 1), normal(8, 1))
    return CopyingParams(transformer, CopyParams(normal(5, M, D), normal(6, M, D), gate))


def scores(seed=0):
    copies = np.where(INSIDE[:, None], normal([seed, 1], B, L, S), -np.inf)
    return CopyScores(normal([seed, 0], B, L, K), copies, normal([seed, 2], B, L))


def targets():
    """Words of all four kinds: with a logit or without, in the source or not; and one that does not count."""
    found = np.array([[SOURCE[0, 0], 2, SOURCE[0, 1], 8, 0], [SOURCE[1, 2], 5, 3, SOURCE[1, 0], -100]])
    p = probabilities(scores())
    kinds = {(t < K, t in SOURCE[b][INSIDE[b]]) for b in range(B) for t in found[b] if t >= 0}
    assert {(True, False), (True, True), (False, True)} <= kinds
    assert all(p[b, n, t] > 0 for b in range(B) for n, t in enumerate(found[b]) if t >= 0)
    return found


def probabilities(x):
    """Equation (6), word by word."""
    p = np.zeros((B, L, V))
    for b in range(B):
        for n in range(L):
            g = 1 / (1 + math.exp(-x.gate[b, n]))
            written = [math.exp(v) for v in x.logits[b, n]]
            places = [math.exp(v) for v in x.copies[b, n]]
            for v in range(K):
                p[b, n, v] += g * written[v] / sum(written)
            for j in range(S):
                p[b, n, SOURCE[b, j]] += (1 - g) * places[j] / sum(places)
    return p


def test_probabilities():
    got = np.exp(copy_log_probabilities(scores(), SOURCE, V))
    assert_close(got, probabilities(scores()), K + S)
    assert_close(got.sum(-1), np.ones((B, L)), V)


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_that_of_the_probabilities(smoothing, reduction):
    x, t = scores(), targets()
    expected, p = np.zeros((B, L)), probabilities(x)
    for b in range(B):
        for n in range(L):
            if t[b, n] >= 0:
                lse = math.log(sum(math.exp(v) for v in x.logits[b, n]))
                every = sum(lse - v for v in x.logits[b, n]) / K
                expected[b, n] = (1 - smoothing) * -math.log(p[b, n, t[b, n]]) + smoothing * every
    loss, _ = copy_loss_forward(x, SOURCE, t, mask=t >= 0, reduction=reduction, label_smoothing=smoothing)
    wanted = {"mean": expected.sum() / (B * L - 1), "sum": expected.sum(), "none": expected}[reduction]
    assert_close(loss, wanted, B * L * (K + S))


@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_gradients_of_the_loss(smoothing, method):
    """Those of the cross-attention weights that copy, of the gate and of the logits."""
    t, open_scores = targets(), scores()._replace(copies=normal(9, B, L, S))
    seen = np.where(INSIDE[:, None], True, False) & np.ones((B, L, S), bool)

    def forward(logits, copies, gate):
        x = CopyScores(logits, np.where(seen, copies, -np.inf), gate)
        return copy_loss_forward(x, SOURCE, t, mask=t >= 0, reduction="none", label_smoothing=smoothing)

    def backward(dloss, cache):
        return copy_loss_backward(dloss, cache).scores

    check_model(forward, backward, open_scores._asdict(), method=method)


@pytest.mark.parametrize("method", ["complex", pytest.param("central", marks=pytest.mark.slow)])
def test_gradients_of_the_model(method):
    mask, t = npattn.keys(INSIDE), np.where(np.arange(L) < L - 1, SOURCE[:, :L], -100)

    def forward(params):
        x, cache = copying_forward(SOURCE, TARGET, params, CONFIG, source_mask=mask, cross_mask=mask)
        loss, of_loss = copy_loss_forward(x, SOURCE, t, mask=t >= 0, reduction="none")
        return loss, (cache, of_loss)

    def backward(dloss, caches):
        return copying_backward(copy_loss_backward(dloss, caches[1]).scores, caches[0])

    zero = [f"params.transformer.{name}.b_k" for name in (
        "encoder.blocks.0.attention", "decoder.blocks.0.attention", "decoder.blocks.0.cross")]  # fmt: skip
    check_model(forward, backward, {"params": params()}, zero=tuple(zero), method=method)


def test_far_scores_lose_no_digits():
    """The loss is computed in logs: probabilities of exp(-1000) are no zeros, and their gradients are those of the shares."""
    x = CopyScores(np.array([[0.0, -2000.0]]), np.array([[0.0, -1000.0]]), np.array([800.0]))
    loss, cache = copy_loss_forward(x, np.array([0, 1]), np.array([1]))
    assert loss == 1800
    grads = copy_loss_backward(None, cache).scores
    assert grads.copies.tolist() == [[1.0, -1.0]]
    assert grads.gate.tolist() == [1.0]
    assert_close(grads.logits, [[math.exp(-200), -math.exp(-200)]], 2000 * math.exp(-200))


def test_a_word_that_cannot_come_has_an_infinite_loss_and_no_gradient():
    x = CopyScores(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(1))
    loss, cache = copy_loss_forward(x, np.array([0, 1]), np.array([5]))
    assert loss == np.inf
    assert not any(g.any() for g in copy_loss_backward(None, cache).scores)


def test_steps_of_generation_are_those_of_the_whole():
    mask = npattn.keys(INSIDE)
    p = params()
    x, _ = copying_forward(SOURCE, TARGET, p, CONFIG, source_mask=mask, cross_mask=mask)
    whole = copy_log_probabilities(x, SOURCE, V)
    past = copying_memory(SOURCE, p, CONFIG, source_mask=mask)
    for n in range(L):
        step, past = copying_decode(TARGET[:, n : n + 1], p, CONFIG, past, cross_mask=mask)
        seen = np.isfinite(whole[:, n])
        assert np.array_equal(seen, np.isfinite(step[:, 0]))
        assert_close(step[:, 0][seen], whole[:, n][seen], 100 * M * L)
    assert past.length == L
    assert past.rows(np.array([1])).source.tolist() == SOURCE[1:].tolist()


def test_errors():
    x = scores()
    with pytest.raises(ValueError, match="copy_loss: targets has -1, expected integers from 0 on"):
        copy_loss_forward(x, SOURCE, np.full((B, L), -1))
    with pytest.raises(ValueError, match="source has shape"):
        copy_loss_forward(x, SOURCE[:, 1:], targets())
    tied = params()
    tied = tied._replace(transformer=tied.transformer._replace(head=HeadParams()))
    with pytest.raises(ValueError, match=r"params.transformer.head.w is None, expected an array \(M, K\)"):
        copying_forward(SOURCE, TARGET, tied, CONFIG)
