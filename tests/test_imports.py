"""Imports point one way: each module imports only what stands before it."""

from __future__ import annotations

import ast
from pathlib import Path

import npattn

PACKAGE = Path(npattn.__file__).parent
ORDER = [
    "ops.checks",
    "ops.edge",
    "ops.allowed",
    "ops.heads",
    "ops.pairs",
    "ops.threads",
    "ops.masks",
    "ops.biases",
    "ops.softmax",
    "ops.attention",
    "ops.tiles",
    "ops.blockwise",
    "ops.multihead",
    "ops.rnn",
    "ops",
    "convert",
    "tolerances",
    "gradients",
    "environment",
    "verify.precision",
    "verify.errors",
    "verify.stages",
    "verify.mistakes",
    "verify.conventions",
    "verify.rounded",
    "verify.peers",
    "verify.cases",
    "verify.layer_stages",
    "verify.layers",
    "verify.layer_mistakes",
    "verify.candidates",
    "verify.diagnose",
    "verify.power",
    "verify.judge",
    "verify.conditions",
    "verify.report",
    "verify.replay",
    "verify.worker",
    "verify.mutant_attention",
    "verify.mutant_layers",
    "verify.mutants",
    "verify.selftest",
    "verify.peer_report",
    "verify",
    "cli",
    "__main__",
]


def test_imports_point_one_way():
    found = {".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for p in PACKAGE.rglob("*.py")}
    assert found - {"__init__"} == set(ORDER)
    for name in ORDER:
        path = PACKAGE.joinpath(*name.split("."))
        tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        for module in imported(tree):
            assert ORDER.index(module) < ORDER.index(name), f"{name} imports {module}"


def imported(tree):
    """The modules of npattn that are imported anywhere in a file, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("npattn."):
            package = node.module.removeprefix("npattn.")
            for alias in node.names:  # a module of a package, or a name in a module
                inner = f"{package}.{alias.name}"
                yield inner if inner in ORDER else package


def test_a_module_imported_from_its_package_is_seen():
    tree = ast.parse("from npattn.verify import layers, verify\ndef f():\n    from npattn.ops.masks import causal\n")
    assert list(imported(tree)) == ["verify.layers", "verify", "ops.masks"]


def test_all_names_exist_and_are_documented():
    for name in npattn.__all__:
        thing = getattr(npattn, name)
        assert thing.__doc__, name
        assert not thing.__doc__.startswith(f"{name}("), f"{name} has the docstring that NamedTuple makes"


def test_attention_reads_as_one_page():
    text = (PACKAGE / "ops" / "attention.py").read_text()
    assert len(text.splitlines()) <= 200
    for function in ast.parse(text).body:
        if isinstance(function, ast.FunctionDef) and function.name in ("attention_forward", "attention_backward"):
            lines = text.splitlines()[function.body[1].lineno - 1 : function.end_lineno]
            assert len([line for line in lines if line.strip()]) <= 60
            numbers = [int(part[0]) for line in lines for part in line.split("# (")[1:]]
            forward = function.name == "attention_forward"
            assert numbers == sorted(numbers, reverse=not forward)
            assert set(numbers) == set(range(1, 8))
