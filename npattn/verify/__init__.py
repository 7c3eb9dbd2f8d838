"""Verification of other implementations: what is wrong with them, in units of the rounding error that is to be expected."""

from npattn.verify.candidates import Candidate, CandidateError, load
from npattn.verify.cases import CASES, OPTIONS, Case, Problem, draw
from npattn.verify.judge import Check, Report, Result, check, examine, verify

__all__ = [
    "CASES",
    "OPTIONS",
    "Candidate",
    "CandidateError",
    "Case",
    "Check",
    "Problem",
    "Report",
    "Result",
    "check",
    "draw",
    "examine",
    "load",
    "verify",
]
