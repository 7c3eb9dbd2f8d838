"""Training beside torch: the curve of the loss; and folders of `npattn train lm` opened by transformers and torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")
pytest.importorskip("safetensors", reason="needs the peers extra: pip install npattn[peers]")

from safetensors.numpy import load_file

from npattn import pipeline
from npattn.models.folder import as_tensors, load, save
from npattn.models.tokens import byte_tokenizer
from npattn.tolerances import MODEL_GRADIENT
from npattn.training.initial import initial
from npattn.training.lm import PRESETS, loss_of, settings_of
from npattn.training.loop import Training, train
from npattn.training.optimizers import matrices

V, T, B, STEPS = 31, 12, 4, 100
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": V, "n_embd": 24, "n_layer": 2, "n_head": 3,
        "n_positions": T, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
SETTINGS = Training(STEPS, lr=3e-3, warmup=10, least_lr=3e-4, weight_decay=0.1, clip=1.0)
SMALL = replace(PRESETS["tiny"], layers=2, M=24, H=3, F=40)


def batches(n):
    """Texts with something to learn: each token is that before it plus 1, or, one time in five, any."""
    rng = np.random.default_rng((3, n))
    jumps = np.where(rng.random((B, T + 1)) < 0.2, rng.integers(0, V, (B, T + 1)), 1)
    return jumps.cumsum(1) % V


def curve_of_torch(state, dtype):
    """The losses of 100 steps of torch's own model, AdamW, clipping and schedule."""
    config = transformers.GPT2Config(**{k: x for k, x in GPT2.items() if k != "model_type"}, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).to(dtype)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    groups = [{"params": [p for p in model.parameters() if (p.ndim >= 2) == two], "weight_decay": 0.1 * two} for two in (1, 0)]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.lr, betas=SETTINGS.betas, eps=SETTINGS.eps)
    losses = []
    for step in range(STEPS):
        ids = torch.tensor(batches(step))
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.reshape(-1, V), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        for p in model.parameters():  # torch's own clipping adds 1e-6 to the norm
            p.grad *= min(1.0, SETTINGS.clip / float(norm))
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.schedule()(step)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_curve_is_as_near_to_torch_as_torch_to_itself(dtype):
    """Within ten times what torch differs from itself when each weight is moved by one unit in its last place."""
    torch.manual_seed(0)
    model = initial(GPT2, seed=1, dtype=dtype)
    state = {name: torch.tensor(x) for name, x in as_tensors(model).items()}
    of_torch = curve_of_torch(state, getattr(torch, dtype))
    rng = np.random.default_rng(0)
    ends = {name: torch.tensor(rng.choice([-np.inf, np.inf], x.shape), dtype=x.dtype) for name, x in state.items()}
    moved = {name: torch.nextafter(x, ends[name]) for name, x in state.items()}
    itself = np.maximum.accumulate(np.abs(curve_of_torch(moved, getattr(torch, dtype)) - of_torch))
    trained = train(model.params, loss_of(model), batches, SETTINGS, decays=matrices)
    mine = np.array([line["loss"] for line in trained.log])
    assert of_torch[-10:].mean() < 0.7 * of_torch[:3].mean(), "it learns"
    # The first loss has no step behind it: there the weights that were moved may give the same bits.
    rounding = 4 * np.finfo(dtype).eps * of_torch.max()
    assert (np.abs(mine - of_torch) <= 10 * np.maximum(itself, rounding)).all(), np.abs(mine - of_torch).max() / itself.max()


def test_transformers_opens_what_was_trained(tmp_path):
    """In float32, which is what a training saves."""
    tokenizer = byte_tokenizer()
    model = initial(settings_of("transformer", SMALL, tokenizer.size, 256), 0, tokenizer=tokenizer)
    trained = train(model.params, loss_of(model), lambda n: batches(n) + 97, Training(3))
    model = replace(model, params=trained.params)
    save(tmp_path, model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    text = "A text, né."
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt").input_ids
    assert ids.tolist() == model.tokenizer.encode(text).ids.tolist()
    logits, _ = model.forward(ids.numpy())
    expected = theirs(ids).logits.detach().numpy()
    assert expected.dtype == np.float32
    bound = MODEL_GRADIENT * float(np.finfo(np.float32).eps / np.finfo(np.float64).eps)
    assert np.abs(logits - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["rnn", "gru", "lstm"])
def test_folders_of_recurrent_models(tmp_path, arch, tied):
    """The names are torch's; the folder is read as it was written, and its text is generated with padding, too."""
    tokenizer = byte_tokenizer()
    sizes = SMALL if tied else replace(SMALL, M=132)  # a table that is wide enough has a head of its own beside it
    model = initial(settings_of(arch, sizes, tokenizer.size, 256), 0, tokenizer=tokenizer, dtype="float64")
    save(tmp_path, model)
    again = load(tmp_path)
    assert again.config == model.config
    ids = np.frombuffer(b"A text, which is read.", np.uint8).astype(np.int64)[None]
    logits, _ = model.forward(ids)
    assert np.array_equal(again.forward(ids)[0], logits)

    tensors = {name: torch.tensor(x) for name, x in load_file(tmp_path / "model.safetensors").items()}
    settings = model.settings
    N, layers = settings["hidden_size"], settings["num_hidden_layers"]
    rnn = getattr(torch.nn, arch.upper())(settings["embedding_size"], N, layers, batch_first=True).double()
    state = {name.removeprefix("rnn."): x for name, x in tensors.items() if name.startswith("rnn.")}
    zero = {name: torch.zeros_like(x) for name, x in rnn.state_dict().items() if "bias_hh" in name}  # the sum is in bias_ih
    rnn.load_state_dict({**zero, **state})
    h, _ = rnn(tensors["embedding.weight"][ids])
    h = torch.nn.functional.layer_norm(h, (N,), tensors["norm.weight"], tensors["norm.bias"])
    w = tensors["embedding.weight" if tied else "head.weight"]
    expected = torch.nn.functional.linear(h, w, tensors["head.bias"]).detach().numpy()
    assert np.abs(logits - expected).max() <= MODEL_GRADIENT * np.abs(expected).max()

    generator = pipeline("text-generation", model=again)
    both = generator(["A long text", "short"], max_new_tokens=6)
    assert both == [generator(text, max_new_tokens=6) for text in ("A long text", "short")]
