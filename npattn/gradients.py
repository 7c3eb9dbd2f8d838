"""Checks of hand-written gradients, yours or npattn's, that use nothing but the forward.

    gradcheck(attention_forward, attention_backward, {"q": q, "k": k, "v": v})

needs no more than the contract of this package: ``forward(**inputs) -> (out, cache)`` and ``backward(dout, cache) ->
gradients``. It compares with one of two derivatives:

complex step   Im f(x + i h u) / h with h = 1e-40: the derivative along u up to the last bits, because nothing is subtracted
               (Squire and Trapp 1998). The forward has to let complex numbers through, without ``abs``, ``max`` or cast.
central        (f(x + h u) - f(x - h u)) / 2h for three steps h, extrapolated to h = 0 (Romberg), with the error estimated
               from the last two extrapolations and from rounding. Works for every forward in float64.

A comparison raises `GradcheckError` if gradients differ, and also if nothing was tested: a gradient that is zero everywhere
has to be named (``zero=("b_k",)``), and then it must be zero within the same bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.checks import Array, check_one_of, kind
from npattn.tolerances import CENTRAL_GOAL, COMPLEX_STEP, GRADCHECK_EPS, TERMS_EPS, WORST_CENTRAL_ERROR, romberg_step

STREAM = int.from_bytes(b"gradcheck", "big") % 2**32


class GradcheckError(AssertionError):
    """A gradient differs from the forward's derivative, or nothing was tested."""


@dataclass(frozen=True)
class Checked:
    """How the gradient of one input was checked: by which method, how often, and how large the difference was."""

    name: str
    method: str  # "complex" or "central"
    derivatives: int  # how many were compared: by single elements, and along directions
    error: float  # the largest difference, divided by the allowed one: at most 1
    size: float  # the largest derivative


# --- inputs as a tree of arrays -------------------------------------------------------------------------------------


def _children(tree: Any) -> list[tuple[str, Any]] | None:
    """The named parts of a mapping, NamedTuple, sequence or bias object; None for a leaf."""
    if isinstance(tree, Mapping):
        return [(str(name), x) for name, x in tree.items()]
    if hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, (tuple, list)):
        return [(str(i), x) for i, x in enumerate(tree)]
    if hasattr(tree, "with_parameter"):  # a bias object
        return [("parameter", tree.parameter)]
    return None


def _leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    parts = _children(tree)
    if parts is None:
        return [] if tree is None else [(name, tree)]
    return [leaf for part, x in parts for leaf in _leaves(x, f"{name}.{part}" if name else part)]


def _rebuild(tree: Any, leaves: list[Any]) -> Any:
    """The tree with its leaves replaced, in order; ``leaves`` is used up."""
    parts = _children(tree)
    if parts is None:
        return None if tree is None else leaves.pop(0)
    new = [_rebuild(x, leaves) for _, x in parts]
    if isinstance(tree, Mapping):
        return dict(zip(tree, new, strict=True))
    if hasattr(tree, "with_parameter"):
        return tree.with_parameter(new[0])
    return type(tree)(*new) if hasattr(tree, "_fields") else type(tree)(new)


def _find(tree: Any, path: str, whole: str = "") -> Any:
    """The part of a tree of gradients that stands where ``path`` stands in the inputs."""
    parts = dict(_children(tree) or ())
    if path in parts:
        return parts[path]
    for part, x in parts.items():  # a name may hold a dot itself, as those of torch's state_dict do
        if path.startswith(f"{part}."):
            return _find(x, path[len(part) + 1 :], whole or path)
    order = ": the inputs are a sequence, and so are their gradients" if path.isdigit() and parts else ""
    raise GradcheckError(f"gradcheck: the backward gives no gradient of {whole or path}{order}")


def _as_outputs(out: Any) -> list[Array]:
    return [np.asarray(x) for x in (out if isinstance(out, (tuple, list)) else (out,))]


class Derivative(NamedTuple):
    """One derivative, by the backward and by the complex step or central difference."""

    place: Any  # the index of an element, or "along" a random direction
    analytic: float
    numeric: float
    doubt: float  # the estimated error of ``numeric``
    step: float
    weight: float  # sum of |u|, at least 1: the errors of that many elements add up


def _real(x: Any) -> Any:
    return np.float64(x) if isinstance(x, (int, float)) else x


# --- the pair under test --------------------------------------------------------------------------------------------


class _Pair:
    """A forward and backward on flat lists of arrays."""

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any], inputs: Any) -> None:
        self.forward, self.backward, self.inputs = forward, backward, inputs
        leaves = _leaves(inputs)
        if not leaves:
            raise GradcheckError("gradcheck: there are no inputs, so nothing can be tested")
        self.names = [name for name, _ in leaves]
        self.values = [np.asarray(_real(x)) for _, x in leaves]
        self.scalars = [not isinstance(x, np.ndarray) for _, x in leaves]
        for name, x in zip(self.names, self.values, strict=True):
            if x.dtype.char not in "dg":
                raise TypeError(
                    f"gradcheck: {name} has dtype {x.dtype}, expected float64 or longdouble: x.astype(np.float64); rounding in "
                    f"other dtypes would hide what is wrong"
                )

    def run(self, values: Sequence[Array]) -> tuple[list[Array], Any, Any]:
        """Outputs, cache, and the outputs as the forward gave them."""
        given = [x.item() if scalar else x for x, scalar in zip(values, self.scalars, strict=True)]
        inputs = _rebuild(self.inputs, given)
        returned = self.forward(**inputs) if isinstance(inputs, Mapping) else self.forward(*inputs)
        if not isinstance(returned, tuple) or len(returned) != 2:
            what = f"{len(returned)} values" if isinstance(returned, tuple) else kind(returned)
            raise TypeError(f"gradcheck: forward returns {what}, expected (out, cache)")
        outs = _as_outputs(returned[0])
        for x, given in zip(outs, returned[0] if isinstance(returned[0], (tuple, list)) else (returned[0],), strict=True):
            real = not any(np.iscomplexobj(value) for value in values)
            if x.dtype.kind not in ("f" if real else "fc") or isinstance(given, np.ma.MaskedArray):
                raise TypeError(f"gradcheck: forward returns an out that is {kind(given)}, expected an array of floats")
        return outs, returned[1], returned[0]

    def outputs(self, values: Sequence[Array]) -> list[Array]:
        return self.run(values)[0]

    def in_order(self, grads: Sequence[Any]) -> dict[str, Any]:
        """Gradients without names: one for each input, where those that are None may be left out."""
        pairs = list(_children(self.inputs) or ())
        some = [name for name, x in pairs if x is not None]
        names = some if len(grads) == len(some) else [name for name, _ in pairs]
        if len(grads) != len(names):
            got, expected = len(grads), len(names)
            raise GradcheckError(f"gradcheck: backward returns {got} gradients, expected one for each of {expected} inputs")
        return dict(zip(names, grads, strict=True))

    def gradients(self, dout: list[Array], out: Any, cache: Any) -> list[Array]:
        shaped: Any = dout[0] if not isinstance(out, (tuple, list)) else tuple(dout)
        if hasattr(out, "_fields"):
            shaped = type(out)(*dout)
        grads = self.backward(shaped, cache)
        plain = isinstance(grads, (tuple, list)) and not hasattr(grads, "_fields")
        if plain and not hasattr(self.inputs, "_fields"):
            grads = self.in_order(grads)
        elif hasattr(grads, "_fields") and isinstance(self.inputs, (tuple, list)) and not hasattr(self.inputs, "_fields"):
            grads = tuple(grads)  # gradients in the order of the inputs, and perhaps of more
        elif not isinstance(grads, (tuple, list, Mapping)):
            grads = (grads,) if not isinstance(self.inputs, Mapping) else {next(iter(self.inputs)): grads}
        found = [_find(grads, name) for name in self.names]
        for name, g in zip(self.names, found, strict=True):
            if g is None:
                raise GradcheckError(f"gradcheck: the backward gives None as the gradient of {name}, expected an array")
        return [np.asarray(g) for g in found]


def _equal(a: list[Array], b: list[Array]) -> bool:
    return all(x.shape == y.shape and np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def _random_like(rng: np.random.Generator, x: Array) -> Array:
    return rng.standard_normal(x.shape).astype(x.real.dtype)


def _complex(x: Array) -> Array:
    return x.astype(np.result_type(x.dtype, np.complex128))


def complex_step(outputs: Callable[[list[Array]], list[Array]], values: list[Array], at: int, u: Array) -> list[Array]:
    """The derivative of every output along u, a direction of the input with index ``at``."""
    inputs = [_complex(x) for x in values]
    inputs[at] = values[at] + 1j * COMPLEX_STEP * u
    result = outputs(inputs)
    if not all(np.iscomplexobj(x) for x in result):
        raise TypeError(
            "gradcheck: out is real for complex inputs, so a cast or abs in the forward stops the complex step; "
            'use method="central"'
        )
    return [x.imag / COMPLEX_STEP for x in result]


def central_difference(
    outputs: Callable[[list[Array]], list[Array]], values: list[Array], at: int, u: Array, dout: list[Array]
) -> tuple[float, float, float]:
    """The derivative of sum(dout * out) along u, its estimated error, and the largest step of the three that gave it.

    If the estimated error is large, because of a kink or a fast change within the step, smaller steps are tried.
    """
    x, eps = values[at], float(np.finfo(values[at].dtype).eps)
    touched = float(np.abs(np.where(u != 0, x, 0)).max())  # u is 0 where x is not finite
    h = romberg_step(eps) * max(1.0, touched) / float(np.abs(u).max())
    best = (0.0, np.inf, h)
    for _ in range(4):
        value, doubt, rounding = _romberg(outputs, values, at, u, dout, h)
        best = min(best, (value, doubt + rounding, h), key=lambda found: found[1])
        if doubt <= max(rounding, CENTRAL_GOAL * abs(value)):
            break
        h /= 16
    return best


def _romberg(
    outputs: Callable[[list[Array]], list[Array]], values: list[Array], at: int, u: Array, dout: list[Array], h: float
) -> tuple[float, float, float]:
    """Central differences at h, h/2, h/4, extrapolated to 0; the estimated error of that; the rounding error."""
    slopes, bends, rounding = [], [], 0.0
    middle = outputs(values)
    for step in (h, h / 2, h / 4):
        slope = bend = size = 0.0
        ends = []
        for sign in (1, -1):
            moved = list(values)
            moved[at] = values[at] + sign * step * u
            ends.append(outputs(moved))
        for c, a, b, m in zip(dout, *ends, middle, strict=True):
            ok = np.isfinite(m)  # an lse of -inf does not change
            if not (np.isfinite(a) == ok).all() or not (np.isfinite(b) == ok).all():
                return 0.0, np.inf, 0.0
            slope += float((c[ok] * (a[ok] - b[ok])).sum())
            bend += float((c[ok] * ((a[ok] - m[ok]) + (b[ok] - m[ok]))).sum())
            size += float(np.abs(c[ok] * a[ok]).sum())
        slopes.append(slope / (2 * step))
        bends.append(abs(bend) / step)
        rounding = 4 * float(np.finfo(values[at].dtype).eps) * size / step
    first, second = (4 * slopes[1] - slopes[0]) / 3, (4 * slopes[2] - slopes[1]) / 3
    value = (16 * second - first) / 15
    # The slopes on both sides of the point differ by O(h) if f is smooth; if f has a kink at the point, they stay different.
    kink = bends[2] if bends[2] > 0.5 * bends[0] and bends[2] > 8 * rounding else 0.0
    # The differences of the extrapolations are about as large as the error; the factor 4 covers oscillation within the step.
    return value, 4 * (abs(first - second) + abs(second - value)) + kink, rounding


def gradcheck(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    inputs: Any,
    *,
    method: str = "complex",
    zero: Sequence[str] = (),
    terms: Mapping[str, Any] | None = None,
    elements: int = 200,
    directions: int = 1,
    seed: int = 0,
) -> list[Checked]:
    """Check every gradient that ``backward`` gives against derivatives of ``forward``; raises `GradcheckError`.

    forward    : ``forward(**inputs)`` (or ``forward(*inputs)``) -> (out, cache); out is an array or a tuple of arrays
    backward   : ``backward(dout, cache)`` -> gradients: NamedTuple or mapping with the names of the inputs, or in their order
    inputs     : a mapping or sequence of arrays (float64 or longdouble), floats, NamedTuples of them, or bias objects; None is
                 left out
    method     : "complex" or "central"
    zero       : names of the inputs whose gradient is zero by its mathematics
    terms      : for each name, the largest sum of |terms| of one element: rounding errors are judged against it (unless given,
                 against the largest derivative of that input)
    elements   : how many elements of each input are checked one by one, drawn at random if it has more
    directions : how many random directions over all elements of each input are checked
    Returns a row for each input. The cotangent is random, since a cotangent of ones tests nothing in a softmax.

    >>> rows = gradcheck(lambda x, w: (x @ w, (x, w)), lambda dy, c: (dy @ c[1].T, c[0].T @ dy),
    ...                  [np.eye(3), np.ones((3, 2))])
    >>> [(row.name, row.derivatives) for row in rows]
    [('0', 10), ('1', 7)]
    """
    check_one_of("gradcheck", "method", method, ("complex", "central"))
    # A stream of its own: with default_rng(seed) the cotangent could be the same numbers that the caller drew as inputs.
    rng, pair = np.random.default_rng([STREAM, seed]), _Pair(forward, backward, inputs)
    dout, grads = _cotangent_and_gradients(pair, rng)
    unknown = [name for name in zero if not any(_names_leaf(name, leaf) for leaf in pair.names)]
    if unknown:
        raise ValueError(f"gradcheck: zero names {unknown}, expected names out of {pair.names}")

    unknown = [name for name in pair.names if terms is not None and name not in terms]
    if unknown:
        raise ValueError(f"gradcheck: terms names {list(terms or ())}, expected {unknown} too")

    found = []
    for at, (name, x, g) in enumerate(zip(pair.names, pair.values, grads, strict=True)):
        if g.shape != x.shape:
            raise GradcheckError(f"gradcheck: the gradient of {name} has shape {g.shape}, expected {x.shape}")
        if g.dtype.kind not in "fiu":
            raise GradcheckError(f"gradcheck: the gradient of {name} has dtype {g.dtype}, expected {x.dtype}")
        if not np.isfinite(g).all():
            raise GradcheckError(f"gradcheck: the gradient of {name} holds NaN or inf")
        rows: list[Derivative] = []
        for place, u in _directions(rng, x, elements, directions):
            if method == "complex":
                slopes = complex_step(pair.outputs, pair.values, at, u)
                numeric, doubt, h = sum(float((c * s).sum()) for c, s in zip(dout, slopes, strict=True)), 0.0, COMPLEX_STEP
                if place == "along":
                    _agree(pair.outputs, pair.values, at, u, dout, name, numeric)
            else:
                numeric, doubt, h = central_difference(pair.outputs, pair.values, at, u, dout)
            rows.append(Derivative(place, float((g * u).sum()), numeric, doubt, h, max(1.0, float(np.abs(u).sum()))))
        found.append((name, x, rows))

    if not any(rows for _, _, rows in found):
        raise GradcheckError("gradcheck: no derivative was taken, so nothing was tested")
    overall = max((abs(r.numeric) / r.weight for _, _, rows in found for r in rows), default=0.0)
    return [
        _judge(name, x, rows, method, overall, None if terms is None else terms[name], any(_names_leaf(z, name) for z in zero))
        for name, x, rows in found
    ]


def _cotangent_and_gradients(pair: _Pair, rng: np.random.Generator) -> tuple[list[Array], list[Array]]:
    """A random cotangent, and the gradients that the backward gives for it. Raises if the pair breaks the contract."""
    before = [x.copy() for x in pair.values]
    outs, cache, out = pair.run(pair.values)
    if any(np.isnan(x).any() for x in outs):
        raise GradcheckError("gradcheck: the forward returns NaN")
    if not _equal(outs, pair.outputs(pair.values)):
        raise GradcheckError("gradcheck: the forward is not repeatable: two calls with the same inputs differ")
    dout = [_random_like(rng, x) for x in outs]
    grads = pair.gradients(dout, out, cache)
    if not _equal(grads, pair.gradients(dout, out, cache)):
        raise GradcheckError("gradcheck: the backward is not repeatable: two calls with the same cache differ")
    if not _equal(before, pair.values):
        raise GradcheckError("gradcheck: an input was modified")
    return dout, grads


def _judge(name: str, x: Array, rows: list[Derivative], method: str, overall: float, terms: Any, zero: bool) -> Checked:
    """Raise if the gradient of an input is wrong, or if its derivatives test nothing.

    Rounding is judged against the sum of |terms|, or, if that is not known, against the largest derivative.
    """
    eps = float(np.finfo(x.dtype).eps)
    largest = max((abs(r.numeric) / r.weight for r in rows), default=0.0)
    known = None if terms is None else eps * TERMS_EPS * float(np.max(terms, initial=0.0))
    bound = eps * GRADCHECK_EPS * (overall if zero else largest) if known is None else known
    nothing = eps * GRADCHECK_EPS * overall if known is None else known
    for r in rows:
        if r.doubt > WORST_CENTRAL_ERROR * max(abs(r.numeric), overall * r.weight):
            raise GradcheckError(
                f"gradcheck: the central difference of {_place(name, r.place)} is {r.numeric:.6g} with an estimated error of "
                f"{r.doubt:.1g} (step {r.step:.1g}): nothing can be tested at a kink or jump"
            )
    if x.size and not zero and all(max(abs(r.analytic), abs(r.numeric)) <= nothing * r.weight + r.doubt for r in rows):
        raise GradcheckError(
            f"gradcheck: the gradient of {name} is zero everywhere, so nothing was tested; if it has to be, name it: "
            f'zero=("{name}",)'
        )
    ratio = 0.0
    for r in rows:
        allowed, error = bound * r.weight + r.doubt, abs(r.analytic - r.numeric)
        if not error <= allowed:
            raise GradcheckError(
                f"gradcheck: gradient of {_place(name, r.place)}: backward gives {r.analytic:.17g}, {method} step "
                f"h = {r.step:.1g} gives {r.numeric:.17g}; they differ by {error:.2g}, allowed {allowed:.2g}"
                + ("" if terms is not None else " (of the largest derivative; where larger terms cancel, give terms)")
            )
        if zero and not max(abs(r.analytic), abs(r.numeric)) <= allowed:
            raise GradcheckError(
                f"gradcheck: the gradient of {_place(name, r.place)} is {r.numeric:.6g}, but zero names {name}"
            )
        ratio = max(ratio, error / allowed if allowed else 0.0)
    return Checked(name, method, len(rows), ratio, max((abs(r.numeric) for r in rows), default=0.0))


def _agree(
    outputs: Callable[[list[Array]], list[Array]], values: list[Array], at: int, u: Array, dout: list[Array],
    name: str, slope: float,
) -> None:  # fmt: skip
    """Raise if a part of the forward stops the complex step, which then differs from a central difference."""
    step = float(np.finfo(values[at].dtype).eps) ** (1 / 3) / float(np.abs(u).max())
    ends = [outputs([x + sign * step * u if i == at else x for i, x in enumerate(values)]) for sign in (1, -1)]
    rough = 0.0
    for c, a, b in zip(dout, *ends, strict=True):
        ok = np.isfinite(a) & np.isfinite(b)  # an lse of -inf does not change
        rough += float((c[ok] * (a[ok] - b[ok])).sum()) / (2 * step)
    if abs(slope - rough) <= WORST_CENTRAL_ERROR * abs(rough):
        return
    value, doubt, _ = central_difference(outputs, values, at, u, dout)  # one difference may be too rough
    known = WORST_CENTRAL_ERROR * abs(value)
    if doubt <= known and abs(slope - value) > known:
        raise TypeError(
            f"gradcheck: along {name} the complex step gives {slope:.6g} and a central difference {value:.6g}: a cast "
            f'or abs in the forward stops the complex step in part; use method="central"'
        )


def _place(name: str, place: Any) -> str:
    return f"{name} along a random direction" if place == "along" else f"{name}{place}"


def _names_leaf(named: str, leaf: str) -> bool:
    return leaf == named or leaf.endswith("." + named) or leaf.startswith(named + ".")


def _directions(rng: np.random.Generator, x: Array, elements: int, directions: int) -> list[tuple[Any, Array]]:
    """Unit vectors for elements (some, if there are many), each with its index, and random directions over all elements."""
    if not x.size:
        return []
    finite = np.flatnonzero(np.isfinite(x))  # a bias of -inf has no derivative
    if not finite.size:
        return []
    chosen = finite if finite.size <= elements else np.sort(rng.choice(finite, elements, replace=False))
    result: list[tuple[Any, Array]] = []
    for i in chosen:
        u = np.zeros_like(x)
        u.flat[i] = 1
        result.append((list(map(int, np.unravel_index(i, x.shape))), u))
    return result + [("along", np.where(np.isfinite(x), _random_like(rng, x), 0)) for _ in range(directions)]


def hessian_vector_product(
    forward: Callable[..., Any], backward: Callable[..., Any], inputs: Any, direction: Any, dout: Any
) -> Any:
    """The derivative of all gradients along a direction of the inputs: H u, by a complex step through the backward.

        H u = Im backward(dout, forward(x + i h u)) / h

    ``direction`` and the result have the structure of ``inputs``, ``dout`` that of the output. Forward and backward have to
    let complex numbers through, as those of this package do.

    >>> square = (lambda x: (x * x, x), lambda dy, x: (2 * x * dy,))
    >>> hessian_vector_product(*square, [np.array([3.0, 4.0])], [np.array([1.0, 10.0])], np.ones(2))
    [array([ 2., 20.])]
    """
    pair = _Pair(forward, backward, inputs)
    along = [np.asarray(_real(u)) for _, u in _leaves(direction)]
    if [u.shape for u in along] != [x.shape for x in pair.values]:
        raise ValueError(
            f"hessian_vector_product: direction has shapes {[u.shape for u in along]}, expected "
            f"{[x.shape for x in pair.values]}: fixed by inputs"
        )
    _, cache, out = pair.run([x + 1j * COMPLEX_STEP * u for x, u in zip(pair.values, along, strict=True)])
    grads = pair.gradients([_complex(np.asarray(d)) for d in _as_outputs(dout)], out, cache)
    return _rebuild(pair.inputs, [g.imag / COMPLEX_STEP for g in grads])


__all__ = ["Checked", "GradcheckError", "gradcheck", "hessian_vector_product"]
