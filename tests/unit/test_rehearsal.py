"""Does the rehearsal tell a site that is ready from one that is not, and say where to look?"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from small_tasks import CONFIG, loss, network, points, task

from fedmerge.client.site import Site
from fedmerge.client.tasks import Stream, Task
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError
from fedmerge.common.lookup import find_function
from fedmerge.common.privacy import Privacy
from fedmerge.deploy import doctor
from fedmerge.deploy.checks import Check
from fedmerge.deploy.launch.apart import answer
from fedmerge.deploy.launch.config import ClientConfig
from fedmerge.deploy.rehearsal import rehearsal, rehearse


def config_of(privacy: Privacy | None = None, **site) -> ClientConfig:
    own = {"name": "a", "task": "example", "device": "cpu"} | site
    return ClientConfig(site=own, server={"address": "127.0.0.1:1"}, privacy=privacy)


def rehearsed(load: Callable[[str], Task] = lambda name: task(), privacy=None, **changes) -> dict[str, Check]:
    """The checks of a site with one task, by what they are about."""
    training = replace(CONFIG, **changes.pop("training", {}))
    stream = Stream(
        "own", ("blobs",), lambda name: replace(load(name), name=name), network, training, **changes
    )
    model = stream.build_model()
    site = Site(stream, model, Base.from_model(model, stream.private))
    return {check.name.removeprefix("blobs, "): check for check in rehearse(site, config_of(privacy))}


def failed(checks: dict[str, Check]) -> Check:
    """The last check, which is the only one that failed."""
    *before, last = checks.values()
    assert {check.verdict for check in before} <= {"ok"}
    assert last.verdict == "FAIL"
    return last


def test_a_site_that_is_ready_is_told_what_to_expect():
    found = rehearsed()
    assert {check.verdict for check in found.values()} == {"ok"}
    assert found["data"].found == "50 training and 30 test examples; a batch of each can be made"
    assert re.fullmatch(
        r"loss [\d.]+; 4 of 4 layers moved; [\d.]+ m?s for a step of 2, "
        r"at most about [\d.]+ (m?s|min) for 20 steps of 8",
        found["training"].found,
    )
    assert re.fullmatch(r"2 examples scored, (0\.00|0\.50|1\.00) on average", found["scoring"].found)
    assert re.fullmatch(r"[\d.]+ kB for 4 layers", found["update"].found)


def test_a_step_and_a_score_see_two_examples_and_the_data_no_more():
    read, batches = set(), []

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, row):
            read.add(row)
            return points(50)[row]

    def look(model, batch):
        batches.append(len(batch[0]))
        return loss(model, batch)

    rehearsed(lambda name: task(train=Rows(), loss=look))
    assert read == {0, 1}
    assert batches == [2, 2]


def test_the_time_of_a_run_is_that_of_all_its_examples(monkeypatch):
    """Every step takes two seconds of a clock that the loss moves: 3 steps of 20 of 50 examples, twice."""
    clock = [0.0]

    def slow(model, batch):
        clock[0] += 2.0
        return loss(model, batch)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    found = rehearsed(lambda name: task(loss=slow), training={"epochs": 2, "batch_size": 10, "accumulate": 2})
    said = "2.0 s for a step of 2, at most about 2.0 min for 6 steps of 20"
    assert found["training"].found.endswith(said)


def test_private_layers_stay_and_frozen_ones_do_not_count_as_moved():
    found = rehearsed(private=("3.*",), training={"frozen": ("0.bias",)})
    assert "; 1 of 2 layers moved" in found["training"].found
    assert found["update"].found.endswith("for 1 layer, 2 private stay here")


def test_the_update_is_as_private_as_it_would_be_sent():
    found = rehearsed(privacy=Privacy(clip=0.5, noise=8.0))["update"]
    assert found.found.endswith("; norm at most 0.5, noise 8: epsilon 0.434 for one update at delta 1e-05")


def test_a_task_s_own_function_is_rehearsed_too():
    def fit(model, task, config, seed):
        assert (len(task.train), config.steps, config.batch_size) == (2, 2, 2)
        with torch.no_grad():
            model[0].bias.add_(1)

    found = rehearsed(lambda name: task(fit=fit))["training"]
    assert re.search(
        r"; 1 of 4 layers moved; .* in the task's own function, asked for 2 steps of 2$", found.found
    )


# --- what is wrong ---


def broken(*_: object) -> torch.Tensor:
    raise KeyError("diagnosis")


class Unreadable(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, row: int) -> None:
        raise OSError(f"scan-{row}.png is damaged\nand more")


FAULTS = {
    "a file of the data is damaged": ({"train": Unreadable()}, "data", "OSError: scan-0.png is damaged"),
    "there is no test data": ({"test": points(0)}, "data", "no test examples"),
    "there is no training data": ({"train": points(0)}, "data", "no training examples"),
    "labels are missing": ({"labels": [1, 2]}, "data", "not one label per training example"),
    "examples make no batch": ({"collate": broken}, "data", "KeyError: 'diagnosis'"),
    "the loss is wrong code": ({"loss": broken}, "training", "KeyError: 'diagnosis'"),
    "the loss is not finite": (
        {"loss": lambda model, batch: model(batch[0]).sum() / 0},
        "training",
        "the loss is not finite at step 1 of 2",
    ),
    "the loss does not depend on the model": (
        {"loss": lambda model, batch: 0 * model(batch[0]).sum()},
        "training",
        "training moved nothing",
    ),
    "the metric is a mean": (
        {"metric": lambda model, batch: torch.tensor(0.5)},
        "scoring",
        "another number of scores: got 1, wanted one for each of 2 examples",
    ),
    "the metric is a percentage": (
        {"metric": lambda model, batch: torch.full((2,), 50.0)},
        "scoring",
        "scores out of range: wanted between 0 and 1",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "said"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_said_in_one_line_where_it_shows(changes, kind, said):
    check = failed(rehearsed(lambda name: task(**changes)))
    assert check.name == f"blobs, {kind}"
    assert said in check.found
    assert "\n" not in str(check)


def calls_torch_with_other_shapes(model, batch):
    return model(batch[0][:, :2])


@pytest.mark.parametrize("wrong", [broken, calls_torch_with_other_shapes])
def test_an_error_is_told_with_the_line_of_the_site_s_code_that_led_to_it(wrong):
    check = failed(rehearsed(lambda name: task(loss=wrong)))
    assert check.do == f"See {__file__}, line {wrong.__code__.co_firstlineno + 1}."


def test_a_task_that_cannot_be_loaded_does_not_keep_the_others_from_being_tried():
    def load(name: str) -> Task:
        return task(name=name) if name == "blobs" else broken()

    stream = Stream("own", ("missing", "blobs"), load, network, CONFIG)
    site = Site(stream, model := network(), Base.from_model(model))
    found = {check.name: check.verdict for check in rehearse(site, config_of())}
    assert found["missing, data"] == "FAIL"
    assert found["blobs, update"] == "ok"
    held = {check.name for check in rehearse(site, config_of(held=["blobs"]))}
    assert held == {"blobs, data", "blobs, training", "blobs, scoring", "blobs, update"}


def test_a_private_pattern_that_matches_nothing_fails_and_a_frozen_one_warns():
    found = rehearsed(private=("3.*", "haed.*"), training={"frozen": ("0.*", "embed.*")})
    assert (found["private layers"].verdict, found["frozen layers"].verdict) == ("FAIL", "warn")
    assert found["private layers"].found == "no layer matches haed.*"


def test_a_learning_rate_of_zero_is_seen():
    assert "training moved nothing" in failed(rehearsed(training={"learning_rate": 0.0})).found


# --- in a process of its own ---


def test_the_rehearsal_tells_what_it_found_and_writes_nothing(tmp_path: Path, monkeypatch, capsys):
    """The process is this one here. The stream prints, as anybody's code may."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from fedmerge.deploy.streams.example import example\n"
        "def mine(options):\n"
        "    print('loading ...', end='')\n"
        "    return example(options)\n"
    )

    def here(function: str, *arguments: str, **_: object) -> object:
        find_function(function, where="test")(*arguments)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedmerge.deploy.rehearsal.answer", here)
    spec, state = f"{path}:mine", tmp_path / "state"
    found = list(rehearsal(config_of(Privacy(clip=1.0, noise=1.0), task=spec, held=["plain"], state=state)))
    kinds = ("data", "training", "scoring", "update")
    assert [(check.name, check.verdict) for check in found] == [(f"plain, {kind}", "ok") for kind in kinds]
    assert "epsilon 4.38" in found[-1].found
    assert {each.name for each in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("sys:exit", ["the disk is not mounted"], "training: it ended: got the disk is not mounted"),
        ("os:_exit", [], "TypeError"),
        ("os:abort", [], r"got signal 6\. Is there enough memory\?"),
        ("signal:pause", [], "got more than 0 s"),
    ],
)
def test_a_process_that_does_not_answer_says_why(function, arguments, said):
    with pytest.raises(ConfigError, match=said):
        answer(
            function,
            *arguments,
            within=timedelta(seconds=0.4 if function == "signal:pause" else 60),
            what="it ended",
            where="training",
        )


def test_a_rehearsal_that_ends_early_is_a_failure(monkeypatch):
    def killed(*_: object, **__: object) -> None:
        raise ConfigError("the rehearsal ended early", got="signal 9")

    monkeypatch.setattr("fedmerge.deploy.rehearsal.answer", killed)
    (check,) = rehearsal(config_of())
    assert (check.name, check.verdict) == ("training", "FAIL")
    assert "signal 9" in check.found


def test_a_site_whose_tasks_cannot_be_loaded_is_told_once(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(doctor, "before_client", lambda config: [Check("tasks", "FAIL", "no such file")])
    config = config_of(state=tmp_path)
    assert [check.name for check in doctor.check_client(config)] == ["tasks"]
