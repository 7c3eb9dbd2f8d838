"""What everybody runs on: the same number of threads for all, and a description that is stored with the results."""

from __future__ import annotations

import functools
import importlib
import os
import time
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "jax", "onnxruntime", "onnx", "threadpoolctl", "matplotlib")


def limit(threads: int | None = None) -> None:
    """So many threads for every library, or as many as there are processors. Before NumPy is imported.

    They read their environment when they are loaded; jax, which has no switch, counts the processors that the process may use.
    """
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    wanted = threads or int(os.environ.get("OPENBLAS_NUM_THREADS", "0")) or len(mine)
    n = max(1, min(wanted, len(mine)))
    if n < len(mine) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine[:n])
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PJRT_NPROC"):
        os.environ[name] = str(n)


@functools.cache
def threads() -> int:
    """How many threads NumPy's BLAS has, which is how many everybody gets."""
    from npattn import environment

    told = environment.openblas().get("threads") or os.environ.get("OPENBLAS_NUM_THREADS")
    return int(told) if told else os.cpu_count() or 1


def library(name: str) -> Any:
    """The module, or an ImportError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        raise ImportError(f"{missing} is not installed: pip install npattn[peers], or {missing} alone") from error


def facts() -> dict[str, str]:
    """`npattn.environment.describe`, the processor, how busy it is, and the rivals' versions, absent ones as absent."""
    from npattn import environment

    found = {"time": time.strftime("%Y-%m-%d %H:%M"), "processor": processor(), **_described()}
    found["threads"] = str(threads())
    if rates := environment.product_rates():
        found["products"] = ", ".join(f"{rate:.2f} ({shape})" for shape, rate in rates.items())
    if hasattr(os, "getloadavg"):
        found["load"] = f"{os.getloadavg()[0]:.1f}"
    for name in LIBRARIES:
        try:
            found[name] = str(library(name).__version__)
        except ImportError:
            found[name] = "absent"
    return found


@functools.cache
def _described() -> dict[str, str]:
    from npattn import environment

    return environment.describe()


def print_facts(found: dict[str, str]) -> None:
    versions = ("npattn", "Python", "NumPy", *LIBRARIES)
    print(", ".join(f"{name} {found[name]}" for name in versions if found[name] != "absent"))
    print(f"{found['processor']}, {found['machine']}; BLAS {found['BLAS']}, kernels {found['kernels']}")
    print(f"threads {found['threads']} for everybody, load {found.get('load', 'unknown')} before we begin")
    if "products" in found:
        print(f"products of tiles alone, one thread, NumPy's rate over torch's: {found['products']}")
    if found["threadpoolctl"] == "absent":
        print("threadpoolctl is not installed: npattn's blockwise attention runs on one thread; pip install npattn[fast]")
    for name in LIBRARIES:
        if found[name] == "absent":
            print(f"absent: {name} is not installed")


def vendor(processor: str) -> str:
    """Intel, AMD, or other: on Intel's processors torch computes with Intel's own BLAS."""
    return next((name for name in ("Intel", "AMD") if name in processor), "other")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return names[0] if names else "unknown processor"


def free_memory() -> float:
    """Bytes that could be taken now."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return 8e9
