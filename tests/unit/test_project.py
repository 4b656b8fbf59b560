"""The promises of the project itself: its layout, its dependencies, its pages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmerge.client.tasks import StreamOptions
from fedmerge.client.training import fine_tune, score
from fedmerge.common.lookup import find_function

ROOT = Path(__file__).parents[2]
CODE = ("common", "client", "server", "protos", "deploy")


def sources() -> Iterator[Path]:
    return (path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py")))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_every_package_folder_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {"fedmerge"}
    for folder in CODE:
        for init in (ROOT / folder).rglob("__init__.py"):
            name = init.parent.relative_to(ROOT).as_posix().replace("/", ".")
            if name != "common._root":
                on_disk.add(f"fedmerge.{name}")
    assert set(settings["packages"]) == on_disk


def test_type_checkers_see_every_package() -> None:
    for folder in CODE:
        assert (ROOT / "typings" / "fedmerge" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("ray", {"server/engine/ray_engine.py"}),
        (
            "flwr",
            {
                "common/wire.py",
                "client/app.py",
                "client/config.py",
                "client/flower.py",
                "client/memory.py",
                "client/mods.py",
                "client/versions.py",
                "server/app.py",
                "server/correcting.py",
                "server/federation.py",
                "server/learning.py",
                "server/mailbox.py",
                "server/publishing.py",
                "server/roster.py",
                "server/rounds.py",
                "server/scoring.py",
                "server/serving.py",
                "server/strategy.py",
                "deploy/launch/superlink.py",
                "deploy/simulate.py",
            },
        ),
    ],
)
def test_a_framework_is_imported_only_at_the_rim(library: str, homes: set[str]) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert users == homes


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("common", {"common", "protos"}),
        ("client", {"client", "common", "protos"}),
        ("server", {"server", "common", "protos"}),
        ("protos", {"protos"}),
    ],
)
def test_dependencies_point_one_way(folder: str, allowed: set[str]) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        used = {name.split(".")[1] for name in imported(path) if name.startswith("fedmerge.")}
        assert used <= allowed, path


def test_nothing_reads_pickle() -> None:
    for path in sources():
        assert not {"pickle", "cloudpickle", "dill"} & imported(path), path
        assert not re.search(r"torch\.load\(|allow_pickle=True", path.read_text()), path


def test_a_site_needs_no_ray() -> None:
    script = (
        "import sys; sys.modules['ray'] = None\n"
        "import fedmerge.client.app, fedmerge.client.site, fedmerge.deploy.cli, fedmerge.deploy.offline"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_stream_in_the_guide_learns(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "streams.md").read_text()
    example = tmp_path / "my_tasks.py"
    example.write_text(re.findall(r"```python\n(# my_tasks.py.*?)```", page, re.DOTALL)[0])
    stream = find_function(f"{example}:stream", where="guide")(StreamOptions(seed=0))
    model, task = stream.build_model(), stream.load("task-a")
    before = score(model, task).accuracy
    fine_tune(model, task, stream.training, seed=0)
    assert score(model, task).accuracy > max(before + 0.3, 0.9)


def test_the_readme_names_only_folders_and_pages_that_exist() -> None:
    page = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(((?!https?://)[^)#]+)\)", page):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^\| `(\w+)/`", page, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


@pytest.mark.parametrize(
    ("library", "arguments", "extra"),
    [
        ("matplotlib", ["simulate", "--stream", "example"], "fedmerge[sim]"),
        ("ray", ["merge", "--base", "b", "--out", "o.safetensors", "--actors", "1", "x"], "fedmerge[server]"),
    ],
)
def test_a_missing_extra_is_one_line_and_exit_code_2(
    library: str, arguments: list[str], extra: str, tmp_path: Path
) -> None:
    for name in ("b", "x"):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.ones(2, 2)}, tmp_path / name / "model.safetensors")
    script = (
        f"import sys; sys.modules[{library!r}] = None; sys.argv = ['fedmerge', *{arguments!r}]\n"
        "from fedmerge.deploy.cli import main; main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert run.returncode == 2
    assert extra in run.stderr
    assert "Traceback" not in run.stderr
