"""Every gradient under every option and every pair of options, dense and blockwise, against the forward's own derivatives.

float64, N(0, 1) inputs, another size for every letter, random cotangents. A gradient may differ from a complex step by 4e-15
of the largest sum of |terms| that make up one of its elements, and from a central difference by that and its estimated error.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from helpers import blockwise_of

from npattn import attention_backward, attention_forward, blockwise_backward, gradcheck
from npattn.ops.allowed import swap
from npattn.ops.masks import as_mask
from npattn.ops.pairs import ALL
from npattn.ops.tiles import Sizes
from npattn.tolerances import TERMS_EPS
from npattn.verify.ops.attention.draw import BIAS_FORMS, EXCLUSIONS, OPTIONS, SMALL, compatible, draw

NAMES = sorted(OPTIONS)
GRID = [(a,) for a in NAMES] + [pair for pair in itertools.combinations(NAMES, 2) if compatible(*pair)]
MASKS = {"mask", "causal", "window", "key_lengths", "query_lengths", "keys", "segments", "packed", "blocks", "where"}
TRIPLES = [t for t in itertools.combinations(NAMES, 3) if all(compatible(*p) for p in itertools.combinations(t, 2))]
WAYS = [  # several tiles of queries and keys at these sizes, and the last one cut short
    Sizes(tile=(3, 4)),  # one head at a time
    Sizes(tile=(6, 4), few_rows=1, few_features=1, bundle=1 << 30, tasks=2),  # heads together
]


def inputs_of(problem):
    """What is differentiated: q, k, v and scale, and the bias and sink where there is one."""
    options = {"scale": problem.q.shape[-1] ** -0.5, **problem.options}
    return {"q": problem.q, "k": problem.k, "v": problem.v} | {n: options[n] for n in ("bias", "sink", "scale") if n in options}


def functions(problem, forward, backward):
    rest = {n: x for n, x in problem.options.items() if n in ("softcap", "dropout_mask")}
    if problem.dlse is None:
        return lambda **x: forward(**x, mask=problem.arguments.get("mask"), **rest), backward
    return (
        lambda **x: forward(**x, mask=problem.arguments.get("mask"), **rest, return_lse=True),
        lambda douts, cache: backward(douts[0], cache, douts[1]),
    )


def sums_of_terms(cache, dout, dlse):
    """The largest sum of |terms| of one element of each gradient: the equations of the backward on absolute values."""
    heads = cache.q.shape[-3] if cache.q.ndim > 2 else 1
    repeat = heads // (cache.k.shape[-3] if cache.q.ndim > 2 else 1)

    def each_head(x):
        return np.abs(x) if repeat == 1 else np.abs(x).repeat(repeat, -3)

    def groups(x):
        return x if repeat == 1 else x.reshape(*x.shape[:-3], heads // repeat, repeat, *x.shape[-2:]).sum(-3)

    q, k, v, p = np.abs(cache.q), each_head(cache.k), each_head(cache.v), cache.weights
    drop = 1.0 if cache.dropout is None else cache.dropout.dense()
    dp = (np.abs(dout) @ swap(v)) * drop
    mean = (p * dp).sum(-1, keepdims=True)
    dl = 0.0 if dlse is None else np.abs(dlse)[..., None]
    ds = p * (dp + mean + dl)
    terms = {
        "q": abs(cache.scale) * ds @ k,
        "k": groups(abs(cache.scale) * swap(ds) @ q),
        "v": groups(swap(p * drop) @ np.abs(dout)),
    }
    terms["scale"] = (ds * (q @ swap(k))).sum()
    if cache.bias is not None:
        total = cache.bias.new_gradient()
        cache.bias.add_gradient(total, (), ALL, ALL, ds)
        terms["bias"] = terms["bias.parameter"] = np.abs(total)
    if cache.sink is not None:
        terms["sink"] = (
            ((1 - p.sum(-1, keepdims=True)) * (mean + dl)).sum((*range(p.ndim - 3), -2, -1))
            if p.ndim > 2
            else ((1 - p.sum(-1, keepdims=True)) * (mean + dl)).sum()
        )
    return terms


def zero_by_mathematics(problem):
    """A bias that is the same for all keys that a query sees shifts its row: softmax does not see that, lse and a sink do."""
    bias = problem.options.get("bias")
    if bias is None or problem.dlse is not None or "sink" in problem.options:
        return ()
    values = np.broadcast_to(bias if isinstance(bias, np.ndarray) else bias.bind(problem.shape).dense(), problem.shape)
    mask = problem.arguments.get("mask")
    allowed = np.ones(problem.shape, bool) if mask is None else as_mask("mask", mask).bind(problem.shape).dense()
    top, least = (f(values, axis=-1, where=allowed, initial=i) for f, i in ((np.max, -np.inf), (np.min, np.inf)))
    return ("bias",) if (top <= least).all() else ()


def check(options, seed, *, elements, blockwise=True, central=True):
    problem = draw(options, seed)
    inputs, zero = inputs_of(problem), zero_by_mathematics(problem)
    forward, backward = functions(problem, attention_forward, attention_backward)
    _, cache = forward(**inputs)
    terms = sums_of_terms(cache, problem.dout, problem.dlse)
    gradcheck(forward, backward, inputs, method="complex", terms=terms, zero=zero, elements=elements)
    alone = len(options) < 2  # of a pair central differences are taken along one line of all inputs, not of each
    if central and alone:
        gradcheck(forward, backward, inputs, method="central", terms=terms, zero=zero, elements=0)
    elif central:
        *line, total = along_a_line(forward, backward, inputs, terms)
        gradcheck(*line, {"t": 0.0}, method="central", terms={"t": total})
    if not blockwise:
        return
    dout = problem.dout if problem.dlse is None else (problem.dout, problem.dlse)
    want = backward(dout, cache)
    for way in WAYS if alone else [WAYS[seed % 2]]:
        tiles = functions(problem, partial(blockwise_of, way), blockwise_backward)
        # element by element: where dense is right, which the complex step has shown, blockwise is
        same(tiles[1](dout, tiles[0](**inputs)[1]), want, terms)
    *line, total = along_a_line(*tiles, inputs, terms)
    for method in ("complex", "central") if central and alone else ("complex",):
        gradcheck(*line, {"t": 0.0}, method=method, terms={"t": total})


def along_a_line(forward, backward, inputs, terms):
    """The same pair as a function of one number t: all inputs at once move along random directions, x + t u."""
    rng = np.random.default_rng(3)
    directions = {n: rng.standard_normal(np.shape(x)) / 4 * np.isfinite(x) for n, x in numbers(inputs)}

    def at(t):
        for name, x in inputs.items():
            step = t * directions[name] if np.ndim(directions[name]) else t * float(directions[name])
            yield name, x.with_parameter(x.parameter + step) if hasattr(x, "with_parameter") else x + step

    def slope(dout, cache):
        return sum((g * directions[n]).sum() for n, g in numbers(backward(dout, cache)._asdict()) if n in directions)

    total = sum(np.max(terms[n]) * np.abs(u).sum() for n, u in directions.items())
    return lambda t: forward(**dict(at(t))), lambda dout, cache: {"t": slope(dout, cache)}, total


def numbers(named):
    """(name, array) of each, of a bias object that of its parameter."""
    return ((name, getattr(x, "parameter", x)) for name, x in named.items() if x is not None)


def same(got, expected, terms):
    """All gradients of two backwards, to the bound for each one's terms."""
    for name, largest in terms.items():
        g, e = (getattr(grads, name, None) for grads in (got, expected))
        if e is not None:
            g, e = (getattr(x, "parameter", x) for x in (g, e))
            error = np.abs(g - e).max(initial=0)
            bound = 2 * TERMS_EPS * np.finfo(float).eps * np.max(largest)
            assert error <= bound, f"{name}: blockwise differs from dense by {error:.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize("options", GRID, ids=" + ".join)
def test_gradients_of_every_option_and_pair(options):
    check(options, seed=GRID.index(options), elements=20 if len(options) == 1 else 3)


def test_no_option_at_all():
    check((), seed=0, elements=1000)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_gradients_of_every_triple(part):
    for options in TRIPLES[part::20]:
        if not leaves_two_keys(options, part):  # three masks may exclude each other
            assert len([o for o in options if OPTIONS[o].feature in MASKS]) >= 2
            continue
        check(options, seed=part, elements=4, central=False, blockwise=TRIPLES.index(options) % 5 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_gradients_of_random_subsets(part):
    rng = np.random.default_rng(part)
    for seed in range(100):
        options: list[str] = []
        for name in rng.permutation(NAMES)[: rng.integers(4, 14)]:
            if all(compatible(name, other) for other in options):
                options.append(str(name))
        if leaves_two_keys(options, seed):
            check(options, seed=seed, elements=10, central=seed % 10 == 0)


def leaves_two_keys(options, seed, sizes=SMALL):
    try:
        draw(options, seed, sizes=sizes)
    except ValueError:
        return False
    return True


def test_the_grid_is_complete():
    named = {
        "mask array",
        "causal top_left",
        "causal bottom_right",
        "causal by positions",
        "window",
        "key_lengths",
        "query_lengths",
        "keys",
        "segments",
        "packed",
        "blocks",
        "where",
        "Alibi",
        "RelativeTable",
        "negative scale",
        "softcap",
        "sink",
        "dropout_mask",
        "G < H",
        "E != D",
        "dlse",
        "L > S",
        "L < S",
        "rank 2",
        "rank 5",
        *(f"bias {f}" for f in BIAS_FORMS),
    }
    assert set(OPTIONS) == named
    pairs = set(itertools.combinations(NAMES, 2))
    excluded = pairs - set(GRID)
    assert {(n,) for n in NAMES} <= set(GRID)
    for a, b in excluded:
        assert {OPTIONS[a].feature, OPTIONS[b].feature} <= set(EXCLUSIONS), f"{a} and {b} are left out without a reason"


def test_every_public_forward_has_a_backward_and_a_short_form():
    import npattn

    names = set(npattn.__all__)
    forwards = [n.removesuffix("_forward") for n in names if n.endswith("_forward") and f"{n}_forward" not in names]
    assert len(forwards) >= 8
    for name in forwards:
        assert {name, f"{name}_backward"} <= set(npattn.__all__)
