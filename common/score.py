"""How well a model does on a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Mean of a metric in [0, 1] over a number of examples, at least 1."""

    accuracy: float
    examples: int


def pooled(scores: Sequence[Score]) -> Score | None:
    """One score over all examples together; None if there is none."""
    examples = sum(score.examples for score in scores)
    if not examples:
        return None
    return Score(sum(score.accuracy * score.examples for score in scores) / examples, examples)
