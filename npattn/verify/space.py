"""The space of calls of an op: dimensions, each of some classes, and cases that are drawn from them.

What is wrong only under a condition is found only where the condition is met: a class of one dimension (D = 72), or of two
(a window and grouped heads). A row has one class of each dimension. First comes a plain row, then each class by itself, which
shows what the candidate takes. Then come rows that together meet every pair of classes, or every triple: each begins with one
that is not met yet, and gets, dimension after dimension, the class with which most new ones are met. On 22 dimensions with
172 classes this gives 500 rows, and the two largest dimensions have 299 pairs, which is the least there can be.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.op import Op, Problem

Row = dict[str, str]  # a class for each dimension
Choice = Mapping[str, Any]  # sizes by letter: a number, the name of another letter, or a function of the other sizes
Sizes = dict[str, int]

MOST = 420_000  # the largest cost of a case (see `Space.cost`): about a second of judging
USUAL = MOST / 8  # what a case costs at most, unless its first two classes cost more by themselves


class Space(NamedTuple):
    """op : its name
    dimensions : by name their classes, each with the choices of sizes that it has
    plain : classes that most candidates take, one of each dimension
    problem : draws a problem with these classes and sizes; ValueError if there is none
    features : the names of what a row tests
    possible : whether a call can have these classes, of all dimensions or of some
    cost : of judging a call with these sizes, as the number of scores of attention for D = 64 in float32
    triples : the dimensions of which every triple of classes is met in --deep
    """

    op: str
    dimensions: Mapping[str, Mapping[str, tuple[Choice, ...]]]
    plain: Row
    problem: Callable[[Row, Sizes, list[int]], Problem]
    features: Callable[[Row], list[str]]
    possible: Callable[[Row], bool] = lambda row: True
    cost: Callable[[Row, Sizes], float] = lambda row, sizes: 0.0
    triples: tuple[str, ...] = ()
    allows: Callable[[Sizes], bool] = lambda sizes: True  # what was asked of the sizes together
    of_backward: Mapping[str, tuple[str, ...]] = {}  # by dimension the classes that the backward alone can tell apart

    @property
    def letters(self) -> list[str]:
        """The letters of sizes, in the order of the dimensions."""
        choices = (x for some in self.dimensions.values() for choices in some.values() for x in choices)
        return list(dict.fromkeys(letter for x in choices for letter in x))

    @property
    def usual(self) -> Row:
        """The plain row of the whole space: names of cases leave its classes out, whatever this space was made to be."""
        whole = Op.known[self.op].space
        return self.plain if whole is None else whole.plain

    def only(self, name: str, cls: str) -> Space:
        """The space with this class alone in one dimension."""
        dimensions = {**self.dimensions, name: {cls: self.dimensions[name][cls]}}
        return self._replace(dimensions=dimensions, plain={**self.plain, name: cls})

    def of_forward(self) -> Space:
        """The space without the classes that only a backward can tell apart from the others."""

        def left(name: str) -> Mapping[str, tuple[Choice, ...]]:
            return {c: x for c, x in self.dimensions[name].items() if c not in self.of_backward.get(name, ())}

        return self._replace(dimensions={name: left(name) for name in self.dimensions})

    def affordable(self, row: Row) -> bool:
        """Whether such a call is possible, and its smallest sizes do not cost too much."""
        return self.possible(row) and self.cost(row, self.smallest(row)) <= MOST

    def fitting(self, row: Row, name: str = "") -> Row:
        """The row, or the first whose smallest sizes are allowed of those with other sizes in up to two dimensions but this."""
        others = [n for n in self.dimensions if n != name and has_sizes(self, n)]
        for count in (0, 1, 2):
            for names in itertools.combinations(others[::-1], count):
                for some in itertools.product(*(self.dimensions[n] for n in names)):
                    found = {**row, **dict(zip(names, some, strict=True))}
                    if self.allows(self.smallest(found)) and self.affordable(found):
                        return found
        return row

    def smallest(self, row: Row) -> Sizes:
        """The smallest sizes of the row's classes."""
        chosen = (self.dimensions[name][cls][0] for name, cls in row.items())
        return _resolved({letter: n for choice in chosen for letter, n in choice.items()})

    def case(self, row: Row, rng: np.random.Generator) -> Drawn | None:
        """A case with sizes at random, if those cost no more than `USUAL`, or with the smallest; None if there is none."""
        for attempt in range(6):
            last = attempt == 5
            chosen = [c[0] if last else c[rng.integers(len(c))] for n, k in row.items() if (c := self.dimensions[n][k])]
            sizes = _resolved({letter: size for choice in chosen for letter, size in choice.items()})
            if self.allows(sizes) and self.cost(row, sizes) <= (MOST if last else USUAL):
                found = self.sized(row, sizes)
                if found is not None:
                    return found
        return None

    def sized(self, row: Row, sizes: Sizes) -> Drawn | None:
        """The case with these classes and sizes, whatever the order in which they are given; None if none can be drawn."""
        row, sizes = {n: row[n] for n in self.dimensions}, {letter: sizes[letter] for letter in self.letters if letter in sizes}
        usual = self.usual
        some = "; ".join(f"{name}={cls}" for name, cls in row.items() if not has_sizes(self, name) and cls != usual[name])
        name = f"drawn: {' '.join(f'{letter}={size}' for letter, size in sizes.items())}" + (f"; {some}" if some else "")
        found = Drawn(self, name, row, sizes)
        try:
            found.problem()
        except ValueError:  # such as masks that leave no query two keys
            return None
        return found

    def named(self, name: str) -> Drawn | None:
        """The case of that name, which holds all that it needs; None if it is none of this space."""
        sizes, _, some = name.removeprefix("drawn: ").partition("; ")
        try:
            row = self.usual | dict(part.split("=", 1) for part in some.split("; ") if part)
            of = {letter: int(n) for letter, n in (part.split("=") for part in sizes.split())}
            row = self.classes_of(row, of)
            found = self.sized(row, of)
        except (ValueError, KeyError):
            return None
        known = row.keys() == self.plain.keys() and all(cls in self.dimensions[n] for n, cls in row.items())
        good = known and min(of.values()) >= 1 and self.possible(row)
        return found if good and found is not None and found.name == name else None

    def classes_of(self, row: Row, sizes: Sizes) -> Row:
        """The row with the classes of these sizes; where there is none, with one that does not say that two are equal."""
        row = dict(row)
        for name, some in self.dimensions.items():
            if has_sizes(self, name):
                fits = [cls for cls, choices in some.items() for x in choices
                        if _resolved({**sizes, **x}).items() >= {n: sizes[n] for n in x}.items()]  # fmt: skip
                free = [cls for cls, choices in some.items() if not any(isinstance(n, str) for n in choices[0].values())]
                row[name] = next(iter([*fits, *free, row[name]]))
        return row


def has_sizes(space: Space, name: str) -> bool:
    """Whether the classes of a dimension are classes of sizes."""
    return any(choice for choices in space.dimensions[name].values() for choice in choices)


def _resolved(sizes: Mapping[str, Any]) -> Sizes:
    known = {letter: n for letter, n in sizes.items() if isinstance(n, int)}
    for letter, n in sizes.items():
        if isinstance(n, str):
            known[letter] = known.get(n, 1)
    return known | {letter: n({"D": 1, **known}) for letter, n in sizes.items() if callable(n)}


# --- a case of it -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Drawn:
    """A case that was drawn from a space."""

    space: Space = field(repr=False)
    name: str
    row: Row
    sizes: Sizes

    def __reduce__(self) -> Any:
        return _again, (self.op, self.name, self.row, self.sizes)  # functions cannot be sent to another process

    @property
    def op(self) -> str:
        return self.space.op

    @property
    def dtype(self) -> str:
        return self.row.get("dtype", "float32")

    @property
    def features(self) -> list[str]:
        return ["drawn", *self.space.features(self.row)]

    @property
    def conditions(self) -> tuple[str, ...]:
        """The exact conditions that are examined of it."""
        return CALLS.get(self.row.get("calls", ""), ())

    def problem(self, seed: int = 0) -> Problem:
        number = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")  # a generator takes 4 us a number
        return self.space.problem(self.row, self.sizes, [seed, number]).astype(self.dtype)

    def place(self, problem: Problem) -> Problem:
        """The same numbers in the memory layouts of the row."""
        for dimension, cls in self.row.items():
            if dimension == "memory":
                problem = problem.each(LAYOUTS[cls])
            elif dimension.endswith(" in memory"):
                given = [x for x in (problem.inputs, problem.cotangents) if dimension.split()[0] in x]
                given[0][dimension.split()[0]] = LAYOUTS[cls](given[0][dimension.split()[0]])
        return ALIASES[self.row.get("alias", "none")](problem)

    def smaller(self) -> list[Drawn]:
        """The case with the usual class in place of another one, or a batch of 1; with each letter in turn halved, then each
        lowered by one; letters of one size also together. Each is named as what it is, so that it can be run again."""
        space, usual, tried = self.space, self.space.usual, list[tuple[Row, Sizes]]()
        for name, cls in self.row.items():
            smaller = ["1"] if name == "batch" else [usual[name]]
            if not has_sizes(space, name) and cls not in smaller:
                tried += [({**self.row, name: other}, self.sizes) for other in smaller if other in space.dimensions[name]]
        groups = [g for n in (3, 2, 1) for g in itertools.combinations(self.sizes, n) if len({self.sizes[x] for x in g}) == 1]
        for halve in (True, False):
            for letters in groups:
                n = self.sizes[letters[0]]
                new = {**self.sizes, **dict.fromkeys(letters, max(1, n // 2) if halve else n - 1)}
                if new != self.sizes and min(new.values()) >= 1:
                    tried.append((space.classes_of(self.row, new), new))
        cases = (space.sized(row, sizes) for row, sizes in tried if space.possible(row))
        return [case for case in cases if case is not None]


def _again(op: str, name: str, row: Row, sizes: Sizes) -> Drawn:
    space = Op.known[op].space
    assert space is not None
    return Drawn(space, name, row, sizes)


def _read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


def _of_arrays(change: Callable[[Array], Array]) -> Callable[[Any], Any]:
    """Of arrays of numbers with two axes or more; anything else stays as it is."""
    return lambda x: change(x) if isinstance(x, np.ndarray) and x.ndim > 1 and x.dtype.kind in "fiu" else x


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda x: x,
    "axes swapped": _of_arrays(lambda x: np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -3 if x.ndim > 2 else -1, -2)),
                                                     -3 if x.ndim > 2 else -1, -2)),
    "Fortran": _of_arrays(np.asfortranarray),
    "backwards": _of_arrays(lambda x: x[..., ::-1, :].copy()[..., ::-1, :]),
    "every second row": _of_arrays(lambda x: np.repeat(x, 2, axis=-2)[..., ::2, :]),
    "strides of 0": _of_arrays(lambda x: np.broadcast_to(x[:1], x.shape)),  # other numbers: those of the first along that axis
    "read-only": _of_arrays(_read_only),
}  # fmt: skip


def _alias(**of: str) -> Callable[[Problem], Problem]:
    """The same problem in which some inputs or cotangents are the array of another input."""

    def aliased(p: Problem) -> Problem:
        for name, other in of.items():
            (p.inputs if name in p.inputs else p.cotangents)[name] = p.inputs[other]
        return p

    return aliased


ALIASES: dict[str, Callable[[Problem], Problem]] = {
    "none": lambda p: p, "k is q": _alias(k="q"), "v is k": _alias(v="k"), "one array": _alias(k="q", v="q"),
    "dout is q": _alias(dout="q"),
}  # fmt: skip

CALLS = {"once": (), "again": ("repeat",), "after others": ("other calls",), "two threads": ("threads",)}
"""Classes of the dimension "calls", and the exact conditions by which they are examined."""

EVERYWHERE: dict[str, dict[str, tuple[Choice, ...]]] = {
    "calls": {name: ({},) for name in CALLS}, "dtype": {"float32": ({},), "float64": ({},)},
}  # fmt: skip
"""Dimensions that every op has."""


def classes(*names: str) -> dict[str, tuple[Choice, ...]]:
    """Classes that have nothing to do with sizes."""
    return {name: ({},) for name in names}


def refers(choice: Choice) -> bool:
    """Whether a choice depends on other letters."""
    return any(not isinstance(n, int) for n in choice.values())


def sizes_of(letter: str, of: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Choice, ...]]:
    """Classes of sizes for one letter."""
    return {name: tuple({letter: n} for n in numbers) for name, numbers in of.items()}


# --- which rows are drawn ---------------------------------------------------------------------------------------------------


class Coverage(NamedTuple):
    """How much of the space that a candidate takes was met."""

    until: str  # "pairs" or "triples", if all were to be met; "" if drawing ended with the time
    cases: int
    met: int  # pairs of classes that it takes, that a call can have, and that were tested
    pairs: int  # all of them
    triples: tuple[int, int] | None  # the same of triples, if they were asked for
    refused: dict[str, list[str]]  # classes that were never taken, by dimension
    limits: list[str]  # what of the sizes it was found to take
    left_out: list[str]  # pairs that cost too much
    wrong: int = 0  # cases that are wrong, and not expected to be
    common: tuple[str, ...] = ()  # classes that all of these have, and few right ones

    @property
    def too_little(self) -> bool:
        """Whether less than half of the pairs that were to be met were met.

        Built-in candidates reach 0.98 and more. Less is left where a call takes the one class and the other, and refuses both.
        """
        return bool(self.until) and 2 * self.met < self.pairs


class Drawer:
    """Draws rows in rounds, and learns from their results which classes the candidate takes and what was met.

    Which rows a round has depends on the seed and on the results of earlier rounds alone.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.rng = space, np.random.default_rng([seed, 17])
        self.classes = [(name, cls) for name, some in space.dimensions.items() for cls in some]
        self.number = {pair: i for i, pair in enumerate(self.classes)}
        self.of = {name: [self.number[name, cls] for cls in some] for name, some in space.dimensions.items()}
        self.open = {name: list(some) for name, some in self.of.items()}  # what may be drawn
        n = len(self.classes)
        self.possible = np.zeros((n, n), bool)
        for (i, a), (j, b) in itertools.combinations(enumerate(self.classes), 2):
            self.possible[i, j] = self.possible[j, i] = a[0] != b[0] and space.possible(dict([a, b]))
        self.costly = [(a, b) for a, b in itertools.combinations(self.classes, 2)
                       if self.possible[self.number[a], self.number[b]] and not space.affordable(dict([a, b]))]  # fmt: skip
        for a, b in self.costly:
            self.possible[self.number[a], self.number[b]] = self.possible[self.number[b], self.number[a]] = False
        self.refused = np.zeros((n, n), int)  # how often a pair was in a row that was not taken
        self.met, self.met3 = np.zeros((n, n), bool), np.zeros((0, 0, 0), bool)
        self.drawn, self.accepted, self.cases = np.zeros(n, int), np.zeros(n, int), 0
        self.alone = np.zeros(n, bool)  # classes that were refused in the plain row
        self.limits: list[str] = []
        self.possible3 = self.met3

    # -- rounds

    def one_by_one(self, mixed: bool = False) -> list[Row]:
        """The plain row with each other class in turn; mixed : the first of each dimension before the second of any"""
        plain = self.space.plain
        others = [(name, cls) for name, cls in self.classes if cls != plain[name] and self.number[name, cls] in self.open[name]]
        if mixed:
            others.sort(key=lambda pair: self.of[pair[0]].index(self.number[pair]))
        rows = [self.space.fitting({**plain, name: cls}, name) for name, cls in others]
        return [row for row in rows if self.space.affordable(row)]

    def some_at_once(self, count: int) -> list[Row]:
        """Rows with two to six classes that are not plain; in every second row of sizes and options.

        The classes are those that were taken, and of dimensions of which nothing was refused by itself those not yet drawn.
        """
        rows, others = list[Row](), dict[str, list[int]]()
        for name, some in self.of.items():
            plain = self.number[name, self.space.plain[name]]
            others[name] = [i for i in some if i != plain and (self.accepted[i] or not self.alone[some].any())]
        for i in range(20 * count):
            names = [n for n, some in others.items() if some and (i % 2 == 0 or n in self.space.triples)]
            chosen = self.rng.permutation(names)[: self.rng.integers(2, 7)]
            row = self.space.plain | {str(n): self.classes[self.rng.choice(others[n])][1] for n in chosen}
            if self.space.affordable(row) and self.space.allows(self.space.smallest(row)):
                rows.append(row)
            if len(rows) == count:
                break
        return rows

    def pairs(self, attempts: int = 6) -> Iterator[list[Row]]:
        """Rows that meet every pair that is open. Those that were refused are drawn again with other classes.

        A pair that was never taken, in three rows or more, is left out of rows for others; after six it is given up.
        """
        for _ in range(attempts):
            left = self.possible & ~self.met & (self.refused < 6) & self._open()[:, None] & self._open()
            rows = list(self._covering(left))
            if not rows:
                return
            yield rows

    def triples(self, attempts: int = 2) -> Iterator[list[Row]]:
        """Rows that meet every triple of classes of `Space.triples`."""
        n, some = len(self.classes), np.isin([name for name, _ in self.classes], self.space.triples)
        p = self.possible & some[:, None] & some
        self.possible3 = p[:, :, None] & p[:, None, :] & p[None, :, :]
        self.met3 = np.zeros((n, n, n), bool)
        for i, j, k in np.argwhere(self.possible3):
            if i < j < k and not self.space.affordable(dict([self.classes[i], self.classes[j], self.classes[k]])):
                for at in itertools.permutations((i, j, k)):
                    self.possible3[at] = False
        for _ in range(attempts):
            o = self._open()
            left = self.possible3 & ~self.met3 & o[:, None, None] & o[:, None] & o
            rows = list(self._covering(left))
            if not rows:
                return
            yield rows

    def at_random(self) -> Iterator[list[Row]]:
        """Rows without end."""
        while True:
            rows = [self._row([], np.zeros_like(self.possible)) for _ in range(16)]
            yield [row for row in rows if row is not None]

    def saw(self, row: Row, tested: bool) -> None:
        """tested : whether the candidate took the case"""
        at = np.array([self.number[pair] for pair in row.items()])
        self.drawn[at] += 1
        self.cases += 1
        other = [self.number[name, cls] for name, cls in row.items() if cls != self.space.plain[name]]
        if len(other) == 1 and not tested:
            self.alone[other] = True
        if tested:
            self.accepted[at] += 1
            self.met[np.ix_(at, at)] = True
            if self.met3.size:
                self.met3[np.ix_(at, at, at)] = True
        else:
            self.refused[np.ix_(at, at)] += 1

    def close(self, name: str, cls: str) -> None:
        """A class that is not drawn any more."""
        number = self.number[name, cls]
        if number in self.open[name] and len(self.open[name]) > 1:
            self.open[name].remove(number)

    def _open(self) -> Array:
        found = np.zeros(len(self.classes), bool)
        found[[i for some in self.open.values() for i in some]] = True
        return found

    def _covering(self, left: Array) -> Iterator[Row]:
        """Rows that together meet all that is left; `left` is used up."""
        while True:
            there = np.flatnonzero(left)
            if not len(there):
                return
            first = [int(i) for i in np.unravel_index(there[self.rng.integers(len(there))], left.shape)]
            tries = (self._row(first, left, usual) for usual in [USUAL] * 5 + [MOST] * 5)  # some end where no class is left
            row = next((found for found in tries if found), None)
            at = [self.number[pair] for pair in row.items()] if row else first
            left[np.ix_(*[at] * left.ndim)] = False
            if not row or not set(first) <= set(at):
                for order in itertools.permutations(first):
                    left[order] = False  # no row can have it
            if row:
                yield row

    def _row(self, first: list[int], left: Array, usual: float = USUAL) -> Row | None:
        """A row with these classes: of each other dimension the class with which most of what is left is met."""
        row = dict(self.classes[i] for i in first)
        most = max(usual, self.space.cost(row, self.space.smallest(row)))
        goes = self.possible & (self.met | (self.refused < 3))
        with_sizes = {name for name in self.of if has_sizes(self.space, name)}
        for name in self.rng.permutation([n for n in self.of if n not in row]):
            at = np.array([self.number[pair] for pair in row.items()], int)
            some = self.rng.permutation(self.open[name])
            some = some[goes[np.ix_(at, some)].all(0)]
            new = left[np.ix_(*[at] * (left.ndim - 1), some)].reshape(-1, len(some)).sum(0) if len(some) else np.zeros(0)
            for i in some[np.argsort(-new, kind="stable")]:
                more = {**row, str(name): self.classes[i][1]}
                sizes = self.space.smallest(more)
                fits = not with_sizes <= more.keys() or self.space.allows(sizes)  # a size may follow one not chosen yet
                if fits and self.space.possible(more) and self.space.cost(more, sizes) <= most:
                    row[str(name)] = self.classes[i][1]
                    break
            else:
                return None
        return row

    # -- what was met

    def coverage(self, until: str) -> Coverage:
        taken = self.accepted > 0
        for some in self.of.values():  # a dimension of one class is none: all that is taken meets it
            taken[some] &= len(some) > 1
        every = self.possible & taken[:, None] & taken
        three = None
        if self.met3.size:
            every3 = self.possible3 & taken[:, None, None] & taken[:, None] & taken
            three = int((every3 & self.met3).sum()) // 6, int(every3.sum()) // 6
        never = (self.drawn > 0) & (self.accepted == 0)
        refused = {n: [self.classes[i][1] for i in some if never[i]] for n, some in self.of.items()}
        costly = [" with ".join(f"{name} {cls}" for name, cls in pair) for pair in self.costly]
        return Coverage(until, self.cases, int((every & self.met).sum()) // 2, int(every.sum()) // 2, three,
                        {n: some for n, some in refused.items() if some}, [*self._always(), *self.limits], costly)  # fmt: skip

    def _always(self) -> list[str]:
        """The classes without which nothing is taken: where the usual class of a dimension was refused, and it was drawn."""
        found = []
        for name, cls in self.space.usual.items():
            number = self.number.get((name, cls))
            letters = {letter for choices in self.space.dimensions[name].values() for x in choices for letter in x}
            if number is not None and self.drawn[number] and not self.accepted[number] and len(letters) != 1:
                taken = [self.classes[i][1] for i in self.of[name] if self.accepted[i]]
                found += [f"{name} {', '.join(taken)}" if len(taken) < 4 else f"{name} other than {cls}"] if taken else []
        return found


__all__ = ["CALLS", "EVERYWHERE", "LAYOUTS", "Choice", "Coverage", "Drawer", "Drawn", "Row", "Sizes", "Space", "classes",
           "has_sizes", "refers", "sizes_of"]  # fmt: skip
