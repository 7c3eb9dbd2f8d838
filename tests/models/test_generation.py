"""Generation against loops over a small vocabulary: processors, greedy decoding, draws, and beams by enumeration."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_language import CONFIGS, IDS, params

from npattn.models.generation import (
    Generation,
    distribution,
    generate,
    stream,
    with_forced_tokens,
    with_min_p,
    with_repetition_penalty,
    with_temperature,
    with_top_k,
    with_top_p,
    without_repeated_ngrams,
    without_sequences,
    without_tokens,
)
from npattn.models.language import language_model_decode

V = 7
TABLE = np.random.default_rng(0).standard_normal((V, V, V)) * 2


class Seen(NamedTuple):
    """The past of the model below: all its tokens."""

    ids: Any

    def rows(self, index):
        return Seen(self.ids[index])


def logits_after(ids):
    """A model with a memory of two tokens, and of how many there are."""
    return TABLE[ids[-1], ids[-2] if len(ids) > 1 else 0] + math.sin(len(ids))


def decode(ids, past):
    whole = ids if past is None else np.concatenate([past.ids, ids], 1)
    start = whole.shape[1] - ids.shape[1]
    return np.array([[logits_after(row[: start + n + 1]) for n in range(ids.shape[1])] for row in whole]), Seen(whole)


def log_softmax(x):
    return x - np.log(np.exp(x - x.max()).sum()) - x.max()


PROMPTS = np.array([[3, 1], [0, 6], [2, 2]])


def greedy(prompt, new, eos, pad):
    ids = list(prompt)
    while len(ids) < len(prompt) + new and (len(ids) == len(prompt) or ids[-1] not in eos):
        ids.append(int(np.argmax(logits_after(ids))))
    return ids, ids + [pad] * (len(prompt) + new - len(ids))


@pytest.mark.parametrize("eos", [(), (4,), (1, 5), (0, 1, 2, 3, 4, 5, 6)])
def test_greedy(eos):
    found = generate(decode, PROMPTS, Generation(max_new_tokens=8, eos=eos, pad=9))
    rows = [greedy(row, 8, eos, 9) for row in PROMPTS.tolist()]
    longest = max(len(ids) for ids, _ in rows)
    assert found.tolist() == [padded[:longest] for _, padded in rows]
    assert found.dtype == np.int64


def test_streaming_gives_the_columns():
    settings = Generation(max_new_tokens=8, eos=(1, 5), pad=9)
    columns = list(stream(decode, PROMPTS, settings))
    assert np.array_equal(np.stack(columns, 1), generate(decode, PROMPTS, settings)[:, 2:])
    columns[0][:] = -1  # what is given away is a copy
    first = stream(decode, PROMPTS, settings)
    next(first)[:] = -1
    assert np.array_equal(next(first), columns[1])


def test_rows_that_have_ended_are_not_computed():
    rows = []

    def counted(ids, past):
        rows.append(len(ids))
        return decode(ids, past)

    found = generate(counted, PROMPTS, Generation(max_new_tokens=8, eos=(1, 5), pad=9))
    lengths = (found[:, 2:] != 9).sum(1)
    assert len(set(lengths)) > 1
    assert rows == [int((lengths > n).sum()) for n in range(max(lengths))]


def test_lengths():
    def length(**settings):
        return generate(decode, PROMPTS, Generation(**settings)).shape[1]

    assert length() == 22
    assert length(max_length=5) == 5
    assert length(max_length=5, max_new_tokens=9) == 11
    assert length(max_new_tokens=0) == 2
    every = tuple(range(V))
    assert length(eos=every) == 3
    for settings in ({"min_new_tokens": 4}, {"min_length": 6}, {"min_new_tokens": 4, "min_length": 2}):
        found = generate(decode, PROMPTS, Generation(eos=every[1:], **settings))
        assert not found[:, 2:6].any()  # token 0 alone is no eos
        assert found[:, 6].all()


def test_when_tokens_are_forced_or_forbidden():
    def new(prompts=PROMPTS, **settings):
        return generate(decode, prompts, Generation(max_new_tokens=5, **settings))[:, prompts.shape[1] :]

    plain, one = new(), PROMPTS[:, :1]
    forced = new(forced_eos=5)
    assert np.array_equal(forced[:, :-1], plain[:, :-1])
    assert (forced[:, -1] == 5).all()
    assert np.array_equal(new(forced_bos=5), plain)  # the prompts have two tokens
    assert (new(one, forced_bos=5)[:, 0] == 5).all()
    first = plain[:, 0]
    assert np.array_equal(new(begin_suppress=first)[:, 0], [
        max(set(range(V)) - set(first.tolist()), key=lambda t: logits_after(row)[t]) for row in PROMPTS.tolist()])  # fmt: skip
    later = new(one, forced_bos=5)
    assert np.array_equal(new(one, forced_bos=5, begin_suppress=[5]), later)  # what is forced is not the first token
    assert (new(one, forced_bos=5, begin_suppress=later[:, 1])[:, 1:2] != later[:, 1:2]).all()
    ending = {"eos": int(plain[0, 1]), "pad": 9}
    assert np.array_equal(new(bad_words=[[ending["eos"]]], **ending), new(**ending))  # eos may always come


# --- processors, by loops ----------------------------------------------------------------------------------------------------

X = np.random.default_rng(4).standard_normal((3, V)) * 3
SO_FAR = np.array([[1, 2, 1, 2, 1], [3, 3, 3, 3, 3], [0, 5, 6, 0, 5]])


def probabilities(x):
    return [math.exp(v) / sum(map(math.exp, x)) for v in x]


def repetition(x, ids, n):
    return [v / n if t in ids and v > 0 else v * n if t in ids else v for t, v in enumerate(x)]


def ngrams(x, ids, n):
    seen = {tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)}
    return [-math.inf if (*ids[len(ids) + 1 - n :], t) in seen else v for t, v in enumerate(x)]


def sequences(x, ids, words):
    return [-math.inf if any([*ids, t][-len(word) :] == word for word in words) else v for t, v in enumerate(x)]


def top_k(x, ids, k):
    return [v if sum(u > v for u in x) < k else -math.inf for v in x]


def top_p(x, ids, top):
    """The most probable tokens, one by one, until they have the mass."""
    p, kept, mass = probabilities(x), [], 0.0
    for token in sorted(range(V), key=lambda t: -p[t]):
        if not kept or mass < top:
            kept.append(token)
        mass += p[token]
    return [v if t in kept else -math.inf for t, v in enumerate(x)]


def min_p(x, ids, least):
    p = probabilities(x)
    return [v if p[t] >= least * max(p) else -math.inf for t, v in enumerate(x)]


WORDS = [[6], [2, 1, 3], [3, 3, 3, 3, 3, 2], [1, 5, 4], [0, 0, 0, 0, 0, 0, 0]]
LOOPS = [
    *((with_repetition_penalty, (SO_FAR, n), lambda x, ids, n=n: repetition(x, ids, n)) for n in (0.5, 1.7)),
    *((without_repeated_ngrams, (SO_FAR, n), lambda x, ids, n=n: ngrams(x, ids, n)) for n in (1, 2, 3, 5, 6)),
    (without_sequences, (SO_FAR, WORDS), lambda x, ids: sequences(x, ids, WORDS)),
    (without_tokens, ([2, 5, V + 1],), lambda x, ids: [-math.inf if t in (2, 5) else v for t, v in enumerate(x)]),
    (with_forced_tokens, ([2, 5],), lambda x, ids: [0 if t in (2, 5) else -math.inf for t in range(V)]),
    (with_temperature, (0.4,), lambda x, ids: [v / 0.4 for v in x]),
    *((with_top_k, (n,), lambda x, ids, n=n: top_k(x, ids, n)) for n in (1, 3, V, V + 1)),
    *((with_top_p, (n,), lambda x, ids, n=n: top_p(x, ids, n)) for n in (1e-6, 0.3, 0.7, 0.99, 1.0)),
    *((with_min_p, (n,), lambda x, ids, n=n: min_p(x, ids, n)) for n in (0.0, 0.01, 0.3, 1.0)),
]


@pytest.mark.parametrize(("process", "arguments", "loop"), LOOPS, ids=[f.__name__ for f, *_ in LOOPS])
def test_processors(process, arguments, loop):
    x, ids = X.copy(), SO_FAR.copy()
    x.flags.writeable = ids.flags.writeable = False
    found = process(x, *(ids if a is SO_FAR else a for a in arguments))
    assert found.tolist() == [loop(row, tokens) for row, tokens in zip(X.tolist(), SO_FAR.tolist(), strict=True)]


def test_padding_is_not_penalized():
    found = with_repetition_penalty(X, SO_FAR, 3.0, np.array([0, 4, 3]))
    for row, ids, z in zip(X.tolist(), ([1, 2], [3], [0, 5]), found.tolist(), strict=True):
        assert z == repetition(row, ids, 3.0)


def test_what_is_as_probable_as_the_last_token_is_kept():
    x = np.array([[1.0, 3.0, 3.0, 0.0, 3.0]])
    for kept in (with_top_k(x, 2), with_top_p(x, 0.4), with_min_p(x, 1.0)):
        assert (kept > -np.inf).tolist() == [[False, True, True, False, True]]


def test_top_p_of_a_large_vocabulary():
    """Where a thousand tokens do not have the mass, and where they do."""
    x = np.random.default_rng(0).standard_normal((2, 20_000)) * np.array([[0.01], [6.0]])
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    for top in (0.3, 0.9):
        for row, kept in zip(p, with_top_p(x, top) > -np.inf, strict=True):
            order = np.argsort(-row)
            count = int(np.searchsorted(row[order].cumsum(), top)) + 1
            assert np.array_equal(np.flatnonzero(kept), np.sort(order[:count]))


# --- sampling ----------------------------------------------------------------------------------------------------------------


def test_draws_have_the_distribution():
    """The first two tokens of 20,000 draws: every count is within six standard deviations of what it should be."""
    n, draws = 20_000, {"do_sample": True, "temperature": 1.5, "top_k": 4, "top_p": 0.9}
    settings = Generation(max_new_tokens=2, num_return_sequences=n, **draws)
    found = generate(decode, PROMPTS[:1], settings, rng=np.random.default_rng(0))[:, 2:]
    assert found.shape == (n, 2)

    def expected(ids):
        return np.array(probabilities(top_p(top_k(logits_after(ids) / 1.5, None, 4), None, 0.9)))

    p = expected([3, 1])
    p = np.concatenate([p[t] * expected([3, 1, t]) for t in range(V)])
    counts = np.bincount(found[:, 0] * V + found[:, 1], minlength=V * V)
    assert not counts[p == 0].any()
    assert np.all(np.abs(counts - n * p) <= 6 * np.sqrt(n * p * (1 - p)))


def test_a_row_draws_the_same_whatever_the_others_do():
    def draw(seed, **settings):
        given = {"max_new_tokens": 9, "do_sample": True, "top_k": 0, "pad": 9, **settings}
        return generate(decode, np.tile(PROMPTS, (4, 1)), Generation(**given), rng=np.random.default_rng(seed))

    whole, ending = draw(1), draw(1, eos=(1, 2))
    assert np.array_equal(draw(1), whole)
    assert not np.array_equal(draw(2), whole)
    assert len(set((ending == 9).sum(1))) > 2
    assert np.array_equal(whole[:, : ending.shape[1]][ending != 9], ending[ending != 9])


def test_the_probabilities_are_in_float64():
    p, tokens = distribution(X.astype(np.float32), Generation(do_sample=True, top_k=3, temperature=0.5))
    assert p.dtype == np.float64
    for row, x in zip(p, X.astype(np.float32).astype(float), strict=True):
        expected = np.array(probabilities(top_k(x / 0.5, None, 3)))
        assert np.abs(row - expected[tokens]).max() <= 4 * np.abs(X).max() * np.finfo(float).eps
        assert not np.delete(expected, tokens).any()


# --- beams -------------------------------------------------------------------------------------------------------------------


def all_sequences(prompt, new, eos):
    """Every continuation: its tokens and the sum of their logarithms."""
    ends = [(list(prompt), 0.0)]
    for _ in range(new):
        ends = [
            longer for ids, score in ends for longer in
            ([(ids, score)] if len(ids) > len(prompt) and ids[-1] in eos else
             [([*ids, t], score + x) for t, x in enumerate(log_softmax(logits_after(ids)))])
        ]  # fmt: skip
    return ends


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("eos", [(4,), (1, 5)])
def test_enough_beams_find_the_best_of_all_sequences(eos, penalty):
    new, beams = 3, 400
    settings = Generation(max_new_tokens=new, eos=eos, pad=9, num_beams=beams, num_return_sequences=5, length_penalty=penalty,
                          early_stopping="never")  # fmt: skip
    found = generate(decode, PROMPTS, settings)
    best = []
    for prompt in PROMPTS.tolist():
        every = sorted(all_sequences(prompt, new, eos), key=lambda x: -x[1] / (len(x[0]) - 2) ** penalty)
        best += [ids for ids, _ in every[:5]]
    longest = max(map(len, best))
    assert found.tolist() == [ids + [9] * (longest - len(ids)) for ids in best]


def beams_by_loops(prompt, new, eos, K, penalty, early):
    """Beam search over lists, of (score, tokens)."""
    running, finished, better = [(0.0, list(prompt))], [], True
    for n in range(1, new + 1):
        every = [(s + x, [*ids, t]) for s, ids in running for t, x in enumerate(log_softmax(logits_after(ids)))]
        every = sorted(every, reverse=True)[: max(2, 1 + len(eos)) * K]
        if not (early is True and len(finished) == K):
            ended = [(s / n**penalty, ids) for s, ids in every[:K] if ids[-1] in eos or n == new]
            finished = sorted(finished + ended, reverse=True)[:K]
        running = [(s, ids) for s, ids in every if ids[-1] not in eos][:K]
        length = new if early == "never" and penalty > 0 else n
        better = len(finished) < K or running[0][0] / length**penalty > finished[-1][0]
        if not better or (early is True and len(finished) == K):
            break
    return [ids for _, ids in finished]


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("eos", [(4,), (1, 5), (2, 3, 6)])
def test_beams_by_loops(eos, penalty, early):
    prompts, K = np.array(list(itertools.product(range(V), (0, 3)))), 3
    settings = Generation(max_new_tokens=9, eos=eos, pad=9, num_beams=K, num_return_sequences=K, early_stopping=early,
                          length_penalty=penalty)  # fmt: skip
    found = generate(decode, prompts, settings)
    expected = [ids for prompt in prompts.tolist() for ids in beams_by_loops(prompt, 9, eos, K, penalty, early)]
    assert found.tolist() == [ids + [9] * (found.shape[1] - len(ids)) for ids in expected]


@pytest.mark.parametrize("more", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_each_row_keeps_its_source(more):
    inside = np.arange(6) < np.array([[6], [2], [4]])

    def step(ids, past, cross_mask):
        logits, past = decode(ids, past)
        return np.array([np.roll(x, n, axis=-1) for x, n in zip(logits, cross_mask.allowed.sum(1), strict=True)]), past

    settings = Generation(max_new_tokens=9, eos=(1, 5), pad=9, **more)
    found = generate(step, PROMPTS, settings, source_inside=inside)
    for n, rows in enumerate(np.split(found, 3)):
        alone = generate(step, PROMPTS[n : n + 1], settings, source_inside=inside[n : n + 1])
        assert np.array_equal(rows[:, : alone.shape[1]], alone)
        assert (rows[:, alone.shape[1] :] == 9).all()


def test_a_batch_of_beams_is_the_beams_of_each_prompt():
    prompts = np.array(list(itertools.product(range(V), (0, 3))))
    for early, penalty in itertools.product((True, False, "never"), (0.0, 1.0)):
        settings = Generation(max_new_tokens=7, eos=(4, 5), pad=9, num_beams=3, early_stopping=early, length_penalty=penalty)
        found = generate(decode, prompts, settings)
        for row, prompt in zip(found, prompts, strict=True):
            alone = generate(decode, prompt[None], settings)[0]
            assert row.tolist() == [*alone, *[9] * (len(row) - len(alone))]


# --- a language model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"num_beams": 3, "num_return_sequences": 2},
                                  {"do_sample": True, "num_return_sequences": 2}])  # fmt: skip
@pytest.mark.parametrize("name", ["as GPT-2", "as Llama", "relative"])
def test_a_padded_batch_continues_as_each_prompt_alone(name, more):
    """Whatever stands in the padding. Prompts of 4 and 2 tokens; tables of positions end at 9."""
    config, p = CONFIGS[name], params(name, False)
    step = functools.partial(language_model_decode, params=p, config=config)
    ids, inside = IDS[:, :4].copy(), np.array([[True] * 4, [False, False, True, True]])
    settings = Generation(max_new_tokens=5, eos=(IDS[0, 0],), pad=1, min_new_tokens=2, repetition_penalty=1.1, **more)

    class Draws(np.random.Generator):
        """The same numbers for the rows of either call."""

        def random(self, size):
            return np.resize(super().random(2), size)

    found = generate(step, ids, settings, inside=inside, rng=Draws(np.random.PCG64(0)))
    rows = [generate(step, ids[n : n + 1, start:], settings, rng=Draws(np.random.PCG64(0))) for n, start in ((0, 0), (1, 2))]
    count = settings.num_return_sequences
    for n, alone in enumerate(rows):
        new = alone[:, (4, 2)[n] :]
        some = found[n * count : (n + 1) * count, 4:]
        assert np.array_equal(some[:, : new.shape[1]], new)
        assert (some[:, new.shape[1] :] == 1).all()


def test_stop_strings():
    letters = "abcdefg"

    def text(ids):
        return "".join(letters[t] for t in ids)

    plain = generate(decode, PROMPTS, Generation(max_new_tokens=9))[:, 2:]
    stop = [text(plain[0, 2:5]), text(plain[1, 3:5])]
    found = generate(decode, PROMPTS, Generation(max_new_tokens=9, stop_strings=stop, pad=8), text=text)[:, 2:]
    for row, ids in zip(found, plain, strict=True):
        ends = [text(ids).find(x) + len(x) for x in stop if x in text(ids)]
        end = min(ends, default=9)
        assert row.tolist() == [*ids[:end], *[8] * (found.shape[1] - end)]
    assert (found == 8).any()
    settings = Generation(max_new_tokens=6, stop_strings=stop[1], pad=8, num_beams=3, num_return_sequences=3)
    for row in generate(decode, PROMPTS, settings, text=text)[:, 2:]:
        words = text(row[row < V])
        assert words.find(stop[1]) in (-1, len(words) - len(stop[1]))


# --- settings ----------------------------------------------------------------------------------------------------------------


def test_settings_of_hugging_face():
    read = Generation.from_hugging_face
    assert read({}) == Generation()
    assert read({"eos_token_id": 2, "top_k": None, "num_beams": None, "bad_words_ids": None}) == Generation(eos=2)
    assert read({"eos_token_id": [2, 3], "pad_token_id": -1, "bos_token_id": 5}) == Generation(eos=(2, 3), decoder_start=5)
    assert read({"decoder_start_token_id": 0, "bos_token_id": 5}).decoder_start == 0
    old = {"model_type": "bart", "d_model": 12, "num_beams": 4, "early_stopping": True, "typical_p": 1.0, "bos_token_id": 0,
           "force_bos_token_to_be_generated": True}  # fmt: skip
    assert read(old) == Generation(num_beams=4, early_stopping=True, forced_bos=0, decoder_start=0)
    assert read({"stop_strings": "x", "suppress_tokens": [1], "begin_suppress_tokens": [2], "renormalize_logits": True}) == (
        Generation(stop_strings=("x",), suppress=[1], begin_suppress=(2,), renormalize=True))  # fmt: skip
    assert hash(read({"bad_words_ids": [[1], [2, 3]]})) == hash(Generation(bad_words=((1,), (2, 3))))
    with pytest.raises(ValueError, match=r"typical_p is 0.9, expected 1.0 or no such key: npattn would generate other tokens"):
        read({"typical_p": 0.9})
    with pytest.raises(ValueError, match=r"num_beam_groups is 2, expected 1 or no such key"):
        read({**old, "num_beam_groups": 2})
    with pytest.raises(ValueError, match=r"got the key 'chat_format', expected a key that npattn knows"):
        read({"chat_format": "x"})


BAD_SETTINGS = [
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens is -1, expected an integer of at least 0"),
    ({"max_length": 0}, ValueError, "max_length is 0, expected"),
    ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens is a float, expected an integer"),
    ({"top_p": 0.0}, ValueError, "top_p is 0.0, expected a number above 0 and up to 1"),
    ({"top_p": 1.1}, ValueError, "top_p is 1.1, expected"),
    ({"top_p": "1"}, TypeError, "top_p is a str, expected"),
    ({"min_p": -0.1}, ValueError, "min_p is -0.1, expected a number from 0 to 1"),
    ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature is 0.0, .*do_sample=False takes the best token"),
    ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0.0, expected a positive number"),
    ({"length_penalty": np.nan}, ValueError, "length_penalty is nan, expected a finite number"),
    ({"num_beams": 0}, ValueError, "num_beams is 0, expected an integer of at least 1"),
    ({"num_beams": 2, "do_sample": True}, ValueError, "num_beams is 2 with do_sample=True, expected one of the two"),
    ({"num_return_sequences": 2}, ValueError, "num_return_sequences is 2, expected at most num_beams=1, or do_sample=True"),
    ({"num_beams": 2, "num_return_sequences": 3}, ValueError, "num_return_sequences is 3, expected at most num_beams=2"),
    ({"early_stopping": "always"}, ValueError, "early_stopping is 'always', expected True, False or 'never'"),
    ({"do_sample": 1}, TypeError, "do_sample is an int, expected True or False"),
    ({"eos": -2}, ValueError, "eos is -2, expected an integer of at least 0"),
    ({"eos": "</s>"}, TypeError, "eos is a str, expected an integer"),
    ({"suppress": 1.5}, TypeError, "suppress is a float, expected an integer"),
    ({"bad_words": [[1], []]}, ValueError, "bad_words has one of length 0, expected none"),
    ({"stop_strings": ["a", ""]}, ValueError, "stop_strings has one of length 0, expected none"),
    ({"stop_strings": ["a", 3]}, TypeError, "stop_strings has an int, expected strings"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS, ids=str)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=f"Generation: {message}"):
        Generation(**settings)


def broken(at, row, value):
    def step(ids, past):
        logits, past = decode(ids, past)
        if past.ids.shape[1] == 2 + at:
            logits[row] = value
        return logits, past

    return step


SAMPLE, RNG = Generation(do_sample=True, max_new_tokens=5), np.random.default_rng(0)
STOP, BEAMS = Generation(stop_strings="a", pad=1), Generation(num_beams=3)
BAD_CALLS = [
    ({"ids": PROMPTS[0]}, ValueError, r"ids has shape \(2,\), expected \(B, L\)"),
    ({"ids": PROMPTS[:, :0]}, ValueError, r"ids has shape \(3, 0\), expected \(B, L\) with a token for each sequence at least"),
    ({"ids": PROMPTS * 1.0}, TypeError, "ids has dtype float64, expected integers"),
    ({"ids": [[1, -1]]}, ValueError, "ids has the token -1, expected 0 to V - 1 = 6"),
    ({"ids": [[1, 7]], "decode": lambda ids, past: (np.zeros((1, 2, V)), None)}, ValueError, "ids has the token 7, expected"),
    ({"settings": {}}, TypeError, "settings is a dict, expected npattn.models.generation.Generation"),
    ({"settings": Generation(max_length=2)}, ValueError, "ids has L=2 tokens, expected less than max_length=2"),
    ({"settings": Generation(forced_eos=7)}, ValueError, "settings.forced_eos has the token 7, expected 0 to V - 1 = 6"),
    ({"settings": Generation(bad_words=[[1, 9]])}, ValueError, "settings.bad_words has the token 9"),
    ({"settings": SAMPLE}, TypeError, r"rng is a NoneType, expected numpy.random.default_rng\(seed\): do_sample is True"),
    ({"settings": SAMPLE, "rng": 0}, TypeError, "rng is an int"),
    ({"settings": STOP}, TypeError, "text is a NoneType, expected a function of tokens: settings has stop_strings"),
    ({"settings": Generation(stop_strings="a"), "text": str}, ValueError, "settings.pad is None, expected a token"),
    ({"inside": np.ones((3, 2))}, TypeError, r"inside has dtype float64, expected bool \(True = a token, False = padding\)"),
    ({"inside": np.ones((3, 3), bool)}, ValueError, r"inside has shape \(3, 3\), expected \(3, 2\): it is fixed by ids"),
    ({"inside": np.array([[True, False]] * 3)}, ValueError, "inside has False behind True, expected padding at the left"),
    ({"inside": np.zeros((3, 2), bool)}, ValueError, "inside has False behind True"),
    ({"inside": np.array([[False, True]] * 3), "past": Seen(PROMPTS)}, ValueError, "got past and a prompt with padding"),
    ({"source_inside": np.ones((2, 4), bool)}, ValueError, r"source_inside has shape \(2, 4\), expected \(B=3, S\)"),
    ({"decode": None}, TypeError, "decode is a NoneType, expected a function of ids and past"),
    ({"decode": lambda ids, past: (np.zeros((3, V)), None)}, ValueError, r"decode returned logits of shape \(3, 7\), expected"),
    ({"decode": lambda ids, past: ([[[0.0]]], None)}, TypeError, "what decode returned is a list, expected a numpy.ndarray"),
    ({"decode": broken(2, 1, np.nan)}, ValueError, "the logits have nan at step 2 in row 1"),
    ({"decode": broken(3, 2, np.nan), "settings": SAMPLE, "rng": RNG}, ValueError, "the logits have nan at step 3 in row 2"),
    ({"decode": broken(0, 2, np.inf), "settings": SAMPLE, "rng": RNG}, ValueError, "the logits have inf at step 0 in row 2"),
    ({"decode": broken(2, 7, np.nan), "settings": BEAMS}, ValueError, "the logits have nan at step 2 in row 2"),
    ({"decode": broken(0, 1, -np.inf)}, ValueError, "no token is allowed at step 0 in row 1"),
    ({"settings": Generation(suppress=range(V))}, ValueError, "no token is allowed at step 0 in row 0"),
    ({"settings": Generation(suppress=range(V), num_beams=2)}, ValueError, "no token is allowed at step 0 in row 0"),
    ({"settings": Generation(suppress=range(V), do_sample=True), "rng": RNG}, ValueError, "no token is allowed at step 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[message[:40] for *_, message in BAD_CALLS])
def test_bad_calls(call, error, message):
    given = {"decode": decode, "ids": PROMPTS, **call}
    with pytest.raises(error, match=f"generate: {message}"):
        generate(**given)


def test_what_cannot_be_streamed_is_refused_at_once():
    with pytest.raises(ValueError, match=r"stream: settings.num_beams is 2, expected 1"):
        stream(decode, PROMPTS, Generation(num_beams=2))
    with pytest.raises(ValueError, match=r"stream: ids has shape \(2,\)"):
        stream(decode, PROMPTS[0])
