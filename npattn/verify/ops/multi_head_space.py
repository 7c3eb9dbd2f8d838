"""The space of calls of multi-head attention, from which `npattn verify` draws."""

from __future__ import annotations

from collections.abc import Callable

from npattn.verify.op import Problem
from npattn.verify.ops.layers import BATCH, SIZES, space
from npattn.verify.space import Row, Sizes, Space, sizes_of

HEADS = {"4": (4, 4), "1": (1, 1), "2": (2, 2), "3": (3, 3), "8": (8, 8), "4 / 2": (4, 2), "6 / 2": (6, 2), "3 / 1": (3, 1),
         "8 / 1": (8, 1)}  # fmt: skip


def _possible(row: Row) -> bool:
    """Inputs that are one array have one length and one width. What a mask hides needs two queries, or keys."""
    mask, one = row.get("mask", "none"), row.get("inputs", "normal") == "one array"
    as_l = row.get("S", "as L") == "as L"
    widths = (row.get("Mk", "as M"), row.get("Mv", "as M"))
    if one and (not as_l or widths != ("as M", "as M") or mask.startswith("NaN")):
        return False
    # Tiny inputs have equal weights, so that db_v is a sum of equal terms: their roundings add up and do not average out.
    if row.get("inputs") == "tiny" and row.get("biases") in ("all", "b_q, b_k, b_v", "b_v"):
        return False
    few_keys = row.get("S") == "1" or (as_l and row.get("L") == "1")
    few_queries = row.get("L") in ("1", "2 or 3") and mask in ("dead rows", "NaN in a dead query")
    return not (few_keys and mask != "none") and not few_queries and (mask == "none" or row.get("S") not in ("1", "2 or 3"))


def _cost(n: Sizes) -> float:
    L, S, M, D, H, E = (n.get(letter, 1) for letter in ("L", "S", "M", "D", "H", "E"))
    return n.get("B", 1) * (H * (L * S * max(D, 16) / 16 + (L + S) * (D + E)) + (L + S) * M * H * max(D, E) / 64)


def of(draw: Callable[..., Problem]) -> Space:
    """The space, whose problems are drawn by this function."""
    names = ("mask", "mask (L, S)", "mask of each head", "mask of keys", "causal", "dead rows")
    masks = {name: {"mask": name} for name in names}
    masks["NaN behind it"] = {"mask": "last third", "twist": "NaN behind the mask"}
    masks["NaN in a dead query"] = {"mask": "dead query 1", "twist": "NaN in a dead query"}
    return space(
        "multi_head", draw,
        {"B": sizes_of("B", BATCH), "heads": {name: ({"H": H, "G": G},) for name, (H, G) in HEADS.items()},
         "L": sizes_of("L", SIZES), "S": {"as L": ({"S": "L"},), **sizes_of("S", SIZES)}, "M": sizes_of("M", SIZES),
         "Mk": {"as M": ({"Mk": "M"},), "17": ({"Mk": 17},), "64": ({"Mk": 64},)},
         "Mv": {"as M": ({"Mv": "M"},), "20": ({"Mv": 20},)}, "out": {"as M": ({"out": "M"},), "19": ({"out": 19},)},
         "D": sizes_of("D", {"6": (6,), "1": (1,), "odd": (3, 5, 7), "8 or 16": (8, 16), "32": (32,), "64": (64,)}),
         "E": {"as D": ({"E": "D"},), "other": ({"E": lambda sizes: sizes["D"] + 3},)}},
        {"mask": {"none": {}, **masks},
         "biases": {"all": {}, "none": {"biases": ""}, "b_o": {"biases": "o"}, "b_q, b_k, b_v": {"biases": "qkv"},
                    "b_v": {"biases": "v"}},
         "option": {"none": {}, **{name: {"options": (name,)} for name in ("bias", "bias (L, S)", "scale", "softcap", "sink",
                                                                           "dropout_mask")},
                    "all": {"options": ("bias", "scale", "softcap", "sink", "dropout_mask")}},
         "inputs": {"normal": {}, "one array": {"twist": "one array"}, "x5": {"inputs": 5.0}, "tiny": {"inputs": 1e-3}}},
        _cost, _possible,
    )  # fmt: skip
