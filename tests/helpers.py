"""Comparisons with derived bounds, and one check of a whole call of attention against the loops of `oracles`."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from oracles import attention_loops

import npattn
from npattn.ops import blockwise as tiled
from npattn.ops.allowed import quiet
from npattn.ops.calls import bind
from npattn.ops.tiles import Sizes
from npattn.tolerances import TERMS_EPS
from npattn.verify.ops.attention.draw import FAMILIES

SIZES = {"B": 2, "H": 6, "G": 3, "L": 4, "S": 5, "D": 7, "E": 8}  # all different: no two axes can be mixed up
HARD_FIRST = sorted(FAMILIES, key=lambda f: f not in ("tiniest", "x30", "V mean"))

SHAPES = {"rank2": (4, 5), "rank3": (6, 4, 5), "rank4": (2, 6, 4, 5), "rank5": (3, 2, 2, 4, 5)}  # of scores
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def abs_finite(x):
    """|x| in float64 (or longdouble) with 0 in place of NaN and inf: those are compared by their places."""
    x = np.abs(np.asarray(x))
    x = x.astype(np.float64) if x.dtype.itemsize < 8 else x
    return np.where(np.isfinite(x), x, 0)


def first(number, values):
    """Parameters of a test: the first so many run by default, all of them with the slow proofs."""
    rest = (x if isinstance(x, tuple) else (x,) for x in [*values][number:])
    return [*values][:number] + [pytest.param(*x, marks=pytest.mark.slow) for x in rest]


def assert_close(actual, expected, terms, *, name="", dtype=None, computing=None):
    """Raises where actual and expected differ by more than TERMS_EPS * eps(dtype) * terms, or in their NaN and inf.

    dtype is actual's unless given. With ``computing`` the terms were summed in that dtype and rounded once to dtype.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    dtype = np.dtype(actual.dtype if dtype is None else dtype)
    computing = dtype if computing is None else np.dtype(computing)
    wide = np.result_type(np.float64, expected.dtype, actual.dtype if actual.dtype.kind != "V" else np.float64)
    a, e = actual.astype(wide), expected.astype(wide)
    finite = np.isfinite(e)
    if actual.size == 0:
        return
    bound = TERMS_EPS * float(info(computing).eps) * np.broadcast_to(terms, e.shape) + float(
        info(computing).smallest_normal
    )
    if computing != dtype:  # rounded to nearest: half a unit in the last place
        bound = bound + np.maximum(
            float(info(dtype).eps) / 2 * np.abs(np.where(finite, e, 0)), float(info(dtype).smallest_subnormal)
        )
    with np.errstate(invalid="ignore"):
        same = (a == e) | (np.isnan(a) & np.isnan(e))
        wrong = np.where(finite, ~(np.abs(a - e) <= bound), ~same)
        excess = np.where(wrong, np.where(np.isfinite(a) & finite, np.abs(a - e) / bound, np.inf), 0)
    if wrong.any():
        at = np.unravel_index(np.argmax(excess), e.shape)
        raise AssertionError(
            f"{name}{list(map(int, at))} is {a[at]}, expected {e[at]}; they may differ by {float(bound[at]):.3g}; "
            f"{np.count_nonzero(wrong)} of {wrong.size} elements are wrong, by up to {float(excess.max()):.3g} bounds"
        )


def info(dtype):
    """np.finfo, also of bfloat16."""
    dtype = np.dtype(dtype)
    if dtype.name != "bfloat16":
        return np.finfo(dtype)
    import ml_dtypes

    return ml_dtypes.finfo(dtype)


def random(shape, seed, dtype=np.float64):
    """Standard normal numbers, complex in both parts where dtype is."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        x = x + 0.3j * rng.standard_normal(shape)
    return x.astype(dtype)


def qkv(lead=(SIZES["B"],), dtype=np.float64, seed=0, **sizes):
    """A dict q, k, v, dout, dlse of random arrays. lead=None gives rank 2, () rank 3."""
    H, G, L, S, D, E = ((SIZES | sizes)[letter] for letter in "HGLSDE")
    heads, groups = ((), ()) if lead is None else ((*lead, H), (*lead, G))
    computing = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    shapes = {
        "q": (*heads, L, D),
        "k": (*groups, S, D),
        "v": (*groups, S, E),
        "dout": (*heads, L, E),
        "dlse": (*heads, L),
    }
    return {
        name: random(shape, (seed, n), computing if name == "dlse" else dtype)
        for n, (name, shape) in enumerate(shapes.items())
    }


def pair_shape(x):
    """The shape of the scores, (..., H, L, S)."""
    return (*x["q"].shape[:-1], x["k"].shape[-2])


def sum_to(x, shape):
    """x (..., H, L, S) summed over the axes along which something of this shape was broadcast."""
    full = (1,) * (x.ndim - len(shape)) + tuple(shape)
    return x.sum(tuple(a for a in range(x.ndim) if full[a] != x.shape[a]), keepdims=True).reshape(shape)


# --- the implementations under test ----------------------------------------------------------------------------------


OPTIONS = ("mask", "bias", "scale", "softcap", "sink", "dropout_mask")


def bound(q, k, v, **options):
    """A call of blockwise, checked, with its options bound."""
    return bind("blockwise", q, k, v, *map(options.get, OPTIONS))


@quiet
def blockwise_of(sizes, q, k, v, *, return_lse=False, **options):
    """`npattn.blockwise_forward` in pieces of other sizes; `npattn.blockwise_backward` takes the same."""
    out, cache = tiled.forward(bound(q, k, v, **options), sizes)
    return (out, cache.lse) if return_lse else out, cache


SMALL_TILES = Sizes(tile=(2, 3))  # the sizes of the tests need several, the last one cut short
IMPLEMENTATIONS = {
    "dense": (npattn.attention_forward, npattn.attention_backward),
    "blockwise": (npattn.blockwise_forward, npattn.blockwise_backward),
    "tiles": (functools.partial(blockwise_of, SMALL_TILES), npattn.blockwise_backward),
}
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def attention_terms(q, k, v, p, *, bias, scale, sink, dropout_mask, dout, dlse, allowed):
    """For every result the sum of the |terms| that make up each element, from the weights p of the loops.

    A score rounds by eps * s with s = |scale| |q| |k| + |bias|, so a weight by eps * p (1 + max s): exp turns absolute
    errors into relative ones. Everything behind it is a sum of products of those.
    """
    H, G = (q.shape[-3], k.shape[-3]) if q.ndim > 2 else (1, 1)
    q, k, v, p, dout = map(abs_finite, (q, k, v, p, dout))
    if q.ndim > 2 and G:
        k, v = (np.repeat(x, H // G, axis=-3) for x in (k, v))
    elif q.ndim > 2:
        k, v = (np.zeros((*x.shape[:-3], 0, *x.shape[-2:])) for x in (k, v))
    dlse = np.zeros(q.shape[:-1]) if dlse is None else abs_finite(dlse)
    qk = q @ k.swapaxes(-1, -2)
    s = abs(scale) * qk + (0 if bias is None else abs_finite(bias))
    s = np.where(allowed, s, 0).max(-1, keepdims=True, initial=0)
    share = 0.0
    if sink is not None:
        sinks = abs_finite(sink).reshape((H, 1, 1) if q.ndim > 2 else (1, 1))
        s, share = np.maximum(s, sinks), np.clip(1 - p.sum(-1, keepdims=True), 0, 1) + info(np.float64).eps
    d = 1.0 if dropout_mask is None else dropout_mask
    p = p * (1 + s)
    share = share * (1 + s)
    dp = (dout @ v.swapaxes(-1, -2)) * d
    mean = (p * dp).sum(-1, keepdims=True)
    ds = p * (dp + dlse[..., None] + mean)

    def group(x):
        return x if q.ndim == 2 or not G else x.reshape(*x.shape[:-3], G, H // G, *x.shape[-2:]).sum(-3)

    return {
        "out": (p * d) @ v,
        "weights": p,
        "lse": 1 + s[..., 0],
        "q": abs(scale) * ds @ k,
        "k": group(abs(scale) * ds.swapaxes(-1, -2) @ q),
        "v": group((p * d).swapaxes(-1, -2) @ dout),
        "bias": ds,
        "scale": (ds * qk).sum(),
        "sink": None if sink is None else sum_to(share * (dlse[..., None] + mean), (H, 1, 1)[-q.ndim :]).reshape(H),
    }


def check_attention(implementation, x, *, allowed=None, values=None, **options):
    """Forward, lse and all gradients of one call on x = dict(q, k, v, dout[, dlse]) against `attention_loops`.

    A mask that is an object needs ``allowed`` beside it, a bias that is an object its ``values``, both (..., H, L, S).
    Also: dtypes and shapes, inputs unchanged to the byte, a second backward from the same cache the same to the bit.
    Returns the results.
    """
    forward, backward = IMPLEMENTATIONS[implementation]
    full = pair_shape(x)
    mask, bias, drop = (options.get(name) for name in ("mask", "bias", "dropout_mask"))
    if isinstance(mask, np.ndarray):
        allowed = np.broadcast_to(mask, full)
    assert mask is None or allowed is not None, "a mask that is an object needs allowed beside it"
    if isinstance(bias, np.ndarray):
        values = np.broadcast_to(bias, full)
    assert bias is None or values is not None, "a bias that is an object needs its values beside it"
    drop = None if drop is None else np.broadcast_to(drop, full)
    arrays = [a for a in (*x.values(), *options.values()) if isinstance(a, np.ndarray)]

    before = [a.tobytes() for a in arrays]
    (out, lse), cache = forward(x["q"], x["k"], x["v"], return_lse=True, **options)
    saved = [a.tobytes() for a in (out, lse, cache.lse)]
    grads = backward(x["dout"], cache, x.get("dlse"))
    again = backward(x["dout"], cache, x.get("dlse"))
    assert [a.tobytes() for a in arrays] == before, "an input was modified"
    assert [a.tobytes() for a in (out, lse, cache.lse)] == saved, "the backward wrote into a result of the forward"
    for name in ("q", "k", "v", "sink", "scale", *(("bias",) if isinstance(bias, np.ndarray) else ())):
        first, second = (getattr(g, name) for g in (grads, again))
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes(), f"d{name} of the second backward differs"
    assert np.array_equal(cache.lse, lse, equal_nan=True)
    assert (cache.weights is not None) == (implementation == "dense")

    given = {name: options.get(name) for name in ("scale", "softcap", "sink")} | {"dropout_mask": drop}
    expected = attention_loops(
        x["q"], x["k"], x["v"], allowed=allowed, bias=values, dout=x["dout"], dlse=x.get("dlse"), **given
    )
    D = x["q"].shape[-1]
    scale = (D or 1) ** -0.5 if given["scale"] is None else given["scale"]
    seen = np.ones(full, bool) if allowed is None else allowed
    seen = seen if values is None else seen & (values != -np.inf)
    terms = attention_terms(
        x["q"], x["k"], x["v"], expected["weights"], bias=values, scale=scale, sink=given["sink"], dropout_mask=drop,
        dout=x["dout"], dlse=x.get("dlse"), allowed=seen,
    )  # fmt: skip

    dtype, computing = x["q"].dtype, lse.dtype
    assert computing == (np.float32 if dtype.itemsize == 2 else dtype)
    results = {"out": out, "lse": lse, "q": grads.q, "k": grads.k, "v": grads.v, "scale": np.asarray(grads.scale)}
    dtypes = {"lse": computing, "scale": computing}
    if implementation == "dense":
        results["weights"], dtypes["weights"] = cache.weights, computing
    if isinstance(bias, np.ndarray):
        results["bias"], dtypes["bias"] = grads.bias, bias.dtype
        expected["bias"], terms["bias"] = sum_to(expected["bias"], bias.shape), sum_to(terms["bias"], bias.shape)
    elif bias is None:
        assert grads.bias is None
    if given["sink"] is not None:
        results["sink"], dtypes["sink"] = grads.sink, given["sink"].dtype
    else:
        assert grads.sink is None
    for name, result in results.items():
        assert result.dtype == dtypes.get(name, dtype), f"{name} has dtype {result.dtype}"
        assert_close(result, expected[name], terms[name], name=name, computing=computing)
    return results | {"grads": grads, "cache": cache, "expected": expected}


# --- models --------------------------------------------------------------------------------------------------------------


def leaves(tree):
    """The arrays of nested NamedTuples, tuples and mappings."""
    if isinstance(tree, np.ndarray):
        yield tree
    elif hasattr(tree, "parameter"):
        yield tree.parameter
    elif tree is not None:
        for x in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(x)


class EveryName(dict):
    """The same number for every name."""

    def __init__(self, value):
        self.value = value

    def __contains__(self, name):
        return True

    def __getitem__(self, name):
        return self.value


ELEMENTS = {"complex": 2, "central": 1}  # of each array, beside one direction of all of it


def check_model(forward, backward, inputs, zero=(), method="complex"):
    """gradcheck, with rounding errors relative to the largest gradient of the model: they come from all of it."""
    out, cache = forward(**inputs)
    top = max(float(np.abs(x).max()) for x in leaves(backward(np.ones_like(out), cache)))
    given = {"zero": zero, "method": method, "elements": ELEMENTS[method], "terms": EveryName(top)}
    assert len(npattn.gradcheck(forward, backward, inputs, **given)) == len(list(leaves(inputs)))
