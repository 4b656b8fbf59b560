"""Averaging task vectors: theta_0 + mean of tau_i (model soups, arXiv 2203.05482, for a shared base)."""

from __future__ import annotations

from typing import ClassVar

from fedmerge.server.merge.rule import Totals
from fedmerge.server.merge.sums import SumRule


class Average(SumRule):
    """The mean of all task vectors so far: a running sum read out at 1/T. No options."""

    name: ClassVar[str] = "average"

    def scale(self, totals: Totals) -> float:
        return totals.share
