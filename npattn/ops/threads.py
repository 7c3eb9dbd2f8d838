"""Whole tiles on threads of our own, each with a BLAS of one thread.

A product of two tiles is too small to be worth sharing; whole tiles are not. So each of our threads takes one task after the
other, and BLAS is kept from starting threads as well. That needs threadpoolctl (the extra npattn[fast]): without it there is
one thread of ours, and BLAS has its own.

What concurrent.futures does not have: the calling thread takes part; an interrupt or an error in one thread ends all of them,
those that wait, too, before BLAS gets its threads back; and sums that several threads add to have one order (`Turns`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from npattn.ops.allowed import quiet


class _Blas:
    """The BLAS libraries of this process, and how many calls of ours keep them at one thread."""

    def __init__(self) -> None:
        self.libraries: list[Any] | None = None  # looked for when they are needed
        self.lock, self.users, self.threads = threading.Lock(), 0, [1]

    @contextmanager
    def alone(self) -> Iterator[int]:
        """How many threads BLAS would have used, which is how many we may use; within, it uses one.

        Calls may overlap: the first sets the limit, the last takes it back.
        """
        with self.lock:
            if self.libraries is None:
                self.libraries = libraries()
            if not self.users:
                self.threads = [x.num_threads or 1 for x in self.libraries]
                self.limit([1] * len(self.threads))
            self.users += 1
        try:
            yield max(self.threads, default=1)
        finally:
            with self.lock:
                self.users = max(self.users - 1, 0)  # 0 already in the child of a fork
                if not self.users:
                    self.limit(self.threads)

    def own(self) -> None:
        """One thread for this thread of ours, where BLAS counts for each thread by itself: OpenBLAS does if it has OpenMP."""
        for x in self.libraries or ():
            if getattr(x, "threading_layer", "") == "openmp":
                x.set_num_threads(1)

    def limit(self, threads: list[int]) -> None:
        """So many threads for each library.

        Since threadpoolctl 3.8 the thread that first sets OpenBLAS's number is in charge of it: what others set is ignored
        while that one lives. But any thread may call us, and another one be the last. So nobody stays in charge.
        """
        for x, n in zip(self.libraries or (), threads, strict=True):
            free = getattr(x, "clear_controlling_thread", lambda force: None)
            free(force=True)
            x.set_num_threads(n)
            free(force=True)


def libraries() -> list[Any]:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return []
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


BLAS = _Blas()


def _forked() -> None:
    """In the child of a fork: the threads that kept BLAS at one thread, or held the lock, are not there any more."""
    users, BLAS.users, BLAS.lock = BLAS.users, 0, threading.Lock()
    if users:
        BLAS.limit(BLAS.threads)


if hasattr(os, "register_at_fork"):
    # The parent forks between two calls of `alone`: a fork amid a change of the limit would leave OpenBLAS' own lock taken.
    os.register_at_fork(
        before=lambda: BLAS.lock.acquire(), after_in_parent=lambda: BLAS.lock.release(), after_in_child=_forked
    )


def share(
    work: Callable[[Any, Any], None], tasks: Iterable[Any], buffers: Callable[[], Any], turns: Turns | None = None,
    most: int | None = None, threads: int | None = None,
) -> None:  # fmt: skip
    """work(task, buffers) for all tasks, on as many threads as BLAS has (or ``threads``), but ``most``; each has own buffers.

    Tasks are begun in their order. An exception ends all threads, those that wait for their turn, too, and is raised.
    """
    tasks = list(tasks)
    rest, claim, failed = iter(tasks), threading.Lock(), list[BaseException]()

    @quiet  # the state of np.errstate is each thread's own
    def run() -> None:
        try:
            own = buffers()
            while not failed:
                with claim:
                    task = next(rest, rest)
                if task is rest:
                    return
                work(task, own)
        except BaseException as error:
            fail(error)

    def fail(error: BaseException) -> None:
        failed.append(error)
        if turns is not None:
            turns.stop()

    with BLAS.alone() as of_blas:
        others = min(threads or of_blas, most or len(tasks), len(tasks)) - 1
        if others < 1:
            run()
        else:
            with ThreadPoolExecutor(others, initializer=BLAS.own) as pool:
                helpers = list[Future[None]]()
                try:  # this thread is one of them: to start another takes 0.1 ms
                    helpers.extend(pool.submit(run) for _ in range(others))
                    run()
                    wait(helpers)
                except BaseException as error:  # an interrupt outside run, or a thread that cannot be started
                    fail(error)
                    wait(helpers)  # the pool joins its threads: a second interrupt would take one that runs for ended
    if failed:
        raise failed[0]


class Turns:
    """Sums that several threads add to, each in a fixed order: so that their last bits do not depend on who was first."""

    def __init__(self) -> None:
        self.done: dict[Any, int] = {}
        self.lock, self.stopped = threading.RLock(), False  # an interrupt may come between the steps of Condition's own with
        self.changed = threading.Condition(self.lock)

    def wait(self, place: Any, number: int) -> None:
        """Until ``number`` others have added to this place."""
        with self.lock:
            self.changed.wait_for(lambda: self.stopped or self.done.get(place, 0) == number)

    def next(self, place: Any) -> None:
        with self.lock:
            self.done[place] = self.done.get(place, 0) + 1
            self.changed.notify_all()

    def stop(self) -> None:
        """Nobody waits any more: somebody has failed."""
        with self.lock:
            self.stopped = True
            self.changed.notify_all()
