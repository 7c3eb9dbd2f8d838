"""AdamW, clipping by the global norm, and a schedule of the learning rate.

    m = b1 m + (1 - b1) g                  v = b2 v + (1 - b2) g^2                      (1)
    p = p - lr decay p                     for parameters that decay                    (2)
    p = p - lr m' / (sqrt(v') + eps)       m' = m / (1 - b1^t),  v' = v / (1 - b2^t)    (3)    t: the number of the step, from 1

Kingma and Ba 2015; with the decay apart from the gradient: Loshchilov and Hutter 2019. torch.optim.AdamW computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npattn.models.trees import named_leaves, tree_map
from npattn.ops.checks import Array, check_from_0, check_integer

BLOCK = 1 << 15  # elements at a time: six arrays of them, 768 KiB in float32, stay in a second-level cache


def matrices(name: str, p: Array) -> bool:
    """Which parameters decay: weights and tables, and neither biases nor norms. The rule of nanoGPT."""
    return p.ndim >= 2


class AdamW:
    """AdamW for a tree of parameters. It owns copies of them, which `step` changes in place: see ``params``.

    lr      : the learning rate, unless a step has another
    betas, eps, weight_decay : b1 and b2, eps and decay
    decays  : decays(name, parameter), whether a parameter decays; `matrices` unless given
    frozen  : frozen(name), whether a parameter stays as it is; none unless given
    copy    : how parameters are copied: `npattn.training.processes.shared` where other processes have to see them
    Raises TypeError, ValueError.

    >>> optimizer = AdamW((np.ones(2), None), lr=0.1, weight_decay=0.0)
    >>> optimizer.step((np.array([3.0, -0.01]), None))
    >>> optimizer.params[0].round(6).tolist()
    [0.9, 1.1]
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01, decays: Callable[[str, Array], bool] = matrices,
        frozen: Callable[[str], bool] = lambda name: False, copy: Callable[[Array], Array] = np.array,
    ) -> None:  # fmt: skip
        self.lr, self.eps = check_from_0("AdamW", "lr", lr), check_from_0("AdamW", "eps", eps)
        self.betas = tuple(check_from_0("AdamW", f"betas[{n}]", b, below=1.0) for n, b in enumerate(betas))
        self.weight_decay = check_from_0("AdamW", "weight_decay", weight_decay)
        self.steps = 0  # that were made
        self.params = tree_map(copy, params)
        self._leaves = named_leaves(self.params)
        if any(p.dtype.kind != "f" or p.dtype.itemsize < 4 for p in self._leaves.values()):
            raise TypeError("AdamW: parameters have to be float32, float64 or longdouble: small steps are lost in others")
        self._decays = {name: bool(decays(name, p)) for name, p in self._leaves.items()}
        self._moves = {name: not frozen(name) for name in self._leaves}
        self.m = {name: np.zeros_like(p) for name, p in self._leaves.items() if self._moves[name]}
        self.v = {name: np.zeros_like(p) for name, p in self._leaves.items() if self._moves[name]}

    def step(self, grads: Any, lr: float | None = None, factor: float = 1.0) -> None:
        """Equations (1) to (3) with the gradients times a factor, which is that of clipping."""
        lr = self.lr if lr is None else check_from_0("AdamW", "lr", lr)
        found = named_leaves(grads)
        if wrong := sorted(set(found) ^ set(self._leaves)):
            what = "there, and there is no such parameter" if wrong[0] in found else "missing"
            raise ValueError(f"AdamW: the gradient of {wrong[0]} is {what}")
        self.steps += 1
        for name, p in self._leaves.items():
            if found[name].shape != p.shape:
                raise ValueError(f"AdamW: the gradient of {name} has shape {found[name].shape}, expected {p.shape}")
            if self._moves[name]:
                self._update(p, found[name], self.m[name], self.v[name], lr, self._decays[name], factor)

    def _update(self, p: Array, g: Array, m: Array, v: Array, lr: float, decays: bool, factor: float) -> None:
        (b1, b2), t = self.betas, self.steps
        rate, root = lr / (1 - b1**t), math.sqrt(1 - b2**t)
        flat = [x.reshape(-1) for x in (p, np.ascontiguousarray(g), m, v)]
        spare = np.empty(min(BLOCK, p.size), p.dtype)
        for start in range(0, p.size, BLOCK):
            p, g, m, v = (x[start : start + BLOCK] for x in flat)
            s = spare[: len(p)]
            m *= b1
            m += np.multiply(g, (1 - b1) * factor, out=s)  # (1)
            v *= b2
            np.multiply(g, g, out=s)
            v += np.multiply(s, (1 - b2) * factor**2, out=s)  # (1)
            if decays and self.weight_decay:
                p *= 1 - lr * self.weight_decay  # (2)
            np.sqrt(v, out=s)
            s *= 1 / root
            s += self.eps
            np.divide(m, s, out=s)
            p -= np.multiply(s, rate, out=s)  # (3)


def global_norm(grads: Any) -> float:
    """The length of all gradients as one vector, in float64."""
    return math.sqrt(sum(float(np.vdot(g, g)) if g.dtype == np.float64 else _squares(g) for g in named_leaves(grads).values()))


def _squares(g: Array) -> float:
    """A sum of squares of float32 in float64: a product of float32 would lose digits, and overflow at 1e19."""
    flat = g.reshape(-1)
    return sum(float(np.square(flat[n : n + BLOCK], dtype=np.float64).sum()) for n in range(0, g.size, BLOCK))


def clip_factor(norm: float, most: float) -> float:
    """By what gradients of this global norm are multiplied, so that it is at most ``most``.

    >>> clip_factor(5.0, 1.0), clip_factor(0.5, 1.0)
    (0.2, 1.0)
    """
    check_from_0("clip_factor", "most", most)
    return min(1.0, most / norm) if norm else 1.0


@dataclass(frozen=True)
class WarmupCosine:
    """The learning rate of a step: it rises to ``lr`` in ``warmup`` steps, and falls along a cosine to ``least`` at ``steps``.

    >>> schedule = WarmupCosine(lr=1.0, warmup=2, steps=10, least=0.1)
    >>> [round(schedule(t), 3) for t in (0, 1, 2, 6, 10, 99)]
    [0.333, 0.667, 1.0, 0.55, 0.1, 0.1]
    """

    lr: float
    warmup: int
    steps: int
    least: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "least"):
            check_from_0("WarmupCosine", name, getattr(self, name))
        for name in ("warmup", "steps"):
            check_integer("WarmupCosine", name, getattr(self, name), least=0)
        if self.steps <= self.warmup:
            raise ValueError(f"WarmupCosine: steps is {self.steps}, expected more than warmup={self.warmup}")

    def __call__(self, step: int) -> float:
        """step : counted from 0, as in nanoGPT"""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = min((step - self.warmup) / (self.steps - self.warmup), 1.0)
        return self.least + (self.lr - self.least) * (1 + math.cos(math.pi * done)) / 2


__all__ = ["AdamW", "WarmupCosine", "clip_factor", "global_norm", "matrices"]
