"""The space of calls of an op: dimensions, each of some classes, and cases that are drawn from them.

What is wrong only under a condition is found only where the condition is met: a class of one dimension (D = 72), or of two
(a window and grouped heads). First comes a plain case, then each class by itself, which shows what the candidate takes;
then cases that meet the most pairs of classes that were not met yet; and once all were met, cases at random.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, str]  # a class for each dimension


class Space(NamedTuple):
    """dimensions : by name their classes; plain : classes that most candidates take, one of each dimension

    possible : whether a call can have these classes, of all dimensions or of some
    case : a case with these classes, whose sizes are drawn; None if such a case cannot be drawn
    """

    dimensions: Mapping[str, tuple[str, ...]]
    plain: Row
    possible: Callable[[Row], bool]
    case: Callable[[Row, int, np.random.Generator], Any]


class Drawer:
    """Draws one case after the other, and learns from the results which classes are met, and which are never taken."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.rng = space, np.random.default_rng(seed)
        self.dimensions = {name: list(classes) for name, classes in space.dimensions.items()}  # those that may be taken
        self.met, self.cannot = set[frozenset[tuple[str, str]]](), set[frozenset[tuple[str, str]]]()
        self.drawn, self.accepted = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        self.case_number, self.one_by_one = itertools.count(), self._one_by_one()

    def draw(self) -> tuple[Row, Any]:
        while True:
            row = next(self.one_by_one, None) or self._row()
            case = self.space.case(row, next(self.case_number), self.rng)
            if case is not None:
                return row, case
            self.cannot |= _pairs(row)  # at least one of them; else it would be tried again and again

    def saw(self, row: Row, tested: bool) -> None:
        """tested : whether the candidate took the case"""
        self.drawn.update(row.items())
        if tested:
            self.accepted.update(row.items())
            self.met |= _pairs(row)
        other = [name for name, cls in row.items() if cls != self.space.plain[name]]
        if len(other) == 1 and not tested and row[other[0]] in self.dimensions[other[0]]:
            self.dimensions[other[0]].remove(row[other[0]])

    def coverage(self) -> tuple[int, int]:
        """Pairs of classes that were met, and all possible ones of classes that the candidate has taken."""
        taken = {name: [c for c in classes if self.accepted[name, c]] for name, classes in self.space.dimensions.items()}
        every = {
            frozenset({(a, x), (b, y)})
            for a, b in itertools.combinations(taken, 2)
            for x, y in itertools.product(taken[a], taken[b])
            if self.space.possible({a: x, b: y})
        }
        return len(every & self.met), len(every)

    def not_taken(self) -> dict[str, list[str]]:
        """The classes that were drawn and never taken, by dimension."""
        found = {n: [c for c in cs if self.drawn[n, c] and not self.accepted[n, c]] for n, cs in self.space.dimensions.items()}
        return {name: classes for name, classes in found.items() if classes}

    def _one_by_one(self) -> Iterator[Row]:
        """The plain row, and that with each other class."""
        plain = self.space.plain
        yield plain
        for name, classes in self.space.dimensions.items():
            for row in ({**plain, name: cls} for cls in classes if cls != plain[name]):
                if self.space.possible(row):
                    yield row

    def _row(self) -> Row:
        """Dimension after dimension, in a random order, the class with which most new pairs are met; among equals at random."""
        row: Row = {}
        for name in self.rng.permutation(list(self.dimensions)):
            classes = [c for c in self.rng.permutation(self.dimensions[name]) if self.space.possible({**row, name: str(c)})]
            classes = classes or [c for c in self.space.dimensions[name] if self.space.possible({**row, name: c})]
            pairs = ([frozenset({(name, str(c)), other}) for other in row.items()] for c in classes)
            new = [sum(pair not in self.met and pair not in self.cannot for pair in of_class) for of_class in pairs]
            row[str(name)] = str(classes[int(np.argmax(new))])
        return row


def _pairs(row: Row) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


__all__ = ["Drawer", "Row", "Space"]
