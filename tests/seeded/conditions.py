"""Conditions under which alone a bug may show, and how many pairs of them, chosen by chance, the cases of a run meet.

    python -m tests.seeded.conditions [PAIRS] [SEED]

A condition is asked of what a function gets in a call: its arrays and options, not the case that they were drawn from.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from npattn.verify.judge import Settings, as_given
from npattn.verify.op import Problem
from npattn.verify.ops import OPS
from npattn.verify.ops.attention.draw import dense_mask, parts_of
from npattn.verify.runs import PAIRS, Drawing


def seen(p: Problem) -> np.ndarray:
    return dense_mask(p) if parts_of(p) else np.ones(p.shape, bool)


def has(name: str) -> Callable[[Problem], bool]:
    return lambda p: name in p.options


def keyword(name: str) -> Callable[[Problem], bool]:
    return lambda p: any(part.keyword == name for part in parts_of(p))


def size(test: Callable[..., bool]) -> Callable[[Problem], bool]:
    return lambda p: test(L=p.q.shape[-2], S=p.k.shape[-2], D=p.q.shape[-1], E=p.v.shape[-1],
                          H=p.q.shape[-3] if p.q.ndim > 2 else 1, G=p.k.shape[-3] if p.k.ndim > 2 else 1)  # fmt: skip


CONDITIONS: dict[str, Callable[[Problem], bool]] = {
    "D = 64": size(lambda D, **_: D == 64), "D = 72": size(lambda D, **_: D == 72), "D = 80": size(lambda D, **_: D == 80),
    "D = 96": size(lambda D, **_: D == 96), "D = 128": size(lambda D, **_: D == 128), "D = 256": size(lambda D, **_: D == 256),
    "D > 64": size(lambda D, **_: D > 64), "D % 8": size(lambda D, **_: D % 8 != 0), "D < 16": size(lambda D, **_: D < 16),
    "D % 16 = 8": size(lambda D, **_: D % 16 == 8),
    "E < D": size(lambda D, E, **_: E < D), "E > D": size(lambda D, E, **_: E > D),
    "L = 1": size(lambda L, **_: L == 1), "S = 1": size(lambda S, **_: S == 1), "L = S": size(lambda L, S, **_: L == S),
    "L > S": size(lambda L, S, **_: L > S), "L < S": size(lambda L, S, **_: L < S), "L > 64": size(lambda L, **_: L > 64),
    "L > 128": size(lambda L, **_: L > 128), "L > 256": size(lambda L, **_: L > 256), "L > 512": size(lambda L, **_: L > 512),
    "S > 64": size(lambda S, **_: S > 64), "S > 128": size(lambda S, **_: S > 128), "S > 256": size(lambda S, **_: S > 256),
    "S > 512": size(lambda S, **_: S > 512), "L % 64 = 0": size(lambda L, **_: L % 64 == 0),
    "S % 64 = 0": size(lambda S, **_: S % 64 == 0), "L % 64 = 1": size(lambda L, **_: L > 1 and L % 64 == 1),
    "S % 64 = 1": size(lambda S, **_: S > 1 and S % 64 == 1), "S % 64 = 63": size(lambda S, **_: S % 64 == 63),
    "L % 16 = 0": size(lambda L, **_: L % 16 == 0), "S % 16 = 15": size(lambda S, **_: S % 16 == 15),
    "S % 128 = 0": size(lambda S, **_: S % 128 == 0), "S odd": size(lambda S, **_: S % 2 == 1),
    "L < 4": size(lambda L, **_: L < 4), "H = 1": size(lambda H, **_: H == 1), "H = 3": size(lambda H, **_: H == 3),
    "H = 8": size(lambda H, **_: H == 8), "G = 1 < H": size(lambda H, G, **_: G == 1 < H),
    "1 < G < H": size(lambda H, G, **_: 1 < G < H), "H / G = 3": size(lambda H, G, **_: H == 3 * G),
    "H / G = 8": size(lambda H, G, **_: H == 8 * G), "B = 1": lambda p: p.q.shape[0] == 1, "B = 3": lambda p: p.q.shape[0] == 3,
    "B > 3": lambda p: p.q.shape[0] > 3,
    "causal": keyword("causal"), "window": keyword("window"), "key_lengths": keyword("key_lengths"), "bias": has("bias"),
    "softcap": has("softcap"), "sink": has("sink"), "dropout": has("dropout_mask"), "scale": has("scale"),
    "scale < 0": lambda p: p.options.get("scale", 1) < 0, "dlse": lambda p: "dlse" in p.cotangents,
    "bias of rank 2": lambda p: np.ndim(p.options.get("bias")) == 2,
    "bias of one row": lambda p: np.ndim(p.options.get("bias")) > 2 and p.options["bias"].shape[-2] == 1,
    "bias of each head": lambda p: np.ndim(p.options.get("bias")) == 4 and p.options["bias"].shape[1] > 1,
    "bias of -inf": lambda p: isinstance(p.options.get("bias"), np.ndarray) and bool(np.isneginf(p.options["bias"]).any()),
    "a dead row": lambda p: bool((~seen(p).any(-1)).any()), "all seen": lambda p: bool(seen(p).all()),
    "one key seen": lambda p: bool((seen(p).sum(-1) == 1).any()),
    "a dead sequence": lambda p: bool((~seen(p).reshape(len(p.q), -1).any(-1)).any()),
    "key 0 hidden": lambda p: bool((~seen(p)[..., 0]).any()), "last key hidden": lambda p: bool((~seen(p)[..., -1]).any()),
    "NaN": lambda p: any(np.isnan(x).any() for x in p.inputs.values()),
    "large scores": lambda p: bool(np.abs(np.nan_to_num(p.q)).max() > 50), "tiny": lambda p: bool(np.nanmax(np.abs(p.q)) < 0.1),
    "small dout": lambda p: 0 < np.nanmax(np.abs(p.dout)) < 1e-3, "float64": lambda p: p.q.dtype == np.float64,
    "q not contiguous": lambda p: not p.q.flags.c_contiguous, "k not contiguous": lambda p: not p.k.flags.c_contiguous,
    "v not contiguous": lambda p: not p.v.flags.c_contiguous, "dout not contiguous": lambda p: not p.dout.flags.c_contiguous,
    "k backwards": lambda p: min(p.k.strides) < 0, "v broadcast": lambda p: p.v.size > 0 and 0 in p.v.strides,
    "dout broadcast": lambda p: p.dout.size > 0 and 0 in p.dout.strides, "q read-only": lambda p: not p.q.flags.writeable,
    "k is q": lambda p: p.k is p.q, "v is k": lambda p: p.v is p.k,
    "q Fortran": lambda p: p.q.flags.f_contiguous and not p.q.flags.c_contiguous,
}  # fmt: skip


def default_run(seed: int = 0) -> list[Any]:
    """The named cases, and those that are drawn for a candidate that takes everything."""
    op = OPS["attention"]
    assert op.space is not None
    drawing, cases = Drawing(op.space, seed), list(op.cases)
    for drawn in drawing.rounds(lambda case: True, PAIRS):
        cases += drawn
        for case in drawn:
            drawing.saw(case, True)
    return cases


def conditions_of(case: Any, seed: int = 0) -> frozenset[str]:
    """The conditions that a case's call has; none if it has no pairs."""
    p, _ = as_given(case, seed, Settings())
    return frozenset(n for n, holds in CONDITIONS.items() if min(p.shape) and holds(p))


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    every = list(itertools.combinations(CONDITIONS, 2))
    rng = np.random.default_rng(seed)
    return [every[i] for i in rng.permutation(len(every))[:count]]


def main(count: int = 3000, seed: int = 0) -> None:
    calls = [conditions_of(case, seed) for case in default_run(seed)]
    for name, some in (("named cases", calls[: len(OPS["attention"].cases)]), ("all of a default run", calls)):
        single = [c for c in CONDITIONS if not any(c in call for call in some)]
        missed = [pair for pair in pairs(count, seed) if not any(set(pair) <= call for call in some)]
        found = f"{len(CONDITIONS) - len(single)} are met, of {count} pairs {count - len(missed)}"
        print(f"{name}: of {len(CONDITIONS)} conditions {found}")
        if some is calls:
            print(f"not met: {single}; {missed[:60]}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
