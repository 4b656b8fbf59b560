"""Do the numbers at /metrics say what happened, with labels that nobody outside can multiply?"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from fedmerge.common.errors import ConfigError, FedmergeError, NonFinite, StoreDamaged
from fedmerge.common.records import Status
from fedmerge.common.tls import is_loopback
from fedmerge.deploy.authority import Authority, tls_files
from fedmerge.server.metrics import REASONS, Metrics

STATUS = Status(
    fedmerge="0",
    base="b",
    rule="opcm",
    options={},
    version=7,
    tasks=("a", "b"),
    staged=3,
    held=1,
    merged=5,
    disk=4096,
    started=100.0,
)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"fedmerge_{name}", labels)


def test_submissions_are_counted_by_outcome_and_reason() -> None:
    metrics = Metrics()
    metrics.acknowledged()
    metrics.acknowledged(again=True)
    metrics.acknowledged(held=True)
    metrics.refused(NonFinite("NaN", where="site-1"))
    metrics.refused(NonFinite("NaN", where="site-2"))
    metrics.failed()
    metrics.merged(0.3)
    wanted = {"acknowledged": 1, "again": 1, "held": 1, "refused": 2, "failed": 1, "merged": 1}
    assert {outcome: value(metrics, "updates_total", outcome=outcome) for outcome in wanted} == wanted
    assert value(metrics, "refusals_total", reason="NonFinite") == 2
    assert value(metrics, "merge_seconds_sum") == pytest.approx(0.3)


def test_a_reason_can_only_be_one_of_the_error_classes() -> None:
    class Made(FedmergeError):
        pass

    metrics = Metrics()
    for _ in range(100):
        metrics.refused(Made("x"))
    assert value(metrics, "refusals_total", reason="other") == 100
    assert {"NonFinite", "Busy", "TooLarge"} <= REASONS


def test_bytes_and_steps_add_up() -> None:
    metrics = Metrics()
    metrics.received(10)
    metrics.received(5)
    metrics.sent(7)
    metrics.took("commit", 0.2)
    metrics.took("commit", 0.4)
    assert value(metrics, "bytes_total", direction="in") == 15
    assert value(metrics, "bytes_total", direction="out") == 7
    assert value(metrics, "step_seconds_count", step="commit") == 2
    assert value(metrics, "step_seconds_sum", step="commit") == pytest.approx(0.6)


def test_an_upload_and_a_watcher_count_while_they_last_even_if_they_fail() -> None:
    metrics = Metrics()
    with suppress(ConnectionError), metrics.upload(), metrics.watcher():
        assert (value(metrics, "uploads_active"), value(metrics, "watchers")) == (1, 1)
        raise ConnectionError
    assert (value(metrics, "uploads_active"), value(metrics, "watchers")) == (0, 0)


def test_the_status_is_read_at_every_scrape(tmp_path: Path) -> None:
    metrics = Metrics()
    statuses = [STATUS, Status(**{**vars(STATUS), "version": 8, "failing": "disk full"})]
    metrics.follow(lambda: statuses[0], tmp_path)
    assert (value(metrics, "version"), value(metrics, "queue"), value(metrics, "held")) == (7, 3, 1)
    assert (value(metrics, "tasks"), value(metrics, "state_bytes"), value(metrics, "failing")) == (2, 4096, 0)
    assert (value(metrics, "state_free_bytes") or 0) > 0
    del statuses[0]
    assert (value(metrics, "version"), value(metrics, "failing")) == (8, 1)


def test_a_server_that_cannot_answer_is_down_and_still_scraped(tmp_path: Path) -> None:
    def broken() -> Status:
        raise StoreDamaged("the ledger cannot be read")

    metrics = Metrics()
    metrics.follow(broken, tmp_path)
    assert value(metrics, "up") == 0
    assert value(metrics, "version") is None


def test_the_endpoint_answers_while_open_and_frees_its_port(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.follow(lambda: STATUS, tmp_path)
    metrics.sites_connected(4)
    with metrics.serve("127.0.0.1", 0) as port:
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)
        page = answer.read().decode()
        answer.close()
    assert re.search(r"^fedmerge_version 7\.0$", page, re.MULTILINE)
    assert re.search(r"^fedmerge_sites_connected 4\.0$", page, re.MULTILINE)
    assert "process_resident_memory_bytes" in page
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_taken_port_is_a_typed_error_that_names_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"), Metrics().serve("127.0.0.1", port):
            pass


def test_an_address_that_others_can_reach_needs_tls() -> None:
    with pytest.raises(ConfigError, match="needs TLS"), Metrics().serve("0.0.0.0", 0):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_client_that_says_nothing_holds_up_neither_a_scrape_nor_the_end(host: str, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "certs")
    files = tls_files(authority.server(["localhost"]))
    trust = ssl.create_default_context(cafile=files.ca)
    scheme = "http" if is_loopback(host) else "https"
    ended = threading.Event()
    with socket.socket() as silent:

        def scraped() -> None:
            with Metrics().serve(host, 0, files) as port:
                silent.connect(("127.0.0.1", port))
                urllib.request.urlopen(
                    f"{scheme}://127.0.0.1:{port}/metrics", timeout=10, context=trust
                ).close()
            ended.set()

        threading.Thread(target=scraped, daemon=True).start()
        assert ended.wait(15)


def test_whoever_connects_and_says_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.server.metrics.IDLE_SECONDS", 0.2)
    with (
        Metrics().serve("127.0.0.1", 0) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as silent,
    ):
        assert silent.recv(1) == b""
