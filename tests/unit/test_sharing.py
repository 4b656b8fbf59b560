"""Do the sites of one task hold all of it, each row once?"""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from fedmerge.client.sharing import share
from fedmerge.client.tasks import Task
from fedmerge.common.errors import ConfigError

TRAIN, TEST = 120, 41


def task(**changes) -> Task:
    labels = torch.arange(TRAIN) // 30
    made = Task(
        "four classes",
        TensorDataset(torch.arange(TRAIN), labels),
        TensorDataset(torch.arange(TEST)),
        loss=lambda model, batch: model(batch),
        metric=lambda model, batch: model(batch),
        labels=labels.tolist(),
    )
    return replace(made, **changes)


def rows(dataset) -> list[int]:
    return [int(dataset[i][0]) for i in range(len(dataset))]


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5", "dirichlet:100", "shards:1", "shards:3"])
def test_parts_are_disjoint_and_together_the_whole(scheme):
    parts = [share(task(), part, 4, scheme, seed=5) for part in range(4)]
    assert sorted(row for part in parts for row in rows(part.train)) == list(range(TRAIN))
    assert sorted(row for part in parts for row in rows(part.test)) == list(range(TEST))
    assert all(len(part.train) and len(part.test) for part in parts)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5", "shards:2"])
def test_labels_follow_their_rows(scheme):
    part = share(task(), 1, 3, scheme, seed=0)
    assert list(part.labels) == [int(part.train[i][1]) for i in range(len(part.train))]


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5", "shards:2"])
def test_same_seed_same_part_another_seed_another(scheme):
    first, again, other = (rows(share(task(), 0, 4, scheme, seed).train) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("scheme", "held"),
    [
        ("iid", [2, 36, 37, 40, 44, 75, 84, 88, 97, 101]),
        ("dirichlet:0.5", [9, 10, 43, 44, 68, 69, 103, 104, 105]),
        ("shards:2", [35, 36, 37, 38, 39, 85, 86, 87, 88, 89]),
    ],
)
def test_splits_of_a_seed_stay_what_they_were(scheme, held):
    assert rows(share(task(), 3, 12, scheme, seed=5).train) == held


def test_even_parts_have_equal_size_and_every_label():
    parts = [share(task(), part, 4, "iid", seed=0) for part in range(4)]
    assert [len(part.train) for part in parts] == [30] * 4
    assert max(len(p.test) for p in parts) - min(len(p.test) for p in parts) <= 1
    assert all(set(part.labels) == {0, 1, 2, 3} for part in parts)


def test_small_alpha_skews_labels_more_than_large():
    def skew(alpha):
        parts = [share(task(), part, 4, f"dirichlet:{alpha}", seed=0) for part in range(4)]
        return sum(max(part.labels.count(label) for label in range(4)) / len(part.labels) for part in parts)

    assert skew(0.2) > skew(100) + 0.5


def test_shards_are_runs_of_the_rows_sorted_by_label():
    labels = [row % 4 for row in range(TRAIN)]
    parts = [share(task(labels=labels), part, 6, "shards:2", seed=3) for part in range(6)]
    by_label = sorted(range(TRAIN), key=lambda row: labels[row])
    shards = {tuple(by_label[start : start + 10]) for start in range(0, TRAIN, 10)}
    dealt = [{shard for shard in shards if set(shard) <= set(rows(part.train))} for part in parts]
    assert [len(held) for held in dealt] == [2] * 6
    assert set().union(*dealt) == shards


def test_few_shards_mean_few_labels():
    parts = [share(task(), part, 6, "shards:2", seed=0) for part in range(6)]
    assert all(len(part.train) == 20 and len(set(part.labels)) <= 2 for part in parts)


def test_rows_that_fill_no_shard_are_left_out():
    parts = [share(task(), part, 7, "shards:2", seed=0) for part in range(7)]
    held = [row for part in parts for row in rows(part.train)]
    assert [len(part.train) for part in parts] == [16] * 7  # 120 rows make 14 shards of 8
    assert len(set(held)) == len(held) == 112
    assert sorted(row for part in parts for row in rows(part.test)) == list(range(TEST))


def test_shards_need_a_row_each():
    assert len(share(task(), 0, 40, "shards:3", seed=0).train) == 3
    with pytest.raises(ConfigError, match="too few rows to share: got 120 training, wanted 4 for each of 31"):
        share(task(), 0, 31, "shards:4", seed=0)


def test_parts_of_one_split_are_computed_together(monkeypatch):
    first = rows(share(task(), 0, 5, "dirichlet:1", seed=9).train)
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    others = [rows(share(task(), part, 5, "dirichlet:1", seed=9).train) for part in range(1, 5)]
    assert sorted(first + [row for part in others for row in part]) == list(range(TRAIN))


def test_tasks_of_other_labels_are_split_anew():
    labels = task().labels
    first = share(task(), 0, 2, "shards:1", seed=0)
    other = share(task(labels=labels[::-1]), 0, 2, "shards:1", seed=0)
    assert sorted(TRAIN - 1 - row for row in rows(first.train)) == rows(other.train)


def test_one_part_is_the_task_itself_and_needs_no_flower(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    whole = task()
    assert share(whole, 0, 1, "iid", seed=0) is whole


def test_even_parts_need_no_labels():
    assert share(task(labels=None), 0, 2, "iid", seed=0).labels is None


BAD_SCHEMES = [
    *("", "IID", "iid:2", "dirichlet", "shards"),
    *(f"dirichlet:{alpha}" for alpha in ("", "x", "0", "-1", "inf", "nan")),
    *(f"shards:{count}" for count in ("", "x", "0", "-1", "1.5", "inf")),
]


@pytest.mark.parametrize("scheme", BAD_SCHEMES)
def test_unknown_scheme_is_refused_also_for_one_part(scheme):
    with pytest.raises(
        ConfigError, match=r"unknown sharing scheme: got .* wanted 'iid' or 'dirichlet:ALPHA'"
    ):
        share(task(), 0, 1, scheme, seed=0)


@pytest.mark.parametrize(("part", "parts"), [(-1, 2), (2, 2), (0, 0), (0, -1)])
def test_part_out_of_range_is_refused(part, parts):
    with pytest.raises(ConfigError, match=rf"part out of range: got part {part} of {parts}"):
        share(task(), part, parts, "iid", seed=0)


def test_more_sites_than_rows_is_refused():
    with pytest.raises(ConfigError, match="got 120 training, 41 test, wanted 42 of each"):
        share(task(), 0, 42, "iid", seed=0)


def test_sharing_by_label_without_labels_is_refused():
    with pytest.raises(ConfigError, match="needs the task's labels"):
        share(task(labels=None), 0, 2, "dirichlet:1", seed=0)
    with pytest.raises(ConfigError, match="needs the task's labels"):
        share(task(labels=None), 0, 2, "shards:2", seed=0)
    with pytest.raises(ConfigError, match="got 3 labels, wanted 120"):
        share(task(labels=[0, 1, 2]), 0, 2, "dirichlet:1", seed=0)


def test_split_that_leaves_a_site_without_rows_is_refused():
    with pytest.raises(ConfigError, match="some site would hold no training rows"):
        share(task(), 0, 30, "dirichlet:0.001", seed=0)
