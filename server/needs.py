"""Which statistics an update must bring: those that the merge rules need."""

from __future__ import annotations

from collections.abc import Iterable

from fedmerge.common.base import Base
from fedmerge.common.errors import StatisticsMissing
from fedmerge.common.layers import LayerKind
from fedmerge.common.statistics import Statistic, statistics_of
from fedmerge.common.taskvector import TaskVector
from fedmerge.server.merge.rule import Rule


def check_needs(vector: TaskVector, base: Base, rules: Iterable[Rule], where: str) -> None:
    """Holds an update's statistics against what the rules need; reads no tensor of a file of ours.

    The manifest must list what is needed. Fisher information and second moments must come with every layer
    stored; input Grams with one matrix layer at least, for only the site knows which layers have an input
    that can be measured.

    Raises:
        StatisticsMissing: naming the rule, the statistic and the layer.
    """
    shapes = statistics_of(vector).shapes
    matrices = [name for name in vector.names if base.layers[name].kind is LayerKind.MATRIX]
    asked = [(rule.name, needed) for rule in rules for needed in sorted(rule.needs)]
    for rule, needed in asked:
        lacking = [name for name in vector.names if needed not in shapes.get(name, {})]
        if needed == Statistic.INPUT_GRAM:
            lacking = matrices if set(matrices) <= set(lacking) else []
        listed = needed in vector.manifest.statistics
        if lacking or not listed:
            raise StatisticsMissing(
                f"rule {rule} asks for {needed}",
                where=where,
                layer=lacking[0] if listed else None,
                got=", ".join(vector.manifest.statistics) or "no statistics",
                do="Let the client measure it when it trains.",
            )
