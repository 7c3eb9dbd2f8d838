"""How problems of attention are drawn: one table of options and one of families of inputs.

An option changes the sizes of a problem or adds an argument to it. The families of inputs are those of docs/error-model.md:
with inputs from N(0, 1) alone, most differences between implementations do not show.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npattn.ops import masks
from npattn.ops.biases import Alibi, RelativeTable
from npattn.ops.checks import Array
from npattn.verify.op import Op, Problem

Rng = np.random.Generator


@dataclass
class Part:
    """One of the masks that together make the mask: as a mask of npattn, and as a keyword argument with the same meaning."""

    mask: Any
    keyword: str = "mask"
    value: Any = True
    align: str | None = None  # of causal and window, where L and S differ


class Draft:
    """A problem that is being made: its options set first sizes, then arguments."""

    def __init__(self, rng: Rng, sizes: dict[str, int], lead: tuple[int, ...]) -> None:
        self.rng, self.sizes, self.lead, self.heads = rng, dict(sizes), lead, True
        self.parts: list[Part] = []
        self.options: dict[str, Any] = {}
        self.lse = False

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def normal(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape)

    def scores(self) -> tuple[int, ...]:
        return (*self.lead, *([self["H"]] if self.heads else []), self["L"], self["S"])

    def form(self, axes: str) -> tuple[int, ...]:
        """The shape of an array over pairs with size 1 in all axes but these of B H L S; of L and S alone it has rank 2."""
        L, S = self["L"], self["S"]
        if not self.heads or axes in ("LS", "L", "S"):
            return (L if "L" in axes else 1, S if "S" in axes else 1)
        lead = self.lead if "B" in axes else (1,) * len(self.lead)
        return (*lead, self["H"] if "H" in axes else 1, L if "L" in axes else 1, S if "S" in axes else 1)

    def positions(self, letter: str, top: int) -> Array:
        return np.sort(self.rng.integers(0, top, (*self.lead, self[letter])))


@dataclass(frozen=True)
class Option:
    feature: str
    apply: Callable[[Draft], None]
    shape: bool = False  # it changes sizes, and is applied before the others
    excludes: frozenset[str] = frozenset()  # features with which it cannot be combined; EXCLUSIONS says why


# Why options exclude a feature.
EXCLUSIONS = {
    "bias": "there is one bias",
    "rank": "there is one rank, and rank 2 has one head",
    "grouped heads": "rank 2 has one head",
    "L > S": "L is above S or below it",
    "L < S": "L is above S or below it",
}

OPTIONS: dict[str, Option] = {}


def option(
    name: str, feature: str, *, shape: bool = False, excludes: Iterable[str] = ()
) -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    """Register a function as the option with that name."""

    def register(apply: Callable[[Draft], None]) -> Callable[[Draft], None]:
        OPTIONS[name] = Option(feature, apply, shape, frozenset(excludes))
        return apply

    return register


def compatible(a: str, b: str) -> bool:
    """Whether two options can be in one call."""
    return OPTIONS[b].feature not in OPTIONS[a].excludes and OPTIONS[a].feature not in OPTIONS[b].excludes


@option("rank 2", "rank", shape=True, excludes=["rank", "grouped heads"])
def _(d: Draft) -> None:
    d.lead, d.heads = (), False
    d.sizes |= {"H": 1, "G": 1}


@option("rank 5", "rank", shape=True, excludes=["rank"])
def _(d: Draft) -> None:
    d.lead = (3, 2)


@option("G < H", "grouped heads", shape=True)
def _(d: Draft) -> None:
    d.sizes["H"] = 2 * d["G"]


@option("E != D", "E != D", shape=True)
def _(d: Draft) -> None:
    d.sizes["E"] = d["D"] + 3


@option("L > S", "L > S", shape=True, excludes=["L < S"])
def _(d: Draft) -> None:
    d.sizes |= {"L": d["S"] + 2, "S": d["L"]}


@option("L < S", "L < S", shape=True, excludes=["L > S"])
def _(d: Draft) -> None:
    d.sizes["S"] += 3


@option("mask array", "mask")
def _(d: Draft) -> None:
    d.parts.append(Part(d.rng.random(d.form("BLS")) < 0.7))


@option("causal top_left", "causal")
def _(d: Draft) -> None:
    d.parts.append(Part(masks.causal(align="top_left"), "causal", True, "top_left"))


@option("causal bottom_right", "causal")
def _(d: Draft) -> None:
    d.parts.append(Part(masks.causal(align="bottom_right"), "causal", True, "bottom_right"))


@option("causal by positions", "causal")
def _(d: Draft) -> None:
    top = d["S"] + d["L"]
    d.parts.append(Part(masks.causal(d.positions("L", top) + d["S"] // 2, d.positions("S", top))))


@option("window", "window")
def _(d: Draft) -> None:
    sides = (max(1, d["S"] // 3), max(1, d["S"] // 5))
    d.parts.append(Part(masks.window(*sides, align="top_left"), "window", sides, "top_left"))


@option("key_lengths", "key_lengths")
def _(d: Draft) -> None:
    n = d.rng.integers(max(1, d["S"] // 2), d["S"] + 1, d.lead)
    d.parts.append(Part(masks.key_lengths(n), "key_lengths", n))


@option("query_lengths", "query_lengths")
def _(d: Draft) -> None:
    d.parts.append(Part(masks.query_lengths(d.rng.integers(max(1, d["L"] // 2), d["L"] + 1, d.lead))))


@option("keys", "keys")
def _(d: Draft) -> None:
    d.parts.append(Part(masks.keys(d.rng.random((*d.lead, d["S"])) < 0.7)))


@option("segments", "segments")
def _(d: Draft) -> None:
    ids = (np.sort(d.rng.integers(0, 2, (*d.lead, d[n]))) for n in "LS")
    d.parts.append(Part(masks.segments(*ids)))


@option("packed", "packed")
def _(d: Draft) -> None:
    q, k = ([0, int(d.rng.integers(1, d[n])), d[n]] for n in "LS")
    d.parts.append(Part(masks.packed(q, k, align="bottom_right")))


@option("blocks", "blocks")
def _(d: Draft) -> None:
    size = (max(1, d["L"] // 3), max(1, d["S"] // 3))
    counts = (-(-d["L"] // size[0]), -(-d["S"] // size[1]))
    d.parts.append(Part(masks.blocks(d.rng.random(counts) < 0.75, size)))


@option("where", "where")
def _(d: Draft) -> None:
    d.parts.append(Part(masks.where(lambda i, j: (i + 2 * j) % 5 != 1)))


BIAS_FORMS = ("LS", "L", "S", "BHLS", "HLS", "BLS", "BHS", "BHL", "BS", "H")


def _bias(axes: str) -> Callable[[Draft], None]:
    def apply(d: Draft) -> None:
        d.options["bias"] = d.normal(*d.form(axes))

    return apply


for _axes in BIAS_FORMS:
    OPTIONS[f"bias {_axes}"] = Option("bias", _bias(_axes), excludes=frozenset(["bias"]))


@option("Alibi", "bias", excludes=["bias"])
def _(d: Draft) -> None:
    d.options["bias"] = Alibi(d.rng.uniform(0.1, 0.6, d["H"]), align="bottom_right")


@option("RelativeTable", "bias", excludes=["bias"])
def _(d: Draft) -> None:
    d.options["bias"] = RelativeTable(d.normal(9, d["H"]), lambda r: np.clip(r, -4, 4) + 4, align="bottom_right")


@option("negative scale", "scale")
def _(d: Draft) -> None:
    d.options["scale"] = -0.75 * d["D"] ** -0.5


@option("softcap", "softcap")
def _(d: Draft) -> None:
    d.options["softcap"] = 1.5


@option("sink", "sink")
def _(d: Draft) -> None:
    d.options["sink"] = d.normal(d["H"])


@option("dropout_mask", "dropout")
def _(d: Draft) -> None:
    d.options["dropout_mask"] = (d.rng.random(d.scores()) >= 0.25) / 0.75


@option("dlse", "dlse")
def _(d: Draft) -> None:
    d.lse = True


# --- families of inputs -------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[Rng, Array, Array, Array], tuple[Array, Array, Array]]] = {
    "normal": lambda rng, q, k, v: (q, k, v),
    "x5": lambda rng, q, k, v: (5 * q, 5 * k, 5 * v),  # logits of standard deviation 25
    "x30": lambda rng, q, k, v: (30 * q, 30 * k, 30 * v),  # logits of standard deviation 900: one key has all the weight
    "tiny": lambda rng, q, k, v: (1e-3 * q, 1e-3 * k, 1e-3 * v),  # near-uniform weights
    "tiniest": lambda rng, q, k, v: (1e-20 * q, 1e-20 * k, 1e-20 * v),  # products underflow in float32
    "one-hot": lambda rng, q, k, v: (40 * _own_keys(k, q.shape), 40 * k, v),
    "V mean": lambda rng, q, k, v: (q, k, v + 1e4),
    "K mean": lambda rng, q, k, v: (q, k + 100, v),
    "near-tie": lambda rng, q, k, v: (100 * q, 10 * _near_ties(rng, k), v),
    "constant V": lambda rng, q, k, v: (q, k, np.full_like(v, 1 / 3)),
}


def _own_keys(k: Array, shape: tuple[int, ...]) -> Array:
    """Queries that are equal to keys: query i of head h is key i of its group; where L > S, again, a little longer."""
    again, i = np.divmod(np.arange(shape[-2]), max(k.shape[-2], 1))
    rows = np.take(k, i, axis=-2) * (1 + again / 100)[:, None]
    return np.repeat(rows, shape[-3] // k.shape[-3], axis=-3) if len(shape) > 2 else rows


def _near_ties(rng: Rng, k: Array) -> Array:
    """Every second key is a copy of its neighbour plus noise of size 1e-3."""
    k, half = k.copy(), k.shape[-2] // 2
    k[..., 1 : 2 * half : 2, :] = k[..., : 2 * half : 2, :] + 1e-3 * rng.standard_normal((*k.shape[:-2], half, k.shape[-1]))
    return k


# --- problems --------------------------------------------------------------------------------------------------------------

SMALL = {"H": 3, "G": 3, "L": 4, "S": 6, "D": 5, "E": 5}  # for derivatives of each element
MEDIUM = {"H": 3, "G": 3, "L": 37, "S": 53, "D": 16, "E": 16}
LONG = {"H": 2, "G": 2, "L": 300, "S": 1100, "D": 32, "E": 32}  # more than one tile of any kernel, and not a multiple of it


def draw(
    options: Iterable[str], seed: int | list[int], *, sizes: dict[str, int] = SMALL, lead: tuple[int, ...] = (2,),
    family: str = "normal", dtype: Any = np.float64, choice: bool = True,
) -> Problem:  # fmt: skip
    """A problem with these options.

    choice : draw it until some query sees two keys and keeps one: else most gradients are 0
    """
    chosen = [OPTIONS[name] for name in options]
    for attempt in range(100):
        rng = np.random.default_rng([attempt, *(seed if isinstance(seed, list) else [seed])])
        d = Draft(rng, sizes, lead)
        for o in sorted(chosen, key=lambda o: not o.shape):
            o.apply(d)
        if d.parts and choice and not _leaves_a_choice(d):
            continue
        heads, groups = ([d["H"]], [d["G"]]) if d.heads else ([], [])
        q = d.normal(*d.lead, *heads, d["L"], d["D"])
        k, v = (d.normal(*d.lead, *groups, d["S"], d[n]) for n in "DE")
        q, k, v = FAMILIES[family](rng, q, k, v)
        dlse = {"dlse": d.normal(*q.shape[:-1])} if d.lse else {}
        problem = problem_of(q, k, v, d.normal(*q.shape[:-1], v.shape[-1]), d.options | ({"mask": d.parts} if d.parts else {}))
        problem.cotangents |= dlse
        return problem.astype(dtype)
    raise ValueError(f"draw: the options {list(options)} leave no query two keys to choose from")


def problem_of(
    q: Array, k: Array, v: Array, dout: Array, options: dict[str, Any] | None = None, **cotangents: Array
) -> Problem:
    """A problem of attention. The option ``mask``, if there is one, is a list of `Part`."""
    return Problem(Op.known["attention"], {"q": q, "k": k, "v": v}, options or {}, {"dout": dout, **cotangents})


def parts_of(problem: Problem) -> list[Part]:
    """The parts of the mask; a pair is allowed if all of them allow it."""
    found: list[Part] = problem.options.get("mask", [])
    return found


def arguments(problem: Problem) -> dict[str, Any]:
    """The options as `npattn.attention_forward` takes them: the parts of the mask become one mask of npattn."""
    parts = parts_of(problem)
    if not parts:
        return problem.options
    return {**problem.options, "mask": parts[0].mask if len(parts) == 1 else _together(parts)}


def dense_mask(problem: Problem) -> Array:
    """The parts of the mask as one boolean array."""
    return _dense(parts_of(problem), problem.shape)


def _together(parts: list[Part]) -> Any:
    return functools.reduce(operator.and_, (masks.as_mask("mask", part.mask) for part in parts))


def _dense(parts: list[Part], shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(_together(parts).bind(shape).dense(), shape)


def options_as_arrays(problem: Problem) -> dict[str, Any]:
    """The options for a function that takes arrays alone: the mask as one boolean array."""
    return {**problem.options, "mask": dense_mask(problem)} if parts_of(problem) else problem.options


def _leaves_a_choice(d: Draft) -> bool:
    seen = _dense(d.parts, d.scores())
    kept = seen if "dropout_mask" not in d.options else seen & (d.options["dropout_mask"] != 0)
    return bool(((seen.sum(-1) >= 2) & kept.any(-1)).any())
