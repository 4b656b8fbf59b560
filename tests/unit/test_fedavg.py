"""Federated averaging across tasks: the last vector, or every step added."""

from __future__ import annotations

import torch
from rule_contract import LAYERS, Arrival, Fold, RuleContract, factored, gaussian

from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.fedavg import FedAvg

SEED = 71


class TestFedAvg(RuleContract):
    rules = (FedAvg(),)

    def layer_reference(self, rule, layer, vectors, contexts):
        return vectors[-1]


def test_the_last_vector_from_the_base_is_the_model_bit_for_bit() -> None:
    last = gaussian(SEED + 1)
    merged = Fold(FedAvg(), LAYERS).merge(gaussian(SEED), last).read()
    assert all(torch.equal(merged[name], update.values) for name, update in last.items())


def test_steps_of_rounds_add_up_from_the_last_vector() -> None:
    row = LAYERS[4]
    first = gaussian(SEED, [row])
    steps = [Arrival({row.name: Dense(torch.full(row.shape, by))}, step=True) for by in (1.0, 2.0, 4.0)]
    merged = Fold(FedAvg(), [row]).merge(first, *steps).read()
    torch.testing.assert_close(merged[row.name], first[row.name].to_dense() + 7.0)


def test_a_step_in_factors_is_added_as_its_product() -> None:
    first, step = gaussian(SEED), factored(SEED + 1, rank=2)
    step.step = True
    merged = Fold(FedAvg(), LAYERS).merge(first, step).read()
    for name, update in step.items():
        torch.testing.assert_close(merged[name], first[name].to_dense() + update.to_dense())
