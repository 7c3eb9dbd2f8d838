"""The page about the installed libraries: what it says is what they do, and docs/peers.md is what its command writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

for library in ("torch", "jax", "onnx", "onnxruntime", "transformers"):
    pytest.importorskip(library, reason="needs the peers extra: pip install npattn[peers]")

from npattn import cli
from npattn.peers import MODULES, PEERS, module
from npattn.peers.findings import Finding, show
from npattn.peers.probes import Probes
from npattn.verify import PRESETS, CandidateError
from npattn.verify.conventions import FIELDS
from npattn.verify.peer_page import page

PAGE = (Path(__file__).parent.parent.parent / "docs/peers.md").read_text()
FINDINGS = [pytest.param(name, f, id=f"{name}: {f.title[:60]}") for name in MODULES for f in module(name).FINDINGS]

# What a candidate does otherwise than the preset that is named after its library, and says so itself.
APART = {
    "torch": {"mask_with_causal"},  # the kernels that take both are chosen; the preset is for all of them
    "torch-flash": {"mask_with_causal"},
    "torch-mha": {"dead_out"},  # the preset is that of need_weights=True
    "transformers-sink": {"dead_out", "dead_grad", "float64"},  # gpt-oss is another function than llama's
}


@pytest.mark.parametrize(("library", "finding"), FINDINGS)
def test_findings_hold(library, finding):
    shown = show(finding, module(library).PRELUDE)
    assert shown.holds, shown.printed
    assert finding.title in PAGE
    assert len(finding.code.strip().splitlines()) <= 8


def test_a_finding_that_no_longer_holds_is_reported_as_such():
    prelude = module("scipy").PRELUDE
    assert not show(Finding("1 is 2", "print(1)", "2"), prelude).holds
    code = "print(softmax([0.0]))\nraise ValueError('no')"
    assert show(Finding("an error is shown", code, r"\[1.\]\nValueError: no"), prelude).holds
    assert not show(Finding("a part is not enough", "print(12)", "1"), prelude).holds


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.preset])
def test_probes_agree_with_the_presets(name):
    found = Probes(name).found
    convention = PRESETS[PEERS[name].preset].convention
    assert {n for n, value in found.items() if getattr(convention, n) != value} == APART.get(name, set())
    assert {"mask", "layout", "dead_out", "masked_nan"} <= set(found)
    for n, value in found.items():
        assert value in FIELDS[n].values


def test_a_probe_asks_the_library_and_not_npattn():
    """Half of each output: nothing is recognised any more."""
    probes = Probes("torch")
    whole = probes.call
    probes.call = lambda *args, **options: whole(*args, **options) / 2
    for probe in (probes.layout, probes.mask, probes.causal, probes.dead, probes.heads, probes.scale):
        assert set(probe().values()) <= {"", "zero"}


def test_the_page_of_one_library(tmp_path):
    assert cli.main(["peers", "--only", "scipy-softmax", "--write", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "`npattn peers --only scipy-softmax`" in text
    section = PAGE[PAGE.index("## scipy") :].strip()
    assert re.sub(r"[\d.]+", "#", section) in re.sub(r"[\d.]+", "#", text)  # the same page, with this machine's figures
    with pytest.raises(CandidateError, match=r"--only scipi: expected one of torch"):
        page(["scipi"], print)


def test_the_page_in_the_documents_is_whole():
    for name in PEERS:
        assert f"| `{name}` |" in PAGE
    for library in MODULES:
        assert f"## {library} " in PAGE
        assert module(library).PRELUDE.strip().splitlines()[0] in PAGE
    assert "No longer so" not in PAGE
    assert re.search(r"^Python 3\.\d+\.\d+, numpy \d", PAGE, re.M)
