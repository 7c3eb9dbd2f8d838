"""The record of attention."""

from __future__ import annotations

import dataclasses
from typing import Any

from npattn.ops.blockwise import blockwise_backward, blockwise_forward
from npattn.ops.checks import Array
from npattn.verify.op import Op, Pair, Problem, Values, negated

# isort: split
# An import registers the changes of that module. They are tried in the order in which they are registered.
from npattn.verify.ops.attention import forward_changes

# isort: split
from npattn.verify.ops.attention import backward_changes

# isort: split
from npattn.verify.ops.attention.calls import CALLS, canonical
from npattn.verify.ops.attention.cases import CASES, random_cases
from npattn.verify.ops.attention.changes import CHANGES
from npattn.verify.ops.attention.draw import arguments, options_as_arrays
from npattn.verify.ops.attention.equations import backward, facts, forward
from npattn.verify.ops.attention.hypotheses import HYPOTHESES, of_earlier_calls
from npattn.verify.ops.attention.relatives import AttentionRelatives
from npattn.verify.ops.attention.space import SPACE
from npattn.verify.ops.attention.truth import eager, overflow, reference, truth


def _blockwise() -> Pair:
    def forward(q: Array, k: Array, v: Array, **options: Any) -> Any:
        return blockwise_forward(q, k, v, **options, return_lse=True)[0]

    def backward(dout: Array, q: Array, k: Array, v: Array, *, dlse: Any = None, **options: Any) -> Values:
        g = blockwise_backward(dout, blockwise_forward(q, k, v, **options)[1], dlse)
        return {"dq": g.q, "dk": g.k, "dv": g.v, "dbias": g.bias, "dsink": g.sink}

    return forward, backward


def _shape(problem: Problem) -> tuple[int, ...]:
    """(..., H, L, S)"""
    return (*problem.q.shape[:-1], problem.k.shape[-2])


ATTENTION = Op(
    name="attention",
    outputs=("out", "lse"),
    axes={"out": "BHLE", "lse": "BHL", "dq": "BHLD", "dk": "BGSD", "dv": "BGSE", "dbias": "BHLS", "dsink": "H"},
    reference=reference,
    forward=forward,
    backward=backward,
    truth=truth,
    changes=CHANGES,
    cases=CASES,
    candidates={"blockwise": _blockwise},
    calls=CALLS,
    differentiable=("bias", "sink"),
    optional=("dbias", "dsink"),
    in_computing_dtype=("lse",),
    output_only_stages=frozenset({"lse"}),
    shape=_shape,
    arguments=arguments,
    as_arrays=options_as_arrays,
    facts=facts,
    undefined=overflow,
    canonical=canonical,
    eager=eager,
    bounded=True,
    rank=4,
    relatives=AttentionRelatives(),
    conditioned=("plain", "causal top_left", "mask array", "key_lengths", "G < H", "bias BHLS", "sink", "dead rows", "dlse"),
    hypotheses=HYPOTHESES,
    more_changes=of_earlier_calls,
    another_call=lambda p: dataclasses.replace(negated(p), options={}),
    evidence=("plain", "whole tiles, D = 64"),
    basics=("plain", "bias BHLS", "softcap", "mask array", "sink", "dlse", "dropout_mask", "G < H", "causal top_left",
            "key_lengths"),
    random_cases=random_cases,
    space=SPACE,
)  # fmt: skip

__all__ = ["ATTENTION", "backward_changes", "forward_changes"]
