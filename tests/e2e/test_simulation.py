"""Does ``fedmerge simulate``, through Flower's engine and Ray actors, give what its parts give?"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from local_grid import LocalGrid, federate, merged_bits, site

from fedmerge.deploy.report.results import load as load_results
from fedmerge.deploy.streams.example import TASKS, TEST_ROWS, TRAIN_ROWS

RULES = ("opcm", "average")

pytestmark = [pytest.mark.simulation, pytest.mark.ray]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder of one run of the example stream over two sites."""
    folder = tmp_path_factory.mktemp("simulation")
    command = [sys.executable, "-c", "from fedmerge.deploy.cli import main; main()", "simulate"]
    command += ["--stream", "example", "--sites", "2", "--rule", ",".join(RULES), "--save-merged"]
    environment = os.environ | {"FLWR_HOME": str(folder / "flwr")}
    done = subprocess.run(
        [*command, "--out", str(folder / "run")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="module")
def in_process():
    """The same sites, tasks and seeds in this process, without Flower's engine and without Ray."""
    grid = LocalGrid({11: site("site-0", rows=None), 12: site("site-1", rows=None)})
    return federate(grid, *RULES, tasks=TASKS)


def events(out: Path, kind: str) -> list[dict]:
    lines = (out / "history.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("rule", RULES)
def test_the_model_has_the_bits_of_a_run_in_one_process(out, in_process, rule):
    assert (out / f"merged-{rule}.safetensors").read_bytes() == merged_bits(in_process, rule)


def test_the_results_are_complete(out):
    results = load_results(out)
    assert (results.stream, results.seed, results.sites, results.tasks) == ("example", 0, 2, list(TASKS))
    assert set(results.rules) == set(RULES)
    for rule in RULES:
        matrix = results.rules[rule].accuracy
        assert [len(row) for row in matrix] == [3, 3, 3]
        assert all(accuracy is not None for row in matrix for accuracy in row)
        assert [merge.task for merge in results.rules[rule].merges] == list(TASKS)
        assert [merge.version for merge in results.rules[rule].merges] == [1, 2, 3]
    for measured in (results.zero_shot, results.fine_tuned):
        assert set(measured) == set(TASKS)
        assert None not in measured.values()
    assert results.test_examples == dict.fromkeys(TASKS, TEST_ROWS)
    assert results.failures == []


def test_the_results_are_those_of_a_run_in_one_process(out, in_process):
    results = load_results(out)
    for rule in RULES:
        for version in (1, 2, 3):
            wanted = [in_process.score(rule, version, task).accuracy for task in TASKS]
            assert results.rules[rule].accuracy[version - 1] == wanted
    for task in TASKS:
        assert results.zero_shot[task] == in_process.score("base", 0, task).accuracy


def test_learning_and_merging_help(out):
    results = load_results(out)
    assert min(results.fine_tuned.values()) > 0.95
    for rule in RULES:
        assert results.rules[rule].acc > max(results.zero_shot.values()) + 0.2


def test_the_traffic_of_every_site_is_counted(out):
    traffic = {row.site: row for row in load_results(out).sites_traffic}
    assert {name: row.tasks for name, row in traffic.items()} == {
        "site-0": ["plain", "reversed"],
        "site-1": ["shuffled"],
    }
    for name, row in traffic.items():
        assert row.up_bytes == sum(e["bytes_up"] for e in events(out, "trained") if e["site"] == name) > 0
        assert row.down_bytes == sum(e["bytes_down"] for e in events(out, "sent") if e["site"] == name) > 0


def test_the_history_is_complete(out):
    assert {event["site"] for event in events(out, "joined")} == {"site-0", "site-1"}
    assert sorted(event["task"] for event in events(out, "trained")) == sorted(TASKS)
    assert all(event["examples"] == TRAIN_ROWS for event in events(out, "trained"))
    assert [event["task"] for event in events(out, "published")] == list(TASKS)
    assert len(events(out, "merged")) == len(TASKS) * len(RULES)
    assert len(events(out, "evaluated")) == 2 * (len(TASKS) + 1)
    assert events(out, "failed") == []
    assert len(events(out, "finished")) == 1


def test_the_report_stands_alone(out):
    page = (out / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)["']""", page)
    assert [link for link in loaded if not link.startswith("data:")] == []
    assert not re.search(r"@import|url\(\s*['\"]?https?:", page)
    for name in (*RULES, *TASKS):
        assert name in page


def test_tables_for_other_tools_lie_beside_it(out):
    accuracy = (out / "accuracy.csv").read_text().splitlines()
    assert len(accuracy) == 1 + len(RULES) * len(TASKS) * len(TASKS)
    assert len((out / "merges.csv").read_text().splitlines()) == 1 + len(RULES) * len(TASKS)
