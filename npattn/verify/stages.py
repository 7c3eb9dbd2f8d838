"""The engine: runs an op's equations stage by stage, with stages changed, rounded or noisy.

The equations of an op are written a second time (`Op.forward`, `Op.backward`), and each value has a name:
``x.keep(name, value)``. Unchanged, they agree with the reference up to the last bits; the tests check that. A stage may be

    changed  : a `Change` replaces its value by that of a known mistake or of another convention
    noisy    : N(0, 1) times its rounding error is added, in `SAMPLES` samples at once. The root mean square of the differences
               to the result without noise is sigma, for ops that have no formula for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from npattn.ops.allowed import swap, weight_gradient
from npattn.ops.checks import Array
from npattn.tolerances import ROUNDING_STD
from npattn.verify.op import Change, Op, Problem, Truth, Values, better_dtype, cast, facts
from npattn.verify.precision import Precision
from npattn.verify.rounding import Rounding

SAMPLES = 32  # of the noise: the standard error of sigma is 1 / sqrt(64), 12 percent
NOT_APPLICABLE = (ValueError, IndexError, TypeError, AttributeError, KeyError, ZeroDivisionError)
"""What a change may raise in a call in which it cannot be made."""


class Run:
    """One run of the equations: its attributes are the values of the stages.

    In every run of an op that gets its inputs by `input`, the first axis of each value is that of the samples. The first sample
    has no noise; in a run without noise it is the only one.
    """

    def __init__(
        self, problem: Problem, given: Mapping[str, Any] | None = None, align: str = "top_left", *,
        changes: Iterable[Change] = (), precision: Precision | None = None, dtype: Any = None, low: Any = None,
        start: Run | None = None, recorded: bool = False,
    ) -> None:  # fmt: skip
        """given: the options of the candidate; low: its dtype; start: a recorded run, reused up to the first changed stage."""
        self.original, self.align, self.low = problem, align, np.dtype(low or problem.dtype)
        self.dtype = problem.dtype if dtype is None else dtype
        if start is None:
            self.problem = problem if dtype is None else problem.astype(dtype)
            options = problem.options if given is None else given
            self.options = {name: x if dtype is None else cast(x, dtype) for name, x in options.items()}
        else:
            self.problem, self.options = start.problem, start.options
        self.precision, self.sampled = precision, False
        self.rng = None if precision is None else np.random.default_rng(0)
        tiny = float(np.finfo(np.float64 if precision is None else precision.dtype).smallest_normal)
        self.rounding = Rounding(False, 0.0 if precision is None else precision.u, tiny)
        self.unit, self.input_error = self.rounding.unit, ROUNDING_STD * (0.0 if precision is None else precision.inputs)
        self.changes: dict[str, list[Callable[[Any, Any], Any]]] = {}
        for change in changes:
            for stage, value in change.stages.items():
                self.changes.setdefault(stage, []).append(value)
        self.recorded, self.log = recorded, list[dict[str, Any]]()  # what each stage has set, in the order of the equations
        self.start = None if start is None else iter(start.log)

    def __getattr__(self, name: str) -> Any:  # the values of the stages
        raise AttributeError(name)

    def keep(self, name: str, value: Callable[[], Any], error: Callable[[Any], Any] | None = None) -> Any:
        """A stage: its honest value, with noise in a noisy run, then changed. error(first sample) : the size of the noise"""
        if self.start is not None and name not in self.changes:
            known = next(self.start)
            self.__dict__.update(known)
            return known[name]
        self.start, before = None, dict(self.__dict__) if self.recorded else {}
        x = value()
        if error is not None and self.rng is not None:
            x = x + self.noise(*x.shape[1:]) * error(x[0])
        setattr(self, name, x)
        for change in self.changes.get(name, ()):
            setattr(self, name, change(self, getattr(self, name)))
        if self.recorded:  # a change may set other values, too
            more = {n: y for n, y in self.__dict__.items() if y is not before.get(n)}
            self.log.append({name: getattr(self, name), **more})
        return getattr(self, name)

    def noise(self, *shape: int) -> Array:
        """N(0, 1) in all samples but the first."""
        assert self.rng is not None
        noise = self.rng.standard_normal((SAMPLES + 1, *shape))
        noise[0] = 0
        return noise

    # -- stages with a rounding error

    def input(self, name: str, x: Any) -> Any:
        """An input, with an axis of samples in front; None stays None."""
        self.sampled = True
        if x is None:
            return self.keep(name, lambda: None)
        return self.keep(name, lambda: x[None], (lambda x: self.input_error * np.abs(x)) if self.input_error else None)

    def rounded(self, name: str, value: Callable[[], Array], units: float = 1.0) -> Any:
        return self.keep(name, value, lambda x: units * self.unit * np.abs(x))

    def sum_of_two(self, name: str, a: Array, b: Array) -> Any:
        """a + b, which is exact where one of them is 0."""
        return self.keep(name, lambda: a + b, lambda _: self._adding(a[0], b[0]))

    def _adding(self, a: Array, b: Array) -> Array:
        return np.where((a != 0) & (b != 0), self.unit * np.abs(a + b), 0)

    def product(self, name: str, a: Array, b: Array) -> Any:
        return self.keep(name, lambda: a @ b, lambda _: self.rounding.product(a[0], b[0]))

    def linear(self, name: str, x: Array, w: Array, b: Any) -> Any:
        """x w + b; b may be None."""
        if b is None:
            return self.product(name, x, w)

        def error(_: Any) -> Array:
            y = x[0] @ w[0]
            return np.hypot(self.rounding.product(x[0], w[0]), self._adding(y, b[0]))

        return self.keep(name, lambda: x @ w + b, error)

    def total(self, name: str, terms: Array, axis: Any, keepdims: bool = False) -> Any:
        """A sum; the axis is counted from the end."""
        return self.keep(name, lambda: terms.sum(axis, keepdims=keepdims),
                         lambda x: self.rounding.rounding_of_sum(terms[0], axis).reshape(x.shape))  # fmt: skip

    def outer(self, name: str, x: Array, dy: Array, heads: int = 1, axis: int = 1) -> Any:
        """x^T dy summed over all tokens: (.., B, L, M) and (.., B, L, N) -> (.., M, N)."""
        if not (np.isfinite(x).all() and np.isfinite(dy).all()):  # never in a noisy run
            return self.keep(name, lambda: weight_gradient(x[0], dy[0], heads, axis)[None])
        a, b = (y.reshape(len(y), -1, y.shape[-1]) for y in (x, dy))
        return self.product(name, swap(a), b)


# --- whole runs ------------------------------------------------------------------------------------------------------------


def run(
    problem: Problem, given: Mapping[str, Any] | None = None, align: str = "top_left", changes: Iterable[Change] = (), *,
    dtype: Any = None, low: Any = None, precision: Precision | None = None, backward: Iterable[Change] | None = None,
    gradients: bool = True, fused: bool = True, returned: Array | None = None,
) -> Values:  # fmt: skip
    """Outputs and gradients with these changes, computed in ``dtype``; in a noisy run the first axis is that of the samples.

    given    : the options as the candidate gets them; align : the alignment of causal and window
    changes  : those of the forward, and of the backward too unless ``backward`` gives others for it
    fused    : the backward uses the outputs that the forward has kept; else it computes them again, with its own changes
    returned : the first output that the candidate returned; a fused backward starts from it
    """
    here = facts(problem, problem.options if given is None else given)
    changes = [c for c in changes if c.needs <= here]
    inner = changes if backward is None else [c for c in backward if c.needs <= here]
    how: dict[str, Any] = {"dtype": dtype, "low": low, "precision": precision}
    with np.errstate(all="ignore"):
        x = Run(problem, given, align, changes=changes, **how)
        problem.op.forward(x)
        found = {t: getattr(x, t) for t in problem.outputs}
        if gradients:
            y = _for_backward(x, changes, inner, fused, lambda kept: Run(problem, given, align, changes=kept, **how))
            if returned is not None and fused:
                setattr(y, f"saved_{problem.outputs[0]}", cast(returned, y.dtype))
            problem.op.backward(y)
            found |= _gradients(y)
            found = y.keep("finish", lambda: found)
    return {t: v[0] for t, v in found.items()} if x.sampled and precision is None else found


def _for_backward(
    x: Run, changes: list[Change], inner: list[Change], fused: bool, again: Callable[[list[Change]], Run]
) -> Run:
    """The run that the backward continues: a forward with the backward's changes, and the outputs that the forward kept."""
    op, y = x.problem.op, x
    kept = {t: getattr(x, t) for t in op.outputs}
    if inner != changes or any(op.output_only_stages & c.stages.keys() for c in changes):
        y = again([_kept_by_forward(op, c) for c in inner])
        op.forward(y)
        if not fused or inner == changes:
            kept = {t: getattr(y, t) for t in op.outputs}
    for t, value in kept.items():
        setattr(y, f"saved_{t}", value)
    return y


def _kept_by_forward(op: Op, change: Change) -> Change:
    """The change without `Op.output_only_stages`: they are not in what the forward keeps for the backward."""
    return Change(change.name, {n: f for n, f in change.stages.items() if n not in op.output_only_stages})


def _gradients(x: Run) -> Values:
    return {t: getattr(x, t) for t in x.problem.gradients if getattr(x, t, None) is not None}


def attempt(*args: Any, **options: Any) -> Values:
    """`run`; empty if a change cannot be made in this call."""
    try:
        return run(*args, **options)
    except NOT_APPLICABLE:
        return {}


class Variants:
    """What `run` returns with one more change: only the stages from the changed one on are computed again."""

    def __init__(
        self, problem: Problem, given: Mapping[str, Any], align: str, base: Iterable[Change] = (), dtype: Any = np.float64,
        returned: Array | None = None,
    ) -> None:  # fmt: skip
        """returned : the first output that the candidate returned, see `run`"""
        here = facts(problem, given)
        self.call, self.dtype, self.base = (problem, given, align), dtype, [c for c in base if c.needs <= here]
        with np.errstate(all="ignore"):
            self.forwards = self._recorded(self.base)
            problem.op.forward(self.forwards)
            self.forward_stages = frozenset(next(iter(known)) for known in self.forwards.log)
            self.backwards = _for_backward(self.forwards, self.base, self.base, True, self._recorded)
            if returned is not None:
                setattr(self.backwards, f"saved_{problem.outputs[0]}", cast(returned, dtype))
            problem.op.backward(self.backwards)
        self.unchanged = self._by_tensor(self.forwards, self.backwards)

    def _recorded(self, changes: Iterable[Change]) -> Run:
        problem, given, align = self.call
        return Run(problem, given, align, changes=changes, dtype=self.dtype, low=problem.dtype, recorded=True)

    def _continue_from(self, start: Run, changes: list[Change]) -> Run:
        problem, given, align = self.call
        return Run(problem, given, align, changes=changes, dtype=self.dtype, low=problem.dtype, start=start)

    def _by_tensor(self, forwards: Run, backwards: Run | None = None) -> Values:
        found = {t: getattr(forwards, t) for t in forwards.problem.outputs}
        if backwards is not None:
            found = backwards.keep("finish", lambda: found | _gradients(backwards))
        return {t: x[0] for t, x in found.items()} if forwards.sampled else found

    def changes_forward(self, change: Change) -> bool:
        return bool(change.stages.keys() & self.forward_stages)

    def outputs(self, change: Change) -> Values | None:
        """The outputs with this change; empty if it does not reach them, None if it changes nothing at all."""
        if not self.changes_forward(change):
            return None if _changes_nothing(self.backwards, change) else {}
        return None if _changes_nothing(self.forwards, change) else self.forward(change)

    def forward(self, change: Change) -> Values:
        """The outputs with this change of the forward."""
        x = self._continue_from(self.forwards, [*self.base, change])
        with np.errstate(all="ignore"):
            x.problem.op.forward(x)
        return self._by_tensor(x)

    def everything(self, change: Change) -> Values:
        """What `run` returns with this change."""
        if self.changes_forward(change):
            return run(*self.call, [*self.base, change], dtype=self.dtype, low=self.call[0].dtype)
        return next(self.in_backward(change))

    def in_backward(self, change: Change) -> Iterator[Values]:
        """What `run` returns with this change in the backward alone.

        If the change is one of the forward, there are two: of a backward that starts from the outputs that the forward has
        kept, and of one that computes them again, with the change.
        """
        op = self.call[0].op
        *base, change = (_kept_by_forward(op, c) for c in (*self.base, change))
        if not change.stages:
            return
        x = self._continue_from(self.backwards, [*base, change])
        with np.errstate(all="ignore"):
            op.forward(x)
            again = {t: getattr(x, t) for t in op.outputs}
            kept = {t: getattr(self.backwards, f"saved_{t}") for t in op.outputs}
            after_forward = dict(vars(x))
        for outputs in (kept, again) if self.changes_forward(change) else (kept,):
            vars(x).clear()
            vars(x).update(after_forward)
            with np.errstate(all="ignore"):
                for t, value in outputs.items():
                    setattr(x, f"saved_{t}", value)
                op.backward(x)
                found = self._by_tensor(self.forwards, x)
            yield found


def _changes_nothing(x: Run, change: Change) -> bool:
    """Whether a change leaves its stages as they are, for example "mask is ignored" if the mask allows everything."""
    tried = Run.__new__(Run)
    tried.__dict__.update(vars(x))
    for stage, value in change.stages.items():
        was: Any = getattr(x, stage, None)
        with np.errstate(all="ignore"):
            now: Any = value(tried, was)
        others = all(y is getattr(x, name, None) for name, y in vars(tried).items())
        if not others or type(now) is not type(was) or isinstance(was, dict):
            return False
        if not np.array_equal(now, was, equal_nan=np.asarray(was).dtype.kind == "f"):
            return False
    return True


# --- sigma without a formula -------------------------------------------------------------------------------------------------

UNSUPPORTED = "precision classes of layers: float32 and float64, with inputs and outputs rounded (M1)"


def no_inner_rounding(problem: Problem, precision: Precision) -> str:
    """Why a precision class is not supported: it rounds to a smaller format within the equations. "" if it does not."""
    inner = (precision.scores, precision.weights, precision.dweights, precision.dscores, precision.delta_out)
    return UNSUPPORTED if any(inner) else ""


def finite(x: Any) -> Any:
    """0 in place of NaN and inf: they are masked, or make the truth NaN. Neither has a rounding error."""
    return np.where(np.isfinite(x), x, 0) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def by_noise(problem: Problem, precision: Precision, clean: Callable[[Any], Any] = finite) -> Truth | None:
    """The reference's values, and for sigma the spread of the noisy equations; None if there is no better dtype."""
    dtype = better_dtype(precision.dtype)
    if dtype is None:
        return None
    wide = problem.astype(dtype)
    with np.errstate(all="ignore"):
        found = problem.op.reference(wide)
        values = {name: found[name] for name in (*problem.outputs, *problem.gradients)}
        noisy = run(wide.each(clean), precision=precision)
        return Truth(values, {name: _spread(noisy[name], want, precision) for name, want in values.items()})


def _spread(samples: Array, want: Array, precision: Precision) -> Array:
    """sigma: the rms of the samples' differences to the first, which has no noise, and the rounding of the result."""
    noisy = samples[1:] if len(samples) > 1 else samples  # one sample alone: nothing was rounded, as in a gather
    error = np.asarray(noisy - samples[:1], np.float64)
    top = np.maximum(np.abs(error).max(0), 1e-300)  # squares of numbers below 1e-154 would underflow
    rms = top * np.sqrt(np.square(error / top).mean(0))
    size = np.where(np.isfinite(want), np.abs(want), 0).astype(np.float64)
    low = np.hypot(ROUNDING_STD * precision.out * size, precision.subnormal) if precision.out else 0.0
    rounded = np.where(size > 0, low, 0)
    return np.where(np.isfinite(want), np.hypot(rms, rounded), 0.0)


__all__ = ["NOT_APPLICABLE", "SAMPLES", "Run", "Variants", "attempt", "by_noise", "finite", "no_inner_rounding", "run"]
