"""How English words are spoken: from letters to phonemes, with the weights that the package g2p_en ships.

    python examples/phonemes.py transformer language

Two gated recurrent units are an encoder-decoder. The encoder reads the letters of a word. Its last state is the first state of
the decoder, which is a recurrent language model: it chooses phoneme after phoneme. Sutskever et al. 2014. For words that are in
no dictionary g2p_en does the same. Its weights are read without importing it, because that needs data that it does not ship.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from npattn import GRUParams, embedding, gru_forward
from npattn.convert import gru_from_torch
from npattn.models.recurrent import RecurrentConfig, RecurrentParams, RecurrentPast, recurrent_model_decode
from npattn.models.transformer import EmbedParams, HeadParams

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOWELS = ["AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"]
CONSONANTS = [*"BDFGKLMNPRSTVWYZ", "CH", "DH", "HH", "JH", "NG", "SH", "TH", "ZH"]
SOUNDS = ["UW", *CONSONANTS, *(vowel + stress for vowel in VOWELS for stress in "012")]
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>", *sorted(SOUNDS)]
START, END, LONGEST = PHONEMES.index("<s>"), PHONEMES.index("</s>"), 20


class Model(NamedTuple):
    """The parameters, float32."""

    letters: np.ndarray  # (29, M)
    encoder: GRUParams
    decoder: RecurrentParams  # V = 74 phonemes


def weights() -> Path:
    """The file of g2p_en."""
    package = importlib.util.find_spec("g2p_en")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("g2p_en holds the weights: pip install 'npattn[peers]'")
    return Path(package.origin).parent / "checkpoint20.npz"


def load(path: Path) -> Model:
    with np.load(path) as file:
        kept = dict(file)

    def gru(side: str) -> GRUParams:  # enc_w_ih is torch's weight_ih_l0
        names = itertools.product(("weight", "bias"), ("ih", "hh"))
        return gru_from_torch({f"{kind}_{part}_l0": kept[f"{side}_{kind[0]}_{part}"] for kind, part in names})

    head = HeadParams(kept["fc_w"].T, kept["fc_b"])
    return Model(kept["enc_emb"], gru("enc"), RecurrentParams(EmbedParams(kept["dec_emb"]), (gru("dec"),), head))


def phonemes(words: list[str], model: Model) -> list[list[str]]:
    """The phonemes of each word, chosen one by one. What is no letter is read as <unk>."""
    numbers = {letter: n for n, letter in enumerate(LETTERS)}
    rows = [[*(numbers.get(letter, LETTERS.index("<unk>")) for letter in word.lower()), numbers["</s>"]] for word in words]
    ids = np.array(list(itertools.zip_longest(*rows, fillvalue=numbers["<pad>"]))).T
    _, cache = gru_forward(embedding(ids, model.letters), None, model.encoder, lengths=list(map(len, rows)))
    past, token, chosen = RecurrentPast(((cache.h_last,),), 0), np.full((len(words), 1), START), []
    for _ in range(LONGEST):
        logits, past = recurrent_model_decode(token, model.decoder, RecurrentConfig(), past)
        token = logits.argmax(-1)
        chosen.append(token)
    return [[PHONEMES[n] for n in itertools.takewhile(lambda n: n != END, row)] for row in np.concatenate(chosen, 1)]


if __name__ == "__main__":
    given = sys.argv[1:] or ["transformer", "language"]
    for word, spoken in zip(given, phonemes(given, load(weights())), strict=True):
        print(f"{word:20} {' '.join(spoken)}")
