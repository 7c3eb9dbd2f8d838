"""Where implementations of attention disagree without any of them being wrong: named values, and presets of known libraries.

Each field of a `Convention` is one of the conflicts C1 to C22 (docs/conventions.md); its first value is npattn's own. How a
value is used depends on the field:

    given      the same problem is given to the candidate in another form
    expected   another result is expected of the candidate
    undefined  some cases have no defined result, and are not tested
    recorded   a fact about a library; no case of verify depends on it yet
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Values(NamedTuple):
    conflict: str
    use: str  # "given", "expected", "undefined" or "recorded"
    meaning: str
    values: dict[str, str]  # the first is npattn's


FIELDS: dict[str, Values] = {
    "causal": Values("C1", "given", "how the queries of causal and window stand to the keys where L != S", {
        "top_left": "query 0 stands at key 0", "bottom_right": "the last query stands at the last key"}),
    "mask": Values("C2", "given", "what True in a boolean mask means", {"keep": "may attend", "drop": "may not attend"}),
    "mask_shape": Values("C3", "given", "the shape of a mask or bias", {
        "broadcast": "rank 2, or full rank with axes of size 1", "full": "(B, H, L, S)"}),
    "dead_out": Values("C4", "expected", "the output of a query that may see no key", {
        "zero": "0", "mean_v": "the mean of all values", "nan": "NaN", "undefined": "anything"}),
    "dead_lse": Values("C5", "expected", "its lse, without a sink", {
        "-inf": "minus infinity", "+inf": "plus infinity", "zero": "0", "fill": "0.7 finfo.min", "undefined": "anything"}),
    "dead_grad": Values("C6", "expected", "the gradients through it", {
        "zero": "0", "leak": "dv gets dout / S, dq and dk 0", "undefined": "anything"}),
    "lse": Values("C7", "expected", "the base of lse", {"natural": "e", "log2": "2"}),
    "lse_layout": Values("C7", "given", "the axes of lse", {"BHL": "(B, H, L)", "BLH": "(B, L, H)"}),
    "dlse": Values("C8", "expected", "the gradient through lse", {"used": "added", "ignored": "dropped, or stopped"}),
    "softcap": Values("C9", "expected", "where the softcap stands", {
        "before_bias": "cap, bias, mask", "after_bias": "bias, cap, mask", "after_mask": "mask, cap: masked keys get weight"}),
    "window": Values("C10", "given", "what the left number of a window counts", {
        "inclusive": "left keys and the own one", "total": "left keys with the own one"}),
    "no_limit": Values("C10", "given", "a window without a limit on one side", {"None": "None", "-1": "-1"}),
    "alibi": Values("C11", "recorded", "the distance that ALiBi multiplies", {
        "abs_bottom_right": "-|i + S - L - j|", "abs_top_left": "-|i - j|", "signed": "j - i", "key": "j"}),
    "heads": Values("C12", "expected", "which key head query head h reads", {"repeat": "h // (H // G)", "tile": "h % G"}),
    "rope": Values("C13", "given", "the pairs that `rotary` turns, if it has no layout=", {
        "half": "d and d + D / 2", "interleaved": "2 d and 2 d + 1"}),
    "scale": Values("C14", "expected", "the scale where none is given", {"rsqrt": "1 / sqrt(D)", "none": "1"}),
    "scale_on": Values("C14", "undefined", "what is multiplied by it", {
        "scores": "q k^T", "q": "q", "both": "q and k, each by its root: NaN where it is negative"}),
    "dropout": Values("C15", "recorded", "the weights that are returned", {"before": "undropped", "after": "dropped"}),
    "sink": Values("C16", "expected", "the sink in lse", {"in_lse": "counted", "not_in_lse": "left out"}),
    "layout": Values("C17", "given", "the axes of q, k, v, out and their gradients", {
        "BHLD": "(B, H, L, D)", "BLHD": "(B, L, H, D)"}),
    "masked_nan": Values("C18", "undefined", "NaN in keys and values that are masked", {
        "contained": "reaches nothing", "poisons": "reaches the output, as 0 * NaN"}),
    "mask_with_causal": Values("C19", "given", "a mask and causal in one call", {
        "intersect": "both hold", "error": "refused: both in one mask"}),
    "padded_queries": Values("C20", "recorded", "rows beyond a sequence's queries", {"zero": "0", "computed": "as others"}),
    "merge_empty": Values("C21", "recorded", "lse of a part without keys in a merge", {"-inf": "-inf", "+inf": "+inf"}),
    "rnn_output": Values("C22", "recorded", "directions in the output of an RNN", {"one": "(B, T, N)", "concat": "(B, T, 2 N)",
                                                                                 "axis": "(T, 2, B, N)"}),
    "rnn_bias": Values("C22", "recorded", "the bias of an RNN", {"one": "b", "two": "b_ih + b_hh"}),
    "float64": Values("", "expected", "what float64 inputs are computed in", {"float64": "float64", "float32": "float32"}),
}  # fmt: skip


def _default(name: str) -> Any:
    return dataclasses.field(default=next(iter(FIELDS[name].values)))


@dataclass(frozen=True)
class Convention:
    """One value for each of FIELDS."""

    causal: str = _default("causal")
    mask: str = _default("mask")
    mask_shape: str = _default("mask_shape")
    dead_out: str = _default("dead_out")
    dead_lse: str = _default("dead_lse")
    dead_grad: str = _default("dead_grad")
    lse: str = _default("lse")
    lse_layout: str = _default("lse_layout")
    dlse: str = _default("dlse")
    softcap: str = _default("softcap")
    window: str = _default("window")
    no_limit: str = _default("no_limit")
    alibi: str = _default("alibi")
    heads: str = _default("heads")
    rope: str = _default("rope")
    scale: str = _default("scale")
    scale_on: str = _default("scale_on")
    dropout: str = _default("dropout")
    sink: str = _default("sink")
    layout: str = _default("layout")
    masked_nan: str = _default("masked_nan")
    mask_with_causal: str = _default("mask_with_causal")
    padded_queries: str = _default("padded_queries")
    merge_empty: str = _default("merge_empty")
    rnn_output: str = _default("rnn_output")
    rnn_bias: str = _default("rnn_bias")
    float64: str = _default("float64")

    def __post_init__(self) -> None:
        for name, value in self.items():
            if value not in FIELDS[name].values:
                raise ValueError(f"convention: {name}={value}, expected one of {', '.join(FIELDS[name].values)}")

    def items(self) -> list[tuple[str, str]]:
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]

    def changes(self, use: str = "") -> dict[str, str]:
        """The fields that differ from npattn's: those with this use, or all of them."""
        own = Convention()
        return {n: v for n, v in self.items() if v != getattr(own, n) and use in ("", FIELDS[n].use)}

    def undefined(self, features: list[str], negative_scale: bool) -> str:
        """Why a case has no defined result; "" if it has one."""
        if self.masked_nan == "poisons" and "NaN containment" in features:
            return "masked_nan=poisons"
        if self.scale_on == "both" and negative_scale:
            return "scale_on=both: a negative scale has no root"
        return ""


class Preset(NamedTuple):
    convention: Convention
    source: str  # "run: ..." with the version that a test runs it against, or "read: ..." with the repository and version
    note: str = ""


_RUN = "run by tests/peers/test_conventions.py: "
_READ = "read from source, not run: "

PRESETS: dict[str, Preset] = {
    "npattn": Preset(Convention(), "run: this package"),
    "torch_sdpa": Preset(
        Convention(mask_with_causal="error", masked_nan="poisons", padded_queries="computed"),
        _RUN + "torch 2.13.0, scaled_dot_product_attention on the CPU",
        "causal top-left; dead rows give 0; a boolean mask or a float one, and is_causal beside it in some backends; no lse"),
    "torch_mha": Preset(
        Convention(mask="drop", dead_out="nan", dead_grad="undefined", masked_nan="poisons", mask_with_causal="error",
                   mask_shape="full", dropout="after"),
        _RUN + "torch 2.13.0, nn.MultiheadAttention with need_weights=True",
        "with need_weights=False dead rows give 0 instead, in the fast path of eval NaN again"),
    "torch_flex": Preset(
        Convention(masked_nan="poisons"),
        _RUN + "torch 2.13.0, flex_attention, uncompiled, on the CPU",
        "no backward on the CPU; masks and biases are functions"),
    "jax": Preset(
        Convention(layout="BLHD", lse_layout="BLH", dead_out="mean_v", dead_lse="fill", dead_grad="leak", dlse="ignored",
                   masked_nan="poisons", float64="float32"),
        _RUN + "jax 0.10.2, jax.nn.dot_product_attention on the CPU",
        "masked scores are 0.7 finfo.min: a dead row is the mean of V; the softmax is computed in float32"),
    "onnx23": Preset(
        Convention(softcap="after_mask", masked_nan="poisons", scale_on="both"),
        _READ + "onnx 1.18 to 1.20, Attention-23 before pull request 7867",
        "the softcap stood behind the mask and gave masked keys a weight"),
    "onnx25": Preset(
        Convention(mask_shape="full", no_limit="-1", masked_nan="poisons", scale_on="both"),
        _RUN + "onnx 1.23.2, the reference evaluator's Attention of opset 25",
        "q and k are each multiplied by the root of the scale; a last axis of size 1 of a mask is filled up, not broadcast"),
    "onnxruntime": Preset(
        Convention(mask_shape="full", masked_nan="poisons", scale_on="both", float64="float32"),
        _RUN + "onnxruntime 1.32.0, Attention of opset 24 on the CPU",
        "a scale above 0 only; float64 is expanded, with the root of the scale in float32"),
    "flash2": Preset(
        Convention(causal="bottom_right", no_limit="-1", layout="BLHD", dead_lse="+inf", dlse="ignored", masked_nan="poisons"),
        _READ + "Dao-AILab/flash-attention 0251105a, flash_attn_interface.py and csrc/flash_attn/src/softmax.h",
        "alibi_slopes for a bias; windows inclusive, -1 = no limit"),
    "flash4": Preset(
        Convention(causal="bottom_right", layout="BLHD", masked_nan="poisons"),
        _READ + "Dao-AILab/flash-attention 0251105a, flash_attn/cute", "lse counts the sink; dlse is used"),
    "flashinfer": Preset(
        Convention(causal="bottom_right", layout="BLHD", lse="log2", softcap="after_bias", alibi="signed",
                   masked_nan="poisons"),
        _READ + "flashinfer-ai/flashinfer fb28d724", "no backward; the base of lse has depended on the backend"),
    "mlx": Preset(
        Convention(causal="bottom_right", dead_out="mean_v", dead_grad="undefined", scale_on="q", alibi="abs_top_left",
                   masked_nan="poisons"),
        _READ + "ml-explore/mlx 846d1762, fast.scaled_dot_product_attention", "scale has no default"),
    "cudnn": Preset(
        Convention(window="total", scale="none", alibi="signed"),
        _READ + "NVIDIA/cudnn-frontend 3929da2, fp16_ref.py", "the left bound of a window is exclusive"),
    "hf_eager": Preset(
        Convention(mask_shape="full", window="total", dead_out="mean_v", dead_grad="undefined", masked_nan="poisons",
                   mask_with_causal="error", dropout="after", float64="float32"),
        _RUN + "transformers 5.24.0, eager_attention_forward with a mask of finfo.min",
        "masks are finfo.min, added: a dead row is the mean of V, and its gradient reaches q, k and v"),
    "xformers": Preset(
        Convention(layout="BLHD", window="total", dead_out="nan", dead_grad="undefined", scale_on="q", masked_nan="poisons"),
        _READ + "facebookresearch/xformers ca6d2aa and meta-pytorch/MSLK, mslk/attention/fmha",
        "masks are objects; its tests avoid dead rows"),
    "keras": Preset(
        Convention(mask_shape="full", layout="BLHD", dead_out="mean_v", dead_grad="undefined", masked_nan="poisons"),
        _READ + "keras-team/keras 3, MultiHeadAttention and pull request 23040",
        "use_causal_mask has been dropped beside dropout and returned scores"),
}  # fmt: skip


def suggestion(name: str, names: Iterable[str]) -> str:
    """For an error message: the known name that is nearest to a misspelt one."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse(text: str) -> Convention:
    """``PRESET``, ``field=value,field=value``, or both: ``flash2,lse=log2``."""
    convention = Convention()
    for i, part in enumerate(p.strip() for p in text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            if i and name in PRESETS:
                raise ValueError(f"convention: {name!r} behind a field, expected it first: a preset, then what differs from it")
            if i or name not in PRESETS:
                meant = suggestion(name, PRESETS)
                raise ValueError(f"convention: {name!r}{meant}, expected one of {', '.join(PRESETS)}, or field=value")
            convention = PRESETS[name].convention
        elif name not in FIELDS:
            raise ValueError(f"convention: no field {name!r}{suggestion(name, FIELDS)}, expected one of {', '.join(FIELDS)}")
        else:
            convention = dataclasses.replace(convention, **{name: value})
    return convention
