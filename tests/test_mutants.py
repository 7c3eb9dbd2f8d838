"""The tests of the tests: every seeded bug of `mutants` is rejected, and passes once its one bad line is undone."""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import assert_close

import npattn
from npattn import GradcheckError, MultiHeadParams, RNNParams, gradcheck, multi_head_forward, rnn_forward
from npattn.verify import Settings, diagnose, examine, mutant_attention, mutant_layers, mutants, selftest
from npattn.verify.cases import BY_NAME
from npattn.verify.conventions import parse
from npattn.verify.mistakes import CHANGES
from npattn.verify.mutant_attention import candidate
from npattn.verify.mutant_layers import MULTI_HEAD_MUTANTS, RNN_MUTANTS
from npattn.verify.mutants import EQUIVALENT, MUTANTS, REPEATS, make

FORWARD = ("out", "lse")
BACKWARD_ONLY = [name for name, m in MUTANTS.items() if m.where == "backward"]


def run(tested, names):
    """The results of these cases, up to the first that is wrong."""
    found = []
    for name in names:
        found.append(examine(tested, BY_NAME[name], 0, Settings(power=False)))
        if found[-1].status == "wrong":
            break
    return found


def wrong(result):
    return {c.tensor: c.text for c in result.checks if c.status == "wrong"}


@functools.cache
def results(name):
    return run(make(name), MUTANTS[name].cases)


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUTANTS)
def test_rejected(name):
    mutant, found = MUTANTS[name], results(name)
    assert [r.status for r in found] == ["ok"] * (len(mutant.cases) - 1) + ["wrong"]
    named, expected = wrong(found[-1]), set(mutant.tensors.split())
    assert expected
    # A bug of the backward alone is found in the gradients that it spoils, and in no other.
    assert set(named) == expected if mutant.where == "backward" else set(named) >= expected
    # An exception would be found without any comparison.
    assert not [text for tensor, text in named.items() if tensor in expected and "raises" in text]


@pytest.mark.parametrize("name", MUTANTS)
def test_accepted_once_its_line_is_undone(name):
    found = run(make(name, undone=True), MUTANTS[name].cases)
    assert [wrong(r) for r in found] == [{}] * len(MUTANTS[name].cases)
    assert all(r.tested for r in found)


@pytest.mark.parametrize("name", BACKWARD_ONLY)
def test_a_forward_that_is_right_is_not_blamed_for_its_backward(name):
    for result in results(name):
        assert [c.status for c in result.checks if c.tensor in FORWARD] == ["ok", "ok"]


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("implementation", ["dense", "tiles"])
def test_the_honest_ones_hold_in_all_cases(implementation, align):
    aligned = align == {"dense": "top_left", "tiles": "bottom_right"}[implementation]
    # With the other alignment only what is aligned can be different.
    cases = [c for c in BY_NAME.values() if aligned or ({"causal", "window"} & set(c.features) and "long" not in c.features)]
    found = [examine(candidate(implementation, align=align), c, 0, Settings(power=False)) for c in cases]
    assert len(found) == len(cases) >= 15
    assert {r.case: wrong(r) for r in found if r.status != "ok"} == {}
    assert {c.status for r in found for c in r.checks} == {"ok"}


def test_there_are_enough_of_each_kind():
    kinds = Counter(m.kind for table in (MUTANTS, RNN_MUTANTS, MULTI_HEAD_MUTANTS) for m in table.values())
    kinds += Counter({"9": len(REPEATS)})
    assert set(kinds) == set(selftest.CLASSES)
    assert min(kinds.values()) >= 5
    assert len(MUTANTS) >= 70
    assert len(BACKWARD_ONLY) >= 30
    assert kinds["own"] >= 30
    assert min(len(RNN_MUTANTS), len(MULTI_HEAD_MUTANTS)) >= 10
    for table in (RNN_MUTANTS, MULTI_HEAD_MUTANTS):
        assert min(Counter(m.where for m in table.values()).values()) >= 5


def test_what_names_a_bug_is_what_a_diagnosis_can_say():
    """What no diagnosis ever says would leave a bug without a name, whatever is found out about it."""
    names = {n for m in MUTANTS.values() for n in ((m.says,) if isinstance(m.says, str) else m.says or ()) if "*" not in n}
    for convention in (n for n in names if re.fullmatch(r"\w+=\w+", n)):
        parse(convention)
        names = names - {convention}
    state = {f"the {n} of an earlier call is used" for n in ("mask", "key_lengths", "scale")}
    assert names - set(CHANGES) == state | {"dk is added to that of the call before"}


def test_every_bad_line_is_in_a_table():
    source = "".join(Path(str(module.__file__)).read_text() for module in (mutant_attention, mutant_layers))
    lines = set(re.findall(r'bug [!=]= f?"([^"]*)"', source)) | set(re.findall(r'"([^"]*)"', "".join(
        re.findall(r"bug not in \(([^)]*)\)", source))))  # fmt: skip
    lines = {line.replace("{name}", n) for line in lines for n in ("dk", "dv")}
    tables = (MUTANTS, RNN_MUTANTS, MULTI_HEAD_MUTANTS, REPEATS, bad_calls())
    named = {name for table in tables for name in table} | {m.bug for m in MUTANTS.values()}
    named |= {e.bug for e in EQUIVALENT.values()} | {"b_k forgotten", "b_k without a gradient"}
    either = {line for line in lines if line.endswith((" in dk", " in dv"))}  # one of the two is enough
    assert {line for line in lines - either if line not in named} == set()
    assert {line[:-2] for line in either} == {line[:-2] for line in either & named}


# --- the self-test: all of it, with a diagnosis ------------------------------------------------------------------------

UNNAMED = {
    "keys past the end read": "what lies there is any number",
    "max of the last tile": "a tile of another size does the same to fewer rows",
    "max without the sink": "what overflows is the same without any maximum",
    "empty tiles unguarded": "the same NaN as of masked scores of +inf",
    "no key at all": "nothing is there to compare",
    "padding rows enter": "what they hold is any number",
    "lse of the padding rows not set": "NaN everywhere",
    "operands in TF32": "one case does not tell it from scores of 11 bits",
    "exp off by 1e-4": "no change of one stage",
    "exp off by 1e-5": "no change of one stage",
    "one key missing from one sum": "in one row alone",
}
"""Bugs that are caught and have no name, and why."""


def self_test(monkeypatch, names=None):
    """The verdict, the mark of each bug by its name, and the lines; of all bugs or of these."""
    # A search that may take as long as it needs: what is found does not depend on the machine.
    monkeypatch.setattr(diagnose, "time", SimpleNamespace(thread_time=lambda: 0.0))
    for module, table in (
        (mutants, "MUTANTS"), (mutants, "REPEATS"), (selftest, "MULTI_HEAD_MUTANTS"), (selftest, "RNN_MUTANTS"),
    ):  # fmt: skip
        rows = getattr(module, table)
        monkeypatch.setattr(module, table, {n: row for n, row in rows.items() if names is None or n in names})
    lines: list[str] = []
    verdict = selftest.run_self_test(lines.append)
    marks = {line[18:71].strip(): line[2:12].strip() for line in lines if line.startswith("  ") and line[2] != " "}
    return verdict, {n: m for n, m in marks.items() if m in ("named", "caught", "NOT CAUGHT")}, lines


ALL = [n for table in (MUTANTS, REPEATS, MULTI_HEAD_MUTANTS, RNN_MUTANTS) for n in table]


def test_every_eighth_is_named(monkeypatch):
    sample = set(ALL[::8])
    verdict, marks, lines = self_test(monkeypatch, sample)
    assert verdict, lines
    assert set(marks) == sample
    assert {n for n, mark in marks.items() if mark != "named"} == sample & set(UNNAMED)
    assert lines[-1].lstrip().startswith("RIGHT: ")


@pytest.mark.slow
def test_all_are_caught_and_all_but_a_few_named(monkeypatch):
    verdict, marks, lines = self_test(monkeypatch)
    assert verdict
    assert set(marks) == set(ALL)
    assert len(marks) >= 150
    assert sum(mark != "named" for mark in marks.values()) <= 0.1 * len(marks)
    assert len(UNNAMED) <= 0.2 * len(marks)
    for e in EQUIVALENT.values():
        assert any(e.reason in line for line in lines)


def test_the_self_test_says_what_it_does_not_catch(monkeypatch):
    make_bad = mutants.make
    monkeypatch.setattr(mutants, "make", lambda name: make_bad(name, undone=name == "causal sees one ahead"))
    verdict, marks, lines = self_test(monkeypatch, {"causal sees one ahead", "causal the other way", "window counts one more"})
    assert not verdict
    assert marks["causal sees one ahead"] == "NOT CAUGHT"
    assert marks["causal the other way"] == "named"
    assert lines[-1].lstrip().startswith("WRONG: 2 of 3 caught, 2 named")


def test_the_self_test_wants_most_of_them_named(monkeypatch):
    names = {"causal the other way", "exp off by 1e-4", "window counts one more"}
    verdict, marks, _ = self_test(monkeypatch, names)
    assert sorted(marks.values()) == ["caught", "named", "named"]
    assert not verdict, "two of three are fewer than four of five"


# --- what verify cannot see -------------------------------------------------------------------------------------------


def check_repeatable(tested):
    """Calls in another order than verify's: the backward twice, and another forward before its third time."""
    problems = [BY_NAME["plain"].problem(seed) for seed in (0, 1)]
    (q, k, v, dout), other = ((p.q, p.k, p.v, p.dout) for p in problems)
    out, lse = tested.forward(q, k, v)
    saved = out.tobytes(), lse.tobytes()
    first = copy.deepcopy(tested.backward(dout, q, k, v, out=out, lse=lse))
    second = copy.deepcopy(tested.backward(dout, q, k, v, out=out, lse=lse))
    tested.forward(*other[:3])
    assert (out.tobytes(), lse.tobytes()) == saved, "a second forward overwrites what the first returned"
    third = tested.backward(dout, q, k, v, out=out, lse=lse)
    for grads, when in ((second, "a second backward"), (third, "a backward after another forward")):
        for name in ("dq", "dk", "dv"):
            assert np.array_equal(first[name], grads[name]), f"{name} of {when} differs"


@pytest.mark.parametrize("name", REPEATS)
def test_rejected_when_called_again(name):
    where = {"forward": name} if name.startswith("out") else {"backward": name}
    with pytest.raises(AssertionError, match=r"overwrites|differs"):
        check_repeatable(candidate(**where))
    check_repeatable(candidate())


class Call(NamedTuple):
    """Arguments that have to be refused."""

    text: str
    q: Any
    k: Any
    v: Any
    options: dict[str, Any]
    cotangents: tuple[Any, Any] | None = None  # of the backward, which then has to refuse


def bad_calls():
    """By the bug that accepts it, forwards and backwards."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape)

    q, k, v, dout, dlse = normal(2, 2, 4, 3), normal(2, 2, 5, 3), normal(2, 2, 5, 3), normal(2, 2, 4, 3), normal(2, 2, 4)
    additive = np.where(rng.random((4, 5)) < 0.7, 0.0, -np.inf)
    return {
        "accepts integers": Call("dtype int64", *(np.rint(x).astype(np.int64) for x in (q, k, v)), {}),
        "accepts mixed dtypes": Call("k in float32", q, k.astype(np.float32), v, {}),
        "shorter of k and v": Call("v longer than k", q, k, normal(2, 2, 6, 3), {}),
        "accepts other heads of v": Call("one head of v", q, k, v[:, :1], {}),
        "accepts heads that do not divide": Call("H = 3, G = 2", normal(2, 3, 4, 3), k, v, {}),
        "accepts an additive mask": Call("mask of 0 and -inf", q, k, v, {"mask": additive}),
        "accepts a mask of rank 3": Call("(B, L, S), lands on H", q, k, v, {"mask": rng.random((2, 4, 5)) < 0.7}),
        "accepts softcap 0": Call("0 is not off", q, k, v, {"softcap": 0.0}),
        "accepts a window of -1": Call("-1 is not no limit", q, k, v, {"window": (-1, 0)}),
        "accepts lengths above S": Call("6 of 5 keys", q, k, v, {"key_lengths": np.array([6, 2])}),
        "accepts a dropout probability": Call("no mask", q, k, v, {"dropout_mask": 0.1}),
        "accepts one sink for all heads": Call("shape (1,)", q, k, v, {"sink": normal(1)}),
        "accepts any dout that broadcasts": Call("dout of one head", q, k, v, {}, (dout[:, :1], None)),
        "accepts any dlse that broadcasts": Call("dlse of one head", q, k, v, {}, (dout, dlse[:, :1])),
    }


def refuses(forward, backward, call):
    """Whether the call raises TypeError or ValueError."""
    try:
        result = forward(call.q, call.k, call.v, **call.options)
        if call.cotangents is not None:
            backward(call, result)
    except (TypeError, ValueError):
        return True
    return False


def of_candidate(tested):
    def backward(call, result):
        (dout, dlse), (out, lse) = call.cotangents, result
        return tested.backward(dout, call.q, call.k, call.v, out=out, lse=lse, dlse=dlse)

    return tested.forward, backward


def of_package():
    def forward(q, k, v, *, window=None, key_lengths=None, **options):
        mask = npattn.window(*window, align="top_left") if window is not None else options.pop("mask", None)
        mask = npattn.key_lengths(key_lengths) if key_lengths is not None else mask
        return npattn.attention_forward(q, k, v, mask=mask, **options)

    return forward, lambda call, result: npattn.attention_backward(call.cotangents[0], result[1], call.cotangents[1])


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_has_to_be_refused(name):
    call = bad_calls()[name]
    assert refuses(*of_package(), call), call.text
    assert refuses(*of_candidate(candidate()), call), call.text
    assert not refuses(*of_candidate(candidate(forward=name, backward=name)), call)


# --- what no test can kill --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EQUIVALENT)
def test_equivalent_ones_pass_and_near_misses_do_not(name):
    e = EQUIVALENT[name]
    bugs = {"backward": e.bug} | ({"forward": e.bug} if e.where == "forward" else {})
    align = "bottom_right" if "shift" in e.bug else "top_left"
    tested = candidate("tiles" if e.tiles else "dense", align=align, lse=e.lse, **bugs)
    found = run(tested, e.passes)
    assert {r.case: wrong(r) for r in found if r.status != "ok"} == {}
    assert len(found) == len(e.passes)
    if e.rejected:
        assert wrong(run(tested, [e.rejected])[0])


# --- layers -----------------------------------------------------------------------------------------------------------

LENGTHS = np.array([4, 0, 5])


def rnn_inputs():
    rng, B, T, M, N = np.random.default_rng(0), 3, 5, 4, 2
    shapes = {"x": (B, T, M), "h0": (B, N), "w_x": (M, N), "w_h": (N, N), "b": (N,)}
    return {name: 0.7 * rng.standard_normal(shape) for name, shape in shapes.items()}


def rnn_pair(forward=None, backward=None):
    return (
        functools.partial(mutant_layers.rnn_forward, lengths=LENGTHS, bug=forward),
        functools.partial(mutant_layers.rnn_backward, bug=backward),
    )


def check_rnn_forward(forward):
    given = rnn_inputs()
    got = dict(zip(("h", "h_last"), forward(**given)[0], strict=True))
    h, cache = rnn_forward(given["x"], given["h0"], RNNParams(given["w_x"], given["w_h"], given["b"]), lengths=LENGTHS)
    # The sum of |terms| of a step is that of its products, and through w_h that of the step before; tanh makes it no larger.
    x, h0, w_x, w_h, b = map(np.abs, given.values())
    steps, before = [], 1 + h0
    for t in range(x.shape[1]):
        before = 1 + x[:, t] @ w_x + b + before @ w_h
        steps.append(before)
    terms = {"h": np.stack(steps, 1), "h_last": np.maximum.reduce(steps)}
    for name, expected in (("h", h), ("h_last", cache.h_last)):
        assert_close(got[name], expected, terms[name], name=name)


SIZES = {"heads": 6, "groups": 2}


def multi_head_inputs():
    # M_out = H E and M_k = M_v, so that a transposed weight and exchanged inputs fit. H / G is not G: see the heads' mapping.
    rng, (B, L, S, M, M_k, H, G, D, E) = np.random.default_rng(0), (3, 5, 4, 7, 8, 6, 2, 3, 2)
    shapes = {
        "x_q": (B, L, M), "x_k": (B, S, M_k), "x_v": (B, S, M_k), "w_q": (M, H * D), "w_k": (M_k, G * D),
        "w_v": (M_k, G * E), "w_o": (H * E, H * E), "b_q": (H * D,), "b_k": (G * D,), "b_v": (G * E,), "b_o": (H * E,),
    }  # fmt: skip
    return {name: 0.7 * rng.standard_normal(shape) for name, shape in shapes.items()}


def multi_head_mask():
    """With holes, and one query that sees nothing."""
    mask = np.random.default_rng(1).random((3, 1, 5, 4)) < 0.7
    mask[:, :, 1] = False
    return mask


def multi_head_pair(forward=None, backward=None):
    return (
        functools.partial(mutant_layers.multi_head_forward, **SIZES, mask=multi_head_mask(), bug=forward),
        functools.partial(mutant_layers.multi_head_backward, bug=backward),
    )


def check_multi_head_forward(forward):
    given, mask = multi_head_inputs(), multi_head_mask()
    weights = MultiHeadParams(*(given[name] for name in MultiHeadParams._fields))
    inputs = [given[name] for name in ("x_q", "x_k", "x_v")]
    expected, cache = multi_head_forward(*inputs, weights, SIZES["heads"], num_kv_heads=SIZES["groups"], mask=mask)
    # The same equations with |x| for x give the sums of |terms|; a weight rounds by eps * p (1 + its score).
    x_q, x_k, x_v, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o = map(np.abs, given.values())
    repeat = SIZES["heads"] // SIZES["groups"]
    q = mutant_layers.split(x_q @ w_q + b_q, SIZES["heads"])
    k, v = (np.repeat(mutant_layers.split(x, SIZES["groups"]), repeat, 1) for x in (x_k @ w_k + b_k, x_v @ w_v + b_v))
    s = (q @ mutant_layers.swap(k)).max(-1, keepdims=True) * q.shape[-1] ** -0.5
    terms = mutant_layers.merge((cache.attention.weights * (1 + s)) @ v) @ w_o + b_o
    assert_close(forward(**given)[0], expected, terms, name="out")


LAYERS = {
    "rnn": (RNN_MUTANTS, rnn_pair, rnn_inputs, check_rnn_forward, ()),
    # What is the same for all keys of a row is not seen.
    "multi_head": (MULTI_HEAD_MUTANTS, multi_head_pair, multi_head_inputs, check_multi_head_forward, ("b_k",)),
}
ROWS = [(layer, name) for layer, (table, *_) in LAYERS.items() for name in table]


@pytest.mark.parametrize(("layer", "name"), ROWS)
def test_layer_rejected(layer, name):
    table, pair, inputs, check_forward, zero = LAYERS[layer]
    mutant = table[name]
    if mutant.where == "forward":
        with pytest.raises(AssertionError, match=rf"^{mutant.tensor}\["):
            check_forward(pair(forward=name)[0])
    else:
        forward, backward = pair(backward=name)
        check_forward(forward)
        with pytest.raises(GradcheckError, match=rf"gradient of {mutant.tensor}(\[| along| is)"):
            gradcheck(forward, backward, inputs(), zero=zero)


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_accepted_once_its_line_is_undone(layer):
    _, pair, inputs, check_forward, zero = LAYERS[layer]
    check_forward(pair()[0])
    rows = gradcheck(*pair(), inputs(), zero=zero)
    assert [row.name for row in rows] == list(inputs())


def test_nothing_sees_a_key_bias():
    check_multi_head_forward(multi_head_pair(forward="b_k forgotten")[0])
    gradcheck(*multi_head_pair(backward="b_k without a gradient"), multi_head_inputs(), zero=("b_k",))
