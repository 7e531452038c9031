"""Evaluation: what is scored and how (plan), scoring, what goes beyond static scoring, numbers, checks, a report."""

from __future__ import annotations

from lmkit.evaluation.plan import Reach, Segments
from lmkit.evaluation.scoring import Tally, TokenScores, perplexity

__all__ = ["Reach", "Segments", "Tally", "TokenScores", "perplexity"]
