"""Verification of other implementations: what is wrong with them, what they do instead, and how sure that is."""

from npattn.verify.api import check, parametrize, verify
from npattn.verify.candidate import Candidate, CandidateError, load
from npattn.verify.conventions import PRESETS, Convention
from npattn.verify.judge import Check, Result, Settings, examine
from npattn.verify.op import Problem
from npattn.verify.ops.attention.cases import CASES, Case
from npattn.verify.ops.attention.draw import OPTIONS, draw
from npattn.verify.precision import PRECISIONS, Precision
from npattn.verify.report import Report
from npattn.verify.request import CASES_OF

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
