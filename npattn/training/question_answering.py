"""Answering questions about stories of bAbI's kind: an encoder that marks where in the story the answer stands.

    Mary moved to the bathroom. Mary got the milk there. John went to the hallway. Mary travelled to the garden.
    Where is Mary?        garden    one fact says it
    Where is the milk?    garden    two facts say it: who has it, and where that person went

A little world writes the stories: people move, and take and drop things where they are. Weston et al. 2015 (bAbI, tasks 1 and
2), whose words these are.

The model is a BERT for answers, `npattn.models.encoders` (7), from new parameters. Three choices let it learn in minutes:

- The tokenizer leaves out words that say nothing here (the, to, back, there ...): a sentence is who, does, what.
- Positions begin as the sum of a vector of the sentence and one of the place in it, and keys begin as queries do. So words
  attend at first to words of their own sentence, and to the same words elsewhere.
- Besides the span it learns what the answer rests on: where the person went whose place it is, and which sentence says that
  this person took or dropped the thing. That is the loss (2) at every place and thing of the story; its head is not saved. The
  authors of bAbI call such labels supporting facts.

    loss = spans(y w + b) + about(y u + c)        (1), (2)    `npattn.models.encoders.span_loss`, `npattn.cross_entropy`

Stories become longer while it learns, and need two facts after a while.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from npattn.models.encoders import (
    EncoderModelParams,
    best_span,
    encoder_model_backward,
    encoder_model_forward,
    span_loss_backward,
    span_loss_forward,
)
from npattn.models.folder import save
from npattn.models.model import Model
from npattn.models.tokens import tokenizer_of
from npattn.ops.checks import Array, check_integer
from npattn.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from npattn.ops.linear import LinearParams, linear_backward, linear_forward
from npattn.training import checkpoints
from npattn.training.initial import initial
from npattn.training.loop import Loss, Trained, check_gradients, draw, train
from npattn.training.measures import Accuracy, accuracy, settings_for

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
MOVES = ("moved to", "went to", "went back to", "journeyed to", "travelled to")
TAKES = ("got", "took", "grabbed", "picked up")
DROPS = ("dropped", "discarded", "left", "put down")
SENTENCES = {1: (2, 10), 2: (3, 15)}  # by the number of facts the fewest and the most in a story
LEFT_OUT = ("the", "to", "back", "there", "up", "down", "is")  # of the words above and of the questions

# --- stories -----------------------------------------------------------------------------------------------------------------


class Story(NamedTuple):
    """A story, a question, and its answer: ``context[start : start + len(answer)]``."""

    context: str
    question: str
    answer: str
    start: int
    about: tuple[int, ...]  # where what the answer rests on is named: see the loss (2)
    named: tuple[int, ...]  # where any place or thing is named


def story(rng: np.random.Generator, facts: int, sentences: int | None = None) -> Story:
    """A story whose question needs so many facts, 1 or 2.

    sentences : how many; drawn from those of `SENTENCES` unless given

    >>> story(np.random.default_rng(3), facts=1, sentences=2).context
    'Sandra moved to the bathroom. John journeyed to the hallway.'
    """
    if facts not in SENTENCES:
        raise ValueError(f"story: facts is {facts}, expected 1 or 2")
    least, most = SENTENCES[facts]
    count = int(rng.integers(least, most + 1)) if sentences is None else sentences
    check_integer("story", "sentences", count, least=least)
    while True:
        world = _World(rng)
        for _ in range(count):
            if facts == 1 or rng.random() < 0.5:
                world.move()
            else:
                world.handle()
        known = {who: (who, *at) for who, at in world.said.items()} if facts == 1 else world.known_things()
        if known:
            name = _one_of(rng, sorted(known))
            who, start, answer = known[name]
            decides = [at for _, thing, at in world.handled if thing == name][-1:]
            about = sorted([at for person, at in world.moves if person == who] + decides)
            named = sorted([at for _, at in world.moves] + [at for _, _, at in world.handled])
            question = f"Where is {name if facts == 1 else f'the {name}'}?"
            return Story(" ".join(world.told), question, answer, start, tuple(about), tuple(named))


class _World:
    """Who is where and has what. People and things have places before the story tells of them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.told = rng, list[str]()
        self.place = {name: _one_of(rng, PLACES) for name in (*PEOPLE, *THINGS)}
        self.holder: dict[str, str] = {}  # by thing
        self.moves = list[tuple[str, int]]()  # who went to a place, and the character at which it is named
        self.handled = list[tuple[str, str, int]]()  # who took or dropped which thing, and likewise
        self.said: dict[str, tuple[int, str]] = {}  # by person where the place to which they went last is named, and its name
        self.dropped: dict[str, tuple[str, int, str] | None] = {}  # by thing that was dropped: by whom, and the same of them

    def tell(self, sentence: str) -> None:
        self.told.append(f"{sentence}.")

    def move(self) -> None:
        who = _one_of(self.rng, PEOPLE)
        place = _one_of(self.rng, [p for p in PLACES if p != self.place[who]])
        self.tell(f"{who} {_one_of(self.rng, MOVES)} the {place}")
        self.place[who] = place
        at = len(" ".join(self.told)) - len(place) - 1
        self.said[who] = at, place
        self.moves.append((who, at))

    def handle(self) -> None:
        """Somebody takes or drops a thing, or moves where nobody can do either."""
        takes = [(who, thing, True) for who in PEOPLE for thing in THINGS
                 if thing not in self.holder and self.place[thing] == self.place[who]]  # fmt: skip
        drops = [(who, thing, False) for thing, who in self.holder.items()]
        if not takes + drops:
            self.move()
            return
        who, thing, take = (takes + drops)[int(self.rng.integers(len(takes + drops)))]
        there = " there" if self.rng.random() < 0.5 else ""
        self.tell(f"{who} {_one_of(self.rng, TAKES if take else DROPS)} the {thing}{there}")
        self.handled.append((who, thing, len(" ".join(self.told)) - len(f"{thing}{there}.")))
        if take:
            self.holder[thing] = who
            self.dropped.pop(thing, None)
        else:
            del self.holder[thing]
            self.place[thing], self.dropped[thing] = self.place[who], self._place_said(who)

    def known_things(self) -> dict[str, tuple[str, int, str]]:
        """Of the things whose place the story tells: who has it or dropped it, and what `said` has of them at that time."""
        held = {thing: self._place_said(who) for thing, who in self.holder.items()}
        return {thing: found for thing, found in {**self.dropped, **held}.items() if found is not None}

    def _place_said(self, who: str) -> tuple[str, int, str] | None:
        return (who, *self.said[who]) if who in self.said else None


def _one_of(rng: np.random.Generator, things: Collection[str]) -> str:
    return list(things)[int(rng.integers(len(things)))]


def held_out(facts: int, count: int, seed: int) -> list[Story]:
    """Stories for the score; `batches` draws none of them."""
    rng = np.random.default_rng((seed, facts, 1 << 32))
    return [story(rng, facts) for _ in range(count)]


# --- the model ---------------------------------------------------------------------------------------------------------------


class StoryParams(NamedTuple):
    """What is trained: the model, and the head of (2), which is not saved."""

    model: EncoderModelParams
    about: LinearParams  # (M, 2)


SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
QUESTION = 4  # the number of tokens before a story: [CLS], where, whom, [SEP]


def word_tokenizer() -> Any:
    """The words of the stories in lower case, without those that say nothing here.

    >>> words = word_tokenizer()
    >>> words.decode(words.encode("Mary went back to the kitchen.").ids[0])
    'mary went kitchen'
    """
    told = " ".join(("where", *PEOPLE, *PLACES, *THINGS, *MOVES, *TAKES, *DROPS)).lower().split()
    vocabulary = [*SPECIAL.values(), *(word for word in dict.fromkeys(told) if word not in LEFT_OUT)]
    ids = {word: n for n, word in enumerate(vocabulary)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": ids[token], "content": token, **flags} for token in SPECIAL.values()]
    gaps = {"Regex": rf"\W+|\b({'|'.join(LEFT_OUT)})\b"}

    def template(*parts: tuple[str, int]) -> list[Any]:
        return [{"Sequence" if x in "AB" else "SpecialToken": {"id": x, "type_id": n}} for x, n in parts]

    cls, sep = SPECIAL["cls"], SPECIAL["sep"]
    around = {"type": "TemplateProcessing", "single": template((cls, 0), ("A", 0), (sep, 0)),
              "pair": template((cls, 0), ("A", 0), (sep, 0), ("B", 1), (sep, 1)),
              "special_tokens": {x: {"id": x, "ids": [ids[x]], "tokens": [x]} for x in (cls, sep)}}  # fmt: skip
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "Lowercase"},
             "pre_tokenizer": {"type": "Split", "pattern": gaps, "behavior": "Removed", "invert": False},
             "post_processor": around, "decoder": None,
             "model": {"type": "WordLevel", "vocab": ids, "unk_token": SPECIAL["unk"]}}  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **{f"{role}_token": token for role, token in SPECIAL.items()}}
    return tokenizer_of({"tokenizer.json": json.dumps(whole).encode(), "tokenizer_config.json": json.dumps(settings).encode()})


def reader(seed: int = 0, *, M: int = 64, layers: int = 3, heads: int = 4) -> Model:
    """A model with new parameters."""
    words = word_tokenizer()
    settings = {"model_type": "bert", "architectures": ["BertForQuestionAnswering"], "vocab_size": words.size, "hidden_size": M,
                "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * M, "hidden_act": "gelu",
                "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0}  # fmt: skip
    new = initial(settings, seed, tokenizer=words)
    rng = np.random.default_rng((seed, 1))
    embed, blocks = new.params.embed, new.params.encoder.blocks
    table, kinds = (rng.standard_normal(x.shape).astype(x.dtype) for x in (embed.table, embed.types))
    positions = _positions(rng, len(embed.positions), M).astype(table.dtype)
    embed = embed._replace(table=table, positions=positions, types=kinds / 2)
    tied = tuple(b._replace(attention=b.attention._replace(w_k=b.attention.w_q.copy())) for b in blocks)
    return replace(new, params=new.params._replace(embed=embed, encoder=new.params.encoder._replace(blocks=tied)))


def _positions(rng: np.random.Generator, count: int, M: int) -> Array:
    """Waves of the number of the sentence, and one of three vectors for the place in it; others before the story."""
    number = np.arange(count // 3 + 1)[:, None] * 16.0 ** (-np.arange(M // 2) / (M // 2))
    sentence = np.concatenate([np.sin(number), np.cos(number)], 1)
    story = np.repeat(sentence, 3, 0) + np.tile(rng.standard_normal((3, M)) / 2, (len(sentence), 1))
    return np.concatenate([rng.standard_normal((QUESTION, M)) / 2, story])[:count]


class Batch(NamedTuple):
    """Stories as tokens."""

    ids: Array  # (B, L)
    inside: Array  # (B, L)
    types: Array  # (B, L)
    story: Array  # (B, L) whether the token is one of the story
    spans: Array  # (B, 2)
    about: Array  # (B, L) 1 where the answer rests on what the token names
    named: Array  # (B, L) whether the token is a place or a thing


def encode(stories: Sequence[Story], tokenizer: Any) -> Batch:
    """Stories as a batch of tokens."""
    e = tokenizer.encode([s.question for s in stories], [s.context for s in stories])
    story, first = e.parts == 1, e.offsets[..., 0]

    def among(characters: Callable[[Story], Collection[int]]) -> Array:
        there = np.stack([np.isin(row, list(characters(s))) for row, s in zip(first, stories, strict=True)])
        return np.asarray(story & there)

    at = among(lambda s: [s.start]).argmax(-1)
    return Batch(e.ids, e.inside, e.types, story, np.stack([at, at], -1), among(lambda s: s.about).astype(np.int64),
                 among(lambda s: s.named))  # fmt: skip


def loss_of(model: Model) -> Loss:
    """The loss (1) and (2), and its gradients, as `npattn.training.loop.train` takes it."""

    def loss_and_grads(params: Any, batch: Any, n: int) -> tuple[Any, Any, int]:
        b, p = batch, params.model
        y, cache = encoder_model_forward(b.ids, p._replace(head=None), model.config, inside=b.inside, types=b.types)
        logits, of_head = linear_forward(y, p.head)
        span, of_span = span_loss_forward(logits, b.spans, inside=b.story)  # (1)
        marks, of_marks = linear_forward(y, params.about)
        about, of_about = cross_entropy_forward(marks, b.about, mask=b.named)  # (2)
        dmarks = linear_backward(cross_entropy_backward(np.ones_like(about), of_about).logits, of_marks)
        dlogits = linear_backward(span_loss_backward(np.ones_like(span), of_span).logits, of_head)
        grads = encoder_model_backward(dlogits.x + dmarks.x, cache).params._replace(head=dlogits.params)
        return span + about, StoryParams(grads, dmarks.params), len(b.ids)

    return loss_and_grads


BATCH = 128
STEPS = 1500  # about five minutes of one core
SETTINGS = {"lr": 3e-3, "warmup": 100, "weight_decay": 0.01, "betas": (0.9, 0.99)}
SHORT, GROW, BOTH = 0.15, 0.3, 0.2  # parts of the training: stories are short; then they grow; when those of 2 facts begin


def batches(steps: int, seed: int, facts: int, tokenizer: Any, left_out: Collection[Story] = ()) -> Callable[[int], Batch]:
    """n -> the batch with number n: new stories, all with as many sentences, so that there is no padding.

    steps : in so many the stories grow   facts : the most   left_out : what is never drawn, but for its question
    """
    held = {(s.context, s.question) for s in left_out}

    def batch(n: int) -> Batch:
        rng, done = np.random.default_rng((seed, n)), n / steps
        needed = 2 if facts == 2 and done >= BOTH and n % 2 else 1
        least, most = SENTENCES[needed]
        grown = min(max(done - SHORT - (BOTH if needed == 2 else 0), 0) / GROW, 1)
        sentences = int(rng.integers(least, least + 2 + round((most - least - 1) * grown)))
        found = list[Story]()
        while len(found) < BATCH:
            s = story(rng, needed, sentences)
            if (s.context, s.question) not in held:
                found.append(s)
        return encode(found, tokenizer)

    return batch


def answers(model: Model, stories: Sequence[Story]) -> list[str]:
    """What the model answers."""
    found = list[str]()
    for start in range(0, len(stories), 100):
        some = stories[start : start + 100]
        e = model.tokenizer.encode([s.question for s in some], [s.context for s in some])
        logits, _ = model.forward(e.ids, inside=e.inside, types=e.types)
        span = best_span(logits, inside=e.parts == 1, max_length=1)
        found += [s.context[slice(*e.offsets[b, span.start[b]])] for b, s in enumerate(some)]
    return found


def exact(found: Sequence[str], stories: Sequence[Story]) -> Accuracy:
    """How many answers are right to the letter."""
    return accuracy(sum(a == s.answer for a, s in zip(found, stories, strict=True)), len(stories))


def last_place(stories: Sequence[Story]) -> Accuracy:
    """The baseline: the place that is named last."""
    return exact([max(PLACES, key=s.context.rfind) for s in stories], stories)


# --- npattn train question-answering -----------------------------------------------------------------------------------------

OPTIONS = {"facts": 2, "seed": 0}
TESTED = 1000  # held-out stories with each number of facts


def learn(
    model: Model, *, facts: int = 2, seed: int = 0, steps: int | None = None, minutes: float | None = None, check: bool = False,
    **options: Any,
) -> tuple[Model, Trained]:  # fmt: skip
    """Trains a `reader` on stories whose questions need up to so many facts.

    steps, minutes : how long; `STEPS` unless given   check : compares the gradient with a complex step first
    options : of `npattn.training.loop.train`, such as folder, resume and show
    Returns the trained model, and what `train` returned. Raises ValueError, NotFiniteError, OSError.
    """
    kept = [s for n in range(1, facts + 1) for s in held_out(n, TESTED, seed)]
    rng, dtype, M = np.random.default_rng((seed, 2)), model.dtype, model.settings["hidden_size"]
    start = StoryParams(model.params, LinearParams((rng.standard_normal((M, 2)) * M**-0.5).astype(dtype), np.zeros(2, dtype)))
    loss, late = loss_of(model), batches(1, seed, facts, model.tokenizer)  # of the long stories, which set the time
    settings = settings_for(start, loss, lambda n: late(n + 2), steps or STEPS, None if steps else minutes, SETTINGS, options)
    batch = batches(settings.steps, seed, facts, model.tokenizer, kept)
    if check:
        check_gradients(start, loss, batch(0))

    def trained(params: Any) -> Model:
        return replace(model, params=params.model)

    done = train(start, loss, batch, settings, save=lambda place, params: save(place, trained(params)), **options)
    return trained(done.params), done


def run(given: Any, show: Callable[[str], None]) -> bool:
    """What ``npattn train question-answering`` does; see `npattn.arguments`. Returns whether all steps were made."""
    options = checkpoints.options_of(given.out, vars(given), OPTIONS, given.resume)
    facts, seed = options["facts"], options["seed"]
    model = reader(seed)
    show(f"{model.size:,} parameters, {model.tokenizer.size} words")
    model, done = learn(
        model, facts=facts, seed=seed, steps=given.steps, minutes=given.minutes, check=given.check_gradients, folder=given.out,
        resume=given.resume, show=show, about={"task": "question-answering", "options": options})  # fmt: skip
    save(given.out, model)
    if given.plot:
        draw(done.log, given.plot)
    if done.interrupted:
        return False
    for n in range(1, facts + 1):
        stories = held_out(n, TESTED, seed)
        found = answers(model, stories)
        show(f"{n} fact{'s' * (n > 1)}: right answers about new stories {exact(found, stories)}; the place that is named last: "
             f"{last_place(stories)}")  # fmt: skip
        show(f"  {stories[0].context} {stories[0].question} {found[0]}, is {stories[0].answer}")
    show(f'npattn run question-answering --model {given.out} --question "Where is Mary?" "Mary went to the office."')
    return True


def scores(minutes: float, seed: int) -> dict[str, Accuracy]:
    """The held-out scores of the model and of the baseline, for ``python -m benchmarks tasks``."""
    model, _ = learn(reader(seed), seed=seed, minutes=minutes)
    found = dict[str, Accuracy]()
    for facts in SENTENCES:
        stories = held_out(facts, TESTED, seed)
        found[f"{facts} facts"] = exact(answers(model, stories), stories)
        found[f"{facts} facts, last place"] = last_place(stories)
    return found


__all__ = ["Batch", "Story", "StoryParams", "answers", "batches", "encode", "exact", "held_out", "last_place", "learn",
           "loss_of", "reader", "run", "scores", "story", "word_tokenizer"]  # fmt: skip
