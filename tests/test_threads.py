"""Threads: the same bits whatever their number, BLAS left as it was found, and errors, interrupts and forks that end well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import blockwise_of

from npattn import Alibi, blockwise_backward, blockwise_forward, causal, packed, window
from npattn.ops import threads as parallel
from npattn.ops.tiles import Sizes


def on_threads(n):
    """So many threads, and nothing is too small for them."""
    return Sizes(threads=n, small=0, light=0)


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
def test_the_result_does_not_depend_on_the_number_of_threads(name):
    (G, H), options = OPTIONS[name]
    rng = np.random.default_rng(0)
    L, S = {"small heads": (90, 90), "a few queries": (2, 5000)}.get(name, (1300, 1300))
    q, k, v, dout = (rng.standard_normal((1, h, n, 8), np.float32) for h, n in ((H, L), (G, S), (G, S), (H, L)))
    if name == "bias":
        options = {**options, "bias": rng.standard_normal((1, H, 1, L), np.float32)}
    results = []
    for n in (1, 2, 5):
        (out, lse), cache = blockwise_of(on_threads(n), q, k, v, return_lse=True, **options)
        g = blockwise_backward(dout, cache, lse)
        found = (getattr(x, "parameter", x) for x in (out, lse, *g) if x is not None)
        results.append([np.asarray(x).tobytes() for x in found])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_left_to_attention_does_not_depend_on_the_number_of_threads(dtype):
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((3, 600, 8)).astype(dtype) for _ in range(4))
    q[:, 5, 0] = np.nan
    results = []
    for n in (1, 3):
        results.append(blockwise_backward(dout, blockwise_of(on_threads(n), q, k, v)[1]))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(results[0][:3], results[1][:3], strict=True))


def test_blas_gets_its_threads_back():
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="needs the fast extra: pip install npattn[fast]")
    x = np.random.default_rng(0).standard_normal((4, 300, 8), np.float32)
    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    before = [lib.num_threads for lib in libraries]
    runs = [threading.Thread(target=blockwise_forward, args=(x, x, x), kwargs={"mask": causal()}) for _ in range(6)]
    for t in runs:
        t.start()
    for t in runs:
        t.join()
    assert [lib.num_threads for lib in libraries] == before
    with parallel.BLAS.limited() as n:
        assert n == max(before)
        assert {lib.num_threads for lib in libraries} == {1}
        with parallel.BLAS.limited() as inner:
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
    monkeypatch.setattr(parallel, "HELPERS", parallel._Helpers())

    def work(task, own):
        turns.wait(10)
        seen.add((threading.get_ident(), library.num_threads))

    parallel.share(work, range(3), list)
    assert [n for _, n in seen] == [1, 1, 1]
    assert library.num_threads == 3


def test_without_threadpoolctl_there_is_one_thread_of_ours(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    blas = parallel._Blas()
    with blas.limited() as n:
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
        with blas.limited():
            pass

    runs = [threading.Thread(target=use) for _ in range(4)]
    for t in runs:
        t.start()
    for t in runs:
        t.join()
    assert asked == [1]


def assert_idle():
    """All helpers wait for work: each takes a part at once."""
    together = threading.Barrier(parallel.HELPERS.size + 1)
    parallel.share(lambda task, own: together.wait(10), range(together.parties), list, threads=together.parties)


def test_a_call_does_not_wait_for_helpers_that_are_busy_elsewhere(monkeypatch):
    monkeypatch.setattr(parallel, "HELPERS", parallel._Helpers())
    busy, free, done, freed = threading.Event(), threading.Event(), [], []

    def waits(task, own):
        if threading.current_thread() is not threading.main_thread():
            busy.set()
            freed.append(free.wait(10))
        else:  # one more call while the helper is busy
            busy.wait(20)
            parallel.share(lambda task, own: done.append(free.is_set()), range(3), list, threads=2)
            free.set()

    parallel.share(waits, range(2), list, threads=2)
    assert (done, freed) == ([False] * 3, [True])


CHILD = """
import os, threading
from npattn.ops.threads import share

share(lambda task, own: None, range(2), list, threads=2)
if not os.fork():
    together = threading.Barrier(2)
    share(lambda task, own: together.wait(10), range(2), list, threads=2)
    print("two threads", flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_the_child_of_a_fork_has_helpers_of_its_own():
    command = [sys.executable, "-W", "ignore", "-c", CHILD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "two threads\n", done.stderr


@pytest.mark.parametrize("where", ["buffers", "work"])
def test_an_error_anywhere_ends_all_tasks(where):
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

    with pytest.raises(MemoryError, match="no tiles"):
        parallel.share(work, range(1000), buffers, turns, threads=3)
    assert len(done) < 1000
    assert_idle()


INTERRUPTED = """
import signal, threading, time
from contextlib import contextmanager
from npattn.ops import threads as parallel

class Blas:
    @contextmanager
    def limited(self):
        yield 3
        print("BLAS has its threads back")

    def limit_this_thread(self):
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


@pytest.mark.parametrize(("L", "starts"), [(8, (0, 0)), (100, (1, 1)), (200, (1, 3))])
def test_what_is_small_wakes_no_thread(L, starts, monkeypatch):
    """Forwards, and backwards; there, what is done once a query has threads of its own where that is much."""
    started, work = [], parallel.HELPERS.work
    monkeypatch.setattr(parallel.HELPERS, "work", lambda run, futures: (started.append(run), work(run, futures))[1])
    x = np.random.default_rng(0).standard_normal((4, L, 8), np.float32)
    out, cache = blockwise_of(Sizes(threads=2, small=1 << 15, light=1 << 12), x, x, x)
    forward = len(started)
    blockwise_backward(out, cache)
    assert (forward, len(started) - forward) == starts


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_error_in_one_thread_ends_all_and_is_raised(direction):
    class Fails:
        on, mask = False, causal()

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

    x, mask = np.random.default_rng(0).standard_normal((2, 1100, 8), np.float32), Fails()
    _, cache = blockwise_of(on_threads(3), x, x, x, mask=mask)
    mask.on = True
    again = (blockwise_of, on_threads(3), x, x, x) if direction == "forward" else (blockwise_backward, x, cache)
    with pytest.raises(ZeroDivisionError, match="of the mask"):
        again[0](*again[1:], **({"mask": mask} if direction == "forward" else {}))
    assert_idle()


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
