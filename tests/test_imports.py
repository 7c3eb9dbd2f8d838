"""Imports point one way: each module imports only what stands before it."""

from __future__ import annotations

import ast
from pathlib import Path

import npattn

PACKAGE = Path(npattn.__file__).parent
ORDER = [
    "ops.checks",
    "ops.edge",
    "ops.rows",
    "ops.allowed",
    "ops.heads",
    "ops.pairs",
    "ops.threads",
    "ops.tokens",
    "ops.bound_masks",
    "ops.masks",
    "ops.biases",
    "ops.dropout",
    "ops.calls",
    "ops.positions",
    "ops.softmax",
    "ops.cross_entropy",
    "ops.merge",
    "ops.attention",
    "ops.exponentials",
    "ops.products",
    "ops.tiles",
    "ops.blockwise",
    "ops.norms",
    "ops.linear",
    "ops.embedding",
    "ops.multihead",
    "ops.error_function",
    "ops.activations",
    "ops.feed_forward",
    "ops.recurrent",
    "ops.rnn",
    "ops.gru",
    "ops.lstm",
    "ops",
    "convert",
    "models.trees",
    "models.config",
    "models.blocks",
    "models.transformer",
    "models.copying",
    "models.language",
    "models.recurrent",
    "models.encoders",
    "models.layouts",
    "models.model",
    "models.files",
    "models.tokens",
    "models.folder",
    "models.generation",
    "models.look",
    "models.torch_layout",
    "models",
    "tolerances",
    "gradients",
    "environment",
    "peers",
    "peers.findings",
    "peers.pytorch",
    "peers.hugging_face",
    "peers.jax_nn",
    "peers.onnx_reference",
    "peers.onnx_runtime",
    "peers.scipy_special",
    "peers.probes",
    "verify.precision",
    "verify.rounding",
    "verify.rounded",
    "verify.conventions",
    "verify.op",
    "verify.space",
    "verify.limits",
    "verify.ops.attention.errors",
    "verify.stages",
    "verify.search",
    "verify.ops.attention.equations",
    "verify.ops.attention.changes",
    "verify.ops.attention.forward_changes",
    "verify.ops.attention.backward_changes",
    "verify.ops.attention.draw",
    "verify.ops.attention.cases",
    "verify.ops.attention.space",
    "verify.ops.attention.calls",
    "verify.ops.attention.truth",
    "verify.ops.attention.relatives",
    "verify.ops.attention.hypotheses",
    "verify.ops.attention",
    "verify.ops.layers",
    "verify.ops.rotary",
    "verify.ops.multi_head_parts",
    "verify.ops.multi_head_space",
    "verify.ops.multi_head",
    "verify.ops.recurrent",
    "verify.ops.rnn",
    "verify.ops.gru",
    "verify.ops.lstm",
    "verify.ops.softmax",
    "verify.ops.cross_entropy",
    "verify.ops.silu",
    "verify.ops.norms",
    "verify.ops.gelu",
    "verify.ops.relu",
    "verify.ops.linear",
    "verify.ops.embedding",
    "verify.ops.feed_forward",
    "verify.ops.dropout",
    "verify.ops.composed",
    "verify.ops.blocks",
    "verify.ops",
    "verify.candidate",
    "verify.explain",
    "verify.power",
    "verify.rules",
    "verify.judge",
    "verify.conditions",
    "verify.request",
    "verify.text",
    "verify.report",
    "verify.api",
    "verify.replay",
    "verify.worker",
    "verify.runs",
    "verify.selftest",
    "verify",
    "verify.peer_page",
    "training.optimizers",
    "training.processes",
    "training.checkpoints",
    "training.loop",
    "training.initial",
    "training.lora",
    "training.texts",
    "training.ngram",
    "training.lm",
    "training.measures",
    "training.sentiment",
    "training.question_answering",
    "training.text_to_text",
    "training.translation",
    "training.summarization",
    "training",
    "applications",
    "arguments",
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
    """The modules of npattn that are imported anywhere in a file, at its top or inside a function, but for types."""
    types = [inner for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
             for inner in node.body]  # fmt: skip
    for node in ast.walk(tree):
        if node in types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("npattn."):
            package = node.module.removeprefix("npattn.")
            for alias in node.names:  # a module of a package, or a name in a module
                inner = f"{package}.{alias.name}"
                yield inner if inner in ORDER else package


def test_a_module_imported_from_its_package_is_seen():
    text = "from npattn.verify import judge, verify\ndef f():\n    from npattn.ops.masks import causal\n"
    tree = ast.parse(f"{text}if TYPE_CHECKING:\n    from npattn.verify.text import lines\n")
    assert list(imported(tree)) == ["verify.judge", "verify", "ops.masks"]


def test_all_names_exist_and_are_documented():
    for name in npattn.__all__:
        thing = getattr(npattn, name)
        assert thing.__doc__, name
        assert not thing.__doc__.startswith(f"{name}("), f"{name} has the docstring that NamedTuple makes"
        if f"{name}_forward" in npattn.__all__ and name != "blockwise":  # `help` shows shapes, examples stay in x_forward
            assert "(..." in thing.__doc__ or "(B, " in thing.__doc__, name
            assert ">>>" not in thing.__doc__, name


def test_attention_reads_as_one_page():
    """The plain case first, in fifteen lines; then all equations, in order forwards and in reverse order backwards."""
    text = (PACKAGE / "ops" / "attention.py").read_text()
    assert len(text.splitlines()) <= 200
    functions = {f.name: f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)}
    assert list(functions)[:4] == ["plain_forward", "plain_backward", "forward", "backward"]
    plain = 0
    for name, function in list(functions.items())[:4]:
        lines = text.splitlines()[function.body[1].lineno - 1 : function.end_lineno]
        plain += len(lines) if name.startswith("plain") else 0
        assert len([line for line in lines if line.strip()]) <= 60
        numbers = [int(part[0]) for line in lines for part in line.split("# (")[1:]]
        assert numbers == sorted(numbers, reverse=name.endswith("backward"))
        assert set(numbers) == ({1, 5, 7} if name.startswith("plain") else set(range(1, 8)))
    assert plain <= 15
