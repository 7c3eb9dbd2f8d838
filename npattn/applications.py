"""What people do with a model: `pipeline`, and what ``npattn run`` does.

>>> from npattn import pipeline
>>> generator = pipeline("text-generation", model="DIR")  # doctest: +SKIP
>>> generator("Once upon a time", max_new_tokens=20)[0]["generated_text"]  # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from npattn.models.encoders import TextHeadParams, text_head_forward
from npattn.models.folder import load
from npattn.models.generation import NAMES, Generation, generate, stream
from npattn.models.model import Model
from npattn.ops.activations import sigmoid
from npattn.ops.checks import Array, check_integer
from npattn.ops.linear import LinearParams
from npattn.ops.masks import keys
from npattn.ops.softmax import softmax

POOLINGS = {"none": None, "cls": "first", "mean": "mean", "last": "last"}
WINDOW, OVERLAP = 384, 128  # tokens of a question and a part of its context, and of two parts, as in transformers 4


def pipeline(task: str, model: str | os.PathLike[str] | Model) -> Any:
    """A function of texts for a task, with the arguments and results of the pipelines of Hugging Face transformers 4.

    Settings of generation that are not given come from the folder. Where the folder says nothing, text is greedy and has 20 new
    tokens, as `generate` has it; the pipeline of transformers 5 samples 256.

    task  : "feature-extraction", "text-generation", "summarization", "translation", "sentiment-analysis" (or
            "text-classification") or "question-answering"; of a model for several languages, such as
            T5, also "translation_en_to_fr" and so on
    model : a folder of Hugging Face, or a `npattn.models.Model`
    Raises TypeError, ValueError, where the model is none for the task, too.
    """
    name = "translation" if re.fullmatch("translation_[a-z]+_to_[a-z]+", task) else task
    if name not in TASKS:
        raise ValueError(f"pipeline: task is {task!r}, expected one of {', '.join(TASKS)}")
    found = model if isinstance(model, Model) else load(model)
    if found.tokenizer is None:
        raise ValueError("pipeline: the folder of the model has no tokenizer, expected one: texts have to become tokens")
    cls, kinds = TASKS[name]
    if found.kind not in kinds:
        raise ValueError(f"pipeline: {task} needs a model that is a {' or '.join(kinds)}, got a {found.kind}")
    return cls(found, task) if issubclass(cls, TextToText) else cls(found)


def _texts(texts: Any) -> list[str]:
    """One text or several, as a list."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts):
        raise TypeError(f"texts are {type(texts).__name__}, expected a text or a list of texts")
    return list(texts)


class FeatureExtraction:
    """The states of texts.

    >>> extractor = pipeline("feature-extraction", model="DIR")  # doctest: +SKIP
    >>> extractor(["one text", "another"], pooling="mean", normalize=True)  # doctest: +SKIP
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(
        self, texts: str | Sequence[str], *, pooling: str | None = None, normalize: bool | None = None, batch_size: int = 32,
        max_length: int | None = None,
    ) -> list[Array]:  # fmt: skip
        """For each text the states of its tokens (L, M), or with a pooling one vector (M,).

        pooling    : "none" (tokens, with the special ones), "cls", "mean" or "last"; what sentence-transformers wrote into the
                     folder unless given, and "none" where it wrote nothing
        normalize  : whether a vector has length 1; likewise
        max_length : of the tokens; longer texts are cut. The longest that the model takes unless given
        """
        c = self.model.config
        if pooling is None:
            pooling = next(k for k, v in POOLINGS.items() if v == c.pooling)
        if pooling not in POOLINGS:
            raise ValueError(f"feature-extraction: pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
        if normalize and pooling == "none":
            raise ValueError("feature-extraction: got normalize and pooling 'none', expected a pooling: a vector for each text")
        check_integer("feature-extraction", "batch_size", batch_size, least=1)
        pool = POOLINGS[pooling]
        config = c if pool is None else replace(c, pooling=pool, normalize=c.normalize if normalize is None else normalize)
        found: dict[int, Array] = {}
        rows = _texts(texts)
        for some, encoded in _batches(self.model, rows, batch_size, max_length):
            y = self.states(encoded)
            if pool is not None:
                y, _ = text_head_forward(y, TextHeadParams(), config, inside=encoded.inside)
            found |= {n: y[b] if pool is not None else y[b][encoded.inside[b]] for b, n in enumerate(some)}
        return [found[n] for n in range(len(rows))]

    @property
    def pools(self) -> bool:
        """Whether the folder says how states are pooled."""
        return self.model.config.pooling is not None

    def states(self, encoded: Any) -> Array:
        """The states of a batch of tokens, (B, L, M), before any head."""
        return _output(replace(self.model, params=self.model.params._replace(head=None)), encoded)


class TextGeneration:
    """Continues texts.

    >>> generator = pipeline("text-generation", model="DIR")  # doctest: +SKIP
    >>> generator("Once upon a time", do_sample=True, top_p=0.9, seed=1)[0]["generated_text"]  # doctest: +SKIP
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(
        self, texts: str | Sequence[str], *, return_full_text: bool = True, seed: int | None = None, batch_size: int = 8,
        **settings: Any,
    ) -> list[Any]:  # fmt: skip
        """[{"generated_text": ...}, ...] for a text, and a list of such lists for several.

        settings : of `npattn.models.generation.Generation`, such as max_new_tokens; else those of generation_config.json
        return_full_text : with the prompt before it   seed : of sampling
        """
        rows, s, found = _texts(texts), _settings(self.model, settings), list[Any]()
        rng = np.random.default_rng(seed)
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            encoded = self.encoded(some, s)
            ids = generate(self.model.decode, encoded.ids, s, inside=encoded.inside, rng=rng, text=self.model.tokenizer.decode)
            n = s.num_return_sequences
            for b, prompt in enumerate(some):
                old = encoded.ids[b, encoded.inside[b]]
                new = [self.behind(old, ids[row, encoded.ids.shape[1] :]) for row in range(b * n, (b + 1) * n)]
                found.append([{"generated_text": prompt * return_full_text + text} for text in new])
        return found[0] if isinstance(texts, str) else found

    def stream(self, text: str, *, seed: int | None = None, **settings: Any) -> Iterator[str]:
        """The new text, in pieces, as soon as each is known: not with beams."""
        s = _settings(self.model, settings)
        encoded = self.encoded([text], s)
        columns = stream(self.model.decode, encoded.ids, s, rng=np.random.default_rng(seed), text=self.model.tokenizer.decode)
        yield from pieces((int(column[0]) for column in columns), lambda new: self.behind(encoded.ids[0], new))

    def encoded(self, texts: list[str], settings: Generation) -> Any:
        """The tokens of prompts. Raises ValueError where one has none, or leaves no position for what follows."""
        found = self.model.tokenizer.encode(texts, side="left")
        if not found.inside.any(-1).all():
            n = int(found.inside.any(-1).argmin())
            raise ValueError(f"text-generation: text {n} has no tokens, expected some to continue")
        most, L, more = longest(self.model), found.ids.shape[1], settings.max_new_tokens
        if more is None:
            more = 20 if settings.max_length is None else max(settings.max_length - L, 0)
        if most is not None and L + more > most:
            raise ValueError(f"text-generation: a prompt of {L} tokens and {more} more need {L + more} positions, expected at "
                             f"most {most}: the model has no more")  # fmt: skip
        return found

    def behind(self, old: Array, new: Array) -> str:
        """The text of new tokens behind old ones. Alone they would lose a space at their beginning with some tokenizers."""
        decode = self.model.tokenizer.decode
        before, whole = decode(old), decode(np.concatenate([old, new]))
        return str(whole[len(before) :] if whole.startswith(before) else decode(new))


class TextToText:
    """What an encoder-decoder writes about a text: a summary, or a translation.

    >>> summarizer = pipeline("summarization", model="DIR")  # doctest: +SKIP
    >>> summarizer("A long text ...", max_length=50, min_length=25)[0]["summary_text"]  # doctest: +SKIP
    """

    def __init__(self, model: Model, task: str) -> None:
        self.model, self.key = model, "summary_text" if task == "summarization" else "translation_text"
        given = model.settings.get("task_specific_params") or {}
        special: Mapping[str, Any] = given.get(task) or next((x for n, x in given.items() if n.startswith(f"{task}_")), {})
        self.prefix = str(special.get("prefix", model.settings.get("prefix") or ""))
        self.usual = {name: x for name, x in special.items() if name in Generation.__dataclass_fields__}

    def __call__(
        self, texts: str | Sequence[str], *, truncation: bool = False, seed: int | None = None, batch_size: int = 8,
        **settings: Any,
    ) -> list[Any]:  # fmt: skip
        """[{"summary_text": ...}], or [{"translation_text": ...}]: one for each text.

        settings : of `npattn.models.generation.Generation`, such as max_length and min_length, in tokens; else those that
                   config.json has for the task (task_specific_params), else those of generation_config.json
        truncation : whether a text is cut that is longer than the model takes; it is an error unless given
        seed : of sampling. With num_return_sequences there is a list of dicts for each text
        """
        if "max_length" in settings:
            settings.setdefault("max_new_tokens", None)
        s = _settings(self.model, {**self.usual, **settings})
        if s.decoder_start is None:
            raise ValueError(f"{self.key}: neither config.json nor generation_config.json has a decoder_start_token_id")
        most = longest(self.model) if truncation else None
        words, rng, found, rows = self.model.tokenizer, np.random.default_rng(seed), list[Any](), _texts(texts)
        for start in range(0, len(rows), batch_size):
            some = [self.prefix + text for text in rows[start : start + batch_size]]
            encoded = words.encode(some, max_length=most)
            past = self.model.memory(encoded.ids, source_mask=keys(encoded.inside))
            prompts = np.full((len(some), 1), s.decoder_start)
            ids = generate(self.model.decode, prompts, s, past=past, source_inside=encoded.inside, rng=rng,
                           text=words.target.decode)  # fmt: skip
            written = [{self.key: words.target.decode(row)} for row in ids]
            n = s.num_return_sequences
            found += written if n == 1 else [written[b * n : (b + 1) * n] for b in range(len(some))]
        return found


def longest(model: Model) -> int | None:
    """The number of tokens that the folder names, or that there are learned positions for."""
    if model.longest is not None:
        return model.longest
    params = model.params.transformer if model.kind == "copying encoder-decoder" else model.params
    embed = params.source if hasattr(params, "source") else params.embed
    return None if embed.positions is None else len(embed.positions) - model.config.first_position


class TextClassification:
    """Which class a text has.

    >>> classifier = pipeline("sentiment-analysis", model="DIR")  # doctest: +SKIP
    >>> classifier("What a film!")[0]["label"]  # doctest: +SKIP
    """

    def __init__(self, model: Model) -> None:
        head = model.params.head
        if not isinstance(head, TextHeadParams) or head.out is None:
            raise ValueError("pipeline: the model has no head with a class for a whole text, expected one for classification")
        self.model = model
        names = model.settings.get("id2label") or {}
        self.labels = [str(names.get(str(n), names.get(n, f"LABEL_{n}"))) for n in range(head.out.w.shape[1])]
        self.independent = len(self.labels) == 1 or model.settings.get("problem_type") == "multi_label_classification"

    def __call__(self, texts: str | Sequence[str], *, top_k: int | None = 1, batch_size: int = 32) -> list[Any]:
        """[{"label": ..., "score": ...}]: the likeliest class of each text.

        top_k : the so many likeliest classes, or all with None; more than one come as a list for each of several texts
        The scores of classes add up to 1; those of one class alone, or of labels that exclude nothing, are each from 0 to 1.
        """
        if top_k is not None:
            check_integer("text-classification", "top_k", top_k, least=1)
        rows = _texts(texts)
        found: dict[int, list[dict[str, Any]]] = {}
        for some, encoded in _batches(self.model, rows, batch_size):
            logits = _output(self.model, encoded)
            scores = sigmoid(logits) if self.independent else softmax(logits)
            for n, row in zip(some, scores, strict=True):
                order = np.argsort(-row, kind="stable")[:top_k]
                found[n] = [{"label": self.labels[c], "score": float(row[c])} for c in order]
        ordered = [found[n] for n in range(len(rows))]
        if top_k == 1:
            return [row[0] for row in ordered]
        return ordered[0] if isinstance(texts, str) else ordered


class QuestionAnswering:
    """Where in a text the answer to a question stands.

    >>> answerer = pipeline("question-answering", model="DIR")  # doctest: +SKIP
    >>> answerer(question="Where is Mary?", context="Mary went to the office.")["answer"]  # doctest: +SKIP
    """

    def __init__(self, model: Model) -> None:
        head = model.params.head
        if not isinstance(head, LinearParams) or head.w.shape[1] != 2:
            raise ValueError("pipeline: the model has no head for start and end of an answer, expected one")
        self.model = model

    def __call__(
        self, *, question: str | Sequence[str], context: str | Sequence[str], top_k: int = 1, max_answer_len: int = 15
    ) -> Any:
        """{"score": ..., "start": ..., "end": ..., "answer": ...}: the answer is ``context[start:end]``.

        question, context : texts, or lists of texts, which give a list; one context may serve several questions
        top_k : with more than 1 a list of so many answers for each question, or fewer where there are no more
        max_answer_len : of the answer, in words of the tokenizer
        The score is the probability of the start times that of the end, among the tokens of the context. A context that is
        longer than the model takes is cut into windows that overlap; the best answers of all windows are taken.
        """
        check_integer("question-answering", "top_k", top_k, least=1)
        check_integer("question-answering", "max_answer_len", max_answer_len, least=1)
        questions, contexts = _texts(question), _texts(context)
        contexts = contexts * len(questions) if len(contexts) == 1 else contexts
        if len(questions) != len(contexts):
            raise ValueError(f"question-answering: there are {len(questions)} questions and {len(contexts)} contexts")
        found = [self._answers(q, c, top_k, max_answer_len) for q, c in zip(questions, contexts, strict=True)]
        if isinstance(question, str) and isinstance(context, str):
            return found[0] if top_k > 1 else found[0][0]
        return found if top_k > 1 else [row[0] for row in found]

    def _answers(self, question: str, context: str, top_k: int, most: int) -> list[dict[str, Any]]:
        """The best answers in all windows of the context, the best first."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for first, window in self._windows(question, context):
            encoded = self.model.tokenizer.encode(question, window, max_length=longest(self.model))
            logits, parts, words = _output(self.model, encoded)[0], encoded.parts[0], encoded.words[0]
            inside = parts == 1
            # The first token takes part: it is where models that were trained for it say that there is no answer.
            counted = inside | (encoded.ids[0] == self.model.tokenizer.special.cls)
            starts, ends = softmax(np.where(counted[:, None], logits, -np.inf).T)
            scores = np.where(np.outer(inside, inside), np.outer(starts, ends), 0)
            scores, here = np.triu(scores) - np.triu(scores, most), 0
            for at in np.argsort(-scores, axis=None, kind="stable"):
                start, end = np.unravel_index(at, scores.shape)
                if scores[start, end] <= 0 or here == top_k:
                    break
                whole = inside & (words >= words[start]) & (words <= words[end])  # an answer is made of whole words
                a, b = (int(x) for x in first + encoded.offsets[0][whole][[0, -1], [0, 1]])
                score, known = float(scores[start, end]), found.get((a, b))
                here += known is None
                if known is None or known["score"] < score:  # other tokens of the same words, or another window
                    found[a, b] = {"score": score, "start": a, "end": b, "answer": context[a:b]}
        if not found:
            raise ValueError("question-answering: the context has no token, expected a text with an answer")
        return sorted(found.values(), key=lambda answer: -answer["score"])[:top_k]

    def _windows(self, question: str, context: str) -> Iterator[tuple[int, str]]:
        """Parts of a context that fit beside the question, and the character at which each starts."""
        most = min(longest(self.model) or WINDOW, WINDOW)
        encoded = self.model.tokenizer.encode(context, special=False)
        offsets, words, count = encoded.offsets[0], encoded.words[0], encoded.ids.shape[1]
        room, overlap = most - self.model.tokenizer.encode(question, "").ids.shape[1], min(most // 2, OVERLAP)
        if count <= room:
            yield 0, context
            return
        if room <= overlap:
            raise ValueError(f"question-answering: the question leaves {room} of {most} tokens, expected more than {overlap}")
        edges = [0, *(np.flatnonzero(np.diff(words)) + 1).tolist(), count]  # of words: a part of one may become more tokens
        start = end = 0
        while end < count:
            end = max((n for n in edges if start < n <= start + room), default=start + room)
            yield int(offsets[start, 0]), context[offsets[start, 0] : offsets[end - 1, 1]]
            start = max((n for n in edges if start < n <= end - overlap), default=end - overlap)


def _output(model: Model, encoded: Any) -> Array:
    """What an encoder gives for a batch of tokens."""
    types = encoded.types if model.params.embed.types is not None else None
    out: Array = model.forward(encoded.ids, inside=encoded.inside, types=types)[0]
    return out


def _batches(model: Model, rows: Sequence[str], size: int, max_length: int | None = None) -> Iterator[tuple[list[int], Any]]:
    """The numbers of some texts, and their tokens; texts of like lengths need little padding."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    for start in range(0, len(order), check_integer("pipeline", "batch_size", size, least=1)):
        some = order[start : start + size]
        yield some, model.tokenizer.encode([rows[n] for n in some], max_length=max_length or longest(model))


def _settings(model: Model, given: Mapping[str, Any]) -> Generation:
    given = {NAMES.get(name, name): x for name, x in given.items()}  # such as eos_token_id
    if unknown := [name for name in given if name not in Generation.__dataclass_fields__]:
        raise TypeError(f"{unknown[0]} is no setting, expected those of npattn.models.generation.Generation: "
                        f"{', '.join(Generation.__dataclass_fields__)}")  # fmt: skip
    found = Generation.from_hugging_face(model.generation or model.settings)
    special = model.tokenizer.special
    defaults = {"eos": special.eos, "pad": special.pad}
    missing = {n: x for n, x in defaults.items() if getattr(found, n) is None and x is not None}
    for one, other in (("max_new_tokens", "max_length"), ("max_length", "max_new_tokens")):
        if given.get(one) is not None:
            missing[other] = None
    return replace(found, **{**missing, **given})


def run(
    task: str, model: str | os.PathLike[str] | Model, texts: Sequence[str], settings: Mapping[str, Any], seed: int | None = None
) -> Iterator[str]:
    """What ``npattn run`` prints, in pieces, each as soon as it is known.

    Vectors, classes and answers are JSON, a line for each text. With ``similarity`` in settings the cosines between vectors are
    printed in their place.
    """
    function, settings = pipeline(task, model), dict(settings)
    if task == "text-generation":
        for text in texts:
            meant = _settings(function.model, settings)
            if meant.num_beams > 1 or meant.num_return_sequences > 1:
                yield from (found["generated_text"] + "\n" for found in function(text, seed=seed, **settings))
            else:
                yield text
                yield from function.stream(text, seed=seed, **settings)
                yield "\n"
        return
    if isinstance(function, QuestionAnswering):
        question = settings.pop("question", None)
        if question is None:
            raise ValueError("question-answering needs a question: --question TEXT")
        for text in texts:
            yield json.dumps(function(question=question, context=text, **settings), ensure_ascii=False) + "\n"
        return
    if isinstance(function, TextClassification):
        for text, classes in zip(texts, function(list(texts), **settings), strict=True):
            yield json.dumps({"text": text, **classes}, ensure_ascii=False) + "\n"
        return
    if isinstance(function, TextToText):
        for text in texts:  # one after the other: what is known is shown
            written = function(text, truncation=True, seed=seed, **settings)
            yield from (x[function.key] + "\n" for row in written for x in (row if isinstance(row, list) else [row]))
        return
    similarity = settings.pop("similarity", False)
    if similarity and settings.get("pooling", "mean" if not function.pools else "") == "none":
        raise ValueError("--similarity takes one vector for each text, and --pooling none gives one for each token")
    if similarity and not function.pools:
        settings.setdefault("pooling", "mean")
    found = function(texts, **settings)
    if similarity:
        vectors = np.array([v / np.linalg.norm(v) for v in found])
        yield from (" ".join(f"{x:7.4f}" for x in row) + "\n" for row in vectors @ vectors.T)
        return
    for text, vector in zip(texts, found, strict=True):
        yield json.dumps({"text": text, "vector": vector.tolist()}, ensure_ascii=False) + "\n"


def pieces(tokens: Iterator[int], text: Callable[[Any], str]) -> Iterator[str]:
    """The text of tokens in pieces: one as soon as no further token can change it. A character may have several tokens."""
    ids, shown = list[int](), ""
    for token in tokens:
        ids.append(token)
        now = text(np.array(ids))
        if now.endswith("\ufffd") or not now.startswith(shown):
            continue
        yield now[len(shown) :]
        shown = now
    whole = text(np.array(ids)) if ids else ""
    if whole != shown:
        yield whole[len(shown) :]


TASKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "feature-extraction": (FeatureExtraction, ("encoder",)),
    "text-generation": (TextGeneration, ("language model", "recurrent language model")),
    "summarization": (TextToText, ("encoder-decoder", "copying encoder-decoder")),
    "translation": (TextToText, ("encoder-decoder", "copying encoder-decoder")),
    "sentiment-analysis": (TextClassification, ("encoder",)),
    "text-classification": (TextClassification, ("encoder",)),
    "question-answering": (QuestionAnswering, ("encoder",)),
}

__all__ = ["FeatureExtraction", "QuestionAnswering", "TextClassification", "TextGeneration", "TextToText", "longest", "pieces",
           "pipeline", "run"]  # fmt: skip
