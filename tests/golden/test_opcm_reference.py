"""OPCM against the published step in float64, from the first task to the sixth."""

from __future__ import annotations

import pytest
import torch

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import TaskVector, subtract
from fedmerge.deploy.bench.published import PublishedOpcm
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge.opcm import Opcm

SEED = 7
TASKS = 6

SHAPES: dict[str, tuple[int, ...]] = {
    "tall.weight": (96, 40),
    "wide.weight": (40, 96),
    "square.weight": (64, 64),
    "conv.weight": (32, 4, 3, 3),
    "row.weight": (1, 50),
    "norm.bias": (64,),
}

LAYERS = [
    LayerSpec(name, shape, torch.float32, LayerKind.VECTOR if name == "norm.bias" else LayerKind.MATRIX)
    for name, shape in SHAPES.items()
]


@pytest.mark.parametrize("diagonal", ["cleared", "left"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("names", [*([name] for name in SHAPES if name != "norm.bias"), list(SHAPES)])
def test_recursion_equals_the_published_one(names: list[str], alpha: float, diagonal: str) -> None:
    """Weights, lambda_t and mean norm at every step, from real weights; ours in float32."""
    layers = [layer for layer in LAYERS if layer.name in names]
    generator = torch.Generator().manual_seed(SEED)
    base = {layer.name: torch.randn(layer.shape, generator=generator) * 0.02 for layer in layers}
    linear = [layer.name for layer in layers if layer.kind is LayerKind.MATRIX]
    exact = PublishedOpcm(base, linear, alpha=alpha, diagonal=diagonal, dtype=torch.float64)
    with LocalEngine(Opcm(alpha=alpha, diagonal=diagonal), layers) as engine:
        for task in range(TASKS):
            tuned = {
                name: weight + torch.randn(weight.shape, generator=generator) * 0.001
                for name, weight in base.items()
            }
            vector = {name: subtract(tuned[name], base[name], where="test", layer=name) for name in base}
            engine.merge(TaskVector.of(vector))
            exact.merge(tuned)
            where = f"seed {SEED}, task {task + 1}"
            assert engine.rule.lambda_t(engine.totals) == pytest.approx(exact.lambda_t, rel=1e-6), where
            assert engine.totals.mean_norm == pytest.approx(sum(exact.norms) / (task + 1), rel=1e-6), where
            for name, wanted in exact.vector().items():
                off = torch.linalg.vector_norm(engine.read_layer(name) - wanted)
                assert off <= 1e-5 * torch.linalg.vector_norm(wanted), f"{where}, {name}"


def test_published_step_in_float32_is_farther_from_float64_than_ours() -> None:
    """What the float64 basis is for: float32 rounding turns close singular directions into each other."""
    generator = torch.Generator().manual_seed(SEED)
    base = {"weight": torch.zeros(192, 192)}
    wide, narrow = (PublishedOpcm(base, base, dtype=dtype) for dtype in (torch.float64, torch.float32))
    layers = [LayerSpec("weight", (192, 192), torch.float32, LayerKind.MATRIX)]
    with LocalEngine(Opcm(), layers) as engine:
        for _ in range(TASKS):
            vector = {"weight": torch.randn(192, 192, generator=generator)}
            engine.merge(TaskVector.of(vector))
            wide.merge(vector)
            narrow.merge(vector)
        ours = engine.read_layer("weight")
    wanted = wide.vector()["weight"]
    off, published_off = (
        float(torch.linalg.vector_norm(x - wanted)) for x in (ours, narrow.vector()["weight"])
    )
    assert off < published_off / 5
