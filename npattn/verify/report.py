"""What was found out about a candidate, as data. The texts for people are made in `text`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import npattn
from npattn.verify import text
from npattn.verify.candidate import RANK_ALONE, Candidate, library_of
from npattn.verify.conditions import CONDITIONS
from npattn.verify.judge import Result
from npattn.verify.ops import OPS
from npattn.verify.request import TENSOR_FEATURES, check_features
from npattn.verify.space import Coverage

LEAST_SHARE = 1 / 3
"""At least this share of the cases that its signature allows has to be tested: of the forward, and of the backward if given.

Built-in candidates reach four fifths or more. Two reach less, because each is for one kind of call: gpt-oss' attention, which
always has a sink, and the fast path of torch's layer. Below a third a candidate supports far less than its signature says.
"""


@dataclass(frozen=True)
class Facts:
    """What is known of a candidate before it is called."""

    candidate: str
    op: str = "attention"
    options: tuple[str, ...] = ()  # the keywords of its forward that verify knows
    unknown_parameters: tuple[str, ...] = ()  # see `Candidate.unknown_parameters`
    library: str = ""  # the tensor library that its module uses
    backward: bool = False  # whether there is one

    @classmethod
    def of(cls, candidate: Candidate) -> Facts:
        options = tuple(sorted(candidate.takes(candidate.forward) & set(candidate.record.calls.keywords)))
        library, backward = library_of(candidate.forward), candidate.backward is not None
        return cls(candidate.name, candidate.op, options, tuple(candidate.unknown_parameters), library, backward)


@dataclass(frozen=True)
class Report:
    """What was found out about one candidate."""

    candidate: str
    results: list[Result]
    op: str = "attention"
    level: str = "good"
    precision: str = ""  # the declared class
    unknown_parameters: tuple[str, ...] = ()  # see `Facts`, also for options, library and backward
    fits: str = ""  # another precision class that the errors fit best; "" if there is none
    rules: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    library: str = ""
    backward: bool = False
    asked: int = 0  # how many results there are after a complete run
    interrupted: bool = False
    coverage: Coverage | None = None  # of the space from which cases were drawn

    def verdict(self, require: Iterable[str] = ()) -> str:
        """The verdict in a few words; the exit status follows from it. require : features that have to be tested"""
        if self.unexpected:
            return "unexpected"
        if self.wrong:
            return "wrong"
        if self.interrupted:
            return "interrupted"
        if not self.tested:
            return "nothing tested"
        if self.too_little:
            return "too little tested"
        return "not tested" if self.untested(require) else "right"

    @property
    def passed(self) -> bool:
        return self.verdict() == "right"

    @property
    def wrong(self) -> list[Result]:
        """Results that are wrong, and not expected to be."""
        return [r for r in self.results if r.status == "wrong" and not r.expected]

    @property
    def unexpected(self) -> list[Result]:
        """Results that were expected to fail, were tested completely, and are right."""
        return [r for r in self.results if r.expected and r.status == "ok" and not r.partly]

    @property
    def unsettled(self) -> list[Result]:
        """Results that were expected to fail and were tested only in part. That part is right; the rest may fail."""
        return [r for r in self.results if r.expected and r.partly and r.status != "wrong"]

    @property
    def tested(self) -> int:
        """How many tensors and conditions have a verdict."""
        return sum(len(r.tested) for r in self.results)

    @property
    def total(self) -> int:
        return sum(len(r.checks) for r in self.results)

    def shares(self) -> dict[str, tuple[int, int]]:
        """For the forward, and the backward if given: how many cases were tested, and how many its signature allows."""
        found = {}
        for side in ("forward", "backward")[: 1 + self.backward]:
            statuses = [
                {c.status for c in r.checks if c.tensor not in CONDITIONS and c.tensor.startswith("d") == (side == "backward")}
                for r in self.results
            ]
            tested = [bool(own & {"ok", "wrong", "no power"}) for own in statuses]
            claimed = [t or bool(own & {"refused", "lost"}) for t, own in zip(tested, statuses, strict=True)]
            found[side] = sum(tested), sum(claimed)
        return found

    @property
    def too_little(self) -> bool:
        """Whether too little was tested, or is right, for a verdict on everything that the signature claims.

        That is so if most cases were refused or lost, or if every tested tensor is expected to fail. A single case is enough if
        no other was asked for.
        """
        if len({r.case for r in self.results}) < 2:
            return False
        if self.coverage is not None and self.coverage.too_little:
            return True
        none_holds = bool(self.tested) and not any(c.status == "ok" for r in self.results for c in r.checks)
        return none_holds or any(tested < LEAST_SHARE * claimed for tested, claimed in self.shares().values())

    @property
    def refused(self) -> dict[str, int]:
        """The messages of refused cases, and how many cases have each; the commonest first."""
        alone = RANK_ALONE.format(OPS[self.op].rank)
        texts = [{c.text for c in r.checks if c.status == "refused"} for r in self.results]
        first = next((text for some in texts for text in sorted(some) if text.startswith(alone)), "")
        messages = Counter(text for some in texts for text in {first if text.startswith(alone) else text for text in some})
        return dict(messages.most_common())

    @property
    def unused(self) -> list[str]:
        """Options in the signature that no tested case has given."""
        given = {name for r in self.results if r.tested for name in r.options}
        return [name for name in self.options if name not in given]

    @property
    def diagnosis(self) -> dict[str, list[str]]:
        """The explanations that were found, each with its cases; the commonest first."""
        found: dict[str, list[str]] = {}
        for r in self.results:
            for e in r.explanations:
                cases = found.setdefault(" and ".join(e.names) + (f" {e.where}" if e.where == "in the backward" else ""), [])
                if r.case not in cases:
                    cases.append(r.case)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def features(self) -> dict[str, list[Result]]:
        """The results by feature. For a feature of tensors (TENSOR_FEATURES) a result has the checks of these tensors alone."""
        found: dict[str, list[Result]] = {}
        for r in self.results:
            for feature in r.features:
                found.setdefault(feature, []).append(r)
            for feature, has in TENSOR_FEATURES.items():
                own = [c for c in r.checks if has(c.tensor)]
                if own:
                    found.setdefault(feature, []).append(Result(r.case, [feature], own))
        return found

    def untested(self, features: Iterable[str]) -> list[str]:
        """Those of the features for which nothing was tested."""
        found = self.features()
        return [f for f in features if not any(r.tested for r in found.get(f, []))]

    def lines(self) -> list[str]:
        """One line for each thing that is wrong."""
        return text.lines(self)

    def hints(self) -> list[str]:
        """What to do about a candidate that cannot be called as verify calls it."""
        return text.hints(self)

    def require(self, features: Iterable[str] = ()) -> Report:
        """This report. Raises AssertionError with what is wrong, what explains it, and what was not tested."""
        __tracebackhide__ = True
        features = list(features)
        check_features("require", features, self.op, self.features())
        if failure := text.failure(self, features):
            raise AssertionError(failure)
        return self

    def as_json(self) -> dict[str, Any]:
        """The report in plain values for JSON; numbers that are not finite become null."""

        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: plain(y) for name, y in x.items() if name != "rounds"}  # that is for `fits`
            if isinstance(x, (list, tuple)):
                return [plain(y) for y in x]
            return None if isinstance(x, float) and not math.isfinite(x) else x

        results = [{**plain(asdict(r)), "status": r.status} for r in self.results]
        return {
            "npattn": npattn.__version__, "passed": self.passed, "candidate": self.candidate, "op": self.op,
            "level": self.level, "precision": self.precision, "fits": self.fits,
            "tested": self.tested, "total": self.total, "asked": self.asked, "interrupted": self.interrupted,
            "too_little": self.too_little, "refused": self.refused, "unused": self.unused,
            "diagnosis": self.diagnosis,
            "space": None if self.coverage is None else self.coverage._asdict(), "results": results,
        }  # fmt: skip


__all__ = ["LEAST_SHARE", "Facts", "Report"]
