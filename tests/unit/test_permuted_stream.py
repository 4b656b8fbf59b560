"""Does every task of ``permuted-mnist`` show the same images in an order of its own, and can it be learned?

Everything but the slow test works on images made here, without a network.
"""

import pytest
import torch
from torch import nn

from fedmerge.client.loading import load_stream
from fedmerge.client.running import batch_of
from fedmerge.client.tasks import StreamOptions
from fedmerge.client.training import fine_tune, score
from fedmerge.common.errors import ConfigError
from fedmerge.deploy.streams import permuted as stream_module
from fedmerge.deploy.streams.images import Images
from fedmerge.deploy.streams.imagesets import ImageSet
from fedmerge.deploy.streams.permuted import PIXELS, TASKS, build_model, orders, permuted_mnist

CPU = torch.device("cpu")


def noisy(count: int, seed: int) -> Images:
    """Ten classes; an image is noise but for 40 bright pixels that tell its class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    pixels = torch.randint(0, 100, (count, 784), generator=generator, dtype=torch.uint8)
    for label in range(10):
        pixels[labels == label, 70 * label : 70 * label + 40] = 255
    return Images(pixels.view(count, 1, 28, 28), labels)


@pytest.fixture
def images(monkeypatch):
    """What the stream takes for MNIST: 300 training and 50 test images."""
    made = ImageSet(noisy(300, seed=0), noisy(50, seed=1))
    monkeypatch.setattr(stream_module, "image_set", lambda name: made)
    stream_module.load_task.cache_clear()
    yield made
    stream_module.load_task.cache_clear()


def shown(task, rows, numbers):
    pixels, labels = batch_of(task, rows, numbers, CPU)
    return pixels, labels.tolist()


def test_stream_is_built_in_and_needs_no_network_to_be_named():
    stream = load_stream("permuted-mnist", StreamOptions())
    assert (stream.name, stream.tasks) == ("permuted-mnist", TASKS)
    assert stream.tasks[0] == "permutation-0"
    assert len(stream.tasks) == 10


@pytest.mark.parametrize("rows", [0, -1])
def test_stream_without_training_rows_is_refused(rows):
    with pytest.raises(ConfigError, match="stream 'permuted-mnist': rows out of range"):
        permuted_mnist(StreamOptions(rows=rows))


def test_task_that_is_not_there_is_refused(images):
    with pytest.raises(ConfigError, match="unknown task: got 'permutation-10', wanted permutation-0, "):
        permuted_mnist(StreamOptions()).load("permutation-10")


def test_orders_are_permutations_all_different_and_drawn_by_seed():
    drawn = orders(seed=3)
    assert torch.equal(drawn[0], torch.arange(PIXELS))
    assert all(torch.equal(order.sort().values, torch.arange(PIXELS)) for order in drawn)
    assert len({tuple(order.tolist()) for order in drawn}) == len(TASKS)
    assert all(map(torch.equal, orders(3), drawn))
    assert not any(map(torch.equal, orders(4)[1:], drawn[1:]))


def test_every_task_shows_training_and_test_images_in_its_own_order(images):
    stream = permuted_mnist(StreamOptions(seed=5))
    plain = stream.load("permutation-0")
    for number in (1, 9):
        task, order = stream.load(f"permutation-{number}"), orders(5)[number]
        for rows, plain_rows in ((task.train, plain.train), (task.test, plain.test)):
            pixels, labels = shown(task, rows, range(20))
            wanted, wanted_labels = shown(plain, plain_rows, range(20))
            assert torch.equal(pixels, wanted[:, order])
            assert labels == wanted_labels


def test_first_task_shows_normalised_images_as_they_are(images):
    task = permuted_mnist(StreamOptions()).load("permutation-0")
    pixels, labels = shown(task, task.test, [0, 7])
    wanted = (images.test.pixels[[0, 7]].float() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(pixels, wanted.flatten(1))
    assert labels == [0, 7]


def test_bound_draws_the_same_training_rows_for_all_tasks_and_keeps_all_test_rows(images):
    stream = permuted_mnist(StreamOptions(seed=1, rows=40))
    first, last = stream.load(TASKS[0]), stream.load(TASKS[9])
    assert (len(first.train), len(first.test), len(first.labels)) == (40, 50, 40)
    assert list(first.train.indices) == list(last.train.indices)
    assert first.labels == shown(first, first.train, range(40))[1]
    other = permuted_mnist(StreamOptions(seed=2, rows=40)).load(TASKS[0])
    assert list(other.train.indices) != list(first.train.indices)
    assert len(permuted_mnist(StreamOptions(rows=10_000)).load(TASKS[0]).train) == 300


def test_tasks_share_the_images_in_memory_and_are_kept(images):
    stream = permuted_mnist(StreamOptions())
    for name in TASKS:
        pixels = stream.load(name).train.dataset.tensors[0]
        assert pixels.data_ptr() == images.train.pixels.data_ptr()
    assert permuted_mnist(StreamOptions()).load(TASKS[3]) is stream.load(TASKS[3])


def test_model_is_the_papers_and_the_same_for_one_seed():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    model = build_model(7)
    assert torch.equal(torch.random.get_rng_state(), state)
    sizes = [tuple(part.weight.shape) for part in model if isinstance(part, nn.Linear)]
    assert sizes == [(400, 784), (400, 400), (400, 400), (10, 400)]
    assert [part.p for part in model if isinstance(part, nn.Dropout)] == [0.2, 0.5, 0.5]
    assert torch.equal(model[0].weight, build_model(7)[0].weight)
    assert not torch.equal(model[0].weight, build_model(8)[0].weight)


def test_task_is_learned_and_another_is_not(images):
    stream = permuted_mnist(StreamOptions())
    settings = stream.training
    assert (settings.optimizer, settings.learning_rate, settings.schedule) == ("sgd", 0.01, "constant")
    assert (settings.epochs, settings.batch_size, settings.max_grad_norm) == (1, 64, 0)
    model, task = stream.build_model(), stream.load(TASKS[1])
    for seed in range(40):
        fine_tune(model, task, settings, seed)
    assert score(model, task).accuracy > 0.9
    assert score(model, stream.load(TASKS[2])).accuracy < 0.5


@pytest.mark.slow
def test_real_images_are_learned_in_an_epoch():
    """Fetches 11 MB when the cache is cold."""
    stream = permuted_mnist(StreamOptions())
    stream.prepare()
    model, task = stream.build_model(), stream.load(TASKS[1])
    assert (len(task.train), len(task.test)) == (60_000, 10_000)
    fine_tune(model, task, stream.training, seed=0)
    assert score(model, task, 500).accuracy > 0.8
