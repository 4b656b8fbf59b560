"""The environment of every test, and Ray for the tests that need it."""

from __future__ import annotations

import os

# Before ray, flwr or an OpenMP runtime is loaded: they read these once.
os.environ.update(
    {
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
)

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("engine_contract", "rule_contract")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ends this session's Ray, whoever started it last."""
    yield
    import ray

    ray.shutdown()


@pytest.fixture
def local_ray(ray_session: None) -> None:
    """One local Ray for the whole session; started again if a test shut it down."""
    from fedmerge.server.engine.ray_engine import start_ray

    start_ray(num_cpus=2)


@pytest.fixture(scope="session")
def spare_actors() -> dict[str, list[Any]]:
    """Actors that engines of earlier tests left over, by the Ray node they live on."""
    return {}


@pytest.fixture
def ray_engine(local_ray: None, spare_actors: dict[str, list[Any]]) -> Iterator[Callable[..., Any]]:
    """Makes Ray engines that begin on the actors earlier tests left over; starting one takes seconds.

    Each such actor runs ``ShardActor.__init__`` anew, so it holds nothing. Replacements of actors that
    die in a test are real starts. Engines are closed after the test.
    """
    import ray
    from ray.exceptions import RayActorError

    from fedmerge.server.engine.ray_engine import RayEngine, ShardActor

    spare = spare_actors.setdefault(ray.get_runtime_context().get_node_id(), [])

    class ThriftyEngine(RayEngine):
        def _start(self, layers: list[Any]) -> Any:
            beginning = not hasattr(self, "_places")
            while beginning and spare:
                actor = spare.pop()
                try:
                    ray.get(actor.__ray_call__.remote(ShardActor.__init__, self.rule, layers, self.threads))
                    return actor
                except RayActorError:
                    continue
            return super()._start(layers)

        def close(self) -> None:
            spare.extend(place.actor for place in self._places)
            self._places = []

    opened: list[RayEngine] = []

    def make(rule: Any, layers: Any, **options: Any) -> RayEngine:
        engine = ThriftyEngine(rule, layers, **options)
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.close()
