"""scipy: scipy.special.softmax; a mask is a score of -inf."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import softmax

from npattn.ops.checks import Array
from npattn.peers import Pair
from npattn.peers.findings import Finding


def _softmax(scores: Array, *, mask: Any = None) -> Any:
    with np.errstate(all="ignore"):
        return softmax(scores if mask is None else np.where(mask, scores, scores.dtype.type(-np.inf)), axis=-1)


ADAPTERS: dict[str, Pair] = {"scipy-softmax": (_softmax, None)}

PRELUDE = """
    import numpy as np
    from scipy.special import softmax"""
FINDINGS = [
    Finding("softmax of a row of -inf is NaN", """
        with np.errstate(invalid="ignore"):
            print(softmax(np.array([-np.inf, -np.inf])).tolist())
        """, r"\[nan, nan\]", "edge"),
]  # fmt: skip
