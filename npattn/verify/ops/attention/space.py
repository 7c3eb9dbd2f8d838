"""The space of calls of attention, from which `npattn verify` draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from npattn.ops import masks
from npattn.verify.op import Problem
from npattn.verify.ops.attention.cases import TWISTS, add_mask
from npattn.verify.ops.attention.draw import FAMILIES, OPTIONS, draw
from npattn.verify.space import ALIASES, EVERYWHERE, LAYOUTS, Row, Sizes, Space, classes, sizes_of

LENGTHS = {
    "1": (1,), "2 or 3": (2, 3), "small and odd": (5, 7, 9, 11, 15), "prime": (17, 37, 53, 101), "multiple of 8": (8, 24, 40),
    "multiple of 16": (16, 48, 80, 112), "multiple of 64": (64, 192), "multiple of 128": (128, 256),
    "one more than a multiple": (9, 17, 33), "one less than a multiple": (7, 15, 31), "one more than 64": (65, 129),
    "one less than 64": (63, 127),
    "above a tile": (260, 272, 320, 400), "above two tiles": (513, 520, 576, 640),
}  # fmt: skip
WIDTHS = {
    "below 8": (1, 2, 3, 5), "odd": (7, 17, 33), "multiple of 8": (8, 24, 40, 56), "multiple of 16": (16, 48), "32": (32,),
    "64": (64,), "72": (72,), "80": (80,), "96 to 112": (96, 104, 112), "128": (128,), "192": (192,), "256": (256,),
}  # fmt: skip
HEADS = {"1": (1, 1), "2": (2, 2), "3": (3, 3), "8": (8, 8), "2 / 1": (2, 1), "4 / 2": (4, 2), "3 / 1": (3, 1), "6 / 2": (6, 2),
         "4 / 1": (4, 1), "8 / 2": (8, 2), "8 / 1": (8, 1), "16 / 2": (16, 2)}  # fmt: skip
BATCHES: dict[str, tuple[int, ...]] = {"1": (1,), "2": (2,), "3": (3,), "5": (5,), "3 x 2": (3, 2), "rank 2": ()}


def _half_or_one(sizes: Sizes) -> int:
    return max(sizes["D"] // 2, 1)


def _three_more(sizes: Sizes) -> int:
    return sizes["D"] + 3


# --- what a class does to a problem, where it is no option of `draw` ---------------------------------------------------------


def _some_without(letter: str) -> Callable[[Problem], Problem]:
    """The first sequence has no keys, or no queries; the others have all."""

    def twist(p: Problem) -> Problem:
        n = np.full(p.shape[: p.q.ndim - 3], p.shape[-1 if letter == "S" else -2])
        n[(0,) * n.ndim] = 0
        return add_mask(p, masks.key_lengths(n), "key_lengths", n) if letter == "S" else add_mask(p, masks.query_lengths(n))

    return twist


def _of_shape(*sizes: int) -> Callable[[Problem], Problem]:
    """A mask of that many axes, which has all sizes but where 1 is given."""

    def twist(p: Problem) -> Problem:
        shape = [1 if n == 1 else m for n, m in zip(sizes, p.shape[-len(sizes) :], strict=True)]
        seen = np.random.default_rng(3).random(shape) < 0.7
        seen[..., 0] = True
        return add_mask(p, seen)

    return twist


def _all_true(p: Problem) -> Problem:
    return add_mask(p, np.ones(p.shape[-2:], bool))


def _one_hole(p: Problem) -> Problem:
    seen = np.ones(p.shape[-2:], bool)
    seen[-1, seen.shape[1] // 2] = False
    return add_mask(p, seen)


def _rows_left_empty(p: Problem) -> Problem:
    """Every third query and the last one see no key."""
    i = np.arange(p.shape[-2])[:, None]
    return add_mask(p, np.broadcast_to((i % 3 != 1) & (i != p.shape[-2] - 1) | (i == 0), p.shape[-2:]).copy())


def _tiles_left_empty(p: Problem) -> Problem:
    """The first half of the queries see only the last half of the keys: whole tiles are empty."""
    i, j = np.arange(p.shape[-2])[:, None], np.arange(p.shape[-1])
    return add_mask(p, (2 * i >= p.shape[-2]) | (2 * j >= p.shape[-1]))


def _bias(value: float, every: int) -> Callable[[Problem], Problem]:
    """A bias that has this value at every so many keys, else 0 and the like."""

    def twist(p: Problem) -> Problem:
        bias = 0.5 * np.random.default_rng(1).standard_normal(p.shape[-2:]) if value else np.zeros(p.shape[-2:])
        bias[..., 1::every] = value
        p.options["bias"] = bias.astype(p.q.dtype)
        return p

    return twist


def _nothing_dropped(p: Problem) -> Problem:
    p.options["dropout_mask"] = np.ones(p.shape, p.q.dtype)
    return p


def _row_dropped(p: Problem) -> Problem:
    p.options["dropout_mask"][..., -1, :] = 0
    return p


def _sink(*values: float) -> Callable[[Problem], Problem]:
    def twist(p: Problem) -> Problem:
        p.options["sink"] = np.resize(np.array(values), p.shape[-3] if p.q.ndim > 2 else 1).astype(p.q.dtype)
        return p

    return twist


TWISTED: dict[str, tuple[tuple[str, ...], Callable[[Problem], Problem]]] = {
    # mask
    "(L, S)": ((), _of_shape(0, 0)), "(1, S)": ((), _of_shape(1, 0)), "(B, H, L, S)": ((), _of_shape(0, 0, 0, 0)),
    "(1, H, L, S)": ((), _of_shape(1, 0, 0, 0)), "all True": ((), _all_true), "one hole": ((), _one_hole),
    "rows left empty": ((), _rows_left_empty), "tiles left empty": ((), _tiles_left_empty),
    "a sequence without keys": ((), _some_without("S")), "a sequence without queries": ((), _some_without("L")),
    "NaN behind it": ((), TWISTS["NaN behind the mask"]),
    # order
    **{name: ((), TWISTS[name]) for name in ("window (5, 0)", "window (2, None)", "window bottom_right")},
    # bias
    "zeros": ((), _bias(0.0, 1)), "-inf": ((), _bias(-math.inf, 3)), "1e4": ((), _bias(1e4, 5)),
    # other options
    **{name: ((), TWISTS[name]) for name in ("scale 0.6", "scale 0", "softcap 0.7", "softcap 30")},
    "sinks far off": ((), _sink(200.0, -200.0, 0.5)), "sink of -inf": ((), _sink(-math.inf, 0.3)),
    "a row dropped": (("dropout_mask",), _row_dropped), "nothing dropped": ((), _nothing_dropped),
    "dlse alone": (("dlse",), TWISTS["dlse alone"]), "dout of 1e-6": ((), TWISTS["dout of 1e-6"]),
}  # fmt: skip
"""By class: options of `draw`, and what is done to the problem afterwards."""

NAMES = ("mask", "order", "bias", "scale", "softcap", "sink", "dropout", "cotangents")
"""The dimensions of options."""
MASKS = ("mask array", "(L, S)", "(1, S)", "(B, H, L, S)", "(1, H, L, S)", "all True", "one hole", "rows left empty",
         "tiles left empty", "NaN behind it", "key_lengths", "a sequence without keys", "query_lengths",
         "a sequence without queries", "keys", "segments", "packed", "blocks", "where")  # fmt: skip


def _problem(row: Row, sizes: Sizes, seed: list[int]) -> Problem:
    chosen = [row[name] for name in NAMES if row[name] not in ("none", "default", "no", "dout")]
    options = [o for name in chosen for o in ((name,) if name in OPTIONS else TWISTED[name][0])]
    options += ["rank 2"] if row["batch"] == "rank 2" else []
    every = {"H": 1, "G": 1, **sizes}
    if every["H"] % every["G"]:
        raise ValueError(f"{every['H']} heads cannot share {every['G']} key heads")
    given: dict[str, Any] = {"sizes": every, "lead": BATCHES[row["batch"]], "family": row["inputs"], "dtype": row["dtype"]}
    try:
        p = draw(options, seed, **given)
    except ValueError:  # these masks leave no query two keys, as where there are only two
        p = draw(options, seed, **given, choice=False)
    for name in chosen:
        p = TWISTED[name][1](p) if name in TWISTED else p
    return p


def _features(row: Row) -> list[str]:
    """The features of named cases that test the same."""
    found = [OPTIONS[cls].feature for cls in row.values() if cls in OPTIONS]
    found += ["NaN containment"] if row["mask"] == "NaN behind it" else []
    return list(dict.fromkeys([*found, *(["mask"] if row["mask"] != "none" else [])]))


def _possible(row: Row) -> bool:
    """Whether a call can have these classes.

    A call of rank 2 has one head, and has neither axes for a mask of each head nor several sequences. Arrays that are one have
    one shape. Sequences that are packed are two at least.
    """
    batch, heads, mask = row.get("batch", "2"), row.get("heads", "1"), row.get("mask", "none")
    if batch == "rank 2" and (heads != "1" or mask in ("(B, H, L, S)", "(1, H, L, S)")):
        return False
    if mask in ("a sequence without keys", "a sequence without queries") and batch in ("1", "rank 2"):
        return False
    if batch == "3 x 2" and mask in ("(B, H, L, S)", "(1, H, L, S)"):
        return False
    alias, as_l, as_d = row.get("alias", "none"), row.get("S", "as L") == "as L", row.get("E", "as D") == "as D"
    if alias in ("k is q", "one array") and not (as_l and "/" not in heads and row.get("k in memory", "plain") == "plain"):
        return False
    if alias in ("v is k", "one array", "dout is q") and not as_d:
        return False
    if alias in ("v is k", "one array") and row.get("v in memory", "plain") != "plain":
        return False
    given = row.get("dout in memory", "plain"), row.get("cotangents", "dout")
    if alias == "dout is q" and (given[0] != "plain" or given[1] not in ("dout", "dlse")):
        return False
    if mask == "NaN behind it" and (alias != "none" or row.get("calls") == "after others"):
        return False
    in_memory = {cls for name, cls in row.items() if name.endswith("in memory")}
    if batch == "rank 2" and "strides of 0" in in_memory:  # all queries or keys were one, and all their errors
        return False
    # Where all scores of a row are equal, so are their roundings, which then add up and do not average out.
    if row.get("scale") == "scale 0" and row.get("inputs") == "constant V":
        return False
    all_equal = row.get("scale") == "scale 0" or row.get("inputs") == "tiniest"
    if all_equal and (row.get("sink", "no") != "no" or row.get("bias") == "RelativeTable"):  # most keys have one entry of it
        return False
    return mask != "packed" or "1" not in (row.get("L"), row.get("S"))


def _cost(row: Row, sizes: Sizes) -> float:
    """Of the scores, and of inputs and outputs, as measured: long double, for float64, has no fast products."""
    L, S, D, E, H = (sizes.get(letter, 1) for letter in "LSDEH")
    heads = math.prod(BATCHES[row.get("batch", "1")]) * H
    return heads * (L * S * max(D, 64) / 64 + (L + S) * (D + E) / 16) * (12 if row.get("dtype") == "float64" else 1)


SPACE = Space(
    "attention",
    {
        "batch": classes(*BATCHES), "heads": {name: ({"H": H, "G": G},) for name, (H, G) in HEADS.items()},
        "L": sizes_of("L", LENGTHS), "S": {"as L": ({"S": "L"},), **sizes_of("S", LENGTHS)}, "D": sizes_of("D", WIDTHS),
        "E": {"as D": ({"E": "D"},), "less": ({"E": _half_or_one},), "more": ({"E": _three_more},)},
        "mask": classes("none", *MASKS),
        "order": classes("none", "causal top_left", "causal bottom_right", "causal by positions", "window", "window (5, 0)",
                         "window (2, None)", "window bottom_right"),
        "bias": classes("none", "bias LS", "bias BHLS", "bias HLS", "bias BHL", "bias BLS", "bias S", "bias H", "zeros", "-inf",
                        "1e4", "Alibi", "RelativeTable"),
        "scale": classes("default", "negative scale", "scale 0.6", "scale 0"),
        "softcap": classes("no", "softcap", "softcap 0.7", "softcap 30"),
        "sink": classes("no", "sink", "sinks far off", "sink of -inf"),
        "dropout": classes("no", "dropout_mask", "a row dropped", "nothing dropped"),
        "cotangents": classes("dout", "dlse", "dlse alone", "dout of 1e-6"), "inputs": classes(*FAMILIES),
        **{f"{name} in memory": classes(*LAYOUTS) for name in ("q", "k", "v", "dout")}, "alias": classes(*ALIASES),
        **EVERYWHERE,
    },
    {"batch": "2", "heads": "2", "L": "multiple of 64", "S": "as L", "D": "64", "E": "as D", "mask": "none", "order": "none",
     "bias": "none", "scale": "default", "softcap": "no", "sink": "no", "dropout": "no", "cotangents": "dout",
     "inputs": "normal", **{f"{name} in memory": "plain" for name in ("q", "k", "v", "dout")}, "alias": "none",
     "calls": "once", "dtype": "float32"},
    _problem,
    _features,
    _possible,
    _cost,
    triples=("batch", "heads", "L", "S", "D", "E", *NAMES),
    of_backward={"cotangents": ("dlse", "dlse alone", "dout of 1e-6"), "alias": ("dout is q",),
                 "dout in memory": tuple(name for name in LAYOUTS if name != "plain")},
)  # fmt: skip
