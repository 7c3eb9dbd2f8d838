"""What sizes a candidate takes: as it is said by `--sizes`, or as it is found out by calls that it refuses."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from npattn.verify.space import Choice, Drawn, Sizes, Space, refers


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
    dimensions: dict[str, Mapping[str, tuple[Choice, ...]]] = {}
    for name, some in space.dimensions.items():
        kept = {cls: tuple(x for x in choices if _obeys(x, some, conditions)) for cls, choices in some.items()}
        kept = {cls: choices for cls, choices in kept.items() if choices}
        own = {letter for choices in some.values() for x in choices for letter in x}
        if len(kept) < min(2, len(some)) and len(own) == 1 and not any(refers(x) for c in some.values() for x in c):
            kept = _others(next(iter(own)), [c for c in conditions if set(c.letters) == own]) or kept
        if not kept:
            raise ValueError(f"{', '.join(c.text for c in conditions)}: no {name} is left")
        dimensions[name] = kept
    plain = {name: cls if cls in dimensions[name] else next(iter(dimensions[name])) for name, cls in space.plain.items()}
    return space._replace(dimensions=dimensions, plain=plain,
                          allows=lambda sizes: all(c.holds(sizes) for c in conditions))  # fmt: skip


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

    takes : whether it accepts a call. The sizes that are tried are those of the classes and some multiples of 16. If the plain
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
        taken = [n for n in tried if accepts({**base, letter: n, **dict.fromkeys(follow, n)})]
        if equal and set(taken) <= {base[equal]}:
            result.append(parse(f"{letter}={equal}"))
        elif len(taken) < len(tried) and taken:
            result.append(_condition(letter, tried, taken))
    return result


def _followers(space: Space) -> list[tuple[str, str]]:
    """Pairs of letters of which the first has, in the plain row, the size of the second."""
    chosen = [space.dimensions[name][cls][0] for name, cls in space.plain.items()]
    return [(letter, n) for x in chosen for letter, n in x.items() if isinstance(n, str)]


def _base(space: Space, accepts: Callable[[Sizes], bool]) -> Sizes | None:
    """Sizes that are taken: the plain ones, or the first that are found."""
    plain, follow = space.smallest(space.plain), _followers(space)
    if accepts(plain):
        return plain
    alone = [n for n in {x for some in space.dimensions.values() for c in some.values() for y in c if len(y) == 1 for x in y}
             if n not in dict(follow)]  # fmt: skip
    together = [x for some in space.dimensions.values() for c in some.values() for x in c if len(x) > 1 and not refers(x)]
    for more in ({}, *together):
        for numbers in itertools.product(FIRST[: max(2, int(64 ** (1 / max(len(alone), 1))))], repeat=len(alone)):
            sizes = {**plain, **more, **dict(zip(sorted(alone), numbers, strict=True))}
            if accepts({**sizes, **{a: sizes[b] for a, b in follow}}):
                return {**sizes, **{a: sizes[b] for a, b in follow}}
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


__all__ = ["Condition", "found", "parse", "restricted"]
