"""Cases of every op but attention: their truth, sigma, and the mistakes that are known."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from helpers import first
from oracles import (
    cross_entropy_loops,
    dropout_loops,
    embedding_loops,
    feed_forward_loops,
    gelu_loops,
    gru_loops,
    linear_layer_loops,
    lstm_loops,
    multi_head_loops,
    norm_loops,
    relu_loops,
    rnn_loops,
    rotary_loops,
    sigmoid_loops,
    silu_loops,
    softmax_loops,
)

import npattn
from npattn import MultiHeadParams, RNNParams, convert
from npattn.tolerances import GOOD_MAX, GOOD_RMS
from npattn.verify import Candidate
from npattn.verify.candidate import call_backward, call_forward
from npattn.verify.op import Problem, better_dtype, first_of_numbers, parts
from npattn.verify.ops import OPS
from npattn.verify.precision import PRECISIONS, of_dtype
from npattn.verify.stages import attempt, run

LAYERS = {name: op for name, op in OPS.items() if name != "attention"}
CASES = {name: op.cases for name, op in LAYERS.items()}

ALL = [case for cases in CASES.values() for case in cases]
LARGE = {"long", "M = 96", "N = 96", "long + lengths", "long, dh_last alone", "S = 1025", "S = 16384"}
SMALL = [case for case in ALL if case.name not in LARGE]
SIXTH_FIRST = first(len(ALL) // 6, sorted(ALL, key=lambda case: ALL.index(case) % 6))


LARGEST = ("multi_head", "gru", "lstm", "encoder_block", "decoder_block")


def name_of(case):
    return f"{case.op}: {case.name}"


def by_name(op, name):
    return next(case for case in CASES[op] if case.name == name)


def mistaken(problem, name):
    """What comes out with a known mistake, in a better dtype; nothing where it cannot be made in this call."""
    return attempt(problem, None, changes=[problem.op.changes[name]], dtype=better_dtype(problem.dtype) or problem.dtype)


def called(problem, function, *, backward=False):
    """The candidate, and the options that it is given, of a function that is its forward or its backward."""
    tested = Candidate("mine", function, function, op=problem.op.name)
    return tested, *tested.arguments(problem, function, backward)


def forwards(problem, function):
    tested, given, _ = called(problem, function)
    return problem.op.calls.forward(tested, problem, given)


def backwards(problem, function):
    tested, given, _ = called(problem, function, backward=True)
    return problem.op.calls.backward(tested, problem, given, {})


def units(got, want, sigma):
    """|error| / sigma, inf where NaN and inf do not stand as they should."""
    x, y = np.asarray(got, want.dtype), want
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    finite = np.isfinite(x) & np.isfinite(y)
    with np.errstate(all="ignore"):
        return np.where(same, 0, np.where(finite, np.abs(x - y) / sigma, np.inf)).astype(np.float64)


def accepted(got, truth):
    """The tensors of a candidate that a judge would accept."""
    found = set()
    for name, want in truth.values.items():
        if name in got and got[name].shape == want.shape:
            off = units(got[name], want, truth.sigma[name])
            if not off.size or (off.max() <= GOOD_MAX and np.sqrt(np.square(off).mean()) <= GOOD_RMS):
                found.add(name)
    return found


def named(grads):
    """NamedTuples of gradients as a mapping, params one by one."""
    return {f"d{part or name}": x for name, part, x in parts(grads._asdict()) if isinstance(x, np.ndarray)}


def package(problem, **more):
    """What npattn itself returns in the problem's dtype."""
    if more:  # of multi_head
        out, cache = npattn.multi_head_forward(**problem.inputs, **problem.options, **more)
        return {"out": out, **named(npattn.multi_head_backward(problem.cotangents["dout"], cache))}
    name, pair = next(iter(problem.op.candidates.items()))
    candidate = Candidate(name, *pair(), op=problem.op.name)
    forward = call_forward(candidate, problem)
    return {**forward.values, **call_backward(candidate, problem, forward.values).values}


# --- problems and their truth ------------------------------------------------------------------------------------------


def test_names_are_unique_and_every_op_has_float64():
    for op, cases in CASES.items():
        assert len({case.name for case in cases}) == len(cases)
        assert {case.op for case in cases} == {op}
        assert {case.dtype for case in cases} == {"float32", "float64"}


@pytest.mark.parametrize("case", SIXTH_FIRST, ids=name_of)
def test_a_problem_follows_the_protocol(case):
    problem, again, other = case.problem(3), case.problem(3), case.problem(4)
    first = first_of_numbers(problem.inputs)
    assert problem.inputs[first].dtype == case.dtype
    assert np.array_equal(problem.inputs[first], again.inputs[first], equal_nan=True)
    alike = np.array_equal(problem.inputs[first], other.inputs[first], equal_nan=True)
    assert not alike or case.name == "constant rows" or not problem.inputs[first].size
    truth = problem.truth(of_dtype(problem.dtype))
    assert list(truth.values) == [*problem.outputs, *problem.gradients]
    for name, want in truth.values.items():
        assert want.dtype == (np.float64 if case.dtype == "float32" else np.longdouble)
        assert truth.sigma[name].dtype == np.float64
        assert truth.sigma[name].shape == want.shape
        assert np.isfinite(truth.sigma[name]).all()
        assert len(problem.op.axes.get(name, "BHLS")) >= want.ndim
    assert problem.astype(np.float64).astype(case.dtype).dtype == case.dtype


def test_self_attention_has_one_array():
    inputs = by_name("multi_head", "self-attention").problem().inputs
    assert inputs["x_q"] is inputs["x_k"] is inputs["x_v"]


def direction(problem, rng):
    """Numbers of the shapes of all that has a gradient; 0 where an input is not finite."""

    def of(x):
        if isinstance(x, tuple):
            return type(x)(*map(of, x))
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            return None
        return np.where(np.isfinite(x), rng.standard_normal(x.shape), 0)

    options = {name: of(problem.options[name]) for name in ("bias", "sink") if name in problem.options}
    return {name: of(x) for name, x in problem.inputs.items()} | options


def moved(problem, step, by):
    def of(x, d):
        if isinstance(x, tuple):
            return type(x)(*map(of, x, d))
        return x if d is None else x + by * d

    inputs = {name: of(x, step[name]) for name, x in problem.inputs.items()}
    options = {name: of(x, step.get(name)) for name, x in problem.options.items()}
    return dataclasses.replace(problem, inputs=inputs, options=options)


def along(values, problem, step):
    """The derivative along the step, by the gradients; and the sum of |terms|."""
    step = {part or name: x for name, part, x in parts(step)}
    terms = [values[name] * step[name[1:]] for name in problem.gradients if name in values]
    return sum(t.sum() for t in terms), sum(np.abs(t).sum() for t in terms)


def objective(outputs, problem):
    return sum((d * outputs[name[1:]]).sum() for name, d in problem.cotangents.items())


def softmax_of_loops(inputs, options, given):
    seen = (inputs["scores"] != -np.inf) & options.get("mask", True)
    found = softmax_loops(inputs["scores"], seen, given["dweights"])
    return {"weights": found["weights"], "dscores": found["scores"]}


def elementwise(loops, **fixed):
    def of_loops(inputs, options, given):
        found = loops(inputs["x"], given["dy"], **options, **fixed)
        return {"y": found["y"], "dx": found["x"]}

    return of_loops


def feed_forward_of_loops(inputs, options, given):
    found = feed_forward_loops(inputs["x"], *inputs["params"], given["dy"], **options)
    return {name if name == "y" else f"d{name}": x for name, x in found.items()}


def embedding_of_loops(inputs, options, given):
    found = embedding_loops(**inputs, dy=given["dy"])
    return {"y": found["y"], "dtable": found["table"]}


def tied_head_of_loops(inputs, options, given):
    found = linear_layer_loops(inputs["x"], inputs["table"].T, None, given["dy"])
    return {"y": found["y"], "dx": found["x"], "dtable": found["w"].T}


def linear_of_loops(inputs, options, given):
    found = linear_layer_loops(inputs["x"], *inputs["params"], given["dy"])
    return {name if name == "y" else f"d{name}": x for name, x in found.items()}


def rotary_of_loops(inputs, options, given):
    found = rotary_loops(inputs["x"], inputs["positions"], given["dy"], **options)
    return {"y": found["y"], "dx": found["x"]}


def cross_entropy_of_loops(inputs, options, given):
    found = cross_entropy_loops(**inputs, **options, dloss=given["dloss"])
    return {"loss": found["loss"], "dlogits": found["logits"]}


def dropout_of_loops(inputs, options, given):
    found = dropout_loops(**inputs, **options, **given)
    return {"y": found["y"], "dx": found["x"]}


def recurrent_of_loops(function, inputs, options, given):
    *inputs, params = inputs.values()
    found = function(*inputs, **params._asdict(), **options, **given)
    return {name if name in ("h", "h_last", "c_last") else f"d{name}": x for name, x in found.items()}


def multi_head_of_loops(inputs, options, given):
    full, options = (len(inputs["x_q"]), options["num_heads"], inputs["x_q"].shape[1], inputs["x_k"].shape[1]), dict(options)
    for old, new in (("mask", "allowed"), ("bias", "bias"), ("dropout_mask", "dropout_mask")):
        if old in options:
            options[new] = np.broadcast_to(options.pop(old), full)
    options |= {"rotary": vars(options["rotary"])} if "rotary" in options else {}
    return multi_head_loops(*(inputs[name] for name in ("x_q", "x_k", "x_v")), **inputs["params"]._asdict(), **options)


def norm_of_loops(inputs, options, given, centred):
    eps = options.get("eps", 1e-5 if centred else 1e-6)
    found = norm_loops(inputs["x"], *inputs["params"], eps, given["dy"], centred)
    return {name if name == "y" else f"d{name}": x.astype(float) for name, x in found.items()}


LOOPS = {  # the outputs by the loops of the oracles, and of all but multi_head the gradients
    "embedding": embedding_of_loops,
    "feed_forward": feed_forward_of_loops,
    "gated_feed_forward": feed_forward_of_loops,
    "linear": linear_of_loops,
    "cross_entropy": cross_entropy_of_loops,
    "dropout": dropout_of_loops,
    "rotary": rotary_of_loops,
    "gru": partial(recurrent_of_loops, gru_loops),
    "lstm": partial(recurrent_of_loops, lstm_loops),
    "multi_head": multi_head_of_loops,
    "rnn": partial(recurrent_of_loops, rnn_loops),
    "layer_norm": partial(norm_of_loops, centred=True),
    "rms_norm": partial(norm_of_loops, centred=False),
    "silu": elementwise(silu_loops),
    "sigmoid": elementwise(sigmoid_loops),
    "gelu": elementwise(gelu_loops),
    "relu": elementwise(relu_loops),
    "squared_relu": elementwise(relu_loops, power=2),
    "softmax": softmax_of_loops,
    "tied_head": tied_head_of_loops,
}


def loops(problem):
    return LOOPS[problem.op.name](problem.inputs, problem.options, problem.cotangents)


def sigma_in_float64(problem, truth):
    """What float32 is predicted to have, times eps over eps. Angles are in float64 always: with these, what float64 has."""
    if problem.op.name == "rotary":
        return problem.truth(PRECISIONS["float64"]).sigma
    return {name: sigma * 2.0**-29 for name, sigma in truth.sigma.items()}


BLOCKS = ("encoder_block", "decoder_block")  # tests/models has their loops and derivatives
LOOPED_WHOLE = [c for c in SMALL if c.op not in ("multi_head", *BLOCKS)]
LOOPED_WHOLE.sort(key=lambda c: SMALL.index(c) % 4)


@pytest.mark.parametrize("case", first(len(LOOPED_WHOLE) // 4, LOOPED_WHOLE), ids=name_of)
def test_truth_is_that_of_loops(case):
    problem = case.problem().astype(np.float64)
    truth, found = problem.truth(PRECISIONS["float32"]), loops(problem)
    sigma = sigma_in_float64(problem, truth)
    for name, want in truth.values.items():
        off = units(found[name], want, sigma[name])  # both are float64
        assert off.max(initial=0) < GOOD_MAX, name


LOOPED = [
    "cross-attention", "grouped heads + mask + E != D", "dead rows", "NaN behind the mask", "everything", "b_q alone",
    "rotary, positions of each sequence", "norms + rotary + grouped heads + causal",
]  # fmt: skip


@pytest.mark.parametrize("name", LOOPED)
def test_truth_of_multi_head_is_that_of_loops(name):
    problem = by_name("multi_head", name).problem().astype(np.float64)
    truth = problem.truth(PRECISIONS["float32"])
    assert units(loops(problem)["out"], truth.values["out"], truth.sigma["out"] * 2.0**-29).max() < GOOD_MAX
    # The error of a central difference is h^2 times a third derivative, and eps over h.
    step, h = direction(problem, np.random.default_rng(0)), 1e-5
    ends = [objective(loops(moved(problem, step, by)), problem) for by in (h, -h)]
    value, terms = along(truth.values, problem, step)
    assert abs((ends[0] - ends[1]) / (2 * h) - value) < 1e-7 * terms
    assert terms > 1


# --- calibration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", first(len(CASES) - 5, sorted(CASES, key=LARGEST.__contains__)))
def test_sigma_is_calibrated(op, seeds):
    """npattn in the candidate's own precision: never far off, and over all cases about as far as predicted."""
    squares: dict[str, list[float]] = {}
    for case in CASES[op]:
        for seed in range(1 if case.name in LARGE else seeds):
            problem = case.problem(seed)
            truth = problem.truth(of_dtype(problem.dtype))
            kinds = ({}, {"implementation": "dense"}) if op == "multi_head" else ({},)
            for more in kinds:
                got = package(problem, **more)
                for name, want in truth.values.items():
                    off = units(got[name], want, truth.sigma[name])
                    assert off.max(initial=0) < 8, f"{case.name}: {name}"
                    assert not off.size or np.sqrt(np.square(off).mean()) < 2, f"{case.name}: {name}"
                    if off.any() and case.name not in LARGE:
                        squares.setdefault(name, []).append(float(np.square(off).mean()))
    for name, found in squares.items():
        # db_k is 0 but for what is common to a row, for which sigma takes the worse of two ways to sum_j p_j dp_j. In a block
        # that noise also reaches the parameters before it.
        least = 0.2 if name.endswith("b_k") else 0.3 if op in BLOCKS else 0.4
        assert least < np.sqrt(np.mean(found)) < 1.1, name


def test_a_sequential_sum_is_within_sigma_too():
    """A long softmax, summed one after the other in float32, which NumPy itself does not do."""
    problem = by_name("softmax", "S = 16384").problem()
    truth, scores = problem.truth(of_dtype(problem.dtype)), problem.inputs["scores"]
    e = np.exp(scores - scores.max(-1, keepdims=True))
    weights = e / np.cumsum(e, -1, dtype=np.float32)[..., -1:]
    off = units(weights, truth.values["weights"], truth.sigma["weights"])
    assert 0.1 < np.sqrt(np.square(off).mean()) < GOOD_RMS


def test_where_the_result_is_exact_sigma_is_nothing():
    truth = by_name("multi_head", "dead rows").problem().truth(PRECISIONS["float32"])
    assert truth.sigma["out"][:, [1, -1]].max() < 1e-30
    assert truth.sigma["out"][:, 2:-1].min() > 1e-9
    problem = by_name("rnn", "lengths").problem()
    after = np.arange(13) >= problem.options["lengths"][:, None]
    assert problem.truth(PRECISIONS["float32"]).sigma["h"][after].max() == 0


@pytest.mark.parametrize("op", first(len(CASES) - 5, sorted(CASES, key=LARGEST.__contains__)))
def test_outputs_in_half_precision(op):
    """M1: inputs that float16 holds, float32 inside, one rounding at the end: npattn's own float16."""
    precision, squares = PRECISIONS["float16-M1"], []
    for case in CASES[op]:
        if case.dtype == "float32" and not {"hard inputs", "long"} & set(case.features):
            problem = case.problem().stored(precision)
            assert problem.dtype == np.float16
            if problem.op.undefined(problem, precision.declared()):
                assert op in BLOCKS
                return
            truth, got = problem.truth(precision.declared()), package(problem)
            off = {name: units(got[name], want, truth.sigma[name]) for name, want in truth.values.items()}
            assert max(o.max(initial=0) for o in off.values()) < 8, case.name
            squares += [np.square(o).mean() for o in off.values() if o.any()]
    assert 0.4 < np.sqrt(np.mean(squares)) < 1.2 if squares else op == "relu"  # of relu nothing is rounded


def test_inputs_that_are_rounded():
    """Where inputs are not what the storage holds, rounding them is part of sigma."""
    case = by_name("rnn", "plain")
    problem, low = case.problem(), case.problem().stored(PRECISIONS["bfloat16-M1"])
    truth = problem.truth(PRECISIONS["bfloat16-M1"])
    got = {name: x.astype(np.float32) for name, x in package(low).items()}
    off = [np.square(units(got[name], want, truth.sigma[name])).mean() for name, want in truth.values.items()]
    assert 0.3 < np.sqrt(np.mean(off)) < 1.5
    assert (truth.sigma["h"] > 100 * problem.truth(PRECISIONS["float32"]).sigma["h"]).all()


@pytest.mark.parametrize("name", ["tf32", "float16-M2", "bfloat16-M3"])
def test_other_classes_are_refused(name):
    problem = by_name("softmax", "plain").problem()
    assert problem.op.undefined(problem, PRECISIONS[name]).startswith("precision classes of layers")
    assert problem.op.undefined(problem, PRECISIONS["bfloat16-M1"]) == ""


# --- planted errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", first(len(SMALL) // 6, sorted(SMALL, key=lambda case: SMALL.index(case) % 6)), ids=name_of)
def test_planted_errors_are_rejected(case):
    problem = case.problem()
    truth, got = problem.truth(of_dtype(problem.dtype)), package(problem)
    assert accepted(got, truth) == set(truth.values)
    for name, want in truth.values.items():
        large = np.isfinite(want) & (np.abs(want) > 1e3 * truth.sigma[name])
        if not large.any():
            continue  # exactly 0, or 0 but for rounding
        assert name not in accepted(got | {name: 0 * np.where(large, got[name], 0)}, truth)
        assert name not in accepted(got | {name: np.full_like(got[name], np.nan)}, truth)
        if (np.abs(want[large]) > 1e5 * truth.sigma[name][large]).any():
            assert name not in accepted(got | {name: got[name] * got[name].dtype.type(1.001)}, truth)


def test_what_a_case_is_there_for():
    """What must not be the same in these cases: their inputs leave a choice."""
    for op, name, mistake, tensor in [
        ("multi_head", "plain", "b_q forgotten", "out"),
        ("multi_head", "plain", "last head missing", "out"),
        ("multi_head", "dead rows", "a dead query gives 0", "out"),
        ("multi_head", "H = L = B", "merged as if (H, B)", "out"),
        ("multi_head", "H = L = B", "heads of q, k and v split without a transpose", "out"),
        ("rnn", "lengths", "lengths ignored", "h"),
        ("rnn", "dh_last alone", "dh_last ignored", "dx"),
        ("rnn", "dh_last + lengths 0 and T", "carry lost after the length", "dh0"),
        ("rnn", "B = T = M = N", "time and batch swapped", "h"),
        ("softmax", "H = L = S", "axis -2", "weights"),
        ("softmax", "x1e4", "no max", "weights"),
        ("softmax", "dead rows", "masked scores of -1e9", "weights"),
    ]:
        problem = by_name(op, name).problem()
        assert tensor not in accepted(mistaken(problem, mistake), problem.truth(of_dtype(problem.dtype))), mistake


# --- the stages, and mistakes in them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SIXTH_FIRST, ids=name_of)
def test_stages_without_a_change_are_the_reference(case):
    wide = case.problem(1).astype(np.float64)
    truth, found = wide.truth(PRECISIONS["float32"]), run(wide)
    assert list(found) == list(truth.values)
    sigma = sigma_in_float64(wide, truth)
    for name, want in truth.values.items():
        off = units(found[name], want, sigma[name])
        assert off.max(initial=0) < GOOD_MAX, name


def rnn_problem():
    rng, (B, T, M, N) = np.random.default_rng(0), (3, 5, 4, 2)
    x, h0, w_x, w_h, b = (0.7 * rng.standard_normal(n) for n in ((B, T, M), (B, N), (M, N), (N, N), (N,)))
    cotangents = {"dh": rng.standard_normal((B, T, N)), "dh_last": rng.standard_normal((B, N))}
    lengths = {"lengths": np.array([4, 0, 5])}
    return Problem(OPS["rnn"], {"x": x, "h0": h0, "params": RNNParams(w_x, w_h, b)}, lengths, cotangents)


def multi_head_problem():
    rng, (B, L, S, M, M_k, H, G, D, E) = np.random.default_rng(0), (3, 5, 4, 7, 8, 6, 2, 3, 2)
    shapes = {
        "w_q": (M, H * D), "w_k": (M_k, G * D), "w_v": (M_k, G * E), "w_o": (H * E, H * E), "b_q": (H * D,),
        "b_k": (G * D,), "b_v": (G * E,), "b_o": (H * E,),
    }  # fmt: skip
    params = MultiHeadParams(**{name: 0.7 * rng.standard_normal(n) for name, n in shapes.items()})
    x = {name: 0.7 * rng.standard_normal(n) for name, n in (("x_q", (B, L, M)), ("x_k", (B, S, M_k)), ("x_v", (B, S, M_k)))}
    mask = rng.random((B, 1, L, S)) < 0.7
    mask[:, :, 1] = False
    options = {"num_heads": H, "num_kv_heads": G, "mask": mask}
    return Problem(OPS["multi_head"], {**x, "params": params}, options, {"dout": rng.standard_normal((B, L, H * E))})


def options_problem():
    """Multi-head attention of one width throughout, with every option of attention."""
    return by_name("multi_head", "mask").problem().astype(np.float64)


def everything_problem():
    return by_name("multi_head", "everything").problem().astype(np.float64)


def square_problem():
    return by_name("rnn", "M = N").problem().astype(np.float64)


# No derivative of what they return exists, or it is not what is returned with it.
NOT_DERIVED = {
    "h_last of the first step", "a dead query gives NaN", "not normalised", "log of the weights",
    "divided by the largest |x|", "divided by the mean of |x|",
    *(name for name in OPS["softmax"].changes if "beside the sum" in name),
}  # fmt: skip


DRAWN = [rnn_problem, square_problem, multi_head_problem, options_problem, everything_problem]
NAMED = [  # cases in which the mistakes of the forward show
    ("embedding", "V = M"),
    ("feed_forward", "plain"),
    ("gated_feed_forward", "all biases"),
    ("linear", "B = L = M = N"),
    ("cross_entropy", "everything"),
    ("dropout", "p = 0.5"),
    *((op, name) for op in ("gru", "lstm") for name in ("dh_last + lengths 0 and T", "M = N")),
    ("gru", "reset before + lengths + dh_last"),
    ("silu", "x5"),
    ("layer_norm", "eps 0.1"),
    ("rms_norm", "eps 0.1, b"),
    ("gelu", "x3"),
    ("gelu", "tanh x3"),
    ("relu", "around 6"),
    ("squared_relu", "plain"),
    ("rotary", "everything, half"),
    ("multi_head", "norms + rotary, H = L"),
    ("softmax", "mask (L, S), L = S"),
    ("tied_head", "V = M"),
]


@pytest.mark.parametrize("drawn", [*DRAWN, *NAMED])
def test_gradients_of_a_mistaken_forward_are_its_own(drawn):
    """As automatic differentiation gives them: the derivative of what the mistaken forward returns, along one direction."""
    problem = by_name(*drawn).problem().astype(np.float64) if drawn in NAMED else drawn()
    honest, step, h, tested = run(problem), direction(problem, np.random.default_rng(1)), 1e-5, 0
    for name in problem.op.changes:
        found = mistaken(problem, name)
        if not found or name in NOT_DERIVED or "float16" in name:
            continue
        if all(np.allclose(found[n], honest[n], equal_nan=True) or not np.isfinite(found[n]).all() for n in problem.outputs):
            continue
        ends = [objective(mistaken(moved(problem, step, by), name), problem) for by in (h, -h)]
        value, terms = along(found, problem, step)
        assert abs((ends[0] - ends[1]) / (2 * h) - value) <= 1e-6 * terms, name
        tested += 1
    assert tested >= 3


@pytest.mark.parametrize("op", first(len(CASES) - 5, sorted(CASES, key=LARGEST.__contains__)))
def test_every_mistake_is_seen_in_some_case(op):
    unseen = set(OPS[op].changes)
    for case in CASES[op]:
        if case.name in LARGE or not unseen:
            continue
        problem = case.problem()
        truth = problem.truth(of_dtype(problem.dtype))
        for name in sorted(unseen):
            found = mistaken(problem, name)
            if found and accepted(found, truth) != set(truth.values):
                unseen.discard(name)
    assert unseen == set()


def test_a_mistake_that_cannot_be_made_returns_nothing():
    assert mistaken(by_name("multi_head", "M_out of another width").problem(), "w_o transposed") == {}
    assert mistaken(by_name("softmax", "plain").problem(), "mask=drop") == {}


# --- calls -------------------------------------------------------------------------------------------------------------


def torch_layout(x, h0, state_dict, *, lengths=None, nonlinearity="tanh"):
    """A recurrent layer in torch's own layout, with two biases."""
    p = {name.removesuffix("_l0"): a for name, a in state_dict.items()}
    h, outs = np.zeros((len(x), len(p["weight_hh"])), x.dtype) if h0 is None else h0, []
    for t in range(x.shape[1]):
        z = x[:, t] @ p["weight_ih"].T + h @ p["weight_hh"].T
        z = z + (p["bias_ih"] + p["bias_hh"]) if "bias_ih" in p else z
        new = np.tanh(z) if nonlinearity == "tanh" else np.maximum(z, 0)
        now = np.ones((len(x), 1), bool) if lengths is None else (t < lengths)[:, None]
        outs.append(np.where(now, new, 0))
        h = np.where(now, new, h)
    return np.stack(outs, 1), h


@pytest.mark.parametrize("name", ["plain", "no bias", "no initial state", "relu + lengths + dh_last"])
def test_a_recurrent_layer_in_other_layouts(name):
    def torch_backward(dh, x, h0, state_dict, *, dh_last=None, lengths=None, nonlinearity="tanh"):
        _, cache = npattn.rnn_forward(x, h0, convert.rnn_from_torch(state_dict), lengths=lengths, nonlinearity=nonlinearity)
        g = npattn.rnn_backward(dh, cache, dh_last)
        return {"dx": g.x, "h0": g.h0, "state_dict": convert.rnn_to_torch(g.params, gradients=True)}

    def onnx_forward(x, h0, W, R, B=None, *, lengths=None, nonlinearity="tanh"):
        h, cache = npattn.rnn_forward(x, h0, convert.rnn_from_onnx(W, R, B), lengths=lengths, nonlinearity=nonlinearity)
        return h, cache.h_last

    problem = by_name("rnn", name).problem()
    truth = problem.truth(PRECISIONS["float32"])
    for forward in (torch_layout, onnx_forward):
        assert called(problem, forward)[2] == []
        got = dict(zip(("h", "h_last"), forwards(problem, forward), strict=True))
        assert accepted(got, truth) == {"h", "h_last"}
    _, given, missing = called(problem, torch_backward, backward=True)
    assert missing == []
    assert ("dh_last" in given) == ("dh_last" in problem.cotangents)
    assert accepted(backwards(problem, torch_backward), truth) == set(problem.gradients)


def test_multi_head_in_the_layout_of_torch():
    def forward(x_q, x_k, x_v, state_dict, *, num_heads, mask=None):
        params = convert.multi_head_from_torch(state_dict)
        return npattn.multi_head(x_q, x_k, x_v, params, num_heads, mask=mask)

    def backward(dout, x_q, x_k, x_v, state_dict, *, num_heads, mask=None):
        params = convert.multi_head_from_torch(state_dict)
        g = npattn.multi_head_backward(dout, npattn.multi_head_forward(x_q, x_k, x_v, params, num_heads, mask=mask)[1])
        return {"x_q": g.x_q, "x_k": g.x_k, "x_v": g.x_v, "state_dict": convert.multi_head_to_torch(g.params)}

    takes, tested = {"num_heads", "mask"}, 0
    for case in CASES["multi_head"]:
        problem = case.problem()
        missing = called(problem, forward)[2]
        assert missing == [name for name in problem.options if name not in takes]
        if missing or case.name in LARGE:
            continue
        params = problem.inputs["params"]
        some = len({params.b_q is None, params.b_k is None, params.b_v is None}) > 1
        if params.w_q.shape[1] != params.w_o.shape[1] or params.w_v.shape[1] != params.w_o.shape[1] or some:
            with pytest.raises(NotImplementedError, match="multi_head_to_torch"):
                forwards(problem, forward)
            continue
        truth = problem.truth(of_dtype(problem.dtype))
        got = {"out": forwards(problem, forward), **backwards(problem, backward)}
        assert accepted(got, truth) == set(truth.values), case.name
        tested += 1
    assert tested > 20


def test_gradients_come_in_many_forms():
    problem = by_name("softmax", "mask").problem()
    want = package(problem)["dscores"]
    for returned in (want, (want,), {"dscores": want}, {"scores": want}, npattn.softmax_backward(
        problem.cotangents["dweights"], npattn.softmax_forward(**problem.inputs, **problem.options)[1])):  # fmt: skip
        found = backwards(problem, lambda dweights, scores, *, mask=None, r=returned: r)
        assert found["dscores"] is want or np.array_equal(found["dscores"], want)
    text = backwards(problem, lambda dweights, scores, *, mask=None: None)
    assert text == "the backward returns a NoneType, expected a mapping with dscores"

    problem = by_name("rnn", "plain").problem()

    def backward(dh, x, h0, params):
        return npattn.rnn_backward(dh, npattn.rnn_forward(x, h0, params)[1])

    def with_a_mapping(dh, x, h0, params):
        g = backward(dh, x, h0, params)
        return {"x": g.x, "h0": g.h0, "params": g.params._asdict()}

    for function in (backward, with_a_mapping):
        assert accepted(backwards(problem, function), problem.truth(PRECISIONS["float32"])) == set(problem.gradients)
    text = backwards(problem, lambda dh, x, h0, params: {"x": x, "h0": h0, "params": [x]})
    assert text == "the backward returns params as a list, expected npattn.RNNParams or a mapping"
