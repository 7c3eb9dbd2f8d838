"""The options of `npattn verify`: what each may hold, which contradict each other, and what they ask for together."""

from __future__ import annotations

import argparse
import fnmatch
import math
from pathlib import Path
from typing import Any

from npattn.verify import CandidateError, Settings
from npattn.verify.candidate import REFUSALS, op_of
from npattn.verify.conventions import FIELDS, PRESETS, Convention, parse, suggestion
from npattn.verify.limits import parse as parse_size
from npattn.verify.limits import restricted
from npattn.verify.ops import OPS
from npattn.verify.precision import PRECISIONS
from npattn.verify.request import CASES_OF, check_features, check_names, check_supported, expected_reasons
from npattn.verify.rounding import LEVELS
from npattn.verify.rules import RULES
from npattn.verify.space import Space
from npattn.verify.worker import TIMEOUT, Spec

SMALL = {"float16": "float16-M1", "bfloat16": "bfloat16-M1"}
"""The precision class of a dtype that NumPy does not compute in, unless another is given."""

# --- values ---------------------------------------------------------------------------------------------------------------


class _Once(argparse.Action):
    """An option that is given once, or with the same value."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        once = vars(namespace).setdefault("once", {})
        if once.setdefault(self.dest, value) != value:
            parser.error(f"{option} is given twice: {once[self.dest]} and {value}")
        setattr(namespace, self.dest, value)


def some_text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: is a variable of the shell unset?")
    return text


def file(text: str) -> Path:
    return Path(some_text(text))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text}, expected a number of seconds above 0")
    return seconds


def check_writable(path: Path | None, option: str) -> None:
    """Raises for a file that cannot be opened, before the run and not after it. What the file holds stays."""
    if path is not None:
        try:
            new = not path.exists()
            if path.is_fifo():  # whoever reads it may come later
                return
            path.open("ab").close()
            if new:
                path.unlink()  # perhaps there will be nothing to write
        except OSError as error:
            raise CandidateError(f"--{option} {path}: {error.strerror}") from None


# --- the options ----------------------------------------------------------------------------------------------------------


def add_verify(verbs: Any, statuses: dict[int, str]) -> Any:
    """The parser of the verb ``verify``."""
    v = verbs.add_parser(
        "verify",
        help="verify an implementation against the reference",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Verify an implementation against the reference.\n\nexit status:\n"
        + "\n".join(f"  {status:<4} {text}" for status, text in statuses.items()),
    )
    once: Any = {"action": _Once}
    names = "blockwise (default), another of --list-candidates, package.module:function or path/to/file.py:function"
    v.add_argument("candidate", nargs="?", type=some_text, help=names)
    v.add_argument("--backward", metavar="FUNCTION", type=some_text, **once,
                   help="its backward: (dout, q, k, v, *, ...) -> (dq, dk, dv) or a mapping")  # fmt: skip
    v.add_argument("--op", choices=tuple(OPS), **once,
                   help="what it implements (default attention, or that of a built-in name)")  # fmt: skip
    v.add_argument("--level", choices=(*LEVELS, "bounded"), default="good", **once, help="how good it has to be (default good)")
    classes = f"what it computes in: {', '.join(PRECISIONS)}"
    v.add_argument("--precision", choices=tuple(PRECISIONS), metavar="CLASS", **once, help=classes)
    v.add_argument("--convention", metavar="NAMES", type=some_text, default="npattn", **once,
                   help=f"PRESET or field=value,...: {', '.join(PRESETS)} (--list-conventions)")  # fmt: skip
    v.add_argument("--causal", choices=tuple(FIELDS["causal"].values), **once, help="short for --convention causal=...")
    v.add_argument("--rule", choices=tuple(RULES), action="append", default=[], help="also say what this suite's rule says")
    v.add_argument("--expect-failure", metavar="CASE=REASON", action="append", type=some_text, default=[],
                   help="this case is known to fail; it still runs, and is an error once it holds")  # fmt: skip
    v.add_argument("--json", metavar="FILE", type=file, **once, help="write all results there")
    v.add_argument("-v", "--verbose", action="store_true", help="a line for each case, and the table by feature")
    v.add_argument("-k", dest="text", metavar="TEXT", type=some_text, **once,
                   help="only cases with TEXT in their name, or of that feature")  # fmt: skip
    v.add_argument("--case", metavar="NAME", type=some_text, **once, help="this case alone")
    v.add_argument("--seed", type=int, default=0, metavar="N", **once, help="draw the inputs with this seed (default 0)")
    v.add_argument("--timeout", type=_seconds, default=TIMEOUT, metavar="SECONDS", **once,
                   help=f"a call that takes longer hangs (default {TIMEOUT:g})")  # fmt: skip
    v.add_argument("--deep", action="store_true", help="three seeds, random options, every triple of sizes and options")
    v.add_argument("--fuzz", type=_seconds, metavar="SECONDS", **once,
                   help="draw cases of any sizes, options, inputs and layouts for so long, or until one is wrong")  # fmt: skip
    v.add_argument("--sizes", metavar="CONDITION", nargs="+", type=some_text, **once,
                   help="sizes that it takes, such as D=64,128 L%%16=0 S<=512 L=S G=H (else they are found out)")  # fmt: skip
    v.add_argument("--dtype", choices=("float32", "float64", *SMALL), **once, help="the only dtype that it takes")
    v.add_argument("--options", metavar="NAMES", type=some_text, **once,
                   help="the only options that it takes, such as causal,window, or none")  # fmt: skip
    v.add_argument("--refusals", choices=REFUSALS, default=REFUSALS[0], **once,
                   help="the exceptions that say that a call is not supported (default NotImplementedError)")  # fmt: skip
    v.add_argument("--shrink", action="store_true", help="make the first case that is wrong as small as it still fails")
    v.add_argument("--save", metavar="FILE", type=file, **once, help="write that case there, as .npz")
    v.add_argument("-x", dest="stop", action="store_true", help="stop at the first case that is wrong")
    v.add_argument("--require", metavar="FEATURE", action="append", type=some_text, default=[],
                   help="fail if FEATURE was not tested")  # fmt: skip
    v.add_argument("--no-diagnosis", dest="diagnose", action="store_false", help="do not look for what it does instead")
    v.add_argument("--self-test", action="store_true",
                   help="verify verify: seeded bugs are caught and named; all (10 minutes), or of --op")  # fmt: skip
    v.add_argument("--list", action="store_true", help="list the cases and their features, run nothing")
    v.add_argument("--list-candidates", action="store_true", help="list the built-in candidates")
    v.add_argument("--list-conventions", action="store_true", help="list the fields of a convention, their values and presets")
    return v


# --- which go together ----------------------------------------------------------------------------------------------------

ALONE = ("self_test", "list_candidates", "list_conventions")  # what has nothing to do with a candidate
RUNS_NOTHING = (
    "json", "save", "shrink", "stop", "require", "expect_failure", "rule", "diagnose", "backward", "level", "precision",
    "convention", "causal", "timeout", "fuzz", "sizes", "options", "refusals",
)  # fmt: skip
"""What --list would ignore."""
NAMED_CASES = ("case", "text", "deep", "require", "expect_failure", "shrink", "stop")  # --fuzz draws others, and always shrinks
FLAGS = ("deep", "shrink", "stop", *ALONE, "list", "rule", "require", "expect_failure")
NAMED = {"candidate": "a candidate", "text": "-k", "stop": "-x", "diagnose": "--no-diagnosis"}


def check_together(given: argparse.Namespace) -> None:
    """Options that contradict each other, or that would be ignored, are errors."""
    present = {*getattr(given, "once", {}), *(name for name in FLAGS if getattr(given, name))}
    present |= {"candidate"} if given.candidate is not None else set()
    present |= {"diagnose"} if not given.diagnose else set()

    def as_typed(name: str) -> str:
        return NAMED.get(name, f"--{name.replace('_', '-')}")

    pairs = [(alone, other) for alone in ALONE for other in sorted(present) if (alone, other) != ("self_test", "op")]
    pairs += [("list", other) for other in RUNS_NOTHING] + [("case", "text")] + [("fuzz", other) for other in NAMED_CASES]
    pairs += [("sizes", other) for other in ("case", "text")]  # nothing is drawn
    pairs += [("causal", "convention")] if "causal=" in given.convention else []
    for a, b in pairs:
        if a in present and b in present and a != b:
            raise CandidateError(f"{as_typed(a)} and {as_typed(b)} contradict each other: give one of them")
    if given.json is not None and given.save is not None and given.json.resolve() == given.save.resolve():
        raise CandidateError(f"--json and --save name one file, {given.json}: give each its own")
    for option, path in (("--json", given.json), ("--save", given.save)):
        for name in (given.candidate, given.backward):
            if path is not None and name is not None and path.resolve() == Path(name.rpartition(":")[0] or name).resolve():
                raise CandidateError(f"{option} {path}: that is the file of the candidate")
    if given.seed < 0:
        raise CandidateError(f"--seed {given.seed}: expected 0 or more")


# --- what is asked for ----------------------------------------------------------------------------------------------------


def asked(given: argparse.Namespace) -> tuple[Spec, list[Any], dict[str, str], Space | None]:
    """The candidate and how it is judged, the named cases, why some are expected to fail, and the space to draw from."""
    convention = _convention(given)
    check_names(given.level, given.precision, given.rule)
    name = next(iter(OPS[given.op or "attention"].candidates)) if given.candidate is None else given.candidate
    op = op_of(name, given.op)
    check_supported(op, name, given.level, given.rule)
    cases = [] if given.fuzz else _cases(given, op)
    expected = expected_reasons(_failures(given.expect_failure, [case.name for case in cases]), cases)
    if given.dtype is not None and given.precision not in (None, given.dtype) and not given.precision.startswith(given.dtype):
        raise CandidateError(f"--dtype {given.dtype} and --precision {given.precision} contradict each other: give one of them")
    given.precision = given.precision or SMALL.get(given.dtype)  # also for the report
    settings = Settings(given.level, None if given.precision is None else PRECISIONS[given.precision], tuple(given.rule))
    options = None if given.options is None else _options(given.options, op)
    spec = Spec(name, given.backward, convention, op, settings, given.diagnose, options, given.refusals)
    return spec, cases, expected, None if given.text or given.case else _space(given, op)


def _space(given: argparse.Namespace, op: str) -> Space | None:
    space = OPS[op].space
    if space is None:
        if given.fuzz or given.sizes:
            known = ", ".join(name for name, other in OPS.items() if other.space is not None)
            raise CandidateError(f"there is no space of calls of {op} to draw from, only of {known}")
        return None
    try:
        conditions = [parse_size(text) for text in given.sizes or ()]
        space = restricted(space, conditions) if conditions else space
    except ValueError as error:
        raise CandidateError(f"--sizes {error}") from None
    dtype = "float32" if given.dtype in SMALL else given.dtype
    return space if dtype is None else space.only("dtype", dtype)


def _options(text: str, op: str) -> tuple[str, ...]:
    names, known = tuple(n.strip() for n in text.split(",")), OPS[op].calls.keywords
    if names == ("none",):
        return ()
    if unknown := [n for n in names if n not in known]:
        raise CandidateError(f"--options {unknown[0]}, expected some of {', '.join(known)}, or none alone")
    if twice := [n for n in names if names.count(n) > 1]:
        raise CandidateError(f"--options {text}: {twice[0]} is given twice")
    return names


def _convention(given: argparse.Namespace) -> Convention:
    try:
        return parse(given.convention if given.causal is None else f"{given.convention},causal={given.causal}")
    except ValueError as error:
        raise CandidateError(str(error)) from None


def _cases(given: argparse.Namespace, op: str) -> list[Any]:
    text, table = (given.text or "").lower(), list(CASES_OF[op])
    if given.deep:
        table += OPS[op].random_cases(given.seed, 150)
    check_features("--require", given.require, op, [f for case in table for f in case.features])
    if given.case is not None:
        named = [case for case in table if case.name == given.case]
        space = OPS[op].space
        if not named and space is not None and (drawn := space.named(given.case)) is not None:
            named = [drawn]
        if named and given.dtype not in (None, *SMALL, named[0].dtype):
            both = f"--dtype {given.dtype} and a --case of {named[0].dtype}"
            raise CandidateError(f"{both} contradict each other: give one of them")
        if not named:
            meant = suggestion(given.case, [case.name for case in table])
            raise CandidateError(f"--case {given.case}: no such case{meant}; --list lists them")
        return named
    cases = [case for case in table if text in case.name.lower() or text in map(str.lower, case.features)]
    cases = [case for case in cases if given.dtype in (None, *SMALL) or case.dtype == given.dtype]
    if not cases:
        raise CandidateError(f"-k {given.text}: no case has that in its name; --list lists them")
    return cases


def _failures(given: list[str], names: list[str]) -> dict[str, str]:
    """Reasons by the names of CASE=REASON. Either may hold a = itself.

    The first = that stands behind the name of a case divides the two, or else the last one.
    """
    found: dict[str, str] = {}
    for text in given:
        at = [i for i, letter in enumerate(text) if letter == "=" and text[:i].strip()]
        ways = [(text[:i].strip(), text[i + 1 :].strip()) for i in at]
        if not ways:
            raise CandidateError(f"--expect-failure {text}: expected CASE=REASON")
        name, reason = next((way for way in ways if fnmatch.filter(names, way[0])), ways[-1])
        found[name] = reason
    return found
