"""``python -m benchmarks rnn``: the recurrent layer, and torch.nn.RNN, jax and onnxruntime with the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import npattn as na
from benchmarks import harness, roofline, table
from benchmarks.harness import Array, Rival
from benchmarks.machine import library, threads
from benchmarks.rivals import session
from npattn.convert import rnn_to_onnx, rnn_to_torch

Row = dict[str, Any]
COLUMNS = ("torch.nn.RNN", "jax scan", "onnxruntime RNN")
TOLERANCE = 1e-4  # of the largest element
NAMES = ("h", "dx", "dw_x", "dw_h")


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    N: int  # inputs, and hidden units
    backward: bool = False

    @property
    def name(self) -> str:
        return f"B={self.B} T={self.T} N={self.N} {'both' if self.backward else 'forward'}"

    def flops(self) -> float:
        """Two products a step; backwards two more for each, but for w_h of the first step, before which the state is 0."""
        return (12.0 * self.T - 2.0 if self.backward else 4.0 * self.T) * self.B * self.N**2


class Arrays(NamedTuple):
    x: Array
    dh: Array
    params: na.RNNParams


def grid(size: str) -> list[Shape]:
    if size == "tiny":
        return [Shape(2, 3, 4, b) for b in (False, True)]
    batches, steps, units = ((8, 64), (64,), (128,)) if size == "quick" else ((8, 64), (64, 256), (128, 512))
    return [Shape(B, T, N, b) for b, N, B, T in itertools.product((False, True), units, batches, steps)]


def draw(shape: Shape) -> Arrays:
    rng, N = np.random.default_rng(0), shape.N

    def normal(*sizes: int, scale: float = 1.0) -> Array:
        x: Array = rng.standard_normal(sizes, dtype=np.float32) * np.float32(scale)
        return x

    params = na.RNNParams(normal(N, N, scale=N**-0.5), normal(N, N, scale=0.7 * N**-0.5), normal(N, scale=0.1))
    return Arrays(normal(shape.B, shape.T, N), normal(shape.B, shape.T, N), params)


def truth(shape: Shape, a: Arrays) -> dict[str, Array]:
    wide = na.RNNParams(*(p.astype(np.float64) for p in a.params if p is not None))  # none of them is
    h, cache = na.rnn_forward(a.x.astype(np.float64), None, wide)
    if not shape.backward:
        return {"h": h}
    g = na.rnn_backward(a.dh.astype(np.float64), cache)
    return {"h": h, "dx": g.x, "dw_x": g.params.w_x, "dw_h": g.params.w_h}


def named(found: Any) -> dict[str, Array]:
    return dict(zip(NAMES, found, strict=False))


def of_npattn(shape: Shape, a: Arrays) -> Rival:
    def call() -> Any:
        h, cache = na.rnn_forward(a.x, None, a.params)
        if not shape.backward:
            return (h,)
        g = na.rnn_backward(a.dh, cache)
        return h, g.x, g.params.w_x, g.params.w_h

    return Rival("npattn", call, named)


def of_torch(shape: Shape, a: Arrays) -> Rival:
    torch = library("torch")
    torch.set_num_threads(threads())
    layer = torch.nn.RNN(shape.N, shape.N, batch_first=True)
    layer.load_state_dict({n: torch.tensor(np.ascontiguousarray(p)) for n, p in rnn_to_torch(a.params).items()})
    x, dh = torch.tensor(a.x, requires_grad=shape.backward), torch.tensor(a.dh)
    leaves = (x, layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0)

    def call() -> Any:
        if shape.backward:
            h = layer(x)[0]
            return h, *torch.autograd.grad(h, leaves, dh)
        with torch.no_grad():
            return (layer(x)[0],)

    def result(found: Any) -> dict[str, Array]:
        arrays = [t.detach().numpy() for t in found[:4]]
        return named([*arrays[:2], *(w.T for w in arrays[2:])])

    return Rival("torch.nn.RNN", call, result)


def of_jax(shape: Shape, a: Arrays) -> Rival:
    jax = library("jax")
    x, dh, *weights = (jax.numpy.asarray(v) for v in (a.x, a.dh, *a.params))

    def layer(x: Any, w_x: Any, w_h: Any, b: Any) -> Any:
        def step(h: Any, z: Any) -> Any:
            h = jax.numpy.tanh(z + h @ w_h)
            return h, h

        start = jax.numpy.zeros((shape.B, shape.N), x.dtype)
        return jax.lax.scan(step, start, (x @ w_x + b).swapaxes(0, 1))[1].swapaxes(0, 1)

    def both(dh: Any, *leaves: Any) -> Any:
        h, pull = jax.vjp(layer, *leaves)
        return h, *pull(dh)

    def forward(dh: Any, *leaves: Any) -> Any:
        return (layer(*leaves),)

    compiled = jax.jit(both if shape.backward else forward).lower(dh, x, *weights).compile()
    return Rival("jax scan", lambda: jax.block_until_ready(compiled(dh, x, *weights)), lambda f: named(map(np.asarray, f[:4])))


def of_onnxruntime(shape: Shape, a: Arrays) -> Rival:
    library("onnxruntime")
    if shape.backward:
        raise NotImplementedError("onnxruntime has no backward of RNN")
    inputs = {"X": np.ascontiguousarray(a.x.swapaxes(0, 1)), **rnn_to_onnx(a.params)}
    made, bound = session("RNN", inputs, ("Y",), {"hidden_size": shape.N}, 22)

    def call() -> Any:
        made.run_with_iobinding(bound)
        return bound

    return Rival("onnxruntime RNN", call, lambda b: {"h": b.copy_outputs_to_cpu()[0][:, 0].swapaxes(0, 1)})


ADAPTERS: dict[str, Callable[[Shape, Arrays], Rival]] = {
    "npattn": of_npattn, "torch.nn.RNN": of_torch, "jax scan": of_jax, "onnxruntime RNN": of_onnxruntime
}  # fmt: skip


def limits_of(shape: Shape, a: Arrays) -> roofline.Limits:
    kept = list[Any]()

    def forward() -> None:
        kept[:] = [na.rnn_forward(a.x, None, a.params)[1]]

    def backward() -> None:
        na.rnn_backward(a.dh, kept.pop())

    steps = [forward, backward] if shape.backward else [forward]
    return roofline.Limits(steps, shape.flops(), float(shape.B * shape.T * shape.N), "float32")


def measure(shape: Shape, plan: harness.Plan) -> Row:
    a = draw(shape)
    makers = {name: partial(make, shape, a) for name, make in ADAPTERS.items()}
    found, left_out = harness.gather(makers, truth(shape, a))
    limits = limits_of(shape, a)
    m = harness.measure([*found, *limits.rivals()], "npattn", TOLERANCE, plan)
    m.left_out = {**left_out, **m.left_out}
    return harness.row("rnn", shape.name, asdict(shape), m, flops=shape.flops(), roofline=limits.fractions(m))


def run(size: str, plan: harness.Plan, text: str = "", done: Callable[[Row], None] = harness.nobody) -> list[Row]:
    title = "recurrent layer, float32; both = with all gradients"
    return table.measured(title, COLUMNS, grid(size), partial(measure, plan=plan), text, done, until=plan.until)
