"""verify() and check(): what is asked, what is run, what is expected to fail."""

import re
from pathlib import Path

import pytest
from theirs import right, uncapped, with_names_of_torch, wrong

from npattn import attention
from npattn.verify import CASES_OF, Candidate, CandidateError, Case, check, verify
from npattn.verify.ops import OPS
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.ops.attention.draw import SMALL

PAGE = (Path(__file__).parents[2] / "docs/verifying.md").read_text()
FEW = [BY_NAME[name] for name in ("plain", "softcap", "mask array", "sink", "softcap + dlse")]
PLAIN = [BY_NAME["plain"]]


def names(results):
    return [r.case for r in results]


def names_of(cases):
    return [case.name for case in cases]


def of_uncapped(**options):
    return verify(uncapped, cases=FEW, diagnose=False, **options)


# --- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"level": "fine"}, "level 'fine', expected one of tight, good, bounded"),
        ({"rules": ["onnx", "jax"]}, "rule 'jax', expected one of flash2x, torch, onnx, allclose"),
        ({"precision": "float12"}, "precision 'float12', expected one of float64, float32, tf32, "),
        ({"convention": "causal=left"}, "causal=left, expected one of top_left, bottom_right"),
        ({"convention": "flash9"}, "flash9"),
        ({"op": "conv"}, "op 'conv', expected one of attention, multi_head, rnn, gru, lstm, softmax"),
        ({"expected_failures": {"softcup": "issue 12"}}, "expected failure 'softcup': no such case"),
        ({"expected_failures": {"softcup*": "issue 12"}}, "expected failure 'softcup*': no such case"),
        ({"expected_failures": {"softcap": ""}}, "expected failure 'softcap' has no reason"),
        ({"expected_failures": {"softcap": " "}}, "expected failure 'softcap' has no reason"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_name_that_is_not_known_is_an_error_before_anything_runs(given, text):
    called = []
    with pytest.raises(CandidateError, match=re.escape(text)):
        verify(lambda q, k, v: called.append(0), cases=FEW, **given)
    assert called == []


@pytest.mark.parametrize(
    ("arguments", "given", "text"),
    [
        (["no_such_name"], {}, "'no_such_name' is no candidate"),
        (["npattn.ops.attention:absent"], {}, "npattn.ops.attention has no absent"),
        (["rnn"], {"op": "attention"}, "rnn is for --op rnn, not attention"),
        (["blockwise", right], {}, "blockwise has a backward of its own"),
        (["rnn"], {"level": "bounded"}, "level bounded is for attention, and rnn is rnn"),
        (["softmax"], {"rules": ["onnx"]}, "rules are for attention, and softmax is softmax"),
        ([Candidate("own", right), right], {}, "own is a Candidate, with a backward"),
        ([Candidate("own", right)], {"convention": "flash2"}, "own is a Candidate, with a backward, a convention"),
        ([Candidate("own", right)], {"op": "rnn"}, "own is a Candidate, with a backward, a convention and an op"),
    ],
)
def test_what_would_be_ignored_is_an_error(arguments, given, text):
    with pytest.raises(CandidateError, match=re.escape(text)):
        verify(*arguments, cases=[], **given)


def test_a_candidate_is_a_function_a_candidate_or_a_name():
    seen = []

    def backward(dout, q, k, v):
        seen.append(1)
        return q, k, v

    assert verify(right, cases=PLAIN).candidate == "right"
    assert verify(Candidate("own", right), cases=PLAIN).candidate == "own"
    assert verify("blockwise", cases=PLAIN).passed
    report = verify("npattn.ops.attention:attention", backward, cases=PLAIN, diagnose=False)
    assert (report.candidate, seen[:1]) == ("npattn.ops.attention:attention", [1])
    assert [c.tensor for c in report.wrong[0].checks if c.status == "wrong"] == ["dq", "dk", "dv"]
    for name, given, op in (("rnn", {}, "rnn"), ("npattn.ops.softmax:softmax", {"op": "softmax"}, "softmax")):
        report = verify(name, cases=CASES_OF[op][:1], **given)
        assert (report.op, report.passed) == (op, True)


# --- what is run ----------------------------------------------------------------------------------------------------------


def test_all_cases_of_the_op_are_run_unless_others_are_given(monkeypatch):
    monkeypatch.setitem(CASES_OF, "attention", FEW)
    assert names(verify(right).results) == names_of(FEW)
    assert names(verify(right, cases=iter(FEW[1:3])).results) == names_of(FEW[1:3])


def test_every_case_runs_with_every_seed_and_each_draws_other_numbers():
    given, told = [], []

    def forward(q, k, v):
        given.append(q.copy())
        return right(q, k, v)

    case = Case("mine", sizes=SMALL)
    report = verify(forward, cases=[case], seeds=(s for s in (0, 3, 0)), on_result=told.append)
    assert [r.seed for r in report.results] == [0, 3, 0]
    assert told == report.results
    assert (given[0] == case.problem(0).q).all()
    assert (given[1] == case.problem(3).q).all()
    assert (given[0] == given[2]).all()
    assert (given[0] != given[1]).all()


def test_conditions_are_examined_on_nine_cases_that_hold():
    assert len(OPS["attention"].conditioned) == 9
    assert "On nine of the cases, these hold" in " ".join(PAGE.split())

    def examined(function, name):
        report = verify(function, cases=[BY_NAME[name]], diagnose=False)
        return any(c.tensor == "repeat" for c in report.results[0].checks)

    assert [examined(right, "plain"), examined(right, "E != D"), examined(wrong, "plain")] == [True, False, False]


def test_stop_goes_no_further_than_the_first_that_is_wrong_and_not_expected_to_be():
    assert names(of_uncapped(stop=True, seeds=(0, 1)).results) == ["plain", "softcap"]
    assert names(of_uncapped().results) == names_of(FEW)
    assert names(of_uncapped(stop=True, expected_failures={"softcap": "issue 12"}).results) == names_of(FEW)


def test_without_diagnosis_nothing_is_explained():
    assert "softcap is ignored" in verify(uncapped, cases=[BY_NAME["softcap"]]).diagnosis
    assert verify(uncapped, cases=[BY_NAME["softcap"]], diagnose=False).diagnosis == {}


# --- expected failures ----------------------------------------------------------------------------------------------------


def test_an_expected_failure_runs_and_is_not_wrong():
    report = of_uncapped(expected_failures={"softcap": "issue 12", "softcap + dlse": "issue 13"})
    assert {r.case: (r.status, r.expected) for r in report.results} == {
        "plain": ("ok", ""), "softcap": ("wrong", "issue 12"), "mask array": ("ok", ""), "sink": ("not supported", ""),
        "softcap + dlse": ("wrong", "issue 13"),
    }  # fmt: skip
    assert report.passed
    assert not of_uncapped(expected_failures={"softcap": "issue 12"}).passed


def test_a_star_stands_for_anything_and_then_all_of_them_have_to_fail():
    assert of_uncapped(expected_failures={"softcap*": "issue 12"}).passed
    assert names(of_uncapped(expected_failures={"*s*": "issue 12"}).unexpected) == ["mask array"]  # sink is not supported


def test_a_name_is_that_of_a_case_of_the_table_or_of_those_given():
    own = Case("my own", ("softcap",), sizes=SMALL)
    known = {"my own": "issue 12", "window (5, 0)": "issue 13"}
    assert verify(uncapped, cases=[own, *PLAIN], diagnose=False, expected_failures=known).passed
    for arguments, failures in (([uncapped], {"my own": "issue 12"}), (["rnn"], {"softcap": "issue 12"})):
        with pytest.raises(CandidateError, match="no such case"):
            verify(*arguments, cases=[], expected_failures=failures)


# --- check ----------------------------------------------------------------------------------------------------------------


def test_check_is_verify_and_require():
    report = check(right, cases=FEW[:2], require=["softcap"], level="tight", convention="causal=bottom_right")
    assert (report.passed, report.level) == (True, "tight")
    text = r"^uncapped falls short in 2 cases:\n  it looks like: softcap is ignored \(2 cases\)\nsoftcap: out: out\["
    with pytest.raises(AssertionError, match=text):
        check(uncapped, cases=FEW)
    with pytest.raises(AssertionError, match=r"^right: not tested: sink, backward$"):
        check(right, cases=FEW, require=["plain", "sink", "backward"])
    with pytest.raises(AssertionError, match=r"\nplain: was expected to fail \(x\), and holds$"):
        check(right, cases=FEW, expected_failures={"plain": "x"})
    with pytest.raises(AssertionError, match="not tested: anything"):
        check(attention, cases=[])


def test_a_feature_that_does_not_exist_is_said_before_anything_runs():
    with pytest.raises(CandidateError, match="require telepathy: no such feature"):
        check(lambda q, k, v: 1 / 0, require=["telepathy"])


def test_check_warns_where_no_mask_was_tested_and_keywords_are_not_known():
    masks = [*PLAIN, BY_NAME["mask array"]]
    with pytest.warns(UserWarning, match="with_names_of_torch: no mask was tested. It also takes attn_mask, is_causal, which"):
        check(with_names_of_torch, cases=masks)

    def with_more(q, k, v, mask=None, block_size=64):
        return attention(q, k, v, mask=mask)

    for cases in (masks, PLAIN):
        check(with_more, cases=cases)  # a warning would be an error here
