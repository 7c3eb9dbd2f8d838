"""The ops that verify knows: one record each. To add an op is to write its file and one line here."""

from __future__ import annotations

from npattn.verify.op import Op
from npattn.verify.ops.attention import ATTENTION
from npattn.verify.ops.blocks import DECODER_BLOCK, ENCODER_BLOCK
from npattn.verify.ops.cross_entropy import CROSS_ENTROPY
from npattn.verify.ops.dropout import DROPOUT
from npattn.verify.ops.embedding import EMBEDDING, TIED_HEAD
from npattn.verify.ops.feed_forward import FEED_FORWARD, GATED_FEED_FORWARD
from npattn.verify.ops.gelu import GELU
from npattn.verify.ops.gru import GRU
from npattn.verify.ops.linear import LINEAR
from npattn.verify.ops.lstm import LSTM
from npattn.verify.ops.multi_head import MULTI_HEAD
from npattn.verify.ops.norms import LAYER_NORM, RMS_NORM
from npattn.verify.ops.relu import RELU, SQUARED_RELU
from npattn.verify.ops.rnn import RNN
from npattn.verify.ops.rotary import ROTARY
from npattn.verify.ops.silu import SIGMOID, SILU
from npattn.verify.ops.softmax import SOFTMAX

ALL = (
    ATTENTION,  # the default
    MULTI_HEAD,
    RNN,
    GRU,
    LSTM,
    SOFTMAX,
    SILU,
    SIGMOID,
    ROTARY,
    LAYER_NORM,
    RMS_NORM,
    GELU,
    RELU,
    SQUARED_RELU,
    LINEAR,
    EMBEDDING,
    TIED_HEAD,
    FEED_FORWARD,
    CROSS_ENTROPY,
    DROPOUT,
    ENCODER_BLOCK,
    DECODER_BLOCK,
    GATED_FEED_FORWARD,
)
OPS: dict[str, Op] = {op.name: op for op in ALL}
