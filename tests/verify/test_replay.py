"""One case alone: made as small as it still fails, and saved for a program that knows no npattn."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import abs_finite
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import attention_loops, rnn_loops
from theirs import right

import npattn
from npattn import attention_backward, attention_forward
from npattn.tolerances import TERMS_EPS
from npattn.verify import CASES_OF, PRECISIONS, Candidate, Case, Convention, Settings, examine, load
from npattn.verify.explain import Diagnostician
from npattn.verify.ops import OPS
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.ops.attention.draw import SMALL
from npattn.verify.precision import round_to
from npattn.verify.replay import code, fails, save, shapes, shrink
from npattn.verify.worker import Spec

PAGE = (Path(__file__).parents[2] / "docs/verifying.md").read_text()

# --- made smaller ---------------------------------------------------------------------------------------------------------


def sizes_of(q, v):
    (B, H, L, D), (_, G, S, E) = q.shape, v.shape
    return {"B": B, "H": H, "G": G, "L": L, "S": S, "D": D, "E": E}


def wrong_from(**least):
    """Wrong where each letter has at least that size; and the sizes that it was called with."""
    seen = []

    def mine(q, k, v, **options):
        seen.append(sizes_of(q, v))
        out = attention_forward(q, k, v, **options)[0]
        return 2 * out if all(seen[-1][letter] >= n for letter, n in least.items()) else out

    return Candidate("from", mine), seen


def neighbours(case):
    """The case with one size less by one, where that leaves something; heads and groups together."""
    for letters in (("H", "G"), "L", "S", "D", "E"):
        smaller = {**case.sizes, **{n: case.sizes[n] - 1 for n in letters}}
        if min(smaller[n] for n in letters) >= 1:
            yield dataclasses.replace(case, sizes=smaller)
    if case.lead[0] > 1:
        yield dataclasses.replace(case, lead=(case.lead[0] - 1,))


SHRUNK = ("plain", "G < H", "causal top_left", "dead rows", "key_lengths 0 and S", "mask of one column", "L = 0", "S = 0",
          "NaN in values that are seen")  # fmt: skip


@settings(max_examples=8)
@given(st.sampled_from(SHRUNK), st.fixed_dictionaries({}, optional={n: st.integers(1, 4) for n in "BHLSDE"}))
@example("plain", {})
@example("plain", {"B": 2, "L": 5, "S": 6, "D": 3})
@example("key_lengths 0 and S", {})
@example("causal top_left", {"L": 3})
def test_no_smaller_neighbour_fails(name, least):
    case = dataclasses.replace(BY_NAME[name], sizes={n: min(x, 6) for n, x in BY_NAME[name].sizes.items()}, lead=(3,))
    (candidate, seen), options = wrong_from(**least), Settings(power=False)
    if not fails(candidate, case, 0, options):
        assert shrink(candidate, case, 0, options) is case
        return
    small = shrink(candidate, case, 0, options)
    assert fails(candidate, small, 0, options)
    assert dataclasses.replace(small, sizes=case.sizes, lead=case.lead) == case  # nothing else has changed
    assert [n for n in neighbours(small) if fails(candidate, n, 0, options)] == []
    first = seen[0]
    assert {s["H"] * first["G"] == s["G"] * first["H"] for s in seen} == {True}
    assert all((s[letter] > 0) == (first[letter] > 0) for s in seen for letter in s)  # no axis becomes empty, or ceases to be
    if name == "plain":  # the sizes are free: each is the least that is wrong
        at = {letter: least.get(letter, 1) for letter in "BHLSDE"}
        assert shapes(small) == "B={B}, H={H}, G={H}, L={L}, S={S}, D={D}, E={E}".format(**at)


def test_greater_steps_come_first():
    candidate, seen = wrong_from()
    shrink(candidate, dataclasses.replace(BY_NAME["plain"], sizes={**SMALL, "L": 96, "S": 96}), 0, Settings())
    assert len(seen) < 40


def test_it_is_the_case_with_that_seed_that_is_made_smaller():
    case, seen = Case("small", sizes=SMALL), []

    def mine(q, k, v):
        seen.append(q.flat[0])
        return 2 * right(q, k, v)

    shrink(Candidate("mine", mine), case, 5, Settings())
    assert seen[0] == case.problem(5).q.flat[0]


def test_a_failure_within_the_level_is_none():
    """A relative error of 1e-4 is wrong in float32, and right for a class that rounds to float16."""

    def nearly(q, k, v):
        return right(*(x.astype(np.float32) for x in (q, k, v))) * np.float32(1 + 1e-4)

    assert fails(Candidate("nearly", nearly), BY_NAME["plain"], 0, Settings())
    assert not fails(Candidate("nearly", nearly), BY_NAME["plain"], 0, Settings(precision=PRECISIONS["float16-M1"]))


def test_cases_of_other_layers_stay_as_they_are():
    case = CASES_OF["softmax"][0]
    assert shrink(Candidate("mine", lambda scores: scores, op="softmax"), case, 0, Settings()) is case


# --- as a program ---------------------------------------------------------------------------------------------------------

KERNEL = """
import numpy as np
from npattn import attention_backward, attention_forward

def forward(q, k, v, *, softcap=None):
    note("forward", q, k, v)
    return attention_forward(q, k, v, softcap=softcap, return_lse=True)[0]

def backward(dout, q, k, v, *, softcap=None, out, lse, dlse=None):
    note("backward", dout, q, k, v)
    assert out.shape == dout.shape and lse.shape == q.shape[:-1]
    g = attention_backward(dout, attention_forward(q, k, v, softcap=softcap)[1], dlse)
    return {"dv": g.v, "dk": 2 * g.k, "dq": g.q}

def note(*what):
    print(*what[:1], *((x.strides, x.flags.writeable, [x is y for y in what[1:]]) for x in what[1:]))
"""


@pytest.mark.parametrize("file", ["mine.py", "my-kernel.py", "class.py"])
@pytest.mark.parametrize(
    "row", [{}, {"k in memory": "Fortran", "v in memory": "read-only"}, {"alias": "k is q", "q in memory": "backwards"},
            {"dout in memory": "axes swapped", "k in memory": "every second row", "v in memory": "strides of 0"},
            {"alias": "dout is q", "softcap": "softcap", "batch": "rank 2"}, {"cotangents": "dlse", "batch": "3 x 2"}],
    ids=str,
)  # fmt: skip
def test_the_program_makes_the_call_that_was_wrong(tmp_path, file, row, capfd):
    """With the same layouts, with out, lse and dlse, and it reads the gradient by its name."""
    (tmp_path / file).write_text(KERNEL)
    space = OPS["attention"].space
    case = space.sized({**space.plain, **row}, {"H": 1, "G": 1, "L": 3, "S": 3, "D": 2, "E": 2})
    spec = Spec(f"{tmp_path}/{file}:forward", "backward", Convention(), None, Settings(), diagnose=False)
    candidate = load(spec.name, spec.backward)
    result = examine(candidate, case, 0, Settings(power=False))
    assert [c.tensor for c in result.checks if c.status == "wrong"] == ["dk"]
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("backward")]
    program = code(candidate, spec, case, result, Settings())
    capfd.readouterr()
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, check=True)
    *called, off = done.stdout.splitlines()
    assert called == told[-1:]
    assert float(off) > 1e-3


# --- saved ----------------------------------------------------------------------------------------------------------------

ALL = ("G < H", "E != D", "causal top_left", "mask array", "bias HLS", "negative scale", "softcap", "sink", "dropout_mask",
       "dlse")  # fmt: skip


def forward(q, k, v, *, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None):
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink, "dropout_mask": dropout_mask}
    return attention_forward(q, k, v, **options, return_lse=True)[0]


def backward(dout, q, k, v, *, dlse=None, mask=None, bias=None, scale=None, softcap=None, sink=None, dropout_mask=None):
    options = {"mask": mask, "bias": bias, "scale": scale, "softcap": softcap, "sink": sink, "dropout_mask": dropout_mask}
    g = attention_backward(dout, attention_forward(q, k, v, **options)[1], dlse)
    return {"dq": g.q, "dk": g.k, "dv": g.v, "dbias": g.bias, "dsink": g.sink}


HONEST = Candidate("honest", forward, backward)


def small(*options, **more):
    return Case("small", options, sizes=SMALL, **more)


def read(path):
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays.pop("about")))


def saved(folder, candidate, case, seed=0, settings=None, result=None):
    """The arrays of a file as any program reads them, and what is written about them."""
    settings = settings or Settings()
    result = result or examine(candidate, case, seed, settings)
    save(folder / "case", candidate, case, seed, settings, result)  # by that very name
    return read(folder / "case")


def near(x, y, dtype=np.float64):
    return np.abs(x - y).max() <= TERMS_EPS * np.finfo(dtype).eps * max(1, abs_finite(y).max())


@pytest.mark.parametrize(
    ("case", "declared"),
    [
        (small(*ALL), ""), (small(*ALL, dtype="float64"), ""), (small("Alibi"), ""), (small("RelativeTable", "mask array"), ""),
        (small("sink"), "float16-M1"), (small("sink"), "bfloat16-M1"), (small("sink"), "float8"), (small("sink"), "float64"),
    ],
    ids=["all", "all float64", "Alibi", "RelativeTable", "float16", "bfloat16", "float8", "declared float64"],
)  # fmt: skip
def test_a_file_has_what_its_schema_says_and_the_truth_of_loops(tmp_path, case, declared):
    """From nothing but the arrays of the file and the numbers in about."""
    x, about = saved(tmp_path, HONEST, case, 3, Settings(precision=PRECISIONS[declared] if declared else None))
    (B, H, L, D), (_, G, S, E) = x["q"].shape, x["v"].shape
    options = {name for name in ("mask", "allowed", "bias", "sink", "dropout_mask", "dlse") if name in x}
    judged = ["out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in ("bias", "sink") if name in options)]
    inputs = {"q", "k", "v", "dout"}
    assert set(x) == inputs | options | {f"{kind}_{name}" for kind in ("want", "sigma", "got") for name in judged}
    assert {array.dtype.kind for array in x.values()} <= {"f", "b"}
    assert about["sizes"] == {"H": H, "G": G, "L": L, "S": S, "D": D, "E": E}
    assert (about["lead"], about["seed"]) == ([B], 3)
    held = np.dtype({"float16-M1": "float16", "float64": "float64", "": case.dtype}.get(declared, "float32"))
    for name in inputs:
        assert x[name].dtype == held
        wide = x[name].astype(np.result_type(held, np.float32))
        assert (round_to(wide, PRECISIONS[about["precision"]].storage) == wide).all()
    given = {name: x.get(name) for name in ("allowed", "sink", "dropout_mask", "dout", "dlse")} | about["options"]
    bias = np.broadcast_to(x["bias"], (B, H, L, S)) if "bias" in x else None
    want = attention_loops(x["q"], x["k"], x["v"], bias=bias, **given)
    for name in judged:
        truth = want[name if name in ("out", "lse") else name[1:]]
        truth = truth.sum(0, keepdims=True) if name == "dbias" and len(x["bias"]) == 1 else truth
        assert x[f"want_{name}"].dtype == np.float64
        assert x[f"want_{name}"].shape == truth.shape == x[f"sigma_{name}"].shape == x[f"got_{name}"].shape, name
        assert near(x[f"want_{name}"], truth), name


def test_files_of_other_layers_have_the_names_of_their_arguments(tmp_path):
    x, about = saved(tmp_path, load("rnn"), CASES_OF["rnn"][0])
    want = rnn_loops(x["x"], x["h0"], *(x[f"params_{n}"] for n in ("w_x", "w_h", "b")), dh=x["dh"])
    assert near(x["want_h"], want["h"])
    assert near(x["got_h"], want["h"], np.float32)
    assert (about["op"], about["candidate"]) == ("rnn", "rnn")
    names = ("dx", "dh0", "dw_x", "dw_h", "db")
    assert {f"{kind}_{name}" for kind in ("want", "sigma", "got") for name in names} <= set(x)
    x, about = saved(tmp_path, load("multi-head"), CASES_OF["multi_head"][0])
    assert about["options"]["num_heads"] == 4
    assert x["params_w_q"].shape == x["got_dw_q"].shape


def test_what_is_said_about_a_case(tmp_path):
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


def test_the_error_over_sigma_is_that_of_the_check(tmp_path):
    """As the page computes it."""
    lines = re.search(r"```python\n(import json, numpy.*?)```", PAGE, re.S)[1]
    candidate = Candidate("doubled", forward, lambda *a, **b: {**backward(*a, **b), "dq": 2 * backward(*a, **b)["dq"]})
    result = examine(candidate, BY_NAME["E != D"])
    save(tmp_path / "case.npz", candidate, BY_NAME["E != D"], 0, Settings(), result)
    said, scope = [], {"print": lambda x: said.append(x)}
    exec(lines.replace('"case.npz"', repr(str(tmp_path / "case.npz"))), scope)
    (check,) = [c for c in result.checks if c.status == "wrong"]
    assert (check.tensor, said) == ("dq", [[check.text]])
    assert scope["off"].max() == check.worst
    assert np.sqrt((scope["off"] ** 2).mean()) == pytest.approx(check.rms)
    scope["case"].close()


# --- what was given, and what came back -----------------------------------------------------------------------------------


def test_inputs_are_those_that_the_seed_draws(tmp_path):
    case = small(*ALL)
    first, _ = saved(tmp_path, HONEST, case, 3)
    again, _ = saved(tmp_path, HONEST, case, 3)
    other, _ = saved(tmp_path, HONEST, case, 4)
    assert set(first) == set(again) == set(other)
    assert all((first[name] == getattr(case.problem(3), name)).all() for name in ("q", "k", "v", "dout", "dlse"))
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

    arrays, about = saved(tmp_path, Candidate("mine", mine, mine_back), small(*ALL))
    assert set(given) == {"mask", "bias", "scale", "softcap", "sink", "dropout_mask"}
    for name, x in given.items():
        y = about["options"].get(name, arrays.get(name))
        assert np.array_equal(x, y), name
        assert np.asarray(x).dtype == np.asarray(y).dtype
    got = {name.removeprefix("got_"): x.tobytes() for name, x in arrays.items() if name.startswith("got_")}
    assert got == {name: x.tobytes() for name, x in returned.items()}


KEYWORDS = ("causal top_left", "window", "window (None, 2)", "key_lengths", "window + key_lengths", "causal bottom_right")


@pytest.mark.parametrize("case", KEYWORDS)
def test_keywords_in_place_of_a_mask_are_saved_beside_the_whole_mask(tmp_path, case):
    """As arrays and numbers."""

    def mine(q, k, v, *, mask=None, causal=None, window=None, key_lengths=None):
        given.update({"mask": mask, "causal": causal, "window": window, "key_lengths": key_lengths})
        return q

    given = {}
    arrays, about = saved(tmp_path, Candidate("mine", mine), dataclasses.replace(BY_NAME[case], sizes={**SMALL, "S": 9}))
    causal, window, lengths = given["causal"], given["window"], given["key_lengths"]
    allowed = np.ones(arrays["allowed"].shape, bool)
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

    arrays, _ = saved(tmp_path, Candidate("mine", mine, convention=Convention(mask="drop")), small("mask array"))
    assert (arrays["mask"] == given["mask"]).all()
    assert (np.broadcast_to(~arrays["mask"], arrays["allowed"].shape) == arrays["allowed"]).all()


def test_every_case_is_saved_without_pickle(tmp_path, one_of_each):
    result = examine(HONEST, small())
    for case in one_of_each:
        arrays, about = saved(tmp_path, Candidate("mine", lambda q, k, v, **options: 0), case, result=result)
        assert {x.dtype.kind for x in arrays.values()} <= {"f", "b", "i"}
        assert about["case"] == case.name


# --- candidates that misbehave --------------------------------------------------------------------------------------------


def test_an_input_that_is_written_on_is_saved_as_it_was(tmp_path):
    def overwrites(q, k, v, *, sink=None):
        q *= 2
        sink += 1
        return q

    arrays, about = saved(tmp_path, Candidate("overwrites", overwrites), small("sink"))
    assert about["wrong"] == ["an input was modified: q, sink"]
    assert (arrays["q"] == small("sink").problem().q).all()
    assert (arrays["sink"] == small("sink").problem().options["sink"]).all()
    assert not any(name.startswith("got_") for name in arrays)


def test_an_output_that_the_backward_writes_on_is_saved_as_it_was(tmp_path):
    def overwrites(dout, q, k, v, *, out):
        out[...] = 0
        return dout, k, v

    arrays, about = saved(tmp_path, Candidate("overwrites", lambda q, k, v: forward(q, k, v)[0], overwrites), small())
    assert about["wrong"] == ["the backward modifies an input: out"]
    assert np.abs(arrays["got_out"]).min() > 0


def test_what_returns_nothing_is_saved_without_it(tmp_path):
    def breaks(q, k, v):
        raise RuntimeError("out of shared memory")

    arrays, about = saved(tmp_path, Candidate("breaks", breaks), small())
    assert about["status"] == "wrong"
    assert re.fullmatch(r"raises RuntimeError: out of shared memory \(test_replay.py:\d+\)", about["wrong"][0])
    assert {"q", "want_out", "sigma_dq"} <= set(arrays)
    assert not any(name.startswith("got_") for name in arrays)
    assert saved(tmp_path, Candidate("mine", lambda q, k, v: 1), small("sink"))[1]["status"] == "not supported"


def test_a_class_without_a_model_is_saved_without_a_truth(tmp_path):
    arrays, about = saved(tmp_path, load("rnn"), CASES_OF["rnn"][0], settings=Settings(precision=PRECISIONS["bfloat16-M2"]))
    assert about["status"] == "not supported"
    assert {"x", "dh", "got_h"} <= set(arrays)
    assert "want_h" not in arrays


# --- the command line -----------------------------------------------------------------------------------------------------


def test_the_smallest_is_described_diagnosed_and_saved(run, tmp_path):
    chosen = ["theirs:uncapped_from_five_queries", "-v", "--case", "softcap", "--seed", "3", "--shrink"]
    status, text = run(*chosen, "--save", "case")
    assert status == 1
    shown = text[text.index("\nsoftcap, as small as it still fails: ") :].splitlines()[1:]
    sizes = re.fullmatch(r"softcap, as small as it still fails: (B=1, H=1, G=1, L=5, S=(\d+), D=1, E=1)", shown[0])
    assert sizes
    assert shown[1].startswith("  WRONG  softcap  ")
    assert shown[2].startswith("           out[")
    assert shown[3].startswith("           => out: matches softcap is ignored to ")
    assert shown[4] == "saved softcap, seed 3, to case"
    arrays, about = read(tmp_path / "case")
    assert about["sizes"] == {"H": 1, "G": 1, "L": 5, "S": int(sizes[2]), "D": 1, "E": 1}
    assert (about["case"], about["seed"], about["lead"], about["status"]) == ("softcap", 3, [1], "wrong")
    assert (about["wrong"], about["diagnosis"]) == ([shown[2].strip()], [shown[3].strip().removeprefix("=> ")])
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    assert near(arrays["got_out"], attention_loops(q, k, v)["out"], np.float32)
    assert near(arrays["want_out"], attention_loops(q, k, v, softcap=about["options"]["softcap"])["out"])
    _, text = run(*chosen, "--no-diagnosis")
    assert "as small as it still fails" in text
    assert "=>" not in text


def test_without_shrink_the_first_that_is_wrong_and_not_known_is_saved_as_it_is(run, tmp_path):
    chosen = ["theirs:uncapped", "-k", "softcap", "-x", "--level", "tight", "--no-diagnosis", "--expect-failure", "softcap=12"]
    status, text = run(*chosen, "--save", "case")
    case = BY_NAME["causal top_left + softcap"]
    assert status == 1
    assert f"\nsaved {case.name}, seed 0, to case\n" in text
    arrays, about = read(tmp_path / "case")
    assert (about["case"], about["level"], about["diagnosis"]) == (case.name, "tight", [])
    assert (arrays["q"] == case.problem(0).q).all()


def test_the_only_case_is_saved_though_it_holds(run, tmp_path):
    status, text = run("theirs:right", "--case", "plain", "--shrink", "--save", "case.npz", "--seed", "2")
    assert status == 0
    assert "\nplain is not wrong: nothing to shrink\nsaved plain, seed 2, to case.npz\n" in text
    assert "still fails" not in text
    about = read(tmp_path / "case.npz")[1]
    assert (about["status"], about["wrong"], about["diagnosis"]) == ("ok", [], [])


def test_where_nothing_is_wrong_there_is_nothing_to_save(run, tmp_path):
    (tmp_path / "there").write_text("what was there")
    for name in ("there", "new"):
        status, text = run("theirs:right", "-k", "inputs x", "--shrink", "--save", name, "--no-diagnosis")
        assert status == 0
        assert "\nno case is wrong: nothing to shrink or save\n" in text
    assert (tmp_path / "there").read_text() == "what was there"
    assert not (tmp_path / "new").exists()


def test_a_condition_that_fails_is_made_smaller_and_saved(run, tmp_path):
    _, text = run("theirs:unsteady", "-v", "--case", "plain", "--shrink", "--save", "case.npz")
    shown = text[text.index("\nplain, as small as it still fails: B=1, H=1, G=1, L=1, S=1, D=1, E=1\n") :]
    assert "  WRONG  plain " in shown
    assert "repeat out[0, 0, 0, 0] is " in shown
    about = read(tmp_path / "case.npz")[1]
    assert about["status"] == "wrong"
    assert " in a second call, and " in about["wrong"][0]


def test_cases_of_other_layers_are_saved_but_not_made_smaller(run, tmp_path):
    status, text = run("theirs:scores_themselves", "--op", "softmax", "--case", "plain", "--shrink", "--save", "case.npz")
    assert status == 1
    assert "\nplain: cases of softmax are not made smaller\nsaved plain, seed 0, to case.npz\n" in text
    arrays, about = read(tmp_path / "case.npz")
    assert (about["op"], about["status"]) == ("softmax", "wrong")
    assert (arrays["got_weights"] == arrays["scores"]).all()
    assert near(arrays["want_weights"].sum(-1), np.ones(1))
