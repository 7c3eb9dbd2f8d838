"""Findings: plain code of a library, run as it stands, with what it printed when the finding was written down."""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
import warnings
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    title: str
    code: str
    prints: str  # a pattern of what it printed when it was found
    kind: str = "defect"  # or "edge": what no specification settles


@dataclass(frozen=True)
class Shown:
    """A finding, and what it printed now."""

    finding: Finding
    printed: str

    @property
    def holds(self) -> bool:
        return re.fullmatch(self.finding.prints, self.printed, re.DOTALL) is not None


def show(finding: Finding, prelude: str) -> Shown:
    """Run the code of a finding."""
    names: dict[str, Any] = {}
    text = io.StringIO()
    with contextlib.redirect_stdout(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(textwrap.dedent(prelude), names)
        try:
            exec(textwrap.dedent(finding.code), names)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            print(f"{type(error).__name__}: {textwrap.shorten(first, 100, placeholder=' ...')}")
    return Shown(finding, text.getvalue().strip())
