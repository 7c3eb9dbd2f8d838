"""How a candidate for attention is called in the form of its convention, and which results that convention expects."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.ops.masks import as_mask
from npattn.verify.conventions import Convention
from npattn.verify.op import Calls, Change, Problem, Truth, better_dtype
from npattn.verify.ops.attention.changes import CHANGES
from npattn.verify.ops.attention.draw import Part, parts_of
from npattn.verify.ops.attention.equations import sum_to
from npattn.verify.precision import Precision
from npattn.verify.stages import run

OPTIONS = ("mask", "bias", "scale", "softcap", "sink", "dropout_mask")
MASK_KEYWORDS = ("causal", "window", "key_lengths")  # given instead of a mask array if the function takes them
GRADIENTS = ("dq", "dk", "dv", "dbias", "dsink")
ALIAS = {"dead_out=nan": "dead rows are NaN (dead_out=nan)"}  # a convention that is better known as a mistake


class AttentionCalls(Calls):
    """Arrays and options in the form of the candidate's convention: layout, and what a mask and a window mean."""

    text = "forward(q, k, v, *, mask, ...) and backward(dout, q, k, v, *, mask, ..., out, lse, dlse)"
    keywords = (*OPTIONS, *MASK_KEYWORDS)
    assumed = OPTIONS
    positional = ("q", "k", "v", "query", "key", "value")

    def arguments(
        self, candidate: Any, problem: Problem, takes: frozenset[str], backward: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """Parts of the mask for which the function has a keyword are given by it; the others are given as one array."""
        convention: Convention = candidate.convention
        options = {name: x for name, x in problem.options.items() if name != "mask"}
        given, in_mask, parts = dict(options), list[Part](), parts_of(problem)
        square = problem.shape[-2] == problem.shape[-1]
        causal_in_mask = convention.mask_with_causal == "error" and any(p.keyword not in MASK_KEYWORDS for p in parts)
        for part in parts:
            aligned = part.align in (None, convention.causal) or square
            by_keyword = part.keyword in MASK_KEYWORDS and not (causal_in_mask and part.keyword == "causal")
            if by_keyword and part.keyword in takes and aligned and part.keyword not in given:
                given[part.keyword] = part.value
            else:
                in_mask.append(part)
        missing = [name for name in options if name not in takes]
        if in_mask:
            given["mask"] = _dense_mask(problem, [part.mask for part in in_mask])
            if "mask" not in takes:
                named = [f"{p.keyword} {p.align}" if p.align and p.keyword in takes else p.keyword for p in in_mask]
                missing += [name for name in dict.fromkeys(named) if name]
        if backward and "dlse" in problem.cotangents and "dlse" not in takes and convention.dlse == "used":
            missing.append("dlse")
        return given, missing

    def forward(self, candidate: Any, problem: Problem, given: dict[str, Any]) -> Any:
        c = candidate.convention
        inputs = [_layout(c, x) for x in problem.inputs.values()]
        returned = candidate.forward(*inputs, **self.in_convention(candidate, problem, given))
        if isinstance(returned, tuple) and len(returned) == 2:
            return _layout(c, returned[0]), _lse_layout(c, returned[1])
        return _layout(c, returned)

    def backward(self, candidate: Any, problem: Problem, given: dict[str, Any], values: dict[str, Any]) -> Any:
        c, takes, more = candidate.convention, candidate.takes(candidate.backward), {}
        if "dlse" in problem.cotangents and "dlse" in takes:
            more["dlse"] = _lse_layout(c, problem.dlse)
        if "out" in takes:
            more["out"] = _layout(c, values.get("out"))
        if "lse" in takes:
            more["lse"] = _lse_layout(c, values.get("lse"))
        inputs = [_layout(c, x) for x in (problem.dout, *problem.inputs.values())]
        named = _gradients_by_name(candidate.backward(*inputs, **self.in_convention(candidate, problem, given), **more))
        if isinstance(named, str):
            return named
        dbias: Any = named.get("dbias")
        if c.mask_shape == "full" and "bias" in given and getattr(dbias, "shape", None) == problem.shape:
            # Summed to the shape of the bias before it was broadcast.
            named["dbias"] = np.asarray(sum_to(np.asarray(dbias, np.float64), given["bias"]), dbias.dtype)
        return {n: _layout(c, x) if n in ("dq", "dk", "dv") else x for n, x in named.items()}

    def in_convention(self, candidate: Any, problem: Problem, given: dict[str, Any]) -> dict[str, Any]:
        """The same options in the form of the convention."""
        c, shape, options = candidate.convention, problem.shape, dict(given)
        for name in ("mask", "bias"):
            if c.mask_shape == "full" and isinstance(options.get(name), np.ndarray):
                options[name] = np.broadcast_to(options[name], shape).copy()
        if c.mask == "drop" and options.get("mask") is not None:
            options["mask"] = ~options["mask"]
        if options.get("window") is not None:
            left, right = options["window"]
            left = left + 1 if c.window == "total" and left is not None else left
            options["window"] = tuple(-1 if n is None and c.no_limit == "-1" else n for n in (left, right))
        return options


    def changes(self, convention: Convention) -> list[Change]:
        names = [ALIAS.get(f"{n}={v}", f"{n}={v}") for n, v in convention.changes("expected").items()]
        found = [CHANGES[name] for name in names if name in CHANGES]
        return found + [CHANGES[name] for change in found for name in change.companions]

    def truth(self, candidate: Any, problem: Problem, precision: Precision) -> Truth | None:
        c: Convention = candidate.convention
        if c.scale == "none":
            problem = dataclasses.replace(problem, options={"scale": 1.0, **problem.options})
        truth = problem.truth(precision)
        if truth is None:
            return None
        dead = bool((truth.values["lse"] == -np.inf).any()) or not problem.shape[-1]
        if base := self.changes(c):
            given, _ = self.arguments(candidate, problem, frozenset(self.keywords), False)
            values = run(problem, given, c.causal, base, dtype=better_dtype(problem.dtype))
            plain = truth
            same = {n: values[n] for n in plain.values}
            eps = float(np.finfo(precision.dtype).eps)
            truth = Truth(same, _widened(values, plain.sigma, eps), bound=lambda: _widened(same, plain.det, eps))
        undefined = {"out"} if dead and c.dead_out == "undefined" else set()
        undefined |= {"lse"} if dead and c.dead_lse == "undefined" else set()
        undefined |= set(GRADIENTS) if dead and c.dead_grad == "undefined" else set()
        return dataclasses.replace(truth, values={n: x for n, x in truth.values.items() if n not in undefined})


def _layout(convention: Convention, x: Any) -> Any:
    """An array (B, H, L, D) in the layout of the convention, and back."""
    turned = convention.layout == "BLHD" and isinstance(x, np.ndarray) and x.ndim == 4
    return np.ascontiguousarray(x.swapaxes(1, 2)) if turned else x


def _lse_layout(convention: Convention, x: Any) -> Any:
    turned = convention.lse_layout == "BLH" and isinstance(x, np.ndarray) and x.ndim == 3
    return np.ascontiguousarray(x.swapaxes(1, 2)) if turned else x


def _gradients_by_name(returned: Any) -> dict[str, Any] | str:
    """The returned gradients by the names dq, dk, ...; a tuple is (dq, dk, dv). If it is neither, a text that says so."""
    if hasattr(returned, "_asdict"):
        returned = returned._asdict()
    if isinstance(returned, dict):
        return {n if n in GRADIENTS else f"d{n}": x for n, x in returned.items()}
    if isinstance(returned, (tuple, list)) and len(returned) == 3:
        return dict(zip(GRADIENTS, returned, strict=False))
    return f"the backward returns a {type(returned).__name__}, expected (dq, dk, dv) or a mapping with these names"


def _dense_mask(problem: Problem, masks: list[Any]) -> Array:
    whole = problem.shape
    if len(masks) == 1 and isinstance(masks[0], np.ndarray):
        return np.array(masks[0].reshape((1,) * (len(whole) - masks[0].ndim) + masks[0].shape))
    return np.asarray(np.logical_and.reduce([as_mask("mask", m).bind(whole).dense() for m in masks]))


def canonical(problem: Problem) -> Problem:
    """The same problem with the bias as an array: a candidate gets that, and its dbias is compared with the array's."""
    bias = problem.options.get("bias")
    if bias is None or isinstance(bias, np.ndarray):
        return problem
    dense = np.ascontiguousarray(bias.bind(problem.shape).dense())
    return dataclasses.replace(problem, options={**problem.options, "bias": dense})


def _widened(values: dict[str, Array], sigma: dict[str, Array], eps: float) -> dict[str, Array]:
    """sigma, but at least its median and half an ulp: a convention may give a rounded number where npattn's result is exact."""
    wide = {}
    for name, s in sigma.items():
        known = s[np.isfinite(s) & (s > 1e-30)]  # smaller values of sigma allow for underflow alone
        size = np.where(np.isfinite(values[name]), np.abs(values[name]), 0.0).astype(np.float64)
        floor = float(np.median(known)) if known.size else 32 * eps * float(size.max(initial=0.0))
        wide[name] = np.maximum(np.maximum(s, floor), eps / 4 * size)
    return wide


CALLS = AttentionCalls()
