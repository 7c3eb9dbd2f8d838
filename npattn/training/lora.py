"""Low-rank adapters: what is trained in place of large matrices.

    w = w0 + (alpha / r) a b        (M, N)        (1)    a: (M, r), b: (r, N), for each parameter w0 that is adapted

Hu et al. 2021. b begins with zeros, so that the model is at first the one before. Forward and backward of the model stand
between those of this page:

>>> from npattn import LinearParams, linear_backward, linear_forward
>>> rng = np.random.default_rng(0)
>>> params, x = LinearParams(rng.standard_normal((5, 4)), rng.standard_normal(4)), rng.standard_normal((3, 5))
>>> trained = adapters(params, rank=2, adapted=lambda name: name == "w", whole=lambda name: name == "b")
>>> merged, of_merge = lora_forward(trained, params, alpha=8.0)
>>> out, cache = linear_forward(x, merged)
>>> grads = lora_backward(linear_backward(out, cache).params, of_merge)
>>> grads.adapters.w.b.shape, grads.adapters.b.shape
((2, 4), (4,))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npattn.models.trees import named_leaves, tree_map
from npattn.ops.checks import Array, check_class, check_integer, check_number
from npattn.training.loop import Loss

REAL = np.dtype(np.float64)


class LoraParams(NamedTuple):
    """The adapter of one parameter."""

    a: Array  # (M, r)
    b: Array  # (r, N)


class LoraCache(NamedTuple):
    """What the backward needs."""

    adapters: Any
    params: Any
    scale: float  # of alpha; it is divided by r


class LoraGrads(NamedTuple):
    """The gradients of `lora_forward`. That of the parameters is the gradient which the backward took."""

    adapters: Any
    params: Any


def adapters(
    params: Any, rank: int, adapted: Callable[[str], bool], *, whole: Callable[[str], bool] = lambda name: False, seed: int = 0
) -> Any:
    """Adapters for parameters: a tree of their shape, to be trained in their place.

    adapted : name -> whether this parameter (M, N) has an adapter: a is normal with variance 1 / M, b is 0
    whole   : name -> whether it is trained itself, as a new head is; all others stay as they are, None in the tree
    Raises TypeError, ValueError.
    """
    check_integer("adapters", "rank", rank, least=1)
    rng, names = np.random.default_rng(seed), iter(named_leaves(params))

    def one(p: Array) -> Any:
        name = next(names)
        if whole(name):
            return np.array(p)
        if not adapted(name):
            return None
        if p.ndim != 2:
            raise ValueError(f"adapters: {name} has shape {p.shape}, expected (M, N): only matrices have adapters")
        a = rng.standard_normal((len(p), rank)) / np.sqrt(len(p))
        return LoraParams(a.astype(p.dtype), np.zeros((rank, p.shape[1]), p.dtype))

    return tree_map(one, params)


def lora_forward(adapters: Any, params: Any, alpha: float) -> tuple[Any, LoraCache]:
    """The parameters with their adapters, equation (1).

    adapters : a tree like params: `LoraParams`, an array that stands in the place of a parameter, or None
    Returns a tree like params, and the cache. Raises TypeError, ValueError.
    """
    scale = float(check_number("lora", "alpha", alpha, REAL))

    def merged(w0: Array, adapter: Any) -> Array:
        if adapter is None:
            return w0
        if not isinstance(adapter, LoraParams):
            return np.asarray(adapter)
        a, b = adapter
        if a.shape[:1] + b.shape[1:] != w0.shape or a.shape[1] != len(b):
            raise ValueError(f"lora: a and b have shapes {a.shape} and {b.shape}, expected (M, r) and (r, N) of w0 {w0.shape}")
        return np.asarray(w0 + (a * (scale / len(b))) @ b)  # (1)  (M, N)

    return tree_map(merged, params, adapters), LoraCache(adapters, params, scale)


def lora_backward(dparams: Any, cache: LoraCache) -> LoraGrads:
    """The gradients of adapters from those of the parameters that `lora_forward` made: da = s dw b^T, db = s a^T dw."""
    check_class("lora", "cache", cache, LoraCache, ", from lora_forward")

    def of_adapter(dw: Array, adapter: Any) -> Any:
        if not isinstance(adapter, LoraParams):
            return None if adapter is None else dw
        a, b = adapter
        scaled = dw * (cache.scale / len(b))  # (1)  (M, N)
        return LoraParams(scaled @ b.T, a.T @ scaled)

    def of_param(dw: Array, adapter: Any) -> Array:
        return dw if adapter is None or isinstance(adapter, LoraParams) else np.zeros_like(dw)

    return LoraGrads(tree_map(of_adapter, dparams, cache.adapters), tree_map(of_param, dparams, cache.adapters))


def adapted_loss(loss_and_grads: Loss, params: Any, alpha: float) -> Loss:
    """The function for `npattn.training.loop.train` that trains adapters of params, from the one that would train params."""

    def of_adapters(adapters: Any, batch: Any, n: int) -> tuple[Any, Any, int]:
        dtype = next(iter(named_leaves(adapters).values())).dtype  # complex in check_gradients: all have to be
        merged, cache = lora_forward(adapters, tree_map(lambda p: p.astype(dtype, copy=False), params), alpha)
        loss, grads, tokens = loss_and_grads(merged, batch, n)
        return loss, lora_backward(grads, cache).adapters, tokens

    return of_adapters


__all__ = ["LoraCache", "LoraGrads", "LoraParams", "adapted_loss", "adapters", "lora_backward", "lora_forward"]
