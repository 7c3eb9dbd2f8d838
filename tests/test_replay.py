"""One case alone: drawn again by its seed, made as small as it still fails, and saved for a program that knows no npattn."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from helpers import abs_finite
from oracles import attention_loops, rnn_loops

import npattn
from npattn import attention_backward, attention_forward, cli
from npattn.tolerances import TERMS_EPS
from npattn.verify import CASES, PRECISIONS, Candidate, Case, Convention, Settings, examine, load
from npattn.verify.cases import BY_NAME, SMALL
from npattn.verify.diagnose import Diagnostician
from npattn.verify.precision import round_to
from npattn.verify.replay import fails, save, shapes, shrink
from npattn.verify.report import CASES_OF

PAGE = (Path(__file__).parent.parent / "docs/verifying.md").read_text()
OPTIONS = ("G < H", "E != D", "causal top_left", "mask array", "bias HLS", "negative scale", "softcap", "sink", "dropout_mask",
           "dlse")  # fmt: skip


def forward(q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None):
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink, "dropout_mask": dropout_mask}
    return attention_forward(q, k, v, **options, return_lse=True)[0]


def backward(dout, q, k, v, *, dlse=None, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None):
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink, "dropout_mask": dropout_mask}
    g = attention_backward(dout, attention_forward(q, k, v, **options)[1], dlse)
    return {"dq": g.q, "dk": g.k, "dv": g.v, "dbias": g.bias, "dsink": g.sink}


HONEST = Candidate("honest", forward, backward)


def saved(tmp_path, candidate, case, seed=0, settings=None, result=None):
    """The arrays of a file as any program reads them, and what is written about them."""
    settings = settings or Settings()
    result = result or examine(candidate, case, seed, settings)
    save(tmp_path / "case.npz", candidate, case, seed, settings, result)
    with np.load(tmp_path / "case.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays.pop("about")))


# --- saved ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_truth_is_that_of_loops(tmp_path, dtype):
    """From nothing but the arrays of the file and the numbers in about."""
    case = Case("everything", OPTIONS, sizes=SMALL, dtype=dtype)
    arrays, about = saved(tmp_path, HONEST, case, 3)
    H, L, S = arrays["q"].shape[1:3] + arrays["k"].shape[2:3]
    assert arrays["allowed"].shape == arrays["dropout_mask"].shape == (2, H, L, S)
    causal = np.array([[j <= i for j in range(S)] for i in range(L)])
    assert not (arrays["allowed"] & ~causal).any()
    assert (arrays["mask"] & np.ones((2, H, 1, 1), bool) == arrays["allowed"]).all()  # causal is no keyword here
    bias = np.broadcast_to(arrays["bias"], (2, H, L, S))
    want = attention_loops(
        arrays["q"], arrays["k"], arrays["v"], allowed=arrays["allowed"], bias=bias, sink=arrays["sink"],
        dropout_mask=arrays["dropout_mask"], dout=arrays["dout"], dlse=arrays["dlse"], **about["options"],
    )  # fmt: skip
    want["bias"] = want["bias"].sum(0, keepdims=True)
    assert about["options"] == {"scale": -0.75 * 5**-0.5, "softcap": 1.5}
    found = {name.removeprefix("want_") for name in arrays if name.startswith("want_")}
    assert found == {"out", "lse", "dq", "dk", "dv", "dbias", "dsink"}
    for name in found:
        x, y = arrays[f"want_{name}"], want[name if name in ("out", "lse") else name[1:]]
        assert x.dtype == np.float64
        assert x.shape == y.shape == arrays[f"sigma_{name}"].shape == arrays[f"got_{name}"].shape, name
        assert np.abs(x - y).max() <= TERMS_EPS * np.finfo(float).eps * max(1, abs_finite(y).max()), name


def test_inputs_are_those_that_the_seed_draws(tmp_path):
    case = Case("everything", OPTIONS, sizes=SMALL)
    first, about = saved(tmp_path, HONEST, case, 3)
    problem = case.problem(3)
    for name in ("q", "k", "v", "dout", "dlse"):
        assert first[name].dtype == np.float32
        assert (first[name] == getattr(problem, name)).all()
    again, _ = saved(tmp_path, HONEST, case, 3)
    other, _ = saved(tmp_path, HONEST, case, 4)
    assert about["seed"] == 3
    assert set(first) == set(again) == set(other)
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert all(first[name].tobytes() != other[name].tobytes() for name in ("q", "k", "v", "dout", "want_out", "got_dq"))


def test_got_is_what_was_returned_and_options_what_was_given(tmp_path):
    given, returned = {}, {}

    def mine(q, k, v, **options):
        given.update(options)
        returned["out"], returned["lse"] = forward(q, k, v, **options)
        return returned["out"], returned["lse"]

    def mine_back(dout, q, k, v, *, dlse=None, **options):
        returned.update(backward(dout, q, k, v, dlse=dlse, **options))
        returned["dk"] = 2 * returned["dk"]
        return returned

    arrays, about = saved(tmp_path, Candidate("mine", mine, mine_back), Case("everything", OPTIONS, sizes=SMALL))
    assert set(given) == {"mask", "bias", "scale", "softcap", "sink", "dropout_mask"}
    for name, x in given.items():
        y = about["options"].get(name, arrays.get(name))
        assert np.array_equal(x, y), name
        assert np.asarray(x).dtype == np.asarray(y).dtype
    got = {name.removeprefix("got_"): x for name, x in arrays.items() if name.startswith("got_")}
    assert set(got) == set(returned)
    for name, x in got.items():
        assert x.tobytes() == returned[name].tobytes()
    assert np.abs(got["dk"]).max() > 1.9 * np.abs(arrays["want_dk"]).max()


def test_the_error_over_sigma_is_that_of_the_check(tmp_path):
    """As the page computes it."""
    lines = re.search(r"```python\n(import json, numpy.*?)```", PAGE, re.S)[1]
    candidate = Candidate("doubled", forward, lambda *a, **b: {**backward(*a, **b), "dq": 2 * backward(*a, **b)["dq"]})
    result = examine(candidate, BY_NAME["E != D"])
    save(tmp_path / "case.npz", candidate, BY_NAME["E != D"], 0, Settings(), result)
    said, scope = [], {"print": lambda x: said.append(x)}
    exec(lines.replace('"case.npz"', repr(str(tmp_path / "case.npz"))), scope)
    (check,) = [c for c in result.checks if c.status == "wrong"]
    assert check.tensor == "dq"
    assert said == [[check.text]]
    assert scope["off"].max() == check.worst
    assert np.sqrt((scope["off"] ** 2).mean()) == pytest.approx(check.rms)
    scope["case"].close()


def test_what_is_said_about_it(tmp_path):
    case, settings = BY_NAME["softcap"], Settings("tight", PRECISIONS["tf32"])
    candidate = Candidate("uncapped", lambda q, k, v, *, softcap=None: forward(q, k, v))
    result = examine(candidate, case, 2, settings, Diagnostician())
    _, about = saved(tmp_path, candidate, case, 2, settings, result)
    texts = [c.text for c in result.checks if c.status == "wrong"]
    assert about == {
        "npattn": npattn.__version__, "candidate": "uncapped", "op": "attention", "case": "softcap", "seed": 2,
        "sizes": {"H": 3, "G": 3, "L": 37, "S": 53, "D": 16, "E": 16}, "lead": [2], "options": {"softcap": 1.5},
        "convention": {}, "level": "tight", "precision": "tf32", "status": "wrong", "wrong": texts,
        "diagnosis": [e.text for e in result.explanations],
    }  # fmt: skip
    assert len(texts) == 2
    assert "softcap is ignored" in about["diagnosis"][0]
    row = next(line for line in PAGE.splitlines() if line.startswith("| `about` |"))
    for word in ("candidate", "case", "seed", "sizes", "options", "level", "precision", "status", "wrong", "diagnosis"):
        assert word in row
        assert word in about


def test_sizes_are_those_of_the_arrays(tmp_path):
    """Options change the sizes of a case: twice the heads, wider values, more queries than keys."""
    case = Case("shaped", ("G < H", "E != D", "L > S"), sizes=SMALL)
    arrays, about = saved(tmp_path, HONEST, case)
    (B, H, L, D), (_, G, S, E) = arrays["q"].shape, arrays["v"].shape
    assert about["sizes"] == {"H": H, "G": G, "L": L, "S": S, "D": D, "E": E}
    assert (H, G, L, S, D, E) == (6, 3, 8, 4, 5, 8)
    assert about["lead"] == [B] == [2]
    assert shapes(case) == "B=2, H=6, G=3, L=8, S=4, D=5, E=8"
    assert shapes(Case("square", ("rank 2",), sizes=SMALL)) == "B=-, L=4, S=6, D=5, E=5"
    assert shapes(Case("two axes", ("rank 5",), sizes=SMALL)) == "B=3, 2, H=3, G=3, L=4, S=6, D=5, E=5"


KEYWORDS = ("causal top_left", "window", "window (None, 2)", "key_lengths", "window + key_lengths", "causal bottom_right")


@pytest.mark.parametrize("case", KEYWORDS)
def test_keywords_in_place_of_a_mask(tmp_path, case):
    """As arrays and numbers, the whole mask beside them."""

    def mine(q, k, v, *, mask=None, causal=None, window=None, key_lengths=None):
        given.update({"mask": mask, "causal": causal, "window": window, "key_lengths": key_lengths})
        return q

    given = {}
    arrays, about = saved(tmp_path, Candidate("mine", mine), BY_NAME[case])
    allowed = np.ones((2, 3, 37, 53), bool)
    causal, window, lengths = given["causal"], given["window"], given["key_lengths"]
    for b, h, i, j in np.ndindex(allowed.shape):
        seen = not (causal and j > i) and not (lengths is not None and j >= lengths[b])
        left, right = window or (None, None)
        seen = seen and (left is None or j >= i - left) and (right is None or j <= i + right)
        allowed[b, h, i, j] = seen and (given["mask"] is None or np.broadcast_to(given["mask"], allowed.shape)[b, h, i, j])
    assert (arrays["allowed"] == allowed).all()
    assert about["options"].get("causal") == causal
    assert about["options"].get("window") == (None if window is None else list(window))
    assert np.array_equal(arrays.get("key_lengths"), lengths)
    assert np.array_equal(arrays.get("mask"), given["mask"])
    assert ("causal" in about["options"]) == (case == "causal top_left")  # aligned as the convention says, or in a mask


def test_options_are_in_the_words_of_the_convention(tmp_path):
    given = {}

    def mine(q, k, v, *, mask=None):
        given["mask"] = mask
        return q

    arrays, _ = saved(tmp_path, Candidate("mine", mine, convention=Convention(mask="drop")), BY_NAME["mask array"])
    assert (arrays["mask"] == given["mask"]).all()
    assert (np.broadcast_to(~arrays["mask"], arrays["allowed"].shape) == arrays["allowed"]).all()


@pytest.mark.parametrize("name", ["Alibi", "RelativeTable"])
def test_a_bias_is_an_array(tmp_path, name):
    arrays, _ = saved(tmp_path, HONEST, Case(name, (name,), sizes=SMALL))
    want = attention_loops(arrays["q"], arrays["k"], arrays["v"], bias=np.broadcast_to(arrays["bias"], (2, 3, 4, 6)))["out"]
    assert np.abs(arrays["want_out"] - want).max() <= TERMS_EPS * np.finfo(float).eps * np.abs(want).max()


@pytest.mark.parametrize("name", ["float16-M1", "bfloat16-M1", "float8", "float64"])
def test_inputs_of_a_declared_class(tmp_path, name):
    case, settings = Case("small", ("sink",), sizes=SMALL), Settings(precision=PRECISIONS[name])
    arrays, about = saved(tmp_path, HONEST, case, settings=settings)
    assert about["precision"] == name
    held = {"float16-M1": np.float16, "float64": np.float64}.get(name, np.float32)
    for x in (arrays["q"], arrays["k"], arrays["v"], arrays["dout"]):
        assert x.dtype == held
        assert (round_to(x.astype(np.float64 if name == "float64" else np.float32), PRECISIONS[name].storage) == x).all()
    want = attention_loops(arrays["q"], arrays["k"], arrays["v"], sink=arrays["sink"])["out"]
    assert np.abs(arrays["want_out"] - want).max() <= TERMS_EPS * np.finfo(float).eps * np.abs(want).max()


def test_an_input_that_is_written_on_is_saved_as_it_was(tmp_path):
    def overwrites(q, k, v, *, sink=None):
        q *= 2
        sink += 1
        return q

    case = Case("small", ("sink",), sizes=SMALL)
    arrays, about = saved(tmp_path, Candidate("overwrites", overwrites), case)
    assert about["wrong"] == ["an input was modified: q, sink"]
    assert (arrays["q"] == case.problem().q).all()
    assert (arrays["sink"] == case.problem().options["sink"]).all()
    assert not any(name.startswith("got_") for name in arrays)


def test_an_output_that_the_backward_writes_on_is_saved_as_it_was(tmp_path):
    def overwrites(dout, q, k, v, *, out):
        out[...] = 0
        return dout, k, v

    case = Case("small", sizes=SMALL)
    arrays, about = saved(tmp_path, Candidate("overwrites", lambda q, k, v: forward(q, k, v)[0], overwrites), case)
    assert about["wrong"] == ["the backward modifies an input: out"]
    assert np.abs(arrays["got_out"]).min() > 0


def test_what_raises_is_saved_without_what_it_would_have_returned(tmp_path):
    def breaks(q, k, v):
        raise RuntimeError("out of shared memory")

    arrays, about = saved(tmp_path, Candidate("breaks", breaks), Case("small", sizes=SMALL))
    assert about["status"] == "wrong"
    assert re.fullmatch(r"raises RuntimeError: out of shared memory \(test_replay.py:\d+\)", about["wrong"][0])
    assert {"q", "want_out", "sigma_dq"} <= set(arrays)
    assert not any(name.startswith("got_") for name in arrays)
    arrays, about = saved(tmp_path, HONEST, BY_NAME["causal top_left"])
    assert (about["status"], about["wrong"], about["diagnosis"]) == ("ok", [], [])
    refusing = Candidate("refusing", lambda q, k, v: 1)
    _, about = saved(tmp_path, refusing, Case("small", ("sink",), sizes=SMALL))
    assert about["status"] == "not supported"


def test_other_layers_by_the_names_of_their_arguments(tmp_path):
    (case,) = [c for c in CASES_OF["rnn"] if c.name == "plain"]
    arrays, about = saved(tmp_path, load("rnn"), case)
    x, h0, (w_x, w_h, b) = arrays["x"], arrays["h0"], (arrays[f"params_{n}"] for n in ("w_x", "w_h", "b"))
    want = rnn_loops(x, h0, w_x, w_h, b, dh=arrays["dh"])
    assert np.abs(arrays["want_h"] - want["h"]).max() <= TERMS_EPS * np.finfo(float).eps * x.shape[1]
    assert np.abs(arrays["got_h"] - want["h"]).max() <= TERMS_EPS * np.finfo(np.float32).eps * x.shape[1]
    assert (about["op"], about["candidate"]) == ("rnn", "rnn")
    names = ("dx", "dh0", "dw_x", "dw_h", "db")
    assert {f"{kind}_{name}" for kind in ("want", "sigma", "got") for name in names} <= set(arrays)
    (case,) = [c for c in CASES_OF["multi_head"] if c.name == "plain"]
    arrays, about = saved(tmp_path, load("multi-head"), case)
    assert about["options"]["num_heads"] == 4
    assert arrays["params_w_q"].shape == arrays["got_dw_q"].shape


def test_a_class_without_a_model_is_saved_without_a_truth(tmp_path):
    (case,) = [c for c in CASES_OF["rnn"] if c.name == "plain"]
    arrays, about = saved(tmp_path, load("rnn"), case, settings=Settings(precision=PRECISIONS["bfloat16-M2"]))
    assert about["status"] == "not supported"
    assert {"x", "dh", "got_h"} <= set(arrays)
    assert "want_h" not in arrays


@pytest.mark.parametrize("name", [c.name for c in CASES if max(c.sizes.values()) < 100])
def test_no_array_needs_pickle(tmp_path, name):
    """Every case, given every keyword."""

    def mine(q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None, causal=None, window=None,
             key_lengths=None):  # fmt: skip
        return 0

    arrays, about = saved(tmp_path, Candidate("mine", mine), BY_NAME[name], result=examine(HONEST, Case("small", sizes=SMALL)))
    assert all(x.dtype.kind in "fbi" for x in arrays.values())
    assert about["case"] == name


# --- made smaller ---------------------------------------------------------------------------------------------------------


def wrong_from(**least):
    """Wrong where each letter has at least that size; and the sizes that it was called with."""
    seen = []

    def mine(q, k, v, **options):
        (B, H, L, D), (_, G, S, E) = q.shape, v.shape
        sizes = {"B": B, "H": H, "G": G, "L": L, "S": S, "D": D, "E": E}
        seen.append(sizes)
        out = forward(q, k, v, **options)[0]
        return 2 * out if all(sizes[letter] >= n for letter, n in least.items()) else out

    return Candidate("from", mine), seen


def shrunk(candidate, case, seed=0):
    small = shrink(candidate, case, seed, Settings())
    assert fails(candidate, small, seed, Settings())
    assert dataclasses.replace(small, sizes=case.sizes, lead=case.lead) == case  # nothing else has changed
    return shapes(small, seed)


@pytest.mark.parametrize(
    ("least", "sizes"),
    [
        ({}, "B=1, H=1, G=1, L=1, S=1, D=1, E=1"),
        ({"L": 5, "S": 7, "D": 3}, "B=1, H=1, G=1, L=5, S=7, D=3, E=1"),
        ({"L": 37, "E": 2}, "B=1, H=1, G=1, L=37, S=1, D=1, E=2"),
        ({"B": 2, "H": 2, "S": 53}, "B=2, H=2, G=2, L=1, S=53, D=1, E=1"),
    ],
    ids=str,
)
def test_the_smallest_sizes_that_still_fail(least, sizes):
    assert shrunk(wrong_from(**least)[0], BY_NAME["plain"]) == sizes


def test_each_batch_size_that_still_fails():
    case = dataclasses.replace(BY_NAME["plain"], lead=(7,), sizes=SMALL)
    for least in (1, 3, 6, 7):
        assert shrunk(wrong_from(B=least)[0], case) == f"B={least}, H=1, G=1, L=1, S=1, D=1, E=1"


def test_heads_and_groups_stay_what_they_are_to_each_other():
    candidate, seen = wrong_from(D=2)
    assert shrunk(candidate, BY_NAME["G < H"]) == "B=1, H=2, G=1, L=1, S=1, D=2, E=1"
    assert {s["H"] / s["G"] for s in seen} == {2}
    candidate, seen = wrong_from(D=2)
    assert shrunk(candidate, BY_NAME["plain"]) == "B=1, H=1, G=1, L=1, S=1, D=2, E=1"
    assert {s["H"] / s["G"] for s in seen} == {1}


def test_no_axis_becomes_empty_and_an_empty_one_stays():
    def breaks(q, k, v, **options):
        seen.append((*q.shape, *v.shape))
        raise RuntimeError

    seen = []
    assert shrunk(Candidate("breaks", breaks), BY_NAME["plain"]) == "B=1, H=1, G=1, L=1, S=1, D=1, E=1"
    assert min(map(min, seen)) == 1
    seen.clear()
    assert shrunk(Candidate("breaks", breaks), BY_NAME["L = 0"]) == "B=1, H=1, G=1, L=0, S=1, D=1, E=1"
    assert {shape[2] for shape in seen} == {0}
    seen.clear()
    assert shrunk(Candidate("breaks", breaks), BY_NAME["S = 0"]) == "B=1, H=1, G=1, L=1, S=0, D=1, E=1"
    assert {shape[6] for shape in seen} == {0}


def test_greater_steps_come_first():
    candidate, seen = wrong_from()
    shrunk(candidate, dataclasses.replace(BY_NAME["plain"], sizes={**SMALL, "L": 256, "S": 256}))
    assert len(seen) < 40


def test_sizes_that_a_case_cannot_be_drawn_in_are_passed_over():
    """A mask has to leave a choice, a twist its places."""
    for name in ("causal top_left", "dead rows", "NaN in values that are seen", "key_lengths 0 and S", "mask of one column"):
        candidate, _ = wrong_from()
        small = shrink(candidate, BY_NAME[name], 0, Settings())
        assert fails(candidate, small, 0, Settings())
        q, k = small.problem().q, small.problem().k
        assert q.size < 37 * 16 * 6 / 100
        assert k.shape[-2] >= {"causal top_left": 2, "NaN in values that are seen": 3}.get(name, 1)
    assert shrunk(candidate, BY_NAME["key_lengths 0 and S"]).startswith("B=2, ")
    assert not fails(candidate, dataclasses.replace(BY_NAME["key_lengths 0 and S"], lead=(1,)), 0, Settings())


def test_it_is_the_case_with_that_seed_that_is_made_smaller():
    case = Case("small", sizes=SMALL)
    first = case.problem(5).q.flat[0]

    def mine(q, k, v):
        seen.append(q.flat[0])
        return 2 * forward(q, k, v)[0]

    seen = []
    assert fails(Candidate("mine", mine), case, 5, Settings())
    shrink(Candidate("mine", mine), case, 5, Settings())
    assert seen[0] == seen[1] == first


def test_what_holds_stays_as_it_is():
    candidate, seen = wrong_from(L=1000)
    assert shrink(candidate, BY_NAME["plain"], 0, Settings()) is BY_NAME["plain"]
    assert {s["L"] for s in seen} == {37}


def test_a_failure_within_the_level_is_none():
    """A relative error of 1e-4 is wrong in float32, and right for a class that rounds to float16."""

    def nearly(q, k, v):
        return forward(*(x.astype(np.float32) for x in (q, k, v)))[0] * np.float32(1 + 1e-4)

    assert fails(Candidate("nearly", nearly), BY_NAME["plain"], 0, Settings())
    assert not fails(Candidate("nearly", nearly), BY_NAME["plain"], 0, Settings(precision=PRECISIONS["float16-M1"]))


def test_a_condition_that_does_not_hold_is_made_smaller_too():
    calls = iter(range(10**6))

    def unsteady(q, k, v):
        out = forward(q, k, v)[0]
        return np.nextafter(out, np.float32(9)) if next(calls) % 2 and q.shape[-2] >= 3 else out

    small = shrink(Candidate("unsteady", unsteady), BY_NAME["plain"], 0, Settings())
    assert shapes(small) == "B=1, H=1, G=1, L=3, S=1, D=1, E=1"


def test_cases_of_other_layers_stay_as_they_are():
    (case,) = [c for c in CASES_OF["softmax"] if c.name == "plain"]
    assert shrink(Candidate("mine", lambda scores: scores, op="softmax"), case, 0, Settings()) is case


# --- the command line -----------------------------------------------------------------------------------------------------

MINE = '''
    import numpy as np
    from npattn import attention_forward

    def right(q, k, v):
        return attention_forward(q, k, v)[0]

    def five(q, k, v, *, softcap=None):
        """Wrong from five queries on."""
        out = attention_forward(q, k, v, softcap=softcap)[0]
        return attention_forward(q, k, v)[0] if q.shape[-2] >= 5 else out

    calls = 0

    def unsteady(q, k, v):
        global calls
        calls += 1
        return np.nextafter(right(q, k, v), np.float32(9 if calls % 2 else -9))

    def scores(scores):
        return scores
'''


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["verify", *([] if any(a.startswith("--list") for a in arguments) else ["-v"]), *arguments])
        return status, capsys.readouterr().out

    return run


def read(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name != "about"}, json.loads(str(file["about"]))


def test_the_smallest_is_described_diagnosed_and_saved(run, tmp_path):
    status, text = run("theirs.py:five", "-k", "softcap", "-x", "--seed", "3", "--shrink", "--save", "case.npz")
    assert status == 1
    shown = text[text.index("\nsoftcap, as small as it still fails: ") :].splitlines()[1:]
    sizes = re.fullmatch(r"softcap, as small as it still fails: (B=1, H=1, G=1, L=5, S=(\d+), D=1, E=1)", shown[0])
    assert sizes
    assert shown[1].startswith("  WRONG  softcap  ")
    assert shown[2].startswith("           out[")
    assert shown[3].startswith("           => out: matches softcap is ignored to ")
    assert shown[4] == "saved softcap, seed 3, to case.npz"
    arrays, about = read(tmp_path / "case.npz")
    assert arrays["q"].shape == (1, 1, 5, 1)
    assert about["sizes"] == {"H": 1, "G": 1, "L": 5, "S": int(sizes[2]), "D": 1, "E": 1}
    assert (about["case"], about["seed"], about["lead"], about["status"]) == ("softcap", 3, [1], "wrong")
    assert about["wrong"] == [shown[2].strip()]
    assert about["diagnosis"] == [shown[3].strip().removeprefix("=> ")]
    uncapped = attention_loops(arrays["q"], arrays["k"], arrays["v"])["out"]
    assert np.abs(arrays["got_out"] - uncapped).max() <= TERMS_EPS * np.finfo(np.float32).eps * np.abs(arrays["v"]).max()
    capped = attention_loops(arrays["q"], arrays["k"], arrays["v"], softcap=about["options"]["softcap"])["out"]
    assert np.abs(arrays["want_out"] - capped).max() <= TERMS_EPS * np.finfo(float).eps * np.abs(arrays["v"]).max()
    _, text = run("theirs.py:five", "--case", "softcap", "--shrink", "--no-diagnosis")
    assert "as small as it still fails" in text
    assert "=>" not in text


def test_without_shrink_the_first_that_is_wrong_is_saved_as_it_is(run, tmp_path):
    status, text = run("theirs.py:five", "-k", "softcap", "--save", "case", "--level", "tight", "--no-diagnosis")
    assert status == 1
    assert "\nsaved softcap, seed 0, to case\n" in text
    arrays, about = read(tmp_path / "case")  # by that very name
    assert not (tmp_path / "case.npz").exists()
    assert (about["case"], about["level"], about["diagnosis"]) == ("softcap", "tight", [])
    assert (arrays["q"] == BY_NAME["softcap"].problem(0).q).all()


def test_a_known_failure_is_not_the_one_that_is_saved(run, tmp_path):
    run("theirs.py:five", "-k", "softcap", "--save", "case.npz", "--no-diagnosis", "--expect-failure", "softcap=issue 12")
    assert read(tmp_path / "case.npz")[1]["case"] == "G < H + softcap"


def test_the_only_case_is_saved_though_it_holds(run, tmp_path):
    status, text = run("theirs.py:right", "--case", "plain", "--shrink", "--save", "case.npz", "--seed", "2")
    assert status == 0
    assert "\nplain is not wrong: nothing to shrink\nsaved plain, seed 2, to case.npz\n" in text
    assert "still fails" not in text
    assert read(tmp_path / "case.npz")[1]["status"] == "ok"


def test_where_nothing_is_wrong_there_is_nothing_to_save(run, tmp_path):
    status, text = run("theirs.py:right", "-k", "small sizes", "--shrink", "--save", "case.npz", "--no-diagnosis")
    assert status == 0
    assert "\nno case is wrong: nothing to shrink or save\n" in text
    assert not (tmp_path / "case.npz").exists()
    (tmp_path / "case.npz").write_text("what was there")
    run("theirs.py:right", "-k", "small sizes", "--save", "case.npz", "--no-diagnosis")
    assert (tmp_path / "case.npz").read_text() == "what was there"


def test_a_condition_that_fails_is_saved(run, tmp_path):
    _, text = run("theirs.py:unsteady", "--case", "plain", "--shrink", "--save", "case.npz")
    shown = text[text.index("\nplain, as small as it still fails: B=1, H=1, G=1, L=1, S=1, D=1, E=1\n") :]
    assert "  WRONG  plain " in shown
    assert "repeat out[0, 0, 0, 0] is " in shown
    about = read(tmp_path / "case.npz")[1]
    assert about["status"] == "wrong"
    assert " in a second call, and " in about["wrong"][0]


def test_cases_of_other_layers_are_saved_but_not_made_smaller(run, tmp_path):
    status, text = run("theirs.py:scores", "--op", "softmax", "--case", "plain", "--shrink", "--save", "case.npz")
    assert status == 1
    assert "\nplain: cases of softmax are not made smaller\nsaved plain, seed 0, to case.npz\n" in text
    arrays, about = read(tmp_path / "case.npz")
    assert (about["op"], about["status"]) == ("softmax", "wrong")
    assert (arrays["got_weights"] == arrays["scores"]).all()
    assert np.abs(arrays["want_weights"].sum(-1) - 1).max() <= TERMS_EPS * np.finfo(float).eps
