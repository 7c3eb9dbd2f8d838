"""Exact conditions that need no tolerance: the same call gives the same bits, and nothing reaches what it must not reach.

Each is a `Check` of its own name beside the tensors of a case. They are made on the cases of CONDITIONED, which are small.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from npattn.ops.allowed import quiet
from npattn.ops.checks import Array
from npattn.ops.masks import as_mask, key_lengths
from npattn.verify.candidates import Candidate
from npattn.verify.cases import Part, Problem, Truth
from npattn.verify.judge import Check, Settings, accepts, as_given, call_backward, call_forward, is_array, units
from npattn.verify.precision import Precision, of_dtype

CONDITIONED = ("plain", "causal top_left", "mask array", "key_lengths", "G < H", "bias BHLS", "sink", "dead rows", "dlse")


def examine_conditions(candidate: Candidate, case: Any, seed: int, settings: Settings) -> list[Check]:
    """The conditions of a case, if it is one of CONDITIONED; none where the candidate supports or returns nothing."""
    if case.name not in CONDITIONED or candidate.op != "attention":
        return []
    problem, precision = as_given(case, seed, settings)
    truth = candidate.truth(problem, precision)
    try:
        values = _call(candidate, problem)
    except CallError as error:
        return [Check("repeat", "wrong", f"{error}, when it is called again", worst=math.inf)]
    if truth is None:
        return []
    out = values.get("out")  # the first call gave one that holds
    dtypes = [np.dtype(d) for d in problem.dtypes("out", precision)]
    if "out" in truth.values and (out is None or out.shape != truth.values["out"].shape or out.dtype not in dtypes):
        return [Check("repeat", "wrong", "out is not returned as before, when it is called again", worst=math.inf)]
    return list(conditions(candidate, problem, truth, values, settings.level, precision))


def conditions(
    candidate: Candidate, problem: Problem, truth: Truth, values: dict[str, Any], level: str,
    precision: Precision | None = None,
) -> Iterator[Check]:  # fmt: skip
    """All conditions of one case; ``values`` is what the candidate returned first."""
    precision = precision or of_dtype(problem.dtype)
    level = "good" if level == "bounded" else level  # det is not cut to one sequence
    first = {n: x for n, x in values.items() if is_array(x)}
    if not first:
        return
    saved = {n: x.copy() for n, x in first.items()}
    again = "other numbers in keys, values and queries that are masked"
    hidden = _hidden(problem)
    contained = candidate.convention.dead_out == "zero" and candidate.convention.dead_grad == "zero"
    several = len(problem.shape) == 4 and problem.shape[0] > 1
    tests: list[tuple[str, Any, Callable[[], Check]]] = [
        ("repeat", True, lambda: _same("repeat", "a second call", saved, _call(candidate, problem))),
        ("other calls", True, lambda: _other(candidate, problem, first, saved, precision, level)),
        ("threads", True, lambda: _threads(candidate, problem, saved)),
        ("strides", True, lambda: _strided(candidate, problem, truth, level)),
        ("batch size", several, lambda: _batch(candidate, problem, truth, level)),
        ("masked places", hidden is not None and contained,
         lambda: _same("masked places", again, saved, _call(candidate, hidden))),
    ]  # fmt: skip
    for name, there, test in tests:
        try:
            if there:
                yield test()
        except CallError as error:  # inputs may be spoiled: nothing after that would mean anything
            yield Check(name, "wrong", f"{error}, in a call for this condition", worst=math.inf)
            return
    if "out" in first and "dropout_mask" not in problem.options:
        yield _hull(problem, truth, first["out"])


class CallError(Exception):
    """A call that held before raises, or writes into its inputs."""


def _call(candidate: Candidate, problem: Any) -> dict[str, Array]:
    forward = call_forward(candidate, problem)
    backward = call_backward(candidate, problem, forward.values) if forward.values else forward
    if broken := [outcome.text for outcome in (forward, backward) if outcome.status == "wrong"]:
        raise CallError(broken[0])
    both = {**forward.values, **backward.values}
    return {n: x for n, x in both.items() if is_array(x)}


def _same(name: str, what: str, want: dict[str, Array], got: dict[str, Array]) -> Check:
    for tensor, x in want.items():
        y = got.get(tensor)
        if y is None:
            return Check(name, "wrong", f"{tensor} is not returned by {what}", worst=math.inf)
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            text = f"{tensor} is {y.dtype} {y.shape} in {what}, and {x.dtype} {x.shape} before"
            return Check(name, "wrong", text, worst=math.inf)
        if x.tobytes() != y.tobytes():
            differ = (x != y) & ~(np.isnan(x) & np.isnan(y))
            if not differ.any():
                continue  # -0 and 0, or another NaN
            index = tuple(int(i[0]) for i in np.nonzero(differ))
            text = f"{tensor}{list(index)} is {y[index]:.9g} in {what}, and {x[index]:.9g} before"
            return Check(name, "wrong", text, worst=math.inf, index=index)
    return Check(name, "ok", level="tight")


def _other(
    candidate: Candidate, problem: Problem, first: dict[str, Array], saved: dict[str, Array], precision: Precision, level: str
) -> Check:
    """Calls with other numbers, another shape or another mask overwrite nothing and leave nothing behind.

    A backward after them belongs to its own forward, and another mask or bias of the same shape is the one that counts.
    """
    other = dataclasses.replace(problem, q=-problem.q, v=problem.v[..., ::-1].copy(), dout=-problem.dout)
    for p in (other, _cut(problem, 1)):
        _call(candidate, p)
    masked = _otherwise(problem)
    if masked is not None:
        truth = candidate.truth(masked, precision)
        got = _call(candidate, masked)
        if truth is not None:
            what = "for another mask or bias of the same shape: state is kept between calls"
            check = _judged("other calls", what, got, truth.values, truth.sigma, level)
            if check.status == "wrong":
                return check
    for tensor, x in first.items():
        if x.tobytes() != saved[tensor].tobytes():
            return Check("other calls", "wrong", f"{tensor} is overwritten by the next call", worst=math.inf)
    backward = call_backward(candidate, problem, {n: saved[n] for n in problem.outputs if n in saved})
    if backward.status == "wrong":
        raise CallError(backward.text)
    got = {n: x for n, x in backward.values.items() if isinstance(x, np.ndarray)}
    want = {n: x for n, x in saved.items() if n in problem.gradients}
    check = _same("other calls", "a backward after another forward", want, got)
    return check if check.status == "wrong" else _same("other calls", "a call after others", saved, _call(candidate, problem))


def _otherwise(problem: Problem) -> Problem | None:
    """The same with another mask and bias of the same shapes, or None where there is neither."""

    def part(p: Part) -> Part:
        if isinstance(p.mask, np.ndarray) and p.keyword == "mask":
            return dataclasses.replace(p, mask=np.roll(p.mask, 1, (-2, -1)))
        if p.keyword == "key_lengths":
            lengths = np.maximum(np.asarray(p.value) - 1, 1)
            return dataclasses.replace(p, mask=key_lengths(lengths), value=lengths)
        return p

    parts, options = [part(p) for p in problem.parts], dict(problem.options)
    if isinstance(options.get("bias"), np.ndarray):
        options["bias"] = np.ascontiguousarray(options["bias"][..., ::-1])
    same = all(p is q for p, q in zip(parts, problem.parts, strict=True)) and "bias" not in options
    return None if same else dataclasses.replace(problem, parts=parts, options=options)


def _threads(candidate: Candidate, problem: Problem, want: dict[str, Array]) -> Check:
    """Two problems at once, each several times."""
    smaller = _cut(problem, 1)
    alone = _call(candidate, smaller)
    found: list[Check] = []

    def work(p: Problem, expected: dict[str, Array]) -> None:
        for _ in range(3):
            try:
                found.append(_same("threads", "one of two threads", expected, _call(candidate, p)))
            except CallError as error:
                found.append(Check("threads", "wrong", f"{error}, in one of two threads", worst=math.inf))

    threads = [threading.Thread(target=work, args=a) for a in ((problem, want), (smaller, alone))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return next((c for c in found if c.status == "wrong"), Check("threads", "ok", level="tight"))


def _cut(problem: Problem, batch: int) -> Problem:
    """The first sequences alone."""
    B = problem.shape[0]

    def cut(x: Any) -> Any:
        return x[:batch] if isinstance(x, np.ndarray) and x.ndim and x.shape[0] == B else x

    parts = [
        dataclasses.replace(p, mask=_bound(p.mask, problem.shape)[:batch], keyword=p.keyword, value=cut(p.value))
        for p in problem.parts
    ]
    options = {n: cut(x) if n != "sink" else x for n, x in problem.options.items()}
    dlse = None if problem.dlse is None else problem.dlse[:batch]
    return Problem(problem.q[:batch], problem.k[:batch], problem.v[:batch], problem.dout[:batch], dlse, parts, options)


def _bound(mask: Any, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(as_mask("mask", mask).bind(shape).dense(), shape)


def _judged(name: str, what: str, got: dict[str, Array], want: dict[str, Array], sigma: dict[str, Array], level: str) -> Check:
    for tensor, x in got.items():
        same = tensor in want and x.dtype.kind == "f" and x.shape == want[tensor].shape
        if tensor in want and not (same and accepts(level, units(x, want[tensor], sigma[tensor]))):
            return Check(name, "wrong", f"{tensor} is wrong {what}", worst=math.inf)
    return Check(name, "ok", level="tight")


def _strided(candidate: Candidate, problem: Problem, truth: Truth, level: str) -> Check:
    """The same numbers in views: heads behind queries, every second element, the last axis in reverse."""

    def turned(x: Array) -> Array:
        return np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -3, -2)), -3, -2)

    wide = np.repeat(problem.k, 2, axis=-1)[..., ::2]
    back = np.ascontiguousarray(problem.v[..., ::-1])[..., ::-1]
    p = dataclasses.replace(problem, q=turned(problem.q), k=wide, v=back, dout=turned(problem.dout))
    return _judged("strides", "for strided inputs", _call(candidate, p), truth.values, truth.sigma, level)


def _batch(candidate: Candidate, problem: Problem, truth: Truth, level: str) -> Check:
    """The first sequence alone gives what it gives among others."""
    one = _call(candidate, _cut(problem, 1))
    got = {n: x for n, x in one.items() if n in ("out", "lse", "dq", "dk", "dv")}
    want = {n: truth.values[n][:1] for n in got if n in truth.values}
    sigma = {n: truth.sigma[n][:1] for n in want}
    return _judged("batch size", "for the first sequence alone", got, want, sigma, level)


def _hidden(problem: Problem) -> Problem | None:
    """Other numbers where no query may see a key, and in queries that may see none; None where there is no such place."""
    if not problem.parts:
        return None
    seen = _bound(problem.mask, problem.shape)
    G, H = problem.k.shape[-3], problem.q.shape[-3]
    keys = np.asarray(~seen.reshape(seen.shape[0], G, H // G, *seen.shape[2:]).any((2, 3)))
    rows = np.asarray(~seen.any(-1))
    if not keys.any() and not rows.any():
        return None

    def other(x: Array, where: Array) -> Array:
        return np.where(where[..., None], x.dtype.type(3) - x, x)

    dout = other(problem.dout, rows) if "sink" not in problem.options else problem.dout
    return dataclasses.replace(problem, q=other(problem.q, rows), k=other(problem.k, keys), v=other(problem.v, keys), dout=dout)


@quiet
def _hull(problem: Problem, truth: Truth, out: Array) -> Check:
    """A mean of the values that a query may see lies between the least and the greatest of them, up to det."""
    seen = _bound(problem.mask, problem.shape) if problem.parts else np.ones(problem.shape, bool)
    bias = problem.options.get("bias")
    if bias is not None:
        seen = seen & np.broadcast_to(bias != -np.inf, problem.shape)
    v = np.repeat(problem.v.astype(np.float64), problem.q.shape[-3] // problem.k.shape[-3], axis=-3)
    zero = "sink" in problem.options
    high = np.where(seen[..., None], v[..., None, :, :], -np.inf).max(-2, initial=0.0 if zero else -np.inf)
    low = np.where(seen[..., None], v[..., None, :, :], np.inf).min(-2, initial=0.0 if zero else np.inf)
    dead = np.asarray(~seen.any(-1))[..., None]
    bound = truth.det.get("out", np.zeros_like(high))
    outside = ~dead & ((out > high + bound) | (out < low - bound))
    if outside.any():
        index = tuple(int(i[0]) for i in np.nonzero(outside))
        text = (
            f"out{list(index)} is {out[index]:.9g}, outside the values that it may see ({low[index]:.6g} to {high[index]:.6g})"
        )
        return Check("hull", "wrong", text, worst=math.inf, index=index)
    return Check("hull", "ok", level="tight")


CONDITIONS = ("repeat", "other calls", "threads", "strides", "batch size", "masked places", "hull")
