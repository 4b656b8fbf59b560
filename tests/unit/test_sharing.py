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


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5", "dirichlet:100"])
def test_parts_are_disjoint_and_together_the_whole(scheme):
    parts = [share(task(), part, 4, scheme, seed=5) for part in range(4)]
    assert sorted(row for part in parts for row in rows(part.train)) == list(range(TRAIN))
    assert sorted(row for part in parts for row in rows(part.test)) == list(range(TEST))
    assert all(len(part.train) and len(part.test) for part in parts)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5"])
def test_labels_follow_their_rows(scheme):
    part = share(task(), 1, 3, scheme, seed=0)
    assert list(part.labels) == [int(part.train[i][1]) for i in range(len(part.train))]


def test_same_seed_same_part_another_seed_another():
    first, again, other = (rows(share(task(), 0, 4, "iid", seed).train) for seed in (1, 1, 2))
    assert first == again != other


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


def test_one_part_is_the_task_itself_and_needs_no_flower(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    whole = task()
    assert share(whole, 0, 1, "iid", seed=0) is whole


def test_even_parts_need_no_labels():
    assert share(task(labels=None), 0, 2, "iid", seed=0).labels is None


BAD_SCHEMES = ["", "IID", "iid:2", "dirichlet"] + [
    f"dirichlet:{alpha}" for alpha in ("", "x", "0", "-1", "inf", "nan")
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
    with pytest.raises(ConfigError, match="got 3 labels, wanted 120"):
        share(task(labels=[0, 1, 2]), 0, 2, "dirichlet:1", seed=0)


def test_split_that_leaves_a_site_without_rows_is_refused():
    with pytest.raises(ConfigError, match="some site would hold no training rows"):
        share(task(), 0, 30, "dirichlet:0.001", seed=0)
