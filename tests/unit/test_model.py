"""Does each merge become one version that says what happened, and a failed one nothing at all?"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fedmerge.common.base import Base
from fedmerge.common.errors import FactorisationFailed, NonFinite, UnknownLayer
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.spectrum import LinAlgError
from fedmerge.server.model import GlobalModel

BASE = Base.from_checkpoint({"w": torch.zeros(6, 5), "b": torch.zeros(6)})


def vector(seed: int, **changes) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    layers = {"w": torch.randn(6, 5, generator=generator), "b": torch.randn(6, generator=generator)}
    manifest = Manifest(BASE.fingerprint, 0, f"task {seed}", "a site's own word", 10 * seed)
    return replace(TaskVector.of(layers, (), manifest, f"update {seed}"), **changes)


def unreadable(seed: int) -> TaskVector:
    """Its second layer turns out to hold NaN when it is read."""

    def read(name: str):
        if name == "b":
            raise NonFinite("values that are not finite in float32", where="update", layer=name)
        return vector(seed).read(name)

    return vector(seed, read=read)


@pytest.fixture(params=["average", "opcm", "task_arithmetic", "wudi"])
def model(request) -> Iterator[GlobalModel]:
    with LocalEngine(make_rule(request.param), BASE.layers.values(), workers=2) as engine:
        yield GlobalModel(BASE, engine)


def test_versions_are_numbered_from_one_and_say_who_and_what(model):
    first = model.merge(vector(1), ["ward 7"])
    second = model.merge(vector(2), ["ward 8", "ward 9"])
    assert [version.number for version in model.versions] == [1, 2]
    assert (first.task, first.sites, first.examples) == ("task 1", ("ward 7",), 10)
    assert (second.task, second.sites, second.examples) == ("task 2", ("ward 8", "ward 9"), 20)
    assert model.versions == [first, second]
    assert min(first.absorb_seconds, second.absorb_seconds) > 0


def test_a_version_that_cannot_be_read_out_is_none(model, monkeypatch):
    model.merge(vector(1))
    before, totals = to_bytes(model.merged()), model.engine.totals

    def fail(self, state, totals):
        raise LinAlgError("no convergence")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.engine.rule), "read", fail)
        with pytest.raises(FactorisationFailed, match="no convergence"):
            model.merge(vector(2))
    assert len(model.versions) == 1
    assert (to_bytes(model.merged()), model.engine.totals) == (before, totals)
    assert model.merge(vector(3)).number == 2


def test_the_norms_are_those_of_the_vectors(model):
    for seed in (1, 2, 3):
        version = model.merge(vector(seed))
        assert version.update_norm == pytest.approx(vector(seed).norm(), rel=1e-6)
        assert version.merged_norm == pytest.approx(model.merged().norm(), rel=1e-5)
        assert version.scale * version.lambda_t == pytest.approx(1.0)


def test_the_first_vector_alone_is_the_model_up_to_the_scale(model):
    version = model.merge(vector(1))
    for name, update in model.merged().items():
        wanted = version.scale * vector(1).read(name).to_dense()
        assert torch.allclose(update.to_dense(), wanted, rtol=1e-6, atol=1e-7)


def test_the_merged_vector_says_which_version_of_which_base_it_is(model):
    assert model.merged().names == ()
    for seed in (1, 2):
        model.merge(vector(seed))
    manifest = model.merged().manifest
    assert (manifest.base, manifest.origin_version, manifest.task) == (BASE.fingerprint, 2, "merged")


def test_preparing_changes_no_bit(model):
    for seed in (1, 2, 3):
        model.merge(vector(seed))
    before = to_bytes(model.merged())
    model.prepare()
    assert to_bytes(model.merged()) == before


@pytest.mark.parametrize(
    ("bad", "error"),
    [(unreadable(9), NonFinite), (TaskVector.of({"other": torch.ones(2)}), UnknownLayer)],
    ids=["NaN in its second layer", "another layer"],
)
def test_a_failed_merge_leaves_model_and_versions_as_they_were(model, bad, error):
    model.merge(vector(1))
    before, versions = to_bytes(model.merged()), list(model.versions)
    with pytest.raises(error):
        model.merge(bad)
    assert to_bytes(model.merged()) == before
    assert model.versions == versions
    assert model.merge(vector(2)).number == 2


def test_every_layer_is_announced_when_it_is_done(model):
    done = []
    model.merge(vector(1), on_layer=done.append)
    assert sorted(done) == ["b", "w"]
