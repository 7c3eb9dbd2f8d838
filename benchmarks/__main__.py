"""``python -m benchmarks [TEXT]``: the long cases of `npattn.verify`, forward and forward + backward, for every rival.

Rivals take turns within a round, so that a drift of the machine's speed hits all alike. What is printed is the median time
of the dense reference, and the median over rounds of each rival's time over that of the dense reference in the same round.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from npattn import attention_backward, attention_forward, environment
from npattn.verify import CASES, Candidate, CandidateError, load
from npattn.verify.candidates import canonical

ROUNDS = 15


def dense() -> Candidate:
    def backward(dout: Any, q: Any, k: Any, v: Any, *, dlse: Any = None, **options: Any) -> Any:
        return attention_backward(dout, attention_forward(q, k, v, **options)[1], dlse)

    return Candidate("dense", lambda q, k, v, **options: attention_forward(q, k, v, **options)[0], backward)


def rivals() -> list[Candidate]:
    found = [dense()]
    for name in ("blockwise", "torch"):
        try:
            found.append(load(name))
        except CandidateError as error:
            print(f"absent: {error}")
    return found


def seconds(candidate: Candidate, problem: Any, backward: bool) -> float | None:
    """One call; None where the candidate does not support the problem."""
    function = candidate.backward if backward else candidate.forward
    given, missing = candidate.arguments(problem, function)
    if missing or (backward and problem.dlse is not None):
        return None
    start = time.perf_counter()
    if backward:
        function(problem.dout, problem.q, problem.k, problem.v, **given)
    else:
        function(problem.q, problem.k, problem.v, **given)
    return time.perf_counter() - start


def main(text: str = "") -> None:
    facts = environment.describe()
    for fact in ("machine", "NumPy", "BLAS", "kernels", "threads"):
        print(f"{fact:10} {facts[fact]}")
    candidates = rivals()
    print(f"\n{'case':44} {'':8} {'dense':>9}" + "".join(f"{c.name + ' / dense':>22}" for c in candidates[1:]))
    for case in CASES:
        if "long" not in case.features or text not in case.name:
            continue
        problem = canonical(case.problem())
        for backward in (False, True):
            rounds = [[seconds(c, problem, backward) for c in candidates] for _ in range(ROUNDS + 1)][1:]
            if rounds[0][0] is None:
                continue
            own = 1e3 * statistics.median(r[0] for r in rounds)
            line = f"{case.name:44} {'backward' if backward else 'forward':8} {own:6.2f} ms"
            for i in range(1, len(candidates)):
                ratios = sorted(r[i] / r[0] for r in rounds if r[i] is not None)
                shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})" if ratios else "not supported"
                line += f"{shown:>22}"
            print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
