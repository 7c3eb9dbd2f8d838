"""Installed libraries as candidates, by name: PEERS. One file a library holds its adapters and what it is asked.

An adapter translates representation only: layout, polarity of masks, tensors, names. It repairs no value: what the library
does is what is judged. What a library has no argument for is not in the signature, or is a NotImplementedError with the
reason. The file of a library is imported when it is needed; a missing library is an ImportError that says what to install.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from npattn.ops.checks import Array

Function: TypeAlias = Callable[..., Any]
Pair: TypeAlias = tuple[Function, Function | None]  # forward, backward

# The file of each library:
#   ADAPTERS   name of the peer -> forward and backward in npattn's words
#   OWN_WORDS  likewise, but what is given is handed on as it is, and comes back as it is: layout, polarity and shape of masks,
#              windows and lse are the library's. Probes ask it, and its preset has to describe it.
#   PRELUDE    the code that stands before each finding
#   FINDINGS   what the library does that a user should know, as code with what it prints
MODULES = {
    "torch": "pytorch",
    "jax": "jax_nn",
    "onnx": "onnx_reference",
    "onnxruntime": "onnx_runtime",
    "transformers": "hugging_face",
    "scipy": "scipy_special",
}


@dataclass(frozen=True)
class Peer:
    """A function of an installed library."""

    name: str
    op: str
    library: str
    preset: str = ""  # of the conventions; a peer that has one is in OWN_WORDS

    def load(self) -> Pair:
        pair: Pair = module(self.library).ADAPTERS[self.name]
        return pair

    def own_words(self) -> Pair:
        pair: Pair = module(self.library).OWN_WORDS[self.name]
        return pair


PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch", "attention", "torch", "torch_sdpa"),
        Peer("torch-math", "attention", "torch", "torch_sdpa"),
        Peer("torch-flash", "attention", "torch", "torch_sdpa"),
        Peer("torch-flex", "attention", "torch", "torch_flex"),
        Peer("jax", "attention", "jax", "jax"),
        Peer("onnx", "attention", "onnx", "onnx25"),
        Peer("onnxruntime", "attention", "onnxruntime", "onnxruntime"),
        Peer("transformers-eager", "attention", "transformers", "hf_eager"),
        Peer("transformers-sink", "attention", "transformers", "hf_eager"),
        Peer("transformers-rotary", "rotary", "transformers"),
        Peer("torch-mha", "multi_head", "torch", "torch_mha"),
        Peer("torch-mha-weights", "multi_head", "torch", "torch_mha"),
        Peer("torch-mha-fast", "multi_head", "torch"),
        Peer("torch-rnn", "rnn", "torch"),
        Peer("onnx-rnn", "rnn", "onnx"),
        Peer("onnxruntime-rnn", "rnn", "onnxruntime"),
        *(Peer(f"{library}-{op}", op, library) for op in ("gru", "lstm") for library in ("torch", "onnx", "onnxruntime")),
        Peer("scipy-softmax", "softmax", "scipy"),
        Peer("torch-softmax", "softmax", "torch"),
        Peer("torch-cross-entropy", "cross_entropy", "torch"),
        Peer("jax-softmax", "softmax", "jax"),
        Peer("torch-layer-norm", "layer_norm", "torch"),
        Peer("torch-rms-norm", "rms_norm", "torch"),
        Peer("torch-silu", "silu", "torch"),
        Peer("jax-silu", "silu", "jax"),
        Peer("torch-sigmoid", "sigmoid", "torch"),
        Peer("jax-sigmoid", "sigmoid", "jax"),
        Peer("torch-gelu", "gelu", "torch"),
        Peer("jax-gelu", "gelu", "jax"),
        Peer("onnx-gelu", "gelu", "onnx"),
        Peer("onnxruntime-gelu", "gelu", "onnxruntime"),
        Peer("transformers-gelu", "gelu", "transformers"),
        Peer("torch-relu", "relu", "torch"),
        Peer("jax-relu", "relu", "jax"),
        Peer("transformers-relu2", "squared_relu", "transformers"),
        Peer("torch-linear", "linear", "torch"),
        Peer("torch-embedding", "embedding", "torch"),
        Peer("jax-embedding", "embedding", "jax"),
        Peer("torch-tied-head", "tied_head", "torch"),
        Peer("transformers-mlp", "gated_feed_forward", "transformers"),
    )
}


def module(library: str) -> Any:
    """The file of a library; raises ImportError where the library is not installed."""
    try:
        return importlib.import_module(f"npattn.peers.{MODULES[library]}")
    except ImportError as error:
        missing = (error.name or library).partition(".")[0]
        raise ImportError(f"{missing} is not installed: pip install npattn[peers], or {missing} alone") from error


def rank_4(q: Array, where: str) -> None:
    if q.ndim != 4:
        raise NotImplementedError(f"{where} takes inputs of rank 4")


def one_of(mask: Any, bias: Any) -> Any:
    """The argument of a library that has one for a boolean mask and a bias."""
    if mask is not None and bias is not None:
        raise NotImplementedError("one argument for a mask or a bias")
    return bias if mask is None else mask
