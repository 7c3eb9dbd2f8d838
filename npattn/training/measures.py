"""How sure a score is, and how long a task is trained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from npattn.ops.checks import check_integer
from npattn.training import checkpoints
from npattn.training.loop import Loss, Training, steps_in

Z = 1.959963984540054  # of a normal variable, 95 % lie within that many standard deviations


class Accuracy(NamedTuple):
    """A share of right answers, and the interval that holds the true one in 95 % of such tests."""

    score: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.score:.3f} ({self.low:.3f} to {self.high:.3f})"


def accuracy(right: int, count: int) -> Accuracy:
    """The share with its Wilson interval of 95 %. Wilson 1927.

        centre = (k + z^2 / 2) / (n + z^2)        half = z sqrt(k (n - k) / n + z^2 / 4) / (n + z^2)

    >>> print(accuracy(94, 100))
    0.940 (0.875 to 0.972)
    """
    n, k = check_integer("accuracy", "count", count, least=1), check_integer("accuracy", "right", right, least=0)
    if k > n:
        raise ValueError(f"accuracy: right is {k}, expected at most count={n}")
    centre, half = (k + Z * Z / 2) / (n + Z * Z), Z * math.sqrt(k * (n - k) / n + Z * Z / 4) / (n + Z * Z)
    return Accuracy(k / n, max(0.0, centre - half), min(1.0, centre + half))


def settings_for(
    params: Any, loss_and_grads: Loss, batches: Callable[[int], Any], steps: int, minutes: float | None,
    given: Mapping[str, Any], options: Mapping[str, Any],
) -> Training:  # fmt: skip
    """The settings of a training: those of its checkpoint where it goes on, so that the schedule is the same.

    minutes : how long, in place of steps   given : what else `Training` takes   options : of `npattn.training.loop.train`
    """
    folder = options.get("folder")
    if options.get("resume") and folder is not None and checkpoints.found(Path(folder)) is not None:
        return Training(**checkpoints.described(Path(folder))["settings"])
    if minutes is not None:
        steps = steps_in(60 * minutes, params, loss_and_grads, batches, Training(1))
        (options.get("show") or (lambda line: None))(f"{steps} steps in {minutes:g} minutes at the speed of this moment")
    warmup = min(given.get("warmup", 0), steps - 1)
    return Training(steps, **{**given, "warmup": warmup}, keep_every=max(steps // 10, 1))


def fingerprint(texts: Any) -> str:
    """A hash of texts, so that a training does not go on with others."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


__all__ = ["Accuracy", "accuracy", "fingerprint", "settings_for"]
