"""Parameters of blocks and stacks from and to torch: nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, and their stacks.

Gradients are converted as parameters are. What of a torch layer is no parameter becomes a `Config`: nhead is ``num_heads``,
norm_first ``pre_norm``, layer_norm_eps ``norm_eps``, activation "relu" or "gelu". prefix : what stands before the names in a
state dict, such as "encoder.layers.0.".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from npattn import convert
from npattn.models.blocks import DecoderBlockParams, EncoderBlockParams
from npattn.models.transformer import DecoderParams, EncoderParams
from npattn.ops.checks import Array, check_class, kind
from npattn.ops.feed_forward import FeedForwardParams
from npattn.ops.linear import LinearParams
from npattn.ops.norms import NormParams


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The part of a state dict whose names begin with the prefix, without it."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is {kind(state)}, expected a mapping of names to tensors")
    found = {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"no name begins with {prefix!r}, got {sorted(state)}")
    return found


def _above(state: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {f"{prefix}{name}": x for name, x in state.items()}


def _feed_forward_from_torch(state: Mapping[str, Any]) -> FeedForwardParams:
    first, second = (convert.linear_from_torch(state, prefix=f"linear{n}.") for n in (1, 2))
    return FeedForwardParams(first.w, second.w, first.b, second.b)


def _feed_forward_to_torch(params: FeedForwardParams) -> dict[str, Array]:
    if params.w_gate is not None:
        raise ValueError("w_gate is given, expected None: torch's layers have no gate")
    both = LinearParams(params.w_in, params.b_in), LinearParams(params.w_out, params.b_out)
    return {n: x for i, part in enumerate(both, 1) for n, x in convert.linear_to_torch(part, prefix=f"linear{i}.").items()}


def encoder_block_from_torch(state: Mapping[str, Any], *, prefix: str = "") -> EncoderBlockParams:
    """The state dict of a torch.nn.TransformerEncoderLayer. Raises TypeError, ValueError."""
    s = _below(state, prefix)
    attention = convert.multi_head_from_torch(_below(s, "self_attn."))
    norms = [convert.norm_from_torch(s, prefix=f"norm{n}.") for n in (1, 2)]
    return EncoderBlockParams(attention, norms[0], _feed_forward_from_torch(s), norms[1])


def encoder_block_to_torch(params: EncoderBlockParams, *, prefix: str = "") -> dict[str, Array]:
    """The state dict of a torch.nn.TransformerEncoderLayer with these parameters (or their gradients)."""
    check_class("encoder_block_to_torch", "params", params, EncoderBlockParams)
    state = {
        **_above(convert.multi_head_to_torch(params.attention), "self_attn."), **_feed_forward_to_torch(params.feed_forward),
        **convert.norm_to_torch(params.attention_norm, prefix="norm1."),
        **convert.norm_to_torch(params.feed_forward_norm, prefix="norm2."),
    }  # fmt: skip
    return _above(state, prefix)


def decoder_block_from_torch(state: Mapping[str, Any], *, prefix: str = "") -> DecoderBlockParams:
    """The state dict of a torch.nn.TransformerDecoderLayer. Raises TypeError, ValueError."""
    s = _below(state, prefix)
    attention, cross = (convert.multi_head_from_torch(_below(s, f"{name}.")) for name in ("self_attn", "multihead_attn"))
    norms = [convert.norm_from_torch(s, prefix=f"norm{n}.") for n in (1, 2, 3)]
    return DecoderBlockParams(attention, norms[0], cross, norms[1], _feed_forward_from_torch(s), norms[2])


def decoder_block_to_torch(params: DecoderBlockParams, *, prefix: str = "") -> dict[str, Array]:
    """The state dict of a torch.nn.TransformerDecoderLayer with these parameters (or their gradients)."""
    check_class("decoder_block_to_torch", "params", params, DecoderBlockParams)
    norms = (params.attention_norm, params.cross_norm, params.feed_forward_norm)
    state = {
        **_above(convert.multi_head_to_torch(params.attention), "self_attn."),
        **_above(convert.multi_head_to_torch(params.cross), "multihead_attn."), **_feed_forward_to_torch(params.feed_forward),
        **{n: x for i, norm in enumerate(norms, 1) for n, x in convert.norm_to_torch(norm, prefix=f"norm{i}.").items()},
    }  # fmt: skip
    return _above(state, prefix)


def encoder_from_torch(state: Mapping[str, Any], *, prefix: str = "") -> EncoderParams:
    """The state dict of a torch.nn.TransformerEncoder; prefix "encoder." for that of an nn.Transformer."""
    return EncoderParams(*_stack(_below(state, prefix), encoder_block_from_torch))


def decoder_from_torch(state: Mapping[str, Any], *, prefix: str = "") -> DecoderParams:
    """The state dict of a torch.nn.TransformerDecoder; prefix "decoder." for that of an nn.Transformer."""
    return DecoderParams(*_stack(_below(state, prefix), decoder_block_from_torch))


def encoder_to_torch(params: EncoderParams, *, prefix: str = "") -> dict[str, Array]:
    """The state dict of a torch.nn.TransformerEncoder with these parameters (or their gradients)."""
    return _above(_stack_to_torch(params, encoder_block_to_torch), prefix)


def decoder_to_torch(params: DecoderParams, *, prefix: str = "") -> dict[str, Array]:
    """The state dict of a torch.nn.TransformerDecoder with these parameters (or their gradients)."""
    return _above(_stack_to_torch(params, decoder_block_to_torch), prefix)


def _stack(state: Mapping[str, Any], block: Callable[..., Any]) -> tuple[tuple[Any, ...], NormParams | None]:
    count = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("layers.")), default=-1)
    blocks = tuple(block(state, prefix=f"layers.{n}.") for n in range(count))
    return blocks, convert.norm_from_torch(state, prefix="norm.") if "norm.weight" in state else None


def _stack_to_torch(params: Any, block: Callable[..., dict[str, Array]]) -> dict[str, Array]:
    state = {n: x for i, p in enumerate(params.blocks) for n, x in block(p, prefix=f"layers.{i}.").items()}
    return state if params.norm is None else {**state, **convert.norm_to_torch(params.norm, prefix="norm.")}


__all__ = [
    "decoder_block_from_torch",
    "decoder_block_to_torch",
    "decoder_from_torch",
    "decoder_to_torch",
    "encoder_block_from_torch",
    "encoder_block_to_torch",
    "encoder_from_torch",
    "encoder_to_torch",
]
