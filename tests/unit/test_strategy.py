"""Does ContinualMerging in a user's ``strategy.start`` give base plus merged vector, whatever is sent?"""

import io
import json
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from local_grid import Fault, LocalGrid

from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError
from fedmerge.common.layers import LayerKind
from fedmerge.common.taskvector import LowRank, Manifest, TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.server.admission import Limits
from fedmerge.server.combine import combine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import DEFAULT_RULE, make_rule
from fedmerge.server.strategy import ContinualMerging

SHAPES = {"w": (6, 5), "b": (6,), "steps": ()}


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(SHAPES[name], generator=generator) for name in ("w", "b")}
    return made | {"steps": torch.tensor(7)}


BASE = Base.from_checkpoint(weights(0))


def moved(seed: int) -> TaskVector:
    """What a client of this seed learned, as the difference of its float32 weights from the base."""
    return TaskVector.from_checkpoints(BASE, weights(seed), manifest=Manifest(examples=10 * seed))


def by_hand(vectors: list[TaskVector], rule: str = DEFAULT_RULE) -> dict[str, torch.Tensor]:
    with LocalEngine(make_rule(rule), BASE.layers.values(), workers=1) as engine:
        for vector in vectors:
            engine.merge(vector)
        return dict(engine.merged().apply(BASE))


def as_weights(seed: int) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord(weights(seed))})


def as_differences(seed: int) -> RecordDict:
    layers = {name: update.to_dense() for name, update in moved(seed).items()}
    return RecordDict({"task-vector": ArrayRecord(layers)})


def as_our_bytes(seed: int) -> RecordDict:
    manifest = Manifest(BASE.fingerprint, 0, f"task-{seed}", "a", 10 * seed)
    layers = {name: update.to_dense() for name, update in moved(seed).items()}
    return RecordDict({"task-vector": wire.pack_vector(to_bytes(TaskVector.of(layers, (), manifest)))})


def client(seed: int, reply: Callable[[int], RecordDict], task: str | None = None, **metrics) -> ClientApp:
    """Sends what ``reply`` makes of its seed, with ``num-examples``; its seed grows by 10 every round."""
    app = ClientApp()
    numbers = {"num-examples": 10 * seed} | metrics

    @app.train()
    def train(message: Message, context: Context) -> Message:
        turn = message.content["config"]["server-round"] - 1
        content = reply(seed + 10 * turn)
        content["metrics"] = MetricRecord({k: v for k, v in numbers.items() if v is not None})
        if task is not None:
            content["config"] = ConfigRecord({"task": task})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"].to_torch_state_dict()
        found = MetricRecord({"sum": float(arrays["w"].sum()), "mine": seed, **numbers})
        return Message(RecordDict({"metrics": found}), reply_to=message)

    return app


def start(grid: LocalGrid, rounds: int = 1, **settings):
    strategy = ContinualMerging(**{"wait_seconds": 0.2} | settings)
    return strategy, strategy.start(grid, ArrayRecord(weights(0)), num_rounds=rounds)


def assert_equal(arrays: ArrayRecord, wanted: dict[str, torch.Tensor]) -> None:
    found = arrays.to_torch_state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor), name


# --- what clients may send ---


@pytest.mark.parametrize("reply", [as_weights, as_differences])
def test_the_result_is_base_plus_the_merged_vector_bit_for_bit(reply):
    _, result = start(LocalGrid({11: client(1, reply)}), rounds=3)
    assert_equal(result.arrays, by_hand([moved(seed) for seed in (1, 11, 21)]))


def test_our_own_bytes_are_taken_with_the_task_they_name():
    grid = LocalGrid({11: client(1, as_our_bytes, "task-1")})
    strategy, result = start(grid)
    assert_equal(result.arrays, by_hand([moved(1)]))
    assert strategy.history.of("merged")[0]["task"] == "task-1"


def test_an_own_vector_for_another_task_than_announced_is_left_out():
    grid = LocalGrid({11: client(1, as_our_bytes, "task-9"), 12: client(2, as_weights)})
    strategy, result = start(grid)
    assert_equal(result.arrays, by_hand([moved(2)]))
    assert "a vector for another task" in strategy.history.of("failed")[0]["reason"]


def test_low_rank_bytes_stay_low_rank_until_they_are_merged():
    layer = LowRank(torch.ones(6, 1), torch.arange(5.0)[None], (6, 5))
    vector = TaskVector.of({"w": layer}, ["b"], Manifest(BASE.fingerprint, 0, "t", "a", 1))

    def reply(seed: int) -> RecordDict:
        return RecordDict({"task-vector": wire.pack_vector(to_bytes(vector))})

    _, result = start(LocalGrid({11: client(1, reply, "t")}), limits=Limits(total_ratio=3))
    assert_equal(result.arrays, by_hand([vector]))


def test_a_difference_that_is_not_sent_is_unchanged():
    def reply(seed: int) -> RecordDict:
        return RecordDict({"task-vector": ArrayRecord({"w": moved(seed).read("w").to_dense()})})

    _, result = start(LocalGrid({11: client(1, reply)}))
    assert torch.equal(result.arrays.to_torch_state_dict()["b"], weights(0)["b"])
    assert not torch.equal(result.arrays.to_torch_state_dict()["w"], weights(0)["w"])


@pytest.mark.parametrize("rule", ["average", "task_arithmetic"])
def test_any_rule_can_be_named(rule):
    _, result = start(LocalGrid({11: client(1, as_weights)}), rounds=2, rule=rule)
    assert_equal(result.arrays, by_hand([moved(1), moved(11)], rule))


def test_a_rule_with_options_is_taken_as_it_is():
    rule = make_rule("task_arithmetic", {"factor": 1.0})
    _, result = start(LocalGrid({11: client(1, as_differences)}), rule=rule)
    wanted = {name: weights(0)[name] + moved(1).read(name).to_dense() for name in ("w", "b")}
    assert_equal(result.arrays, wanted | {"steps": torch.tensor(7)})


def test_an_unknown_rule_is_refused_at_once():
    with pytest.raises(ConfigError, match="no such merge rule"):
        ContinualMerging("fedprox")


def test_private_layers_and_kinds_are_respected():
    _, result = start(LocalGrid({11: client(1, as_weights)}), private=["b"], kinds={"w": LayerKind.VECTOR})
    assert torch.equal(result.arrays.to_torch_state_dict()["b"], weights(0)["b"])


# --- rounds and tasks ---


def test_clients_always_start_from_the_base():
    grid = LocalGrid({11: client(1, as_weights)})
    start(grid, rounds=3)
    sent = [m.content["arrays"] for m in grid.pushed if m.metadata.message_type == "train"]
    assert len(sent) == 3
    for arrays in sent:
        assert_equal(arrays, weights(0))


def test_replies_of_one_task_are_combined_by_their_examples():
    _, result = start(LocalGrid({11: client(1, as_weights), 12: client(3, as_weights)}))
    assert_equal(result.arrays, by_hand([combine([moved(1), moved(3)], [10, 30])]))


def test_two_tasks_in_one_round_are_merged_in_the_order_of_their_names():
    grid = LocalGrid({11: client(1, as_weights, "zebra"), 12: client(2, as_weights, "ant")})
    strategy, result = start(grid, rule="opcm")
    assert [event["task"] for event in strategy.history.of("merged")] == ["ant", "zebra"]
    there, back = (by_hand([moved(first), moved(3 - first)], "opcm") for first in (2, 1))
    assert_equal(result.arrays, there)
    assert not torch.equal(there["w"], back["w"])


def test_the_metrics_of_a_round_tell_the_merge():
    grid = LocalGrid({11: client(1, as_weights), 12: client(2, as_weights)}, [Fault(12, "train", error="no")])
    strategy, result = start(grid, rounds=2)
    for turn, seed in ((1, 1), (2, 11)):
        metrics = result.train_metrics_clientapp[turn]
        assert (metrics["tasks-merged"], metrics["replies-left-out"]) == (1, 1)
        assert metrics["update-norm"] == pytest.approx(moved(seed).norm(), rel=1e-6)
    assert metrics["lambda-t"] == strategy.model.versions[-1].lambda_t


def test_the_history_tells_every_merge_in_json():
    strategy, _ = start(LocalGrid({11: client(1, as_weights)}), rounds=2)
    merged = strategy.history.of("merged")
    assert [(event["round"], event["version"], event["sites"]) for event in merged] == [
        (1, 1, ["node 11"]),
        (2, 2, ["node 11"]),
    ]
    json.dumps(strategy.history.events, allow_nan=False)


# --- replies that cannot be used ---


def array_of(data: bytes, stype: str = "numpy.ndarray") -> Callable[[int], RecordDict]:
    def reply(seed: int) -> RecordDict:
        array = Array(dtype="float32", shape=(6, 5), stype=stype, data=data)
        return RecordDict({"arrays": ArrayRecord({**ArrayRecord(weights(seed)), "w": array})})

    return reply


def numpy_bytes(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def changed(**layers: torch.Tensor | None) -> Callable[[int], RecordDict]:
    def reply(seed: int) -> RecordDict:
        made = weights(seed) | layers
        return RecordDict({"arrays": ArrayRecord({k: v for k, v in made.items() if v is not None})})

    return reply


def nan_difference(seed: int) -> RecordDict:
    return RecordDict({"task-vector": ArrayRecord({"w": torch.full((6, 5), torch.nan)})})


BAD = {
    "an error": (client(2, as_weights), Fault(12, "train", error="no data"), "error 2: no data"),
    "a node that left": (client(2, as_weights), Fault(12, "train", leaves=True), "error 5: Node Unavailable"),
    "no weights": (client(2, lambda seed: RecordDict()), None, "a reply without weights"),
    "no examples": (client(2, as_weights, **{"num-examples": None}), None, "the example count"),
    "zero examples": (client(2, as_weights, **{"num-examples": 0}), None, "the example count"),
    "NaN examples": (client(2, as_weights, **{"num-examples": float("nan")}), None, "the example count"),
    "a missing layer": (client(2, changed(b=None)), None, "a layer of the base is missing"),
    "an extra layer": (client(2, changed(extra=torch.ones(2))), None, "not a layer of the base"),
    "another shape": (client(2, changed(b=torch.ones(1))), None, "another shape than the base's"),
    "integers": (client(2, changed(b=torch.ones(6, dtype=torch.int64))), None, "dtype that cannot be merged"),
    "NaN weights": (client(2, changed(b=torch.full((6,), torch.nan))), None, "not finite"),
    "NaN differences": (client(2, nan_difference), None, "values that are not finite"),
    "garbage bytes": (client(2, array_of(b"garbage")), None, "an array that cannot be read"),
    "a pickle": (client(2, array_of(b"\x80\x05K\x01.")), None, "an array that cannot be read"),
    "a zip": (client(2, array_of(b"PK\x05\x06" + bytes(18))), None, "an array that cannot be read"),
    "text": (client(2, array_of(numpy_bytes(np.array(["a"])))), None, "an array that cannot be read"),
    "a header cut short": (
        client(2, array_of(numpy_bytes(np.ones(3))[:90])),
        None,
        "an array that cannot be read",
    ),
    "another type": (client(2, array_of(b"", "other")), None, "an array that cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_reply_that_cannot_be_used_is_left_out_and_counted(case):
    bad, fault, reason = BAD[case]
    grid = LocalGrid({11: client(1, as_weights), 12: bad}, [fault] if fault else [])
    strategy, result = start(grid)
    assert_equal(result.arrays, by_hand([moved(1)]))
    assert result.train_metrics_clientapp[1]["replies-left-out"] == 1
    (failed,) = strategy.history.of("failed")
    assert reason in failed["reason"]


def test_a_round_without_a_usable_reply_keeps_the_model():
    grid = LocalGrid({11: client(1, as_weights)}, [Fault(11, "train", nth=2, error="no")])
    strategy, result = start(grid, rounds=3)
    assert_equal(result.arrays, by_hand([moved(1), moved(21)]))
    assert sorted(result.train_metrics_clientapp) == [1, 3]
    assert len(strategy.history.of("failed")) == 1


def test_a_run_that_never_gets_a_reply_ends_without_a_model():
    _, result = start(LocalGrid({11: client(1, as_weights)}, [Fault(11, lost=True)]), rounds=2)
    assert len(result.arrays) == 0
    assert result.train_metrics_clientapp == {}


def test_a_boasted_count_weighs_no_more_than_the_cap():
    boast = client(2, as_weights, **{"num-examples": 10**18})
    _, result = start(LocalGrid({11: client(1, as_weights), 12: boast}), max_examples=50)
    assert_equal(result.arrays, by_hand([combine([moved(1), moved(2)], [10, 50])]))


# --- nodes ---


def test_too_few_nodes_hold_a_run_up_no_longer_than_it_was_told():
    began = time.monotonic()
    _, result = start(LocalGrid({11: client(1, as_weights)}), rounds=3, min_nodes=5, wait_seconds=0.3)
    assert 0.3 <= time.monotonic() - began < 3
    assert_equal(result.arrays, by_hand([moved(seed) for seed in (1, 11, 21)]))


def test_no_node_at_all_ends_the_run_empty_handed():
    began = time.monotonic()
    strategy, result = start(LocalGrid({}), min_nodes=2)
    assert time.monotonic() - began < 3
    assert len(result.arrays) == 0
    assert strategy.model.versions == []


def test_it_waits_for_nodes_that_are_about_to_connect():
    grid = LocalGrid({11: client(1, as_weights)})
    seen = []
    connected = grid.get_node_ids

    def get_node_ids():
        seen.append(1)
        if len(seen) == 2:
            grid._apps[12] = client(3, as_weights)
        return connected()

    grid.get_node_ids = get_node_ids
    _, result = start(grid, min_nodes=2, wait_seconds=30)
    assert_equal(result.arrays, by_hand([combine([moved(1), moved(3)], [10, 30])]))


# --- evaluation ---


def test_clients_score_the_global_model_weighted_by_examples():
    grid = LocalGrid({11: client(1, as_weights), 12: client(3, as_weights)})
    _, result = start(grid)
    metrics = result.evaluate_metrics_clientapp[1]
    assert metrics["mine"] == pytest.approx((10 * 1 + 30 * 3) / 40)
    assert metrics["sum"] == pytest.approx(float(result.arrays.to_torch_state_dict()["w"].sum()))
    assert set(metrics) == {"mine", "sum"}


@pytest.mark.parametrize(
    "bad", [{"num-examples": -5}, {"num-examples": float("nan")}, {"mine": float("nan")}]
)
def test_scores_that_are_no_numbers_do_not_spoil_the_others(bad):
    grid = LocalGrid({11: client(1, as_weights), 12: client(3, as_weights, **bad)})
    _, result = start(grid)
    assert result.evaluate_metrics_clientapp[1]["mine"] == 1


def test_clients_that_fail_to_evaluate_are_left_out():
    apps = {11: client(1, as_weights), 12: client(3, as_weights)}
    _, result = start(LocalGrid(apps, [Fault(12, "evaluate", error="no")]))
    assert result.evaluate_metrics_clientapp[1]["mine"] == 1
    _, result = start(LocalGrid(apps, [Fault(None, "evaluate", error="no")]))
    assert result.evaluate_metrics_clientapp == {}
