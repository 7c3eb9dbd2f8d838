"""The adapters of the benchmarks: what they time of other libraries is right."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import harness, multihead, rivals, rnn, roofline
from benchmarks.cases import Case, draw
from benchmarks.harness import TINY

MASKS = ("full", "causal", "window", "lengths", "packed")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody waits until others are at rest, nor for a rate to be known well."""
    monkeypatch.setattr(harness, "WINDOW", 1e-4)
    monkeypatch.setattr(roofline, "TRIAL", 1e-4)
    monkeypatch.setattr(roofline, "SHAPES", roofline.SHAPES[:3])


@pytest.fixture
def _backends():
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_math_sdp(True)


@pytest.mark.usefixtures("_backends")
@pytest.mark.parametrize(("library", "names"), [("torch", rivals.TORCH), ("jax", ("jax",)), ("onnxruntime", ("onnxruntime",))])
def test_adapters_of_attention_are_right(library, names):
    pytest.importorskip(library, reason="needs the peers extra: pip install npattn[peers]")
    backward = library != "onnxruntime"
    masks = MASKS[2:] if library == "jax" else MASKS  # it compiles each
    cases = [Case(72, 8, 2 if m == "lengths" else 1, 2, mask=m, width=5, backward=backward) for m in masks]
    cases += [Case(16, 8, 2, 4, 2, mask="causal", backward=backward), Case(2, 8, 1, 4, 2, S=24)]
    if library == "torch":  # in float64 the others take exp in float32, and are reported as wrong
        cases.append(Case(16, 8, mask="causal", dtype="float64", backward=True))
    for case in cases:
        found, left_out = rivals.attention(case, draw(case), names)
        assert [r.name for r in found] == list(names), left_out
        for r in found:
            error, wrong, _ = harness.examine(r, {"float32": 1e-5, "float64": 1e-13}[case.dtype])
            assert wrong == "", (case.name, r.name, error)
    if not backward:
        _, left_out = rivals.attention(replace(cases[0], backward=True), draw(cases[0]), names)
        assert left_out == {"onnxruntime": "cannot: onnxruntime has no backward of Attention"}


@pytest.mark.usefixtures("_backends")
def test_adapters_of_layers_are_right():
    pytest.importorskip("torch", reason="needs the peers extra: pip install npattn[peers]")
    for layer in multihead.grid("tiny"):
        row = multihead.measure(layer, TINY)
        assert {"blockwise", "dense", "torch"} <= set(row["seconds"]), row["left_out"]
    for shape in rnn.grid("tiny"):
        row = rnn.measure(shape, TINY)
        assert {"npattn", "torch.nn.RNN"} <= set(row["seconds"]), row["left_out"]
        assert not any(why.startswith("WRONG") for why in row["left_out"].values())
