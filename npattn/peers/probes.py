"""Probes: small questions to a library in its own words. The answers are values of the fields of a convention."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from typing import Any

import numpy as np

from npattn.ops.attention import attention
from npattn.ops.checks import Array
from npattn.peers import PEERS


def _which(got: Array, values: dict[str, Array]) -> str:
    """The value whose result this is, or nothing."""
    return next((n for n, x in values.items() if np.allclose(got, x, rtol=1e-4, atol=1e-5, equal_nan=True)), "")


class Probes:
    """What one library does in each conflict, by asking it; a field that it has no argument for is not in `found`."""

    def __init__(self, name: str) -> None:
        self.peer, self.call, self.found = PEERS[name], PEERS[name].own_words()[0], dict[str, str]()
        rng = np.random.default_rng(0)
        self.q, self.k, self.v = (rng.standard_normal((1, 2, n, 4)).astype(np.float32) for n in (3, 5, 5))
        for probe in (
            self.layout, self.mask, self.mask_shape, self.causal, self.mask_with_causal, self.lse, self.dead, self.dead_grad,
            self.softcap, self.window, self.heads, self.scale, self.scale_on, self.masked_nan, self.float64,
        ):  # fmt: skip
            # An argument that it does not take is a TypeError, a call that it refuses anything.
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.found |= {n: x for n, x in probe().items() if x}

    # -- how it is asked

    def both(self, q: Any = None, k: Any = None, v: Any = None, **options: Any) -> tuple[Array, Any]:
        """out and lse in npattn's layout, lse None where there is none; a mask is True where a key is seen."""
        turn = self.found.get("layout") == "BLHD"
        given = [own if x is None else x for x, own in ((q, self.q), (k, self.k), (v, self.v))]
        if self.found.get("mask") == "drop" and options.get("mask") is not None:
            options["mask"] = ~options["mask"]
        returned = self.call(*(np.ascontiguousarray(x.swapaxes(1, 2)) if turn else x for x in given), **options)
        out, lse = returned if isinstance(returned, tuple) else (returned, None)
        if self.found.get("lse_layout") == "BLH":
            lse = lse.swapaxes(1, 2)
        return out.swapaxes(1, 2) if turn else out, lse

    def ask(self, q: Array | None = None, k: Array | None = None, v: Array | None = None, **options: Any) -> Array:
        return self.both(q, k, v, **options)[0]

    def right(self, mask: Array | None = None, **options: Any) -> Array:
        """What is right where a query may see the keys of this mask."""
        return np.asarray(attention(self.q, self.k, self.v, mask=mask, **options))

    def seen(self, *shape: int) -> Array:
        """A mask; a query sees key 0 and some others."""
        mask = np.random.default_rng(1).random(shape) < 0.6
        mask[..., 0] = True
        return mask

    def full(self) -> Array:
        return np.array(np.broadcast_to(self.seen(3, 5), (1, 2, 3, 5)))

    # -- what it is asked

    def layout(self) -> dict[str, str]:
        x = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
        values = {"BHLD": x.mean(2, keepdims=True) + 0 * x, "BLHD": x.mean(1, keepdims=True) + 0 * x}
        return {"layout": _which(self.ask(0 * x, 0 * x, x), values)}

    def mask(self) -> dict[str, str]:
        mask = self.full()
        return {"mask": _which(self.ask(mask=mask), {"keep": self.right(mask), "drop": self.right(~mask)})}

    def mask_shape(self) -> dict[str, str]:
        for shape in ((3, 5), (1, 1, 1, 5), (1, 1, 3, 1)):
            mask = self.seen(*shape)
            try:
                broadcast = _which(self.ask(mask=mask), {"broadcast": self.right(mask)})
            except Exception:
                broadcast = ""
            if not broadcast:
                return {"mask_shape": "full"}
        return {"mask_shape": "broadcast"}

    def causal(self) -> dict[str, str]:
        values = {n: self.right(np.tri(3, 5, d, dtype=bool)) for n, d in (("top_left", 0), ("bottom_right", 2))}
        return {"causal": _which(self.ask(causal=True), values)}

    def mask_with_causal(self) -> dict[str, str]:
        if "causal" not in self.found:
            return {}
        lower = np.tri(3, 5, 0 if self.found["causal"] == "top_left" else 2, dtype=bool)
        try:
            got = self.ask(mask=self.full(), causal=True)
        except Exception:
            return {"mask_with_causal": "error"}
        return {"mask_with_causal": _which(got, {"intersect": self.right(self.full() & lower)})}

    def dead(self) -> dict[str, str]:
        mask = self.full()
        mask[..., 1, :] = False
        out, lse = self.both(mask=mask)
        row = out[..., 1, :]
        values = {"zero": np.zeros_like(row), "mean_v": self.v.mean(2), "nan": np.full(row.shape, np.nan, row.dtype)}
        found = {"dead_out": _which(row, values)}
        if lse is not None:
            number = float(lse[0, 0, 1])
            found["dead_lse"] = {-math.inf: "-inf", math.inf: "+inf", 0.0: "zero"}.get(number, "fill" if number < -1e30 else "")
        return found

    def dead_grad(self) -> dict[str, str]:
        _, backward = self.peer.load()
        if backward is None or "q" not in inspect.signature(backward).parameters:  # a layer takes x_q, and projects it
            return {}
        mask, dout = np.zeros((1, 2, 3, 5), bool), np.ones_like(self.q)
        always = {"sink": np.zeros(2, np.float32)} if "sink" in inspect.signature(backward).parameters else {}
        grads = backward(dout, self.q, self.k, self.v, mask=mask, **always)
        if all((grads[n] == 0).all() for n in ("dq", "dk", "dv")):
            return {"dead_grad": "zero"}
        alone = (grads["dq"] == 0).all() and (grads["dk"] == 0).all() and np.allclose(grads["dv"], 3 / 5)
        return {"dead_grad": "leak" if alone else "undefined"}

    def lse(self) -> dict[str, str]:
        _, lse = self.both()
        layout = "BLH" if lse.shape == (1, 3, 2) else "BHL"
        _, natural = attention(self.q, self.k, self.v, return_lse=True)
        values = {"natural": natural, "log2": natural / math.log(2)}
        return {"lse_layout": layout, "lse": _which(lse.swapaxes(1, 2) if layout == "BLH" else lse, values)}

    def softcap(self) -> dict[str, str]:
        bias = np.random.default_rng(2).standard_normal((1, 2, 3, 5)).astype(np.float32)
        raw = self.q @ self.k.swapaxes(-1, -2) / 2

        def of(scores: Array) -> Array:
            e = np.exp(scores - scores.max(-1, keepdims=True))
            return np.asarray((e / e.sum(-1, keepdims=True)) @ self.v)

        order = _which(
            self.ask(bias=bias, softcap=1.0), {"before_bias": of(np.tanh(raw) + bias), "after_bias": of(np.tanh(raw + bias))}
        )
        mask = self.full()
        leaks = np.allclose(self.ask(mask=mask, softcap=1.0), of(np.where(mask, np.tanh(raw), -1.0)), atol=1e-5)
        return {"softcap": "after_mask" if leaks else order}

    def window(self) -> dict[str, str]:
        far = np.arange(5) - np.arange(3)[:, None]
        values = {n: self.right((far >= -d) & (far <= 0)) for n, d in (("inclusive", 2), ("total", 1))}
        found = {"window": _which(self.ask(window=(2, 0)), values)}
        right = self.right(far <= 0)
        for text, number in (("None", None), ("-1", -1)):
            with contextlib.suppress(Exception):
                if _which(self.ask(window=(number, 0)), {text: right}):
                    found.setdefault("no_limit", text)
        return found

    def heads(self) -> dict[str, str]:
        q = np.concatenate([self.q, -self.q], 1)
        tile = attention(q, np.tile(self.k, (1, 2, 1, 1)), np.tile(self.v, (1, 2, 1, 1)))
        return {"heads": _which(self.ask(q), {"repeat": attention(q, self.k, self.v), "tile": tile})}

    def scale(self) -> dict[str, str]:
        if self.peer.library == "transformers":  # it has no default
            return {}
        return {"scale": _which(self.ask(), {"rsqrt": self.right(), "none": self.right(scale=1.0)})}

    def scale_on(self) -> dict[str, str]:
        got = self.ask(scale=-0.5)
        return {"scale_on": "both" if np.isnan(got).all() else _which(got, {"scores": self.right(scale=-0.5)})}

    def masked_nan(self) -> dict[str, str]:
        mask, v = self.full(), self.v.copy()
        mask[..., 2], v[..., 2, :] = False, np.nan
        return {"masked_nan": "poisons" if np.isnan(self.ask(v=v, mask=mask)).any() else "contained"}

    def float64(self) -> dict[str, str]:
        x = [a.astype(np.float64) / 3 for a in (self.q, self.k, self.v)]
        error = np.abs(self.ask(*x) - attention(*x)).max()
        return {"float64": "float32" if error > 1e-11 else "float64"}
