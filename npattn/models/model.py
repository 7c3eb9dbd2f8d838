"""A model: what it computes, its parameters, and the texts that its tokens are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from npattn.models.copying import copying_backward, copying_decode, copying_forward, copying_memory
from npattn.models.encoders import encoder_model_backward, encoder_model_forward
from npattn.models.language import language_model_backward, language_model_decode, language_model_forward
from npattn.models.recurrent import (
    RecurrentConfig,
    RecurrentParams,
    RecurrentPast,
    recurrent_model_backward,
    recurrent_model_decode,
    recurrent_model_forward,
)
from npattn.models.transformer import transformer_backward, transformer_decode, transformer_forward, transformer_memory
from npattn.models.trees import named_leaves, tree_map
from npattn.ops.checks import Array
from npattn.ops.masks import Keys, keys


class Kind(NamedTuple):
    """The functions of a kind of model."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    decode: Callable[..., Any] | None
    memory: Callable[..., Any] | None = None
    padding: Callable[[Array], dict[str, Any]] = lambda inside: {"inside": inside}  # the options of forward that say it


def _recurrent_decode(
    ids: Array, params: RecurrentParams, config: RecurrentConfig, past: RecurrentPast | None = None, *,
    mask: Keys | None = None, positions: Any = None,
) -> tuple[Array, RecurrentPast]:  # fmt: skip
    """`recurrent_model_decode` with the arguments of a Transformer: the mask says what is padding, positions are not needed."""
    inside = None if mask is None else np.ascontiguousarray(np.broadcast_to(mask.allowed[..., -ids.shape[1] :], ids.shape))
    return recurrent_model_decode(ids, params, config, past, inside=inside)


def _behind_padding(inside: Array) -> dict[str, Any]:
    """Positions count the tokens of a text, wherever its padding is."""
    return {"mask": keys(inside), "positions": np.maximum(inside.cumsum(-1) - 1, 0)}


def _of_source(inside: Array) -> dict[str, Any]:
    return {"source_mask": keys(inside), "cross_mask": keys(inside)}


def _lengths(inside: Array) -> dict[str, Any]:
    if (inside[..., 1:] > inside[..., :-1]).any():
        raise ValueError("forward: inside has True behind False, expected padding at the right: a recurrent model reads on")
    return {"lengths": inside.sum(-1)}


KINDS = {
    "language model": Kind(
        language_model_forward, language_model_backward, language_model_decode, padding=_behind_padding),
    "recurrent language model": Kind(
        recurrent_model_forward, recurrent_model_backward, _recurrent_decode, padding=_lengths),
    "encoder": Kind(encoder_model_forward, encoder_model_backward, None),
    "encoder-decoder": Kind(
        transformer_forward, transformer_backward, transformer_decode, transformer_memory, _of_source),
    "copying encoder-decoder": Kind(copying_forward, copying_backward, copying_decode, copying_memory, _of_source),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model of one of `KINDS`; `npattn.models.load` reads one, and `npattn.models.save` writes it.

    settings, generation : what config.json and generation_config.json hold, as they are
    tokenizer            : see `npattn.models.tokens`; None where the folder has none
    longest              : the most tokens of a text, where the folder says it beside config.json
    """

    kind: str
    config: Any  # `Config`, or `RecurrentConfig` of a recurrent model
    params: Any
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    generation: Mapping[str, Any] = field(default_factory=dict, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    longest: int | None = None

    def forward(self, *ids: Any, inside: Array | None = None, **options: Any) -> tuple[Any, Any]:
        """The output and the cache: ``model.forward(ids)``, or ``model.forward(source, target)`` of an encoder-decoder.

        inside : (B, L) booleans, False in padding of ids, or of the source: nothing sees it
        options : of the forward of this kind, such as mask, positions, types or dropout
        """
        kind = KINDS[self.kind]
        if len(ids) != (1 if kind.memory is None else 2):
            expected = "ids" if kind.memory is None else "source and target"
            raise TypeError(f"forward: got {len(ids)} arrays of tokens, expected {expected}: the model is a {self.kind}")
        given = {} if inside is None else kind.padding(inside)
        return kind.forward(*ids, self.params, self.config, **given, **options)  # type: ignore[no-any-return]

    def backward(self, dout: Any, cache: Any) -> Any:
        """The gradients of sum(dout * out): ``.params`` has the shape and the names of the parameters."""
        return KINDS[self.kind].backward(dout, cache)

    def decode(self, ids: Any, past: Any = None, **options: Any) -> tuple[Any, Any]:
        """The logits after more tokens, and the past with these."""
        decode = KINDS[self.kind].decode
        if decode is None:
            raise ValueError(f"decode: the model is of kind {self.kind!r}, which predicts no next token")
        return decode(ids, self.params, self.config, past, **options)  # type: ignore[no-any-return]

    def memory(self, source: Any, **options: Any) -> Any:
        """What `decode` gets first from an encoder-decoder: the source (B, S), read once."""
        memory = KINDS[self.kind].memory
        if memory is None:
            raise ValueError(f"memory: the model is of kind {self.kind!r}, which has no encoder and decoder")
        return memory(source, self.params, self.config, **options)

    def astype(self, dtype: Any) -> Model:
        """The model with parameters of another dtype, such as "float16" or "bfloat16".

        Files of Gemma hold g - 1 for the weights g of its norms. Of those 16 bits keep fewer digits than of g - 1: save such a
        model in float32.
        """
        to = as_dtype(dtype)
        return replace(self, params=tree_map(lambda x: x.astype(to, copy=False), self.params))

    @property
    def size(self) -> int:
        """The number of parameters; a table that is used twice counts once."""
        return sum(x.size for x in named_leaves(self.params).values())

    @property
    def dtype(self) -> np.dtype[Any]:
        first: np.dtype[Any] = next(x.dtype for x in named_leaves(self.params).values())
        return first


def as_dtype(dtype: Any) -> np.dtype[Any]:
    """np.dtype, also of "bfloat16", which NumPy knows by the package ml_dtypes."""
    if str(dtype) == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401
        except ImportError:
            raise ImportError("ml_dtypes is missing, which has bfloat16: pip install 'npattn[models]'") from None
    found: np.dtype[Any] = np.dtype(dtype)
    return found


__all__ = ["KINDS", "Kind", "Model", "as_dtype"]
