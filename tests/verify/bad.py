"""Candidates that end, crash, hang or spoil what they are given. The command finds them as ``bad:exits``."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from npattn import attention, attention_backward, attention_forward

SEEN: list = []


def right(q, k, v, *, mask=None):
    return attention(q, k, v, mask=mask)


def backward(dout, q, k, v, *, mask=None):
    g = attention_backward(dout, attention_forward(q, k, v, mask=mask)[1])
    return g.q, g.k, g.v


def named(q, k, v):
    """The function whose name stands in the file "name": one process serves many."""
    return globals()[Path("name").read_text()](q, k, v)


def that(does):
    """Attention that does this to its inputs, or to anything else, before it returns."""

    def candidate(q, k, v):
        out = attention(q, k, v)
        does(q, k, v)
        return out

    return candidate


def that_raises(kind, *words):
    def candidate(q, k, v):
        raise kind(*words)

    return candidate


class UnspeakableError(Exception):
    def __str__(self):
        raise ValueError("no words")


class RefusalError(UnspeakableError, NotImplementedError):
    pass


class HarshError(Exception):
    def __str__(self):
        raise SystemExit(1)


exits = that(lambda q, k, v: os._exit(0))
crashes = that(lambda q, k, v: ctypes.string_at(0))
is_killed = that(lambda q, k, v: os.kill(os.getpid(), 9))
exits_later = that(lambda q, k, v: os._exit(3) if SEEN else SEEN.append(q))

leaves = that_raises(SystemExit, 0)
interrupts = that_raises(KeyboardInterrupt)
generator = that_raises(GeneratorExit)
unspeakable = that_raises(UnspeakableError)
unspeakably_refuses = that_raises(RefusalError)
harsh = that_raises(HarshError)
foreign = that_raises(ValueError, "gr\u00f6\u00dfe \ud800")
reads = that(lambda q, k, v: input())

reshapes = that(lambda q, k, v: setattr(k, "shape", (-1,)))
casts = that(lambda q, k, v: setattr(k, "dtype", np.int32))
freezes = that(lambda q, k, v: v.setflags(write=False))
writes = that(lambda q, k, v: np.add(q, 1, out=q))
closes = that(lambda q, k, v: sys.stdout.close())

hangs = that(lambda q, k, v: time.sleep(600))
hangs_with_a_child = that(lambda q, k, v: (os.fork(), time.sleep(600)))
hangs_in_a_thread = that(lambda q, k, v: threading.current_thread() is threading.main_thread() or time.sleep(600))
leaves_a_child = that(lambda q, k, v: (subprocess.Popen(["sleep", "77.125"]), os._exit(0)))


def exits_in_the_backward(dout, q, k, v):
    os._exit(7)


def reshapes_in_the_backward(dout, q, k, v):
    g = backward(dout, q, k, v)
    dout.shape = (-1,)
    return g


def meddles(q, k, v):
    """Prints, forks, and changes how NumPy takes errors and where the process stands."""
    print("LOOK AT ME", flush=True)
    os.write(1, b"AND ME")
    np.seterr(all="raise")
    os.chdir("/")
    if hasattr(os, "fork"):
        if os.fork() == 0:
            return None
        os.wait()
    with np.errstate(all="ignore"):
        return attention(q, k, v)


def waits(q, k, v):
    """From the second head width on, until there is a file "go"."""
    SEEN.append(q.shape[-1])
    while q.shape[-1] != SEEN[0] and not Path("go").exists():
        time.sleep(0.02)
    return attention(q, k, v)
