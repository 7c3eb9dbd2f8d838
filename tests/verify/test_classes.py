"""Classes of precision: what a declared one gives and hides, and which one is told of errors that are too large."""

from pathlib import Path

import numpy as np
import pytest
from helpers import first
from theirs import right, uncapped, wrong

from npattn import attention
from npattn.verify import PRECISIONS, text, verify
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.precision import round_to
from npattn.verify.rounded import rounded

PAGE = (Path(__file__).parents[2] / "docs/verifying.md").read_text()
THREE = [BY_NAME[name] for name in ("plain", "softcap", "mask array")]


def test_a_declared_class_gives_inputs_that_its_format_holds_and_leaves_float64_out():
    given = {}

    def forward(q, k, v):
        given["q"] = q
        return right(q.astype(np.float32), k.astype(np.float32), v.astype(np.float32))

    cases = [BY_NAME["plain"], BY_NAME["float64"]]
    for name, dtype in (("float16-M1", np.float16), ("bfloat16-M1", np.float32), ("float8", np.float32)):
        report = verify(forward, cases=cases, precision=name)
        assert report.precision == name
        assert [r.status for r in report.results] == ["ok", "not supported"]  # out comes back in float32
        assert given["q"].dtype == dtype
        assert (round_to(given["q"].astype(np.float32), PRECISIONS[name].storage) == given["q"]).all()
    verify(forward, cases=cases[:1])
    assert (round_to(given["q"], "bfloat16") != given["q"]).any()


# --- which one is told ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tf32", "float16-M1", "bfloat16-M1", "bfloat16-M2"])
def test_errors_of_another_class_are_told(name):
    report = verify(*rounded(PRECISIONS[name]), cases=THREE, diagnose=False)
    assert (len(report.wrong), report.fits) == (3, name)
    sentence = f"Its errors are those of {name}: if that is what it computes in, declare --precision {name}"
    assert text.verdict(report).splitlines()[1] == sentence
    assert sentence.replace(name, "bfloat16-M2") in " ".join(PAGE.split())
    assert verify(*rounded(PRECISIONS[name]), cases=THREE[:1], precision=name).passed


@pytest.mark.parametrize("declared", [None, "bfloat16-M1"])
@pytest.mark.parametrize("name", ["bfloat16-M2", "bfloat16-M3"])
def test_the_class_is_told_on_inputs_that_it_holds(name, declared):
    """On others the rounding of the inputs hides that of P and dS: M1 would seem to fit."""
    cases = [BY_NAME[case] for case in ("plain", "mask array", "inputs x30")]
    assert verify(*rounded(PRECISIONS[name]), cases=cases, precision=declared, diagnose=False).fits == name


@pytest.mark.parametrize("declared", [None, "float16-M1"])
def test_no_other_class_is_told_of_one_that_is_right_or_wrong_otherwise(declared):
    for forward in (right, wrong, uncapped, lambda q, k, v: np.nan * q, lambda q, k, v: q[1:]):
        assert verify(forward, cases=THREE[:2], precision=declared, diagnose=False).fits == ""


def test_another_class_than_the_declared_one_is_told():
    report = verify(*rounded(PRECISIONS["bfloat16-M1"]), cases=THREE[:1], precision="float16-M1", diagnose=False)
    assert (len(report.wrong), report.fits) == (1, "bfloat16-M1")


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
    assert ([r.case for r in report.wrong], report.fits) == (["mask array"], "")


# --- mistakes in low precision --------------------------------------------------------------------------------------------


ROUNDED_DELTA = "the output rounded to 8 bits before Delta"


def backward_with(bug):
    """An ordinary backward with one mistake; it computes in float32, and returns the inputs' dtype."""

    def backward(dout, q, k, v, *, softcap=None, causal=False):
        dtype, (dout, q, k, v) = q.dtype, (x.astype(np.float32) for x in (dout, q, k, v))
        (B, H, L, D), (_, G, S, _) = q.shape, k.shape
        scale, cap = np.float32(D**-0.5), np.float32(softcap or 1)
        kh, vh = (np.repeat(x, H // G, 1) for x in (k, v))
        s = q @ kh.swapaxes(-1, -2) * scale
        t = np.tanh(s / cap)
        s = s if softcap is None else cap * t
        s = np.where(np.tri(L, S, 0 if bug == "causal=top_left" else S - L, dtype=bool), s, -np.inf) if causal else s
        e = np.exp(s - s.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
        out = round_to(p @ vh, "bfloat16") if bug == ROUNDED_DELTA else p @ vh
        ds = p * (dout @ vh.swapaxes(-1, -2) - (dout * out).sum(-1, keepdims=True)) * scale
        ds = ds if softcap is None or bug == "the derivative of the softcap is missing" else ds * (1 - t * t)
        dk, dv = (x.reshape(B, G, H // G, *x.shape[2:]).sum(2) for x in (ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout))
        dv = dv / (H // G) if bug == "dv is the mean of a group" else dv
        return tuple(x.astype(dtype) for x in (ds @ kh, dk, dv))

    return backward


def in_float32(q, k, v, *, softcap=None, causal=False):
    mask = np.tri(q.shape[-2], k.shape[-2], k.shape[-2] - q.shape[-2], dtype=bool) if causal else None
    return right(*(x.astype(np.float32) for x in (q, k, v)), mask=mask, softcap=softcap).astype(q.dtype)


@pytest.mark.parametrize(
    ("bug", "case"),
    first(1, [("causal=top_left", "causal bottom_right"), ("dv is the mean of a group", "G < H"),
              ("the derivative of the softcap is missing", "softcap")]),
)  # fmt: skip
def test_a_bug_has_its_name_in_half_precision_too(bug, case):
    declared = {"precision": "float16-M1", "convention": "causal=bottom_right", "cases": [BY_NAME[case]]}
    assert verify(in_float32, backward_with(""), **declared).passed
    found = verify(in_float32, backward_with(bug), **declared).diagnosis
    assert {name.partition(" in the backward")[0] for name in found} == {bug}


def test_a_rounded_delta_is_named_and_no_class_is_offered_for_a_right_forward():
    report = verify(attention, backward_with(ROUNDED_DELTA), cases=[BY_NAME["plain"], BY_NAME["softcap"]])
    assert (set(report.diagnosis), report.fits) == ({ROUNDED_DELTA}, "")
