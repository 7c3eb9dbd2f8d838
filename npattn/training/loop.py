"""The loop that every task is trained with.

    g = sum_i n_i g_i / sum_i n_i                           (1)    over the parts of a step; n_i: the tokens that count
    p = AdamW(p, clip(g))                                   (2)    `npattn.training.optimizers`, with the schedule's rate

A task gives two functions. ``batches(n)`` is the batch with number n, and ``loss_and_grads(params, batch, n)`` is its loss,
the gradients, and how many tokens count. Both are pure functions: whatever is drawn at random, texts or dropout masks, is drawn
from (seed, n), as `npattn.Dropout` and ``numpy.random.default_rng((seed, n))`` do. So no generator and no place in the batches
has to be saved, and a training that goes on from a checkpoint repeats the losses to the last bit (same machine, versions, BLAS
and threads). Step s takes the batches s accumulate to (s + 1) accumulate - 1.

>>> import numpy as np
>>> from npattn import LinearParams, linear_backward, linear_forward
>>> w = np.array([[2.0], [-1.0]])
>>> def batches(n):
...     x = np.random.default_rng((0, n)).standard_normal((8, 2))
...     return x, x @ w
>>> def loss_and_grads(params, batch, n):
...     x, y = (z.astype(params.w.dtype) for z in batch)  # complex in check_gradients
...     out, cache = linear_forward(x, params)
...     return ((out - y) ** 2).mean(), linear_backward(2 * (out - y) / y.size, cache).params, len(x)
>>> start = LinearParams(np.zeros((2, 1)), np.zeros(1))
>>> check_gradients(start, loss_and_grads, batches(0))
>>> trained = train(start, loss_and_grads, batches, Training(steps=200, lr=0.1))
>>> trained.params.w.round(1).tolist(), len(trained.log)
([[2.0], [-1.0]], 200)

With ``folder="RUN"`` there are checkpoints, see `npattn.training.checkpoints`, and ``resume=True`` goes on from the last one.
Ctrl-C and SIGTERM end the step, write a checkpoint, and return; the same again ends at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npattn.gradients import GradcheckError
from npattn.models.trees import named_leaves, tree_map
from npattn.ops.allowed import quiet
from npattn.ops.checks import Array, check_class, check_from_0, check_integer
from npattn.tolerances import COMPLEX_STEP, MODEL_GRADIENT
from npattn.training import checkpoints
from npattn.training.optimizers import AdamW, WarmupCosine, clip_factor, global_norm, matrices
from npattn.training.processes import Processes, shared

Loss = Callable[[Any, Any, int], tuple[Any, Any, int]]


@dataclass(frozen=True)
class Training:
    """How long, how fast, and how often something is written. A checkpoint holds it, and goes on with no other.

    steps          : of the optimizer   accumulate : batches a step, equation (1)
    lr, warmup, least_lr : the rate rises in ``warmup`` steps and falls along a cosine to ``least_lr``: `WarmupCosine`
    betas, eps, weight_decay : of `AdamW`   clip : the global norm of the gradients is at most that; 0 is off
    evaluate_every, keep_every : steps from one evaluation, or checkpoint, to the next; 0: after the last step alone

    Raises TypeError, ValueError.
    """

    steps: int
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 0
    least_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluate_every: int = 0
    keep_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("accumulate", 1), ("evaluate_every", 0), ("keep_every", 0)):
            check_integer("Training", name, getattr(self, name), least=least)
        for name in ("eps", "weight_decay", "clip"):
            check_from_0("Training", name, getattr(self, name))
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON gives a list
        self.schedule()

    def schedule(self) -> WarmupCosine:
        return WarmupCosine(self.lr, self.warmup, self.steps, self.least_lr)


class Trained(NamedTuple):
    """What `train` returns."""

    params: Any
    log: list[dict[str, Any]]  # of each step: step (from 1), loss, lr, norm, tokens, seconds, and what `evaluate` gave
    interrupted: bool


class NotFiniteError(ArithmeticError):
    """A loss, gradient or parameter is NaN or inf. The last checkpoint is from before that."""


def train(
    params: Any, loss_and_grads: Loss, batches: Callable[[int], Any], settings: Training, *,
    folder: str | os.PathLike[str] | None = None, save: Callable[[Path, Any], None] | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None, decays: Callable[[str, Array], bool] = matrices,
    frozen: Callable[[str], bool] = lambda name: False, about: Mapping[str, Any] | None = None, resume: bool = False,
    show: Callable[[str], None] | None = None, processes: int = 1,
) -> Trained:  # fmt: skip
    """Trains parameters; see the top of this page.

    params         : a tree of float32 or float64; it is copied
    loss_and_grads : (params, batch, n) -> (loss, gradients as a tree like params, tokens); the loss is a mean over the tokens
    batches        : n -> a batch
    folder         : of checkpoints and log.jsonl   save : (folder, params), writes the model into a checkpoint
    evaluate       : params -> numbers by name, which stand in the log
    decays, frozen : which parameters decay, (name, parameter); which stay as they are, (name): they do not count in clip either
    about          : what else a checkpoint has to agree with, such as a seed and the hash of the texts: what JSON can hold
    resume         : goes on from the last checkpoint of folder, or begins where there is none
    show           : takes lines for a reader, as `print` does; with it a terminal shows the loss, tokens/s and the time left
    processes      : in which the parts of a step are computed, see `npattn.training.processes`: with ``accumulate=2`` in two
    Raises NotFiniteError, ValueError where a checkpoint does not fit, OSError where one cannot be written: the last is left.
    """
    check_class("train", "settings", settings, Training)
    place = None if folder is None else Path(folder)
    optimizer = AdamW(params, settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay,
                      decays=decays, frozen=frozen, copy=np.array if processes == 1 else shared)  # fmt: skip
    about = {"settings": asdict(settings), "about": dict(about or {}), "machine": _machine()}
    log = [] if place is None else _begin(place, optimizer, about, resume, show or _silent)
    schedule, progress = settings.schedule(), _Progress(settings.steps, log, show)
    update, written = quiet(optimizer.step), optimizer.steps
    of_step = Processes(optimizer.params, quiet(loss_and_grads), batches, processes)
    with _asked_to_stop() as stop, _log_file(place) as put, of_step as parts:
        while optimizer.steps < settings.steps and not stop.is_set():
            step = optimizer.steps
            loss, grads, tokens = _of_step(parts, settings.accumulate, step)
            norm = global_norm(tuple(g for name, g in named_leaves(grads).items() if name in optimizer.m))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFiniteError(_first_not_finite(step + 1, loss, grads, optimizer.params))
            update(grads, schedule(step), clip_factor(norm, settings.clip) if settings.clip else 1.0)
            line = {"step": step + 1, "loss": loss, "lr": schedule(step), "norm": norm, "tokens": tokens}
            last = step + 1 == settings.steps
            if evaluate is not None and (last or _every(settings.evaluate_every, step)):
                line |= {name: float(x) for name, x in evaluate(optimizer.params).items()}
            log.append(progress.done(line))
            put(line)
            if last or stop.is_set() or _every(settings.keep_every, step):
                _check_finite(optimizer)
                if place is not None:
                    _write(place, optimizer, about, save, written)
                    written = optimizer.steps
    interrupted = optimizer.steps < settings.steps
    if interrupted and show is not None:
        where = "" if place is None else f"; {place / str(checkpoints.found(place))} goes on with resume" if written else ""
        show(f"interrupted after step {optimizer.steps} of {settings.steps}{where}")
    return Trained(optimizer.params, log, interrupted)


def _every(n: int, step: int) -> bool:
    return n > 0 and (step + 1) % n == 0


@quiet  # what is not finite is told with its name
def _of_step(parts: Processes, accumulate: int, step: int) -> tuple[float, Any, int]:
    """Equation (1)."""
    found = parts(range(step * accumulate, (step + 1) * accumulate))
    if accumulate == 1:
        loss, grads, tokens = next(found)
        return float(loss), grads, tokens
    loss, grads, tokens = 0.0, None, 0
    for of_part, g, count in found:
        loss, tokens = loss + count * float(of_part), tokens + count
        weighted = tree_map(lambda x, count=count: x * count, g)
        grads = weighted if grads is None else tree_map(np.add, grads, weighted)
    return loss / tokens, tree_map(lambda x: x / tokens, grads), tokens


def _first_not_finite(step: int, loss: float, grads: Any, params: Any) -> str:
    """Which tensor holds NaN or inf, in the order loss, gradients, parameters."""
    found = [] if math.isfinite(loss) else [f"the loss is {loss}"]
    for kind, tree in (("gradient", grads), ("parameter", params)):
        wrong = ((n, x[~np.isfinite(x)]) for n, x in named_leaves(tree).items())
        found += next(([f"the first {kind} with it is {n}: {x[0]}, {len(x)} elements"] for n, x in wrong if x.size), [])
    return f"train: step {step}: {'; '.join(found) or 'the norm of the gradients is inf'}"


def check_gradients(params: Any, loss_and_grads: Loss, batch: Any, n: int = 0, *, seed: int = 0) -> None:
    """Compares the gradient of everything with a directional complex step, in float64. Raises GradcheckError with the name.

    Im loss(p + i h u) / h has no rounding error of a difference. Each parameter's part of the direction u is so long that the
    parameter counts as much as any other; one call of loss_and_grads with complex parameters serves all of them. Where the
    whole is wrong, a call for each parameter finds which.

    >>> double = lambda params, batch, n: ((params[0] ** 2).sum(), (3 * params[0],), 1)
    >>> check_gradients((np.ones(2),), double, None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    npattn.gradients.GradcheckError: check_gradients: the gradient of 0 ...
    """
    exact = tree_map(lambda x: np.asarray(x, np.float64), params)
    grads = named_leaves(loss_and_grads(exact, batch, n)[1])
    rng = np.random.default_rng(seed)
    largest = max(float(np.abs(g).max(initial=0)) for g in grads.values())
    least = MODEL_GRADIENT * largest
    directions = {}
    for name, g in grads.items():
        u = rng.standard_normal(g.shape)
        length = float(np.sqrt(np.vdot(g, g)))
        directions[name] = u / (length if length > least else largest)

    def differs(names: list[str]) -> str | None:
        turned = iter(named_leaves(exact))
        moved = tree_map(
            lambda x: x + 1j * COMPLEX_STEP * directions[name] if (name := next(turned)) in names else x + 0j, exact
        )
        loss = loss_and_grads(moved, batch, n)[0]
        if not np.iscomplexobj(loss):
            raise TypeError("check_gradients: the loss is real for complex parameters: give it as cross_entropy gives it")
        numeric = float(loss.imag) / COMPLEX_STEP
        terms = [float((grads[name] * directions[name]).sum()) for name in names]
        analytic = sum(terms)
        # The error of a part is one of the largest gradient of the model: MODEL_GRADIENT, times the length of its direction.
        allowed = least * math.sqrt(sum(float(np.square(directions[name]).sum()) for name in names)) + MODEL_GRADIENT
        if abs(analytic - numeric) <= allowed:
            return None
        return f"along a random direction the backward gives {analytic:.12g}, the complex step {numeric:.12g}"

    if whole := differs(list(grads)):
        for name in grads:
            if part := differs([name]):
                raise GradcheckError(f"check_gradients: the gradient of {name} is wrong: {part}")
        raise GradcheckError(f"check_gradients: the gradient of all parameters together is wrong: {whole}")


def steps_in(
    seconds: float, params: Any, loss_and_grads: Loss, batches: Callable[[int], Any], settings: Training, *, tried: int = 5,
    processes: int = 1,
) -> int:  # fmt: skip
    """How many steps this machine makes in so many seconds, from a few that are thrown away.

    A schedule that followed the clock would give other losses after each resume. So the steps are fixed before the first one,
    and stand in the checkpoints; a machine that becomes slower takes longer.
    """
    short = replace(settings, steps=1, warmup=0, evaluate_every=0)
    # The first step is slower than others: it begins the processes, too.
    trained = train(params, loss_and_grads, batches, replace(short, steps=tried + 1), processes=processes)
    if trained.interrupted:
        raise KeyboardInterrupt
    return max(int(seconds * tried / (trained.log[-1]["seconds"] - trained.log[0]["seconds"])), 1)


def draw(log: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """An image of the loss, and of what was evaluated, over the steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("matplotlib is missing, which draws the loss: pip install 'npattn[plots]'") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step")
    usual = {"step", "lr", "norm", "tokens", "seconds"}
    for name in dict.fromkeys(key for line in log for key in line if key not in usual):
        points = [(line["step"], line[name]) for line in log if name in line]
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 50 else None, markersize=3, linewidth=1)
    axes.legend()
    figure.savefig(path)


# --- around the steps --------------------------------------------------------------------------------------------------------


def _begin(
    place: Path, optimizer: AdamW, about: Mapping[str, Any], resume: bool, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Goes on from the last checkpoint, or makes sure that there is none; the log up to there."""
    name = checkpoints.found(place)
    if name is not None and not resume:
        raise ValueError(f"train: {place} has a checkpoint, {name}: go on from it with resume, or give another folder")
    if name is not None:
        state = checkpoints.read(place, optimizer, about)
        show(f"goes on from {place / name}")
        if other := [f"{k} was {v} and is {about['machine'].get(k)}" for k, v in state.get("machine", {}).items()
                     if v != about["machine"].get(k)]:  # fmt: skip
            show(f"the losses may differ in their last bits: {', '.join(other)}")
    elif resume:
        show(f"{place} has no checkpoint: begins with step 1")
    return checkpoints.read_log(place, optimizer.steps)


def _check_finite(optimizer: AdamW) -> None:
    """A step of finite gradients may still overflow; no checkpoint holds what is not finite."""
    wrong = [name for name, p in named_leaves(optimizer.params).items() if not np.isfinite(p).all()]
    if wrong:
        raise NotFiniteError(f"train: step {optimizer.steps}: the first parameter with NaN or inf is {wrong[0]}")


def _write(place: Path, optimizer: AdamW, about: Mapping[str, Any], save: Any, before: int) -> None:
    try:
        checkpoints.write(place, optimizer, about, save)
    except OSError as error:
        left = f"that of step {before} is left" if before else "there is none before it"
        raise OSError(f"train: the checkpoint of step {optimizer.steps} could not be written; {left}: {error}") from error


def _machine() -> dict[str, str]:
    """What the last bits depend on."""
    threads = {name: os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE")}
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    library = f"{blas.get('name')} {blas.get('version')}"
    return {"numpy": np.__version__, "BLAS": library, "processors": str(os.cpu_count()), **threads}


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one does what it did before."""
    stop, before = threading.Event(), dict[int, Any]()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(*what: object) -> None:
        stop.set()
        restore()

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()


@contextlib.contextmanager
def _log_file(place: Path | None) -> Iterator[Callable[[Any], None]]:
    """What takes the lines of the log."""
    if place is None:
        yield _silent
        return
    place.mkdir(parents=True, exist_ok=True)
    with (place / checkpoints.LOG).open("a", encoding="utf-8") as file:

        def put(line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        yield put


def _silent(what: Any) -> None:
    """Nobody reads it."""


class _Progress:
    """Measures the time, says what was evaluated, and shows on a terminal where the training is."""

    def __init__(self, steps: int, log: list[dict[str, Any]], show: Callable[[str], None] | None) -> None:
        self.steps, self.show = steps, show
        self.before = log[-1]["seconds"] if log else 0.0
        self.tokens, self.made, self.shown, self.started = 0, 0, 0.0, time.monotonic()
        self.live = show is not None and sys.stderr is not None and sys.stderr.isatty()

    def done(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line with its time."""
        now = time.monotonic()
        passed = now - self.started
        self.tokens, self.made = self.tokens + line["tokens"], self.made + 1
        line["seconds"] = round(self.before + passed, 3)
        found = {k: x for k, x in line.items() if k not in ("step", "loss", "lr", "norm", "tokens", "seconds")}
        left = (self.steps - line["step"]) * passed / self.made
        text = f"step {line['step']} of {self.steps}, loss {line['loss']:.4f}"
        rate = f"{self.tokens / max(passed, 1e-9):,.0f} tokens/s, {int(left) // 60}:{int(left) % 60:02} left"
        if found and self.show is not None:
            self._tell("\r\033[K")
            self.show(", ".join([text, *(f"{k} {x:.4f}" for k, x in found.items()), rate]))
        elif now - self.shown > 0.5 or line["step"] == self.steps:
            self.shown = now
            self._tell(f"\r\033[K{text}, {rate}" if line["step"] < self.steps else "\r\033[K")
        return line

    def _tell(self, what: str) -> None:
        if self.live:
            with contextlib.suppress(OSError, ValueError):
                print(what, end="", file=sys.stderr, flush=True)


__all__ = ["NotFiniteError", "Trained", "Training", "check_gradients", "draw", "steps_in", "train"]
