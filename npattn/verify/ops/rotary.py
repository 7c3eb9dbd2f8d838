"""The record of rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.ops.positions import LinearScaling, Llama3Scaling, Rotary, rotary_backward, rotary_forward
from npattn.tolerances import ANGLE_ROUNDINGS, GOOD_MAX, MATCH_MAX, ROUNDING_STD
from npattn.verify.op import Op, Pair, Problem, Values
from npattn.verify.ops.layers import BATCH, SIZES, LayerCalls, Mistake, Rng, case, changes, normal, space, zero
from npattn.verify.precision import round_to
from npattn.verify.search import Explanation, Hypothesis, Search, joined
from npattn.verify.space import Row, sizes_of
from npattn.verify.stages import by_noise, no_inner_rounding

LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"scaling": LinearScaling(4.0)}, "Llama 3": {"scaling": LLAMA3, "base": 500000.0},
}  # fmt: skip


def _several(rng: Rng, B: int, L: int) -> Array:
    """One row a sequence: they begin anywhere, and have gaps."""
    return rng.integers(0, 2000, (B, 1)) + np.cumsum(rng.integers(1, 4, (B, L)), -1)


POSITIONS: dict[str, Callable[[Rng, int, int], Array]] = {
    "0 to L - 1": lambda rng, B, L: np.arange(L), "after a prefix": lambda rng, B, L: 1234 + np.arange(L),
    "of each sequence": _several, "padded in front": lambda rng, B, L: np.maximum(np.arange(L) - np.arange(B)[:, None] % L, 0),
    "at random": lambda rng, B, L: rng.integers(-5000, 5000, (B, L)),
    "around 1e6": lambda rng, B, L: 10**6 + np.arange(L),
}  # fmt: skip


def _turned(
    rng: Rng, *, shape: tuple[int, ...] = (2, 3, 7, 16), layout: str = "half", positions: str = "0 to L - 1", size: float = 1.0,
    nan: bool = False, part: float = 0.0, **options: Any,
) -> Problem:  # fmt: skip
    """part : the share of the columns that is turned; 0: all, no width is given. nan : the last token, and dy of the first"""
    x, dy, (L, D) = size * normal(rng, *shape), size * normal(rng, *shape), shape[-2:]
    p = POSITIONS[positions](rng, shape[0] if len(shape) == 4 else 1, L)
    if nan:
        x[..., -1, :], dy[..., 0, :] = np.nan, np.nan
    if part:
        options["width"] = 2 * max(1, round(part * D / 2))
    inputs = {"x": x, "positions": p if len(shape) == 4 or p.ndim == 1 else p[0]}
    return Problem(Op.known["rotary"], inputs, {"layout": layout, **options}, {"dy": dy})


_case = partial(case, "rotary", _turned)
IN_BOTH: dict[str, dict[str, Any]] = {
    "width": {"part": 0.5}, "base": {"base": 500000.0}, "of each sequence": {"positions": "of each sequence"},
    "linear scaling": SCALINGS["linear"] | {"positions": "after a prefix"},
    "Llama 3 scaling": SCALINGS["Llama 3"] | {"shape": (2, 2, 5, 64), "positions": "after a prefix"},
}  # fmt: skip
CASES = [
    _case("half"),
    _case("interleaved", layout="interleaved"),
    *(_case(f"{name}, {n}", name, layout=n, **given) for name, given in IN_BOTH.items() for n in ("half", "interleaved")),
    _case("width, a quarter", "width", part=0.25),
    _case("padded in front", "of each sequence", positions="padded in front"),
    _case("at random", "of each sequence", positions="at random"),
    _case("after a prefix", positions="after a prefix"),
    _case("around 1e6", "large positions", positions="around 1e6"),
    _case("around 1e6, interleaved", "large positions", positions="around 1e6", layout="interleaved", base=500000.0),
    *(_case(f"rank {len(n)}", "rank", shape=n) for n in ((7, 16), (3, 7, 16))),
    _case("H = L", "small sizes", shape=(2, 7, 7, 8)),
    _case("B = H = L = D", "small sizes", shape=(6, 6, 6, 6), positions="of each sequence"),
    _case("L = 1", "small sizes", shape=(2, 3, 1, 16), positions="of each sequence"),
    _case("D = 2", "small sizes", shape=(2, 3, 7, 2)),
    _case("x1e10", "hard inputs", size=1e10),
    _case("tiny", "hard inputs", size=1e-20),
    _case("NaN", "NaN containment", nan=True),
    _case("NaN, interleaved", "NaN containment", nan=True, layout="interleaved"),
    _case("no rows", "empty", shape=(2, 3, 0, 16)),
    _case("long", shape=(2, 2, 300, 64), positions="of each sequence", base=500000.0),
    _case("everything", "everything", shape=(3, 2, 5, 64), positions="at random", part=0.75, layout="interleaved",
          **SCALINGS["Llama 3"]),
    _case("everything, half", "everything", shape=(3, 2, 5, 64), positions="at random", part=0.5, **SCALINGS["Llama 3"]),
    _case("float64", dtype="float64"),
    _case("float64 interleaved", "float64", dtype="float64", layout="interleaved", positions="of each sequence"),
    _case("float64 everything", "float64", dtype="float64", shape=(2, 2, 5, 64), part=0.5, positions="at random",
          **SCALINGS["Llama 3"]),
]  # fmt: skip


def _of_sizes(rng: Rng, *, B: int, H: int, L: int, D: int, rank: int = 4, **given: Any) -> Problem:
    return _turned(rng, shape=(B, H, L, D)[4 - rank :], **given)


def _possible(row: Row) -> bool:
    """A base of its own belongs to Llama 3's scaling. NaN is in the last of two tokens or more."""
    if row.get("scaling") == "Llama 3" and row.get("base", "10000") != "10000":
        return False
    return not (row.get("inputs") == "NaN" and row.get("L") == "1")


SPACE = space(
    "rotary", _of_sizes,
    {"B": sizes_of("B", BATCH), "H": sizes_of("H", BATCH), "L": sizes_of("L", SIZES),
     "D": sizes_of("D", {"8 or 16": (8, 16), "2": (2,), "6 or 10": (6, 10), "64": (64,), "80": (80,), "128": (128,)})},
    {"layout": {"half": {}, "interleaved": {"layout": "interleaved"}},
     "width": {"all": {}, **{name: {"part": part} for name, part in (("a half", 0.5), ("a quarter", 0.25), ("3 of 4", 0.75))}},
     "positions": {name: {"positions": name} for name in POSITIONS},
     "base": {"10000": {}, "500000": {"base": 500000.0}, "100": {"base": 100.0}}, "scaling": {"none": {}, **SCALINGS},
     "rank": {"4": {}, "2": {"rank": 2}, "3": {"rank": 3}},
     "inputs": {"normal": {}, "x1e10": {"size": 1e10}, "tiny": {"size": 1e-20}, "NaN": {"nan": True}}},
    lambda n: n.get("B", 1) * n.get("H", 1) * n.get("L", 1) * n.get("D", 1), _possible,
)  # fmt: skip


def reference(p: Problem) -> Values:
    y, cache = rotary_forward(p.inputs["x"], p.inputs["positions"], Rotary(**p.options))
    return {"y": y, "dx": rotary_backward(p.cotangents["dy"], cache).x}


def forward(x: Any) -> None:
    """Equations (1) to (4) of `npattn.ops.positions`. ``order``: the columns of first and second members, the rest."""
    options, given = x.options, x.problem.inputs
    x.input("x", given["x"])
    wide, D = np.longdouble if x.dtype == np.longdouble else np.float64, x.x.shape[-1]
    x.keep("layout", lambda: x.problem.options["layout"])
    x.keep("R", lambda: options.get("width") or D)
    x.keep("base", lambda: wide(options.get("base") or 10000.0))
    x.keep("order", lambda: order_of(x.layout, x.R, D))
    x.keep("exponent", lambda: np.arange(x.R // 2).astype(wide) * 2 / x.R)
    x.keep("f", lambda: x.base**-x.exponent)  # (1)
    x.keep("scaled", lambda: scaled_by(x.f, options.get("scaling")))
    x.keep("positions", lambda: one_a_token(given["positions"], x.x.ndim - 1))
    x.keep("of pair", lambda: np.tile(np.arange(x.R // 2), 2))  # whose angle each turned column has, in that order
    # (2); frequencies and angles are in float64, whatever the inputs are
    x.keep("t", lambda: (x.positions * x.scaled)[None], angle_error)
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        x.rounded(name, lambda function=function: function(x.t)[..., getattr(x, "of pair")])
    x.keep("other", lambda: np.r_[-np.ones(x.R // 2), np.ones(x.R // 2)])  # the sign of the other member of the pair
    x.y = turn(x, "y", x.x, x.cos, x.other * x.sin, x.order)


def backward(x: Any) -> None:
    x.input("dy", x.problem.cotangents["dy"])
    x.keep("sin in the backward", lambda: x.sin)
    h = x.R // 2
    # The sine in the gradient of a column is that with which this column went into its partner.
    x.keep("back", lambda: np.roll(x.other * getattr(x, "sin in the backward"), h, -1))
    x.dx = turn(x, "dx", x.dy, x.cos, x.back, x.order)


def turn(x: Any, name: str, z: Array, cos: Array, sin: Array, order: Array) -> Array:
    """(3) and (4), or their gradient: the column times cos, plus its partner times +-sin."""
    R = cos.shape[-1]
    own = z[..., order[:R]]
    partner = np.roll(own, R // 2, -1)
    direct = x.rounded(f"{name} direct", lambda: own * cos)
    crossed = x.rounded(f"{name} crossed", lambda: np.where(sin == 0, 0, partner * sin))
    turned = x.sum_of_two(f"{name} turned", direct, crossed)
    rest = x.keep(f"{name} rest", lambda: z[..., order[R:]] + np.zeros((len(turned), *(1,) * (z.ndim - 1)), z.dtype))
    back = np.argsort(order)
    return np.asarray(x.keep(name, lambda: np.concatenate([turned, rest], -1)[..., back]))


def angle_error(t: Array) -> Array:
    """That of angles in float64."""
    return np.asarray(ANGLE_ROUNDINGS * ROUNDING_STD * 2.0**-53 * np.abs(t), np.float64)


def one_a_token(positions: Array, ndim: int) -> Array:
    """(L,) or (B, L) as (1, 1, L, 1) or (B, 1, L, 1): the same in all heads."""
    p = positions[..., None] if positions.ndim == 1 else positions[..., None, :, None]
    return p.reshape((1,) * (ndim - p.ndim) + p.shape)


def order_of(layout: str, R: int, D: int) -> Array:
    n = np.arange(R // 2)
    first, second = (n, n + R // 2) if layout == "half" else (2 * n, 2 * n + 1)
    return np.concatenate([first, second, np.arange(R, D)])


def scaled_by(f: Array, scaling: Any, smooth: bool = True) -> Array:
    """Frequencies by their wavelengths, as Llama 3 has it; without the middle they are either slow or fast."""
    if scaling is None or isinstance(scaling, LinearScaling):
        return f if scaling is None else f / scaling.factor
    wave = 8 * np.arctan(f.dtype.type(1)) / f
    low, high, n = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length
    s = (n / wave - low) / (high - low) if smooth else 1.0
    middle = (1 - s) * f / scaling.factor + s * f
    return np.asarray(np.where(wave > n / low, f / scaling.factor, np.where(wave < n / high, f, middle)))


# --- mistakes ---------------------------------------------------------------------------------------------------------------


def _other_layout(x: Any, layout: str) -> str:
    return "interleaved" if layout == "half" else "half"


def _undeclared(x: Any, order: Array) -> Array:
    """What `RotaryCalls` gives in the order of the convention, and the function turns as the problem's own layout has it."""
    D = x.x.shape[-1]
    return order[np.argsort(order_of("interleaved", x.R, D))] if x.layout == "half" else order[order]


def _in(storage: str) -> Callable[[Any, Any], Any]:
    """Positions, frequencies and angles in a smaller format."""

    def low(x: Any, t: Array) -> Array:
        return np.asarray(round_to(round_to(x.positions.astype(np.float64), storage)
                                   * round_to(x.scaled.astype(np.float64), storage), storage)[None], t.dtype)  # fmt: skip

    return low


def _scaling_of(x: Any) -> Any:
    scaling = x.options.get("scaling")
    if scaling is None:
        raise ValueError("no scaling")
    return scaling


def _llama3_of(x: Any) -> Any:
    if not isinstance(_scaling_of(x), Llama3Scaling):
        raise ValueError("another scaling")
    return x.options["scaling"]


def _columns_of_the_other_layout(x: Any, index: Array) -> Array:
    """Angles laid out for the other layout: 0 0 1 1 .. for half, 0 1 .. 0 1 .. for interleaved."""
    columns, h = x.order[: x.R], x.R // 2
    return np.asarray(columns // 2 if x.layout == "half" else columns % h)


def _ends(x: Any, order: Array) -> Array:
    """The last R columns are turned, the first pass."""
    D, R = len(order), x.R
    return np.concatenate([order[:R] + D - R, np.arange(D - R)])


def _by_head(x: Any, p: Array) -> Array:
    if x.x.ndim < 4:
        raise ValueError("no heads")
    return np.arange(x.x.shape[-3])[None, :, None, None]


_MISTAKES: dict[str, Mistake] = {
    # which columns
    "half for interleaved, interleaved for half": {"layout": _other_layout},
    "another layout than rope= says": {"order": _undeclared},
    "angles laid out for the other layout": {"of pair": _columns_of_the_other_layout},
    "all columns turned, whatever the width": {"R": lambda x, R: x.x.shape[-1]},
    "the last columns turned, not the first": {"order": _ends},
    "columns beyond the width lost": {"y rest": zero, "dx rest": zero},
    # frequencies
    "frequencies over D, not the width": {"exponent": lambda x, e: e * x.R / x.x.shape[-1]},
    "i / R for 2 i / R": {"exponent": lambda x, e: e / 2},
    "4 i / R for 2 i / R": {"exponent": lambda x, e: 2 * e},
    "i / (R / 2 - 1) for 2 i / R": {"exponent": lambda x, e: e * (x.R / 2) / max(x.R / 2 - 1, 1)},
    "frequencies begin with i = 1": {"exponent": lambda x, e: e + 2 / x.R},
    "frequencies in reverse order": {"f": lambda x, f: f[::-1]},
    "growing frequencies": {"f": lambda x, f: 1 / f},
    "base 10000, whatever is given": {"base": lambda x, b: b.dtype.type(10000)},
    "scaling forgotten": {"scaled": lambda x, _: x.f},
    "factor multiplied, not divided by": {"scaled": lambda x, _: x.f * _scaling_of(x).factor},
    "Llama 3's scaling without the smooth middle": {"scaled": lambda x, _: scaled_by(x.f, _llama3_of(x), smooth=False)},
    "Llama 3's scaling as a linear one": {"scaled": lambda x, _: x.f / _llama3_of(x).factor},
    "Llama 3's wavelength without 2 pi": {
        "scaled": lambda x, _: scaled_by(x.f * 8 * np.arctan(1.0), _llama3_of(x)) / (8 * np.arctan(1.0))},
    # positions
    "positions begin at 1": {"positions": lambda x, p: p + 1},
    "positions 0 to L - 1, whatever is given": {"positions": lambda x, p: np.arange(x.x.shape[-2])[:, None]},
    "positions of the first sequence": {"positions": lambda x, p: p[:1]},
    "the position is that of the head": {"positions": _by_head},
    "positions counted from the first": {"positions": lambda x, p: p - p[..., :1, :]},
    "positions backwards": {"positions": lambda x, p: p[..., ::-1, :]},
    "positions not negative": {"positions": lambda x, p: np.abs(p)},
    "angles in float32": {"t": _in("float32")},
    "angles in float16": {"t": _in("float16")},
    "angles in bfloat16": {"t": _in("bfloat16")},
    "angles in degrees": {"t": lambda x, t: t * (np.pi / 180)},
    # the turn
    "turned the other way": {"sin": lambda x, s: -s},
    "cosine and sine exchanged": {"cos": lambda x, _: _of(x, np.sin), "sin": lambda x, _: _of(x, np.cos)},
    "minus sign missing": {"other": lambda x, s: np.abs(s)},
    "cosine alone": {"sin": zero},
    "cosine and sine in bfloat16": {n: lambda x, v: np.asarray(round_to(v.astype(np.float64), "bfloat16"), v.dtype)
                                    for n in ("cos", "sin")},
    "not turned at all": {"t": zero},
    # backward
    "the backward turns forwards": {"sin in the backward": lambda x, s: -s},
    "dy as it is": {"dx": lambda x, _: x.dy + 0 * x.y},
    "dy times the cosine alone": {"sin in the backward": zero},
    "no gradient of the columns that pass": {"dx rest": zero},
    "no gradient": {"dx": zero},
    "the backward's positions begin at 1": {
        "dx direct": lambda x, _: x.dy[..., x.order[: x.R]] * np.cos(x.t + x.scaled)[..., getattr(x, "of pair")],
        "back": lambda x, _: -x.other * np.sin(x.t + x.scaled)[..., getattr(x, "of pair")]},
}  # fmt: skip


def _of(x: Any, function: Callable[[Array], Array]) -> Array:
    return np.asarray(function(x.t)[..., getattr(x, "of pair")])


# --- the record -------------------------------------------------------------------------------------------------------------


def _candidate() -> Pair:
    def forward(x: Array, positions: Array, **options: Any) -> Array:
        return rotary_forward(x, positions, Rotary(**options))[0]

    def backward(dy: Array, x: Array, positions: Array, **options: Any) -> Array:
        return rotary_backward(dy, rotary_forward(x, positions, Rotary(**options))[1]).x

    return forward, backward


class RotaryCalls(LayerCalls):
    """A function that does not take ``layout`` has one: that of its convention, ``rope=half`` or ``rope=interleaved``.

    Its inputs are given with their columns in its own order, and what it returns is put back into that of the problem.
    """

    conventions = ("masked_nan", "float64", "rope")

    def arguments(
        self, candidate: Any, problem: Problem, takes: frozenset[str], backward: bool
    ) -> tuple[dict[str, Any], list[str]]:
        given = {n: x for n, x in problem.options.items() if n != "layout" or n in takes}
        return given, [name for name in given if name not in takes]

    def forward(self, candidate: Any, problem: Problem, given: dict[str, Any]) -> Any:
        theirs, own = self._orders(candidate, problem, given)
        y = super().forward(candidate, _with_columns(problem, theirs, own), given)
        return y if own is theirs else _moved(y, own, theirs)

    def backward(self, candidate: Any, problem: Problem, given: dict[str, Any], values: dict[str, Any]) -> Any:
        theirs, own = self._orders(candidate, problem, given)
        found = super().backward(candidate, _with_columns(problem, theirs, own), given, values)
        return found if own is theirs or isinstance(found, str) else {n: _moved(x, own, theirs) for n, x in found.items()}

    def _orders(self, candidate: Any, problem: Problem, given: dict[str, Any]) -> tuple[Array, Array]:
        """The columns in the candidate's layout and in that of the problem: one array if they are the same."""
        D, layout = problem.x.shape[-1], problem.options["layout"]
        R = problem.options.get("width") or D
        own = order_of(layout, R, D)
        same = "layout" in given or layout == candidate.convention.rope
        return own if same else order_of(candidate.convention.rope, R, D), own


def _with_columns(problem: Problem, to: Array, of: Array) -> Problem:
    if to is of:
        return problem
    inputs = problem.inputs | {"x": _moved(problem.inputs["x"], to, of)}
    return Problem(problem.op, inputs, problem.options, {n: _moved(x, to, of) for n, x in problem.cotangents.items()})


def _moved(x: Any, to: Array, of: Array) -> Any:
    """Column of[j] of x becomes column to[j]."""
    if not isinstance(x, np.ndarray) or not x.ndim or x.shape[-1] != len(of):
        return x
    return x[..., of[np.argsort(to)]]


def angles_in_float32(s: Search) -> list[Explanation]:
    """Whether each pair has its length, and is turned too far or not far enough by no more than float32 rounds its angle.

    Which roundings these are depends on how the frequencies are computed, so that no change gives the same numbers.
    """
    p, found = s.problem, list[Explanation]()
    D, wide = p.x.shape[-1], np.float64
    R = p.options.get("width") or D
    order, f = order_of(p.options["layout"], R, D), Rotary(**p.options).frequencies(D)
    t = np.abs(one_a_token(p.positions, p.x.ndim).astype(wide) * f)
    for tensor in s.unexplained:
        values = (s.right_values[tensor], s.got[tensor], s.sigma[tensor])
        z, w, e = (_as_complex(np.asarray(a, wide), order, R) for a in values)
        length = np.abs(np.abs(z) - np.abs(w)) / np.maximum(np.abs(e), 1e-300)
        off = np.abs(np.angle(w * z.conj()))
        allowed = FLOAT32_ANGLE * np.broadcast_to(t, off.shape) + GOOD_MAX * np.abs(e) / np.maximum(np.abs(z), 1e-300)
        known = np.isfinite(off) & (allowed < 1)
        if not np.array_equal(np.isfinite(z), np.isfinite(w)):
            continue
        rest = np.array_equal(s.got[tensor][..., order[R:]], s.right_values[tensor][..., order[R:]], equal_nan=True)
        if known.any() and rest and (off <= allowed)[known].all() and (length[known] <= MATCH_MAX).all():
            rms = float(np.sqrt(np.square(length[known]).mean()))
            found.append(Explanation(("angles in float32",), (tensor,), rms, rounds=True))
    return joined(found)


def _as_complex(x: Array, order: Array, R: int) -> Array:
    return np.asarray(x[..., order[: R // 2]] + 1j * x[..., order[R // 2 : R]])


FLOAT32_ANGLE = 16 * 2.0**-24  # of an angle: the exponent's rounding times the log of the base, at most 14, and 2

ROTARY = Op(
    name="rotary",
    outputs=("y",),
    axes={"y": "BHLD", "dx": "BHLD"},
    reference=reference,
    forward=forward,
    backward=backward,
    truth=by_noise,
    undefined=no_inner_rounding,
    changes=changes(_MISTAKES, ("half for interleaved, interleaved for half", "positions begin at 1", "turned the other way",
                                "the backward turns forwards")),
    cases=CASES,
    candidates={"rotary": _candidate},
    calls=RotaryCalls(
        "forward(x, positions, *, layout, width, base, scaling) and backward(dy, x, positions, *, layout, ...)",
        ("layout", "width", "base", "scaling"),
    ),
    space=SPACE,
    more_hypotheses=(Hypothesis("angles are rounded", "nothing more", angles_in_float32),),
)  # fmt: skip
