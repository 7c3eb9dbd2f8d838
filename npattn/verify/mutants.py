"""Seeded bugs of attention, for the tests of the tests: what each is, the case that rejects it, and what has to name it.

Their code is `npattn.verify.mutant_attention`; those of layers are all in `npattn.verify.mutant_layers`.
"""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

from npattn.verify.mutant_attention import candidate


class Mutant(NamedTuple):
    """One bug, and the check that has to reject it."""

    name: str
    kind: str  # of `npattn.verify.selftest.CLASSES`
    where: str  # "forward" (the backward may have it too) or "backward" (alone)
    text: str
    case: str | tuple[str, str]  # the case of verify that rejects it; two, in this order, where it takes two calls
    tensors: str  # what they find wrong
    says: str | tuple[str, ...] | None  # what a diagnosis, or what is said of a tensor, is if it names it; * is anything
    bug: str | None = None  # the line in the code, where it is not the mutant's name
    tiles: bool = False
    bottom_right: bool = False

    def is_named(self, said, texts):
        """Whether a diagnosis, or what is said of a tensor, names this bug."""
        patterns = (self.says,) if isinstance(self.says, str) else self.says or ()
        return any(fnmatch.filter([*said, *texts], p) for p in patterns)

    @property
    def cases(self):
        return (self.case,) if isinstance(self.case, str) else self.case

    @property
    def align(self):
        return "bottom_right" if self.bottom_right else "top_left"

    @property
    def implementation(self):
        return "tiles" if self.tiles else "dense"


def make(name, *, undone=False):
    """The candidate of a row of MUTANTS, or the same with its bug undone."""
    mutant = MUTANTS[name]
    bug = None if undone else mutant.bug or name
    forward = bug if mutant.where == "forward" else None
    return candidate(mutant.implementation, align=mutant.align, forward=forward, backward=bug)


MUTANTS: dict[str, Mutant] = {}
TILES, BOTTOM_RIGHT = {"tiles": True}, {"bottom_right": True}


def _add(kind, where, rows):
    for name, (text, case, tensors, says, *more) in rows.items():
        assert name not in MUTANTS, name
        MUTANTS[name] = Mutant(name, kind, where, text, case, tensors, says, **(more[0] if more else {}))


_add("1", "forward", {
    "anchored at key 0": ("top-left where bottom-right is meant", "causal bottom_right + L < S", "out lse", "causal=top_left",
        BOTTOM_RIGHT),
    "shift never negative": ("S - L cut off at 0", "causal bottom_right + L > S", "out lse",
        ("S - L is cut off at 0", "causal=top_left"), BOTTOM_RIGHT),
    "shift of the other sign": ("L - S for S - L", "causal bottom_right", "out lse",
        "queries shifted by L - S instead of S - L", BOTTOM_RIGHT),
    "causal excludes the own key": ("j < i", "causal top_left", "out lse", "causal excludes the own key"),
    "causal sees one ahead": ("j <= i + 1", "causal top_left", "out lse", "causal sees one key ahead"),
    "causal block by block": ("the own block is seen in full", "causal top_left", "out lse",
        "causal by whole blocks of 16 keys"),
    "causal the other way": ("j >= i", "causal top_left", "out lse", "causal runs the other way"),
    "causal dropped beside a mask": ("the given mask replaces it", "causal bottom_right + mask array", "out lse",
        "causal is ignored", BOTTOM_RIGHT),
    "causal dropped beside dropout": ("a path without causality", "causal top_left + dropout_mask", "out lse",
        "causal is ignored"),
    "causal dropped beside a bias": ("a path without causality", "causal top_left + bias BHLS", "out lse",
        "causal is ignored"),
    "causal dropped beside key_lengths": ("one mask wins", "causal top_left + key_lengths", "out lse", "causal is ignored"),
    "window without the own key": ("i - j < W where <= is meant", "window (0, 5)", "out lse",
        "window counts one key less, and of 0 none"),
    "window counts one more": ("i - j <= W where < is meant", "window", "out lse", "window counts one more key"),
    "window's ends swapped": ("(right, left)", "window", "out lse", "window's ends are exchanged"),
    "window symmetric": ("looks ahead as far as back", "window", "out lse", "window looks ahead as far as back"),
    "window of the wrong sign": ("+left for -left", "window", "out lse", "window has the wrong sign"),
    "window of 0 is no limit": ("right = 0 taken for None", "window (5, 0)", "out lse", "window's 0 is taken for no limit"),
    "window ignores the alignment": ("counted from key 0", "window bottom_right", "out lse",
        ("window is anchored at key 0", "causal=top_left"), BOTTOM_RIGHT),
})  # fmt: skip
_add("2", "forward", {
    "mask before the softcap": ("-inf becomes -softcap", "mask array + softcap", "out lse", "softcap=after_mask"),
    "mask multiplied": ("a masked key has logit 0", "mask array", "out lse", "the mask multiplies the scores"),
    "filled with +inf": ("-float('-inf')", "mask array", "out lse", "masked scores are +inf"),
    "mask ignored": ("the result of masked_fill thrown away", "mask array", "out lse", "mask is ignored"),
    "mask inverted": ("True = masked", "mask array", "out lse", "mask=drop"),
    "mask added as 0 and 1": ("a boolean mask taken as a bias", "mask array", "out lse", "the mask is added as 0 and 1"),
    "mask or causal": ("either of two masks is enough", "causal bottom_right + mask array", "out lse",
        "either the mask or causal is enough", BOTTOM_RIGHT),
    "mask after the softmax": ("not normalised again", "mask array", "out", "masked weights are not normalised again"),
    "score 0 is masked": ("every score of 0 set to -inf", "scale 0", "out lse", "a score of exactly 0 is masked"),
    "mask transposed where L = S": ("(S, L)", "mask array, L = S", "out lse", "mask is transposed"),
    "bias as a boolean mask": ("what is not 0 is masked", "bias BHLS", "out lse", "bias is a boolean mask"),
    "bias before the softcap": ("the order of (2) and (3)", "softcap + bias BHLS", "out lse", "softcap=after_bias"),
    "bias scaled": ("added before the scale", "bias BHLS", "out lse", "bias is scaled"),
    "one key too many": ("j <= n", "key_lengths", "out lse", "one key too many"),
    "padding on the left": ("the last n keys", "key_lengths", "out lse", "padding is taken to be on the left"),
    "lengths on the queries": ("the wrong axis", "key_lengths", "out lse", "lengths count queries, not keys"),
    "length 0 is no limit": ("a length of 0 taken for none", "key_lengths 0 and S", "out lse",
        "length 0 is taken for no limit"),
})  # fmt: skip
_add("3", "forward", {
    "bias indexed by (b H + h) mod its length": ("strides of a bias (B, 1, L, S)", "bias BLS", "out lse",
        "bias indexed by (b H + h) modulo its length"),
    "bias read flat": ("a bias (L, 1) read as (L, S)", "bias L", "out lse", "bias read as (L, S), its broadcast axes ignored"),
    "bias of the first sequence": ("batch stride 0", "bias BS", "out lse", "bias of the first sequence for all"),
    "bias of the first row": ("row stride 0", "bias BHL", "lse", "bias of the first row for all"),
    "mask of the first sequence": ("batch stride 0", "mask array", "out lse", "mask of the first sequence for all"),
    "mask of the first head": ("head stride 0", "mask HLS", "out lse", "mask of the first head for all"),
    "mask read flat": ("a mask (B, 1, L, S) read as (L, S)", "mask array", "out lse",
        "mask read as (L, S), its broadcast axes ignored"),
    "mask of one column ignored": ("a mask (L, 1)", "mask of one column", "out lse", "mask of one column is ignored"),
    "mask of one row for the first row": ("a mask (1, 1, 1, S)", "mask of one row", "out lse",
        "mask of one row holds for the first row alone"),
    "lengths of the first sequence": ("batch stride 0", "key_lengths", "out lse", "lengths of the first sequence for all"),
    "first sequence alone": ("zeros for the others", "plain", "out", "only the first sequence is computed"),
    "v read flat": ("a stride of 0 not known", "strided", "out", "v is read as if it were contiguous"),
    "q read flat": ("the memory of a transposed view", "strided", "out lse", "q is read as if it were contiguous"),
    "k laid out as (B, S, H, D)": ("the wrong layout", "plain", "out lse", "k is laid out as (B, S, H, D)"),
    "batch and heads swapped": ("(H, B, L, E) written out", "plain", "out", "batch and heads are exchanged"),
    "out of q's width": ("an output like q", "E != D", "out", "*has shape*"),
    "v padded to D": ("and not cut", "E < D", "out", "*has shape*"),
    "out in float64": ("a constant of NumPy that promotes", "plain", "out", "*has dtype float64*"),
    "scale a NumPy float64": ("np.sqrt(D) promotes all", "plain", "out lse", "*has dtype float64*"),
    "lse with a last axis of 1": ("keepdims left on", "plain", "lse", "*has shape*"),
})  # fmt: skip
_add("4", "forward", {
    "keys past the end read": ("what lies behind k and v", "plain", "out lse", None, TILES),
    "padded keys allowed": ("the mask padded with True", "plain", "out lse",
        "padding to a multiple of 16 keys is counted in the sum", TILES),
    "last tile left out": ("S // tile tiles", "plain", "out lse", "the last * keys or less, a partial tile, are left out",
        TILES),
    "tail of one left out": ("a last tile of one key", "one more than a tile", "out lse",
        "a tail of one key behind tiles of * is left out", TILES),
    "keys of the last tile counted by S % tile": ("0 where S is a multiple", "whole tiles", "out lse",
        "a last tile of 16 keys is counted by S % 16", TILES),
    "rows of the last tile counted by L % tile": ("0 where L is a multiple", "whole tiles", "out lse",
        "a last tile of 32 queries is counted by L % 32", TILES),
    "tiles skipped by their first row": ("the last rows see more", "causal top_left", "out lse",
        "causal tiles of 32 x 16 are skipped by their first row", TILES),
    "tiles skipped by their last row": ("the first rows of a window see more", "window", "out lse",
        "window tiles of 32 x 16 are skipped by their last row", TILES),
    "bias tile of the first rows": ("no row offset", "bias BHLS", "out lse", "bias of the first 32 rows for every tile",
        TILES),
    "bias tile of the first columns": ("no column offset", "bias S", "out lse", "bias of the first 16 columns for every tile",
        TILES),
    "dropout tile of the first columns": ("no column offset", "dropout_mask", "out",
        "dropout mask of the first 16 columns for every tile", TILES),
    "sum not rescaled": ("online softmax", "plain", "out lse", "the sum is not rescaled between tiles of 16 keys", TILES),
    "out not rescaled": ("online softmax", "plain", "out", "the output is not rescaled between tiles of 16 keys", TILES),
    "max of the last tile": ("not of all so far", "inputs x30", "out", None, TILES),
    "sink once a tile of keys": ("counted too often", "sink", "out lse", "sink is counted once a tile of 16 keys", TILES),
})  # fmt: skip
_add("5", "forward", {
    "no max": ("exp of the scores themselves", "inputs x30", "out lse", "no maximum is subtracted"),
    "max not below -5e4": ("a sentinel that is not low enough", "scores of -1e5", "out lse",
        ("the maximum is not below -5e4", "the maximum is not below 0")),
    "first max -5e4": ("the same in tiles", "scores of -1e5", "out lse",
        ("the maximum is not below -5e4", "the maximum is not below 0"), TILES),
    "first max 0": ("a max that cannot be negative", "scores of -1e5", "out lse",
        ("the maximum is not below -5e4", "the maximum is not below 0"), TILES),
    "max over all rows": ("one shift for the whole array", "inputs x30", "out lse", "one maximum for all rows"),
    "max over masked keys too": ("what is masked pushes the rest to 0", "inputs x30 + mask array", "out lse",
        "the maximum is taken over masked keys too"),
    "max before a negative scale": ("the smallest score instead", "inputs x30 + negative scale", "out lse",
        "the maximum is taken before a negative scale"),
    "max without the sink": ("exp(sink - max) overflows", "sinks far off", "lse", "the maximum leaves the sink out"),
    "tanh by exponentials": ("inf / inf", "inputs x30 + softcap", "out lse", "tanh is made of exponentials that overflow"),
    "filled with -1e4": ("above the scores that are allowed", "scores of -1e5 and a mask", "out lse",
        "masked scores are -1e4"),
    "1e-6 beside the sum": ("rows do not sum to 1", "S = 1", "out", "1e-06 is added to the sum"),
    "weights in half precision": ("rounded for the product, not for the sum", "plain", "out", "weights rounded to 11 bits*"),
    "scores in half precision": ("rounded", "plain", "out lse", "scores rounded to 11 bits*"),
    "scale of 1 by default": ("1/sqrt(D) forgotten", "plain", "out lse", "scale=none"),
    "divided by the scale": ("sqrt(D) for 1/sqrt(D)", "plain", "out lse", "scale is sqrt(D), not 1/sqrt(D)"),
    "scale 1/D": ("no root", "plain", "out lse", "scale is 1/D"),
    "scores clamped": ("to +-50, against overflow", "inputs x30", "out lse", "scores are cut off at +-50"),
    "scale 1/sqrt(E)": ("the values' width", "E != D", "out lse", "scale is 1/sqrt(E)"),
    "scale of the padded width": ("D filled up to a multiple of 8", "D = 17", "out lse",
        "scale of a width padded to a multiple of 8"),
    "scale without its sign": ("|scale|", "negative scale", "out lse", "scale loses its sign"),
    "given scale ignored": ("the default", "negative scale", "out lse", "scale is the default, whatever is given"),
    "scale 0 is no scale": ("taken for None", "scale 0", "out lse", "scale 0 is taken for the default"),
    "softcap ignored": ("no (2)", "softcap", "out lse", "softcap is ignored"),
    "sink twice": ("two logits of the same value", "sink", "out lse", "sink is counted twice"),
    "softcap before the scale": ("the order of (1) and (2)", "softcap", "out lse", "softcap comes before the scale"),
    "softcap not multiplied back": ("tanh(s / c)", "softcap", "out lse", "softcap is not multiplied back"),
    "no softmax": ("weights = scores", "plain", "out", "no softmax at all"),
    "softmax over the sequences": ("axis 0", "plain", "out lse", "the softmax runs over the sequences"),
    "softmax over the queries": ("axis -2", "plain", "out lse", "the softmax runs over the queries"),
    "sink ignored": ("not in the sum", "sink", "out lse", "sink is ignored"),
    "lse without the sink": ("the sum of before it", "sink", "lse", "sink=not_in_lse"),
    "lse without the max": ("log of the shifted sum", "plain", "lse", "lse leaves the maximum out"),
    "lse in base 2": ("log2", "plain", "lse", "lse=log2"),
    "lse of the weights": ("not of the scores", "plain", "lse", "lse of the weights, not of the scores"),
})  # fmt: skip
_add("6", "forward", {
    "dead rows unguarded": ("-inf - -inf", "dead rows", "out lse", "dead rows are NaN (dead_out=nan)"),
    "sum of 0 unguarded": ("0 / 0", "dead rows", "out", "dead rows are NaN (dead_out=nan)"),
    "empty tiles unguarded": ("-inf - -inf in a tile", "segments", "out lse", "dead rows are NaN*", TILES),
    "no key at all": ("0 / 0 where S = 0", "S = 0", "out", "dead rows are NaN (dead_out=nan)",
        {**TILES, "bug": "sum of 0 unguarded"}),
    "filled with finfo.min": ("a dead row is the mean of v", "dead rows", "out lse", "dead_out=mean_v"),
    "filled with -1e9": ("a dead row is the mean of v", "dead rows", "out lse", "dead_out=mean_v"),
    "lse of a dead row 0": ("log 1", "dead rows", "lse", "dead_lse=zero"),
    "lse of a dead row -inf in spite of a sink": ("the sink is a logit", "dead rows + sink", "lse",
        "dead rows have lse -inf in spite of the sink"),
    "NaN weights are 0": ("hides a NaN that is seen", "NaN in a key that is seen", "out", "NaN weights become 0"),
    "NaN output is 0": ("hides a NaN that is seen", "NaN seen later", "out", "NaN in the output becomes 0"),
    "0 times NaN": ("a masked value", "NaN behind the mask", "out", "masked_nan=poisons"),
    "mask added to NaN": ("a masked key", "NaN behind the mask", "out lse",
        "-inf is added to masked scores, and NaN stays NaN"),
})  # fmt: skip
_add("7", "backward", {
    "mean of the group in dv": ("not the sum", "G < H", "dv", "dv is the mean of a group"),
    "mean of the group in dk": ("not the sum", "G < H", "dk", "dk is the mean of a group"),
    "first head of the group in dk": ("not the sum", "G < H", "dk", "dk of the first head of a group alone"),
    "last head of the group in dv": ("= for +=", "G < H", "dv", "dv of the last head of a group alone"),
    "first head of one group in dk": ("a path for G = 1", "G = 1", "dk", "dk of the first head of a group alone"),
    "backward always causal": ("whatever the flag", "plain", "dq dk dv", "always causal", {"bug": "always causal"}),
    "backward anchored at key 0": ("another alignment than the forward's", "causal bottom_right", "dq dk dv",
        "causal=top_left", {"bug": "anchored at key 0", **BOTTOM_RIGHT}),
    "softmax backward by dropped weights": ("p for p drop", "dropout_mask", "dq dk",
        "the softmax backward uses weights after dropout"),
    "dp without dropout": ("no (6)", "dropout_mask", "dq dk", "dp knows no dropout"),
    "Delta of the output before dropout": ("another output", "dropout_mask", "dq dk", "Delta of the output before dropout"),
    "Delta 0": ("no row dot product", "plain", "dq dk", "Delta is missing"),
    "backward without the sink": ("the sum of before it", "sink", "dq dk dv", "weights of the backward leave the sink out",
        {"bug": "lse of before the sink"}),
    "dlse in base 2": ("natural log expected", "dlse", "dq dk", "dlse is taken in base 2"),
    "padding rows enter": ("their dout is not 0", "plain", "dk dv", None, TILES),
    "lse of the padding rows not set": ("0 times NaN", "plain", "dk dv", None, TILES),
    "divided by the largest |dout|": ("0 / 0 without a cotangent", "every row dead", "dv", "0 / 0 where dout is 0"),
    "dead rows NaN in the backward": ("the output alone was cleared", "dead rows", "dv", "dead rows are NaN in the backward"),
    "dout read flat": ("a stride of 0 not known", "strided", "dq dk dv", "dout is read as if it were contiguous"),
    "dv of k's width": ("a buffer like k", "E != D", "dv", "dv has k's width"),
    "dbias in float64": ("another dtype than the bias", "bias LS", "dbias", "*has dtype float64*"),
})  # fmt: skip
_add("8", "forward", {
    "heads interleaved": ("head h reads h % G", "G < H", "out lse", "heads=tile"),
    "keys tiled, values repeated": ("h % G for k alone", "G < H", "out lse", "keys are tiled over the heads, values are not"),
    "values tiled, keys repeated": ("h % G for v alone", "G < H", "out", "values are tiled over the heads, keys are not"),
    "head h reads h // G": ("for h // (H // G)", "G < H", "out lse", "head h reads key head h // G"),
    "groups in reverse": ("the wrong keys", "plain", "out lse", "key heads are read in reverse"),
    "heads merged without a transpose": ("reshape of (L, H, E)", "plain", "out", "heads are merged without a transpose"),
    "sinks in reverse": ("another head's", "sink", "out lse", "sinks are read in reverse"),
    "sink of the first head": ("for all", "sink", "out lse", "sink of the first head for all"),
    "dropout of the first head": ("for all", "dropout_mask", "out", "dropout mask of the first head for all"),
    "dropout ignored": ("no (6)", "dropout_mask", "out", "dropout is ignored"),
    "dropout without 1/(1-p)": ("a boolean mask", "dropout_mask", "out", "dropout is not divided by 1 - p"),
    "sum after dropout": ("normalised by what is left", "dropout_mask", "out", "the sum is taken after dropout"),
})  # fmt: skip
_add("8", "backward", {
    "groups interleaved in dk": ("(H / G, G) for (G, H / G)", "G < H", "dk",
        "dk sums heads g, g + G, ..., not those of its group"),
    "groups interleaved in dv": ("(H / G, G) for (G, H / G)", "G < H", "dv",
        "dv sums heads g, g + G, ..., not those of its group"),
    "heads interleaved in the backward": ("h % G", "G < H", "dq dk dv", "heads=tile", {"bug": "heads interleaved"}),
    "dlse of the first head of a group": ("for the group", "G < H + dlse", "dq dk",
        "dlse of the first head of a group for all"),
    "dq of the first head": ("for all", "plain", "dq", "dq of the first head for all"),
    "dv of its neighbour head": ("h + 1", "plain", "dv", "dv of the neighbouring head"),
})  # fmt: skip
_add("9", "forward", {
    "q scaled in place": ("the caller's q", "plain", "out", "*an input was modified*"),
    "NaN in k cleaned in place": ("the caller's k", "NaN behind the mask", "out", "*an input was modified*"),
    "bias masked in place": ("the caller's bias", "float64 mask array + bias BHLS", "out", "*an input was modified*"),
    "lengths counted up in place": ("the caller's lengths", "key_lengths", "out", "*an input was modified*"),
    "mask of the last call": ("kept by its shape", ("mask array", "mask array + dropout_mask"), "out lse",
        "the mask of an earlier call is used"),
    "lengths of the first call": ("kept", ("key_lengths", "causal top_left + key_lengths"), "out lse",
        "the key_lengths of an earlier call is used"),
    "scale of the last call": ("kept", ("negative scale", "plain"), "out lse", "the scale of an earlier call is used"),
})  # fmt: skip
_add("9", "backward", {
    "dk added to that of the last call": ("a buffer never cleared", ("plain", "dlse"), "dk",
        "dk is added to that of the call before"),
    "dead dout cleared in place": ("the caller's dout", "dead rows", "dq", "*modifies an input*"),
    "lse cleared in place": ("what the forward returned", "dead rows", "dq", "*modifies an input*"),
})  # fmt: skip
_add("own", "backward", {
    "backward without the mask": ("the forward has it", "mask array", "dq dk dv", "mask is ignored", {"bug": "mask ignored"}),
    "backward mask of the first sequence": ("batch stride 0", "mask array", "dq dk dv", "mask of the first sequence for all",
        {"bug": "mask of the first sequence"}),
    "backward causal excludes the own key": ("j < i", "causal top_left", "dq dk dv", "causal excludes the own key",
        {"bug": "causal excludes the own key"}),
    "backward window counts one more": ("off by one", "window", "dq dk dv", "window counts one more key",
        {"bug": "window counts one more"}),
    "backward of one key too many": ("j <= n", "key_lengths", "dq dk dv", "one key too many", {"bug": "one key too many"}),
    "backward without the bias": ("weights made again", "bias BHLS", "dq dk dv dbias", "bias is ignored",
        {"bug": "bias ignored"}),
    "backward without the softcap": ("weights made again", "softcap", "dq dk dv", "softcap is ignored",
        {"bug": "softcap ignored"}),
    "backward of the default scale": ("weights made again", "negative scale", "dq dk dv",
        "scale is the default, whatever is given", {"bug": "given scale ignored"}),
    "backward scale of the padded width": ("only D % 8 == 0 is right", "D = 17", "dq dk dv",
        "scale of a width padded to a multiple of 8", {"bug": "scale of the padded width"}),
    "shifted by the max, not by lse": ("not normalised", "plain", "dq dk dv",
        "weights are shifted by the maximum, not by lse"),
    "weights below 1e-4 dropped": ("taken for 0", "plain", "dq dk dv", "weights below 1e-4 are taken for 0"),
    "dv of half weights": ("rounded too early", "plain", "dv", "weights rounded to 11 bits*"),
    "dv of weights before dropout": ("w for p", "dropout_mask", "dv", "dv is made of weights before dropout"),
    "dropout twice in dv": ("drop^2", "dropout_mask", "dv", "dropout is applied twice in dv"),
    "dropout twice in dp": ("drop^2", "dropout_mask", "dq dk", "dropout is applied twice to dp"),
    "dropout of the first sequence in the backward": ("batch stride 0", "dropout_mask", "dq dk dv",
        "dropout mask of the first sequence for all"),
    "dv of dout's mean": ("over the queries", "plain", "dv", "dv is made of the mean of dout"),
    "dp clipped": ("a gradient that is large is right too", "inputs x5", "dq dk", "dp is cut off at 10"),
    "Delta of dout alone": ("dout . dout", "plain", "dq dk", "Delta is the square of dout"),
    "Delta a mean": ("over E", "plain", "dq dk", "Delta is a mean over E"),
    "Delta over the queries": ("the wrong axis", "plain", "dq dk", "Delta runs over the queries"),
    "Delta of D columns": ("out has E", "E != D", "dq dk", "Delta of the first D columns of the output"),
    "Delta of the next row": ("off by one", "plain", "dq dk", "Delta of the next row"),
    "Delta of an output in bfloat16": ("rounded too early", "plain", "dq dk", "the output rounded to 8 bits before Delta*"),
    "Delta not times p": ("p dp - Delta", "plain", "dq dk", "Delta is not multiplied by the weight"),
    "ds in bfloat16": ("rounded too early", "plain", "dq dk", "dscores rounded to 8 bits*"),
    "masked pairs keep their gradient": ("p forgotten", "mask array", "dq dk",
        "neither weight nor mask in the softmax backward"),
    "dlse ignored": ("lse has no gradient", "dlse", "dq dk", "dlse=ignored"),
    "dlse of the other sign": ("with Delta", "dlse", "dq dk", "dlse has the other sign"),
    "dlse not times p": ("added behind the softmax", "dlse", "dq dk", "dlse is not multiplied by the weight"),
    "dlse times the scale": ("as if it were a score", "dlse", "dq dk", "dlse is multiplied by the scale"),
    "dlse times dropout": ("lse knows of none", "dropout_mask + dlse", "dq dk", "dlse is multiplied by dropout"),
    "dsink without p_sink": ("a sum of Delta", "sink", "dsink", "dsink lacks the sink's weight"),
    "dsink of before the sink in lse": ("p_sink of another sum", "sink", "dsink",
        "the sink's weight in dsink is that of a sum without it"),
    "dsink of the other sign": ("+Delta", "sink", "dsink", "dsink has the other sign"),
    "dsink without Delta": ("dlse alone", "sink + dlse", "dsink", "Delta is missing in dsink"),
    "dsink without dlse": ("Delta alone", "sink + dlse", "dsink", "dlse is missing in dsink"),
    "dsink of dead rows lost": ("their lse is the sink", "dead rows + sink", "dsink", "dsink leaves dead rows out"),
    "dsink of the first sequence": ("not summed", "sink", "dsink", "dsink of the first sequence alone"),
    "dsink of the first query": ("not summed", "sink", "dsink", "dsink of the first query alone"),
    "dsink a mean": ("not a sum", "sink", "dsink", "dsink is a mean"),
    "dsink summed over the heads": ("the wrong axes", "sink", "dsink", "dsink is summed over the heads"),
    "dbias of the first sequence": ("not summed", "bias LS", "dbias", "dbias of the first sequence alone"),
    "dbias of the last row": ("= for +=", "bias S", "dbias", "dbias of the last row alone"),
    "dbias a mean": ("not a sum", "bias LS", "dbias", "dbias is a mean"),
    "dbias not summed over the heads": ("the shape of the scores", "bias BLS", "dbias", "*has shape*"),
    "dbias behind the softcap": ("the derivative of (2) too early", "softcap + bias BHLS", "dbias",
        "dbias is multiplied by the slope of the softcap"),
    "dbias times the scale": ("the bias is not scaled", "bias BHLS", "dbias", "dbias is multiplied by the scale"),
    "dbias without Delta": ("p dp", "bias BHLS", "dbias", "Delta is missing in dbias"),
    "dbias of the dropped weights": ("ds drop", "dropout_mask + bias BHLS", "dbias", "dbias is multiplied by dropout"),
    "softcap derivative forgotten": ("no (2)", "softcap", "dq dk", "the derivative of the softcap is missing"),
    "softcap derivative 1 - t": ("no square", "softcap", "dq dk", "the derivative of the softcap is 1 - t"),
    "softcap derivative of the capped score": ("tanh twice", "softcap", "dq dk",
        "the derivative of the softcap takes the tanh of the capped score"),
    "softcap derivative over the cap": ("d tanh(s / c) / ds", "softcap", "dq dk",
        "the derivative of the softcap is divided by the cap"),
    "softcap derivative of the raw score": ("1 - s^2", "softcap", "dq dk",
        "the derivative of the softcap is 1 - (s / cap)^2 of the raw score"),
    "softcap derivative of the score with its bias": ("behind (3)", "softcap + bias BHLS", "dq dk",
        "the derivative of the softcap is taken at the score with its bias"),
    "scale squared in dk": ("q was scaled already", "plain", "dk", "dk has the scale twice"),
    "dq without the scale": ("forgotten", "plain", "dq", "dq lacks the scale"),
    "dq of the default scale": ("the given one forgotten", "negative scale", "dq", "dq has the default scale"),
    "ds transposed where L = S": ("ds q for ds^T q", "mask array, L = S", "dk", "dk is made of ds, not of its transpose"),
    "dq of the first S queries": ("a loop to the wrong end", "L > S", "dq", "dq of rows from S on is missing"),
    "dk of the first L keys": ("a loop to the wrong end", "L < S", "dk", "dk of keys from L on is missing"),
    "dq by the first sequence's keys": ("batch stride 0", "plain", "dq", "dq is made of the keys of the first sequence"),
    "dk and dv exchanged": ("the order of the results", "plain", "dk dv", "dk and dv are exchanged"),
    "dk minus its mean": ("over D", "plain", "dk", "dk lacks its mean over D"),
    "gradients summed over the batch": ("as for a parameter", "plain", "dk", "dk is summed over the batch"),
    "dq in float64": ("promoted", "plain", "dq", "*has dtype float64*"),
    "dq not returned": ("None", "plain", "dq", "*dq is not returned*"),
    "0 times NaN in dq": ("a masked key", "NaN behind the mask", "dq", "masked_nan=poisons"),
    "0 times NaN in dk": ("a dead query", "NaN in a dead query", "dk", "masked_nan=poisons"),
    "Delta of masked values": ("p dp where dp may be NaN", "NaN behind the mask", "dq dk", "masked_nan=poisons"),
    "nothing done without dout": ("lse has a gradient of its own", "dlse alone", "dq dk", "nothing is done where dout is 0"),
    "tiles skipped by their first row in the backward": ("the last rows see more", "causal top_left", "dq dk dv",
        "causal tiles of 32 x 16 are skipped by their first row", {"bug": "tiles skipped by their first row", **TILES}),
    "last tile of keys left out of the backward": ("S // tile tiles", "plain", "dq dk dv",
        "the last * keys or less, a partial tile, are left out", {"bug": "last tile left out", **TILES}),
    "last queries left out": ("L // tile tiles", "plain", "dq dk dv",
        "the last * queries or less, a partial tile, are left out", TILES),
    "tail of one left out of the backward": ("a last tile of one key", "one more than a tile", "dq dk dv",
        "a tail of one key behind tiles of * is left out", {"bug": "tail of one left out", **TILES}),
    "dropout tile of the first columns in the backward": ("no offset", "dropout_mask", "dq dk dv",
        "dropout mask of the first 16 columns for every tile", {"bug": "dropout tile of the first columns", **TILES}),
    "weights normalised tile by tile": ("no lse", "plain", "dq dk dv", "weights are normalised in each tile of 16 keys",
        TILES),
    "dv of the last tile of queries": ("= for +=", "plain", "dv", "dv of the last tile of * queries alone", TILES),
    "dk of the last tile of queries": ("= for +=", "plain", "dk", "dk of the last tile of * queries alone", TILES),
    "dq of the last tile of keys": ("= for +=", "plain", "dq", "dq of the last tile of * keys alone", TILES),
    "dq in the wrong row of the last tile": ("a tile moved back to fit", "plain", "dq",
        "dq of the last tile of * queries is written too early", TILES),
    "Delta of the first tile": ("no offset", "plain", "dq dk", "Delta of the first 32 rows for every tile", TILES),
    "Delta tile by tile": ("not of the whole row", "plain", "dq dk", "Delta of each tile of 16 keys alone", TILES),
    "dlse of the first tile": ("no offset", "dlse", "dq dk", "dlse of the first 32 rows for every tile", TILES),
    "dlse in the first tile of keys alone": ("counted once", "dlse", "dq dk",
        "dlse is added in the first tile of 16 keys alone", TILES),
    "dsink once a tile of keys": ("counted too often", "sink", "dsink", "dsink is counted once a tile of 16 keys", TILES),
    "dbias a column late": ("off by one", "bias BHLS", "dbias", "dbias is one column late in each tile of 16 keys", TILES),
})  # fmt: skip
_add("12", "forward", {
    "operands in TF32": ("all that enters a product", "plain", "out", "*tf32*"),
    "inputs in bfloat16": ("as they are read", "plain", "out lse", "inputs rounded to 8 bits*"),
    "weights in bfloat16": ("rounded for the product", "plain", "out", "weights rounded to 8 bits*"),
    "scores in bfloat16": ("as they are stored", "plain", "out lse", "scores rounded to 8 bits*"),
    "exp off by 1e-4": ("a short polynomial", "plain", "out lse", None),
    "exp off by 1e-5": ("a short polynomial", "plain", "out", None),
    "scale off by 1e-4": ("a constant with four digits", "plain", "out", "scale is off by a factor of 1.0001*"),
    "scale off by 1e-5": ("a constant with five digits", "inputs x5", "lse", "scale is off by a factor of 1.00001*"),
    "one key missing from one sum": ("the first of the first row", "plain", "out lse", None),
    "one element of out off by 1e-4": ("a store that races", "plain", "out", "*in 1 of*"),
})  # fmt: skip
_add("12", "backward", {
    "lse kept in half precision": ("saved low", "plain", "dq dk dv", "lse rounded to 11 bits*"),
    "dv of bfloat16 weights": ("rounded for the product", "plain", "dv", "weights rounded to 8 bits*"),
    "dp in bfloat16": ("as it is stored", "plain", "dq dk", "dweights rounded to 8 bits*"),
    "dq off by 1e-3": ("a factor", "plain", "dq", "dq is 1.001 times*"),
    "dv off by 1e-5": ("a factor", "plain", "dv", "dv is 1.00001 times*"),
})  # fmt: skip

REPEATS = {
    "weights of the last forward": "the backward uses what the last forward kept, whosever it was",
    "kept weights cleared after use": "a second backward finds nothing",
    "out a view of a scratch array": "the second call overwrites the result of the first",
}
"""Section 9: a candidate that is right as long as it is called once: forward, backward, and no other in between."""


# --- what no test can kill ----------------------------------------------------------------------------------------------


class Equivalent(NamedTuple):
    """A change that is no bug, as long as nothing else makes it one."""

    reason: str
    bug: str
    where: str
    passes: tuple[str, ...]  # cases that cannot reject it
    rejected: str = ""  # one that can: a near miss
    lse: bool = True  # whether lse is returned
    tiles: bool = False


EQUIVALENT = {
    "a bias on all keys": Equivalent(
        "softmax does not see what is the same for a whole row; a softcap, a sink or lse does",
        "key bias", "forward", ("plain", "mask array", "G < H", "causal top_left", "bias BHLS"), "softcap", lse=False),
    "+1 on all logits": Equivalent(
        "the same; only lse or a sink tells", "+1 on all logits", "forward", ("plain", "mask array", "dropout_mask", "softcap"),
        "sink", lse=False),
    "Delta as sum dP P": Equivalent(
        "sum_j p_j dp_j = dout . out, with dropout, sink and dlse too",
        "Delta of sum dP P", "backward", ("plain", "dropout_mask", "sink + dlse", "dead rows", "everything", "long")),
    "masked scores of -1e9": Equivalent(
        "exp(-1e9 - max) is 0 unless the max is there too: dead rows",
        "filled with -1e9", "forward", ("mask array", "causal top_left", "mask array + softcap", "inputs x30"), "dead rows"),
    "mask after the softmax, normalised again": Equivalent(
        "the sum over the masked keys cancels, unless one of them is larger by 88, or 745 in float64",
        "max over masked keys too", "forward", ("mask array", "causal top_left"), "inputs x30 + mask array"),
    "tile for repeat where G = H": Equivalent(
        "h // (H // G) = h % G = h", "heads interleaved", "forward", ("plain", "causal top_left", "G = 1"), "G < H"),
    "groups summed in another order where G = H": Equivalent(
        "nothing is summed", "groups interleaved in dk", "backward", ("plain", "G = 1"), "G < H"),
    "scale of E where E = D": Equivalent("the same number", "scale 1/sqrt(E)", "forward", ("plain",), "E != D"),
    "scale of a padded D that is a multiple of 8": Equivalent(
        "the same number", "scale of the padded width", "forward", ("plain", "long"), "D = 17"),
    "a shift cut off at 0 where L < S": Equivalent(
        "S - L is positive", "shift never negative", "forward", ("causal bottom_right",), "causal bottom_right + L > S"),
    "no tail where there is none": Equivalent(
        "S is a multiple of the tile", "last tile left out", "forward", ("whole tiles",), "plain", tiles=True),
    "no rescaling where the max does not grow": Equivalent(
        "one tile", "sum not rescaled", "forward", ("S = 1", "inputs tiny"), "plain", tiles=True),
    "1e-9 beside a sum of at least 1": Equivalent(
        "below half a unit in the last place of float32", "1e-9 beside the sum", "forward", ("plain", "S = 1"), "float64"),
}  # fmt: skip
"""Also equivalent: `b_k` in multi-head attention, forgotten or without a gradient (the tests of layers show it), the initial
state where h0 = 0, w_h or its transpose where it is symmetric, = or += where T = 1. Not to be seeded at these sizes: indices of
32 bits that overflow, races between threads."""

__all__ = ["EQUIVALENT", "MUTANTS", "REPEATS", "Equivalent", "Mutant", "make"]
