"""A report: what counts as wrong, known and tested, what is expected to fail, the rules of other suites, what is printed."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from helpers import abs_finite
from oracles import attention_loops

import npattn
from npattn import attention, attention_forward, cli
from npattn.tolerances import GOOD_MAX, GOOD_RMS, TIGHT_MAX, TIGHT_RMS
from npattn.verify import (
    CASES,
    PRECISIONS,
    Candidate,
    CandidateError,
    Case,
    Check,
    Result,
    diagnose,
    load,
    mutant_attention,
    mutants,
)
from npattn.verify.cases import BY_NAME, SMALL
from npattn.verify.conditions import CONDITIONED
from npattn.verify.conventions import FIELDS, PRESETS
from npattn.verify.diagnose import Explanation
from npattn.verify.judge import LEVELS, RULES
from npattn.verify.precision import of_dtype, round_to
from npattn.verify.report import CASES_OF, Report, check, parametrize, verify
from npattn.verify.rounded import rounded

pytest_plugins = ["pytester"]

PAGE = (Path(__file__).parent.parent / "docs/verifying.md").read_text()
FEW = [BY_NAME[name] for name in ("plain", "softcap", "mask array", "sink", "softcap + dlse")]


def right(q, k, v, *, mask=None, softcap=None):
    return attention_forward(q, k, v, mask=mask, softcap=softcap)[0]


def uncapped(q, k, v, *, mask=None, softcap=None):
    return attention_forward(q, k, v, mask=mask)[0]


def refusing(q, k, v):
    raise NotImplementedError("no such device")


def wrong(q, k, v, *, mask=None, softcap=None):
    return 1.5 * right(q, k, v, mask=mask, softcap=softcap)


def names(results):
    return [r.case for r in results]


# --- a report made by hand ------------------------------------------------------------------------------------------------

OK, BAD = Check("out", "ok", "", 0.5, 2.5, (0, 1, 2), "tight"), Check("out", "wrong", "out[0] is 2", 9.0, 99.0, (0,), "broken")
LSE, DQ = Check("lse", "ok", "", 0.4, 1.25, (3,), "tight"), Check("dq", "wrong", "dq[1] is nan", math.inf, math.inf, (1,))
BLIND, ABSENT = Check("dk", "no power", "zeros would pass"), Check("dv", "not given", "backward not given")
SINK = Check("out", "not supported", "sink")


def reported(*results, **more):
    return Report("mine", list(results), **more)


MADE = {
    "right": Result("right", ["plain"], [OK, LSE, BLIND, ABSENT]),
    "bad": Result("bad", ["causal"], [BAD, LSE]),
    "known": Result("known", ["causal", "sink"], [OK, DQ], expected="issue 1"),
    "holds": Result("holds", ["softcap"], [OK], expected="issue 2"),
    "unable": Result("unable", ["sink"], [SINK], expected="issue 3"),
    "blind": Result("blind", ["window"], [BLIND], expected="issue 4"),
}


def test_what_is_wrong_and_what_was_expected_to_be():
    report = reported(*MADE.values())
    assert names(report.wrong) == ["bad"]
    assert names(report.unexpected) == ["holds"]


def test_tested_are_the_tensors_with_a_verdict_of_all_that_there_are():
    assert (reported(MADE["right"]).tested, reported(MADE["right"]).total) == (2, 4)
    assert (reported(*MADE.values()).tested, reported(*MADE.values()).total) == (2 + 2 + 2 + 1, 11)


@pytest.mark.parametrize(
    ("made", "passed"),
    [
        (["right"], True), (["right", "known"], True), (["known"], True), (["right", "unable", "blind"], True),
        (["right", "bad"], False), (["right", "holds"], False), (["unable"], False), (["blind"], False), ([], False),
    ],
)  # fmt: skip
def test_a_report_passes_where_something_was_tested_and_nothing_is_amiss(made, passed):
    report = reported(*(MADE[name] for name in made))
    assert report.passed == passed
    if passed:
        assert report.require() is report
    else:
        with pytest.raises(AssertionError):
            report.require()


def test_a_line_for_each_tensor_that_is_wrong_and_each_case_that_holds():
    two = Result("two", ["plain"], [BAD, LSE, DQ])
    assert reported(*MADE.values(), two).lines() == [
        "bad: out: out[0] is 2", "two: out: out[0] is 2", "two: dq: dq[1] is nan",
        "holds: was expected to fail (issue 2), and holds",
    ]  # fmt: skip
    assert reported(MADE["right"], MADE["known"], MADE["unable"]).lines() == []


def explained(case, *explanations):
    return Result(case, ["plain"], [BAD], [Explanation(*e) for e in explanations])


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


def test_features_are_those_of_the_cases_and_lse_gradients_and_conditions():
    full = [OK, LSE, DQ, Check("dbias", "ok"), Check("dsink", "not given"), Check("repeat", "ok"), Check("hull", "wrong")]
    found = reported(Result("one", ["causal", "L > S"], full), Result("two", ["causal"], [OK, ABSENT])).features()
    tensors = {name: [(r.case, [c.tensor for c in r.checks]) for r in results] for name, results in found.items()}
    everything = [c.tensor for c in full]
    assert tensors == {
        "causal": [("one", everything), ("two", ["out", "dv"])], "L > S": [("one", everything)], "lse": [("one", ["lse"])],
        "backward": [("one", ["dq", "dbias", "dsink"]), ("two", ["dv"])], "dbias": [("one", ["dbias"])],
        "dsink": [("one", ["dsink"])], "conditions": [("one", ["repeat", "hull"])],
    }  # fmt: skip
    layer = Result("plain", ["steps"], [Check("h", "ok"), Check("lse", "ok"), Check("dw_x", "ok"), Check("db", "ok")])
    found = reported(layer, op="rnn").features()
    assert {name: [c.tensor for c in results[0].checks] for name, results in found.items() if name != "steps"} == {
        "backward": ["dw_x", "db"]
    }


def test_untested_are_features_without_a_verdict():
    report = reported(*(MADE[name] for name in ("right", "known", "unable", "blind")))
    asked = ["plain", "causal", "lse", "backward", "window", "sink", "telepathy"]
    assert report.untested(asked) == ["window", "telepathy"]
    assert reported(MADE["right"]).untested(["backward"]) == ["backward"]
    with pytest.raises(AssertionError, match=r"^mine: not tested: window$"):
        report.require(asked[:-1])
    with pytest.raises(CandidateError, match=r"^require telepathy: no such feature, expected one of .*, causal, .*, window$"):
        report.require(asked)
    with pytest.raises(AssertionError, match=r"^mine: not tested: anything$"):
        reported(MADE["unable"]).require()


def test_require_says_what_is_wrong_and_what_it_looks_like():
    looks = [(("Delta is missing",), ("dq",), 0.5), (("mask ignored",), ("out",), 1.0), (("lse=log2",), ("lse",), 1.0)]
    results = [explained(f"case {i}", *looks[: 1 + (i < 7) + (i < 4)]) for i in range(12)]
    results.append(explained("last", (("dlse=ignored",), ("dq",), 0.1)))
    with pytest.raises(AssertionError) as found:
        reported(*results, MADE["holds"], MADE["known"]).require()
    lines = str(found.value).splitlines()
    assert lines == [
        "mine falls short in 14 cases:",
        "  it looks like: Delta is missing (12 cases)", "  it looks like: mask ignored (7 cases)",
        "  it looks like: lse=log2 (4 cases)",
        "case 0, case 1, case 2, ...: out: out[0] is 2", "holds: was expected to fail (issue 2), and holds",
    ]  # fmt: skip


def test_require_shows_ten_lines():
    def result(i):
        return Result(f"case {i}", ["plain"], [Check("out", "wrong", f"out[0] is {i}")])

    with pytest.raises(AssertionError) as found:
        reported(*map(result, range(14))).require()
    assert str(found.value).splitlines()[1:] == [*(f"case {i}: out: out[0] is {i}" for i in range(10)), "... and 4 more"]
    with pytest.raises(AssertionError) as found:
        reported(*map(result, range(10))).require(["window"])
    assert "more" not in str(found.value)
    assert "window" not in str(found.value)


def naive(q, k, v):
    s = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True) @ v


def test_who_cannot_be_called_is_told_how():
    with pytest.raises(AssertionError, match=r"(?s)G < H: out: raises ValueError.*let it raise NotImplementedError"):
        check(naive, cases=[BY_NAME["plain"], BY_NAME["G < H"]])
    with pytest.raises(AssertionError, match=r"(?s)plain, E != D: dq: the backward raises TypeE.*\nverify calls forward\("):
        check(naive, lambda dout, cache: dout, cases=[BY_NAME["plain"], BY_NAME["E != D"]])

    def with_names_of_torch(q, k, v, attn_mask=None):
        return naive(q, k, v)

    with pytest.warns(UserWarning, match="with_names_of_torch: no mask was tested. It also takes attn_mask, which verify"):
        check(with_names_of_torch, cases=[BY_NAME["plain"], BY_NAME["mask array"]])

    def with_more(q, k, v, mask=None, block_size=64):
        return attention(q, k, v, mask=mask)

    check(with_more, cases=[BY_NAME["plain"], BY_NAME["mask array"]])  # a warning would be an error here
    check(with_more, cases=[BY_NAME["plain"]])
    assert verify(attention, cases=[BY_NAME["plain"]]).strangers == ()


def test_who_raises_for_a_reason_of_its_own_is_not_told_how_to_be_called():
    def forward(q, k, v):
        raise TypeError("unsupported argument type")

    with pytest.raises(AssertionError, match="NotImplementedError") as found:
        check(forward, cases=[BY_NAME["plain"]])
    assert "verify calls" not in str(found.value)
    rnn = next(case for case in CASES_OF["rnn"] if case.name == "plain")
    with pytest.raises(AssertionError, match=r"verify calls forward\(x, h0, params, .* and backward\(dh, x, h0, params,"):
        check(npattn.rnn, lambda dh: dh, op="rnn", cases=[rnn])


def test_no_cases_are_none():
    with pytest.raises(AssertionError, match="not tested: anything"):
        check(attention, cases=[])


def test_a_feature_that_does_not_exist_is_said_before_anything_runs():
    with pytest.raises(CandidateError, match="require telepathy: no such feature"):
        check(lambda q, k, v: 1 / 0, require=["telepathy"])


def test_no_softmax_at_all_is_named_of_a_backward_that_keeps_its_weights():
    """Made again from lse, they would be others."""
    def scores(q, k):
        return q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)

    def backward(dout, q, k, v):
        p, dp = scores(q, k), dout @ v.swapaxes(-1, -2)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * np.float32(q.shape[-1] ** -0.5)
        return ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout

    report = verify(lambda q, k, v: scores(q, k) @ v, backward, cases=[BY_NAME["plain"]])
    texts = [e.text for r in report.results for e in r.explanations]
    assert [t.partition(" to ")[0] for t in texts] == [
        "out: matches no softmax at all", "dq, dk, dv: matches no softmax at all in the backward too",
    ]  # fmt: skip


@pytest.mark.parametrize("bug", ["mean of the group in dv", "softcap not multiplied back", "backward anchored at key 0"])
def test_a_bug_has_its_name_in_half_precision_too(bug):
    mutant = mutants.MUTANTS[bug]
    report = verify(mutants.make(bug), precision="float16-M1", cases=[BY_NAME[name] for name in mutant.cases])
    assert mutant.says in {name.partition(" in the backward")[0] for name in report.diagnosis}


@pytest.mark.parametrize("case", ["plain", "G < H", "softcap"])
def test_a_rounded_delta_is_named_and_no_class_is_offered_for_a_right_forward(case):
    report = verify(attention, delta_rounded, cases=[BY_NAME["plain"], BY_NAME[case]])
    assert report.fits == ""
    assert set(report.diagnosis) == {"the output rounded to 8 bits before Delta"}


def delta_rounded(dout, q, k, v, *, out, softcap=None):
    H, repeat = q.shape[1], q.shape[1] // k.shape[1]
    kh, vh = (np.repeat(x, repeat, 1) for x in (k, v))
    s = q @ kh.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    t = 0 * s if softcap is None else np.tanh(s / np.float32(softcap))
    s = s if softcap is None else np.float32(softcap) * t
    e = np.exp(s - s.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    delta = (dout * mutant_attention.bfloat16(out)).sum(-1, keepdims=True)
    ds = p * (dout @ vh.swapaxes(-1, -2) - delta) * (1 - t * t) * np.float32(q.shape[-1] ** -0.5)
    dk, dv = ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout
    dk, dv = (x.reshape(len(x), H // repeat, repeat, *x.shape[2:]).sum(2) for x in (dk, dv))
    return ds @ kh, dk, dv


def test_an_error_below_the_smallest_normal_number_is_not_a_tensors_own():
    """Most of dbias is masked: there only what exp loses is predicted, and a change is as far off as elsewhere."""
    value = np.where(np.arange(100) < 20, 1.0, 0.0)
    sigma = np.where(np.arange(100) < 20, 1e-7, 1e-38)
    got = (value + np.where(np.arange(100) < 40, 1e-7, 0)).astype(np.float32)
    assert diagnose.distance(got, value, sigma)[1] < 3


def test_as_json_has_what_the_page_says_in_plain_values():
    result = dataclasses.replace(explained("a", (("x", "y"), ("dq",), 0.5, "in the backward", ("z",))), seed=3, expected="why")
    result.checks.append(dataclasses.replace(DQ, rms=math.nan, rules={"onnx": False}))
    report = reported(result, MADE["right"], level="tight", precision="tf32", fits="float16-M1")
    found = json.loads(json.dumps(report.as_json(), allow_nan=False))
    paragraph = next(p for p in re.split(r"\n- |\n\n", PAGE) if p.startswith("`--json FILE`"))
    named = set(re.findall(r"`(\w+)`", paragraph)) - {"results", "checks"}
    top, each, of_checks = set(found), set(found["results"][0]), set(found["results"][0]["checks"][0])
    assert named == (top | each | of_checks) - {"results", "checks"}
    assert {n: found[n] for n in top - {"results"}} == {
        "npattn": npattn.__version__, "passed": report.passed,
        "candidate": "mine", "op": "attention", "level": "tight", "precision": "tf32", "fits": "float16-M1",
        "asked": 0, "interrupted": False, "too_little": False, "refused": {}, "unused": [],
        "tested": 4, "total": 6, "diagnosis": {"x and y in the backward": ["a"]},
    }  # fmt: skip
    first, second = found["results"]
    assert first["checks"][0] == {
        "tensor": "out", "status": "wrong", "text": "out[0] is 2", "rms": 9.0, "worst": 99.0, "index": [0], "level": "broken",
        "rules": {},
    }  # fmt: skip
    assert first["checks"][1]["rms"] is first["checks"][1]["worst"] is None
    assert first["checks"][1]["rules"] == {"onnx": False}
    assert {n: first[n] for n in each - {"checks", "explanations"}} == {
        "case": "a", "seed": 3, "features": ["plain"], "status": "wrong", "expected": "why",
        "options": [],
    }  # fmt: skip
    assert first["explanations"][0] == {
        "names": ["x", "y"], "tensors": ["dq"], "distance": 0.5, "where": "in the backward", "others": ["z"]
    }  # fmt: skip
    assert (second["status"], second["seed"], second["expected"]) == ("ok", 0, "")


# --- names that are not known ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"level": "fine"}, "level 'fine', expected one of tight, good, bounded"),
        ({"rules": ["onnx", "jax"]}, "rule 'jax', expected one of flash2x, torch, onnx, allclose"),
        ({"precision": "float12"}, "precision 'float12', expected one of float64, float32, tf32, "),
        ({"convention": "causal=left"}, "causal=left, expected one of top_left, bottom_right"),
        ({"convention": "flash9"}, "flash9"),
        ({"op": "lstm"}, "op 'lstm', expected one of attention, multi_head, rnn, softmax"),
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
        (["npattn.attention:absent"], {}, "npattn.attention has no absent"),
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
    plain = [BY_NAME["plain"]]
    seen = []

    def backward(dout, q, k, v):
        seen.append(1)
        return q, k, v

    assert verify(right, cases=plain).candidate == "right"
    assert verify(Candidate("own", right), cases=plain).candidate == "own"
    assert verify("blockwise", cases=plain).passed
    report = verify("npattn.attention:attention", backward, cases=plain)
    assert report.candidate == "npattn.attention:attention"
    assert seen
    assert [c.tensor for c in report.wrong[0].checks if c.status == "wrong"] == ["dq", "dk", "dv"]
    (case, *_) = CASES_OF["rnn"]
    report = verify("rnn", cases=[case])
    assert (report.op, report.passed) == ("rnn", True)
    (case, *_) = CASES_OF["softmax"]
    report = verify("npattn.softmax:softmax", op="softmax", cases=[case])
    assert (report.op, report.passed) == ("softmax", True)


# --- what is run ----------------------------------------------------------------------------------------------------------


def test_all_cases_of_the_op_are_run_unless_others_are_given(monkeypatch):
    monkeypatch.setitem(CASES_OF, "attention", FEW)
    assert names(verify(right).results) == names_of(FEW)
    assert names(verify(right, cases=iter(FEW[1:3])).results) == names_of(FEW[1:3])


def names_of(cases):
    return [case.name for case in cases]


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
    assert len(CONDITIONED) == 9
    assert "On nine of the cases, these hold" in " ".join(PAGE.split())
    report = verify(right, cases=[BY_NAME["plain"], BY_NAME["E != D"]])
    assert [any(c.tensor == "repeat" for c in r.checks) for r in report.results] == [True, False]
    report = verify(wrong, cases=[BY_NAME["plain"]])
    assert not any(c.tensor == "repeat" for c in report.results[0].checks)


def test_stop_goes_no_further_than_the_first_that_is_wrong():
    cases = [BY_NAME[name] for name in ("plain", "softcap", "softcap 30", "mask array")]
    assert names(verify(uncapped, cases=cases, stop=True, seeds=(0, 1)).results) == ["plain", "softcap"]
    assert names(verify(uncapped, cases=cases).results) == names_of(cases)
    known = {"softcap": "issue 12"}
    assert names(verify(uncapped, cases=cases, stop=True, expected_failures=known).results) == names_of(cases[:3])


def test_without_diagnosis_nothing_is_explained():
    assert "softcap is ignored" in verify(uncapped, cases=[BY_NAME["softcap"]]).diagnosis
    assert verify(uncapped, cases=[BY_NAME["softcap"]], diagnose=False).diagnosis == {}


def test_a_declared_class_gives_inputs_that_its_format_holds_and_leaves_float64_out():
    given = {}

    def forward(q, k, v):
        given["q"] = q
        return right(q.astype(np.float32), k.astype(np.float32), v.astype(np.float32))

    cases = [BY_NAME["plain"], BY_NAME["float64"]]
    for name, dtype in (("float16-M1", np.float16), ("bfloat16-M1", np.float32), ("float8", np.float32)):
        given.clear()
        report = verify(forward, cases=cases, precision=name)
        assert report.precision == name
        assert [r.status for r in report.results] == ["ok", "not supported"]  # out comes back in float32
        assert given["q"].dtype == dtype
        assert (round_to(given["q"].astype(np.float32), PRECISIONS[name].storage) == given["q"]).all()
    assert given["q"].dtype == np.float32
    verify(forward, cases=cases[:1])
    assert (round_to(given["q"], "bfloat16") != given["q"]).any()


# --- how good is good -----------------------------------------------------------------------------------------------------


def off_by(case, error):
    """A forward that is off the truth by error(values, sigma, det) in each element of its output."""
    problem = case.problem()
    truth = problem.truth(of_dtype(problem.dtype))
    out = truth.values["out"] + error(truth.values["out"], truth.sigma["out"], truth.det["out"])
    return lambda q, k, v: out.astype(np.float32)


def one_element(shape):
    """1 in one place, 0 elsewhere."""
    at = np.zeros(shape)
    at.flat[7] = 1
    return at


@pytest.mark.parametrize(("level", "rms", "most"), [("tight", TIGHT_RMS, TIGHT_MAX), ("good", GOOD_RMS, GOOD_MAX)])
def test_a_level_bounds_the_rms_and_the_largest_error_in_sigma(level, rms, most):
    case = BY_NAME["plain"]
    row = re.search(rf"\| `{level}`.*\| ([\d.]+) \| ([\d.]+) \|", PAGE)
    assert (float(row[1]), float(row[2])) == (rms, most)
    for factor, holds in ((0.9, True), (1.1, False)):
        everywhere = off_by(case, lambda out, sigma, det, f=factor: f * rms * sigma)
        once = off_by(case, lambda out, sigma, det, f=factor: f * most * sigma * one_element(out.shape))
        for forward in (everywhere, once):
            (check, *_) = verify(forward, cases=[case], level=level, diagnose=False).results[0].checks
            assert (check.status == "ok") == holds, check.text
            assert (check.level == level) == holds


def test_bounded_holds_up_to_det():
    case = BY_NAME["plain"]
    for factor, status, level in ((0.9, "ok", "bounded"), (1.1, "wrong", "broken")):
        forward = off_by(case, lambda out, sigma, det, f=factor: f * det)
        (check, *_) = verify(forward, cases=[case], level="bounded", diagnose=False).results[0].checks
        assert (check.status, check.level) == (status, level)
        assert verify(forward, cases=[case], level="good", diagnose=False).results[0].status == "wrong"
    assert verify(right, cases=[case], level="bounded").passed


# --- rules of other suites ------------------------------------------------------------------------------------------------

CLOSE = {"float64": (1e-7, 1e-7), "float32": (1.3e-6, 1e-5), "float16": (1e-3, 1e-5)}  # torch.testing.assert_close


def planted(want, bound, factor):
    """want with an error of that part of the bound in one element."""
    got = want.copy()
    got[0, 1] += factor * np.broadcast_to(bound, want.shape)[0, 1]
    return got


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("tensor", ["out", "lse", "dq", "dk", "dv", "dbias"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_that_of_its_suite(rule, tensor, dtype):
    rng = np.random.default_rng(0)
    want = rng.standard_normal((4, 5))
    low = (want * (1 + 2e-3 * rng.standard_normal((4, 5)))).astype(dtype)
    rtol, atol = CLOSE[dtype]
    error = np.abs(low - want)
    times = {"out": 4, "dv": 4, "dq": 180, "dk": 16}.get(tensor, 16)
    bound = {
        "flash2x": 2 * error.max() + 1e-5,
        "torch": times * max(error.max(), atol) + times * max((error / np.abs(want)).max(), rtol) * np.abs(want),
        "onnx": 1e-7 + 1e-3 * np.abs(want),
        "allclose": atol + rtol * np.abs(want),
    }[rule]
    for factor in (0.98, -0.98):
        assert RULES[rule](planted(want, bound, factor), want, low, tensor)
    for factor in (1.02, -1.02):
        assert not RULES[rule](planted(want, bound, factor), want, low, tensor)
    for here, there, accepted in ((np.nan, np.nan, True), (np.nan, 1.0, False), (1.0, np.inf, False), (np.inf, np.inf, True)):
        got, other = want.copy(), want.copy()
        got[1, 1], other[1, 1] = here, there
        with np.errstate(invalid="ignore"):
            assert RULES[rule](got, other, low, tensor) == accepted, (here, there)


def loops(problem):
    """out of a problem without options, in float64."""
    return attention_loops(problem.q, problem.k, problem.v)["out"]


def eager(problem):
    """out as it is computed step by step in the inputs' dtype; products of float16 are accumulated in float32."""
    low = problem.q.dtype
    q, k, v = (x.astype(np.float32) if low == np.float16 else x for x in (problem.q, problem.k, problem.v))
    s = (q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5).astype(low).astype(q.dtype)
    e = np.exp(s - s.max(-1, keepdims=True))
    return ((e / e.sum(-1, keepdims=True)).astype(low).astype(q.dtype) @ v).astype(low)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("rule", ["flash2x", "onnx", "allclose"])
def test_a_rule_is_applied_to_the_output_beside_an_eager_one_of_the_same_precision(rule, dtype):
    """Where float16 rounds, twice its error is 50 times the constant of the rule."""
    case = Case("mine", sizes=SMALL, dtype="float64" if dtype == "float64" else "float32")
    precision = "float16-M3" if dtype == "float16" else None
    problem = case.problem() if precision is None else case.problem().stored(PRECISIONS[precision])
    want, (rtol, atol) = loops(problem), CLOSE[dtype]
    bound = {
        "flash2x": 2 * np.abs(eager(problem) - want).max() + 1e-5,
        "onnx": 1e-7 + 1e-3 * np.abs(want),
        "allclose": atol + rtol * np.abs(want),
    }[rule]
    for factor, accepted in ((0.9, True), (1.1, False)):
        back = np.float64 if dtype == "float64" else np.float32
        out = (want + factor * bound * one_element(want.shape)).astype(back)
        once = (r for r in [rule])  # rules may be any iterable
        report = verify(lambda q, k, v, out=out: out, cases=[case], rules=once, precision=precision, diagnose=False)
        (check, *others) = report.results[0].checks
        assert check.rules == {rule: accepted}
        assert all(c.rules == {} for c in others)  # they were not returned
        assert report.rules == (rule,)


@pytest.mark.parametrize("precision", ["bfloat16-M1", "bfloat16-M2", "float16-M2", "tf32"])
def test_rules_compare_with_an_eager_implementation_of_the_declared_class(precision):
    """An honest one of a class is not twice as far off as an eager one that rounds more, but far from one in float32."""
    report = verify(*rounded(PRECISIONS[precision]), cases=[BY_NAME["plain"]], rules=["flash2x"], precision=precision)
    assert report.passed
    assert all(c.rules == {"flash2x": True} for c in report.results[0].tested if c.tensor in ("out", "dq", "dk", "dv"))


def test_rules_change_nothing_of_the_verdict():
    for forward in (right, wrong, lambda q, k, v: q):
        without = verify(forward, cases=[BY_NAME["plain"]], diagnose=False).results
        beside = verify(forward, cases=[BY_NAME["plain"]], diagnose=False, rules=RULES).results
        bare = [dataclasses.replace(r, checks=[dataclasses.replace(c, rules={}) for c in r.checks]) for r in beside]
        assert bare == without
    shape = verify(lambda q, k, v: q[:, :, 1:], cases=[BY_NAME["plain"]], rules=RULES, diagnose=False).results[0].checks[0]
    assert shape.rules == dict.fromkeys(RULES, False)


def test_the_rules_are_summed_up():
    right = Check("dv", "ok", rules={"onnx": True, "torch": True})
    lenient = Check("out", "wrong", rules={"onnx": True, "torch": False})
    strict = Check("dq", "no power", rules={"onnx": False, "torch": True})
    results = [Result("a", ["plain"], [right, lenient, strict, ABSENT])]
    results += [Result(f"b{i}", ["plain"], [lenient]) for i in range(4)]
    text = list(cli.summary(reported(*results, rules=("onnx", "torch")), True))
    assert "\nrule onnx: rejects 1 of 7 tensors; npattn rejects 5; they differ in 6: " \
        "a: out, a: dq, b0: out, b1: out, b2: out, ..." in text  # fmt: skip
    assert "\nrule torch: rejects 5 of 7 tensors; npattn rejects 5" in text


# --- another class of precision -------------------------------------------------------------------------------------------

ROUNDED = [BY_NAME[name] for name in ("plain", "softcap", "mask array", "sink", "long")]


@pytest.mark.parametrize("name", ["tf32", "float16-M1", "bfloat16-M1", "bfloat16-M2"])
def test_errors_of_another_class_are_told(name):
    report = verify(*rounded(PRECISIONS[name]), cases=ROUNDED[:3], diagnose=False)
    assert names(report.wrong) == names_of(ROUNDED[:3])
    assert report.fits == name
    sentence = f"Its errors are those of {name}: if that is what it computes in, declare --precision {name}"
    assert cli._verdict(report, [])[0].splitlines()[1] == sentence
    assert sentence.replace(name, "bfloat16-M2") in " ".join(PAGE.split())
    assert verify(*rounded(PRECISIONS[name]), cases=ROUNDED[:3], precision=name).passed


@pytest.mark.parametrize("declared", [None, "float16-M1"])
def test_no_other_class_is_told(declared):
    """Of one that is right, wrong otherwise, wrong only where plain is not, or judged by a class that it has declared."""
    found = {}
    for forward in (right, wrong, uncapped, lambda q, k, v: np.nan * q, lambda q, k, v: q[1:]):
        found[forward] = verify(forward, cases=ROUNDED[:3], precision=declared, diagnose=False)
        assert found[forward].fits == ""
    assert len(found[wrong].wrong) == 3
    low = verify(*rounded(PRECISIONS["bfloat16-M1"]), cases=ROUNDED[:3], precision="float16-M1", diagnose=False)
    assert low.wrong
    assert low.fits == "bfloat16-M1"


def test_a_class_is_told_where_plain_and_most_others_show_it():
    low = rounded(PRECISIONS["bfloat16-M1"])[0]

    def told(*cases, without=()):
        """Which class is told of one that ignores some options."""

        def forward(q, k, v, *, softcap=None, sink=None):
            given = {"softcap": softcap, "sink": sink}
            return low(q, k, v, **{name: x for name, x in given.items() if name not in without})[0]

        return verify(forward, cases=[BY_NAME[name] for name in cases], diagnose=False).fits

    def low_behind_a_mask(q, k, v, *, mask=None):
        return right(q, k, v) if mask is None else low(q, k, v, mask=mask)[0]

    assert told("plain", "softcap", "sink") == told("plain", "softcap", "sink", without=["sink"]) == "bfloat16-M1"
    assert told("plain", "softcap", "sink", without=["softcap", "sink"]) == ""
    report = verify(low_behind_a_mask, cases=[BY_NAME["plain"], BY_NAME["mask array"]], diagnose=False)
    assert (names(report.wrong), report.fits) == (["mask array"], "")


# --- expected failures ----------------------------------------------------------------------------------------------------


def test_an_expected_failure_runs_and_is_not_wrong():
    report = verify(uncapped, cases=FEW, expected_failures={"softcap": "issue 12", "softcap + dlse": "issue 13"})
    assert {r.case: (r.status, r.expected) for r in report.results} == {
        "plain": ("ok", ""), "softcap": ("wrong", "issue 12"), "mask array": ("ok", ""), "sink": ("not supported", ""),
        "softcap + dlse": ("wrong", "issue 13"),
    }  # fmt: skip
    assert report.passed
    assert not verify(uncapped, cases=FEW, expected_failures={"softcap": "issue 12"}).passed


def test_a_star_stands_for_anything_and_then_all_of_them_have_to_fail():
    assert verify(uncapped, cases=FEW, expected_failures={"softcap*": "issue 12"}).passed
    report = verify(uncapped, cases=FEW, expected_failures={"*s*": "issue 12"})
    assert names(report.unexpected) == ["mask array"]  # sink is not supported
    assert report.lines() == ["mask array: was expected to fail (issue 12), and holds"]
    assert names(verify(right, cases=FEW, expected_failures={"*": "all"}).unexpected) == names_of(FEW[:3]) + names_of(FEW[4:])


def test_a_name_is_that_of_a_case_of_the_table_or_of_those_given():
    own = Case("my own", ("softcap",), sizes=SMALL)
    assert verify(uncapped, cases=[own], expected_failures={"my own": "issue 12", "window (5, 0)": "issue 13"}).passed
    with pytest.raises(CandidateError, match="no such case"):
        verify(uncapped, cases=FEW, expected_failures={"my own": "issue 12"})
    with pytest.raises(CandidateError, match="no such case"):
        verify("rnn", cases=[], expected_failures={"softcap": "issue 12"})


def test_check_is_verify_and_require():
    assert check(right, cases=FEW, require=["softcap"]).tested > 0
    text = r"^uncapped falls short in 2 cases:\n  it looks like: softcap is ignored \(2 cases\)\nsoftcap: out: out\["
    with pytest.raises(AssertionError, match=text):
        check(uncapped, cases=FEW)
    with pytest.raises(AssertionError, match=r"^right: not tested: sink, backward$"):
        check(right, cases=FEW, require=["plain", "sink", "backward"])
    with pytest.raises(AssertionError, match=r"^plain: was expected|\nplain: was expected to fail \(x\), and holds"):
        check(right, cases=FEW, expected_failures={"plain": "x"})
    assert check(right, cases=FEW, level="tight", convention="causal=bottom_right").level == "tight"


# --- pytest ---------------------------------------------------------------------------------------------------------------

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


def test_a_pytest_for_each_case(theirs):
    mine = {name: theirs[f"test_mine[{name}]"] for name in
            ("plain", "mask array", "sink", "softcap", "softcap 30", "bias H", "G < H", "scale 0.6")}  # fmt: skip
    assert len([name for name in theirs if name.startswith("test_mine")]) == len(mine)
    assert mine["plain"] == ("passed", "")
    assert mine["softcap"] == mine["softcap 30"] == ("xfailed", "issue 12")
    assert mine["sink"] == ("skipped", "Skipped: sink")
    assert mine["G < H"] == ("skipped", "Skipped: grouped heads")
    assert mine["bias H"] == ("skipped", "Skipped: bias")  # not supported, which no list has to say
    assert mine["mask array"] == ("failed", "mask array: was expected to fail (issue 13), and holds")
    outcome, text = mine["scale 0.6"]
    assert outcome == "failed"
    assert "AssertionError: mine falls short in 1 case:\n" in text
    assert re.search(r"\nE +it looks like: .*scale.* \(1 cases\)\nE +scale 0.6: out: out\[.* off by ", text)
    assert "not reached" not in text


def test_the_test_itself_runs_where_the_case_holds(theirs):
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

    assert ids(right) == names_of(CASES)
    assert ids(right, op="softmax") == names_of(CASES_OF["softmax"])
    assert ids("rnn") == names_of(CASES_OF["rnn"])
    assert ids(load("multi-head")) == names_of(CASES_OF["multi_head"])
    assert ids("blockwise", cases=iter(FEW)) == names_of(FEW)
    with pytest.raises(CandidateError, match="no such case"):
        parametrize(right, expected_failures={"softcup": "issue 12"})
    with pytest.raises(CandidateError, match="has no reason"):
        parametrize(right, expected_failures={"softcap": ""})
    with pytest.raises(CandidateError, match="op 'lstm'"):
        parametrize(right, op="lstm")


# --- what is printed ------------------------------------------------------------------------------------------------------


def test_a_line_for_a_case():
    assert list(cli.describe(Result("a", ["plain"], [OK, LSE, ABSENT, Check("repeat", "ok"), Check("hull", "ok")]))) == [
        f"  ok     {'a':40}       2.5 sigma in out   of out, lse; 2 conditions"
    ]
    checks = [BAD, LSE, Check("dq", "wrong", "has shape (1,)", worst=math.inf), BLIND]
    lines = [
        f"{'a':40}         - sigma in dq    of out, lse, dq", "           no power: dk (zeros would pass)",
        "           out[0] is 2", "           dq has shape (1,)",
        "           => dq: matches x and y in the backward to 0.5 sigma",
    ]  # fmt: skip
    why = [Explanation(("x", "y"), ("dq",), 0.5, "in the backward")]
    assert list(cli.describe(Result("a", ["plain"], checks, why))) == [f"  WRONG  {lines[0]}", *lines[1:]]
    assert list(cli.describe(Result("a", ["plain"], checks, why, "issue 12"))) == [f"  known  {lines[0]}", *lines[1:]]
    assert next(cli.describe(MADE["holds"])).startswith("  ok     holds ")
    unable, line = [SINK, Check("lse", "not supported", "sink")], f"  --     {'a':40} not "
    assert list(cli.describe(Result("a", ["sink"], unable))) == [f"{line}supported: sink"]
    assert list(cli.describe(Result("a", ["sink"], [*unable, ABSENT]))) == [f"{line}given: sink, backward not given"]
    assert next(cli.describe(Result("a", ["plain"], [OK], seed=4), 4)).startswith("  ok     a  ")
    assert next(cli.describe(Result("a", ["plain"], [OK], seed=4), 3)).startswith("  ok     a (seed 4)  ")


def test_a_table_by_feature():
    text = list(cli.table(reported(*MADE.values(), Result("worse", ["plain"], [dataclasses.replace(OK, worst=3.5)]))))
    rows = {line.split("  ")[0]: re.sub(" +", " ", line) for line in text}
    assert rows["plain"] == "plain 3 of 5 3.5 out[0, 1, 2] in worse"
    assert rows["causal"] == "causal 4 of 4 99 out[0] in bad WRONG"
    assert rows["backward"] == "backward 1 of 4 - dq[1] in known known"
    assert rows["window"] == "window 0 of 1 zeros would pass"
    assert rows["lse"] == "lse 2 of 2 1.25 lse[3] in right"
    text = list(cli.table(reported(Result("s", ["sink"], [SINK, Check("lse", "not supported", "bias, sink")]))))
    assert re.sub(" +", " ", text[1]) == "sink 0 of 2 sink, bias"


def test_what_is_wrong_is_named_before_what_is_merely_larger():
    small = Check("dq", "wrong", "dq[2] is 0", 2.0, 3.0, (2,), "bounded")
    large = dataclasses.replace(OK, worst=7.0)
    text = list(cli.table(reported(Result("a", ["plain"], [large, small]))))
    assert re.sub(" +", " ", text[1]) == "plain 2 of 2 3 dq[2] in a WRONG"


def test_the_coverage():
    unable = Result("s", ["sink"], [SINK, Check("lse", "not supported", "bias, sink"), ABSENT])
    refusals = [Check(tensor, "refused", "no device") for tensor in ("out", "dq")]
    refused = [Result(name, ["plain"], refusals) for name in ("a", "b")]
    assert list(cli._coverage(reported(MADE["right"], MADE["blind"], unable, *refused, asked=6, options=("sink", "bias")))) == [
        "tested 2 of 12 tensors and conditions, in 1 of 6 cases",
        "largest error that holds: 2.5 sigma, in out of right",
        "no power in 2: there the judge could not have failed",
        "refused: no device (2 cases)",
        "not supported: sink, bias",
        "not given: backward not given",
        "in the signature, and tested in no case: sink, bias",
        "stopped after 5 of 6 cases",
    ]


def test_the_table_of_what_it_looks_like():
    found = [explained(f"case {i}", (("Delta is missing",), ("dq",), 0.5)) for i in range(4)]
    found += [explained(f"last {i}", (("lse=log2",), ("lse",), 0.5)) for i in range(3)]
    text = list(cli.summary(reported(*found), True))
    at = text.index(f"\n{'it looks like':58} cases")
    assert text[at + 1 : at + 3] == [
        f"  {'Delta is missing':56}     4  case 0, case 1, case 2, ...", f"  {'lse=log2':56}     3  last 0, last 1, last 2",
    ]  # fmt: skip
    assert not any("it looks like" in line for line in cli.summary(reported(MADE["right"]), True))


@pytest.mark.parametrize(
    ("made", "untested", "verdict", "status"),
    [
        (["right"], [], "RIGHT: mine holds in all that was tested, 2 of 4", 0),
        (["right", "known", "unable"], [], "RIGHT: mine holds in all that was tested, 4 of 7, 1 expected to fail", 0),
        (["right", "bad", "known"], ["sink"], "WRONG: mine falls short in 1 of 3 cases, 1 expected to fail: bad", 1),
        (["bad"] * 6, [], "WRONG: mine falls short in 6 of 6 cases: bad", 1),
        (["bad", "holds", "holds"], [], "UNEXPECTED: holds holds, and was expected to fail: take it off the list", 1),
        (["right"], ["sink", "dlse"], "NOT TESTED: sink, dlse, which --require asks for", 3),
        (["unable", "blind"], ["sink"], "NOTHING TESTED: mine supports none of these cases", 2),
    ],
)
def test_the_verdict_and_its_exit_status(made, untested, verdict, status):
    assert cli._verdict(reported(*(MADE[name] for name in made)), untested) == (verdict, status)


def test_the_verdict_names_four_of_the_cases_that_are_wrong():
    results = [dataclasses.replace(MADE["bad"], case=name) for name in "abcde"]
    assert cli._verdict(reported(*results), [])[0].endswith("5 of 5 cases: a, b, c, d, ...")
    assert cli._verdict(reported(*results[:4]), [])[0].endswith("4 of 4 cases: a, b, c, d")


# --- the command line -----------------------------------------------------------------------------------------------------

MINE = '''
    import numpy as np
    from npattn import attention_backward, attention_forward
    from npattn.verify import PRECISIONS
    from npattn.verify.rounded import rounded

    def right(q, k, v, *, mask=None, softcap=None):
        return attention_forward(q, k, v, mask=mask, softcap=softcap)[0]

    def backward(dout, q, k, v, *, mask=None, softcap=None):
        g = attention_backward(dout, attention_forward(q, k, v, mask=mask, softcap=softcap)[1])
        return g.q, g.k, g.v

    def uncapped(q, k, v, *, mask=None, softcap=None):
        return right(q, k, v, mask=mask)

    def refusing(q, k, v):
        raise NotImplementedError("no such device")

    def nearly(q, k, v):
        return right(q, k, v) * np.float32(1 + 1e-5)

    def without_alignment(q, k, v, *, causal=False, window=None):
        L, S = q.shape[-2], k.shape[-2]
        return right(q, k, v, mask=np.tri(L, S, S - L, dtype=bool) if causal else None)

    low, low_backward = rounded(PRECISIONS["float16-M2"])
'''


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["verify", *([] if any(a.startswith("--list") for a in arguments) else ["-v"]), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_known_failure_is_shown_and_the_exit_status_is_0(run):
    status, text, _ = run("theirs.py:uncapped", "--case", "softcap", "--expect-failure", "softcap=issue 12")
    assert text.startswith("  known  softcap ")
    assert status == 0
    assert "RIGHT: theirs.py:uncapped holds in all that was tested, 1 of 5, 1 expected to fail" in text
    status, text, _ = run("theirs.py:uncapped", "-k", "softcap", "--expect-failure", "*softcap*=12", "--no-diagnosis")
    assert (status, "\nTOO LITTLE TESTED: theirs.py:uncapped: " in text) == (3, True)  # nothing of all that holds
    assert "WRONG  softcap" not in text


def test_once_it_holds_the_run_fails(run):
    status, text, _ = run("theirs.py:right", "--case", "softcap", "--expect-failure", "softcap=issue 12")
    sentence = "UNEXPECTED: softcap holds, and was expected to fail: take it off the list"
    assert f"\n{sentence} (" in text
    assert f"`{sentence}`" in " ".join(PAGE.split())
    assert status == 1


def test_a_reason_may_have_an_equals_sign_in_it(run):
    status, text, _ = run("theirs.py:right", "--case", "plain", "--expect-failure", "plain = issue?id=12")
    assert status == 1
    assert "UNEXPECTED: plain holds" in text


def test_a_case_may_have_an_equals_sign_in_its_name(run):
    status, text, _ = run("theirs.py:right", "--case", "L = 1", "--expect-failure", " L = 1 = issue 12 ")
    assert status == 1
    assert "UNEXPECTED: L = 1 holds" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expect-failure", "softcup=issue 12"], "expected failure 'softcup': no such case"),
        (["--expect-failure", "softcap="], "expected failure 'softcap' has no reason"),
        (["--expect-failure", "softcap"], "--expect-failure softcap: expected CASE=REASON"),
        (["--expect-failure", "=issue 12"], "--expect-failure =issue 12: expected CASE=REASON"),
        (["--case", "softcup"], "--case softcup: no such case (did you mean 'softcap'?); --list lists them"),
        (["-k", "grouped"], "-k grouped: no case has that in its name"),
        (["--require", "softcup"], "--require softcup: no such feature, expected one of E != D, "),
        (["--convention", "causal=left"], "causal=left, expected one of top_left, bottom_right"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--json", "."], "--json .: Is a directory"),
        (["--save", "no/such.npz"], "--save no/such.npz: No such file or directory"),
        (["--op", "rnn", "--level", "bounded"], "level bounded is for attention, and theirs.py:right is rnn"),
        (["--op", "rnn", "--rule", "onnx"], "rules are for attention, and theirs.py:right is rnn"),
    ],
)
def test_usage_errors_say_what_is_wrong_and_exit_with_2(run, arguments, message):
    status, text, error = run("theirs.py:right", *arguments)
    assert status == 2
    assert text == ""
    assert error.startswith("npattn verify: ")
    assert message in error


@pytest.mark.parametrize("option", ["--level", "--precision", "--rule", "--op", "--causal", "--seed"])
def test_values_that_an_option_does_not_have_exit_with_2(run, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("theirs.py:right", option, "finest")
    assert stopped.value.code == 2
    assert f"argument {option}: invalid" in capsys.readouterr().err


def test_exit_statuses(run):
    assert run("theirs.py:right", "--case", "plain")[0] == 0
    assert run("theirs.py:right", "--case", "plain", "--require", "plain")[0] == 0
    assert run("theirs.py:uncapped", "--case", "softcap")[0] == 1
    status, text, _ = run("theirs.py:right", "--case", "plain", "--require", "backward", "--require", "sink")
    assert (status, "NOT TESTED: backward, sink, which --require asks for" in text) == (3, True)
    status, text, _ = run("theirs.py:refusing", "--case", "plain", "--require", "plain")
    assert (status, "NOTHING TESTED: theirs.py:refusing supports none of these cases" in text) == (2, True)
    assert "refused: no such device" in text
    assert run("theirs.py:right", "--backward", "backward", "--case", "plain", "--require", "backward")[0] == 0


def test_json_is_the_report(run, tmp_path):
    run("theirs.py:uncapped", "-k", "softcap 3", "--seed", "5", "--json", "found.json", "--level", "tight",
        "--expect-failure", "softcap 30=issue 12", "--rule", "onnx", "--rule", "allclose")  # fmt: skip
    text = (tmp_path / "found.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    candidate = dataclasses.replace(load(f"{tmp_path}/theirs.py:uncapped"), name="theirs.py:uncapped")
    report = verify(candidate, cases=[BY_NAME["softcap 30"]], seeds=[5], level="tight", rules=("onnx", "allclose"),
                    expected_failures={"softcap 30": "issue 12"})  # fmt: skip
    assert found == json.loads(json.dumps(report.as_json()))
    (result,) = found["results"]
    assert (result["seed"], result["expected"], result["status"]) == (5, "issue 12", "wrong")
    assert result["explanations"]
    assert result["checks"][0]["rules"] == {"onnx": False, "allclose": False}


def test_what_is_not_finite_is_null(run, tmp_path):
    run("theirs.py:uncapped", "--case", "NaN in values that are seen", "--json", "found.json")
    (tmp_path / "shape.py").write_text("def f(q, k, v):\n    return q[1:]\n")
    run("shape.py:f", "--case", "plain", "--json", "found.json")
    (result,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert result["checks"][0]["worst"] is None
    assert result["checks"][0]["rms"] == 0


def test_the_rule_is_printed_beside_the_verdict(run):
    """Values of 1e4 with a relative error of 1e-5, 8 times the rtol of torch.testing.assert_close; ONNX has 1e-3."""
    chosen = ["--case", "inputs V mean", "--no-diagnosis"]
    status, text, _ = run("theirs.py:nearly", *chosen, "--rule", "onnx", "--rule", "allclose")
    assert status == 1
    assert "\nrule onnx: rejects 0 of 1 tensors; npattn rejects 1; they differ in 1: inputs V mean: out\n" in text
    assert "\nrule allclose: rejects 1 of 1 tensors; npattn rejects 1\n" in text
    status, text, _ = run("theirs.py:right", "--case", "inputs V mean")
    assert (status, "rule" in text) == (0, False)


def test_a_class_is_declared(run):
    status, text, _ = run("theirs.py:low", "--backward", "low_backward", "--case", "plain", "--no-diagnosis")
    assert status == 1
    assert "\nIts errors are those of float16-M2: if that is what it computes in, declare --precision float16-M2 (" in text
    status, text, _ = run("theirs.py:low", "--backward", "low_backward", "--case", "plain", "--precision", "float16-M2")
    assert (status, "Its errors" in text) == (0, False)


def test_the_level_is_what_was_asked_for(run, tmp_path):
    """A relative error of 1e-5 is some hundred sigma, beyond det and good; the last bits are neither."""
    for level in (*LEVELS, "bounded"):
        assert run("theirs.py:nearly", "--case", "plain", "--level", level, "--no-diagnosis")[0] == 1
        assert run("theirs.py:right", "--case", "plain", "--level", level, "--json", "found.json")[0] == 0
        assert json.loads((tmp_path / "found.json").read_text())["level"] == level


def test_no_diagnosis_leaves_it_out(run):
    _, text, _ = run("theirs.py:uncapped", "--case", "softcap")
    assert "           => out: matches softcap is ignored to " in text
    assert "\nit looks like " in text
    _, text, _ = run("theirs.py:uncapped", "--case", "softcap", "--no-diagnosis")
    assert "=>" not in text
    assert "it looks like" not in text


def test_a_convention_is_declared(run):
    assert run("theirs.py:without_alignment", "--case", "causal top_left + L > S")[0] == 1
    for declared in (["--causal", "bottom_right"], ["--convention", "causal=bottom_right"]):
        assert run("theirs.py:without_alignment", "--case", "causal bottom_right + L > S", *declared)[0] == 0


def test_no_power_is_said_of_the_tensor(run):
    _, text, _ = run("theirs.py:right", "--backward", "backward", "--case", "S = 1", "--no-diagnosis")
    line = next(line for line in text.splitlines() if line.startswith("           no power: "))
    assert line == "           no power: dq (the true value is 0), dk (the true value is 0)"
    assert "\nno power in 2: there the judge could not have failed\n" in text
    _, text, _ = run("theirs.py:right", "--backward", "backward", "--case", "inputs V mean")
    shown = re.search("no power: dq .a relative error of 0.001 would pass.", PAGE)[0]
    assert f"           {shown}" in text
    assert " sigma in dv    of out, dv\n" in text


def test_x_stops_at_the_first_that_is_wrong_and_not_known(run):
    chosen = ["theirs.py:uncapped", "-k", "softcap", "-x", "--no-diagnosis"]
    _, text, _ = run(*chosen)
    assert "\nstopped after 1 of " in text
    _, text, _ = run(*chosen, "--expect-failure", "softcap=issue 12")
    assert "\nstopped after 2 of " in text
    assert "WRONG: theirs.py:uncapped falls short in 1 of 2 cases, 1 expected to fail: causal top_left + softcap (" in text


def test_k_takes_a_part_of_a_name_or_a_whole_feature(run):
    def listed(*arguments):
        status, text, _ = run("--list", *arguments)
        assert status == 0
        return [re.split("   *", line)[0] for line in text.splitlines()]

    assert listed() == names_of(CASES)
    assert listed("-k", "Softcap 3") == ["softcap 30"]
    assert listed("-k", "grouped heads") == [c.name for c in CASES if "grouped heads" in c.features]
    assert listed("-k", "dropout") == [c.name for c in CASES if "dropout" in c.name or "dropout" in c.features]
    assert listed("--case", "softcap") == ["softcap"]
    assert listed("--op", "softmax") == names_of(CASES_OF["softmax"])
    deep = listed("--deep")
    assert len(deep) == len(CASES) + 150
    assert [name for name in deep if name.startswith("random ")] == deep[len(CASES) :]


def test_deep_runs_three_seeds(run):
    status, text, _ = run("theirs.py:right", "--deep", "-k", "plain", "--seed", "4")
    assert status == 0
    shown = [line[9:49].strip() for line in text.splitlines() if line.startswith("  ok ")]
    assert shown == ["plain", "plain (seed 5)", "plain (seed 6)"]


def test_conventions_are_listed(run):
    status, text, _ = run("--list-conventions")
    assert status == 0
    lines = [line.strip() for line in text.splitlines()]
    fields, presets = text.split("\npresets\n")
    for name, field in FIELDS.items():
        assert any(line.startswith(f"{name} ") and line.endswith(field.meaning) for line in lines), name
        for value, meaning in field.values.items():
            assert re.search(rf"^    {re.escape(name)}={re.escape(value)} .*{re.escape(meaning)}$", fields, re.M), (name, value)
    for name, preset in PRESETS.items():
        changed = ", ".join(f"{n}={v}" for n, v in preset.convention.changes().items()) or "the first value of each"
        assert re.search(rf"^{name} +{re.escape(changed)}\n +{re.escape(preset.source)}", presets, re.M), name


def test_candidates_are_listed(run):
    status, text, _ = run("--list-candidates")
    assert status == 0
    for name in ("blockwise", "multi-head", "rnn", "softmax", "torch"):
        assert re.search(rf"^{name} ", text, re.M)


def test_the_error_in_a_line_is_the_largest_of_the_output(run):
    """|got - truth| over sigma, from the truth of loops: within what is left of the rounding of the truth itself."""
    problem = BY_NAME["B = 1, H = 1"].problem()
    want, got = loops(problem), right(problem.q, problem.k, problem.v)
    sigma = problem.truth(PRECISIONS["float32"]).sigma["out"]
    _, text, _ = run("theirs.py:right", "--case", "B = 1, H = 1")
    shown = float(re.match(r"  ok     B = 1, H = 1 +([\d.]+) sigma in out ", text)[1])
    half_a_digit = 0.5 * 10.0**-2  # two are shown
    assert shown == pytest.approx((abs_finite(got - want) / sigma).max(), rel=0, abs=half_a_digit)
