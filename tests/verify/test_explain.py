"""Diagnosis: what a candidate does is named.

The candidates here are written by hand: a dense implementation of `npattn.verify.rounded`, given
other arguments than those it was called with, or with its results changed.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from helpers import first

from npattn.ops.allowed import quiet
from npattn.verify import CASES, PRECISIONS, Candidate, Convention, Settings, examine
from npattn.verify.explain import Diagnostician, places
from npattn.verify.judge import AXIS_WORDS
from npattn.verify.ops.attention.cases import BY_NAME, Case
from npattn.verify.precision import round_to
from npattn.verify.rounded import rounded
from npattn.verify.search import UNKNOWN, distance

# --- candidates written by hand -------------------------------------------------------------------------------------------

honest_forward, honest_backward = rounded(PRECISIONS["float32"])


@pytest.fixture(autouse=True)
def _as_long_as_it_takes(monkeypatch):
    """No search is cut short: what is found does not depend on the machine."""
    monkeypatch.setattr(Diagnostician.__init__, "__defaults__", ("top_left", math.inf, 3, math.inf))


def changed(arguments=lambda o, q, k: o, out=lambda x: x, lse=lambda x: x, keys=lambda x, H: x, grads=lambda g: g):
    """The honest implementation with other arguments than those given, and with what it returns changed; the backward too."""

    def options_of(q, k, options):
        options = arguments(dict(options), q, k)
        if options.pop("causal", False):
            options["mask"] = tri(q, k, options.pop("align", "top_left"), options.get("mask"))
        options.pop("align", None)
        return options

    def forward(
        q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, causal=False,
    ):  # fmt: skip
        options = options_of(q, k, {
            "mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink, "dropout_mask": dropout_mask,
            "causal": causal})  # fmt: skip
        o, log = honest_forward(q, keys(k, q.shape[1]), keys(v, q.shape[1]), **options)
        return out(o), lse(log)

    def backward(
        dout, q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, causal=False, dlse=None,
    ):  # fmt: skip
        options = options_of(q, k, {
            "mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink, "dropout_mask": dropout_mask,
            "causal": causal})  # fmt: skip
        return grads(honest_backward(dout, q, k, v, **options, dlse=dlse))

    return forward, backward


def tri(q, k, align, mask=None):
    L, S = q.shape[-2], k.shape[-2]
    lower = np.tri(L, S, S - L if align == "bottom_right" else 0, dtype=bool)
    return lower if mask is None else lower & mask


def explained(forward, backward, *names, case="plain", pairs=0):
    """The explanations of the last case, after those before it."""
    owner = Diagnostician(pairs=pairs)
    tested = Candidate("by hand", forward, backward)
    for name in (*names, case):
        row = BY_NAME[name] if isinstance(name, str) else name
        result = examine(tested, row, 0, Settings(power=False), owner)
    assert result.status == "wrong"
    return result.explanations


def at_the_end(o, q, k):
    return o | {"align": "bottom_right"}


def in_base_2(x):
    return x / np.float32(math.log(2))


def said(found):
    return {name for e in found for name in e.names}


def test_the_honest_one_needs_no_explanation():
    owner = Diagnostician()
    for name in ("plain", "causal top_left", "everything", "dead rows + sink", "inputs x5"):
        assert examine(Candidate("honest", *changed()), BY_NAME[name], 0, Settings(power=False), owner).status == "ok", name
    assert not owner.known


@pytest.mark.parametrize(
    ("forward", "case", "names", "tensors"),
    [
        ({"arguments": at_the_end}, "causal top_left", ("causal=bottom_right",), ("out", "lse")),
        ({"lse": in_base_2}, "plain", ("lse=log2",), ("lse",)),
        ({"arguments": lambda o, q, k: o | {"scale": 1.0}}, "plain", ("scale=none",), ("out", "lse")),
        ({"arguments": lambda o, q, k: o | {"mask": ~o["mask"]}}, "mask array", ("mask=drop",), ("out", "lse")),
        ({"keys": lambda x, H: x[:, np.arange(H) % x.shape[1]]}, "G < H", ("heads=tile",), ("out", "lse")),
        ({"arguments": lambda o, q, k: o | {"bias": -o["bias"]}}, "bias BHLS", ("bias has the other sign",), ("out", "lse")),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_one_change_of_the_forward_is_named(forward, case, names, tensors):
    found = explained(changed(**forward)[0], None, case=case)
    assert [e.names for e in found] == [names]
    assert found[0].tensors == tensors
    assert found[0].distance < 3
    assert found[0].text.startswith(f"{', '.join(tensors)}: matches {names[0]} to ")


PAIRS = {
    ("causal=bottom_right", "lse=log2"): ({"arguments": at_the_end, "lse": in_base_2}, "causal top_left"),
    ("heads=tile", "lse=log2"): ({"keys": lambda x, H: x[:, np.arange(H) % x.shape[1]], "lse": in_base_2}, "G < H"),
    ("scale=none", "lse=log2"): ({"arguments": lambda o, q, k: o | {"scale": 1.0}, "lse": in_base_2}, "plain"),
    ("causal=bottom_right", "scale=none"): (
        {"arguments": lambda o, q, k: o | {"scale": 1.0, "align": "bottom_right"}}, "causal top_left"),
}  # fmt: skip


@pytest.mark.parametrize("names", PAIRS)
def test_two_changes_together_are_found(names):
    """Not each by itself: out and lse are explained together."""
    (e,) = explained(changed(**PAIRS[names][0])[0], None, case=PAIRS[names][1], pairs=1)
    assert set(e.names) == set(names)
    assert e.tensors == ("out", "lse")


def test_no_more_searches_for_two_than_allowed():
    owner = Diagnostician(pairs=0)
    tested = Candidate("by hand", changed(**PAIRS["causal=bottom_right", "lse=log2"][0])[0])
    result = examine(tested, BY_NAME["causal top_left"], 0, Settings(power=False), owner)
    assert [(e.names, e.tensors) for e in result.explanations] == [(("causal=bottom_right",), ("out",)), ((UNKNOWN,), ("lse",))]


def test_what_the_backward_does_is_told_from_the_forward():
    wrong, right = changed(arguments=at_the_end), changed()
    (e,) = explained(right[0], wrong[1], case="causal top_left")
    assert (e.names, e.where) == (("causal=bottom_right",), "in the backward")
    found = explained(*wrong, case="causal top_left")
    assert said(found) == {"causal=bottom_right"}
    assert [e.where for e in found] == ["", "in the backward too"]


def test_a_change_of_a_fused_backward_starts_from_the_right_lse_and_output():
    """Its scores are wrong, what it has kept of the forward is right: its weights do not add up to 1."""

    def backward(dout, q, k, v):
        out, lse = honest_forward(q, k, v)
        p = np.exp(q @ k.swapaxes(-1, -2) * np.float32(1 / q.shape[-1]) - lse[..., None])
        delta = (dout * out).sum(-1, keepdims=True)
        ds = p * (dout @ v.swapaxes(-1, -2) - delta) * np.float32(1 / q.shape[-1])
        return ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout

    (e,) = explained(changed()[0], backward)
    assert (e.names, e.where) == (("scale is 1/D",), "in the backward")


def test_a_gradient_is_told_which_term_is_missing():
    def backward(dout, q, k, v):
        p = np.exp((s := q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5) - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        ds = p * (dout @ v.swapaxes(-1, -2)) * q.shape[-1] ** -0.5
        return ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout

    (e,) = explained(changed()[0], backward)
    assert e.names == ("Delta is missing",)
    assert e.tensors == ("dq", "dk")


# --- factors and roundings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tensor", "factor"), first(2, [("dv", 1.00002), ("dk", -0.3), ("dq", 1.001), ("dv", -1)]))
def test_a_factor_is_named(tensor, factor):
    forward, backward = changed(grads=lambda g: g | {tensor: g[tensor] * np.float32(factor)})
    assert said(explained(forward, backward)) == {f"{tensor} is {factor:.6g} times what it should be"}


@pytest.mark.parametrize("factor", first(1, [0.99998, 1.0001, 1.001]))
def test_a_scale_that_is_a_little_off_is_named(factor):
    found = explained(*changed(arguments=lambda o, q, k: o | {"scale": factor * q.shape[-1] ** -0.5}))
    assert {t for e in found for t in e.tensors} == {"out", "lse", "dq", "dk", "dv"}
    for name in said(found):
        assert name.startswith("scale is off by a factor of ")
        assert abs(float(name.rpartition(" ")[2]) - factor) < 1e-2 * abs(factor - 1)


# The sizes of the errors alone are looked at: these are as large, and where they are rounded is told only by luck.
ALIKE = [{"inputs", "scores"}, {"dweights", "dscores"}]


@pytest.mark.parametrize(
    ("knob", "bits"),
    first(3, [("inputs", 11), ("weights", 8), ("dscores", 8), ("scores", 8), ("weights", 11), ("dweights", 8), ("out", 8)]),
)
def test_a_rounding_is_named(knob, bits):
    storage = {8: "bfloat16", 11: "float16"}[bits]
    found = explained(*rounded(dataclasses.replace(PRECISIONS["float32"], storage=storage, **{knob: 2.0**-bits})))
    alike = next((names for names in ALIKE if knob in names), {knob})
    assert said(found)
    assert said(found) <= {f"{name} rounded to {bits} bits" for name in alike}
    inside = {"weights": {"out", "dv"}, "dweights": {"dq", "dk"}, "dscores": {"dq", "dk"}, "out": {"out", "dq", "dk", "dv"}}
    assert {t for e in found for t in e.tensors} == inside.get(knob, {"out", "lse", "dq", "dk", "dv"})


@pytest.mark.parametrize(("name", "bits"), first(1, [("bfloat16-M3", 8), ("float16-M2", 11), ("bfloat16-M1", 8)]))
def test_a_class_of_precision_is_told_by_its_bits(name, bits):
    """Which of the classes of a format it is, the report says: tests/verify/test_classes.py."""
    found = said(explained(*rounded(PRECISIONS[name])))
    storage = PRECISIONS[name].storage
    assert found
    assert found <= {f"inputs rounded to {bits} bits"} | {f"all that {n} rounds" for n in PRECISIONS if n.startswith(storage)}


def test_what_is_no_rounding_is_not_called_one():
    """Noise of no known size, and errors of a few elements alone."""
    for part in (np.s_[:], np.s_[:, :, 5]):

        def out(x, part=part):
            x = x.copy()
            x[part] += np.float32(0.03) * np.random.default_rng(0).standard_normal(x[part].shape).astype(np.float32)
            return x

        forward = changed(out=out)[0]
        result = examine(Candidate("noise", forward), BY_NAME["plain"], 0, Settings(power=False), Diagnostician(pairs=0))
        assert result.status == "wrong"
        assert said(result.explanations) == {UNKNOWN}


def test_weights_rounded_in_the_backward_alone_are_not_called_an_output():
    (e,) = explained(changed()[0], rounded(dataclasses.replace(PRECISIONS["float32"], storage="bfloat16", weights=2.0**-8))[1])
    assert (e.names, e.tensors, e.where) == (("weights rounded to 8 bits",), ("dv",), "in the backward")


@pytest.mark.parametrize("tensor", first(1, ["dq", "dv"]))
def test_one_gradient_that_is_rounded_is_named_by_itself(tensor):
    (e,) = explained(*changed(grads=lambda g: g | {tensor: round_to(g[tensor], "bfloat16")}))
    assert (e.names, e.tensors) == ((f"{tensor} rounded to 8 bits",), (tensor,))


def dense(weights=lambda s: s, top=lambda m: m, shift=None):
    """Ordinary attention and its backward: with the products as they are, and with what is done to the scores changed."""

    def parts(q, k, mask, causal):
        s = weights(q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5))
        s = np.where(tri(q, k, "bottom_right"), s, -np.inf) if causal else s
        s = s if mask is None else np.where(mask, s, -np.inf)
        m = top(s.max(-1, keepdims=True))
        m = np.where(np.isfinite(m), m, np.float32(0))
        e = np.exp(s - m)
        z = e.sum(-1, keepdims=True)
        lse = (m + np.log(z)).astype(q.dtype)
        if shift == "lse":
            return np.exp(s - lse), lse[..., 0]
        p = e / z if shift == "unguarded" else np.where(z == 0, 0, e / np.where(z == 0, 1, z))
        return p.astype(q.dtype), lse[..., 0]

    @quiet
    def forward(q, k, v, *, mask=None, causal=False):
        p, lse = parts(q, k, mask, causal)
        return p @ v, lse

    @quiet
    def backward(dout, q, k, v, *, mask=None, causal=False):
        p, _ = parts(q, k, mask, causal)
        dp = dout @ v.swapaxes(-1, -2)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * np.float32(q.shape[-1] ** -0.5)
        return ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout

    return forward, backward


@pytest.mark.parametrize("case", [c.name for c in CASES if "NaN" in c.name and c.name != "NaN in a query"])
def test_unprotected_products_are_a_convention(case):
    """NaN comes through them behind a mask, and no mistake is named for that."""
    forward, backward = dense()
    owner = Diagnostician("bottom_right")
    tested = Candidate("ordinary", forward, backward, Convention(causal="bottom_right"))
    result = examine(tested, BY_NAME[case], 0, Settings(power=False), owner)
    wrong = {c.tensor for c in result.checks if c.status == "wrong"}
    (e,) = result.explanations
    assert (e.names, set(e.tensors)) == (("masked_nan=poisons",), wrong)
    declared = dataclasses.replace(tested, convention=Convention(causal="bottom_right", masked_nan="poisons"))
    assert examine(declared, BY_NAME[case], 0, Settings(power=False), owner).status == "not supported"


def test_places_of_nan_alone_are_no_other_mistake():
    """NaN in the first row of what does not see it: neither a product nor anything that is known."""

    def forward(q, k, v, *, mask=None):
        out, lse = honest_forward(q, k, v, mask=mask)
        out[:, :, 0] = np.nan if mask is not None else out[:, :, 0]
        return out, lse

    assert said(explained(forward, None, case="NaN behind the mask")) == {UNKNOWN}


@pytest.mark.parametrize("n", [10, 20, 50, 80, 100])
def test_scores_that_are_cut_off_are_named(n):
    found = explained(*dense(weights=lambda s: np.clip(s, -n, n)), case="inputs x30")
    assert f"scores are cut off at +-{n}" in said(found)
    assert {t for e in found if f"scores are cut off at +-{n}" in e.names for t in e.tensors} >= {"out", "lse"}


def test_a_maximum_that_starts_at_0_is_named():
    found = explained(dense(top=lambda m: np.maximum(m, 0), shift="unguarded")[0], None, case="inputs K mean")
    assert said(found) == {"the maximum is not below 0, and 0 / 0 where all underflows"}


@pytest.mark.parametrize("case", ["inputs x30", "inputs near-tie"])
def test_weights_of_a_rounded_lse_are_named(case):
    found = explained(*dense(shift="lse"), case=case)
    assert said(found) == {"each row is off by a factor, as of exp(s - lse) with a rounded lse"}


def test_an_overflow_is_no_lse_without_the_scale():
    found = explained(dense(top=lambda m: 0 * m, shift="unguarded")[0], None, case="inputs x30")
    assert said(found) == {"no maximum is subtracted"}
    assert "lse of scores without the scale" not in {name for e in found for name in e.others}


def test_what_holds_in_a_second_call_is_said_to():
    calls = []

    def forward(q, k, v):
        calls.append(q)
        out, lse = honest_forward(q, k, v)
        return (out if len(calls) > 1 else out[:, :, ::-1].copy() + np.float32(0.1) * out * out), lse

    (e,) = explained(forward, None)
    assert e.text == "out: holds when called again: state is kept between calls"


# --- what is excluded, and what was before ---------------------------------------------------------------------------------


def window_mask(q, k, window):
    ahead = np.arange(k.shape[-2]) - np.arange(q.shape[-2])[:, None]
    left, right = (math.inf if n is None else n for n in window)
    return (ahead >= -left) & (ahead <= right)


def zero_is_no_limit(q, k, v, *, window=None):
    window = None if window is None else tuple(n or None for n in window)
    return honest_forward(q, k, v, mask=None if window is None else window_mask(q, k, window))


def test_what_a_case_that_holds_excludes_is_not_said():
    """(0, 0) taken for no limit on either side is a window that is ignored, unless a window was seen to work."""
    both = {"window's 0 is taken for no limit", "window is ignored"}
    (e,) = explained(zero_is_no_limit, None, case="window (0, 0)")
    assert {*e.names, *e.others} >= both
    (e,) = explained(zero_is_no_limit, None, "window", case="window (0, 0)")
    assert e.names == ("window's 0 is taken for no limit",)
    assert "window is ignored" not in e.others


def test_what_was_found_is_tried_first():
    owner = Diagnostician()
    tested = Candidate("by hand", zero_is_no_limit)
    examine(tested, BY_NAME["window (5, 0)"], 0, Settings(power=False), owner)
    assert owner.known == {"window's 0 is taken for no limit": 1}
    e = examine(tested, BY_NAME["window (0, 0)"], 0, Settings(power=False), owner).explanations[0]
    assert e.names == ("window's 0 is taken for no limit",)


def test_state_kept_from_an_earlier_call_is_named():
    kept = {}

    def forward(q, k, v, *, mask=None, scale=None):
        if mask is not None:
            mask = kept.setdefault("mask", mask) if mask.shape == kept.get("mask", mask).shape else mask
        scale = kept.setdefault("scale", scale) if scale is not None else kept.get("scale")
        return honest_forward(q, k, v, mask=mask, scale=scale)

    first, second = (Case(name, ("mask array",)) for name in ("mask array", "another mask"))
    assert said(explained(forward, None, first, case=second)) == {"the mask of an earlier call is used"}
    kept.clear()
    assert said(explained(forward, None, "negative scale", case="plain")) == {"the scale of an earlier call is used"}


def test_a_buffer_that_is_not_cleared_is_named():
    kept = {}

    def add(grads):
        kept["dk"] = grads["dk"] + kept.get("dk", np.float32(0))
        return grads | {"dk": kept["dk"].copy()}

    forward, backward = changed(grads=add)
    assert said(explained(forward, backward, "plain", case="causal top_left")) == {"dk is added to that of the call before"}


# --- where it is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (np.s_[1], "batch 1 (the last)"),
        (np.s_[:, 0], "heads 0"),
        (np.s_[:, :, 32:], "queries from 32 on, where a tile of 32 begins"),
        (np.s_[:, :, 64:], "queries from 64 on, where a tile of 64 begins"),
        (np.s_[:, :, 37:], "queries from 37 on"),
        (np.s_[:, :, 3:7], "queries 3 to 6"),
        (np.s_[:, :, 1::4], "queries 1, 5, ... every 4th"),
        (np.s_[:, :, [1, 2, 7, 9]], "queries 1, 2, 7, 9"),
        (np.s_[:, :, -1], "queries 79 (the last)"),
        (np.s_[..., 4], "columns 4 (the last)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_places_in_words(where, text):
    bad = np.zeros((2, 3, 80, 5), bool)
    bad[where] = True
    assert places("BHLE", AXIS_WORDS, bad) == f"in {bad.sum()} of {bad.size} elements; {text}"


def test_places_of_several_axes_and_of_all():
    bad = np.zeros((2, 3, 80), bool)
    bad[1, :, 40:] = True
    where = "batch 1 (the last); queries from 40 on, where a tile of 8 begins"
    assert places("BHL", AXIS_WORDS, bad) == f"in 120 of 480 elements; {where}"
    assert places("BGSE", AXIS_WORDS, np.ones((2, 3, 4, 5), bool)) == "in 120 of 120 elements"
    bad = np.zeros((2, 3, 4, 5), bool)
    bad[:, 1, 2] = True
    assert places("BGSE", AXIS_WORDS, bad) == "in 10 of 120 elements; key heads 1; keys 2"
    assert places("BGSD", AXIS_WORDS, bad[None]) == "in 10 of 120 elements; key heads 1; keys 2"  # a batch of two axes


def test_what_has_no_name_is_localised():
    def forward(q, k, v):
        out, lse = honest_forward(q, k, v)
        noise = np.random.default_rng(0).standard_normal(out.shape).astype(np.float32)
        out[:, 1, 32:] += noise[:, 1, 32:]
        return out, lse

    result = examine(Candidate("noise", forward), BY_NAME["plain"], 0, Settings(power=False), Diagnostician(pairs=0))
    assert [e.text for e in result.explanations] == ["out: nothing that is known matches; see the places above"]
    (wrong,) = [c for c in result.checks if c.status == "wrong"]
    assert "heads 1; queries from 32 on, where a tile of 32 begins" in wrong.text


def test_no_softmax_at_all_is_named_of_a_backward_that_keeps_its_weights():
    """Made again from lse, they would be others."""
    def scores(q, k):
        return q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)

    def backward(dout, q, k, v):
        p, dp = scores(q, k), dout @ v.swapaxes(-1, -2)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * np.float32(q.shape[-1] ** -0.5)
        return ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout

    found = explained(lambda q, k, v: scores(q, k) @ v, backward)
    assert [e.text.partition(" to ")[0] for e in found] == [
        "out: matches no softmax at all", "dq, dk, dv: matches no softmax at all in the backward too",
    ]  # fmt: skip


def test_an_error_below_the_smallest_normal_number_is_not_a_tensors_own():
    """Most of dbias is masked: there only what exp loses is predicted, and a change is as far off as elsewhere."""
    value = np.where(np.arange(100) < 20, 1.0, 0.0)
    sigma = np.where(np.arange(100) < 20, 1e-7, 1e-38)
    got = (value + np.where(np.arange(100) < 40, 1e-7, 0)).astype(np.float32)
    assert distance(got, value, sigma)[1] < 3
