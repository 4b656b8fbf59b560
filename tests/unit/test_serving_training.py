"""Do sites of a serving server train as it asks, from where it asks, and go on after a stop?"""

from functools import partial

import pytest
import torch
from flwr.app import Context, RecordDict
from local_grid import ROWS, sent_vector
from serving_bench import Bench, base

from fedmerge.client.app import make_client_app
from fedmerge.client.config import SiteConfig
from fedmerge.client.memory import SiteMemory, recalled, remember
from fedmerge.client.outgoing import outgoing
from fedmerge.client.site import NONE, Site, open_site, put
from fedmerge.client.state import SiteState
from fedmerge.client.tasks import StreamOptions
from fedmerge.common.compression import Compression
from fedmerge.common.errors import StoreDamaged
from fedmerge.common.privacy import Privacy
from fedmerge.common.taskvector import LowRank, TaskVector
from fedmerge.common.training import LocalTraining
from fedmerge.common.vectorfile import load, save
from fedmerge.deploy.streams.example import TASKS
from fedmerge.server.learning import Teaching

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHORT = {"loop": {"steps": 3}}


def test_sites_train_and_compress_as_they_are_asked(tmp_path):
    training = LocalTraining.chosen(["lora"], SHORT | {"lora": {"rank": 2, "targets": "2.weight"}})
    bench = Bench(tmp_path, teaching=Teaching(training=training, compress="int8"))
    bench.join(11, "a", "plain")
    bench.until(bench.learned)
    (reply,) = bench.grid.trained()
    vector = sent_vector(reply)
    assert vector.names == ("2.weight",)
    assert isinstance(vector.read("2.weight"), LowRank)
    assert vector.read("2.weight").rank == 2
    assert reply.content.metric_records["metrics"]["cut"] > 0


@pytest.mark.parametrize("options", [(), ("tangent",)])
def test_versions_are_scored_as_the_model_was_trained(tmp_path, monkeypatch, options):
    scored = []
    score = Site.score

    def noted(self, tasks, merged=None, device="auto", tangent=False, heads=NONE):
        scored.append((merged is not None, tangent))
        return score(self, tasks, merged, device, tangent, heads)

    monkeypatch.setattr(Site, "score", noted)
    teaching = Teaching(training=LocalTraining.chosen(options, SHORT))
    bench = Bench(tmp_path, teaching=teaching, evaluate=True)
    bench.join(11, "a", "plain")
    bench.until(lambda: bench.of("evaluated", site="a"))
    assert (True, bool(options)) in scored
    assert (True, not options) not in scored


def learned_from(tmp_path, held: bool) -> tuple[Bench, torch.Tensor]:
    """A site that holds a merged version and then learns; and what that version moved."""
    teaching = Teaching(training=LocalTraining.chosen((), SHORT), held=held)
    bench = Bench(tmp_path, teaching=teaching)
    at = open_site("example", StreamOptions(0, ROWS))
    merged, _ = at.learn(at.task("reversed", 0, 1, "iid", 0), seed=5, site="x", device="cpu")
    state = bench.state("a")
    save(merged, state.incoming)
    state.install(state.incoming, number=4, model="m", dtype="f32")
    bench.join(11, "a", "plain")
    bench.until(bench.learned)
    return bench, merged


def test_a_site_may_start_from_the_version_it_holds_and_sends_what_is_beyond_the_base(tmp_path):
    bench, merged = learned_from(tmp_path, held=True)
    vector = sent_vector(bench.grid.trained()[0])
    assert vector.manifest.origin_version == 4
    at = open_site("example", StreamOptions(0, ROWS))
    task = at.task("plain", 0, 1, "iid", 0)
    training = LocalTraining.chosen((), SHORT)
    at.learn(task, seed=0, site="a", origin=merged, device="cpu", training=training)
    for name, weight in at.model.state_dict().items():
        assert torch.allclose(base().read(name) + vector.read(name).to_dense(), weight, atol=1e-6)


def test_noise_and_clipping_are_for_what_a_run_has_moved_and_not_for_the_version_it_started_from(tmp_path):
    at = open_site("example", StreamOptions(0, ROWS))
    merged, _ = at.learn(at.task("reversed", 0, 1, "iid", 0), seed=5, site="x", device="cpu")
    assert merged.norm() > 0.5
    needs, each = ("fisher",), ("plain", 0, 1, "iid", 0)
    moved, _ = at.learn(
        at.task(*each), seed=0, site="a", device="cpu", origin=merged, from_base=True, needs=needs
    )
    assert moved.norm() > 0.5
    privacy = Privacy(clip=0.5, noise=0.0, fisher=1e9)
    measured = partial(at.beyond_base, origin=merged)
    sent = outgoing(moved, privacy, Compression(), SiteMemory(), measured).vector
    added = {name: sent.read(name).to_dense() - merged.read(name).to_dense() for name in merged.names}
    assert TaskVector.of(added).norm() == pytest.approx(0.5, rel=1e-4)
    whole = measured(moved)
    assert sent.names == whole.names == tuple(base().merged_layers)
    for name in sent.names:
        assert torch.allclose(sent.statistics(name)["fisher"], whole.statistics(name)["fisher"])


def test_low_rank_factors_are_blurred_as_factors_also_where_a_run_starts_from_a_version(tmp_path):
    at = open_site("example", StreamOptions(0, ROWS))
    merged, _ = at.learn(at.task("reversed", 0, 1, "iid", 0), seed=5, site="x", device="cpu")
    training = LocalTraining.chosen(["lora"], SHORT | {"lora": {"rank": 1, "targets": "2.weight"}})
    moved, _ = at.learn(
        at.task("plain", 0, 1, "iid", 0),
        seed=0,
        site="a",
        device="cpu",
        origin=merged,
        from_base=True,
        training=training,
    )
    measured = partial(at.beyond_base, origin=merged)
    sent = outgoing(moved, Privacy(clip=0.1, noise=3.0), Compression(), SiteMemory(), measured).vector
    added = {name: sent.read(name).to_dense() - merged.read(name).to_dense() for name in merged.names}
    singular = torch.linalg.svdvals(added.pop("2.weight"))
    assert singular[0] > 1e-2
    assert bool((singular[1:] < 1e-5).all())
    assert all(values.abs().max() < 1e-6 for values in added.values())


def test_a_site_that_is_not_asked_to_starts_from_the_base(tmp_path):
    bench, _ = learned_from(tmp_path, held=False)
    vector = sent_vector(bench.grid.trained()[0])
    at = open_site("example", StreamOptions(0, ROWS))
    training = LocalTraining.chosen((), SHORT)
    found, _ = at.learn(at.task("plain", 0, 1, "iid", 0), seed=0, site="a", device="cpu", training=training)
    assert vector.manifest.origin_version == 0
    assert all(torch.equal(vector.read(n).to_dense(), found.read(n).to_dense()) for n in found.names)


def test_a_site_without_a_version_starts_from_the_base_when_asked_to_start_from_its_own(tmp_path):
    bench = Bench(tmp_path, teaching=Teaching(training=LocalTraining.chosen((), SHORT), held=True))
    bench.join(11, "a", "plain")
    bench.until(bench.learned)
    assert sent_vector(bench.grid.trained()[0]).manifest.origin_version == 0


class Killed(BaseException):
    """The client's process ends here."""


def test_a_training_that_was_killed_goes_on_and_gives_the_same_bits(tmp_path, monkeypatch):
    whole = Bench(tmp_path / "whole")
    whole.join(11, "a", "plain")
    whole.until(whole.learned)

    learn, steps = Site.learn, []

    def interrupted(self, *given, on_step, **named):
        def stop(step, total, loss):
            steps.append(step)
            if len(steps) == 55:
                raise Killed
            on_step(step, total, loss)

        return learn(self, *given, on_step=stop, **named)

    monkeypatch.setattr(Site, "learn", interrupted)
    bench = Bench(tmp_path / "broken")
    bench.join(11, "a", "plain")
    with pytest.raises(Killed):
        bench.settle()
    assert (bench.folder / "a" / "run" / "run.safetensors").is_file()
    put(open_site("example", StreamOptions(0, ROWS)).model, {n: base().read(n) for n in base().layers})
    bench.restart()
    bench.until(bench.learned, steps=2000)
    assert steps[55] == 51
    assert not (bench.folder / "a" / "run" / "run.safetensors").exists()
    first, second = (sent_vector(b.grid.trained()[-1]) for b in (whole, bench))
    assert all(torch.equal(first.read(n).to_dense(), second.read(n).to_dense()) for n in first.names)


def test_what_a_site_remembers_outlives_its_process(tmp_path):
    bench = Bench(tmp_path)
    state = bench.state("a")
    assert state.memory() == SiteMemory()
    memory = SiteMemory({"coso/0.weight": torch.eye(3)}, "opcm", "plain", 7)
    state.remember(memory)
    found = bench.state("a").memory()
    assert torch.equal(found.tensors["coso/0.weight"], torch.eye(3))
    assert (found.learning, found.task, found.releases) == ("opcm", "plain", 7)


@pytest.mark.parametrize("damage", [b"{", b""])
def test_a_damaged_memory_is_the_one_before_or_an_empty_one(tmp_path, damage):
    state = Bench(tmp_path).state("a")
    state.remember(SiteMemory({"coso/0.weight": torch.eye(3)}, "opcm", "plain", 7))
    (state.folder / "memory.safetensors").write_bytes(damage)
    assert state.memory() == SiteMemory(releases=7)
    state.remember(SiteMemory({"coso/0.weight": torch.eye(3)}, "opcm", "plain", 8))
    state.remember(SiteMemory({"coso/0.weight": torch.ones(2)}, "opcm", "shuffled", 9))
    (state.folder / "memory.safetensors").write_bytes(damage)
    found = state.memory()
    assert torch.equal(found.tensors["coso/0.weight"], torch.eye(3))
    assert (found.task, found.releases) == ("plain", 9)


def test_a_training_that_runs_again_finds_the_memory_from_before_it_and_all_releases(tmp_path):
    state = Bench(tmp_path).state("a")
    state.remember(SiteMemory({"coso/0.weight": torch.eye(3)}, "opcm", "plain", 1), "first")
    state.remember(SiteMemory({"coso/0.weight": torch.ones(2)}, "opcm", "shuffled", 2), "second")
    again, next_one = state.memory("second"), state.memory("third")
    assert (again.task, again.releases, again.tensors["coso/0.weight"].shape) == ("plain", 2, (3, 3))
    assert (next_one.task, next_one.releases, next_one.tensors["coso/0.weight"].shape) == (
        "shuffled",
        2,
        (2,),
    )
    state.remember(again, "second")
    assert state.memory("third").task == "plain"
    for size in (4, 5):  # it runs again and again
        state.remember(SiteMemory({"coso/0.weight": torch.ones(size)}, "opcm", "shuffled", 3), "second")
        assert torch.equal(state.memory("second").tensors["coso/0.weight"], torch.eye(3))
        assert state.memory("third").tensors["coso/0.weight"].shape == (size,)


@pytest.mark.parametrize("method", ["remember", "keep"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_site_that_dies_before_its_result_is_kept_learns_the_same_again(tmp_path, monkeypatch, method, nth):
    training = LocalTraining.chosen(["coso"], SHORT | {"coso": {"rank": 2, "energy": 0.5}})
    benches = [Bench(tmp_path / name, teaching=Teaching(training=training)) for name in ("whole", "broken")]
    benches[0].join(11, "a", "plain", "shuffled")
    benches[0].until(lambda: len(benches[0].learned()) == 2)

    whole, calls = getattr(SiteState, method), iter(range(1, 100))

    def dies(self, *given, **named):
        if next(calls) == nth:
            raise Killed
        return whole(self, *given, **named)

    monkeypatch.setattr(SiteState, method, dies)
    benches[1].join(11, "a", "plain", "shuffled")
    with pytest.raises(Killed):
        benches[1].settle(400)
    benches[1].restart()
    benches[1].until(lambda: len(benches[1].learned()) == 2, steps=2000)
    for one, other in zip(*(map(sent_vector, b.grid.trained()[-2:]) for b in benches), strict=True):
        assert one.manifest.task == other.manifest.task
        assert all(torch.equal(one.read(n).to_dense(), other.read(n).to_dense()) for n in one.names)
    memories = [bench.state("a").memory().tensors for bench in benches]
    assert memories[0].keys() == memories[1].keys() != set()
    assert all(torch.equal(memories[0][key], memories[1][key]) for key in memories[0])


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b'{"releases": "7"}', b'{"releases": -3}'])
def test_a_site_that_lost_count_of_its_releases_sends_nothing_private_and_all_else(tmp_path, data):
    state = Bench(tmp_path).state("a")
    state.remember(SiteMemory({}, "opcm", "plain", 7))
    (state.folder / "memory.json").write_bytes(data)
    memory, vector = state.memory(), TaskVector.of({"w": torch.ones(2, 2)})
    with pytest.raises(StoreDamaged, match="epsilon cannot be told"):
        outgoing(vector, Privacy(clip=1.0, noise=1.0), Compression(), memory)
    assert outgoing(vector, None, Compression(), memory).vector is vector
    state.remember(memory)
    assert state.memory().releases is None


def test_a_new_way_of_learning_begins_with_an_empty_memory_but_counts_on(tmp_path):
    memory = SiteMemory({"coso/w": torch.eye(2), "compress/w": torch.ones(2)}, "fot", "plain", 3)
    memory.begin("fot", "plain", 2)
    assert set(memory.tensors) == {"coso/w", "compress/w"}
    memory.begin("fot", "shuffled", 1)
    assert set(memory.tensors) == {"coso/w"}
    memory.begin("pm", "shuffled", 1)
    assert (memory.tensors, memory.releases) == ({}, 3)


def test_a_version_that_is_held_is_read_as_it_was_published(tmp_path):
    bench, merged = learned_from(tmp_path, held=True)
    kept = load(bench.state("a").merged)
    assert all(torch.equal(kept.read(n).to_dense(), merged.read(n).to_dense()) for n in merged.names)


def test_a_result_from_before_the_site_asked_for_privacy_is_not_sent(tmp_path):
    bench = Bench(tmp_path, teaching=Teaching(training=LocalTraining.chosen((), SHORT)))
    bench.join(11, "a", "plain")
    bench.until(lambda: bench.grid.trained())
    first = sent_vector(bench.grid.trained()[0])
    later = Bench(tmp_path / "later", teaching=Teaching(training=LocalTraining.chosen((), SHORT)))
    privacy = Privacy(clip=0.5, noise=0.0)
    config = SiteConfig(
        "example", "a", ("plain",), rows=ROWS, device="cpu", state=bench.folder / "a", privacy=privacy
    )
    later.grid.join(11, make_client_app(config))
    later.until(later.learned)
    second = sent_vector(later.grid.trained()[0])
    assert second.norm() <= 0.5 < first.norm()


@pytest.mark.parametrize(
    "head",
    [
        torch.tensor([[1.5, -2.0, 3.0]], dtype=torch.bfloat16),
        torch.arange(6.0).reshape(2, 3).T,
        torch.tensor(2**24 + 1),
    ],
)
def test_a_private_layer_of_any_kind_is_kept(tmp_path, head):
    memory = SiteMemory(learning="opcm")
    for name in ("plain", "shuffled"):
        memory.keep_heads(name, {"head": head})
    state, context = Bench(tmp_path).state("a"), Context(0, 0, {}, RecordDict(), {})
    state.remember(memory)
    remember(memory, context)
    for found in (state.memory(), recalled(context)):
        assert torch.equal(found.heads("plain", "opcm")["head"].to(head.dtype), head)


def test_private_layers_are_those_of_one_task_and_one_way_of_learning():
    memory = SiteMemory(learning="opcm")
    memory.keep_heads("glue", {"head": torch.ones(1)})
    memory.keep_heads("glue/sst2", {"head": torch.zeros(1)})
    assert memory.heads("glue", "opcm") == {"head": torch.ones(1)}
    assert memory.heads("glue", "ties") == {}


def test_a_task_that_is_learned_from_its_first_round_again_begins_with_the_head_as_it_was_built():
    memory = SiteMemory(learning="opcm", task="plain")
    for name in TASKS[:2]:
        memory.keep_heads(name, {"head": torch.ones(1)})
    memory.begin("opcm", TASKS[0], 2)
    assert memory.heads(TASKS[0], "opcm") == {"head": torch.ones(1)}
    memory.begin("opcm", TASKS[0], 1)
    assert memory.heads(TASKS[0], "opcm") == {}
    assert memory.heads(TASKS[1], "opcm") == {"head": torch.ones(1)}
