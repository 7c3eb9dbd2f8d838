"""What the public functions share: the form without a cache, and error messages for habits from other libraries."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


# --- the form without a cache ---------------------------------------------------------------------------------------------


def without_cache(forward: Callable[P, tuple[R, Any]]) -> Callable[P, R]:
    """The function x of a function x_forward: the same arguments, but it returns only the output."""

    @functools.wraps(forward)
    def x(*args: P.args, **kwargs: P.kwargs) -> R:
        return forward(*args, **kwargs)[0]

    said = inspect.cleandoc(forward.__doc__ or "").partition(">>>")[0].strip()  # its examples stand there, and run once
    x.__doc__ = f"The output of `{forward.__name__}`, without its cache. Of that function:\n\n{said}"
    x.__name__ = x.__qualname__ = forward.__name__.removesuffix("_forward")
    x.__annotations__ = {name: a for name, a in forward.__annotations__.items() if name != "return"}
    vars(x)["__signature__"] = inspect.signature(forward).replace(return_annotation=inspect.Signature.empty)
    return x


# --- keywords ---------------------------------------------------------------------------------------------------------------

CAUSAL = 'mask=npattn.causal(), with align="top_left" or "bottom_right" where L and S differ'
MASK = "mask= for booleans (True = may attend), bias= for what is added to the scores"
PADDING = "mask=npattn.keys(allowed), with allowed True where a key counts (torch's mask is the inverse)"
DROPOUT = "dropout_mask=(rng.random((B, H, L, S)) >= p) / (1 - p), drawn by you, or npattn.Dropout(p, seed, step, layer)"
WINDOW = "mask=npattn.window(left, right), both ends included"
LENGTHS = "mask=npattn.key_lengths(n)"
PACKED = "mask=npattn.packed(cu_seqlens_q, cu_seqlens_k)"
SEGMENTS = "mask=npattn.segments(q_ids, k_ids)"
WEIGHTS = "{op}_forward: weights are in its cache"
# A keyword of another library -> (a keyword of npattn that only functions with such an option have, what to write instead).
INSTEAD: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("causal", "is_causal", "use_causal_mask", "unidirectional"), ("softcap", CAUSAL)),
    **dict.fromkeys(("attn_mask", "attention_mask", "att_mask"), ("softcap", MASK)),
    **dict.fromkeys(("key_padding_mask", "padding_mask", "src_key_padding_mask"), ("softcap", PADDING)),
    **dict.fromkeys(("dropout", "dropout_p", "dropout_rate", "attention_dropout"), ("dropout_mask", DROPOUT)),
    **dict.fromkeys(("window", "window_size", "sliding_window", "local_window_size"), ("softcap", WINDOW)),
    **dict.fromkeys(("key_lengths", "seqlens_k", "key_value_seq_lengths", "lengths"), ("softcap", LENGTHS)),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"), ("softcap", PACKED)),
    **dict.fromkeys(("segment_ids", "q_segment_ids", "kv_segment_ids"), ("softcap", SEGMENTS)),
    **dict.fromkeys(("attn_bias", "attention_bias"), ("bias", "bias=")),
    "alibi_slopes": ("bias", "bias=npattn.Alibi(slopes)"),
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), ("scale", "scale=")),
    **dict.fromkeys(("soft_cap", "logits_soft_cap", "attn_logit_softcapping"), ("softcap", "softcap=")),
    **dict.fromkeys(("sinks", "s_aux", "learnable_sink", "attention_sinks"), ("sink", "sink=, (H,)")),
    **dict.fromkeys(("need_weights", "return_weights", "average_attn_weights"), ("softcap", WEIGHTS)),
    **dict.fromkeys(("return_softmax_lse", "return_residuals"), ("return_lse", "return_lse=True")),
    "enable_gqa": ("softcap", "nothing: k and v may have fewer heads than q"),
    "num_key_value_heads": ("num_kv_heads", "num_kv_heads="),
    "hx": ("h0", "h0, the second argument"),
    **dict.fromkeys(("n_head", "n_heads", "nhead", "num_attention_heads"), ("num_heads", "num_heads")),
    "batch_first": ("h0", "nothing: x is (B, T, M)"),
    "bidirectional": ("h0", "two layers, the second with npattn.reversed_steps(x, lengths)"),
    **dict.fromkeys(("epsilon", "layer_norm_eps", "rms_norm_eps"), ("eps", "eps=")),
    "normalized_shape": ("eps", "nothing: the mean is over the last axis"),
    **dict.fromkeys(("axis", "dim"), ("scores", "the axis last: np.moveaxis(scores, axis, -1)")),
    "padding_idx": ("ids", "nothing: set the row of the gradient to 0 yourself"),
    "ignore_index": ("targets", "mask=targets != ignore_index (True = counts)"),
    **dict.fromkeys(("target", "labels"), ("targets", "targets, the classes")),
}
LINEAR = "params=LinearParams(weight.T, bias)"
NORM = "params=NormParams(weight, bias)"
DROPPED = "dropout_mask=(rng.random((..., F)) >= p) / (1 - p), or npattn.Dropout(p, seed).mask((..., F), x.dtype)"
# What a keyword means in one function. The functions of INSTEAD share their meaning, and these do not.
OF_FUNCTION: dict[str, dict[str, str]] = {
    "linear": {"weight": LINEAR, "bias": LINEAR, "input": "x"},
    "layer_norm": {"weight": NORM, "bias": NORM, "input": "x"},
    "rms_norm": {"weight": NORM, "input": "x"},
    "embedding": {"weight": "table, (V, M)", "input": "ids"},
    "tied_head": {"weight": "table, (V, M)", "input": "x"},
    "cross_entropy": {"input": "logits"},
    "dropout": {"p": "mask=npattn.Dropout(p, seed).mask(x.shape, x.dtype)"},
    "feed_forward": dict.fromkeys(("dropout", "dropout_p", "dropout_rate"), DROPPED),
    "lstm": {"hx": "h0 and c0, two arguments"},
}


def explain_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, but for an unknown keyword it raises a TypeError that says what to write instead."""
    parameters = inspect.signature(function).parameters.values()
    names, needed = [p.name for p in parameters], [p.name for p in parameters if p.default is p.empty]
    first = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    op = function.__name__.removesuffix("_forward")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not kwargs.keys() <= set(names):
            unknown = next(name for name in kwargs if name not in names)
            instead = _instead(op, unknown, names, first)
            raise TypeError(f"{op}: got the keyword {unknown}, expected {instead}; needed are {', '.join(needed)}")
        if len(args) > len(first):
            more = f": options are given by name, as {names[len(first)]}=" if len(names) > len(first) else ""
            raise TypeError(f"{op}: got {len(args)} arguments without a name, expected {', '.join(first)}{more}")
        if len(args) < len(needed) and (missing := [n for n in needed[len(args) :] if n not in kwargs]):
            raise TypeError(f"{op}: got no {' and no '.join(missing)}, expected {', '.join(needed)}")
        return function(*args, **kwargs)

    return call


def _instead(op: str, name: str, names: list[str], first: list[str]) -> str:
    if text := OF_FUNCTION.get(op, {}).get(name):
        return text
    ours, text = INSTEAD.get(name, ("", ""))
    options = [n for n in names if n not in first] or first
    return text.format(op=op) if ours in names else f"one of {', '.join(options)}"


# --- layout -----------------------------------------------------------------------------------------------------------------


def explain_layout(bind: Callable[..., R]) -> Callable[..., R]:
    """The same checks of (op, q, k, v, ...), but if the shapes would fit in the layout (B, L, H, D) the error says so."""

    @functools.wraps(bind)
    def checked(op: str, q: Any, k: Any, v: Any, *options: Any) -> R:
        try:
            return bind(op, q, k, v, *options)
        except ValueError as error:
            try:
                bind(op, *(x.swapaxes(-3, -2) for x in (q, k, v)), *options)
            except (TypeError, ValueError):  # these do not fit either
                raise error from None
            hint = "the layout is (B, H, L, D): if yours is (B, L, H, D), give x.swapaxes(-3, -2)"
            raise ValueError(f"{error}; {hint}") from None

    return checked


__all__ = ["explain_keywords", "explain_layout", "without_cache"]
