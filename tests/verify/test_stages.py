"""The stages: unchanged they agree with the reference, each change of them changes something, and a call has its facts."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import first
from oracles import attention_loops

from npattn import attention_backward, attention_forward
from npattn.ops.allowed import quiet
from npattn.ops.masks import as_mask
from npattn.tolerances import TIGHT_MAX
from npattn.verify import CASES, PRECISIONS, Candidate, Convention
from npattn.verify.conventions import FIELDS
from npattn.verify.op import facts
from npattn.verify.ops.attention.calls import canonical
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.ops.attention.changes import CHANGES
from npattn.verify.ops.attention.draw import SMALL, draw
from npattn.verify.ops.attention.errors import predict
from npattn.verify.stages import NOT_APPLICABLE, run


def everything(
    q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, causal=False, window=None,
    key_lengths=None, dlse=None,
):  # fmt: skip
    """A signature that takes all there is."""


def given(problem, align):
    """The arguments of a candidate that takes all there is."""
    return Candidate("all", everything, convention=Convention(causal=align)).arguments(problem, everything)[0]


def calls(case, dtype):
    """The problem, and its arguments under each alignment that makes a difference."""
    problem = canonical(case.problem())
    problem = problem if problem.dtype == dtype else problem.astype(dtype)  # as it is: a cast would undo its strides
    found = {align: given(problem, align) for align in ("top_left", "bottom_right")}
    aligned = {"causal", "window"} & {name for arguments in found.values() for name in arguments}
    return problem, found if aligned else {"top_left": found["top_left"]}


@quiet
def reference(problem):
    """Outputs and gradients, and the error that is predicted for another implementation in the same dtype."""
    (out, lse), cache = attention_forward(problem.q, problem.k, problem.v, **problem.arguments, return_lse=True)
    g = attention_backward(problem.dout, cache, problem.dlse)
    values = {"out": out, "lse": lse, "dq": g.q, "dk": g.k, "dv": g.v, "dbias": g.bias, "dsink": g.sink}
    e = predict(cache, out, problem.dout, problem.dlse, g, dtype=problem.dtype)
    sigma = dict(zip(values, e, strict=True))
    return {n: x for n, x in values.items() if x is not None}, sigma


@quiet
def off(got, want, sigma):
    """|got - want| in sigma; where the reference has an exact 0, in the median of sigma."""
    known = sigma[np.isfinite(sigma) & (sigma > 0)]
    sigma = np.maximum(sigma, np.median(known) if known.size else 1e-300)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    finite = np.isfinite(got) & np.isfinite(want)
    return np.where(same, 0.0, np.where(finite, np.abs(got - want) / sigma, np.inf))


# --- stages ---------------------------------------------------------------------------------------------------------------


ORDER = sorted(CASES, key=lambda c: (c.sizes["L"] * c.sizes["S"] > 50_000, CASES.index(c) % 3))


@pytest.mark.parametrize("case", first(len(CASES) // 3, ORDER), ids=lambda c: c.name)
def test_without_a_change_the_stages_are_attention(case):
    """Both are honest implementations in float64: they agree within twice what is allowed to one."""
    problem, arguments = calls(case, np.float64)
    want, sigma = reference(problem)
    for align, options in arguments.items():
        got = run(problem, options, align)
        assert set(got) == set(want)
        for name, x in want.items():
            assert got[name].shape == x.shape, f"{align}: {name}"
            assert off(got[name], x, sigma[name]).max(initial=0.0) <= TIGHT_MAX, f"{align}: {name}"


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_without_a_change_the_stages_are_the_loops(align):
    options = ("G < H", "E != D", f"causal {align}", "bias BHLS", "negative scale", "softcap", "sink", "dropout_mask", "dlse")
    problem = draw(options, 0, sizes=SMALL)
    allowed = np.broadcast_to(as_mask("mask", problem.arguments["mask"]).bind(problem.shape).dense(), problem.shape)
    want = attention_loops(
        problem.q, problem.k, problem.v, allowed=allowed, **{n: x for n, x in problem.options.items() if n != "mask"},
        dout=problem.dout, dlse=problem.dlse,
    )
    (_, sigma), got = reference(problem), run(problem, given(problem, align), align)
    assert "causal" in given(problem, align)
    for name, x in got.items():
        y = want[name if name in ("out", "lse") else name[1:]]
        assert off(x, y, sigma[name]).max(initial=0.0) <= TIGHT_MAX, name


def test_what_a_call_has_in_it():
    problem = canonical(BY_NAME["G < H + dlse"].problem())
    assert facts(problem, given(problem, "top_left")) == {"L != S", "grouped heads", "dlse"}
    problem = canonical(BY_NAME["mask array, L = S"].problem())
    assert facts(problem, given(problem, "top_left")) == {"L = S", "mask"}


# --- changes --------------------------------------------------------------------------------------------------------------

SAME = {
    "Delta is made of the weights of the backward": "the same sum",
    "a last tile of 128 queries is counted by L % 128": "no case has a multiple of 128 queries",
    **{f"window tiles of {n} x {m} are skipped by their last row": "no window is so narrow beside so many keys"
       for n, m in ((8, 64), (8, 128), (16, 64), (16, 128), (32, 128), (64, 128))},
    **{f"{x} is counted once a tile of {n} keys": "no case has a sink and so many keys"
       for x in ("sink", "dsink") for n in (64, 128)},
    **{f"dropout mask of the first {n} {x} for every tile": "no case has dropout and so many of them"
       for x in ("rows", "columns") for n in (64, 128)},
}  # fmt: skip
"""Changes that no case shows, and why."""

TILED = (  # where changes of a tile are looked for, beside causal masks and windows
    "plain", "bias BHLS", "dropout_mask", "dlse", "sink", "D = 17", "inputs tiniest", "whole tiles", "one more than a tile",
    "long", "long bias BHLS + softcap + dlse",
)  # fmt: skip


@quiet
def shows(change, problem, options, align, want, sigma):
    """Whether the change gives something else, clearly, in this call."""
    try:
        values = run(problem, options, align, [change], dtype=np.float64)
    except NOT_APPLICABLE:
        return False
    return any(
        values[n].shape != x.shape or off(values[n], x, sigma[n]).max(initial=0.0) > 100 for n, x in want.items() if n in values
    )


@pytest.mark.slow
def test_each_change_shows_in_some_case():
    left = dict(CHANGES)
    cases = [c for c in CASES if c.sizes["S"] < 10_000 and c.dtype == "float32"]
    for case in sorted(cases, key=lambda c: c.sizes["L"] * c.sizes["S"] > 5_000):
        large, truth = case.sizes["L"] * case.sizes["S"] > 5_000, None
        problem, arguments = calls(case, np.float32)
        for align, options in arguments.items():
            here = facts(problem, options)
            for name, change in list(left.items()):
                if not change.needs <= here or (large and (not change.tile or name in SAME)):
                    continue
                if change.tile and case.name not in TILED and not {"causal", "window"} & set(case.features):
                    continue
                truth = truth or problem.truth(PRECISIONS["float32"])
                if shows(change, problem, options, align, truth.values, truth.sigma):
                    del left[name]
    assert set(left) == set(SAME)
    assert len(CHANGES) > 300


def test_conventions_among_the_changes_are_values_of_fields():
    assert all(name == change.name for name, change in CHANGES.items())
    named = {"mask=drop", "lse=log2", "causal=bottom_right", "causal=top_left", "heads=tile", "scale=none", "window=total"}
    assert named <= {name for name, change in CHANGES.items() if change.convention}
    known = {f"{name}={value}" for name, field in FIELDS.items() for value in field.values}
    assert {name for name, change in CHANGES.items() if change.convention} <= known
