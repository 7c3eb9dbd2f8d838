"""Checks, results and reports that are made by hand."""

import math

from npattn.verify import Check, Report, Result
from npattn.verify.search import Explanation

OK = Check("out", "ok", "", 0.5, 2.5, (0, 1, 2), "tight")
BAD = Check("out", "wrong", "out[0] is 2", 9.0, 99.0, (0,), "broken")
LSE = Check("lse", "ok", "", 0.4, 1.25, (3,), "tight")
DQ = Check("dq", "wrong", "dq[1] is nan", math.inf, math.inf, (1,))
BLIND = Check("dk", "no power", "zeros would pass")
ABSENT = Check("dv", "not given", "backward not given")
SINK = Check("out", "not supported", "sink")

RESULTS = {
    "right": Result("right", ["plain"], [OK, LSE, BLIND, ABSENT]),
    "bad": Result("bad", ["causal"], [BAD, LSE]),
    "known": Result("known", ["causal", "sink"], [OK, DQ], expected="issue 1"),
    "holds": Result("holds", ["softcap"], [OK], expected="issue 2"),
    "unable": Result("unable", ["sink"], [SINK], expected="issue 3"),
    "blind": Result("blind", ["window"], [BLIND], expected="issue 4"),
}


def reported(*results, **more):
    """A report of results, or of their names in RESULTS."""
    return Report("mine", [RESULTS[r] if isinstance(r, str) else r for r in results], **more)


def explained(case, *explanations):
    return Result(case, ["plain"], [BAD], [Explanation(*e) for e in explanations])
