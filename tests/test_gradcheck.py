"""The checks of gradients: what they find, what they refuse, and Hessian-vector products."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from npattn import (
    Alibi,
    GradcheckError,
    MultiHeadParams,
    attention_backward,
    attention_forward,
    causal,
    gradcheck,
    hessian_vector_product,
    multi_head_backward,
    multi_head_forward,
)
from npattn.tolerances import GRADCHECK_EPS, TERMS_EPS

rng = np.random.default_rng(0)
Q, K, V = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 5, 6))
INPUTS = {"q": Q, "k": K, "v": V}
METHODS = ("complex", "central")


def sabotaged(change):
    """attention_backward with one gradient changed."""

    def backward(dout, cache):
        return change(attention_backward(dout, cache))

    return backward


@pytest.mark.parametrize("method", METHODS)
def test_right_gradients_pass(method):
    rows = gradcheck(attention_forward, attention_backward, INPUTS, method=method)
    assert [r.name for r in rows] == ["q", "k", "v"]
    assert [r.derivatives for r in rows] == [x.size + 1 for x in INPUTS.values()]
    assert all(0 < r.error <= 1 and r.size > 0.01 for r in rows)


@pytest.mark.parametrize(("method", "bug"), [("complex", 1e-12), ("central", 1e-8)])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_small_relative_bugs_are_found(method, bug, name):
    wrong = sabotaged(lambda g: g._replace(**{name: getattr(g, name) * (1 + bug)}))
    with pytest.raises(GradcheckError, match=rf"gradient of {name}\[\d, \d, \d\]|gradient of {name} along"):
        gradcheck(attention_forward, wrong, INPUTS, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_one_wrong_element_among_many_is_found_by_its_direction(method):
    def one_off(g):
        dk = g.k.copy()
        dk[1, 2, 3] += 1e-3
        return g._replace(k=dk)

    with pytest.raises(GradcheckError, match="gradient of k along a random direction"):
        gradcheck(attention_forward, sabotaged(one_off), INPUTS, method=method, elements=0)
    with pytest.raises(
        GradcheckError, match=r"gradient of k\[1, 2, 3\]: backward gives .* gives .*; they differ by .*, allowed"
    ):
        gradcheck(attention_forward, sabotaged(one_off), INPUTS, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_gradient_is_refused_unless_it_is_named(method):
    shift = {**INPUTS, "bias": rng.standard_normal((3, 1))}
    some = {"method": method, "elements": 3}
    with pytest.raises(GradcheckError, match="gradient of bias is zero everywhere, so nothing was tested"):
        gradcheck(attention_forward, attention_backward, shift, **some)
    gradcheck(attention_forward, attention_backward, shift, **some, zero=("bias",))
    with pytest.raises(GradcheckError, match="zero names q"):
        gradcheck(attention_forward, attention_backward, shift, **some, zero=("bias", "q"))
    with pytest.raises(ValueError, match="zero names"):
        gradcheck(attention_forward, attention_backward, INPUTS, zero=("w",))
    wrong = sabotaged(lambda g: g._replace(bias=g.bias + 1e-6))
    with pytest.raises(GradcheckError, match="gradient of bias"):
        gradcheck(attention_forward, wrong, shift, **some, zero=("bias",))


def test_known_terms_bound_the_error():
    exact = {"q": 1.0, "k": 1.0, "v": 1.0}
    assert TERMS_EPS < GRADCHECK_EPS
    wrong = sabotaged(lambda g: g._replace(v=g.v + 20 * np.finfo(float).eps))
    with pytest.raises(GradcheckError, match="gradient of v"):
        gradcheck(attention_forward, wrong, INPUTS, terms=exact)


def test_functions_that_are_not_repeatable_are_refused():
    noise = np.random.default_rng(0)

    def forward(q, k, v):
        out, cache = attention_forward(q, k, v)
        return out + 1e-16 * noise.standard_normal(out.shape), cache

    with pytest.raises(GradcheckError, match="forward is not repeatable"):
        gradcheck(forward, attention_backward, INPUTS)
    calls = []

    def backward(dout, cache):
        calls.append(1)
        g = attention_backward(dout, cache)
        return g._replace(q=g.q + len(calls) * 1e-300) if len(calls) % 2 else g._replace(q=g.q * (1 + 1e-15))

    with pytest.raises(GradcheckError, match="backward is not repeatable"):
        gradcheck(attention_forward, backward, INPUTS)


def test_a_modified_input_is_refused():
    def backward(dout, cache):
        g = attention_backward(dout, cache)
        cache.q[...] = 0
        return g

    with pytest.raises(GradcheckError, match=r"not repeatable|input was modified"):
        gradcheck(attention_forward, backward, {n: x.copy() for n, x in INPUTS.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g._replace(q=g.q[0]), "gradient of q has shape"),
        (lambda g: g._replace(q=np.full_like(g.q, np.nan)), "gradient of q holds NaN"),
        (lambda g: {"q": g.q, "k": g.k}, "no gradient of v"),
        (lambda g: g._replace(v=np.zeros_like(g.v)), "gradient of v"),
    ],
)
def test_what_else_can_be_wrong_with_a_gradient(change, message):
    with pytest.raises(GradcheckError, match=message):
        gradcheck(attention_forward, sabotaged(change), INPUTS)


def test_a_forward_that_stops_complex_numbers_is_told_to_use_central_differences():
    def forward(x):
        return np.abs(x.real) ** 1.5, x

    def backward(dout, x):
        return {"x": 1.5 * np.sign(x) * np.abs(x) ** 0.5 * dout}

    with pytest.raises(TypeError, match='method="central"'):
        gradcheck(forward, backward, {"x": np.array([1.0, -2.0])})
    gradcheck(forward, backward, {"x": np.array([1.0, -2.0])}, method="central")


def test_a_kink_is_not_tested_silently():
    with pytest.raises(GradcheckError, match="kink"):
        gradcheck(lambda x: (np.maximum(x, 0), x), lambda d, x: {"x": d * (x > 0)}, {"x": np.zeros(3)}, method="central")


def test_central_differences_step_around_a_kink_nearby():
    x = np.array([1e-4, -2e-4, 1.0])
    gradcheck(lambda x: (np.maximum(x, 0), x), lambda d, x: {"x": d * (x > 0)}, {"x": x}, method="central", directions=0)


@pytest.mark.parametrize("method", METHODS)
def test_lse_of_minus_infinity_takes_no_part(method):
    dead = np.ones((3, 5), bool)
    dead[1] = False
    gradcheck(
        functools.partial(attention_forward, mask=dead, return_lse=True),
        lambda d, c: attention_backward(d[0], c, d[1]),
        INPUTS,
        method=method,
        elements=10,
    )


def test_nested_inputs_scalars_and_bias_objects():
    p = MultiHeadParams(*(rng.standard_normal((4, 4)) for _ in range(4)))
    rows = gradcheck(
        lambda x, params, bias: multi_head_forward(x, x, x, params, 2, bias=bias),
        lambda d, c: (lambda g: {"x": g.x_q + g.x_k + g.x_v, "params": g.params, "bias": g.bias})(multi_head_backward(d, c)),
        {"x": rng.standard_normal((2, 3, 4)), "params": p, "bias": Alibi(np.array([0.3, 0.1]))},
    )
    assert [r.name for r in rows] == ["x", "params.w_q", "params.w_k", "params.w_v", "params.w_o", "bias.parameter"]
    rows = gradcheck(attention_forward, attention_backward, {**INPUTS, "scale": 0.3})
    assert rows[-1].name == "scale"
    assert rows[-1].derivatives == 2


def test_longdouble_is_checked_in_longdouble():
    if np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
        pytest.skip("long double is double here")
    wide = {n: x.astype(np.longdouble) for n, x in INPUTS.items()}
    gradcheck(attention_forward, attention_backward, wide)
    wrong = sabotaged(lambda g: g._replace(q=g.q * (1 + np.longdouble(1e-15))))
    with pytest.raises(GradcheckError, match="gradient of q"):
        gradcheck(attention_forward, wrong, wide)


def test_the_cotangent_is_not_what_the_caller_drew():
    """With default_rng(0) on both sides the cotangent would be the input itself, and this gradient 0."""
    x = np.random.default_rng(0).standard_normal((3, 4))

    def forward(x):
        norm = np.sqrt((x * x).sum(-1, keepdims=True))
        return x / norm, (x, norm)

    def backward(dout, cache):
        x, norm = cache
        return {"x": (dout - x * (dout * x).sum(-1, keepdims=True) / norm**2) / norm}

    for method in METHODS:
        gradcheck(forward, backward, {"x": x}, method=method)


def test_a_fast_oscillation_is_right_or_refused_but_not_called_wrong():
    for w in (1.0, 30.0, 300.0):
        for seed in range(5):
            x = np.random.default_rng(100 + seed).standard_normal(4)
            gradcheck(
                lambda x, w=w: (np.sin(w * x), x), lambda d, x, w=w: {"x": w * d * np.cos(w * x)}, {"x": x},
                method="central", seed=seed,
            )  # fmt: skip


@pytest.mark.parametrize("inputs", [{"x": np.ones(2), "none": None}, [np.ones(2), None]])
@pytest.mark.parametrize("grads", [lambda d, c: (d,), lambda d, c: [d, None]])
def test_gradients_in_the_order_of_the_inputs(inputs, grads):
    """Those that are None have none, or None; a NamedTuple may have more of them."""
    gradcheck(lambda x, none: (1 * x, None), grads, inputs)
    x = [np.random.default_rng(n).standard_normal((3, 2)) for n in range(3)]
    assert [c.name for c in gradcheck(attention_forward, attention_backward, x)] == ["0", "1", "2"]


@pytest.mark.parametrize("grads", [lambda d, c: (d, d, d), lambda d, c: [d]])
@pytest.mark.parametrize("inputs", [{"x": np.ones(2), "y": np.ones(2)}, [np.ones(2), np.ones(2)]])
def test_one_gradient_for_each_input(inputs, grads):
    with pytest.raises(GradcheckError, match="gradients, expected one for each of 2 inputs"):
        gradcheck(lambda x, y: (x + y, None), grads, inputs)


def test_nothing_tested_is_refused():
    pair = (lambda x: (x * x, x), lambda d, x: {"x": 77 * d})
    with pytest.raises(GradcheckError, match="no derivative was taken"):
        gradcheck(*pair, {"x": np.zeros((0, 3))})
    with pytest.raises(GradcheckError, match="no derivative was taken"):
        gradcheck(*pair, {"x": np.ones(3)}, elements=0, directions=0, zero=("x",))


def test_a_forward_that_stops_part_of_the_complex_step_is_found_out():
    with pytest.raises(TypeError, match="stops the complex step in part"):
        gradcheck(lambda x: (2 * x + x.real**2, x), lambda d, x: {"x": 2 * d}, {"x": np.array([1.0, 2.0])})


def test_outputs_that_stop_being_finite_are_not_left_out():
    x0 = np.array([0.5])

    def forward(x):
        return (2 * x, np.where(x == x0, 5 * x, np.nan)), x

    with pytest.raises(GradcheckError, match="kink or jump"):
        gradcheck(forward, lambda d, x: {"x": 2 * d[0]}, {"x": x0}, method="central")


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_of_minus_infinity_is_left_where_it_is(method):
    bias = np.zeros((3, 5))
    bias[0, 1] = bias[2, 4] = -np.inf
    rows = gradcheck(attention_forward, attention_backward, {**INPUTS, "bias": bias}, method=method)
    assert rows[-1].derivatives == 13 + 1


def test_gradients_by_position_and_outputs_by_name():
    from npattn import merge_backward, merge_forward, softmax_backward, softmax_forward

    gradcheck(softmax_forward, softmax_backward, [rng.standard_normal((2, 5))])
    parts = [rng.standard_normal(s) for s in ((2, 3), (2,), (2, 3), (2,))]
    gradcheck(merge_forward, lambda d, c: merge_backward(d[0], c, d[1]), parts)
    with pytest.raises(GradcheckError, match="dtype complex128"):
        gradcheck(lambda x: (x * x, x), lambda d, x: {"x": 2 * x * d + 0j}, {"x": np.ones(2)})


# --- Hessian-vector products ----------------------------------------------------------------------------------------------


def _along(inputs, seed):
    r = np.random.default_rng(seed)
    return {n: r.standard_normal(x.shape) for n, x in inputs.items()}


def test_hessian_is_symmetric_and_is_the_derivative_of_the_gradient():
    forward = functools.partial(attention_forward, mask=causal(align="bottom_right"), softcap=1.5, return_lse=True)

    def backward(douts, cache):  # the pair as a pair
        return attention_backward(douts[0], cache, douts[1])

    dout = rng.standard_normal((2, 3, 6)), rng.standard_normal((2, 3))
    u, w = _along(INPUTS, 1), _along(INPUTS, 2)
    Hu = hessian_vector_product(forward, backward, INPUTS, u, dout)
    Hw = hessian_vector_product(forward, backward, INPUTS, w, dout)

    def dot(a, b):
        return sum(float((a[n] * b[n]).sum()) for n in a)

    size = sum(float(np.abs(w[n] * Hu[n]).sum()) for n in w)
    assert abs(dot(w, Hu) - dot(u, Hw)) <= GRADCHECK_EPS * np.finfo(float).eps * size
    assert abs(dot(w, Hu)) > 1e-3 * size

    def gradient(**x):  # the gradient is a forward too, and its derivative along u is checked like any other
        (out, _lse), cache = forward(**x)
        g = attention_backward(dout[0].astype(out.dtype), cache, dout[1].astype(out.dtype))
        return (g.q, g.k, g.v), x

    rows = gradcheck(
        gradient,
        lambda d, x: hessian_vector_product(forward, backward, x, dict(zip("qkv", d, strict=True)), dout),
        INPUTS,
        method="central",
        elements=10,
    )
    assert len(rows) == 3


def test_hessian_vector_product_refuses_a_direction_of_another_shape():
    with pytest.raises(ValueError, match="direction has shapes"):
        hessian_vector_product(attention_forward, attention_backward, INPUTS, {**INPUTS, "q": Q[0]}, np.ones((2, 3, 6)))


def test_what_is_wrong_with_a_gradient_that_is_not_there():
    x = np.ones(2)
    with pytest.raises(GradcheckError, match="the backward gives None as the gradient of x, expected an array"):
        gradcheck(lambda x: (x, None), lambda d, c: {"x": None}, {"x": x})
    with pytest.raises(GradcheckError, match="no gradient of 0: the inputs are a sequence, and so are their gradients"):
        gradcheck(lambda x: (x, None), lambda d, c: {"x": d}, [x])
    with pytest.raises(GradcheckError, match=r"no gradient of a\.b$"):
        gradcheck(lambda a: (a["b"], None), lambda d, c: {"a": {"c": d}}, {"a": {"b": x}})


def test_names_may_hold_a_dot():
    x = np.arange(1.0, 4.0)
    named = {"layer": {"0.weight": x}, "layer.bias": 2 * x}

    def forward(**inputs):
        return inputs["layer"]["0.weight"] * inputs["layer.bias"], None

    rows = gradcheck(forward, lambda d, c: {"layer": {"0.weight": 2 * x * d}, "layer.bias": x * d}, named)
    assert [row.name for row in rows] == ["layer.0.weight", "layer.bias"]
