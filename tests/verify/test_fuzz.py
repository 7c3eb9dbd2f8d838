"""`npattn verify --fuzz`: what is drawn, what is learned from refusals, and what is said of the first case that is wrong."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from helpers import first

from npattn import attention, cli
from npattn.tolerances import GOOD_MAX
from npattn.verify import Candidate, Settings
from npattn.verify.api import examine_all
from npattn.verify.ops import OPS
from npattn.verify.ops.attention.cases import Case
from npattn.verify.ops.attention.space import LAYOUTS, LENGTHS, SPACE, WIDTHS, possible
from npattn.verify.space import Drawer

ROWS = SPACE._replace(case=lambda row, number, rng: row)  # rows alone


def drawn(count, takes=lambda row: True, space=SPACE):
    drawer, found = Drawer(space, 0), []
    for _ in range(count):
        row, case = drawer.draw()
        drawer.saw(row, takes(row))
        found.append((row, case))
    return drawer, found


def test_every_pair_of_classes_is_met():
    drawer, found = drawn(330, space=ROWS)
    met, every = drawer.coverage()
    pairs = {frozenset(pair) for row, _ in found for pair in itertools.combinations(row.items(), 2)}
    assert len(pairs) >= met > 0.99 * every
    assert every > 3000


def test_a_case_has_the_classes_of_its_row():
    for row, case in drawn(60)[1]:
        problem = case.problem()
        assert problem.dtype == row["dtype"]
        assert (problem.q.ndim == 2) == (row["batch"] == "rank 2")
        assert problem.shape[-2] in LENGTHS[row["L"]]
        assert problem.shape[-1] in (LENGTHS[row["S"]] if row["S"] != "as L" else (problem.shape[-2],))
        assert problem.q.shape[-1] in WIDTHS[row["D"]]
        assert ("softcap" in problem.options, "sink" in problem.options) == (row["softcap"] == "yes", row["sink"] == "yes")
        assert ("mask" in problem.options) == (row["mask"] != "none" or row["order"] != "none")
        assert possible(row)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_where_the_numbers_are_and_not_what_they_are(layout):
    row = {**SPACE.plain, "layout": layout, "S": "prime"}
    case = SPACE.case(row, 0, np.random.default_rng(0))
    x, plain = case.problem(), super(type(case), case).problem()
    assert np.array_equal(x.q, plain.q)
    assert np.array_equal(x.dout, plain.dout)
    assert np.array_equal(x.k, plain.k)
    same = {"strides of 0": plain.v[:1], "v is k": plain.k}.get(layout, plain.v)
    assert np.array_equal(x.v, np.broadcast_to(same, x.v.shape))
    differs = x.q.strides != plain.q.strides or not x.q.flags.writeable or x.v is x.k or 0 in x.v.strides
    assert differs == (layout != "plain")


def test_what_is_refused_by_itself_is_not_drawn_again():
    def takes(row):
        return row["D"] == "64" and row["bias"] == "none" and row["dtype"] == "float32"

    drawer, found = drawn(200, takes, ROWS)
    after = [row for row, _ in found[100:]]
    assert all(takes(row) for row in after)
    others = {name: [c for c in SPACE.dimensions[name] if c != SPACE.plain[name]] for name in ("D", "bias", "dtype")}
    assert drawer.not_taken() == others


@pytest.mark.parametrize("every", first(1, [100, 1]))
def test_an_honest_kernel_holds_in_what_is_drawn(every):
    rng, rows = np.random.default_rng(0), [row for row, _ in drawn(300, space=ROWS)[1][::every]]
    cases = [case for n, row in enumerate(rows) if (case := SPACE.case(row, n, rng)) is not None]
    assert len(cases) > 0.9 * len(rows)
    candidate, settings = Candidate("blockwise", *OPS["attention"].candidates["blockwise"]()), Settings(power=False)
    assert [case.name for case in cases if examine_all(candidate, case, 0, settings).status != "ok"] == []


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
    assert "  never taken: heads 4 / 2, 6 / 2, 8 / 1\n" in text
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
    assert " cases drawn; of the pairs of classes that it takes " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fuzz", "0"], "it is 0, expected a number of seconds above 0"),
        (["--fuzz", "1", "--case", "plain"], "--fuzz and --case contradict each other"),
        (["--fuzz", "1", "--deep"], "--fuzz and --deep contradict each other"),
        (["--fuzz", "1", "--op", "softmax"], "there is no space of calls of softmax to draw from, only of attention"),
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
