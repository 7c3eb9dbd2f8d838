"""Exact conditions: each is broken by a candidate that breaks nothing else, and holds for honest ones."""

from __future__ import annotations

import functools
import threading
import time

import numpy as np
import pytest

from npattn.verify import PRECISIONS, Candidate, Settings, examine, load, verify
from npattn.verify.conditions import CONDITIONS, examine_conditions
from npattn.verify.ops import OPS
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.rounded import rounded
from npattn.verify.selftest import from_equations

honest, honest_grads = rounded(PRECISIONS["float32"])


def conditions(candidate, case="plain", **settings):
    """What is said of each condition that is wrong, and the names of all that were made."""
    checks = examine_conditions(candidate, BY_NAME[case], 0, Settings(**settings))
    return {c.tensor: c.text for c in checks if c.status == "wrong"}, {c.tensor for c in checks}


def is_judged_right(candidate, case="plain"):
    """Whether a single call shows nothing."""
    return {c.status for c in examine(candidate, BY_NAME[case], 0, Settings(power=False)).checks} <= {
        "ok",
        "not supported",
        "not given",
    }


# --- honest ones ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OPS["attention"].conditioned)
@pytest.mark.parametrize(
    "candidate",
    [from_equations(OPS["attention"]), load("blockwise"), Candidate("dense", honest, honest_grads)],
    ids=["stages", "blockwise", "rounded"],
)  # fmt: skip
def test_honest_ones_hold(candidate, case):
    wrong, made = conditions(candidate, case)
    assert wrong == {}
    assert made >= {"repeat", "other calls", "threads", "strides", "batch size", "hull"}


def test_all_conditions_are_made_somewhere():
    made = set()
    for case in OPS["attention"].conditioned:
        made |= conditions(Candidate("dense", honest, honest_grads), case)[1]
    assert made == set(CONDITIONS)
    assert {"dead rows", "key_lengths", "mask array"} <= set(OPS["attention"].conditioned)


def test_other_cases_have_none():
    assert conditions(Candidate("dense", honest), "everything") == ({}, set())
    assert set(OPS["attention"].conditioned) <= set(BY_NAME)


@pytest.mark.parametrize("name", ["bfloat16-M2", "float16-M1", "tf32"])
def test_honest_ones_of_a_declared_class_hold(name):
    candidate = Candidate(name, *rounded(PRECISIONS[name]))
    for case in ("plain", "mask array", "G < H"):
        assert conditions(candidate, case, precision=PRECISIONS[name])[0] == {}


# --- each broken by one that breaks nothing else ------------------------------------------------------------------------------


def counted(function):
    """The function with the number of its call before its arguments."""
    calls = iter(range(10**6))

    def call(*arguments, **options):
        return function(next(calls), *arguments, **options)

    return call


def another_last_bit():
    """A sum in another order each time: right, but not the same."""

    def forward(n, q, k, v):
        out, lse = honest(q, k, v)
        return (np.nextafter(out, np.float32(np.inf)) if n % 2 else out), lse

    forward = counted(forward)
    return Candidate("unsteady", lambda q, k, v: forward(q, k, v))


def one_buffer():
    """The result of one call lies where that of the next will."""
    kept = {}

    def forward(q, k, v):
        out, lse = honest(q, k, v)
        buffer = kept.setdefault(out.shape, np.empty_like(out))
        buffer[...] = out
        return buffer, lse

    return Candidate("one buffer", forward)


def last_forward():
    """A backward of whatever the last forward was."""
    kept = {}

    def forward(q, k, v):
        kept["qkv"] = q, k, v
        return honest(q, k, v)

    def backward(dout, q, k, v):
        return honest_grads(dout, *kept["qkv"])

    return Candidate("last forward", forward, backward)


def shared_scratch():
    """One scratch array for all threads, and another thread may come in between."""
    scratch = {}

    def forward(q, k, v):
        scratch["q"] = q
        before = threading.get_ident() if threading.active_count() > 1 else None
        if before is not None:
            time.sleep(0.02)
        return honest(scratch["q"], k, v) if scratch["q"].shape == q.shape else honest(q * np.float32(0), k, v)

    return Candidate("scratch", forward)


def contiguous(x):
    """What lies in memory, read as if it were contiguous."""
    owner = x
    while owner.base is not None and isinstance(owner.base, np.ndarray):
        owner = owner.base
    return np.resize(owner.ravel(order="K"), x.shape)


def no_strides():
    return Candidate("no strides", lambda q, k, v: honest(*map(contiguous, (q, k, v))))


def two_sequences_alone():
    """An index that is right for two sequences and not for one."""

    def forward(q, k, v):
        out, lse = honest(q, k, v)
        return (out if len(q) != 1 else out[:, ::-1].copy()), lse

    return Candidate("two sequences", forward)


def looks_behind_the_mask():
    """A shift by what is masked: the same to the last bits but one, as long as that is not large."""

    def forward(q, k, v, *, mask=None, key_lengths=None):
        if key_lengths is not None:
            mask = (np.arange(k.shape[-2]) < key_lengths[:, None])[:, None, None]
        shift = np.float32(1e-7) * np.abs(k).max() * (0 if mask is None else 1)
        out, lse = honest(q, k, v, mask=mask)
        return out * (1 + shift), lse

    return Candidate("looks", forward)


def mask_by_shape():
    """The first mask of a shape is kept for all that follow."""
    kept = {}

    def forward(q, k, v, *, mask=None):
        return honest(q, k, v, mask=None if mask is None else kept.setdefault(mask.shape, mask))

    return Candidate("kept", forward)


def bias_by_shape():
    kept = {}

    def forward(q, k, v, *, bias=None):
        return honest(q, k, v, bias=None if bias is None else kept.setdefault(bias.shape, bias))

    return Candidate("kept", forward)


KEPT = "out is wrong for another mask or bias of the same shape: state is kept between calls"


@pytest.mark.parametrize(("make", "case"), [(mask_by_shape, "mask array"), (mask_by_shape, "key_lengths"),
                                            (bias_by_shape, "bias BHLS")])  # fmt: skip
def test_a_mask_that_is_kept_by_its_shape_is_caught(make, case):
    assert is_judged_right(make(), case)
    assert conditions(make(), case)[0]["other calls"] == KEPT


BREAKS = {
    "repeat": (another_last_bit, "plain", "a second call"),
    "other calls": (one_buffer, "plain", "out is overwritten by the next call"),
    "strides": (no_strides, "plain", "out is wrong for strided inputs"),
    "batch size": (two_sequences_alone, "plain", "out is wrong for the first sequence alone"),
    "masked places": (looks_behind_the_mask, "key_lengths", "other numbers in keys, values and queries that are masked"),
}  # fmt: skip
"""By condition: what breaks it, the case, and what is said."""


@pytest.mark.parametrize("name", BREAKS)
def test_what_breaks_one_condition_is_caught_by_it(name):
    make, case, text = BREAKS[name]
    assert is_judged_right(make(), case), "a single call has to be right"
    wrong, _ = conditions(make(), case)
    assert text in wrong[name]
    others = {"repeat": {"other calls", "threads"}, "masked places": set()}.get(name, {"threads"})
    assert set(wrong) - {name} <= others


def test_a_backward_of_another_forward_is_caught():
    assert is_judged_right(last_forward())
    wrong, _ = conditions(last_forward())
    assert "in a backward after another forward" in wrong["other calls"]


def test_threads_that_share_a_scratch_array_are_caught():
    """Where this fails the scheduler has not once run the other thread in 20 ms."""
    assert is_judged_right(shared_scratch())
    wrong, _ = conditions(shared_scratch())
    assert set(wrong) == {"threads"}
    assert "one of two threads" in wrong["threads"]


def test_an_exception_in_a_thread_is_caught():
    entered = threading.Lock()

    def forward(q, k, v):
        if not entered.acquire(blocking=False):
            raise RuntimeError("not twice at once")
        try:
            time.sleep(0.02 if threading.active_count() > 1 else 0)
            return honest(q, k, v)
        finally:
            entered.release()

    wrong, _ = conditions(Candidate("once", forward))
    assert set(wrong) == {"threads"}


def test_an_output_outside_its_values_is_caught():
    """The hull has no tolerance but det: an error of 1e-3 in a mean of equal values is seen, whatever sigma allows."""
    case = BY_NAME["inputs constant V"]
    problem = case.problem()
    from npattn.verify.conditions import conditions as all_of
    from npattn.verify.precision import of_dtype

    for factor, status in ((1.0, "ok"), (1 + 1e-4, "wrong"), (1 - 1e-4, "wrong")):
        candidate = Candidate("mine", lambda q, k, v, f=factor: (honest(q, k, v)[0] * np.float32(f), honest(q, k, v)[1]))
        out, lse = candidate.forward(problem.q, problem.k, problem.v)
        truth = problem.truth(of_dtype(problem.dtype))
        given = functools.partial(lambda x: x, truth), {"out": out, "lse": lse}
        found = {c.tensor: c for c in all_of(candidate, problem, *given, "good")}
        assert found["hull"].status == status, factor
    assert "outside the values that it may see" in found["hull"].text


def test_the_hull_counts_what_a_query_may_see():
    """0 is one of the values where there is a sink, and only there; masked values are none."""
    from npattn.verify.precision import of_dtype

    outside = OPS["attention"].relatives.outside
    for case, inside in (("sink", True), ("plain", False)):
        problem = BY_NAME[case].problem()
        problem.inputs["v"] = np.abs(problem.v) + np.float32(1)
        truth = problem.truth(of_dtype(problem.dtype))
        zeros = np.zeros((*problem.q.shape[:-1], problem.v.shape[-1]), np.float32)
        assert (outside(problem, truth, {"out": zeros}) == "") == inside
    problem = BY_NAME["causal top_left"].problem()
    truth = problem.truth(of_dtype(problem.dtype))
    assert outside(problem, truth, {"out": truth.values["out"].astype(np.float32)}) == ""
    everyone = np.broadcast_to(problem.v.mean(-2, keepdims=True), truth.values["out"].shape)
    assert "[0, 0, 0, " in outside(problem, truth, {"out": everyone}), "row 0 sees key 0 alone"


def test_verify_makes_them_and_counts_them():
    report = verify(another_last_bit(), cases=[BY_NAME["plain"]])
    assert [r.case for r in report.wrong] == ["plain"]
    assert {c.tensor for c in report.results[0].checks if c.status == "wrong"} >= {"repeat"}
    assert report.lines()[0].startswith("plain: repeat: out[")
    assert report.features()["conditions"][0].status == "wrong"
    assert report.untested(["conditions"]) == []
    assert verify(honest, cases=[BY_NAME["everything"]]).untested(["conditions"]) == ["conditions"]


def test_inputs_that_are_modified_are_caught_before():
    def forward(q, k, v):
        out = honest(q, k, v)
        v *= 2
        return out

    result = examine(Candidate("modifies", forward), BY_NAME["plain"])
    assert "an input was modified" in result.checks[0].text
