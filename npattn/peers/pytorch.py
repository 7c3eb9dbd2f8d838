"""torch: scaled_dot_product_attention, flex_attention, multi-head attention, recurrent layers, and what stands around them.

Everything here is a function of tensors; `on_arrays` and `pair` make of it what takes arrays and returns them.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.nn.functional import cross_entropy, multi_head_attention_forward, scaled_dot_product_attention
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from npattn.ops.checks import Array
from npattn.peers import Function, Pair, one_of, rank_4
from npattn.peers.findings import Finding

_switches = threading.Lock()  # of torch's backends, which are those of the process: one thread at a time turns them

# --- arrays and tensors ---------------------------------------------------------------------------------------------------


def tensor(x: Any, gradients: bool = False) -> Any:
    """A copy of an array, or of each in a mapping, as a tensor; anything else stays as it is."""
    if isinstance(x, Mapping):
        return {name: tensor(y, gradients) for name, y in x.items()}
    if not isinstance(x, np.ndarray):
        return x
    own = np.array(x, order="C")  # torch refuses strides below 0, even those of an axis of one element
    return torch.from_numpy(own).requires_grad_(gradients and x.dtype.kind == "f")


def _array(x: Any) -> Any:
    return tuple(map(_array, x)) if isinstance(x, tuple) else x.numpy()


def _gradients(leaves: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: _gradients(x) if isinstance(x, dict) else getattr(x, "grad", None) for name, x in leaves.items()}
    return {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in found.items() if x is not None}


def gradients(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """By name: dq of q; those of a state_dict stand under its own name."""
    return {name if isinstance(x, dict) else f"d{name}": x for name, x in _gradients(leaves).items()}


def on_arrays(run: Function) -> Function:
    """The same function with arrays in and out."""

    def forward(*inputs: Any, **options: Any) -> Any:
        return _array(run(*map(tensor, inputs), **tensor(options)))

    return functools.update_wrapper(forward, run)


def pair(run: Function) -> Pair:
    """on_arrays, and its backward by autograd."""

    def backward(dout: Array, *inputs: Any, **options: Any) -> dict[str, Any]:
        leaves = tensor(dict(zip(inspect.signature(run).parameters, inputs, strict=False)) | options, gradients=True)
        run(**leaves).backward(tensor(dout))
        return gradients(leaves)

    return on_arrays(run), functools.update_wrapper(backward, run)


# --- scaled_dot_product_attention, flex_attention -------------------------------------------------------------------------


def _call(backend: str | None, q: Any, k: Any, v: Any, **options: Any) -> Any:
    """scaled_dot_product_attention, by the backend that torch chooses or by one of SDPBackend."""
    call = partial(scaled_dot_product_attention, q, k, v, enable_gqa=q.ndim > 2 and q.shape[-3] != k.shape[-3], **options)
    if backend is None:
        return call()
    with _switches, warnings.catch_warnings(record=True) as reasons, sdpa_kernel(getattr(SDPBackend, backend)):
        warnings.simplefilter("always")  # torch warns why a backend cannot be used, then raises
        try:
            return call()
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            told = [str(w.message).partition(" (Triggered")[0] for w in reasons]
            told = [text for text in told if not text.endswith("because:")]
            raise NotImplementedError("; ".join(told) or f"torch has no {backend} kernel for this call") from error


def _sdpa(
    backend: str | None, q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, scale: Any = None, causal: bool = False
) -> Any:
    attn_mask, whole = mask, mask is None and bias is None
    if causal and not whole:  # torch takes is_causal or attn_mask, not both
        lower = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        attn_mask = lower if attn_mask is None else attn_mask & lower
    if bias is not None:
        attn_mask = bias if attn_mask is None else torch.where(attn_mask, bias, -torch.inf)
    return _call(backend, q, k, v, attn_mask=attn_mask, is_causal=causal and whole, scale=scale)


def _sdpa_in_its_words(
    backend: str | None, q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, scale: Any = None, causal: bool = False
) -> Any:
    if causal and bias is not None:
        raise NotImplementedError("is_causal, or a bias")
    return _call(backend, q, k, v, attn_mask=one_of(mask, bias), is_causal=causal, scale=scale)


def _flex(q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None) -> Any:
    """flex_attention, not compiled: masks by mask_mod, softcap and bias by score_mod. On a CPU it has no backward."""
    rank_4(q, "flex_attention")
    shape = (*q.shape[:-1], k.shape[-2])
    if 0 in shape:
        raise NotImplementedError("flex_attention makes no block mask without elements")
    seen, added = (None if x is None else x.expand(shape) for x in (mask, bias))

    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if added is None else score + added[b, h, i, j]

    block_mask = None
    if seen is not None:
        block_mask = flex_attention.create_block_mask(lambda b, h, i, j: seen[b, h, i, j], *shape, device="cpu")
    with _switches:
        before = flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
        flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # else it compiles for each shape, also called eagerly
        try:
            out, aux = flex_attention.flex_attention(
                q, k, v, score_mod=None if softcap is None and added is None else score_mod, block_mask=block_mask,
                scale=scale, enable_gqa=q.shape[1] != k.shape[1], return_aux=flex_attention.AuxRequest(lse=True),
            )  # fmt: skip
        finally:
            flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before
    return out, aux.lse


# --- multi-head attention -------------------------------------------------------------------------------------------------


def _dropped(mask: Any, B: int, H: int, L: int, S: int) -> Any:
    """A mask that is True where a key may be attended to, as torch's: True where it is dropped, (L, S) or (B H, L, S)."""
    if mask is None:
        return None
    mask = ~mask.expand(*mask.shape[:-2], L, S)
    return mask.expand(B, H, L, S).flatten(0, 1) if mask.ndim == 4 else mask


def _project_and_attend(weights: bool, x: tuple[Any, ...], state: Mapping[str, Any], num_heads: int, attn_mask: Any) -> Any:
    """multi_head_attention_forward, without or with the weights, which is another code path."""
    q, k, v = (a.transpose(0, 1) for a in x)
    out, _ = multi_head_attention_forward(
        q, k, v, q.shape[-1], num_heads, state.get("in_proj_weight"), state.get("in_proj_bias"), None, None, False, 0.0,
        state["out_proj.weight"], state.get("out_proj.bias"), training=False, need_weights=weights, attn_mask=attn_mask,
        average_attn_weights=False, use_separate_proj_weight="in_proj_weight" not in state,
        q_proj_weight=state.get("q_proj_weight"), k_proj_weight=state.get("k_proj_weight"),
        v_proj_weight=state.get("v_proj_weight"),
    )  # fmt: skip
    return out.transpose(0, 1)


def _mha(
    weights: bool, x_q: Any, x_k: Any, x_v: Any, state_dict: Mapping[str, Any], *, num_heads: int, mask: Any = None
) -> Any:
    if x_q.ndim != 3:
        raise NotImplementedError("the adapter takes (B, L, M)")
    dropped = _dropped(mask, len(x_q), num_heads, x_q.shape[1], x_k.shape[1])
    return _project_and_attend(weights, (x_q, x_k, x_v), state_dict, num_heads, dropped)


def _mha_in_its_words(weights: bool, q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None) -> Any:
    """With projections that change nothing."""
    (B, H, L, D), S = q.shape, k.shape[2]
    if k.shape[1] != H or v.shape[-1] != D or not B * L * S:
        raise NotImplementedError("as many heads of keys as of queries, of one width, and something to attend to")
    added = one_of(mask, bias)
    if added is not None and added.ndim == 4:
        added = added.expand(B, H, added.shape[2], S).flatten(0, 1)
    one = torch.eye(H * D, dtype=q.dtype)
    state = {"in_proj_weight": torch.cat([one] * 3), "out_proj.weight": one}
    out = _project_and_attend(weights, tuple(x.transpose(1, 2).flatten(2) for x in (q, k, v)), state, H, added)
    return out.unflatten(-1, (H, D)).transpose(1, 2)


def _mha_fast(x_q: Any, x_k: Any, x_v: Any, state_dict: Mapping[str, Any], *, num_heads: int, mask: Any = None) -> Any:
    """nn.MultiheadAttention in eval mode, which has a fast path of its own for self-attention."""
    same = all(x.shape == x_q.shape and torch.allclose(x, x_q, rtol=0, atol=0, equal_nan=True) for x in (x_k, x_v))
    for given, needed in (
        (x_q.ndim == 3, "inputs (B, L, M)"),
        (same, "self-attention: x_q, x_k and x_v the same"),
        (num_heads % 2 == 0, "an even number of heads"),
        ("in_proj_weight" in state_dict and "in_proj_bias" in state_dict, "in_proj_weight and in_proj_bias"),
    ):
        if not given:
            raise NotImplementedError(f"the fast path of nn.MultiheadAttention needs {needed}")
    B, L, M = x_q.shape
    layer = torch.nn.MultiheadAttention(M, num_heads, batch_first=True, dtype=x_q.dtype)
    layer.load_state_dict(state_dict)
    with torch.no_grad():
        return layer.eval()(x_q, x_q, x_q, need_weights=False, attn_mask=_dropped(mask, B, num_heads, L, L))[0]


# --- recurrent layers, and layers of one function -------------------------------------------------------------------------
# --- linear, embedding ----------------------------------------------------------------------------------------------------


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return torch.nn.functional.linear(x, weight, bias)


def _embedding(ids: Any, table: Any) -> Any:
    if ids.dtype not in (torch.int32, torch.int64):
        raise NotImplementedError("ids are int32 or int64")
    return torch.nn.functional.embedding(ids, table)


def _tied_head(x: Any, table: Any) -> Any:
    return torch.nn.functional.linear(x, table)


# --- recurrent networks, softmax ------------------------------------------------------------------------------------------


def _recurrent(make: Function, x: Any, firsts: tuple[Any, ...], state_dict: Mapping[str, Any], lengths: Any) -> Any:
    """One layer of torch, forwards; lengths by a PackedSequence. firsts : h0, and c0 where there is one"""
    B, T, M = x.shape
    if not B or not T:
        raise NotImplementedError("torch takes no empty batch or sequence")
    if lengths is not None and not (lengths > 0).all():
        raise NotImplementedError("a PackedSequence has no sequence of length 0")
    if any("_l0" not in name or "reverse" in name for name in state_dict):
        raise NotImplementedError("the adapter takes one layer, forwards")
    N = state_dict["weight_hh_l0"].shape[1]
    layer = make(M, N, bias="bias_ih_l0" in state_dict, batch_first=True, dtype=x.dtype)
    given, start = x, None
    if lengths is not None:
        given = pack_padded_sequence(x, lengths.to(torch.int64), batch_first=True, enforce_sorted=False)
    if any(s is not None for s in firsts):  # torch takes all of them or none
        start = tuple(x.new_zeros(1, B, N) if s is None else s[None] for s in firsts)
        start = start if len(start) > 1 else start[0]
    h, last = torch.func.functional_call(layer, state_dict, (given, start), strict=True)
    lasts = last if isinstance(last, tuple) else (last,)
    if lengths is not None:
        h, _ = pad_packed_sequence(h, batch_first=True, total_length=T)
    return h, *(y[0].clone() for y in lasts)  # it is a view of h where there is one step


def _rnn(x: Any, h0: Any, state_dict: Mapping[str, Any], *, lengths: Any = None, nonlinearity: str = "tanh") -> Any:
    return _recurrent(partial(torch.nn.RNN, nonlinearity=nonlinearity), x, (h0,), state_dict, lengths)


def _gru(x: Any, h0: Any, state_dict: Mapping[str, Any], *, lengths: Any = None) -> Any:
    return _recurrent(torch.nn.GRU, x, (h0,), state_dict, lengths)


def _lstm(x: Any, h0: Any, c0: Any, state_dict: Mapping[str, Any], *, lengths: Any = None) -> Any:
    return _recurrent(torch.nn.LSTM, x, (h0, c0), state_dict, lengths)


def _with_last_states(run: Function, *lasts: str) -> Pair:
    """on_arrays, and its backward, which also takes the gradients of the last states: dh_last ..."""
    own = inspect.signature(run).parameters

    def backward(dh: Array, *inputs: Any, **options: Any) -> dict[str, Any]:
        given = [dh, *(options.pop(name, None) for name in lasts)]
        leaves = tensor(dict(zip(own, inputs, strict=False)), gradients=True)
        outputs = [(y, tensor(dy)) for y, dy in zip(run(**leaves, **tensor(options)), given, strict=True) if dy is not None]
        torch.autograd.backward(*zip(*outputs, strict=True))
        return gradients(leaves)

    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in lasts]
    first = inspect.Parameter("dh", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    vars(backward)["__signature__"] = inspect.Signature([first, *own.values(), *more])
    return on_arrays(run), backward


def _softmax(scores: Any, *, mask: Any = None) -> Any:
    """torch.softmax; a mask is masked_fill with -inf."""
    return torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), -1)


def _layer_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5) -> Any:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rms_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-6) -> Any:
    if bias is not None:
        raise NotImplementedError("F.rms_norm has no bias")
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def _gelu(x: Any, *, approximate: str = "none") -> Any:
    return torch.nn.functional.gelu(x, approximate=approximate)


def elementwise(function: Function) -> Pair:
    def run(x: Any) -> Any:
        return function(x)

    return pair(run)


def _cross_entropy(
    logits: Any, targets: Any, *, mask: Any = None, reduction: str = "mean", label_smoothing: float = 0.0
) -> Any:
    """torch.nn.functional.cross_entropy, which has one axis of positions; a mask is a target of its ignore_index."""
    targets = targets if mask is None else targets.masked_fill(~mask, -100)
    V = logits.shape[-1]
    loss = cross_entropy(logits.reshape(-1, V), targets.reshape(-1), reduction=reduction, label_smoothing=label_smoothing)
    return loss.reshape(targets.shape) if reduction == "none" else loss


ADAPTERS: dict[str, Pair] = {
    "torch": pair(partial(_sdpa, None)),
    "torch-math": pair(partial(_sdpa, "MATH")),
    "torch-flash": pair(partial(_sdpa, "FLASH_ATTENTION")),
    "torch-flex": (on_arrays(_flex), None),
    "torch-mha": pair(partial(_mha, False)),
    "torch-mha-weights": pair(partial(_mha, True)),
    "torch-mha-fast": (on_arrays(_mha_fast), None),
    "torch-rnn": _with_last_states(_rnn, "dh_last"),
    "torch-gru": _with_last_states(_gru, "dh_last"),
    "torch-lstm": _with_last_states(_lstm, "dh_last", "dc_last"),
    "torch-softmax": pair(_softmax),
    "torch-layer-norm": pair(_layer_norm),
    "torch-rms-norm": pair(_rms_norm),
    "torch-silu": elementwise(torch.nn.functional.silu),
    "torch-sigmoid": elementwise(torch.sigmoid),
    "torch-gelu": pair(_gelu),
    "torch-relu": elementwise(torch.relu),
    "torch-cross-entropy": pair(_cross_entropy),
    "torch-linear": pair(_linear),
    "torch-embedding": pair(_embedding),
    "torch-tied-head": pair(_tied_head),
}
OWN_WORDS: dict[str, Pair] = {
    "torch": pair(partial(_sdpa_in_its_words, None)),
    "torch-math": pair(partial(_sdpa_in_its_words, "MATH")),
    "torch-flash": pair(partial(_sdpa_in_its_words, "FLASH_ATTENTION")),
    "torch-flex": ADAPTERS["torch-flex"],  # it translates nothing but names
    "torch-mha": pair(partial(_mha_in_its_words, False)),
    "torch-mha-weights": pair(partial(_mha_in_its_words, True)),
}

# --- findings -------------------------------------------------------------------------------------------------------------

PRELUDE = """
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    x, no = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[True, False]] * 2)"""
FINDINGS = [
    Finding("`is_causal` with a negative scale gives NaN: masked scores are -inf, and the scale makes them +inf", """
        print(sdpa(x, x, x, is_causal=True, scale=-1.0).isnan().flatten().tolist())
        print(sdpa(x, x, x, attn_mask=torch.ones(2, 2, dtype=torch.bool).tril(), scale=-1.0).isnan().any().item())
        """, r"\[True, False\]\nFalse"),
    Finding("A query without keys in `nn.MultiheadAttention`: NaN with weights, 0 without, NaN on the fast path", """
        layer = torch.nn.MultiheadAttention(4, 2, batch_first=True).eval()
        y, drop = torch.ones(1, 2, 4), torch.ones(2, 2, dtype=torch.bool)
        print(*(layer(y, y, y, attn_mask=drop, need_weights=w)[0][0, 0, 0].item() for w in (True, False)))
        print(torch.no_grad()(layer)(y, y, y, attn_mask=drop, need_weights=False)[0][0, 0, 0].item())
        """, r"nan 0.0\nnan"),
    Finding("`attn_mask` and `is_causal` in one call, documented as an error: the chosen kernel takes both", """
        print(sdpa(x, x, x, attn_mask=no, is_causal=True).flatten().tolist())
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            sdpa(x, x, x, attn_mask=no, is_causal=True)
        """, r"\[1.0, 1.0\]\nRuntimeError: .*"),
    Finding("NaN in a value that is masked reaches the output, as 0 times NaN", """
        v = torch.tensor([[[[1.0], [torch.nan]]]])
        print(sdpa(x, x, v, attn_mask=no).flatten().tolist())
        """, r"\[nan, nan\]", "edge"),
    Finding("NaN in a value that is masked reaches the output of `flex_attention`, too", """
        from torch.nn.attention.flex_attention import flex_attention
        v = torch.tensor([[[[1.0], [torch.nan]]]])
        print(flex_attention(x, x, v, score_mod=lambda s, b, h, i, j: torch.where(j == 0, s, -torch.inf)).flatten().tolist())
        """, r"\[nan, nan\]", "edge"),
    Finding("GELU of inf and of -inf is NaN, SiLU of -inf, and so are all their gradients; the limits are inf, 0, 1 and 0", """
        for f in (torch.nn.functional.gelu, torch.nn.functional.silu):
            z = torch.tensor([torch.inf, -torch.inf], requires_grad=True); f(z).sum().backward()
            print(f(z).tolist(), z.grad.tolist())
        """, r"\[nan, nan\] \[nan, nan\]\n\[inf, nan\] \[nan, nan\]", "edge"),
    Finding("The gradient of ReLU where x is NaN is dy; jax gives 0", """
        z = torch.tensor([torch.nan], requires_grad=True); torch.relu(z).backward()
        print(z.grad.item())
        """, "1.0", "edge"),
    Finding("GELU far below 0 has no correct digit: it is computed as x (1 + erf(x / sqrt 2)) / 2", """
        print("%.3g" % torch.nn.functional.gelu(torch.tensor([-6.0])).item(), "and not -5.92e-09")
        """, r"\S+ and not -5.92e-09", "edge"),
]  # fmt: skip
