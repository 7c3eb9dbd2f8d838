"""Tasks of whole tiles on npattn's own threads, while BLAS uses one thread in each.

The product of two tiles is too small to be shared between threads, a task of whole tiles is not. So each thread takes one task
after the other, and BLAS must not start threads as well. That needs threadpoolctl (the extra npattn[fast]): without it npattn
uses one thread, and BLAS its own.

This adds to concurrent.futures: the calling thread takes part; threads are kept for the next call; an interrupt or an error in
one thread ends the work of all, also of those that wait, before BLAS gets its threads back; and sums to which several threads
add have a fixed order (`Turns`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from npattn.ops.allowed import quiet


class _Blas:
    """The BLAS libraries of this process, and how many calls of npattn limit them to one thread at the moment."""

    def __init__(self) -> None:
        self.libraries: list[Any] | None = None  # None until they are needed for the first time
        self.lock, self.users, self.threads = threading.Lock(), 0, [1]

    @contextmanager
    def limited(self) -> Iterator[int]:
        """Limits BLAS to one thread; gives the number that it would have used, which is how many npattn may use.

        Calls may overlap: the first sets the limit, the last removes it.
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
                self.users = max(self.users - 1, 0)  # in the child of a fork it is 0 already
                if not self.users:
                    self.limit(self.threads)

    def limit_this_thread(self) -> None:
        """Limits BLAS to one thread in the current thread, if it has a limit for each thread: OpenBLAS with OpenMP has."""
        for x in self.libraries or ():
            if getattr(x, "threading_layer", "") == "openmp":
                x.set_num_threads(1)

    def limit(self, threads: list[int]) -> None:
        """Set the number of threads of each library.

        Since threadpoolctl 3.8 the thread that first sets OpenBLAS's number controls it: while that thread lives, the numbers
        of others are ignored. But the first and the last call may come from different threads. So no thread keeps control.
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


class _Helpers:
    """Threads beside the caller's. They are kept: to start one takes 0.4 ms, to wake it a tenth of that.

    Not those of ThreadPoolExecutor: an interrupt while it starts one may leave a lock taken that the next call needs.
    """

    def __init__(self) -> None:
        self.queue, self.size = SimpleQueue[tuple["Future[None]", Callable[[], None]]](), 0

    def work(self, run: Callable[[], None], futures: list[Future[None]]) -> None:
        """``run`` on a thread for each of the futures, which are done when it has ended."""
        while self.size < len(futures):  # two callers may start one too many, which waits for later calls
            threading.Thread(target=self._serve, args=(self.queue,), name="npattn", daemon=True).start()
            self.size += 1
        for future in futures:
            self.queue.put((future, run))

    @staticmethod
    def _serve(queue: SimpleQueue[Any]) -> None:
        BLAS.limit_this_thread()
        while True:
            future, run = queue.get()
            if future.set_running_or_notify_cancel():
                run()  # raises nothing
                future.set_result(None)
            del future, run  # while it waits, nothing is kept alive


HELPERS = _Helpers()


def _forked() -> None:
    """In the child of a fork the threads that limited BLAS, held a lock, or helped, do not exist."""
    HELPERS.queue, HELPERS.size = SimpleQueue(), 0
    users, BLAS.users, BLAS.lock = BLAS.users, 0, threading.Lock()
    if users:
        BLAS.limit(BLAS.threads)


if hasattr(os, "register_at_fork"):
    # The parent forks only while it holds our lock: a fork during a change of the limit would leave OpenBLAS's own lock taken.
    os.register_at_fork(
        before=lambda: BLAS.lock.acquire(), after_in_parent=lambda: BLAS.lock.release(), after_in_child=_forked
    )


def share(
    work: Callable[[Any, Any], None], tasks: Iterable[Any], buffers: Callable[[], Any], turns: Turns | None = None,
    most: int | None = None, threads: int | None = None,
) -> None:  # fmt: skip
    """work(task, buffers) for all tasks, on as many threads as BLAS has (or ``threads``), at most ``most``.

    Each thread has its own buffers. Tasks start in their order. An exception in one ends all threads, and is raised.
    """
    tasks = list(tasks)
    rest, claim, failed = iter(tasks), threading.Lock(), list[BaseException]()

    @quiet  # each thread has its own state of np.errstate
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

    with BLAS.limited() as of_blas:
        others = min(threads or of_blas, most or len(tasks), len(tasks)) - 1
        if others < 1:
            run()
        else:
            helpers = [Future[None]() for _ in range(others)]
            try:  # the calling thread works, too
                HELPERS.work(run, helpers)
                run()
                wait_for(helpers)
            except BaseException as error:  # an interrupt outside run, or a thread that cannot be started
                fail(error)
                wait_for(helpers)
    if failed:
        raise failed[0]


def wait_for(helpers: list[Future[None]]) -> None:
    """Until they have ended. One that has not begun, because other calls keep the threads busy, is not needed any more."""
    wait([helper for helper in helpers if not helper.cancel()])


class Turns:
    """A fixed order in which several threads add to each sum, so that its last bits do not depend on their timing."""

    def __init__(self) -> None:
        self.done: dict[Any, int] = {}
        self.lock, self.stopped = threading.RLock(), False  # taken instead of Condition's `with`, which an interrupt may break
        self.changed = threading.Condition(self.lock)

    def wait(self, place: Any, number: int) -> None:
        """Wait until ``number`` others have added to this place."""
        with self.lock:
            self.changed.wait_for(lambda: self.stopped or self.done.get(place, 0) == number)

    def next(self, place: Any) -> None:
        with self.lock:
            self.done[place] = self.done.get(place, 0) + 1
            self.changed.notify_all()

    def stop(self) -> None:
        """End all waiting: a thread has failed."""
        with self.lock:
            self.stopped = True
            self.changed.notify_all()
