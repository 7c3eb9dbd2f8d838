"""A report as data: what counts as wrong, known and tested, its verdict, and its JSON."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from made import ABSENT, BAD, DQ, LSE, OK, RESULTS, explained, reported

import npattn
from npattn import cli
from npattn.verify import CandidateError, Check, Result

PAGE = (Path(__file__).parents[2] / "docs/verifying.md").read_text()


def names(results):
    return [r.case for r in results]


def test_what_is_wrong_and_what_was_expected_to_be():
    part = Result("part", ["sink"], [OK, Check("dq", "not supported", "sink")], expected="issue 5")
    report = reported(*RESULTS, part)
    assert (names(report.wrong), names(report.unexpected), names(report.unsettled)) == (["bad"], ["holds"], ["unable", "part"])


def test_tested_are_the_tensors_with_a_verdict_of_all_that_there_are():
    assert (reported("right").tested, reported("right").total) == (2, 4)
    assert (reported(*RESULTS).tested, reported(*RESULTS).total) == (2 + 2 + 2 + 1, 11)


@pytest.mark.parametrize(
    ("results", "verdict", "status"),
    [
        (["right"], "right", 0), (["right", "known"], "right", 0), (["known"], "right", 0),
        (["right", "unable", "blind"], "right", 0), (["right", "bad"], "wrong", 1), (["right", "holds"], "unexpected", 1),
        (["unable"], "nothing tested", 2), (["blind"], "nothing tested", 2), ([], "nothing tested", 2),
    ],
)  # fmt: skip
def test_a_report_passes_where_something_was_tested_and_nothing_is_amiss(results, verdict, status):
    report = reported(*results)
    assert (report.verdict(), cli.STATUS_OF[report.verdict()]) == (verdict, status)
    assert report.passed == (verdict == "right")
    if report.passed:
        assert report.require() is report
    else:
        with pytest.raises(AssertionError, match=r"^mine "if report.tested else "^mine: not tested: anything$"):
            report.require()


def test_an_interrupted_report_does_not_pass_and_still_says_what_is_wrong():
    assert reported("right", interrupted=True).verdict() == "interrupted"
    assert not reported("right", interrupted=True).passed
    assert reported("right", "bad", interrupted=True).verdict() == "wrong"


def test_untested_are_features_without_a_verdict():
    report = reported("right", "known", "unable", "blind")
    asked = ["plain", "causal", "lse", "backward", "window", "sink"]
    assert report.untested([*asked, "telepathy"]) == ["window", "telepathy"]
    assert (report.verdict(asked), cli.STATUS_OF[report.verdict(asked)]) == ("not tested", 3)
    assert reported("right").untested(["backward"]) == ["backward"]
    with pytest.raises(AssertionError, match=r"^mine: not tested: window$"):
        report.require(asked)
    with pytest.raises(CandidateError, match=r"^require telepathy: no such feature, expected one of .*, causal, .*, window$"):
        report.require([*asked, "telepathy"])


def test_the_diagnosis_has_the_commonest_first_and_each_case_once():
    aligned_backward = (("causal=bottom_right",), ("dq",), 1, "in the backward")
    report = reported(
        explained("a", (("Delta is missing",), ("dq",), 0.5)),
        explained("b", (("mask ignored", "lse=log2"), ("out",), 0.5), aligned_backward),
        explained("c", aligned_backward, (("causal=bottom_right",), ("out",), 1)),
        explained("c", aligned_backward),
        explained("d", (*aligned_backward[:3], "in the backward too")),
        explained("e", (("causal=bottom_right",), ("out",), 1)),
    )
    assert list(report.diagnosis.items()) == [
        ("causal=bottom_right", ["c", "d", "e"]),
        ("causal=bottom_right in the backward", ["b", "c"]),
        ("Delta is missing", ["a"]),
        ("mask ignored and lse=log2", ["b"]),
    ]


def test_features_are_those_of_the_cases_and_those_of_tensors():
    full = [OK, LSE, DQ, Check("dbias", "ok"), Check("dsink", "not given"), Check("repeat", "ok"), Check("hull", "wrong")]
    found = reported(Result("one", ["causal", "L > S"], full), Result("two", ["causal"], [OK, ABSENT])).features()
    everything = [c.tensor for c in full]
    assert {name: [(r.case, [c.tensor for c in r.checks]) for r in results] for name, results in found.items()} == {
        "causal": [("one", everything), ("two", ["out", "dv"])], "L > S": [("one", everything)], "lse": [("one", ["lse"])],
        "backward": [("one", ["dq", "dbias", "dsink"]), ("two", ["dv"])], "dbias": [("one", ["dbias"])],
        "dsink": [("one", ["dsink"])], "conditions": [("one", ["repeat", "hull"])],
    }  # fmt: skip


def test_as_json_has_what_the_page_says_in_plain_values():
    result = dataclasses.replace(explained("a", (("x", "y"), ("dq",), 0.5, "in the backward", ("z",))), seed=3, expected="why")
    result.checks.append(dataclasses.replace(DQ, rms=math.nan, rules={"onnx": False}))
    report = reported(result, "right", level="tight", precision="tf32", fits="float16-M1")
    found = json.loads(json.dumps(report.as_json(), allow_nan=False))
    entry = PAGE[PAGE.index("- `--json FILE` writes all of it") : PAGE.index("What is not finite is null.")]
    groups = re.split("and `results`, each with|and `checks`", entry)
    top, each, check = (set(re.findall(r"`(\w+)`", group)) for group in groups)
    assert set(found) == top | {"results"}
    assert {frozenset(r) for r in found["results"]} == {frozenset(each | {"checks"})}
    assert {frozenset(c) for r in found["results"] for c in r["checks"]} == {frozenset(check)}
    assert {n: found[n] for n in top} == {
        "npattn": npattn.__version__, "passed": report.passed, "candidate": "mine", "op": "attention", "level": "tight",
        "precision": "tf32", "fits": "float16-M1", "asked": 0, "interrupted": False, "too_little": False, "refused": {},
        "unused": [], "space": None, "tested": 4, "total": 6, "diagnosis": {"x and y in the backward": ["a"]},
    }  # fmt: skip
    first, second = found["results"]
    assert first["checks"][0] == dataclasses.asdict(BAD) | {"index": [0]}
    assert first["checks"][1] == dataclasses.asdict(DQ) | {"index": [1], "rms": None, "worst": None, "rules": {"onnx": False}}
    assert {n: first[n] for n in each - {"explanations"}} == {
        "case": "a", "seed": 3, "features": ["plain"], "status": "wrong", "expected": "why", "options": [],
    }  # fmt: skip
    assert first["explanations"] == [
        {"names": ["x", "y"], "tensors": ["dq"], "distance": 0.5, "where": "in the backward", "others": ["z"]}
    ]
    assert (second["status"], second["seed"], second["expected"]) == ("ok", 0, "")
