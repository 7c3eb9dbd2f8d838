"""The implementations are right without a bug; of the bugs all are caught, and most are named."""

import pytest

from npattn.verify import check

from .bugs import BUGS
from .runner import made, measure_all


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", BUGS, ids=lambda make: make.__name__)
def test_without_a_bug_all_cases_hold(make, every):
    candidate, cases = made(make)
    check(candidate, cases=cases[::every] if cases and every > 1 else None, diagnose=False)


@pytest.mark.slow
def test_every_bug_is_caught_and_most_are_named():
    verdicts = {bug: verdict for bug, _, verdict, *_ in measure_all()}
    assert "MISSED" not in verdicts.values()
    assert list(verdicts.values()).count("named") >= len(verdicts) / 2
