"""No false alarm: over thousands of tensors with fresh seeds, whatever is rejected at level good is a true defect of its library.

Each rejection has to be in DEFECTS, by a fact of the problem and not by the name of a case; and each row of the table has to be
seen. ``NPATTN_SEED=N pytest -m slow tests/peers/test_verify_peers.py`` looks at other inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

for library in ("torch", "jax", "onnx", "onnxruntime", "transformers"):
    pytest.importorskip(library, reason="needs the peers extra: pip install npattn[peers]")

from npattn.verify import load
from npattn.verify.candidates import keywords
from npattn.verify.cases import FAMILIES, LONG, MEDIUM, OPTIONS, Case, compatible
from npattn.verify.peers import PEERS

SEED = int(os.environ.get("NPATTN_SEED", "20260"))
ATTENTION = [name for name, peer in PEERS.items() if peer.op == "attention"]
LAYERS = [name for name, peer in PEERS.items() if peer.op != "attention"]

SIZES: list[tuple[dict[str, int], tuple[int, ...]]] = [
    (MEDIUM, (2,)),
    ({**MEDIUM, "H": 4, "G": 4, "L": 64, "S": 64, "D": 64, "E": 64}, (2,)),
    ({**MEDIUM, "H": 2, "G": 2, "L": 1, "S": 200, "D": 32, "E": 32}, (3,)),
    (LONG, (1,)),
]
LONGEST: list[tuple[dict[str, int], tuple[int, ...]]] = [
    ({"H": 1, "G": 1, "L": 8, "S": 16384, "D": 32, "E": 32}, (1,)),
    ({"H": 1, "G": 1, "L": 16384, "S": 8, "D": 32, "E": 32}, (1,)),
    ({"H": 1, "G": 1, "L": 1024, "S": 2048, "D": 64, "E": 64}, (1,)),
]


def chosen_cases(name: str, seed: int, count: int) -> Iterator[Case]:
    """Random options that the peer has keywords for, on inputs of each family in turn; every fourth in float64."""
    takes = keywords(load(name).forward)
    features = {"scale": "scale", "softcap": "softcap", "sink": "sink", "dropout_mask": "dropout", "bias": "bias"}
    without = {feature for keyword, feature in features.items() if keyword not in takes} | {"rank", "dropout", "dlse"}
    usable = [o for o, option in OPTIONS.items() if option.feature not in without]
    rng = np.random.default_rng([seed, *name.encode()])
    families, found = list(FAMILIES), 0
    while found < count:
        options = ["sink"] if name == "transformers-sink" else []
        for option in rng.permutation(usable)[: rng.integers(0, 5)]:
            if option not in options and all(compatible(str(option), other) for other in options):
                options.append(str(option))
        longest = found % 20 == 19
        sizes, lead = LONGEST[found // 20 % 3] if longest else SIZES[int(rng.choice(4, p=[0.5, 0.2, 0.2, 0.1]))]
        if longest:  # other options would make arrays of all pairs for each head
            options = [o for o in options if o in ("causal top_left", "causal bottom_right", "key_lengths", "sink", "softcap")]
        family, dtype = families[found % len(families)], "float64" if found % 4 == 3 else "float32"
        case = Case(f"{' + '.join(options) or 'plain'}, {family}, {dtype}, {sizes}", tuple(options), family, sizes, lead, dtype)
        try:
            case.problem(seed)
        except ValueError:  # masks that leave no choice
            continue
        found += 1
        yield case
