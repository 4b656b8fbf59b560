"""Does every task of a ``split-`` stream hold its own classes, and move no head but its own?

Everything but the slow test works on images made here, without a network.
"""

from dataclasses import replace

import pytest
import torch

from fedmerge.client.loading import load_stream
from fedmerge.client.running import batch_of
from fedmerge.client.tasks import StreamOptions
from fedmerge.client.training import fine_tune, score
from fedmerge.common.errors import ConfigError
from fedmerge.deploy.streams import split as stream_module
from fedmerge.deploy.streams.images import Images
from fedmerge.deploy.streams.imagesets import ImageSet
from fedmerge.deploy.streams.split import (
    TASKS,
    ManyHeads,
    build_model,
    split_cifar,
    split_fashion,
    split_mnist,
)

CPU = torch.device("cpu")


def coloured(count: int, channels: int, side: int, seed: int) -> Images:
    """Ten classes in turn; odd ones are bright on the left, even ones on the right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    pixels = torch.randint(0, 60, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    pixels[labels % 2 == 1, :, :, : side // 2] += 180
    pixels[labels % 2 == 0, :, :, side // 2 :] += 180
    return Images(pixels, labels)


@pytest.fixture
def sets(monkeypatch):
    """What the streams take for their sets: 200 training and 60 test images."""
    sizes = {"cifar": (3, 32), "fashion": (1, 28), "mnist": (1, 28)}
    made = {
        name: ImageSet(coloured(200, *size, seed=0), coloured(60, *size, seed=1))
        for name, size in sizes.items()
    }
    monkeypatch.setattr(stream_module, "image_set", made.__getitem__)
    stream_module.load_task.cache_clear()
    yield made
    stream_module.load_task.cache_clear()


@pytest.mark.parametrize("images", ["cifar", "fashion", "mnist"])
def test_streams_are_built_in_and_need_no_network_to_be_named(images):
    stream = load_stream(f"split-{images}", StreamOptions())
    assert stream.name == f"split-{images}"
    assert stream.tasks == ("classes-0-1", "classes-2-3", "classes-4-5", "classes-6-7", "classes-8-9")


def test_stream_without_training_rows_is_refused():
    with pytest.raises(ConfigError, match="stream 'split-mnist': rows out of range"):
        split_mnist(StreamOptions(rows=0))


def test_task_that_is_not_there_is_refused(sets):
    with pytest.raises(ConfigError, match="stream 'split-cifar': unknown task: got 'classes-1-2'"):
        split_cifar(StreamOptions()).load("classes-1-2")


def test_tasks_hold_two_classes_each_and_together_all_images(sets):
    stream = split_cifar(StreamOptions())
    whole, seen = sets["cifar"].train.labels_N, []
    for number, name in enumerate(stream.tasks):
        task = stream.load(name)
        classes = whole[list(task.train.indices)]
        assert set(classes.tolist()) == {2 * number, 2 * number + 1}
        assert task.labels == (classes - 2 * number).tolist()
        assert batch_of(task, task.train, range(40), CPU)[1].tolist() == task.labels
        assert len(task.test) == 12
        seen += task.train.indices
    assert sorted(seen) == list(range(200))


def test_bound_leaves_so_many_rows_of_each_task(sets):
    task = split_cifar(StreamOptions(rows=10)).load("classes-4-5")
    assert (len(task.train), len(task.test)) == (10, 12)
    assert set(task.labels) == {0, 1}


@pytest.mark.parametrize("make", [split_cifar, split_fashion, split_mnist])
def test_loss_of_a_task_reaches_its_own_head_alone(sets, make):
    stream = make(StreamOptions())
    model, task = stream.build_model(), stream.load("classes-4-5")
    task.loss(model, batch_of(task, task.train, range(8), CPU)).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    others = {f"heads.{number}.weight" for number in (0, 1, 3, 4)}
    assert reached == {name for name, _ in model.named_parameters()} - others


def test_training_leaves_the_other_heads_as_they_are(sets):
    stream = split_mnist(StreamOptions())
    model = stream.build_model()
    fine_tune(model, stream.load("classes-0-1"), replace(stream.training, weight_decay=0.1), seed=0)
    fresh = stream.build_model().state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert moved == {name for name in fresh if not name.startswith("heads.")} | {"heads.0.weight"}


def test_scores_are_those_of_the_tasks_own_head(sets):
    stream = split_fashion(StreamOptions())
    model, task = stream.build_model().eval(), stream.load("classes-2-3")
    with torch.no_grad():
        pixels, labels = batch_of(task, task.test, range(12), CPU)
        right = model.heads[1](model.features(pixels)).argmax(dim=1) == labels
        assert task.metric(model, (pixels, labels)).tolist() == right.float().tolist()


def test_model_has_no_biases_and_the_size_that_it_says():
    model = build_model(channels=3, seed=0)
    assert all(name.endswith(".weight") for name in model.state_dict())
    assert sum(weight.numel() for weight in model.features.parameters()) == 577_024
    assert torch.equal(model.features[0].weight, build_model(3, 0).features[0].weight)
    assert not torch.equal(model.features[0].weight, build_model(3, 1).features[0].weight)


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32)])
def test_model_takes_images_of_both_sizes(channels, side):
    assert ManyHeads(channels)(torch.zeros(2, channels, side, side), head=4).shape == (2, 2)


def test_task_is_learned(sets):
    stream = split_mnist(StreamOptions())
    model, task = stream.build_model(), stream.load(TASKS[2])
    fine_tune(model, task, replace(stream.training, epochs=30), seed=0)
    assert score(model, task).accuracy > 0.9


def test_settings_are_plain_gradient_descent():
    settings = split_cifar(StreamOptions()).training
    assert (settings.optimizer, settings.learning_rate, settings.schedule) == ("sgd", 0.01, "constant")
    assert (settings.epochs, settings.batch_size, settings.max_grad_norm) == (1, 16, 0)


@pytest.mark.slow
def test_real_photos_are_learned_in_an_epoch():
    """Fetches 139 MB when the cache is cold."""
    stream = split_cifar(StreamOptions())
    stream.prepare()
    model, task = stream.build_model(), stream.load(TASKS[0])
    assert (len(task.train), len(task.test)) == (10_000, 2000)
    fine_tune(model, task, stream.training, seed=0)
    assert score(model, task, 200).accuracy > 0.7
