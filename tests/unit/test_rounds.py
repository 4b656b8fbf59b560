"""Do runs that start from the merged model, in rounds, learn, merge, correct and go on as they should?"""

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from local_grid import FakeClock, Fault, LocalGrid, federate, merged_bits, sent_vector, site, vector_in

from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError, MismatchError, StoreDamaged
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.training import Correction, LocalTraining
from fedmerge.deploy.streams.example import TASKS, build_model
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.layout import Site, TaskRun
from fedmerge.server.merge import make_rule
from fedmerge.server.model import GlobalModel
from fedmerge.server.standing import Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHORT = LocalTraining.chosen((), {"loop": {"steps": 4}})
LAYOUT = {"start": "merged", "sites_per_task": 2, "training": SHORT, "tasks": TASKS[:2]}


def two_sites(*faults: Fault, clock: FakeClock | None = None) -> LocalGrid:
    return LocalGrid({11: site("a"), 12: site("b")}, faults, clock=clock)


def jobs(grid: LocalGrid, kind: str = wire.TRAIN) -> list:
    types = {wire.TRAIN: wire.TrainJob, wire.CORRECT: wire.CorrectJob, wire.EVALUATE: wire.EvaluateJob}
    found = [m for m in grid.pushed if m.metadata.message_type == kind]
    return [wire.unpack_job(types[kind], message.content, where="") for message in found]


def weights(federation, rule: str) -> dict[str, torch.Tensor]:
    return dict(federation.models[rule].merged().apply(federation.base))


# --- FedAvg ---


@pytest.fixture(scope="module")
def rounds():
    """Two sites, two tasks of two rounds each, averaged."""
    grid = two_sites()
    return federate(grid, "fedavg", rounds=2, partition="dirichlet:1.0", **LAYOUT), grid


def test_a_round_is_flowers_own_fedavg(rounds):
    _, grid = rounds
    start = build_model().state_dict()
    for first in range(0, 8, 2):
        records = []
        for reply in grid.trained()[first : first + 2]:
            vector = sent_vector(reply)
            tuned = {name: start[name] + vector.read(name).to_dense() for name in vector.names}
            metrics = MetricRecord({"num-examples": vector.manifest.examples})
            records.append(RecordDict({"arrays": ArrayRecord(tuned), "metrics": metrics}))
        start = aggregate_arrayrecords(records, "num-examples").to_torch_state_dict()
    for name, weight in weights(rounds[0], "fedavg").items():
        assert torch.allclose(weight, start[name].float(), rtol=1e-5, atol=1e-6)


def test_every_round_starts_from_the_model_as_the_one_before_left_it(rounds):
    _, grid = rounds
    sent = [message.content for message in grid.pushed if message.metadata.message_type == wire.TRAIN]
    assert [wire.ORIGIN in content for content in sent] == [False, False] + [True] * 6
    start = build_model().state_dict()
    for first in range(0, 6, 2):
        vectors = [sent_vector(reply) for reply in grid.trained()[first : first + 2]]
        total = sum(vector.manifest.examples for vector in vectors)
        for name in start:
            for vector in vectors:
                start[name] = start[name] + vector.read(name).to_dense() * vector.manifest.examples / total
        origin = wire.unpack_vector(sent[first + 2], wire.ORIGIN, where="")
        for name, weight in build_model().state_dict().items():
            assert torch.allclose(weight + origin.read(name).to_dense(), start[name], rtol=1e-5, atol=1e-6)


def test_one_task_follows_another_and_says_which_version_it_starts_from(rounds):
    run, grid = rounds
    asked = [(job.task, job.round, job.origin_version) for job in jobs(grid)]
    assert (
        asked[::2]
        == asked[1::2]
        == [("plain", 1, 0), ("plain", 2, 0), ("shuffled", 1, 1), ("shuffled", 2, 1)]
    )
    assert [event["version"] for event in run.history.of("merged")] == [1, 2]
    assert [sent_vector(reply).manifest.origin_version for reply in grid.trained()] == [0] * 4 + [1] * 4


def test_only_the_last_round_is_scored_at_the_sites(rounds):
    run, grid = rounds
    assert [job.last for job in jobs(grid)] == [False, False, True, True] * 2
    assert {task: len(found) for task, found in run.fine_tuned.items()} == {"plain": 2, "shuffled": 2}


def test_sites_may_count_alike(rounds):
    grid = two_sites()
    run = federate(
        grid, "fedavg", weights="uniform", partition="dirichlet:1.0", **LAYOUT | {"tasks": TASKS[:1]}
    )
    vectors = [sent_vector(reply) for reply in grid.trained()]
    assert vectors[0].manifest.examples != vectors[1].manifest.examples
    for name, weight in weights(run, "fedavg").items():
        mean = sum(vector.read(name).to_dense() for vector in vectors) / 2
        assert torch.allclose(weight, build_model().state_dict()[name] + mean, atol=1e-6)


def test_each_round_draws_its_sites_by_seed_task_and_round():
    sites = [Site(node, f"site-{node}", ("plain",)) for node in range(20)]

    def drawn(seed: int, task: str, round: int) -> list[int]:
        run = TaskRun(task, sites, round=round)
        run.begin(5, seed)
        assert run.waiting == {site.node for site in run.asked}
        return [site.node for site in run.asked]

    assert drawn(0, "plain", 1) == drawn(0, "plain", 1) == sorted(drawn(0, "plain", 1))
    assert (
        len(
            {tuple(drawn(*case)) for case in [(0, "plain", 1), (0, "plain", 2), (0, "b", 1), (1, "plain", 1)]}
        )
        == 4
    )
    assert len(drawn(0, "plain", 1)) == 5


def test_all_sites_are_drawn_if_there_are_no_more_than_asked_for():
    run = TaskRun("plain", [Site(1, "a", ()), Site(2, "b", ())])
    run.begin(2, 0)
    assert run.asked == run.sites


# --- rounds that bring nothing ---


def test_a_lost_round_is_skipped():
    grid = two_sites(Fault(11, "train", nth=1, error="away"), Fault(12, "train", nth=1, error="away"))
    run = federate(grid, "fedavg", rounds=3, **LAYOUT | {"tasks": TASKS[:1]})
    assert [event["round"] for event in run.history.of("round")] == [2, 3]
    assert run.history.of("merged")[0]["sites"] == ["a", "b"]


def test_a_task_that_brings_nothing_three_times_is_given_up_and_the_next_begins():
    faults = [Fault(node, "train", nth=nth, error="away") for node in (11, 12) for nth in (1, 2, 3)]
    grid = two_sites(*faults)
    run = federate(grid, "fedavg", rounds=5, **LAYOUT)
    assert [job.task for job in jobs(grid)][:8] == ["plain"] * 6 + ["shuffled"] * 2
    assert [event["task"] for event in run.history.of("merged")] == ["shuffled"]


def losing(*rounds: int) -> list[Fault]:
    """Both sites fail in these rounds of the first task."""
    return [Fault(node, "train", nth=nth, error="away") for node in (11, 12) for nth in rounds]


@pytest.mark.parametrize(
    ("rule", "start", "rounds", "lost"),
    [
        ("fisher", "base", 3, (2,)),
        ("regmean", "base", 3, (2,)),
        ("holistic", "merged", 2, (2,)),
        ("perturb_and_merge", "merged", 6, (2, 3, 4)),
    ],
)
def test_a_task_that_ends_without_the_statistics_a_rule_needs_is_left_out(rule, start, rounds, lost):
    layout = LAYOUT | {"start": start, "tasks": TASKS[:1]}
    run = federate(two_sites(*losing(*lost)), rule, rounds=rounds, **layout)
    assert run.merged == []
    (failed,) = [event for event in run.history.of("failed") if event["phase"] == "merge"]
    assert (failed["task"], "statistics" in failed["reason"]) == ("plain", True)


@pytest.mark.parametrize(("rounds", "lost"), [(2, (2,)), (6, (2, 3, 4))])
def test_rounds_stay_merged_if_the_last_is_lost_and_it_is_said_what_is_missing(rounds, lost):
    run = federate(two_sites(*losing(*lost)), "fot", rounds=rounds, **LAYOUT | {"tasks": TASKS[:1]})
    assert [event["task"] for event in run.history.of("merged")] == ["plain"]
    engine = run.models["fot"].engine
    assert all(engine.rule.shown(engine.state(name)) is None for name in engine.touched)
    (failed,) = [event for event in run.history.of("failed") if event["phase"] == "merge"]
    assert (failed["task"], "statistics" in failed["reason"]) == ("plain", True)


# --- rules that take steps once per task ---


@pytest.mark.parametrize("rule", ["perturb_and_merge", "holistic", "opcm"])
def test_a_task_of_two_rounds_from_the_merged_model_is_merged_once(rule):
    """OPCM takes vectors from the base, the others steps; all end with a version per task."""
    grid = two_sites()
    run = federate(grid, rule, rounds=2, **LAYOUT)
    assert run.history.of("failed") == []
    assert len(run.models[rule].versions) == 2
    asked = [(job.task, job.round, job.origin_version) for job in jobs(grid)][::2]
    assert asked == [("plain", 1, 0), ("plain", 2, 0), ("shuffled", 1, 1), ("shuffled", 2, 1)]


def test_a_step_that_a_rule_does_not_take_is_merged_as_the_vector_from_the_base():
    grid = LocalGrid({11: site("a")})
    run = federate(grid, "average", start="merged", training=SHORT, tasks=TASKS[:2])
    first, second = (sent_vector(reply) for reply in grid.trained())
    for name, weight in build_model().state_dict().items():
        tau = [first.read(name).to_dense(), first.read(name).to_dense() + second.read(name).to_dense()]
        assert torch.allclose(weights(run, "average")[name], weight + sum(tau) / 2, atol=1e-6)


def test_what_a_step_is_merged_as_stays_the_same_when_it_is_read_again():
    """An engine reads it again when a worker dies, by then with another model current."""
    base = Base.from_model(build_model())
    ones = TaskVector.of({name: torch.ones(layer.shape) for name, layer in base.merged_layers.items()})
    with LocalEngine(make_rule("average"), base.layers.values(), workers=1) as engine:
        model, given, absorb = GlobalModel(base, engine), [], engine.absorb
        engine.absorb = lambda vector, *args, **named: (given.append(vector), absorb(vector, *args, **named))[
            1
        ]
        model.merge(ones)
        model.merge(ones, step=True)
        assert bool((given[1].read("0.weight").to_dense() == 2.0).all())


# --- updates as factors ---


@pytest.mark.parametrize(("rule", "start"), [("fedavg", "merged"), ("average", "base")])
def test_many_rounds_of_factors_take_no_more_room_than_the_layer(rule, start):
    training = LocalTraining.chosen(["lora"], {"lora": {"rank": 4}, "loop": {"steps": 1}})
    grid = two_sites()
    layout = LAYOUT | {"start": start, "training": training, "tasks": TASKS[:1]}
    federate(grid, rule, rounds=6, evaluate=False, **layout)
    sizes = [wire.bytes_in(m.content) for m in grid.pushed if m.metadata.message_type == wire.TRAIN]
    weights = sum(tensor.nbytes for tensor in build_model().state_dict().values())
    assert max(sizes) < 2 * weights


# --- all tasks at once ---


def test_jointly_learned_tasks_are_one_update():
    grid = LocalGrid({11: site("a")})
    run = federate(grid, "average", joint=True, training=SHORT, tasks=TASKS)
    (job,) = jobs(grid)
    assert (job.task, job.also) == ("plain", ("shuffled", "reversed"))
    assert set(run.fine_tuned) == set(TASKS)
    assert all(run.score("average", 1, task) for task in TASKS)


def test_a_site_that_joins_late_adds_no_task_to_what_is_learned_jointly():
    grid = LocalGrid({11: site("a", *TASKS[:2])}, late={12: (2, site("b", *TASKS))})
    run = federate(grid, "average", joint=True, training=SHORT)
    assert [(job.task, job.also) for job in jobs(grid)] == [("plain", ("shuffled",))]
    assert len(run.merged) == 1


# --- corrections ---


@pytest.fixture(scope="module")
def corrected():
    grid = two_sites()
    correction = Correction(layers="2.weight", learning_rate=0.01)
    return federate(grid, "holistic", correction=correction, **LAYOUT), grid


def test_only_a_version_with_one_before_it_is_corrected(corrected):
    run, grid = corrected
    assert [(job.task, job.origin_version) for job in jobs(grid, wire.CORRECT)] == [("shuffled", 2)] * 2
    assert [event["task"] for event in run.history.of("corrected")] == ["shuffled"] * 2


def test_a_correction_moves_the_fitted_layer_by_the_mean_of_the_sites(corrected):
    run, grid = corrected
    asked = [m.content for m in grid.pushed if m.metadata.message_type == wire.CORRECT]
    before = wire.unpack_vector(asked[0], wire.MERGED, where="")
    found = [vector_in(r.content) for r in grid.replies if r.metadata.message_type == wire.CORRECT]
    shares = [vector.manifest.examples for vector in found]
    assert {vector.names for vector in found} == {("2.weight",)}
    moved = sum(v.read("2.weight").to_dense() * n for v, n in zip(found, shares, strict=True)) / sum(shares)
    after = run.models["holistic"].merged()
    assert moved.abs().max() > 0
    assert torch.allclose(
        after.read("2.weight").to_dense(), before.read("2.weight").to_dense() + moved, atol=1e-6
    )
    assert torch.equal(after.read("0.weight").to_dense(), before.read("0.weight").to_dense())
    assert run.models["holistic"].engine.totals.merges == 2


def test_what_is_scored_is_the_corrected_version(corrected):
    run, grid = corrected
    last = [m.content for m in grid.pushed if m.metadata.message_type == wire.EVALUATE][-1]
    published = wire.unpack_vector(last, wire.MERGED + "holistic", where="")
    final = run.models["holistic"].merged()
    assert torch.equal(published.read("2.weight").to_dense(), final.read("2.weight").to_dense())


def test_without_any_correction_the_version_stays_as_it_was_merged():
    faults = [Fault(node, wire.CORRECT, error="away") for node in (11, 12)]
    grid = two_sites(*faults)
    correction = Correction(layers="2.weight", learning_rate=0.01)
    run = federate(grid, "holistic", correction=correction, **LAYOUT)
    plain = federate(two_sites(), "holistic", **LAYOUT)
    assert [event["phase"] for event in run.history.of("failed")] == ["correct"] * 2
    assert merged_bits(run, "holistic") == merged_bits(plain, "holistic")


@pytest.mark.parametrize("origin", [0, 1])
def test_a_correction_from_another_version_is_refused(origin):
    def stale(content: RecordDict) -> RecordDict:
        vector = wire.unpack_vector(content, wire.VECTOR, where="")
        from dataclasses import replace

        from fedmerge.common.vectorfile import to_bytes

        older = replace(vector, manifest=replace(vector.manifest, origin_version=origin))
        return RecordDict({**content, wire.VECTOR: wire.pack_vector(to_bytes(older))})

    grid = two_sites(Fault(11, wire.CORRECT, tamper=stale))
    correction = Correction(layers="2.weight", learning_rate=0.01)
    run = federate(grid, "holistic", correction=correction, **LAYOUT)
    assert [event["site"] for event in run.history.of("corrected")] == ["b"]
    (failed,) = run.history.of("failed")
    assert "origin version" in failed["reason"]


# --- layouts that do not work ---


def test_two_rules_cannot_both_be_the_merged_model_that_sites_start_from():
    with pytest.raises(ConfigError, match="one merged model only"):
        federate(two_sites(), "fedavg", "opcm", **LAYOUT)


@pytest.mark.parametrize(("rule", "start"), [("opcm", "merged"), ("holistic", "base"), ("fedavg", "merged")])
def test_a_correction_needs_steps_from_the_merged_model(rule, start):
    with pytest.raises(ConfigError, match="a correction needs"):
        federate(two_sites(), rule, **LAYOUT | {"start": start}, correction=Correction())


# --- going on after a stop ---


class Stopped(Exception):
    """The process ends here."""


class StoppingGrid(LocalGrid):
    """Ends the process when it has pushed so many messages of a kind."""

    def __init__(self, *args: object, after: int, kind: str = wire.TRAIN, **named: object) -> None:
        super().__init__(*args, **named)
        self._left, self._kind = after, kind

    def push_messages(self, messages):
        messages = list(messages)
        self._left -= sum(m.metadata.message_type == self._kind for m in messages)
        if self._left < 0:
            raise Stopped
        return super().push_messages(messages)


def stopped_and_resumed(folder: Path, after: int, kind: str, rule: str, **layout: object):
    sites = {11: site("a"), 12: site("b")}
    with pytest.raises(Stopped):
        federate(
            StoppingGrid(sites, after=after, kind=kind), rule, checkpoints=Checkpoints(folder, 1), **layout
        )
    grid = two_sites()
    return federate(grid, rule, checkpoints=Checkpoints(folder, 1), **layout), grid


def told(run, rule: str) -> list:
    return [(v, t, run.score(rule, v, t)) for v in range(1, len(run.merged) + 1) for t in TASKS[:2]]


@pytest.mark.parametrize("after", [1, 3, 4, 6, 9, 11])
def test_a_stopped_run_ends_with_the_bits_and_scores_of_an_unbroken_one(tmp_path, after):
    layout = LAYOUT | {"rounds": 3}
    whole = federate(two_sites(), "fot", **layout)
    resumed, grid = stopped_and_resumed(tmp_path, after, wire.TRAIN, "fot", **layout)
    assert merged_bits(resumed, "fot") == merged_bits(whole, "fot")
    assert told(resumed, "fot") == told(whole, "fot")
    assert [event["task"] for event in resumed.history.of("merged")] == list(TASKS[:2])
    assert resumed.fine_tuned == whole.fine_tuned
    assert len(jobs(grid)) <= 12 - after + 2


@pytest.mark.parametrize("after", [3, 6, 9, 11])
def test_a_stopped_run_with_compression_loses_nothing_of_what_sites_have_not_sent(tmp_path, after):
    layout = LAYOUT | {"rounds": 3, "compress": "int8"}
    whole = federate(two_sites(), "fedavg", **layout)
    resumed, grid = stopped_and_resumed(tmp_path, after, wire.TRAIN, "fedavg", **layout)
    assert merged_bits(resumed, "fedavg") == merged_bits(whole, "fedavg")
    assert len(jobs(grid)) == (12 if after < 6 else 6)


@pytest.mark.parametrize("after", [2, 3, 5])
def test_a_run_that_stops_while_a_version_is_scored_has_it_scored(tmp_path, after):
    layout = LAYOUT | {"rounds": 2}
    whole = federate(two_sites(), "fedavg", **layout)
    resumed, _ = stopped_and_resumed(tmp_path, after, wire.EVALUATE, "fedavg", **layout)
    assert told(resumed, "fedavg") == told(whole, "fedavg")
    assert merged_bits(resumed, "fedavg") == merged_bits(whole, "fedavg")


def test_tasks_that_start_from_the_base_are_not_learned_again_once_they_are_merged(tmp_path):
    layout = {"tasks": TASKS, "training": SHORT}
    whole = federate(two_sites(), "opcm", **layout)
    resumed, grid = stopped_and_resumed(tmp_path, 4, wire.EVALUATE, "opcm", **layout)
    assert merged_bits(resumed, "opcm") == merged_bits(whole, "opcm")
    assert len(jobs(grid)) < 3


def test_a_standing_of_another_layout_is_refused_and_kept(tmp_path):
    with pytest.raises(Stopped):
        federate(
            StoppingGrid({11: site("a"), 12: site("b")}, after=3),
            "fedavg",
            checkpoints=Checkpoints(tmp_path, 1),
            rounds=3,
            **LAYOUT,
        )
    before = (tmp_path / "standing.json").read_bytes()
    with pytest.raises(MismatchError, match="laid out differently"):
        federate(two_sites(), "fedavg", checkpoints=Checkpoints(tmp_path, 1), rounds=4, **LAYOUT)
    assert (tmp_path / "standing.json").read_bytes() == before


@pytest.mark.parametrize("which", ["standing.json", "model"])
def test_a_damaged_standing_is_refused(tmp_path, which):
    with pytest.raises(Stopped):
        federate(
            StoppingGrid({11: site("a"), 12: site("b")}, after=5),
            "fedavg",
            checkpoints=Checkpoints(tmp_path, 1),
            rounds=3,
            **LAYOUT,
        )
    (path,) = [path for path in tmp_path.iterdir() if which in path.name]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(StoreDamaged):
        federate(two_sites(), "fedavg", checkpoints=Checkpoints(tmp_path, 1), rounds=3, **LAYOUT)


def test_the_folder_holds_one_generation_and_is_removed_on_request(tmp_path):
    folder = tmp_path / "standing"
    federate(two_sites(), "fedavg", checkpoints=Checkpoints(folder, 1), rounds=2, **LAYOUT)
    numbers = {path.name.split("-")[0] for path in folder.iterdir() if path.name != "standing.json"}
    assert len(numbers) == 1
    Checkpoints(folder).clear()
    assert not folder.exists()


def stopped(folder: Path, grid: LocalGrid, rule: str, **layout: object) -> None:
    with pytest.raises(Stopped):
        federate(grid, rule, checkpoints=Checkpoints(folder, 1), **layout)


def test_tasks_keep_their_turn_if_other_sites_are_there_after_the_stop(tmp_path):
    """Site b came alone and brought its task first; a is there from the start of the second process."""
    layout = {"start": "merged", "training": SHORT, "rounds": 2}
    b, a = site("b", "shuffled", "reversed"), site("a", "plain", "shuffled")
    stopped(tmp_path, StoppingGrid({12: b}, after=3), "fedavg", **layout)
    grid = LocalGrid({11: a, 12: b})
    run = federate(grid, "fedavg", checkpoints=Checkpoints(tmp_path, 1), **layout)
    assert [task.task for task in run.merged] == ["shuffled", "reversed", "plain"]
    assert [(job.task, job.round) for job in jobs(grid)][:2] == [("reversed", 2), ("plain", 1)]
    assert run.history.of("failed") == []


def test_a_merged_task_that_nobody_holds_any_more_stays_merged(tmp_path):
    layout = {"start": "merged", "training": SHORT, "tasks": ("shuffled", "plain")}
    sites = {11: site("a", "plain"), 12: site("b", "shuffled")}
    stopped(tmp_path, StoppingGrid(sites, after=1), "fedavg", **layout)
    grid = LocalGrid({11: site("a", "plain")})
    run = federate(grid, "fedavg", checkpoints=Checkpoints(tmp_path, 1), **layout)
    assert [task.task for task in run.merged] == ["shuffled", "plain"]
    assert [job.task for job in jobs(grid)] == ["plain"]
    assert run.score("fedavg", 2, "plain") is not None


def test_a_task_under_way_that_nobody_holds_any_more_is_an_error(tmp_path):
    layout = {"start": "merged", "training": SHORT, "tasks": ("shuffled", "plain"), "rounds": 3}
    sites = {11: site("a", "plain"), 12: site("b", "shuffled")}
    stopped(tmp_path, StoppingGrid(sites, after=2), "fedavg", **layout)
    with pytest.raises(MismatchError, match="nobody holds the task that is under way: got shuffled"):
        federate(LocalGrid({11: sites[11]}), "fedavg", checkpoints=Checkpoints(tmp_path, 1), **layout)


def test_a_run_stopped_after_a_lost_round_goes_on_like_an_unbroken_one(tmp_path):
    layout = LAYOUT | {"rounds": 3, "tasks": TASKS[:1]}
    sites = {11: site("a"), 12: site("b")}
    whole = federate(two_sites(*losing(2)), "fedavg", **layout)
    stopped(tmp_path, StoppingGrid(sites, losing(2), after=4), "fedavg", **layout)
    faults = [Fault(node, "train", nth=1, error="away") for node in sites]
    resumed = federate(two_sites(*faults), "fedavg", checkpoints=Checkpoints(tmp_path, 1), **layout)
    assert merged_bits(resumed, "fedavg") == merged_bits(whole, "fedavg")
    assert [event["round"] for event in resumed.history.of("round")] == [1, 3]


def test_scores_after_the_last_round_count_once_if_a_task_is_learned_again(tmp_path):
    """Site c has taught its task when the first is merged, and the process stops before b has."""
    layout = {"tasks": TASKS, "training": SHORT}
    apps = {node: site(name, task) for node, name, task in zip((11, 12, 13), "abc", TASKS, strict=True)}
    clock = FakeClock(tick=0.01)
    faults = [Fault(11, wire.TRAIN, delay=0.5), Fault(12, wire.TRAIN, delay=50.0)]
    grid = StoppingGrid(apps, faults, clock=clock, after=4, kind=wire.EVALUATE)
    with pytest.raises(Stopped):
        federate(grid, "opcm", checkpoints=Checkpoints(tmp_path, 1), clock=clock, **layout)
    grid = LocalGrid(apps)
    resumed = federate(grid, "opcm", checkpoints=Checkpoints(tmp_path, 1), **layout)
    assert sorted(job.task for job in jobs(grid)) == sorted(TASKS[1:])
    assert {task: len(found) for task, found in resumed.fine_tuned.items()} == dict.fromkeys(TASKS, 1)


def test_what_went_wrong_before_a_run_went_on_stays_in_its_history(tmp_path):
    layout = LAYOUT | {"rounds": 3}
    apps = {11: site("a"), 12: site("b"), 13: site("c")}
    refused = [Fault(13, wire.HELLO, error="no")]
    stopped(tmp_path, StoppingGrid(apps, refused, after=3), "fedavg", **layout)
    run = federate(LocalGrid(apps, refused), "fedavg", checkpoints=Checkpoints(tmp_path, 1), **layout)
    said = [(event["site"], event["phase"]) for event in run.history.of("failed")]
    assert said == [("node 13", "hello")] * 2
    kinds = [event["event"] for event in run.history.events]
    assert kinds.index("round") < kinds.index("resumed")
