"""What is verified: a function of yours, or a built-in adapter to a library.

A candidate is a plain function ``(q, k, v, *, mask, bias, scale, softcap, sink, dropout_mask)`` on NumPy arrays of shape
(B, H, L, D) that returns out or (out, lse). What it supports is read off its signature: a keyword that it does not take, or
a NotImplementedError, is "not supported"; any other exception is a failure.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npattn._checks import Array
from npattn.masks import as_mask
from npattn.verify.cases import Problem

CANONICAL = ("mask", "bias", "scale", "softcap", "sink", "dropout_mask")
OWN_KEYWORDS = ("causal", "window", "key_lengths")  # given instead of a mask array to those who take them


class CandidateError(Exception):
    """There is nothing that could be verified: a usage error."""


def keywords(function: Callable[..., Any]) -> frozenset[str]:
    """The keyword arguments that a function takes; **options stand for all canonical ones."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled functions may have no signature
        return frozenset(CANONICAL)
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        names |= set(CANONICAL)
    return frozenset(names)


@dataclass(frozen=True)
class Candidate:
    """A forward, perhaps a backward, and the alignment that their own ``causal`` and ``window`` have."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    align: str = "top_left"

    @property
    def strangers(self) -> list[str]:
        """Optional parameters of the forward that verify gives no value: perhaps a keyword by another name."""
        known = {*CANONICAL, *OWN_KEYWORDS, "args", "kwargs", "options"}
        return sorted(keywords(self.forward) - known - {"q", "k", "v", "query", "key", "value"})

    def arguments(self, problem: Problem, function: Callable[..., Any]) -> tuple[dict[str, Any], list[str]]:
        """The keyword arguments of this problem in canonical form, and those that the function does not take."""
        takes, given = keywords(function), dict(problem.options)
        square, rest = problem.shape[-2] == problem.shape[-1], []
        for part in problem.parts:
            aligned = part.align in (None, self.align) or square
            if part.keyword in OWN_KEYWORDS and part.keyword in takes and aligned and part.keyword not in given:
                given[part.keyword] = part.value
            else:
                rest.append(part)
        missing = [name for name in problem.options if name not in takes]
        if rest:
            given["mask"] = _dense_mask(problem, [part.mask for part in rest])
            if "mask" not in takes:
                named = [f"{p.keyword} {p.align}" if p.align and p.keyword in takes else p.keyword for p in rest]
                missing += [name for name in dict.fromkeys(named) if name]
        return given, missing


def canonical(problem: Problem) -> Problem:
    """The same problem with a bias that is an array: what a candidate sees, and what its dbias is compared with."""
    bias = problem.options.get("bias")
    if bias is None or isinstance(bias, np.ndarray):
        return problem
    dense = np.ascontiguousarray(bias.bind(problem.shape).dense())
    return Problem(
        problem.q, problem.k, problem.v, problem.dout, problem.dlse, problem.parts, {**problem.options, "bias": dense}
    )


def _dense_mask(problem: Problem, parts: list[Any]) -> Array:
    whole = problem.shape
    if len(parts) == 1 and isinstance(parts[0], np.ndarray):
        array: Array = parts[0].reshape((1,) * (len(whole) - parts[0].ndim) + parts[0].shape)
        result: Array = array.copy()
        return result
    dense = [as_mask("mask", m).bind(whole).dense() for m in parts]
    return np.asarray(np.logical_and.reduce(dense))


def load(name: str, backward: str | None = None, align: str = "top_left") -> Candidate:
    """The candidate of that name: a built-in one, ``package.module:function`` or ``path/to/file.py:function``."""
    if name in BUILT_IN:
        if backward is not None:
            raise CandidateError(f"the built-in candidate {name} has a backward of its own")
        forward, own_backward = BUILT_IN[name]()
        return Candidate(name, forward, own_backward)
    return Candidate(name, _function(name), None if backward is None else _function(backward, like=name), align)


def _function(name: str, like: str | None = None) -> Callable[..., Any]:
    where, colon, attribute = name.rpartition(":")
    if not colon:
        where, attribute = ("" if like is None else like.rpartition(":")[0]), name
    if not where or not attribute:
        raise CandidateError(
            f"{name!r} is no candidate; expected {', '.join(BUILT_IN)}, package.module:function or path/to/file.py:function"
        )
    try:
        module = _module(where)
    except (Exception, SystemExit) as error:
        raise CandidateError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(module, part):
            raise CandidateError(f"{where} has no {attribute}")
        module = getattr(module, part)
    if not callable(module):
        raise CandidateError(f"{name} is a {type(module).__name__}, expected a function")
    return module  # type: ignore[no-any-return]


_LOADED: dict[str, Any] = {}


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(where)
    path = Path(where).resolve()
    if str(path) not in _LOADED:
        if not path.is_file():
            raise FileNotFoundError(f"no file {where}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{where} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        # Registered, as dataclasses ask for; and its folder stays on the path, for imports inside its functions.
        name = path.stem if path.stem not in sys.modules else f"npattn candidate {path}"
        sys.modules[name] = module
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        spec.loader.exec_module(module)
        _LOADED[str(path)] = module
    return _LOADED[str(path)]


# --- built-in candidates ------------------------------------------------------------------------------------------------


def _blockwise() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from npattn.blockwise import blockwise_backward, blockwise_forward

    def forward(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None,
        sink: Any = None, dropout_mask: Any = None,
    ) -> Any:  # fmt: skip
        options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink}
        return blockwise_forward(q, k, v, **options, dropout_mask=dropout_mask, return_lse=True)[0]

    def backward(
        dout: Array, q: Array, k: Array, v: Array, *, dlse: Any = None, mask: Any = None, bias: Any = None,
        scale: Any = None, softcap: Any = None, sink: Any = None, dropout_mask: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink}
        _, cache = blockwise_forward(q, k, v, **options, dropout_mask=dropout_mask)
        g = blockwise_backward(dout, cache, dlse)
        return {"dq": g.q, "dk": g.k, "dv": g.v, "dbias": g.bias, "dsink": g.sink}

    return forward, backward


def _torch() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        import torch
    except ImportError:
        raise CandidateError("torch is not installed: pip install npattn[peers], or torch alone") from None

    def run(q: Array, k: Array, v: Array, mask: Any, bias: Any, scale: Any, causal: bool, gradients: bool) -> Any:
        def tensor(x: Array, wanted: bool = gradients) -> Any:
            return torch.tensor(np.ascontiguousarray(x), requires_grad=wanted)

        tq, tk, tv = map(tensor, (q, k, v))
        tb = None if bias is None else tensor(bias)
        attn_mask = None if mask is None else tensor(mask, False)
        if attn_mask is not None and causal:
            attn_mask = attn_mask & torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        elif tb is not None and causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        if tb is not None:
            attn_mask = tb if attn_mask is None else torch.where(attn_mask, tb, -torch.inf)
        out = torch.nn.functional.scaled_dot_product_attention(
            tq, tk, tv, attn_mask=attn_mask, is_causal=causal and attn_mask is None, scale=scale,
            enable_gqa=tq.shape[-3] != tk.shape[-3],
        )  # fmt: skip
        return out, (tq, tk, tv, tb)

    def forward(
        q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None, causal: bool = False
    ) -> Array:
        out: Array = run(q, k, v, mask, bias, scale, causal, False)[0].numpy()
        return out

    def backward(
        dout: Array, q: Array, k: Array, v: Array, *, mask: Any = None, bias: Any = None, scale: Any = None,
        causal: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        out, inputs = run(q, k, v, mask, bias, scale, causal, True)
        out.backward(torch.tensor(np.ascontiguousarray(dout)))
        names = ("dq", "dk", "dv", "dbias")
        return {n: None if x is None or x.grad is None else x.grad.numpy() for n, x in zip(names, inputs, strict=True)}

    return forward, backward


BUILT_IN: dict[str, Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "blockwise": _blockwise,
    "torch": _torch,
}
