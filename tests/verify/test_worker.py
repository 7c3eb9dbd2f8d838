"""`npattn verify` on candidates that end, crash, hang or spoil what they are given: a verdict and a status, always.

Here every candidate runs in a process of its own. Its start takes most of a second, so that those who leave it alive share one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import bad
import pytest
from helpers import first

from npattn import cli
from npattn.verify import Settings, verify
from npattn.verify.conventions import Convention
from npattn.verify.ops.attention.cases import BY_NAME
from npattn.verify.worker import HANGS, Spec, Worker

HERE = Path(__file__).parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals, process groups and shells of POSIX")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """``npattn verify`` with a process for the candidate, in an empty folder: its exit status, what it prints, and stderr."""

    def run(*arguments):
        status = cli.main(["verify", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def worker(name, **options):
    return Worker(Spec(f"bad:{name}", None, Convention(), "attention", Settings(), False), **options)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A process that runs the function whose name is in the file "name" of its folder, and that folder."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        started = worker("named")
        with started:
            patch.undo()
            yield started, folder


ENDS = {
    "exits": "out the forward ends its process with exit status 0",
    "crashes": "out the forward crashes its process (SIGSEGV)",
    "is_killed": "out the forward crashes its process (SIGKILL)",
    "exits_later": "repeat the forward ends its process with exit status 3, when it is called again",
}
SPOILS = {
    "leaves": "out raises SystemExit: 0 (bad.py:",
    "interrupts": "out raises KeyboardInterrupt:  (bad.py:",
    "generator": "out raises GeneratorExit:  (bad.py:",
    "unspeakable": "out raises UnspeakableError: (its str raises ValueError) (bad.py:",
    "harsh": "out raises HarshError: (its str raises SystemExit) (bad.py:",
    "foreign": "out raises ValueError: gr",
    "reads": "out raises EOFError: EOF when reading a line (bad.py:",
    "reshapes": "out an input was modified: k has another shape",
    "casts": "out an input was modified: k has another dtype",
    "freezes": "out an input was modified: v can be written or not, as it could not before",
    "writes": "out an input was modified: q",
}


@POSIX
@pytest.mark.parametrize("name", first(2, ENDS))
def test_a_candidate_that_ends_its_process_is_wrong(run, name):
    status, text, _ = run(f"bad:{name}", "--case", "plain")
    assert status == 1
    assert text.startswith(f"WRONG: bad:{name} falls short in 1 of 1 cases: plain (")
    assert ENDS[name] in text


@pytest.mark.parametrize("name", SPOILS)
def test_a_candidate_that_raises_or_spoils_anything_is_wrong_and_the_run_goes_on(shared, name):
    process, folder = shared
    pid = process.process.pid
    (folder / "name").write_text(name)
    (check, *_) = process.examine(BY_NAME["plain"], 0).checks
    assert check.status == "wrong"
    assert f"{check.tensor} {check.text}".startswith(SPOILS[name])
    (folder / "name").write_text("right")
    assert process.examine(BY_NAME["plain"], 0).status == "ok"
    assert process.process.pid == pid


@pytest.mark.parametrize("name", [name for name in SPOILS if name not in ("leaves", "interrupts", "reads")])
def test_the_same_in_this_process(name):
    (check, *_) = verify(getattr(bad, name), cases=[BY_NAME["plain"]]).results[0].checks
    assert f"{check.tensor} {check.text}".startswith(re.sub(r" \(bad.py:", "", SPOILS[name]))


def test_the_backward_is_named_and_the_run_goes_on(run, tmp_path):
    chosen = ("--backward", "exits_in_the_backward", "-k", "L = 1", "--json", "found.json")
    assert run("bad:right", *chosen)[0] == 1
    found = json.loads((tmp_path / "found.json").read_text())
    checks = {c["tensor"]: c for c in found["results"][0]["checks"]}
    assert checks["dq"]["text"] == "the backward ends its process with exit status 7"
    assert checks["out"]["status"] == "lost"
    assert len(found["results"]) == found["asked"] > 2


def test_an_input_that_the_backward_spoils_is_not_what_the_truth_is_made_of():
    result = verify(bad.right, bad.reshapes_in_the_backward, cases=[BY_NAME["plain"]]).results[0]
    said = {c.tensor: (c.status, c.text) for c in result.checks}
    assert said["out"] == ("ok", "")
    assert said["dq"] == ("wrong", "the backward modifies an input: dout has another shape")


@pytest.mark.parametrize("name", ["closes", "meddles"])
def test_what_is_done_beside_the_report_does_not_reach_it(run, tmp_path, name):
    status, text, _ = run(f"bad:{name}", "--case", "plain", "--json", "found.json")
    assert (status, text.splitlines()[0][:5]) == (0, "RIGHT")
    assert "ME" not in text
    assert json.loads((tmp_path / "found.json").read_text())["passed"]


@pytest.mark.parametrize("name", first(1, ["hangs", "hangs_in_a_thread"]))
def test_a_candidate_that_hangs_is_ended(run, name):
    started = time.perf_counter()
    status, text, _ = run(f"bad:{name}", "--case", "plain", "--timeout", "0.5")
    assert status == 1
    assert "the forward gives no answer within 0.5 s (--timeout)" in text
    assert time.perf_counter() - started < 60  # it sleeps for 600


@pytest.mark.slow
def test_after_a_few_hangs_nothing_more_is_asked_and_the_rest_is_not_right(run):
    chosen = ("-k", "head widths", "--timeout", "0.3", "--expect-failure", "*=issue 12", "--no-diagnosis")
    status, text, _ = run("bad:hangs", *chosen, "-v")
    assert status == 3
    assert "\nTOO LITTLE" in text
    assert text.count("gives no answer within") == HANGS
    assert f"given up: {HANGS} times there was no answer\n" in text


@POSIX
def test_the_process_that_hangs_is_gone_and_so_is_what_it_started():
    with worker("hangs_with_a_child", timeout=0.5) as hung:
        group = hung.process.pid
        hung.examine(BY_NAME["plain"], 0)
    ended = time.monotonic() + 10  # until the system has noticed
    while time.monotonic() < ended and subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True,
                                                      check=False).stdout.strip(" Z\n"):  # fmt: skip
        time.sleep(0.1)
    assert time.monotonic() < ended


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaving.py:f", "leaving.py:f cannot be loaded: the import ends its process with exit status 0"),
        ("bad:absent", "bad has no absent"),
    ],
)
def test_what_cannot_be_loaded_is_usage(run, folder, name, message):
    (folder / "leaving.py").write_text("import os\nos._exit(0)\n")
    status, text, error = run(name)
    assert (status, text) == (2, "")
    assert message in error


def test_a_refusal_that_says_nothing_is_a_refusal(run):
    status, text, _ = run("bad:unspeakably_refuses", "--case", "plain")
    assert status == 2
    assert "NOTHING TESTED" in text
    assert "refused: (its str raises ValueError) (1 case)" in text


def test_what_can_be_loaded_only_once_has_its_report(run, folder):
    (folder / "once.py").write_text(
        "import os\nif os.path.exists('lock'):\n    raise RuntimeError('locked')\nopen('lock', 'w').close()\n"
        "def f(q, k, v):\n    os._exit(0)\n"
    )
    for chosen in (["--case", "plain", "--shrink"], ["-k", "L = 1"]):
        (folder / "lock").unlink(missing_ok=True)
        status, text, _ = run("once.py:f", *chosen, "--json", "found.json")
        assert (status, text[:5]) == (1, "WRONG")
        assert json.loads((folder / "found.json").read_text())["results"]


@POSIX
def test_what_a_candidate_leaves_behind_is_ended_with_it(run):
    run("bad:leaves_a_child", "--case", "plain")
    found = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in found.splitlines() if "sleep 77.125" in line and not line.startswith("Z")]


def test_the_file_of_the_candidate_is_not_written_over(run, folder):
    (folder / "mine.py").write_text("from bad import right\n")
    for option in ("--json", "--save"):
        status, _, error = run("mine.py:right", "--case", "plain", option, "./mine.py")
        assert status == 2
        assert "that is the file of the candidate" in error
    assert (folder / "mine.py").read_text() == "from bad import right\n"


# --- reports that cannot be written, and runs that are ended ---------------------------------------------------------------


VERIFY = (sys.executable, "-m", "npattn", "verify")
PATHS = {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": {**os.environ, **PATHS}}
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


def command(*arguments, **options):
    return subprocess.run([*VERIFY, *arguments], check=False, timeout=120, **(PIPES | options))


def test_a_terminal_without_these_letters(folder):
    done = command("bad:foreign", "--case", "plain", env={**os.environ, **PATHS, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1
    assert "raises ValueError: gr\\xf6\\xdfe" in done.stdout


@FULL
@pytest.mark.parametrize(("name", "option", "verdict"), [("right", "--save", "RIGHT"), ("writes", "--json", "WRONG")])
def test_a_file_that_cannot_be_written(run, name, option, verdict):
    status, text, error = run(f"bad:{name}", "--case", "plain", option, "/dev/full")
    assert (status, text[:5]) == (4, verdict)
    assert f"npattn verify: {option} /dev/full: No space left on device" in error


@FULL
def test_a_page_that_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setattr("npattn.verify.peer_page.page", lambda only, progress: "a page")
    assert cli.main(["peers", "--write", "/dev/full"]) == 4
    assert "npattn peers: --write /dev/full: No space left on device" in capsys.readouterr().err


@FULL
def test_a_full_stdout(folder):
    with Path("/dev/full").open("w") as full:
        done = command("bad:right", "--case", "plain", stdout=full)
    assert done.returncode == 4
    assert "the report could not be printed: No space left on device. RIGHT: bad:right" in done.stderr
    assert "Traceback" not in done.stderr


@POSIX
@pytest.mark.parametrize("closed", first(1, [">&-", ">&- 2>&- <&-"]))
def test_a_closed_stdout(folder, closed):
    words = f"{sys.executable} -m npattn verify bad:right --case plain {closed}"
    done = subprocess.run(words, shell=True, check=False, timeout=120, **PIPES)
    assert done.returncode == 4
    if closed == ">&-":
        assert done.stderr.startswith("npattn verify: the report could not be printed: stdout is closed. RIGHT: ")


WAITS = (*VERIFY, "bad:waits", "-v", "-k", "D =", "--json", "found.json")


def test_a_pipe_that_nobody_reads_any_more(folder):
    with subprocess.Popen(WAITS, **PIPES) as done:
        done.stdout.readline()
        done.stdout.close()
        (folder / "go").touch()
        error = done.stderr.read()
        assert done.wait(60) == 4
    assert error.startswith("npattn verify: the report could not be printed: Broken pipe. INTERRUPTED: bad:waits")
    assert "Traceback" not in error
    found = json.loads((folder / "found.json").read_text())
    assert found["results"]
    assert not found["passed"]


@POSIX
@pytest.mark.parametrize("number", first(1, [signal.SIGINT, signal.SIGTERM]))
def test_an_interrupt_reports_what_was_done(folder, number):
    """Sent to all processes of the group, as Ctrl-C is."""
    done = subprocess.Popen(WAITS, **PIPES, start_new_session=True)
    first = done.stdout.readline()
    os.killpg(done.pid, number)
    text, error = done.communicate(timeout=60)
    assert done.returncode == 130
    assert first.startswith("  ok ")
    assert "INTERRUPTED: bad:waits holds in what was tested before that" in text
    assert error == ""
    found = json.loads((folder / "found.json").read_text())
    assert found["interrupted"]
    assert not found["passed"]
    assert 1 <= len(found["results"]) < found["asked"]


def test_a_fault_of_our_own_has_not_the_status_of_wrong(run, monkeypatch):
    def fails(*what):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(Worker, "examine", fails)
    status, _, error = run("bad:right", "--case", "plain")
    assert status == 4
    assert "ZeroDivisionError: ours" in error
    assert error.endswith("npattn verify: a fault of npattn's own, and no verdict\n")


def test_a_fault_in_one_case_leaves_the_others_their_report(run, folder):
    """Here the candidate makes NumPy raise in our own hands."""
    (folder / "spoils.py").write_text(
        "import numpy as np\nfrom npattn import attention\n\ndef f(q, k, v):\n    out = attention(q, k, v)\n"
        "    if q.shape[-2] == 1:\n        np.isfinite = None\n    return out\n"
    )
    status, _, error = run("spoils.py:f", "-k", "small sizes", "--json", "found.json")
    assert status == 4
    assert "a fault of npattn's own in" in error
    found = json.loads((folder / "found.json").read_text())
    assert len(found["results"]) == found["asked"]
    assert any(c["text"].startswith("a fault of npattn's own: ") for r in found["results"] for c in r["checks"])
