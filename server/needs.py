"""Which statistics an update must bring: those that the merge rules need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedmerge.common.base import Base
from fedmerge.common.errors import ShapeMismatch, StatisticsMissing
from fedmerge.common.layers import LayerKind
from fedmerge.common.statistics import OF_INPUTS, Shape, Statistic, statistics_of
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.training import SketchSpec
from fedmerge.server.merge.rule import Rule


def check_needs(vector: TaskVector, base: Base, rules: Iterable[Rule], where: str) -> None:
    """Holds an update's statistics against what the rules need; reads no tensor of a file of ours.

    The manifest must list what is needed. Fisher information and second moments must come with every layer
    stored; what is told of inputs with one matrix layer at least, for only the site knows which layers have
    an input that can be measured. A sketch must be as wide as its rule asks, and have its residual with it.

    Raises:
        StatisticsMissing: naming the rule, the statistic and the layer.
        ShapeMismatch: a sketch of another width, naming the layer.
    """
    shapes = statistics_of(vector).shapes
    matrices = [name for name in vector.names if base.layers[name].kind is LayerKind.MATRIX]
    rules = tuple(rules)
    asked = [(rule.name, needed) for rule in rules for needed in sorted(rule.needs)]
    for asking, needed in asked:
        lacking = [name for name in vector.names if needed not in shapes.get(name, {})]
        if needed in OF_INPUTS:
            lacking = matrices if set(matrices) <= set(lacking) else []
        listed = needed in vector.manifest.statistics
        if lacking or not listed:
            raise StatisticsMissing(
                f"rule {asking} asks for {needed}",
                where=where,
                layer=lacking[0] if listed else None,
                got=", ".join(vector.manifest.statistics) or "no statistics",
                do="Let the client measure it when it trains.",
            )
    for rule in rules:
        if (spec := rule.asks()) is not None:
            _check_sketches(shapes, spec, where)


def _check_sketches(shapes: Mapping[str, Mapping[str, Shape]], spec: SketchSpec, where: str) -> None:
    for layer, found in shapes.items():
        if (Statistic.SKETCH in found) is not (Statistic.RESIDUAL in found):
            raise StatisticsMissing("sketch or residual without the other", where=where, layer=layer)
        if Statistic.SKETCH in found:
            columns, got = found[Statistic.SKETCH]
            if got != spec.columns(columns):
                raise ShapeMismatch(
                    "a sketch of another width",
                    where=where,
                    layer=layer,
                    got=got,
                    wanted=spec.columns(columns),
                )
