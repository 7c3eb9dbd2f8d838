"""Texts to train on: the English prose that every Python carries, or files. Nothing is imported or run: sources are parsed.

>>> texts = of_files([__file__])
>>> texts.name, len(texts.train[0]) > 18 * len(texts.held_out[0])
('texts.py', True)
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npattn.models.tokens import byte_tokenizer, tokenizer_of
from npattn.ops.checks import Array

SHARE = 20  # one of so many documents is held out
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__", "lib2to3")
END = 256  # ends a document where tokens are bytes: `npattn.models.byte_tokenizer`


class Texts(NamedTuple):
    """Documents, of which some are held out of training."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of all documents and of how they are split."""
        whole = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in (*part, ""):
                whole.update(len(document).to_bytes(8, "little") + document.encode())
        return whole.hexdigest()

    def described(self) -> str:
        sizes = [f"{sum(len(d.encode()) for d in part):,} bytes" for part in (self.train, self.held_out)]
        return f"{self.name}: {sizes[0]} to train on, {sizes[1]} held out, sha256 {self.sha256[:16]}"


def of_python() -> Texts:
    """The topics of ``help()`` and the docstrings of the standard library, some 2 MB; a module is one document.

    A paragraph that occurs twice stays where it is first, so that what is held out was not seen. Which documents are held out
    is a function of their names.
    """
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in _documents(Path(sysconfig.get_paths()["stdlib"])):
        paragraphs = []
        for paragraph in text.split("\n\n"):
            if (key := " ".join(paragraph.split())) and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
        if paragraphs:
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            parts[number % SHARE == 0].append("\n\n".join(paragraphs) + "\n")
    return Texts(f"the prose of Python {platform.python_version()}", tuple(parts[0]), tuple(parts[1]))


def _documents(library: Path) -> Iterator[tuple[str, str]]:
    """Names and texts, in the order of the names."""
    topics = library / "pydoc_data" / "topics.py"
    if topics.exists():
        for node in ast.parse(topics.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                yield from sorted((f"topic {name}", text) for name, text in ast.literal_eval(node.value).items())
    for path in sorted(library.rglob("*.py")):
        where = path.relative_to(library)
        if not any(part in LEFT_OUT for part in where.parts) and path != topics:
            yield where.as_posix(), "\n\n".join(docstrings(path))


def docstrings(path: Path) -> list[str]:
    """Those of a module, its classes and functions, in order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in a text
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds))
    texts = (inspect.cleandoc(text) for text in found if text)
    return [text for text in texts if not any("\ud800" <= c <= "\udfff" for c in text)]


def of_files(paths: Sequence[str | os.PathLike[str]]) -> Texts:
    """Files in UTF-8, each a document; its last twentieth, from the end of a line on, is held out. Raises ValueError."""
    train, held_out = list[str](), list[str]()
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        at = text.find("\n", len(text) - len(text) // SHARE) + 1 or len(text) - len(text) // SHARE
        train.append(text[:at])
        held_out.append(text[at:])
    return Texts(", ".join(Path(path).name for path in paths), tuple(train), tuple(d for d in held_out if d))


def tokens_of(documents: Sequence[str], tokenizer: Any = None) -> Array:
    """All documents as one row of tokens, with the end of a document behind each. Without a tokenizer a token is a byte."""
    if tokenizer is None:
        rows = [np.frombuffer(d.encode(), np.uint8).astype(np.int32) for d in documents]
        end = END
    else:
        rows = [tokenizer.encode(d, special=False).ids[0].astype(np.int32) for d in documents]
        end = tokenizer.special.eos
    return np.concatenate([x for row in rows for x in (row, np.array([end], np.int32))])


def train_subwords(documents: Sequence[str], size: int) -> Any:
    """A tokenizer of byte pairs, learned from documents: Sennrich et al. 2016. size : of the vocabulary, from 257 on."""
    if size < END + 1:
        raise ValueError(f"train_subwords: size is {size}, expected at least {END + 1}: every byte, and the end of a document")
    try:
        import tokenizers as lib
    except ImportError:
        raise ImportError("tokenizers is missing, which learns subwords: pip install 'npattn[models]'") from None
    backend = lib.Tokenizer(lib.models.BPE())
    backend.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = lib.decoders.ByteLevel()
    bytes_ = byte_tokenizer()
    end = bytes_.token(END)
    trainer = lib.trainers.BpeTrainer(vocab_size=size, special_tokens=[end], show_progress=False,
                                      initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    backend.train_from_iterator(documents, trainer)
    files = {**bytes_.files, "tokenizer.json": backend.to_str().encode()}
    return tokenizer_of(files)


def windows(tokens: Array, B: int, T: int, seed: int, n: int) -> Array:
    """The batch with number n: (B, T + 1) tokens at places that are drawn. Raises ValueError where there are too few."""
    if len(tokens) <= T:
        raise ValueError(f"windows: there are {len(tokens)} tokens, expected more than T={T}")
    places = np.random.default_rng((seed, n)).integers(0, len(tokens) - T, B)
    return np.asarray(tokens[places[:, None] + np.arange(T + 1)])


class Packed(NamedTuple):
    """Sequences of several lengths in rows of one length: what a batch needs so that none of them sees another."""

    ids: Array  # (B, T)
    numbers: Array  # (B, T) of the sequence; -1 in padding. mask=npattn.segments(numbers, numbers) keeps them apart
    positions: Array  # (B, T) in the sequence
    targets: Array  # (B, T) the next token of the sequence
    counts: Array  # (B, T) bool, whether there is a next one: the mask of `npattn.cross_entropy`


def packed_rows(sequences: Sequence[Array], T: int) -> Packed:
    """Puts sequences of tokens into as few rows as going through them from the longest on gives. Raises ValueError.

    >>> rows = packed_rows([np.array([1, 2, 3]), np.array([4, 5, 6, 7]), np.array([8, 9])], T=6)
    >>> rows.ids.tolist(), rows.numbers.tolist()
    ([[4, 5, 6, 7, 8, 9], [1, 2, 3, 0, 0, 0]], [[1, 1, 1, 1, 2, 2], [0, 0, 0, -1, -1, -1]])
    """
    longest = max(map(len, sequences), default=0)
    if longest > T:
        raise ValueError(f"packed_rows: a sequence has {longest} tokens, expected at most T={T}")
    rows, filled = list[list[int]](), list[int]()
    for n in sorted(range(len(sequences)), key=lambda n: -len(sequences[n])):
        at = next((b for b, used in enumerate(filled) if used + len(sequences[n]) <= T), len(rows))
        if at == len(rows):
            rows.append([])
            filled.append(0)
        rows[at].append(n)
        filled[at] += len(sequences[n])
    ids, positions, targets = (np.zeros((len(rows), T), np.int64) for _ in range(3))
    numbers, counts = np.full((len(rows), T), -1), np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        start = 0
        for n in row:
            stop = start + len(sequences[n])
            ids[b, start:stop], numbers[b, start:stop], positions[b, start:stop] = sequences[n], n, np.arange(stop - start)
            targets[b, start : stop - 1], counts[b, start : stop - 1] = sequences[n][1:], True
            start = stop
    return Packed(ids, numbers, positions, targets, counts)


__all__ = [
    "END",
    "Packed",
    "Texts",
    "docstrings",
    "of_files",
    "of_python",
    "packed_rows",
    "tokens_of",
    "train_subwords",
    "windows",
]
