"""Records of ops that are made of other ops: the equations and the known mistakes of a part are those of its own record.

In a run of the whole, the stages of a part have its name in front: "attention: dw_q". A mistake of a part is a mistake of the
whole, at those stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.op import Change, Op, Problem, Values


class Part:
    """A run of the whole, as the equations of a part see it: all names have ``name`` in front."""

    def __init__(
        self, run: Any, name: str, op: Op, given: Mapping[str, Array], inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        """given : values of the run, with the axis of the samples in front, that are inputs or cotangents of the part"""
        first = {n: x[0] for n, x in given.items()}
        vars(self).update(
            run=run, name=name, op=op, given=dict(given), options=dict(options),
            problem=Problem(op, {n: first.get(n, inputs.get(n)) for n in inputs}, dict(options), {}),
        )  # fmt: skip
        setattr(run, f"part {name}", self)

    def __getattr__(self, name: str) -> Any:
        run = vars(self)["run"]
        known = vars(run).get(f"{vars(self)['name']}: {name}", self)
        return getattr(run, name) if known is self else known

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.run, f"{self.name}: {name}", value)

    def in_run(self, run: Any) -> Part:
        """The same part of another run."""
        other = Part.__new__(Part)
        vars(other).update(vars(self) | {"run": run})
        return other

    def forward(self, output: str) -> Array:
        self.op.forward(self)
        return np.asarray(getattr(self, output))

    def backward(self, cotangent: str, value: Array) -> Values:
        """The gradients of the part, by the names that they have in it."""
        self.given[cotangent] = value
        self.problem.cotangents[cotangent] = value[0]
        self.op.backward(self)
        found = {n: y for n in self.problem.gradients if (y := vars(self.run).get(f"{self.name}: {n}")) is not None}
        finished: Values = self.keep("finish", lambda: found)
        return finished

    # -- what `npattn.verify.stages.Run` has

    def keep(self, name: str, value: Callable[[], Any], error: Any = None) -> Any:
        return self.run.keep(f"{self.name}: {name}", value, error)

    def input(self, name: str, x: Any) -> Any:
        if name in self.given:
            y = self.given[name]
            return self.keep(name, lambda: y.reshape(len(y), *np.shape(x)))
        return self.run.input(f"{self.name}: {name}", x)

    def rounded(self, name: str, *given: Any) -> Any:
        return self.run.rounded(f"{self.name}: {name}", *given)

    def sum_of_two(self, name: str, *given: Any) -> Any:
        return self.run.sum_of_two(f"{self.name}: {name}", *given)

    def product(self, name: str, *given: Any) -> Any:
        return self.run.product(f"{self.name}: {name}", *given)

    def linear(self, name: str, *given: Any) -> Any:
        return self.run.linear(f"{self.name}: {name}", *given)

    def total(self, name: str, *given: Any, **more: Any) -> Any:
        return self.run.total(f"{self.name}: {name}", *given, **more)

    def outer(self, name: str, *given: Any, **more: Any) -> Any:
        return self.run.outer(f"{self.name}: {name}", *given, **more)


def of_part(name: str, op: Op, which: Iterable[str]) -> dict[str, Change]:
    """Mistakes of a part as mistakes of the whole."""
    return {f"{name}: {mistake}": _lifted(name, op.changes[mistake]) for mistake in which}


def _lifted(name: str, change: Change) -> Change:
    def lifted(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda run, value: f(vars(run)[f"part {name}"].in_run(run), value)

    stages = {f"{name}: {stage}": lifted(f) for stage, f in change.stages.items()}
    return Change(f"{name}: {change.name}", stages, change.needs, change.convention)


__all__ = ["Part", "of_part"]
