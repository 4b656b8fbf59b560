"""Reaching Ray, or failing early."""

from __future__ import annotations

import pytest
import ray

from fedmerge.common.errors import EngineError
from fedmerge.server.engine.ray_engine import start_ray


@pytest.fixture
def no_ray_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.mark.usefixtures("no_ray_yet")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_without_a_cluster_is_refused_at_once(address: str) -> None:
    with pytest.raises(EngineError, match="no Ray cluster listens there") as refusal:
        start_ray(address)
    assert address in str(refusal.value)


@pytest.mark.usefixtures("no_ray_yet")
def test_waiting_for_somebody_elses_ray_ends() -> None:
    with pytest.raises(EngineError, match="Ray was not started"):
        start_ray(wait=0.2)
