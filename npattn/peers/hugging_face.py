"""transformers: activations, and the eager attention of models, called as their layers call it.

A mask is finfo.min, added to the scores. The attention of Gemma 2 is Llama's with a softcap; that of gpt-oss has a sink.
And the MLP of Llama, and rotary positions: Llama's turn pairs (i, i + D / 2), GLM's (2i, 2i + 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from npattn.peers import Function, Pair, rank_4
from npattn.peers.findings import Finding
from npattn.peers.pytorch import elementwise, pair


def _eager(model: Any, q: Any, k: Any, v: Any, mask: Any, bias: Any, scale: Any, *, sink: Any = None, **options: Any) -> Any:
    rank_4(q, "eager_attention_forward")
    added = bias
    if mask is not None:
        low = torch.where(mask, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
        added = low if bias is None else bias + low
    layer = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False, sinks=sink)
    scaling = q.shape[-1] ** -0.5 if scale is None else scale
    return model.eager_attention_forward(layer, q, k, v, added, scaling=scaling, **options)[0].transpose(1, 2)


def _with_softcap(q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, scale: Any = None, softcap: Any = None) -> Any:
    return _eager(modeling_gemma2, q, k, v, mask, bias, scale, softcap=softcap)


def _with_sink(q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, scale: Any = None, sink: Any = None) -> Any:
    if sink is None:
        raise NotImplementedError("the attention of gpt-oss always has a sink")
    return _eager(modeling_gpt_oss, q, k, v, mask, bias, scale, sink=sink)


def _in_its_words(
    run: Function, q: Any, k: Any, v: Any, *, mask: Any = None, bias: Any = None, scale: Any = None, **softcap: Any
) -> Any:
    if mask is not None and mask.ndim != 4:
        raise TypeError("the layers give masks of rank 4")
    return run(q, k, v, mask=mask, bias=bias, scale=scale, **softcap)


def _with_a_sink_as_good_as_none(q: Any, *inputs: Any, **options: Any) -> Any:
    return _with_sink(q, *inputs, sink=torch.full((q.shape[1],), -1e4, dtype=q.dtype), **options)


def _gelu(x: Any, *, approximate: str = "none") -> Any:
    """"gelu" and "gelu_new" of a model's hidden_act."""
    return ACT2FN["gelu_new" if approximate == "tanh" else "gelu"](x)


ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "squared_relu": "relu2"}  # other names are the same


def _mlp(x: Any, state_dict: Mapping[str, Any], *, activation: str) -> Any:
    """The MLP of Llama."""
    (F, M), biases = state_dict["gate_proj.weight"].shape, [name for name in state_dict if name.endswith("bias")]
    if len(biases) not in (0, 3) or state_dict["down_proj.weight"].shape[0] != M:
        raise NotImplementedError("the MLP of Llama has all biases or none, and one width M")
    activation = ACTIVATIONS.get(activation, activation)
    config = SimpleNamespace(hidden_size=M, intermediate_size=F, mlp_bias=bool(biases), hidden_act=activation)
    return torch.func.functional_call(modeling_llama.LlamaMLP(config), state_dict, (x,), strict=True)


def _rotary(x: Any, positions: Any, *, layout: str, width: int | None = None, base: float = 10000.0) -> Any:
    """The turn is theirs, in the inputs' dtype. Cosines and sines are given to it: theirs are those of float32 angles."""
    rank_4(x, "apply_rotary_pos_emb")
    R = width or x.shape[-1]
    if layout == "half" and x.shape[-1] != R:
        raise NotImplementedError("Llama turns all columns")
    f = base ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    t = (positions if positions.ndim == 2 else positions[None])[..., None] * f
    angles = torch.cat((t, t), -1)
    model = modeling_llama if layout == "half" else modeling_glm
    return model.apply_rotary_pos_emb(x, x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))[0]


ADAPTERS: dict[str, Pair] = {
    "transformers-eager": pair(_with_softcap),
    "transformers-sink": pair(_with_sink),
    "transformers-gelu": pair(_gelu),
    "transformers-mlp": pair(_mlp),
    "transformers-rotary": pair(_rotary),
    "transformers-relu2": elementwise(ACT2FN["relu2"]),
}
OWN_WORDS: dict[str, Pair] = {
    "transformers-eager": pair(partial(_in_its_words, _with_softcap)),
    "transformers-sink": pair(partial(_in_its_words, _with_a_sink_as_good_as_none)),
}

# --- findings -------------------------------------------------------------------------------------------------------------

PRELUDE = """
    import torch
    from types import SimpleNamespace
    from transformers.models.llama.modeling_llama import eager_attention_forward as eager
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sink
    layer = SimpleNamespace(num_key_value_groups=1, training=False)
    x, low = torch.tensor([[[[1.0], [3.0]]]]), torch.full((1, 1, 2, 2), torch.finfo(torch.float32).min)"""
FINDINGS = [
    Finding("A query that may see no key gets the mean of all values", """
        print(eager(layer, x, x, x, low, scaling=1.0)[0].flatten().tolist())
        """, r"\[2.0, 2.0\]"),
    Finding("The gradient of such a query reaches q and k, as a mask is added to the scores", """
        q = x.clone().requires_grad_()
        eager(layer, q, x, x, low, scaling=1.0)[0].sum().backward()
        print(q.grad.flatten().tolist())
        """, r"\[1.0, 1.0\]"),
    Finding("The softmax of float64 inputs is computed in float32", """
        y = torch.tensor([[[[0.1], [0.2]]]], dtype=torch.float64)
        out, want = eager(layer, y, y, y, None, scaling=1.0)[0].flatten(), (torch.softmax(y @ y.mT, -1) @ y).flatten()
        print(out.dtype, "%.0e" % (out - want).abs().max())
        """, r"torch.float64 \de-0[789]"),
    Finding("gpt-oss: the sink's gradient loses two digits, as the maximum is not detached", """
        torch.manual_seed(0); v, dout = torch.randn(2, 1, 64, 1)  # all scores are 0, and the sink of 1 is the maximum
        def dsink(attend, t):
            layer.sinks = torch.ones(1, dtype=t, requires_grad=True)
            (attend(0 * v.to(t), v.to(t)).flatten() * dout.to(t).flatten()).sum().backward()
            return layer.sinks.grad.item()
        theirs = lambda q, v: with_sink(layer, q[None], q[None], v[None], None, scaling=1.0)[0]
        plain = lambda q, v: torch.softmax(torch.cat([q @ q.mT, layer.sinks.expand(1, 64, 1)], -1), -1)[..., :-1] @ v
        print(*("%.0e" % abs(dsink(f, torch.float32) / dsink(f, torch.float64) - 1) for f in (theirs, plain)))
        """, r"\de-0[56] \de-0[78]"),
]  # fmt: skip
