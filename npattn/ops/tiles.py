"""The pieces in which `npattn.blockwise` computes, and the mask and bias of each.

Heads with few scores are computed together (`Plan.heads`). Queries and keys are cut into tiles, and tiles into parts
(`Plan.rows`, `Plan.cols`). The mask says which parts are empty, full, or neither, and `Plan.blocks` makes blocks of those that
are not empty. `Plan.pairs_of` gives the mask and bias of a block. `Sizes` says how large all of these are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from npattn.ops import exponentials
from npattn.ops.calls import Call, visible
from npattn.ops.checks import Array, Shape
from npattn.ops.pairs import ALL, EMPTY, FULL
from npattn.ops.products import FEW_FEATURES, FEW_ROWS, Buffers, by_group


@dataclass(frozen=True)
class Sizes:
    """How large the pieces are. docs/blockwise.md explains the reasons."""

    # Queries and keys of a tile. Its scores are 1 MiB in float32, about a second-level cache. Smaller tiles cost more time in
    # Python and in the packing of factors, larger ones in memory access. If there are fewer queries than that, a tile has more
    # keys, and vice versa, up to ``long``: q or k of that length is 2 MiB for D = 64.
    tile: Shape = (1024, 256)
    long: int = 8192
    # Into how many parts the sides of a tile are cut, here of 256 queries and 256 keys. A part may be left out, or needs no
    # mask. On the diagonal of causal() half of a part is computed for nothing; the products of smaller parts are slower.
    parts: Shape = (4, 1)
    bundle: int = 1 << 17  # numbers of q in a tile: heads are computed together up to this size, 512 KiB in float32
    tasks: int = 8  # pieces of work, four for each of two threads: if there would be fewer, tiles have half as many queries
    small: int = 1 << 25  # multiplications of a product, about 1 ms: fewer are not worth a second thread, see docs/blockwise.md
    light: int = 1 << 20  # numbers of q, k or v: the same for work once for each query or key, some passes over 4 MiB
    dense: int = 1 << 20  # scores at a time if the code of `npattn.attention` takes over, which has whole arrays of them
    own_gradients: int = 1 << 20  # numbers in all tasks' own gradients of a bias: if there were more, tasks share one gradient
    few_rows: int = FEW_ROWS  # of a product
    few_features: int = FEW_FEATURES
    threads: int | None = None  # as many as BLAS has, unless given


SIZES = Sizes()


SAMPLE = 8  # rows


class Heads(NamedTuple):
    """Heads that are computed together: one head, or several small ones, a slice of one of the axes before (L, D)."""

    number: int
    index: Any  # where q has them
    group: Any  # where k and v have the groups that they read
    head_numbers: Any  # for each of them its number among the H heads
    mask_index: Any  # where the mask has their pairs; shorter than index if they are the same for several heads
    pattern: str  # a key: heads with equal keys have the same mask


class Block(NamedTuple):
    """A part of a tile that has to be computed."""

    rows: slice
    cols: slice
    masked_rows: slice  # the rows that may not see all of its keys: other rows need no mask
    mask_key: int | None = None  # where there are such rows: blocks with equal keys have the same mask


class Visible(NamedTuple):
    """The mask and bias of a block."""

    bias: Any = None
    masked_rows: slice = slice(0)  # the rows of the block that may not see all of its keys
    allowed: Any = None  # which of their pairs are allowed. None: all
    upper_bound: Any = None  # of exponentials: +inf where allowed, else 0
    seen_keys: Any = None  # keys of the block that some query of the group sees. None: all

    def hide(self, s: Array) -> None:
        """Set scores to -inf where not allowed, whatever is there."""
        if self.allowed is not None:
            np.copyto(s[..., self.masked_rows, :], -np.inf, where=~self.allowed)

    def sample(self, s: Array) -> Array:
        """Some rows of scores, 0 where not allowed."""
        if self.allowed is None or self.masked_rows.start >= SAMPLE:
            return s[..., :SAMPLE, :]
        return np.where(self.allowed[..., :SAMPLE, :], s[..., self.masked_rows, :][..., :SAMPLE, :], 0)

    def clear(self, e: Array) -> None:
        """Set exponentials to 0 where not allowed, without branches, whatever is there. Where allowed, NaN becomes inf."""
        if self.allowed is not None:
            here = e[..., self.masked_rows, :]
            if e.dtype.kind == "c":
                np.copyto(here, 0, where=~self.allowed)
            else:
                np.fmin(here, self.upper_bound, out=here)

    def select(self, x: Array, factor: Array) -> None:
        """0 where not allowed. There x is 0 times ``factor``, so nothing has to be done if the factor is finite."""
        if self.allowed is not None and not np.isfinite(factor[..., self.masked_rows, :]).all():
            np.copyto(x[..., self.masked_rows, :], 0, where=~self.allowed)


ALL_VISIBLE = Visible()


class Plan:
    """The pieces in which a call with an axis of heads is computed.

    Forward and backward have the same: the products of other tiles could be rounded in another way.
    """

    def __init__(self, call: Call, sizes: Sizes = SIZES) -> None:
        self.call, self.sizes = call, sizes
        self.lead, (self.L, self.D), (self.S, self.E) = call.q.shape[:-2], call.q.shape[-2:], call.v.shape[-2:]
        # A bias would have to be scaled in each tile.
        self.base = exponentials.fastest(call.computing) if call.bias is None else exponentials.BASE_E
        self.readers = self.lead[-1] // max(call.k.shape[-3], 1) or 1  # heads of a group
        # Whether the work is too small for a second thread.
        rows, columns = max(self.L * self.readers, sizes.few_rows), max(self.D, self.E, sizes.few_features)
        self.small = math.prod(self.lead) // self.readers * rows * self.S * columns < sizes.small
        # The most threads that are of use. To read many keys takes longer than to multiply them by a few queries.
        self.most = 1 if self.small and call.k.size + call.v.size < sizes.light else None
        self.heads_together = self._heads_together()
        self.heads = self._bundles()
        self.row_parts, self.col_parts = self._tiles()  # each tile as its parts, side by side
        self.rows, self.cols = ([slice(x[0].start, x[-1].stop) for x in tiles] for tiles in (self.row_parts, self.col_parts))
        self.blocks_found: dict[tuple[str, int], list[list[Block]]] = {}
        self.mask_keys, self.next_key = dict[Any, int](), itertools.count()
        self.bases: dict[tuple[int, int], exponentials.Base] = {}  # by heads and tile of queries: as the forward took it

    def _heads_together(self) -> int:
        """How many heads are computed together; 0 if each by itself."""
        mask, sizes, heads, same = self.call.mask, self.sizes, math.prod(self.lead), self.readers
        (high, wide), large = sizes.tile, sizes.tile[0] <= self.L
        if mask is not None:  # a block may be as small as a part of the keys by the queries between two cuts
            high, wide = min(high, max(self.L // (len(mask.cuts()[0]) + 1), high // 2)), self._part(2)[1]
            large = large and any(mask.varies(axis) for axis in range(len(self.lead)))  # a head may need what another skips
        rows, columns = max(min(self.L, high), sizes.few_rows), max(min(self.D, min(self.S, wide) // 2), sizes.few_features)
        few: int = 0 if large else min(
            sizes.bundle // (rows * columns),
            math.prod(sizes.tile) // (sizes.few_rows * max(self.S, 1)),  # their keys fit, too
            heads if self.small else 2 * heads * min(-(-self.L // sizes.tile[0]), 2) // sizes.tasks,  # tasks have to be left
        )  # fmt: skip
        if same > 1 and self.L * same <= sizes.few_rows and heads:
            few = max(few, same)
        return few // same * same if few > 1 else 0  # a group is not divided

    def _bundles(self) -> list[Heads]:
        """All heads, small ones in bundles."""
        lead = self.lead
        indices = list[Any](itertools.product(*map(range, lead)))
        for axis, n in enumerate(lead):
            step = self.heads_together // max(math.prod(lead[axis + 1 :]), 1)
            if step:
                parts = in_parts(n, step)
                indices = [(*first, part) for first in np.ndindex(*lead[:axis]) for part in parts]
                break
        head_numbers = np.broadcast_to(np.arange(lead[-1]), lead)
        found = [(x, self.group_of(x), head_numbers[x], self._mask_index(x)) for x in indices]
        return [Heads(number, *rest, repr(rest[-1])) for number, rest in enumerate(found)]

    def _mask_index(self, index: Any) -> Any:
        """An index of the mask with the same pairs: along axes on which the mask does not depend it takes one element."""
        mask = self.call.mask
        if mask is None:
            return ()
        whole = (*index, *[ALL] * (len(self.lead) - len(index)))
        return tuple(i if mask.varies(n) else slice(0, 1) if isinstance(i, slice) else 0 for n, i in enumerate(whole))

    def group_of(self, index: Any) -> Any:
        """The index in k and v of the groups that these heads read."""
        if len(index) < len(self.lead):
            return index
        last, n = index[-1], self.readers
        return (*index[:-1], slice(last.start // n, last.stop // n) if isinstance(last, slice) else last // n)

    def each_index(self, heads: Heads) -> list[Shape]:
        """The indices of each head."""
        numbers = np.arange(math.prod(self.lead)).reshape(self.lead)[heads.index]
        return [tuple(map(int, np.unravel_index(n, self.lead))) for n in numbers.ravel()]

    def _part(self, divisor: int) -> Shape:
        """How many queries and keys a part of a tile has. divisor : 2 in a bundle of heads, whose blocks may be small"""
        return tuple(max(n // (m * divisor), 1) for n, m in zip(self.sizes.tile, self.sizes.parts, strict=True))

    def _tiles(self) -> tuple[list[list[slice]], list[list[slice]]]:
        """The tiles of queries, and those of keys, each as its parts. Parts end where the mask changes."""
        (high, wide), long, few, mask = self.sizes.tile, self.sizes.long, self.heads_together, self.call.mask
        part = self._part(2 if few else 1)
        if not few and not self.small and math.prod(self.lead) * -(-self.L // high) < self.sizes.tasks:
            high = max(high // 2, 1)
        size = high * wide
        high = max(high, min(long, size // max(few * self.S, self.S, 1)))
        wide = max(wide, min(long, size // max(few * min(self.L, high), min(self.L, high), 1)))
        cuts = ((), ()) if mask is None else mask.cuts()
        rows, cols = (in_parts(n, step, cut) for n, step, cut in zip((self.L, self.S), part, cuts, strict=True))
        return in_tiles(rows, high), in_tiles(cols, wide)

    def blocks(self, heads: Heads, i: int) -> list[list[Block]]:
        """For each tile of keys, its blocks for the queries of tile i. Adjacent parts that are alike form one block."""
        if (key := (heads.pattern, i)) not in self.blocks_found:
            self.blocks_found[key] = self._blocks(heads, i)
        return self.blocks_found[key]

    def _blocks(self, heads: Heads, i: int) -> list[list[Block]]:
        rows, whole, mask = self.row_parts[i], self.rows[i], self.call.mask
        if mask is None or not self.cols:
            return [[Block(whole, cols, slice(whole.start, whole.start))] for cols in self.cols]
        states = iter(mask.states(heads.mask_index, rows, list(itertools.chain(*self.col_parts))).T.tolist())
        found: list[list[Block]] = []
        for parts in self.col_parts:
            blocks: list[Block] = []
            for cols, state in zip(parts, states, strict=False):
                for first, end in pieces(state):
                    partly = [n for n in range(first, end) if state[n] != FULL]
                    start, stop = rows[first].start, rows[end - 1].stop
                    masked_rows = slice(rows[partly[0]].start, rows[partly[-1]].stop) if partly else slice(start, start)
                    last = blocks[-1] if blocks else None
                    block = Block(slice(start, stop), cols, masked_rows)
                    if last and (last.rows, last.cols.stop, last.masked_rows) == (block.rows, cols.start, masked_rows):
                        block = Block(block.rows, slice(blocks.pop().cols.start, cols.stop), masked_rows)
                    blocks.append(block)
            found.append([b._replace(mask_key=self._mask_key(heads, b)) if b.masked_rows.start < b.masked_rows.stop else b
                          for b in blocks])  # fmt: skip
        return found

    def _mask_key(self, heads: Heads, block: Block) -> int:
        """A number for each mask: what `tile_key` gives may be as long as the sides of the block."""
        rows, cols = block.masked_rows, block.cols
        sizes = rows.stop - rows.start, cols.stop - cols.start
        key = heads.pattern, *sizes, self.call.mask.tile_key(heads.mask_index, rows, cols)
        return self.mask_keys.setdefault(key, next(self.next_key))  # not len: two threads may be here

    def pairs_of(self, heads: Heads, block: Block, buffers: Buffers) -> Visible:
        """The mask and bias of a block. Without a bias, masks are kept for a while, for other blocks with the same mask."""
        c, (rows, cols, masked_rows, key), full = self.call, block, block.mask_key is None
        if c.bias is not None:  # it may be -inf anywhere
            allowed, bias = visible(c._replace(mask=None) if full else c, heads.index, rows, cols)
            found = (None,) * 3 if allowed is None else self._visibility(heads, allowed, rows, cols)
            return Visible(bias, within(rows, rows), *found)
        if full:
            return ALL_VISIBLE
        kept = buffers.kept_masks
        if key not in kept:
            found = self._visibility(heads, c.mask.tile(heads.mask_index, masked_rows, cols), masked_rows, cols)
            if sum(allowed.size for allowed, *_ in kept.values()) + found[0].size > math.prod(self.sizes.tile):
                kept.clear()
            kept[key] = found
        allowed, upper_bound, seen_keys = kept[key]
        all_masked = masked_rows == rows  # else other rows see all keys
        return Visible(None, within(masked_rows, rows), allowed, upper_bound, seen_keys if all_masked else None)

    def _visibility(self, heads: Heads, allowed: Array, rows: slice, cols: slice) -> tuple[Array, Array, Array]:
        """allowed, upper_bound and seen_keys of `Visible`."""
        n = (1,) * (self.call.q[heads.index].ndim - 2)  # the axes of the heads, 1 if all have the same mask
        shape = (*n, rows.stop - rows.start, cols.stop - cols.start)
        allowed = np.broadcast_to(allowed, np.broadcast_shapes(allowed.shape, shape))
        real = np.empty(0, self.call.computing).real.dtype.type
        upper_bound = np.where(allowed, real(np.inf), real(0))
        return allowed, upper_bound, np.asarray(by_group(allowed, self.call.k[heads.group]).any(-2))

    def queries_with_keys(self, heads: Heads, i: int, buffers: Buffers) -> Array:
        """Which queries of tile i see some key."""
        rows = self.rows[i]
        found = np.zeros((*self.call.q[heads.index].shape[:-2], rows.stop - rows.start), bool)
        for block in itertools.chain(*self.blocks(heads, i)):
            pairs, here = self.pairs_of(heads, block, buffers), found[..., within(block.rows, rows)]
            sees = np.ones(here.shape, bool)
            if pairs.allowed is not None:
                sees[..., pairs.masked_rows] = pairs.allowed.any(-1)
            here |= sees
        return found


def within(part: slice, whole: slice) -> slice:
    """``part`` of an array as a slice of array[whole]."""
    return slice(part.start - whole.start, part.stop - whole.start)


def in_parts(n: int, size: int, cuts: Iterable[int] = ()) -> list[slice]:
    """0 to n in parts of at most ``size``. A part also ends at a cut, unless too little would lie before the cut."""
    ends = [0]
    for end in (*cuts, n):
        if end == n or end - ends[-1] >= size // 4:
            ends += [*range(ends[-1] + size, int(end), size), int(end)]
    return [slice(*pair) for pair in itertools.pairwise(ends) if pair[0] < pair[1]]


def in_tiles(parts: list[slice], size: int) -> list[list[slice]]:
    """Tiles of as many parts as fit into ``size``, at least one."""
    tiles: list[list[slice]] = []
    for part in parts:
        if tiles and part.stop - tiles[-1][0].start <= size:
            tiles[-1].append(part)
        else:
            tiles.append([part])
    return tiles


def pieces(state: list[int]) -> list[tuple[int, int]]:
    """(first, end) of the parts that are not empty; in two pieces if full parts lie between partial ones, as in a window."""
    if not any(state):  # EMPTY is 0; in a window most are empty
        return []
    seen = [i for i, x in enumerate(state) if x != EMPTY]
    first, end = seen[0], seen[-1] + 1
    for i in range(first + 2, end):
        if state[i] != FULL and state[i - 1] == FULL and any(x != FULL for x in state[first : i - 1]):
            return [(first, i), (i, end)]
    return [(first, end)]
