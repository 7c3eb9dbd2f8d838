"""Problems of multi-head attention: the named cases, and the space of calls from which `npattn verify` draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.ops.multihead import MultiHeadParams
from npattn.ops.norms import NormParams
from npattn.ops.positions import LinearScaling, Rotary
from npattn.verify.op import Op, Problem
from npattn.verify.ops.layers import BATCH, MASKS, SIZES, Rng, case, normal, space, weight
from npattn.verify.space import Row, Sizes, sizes_of


def _heads(
    rng: Rng, *, B: int = 2, L: int = 11, S: int = 11, M: int = 24, Mk: int = 0, Mv: int = 0, H: int = 4, G: int = 0,
    D: int = 6, E: int = 0, out: int = 0, biases: str = "qkvo", inputs: float = 1.0, mask: str = "", twist: str = "",
    options: tuple[str, ...] = (), norms: str = "", rotary: str = "", positions: str = "",
) -> Problem:  # fmt: skip
    """A problem of multi-head attention. A size of 0 is derived from the others, as in the paper: Mk = M, G = H, E = D."""
    Mk, Mv, G, E, out = Mk or M, Mv or Mk or M, G or H, E or D, out or M
    x = {"x_q": inputs * normal(rng, B, L, M), "x_k": inputs * normal(rng, B, S, Mk), "x_v": inputs * normal(rng, B, S, Mv)}
    sizes = {"q": (M, H * D), "k": (Mk, G * D), "v": (Mv, G * E), "o": (H * E, out)}
    params: dict[str, Any] = {f"w_{n}": weight(rng, *shape) for n, shape in sizes.items()}
    params |= {f"b_{n}": 0.5 * normal(rng, sizes[n][1]) for n in biases}
    given: dict[str, Any] = {"num_heads": H} | ({"num_kv_heads": G} if G != H else {})
    if norms:  # who does not take their eps does not take them
        params |= {f"{n}_norm": NormParams(1 + 0.3 * normal(rng, D)) for n in norms}
        given["norm_eps"] = 1e-3
    if rotary:
        given["rotary"] = ROTARY[rotary](D)
    if positions or (rotary and L != S):
        at = POSITIONS[positions or "from 0"](rng, B, L, S)
        given |= {n: x for n, x in zip(("q_pos", "k_pos"), at, strict=True) if rotary}
    if mask:
        given["mask"] = MASKS[mask](rng, (B, H, L, S))
    for name in options:
        given[name.split()[0]] = OPTIONS[name](rng, (B, H, L, S))
    if twist:
        TWISTS[twist](x)
    return Problem(Op.known["multi_head"], {**x, "params": MultiHeadParams(**params)}, given, {"dout": normal(rng, B, L, out)})


ROTARY: dict[str, Callable[[int], Rotary]] = {  # of this D; the base is small, so that all pairs turn
    "half": lambda D: Rotary("half", width=D - 1 if D % 2 else None, base=100.0),
    "interleaved": lambda D: Rotary("interleaved", width=D - 1 if D % 2 else None, base=100.0),
    "width": lambda D: Rotary("half", width=2 * max(1, D // 4), base=100.0),
    "scaled": lambda D: Rotary("interleaved", width=D - 1 if D % 2 else None, base=500.0, scaling=LinearScaling(2.0)),
}  # fmt: skip


def _of_each_sequence(rng: Rng, B: int, L: int, S: int) -> tuple[Array, Array]:
    """Keys anywhere, with gaps; the last query stands at the last key."""
    k = rng.integers(0, 50, (B, 1)) + np.cumsum(rng.integers(1, 3, (B, S)), -1)
    return k[:, -1:] - np.arange(L)[::-1] * np.arange(1, B + 1)[:, None], k


POSITIONS: dict[str, Callable[[Rng, int, int, int], tuple[Array, Array]]] = {
    "from 0": lambda rng, B, L, S: (np.arange(L), np.arange(S)),
    "at the end": lambda rng, B, L, S: (np.arange(S - L, S), np.arange(S)), "of each sequence": _of_each_sequence,
}  # fmt: skip

OPTIONS: dict[str, Callable[[Rng, tuple[int, ...]], Any]] = {
    "bias": lambda rng, n: normal(rng, 1, *n[1:]),
    "bias (L, S)": lambda rng, n: normal(rng, *n[2:]),
    "scale": lambda rng, n: 0.3,
    "softcap": lambda rng, n: 1.5,
    "sink": lambda rng, n: normal(rng, n[1]),
    "dropout_mask": lambda rng, n: (rng.random(n) >= 0.25) / 0.75,
}


def _nan_behind(x: dict[str, Array]) -> None:
    S = x["x_k"].shape[1]
    x["x_k"][:, S - S // 3 :] = np.nan
    x["x_v"][:, S - S // 3 :] = np.inf


def _nan_in_dead_query(x: dict[str, Array]) -> None:
    x["x_q"][:, 1] = np.nan


def _nan_later(x: dict[str, Array]) -> None:
    x["x_k"][:, -1] = np.nan


TWISTS: dict[str, Callable[[dict[str, Array]], None]] = {
    "one array": lambda x: x.update(x_k=x["x_q"], x_v=x["x_q"]), "NaN behind the mask": _nan_behind,
    "NaN in a dead query": _nan_in_dead_query, "NaN seen later": _nan_later,
}  # fmt: skip


_case = partial(case, "multi_head", _heads)
CASES = [
    _case("plain"),
    _case("self-attention", "plain", twist="one array"),
    _case("no biases", "biases", biases=""),
    *(_case(f"{', '.join(f'b_{n}' for n in some)} alone", "biases", biases=some) for some in ("o", "qkv", "q", "v")),
    _case("cross-attention", L=7, S=13),
    _case("memory of another width", "input widths", S=13, Mk=17),
    _case("x_v of another width", "input widths", S=13, Mk=17, Mv=20),
    _case("M_out of another width", "output width", out=19),
    _case("E != D", E=9),
    _case("H D != M", "head widths", D=5),
    _case("grouped heads", G=2),
    _case("G = 1", "grouped heads", G=1),
    _case("grouped heads, G > H / G", "grouped heads", H=6, G=3, D=4),
    _case("grouped heads + mask + E != D", "grouped heads", G=2, E=9, mask="mask", S=13),
    _case("mask", mask="mask"),
    _case("mask (L, S)", "mask", mask="mask (L, S)", S=13),
    _case("mask of each head", "mask", mask="mask of each head"),
    _case("mask of keys", "mask", mask="mask of keys", L=7, S=13),
    _case("causal", mask="causal"),
    _case("causal, self-attention", "causal", mask="causal", twist="one array"),
    _case("causal, L < S", "causal", mask="causal", L=7),
    _case("causal, L > S", "dead rows", mask="causal", S=7),
    _case("dead rows", mask="dead rows"),
    _case("dead rows, no b_o", "dead rows", mask="dead rows", biases="qkv"),
    _case("dead rows, grouped heads", "dead rows", mask="dead rows", G=2),
    _case("every row dead", "dead rows", mask="every row dead"),
    _case("NaN behind the mask", "NaN containment", mask="last third", twist="NaN behind the mask"),
    _case("NaN in a dead query", "NaN containment", mask="dead query 1", twist="NaN in a dead query"),
    _case("NaN seen later", "NaN containment", mask="causal", twist="NaN seen later"),
    _case("bias", options=("bias",)),
    _case("bias (L, S)", "bias", options=("bias (L, S)",), S=13),
    _case("scale", options=("scale",)),
    _case("softcap", options=("softcap",)),
    _case("sink", options=("sink",)),
    _case("dead rows + sink", "sink", options=("sink",), mask="dead rows"),
    _case("dropout_mask", "dropout", options=("dropout_mask",)),
    _case("everything", G=2, E=9, S=13, Mk=17, Mv=20, out=19, mask="mask",
                     options=("bias", "scale", "softcap", "sink", "dropout_mask")),
    _case("norms of q and k", "norms", norms="qk"),
    *(_case(f"norm of {n} alone", "norms", norms=n) for n in "qk"),
    *(_case(f"rotary, {n}", "rotary", rotary=n) for n in ROTARY),
    *(_case(f"rotary, positions {n}", "rotary", rotary="half", positions=n, L=7, S=11) for n in POSITIONS),
    _case("rotary, positions of each sequence, L = S", "rotary", rotary="interleaved", positions="of each sequence"),
    _case("norms + rotary", "norms", norms="qk", rotary="half"),
    _case("norms + rotary + grouped heads + causal", "norms", norms="qk", rotary="half", G=2, mask="causal", biases=""),
    _case("norms + rotary + E != D + NaN behind the mask", "NaN containment", norms="qk", rotary="interleaved", E=9,
          mask="last third", twist="NaN behind the mask"),
    _case("norms + rotary + dead rows", "dead rows", norms="qk", rotary="half", mask="dead rows"),
    _case("norms + rotary, H = L", "norms", norms="qk", rotary="half", B=3, H=4, L=4, S=4),
    _case("B = 1", "small sizes", B=1),
    _case("H = 1", "small sizes", H=1, D=24),
    _case("L = 1", "small sizes", L=1),
    _case("S = 1", "small sizes", S=1),
    _case("L = S = 1", "small sizes", L=1, S=1),
    _case("D = 1", "small sizes", D=1, H=24),
    _case("H = L = B", "small sizes", B=4, L=4, S=4),
    _case("inputs x5", "hard inputs", inputs=5.0),
    _case("inputs tiny", "hard inputs", inputs=1e-3),
    _case("M = 96", "long", M=96, H=8, D=12, L=33, S=47),
    _case("long", "long", L=130, S=150, B=1),
    _case("float64", dtype="float64"),
    _case("float64 mask + grouped heads", "float64", dtype="float64", mask="mask", G=2),
    _case("float64 dead rows", "float64", dtype="float64", mask="dead rows"),
]  # fmt: skip



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
    turned = row.get("rotary", "none") != "none" or row.get("positions", "counted") != "counted"
    if turned and row.get("D") == "1":
        return False
    if row.get("positions", "counted") != "counted" and row.get("rotary") == "none":
        return False
    few_keys = row.get("S") == "1" or (as_l and row.get("L") == "1")
    few_queries = row.get("L") in ("1", "2 or 3") and mask in ("dead rows", "NaN in a dead query")
    return not (few_keys and mask != "none") and not few_queries and (mask == "none" or row.get("S") not in ("1", "2 or 3"))


def _cost(n: Sizes) -> float:
    L, S, M, D, H, E = (n.get(letter, 1) for letter in ("L", "S", "M", "D", "H", "E"))
    return n.get("B", 1) * (H * (L * S * max(D, 16) / 16 + (L + S) * (D + E)) + (L + S) * M * H * max(D, E) / 64)


_names = ("mask", "mask (L, S)", "mask of each head", "mask of keys", "causal", "dead rows")
_masks = {name: {"mask": name} for name in _names}
_masks["NaN behind it"] = {"mask": "last third", "twist": "NaN behind the mask"}
_masks["NaN in a dead query"] = {"mask": "dead query 1", "twist": "NaN in a dead query"}
SPACE = space(
    "multi_head", _heads,
    {"B": sizes_of("B", BATCH), "heads": {name: ({"H": H, "G": G},) for name, (H, G) in HEADS.items()},
     "L": sizes_of("L", SIZES), "S": {"as L": ({"S": "L"},), **sizes_of("S", SIZES)}, "M": sizes_of("M", SIZES),
     "Mk": {"as M": ({"Mk": "M"},), "17": ({"Mk": 17},), "64": ({"Mk": 64},)},
     "Mv": {"as M": ({"Mv": "M"},), "20": ({"Mv": 20},)}, "out": {"as M": ({"out": "M"},), "19": ({"out": 19},)},
     "D": sizes_of("D", {"6": (6,), "1": (1,), "odd": (3, 5, 7), "8 or 16": (8, 16), "32": (32,), "64": (64,)}),
     "E": {"as D": ({"E": "D"},), "other": ({"E": lambda sizes: sizes["D"] + 3},)}},
    {"mask": {"none": {}, **_masks},
     "biases": {"all": {}, "none": {"biases": ""}, "b_o": {"biases": "o"}, "b_q, b_k, b_v": {"biases": "qkv"},
                "b_v": {"biases": "v"}},
     "option": {"none": {}, **{name: {"options": (name,)} for name in ("bias", "bias (L, S)", "scale", "softcap", "sink",
                                                                       "dropout_mask")},
                "all": {"options": ("bias", "scale", "softcap", "sink", "dropout_mask")}},
     "norms": {"none": {}, "both": {"norms": "qk"}, "q": {"norms": "q"}, "k": {"norms": "k"}},
     "rotary": {"none": {}, **{name: {"rotary": name} for name in ROTARY}},
     "positions": {"counted": {}, **{name: {"positions": name} for name in POSITIONS}},
     "inputs": {"normal": {}, "one array": {"twist": "one array"}, "x5": {"inputs": 5.0}, "tiny": {"inputs": 1e-3}}},
    _cost, _possible,
)  # fmt: skip
