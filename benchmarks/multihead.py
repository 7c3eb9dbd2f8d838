"""``python -m benchmarks multihead``: a layer of self-attention, and torch's nn.MultiheadAttention with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

import npattn as na
from benchmarks import harness, roofline, table
from benchmarks.harness import Array, Rival
from benchmarks.machine import library, threads
from npattn.convert import multi_head_to_torch

Row = dict[str, Any]
COLUMNS = ("dense", "torch", "torch eval")
TOLERANCE = 1e-4  # of the largest element


@dataclass(frozen=True)
class Layer:
    B: int
    L: int
    M: int
    H: int
    causal: bool = False
    backward: bool = False

    @property
    def name(self) -> str:
        kind, way = "causal" if self.causal else "full", "both" if self.backward else "forward"
        return f"B={self.B} L={self.L} M={self.M} H={self.H} {kind} {way}"

    def flops(self) -> float:
        """Four projections, and the two products of attention; a backward takes twice the former, and five."""
        pairs = self.L * (self.L + 1) / 2 if self.causal else self.L**2
        projections, attention = 8.0 * self.B * self.L * self.M**2, 4.0 * self.B * pairs * self.M
        return 3 * projections + 3.5 * attention if self.backward else projections + attention

    def exponentials(self) -> float:
        pairs = self.L * (self.L + 1) / 2 if self.causal else float(self.L**2)
        return (2 if self.backward else 1) * self.B * self.H * pairs


def grid(size: str) -> list[Layer]:
    shapes = {"tiny": ((2, 8, 8, 2),), "quick": ((8, 512, 512, 8),)}.get(
        size, ((64, 128, 256, 4), (8, 512, 512, 8), (8, 512, 768, 12), (1, 2048, 1024, 16), (1, 8192, 512, 8))
    )
    return [Layer(*shape, causal, backward) for shape in shapes for causal in (False, True) for backward in (False, True)]


def draw(layer: Layer) -> tuple[Array, Array, na.MultiHeadParams]:
    rng, M = np.random.default_rng(0), layer.M

    def normal(*shape: int, scale: float = 1.0) -> Array:
        x: Array = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        return x

    weights: list[Any] = [normal(M, M, scale=M**-0.5) for _ in range(4)]
    biases: list[Any] = [normal(M, scale=0.1) for _ in range(4)]
    return normal(layer.B, layer.L, M), normal(layer.B, layer.L, M), na.MultiHeadParams(*weights, *biases)


def truth(layer: Layer, x: Array, dout: Array, params: na.MultiHeadParams) -> dict[str, Array]:
    """out and dx of the first sequence, in float64."""
    arrays: Any = params[:8]  # without norms of q and k
    wide = na.MultiHeadParams(*(p.astype(np.float64) for p in arrays))
    x, dout = x[:1].astype(np.float64), dout[:1].astype(np.float64)
    out, cache = na.multi_head_forward(x, x, x, wide, layer.H, mask=na.causal() if layer.causal else None)
    if not layer.backward:
        return {"out": out}
    g = na.multi_head_backward(dout, cache)
    return {"out": out, "dx": g.x_q + g.x_k + g.x_v}


def first(found: Sequence[Array]) -> dict[str, Array]:
    return {name: x[:1] for name, x in zip(("out", "dx"), found, strict=False)}


def phases(layer: Layer, x: Array, dout: Array, params: na.MultiHeadParams, implementation: str) -> list[Callable[[], Any]]:
    kept, mask = list[Any](), na.causal() if layer.causal else None

    def forward() -> Array:
        out, cache = na.multi_head_forward(x, x, x, params, layer.H, mask=mask, implementation=implementation)
        kept[:] = [cache]
        return out

    def backward() -> Any:
        return na.multi_head_backward(dout, kept.pop())

    return [forward, backward] if layer.backward else [forward]


def of_npattn(name: str, layer: Layer, x: Array, dout: Array, params: na.MultiHeadParams) -> Rival:
    forward, *backward = phases(layer, x, dout, params, name)

    def call() -> Any:
        out = forward()
        if not backward:
            return (out,)
        g = backward[0]()
        return out, g.x_q + g.x_k + g.x_v

    return Rival(name, call, first)


def of_torch(name: str, layer: Layer, x: Array, dout: Array, params: na.MultiHeadParams) -> Rival:
    """In training mode, and in eval mode, which has a way of its own without gradients."""
    torch, evaluated = library("torch"), name == "torch eval"
    if evaluated and layer.backward:
        raise NotImplementedError("the fast path of eval() has no gradients")
    torch.set_num_threads(threads())
    module = torch.nn.MultiheadAttention(layer.M, layer.H, batch_first=True)
    module.load_state_dict({n: torch.tensor(np.ascontiguousarray(p)) for n, p in multi_head_to_torch(params).items()})
    module.train(not evaluated)
    given, cotangent = torch.tensor(x, requires_grad=layer.backward), torch.tensor(dout)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(layer.L) if layer.causal else None
    leaves = (given, *module.parameters())

    def attend() -> Any:
        return module(given, given, given, need_weights=False, attn_mask=mask, is_causal=layer.causal)[0]

    def call() -> Any:
        if layer.backward:
            out = attend()
            return out, *torch.autograd.grad(out, leaves, cotangent)
        with torch.no_grad():
            return (attend(),)

    def before() -> None:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_math_sdp(True)

    return Rival(name, call, lambda found: first([a.detach().numpy() for a in found[:2]]), before=before)


ADAPTERS: dict[str, Callable[..., Rival]] = {
    "blockwise": of_npattn, "dense": of_npattn, "torch": of_torch, "torch eval": of_torch
}  # fmt: skip


def measure(layer: Layer, plan: harness.Plan) -> Row:
    x, dout, params = draw(layer)
    makers = {name: partial(make, name, layer, x, dout, params) for name, make in ADAPTERS.items()}
    found, left_out = harness.gather(makers, truth(layer, x, dout, params))
    steps = phases(layer, x, dout, params, "blockwise")
    each = (7.0 if layer.backward else 4.0) * layer.M / layer.H
    limits = roofline.Limits(steps, layer.flops(), layer.exponentials(), "float32", each)
    m = harness.measure([*found, *limits.rivals()], "blockwise", TOLERANCE, plan)
    m.left_out = {**left_out, **m.left_out}
    return harness.row("multihead", layer.name, asdict(layer), m, flops=layer.flops(), roofline=limits.fractions(m))


def run(size: str, plan: harness.Plan, text: str = "", done: Callable[[Row], None] = harness.nobody) -> list[Row]:
    title = "multi-head attention, float32, ours is blockwise; both = with all gradients"
    return table.measured(title, COLUMNS, grid(size), partial(measure, plan=plan), text, done, until=plan.until)
