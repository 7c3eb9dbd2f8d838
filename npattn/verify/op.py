"""What verify knows of an op: its problems, its cases, its right results, and known mistakes. One record (`Op`) for each op.

To add an op is to write one record (`npattn.verify.ops`). No other file asks which op it is: what differs between ops is a
field of `Op`, and what a call must contain for a mistake to show is a field of `Change`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.precision import Precision, round_to

if TYPE_CHECKING:
    from npattn.verify.space import Space

Values = dict[str, Array]
Function = Callable[..., Any]
Pair = tuple[Function, Function | None]  # a forward, and a backward


# --- what people do instead ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A known mistake or another convention: what it computes instead in one or several stages of an op's equations."""

    name: str  # as reports print it
    stages: Mapping[str, Callable[[Any, Any], Any]]  # stage -> f(x, honest value); x holds all values computed so far
    needs: frozenset[str] = frozenset()  # facts of a call (see `facts`) without which it changes nothing
    convention: bool = False  # another convention, not a mistake
    companions: tuple[str, ...] = ()  # further changes that the convention implies in the backward
    tile: int = 0  # the tile size that it depends on, 0: none. A kernel's tile size is not known, so several are tried
    likely: bool = False  # so common that every verdict has to reject it (`npattn.verify.power`)
    nan: str = ""  # "moves": it changes where NaN is, so it is tried if only that is wrong; "makes": finite inputs may give NaN
    rounds: bool = False  # it is a rounding, which a class of precision may allow


# --- one problem -----------------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """The right values, by tensor, in a precision above the candidate's, and the error that is predicted for the candidate."""

    values: Values
    sigma: Values
    remainder: Values = field(default_factory=dict)  # what has to be added to the values if no dtype holds them exactly enough
    bound: Callable[[], Values] = dict  # computes ``det`` when it is needed

    @functools.cached_property
    def det(self) -> Values:
        """The rigorous bound, by tensor; empty where the op has none."""
        return self.bound()


def parts(values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(name, part, x) for every value. A NamedTuple or mapping gives each of its parts, anything else itself as part "".

    A part that has parts itself gives them by both names: those of the norm of q in ``params`` are q_norm_g and q_norm_b.
    """
    for name, x in values.items():
        inner = x._asdict() if hasattr(x, "_asdict") else x if isinstance(x, Mapping) else {"": x}
        yield from ((name, f"{part}_{more}" if more else part, y) for part, more, y in _parts_of(inner))


def _parts_of(inner: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The parts of a value; those of an array or number are itself."""
    for part, x in inner.items():
        nested = hasattr(x, "_asdict") or isinstance(x, Mapping)
        yield from parts({part: x}) if nested else ((part, "", x),)


def holds_integers(x: Any) -> bool:
    """Whether x is an array of integers, such as ids: it has no gradient, and says nothing about precision."""
    return isinstance(x, np.ndarray) and x.dtype.kind in "iu"


def first_of_numbers(inputs: Mapping[str, Any]) -> str:
    """The name of the first input that does not hold integers."""
    return next(name for name, x in inputs.items() if not holds_integers(x))


def map_parts(f: Callable[[Any], Any], x: Any) -> Any:
    """f(x); for a NamedTuple, a NamedTuple of f of each part."""
    return type(x)(*(map_parts(f, y) for y in x)) if isinstance(x, tuple) and hasattr(x, "_fields") else f(x)


def better_dtype(dtype: Any) -> Any:
    """A dtype in which the truth about ``dtype`` can be computed, or None where this machine has none."""
    if np.dtype(dtype) != np.float64:
        return np.float64
    return np.longdouble if np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant else None


def cast(x: Any, dtype: Any) -> Any:
    """A floating array, or an object that holds one, in another dtype; ``object`` stands for the numbers of mpmath."""
    if hasattr(x, "with_parameter"):  # a bias of `npattn.ops.biases`
        return x.with_parameter(cast(x.parameter, dtype))
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fc":
        return x
    if dtype is not object:
        return x.astype(dtype)
    import mpmath

    return np.asarray(np.frompyfunc(lambda number: mpmath.mpf(float(number)), 1, 1)(x), object)


@dataclass
class Problem:
    """The inputs, options and cotangents of one call. ``problem.q`` is short for ``problem.inputs["q"]``."""

    op: Op
    inputs: dict[str, Any]  # in the order of the call: an array, parameters (a NamedTuple of arrays), or None
    options: dict[str, Any]
    cotangents: Values

    def __getattr__(self, name: str) -> Any:
        for part in ("inputs", "cotangents"):
            found = self.__dict__.get(part, {})
            if name in found:
                return found[name]
        if "op" in self.__dict__ and name in (f"d{output}" for output in self.op.outputs):
            return None  # no gradient comes in through this output
        raise AttributeError(name)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.op.outputs

    @property
    def differentiable_arrays(self) -> dict[str, Any]:
        """Every array that has a gradient, by its own name: inputs, each parameter, and differentiable options."""
        options = {name: self.options[name] for name in self.op.differentiable if name in self.options}
        return {part or name: x for name, part, x in parts(self.inputs | options) if x is not None and not holds_integers(x)}

    @property
    def gradients(self) -> tuple[str, ...]:
        """The names of the gradients: 'd' and the name of the array."""
        return tuple(f"d{name}" for name in self.differentiable_arrays)

    @property
    def dtype(self) -> np.dtype[Any]:
        first: Array = self.inputs[first_of_numbers(self.inputs)]
        return first.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the largest array in the equations."""
        return self.op.shape(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as the reference takes them."""
        return self.op.arguments(self)

    def dtypes(self, tensor: str, precision: Precision) -> list[Any]:
        """The dtypes in which a tensor may be returned."""
        own = self.options.get(tensor[1:])
        first = own.dtype if isinstance(own, np.ndarray) and tensor in self.gradients else self.dtype
        return [first] if first == precision.dtype else [first, precision.dtype]

    def each(self, f: Callable[[Any], Any]) -> Problem:
        """The same problem with f applied to every value. An array that is given twice stays one array."""
        done: dict[int, Any] = {}

        def once(x: Any) -> Any:
            return done.setdefault(id(x), f(x))

        fields = (self.inputs, self.options, self.cotangents)
        return Problem(self.op, *({n: map_parts(once, x) for n, x in values.items()} for values in fields))

    def astype(self, dtype: Any) -> Problem:
        """All floating arrays in another dtype."""
        return self.each(lambda x: cast(x, dtype))

    def stored(self, precision: Precision) -> Problem:
        """The same problem, its numbers rounded to the storage format of ``precision``: in float16, or in float32 for others.

        Options, and cotangents of outputs that are always in float32 (`Op.in_computing_dtype`), stay in float32.
        """
        if precision.storage in ("float32", "float64"):
            return self.astype(precision.dtype)

        def held(x: Any) -> Any:
            if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
                return x
            low = round_to(x, precision.storage)
            return np.where(np.isfinite(low) | ~np.isfinite(x), low, x)  # an option that would overflow stays

        p = self.astype(np.float32)
        in_float32 = {f"d{t}": p.cotangents.pop(f"d{t}") for t in self.op.in_computing_dtype if f"d{t}" in p.cotangents}
        low = p.each(held)
        if precision.storage == "float16":
            both = Problem(self.op, low.inputs, {}, low.cotangents).astype(np.float16)
            low = Problem(self.op, both.inputs, low.options, both.cotangents)
        low.cotangents |= in_float32
        return low

    def truth(self, precision: Precision) -> Truth | None:
        """The reference's values, and sigma for an implementation of that class; None if no dtype is better."""
        return self.op.truth(self, precision)


@dataclass(frozen=True)
class Case:
    """A named problem, and the features that it tests."""

    op: str
    name: str
    features: list[str]
    draw: Callable[[np.random.Generator], Problem]
    dtype: str = "float32"

    def problem(self, seed: int = 0) -> Problem:
        return self.draw(np.random.default_rng([seed, *self.name.encode()])).astype(self.dtype)

    def smaller(self) -> list[Any]:
        """Smaller cases to try in its place; the largest steps come first."""
        return []


# --- one op ----------------------------------------------------------------------------------------------------------------


class Calls:
    """How a candidate of an op is called, and what is right by its convention."""

    text = ""  # the signatures, for messages
    keywords: tuple[str, ...] = ()  # the options of the forward that verify knows
    assumed: tuple[str, ...] = ()  # those that a function is taken to have if its signature is ``**options`` or not known
    conventions: tuple[str, ...] | None = None  # the fields of a `Convention` that mean something for this op; None: all
    positional: tuple[str, ...] = ()  # possible names of its first parameters; any other is an option never given

    def arguments(
        self, candidate: Any, problem: Problem, takes: frozenset[str], backward: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """The options of a call in npattn's own form, and those that the function does not take."""
        return problem.options, [name for name in problem.options if name not in takes]

    def forward(self, candidate: Any, problem: Problem, given: dict[str, Any]) -> Any:
        """What the forward returns, in npattn's layout."""
        raise NotImplementedError

    def backward(self, candidate: Any, problem: Problem, given: dict[str, Any], values: dict[str, Any]) -> Any:
        """The gradients by npattn's names, or a text that says what was returned instead."""
        raise NotImplementedError

    def in_convention(self, candidate: Any, problem: Problem, given: dict[str, Any]) -> dict[str, Any]:
        """The same options in the form of the candidate's convention."""
        return given

    def changes(self, convention: Any) -> list[Change]:
        """What a convention changes in the equations."""
        return []

    def truth(self, candidate: Any, problem: Problem, precision: Precision) -> Truth | None:
        """The right values by the candidate's convention, without the tensors that it leaves undefined."""
        return problem.truth(precision)


class Relatives:
    """Problems related to a given one, with results that must be right or equal, too. None: there is no such problem."""

    def first_sequence(self, problem: Problem) -> Problem | None:
        """The first sequence of a batch alone."""
        return None

    def hidden(self, problem: Problem) -> Problem | None:
        """The same with other numbers in masked places."""
        return None

    def with_another_mask(self, problem: Problem) -> Problem | None:
        """The same with another mask and bias of the same shapes."""
        return None

    def with_other_numbers(self, problem: Problem) -> Problem:
        """The same with other numbers."""
        return negated(problem)

    def strided(self, problem: Problem) -> Problem:
        """The same numbers in views with strides."""
        raise NotImplementedError

    def outside(self, problem: Problem, truth: Truth, values: Values) -> str | None:
        """A text on what lies outside of an exact bound, "" if nothing does; None if there is no bound."""
        return None


def negated(problem: Problem) -> Problem:
    """The same with other numbers: the first input that does not hold integers has the other sign."""
    name = first_of_numbers(problem.inputs)
    return dataclasses.replace(problem, inputs={**problem.inputs, name: -problem.inputs[name]})


@dataclass(frozen=True, eq=False)
class Op:
    """All that verify knows of one op."""

    name: str
    outputs: tuple[str, ...]
    axes: Mapping[str, str]  # the letters of each output and gradient
    reference: Callable[[Problem], Values]
    forward: Callable[[Any], None]  # the equations once more, as stages of `npattn.verify.stages.Run`
    backward: Callable[[Any], None]
    truth: Callable[[Problem, Precision], Truth | None]
    changes: Mapping[str, Change]
    cases: list[Any]
    candidates: Mapping[str, Callable[[], Pair]]  # those that come with npattn; the first is the default
    calls: Calls
    differentiable: tuple[str, ...] = ()  # options that have a gradient
    optional: tuple[str, ...] = ()  # gradients that a backward may leave out
    in_computing_dtype: tuple[str, ...] = ()  # outputs in the computing dtype, whatever the inputs are
    output_only_stages: frozenset[str] = frozenset()  # a change of them reaches the output alone, not what the backward keeps
    shape: Callable[[Problem], tuple[int, ...]] = lambda p: np.shape(next(iter(p.cotangents.values())))
    arguments: Callable[[Problem], dict[str, Any]] = lambda p: p.options  # the options as the reference takes them
    as_arrays: Callable[[Problem], dict[str, Any]] = lambda p: p.options  # for candidates that take arrays alone
    facts: Callable[[Problem, Mapping[str, Any]], set[str]] = lambda p, given: set()  # in addition to the names of the options
    undefined: Callable[[Problem, Precision], str] = lambda p, precision: ""  # why a class of precision is not tested here
    canonical: Callable[[Problem], Problem] = lambda p: p  # the form in which candidates get a problem
    eager: Callable[[Problem, Precision], Values] | None = None  # what the rules of other suites compare with
    bounded: bool = False  # whether there is a rigorous bound
    rank: int = 0  # of the first input as the docs have it: an exception at another rank is a refusal; 0: any
    relatives: Relatives = field(default_factory=Relatives)  # for the exact conditions, which need no tolerance
    conditioned: tuple[str, ...] = ()  # the cases on which they are examined
    hypotheses: tuple[Any, ...] = ()  # see `npattn.verify.search`; empty: those for every op
    more_hypotheses: tuple[Any, ...] = ()  # beside them
    more_changes: Callable[[list[dict[str, Any]], dict[str, Any]], list[Change]] = lambda earlier, given: []  # of earlier calls
    another_call: Callable[[Problem], Problem] = negated  # another call of the same shapes, to be made in between
    evidence: tuple[str, ...] = ()  # cases to run before NaN everywhere is explained
    basics: tuple[str, ...] = ()  # cases in which most mistakes do not show
    random_cases: Callable[[int, int], list[Any]] = lambda seed, count: []
    space: Space | None = None  # from which further cases are drawn

    known: ClassVar[dict[str, Op]] = {}

    def __post_init__(self) -> None:
        Op.known[self.name] = self

    def __reduce__(self) -> Any:
        return _known_op, (self.name,)  # pickled by its name: another process has its own record

    @functools.cached_property
    def by_name(self) -> dict[str, Any]:
        return {case.name: case for case in self.cases}


def _known_op(name: str) -> Op:
    return Op.known[name]


def facts(problem: Problem, given: Mapping[str, Any]) -> frozenset[str]:
    """What a call contains, in the names of `Change.needs`: its options, and what `Op.facts` adds."""
    found = {name for name, value in given.items() if value is not None and value is not False}
    return frozenset(found | problem.op.facts(problem, given))
