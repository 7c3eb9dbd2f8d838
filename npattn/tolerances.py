"""Every tolerance that a verdict of the package or of its tests rests on, with its derivation."""

from __future__ import annotations

# --- gradcheck ------------------------------------------------------------------------------------------------------
# Nothing is subtracted in a complex step, so its error does not depend on h as long as h^2 u^2 is lost beside 1 and h does
# not underflow; terms that are h times smaller again must stay normal numbers (1e-80).
COMPLEX_STEP = 1e-40

# Analytic gradient and complex step each round every term of a sum a few times: their difference is a small multiple of
# eps times the sum of |terms|. Where that sum is not known, the largest derivative stands for it, and cancellation by a
# factor of 100 is allowed for.
GRADCHECK_EPS = 512.0

# Where the sum is known: 4e-15 of it in float64. Each side rounds a term at most a dozen times (product, sum, exp, quotient,
# the centring in softmax and its product), by half an eps each, and sums of some ten terms add a few more.
TERMS_EPS = 18.0


def romberg_step(eps: float) -> float:
    """The first of three steps h, h/2, h/4: truncation (h/4)^6 and rounding eps / (h/4) balance near eps^(1/7)."""
    return float(eps ** (1 / 7))


# Three extrapolations that agree this well need no smaller step: it is above their rounding error and far below any bug.
CENTRAL_GOAL = 1e-9

# A central difference that knows its own value no better than this tests nothing.
WORST_CENTRAL_ERROR = 1e-4

# --- the error model of npattn.verify.errors -----------------------------------------------------------------------------
# A rounding moves a number by at most u, relative. Over mantissas that are log-uniform its rms is
# u sqrt(integral of (1/12) 4 / m^2 dm / (m ln 2), m = 1 .. 2) = 0.4247 u, rounded up.
ROUNDING_STD = 0.43

# exp of float32 in NumPy was seen to be wrong by 2.4 units in the last place; 3 are allowed. A unit is up to 2 u, which is
# what det counts; sigma counts u each, since a typical exp is far better.
EXP_ULPS = 3.0

# As for exp: tanh of the libraries was seen to be wrong by up to 2.
TANH_ULPS = 2.0

# dp - mean, + dlse, and the product with p are three more roundings.
DELTA_ROUNDING = 3.0

# --- npattn verify -------------------------------------------------------------------------------------------------------
# An implementation is good when the root mean square of error / sigma over a tensor, and the largest, stay below these. Every
# honest kernel that accumulates in the inputs' precision stays well below (NumPy in float32: 0.7 and 6); the room is for biased
# sums over long rows, tensors of few elements, and errors that are the same for a whole row.
GOOD_RMS = 3.0
GOOD_MAX = 16.0

# The same as sequential accumulation in the inputs' precision: what our own kernels are held to.
TIGHT_RMS = 1.5
TIGHT_MAX = 8.0

# A verdict counts only where the same judge would have rejected an error as large as this, relative; 16 units where something
# is rounded more coarsely than that.
PLANTED = 1e-3

# A candidate does what a known mistake does if it is that near to it, in sigma, and nearer than to the reference by this
# factor. The room above GOOD_RMS and GOOD_MAX is for changed problems that are a little worse conditioned than the one that
# sigma is of; those that are much worse have to be far nearer.
MATCH_RMS, MATCH_MAX, MATCH_NEARER = 6.0, 60.0, 3.0
ROUGH_RMS, ROUGH_MAX, ROUGH_NEARER = 100.0, 2000.0, 1000.0
