"""Does a whole run over real ClientApps merge what the sites learned, in order, and say everything it did?"""

from dataclasses import replace

import pytest
import torch
from local_grid import (
    ROWS,
    FakeClock,
    Fault,
    LocalGrid,
    federate,
    merged_bits,
    merged_offline,
    sent_vector,
    site,
    vector_in,
)
from rich.console import Console
from safetensors.torch import load_file, save_file

from fedmerge.client.app import seed_of_round
from fedmerge.client.site import open_site
from fedmerge.client.tasks import StreamOptions
from fedmerge.client.training import score
from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError
from fedmerge.common.score import pooled
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.deploy.offline import Workers, merge_files
from fedmerge.deploy.streams.example import TASKS, TEST_ROWS, build_model, load_task
from fedmerge.server.admission import Limits
from fedmerge.server.combine import add_vectors, combine
from fedmerge.server.merge import make_rule

RULES = ("opcm", "average", "task_arithmetic")
MODEL_BYTES = sum(4 * tensor.numel() for tensor in build_model().state_dict().values())

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def three_sites(*faults: Fault, clock: FakeClock | None = None) -> LocalGrid:
    """One task each."""
    apps = {11 + turn: site("abc"[turn], task) for turn, task in enumerate(TASKS)}
    return LocalGrid(apps, faults, clock=clock)


def weights_of(federation, rule: str) -> dict[str, torch.Tensor]:
    return dict(federation.models[rule].merged().apply(federation.base))


@pytest.fixture(scope="module")
def whole():
    """One run of three tasks over three sites under every rule, and its grid."""
    grid = three_sites()
    return federate(grid, *RULES, tasks=TASKS), grid


@pytest.fixture(scope="module")
def shared():
    """Two sites share one task, unevenly."""
    grid = LocalGrid({11: site("a"), 12: site("b")})
    run = federate(grid, "average", tasks=("plain",), sites_per_task=2, partition="dirichlet:1.0")
    return run, grid


@pytest.fixture(scope="module")
def two_rounds():
    grid = LocalGrid({11: site("a")})
    return federate(grid, "average", tasks=("plain",), rounds=2), grid


# --- merging ---


def test_every_task_is_merged_once_in_the_plans_order(whole):
    run, _ = whole
    for rule in RULES:
        merged = [event for event in run.history.of("merged") if event["rule"] == rule]
        assert [event["task"] for event in merged] == list(TASKS)
        assert [event["version"] for event in merged] == [1, 2, 3]
        assert [event["sites"] for event in merged] == [["a"], ["b"], ["c"]]
    assert run.history.of("failed") == []


@pytest.mark.parametrize("rule", RULES)
def test_the_model_is_that_of_the_same_vectors_merged_offline_bit_for_bit(whole, rule):
    run, grid = whole
    assert merged_bits(run, rule) == merged_offline(map(sent_vector, grid.trained()), rule)


def test_the_merge_command_gives_the_same_weights_bit_for_bit(whole, tmp_path):
    run, grid = whole
    save_file(build_model().state_dict(), tmp_path / "base.safetensors")
    files = []
    for turn, reply in enumerate(grid.trained()):
        files.append(tmp_path / f"{turn}.safetensors")
        files[-1].write_bytes(wire.vector_bytes(reply.content, wire.VECTOR, where="reply"))
    out = tmp_path / "merged.safetensors"
    quiet = Console(quiet=True)
    merge_files(tmp_path / "base.safetensors", files, out, make_rule("opcm"), {}, [], Workers(), quiet)
    merged, wanted = load_file(out), weights_of(run, "opcm")
    assert set(merged) == set(wanted)
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def test_a_rule_alone_gives_the_same_model_as_among_others(whole):
    run, grid = whole
    alone_grid = three_sites()
    alone = federate(alone_grid, "average", tasks=TASKS)
    sent, sent_alone = (
        [wire.vector_bytes(r.content, wire.VECTOR, where="") for r in g.trained()] for g in (grid, alone_grid)
    )
    assert sent == sent_alone
    assert merged_bits(alone, "average") == merged_bits(run, "average")


@pytest.mark.parametrize("delays", [(400, 200, 0), (200, 0, 400), (0, 0, 400)])
def test_the_order_of_replies_changes_no_bit(whole, delays):
    run, _ = whole
    clock = FakeClock(tick=1.0)
    faults = [Fault(11 + turn, wire.TRAIN, delay=delay) for turn, delay in enumerate(delays)]
    late = federate(
        three_sites(*faults, clock=clock), *RULES, tasks=TASKS, clock=clock, wait_seconds=100, evaluate=False
    )
    arrived = [event["site"] for event in late.history.of("trained")]
    assert arrived == sorted("abc", key=lambda label: delays["abc".index(label)])
    assert [task.task for task in late.merged] == list(TASKS)
    assert all(merged_bits(late, rule) == merged_bits(run, rule) for rule in RULES)


def test_a_task_is_merged_as_soon_as_all_earlier_ones_are(whole):
    clock = FakeClock(tick=1.0)
    grid = three_sites(Fault(13, wire.TRAIN, delay=400), clock=clock)
    run = federate(grid, tasks=TASKS, clock=clock, wait_seconds=100, evaluate=False)
    events = [(e["event"], e["task"]) for e in run.history.events if e["event"] in ("trained", "merged")]
    assert events.index(("merged", "shuffled")) < events.index(("trained", "reversed"))


def test_a_plan_may_name_some_tasks_in_any_order():
    run = federate(three_sites(), tasks=("reversed", "plain"), evaluate=False)
    assert [task.task for task in run.merged] == ["reversed", "plain"]


def test_without_a_plan_tasks_come_in_the_order_of_the_sites_labels():
    grid = LocalGrid({11: site("z", "plain"), 12: site("y", "shuffled"), 13: site("x", "reversed")})
    run = federate(grid, evaluate=False)
    assert [task.task for task in run.merged] == ["reversed", "shuffled", "plain"]


def test_sites_that_hold_everything_take_turns():
    run = federate(LocalGrid({11: site("a"), 12: site("b")}), tasks=TASKS, evaluate=False)
    assert [[held.label for held in task.sites] for task in run.runs] == [["a"], ["b"], ["a"]]


def test_the_result_does_not_depend_on_node_ids(whole):
    run, _ = whole
    apps = {99 - turn: site("abc"[turn], task) for turn, task in enumerate(TASKS)}
    assert merged_bits(federate(LocalGrid(apps), tasks=TASKS, evaluate=False)) == merged_bits(run)


def test_another_seed_gives_another_model(whole):
    run, _ = whole
    assert merged_bits(federate(three_sites(), tasks=TASKS, seed=1, evaluate=False)) != merged_bits(run)


# --- what travels ---


def test_a_reply_holds_a_vector_and_numbers_and_nothing_else(whole):
    _, grid = whole
    assert len(grid.trained()) == 3
    for reply in grid.trained():
        content = reply.content
        assert set(content) == {"task-vector", "metrics", "update"}
        assert set(content["task-vector"]) == {"bytes"}
        assert set(content["update"]) == {"task", "site"}
        task = content["update"]["task"]
        assert set(content["metrics"]) == {
            "num-examples",
            "train-loss",
            "train-seconds",
            "score-seconds",
            f"accuracy/fine-tuned/{task}",
            f"examples/fine-tuned/{task}",
        }
        assert MODEL_BYTES < wire.bytes_in(content) < MODEL_BYTES + 2000


def test_what_a_site_sends_is_neither_its_weights_nor_its_data(whole):
    run, grid = whole
    for reply in grid.trained():
        sent = wire.vector_bytes(reply.content, wire.VECTOR, where="")
        vector = sent_vector(reply)
        tuned = dict(vector.apply(run.base))
        task = load_task(vector.manifest.task, 0, ROWS)
        secrets = [*tuned.values(), *(run.base.read(name) for name in run.base.layers)]
        secrets += [task.train[row][0] for row in range(ROWS)]
        assert not any(values.numpy().tobytes() in sent for values in secrets)


def test_the_vector_is_what_the_site_moved(whole):
    _, grid = whole
    at = open_site("example", StreamOptions(0, ROWS))
    vector, _ = at.learn(at.task("plain", 0, 1, "iid", 0), seed=0, site="a", device="cpu")
    assert to_bytes(vector) == wire.vector_bytes(grid.trained()[0].content, wire.VECTOR, where="")


def test_the_server_sends_no_weights_before_there_is_a_version(whole):
    _, grid = whole
    for message in grid.pushed:
        if message.metadata.message_type in (wire.HELLO, wire.TRAIN):
            assert list(message.content) == [wire.JOB]


# --- several sites per task ---


def test_sites_of_one_task_are_combined_by_examples_and_merged_once(shared):
    run, grid = shared
    vectors = [sent_vector(reply) for reply in grid.trained()]
    counts = [reply.content["metrics"]["num-examples"] for reply in grid.trained()]
    assert sum(counts) == ROWS
    assert counts[0] != counts[1]
    assert merged_bits(run, "average") == merged_offline([combine(vectors, counts)], "average")
    merged = run.models["average"].merged()
    for name in merged.names:
        mean = sum(v.read(name).to_dense().double() * n / ROWS for v, n in zip(vectors, counts, strict=True))
        assert torch.allclose(merged.read(name).to_dense().double(), mean, rtol=1e-6, atol=1e-7)
    (merged,) = run.history.of("merged")
    assert (merged["sites"], merged["examples"], merged["version"]) == (["a", "b"], ROWS, 1)


@pytest.mark.parametrize("delays", [(0, 0, 0), (9, 6, 3), (3, 9, 6)])
def test_the_order_in_which_sites_of_one_task_answer_changes_no_bit(delays):
    def filled(value: float):
        def tamper(content):
            vector = vector_in(content)
            layers = {name: torch.full(update.shape, value) for name, update in vector.items()}
            content[wire.VECTOR] = wire.pack_vector(to_bytes(TaskVector.of(layers, (), vector.manifest)))
            return content

        return tamper

    clock = FakeClock(tick=0.01)
    faults = [Fault(11 + turn, wire.TRAIN, delay=delay) for turn, delay in enumerate(delays)]
    # Two sites that cancel: what is left of the third's values in float64 depends on the order of the sum.
    faults += [
        Fault(11, wire.TRAIN, tamper=filled(2.0**60)),
        Fault(13, wire.TRAIN, tamper=filled(-(2.0**60))),
    ]
    grid = LocalGrid({11 + turn: site("abc"[turn], rows=66) for turn in range(3)}, faults, clock=clock)
    run = federate(
        grid,
        tasks=("plain",),
        sites_per_task=3,
        clock=clock,
        limits=Limits(layer_ratio=1e20, total_ratio=1e20),
        wait_seconds=100,
        evaluate=False,
    )
    assert merged_bits(run) == merged_offline([combine([sent_vector(r) for r in grid.trained()], [22] * 3)])
    assert run.merged[0].learned_by == ["a", "b", "c"]


def test_the_sites_of_a_task_are_scored_on_disjoint_halves_of_its_test_rows(shared):
    run, _ = shared
    halves = run.scores["average", 1, "plain"]
    assert [half.examples for half in halves] == [TEST_ROWS // 2] * 2
    assert run.score("average", 1, "plain") == pooled(halves)


# --- several rounds ---


def test_the_second_round_starts_from_what_the_first_moved(two_rounds):
    _, grid = two_rounds
    first, second = (m for m in grid.pushed if m.metadata.message_type == wire.TRAIN)
    assert wire.ORIGIN not in first.content
    assert wire.unpack_job(wire.TrainJob, second.content, where="").round == 2
    origin = wire.unpack_vector(second.content, wire.ORIGIN, where="origin")
    moved = sent_vector(grid.trained()[0])
    for name in moved.names:
        assert torch.equal(origin.read(name).to_dense(), moved.read(name).to_dense())


def test_the_rounds_vectors_are_summed_and_merged_once(two_rounds):
    run, grid = two_rounds
    first, second = (sent_vector(reply) for reply in grid.trained())
    assert [version.number for version in run.models["average"].versions] == [1]
    assert merged_bits(run, "average") == merged_offline([add_vectors(first, second)], "average")


def test_two_rounds_end_where_the_site_itself_ended(two_rounds):
    run, _ = two_rounds
    at = open_site("example", StreamOptions(0, ROWS))
    task = at.task("plain", 0, 1, "iid", 0)
    first, _ = at.learn(task, seed=0, site="a", device="cpu")
    at.learn(task, seed=seed_of_round(0, 2), site="a", origin=first, device="cpu")
    merged = weights_of(run, "average")
    for name, weight in at.model.state_dict().items():
        assert torch.allclose(merged[name], weight, rtol=1e-5, atol=1e-6)


def test_only_the_last_round_counts_as_fine_tuned(two_rounds):
    run, _ = two_rounds
    assert len(run.fine_tuned["plain"]) == 1
    assert [event["round"] for event in run.history.of("trained")] == [1, 2]


# --- scores ---


def test_every_version_is_scored_on_every_task_also_the_base(whole):
    run, _ = whole
    for task in TASKS:
        assert run.score("base", 0, task).examples == TEST_ROWS
        for rule in RULES:
            for version in (1, 2, 3):
                assert run.score(rule, version, task).examples == TEST_ROWS
    assert run.score("opcm", 4, "plain") is None


def test_scores_are_those_of_the_base_plus_the_merged_vector(whole):
    run, _ = whole
    model = build_model()
    for task in TASKS:
        held = load_task(task, 0, ROWS)
        assert run.score("base", 0, task) == score(model, held, 128, "cpu")
    for rule in RULES:
        model.load_state_dict(weights_of(run, rule))
        for task in TASKS:
            assert run.score(rule, 3, task) == score(model, load_task(task, 0, ROWS), 128, "cpu")
        model = build_model()


def test_learning_and_merging_help(whole):
    run, _ = whole
    assert pooled(run.fine_tuned["plain"]).accuracy > 0.9
    assert run.score("opcm", 1, "plain").accuracy > 0.9
    assert run.score("opcm", 3, "plain").accuracy > run.score("base", 0, "plain").accuracy + 0.2


def test_without_evaluation_nothing_is_sent_for_scoring():
    grid = three_sites()
    run = federate(grid, tasks=TASKS, evaluate=False)
    assert run.scores == {}
    assert wire.EVALUATE not in {message.metadata.message_type for message in grid.pushed}


# --- the record ---


def test_the_history_tells_who_did_what_how_large_and_how_long(whole):
    run, grid = whole
    joined = {event["site"]: event["tasks"] for event in run.history.of("joined")}
    assert joined == {"a": ["plain"], "b": ["shuffled"], "c": ["reversed"]}
    for event, reply in zip(run.history.of("trained"), grid.trained(), strict=True):
        assert event["bytes_up"] == wire.bytes_in(reply.content)
        assert event["examples"] == ROWS
        assert min(event["seconds"], event["train_seconds"], event["score_seconds"]) >= 0
        assert event["loss"] > 0
    sent = [event for event in run.history.of("sent") if event["message"] == "evaluate"]
    assert len(sent) == 3 * 4
    of_rules = {rule: model.merged() for rule, model in run.models.items()}
    down = sum(len(to_bytes(vector)) for vector in of_rules.values())
    assert {event["bytes_down"] for event in sent} == {0, down}
    assert run.history.events[-1]["event"] == "finished"


def test_the_history_has_the_numbers_of_every_merge(whole):
    run, grid = whole
    norms = [sent_vector(reply).norm() for reply in grid.trained()]
    for rule, model in run.models.items():
        rows = [event for event in run.history.of("merged") if event["rule"] == rule]
        for row, version, norm in zip(rows, model.versions, norms, strict=True):
            assert row["update_norm"] == pytest.approx(norm, rel=1e-6)
            assert (row["lambda_t"], row["scale"]) == (version.lambda_t, version.scale)
            assert row["merged_norm"] == version.merged_norm > 0
            assert min(row["absorb_seconds"], row["read_seconds"]) >= 0
        assert rows[-1]["merged_norm"] == pytest.approx(model.merged().norm(), rel=1e-5)


def test_the_listener_hears_what_the_history_keeps(whole, tmp_path):
    run, _ = whole
    run.history.save(tmp_path / "history.jsonl")
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == len(run.history.events)


# --- joining ---


def test_a_site_that_joins_late_brings_its_task_after_the_others():
    grid = LocalGrid(
        {11: site("a", "plain"), 12: site("b", "shuffled")}, late={13: (6, site("c", "plain", "reversed"))}
    )
    run = federate(grid, *RULES)
    assert [task.task for task in run.merged] == ["plain", "shuffled", "reversed"]
    assert run.merged[-1].learned_by == ["c"]
    assert merged_bits(run) == merged_offline(map(sent_vector, grid.trained()))
    assert run.score("opcm", 3, "reversed").examples == TEST_ROWS


def test_a_site_that_joins_while_the_last_task_is_learned_is_still_served():
    late = {14: (2, site("d", "plain"))}
    run = federate(LocalGrid({11: site("a", "shuffled")}, late=late), evaluate=False)
    assert [task.task for task in run.merged] == ["shuffled", "plain"]


def test_it_waits_for_as_many_sites_as_it_was_told():
    clock = FakeClock(tick=1.0)
    grid = LocalGrid({11: site("a", "plain")}, late={12: (1, site("b", "shuffled"))}, clock=clock)
    run = federate(grid, tasks=("plain", "shuffled"), min_sites=2, wait_seconds=100, clock=clock)
    assert [task.task for task in run.merged] == ["plain", "shuffled"]


def test_no_site_in_time_is_an_error_that_says_so():
    clock = FakeClock(tick=1.0)
    with pytest.raises(ConfigError, match="no site is ready: got 0 connected, none usable"):
        federate(LocalGrid({}), clock=clock, wait_seconds=100)
    assert 100 < clock.now < 1000


def test_no_site_with_any_of_the_tasks_is_an_error_that_names_them():
    with pytest.raises(ConfigError, match=r"no connected site holds any of the tasks: got \['music'\]"):
        federate(three_sites(), tasks=("music",))


def test_a_task_that_nobody_holds_is_left_out_and_recorded():
    run = federate(three_sites(), tasks=("plain", "music"), evaluate=False)
    assert [task.task for task in run.merged] == ["plain"]
    (failed,) = run.history.of("failed")
    assert (failed["task"], failed["phase"]) == ("music", "assign")


# --- private layers ---


def test_private_layers_stay_as_they_are_at_every_site(tmp_path):
    path = tmp_path / "heads.py"
    path.write_text(
        "from dataclasses import replace\n"
        "from fedmerge.deploy.streams.example import example\n"
        "def heads(options):\n"
        "    return replace(example(options), private=('2.*',))\n"
    )
    base = Base.from_model(build_model(), ["2.*"])
    grid = LocalGrid({11: site("a", "plain", stream=f"{path}:heads")})
    run = federate(grid, base=base, tasks=("plain",))
    assert set(sent_vector(grid.trained()[0]).names) == {"0.weight", "0.bias"}
    merged = weights_of(run, "opcm")
    assert torch.equal(merged["2.weight"], base.read("2.weight"))
    assert not torch.equal(merged["0.weight"], base.read("0.weight"))


def test_what_the_site_claims_in_its_file_is_not_what_is_recorded():
    def boast(content):
        vector = vector_in(content).in_memory()
        manifest = replace(vector.manifest, site="the ministry", examples=9_999_999_999_999_999_999)
        content[wire.VECTOR] = wire.pack_vector(to_bytes(replace(vector, manifest=manifest)))
        return content

    grid = LocalGrid({11: site("a"), 12: site("b")}, [Fault(kind=wire.TRAIN, tamper=boast)])
    run = federate(grid, tasks=("plain",), sites_per_task=2, rounds=2, evaluate=False)
    (merged,) = run.history.of("merged")
    assert (merged["sites"], merged["examples"]) == (["a", "b"], ROWS)


# --- private layers ---

HEADS = """
from dataclasses import replace
from fedmerge.deploy.streams.example import example
def heads(options):
    return replace(example(options), private=("2.*",))
"""


def scored_with(site_at, federation, task: str, head: dict[str, torch.Tensor]) -> float:
    weights = dict(federation.models["average"].merged().apply(site_at.base)) | head
    site_at.model.load_state_dict(weights)
    return score(site_at.model, site_at.task(task, 0, 1, "iid", 0), device="cpu").accuracy


def test_a_merged_model_is_scored_with_the_head_that_each_task_was_learned_with(tmp_path):
    (path := tmp_path / "heads.py").write_text(HEADS)
    base = Base.from_model(build_model(), ["2.*"])
    grid = LocalGrid({11: site("a", stream=f"{path}:heads")})
    run = federate(grid, "average", base=base, tasks=TASKS[:2])
    at = open_site(f"{path}:heads", StreamOptions(0, ROWS))
    for task in TASKS[:2]:
        at.learn(at.task(task, 0, 1, "iid", 0), seed=0, site="a", device="cpu")
        assert run.score("average", 2, task).accuracy == scored_with(at, run, task, at.heads())


def test_a_tasks_next_round_goes_on_from_its_head(tmp_path):
    (path := tmp_path / "heads.py").write_text(HEADS)
    base = Base.from_model(build_model(), ["2.*"])
    grid = LocalGrid({11: site("a", stream=f"{path}:heads")})
    run = federate(grid, "average", base=base, tasks=TASKS[:1], rounds=2)
    at = open_site(f"{path}:heads", StreamOptions(0, ROWS))
    task = at.task("plain", 0, 1, "iid", 0)
    first, _ = at.learn(task, seed=0, site="a", device="cpu")
    second, _ = at.learn(
        task, seed=seed_of_round(0, 2), site="a", origin=first, device="cpu", heads=at.heads()
    )
    sent = sent_vector(grid.trained()[1])
    assert all(torch.equal(sent.read(n).to_dense(), second.read(n).to_dense()) for n in second.names)
    assert run.score("average", 1, "plain").accuracy == scored_with(at, run, "plain", at.heads())


def test_a_task_that_was_not_learned_has_the_head_that_the_model_was_built_with(tmp_path):
    (path := tmp_path / "heads.py").write_text(HEADS)
    base = Base.from_model(build_model(), ["2.*"])
    grid = LocalGrid({11: site("a", stream=f"{path}:heads"), 12: site("b", stream=f"{path}:heads")})
    run = federate(grid, "average", base=base, tasks=TASKS[:1], sites_per_task=2, sites_per_round=1)
    taught = run.history.of("trained")[0]["site"]
    at = open_site(f"{path}:heads", StreamOptions(0, ROWS))
    merged = run.models["average"].merged()
    other = at.task("plain", int(taught == "a"), 2, "iid", 0)
    built = at.score([other], merged, "cpu")["plain"]
    assert built in run.scores["average", 1, "plain"]


def test_another_way_of_learning_is_scored_as_if_it_were_the_first(tmp_path):
    (path := tmp_path / "heads.py").write_text(HEADS)
    base = Base.from_model(build_model(), ["2.*"])
    alone, second = (LocalGrid({11: site("a", stream=f"{path}:heads")}) for _ in range(2))
    federate(second, "ties", base=base, tasks=TASKS[:2])
    wanted, found = (
        federate(grid, "average", base=base, tasks=TASKS[:2], start="merged").scores
        for grid in (alone, second)
    )
    assert found == wanted


def test_a_task_that_is_not_in_a_version_is_scored_with_the_head_as_it_was_built(tmp_path):
    (path := tmp_path / "heads.py").write_text(HEADS)
    base = Base.from_model(build_model(), ["2.*"])
    grid = LocalGrid({11: site("a", stream=f"{path}:heads")})
    run = federate(grid, "average", base=base, tasks=TASKS[:2])  # both are learned before version 1 is scored
    at = open_site(f"{path}:heads", StreamOptions(0, ROWS))
    first = merged_first(grid)
    assert run.score("average", 1, TASKS[1]) == at.score([at.task(TASKS[1], 0, 1, "iid", 0)], first)[TASKS[1]]


def merged_first(grid: LocalGrid) -> TaskVector:
    """The merged vector of version 1, as it was sent to be scored."""
    asked = [m.content for m in grid.pushed if m.metadata.message_type == wire.EVALUATE]
    (record,) = (c for c in asked if c.config_records[wire.JOB]["version"] == 1)
    return wire.unpack_vector(record, f"{wire.MERGED}average", where="version 1")


def test_a_head_that_was_kept_of_another_model_is_passed_over(tmp_path):
    (path := tmp_path / "heads.py").write_text(HEADS)
    at = open_site(f"{path}:heads", StreamOptions(0, ROWS))
    task, other = (
        at.task("plain", 0, 1, "iid", 0),
        {"2.weight": torch.ones(7, 7), "classifier.weight": torch.ones(1)},
    )
    found, wanted = (
        at.learn(task, seed=0, site="a", device="cpu", heads=heads)[0].read("0.weight").to_dense()
        for heads in (other, {})
    )
    assert torch.equal(found, wanted)
    merged = TaskVector.of({}, at.base.merged_layers, Manifest(at.base.fingerprint))
    assert at.score([task], merged, "cpu", heads={"plain": other}) == at.score([task], merged, "cpu")
