"""The OPCM benchmark on a tiny model: what it reports, never how fast it was."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from fedmerge.common.errors import ConfigError
from fedmerge.common.layers import LayerKind
from fedmerge.deploy.bench.opcm import OpcmBench, bench_opcm, print_bench
from fedmerge.deploy.bench.shapes import SHAPES, layers_of
from fedmerge.deploy.bench.workload import Workload

FIELDS = {
    *("shape", "layers", "parameters", "vectors", "engine", "workers", "tasks", "repeats", "seed", "alpha"),
    *("published", "cold", "arrival", "published_over_cold", "published_over_arrival"),
    *("distance_published", "distance_ours", "distance_layers", "yardstick"),
    *("peak_memory_bytes", "peak_memory_ratio", "allocator", "machine"),
}


@pytest.fixture(scope="module", params=[None, 2], ids=["dense", "lora"])
def result(request: pytest.FixtureRequest) -> OpcmBench:
    return bench_opcm(
        "tiny", request.param, tasks=3, repeats=1, published_steps=1, memory_tasks=(1, 2), seed=5
    )


def test_json_has_the_documented_fields(result: OpcmBench) -> None:
    fields = json.loads(result.model_dump_json())
    assert set(fields) == FIELDS
    assert set(fields["published"]) == set(fields["arrival"]) == {"median", "min", "max", "samples"}
    assert set(fields["machine"]) == {
        *("processor", "cores", "torch_version", "published_threads", "load_before", "load_after")
    }
    assert (fields["shape"], fields["seed"], fields["tasks"]) == ("tiny", 5, 3)
    assert set(fields["peak_memory_bytes"]) == {"1", "2"}


def test_json_round_trips(result: OpcmBench) -> None:
    assert OpcmBench.model_validate_json(result.model_dump_json()) == result


def test_both_runs_are_near_the_yardstick_and_ours_nearer(result: OpcmBench) -> None:
    assert result.distance_ours < 1e-5
    assert result.distance_ours < result.distance_published


def test_table_names_every_step_and_its_units(result: OpcmBench) -> None:
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_bench(result, console)
    text = console.export_text()
    wanted = (
        "published, float32",
        "ours, cold",
        "ours, at arrival",
        "median s",
        "MiB",
        "seed 5",
        "load average",
    )
    assert all(part in text for part in wanted)


def test_vit_b_32_has_the_vision_towers_layers() -> None:
    layers = layers_of("vit-b-32")
    shapes = [layer.shape for layer in layers if layer.kind is LayerKind.MATRIX]
    assert (shapes.count((768, 768)), shapes.count((3072, 768)), shapes.count((768, 3072))) == (48, 12, 12)
    assert (768, 3, 32, 32) in shapes
    assert (512, 768) in shapes
    rows_columns = [layer.matrix_shape for layer in layers]
    assert sum(rows * columns for rows, columns in rows_columns) == 87_849_216


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_names_are_unique(shape: str) -> None:
    names = [layer.name for layer in layers_of(shape)]
    assert len(names) == len(set(names))


def test_made_up_vectors_are_the_same_every_time_and_differ_by_task() -> None:
    work = Workload(tuple(layers_of("tiny")), seed=1)
    layer = work.layers[0]
    assert work.update(2, layer).values.equal(work.update(2, layer).values)
    assert not work.update(2, layer).values.equal(work.update(3, layer).values)


def test_unknown_shape_is_refused_naming_all_shapes() -> None:
    with pytest.raises(ConfigError) as raised:
        bench_opcm("huge")
    assert all(shape in str(raised.value) for shape in SHAPES)


@pytest.mark.parametrize("counts", [{"tasks": 2}, {"repeats": 0}, {"published_steps": 0}])
def test_too_small_counts_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(counts))):
        bench_opcm("tiny", **counts)
