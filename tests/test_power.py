"""What is kept of the judge's power is what is computed; and a kept result refuses what a computed one refuses."""

from __future__ import annotations

import math

import pytest
from helpers import first

from npattn import attention
from npattn.verify import CASES, PRECISIONS, Candidate, Settings, verify
from npattn.verify import power as kept
from npattn.verify.judge import as_given
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.power import SEEDS, blind_spots, calls, digest, reaches


def fields(problem, given, precision):
    return digest(problem, given, "top_left", precision, [])


def test_all_calls_that_ship_are_kept():
    found = [fields(*call) for call in calls()]
    assert len(found) > len(CASES) * len(SEEDS)
    assert set(kept._kept()) <= set(found)
    assert {fields(*call) for call in SOME} <= set(kept._kept())


def near(a, b):
    """Two digits: another BLAS rounds the truth in another way."""
    return all(x == y or math.isclose(x, y, rel_tol=0.02) for x, y in zip(a, b, strict=True))


def assert_kept(call):
    """But for what is on the edge: a mistake whose largest error is about 1 sigma, or about the limit."""
    computed, there = reaches(*call), kept._kept()[fields(*call)]
    for name in {*computed, *there}:
        reach = computed.get(name, {}), there.get(name, {})
        edge = any(0.9 < most < 1.1 or 14 < most < 18 or 2.7 < rms < 3.3 for r in reach for most, rms in r.values())
        assert edge or {*reach[0]} == {*reach[1]}, name
        assert all(near(reach[0][t], reach[1][t]) for t in reach[0].keys() & reach[1].keys()), name


SOME = [call for i, call in enumerate(calls([0])) if i % 12 == 0 and math.prod(call[0].shape) < 20_000]


@pytest.mark.parametrize("number", first(8, range(len(SOME))))
def test_some_of_what_is_kept_is_what_is_computed(number):
    assert_kept(SOME[number])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_all_that_is_kept_of_the_default_seed_is_what_is_computed(part):
    for call in list(calls([0]))[part::4]:
        if reaches(*call) is not None:
            assert_kept(call)


@pytest.mark.parametrize(
    "name", first(4, ["plain", "dlse", "key_lengths", "float64", "softcap 30", "bias BHLS", "sink", "inputs tiny"])
)
@pytest.mark.parametrize("level", first(1, ["good", "tight"]))
def test_kept_or_computed_the_same_is_blind(name, level, monkeypatch):
    case = BY_NAME[name]
    problem, precision = as_given(case, 0, Settings(level))
    given, _ = Candidate("mine", attention).arguments(problem, attention)
    truth = problem.truth(precision)
    for tested in (["out"], ["out", "lse"], ["lse"], ["dq", "dk"], list(truth.values)):
        tested = [t for t in tested if t in truth.values]
        ask = (problem, given, "top_left", truth, tested, level, precision, [])
        there = blind_spots(*ask)
        with monkeypatch.context() as m:
            m.setattr(kept, "_kept", dict)
            assert blind_spots(*ask) == there


def test_a_case_that_does_not_ship_is_computed():
    """Other numbers, another precision: the digest is another one, and the power is there all the same."""
    problem, given, precision = next(iter(calls()))
    assert fields(problem, given, precision) in kept._kept()
    assert fields(problem, given, PRECISIONS["bfloat16-M2"]) not in kept._kept()
    other = BY_NAME["plain"].problem(17)
    assert fields(other, given, precision) not in kept._kept()
    report = verify("blockwise", cases=[BY_NAME["S = 1"]], seeds=[17])
    assert {c.tensor for r in report.results for c in r.checks if c.status == "no power"} == {"dq", "dk"}
