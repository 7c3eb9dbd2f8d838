"""`npattn verify` on a real library: its true findings, what it does not support, and no false alarm."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")

from npattn import cli
from npattn.verify import Report, load, verify
from npattn.verify.cases import CASES

# torch forms plain products with what is masked, and 0 * NaN = NaN (pytorch issue 101967): a finding, by our convention.
FINDINGS = {
    "NaN behind the mask",
    "NaN seen later",
    "NaN in a dead query",
    "NaN in values that are seen",
    "NaN in a key that is seen",
}


def test_torch():
    candidate = load("torch")
    report = Report("torch", list(verify(candidate, CASES)))
    assert {r.case for r in report.wrong} == FINDINGS
    assert {r.case for r in report.results if "NaN containment" in r.features} == FINDINGS
    unsupported = {c.text for r in report.results for c in r.checks if c.status == "not supported"}
    assert {name for text in unsupported for name in text.split(", ")} == {"softcap", "sink", "dropout_mask", "dlse"}
    assert report.tested > 300
    features = ["causal", "mask", "bias", "grouped heads", "E != D", "dead rows", "float64", "empty", "layout", "hard inputs"]
    assert report.untested(features) == []


def test_the_command_on_torch(capsys):
    assert cli.main(["verify", "torch", "-k", "causal", "--require", "causal"]) == 0
    assert cli.main(["verify", "torch"]) == 1
    text = capsys.readouterr().out
    assert "not supported: softcap, sink, dropout_mask, dlse; lse is not returned" in text
    assert "is nan, expected" in text
