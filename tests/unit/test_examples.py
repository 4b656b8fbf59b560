"""Do the examples of a site's own tasks run as they are: greeted, trained, scored, merged?"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from local_grid import LocalGrid, federate, sent_vector, site

from fedmerge.client.site import Site, open_site
from fedmerge.client.tasks import StreamOptions
from fedmerge.common.base import Base
from fedmerge.common.taskvector import LowRank
from fedmerge.common.training import LocalTraining
from fedmerge.deploy.launch.config import ClientConfig
from fedmerge.deploy.rehearsal import rehearse

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def opened(path: Path) -> Site:
    return open_site(f"{path}:stream", StreamOptions(seed=0))


@each_example
def test_an_example_is_ready_to_take_part(path: Path) -> None:
    config = ClientConfig(
        site={"name": "a", "task": f"{path}:stream", "device": "cpu"}, server={"address": "127.0.0.1:1"}
    )
    found = list(rehearse(opened(path), config))
    assert len(found) == 4 * len(opened(path).stream.tasks)
    assert [str(check) for check in found if check.verdict != "ok"] == []


@each_example
def test_an_example_learns_its_first_task(path: Path) -> None:
    at = opened(path)
    task = at.task(at.stream.tasks[0], 0, 1, "iid", 0)
    at.reset()
    before = at.score([task], device="cpu")[task.name].accuracy
    vector, _ = at.learn(task, seed=0, site="a", device="cpu")
    assert at.score([task], device="cpu")[task.name].accuracy > max(0.75, before + 0.2)
    assert torch.isfinite(torch.tensor(vector.norm()))


@each_example
def test_sites_may_share_an_example_s_task_by_label(path: Path) -> None:
    at = opened(path)
    parts = [at.task(at.stream.tasks[0], part, 2, "shards:1", 0) for part in (0, 1)]
    assert all(part.labels is not None and len(part.labels) == len(part.train) for part in parts)
    assert set(parts[0].labels or ()) != set(parts[1].labels or ())


@each_example
def test_an_example_s_base_is_the_same_at_every_call(path: Path) -> None:
    stream = opened(path).stream
    assert Base.from_model(stream.build_model(), stream.private).fingerprint == opened(path).base.fingerprint


@each_example
def test_a_server_greets_and_merges_an_example(path: Path) -> None:
    at, spec = opened(path), f"{path}:stream"
    at.reset()
    grid = LocalGrid({11: site("a", stream=spec), 12: site("b", stream=spec)})
    run = federate(grid, base=at.base, training=LocalTraining(loop={"steps": 1}), evaluate=False)
    assert [one.task for one in run.merged] == list(at.stream.tasks)


def test_the_text_example_leaves_its_embeddings_frozen_under_the_trainer() -> None:
    at = opened(DOCS / "examples" / "text_classifier.py")
    vector, _ = at.learn(
        at.task("support", 0, 1, "iid", 0),
        seed=0,
        site="a",
        device="cpu",
        training=LocalTraining(loop={"steps": 1}),
    )
    assert vector.unchanged == tuple(n for n in at.base.merged_layers if n.startswith("bert.embeddings."))
    assert "classifier.weight" in vector.names


def test_the_image_example_sends_factors_under_lora() -> None:
    at = opened(DOCS / "examples" / "images.py")
    asked = LocalTraining(lora={"rank": 2}, loop={"steps": 1})
    vector, _ = at.learn(at.task("ward", 0, 1, "iid", 0), seed=0, site="a", device="cpu", training=asked)
    assert len(vector.names) > 10
    assert all(isinstance(vector.read(name), LowRank) for name in vector.names)


def test_the_table_s_means_stay_at_their_site_and_do_not_make_the_base_another(tmp_path: Path) -> None:
    here = opened(DOCS / "examples" / "tabular.py")
    text = (DOCS / "examples" / "patients.csv").read_text().splitlines()
    (tmp_path / "patients.csv").write_text("\n".join([text[0], *text[50:]]))
    elsewhere = tmp_path / "tabular.py"
    elsewhere.write_text((DOCS / "examples" / "tabular.py").read_text())
    there = Site(
        stream := opened(elsewhere).stream,
        model := stream.build_model(),
        Base.from_model(model, stream.private),
    )
    assert there.base.fingerprint == here.base.fingerprint
    assert not torch.equal(there.model.scale.mean, here.model.scale.mean)
    grid = LocalGrid({11: site("a", "returned", stream=f"{elsewhere}:stream")})
    federate(grid, base=here.base, training=LocalTraining(loop={"steps": 1}))
    sent = sent_vector(grid.trained()[0])
    assert not any(name.startswith("scale.") for name in (*sent.names, *sent.unchanged))


def test_the_page_names_every_example_and_nothing_else() -> None:
    page = (DOCS / "tasks.md").read_text()
    assert set(re.findall(r"\]\(examples/([\w.]+)\)", page)) == {path.name for path in EXAMPLES}


@each_example
def test_the_commands_in_an_example_name_the_example(path: Path) -> None:
    (command,) = re.findall(r"^    (fedmerge simulate .*)$", path.read_text(), re.MULTILINE)
    stream = shlex.split(command)[3]
    assert stream == f"docs/examples/{path.name}:stream"


def test_the_flower_app_on_the_page_is_adapted_by_the_lines_it_shows(tmp_path: Path, monkeypatch) -> None:
    (code,) = re.findall(r"```python\n(# my_tasks\.py.*?)```", (DOCS / "tasks.md").read_text(), re.DOTALL)
    (tmp_path / "my_app").mkdir()
    (tmp_path / "my_app" / "client_app.py").write_text(
        "from flwr.app import ArrayRecord, Message, RecordDict\n"
        "def app(message, context):\n"
        "    epochs = context.run_config['local-epochs']\n"
        "    weights = message.content['arrays'].to_torch_state_dict()\n"
        "    trained = ArrayRecord({name: tensor + epochs for name, tensor in weights.items()})\n"
        "    return Message(RecordDict({'arrays': trained}), reply_to=message)\n"
    )
    (tmp_path / "my_app" / "task.py").write_text(
        "from fedmerge.deploy.streams.example import build_model as Net, load_task, loss, metric\n"
        "def load_data():\n"
        "    task = load_task('plain', 0, 64)\n"
        "    return task.train, task.test\n"
    )
    (tmp_path / "my_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    at = opened(tmp_path / "my_tasks.py")
    vector, _ = at.learn(at.task("chest-xray", 0, 1, "iid", 0), seed=0, site="a", device="cpu")
    torch.testing.assert_close(vector.read("0.bias").to_dense(), torch.ones(48))
