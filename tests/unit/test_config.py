"""Settings are refused with the key, the value and the reason."""

from __future__ import annotations

import pytest

from fedmerge.common.config import validated
from fedmerge.common.errors import ConfigError
from fedmerge.deploy.simulate import SimulationConfig
from fedmerge.server.layout import FederationConfig


@pytest.mark.parametrize("kind", [FederationConfig, SimulationConfig])
@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5", "dirichlet:.25", "shards:1", "shards:20"])
def test_known_partitions_pass(kind: type, partition: str) -> None:
    assert validated(kind, {"partition": partition}).partition == partition


@pytest.mark.parametrize("kind", [FederationConfig, SimulationConfig])
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"partition": "dirichlet:abc"}, "partition"),
        ({"partition": "shards"}, "partition"),
        ({"partition": "shards:0"}, "partition"),
        ({"partition": "shards:1.5"}, "partition"),
        ({"rounds": 0}, "rounds"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"sites_per_task": 0}, "sites_per_task"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"roudns": 2}, "roudns"),
    ],
)
def test_a_setting_out_of_range_is_named(kind: type, settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=f"setting '{named}'") as refusal:
        validated(kind, settings)
    assert repr(settings[named]) in str(refusal.value)
