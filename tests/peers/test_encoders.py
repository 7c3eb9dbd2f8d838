"""BERT and RoBERTa of transformers with the same parameters, in float64: outputs, losses and every gradient."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")

from npattn import cross_entropy_backward, cross_entropy_forward, keys
from npattn.models.config import Config
from npattn.models.encoders import (
    EncoderModelParams,
    MaskedHeadParams,
    TextHeadParams,
    encoder_model_backward,
    encoder_model_forward,
    span_loss_backward,
    span_loss_forward,
    text_head_backward,
    text_head_forward,
)
from npattn.models.transformer import HeadParams
from peers.hugging_face import assert_same, assert_same_gradients, bert, linear, made, norm, read

B, L, M, F, H, V, CLASSES, LAYERS, PADDING = 3, 7, 12, 10, 4, 17, 5, 2, 1
SIZES = {"hidden_size": M, "num_hidden_layers": LAYERS, "num_attention_heads": H, "intermediate_size": F, "vocab_size": V,
         "max_position_embeddings": 11, "type_vocab_size": 2, "num_labels": CLASSES, "layer_norm_eps": 1e-3,
         "pad_token_id": PADDING}  # fmt: skip
ENDS = np.array([[L], [4], [1]])
SIDES = {"right": np.arange(L) < ENDS, "left": np.arange(L) >= L - ENDS}
RNG = np.random.default_rng(0)
TOKENS, TYPES = RNG.integers(PADDING + 1, V, (B, L)), RNG.integers(0, 2, (B, L))
ROWS = pytest.mark.parametrize(("family", "side"), [(f, s) for f in ("Bert", "Roberta") for s in SIDES])


class Both:
    """A model of transformers and what npattn takes in its place."""

    def __init__(self, family, task, side, **sizes):
        self.inside, roberta = SIDES[side], family == "Roberta"
        config = getattr(transformers, f"{family}Config")(**SIZES | sizes)
        self.model = made(getattr(transformers, f"{family}{task}"), config)
        self.prefix = "" if task == "Model" else f"{family.lower()}."
        self.ids = np.where(self.inside, TOKENS, PADDING)
        self.config = Config(H, pre_norm=False, norm_eps=1e-3, first_position=PADDING + 1 if roberta else 0)
        # RoBERTa counts the tokens that are inside; padding has the row before the first. BERT counts all.
        self.given = {"positions": self.inside.cumsum(-1) * self.inside - 1 if roberta else None, "types": TYPES}

    def run(self, **labels):
        labels = {name: torch.tensor(x) for name, x in labels.items()}
        ids, mask, types = (torch.tensor(x) for x in (self.ids, self.inside.astype(int), TYPES))
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types, **labels)

    def tree(self, head):
        return lambda get: EncoderModelParams(*bert(get, LAYERS, self.prefix), head(get))


def assert_same_step(both, out, logits, loss, grads, head):
    """logits, loss and grads are those of out, the output of transformers; its backward pass runs here."""
    assert_same(logits, out.logits.detach().numpy())
    assert_same(loss, out.loss.detach().numpy())
    out.loss.backward()
    assert_same_gradients(grads, both.tree(head), both.model)


@ROWS
def test_states_and_the_pooled_state(family, side):
    both = Both(family, "Model", side)

    def pooler(get):
        return TextHeadParams(linear(get, "pooler.dense"))

    params = read(both.tree(pooler), both.model)
    y, cache = encoder_model_forward(both.ids, params._replace(head=None), both.config, inside=both.inside, **both.given)
    # transformers pools the first token even if it is padding, so inside is not given here.
    pooled, head = text_head_forward(y, params.head, both.config)
    out = both.run()
    assert_same(y, out.last_hidden_state.detach().numpy())
    assert_same(pooled, out.pooler_output.detach().numpy())
    dy, dpooled = RNG.standard_normal(y.shape), RNG.standard_normal(pooled.shape)
    ((out.last_hidden_state * torch.tensor(dy)).sum() + (out.pooler_output * torch.tensor(dpooled)).sum()).backward()
    of_head = text_head_backward(dpooled, head)
    grads = encoder_model_backward(dy + of_head.y, cache).params
    assert_same_gradients(grads._replace(head=of_head.params), both.tree(pooler), both.model)


@ROWS
def test_masked_tokens(family, side):
    both = Both(family, "ForMaskedLM", side)

    def head(get):
        p = "cls.predictions." if family == "Bert" else "lm_head."
        dense, of_norm = ("transform.dense", "transform.LayerNorm") if family == "Bert" else ("dense", "layer_norm")
        return MaskedHeadParams(linear(get, p + dense), norm(get, p + of_norm), HeadParams(None, get(f"{p}bias")))

    params = read(both.tree(head), both.model)
    logits, cache = encoder_model_forward(both.ids, params, both.config, inside=both.inside, **both.given)
    counts = both.inside & (np.arange(L) != 2)
    out = both.run(labels=np.where(counts, TOKENS, -100))
    loss, of_loss = cross_entropy_forward(logits, TOKENS, mask=counts)
    dlogits = cross_entropy_backward(np.array(1.0), of_loss).logits
    assert_same_step(both, out, logits, loss, encoder_model_backward(dlogits, cache).params, head)


@ROWS
def test_classes_of_texts(family, side):
    both = Both(family, "ForSequenceClassification", side)

    def head(get):
        pooler, out = ("bert.pooler.dense", "classifier") if family == "Bert" else ("classifier.dense", "classifier.out_proj")
        return TextHeadParams(linear(get, pooler), linear(get, out))

    params, labels = read(both.tree(head), both.model), np.arange(B)
    # The first token is that of transformers, which on the left may be padding: a mask says nothing about pooling.
    given = {"inside": both.inside} if side == "right" else {"mask": keys(both.inside)}
    logits, cache = encoder_model_forward(both.ids, params, both.config, **given, **both.given)
    out = both.run(labels=labels)
    loss, of_loss = cross_entropy_forward(logits, labels)
    dlogits = cross_entropy_backward(np.array(1.0), of_loss).logits
    assert_same_step(both, out, logits, loss, encoder_model_backward(dlogits, cache).params, head)


@ROWS
def test_classes_of_tokens(family, side):
    both = Both(family, "ForTokenClassification", side)

    def head(get):
        return linear(get, "classifier")

    params, labels = read(both.tree(head), both.model), TOKENS % CLASSES
    logits, cache = encoder_model_forward(both.ids, params, both.config, inside=both.inside, **both.given)
    out = both.run(labels=np.where(both.inside, labels, -100))
    loss, of_loss = cross_entropy_forward(logits, labels, mask=both.inside)
    dlogits = cross_entropy_backward(np.array(1.0), of_loss).logits
    assert_same_step(both, out, logits, loss, encoder_model_backward(dlogits, cache).params, head)


@ROWS
def test_answer_spans(family, side):
    both = Both(family, "ForQuestionAnswering", side, num_labels=2)

    def head(get):
        return linear(get, "qa_outputs")

    params = read(both.tree(head), both.model)
    logits, cache = encoder_model_forward(both.ids, params, both.config, inside=both.inside, **both.given)
    spans, counts = np.array([[1, 4], [L, L], [0, 6]]), np.array([True, False, True])  # L: cut off, transformers ignores it
    out = both.run(start_positions=spans[:, 0], end_positions=spans[:, 1])
    # transformers lets padding compete for the start and the end, so inside is not given here.
    loss, of_loss = span_loss_forward(logits, spans, mask=counts)
    assert_same(logits, np.stack([out.start_logits.detach(), out.end_logits.detach()], -1))
    assert_same(loss, out.loss.detach().numpy())
    out.loss.backward()
    grads = encoder_model_backward(span_loss_backward(np.array(1.0), of_loss).logits, cache).params
    assert_same_gradients(grads, both.tree(head), both.model)
