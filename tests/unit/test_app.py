"""Does the ServerApp run what its run config says, and refuse what it cannot mean?"""

import json
import tomllib
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_service import FakeService
from flwr.app import Context, RecordDict
from flwr.common.config import flatten_dict
from local_grid import LocalGrid, site
from pydantic import BaseModel
from serving_bench import base

from fedmerge.common.errors import ConfigError
from fedmerge.common.training import OPTIONS, Correction, LocalTraining, Loop
from fedmerge.common.vectorfile import load
from fedmerge.deploy.streams.example import TASKS
from fedmerge.server import app as server
from fedmerge.server.aggregator import Aggregator
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import RULES, make_rule
from fedmerge.server.serving import Serving

BASE = "fedmerge.deploy.streams.example:build_model"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(grid: LocalGrid, **config: object) -> None:
    settings = {key.replace("_", "-"): value for key, value in config.items()}
    server.app(grid, Context(1, 1, {}, RecordDict(), settings))


@pytest.fixture
def steps(monkeypatch):
    """How often a serving loop steps before it ends; each step ends what it has begun."""

    def limited(serving: Serving) -> None:
        serving.history.record("settings", **serving.settings.model_dump())
        for _ in range(60):
            serving.step()

    monkeypatch.setattr(Serving, "run", limited)


@pytest.fixture
def local_engine(monkeypatch):
    """Merges in this process, without Ray, and looks at the grid often."""
    monkeypatch.setattr(server, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(server, "_start_ray", lambda grid, engines: None)
    monkeypatch.setattr(
        server, "_engine", lambda rule, base, engines: LocalEngine(rule, base.layers.values())
    )


def events(out, kind: str) -> list[dict]:
    lines = map(json.loads, (out / "history.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


# --- settings ---


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"colour": "blue"}, r"unknown run-config key: got \['colour'\]"),
        ({"mode": "fast"}, "setting 'mode'"),
        ({"mode": "serve", "base": BASE, "rule": "opcm,average"}, "a server merges under one rule"),
        ({"mode": "serve"}, "no pretrained model is named"),
        ({"mode": "serve", "base": BASE, "dtype": "f16"}, "setting 'dtype'"),
        ({"mode": "serve", "base": BASE, "range-bytes": 10**9}, "setting 'range_bytes'"),
        ({"mode": "serve", "base": BASE, "limits.colour": 1}, "setting 'limits.colour'"),
        ({"mode": "serve", "aggregator": "127.0.0.1:1", "tls-ca": "ca.crt"}, "TLS needs all three files"),
        ({"mode": "serve", "aggregator": "10.0.0.1:1"}, "another machine needs TLS"),
        ({"mode": "serve", "aggregator": "nowhere"}, "not an address"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, local_engine, config, reason):
    with pytest.raises(ConfigError, match=reason):
        run(LocalGrid({}), out=str(tmp_path / "out"), **config)


def test_a_mode_ignores_the_settings_of_the_other(tmp_path, steps, local_engine):
    run(
        LocalGrid({}),
        mode="serve",
        base=BASE,
        out=str(tmp_path),
        rounds=2,
        partition="iid",
        seed=3,
        timeout_seconds=70,
    )
    (settings,) = events(tmp_path, "settings")
    assert (settings["seed"], settings["timeout_seconds"], settings["announce_seconds"]) == (3, 70, 30)


def test_flwr_run_may_set_every_key_and_finds_its_default():
    def shown(default: object) -> object:
        """As the run config has it; an empty string where there is no default."""
        return "" if default in (None, ()) else str(default) if isinstance(default, Path) else default

    def defaults(model: type[BaseModel]) -> dict[str, object]:
        return {name: shown(field.default) for name, field in model.model_fields.items()}

    wanted = {
        key.replace("_", "-"): default
        for model in reversed(server.CONFIGS)
        for key, default in defaults(model).items()
        if key not in server.OF_METHOD or key in server.RunConfig.model_fields
    }
    owners = {name: type(make_rule(name)) for name in RULES} | {
        name: type(getattr(LocalTraining.chosen([name]), name)) for name in OPTIONS
    }
    for owner, model in (owners | {"loop": Loop, "correction": Correction}).items():
        wanted |= {f"{owner}.{option}": default for option, default in defaults(model).items()}
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert flatten_dict(project["tool"]["flwr"]["app"]["config"]) == wanted


# --- the two modes ---


def test_tasks_are_merged_and_the_run_ends(tmp_path, local_engine):
    run(LocalGrid({11: site("a")}), base=BASE, out=str(tmp_path), rule="average", tasks="plain, reversed")
    assert [event["task"] for event in events(tmp_path, "merged")] == ["plain", "reversed"]
    assert load(tmp_path / "merged-average.safetensors").manifest.base == base().fingerprint


def test_an_embedded_aggregator_takes_in_what_sites_learn_and_versions_come_back(
    tmp_path, steps, local_engine
):
    grid = LocalGrid({11: site("a", state=tmp_path / "a")})
    # The last site's base and rule stay with the folder, so a second run goes on where the first one ended.
    for tasks in (("plain",), TASKS):
        grid.join(11, site("a", *tasks, state=tmp_path / "a"))
        options = {"limits.max-update-bytes": 10**6, "rule": "opcm", "opcm.alpha": 0.4}
        out, state = str(tmp_path / "out"), str(tmp_path / "state")
        run(grid, mode="serve", base=BASE, out=out, state=state, **options)
    rule = server.make_rule("opcm", {"alpha": 0.4})
    make_engine = partial(LocalEngine, rule, base().layers.values())
    with Aggregator(tmp_path / "state", base(), rule, make_engine) as aggregator:
        assert [(update.site, update.task) for update in aggregator.updates()] == [("a", t) for t in TASKS]
        assert aggregator.wait_until_merged(60)
        assert aggregator.version().number == 3
    assert events(tmp_path / "out", "evaluated") != []


def test_a_server_with_an_address_keeps_nothing_of_its_own(tmp_path, steps, monkeypatch):
    service, asked = FakeService(base().fingerprint), []
    service.status = lambda: SimpleNamespace(base=base().fingerprint, rule="opcm", options={"alpha": 0.4})

    @contextmanager
    def remote(address, credentials, *, site, patience):
        asked.append((address, credentials, site))
        yield service

    monkeypatch.setattr("fedmerge.common.remote.RemoteAggregator", remote)
    grid = LocalGrid({11: site("a", "plain", state=tmp_path / "a")})
    run(grid, mode="serve", aggregator="127.0.0.1:7000", out=str(tmp_path / "out"))
    assert asked == [("127.0.0.1:7000", None, "gateway")]
    assert [(record.site, record.task) for record in service.submitted] == [("a", "plain")]
    assert not (tmp_path / "out" / "state").exists()
