"""An n-gram model with modified Kneser-Ney smoothing: what a language model without any learned vector reaches.

    p_k(w | h) = max(c_k(h w) - D(c_k(h w)), 0) / c_k(h) + g(h) p_{k-1}(w | h')    (1)    h: k - 1 tokens, h': without the first
    g(h)       = (D_1 N_1(h) + D_2 N_2(h) + D_3 N_3(h)) / c_k(h)                   (2)    N_i: tokens seen i times behind h
    D_i        = i - (i + 1) Y n_{i+1} / n_i           Y = n_1 / (n_1 + 2 n_2)     (3)    n_i: k-grams seen i times
    p_0(w)     = 1 / V                                                             (4)

c_k counts the k-grams of the text at the highest order, and at each lower one the tokens that stand before a k-gram. A context
that was never seen has p_{k-1}. N_3 and D_3 are those of three times and more. Chen and Goodman 1998.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npattn.ops.checks import Array, check_integer


@dataclass(frozen=True)
class _Order:
    """The k-grams of one order, as sorted numbers: the last token has the lowest bits."""

    grams: Array
    counts: Array
    contexts: Array
    totals: Array  # c_k(h) of each context
    kept: Array  # g(h)
    discounts: Array  # by count: 0, D_1, D_2, D_3


class KneserNey:
    """The model of a row of tokens.

    tokens : (T,) integers 0 to V - 1   order : the longest n-gram has so many tokens
    Raises TypeError, ValueError.

    >>> text = np.frombuffer(b"abracadabra " * 20, np.uint8)
    >>> bool(-KneserNey(text, V=256, order=3).log2(text).mean() < 1)  # bits a token
    True
    """

    def __init__(self, tokens: Array, V: int, order: int = 6) -> None:
        self.bits = max(int(check_integer("KneserNey", "V", V, least=1) - 1).bit_length(), 1)
        if check_integer("KneserNey", "order", order, least=1) * self.bits > 63:
            raise ValueError(f"KneserNey: order is {order}, expected at most {63 // self.bits} for V={V}: 63 bits an n-gram")
        self.V, self.order = V, order
        self.orders: list[_Order] = []
        grams, counts = np.unique(self._grams(np.asarray(tokens), order), return_counts=True)
        for k in range(order, 0, -1):
            self.orders.insert(0, self._made(grams, counts))
            if k > 1:  # what stands before a (k-1)-gram: each k-gram counts once
                grams, counts = np.unique(grams & np.int64((1 << self.bits * (k - 1)) - 1), return_counts=True)

    def _grams(self, tokens: Array, k: int) -> Array:
        """The k-grams of a text as numbers, (T - k + 1,)."""
        T = max(len(tokens) - k + 1, 0)
        found = np.zeros(T, np.int64)
        for n in range(k):
            found = (found << self.bits) | tokens[n : n + T].astype(np.int64)
        return found

    def _made(self, grams: Array, counts: Array) -> _Order:
        n1, n2, n3, n4 = (int((counts == i).sum()) for i in range(1, 5))
        Y = n1 / (n1 + 2 * n2) if n1 else 0.0
        discounts = [0.0]
        for i, (a, b) in enumerate(((n1, n2), (n2, n3), (n3, n4)), 1):
            # In a text that is too small for (3) the discount is half a count: it has to be from 0 to i.
            d = i - (i + 1) * Y * b / a if a else 0.5
            discounts.append(d if 0 < d <= i and Y else 0.5)
        D = np.array(discounts)  # (3)
        contexts, start = np.unique(grams >> self.bits, return_index=True)
        if not len(grams):
            return _Order(grams, counts, contexts, counts, D[:0], D)
        totals = np.add.reduceat(counts, start)
        kept = np.add.reduceat(D[np.minimum(counts, 3)], start) / totals  # (2)
        return _Order(grams, counts, contexts, totals, kept, D)

    def log2(self, tokens: Array) -> Array:
        """The logarithm to base 2 of the probability of each token behind those before it, (T,)."""
        tokens = np.asarray(tokens)
        p = np.full(len(tokens), 1 / self.V)  # (4)
        for k, of in enumerate(self.orders, 1):
            grams = self._grams(tokens, k)
            if not len(grams) or not len(of.grams):
                break
            here = p[k - 1 :]  # the first k - 1 tokens have no context of this length
            at = np.minimum(np.searchsorted(of.contexts, grams >> self.bits), len(of.contexts) - 1)
            known = of.contexts[at] == grams >> self.bits
            seen = np.minimum(np.searchsorted(of.grams, grams), len(of.grams) - 1)
            count = np.where(of.grams[seen] == grams, of.counts[seen], 0)
            own = np.maximum(count - of.discounts[np.minimum(count, 3)], 0) / of.totals[at]
            here[known] = (own + of.kept[at] * here)[known]  # (1)
        return np.asarray(np.log2(p))


__all__ = ["KneserNey"]
