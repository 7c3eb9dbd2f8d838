"""What is verified: a function of yours, or a built-in adapter to a library.

A candidate is a plain function ``(q, k, v, *, mask, bias, scale, softcap, sink, dropout_mask)`` on NumPy arrays of shape
(B, H, L, D) that returns out or (out, lse). What it supports is read off its signature: a
keyword that it does not take is "not supported", and a NotImplementedError is "refused". Any other exception is a failure. Its
convention says in which words it is spoken to.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.ops.masks import as_mask
from npattn.verify import layers
from npattn.verify.cases import Problem, Truth, better
from npattn.verify.conventions import Convention, near
from npattn.verify.mistakes import CHANGES, GOES_WITH
from npattn.verify.peers import PEERS
from npattn.verify.precision import PRECISIONS, Precision
from npattn.verify.stages import Change, run, sum_to

CANONICAL = ("mask", "bias", "scale", "softcap", "sink", "dropout_mask")
OWN_KEYWORDS = ("causal", "window", "key_lengths")  # given instead of a mask array to those who take them
OWN = Convention()  # npattn's
ALIAS = {"dead_out=nan": "dead rows are NaN (dead_out=nan)"}  # a convention that is better known as a mistake
OPS = ("attention", "multi_head", "rnn", "softmax")


class CandidateError(Exception):
    """There is nothing that could be verified: a usage error."""


def said(error: BaseException) -> str:
    """The first line of what an exception says, if its str can be had."""
    try:
        lines = str(error).strip().splitlines()
    except BaseException as worse:
        return f"(its str raises {type(worse).__name__})"
    return lines[0] if lines else ""


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


def library_of(function: Callable[..., Any]) -> str:
    """The library of tensors that a function, or the module it stands in, knows of; or nothing."""
    inner = inspect.unwrap(function) if callable(function) else function
    homes = [str(getattr(inner, "__module__", ""))]
    homes += [x.__name__ for x in getattr(inner, "__globals__", {}).values() if inspect.ismodule(x)]
    found = (name for home in homes for name in ("torch", "jax", "tensorflow", "mlx", "cupy") if home.split(".")[0] == name)
    return next(found, "")


@dataclass(frozen=True)
class Candidate:
    """A forward, perhaps a backward, and the convention that they follow."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    convention: Convention = OWN
    op: str = "attention"

    @property
    def align(self) -> str:
        return self.convention.causal

    @property
    def strangers(self) -> list[str]:
        """Optional parameters of the forward that verify gives no value: perhaps a keyword by another name."""
        known = {*CANONICAL, *OWN_KEYWORDS, "return_lse", "args", "kwargs", "options"}
        return (
            sorted(keywords(self.forward) - known - {"q", "k", "v", "query", "key", "value"}) if self.op == "attention" else []
        )

    # -- what is given

    def arguments(self, problem: Any, function: Callable[..., Any], backward: bool = False) -> tuple[dict[str, Any], list[str]]:
        """The keyword arguments of this problem in npattn's own form, and those that the function does not take."""
        if problem.op != "attention":
            return layers.arguments(problem, keywords(function), backward)
        takes, given = keywords(function), dict(problem.options)
        square, rest = problem.shape[-2] == problem.shape[-1], []
        alone = self.convention.mask_with_causal == "error" and any(p.keyword not in OWN_KEYWORDS for p in problem.parts)
        for part in problem.parts:
            aligned = part.align in (None, self.align) or square
            own = part.keyword in OWN_KEYWORDS and not (alone and part.keyword == "causal")
            if own and part.keyword in takes and aligned and part.keyword not in given:
                given[part.keyword] = part.value
            else:
                rest.append(part)
        missing = [name for name in problem.options if name not in takes]
        if rest:
            given["mask"] = _dense_mask(problem, [part.mask for part in rest])
            if "mask" not in takes:
                named = [f"{p.keyword} {p.align}" if p.align and p.keyword in takes else p.keyword for p in rest]
                missing += [name for name in dict.fromkeys(named) if name]
        if backward and problem.dlse is not None and "dlse" not in takes and self.convention.dlse == "used":
            missing.append("dlse")
        return given, missing

    def present(self, given: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """The same arguments as the candidate's convention says them."""
        c, said = self.convention, dict(given)
        for name in ("mask", "bias"):
            if c.mask_shape == "full" and isinstance(said.get(name), np.ndarray):
                said[name] = np.broadcast_to(said[name], shape).copy()
        if c.mask == "drop" and said.get("mask") is not None:
            said["mask"] = ~said["mask"]
        if said.get("window") is not None:
            left, right = said["window"]
            left = left + 1 if c.window == "total" and left is not None else left
            said["window"] = tuple(-1 if n is None and c.no_limit == "-1" else n for n in (left, right))
        return said

    def _layout(self, x: Any) -> Any:
        """(B, H, L, D) as the convention lays it out, and back."""
        turned = self.convention.layout == "BLHD" and isinstance(x, np.ndarray) and x.ndim == 4
        return np.ascontiguousarray(x.swapaxes(1, 2)) if turned else x

    def _lse(self, x: Any) -> Any:
        turned = self.convention.lse_layout == "BLH" and isinstance(x, np.ndarray) and x.ndim == 3
        return np.ascontiguousarray(x.swapaxes(1, 2)) if turned else x

    # -- what comes back

    def run_forward(self, problem: Any, given: dict[str, Any]) -> Any:
        """What the forward returns, in npattn's layout."""
        if problem.op != "attention":
            return layers.run_forward(problem, self.forward, given)
        inputs = [self._layout(x) for x in problem.inputs.values()]
        returned = self.forward(*inputs, **self.present(given, problem.shape))
        if isinstance(returned, tuple) and len(returned) == 2:
            return self._layout(returned[0]), self._lse(returned[1])
        return self._layout(returned)

    def run_backward(self, problem: Any, given: dict[str, Any], values: dict[str, Any]) -> Any:
        """A mapping with the gradients, or a text that says what was returned instead."""
        assert self.backward is not None
        if problem.op != "attention":
            return layers.run_backward(problem, self.backward, given)
        takes, more = keywords(self.backward), {}
        if problem.dlse is not None and "dlse" in takes:
            more["dlse"] = self._lse(problem.dlse)
        if "out" in takes:
            more["out"] = self._layout(values.get("out"))
        if "lse" in takes:
            more["lse"] = self._lse(values.get("lse"))
        inputs = [self._layout(x) for x in (problem.dout, *problem.inputs.values())]
        returned = self.backward(*inputs, **self.present(given, problem.shape), **more)
        named = named_gradients(returned)
        if isinstance(named, str):
            return named
        dbias: Any = named.get("dbias")
        if self.convention.mask_shape == "full" and "bias" in given and getattr(dbias, "shape", None) == problem.shape:
            # In the shape that the bias had before it was made full.
            named["dbias"] = np.asarray(sum_to(np.asarray(dbias, np.float64), given["bias"]), dbias.dtype)
        return {n: self._layout(x) if n in ("dq", "dk", "dv") else x for n, x in named.items()}

    # -- what is expected

    def changes(self) -> list[Change]:
        """What the convention changes in the equations."""
        names = [ALIAS.get(f"{n}={v}", f"{n}={v}") for n, v in self.convention.changes("expected").items()]
        names += [other for name in names for other in GOES_WITH.get(name, ())]
        return [CHANGES[name] for name in dict.fromkeys(names) if name in CHANGES] if self.op == "attention" else []

    def undefined(self, problem: Any, features: list[str]) -> str:
        """Why the convention leaves this case open, or nothing."""
        scale = problem.options.get("scale")
        return self.convention.undefined(features, isinstance(scale, float) and scale < 0)

    def truth(self, problem: Any, precision: Precision) -> Truth | None:
        """What is right by the candidate's convention; tensors that it leaves open are left out."""
        c = self.convention
        if c.float64 == "float32" and problem.dtype == np.float64:
            precision = PRECISIONS["float32"]
        if c.scale == "none" and problem.op == "attention":
            problem = dataclasses.replace(problem, options={"scale": 1.0, **problem.options})
        truth: Truth | None = problem.truth(precision)
        if truth is None or problem.op != "attention":
            return truth
        dead = bool((truth.values["lse"] == -np.inf).any()) or not problem.shape[-1]
        if base := self.changes():
            given, _ = self.arguments(problem, _takes_all)
            values = run(problem, given, self.align, base, dtype=better(problem.dtype))
            plain = truth
            same = {n: values[n] for n in plain.values}
            truth = Truth(same, _widened(values, plain.sigma), bound=lambda: _widened(same, plain.det))
        open_ = {"out"} if dead and c.dead_out == "undefined" else set()
        open_ |= {"lse"} if dead and c.dead_lse == "undefined" else set()
        open_ |= {"dq", "dk", "dv", "dbias", "dsink"} if dead and c.dead_grad == "undefined" else set()
        values = {n: x for n, x in truth.values.items() if n not in open_}
        return dataclasses.replace(truth, values=values)


def _takes_all(
    q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None, sink: Any = None,
    dropout_mask: Any = None, causal: Any = None, window: Any = None, key_lengths: Any = None, dlse: Any = None,
) -> None:  # fmt: skip
    """A signature with everything."""


def _widened(values: dict[str, Array], sigma: dict[str, Array]) -> dict[str, Array]:
    """sigma where another convention gives a number that the reference has exactly: never below its median or half an ulp."""
    wide = {}
    for name, s in sigma.items():
        known = s[np.isfinite(s) & (s > 1e-30)]  # less is only what may underflow
        size = np.where(np.isfinite(values[name]), np.abs(values[name]), 0.0).astype(np.float64)
        floor = float(np.median(known)) if known.size else 2.0**-18 * float(size.max(initial=0.0))
        wide[name] = np.maximum(np.maximum(s, floor), 2.0**-25 * size)
    return wide


def named_gradients(returned: Any) -> dict[str, Any] | str:
    """Gradients as a mapping from dq, dk ...; a tuple is (dq, dk, dv). A text says what is wrong with it."""
    if hasattr(returned, "_asdict"):
        returned = returned._asdict()
    names = ("dq", "dk", "dv", "dbias", "dsink")
    if isinstance(returned, dict):
        return {n if n in names else f"d{n}": x for n, x in returned.items()}
    if isinstance(returned, (tuple, list)) and len(returned) == 3:
        return dict(zip(names, returned, strict=False))
    return f"the backward returns a {type(returned).__name__}, expected (dq, dk, dv) or a mapping with these names"


def canonical(problem: Problem) -> Problem:
    """The same problem with a bias that is an array: what a candidate sees, and what its dbias is compared with."""
    bias = problem.options.get("bias")
    if problem.op != "attention" or bias is None or isinstance(bias, np.ndarray):
        return problem
    dense = np.ascontiguousarray(bias.bind(problem.shape).dense())
    return dataclasses.replace(problem, options={**problem.options, "bias": dense})


def _dense_mask(problem: Problem, parts: list[Any]) -> Array:
    whole = problem.shape
    if len(parts) == 1 and isinstance(parts[0], np.ndarray):
        array: Array = parts[0].reshape((1,) * (len(whole) - parts[0].ndim) + parts[0].shape)
        result: Array = array.copy()
        return result
    dense = [as_mask("mask", m).bind(whole).dense() for m in parts]
    return np.asarray(np.logical_and.reduce(dense))


def op_of(name: str, op: str | None) -> str:
    """The op of a candidate by that name; raises CandidateError where it is a built-in one of another."""
    own_op = BUILT_IN[name][0] if name in BUILT_IN else PEERS[name].op if name in PEERS else None
    if own_op is not None and op not in (None, own_op):
        raise CandidateError(f"the built-in candidate {name} is for --op {own_op}, not {op}")
    return own_op or op or "attention"


def load(name: str, backward: str | None = None, convention: Convention | None = None, op: str | None = None) -> Candidate:
    """The candidate of that name: a built-in one, ``package.module:function`` or ``path/to/file.py:function``."""
    convention = convention or OWN
    for what, given in (("candidate", name), ("backward", backward)):
        if given is not None and not given.strip():
            raise CandidateError(f"the {what} has an empty name: is a variable of the shell unset?")
    if name in BUILT_IN or name in PEERS:
        if backward is not None:
            raise CandidateError(f"the built-in candidate {name} has a backward of its own")
        own_op, loader = op_of(name, op), BUILT_IN[name][1] if name in BUILT_IN else PEERS[name].load
        try:
            forward, own_backward = loader()
        except ImportError as error:
            raise CandidateError(str(error)) from None
        return Candidate(name, forward, own_backward, convention, own_op)
    functions = _function(name), None if backward is None else _function(backward, like=name)
    return Candidate(name, *functions, convention, op or "attention")


def built_in(op: str) -> list[str]:
    """The names of the candidates for an op that come with npattn."""
    return [n for n, (o, _) in BUILT_IN.items() if o == op] + [n for n, p in PEERS.items() if p.op == op]


def _function(name: str, like: str | None = None) -> Callable[..., Any]:
    where, colon, attribute = name.rpartition(":")
    if not colon:
        where, attribute = ("" if like is None else like.rpartition(":")[0]), name
    if not where or not attribute:
        names = ", ".join([*BUILT_IN, *PEERS])
        expected = f"expected {names}, package.module:function or path/to/file.py:function"
        raise CandidateError(f"{name!r} is no candidate{near(name, [*BUILT_IN, *PEERS])}; {expected}")
    try:
        module = _module(where)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise CandidateError(f"{where} cannot be imported: {type(error).__name__}: {said(error)}") from error
    for part in attribute.split("."):
        if not hasattr(module, part):
            raise CandidateError(f"{where} has no {attribute}")
        module = getattr(module, part)
    if not callable(module):
        raise CandidateError(f"{name} is a {type(module).__name__}, expected a function")
    found: Callable[..., Any] = module
    return found


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
    from npattn.ops.blockwise import blockwise_backward, blockwise_forward

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


def _multi_head(implementation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from npattn.ops.multihead import multi_head_backward, multi_head_forward

    def run(x_q: Array, x_k: Array, x_v: Array, params: Any, *, num_heads: int, **options: Any) -> Any:
        return multi_head_forward(x_q, x_k, x_v, params, num_heads, implementation=implementation, **options)

    def forward(
        x_q: Array, x_k: Array, x_v: Array, params: Any, *, num_heads: int, num_kv_heads: Any = None, mask: Any = None,
        bias: Any = None, scale: Any = None, softcap: Any = None, sink: Any = None, dropout_mask: Any = None,
    ) -> Array:  # fmt: skip
        options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink, "dropout_mask": dropout_mask}
        out: Array = run(x_q, x_k, x_v, params, num_heads=num_heads, num_kv_heads=num_kv_heads, **options)[0]
        return out

    def backward(
        dout: Array, x_q: Array, x_k: Array, x_v: Array, params: Any, *, num_heads: int, num_kv_heads: Any = None,
        mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None, sink: Any = None, dropout_mask: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink, "dropout_mask": dropout_mask}
        _, cache = run(x_q, x_k, x_v, params, num_heads=num_heads, num_kv_heads=num_kv_heads, **options)
        g = multi_head_backward(dout, cache)
        named = {"x_q": g.x_q, "x_k": g.x_k, "x_v": g.x_v, **g.params._asdict(), "bias": g.bias, "sink": g.sink}
        return {f"d{name}": x for name, x in named.items()}

    return forward, backward


def _rnn() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from npattn.ops.rnn import rnn_backward, rnn_forward

    def forward(x: Array, h0: Any, params: Any, *, lengths: Any = None, nonlinearity: str = "tanh") -> tuple[Array, Array]:
        h, cache = rnn_forward(x, h0, params, lengths=lengths, nonlinearity=nonlinearity)
        return h, cache.h_last

    def backward(
        dh: Array, x: Array, h0: Any, params: Any, *, lengths: Any = None, nonlinearity: str = "tanh", dh_last: Any = None
    ) -> dict[str, Any]:
        _, cache = rnn_forward(x, h0, params, lengths=lengths, nonlinearity=nonlinearity)
        g = rnn_backward(dh, cache, dh_last)
        return {"dx": g.x, "dh0": g.h0, **{f"d{name}": x for name, x in g.params._asdict().items()}}

    return forward, backward


def _softmax() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from npattn.ops.softmax import softmax_backward, softmax_forward

    def forward(scores: Array, *, mask: Any = None) -> Array:
        return softmax_forward(scores, mask=mask)[0]

    def backward(dweights: Array, scores: Array, *, mask: Any = None) -> dict[str, Any]:
        return {"dscores": softmax_backward(dweights, softmax_forward(scores, mask=mask)[1]).scores}

    return forward, backward


BUILT_IN: dict[str, tuple[str, Callable[[], tuple[Callable[..., Any], Callable[..., Any] | None]]]] = {
    "blockwise": ("attention", _blockwise),
    "multi-head": ("multi_head", lambda: _multi_head("dense")),
    "multi-head-blockwise": ("multi_head", lambda: _multi_head("blockwise")),
    "rnn": ("rnn", _rnn),
    "softmax": ("softmax", _softmax),
}
