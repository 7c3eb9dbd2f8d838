"""Exact conditions that need no tolerance: the same call gives the same bits, and nothing reaches what it must not reach.

Each condition is a `Check` with a name of its own, beside those of the tensors of a case. Only a few small cases are examined
for them: `Op.conditioned`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from npattn.ops.checks import Array
from npattn.verify.candidate import Candidate, call_backward, call_forward, is_array
from npattn.verify.judge import Check, Settings, as_given
from npattn.verify.op import Problem, Truth, better_dtype
from npattn.verify.precision import Precision, of_dtype
from npattn.verify.rounding import accepts, units
from npattn.verify.space import Drawn

CONDITIONS = ("repeat", "other calls", "threads", "strides", "batch size", "masked places", "hull")


def examine_conditions(candidate: Candidate, case: Any, seed: int, settings: Settings) -> list[Check]:
    """The conditions of a case: all for one of `Op.conditioned`, those of its row for one that was drawn, none for others.

    None, too, if the candidate supports or returns nothing.
    """
    names = case.conditions if isinstance(case, Drawn) else CONDITIONS if case.name in candidate.record.conditioned else ()
    if not names:
        return []
    problem, precision = as_given(case, seed, settings)
    try:
        values = _call(candidate, problem)
    except CallError as error:
        return [Check("repeat", "wrong", f"{error}, when it is called again", worst=math.inf)]
    if problem.dtype == np.float64 and better_dtype(np.float64) is None:
        return []
    out, right = values.get("out"), problem.cotangents.get("dout")  # in the first call it was right
    dtypes = [np.dtype(d) for d in problem.dtypes("out", precision)]
    if right is not None and (out is None or out.shape != right.shape or out.dtype not in dtypes):
        return [Check("repeat", "wrong", "out is not returned as before, when it is called again", worst=math.inf)]
    truth = functools.cache(lambda: _truth(candidate, problem, precision))
    return list(conditions(candidate, problem, truth, values, settings.level, precision, names))


def conditions(
    candidate: Candidate, problem: Problem, truth: Callable[[], Truth], values: dict[str, Any], level: str,
    precision: Precision | None = None, names: tuple[str, ...] = CONDITIONS,
) -> Iterator[Check]:  # fmt: skip
    """The conditions of one case; ``values`` is what the candidate returned first. ``truth`` is called where it is needed."""
    precision = precision or of_dtype(problem.dtype)
    level = "good" if level == "bounded" else level  # what is judged here is judged by sigma, and "bounded" needs det
    first = {n: x for n, x in values.items() if is_array(x)}
    if not first:
        return
    saved = {n: x.copy() for n, x in first.items()}
    again = "other numbers in keys, values and queries that are masked"
    relatives = problem.op.relatives
    hidden = relatives.hidden(problem) if "masked places" in names else None
    alone = relatives.first_sequence(problem) if "batch size" in names else None
    contained = candidate.convention.dead_out == "zero" and candidate.convention.dead_grad == "zero"
    tests: list[tuple[str, Any, Callable[[], Check]]] = [
        ("repeat", True, lambda: _compare_bits("repeat", "a second call", saved, _call(candidate, problem))),
        ("other calls", True, lambda: _after_other_calls(candidate, problem, first, saved, precision, level)),
        ("threads", True, lambda: _threads(candidate, problem, saved)),
        ("strides", True, lambda: _strided(candidate, relatives.strided(problem), truth(), level)),
        ("batch size", alone is not None, lambda: _batch(candidate, alone or problem, truth(), level)),
        ("masked places", hidden is not None and contained,
         lambda: _compare_bits("masked places", again, saved, _call(candidate, hidden))),
    ]  # fmt: skip
    for name, there, test in tests:
        try:
            if there and name in names:
                yield test()
        except CallError as error:  # the inputs may have been overwritten: no later condition would mean anything
            yield Check(name, "wrong", f"{error}, in a call for this condition", worst=math.inf)
            return
    text = relatives.outside(problem, truth(), first) if "hull" in names else None
    if text is not None:
        yield Check("hull", "wrong", text, worst=math.inf) if text else Check("hull", "ok", level="tight")


def _truth(candidate: Candidate, problem: Problem, precision: Precision) -> Truth:
    truth = candidate.truth(problem, precision)
    assert truth is not None  # there is a better dtype
    return truth


class CallError(Exception):
    """A call that was right the first time raises now, or writes into its inputs."""


def _call(candidate: Candidate, problem: Any) -> dict[str, Array]:
    forward = call_forward(candidate, problem)
    backward = call_backward(candidate, problem, forward.values) if forward.values else forward
    if broken := [outcome.text for outcome in (forward, backward) if outcome.status == "wrong"]:
        raise CallError(broken[0])
    both = {**forward.values, **backward.values}
    return {n: x for n, x in both.items() if is_array(x)}


def _compare_bits(name: str, what: str, want: dict[str, Array], got: dict[str, Array]) -> Check:
    for tensor, x in want.items():
        y = got.get(tensor)
        if y is None:
            return Check(name, "wrong", f"{tensor} is not returned by {what}", worst=math.inf)
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            text = f"{tensor} is {y.dtype} {y.shape} in {what}, and {x.dtype} {x.shape} before"
            return Check(name, "wrong", text, worst=math.inf)
        if x.tobytes() != y.tobytes():
            differ = (x != y) & ~(np.isnan(x) & np.isnan(y))
            if not differ.any():
                continue  # -0 and 0, or another NaN
            index = tuple(int(i[0]) for i in np.nonzero(differ))
            text = f"{tensor}{list(index)} is {y[index]:.9g} in {what}, and {x[index]:.9g} before"
            return Check(name, "wrong", text, worst=math.inf, index=index)
    return Check(name, "ok", level="tight")


def _after_other_calls(
    candidate: Candidate, problem: Problem, first: dict[str, Array], saved: dict[str, Array], precision: Precision, level: str
) -> Check:
    """Calls with other numbers, another shape or another mask overwrite no earlier result and leave no state behind.

    A backward after them uses its own forward's results. A call with another mask or bias of the same shape uses that one.
    """
    relatives = problem.op.relatives
    for p in (relatives.with_other_numbers(problem), relatives.first_sequence(problem)):
        if p is not None:
            _call(candidate, p)
    masked = relatives.with_another_mask(problem)
    if masked is not None:
        truth = candidate.truth(masked, precision)
        got = _call(candidate, masked)
        if truth is not None:
            what = "for another mask or bias of the same shape: state is kept between calls"
            check = _judged("other calls", what, got, truth.values, truth.sigma, level)
            if check.status == "wrong":
                return check
    for tensor, x in first.items():
        if x.tobytes() != saved[tensor].tobytes():
            return Check("other calls", "wrong", f"{tensor} is overwritten by the next call", worst=math.inf)
    backward = call_backward(candidate, problem, {n: saved[n] for n in problem.outputs if n in saved})
    if backward.status == "wrong":
        raise CallError(backward.text)
    got = {n: x for n, x in backward.values.items() if isinstance(x, np.ndarray)}
    want = {n: x for n, x in saved.items() if n in problem.gradients}
    check = _compare_bits("other calls", "a backward after another forward", want, got)
    if check.status == "wrong":
        return check
    return _compare_bits("other calls", "a call after others", saved, _call(candidate, problem))


def _threads(candidate: Candidate, problem: Problem, want: dict[str, Array]) -> Check:
    """Two problems in two threads at once, each several times: the results are those of calls one after the other."""
    smaller = problem.op.relatives.first_sequence(problem) or problem
    alone = _call(candidate, smaller)
    found, faults = list[Check](), list[BaseException]()

    def work(p: Problem, expected: dict[str, Array]) -> None:
        for _ in range(3):
            try:
                found.append(_compare_bits("threads", "one of two threads", expected, _call(candidate, p)))
            except CallError as error:
                found.append(Check("threads", "wrong", f"{error}, in one of two threads", worst=math.inf))
            except BaseException as error:  # a fault of our own: a thread that ends would count as right
                faults.append(error)

    threads = [threading.Thread(target=work, args=a) for a in ((problem, want), (smaller, alone))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if faults:
        raise faults[0]
    return next((c for c in found if c.status == "wrong"), Check("threads", "ok", level="tight"))


def _judged(name: str, what: str, got: dict[str, Array], want: dict[str, Array], sigma: dict[str, Array], level: str) -> Check:
    for tensor, x in got.items():
        same = tensor in want and x.dtype.kind == "f" and x.shape == want[tensor].shape
        if tensor in want and not (same and accepts(level, units(x, want[tensor], sigma[tensor]))):
            return Check(name, "wrong", f"{tensor} is wrong {what}", worst=math.inf)
    return Check(name, "ok", level="tight")


def _strided(candidate: Candidate, strided: Problem, truth: Truth, level: str) -> Check:
    """The same numbers in views with strides give right results."""
    return _judged("strides", "for strided inputs", _call(candidate, strided), truth.values, truth.sigma, level)


def _batch(candidate: Candidate, alone: Problem, truth: Truth, level: str) -> Check:
    """The first sequence of a batch alone gives the same results as within the batch."""
    batched = {n for n, letters in alone.op.axes.items() if letters[:1] == "B" and n != "dbias"}
    got = {n: x for n, x in _call(candidate, alone).items() if n in batched}
    want = {n: truth.values[n][:1] for n in got if n in truth.values}
    sigma = {n: truth.sigma[n][:1] for n in want}
    return _judged("batch size", "for the first sequence alone", got, want, sigma, level)
