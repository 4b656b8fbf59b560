"""Does every training option and every method run through Flower's engine, learn, and send what it should?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmerge.common.training import OPTIONS
from fedmerge.deploy.report.results import Results
from fedmerge.deploy.report.results import load as load_results
from fedmerge.server.methods import PRESETS

pytestmark = [pytest.mark.simulation, pytest.mark.ray]

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from rich.console import Console
from fedmerge.common.training import OPTIONS
from fedmerge.deploy.progress import RunProgress
from fedmerge.deploy.simulate import SimulationConfig, simulate
from fedmerge.server.methods import PRESETS, make_method

if __name__ == "__main__":
    loop = {"loop": {"steps": 30}, "lora": {"rank": 4}, "stop": {"every": 10, "held_out": 0.25}}
    of_presets = {name for preset in PRESETS.values() for name in preset.options}
    rules = {"project": "fot"}
    methods = [
        replace(make_method(rules.get(name, "average"), loop, [name]), name=name)
        for name in OPTIONS
        if name not in of_presets
    ]
    methods += [make_method(name, loop) for name in ("average", *PRESETS)]
    methods += [replace(make_method("average", loop, compress="int8"), name="int8")]
    config = SimulationConfig(stream="example", tasks=2, sites=2, sites_per_task=2, rounds=2)
    simulate(config, methods, Path(sys.argv[1]), RunProgress(Console(quiet=True)))
"""
OF_PRESETS = {name for preset in PRESETS.values() for name in preset.options}
NAMES = (*(name for name in OPTIONS if name not in OF_PRESETS), "average", *PRESETS, "int8")
"""Options that belong to no preset alone, and all presets."""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """One simulation of all of them, two tasks that two sites share, two rounds."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "run.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "run.py", "out"],
        cwd=folder,
        env=os.environ | {"FLWR_HOME": str(folder / "flwr"), "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return load_results(folder / "out")


def test_nothing_fails(results):
    assert results.failures == []
    assert set(results.rules) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_sites_learn_their_tasks(results, name):
    found = results.rules[name].learning.fine_tuned
    for task in results.tasks:
        assert found[task] > results.zero_shot[task] + 0.2


@pytest.mark.parametrize("name", NAMES)
def test_the_merged_model_is_better_than_the_base(results, name):
    base = sum(results.zero_shot.values()) / len(results.tasks)
    assert results.rules[name].acc > base + 0.1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "joint"])
def test_there_is_a_version_for_every_task(results, name):
    assert [merge.task for merge in results.rules[name].merges] == results.tasks


def test_all_tasks_at_once_are_one_version(results):
    assert len(results.rules["joint"].merges) == 1


def test_adapters_and_integers_take_fewer_bytes(results):
    whole, adapters, integers = (results.rules[name].learning for name in ("average", "lora", "int8"))
    assert whole.updates == adapters.updates == integers.updates == 8
    assert adapters.up_bytes < whole.up_bytes
    assert integers.up_bytes < 0.6 * whole.up_bytes
    assert 0 < integers.cut < 0.02


def test_what_is_told_of_a_method_is_what_it_does(results):
    learning = results.rules["holistic"].learning
    assert (learning.rule, learning.start, list(learning.training)) == ("holistic", "merged", ["tangent"])
    assert results.rules["sequential"].learning.sites == 1
    assert results.rules["average"].learning.loop == {"steps": 30}


def test_projection_at_the_sites_and_at_the_server_both_keep_the_first_task(results):
    for name in ("fot", "fot_gram", "project"):
        assert results.rules[name].forgetting < results.rules["fedavg"].forgetting


def test_the_folder_of_an_unfinished_run_is_gone(results, tmp_path_factory):
    folder = next(Path(tmp_path_factory.getbasetemp()).glob("methods*")) / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "accuracy.csv",
        "history.jsonl",
        "merges.csv",
        "results.json",
    ]
    events = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "learning" for event in events) == len(NAMES)
