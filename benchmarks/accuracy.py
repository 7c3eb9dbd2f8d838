"""``python -m benchmarks accuracy``: the errors of both kernels in sigma, for inputs that show them.

The two differ in where sum_j p_j dp_j comes from: dense adds it up from p and dp, blockwise takes dout . out, which needs no
second visit of the keys and no two more products. What that costs is the difference of their columns for dq and dk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

import npattn as na
from benchmarks.harness import nobody
from npattn.verify.ops.attention.draw import FAMILIES, draw
from npattn.verify.ops.attention.errors import predict

KERNELS = {
    "dense": (na.attention_forward, na.attention_backward),
    "blockwise": (na.blockwise_forward, na.blockwise_backward),
}
SIZES = {"H": 2, "G": 2, "L": 256, "S": 512, "D": 64, "E": 64}


def errors(family: str, seed: int, sizes: dict[str, int]) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    """(kernel, tensor) -> error / sigma of float32, against dense attention in float64."""
    p = draw((), seed, sizes=sizes, lead=(1,), family=family, dtype=np.float32)
    wide = [x.astype(np.float64) for x in (p.q, p.k, p.v, p.dout)]
    out, cache = na.attention_forward(*wide[:3])
    grads = na.attention_backward(wide[3], cache)
    sigma = predict(cache, out, wide[3], None, grads, dtype=np.float32)
    found = {}
    for name, (forward, backward) in KERNELS.items():
        own, own_cache = forward(p.q, p.k, p.v)
        g = backward(p.dout, own_cache)
        pairs = {"out": (own, out, sigma.out)} | {
            f"d{n}": (getattr(g, n), getattr(grads, n), getattr(sigma, n)) for n in "qkv"
        }
        for tensor, (x, truth, s) in pairs.items():
            found[name, tensor] = np.abs(x.astype(np.float64) - truth) / s
    return found


def main(quick: bool = False, done: Callable[[dict[str, Any]], None] = nobody) -> list[dict[str, Any]]:
    sizes = {**SIZES, "L": 64, "S": 128} if quick else SIZES
    columns = list(itertools.product(KERNELS, ("out", "dq", "dk", "dv")))
    print("error / sigma in float32: root mean square (largest)")
    print(f"{'inputs':12}" + "".join(f"{kernel + ' ' + tensor:>17}" for kernel, tensor in columns))
    rows = []
    for family in FAMILIES:
        runs = [errors(family, seed, sizes) for seed in range(1 if quick else 3)]
        row: dict[str, Any] = {"inputs": family}
        for column in columns:
            x = np.concatenate([r[column].ravel() for r in runs])
            row[" ".join(column)] = [float(np.sqrt(np.square(x).mean())), float(x.max())]
        rows.append(row)
        print(f"{family:12}" + "".join(f"{f'{r:.2f} ({m:.1f})':>17}" for r, m in (row[" ".join(c)] for c in columns)))
        done(row)
    return rows


if __name__ == "__main__":
    main()
