"""`npattn verify` on candidates that end, crash, hang or spoil what they are given: a verdict and a status, always."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import npattn
from npattn import attention, cli
from npattn.verify import Candidate, Settings, examine, verify
from npattn.verify.cases import BY_NAME
from npattn.verify.conventions import Convention
from npattn.verify.worker import HANGS, Spec, Worker

ROOT = Path(__file__).parents[1]
BAD = '''
    import ctypes, os, sys, threading, time
    import numpy as np
    from npattn import attention, attention_backward, attention_forward

    CALLS = [0]

    def right(q, k, v, *, mask=None):
        return attention(q, k, v, mask=mask)

    def backward(dout, q, k, v, *, mask=None):
        g = attention_backward(dout, attention_forward(q, k, v, mask=mask)[1])
        return g.q, g.k, g.v

    def exits(q, k, v):
        os._exit(0)

    def exits_in_the_backward(dout, q, k, v):
        os._exit(7)

    def exits_later(q, k, v):
        CALLS[0] += 1
        if CALLS[0] == 2:
            os._exit(3)
        return attention(q, k, v)

    def crashes(q, k, v):
        ctypes.string_at(0)

    def is_killed(q, k, v):
        os.kill(os.getpid(), 9)

    def leaves(q, k, v):
        sys.exit(0)

    def interrupts(q, k, v):
        raise KeyboardInterrupt

    def generator(q, k, v):
        raise GeneratorExit

    class Unspeakable(Exception):
        def __str__(self):
            raise ValueError("no words")

    def unspeakable(q, k, v):
        raise Unspeakable

    def unspeakably_refuses(q, k, v):
        class Refusal(NotImplementedError):
            __str__ = Unspeakable.__str__
        raise Refusal

    def reshapes(q, k, v):
        out = attention(q, k, v)
        k.shape = (-1,)
        return out

    def casts(q, k, v):
        out = attention(q, k, v)
        k.dtype = np.int32
        return out

    def freezes(q, k, v):
        v.flags.writeable = False
        return attention(q, k, v)

    def writes(q, k, v):
        out = attention(q, k, v)
        q += 1
        return out

    def reshapes_in_the_backward(dout, q, k, v):
        g = backward(dout, q, k, v)
        dout.shape = (-1,)
        return g

    def closes(q, k, v):
        sys.stdout.close()
        return attention(q, k, v)

    def prints(q, k, v):
        print("LOOK AT ME", flush=True)
        os.write(1, b"AND ME")
        return attention(q, k, v)

    def reads(q, k, v):
        input()

    def sets_errors(q, k, v):
        np.seterr(all="raise")
        with np.errstate(all="ignore"):
            return attention(q, k, v)

    def moves(q, k, v):
        os.chdir("/")
        return attention(q, k, v)

    def forks(q, k, v):
        if os.fork() == 0:
            return None
        os.wait()
        return attention(q, k, v)

    def hangs(q, k, v):
        time.sleep(600)

    def hangs_with_a_child(q, k, v):
        if os.fork() == 0:
            time.sleep(600)
        time.sleep(600)

    def hangs_in_a_thread(q, k, v):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(600)
        return attention(q, k, v)

    class Harsh(Exception):
        def __str__(self):
            raise SystemExit(1)

    def harsh(q, k, v):
        raise Harsh

    def foreign(q, k, v):
        raise ValueError("gr\\u00f6\\u00dfe \\ud800")

    def leaves_a_child(q, k, v):
        import subprocess
        subprocess.Popen(["sleep", "77.125"])
        os._exit(0)

    def slow(q, k, v):
        time.sleep(0.2)
        return attention(q, k, v)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(textwrap.dedent(BAD))
    (tmp_path / "leaving.py").write_text("import os\nos._exit(0)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    def run(*arguments):
        status = cli.main(["verify", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


ENDED = {
    "exits": "out the forward ends its process with exit status 0",
    "crashes": "out the forward crashes its process (SIGSEGV)",
    "is_killed": "out the forward crashes its process (SIGKILL)",
    "leaves": "out raises SystemExit: 0 (bad.py:",
    "interrupts": "out raises KeyboardInterrupt:  (bad.py:",
    "generator": "out raises GeneratorExit:  (bad.py:",
    "unspeakable": "out raises Unspeakable: (its str raises ValueError) (bad.py:",
    "reshapes": "out an input was modified: k has another shape",
    "casts": "out an input was modified: k has another dtype",
    "freezes": "out an input was modified: v can be written or not, as it could not before",
    "writes": "out an input was modified: q\n",
    "reads": "out raises EOFError: EOF when reading a line (bad.py:",
    "harsh": "out raises Harsh: (its str raises SystemExit) (bad.py:",
    "foreign": "out raises ValueError: gr",
    "exits_later": "repeat the forward ends its process with exit status 3, when it is called again",
}


@pytest.mark.skipif(os.name != "posix", reason="signals and exit statuses of POSIX")
@pytest.mark.parametrize("name", ENDED)
def test_what_a_candidate_does_to_its_process_is_said_and_is_wrong(run, name):
    status, text, _ = run(f"bad.py:{name}", "--case", "plain")
    assert status == 1
    assert text.startswith(f"WRONG: bad.py:{name} falls short in 1 of 1 cases: plain (")
    assert ENDED[name] in text


@pytest.mark.parametrize("name", ["generator", "unspeakable", "reshapes", "casts", "freezes", "writes"])
def test_the_same_in_this_process(folder, name):
    scope: dict = {}
    exec(textwrap.dedent(BAD), scope)
    (check, *_) = verify(scope[name], cases=[BY_NAME["plain"]]).results[0].checks
    assert f"{check.tensor} {check.text}".startswith(re.sub(r" \(bad.py:.*|\n", "", ENDED[name]))


def test_the_backward_is_named_and_the_run_goes_on(run, tmp_path):
    chosen = ("--backward", "exits_in_the_backward", "-k", "L = 1", "--json", "found.json")
    assert run("bad.py:right", *chosen)[0] == 1
    found = json.loads((tmp_path / "found.json").read_text())
    checks = {c["tensor"]: c for c in found["results"][0]["checks"]}
    assert checks["dq"]["text"] == "the backward ends its process with exit status 7"
    assert checks["out"]["status"] == "lost"
    assert len(found["results"]) == found["asked"] > 2


def test_an_input_that_the_backward_spoils_is_not_what_the_truth_is_made_of(folder):
    scope: dict = {}
    exec(textwrap.dedent(BAD), scope)
    result = verify(scope["right"], scope["reshapes_in_the_backward"], cases=[BY_NAME["plain"]]).results[0]
    said = {c.tensor: (c.status, c.text) for c in result.checks}
    assert said["out"] == ("ok", "")
    assert said["dq"] == ("wrong", "the backward modifies an input: dout has another shape")


@pytest.mark.parametrize("name", ["closes", "prints", "sets_errors", "moves", pytest.param("forks", marks=pytest.mark.skipif(
    not hasattr(os, "fork"), reason="this system does not fork"))])  # fmt: skip
def test_what_is_done_beside_the_report_does_not_reach_it(run, tmp_path, name):
    status, text, _ = run(f"bad.py:{name}", "--case", "L = 1", "--json", "found.json")
    assert (status, text.splitlines()[0][:5]) == (0, "RIGHT")
    assert "ME" not in text
    assert json.loads((tmp_path / "found.json").read_text())["passed"]


@pytest.mark.parametrize("name", ["hangs", "hangs_with_a_child", "hangs_in_a_thread"])
def test_a_candidate_that_hangs_is_ended(run, name):
    started = time.perf_counter()
    status, text, _ = run(f"bad.py:{name}", "--case", "plain", "--timeout", "0.5")
    assert status == 1
    assert "the forward gives no answer within 0.5 s (--timeout)" in text
    assert time.perf_counter() - started < 60  # it sleeps for 600


def test_after_a_few_hangs_nothing_more_is_asked(run):
    _, text, _ = run("bad.py:hangs", "-k", "head widths", "--timeout", "0.2", "-v")
    assert text.count("gives no answer within") == HANGS
    assert f"given up: {HANGS} times there was no answer" in text


def test_the_process_that_hangs_is_gone_and_so_is_what_it_started(folder):
    spec = Spec("bad.py:hangs_with_a_child", None, Convention(), "attention", Settings(), False)
    with Worker(spec, timeout=0.5) as worker:
        group = worker.process.pid
        worker.examine(BY_NAME["plain"], 0)
    ended = time.monotonic() + 10  # until the system has noticed
    while time.monotonic() < ended and subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True,
                                                      check=False).stdout.strip(" Z\n"):  # fmt: skip
        time.sleep(0.1)
    assert time.monotonic() < ended


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaving.py:f", "leaving.py:f cannot be loaded: the import ends its process with exit status 0"),
        ("bad.py:absent", "bad.py has no absent"),
    ],
)
def test_what_cannot_be_loaded_is_usage(run, name, message):
    status, text, error = run(name)
    assert (status, text) == (2, "")
    assert message in error


def test_a_refusal_that_says_nothing_is_a_refusal(run):
    status, text, _ = run("bad.py:unspeakably_refuses", "--case", "plain")
    assert status == 2
    assert "NOTHING TESTED" in text
    assert "refused: (its str raises Unspeakable) (1 case)" in text or "refused: (its str raises ValueError) (1 case)" in text


SECOND = {
    "None": lambda out: None, "a list": lambda out: out.tolist(), "another shape": lambda out: out[:1],
    "a tuple": lambda out: (out,) * 5, "objects": lambda out: out.astype(object), "float64": lambda out: out.astype(np.float64),
}  # fmt: skip


@pytest.mark.parametrize("name", SECOND)
def test_a_second_call_that_gives_something_else_is_no_gap_but_wrong(name):
    calls = []

    def candidate(q, k, v):
        calls.append(1)
        out = attention(q, k, v)
        return out if len(calls) == 1 else SECOND[name](out)

    result = verify(candidate, cases=[BY_NAME["plain"]]).results[0]
    (check,) = [c for c in result.checks if c.status == "wrong"]
    assert check.tensor == "repeat"


ODD = {
    "objects": lambda out: out.astype(object), "texts": lambda out: out.astype(str), "complex": lambda out: out.astype(complex),
    "integers": lambda out: out.astype(int), "records": lambda out: np.zeros(out.shape, [("x", "f4")]),
    "dates": lambda out: out.astype(int).astype("M8[s]"), "masked": lambda out: np.ma.masked_array(out, mask=True),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("tensor", ["out", "lse"])
def test_an_output_of_another_kind_is_wrong_and_no_fault_of_ours(name, tensor):
    def candidate(q, k, v, *, mask=None):
        out, lse = attention(q, k, v, mask=mask, return_lse=True)
        return (ODD[name](out), lse) if tensor == "out" else (out, ODD[name](np.where(np.isfinite(lse), lse, 0)))

    for case in ("plain", "dead rows"):
        result = verify(candidate, cases=[BY_NAME[case]], rules=["flash2x"]).results[0]
        assert tensor in {c.tensor for c in result.checks if c.status == "wrong"}
        assert not any(tensor in e.tensors for e in result.explanations)


def test_an_array_of_a_subclass_is_taken_as_what_it_is_beneath():
    class Loud(np.ndarray):
        def __array_ufunc__(self, *what, **more):
            raise AssertionError("it was computed with")

    assert verify(lambda q, k, v: attention(q, k, v).view(Loud), cases=[BY_NAME["plain"]]).passed


def test_hangs_that_are_expected_do_not_make_the_rest_right(run):
    chosen = ("-k", "head widths", "--timeout", "0.3", "--expect-failure", "*=issue 12", "--no-diagnosis")
    status, text, _ = run("bad.py:hangs", *chosen)
    assert (status, text[:10]) == (3, "TOO LITTLE")
    assert f"given up: {HANGS} times there was no answer\n" in text


def test_what_can_be_loaded_only_once_has_its_report(run, folder):
    (folder / "once.py").write_text(
        "import os\nif os.path.exists('lock'):\n    raise RuntimeError('locked')\nopen('lock', 'w').close()\n"
        "def f(q, k, v):\n    os._exit(0)\n"
    )
    for more in ([], ["--shrink"], ["-k", "L = 1"]):
        (folder / "lock").unlink(missing_ok=True)
        status, text, _ = run("once.py:f", *(more if "-k" in more else ["--case", "plain", *more]), "--json", "found.json")
        assert (status, text[:5]) == (1, "WRONG")
        assert json.loads((folder / "found.json").read_text())["results"]


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_what_a_candidate_leaves_behind_is_ended_with_it(run):
    run("bad.py:leaves_a_child", "--case", "plain")
    found = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in found.splitlines() if "sleep 77.125" in line and not line.startswith("Z")]


def test_the_file_of_the_candidate_is_not_written_over(run, folder):
    before = (folder / "bad.py").read_text()
    for option in ("--json", "--save"):
        status, _, error = run("bad.py:right", "--case", "plain", option, "./bad.py")
        assert status == 2
        assert "that is the file of the candidate" in error
    assert (folder / "bad.py").read_text() == before


def test_a_terminal_without_these_letters(folder):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = command("bad.py:foreign", "--case", "plain", env=environment)
    assert done.returncode == 1
    assert "raises ValueError: gr\\xf6\\xdfe" in done.stdout


# --- reports that cannot be written, and runs that are ended ---------------------------------------------------------------


VERIFY = (sys.executable, "-m", "npattn", "verify")


def command(*arguments, **options):
    return subprocess.run([*VERIFY, *arguments], capture_output=True, text=True, check=False, timeout=120, **options)


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@FULL
@pytest.mark.parametrize(("name", "verdict"), [("right", "RIGHT"), ("writes", "WRONG")])
def test_a_json_that_cannot_be_written(run, name, verdict):
    status, text, error = run(f"bad.py:{name}", "--case", "plain", "--json", "/dev/full")
    assert (status, text[:5]) == (4, verdict)
    assert "npattn verify: --json /dev/full: No space left on device" in error


@FULL
def test_a_case_that_cannot_be_saved(run):
    status, text, error = run("bad.py:right", "--case", "plain", "--save", "/dev/full")
    assert (status, text[:5]) == (4, "RIGHT")
    assert "npattn verify: --save /dev/full: No space left on device" in error


@FULL
def test_a_page_that_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setattr("npattn.verify.peer_report.page", lambda only, progress: "a page")
    assert cli.main(["peers", "--write", "/dev/full"]) == 4
    assert "npattn peers: --write /dev/full: No space left on device" in capsys.readouterr().err


@FULL
def test_a_full_stdout(folder):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*VERIFY, "bad.py:right", "--case", "plain"], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            timeout=120,
        )  # fmt: skip
    assert done.returncode == 4
    assert "the report could not be printed: No space left on device. RIGHT: bad.py:right" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes stdout")
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&- <&-"])
def test_a_closed_stdout(folder, closed):
    done = subprocess.run(f"{sys.executable} -m npattn verify bad.py:right --case plain {closed}", shell=True, text=True,
                          stderr=subprocess.PIPE, check=False, timeout=120)  # fmt: skip
    assert done.returncode == 4
    if closed == ">&-":
        assert done.stderr.startswith("npattn verify: the report could not be printed: stdout is closed. RIGHT: ")


def test_a_pipe_that_nobody_reads_any_more(folder):
    done = subprocess.Popen([*VERIFY, "bad.py:slow", "-v", "-k", "D =", "--json", "found.json"],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    done.stdout.readline()
    done.stdout.close()
    error = done.stderr.read()
    done.stderr.close()
    assert done.wait(60) == 4
    assert error.startswith("npattn verify: the report could not be printed: Broken pipe. INTERRUPTED: bad.py:slow")
    assert "Traceback" not in error
    found = json.loads((folder / "found.json").read_text())
    assert found["results"]
    assert not found["passed"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reports_what_was_done(folder, number):
    """Sent to all processes of the group, as Ctrl-C is."""
    done = subprocess.Popen([*VERIFY, "bad.py:slow", "-v", "-k", "D =", "--json", "found.json"],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    first = done.stdout.readline()
    os.killpg(done.pid, number)
    text, error = done.communicate(timeout=60)
    assert done.returncode == 130
    assert first.startswith("  ok ")
    assert "INTERRUPTED: bad.py:slow holds in what was tested before that" in text
    assert error == ""
    found = json.loads((folder / "found.json").read_text())
    assert found["interrupted"]
    assert not found["passed"]
    assert 1 <= len(found["results"]) < found["asked"]


def test_a_fault_of_our_own_has_not_the_status_of_wrong(run, monkeypatch):
    def fails(*what):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(Worker, "examine", fails)
    status, _, error = run("bad.py:right", "--case", "plain")
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


# --- usage -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [[""], [" "], ["bad.py:right", "--backward", ""], ["--case", ""], ["-k", ""], ["--require", ""], ["--json", ""],
     ["--save", ""], ["--convention", ""], ["--expect-failure", ""]],
)  # fmt: skip
def test_an_empty_name_is_an_error(run, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert "it is empty: is a variable of the shell unset?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_an_error_from_python_too(name):
    with pytest.raises(npattn.verify.CandidateError, match="the candidate has an empty name"):
        verify(name)
    with pytest.raises(npattn.verify.CandidateError, match="the backward has an empty name"):
        npattn.verify.load("bad.py:right", name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "plain", "-k", "softcap"], "--case and -k contradict each other"),
        (["--list", "--self-test"], "--self-test and --list contradict each other"),
        (["--list-candidates", "--list-conventions"], "--list-candidates and --list-conventions contradict each other"),
        (["--self-test", "torch"], "--self-test and a candidate contradict each other"),
        (["--self-test", "--deep"], "--self-test and --deep contradict each other"),
        (["--list", "-x"], "--list and -x contradict each other"),
        (["--list", "--json", "a"], "--list and --json contradict each other"),
        (["--list", "--no-diagnosis"], "--list and --no-diagnosis contradict each other"),
        (["--json", "a", "--save", "./a"], "--json and --save name one file, a"),
        (["--causal", "top_left", "--convention", "causal=bottom_right"], "--causal and --convention contradict each other"),
    ],
)
def test_options_that_contradict_each_other_are_an_error(run, arguments, message):
    status, text, error = run(*arguments)
    assert (status, text) == (2, "")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1", "--seed", "2"], "--seed is given twice: 1 and 2"),
        (["--json", "a", "--json", "b"], "--json is given twice: a and b"),
        (["--timeout", "0"], "expected a number of seconds above 0"),
        (["--timeout", "nan"], "expected a number of seconds above 0"),
        (["--timeout", "soon"], "expected a number of seconds above 0"),
    ],
)
def test_one_option_twice_and_bad_numbers(run, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("bad.py:right", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_table_of_exit_statuses_is_the_same_everywhere(capsys):
    """In the docs, in --help, and in the code; that each comes about is what the other tests here and in test_report see."""
    page = (ROOT / "docs/verifying.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", page[page.index("| exit status |") :], re.M))
    assert rows == {str(status): text for status, text in cli.STATUSES.items()}
    with pytest.raises(SystemExit):
        cli.main(["verify", "--help"])
    told = capsys.readouterr().out
    for status, text in cli.STATUSES.items():
        assert f"  {status:<4} {text}\n" in told


# --- too little tested -----------------------------------------------------------------------------------------------------


def picky(q, k, v, *, mask=None, softcap=None):
    if q.shape[-1] != 64 or q.shape[-2] % 16 or k.shape[-2] % 64 or softcap:
        raise NotImplementedError("D is 64, and 16 divides L")
    return attention(q, k, v, mask=mask)


def forwards_only(dout, q, k, v, *, mask=None, softcap=None):
    raise NotImplementedError("no gradients yet")


def test_a_verdict_on_little_is_none(folder):
    (folder / "mine.py").write_text(textwrap.dedent(
        """
        from npattn import attention

        def picky(q, k, v, *, mask=None, softcap=None):
            if q.shape[-1] != 64 or q.shape[-2] % 16 or k.shape[-2] % 64 or softcap:
                raise NotImplementedError("D is 64, and 16 divides L")
            return attention(q, k, v, mask=mask)
        """
    ))  # fmt: skip
    done = command("mine.py:picky", "--no-diagnosis")
    assert done.returncode == 3, done.stdout
    first = done.stdout.splitlines()[0]
    said = r"TOO LITTLE TESTED: mine.py:picky: its forward took (\d+) of (\d+) cases that its signature takes"
    counts = re.match(said, first)
    assert int(counts[1]) < int(counts[2]) / 3
    assert re.search(r"^refused: D is 64, and 16 divides L \(\d+ cases\)$", done.stdout, re.M)
    assert "\nin the signature, and tested in no case: softcap\n" in done.stdout


def test_the_same_from_python():
    report = verify(picky, diagnose=False)
    assert report.too_little
    assert not report.passed
    assert report.unused == ["softcap"]
    with pytest.raises(AssertionError, match=r"too little tested: its forward took .* It refused: D is 64, and 16 div"):
        report.require()
    some = [c for c in npattn.verify.CASES if "whole tiles" in c.features and set(c.options) <= {"mask array", "window"}]
    assert verify(picky, cases=some, diagnose=False).require().passed


def test_a_backward_that_refuses_everything_is_too_little():
    cases = [BY_NAME[n] for n in ("plain", "mask array", "softcap")]
    report = verify(Candidate("mine", attention, forwards_only), cases=cases)
    assert report.shares() == {"forward": (3, 3), "backward": (0, 3)}
    assert report.too_little
    assert verify(Candidate("mine", attention), cases=cases).passed  # none is given, and none is claimed


# --- names that were false -------------------------------------------------------------------------------------------------


def explained(function, *names, **options):
    report = verify(function, cases=[BY_NAME[n] for n in names], **options)
    return report, list(report.diagnosis)


SOME = ("plain", "L > S", "inputs x5", "NaN behind the mask", "D = 64")


def test_another_dtype_is_all_that_is_said_of_it():
    report, said = explained(lambda q, k, v: attention(*(x.astype(np.float64) for x in (q, k, v))), *SOME)
    assert len(report.wrong) == 4  # NaN behind the mask needs a mask
    assert said == []
    assert all("has dtype float64, expected float32" in line for line in report.lines())
    _, said = explained(lambda q, k, v: (0.9 * attention(q, k, v)).astype(np.float64), "plain")
    assert said == ["out is 0.9 times what it should be"]  # what is wrong beside the dtype is still looked for


@pytest.mark.parametrize("value", [np.nan, 0.0, 1.5])
def test_one_number_everywhere_is_no_mistake_of_masks_or_heads(value):
    def constant(q, k, v, *, mask=None, sink=None):
        return np.full((*q.shape[:-1], v.shape[-1]), value, q.dtype)

    report, said = explained(constant, "plain", "mask array", "NaN behind the mask", "sink")
    assert len(report.wrong) == 4
    assert said == ["NaN everywhere" if np.isnan(value) else f"{value:g} everywhere"]


def test_a_mistake_that_ends_in_nan_everywhere_keeps_its_name_where_other_cases_hold():
    def no_maximum(q, k, v):
        with np.errstate(all="ignore"):
            e = np.exp(q.shape[-1] ** -0.5 * (q @ k.swapaxes(-1, -2)))
            return e / e.sum(-1, keepdims=True) @ v

    _, said = explained(no_maximum, "plain", "L > S", "inputs x30")
    assert said == ["no maximum is subtracted"]


def test_a_sum_that_is_kept_in_bfloat16_is_not_a_class_of_precision():
    from npattn.verify.precision import round_to

    def low(x):
        return round_to(np.asarray(x, np.float32), "bfloat16")

    def summed(a, b):
        total = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
        for j in range(0, a.shape[-1], 64):
            total = low(total + a[..., j : j + 64] @ b[..., j : j + 64, :])
        return total

    def candidate(q, k, v):
        s = low(q.shape[-1] ** -0.5 * summed(low(q), low(k).swapaxes(-1, -2)))
        p = np.exp(s - s.max(-1, keepdims=True))
        z = summed(p, np.ones((p.shape[-1], 1), np.float32))
        return low(summed(low(p), low(v)) / z)

    names = ("plain", "L > S", "inputs x30", "D = 64", "long, inputs tiny")
    report, _ = explained(candidate, *names, diagnose=False)
    assert len(report.wrong) == len(names)
    assert report.fits == ""
    declared = verify(candidate, cases=[BY_NAME[n] for n in names], precision="bfloat16-M3", diagnose=False)
    assert [r.case for r in declared.wrong] == ["long, inputs tiny"]


# --- expected failures -------------------------------------------------------------------------------------------------------


def test_an_expected_failure_that_is_only_partly_tested_is_not_unexpected():
    """The failure may lie in what this candidate does not support."""

    def backward(dout, q, k, v, *, softcap=None, dropout_mask=None):
        if dropout_mask is not None:
            raise NotImplementedError("dropout in the backward")
        options = {"dropout_mask": dropout_mask}  # and softcap is forgotten
        g = npattn.attention_backward(dout, npattn.attention_forward(q, k, v, **options)[1])
        return g.q, g.k, g.v

    def forward(q, k, v, *, softcap=None, dropout_mask=None):
        return attention(q, k, v, softcap=softcap, dropout_mask=dropout_mask)

    cases = [BY_NAME[n] for n in ("plain", "softcap", "softcap + dropout_mask")]
    report = verify(forward, backward, cases=cases, expected_failures={"softcap*": "issue 12"})
    assert [r.case for r in report.unsettled] == ["softcap + dropout_mask"]
    assert report.unexpected == []
    assert report.passed
    report = verify(attention, cases=[BY_NAME["softcap"]], expected_failures={"softcap": "issue 12"})
    assert [r.case for r in report.unexpected] == ["softcap"]


def test_functions_written_for_tensors_are_told_so():
    def torchlike(q, k, v):
        return q @ k.transpose(-2, -1) @ v

    report = verify(torchlike, cases=[BY_NAME["plain"]])
    assert "axes don't match array" in report.lines()[0]
    assert "verify gives NumPy arrays and expects them back, and this function may want tensors of" in report.hints()[0]
    examined = examine(Candidate("mine", lambda q, k, v: [0.0]), BY_NAME["plain"])
    assert "is a list, expected a numpy.ndarray: np.array(out, np.float32)" in examined.checks[0].text
