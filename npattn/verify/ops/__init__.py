"""The ops that verify knows: one record each. To add an op is to write its file and one line here."""

from __future__ import annotations

from npattn.verify.op import Op
from npattn.verify.ops.attention import ATTENTION
from npattn.verify.ops.multi_head import MULTI_HEAD
from npattn.verify.ops.norms import LAYER_NORM, RMS_NORM
from npattn.verify.ops.rnn import RNN
from npattn.verify.ops.silu import SILU
from npattn.verify.ops.softmax import SOFTMAX

ALL = (
    ATTENTION,  # the default
    MULTI_HEAD,
    RNN,
    SOFTMAX,
    SILU,
    LAYER_NORM,
    RMS_NORM,
)
OPS: dict[str, Op] = {op.name: op for op in ALL}
