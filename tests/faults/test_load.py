"""The server under load, over gRPC: exact counts, and the same bits however often it is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fedmerge.deploy.bench import load
from fedmerge.deploy.bench.load import COPIED, DROPPED, HONEST, REPEATED, RUBBISH, Load, bench_load, sends_of


def quiet() -> Console:
    return Console(quiet=True)


def test_the_plan_has_what_was_asked_for_and_repeats_only_what_was_sent() -> None:
    sites = sends_of(Load(updates=1000, sites=50))
    sends = [send for site in sites.values() for send in site]
    kinds = [send.kind for send in sends]
    assert len(sites) == 50
    assert kinds.count(DROPPED) == 100
    assert kinds.count(REPEATED) == 50
    assert kinds.count(HONEST) + kinds.count(DROPPED) == 850
    assert sum(kind in RUBBISH for kind in kinds) == 50
    for site in sites.values():
        for at, send in enumerate(site):
            if send.kind == REPEATED:
                assert any(e.number == send.number and e.kind in (HONEST, DROPPED) for e in site[:at])
    assert COPIED not in kinds
    assert sends_of(Load(seed=1)) != sends_of(Load(seed=2)) != sends_of(Load(seed=1))


def test_every_update_ends_as_it_should_and_is_counted(tmp_path: Path) -> None:
    result = bench_load(Load(updates=200, sites=20), quiet(), tmp_path)
    assert result.wrong == []
    assert result.counted == result.expected
    assert sum(result.counted.values()) == 200


@pytest.mark.parametrize(("rule", "kills"), [("opcm", 20), ("average", 5)])
def test_killed_at_random_under_load_the_model_is_that_of_an_unbroken_run(
    tmp_path: Path, rule: str, kills: int
) -> None:
    """Nothing acknowledged is lost, nothing is merged twice, and the bits are equal."""
    plan = Load(updates=10 * kills, sites=12, kills=kills, rule=rule, seed=7)
    result = bench_load(plan, quiet(), tmp_path)
    assert result.kills == kills
    assert result.wrong == []
    assert result.same_bits


@pytest.mark.parametrize("bug", [{"merged_twice"}, {"lost"}], ids=lambda bug: next(iter(bug)))
def test_the_comparison_finds_a_server_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: set[str]
) -> None:
    """A ledger that tells of one merge too many, or of one too few."""
    versions = load.RemoteAggregator.versions

    def told(self: load.RemoteAggregator, after: int = 0, limit: int = 100) -> list[object]:
        found = versions(self, after, limit)
        return [*found, *found[:1]] if bug == {"merged_twice"} else found[1:]

    monkeypatch.setattr(load.RemoteAggregator, "versions", told)
    result = bench_load(Load(updates=20, sites=4), quiet(), tmp_path)
    assert any(line.startswith(("merged 2 times", "lost")) for line in result.wrong)
    assert not result.passed
