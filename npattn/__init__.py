"""npattn: the reference for attention, forwards and backwards, in NumPy. This is the page to read first.

Shape legend, the same letters in code, docs, errors and tests:

    B batch            H query heads     G key/value heads (H is a multiple of G)
    L queries          S keys            D head width          E value head width
    M model width      F feed-forward    V vocabulary          T time steps          N hidden units of the RNN

Layout is (..., H, L, D) inside the attention ops and (..., L, M) between layers. Rank 2, (L, D), means one head: lse is then
(L,) and a sink (1,). In multi-head attention Mk, Mv and M_out are the widths of keys, values and output.

Rules that hold everywhere:

1. Pairs. ``x_forward(...) -> (out, cache)``, ``x_backward(dout, cache) -> XGrads``, and ``x(...) -> out``. Caches and gradients
   are NamedTuples; gradients are named as the inputs. No global state, no randomness, no input is ever modified.
2. The equations of a forward are numbered, and its backward consumes them in reverse.
3. Masks are boolean, True = may attend. A query that may see no key has weights, output and gradient 0, and lse -inf (or the
   sink). NaN and inf reach only what may see them. A token whose output has gradient 0 adds nothing to any other gradient.
4. The dtype of the inputs is that of the output and gradients: float32, float64, longdouble; float16 and bfloat16 are computed
   in float32 and rounded once; complex inputs give the analytic continuation (for complex-step derivatives).
5. Everything is checked once at the public edge, and nothing is guessed.

6. Tolerances are derived, in ``npattn.tolerances``. 7. A comparison raises, and refuses to pass where nothing was tested.

Read on in this order: in npattn/ops masks, biases, dropout, softmax, attention, blockwise, merge, linear, norms, positions,
multihead; activations, feed_forward, embedding, cross_entropy, rnn, gru, lstm; then models, gradients, tolerances, verify.
"""

from npattn.gradients import GradcheckError, gradcheck, hessian_vector_product
from npattn.ops.activations import (
    ActivationGrads,
    GeluCache,
    ReluCache,
    SigmoidCache,
    SiluCache,
    SquaredReluCache,
    gelu,
    gelu_backward,
    gelu_forward,
    relu,
    relu_backward,
    relu_forward,
    sigmoid,
    sigmoid_backward,
    sigmoid_forward,
    silu,
    silu_backward,
    silu_forward,
    squared_relu,
    squared_relu_backward,
    squared_relu_forward,
)
from npattn.ops.attention import AttentionCache, AttentionGrads, attention, attention_backward, attention_forward
from npattn.ops.biases import Alibi, RelativeTable, alibi_slopes
from npattn.ops.blockwise import blockwise, blockwise_backward, blockwise_forward
from npattn.ops.cross_entropy import (
    CrossEntropyCache,
    CrossEntropyGrads,
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_forward,
)
from npattn.ops.dropout import Dropout, DropoutCache, DropoutGrads, dropout, dropout_backward, dropout_forward
from npattn.ops.embedding import (
    EmbeddingCache,
    EmbeddingGrads,
    TiedHeadCache,
    TiedHeadGrads,
    embedding,
    embedding_backward,
    embedding_forward,
    tied_head,
    tied_head_backward,
    tied_head_forward,
)
from npattn.ops.feed_forward import (
    FeedForwardCache,
    FeedForwardGrads,
    FeedForwardParams,
    feed_forward,
    feed_forward_backward,
    feed_forward_forward,
)
from npattn.ops.gru import GRUCache, GRUGrads, GRUParams, gru, gru_backward, gru_forward
from npattn.ops.linear import LinearCache, LinearGrads, LinearParams, linear, linear_backward, linear_forward
from npattn.ops.lstm import LSTMCache, LSTMGrads, LSTMParams, lstm, lstm_backward, lstm_forward
from npattn.ops.masks import Mask, blocks, causal, key_lengths, keys, packed, query_lengths, segments, where, window
from npattn.ops.merge import MergeCache, MergeGrads, merge, merge_backward, merge_forward
from npattn.ops.multihead import (
    KVCache,
    MultiHeadCache,
    MultiHeadGrads,
    MultiHeadParams,
    multi_head,
    multi_head_backward,
    multi_head_decode,
    multi_head_forward,
    multi_head_memory,
)
from npattn.ops.norms import (
    LayerNormCache,
    NormGrads,
    NormParams,
    RMSNormCache,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from npattn.ops.positions import (
    LinearScaling,
    Llama3Scaling,
    Rotary,
    RotaryCache,
    RotaryGrads,
    rotary,
    rotary_backward,
    rotary_forward,
    sinusoidal,
)
from npattn.ops.recurrent import reversed_steps
from npattn.ops.rnn import RNNCache, RNNGrads, RNNParams, rnn, rnn_backward, rnn_forward
from npattn.ops.softmax import (
    LogSumExpGrads,
    SoftmaxCache,
    SoftmaxGrads,
    log_sum_exp,
    log_sum_exp_backward,
    log_sum_exp_forward,
    softmax,
    softmax_backward,
    softmax_forward,
)

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """`pipeline` is imported when it is asked for: the ops do not need models."""
    if name == "pipeline":
        from npattn.applications import pipeline

        return pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ActivationGrads",
    "Alibi",
    "AttentionCache",
    "AttentionGrads",
    "CrossEntropyCache",
    "CrossEntropyGrads",
    "Dropout",
    "DropoutCache",
    "DropoutGrads",
    "EmbeddingCache",
    "EmbeddingGrads",
    "FeedForwardCache",
    "FeedForwardGrads",
    "FeedForwardParams",
    "GRUCache",
    "GRUGrads",
    "GRUParams",
    "GeluCache",
    "GradcheckError",
    "KVCache",
    "LSTMCache",
    "LSTMGrads",
    "LSTMParams",
    "LayerNormCache",
    "LinearCache",
    "LinearGrads",
    "LinearParams",
    "LinearScaling",
    "Llama3Scaling",
    "LogSumExpGrads",
    "Mask",
    "MergeCache",
    "MergeGrads",
    "MultiHeadCache",
    "MultiHeadGrads",
    "MultiHeadParams",
    "NormGrads",
    "NormParams",
    "RMSNormCache",
    "RNNCache",
    "RNNGrads",
    "RNNParams",
    "RelativeTable",
    "ReluCache",
    "Rotary",
    "RotaryCache",
    "RotaryGrads",
    "SigmoidCache",
    "SiluCache",
    "SoftmaxCache",
    "SoftmaxGrads",
    "SquaredReluCache",
    "TiedHeadCache",
    "TiedHeadGrads",
    "alibi_slopes",
    "attention",
    "attention_backward",
    "attention_forward",
    "blocks",
    "blockwise",
    "blockwise_backward",
    "blockwise_forward",
    "causal",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "dropout",
    "dropout_backward",
    "dropout_forward",
    "embedding",
    "embedding_backward",
    "embedding_forward",
    "feed_forward",
    "feed_forward_backward",
    "feed_forward_forward",
    "gelu",
    "gelu_backward",
    "gelu_forward",
    "gradcheck",
    "gru",
    "gru_backward",
    "gru_forward",
    "hessian_vector_product",
    "key_lengths",
    "keys",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear",
    "linear_backward",
    "linear_forward",
    "log_sum_exp",
    "log_sum_exp_backward",
    "log_sum_exp_forward",
    "lstm",
    "lstm_backward",
    "lstm_forward",
    "merge",
    "merge_backward",
    "merge_forward",
    "multi_head",
    "multi_head_backward",
    "multi_head_decode",
    "multi_head_forward",
    "multi_head_memory",
    "packed",
    "query_lengths",
    "relu",
    "relu_backward",
    "relu_forward",
    "reversed_steps",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "rnn",
    "rnn_backward",
    "rnn_forward",
    "rotary",
    "rotary_backward",
    "rotary_forward",
    "segments",
    "sigmoid",
    "sigmoid_backward",
    "sigmoid_forward",
    "silu",
    "silu_backward",
    "silu_forward",
    "sinusoidal",
    "softmax",
    "softmax_backward",
    "softmax_forward",
    "squared_relu",
    "squared_relu_backward",
    "squared_relu_forward",
    "tied_head",
    "tied_head_backward",
    "tied_head_forward",
    "where",
    "window",
]
