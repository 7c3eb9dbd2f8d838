"""What the folders of Hugging Face call each parameter, and which `Config` their config.json means.

A `Layout` is a tree of the shape of the parameters whose leaves are `Slot`s: the name of a tensor, its shape, and how it
becomes the parameter. One tree serves reading and writing. This is the only file that knows the name of an architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from npattn.models.blocks import DecoderBlockParams, EncoderBlockParams
from npattn.models.config import Config, Relative
from npattn.models.copying import CopyingParams, CopyParams
from npattn.models.encoders import EncoderModelParams, MaskedHeadParams, TextHeadParams
from npattn.models.language import LanguageModelParams
from npattn.models.recurrent import RecurrentConfig, RecurrentParams
from npattn.models.transformer import DecoderParams, EmbedParams, EncoderParams, HeadParams, TransformerParams
from npattn.models.trees import named_leaves, tree_map
from npattn.ops.checks import Array
from npattn.ops.feed_forward import FeedForwardParams
from npattn.ops.gru import GRUParams
from npattn.ops.linear import LinearParams
from npattn.ops.lstm import LSTMParams
from npattn.ops.multihead import MultiHeadParams
from npattn.ops.norms import NormParams
from npattn.ops.positions import LinearScaling, Llama3Scaling, Rotary
from npattn.ops.rnn import RNNParams

HF_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu",
    "silu": "silu", "swish": "silu", "relu2": "squared_relu",
}  # fmt: skip
MOST_LAYERS = 10_000  # a config.json that asks for more is damaged, and the list of its tensors would never end


@dataclass(frozen=True)
class Slot:
    """One parameter in a file."""

    name: str
    shape: tuple[int, ...]  # of the tensor in the file
    turned: bool = False  # torch stores the weights of a linear layer as (out, in)
    columns: tuple[int, int] | None = None  # of a tensor that holds several parameters beside each other
    added: float = 0.0  # Gemma's norms store g - 1
    row: bool = False  # BART and Marian store the bias of the head as (1, V)

    def read(self, tensor: Array) -> Array:
        """The parameter."""
        x = tensor if self.columns is None else tensor[..., slice(*self.columns)]
        x = x.T if self.turned else x[0] if self.row else x
        return x + x.dtype.type(self.added) if self.added else x

    def of_gradient(self) -> Slot:
        """Where the gradient of the parameter stands: what is added to a parameter is not added to its gradient."""
        return replace(self, added=0.0)

    def write(self, x: Array, tensor: Array) -> None:
        """Puts the parameter into the tensor."""
        x = x - x.dtype.type(self.added) if self.added else x
        tensor[..., slice(*(self.columns or (None,)))] = x.T if self.turned else x


class Layout(NamedTuple):
    """A model as a folder has it."""

    kind: str  # a key of `npattn.models.model.KINDS`
    config: Config | RecurrentConfig
    params: Any  # a tree of slots
    prefix: str = ""  # with which names begin, unless the folder holds the model without a head
    copies: Mapping[str, str] = {}  # by the name of a tensor that may be in a file the name of that which it equals
    ignored: tuple[str, ...] = ()  # ends of names of what older files hold and what is no parameter
    optional: tuple[str, ...] = ()  # what a model without a head does not have, and is 0 then

    def slots(self) -> list[Slot]:
        return list(named_leaves(self.params).values())

    def without_pooler(self) -> Layout:
        """An encoder whose head is the pooler alone, without it: some folders leave it out."""
        head = self.params.head
        bare = isinstance(head, TextHeadParams) and head.out is None
        return self._replace(params=self.params._replace(head=None)) if bare else self

    def without_prefix(self) -> Layout:
        """The names of a model without a head."""

        def bare(name: str) -> str:
            return name.removeprefix(self.prefix)

        params = tree_map(lambda slot: replace(slot, name=bare(slot.name)), self.params)
        return self._replace(params=params, copies={bare(a): bare(b) for a, b in self.copies.items()})


class Given:
    """config.json, with errors that say what it has and what was expected."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.kind = str(values.get("model_type"))

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None, most: int = 2**31) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise ValueError(f"config.json: {name} is {value!r}, expected an integer from 1 to {most}")
        return value

    def heads(self, name: str, M: int, width: str | None = None) -> int:
        """The number of heads, which M columns are divided among unless ``width`` says how many each has."""
        H = self.size(name)
        if M % H and self.get(width or "") is None:
            raise ValueError(f"config.json: {name} is {H}, expected a divisor of {M}, the width of the model")
        return H

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"config.json: {name} is {value!r}, expected a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {name} is {value!r}, expected true or false")
        return value

    def activation(self, name: str, default: str) -> str:
        value = self.get(name, default)
        if value not in HF_ACTIVATIONS:
            raise ValueError(f"config.json: {name} is {value!r}, expected one of {', '.join(HF_ACTIVATIONS)}")
        return HF_ACTIVATIONS[value]

    def expect(self, **options: Any) -> None:
        """Raises where an option has another value than the one that is computed here."""
        for name, expected in options.items():
            if (value := self.get(name, expected)) != expected:
                raise ValueError(f"config.json: {name} is {value!r} in a model of type {self.kind}, expected {expected!r}")

    def expect_architecture(self, *ends: str) -> None:
        """Raises where the name of the architecture, if there is one, ends in another way: the model has another head."""
        names = self.get("architectures", [])
        if not isinstance(names, list) or (names and not str(names[0]).endswith(ends)):
            raise ValueError(f"config.json: architectures is {names!r}, expected a name that ends with {' or '.join(ends)}")


# --- the parts that many have ------------------------------------------------------------------------------------------------


def _slot(*parts: Any, **options: Any) -> Any:
    """A leaf: where the parameters have an array, a layout has a slot."""
    return Slot(*parts, **options)


def _linear(name: str, n_in: int, n_out: int, bias: bool) -> tuple[Any, Any]:
    """w and b of a torch linear layer."""
    return _slot(f"{name}.weight", (n_out, n_in), True), _slot(f"{name}.bias", (n_out,)) if bias else None


def _norm(name: str, M: int, bias: bool = True) -> NormParams:
    return NormParams(_slot(f"{name}.weight", (M,)), _slot(f"{name}.bias", (M,)) if bias else None)


def _heads(names: Collection[str], M: int, widths: tuple[int, int], biases: tuple[bool, bool]) -> MultiHeadParams:
    """names : of q, k, v and o   widths : of q and of k   biases : whether q, k and v have one, and whether o has"""
    q, k, v, o = names
    wide, narrow = widths
    (w_q, b_q), (w_k, b_k), (w_v, b_v) = (_linear(x, M, n, biases[0]) for x, n in ((q, wide), (k, narrow), (v, narrow)))
    w_o, b_o = _linear(o, wide, M, biases[1])
    return MultiHeadParams(w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o)


def _hidden(into: str, out: str, M: int, F: int, bias: bool, gate: str | None = None) -> FeedForwardParams:
    (w_in, b_in), (w_out, b_out) = _linear(into, M, F, bias), _linear(out, F, M, bias)
    w_gate, b_gate = (None, None) if gate is None else _linear(gate, M, F, bias)
    return FeedForwardParams(w_in, w_out, b_in, b_out, w_gate, b_gate)


def _rotary(c: Given) -> Rotary:
    """rope_parameters of transformers 5, or rope_theta and rope_scaling of those before."""
    old, new = c.get("rope_scaling", {}), c.get("rope_parameters", {})
    if old and new and any(old[name] != new[name] for name in {*old} & {*new}):
        raise ValueError(f"config.json: rope_scaling is {old}, and rope_parameters {new}: expected one of them")
    rope = {"rope_theta": c.get("rope_theta", 10000.0), **old, **new}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scalings: dict[Any, Callable[[], Any]] = {
        "default": lambda: None,
        "linear": lambda: LinearScaling(rope["factor"]),
        "llama3": lambda: Llama3Scaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                                        rope["original_max_position_embeddings"]),
    }  # fmt: skip
    if kind not in scalings:
        raise ValueError(f"config.json: the rotary positions are of type {kind!r}, expected one of {', '.join(scalings)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor is {rope['partial_rotary_factor']}, expected 1.0")
    try:
        return Rotary("half", base=float(rope["rope_theta"]), scaling=scalings[kind]())
    except KeyError as error:
        raise ValueError(f"config.json: the rotary positions of type {kind!r} have no {error.args[0]}") from None


# --- causal language models --------------------------------------------------------------------------------------------------


def _gpt2(c: Given) -> Layout:
    c.expect(scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False, is_causal=True)
    c.expect_architecture("LMHeadModel", "Model")
    M, V = c.size("n_embd"), c.size("vocab_size")
    H = c.heads("n_head", M)
    F = c.size("n_inner", 4 * M)

    def conv(name: str, n_in: int, n_out: int) -> tuple[Any, Any]:
        """Weights are (in, out) here."""
        return _slot(f"{name}.weight", (n_in, n_out)), _slot(f"{name}.bias", (n_out,))

    def block(name: str) -> EncoderBlockParams:
        (w, b), (w_o, b_o) = conv(f"{name}.attn.c_attn", M, 3 * M), conv(f"{name}.attn.c_proj", M, M)
        (w_in, b_in), (w_out, b_out) = conv(f"{name}.mlp.c_fc", M, F), conv(f"{name}.mlp.c_proj", F, M)
        thirds = [(n * M, (n + 1) * M) for n in range(3)]
        w_q, w_k, w_v = (replace(w, columns=third) for third in thirds)
        b_q, b_k, b_v = (replace(b, columns=third) for third in thirds)
        heads = MultiHeadParams(w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o)
        return EncoderBlockParams(heads, _norm(f"{name}.ln_1", M), FeedForwardParams(w_in, w_out, b_in, b_out),
                                  _norm(f"{name}.ln_2", M))  # fmt: skip

    p = "transformer."
    embed = EmbedParams(_slot(f"{p}wte.weight", (V, M)), _slot(f"{p}wpe.weight", (c.size("n_positions"), M)))
    encoder = EncoderParams(tuple(block(f"{p}h.{n}") for n in range(c.size("n_layer", most=MOST_LAYERS))), _norm(f"{p}ln_f", M))
    config = Config(H, activation=c.activation("activation_function", "gelu_new"), causal=True,
                    norm_eps=c.number("layer_norm_epsilon", 1e-5))  # fmt: skip
    head = _head(c, M, V, True)
    copies = {"lm_head.weight": f"{p}wte.weight"} if head.w is None else {}
    ignored = (".attn.bias", ".attn.masked_bias")
    return Layout("language model", config, LanguageModelParams(embed, encoder, head), p, copies, ignored)


def _head(c: Given, M: int, V: int, tied: bool) -> HeadParams:
    """The head of a causal language model. tied : unless config.json says something else"""
    return HeadParams(None if c.flag("tie_word_embeddings", tied) else _slot("lm_head.weight", (V, M), True))


def _llama_like(c: Given, biases: tuple[bool, bool], tied: bool, added: float = 0.0, **options: Any) -> Layout:
    """What Llama, Mistral, Qwen2 and Gemma share. biases : of q, k and v, and of o   options : of `Config`"""
    c.expect(is_causal=True)
    c.expect_architecture("ForCausalLM", "Model")
    M, F, V = c.size("hidden_size"), c.size("intermediate_size"), c.size("vocab_size")
    H = c.heads("num_attention_heads", M, "head_dim")
    G, D = c.size("num_key_value_heads", H), c.size("head_dim", M // H)
    if H % G:
        raise ValueError(f"num_key_value_heads is {G}, expected a divisor of num_attention_heads, {H}")

    def norm(name: str) -> NormParams:
        return NormParams(_slot(f"{name}.weight", (M,), added=added))

    def block(name: str) -> EncoderBlockParams:
        heads = _heads([f"{name}.self_attn.{x}_proj" for x in "qkvo"], M, (H * D, G * D), biases)
        up, down, gate = (f"{name}.mlp.{x}_proj" for x in ("up", "down", "gate"))
        hidden = _hidden(up, down, M, F, c.flag("mlp_bias", False), gate)
        return EncoderBlockParams(heads, norm(f"{name}.input_layernorm"), hidden, norm(f"{name}.post_attention_layernorm"))

    layers = c.size("num_hidden_layers", most=MOST_LAYERS)
    encoder = EncoderParams(tuple(block(f"model.layers.{n}") for n in range(layers)), norm("model.norm"))
    options = {"activation": c.activation("hidden_act", "silu"), "norm_eps": c.number("rms_norm_eps", 1e-6), **options}
    config = Config(H, G, norm="rms", causal=True, rotary=_rotary(c), **options)
    embed = EmbedParams(_slot("model.embed_tokens.weight", (V, M)))
    head = _head(c, M, V, tied)
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if head.w is None else {}
    params = LanguageModelParams(embed, encoder, head)
    return Layout("language model", config, params, "model.", copies, (".rotary_emb.inv_freq",))


def _llama(c: Given) -> Layout:
    c.expect(pretraining_tp=1)
    return _llama_like(c, (c.flag("attention_bias", False),) * 2, False)


def _mistral(c: Given) -> Layout:
    window = c.values.get("sliding_window", 4096)  # null means none, and transformers has 4096 where it is left out
    return _llama_like(c, (False, False), False, window=None if window is None else c.size("sliding_window", 4096) - 1)


def _qwen2(c: Given) -> Layout:
    c.expect(use_sliding_window=False)
    return _llama_like(c, (True, False), False)


def _gemma(c: Given) -> Layout:
    c.expect(use_bidirectional_attention=False)
    c.expect(hidden_activation="gelu_pytorch_tanh")
    # Old files say "gelu" in hidden_act and mean the tanh form, which transformers computes then.
    activation = "gelu_tanh" if c.get("hidden_act", "gelu") == "gelu" else c.activation("hidden_act", "gelu_pytorch_tanh")
    return _llama_like(c, (c.flag("attention_bias", False),) * 2, True, added=1.0, activation=activation,
                       embedding_scale=c.size("hidden_size") ** 0.5)  # fmt: skip


# --- recurrent language models -----------------------------------------------------------------------------------------------

CELLS = {"npattn-rnn": (RNNParams, 1), "npattn-gru": (GRUParams, 3), "npattn-lstm": (LSTMParams, 4)}  # and its blocks of N


def _recurrent(c: Given) -> Layout:
    """transformers has none of these: the names are those of nn.Embedding, nn.RNN (GRU, LSTM), nn.LayerNorm and nn.Linear.

    Of an RNN or LSTM there is no bias_hh: torch has two biases, of which only the sum counts, and bias_ih is this sum.
    """
    cell, gates = CELLS[c.kind]
    M, N, V = c.size("embedding_size"), c.size("hidden_size"), c.size("vocab_size")

    def layer(n: int, n_in: int) -> Any:
        w_x, w_h = (_slot(f"rnn.weight_{x}_l{n}", (gates * N, k), True) for x, k in (("ih", n_in), ("hh", N)))
        biases = ("ih", "hh") if cell is GRUParams else ("ih",)
        return cell(w_x, w_h, *(_slot(f"rnn.bias_{x}_l{n}", (gates * N,)) for x in biases))

    layers = tuple(layer(n, N if n else M) for n in range(c.size("num_hidden_layers", most=MOST_LAYERS)))
    tied = c.flag("tie_word_embeddings", False)
    if tied and M != N:
        raise ValueError(f"embedding_size is {M}, expected hidden_size={N}: tie_word_embeddings is true")
    head = HeadParams(None if tied else _slot("head.weight", (V, N), True), _slot("head.bias", (V,)))
    norm = _norm("norm", N) if c.flag("layer_norm", False) else None
    config = RecurrentConfig(nonlinearity=c.get("nonlinearity", "tanh"), norm_eps=c.number("layer_norm_epsilon", 1e-5))
    params = RecurrentParams(EmbedParams(_slot("embedding.weight", (V, M))), layers, head, norm)
    return Layout("recurrent language model", config, params)


# --- encoders ----------------------------------------------------------------------------------------------------------------


def _bert_like(c: Given, name: str, rows: int, heads: Mapping[str, Callable[[int, int], Any]]) -> Layout:
    """BERT and RoBERTa. name : of the model in names   rows : learned positions before that of the first token
    heads : by the end of an architecture's name what makes the head's slots from M and V
    """
    c.expect(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    M, F, V, H = (c.size(n) for n in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"))
    p = f"{name}."

    def block(at: str) -> EncoderBlockParams:
        parts = [f"{at}.attention.{x}" for x in ("self.query", "self.key", "self.value", "output.dense")]
        hidden = _hidden(f"{at}.intermediate.dense", f"{at}.output.dense", M, F, True)
        norms = [_norm(f"{at}.{x}LayerNorm", M) for x in ("attention.output.", "output.")]
        return EncoderBlockParams(_heads(parts, M, (M, M), (True, True)), norms[0], hidden, norms[1])

    def table(kind: str, size: int) -> Any:
        return _slot(f"{p}embeddings.{kind}_embeddings.weight", (size, M))

    architecture = c.get("architectures", [""])[0]
    task = architecture.removeprefix("Bert").removeprefix("Roberta")
    if task not in heads:
        known = ", ".join(f"{name.capitalize()}{x}" for x in heads)
        raise ValueError(f"config.json: architectures is {c.get('architectures')!r}, expected one of {known}")
    embed = EmbedParams(table("word", V), table("position", c.size("max_position_embeddings", 512)),
                        _norm(f"{p}embeddings.LayerNorm", M), table("token_type", c.size("type_vocab_size", 2)))  # fmt: skip
    layers = c.size("num_hidden_layers", most=MOST_LAYERS)
    encoder = EncoderParams(tuple(block(f"{p}encoder.layer.{n}") for n in range(layers)))
    params = EncoderModelParams(embed, encoder, heads[task](M, V))
    config = Config(H, pre_norm=False, norm_eps=c.number("layer_norm_eps", 1e-12), first_position=rows,
                    activation=c.activation("hidden_act", "gelu"))  # fmt: skip
    copies = {}
    if task == "ForMaskedLM":
        head = {"bert": "cls.predictions", "roberta": "lm_head"}[name]
        c.expect(tie_word_embeddings=True)
        copies = {f"{head}.decoder.bias": f"{head}.bias",
                  f"{head}.decoder.weight": f"{p}embeddings.word_embeddings.weight"}  # fmt: skip
    # Files of pre-training have its second head, and models with another head than the pooler may have that.
    ignored = ("embeddings.position_ids", "cls.seq_relationship.weight", "cls.seq_relationship.bias",
               *(() if task == "Model" else ("pooler.dense.weight", "pooler.dense.bias")))  # fmt: skip
    return Layout("encoder", config, params, p, copies, ignored)


def _answers(c: Given) -> int:
    """The number of classes."""
    labels = c.get("id2label")
    return len(labels) if isinstance(labels, dict) and labels else c.size("num_labels", 2)


def _bert(c: Given) -> Layout:
    def pooler(M: int) -> LinearParams:
        return LinearParams(*_linear("bert.pooler.dense", M, M, True))

    def masked(M: int, V: int) -> MaskedHeadParams:
        p = "cls.predictions."
        dense = LinearParams(*_linear(f"{p}transform.dense", M, M, True))
        return MaskedHeadParams(dense, _norm(f"{p}transform.LayerNorm", M), HeadParams(None, _slot(f"{p}bias", (V,))))

    heads = {
        "Model": lambda M, V: TextHeadParams(pooler(M)),
        "ForMaskedLM": masked,
        "ForSequenceClassification": lambda M, V: TextHeadParams(
            pooler(M), LinearParams(*_linear("classifier", M, _answers(c), True))),
        "ForTokenClassification": lambda M, V: LinearParams(*_linear("classifier", M, _answers(c), True)),
        "ForQuestionAnswering": lambda M, V: LinearParams(*_linear("qa_outputs", M, 2, True)),
    }  # fmt: skip
    return _bert_like(c, "bert", 0, heads)


def _roberta(c: Given) -> Layout:
    def masked(M: int, V: int) -> MaskedHeadParams:
        c.expect(hidden_act="gelu")  # its head has gelu whatever the blocks have
        dense = LinearParams(*_linear("lm_head.dense", M, M, True))
        return MaskedHeadParams(dense, _norm("lm_head.layer_norm", M), HeadParams(None, _slot("lm_head.bias", (V,))))

    heads = {
        "Model": lambda M, V: TextHeadParams(LinearParams(*_linear("roberta.pooler.dense", M, M, True))),
        "ForMaskedLM": masked,
        "ForSequenceClassification": lambda M, V: TextHeadParams(
            LinearParams(*_linear("classifier.dense", M, M, True)),
            LinearParams(*_linear("classifier.out_proj", M, _answers(c), True))),
        "ForTokenClassification": lambda M, V: LinearParams(*_linear("classifier", M, _answers(c), True)),
        "ForQuestionAnswering": lambda M, V: LinearParams(*_linear("qa_outputs", M, 2, True)),
    }  # fmt: skip
    return _bert_like(c, "roberta", c.size("pad_token_id", 1) + 1, heads)


# --- encoder-decoders --------------------------------------------------------------------------------------------------------


def _t5(c: Given) -> Layout:
    M, F, D, V, H = (c.size(n) for n in ("d_model", "d_ff", "d_kv", "vocab_size", "num_heads"))
    c.expect_architecture("ForConditionalGeneration", "Model")
    gated, _, name = str(c.get("feed_forward_proj", "relu" if c.kind == "t5" else "gated-gelu")).rpartition("-")
    if gated not in ("", "gated") or name not in HF_ACTIVATIONS:
        raise ValueError(f"config.json: feed_forward_proj is {c.get('feed_forward_proj')!r}, expected 'relu' or 'gated-gelu'")
    c.expect(is_gated_act=bool(gated), dense_act_fn="gelu_new" if gated and name == "gelu" else name)
    buckets = c.size("relative_attention_num_buckets", 32)

    def norm(name: str) -> NormParams:
        return _norm(f"{name}.layer_norm", M, False)

    def heads(name: str) -> MultiHeadParams:
        return _heads([f"{name}.{x}" for x in "qkvo"], M, (H * D, H * D), (False, False))

    def hidden(name: str) -> FeedForwardParams:
        into, gate = ("wi_1", f"{name}.DenseReluDense.wi_0") if gated else ("wi", None)
        return _hidden(f"{name}.DenseReluDense.{into}", f"{name}.DenseReluDense.wo", M, F, False, gate)

    def encoder_block(p: str) -> EncoderBlockParams:
        return EncoderBlockParams(heads(f"{p}.0.SelfAttention"), norm(f"{p}.0"), hidden(f"{p}.1"), norm(f"{p}.1"))

    def decoder_block(p: str) -> DecoderBlockParams:
        attention, cross = heads(f"{p}.0.SelfAttention"), heads(f"{p}.1.EncDecAttention")
        return DecoderBlockParams(attention, norm(f"{p}.0"), cross, norm(f"{p}.1"), hidden(f"{p}.2"), norm(f"{p}.2"))

    def stack(cls: Any, name: str, block: Callable[[str], Any], layers: int) -> Any:
        bias = _slot(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (buckets, H))
        blocks = tuple(block(f"{name}.block.{n}.layer") for n in range(layers))
        return cls(blocks, _norm(f"{name}.final_layer_norm", M, False), bias)

    layers = c.size("num_layers", most=MOST_LAYERS)
    tied = c.flag("tie_word_embeddings", True)
    # In T5 1.0 the head is the table and its input is scaled; transformers 5 says the second by itself. mT5 never scales.
    scaled = c.kind == "t5" and c.flag("scale_decoder_outputs", tied)
    params = TransformerParams(
        EmbedParams(_slot("shared.weight", (V, M))), stack(EncoderParams, "encoder", encoder_block, layers),
        stack(DecoderParams, "decoder", decoder_block, c.size("num_decoder_layers", layers, MOST_LAYERS)), None,
        HeadParams(None if tied else _slot("lm_head.weight", (V, M), True)))  # fmt: skip
    relative = Relative(buckets, c.size("relative_attention_max_distance", 128))
    activation = "gelu_tanh" if gated and name == "gelu" else HF_ACTIVATIONS[name]
    config = Config(H, norm="rms", norm_eps=c.number("layer_norm_epsilon", 1e-6), activation=activation, scale=1.0,
                    relative=relative, head_scale=M**-0.5 if scaled else 1.0)  # fmt: skip
    copies = {f"{name}.embed_tokens.weight": "shared.weight" for name in ("encoder", "decoder")}
    ignored = (".EncDecAttention.relative_attention_bias.weight",)  # of files before 2020; never used
    if tied:
        copies["lm_head.weight"] = "shared.weight"
    return Layout("encoder-decoder", config, params, "", copies, ignored)


def _bart_like(c: Given, learned: bool) -> Layout:
    """BART, with learned positions and a norm behind the embedding; Marian, with sinusoids and without that norm."""
    M, V = c.size("d_model"), c.size("vocab_size")
    H = c.heads("encoder_attention_heads", M)
    c.expect_architecture("ForConditionalGeneration", "MTModel", "Model")
    c.expect(decoder_attention_heads=H, normalize_before=False, add_final_layer_norm=False)
    shared = learned or c.flag("share_encoder_decoder_embeddings", True)
    target_V = V if shared else c.size("decoder_vocab_size", V)

    def heads(name: str) -> MultiHeadParams:
        return _heads([f"{name}.{x}" for x in ("q_proj", "k_proj", "v_proj", "out_proj")], M, (M, M), (True, True))

    def ends(p: str, F: int) -> tuple[FeedForwardParams, NormParams]:
        return _hidden(f"{p}.fc1", f"{p}.fc2", M, F, True), _norm(f"{p}.final_layer_norm", M)

    def first(p: str) -> tuple[MultiHeadParams, NormParams]:
        return heads(f"{p}.self_attn"), _norm(f"{p}.self_attn_layer_norm", M)

    def encoder_block(p: str) -> EncoderBlockParams:
        return EncoderBlockParams(*first(p), *ends(p, c.size("encoder_ffn_dim")))

    def decoder_block(p: str) -> DecoderBlockParams:
        cross = heads(f"{p}.encoder_attn"), _norm(f"{p}.encoder_attn_layer_norm", M)
        return DecoderBlockParams(*first(p), *cross, *ends(p, c.size("decoder_ffn_dim")))

    def embed(side: str, table: Any) -> EmbedParams:
        if not learned:
            return EmbedParams(table)
        rows = c.size("max_position_embeddings") + 2  # the first two are never used
        positions = _slot(f"model.{side}.embed_positions.weight", (rows, M))
        return EmbedParams(table, positions, _norm(f"model.{side}.layernorm_embedding", M))

    def names(side: str) -> list[str]:
        return [f"model.{side}.layers.{n}" for n in range(c.size(f"{side}_layers", most=MOST_LAYERS))]

    source = "model.shared.weight" if shared else "model.encoder.embed_tokens.weight"
    target = source if shared else "model.decoder.embed_tokens.weight"
    tied = c.flag("tie_word_embeddings", True)
    params = TransformerParams(
        embed("encoder", _slot(source, (V, M))),
        EncoderParams(tuple(map(encoder_block, names("encoder")))), DecoderParams(tuple(map(decoder_block, names("decoder")))),
        embed("decoder", None if shared else _slot(target, (target_V, M))),
        HeadParams(None if tied else _slot("lm_head.weight", (target_V, M), True),
                   _slot("final_logits_bias", (1, target_V), row=True)),
    )  # fmt: skip
    places: dict[str, Any] = {"first_position": 2} if learned else {"sinusoidal": "half"}
    config = Config(H, pre_norm=False, activation=c.activation("activation_function", "gelu"),
                    embedding_scale=M**0.5 if c.flag("scale_embedding", False) else 1.0, **places)  # fmt: skip
    copies = {f"model.{side}.embed_tokens.weight": source for side in ("encoder", "decoder") if shared}
    if tied:
        copies["lm_head.weight"] = target
    ignored = () if learned else (".embed_positions.weight",)
    return Layout("encoder-decoder", config, params, "model.", copies, ignored, ("final_logits_bias",))


def _bart(c: Given) -> Layout:
    return _bart_like(c, True)


def _copying(c: Given) -> Layout:
    """npattn's own: BART, with a head for the first words alone, and what `npattn.models.copying` has beside it."""
    c.expect(tie_word_embeddings=False, scale_embedding=False)
    bart, M, V = _bart_like(c, True), c.size("d_model"), c.size("vocab_size")
    K, D = c.size("written_words", most=V), c.size("copy_width")
    head = HeadParams(_slot("lm_head.weight", (K, M), True), _slot("final_logits_bias", (1, K), row=True))
    w_q, w_k = (_slot(f"copy.{name}_proj.weight", (D, M), True) for name in "qk")
    copy = CopyParams(w_q, w_k, LinearParams(*_linear("copy.gate", M, 1, True)))
    return bart._replace(kind="copying encoder-decoder", params=CopyingParams(bart.params._replace(head=head), copy),
                         prefix="", optional=())  # fmt: skip


def _marian(c: Given) -> Layout:
    return _bart_like(c, False)


LAYOUTS: dict[str, Callable[[Given], Layout]] = {
    "bart": _bart, "bert": _bert, "gemma": _gemma, "gpt2": _gpt2, "llama": _llama, "marian": _marian, "mistral": _mistral,
    "mt5": _t5, "npattn-copying": _copying, "qwen2": _qwen2, "roberta": _roberta, "t5": _t5,
    **dict.fromkeys(CELLS, _recurrent),
}  # fmt: skip


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout that a config.json means. Raises ValueError where it is of another kind, or asks for what is not here."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise ValueError(f"config.json: model_type is {kind!r}, expected one of {', '.join(LAYOUTS)}")
    if config.get("quantization_config"):
        raise ValueError("config.json: has a quantization_config, expected none: weights are floating-point numbers here")
    try:
        return LAYOUTS[kind](Given(config))
    except (TypeError, ValueError, OverflowError) as error:  # also what `Config` and its parts say
        raise ValueError(f"config.json: {str(error).removeprefix('config.json: ')}") from None


__all__ = ["LAYOUTS", "Layout", "Slot", "layout_of"]
