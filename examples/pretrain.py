"""Pre-training: a small Transformer learns to write from a text, and then writes.

    python examples/pretrain.py DIR [FILE...]

Without a file it learns from the English prose that Python carries. The model is in DIR then: `npattn run text-generation` and
transformers open it. If it is interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from npattn.models import byte_tokenizer, save
from npattn.training.initial import initial
from npattn.training.lm import PRESETS, Preset, bits_per_byte, loss_of, sample, settings_of
from npattn.training.loop import Training, train
from npattn.training.texts import END, Texts, of_files, of_python, tokens_of, windows

SEED = 0


def pretrain(folder: Path, texts: Texts, preset: Preset, steps: int) -> str:
    """Trains, saves the model, and returns a text that it draws."""
    tokenizer = byte_tokenizer()
    model = initial(settings_of("transformer", preset, tokenizer.size, END), SEED, tokenizer=tokenizer)
    tokens, held_out = tokens_of(texts.train), tokens_of(texts.held_out)

    def batches(n):
        return windows(tokens, preset.B, preset.T, SEED, n)  # (B, T + 1)

    settings = Training(steps, lr=preset.lr, warmup=steps // 20, keep_every=max(steps // 10, 1))
    trained = train(model.params, loss_of(model), batches, settings, folder=folder, about={"texts": texts.sha256}, resume=True,
                    show=print)  # fmt: skip
    model = replace(model, params=trained.params)
    save(folder, model)
    size = sum(len(document.encode()) for document in texts.held_out)
    print(f"bits per byte of what was held out: {bits_per_byte(model, held_out, size, preset.T):.3f}")
    return sample(model, "The ", tokens=200, seed=SEED)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    texts = of_files(sys.argv[2:]) if sys.argv[2:] else of_python()
    print(pretrain(Path(sys.argv[1]), texts, PRESETS["tiny"], PRESETS["tiny"].steps))
