"""What was found out about a candidate, as data. Its texts for people are composed in `text`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import npattn
from npattn.verify import text
from npattn.verify.candidate import Candidate, library_of
from npattn.verify.conditions import CONDITIONS
from npattn.verify.judge import Result
from npattn.verify.request import TENSOR_FEATURES, check_features

LEAST_SHARE = 1 / 3
"""A candidate has to take at least this share of the cases that its signature takes, and so has its backward, if there is one.

Built-in candidates take four fifths or more. Two take less, because each is for one kind of call: gpt-oss' attention, which
always has a sink, and the fast path of torch's layer. What takes less than a third is narrower than its signature says.
"""


@dataclass(frozen=True)
class Facts:
    """What is known of a candidate before it is called."""

    candidate: str
    op: str = "attention"
    options: tuple[str, ...] = ()  # the keywords of its forward that verify gives values to
    strangers: tuple[str, ...] = ()  # see `Candidate.strangers`
    library: str = ""  # the library of tensors that its module uses
    backward: bool = False  # whether there is one

    @classmethod
    def of(cls, candidate: Candidate) -> Facts:
        options = tuple(sorted(candidate.takes(candidate.forward) & set(candidate.record.calls.keywords)))
        library, backward = library_of(candidate.forward), candidate.backward is not None
        return cls(candidate.name, candidate.op, options, tuple(candidate.strangers), library, backward)


@dataclass(frozen=True)
class Report:
    """What was found out about one candidate."""

    candidate: str
    results: list[Result]
    op: str = "attention"
    level: str = "good"
    precision: str = ""  # the declared class
    strangers: tuple[str, ...] = ()  # see `Facts`, also for options, library and backward
    fits: str = ""  # the class that the errors fit best, where it is another
    rules: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    library: str = ""
    backward: bool = False
    asked: int = 0  # how many results there would have been
    interrupted: bool = False

    def verdict(self, require: Iterable[str] = ()) -> str:
        """In one word or two; the command's exit status follows from it. ``require`` are features that have to be tested."""
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
        """What is wrong, and not expected to be."""
        return [r for r in self.results if r.status == "wrong" and not r.expected]

    @property
    def unexpected(self) -> list[Result]:
        """What was expected to fail, was tested completely, and holds."""
        return [r for r in self.results if r.expected and r.status == "ok" and not r.partly]

    @property
    def unsettled(self) -> list[Result]:
        """What was expected to fail and was tested in part, where that part holds. The rest may fail."""
        return [r for r in self.results if r.expected and r.partly and r.status != "wrong"]

    @property
    def tested(self) -> int:
        """How many tensors and conditions have a verdict."""
        return sum(len(r.tested) for r in self.results)

    @property
    def total(self) -> int:
        return sum(len(r.checks) for r in self.results)

    def shares(self) -> dict[str, tuple[int, int]]:
        """How many cases were tested, and how many the signature takes: by the forward and, if there is one, the backward."""
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
        """Whether so little was tested, or holds, that the verdict would be one on less than the signature claims.

        That is so where most was refused or lost, or where all that was tested is expected to fail. One case alone is enough
        where no other was asked for.
        """
        if len({r.case for r in self.results}) < 2:
            return False
        none_holds = bool(self.tested) and not any(c.status == "ok" for r in self.results for c in r.checks)
        return none_holds or any(tested < LEAST_SHARE * claimed for tested, claimed in self.shares().values())

    @property
    def refused(self) -> dict[str, int]:
        """What was said when a case was refused, and how often; the commonest first."""
        said = Counter(text for r in self.results for text in {c.text for c in r.checks if c.status == "refused"})
        return dict(said.most_common())

    @property
    def unused(self) -> list[str]:
        """Options in the signature that were given in no case that was tested."""
        given = {name for r in self.results if r.tested for name in r.options}
        return [name for name in self.options if name not in given]

    @property
    def diagnosis(self) -> dict[str, list[str]]:
        """What was recognised, and the cases in which it was; the commonest first."""
        found: dict[str, list[str]] = {}
        for r in self.results:
            for e in r.explanations:
                cases = found.setdefault(" and ".join(e.names) + (f" {e.where}" if e.where == "in the backward" else ""), [])
                if r.case not in cases:
                    cases.append(r.case)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def features(self) -> dict[str, list[Result]]:
        """The results by feature. Of a feature of tensors, a result has the checks of those tensors alone."""
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
        """What is wrong, a line each."""
        return text.lines(self)

    def hints(self) -> list[str]:
        """What to do about a candidate that cannot be called as verify calls it."""
        return text.hints(self)

    def require(self, features: Iterable[str] = ()) -> Report:
        """Itself, or AssertionError with what is wrong, what it is taken to be, and what was not tested."""
        __tracebackhide__ = True
        features = list(features)
        check_features("require", features, self.op, self.features())
        if failure := text.failure(self, features):
            raise AssertionError(failure)
        return self

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is null."""

        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: plain(y) for name, y in x.items()}
            if isinstance(x, (list, tuple)):
                return [plain(y) for y in x]
            return None if isinstance(x, float) and not math.isfinite(x) else x

        results = [{**plain(asdict(r)), "status": r.status} for r in self.results]
        return {
            "npattn": npattn.__version__, "passed": self.passed, "candidate": self.candidate, "op": self.op,
            "level": self.level, "precision": self.precision, "fits": self.fits,
            "tested": self.tested, "total": self.total, "asked": self.asked, "interrupted": self.interrupted,
            "too_little": self.too_little, "refused": self.refused, "unused": self.unused,
            "diagnosis": self.diagnosis, "results": results,
        }  # fmt: skip


__all__ = ["LEAST_SHARE", "Facts", "Report"]
