"""The cases of attention: one table for the tests, for ``npattn verify`` and for the benchmarks.

A case is a named set of options, with inputs of a family, and for some cases a twist. Drawn with a seed it gives a `Problem`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from npattn.ops import masks
from npattn.ops.checks import Array
from npattn.verify.op import Problem
from npattn.verify.ops.attention.draw import FAMILIES, LONG, MEDIUM, OPTIONS, Part, compatible, draw


def add_mask(p: Problem, mask: Any, keyword: str = "mask", value: Any = True, align: str | None = None) -> Problem:
    """The same problem, which gets one more mask."""
    p.options["mask"] = [*p.options.get("mask", []), Part(mask, keyword, value, align)]
    return p


@dataclass(frozen=True)
class Case:
    """One row of the table: what is drawn, and which features it tests."""

    op: ClassVar[str] = "attention"
    name: str
    options: tuple[str, ...] = ()
    family: str = "normal"
    sizes: dict[str, int] = field(default_factory=lambda: MEDIUM)
    lead: tuple[int, ...] = (2,)
    dtype: str = "float32"
    twist: str = ""  # a name in TWISTS: a special change of the problem
    feature: str = ""

    @property
    def features(self) -> list[str]:
        named = [OPTIONS[o].feature for o in self.options] + ([self.feature] if self.feature else [])
        return list(dict.fromkeys(named)) or ["plain"]

    def problem(self, seed: int = 0) -> Problem:
        p = draw(
            self.options, [seed, *self.name.encode()], sizes=self.sizes, lead=self.lead, family=self.family, dtype=self.dtype
        )
        return TWISTS[self.twist](p) if self.twist else p

    def smaller(self) -> list[Case]:
        """The case with each letter in turn halved, then each lowered by one. Equal sizes H and G, or D and E, change together.

        An axis of size 0 would be another kind of case, so no letter goes below 1.
        """
        sizes, found = dict(self.sizes), list[Case]()
        if len(self.lead) == 1 and self.lead[0] > 1:
            found += [dataclasses.replace(self, lead=(n,)) for n in dict.fromkeys((1, self.lead[0] // 2, self.lead[0] - 1))]
        together = [("H", "G")] if sizes["H"] == sizes["G"] else [("G",)]
        groups = [*together, ("L", "S"), ("L",), ("S",), *([("D", "E")] if sizes["D"] == sizes["E"] else []), ("D",), ("E",)]
        for halve in (True, False):
            for letters in groups:
                new = {**sizes, **{n: min(sizes[n], max(1, sizes[n] // 2)) if halve else sizes[n] - 1 for n in letters}}
                if new != sizes and all(new[letter] >= 1 for letter in letters):
                    found.append(dataclasses.replace(self, sizes=new))
        return found


def _dead_rows(p: Problem) -> Problem:
    """Query 1 and the last query see no key: query 1 by one mask, the last only by two masks together."""
    i, j = np.arange(p.shape[-2])[:, None], np.arange(p.shape[-1])
    first, second = (i != 1) & ((i < p.shape[-2] - 1) | (j % 2 == 0)), (i < p.shape[-2] - 1) | (j % 2 == 1)
    return add_mask(add_mask(p, first), second)


def _every_row_dead(p: Problem) -> Problem:
    return add_mask(p, np.zeros(p.shape[-2:], bool))


def _nan_behind_mask(p: Problem) -> Problem:
    """NaN and inf in the last third of the keys and values, which no query may see."""
    S = p.shape[-1]
    seen = np.arange(S) < S - S // 3
    add_mask(p, np.broadcast_to(seen, p.shape[-2:]).copy())
    p.k[..., ~seen, :] = np.nan
    p.v[..., ~seen, :] = np.inf
    return p


def _nan_later(p: Problem) -> Problem:
    """NaN in the last key and value, which only the last query may see."""
    add_mask(p, masks.causal(align="bottom_right"), "causal", True, "bottom_right")
    p.k[..., -1, :] = np.nan
    p.v[..., -1, :] = np.nan
    return p


def _nan_in_dead_query(p: Problem) -> Problem:
    """NaN in a query that may see nothing, and in its cotangent."""
    add_mask(p, np.broadcast_to(np.arange(p.shape[-2])[:, None] != 1, p.shape[-2:]).copy())
    p.q[..., 1, :] = np.nan
    p.dout[..., 1, :] = np.nan
    return p


def _minus_infinity(p: Problem) -> Problem:
    """A bias of -inf, which masks: for some pairs, and for all of query 1."""
    bias = np.random.default_rng(1).standard_normal(p.shape).astype(p.q.dtype)
    bias[..., ::3] = -np.inf
    bias[..., 1, :] = -np.inf
    p.options["bias"] = bias
    return p


def _far_below(p: Problem) -> Problem:
    """All scores of a row far below any finite sentinel: -1e5 and less."""
    p.options["bias"] = np.full((1,) * len(p.shape), -1e5, p.q.dtype)
    return p


def _nan_seen(p: Problem) -> Problem:
    """NaN in one value and inf in another, which queries at or after their positions may see; the keys are finite."""
    add_mask(p, masks.causal(align="bottom_right"), "causal", True, "bottom_right")
    S = p.shape[-1]
    p.v[..., S - 2, :] = np.nan
    p.v[..., S - 5, 0] = np.inf
    return p


def _key_of_nan(p: Problem) -> Problem:
    """NaN in one key, which every second query may see; the values are finite."""
    i, j = np.arange(p.shape[-2])[:, None], np.arange(p.shape[-1])
    add_mask(p, (i % 2 == 0) | (j != 3))
    p.k[..., 3, :] = np.nan
    return p


def _query_of_nan(p: Problem) -> Problem:
    """NaN in one query of the first head: its row of the output is NaN, and no other row."""
    p.q[:, 0, 2] = np.nan
    return p


def _row_dropped(p: Problem) -> Problem:
    """All weights of one query are dropped: its output is 0."""
    p.options["dropout_mask"][..., 1, :] = 0
    return p


def _small_dout(p: Problem) -> Problem:
    p.cotangents["dout"] *= 1e-6
    return p


def heads_inside(x: Array) -> Array:
    """x as a view of an array (B, L, H, D), as a split into heads gives it; without an axis of heads x itself."""
    return x if x.ndim < 3 else np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -3, -2)), -3, -2)


def in_layout(change: Callable[[Array], Array]) -> Callable[[Problem], Problem]:
    """The same numbers at other places in memory: of the inputs and the cotangent of out."""

    def layout(p: Problem) -> Problem:
        p.inputs = {name: change(x) for name, x in p.inputs.items()}
        p.cotangents["dout"] = change(p.dout)
        return p

    return layout


def _no_sink(p: Problem) -> Problem:
    """A sink of -inf in head 1, which is no sink; the other sinks are finite."""
    p.options["sink"] = np.where(np.arange(p.shape[-3]) == 1, -np.inf, p.options["sink"]).astype(p.q.dtype)
    return p


def _lengths_from_zero(p: Problem) -> Problem:
    """One sequence without keys, and one with all of them."""
    n = np.array([0, p.shape[-1]])
    return add_mask(p, masks.key_lengths(n), "key_lengths", n)


def _query_lengths_from_zero(p: Problem) -> Problem:
    """One sequence without queries, and one with all of them."""
    return add_mask(p, masks.query_lengths(np.array([0, p.shape[-2]])))


def _narrow_masks(p: Problem) -> Problem:
    """A mask of one row for all queries, such as a tokenizer's; the candidate has to broadcast its axes of size 1."""
    allowed = np.arange(p.shape[-1]) % 4 != 1
    return add_mask(p, allowed.reshape((1,) * (len(p.shape) - 1) + (-1,)))


def _column_mask(p: Problem) -> Problem:
    """A mask of one column for all keys: some queries see no key."""
    return add_mask(p, (np.arange(p.shape[-2]) % 4 != 1)[:, None])


def _sides(left: int | None, right: int | None) -> Callable[[Problem], Problem]:
    def twist(p: Problem) -> Problem:
        return add_mask(p, masks.window(left, right, align="top_left"), "window", (left, right), "top_left")

    return twist


def _far_below_mask(p: Problem) -> Problem:
    """Scores of -1e5 and a mask: if masked scores were -1e4, they would outweigh the others."""
    p.options["bias"] = np.full((1,) * len(p.shape), -1e5, p.q.dtype)
    return add_mask(p, masks.causal(align="top_left"), "causal", True, "top_left")


def _farther_below_mask(p: Problem) -> Problem:
    """Scores of -1e10 and a mask: even masked scores of -1e9 would outweigh them. Needs float64 to tell such scores apart."""
    p.options["bias"] = np.full((1,) * len(p.shape), -1e10, p.q.dtype)
    return add_mask(p, np.arange(p.shape[-1]) + 0 * np.arange(p.shape[-2])[:, None] != 2)


def _option(name: str, value: float) -> Callable[[Problem], Problem]:
    def twist(p: Problem) -> Problem:
        p.options[name] = value
        return p

    return twist


def _mask_of_each_head(p: Problem) -> Problem:
    return add_mask(p, np.random.default_rng(1).random((1, *p.shape[1:])) < 0.7)


def _window_at_the_end(p: Problem) -> Problem:
    """A window that is aligned so that the last query stands at the last key."""
    return add_mask(p, masks.window(17, 10, align="bottom_right"), "window", (17, 10), "bottom_right")


def _sinks_far_off(p: Problem) -> Problem:
    """A sink far above all scores, and one far below."""
    p.options["sink"] = np.resize([200.0, -200.0, 0.5], p.shape[-3]).astype(p.q.dtype)
    return p


def _dlse_alone(p: Problem) -> Problem:
    """dout is 0: the only cotangent is that of lse."""
    p.dout[...] = 0
    return p


def _strided(p: Problem) -> Problem:
    """Read-only views with strides: transposed, every second row, broadcast along an axis."""
    p.inputs = {
        "q": heads_inside(p.q), "k": np.repeat(p.k, 2, axis=-2)[..., ::2, :], "v": np.broadcast_to(p.v[:1], p.v.shape),
    }  # fmt: skip
    p.cotangents["dout"] = np.broadcast_to(p.dout[..., :1, :], p.dout.shape)
    for x in (p.q, p.k, p.v, p.dout):
        x.flags.writeable = False
    return p


TWISTS: dict[str, Callable[[Problem], Problem]] = {
    "dead rows": _dead_rows,
    "every row dead": _every_row_dead,
    "NaN behind the mask": _nan_behind_mask,
    "NaN seen later": _nan_later,
    "NaN in a dead query": _nan_in_dead_query,
    "NaN in values that are seen": _nan_seen,
    "NaN in a key that is seen": _key_of_nan,
    "bias of -inf": _minus_infinity,
    "scores of -1e5": _far_below,
    "strided": _strided,
    "layout BLHD": in_layout(heads_inside),
    "NaN in a query": _query_of_nan,
    "dout of 1e-6": _small_dout,
    "a row is dropped": _row_dropped,
    "scores of -1e5 and a mask": _far_below_mask,
    "scores of -1e10 and a mask": _farther_below_mask,
    "mask HLS": _mask_of_each_head,
    "window bottom_right": _window_at_the_end,
    "sinks far off": _sinks_far_off,
    "dlse alone": _dlse_alone,
    "scale 0": _option("scale", 0.0),
    "scale 0.6": _option("scale", 0.6),
    "softcap 0.7": _option("softcap", 0.7),
    "softcap 30": _option("softcap", 30.0),
    "sink of -inf": _no_sink,
    "key_lengths 0 and S": _lengths_from_zero,
    "query_lengths 0 and L": _query_lengths_from_zero,
    "mask of one row": _narrow_masks,
    "mask of one column": _column_mask,
    "window (5, 0)": _sides(5, 0),
    "window (0, 5)": _sides(0, 5),
    "window (None, 2)": _sides(None, 2),
    "window (2, None)": _sides(2, None),
    "window (0, 0)": _sides(0, 0),
}


def _sized(**changes: int) -> dict[str, int]:
    return {**MEDIUM, **changes}


def _self_attention() -> list[Case]:
    """L = S, mostly causal: the commonest call. And decoding with a cache: one query or a few at the end of the keys."""
    square = _sized(L=53)
    together = ((), ("G < H",), ("window",), ("key_lengths",), ("softcap",), ("sink",), ("bias HLS",), ("dropout_mask",),
                ("dlse",), ("G < H", "window", "softcap", "sink"))  # fmt: skip
    cases = [Case("L = S", sizes=square, feature="self-attention")]
    cases += [Case(f"{name}, L = S", (name,), sizes=square, feature="self-attention")
              for name in ("key_lengths", "segments", "dropout_mask")]  # fmt: skip
    cases += [Case(" + ".join(["causal, L = S", *more]), ("causal top_left", *more), sizes=square, feature="self-attention")
              for more in together]  # fmt: skip
    for n, heads, width, more in ((64, 2, 64, ()), (128, 2, 64, ("G < H",)), (256, 1, 128, ()), (1024, 1, 64, ())):
        sizes = {"H": heads, "G": heads, "L": n, "S": n, "D": width, "E": width}
        title = " + ".join([f"causal, L = S = {n}, D = {width}", *more])
        cases.append(Case(title, ("causal top_left", *more), sizes=sizes, lead=(1,), feature="self-attention"))
    for L in (1, 4):
        both = ("causal bottom_right", "G < H")
        cases.append(Case(f"L = {L} + {' + '.join(both)}", both, sizes=_sized(L=L), feature="decoding"))
    cases.append(Case("causal bottom_right + L < S + G < H", ("causal bottom_right", "L < S", "G < H"), feature="decoding"))
    return cases


def _head_widths() -> list[Case]:
    """Head widths between powers of two: kernels round them up, and may do so differently for each buffer."""
    cases = [Case(f"D = {n}", sizes=_sized(D=n, E=n), feature="head widths") for n in (8, 40, 72, 80, 96, 104, 112)]
    cases.append(Case("D = 192, E = 128", sizes=_sized(D=192, E=128), feature="head widths"))
    for n, more in ((72, ()), (96, ("G < H",)), (104, ("sink",))):
        title = " + ".join([f"D = {n}, causal, L = S", *more])
        cases.append(Case(title, ("causal top_left", *more), sizes=_sized(L=53, D=n, E=n), feature="head widths"))
    return cases


def _whole_tiles() -> list[Case]:
    """D = 64 and lengths that are multiples of 64: some kernels take nothing else. Each option with these sizes."""
    sizes = {"H": 2, "G": 2, "L": 64, "S": 128, "D": 64, "E": 64}
    together = ((), ("mask array",), ("causal bottom_right",), ("window",), ("key_lengths",), ("bias BHLS",), ("softcap",),
                ("sink",), ("dropout_mask",), ("dlse",), ("G < H",),
                ("G < H", "causal bottom_right", "key_lengths"))  # fmt: skip
    return [Case(" + ".join(["whole tiles, D = 64", *more]), more, sizes=sizes, feature="whole tiles") for more in together]


def _together() -> list[Case]:
    """Sizes for which kernels have a path of their own, with options that this path may ignore."""
    cases: list[Case] = []
    together: list[tuple[str, dict[str, int], tuple[str, ...]]] = [
        ("L = 1", {"L": 1}, ("bias BHLS", "softcap", "sink")), ("L = 1", {"L": 1}, ("key_lengths", "dropout_mask")),
        ("G = 1", {"G": 1}, ("causal top_left", "bias HLS")), ("G = 1", {"G": 1}, ("window", "softcap")),
        ("D = 64", {"D": 64, "E": 64}, ("causal top_left", "sink")),
        ("D = 128", {"D": 128, "E": 128}, ("mask array", "bias HLS")),
        ("D = 256", {"D": 256, "E": 256}, ("causal top_left",)), ("H = 8", {"H": 8, "G": 2}, ("causal top_left",)),
        ("L = 700", {"L": 700}, ("key_lengths",)), ("", {}, ("window", "softcap", "sink")),
        ("", {}, ("G < H", "window", "bias BHLS")), ("", {}, ("G < H", "key_lengths", "bias HLS", "sink")),
        ("", {}, ("E != D", "key_lengths", "dropout_mask")), ("", {}, ("causal top_left", "window")),
    ]  # fmt: skip
    for size, sizes, both in together:
        title = " + ".join([size] * bool(size) + list(both))
        cases.append(Case(title, both, sizes=_sized(**sizes), feature="together"))
    return cases


def _cases() -> list[Case]:
    cases = [Case("plain")]
    cases += [Case(name, (name,)) for name in OPTIONS if OPTIONS[name].feature != "rank"]
    pairs = [
        ("causal top_left", "L > S"), ("causal bottom_right", "L > S"), ("causal bottom_right", "L < S"),
        ("causal top_left", "G < H"), ("causal bottom_right", "mask array"), ("causal top_left", "key_lengths"),
        ("causal bottom_right", "window"), ("causal top_left", "softcap"), ("causal top_left", "dropout_mask"),
        ("causal top_left", "sink"), ("causal top_left", "dlse"), ("causal top_left", "bias BHLS"),
        ("mask array", "softcap"), ("mask array", "dropout_mask"), ("mask array", "sink"), ("mask array", "dlse"),
        ("mask array", "bias HLS"), ("mask array", "G < H"), ("G < H", "bias HLS"), ("G < H", "sink"),
        ("G < H", "E != D"), ("G < H", "dropout_mask"), ("G < H", "softcap"), ("G < H", "dlse"),
        ("G < H", "key_lengths"), ("softcap", "bias BHLS"), ("softcap", "sink"), ("softcap", "negative scale"),
        ("softcap", "dropout_mask"), ("softcap", "dlse"), ("sink", "dropout_mask"), ("sink", "dlse"),
        ("sink", "bias BLS"), ("dropout_mask", "dlse"), ("dropout_mask", "bias BHLS"), ("bias BHLS", "dlse"),
        ("window", "key_lengths"), ("window", "dlse"), ("E != D", "dlse"), ("E != D", "mask array"),
    ]  # fmt: skip
    cases += [Case(" + ".join(pair), pair) for pair in pairs]
    cases.append(Case("everything", ("G < H", "E != D", "causal bottom_right", "mask array", "bias BHLS", "negative scale",
                                     "softcap", "sink", "dropout_mask", "dlse")))  # fmt: skip
    for family in FAMILIES:
        if family != "normal":
            cases.append(Case(f"inputs {family}", family=family, feature="hard inputs"))
    features = {
        "every row dead": "dead rows", "scores of -1e5": "hard inputs", "strided": "layout", "dead rows": "dead rows",
        "dout of 1e-6": "hard inputs", "a row is dropped": "dropout",
    }  # fmt: skip
    for twist in TWISTS:
        feature = features.get(twist, "NaN containment" if "NaN" in twist else twist.split()[0])
        feature = "hard inputs" if feature == "scores" else feature
        feature = "sink" if feature == "sinks" else feature
        options = {
            "sink of -inf": ("sink",), "sinks far off": ("sink", "dlse"), "dlse alone": ("dlse",),
            "a row is dropped": ("dropout_mask",),
        }.get(twist, ())  # fmt: skip
        cases.append(Case(twist, options, twist=twist, feature=feature, dtype="float64" if "-1e10" in twist else "float32"))
    cases += [
        Case("dead rows + dlse", ("dlse",), twist="dead rows", feature="dead rows"),
        Case("dead rows + sink", ("sink", "dlse"), twist="dead rows", feature="dead rows"),
        Case("dead rows + softcap", ("softcap",), twist="dead rows", feature="dead rows"),
        Case("dead rows + dropout", ("dropout_mask",), twist="dead rows", feature="dead rows"),
        Case("dead rows + G < H", ("G < H",), twist="dead rows", feature="dead rows"),
        Case("dead rows + causal L > S", ("causal bottom_right", "L > S"), feature="dead rows"),
    ]
    for letter in "LS":
        cases.append(Case(f"{letter} = 1", sizes=_sized(**{letter: 1}), feature="small sizes"))
        cases.append(Case(f"{letter} = 0", sizes=_sized(**{letter: 0}), feature="empty"))
    cases.append(Case("B = 0", lead=(0,), feature="empty"))
    cases.append(Case("B = 1, H = 1", lead=(1,), sizes=_sized(H=1, G=1), feature="small sizes"))
    cases.append(Case("B = 3", lead=(3,), feature="small sizes"))
    cases.append(Case("G = 1", sizes=_sized(G=1), feature="grouped heads"))
    cases += [Case(f"inputs x30 + {name}", (name,), family="x30", feature="hard inputs")
              for name in ("mask array", "negative scale", "softcap")]  # fmt: skip
    cases.append(Case("E < D", sizes=_sized(E=11), feature="E != D"))
    cases.append(Case("mask array, L = S", ("mask array",), sizes=_sized(L=53), feature="small sizes"))
    cases.append(Case("whole tiles", sizes=_sized(L=64, S=128), feature="long"))
    cases.append(Case("one more than a tile", sizes=_sized(L=65, S=129), feature="long"))
    cases.append(Case("D = 64", sizes=_sized(D=64, E=64), feature="head widths"))
    cases.append(Case("D = 128", sizes=_sized(D=128, E=128), feature="head widths"))
    cases.append(Case("D = 17", sizes=_sized(D=17, E=17), feature="small sizes"))
    cases += _together()
    for both in (("causal top_left", "sink"), ("key_lengths", "bias BLS", "softcap"), ("dropout_mask", "dlse")):
        cases.append(Case("long " + " + ".join(both), both, sizes=LONG, feature="long"))
    cases.append(Case("H = L", sizes=_sized(H=4, G=4, L=4), feature="small sizes"))
    cases += _self_attention() + _head_widths() + _whole_tiles()
    cases.append(Case("window + sink", ("window", "sink"), feature="together"))
    for twist in ("window (0, 5)", "window (5, 0)"):
        cases.append(Case(f"{twist} + sink", ("sink",), twist=twist, feature="together"))
    for name in ((), ("causal bottom_right",), ("mask array", "G < H"), ("bias BHLS", "softcap", "dlse"), ("window",)):
        cases.append(Case("long " + " + ".join(name) if name else "long", name, sizes=LONG, feature="long"))
    cases.append(Case("long, inputs tiny", sizes={**LONG, "L": 8, "S": 16384}, lead=(1,), family="tiny", feature="long"))
    for name in ((), ("causal bottom_right", "G < H"), ("mask array", "bias BHLS"), ("softcap", "sink", "dlse"),
                 ("dropout_mask",)):  # fmt: skip
        cases.append(Case("float64 " + " + ".join(name) if name else "float64", name, dtype="float64", feature="float64"))
    cases.append(Case("float64, inputs near-tie", family="near-tie", dtype="float64", feature="float64"))
    return cases


CASES = _cases()
BY_NAME = {case.name: case for case in CASES}


def random_cases(seed: int, count: int) -> list[Case]:
    """Random sets of compatible options, for a deeper run; every second case has inputs of a hard family."""
    rng = np.random.default_rng(seed)
    found: list[Case] = []
    hard = [f for f in FAMILIES if f not in ("normal", "tiniest")]
    while len(found) < count:
        chosen: list[str] = []
        for name in rng.permutation([n for n in OPTIONS if OPTIONS[n].feature != "rank"])[: rng.integers(2, 7)]:
            if all(compatible(name, other) for other in chosen):
                chosen.append(str(name))
        family = str(rng.choice(hard)) if len(found) % 2 else "normal"
        name = f"random {len(found)}: {' + '.join(chosen)}" + (f", inputs {family}" if family != "normal" else "")
        case = Case(name, tuple(chosen), family=family)
        try:
            case.problem(seed)
        except ValueError:  # no query would see two keys
            continue
        found.append(case)
    return found
