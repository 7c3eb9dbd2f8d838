"""What sizes a candidate takes: as it is said by `--sizes`, or as it is found out by calls that it refuses."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from npattn.verify.space import Choice, Drawn, Row, Sizes, Space, has_sizes, refers


class Condition(NamedTuple):
    """A condition on sizes: of one letter, or that two letters are equal."""

    text: str
    letters: tuple[str, ...]
    holds: Callable[[Sizes], bool]


FORM = re.compile(r"([A-Za-z]\w*)\s*(?:%\s*(\d+))?\s*(<=|>=|=)\s*([\w,]+)")


def parse(text: str) -> Condition:
    """The condition of a text such as ``D=64,128``, ``L%16=0``, ``S>=128`` or ``L=S``. Raises ValueError."""
    found = FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r}, expected such as D=64,128 or L%16=0 or S<=512 or L=S")
    letter, modulo, sign, right = found.groups()
    if right.isidentifier():
        if modulo or sign != "=":
            raise ValueError(f"{text!r}, expected two letters to be equal, such as L=S")
        return Condition(text, (letter, right), lambda sizes: sizes[letter] == sizes[right])
    try:
        numbers = [int(n) for n in right.split(",")]
    except ValueError:
        raise ValueError(f"{text!r}, expected numbers on the right, or one letter") from None
    if (len(numbers) > 1 and sign != "=") or modulo == "0":
        raise ValueError(f"{text!r}, expected one number, and a division by 1 or more")
    by = int(modulo or 0)
    compare: dict[str, Callable[[int], bool]] = {
        "=": lambda n: n in numbers, "<=": lambda n: n <= numbers[0], ">=": lambda n: n >= numbers[0],
    }  # fmt: skip
    return Condition(text, (letter,), lambda sizes: compare[sign](sizes[letter] % by if by else sizes[letter]))


def restricted(space: Space, conditions: list[Condition]) -> Space:
    """The space of the calls whose sizes obey these conditions. Raises ValueError if there is none."""
    letters = {letter for some in space.dimensions.values() for choices in some.values() for x in choices for letter in x}
    for c in conditions:
        if unknown := [letter for letter in c.letters if letter not in letters]:
            raise ValueError(f"{c.text}: there is no size {unknown[0]}, expected one of {', '.join(sorted(letters))}")
    ties = _ties(space)
    for c in conditions:
        if len(c.letters) == 2 and frozenset(c.letters) not in ties:
            known = ", ".join("=".join(sorted(pair)) for pair in ties)
            raise ValueError(f"{c.text}: no cases are drawn for that, of two letters only for {known or 'none'}")
    dimensions: dict[str, Mapping[str, tuple[Choice, ...]]] = {}
    for name, some in space.dimensions.items():
        kept = {cls: tuple(x for x in choices if _obeys(x, some, conditions)) for cls, choices in some.items()}
        kept = {cls: choices for cls, choices in kept.items() if choices}
        own = {letter for choices in some.values() for x in choices for letter in x}
        if len(kept) < min(2, len(some)) and len(own) == 1 and not any(refers(x) for c in some.values() for x in c):
            kept = _others(next(iter(own)), [c for c in conditions if set(c.letters) == own]) or kept
        if not kept:
            raise ValueError(f"{', '.join(c.text for c in conditions)}: no {name} is left")
        if len(own) == 1:
            kept |= _more(next(iter(own)), kept, some, conditions)
        dimensions[name] = kept
    plain = {name: cls if cls in dimensions[name] else next(iter(dimensions[name])) for name, cls in space.plain.items()}
    space = space._replace(dimensions=dimensions, plain=plain,
                           allows=lambda sizes: all(c.holds(sizes) for c in conditions))  # fmt: skip
    return space._replace(plain=space.fitting(plain))


def _ties(space: Space) -> list[frozenset[str]]:
    """Pairs of letters that can be equal in every case: by a class that names the other letter, or in one dimension."""
    choices = [x for some in space.dimensions.values() for c in some.values() for x in c]
    named = [frozenset((letter, n)) for x in choices for letter, n in x.items() if isinstance(n, str)]
    return list(dict.fromkeys(named + [frozenset(pair) for x in choices for pair in itertools.combinations(x, 2)]))


def _obeys(choice: Choice, some: Mapping[str, tuple[Choice, ...]], conditions: list[Condition]) -> bool:
    """Whether a choice of sizes alone obeys. That two letters are equal is asked of classes that name another letter."""
    for c in conditions:
        if set(c.letters) <= choice.keys() and not refers(choice):
            if not c.holds({letter: choice[letter] for letter in c.letters}):
                return False
        elif len(c.letters) == 2:
            equal = [(a, b) for a, b in (c.letters, c.letters[::-1]) if any(x.get(a) == b for y in some.values() for x in y)]
            if equal and choice.get(equal[0][0]) != equal[0][1]:
                return False
    return True


def _more(
    letter: str, kept: Mapping[str, tuple[Choice, ...]], some: Mapping[str, tuple[Choice, ...]], conditions: list[Condition]
) -> dict[str, tuple[Choice, ...]]:
    """A class of further sizes that obey, such as 32 and 96 where multiples of 32 are taken: a last tile of 64 is half full."""
    there = {x[letter] for choices in kept.values() for x in choices if letter in x}
    own = [c for c in conditions if c.letters == (letter,)]
    numbers = [n for n in MORE if n not in there and own and _obeys({letter: n}, some, conditions)]
    return {"another that is taken": tuple({letter: n} for n in numbers)} if numbers else {}


def _others(letter: str, conditions: list[Condition]) -> dict[str, tuple[Choice, ...]]:
    """Classes for a letter of which the known sizes do not obey: the smallest sizes that do, the next ones, and larger ones."""
    numbers = [n for n in range(1, 4097) if all(c.holds({letter: n}) for c in conditions)]
    large = [n for n in numbers if n >= 256 and n not in numbers[:3]][:2]
    parts = {"smallest": numbers[:1], "next": numbers[1:3], "more": numbers[3:6], "large": large}
    return {f"{name} that is taken": tuple({letter: n} for n in some) for name, some in parts.items() if some}


# --- found out -------------------------------------------------------------------------------------------------------------

FIRST = (64, 128, 16, 32, 256, 8, 1, 2)  # sizes that kernels with limits take, the commonest first
MORE = (4, 10, 12, 20, 32, 48, 64, 80, 96, 100, 112, 128, 144, 160, 192, 224, 256, 320, 384, 512)  # beside those of the classes


def found(space: Space, takes: Callable[[Drawn], bool]) -> list[Condition]:
    """The conditions that the sizes of a candidate have to obey, from calls of one plain row; no condition if it takes all.

    takes : whether it accepts a call. The sizes that are tried are those of the classes and some multiples of 16; a letter
    that is the size of another in the plain row stays, and follows where that is refused. If the plain
    sizes are refused, usual ones are tried in their place, until one is taken; if none is, nothing is found.
    """

    def accepts(sizes: Sizes) -> bool:
        case = space.sized(space.plain, sizes)
        return case is not None and takes(case)

    base = _base(space, accepts)
    if base is None:
        return []
    result: list[Condition] = []
    for some in space.dimensions.values():
        letters = {letter for choices in some.values() for x in choices for letter in x}
        if len(letters) != 1:
            continue
        letter = letters.pop()
        equal = next((x[letter] for c in some.values() for x in c if isinstance(x[letter], str)), "")
        follow = [n for n, other in _followers(space) if other == letter]
        tried = sorted({x[letter] for c in some.values() for x in c if isinstance(x[letter], int)} | set(MORE))
        tried = [n for n in tried if n <= 1024]
        together = [*follow, *([equal] if equal else [])]
        alone = [n for n in tried if accepts({**base, letter: n})]
        if equal and set(alone) <= {base[equal]}:
            result.append(parse(f"{letter}={equal}"))
            continue
        # What is refused while the other size stays may be so because of that one, or of both.
        taken = [n for n in tried if n in alone or (together and accepts({**base, letter: n, **dict.fromkeys(together, n)}))]
        if len(taken) < len(tried) and taken:
            result.append(_condition(letter, tried, taken))
    return result


CORE = ("batch", "B", "order", "mask", "dtype", "heads")
"""Dimensions on which what is taken depends most often, in the order in which they are tried."""


def near(space: Space, takes: Callable[[Drawn], bool]) -> Row | None:
    """The plain row if any sizes of it are taken; else the first row that is, of those that differ from it in one dimension,
    or in two. None if none is found."""
    plain = space.plain
    free = [n for n in plain if n == "heads" or (n != "calls" and not has_sizes(space, n))]  # other sizes: `_usual_sizes`
    names = [*(n for n in CORE if n in free), *(n for n in free if n not in CORE)]
    others = {n: [cls for cls in space.dimensions[n] if cls != plain[n]] for n in names}
    one = [{**plain, n: cls} for n in names for cls in others[n]]

    def two(some: list[str]) -> list[Row]:
        pairs = itertools.combinations(some, 2)
        return [{**plain, a: x, b: y} for a, b in pairs for x in others[a] for y in others[b]]

    usual = list(itertools.islice(_usual_sizes(space, 3), 9))

    def taken(rows: list[Row], sizes: list[Sizes]) -> Row | None:
        for row in filter(space.affordable, rows):
            for more in sizes:
                case = space.sized(row, {**space.smallest(row), **more})
                if case is not None and takes(case):
                    return row
        return None

    found = taken([plain, *one], [{}])
    if found is None and _base(space, lambda sizes: (case := space.sized(plain, sizes)) is not None and takes(case)):
        return plain
    if found is None:
        found = taken(one, usual)
    options = [n for n in names if n in (*space.triples, "dtype")]
    return found or taken(two(options), [{}]) or taken(two([n for n in options if n in CORE]), usual[1:4:2])


def _usual_sizes(space: Space, count: int) -> Iterator[Sizes]:
    """Usual sizes of each letter that has a dimension of its own; those that follow one have its size."""
    follow = _followers(space)
    dimensions = space.dimensions.values()
    alone = {x for some in dimensions for c in some.values() for y in c if len(y) == 1 for x in y} - dict(follow).keys()
    for numbers in itertools.product(FIRST[:count], repeat=len(alone)):
        sizes = dict(zip(sorted(alone), numbers, strict=True))
        yield sizes | {a: sizes[b] for a, b in follow if b in sizes}


def _followers(space: Space) -> list[tuple[str, str]]:
    """Pairs of letters of which the first has, in the plain row, the size of the second."""
    chosen = [space.dimensions[name][cls][0] for name, cls in space.plain.items()]
    return [(letter, n) for x in chosen for letter, n in x.items() if isinstance(n, str)]


def _base(space: Space, accepts: Callable[[Sizes], bool]) -> Sizes | None:
    """Sizes that are taken: the plain ones, or the first that are found."""
    plain = space.smallest(space.plain)
    if accepts(plain):
        return plain
    letters = len(next(_usual_sizes(space, 1)).keys() - dict(_followers(space)).keys())
    together = [x for some in space.dimensions.values() for c in some.values() for x in c if len(x) > 1 and not refers(x)]
    for more in ({}, *together):
        for numbers in _usual_sizes(space, max(2, int(64 ** (1 / max(letters, 1))))):
            sizes = {**plain, **more, **numbers}
            if accepts(sizes):
                return sizes
    return None


def _condition(letter: str, tried: list[int], taken: list[int]) -> Condition:
    """The simplest condition that holds for the sizes that were taken, and for no other that was tried."""
    step = math.gcd(*taken)
    for text in (f"{letter}%{step}=0", f"{letter}<={max(taken)}", f"{letter}>={min(taken)}"):
        condition = parse(text)
        if [n for n in tried if condition.holds({letter: n})] == taken:
            return condition
    low, high = min(taken), max(taken)
    within = [n for n in tried if n % step == 0 and low <= n <= high]
    if len(taken) > 3 and within == taken:
        text = f"{letter}%{step}=0" * (step > 1)
        bounds = [f"{letter}>={low}"] * (low > step) + [f"{letter}<={high}"] * (high < max(tried))
        return Condition(" and ".join([text] * (step > 1) + bounds), (letter,),
                         lambda sizes: sizes[letter] % step == 0 and low <= sizes[letter] <= high)  # fmt: skip
    return parse(f"{letter}={','.join(map(str, taken))}")


__all__ = ["Condition", "found", "near", "parse", "restricted"]
