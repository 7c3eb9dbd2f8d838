"""The parts of a step in processes give what they give here, one after the other; errors and ends are those of the parts."""

from __future__ import annotations

import multiprocessing
import os
import warnings

import numpy as np
import pytest

from npattn.models.trees import tree_map
from npattn.training.processes import Processes, shared

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
W = np.random.default_rng(0).standard_normal((5, 3))


def batches(n):
    return np.random.default_rng(n).standard_normal((4, 5))


def loss_and_grads(params, batch, n):
    if n == 13:
        raise FloatingPointError("batch 13")
    if n == 99:
        os._exit(1)
    y = batch @ params[0]
    return float((y * y).sum()), (2 * batch.T @ y, None), len(batch) + n


@pytest.mark.parametrize("number", [1, 2, 3])
def test_parts_are_those_of_one_process(number):
    params = tree_map(shared, (W, None))
    with Processes(params, loss_and_grads, batches, number) as parts:
        for factor in (1.0, 0.5):  # the parameters are seen as they are now
            params[0][...] = factor * W
            found = [(loss, g[0].copy(), tokens) for loss, g, tokens in parts([7, 8, 9])]
            for n, (loss, g, tokens) in zip((7, 8, 9), found, strict=True):
                expected = loss_and_grads(params, batches(n), n)
                assert (loss, tokens) == (expected[0], 4 + n)
                assert np.array_equal(g, expected[1][0])


def test_an_error_in_a_part_is_raised_and_the_others_go_on():
    with Processes(tree_map(shared, (W, None)), loss_and_grads, batches, 2) as parts:
        with pytest.raises(FloatingPointError, match="batch 13"):
            list(parts([13, 14]))
        processes = parts.processes
    assert all(not p.is_alive() for p in processes)
    with (
        Processes(tree_map(shared, (W, None)), loss_and_grads, batches, 2) as parts,
        pytest.raises(RuntimeError, match="has ended"),
    ):
        list(parts([99, 1]))


def test_bad_input():
    with pytest.raises(ValueError, match="number is 0"):
        Processes((W,), loss_and_grads, batches, 0)


def test_no_warning_of_a_library_whose_threads_a_fork_leaves_behind(monkeypatch):
    """jax warns at each fork, from where no test would see it."""

    def fork(real=os.fork):
        warnings.warn("os.fork() was called.", RuntimeWarning, stacklevel=1)
        return real()

    monkeypatch.setattr(os, "fork", fork)
    with Processes(tree_map(shared, (W, None)), loss_and_grads, batches, 2) as parts:
        assert [tokens for _, _, tokens in parts([1, 2])] == [5, 6]
