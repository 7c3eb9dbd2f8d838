"""Verify verified: every seeded bug has to be caught, and most of them named, by the very functions that judge a candidate.

The bugs are those of `npattn.verify.mutants` and `npattn.verify.mutant_layers`: two implementations of attention and two layers
with one bad line at a time, and roundings that are too coarse. What nobody can catch is listed there with its reason.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from npattn.verify import layers, mutant_attention, mutants
from npattn.verify.candidates import Candidate
from npattn.verify.cases import BY_NAME
from npattn.verify.conditions import examine_conditions
from npattn.verify.diagnose import Diagnostician, Listener
from npattn.verify.judge import Result, Settings, examine
from npattn.verify.mutant_layers import MULTI_HEAD_MUTANTS, RNN_MUTANTS, LayerMutant, layer_candidate

CLASSES = {
    "1": "causal and window alignment", "2": "mask meaning and order", "3": "broadcast, strides, layout, dtype",
    "4": "blocks and tails", "5": "softmax numerics and scale", "6": "dead rows, empty input, NaN", "7": "backward pass",
    "8": "multi-head layer", "9": "state, in-place, threads", "10": "recurrent layer",
    "12": "rounded too early, or a little wrong", "own": "more, mostly backwards",
}  # fmt: skip
BASICS = (
    "plain", "bias BHLS", "softcap", "mask array", "sink", "dlse", "dropout_mask", "G < H", "causal top_left", "key_lengths",
)  # fmt: skip
SETTINGS = Settings(power=False)


@dataclass(frozen=True)
class Caught:
    """What became of one seeded bug."""

    kind: str
    name: str
    text: str  # what it is
    by: str = ""  # the case and tensor that caught it
    said: tuple[str, ...] = ()  # what the diagnosis says
    named: bool = False


def self_test() -> Iterator[Caught]:
    """All seeded bugs, one after the other."""
    for name, mutant in mutants.MUTANTS.items():
        yield _attention(mutant, mutants.make(name), [BY_NAME[n] for n in mutant.cases])
    for name in mutants.REPEATS:
        yield _repeat(name)
    for op, table in (("multi_head", MULTI_HEAD_MUTANTS), ("rnn", RNN_MUTANTS)):
        for name, row in table.items():
            yield _layer(op, name, row)


def _caught(bug: Caught, result: Result, is_named: Callable[[tuple[str, ...], list[str]], bool]) -> Caught | None:
    wrong = [c for c in result.checks if c.status == "wrong"]
    if not wrong:
        return None
    shown = tuple(dict.fromkeys(n for e in result.explanations for n in (*e.names, *e.others[:3])))
    named = is_named(shown, [c.text for c in wrong])
    said = tuple(dict.fromkeys(" and ".join(e.names) for e in result.explanations)) or (wrong[0].text,)
    return replace(bug, by=f"{result.case}: {wrong[0].tensor}", said=said, named=named)


def _attention(mutant: Any, tested: Candidate, cases: list[Any]) -> Caught:
    """On its own cases, after a few on which most bugs do not show."""
    bug, diagnostician = Caught(mutant.kind, mutant.name, mutant.text), Diagnostician(tested.align, pairs=0)
    silent = Listener(diagnostician)
    for name in BASICS:
        if BY_NAME[name] not in cases:
            examine(tested, BY_NAME[name], 0, SETTINGS, silent)
    for case in cases:
        found = _caught(bug, examine(tested, case, 0, SETTINGS, diagnostician), mutant.is_named)
        if found:
            return found
    return bug


def _repeat(name: str) -> Caught:
    """What is right as long as it is called once: the exact conditions catch it."""
    tested = mutant_attention.candidate(**({"forward": name} if name.startswith("out") else {"backward": name}))
    for check in examine_conditions(tested, BY_NAME["plain"], 0, SETTINGS):
        if check.status == "wrong":
            return Caught("9", name, mutants.REPEATS[name], f"plain: {check.tensor}", (check.text,), True)
    return Caught("9", name, mutants.REPEATS[name])


def _layer(op: str, name: str, row: LayerMutant) -> Caught:
    bug, tested = Caught(row.kind, name, row.text), layer_candidate(op, **{row.where: name})
    for case in layers.CASES[op]:
        if case.name not in _honest(op):
            continue
        found = _caught(bug, examine(tested, case, 0, SETTINGS, Diagnostician()), lambda said, texts: name in said)
        if found:
            return found
    return bug


@functools.cache
def _honest(op: str) -> frozenset[str]:
    """The cases in which the layer without a bug holds: it knows nothing of NaN, for one."""
    tested = layer_candidate(op)
    cases = [c for c in layers.CASES[op] if c.dtype == "float32"]
    return frozenset(c.name for c in cases if examine(tested, c, 0, SETTINGS).status == "ok")


def run_self_test(line: Callable[[str], None]) -> bool:
    """Print the table, class by class; whether all were caught and 80 % named."""
    started = time.perf_counter()
    found: list[Caught] = []
    for one in self_test():
        found.append(one)
        mark = "NOT CAUGHT" if not one.by else "named" if one.named else "caught"
        line(f"  {mark:10} {one.kind:4} {one.name:52} {one.by:45} {'; '.join(one.said or (one.text,))[:100]}")
    line(f"\n{'class':42} {'seeded':>6} {'caught':>6} {'named':>6}")
    for kind, text in CLASSES.items():
        rows = [c for c in found if c.kind == kind]
        if rows:
            line(f"{text:42} {len(rows):6} {sum(bool(c.by) for c in rows):6} {sum(c.named for c in rows):6}")
    caught, named = sum(bool(c.by) for c in found), sum(c.named for c in found)
    line(f"{'all':42} {len(found):6} {caught:6} {named:6}")
    line("\nnot to be caught, since nothing that is computed differs:")
    for name, e in mutants.EQUIVALENT.items():
        line(f"  {name}: {e.reason}" + (f" (with {e.rejected} it shows)" if e.rejected else ""))
    enough = caught == len(found) and named >= 0.8 * len(found)
    verdict = "RIGHT" if enough else "WRONG"
    line(f"\n{verdict}: {caught} of {len(found)} caught, {named} named ({named / len(found):.0%}), "
         f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    return enough


__all__ = ["Caught", "run_self_test", "self_test"]
