"""What this machine computes with: versions, BLAS and its kernel set, threads."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy

import npattn
from npattn.ops import exponentials

# Prints the best time of several square products in float32, in seconds. It runs in a process of its own, because OpenBLAS
# chooses its kernels when it is loaded.
_PRODUCT = """
import time, numpy as np
x = np.ones((768, 768), np.float32)
x @ x
times = []
for _ in range(30):
    start = time.perf_counter(); x @ x; times.append(time.perf_counter() - start)
print(min(times))
"""


def describe() -> dict[str, str]:
    """Facts by name; the last ones measure how fast another OpenBLAS kernel set would be here, where there is one."""
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
    if facts["kernels"] in ("Haswell", "Zen", "SkylakeX", "Cooperlake", "SapphireRapids") and exponentials.has_avx512():
        facts |= _kernel_advice(facts["kernels"])
    return facts


def _kernel_advice(kernels: str) -> dict[str, str]:
    if kernels not in ("Haswell", "Zen"):
        return {"kernels": f"{kernels} (AVX-512)"}
    now, other = _time_products(("", "SkylakeX"))
    if not (now and other):
        return {"advice": f"{kernels} kernels are for AVX2, and this processor has AVX-512: try OPENBLAS_CORETYPE=SkylakeX"}
    rates = [2e-9 * 768**3 / t for t in (now, other)]
    return {
        "advice": f"OpenBLAS has picked its {kernels} kernels (AVX2), but this processor has AVX-512: set "
        f"OPENBLAS_CORETYPE=SkylakeX before Python starts",
        "measured": f"a product of 768 x 768 float32 runs at {rates[0]:.0f} GFLOP/s now and at {rates[1]:.0f} with it "
        f"({rates[1] / rates[0]:.2f}x)",
    }


def _time_products(core_types: tuple[str, ...]) -> list[float | None]:
    """The best time with each kernel set. Their processes take turns, so that other load slows all alike."""
    best: list[float | None] = [None] * len(core_types)
    for _ in range(3):
        for i, core_type in enumerate(core_types):
            setting = {"OPENBLAS_CORETYPE": core_type} if core_type else {}
            try:
                run = subprocess.run(
                    [sys.executable, "-c", _PRODUCT], env={**os.environ, **setting}, capture_output=True, text=True, timeout=60
                )
                seconds = float(run.stdout)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                continue
            best[i] = min(seconds, best[i] or seconds)
    return best


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
