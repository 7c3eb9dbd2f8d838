"""``npattn train translation``: names of countries, places, languages and currencies from English into another language.

The pairs are those of the catalogues of pycountry that differ: most names are the same in both languages, and copying would
be right for them. No source string of the held-out part occurs in training. The package is LGPL: it is read where it is
installed, and nothing of it stands here.

The model has BART's shape, from random weights, and reads and writes characters or subwords.
"""

from __future__ import annotations

import argparse
import gettext
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from npattn.models.generation import Generation
from npattn.models.tokens import SETTINGS, TOKENIZER, Tokenizer, tokenizer_of
from npattn.training import checkpoints
from npattn.training.initial import initial
from npattn.training.loop import Training
from npattn.training.text_to_text import (
    Pair,
    Pairs,
    copying_settings,
    fit,
    held_out_loss,
    interval,
    loss_and_grads_of,
    needs,
    settings_of,
    split,
    written,
)

BEGIN, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"  # 0, 1, 2 and 3, as in BART
HELD_OUT = 500
LONGEST = (48, 64)  # tokens


def catalogues(language: str = "fr") -> list[Pair]:
    """The names of pycountry that differ in a language, each with its catalogue. Raises ImportError, ValueError."""
    found = importlib.util.find_spec("pycountry")
    if found is None or found.origin is None:
        raise needs("pycountry", "whose catalogues are the texts")
    place = Path(found.origin).parent / "locales"
    files = sorted((place / language / "LC_MESSAGES").glob("*.mo"))
    if not files:
        there = ", ".join(sorted(p.name for p in place.iterdir() if p.is_dir()))
        raise ValueError(f"translation: language is {language!r}, expected one of {there}")
    pairs = dict[tuple[str, str], Pair]()
    for path in files:
        with path.open("rb") as file:
            texts = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]  # no public way lists them
        for source, target in texts.items():
            if isinstance(source, str) and source and source != target:
                pairs.setdefault((source, target), Pair(source, target, path.stem))
    return list(pairs.values())


def subwords(texts: Sequence[str], size: int) -> Tokenizer:
    """A tokenizer of so many subwords, learned from the texts; as few as there are characters gives characters.

    Sennrich et al. 2016. What stands around a text is that of BART: </s> at its end.
    """
    try:
        import tokenizers as lib
    except ImportError:
        raise ImportError("tokenizers is missing, which cuts texts into tokens: pip install 'npattn[models]'") from None
    backend = lib.Tokenizer(lib.models.BPE(unk_token=UNKNOWN))
    space = lib.pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.pre_tokenizer = lib.pre_tokenizers.Sequence([space, lib.pre_tokenizers.Punctuation("isolated")])
    backend.decoder = lib.decoders.Metaspace(prepend_scheme="always")
    trainer = lib.trainers.BpeTrainer(vocab_size=size, special_tokens=[BEGIN, PAD, END, UNKNOWN], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = lib.processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, backend.token_to_id(END))])  # fmt: skip
    roles = {"bos_token": BEGIN, "pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    return tokenizer_of({TOKENIZER: backend.to_str().encode(), SETTINGS: json.dumps(settings, indent=2).encode()})


def scores(sources: Sequence[str], targets: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """chrF from 0 to 100 (Popovic 2015, by sacrebleu), and the share of texts that are exactly right, in percent."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise needs("sacrebleu", "which has chrF") from None
    exact = [100.0 * (a == b) for a, b in zip(targets, found, strict=True)]
    low, high = interval(exact)
    return {"chrf": float(CHRF().corpus_score(list(found), [list(targets)]).score), "exact": float(np.mean(exact)),
            "exact from": low, "exact to": high}  # fmt: skip


class Task:
    """The data, the model and how it is trained; ``npattn train translation`` and the benchmarks use it.

    bpe : how many subwords   copying : without it the model is a plain BART, which transformers opens
    """

    minutes = 10.0

    def __init__(
        self, pairs: Sequence[Pair], *, seed: int = 0, bpe: int = 1000, copying: bool = True, held_out: int = HELD_OUT,
        width: int = 128, layers: tuple[int, int] = (2, 2), batch: int = 64, dropout: float = 0.2,
        label_smoothing: float = 0.1,
    ) -> None:  # fmt: skip
        self.train_pairs, self.test_pairs = split(pairs, held_out, seed, key=lambda p: p.source)
        self.tokenizer = subwords([text for p in self.train_pairs for text in p[:2]], bpe)
        end = self.tokenizer.special.eos or 0
        ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": end, "decoder_start_token_id": end}
        settings = settings_of(self.tokenizer.size, width, layers, max(width // 32, 1), max(LONGEST), **ids)
        settings = copying_settings(settings, self.tokenizer.size) if copying else settings
        self.model = initial(settings, seed, tokenizer=self.tokenizer)
        self.model = replace(self.model, generation={**ids, "max_length": LONGEST[1]})
        made: dict[str, Any] = {"start": end, "end": end, "batch": batch, "seed": seed}
        self.batches = Pairs(self.train_pairs, self.tokenizer, LONGEST, **made)
        self.held_out = Pairs(self.test_pairs, self.tokenizer, LONGEST, **made)
        self.loss_and_grads = loss_and_grads_of(self.model, dropout=dropout, label_smoothing=label_smoothing, seed=seed)

    def frozen(self, name: str) -> bool:
        return False

    def training(self, steps: int, **more: Any) -> Training:
        options = {"lr": 2e-3, "warmup": min(100, steps // 5), "least_lr": 1e-5, "weight_decay": 0.05, "betas": (0.9, 0.98)}
        often = max(steps // 6, 1)
        return Training(steps=steps, **{**options, "evaluate_every": often, "keep_every": often, **more})

    def evaluate(self, params: Any) -> dict[str, float]:
        return {"held-out loss": held_out_loss(self.model, params, self.held_out)}

    def translations(self, params: Any, beams: int = 4) -> list[str]:
        end = self.tokenizer.special.eos
        settings = Generation(max_length=LONGEST[1], eos=end or 0, pad=self.tokenizer.special.pad, num_beams=beams)
        return written(self.model, params, self.held_out, settings)

    def scores(self, found: Sequence[str]) -> dict[str, float]:
        return scores([p.source for p in self.test_pairs], [p.target for p in self.test_pairs], found)

    def baseline(self) -> dict[str, float]:
        """Copying the source."""
        return self.scores([p.source for p in self.test_pairs])


OPTIONS = {"seed": 0, "language": "fr", "bpe": 1000, "copying": True}


def run(given: argparse.Namespace, show: Callable[[str], None]) -> bool:
    """What ``npattn train translation`` does; see `npattn.arguments.TASKS`."""
    options = checkpoints.options_of(given.out, vars(given), OPTIONS, given.resume)
    task = Task(catalogues(options["language"]), **{name: options[name] for name in ("seed", "bpe", "copying")})
    show(f"{len(task.train_pairs)} pairs to train with, {len(task.test_pairs)} held out; {task.model.size:,} parameters")
    trained = fit(task, given, options, show)
    if trained.interrupted:
        return False
    found = task.translations(trained.params)
    for name, x in (("copying the source", task.baseline()), ("the model", task.scores(found))):
        show(f"{name}: chrF {x['chrf']:.1f}, exact {x['exact']:.1f} % ({x['exact from']:.1f} to {x['exact to']:.1f})")
    for pair, text in list(zip(task.test_pairs, found, strict=True))[:8]:
        show(f"  {pair.source} -> {text}" + ("" if text == pair.target else f"   (expected {pair.target})"))
    return True


__all__ = ["Task", "catalogues", "run", "scores", "subwords"]
