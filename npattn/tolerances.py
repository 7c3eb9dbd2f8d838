"""Every tolerance that the package or its tests use for a verdict, with its derivation."""

from __future__ import annotations

# --- gradcheck ------------------------------------------------------------------------------------------------------
# A complex step subtracts nothing. So its error does not depend on h, if h^2 u^2 is lost beside 1 and h does not underflow.
# Terms that are smaller by another factor h must stay normal numbers (1e-80).
COMPLEX_STEP = 1e-40

# The analytic gradient and the complex step each round every term of a sum a few times. So they differ by a small multiple of
# eps times the sum of |terms|. Where that sum is not known, the largest derivative replaces it. Where terms cancel it is
# smaller than the sum: a factor of 100 is allowed.
GRADCHECK_EPS = 512.0

# Where the sum is known: 4e-15 of it in float64. Each side rounds a term at most a dozen times, by half an eps each (product,
# sum, exp, quotient, the centring in softmax and its product). Sums of some ten terms add a few more roundings.
TERMS_EPS = 18.0


def romberg_step(eps: float) -> float:
    """The first of three steps h, h/2, h/4. Truncation (h/4)^6 and rounding eps / (h/4) balance near eps^(1/7)."""
    return float(eps ** (1 / 7))


# If three extrapolations agree this well, no smaller step is tried. It is above their rounding error and far below any bug.
CENTRAL_GOAL = 1e-9

# A central difference whose own estimated error is larger than this tests nothing.
WORST_CENTRAL_ERROR = 1e-4

# --- the error model of npattn.verify.errors -----------------------------------------------------------------------------
# A rounding moves a number by at most u, relative. Over mantissas that are log-uniform its rms is
# u sqrt(integral of (1/12) 4 / m^2 dm / (m ln 2), m = 1 .. 2) = 0.4247 u, rounded up.
ROUNDING_STD = 0.43

# exp of float32 in NumPy was seen to be wrong by 2.4 units in the last place; 3 are allowed. A unit is up to 2 u: det counts
# 2 u for each. sigma counts u for each, since a typical exp is far better.
EXP_ULPS = 3.0

# As for exp: tanh of the libraries was seen to be wrong by up to 2 units in the last place.
TANH_ULPS = 2.0

# An angle p f: the exponent 2i / R and the power round f a few times, the product once. An error of the exponent is multiplied
# by the log of f, up to 14 for a base of 1e6: 4 units together are seldom exceeded.
ANGLE_ROUNDINGS = 4.0

# Three more roundings: dp - mean, + dlse, and the product with p.
DELTA_ROUNDING = 3.0

# Gradients of a whole model in float64, in units of the largest: 4,500 eps. Terms of a token pass through a hundred sums in a
# row, and a norm or a softmax multiplies their errors by a few.
MODEL_GRADIENT = 1e-12

# An embedding of a sentence in float32, a vector of length 1, beside that of another implementation: 8 eps of its length.
SENTENCE = 1e-6

# --- npattn verify -------------------------------------------------------------------------------------------------------
# An implementation is good if the root mean square of error / sigma over a tensor, and the largest, are at most these. Every
# honest kernel that accumulates in the inputs' precision is well below (NumPy in float32: 0.7 and 6). The rest is left for
# biased sums over long rows, tensors of few elements, and errors that are the same for a whole row.
GOOD_RMS = 3.0
GOOD_MAX = 16.0

# What sequential accumulation in the inputs' precision needs. Our own kernels are held to it.
TIGHT_RMS = 1.5
TIGHT_MAX = 8.0

# A verdict counts only where the same judge rejects a planted relative error of this size, or of 16 units where something is
# rounded so coarsely that 16 units are more.
PLANTED = 1e-3

# A candidate makes a known mistake if it is at most this far from the mistake's result, in sigma, and farther from the
# reference by this factor. sigma is that of the right equations, and the mistake may be a little worse conditioned: hence more
# than GOOD_RMS and GOOD_MAX. If it is much worse conditioned, the candidate must be nearer by a far larger factor (ROUGH).
MATCH_RMS, MATCH_MAX, MATCH_NEARER = 6.0, 60.0, 3.0
ROUGH_RMS, ROUGH_MAX, ROUGH_NEARER = 100.0, 2000.0, 1000.0

# --- the generator of npattn.ops.dropout -----------------------------------------------------------------------------------
# With this probability a statistic of true random bits is beyond its bound. The generator is a fixed function: a test that
# holds holds always. So the bound may be far out: a weak hash is beyond it by orders of magnitude, not by a little.
BEYOND = 1e-9
