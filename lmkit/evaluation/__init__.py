"""Evaluation: what is scored and how (plan), scoring, what goes beyond static scoring, numbers, checks, a report."""

from __future__ import annotations

from lmkit.evaluation.scoring import Tally, TokenScores, perplexity, score_stream

__all__ = ["Tally", "TokenScores", "perplexity", "score_stream"]
