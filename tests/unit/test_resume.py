"""Does a run that was killed end with the bits of one that was not, and never with another run's?"""

import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tasks import CONFIG, network, same, task, weights
from torch import nn

from fedmerge.client.resume import RunCheckpoint
from fedmerge.client.training import fine_tune
from fedmerge.common.training import LocalTraining

SGD = replace(CONFIG, optimizer="sgd", momentum=0.9, learning_rate=0.02)
EPOCHS = replace(CONFIG, epochs=3, accumulate=2)
LORA = {"lora": {"rank": 2, "full": "*.bias", "dropout": 0.2}}
RUNS = {
    "adamw": (CONFIG, {}),
    "sgd with momentum": (SGD, {}),
    "epochs of accumulated batches": (EPOCHS, {}),
    "lora and perturb": (CONFIG, {**LORA, "perturb": {}}),
    "stop": (CONFIG, {"stop": {"every": 2, "patience": 3, "held_out": 0.3}}),
    "prox": (CONFIG, {"prox": {"mu": 1.0}}),
    "tangent": (CONFIG, {"tangent": {}}),
    "osft": (CONFIG, {"osft": {}}),
    "coso": (CONFIG, {"coso": {"rank": 2, "every": 3}}),
    "migu": (CONFIG, {"migu": {}}),
}


class Killed(Exception):
    """Stands for the end of the process."""


def norm_network() -> nn.Module:
    model = network(dropout=0.4)
    return nn.Sequential(model[:1], nn.BatchNorm1d(8), *model[1:])


BASE = norm_network().state_dict()


def learn(model, config=CONFIG, settings=None, *, kill_after=None, seed=3, **options):
    def on_step(step, steps, value):
        if step == kill_after:
            raise Killed

    training = LocalTraining.chosen(settings or {}, settings)
    return fine_tune(model, task(), config, seed, on_step, training=training, base=BASE, **options)


@pytest.mark.parametrize("kill_after", [5, 7])
@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_ends_with_the_bits_of_an_unbroken_one(name, kill_after, tmp_path):
    config, settings = RUNS[name]
    checkpoint = RunCheckpoint(tmp_path / "run", "job", every=5 if kill_after == 7 else 2)
    unbroken, killed, resumed = norm_network(), norm_network(), norm_network()
    expected = learn(unbroken, config, settings)
    with pytest.raises(Killed):
        learn(killed, config, settings, kill_after=kill_after, checkpoint=checkpoint)
    taken = []
    report = fine_tune(
        resumed,
        task(),
        config,
        3,
        lambda step, *_: taken.append(step),
        training=LocalTraining.chosen(settings, settings),
        base=BASE,
        checkpoint=checkpoint,
    )
    assert taken[0] == kill_after // checkpoint.every * checkpoint.every + 1
    assert same(weights(unbroken), weights(resumed))
    assert replace(report, seconds=0, updates={}) == replace(expected, seconds=0, updates={})
    for layer, update in expected.updates.items():
        assert same(list(update.tensors()), list(report.updates[layer].tensors()))


def test_run_killed_twice_and_after_its_last_step(tmp_path):
    checkpoint = RunCheckpoint(tmp_path, "job", every=4)
    unbroken, resumed = network(), network()
    expected = learn(unbroken)
    for kill_after in (6, 13, 20):
        with pytest.raises(Killed):
            learn(network(), kill_after=kill_after, checkpoint=checkpoint)
    report = learn(resumed, checkpoint=checkpoint)
    assert same(weights(unbroken), weights(resumed))
    assert (report.steps, report.mean_loss) == (20, expected.mean_loss)


def test_run_that_was_stopped_early_stays_stopped(tmp_path):
    settings = {"stop": {"every": 1, "patience": 1, "held_out": 0.5}}
    config = replace(CONFIG, learning_rate=2.0)
    expected = learn(network(), config, settings)
    assert expected.steps < 20
    checkpoint, resumed = RunCheckpoint(tmp_path, "job", every=1), network()
    with pytest.raises(Killed):
        learn(network(), config, settings, kill_after=expected.steps, checkpoint=checkpoint)
    assert learn(resumed, config, settings, checkpoint=checkpoint).steps == expected.steps


def test_global_generator_is_left_as_it_was_by_a_resumed_run(tmp_path):
    checkpoint = RunCheckpoint(tmp_path, "job", every=1)
    with pytest.raises(Killed):
        learn(network(), kill_after=5, checkpoint=checkpoint)
    model = network()
    torch.manual_seed(11)
    learn(model, checkpoint=checkpoint)
    after = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(after, torch.rand(3))


# --- files that are not this run's ---


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run that was killed at its fifth step."""
    checkpoint = RunCheckpoint(tmp_path, "job", every=5)
    with pytest.raises(Killed):
        learn(network(), kill_after=5, checkpoint=checkpoint)
    return checkpoint


def first_step(checkpoint, **options) -> int:
    taken = []

    def on_step(step, steps, value):
        taken.append(step)
        raise Killed

    settings = {"config": CONFIG, "seed": 3, **options}
    with pytest.raises(Killed):
        fine_tune(network(), task(), on_step=on_step, checkpoint=checkpoint, **settings)
    return taken[0]


def test_the_same_run_goes_on(checkpoint):
    assert first_step(checkpoint) == 6


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 4},
        {"config": replace(CONFIG, steps=21)},
        {"config": replace(CONFIG, batch_size=9)},
        {"training": LocalTraining.chosen(["prox"])},
    ],
)
def test_run_with_other_settings_starts_anew(checkpoint, changed):
    assert first_step(checkpoint, **changed) == 1


def test_run_with_another_key_starts_anew(checkpoint):
    assert first_step(replace(checkpoint, key="another job")) == 1


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def rewrite(path):
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        rewrite,
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x80\x04 not a tensor" * 50),
    ],
    ids=["flipped", "foreign", "cut off", "empty", "pickle"],
)
def test_damaged_or_foreign_file_is_passed_over_with_a_line_in_the_log(checkpoint, damage, caplog):
    damage(checkpoint.path)
    with caplog.at_level(logging.INFO, logger="fedmerge.client"):
        assert first_step(checkpoint) == 1
    assert "training starts anew" in caplog.text
    assert str(checkpoint.path) in caplog.text


def test_disk_that_refuses_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"in the way")
    report = learn(network(), checkpoint=RunCheckpoint(tmp_path / "file" / "run", "job", every=10))
    assert report.steps == 20
    assert caplog.text.count("could not be resumed") == 2


def test_state_is_written_every_few_steps_and_leaves_one_file(tmp_path):
    checkpoint = RunCheckpoint(tmp_path, "job", every=6)
    steps = []

    def on_step(step, *_):
        if checkpoint.path.exists():
            steps.append(int(load_file(checkpoint.path)["loop/step"]))

    fine_tune(network(), task(), CONFIG, 0, on_step, checkpoint=checkpoint)
    assert steps == [6] * 6 + [12] * 6 + [18] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]
    checkpoint.finish()
    checkpoint.finish()
    assert not list(tmp_path.iterdir())
