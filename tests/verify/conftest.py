"""The command, run in the tests' own process. That it starts one for the candidate is what test_worker.py is about."""

import pytest

from npattn import arguments, cli
from npattn.verify import CASES, CASES_OF, runs
from npattn.verify.api import examine_all
from npattn.verify.report import Facts
from npattn.verify.worker import LoadedCandidate


class InThisProcess(LoadedCandidate):
    """A `Worker` that starts no process: a start takes most of a second."""

    faults, process = (), None

    def __init__(self, spec, timeout, one_thread=False):
        super().__init__(spec, lambda *message: None)
        self.facts = Facts.of(self.candidate)

    def __enter__(self):
        return self

    def __exit__(self, *what):
        pass

    def examine(self, case, seed):
        return examine_all(self.candidate, case, seed, self.settings, self.diagnostician)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``npattn verify`` with these arguments in an empty folder: its exit status, and what it prints. Nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "Worker", InThisProcess)
    monkeypatch.setattr(arguments, "_space", lambda given, op: None)

    def run(*arguments):
        status = cli.main(["verify", *arguments])
        captured = capsys.readouterr()
        assert not (captured.out and captured.err)
        return status, captured.out or captured.err

    return run


@pytest.fixture
def one_of_each(monkeypatch):
    """One case of each feature, in place of all cases of attention."""
    first = {feature: case for case in reversed(CASES) for feature in case.features}
    cases = [case for case in CASES if case in first.values()]
    assert len(cases) < len(CASES) / 4
    monkeypatch.setitem(CASES_OF, "attention", cases)
    return cases
