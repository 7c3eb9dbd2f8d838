"""How good a result has to be, and what is said of one that is not."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import theirs
from helpers import abs_finite
from oracles import attention_loops
from theirs import dense, refusing, right

from npattn import attention_backward, attention_forward
from npattn.tolerances import GOOD_MAX, GOOD_RMS, TIGHT_MAX, TIGHT_RMS
from npattn.verify import CASES, PRECISIONS, Candidate, examine, load, verify
from npattn.verify.judge import compare
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.precision import of_dtype

PAGE = (Path(__file__).parents[2] / "docs/verifying.md").read_text()
PLAIN = BY_NAME["plain"]

# --- levels ---------------------------------------------------------------------------------------------------------------


def off_by(error):
    """A forward that is off the truth of the plain case by error(values, sigma, det) in each element of its output."""
    problem = PLAIN.problem()
    truth = problem.truth(of_dtype(problem.dtype))
    out = truth.values["out"] + error(truth.values["out"], truth.sigma["out"], truth.det["out"])
    return lambda q, k, v: out.astype(np.float32)


def judged(forward, level):
    return verify(forward, cases=[PLAIN], level=level, diagnose=False).results[0].checks[0]


def one_element(shape):
    """1 in one place, 0 elsewhere."""
    at = np.zeros(shape)
    at.flat[7] = 1
    return at


@pytest.mark.parametrize(("level", "rms", "most"), [("tight", TIGHT_RMS, TIGHT_MAX), ("good", GOOD_RMS, GOOD_MAX)])
def test_a_level_bounds_the_rms_and_the_largest_error_in_sigma(level, rms, most):
    row = re.search(rf"\| `{level}`.*\| ([\d.]+) \| ([\d.]+) \|", PAGE)
    assert (float(row[1]), float(row[2])) == (rms, most)
    for factor, holds in ((0.9, True), (1.1, False)):
        everywhere = off_by(lambda out, sigma, det, f=factor: f * rms * sigma)
        once = off_by(lambda out, sigma, det, f=factor: f * most * sigma * one_element(out.shape))
        for forward in (everywhere, once):
            check = judged(forward, level)
            assert (check.status == "ok") == (check.level == level) == holds, check.text


def test_bounded_holds_up_to_det():
    for factor, status, level in ((0.9, "ok", "bounded"), (1.1, "wrong", "broken")):
        forward = off_by(lambda out, sigma, det, f=factor: f * det)
        check = judged(forward, "bounded")
        assert (check.status, check.level) == (status, level)
        assert judged(forward, "good").status == "wrong"
    assert judged(right, "bounded").status == "ok"


def test_the_error_is_the_largest_of_the_tensor_in_sigma():
    """|got - truth| over sigma, from the truth of loops: within what is left of the rounding of the truth itself."""
    problem = BY_NAME["B = 1, H = 1"].problem()
    want, got = attention_loops(problem.q, problem.k, problem.v)["out"], right(problem.q, problem.k, problem.v)
    sigma = problem.truth(PRECISIONS["float32"]).sigma["out"]
    (check, *_) = verify(right, cases=[BY_NAME["B = 1, H = 1"]]).results[0].checks
    assert check.worst == pytest.approx((abs_finite(got - want) / sigma).max(), rel=1e-3)


# --- what is said ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda q, k, v: right(q, k, v).astype(np.float64), "has dtype float64, expected float32"),
        (lambda q, k, v: right(q, k, v)[..., :1], "has shape"),
        (lambda q, k, v: right(q, k, v).tolist(), "expected a numpy.ndarray"),
        (lambda q, k, v: (q.__imul__(1.5), right(q, k, v))[1], "an input was modified"),
        (lambda q, k, v: np.zeros_like(right(q, k, v)), "expected"),
        (lambda q, k, v: np.full_like(right(q, k, v), np.nan), "is nan, expected"),
        (lambda q, k, v: [][0], "raises IndexError: list index out of range (test_judge.py:"),
    ],
    ids=["dtype", "shape", "kind", "modified", "zeros", "nan", "raises"],
)
def test_what_a_wrong_output_is_called(function, text):
    result = examine(Candidate("wrong", function), PLAIN)
    assert result.status == "wrong"
    assert text in result.checks[0].text


def test_not_implemented_is_no_failure():
    result = examine(Candidate("refusing", refusing), PLAIN)
    assert (result.status, result.checks[0].text) == ("refused", "no such device")


def test_places_are_named_by_the_tensor():
    want, sigma = np.zeros((2, 3, 4), np.float32), np.full((2, 3, 4), 1e-7)
    got = want.copy()
    got[1] = 1
    assert "batch 1" in compare("lse", got, want, sigma, [np.float32], letters="BHL").text
    got = np.zeros((2, 3, 4, 5), np.float32)
    got[:, :, 2] = 1
    text = compare("dk", got, np.zeros_like(got), np.full(got.shape, 1e-7), [np.float32], letters="BGSD").text
    assert "keys 2" in text
    assert "batch" not in text


@pytest.mark.parametrize(
    ("got", "want", "status"),
    [(np.inf, 1e5, "ok"), (-np.inf, -1e5, "ok"), (-np.inf, 1e5, "wrong"), (np.inf, np.nan, "wrong"), (np.nan, 1e5, "wrong"),
     (np.inf, 65500, "ok"), (65504, 65500, "ok"), (np.inf, 6e4, "wrong"), (65504, 1e5, "wrong")],
)  # fmt: skip
def test_a_number_that_its_dtype_does_not_hold_is_inf(got, want, status):
    sigma = np.abs(np.array([want])) * 2.0**-11
    assert compare("out", np.array([got], np.float16), np.array([want], np.float64), sigma, [np.float16]).status == status


# --- what a candidate is given --------------------------------------------------------------------------------------------


def test_the_backward_gets_what_it_names():
    seen = {}

    def forward(q, k, v):
        return attention_forward(q, k, v, return_lse=True)[0]

    def backward(dout, q, k, v, *, out, lse, dlse=None):
        seen["out"], seen["lse"] = out, lse
        g = attention_backward(dout, attention_forward(q, k, v)[1], dlse)
        return g.q, g.k, g.v

    assert [c.status for c in examine(Candidate("own", forward, backward), BY_NAME["dlse"]).checks] == ["ok"] * 5
    assert seen["lse"].shape == seen["out"].shape[:-1]


def test_a_candidate_takes_causal_window_and_key_lengths_its_own_way():
    calls = []

    def forward(q, k, v, *, causal=False, window=None, key_lengths=None):
        calls.append((causal, window, key_lengths))
        L, S = q.shape[-2], k.shape[-2]
        distance = np.arange(S) - np.arange(L)[:, None]
        mask = np.ones((1, 1, L, S), bool)
        if causal:
            mask = mask & (distance <= 0)
        if window is not None:
            mask = mask & (distance >= -window[0]) & (distance <= window[1])
        if key_lengths is not None:
            mask = mask & (np.arange(S) < key_lengths[:, None, None, None])
        return attention_forward(q, k, v, mask=mask)[0]

    names = ("causal top_left", "window", "key_lengths", "window + key_lengths", "causal top_left + key_lengths")
    results = verify(forward, cases=[BY_NAME[name] for name in names], diagnose=False).results
    assert [r.status for r in results] == ["ok"] * 5
    assert any(c[1] is not None and c[2] is not None for c in calls)
    (r,) = verify(forward, cases=[BY_NAME["causal bottom_right"]]).results
    assert (r.status, r.checks[0].text) == ("not supported", "causal bottom_right")


# --- whether it could have failed -----------------------------------------------------------------------------------------

LIES = {
    "scale 0": "scale = q.shape[-1] ** -0.5 if not scale else scale",
    "NaN in values that are seen": "v = np.nan_to_num(v)",
    "NaN in a key that is seen": "k = np.nan_to_num(k)",
    "sink of -inf": "sink = None if sink is None else np.where(sink == -np.inf, np.float32(np.nan), sink)",
    "mask of one row": "mask = None if mask is None else np.broadcast_to(mask[..., :1, :] & (mask.shape[-2] > 1), mask.shape)",
}


@pytest.mark.parametrize("case", LIES)
def test_small_lies_are_seen(case):
    first = "    group = q.shape[1]"
    lying = inspect.getsource(dense).replace(first, f"    {LIES[case]}\n{first}", 1)
    scope = dict(vars(theirs))
    exec(lying, scope)
    assert examine(Candidate("lie", scope["dense"]), BY_NAME[case]).status == "wrong"
    assert examine(Candidate("honest", dense), BY_NAME[case]).status == "ok"


@pytest.mark.parametrize("case", [c.name for c in CASES if c.dtype == "float64" and "-1e10" not in c.name])
def test_a_change_that_does_nothing_takes_no_power(case):
    """Alignment where nothing is aligned, and the noise of float64: 'causal=top_left' would pass, and so it should."""
    assert {c.status for c in examine(load("blockwise"), BY_NAME[case]).checks} == {"ok"}
