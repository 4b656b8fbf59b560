"""The engine on a CUDA device; runs where there is one."""

from __future__ import annotations

import pytest
import torch
from engine_contract import LAYERS
from rule_contract import relative_difference
from test_every_rule import stream

from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import RULES, make_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def merged(rule: str, device: str) -> dict[str, torch.Tensor]:
    """The stream brings dense vectors and factors, and leaves some layers out."""
    with LocalEngine(make_rule(rule), LAYERS, device=device) as engine:
        for update in stream(engine.rule):
            engine.merge(update)
            engine.prepare()
        return {name: update.to_dense() for name, update in engine.merged().items()}


@pytest.mark.parametrize("rule", RULES)
def test_a_gpu_merges_what_a_cpu_merges(rule: str) -> None:
    assert relative_difference(merged(rule, "cuda"), merged(rule, "cpu")) < 1e-4
