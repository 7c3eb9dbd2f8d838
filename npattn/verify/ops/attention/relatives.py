"""Problems related to a given problem of attention, for the exact conditions of `npattn.verify.conditions`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from npattn.ops.allowed import quiet
from npattn.ops.checks import Array
from npattn.ops.masks import as_mask, key_lengths
from npattn.verify.op import Problem, Relatives, Truth, Values
from npattn.verify.ops.attention.draw import Part, dense_mask, parts_of


class AttentionRelatives(Relatives):
    def with_other_numbers(self, problem: Problem) -> Problem:
        inputs = {**problem.inputs, "q": -problem.q, "v": problem.v[..., ::-1].copy()}
        return dataclasses.replace(problem, inputs=inputs, cotangents={**problem.cotangents, "dout": -problem.dout})

    def with_another_mask(self, problem: Problem) -> Problem | None:
        parts, options = [_another_mask(p) for p in parts_of(problem)], dict(problem.options)
        if isinstance(options.get("bias"), np.ndarray):
            options["bias"] = np.ascontiguousarray(options["bias"][..., ::-1])
        if all(p is q for p, q in zip(parts, parts_of(problem), strict=True)) and "bias" not in options:
            return None
        return dataclasses.replace(problem, options=options | ({"mask": parts} if parts else {}))

    def first_sequence(self, problem: Problem) -> Problem | None:
        if len(problem.shape) != 4 or problem.shape[0] < 2:
            return None

        def cut(x: Any) -> Any:
            return x[:1] if isinstance(x, np.ndarray) and x.ndim and x.shape[0] == problem.shape[0] else x

        parts = [
            dataclasses.replace(p, mask=np.broadcast_to(as_mask("mask", p.mask).bind(problem.shape).dense(), problem.shape)[:1],
                                value=cut(p.value))
            for p in parts_of(problem)
        ]  # fmt: skip
        options = {n: cut(x) if n != "sink" else x for n, x in problem.options.items()} | ({"mask": parts} if parts else {})
        both = ({n: x[:1] for n, x in part.items()} for part in (problem.inputs, problem.cotangents))
        inputs, cotangents = both
        return Problem(problem.op, inputs, options, cotangents)

    def strided(self, problem: Problem) -> Problem:
        """Inputs as views: q transposed, every second column for k, the last axis of v in reverse."""

        def turned(x: Array) -> Array:
            return np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -3, -2)), -3, -2)

        wide = np.repeat(problem.k, 2, axis=-1)[..., ::2]
        back = np.ascontiguousarray(problem.v[..., ::-1])[..., ::-1]
        cotangents = {**problem.cotangents, "dout": turned(problem.dout)}
        return dataclasses.replace(problem, inputs={"q": turned(problem.q), "k": wide, "v": back}, cotangents=cotangents)

    def hidden(self, problem: Problem) -> Problem | None:
        """Other numbers in keys that no query may see, and in queries that may see no key."""
        if not parts_of(problem):
            return None
        seen = dense_mask(problem)
        G, H = problem.k.shape[-3], problem.q.shape[-3]
        keys = np.asarray(~seen.reshape(seen.shape[0], G, H // G, *seen.shape[2:]).any((2, 3)))
        rows = np.asarray(~seen.any(-1))
        if not keys.any() and not rows.any():
            return None

        def other(x: Array, where: Array) -> Array:
            return np.where(where[..., None], x.dtype.type(3) - x, x)

        dout = other(problem.dout, rows) if "sink" not in problem.options else problem.dout
        inputs = {"q": other(problem.q, rows), "k": other(problem.k, keys), "v": other(problem.v, keys)}
        return dataclasses.replace(problem, inputs=inputs, cotangents={**problem.cotangents, "dout": dout})

    @quiet
    def outside(self, problem: Problem, truth: Truth, values: Values) -> str | None:
        """An output is a mean of the values that its query may see, so it lies between their least and greatest, up to det."""
        if "out" not in values or "dropout_mask" in problem.options:
            return None
        out = values["out"]
        seen = dense_mask(problem) if parts_of(problem) else np.ones(problem.shape, bool)
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
        if not outside.any():
            return ""
        at = tuple(int(i[0]) for i in np.nonzero(outside))
        return f"out{list(at)} is {out[at]:.9g}, outside the values that it may see ({low[at]:.6g} to {high[at]:.6g})"


def _another_mask(p: Part) -> Part:
    """Another mask with the same keyword; the same one if there is no other."""
    if isinstance(p.mask, np.ndarray) and p.keyword == "mask":
        return dataclasses.replace(p, mask=np.roll(p.mask, 1, (-2, -1)))
    if p.keyword == "key_lengths":
        lengths = np.maximum(np.asarray(p.value) - 1, 1)
        return dataclasses.replace(p, mask=key_lengths(lengths), value=lengths)
    return p
