"""No false alarm: over thousands of tensors with fresh seeds, what is rejected at level good is a true defect of its library.

Each rejection has to be in DEFECTS, by a fact of the problem and not by the name of a case; where a convention describes what
the library does instead, the same call holds under it. What each defect looks like in plain calls of the library is in
docs/peers.md.
``NPATTN_SEED=N pytest -m slow tests/peers/test_verify_peers.py`` looks at other inputs.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

for library in ("torch", "jax", "onnx", "onnxruntime", "transformers"):
    pytest.importorskip(library, reason="needs the peers extra: pip install npattn[peers]")

from npattn import cli
from npattn.peers import PEERS
from npattn.verify import CASES_OF, Check, Settings, examine, load
from npattn.verify.conventions import parse
from npattn.verify.ops.attention.cases import Case
from npattn.verify.ops.attention.draw import FAMILIES, LONG, MEDIUM, OPTIONS, compatible, dense_mask, parts_of

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
    """Random options that the peer has keywords for, on inputs of each family in turn; a quarter of them in float64."""
    takes = load(name).takes(load(name).forward)
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
        longest = found % 9 == 8
        sizes, lead = LONGEST[found // 9 % 3] if longest else SIZES[int(rng.choice(4, p=[0.5, 0.2, 0.2, 0.1]))]
        if longest:  # other options would make arrays of all pairs for each head
            options = [o for o in options if o in ("causal top_left", "causal bottom_right", "key_lengths", "sink", "softcap")]
        family, dtype = families[found % len(families)], "float64" if rng.random() < 0.25 else "float32"
        case = Case(f"{' + '.join(options) or 'plain'}, {family}, {dtype}, {sizes}", tuple(options), family, sizes, lead, dtype)
        try:
            case.problem(seed)
        except ValueError:  # masks that leave no choice
            continue
        found += 1
        yield case


# --- what is rejected, and why --------------------------------------------------------------------------------------------


class Defect(NamedTuple):
    peers: tuple[str, ...]
    reason: str
    applies: Callable[[Any, Check], bool]  # to this problem and tensor
    convention: str = ""  # under which the same call holds


def scale(p):
    return p.options.get("scale", p.q.shape[-1] ** -0.5)


def has_dead_rows(p):
    """Some query may see no key: by its mask, or by scores of -inf."""
    if p.op == "attention":
        return bool(parts_of(p)) and not dense_mask(p).any(-1).all()
    seen = np.asarray(p.options.get("mask", True))
    return not (seen & (p.inputs["scores"] != -np.inf) if p.op == "softmax" else seen).any(-1).all()


def is_nan(p, c):
    return not np.isfinite(c.worst)


def masked_nan(p, c):
    return not all(np.isfinite(x).all() for x in (*p.inputs.values(), *p.cotangents.values()) if isinstance(x, np.ndarray))


def rounded_root(p):
    """Whether the root of the scale, a float32 attribute, is off in float64."""
    root = np.sqrt(scale(p))
    return np.float32(root) != root


DEFECTS = {
    "torch's flash: a negative scale with is_causal": Defect(
        ("torch", "torch-flash"), "masked scores are -inf before the scale, which makes them +inf: NaN",
        lambda p, c: scale(p) < 0 and any(part.keyword == "causal" for part in parts_of(p)) and is_nan(p, c)),
    "float64 in float32": Defect(
        ("jax", "transformers-eager"), "the softmax of float64 inputs is computed in float32",
        lambda p, c: p.dtype == np.float64 and not has_dead_rows(p), "float64=float32"),
    "jax: dead rows": Defect(
        ("jax",), "masks are a large finite number: a query without keys gets the mean of all values, and hands dout to them",
        lambda p, c: has_dead_rows(p) and (p.dtype == np.float64 or c.tensor in ("out", "lse", "dv"))),
    "transformers: dead rows": Defect(
        ("transformers-eager",), "the same, and as the number is added, its gradient also reaches q, k and a bias",
        lambda p, c: has_dead_rows(p)),
    "onnx: a negative scale": Defect(
        ("onnx",), "its root multiplies q and k: NaN", lambda p, c: scale(p) < 0 and is_nan(p, c)),
    "onnxruntime: float64 and a negative scale": Defect(
        ("onnxruntime",), "float64 has no kernel: the operator is expanded, and q and k get the root of the scale",
        lambda p, c: p.dtype == np.float64 and scale(p) < 0 and is_nan(p, c)),
    "onnxruntime: float64 and its scale": Defect(
        ("onnxruntime",), "and this root is computed in float32",
        lambda p, c: p.dtype == np.float64 and scale(p) > 0 and rounded_root(p)),
    "gpt-oss: the gradient of the maximum": Defect(
        ("transformers-sink",), "the maximum is not detached: its gradient, 0 but for rounding, goes to the top key",
        lambda p, c: c.tensor[0] == "d" and c.level == "bounded"),
    "torch: NaN that is masked": Defect(
        ("torch-mha", "torch-mha-weights"), "0 * NaN in a plain product with the values", masked_nan),
    "torch: cross-entropy where nothing counts": Defect(
        ("torch-cross-entropy",), "the mean is 0 / 0",
        lambda p, c: not np.any(p.options.get("mask", p.inputs["targets"].size > 0)) and is_nan(p, c)),
    "torch: NaN in logits that do not count": Defect(
        ("torch-cross-entropy",), "the gradient is p times a sum that is 0, and p is NaN",
        lambda p, c: masked_nan(p, c) and c.tensor == "dlogits"),
    "NaN in a token whose gradient is 0": Defect(
        ("torch-linear", "torch-tied-head", "transformers-mlp"), "0 * NaN in a plain product of all tokens", masked_nan),
    "torch: dead rows with weights": Defect(
        ("torch-mha-weights",), "a softmax of a row of -inf is NaN", lambda p, c: has_dead_rows(p) and is_nan(p, c)),
    "softmax: rows of -inf": Defect(
        ("scipy-softmax", "torch-softmax", "jax-softmax"), "-inf - (-inf) is NaN; jax's `where` gives 0 where it masks alone",
        lambda p, c: has_dead_rows(p) and is_nan(p, c)),
    "onnx: lengths": Defect(
        ("onnx-rnn", "onnx-gru", "onnx-lstm"), "its reference does not read sequence_lens",
        lambda p, c: "lengths" in p.options),
    "onnxruntime: tanh": Defect(
        ("onnxruntime-rnn", "onnxruntime-gru"), "the tanh of its RNN and GRU is good to 1e-7, not to 1e-7 of its value",
        lambda p, c: "nonlinearity" not in p.options and c.worst < 1e3),
    "activations at inf": Defect(
        ("torch-silu", "jax-silu", "torch-gelu", "jax-gelu", "onnx-gelu", "onnxruntime-gelu", "transformers-gelu"),
        "inf times 0 is NaN", lambda p, c: np.isinf(p.inputs["x"]).any() and is_nan(p, c)),
    "onnx: Gelu of float64": Defect(
        ("onnx-gelu", "onnxruntime-gelu"), "the constants of its expansion are float32", lambda p, c: p.dtype == np.float64),
    "onnxruntime: the last state of an empty sequence": Defect(
        ("onnxruntime-rnn", "onnxruntime-gru", "onnxruntime-lstm"), "Y_h is 0 and not initial_h, Y_c likewise",
        lambda p, c: c.tensor in ("h_last", "c_last") and 0 in p.options.get("lengths", ())),
}  # fmt: skip


def explain(name, candidate, case, seed, problem, check):
    """The defects that a rejection is an instance of."""
    for title, d in DEFECTS.items():
        if name in d.peers and d.applies(problem, check):
            if not d.convention:
                yield title
                continue
            other = dataclasses.replace(candidate, convention=parse(d.convention))
            again = examine(other, case, seed, Settings(power=False))
            if all(c.status != "wrong" for c in again.checks if c.tensor == check.tensor):
                yield title


def rejections(name, cases, seed, tally):
    """(case, tensor, what is said of it, defects) of all that is rejected; counts what is tested."""
    candidate = load(name)
    for case in cases:
        problem = case.problem(seed)
        for check in examine(candidate, case, seed, Settings(power=False)).tested:
            tally[name] += 1
            if check.status == "wrong":
                yield case.name, check.tensor, check.text, list(explain(name, candidate, case, seed, problem, check))


@pytest.mark.slow
def test_no_false_alarm():
    tally, unexplained, seen = Counter(), [], Counter()
    for name in PEERS:
        for seed in (SEED,) if name in ATTENTION else (SEED, SEED + 1):
            cases = chosen_cases(name, seed, 80) if name in ATTENTION else CASES_OF[PEERS[name].op]
            for case, tensor, text, defects in rejections(name, cases, seed, tally):
                seen.update(defects)
                if not defects:
                    unexplained.append(f"{name}: {case}: {tensor}: {text}")
    assert not unexplained, "\n".join(unexplained)
    assert set(tally) == set(PEERS)
    assert sum(tally.values()) >= 2000
    print(f"{sum(tally.values())} tensors, {sum(seen.values())} rejected", *seen.items(), sep="\n")  # with -s


def test_the_command_on_torch(capsys):
    assert cli.main(["verify", "torch", "-k", "causal", "--require", "causal"]) == 0
    assert cli.main(["verify", "torch", "-k", "NaN"]) == 1
    text = capsys.readouterr().out
    assert "it looks like" in text
    assert "is nan, expected" in text
    assert cli.main(["verify", "torch", "--convention", "torch_sdpa", "-k", "mask"]) == 0
