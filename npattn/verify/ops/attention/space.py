"""The space of calls of attention, from which `npattn verify --fuzz` draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.op import Problem
from npattn.verify.ops.attention.cases import Case, heads_inside, in_layout
from npattn.verify.ops.attention.draw import FAMILIES
from npattn.verify.space import Row, Space

LENGTHS = {
    "1": (1,), "2 or 3": (2, 3), "small and odd": (5, 7, 9, 11, 15), "prime": (17, 37, 53, 101), "multiple of 8": (8, 24, 40),
    "multiple of 16": (16, 48, 80), "multiple of 64": (64, 192), "multiple of 128": (128, 256),
    "one more than a multiple": (9, 17, 33, 65, 129), "one less than a multiple": (7, 15, 31, 63, 127),
    "above a tile": (300, 520, 700),
}  # fmt: skip
WIDTHS = {
    "below 8": (1, 2, 3, 5), "odd": (7, 17, 33), "multiple of 8": (8, 24, 40, 56), "multiple of 16": (16, 48), "32": (32,),
    "64": (64,), "72 to 112": (72, 80, 96, 104, 112), "128": (128,), "192 or 256": (192, 256),
}  # fmt: skip
HEADS = {"1": (1, 1), "2": (2, 2), "3": (3, 3), "4 / 2": (4, 2), "6 / 2": (6, 2), "8 / 1": (8, 1)}
BATCHES: dict[str, tuple[int, ...]] = {"1": (1,), "2": (2,), "3": (3,), "3 x 2": (3, 2), "rank 2": ()}
MOST = 1 << 18  # scores of a case, times D / 64, and times 8 in float64: about a second of judging
FLAGS = {"scale": "negative scale", "softcap": "softcap", "sink": "sink", "dropout": "dropout_mask", "dlse": "dlse"}


def _read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


def _values_of_the_first(p: Problem) -> Problem:
    """Strides of 0: the first sequence (of rank 2: itself) has the values of all."""
    p.inputs["v"] = np.broadcast_to(p.v[:1], p.v.shape) if p.v.ndim > 2 else p.v
    return p


def _v_is_k(p: Problem) -> Problem:
    p.inputs["v"] = p.k
    return p


LAYOUTS: dict[str, Callable[[Problem], Problem]] = {
    "plain": lambda p: p,
    "heads inside": in_layout(heads_inside),
    "Fortran": in_layout(np.asfortranarray),
    "backwards": in_layout(lambda x: x[..., ::-1, :].copy()[..., ::-1, :]),
    "every second row": in_layout(lambda x: np.repeat(x, 2, axis=-2)[..., ::2, :]),
    "read-only": in_layout(_read_only),
    "strides of 0": _values_of_the_first,
    "v is k": _v_is_k,
}


@dataclass(frozen=True)
class Drawn(Case):
    """A case of the space: its arrays have a layout."""

    layout: str = "plain"

    def problem(self, seed: int = 0) -> Problem:
        return LAYOUTS[self.layout](super().problem(seed))


def possible(row: Row) -> bool:
    """A call of rank 2 has one head. v can only be k if both have one width. A mask has to leave some query two keys."""
    one_head = row.get("batch") != "rank 2" or row.get("heads", "1") == "1"
    one_width = row.get("layout") != "v is k" or row.get("E", "as D") == "as D"
    one_key = row.get("S") == "1" or (row.get("S", "as L") == "as L" and row.get("L") == "1")
    masked = row.get("mask", "none") != "none" or row.get("order", "none") != "none"
    L, D = (min(table.get(row.get(n, ""), (1,))) for n, table in (("L", LENGTHS), ("D", WIDTHS)))
    S = min(LENGTHS.get(row.get("S", ""), (L if row.get("S") == "as L" else 1,)))
    cheap = _cost(row, L, S, D) <= MOST
    return one_head and one_width and cheap and not (one_key and masked)


def _cost(row: Row, L: int, S: int, D: int) -> int:
    pairs = math.prod(BATCHES[row.get("batch", "1")]) * HEADS[row.get("heads", "1")][0] * L * S
    return pairs * max(D, 64) // 64 * (8 if row.get("dtype") == "float64" else 1)


def case(row: Row, number: int, rng: np.random.Generator) -> Drawn | None:
    """Sizes are drawn a few times: masks must leave some query two keys to choose from."""
    options = [row[n] for n in ("mask", "order", "bias") if row[n] != "none"]
    options += [option for name, option in FLAGS.items() if row[name] == "yes"]
    options += ["rank 2"] if row["batch"] == "rank 2" else []
    H, G = HEADS[row["heads"]]
    for _ in range(3):
        L, D = (int(rng.choice(table[row[n]])) for n, table in (("L", LENGTHS), ("D", WIDTHS)))
        S = L if row["S"] == "as L" else int(rng.choice(LENGTHS[row["S"]]))
        if _cost(row, L, S, D) > MOST:  # the smallest of each class are not too large
            L, D = min(LENGTHS[row["L"]]), min(WIDTHS[row["D"]])
            S = L if row["S"] == "as L" else min(LENGTHS[row["S"]])
        E = {"as D": D, "less": max(D // 2, 1), "more": D + 3}[row["E"]]
        about = f"B={row['batch']} H={H} G={G} L={L} S={S} D={D} E={E}"
        more = [f"inputs {row['inputs']}"] * (row["inputs"] != "normal") + [row["layout"]] * (row["layout"] != "plain")
        name = ", ".join([f"drawn {number}: {' + '.join([about, *options])}", *more])
        sizes = {"H": H, "G": G, "L": L, "S": S, "D": D, "E": E}
        found = Drawn(name, tuple(options), row["inputs"], sizes, BATCHES[row["batch"]], row["dtype"], feature="drawn",
                      layout=row["layout"])  # fmt: skip
        try:
            found.problem()
        except ValueError:  # no query would see two keys
            continue
        return found
    return None


SPACE = Space(
    {
        "batch": tuple(BATCHES), "heads": tuple(HEADS), "L": tuple(LENGTHS), "S": ("as L", *LENGTHS), "D": tuple(WIDTHS),
        "E": ("as D", "less", "more"),
        "mask": ("none", "mask array", "key_lengths", "query_lengths", "keys", "segments", "packed", "blocks", "where"),
        "order": ("none", "causal top_left", "causal bottom_right", "causal by positions", "window"),
        "bias": ("none", "bias LS", "bias BHLS", "bias HLS", "bias BHL", "bias S", "bias H", "Alibi", "RelativeTable"),
        **dict.fromkeys(FLAGS, ("no", "yes")), "inputs": tuple(FAMILIES), "layout": tuple(LAYOUTS),
        "dtype": ("float32", "float64"),
    },
    {"batch": "2", "heads": "2", "L": "multiple of 64", "S": "as L", "D": "64", "E": "as D", "mask": "none", "order": "none",
     "bias": "none", **dict.fromkeys(FLAGS, "no"), "inputs": "normal", "layout": "plain", "dtype": "float32"},
    possible,
    case,
)  # fmt: skip
