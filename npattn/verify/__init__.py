"""Verification of other implementations: what is wrong with them, what they do instead, and how sure that is."""

from npattn.verify.candidates import Candidate, CandidateError, load
from npattn.verify.cases import CASES, OPTIONS, Case, Problem, draw
from npattn.verify.conventions import PRESETS, Convention
from npattn.verify.judge import Check, Result, Settings, examine
from npattn.verify.precision import PRECISIONS, Precision
from npattn.verify.report import CASES_OF, Report, check, parametrize, verify

__all__ = [
    "CASES",
    "CASES_OF",
    "OPTIONS",
    "PRECISIONS",
    "PRESETS",
    "Candidate",
    "CandidateError",
    "Case",
    "Check",
    "Convention",
    "Precision",
    "Problem",
    "Report",
    "Result",
    "Settings",
    "check",
    "draw",
    "examine",
    "load",
    "parametrize",
    "verify",
]
