"""Pre-training of language models: ``npattn train lm``.

A step takes B windows of T tokens at places that are drawn from (seed, n). The model predicts each token from those before it,
so the loss is the mean cross-entropy; over a text it is told in bits per byte, which does not depend on how the text is cut
into tokens. The Transformer is shaped as Llama (a folder that transformers opens), a recurrent model has about as many
parameters.
"""

from __future__ import annotations

import argparse
import bz2
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npattn.models.blocks import EncoderDropout
from npattn.models.folder import save
from npattn.models.generation import Generation, generate
from npattn.models.layouts import layout_of
from npattn.models.model import Model
from npattn.models.tokens import byte_tokenizer, load_tokenizer
from npattn.models.transformer import StackDropout
from npattn.ops.checks import Array
from npattn.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from npattn.ops.dropout import Dropout
from npattn.training import checkpoints, loop
from npattn.training.initial import initial
from npattn.training.ngram import KneserNey
from npattn.training.processes import useful
from npattn.training.texts import END, Texts, of_files, of_python, tokens_of, train_subwords, windows

OPTIONS: dict[str, Any] = {"text": [], "arch": "transformer", "preset": "small", "bpe": None, "seed": 0}  # with their defaults


@dataclass(frozen=True)
class Preset:
    """Sizes, in the letters of npattn/__init__.py, and how they are trained."""

    layers: int
    M: int
    H: int
    F: int
    T: int
    B: int
    steps: int
    lr: float
    dropout: float = 0.0


PRESETS = {
    "tiny": Preset(layers=2, M=64, H=4, F=176, T=64, B=8, steps=300, lr=5e-3),
    "small": Preset(layers=4, M=160, H=5, F=432, T=256, B=8, steps=2000, lr=4e-3),
}
RECURRENT_LR = 0.6  # of that of the Transformer
PARTS = 2  # of a step, each in a process of its own where that is worth it


def settings_of(arch: str, preset: Preset, V: int, end: int) -> dict[str, Any]:
    """The config.json of a model."""
    shared = {"vocab_size": V, "bos_token_id": end, "eos_token_id": end}
    tied = V > 2 * preset.M  # a table of many rows would be most of the parameters
    if arch == "transformer":
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": preset.M, "hidden_act": "silu",
                "intermediate_size": preset.F, "num_hidden_layers": preset.layers, "num_attention_heads": preset.H,
                "num_key_value_heads": preset.H, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": tied,
                **shared}  # fmt: skip
    goal = size_of(settings_of("transformer", preset, V, end))

    def of_width(N: int) -> dict[str, Any]:
        return {"model_type": f"npattn-{arch}", "embedding_size": N if tied else preset.M, "hidden_size": N,
                "num_hidden_layers": 2, "layer_norm": True, "tie_word_embeddings": tied, **shared}  # fmt: skip

    return min(map(of_width, range(8, 16 * preset.M, 8)), key=lambda settings: abs(size_of(settings) - goal))


def size_of(settings: dict[str, Any]) -> int:
    """The number of parameters of a config.json. No two of these share a tensor."""
    return sum(math.prod(slot.shape) for slot in layout_of(settings).slots())


# --- the loss ----------------------------------------------------------------------------------------------------------------


def loss_of(model: Model, *, dropout: float = 0.0, seed: int = 0) -> loop.Loss:
    """The loss of a batch (B, T + 1) of tokens, for `npattn.training.loop.train`: the mean over all tokens but the first ones.

    dropout : of the embeddings, and of what each sublayer (or recurrent layer) gives; masks are a function of (seed, n)
    """

    def loss_and_grads(params: Any, ids: Array, n: int) -> tuple[Any, Any, int]:
        of = replace(model, params=params)
        dtype = of.dtype.type(0).real.dtype
        options: dict[str, Any] = {"dropout": _masks(of, ids[:, 1:].shape, dropout, seed, n, dtype)} if dropout else {}
        logits, cache = of.forward(ids[:, :-1], **options)
        loss, of_loss = cross_entropy_forward(logits, ids[:, 1:])
        return loss, of.backward(cross_entropy_backward(None, of_loss).logits, cache).params, ids[:, 1:].size

    return loss_and_grads


def _masks(model: Model, shape: tuple[int, ...], p: float, seed: int, n: int, dtype: np.dtype[Any]) -> StackDropout:
    def mask(layer: int, width: int) -> Array:
        return Dropout(p, seed, n, layer).mask((*shape, width), dtype)

    M = model.params.embed.table.shape[1]
    if model.kind == "recurrent language model":
        return StackDropout(mask(0, M), [mask(k, len(x.w_h)) for k, x in enumerate(model.params.layers, 1)])
    count = len(model.params.encoder.blocks)
    blocks = [EncoderDropout(None, mask(2 * k + 1, M), None, mask(2 * k + 2, M)) for k in range(count)]
    return StackDropout(mask(0, M), blocks)


def nats(
    model: Model, tokens: Array, T: int, *, stride: int | None = None, B: int = 8, most: int | None = None
) -> tuple[float, int]:
    """The cross-entropy of a text, summed over its tokens but the first, and how many these are.

    The text is read in windows of T tokens, each ``stride`` (T / 2 unless given) behind the one before; a token counts in the
    first window that has it, where it has T - stride tokens before it at least, except at the start of the text.
    most : windows, from the start of the text
    """
    stride = max(T // 2, 1) if stride is None else stride
    starts = [*range(0, max(len(tokens) - 1 - T, 0) + stride, stride)][:most]
    starts = [start for n, start in enumerate(starts) if n == 0 or start + T - stride < len(tokens) - 1]
    total, count = 0.0, 0
    for at in range(0, len(starts), B):
        rows = [tokens[start : start + T + 1] for start in starts[at : at + B]]
        ids = np.zeros((len(rows), max(map(len, rows))), tokens.dtype)
        counts = np.zeros((len(rows), ids.shape[1] - 1), bool)
        for b, (start, row) in enumerate(zip(starts[at : at + B], rows, strict=True)):
            ids[b, : len(row)] = row
            counts[b, 0 if start == 0 else T - stride : len(row) - 1] = True
        logits, _ = model.forward(ids[:, :-1])
        total += float(cross_entropy_forward(logits, ids[:, 1:], mask=counts, reduction="sum")[0])
        count += int(counts.sum())
    return total, count


def bits_per_byte(model: Model, tokens: Array, size: int, T: int, **options: Any) -> float:
    """size : bytes of the text. With ``most`` the text is taken to have as many bytes a token everywhere."""
    total, count = nats(model, tokens, T, **options)
    return total / math.log(2) / (size * count / (len(tokens) - 1))


def sample(model: Model, text: str, tokens: int, seed: int, temperature: float = 0.8) -> str:
    """The text, and what the model draws behind it."""
    ids = model.tokenizer.encode(text, special=False).ids
    settings = Generation(max_new_tokens=tokens, do_sample=True, temperature=temperature, top_k=0)
    return str(model.tokenizer.decode(generate(model.decode, ids, settings, rng=np.random.default_rng(seed))[0]))


# --- the task ----------------------------------------------------------------------------------------------------------------


class Pretrained(NamedTuple):
    """What `pretrain` returns."""

    model: Model
    log: list[dict[str, Any]]
    interrupted: bool
    bits_per_byte: float  # of what was held out; NaN where the training was interrupted


def run(given: argparse.Namespace, show: Callable[[str], None]) -> bool:
    """What ``npattn train lm`` does; see `npattn.arguments`. Returns whether all steps were made."""
    text = checkpoints.options_of(given.out, vars(given), OPTIONS, given.resume)["text"]
    texts = of_files(text) if text else of_python()
    show(texts.described())
    made = pretrain(given, show, texts)
    if given.plot:
        loop.draw(made.log, given.plot)
    if not made.interrupted:
        if given.baselines:
            for name, bits in baselines(texts).items():
                more = made.bits_per_byte - bits
                show(f"{name}: {bits:.4f} bits per byte, the model has {abs(more):.4f} {'more' if more > 0 else 'less'}")
        show(sample(made.model, "The ", 200, made.log[-1]["step"]))
    return not made.interrupted


def pretrain(given: argparse.Namespace, show: Callable[[str], None], texts: Texts) -> Pretrained:
    """A model of texts, which is then in the folder ``given.out``."""
    options = checkpoints.options_of(given.out, vars(given), OPTIONS, given.resume)
    preset, seed, last = PRESETS[options["preset"]], options["seed"], checkpoints.found(given.out)
    if options["bpe"] is not None:
        preset = replace(preset, T=preset.T // 2)  # which are more bytes all the same
    going_on = given.resume and last is not None
    tokenizer: Any
    if options["bpe"] is None:
        tokenizer = byte_tokenizer()
    elif going_on:
        tokenizer = load_tokenizer(given.out / str(last), {})
    else:
        tokenizer = train_subwords(texts.train, options["bpe"])
    subwords = None if options["bpe"] is None else tokenizer
    tokens, held_out = tokens_of(texts.train, subwords), tokens_of(texts.held_out, subwords)
    end = END if tokenizer.special.eos is None else tokenizer.special.eos
    model = initial(settings_of(options["arch"], preset, tokenizer.size, end), seed, tokenizer=tokenizer)
    show(f"{options['arch']} with {model.size:,} parameters, {tokenizer.size} tokens, windows of {preset.T}")

    size = sum(len(d.encode()) for d in texts.held_out)
    loss_and_grads = loss_of(model, dropout=preset.dropout, seed=seed)

    def batches(n: int) -> Array:
        return windows(tokens, preset.B // PARTS, preset.T, seed, n)

    def evaluate(params: Any) -> dict[str, float]:
        found = bits_per_byte(replace(model, params=params), held_out, size, preset.T, stride=preset.T, most=32)
        return {"held-out bits per byte": found}

    def store(folder: Path, params: Any) -> None:
        save(folder, replace(model, params=params))

    settings = _settings(given, options, preset, going_on)
    if given.minutes is not None and not going_on:
        steps = loop.steps_in(60 * given.minutes, model.params, loss_and_grads, batches, settings, processes=useful(PARTS))
        settings = _settings(argparse.Namespace(steps=steps, out=given.out), options, preset, False)
        show(f"{steps} steps in {given.minutes:g} minutes at the speed of this moment")
    if given.check_gradients:
        loop.check_gradients(model.params, loss_and_grads, batches(0)[:1])
        show("the gradient of all parameters agrees with a complex step")
    about = {"task": "lm", "options": options, "texts": texts.sha256, "model": model.settings}
    trained = loop.train(model.params, loss_and_grads, batches, settings, folder=given.out, save=store, evaluate=evaluate,
                         about=about, resume=given.resume, show=show, processes=useful(PARTS))  # fmt: skip
    model = replace(model, params=trained.params)
    save(given.out, model)
    found = math.nan
    if not trained.interrupted:
        found, seconds = bits_per_byte(model, held_out, size, preset.T), trained.log[-1]["seconds"]
        show(f"{options['arch']}: {found:.4f} bits per byte of what was held out, after {seconds:.0f} s")
    return Pretrained(model, trained.log, trained.interrupted, found)


def _settings(given: argparse.Namespace, options: dict[str, Any], preset: Preset, going_on: bool) -> loop.Training:
    """Those of the checkpoint where the training goes on, so that the schedule is the same."""
    if going_on:
        stored = loop.Training(**checkpoints.described(given.out)["settings"])
        if given.steps not in (None, stored.steps):
            raise ValueError(f"{given.out}: the checkpoint has steps {stored.steps}, which cannot become {given.steps}")
        return stored
    steps = given.steps or preset.steps
    lr = preset.lr * (1 if options["arch"] == "transformer" else RECURRENT_LR)
    often = max(steps // 10, 1)
    return loop.Training(steps, accumulate=PARTS, lr=lr, warmup=min(steps // 20, 100), weight_decay=0.1, evaluate_every=often,
                         keep_every=often)  # fmt: skip


def baselines(texts: Texts) -> dict[str, float]:
    """What counting reaches: bits per byte of what is held out. bz2 sees nothing else; its blocks hold 900 kB."""
    train, held_out = (tokens_of(part).astype(np.int64) for part in (texts.train, texts.held_out))
    size = sum(len(d.encode()) for d in texts.held_out)
    compressed = 8 * len(bz2.compress("".join(texts.held_out).encode(), 9)) / size
    counts = -KneserNey(train, END + 1, 6).log2(held_out).sum() / size
    return {"Kneser-Ney of order 6": float(counts), "bz2": compressed}


__all__ = [
    "PRESETS",
    "Preset",
    "Pretrained",
    "baselines",
    "bits_per_byte",
    "loss_of",
    "nats",
    "pretrain",
    "run",
    "sample",
    "settings_of",
    "size_of",
]
