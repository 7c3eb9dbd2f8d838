"""Each bug: its class (`npattn verify --self-test` prints what they are), and what a right explanation says; None: nothing can.

Written from what the bug is, before verify was asked. Some name what verify has no name for: they count as not named.
"""

from .blocks import Block, layer_norm, rotary
from .dense import Dense
from .layers import multi_head, rnn
from .tiled import Tiled

BUGS = {
    Dense: {
        "causal dropped beside a bias": ("1", "causal is ignored"),
        "window one too wide ahead": ("1", "window counts one more key ahead"),
        "square mask transposed": ("2", "mask is transposed"),
        "bias cast to a boolean mask": ("2", "bias is a boolean mask"),
        "bias read without its broadcast axes": ("3", "bias read *broadcast axes ignored", "bias indexed by (b H + h) modulo"),
        "heads interleaved": ("8", "heads=tile"),
        "scale of the width padded to 8": ("5", "scale of a width padded to a multiple of 8"),
        "no maximum where there is no mask": ("5", "no maximum is subtracted"),
        "maximum starts at -5e4": ("5", "the maximum is not below -5e4"),
        "lse in base 2": ("5", "lse=log2"),
        "masked by the lowest number": ("6", "masked scores are finfo.min", "dead_out=mean_v"),
        "dead rows zeroed too late": ("6", "dead rows are NaN in the backward"),
        "backward always causal": ("7", "always causal"),
        "backward aligned at the last key": ("7", "causal=bottom_right"),
        "Delta forgotten": ("7", "Delta is missing"),
        "R15 terms of dsink in bfloat16": ("12", "terms of dsink*round", "dsink*round", "bfloat16"),
        "mask of the first call of that shape": ("9", "state is kept"),
        "options shared by threads": ("9", "one of two threads"),
        "q scaled in place": ("9", "input was modified", "modifies an input"),
        "weights of the last forward": ("9", "after another forward", "state is kept", "backward keeps the weights"),
        "out in a scratch array": ("9", "is overwritten by the next call"),
    },
    Tiled: {
        "causal by the column in the tile": ("1", "causal*every tile", "causal*the column in the tile"),
        "tile of the diagonal seen in full": ("1", "causal by whole blocks"),
        "R7 row of causal divided by H / G": ("1", "divided by H / G"),
        "window starts a tile late": ("1", "window tiles of * are skipped by their last row"),
        "lengths by the column in the tile": ("2", "lengths*every tile", "lengths*the column in the tile"),
        "mask of the first rows": ("2", "mask of the first * rows for every tile"),
        "bias of the first columns": ("3", "bias of the first * columns for every tile"),
        "strides of k ignored": ("3", "k is read as if it were contiguous"),
        "last tile of keys moved back": ("4", "keys*counted twice"),
        "padding counted": ("4", "padding to a multiple of * keys is counted in the sum"),
        "sum not rescaled": ("4", "the sum is not rescaled between tiles"),
        "output not rescaled": ("4", "the output is not rescaled between tiles"),
        "sum not cleared for the next rows": ("4", "sum*not cleared", "sum*of the rows before"),
        "last rows stored too early": ("4", "out*written too early"),
        "sink in every tile": ("4", "sink is counted once a tile"),
        "maximum of the last tile": ("5", "maximum of the last tile"),
        "R11 merged by exp of lse itself": ("5", "no maximum is subtracted", "merge"),
        "R9 lse lacks the mean of K": ("5", "mean of the keys", "mean of K"),
        "R3 sink over the softcap": ("5", "sink is scaled", "sink is divided by the softcap"),
        "masked tile not guarded": ("6", "tile*NaN", "NaN*tile"),
        "causal backward starts a tile late": ("7", "causal tiles of * are skipped by their first row"),
        "lse of the first rows": ("7", "lse of the first * rows for every tile"),
        "Delta of the first rows": ("7", "Delta of the first * rows for every tile"),
        "dv not cleared for the next keys": ("7", "dv*not cleared", "dv*of the keys before"),
        "dq of the last keys": ("7", "dq of the last tile of * keys alone"),
        "last rows left out of the backward": ("7", "the last * queries or less, a partial tile, are left out"),
        "group overwritten, not added": ("7", "dk of the last head of a group alone", "dv of the last head of a group alone"),
        "dbias of skipped tiles not written": ("7", "dbias*never written", "never written*dbias"),
        "R1 keys of step 0 in every step": ("7", "keys*first * for every tile", "keys of the first tile", "keys of step 0"),
        "R5 dq read with another stride": ("7", "dq*stride"),
        "R13 dq of all sequences in the first": ("7", "dq of all sequences", "dq*summed over the batch"),
        "R17 gradients behind the lengths not written": ("7", "never written"),
        "R23 backward of a sink knows the left limit alone": ("7", "window's limit ahead is ignored"),
        "dv of weights in bfloat16": ("12", "weights rounded to 8 bits"),
    },
    multi_head: {
        "R21 v is projected by w_k": ("8", "v is projected by w_k"),
        "merged without a transpose": ("8", "merged without a transpose"),
    },
    rnn: {
        "R19 last state read at step -1": ("10", "h_last is 0 where the length is 0", "step -1"),
        "state goes on after the length": ("10", "state goes on after the length"),
    },
    layer_norm: {
        "divided by the standard deviation and eps": ("5", "eps outside of the root"),
        "the second mean without the weight": ("7", "g missing in the mean of dn n"),
        "weights of the last sequence": ("7", "of the last sequence"),
    },
    rotary: {
        "frequencies of the whole width": ("8", "frequencies over D"),
        "positions from 1": ("8", "positions begin at 1"),
        "turned forwards in the backward": ("7", "the backward turns forwards"),
    },
    Block: {
        "scale of the model's width": ("5", "scale of the model's width"),
        "the second sum begins behind the norm": ("1", "the residual connection begins behind the norm"),
        "the gradient through the values is lost": ("7", "the gradient of the values is missing"),
        "the second sum is forgotten in the backward": ("7", "the residual connection is missing in the backward"),
    },
}  # fmt: skip
