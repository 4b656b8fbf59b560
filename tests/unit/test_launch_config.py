"""Do server.toml and client.toml say what is wrong with them, and do the examples show every key?"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from flwr.common.config import parse_config_args
from pydantic import BaseModel

from fedmerge.client.config import site_config
from fedmerge.common.errors import ConfigError, FileError
from fedmerge.common.layers import LayerKind
from fedmerge.common.privacy import Privacy
from fedmerge.deploy.launch.client import supernode
from fedmerge.deploy.launch.config import DERIVED, ClientConfig, Section, ServerConfig, read_config

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVER = '[model]\nbase = "my.models:build"\n'
CLIENT = '[site]\nname = "a"\ntask = "example"\n[server]\naddress = "127.0.0.1:1"\n'
TLS = '[tls]\nca = "ca.crt"\ncert = "s.crt"\nkey = "s.key"\ncrl = "crl.pem"\n'


def read(kind: type[Section], text: str, folder: Path) -> Section:
    path = folder / "some.toml"
    path.write_text(text)
    return read_config(kind, path)


def server(text: str, folder: Path) -> ServerConfig:
    found = read(ServerConfig, text, folder)
    assert isinstance(found, ServerConfig)
    return found


EXAMPLES = [(ServerConfig, "server.toml", SERVER), (ClientConfig, "client.toml", CLIENT)]


def keys(kind: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Section and key of everything a file may hold."""
    for section, field in kind.model_fields.items():
        for annotation in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from (
                    (section, key)
                    for key in annotation.model_fields
                    if key not in DERIVED or section != "serving"
                )


@pytest.mark.parametrize(("kind", "name", "least"), EXAMPLES)
def test_the_example_shows_every_key_and_no_other(kind: type[Section], name: str, least: str) -> None:
    shown = set()
    section = ""
    for line in (DEPLOY / name).read_text().splitlines():
        if heading := re.match(r"(?:# )?\[(\w+)\]", line):
            section = heading[1]
        elif key := re.match(r"(?:# )?(\w+) = ", line):
            shown.add((section, key[1]))
    assert shown == set(keys(kind))


@pytest.mark.parametrize(("kind", "name", "least"), EXAMPLES)
def test_the_example_holds_the_defaults(kind: type[Section], name: str, least: str, tmp_path: Path) -> None:
    example = read_config(kind, DEPLOY / name)
    required = {"model": {"base"}, "site": {"name", "task"}, "server": {"address"}}
    text = least.replace("127.0.0.1:1", "127.0.0.1:9092").replace('"a"', '"hospital-1"')
    given = tmp_path / "least.toml"
    given.write_text(text)
    bare = read_config(kind, given)
    plain = {section: set(value) for section, value in required.items()}
    left = example.model_dump(exclude=plain)
    right = bare.model_dump(exclude=plain)
    assert _without_folder(left, DEPLOY) == _without_folder(right, tmp_path)


def _without_folder(value: object, folder: Path) -> object:
    if isinstance(value, dict):
        return {key: _without_folder(item, folder) for key, item in value.items()}
    return value.relative_to(folder) if isinstance(value, Path) else value


def test_commented_sections_of_the_examples_are_right_too(tmp_path: Path) -> None:
    for kind, name, _ in EXAMPLES:
        text = re.sub(
            r"^# (\[(?:tls|privacy)\]|(?:ca|cert|key|crl|rows|num_gpus|max_staleness|clip|noise|delta) = )",
            r"\1",
            (DEPLOY / name).read_text(),
            flags=re.MULTILINE,
        )
        found = read(kind, text, tmp_path).model_dump()
        assert found["tls"]["ca"].is_relative_to(tmp_path)
        assert kind is ServerConfig or (found["privacy"]["clip"], found["privacy"]["noise"]) == (1.0, 8.0)


@pytest.mark.parametrize(
    "path", sorted(DEPLOY.glob("*/**/*.toml")), ids=lambda path: str(path.relative_to(DEPLOY))
)
def test_every_other_shipped_file_is_right(path: Path) -> None:
    kind = {"server.toml": ServerConfig, "client.toml": ClientConfig}[path.name]
    assert read_config(kind, path).tls is not None


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = server('[model]\nbase = "models/base"\n[state]\nfolder = "data"\n' + TLS, tmp_path)
    assert config.model.base == str(tmp_path / "models/base")
    assert config.state.folder == tmp_path / "data"
    assert config.flower.sites == tmp_path / "sites"
    assert config.tls is not None
    assert config.tls.key == tmp_path / "s.key"


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        ("my.models:build", "my.models:build"),
        ("my/models.py:build", "{folder}/my/models.py:build"),
        ("/abs/models.py:build", "/abs/models.py:build"),
    ],
)
def test_a_function_is_found_by_module_or_by_file(base: str, wanted: str, tmp_path: Path) -> None:
    config = server(f'[model]\nbase = "{base}"\n', tmp_path)
    assert config.model.base == wanted.format(folder=tmp_path)


def test_what_a_site_says_of_privacy_reaches_its_client_app(tmp_path: Path) -> None:
    config = read(ClientConfig, CLIENT + "[privacy]\nclip = 1\nnoise = 0.5\nfisher = 1e-7\n", tmp_path)
    assert isinstance(config, ClientConfig)
    supernode(config)
    told = parse_config_args([str(config.site.state / "node.toml")])
    found = site_config(Context(1, 1, told, RecordDict(), {}))
    assert found.privacy == Privacy(clip=1.0, noise=0.5, fisher=1e-7) == config.privacy
    run = {"privacy.clip": 9.0, "privacy.noise": 0.0, "privacy.sketch": 9.0}
    assert site_config(Context(1, 1, told, RecordDict(), run)).privacy == config.privacy


def test_a_site_that_says_nothing_of_privacy_has_none(tmp_path: Path) -> None:
    config = read(ClientConfig, CLIENT, tmp_path)
    assert isinstance(config, ClientConfig)
    supernode(config)
    told = parse_config_args([str(config.site.state / "node.toml")])
    assert site_config(Context(1, 1, told, RecordDict(), {})).privacy is None


@pytest.mark.parametrize(
    ("table", "said"),
    [("clip = 1.0", "privacy.noise"), ("clip = 0.0\nnoise = 1.0", "privacy.clip"), ("clipp = 1.0", "'clip'")],
)
def test_half_a_privacy_is_none_and_refused(table: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        read(ClientConfig, f"{CLIENT}[privacy]\n{table}\n", tmp_path)


def test_a_built_in_stream_keeps_its_name(tmp_path: Path) -> None:
    found = read(ClientConfig, CLIENT, tmp_path)
    assert isinstance(found, ClientConfig)
    assert found.site.task == "example"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (SERVER + '[flower]\nsitez = "x"\n', ["[flower]", "no such key", "'sitez'", "Did you mean 'sites'?"]),
        (SERVER + '[flwer]\nlisten = "x"\n', ["no such section", "'flwer'", "Did you mean 'flower'?"]),
        (SERVER + "[limits]\nmax_queue = 0\n", ["[limits]", "limits.max_queue", "got 0"]),
        (SERVER + '[service]\nlisten = "nowhere"\n', ["service.listen", "host:port", "'nowhere'"]),
        (SERVER + '[service]\nlisten = "127.0.0.1:65536"\n', ["service.listen", "host:port"]),
        (SERVER + "[serving]\nregistered_sites = false\n", ["registered_sites follows from [tls]"]),
        (SERVER + '[log]\nformat = "xml"\n', ["log.format", "'xml'"]),
        ("[rule]\n", ["a key is missing", "model"]),
        ('[model]\nbse = "x"\n', ["[model]", "'bse'", "Did you mean 'base'?"]),
        (SERVER + TLS.replace("crl", "clr"), ["[tls]"]),
    ],
)
def test_what_is_wrong_is_named_with_its_file(text: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        server(text, tmp_path)
    assert str(tmp_path / "some.toml") in str(refusal.value)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize("section", ["service", "flower", "metrics"])
@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "fl.example.org:1", "10.0.0.7:1"])
def test_without_tls_only_loopback_is_listened_on(section: str, address: str, tmp_path: Path) -> None:
    text = SERVER + f'[{section}]\nlisten = "{address}"\n'
    with pytest.raises(ConfigError, match=f"{section}.listen.*needs \\[tls\\]"):
        server(text, tmp_path)
    server(text + TLS, tmp_path)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_loopback_needs_no_tls(address: str, tmp_path: Path) -> None:
    config = server(SERVER + f'[service]\nlisten = "{address}"\n', tmp_path)
    assert str(config.service.listen) == address


def test_a_site_trusts_no_other_machine_without_tls(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server.address.*needs \[tls\]"):
        read(ClientConfig, CLIENT.replace("127.0.0.1:1", "fl.example.org:1"), tmp_path)


@pytest.mark.parametrize("name", ["", "../x", "-a", "a b", "a" * 65, "a\\n"])
def test_a_site_s_name_is_a_plain_word(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"site\.name"):
        read(ClientConfig, CLIENT.replace('"a"', f'"{name}"'), tmp_path)


def test_an_empty_address_is_none_and_all_vectors_can_be_kept(tmp_path: Path) -> None:
    config = server(SERVER + '[service]\nlisten = ""\n[state]\nvectors = "all"\n', tmp_path)
    assert (config.service.listen, config.state.vectors) == (None, None)


def test_kinds_are_patterns_by_kind(tmp_path: Path) -> None:
    config = server(SERVER + '[model.kinds]\nmatrix = ["*.w"]\n', tmp_path)
    assert config.model.kinds == {LayerKind.MATRIX: ("*.w",)}


@pytest.mark.parametrize("content", [None, b"[model", b"\xff\xfe"])
def test_a_file_that_is_missing_or_not_toml_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=re.escape(str(path))):
        read_config(ServerConfig, path)


def test_a_site_needs_nothing_of_the_server_s_extra() -> None:
    absent = ("ray", "prometheus_client", "grpc_health", "grpc_reflection")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        "import fedmerge.deploy.launch.cli, fedmerge.deploy.launch.client, fedmerge.deploy.doctor"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_examples_are_toml_without_machine_paths() -> None:
    for _, name, _ in EXAMPLES:
        text = (DEPLOY / name).read_text()
        tomllib.loads(text)
        assert '"/' not in text
