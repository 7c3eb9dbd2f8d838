"""What is verified: a function of yours, or a built-in one. What it takes, how it is called, and what it returned.

A candidate is a plain function ``(q, k, v, *, mask, bias, scale, softcap, sink, dropout_mask)`` on NumPy arrays of shape
(B, H, L, D) that returns out or (out, lse). The other ops have similar functions. Its signature says what it supports: a
keyword that it does not take is "not supported", and a NotImplementedError is "refused". Any other exception is a failure. Its
convention says in which form its arguments are given.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npattn.peers import PEERS
from npattn.verify.conventions import Convention, suggestion
from npattn.verify.op import Change, Op, Problem, Truth, parts
from npattn.verify.ops import OPS
from npattn.verify.precision import PRECISIONS, Precision

OWN = Convention()  # npattn's
RANK_ALONE = "takes arrays of rank {} alone"  # what is said of an exception at another rank than that of the docs
REFUSALS = ("NotImplementedError", "any")
"""What of a candidate's exceptions is a refusal: this one, or any."""


class CandidateError(Exception):
    """A usage error: nothing can be verified as it was asked for."""


def message_of(error: BaseException) -> str:
    """The first line of an exception's message; its ``__str__`` may raise itself."""
    try:
        lines = str(error).strip().splitlines()
    except BaseException as worse:
        return f"(its str raises {type(worse).__name__})"
    return lines[0] if lines else ""


def library_of(function: Callable[..., Any]) -> str:
    """The tensor library that a function's module belongs to or imports; "" if there is none."""
    try:
        inner = inspect.unwrap(function) if callable(function) else function
    except ValueError:  # it wraps itself
        inner = function
    homes = [str(getattr(inner, "__module__", ""))]
    homes += [x.__name__ for x in getattr(inner, "__globals__", {}).values() if inspect.ismodule(x)]
    found = (name for home in homes for name in ("torch", "jax", "tensorflow", "mlx", "cupy") if home.split(".")[0] == name)
    return next(found, "")


@dataclass(frozen=True)
class Candidate:
    """A forward, a backward unless there is none, and the convention that they follow."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    convention: Convention = OWN
    op: str = "attention"
    options: tuple[str, ...] | None = None  # those that it takes, whatever its signature says; None: what that says
    refusals: str = REFUSALS[0]

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise CandidateError(f"op {self.op!r}, expected one of {', '.join(OPS)}")
        if not callable(self.forward):
            raise CandidateError(f"{self.name} is a {type(self.forward).__name__}, expected a function")
        known, changed = self.record.calls.conventions, self.convention.changes()
        if others := [f"{n}={v}" for n, v in changed.items() if known is not None and n not in known]:
            raise CandidateError(f"convention {', '.join(others)}: for attention, and {self.name} is {self.op}")

    @property
    def record(self) -> Op:
        return OPS[self.op]

    @property
    def align(self) -> str:
        return self.convention.causal

    def takes(self, function: Callable[..., Any]) -> frozenset[str]:
        """The keyword arguments that a function takes."""
        calls = self.record.calls
        others = set() if self.options is None else set(calls.keywords) - set(self.options)
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # compiled functions may have no signature
            return frozenset(calls.assumed) - others
        names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        return frozenset(names | set(calls.assumed if any(p.kind == p.VAR_KEYWORD for p in parameters) else ())) - others

    @property
    def unknown_parameters(self) -> list[str]:
        """Parameters of the forward that verify does not know. One of them may be a known option under another name."""
        calls = self.record.calls
        known = {*calls.keywords, *calls.positional, "return_lse", "args", "kwargs", "options"}
        return sorted(self.takes(self.forward) - known) if calls.positional else []

    def arguments(
        self, problem: Problem, function: Callable[..., Any], backward: bool = False
    ) -> tuple[dict[str, Any], list[str]]:
        """The keyword arguments of this problem in npattn's own form, and the names that the function does not take."""
        return self.record.calls.arguments(self, problem, self.takes(function), backward)

    def in_convention(self, problem: Problem, given: dict[str, Any]) -> dict[str, Any]:
        """The same arguments in the form of the candidate's convention."""
        return self.record.calls.in_convention(self, problem, given)

    def changes(self) -> list[Change]:
        """What the convention changes in the equations."""
        return self.record.calls.changes(self.convention)

    def undefined(self, problem: Problem, features: list[str]) -> str:
        """Why the convention does not define the result of this case; "" if it does."""
        scale = problem.options.get("scale")
        return self.convention.undefined(features, isinstance(scale, float) and scale < 0)

    def truth(self, problem: Problem, precision: Precision) -> Truth | None:
        """The right values by the candidate's convention, without the tensors that it leaves undefined."""
        if self.convention.float64 == "float32" and problem.dtype == np.float64:
            precision = PRECISIONS["float32"]
        return self.record.calls.truth(self, problem, precision)


# --- one call --------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The result of one call of a candidate: its tensors, or why there are none."""

    values: dict[str, Any] = field(default_factory=dict)
    status: str = ""  # of every tensor that is in neither ``values`` nor ``missing``
    text: str = ""
    missing: dict[str, str] = field(default_factory=dict)  # tensors that were not returned, and the text to report


def call_forward(candidate: Candidate, problem: Problem) -> Outcome:
    """The outputs by name."""
    names, calls = list(problem.outputs), candidate.record.calls
    given, missing = candidate.arguments(problem, candidate.forward)
    if missing:
        return Outcome(status="not supported", text=", ".join(missing))
    returned = _called("", lambda: calls.forward(candidate, problem, given), candidate.refusals, problem, given)
    if isinstance(returned, Outcome):
        return returned
    if isinstance(returned, tuple) and len(returned) <= len(names):
        values = dict(zip(names, map(_plain, returned), strict=False))
    else:
        values = {names[0]: _plain(returned)}
    return Outcome(values, missing={n: f"{n} is not returned" for n in names if values.get(n) is None and n != names[0]})


def call_backward(candidate: Candidate, problem: Problem, values: dict[str, Any]) -> Outcome:
    """The gradients by name."""
    if candidate.backward is None:
        return Outcome(status="not given", text="backward not given")
    calls = candidate.record.calls
    given, missing = candidate.arguments(problem, candidate.backward, backward=True)
    if missing:
        return Outcome(status="not supported", text=", ".join(missing))
    returned = _called("the backward ", lambda: calls.backward(candidate, problem, given, values), candidate.refusals, problem,
                       given, values)  # fmt: skip
    if isinstance(returned, Outcome):
        return returned
    if not isinstance(returned, dict):
        return Outcome(status="wrong", text=str(returned))
    optional = problem.op.optional
    missing_text = {t: f"{t} is not returned" for t in problem.gradients if returned.get(t) is None}
    present = {t: _plain(x) for t, x in returned.items() if t in problem.gradients and x is not None}
    lost = {t: text for t, text in missing_text.items() if t in optional}
    wrong = {t: None for t in missing_text if t not in optional}
    return Outcome({**present, **wrong}, missing=lost)


def _plain(x: Any) -> Any:
    """An array of a subclass as a plain array, so that no method of the subclass runs while it is judged.

    Masked arrays (no number in a masked place) and matrices (another meaning of *) stay as they are: the judge refuses them.
    """
    return np.ndarray.view(x, np.ndarray) if is_array(x) else x


def is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) and not isinstance(x, (np.ma.MaskedArray, np.matrix))


def _called(who: str, call: Callable[[], Any], refusals: str, problem: Any, *given: dict[str, Any]) -> Any:
    """What a candidate returns, or an Outcome if it refuses, raises, or writes into its inputs."""
    before = _snapshot(problem, *given)
    try:
        with np.errstate():  # restores the state if the candidate changes it
            returned = call()
    except NotImplementedError as error:
        return Outcome(status="refused", text=message_of(error) or f"{who}raises NotImplementedError")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a candidate may raise SystemExit or GeneratorExit, too
        if refusals == "any" and isinstance(error, Exception):
            return Outcome(status="refused", text=f"{who}raises {type(error).__name__}: {message_of(error)}")
        rank = problem.op.rank
        if rank and np.ndim(next(iter(problem.inputs.values()))) != rank and isinstance(error, Exception):
            return Outcome(status="refused", text=f"{RANK_ALONE.format(rank)}: {type(error).__name__}: {message_of(error)}")
        return Outcome(status="wrong", text=f"{who}raises {_described(error)}")
    if changed := _changed_arrays(before, _snapshot(problem, *given)):
        what = "the backward modifies an input" if who else "an input was modified"
        return Outcome(status="wrong", text=f"{what}: {changed}")
    return returned


def _snapshot(problem: Any, *more: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """By name, everything about the given arrays that a function could change."""
    return {
        part or name: (x.shape, x.dtype, x.flags.writeable, x.strides, x.tobytes())
        for given in (problem.inputs, problem.cotangents, *more)
        for name, part, x in parts(given)
        if isinstance(x, np.ndarray)
    }


ASPECTS = ("has another shape", "has another dtype", "can be written or not, as it could not before", "has other strides", "")


def _changed_arrays(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> str:
    """Which arrays have changed, and in what; "" if none has."""
    found = []
    for name, old in before.items():
        what = next((text for text, a, b in zip(ASPECTS, old, after[name], strict=True) if a != b), None)
        if what is not None:
            found.append(f"{name} {what}".strip())
    return ", ".join(found)


def _described(error: BaseException) -> str:
    """The class, message and line of an exception."""
    try:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        return f"{type(error).__name__}: {message_of(error)}{where}"
    except BaseException:
        return "what cannot be described"


# --- by name ---------------------------------------------------------------------------------------------------------------

BUILT_IN: dict[str, tuple[str, Callable[[], Any]]] = {
    **{name: (op.name, loader) for op in OPS.values() for name, loader in op.candidates.items()},
    **{name: (peer.op, peer.load) for name, peer in PEERS.items()},
}
"""The op of each, and what loads its forward and backward."""


def op_of(name: str, op: str | None) -> str:
    """The op of the candidate of that name. Raises CandidateError if it is a built-in one for another op."""
    own_op = BUILT_IN[name][0] if name in BUILT_IN else None
    if own_op is not None and op not in (None, own_op):
        raise CandidateError(f"the built-in candidate {name} is for --op {own_op}, not {op}")
    return own_op or op or "attention"


def load(name: str, backward: str | None = None, convention: Convention | None = None, op: str | None = None) -> Candidate:
    """The candidate of that name: a built-in one, ``package.module:function`` or ``path/to/file.py:function``."""
    convention = convention or OWN
    for what, given in (("candidate", name), ("backward", backward)):
        if given is not None and not given.strip():
            raise CandidateError(f"the {what} has an empty name: is a variable of the shell unset?")
    if name in BUILT_IN:
        if backward is not None:
            raise CandidateError(f"the built-in candidate {name} has a backward of its own")
        own_op, loader = op_of(name, op), BUILT_IN[name][1]
        try:
            forward, own_backward = loader()
        except ImportError as error:
            raise CandidateError(str(error)) from None
        return Candidate(name, forward, own_backward, convention, own_op)
    functions = _function(name), None if backward is None else _function(backward, like=name)
    return Candidate(name, *functions, convention, op or "attention")


def _function(name: str, like: str | None = None) -> Callable[..., Any]:
    where, colon, attribute = name.rpartition(":")
    if not colon:
        where, attribute = ("" if like is None else like.rpartition(":")[0]), name
    if not where or not attribute:
        names = ", ".join(BUILT_IN)
        expected = f"expected {names}, package.module:function or path/to/file.py:function"
        raise CandidateError(f"{name!r} is no candidate{suggestion(name, BUILT_IN)}; {expected}")
    try:
        module = _module(where)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise CandidateError(f"{where} cannot be imported: {type(error).__name__}: {message_of(error)}") from error
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
        # dataclasses look their module up in sys.modules. The folder stays on the path for imports inside the functions.
        name = path.stem if path.stem not in sys.modules else f"npattn candidate {path}"
        sys.modules[name] = module
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        spec.loader.exec_module(module)
        _LOADED[str(path)] = module
    return _LOADED[str(path)]
