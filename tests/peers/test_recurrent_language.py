"""Recurrent language models against torch: nn.Embedding, nn.RNN, nn.GRU or nn.LSTM, and nn.Linear, in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")

from npattn import convert, cross_entropy_backward, cross_entropy_forward
from npattn.models.recurrent import (
    RecurrentConfig,
    RecurrentParams,
    RecurrentPast,
    recurrent_model_backward,
    recurrent_model_forward,
)
from npattn.models.transformer import EmbedParams, HeadParams, StackDropout
from npattn.tolerances import MODEL_GRADIENT

B, T, V, M, N = 4, 7, 13, 5, 6
LENGTHS = np.array([7, 3, 1, 5])
KINDS = {
    "rnn": (torch.nn.RNN, {}, convert.rnn_from_torch, convert.rnn_to_torch, {}),
    "relu": (torch.nn.RNN, {"nonlinearity": "relu"}, convert.rnn_from_torch, convert.rnn_to_torch, {"nonlinearity": "relu"}),
    "gru": (torch.nn.GRU, {}, convert.gru_from_torch, convert.gru_to_torch, {}),
    "lstm": (torch.nn.LSTM, {}, convert.lstm_from_torch, convert.lstm_to_torch, {}),
}


def close(got, want, top, name):
    want = want.detach().numpy()
    assert got.shape == want.shape, name
    assert np.abs(got - want).max() <= MODEL_GRADIENT * top, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_logits_loss_and_gradients(name, layers, bias, tied):
    """With states before the first token. Padding is packed away in torch, and left out of the loss in both."""
    torch.manual_seed(0)
    make, options, from_torch, to_torch, more = KINDS[name]
    width = M if tied else N
    table, rnn = torch.nn.Embedding(V, M).double(), make(M, width, layers, bias=bias, batch_first=True, **options).double()
    head = torch.nn.Linear(width, V).double()
    if tied:
        head.weight = table.weight
    firsts = [torch.randn(layers, B, width, dtype=torch.float64, requires_grad=True) for _ in range(1 + (name == "lstm"))]

    rng = np.random.default_rng(1)
    ids, targets = rng.integers(0, V, (B, T)), rng.integers(0, V, (B, T))
    inside = np.arange(T) < LENGTHS[:, None]
    packed = torch.nn.utils.rnn.pack_padded_sequence(table(torch.tensor(ids)), LENGTHS, batch_first=True, enforce_sorted=False)
    h, lasts = rnn(packed, tuple(firsts) if name == "lstm" else firsts[0])
    lasts = lasts if name == "lstm" else (lasts,)
    logits = head(torch.nn.utils.rnn.pad_packed_sequence(h, batch_first=True)[0])
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.tensor(np.where(inside, targets, -100)).reshape(-1))
    dlasts = [torch.randn_like(x) for x in lasts]
    (loss + sum((d * x).sum() for d, x in zip(dlasts, lasts, strict=True))).backward()

    state = rnn.state_dict()
    params = RecurrentParams(
        EmbedParams(table.weight.detach().numpy()), tuple(from_torch(state, layer=n) for n in range(layers)),
        HeadParams(None if tied else head.weight.detach().numpy().T, head.bias.detach().numpy()))  # fmt: skip
    past = RecurrentPast(tuple(tuple(x.detach().numpy()[n] for x in firsts) for n in range(layers)), 0)
    got, cache = recurrent_model_forward(ids, params, RecurrentConfig(**more), lengths=LENGTHS, past=past)
    found, loss_cache = cross_entropy_forward(got, targets, mask=inside)
    close(np.where(inside[..., None], got, 0), logits * torch.tensor(inside)[..., None], np.abs(got).max(), "logits")
    close(np.asarray(found), loss, abs(found), "loss")
    dpast = RecurrentPast(tuple(tuple(d.numpy()[n] for d in dlasts) for n in range(layers)), T)
    grads = recurrent_model_backward(cross_entropy_backward(np.ones(()), loss_cache).logits, cache, dpast)

    given = {} if name == "gru" else {"gradients": True}
    mine = {k: x for n, p in enumerate(grads.params.layers) for k, x in to_torch(p, layer=n, **given).items()}
    mine |= {"table": grads.params.embed.table, "head.b": grads.params.head.b}
    want = {n: p.grad for n, p in rnn.named_parameters()} | {"table": table.weight.grad, "head.b": head.bias.grad}
    if not tied:
        mine["head.w"], want["head.w"] = grads.params.head.w.T, head.weight.grad
    for k, x in enumerate(firsts):
        mine[f"state {k}"], want[f"state {k}"] = np.stack([state[k] for state in grads.past.states]), x.grad
    assert {n for n in mine if bias or "bias" not in n} == set(want)
    top = max(float(x.abs().max()) for x in want.values())
    for n, x in want.items():
        close(mine[n], x, top, n)


def test_dropout_stands_where_torch_has_it():
    """nn.LSTM(dropout=1) in training drops everything between layers, and nothing else."""
    torch.manual_seed(0)
    rnn = torch.nn.LSTM(M, N, 3, batch_first=True, dropout=1.0).double()
    table, head = (np.random.default_rng(n).standard_normal(shape) for n, shape in ((0, (V, M)), (1, (N, V))))
    layers = tuple(convert.lstm_from_torch(rnn.state_dict(), layer=n) for n in range(3))
    ids, nothing = np.random.default_rng(2).integers(0, V, (B, T)), np.zeros((B, T, N))
    got, _ = recurrent_model_forward(ids, RecurrentParams(EmbedParams(table), layers, HeadParams(head)), RecurrentConfig(),
                                     dropout=StackDropout(None, [nothing, nothing, None]))  # fmt: skip
    h = rnn(torch.tensor(table[ids]))[0]
    close(got, h @ torch.tensor(head), np.abs(got).max(), "logits")
