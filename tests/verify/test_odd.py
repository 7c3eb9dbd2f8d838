"""Candidates that are odd and alive: what they return, refuse and expect is said as it is, and gets no false name."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest

import npattn
from npattn import attention
from npattn.tolerances import GOOD_RMS
from npattn.verify import CASES, CASES_OF, Candidate, CandidateError, Case, examine, verify
from npattn.verify.ops import OPS
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.precision import PRECISIONS, round_to

SECOND = {
    "None": lambda out: None, "a list": lambda out: out.tolist(), "another shape": lambda out: out[:1],
    "a tuple": lambda out: (out,) * 5, "objects": lambda out: out.astype(object), "float64": lambda out: out.astype(np.float64),
}  # fmt: skip


@pytest.mark.parametrize("name", SECOND)
def test_a_second_call_that_gives_something_else_is_no_gap_but_wrong(name):
    calls = []

    def candidate(q, k, v):
        calls.append(1)
        out = attention(q, k, v)
        return out if len(calls) == 1 else SECOND[name](out)

    result = verify(candidate, cases=[BY_NAME["plain"]]).results[0]
    (check,) = [c for c in result.checks if c.status == "wrong"]
    assert check.tensor == "repeat"


ODD = {
    "objects": lambda out: out.astype(object), "texts": lambda out: out.astype(str), "complex": lambda out: out.astype(complex),
    "integers": lambda out: out.astype(int), "records": lambda out: np.zeros(out.shape, [("x", "f4")]),
    "dates": lambda out: out.astype(int).astype("M8[s]"), "masked": lambda out: np.ma.masked_array(out, mask=True),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("tensor", ["out", "lse"])
def test_an_output_of_another_kind_is_wrong_and_no_fault_of_ours(name, tensor):
    def candidate(q, k, v, *, mask=None):
        out, lse = attention(q, k, v, mask=mask, return_lse=True)
        return (ODD[name](out), lse) if tensor == "out" else (out, ODD[name](np.where(np.isfinite(lse), lse, 0)))

    for case in ("plain", "dead rows"):
        result = verify(candidate, cases=[BY_NAME[case]], rules=["flash2x"]).results[0]
        assert tensor in {c.tensor for c in result.checks if c.status == "wrong"}
        assert not any(tensor in e.tensors for e in result.explanations)


RANKS = [Case(" + ".join(o), o) for o in (("rank 2",), ("rank 5",), ("rank 2", "mask array"), ("rank 5", "mask array"))]


@pytest.mark.parametrize("raises", ["forward", "backward"])
def test_an_exception_at_another_rank_is_a_refusal(raises):
    def forward(q, k, v, *, mask=None):
        if raises == "forward":
            _b, _h, _l, _d = q.shape
        return attention(q, k, v, mask=mask)

    def backward(dout, q, k, v, *, mask=None):
        _b, _h, _l, _d = q.shape
        g = npattn.attention_backward(dout, npattn.attention_forward(q, k, v, mask=mask)[1])
        return g.q, g.k, g.v

    report = verify(forward, backward, cases=[BY_NAME["plain"], BY_NAME["causal top_left"], *RANKS])
    assert report.verdict() == "right"
    (text,) = report.refused
    assert text.startswith("takes arrays of rank 4 alone: ValueError: ")
    refused = [r for r in report.results if any(c.text.startswith("takes arrays of rank 4 alone") for c in r.checks)]
    assert report.refused[text] == len(refused) > 1
    assert {r.case for r in refused} <= {case.name for case in RANKS}


def test_a_wrong_result_at_another_rank_is_wrong_and_so_is_an_exception_at_the_usual_one():
    def other(q, k, v):
        return attention(q, k, v) * q.dtype.type(1 if q.ndim == 4 else 2)

    def raising(q, k, v):
        raise ValueError("no")

    assert {r.status for r in verify(other, cases=RANKS).results} >= {"wrong"}
    assert verify(raising, cases=[BY_NAME["plain"]]).verdict() == "wrong"


def test_an_array_of_a_subclass_is_taken_as_what_it_is_beneath():
    class Loud(np.ndarray):
        def __array_ufunc__(self, *what, **more):
            raise AssertionError("it was computed with")

    assert verify(lambda q, k, v: attention(q, k, v).view(Loud), cases=[BY_NAME["plain"]]).passed


# --- too little tested -----------------------------------------------------------------------------------------------------


def picky(q, k, v, *, mask=None, softcap=None):
    if q.shape[-1] != 64 or q.shape[-2] % 16 or k.shape[-2] % 64 or softcap:
        raise NotImplementedError("D is 64, and 16 divides L")
    return attention(q, k, v, mask=mask)


def forwards_only(dout, q, k, v, *, mask=None, softcap=None):
    raise NotImplementedError("no gradients yet")


def test_a_verdict_on_little_is_none():
    report = verify(picky, cases=[c for c in CASES if "mask" in c.name], diagnose=False)
    assert report.too_little
    assert not report.passed
    assert report.unused == ["softcap"]
    with pytest.raises(AssertionError, match=r"too little tested: its forward took .* It refused: D is 64, and 16 div"):
        report.require()
    some = [c for c in CASES if "whole tiles" in c.features and set(c.options) <= {"mask array", "window"}]
    assert verify(picky, cases=some[:2], diagnose=False).require().passed


def test_a_backward_that_refuses_everything_is_too_little():
    cases = [BY_NAME[n] for n in ("plain", "mask array", "softcap")]
    report = verify(Candidate("mine", attention, forwards_only), cases=cases)
    assert report.shares() == {"forward": (3, 3), "backward": (0, 3)}
    assert report.too_little
    assert verify(Candidate("mine", attention), cases=cases).passed  # none is given, and none is claimed


# --- names that would be false ---------------------------------------------------------------------------------------------


def explained(function, *names, **options):
    report = verify(function, cases=[BY_NAME[n] for n in names], **options)
    return report, list(report.diagnosis)


SOME = ("plain", "L > S", "inputs x5", "NaN behind the mask", "D = 64")


def test_another_dtype_is_all_that_is_said_of_it():
    report, said = explained(lambda q, k, v: attention(*(x.astype(np.float64) for x in (q, k, v))), *SOME)
    assert len(report.wrong) == 4  # NaN behind the mask needs a mask
    assert said == []
    assert all("has dtype float64, expected float32" in line for line in report.lines())
    _, said = explained(lambda q, k, v: (0.9 * attention(q, k, v)).astype(np.float64), "plain")
    assert said == ["out is 0.9 times what it should be"]  # what is wrong beside the dtype is still looked for


@pytest.mark.parametrize("value", [np.nan, 0.0, pytest.param(1.5, marks=pytest.mark.slow)])
def test_one_number_everywhere_is_no_mistake_of_masks_or_heads(value):
    def constant(q, k, v, *, mask=None):
        return np.full((*q.shape[:-1], v.shape[-1]), value, q.dtype)

    report, said = explained(constant, "plain", "mask array")
    assert len(report.wrong) == 2
    assert said == ["NaN everywhere" if np.isnan(value) else f"{value:g} everywhere"]


def test_a_mistake_that_ends_in_nan_everywhere_keeps_its_name_where_other_cases_hold():
    def no_maximum(q, k, v):
        with np.errstate(all="ignore"):
            e = np.exp(q.shape[-1] ** -0.5 * (q @ k.swapaxes(-1, -2)))
            return e / e.sum(-1, keepdims=True) @ v

    _, said = explained(no_maximum, "plain", "L > S", "inputs x30")
    assert said == ["no maximum is subtracted"]


def test_a_sum_that_is_kept_in_bfloat16_is_not_a_class_of_precision():
    def low(x):
        return round_to(np.asarray(x, np.float32), "bfloat16")

    def summed(a, b):
        total = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
        for j in range(0, a.shape[-1], 64):
            total = low(total + a[..., j : j + 64] @ b[..., j : j + 64, :])
        return total

    def candidate(q, k, v):
        s = low(q.shape[-1] ** -0.5 * summed(low(q), low(k).swapaxes(-1, -2)))
        p = np.exp(s - s.max(-1, keepdims=True))
        z = summed(p, np.ones((p.shape[-1], 1), np.float32))
        return low(summed(low(p), low(v)) / z)

    names = ("plain", "long, inputs tiny")
    report, _ = explained(candidate, *names, diagnose=False)
    assert len(report.wrong) == len(names)
    assert report.fits == ""
    declared = verify(candidate, cases=[BY_NAME[n] for n in names], precision="bfloat16-M3", diagnose=False)
    assert [r.case for r in declared.wrong] == ["long, inputs tiny"]


# --- expected failures, and other frameworks ------------------------------------------------------------------------------


def test_an_expected_failure_that_is_only_partly_tested_is_not_unexpected():
    """The failure may lie in what this candidate does not support."""

    def backward(dout, q, k, v, *, softcap=None, dropout_mask=None):
        if dropout_mask is not None:
            raise NotImplementedError("dropout in the backward")
        options = {"dropout_mask": dropout_mask}  # and softcap is forgotten
        g = npattn.attention_backward(dout, npattn.attention_forward(q, k, v, **options)[1])
        return g.q, g.k, g.v

    def forward(q, k, v, *, softcap=None, dropout_mask=None):
        return attention(q, k, v, softcap=softcap, dropout_mask=dropout_mask)

    cases = [BY_NAME[n] for n in ("plain", "softcap", "softcap + dropout_mask")]
    report = verify(forward, backward, cases=cases, expected_failures={"softcap*": "issue 12"}, diagnose=False)
    assert [r.case for r in report.unsettled] == ["softcap + dropout_mask"]
    assert report.unexpected == []
    assert report.passed
    report = verify(attention, cases=[BY_NAME["softcap"]], expected_failures={"softcap": "issue 12"})
    assert [r.case for r in report.unexpected] == ["softcap"]


def test_functions_written_for_tensors_are_told_so():
    def torchlike(q, k, v):
        return q @ k.transpose(-2, -1) @ v

    report = verify(torchlike, cases=[BY_NAME["plain"]])
    assert "axes don't match array" in report.lines()[0]
    assert "verify gives NumPy arrays and expects them back, and this function may want tensors of" in report.hints()[0]
    examined = examine(Candidate("mine", lambda q, k, v: [0.0]), BY_NAME["plain"])
    assert "is a list, expected a numpy.ndarray: np.array(out, np.float32)" in examined.checks[0].text


# --- found by an adversary ------------------------------------------------------------------------------------------------


def test_a_right_output_in_float64_is_not_without_power_for_what_only_its_gradients_show():
    def silu_in_float64(x):
        return npattn.silu(x)

    report = verify(silu_in_float64, op="silu", cases=[c for c in CASES_OF["silu"] if c.dtype == "float64"])
    assert report.tested == 2


def test_equal_results_prove_no_state_where_equal_results_were_due():
    def without_the_last(scores):
        e = np.exp(scores[..., :-1] - scores.max(-1, keepdims=True))
        return np.concatenate([e / e.sum(-1, keepdims=True), 0 * scores[..., :1]], -1)

    cases = [OPS["softmax"].by_name[name] for name in ("tiny", "constant rows")]
    assert not [text for text in verify(without_the_last, op="softmax", cases=cases).diagnosis if "state is kept" in text]


def test_what_a_class_does_not_round_is_as_exact_as_float32():
    def a_little_more(x):
        return npattn.silu(x) + np.float32(0.0025)

    assert verify(a_little_more, op="silu", precision="float8", cases=CASES_OF["silu"][:1]).wrong


def test_a_change_that_does_nothing_explains_nothing():
    case = CASES_OF["softmax"][0]
    sigma = case.problem().truth(PRECISIONS["float32"]).sigma["weights"]

    def one_element(scores):  # 40 sigma in one of 546: the rms of all is small
        weights = npattn.softmax(scores)
        weights[0, 0, 0, 0] += np.float32(40 * sigma[0, 0, 0, 0])
        return weights

    (wrong,) = verify(one_element, op="softmax", cases=[case]).wrong
    assert wrong.checks[0].rms < GOOD_RMS < wrong.checks[0].worst
    assert not [e.text for e in wrong.explanations if e.distance < np.inf]


def test_of_two_changes_alike_the_one_that_no_right_case_excludes_is_named():
    with np.errstate(all="ignore"):
        cases = [OPS["silu"].by_name[name] for name in ("x100", "inf and -inf")]
        (text,) = verify(lambda x: x / (1 + np.exp(-x)), op="silu", cases=cases).diagnosis
    assert text == "-inf times 0 is NaN"


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_cases_of_other_ranks(lead):
    mine = Case("mine", ("causal top_left",), sizes={"H": 2, "G": 2, "L": 5, "S": 5, "D": 4, "E": 4}, lead=lead)
    assert verify("blockwise", cases=[mine]).passed
    assert len(verify(lambda q, k, v, *, mask=None: npattn.attention(q, k, v), cases=[mine]).wrong) == 1


def test_silu_with_1_minus_s_as_torch_has_it_is_right():
    def backward(dy, x):
        s = 1 / (1 + np.exp(-x))
        return dy * s * (1 + x * (1 - s))

    case = dataclasses.replace(CASES_OF["silu"][0], draw=functools.partial(CASES_OF["silu"][0].draw, shift=12.0))
    assert not verify(npattn.silu, backward, op="silu", cases=[case]).wrong


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Candidate("x", npattn.silu, op="nope"), "op 'nope', expected one of attention"),
        (lambda: verify(None), "None is a NoneType, expected a function"),
        (lambda: verify(npattn.silu, op="silu", seeds=[-1]), "seed -1, expected 0 or more"),
        (lambda: verify(npattn.attention, cases=CASES_OF["rnn"]), "case 'plain' is of rnn, expected a case of attention"),
        (lambda: verify("softmax", convention="mask=drop"), "convention mask=drop: for attention, and softmax is softmax"),
    ],
)
def test_what_cannot_be_asked(call, text):
    with pytest.raises(CandidateError, match=re.escape(text)):
        call()


def test_a_constant_that_is_added_is_told():
    def with_another_lse(q, k, v):
        out, lse = npattn.attention(q, k, v, return_lse=True)
        return out, lse - np.float32(0.25)

    (text,) = verify(with_another_lse, cases=CASES_OF["attention"][:1]).diagnosis
    assert re.fullmatch(r"lse is off by -0\.25\d* everywhere|lse is off by -0\.2499\d* everywhere", text), text


def test_a_convention_that_a_call_has_no_use_for_changes_nothing_in_it():
    report = verify("blockwise", convention="dead_grad=leak,softcap=after_bias", cases=[BY_NAME["dead rows"]])
    assert report.wrong  # blockwise does not leak
