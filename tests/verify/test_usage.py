"""What is asked of the command and cannot be meant: it says so, and starts nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from npattn import cli
from npattn.verify import CandidateError, load, verify


@pytest.mark.parametrize(
    "arguments",
    [[""], [" "], ["theirs:right", "--backward", ""], ["--case", ""], ["-k", ""], ["--require", ""], ["--json", ""],
     ["--save", ""], ["--convention", ""], ["--expect-failure", ""]],
)  # fmt: skip
def test_an_empty_name_is_an_error(run, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert "it is empty: is a variable of the shell unset?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_an_error_from_python_too(name):
    with pytest.raises(CandidateError, match="the candidate has an empty name"):
        verify(name)
    with pytest.raises(CandidateError, match="the backward has an empty name"):
        load("theirs:right", name)


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
    status, error = run(*arguments)
    assert status == 2
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
        run("theirs:right", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_table_of_exit_statuses_is_the_same_everywhere(capsys):
    """In the docs, in --help, and in the code. That each comes about, the tests of the command and of its process see."""
    page = (Path(__file__).parents[2] / "docs/verifying.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", page[page.index("| exit status |") :], re.M))
    assert rows == {str(status): text for status, text in cli.STATUSES.items()}
    with pytest.raises(SystemExit):
        cli.main(["verify", "--help"])
    told = capsys.readouterr().out
    for status, text in cli.STATUSES.items():
        assert f"  {status:<4} {text}\n" in told
