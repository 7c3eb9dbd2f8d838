"""examples/phonemes.py with the weights of g2p_en, against the equations written in a loop over letters and phonemes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

WORDS = ["npattn", "transformer", "language", "softmax", "attention", "a", "gradients", "zyzzyva", "don't", "naïve", "Encoder",
         "recurrent", "yacht", "though"]  # fmt: skip
# What G2p.predict of g2p_en 2.1.0 gives.
KNOWN = {
    "npattn": "P AE1 N T AH0 N T",
    "transformer": "T R AE0 N S F AO1 R M ER0",
    "language": "L AE1 NG G Y UW0 IH0 JH",
    "softmax": "S AO1 F T M AE2 K S",
}


@pytest.fixture(scope="module")
def example():
    if importlib.util.find_spec("g2p_en") is None:
        pytest.skip("needs g2p_en of the peers extra: pip install npattn[peers]")
    path = Path(__file__).parents[2] / "examples" / "phonemes.py"
    spec = importlib.util.spec_from_file_location("phonemes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spoken(word, w, example):
    """One word, in float64: h' = (1 - z) n + z h with r, z, n in this order of rows."""
    def step(h, x, side):
        a = w[f"{side}_w_ih"] @ x + w[f"{side}_b_ih"]
        m = w[f"{side}_w_hh"] @ h + w[f"{side}_b_hh"]
        N = len(h)
        r, z = (1 / (1 + np.exp(-(a + m)[part])) for part in (slice(N), slice(N, 2 * N)))
        return (1 - z) * np.tanh(a[2 * N :] + r * m[2 * N :]) + z * h

    h = np.zeros(w["enc_w_hh"].shape[1])
    for letter in [*word.lower(), "</s>"]:
        n = example.LETTERS.index(letter) if letter in example.LETTERS else 1
        h = step(h, w["enc_emb"][n], "enc")
    found = ["<s>"]
    while len(found) <= 20:
        h = step(h, w["dec_emb"][example.PHONEMES.index(found[-1])], "dec")
        found.append(example.PHONEMES[np.argmax(w["fc_w"] @ h + w["fc_b"])])
        if found[-1] == "</s>":
            return found[1:-1]
    return found[1:]


def test_words_of_unequal_length_in_one_batch_are_spoken_as_alone(example):
    with np.load(example.weights()) as file:
        w = {name: x.astype(np.float64) for name, x in file.items()}
    assert [len(example.LETTERS), len(example.PHONEMES)] == [len(w["enc_emb"]), len(w["dec_emb"])]
    found = dict(zip(WORDS, example.phonemes(WORDS, example.load(example.weights())), strict=True))
    assert found == {word: spoken(word, w, example) for word in WORDS}
    assert {word: " ".join(found[word]) for word in KNOWN} == KNOWN
    assert "g2p_en" not in sys.modules
