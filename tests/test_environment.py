"""`npattn env`: what would be faster on this machine, and whether it is too busy to tell."""

from __future__ import annotations

import numpy as np
import pytest

from npattn import environment


@pytest.mark.parametrize(
    ("kernels", "threads", "variables", "message"),
    [
        ("Haswell", "2", {}, "with OPENBLAS_CORETYPE=SkylakeX, since its kernels are for AVX2: attention with"),
        ("SkylakeX", "2", {"OPENBLAS_CORETYPE": "Haswell"}, "without OPENBLAS_CORETYPE=Haswell: attention with"),
        ("SkylakeX", "2", {"NPY_DISABLE_CPU_FEATURES": "AVX512F"}, "without NPY_DISABLE_CPU_FEATURES: attention with"),
        ("SkylakeX", "1", {"OPENBLAS_NUM_THREADS": "1"}, "with 2 threads (OPENBLAS_NUM_THREADS): attention with"),
        ("SkylakeX", "4", {}, "with 1 thread (OPENBLAS_NUM_THREADS): attention with"),
    ],
)
def test_env_says_what_would_be_faster(kernels, threads, variables, message, monkeypatch):
    """By what processes with other settings take; here those take half the time."""
    monkeypatch.setattr(environment, "openblas", lambda: {"kernels": kernels, "threads": threads})
    monkeypatch.setattr(environment.exponentials, "has_avx512", lambda: True)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(environment, "product_rates", dict)
    for name in ("OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    seconds = dict.fromkeys(("attention", "product", "exp"), 1.0)
    monkeypatch.setattr(environment, "_output", lambda code, other: {n: x / 2 if other else x for n, x in seconds.items()})
    assert any(text.startswith(message) for text in environment.advice())
    monkeypatch.setattr(environment, "_output", lambda code, other: {n: 0.95 * x if other else x for n, x in seconds.items()})
    assert not environment.advice()
    monkeypatch.setattr(environment, "_output", lambda code, other: {})  # no process can be started
    assert not environment.advice()


def test_env_says_when_another_blas_is_faster(monkeypatch):
    monkeypatch.setattr(environment, "_settings", dict)
    monkeypatch.setattr(environment, "product_rates", lambda: {"1024 x 64 x 256": 0.5, "1024 x 256 x 64": 0.97})
    (text,) = environment.advice()
    assert text.endswith("faster, on one thread (2.00x 1024 x 64 x 256)")


@pytest.mark.parametrize(
    ("used", "unsteady", "message"),
    [(0, np.inf, ""), (90, np.inf, "other work uses "), (0, 0.0, "one and the same product takes ")],
)
def test_a_busy_machine_is_told(used, unsteady, message, monkeypatch):
    """Ticks that all processors have worked in a short sleep, and times of one product."""
    ticks = iter([0, used])
    monkeypatch.setattr(environment, "_ticks", lambda stat: next(ticks))
    monkeypatch.setattr(environment, "UNSTEADY", unsteady)
    told = environment.busy(seconds=0.01)
    assert told.startswith(message)
    assert bool(told) == bool(message)
