"""The self-test: its seeds are bugs, the equations without one are right, and it says what it has found."""

from __future__ import annotations

import itertools

import pytest

from npattn.verify import Settings, examine
from npattn.verify.ops import OPS
from npattn.verify.selftest import WRAPPERS, examined, from_equations, run_self_test, seeds

QUICK = {
    "attention": ("plain", "everything", "dead rows", "NaN seen later", "S = 0", "float64"),
    "multi_head": ("plain", "everything"), "rnn": ("plain", "lengths 0 and T"), "softmax": ("plain", "everything"),
}  # fmt: skip


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in QUICK.items() for name in names])
def test_the_equations_without_a_change_hold(op, name):
    result = examine(from_equations(OPS[op]), OPS[op].by_name[name], 0, Settings(power=False))
    assert {c.status for c in result.checks} == {"ok"}


@pytest.mark.parametrize(("op", "name"), [
    ("attention", "scale=none"), ("attention", "Delta is missing"), ("attention", "causal excludes the own key"),
    ("multi_head", "b_q forgotten"), ("rnn", "dh_last ignored"), ("softmax", "mask=drop"),
])  # fmt: skip
def test_a_change_is_caught_and_named(op, name):
    record = OPS[op]
    seed = next(s for s in seeds([record]) if s.name == name) if op != "attention" else None
    if seed is None:  # to look for the cases in which each change of attention shows takes a minute
        from npattn.verify.selftest import Seed

        case = next(c.name for c in record.cases if record.changes[name].needs <= set(c.features) | {"L != S"})
        seed = Seed(record, "change", name, from_equations(record, [record.changes[name]]), (name,), (case,))
    found = examined(seed)
    assert found.by
    assert found.named, found.diagnosis


def test_bugs_that_any_op_can_have_are_caught():
    found = [examined(s) for s in seeds([OPS["softmax"]]) if s.kind == "wrapper"]
    assert len(found) == 2 * len(WRAPPERS)
    assert all(one.by for one in found)
    assert sum(one.named for one in found) >= len(found) - 4


def test_it_prints_a_line_for_each_and_a_table():
    lines: list[str] = []
    assert run_self_test(lines.append, itertools.islice(seeds([OPS["rnn"]]), 5))
    assert sum(line.startswith("  named") for line in lines) == 5
    assert "RIGHT: 5 of 5 caught, 5 named (100%)" in lines[-1]


def test_it_is_wrong_where_one_is_missed():
    seed = next(seeds([OPS["softmax"]]))
    lines: list[str] = []
    assert not run_self_test(lines.append, [seed._replace(candidate=from_equations(OPS["softmax"]))])
    assert "WRONG: 0 of 1 caught" in lines[-1]


EVERY = {"attention": 8, "multi_head": 2, "gru": 2, "lstm": 2, "encoder_block": 4, "decoder_block": 8}


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_seeds_are_caught_and_most_are_named(op):
    """Of large ops every second to eighth: `npattn verify --self-test` takes all of them."""
    lines: list[str] = []
    run_self_test(lines.append, itertools.islice(seeds([OPS[op]]), 0, None, EVERY.get(op, 1)))
    seeded, caught, named = map(int, next(line for line in lines if line.startswith("all")).split()[1:])
    assert seeded == caught, "\n".join(lines)
    assert named >= 0.85 * seeded, "\n".join(lines)
