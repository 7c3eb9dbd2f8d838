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
from npattn.verify.runs import Drawing, Runs, in_common
from npattn.verify.space import CALLS, LAYOUTS, Drawer
from npattn.verify.worker import Spec

SPACES = {name: op.space for name, op in OPS.items()}


def drawn(takes=lambda case: True, space=SPACE, seed=0, until="pairs", most=700):
    """The cases of a whole run, without anything being computed, and what was met."""
    drawing, found = Drawing(space, seed), []
    for cases in drawing.rounds(takes, until):
        found += cases
        for case in cases:
            drawing.saw(case, takes(case))
        if not until and len(found) > most:
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
    "S of 32 or more": (lambda n: n["S"] >= 32, ["S>=32"]),
    "S of 128 or more": (lambda n: n["S"] >= 128, ["S>=128"]),
    "L at most S": (lambda n: n["L"] <= n["S"], []),
    "multiples of 32": (lambda n: n["L"] % 32 == 0 and n["S"] % 32 == 0, ["L%32=0", "S%32=0"]),
    "nothing of the plain sizes": (lambda n: n["D"] == 32 and n["L"] % 128 == 0, ["L%128=0", "D=32"]),
}


@pytest.mark.parametrize("kernel", first(1, list(KERNELS)))
def test_limits_are_found_and_what_is_drawn_obeys_them(kernel):
    holds, expected = KERNELS[kernel]
    found, coverage = drawn(lambda case: holds(case.sizes))
    assert coverage.limits == expected
    assert coverage.met > (0.9 if kernel == "L at most S" else 0.98) * coverage.pairs > 5000
    taken = [case for case in found if holds(case.sizes)]
    assert len(taken) > 300
    if kernel.startswith("S of"):  # nothing is said of L
        assert set(range(1, 8)) & {case.sizes["L"] for case in taken}
        assert "L" not in coverage.refused
    if "multiples" in kernel:  # a last tile of 64 is full, or a half of it
        assert {(case.sizes["L"] % 64, case.sizes["S"] % 64) for case in taken} >= {(0, 0), (0, 32), (32, 0), (32, 32)}
    assert len({case.sizes["L"] for case in taken}) > 2
    assert max(case.sizes["L"] for case in taken) > 256


NARROW = {
    "causal alone": (lambda case: case.row["order"] == "causal top_left", ["order causal top_left"]),
    "batch 1 alone": (lambda case: case.row["batch"] == "1", ["batch 1"]),
    "some mask, a batch of 5, D of 128": (lambda case: case.row["mask"] not in ("none", "packed") and case.row["batch"] == "5"
                                          and case.sizes["D"] == 128, ["batch 5", "mask other than none", "D=128"]),
    "causal and batch 1": (lambda case: "causal" in case.row["order"] and case.row["batch"] == "1",
                           ["batch 1", "order causal top_left, causal bottom_right, causal by positions"]),
}  # fmt: skip


@pytest.mark.parametrize("kernel", first(1, list(NARROW)))
def test_a_kernel_that_refuses_the_plain_call_is_drawn_from_another_one(kernel):
    takes, limits_of_it = NARROW[kernel]
    found, coverage = drawn(takes)
    assert coverage.limits == limits_of_it
    assert sum(map(takes, found)) > 250
    assert coverage.met > 0.9 * coverage.pairs > 3000
    assert all(SPACE.named(case.name).row["order"] == case.row["order"] for case in found[::9])


@pytest.mark.slow
def test_a_kernel_that_takes_nothing_ends_soon():
    calls = []
    found, coverage = drawn(lambda case: bool(calls.append(case)))
    assert len(found) <= 2
    assert coverage.limits == []
    assert len(calls) < 6000


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


@pytest.mark.slow
def test_sizes_that_no_class_has_get_classes_of_their_own():
    space = limits.restricted(SPACE, [limits.parse("D=88"), limits.parse("L%100=0"), limits.parse("G=H")])
    found, coverage = drawn(space=space)
    assert {case.sizes["D"] for case in found} == {88}
    assert {case.sizes["L"] for case in found} >= {100, 200, 300}
    assert all(case.sizes["G"] == case.sizes["H"] for case in found)
    assert coverage.met > 0.98 * coverage.pairs


def test_heads_in_groups_of_four_are_drawn_if_no_other_groups_are_taken():
    def ratio(case):
        return case.sizes["H"] // case.sizes["G"]

    found, _ = drawn(lambda case: ratio(case) in (1, 4))
    taken = [case for case in found if ratio(case) in (1, 4)]
    assert sum(ratio(case) == 4 for case in taken) > 30
    assert len({case.row["heads"] for case in taken if ratio(case) == 4}) == 2


def test_what_a_backward_alone_can_tell_apart_is_left_out_without_one():
    space = SPACE.of_forward()
    found, coverage = drawn(space=space)
    for name in ("cotangents", "dout in memory"):
        assert {case.row[name] for case in found} == {SPACE.plain[name]}
    assert "dout is q" not in {case.row["alias"] for case in found}
    assert coverage.met == coverage.pairs
    pairs = {frozenset(pair) for case in found for pair in itertools.combinations(case.row.items(), 2)}
    alone = {("cotangents", "dout"), ("dout in memory", "plain")}
    assert coverage.pairs == len([pair for pair in pairs if not pair & alone])
    with Runs(Spec("blockwise", None, Convention(), None, Settings(), diagnose=False), 60, [], [0], {}, space=SPACE) as runs:
        assert len(runs.drawing.drawer.of["cotangents"]) == 4  # it has a backward


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("others", [True, False])
def test_fuzzing_meets_two_options_at_once_from_the_beginning(seed, others):
    """others : whether it takes other options, too"""

    def takes(case):
        return others or all(case.row[n] == SPACE.plain[n] for n in ("bias", "dropout", "scale", "mask"))

    found, _ = drawn(takes, until="", seed=seed, most=200)
    both = [case for case in found if case.row["softcap"] != "no" and case.row["sink"] != "no" and takes(case)]
    assert len(both) > 1


def test_what_wrong_cases_have_in_common_and_right_ones_have_not():
    cases = whole()[0]
    wrong = [case.row for case in cases if case.row["heads"] == "3 / 1" and case.row["mask"] != "none"]
    right = [case.row for case in cases if case.row not in wrong]
    assert in_common(wrong, right, SPACE.plain) == ("heads 3 / 1",)
    capped = [row for row in right if row["softcap"] != "no" and row["dtype"] == "float64"]
    others = [row for row in right if row not in capped]
    assert set(in_common(capped, others, SPACE.plain)) == {"softcap not no", "dtype float64"}
    assert in_common(wrong[:1], right, SPACE.plain) == in_common([], right, SPACE.plain) == ()
    assert in_common([case.row for case in cases[200:240]], right, SPACE.plain) == ()


IMPOSSIBLE = ("H=3 G=2 L=9 S=7 D=5 E=5", "H=2 G=2 L=9 S=7 D=5 E=5; alias=k is q", "H=2 G=2 L=0 S=7 D=5 E=5",
              "H=2 G=2 L=9 S=7 D=5 E=6; alias=v is k", "H=4 G=2 L=9 S=9 D=5 E=5; alias=k is q",
              "H=2 G=2 L=9 S=7 D=5 E=5; mask=nonsense", "H=2 G=2 L=9 D=5 E=5")  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_call_that_cannot_be_is_usage(name, capsys):
    assert SPACE.named(f"drawn: {name}") is None
    assert cli.main(["verify", "--case", f"drawn: {name}"]) == 2
    assert "no such case" in capsys.readouterr().err


def test_a_smaller_case_is_possible_has_its_own_name_and_fewer_classes():
    sizes = {"H": 3, "G": 1, "L": 12, "S": 12, "D": 8, "E": 8}
    row = {**SPACE.plain, "batch": "3 x 2", "heads": "3 / 1", "alias": "v is k", "softcap": "softcap", "dtype": "float64"}
    case = SPACE.sized(row, sizes)
    smaller = case.smaller()
    assert all(SPACE.named(other.name).sizes == other.sizes and SPACE.possible(other.row) for other in smaller)
    assert all(other.sizes["H"] % other.sizes["G"] == 0 and other.sizes["D"] == other.sizes["E"] for other in smaller
               if other.row["alias"] == "v is k")  # fmt: skip
    changed = [{name: cls for name, cls in other.row.items() if cls != row[name]} for other in smaller[:4]]
    assert changed == [{"batch": "1"}, {"softcap": "no"}, {"alias": "none"}, {"dtype": "float32"}]


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
    assert (runs.coverage() is not None) == (runs.count > 0) == drawn_too


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
        (["--sizes", "L=D"], "--sizes L=D: no cases are drawn for that, of two letters only for L=S, D=E, G=H"),
        (["--options", "colour"], "--options colour, expected some of mask, bias,"),
        (["--options", "causal,causal"], "--options causal,causal: causal is given twice"),
        (["--options", "causal,none"], "--options none, expected some of mask, bias,"),
        (["--dtype", "float32", "--case", "drawn: H=2 G=2 L=9 S=7 D=5 E=5; dtype=float64"],
         "--dtype float32 and a --case of float64 contradict each other"),
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
