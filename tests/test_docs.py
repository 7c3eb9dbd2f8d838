"""Every example in README.md, docs/ and the docstrings prints what it says, and every link leads somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from npattn.verify import CASES, CASES_OF, load, verify

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
SOURCES = [path for path in sorted(ROOT.glob("npattn/**/*.py")) if re.search(r"^ *>>> ", path.read_text(), re.M)]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
FEW = ("plain", "causal top_left", "G < H", "E != D")  # of the cases: all of them would take long


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, monkeypatch):
    monkeypatch.setitem(CASES_OF, "attention", [case for case in CASES if case.name in FEW])
    done = doctest.testmod(importlib.import_module(name), extraglobs={"np": np})
    assert done.failed == 0 < done.attempted


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
    monkeypatch.setitem(CASES_OF, "attention", [case for case in CASES if case.name in FEW])
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
    few = [case for case in CASES if case.name in FEW]
    found = verify(scope["attention"], scope["backward"], cases=few)
    assert {"plain", "E != D", "causal top_left"} <= {r.case for r in found.wrong}
    assert {"Delta is missing", "causal=bottom_right"} <= set(found.diagnosis)
    assert "dq, dk: matches Delta is missing to " in page
    assert any(e.text.startswith("dq, dk: matches Delta is missing to ") for r in found.results for e in r.explanations)
    (declared,) = re.findall(r"--convention (causal=\S+)", page)
    assert "ds = p * dp *" in block
    exec(block.replace("ds = p * dp *", "ds = p * (dp - (p * dp).sum(-1, keepdims=True)) *"), scope)
    cases = [*few, *(case for case in CASES if case.name in ("causal top_left + L > S", "NaN behind the mask"))]
    assert verify(scope["attention"], scope["backward"], cases=cases, convention=declared).passed
    assert not verify(scope["attention"], scope["backward"], cases=cases, diagnose=False).passed


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
    assert len(CASES) in found <= {len(cases) for cases in CASES_OF.values()}


@pytest.mark.slow
def test_the_verdict_that_the_readme_shows_is_the_one_that_is_given():
    (block,) = [b for b in re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "$ npattn verify" in b]
    first, *shown = block.splitlines()
    command = first.removeprefix("$ npattn ").split()
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "npattn", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    for line in shown:
        assert line == "..." or line in re.sub(r" \([\d.]+ s\)", "", done.stdout).splitlines(), line
