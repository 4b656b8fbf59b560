"""Does our mod privatise what a ClientApp sends, and nothing else get past it; are Flower's mods refused?"""

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod, message_size_mod
from local_grid import LocalGrid

from fedmerge.client.mods import private_updates, refuse_flower_dp
from fedmerge.common import wire
from fedmerge.common.errors import ConfigError
from fedmerge.common.privacy import Privacy
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import to_bytes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VECTOR = TaskVector.of({"w": torch.full((2, 2), 3.0)}, ["e"], Manifest(task="cats", examples=5))


def asked(records: dict[str, object], privacy: Privacy) -> Message:
    """The reply of a ClientApp that sends these records through our mod."""
    app = ClientApp(mods=[private_updates(privacy)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict(records), reply_to=message)

    grid = LocalGrid({1: app})
    (pushed,) = grid.push_messages([Message(RecordDict({}), 1, "train")])
    (reply,) = grid.pull_messages([pushed])
    return reply


def test_a_task_vector_leaves_clipped_and_all_else_as_it_was():
    """The norm is 6; clipped to 3 every number is halved."""
    records = {wire.VECTOR: wire.pack_vector(to_bytes(VECTOR)), "metrics": MetricRecord({"loss": 0.5})}
    reply = asked(records, Privacy(clip=3.0, noise=0))
    sent = wire.unpack_vector(reply.content, wire.VECTOR, where="reply")
    torch.testing.assert_close(sent.read("w").to_dense(), torch.full((2, 2), 1.5), rtol=1e-6, atol=0)
    assert (sent.manifest, sent.unchanged) == (VECTOR.manifest, VECTOR.unchanged)
    assert reply.content["metrics"] == MetricRecord({"loss": 0.5})


def test_a_task_vector_leaves_with_noise():
    reply = asked({wire.VECTOR: wire.pack_vector(to_bytes(VECTOR))}, Privacy(clip=100.0, noise=1.0))
    sent = wire.unpack_vector(reply.content, wire.VECTOR, where="reply").read("w").to_dense()
    assert bool((sent != 3.0).all())


def test_a_reply_without_arrays_passes():
    reply = asked({"metrics": MetricRecord({"loss": 0.5})}, Privacy(clip=1.0, noise=1.0))
    assert reply.content["metrics"] == MetricRecord({"loss": 0.5})


@pytest.mark.parametrize(
    "records",
    [
        {"arrays": ArrayRecord({"w": torch.ones(2)})},
        {wire.VECTOR: ArrayRecord({"w": torch.ones(2)})},
        {wire.VECTOR: wire.pack_vector(to_bytes(VECTOR)), "more": ArrayRecord({"w": torch.ones(2)})},
        {wire.RANGE: wire.pack_vector(b"bytes")},
    ],
    ids=["a whole model", "a model in its place", "both", "a range"],
)
def test_arrays_that_cannot_be_privatised_do_not_leave(records):
    reply = asked(records, Privacy(clip=1.0, noise=1.0))
    assert reply.has_error()
    assert "MismatchError" in reply.error.reason


@pytest.mark.parametrize(
    "mod",
    [fixedclipping_mod, adaptiveclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 1e-5)],
    ids=["fixed", "adaptive", "local"],
)
def test_a_mod_of_flower_that_clips_models_is_refused_by_name(mod):
    name = getattr(mod, "__name__", "LocalDpMod")
    with pytest.raises(ConfigError, match=f"wrong where the reply is a task vector: got {name}"):
        refuse_flower_dp([message_size_mod, mod])


def test_other_mods_pass():
    refuse_flower_dp([message_size_mod, private_updates(Privacy(clip=1.0, noise=1.0))])
