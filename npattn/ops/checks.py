"""Checks of shapes, dtypes and numbers at the public edge, and the messages they give.

Every message names the operation, the argument, what it got, what it expected, and what fixes that:
``attention: k has shape (2, 3, 5, 16), expected (B=2, G, S, D=8): D is fixed by q``.
TypeError is for a wrong dtype or class, ValueError for a wrong shape or value.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

_COMPUTED_AS_THEY_ARE = tuple(map(np.dtype, (np.float32, np.float64, np.longdouble, np.complex128, np.clongdouble)))
FAR = 1 << 61  # integers stay below this, so that differences of two fit into int64
_DTYPES = "float16, bfloat16, float32, float64, longdouble, complex128 or clongdouble"


def kind(x: object) -> str:
    """What x is, in the words of an error message."""
    if type(x) is np.ndarray:
        return f"an array of dtype {x.dtype}"
    module, name = type(x).__module__, type(x).__qualname__
    name = name if module == "builtins" else f"{module}.{name}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


MASKED = np.ma.MaskedArray  # NumPy imports np.ma at its first use, which is here: a fork during that would hang the child


def conversion_hint(name: str, x: object, dtype: str = "np.float32") -> str:
    """How to make an array of x, as the end of an error message; "" if that is not known."""
    library = type(x).__module__.partition(".")[0]
    if isinstance(x, MASKED):
        way = f"{name}.filled(value), and what it masks belongs into mask="
    elif isinstance(x, (list, tuple)):
        way = f"np.array({name}, {dtype})"
    elif library == "torch":
        way = f"{name}.detach().cpu(){'.float()' if 'bfloat16' in str(getattr(x, 'dtype', '')) else ''}.numpy()"
    elif library == "tensorflow":
        way = f"{name}.numpy()"
    elif library == "cupy":
        way = f"{name}.get()"
    elif library in ("jax", "jaxlib", "mlx") or hasattr(x, "__array__"):
        way = f"np.asarray({name})"
    else:
        return ""
    return f": {way}"


def check_array(op: str, name: str, x: object, dtype: str = "np.float32") -> Array:
    """Check that x is an array. dtype : that of the array which the message makes of a list"""
    # A masked array would lose its mask and a matrix would change what * means: both are refused, not converted.
    if not isinstance(x, np.ndarray) or isinstance(x, (MASKED, np.matrix)):
        raise TypeError(f"{op}: {name} is {kind(x)}, expected a numpy.ndarray{conversion_hint(name, x, dtype)}")
    return x


def check_flag(op: str, name: str, x: object) -> bool:
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{op}: {name} is {kind(x)}, expected True or False")
    return bool(x)


def as_array(op: str, name: str, x: object, expected: str) -> Array:
    """x as an array, if x may also be a list or number."""
    if isinstance(x, np.ndarray):
        return check_array(op, name, x)
    try:
        return np.asarray(x)
    except ValueError:  # rows of unequal length
        raise ValueError(f"{op}: {name} is {x}, expected {expected}") from None


def check_class(op: str, name: str, x: object, cls: type, source: str = "") -> None:
    if not isinstance(x, cls):
        raise TypeError(f"{op}: {name} is {kind(x)}, expected npattn.{cls.__name__}{source}")


@functools.cache
def computing_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype in which arrays of this dtype are computed; None if npattn does not support it."""
    if dtype == np.float16 or dtype.name == "bfloat16":
        return np.dtype(np.float32)
    return dtype if dtype in _COMPUTED_AS_THEY_ARE else None


def check_dtype(op: str, **arrays: object) -> np.dtype[Any]:
    """Check that all arrays have one dtype. Returns the dtype in which they are computed."""
    (first, x), *others = arrays.items()
    computing = computing_dtype(check_array(op, first, x).dtype)
    if computing is None:
        raise TypeError(f"{op}: {first} has dtype {check_array(op, first, x).dtype}, expected {_DTYPES}")
    for name, y in others:
        if check_array(op, name, y).dtype != check_array(op, first, x).dtype:
            raise TypeError(
                f"{op}: {name} has dtype {check_array(op, name, y).dtype}, expected "
                f"{check_array(op, first, x).dtype}: it is fixed by {first}"
            )
    return computing


def check_other_dtype(op: str, name: str, x: object, dtype: np.dtype[Any], computing: np.dtype[Any]) -> Array:
    """Check that a bias, sink, dropout mask or parameter has the inputs' dtype or their computing dtype. Returns it."""
    x = check_array(op, name, x)
    if x.dtype not in (dtype, computing):
        both = f"{dtype} or {computing}" if dtype != computing else f"{dtype}"
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {both}: it is fixed by the inputs")
    return x


def check_cotangent(
    op: str, name: str, x: object, shape: Shape, dtype: np.dtype[Any], computing: np.dtype[Any]
) -> Array:
    """Check that the gradient of an output has its shape and dtype. Returns it in the computing dtype."""
    array = check_array(op, name, x)
    if array.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {array.dtype}, expected {dtype}: it is fixed by the forward")
    if array.shape != shape:
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {shape}: it is fixed by the forward")
    return array.astype(computing, copy=False)


def check_number(
    op: str, name: str, x: object, computing: np.dtype[Any], *, positive: bool = False, optional: bool = False
) -> Any:
    """Check that x is a finite Python number or NumPy scalar, complex only if the inputs are complex.

    optional : the caller takes None as well, which the messages say
    """
    allowed = numbers.Complex if computing.kind == "c" else numbers.Real
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, allowed):
        raise TypeError(f"{op}: {name} is {kind(x)}, expected a Python float{' or None' * optional}")
    number: Any = x
    real = isinstance(x, numbers.Real)
    try:
        complex(number)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    computed = computing.type(number)  # what is finite as a Python float may not be in float32
    finite = np.isfinite(computed)
    if not finite or (positive and not (real and computed.real > 0)):
        shown = str(x) if len(str(x)) < 50 else f"{str(x)[:20]}..."
        where = f" in {computing}" if math.isfinite(abs(number)) and not finite else ""
        expected = f"a {'positive ' * positive}finite number{where}{f'; {name}=None means none' * (optional and positive)}"
        raise ValueError(f"{op}: {name} is {shown}, expected {expected}")
    # A NumPy float64 scalar would turn float32 arrays into float64 ones; a Python float leaves them alone.
    if isinstance(number, (np.longdouble, np.clongdouble)) and computing.char in "gG":
        return number
    return float(number) if real else complex(number)


def check_from_0(op: str, name: str, x: object, *, most: float = math.inf, below: float = math.inf) -> float:
    """Check that x is a finite number from 0 to ``most``, and less than ``below``."""
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, numbers.Real):
        raise TypeError(f"{op}: {name} is {kind(x)}, expected a Python float")
    number = float(x)
    if not (0 <= number <= most and number < below):  # not so for NaN
        expected = "a finite number of at least 0" if most == math.inf else f"a number from 0 to {most:g}"
        expected = expected if below == math.inf else f"at least 0 and less than {below:g}"
        raise ValueError(f"{op}: {name} is {x}, expected {expected}")
    return number


def check_integer(op: str, name: str, x: object, *, least: int) -> int:
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (int, np.integer)):
        raise TypeError(f"{op}: {name} is {kind(x)}, expected an integer")
    if x < least:
        raise ValueError(f"{op}: {name} is {x}, expected an integer of at least {least}")
    return int(x)


def integers(op: str, name: str, x: object) -> Array:
    """A copy of x as an int64 array, after a check that it holds integers."""
    a = as_array(op, name, x, "integers")
    if a.size == 0 and not isinstance(x, np.ndarray):
        a = a.astype(np.int64)  # an empty list has no dtype of its own
    if a.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} has dtype {a.dtype}, expected integers")
    if a.size and not (int(a.min()) > -FAR and int(a.max()) < FAR):
        raise ValueError(f"{op}: {name} reaches from {a.min()} to {a.max()}, expected values below 2**61 in size")
    return np.array(a, dtype=np.int64)


def check_one_of(op: str, name: str, x: object, choices: Iterable[object], elsewhere: dict[str, str] | None = None) -> None:
    """Check that x is one of the choices. elsewhere : names that another library has for some of them"""
    choices = list(choices)
    if not (x is None or isinstance(x, str)) or x not in choices:
        ours = (elsewhere or {}).get(x) if isinstance(x, str) else None
        here = "" if ours is None else f"; {x!r} is {ours!r} here"
        raise ValueError(f"{op}: {name} is {x!r}, expected one of {', '.join(map(repr, choices))}{here}")


class Dims:
    """The sizes of the letters of the shape legend that the arguments of one call have fixed so far.

    ``dims.fit("k", k, "... G S D")`` checks k against the letters that q has fixed and fixes the new ones.
    ``...`` stands for any number of leading dims.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.source: dict[str, str] = {}
        self.lead: Shape | None = None

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def fix(self, source: str, **sizes: int) -> None:
        self.sizes.update(sizes)
        self.source.update(dict.fromkeys(sizes, source))

    def fit(self, name: str, x: object, spec: str) -> Array:
        array = check_array(self.op, name, x)
        letters = spec.split()
        leading = letters[0] == "..."
        letters = letters[leading:]
        cut = array.ndim - len(letters)
        lead, tail = array.shape[: max(cut, 0)], array.shape[max(cut, 0) :]
        wrong = [a for a, n in zip(letters, tail, strict=False) if self.sizes.get(a, n) != n]
        if leading and self.lead is not None and lead != self.lead:
            wrong.insert(0, "B" if len(self.lead) == 1 else "...")
        if cut < 0 or (cut > 0 and not leading) or wrong:
            raise ValueError(
                f"{self.op}: {name} has shape {array.shape}, expected {self.expected(spec)}{self._because(wrong)}"
            )
        if leading and self.lead is None:
            self.lead, self.source["..."] = lead, name
            self.source["B"] = name
        self.fix(name, **{a: n for a, n in zip(letters, tail, strict=True) if a not in self.sizes})
        return array

    def expected(self, spec: str) -> str:
        """The shape that spec asks for, with the sizes that are fixed: (B=2, G, S, D=8)."""
        words: list[str] = []
        for letter in spec.split():
            if letter != "...":
                words.append(f"{letter}={self.sizes[letter]}" if letter in self.sizes else letter)
            elif self.lead is None:
                words.append("...")
            elif len(self.lead) == 1:
                words.append(f"B={self.lead[0]}")
            else:
                words += map(str, self.lead)
        return f"({', '.join(words)}{',' if len(words) == 1 else ''})"

    def _because(self, wrong: list[str]) -> str:
        sources = {self.source[a] for a in wrong if a in self.source}
        if not sources:
            return ""
        return f": {' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} fixed by {' and '.join(sorted(sources))}"


def pair_letters(shape: Shape) -> str:
    """(B=2, H=3, L=5, S=7), for messages about arrays over pairs."""
    names = {2: "LS", 3: "HLS", 4: "BHLS"}.get(len(shape))
    return "(" + ", ".join(f"{a}={n}" for a, n in zip(names, shape, strict=True)) + ")" if names else str(shape)


def broadcast_pairs(op: str, name: str, x: Array, shape: Shape) -> Array:
    """x over all pairs (..., H, L, S), as a view. Its rank is 2 or full, its axes have their size or 1.

    A rank in between would broadcast onto the wrong axis whenever two sizes coincide, so it is an error.
    """
    fits = all(n in (1, full) for n, full in zip(x.shape[::-1], shape[::-1], strict=False))
    if x.ndim in (min(2, len(shape)), len(shape)) and fits:
        return np.broadcast_to(x, shape)
    forms = pair_letters(shape[-2:]) + (f" or {pair_letters(shape)}" if len(shape) > 2 else "") + " (axes may be 1)"
    hint = ""
    if 2 < x.ndim < len(shape):
        gap, front, tail = len(shape) - x.ndim, x.shape[:-2], x.shape[-2:]
        whole = {name: front + (1,) * gap + tail, f"{name} ": (1,) * gap + front + tail}
        ways = [s for s in whole.values() if all(n in (1, full) for n, full in zip(s, shape, strict=True))]
        hint = "; say which axes are meant: " + " or ".join(f"{name}.reshape{s}" for s in ways) if ways else ""
    elif name == "mask" and x.ndim == 2 and x.shape == (*shape[:-3], shape[-1]):
        hint = "; one row of keys for each sequence is keys(mask)"
    raise ValueError(f"{op}: {name} has shape {x.shape}, expected {forms}{hint}")
