"""Continuing sequences of tokens with a model: greedily, by sampling, or by beam search.

    x = logits of the next token                        (B, V)      (1)    the model, one token a sequence and step
    z = processed(x)                                    (B, V)      (2)    penalties, and tokens that may not or must be next
    token = argmax z                                    (B,)        (3)    greedy
    token ~ softmax(top_p(top_k(z / temperature)))      (B,)        (4)    sampling
    s' = s + processed(log softmax(x)), the best        (B, beams)  (5)    beam search: several sequences for each prompt

A model is a function, and nothing here knows what is inside. Settings have the names, the defaults and the meaning of
`generate` in Hugging Face transformers (compared with 5.24), and the tokens are the same, except that

- a beam that is shorter than others is padded with ``pad`` even if that is 0: transformers takes eos there
  (github.com/huggingface/transformers/pull/47286);
- a stop string counts in the text that was generated; in transformers it may begin in the prompt;
- the random numbers of sampling are others, but their distribution is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from npattn.ops.checks import Array, as_array, check_dtype, check_flag, check_integer, check_number, integers, kind
from npattn.ops.masks import keys
from npattn.ops.softmax import log_sum_exp

REAL = np.dtype(np.float64)
NEVER = -1e9  # the score of a beam that does not exist: below any real one, but above that of a forbidden token

# --- settings ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation:
    """How sequences are continued. None is the default of Hugging Face transformers, everywhere.

    max_new_tokens, max_length     : the longest continuation, or sequence with its prompt; 20 new tokens if neither is given
    min_new_tokens, min_length     : eos is forbidden in shorter ones; the first of each pair counts where both are given
    do_sample                      : draw the token, equation (4), in place of taking the best one
    temperature, top_k, top_p, min_p : of sampling: `with_temperature` and so on; top_k=0, top_p=1 and min_p=None are off
    repetition_penalty             : `with_repetition_penalty`; 1 is off
    no_repeat_ngram_size           : `without_repeated_ngrams`; 0 is off
    bad_words, suppress            : sequences, and tokens, that never come: `without_sequences`, `without_tokens`
    begin_suppress                 : tokens that are not the first one
    forced_bos, forced_eos         : the token that follows a prompt of one token, and the last one that max_length allows
    num_beams, length_penalty      : beam search; the score of a finished beam of n new tokens is divided by n ** length_penalty
    early_stopping                 : True: as soon as num_beams have finished; False: when the best one that runs would not be
                                     better if it ended now; "never": when none can become better
    renormalize                    : beams: log softmax again after the processors
    num_return_sequences           : rows for each prompt: the best beams, or so many draws
    eos, pad                       : a sequence ends at any of eos, an integer or several; behind it comes pad, or the first eos
    stop_strings                   : a sequence ends, too, when its new text has one of them; `generate` needs text for it
    decoder_start                  : what the prompt of an encoder-decoder is; not used here

    Raises TypeError, ValueError.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: Sequence[Sequence[int]] = ()
    suppress: Sequence[int] = ()
    begin_suppress: Sequence[int] = ()
    forced_bos: int | None = None
    forced_eos: int | Sequence[int] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    renormalize: bool = False
    num_return_sequences: int = 1
    eos: int | Sequence[int] = ()
    pad: int | None = None
    stop_strings: str | Sequence[str] = ()
    decoder_start: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is None and field.default is not None:
                object.__setattr__(self, field.name, field.default)
        for name in ("eos", "forced_eos", "suppress", "begin_suppress"):
            object.__setattr__(self, name, _tokens(name, getattr(self, name)))
        words = [_tokens("bad_words", word) for word in self.bad_words]
        object.__setattr__(self, "bad_words", tuple(words))
        strings = (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)
        object.__setattr__(self, "stop_strings", strings)
        for x in strings:
            if not isinstance(x, str):
                raise TypeError(f"Generation: stop_strings has {kind(x)}, expected strings")
        if not all(words) or not all(strings):
            raise ValueError(f"Generation: {'stop_strings' if all(words) else 'bad_words'} has one of length 0, expected none")
        for name, least in _INTEGERS.items():
            if getattr(self, name) is not None:
                check_integer("Generation", name, getattr(self, name), least=least)
        for name in ("do_sample", "renormalize"):
            check_flag("Generation", name, getattr(self, name))
        for name in ("temperature", "repetition_penalty", "length_penalty", "top_p"):
            check_number("Generation", name, getattr(self, name), REAL)
        if self.repetition_penalty <= 0:
            raise ValueError(f"Generation: repetition_penalty is {self.repetition_penalty}, expected a positive number")
        if self.do_sample and self.temperature <= 0:  # without do_sample it is not used, and files have a 0 there
            hint = "do_sample=False takes the best token"
            raise ValueError(f"Generation: temperature is {self.temperature}, expected a positive number; {hint}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Generation: top_p is {self.top_p}, expected a number above 0 and up to 1")
        if self.min_p is not None and not 0 <= check_number("Generation", "min_p", self.min_p, REAL) <= 1:
            raise ValueError(f"Generation: min_p is {self.min_p}, expected a number from 0 to 1")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f"Generation: early_stopping is {self.early_stopping!r}, expected True, False or 'never'")
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"Generation: num_beams is {self.num_beams} with do_sample=True, expected one of the two")
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            raise ValueError(
                f"Generation: num_return_sequences is {self.num_return_sequences}, expected at most num_beams="
                f"{self.num_beams}, or do_sample=True: all other rows would be the same"
            )

    @classmethod
    def from_hugging_face(cls, settings: Mapping[str, Any]) -> Generation:
        """The settings of a generation_config.json, or those in an old config.json, which "model_type" tells apart.

        A key that changes the tokens and is not known here is a ValueError, not a warning: the text would be wrong, and nothing
        in it would show that. What only concerns speed or other outputs is ignored, and so is all else in a config.json.

        >>> Generation.from_hugging_face({"eos_token_id": [2, 3], "max_length": 60, "use_cache": True}).eos
        (2, 3)
        """
        given = {key: value for key, value in settings.items() if value is not None}
        known = {NAMES.get(key, key): value for key, value in given.items() if key in _KEYS}
        for key, value in given.items():
            if key in _OTHERS and value != _OTHERS[key]:
                expected = f"expected {_OTHERS[key]!r} or no such key: npattn would generate other tokens"
                raise ValueError(f"Generation.from_hugging_face: {key} is {value!r}, {expected}")
            if key not in (*_KEYS, *_OTHERS, *_HARMLESS) and "model_type" not in settings:
                expected = "expected a key that npattn knows; leave it out if it does not change the tokens"
                raise ValueError(f"Generation.from_hugging_face: got the key {key!r}, {expected}")
        if known.get("pad", 0) < 0:  # files that mean that there is none
            del known["pad"]
        if "bos_token_id" in given:
            known.setdefault("decoder_start", given["bos_token_id"])
            if "model_type" in settings and given.get("force_bos_token_to_be_generated"):  # the name in old files of BART
                known["forced_bos"] = given["bos_token_id"]
        return cls(**known)


_INTEGERS = {"max_new_tokens": 0, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "top_k": 0, "no_repeat_ngram_size": 0,
             "forced_bos": 0, "num_beams": 1, "num_return_sequences": 1, "pad": 0, "decoder_start": 0}  # fmt: skip
NAMES = {"bad_words_ids": "bad_words", "suppress_tokens": "suppress", "begin_suppress_tokens": "begin_suppress",
          "forced_bos_token_id": "forced_bos", "forced_eos_token_id": "forced_eos", "renormalize_logits": "renormalize",
          "eos_token_id": "eos", "pad_token_id": "pad", "decoder_start_token_id": "decoder_start"}  # fmt: skip
_KEYS = {*NAMES, *(field.name for field in fields(Generation))} - set(NAMES.values())
_OTHERS: dict[str, Any] = {  # what else changes the tokens, with the value that turns it off
    "typical_p": 1.0, "top_h": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0, "num_beam_groups": 1, "diversity_penalty": 0.0, "penalty_alpha": 0.0,
    "guidance_scale": 1, "exponential_decay_length_penalty": None, "sequence_bias": None, "token_healing": False,
    "watermarking_config": None, "dola_layers": None, "constraints": None, "force_words_ids": None,
    "forced_decoder_ids": None, "max_time": None, "speculation_type": None,
}  # fmt: skip
_HARMLESS = {  # NaN is an error here, so that remove_invalid_values has nothing to do; assistants change only the speed
    "transformers_version", "_from_model_config", "_commit_hash", "bos_token_id", "use_cache", "cache_implementation",
    "cache_config", "max_cache_len", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "remove_invalid_values", "low_memory", "prefill_chunk_size", "continuous_batching_config",
    "compile_config", "disable_compile", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_ensemble_weight", "use_mtp",
}  # fmt: skip


def _tokens(name: str, x: Any) -> tuple[int, ...]:
    return tuple(check_integer("Generation", name, token, least=0) for token in (x if isinstance(x, Iterable) else [x]))


# --- (2): what may be next ----------------------------------------------------------------------------------------------------
# Functions of the logits (B, V) and of the tokens so far (B, S), which modify neither. `Generation` has checked the numbers.


def with_repetition_penalty(logits: Array, ids: Array, penalty: float, padding: Array | None = None) -> Array:
    """Makes tokens less probable that are there already.

        z_v = x_v / penalty  where x_v >= 0,  x_v penalty  where x_v < 0,     for each v in ids

    padding : (B,) of how many tokens at the left do not count. Keskar et al. 2019, section 4.1
    """
    if padding is not None:  # the last token is always a real one, and it may be there twice
        ids = np.where(np.arange(ids.shape[1]) < padding[:, None], ids[:, -1:], ids)
    z: Array = logits.copy()
    rows = np.arange(len(ids))[:, None]
    x = logits[rows, ids]
    z[rows, ids] = np.where(x < 0, x * penalty, x / penalty)
    return z


def without_repeated_ngrams(logits: Array, ids: Array, size: int) -> Array:
    """Forbids every token that would end a sequence of ``size`` tokens which is there already.

    z_v = -inf  where (the last size - 1 tokens, v) is among the windows of ids,  else x_v
    """
    S = ids.shape[1]
    if size > S:
        return logits
    windows = np.lib.stride_tricks.sliding_window_view(ids, size, axis=1)  # (B, S - size + 1, size)
    same = np.all(windows[..., :-1] == ids[:, None, S + 1 - size :], axis=-1)
    rows, at = np.nonzero(same)
    z: Array = logits.copy()
    z[rows, windows[rows, at, -1]] = -np.inf
    return z


def without_sequences(logits: Array, ids: Array, sequences: Sequence[Sequence[int]]) -> Array:
    """Forbids every token that would end one of the sequences.

    z_v = -inf  where (u, v) is one of the sequences and ids end with u,  else x_v
    """
    z: Array = logits.copy()
    S = ids.shape[1]
    for *start, last in sequences:
        if len(start) <= S:
            z[(ids[:, S - len(start) :] == start).all(-1), last] = -np.inf
    return z


def without_tokens(logits: Array, tokens: Sequence[int]) -> Array:
    """Forbids tokens: z_v = -inf for each v in tokens, else x_v."""
    z: Array = logits.copy()
    z[:, [v for v in tokens if v < z.shape[1]]] = -np.inf
    return z


def with_forced_tokens(logits: Array, tokens: Sequence[int]) -> Array:
    """Allows only these: z_v = 0 for each v in tokens, else -inf."""
    z: Array = np.full_like(logits, -np.inf)
    z[:, list(tokens)] = 0
    return z


# --- (4): sampling -----------------------------------------------------------------------------------------------------------


def with_temperature(logits: Array, temperature: float) -> Array:
    """z = x / temperature: below 1 what is probable becomes more so. Ackley et al. 1985"""
    return logits / temperature


def with_top_k(logits: Array, top_k: int) -> Array:
    """Keeps the top_k most probable tokens, and those that are as probable as the last of them. Fan et al. 2018

    z_v = x_v  where x_v >= the top_k-th largest of x,  else -inf
    """
    at = max(logits.shape[-1] - top_k, 0)
    return _kept(logits, logits >= np.partition(logits, at, axis=-1)[:, at, None])


def with_top_p(logits: Array, top_p: float) -> Array:
    """Keeps the most probable tokens, the fewest that have top_p together, and those that are as probable as the last of them.

        z_v = x_v  where (sum of p_u over all u with p_u <= p_v) > 1 - top_p,  else -inf,     p = softmax(x)

    Holtzman et al. 2020, section 3.1
    """
    p, V = _softmax(logits), logits.shape[-1]
    least = np.empty((len(p), 1))  # the smallest probability that is kept
    for n, row in enumerate(p):
        for some in (min(V, 1024), min(V, 8192), V):  # few tokens are nearly always enough: to sort all takes longer
            largest = np.sort(np.partition(row, V - some)[V - some :])
            below = (row.sum() - largest.sum()) + largest.cumsum()
            if below[0] <= 1 - top_p:
                break
        least[n] = largest[min(int(np.searchsorted(below, 1 - top_p, "right")), some - 1)]
    return _kept(logits, p >= least)


def with_min_p(logits: Array, min_p: float) -> Array:
    """Keeps tokens that have min_p times the probability of the best one. Nguyen et al. 2024

    z_v = x_v  where exp(x_v - max x) >= min_p,  else -inf
    """
    return _kept(logits, np.exp(logits - logits.max(-1, keepdims=True)) >= min_p)


def _kept(logits: Array, keep: Array) -> Array:
    z: Array = np.full_like(logits, -np.inf)
    np.copyto(z, logits, where=keep)
    return z


def distribution(logits: Array, settings: Generation) -> tuple[Array, Array]:
    """The probabilities from which a token is drawn, equation (4). logits : (B, V), after (2)

    Returns p (B, n) in float64, and the tokens (n,): some tokens of probability 0 are left out.

    >>> p, tokens = distribution(np.log([[0.5, 0.1, 0.3, 0.1]]), Generation(do_sample=True, top_k=2))
    >>> p.round(3).tolist(), tokens.tolist()
    ([[0.625, 0.375]], [0, 2])
    """
    s, z, tokens = settings, logits, None
    filters: list[tuple[Callable[..., Array], Any, Any]] = [  # what keeps some tokens, its setting, and that of none
        (with_top_k, s.top_k, 0),  # first: a temperature does not change it, and what comes then has few columns in place of V
        (with_temperature, s.temperature, 1), (with_top_p, s.top_p, 1), (with_min_p, s.min_p, None)]  # fmt: skip
    for keep, setting, none in filters:
        if setting != none:
            z = keep(z if keep is with_top_k else z.astype(REAL, copy=False), setting)
            if keep is not with_temperature:
                some = np.flatnonzero((z > -np.inf).any(0))
                z, tokens = z[:, some], some if tokens is None else tokens[some]
    return _softmax(z.astype(REAL, copy=False)), np.arange(z.shape[1]) if tokens is None else tokens


def _softmax(z: Array) -> Array:
    """As `npattn.softmax`, in one array: where V is 50,000 most of the time goes into new memory."""
    p: Array = z - z.max(-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(-1, keepdims=True)
    return p


# --- one call ----------------------------------------------------------------------------------------------------------------


class _Call:
    """The model of one call of `generate`, with what it needs for each row, and the settings with the lengths of this call."""

    def __init__(
        self, op: str, decode: Callable[..., Any], ids: Any, settings: Any, inside: Any, past: Any, source_inside: Any,
        rng: Any, text: Any,
    ) -> None:  # fmt: skip
        if not isinstance(settings, Generation):
            raise TypeError(f"{op}: settings is {kind(settings)}, expected npattn.models.generation.Generation")
        if not callable(decode):
            raise TypeError(f"{op}: decode is {kind(decode)}, expected a function of ids and past")
        self.op, self.decode, self.past, self.settings, self.rng, self.text = op, decode, past, settings, rng, text
        self.ids = integers(op, "ids", ids)
        if self.ids.ndim != 2 or not self.ids.size:
            raise ValueError(f"{op}: ids has shape {self.ids.shape}, expected (B, L) with a token for each sequence at least")
        B, L = self.ids.shape
        self.rows = B  # of the model: fewer when some have ended, more with beams
        self.most = settings.max_length if settings.max_length is not None else L + 20
        if settings.max_new_tokens is not None:
            self.most = L + settings.max_new_tokens
        elif self.most <= L:
            raise ValueError(f"{op}: ids has L={L} tokens, expected less than max_length={self.most}")
        self.least = settings.min_length if settings.min_new_tokens is None else L + settings.min_new_tokens
        self.begin = L if L > 1 or settings.forced_bos is None else 2  # the length at which begin_suppress counts
        self.eos, self.forced_eos = _tokens("eos", settings.eos), _tokens("forced_eos", settings.forced_eos)
        self.bad_words = [word for word in settings.bad_words if len(word) > 1 or word[0] not in self.eos]
        self.pad = settings.pad if settings.pad is not None or not self.eos else self.eos[0]
        if self.pad is None and settings.stop_strings and B * max(settings.num_beams, settings.num_return_sequences) > 1:
            raise ValueError(f"{op}: settings.pad is None, expected a token: stop_strings end sequences at different lengths")
        if settings.stop_strings and not callable(text):
            raise TypeError(f"{op}: text is {kind(text)}, expected a function of tokens: settings has stop_strings")
        if settings.do_sample and not isinstance(rng, np.random.Generator):
            raise TypeError(f"{op}: rng is {kind(rng)}, expected numpy.random.default_rng(seed): do_sample is True")
        self.longest_stop = max((len(x.encode()) for x in settings.stop_strings), default=0)
        self.length = 0  # of what the model has seen
        self.inside, self.padding = self._padding(inside)
        if self.inside is not None and past is not None:
            raise ValueError(f"{op}: got past and a prompt with padding, expected one of the two: past has no padding")
        self.source_inside = None if source_inside is None else as_array(op, "source_inside", source_inside, "booleans")
        if self.source_inside is not None and (self.source_inside.ndim != 2 or len(self.source_inside) != B):
            raise ValueError(f"{op}: source_inside has shape {self.source_inside.shape}, expected (B={B}, S): fixed by ids")
        self.cross = {} if self.source_inside is None else {"cross_mask": keys(self.source_inside)}

    def _padding(self, inside: Any) -> tuple[Array | None, Array | None]:
        """inside for all steps, (B, max_length), and how many tokens are padding, (B,); None where there are none."""
        if inside is None:
            return None, None
        given = as_array(self.op, "inside", inside, "booleans, as ids")
        if given.dtype != np.bool_:
            raise TypeError(f"{self.op}: inside has dtype {given.dtype}, expected bool (True = a token, False = padding)")
        if given.shape != self.ids.shape:
            raise ValueError(f"{self.op}: inside has shape {given.shape}, expected {self.ids.shape}: it is fixed by ids")
        if not given[:, -1].all() or (given[:, :-1] & ~given[:, 1:]).any():
            raise ValueError(f"{self.op}: inside has False behind True, expected padding at the left, and a token at the end")
        if given.all():
            return None, None
        whole = np.ones((len(given), self.most), bool)
        whole[:, : given.shape[1]] = given
        return whole, given.shape[1] - given.sum(1)

    def logits(self, ids: Array) -> Array:
        """Equation (1): the logits behind the last of these tokens, (B, L) -> (B, V)."""
        start, self.length = self.length, self.length + ids.shape[1]
        seen: dict[str, Any] = dict(self.cross)
        if self.inside is not None and self.padding is not None:
            positions = np.arange(start, self.length) - self.padding[:, None]
            seen |= {"mask": keys(self.inside[:, : self.length]), "positions": np.maximum(positions, 0)}
        logits, self.past = self.decode(ids, past=self.past, **seen)
        computing = check_dtype(self.op, **{"what decode returned": logits})
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            shape = f"(B={len(ids)}, L={ids.shape[1]}, V)"
            raise ValueError(f"{self.op}: decode returned logits of shape {logits.shape}, expected {shape}")
        last: Array = logits[:, -1].astype(computing, copy=False)
        if start == 0:
            self._check_tokens(last.shape[1])
        return last

    def _check_tokens(self, V: int) -> None:
        s = self.settings
        forced = [] if s.forced_bos is None else [s.forced_bos]
        words = [token for word in s.bad_words for token in word]
        for name, tokens in (("ids", self.ids), ("settings.forced_bos", forced), ("settings.forced_eos", self.forced_eos),
                             ("settings.bad_words", words)):  # fmt: skip
            wrong = [int(v) for v in np.ravel(tokens) if not 0 <= v < V]
            if wrong:
                raise ValueError(f"{self.op}: {name} has the token {wrong[0]}, expected 0 to V - 1 = {V - 1}")

    def keep(self, index: Array) -> None:
        """Only these rows of the model, in this order; one may come several times."""
        if np.array_equal(index, np.arange(self.rows)):
            return
        self.rows = len(index)
        if self.past is not None:
            self.past = self.past.rows(index)
        if self.inside is not None and self.padding is not None:
            self.inside, self.padding = self.inside[index], self.padding[index]
        if self.source_inside is not None:
            self.source_inside = self.source_inside[index]
            self.cross = {"cross_mask": keys(self.source_inside)}

    def processed(self, x: Array, ids: Array) -> Array:
        """Equation (2), in the order of transformers. x : (B, V)   ids : (B, S), all tokens so far"""
        s, S = self.settings, ids.shape[1]
        if s.repetition_penalty != 1:
            x = with_repetition_penalty(x, ids, s.repetition_penalty, self.padding)
        if s.no_repeat_ngram_size:
            x = without_repeated_ngrams(x, ids, s.no_repeat_ngram_size)
        if self.bad_words:
            x = without_sequences(x, ids, self.bad_words)
        if self.least > S and self.eos:
            x = without_tokens(x, self.eos)
        if s.forced_bos is not None and ids.shape[1] == 1:
            x = with_forced_tokens(x, (s.forced_bos,))
        if self.forced_eos and self.most == S + 1:
            x = with_forced_tokens(x, self.forced_eos)
        if s.suppress:
            x = without_tokens(x, s.suppress)
        if s.begin_suppress and self.begin == S:
            x = without_tokens(x, s.begin_suppress)
        return x

    def ended(self, new: Array) -> Array:
        """Which sequences end with their last token. new : (..., n), what was generated"""
        ends = np.asarray((new[..., -1:] == self.eos).any(-1)) if self.eos else np.zeros(new.shape[:-1], bool)
        if self.settings.stop_strings:
            # A token has a byte at least. One more: what stands first may lose its space.
            recent = new[..., -self.longest_stop - 1 :]
            for at in np.ndindex(ends.shape):
                ends[at] = ends[at] or any(x in self.text(recent[at]) for x in self.settings.stop_strings)
        return ends

    def check(self, best: Array, rows: Array, step: int) -> None:
        """best : (B,), the largest logit of each row"""
        wrong = np.flatnonzero(~np.isfinite(best))
        if len(wrong):
            row, value = rows[wrong[0]], best[wrong[0]]
            what = "no token is allowed" if value == -np.inf else f"the logits have {value}"
            raise ValueError(f"{self.op}: {what} at step {step} in row {row}, expected finite logits for some token")


def stream(
    decode: Callable[..., Any], ids: Any, settings: Generation = Generation(), *, inside: Any = None, past: Any = None,
    source_inside: Any = None, rng: np.random.Generator | None = None, text: Callable[[Array], str] | None = None,
) -> Iterator[Array]:  # fmt: skip
    """The new tokens, (B,) or (B * num_return_sequences,), as soon as each is chosen. All is as in `generate`, but for beams.

    >>> def count(ids, past, **_):  # the next token is one more
    ...     return np.eye(7)[(ids + 1) % 7], past
    >>> [column.tolist() for column in stream(count, [[2], [5]], Generation(max_new_tokens=3, eos=6, pad=0))]
    [[3, 6], [4, 0], [5, 0]]
    """
    call = _Call("stream", decode, ids, settings, inside, past, source_inside, rng, text)
    if settings.num_beams > 1:
        raise ValueError(f"stream: settings.num_beams is {settings.num_beams}, expected 1: beams are not known before the end")
    return _columns(call)


def generate(
    decode: Callable[..., Any], ids: Any, settings: Generation = Generation(), *, inside: Any = None, past: Any = None,
    source_inside: Any = None, rng: np.random.Generator | None = None, text: Callable[[Array], str] | None = None,
) -> Array:  # fmt: skip
    """Continues sequences until all have ended, or have max_length tokens.

    decode : decode(ids (B, L), past=past) -> (logits (B, L, V), past); past.rows(index) are some of its sequences. As
             ``functools.partial(language_model_decode, params=params, config=config)``. With padding it gets mask and
             positions, too
    ids : (B, L), the prompts, padded at the left; of an encoder-decoder (B, 1), ``settings.decoder_start``
    inside : (B, L), False where a prompt is padded   past : what decode gets first, as `transformer_memory` returns it
    source_inside : (B, S), False where the source is padded: decode gets it as cross_mask, with a row for each beam
    rng : for sampling; a row takes one number a step   text : the text of tokens (n,), for stop_strings
    Returns (B * num_return_sequences, at most max_length), the prompts and what follows. Raises TypeError, ValueError.

    >>> def count(ids, past, **_):  # the next token is one more
    ...     return np.eye(7)[(ids + 1) % 7], past
    >>> generate(count, [[2], [5]], Generation(max_new_tokens=3, eos=6, pad=0)).tolist()
    [[2, 3, 4, 5], [5, 6, 0, 0]]
    """
    call = _Call("generate", decode, ids, settings, inside, past, source_inside, rng, text)
    if call.most == call.ids.shape[1]:
        return np.repeat(call.ids, settings.num_return_sequences, axis=0)
    if settings.num_beams > 1:
        return _beam_search(call)
    columns = list(_columns(call))
    prompts = np.repeat(call.ids, settings.num_return_sequences, axis=0)
    return np.concatenate([prompts, np.stack(columns, axis=1)], axis=1)


def _columns(call: _Call) -> Iterator[Array]:
    """Greedy decoding and sampling, equations (1) to (4)."""
    (B, L), s = call.ids.shape, call.settings
    copies = np.repeat(np.arange(B), s.num_return_sequences)
    ids = np.empty((len(copies), call.most), np.int64)
    ids[:, :L] = call.ids[copies]
    rows = np.arange(len(copies))  # which have not ended: the model computes only these
    for S in range(L, call.most):
        x = call.logits(call.ids if S == L else ids[rows, S - 1 : S])  # (1)
        if S == L:
            call.keep(copies)
            x = x[copies]
        call.check(x.max(-1), rows, S - L)
        so_far = ids[rows, :S]
        z = call.processed(x, so_far)  # (2)
        if s.do_sample:
            call.check(z.max(-1), rows, S - L)
            p, tokens = distribution(z, s)  # (4)
            sums = p.cumsum(-1)
            at = call.rng.random(len(copies))[rows] * sums[:, -1]  # one for each row, whichever have ended
            chosen = tokens[[np.searchsorted(row, value, "right") for row, value in zip(sums, at, strict=True)]]
        else:
            chosen = z.argmax(-1)  # (3)
            call.check(z[np.arange(len(rows)), chosen], rows, S - L)
        ids[:, S] = -1 if call.pad is None else call.pad
        ids[rows, S] = chosen
        yield ids[:, S].copy()
        left = np.flatnonzero(~call.ended(ids[rows, L : S + 1]))
        if not len(left):
            return
        call.keep(left)
        rows = rows[left]


def _largest(x: Array, n: int) -> Array:
    """Where the n largest of each row are, the largest first. x : (B, any) -> (B, n)"""
    best = np.sort(np.argpartition(x, x.shape[1] - n, axis=1)[:, x.shape[1] - n :], axis=1)
    order = np.argsort(-np.take_along_axis(x, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


def _beam_search(call: _Call) -> Array:
    """Beam search, equation (5), as in transformers. K beams run and K at most have finished, for each of B prompts.

    Of the best C = K (1 + number of eos) continuations, or 2 K, those that do not end run on, K of them; those that end and
    are among the best K compete with what has finished before, by their score / length ** length_penalty.
    """
    (B, L), s, most = call.ids.shape, call.settings, call.most
    K, fill = s.num_beams, -1 if call.pad is None else call.pad
    running = np.full((B, K, most), fill)
    running[..., :L] = call.ids[:, None]
    scores = np.full((B, K), NEVER)
    scores[:, 0] = 0  # all beams are one at the start
    finished, finals, full = running.copy(), np.full((B, K), NEVER), np.zeros((B, K), bool)
    lengths = np.full((B, K), L)
    found = [(finished[0], lengths[0])] * B  # of each prompt
    rows = np.arange(B)
    for S in range(L, most):
        x = call.logits(call.ids if S == L else running[..., S - 1].reshape(-1, 1)).astype(REAL)  # (1)
        if S == L:
            beams = np.repeat(np.arange(B), K)
            call.keep(beams)
            x = x[beams]
        best = x.max(-1, keepdims=True)
        call.check(best[:, 0], np.repeat(rows, K), S - L)
        x -= best
        log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
        log_p = call.processed(log_p, running[..., :S].reshape(-1, S))  # (2)
        if s.renormalize:
            log_p = log_p - np.maximum(log_sum_exp(log_p), NEVER)[:, None]  # a beam that may not go on stays at -inf
        N, V = len(rows), log_p.shape[1]
        total = (log_p.reshape(N, K, V) + scores[..., None]).reshape(N, K * V)  # (5)
        C = min(max(2, 1 + len(call.eos)) * K, K * V)
        best = _largest(total, C)
        origins, token = np.divmod(best, V)
        top, b = np.take_along_axis(total, best, 1), np.arange(N)[:, None]
        call.check(top[:, 0], rows, S - L)
        candidates = running[b, origins]
        candidates[..., S] = token
        ends = call.ended(candidates[..., L : S + 1]) | (most == S + 1)

        on = _largest(top + NEVER * ends, K)
        running, scores, origins = candidates[b, on], (top + NEVER * ends)[b, on], origins[b, on]

        counts = ends & (np.arange(C) < K)  # the others are there to run on alone
        final = top / (S + 1 - L) ** s.length_penalty + NEVER * ~counts
        finals, full = np.concatenate([finals, final], 1), np.concatenate([full, counts], 1)
        lengths = np.concatenate([lengths, np.full((N, C), S + 1)], 1)
        kept = _largest(finals, K)
        finished = np.concatenate([finished, candidates], 1)[b, kept]
        finals, full, lengths = finals[b, kept], full[b, kept], lengths[b, kept]

        longest = most - L if s.early_stopping == "never" and s.length_penalty > 0 else S + 1 - L
        better = scores[:, 0] / longest**s.length_penalty > finals.min(1)  # what has not finished is worse than any
        done = ~better | (full.all(1) & (s.early_stopping is True)) | ends.all()
        for n in np.flatnonzero(done):
            found[rows[n]] = (finished[n], lengths[n])
        left = np.flatnonzero(~done)
        if not len(left):
            break
        call.keep((K * np.arange(N)[:, None] + origins)[left].ravel())
        rows, running, scores = rows[left], running[left], scores[left]
        finished, finals, full, lengths = finished[left], finals[left], full[left], lengths[left]
    best_ids = np.concatenate([ids[: s.num_return_sequences] for ids, _ in found])
    return best_ids[:, : max(int(n[: s.num_return_sequences].max()) for _, n in found)]


__all__ = [
    "Generation",
    "distribution",
    "generate",
    "stream",
    "with_forced_tokens",
    "with_min_p",
    "with_repetition_penalty",
    "with_temperature",
    "with_top_k",
    "with_top_p",
    "without_repeated_ngrams",
    "without_sequences",
    "without_tokens",
]
