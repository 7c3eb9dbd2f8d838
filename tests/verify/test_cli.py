"""The command: its options, exit statuses, and what it prints and writes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import theirs

from npattn import cli, environment
from npattn.verify import CASES, CASES_OF, Candidate, verify
from npattn.verify.conventions import FIELDS, PRESETS
from npattn.verify.ops.attention.cases import BY_NAME

PAGE = (Path(__file__).parents[2] / "docs/verifying.md").read_text()


def names_of(cases):
    return [case.name for case in cases]


# --- exit statuses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "verdict"),
    [
        (["theirs:right", "--case", "plain", "--require", "plain"], 0, "RIGHT: theirs:right holds in all that was tested, "),
        (["theirs:right", "--backward", "backward", "--case", "plain", "--require", "backward"], 0, "RIGHT: "),
        (["theirs:uncapped", "--case", "softcap"], 1, "WRONG: theirs:uncapped falls short in 1 of 1 cases: softcap"),
        (["theirs:right", "--case", "plain", "--require", "backward", "--require", "sink"], 3,
         "NOT TESTED: backward, sink, which --require asks for"),
        (["theirs:refusing", "--case", "plain", "--require", "plain"], 2,
         "NOTHING TESTED: theirs:refusing supports none of these cases"),
        (["theirs:uncapped", "--case", "softcap", "--expect-failure", "softcap=issue 12"], 0,
         "RIGHT: theirs:uncapped holds in all that was tested, 1 of 5, 1 expected to fail"),
        (["theirs:uncapped", "-k", "softcap 3", "--seed", "2", "--expect-failure", "*softcap*=12"], 0, "RIGHT: "),
        (["theirs:right", "--case", "softcap", "--expect-failure", "softcap=issue 12"], 1,
         "UNEXPECTED: softcap holds, and was expected to fail: take it off the list"),
    ],
)  # fmt: skip
def test_the_exit_status_follows_from_the_verdict(run, arguments, status, verdict):
    found, text = run(*arguments, "--no-diagnosis")
    first = text.splitlines()[0]
    assert found == status
    assert first.startswith(verdict)
    assert re.search(r" \(\d+\.\d s\)$", first)
    if verdict.startswith("UNEXPECTED"):
        assert f"`{verdict}`" in " ".join(PAGE.split())


def test_nothing_of_all_that_holds_is_too_little(run):
    status, text = run("theirs:uncapped", "-k", "softcap", "--expect-failure", "*softcap*=12", "--no-diagnosis")
    assert status == 3
    assert text.startswith("TOO LITTLE TESTED: theirs:uncapped: its forward took ")
    assert "WRONG" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expect-failure", "softcup=issue 12"], "expected failure 'softcup': no such case"),
        (["--expect-failure", "a=b=issue 12"], "expected failure 'a=b': no such case"),
        (["--expect-failure", "softcap="], "expected failure 'softcap' has no reason"),
        (["--expect-failure", "softcap"], "--expect-failure softcap: expected CASE=REASON"),
        (["--expect-failure", "=issue 12"], "--expect-failure =issue 12: expected CASE=REASON"),
        (["--case", "softcup"], "--case softcup: no such case (did you mean 'softcap'?); --list lists them"),
        (["-k", "grouped"], "-k grouped: no case has that in its name"),
        (["--require", "softcup"], "--require softcup: no such feature, expected one of E != D, "),
        (["--convention", "causal=left"], "causal=left, expected one of top_left, bottom_right"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--json", "."], "--json .: Is a directory"),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json: No such file or directory"),
        (["--save", "no/such.npz"], "--save no/such.npz: No such file or directory"),
        (["--op", "rnn", "--level", "bounded"], "level bounded is for attention, and theirs:right is rnn"),
        (["--op", "rnn", "--rule", "onnx"], "rules are for attention, and theirs:right is rnn"),
        (["--backward", "absent"], "theirs has no absent"),
    ],
)
def test_usage_errors_say_what_is_wrong_and_exit_with_2(run, arguments, message):
    status, error = run("theirs:right", *arguments)
    assert status == 2
    assert error.startswith("npattn verify: ")
    assert message in error


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "'nothing' is no candidate"), ("absent.py:f", "no file absent.py"), ("no_such:f", "No module named 'no_such'"),
     ("theirs:np", "theirs:np is a module, expected a function")],
)  # fmt: skip
def test_a_candidate_that_is_not_there_exits_with_2(run, name, message):
    status, error = run(name)
    assert status == 2
    assert message in error


@pytest.mark.parametrize("option", ["--level", "--precision", "--rule", "--op", "--causal", "--seed"])
def test_values_that_an_option_does_not_have_exit_with_2(run, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("theirs:right", option, "finest")
    assert stopped.value.code == 2
    assert f"argument {option}: invalid" in capsys.readouterr().err


# --- expected failures ----------------------------------------------------------------------------------------------------


def test_a_known_failure_is_shown_as_known(run):
    _, text = run("theirs:uncapped", "-v", "--case", "softcap", "--expect-failure", "softcap=issue 12", "--no-diagnosis")
    assert text.startswith("  known  softcap ")


@pytest.mark.parametrize(
    ("case", "given"), [("plain", "plain = issue?id=12"), ("L = 1", " L = 1 = issue 12 ")], ids=["reason", "case"]
)
def test_a_case_and_a_reason_may_have_an_equals_sign_in_them(run, case, given):
    status, text = run("theirs:right", "--case", case, "--expect-failure", given)
    assert status == 1
    assert text.startswith(f"UNEXPECTED: {case} holds")


# --- what is run ----------------------------------------------------------------------------------------------------------


def test_x_stops_at_the_first_that_is_wrong_and_not_known(run):
    chosen = ["theirs:uncapped", "-k", "softcap", "-x", "--no-diagnosis"]
    assert "\nstopped after 1 of " in run(*chosen)[1]
    _, text = run(*chosen, "--expect-failure", "softcap=issue 12")
    sentence = "WRONG: theirs:uncapped falls short in 1 of 2 cases, 1 expected to fail: causal top_left + softcap ("
    assert text.startswith(sentence)
    assert "\nstopped after 2 of " in text


def test_deep_runs_three_seeds(run):
    status, text = run("theirs:right", "-v", "--deep", "-k", "plain", "--seed", "4", "--no-diagnosis")
    assert status == 0
    shown = [line[9:49].strip() for line in text.splitlines() if line.startswith("  ok ")]
    assert shown == ["plain", "plain (seed 5)", "plain (seed 6)"]


def test_a_convention_is_declared(run):
    assert run("theirs:without_alignment", "--case", "causal top_left + L > S", "--no-diagnosis")[0] == 1
    for declared in (["--causal", "bottom_right"], ["--convention", "causal=bottom_right"]):
        chosen = ["--case", "causal bottom_right + L > S", "--no-diagnosis"]
        assert run("theirs:without_alignment", *chosen, *declared)[0] == 0


def test_a_class_is_declared(run):
    chosen = ["theirs:low", "--backward", "low_backward", "--case", "plain", "--no-diagnosis"]
    status, text = run(*chosen)
    assert status == 1
    assert "\nIts errors are those of float16-M2: if that is what it computes in, declare --precision float16-M2 (" in text
    status, text = run(*chosen, "--precision", "float16-M2")
    assert (status, "Its errors" in text) == (0, False)


# --- what is printed ------------------------------------------------------------------------------------------------------


def test_no_diagnosis_leaves_it_out(run):
    _, text = run("theirs:uncapped", "-v", "--case", "softcap")
    assert "           => out: matches softcap is ignored to " in text
    assert "\nit looks like " in text
    _, text = run("theirs:uncapped", "-v", "--case", "softcap", "--no-diagnosis")
    assert "=>" not in text
    assert "it looks like" not in text


def test_the_rule_is_printed_beside_the_verdict(run):
    """Values of 1e4 with a relative error of 1e-5, 8 times the rtol of torch.testing.assert_close; ONNX has 1e-3."""
    chosen = ["theirs:nearly", "--case", "inputs V mean", "--no-diagnosis"]
    status, text = run(*chosen, "--rule", "onnx", "--rule", "allclose")
    assert status == 1
    assert "\nrule onnx: rejects 0 of 1 tensors; npattn rejects 1; they differ in 1: inputs V mean: out\n" in text
    assert "\nrule allclose: rejects 1 of 1 tensors; npattn rejects 1\n" in text
    assert "rule" not in run(*chosen)[1]


def test_no_power_is_said_of_the_tensor(run):
    chosen = ["theirs:right", "-v", "--backward", "backward", "--no-diagnosis", "--case"]
    _, text = run(*chosen, "S = 1")
    assert "\n           no power: dq (the true value is 0), dk (the true value is 0)\n" in text
    assert "\nno power in 2: there the judge could not have failed\n" in text
    _, text = run(*chosen, "inputs V mean")
    shown = re.search("no power: dq .a relative error of 0.001 would pass.", PAGE)[0]
    assert f"           {shown}" in text
    assert " sigma in dv    of out, dv\n" in text


# --- JSON -----------------------------------------------------------------------------------------------------------------


def test_json_is_the_report(run, tmp_path):
    run("theirs:uncapped", "-k", "softcap 3", "--seed", "5", "--json", "found.json", "--level", "tight",
        "--expect-failure", "softcap 30=issue 12", "--rule", "onnx", "--rule", "allclose")  # fmt: skip
    text = (tmp_path / "found.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    report = verify(Candidate("theirs:uncapped", theirs.uncapped), cases=[BY_NAME["softcap 30"]], seeds=[5], level="tight",
                    rules=("onnx", "allclose"), expected_failures={"softcap 30": "issue 12"})  # fmt: skip
    assert found == json.loads(json.dumps(report.as_json()))
    (result,) = found["results"]
    assert (found["level"], result["seed"], result["expected"], result["status"]) == ("tight", 5, "issue 12", "wrong")
    assert result["explanations"]
    assert result["checks"][0]["rules"] == {"onnx": False, "allclose": False}


def test_what_is_not_finite_is_null(run, tmp_path):
    run("theirs:wrong_shape", "--case", "plain", "--json", "found.json")
    (result,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert (result["checks"][0]["worst"], result["checks"][0]["rms"]) == (None, 0)


# --- lists ----------------------------------------------------------------------------------------------------------------


def test_k_takes_a_part_of_a_name_or_a_whole_feature(run):
    def listed(*arguments):
        status, text = run("--list", *arguments)
        assert status == 0
        return [re.split("   *", line)[0] for line in text.splitlines()]

    assert listed() == names_of(CASES)
    assert listed("-k", "Softcap 3") == ["softcap 30"]
    assert listed("-k", "grouped heads") == [c.name for c in CASES if "grouped heads" in c.features]
    assert listed("-k", "dropout") == [c.name for c in CASES if "dropout" in c.name or "dropout" in c.features]
    assert listed("--case", "softcap") == ["softcap"]
    assert listed("--op", "softmax") == names_of(CASES_OF["softmax"])
    deep = listed("--deep")
    assert len(deep) == len(CASES) + 150
    assert [name for name in deep if name.startswith("random ")] == deep[len(CASES) :]


def test_conventions_are_listed(run):
    status, text = run("--list-conventions")
    assert status == 0
    lines = [line.strip() for line in text.splitlines()]
    fields, presets = text.split("\npresets\n")
    for name, field in FIELDS.items():
        assert any(line.startswith(f"{name} ") and line.endswith(field.meaning) for line in lines), name
        for value, meaning in field.values.items():
            assert re.search(rf"^    {re.escape(name)}={re.escape(value)} .*{re.escape(meaning)}$", fields, re.M), (name, value)
    for name, preset in PRESETS.items():
        changed = ", ".join(f"{n}={v}" for n, v in preset.convention.changes().items()) or "the first value of each"
        assert re.search(rf"^{name} +{re.escape(changed)}\n +{re.escape(preset.source)}", presets, re.M), name


def test_candidates_are_listed(run):
    status, text = run("--list-candidates")
    assert status == 0
    for name in ("blockwise", "multi-head", "rnn", "softmax", "torch"):
        assert re.search(rf"^{name} ", text, re.M)


# --- the command itself, and npattn env -----------------------------------------------------------------------------------


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "npattn", "verify", "--case", "plain"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("RIGHT: blockwise holds in all that was tested, ")


def test_a_terminal_gets_a_progress_bar_beside_the_lines(run, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    status, text = run("-v", "--case", "plain")
    assert status == 0
    assert "ok     plain" in text


def test_env(capsys, monkeypatch):
    monkeypatch.setattr(environment, "_output", lambda code, variables: {"attention": 1.0, "product": 1.0, "exp": 1.0})
    monkeypatch.setattr(environment, "busy", lambda: "other work uses 1.5 processors")
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for fact in ("npattn", "NumPy", "BLAS", "kernels", "threads", "busy", "faster"):
        assert f"\n{fact} " in f"\n{text}"
