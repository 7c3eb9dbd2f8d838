"""What is asked of verify. Every name is checked before anything runs: a misspelt one would match nothing and never fail."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from npattn.verify.candidate import CandidateError
from npattn.verify.conditions import CONDITIONS
from npattn.verify.ops import OPS
from npattn.verify.precision import PRECISIONS
from npattn.verify.rounding import LEVELS
from npattn.verify.rules import RULES

CASES_OF: dict[str, list[Any]] = {name: op.cases for name, op in OPS.items()}

TENSOR_FEATURES: dict[str, Callable[[str], bool]] = {
    "lse": lambda tensor: tensor == "lse",
    "backward": lambda tensor: tensor.startswith("d"),
    "dbias": lambda tensor: tensor == "dbias",
    "dsink": lambda tensor: tensor == "dsink",
    "conditions": lambda tensor: tensor in CONDITIONS,
}
"""Features that belong to tensors, not to cases."""


def check_names(level: str, precision: str | None, rules: Iterable[str]) -> None:
    _check_name("level", level, (*LEVELS, "bounded"))
    for rule in rules:
        _check_name("rule", rule, RULES)
    if precision is not None:
        _check_name("precision", precision, PRECISIONS)


def check_op(op: str | None) -> None:
    if op is not None:
        _check_name("op", op, OPS)


def _check_name(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise CandidateError(f"{what} {name!r}, expected one of {', '.join(known)}")


def check_cases(op: str, cases: Iterable[Any], seeds: Iterable[int]) -> None:
    """Raises where a case is none of this op, or a seed is negative."""
    for case in cases:
        if case.op != op:
            raise CandidateError(f"case {case.name!r} is of {case.op}, expected a case of {op}")
    for seed in seeds:
        if seed < 0:
            raise CandidateError(f"seed {seed}, expected 0 or more")


def check_supported(op: str, name: str, level: str, rules: Iterable[str]) -> None:
    """Raise if the op has no such level, or no rules."""
    if (level == "bounded" and not OPS[op].bounded) or (list(rules) and OPS[op].eager is None):
        what = "level bounded is" if level == "bounded" else "rules are"
        raise CandidateError(f"{what} for attention, and {name} is {op}")


def check_features(what: str, names: Iterable[str], op: str, more: Iterable[str] = ()) -> None:
    """Raise for a feature that no case of the op has and that is not in ``more``."""
    known = {*(feature for case in CASES_OF[op] for feature in case.features), *more, *TENSOR_FEATURES}
    for name in names:
        if name not in known:
            raise CandidateError(f"{what} {name}: no such feature, expected one of {', '.join(sorted(known))}")


def expected_reasons(failures: Mapping[str, str], cases: Iterable[Any]) -> dict[str, str]:
    """For each case that is expected to fail, by its name, the reason. The keys of ``failures`` may contain *."""
    names = [case.name for case in cases]
    found: dict[str, str] = {}
    for pattern, reason in failures.items():
        hit = [n for n in names if n == pattern] or fnmatch.filter(names, pattern)
        if pattern.startswith("drawn"):  # these cases are not known yet
            hit = [pattern]
        if not hit:
            raise CandidateError(f"expected failure {pattern!r}: no such case; npattn verify --list lists them")
        if not reason.strip():
            raise CandidateError(f"expected failure {pattern!r} has no reason")
        found |= dict.fromkeys(hit, reason)
    return found
