"""The decorator for pytest: a test for each case."""

import re
import textwrap

import pytest
from theirs import right

from npattn.verify import CASES, CASES_OF, CandidateError, load, parametrize

pytest_plugins = ["pytester"]

THEIRS = '''
    import pytest

    import npattn.verify
    from npattn import attention_forward
    from npattn.verify import CASES

    def mine(q, k, v, *, mask=None, softcap=None, scale=None):
        """Ignores softcap and scale."""
        if q.shape[1] != k.shape[1]:
            raise NotImplementedError("grouped heads")
        return attention_forward(q, k, v, mask=mask)[0]

    NAMES = ("plain", "mask array", "sink", "softcap", "softcap 30", "bias H", "G < H", "scale 0.6")
    few = [case for case in CASES if case.name in NAMES]
    known = {"softcap*": "issue 12", "mask array": "issue 13", "bias H": "issue 14"}

    @npattn.verify.parametrize(mine, cases=few, expected_failures=known)
    def test_mine(report):
        """What it says."""
        assert report.results[0].case != "scale 0.6", "not reached"

    @npattn.verify.parametrize(mine, cases=few[:1])
    def test_without_an_argument():
        print("was here")

    @npattn.verify.parametrize(mine, cases=few[:1], seeds=(0, 1))
    def test_with_an_assertion(report):
        assert report.passed
        assert [r.seed for r in report.results] == [0, 1]
        assert report.level == "tight", "it was good enough"

    @npattn.verify.parametrize(mine, cases=few[:1])
    @pytest.mark.skip(reason="not today")
    def test_with_a_mark(report):
        pass
'''


@pytest.fixture
def theirs(pytester):
    """The outcome and the text of each test, by its id."""
    pytester.makepyfile(test_theirs=textwrap.dedent(THEIRS))
    done = pytester.inline_run("-p", "no:cacheprovider")
    found = {}
    for r in done.getreports("pytest_runtest_logreport"):
        if r.when == "call" or not r.passed:
            reason = r.longrepr[2] if isinstance(r.longrepr, tuple) else r.longreprtext
            xfail = getattr(r, "wasxfail", None)
            name = r.nodeid.removeprefix("test_theirs.py::")
            found[name] = ("xfailed", xfail) if xfail else (r.outcome, reason + r.capstdout)
    return found


def test_each_case_is_a_test_and_the_test_itself_runs_where_the_case_holds(theirs):
    mine = {name: theirs[f"test_mine[{name}]"] for name in
            ("plain", "mask array", "sink", "softcap", "softcap 30", "bias H", "G < H", "scale 0.6")}  # fmt: skip
    assert len([name for name in theirs if name.startswith("test_mine")]) == len(mine)
    assert mine["plain"] == ("passed", "")
    assert mine["softcap"] == mine["softcap 30"] == ("xfailed", "issue 12")
    assert mine["sink"] == ("skipped", "Skipped: not supported: sink")
    assert mine["G < H"] == ("skipped", "Skipped: refused: grouped heads")
    assert mine["bias H"] == ("skipped", "Skipped: not supported: bias")  # not supported, which no list has to say
    assert mine["mask array"] == ("failed", "mask array: was expected to fail (issue 13), and holds")
    outcome, text = mine["scale 0.6"]
    assert outcome == "failed"
    assert "AssertionError: mine falls short in 1 case:\n" in text
    assert re.search(r"\nE +it looks like: .*scale.* \(1 cases\)\nE +scale 0.6: out: out\[.* off by ", text)
    assert "not reached" not in text
    assert theirs["test_without_an_argument[plain]"] == ("passed", "was here\n")
    outcome, text = theirs["test_with_an_assertion[plain]"]
    assert outcome == "failed"
    assert "AssertionError: it was good enough" in text
    assert theirs["test_with_a_mark[plain]"] == ("skipped", "Skipped: not today")


def test_its_cases_are_those_of_the_op():
    def test_it(report):
        """Mine."""

    def ids(*arguments, **options):
        made = parametrize(*arguments, **options)(test_it)
        assert (made.__name__, made.__doc__, made.__module__) == ("test_it", "Mine.", __name__)
        (mark,) = made.pytestmark
        return [p.id for p in mark.args[1]]

    def names_of(cases):
        return [case.name for case in cases]

    assert ids(right) == names_of(CASES)
    assert ids(right, op="softmax") == names_of(CASES_OF["softmax"])
    assert ids("rnn") == names_of(CASES_OF["rnn"])
    assert ids(load("multi-head")) == names_of(CASES_OF["multi_head"])
    assert ids("blockwise", cases=iter(CASES[:3])) == names_of(CASES[:3])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"expected_failures": {"softcup": "issue 12"}}, "no such case"),
        ({"expected_failures": {"softcap": ""}}, "has no reason"), ({"op": "conv"}, "op 'conv'"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_known_is_an_error_when_it_decorates(given, text):
    with pytest.raises(CandidateError, match=text):
        parametrize(right, **given)
