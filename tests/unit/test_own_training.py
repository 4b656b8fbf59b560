"""Does a site learn with the training function of a task, or with a Flower app that is already there?"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from local_grid import LocalGrid, federate, merged_bits, merged_offline, sent_vector, site
from small_tasks import CONFIG, loss, network, same, task, weights
from torch import nn

from fedmerge.client.flower import flower_fit
from fedmerge.client.site import Site
from fedmerge.client.tasks import Stream, TrainingConfig
from fedmerge.client.training import fine_tune
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError, FedmergeError, MismatchError, NonFinite
from fedmerge.common.training import LocalTraining

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CPU = {"seed": 0, "site": "a", "device": "cpu"}


def site_of(learned, model: nn.Module | None = None, **stream) -> Site:
    model = model or network()
    settings = replace(CONFIG, **stream.pop("training", {}))
    found = Stream("own", (learned.name,), lambda name: learned, lambda: model, settings, **stream)
    return Site(found, model, Base.from_model(model, found.private))


def ones_more(model, task, config, seed) -> None:
    """Adds 1 to every weight that may be trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(float(parameter.requires_grad))


def moved(vector) -> dict[str, float]:
    """The mean of every layer's update."""
    return {name: float(vector.read(name).to_dense().mean()) for name in vector.names}


# --- a task's own function ---


def test_the_update_is_what_the_function_moved():
    at = site_of(own := task(fit=ones_more))
    vector, report = at.learn(own, **CPU)
    assert moved(vector) == {"0.weight": 1, "0.bias": 1, "3.weight": 1, "3.bias": 1}
    assert (report.steps, report.examples, vector.manifest.examples) == (0, 50, 50)
    with torch.no_grad():
        expected = float(loss(at.model.eval(), (torch.stack([x for x, _ in own.train]), own.train[:][1])))
    assert report.final_loss == report.mean_loss == pytest.approx(expected, rel=1e-5)


def test_the_function_s_training_is_as_good_as_the_same_in_our_loop():
    def ours(model, task, config, seed) -> None:
        fine_tune(model, replace(task, fit=None), config, seed, device="cpu")

    by_loop, _ = site_of(task()).learn(task(), **CPU)
    by_itself, _ = site_of(own := task(fit=ours)).learn(own, **CPU)
    assert same(
        [by_loop.read(name).to_dense() for name in by_loop.names],
        [by_itself.read(name).to_dense() for name in by_itself.names],
    )


def test_it_sees_the_settings_of_the_server_its_share_of_the_data_and_a_seed():
    seen = []

    def look(model, task, config, seed) -> None:
        seen.append((model.training, len(task.train), config.steps, config.learning_rate, seed))

    at = site_of(own := task(fit=look))
    share = at.task(own.name, 0, 5, "iid", 0)
    at.learn(share, seed=7, site="a", device="cpu", training=LocalTraining(loop={"learning_rate": 0.5}))
    assert seen == [(True, 10, CONFIG.steps, 0.5, 7)]


def test_frozen_and_private_layers_are_not_sent():
    at = site_of(own := task(fit=ones_more), private=("3.*",), training={"frozen": ("0.bias",)})
    vector, _ = at.learn(own, **CPU)
    assert moved(vector) == {"0.weight": 1}
    assert vector.unchanged == ("0.bias",)
    assert torch.equal(at.model[0].bias, at.base.read("0.bias"))
    assert torch.equal(at.model[3].bias, at.base.read("3.bias") + 1)


def test_a_frozen_layer_that_moves_is_an_error():
    def everything(model, task, config, seed) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)

    at = site_of(own := task(fit=everything), training={"frozen": ("0.*",)})
    with pytest.raises(ConfigError, match=r"moved a frozen parameter: got 0\.weight"):
        at.learn(own, **CPU)


def test_the_model_and_torch_are_as_before_also_when_the_function_fails():
    def half_way(model, task, config, seed) -> None:
        torch.rand(1)
        model.eval()
        model[0].weight.requires_grad_(False)
        raise RuntimeError("disk full")

    at = site_of(own := task(fit=half_way))
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="disk full"):
        at.learn(own, **CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert at.model.training
    assert all(parameter.requires_grad for parameter in at.model.parameters())
    vector, _ = at.learn(replace(own, fit=ones_more), **CPU)
    assert set(moved(vector).values()) == {1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.add_module("4", nn.Linear(2, 2)), r"layer '4\.bias'.*wanted no such layer"),
        (lambda model: model.half(), r"layer '0\.bias'.*float16.*wanted .*float32"),
    ],
)
def test_a_function_that_leaves_another_model_is_refused(change, message):
    at = site_of(own := task(fit=lambda model, *_: change(model)))
    with pytest.raises(MismatchError, match=message):
        at.learn(own, **CPU)


def test_weights_that_are_not_finite_are_refused():
    def diverge(model, task, config, seed) -> None:
        with torch.no_grad():
            model[0].weight.fill_(torch.nan)

    at = site_of(own := task(fit=diverge))
    with pytest.raises(NonFinite, match="loss is not finite after training"):
        at.learn(own, **CPU)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"training": LocalTraining(lora={})}, r"'two blobs'.*no training option can be used: got lora"),
        ({"training": LocalTraining(stop={}, prox={})}, "got prox, stop"),
        ({"needs": ["second_moment"]}, "second moments are not known"),
        ({"also": [task(name="other")]}, "cannot be learned at the same time .*: got two blobs, other"),
    ],
)
def test_what_needs_our_loop_is_refused_before_anything_changes(asked, message):
    at = site_of(own := task(fit=ones_more))
    before = weights(at.model)
    with pytest.raises(ConfigError, match=message):
        at.learn(own, **CPU, **asked)
    assert same(before, weights(at.model))


def test_statistics_of_data_and_model_are_measured_all_the_same():
    at = site_of(own := task(fit=ones_more))
    vector, _ = at.learn(own, **CPU, needs=["input_gram", "fisher"])
    assert set(vector.statistics("0.weight")) == {"input_gram", "fisher"}


# --- a Flower app that is already there ---

app = ClientApp()
"""As somebody wrote it for FedAvg: whole weights in, whole weights out."""


@app.train()
def train(message: Message, context: Context) -> Message:
    model, config = network(), message.content["config"]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    epochs = int(context.run_config["local-epochs"])
    fine_tune(model, task(), replace(CONFIG, epochs=epochs, learning_rate=config["lr"]), 0, device="cpu")
    metrics = MetricRecord({"train_loss": 0.1, "num-examples": 50})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@pytest.mark.parametrize("given", [app, train], ids=["an app", "its function"])
def test_a_flower_app_trains_unchanged(given):
    at = site_of(own := task(fit=flower_fit(given, run_config={"local-epochs": 2})))
    vector, _ = at.learn(own, **CPU)
    reference, _ = site_of(task(), training={"epochs": 2}).learn(task(), **CPU)
    found = [vector.read(name).to_dense() for name in vector.names]
    assert same(found, [reference.read(name).to_dense() for name in reference.names])


def test_a_flower_app_is_told_the_learning_rate_and_what_the_site_adds():
    told = []

    def look(message: Message, context: Context) -> Message:
        told.append({**message.content["config"], **context.node_config})
        return Message(RecordDict({"weights": message.content["arrays"]}), reply_to=message)

    settings = TrainingConfig(learning_rate=0.25)
    flower_fit(look)(network(), task(), settings, 0)
    more = flower_fit(look, node_config={"partition-id": 3}, train_config={"server-round": 5})
    more(network(), task(), settings, 0)
    assert told == [{"server-round": 1, "lr": 0.25}, {"server-round": 5, "lr": 0.25, "partition-id": 3}]


def replied(message: Message, context: Context, arrays: dict[str, object]) -> Message:
    return Message(RecordDict(arrays), reply_to=message)


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (partial(replied, arrays={}), MismatchError, "without one record of weights: got none"),
        (
            partial(replied, arrays={"arrays": ArrayRecord({"0.weight": torch.ones(8, 4)})}),
            MismatchError,
            r"layer '0\.bias': .*another model: got no such layer, wanted \(8,\)",
        ),
        (
            partial(
                replied, arrays={"a": ArrayRecord({**network().state_dict(), "0.bias": torch.ones(1, 8)})}
            ),
            MismatchError,
            r"layer '0\.bias'.*got \(1, 8\), wanted \(8,\)",
        ),
        (
            partial(replied, arrays={"a": ArrayRecord({**network().state_dict(), "new": torch.ones(1)})}),
            MismatchError,
            r"layer 'new'.*wanted no such layer",
        ),
        (lambda message, _: Message(Error(0, "no data"), reply_to=message), FedmergeError, "error: no data"),
    ],
)
def test_a_reply_that_is_not_the_model_changes_nothing(reply, error, message):
    model = network()
    before = weights(model)
    with pytest.raises(error, match=message):
        flower_fit(reply)(model, task(), CONFIG, 0)
    assert same(before, weights(model))


def test_a_server_merges_what_a_flower_app_trains(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\n"
        "import torch\n"
        "from flwr.app import ArrayRecord, Message, RecordDict\n"
        "from fedmerge.client.flower import flower_fit\n"
        "from fedmerge.deploy.streams.example import example\n"
        "def train(message, context):\n"
        "    weights = message.content['arrays'].to_torch_state_dict()\n"
        "    trained = ArrayRecord({name: tensor + 0.01 for name, tensor in weights.items()})\n"
        "    return Message(RecordDict({'arrays': trained}), reply_to=message)\n"
        "def mine(options):\n"
        "    stream = example(options)\n"
        "    load = lambda name: replace(stream.load(name), fit=flower_fit(train))\n"
        "    return replace(stream, load=load)\n"
    )
    grid = LocalGrid({11: site("a", "plain", stream=f"{path}:mine"), 12: site("b", "reversed")})
    run = federate(grid)
    assert [one.task for one in run.merged] == ["plain", "reversed"]
    own, ours = (sent_vector(reply) for reply in grid.trained())
    assert all(value == pytest.approx(0.01, rel=1e-4) for value in moved(own).values())
    assert merged_bits(run) == merged_offline([own, ours])
