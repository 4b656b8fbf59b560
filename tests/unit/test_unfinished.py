"""Does a simulation that was stopped find what its methods left, and say so where that cannot be used?"""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from local_grid import Fault, LocalGrid, federate, site
from rich.console import Console

from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError, StoreDamaged
from fedmerge.common.privacy import Privacy
from fedmerge.deploy.choices import parse_methods
from fedmerge.deploy.outcomes import Outcome, Unfinished, outcome
from fedmerge.deploy.progress import RunProgress
from fedmerge.deploy.report.results import RuleResults
from fedmerge.deploy.simulate import SimulationConfig, simulate
from fedmerge.deploy.streams.example import TASKS, build_model
from fedmerge.server import app as server
from fedmerge.server.history import History
from fedmerge.server.layout import FederationConfig
from fedmerge.server.methods import make_method
from fedmerge.server.standing import Checkpoints

LEFT = Outcome(result=RuleResults.measured(["plain"], [], []), shared=True, zero_shot={}, held={})
EVENTS = [{"event": "learning", "methods": ["opcm"]}, {"event": "trained", "bytes_up": 5}]
MORE = [{"event": "learning", "methods": ["fot"]}, {"event": "trained", "bytes_up": 7}]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def unfinished(tmp_path: Path) -> Unfinished:
    """One method has ended."""
    begun = Unfinished(tmp_path / "unfinished")
    begun.begin("settings", resume=False)
    begun.keep({"opcm": LEFT}, EVENTS)
    return begun


def test_what_methods_left_is_found_with_its_events(unfinished: Unfinished) -> None:
    unfinished.keep({"fot+lowrank:0.9": LEFT}, EVENTS + MORE)
    found, events = unfinished.begin("settings", resume=True)
    assert found == {"opcm": LEFT, "fot+lowrank:0.9": LEFT}
    assert events == EVENTS + MORE


def test_events_of_a_method_that_has_not_ended_do_not_count(
    unfinished: Unfinished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between writing the events and writing what they belong to."""

    def full(self: Outcome) -> str:
        raise OSError("full")

    with monkeypatch.context() as broken:
        broken.setattr(Outcome, "model_dump_json", full)
        with pytest.raises(OSError, match="full"):
            unfinished.keep({"fot": LEFT}, EVENTS + MORE)
    assert unfinished.begin("settings", resume=True) == ({"opcm": LEFT}, EVENTS)


@pytest.mark.parametrize("pattern", ["methods.json", "method-*.json", "events.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_a_damaged_file_is_an_error_that_names_it(unfinished: Unfinished, pattern: str, damage: str) -> None:
    (path,) = unfinished.folder.glob(pattern)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-4] if damage == "cut" else b'{"a": 1}')
    if (pattern, damage) == ("methods.json", "missing"):
        assert unfinished.begin("settings", resume=True) == ({}, [])  # no method has ended
        return
    with pytest.raises(StoreDamaged, match=path.name):
        unfinished.begin("settings", resume=True)


def test_other_settings_are_refused_and_nothing_is_lost(unfinished: Unfinished) -> None:
    with pytest.raises(ConfigError, match="other settings"):
        unfinished.begin("others", resume=True)
    assert unfinished.begin("settings", resume=True)[0] == {"opcm": LEFT}


def test_a_run_with_noise_cannot_go_on_for_sites_would_forget_what_they_have_spent(tmp_path: Path) -> None:
    config = SimulationConfig(stream="example", privacy=Privacy(clip=1.0, noise=0.5))
    with pytest.raises(ConfigError, match="privacy"):
        simulate(config, [make_method("fedavg")], tmp_path, RunProgress(Console(quiet=True)), resume=True)


@pytest.mark.parametrize(
    ("method", "option", "kept"),
    [("fedavg", "", True), ("fot", "migu", True), ("fedavg", "coso", False), ("average", "", False)],
)
def test_a_method_is_gone_on_with_midway_unless_sites_remember_earlier_tasks(
    method: str, option: str, kept: bool
) -> None:
    assert make_method(method, train=[option] if option else []).resumable is kept


def test_a_method_whose_tasks_all_fail_leaves_a_result_without_rows() -> None:
    grid = LocalGrid({11: site("a")}, [Fault(kind=wire.TRAIN, error="no")])
    run = federate(grid, "opcm", tasks=TASKS)
    left = outcome(make_method("opcm"), run, 0, TASKS, run.history.events)
    assert (left.result.accuracy, left.result.acc, left.result.merges) == ([], None, [])
    assert left.zero_shot.keys() == set(TASKS)
    assert left.result.learning is not None
    assert (left.result.learning.up_bytes, left.result.learning.cut) == (0, None)
    assert Outcome.model_validate_json(left.model_dump_json()) == left


def test_a_way_to_compress_that_is_named_twice_is_run_once() -> None:
    found, _ = parse_methods(None, "fedavg", "", "int8,none,int8", [])
    assert [method.name for method in found] == ["fedavg+int8", "fedavg+none"]


def test_the_run_config_may_say_where_sites_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(server, "run_methods", lambda grid, base, methods, *rest: ran.extend(methods))
    monkeypatch.setattr(server, "log_to_stderr", lambda: None)
    base = "fedmerge.deploy.streams.example:build_model"
    told = {"base": base, "rule": "opcm", "start": "merged", "out": str(tmp_path / "out")}
    server.app(LocalGrid({}), Context(1, 1, {}, RecordDict(), told))
    assert [(method.name, method.start) for method in ran] == [("opcm", "merged")]


@pytest.mark.parametrize(("private", "kept"), [((), True), (("2.*",), False)])
def test_a_run_with_private_layers_is_not_gone_on_with_midway(
    monkeypatch: pytest.MonkeyPatch, private: tuple[str, ...], kept: bool
) -> None:
    standings: list[object] = []
    monkeypatch.setattr(server, "_start_ray", lambda *_: None)
    monkeypatch.setattr(server, "_run_group", lambda *given: standings.append(given[-1]))
    base, method = Base.from_model(build_model(), private), make_method("fedavg")
    layout, engines = FederationConfig(), server.EngineConfig()
    server.run_methods(
        LocalGrid({}), base, [method], layout, engines, History(), checkpoints=lambda _: Checkpoints(Path())
    )
    assert [standing is not None for standing in standings] == [kept]
