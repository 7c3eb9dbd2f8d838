"""What is blockwise's own: memory, tiles, threads, its three ways through exp, and merging two sets of keys.

Its values under all options are tested beside those of dense attention (test_attention, test_grid, test_error_model).
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

from npattn import (
    Alibi,
    attention_backward,
    attention_forward,
    blockwise,
    blockwise_backward,
    blockwise_forward,
    causal,
    gradcheck,
    key_lengths,
    merge,
    merge_backward,
    merge_forward,
    packed,
    query_lengths,
    segments,
    where,
    window,
)
from npattn.ops import blockwise as tiled
from npattn.ops import threads as parallel
from npattn.ops import tiles as blocks
from npattn.ops.pairs import Bound
from npattn.tolerances import EXP_ULPS, TERMS_EPS

ENDS = 4096 * np.arange(9) * np.arange(1, 10) // 72  # of eight sequences, the last eight times as long as the first
TILE_BYTES = blocks.TILE[0] * blocks.TILE[1] * np.dtype(np.float32).itemsize


class NeverWhole:
    """A mask that refuses to be asked for more than a tile."""

    def __init__(self, mask):
        self.mask = mask

    def bind(self, shape):
        bound = self.mask.bind(shape)

        class Tiles:
            state = staticmethod(bound.state)

            @staticmethod
            def tile(index, rows, cols):
                assert (rows.stop - rows.start) * (cols.stop - cols.start) <= math.prod(blocks.TILE)
                return bound.tile(index, rows, cols)

        return Tiles


def bound(q_shape, k_shape, mask=None):
    q, k = np.zeros(q_shape, np.float32), np.zeros(k_shape, np.float32)
    return tiled.bind("blockwise", q, k, k, mask, None, None, None, None, None)


def peak_beyond_outputs(function):
    """Bytes that were held at the worst moment, less what is returned."""
    tracemalloc.start()
    try:
        returned = function()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    seen, size = set(), 0
    for x in returned:
        if isinstance(x, np.ndarray) and id(x) not in seen:
            seen.add(id(x))
            size += x.nbytes
    return peak - size


@pytest.mark.parametrize(
    ("direction", "mask"),
    [("forward", None), ("forward", window(100, 0)), ("backward", causal()), ("backward", window(100, 0))],
    ids=["forward", "forward-window", "backward-causal", "backward-window"],
)
def test_memory_does_not_grow_with_the_length(direction, mask):
    peaks = []
    for n in (2048, 8192):
        rng = np.random.default_rng(0)
        q, k, v, dout = (rng.standard_normal((n, 16), np.float32) for _ in range(4))
        options = {} if mask is None else {"mask": NeverWhole(mask)}
        _out, cache = blockwise_forward(q, k, v, **options)
        assert cache.weights is None
        if direction == "forward":
            peaks.append(peak_beyond_outputs(lambda q=q, k=k, v=v, o=options: forward_arrays(q, k, v, o)))
        else:
            peaks.append(peak_beyond_outputs(lambda dout=dout, cache=cache: blockwise_backward(dout, cache)[:3]))
    assert max(peaks) <= 16 * TILE_BYTES
    # A copy of out or of dout / total, a few numbers a query and a key, and the plan of the tiles: no more than that grows.
    tiles = (8192**2 - 2048**2) // math.prod(blocks.TILE)
    allowed = (8192 - 2048) * 4 * (16 + 24) + 250 * tiles
    assert peaks[1] - peaks[0] <= allowed, f"{peaks[0]} bytes at 2048, {peaks[1]} at 8192"


@pytest.mark.slow
def test_the_memory_of_a_long_sequence():
    """One head of 65536 tokens, causal, forwards and backwards, in less than 64 MiB beyond inputs and outputs."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 1, 65536, 64), np.float32) for _ in range(4))

    def run():
        out, cache = blockwise_forward(q, k, v, mask=causal())
        return out, cache.lse, *blockwise_backward(dout, cache)[:3]

    assert peak_beyond_outputs(run) < 64 * 2**20


def forward_arrays(q, k, v, options):
    out, cache = blockwise_forward(q, k, v, **options)
    return out, cache.lse


def test_tiles_without_an_allowed_pair_are_not_computed():
    asked = []

    class Counted(NeverWhole):
        def bind(self, shape):
            bound = super().bind(shape)

            class Tiles(bound):
                @staticmethod
                def tile(index, rows, cols):
                    asked.append((rows, cols))
                    return bound.tile(index, rows, cols)

            return Tiles

    x = np.random.default_rng(0).standard_normal((3 * blocks.TILE[1], 4))
    blockwise_forward(x, x, x, mask=Counted(causal()))
    assert sum((r.stop - r.start) * (c.stop - c.start) for r, c in asked) < len(x) ** 2 / 2
    assert all(c.start <= r.stop - 1 for r, c in asked)


@pytest.mark.parametrize(
    ("mask", "most"),
    [
        (causal(), 1.3), (window(1024, 0), 1.3), (window(1024, 1024), 1.3), (key_lengths(1000), 1.3), (None, 1.0),
        (packed([0, 1024, 2048, 4096], [0, 1024, 2048, 4096]), 1.0), (packed([0, 700, 1500, 4096], [0, 700, 1500, 4096]), 1.0),
        (packed(ENDS, ENDS, align="top_left"), 1.3), (causal() & packed(ENDS, ENDS), 1.3),
    ],
    ids=["causal", "window", "window ahead", "key lengths", "none", "packed", "unequal", "packed, causal", "both"],
)  # fmt: skip
def test_the_work_is_that_of_the_pairs_that_are_allowed(mask, most):
    """Elements of the tiles that are computed, over the pairs that the mask allows, at L = S = 4096."""
    x = np.zeros((8, 4096, 64), np.float32)
    c = tiled.bind("blockwise", x, x, x, mask, None, None, None, None, None)
    computed = sum(
        (block.rows.stop - block.rows.start) * (block.cols.stop - block.cols.start)
        for rows in blocks.tiles_of(c)[0]
        for block in itertools.chain(*blocks.plan(c, blocks.bundles(c)[0], rows, blocks.tiles_of(c)[1]))
    )
    pairs = 4096 * 4096 if mask is None else int(mask.bind((4096, 4096)).dense().sum())
    assert pairs <= computed <= most * pairs


def covered(mask, L, S, tile, parts, tasks=0):
    """How often each pair is computed, which are not masked, and what is allowed."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(blocks, "TILE", tile)
        m.setattr(blocks, "PARTS", parts)
        c = bound((L, 3), (S, 3), mask)
        computed, unmasked = np.zeros((L, S), int), np.zeros((L, S), bool)
        if tasks:
            m.setattr(blocks, "TASKS", tasks)
            m.setattr(blocks, "SMALL", 0)
        of_rows, of_cols = blocks.tiles_of(c)
        for rows in of_rows:
            for block in itertools.chain(*blocks.plan(c, blocks.bundles(c)[0], rows, of_cols)):
                computed[block.rows, block.cols] += 1
                unmasked[block.rows, block.cols] = True
                unmasked[block.some, block.cols] = False
        return computed, unmasked, c.mask.dense()


@pytest.mark.parametrize("seed", range(60))
def test_blocks_are_apart_and_hold_all_that_is_allowed(seed):
    """Random parts that are empty, full or neither, and packed sequences: each pair is computed at most once."""
    rng = np.random.default_rng(seed)
    L, S = (int(n) for n in rng.integers(1, 60, 2))
    states = rng.choice([0, 1, 2], (20, 20), p=[[0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.6, 0.2, 0.2]][seed % 3])
    for j in range(1, 20):
        if rng.random() < 0.5:  # like the keys before, but for some queries
            n = rng.integers(1, 21)
            states[:n, j] = states[:n, j - 1]
    dense = states.repeat(3, 0).repeat(3, 1)[:L, :S]
    dense = (dense == 2) | ((dense == 1) & (rng.random((L, S)) < 0.5))
    q_ids, k_ids = (np.sort(rng.integers(0, 5, n)) for n in (L, S))
    mask = [dense, segments(q_ids, k_ids), segments(q_ids, k_ids) & dense, window(L // 4, 2, align="top_left")][seed % 4]
    rows, cols = (int(n) for n in rng.integers(1, 9, 2))  # parts of a tile, first as large as the states
    tile = (3 * rows, 3 * cols) if seed < 40 else (2 * rows, 5 * cols)
    computed, unmasked, whole = covered(mask, L, S, tile, (rows, cols), int(rng.integers(0, 9)))
    assert computed.max() <= 1
    assert (computed[whole] == 1).all()
    assert whole[unmasked].all()


@pytest.mark.parametrize("before", [(1, 2, 0, 0), (1, 2, 1, 2), (2, 2, 2, 2), (0, 0, 1, 2), (1, 2, 2, 1)])
@pytest.mark.parametrize("state", [(1, 2, 1, 2), (1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 2, 0)])
def test_a_block_in_two_pieces_beside_any_other(before, state):
    """0 empty, 1 partial, 2 full, from the first queries to the last."""
    half = np.tile([True, False], (2, 1))
    kinds = [np.zeros((2, 2), bool), half, np.ones((2, 2), bool)]
    mask = np.hstack([np.vstack([kinds[x] for x in column]) for column in (before, state)])
    computed, unmasked, whole = covered(mask, 8, 4, (8, 4), (4, 2))
    assert computed.max() <= 1
    assert (computed[whole] == 1).all()
    assert whole[unmasked].all()


# --- threads --------------------------------------------------------------------------------------------------------------


@contextmanager
def threads(monkeypatch, n):
    """As if BLAS had n threads, and nothing were too small for them."""

    class Blas:
        @contextmanager
        def alone(self):
            yield n

        def own(self):
            pass

    with monkeypatch.context() as m:
        m.setattr(parallel, "BLAS", Blas())
        m.setattr(blocks, "SMALL", 0)
        m.setattr(tiled, "LIGHT", 0)
        yield m


OPTIONS = {
    "one head": ((1, 1), {"mask": causal()}),
    "heads": ((2, 4), {}),
    "grouped, causal": ((1, 2), {"mask": causal(), "softcap": 2.0}),
    "bias": ((1, 2), {"mask": window(700, 0)}),
    "Alibi": ((2, 4), {"bias": Alibi(np.float32([0.5, 0.25, 0.125, 0.0625])), "mask": causal()}),
    "packed": ((2, 2), {"mask": packed([0, 100, 700, 1300], [0, 100, 700, 1300], "top_left"), "sink": np.float32([0, 1])}),
    "small heads": ((12, 24), {"mask": causal(), "bias": Alibi(np.float32(np.arange(24) / 24))}),
    "a few queries": ((3, 12), {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_result_does_not_depend_on_the_number_of_threads(name, monkeypatch):
    (G, H), options = OPTIONS[name]
    rng = np.random.default_rng(0)
    L, S = {"small heads": (90, 90), "a few queries": (2, 5000)}.get(name, (1300, 1300))
    q, k, v, dout = (rng.standard_normal((1, h, n, 8), np.float32) for h, n in ((H, L), (G, S), (G, S), (H, L)))
    if name == "bias":
        options = {**options, "bias": rng.standard_normal((1, H, 1, L), np.float32)}
    results = []
    for n in (1, 2, 5):
        with threads(monkeypatch, n):
            (out, lse), cache = blockwise_forward(q, k, v, return_lse=True, **options)
            g = blockwise_backward(dout, cache, lse)
        found = (getattr(x, "parameter", x) for x in (out, lse, *g) if x is not None)
        results.append([np.asarray(x).tobytes() for x in found])
    assert results[0] == results[1] == results[2]


def test_blas_gets_its_threads_back():
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="needs the fast extra: pip install npattn[fast]")
    x = np.random.default_rng(0).standard_normal((4, 300, 8), np.float32)
    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    before = [lib.num_threads for lib in libraries]
    seen = []

    class Looks(NeverWhole):
        def bind(self, shape):
            seen.append([lib.num_threads for lib in libraries])
            return super().bind(shape)

    runs = [threading.Thread(target=blockwise_forward, args=(x, x, x), kwargs={"mask": causal()}) for _ in range(6)]
    for t in runs:
        t.start()
    for t in runs:
        t.join()
    assert [lib.num_threads for lib in libraries] == before
    with parallel.BLAS.alone() as n:
        assert n == max(before)
        assert {lib.num_threads for lib in libraries} == {1}
        with parallel.BLAS.alone() as inner:
            assert inner == n
        assert {lib.num_threads for lib in libraries} == {1}
    assert [lib.num_threads for lib in libraries] == before


FROM_OTHER_THREADS = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import threadpoolctl
from npattn import blockwise_forward, where

(blas, *_) = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
x, seen = np.random.default_rng(0).standard_normal((2, 6, 600, 16), np.float32), []
mask = where(lambda i, j: (seen.append(blas.num_threads), j <= i)[1])

def call(seconds):
    time.sleep(seconds)
    seen.clear()
    return blockwise_forward(x, x, x, mask=mask)[0].tobytes()

first = call(0)
print(set(seen[2:]), end=" ")  # at first it is only bound
with threadpoolctl.threadpool_limits(2), ThreadPoolExecutor(1) as pool:  # this thread is in charge, and stays so
    print(pool.submit(call, 0).result() == first, set(seen[2:]), end=" ")
    blas.set_num_threads(1)
    print(blas.num_threads, end=" ")
blas.set_num_threads(2)
with ThreadPoolExecutor(3) as pool:
    print(pool.submit(call, 0).result() == first, set(seen[2:]), end=" ")  # one thread called before, and is alive
    list(pool.map(call, (0, 0.01, 0.02)))  # who begins does not end
    print(blas.num_threads, end=" ")
print(call(0) == first, set(seen[2:]), blas.num_threads)
"""


def test_blas_is_limited_and_freed_whoever_calls():
    pytest.importorskip("threadpoolctl", reason="needs the fast extra: pip install npattn[fast]")
    done = subprocess.run(
        [sys.executable, "-c", FROM_OTHER_THREADS], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.stdout.split() == ["{1}", "True", "{1}", "1", "True", "{1}", "2", "True", "{1}", "2"], done.stdout + done.stderr


@pytest.mark.parametrize("layer", ["openmp", "pthreads"])
def test_blas_has_one_thread_in_each_of_ours(layer, monkeypatch):
    """Also where it counts for each thread by itself, and new threads begin with all."""

    class Library:
        threading_layer, numbers = layer, dict[int, int]()

        def key(self):
            return threading.get_ident() if layer == "openmp" else 0

        @property
        def num_threads(self):
            return self.numbers.get(self.key(), 3)

        def set_num_threads(self, n):
            self.numbers[self.key()] = n

    library, seen, turns = Library(), set(), threading.Barrier(3)
    monkeypatch.setattr(parallel, "libraries", lambda: [library])
    monkeypatch.setattr(parallel, "BLAS", parallel._Blas())

    def work(task, own):
        turns.wait(10)
        seen.add((threading.get_ident(), library.num_threads))

    parallel.share(work, range(3), list)
    assert [n for _, n in seen] == [1, 1, 1]
    assert library.num_threads == 3


def test_without_threadpoolctl_there_is_one_thread_of_ours(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    blas = parallel._Blas()
    with blas.alone() as n:
        assert n == 1
    monkeypatch.setattr(parallel, "BLAS", blas)
    x = np.random.default_rng(0).standard_normal((2, 300, 8))
    out, cache = blockwise_forward(x, x, x)
    assert np.isfinite(out).all()
    assert np.isfinite(blockwise_backward(out, cache).q).all()


def test_blas_is_looked_for_once_by_many_threads(monkeypatch):
    asked = []
    blas = parallel._Blas()
    monkeypatch.setattr(parallel, "libraries", lambda: (asked.append(1), time.sleep(0.05), [])[2])

    def use():
        with blas.alone():
            pass

    runs = [threading.Thread(target=use) for _ in range(4)]
    for t in runs:
        t.start()
    for t in runs:
        t.join()
    assert asked == [1]


@pytest.mark.parametrize("where", ["buffers", "work"])
def test_an_error_anywhere_ends_all_tasks(where, monkeypatch):
    begun, done, waiting, turns = [], [], [], parallel.Turns()

    def buffers():
        begun.append(threading.get_ident())
        if where == "buffers" and len(begun) == 3:
            raise MemoryError("no tiles")

    def work(task, own):
        time.sleep(0.001)
        if where == "work" and task > 9:
            raise MemoryError("no tiles")
        if not waiting:
            waiting.append(task)
            turns.wait("never", 1)  # waits for a turn that does not come
        done.append(task)

    with threads(monkeypatch, 3), pytest.raises(MemoryError, match="no tiles"):
        parallel.share(work, range(1000), buffers, turns)
    assert len(done) < 1000
    assert threading.active_count() == 1


INTERRUPTED = """
import signal, threading, time
from contextlib import contextmanager
from npattn.ops import threads as parallel, tiles as blocks

class Blas:
    @contextmanager
    def alone(self):
        yield 3
        print("BLAS has its threads back")

    def own(self):
        pass

signal.signal(signal.SIGINT, signal.default_int_handler)  # where this was started in the background it is ignored
parallel.BLAS, main, done, busy, turns = Blas(), threading.main_thread(), [], [], parallel.Turns()

def interrupt():
    signal.pthread_kill(main.ident, signal.SIGINT)

def work(task, own):
    busy.append(task)
    try:
        time.sleep(0.001)
        done.append(task)
        first = threading.current_thread() is main
        if WHEN == "has nothing more to do" and not first:  # and another goes on
            time.sleep(0.3)
            interrupt()
            time.sleep(0.3)
        elif WHEN == "waits" and first:
            turns.wait("never", 1)
        elif task == 30:
            interrupt()
    finally:
        busy.remove(task)

try:
    parallel.share(work, range(2 if WHEN == "has nothing more to do" else 10**5), list, turns)
except KeyboardInterrupt:
    print("ended", len(done) < 10**5, busy)
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends no signals to a thread")
@pytest.mark.parametrize("when", ["works", "waits", "has nothing more to do"])
def test_an_interrupt_of_the_first_thread_ends_all(when):
    code = INTERRUPTED.replace("WHEN", repr(when))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["BLAS has its threads back", "ended True []"], done.stderr


@pytest.mark.parametrize(("size", "starts"), [(64, (0, 0)), (1300, (1, 1)), (40000, (1, 3))])
def test_what_is_small_starts_no_thread(size, starts, monkeypatch):
    """Forwards, and backwards; there, what is done once a query has threads of its own where that is much."""
    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self), start(self))[1])
    x = np.random.default_rng(0).standard_normal((4, size, 8), np.float32)
    with threads(monkeypatch, 2) as m:
        m.setattr(blocks, "SMALL", 1 << 25)
        m.setattr(tiled, "LIGHT", 1 << 20)
        out, cache = blockwise_forward(x, x[:, :1300], x[:, :1300])
        forward = len(started)
        blockwise_backward(out, cache)
    assert (forward, len(started) - forward) == starts


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_caller_may_write_into_out_and_only_the_forward_of_a_backward_keeps_a_copy(dtype):
    q, k, v, dout = (x.astype(dtype) for x in inputs(L=40))
    out, cache = blockwise_forward(q, k, v, return_lse=False)
    want = blockwise_backward(dout, cache)
    out[...] = np.nan
    for a, b in zip(want, blockwise_backward(dout, cache), strict=True):
        assert a is b is None or np.array_equal(a, b)
    if dtype == np.float32:
        plain, kept = tiled.attend_all(bound(q.shape, k.shape), keep=False)
        assert kept.kept.out is plain
    plain, lse = blockwise(q, k, v, return_lse=True)
    (again, same), _ = blockwise_forward(q, k, v, return_lse=True)
    assert (plain.dtype, lse.dtype) == (again.dtype, same.dtype)
    assert plain.tobytes() == again.tobytes()
    assert lse.tobytes() == same.tobytes()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_error_in_one_thread_ends_all_and_is_raised(direction, monkeypatch):
    class Fails(NeverWhole):
        on = False

        def bind(self, shape):
            bound, outer = self.mask.bind(shape), self

            class Tiles:
                states = staticmethod(bound.states)
                state = staticmethod(bound.state)

                @staticmethod
                def tile(index, rows, cols):
                    if outer.on and index == (1,):
                        raise ZeroDivisionError("of the mask")
                    return bound.tile(index, rows, cols)

            return Tiles

    x, mask = np.random.default_rng(0).standard_normal((2, 1100, 8), np.float32), Fails(causal())
    with threads(monkeypatch, 3):
        mask.on = direction == "forward"
        with pytest.raises(ZeroDivisionError) if mask.on else threads(monkeypatch, 3):
            _, cache = blockwise_forward(x, x, x, mask=mask)
        if direction == "backward":
            mask.on = True
            with pytest.raises(ZeroDivisionError, match="of the mask"):
                blockwise_backward(x, cache)
    assert threading.active_count() == 1


# --- heads together -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "mask"),
    [
        ((64, 8, 32, 4), (64, 8, 32, 4), None), ((2, 3, 12, 64, 4), (2, 3, 4, 64, 4), None),
        ((7, 5, 40, 4), (7, 1, 40, 4), None), ((16, 512, 4), (16, 512, 4), causal()),
        ((4, 600, 4), (4, 600, 4), None), ((1, 32, 1, 4), (1, 8, 4096, 4), None),
        ((16, 64, 4), (2, 64, 4), None),
        ((600, 4), (600, 4), None), ((2, 0, 8, 4), (2, 0, 8, 4), None), ((9, 3, 8, 4), (9, 3, 8, 4), causal()),
    ],
    ids=str,
)  # fmt: skip
def test_each_head_is_in_one_bundle_and_groups_are_whole(q_shape, k_shape, mask):
    c = bound(q_shape, k_shape, mask)
    heads, groups = np.zeros(q_shape[:-2], int), np.zeros(k_shape[:-2], int)
    rank = len(q_shape) - 2
    for bundle in blocks.bundles(c):
        heads[bundle.index] += 1
        groups[bundle.group] += 1
        assert heads[bundle.index].size * groups.size == groups[bundle.group].size * heads.size or heads[bundle.index].ndim == 0
        number = np.arange(q_shape[-3] if rank else 1)
        assert np.array_equal(np.broadcast_to(number, q_shape[:-2] or (1,))[bundle.index or 0], bundle.names)
        assert [tuple(x) for x in np.ndindex(q_shape[:-2]) if np.all(mark(q_shape[:-2], x)[bundle.index].any())] == (
            blocks.each_index(c, bundle)
        )
    assert (heads == 1).all()
    assert (groups >= 1).all()


def mark(shape, index):
    found = np.zeros(shape, bool)
    found[index] = True
    return found


def test_small_heads_are_computed_together_and_large_ones_are_not():
    assert len(blocks.bundles(bound((64, 8, 32, 4), (64, 8, 32, 4)))) < 64
    assert len(blocks.bundles(bound((64, 512, 4), (64, 512, 4), causal()))) < 64
    assert len(blocks.bundles(bound((64, 1024, 4), (64, 1024, 4)))) == 64
    assert len(blocks.bundles(bound((32, 1, 4), (8, 8192, 4)))) == 8  # a group at a time
    assert len(blocks.bundles(bound((32, 1, 4), (32, 8192, 4)))) == 16  # few queries, but many keys
    assert len(blocks.bundles(bound((64, 512, 4), (64, 512, 4)))) == len(blocks.bundles(bound((64, 512, 32), (64, 512, 32))))
    assert len(blocks.bundles(bound((64, 512, 64), (64, 512, 64)))) == 16
    assert len(blocks.bundles(bound((8, 600, 64), (2, 600, 64)))) == 8  # two would fit, and a group is not divided


def test_long_heads_are_computed_together_if_their_blocks_are_small_and_the_same():
    shape, ends = (8, 4096, 64), np.arange(0, 4097, 512)
    assert len(blocks.bundles(bound(shape, shape, packed(ends, ends)))) == 2
    assert len(blocks.bundles(bound(shape, shape, packed([0, 4096], [0, 4096])))) == 4
    assert len(blocks.bundles(bound(shape, shape, np.ones((8, 1, 4096), bool)))) == 8  # each has a mask of its own
    many, long = np.arange(0, 1025, 32), (64, 1024, 64)  # not as many heads as for tiles of 32 rows: tiles are larger
    assert len(blocks.bundles(bound(long, long, packed(many, many)))) == 16
    assert len(blocks.bundles(bound(shape[1:], shape[1:], packed(ends, ends)))) == 1
    assert len(blocks.bundles(bound((2, 4096, 64), (2, 4096, 64), packed(ends, ends)))) == 2  # something to share


@pytest.mark.parametrize(
    ("H", "L", "tiles"), [(1, 1024, 4), (1, 2048, 4), (1, 8192, 8), (2, 2048, 4), (4, 1024, 2), (8, 1024, 1)]
)
def test_few_heads_leave_enough_to_share(H, L, tiles):
    """Tiles of queries forwards, and of keys backwards."""
    rows, cols = blocks.tiles_of(bound((H, L, 64), (H, L, 64), causal()))
    assert len(rows) == tiles
    assert len(cols) >= tiles


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("lead", [(), (6,), (2, 6)])
def test_products_of_grouped_heads(rows, lead):
    rng = np.random.default_rng(0)
    groups = (*lead[:-1], 3) if lead else ()
    x, y = rng.standard_normal((*lead, rows, 5)), rng.standard_normal((*groups, 50, 5))
    z = rng.standard_normal((*lead, rows, 50))
    each = np.repeat(y, 2, axis=-3) if lead else y  # of each head
    got = tiled.dots(x, y, np.empty((*lead, rows, 50)))
    assert np.allclose(got, np.einsum("...ld,...sd->...ls", x, each))
    assert np.allclose(tiled.times(z, y, np.empty((*lead, rows, 5))), np.einsum("...ls,...sd->...ld", z, each))
    sums = np.einsum("...ls,...ld->...sd", z, x)
    if lead:
        sums = sums.reshape(*lead[:-1], 3, 2, 50, 5).sum(-3)
    assert np.allclose(tiled.sum_rows(z, x, np.empty((*groups, 50, 5))), sums)


def test_what_is_the_same_for_all_heads_is_asked_for_once():
    """A mask without heads: as many tiles as for one head."""
    asked = []

    class Counted(NeverWhole):
        def bind(self, shape):
            inner = causal().bind(shape)

            class Tiles(Bound):
                states, varies = staticmethod(inner.states), staticmethod(inner.varies)

                def tile(self, index, rows, cols):
                    asked.append((rows, cols))
                    return inner.tile(index, rows, cols)

            return Tiles()

    x = np.random.default_rng(0).standard_normal((6, 1100, 4), np.float32)
    counts = []
    for heads in (1, 6):
        asked.clear()
        blockwise_forward(x[:heads], x[:heads], x[:heads], mask=Counted(causal()))
        counts.append(len(asked))
    assert 0 < counts[1] <= 2 * counts[0]  # once a thread


# --- three ways through exp -----------------------------------------------------------------------------------------------


def near_dense(q, k, v, dout, bound=1e-4, **options):
    """Against dense attention in float64, relative to the largest element; which ways were gone."""
    ways = []
    plain = tiled.attend

    def attend(c, heads, rows, blocks, tiles, a, steady):
        found = plain(c, heads, rows, blocks, tiles, a, steady)
        ways.append((steady, found is not None))
        return found

    with pytest.MonkeyPatch.context() as m:
        m.setattr(tiled, "attend", attend)
        (out, lse), cache = blockwise_forward(q, k, v, return_lse=True, **options)
    grads = blockwise_backward(dout, cache)
    wide = [x.astype(np.float64) for x in (q, k, v, dout)]
    (want, want_lse), reference = attention_forward(*wide[:3], return_lse=True, **options)
    expected = attention_backward(wide[3], reference)
    for got, true in zip((out, lse, *grads[:3]), (want, want_lse, *expected[:3]), strict=True):
        assert np.isfinite(got).all()
        assert np.abs(got - true).max() <= bound * np.abs(true).max()
    return set(ways)


def inputs(seed=0, L=600, D=16, **size):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, L, D), np.float32) * np.float32(size.get(n, 1)) for n in ("q", "k", "v", "dout")]


def first_rows_see_less(L, S):
    """The first 8 queries see one key alone, the next 8 all; every third of the others sees every second key."""
    allowed = np.ones((L, S), bool)
    allowed[:8, 1:], allowed[16::3, 1::2] = False, False
    return allowed


@pytest.mark.parametrize(
    "mask",
    [np.random.default_rng(0).random((2, 40, 8)) < np.array([0.9, 0.5])[:, None, None], first_rows_see_less(40, 24),
     key_lengths(5), causal(offset=3) | key_lengths(2), window(20, 4, align="top_left")],
    ids=["each head its own", "rows that see less", "key lengths", "offset", "window"],
)  # fmt: skip
def test_what_is_kept_of_a_mask_is_used_where_it_holds(mask, monkeypatch):
    """Tiles of 16, 16 and 8 queries of one head after the other, in one thread: what was kept of one meets the next."""
    for name, value in (("TILE", (16, 8)), ("PARTS", (2, 1)), ("LONG", 16), ("BUNDLE", 0), ("TASKS", 1)):
        monkeypatch.setattr(blocks, name, value)
    q, _, _, dout = inputs(L=40, D=4)
    _, k, v, _ = inputs(L=mask.shape[-1] if isinstance(mask, np.ndarray) else 24, D=4)
    if isinstance(mask, np.ndarray):
        mask[..., 0] = True  # nobody is without a key
    with threads(monkeypatch, 1):
        near_dense(q, k, v, dout, mask=mask)


def test_a_query_without_a_key_is_known_as_one_beside_others_with_some():
    """total is 0, so that the backward takes it for what it is and leaves no head to attention."""
    q, k, v, _ = inputs(L=600)
    _, cache = blockwise_forward(q, k, v, mask=~key_lengths(600) | causal(offset=-3))
    assert (cache.kept.total[:, :3] == 0).all()
    # What total makes good is an error of lse: of the logarithm, by a unit in its last place. Rounding total is another eps.
    off = np.abs(cache.kept.total[:, 3:].astype(np.float64) - 1)
    assert (off <= (np.abs(cache.lse[:, 3:]) + 1) * np.finfo(np.float32).eps).all()


@pytest.mark.parametrize("hidden", ["k", "v"])
def test_a_key_that_is_seen_and_not_finite_is_found_beside_a_hidden_one(hidden):
    q, k, v, _ = inputs(L=600)
    _, cache = blockwise_forward(q, k, v, mask=key_lengths(500))
    of_rows, of_cols = blocks.tiles_of(cache)
    bundles, tiles = blocks.bundles(cache), tiled.Tiles(cache.computing)

    def found():
        return [tiled.all_seen_are_finite(cache, heads, [blocks.plan(cache, heads, rows, of_cols) for rows in of_rows], tiles)
                for heads in bundles]  # fmt: skip

    assert all(found())
    {"k": k, "v": v}[hidden][0, 550] = np.inf  # the cache has these arrays
    assert all(found())
    {"k": v, "v": k}[hidden][0, 450] = np.inf
    assert not all(found())


def test_scores_of_ordinary_size_need_no_shift():
    assert near_dense(*inputs()) == {(True, True)}
    assert near_dense(*inputs(), mask=causal()) == {(True, True)}


@pytest.mark.parametrize("mean", [6.0, -6.0])
def test_scores_beyond_the_range_of_exp_are_shifted(mean):
    """All near 144, or near -144: exp overflows, or all of it is lost."""
    q, k, v, dout = inputs()
    q, k = np.abs(q) * np.float32(0.01) + np.float32(mean), np.abs(k) * np.float32(0.01) + np.float32(6)
    assert near_dense(q, k, v, dout, bound=1e-2) == {(True, False), (False, True)}


def test_one_row_that_needs_a_shift():
    q, k, v, dout = inputs()
    q[0, 300] *= 100
    assert (False, True) in near_dense(q, k, v, dout, bound=1e-3)


def test_large_values_overflow_without_a_shift_alone():
    q, k, v, dout = inputs(q=3, k=3)
    ways = near_dense(q, k, v * np.float32(1e15), dout * np.float32(1e-15), bound=1e-2)
    assert (False, True) in ways


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_nobody_sees_does_not_change_the_way(bad):
    q, k, v, dout = inputs()
    mask = key_lengths(300) & causal()
    clean = blockwise_forward(q, k, v, mask=mask)
    grads = blockwise_backward(dout, clean[1])
    k[:, 300:], v[:, 300:] = bad, -bad
    out, cache = blockwise_forward(q, k, v, mask=mask)
    assert out.tobytes() == clean[0].tobytes()
    assert not np.isnan(cache.kept.total).any()
    for got, want in zip(blockwise_backward(dout, cache)[:3], grads[:3], strict=True):
        assert got.tobytes() == want.tobytes()


def test_a_hidden_pair_whose_dout_v_overflows_gives_nothing():
    q, k, v, dout = inputs(L=8)
    v[:, 7], dout[:, 2] = 3e30, 1e20  # dout_2 . v_7 is inf, and query 2 does not see key 7
    grads = blockwise_backward(dout, blockwise_forward(q, k, v, mask=causal())[1])
    wide = [x.astype(np.float64) for x in (q, k, v)]
    expected = attention_backward(dout.astype(np.float64), attention_forward(*wide, mask=causal())[1])
    for got, true in zip(grads[:3], expected[:3], strict=True):
        assert np.abs(got - true).max() <= 64 * np.finfo(np.float32).eps * np.abs(true).max()


def test_a_nan_that_is_seen_is_left_to_attention():
    q, k, v, dout = inputs()
    v[0, 100] = np.nan
    out, cache = blockwise_forward(q, k, v, mask=causal())
    want, reference = attention_forward(q, k, v, mask=causal())
    assert np.array_equal(np.isnan(out), np.isnan(want))
    assert np.isnan(out[0, 100:]).all()
    assert np.isfinite(out[0, :100]).all()
    grads, expected = blockwise_backward(dout, cache), attention_backward(dout, reference)
    for got, true in zip(grads[:3], expected[:3], strict=True):
        assert np.array_equal(np.isnan(got), np.isnan(true))


@pytest.mark.parametrize(("name", "value"), [("k", -np.inf), ("k", np.inf), ("v", np.inf), ("k", np.nan), ("q", np.inf)])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0}, {"sink": np.float32([0.5, 1])}, {"mask": causal()}, {"softcap": 2.0, "mask": causal()}],
    ids=str,
)
def test_what_is_seen_and_not_finite_is_as_in_attention(name, value, options):
    """Also where nothing shows it: a score of -inf has weight 0, and a softcap makes a number of inf."""
    q, k, v, dout = (np.abs(x) for x in inputs(L=40))
    q = q[:, :, :4].copy()
    k, v, dout = k[:, :, :4].copy(), v[:, :, :4].copy(), dout[:, :, :4].copy()
    {"q": q, "k": k, "v": v}[name][0, 7, 2] = value
    (out, lse), cache = blockwise_forward(q, k, v, return_lse=True, **options)
    (want, want_lse), reference = attention_forward(q, k, v, return_lse=True, **options)
    grads, expected = blockwise_backward(dout, cache), attention_backward(dout, reference)
    for got, true in zip((out, lse, *grads[:3]), (want, want_lse, *expected[:3]), strict=True):
        assert np.array_equal(np.isfinite(got), np.isfinite(true))
        eps = np.finfo(np.float32).eps
        assert np.allclose(got, true, 64 * eps, 64 * eps, equal_nan=True)


def test_half_precision_is_summed_up_in_single_where_attention_takes_over(monkeypatch):
    monkeypatch.setattr(tiled, "FEW", 40)  # a query at a time
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 300, 8)).astype(np.float16) for _ in range(4))
    v[0, 299, 0] = np.inf  # the last query alone sees it
    got = blockwise_backward(dout, blockwise_forward(q, k, v, mask=causal())[1])
    want = attention_backward(dout, attention_forward(q, k, v, mask=causal())[1])
    error = np.abs(got.v.astype(float) - want.v.astype(float))[0, :299]
    assert error.max() <= 2 * np.finfo(np.float16).eps * np.abs(want.v[0, :299].astype(float)).max()


LAYOUTS = {
    "C": lambda x: x,
    "F": np.asfortranarray,
    "between others": lambda x: np.concatenate([x, x], 1)[:, : x.shape[1]],
    "backwards": lambda x: x[::-1],
    "the same row": lambda x: np.broadcast_to(x[0], x.shape),
}


@pytest.mark.parametrize("L", [1, 2, 40, 1540])
@pytest.mark.parametrize("D", [3, 8, 63, 64])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize(("S", "layout"), [(7, "C"), (600, "C"), *((20, layout) for layout in LAYOUTS)])
def test_weights_of_large_scores_add_up_to_1_backwards(L, D, size, S, layout):
    """sum_j dv_j = sum_i dout_i: the weights of the backward are those of the forward, whatever the rounding of a score."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((n, D), np.float32) for n in (L, S, S, L))
    q *= np.float32(size)
    k = LAYOUTS[layout](k)
    got = blockwise_backward(dout, blockwise_forward(q, k, v)[1])
    wide = dout.astype(np.float64)
    assert (np.abs(got.v.sum(0, np.float64) - wide.sum(0)) <= 3 * np.finfo(np.float32).eps * np.abs(wide).sum(0)).all()


def among_others(x):
    """x as a field of records: rows of an odd number of bytes."""
    records = np.zeros(x.shape[:-1], np.dtype([("x", x.dtype, x.shape[-1:]), ("tag", np.int8)]))
    records["x"] = x
    return records["x"]


@pytest.mark.parametrize("D", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("L", [1, 2, 513])
@pytest.mark.parametrize("S", [20, 300])
@pytest.mark.parametrize("layout", [
    lambda x: x, lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1), among_others, lambda x: x[:, ::-1],
    lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
], ids=["by heads", "heads in a row", "among others", "backwards", "columns"])  # fmt: skip
def test_the_weights_backwards_are_those_of_the_forward(layout, S, L, D):
    """To the last bits, though scores of 1e6 are rounded by 0.1: BLAS has to get the same arrays, or copies, both times."""
    rng, heads = np.random.default_rng(0), 60 if L < 3 else 3
    q, k = (1e3 * rng.standard_normal((heads, n, D), np.float32) for n in (L, S))
    k = layout(k)
    weights = blockwise(q, k, np.broadcast_to(np.eye(S, dtype=np.float32), (heads, S, S)))
    _, cache = blockwise_forward(q, k, np.zeros((heads, S, L), np.float32))
    dv = blockwise_backward(np.broadcast_to(np.eye(L, dtype=np.float32), (heads, L, L)), cache).v
    # exp on each side; the difference that it is of, the total and the quotient, by half an eps each, of a weight of at most 1.
    assert np.abs(weights - dv.swapaxes(1, 2)).max() <= (2 * EXP_ULPS + 2) * np.finfo(np.float32).eps
    assert cache.k is k


@pytest.mark.parametrize("options", [{}, {"softcap": 1000.0}, {"sink": np.float32([-1e9])}])
@pytest.mark.parametrize(
    ("q", "k", "scale"), [(1e30, [-1e-30, -3e-30], 1e10), (1e20, [2e-38, 9e-38], 1e20), (3e38, [-1, 2], 2.0)]
)
def test_scale_q_may_overflow_where_the_scores_do_not(q, k, scale, options):
    q, k, v, dout = (np.asarray(x, np.float32).reshape(-1, 1) for x in (q, k, [1, 3], 1))
    (out, lse), cache = blockwise_forward(q, k, v, scale=scale, return_lse=True, **options)
    (want, want_lse), reference = attention_forward(q, k, v, scale=scale, return_lse=True, **options)
    grads, expected = blockwise_backward(dout, cache), attention_backward(dout, reference)
    for got, true in zip((out, lse, *grads[:3]), (want, want_lse, *expected[:3]), strict=True):
        assert np.array_equal(got, true, equal_nan=True), "it is left to attention"


def test_scale_q_may_overflow_where_nobody_sees_it(monkeypatch):
    monkeypatch.setattr(tiled, "attend_by_rows", None)  # which is slow
    q, k, v, _ = inputs(L=40)
    q[:, 30:] = 3e38
    out, lse = blockwise(q, k, v, mask=query_lengths(30), scale=4.0, return_lse=True)
    assert np.isfinite(out).all()
    assert (lse[:, 30:] == -np.inf).all()


def test_a_bias_and_a_dropout_mask_are_not_copied():
    L, D = 2048, 8
    x, pairs = np.ones((1, L, D), np.float16), L * L
    bias, drop = np.zeros((L, L), np.float16), np.broadcast_to(np.float32(1), (4, L, L))
    assert peak_beyond_outputs(lambda: (blockwise(x, x, x, bias=bias),)) < pairs
    y = np.ones((4, L, D), np.float32)
    assert peak_beyond_outputs(lambda: (blockwise(y, y, y, dropout_mask=drop),)) < 2 * pairs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_left_to_attention_does_not_depend_on_the_number_of_threads(dtype, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((3, 600, 8)).astype(dtype) for _ in range(4))
    q[:, 5, 0] = np.nan
    results = []
    for n in (1, 3):
        with threads(monkeypatch, n):
            results.append(blockwise_backward(dout, blockwise_forward(q, k, v)[1]))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(results[0][:3], results[1][:3], strict=True))


def test_a_mask_without_states_is_asked_for_some_pairs_at_a_time():
    most = []
    mask = where(lambda i, j: (most.append(i.size * j.size), j % 3 != i % 2)[1])
    x = np.zeros((2, 6000, 4), np.float32)
    blockwise_forward(x[:, :300], x, x, mask=mask)
    assert max(most) <= 2 * math.prod(blocks.TILE)


def test_the_cache_of_attention_is_refused():
    x = np.ones((3, 2))
    out, cache = attention_forward(x, x, x)
    with pytest.raises(ValueError, match="blockwise: cache is that of the other forward, expected that of blockwise_forward"):
        blockwise_backward(out, cache)


def test_what_is_returned_may_be_written_on():
    q, k, v, dout = inputs()
    out, cache = blockwise_forward(q, k, v)
    before = blockwise_backward(dout, cache)
    out[:] = 7
    assert all(np.array_equal(a, b) for a, b in zip(before[:3], blockwise_backward(dout, cache)[:3], strict=True))


# --- merge ----------------------------------------------------------------------------------------------------------------


def parts(rng, *cuts, lead=(2, 3), L=4, S=7, D=5, E=6, **options):
    """q, and (out, lse) of attention over each stretch of the keys and over all."""
    q, k, v = (rng.standard_normal((*lead, n, width)) for n, width in ((L, D), (S, D), (S, E)))
    ends = [0, *cuts, S]
    some = [
        attention_forward(q, k[..., a:b, :], v[..., a:b, :], return_lse=True)[0] for a, b in itertools.pairwise(ends)
    ]
    return some, attention_forward(q, k, v, return_lse=True)[0]


def loops(out_a, lse_a, out_b, lse_b):
    """Merging by explicit sums, one number after the other."""
    out, lse = np.zeros_like(out_a), np.full_like(lse_a, -np.inf)
    for i in np.ndindex(lse_a.shape):
        weights = [np.exp(x - max(lse_a[i], lse_b[i])) if x > -np.inf else 0.0 for x in (lse_a[i], lse_b[i])]
        if sum(weights) > 0:
            lse[i] = max(lse_a[i], lse_b[i]) + np.log(sum(weights))
            for w, o in zip(weights, (out_a, out_b), strict=True):
                if w > 0:
                    out[i] += w / sum(weights) * o[i]
    return out, lse


def near(x, y, size):
    assert np.array_equal(np.isinf(x), np.isinf(y))
    finite = np.isfinite(y)
    assert np.abs(x[finite] - y[finite]).max(initial=0) <= TERMS_EPS * np.finfo(float).eps * size


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_merge_of_two_parts_is_the_whole(cut):
    (a, b), (out, lse) = parts(np.random.default_rng(cut), cut)
    merged = merge(*a, *b)
    near(merged[0], out, 20)
    near(merged[1], lse, 20)
    near(merge(*b, *a)[0], out, 20)


def test_merge_is_associative():
    (a, b, c), (out, lse) = parts(np.random.default_rng(0), 2, 5)
    for merged in (merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))):
        near(merged[0], out, 20)
        near(merged[1], lse, 20)


def test_merge_against_loops_with_parts_without_keys():
    rng = np.random.default_rng(0)
    out_a, out_b, lse_a, lse_b = (rng.standard_normal(s) for s in ((3, 5, 4), (3, 5, 4), (3, 5), (3, 5)))
    lse_a[0, 1] = lse_b[1, 2] = lse_a[2, 3] = lse_b[2, 3] = -np.inf
    lse_a[1, 0], lse_b[1, 1] = 1e4, -1e4
    out_a[0, 1] = out_b[1, 2] = np.nan  # a part without keys is ignored, whatever it holds
    out_a[2, 3] = out_b[2, 3] = np.nan
    (out, lse), cache = merge_forward(out_a, lse_a, out_b, lse_b)
    expected = loops(out_a, lse_a, out_b, lse_b)
    near(out, expected[0], 10)
    near(lse, expected[1], 1e4)
    assert (out[2, 3] == 0).all()
    assert lse[2, 3] == -np.inf
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    dout[2, 3], dlse[2, 3] = np.nan, np.inf
    grads = merge_backward(dout, cache, dlse)
    assert all(np.isfinite(g).all() for g in grads)
    for g in (grads.out_a[0, 1], grads.lse_a[0, 1], grads.out_b[1, 2], grads.lse_b[1, 2], *(g[2, 3] for g in grads)):
        assert not np.any(g)
    assert grads.out_a[0, 0].any()


@pytest.mark.parametrize("method", ["complex", "central"])
def test_merge_gradients(method):
    rng = np.random.default_rng(0)
    inputs = {
        n: rng.standard_normal((2, 3, 4) if n.startswith("out") else (2, 3)) for n in ("out_a", "lse_a", "out_b", "lse_b")
    }
    gradcheck(merge_forward, lambda d, c: merge_backward(d[0], c, d[1]), inputs, method=method)

    def only_out(**parts):  # one output of two
        (out, _), cache = merge_forward(**parts)
        return out, cache

    gradcheck(only_out, merge_backward, inputs, method=method)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
def test_merge_dtypes(dtype):
    computing = np.float32 if dtype is np.float16 else dtype
    rng = np.random.default_rng(0)
    outs, lses = ([rng.standard_normal(s).astype(t) for _ in "ab"] for s, t in (((3, 4), dtype), ((3,), computing)))
    (out, lse), cache = merge_forward(outs[0], lses[0], outs[1], lses[1])
    grads = merge_backward(out, cache, lse)
    assert [x.dtype for x in (out, lse, *grads)] == [dtype, computing, dtype, computing, dtype, computing]


FORKS = """
import os, signal, threading, time
import numpy as np
from npattn import blockwise
from npattn.ops.threads import BLAS

x = np.random.default_rng(0).standard_normal((1, 4, 600, 32), np.float32)
stop = threading.Event()

def work():
    while not stop.is_set():
        blockwise(x, x, x)

worker = threading.Thread(target=work)
worker.start()
while not BLAS.users:
    time.sleep(0.001)
wanted, failures = list(BLAS.threads), []
for i in range(12):
    time.sleep(0.002 * (i % 5))
    child = os.fork()
    if not child:
        signal.alarm(30)  # a child that hangs is ended
        blockwise(x, x, x)
        os._exit([n.num_threads for n in BLAS.libraries] != wanted)
    failures.append(os.waitpid(child, 0)[1])
stop.set()
worker.join()
print(failures)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_beside_a_thread_in_blockwise_has_its_threads_back():
    pytest.importorskip("threadpoolctl", reason="without it BLAS is left alone")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip
    assert done.stdout == f"{[0] * 12}\n", done.stderr
