"""Generation against transformers: the same tokens for every setting, the same processors, the same distribution of a draw.

Most tests give npattn the logits of the transformers model itself, so that nothing but generation is compared; the last ones
decode with npattn's own models.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import first

torch = pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
transformers = pytest.importorskip("transformers", reason="needs the peers extra: pip install npattn[peers]")

import npattn
from npattn import FeedForwardParams, MultiHeadParams, NormParams, Rotary
from npattn.models import generation
from npattn.models.blocks import DecoderBlockParams, EncoderBlockParams
from npattn.models.config import Config, Relative
from npattn.models.generation import Generation, distribution, generate
from npattn.models.language import LanguageModelParams, language_model_decode
from npattn.models.transformer import (
    DecoderParams,
    EmbedParams,
    EncoderParams,
    HeadParams,
    TransformerParams,
    transformer_decode,
    transformer_memory,
)

V, B, L, S = 41, 3, 6, 7
SIZES = {
    "GPT-2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.5),
    "Llama": lambda: transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.4),
    "BART": lambda: transformers.BartConfig(
        vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, init_std=0.15, forced_eos_token_id=None),
    "T5": lambda: transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=16, initializer_factor=4.0, decoder_start_token_id=0),
}  # fmt: skip
CLASSES = {"GPT-2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM", "BART": "BartForConditionalGeneration",
           "T5": "T5ForConditionalGeneration"}  # fmt: skip
PAD, START = 40, 39
SEEDS = {"GPT-2": 30, "Llama": 3, "BART": 13, "T5": 24}  # with which rows end at different steps


@functools.cache
def model_of(name):
    """A small model with random weights, in float64; the sharpness of its logits is that of trained ones."""
    torch.manual_seed(SEEDS[name])
    config = SIZES[name]()
    config._attn_implementation = "eager" if name != "Llama" else "sdpa"  # eager: NaN with padding, in float64
    config.tie_word_embeddings = False  # else a token is the most probable one after itself
    model = getattr(transformers, CLASSES[name])(config).double().eval()
    if name == "BART":
        model.final_logits_bias.copy_(torch.randn(1, V))
        model.lm_head.weight.data *= 4
    model.generation_config = transformers.GenerationConfig()
    return model


def prompt_of(name):
    """Tokens, and where they are no padding: of the prompt, or of the source of an encoder-decoder."""
    rng, length = np.random.default_rng(8), S if name in ("BART", "T5") else L
    inside = np.arange(length) >= np.array([[0], [2], [3]])
    inside = inside[:, ::-1].copy() if name in ("BART", "T5") else inside  # sources are padded at the right
    return np.where(inside, rng.integers(0, PAD, (B, length)), PAD), inside


def theirs(name, settings, ids, inside, **more):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # lengths that cannot be reached, 20 tokens by default
        given = transformers.GenerationConfig(**settings)
        return model_of(name).generate(torch.tensor(ids), attention_mask=torch.tensor(inside.astype(int)),
                                       generation_config=given, **more).numpy()  # fmt: skip


class Past(NamedTuple):
    """Everything that the model has seen: it computes all of it again."""

    ids: Any
    positions: Any = None
    memory: Any = None

    def rows(self, index):
        return Past(*(None if x is None else x[index] for x in self))


def causal_step(name):
    """The logits of transformers' causal model. Mask and positions are those that generation gives."""

    def decode(ids, past, mask=None, positions=None):
        if past is not None:
            ids = np.concatenate([past.ids, ids], 1)
            positions = None if positions is None else np.concatenate([past.positions, positions], 1)
        new = ids.shape[1] if past is None else 1
        given = {} if mask is None else {"attention_mask": mask.allowed.astype(int), "position_ids": positions}
        with torch.no_grad():
            given = {key: torch.tensor(x) for key, x in given.items()}
            logits = model_of(name)(torch.tensor(ids), **given, use_cache=False).logits
        return logits[:, -new:].numpy(), Past(ids, positions)

    return decode


def encoder_decoder_step(name):
    def decode(ids, past, cross_mask):
        ids = np.concatenate([past.ids, ids], 1)
        with torch.no_grad():
            inside = torch.tensor(cross_mask.allowed).int()
            logits = model_of(name)(encoder_outputs=(torch.tensor(past.memory),), attention_mask=inside,
                                    decoder_input_ids=torch.tensor(ids), use_cache=False).logits  # fmt: skip
        return logits[:, -1:].numpy(), past._replace(ids=ids)

    return decode


def ours(name, settings, ids, inside, **more):
    settings = Generation.from_hugging_face(settings)
    if name in ("GPT-2", "Llama"):
        return generate(causal_step(name), ids, settings, inside=inside, **more)
    with torch.no_grad():
        memory = model_of(name).get_encoder()(torch.tensor(ids), attention_mask=torch.tensor(inside).int())
    start = np.full((len(ids), 1), settings.decoder_start)
    past = Past(np.empty((len(ids), 0), np.int64), memory=memory.last_hidden_state.numpy())
    return generate(encoder_decoder_step(name), start, settings, past=past, source_inside=inside, **more)


SOME = [7, 11, 12, 20, 33]  # tokens that end a text: enough that rows end at different steps
BASES = [
    {}, {"eos_token_id": 7}, {"eos_token_id": None}, {"min_new_tokens": 4}, {"min_length": 9}, {"max_length": 12},
    {"max_new_tokens": 1}, {"max_new_tokens": 14, "repetition_penalty": 1.4}, {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3, "eos_token_id": 7},
    {"bad_words_ids": [[7], [3], [5, 6], [1, 2, 3], [20, 33]]}, {"suppress_tokens": [7, 1, 2, 30]},
    {"begin_suppress_tokens": [*range(15)]}, {"forced_eos_token_id": 9},
    {"forced_bos_token_id": 4}, {"forced_bos_token_id": 4, "begin_suppress_tokens": [*range(15)]},
    {"forced_bos_token_id": 4, "forced_eos_token_id": 7, "eos_token_id": 7, "max_new_tokens": 2},
    {"renormalize_logits": True, "suppress_tokens": [*range(9)], "no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 3, "bad_words_ids": [[PAD]],
     "forced_eos_token_id": 11},
    {"pad_token_id": None}, {"pad_token_id": 5, "eos_token_id": [5, 7]},
]  # fmt: skip
BEAMS = [
    {"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 3}, {"num_beams": 3, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never"}, {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 2.0}, {"num_beams": 3, "length_penalty": -1.5, "num_return_sequences": 3},
    {"num_beams": 5, "length_penalty": 0.5, "early_stopping": True, "num_return_sequences": 2},
    {"num_beams": 3, "length_penalty": 3.0, "early_stopping": "never", "num_return_sequences": 3},
]  # fmt: skip
COMMON = {"eos_token_id": SOME, "pad_token_id": PAD, "decoder_start_token_id": START, "max_new_tokens": 9}
ROWS = [
    *BASES, {"forced_eos_token_id": [9, 10]},  # both have score 0, and beams would tie
    *({"eos_token_id": eos, **beams} for beams in BEAMS for eos in ([7], [11, 12])),
    *({**base, **BEAMS[(2 * n + half * 5) % len(BEAMS)]} for half in (0, 1) for n, base in enumerate(BASES)),
]  # fmt: skip


def whole(row):
    settings = COMMON | row
    if "max_length" in row:
        del settings["max_new_tokens"]
    return settings


def label(row):
    return ",".join(f"{key}={x}".replace(" ", "") for key, x in row.items()) or "plain"


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("row", first(56, ROWS), ids=label)
def test_tokens(name, row):
    ids, inside = prompt_of(name)
    expected = theirs(name, whole(row), ids, inside)
    assert np.array_equal(ours(name, whole(row), ids, inside), expected)


@pytest.mark.parametrize("name", SIZES)
def test_the_rows_of_the_table_differ(name):
    """Else they would prove nothing: rows end at different steps, and most settings change the tokens."""
    ids, inside = prompt_of(name)
    found = [ours(name, whole(row), ids, inside) for row in ROWS]
    assert len({x.tobytes() for x in found}) > len(ROWS) // 3
    tokens = found[0][:, -COMMON["max_new_tokens"] :]
    assert len(set((tokens == PAD).sum(1))) > 1


@pytest.mark.parametrize("name", ["GPT-2", "T5"])
def test_one_prompt_without_padding(name):
    for n, row in itertools.product(range(B), ({}, {"num_beams": 3, "num_return_sequences": 2})):
        ids, inside = (x[n : n + 1] for x in prompt_of(name))
        ids, inside = ids[inside][None], inside[inside][None]
        assert np.array_equal(ours(name, whole(row), ids, inside), theirs(name, whole(row), ids, inside))


@pytest.mark.parametrize("seed", first(6, range(40)))
def test_beams_of_any_settings(seed):
    """Settings that are drawn, so that they meet in ways that the table has not."""
    rng = np.random.default_rng(seed)
    beams = int(rng.integers(2, 6))
    row = {"num_beams": beams, "num_return_sequences": int(rng.integers(1, beams + 1)),
           "length_penalty": float(rng.choice([-2, -0.5, 0, 0.5, 1, 1.7, 4])), "max_new_tokens": int(rng.integers(1, 20)),
           "early_stopping": [True, False, "never"][rng.integers(3)], "no_repeat_ngram_size": int(rng.integers(0, 4)),
           "repetition_penalty": float(rng.choice([0.8, 1.0, 1.0, 1.5])), "min_new_tokens": int(rng.integers(0, 5)),
           "eos_token_id": rng.choice(PAD, rng.integers(1, 9), replace=False).tolist()}  # fmt: skip
    for name in SIZES:
        ids, inside = prompt_of(name)
        assert np.array_equal(ours(name, whole(row), ids, inside), theirs(name, whole(row), ids, inside)), (name, row)


def test_beams_are_padded_with_pad_even_if_that_is_0():
    """Here transformers 5.24 pads with eos: https://github.com/huggingface/transformers/pull/47286."""
    ids, inside = prompt_of("T5")
    row = whole({"num_beams": 4, "num_return_sequences": 3, "eos_token_id": [7, 11, 12], "pad_token_id": 0})
    found, expected = (run("T5", row, ids, inside) for run in (ours, theirs))
    ended = np.cumsum(np.isin(found, row["eos_token_id"]), 1) - np.isin(found, row["eos_token_id"]) > 0
    assert ended.any()
    assert not found[ended].any()
    assert np.array_equal(found[~ended], expected[~ended])


# --- the parts ---------------------------------------------------------------------------------------------------------------

IDS = np.random.default_rng(1).integers(0, 9, (B, 12))  # of few tokens, so that they come again
X = np.random.default_rng(2).standard_normal((B, V)) * 3
LIB = transformers.generation.logits_process
PROCESSORS = [
    *((LIB.TemperatureLogitsWarper(t), lambda x, ids, t=t: generation.with_temperature(x, t)) for t in (0.3, 1.0, 4.0)),
    *((LIB.TopKLogitsWarper(k), lambda x, ids, k=k: generation.with_top_k(x, k)) for k in (1, 5, V, V + 9)),
    *((LIB.TopPLogitsWarper(p), lambda x, ids, p=p: generation.with_top_p(x, p)) for p in (1e-9, 0.3, 0.8, 0.95, 0.999)),
    *((LIB.MinPLogitsWarper(p), lambda x, ids, p=p: generation.with_min_p(x, p)) for p in (0.0, 0.05, 0.5, 1.0)),
    *((LIB.RepetitionPenaltyLogitsProcessor(p), lambda x, ids, p=p: generation.with_repetition_penalty(x, ids, p))
      for p in (0.5, 1.3)),
    (LIB.RepetitionPenaltyLogitsProcessor(1.3, torch.tensor([0, 4, 11])),
     lambda x, ids: generation.with_repetition_penalty(x, ids, 1.3, np.array([0, 4, 11]))),
    *((LIB.NoRepeatNGramLogitsProcessor(n), lambda x, ids, n=n: generation.without_repeated_ngrams(x, ids, n))
      for n in (1, 2, 3, 12, 13)),
    *((LIB.NoBadWordsLogitsProcessor(words), lambda x, ids, words=words: generation.without_sequences(x, ids, words))
      for words in ([[3], [int(IDS[0, -1]), 5], [*map(int, IDS[1, -3:]), 2]], [[1] * 20])),
    (LIB.MinNewTokensLengthLogitsProcessor(7, 6, [3, 4]), lambda x, ids: generation.without_tokens(x, [3, 4])),
    (LIB.SuppressTokensLogitsProcessor([3, V + 2]), lambda x, ids: generation.without_tokens(x, [3, V + 2])),
    (LIB.ForcedEOSTokenLogitsProcessor(13, [3, 4]), lambda x, ids: generation.with_forced_tokens(x, [3, 4])),
]  # fmt: skip


@pytest.mark.parametrize("n", range(len(PROCESSORS)), ids=lambda n: f"{n}-{type(PROCESSORS[n][0]).__name__}")
def test_processors(n):
    their, mine = PROCESSORS[n]
    before, tokens = X.copy(), IDS.copy()
    expected = their(torch.tensor(IDS), torch.tensor(X.copy())).numpy()
    found = mine(X, IDS)
    assert np.array_equal(found, expected)
    assert np.array_equal(X, before)
    assert np.array_equal(IDS, tokens)


DRAWS = [{}, {"top_k": 0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 0, "top_p": 0.6}, {"top_k": 7, "min_p": 0.1},
         {"temperature": 1.8, "top_k": 12, "top_p": 0.8, "min_p": 0.02}, {"top_p": 0.01}, {"top_k": 1},
         {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_k": 9}]  # fmt: skip


@pytest.mark.parametrize("row", DRAWS, ids=label)
def test_the_distribution_of_a_draw(row):
    """Every probability, after all processors in the order in which transformers has them."""
    given = transformers.GenerationConfig(**{"do_sample": True, "top_k": 50, **row})
    given._eos_token_tensor = None
    processors = model_of("Llama")._get_logits_processor(given, input_ids_seq_length=IDS.shape[1])
    expected = torch.softmax(processors(torch.tensor(IDS), torch.tensor(X.copy())), -1).numpy()
    settings = Generation.from_hugging_face({"do_sample": True, **row})
    call = generation._Call("generate", print, IDS, settings, None, None, None, np.random.default_rng(0), None)
    p, tokens = distribution(call.processed(X, IDS), settings)
    found = np.zeros_like(X)
    found[:, tokens] = p
    assert np.array_equal(found > 0, expected > 0)
    eps = np.finfo(X.dtype).eps
    assert np.abs(found - expected).max() <= 8 * np.abs(X).max() * eps  # the error of a logit is the relative one of p


# --- npattn's models ---------------------------------------------------------------------------------------------------------


def weights_of(name):
    """A function of a name in the model: its weight as a product takes it, (in, out), and its bias or None."""
    state = {key: x.numpy() for key, x in model_of(name).state_dict().items()}

    def linear(key):
        return state[f"{key}.weight"].T, state.get(f"{key}.bias")

    def norm(key):
        return NormParams(state[f"{key}.weight"], state.get(f"{key}.bias"))

    def attention(key, *names):
        weights, biases = zip(*(linear(f"{key}.{name}") for name in names), strict=True)
        return MultiHeadParams(*weights, *biases)

    return state, linear, norm, attention


def feed_forward(w_in, w_out, gate=(None, None)):
    return FeedForwardParams(w_in[0], w_out[0], w_in[1], w_out[1], *gate)


def gpt2():
    state, linear, norm, _ = weights_of("GPT-2")
    blocks = []
    for n in range(2):
        of = f"transformer.h.{n}."
        (w, b), (w_o, b_o) = ((x.T, y) for x, y in map(linear, (f"{of}attn.c_attn", f"{of}attn.c_proj")))  # stored (in, out)
        attention = MultiHeadParams(*np.split(w, 3, 1), w_o, *np.split(b, 3), b_o)
        hidden = feed_forward(*((x.T, y) for x, y in map(linear, (f"{of}mlp.c_fc", f"{of}mlp.c_proj"))))
        blocks.append(EncoderBlockParams(attention, norm(f"{of}ln_1"), hidden, norm(f"{of}ln_2")))
    embed = EmbedParams(state["transformer.wte.weight"], state["transformer.wpe.weight"])
    encoder = EncoderParams(tuple(blocks), norm("transformer.ln_f"))
    params = LanguageModelParams(embed, encoder, HeadParams(state["lm_head.weight"].T))
    return params, Config(4, causal=True, activation="gelu_tanh")


def llama():
    state, linear, norm, attention = weights_of("Llama")
    blocks = []
    for n in range(2):
        of = f"model.layers.{n}."
        hidden = feed_forward(*(linear(f"{of}mlp.{x}_proj") for x in ("up", "down", "gate")))
        own = attention(f"{of}self_attn", *(f"{x}_proj" for x in "qkvo")), norm(f"{of}input_layernorm")
        blocks.append(EncoderBlockParams(*own, hidden, norm(f"{of}post_attention_layernorm")))
    embed, encoder = EmbedParams(state["model.embed_tokens.weight"]), EncoderParams(tuple(blocks), norm("model.norm"))
    params = LanguageModelParams(embed, encoder, HeadParams(state["lm_head.weight"].T))
    return params, Config(4, 2, causal=True, norm="rms", norm_eps=1e-6, activation="silu", rotary=Rotary("half"))


def bart():
    state, linear, norm, attention = weights_of("BART")
    names = ("q_proj", "k_proj", "v_proj", "out_proj")

    def block(of, cross):
        hidden = feed_forward(linear(f"{of}fc1"), linear(f"{of}fc2")), norm(f"{of}final_layer_norm")
        own = attention(f"{of}self_attn", *names), norm(f"{of}self_attn_layer_norm")
        look = (attention(f"{of}encoder_attn", *names), norm(f"{of}encoder_attn_layer_norm")) if cross else ()
        return (DecoderBlockParams if cross else EncoderBlockParams)(*own, *look, *hidden)

    def embed(stack):
        return EmbedParams(state[f"model.{stack}.embed_tokens.weight"], state[f"model.{stack}.embed_positions.weight"],
                           norm(f"model.{stack}.layernorm_embedding"))  # fmt: skip

    encoder, decoder = (tuple(block(f"model.{stack}.layers.{n}.", stack == "decoder") for n in range(2))
                        for stack in ("encoder", "decoder"))  # fmt: skip
    head = HeadParams(state["lm_head.weight"].T, state["final_logits_bias"][0])
    params = TransformerParams(embed("encoder"), EncoderParams(encoder), DecoderParams(decoder), embed("decoder"), head)
    return params, Config(4, pre_norm=False, first_position=2)


def t5():
    state, linear, norm, attention = weights_of("T5")

    def block(of, cross):
        parts = []
        for n, kind in enumerate(("SelfAttention", "EncDecAttention")[: 1 + cross]):
            parts += [attention(f"{of}{n}.{kind}", *"qkvo"), norm(f"{of}{n}.layer_norm")]
        of = f"{of}{1 + cross}."
        hidden = feed_forward(*(linear(f"{of}DenseReluDense.{x}") for x in ("wi", "wo")))
        return (DecoderBlockParams if cross else EncoderBlockParams)(*parts, hidden, norm(f"{of}layer_norm"))

    def stack(name):
        blocks = tuple(block(f"{name}.block.{n}.layer.", name == "decoder") for n in range(2))
        table = state[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return (DecoderParams if name == "decoder" else EncoderParams)(blocks, norm(f"{name}.final_layer_norm"), table)

    source, target = (EmbedParams(state[f"{name}.embed_tokens.weight"]) for name in ("encoder", "decoder"))
    params = TransformerParams(source, stack("encoder"), stack("decoder"), target, HeadParams(state["lm_head.weight"].T))
    relative = Relative(8, 16)
    return params, Config(4, norm="rms", norm_eps=1e-6, activation="relu", relative=relative, scale=1.0, head_scale=32**-0.5)


@pytest.mark.parametrize("row", [*first(3, BEAMS), {}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}], ids=label)
@pytest.mark.parametrize("name", SIZES)
def test_models_of_npattn(name, row):
    """With a cache, a batch with padding, and rows that end early."""
    params, config = {"GPT-2": gpt2, "Llama": llama, "BART": bart, "T5": t5}[name]()
    ids, inside = prompt_of(name)
    settings = Generation.from_hugging_face(whole(row))
    if name in ("GPT-2", "Llama"):
        decode = functools.partial(language_model_decode, params=params, config=config)
        found = generate(decode, ids, settings, inside=inside)
    else:
        decode = functools.partial(transformer_decode, params=params, config=config)
        past = transformer_memory(ids, params, config, source_mask=npattn.keys(inside))
        found = generate(decode, np.full((B, 1), START), settings, past=past, source_inside=inside)
    assert np.array_equal(found, theirs(name, whole(row), ids, inside))


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_strings(beams):
    """Strings that several tokens have together. None of them begins in the prompt: there transformers would stop, too."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the peers extra: pip install npattn[peers]")
    words = ["a", "b", "c", "ab", "bc", "ca", "abc"]
    words += [*(f"<{n}>" for n in range(V - len(words) - 1)), "abcdef"]  # transformers takes the last one apart
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[-1]))
    core.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)

    def text(ids):
        return "".join(words[n] for n in ids)

    settings = {"pad_token_id": PAD, "eos_token_id": 12, "max_new_tokens": 12, "num_beams": beams,
                "suppress_tokens": [n for n in range(7, V) if n != 12]}  # fmt: skip
    ids, inside = prompt_of("GPT-2")
    plain = [text(row[L:]) for row in ours("GPT-2", settings, ids, inside)]
    stops = [plain[0][3:6], plain[2][2:5]]
    found = ours("GPT-2", {**settings, "stop_strings": stops}, ids, inside, text=text)
    assert np.array_equal(found, theirs("GPT-2", {**settings, "stop_strings": stops}, ids, inside, tokenizer=tokenizer))
    assert found.shape[1] < L + 12 or (found[:, -1] == PAD).any()
