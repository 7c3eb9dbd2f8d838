"""The acceptance rules of other suites, and that they change nothing of a verdict."""

import dataclasses

import numpy as np
import pytest
from oracles import attention_loops
from theirs import right, wrong

from npattn.verify import PRECISIONS, Case, verify
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.ops.attention.draw import SMALL
from npattn.verify.rounded import rounded
from npattn.verify.rules import RULES

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
        assert RULES[rule](planted(want, bound, factor), want, low, tensor, dtype)
    for factor in (1.02, -1.02):
        assert not RULES[rule](planted(want, bound, factor), want, low, tensor, dtype)
    for here, there, accepted in ((np.nan, np.nan, True), (np.nan, 1.0, False), (1.0, np.inf, False), (np.inf, np.inf, True)):
        got, other = want.copy(), want.copy()
        got[1, 1], other[1, 1] = here, there
        with np.errstate(invalid="ignore"):
            assert RULES[rule](got, other, low, tensor, dtype) == accepted, (here, there)


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
    want, (rtol, atol) = attention_loops(problem.q, problem.k, problem.v)["out"], CLOSE[dtype]
    bound = {
        "flash2x": 2 * np.abs(eager(problem) - want).max() + 1e-5,
        "onnx": 1e-7 + 1e-3 * np.abs(want),
        "allclose": atol + rtol * np.abs(want),
    }[rule]
    for factor, accepted in ((0.9, True), (1.1, False)):
        out = want + 0 * bound
        out.flat[7] += factor * np.broadcast_to(bound, want.shape).flat[7]
        out = out.astype(np.float64 if dtype == "float64" else np.float32)
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
        assert [dataclasses.replace(r, checks=[dataclasses.replace(c, rules={}) for c in r.checks]) for r in beside] == without


def test_a_tensor_of_another_shape_is_accepted_by_no_rule():
    report = verify(lambda q, k, v: q[:, :, 1:], cases=[BY_NAME["plain"]], rules=RULES, diagnose=False)
    assert report.results[0].checks[0].rules == dict.fromkeys(RULES, False)
