"""Task arithmetic: theta_0 + lambda * sum of tau_i (arXiv 2212.04089)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedmerge.server.merge.rule import Totals
from fedmerge.server.merge.sums import SumRule


class TaskArithmetic(SumRule):
    """The sum of all task vectors so far, times a fixed factor.

    Args:
        factor: lambda, 0 to 2. The continual-merging papers use 0.3 for 8 tasks, 0.1 for 14 and 20.
    """

    name: ClassVar[str] = "task_arithmetic"

    factor: float = Field(default=0.3, ge=0.0, le=2.0)

    def scale(self, totals: Totals) -> float:
        return self.factor if totals.merges else 0.0
