"""The ``fedmerge`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fedmerge import __version__
from fedmerge.common.config import validated
from fedmerge.common.errors import EngineError, FedmergeError
from fedmerge.deploy import certs, leaderboard_cli, remote
from fedmerge.deploy.launch import cli as launch

app = typer.Typer(
    name="fedmerge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated and continual model merging.",
)
bench = typer.Typer(
    no_args_is_help=True, help="Measure speed and accuracy against a reference in the same run."
)
app.command("leaderboard")(leaderboard_cli.leaderboard)
app.command("server")(launch.server)
app.command("client")(launch.client)
app.command("doctor")(launch.doctor)
app.add_typer(remote.app)
app.add_typer(certs.app, name="certs")
app.add_typer(bench, name="bench")

EXTRA_OF = {
    "ray": "server",
    "flwr": "server",
    "grpc_health": "server",
    "grpc_reflection": "server",
    "prometheus_client": "server",
    "grpc": "client",
    "google": "client",
    "cryptography": "client",
    "transformers": "sim",
    "flwr_datasets": "sim",
    "datasets": "sim",
    "matplotlib": "sim",
    "PIL": "sim",
    "jinja2": "sim",
    "peft": "lora",
    "dp_accounting": "privacy",
}
"""Which extra brings a library that the base installation lacks."""

console = Console()
errors = Console(stderr=True)

Rules = Annotated[
    str, typer.Option("--rule", help="Merge rules, comma-separated, or 'all'; docs/rules.md lists them.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="[RULE.]OPTION=VALUE", help="A rule's option; may be repeated."),
]


@app.callback(invoke_without_command=True)
def _version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        console.print(__version__)
        raise typer.Exit


@app.command("simulate")
def simulate_command(
    stream: Annotated[
        str,
        typer.Option(
            help="A stream: a name in docs/streams.md, 'package.module:function' or 'path/file.py:function'."
        ),
    ] = "text",
    sites: Annotated[int, typer.Option(min=1, help="Simulated sites.")] = 4,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many tasks of the stream.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="Rules that merge the same vectors, comma-separated, or 'all'; docs/rules.md lists them. "
            "least_interference,opcm,average unless methods are named."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Methods with a training of their own, comma-separated; docs/methods.md.")
    ] = "",
    train: Annotated[
        str, typer.Option(help="Training options for all of them, comma-separated; docs/methods.md.")
    ] = "",
    compress: Annotated[
        str,
        typer.Option(help="How sites shrink updates: none, bf16, int8, lowrank:ENERGY; several to compare."),
    ] = "none",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="OWNER.OPTION=VALUE",
            help="Option of a rule, a training option, or loop, correction, privacy; may be repeated.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Local fine-tunings per task.")] = 1,
    sites_per_task: Annotated[int, typer.Option(min=1, help="Sites that share a task's data.")] = 1,
    sites_per_round: Annotated[
        int | None, typer.Option(min=1, help="How many of them each round asks; all by default.")
    ] = None,
    partition: Annotated[
        str, typer.Option(help="How they share it: 'iid', 'dirichlet:ALPHA' or 'shards:K'.")
    ] = "iid",
    seed: Annotated[int, typer.Option(min=0, help="Of splits, partitions and local runs.")] = 0,
    rows: Annotated[int | None, typer.Option(min=1, help="At most so many training rows per task.")] = None,
    actors: Annotated[int, typer.Option(min=1, help="Ray actors per rule.")] = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Sites computing at a time; one per core by default.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds before a site's answer is given up.")] = 3600.0,
    save_merged: Annotated[bool, typer.Option(help="Also write each rule's final merged vector.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same command was stopped.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json, CSV files and report.html.")] = Path(
        "runs/latest"
    ),
) -> None:
    """Run many sites on this machine and compare rules and methods."""
    from fedmerge.deploy.choices import parse_methods
    from fedmerge.deploy.progress import RunProgress
    from fedmerge.deploy.report.console import print_summary
    from fedmerge.deploy.report.page import write_report
    from fedmerge.deploy.simulate import SimulationConfig, simulate

    methods, privacy = parse_methods(rule, method, train, compress, settings or [])
    settings_of_run = {
        "stream": stream,
        "tasks": tasks,
        "sites": sites,
        "sites_per_task": sites_per_task,
        "partition": partition,
        "rounds": rounds,
        "sites_per_round": sites_per_round,
        "privacy": privacy,
        "seed": seed,
        "rows": rows,
        "actors": actors,
        "workers": workers,
        "timeout_seconds": timeout,
        "save_merged": save_merged,
    }
    config = validated(SimulationConfig, settings_of_run)
    names = ", ".join(chosen.name for chosen in methods)
    console.print(f"stream {stream}, {sites} sites, {names}, seed {seed}", highlight=False)
    results = simulate(config, methods, out, RunProgress(console), resume)
    report = write_report(results, out / "report.html")
    print_summary(results, console)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


@app.command("merge")
def merge_command(
    inputs: Annotated[
        list[Path], typer.Argument(help="Checkpoints, task vectors or adapter folders, in order of arrival.")
    ],
    base: Annotated[Path, typer.Option(help="The pretrained checkpoint: a file or a Hugging Face folder.")],
    out: Annotated[Path, typer.Option(help="Merged weights, a .safetensors file.")],
    rule: Annotated[str, typer.Option(help="Merge rule; docs/rules.md lists them.")] = "least_interference",
    settings: Settings = None,
    kinds: Annotated[
        Path | None,
        typer.Option(help="TOML file: matrix, vector, private, constant = lists of name patterns."),
    ] = None,
    private: Annotated[
        list[str] | None, typer.Option(help="Pattern of layers to leave as in the base; may be repeated.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Merge on so many Ray actors instead of in this process.")
    ] = None,
    num_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs per actor, fractions allowed.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="An existing Ray cluster, host:port.")] = None,
) -> None:
    """Merge files offline: the base's names and dtypes come out, with OUT.json beside it."""
    from fedmerge.deploy.choices import parse_rules
    from fedmerge.deploy.offline import Workers, merge_files, print_merge, read_kinds

    (chosen,) = parse_rules(rule, settings or [], one=True)
    workers = Workers(actors, num_gpus, ray_address)
    record = merge_files(base, inputs, out, chosen, read_kinds(kinds), private or [], workers, console)
    print_merge(record, out, console)


@app.command("diff")
def diff_command(
    base: Annotated[Path, typer.Argument(help="The pretrained checkpoint.")],
    tuned: Annotated[Path, typer.Argument(help="The fine-tuned checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The task vector, a .safetensors file.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Keep so many singular directions of every matrix.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Keep this share of every matrix's squared norm.")
    ] = None,
    task: Annotated[str, typer.Option(help="The task's name, kept in the file.")] = "",
    private: Annotated[
        list[str] | None, typer.Option(help="Pattern of layers to leave out; may be repeated.")
    ] = None,
) -> None:
    """Write the task vector of a fine-tuned checkpoint: tuned minus base."""
    from fedmerge.deploy.offline import diff_files

    diff_files(base, tuned, out, rank, energy, task, private or [], console)


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A task vector, a checkpoint or an adapter folder.")],
) -> None:
    """Show what a file is, where it comes from, and its layers with their norms."""
    from fedmerge.deploy.offline import inspect_file

    inspect_file(file, console)


@app.command("audit")
def audit_command(
    log: Annotated[Path, typer.Argument(help="The audit log, audit.jsonl in the state folder.")],
    head: Annotated[
        str | None, typer.Option(help="Hash of the newest line, from a copy kept elsewhere.")
    ] = None,
) -> None:
    """Check that no line of an audit log, rotated files included, was changed, removed or put in."""
    from fedmerge.common.errors import StoreDamaged
    from fedmerge.server.audit import verify

    chain = verify(log)
    if head is not None and head != chain.head:
        raise StoreDamaged("the newest line is another one", where=log, got=chain.head, wanted=head)
    console.print(f"{chain.lines} lines, none changed; head {chain.head}", highlight=False, soft_wrap=True)


@bench.command("opcm")
def bench_opcm_command(
    shape: Annotated[str, typer.Option(help="vit-b-32, minilm or tiny.")] = "vit-b-32",
    lora: Annotated[
        int | None, typer.Option(min=1, help="Vectors of this rank instead of full-rank ones.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="On so many Ray actors instead of in this process.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=2)] = 6,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    whole_distance: Annotated[
        bool, typer.Option(help="Distance over every layer, not one of each kind and size; takes minutes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """OPCM as published (full SVD) and ours, arrival and cold, with the distance of both to float64."""
    from fedmerge.deploy.bench.opcm import bench_opcm, print_bench

    result = bench_opcm(
        shape,
        lora,
        actors,
        tasks=tasks,
        repeats=repeats,
        whole_distance=whole_distance or None,
        seed=seed,
        console=errors if as_json else console,
    )
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        print_bench(result, console)


@bench.command("rules")
def bench_rules_command(
    rule: Annotated[str, typer.Option(help="Names separated by commas, or 'all'.")] = "all",
    settings: Settings = None,
    shape: Annotated[str, typer.Option(help="minilm, vit-b-32 or tiny.")] = "minilm",
    lora: Annotated[
        int | None, typer.Option(min=1, help="Vectors of this rank instead of full-rank ones.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=2, help="Arrivals per rule; the first is not counted.")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What one arrival costs with every rule, in multiples of OPCM's, and what each rule keeps."""
    from fedmerge.deploy.bench.rules import bench_rules, print_rules
    from fedmerge.deploy.choices import parse_rules

    rules = parse_rules(rule, settings or [])
    result = bench_rules(rules, shape, lora, tasks=tasks, seed=seed, console=errors if as_json else console)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        print_rules(result, console)


@bench.command("transport")
def bench_transport_command(
    shape: Annotated[str, typer.Option(help="vit-b-32 (350 MB), minilm or tiny.")] = "vit-b-32",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where both ends keep their files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Push and pull over loopback gRPC against a bare stream of the same bytes; the memory of both ends."""
    from fedmerge.deploy.bench.transport import bench_transport, print_transport

    result = bench_transport(shape, repeats, folder, errors if as_json else console)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        print_transport(result, console)


@bench.command("load")
def bench_load_command(
    updates: Annotated[int, typer.Option(min=10)] = 1000,
    sites: Annotated[int, typer.Option(min=1, help="Sending at a time.")] = 50,
    drops: Annotated[float, typer.Option(min=0, max=1, help="Share that breaks off and comes again.")] = 0.1,
    duplicates: Annotated[float, typer.Option(min=0, max=1, help="Share sent before, by anybody.")] = 0.1,
    malformed: Annotated[float, typer.Option(min=0, max=1, help="Share that must be refused.")] = 0.05,
    kills: Annotated[int, typer.Option(min=0, help="How often the server is killed meanwhile.")] = 0,
    shape: Annotated[str, typer.Option(help="tiny, minilm or vit-b-32.")] = "tiny",
    rule: Annotated[str, typer.Option(help="Merge rule.")] = "opcm",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    figure: Annotated[Path | None, typer.Option(help="PNG of the server's memory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """A server under load, over gRPC: exact counts, latencies, memory; the same bits after kills."""
    from fedmerge.deploy.bench.load import Load, bench_load, plot_load, print_load

    plan = Load(updates, sites, drops, duplicates, malformed, kills, shape, rule, seed)
    result = bench_load(plan, errors if as_json else console)
    if figure is not None:
        plot_load(result, figure)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        print_load(result, console)
    if not result.passed:
        raise EngineError("the server did not do what it should", got=f"{len(result.wrong)} differences")


def main() -> None:
    """Entry point: typed errors and missing extras become one line and exit code 2."""
    try:
        app()
    except FedmergeError as error:
        _fail(type(error).__name__, str(error), error)
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        _fail("not installed", f"{error.name}. This needs: pip install 'fedmerge[{extra}]'", error)


def _fail(kind: str, message: str, error: Exception) -> NoReturn:
    errors.print(f"[bold red]error[/bold red] ({kind}): ", end="")
    errors.print(message, markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(2) from error
