"""Errors of `Config` and `Relative`, and the buckets of relative positions against loops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from test_blocks import M, decoder_params, encoder_params, normal

from npattn.models.config import Config, Relative
from npattn.models.transformer import DecoderParams, EncoderParams, decoder_forward, encoder_forward


@pytest.mark.parametrize(("given", "error", "text"), [
    ({"num_heads": 2.0}, TypeError, "num_heads is a float, expected an integer"),
    ({"num_heads": True}, TypeError, "num_heads is a bool, expected an integer"),
    ({"num_heads": 0}, ValueError, "num_heads is 0, expected an integer of at least 1"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads is 0, expected an integer of at least 1"),
    ({"num_kv_heads": 3}, ValueError, "num_kv_heads is 3, expected a number that divides num_heads=4"),
    ({"norm": "batch"}, ValueError, "norm is 'batch', expected one of 'layer', 'rms'"),
    ({"norm_eps": -1e-6}, ValueError, "norm_eps is -1e-06, expected a finite number of at least 0"),
    ({"norm_eps": math.nan}, ValueError, "norm_eps is nan, expected a finite number of at least 0"),
    ({"norm_eps": "1e-6"}, TypeError, "norm_eps is a str, expected a Python float"),
    ({"pre_norm": None}, TypeError, "pre_norm is a NoneType, expected True or False"),
    ({"causal": 0}, TypeError, "causal is an int, expected True or False"),
    ({"normalize": "yes"}, TypeError, "normalize is a str, expected True or False"),
    ({"activation": "gelu_new"}, ValueError, "activation is 'gelu_new', expected one of 'gelu', 'gelu_tanh', 'relu'"),
    ({"window": -1}, ValueError, "window is -1, expected an integer of at least 0"),
    ({"window": 2.5}, TypeError, "window is a float, expected an integer"),
    ({"rotary": "half"}, TypeError, "rotary is a str, expected npattn.Rotary"),
    ({"relative": 32}, TypeError, "relative is an int, expected npattn.Relative"),
    ({"scale": "auto"}, TypeError, "scale is a str, expected a Python float"),
    ({"scale": math.inf}, ValueError, "scale is inf, expected a finite number"),
    ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a positive finite number"),
    ({"sinusoidal": "both"}, ValueError, "sinusoidal is 'both', expected one of"),
    ({"first_position": -1}, ValueError, "first_position is -1, expected an integer of at least 0"),
    ({"embedding_scale": math.inf}, ValueError, "embedding_scale is inf, expected a finite number"),
    ({"head_scale": None}, TypeError, "head_scale is a NoneType, expected a Python float"),
    ({"pooling": "cls"}, ValueError, "pooling is 'cls', expected one of 'first', 'last', 'mean'"),
    ({"implementation": "flash"}, ValueError, "implementation is 'flash', expected one of 'dense', 'blockwise'"),
])  # fmt: skip
def test_errors_of_config(given, error, text):
    with pytest.raises(error, match=f"Config: {text}"):
        Config(**{"num_heads": 4, **given})


def test_a_config_is_a_value():
    config = Config(4, norm="rms", scale=1, relative=Relative(8, 16))
    assert config == dataclasses.replace(config)
    assert hash(config) == hash(Config(4, norm="rms", scale=1, relative=Relative(8, 16)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_heads = 5


@pytest.mark.parametrize(("given", "error", "text"), [
    ({"buckets": 3}, ValueError, "buckets is 3, expected an integer of at least 4"),
    ({"buckets": 8.0}, TypeError, "buckets is a float, expected an integer"),
    ({"buckets": 32, "max_distance": 16}, ValueError, "max_distance is 16, expected an integer of at least 17"),
    ({"max_distance": None}, TypeError, "max_distance is a NoneType, expected an integer"),
])  # fmt: skip
def test_errors_of_relative(given, error, text):
    with pytest.raises(error, match=f"Relative: {text}"):
        Relative(**given)


def bucket(distance, buckets, far, causal):
    """Raffel et al. 2020, section 2.1, for one distance."""
    behind = 0
    if causal:
        n = max(-distance, 0)
    else:
        buckets //= 2
        n, behind = abs(distance), buckets if distance > 0 else 0
    near = buckets // 2
    if n < near:
        return behind + n
    return behind + min(near + math.floor(math.log(n / near) / math.log(far / near) * (buckets - near)), buckets - 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "far"), [(9, 23), (32, 101), (4, 3)])  # no distance lies on the edge of two buckets
def test_buckets_are_those_of_loops(buckets, far, causal):
    distances = np.arange(-300, 301)
    want = [bucket(int(d), buckets, far, causal) for d in distances]
    assert Relative(buckets, far).of(distances, causal).tolist() == want


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_table_and_relative_go_together(stack):
    x, table = normal(0, 2, 5, M), normal(1, 8, 4)

    def run(bias, config):
        if stack == "encoder":
            return encoder_forward(x, EncoderParams((encoder_params(),), None, bias), config)
        return decoder_forward(x, normal(2, 2, 7, 8), DecoderParams((decoder_params(),), None, bias), config)

    run(table, Config(4, 2, relative=Relative(8, 16)))
    with pytest.raises(ValueError, match=f"{stack}: params.bias and config.relative go together, got an array of dtype"):
        run(table, Config(4, 2))
    with pytest.raises(ValueError, match=f"{stack}: params.bias and config.relative go together, got a NoneType"):
        run(None, Config(4, 2, relative=Relative(8, 16)))
    with pytest.raises(ValueError, match="RelativeTable: buckets reaches from"):
        run(table[:4], Config(4, 2, relative=Relative(8, 16)))
