"""Texts to tokens and back: the tokenizer of a folder, or the bytes of UTF-8.

The library `tokenizers` cuts texts. Here stands which files of a folder mean what, and batches become arrays. Chat templates
are kept with the other files, and never run.
"""

from __future__ import annotations

import json
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npattn.models.files import as_json, read_bytes
from npattn.ops.checks import Array, check_integer

TOKENIZER, SETTINGS, SPECIAL, ADDED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
SOURCES = (TOKENIZER, "vocab.txt", "vocab.json", "merges.txt", "source.spm", "target.spm", "target_vocab.json",
           "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")  # fmt: skip
FILES = (*SOURCES, SETTINGS, SPECIAL, ADDED, "chat_template.jinja")
END = "<|endoftext|>"
# What transformers calls the special tokens of a model where its folder does not say it.
LIKE_T5 = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
LIKE_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
LIKE_LLAMA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
LIKE_ROBERTA = {**LIKE_LLAMA, "pad": "<pad>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"}
NAMES: dict[str, dict[str, str]] = {
    "bart": LIKE_ROBERTA, "bert": LIKE_BERT, "gpt2": {"bos": END, "eos": END, "unk": END}, "llama": LIKE_LLAMA,
    "gemma": {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}, "marian": LIKE_T5, "mistral": LIKE_LLAMA,
    "mt5": LIKE_T5, "npattn-copying": LIKE_ROBERTA, "qwen2": {"eos": END, "unk": END, "pad": END}, "roberta": LIKE_ROBERTA,
    "t5": LIKE_T5,
}  # fmt: skip
LLAMAS = ("llama", "mistral", "gemma")
MOST_EXTRA = 10_000  # tokens of T5 that stand for a gap; it has 100


class Special(NamedTuple):
    """The ids of special tokens; None where a tokenizer has none."""

    pad: int | None = None
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    mask: int | None = None
    sep: int | None = None
    cls: int | None = None


class Encoded(NamedTuple):
    """Texts as tokens. `npattn.keys(inside)` is the mask of the padding."""

    ids: Array  # (B, L) integers
    inside: Array  # (B, L) bool, False in padding
    types: Array  # (B, L) what BERT adds to the embeddings: 0, or 1 in the second text of a pair
    offsets: Array  # (B, L, 2) the first character and that after the last, in the text; 0, 0 of special tokens and padding
    words: Array  # (B, L) the number of the word in the text; -1 of special tokens and padding
    parts: Array  # (B, L) 0 in the text, 1 in the second text of a pair, -1 of special tokens and padding


class Tokenizer:
    """Texts to tokens and back; `npattn.models.load` gives that of a folder, `byte_tokenizer` the one without a vocabulary.

    special : `Special`, the ids of special tokens   size : how many tokens there are
    files   : by name what the files of the tokenizer hold, as they were   target : that of the texts which the model writes
    """

    def __init__(
        self, backend: Any, special: Special, files: Mapping[str, bytes], *, clean: bool = False,
        vocabulary: Mapping[str, int] | None = None, target: Tokenizer | None = None,
    ) -> None:  # fmt: skip
        self.special, self.files, self.target = special, files, target or self
        self._backend, self._clean, self._lock = backend, clean, threading.Lock()
        self._vocabulary, self._tokens = vocabulary, {i: token for token, i in (vocabulary or {}).items()}
        self.size: int = backend.get_vocab_size() if vocabulary is None else max(self._tokens) + 1

    def encode(
        self, texts: str | Sequence[str], pairs: str | Sequence[str] | None = None, *, special: bool = True,
        max_length: int | None = None, side: str = "right",
    ) -> Encoded:  # fmt: skip
        """Texts, or texts and what follows each (as question and passage), as one batch of tokens.

        special    : whether the model's special tokens are set around them
        max_length : of the tokens with the special ones; what is longer is cut at its end, the longer of a pair first
        side       : where padding stands, "right" or "left"
        Special tokens whose names are in a text become such tokens. Raises TypeError, ValueError.
        """
        inputs = self._inputs(texts, pairs)
        added = self._backend.num_special_tokens_to_add(pairs is not None) if special else 0
        if side not in ("right", "left"):
            raise ValueError(f"encode: side is {side!r}, expected 'right' or 'left'")
        if max_length is not None:
            max_length = check_integer("encode", "max_length", max_length, least=added)  # the special ones are not cut
        with self._lock:  # the length is a state of the backend
            if max_length is None:
                self._backend.no_truncation()
            else:
                self._backend.enable_truncation(max_length)
            rows = self._backend.encode_batch(inputs, add_special_tokens=special)
        B, L = len(rows), max((len(row.ids) for row in rows), default=0)
        pad = next((i for i in (self.special.pad, self.special.eos) if i is not None), 0)
        ids, types = np.full((B, L), pad, np.int64), np.zeros((B, L), np.int64)
        words, parts, offsets = np.full((B, L), -1), np.full((B, L), -1), np.zeros((B, L, 2), np.int64)
        inside = np.zeros((B, L), bool)
        for b, row in enumerate(rows):
            n = len(row.ids)
            at = slice(0, n) if side == "right" else slice(L - n, L)
            inside[b, at], types[b, at] = True, row.type_ids
            ids[b, at] = row.ids if self._vocabulary is None else [self._id(token) for token in row.tokens]
            words[b, at], parts[b, at] = (_or_minus_one(x) for x in (row.word_ids, row.sequence_ids))
            offsets[b, at] = np.reshape(row.offsets, (n, 2))
        return Encoded(ids, inside, types, offsets, words, parts)

    @staticmethod
    def _inputs(texts: Any, pairs: Any) -> list[Any]:
        single = isinstance(texts, str)
        columns = {"texts": texts} if pairs is None else {"texts": texts, "pairs": pairs}
        for name, column in columns.items():
            if isinstance(column, str) != single or not isinstance(column, (str, list, tuple)):
                expected = "a text" if single else "a text or a list of texts"
                raise TypeError(f"encode: {name} is {type(column).__name__}, expected {expected}")
            for n, text in enumerate([column] if single else column):
                if not isinstance(text, str):
                    raise TypeError(f"encode: {name}[{n}] is {type(text).__name__}, expected a text")
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ValueError(f"encode: {name}[{n}] has half of a surrogate pair, which is no character") from None
        rows = [[column] if single else list(column) for column in columns.values()]
        if len(rows) == 2 and len(rows[0]) != len(rows[1]):
            raise ValueError(f"encode: there are {len(rows[0])} texts and {len(rows[1])} pairs, expected as many")
        return rows[0] if pairs is None else list(zip(*rows, strict=True))

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        """The text of one sequence of tokens (L,). Ids beyond the vocabulary, which padded tables have, are left out."""
        row = np.asarray(ids)
        if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
            raise TypeError(f"decode: ids have shape {row.shape} and dtype {row.dtype}, expected (L,) integers: one text")
        if row.size and row.min() < 0:
            raise ValueError(f"decode: ids has {row.min()}, expected ids from 0 on")
        if self._vocabulary is None:
            text = self._backend.decode(row.tolist(), skip_special_tokens=skip_special)
        else:
            left_out = set(self.special) if skip_special else set()
            tokens = [self._tokens[i] for i in row.tolist() if i in self._tokens and i not in left_out]
            text = self._backend.decoder.decode(tokens).strip()
        return _cleaned(text) if self._clean else text

    def token(self, i: int) -> str | None:
        """How the vocabulary writes a token; None where it has none of this id."""
        found: str | None = self._backend.id_to_token(i) if self._vocabulary is None else self._tokens.get(i)
        return found

    def id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; None where it has none."""
        found: int | None = self._backend.token_to_id(token) if self._vocabulary is None else self._vocabulary.get(token)
        return found

    def _id(self, token: str) -> int:
        return (self._vocabulary or {}).get(token, self.special.unk or 0)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files of the tokenizer, as they were."""
        for name, data in self.files.items():
            Path(folder, name).write_bytes(data)


def _or_minus_one(numbers: Sequence[int | None]) -> list[int]:
    return [-1 if n is None else n for n in numbers]


def _cleaned(text: str) -> str:
    """Without the spaces that WordPiece puts before punctuation and short forms, where tokenizer_config.json asks for it."""
    for old in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(old, old.strip())
    return text


def byte_tokenizer() -> Tokenizer:
    """A token for each byte of UTF-8, ids 0 to 255, and 256 for the end of a document.

    >>> from npattn.models import byte_tokenizer
    >>> byte_tokenizer().encode("né").ids  # doctest: +SKIP
    array([[110, 195, 169]])
    """
    # The alphabet of GPT-2: bytes that print stand for themselves, the others for characters from 256 on.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    vocabulary = {chr(b if b in prints else next(others)): b for b in range(256)}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = {"id": 256, "content": END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
           "special": True}  # fmt: skip
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": [],
    }  # fmt: skip
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
             "pre_tokenizer": plain, "post_processor": None, "decoder": plain, "model": model}  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    files = {TOKENIZER: json.dumps(whole, ensure_ascii=False).encode(), SETTINGS: json.dumps(settings, indent=2).encode()}
    return tokenizer_of(files)


def load_tokenizer(place: Path, settings: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a folder, None where it has no file of one. settings : what config.json holds. Raises ValueError."""
    files = {name: read_bytes(place / name) for name in FILES if os.path.lexists(place / name)}
    return _Source(place, files, settings).tokenizer() if any(name in files for name in SOURCES) else None


def tokenizer_of(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer that files of these names and contents describe, such as one that was just trained."""
    return _Source(Path(), files, {}).tokenizer()


class _Source:
    """The files of a tokenizer, and what they say."""

    def __init__(self, place: Path, files: Mapping[str, bytes], settings: Mapping[str, Any]) -> None:
        self.place, self.files, self.settings = place, files, settings
        self.options, self.kind = self.json(SETTINGS), str(settings.get("model_type"))
        self.usual = NAMES.get(self.kind, {})

    def json(self, name: str) -> dict[str, Any]:
        return as_json(self.place / name, self.files[name]) if name in self.files else {}

    def tokenizer(self) -> Tokenizer:
        try:
            import tokenizers
        except ImportError:
            raise ImportError("tokenizers is missing, which cuts texts into tokens: pip install 'npattn[models]'") from None
        self.lib: Any = tokenizers
        ways: dict[tuple[str, ...], Callable[..., Tokenizer]] = {
            (TOKENIZER,): self.whole, ("vocab.txt",): self.word_pieces, ("source.spm", "target.spm", "vocab.json"): self.marian,
            ("spiece.model",): self.sentencepiece, ("tokenizer.model",): self.sentencepiece,
            ("vocab.json", "merges.txt"): self.byte_level,
        }  # fmt: skip
        there = [names for names in ways if set(names) <= set(self.files)]
        if not there:
            found = ", ".join(name for name in SOURCES if name in self.files)
            raise ValueError(f"{self.place}: has {found} of a tokenizer, expected {TOKENIZER}, or one of these: "
                             f"{', '.join(' with '.join(names) for names in list(ways)[1:])}")  # fmt: skip
        try:
            return ways[there[0]](*there[0])
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises bare Exceptions, and panics of Rust, which are not even those
            raise ValueError(f"{self.place / there[0][0]}: {error}") from None

    # One for each kind of folder; the arguments are the names of its files.

    def whole(self, name: str) -> Tokenizer:
        return self.finished(self.lib.Tokenizer.from_str(self.files[name].decode()))

    def word_pieces(self, name: str) -> Tokenizer:
        """Of BERT."""
        lines = self.files[name].decode().split("\n")
        vocabulary = {line.rstrip("\r"): n for n, line in enumerate(lines[:-1] if not lines[-1] else lines)}
        if not vocabulary:
            raise ValueError("has no tokens")
        self.usual = LIKE_BERT
        unk, cls, sep = (self.name_of(role) for role in ("unk", "cls", "sep"))
        backend = self.lib.Tokenizer(self.lib.models.WordPiece(vocabulary, unk_token=unk))
        backend.normalizer = self.lib.normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=self.options.get("tokenize_chinese_chars", True),
            strip_accents=self.options.get("strip_accents"), lowercase=self.options.get("do_lower_case", True))  # fmt: skip
        backend.pre_tokenizer = self.lib.pre_tokenizers.BertPreTokenizer()
        backend.decoder = self.lib.decoders.WordPiece(prefix="##")
        return self.finished(backend, f"{cls}:0 $A:0 {sep}:0", f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1", (cls, sep))

    def byte_level(self, vocabulary: str, merges: str) -> Tokenizer:
        """Of GPT-2, RoBERTa and BART."""
        if self.kind not in ("gpt2", "roberta", "bart"):
            raise ValueError(f"is cut in the way of a model of type {self.kind}, which only {TOKENIZER} says")
        lines = [line for line in self.files[merges].decode().split("\n") if line and not line.startswith("#version")]
        pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines]
        backend = self.lib.Tokenizer(self.lib.models.BPE(self.json(vocabulary), pairs, continuing_subword_prefix="",
                                                         end_of_word_suffix="", fuse_unk=False))  # fmt: skip
        space = self.options.get("add_prefix_space", False)
        backend.pre_tokenizer = self.lib.pre_tokenizers.ByteLevel(add_prefix_space=space)
        backend.decoder = self.lib.decoders.ByteLevel()
        if self.kind == "gpt2":
            return self.finished(backend, *self.around("bos", "eos", default=False))
        self.add_tokens(backend)
        sep, cls = (self.name_of(role) for role in ("sep", "cls"))
        ends = [(name, backend.token_to_id(name)) for name in (sep, cls)]
        backend.post_processor = self.lib.processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=space)
        return self.finished(backend)

    def sentencepiece(self, name: str) -> Tokenizer:
        """Of T5, Llama and Gemma."""
        backend = self.from_pieces(name)
        if self.kind in ("t5", "mt5"):
            extra = self.options.get("extra_ids", 100)
            if not 0 <= extra <= MOST_EXTRA:
                raise ValueError(f"{SETTINGS} has extra_ids {extra}, expected 0 to {MOST_EXTRA}")
            backend.add_special_tokens([f"<extra_id_{n}>" for n in reversed(range(extra))])
            eos = self.name_of("eos")
            return self.finished(backend, f"$A {eos}", f"$A {eos} $B {eos}", (eos,))
        return self.finished(backend, *self.around("bos", "eos", default=self.kind in LLAMAS))

    def marian(self, source: str, target: str, vocabulary: str) -> Tokenizer:
        """Of Marian: a model of sentencepiece cuts, and the ids are those of a vocabulary of its own."""
        eos, separate = self.name_of("eos"), self.options.get("separate_vocabs", False)
        codes = [token for token in self.json(vocabulary) if token.startswith(">>") and token.endswith("<<")]  # of languages

        def one(pieces: str, names: str, written: Tokenizer | None = None) -> Tokenizer:
            backend = self.from_pieces(pieces)
            backend.add_special_tokens(codes)
            ids = self.json(names)
            return self.finished(backend, f"$A {eos}", f"$A $B {eos}", (eos,), vocabulary=ids, target=written)

        return one(source, vocabulary, one(target, "target_vocab.json" if separate else vocabulary))

    def around(self, first: str, last: str, default: bool) -> tuple[str, str, tuple[str, ...]]:
        """Templates with the first token where tokenizer_config.json asks for it (or ``default``), and the last likewise."""
        ends = [role for role, usual in ((first, default), (last, False)) if self.options.get(f"add_{role}_token", usual)]
        names = {role: self.name_of(role) for role in ends}
        a, b = (" ".join(f"{name}:{n}" for name in (names.get(first), text, names.get(last)) if name)
                for n, text in enumerate(("$A", "$B")))  # fmt: skip
        return a, f"{a} {b}", tuple(names.values())

    def from_pieces(self, name: str) -> Any:
        """What encodes as sentencepiece does with this file. Kudo and Richardson 2018."""
        lib, model = self.lib, _SentencePiece(self.files[name])
        pieces = model.pieces
        own = [piece for piece, _, kind in pieces if kind == USER]
        if model.unigram:
            scored = [(piece, score) for piece, score, _ in pieces]
            backend = lib.Tokenizer(lib.models.Unigram(scored, model.unk, byte_fallback=model.bytes))
        else:
            backend = lib.Tokenizer(lib.models.BPE({piece: n for n, (piece, _, _) in enumerate(pieces)}, _merges(pieces),
                                                   unk_token=pieces[model.unk][0], fuse_unk=True, byte_fallback=model.bytes,
                                                   ignore_merges=bool(own)))  # fmt: skip
        backend.add_special_tokens([lib.AddedToken(p, normalized=False) for p, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
        steps = [lib.normalizers.Precompiled(model.normal)] if model.normal else []
        if self.kind in ("t5", "mt5"):  # white space ends a word, so that offsets and words are those of transformers
            space = lib.pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)
            backend.normalizer = lib.normalizers.Sequence(steps)
            backend.pre_tokenizer = lib.pre_tokenizers.Sequence([lib.pre_tokenizers.WhitespaceSplit(), space])
            backend.decoder = lib.decoders.Metaspace(SPACE, prepend_scheme="always", split=True)
            return backend
        if model.trims:
            steps += [lib.normalizers.Replace(lib.Regex(a), b) for a, b in ((r"\A +| +\z", ""), (" {2,}", " "))]
        if model.escapes:
            steps.append(lib.normalizers.Replace(" ", SPACE))
        always = self.kind not in LLAMAS or self.options.get("legacy") is True
        if model.prefix and always:  # also before a text that begins with this character
            steps.append(lib.normalizers.Replace(lib.Regex(rf"\A{SPACE}"), SPACE * 2))
        backend.normalizer = lib.normalizers.Sequence(steps)
        cuts = []
        if model.prefix:
            cuts.append(lib.pre_tokenizers.Metaspace(SPACE, prepend_scheme="always" if always else "first", split=False))
        if own:
            longest_first = "|".join(re.escape(piece) for piece in sorted(own, key=len, reverse=True))
            cuts.append(lib.pre_tokenizers.Split(lib.Regex(longest_first), behavior="isolated"))
        if cuts:
            backend.pre_tokenizer = lib.pre_tokenizers.Sequence(cuts)
        joins = [lib.decoders.Replace(SPACE, " "), lib.decoders.ByteFallback(), lib.decoders.Fuse()]
        strip = [lib.decoders.Strip(" ", ALL if model.trims else 1, 0)] if model.prefix else []
        backend.decoder = lib.decoders.Sequence([*joins, *strip])
        return backend

    # The special tokens.

    def named(self) -> dict[str, Any]:
        """By role the name of each special token that the files have: a text, or an object with ``content``."""
        older = {} if "added_tokens_decoder" in self.options else self.json(SPECIAL)  # which then wins, as in transformers
        given = {**self.options, **older}
        said = {role: given[f"{role}_token"] for role in Special._fields if f"{role}_token" in given}
        return said if TOKENIZER in self.files else {**self.usual, **said}

    def name_of(self, role: str) -> str:
        name = _content(self.named().get(role, self.usual.get(role)))
        if name is None:
            raise ValueError(f"{SETTINGS} has no {role}_token")
        return name

    def add_tokens(self, backend: Any) -> None:
        """Adds what the files name and the vocabulary does not have, or has as no token of its own, as transformers does."""
        order = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # of transformers: the order gives ids
        named = [token for role in order if (token := self.named().get(role)) is not None]
        ids = self.options.get("added_tokens_decoder") or {i: token for token, i in self.json(ADDED).items()}
        named_texts = {_content(token) for token in named}
        extra = [x for key in ("extra_special_tokens", "additional_special_tokens") for x in _listed(self.options.get(key))]
        there = {token.content for token in backend.get_added_tokens_decoder().values()}
        numbered = [ids[i] for i in sorted(ids, key=int)]
        for token, special in [*((x, _content(x) in named_texts) for x in numbered), *((x, True) for x in (*named, *extra))]:
            text = _content(token)
            if text is None or text in there:
                continue
            how = {key: token.get(key, False) for key in ("lstrip", "rstrip", "single_word")} if isinstance(token, dict) else {}
            how["special"] = special or bool(isinstance(token, dict) and token.get("special"))
            how["normalized"] = token.get("normalized", not special) if isinstance(token, dict) else not special
            backend.add_tokens([self.lib.AddedToken(text, **how)])
            there.add(text)

    def finished(self, backend: Any, one: str = "", two: str = "", around: Sequence[str] = (), **options: Any) -> Tokenizer:
        """one, two : what stands around a text, and around a pair; as the backend has it unless given"""
        backend.no_padding()
        self.add_tokens(backend)
        if one:
            ids = [(token, backend.token_to_id(token)) for token in around]
            backend.post_processor = self.lib.processors.TemplateProcessing(single=one, pair=two, special_tokens=ids)
        clean = self.options.get("clean_up_tokenization_spaces", False) is True
        clean = clean and type(backend.model).__name__ != "BPE"  # there it would take spaces of the text
        made = Tokenizer(backend, Special(), self.files, clean=clean, **options)
        names = {**self.usual, **self.named()}
        found = {role: made.id(name) for role in names if (name := _content(names[role])) is not None}
        for role in ("pad", "bos", "eos"):  # what config.json says of the ids, where no file names the token
            i = self.settings.get(f"{role}_token_id")
            if role not in names and type(i) is int and made.token(i) is not None:
                found[role] = i
        made.special = Special(**found)
        return made


def _content(token: Any) -> str | None:
    """The text of a special token, which files write as a text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{token!r} is no name of a special token")
    return text


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens or ())


# --- files of sentencepiece --------------------------------------------------------------------------------------------------

SPACE = "\u2581"
ALL = 1 << 30
LONGEST = 1000  # characters of a piece; sentencepiece makes pieces of 16 at most unless it is told otherwise
UNKNOWN, CONTROL, USER = 2, 3, 4  # kinds of pieces; 1 is a usual one


class _SentencePiece:
    """What a model of sentencepiece says: the fields of its sentencepiece_model.proto that are needed here."""

    def __init__(self, data: bytes) -> None:
        whole = list(_protobuf(data))
        pieces = [dict(_protobuf(value)) for number, value in whole if number == 1]
        trainer, normalizer = (dict(_protobuf(dict(whole).get(number, b""))) for number in (2, 3))
        self.pieces = [(x[1].decode(), struct.unpack("<f", x.get(2, b"\0\0\0\0"))[0], x.get(3, 1)) for x in pieces]
        self.unigram, self.bytes, self.unk = trainer.get(3, 1) == 1, bool(trainer.get(35, 0)), trainer.get(40, 0)
        self.normal = normalizer.get(2, b"")  # its table of replacements
        self.prefix, self.trims, self.escapes = (bool(normalizer.get(number, 1)) for number in (3, 4, 5))
        if trainer.get(3, 1) not in (1, 2) or not self.pieces or max(len(x) for x, _, _ in self.pieces) > LONGEST:
            raise ValueError("is no model of sentencepiece of unigrams or byte pairs")


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: (number, value), bytes unless they are an integer. Raises ValueError."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("ends within a field")
            value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
            if not data[at - 1] & 128:
                return value

    while at < len(data):
        number, form = divmod(integer(), 8)
        if form == 0:
            yield number, integer()
            continue
        if form not in (1, 2, 5):
            raise ValueError("is no model of sentencepiece")
        size = integer() if form == 2 else {1: 8, 5: 4}[form]
        if at + size > len(data):
            raise ValueError("ends within a field")
        yield number, data[at : at + size]
        at += size


def _merges(pieces: Sequence[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The pairs of pieces that are a piece, the best first."""
    ranks = {piece: (-score, n) for n, (piece, score, kind) in enumerate(pieces) if kind == 1}
    pairs = [(rank, n, len(piece) - n, piece) for piece, rank in ranks.items() for n in range(1, len(piece))
             if piece[:n] in ranks and piece[n:] in ranks]  # fmt: skip
    return [(piece[:n], piece[n:]) for _, n, _, piece in sorted(pairs)]


__all__ = ["Encoded", "Special", "Tokenizer", "byte_tokenizer", "load_tokenizer", "tokenizer_of"]
