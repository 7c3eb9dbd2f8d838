"""The spaces of calls: which rows are drawn, what is learned from refusals, and what `npattn verify` says of it."""

from __future__ import annotations

import functools
import itertools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from helpers import first

from npattn import attention, cli
from npattn.tolerances import GOOD_MAX
from npattn.verify import Candidate, Convention, Settings, judge, limits
from npattn.verify.api import examine_all
from npattn.verify.judge import Check, Result, as_given
from npattn.verify.ops import OPS
from npattn.verify.ops.attention.cases import Case
from npattn.verify.ops.attention.space import LENGTHS, SPACE, WIDTHS
from npattn.verify.runs import Drawing, Runs
from npattn.verify.space import CALLS, LAYOUTS, Drawer
from npattn.verify.worker import Spec

SPACES = {name: op.space for name, op in OPS.items()}


def drawn(takes=lambda case: True, space=SPACE, seed=0, until="pairs"):
    """The cases of a whole run, without anything being computed, and what was met."""
    drawing, found = Drawing(space, seed), []
    for cases in drawing.rounds(takes, until):
        found += cases
        for case in cases:
            drawing.saw(case, takes(case))
        if not until and len(found) > 700:
            break
    return found, drawing.drawer.coverage(until)


@functools.cache
def whole(op="attention"):
    return drawn(space=SPACES[op])


@pytest.mark.parametrize("op", SPACES)
def test_every_pair_of_classes_is_met(op):
    space = SPACES[op]
    found, coverage = whole(op)
    pairs = {frozenset(pair) for case in found for pair in itertools.combinations(case.row.items(), 2)}
    assert coverage.met == coverage.pairs == len(pairs)
    possible = [
        (a, b) for a, b in itertools.combinations([(n, c) for n, some in space.dimensions.items() for c in some], 2)
        if a[0] != b[0] and space.possible(dict([a, b]))
    ]  # fmt: skip
    assert len(possible) == coverage.pairs + len(coverage.left_out)
    assert coverage.refused == {}
    assert op != "attention" or coverage.pairs > 3000


def test_the_same_seed_draws_the_same_and_another_others():
    one, again, other = (drawn(space=SPACES["rnn"], seed=seed)[0] for seed in (0, 0, 1))
    assert [case.name for case in one] == [case.name for case in again]
    assert {case.name for case in one} != {case.name for case in other}


def test_every_triple_of_some_dimensions_is_met():
    space = SPACES["softmax"]
    found, coverage = drawn(space=space, until="triples")
    met, every = coverage.triples
    some = [{n: c for n, c in case.row.items() if n in space.triples} for case in found]
    assert len({frozenset(three) for row in some for three in itertools.combinations(row.items(), 3)}) >= met
    assert met == every > 1000


@pytest.mark.parametrize("op", SPACES)
def test_a_case_is_found_by_its_name_and_is_the_same_in_another_process(op):
    for case in whole(op)[0][::20]:
        again, sent = SPACES[op].named(case.name), pickle.loads(pickle.dumps(case))
        assert sent.row == case.row
        assert again.name == case.name
        assert again.sizes == sent.sizes == case.sizes
        first_of = next(iter(case.problem().cotangents.values()))
        assert np.array_equal(next(iter(again.problem().cotangents.values())), first_of, equal_nan=True)


def test_a_case_has_the_classes_of_its_row():
    for case in whole()[0][::5]:
        row, problem = case.row, case.problem()
        assert problem.dtype == row["dtype"]
        assert (problem.q.ndim == 2) == (row["batch"] == "rank 2")
        assert problem.shape[-2] in LENGTHS[row["L"]]
        assert problem.shape[-1] in (LENGTHS[row["S"]] if row["S"] != "as L" else (problem.shape[-2],))
        assert problem.q.shape[-1] in WIDTHS[row["D"]]
        assert ("softcap" in problem.options, "sink" in problem.options) == (row["softcap"] != "no", row["sink"] != "no")
        assert ("mask" in problem.options) == (row["mask"] != "none" or row["order"] != "none")
        assert case.conditions == CALLS[row["calls"]]
        assert SPACE.possible(row)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_a_layout_changes_where_the_numbers_are_and_not_what_they_are(layout, name):
    case = SPACE.sized({**SPACE.plain, f"{name} in memory": layout}, {"H": 2, "G": 2, "L": 6, "S": 6, "D": 4, "E": 4})
    plain, placed = case.problem(), case.place(case.problem())
    for n in ("q", "k", "v", "dout"):
        x, y = getattr(plain, n), getattr(placed, n)
        same = np.broadcast_to(x[:1], x.shape) if (n, layout) == (name, "strides of 0") else x
        assert np.array_equal(same, y)
        assert (y.strides != x.strides or not y.flags.writeable) == (n == name and layout != "plain")


def test_arrays_that_are_one():
    sizes = {"H": 2, "G": 2, "L": 6, "S": 6, "D": 4, "E": 4}
    for alias, same in {"k is q": "qk", "v is k": "kv", "one array": "qkv"}.items():
        p, _ = as_given(SPACE.sized({**SPACE.plain, "alias": alias}, sizes), 0, Settings())
        assert len({id(p.inputs[n]) for n in same}) == 1
        assert len({id(x) for x in p.inputs.values()}) == 4 - len(same)


# --- limits ------------------------------------------------------------------------------------------------------------------

KERNELS = {
    "D 64 or 128, L and S multiples of 16": (lambda n: n["D"] in (64, 128) and n["L"] % 16 == 0 and n["S"] % 16 == 0,
                                             ["L%16=0", "S%16=0", "D=64,128"]),
    "self-attention": (lambda n: n["L"] == n["S"], ["S=L"]),
    "D = E and at most 128": (lambda n: n["D"] == n["E"] and n["D"] <= 128, ["D<=128", "E=D"]),
    "S of 32 or more": (lambda n: n["S"] >= 32, ["L>=32", "S>=32"]),  # in the calls for L, S is L
    "nothing of the plain sizes": (lambda n: n["D"] == 32 and n["L"] % 128 == 0, ["L%128=0", "D=32"]),
}


@pytest.mark.parametrize("kernel", first(2, list(KERNELS)))
def test_limits_are_found_and_what_is_drawn_obeys_them(kernel):
    holds, expected = KERNELS[kernel]
    found, coverage = drawn(lambda case: holds(case.sizes))
    assert set(coverage.limits) >= set(expected)
    assert coverage.met > 0.98 * coverage.pairs > 5000
    taken = [case for case in found if holds(case.sizes)]
    assert len(taken) > 300
    assert len({case.sizes["L"] for case in taken}) > 2
    assert max(case.sizes["L"] for case in taken) > 256


def test_a_class_that_is_refused_by_itself_is_not_drawn_again():
    def takes(case):
        return case.row["bias"] == "none" and case.row["dtype"] == "float32"

    found, coverage = drawn(takes)
    others = {name: [c for c in SPACE.dimensions[name] if c != SPACE.plain[name]] for name in ("bias", "dtype")}
    assert coverage.refused == others
    assert not coverage.limits
    assert sum(not takes(case) for case in found) == len(others["bias"]) + 1


@pytest.mark.slow
def test_what_is_refused_only_together_is_left_and_said():
    _, coverage = drawn(lambda case: case.row["bias"] == "none" or case.row["sink"] == "no")
    lost = (len(SPACE.dimensions["bias"]) - 1) * (len(SPACE.dimensions["sink"]) - 1)
    assert coverage.pairs - lost >= coverage.met > 0.9 * (coverage.pairs - lost)
    assert not coverage.too_little
    assert coverage._replace(met=coverage.pairs // 3).too_little


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        ("D=64,128", {"D": 128}, {"D": 96}), ("L%16=0", {"L": 48}, {"L": 49}), ("L%64=1", {"L": 65}, {"L": 64}),
        ("S<=512", {"S": 512}, {"S": 513}), ("S>=128", {"S": 128}, {"S": 127}), ("L=S", {"L": 5, "S": 5}, {"L": 5, "S": 6}),
    ],
)  # fmt: skip
def test_conditions_on_sizes(text, yes, no):
    condition = limits.parse(text)
    assert condition.holds(yes)
    assert not condition.holds(no)
    drawer = Drawer(limits.restricted(SPACE, [condition]), 0)
    for row in drawer.one_by_one():
        case = drawer.space.case(row, drawer.rng)
        assert case is None or condition.holds(case.sizes)


def test_sizes_that_no_class_has_get_classes_of_their_own():
    space = limits.restricted(SPACE, [limits.parse("D=88"), limits.parse("L%100=0"), limits.parse("G=H")])
    found, coverage = drawn(space=space)
    assert {case.sizes["D"] for case in found} == {88}
    assert {case.sizes["L"] for case in found} >= {100, 200, 300}
    assert all(case.sizes["G"] == case.sizes["H"] for case in found)
    assert coverage.met > 0.98 * coverage.pairs


# --- run ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "every"), first(5, [(op, 40) for op in SPACES] + [(op, 1) for op in SPACES]))
def test_an_honest_kernel_holds_in_what_is_drawn(op, every):
    name, pair = next(iter(OPS[op].candidates.items()))
    candidate = Candidate(name, *pair(), op=op)
    cases = whole(op)[0][::every]
    assert [case.name for case in cases if examine_all(candidate, case, 0, Settings()).status not in ("ok", "no power")] == []


BUG = '''
import numpy as np

def attention(q, k, v, *, softcap=None):
    """Without masks and grouped heads; wrong with a softcap where S is 3 or more and L is not S."""
    if k.shape[:-2] != q.shape[:-2]:
        raise NotImplementedError("grouped heads")
    s = q @ k.swapaxes(-1, -2) * q.dtype.type(q.shape[-1] ** -0.5)
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
        if q.shape[-2] != k.shape[-2]:
            s[..., 2:] += q.dtype.type(0.5)
    p = np.exp(s - s.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)) @ v
'''


def test_what_is_wrong_under_two_conditions_is_found_made_small_and_printed_as_a_program(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(BUG)
    assert cli.main(["verify", "mine.py:attention", "--fuzz", "120"]) == 1
    text = capsys.readouterr().out
    assert text.startswith("WRONG: mine.py:attention falls short in ")
    assert "  never tested: heads 2 / 1, 4 / 2, 3 / 1, 6 / 2, 8 / 1, 16 / 2\n" in text
    assert " as small as it still fails: B=-, H=1, G=1, L=1, S=3, " in text or " L=1, S=3, " in text
    program = text[text.index("import numpy as np") :]
    assert "npattn" not in program
    assert "got = attention(q, k, v, softcap=softcap)\n" in program
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert float(done.stdout) > GOOD_MAX * np.finfo(np.float32).eps  # of numbers of size 1


def test_an_honest_one_is_right_and_told_what_was_met(capsys):
    assert cli.main(["verify", "--fuzz", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("RIGHT: blockwise holds in all that was tested, ")
    assert " cases drawn: of the pairs of classes that it takes, " in text


ALWAYS_WRONG = """
import numpy as np

def softmax(scores, *, mask=None):
    raise NotImplementedError if mask is not None else ValueError("wrong")
"""


@pytest.mark.parametrize(("name", "drawn_too"), [("plain", False), ("mask", True)])
def test_nothing_is_drawn_if_a_named_case_is_wrong(name, drawn_too, tmp_path):
    (tmp_path / "mine.py").write_text(ALWAYS_WRONG)
    spec = Spec(f"{tmp_path}/mine.py:softmax", None, Convention(), "softmax", Settings(power=False), diagnose=False)
    named = [OPS["softmax"].by_name[name]]
    with Runs(spec, 60, named, [0], {}, space=SPACES["softmax"]) as runs:
        results = list(runs.results())
    assert results[0].status == ("refused" if drawn_too else "wrong")
    assert (len(results) > 1) == drawn_too


@pytest.mark.parametrize(
    ("worst", "status"),  # in units of the limit, at seeds 0, 1 and 2
    [((1.5, 0.5, 0.5), "ok"), ((1.5, 1.5, 0.5), "wrong"), ((1.5, 0.5, 1.5), "wrong"), ((3, 0.5, 0.5), "wrong"), ((0.5,), "ok")],
)
def test_a_drawn_case_that_is_wrong_by_little_is_drawn_again(worst, status, monkeypatch):
    def at(candidate, case, seed, *others):
        off = worst[seed]
        return Result(case.name, [], [Check("out", "wrong" if off > 1 else "ok", worst=off * GOOD_MAX)], seed=seed)

    monkeypatch.setattr(judge, "_examine", at)
    assert judge.examine(None, whole("softmax")[0][0]).status == status
    named = judge.examine(None, OPS["softmax"].cases[0])
    assert named.status == ("wrong" if worst[0] > 1 else "ok")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fuzz", "0"], "it is 0, expected a number of seconds above 0"),
        (["--fuzz", "1", "--case", "plain"], "--fuzz and --case contradict each other"),
        (["--fuzz", "1", "--deep"], "--fuzz and --deep contradict each other"),
        (["--sizes", "D=64", "-k", "causal"], "--sizes and -k contradict each other"),
        (["--dtype", "float16", "--precision", "tf32"], "--dtype float16 and --precision tf32 contradict each other"),
        (["--sizes", "D=x,y"], "--sizes 'D=x,y', expected numbers on the right, or one letter"),
        (["--sizes", "D~3"], "--sizes 'D~3', expected such as D=64,128 or L%16=0 or S<=512 or L=S"),
        (["--sizes", "Q=3"], "--sizes Q=3: there is no size Q, expected one of D, E, G, H, L, S"),
        (["--sizes", "D=64", "D>=65"], "no D is left"),
        (["--options", "colour"], "--options colour, expected some of mask, bias,"),
    ],
)
def test_what_goes_not_together_is_usage(arguments, message, capsys):
    try:
        status = cli.main(["verify", *arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [("sink",), ("dropout_mask",)])
def test_outputs_whose_squares_underflow_have_a_sigma(options):
    """In float64, beside a sink or a key that dropout takes, all other weights of a row may be 1e-200: found by drawing."""
    case = Case("tiny outputs", options, "x30", {"H": 2, "G": 2, "L": 40, "S": 4, "D": 64, "E": 64},
                dtype="float64")  # fmt: skip
    problem = case.problem()
    candidate = Candidate("blockwise", *OPS["attention"].candidates["blockwise"]())
    tiny = np.abs(attention(problem.q, problem.k, problem.v, **problem.arguments))
    assert ((tiny > 0) & (tiny < 1e-160)).any()
    assert examine_all(candidate, case, 0, Settings(power=False)).status == "ok"


RESTRICTED = '''
import numpy as np

def attention(q, k, v, *, mask=None, scale=None):
    if q.dtype != np.float32 or q.shape[-1] not in (16, 32) or q.shape[-2] % 32 or k.shape[-2] % 32 or q.ndim < 3:
        raise ValueError("not for this kernel")
    k, v = (np.repeat(x, q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    s = q @ k.swapaxes(-1, -2) * q.dtype.type(q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        s = np.where(mask, s, -np.inf)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    z = p.sum(-1, keepdims=True)
    out = p @ v / np.where(z == 0, 1, z)
    if q.shape[-2] > 32 and q.shape[-3] > k.shape[-3] // 2:
        out[..., 32:64, :] *= q.dtype.type(BUG)
    return out
'''


@pytest.mark.parametrize("bug", first(1, ["1.001", "1"]))
def test_a_kernel_with_limits_is_tested_as_densely_as_another_one(tmp_path, bug, capsys):
    (tmp_path / "mine.py").write_text(RESTRICTED.replace("BUG", bug))
    status = cli.main(["verify", f"{tmp_path}/mine.py:attention", "--refusals", "any", "--json", f"{tmp_path}/report.json",
                       "--convention", "masked_nan=poisons"])  # fmt: skip
    text, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    drawn = [r for r in report["results"] if r["case"].startswith("drawn") and r["status"] in ("ok", "wrong")]
    assert status == (0 if bug == "1" else 1)
    if bug == "1":  # what is wrong in a named case is mended first
        assert "it takes only L%32=0; S%32=0; D=16,32" in text
        assert report["space"]["met"] > 0.9 * report["space"]["pairs"]
        assert len(drawn) > 150
        assert {"mask", "scale"} <= {option for r in drawn for option in r["options"]}


def test_what_is_drawn_has_a_name_that_runs_it_again(capsys):
    name = "drawn: H=2 G=2 L=9 S=7 D=5 E=5; mask=one hole; k in memory=backwards"
    assert cli.main(["verify", "--case", name]) == 0
    assert "in 1 of 1 cases" in capsys.readouterr().out


def test_options_that_are_not_claimed_are_not_given(tmp_path, capsys):
    assert cli.main(["verify", "-k", "softcap", "--options", "mask,causal"]) == 2
    text = capsys.readouterr().out
    assert text.startswith("NOTHING TESTED")
