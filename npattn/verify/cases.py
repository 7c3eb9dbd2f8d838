"""What is tested: one table of options and one of cases, for our tests, for ``npattn verify`` and for benchmarks alike.

An option changes the sizes of a problem or adds an argument to it. A case is a named set of options on inputs of a family;
drawn with a seed it is a `Problem`. The families are those of docs/error-model.md: N(0, 1) alone hides most differences.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npattn.ops import masks
from npattn.ops.allowed import quiet
from npattn.ops.attention import attention_backward, attention_forward
from npattn.ops.biases import Alibi, RelativeTable
from npattn.ops.checks import Array
from npattn.verify.errors import predict
from npattn.verify.precision import Precision, round_to
from npattn.verify.stages import exact

Rng = np.random.Generator


@dataclass
class Part:
    """One conjunct of the mask: a mask of npattn, and the keyword argument that says the same."""

    mask: Any
    keyword: str = "mask"
    value: Any = True
    align: str | None = None  # of causal and window, where L and S differ


@dataclass
class Truth:
    """What is right, by tensor, in a precision above the candidate's, and the error that is predicted for the candidate's."""

    values: dict[str, Array]
    sigma: dict[str, Array]
    rest: dict[str, Array] = field(default_factory=dict)  # what the values leave, where no dtype holds them
    bound: Callable[[], dict[str, Array]] = dict  # computes det

    @functools.cached_property
    def det(self) -> dict[str, Array]:
        """The rigorous bound, by tensor."""
        return self.bound()


EXACT = 40_000  # elements of the scores up to which mpmath is used, where long double is no better than float64


def better(dtype: Any) -> Any:
    """A dtype in which the truth about ``dtype`` can be computed, or None where this machine has none."""
    if np.dtype(dtype) != np.float64:
        return np.float64
    return np.longdouble if np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant else None


@dataclass
class Problem:
    """The inputs, options and cotangents of one attention."""

    op = "attention"
    outputs = ("out", "lse")

    q: Array
    k: Array
    v: Array
    dout: Array
    dlse: Array | None
    parts: list[Part]
    options: dict[str, Any]  # all but the mask, as npattn takes them

    @property
    def mask(self) -> Any:
        """The parts as one mask of npattn."""
        whole = None
        for part in self.parts:
            whole = part.mask if whole is None else masks.as_mask("mask", part.mask) & whole
        return whole

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `npattn.attention_forward`."""
        return self.options if not self.parts else {"mask": self.mask, **self.options}

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., H, L, S)"""
        return (*self.q.shape[:-1], self.k.shape[-2])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.q.dtype

    @property
    def inputs(self) -> dict[str, Array]:
        return {"q": self.q, "k": self.k, "v": self.v}

    @property
    def cotangents(self) -> dict[str, Array]:
        return {"dout": self.dout} | ({} if self.dlse is None else {"dlse": self.dlse})

    @property
    def gradients(self) -> tuple[str, ...]:
        return ("dq", "dk", "dv", *(f"d{n}" for n in ("bias", "sink") if n in self.options))

    def letters(self, tensor: str) -> str:
        """The axes of an output or gradient."""
        return {"out": "BHLE", "lse": "BHL", "dq": "BHLD", "dk": "BGSD", "dv": "BGSE", "dbias": "BHLS", "dsink": "H"}[tensor]

    def dtypes(self, tensor: str, precision: Precision) -> list[Any]:
        """In which dtypes a tensor may come back."""
        own = {"dbias": self.options.get("bias"), "dsink": self.options.get("sink")}.get(tensor)
        first = own.dtype if isinstance(own, np.ndarray) else self.dtype
        return [first] if first == precision.dtype else [first, precision.dtype]

    @quiet
    def truth(self, precision: Precision) -> Truth | None:
        """What the dense reference says, and sigma for ``precision``; None where nothing better than its dtype is at hand."""
        dtype = better(self.dtype)
        if dtype is None and (importlib.util.find_spec("mpmath") is None or math.prod(self.shape) > EXACT):
            return None
        p = self.astype(dtype or self.dtype)
        (out, lse), cache = attention_forward(p.q, p.k, p.v, **p.arguments, return_lse=True)
        g = attention_backward(p.dout, cache, p.dlse)
        values = {"out": out, "lse": lse, "dq": g.q, "dk": g.k, "dv": g.v, "dbias": g.bias, "dsink": g.sink}
        values = {name: x for name, x in values.items() if isinstance(x, np.ndarray)}

        def predicted(rigorous: bool) -> dict[str, Array]:
            errors = predict(cache, out, p.dout, p.dlse, g, precision=precision, rigorous=rigorous)
            return {name: getattr(errors, name if name in ("out", "lse") else name[1:]) for name in values}

        sigma, bound = predicted(False), quiet(lambda: predicted(True))
        if dtype is None:
            given = dict(self.options) | ({"mask": dense_mask(self)} if self.parts else {})
            high, rest = exact(self, given)
            return Truth({n: high[n] for n in values}, sigma, rest, bound)
        return Truth(values, sigma, bound=bound)

    @quiet
    def overflows(self, precision: Precision) -> bool:
        """Whether scores or dP are stored in float16 and do not fit."""
        if precision.storage != "float16":
            return False
        largest, top = float(np.finfo(np.float16).max), 0.0
        if precision.dweights:
            top = np.abs(self.dout.astype(np.float64)).sum(-1).max(initial=0.0) * np.nanmax(np.abs(self.v), initial=0.0)
        bias = self.options.get("bias")
        if precision.scores and isinstance(bias, np.ndarray):
            top = max(top, float(np.abs(np.where(np.isfinite(bias), bias, 0)).max(initial=0.0)))
        return bool(np.isfinite(top) and top > largest)

    def stored(self, precision: Precision) -> Problem:
        """The same with inputs that the storage of ``precision`` holds: float16 as it is, other formats in float32."""
        if precision.storage in ("float32", "float64"):
            return self.astype(precision.dtype)

        def held(x: Array) -> Array:
            if x.dtype.kind != "f":
                return x
            low = round_to(x.astype(np.float32), precision.storage)
            return np.where(np.isfinite(low) | ~np.isfinite(x), low, x)  # an option that would overflow stays

        p = self.astype(np.float32)
        options = {n: (held(x) if isinstance(x, np.ndarray) else x) for n, x in p.options.items()}
        q, k, v, dout = (held(x) for x in (p.q, p.k, p.v, p.dout))
        low = Problem(q, k, v, dout, p.dlse, p.parts, options)
        if precision.storage == "float16":
            low.q, low.k, low.v, low.dout = (x.astype(np.float16) for x in (low.q, low.k, low.v, low.dout))
        return low

    def astype(self, dtype: Any) -> Problem:
        """All floating arrays in another dtype."""

        def cast(x: Any) -> Any:
            if hasattr(x, "with_parameter"):
                return x.with_parameter(cast(x.parameter))
            return x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind in "fc" else x

        options = {name: cast(x) for name, x in self.options.items()}
        q, k, v, dout, dlse = (cast(x) for x in (self.q, self.k, self.v, self.dout, self.dlse))
        return Problem(q, k, v, dout, dlse, self.parts, options)


class Draft:
    """A problem while its options are put together: sizes, then arguments."""

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
        """The shape of an array over pairs that varies along these axes only, in the order B H L S; "LS" has rank 2."""
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
    shape: bool = False  # changes sizes: comes before the others
    excludes: frozenset[str] = frozenset()  # features that it cannot stand beside: EXCLUSIONS says why


# Features that no call can have twice or side by side, and why.
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
    """Register a function as the option of that name."""

    def register(apply: Callable[[Draft], None]) -> Callable[[Draft], None]:
        OPTIONS[name] = Option(feature, apply, shape, frozenset(excludes))
        return apply

    return register


def compatible(a: str, b: str) -> bool:
    """Whether two options can stand in one call."""
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
    "x30": lambda rng, q, k, v: (30 * q, 30 * k, 30 * v),  # and of 900: one key has all the weight
    "tiny": lambda rng, q, k, v: (1e-3 * q, 1e-3 * k, 1e-3 * v),  # near-uniform weights
    "tiniest": lambda rng, q, k, v: (1e-20 * q, 1e-20 * k, 1e-20 * v),  # products underflow in float32
    "one-hot": lambda rng, q, k, v: (40 * _own_keys(k, q.shape), 40 * k, v),
    "V mean": lambda rng, q, k, v: (q, k, v + 1e4),
    "K mean": lambda rng, q, k, v: (q, k + 100, v),
    "near-tie": lambda rng, q, k, v: (100 * q, 10 * _near_ties(rng, k), v),
    "constant V": lambda rng, q, k, v: (q, k, np.full_like(v, 1 / 3)),
}


def _own_keys(k: Array, shape: tuple[int, ...]) -> Array:
    """Queries that are keys themselves: query i of head h is key i (mod S) of its group."""
    rows = np.take(k, np.arange(shape[-2]) % k.shape[-2], axis=-2)
    return np.repeat(rows, shape[-3] // k.shape[-3], axis=-3) if len(shape) > 2 else rows


def _near_ties(rng: Rng, k: Array) -> Array:
    """Every second key is its neighbour, moved by 1e-3."""
    k, half = k.copy(), k.shape[-2] // 2
    k[..., 1 : 2 * half : 2, :] = k[..., : 2 * half : 2, :] + 1e-3 * rng.standard_normal((*k.shape[:-2], half, k.shape[-1]))
    return k


# --- problems and cases -------------------------------------------------------------------------------------------------

SMALL = {"H": 3, "G": 3, "L": 4, "S": 6, "D": 5, "E": 5}  # every letter of another size, for derivatives element by element
MEDIUM = {"H": 3, "G": 3, "L": 37, "S": 53, "D": 16, "E": 16}
LONG = {"H": 2, "G": 2, "L": 300, "S": 1100, "D": 32, "E": 32}  # more than one tile of any kernel, and no multiple of one


def draw(
    options: Iterable[str], seed: int | list[int], *, sizes: dict[str, int] = SMALL, lead: tuple[int, ...] = (2,),
    family: str = "normal", dtype: Any = np.float64,
) -> Problem:  # fmt: skip
    """A problem with these options. Drawn again until some query may see two keys, not both dropped: else all is zero."""
    chosen = [OPTIONS[name] for name in options]
    for attempt in range(100):
        rng = np.random.default_rng([attempt, *(seed if isinstance(seed, list) else [seed])])
        d = Draft(rng, sizes, lead)
        for o in sorted(chosen, key=lambda o: not o.shape):
            o.apply(d)
        heads, groups = ([d["H"]], [d["G"]]) if d.heads else ([], [])
        q = d.normal(*d.lead, *heads, d["L"], d["D"])
        k, v = (d.normal(*d.lead, *groups, d["S"], d[n]) for n in "DE")
        q, k, v = FAMILIES[family](rng, q, k, v)
        dlse = d.normal(*q.shape[:-1]) if d.lse else None
        problem = Problem(q, k, v, d.normal(*q.shape[:-1], v.shape[-1]), dlse, d.parts, d.options)
        if not d.parts or _leaves_a_choice(problem):
            return problem.astype(dtype)
    raise ValueError(f"draw: the options {list(options)} leave no query two keys to choose from")


def dense_mask(problem: Problem) -> Array:
    """The parts of the mask as one boolean array."""
    return np.broadcast_to(masks.as_mask("mask", problem.mask).bind(problem.shape).dense(), problem.shape)


def _leaves_a_choice(problem: Problem) -> bool:
    seen = dense_mask(problem)
    kept = seen if "dropout_mask" not in problem.options else seen & (problem.options["dropout_mask"] != 0)
    return bool(((seen.sum(-1) >= 2) & kept.any(-1)).any())


@dataclass(frozen=True)
class Case:
    """One row of the table: what is drawn, and which features it speaks for."""

    name: str
    options: tuple[str, ...] = ()
    family: str = "normal"
    sizes: dict[str, int] = field(default_factory=lambda: MEDIUM)
    lead: tuple[int, ...] = (2,)
    dtype: str = "float32"
    twist: str = ""  # an edge of TWISTS
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


def _dead_rows(p: Problem) -> Problem:
    """Queries 1 and the last see nothing: query 1 by one mask, the last only where two masks meet."""
    i, j = np.arange(p.shape[-2])[:, None], np.arange(p.shape[-1])
    first, second = (i != 1) & ((i < p.shape[-2] - 1) | (j % 2 == 0)), (i < p.shape[-2] - 1) | (j % 2 == 1)
    p.parts += [Part(first), Part(second)]
    return p


def _every_row_dead(p: Problem) -> Problem:
    p.parts.append(Part(np.zeros(p.shape[-2:], bool)))
    return p


def _nan_behind_mask(p: Problem) -> Problem:
    """NaN and inf in the last third of the keys and values, which no query may see."""
    S = p.shape[-1]
    seen = np.arange(S) < S - S // 3
    p.parts.append(Part(np.broadcast_to(seen, p.shape[-2:]).copy()))
    p.k[..., ~seen, :] = np.nan
    p.v[..., ~seen, :] = np.inf
    return p


def _nan_later(p: Problem) -> Problem:
    """NaN in the last key and value, which only the last query may see."""
    p.parts.append(Part(masks.causal(align="bottom_right"), "causal", True, "bottom_right"))
    p.k[..., -1, :] = np.nan
    p.v[..., -1, :] = np.nan
    return p


def _nan_in_dead_query(p: Problem) -> Problem:
    """NaN in a query that may see nothing, and in its cotangent."""
    p.parts.append(Part(np.broadcast_to(np.arange(p.shape[-2])[:, None] != 1, p.shape[-2:]).copy()))
    p.q[..., 1, :] = np.nan
    p.dout[..., 1, :] = np.nan
    return p


def _minus_infinity(p: Problem) -> Problem:
    """A bias of -inf is a mask: some pairs, and all of query 1."""
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
    """NaN in one value and inf in another, which the queries may see that do not stand before them; the keys are finite."""
    p.parts.append(Part(masks.causal(align="bottom_right"), "causal", True, "bottom_right"))
    S = p.shape[-1]
    p.v[..., S - 2, :] = np.nan
    p.v[..., S - 5, 0] = np.inf
    return p


def _key_of_nan(p: Problem) -> Problem:
    """NaN in one key, which every second query may see; the values are finite."""
    i, j = np.arange(p.shape[-2])[:, None], np.arange(p.shape[-1])
    p.parts.append(Part((i % 2 == 0) | (j != 3)))
    p.k[..., 3, :] = np.nan
    return p


def _query_of_nan(p: Problem) -> Problem:
    """NaN in one query of the first head, which sees all keys: its row is NaN, and no other."""
    p.q[:, 0, 2] = np.nan
    return p


def _row_dropped(p: Problem) -> Problem:
    """Everything of one query is dropped: its output is 0."""
    p.options["dropout_mask"][..., 1, :] = 0
    return p


def _small_dout(p: Problem) -> Problem:
    p.dout *= 1e-6
    return p


def _heads_inside(p: Problem) -> Problem:
    """Views of arrays (B, L, H, D), as projections give them."""

    def transposed(x: Array) -> Array:
        return np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -3, -2)), -3, -2)

    p.q, p.k, p.v, p.dout = (transposed(x) for x in (p.q, p.k, p.v, p.dout))
    return p


def _no_sink(p: Problem) -> Problem:
    """A sink of -inf is none; that of the other heads is finite."""
    p.options["sink"] = np.where(np.arange(p.shape[-3]) == 1, -np.inf, p.options["sink"]).astype(p.q.dtype)
    return p


def _lengths_from_zero(p: Problem) -> Problem:
    """One sequence without keys, and one with all of them."""
    n = np.array([0, p.shape[-1]])
    p.parts.append(Part(masks.key_lengths(n), "key_lengths", n))
    return p


def _query_lengths_from_zero(p: Problem) -> Problem:
    """One sequence without queries, and one with all of them."""
    p.parts.append(Part(masks.query_lengths(np.array([0, p.shape[-2]]))))
    return p


def _narrow_masks(p: Problem) -> Problem:
    """A mask of one row for all queries, as a tokenizer gives it, and its axes of size 1 left to the candidate."""
    allowed = np.arange(p.shape[-1]) % 4 != 1
    p.parts.append(Part(allowed.reshape((1,) * (len(p.shape) - 1) + (-1,))))
    return p


def _column_mask(p: Problem) -> Problem:
    """A mask of one column for all keys: whole queries see nothing."""
    p.parts.append(Part((np.arange(p.shape[-2]) % 4 != 1)[:, None]))
    return p


def _sides(left: int | None, right: int | None) -> Callable[[Problem], Problem]:
    def twist(p: Problem) -> Problem:
        p.parts.append(Part(masks.window(left, right, align="top_left"), "window", (left, right), "top_left"))
        return p

    return twist


def _far_below_mask(p: Problem) -> Problem:
    """Scores of -1e5 beside what is masked: a sentinel of -1e4 would outweigh them."""
    p.options["bias"] = np.full((1,) * len(p.shape), -1e5, p.q.dtype)
    p.parts.append(Part(masks.causal(align="top_left"), "causal", True, "top_left"))
    return p


def _farther_below_mask(p: Problem) -> Problem:
    """Scores of -1e10 beside what is masked: so would -1e9. Only float64 can tell such scores apart."""
    p.options["bias"] = np.full((1,) * len(p.shape), -1e10, p.q.dtype)
    p.parts.append(Part(np.arange(p.shape[-1]) + 0 * np.arange(p.shape[-2])[:, None] != 2))
    return p


def _option(name: str, value: float) -> Callable[[Problem], Problem]:
    def twist(p: Problem) -> Problem:
        p.options[name] = value
        return p

    return twist


def _mask_of_each_head(p: Problem) -> Problem:
    p.parts.append(Part(np.random.default_rng(1).random((1, *p.shape[1:])) < 0.7))
    return p


def _window_at_the_end(p: Problem) -> Problem:
    """A window that ends with the last query at the last key."""
    p.parts.append(Part(masks.window(17, 10, align="bottom_right"), "window", (17, 10), "bottom_right"))
    return p


def _sinks_far_off(p: Problem) -> Problem:
    """A sink far above all scores, and one far below."""
    p.options["sink"] = np.resize([200.0, -200.0, 0.5], p.shape[-3]).astype(p.q.dtype)
    return p


def _dlse_alone(p: Problem) -> Problem:
    """No gradient from above but that of lse."""
    p.dout[...] = 0
    return p


def _strided(p: Problem) -> Problem:
    """Read-only views with strides: transposed, every second element, one element for all."""

    def transposed(x: Array) -> Array:
        return np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -3, -2)), -3, -2)

    p.q, p.k = transposed(p.q), np.repeat(p.k, 2, axis=-2)[..., ::2, :]
    p.v = np.broadcast_to(p.v[:1], p.v.shape)
    p.dout = np.broadcast_to(p.dout[..., :1, :], p.dout.shape)
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
    "layout BLHD": _heads_inside,
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
    """As many queries as keys, mostly causal: the commonest call there is. And what follows with a cache: a token, a few."""
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
    """Widths between the powers of two, which kernels round up, each for its own buffers."""
    cases = [Case(f"D = {n}", sizes=_sized(D=n, E=n), feature="head widths") for n in (8, 40, 72, 80, 96, 104, 112)]
    cases.append(Case("D = 192, E = 128", sizes=_sized(D=192, E=128), feature="head widths"))
    for n, more in ((72, ()), (96, ("G < H",)), (104, ("sink",))):
        title = " + ".join([f"D = {n}, causal, L = S", *more])
        cases.append(Case(title, ("causal top_left", *more), sizes=_sized(L=53, D=n, E=n), feature="head widths"))
    return cases


def _whole_tiles() -> list[Case]:
    """What kernels ask for that take nothing else: D = 64, and lengths that 64 divides. Each option on it."""
    sizes = {"H": 2, "G": 2, "L": 64, "S": 128, "D": 64, "E": 64}
    together = ((), ("mask array",), ("causal bottom_right",), ("window",), ("key_lengths",), ("bias BHLS",), ("softcap",),
                ("sink",), ("dropout_mask",), ("dlse",), ("G < H",),
                ("G < H", "causal bottom_right", "key_lengths"))  # fmt: skip
    return [Case(" + ".join(["whole tiles, D = 64", *more]), more, sizes=sizes, feature="whole tiles") for more in together]


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
    together: list[tuple[str, dict[str, int], tuple[str, ...]]] = [  # a path of its own that forgets an option
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
    """Random sets of options that can stand together, for a deeper run; every second one on inputs of a hard family."""
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
        except ValueError:  # masks that leave no choice
            continue
        found.append(case)
    return found
