"""Training options: each changes one thing about the plain loop of :mod:`fedmerge.client.loop`."""

from __future__ import annotations

from collections.abc import Callable

from fedmerge.client.options.coso import GradientSubspaces
from fedmerge.client.options.lora import LowRankAdaptation
from fedmerge.client.options.migu import LargestUnits
from fedmerge.client.options.option import Option, Run
from fedmerge.client.options.osft import SmallDirections
from fedmerge.client.options.perturb import Perturbation
from fedmerge.client.options.project import ProtectedInputs
from fedmerge.client.options.prox import Proximal
from fedmerge.client.options.stop import EarlyStopping
from fedmerge.client.options.tangent import Linearisation
from fedmerge.common.training import LocalTraining

KINDS: dict[str, Callable[..., Option]] = {
    "lora": LowRankAdaptation,
    "tangent": Linearisation,
    "perturb": Perturbation,
    "osft": SmallDirections,
    "coso": GradientSubspaces,
    "migu": LargestUnits,
    "prox": Proximal,
    "project": ProtectedInputs,
    "stop": EarlyStopping,
}


def options_of(training: LocalTraining, run: Run) -> list[Option]:
    """The options in use, in the order in which they act."""
    return [KINDS[name](run, getattr(training, name)) for name in training.options]
