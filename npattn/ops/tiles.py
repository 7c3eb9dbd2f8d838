"""Which pairs of queries and keys `npattn.blockwise` computes, in which blocks, and what it knows of them.

Heads that have little to compute are taken together (`bundles`). Queries and keys are cut into tiles, and tiles into parts
(`tiles_of`); the mask says which parts are empty, full, or neither, and `plan` makes blocks of those that are not empty.
`pairs_of` asks for what a block has besides q and k.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from npattn.ops.attention import AttentionCache, visible
from npattn.ops.checks import Array, Shape
from npattn.ops.pairs import ALL, EMPTY, FULL, slices

TILE = (1024, 256)  # queries, keys; where there are fewer of one there are more of the other, up to LONG
LONG = 8192
PARTS = (4, 1)  # what may be left out of a tile, or need no mask, is found in steps of its sides over PARTS
BUNDLE = 1 << 17  # numbers: heads are computed together as long as their queries in a tile are no more
TASKS = 8  # pieces of work that are to be left to share: where there are fewer, tiles are smaller, and square
SMALL = 1 << 25  # multiplications of a product: fewer are not worth a second thread
FEW_ROWS, FEW_FEATURES = 16, 32  # products of fewer take as long


class Heads(NamedTuple):
    """What is computed together: one head, or small ones, which are a slice of one of the axes before (L, D)."""

    number: int
    index: Any  # where q has them
    group: Any  # where k and v have theirs
    names: Any  # for each of them, which of the H heads it is
    of_mask: Any  # where the mask has what they see: only once if it is the same for all
    pattern: str  # equal where they see the same keys


def bundles(c: AttentionCache) -> list[Heads]:
    """All heads, small ones together."""
    lead, most = c.q.shape[:-2], together(c)
    indices = list[Any](np.ndindex(*lead))
    for axis, n in enumerate(lead):
        step = most // max(math.prod(lead[axis + 1 :]), 1)
        if step:
            indices = [(*first, part) for first in np.ndindex(*lead[:axis]) for part in slices(n, step)]
            break
    names = np.broadcast_to(np.arange(lead[-1] if lead else 1), lead or [1])
    found = [(x, group_of(c, x), names[x or 0], of_mask(c, x)) for x in indices]
    return [Heads(number, *rest, repr(rest[-1])) for number, rest in enumerate(found)]


def together(c: AttentionCache) -> int:
    """How many heads at a time: 0 if each by itself."""
    (*lead, L, D), S, same = c.q.shape, c.k.shape[-2], readers(c)
    heads, (high, wide), large = math.prod(lead), TILE, TILE[0] <= L
    if c.mask is not None:  # a block may be as narrow as a part, and as low as what lies between two cuts
        high, wide = min(high, max(L // (len(c.mask.cuts()[0]) + 1), high // 2)), part_of(2)[1]
        large = large and any(c.mask.varies(axis) for axis in range(len(lead)))  # what one need not see another might
    few: int = 0 if large else min(
        BUNDLE // (max(min(L, high), FEW_ROWS) * max(min(D, min(S, wide) // 2), FEW_FEATURES)),
        math.prod(TILE) // (FEW_ROWS * max(S, 1)),  # their keys fit, too
        heads if small(c) else 2 * heads * min(-(-L // TILE[0]), 2) // TASKS,  # something is left to share
    )  # fmt: skip
    if same > 1 and L * same <= FEW_ROWS and heads:
        few = max(few, same)
    return few // same * same if few > 1 else 0  # a group is not divided


def small(c: AttentionCache) -> bool:
    """Whether one thread is done before a second would have helped."""
    (*lead, L, D), (S, E), same = c.q.shape, c.v.shape[-2:], readers(c)
    return bool(math.prod(lead) // same * max(L * same, FEW_ROWS) * S * max(D, E, FEW_FEATURES) < SMALL)


def of_mask(c: AttentionCache, index: Any) -> Any:
    """An index that has the same pairs as this one, shorter along axes that make no difference."""
    if c.mask is None:
        return ()
    whole = (*index, *[ALL] * (c.q.ndim - 2 - len(index)))
    return tuple(i if c.mask.varies(n) else slice(0, 1) if isinstance(i, slice) else 0 for n, i in enumerate(whole))


def readers(c: AttentionCache) -> int:
    """How many heads read a group."""
    return c.q.shape[-3] // max(c.k.shape[-3], 1) or 1 if c.q.ndim > 2 else 1


def group_of(c: AttentionCache, index: Any) -> Any:
    """Where k and v have the groups that these heads read."""
    if not index or len(index) < c.q.ndim - 2:
        return index
    last, n = index[-1], readers(c)
    return (*index[:-1], slice(last.start // n, last.stop // n) if isinstance(last, slice) else last // n)


def each_index(c: AttentionCache, heads: Heads) -> list[Shape]:
    """The indices of each head."""
    numbers = np.arange(math.prod(c.q.shape[:-2])).reshape(c.q.shape[:-2])[heads.index]
    return [tuple(map(int, np.unravel_index(n, c.q.shape[:-2]))) if c.q.ndim > 2 else () for n in numbers.ravel()]


def within(part: slice, whole: slice) -> slice:
    """Where a part of a slice lies in what the slice takes."""
    return slice(part.start - whole.start, part.stop - whole.start)


class Block(NamedTuple):
    """A part of a tile that has to be computed."""

    rows: slice
    cols: slice
    some: slice  # those of its rows that may not see all of it: the rest needs no mask


def tiles_of(c: AttentionCache) -> tuple[list[list[slice]], list[list[slice]]]:
    """The tiles of queries, and those of keys, each as its parts, side by side. Parts end where the mask changes.

    They are the same forwards and backwards: other products could be rounded in another way.
    """
    (*lead, L, _), S, (high, wide) = c.q.shape, c.k.shape[-2], TILE
    heads, few = math.prod(lead), together(c)
    part = part_of(2 if few else 1)
    if not few and not small(c) and (tasks := heads * -(-L // high)) < TASKS:
        high = wide = max(high // (2 if tasks > 1 else 4), 1)
    size = high * wide
    high = max(high, min(LONG, size // max(few * S, S, 1)))
    wide = max(wide, min(LONG, size // max(few * min(L, high), min(L, high), 1)))
    cuts = ((), ()) if c.mask is None else c.mask.cuts()
    rows, cols = (in_parts(n, step, cut) for n, step, cut in zip((L, S), part, cuts, strict=True))
    return in_tiles(rows, high), in_tiles(cols, wide)


def in_parts(n: int, size: int, cuts: Iterable[int]) -> list[slice]:
    """0 to n in parts of at most ``size``; they end at the cuts, too, if they are not much shorter for it."""
    ends = [0]
    for end in (*cuts, n):
        if end == n or end - ends[-1] >= size // 4:
            ends += [*range(ends[-1] + size, int(end), size), int(end)]
    return [slice(*pair) for pair in itertools.pairwise(ends) if pair[0] < pair[1]]


def in_tiles(parts: list[slice], size: int) -> list[list[slice]]:
    """As many parts together as fit into ``size``, but one at least."""
    tiles: list[list[slice]] = []
    for part in parts:
        if tiles and part.stop - tiles[-1][0].start <= size:
            tiles[-1].append(part)
        else:
            tiles.append([part])
    return tiles


def part_of(divisor: int) -> Shape:
    """How many queries and keys are a part of a tile. divisor: 2 in a bundle of heads, whose blocks may be narrow."""
    return tuple(max(n // (parts * divisor), 1) for n, parts in zip(TILE, PARTS, strict=True))


def plan(c: AttentionCache, heads: Heads, rows: list[slice], tiles: list[list[slice]]) -> list[list[Block]]:
    """For each tile of keys what of it these queries may see: by its parts, of which equal ones side by side are one."""
    start, stop = rows[0].start, rows[-1].stop
    if c.mask is None or not tiles:
        return [[Block(slice(start, stop), slice(x[0].start, x[-1].stop), slice(start, start))] for x in tiles]
    states = iter(c.mask.states(heads.of_mask, rows, list(itertools.chain(*tiles))).T.tolist())
    found: list[list[Block]] = []
    for parts in tiles:
        blocks: list[Block] = []
        for cols, state in zip(parts, states, strict=False):
            for first, end in pieces(state):
                partly = [i for i in range(first, end) if state[i] != FULL]
                start, stop = rows[first].start, rows[end - 1].stop
                some = slice(rows[partly[0]].start, rows[partly[-1]].stop) if partly else slice(start, start)
                last = blocks[-1] if blocks else None
                block = Block(slice(start, stop), cols, some)
                if last and (last.rows, last.cols.stop, last.some) == (block.rows, cols.start, some):
                    block = Block(block.rows, slice(blocks.pop().cols.start, cols.stop), some)
                blocks.append(block)
        found.append(blocks)
    return found


def pieces(state: list[int]) -> list[tuple[int, int]]:
    """From the first to the last part that is not empty; in two where full ones lie between others, as in a window."""
    if not any(state):  # EMPTY is 0, and most are in a window
        return []
    seen = [i for i, x in enumerate(state) if x != EMPTY]
    first, end = seen[0], seen[-1] + 1
    for i in range(first + 2, end):
        if state[i] != FULL and state[i - 1] == FULL and any(x != FULL for x in state[first : i - 1]):
            return [(first, i), (i, end)]
    return [(first, end)]


def by_group(x: Array, like: Array) -> Array:
    """(..., H, n, m) as (..., G, H / G n, m)."""
    if x.ndim < 3 or x.shape[-3] in (1, like.shape[-3]):
        return x  # 1: the same for all heads
    H, n, m = x.shape[-3:]
    G = like.shape[-3]
    return x.reshape(*x.shape[:-3], G, H // max(G, 1) * n, m)


class Visible(NamedTuple):
    """What is known of the pairs of a block, besides q and k."""

    bias: Any = None
    some: slice = slice(0)  # those rows of the block that may not see all of it
    allowed: Any = None  # which of their pairs are allowed. None: all
    edge: Any = None  # +inf where allowed, else -inf
    seen: Any = None  # keys of the block that somebody of the group sees. None: all

    def hide(self, s: Array) -> None:
        """-inf where not allowed, without branches, and whatever stands there. NaN where allowed becomes inf."""
        if self.allowed is not None:
            here = s[..., self.some, :]
            if s.dtype.kind == "c":
                np.copyto(here, -np.inf, where=~self.allowed)
            else:
                np.fmin(here, self.edge, out=here)

    def select(self, x: Array, factor: Array) -> None:
        """0 where not allowed. There x is 0 times a factor: nothing is to be done where that is finite."""
        if self.allowed is not None and not np.isfinite(factor[..., self.some, :]).all():
            np.copyto(x[..., self.some, :], 0, where=~self.allowed)


ALL_VISIBLE = Visible()
Hidden = dict[Any, tuple[Array, Array, Array]]  # allowed, edge and seen of `Visible`, of blocks that are seen alike


def pairs_of(c: AttentionCache, heads: Heads, block: Block, kept: Hidden) -> Visible:
    """Which pairs of a block are allowed, and their bias. kept: what is already known of blocks like it."""
    (rows, cols, some), full = block, block.some.start == block.some.stop
    if c.bias is not None:  # it may be -inf anywhere
        allowed, bias = visible(c._replace(mask=None) if full else c, heads.index, rows, cols)
        found = (None,) * 3 if allowed is None else hidden(c, heads, allowed, rows.stop - rows.start, cols.stop - cols.start)
        return Visible(bias, within(rows, rows), *found)
    if full:
        return ALL_VISIBLE
    sizes = some.stop - some.start, cols.stop - cols.start
    key = (heads.pattern, sizes, c.mask.alike(heads.of_mask, some, cols))
    if key not in kept:
        found = hidden(c, heads, c.mask.tile(heads.of_mask, some, cols), *sizes)
        if sum(allowed.size for allowed, *_ in kept.values()) + found[0].size > math.prod(TILE):
            kept.clear()
        kept[key] = found
    allowed, edge, seen = kept[key]
    return Visible(None, within(some, rows), allowed, edge, seen if some == rows else None)  # other rows see all keys


def hidden(c: AttentionCache, heads: Heads, allowed: Array, high: int, wide: int) -> tuple[Array, Array, Array]:
    """allowed, edge and seen of `Visible`."""
    n = (1,) * (c.q[heads.index].ndim - 2)  # as many as it has, or 1 where all see the same
    allowed = np.broadcast_to(allowed, np.broadcast_shapes(allowed.shape, (*n, high, wide)))
    edge = np.subtract(allowed, 0.5, dtype=np.empty(0, c.computing).real.dtype)
    edge *= np.inf
    return allowed, edge, np.asarray(by_group(allowed, c.k[heads.group]).any(-2))


def who_sees(c: AttentionCache, heads: Heads, rows: slice, blocks: list[Block], kept: Hidden) -> Array:
    """Which of these queries see somebody."""
    found = np.zeros((*c.q[heads.index].shape[:-2], rows.stop - rows.start), bool)
    for block in blocks:
        pairs, here = pairs_of(c, heads, block, kept), found[..., within(block.rows, rows)]
        sees = np.ones(here.shape, bool)
        if pairs.allowed is not None:
            sees[..., pairs.some] = pairs.allowed.any(-1)
        here |= sees
    return found
