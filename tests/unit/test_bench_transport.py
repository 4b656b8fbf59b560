"""The transport benchmark on a tiny model: what it reports, never how fast it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fedmerge.common.errors import ConfigError
from fedmerge.common.messages import CHUNK_BYTES
from fedmerge.deploy.bench.transport import TransportBench, bench_transport, print_transport


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> TransportBench:
    folder = tmp_path_factory.mktemp("bench")
    found = bench_transport("tiny", 2, folder)
    assert list(folder.iterdir()) == []
    return found


def test_rates_ratios_and_memory_fit_together(result: TransportBench) -> None:
    assert (result.shape, result.repeats, result.chunk_bytes) == ("tiny", 2, CHUNK_BYTES)
    assert result.local > 0
    for found in (result.push, result.pull):
        assert set(found.bare) == {"threads", "asyncio"}
        assert found.ratio == pytest.approx(found.transport / max(found.bare.values()))
        assert found.transport == pytest.approx(result.size_bytes / found.seconds["transport"])
        assert 0 < found.seconds["transport"] <= found.seconds["total"]
        assert min(found.client_chunks, found.server_chunks) >= 0
    assert TransportBench.model_validate_json(result.model_dump_json()) == result


def test_the_table_names_both_ways_and_their_units(result: TransportBench) -> None:
    console = Console(width=160, record=True, quiet=False, file=Path("/dev/null").open("w"))  # noqa: SIM115
    print_transport(result, console)
    text = console.export_text()
    for word in ("push", "pull", "bare MB/s", "ratio", "stream s", "chunks", "load average"):
        assert word in text


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shape"):
        bench_transport("none", 1, tmp_path)
