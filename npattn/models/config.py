"""Everything about a model that is not a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from npattn.ops.activations import ACTIVATIONS
from npattn.ops.checks import check_class, check_integer, check_number, check_one_of, kind
from npattn.ops.multihead import IMPLEMENTATIONS
from npattn.ops.norms import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from npattn.ops.positions import Rotary

REAL = np.dtype(np.float64)
NORMS: dict[str, tuple[Any, Any]] = {
    "layer": (layer_norm_forward, layer_norm_backward), "rms": (rms_norm_forward, rms_norm_backward),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What blocks and stacks compute. Sizes are not here: they are those of the parameters.

    num_heads, num_kv_heads : H, and G (H unless given)
    norm, norm_eps          : "layer" or "rms", and what is added under the root
    pre_norm                : y = x + f(norm(x)), as GPT-2 and Llama have it; else y = norm(x + f(x)), as the paper and BERT
    activation              : of the feed-forward layer, a name of `npattn.ops.activations.ACTIVATIONS`
    causal                  : whether the self-attention of an encoder is causal; that of a decoder always is
    rotary                  : turns q and k of self-attention by their positions
    scale, softcap          : of the scores, as in `npattn.attention_forward`
    sinusoidal              : adds the paper's sinusoids to the embeddings
    embedding_scale         : multiplies the embeddings; the paper has the root of M
    implementation          : of attention, "dense" to read, or "blockwise" to run

    Raises TypeError, ValueError.
    """

    num_heads: int
    num_kv_heads: int | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    activation: str = "gelu"
    causal: bool = False
    rotary: Rotary | None = None
    scale: float | None = None
    softcap: float | None = None
    sinusoidal: bool = False
    embedding_scale: float = 1.0
    implementation: str = "dense"

    def __post_init__(self) -> None:
        check_integer("Config", "num_heads", self.num_heads, least=1)
        check_one_of("Config", "norm", self.norm, NORMS)
        check_one_of("Config", "activation", self.activation, ACTIVATIONS)
        check_one_of("Config", "implementation", self.implementation, IMPLEMENTATIONS)
        for name in ("pre_norm", "causal", "sinusoidal"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Config: {name} is {kind(getattr(self, name))}, expected True or False")
        if self.rotary is not None:
            check_class("Config", "rotary", self.rotary, Rotary)
        check_number("Config", "embedding_scale", self.embedding_scale, REAL)


__all__ = ["NORMS", "Config"]
