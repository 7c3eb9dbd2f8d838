"""Stories, their answers by another reading of the text, and the loss of the question answering task."""

from __future__ import annotations

import re

import numpy as np
import pytest

from npattn.training import question_answering as task
from npattn.training.loop import check_gradients

KINDS = pytest.mark.parametrize("facts", [1, 2])


def read_again(s):
    """The answer, where it stands, what it rests on, and what is named: by a log of everything that happened."""
    log, at = [], 0
    for sentence in re.findall(r"[^.]+\.", s.context):
        words = re.findall(r"\w+", sentence)
        kind = "move" if words[-1] in task.PLACES else "take" if words[1] in ("got", "took", "grabbed", "picked") else "drop"
        what = words[-2] if words[-1] == "there" else words[-1]
        log.append((words[0], kind, what, at + sentence.rindex(what)))
        at += len(sentence)
    asked = re.fullmatch(r"Where is (the )?(\w+)\?", s.question)[2]
    end, decides = len(log), set()
    if asked in task.THINGS:
        last = max(n for n, (_, kind, what, _) in enumerate(log) if kind != "move" and what == asked)
        decides = {log[last][3]}
        asked, end = log[last][0], last if log[last][1] == "drop" else end
    moves = [n for n in range(end) if log[n][:2] == (asked, "move")]
    about = {place for who, kind, _, place in log if (who, kind) == (asked, "move")} | decides
    return log[moves[-1]][2], log[moves[-1]][3], tuple(sorted(about)), tuple(place for *_, place in log)


@KINDS
def test_answers_are_those_of_another_reading(facts):
    rng = np.random.default_rng(facts)
    for _ in range(300):
        s = task.story(rng, facts)
        assert (s.answer, s.start, s.about, s.named) == read_again(s)
        assert s.context[s.start :].startswith(s.answer + ".")


@KINDS
def test_stories_have_as_many_sentences_as_asked_and_every_answer(facts):
    rng = np.random.default_rng(0)
    least, most = task.SENTENCES[facts]
    counts = {task.story(rng, facts).context.count(".") for _ in range(300)}
    assert counts == set(range(least, most + 1))
    assert task.story(rng, facts, 7).context.count(".") == 7
    assert {task.story(rng, facts).answer for _ in range(200)} == set(task.PLACES)
    with pytest.raises(ValueError, match=f"sentences is {least - 1}"):
        task.story(rng, facts, least - 1)


def test_three_facts_are_refused():
    with pytest.raises(ValueError, match="facts is 3, expected 1 or 2"):
        task.story(np.random.default_rng(0), 3)


def test_people_can_do_what_they_do():
    """Nobody goes where they are, takes what another has, or drops what they do not have."""
    rng = np.random.default_rng(5)
    for _ in range(100):
        place, holder = {}, {}
        for sentence in re.findall(r"[^.]+", task.story(rng, 2).context):
            who, verb, *rest = re.findall(r"\w+", sentence)
            what = rest[-2] if rest[-1] == "there" else rest[-1]
            if what in task.PLACES:
                assert place.get(who) != what
                place[who] = what
            elif verb in ("got", "took", "grabbed", "picked"):
                assert what not in holder
                holder[what] = who
            else:
                assert holder.pop(what) == who


class Words:
    """The tokenizer of the task, by a regular expression."""

    words = sorted({w for text in (*task.PEOPLE, *task.PLACES, *task.THINGS, *task.MOVES, *task.TAKES, *task.DROPS, "where")
                    for w in text.lower().split()} - set(task.LEFT_OUT))  # fmt: skip
    size = len(words) + 3

    def encode(self, questions, contexts):
        rows = [[(0, 0, 1, -1), *self.part(q, 0), (0, 0, 2, -1), *self.part(c, 1), (0, 0, 2, -1)]
                for q, c in zip(questions, contexts, strict=True)]  # fmt: skip
        L = max(map(len, rows))
        array = np.array([row + [(0, 0, 0, -1)] * (L - len(row)) for row in rows])
        inside = np.arange(L) < np.array([[len(row)] for row in rows])
        first = array[..., 3].argmax(-1)[:, None]
        fields = {"ids": array[..., 2], "offsets": array[..., :2], "parts": array[..., 3], "inside": inside,
                  "types": (np.arange(L) >= first) & inside}  # fmt: skip
        return type("Encoded", (), {**fields, "types": fields["types"].astype(int)})

    def part(self, text, number):
        found = re.finditer(r"\w+", text.lower())
        return [(*m.span(), self.words.index(m[0]) + 3, number) for m in found if m[0] not in task.LEFT_OUT]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(task, "word_tokenizer", Words)
    monkeypatch.setattr(task, "BATCH", 8)
    return task.reader(0, M=12, layers=2, heads=3)


def test_a_batch_marks_the_answer_and_what_it_rests_on(small):
    stories = [task.story(np.random.default_rng(n), 2, 6) for n in range(8)]
    b = task.encode(stories, Words())
    for n, s in enumerate(stories):
        offsets = Words().encode([s.question], [s.context]).offsets[0]
        assert s.context[slice(*offsets[b.spans[n, 0]])] == s.answer
        assert offsets[b.spans[n, 0], 0] == s.start
        named = [w for w in re.findall(r"\w+", s.context) if w in task.PLACES + task.THINGS]
        assert [s.context[slice(*x)] for x in offsets[b.named[n]]] == named
        assert tuple(offsets[b.about[n] == 1, 0]) == s.about


def test_the_gradient_of_everything(small):
    params = task.StoryParams(small.params, task.LinearParams(np.random.default_rng(0).standard_normal((12, 2)), np.zeros(2)))
    check_gradients(params, task.loss_of(small), task.batches(10, 0, 2, small.tokenizer)(7))


def test_batches_depend_on_their_number_and_have_no_held_out_story(small):
    batch = task.batches(100, 3, 2, small.tokenizer)
    assert np.array_equal(batch(5).ids, batch(5).ids)
    assert not np.array_equal(batch(5).ids, batch(6).ids)
    assert all(batch(n).inside.all() for n in range(0, 100, 9)), "there is padding"
    rng = np.random.default_rng((3, 0))
    drawn = [task.story(rng, 1, int(n)) for n in [rng.integers(2, 4)] for _ in range(8)]
    other = task.batches(100, 3, 2, small.tokenizer, drawn)
    assert not np.array_equal(other(0).ids, batch(0).ids), "the stories that are left out are in the batch"


def test_stories_become_longer_and_need_two_facts(small):
    batch = task.batches(1000, 0, 2, small.tokenizer)
    lengths = [batch(n).ids.shape[1] for n in range(0, 1000, 20)]
    assert max(lengths[:7]) < max(lengths[-20:]) / 2
    things = [Words.words.index(w) + 3 for w in task.THINGS]
    asks = [np.isin(batch(n).ids[:, 2], things).all() for n in (1, 199, 301, 302, 999, 998)]
    assert asks == [False, False, True, False, True, False]


def test_the_loss_falls(small, monkeypatch):
    monkeypatch.setattr(task, "SENTENCES", {1: (2, 3)})  # else the stories become longer, and the loss larger
    _, done = task.learn(small, facts=1, steps=40)
    assert np.mean([line["loss"] for line in done.log[-8:]]) < 0.8 * np.mean([line["loss"] for line in done.log[:8]])


def test_answers_and_the_baseline(small):
    stories = task.held_out(1, 30, 0)
    assert stories == task.held_out(1, 30, 0) != task.held_out(1, 30, 1)
    assert set(task.answers(small, stories)) <= {w for s in stories for w in re.findall(r"\w+", s.context)}
    ends = sum(re.findall(r"\w+", s.context)[-1] == s.answer for s in stories)  # a story of one fact ends with a place
    assert task.last_place(stories).score == ends / 30
