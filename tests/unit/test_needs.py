"""Do sites send the statistics that the server's rules need, in every way of serving, and only then?"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
from fake_service import FakeService
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from local_grid import Fault, LocalGrid, federate, merged_bits, sent_vector, site, vector_in
from serving_bench import Bench, base

from fedmerge.common import wire
from fedmerge.common.statistics import Statistics
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.deploy.streams.example import build_model
from fedmerge.server import app as server
from fedmerge.server.learning import Teaching
from fedmerge.server.merge import RULES
from fedmerge.server.merge.average import Average
from fedmerge.server.merge.rule import ALONE
from fedmerge.server.serving import Serving
from fedmerge.server.strategy import ContinualMerging

LAYERS = tuple(build_model().state_dict())
MOST_HEADER_BYTES = 4000

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Curious(Average):
    """The average, by a rule that asks for all there is and writes down what it is given."""

    name: ClassVar[str] = "curious"
    needs: ClassVar[frozenset[str]] = frozenset({"input_gram", "fisher"})
    lock: ClassVar[threading.Lock] = threading.Lock()
    given: ClassVar[list[tuple[tuple[int, ...], dict[str, tuple[int, ...]]]]] = []

    def absorb(self, state, prepared, update, context=ALONE):
        with self.lock:
            shapes = {name: tuple(values.shape) for name, values in context.statistics.items()}
            self.given.append((update.shape, shapes))
        return super().absorb(state, prepared, update, context)


class Momentous(Average):
    """The average, by a rule that asks for AdamW's second moments."""

    name: ClassVar[str] = "momentous"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    monkeypatch.setattr(Curious, "given", [])
    for rule in (Curious, Momentous):
        monkeypatch.setitem(RULES, rule.name, rule)


def jobs(grid: LocalGrid) -> list[wire.TrainJob]:
    sent = [message for message in grid.pushed if message.metadata.message_type == wire.TRAIN]
    return [wire.unpack_job(wire.TrainJob, message.content, where="test") for message in sent]


def listed(grid: LocalGrid) -> list[tuple[str, ...]]:
    return [sent_vector(reply).manifest.statistics for reply in grid.trained()]


def two_sites(*faults: Fault) -> LocalGrid:
    return LocalGrid({11: site("a", "plain"), 12: site("b", "shuffled")}, faults)


# --- a run of tasks ---


def test_a_rule_receives_what_it_needs_of_every_layer():
    run = federate(two_sites(), "curious", evaluate=False)
    assert run.history.of("failed") == []
    assert len(Curious.given) == 2 * len(LAYERS)
    for shape, found in Curious.given:
        matrix = len(shape) == 2
        assert found["fisher"] == shape
        assert set(found) == ({"fisher", "input_gram"} if matrix else {"fisher"})
        if matrix:
            assert 1 <= found["input_gram"][0] <= found["input_gram"][1] == shape[1]


def test_sites_are_asked_for_what_any_of_the_rules_needs_once():
    grid = two_sites()
    federate(grid, "average", "momentous", "curious", evaluate=False)
    assert [job.needs for job in jobs(grid)] == [("fisher", "input_gram", "second_moment")] * 2
    assert listed(grid) == [("fisher", "input_gram", "second_moment")] * 2
    assert all({"fisher", "input_gram"} <= set(found) for shape, found in Curious.given if len(shape) == 2)


def test_what_other_rules_need_changes_no_bit_of_a_model():
    among, alone = two_sites(), two_sites()
    assert merged_bits(federate(among, "average", "curious", evaluate=False), "average") == merged_bits(
        federate(alone, "average", evaluate=False), "average"
    )
    assert [job.needs for job in jobs(alone)] == [()] * 2
    assert listed(alone) == [()] * 2


def test_the_history_counts_the_bytes_of_statistics():
    among, alone = two_sites(), two_sites()
    curious = federate(among, "curious", evaluate=False).history.of("trained")
    average = federate(alone, "average", evaluate=False).history.of("trained")
    for more, less in zip(curious, average, strict=True):
        assert less["statistics_bytes"] == 0
        extra = more["bytes_up"] - less["bytes_up"]
        assert 0 < more["statistics_bytes"] < extra < more["statistics_bytes"] + MOST_HEADER_BYTES


def test_only_the_last_round_of_a_task_brings_statistics():
    grid = LocalGrid({11: site("a", "plain")})
    run = federate(grid, "curious", rounds=3, evaluate=False)
    assert [job.needs for job in jobs(grid)] == [(), (), ("fisher", "input_gram")]
    assert len(run.merged) == 1
    assert all("fisher" in found for _, found in Curious.given)
    assert len(Curious.given) == len(LAYERS)


def test_sites_of_one_task_are_all_asked_and_their_statistics_merged():
    grid = LocalGrid({11: site("a"), 12: site("b")})
    run = federate(grid, "curious", tasks=("plain",), sites_per_task=2, evaluate=False)
    assert listed(grid) == [("fisher", "input_gram")] * 2
    assert len(run.merged) == 1
    assert {tuple(sorted(found)) for _, found in Curious.given} == {("fisher",), ("fisher", "input_gram")}


def test_a_site_that_sends_no_statistics_is_refused_by_name():
    def stripped(content):
        vector = vector_in(content)
        bare = TaskVector.of(dict(vector.items()), (), replace(vector.manifest, statistics=()))
        content[wire.VECTOR] = wire.pack_vector(to_bytes(bare))
        return content

    run = federate(two_sites(Fault(11, wire.TRAIN, tamper=stripped)), "curious", evaluate=False)
    (failed,) = run.history.of("failed")
    assert (failed["site"], failed["phase"]) == ("a", "refused")
    assert "curious asks for fisher" in failed["reason"]
    assert [merged.task for merged in run.merged] == ["shuffled"]


def test_a_layer_that_the_last_round_leaves_alone_stops_its_own_task_and_no_other():
    """It moved in the first round, so it is merged, and nothing tells how much it matters."""

    def left_alone(content):
        vector = vector_in(content)
        kept = [name for name in vector.names if name != LAYERS[-1]]
        told = Statistics.of({name: vector.statistics(name) for name in kept})
        values = {name: update for name, update in vector.items() if name in kept}
        settled = TaskVector.of(values, (*vector.unchanged, LAYERS[-1]), vector.manifest)
        content[wire.VECTOR] = wire.pack_vector(to_bytes(replace(settled, statistics=told)))
        return content

    grid = two_sites(Fault(11, wire.TRAIN, nth=2, tamper=left_alone))
    run = federate(grid, "fisher", rounds=2, evaluate=False)
    (failed,) = run.history.of("failed")
    assert (failed["task"], failed["phase"]) == ("plain", "combine")
    assert f"layer {LAYERS[-1]!r}: rule fisher asks for fisher" in failed["reason"]
    assert [merged.task for merged in run.merged] == ["shuffled"]


def test_a_site_that_does_not_know_a_statistic_says_so(monkeypatch):
    monkeypatch.setattr(Curious, "needs", frozenset({"hessian"}))
    run = federate(LocalGrid({11: site("a", "plain")}), "curious", evaluate=False)
    (failed,) = run.history.of("failed")
    assert "a statistic that this site cannot measure: got hessian" in failed["reason"]


# --- serving ---


def test_a_server_in_serving_mode_asks_too_and_a_kept_result_brings_them(tmp_path):
    bench = Bench(tmp_path, teaching=Teaching(needs=["second_moment"]))
    bench.join(11, "a", "plain")
    bench.until(bench.learned)
    assert [job.needs for job in jobs(bench.grid)] == [("second_moment",)]
    (reply,) = bench.grid.trained()
    moments = sent_vector(reply).statistics("0.weight")["second_moment"]
    assert float(moments.sum()) > 0


def test_a_result_kept_without_statistics_is_no_answer_to_a_request_with_them(tmp_path):
    bench = Bench(tmp_path)
    bench.join(11, "a", "plain")
    plain = wire.pack_job(wire.TrainJob("plain", base().fingerprint, keep=True))
    asked = wire.pack_job(wire.TrainJob("plain", base().fingerprint, keep=True, needs=("fisher",)))
    for job in (plain, asked, asked):
        bench.grid.push_messages([Message(RecordDict({wire.JOB: job}), 11, wire.TRAIN)])
    assert listed(bench.grid) == [(), ("fisher",), ("fisher",)]


@pytest.mark.parametrize(("rule", "needs"), [("momentous", ("second_moment",)), ("average", ())])
def test_a_server_learns_what_to_ask_for_from_the_aggregator_it_is_connected_to(
    tmp_path, monkeypatch, rule, needs
):
    service = FakeService(base().fingerprint)
    service.status = lambda: SimpleNamespace(base=base().fingerprint, rule=rule, options={})

    @contextmanager
    def remote(*_args, **_named):
        yield service

    def run(serving: Serving) -> None:
        for _ in range(20):
            serving.step()

    monkeypatch.setattr("fedmerge.common.remote.RemoteAggregator", remote)
    monkeypatch.setattr(Serving, "run", run)
    grid = LocalGrid({11: site("a", "plain", state=tmp_path / "a")})
    settings = {"mode": "serve", "aggregator": "127.0.0.1:7000", "out": str(tmp_path / "out")}
    server.app(grid, Context(1, 1, {}, RecordDict(), settings))
    assert [job.needs for job in jobs(grid)] == [needs]


# --- Flower's own loop ---


@pytest.mark.parametrize(("rule", "told"), [("curious", ["fisher", "input_gram"]), ("average", None)])
def test_the_strategy_tells_clients_what_its_rule_needs(rule, told):
    strategy = ContinualMerging(RULES[rule](), wait_seconds=0.1)
    arrays = ArrayRecord(build_model().state_dict())
    (message,) = strategy.configure_train(1, arrays, ConfigRecord(), LocalGrid({11: site("a")}))
    assert message.content["config"].get("needs") == told
