"""Presets that say "run by" are what their libraries do: each library in its own words holds under its preset alone.

The libraries in their own words are OWN_WORDS in npattn/peers. They hand arguments on as they are and return what comes back:
polarity and shape of masks, layout, counting of windows and the base and layout of lse are for the preset to say.
"""

from __future__ import annotations

import re

import pytest

for library in ("torch", "jax", "onnx", "onnxruntime", "transformers"):
    pytest.importorskip(library, reason="needs the peers extra: pip install npattn[peers]")

import torch
from transformers.masking_utils import sliding_window_causal_mask_function

from npattn.peers import PEERS
from npattn.verify import CASES, PRESETS, Candidate, Settings, verify
from npattn.verify.api import examine_all
from npattn.verify.conventions import parse

PEER_OF = {
    "torch_sdpa": "torch",
    "torch_mha": "torch-mha-weights",
    "torch_flex": "torch-flex",
    "jax": "jax",
    "onnx25": "onnx",
    "onnxruntime": "onnxruntime",
    "hf_eager": "transformers-eager",
}


def own_words(preset):
    """The forward and the backward; to those of transformers, the mask that its masking_utils make of a window."""
    forward, backward = PEERS[PEER_OF[preset]].own_words()
    if preset != "hf_eager":
        return forward, backward

    def seen(q, k, mask, window):
        if window is None:
            return mask
        if window[0] is None or window[1] != 0:
            raise NotImplementedError("sliding windows are causal, with a limit")
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        own = sliding_window_causal_mask_function(int(window[0]))(0, 0, i, j).expand(*q.shape[:2], -1, -1).numpy()
        return own if mask is None else mask & own

    def eager(q, k, v, *, mask=None, bias=None, scale=None, softcap=None, window=None):
        return forward(q, k, v, mask=seen(q, k, mask, window), bias=bias, scale=scale, softcap=softcap)

    def eager_backward(dout, q, k, v, *, mask=None, bias=None, scale=None, softcap=None, window=None):
        return backward(dout, q, k, v, mask=seen(q, k, mask, window), bias=bias, scale=scale, softcap=softcap)

    return eager, eager_backward


# --- what holds ----------------------------------------------------------------------------------------------------------

DEFECTS = {  # what no convention describes
    "jax": {
        "bias of -inf": "a softmax of a row of -inf is NaN, where masks are a finite number",
        "S = 0": "lse is -inf where there is no key, and a number where all are masked",
    },
    "onnx25": {"S = 0": "the maximum of an empty row raises"},
    "hf_eager": {"bias of -inf": "a softmax of a row of -inf is NaN, where masks are a finite number"},
}

# Cases of ordinary inputs and small sizes: how exact a library is does not depend on the words that it is spoken to in.
SMALL = [
    c
    for c in CASES
    if c.sizes["S"] * c.sizes["L"] < 5_000 and not {"hard inputs", "head widths", "long", "sink", "dropout"} & set(c.features)
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "jax" else n for n in PEER_OF])  # it compiles
def test_preset(name):
    candidate = Candidate(name, *own_words(name), parse(name))
    status = {case.name: examine_all(candidate, case, 0, Settings(power=False)).status for case in SMALL}
    assert {case for case, s in status.items() if s == "wrong"} == set(DEFECTS.get(name, {}))
    assert sum(s == "ok" for s in status.values()) > 60


# A feature of which cases are wrong where a library is taken to speak npattn's words, and how many at least.
FOREIGN = {
    "torch_sdpa": ("NaN containment", 5),
    "torch_mha": ("mask", 5),
    "torch_flex": ("NaN containment", 3),
    "jax": ("plain", 1),
    "onnx25": ("mask", 1),
    "onnxruntime": ("mask", 2),
    "hf_eager": ("dead rows", 4),
}


@pytest.mark.parametrize("name", PEER_OF)
def test_without_the_preset(name):
    feature, count = FOREIGN[name]
    cases = [c for c in SMALL if feature in c.features]
    assert len(verify(*own_words(name), cases=cases, diagnose=False).wrong) >= count


def test_all_presets_that_were_run():
    assert {name for name, preset in PRESETS.items() if "tests/peers/test_conventions.py" in preset.source} == set(PEER_OF)
    for name, preset in PRESETS.items():
        assert re.match(r"run by [\w/.]+: \w+ \d+\.\d+|run: this package$|read from source, not run: ", preset.source), name
