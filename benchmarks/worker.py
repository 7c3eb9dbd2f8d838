"""A process with one rival in it: what the figures of company.py and memory.py are taken from.

``python -m benchmarks.worker`` reads a line of JSON for each order, and answers with one:

    {"do": "load", "case": {...}, "rival": "torch flash"}   imports, arrays, and a first small call
    {"do": "time", "repeats": 3}                            -> {"seconds": ...}
    {"do": "memory"}                                        -> {"process": bytes, "tracemalloc": bytes or null}
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any


class Worker:
    """The side that gives the orders."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parent.parent,
        )  # fmt: skip

    def send(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the process has ended, perhaps for want of memory")
        found: dict[str, Any] = json.loads(answer)
        if "failed" in found:
            raise RuntimeError(found["failed"])
        return found

    def ask(self, **order: Any) -> dict[str, Any]:
        self.send(**order)
        return self.receive()

    def load(self, case: Any, rival: str) -> None:
        """Begins to load; `receive` waits for it."""
        self.send(do="load", case=asdict(case), rival=rival)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait()


# --- within the process --------------------------------------------------------------------------------------------------


def load(case: Any, name: str) -> Any:
    from benchmarks import rivals
    from benchmarks.cases import draw

    # What a library sets up once, its threads and their buffers, belongs to no call.
    small = replace(case, L=min(case.L, 512), S=min(case.S, 512), B=1, H=case.H // case.groups, G=1)
    for one in (small, case):
        found, left_out = rivals.attention(one, draw(one), [name], checked=False)
        if not found:
            raise RuntimeError(left_out[name])
        if one is small:
            found[0].before()
            found[0].call()
    return found[0]


def high_water(reset: bool = False) -> tuple[float, float]:
    """Bytes that the process holds, and the most that it has held (since the last reset, where the system can do that)."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM")))
    now, most = (1024.0 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now, most


def memory(rival: Any, name: str) -> dict[str, Any]:
    """Both peaks of one call, beyond the inputs, which were there before, and what it returned."""
    import ctypes
    import gc
    import tracemalloc

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the small call has freed would be used again, and not be seen
    rival.before()
    before, _ = high_water(reset=True)
    returned = rival.call()
    _, most = high_water()
    outputs = sum(x.nbytes for x in tensors(returned))
    found = {"process": most - before - outputs, "outputs": outputs, "tracemalloc": None}
    del returned
    if name in ("blockwise", "dense"):  # only NumPy tells tracemalloc of its arrays
        tracemalloc.start()
        rival.call()
        found["tracemalloc"] = tracemalloc.get_traced_memory()[1] - outputs
        tracemalloc.stop()
    return found


def tensors(returned: Any) -> list[Any]:
    return list(returned) if isinstance(returned, (tuple, list)) else returned.copy_outputs_to_cpu()


def serve() -> None:
    from benchmarks.cases import Case
    from benchmarks.harness import sample, settle

    rival: Any = None
    name = ""
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if order["do"] == "load":
                name = order["rival"]
                rival = load(Case(**order["case"]), name)
            elif order["do"] == "time":
                settle()
                answer["seconds"] = sample(rival, order["repeats"], order["warm"])[0]
                settle()  # the next one to be timed is in another process
            else:
                answer = memory(rival, name)
        except Exception as error:
            answer = {"failed": str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    from benchmarks.machine import limit

    limit()
    serve()
