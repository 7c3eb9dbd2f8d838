"""Every example in README.md, docs/ and the docstrings prints what it says, and every link leads somewhere."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import npattn
from npattn.verify import CASES, load, report, verify

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
MODULES = sorted(m.name for m in pkgutil.walk_packages(npattn.__path__, "npattn.") if not m.name.endswith("__main__"))
FEW = ("plain", "causal top_left", "causal bottom_right", "G < H", "E != D")  # of the cases: all of them would take long


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, monkeypatch):
    monkeypatch.setitem(report.CASES_OF, "attention", [case for case in CASES if case.name in FEW])
    module = importlib.import_module(name)
    module = sys.modules[name] if not isinstance(module, types.ModuleType) else module
    assert doctest.testmod(module, extraglobs={"np": np}).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_of_a_page(page):
    text = "\n".join(block for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S) if ">>>" in block)
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    if page.name == "README.md":
        assert test.examples


def test_the_readers_own_test_in_the_readme(monkeypatch):
    monkeypatch.setitem(report.CASES_OF, "attention", [case for case in CASES if case.name in FEW])
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "my_package" in b]
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    theirs = types.ModuleType("my_package")
    blockwise = load("blockwise")
    theirs.my_attention, theirs.my_attention_backward = blockwise.forward, blockwise.backward
    monkeypatch.setitem(sys.modules, "my_package", theirs)
    scope: dict = {}
    exec(block, scope)
    scope["test_my_attention"]()
    theirs.my_attention = lambda q, k, v: v.mean(-2, keepdims=True) + 0 * q
    exec(block, scope)
    with pytest.raises(AssertionError, match=r"(?s)falls short in .*\nplain: out"):
        scope["test_my_attention"]()

    def nothing(q, k, v):
        raise NotImplementedError

    theirs.my_attention = nothing
    exec(block, scope)
    with pytest.raises(AssertionError, match="not tested: anything"):
        scope["test_my_attention"]()


def test_the_example_of_verifying_is_diagnosed_as_the_page_says():
    page = (ROOT / "docs/verifying.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "def weights(" in b]
    scope: dict = {}
    exec(block, scope)
    cases = [case for case in CASES if case.name in (*FEW, "causal top_left + L > S", "NaN behind the mask")]
    found = verify(scope["attention"], scope["backward"], cases=cases)
    assert {"plain", "E != D", "causal top_left"} <= {r.case for r in found.wrong}
    assert {"Delta is missing", "causal=bottom_right"} <= set(found.diagnosis)
    assert "dq, dk: matches Delta is missing to " in page
    assert any(e.text.startswith("dq, dk: matches Delta is missing to ") for r in found.results for e in r.explanations)
    (declared,) = re.findall(r"--convention (causal=\S+)", page)
    assert "ds = p * dp *" in block
    exec(block.replace("ds = p * dp *", "ds = p * (dp - (p * dp).sum(-1, keepdims=True)) *"), scope)
    assert verify(scope["attention"], scope["backward"], cases=cases, convention=declared).passed
    assert not verify(scope["attention"], scope["backward"], cases=cases).passed


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_links_to_the_forward_and_the_backward():
    lines = (ROOT / "npattn/ops/attention.py").read_text().splitlines()
    links = re.findall(r"\[(forward|backward)\]\(npattn/ops/attention\.py#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) == 2
    for name, line in links:
        assert lines[int(line) - 1].startswith(f"def attention_{name}(")


@pytest.mark.parametrize("page", ["README.md", "docs/verifying.md"])
def test_number_of_cases(page):
    assert {int(n) for n in re.findall(r"\b(\d+) cases\b", (ROOT / page).read_text())} - {150} == {len(CASES)}  # 150: --deep


def test_the_page_about_peers_is_of_these_cases():
    """`npattn peers --write docs/peers.md` writes it again."""
    found = {int(n) for n in re.findall(r"rejected in \d+ of (\d+) cases", (ROOT / "docs/peers.md").read_text())}
    assert len(CASES) in found <= {len(cases) for cases in report.CASES_OF.values()}
