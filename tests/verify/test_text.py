"""What verify says to people of a report."""

import dataclasses
import math
import re

import numpy as np
import pytest
from made import ABSENT, BAD, BLIND, DQ, LSE, OK, RESULTS, SINK, explained, reported
from theirs import right, with_names_of_torch

import npattn
from npattn import attention
from npattn.verify import CASES_OF, Check, Result, check, text, verify
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.search import Explanation
from npattn.verify.space import Coverage

# --- the verdict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "require", "verdict"),
    [
        (["right"], [], "RIGHT: mine holds in all that was tested, 2 of 4"),
        (["right", "known", "unable"], [], "RIGHT: mine holds in all that was tested, 4 of 7, 1 expected to fail"),
        (["right", "bad", "known"], ["sink"], "WRONG: mine falls short in 1 of 3 cases, 1 expected to fail: bad"),
        (["bad"] * 6, [], "WRONG: mine falls short in 6 of 6 cases: bad"),
        (["bad", "holds", "holds"], [], "UNEXPECTED: holds holds, and was expected to fail: take it off the list"),
        (["right"], ["sink", "dlse"], "NOT TESTED: sink, dlse, which --require asks for"),
        (["unable", "blind"], ["sink"], "NOTHING TESTED: mine supports none of these cases"),
    ],
)
def test_the_verdict_is_a_sentence(results, require, verdict):
    assert text.verdict(reported(*results), require) == verdict


def test_an_interrupted_run_says_what_holds_so_far():
    assert text.verdict(reported("right", interrupted=True)) == (
        "INTERRUPTED: mine holds in what was tested before that, 2 of 4"
    )
    assert text.verdict(reported("unable", interrupted=True)) == "INTERRUPTED: mine was not tested"


def test_the_verdict_names_four_of_the_cases_that_are_wrong():
    results = [dataclasses.replace(RESULTS["bad"], case=name) for name in "abcde"]
    assert text.verdict(reported(*results)).endswith("5 of 5 cases: a, b, c, d, ...")
    assert text.verdict(reported(*results[:4])).endswith("4 of 4 cases: a, b, c, d")


# --- what is wrong --------------------------------------------------------------------------------------------------------


def test_a_line_for_each_tensor_that_is_wrong_and_each_case_that_holds():
    two = Result("two", ["plain"], [BAD, LSE, DQ])
    assert reported(*RESULTS, two).lines() == [
        "bad: out: out[0] is 2", "two: out: out[0] is 2", "two: dq: dq[1] is nan",
        "holds: was expected to fail (issue 2), and holds",
    ]  # fmt: skip
    assert reported("right", "known", "unable").lines() == []


def test_a_failed_requirement_says_what_is_wrong_and_what_it_looks_like():
    looks = [(("Delta is missing",), ("dq",), 0.5), (("mask ignored",), ("out",), 1.0), (("lse=log2",), ("lse",), 1.0)]
    results = [explained(f"case {i}", *looks[: 1 + (i < 7) + (i < 4)]) for i in range(12)]
    results.append(explained("last", (("dlse=ignored",), ("dq",), 0.1)))
    assert text.failure(reported(*results, "holds", "known")).splitlines() == [
        "mine falls short in 14 cases:",
        "  it looks like: Delta is missing (12 cases)", "  it looks like: mask ignored (7 cases)",
        "  it looks like: lse=log2 (4 cases)",
        "case 0, case 1, case 2, ...: out: out[0] is 2", "holds: was expected to fail (issue 2), and holds",
    ]  # fmt: skip


def test_a_failed_requirement_shows_ten_lines():
    results = [Result(f"case {i}", ["plain"], [Check("out", "wrong", f"out[0] is {i}")]) for i in range(14)]
    lines = [f"case {i}: out: out[0] is {i}" for i in range(10)]
    assert text.failure(reported(*results)).splitlines()[1:] == [*lines, "... and 4 more"]
    assert text.failure(reported(*results[:10]), ["window"]).splitlines()[1:] == lines


def naive(q, k, v):
    s = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True) @ v


def test_who_raises_for_what_it_does_not_support_is_told_what_to_raise():
    with pytest.raises(AssertionError, match=r"(?s)G < H: out: raises ValueError.*let it raise NotImplementedError"):
        check(naive, cases=[BY_NAME["plain"], BY_NAME["G < H"]])

    def forward(q, k, v):
        raise TypeError("unsupported argument type")

    (told,) = verify(forward, cases=[BY_NAME["plain"]]).hints()
    assert "let it raise NotImplementedError" in told


def test_who_cannot_be_called_is_told_how():
    (told,) = verify(right, lambda dout, cache: dout, cases=[BY_NAME["plain"]]).hints()
    assert told.startswith("verify calls forward(q, k, v, *, mask, ...) and backward(dout, q, k, v, ")
    rnn = next(case for case in CASES_OF["rnn"] if case.name == "plain")
    (told,) = verify(npattn.rnn, lambda dh: dh, op="rnn", cases=[rnn]).hints()
    assert told.startswith("verify calls forward(x, h0, params, *, lengths, ...) and backward(dh, x, h0, params,")


def test_keywords_that_verify_does_not_know_are_pointed_out():
    (told,) = verify(with_names_of_torch, cases=[BY_NAME["plain"]]).hints()
    assert told.startswith("It also takes attn_mask, is_causal, which verify never gives: its names are mask, bias, ")
    assert verify(attention, cases=[BY_NAME["plain"]]).hints() == []


# --- a line for a case ----------------------------------------------------------------------------------------------------


def described(checks, *more, first_seed=0, **fields):
    return list(text.describe(Result("a", ["plain"], checks, *more, **fields), first_seed))


def test_a_case_that_holds_has_one_line_with_its_worst_error():
    checks = [OK, LSE, ABSENT, Check("repeat", "ok"), Check("hull", "ok")]
    assert described(checks) == [f"  ok     {'a':40}       2.5 sigma in out   of out, lse; 2 conditions"]
    assert next(text.describe(RESULTS["holds"])).startswith("  ok     holds ")
    assert described([OK], seed=4, first_seed=4)[0].startswith("  ok     a  ")
    assert described([OK], seed=4, first_seed=3)[0].startswith("  ok     a (seed 4)  ")


def test_a_case_that_is_wrong_has_a_line_for_each_tensor_and_what_it_looks_like():
    checks = [BAD, LSE, Check("dq", "wrong", "has shape (1,)", worst=math.inf), BLIND]
    why = [Explanation(("x", "y"), ("dq",), 0.5, "in the backward")]
    first, lines = f"{'a':40}         - sigma in dq    of out, lse, dq", [
        "           no power: dk (zeros would pass)", "           out[0] is 2", "           dq has shape (1,)",
        "           => dq: matches x and y in the backward to 0.5 sigma",
    ]  # fmt: skip
    assert described(checks, why) == [f"  WRONG  {first}", *lines]
    assert described(checks, why, "issue 12") == [f"  known  {first}", *lines]


def test_a_tensor_of_one_letter_is_named_too():
    wrong = Check("h", "wrong", "has shape (2, 3), expected (2, 4)", worst=math.inf)
    assert described([wrong])[1:] == ["           h has shape (2, 3), expected (2, 4)"]


def test_a_case_that_was_not_tested_has_the_reason():
    unable = [SINK, Check("lse", "not supported", "sink")]
    assert described(unable) == [f"  --     {'a':40} not supported: sink"]
    assert described([*unable, ABSENT]) == [f"  --     {'a':40} not given: sink, backward not given"]


# --- tables ---------------------------------------------------------------------------------------------------------------


def rows(*results):
    """The lines of the table by their feature, spaces squeezed."""
    lines = list(text.table(reported(*results)))
    return {line.split("  ")[0]: re.sub(" +", " ", line) for line in lines[1:-1]}


def test_a_table_by_feature():
    found = rows(*RESULTS, Result("worse", ["plain"], [dataclasses.replace(OK, worst=3.5)]))
    assert found["plain"] == "plain 3 of 5 3.5 out[0, 1, 2] in worse"
    assert found["causal"] == "causal 4 of 4 99 out[0] in bad WRONG"
    assert found["backward"] == "backward 1 of 4 - dq[1] in known known"
    assert found["window"] == "window 0 of 1 zeros would pass"
    assert found["lse"] == "lse 2 of 2 1.25 lse[3] in right"
    unable = Result("s", ["sink"], [SINK, Check("lse", "not supported", "bias, sink")])
    assert rows(unable)["sink"] == "sink 0 of 2 sink, bias"


def test_what_is_wrong_is_named_before_what_is_merely_larger():
    small = Check("dq", "wrong", "dq[2] is 0", 2.0, 3.0, (2,), "bounded")
    large = dataclasses.replace(OK, worst=7.0)
    assert rows(Result("a", ["plain"], [large, small]))["plain"] == "plain 2 of 2 3 dq[2] in a WRONG"


def test_how_much_was_tested_and_why_the_rest_was_not():
    unable = Result("s", ["sink"], [SINK, Check("lse", "not supported", "bias, sink"), ABSENT])
    refused = [Result(name, ["plain"], [Check(tensor, "refused", "no device") for tensor in ("out", "dq")]) for name in "ab"]
    assert list(text.coverage(reported("right", "blind", unable, *refused, asked=6, options=("sink", "bias")))) == [
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
    lines = list(text.summary(reported(*found), True))
    at = lines.index(f"\n{'it looks like':58} cases")
    assert lines[at + 1 : at + 3] == [
        f"  {'Delta is missing':56}     4  case 0, case 1, case 2, ...", f"  {'lse=log2':56}     3  last 0, last 1, last 2",
    ]  # fmt: skip
    assert not any("it looks like" in line for line in text.summary(reported("right"), True))


def test_without_v_three_cases_that_are_wrong_are_shown():
    bad = [dataclasses.replace(RESULTS["bad"], case=name) for name in "abcde"]
    lines = list(text.summary(reported(*bad), False))
    assert [line[9:10] for line in lines if line.startswith("  WRONG  ")] == ["a", "b", "c"]
    assert lines[-1] == "  and 2 more cases; -v shows all"
    assert list(text.summary(reported(*bad[:3]), False))[-1] == "  -v shows all"


def test_names_of_drawn_cases_are_counted_and_written_once():
    name = "drawn: H=2 G=2 L=9 S=7 D=5 E=5; mask=one hole"
    found = [explained(case, (("Delta is missing",), ("dq",), 0.5)) for case in ("plain", f"{name}; softcap=softcap", name)]
    report = reported(*found[1:], *found[:1])
    assert text.verdict(report) == "WRONG: mine falls short in 3 of 3 cases: plain, 2 drawn"
    lines = list(text.summary(report, False))
    assert any(re.fullmatch(r"  Delta is missing +3  plain, 2 drawn", line) for line in lines)
    assert sum(f"{name} " in line for line in lines) == 1


def test_what_was_met_of_the_space_and_what_wrong_cases_have_in_common():
    found = Coverage("pairs", 9, 7, 8, None, {"order": ["none"]}, ["order causal top_left", "D=64"], [], 7, ("heads 3 / 1",))
    assert list(text.space(reported("bad", coverage=found))) == [
        "9 cases drawn: of the pairs of classes that it takes, 7 of 8 were met", "  common to all 7 wrong: heads 3 / 1",
        "  it takes only order causal top_left; D=64", "  never tested: order none",
    ]  # fmt: skip


def test_what_the_rules_of_other_suites_say_is_summed_up():
    right = Check("dv", "ok", rules={"onnx": True, "torch": True})
    lenient = Check("out", "wrong", rules={"onnx": True, "torch": False})
    strict = Check("dq", "no power", rules={"onnx": False, "torch": True})
    results = [Result("a", ["plain"], [right, lenient, strict, ABSENT])]
    results += [Result(f"b{i}", ["plain"], [lenient]) for i in range(4)]
    assert list(text.rules(reported(*results, rules=("onnx", "torch")))) == [
        "\nrule onnx: rejects 1 of 7 tensors; npattn rejects 5; they differ in 6: "
        "a: out, a: dq, b0: out, b1: out, b2: out, ...",
        "\nrule torch: rejects 5 of 7 tensors; npattn rejects 5",
    ]
