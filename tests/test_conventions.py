"""Conventions: for each value a candidate, written by hand, that follows it: right under it, and wrong under npattn's."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest

from npattn.verify import PRECISIONS, PRESETS, Candidate, CandidateError, Convention, Settings, examine, verify
from npattn.verify.conventions import FIELDS, parse
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.rounded import rounded

PAGE = (Path(__file__).parent.parent / "docs/conventions.md").read_text()


# --- the record -------------------------------------------------------------------------------------------------------------


def test_fields_are_those_of_the_record_with_the_same_defaults():
    record = {f.name: f.default for f in dataclasses.fields(Convention)}
    assert record == {name: next(iter(field.values)) for name, field in FIELDS.items()}
    assert Convention().changes() == {}
    assert all(len(field.values) > 1 for field in FIELDS.values())
    assert {field.use for field in FIELDS.values()} == {"given", "expected", "undefined", "recorded"}


def test_every_conflict_has_a_field():
    assert {field.conflict for field in FIELDS.values()} - {""} == {f"C{n}" for n in range(1, 23)}


def test_the_page_has_every_field_value_and_preset():
    sections = {}
    for part in re.split(r"^### ", PAGE, flags=re.M)[1:]:
        title, _, text = part.partition("\n")
        parts = [x.strip() for x in title.split("·")]
        conflict, names, uses = parts if len(parts) == 3 else ("", *parts)
        names, uses = names.split(" and "), uses.split(" and ")
        for i, name in enumerate(names):
            sections[name] = conflict, uses[min(i, len(uses) - 1)], text
    assert set(sections) == set(FIELDS)
    for name, field in FIELDS.items():
        conflict, use, text = sections[name]
        assert (conflict, use) == (field.conflict, field.use), name
        for value in [*field.values][name == "float64" :] if use != "recorded" else ():
            assert f"`{value}`" in text or f"`{name}={value}`" in text, f"{name}={value}"
    for name, preset in PRESETS.items():
        changes = ", ".join(f"`{n}={v}`" for n, v in preset.convention.changes().items()) or "nothing"
        assert f"| `{name}` | {changes} | {preset.source} |" in PAGE.splitlines()


def test_parse():
    assert parse("npattn") == Convention()
    assert parse("lse=log2,causal=bottom_right") == Convention(lse="log2", causal="bottom_right")
    assert parse("flash2") == PRESETS["flash2"].convention
    assert parse(" flash2 , causal=top_left") == dataclasses.replace(PRESETS["flash2"].convention, causal="top_left")
    assert parse("lse=log2,lse=natural") == Convention()


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("flash3", ["'flash3'", "flash2", "field=value"]),
        ("", ["''", "npattn"]),
        ("lse=log2,flash2", ["'flash2'"]),  # a preset comes first
        ("causality=bottom_right", ["no field 'causality'", "causal, mask"]),
        ("lse=log10", ["lse=log10", "natural, log2"]),
        ("lse=", ["lse=", "natural, log2"]),
        ("causal=bottom-right", ["top_left, bottom_right"]),
    ],
)
def test_what_does_not_parse(text, fragments):
    with pytest.raises(ValueError, match=r"^convention: ") as error:
        parse(text)
    assert all(f in str(error.value) for f in fragments)
    with pytest.raises(CandidateError, match=r"^convention: "):
        verify(lambda q, k, v: v, convention=text)


def test_a_value_that_is_none_is_refused():
    with pytest.raises(ValueError, match="mask=True, expected one of keep, drop"):
        Convention(mask="True")
    with pytest.raises(TypeError):
        Convention(masks="drop")


def test_changes_by_their_use():
    c = Convention(lse="log2", mask="drop", alibi="signed", masked_nan="poisons")
    assert c.changes() == {"mask": "drop", "lse": "log2", "alibi": "signed", "masked_nan": "poisons"}
    assert [c.changes(use) for use in ("given", "expected", "undefined", "recorded")] == [
        {"mask": "drop"}, {"lse": "log2"}, {"masked_nan": "poisons"}, {"alibi": "signed"},
    ]  # fmt: skip


def test_presets():
    torch, onnx = {"torch_sdpa", "torch_mha", "torch_flex"}, {"onnx23", "onnx25"}
    others = {"jax", "flash2", "flash4", "flashinfer", "mlx", "cudnn", "hf_eager", "xformers", "keras"}
    assert torch | onnx | others <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_whether_it_was_run(name):
    preset = PRESETS[name]
    assert parse(name) == preset.convention
    assert re.match(
        r"run: this package|run by tests/peers/test_\w+\.py: .+ \d+\.\d+|read from source, not run: .+", preset.source
    )


# --- candidates, each in the words of a convention -------------------------------------------------------------------------

IN = {name: rounded(PRECISIONS[name]) for name in ("float32", "float64")}
OPTIONS = ("mask", "bias", "scale", "softcap", "sink", "dropout_mask", "causal", "window")


def honest(q, k, v, **options):
    return IN[q.dtype.name][0](q, k, v, **options)


def honest_grads(dout, q, k, v, **options):
    return IN[q.dtype.name][1](dout, q, k, v, **options)


class Mine:
    """A dense implementation with one habit of its own: the methods that a subclass replaces."""

    align = "top_left"

    def words(self, o, q, k):
        """The options in npattn's words."""
        return o

    def heads(self, x, H):
        """Key heads, one for each head of q."""
        return np.repeat(x, H // x.shape[1], 1)

    def groups(self, dx, G):
        return dx.reshape(len(dx), G, -1, *dx.shape[2:]).sum(2)

    def outputs(self, out, lse, v, o):
        return out, lse

    def finish(self, grads, dout, lse, o):
        return grads

    def options(self, o, q, k):
        o = self.words(dict(o), q, k)
        L, S = q.shape[-2], k.shape[-2]
        ahead = np.arange(S) - np.arange(L)[:, None] - (S - L if self.align == "bottom_right" else 0)
        masks = [] if o["mask"] is None else [o["mask"]]
        if o.pop("causal"):
            masks.append(ahead <= 0)
        window = o.pop("window")
        if window is not None:
            left, right = (math.inf if n is None else n for n in window)
            masks.append((ahead >= -left) & (ahead <= right))
        o["mask"] = np.logical_and.reduce(np.broadcast_arrays(*masks)) if masks else None
        return o

    def forward(
        self, q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, causal=False,
        window=None,
    ):  # fmt: skip
        given = (mask, bias, scale, softcap, sink, dropout_mask, causal, window)
        o = self.options(dict(zip(OPTIONS, given, strict=True)), q, k)
        kh, vh = (self.heads(x, q.shape[1]) for x in (k, v))
        return self.outputs(*honest(q, kh, vh, **o), vh, o | {"q": q, "k": kh})

    def backward(
        self, dout, q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, causal=False,
        window=None, dlse=None,
    ):  # fmt: skip
        given = (mask, bias, scale, softcap, sink, dropout_mask, causal, window)
        o = self.options(dict(zip(OPTIONS, given, strict=True)), q, k)
        G, (kh, vh) = k.shape[1], (self.heads(x, q.shape[1]) for x in (k, v))
        grads = self.gradients(dout, q, kh, vh, o, dlse)
        grads |= {n: self.groups(grads[n], G) for n in ("dk", "dv")}
        return self.finish(grads, dout, honest(q, kh, vh, **o)[1], o)

    def gradients(self, dout, q, kh, vh, o, dlse):
        return honest_grads(dout, q, kh, vh, **o, dlse=dlse)


class AtTheEnd(Mine):
    align = "bottom_right"


class Drops(Mine):
    def words(self, o, q, k):
        return o | {"mask": None if o["mask"] is None else ~o["mask"]}


class WantsFullShapes(Mine):
    def words(self, o, q, k):
        for name in ("mask", "bias"):
            if o[name] is not None and o[name].shape != (*q.shape[:-1], k.shape[-2]):
                raise ValueError(f"{name} has to be (B, H, L, S)")
        return o


class CountsTheOwnKey(Mine):
    def words(self, o, q, k):
        if o["window"] is None or o["window"][0] is None:
            return o
        return o | {"window": (o["window"][0] - 1, o["window"][1])}


class MinusOneIsNoLimit(Mine):
    def words(self, o, q, k):
        return o | {"window": o["window"] and tuple(None if n == -1 else int(n) for n in o["window"])}


class OneMaskOnly(Mine):
    align = "bottom_right"

    def words(self, o, q, k):
        if o["causal"] and o["mask"] is not None:
            raise ValueError("a mask or causal, not both")
        return o


class Transposed(Mine):
    """(B, L, H, D)"""

    def forward(self, q, k, v, **options):
        out, lse = super().forward(*(x.swapaxes(1, 2) for x in (q, k, v)), **options)
        return out.swapaxes(1, 2), lse

    def backward(self, dout, q, k, v, **options):
        grads = super().backward(*(x.swapaxes(1, 2) for x in (dout, q, k, v)), **options)
        return grads | {n: grads[n].swapaxes(1, 2) for n in ("dq", "dk", "dv")}


class LogLast(Mine):
    """lse as (B, L, H), and its gradient."""

    def outputs(self, out, lse, v, o):
        return out, lse.swapaxes(1, 2)

    def gradients(self, dout, q, kh, vh, o, dlse):
        return super().gradients(dout, q, kh, vh, o, None if dlse is None else dlse.swapaxes(1, 2))


def dead(lse):
    return (lse == -np.inf)[..., None]


class DeadIs(Mine):
    """Dead rows give the mean of the values, or a number; their lse is another number."""

    def __init__(self, out=None, lse=None):
        self.out, self.lse = out, lse

    def outputs(self, out, lse, v, o):
        there = dead(lse)
        value = v.mean(-2, keepdims=True) if self.out == "mean" else out if self.out is None else np.float32(self.out)
        lse = lse if self.lse is None else np.where(there[..., 0], np.float32(self.lse), lse)
        return np.where(there, value, out), lse


class Leaks(Mine):
    """The gradient of the mean of the values that a dead row gives."""

    def finish(self, grads, dout, lse, o):
        of_dead = np.where(dead(lse), dout, np.float32(0)).sum(-2, keepdims=True)
        of_dead = self.groups(of_dead, grads["dv"].shape[1])
        return grads | {"dv": grads["dv"] + of_dead / np.float32(grads["dv"].shape[-2])}


class Spoils(Mine):
    """Gradients that nobody could expect, where a row is dead."""

    def finish(self, grads, dout, lse, o):
        return {n: x if x is None or not dead(lse).any() else x + 7 for n, x in grads.items()}


class Base2(Mine):
    def outputs(self, out, lse, v, o):
        return out, lse / np.float32(math.log(2))

    def gradients(self, dout, q, kh, vh, o, dlse):
        return super().gradients(dout, q, kh, vh, o, None if dlse is None else dlse / np.float32(math.log(2)))


class Base2OfFloat64(Mine):
    def outputs(self, out, lse, v, o):
        return out, lse / math.log(2)

    def gradients(self, dout, q, kh, vh, o, dlse):
        return super().gradients(dout, q, kh, vh, o, None if dlse is None else dlse / math.log(2))


class NoDlse(Mine):
    def gradients(self, dout, q, kh, vh, o, dlse):
        return super().gradients(dout, q, kh, vh, o, None)


class NoDlseArgument(Mine):
    def backward(
        self, dout, q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, causal=False,
        window=None,
    ):  # fmt: skip
        given = (mask, bias, scale, softcap, sink, dropout_mask, causal, window)
        return super().backward(dout, q, k, v, **dict(zip(OPTIONS, given, strict=True)))


class Tiles(Mine):
    """Query head h reads key head h % G."""

    def heads(self, x, H):
        return np.tile(x, (1, H // x.shape[1], 1, 1))

    def groups(self, dx, G):
        return dx.reshape(len(dx), -1, G, *dx.shape[2:]).sum(1)


class NoScale(Mine):
    def words(self, o, q, k):
        return o | {"scale": 1.0 if o["scale"] is None else o["scale"]}


class SinkOutside(Mine):
    def outputs(self, out, lse, v, o):
        plain = {n: x for n, x in o.items() if n not in ("q", "k", "sink")}
        return out, honest(o["q"], o["k"], v, **plain)[1]

    def gradients(self, dout, q, kh, vh, o, dlse):
        """The sum of two: of out with the sink, and of lse without it."""
        grads = super().gradients(dout, q, kh, vh, o, None)
        if dlse is None:
            return grads
        of_lse = super().gradients(np.zeros_like(dout), q, kh, vh, o | {"sink": None}, dlse)
        return grads | {n: grads[n] + of_lse[n] for n in ("dq", "dk", "dv")}


class CapsLater(Mine):
    """The softcap behind the bias, or behind the mask."""

    def __init__(self, behind):
        self.behind = behind

    def weights(self, q, k, o):
        raw, cap = (o["scale"] or q.shape[-1] ** -0.5) * (q @ k.swapaxes(-1, -2)), o["softcap"]
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.behind == "bias":
                s = raw + (0 if o["bias"] is None else o["bias"])
                t = np.tanh(s / cap) if cap else None
                s = s if cap is None else cap * t
                s = s if o["mask"] is None else np.where(o["mask"], s, -np.inf)
            else:
                s = raw if o["mask"] is None else np.where(o["mask"], raw, -np.inf)
                t = np.tanh(s / cap) if cap else None
                s = s if cap is None else cap * t
            e = np.exp(s - s.max(-1, keepdims=True))
            z = e.sum(-1, keepdims=True)
        return e / z, (s.max(-1, keepdims=True) + np.log(z))[..., 0], 1 if t is None else 1 - t * t

    def outputs(self, out, lse, v, o):
        p, lse, _ = self.weights(o["q"], o["k"], o)
        return p @ v, lse

    def gradients(self, dout, q, kh, vh, o, dlse):
        p, _, slope = self.weights(q, kh, o)
        dp = dout @ vh.swapaxes(-1, -2)
        ds = slope * p * (dp - (p * dp).sum(-1, keepdims=True) + (0 if dlse is None else dlse[..., None]))
        scale = o["scale"] or q.shape[-1] ** -0.5
        return {"dq": scale * ds @ kh, "dk": scale * ds.swapaxes(-1, -2) @ q, "dv": p.swapaxes(-1, -2) @ dout,
                "dbias": None if o["bias"] is None else ds}  # fmt: skip


class Single(Mine):
    """float64 computed in float32."""

    def forward(self, q, k, v, **options):
        return tuple(x.astype(q.dtype) for x in super().forward(*map(single, (q, k, v)), **each_single(options)))

    def backward(self, dout, q, k, v, **options):
        grads = super().backward(*map(single, (dout, q, k, v)), **each_single(options))
        return {n: x if x is None else x.astype(q.dtype) for n, x in grads.items()}


def single(x):
    return x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x


def each_single(options):
    return {n: single(x) for n, x in options.items()}


DEAD = ("mask array", "dead rows", "dead rows + dlse", "dead rows + G < H")  # the first has no dead row

# value of a field: the candidate that has it, and cases. The value shows in the last one.
FOLLOWS = {
    "causal=bottom_right": (AtTheEnd(), ("plain", "window bottom_right", "window", "causal bottom_right", "causal top_left")),
    "mask=drop": (Drops(), ("plain", "causal top_left", "keys", "mask of one row", "mask array")),
    "mask_shape=full": (WantsFullShapes(), ("plain", "bias HLS", "mask of one column", "bias BHLS", "mask of one row")),
    "window=total": (CountsTheOwnKey(), ("plain", "window (2, None)", "window (None, 2)", "window (0, 5)", "window")),
    "no_limit=-1": (MinusOneIsNoLimit(), ("window", "window (0, 0)", "window (2, None)", "window (None, 2)")),
    "mask_with_causal=error,causal=bottom_right": (
        OneMaskOnly(), ("mask array", "causal bottom_right", "causal bottom_right + mask array")),
    "layout=BLHD": (Transposed(), ("mask array", "G < H", "E != D", "dlse", "plain")),
    "lse_layout=BLH": (LogLast(), ("mask array", "G < H", "dlse", "plain")),
    "dead_out=mean_v": (DeadIs(out="mean"), DEAD),
    "dead_out=nan": (DeadIs(out=np.nan), DEAD),
    "dead_out=undefined": (DeadIs(out=7), DEAD),
    "dead_lse=+inf": (DeadIs(lse=np.inf), DEAD),
    "dead_lse=zero": (DeadIs(lse=0), DEAD),
    "dead_lse=fill": (DeadIs(lse=0.7 * float(np.finfo(np.float32).min)), DEAD),
    "dead_lse=undefined": (DeadIs(lse=7), DEAD),
    "dead_grad=leak": (Leaks(), DEAD),
    "dead_grad=undefined": (Spoils(), DEAD),
    "lse=log2": (Base2(), ("dlse", "dead rows", "sink + dlse", "plain")),
    "dlse=ignored": (NoDlse(), ("plain", "sink + dlse", "dlse")),
    "softcap=after_bias": (CapsLater("bias"), ("softcap", "softcap + dlse", "bias BHLS", "mask array", "softcap + bias BHLS")),
    "softcap=after_mask": (CapsLater("mask"), ("softcap", "softcap + dlse", "mask array", "mask array + softcap")),
    "heads=tile": (Tiles(), ("plain", "G = 1", "G < H + key_lengths", "G < H + dlse", "G < H")),
    "scale=none": (NoScale(), ("scale 0", "scale 0.6", "negative scale", "E != D", "plain")),
    "sink=not_in_lse": (SinkOutside(), ("plain", "mask array + sink", "sink + dropout_mask", "sink")),
    "float64=float32": (Single(), ("plain", "float64 dropout_mask", "float64")),
}  # fmt: skip


def judged(tested, convention, names):
    """By case: what is wrong with it, or its status."""
    candidate = Candidate("mine", tested.forward, tested.backward, parse(convention))
    results = [examine(candidate, BY_NAME[n], 0, Settings(power=False)) for n in names]
    return {r.case: [c.text for c in r.checks if c.status == "wrong"] or [r.status] for r in results}


@pytest.mark.parametrize("convention", FOLLOWS)
def test_right_under_its_own_convention(convention):
    tested, names = FOLLOWS[convention]
    assert judged(tested, convention, names) == {n: ["ok"] for n in names}


def test_float64_is_judged_as_float64_under_a_convention_too():
    assert judged(Base2OfFloat64(), "lse=log2", ["float64"]) == {"float64": ["ok"]}
    (text,) = judged(Base2(), "lse=log2", ["float64"])["float64"]  # it divides by a log 2 of float32
    assert text.startswith("lse[")


@pytest.mark.parametrize("convention", FOLLOWS)
def test_wrong_under_that_of_npattn(convention):
    tested, names = FOLLOWS[convention]
    others = convention.partition(",")[2] or "npattn"
    assert judged(tested, others, names[-1:])[names[-1]] != ["ok"]


LENIENT = ("undefined", "mask_shape", "float64", "mask_with_causal")  # what follows npattn's convention is right here too


@pytest.mark.parametrize("convention", FOLLOWS)
def test_one_that_does_not_follow_it_is_wrong_under_it(convention):
    other = AtTheEnd() if ",causal=bottom_right" in convention else Mine()
    found = judged(other, convention, FOLLOWS[convention][1][-2:])
    assert all(x == ["ok"] for x in found.values()) == any(x in convention for x in LENIENT)


def test_the_gradient_of_an_lse_without_the_sink():
    assert judged(SinkOutside(), "sink=not_in_lse", ("sink + dlse",)) == {"sink + dlse": ["ok"]}


def test_every_value_that_can_matter_has_a_candidate():
    values = {f"{n}={v}" for n, field in FIELDS.items() if field.use in ("given", "expected") for v in [*field.values][1:]}
    assert {c.split(",")[0] for c in FOLLOWS} == values - {"rope=interleaved"}  # of rotary, see tests/test_positions.py


def test_the_one_without_a_habit_is_right():
    names = list(dict.fromkeys(n for _, names in FOLLOWS.values() for n in names))
    assert judged(Mine(), "npattn", names) == {n: ["ok"] for n in names}


def test_the_gradient_of_lse_may_be_missing_from_the_signature():
    tested = NoDlseArgument()
    assert "dlse" not in inspect.signature(tested.backward).parameters
    by_default = examine(Candidate("mine", tested.forward, tested.backward), BY_NAME["dlse"], 0, Settings(power=False))
    assert {c.tensor: c.status for c in by_default.checks}["dq"] == "not supported"
    declared = Candidate("mine", tested.forward, tested.backward, Convention(dlse="ignored"))
    assert {c.status for c in examine(declared, BY_NAME["dlse"], 0, Settings(power=False)).checks} == {"ok"}


def test_what_is_undefined_is_not_tested():
    """Neither what is right nor what is wrong."""
    for tested in (Mine().forward, lambda q, k, v, *, mask=None, scale=None, causal=None: v):
        for value, case in (("masked_nan=poisons", "NaN behind the mask"), ("scale_on=both", "negative scale")):
            result = examine(Candidate("any", tested, convention=parse(value)), BY_NAME[case])
            assert result.status == "not supported"
            assert f"undefined by the convention {value}" in result.checks[0].text
    wrong = Candidate("any", lambda q, k, v, *, scale=None: v[..., :1, :] + 0 * q, convention=parse("scale_on=both"))
    assert examine(wrong, BY_NAME["plain"]).status == "wrong"
    assert examine(wrong, BY_NAME["scale 0.6"]).status == "wrong"


def test_dead_rows_that_are_open_leave_the_others_tested():
    class OthersToo(DeadIs):
        def outputs(self, out, lse, v, o):
            out, lse = super().outputs(out, lse, v, o)
            out[..., 0, :] *= np.float32(1.001)  # where no row is dead
            return out, lse

    candidate = Candidate("mine", OthersToo(out=7).forward, convention=parse("dead_out=undefined"))
    result = examine(candidate, BY_NAME["dead rows"])
    assert {c.tensor: c.status for c in result.checks if c.tensor in ("out", "lse")} == {"out": "not supported", "lse": "ok"}
    assert examine(candidate, BY_NAME["plain"]).status == "wrong"


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.use == "recorded"])
def test_what_is_recorded_changes_nothing(name):
    for value in [*FIELDS[name].values][1:]:
        found = judged(Mine(), f"{name}={value}", ("everything", "dead rows + dlse"))
        assert found == {"everything": ["ok"], "dead rows + dlse": ["ok"]}
