"""Two limits that a kernel cannot beat, measured in the rounds of the rivals and on as many threads.

own   the matrix products that the kernel made, again: the same operands, strides and buffers, on the same threads, with nothing
      between them; and as many exponentials, in blocks that stay in the cache
best  the products that are needed, for allowed pairs alone, at the rate of the best product of any shape; and the
      exponentials that are needed

Slow tiles lower the first limit and are seen in the second. What a kernel multiplies is found by listening: a call is made with
a NumPy that notes every matmul. Products by ``@`` are not heard; where less was heard than the tiles of exponentials call for,
there is no first limit.
"""

from __future__ import annotations

import functools
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

import npattn as na
from benchmarks.cases import Arrays, Case
from benchmarks.harness import Array, Measured, Rival, spread
from benchmarks.machine import threads

BLOCK = 1 << 14  # exponentials at a time
TRIAL = 0.015  # seconds a shape
SHAPES = (  # rows, inner, columns: tiles of attention, and squares, up to what a big product would be cut into
    (128, 64, 512), (256, 64, 512), (256, 512, 64), (512, 64, 512), (256, 128, 512), (256, 512, 128), (512, 512, 128),
    (256, 256, 256), (384, 384, 384), (512, 512, 512), (768, 768, 768), (1024, 1024, 1024),
)  # fmt: skip
ELEMENTWISE = ("exp", "exp2", "tanh")


@functools.cache
def _controller() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController().select(user_api="blas")


def workers() -> int:
    """Threads of Python with a BLAS of one thread each; without threadpoolctl one, and BLAS has its own."""
    return threads() if _controller() else 1


def together(works: Sequence[Callable[[], Any]]) -> list[float]:
    """All of these at once, each on a thread; the seconds that each of them took."""
    seconds, start = [0.0] * len(works), threading.Barrier(len(works))

    def run(number: int) -> None:
        start.wait()
        begin = time.perf_counter()
        works[number]()
        seconds[number] = time.perf_counter() - begin

    with _controller().limit(limits=1) if _controller() else nullcontext():
        others = [threading.Thread(target=run, args=(n,)) for n in range(1, len(works))]
        for thread in others:
            thread.start()
        run(0)
        for thread in others:
            thread.join()
    return seconds


# --- the best rate of any product ----------------------------------------------------------------------------------------


def products(shape: tuple[int, int, int], dtype: str, count: int) -> list[Callable[[], None]]:
    """For each thread so many products of this shape, with operands of its own."""
    m, k, n = shape

    def make() -> Callable[[], None]:
        a, b, out = np.ones((m, k), dtype), np.ones((k, n), dtype), np.empty((m, n), dtype)

        def work() -> None:
            for _ in range(count):
                np.matmul(a, b, out=out)

        return work

    return [make() for _ in range(workers())]


def count_for(shape: tuple[int, int, int], dtype: str) -> int:
    """How many products last about TRIAL seconds."""
    works = products(shape, dtype, 2)
    together(works)
    return max(2, int(2 * TRIAL / max(together(works)[0], 1e-6)))


@functools.cache
def best_product(dtype: str) -> tuple[tuple[int, int, int], int, float]:
    """The shape that runs at the highest rate on all threads, how many of it make a trial, and its FLOP/s."""
    found = []
    for shape in SHAPES:
        count = count_for(shape, dtype)
        works = products(shape, dtype, count)
        mean = min(statistics.mean(together(works)) for _ in range(2))
        found.append((2.0 * np.prod(shape) * count * len(works) / mean, shape, count))
    rate, shape, count = max(found)
    return shape, count, float(rate)


# --- what a kernel computes ----------------------------------------------------------------------------------------------


class Listener:
    """NumPy, except that it notes which products and exponentials are asked for, and by which thread. It does not hear an @."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.products: dict[int, list[tuple[Array, Array, Any]]] = defaultdict(list)
        self.flops = 0.0
        self.shapes: set[tuple[int, ...]] = set()  # of the products
        self.elementwise: dict[str, int] = defaultdict(int)
        self.tiles = 0  # exponentials of arrays of such a shape: the others are one number a query

    def __getattr__(self, name: str) -> Any:
        if name not in ELEMENTWISE:
            return getattr(np, name)

        def counted(x: Any, *args: Any, **options: Any) -> Any:
            with self.lock:
                self.elementwise[name] += np.size(x)
                self.tiles += np.size(x) if np.shape(x) in self.shapes else 0
            return getattr(np, name)(x, *args, **options)

        return counted

    def matmul(self, a: Array, b: Array, *args: Any, **options: Any) -> Any:
        result = np.matmul(a, b, *args, **options)
        given = args[0] if args else options.get("out")
        with self.lock:
            self.products[threading.get_ident()].append((a, b, given if given is None else result))
            self.flops += 2.0 * result.size * a.shape[-1]
            self.shapes.add(result.shape)
        return result

    def replays(self) -> list[Callable[[], None]]:
        return [functools.partial(_replay, calls) for calls in self.products.values()]


def _replay(calls: list[tuple[Array, Array, Any]]) -> None:
    for a, b, out in calls:
        np.matmul(a, b, out=out)


@contextmanager
def listening() -> Iterator[Listener]:
    """All of npattn's modules use a Listener for NumPy; nothing else in the process should use them meanwhile."""
    heard = Listener()
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("npattn.") and getattr(m, "np", None) is np]
    for module in modules:
        vars(module)["np"] = heard
    try:
        yield heard
    finally:
        for module in modules:
            vars(module)["np"] = np


class Limits:
    """Both limits of a computation that consists of phases, one after the other, as forward and backward are."""

    def __init__(
        self, phases: Sequence[Callable[[], Any]], flops: float, exponentials: float, dtype: str, each: float = 0.0
    ) -> None:
        """flops and exponentials are those that are needed; each exponential more comes with ``each`` FLOPs more."""
        self.flops, self.exponentials, self.dtype = flops, exponentials, dtype
        self.heard = []
        for phase in phases:
            with listening() as heard:
                phase()
            self.heard.append(heard)
        self.made = sum(h.flops for h in self.heard)
        self.counts: dict[str, int] = defaultdict(int)
        for h in self.heard:
            for name, count in h.elementwise.items():
                self.counts[name] += count
        # Of a tile that is allowed in part all is computed.
        self.known = self.made >= 0.99 * (flops + each * max(sum(h.tiles for h in self.heard) - exponentials, 0.0))

    def rivals(self) -> list[Rival]:
        found = [Rival("best product", self._needed_products, clock=True)]
        if self.known:
            found.append(Rival("own products", self._own_products, clock=True))
        if self.counts:
            found.append(Rival("exponentials", self._exponentials, clock=True))
        return found

    def _own_products(self) -> float:
        return sum(sum(together(h.replays())) for h in self.heard if h.products) / workers()

    def _needed_products(self) -> float:
        shape, count, _ = best_product(self.dtype)
        works = products(shape, self.dtype, count)
        mean = statistics.mean(together(works))
        return self.flops * mean / (2.0 * float(np.prod(shape)) * count * len(works))

    def _exponentials(self) -> float:
        """Seconds of those that the kernel made, on all threads."""
        return sum(count * _seconds_each(name, self.dtype) for name, count in self.counts.items())

    def fractions(self, m: Measured) -> dict[str, Any]:
        """What part of both limits is reached, round by round as all ratios."""
        if m.base not in m.times:
            return {}
        base, none = m.times[m.base], [0.0] * len(m.times[m.base])
        exps, best, own = (m.times.get(n, none) for n in ("exponentials", "best product", "own products"))
        share = self.exponentials / max(sum(self.counts.values()), 1)  # of those that were made those that are needed
        found: dict[str, Any] = {
            "best": spread([(p + share * e) / t for p, e, t in zip(best, exps, base, strict=True)]),
            "gflops": self.flops / m.median(m.base) / 1e9,
            "best_gflops": self.flops / statistics.median(best) / 1e9,
            "best_shape": best_product(self.dtype)[0],
            "best_limit_gflops": self.flops / statistics.median(p + share * e for p, e in zip(best, exps, strict=True)) / 1e9,
        }
        if self.known:
            found |= {
                "own": spread([(p + e) / t for p, e, t in zip(own, exps, base, strict=True)]),
                "own_limit_gflops": self.flops / statistics.median(p + e for p, e in zip(own, exps, strict=True)) / 1e9,
                "made": self.made / self.flops,
            }
        return found


def _seconds_each(name: str, dtype: str) -> float:
    function = getattr(np, name)
    count = 8 if dtype == "float32" else 4
    works = []
    for seed in range(workers()):
        x = np.random.default_rng(seed).standard_normal(BLOCK).astype(dtype)
        works.append(functools.partial(_apply, function, x, np.empty_like(x), count))
    seconds: float = statistics.mean(together(works))
    return seconds / (BLOCK * count * workers())


def _apply(function: Any, x: Array, out: Array, count: int) -> None:
    for _ in range(count):
        function(x, out=out)


def of_attention(case: Case, x: Arrays) -> Limits:
    mask, kept = case.own_mask(), list[Any]()

    def forward() -> None:
        kept.append(na.blockwise_forward(x.q, x.k, x.v, mask=mask)[1])

    def backward() -> None:
        na.blockwise_backward(x.dout, kept.pop())

    phases, needed = [forward, backward] if case.backward else [forward], case.exponentials()
    return Limits(phases, case.flops(), needed, case.dtype, case.flops() / needed)
