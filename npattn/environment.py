"""What this machine computes with: versions, BLAS and its kernel set, threads."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy

import npattn
from npattn.ops import exponentials

# Prints seconds, the best of several: attention with its gradients, and what it is made of, a product and exponentials. It runs
# in a process of its own, because NumPy and BLAS read their settings when they are loaded.
_WORK = """
import json, time, numpy as np, npattn
def best(call, times):
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter(); call(); found.append(time.perf_counter() - start)
    return min(found)
x, q = np.ones((768, 768), np.float32), np.ones((1, 8, 768, 64), np.float32) / 8
def both():
    out, cache = npattn.blockwise_forward(q, q, q); npattn.blockwise_backward(out, cache)
print(json.dumps({"attention": best(both, 5), "product": best(lambda: x @ x, 20), "exp": best(lambda: np.exp(x), 20)}))
"""

# Prints how many times as long NumPy's BLAS takes for the products of a tile as torch's, on one thread, in turns.
_PRODUCTS = """
import json, time, numpy as np, torch
from threadpoolctl import threadpool_limits
torch.set_num_threads(1)
found = {}
with threadpool_limits(1):
    for m, k, n in ((1024, 64, 256), (1024, 256, 64), (1024, 128, 256)):
        a, b, out = (np.ones(shape, np.float32) for shape in ((m, k), (k, n), (m, n)))
        x, y, z = map(torch.from_numpy, (a, b, out))
        calls = lambda: np.matmul(a, b, out=out), lambda: torch.matmul(x, y, out=z)
        times = [], []
        for _ in range(60):
            for call, own in zip(calls, times):
                call(); start = time.perf_counter(); call(); own.append(time.perf_counter() - start)
        ours, theirs = (sorted(own)[len(own) // 2] for own in times)
        found[f"{m} x {k} x {n}"] = theirs / ours
print(json.dumps(found))
"""
WORTH = 1.1  # times as fast: less is within the noise
OTHERS = 0.3  # processors that other work may use
UNSTEADY = 2.0  # the median of equal products may take so many times as long as the fastest tenth


def keep_memory(most: int = 1 << 30) -> bool:
    """Makes the process keep memory that arrays free, and says whether it could: with glibc alone.

    By default glibc gives blocks of megabytes back to the system at once, and each new array has page faults. A training step
    takes 15 to 20 % longer then.

    most : bytes; what is larger is still given back
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    most = min(most, 2**31 - 1)
    # glibc has a bound for the second one, 32 MiB on systems of 64 bits; more is refused.
    return bool(mallopt(trim_threshold, most)) and bool(mallopt(mmap_threshold, min(most, 32 << 20)))


def describe() -> dict[str, str]:
    """Facts by name. What would be faster: `advice`."""
    blas = openblas()
    config: Any = np.show_config
    build = config(mode="dicts")["Build Dependencies"]["blas"]
    facts = {
        "npattn": npattn.__version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "SciPy": scipy.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "BLAS": f"{build.get('name', 'unknown')} {build.get('version', '')}".strip(),
        "kernels": blas.get("kernels", "unknown: the BLAS that NumPy has loaded does not say"),
        "threads": blas.get("threads", "unknown"),
        "longdouble": f"{np.finfo(np.longdouble).nmant + 1} bits of precision",
    }
    if facts["kernels"] in ("SkylakeX", "Cooperlake", "SapphireRapids"):
        facts["kernels"] += " (AVX-512)"
    return facts


def advice() -> list[str]:
    """What would be faster here, and by how much, measured in processes of their own; empty if nothing would."""
    found, tried = list[str](), _settings()
    times = _in_turns({"": {}, **tried})
    now = times.pop("", {})
    for text, other in times.items():
        gain = now["attention"] / other["attention"]
        if gain >= WORTH:
            parts = ", ".join(f"{name} {now[name] / other[name]:.2f}x" for name in ("product", "exp"))
            found.append(f"{text}: attention with gradients is {gain:.2f} times as fast (alone: {parts})")
    if importlib.util.find_spec("threadpoolctl") is None:
        found.append("pip install npattn[fast]: without threadpoolctl blockwise attention uses one thread of its own")
    if not exponentials.has_avx512() and "avx512f" in _flags() and "NPY_DISABLE_CPU_FEATURES" not in os.environ:
        found.append("another build of NumPy: this one does not use the processor's AVX-512 (np.show_config)")
    slower = {shape: 1 / rate for shape, rate in product_rates().items() if rate < 1 / WORTH}
    if slower:
        shapes = ", ".join(f"{rate:.2f}x {shape}" for shape, rate in slower.items())
        found.append(f"a NumPy with another BLAS: torch's computes products of tiles faster, on one thread ({shapes})")
    return found


def _settings() -> dict[str, dict[str, str | None]]:
    """What may be faster: a text, and environment variables with their values (None: not set)."""
    blas, found = openblas(), dict[str, dict[str, str | None]]()
    if "OPENBLAS_CORETYPE" in os.environ:
        found[f"without OPENBLAS_CORETYPE={os.environ['OPENBLAS_CORETYPE']}"] = {"OPENBLAS_CORETYPE": None}
    elif blas.get("kernels") in ("Haswell", "Zen") and exponentials.has_avx512():
        found["with OPENBLAS_CORETYPE=SkylakeX, since its kernels are for AVX2"] = {"OPENBLAS_CORETYPE": "SkylakeX"}
    if "NPY_DISABLE_CPU_FEATURES" in os.environ:
        found["without NPY_DISABLE_CPU_FEATURES"] = {"NPY_DISABLE_CPU_FEATURES": None}
    mine = processors()
    for threads in sorted({mine, max(mine // 2, 1)} - {int(blas.get("threads", mine))}):
        found[f"with {threads} thread{'s' if threads > 1 else ''} (OPENBLAS_NUM_THREADS)"] = dict.fromkeys(
            ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), str(threads)
        )
    return found


def _in_turns(settings: dict[str, dict[str, str | None]]) -> dict[str, dict[str, float]]:
    """The best times under each setting. Their processes take turns, so that other work slows all alike."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(3 if len(settings) > 1 else 0):
        for text, variables in settings.items():
            if seconds := _output(_WORK, variables):
                old = best.setdefault(text, seconds)
                best[text] = {name: min(x, old[name]) for name, x in seconds.items()}
    return best if "" in best else {}


@functools.cache
def product_rates() -> dict[str, float]:
    """For the products of a tile NumPy's rate over torch's, on one thread; empty without torch and threadpoolctl.

    torch brings a BLAS of its own. What its attention gains by that no code in NumPy can reach.
    """
    here = all(importlib.util.find_spec(name) for name in ("torch", "threadpoolctl"))
    return _output(_PRODUCTS, {}) if here else {}


def _output(code: str, variables: dict[str, str | None]) -> dict[str, float]:
    """What a process with these environment variables prints; empty if it fails."""
    environment = {name: x for name, x in {**os.environ, **variables}.items() if x is not None}
    try:
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        found: dict[str, float] = json.loads(run.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}
    return found


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy(seconds: float = 1.0) -> str:
    """What makes times here worth little, "" if nothing does: other work, or a speed that changes by the moment."""
    stat = Path("/proc/stat")
    if stat.exists():
        before, own, start = _ticks(stat), time.process_time(), time.perf_counter()
        time.sleep(seconds)
        used = (_ticks(stat) - before) / os.sysconf("SC_CLK_TCK") - (time.process_time() - own)
        others = used / (time.perf_counter() - start)
        if others > OTHERS:
            return f"other work uses {others:.1f} processors"
    x, times = np.ones((512, 512), np.float32), []
    for _ in range(100):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    low, middle = np.quantile(times, (0.1, 0.5))
    if middle > UNSTEADY * low:
        return f"one and the same product takes {1e3 * low:.1f} ms in the best case and {1e3 * middle:.1f} ms as a rule"
    return ""


def _ticks(stat: Path) -> int:
    """What all processors have worked, of us and of others, and what the host took from them."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().splitlines()[0].split()[1:])
    return user + nice + system + irq + softirq + steal


def _flags() -> set[str]:
    """What the processor can, where Linux says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def openblas() -> dict[str, str]:
    """The kernel set and threads of the OpenBLAS that this process has loaded; empty if there is none or it does not say."""
    np.ones((2, 2)) @ np.ones((2, 2))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return _by_threadpoolctl()
    # NumPy's own copy comes first: SciPy may have loaded another one.
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "openblas" in line}
    for path in sorted(paths, key=lambda p: ("numpy" not in p, p)):
        library = ctypes.CDLL(path)
        for before, after in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
            corename: Any = getattr(library, f"{before}openblas_get_corename{after}", None)
            threads: Any = getattr(library, f"{before}openblas_get_num_threads{after}", None)
            if corename is not None and threads is not None:
                corename.restype = ctypes.c_char_p
                return {"kernels": corename().decode(), "threads": str(threads())}
    return {}


def _by_threadpoolctl() -> dict[str, str]:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return {}
    for pool in threadpool_info():
        if pool.get("internal_api") == "openblas":
            return {"kernels": str(pool.get("architecture")), "threads": str(pool.get("num_threads"))}
    return {}
