"""The engine on a CUDA device; runs where there is one."""

from __future__ import annotations

import pytest
import torch

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense, LowRank, TaskVector
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import make_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SPECS = [
    LayerSpec("wide", (96, 256), torch.float32, LayerKind.MATRIX),
    LayerSpec("adapted", (128, 128), torch.float32, LayerKind.MATRIX),
    LayerSpec("bias", (96,), torch.float32, LayerKind.VECTOR),
]


def merged(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with LocalEngine(make_rule("opcm"), SPECS, device=device) as engine:
        for _ in range(4):
            adapted = LowRank(
                torch.randn(128, 4, generator=generator), torch.randn(4, 128, generator=generator), (128, 128)
            )
            wide, bias = (
                Dense(torch.randn(96, 256, generator=generator)),
                Dense(torch.randn(96, generator=generator)),
            )
            engine.merge(TaskVector.of({"wide": wide, "adapted": adapted, "bias": bias}))
        return {name: update.to_dense() for name, update in engine.merged().items()}


def test_a_gpu_merges_what_a_cpu_merges() -> None:
    on_gpu, on_cpu = merged("cuda"), merged("cpu")
    for name, values in on_cpu.items():
        assert torch.linalg.vector_norm(on_gpu[name] - values) <= 1e-5 * torch.linalg.vector_norm(values)
