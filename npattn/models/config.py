"""Everything about a model that is not a parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from npattn.ops.activations import ACTIVATIONS, ELSEWHERE
from npattn.ops.checks import Array, check_class, check_from_0, check_integer, check_number, check_one_of, kind
from npattn.ops.multihead import IMPLEMENTATIONS
from npattn.ops.norms import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from npattn.ops.positions import LAYOUTS, Rotary

POOLINGS = ("first", "last", "mean")
REAL = np.dtype(np.float64)
NORMS: dict[str, tuple[Any, Any]] = {
    "layer": (layer_norm_forward, layer_norm_backward), "rms": (rms_norm_forward, rms_norm_backward),
}  # fmt: skip


@dataclass(frozen=True)
class Relative:
    """The buckets of relative positions in T5: near ones have a bucket each, far ones share them by their logarithm.

    buckets      : their number, the rows of the table of biases; at least 4
    max_distance : what is farther away falls into the last bucket; more than half of the buckets

    Raffel et al. 2020, section 2.1. Raises TypeError, ValueError.
    """

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        check_integer("Relative", "buckets", self.buckets, least=4)
        # Half of the buckets of a causal model are for one distance each: farther ones need a logarithm above 0.
        check_integer("Relative", "max_distance", self.max_distance, least=self.buckets // 2 + 1)

    def of(self, distances: Array, causal: bool) -> Array:
        """The bucket of each distance k_pos - q_pos. Without causal, half of the buckets are for keys behind the query.

        >>> Relative(8, 16).of(np.array([-20, -3, -2, -1, 0, 1, 2, 3, 20]), causal=False).tolist()
        [3, 2, 2, 1, 0, 5, 6, 6, 7]
        """
        n = np.asarray(distances)
        buckets, behind = (self.buckets, 0) if causal else (self.buckets // 2, self.buckets // 2 * (n > 0))
        n = np.maximum(-n, 0) if causal else np.abs(n)
        near = buckets // 2
        # T5 computes this in float32; the result differs by a bucket where the quotient is near an integer.
        far = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(near)) / np.float32(math.log(self.max_distance / near))
        far = near + (far * np.float32(buckets - near)).astype(n.dtype)
        return np.asarray(behind + np.where(n < near, n, np.minimum(far, buckets - 1)))


@dataclass(frozen=True)
class Config:
    """What blocks and stacks compute. Sizes are not here: they are those of the parameters.

    num_heads, num_kv_heads : H, and G (H unless given)
    norm, norm_eps          : "layer" or "rms", and what is added under the root
    pre_norm                : y = x + f(norm(x)), as GPT-2 and Llama have it; else y = norm(x + f(x)), as the paper and BERT
    activation              : of the feed-forward layer, a name of `npattn.ops.activations.ACTIVATIONS`
    causal                  : whether the self-attention of an encoder is causal; that of a decoder always is
    window                  : a query of self-attention sees this many keys before it at most; in both directions, unless causal
    rotary                  : turns q and k of self-attention by their positions
    relative                : how positions become rows of the table of biases that encoder and decoder have, as T5 does
    scale, softcap          : of the scores, as in `npattn.attention_forward`
    sinusoidal              : adds sinusoids to the embeddings: "interleaved" as in the paper, or "half" as Marian has them
    first_position          : the row of the learned positions that the first token has; 2 in BART and RoBERTa
    embedding_scale         : multiplies the embeddings; the paper has the root of M
    head_scale              : multiplies what the head takes; T5 has 1 over the root of M
    pooling                 : the state of a text: that of its "first" or "last" token, or their "mean"; None is the first
    normalize               : brings what is pooled to length 1, as encoders of sentences do
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
    window: int | None = None
    rotary: Rotary | None = None
    relative: Relative | None = None
    scale: float | None = None
    softcap: float | None = None
    sinusoidal: str | None = None
    first_position: int = 0
    embedding_scale: float = 1.0
    head_scale: float = 1.0
    pooling: str | None = None
    normalize: bool = False
    implementation: str = "dense"

    def __post_init__(self) -> None:
        check_integer("Config", "num_heads", self.num_heads, least=1)
        if self.num_kv_heads is not None:
            check_integer("Config", "num_kv_heads", self.num_kv_heads, least=1)
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"Config: num_kv_heads is {self.num_kv_heads}, expected a number that divides num_heads={self.num_heads}"
                )
        check_from_0("Config", "norm_eps", self.norm_eps)
        check_one_of("Config", "norm", self.norm, NORMS)
        check_one_of("Config", "activation", self.activation, ACTIVATIONS, elsewhere=ELSEWHERE)
        check_one_of("Config", "implementation", self.implementation, IMPLEMENTATIONS)
        check_one_of("Config", "pooling", self.pooling, (*POOLINGS, None))
        for name in ("pre_norm", "causal", "normalize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Config: {name} is {kind(getattr(self, name))}, expected True or False")
        for name, cls in (("rotary", Rotary), ("relative", Relative)):
            if getattr(self, name) is not None:
                check_class("Config", name, getattr(self, name), cls)
        if self.sinusoidal is not None:
            check_one_of("Config", "sinusoidal", self.sinusoidal, LAYOUTS)
        if self.window is not None:
            check_integer("Config", "window", self.window, least=0)
        check_integer("Config", "first_position", self.first_position, least=0)
        for name in ("embedding_scale", "head_scale"):
            check_number("Config", name, getattr(self, name), REAL)
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None:
                check_number("Config", name, getattr(self, name), REAL, positive=name == "softcap", optional=True)


__all__ = ["NORMS", "Config", "Relative"]
