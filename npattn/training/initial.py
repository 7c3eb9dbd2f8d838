"""Models with parameters that were never trained.

What a config.json means is made: weights (n_in, n_out) are normal with variance 1 / n_in, so that a layer keeps the size of
what it takes. The weights that write to a residual stream are smaller by the root of their number, as in GPT-2: else the stream
grows with each block. Biases are 0, norms 1, and tables 0.02 as in GPT-2. An LSTM begins with a forget gate that keeps: its
bias is 1 (Gers et al. 2000).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from npattn.models.config import Config
from npattn.models.layouts import Slot, layout_of
from npattn.models.model import Model, as_dtype
from npattn.models.trees import named_leaves, tree_map
from npattn.ops.checks import Array
from npattn.ops.lstm import LSTMParams

TABLE = 0.02  # the standard deviation of embeddings
RESIDUAL = ("w_o", "w_out")
TABLES = ("table", "positions", "types", "bias")


def initial(settings: Mapping[str, Any], seed: int, *, tokenizer: Any = None, dtype: Any = "float32") -> Model:
    """The model of a config.json with new parameters, which depend on the settings and the seed alone.

    settings : as in config.json, such as {"model_type": "gpt2", ...}; see `npattn.models.layouts`
    Raises TypeError, ValueError.

    >>> sizes = {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    >>> model = initial({"model_type": "gpt2", **sizes}, seed=0)
    >>> model.forward(np.array([[1, 2, 3]]))[0].shape
    (1, 3, 11)
    """
    layout, to = layout_of(settings), as_dtype(dtype)
    slots = named_leaves(layout.params)
    rng, names = np.random.default_rng(seed), iter(slots)
    writes = max(sum(name.endswith(RESIDUAL) for name in slots), 1)

    def one(slot: Slot) -> Array:
        name = next(names).rpartition(".")[2]
        shape = slot.read(np.broadcast_to(np.float32(0), slot.shape)).shape
        if len(shape) < 2:
            return np.full(shape, float(name == "g"), to)
        scale = TABLE if name in TABLES else shape[0] ** -0.5 / (writes**0.5 if name in RESIDUAL else 1)
        return (scale * rng.standard_normal(shape)).astype(to)

    params = tree_map(one, layout.params)
    if layout.kind == "recurrent language model":
        params = params._replace(layers=tuple(_remembers(layer) for layer in params.layers))
    config = replace(layout.config, implementation="blockwise") if isinstance(layout.config, Config) else layout.config
    return Model(layout.kind, config, params, settings, tokenizer=tokenizer)


def _remembers(layer: Any) -> Any:
    if isinstance(layer, LSTMParams) and layer.b is not None:
        N = len(layer.w_h)
        layer.b[N : 2 * N] = 1
    return layer


__all__ = ["initial"]
