"""What rnn, gru and lstm share: checks, the layout of the steps, and the gradients of the parameters over all steps at once.

Layers and directions are composed. A direction that runs backwards in time is a layer between two `reversed_steps`; the next
layer takes both directions side by side. The backward of each line is one line, from the last to the first:

>>> from npattn import GRUParams, gru_forward, gru_backward
>>> rng = np.random.default_rng(0)
>>> def cell(M, N):
...     return GRUParams(*(rng.standard_normal(n) for n in ((M, 3 * N), (N, 3 * N), (3 * N,), (3 * N,))))
>>> def both_directions(x, lengths, there, back):
...     h, cache = gru_forward(x, None, there, lengths=lengths)
...     g, reverse_cache = gru_forward(reversed_steps(x, lengths), None, back, lengths=lengths)
...     return np.concatenate([h, reversed_steps(g, lengths)], -1), (lengths, cache, reverse_cache)
>>> def both_directions_backward(dh, caches):
...     lengths, cache, reverse_cache = caches
...     there, back = np.split(dh, 2, -1)
...     there, back = gru_backward(there, cache), gru_backward(reversed_steps(back, lengths), reverse_cache)
...     return there.x + reversed_steps(back.x, lengths), (there.params, back.params)
>>> x, lengths, N = rng.standard_normal((3, 7, 4)), np.array([7, 2, 5]), 6
>>> h1, caches1 = both_directions(x, lengths, cell(4, N), cell(4, N))
>>> h2, caches2 = both_directions(h1, lengths, cell(2 * N, N), cell(2 * N, N))
>>> dh1, params2 = both_directions_backward(np.ones_like(h2), caches2)
>>> dx, params1 = both_directions_backward(dh1, caches1)
>>> h2.shape, dx.shape
((3, 7, 12), (3, 7, 4))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npattn.ops.activations import logistic
from npattn.ops.allowed import swap, weight_gradient
from npattn.ops.checks import Array, Dims, check_array, check_class, check_dtype, check_other_dtype, integers
from npattn.ops.exponentials import has_avx512

# With few rows of x OpenBLAS spends much of a product x w on a copy of w, unless the product has few multiplications and the
# processor AVX-512. In float32, with 16 rows and w (256, 1024), it takes 87 us, and in pieces of 64 columns 49 us. In a small
# product it sums in one chain: a piece has 256 rows at most, so that the rounding error is no larger than that of one product.
SMALL, ROWS, WIDTHS, DEPTHS = 1_000_000, 16, (64, 48, 32), range(256, 63, -1)
STEPS = 16  # a copy of w in the order in which it is read takes as long as a few products


def reversed_steps(x: Array, lengths: Any = None) -> Array:
    """Each sequence backwards in time, within its length; what lies behind a sequence stays where it is. A copy.

    x : (B, T, ...)   lengths : integers (B,), 0 to T; None: T   It is its own inverse, and its own backward. Raises TypeError,
    ValueError.

    >>> reversed_steps(np.array([[1, 2, 3, 0], [4, 5, 6, 7]]), [3, 4]).tolist()
    [[3, 2, 1, 0], [7, 6, 5, 4]]
    """
    op = "reversed_steps"
    if check_array(op, "x", x).ndim < 2:
        raise ValueError(f"{op}: x has shape {x.shape}, expected (B, T, ...)")
    (B, T), steps = x.shape[:2], np.arange(x.shape[1])
    if lengths is None:
        return np.array(x[:, ::-1])
    dims = Dims(op)
    dims.fix("x", B=B, T=T)
    n = _check_lengths(op, dims, lengths)[:, None]
    return np.asarray(x[np.arange(B)[:, None], np.where(steps < n, n - 1 - steps, steps)])


def swap_steps(x: Array) -> Array:
    """(B, T, N) -> (T, B, N) and back, as a view."""
    result: Array = x.swapaxes(0, 1)
    return result


def by_step(x: Array, computing: np.dtype[Any]) -> Array:
    """(B, T, N) -> (T, B, N), contiguous, since the steps are computed one by one."""
    return np.ascontiguousarray(swap_steps(x), computing)


def first_state(state: Array | None, B: int, N: int, computing: np.dtype[Any]) -> Array:
    """h0 or c0, or the gradient that reaches the last state: a copy, and zeros for None."""
    return np.zeros((B, N), computing) if state is None else state.astype(computing)


def all_steps(x: Array, w_x: Array, b: Array | None, computing: np.dtype[Any]) -> Array:
    """x_t w_x + b for all t in one product: (B, T, M) -> (T, B, width of w_x), each step contiguous."""
    (B, T, M), width = x.shape, w_x.shape[1]
    a = np.empty((T, B, width), computing)
    np.matmul(by_step(x, computing).reshape(T * B, M), w_x.astype(computing, copy=False), out=a.reshape(T * B, width))
    if b is not None:
        a += b.astype(computing, copy=False)
    return a


def gate(p: Array) -> None:
    """p becomes 1 / (1 + exp(-p)), in place. Where exp(-p) is beyond the dtype that is 0, as no normal number is nearer."""
    if p.dtype.kind == "c":  # there inf would give NaN
        p[...] = logistic(p)
        return
    e = -p  # a new array: NumPy 2.4 negates columns of float32 wrongly in place
    np.reciprocal(np.add(np.exp(e, out=e), 1, out=e), out=p)


def states_before(state: Array | None, states: Array) -> Array:
    """h_{t-1} of every step, or c_{t-1}: (T, B, N), contiguous. states : (B, T, N), of which the last is left out"""
    B, T, N = states.shape
    before = np.empty((T, B, N), states.dtype)
    before[:1], before[1:] = first_state(state, B, N, states.dtype), swap_steps(states)[: max(T - 1, 0)]
    return before


def product_with(w: Array, rows: int, steps: int) -> Callable[[Array], Array]:
    """The function x -> x @ w for x of so many rows, which is called so often. It always gives the same array, written anew."""
    (inner, width), wide, deep, out = w.shape, 0, 0, np.empty((rows, w.shape[1]), w.dtype)
    if 1 < rows <= ROWS and rows * inner * width > SMALL and w.dtype in (np.float32, np.float64) and has_avx512():
        wide, deep = (next((n for n in sizes if size % n == 0), 0) for sizes, size in ((WIDTHS, width), (DEPTHS, inner)))
    if not (wide and deep):
        w = np.ascontiguousarray(w) if steps >= STEPS else w
        return lambda x: np.matmul(x, w, out=out)
    pieces = w.reshape(inner // deep, deep, width // wide, wide).swapaxes(1, 2)
    pieces = np.ascontiguousarray(pieces) if steps >= STEPS else pieces
    columns = gates_of(out, width // wide)
    parts = columns[None] if deep == inner else np.empty((inner // deep, *columns.shape), w.dtype)

    def in_pieces(x: Array) -> Array:
        np.matmul(gates_of(x, inner // deep)[:, None], pieces, out=parts)
        if deep < inner:
            np.sum(parts, 0, out=columns)
        return out

    return in_pieces


def gates_of(p: Array, count: int) -> Array:
    """The blocks of columns of p, one after the other: (B, count N) -> (count, B, N), a view."""
    rows, width = p.shape
    result: Array = p.reshape(rows, count, width // count).swapaxes(0, 1)
    return result


def weight_gradients(x: Array, d: Array, w: Array) -> Array:
    """The sum of x_t^T d_t over all steps and sequences, in the dtype of w. x : (T, B, in); d : (T, B, out)"""
    return weight_gradient(x, d).astype(w.dtype, copy=False)


def reached(*gradients: Array) -> Array:
    """Where any of these gradients (B, N) reaches a sequence at all, (B, 1)."""
    return np.asarray(np.any([d.any(-1, keepdims=True) for d in gradients], 0))


def input_gradient(d: Array, w_x: Array, dtype: np.dtype[Any]) -> Array:
    """d_t w_x^T for all t in one product: (T, B, width of w_x) -> (B, T, M)."""
    T, B, width = d.shape
    dx = np.matmul(d.reshape(T * B, width), swap(w_x.astype(d.dtype, copy=False))).reshape(T, B, len(w_x))
    return swap_steps(dx).astype(dtype, order="C")


def bias_gradient(b: Array | None, d: Array) -> Array | None:
    """The sum of d_t over all steps and sequences, if there is a bias."""
    return None if b is None else d.sum((0, 1)).astype(b.dtype, copy=False)


def check_recurrent(
    op: str, x: Any, states: dict[str, Any], params: Any, cls: type, gates: int, lengths: Any
) -> tuple[Array | None, np.dtype[Any]]:
    """The steps that are valid, (B, T, 1), or None for all, and the computing dtype. states : h0 and c0, which may be None"""
    check_class(op, "params", params, cls)
    computing, dims, width = check_dtype(op, x=x), Dims(op), "N" if gates == 1 else f"{gates}N"
    dims.fit("x", x, "B T M")
    for name, p in params._asdict().items():
        if p is None and name.startswith("b"):
            continue
        spec = {"w_x": f"M {width}", "w_h": f"N {width}"}.get(name, width)
        dims.fit(name, check_other_dtype(op, name, p, x.dtype, computing), spec)
        if name == "w_x" and gates > 1:
            if dims[width] % gates:
                expected = f"(M={dims['M']}, {width}): {gates} blocks of N columns"
                raise ValueError(f"{op}: w_x has shape {p.shape}, expected {expected}")
            dims.fix("w_x", N=dims[width] // gates)
    for name, state in states.items():
        if state is not None:
            dims.fit(name, state, "B N")
            check_dtype(op, x=x, **{name: state})
    if lengths is None:
        return None, computing
    return (np.arange(dims["T"]) < _check_lengths(op, dims, lengths)[:, None])[..., None], computing


def _check_lengths(op: str, dims: Dims, lengths: Any) -> Array:
    n = dims.fit("lengths", integers(op, "lengths", lengths), "B")
    if n.size and not (n.min() >= 0 and n.max() <= dims["T"]):
        raise ValueError(f"{op}: lengths reaches from {n.min()} to {n.max()}, expected 0 to T={dims['T']}: fixed by x")
    return n


__all__ = ["reversed_steps"]
