"""The parts of a step in processes, one for each processor.

NumPy computes products on all processors, and everything else on one. Two halves of a batch in two processes, whose BLAS has
one thread each, keep both processors busy all the time. A process is a fork of this one: it has the functions and the data
already, the parameters are in memory that all see, and gradients come back through such memory, too.

A step of two parts gives the same bits whether its parts are computed here, one after the other, or in two processes, as long
as BLAS has the same number of threads in both.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from npattn.models.trees import tree_map
from npattn.ops.checks import Array, check_integer
from npattn.ops.threads import BLAS, libraries

Part = tuple[Any, Any, int]  # the loss, the gradients, and how many tokens count


def shared(x: Array) -> Array:
    """A copy of an array in memory that processes forked from this one see, too."""
    copy = np.frombuffer(mmap.mmap(-1, max(x.nbytes, 1)), x.dtype, x.size).reshape(x.shape)
    copy[...] = x
    return copy


def useful(parts: int) -> int:
    """How many processes are worth it for a step of so many parts: one a processor, if BLAS can be limited in each."""
    if "fork" not in multiprocessing.get_all_start_methods() or not libraries():
        return 1
    return max(min(parts, os.cpu_count() or 1), 1)


class Processes:
    """Computes the parts of steps: ``with Processes(...) as parts: parts([6, 7])`` gives those of batches 6 and 7, in order.

    params  : a tree of arrays made by `shared`, which may change between calls
    loss_and_grads, batches : as in `npattn.training.loop.train`
    number  : of processes; none where it is 1: then all is computed here
    Raises what loss_and_grads raises, and ValueError where this system cannot fork.
    """

    def __init__(
        self, params: Any, loss_and_grads: Callable[..., Part], batches: Callable[[int], Any], number: int
    ) -> None:
        check_integer("Processes", "number", number, least=1)
        if number > 1 and "fork" not in multiprocessing.get_all_start_methods():
            raise ValueError(f"Processes: number is {number}, expected 1: this system has no fork")
        self.params, self.number = params, number
        self.loss_and_grads, self.batches = loss_and_grads, batches
        self.grads = [tree_map(lambda p: shared(np.zeros_like(p)), params) for _ in range(number if number > 1 else 0)]
        self.pipes: list[Any] = []
        self.processes: list[Any] = []

    def __enter__(self) -> Processes:
        if self.number == 1:
            return self
        context = multiprocessing.get_context("fork")
        for number in range(self.number):
            ours, theirs = context.Pipe()
            process = context.Process(target=self._serve, args=(number, theirs, [*self.pipes, ours]), daemon=True)
            with warnings.catch_warnings():
                # Python 3.12 and jax warn of threads that a fork leaves behind. BLAS's and npattn's own are prepared for it,
                # and nothing else is used in these processes.
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pipe in self.pipes:
            pipe.close()  # a process whose pipe is closed ends
        for process in self.processes:
            process.join(5)
            process.kill()
        self.pipes, self.processes = [], []

    def __call__(self, numbers: Sequence[int]) -> Iterator[Part]:
        """The parts of the batches with these numbers, in their order. Gradients hold until the next part is asked for."""
        if not self.pipes:
            yield from (self.loss_and_grads(self.params, self.batches(n), n) for n in numbers)
            return
        for start in range(0, len(numbers), self.number):
            some = list(zip(self.pipes, self.grads, numbers[start : start + self.number], strict=False))
            for pipe, _, n in some:
                pipe.send(n)
            answers = [self._answer(pipe) for pipe, _, _ in some]
            for (loss, tokens, error), (_, grads, _) in zip(answers, some, strict=True):
                if error is not None:
                    raise error
                yield loss, grads, tokens

    def _answer(self, pipe: Any) -> tuple[Any, int, BaseException | None]:
        try:
            answer: tuple[Any, int, BaseException | None] = pipe.recv()
        except EOFError:
            raise RuntimeError("a process that computes a part of a step has ended, perhaps for want of memory") from None
        return answer

    def _serve(self, number: int, pipe: Any, others: list[Any]) -> None:
        """What a process does: it takes numbers of batches until its pipe is closed."""
        for other in others:  # else this process would keep them open
            other.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process says when to end
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        BLAS.libraries = libraries() if BLAS.libraries is None else BLAS.libraries
        BLAS.limit([max((os.cpu_count() or 1) // self.number, 1)] * len(BLAS.libraries))
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            while True:
                n = pipe.recv()
                try:
                    loss, grads, tokens = self.loss_and_grads(self.params, self.batches(n), n)
                    tree_map(_put, self.grads[number], grads)
                    pipe.send((loss, tokens, None))
                except Exception as error:  # raised again by the first process
                    pipe.send((math.nan, 0, error))
        os._exit(0)  # nothing of the first process is to be closed or written here


def _put(place: Array, x: Array) -> Array:
    place[...] = x
    return place


__all__ = ["Processes", "shared", "useful"]
