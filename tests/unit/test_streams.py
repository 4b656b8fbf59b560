"""Is a stream found by what the user wrote, and does it deliver what it promises?"""

import sys
from dataclasses import replace

import pytest
import torch

from fedmerge.client.loading import load_stream
from fedmerge.client.tasks import StreamOptions
from fedmerge.client.training import fine_tune, score
from fedmerge.common.errors import ConfigError
from fedmerge.common.layers import matches
from fedmerge.deploy.streams.example import example
from fedmerge.deploy.streams.prompted import split
from fedmerge.deploy.streams.text import CORPORA, TEST_ROWS, text

EXAMPLE = "fedmerge.deploy.streams.example:example"


def test_stream_is_found_by_module():
    assert load_stream(EXAMPLE, StreamOptions()).tasks == example(StreamOptions()).tasks


def test_text_is_built_in_and_needs_no_network_to_be_named():
    stream = load_stream("text", StreamOptions())
    assert (stream.name, stream.tasks) == ("text", tuple(CORPORA))


def test_stream_is_found_by_file_without_touching_the_import_path(tmp_path):
    written = tmp_path / "mine.py"
    written.write_text(
        "from dataclasses import dataclass\n"
        "from fedmerge.client.tasks import Stream\n"
        "@dataclass\n"
        "class Plan:\n"
        "    x: 'int' = 0\n"
        "def make(options):\n"
        "    return Stream(f'seed {options.seed}', ('a',), load=None, build_model=None)\n"
    )
    before = list(sys.path)
    assert load_stream(f"{written}:make", StreamOptions(seed=4)).name == "seed 4"
    assert sys.path == before
    assert "mine" not in sys.modules


def test_two_files_of_one_name_are_two_streams(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.py").write_text(
            "from fedmerge.client.tasks import Stream\n"
            f"def make(options): return Stream({name!r}, ('a',), load=None, build_model=None)\n"
        )
    specs = [f"{tmp_path / name / 'same.py'}:make" for name in ("one", "two")]
    assert [load_stream(spec, StreamOptions()).name for spec in specs] == ["one", "two"]


@pytest.mark.parametrize("spec", ["", "txt", "module:", ":function", "module:not a name", "a.py"])
def test_spec_of_another_form_is_refused(spec):
    with pytest.raises(ConfigError, match=r"not the name of a function: got .* wanted 'text'"):
        load_stream(spec, StreamOptions())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere/mine.py:make", "no such file: got nowhere/mine.py"),
        ("fedmerge.nowhere:make", "no such module: got fedmerge.nowhere"),
        ("fedmerge.deploy.streams.example:exmple", "no such function: got 'exmple'. Did you mean 'example'"),
        ("fedmerge.deploy.streams.example:TASKS", "no such function: got 'TASKS'"),
    ],
)
def test_what_is_missing_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        load_stream(spec, StreamOptions())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 7", "returned something else: got int, wanted Stream"),
        ("return Stream('x', (), load=None, build_model=None)", "a stream needs tasks"),
        ("return Stream('x', ('a', 'b', 'a'), load=None, build_model=None)", "task names repeat: got 'a'"),
    ],
)
def test_stream_that_breaks_the_contract_is_refused(tmp_path, body, message):
    (tmp_path / "mine.py").write_text(
        f"from fedmerge.client.tasks import Stream\ndef make(options):\n    {body}\n"
    )
    with pytest.raises(ConfigError, match=message):
        load_stream(f"{tmp_path / 'mine.py'}:make", StreamOptions())


def test_errors_in_the_users_file_come_through_and_may_be_mended(tmp_path):
    written = tmp_path / "mine.py"
    written.write_text("import fedmerge_has_no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="fedmerge_has_no_such_module"):
        load_stream(f"{written}:make", StreamOptions())
    written.write_text(
        "from fedmerge.client.tasks import Stream\n"
        "def make(options): return Stream('mended', ('a',), load=None, build_model=None)\n"
    )
    assert load_stream(f"{written}:make", StreamOptions()).name == "mended"


def test_example_is_learned_and_its_tasks_want_different_things():
    stream = example(StreamOptions())
    tasks = [stream.load(name) for name in stream.tasks]
    model = stream.build_model()
    before = score(model, tasks[0]).accuracy
    fine_tune(model, tasks[0], stream.training, seed=0)
    own, *others = [score(model, task).accuracy for task in tasks]
    assert own > 0.9 > 0.6 > before
    assert max(others) < 0.7


def test_example_is_the_same_every_time_and_obeys_its_options():
    one, two = (example(StreamOptions(seed=1)).load("shuffled") for _ in range(2))
    assert torch.equal(one.train.tensors[0], two.train.tensors[0])
    assert len(example(StreamOptions(rows=10)).load("plain").train) == 10
    models = [example(StreamOptions()).build_model() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_split_uses_every_text_once_and_draws_classes_in_turn():
    def encode(words):  # what differs only after the cut is the same text
        return tuple(words.casefold().split()[:2])

    rows = [(f"Text {i % 300} {i}", i % 300 % 3) for i in range(600)] + [("text   7 again", 1)]
    train, test = split(rows, 3, 0, 60, TEST_ROWS, encode)
    assert len({ids for ids, _ in train + test}) == len(train + test) == 60 + TEST_ROWS
    counts = [sum(label == wanted for _, label in test) for wanted in range(3)]
    assert max(counts) - min(counts) < TEST_ROWS / 4
    assert split(rows, 3, 0, 60, TEST_ROWS, encode) == (train, test)
    assert split(rows, 3, 0, 10, TEST_ROWS, encode) == (train[:10], test)
    assert split(rows, 3, 1, 60, TEST_ROWS, encode)[1] != test
    assert len(split(rows, 3, 0, 10_000, TEST_ROWS, encode)[0]) == 300 - TEST_ROWS


@pytest.mark.parametrize("rows", [0, -1])
def test_text_without_training_rows_is_refused(rows):
    with pytest.raises(ConfigError, match="rows out of range"):
        text(StreamOptions(rows=rows))


def test_text_delivers_what_it_promises():
    """Fetches about 100 MB when the cache is cold."""
    stream = text(StreamOptions(rows=40))
    stream.prepare()
    model = stream.build_model()
    sent = [name for name in model.state_dict() if not matches(name, stream.training.frozen)]
    assert sent[0] == "encoder.layer.0.attention.self.query.weight"
    for name in stream.tasks:
        task, classes = stream.load(name), len(CORPORA[name].prompts)
        assert stream.load(name) is task
        assert (len(task.train), len(task.test)) == (40, TEST_ROWS)
        assert len(task.labels) == 40
        assert {task.test[i][1] for i in range(TEST_ROWS)} == set(range(classes))
        lengths = [len(task.test[i][0]) for i in range(TEST_ROWS)]
        assert lengths == sorted(lengths)
        assert lengths[-1] <= CORPORA[name].tokens
        ours, theirs = ({rows[i][0] for i in range(len(rows))} for rows in (task.train, task.test))
        assert ours.isdisjoint(theirs)
        batch = task.collate([task.train[0], task.test[0]])
        assert task.metric(model, batch).shape == (2,)
        assert task.loss(model, batch).isfinite()
    again = text(StreamOptions(rows=41)).load("tweets")
    assert [again.train[i] for i in range(40)] == [stream.load("tweets").train[i] for i in range(40)]
    report = fine_tune(model, again, replace(stream.training, steps=1, batch_size=2), seed=0)
    assert report.examples == 41
    fresh = stream.build_model().state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert moved == set(sent)
    with pytest.raises(ConfigError, match="unknown task: got 'twets'"):
        stream.load("twets")
