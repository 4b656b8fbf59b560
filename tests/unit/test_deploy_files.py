"""Do the files for containers, Kubernetes and systemd, and the operator's guide, fit the software?"""

from __future__ import annotations

import re
import shlex
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
import yaml

from fedmerge import __version__
from fedmerge.common.base import Base
from fedmerge.common.records import Status
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import save
from fedmerge.deploy.cli import app
from fedmerge.deploy.launch.config import ClientConfig, ServerConfig, read_config
from fedmerge.deploy.launch.explain import CAUSES
from fedmerge.deploy.launch.server import SOCKET
from fedmerge.server.aggregator import Aggregator
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import make_rule
from fedmerge.server.metrics import Metrics
from fedmerge.server.service.access import Role
from fedmerge.server.service.servicer import ROLES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
GUIDE = (ROOT / "docs" / "operating.md").read_text()
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
KUBERNETES = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
YAML = [DEPLOY / "compose.yaml", *KUBERNETES]
SERVER_SETTINGS = [DEPLOY / "docker" / "server.toml", DEPLOY / "kubernetes" / "server.toml"]
SITE_SETTINGS = [DEPLOY / "docker" / "client.toml", DEPLOY / "kubernetes" / "site" / "client.toml"]

USER = 10001
BUILT = ("fedmerge-server", "fedmerge-client")


@cache
def documents() -> list[dict[str, Any]]:
    """Every Kubernetes object."""
    return [found for path in KUBERNETES for found in yaml.safe_load_all(path.read_text())]


def objects(kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in documents() if each["kind"] == kind}


def pods() -> dict[str, dict[str, Any]]:
    """Every pod template by a name for it."""
    found = {name: each["spec"]["template"] for name, each in objects("Deployment").items()}
    ray = objects("RayCluster")["fedmerge"]["spec"]
    groups = {"ray head": ray["headGroupSpec"], "ray workers": ray["workerGroupSpecs"][0]}
    return found | {name: group["template"] for name, group in groups.items()}


def containers(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = pod["spec"]
    return {each["name"]: each for each in [*spec.get("initContainers", []), *spec["containers"]]}


def services() -> dict[str, dict[str, Any]]:
    """Compose's services."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return found


def stages() -> dict[str, list[list[str]]]:
    """The Dockerfile's instructions by stage, with those a stage inherits from an earlier one."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    found: dict[str, list[list[str]]] = {}
    current: list[list[str]] = []
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            source, _, name = rest.split()
            current = found[name] = [*found.get(source, []), [word, source]]
        elif word:
            current.append([word, rest.strip()])
    return found


def instruction(stage: str, word: str) -> str:
    """The last one, which is the one that counts."""
    return [rest for name, rest in stages()[stage] if name == word][-1]


def server_settings() -> list[ServerConfig]:
    return [read_config(ServerConfig, path) for path in SERVER_SETTINGS]


def values(node: object) -> Iterator[object]:
    """Every scalar of a document."""
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from values(child)
    else:
        yield node


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The rows of the first table after a heading of the guide, without its own heading."""
    rows = re.findall(r"^\|(.*)\|$", GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0], re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    end = next((n for n, row in enumerate(cells[2:], 2) if set("".join(row)) <= {"-"}), len(cells) + 1)
    return cells[2 : end - 1]


# Settings


@pytest.mark.parametrize("path", SERVER_SETTINGS, ids=lambda p: p.parent.name)
def test_settings_of_a_server_are_valid(path: Path) -> None:
    config = read_config(ServerConfig, path)
    assert config.tls is not None
    assert config.flower.enabled


@pytest.mark.parametrize("path", SITE_SETTINGS, ids=lambda p: p.parent.name)
def test_settings_of_a_site_are_valid(path: Path) -> None:
    assert read_config(ClientConfig, path).tls is not None


def test_settings_in_the_guide_are_valid(tmp_path: Path) -> None:
    kinds: dict[str, type[ServerConfig] | type[ClientConfig]] = {"model": ServerConfig, "site": ClientConfig}
    shown = {next(iter(tomllib.loads(block))): block for block in code_blocks("toml")}
    assert shown.keys() == kinds.keys()
    for section, kind in kinds.items():
        path = tmp_path / f"{section}.toml"
        path.write_text(shown[section])
        read_config(kind, path)


# Commands


def commands_of_the_files() -> Iterator[tuple[str, list[str]]]:
    """Where a ``fedmerge`` command stands, and its arguments."""
    entry = ["tini", "--", "fedmerge"]
    assert yaml.safe_load(instruction("base", "ENTRYPOINT")) == entry
    for stage in ("server", "client"):
        yield f"CMD of {stage}", yaml.safe_load(instruction(stage, "CMD"))
    yield "HEALTHCHECK", yaml.safe_load(instruction("server", "HEALTHCHECK").split(" CMD ")[1])[1:]
    yield "compose", services()["server"]["healthcheck"]["test"][2:]
    for pod in pods().values():
        for name, container in containers(pod).items():
            probes = [
                v["exec"]["command"] for k, v in container.items() if k.endswith("Probe") and "exec" in v
            ]
            for command in [*probes, ["fedmerge", *container.get("args", [])]]:
                if command[0] == "fedmerge" and len(command) > 1:
                    yield name, command[1:]
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        start = re.search(r"^ExecStart=\S*/fedmerge (.*)$", unit.read_text(), re.MULTILINE)
        assert start, unit
        yield unit.name, shlex.split(start[1])


def commands_of_the_guide() -> Iterator[tuple[str, list[str]]]:
    for line in "\n".join(code_blocks("bash")).replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["fedmerge"] or ("fedmerge" in words and "exec" in words):
            yield line, words[len(words) - words[::-1].index("fedmerge") :]
    for words in re.findall(r"`fedmerge ([a-z][^`]*)`", GUIDE):
        yield words, shlex.split(words.replace("CODE", "305"))


def resolve(arguments: list[str]) -> None:
    """Parses a command line as the command would, without running it. Raises click.UsageError."""
    command, name = typer.main.get_command(app), "fedmerge"
    while hasattr(command, "commands"):
        if not arguments:
            return
        name, *arguments = arguments
        if name not in command.commands:
            raise click.UsageError(f"no command {name!r}")
        command = command.commands[name]
    if arguments:
        command.make_context(name, list(arguments))


def test_every_command_in_a_file_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMERGE_SERVER", "unix:/socket")
    found = list(commands_of_the_files())
    assert len(found) > 10
    for where, arguments in found:
        try:
            resolve(arguments)
        except click.UsageError as error:
            pytest.fail(f"{where}: fedmerge {shlex.join(arguments)}: {error.format_message()}")


def test_every_command_in_the_guide_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMERGE_SERVER", "unix:/socket")
    named_in_passing = {"doctor client": ["--config", "client.toml"], "client": []}
    for where, arguments in commands_of_the_guide():
        try:
            resolve(arguments + named_in_passing.get(shlex.join(arguments), []))
        except click.MissingParameter:
            assert f"`fedmerge {where}`" in GUIDE, where  # named, not shown
        except click.UsageError as error:
            pytest.fail(f"{where}: {error.format_message()}")


def test_every_file_that_the_guide_names_exists() -> None:
    for name in re.findall(r"\b(?:deploy|docs)/[\w./-]+\w", GUIDE):
        if not name.startswith("deploy/fedmerge-"):  # a Kubernetes object
            assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(#([\w-]+)\)", GUIDE):
        heading = name.replace("-", "[ -]")
        assert re.search(rf"^## {heading}$", GUIDE, re.MULTILINE | re.IGNORECASE), name


def test_ray_knows_every_flag_it_is_started_with() -> None:
    ray = Path(sysconfig.get_path("scripts")) / "ray"
    told = subprocess.run([ray, "start", "--help"], capture_output=True, text=True, check=True, timeout=120)
    known = set(re.findall(r"--[a-z-]+", told.stdout))
    cluster = objects("RayCluster")["fedmerge"]["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    used = {f"--{flag}" for group in groups for flag in group["rayStartParams"]}
    sidecar = containers(pods()["fedmerge-server"])["ray"]["command"]
    assert sidecar[:4] == ["tini", "--", "ray", "start"]
    used |= {word.partition("=")[0] for word in sidecar[4:]}
    assert used <= known


# Images


def test_every_image_has_a_fixed_tag_and_ours_the_version() -> None:
    images = [service["image"] for service in services().values()]
    images += [each["image"] for pod in pods().values() for each in containers(pod).values()]
    assert {image.split(":")[0] for image in images} == set(BUILT)
    assert {image.split(":")[1] for image in images} == {__version__}
    (python,) = re.findall(r"^ARG PYTHON=(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert re.fullmatch(r"3\.\d+-slim-\w+", python)
    sources = {source for stage in stages().values() for word, source in stage if word == "FROM"}
    assert sources <= {"python:${PYTHON}", *stages()}
    kustomized = [entry for each in documents() for entry in each.get("images", [])]
    assert {entry["name"] for entry in kustomized} == set(BUILT)
    assert {entry["newTag"] for entry in kustomized} == {__version__}
    for name, tag in re.findall(r"(fedmerge-(?:server|client)):(\S+?)[\s`]", GUIDE + DOCKERFILE.read_text()):
        assert tag == __version__, name


def test_compose_builds_the_images_it_runs() -> None:
    for service in services().values():
        build = service["build"]
        assert (DEPLOY / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).resolve() == DOCKERFILE
        assert service["image"].startswith(f"fedmerge-{build['target']}:")
        assert build["target"] in stages()


def test_an_image_installs_the_versions_that_were_tested() -> None:
    for stage, extra in (("server", "fedmerge[server]"), ("client", "fedmerge[client]")):
        installs = " ".join(rest for word, rest in stages()[stage] if word == "RUN")
        assert extra in installs
        assert "--constraint /usr/local/share/fedmerge/constraints.txt" in installs
    assert "torch==" in (ROOT / "constraints.txt").read_text()
    ray = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ray
    assert objects("RayCluster")["fedmerge"]["spec"]["rayVersion"] == ray[1]


def test_an_image_is_built_from_code_alone() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line[0] == "!"}
    assert let_in <= {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"} | {
        "client", "common", "deploy", "protos", "server",
    }  # fmt: skip
    assert {"**/*.key", "**/*.pem", "**/*.crt"} <= set(lines)
    copied = [rest for stage in stages().values() for word, rest in stage if word in ("COPY", "ADD")]
    assert set(copied) == {". .", "constraints.txt /usr/local/share/fedmerge/"}


# Confinement


def test_nothing_in_compose_has_more_rights_than_it_needs() -> None:
    for service in services().values():
        assert service["user"] == f"{USER}:{USER}"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & service.keys()
        assert all(
            mount.endswith(":ro")
            for mount in service["volumes"]
            if not mount.startswith(("server-", "site-"))
        )


def test_nothing_on_kubernetes_has_more_rights_than_it_needs() -> None:
    for pod in pods().values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        confined = spec["securityContext"]
        assert confined["runAsNonRoot"] is True
        assert confined["runAsUser"] == confined["runAsGroup"] == confined["fsGroup"] == USER
        assert confined["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all("hostPath" not in volume for volume in spec["volumes"])
        for container in containers(pod).values():
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    for namespace in objects("Namespace").values():
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("stage", ["server", "client"])
def test_an_image_runs_as_a_user_without_rights(stage: str) -> None:
    assert instruction(stage, "USER") == f"{USER}:{USER}"
    assert instruction(stage, "STOPSIGNAL") == "SIGTERM"
    words = [word for word, _ in stages()[stage]]
    assert words[words.index("USER") :].count("RUN") == 0


def test_everything_is_probed_and_bounded() -> None:
    for pod in pods().values():
        for container in containers(pod).values():
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), container["name"]
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), container["name"]
        for container in pod["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys(), container["name"]
    for service in services().values():
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}
        assert service["healthcheck"]["test"][0] == "CMD"
    assert all(instruction(stage, "HEALTHCHECK") for stage in ("server", "client"))


def test_a_server_may_take_longer_to_stop_than_its_calls() -> None:
    grace = pods()["fedmerge-server"]["spec"]["terminationGracePeriodSeconds"]
    assert services()["server"]["stop_grace_period"] == f"{grace // 60}m"
    for config in server_settings():
        assert grace > 2 * config.service.stop_seconds


# Ports


def test_only_grpc_and_the_fleet_proxy_are_published() -> None:
    for config in server_settings():
        assert config.service.listen is not None
        assert config.metrics.listen is not None
        published = {config.service.listen.port, config.flower.listen.port}
        assert {int(port) for port in instruction("server", "EXPOSE").split()} == published
        mapped = [tuple(map(int, port.split(":"))) for port in services()["server"]["ports"]]
        assert {outside for outside, _ in mapped} == {inside for _, inside in mapped} == published
        ports = containers(pods()["fedmerge-server"])["server"]["ports"]
        named = {port["name"]: port["containerPort"] for port in ports}
        assert set(named.values()) == published | {config.metrics.listen.port}
        reachable = [s for s in objects("Service").values() if s["spec"].get("clusterIP") != "None"]
        served = [port for service in reachable for port in service["spec"]["ports"]]
        assert (
            {port["port"] for port in served} == {named[port["targetPort"]] for port in served} == published
        )
        (metrics,) = (s for s in objects("Service").values() if s["spec"].get("clusterIP") == "None")
        assert [port["port"] for port in metrics["spec"]["ports"]] == [config.metrics.listen.port]
        anybody = [
            port["port"]
            for rule in objects("NetworkPolicy")["fedmerge-server"]["spec"]["ingress"]
            if "from" not in rule
            for port in rule["ports"]
        ]
        assert set(anybody) == published
    assert not services()["site"].get("ports")


def test_no_file_opens_the_superlink() -> None:
    hidden = {config.flower.superlink_port for config in server_settings()}
    for path in YAML:
        for value in values(list(yaml.safe_load_all(path.read_text()))):
            assert not any(re.search(rf"\b{port}\b", str(value)) for port in hidden), path
    for policy in objects("NetworkPolicy").values():
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                allowed = range(port["port"], port.get("endPort", port["port"]) + 1)
                assert not hidden & set(allowed)


def test_a_site_is_probed_at_its_own_port_and_calls_the_fleet_proxy() -> None:
    fleet = {config.flower.listen.port for config in server_settings()}
    for path in SITE_SETTINGS:
        config = read_config(ClientConfig, path)
        assert {config.server.address.port} == fleet
        site = containers(pods()["fedmerge-site"])["site"]
        probes = [
            instruction("client", "HEALTHCHECK"),
            services()["site"]["healthcheck"]["test"][-1],
            *(site[f"{kind}Probe"]["exec"]["command"][-1] for kind in ("startup", "readiness", "liveness")),
        ]
        assert all(f"('127.0.0.1', {config.server.port})" in probe for probe in probes)
    egress = objects("NetworkPolicy")["fedmerge-site"]["spec"]["egress"]
    assert {port["port"] for rule in egress if "to" not in rule for port in rule["ports"]} == fleet


def test_networks_are_closed_by_default() -> None:
    policies = [each for each in documents() if each["kind"] == "NetworkPolicy"]
    closed = [each for each in policies if each["metadata"]["name"] == "default-deny"]
    assert len(closed) == len(objects("Namespace"))
    for policy in closed:
        assert policy["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    labels = [pod["metadata"]["labels"] for pod in pods().values()]
    for policy in policies:
        wanted = policy["spec"]["podSelector"].get("matchLabels", {})
        assert any(wanted.items() <= each.items() for each in labels), policy["metadata"]["name"]
    for each in [*objects("Service").values(), *objects("Deployment").values()]:
        selector = each["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        assert any(wanted.items() <= found.items() for found in labels), each["metadata"]["name"]


# Files and folders


def mounted(container: dict[str, Any], path: Path) -> str:
    """The volume that a path lies in."""
    found = [m for m in container["volumeMounts"] if path.is_relative_to(m["mountPath"])]
    assert found, path
    return str(max(found, key=lambda mount: len(mount["mountPath"]))["name"])


def test_state_is_in_a_volume_and_commands_find_its_socket() -> None:
    environment = dict(line.split("=", 1) for line in [instruction("server", "ENV")])
    pod = pods()["fedmerge-server"]
    claims = {v["name"] for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v}
    (volume,) = (v for v in services()["server"]["volumes"] if v.startswith("server-state:"))
    for config in server_settings():
        assert environment["FEDMERGE_SERVER"] == f"unix:{config.state.folder / SOCKET}"
        assert mounted(containers(pod)["server"], config.state.folder) in claims
        assert config.state.folder.parent == Path(volume.split(":")[1])  # the server makes the folder itself
    shown = tomllib.loads(next(block for block in code_blocks("toml") if "[state]" in block))
    unit = (DEPLOY / "systemd" / "fedmerge-server.service").read_text()
    (folder,) = re.findall(r"^StateDirectory=(.*)$", unit, re.MULTILINE)
    assert Path(shown["state"]["folder"]).is_relative_to(Path("/var/lib") / folder)


def test_a_state_folder_has_one_server() -> None:
    for name in ("fedmerge-server", "fedmerge-site"):
        spec = objects("Deployment")[name]["spec"]
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    for claim in objects("PersistentVolumeClaim").values():
        assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]


@pytest.mark.parametrize(
    ("deployment", "container", "settings", "kind"),
    [
        ("fedmerge-server", "server", SERVER_SETTINGS[1], ServerConfig),
        ("fedmerge-site", "site", SITE_SETTINGS[1], ClientConfig),
    ],
)
def test_keys_on_kubernetes_are_copied_to_where_the_settings_want_them(
    deployment: str, container: str, settings: Path, kind: type[ServerConfig] | type[ClientConfig]
) -> None:
    tls = read_config(kind, settings).tls
    assert tls is not None
    pod = pods()[deployment]
    wanted = {getattr(tls, field) for field in tls.model_fields_set - {"crl"}}
    keys = containers(pod)["keys"]
    command = keys["command"]
    assert command[:3] == ["install", "-m", "0400"]
    target = Path(command[command.index("-t") + 1])
    assert {target / Path(source).name for source in command[5:]} == wanted
    assert mounted(keys, target) == mounted(containers(pod)[container], target)
    secret = next(v["secret"] for v in pod["spec"]["volumes"] if v["name"] == "secret")
    created = re.search(rf"secret generic {secret['secretName']}((?:.|\\\n)*?)\n(?! )", GUIDE)
    assert created
    assert {Path(f).name for f in re.findall(r"--from-file=(\S+)", created[1])} == {p.name for p in wanted}


def test_the_guide_makes_every_secret_and_folder_that_kubernetes_mounts() -> None:
    generated = {entry["name"] for each in documents() for entry in each.get("configMapGenerator", [])}
    for pod in pods().values():
        for volume in pod["spec"]["volumes"]:
            if "secret" in volume:
                assert f"secret generic {volume['secret']['secretName']} " in GUIDE
            elif "configMap" in volume and volume["configMap"]["name"] not in generated:
                assert f"configmap {volume['configMap']['name']} " in GUIDE
    for path in (DEPLOY / "kubernetes").rglob("kustomization.yaml"):
        settings = yaml.safe_load(path.read_text())
        files = [f for entry in settings.get("configMapGenerator", []) for f in entry["files"]]
        assert all((path.parent / name).is_file() for name in [*settings["resources"], *files])
    assert "Secret" not in {each["kind"] for each in documents()}


# Ray


def test_the_ray_cluster_wants_a_token_and_has_the_servers_image() -> None:
    server = pods()["fedmerge-server"]
    members = [
        *pods()["ray head"]["spec"]["containers"],
        *pods()["ray workers"]["spec"]["containers"],
        containers(server)["ray"],
        containers(server)["server"],
    ]
    assert len({member["image"] for member in members}) == 1
    for member in members:
        environment = {entry["name"]: entry["value"] for entry in member["env"]}
        assert environment["RAY_AUTH_MODE"] == "token"
        assert mounted(member, Path(environment["RAY_AUTH_TOKEN_PATH"])) == "ray-token"
    head = objects("RayCluster")["fedmerge"]["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["include-dashboard"] == "false"
    assert head["serviceType"] == "ClusterIP"


def test_the_servers_pod_is_a_node_of_the_ray_cluster() -> None:
    (config,) = (found for found in server_settings() if found.engine.ray_address)
    address = config.engine.ray_address
    (name,) = objects("RayCluster")
    assert address == f"{name}-head-svc:6379"
    pod = pods()["fedmerge-server"]
    node, server = containers(pod)["ray"], containers(pod)["server"]
    assert node["restartPolicy"] == "Always"
    assert f"--address={address}" in node["command"]
    assert pod["spec"]["shareProcessNamespace"] is True
    for path in ("/tmp", "/dev/shm"):
        assert mounted(node, Path(path)) == mounted(server, Path(path))


def test_the_ray_cluster_has_room_for_the_actors() -> None:
    (config,) = (found for found in server_settings() if found.engine.ray_address)
    workers = objects("RayCluster")["fedmerge"]["spec"]["workerGroupSpecs"][0]
    cpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert config.engine.threads <= cpus
    assert config.engine.actors <= workers["replicas"] * (cpus // config.engine.threads)


def test_the_network_lets_ray_reach_the_servers_node() -> None:
    command = containers(pods()["fedmerge-server"])["ray"]["command"]
    flags = dict(word.split("=") for word in command if "=" in word)
    ingress = objects("NetworkPolicy")["fedmerge-server"]["spec"]["ingress"]
    (ray,) = (rule["ports"] for rule in ingress if "podSelector" in rule.get("from", [{}])[0])
    open_ports = {n for port in ray for n in range(port["port"], port["endPort"] + 1)}
    low, high = int(flags["--min-worker-port"]), int(flags["--max-worker-port"])
    assert open_ports == {
        int(flags["--node-manager-port"]), int(flags["--object-manager-port"]), *range(low, high + 1)
    }  # fmt: skip


# The guide


def metric_names() -> set[str]:
    """Every metric of a server, as Prometheus shows it, without the parts of histograms."""
    metrics = Metrics()
    metrics.follow(lambda: Status("", "", "", {}, 0, (), 0, 0, 0), ROOT)
    found = {family.name: family.type for family in metrics.registry.collect()}
    return {f"{name}_total" if kind == "counter" else name for name, kind in found.items()}


def test_every_metric_that_is_named_exists_and_every_one_is_explained() -> None:
    alerts = (DEPLOY / "kubernetes" / "monitoring" / "monitoring.yaml").read_text()
    expressions = " ".join(re.findall(r"expr: (.*)", alerts))
    known = {name for name in metric_names() if name.startswith("fedmerge_")}
    assert set(re.findall(r"fedmerge_\w+", expressions)) <= known
    assert set(re.findall(r"`(fedmerge_\w+)", GUIDE)) == known


def test_the_table_of_roles_is_the_servers() -> None:
    shown = {row[0]: row[1:4] for row in table("Roles")}
    assert shown.keys() == ROLES.keys()
    for method, cells in shown.items():
        allowed = {
            role for role, cell in zip((Role.SITE, Role.ADMIN, Role.GATEWAY), cells, strict=True) if cell
        }
        assert allowed == set(ROLES[method]), method


def test_every_exit_code_that_is_known_is_in_the_table() -> None:
    assert {int(row[0]) for row in table("Trouble")} == {cause.code for cause in CAUSES} - {0}


def test_the_table_of_ports_is_that_of_the_settings() -> None:
    site = read_config(ClientConfig, SITE_SETTINGS[0])
    for config in server_settings():
        assert config.service.listen is not None
        assert config.metrics.listen is not None
        wanted = [
            config.service.listen.port,
            config.flower.listen.port,
            config.flower.superlink_port,
            site.server.port,
            config.metrics.listen.port,
        ]
        assert [row[0] for row in table("Ports")[:5]] == [str(port) for port in wanted]


def test_a_backup_made_as_the_guide_says_while_a_server_runs_can_be_restored(tmp_path: Path) -> None:
    blocks = dict(re.findall(r"<!-- (backup|restore) -->\n```bash\n(.*?)```", GUIDE, re.DOTALL))
    backup = tmp_path / "backup"

    def run(block: str, state: Path) -> None:
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "STATE": str(state), "BACKUP": str(backup)}
        subprocess.run(["bash", "-euc", blocks[block]], env=environment, check=True, timeout=60)

    with serving(tmp_path / "state") as server:
        for seed in range(3):
            server.submit(vector_file(tmp_path, seed), site="hospital-1")
        assert server.wait_until_merged(timeout=60)
        run("backup", tmp_path / "state")
        server.submit(vector_file(tmp_path, 3), site="hospital-1")
        assert server.wait_until_merged(timeout=60)
        saved, later = server.version(3), server.version()
    assert later.number == 4
    run("restore", tmp_path / "restored")
    assert (tmp_path / "restored").stat().st_mode & 0o777 == 0o700
    with serving(tmp_path / "restored") as restored:
        assert restored.version() == saved
        assert restored.status().failing == ""
        restored.submit(vector_file(tmp_path, 3), site="hospital-1")
        assert restored.wait_until_merged(timeout=60)
        assert restored.version().sha256 == later.sha256


BASE = Base.from_checkpoint({"a.weight": torch.ones(6, 5), "b.weight": torch.ones(4, 6)})


def serving(folder: Path) -> Aggregator:
    rule = make_rule("opcm", {})
    return Aggregator(folder, BASE, rule, lambda: LocalEngine(rule, BASE.layers.values(), workers=1))


def vector_file(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    layers = {name: 0.05 * torch.randn(spec.shape, generator=generator) for name, spec in BASE.layers.items()}
    path = folder / f"vector-{seed}.safetensors"
    save(
        TaskVector.of(layers, manifest=Manifest(BASE.fingerprint, 0, f"task-{seed}", "x", examples=10)), path
    )
    return path
