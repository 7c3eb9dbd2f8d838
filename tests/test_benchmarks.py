"""The benchmarks run, check their rivals, say who is absent and store where they ran. No time is asserted."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import npattn
from npattn.tolerances import TERMS_EPS

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import (
    attention,
    harness,
    machine,
    memory,
    multihead,
    plots,
    rivals,
    rnn,
    roofline,
    scaling,
    speed,
    table,
    targets,
)
from benchmarks.__main__ import how, main, parse, together
from benchmarks.__main__ import stored as read_stored
from benchmarks.cases import Case, draw, heads, truth
from benchmarks.company import report
from benchmarks.harness import TINY, Measured, Plan, Rival
from benchmarks.worker import Worker

PEERS = ("torch", "jax", "onnxruntime", "onnx")
MASKS = ("full", "causal", "window", "lengths", "packed")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody waits until others are at rest, nor for a rate to be known well."""
    monkeypatch.setattr(harness, "WINDOW", 1e-4)
    monkeypatch.setattr(roofline, "TRIAL", 1e-4)
    monkeypatch.setattr(roofline, "SHAPES", roofline.SHAPES[:3])


@pytest.fixture
def alone(monkeypatch):
    """No library but NumPy is installed."""
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)


def stored(tmp_path, *arguments):
    file = tmp_path / "results.json"
    assert main([*arguments, "--tiny", "--no-company", "--json", str(file)]) == 0
    return json.loads(file.read_text())


# --- the harness ---------------------------------------------------------------------------------------------------------


def rival(name, value, log, shape=(3,)):
    def call():
        log.append(name)
        if isinstance(value, Exception):
            raise value
        return np.full(shape, value)

    return Rival(name, call, lambda found: {"out": found}, {"out": np.ones(3)})


def test_a_wrong_rival_is_reported_and_not_timed():
    log = []
    some = [
        rival("right", 1.0, log), rival("near", 1 + 1e-6, log), rival("off", 1.1, log), rival("nan", np.nan, log),
        rival("shape", 1.0, log, (2,)), rival("raises", ValueError("no kernel\nmore"), log),
    ]  # fmt: skip
    m = harness.measure(some, "right", 1e-4, TINY)
    assert set(m.times) == {"right", "near"}
    assert [log.count(name) for name in ("off", "nan", "shape", "raises")] == [1, 1, 1, 1]
    assert m.left_out["off"] == "WRONG: out is off by 1.0e-01, 1e-04 is allowed"
    assert m.left_out["nan"].startswith("WRONG: out is off by nan")
    assert m.left_out["shape"] == "WRONG: out has shape (2,), expected (3,)"
    assert m.left_out["raises"] == "cannot: no kernel"
    assert m.errors["near"] == pytest.approx(1e-6)
    row = harness.row("verb", "name", {}, m)
    assert json.loads(json.dumps(row, allow_nan=False))["errors"]["nan"] is None


@pytest.mark.usefixtures("alone")
def test_what_was_measured_is_not_lost_when_a_run_is_stopped(tmp_path, monkeypatch):
    found, measure = [], multihead.measure

    def stopped(layer, plan):
        if found:
            raise KeyboardInterrupt
        found.append(measure(layer, plan))
        return found[0]

    monkeypatch.setattr(multihead, "measure", stopped)
    monkeypatch.setattr(multihead, "grid", lambda size: [multihead.Layer(3, 2, 4, 2), multihead.Layer(2, 2, 4, 2)])
    with pytest.raises(KeyboardInterrupt):
        main(["multihead", "--tiny", "--json", str(tmp_path / "some.json")])
    (row,) = json.loads((tmp_path / "some.json").read_text())["results"]
    assert row["name"] == found[0]["name"]


def test_without_anybody_who_is_right_there_is_a_row_all_the_same():
    m = harness.measure([rival("off", 2.0, [])], "off", 1e-4, TINY)
    assert harness.row("verb", "name", {}, m)["seconds"] == {}


def test_rivals_take_turns_forwards_and_back():
    log = []
    m = harness.measure([rival(n, 1.0, log) for n in "abc"], "a", 1e-4, Plan(budget=0.0, least=3, least_slow=3))
    timed = [name for name, after in zip(log[3:], [*log[4:], ""], strict=True) if name != after]  # one call each warms up
    assert "".join(timed) in ("abcbabc", "abcacbabc", "abcabac")
    assert log[:3] == ["a", "b", "c"]
    assert [len(x) for x in m.times.values()] == [3, 3, 3]


def test_ratios_are_those_of_pairs():
    m = Measured("ours", {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 6.0, 4.0], "slow": [9.0]})
    assert m.ratios("theirs") == [2.0, 3.0, 1.0]
    assert m.ratios("slow") == [9.0]
    assert harness.spread(m.ratios("theirs")) == {"median": 2.0, "least": 1.0, "lower": 1.5, "upper": 2.5, "most": 3.0}
    assert m.best(["theirs", "slow", "absent"]) == "theirs"


@pytest.mark.parametrize(("busy", "quiet"), [(0.0, True), (0.03, True), (10.0, False)])
def test_settle_waits_for_threads_that_run_on(monkeypatch, busy, quiet):
    """Threads of others run for ``busy`` seconds more: the clock of the process goes on while we sleep."""
    now = SimpleNamespace(wall=0.0)

    def sleep(seconds):
        now.wall += seconds

    clock = SimpleNamespace(perf_counter=lambda: now.wall, process_time=lambda: min(now.wall, busy), sleep=sleep)
    monkeypatch.setattr(harness, "time", clock)
    assert harness.settle(limit=0.5) is quiet
    assert now.wall >= min(busy, 0.4)


def test_a_rival_whose_threads_run_on_is_named(monkeypatch):
    monkeypatch.setattr(harness, "settle", lambda limit=0.5: False)
    m = harness.measure([rival(n, 1.0, []) for n in "ab"], "a", 1e-4, TINY)
    assert m.restless <= {"a", "b"}
    assert m.restless


def test_the_same_alone_and_in_company(capsys):
    found = report(Case(8, 4, mask="causal"), 1, ("blockwise",))
    assert set(found["ratios"]) == set(found["same"]) == {"blockwise"}
    assert "alone in a process of its own" in capsys.readouterr().out


# --- rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_masks_mean_what_npattn_is_told(mask):
    case = Case(73, 4, 2 if mask == "lengths" else 1, 2, mask=mask, width=5)
    for batch in range(case.B):
        allowed = case.allowed(slice(None), batch)
        if mask == "full":
            assert allowed is None
            assert case.own_mask() is None
            continue
        bound = case.own_mask().bind((case.B, case.H, case.L, case.keys))
        dense = np.broadcast_to(bound.dense(), (case.B, case.H, case.L, case.keys))
        assert (dense[batch, 0] == allowed).all()
        assert case.pairs() == dense.sum()


def test_the_truth_is_that_of_attention_in_pieces_and_whole(monkeypatch):
    case = Case(19, 4, 2, 4, 2, mask="causal", backward=True, dtype="float64")
    monkeypatch.setattr("benchmarks.cases.CHUNK", 64)
    x, found = draw(case), truth(case)
    out, cache = npattn.attention_forward(x.q, x.k, x.v, mask=npattn.causal())
    g = npattn.attention_backward(x.dout, cache)
    for name, whole in rivals.first(case, (out, g.q, g.k, g.v)).items():
        assert np.abs(found[name] - whole).max() <= TERMS_EPS * np.finfo(float).eps * np.abs(whole).max(), name
    assert set(truth(replace(case, backward=False))) == {"out"}


def test_rows_are_large_enough_and_have_names_of_their_own():
    for size in ("tiny", "quick", "full"):
        names = [case.name for case in attention.grid(size)]
        assert len(set(names)) == len(names)
    full = attention.grid("full")
    assert {c.L for c in full} >= set(attention.LENGTHS)
    assert {c.mask for c in full} == set(MASKS)
    assert {c.dtype for c in full} == {"float32", "float64"}
    assert any(c.G and c.G < c.H for c in full)
    B, H = heads(512, 64)
    assert 4 * B * H * 512**2 * 64 <= 2**33 < 8 * B * H * 512**2 * 64


@pytest.mark.parametrize("backward", [False, True])
def test_limits_are_those_of_the_products_that_are_made(backward):
    case = Case(40, 8, 1, 2, mask="causal", backward=backward)
    limits = roofline.of_attention(case, draw(case))
    assert limits.known
    assert limits.made >= case.flops()
    assert sum(limits.counts.values()) >= case.exponentials()
    assert sys.modules["npattn.ops.blockwise"].np is np
    assert {r.name for r in limits.rivals()} == {"best product", "own products", "exponentials"}
    assert all(r.call() > 0 for r in limits.rivals())


def test_a_kernel_that_was_not_heard_has_no_first_limit():
    a = np.ones((4, 4), np.float32)
    limits = roofline.Limits([lambda: a @ a], 128.0, 0.0, "float32")
    assert not limits.known
    m = Measured("ours", {"ours": [1.0], "best product": [0.5]})
    found = limits.fractions(m)
    assert "own" not in found
    assert found["best"]["median"] == 0.5


# --- the verbs -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_attention_without_peers(tmp_path, capsys):
    found = stored(tmp_path, "attention")
    text = capsys.readouterr().out
    for name in PEERS:
        assert f"absent: {name} is not installed" in text
    assert "torch flash: absent: torch is not installed: pip install npattn[peers], or torch alone" in text
    assert "BLAS" in text
    assert f"threads {machine.threads()} for everybody" in text
    assert text.count("not measured") >= 10
    assert found["environment"]["torch"] == "absent"
    assert {"NumPy", "BLAS", "kernels", "threads", "processor", "load", "time"} <= set(found["environment"])
    rows = [r for r in found["results"] if "roofline" in r]
    assert [r["name"] for r in rows] == [c.name for c in attention.grid("tiny")]
    for r in rows:
        assert {"blockwise", "dense", "best product", "own products", "exponentials"} == set(r["seconds"])
        assert set(r["ratios"]["dense"]) == {"median", "least", "lower", "upper", "most"}
        assert r["errors"]["blockwise"] < 1e-4
        assert {"own", "best"} <= set(r["roofline"])
        assert "jax" in r["left_out"]
    gained = [r["gained"] for r in found["results"] if "gained" in r]
    assert [set(x) for x in gained] == [{"causal", "window"}] * 2
    assert [t["verdict"] for t in found["targets"]].count("not measured") == len(found["targets"])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("verb", "rows"), [("multihead", len(multihead.grid("tiny"))), ("rnn", len(rnn.grid("tiny"))), ("decode", 1)]
)
def test_other_verbs_without_peers(tmp_path, capsys, verb, rows):
    found = stored(tmp_path, verb)
    assert len(found["results"]) == rows
    assert found["environment"]["NumPy"] == np.__version__
    text = capsys.readouterr().out
    for r in found["results"]:
        assert r["verb"] == verb
        assert r["name"] in text
        assert r["base"] in r["seconds"]
        assert {"own", "best"} <= set(r["roofline"])
    assert "absent: torch is not installed" in text


@pytest.mark.usefixtures("alone")
def test_memory_and_scaling(tmp_path, capsys):
    (row,) = stored(tmp_path, "memory")["results"]
    assert row["bytes"]["blockwise"]["tracemalloc"] > 0
    found = stored(tmp_path, "scaling")["results"]
    text = capsys.readouterr().out
    assert "time of blockwise, causal, both: ~ L^" in text
    assert "memory of blockwise, causal, both, by tracemalloc: ~ L^" in text
    assert {r["verb"] for r in found} == {"scaling"}
    measured = [r["case"]["L"] for r in found if "case" in r]
    assert f"from L = {min(measured)} to {max(measured)}" in text


def test_memory_of_dense_holds_its_weights():
    case = Case(256, 4, mask="causal")
    with Worker() as worker:
        worker.load(case, "dense")
        worker.receive()
        found = worker.ask(do="memory")
    assert found["tracemalloc"] >= 256 * 256 * 4
    assert found["outputs"] == 256 * 4 * 4


def test_a_worker_says_what_it_cannot():
    with Worker() as worker:
        worker.load(Case(8, 4), "nobody")
        with pytest.raises(RuntimeError, match="nobody"):
            worker.receive()


def test_fits():
    lengths = [1024, 2048, 4096]
    rounding = TERMS_EPS * np.finfo(float).eps * np.log(3.0 * lengths[-1] ** 2)  # of the logarithms, the largest
    slope, error = scaling.exponent(lengths, [3.0 * x**2 for x in lengths])
    assert slope == pytest.approx(2, rel=0, abs=rounding)
    assert error == pytest.approx(0, abs=rounding)
    assert scaling.line(lengths, [5 + 7 * x for x in lengths]) == pytest.approx((5, 7, 0))


# --- what is aimed at, the page, plots -------------------------------------------------------------------------------------


def grid_of_results(torch=1.5):
    """Rows as of a whole run, with invented times."""
    spread = {name: dict.fromkeys(("median", "least", "lower", "upper", "most"), x)
              for name, x in {"torch flash": torch, "jax": 5.0, "dense": 6.0, "onnxruntime": 1.1}.items()}  # fmt: skip
    found = []
    for case in attention.grid("full"):
        found.append({
            "verb": "attention", "name": case.name, "case": vars(case), "base": "blockwise", "flops": case.flops(),
            "seconds": {"blockwise": 1.0, **{name: x["median"] for name, x in spread.items()}}, "ratios": spread,
            "best_of": {"torch": "torch flash"}, "left_out": {}, "errors": {}, "restless": [],
            "roofline": {"own": {"median": 0.9}, "best": {"median": 0.7}, "gflops": case.flops() / 1e9,
                         "own_limit_gflops": 1.1 * case.flops() / 1e9, "best_limit_gflops": 1.4 * case.flops() / 1e9},
        })  # fmt: skip
    peaks = {"process": 63 * memory.MIB, "tracemalloc": 60 * memory.MIB}
    for case, _ in memory.grid("full"):
        found.append({"verb": "memory", "name": case.name, "case": vars(case), "bytes": {"blockwise": peaks}})
    return found


def test_targets(capsys):
    found = {t.text: t for t in targets.targets(grid_of_results(1.0), intel=False)}
    assert found["torch SDPA's best CPU backend, forward"].verdict == "NOT REACHED"
    assert found["L = 128, many heads, with gradients, of torch's best"].verdict == "reached"
    assert found["roofline of its own products and exponentials, forward"].verdict == "reached"
    assert found["every row of the grid with L >= 256, of torch's best"].verdict == "reached"
    assert found["torch.nn.RNN, forward"].verdict == "not measured"
    assert found["memory at L = 65536, one head, D = 64, causal, forward + backward"].value == pytest.approx(63)
    slower = {t.text: t for t in targets.targets(grid_of_results(1.0), intel=True)}
    assert slower["torch SDPA's best CPU backend, forward"].verdict == "reached"
    assert slower["torch.nn.RNN, forward"].needed < found["torch.nn.RNN, forward"].needed
    part = targets.targets(grid_of_results()[:40], intel=False)
    assert part[0].verdict.endswith("so far")
    targets.show(list(found.values()))
    assert "NOT REACHED" in capsys.readouterr().out


@pytest.mark.usefixtures("alone")
def test_the_page_is_filled_between_its_comments(tmp_path, monkeypatch):
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- benchmark AMD -->\nold\n<!-- /benchmark AMD -->\nafter\n")
    monkeypatch.setattr(plots, "throughput", lambda *args: False)
    facts = {**machine.facts(), "processor": "an AMD"}
    rows = grid_of_results()
    speed.write(page, rows, facts, targets.targets(rows, intel=False), "the command")
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmark AMD -->\n")
    assert text.endswith("<!-- /benchmark AMD -->\nafter\n")
    assert "old" not in text
    assert "`the command`" in text
    assert "| 1000.0 ms |" in next(line for line in text.splitlines() if line.startswith("| forward | 2048 |"))
    assert facts["BLAS"] in text
    page.write_text("no comments")
    with pytest.raises(SystemExit, match="expected one <!-- benchmark AMD -->"):
        speed.check(page, "AMD")
    with pytest.raises(SystemExit):
        main(["rnn", "--write", str(page)])


@pytest.mark.usefixtures("alone")
def test_plots(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    rows = [r for r in grid_of_results() if r["case"]["D"] == 64 and r["case"]["mask"] == "causal"]
    rows += [{**r, "verb": "rnn", "errors": dict.fromkeys(r["ratios"], 1e-7)} for r in rows[:3]]
    made = plots.draw_all(rows, machine.facts(), tmp_path / "all")
    assert [f.name for f in made] == ["throughput.png", "speedup.png", "rnn.png", "memory.png"]
    page = tmp_path / "speed.md"
    page.write_text("".join(f"<!-- benchmark {x} --><!-- /benchmark {x} -->" for x in ("AMD", "Intel", "other")))
    some = [Case(L, 64, mask="causal", backward=b) for L in (8, 16) for b in (False, True)]
    monkeypatch.setattr(attention, "grid", lambda size: some)
    stored(tmp_path, "attention", "--only", "L=8 ", "--plot", str(tmp_path / "plots"), "--write", str(page))
    for file in (*made, tmp_path / "plots" / "throughput.png", next(tmp_path.glob("speed-*.png"))):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert "| forward | 8 |" in page.read_text()
    assert "![" in page.read_text()
    assert "written:" in capsys.readouterr().out


# --- the command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "x.json"], "--from takes --plot or --write"),
        (["rnn", "--from", "x.json", "--plot", "p"], "--from takes --plot or --write"),
        (["--only", "L=8 ("], "--only is L=8 (, which is no regular expression"),
        (["--threads", "0"], "--threads is 0, expected at least 1"),
        (["--json", "nowhere/x.json"], "there is no directory nowhere"),
        (["rnn", "--write", "speed.md"], "--write is for attention"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_what_was_stored_in_parts_is_one_result(tmp_path):
    facts = {"processor": "one", "time": "now", "load": "0.1"}
    a, b, other = ({"environment": facts, "command": f"python -m benchmarks {word} --json x.json",
                    "results": [{"verb": "attention", "name": name, "seconds": n} for name in names]}
                   for word, n, names in (("", 1, "ab"), ("attention --only b", 2, "bc"), ("", 3, "d")))  # fmt: skip
    other["environment"] = {**facts, "processor": "another"}
    files = [tmp_path / f"{name}.json" for name in ("a", "b", "other")]
    for file, part in zip(files, (a, {**b, "environment": {**facts, "time": "later"}}, other), strict=True):
        file.write_text(json.dumps(part))
    results, commands = together(files[:2])
    assert [(row["name"], row["seconds"]) for row in results["results"]] == [("a", 1), ("b", 2), ("c", 2)]
    assert how(commands, "speed.md") == (
        "python -m benchmarks --json 1.json && python -m benchmarks attention --only b --json 2.json"
        " && python -m benchmarks --from 1.json 2.json --write speed.md"
    )
    with pytest.raises(SystemExit, match=r"processor is another, and in .*a\.json it is one"):
        together(files)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}"])
def test_a_file_that_was_not_stored_is_refused(text, tmp_path):
    file = tmp_path / "x.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit, match=r"--from .*x\.json: "):
        read_stored(file)


def test_rows_that_have_no_time_are_named(capsys):
    cases = [SimpleNamespace(name=name) for name in "abc"]
    row = {"seconds": {}, "base": "x", "left_out": {}, "ratios": {}, "restless": [], "errors": {}}
    start = time.monotonic()

    def measure(case):
        time.sleep(0.02)
        return {**row, "name": case.name}

    rows = table.measured("title", (), cases, measure, "", lambda row: None, until=start + 0.01)
    assert [r["name"] for r in rows] == ["a"]
    assert "left out, because the time is over: b, c\n" in capsys.readouterr().out
