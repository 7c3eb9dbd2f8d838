"""What the ops other than attention share: how their candidates are called, helpers for changes, drawing and masks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.op import Calls, Case, Change, Problem, Values, parts
from npattn.verify.space import EVERYWHERE, LAYOUTS, Choice, Row, Sizes, Space, classes

Rng = np.random.Generator
Route = Callable[[Array], Array]  # moves, repeats or drops elements, and computes nothing; its backward is `adjoint`
Mistake = dict[str, Callable[[Any, Any], Any]]  # stages of a `Change`


def same(a: Array) -> Array:
    return a


def adjoint(route: Route, shape: tuple[int, ...], g: Array) -> Array:
    """The backward of a route for inputs of this shape: each input element gets the sum of g over its copies."""
    total = np.zeros(int(np.prod(shape)), g.dtype)
    index = route(np.arange(total.size).reshape(shape))
    np.add.at(total, index.ravel(), g.ravel())
    return total.reshape(shape)


def by_sequence(x: Array) -> Array:
    """(..., M) as (B, L, M); one sequence if there is no axis of a batch."""
    B = x.shape[0] if x.ndim > 2 else 1
    return x.reshape(B, math.prod(x.shape[:-1]) // max(B, 1), x.shape[-1])


class LayerCalls(Calls):
    """Inputs and parameters in the order of the forward; gradients as a mapping, or a tuple in the order of the inputs.

    Parameters are a NamedTuple of npattn. If a parameter of the function's signature has a name in ``to``, they are in the
    layout of another library. to : name -> parameters to arguments; back : name -> their gradients to npattn's parameters
    """

    conventions: tuple[str, ...] = ("masked_nan", "float64")

    def __init__(
        self, text: str, keywords: tuple[str, ...], cotangents: tuple[str, ...] = (), *,
        to: Mapping[str, Callable[[Any], list[Any]]] | None = None,
        back: Mapping[str, Callable[[dict[str, Any]], Any]] | None = None,
    ) -> None:  # fmt: skip
        self.text, self.keywords, self.assumed, self.cotangents = text, keywords, keywords, cotangents
        self.to, self.back = to or {}, back or {}

    def arguments(
        self, candidate: Any, problem: Problem, takes: frozenset[str], backward: bool
    ) -> tuple[dict[str, Any], list[str]]:
        given = dict(problem.options)
        if backward:
            given |= {name: problem.cotangents[name] for name in self.cotangents if name in problem.cotangents}
        return given, [name for name in given if name not in takes]

    def forward(self, candidate: Any, problem: Problem, given: dict[str, Any]) -> Any:
        return candidate.forward(*self._inputs(problem, candidate.forward), **given)

    def backward(self, candidate: Any, problem: Problem, given: dict[str, Any], values: dict[str, Any]) -> Any:
        first = next(iter(problem.cotangents.values()))
        returned = candidate.backward(first, *self._inputs(problem, candidate.backward), **given)
        if hasattr(returned, "_asdict"):
            returned = returned._asdict()
        if isinstance(returned, (tuple, list)) and len(returned) == len(problem.gradients):
            returned = dict(zip(problem.gradients, returned, strict=True))
        elif len(problem.gradients) == 1 and isinstance(returned, np.ndarray):
            returned = {problem.gradients[0]: returned}
        if not isinstance(returned, Mapping):
            kind = type(returned).__name__
            return f"the backward returns a {kind}, expected a mapping with {', '.join(problem.gradients)}"
        found = dict(returned)
        name = next((n for n in self.back if n in found), "")
        params = self.back[name](found) if name else found.pop("params", found.pop("dparams", None))
        if hasattr(params, "_asdict"):
            params = params._asdict()
        if params is not None and not isinstance(params, Mapping):
            kind, expected = type(params).__name__, type(problem.inputs["params"]).__name__
            return f"the backward returns params as a {kind}, expected npattn.{expected} or a mapping"
        found = {f"{n}_{part}" if part else n: x for n, part, x in parts(found | dict(params or {})) if x is not None}
        return {n if n in problem.gradients else f"d{n}": x for n, x in found.items()}

    def _inputs(self, problem: Problem, function: Callable[..., Any]) -> list[Any]:
        """The inputs, with the parameters in the layout that the names in the function's signature ask for."""
        inputs = dict(problem.inputs)
        params, names = inputs.pop("params", None), names_of(function)
        name = next((n for n in self.to if n in names), "")
        if params is None or not name:
            return list(problem.inputs.values())
        try:
            return [*inputs.values(), *self.to[name](params)]
        except ValueError as error:  # widths or biases that the other layout cannot hold
            raise NotImplementedError(str(error)) from error


def names_of(function: Callable[..., Any]) -> set[str]:
    """Of its parameters."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # compiled functions may have no signature
        return set()


def of_params(params: Any) -> Values:
    """The gradients of parameters by npattn's names."""
    return {f"d{name}": x for _, name, x in parts({"params": params}) if x is not None}


# --- changes ---------------------------------------------------------------------------------------------------------------


def changes(rows: Mapping[str, Mistake], likely: tuple[str, ...] = ()) -> dict[str, Change]:
    """The changes of a record. A change of a forward stage changes the backward, too, as in automatic differentiation."""
    return {name: Change(name, stages, likely=name in likely) for name, stages in rows.items()}


def zero(x: Any, value: Any) -> Any:
    return 0 * value


def times(factor: Callable[[Any], float]) -> Callable[[Any, Any], Any]:
    return lambda x, value: value * factor(x)


def to_value(value: Any) -> Callable[[Any, Any], Any]:
    """A change to this value or route, whatever the honest one is."""
    return lambda x, _: value


def plain_outer(a: Array, b: Array) -> Array:
    a, b = (y.reshape(len(y), -1, y.shape[-1]) for y in (a, b))
    result: Array = a.swapaxes(-1, -2) @ b
    return result


def of_first_sequence(left: str, right: str) -> Callable[[Any, Any], Any]:
    return lambda x, _: plain_outer(getattr(x, left)[:, :1], getattr(x, right)[:, :1])


def sum_of_first_sequence(name: str) -> Callable[[Any, Any], Any]:
    return lambda x, _: getattr(x, name)[:, 0].sum(-2)


def product(left: str, right: str) -> Callable[[Any, Any], Any]:
    return lambda x, _: getattr(x, left) @ getattr(x, right)


def exchanged(a: str, b: str) -> Mistake:
    """Two parameters are exchanged, as in a packed array of another order, and so are their gradients."""

    def given(name: str) -> Callable[[Any, Any], Any]:
        return lambda x, value: getattr(x.problem.inputs["params"], name).reshape(value.shape)

    return {a: given(b), b: given(a), "finish": lambda x, d: d | {f"d{a}": d[f"d{b}"], f"d{b}": d[f"d{a}"]}}


# --- drawing ---------------------------------------------------------------------------------------------------------------


def normal(rng: Rng, *shape: int) -> Array:
    return rng.standard_normal(shape)


def weight(rng: Rng, *shape: int) -> Array:
    """Random weights, scaled so that outputs are about as large as inputs."""
    return np.asarray(rng.standard_normal(shape) * shape[0] ** -0.5)


def case(
    op: str, draw: Callable[..., Problem], name: str, feature: str = "", *, dtype: str = "float32", **sizes: Any
) -> Case:
    return Case(op, name, [feature or name], partial(draw, **sizes), dtype)


SIZES = {
    "multiple of 8": (8, 24, 40), "1": (1,), "2 or 3": (2, 3), "small and odd": (5, 7, 9), "prime": (13, 17, 37),
    "multiple of 16": (16, 48), "64": (64,), "above 64": (65, 72, 100, 130),
}  # fmt: skip
"""Classes of sizes."""
BATCH = {"2": (2,), "1": (1,), "3": (3,), "5": (5,)}


def space(
    op: str, draw: Callable[..., Problem], sizes: Mapping[str, Mapping[str, tuple[Choice, ...]]],
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]], cost: Callable[[Sizes], float],
    possible: Callable[[Row], bool] = lambda row: True, containment: tuple[str, ...] = (),
) -> Space:  # fmt: skip
    """The space of an op whose problems are drawn by a function with keyword arguments.

    sizes : dimensions whose classes have sizes; settings : dimensions whose classes have other arguments of ``draw``. The first
    class of each is the plain one. containment : the inputs with NaN where it has to reach nothing
    """

    def problem(row: Row, of: Sizes, seed: list[int]) -> Problem:
        more = {k: v for name, cls in row.items() if name in settings for k, v in settings[name][cls].items()}
        return draw(np.random.default_rng(seed), **of, **more)

    def features(row: Row) -> list[str]:
        found = [name for name in settings if row[name] != next(iter(settings[name]))]
        return [*found, "NaN containment"] if row.get("inputs") in containment else found

    others = {name: classes(*some) for name, some in settings.items()}
    dimensions = {**sizes, **others, "memory": classes(*LAYOUTS), **EVERYWHERE}
    return Space(
        op, dimensions, {name: next(iter(some)) for name, some in dimensions.items()}, problem,
        features, possible,
        lambda row, of: cost(of) * (12 if row.get("dtype") == "float64" else 1), (*sizes, *settings),
        of_backward={"cotangents": tuple(settings.get("cotangents", ()))[1:]},
    )  # fmt: skip


def tokens_differ(row: Row) -> bool:
    """Whether not all tokens are the same one: sums of equal terms are rounded in one direction, which sigma does not know."""
    return not (row.get("memory") == "strides of 0" and row.get("rank") == "2")


def _rows(shape: tuple[int, ...], dead: Callable[[Array], Array]) -> Array:
    """A mask (L, S) in which these queries see no key."""
    L, S = shape[-2:]
    return np.array(np.broadcast_to(~dead(np.arange(L))[:, None], (L, S)))


def _seen(shape: tuple[int, ...]) -> Array:
    """A mask of all keys but the last third."""
    L, S = shape[-2:]
    return np.array(np.broadcast_to(np.arange(S) < S - S // 3, (L, S)))


def _causal(shape: tuple[int, ...]) -> Array:
    """A causal mask in which the last query stands at the last key."""
    L, S = shape[-2:]
    return np.tri(L, S, S - L, dtype=bool)


MASKS: dict[str, Callable[[Rng, tuple[int, ...]], Array]] = {
    "mask": lambda rng, n: rng.random((n[0], 1, *n[2:])) < 0.7,
    "mask (L, S)": lambda rng, n: rng.random(n[2:]) < 0.7,
    "mask of each head": lambda rng, n: rng.random(n) < 0.7,
    "mask of keys": lambda rng, n: rng.random((n[0], 1, 1, n[3])) < 0.7,
    "causal": lambda rng, n: _causal(n),
    "dead rows": lambda rng, n: _rows(n, lambda i: (i == 1) | (i == n[2] - 1)),
    "every row dead": lambda rng, n: np.zeros(n[2:], bool),
    "dead query 1": lambda rng, n: _rows(n, lambda i: i == 1),
    "last third": lambda rng, n: _seen(n),
}
