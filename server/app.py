"""The Flower ServerApp: started by ``flwr run`` beside a SuperLink, or called directly in a simulation.

Run-config keys, all optional but ``base``:

- ``base``: the pretrained model, a checkpoint or ``package.module:function`` that builds it;
  ``private``: comma-separated patterns of layers that never leave a site
- ``rule``: comma-separated names, by default ``opcm``; ``NAME.OPTION``: a rule's option, as ``opcm.alpha``
- ``tasks`` (comma-separated, in merging order), ``rounds``, ``sites-per-task``, ``partition``, ``seed``,
  ``min-sites``, ``wait-seconds``, ``timeout-seconds``, ``max-examples``, ``evaluate``: ``FederationConfig``
- ``actors``, ``threads``, ``num-gpus``, ``ray-address``: see ``EngineConfig``
- ``out``: folder for ``history.jsonl`` and the final merged vectors
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid
from pydantic import BaseModel, ConfigDict, Field

from fedmerge.common.base import Base
from fedmerge.common.config import listed, validated
from fedmerge.common.errors import ConfigError
from fedmerge.common.logs import log_to_stderr
from fedmerge.common.lookup import find_function
from fedmerge.common.vectorfile import save
from fedmerge.server.engine.engine import Engine
from fedmerge.server.engine.ray_engine import RayEngine, start_ray
from fedmerge.server.federation import Federation, FederationConfig
from fedmerge.server.history import Event, History
from fedmerge.server.merge import RULES, make_rule
from fedmerge.server.merge.rule import Rule
from fedmerge.server.model import GlobalModel

logger = logging.getLogger("fedmerge.server")

RAY_START_SECONDS = 60.0
POLL_SECONDS = 1.0
"""Between two looks at a SuperLink; a site answers in seconds at best."""


class EngineConfig(BaseModel):
    """Where merging happens.

    Attributes:
        actors: Ray actors per rule. ``threads``: torch threads of each.
        num_gpus: GPUs per actor; None decides by what the cluster has.
        ray_address: of a cluster; None starts a local Ray unless RAY_ADDRESS is set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    actors: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    num_gpus: float | None = Field(default=None, ge=0)
    ray_address: str | None = None


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run with the settings of the run config."""
    given: dict[str, Any] = {key: value for key, value in context.run_config.items() if value != ""}
    log_to_stderr()
    options = {name: _options_of(name, given) for name in RULES}
    rules = [make_rule(name, options.get(name)) for name in listed(given.pop("rule", "opcm"))]
    base = open_base(str(given.pop("base", "")), listed(given.pop("private", "")))
    out = Path(str(given.pop("out", "fedmerge-out")))
    given["tasks"] = listed(given.get("tasks", ""))
    engines, federation = _split(given, EngineConfig, FederationConfig)
    out.mkdir(parents=True, exist_ok=True)
    history = History(_log)
    try:
        finished = run_federation(
            grid, base, rules, federation, engines, history, lambda run: save_merged(run, out)
        )
    finally:
        history.save(out / "history.jsonl")
    logger.info("%d tasks merged; history and merged vectors are in %s", len(finished.merged), out)


def run_federation(
    grid: Grid,
    base: Base,
    rules: Sequence[Rule],
    config: FederationConfig,
    engines: EngineConfig,
    history: History,
    on_finished: Callable[[Federation], None] = lambda _: None,
) -> Federation:
    """Merges the tasks of a grid's sites under every rule, each rule on its own Ray actors.

    Args:
        on_finished: called before the actors end, while merged models can still be read.

    Raises:
        ConfigError: no usable site. EngineError: Ray cannot be reached, or actors keep dying.
    """
    simulated = isinstance(grid, InMemoryGrid)
    # In `flwr run`'s own simulation Flower starts Ray, beside this thread.
    start_ray(engines.ray_address, wait=RAY_START_SECONDS if simulated else 0.0)

    def engine(rule: Rule) -> Engine:
        return RayEngine(
            rule,
            base.layers.values(),
            actors=engines.actors,
            threads=engines.threads,
            num_gpus=engines.num_gpus,
        )

    with ExitStack() as stack:
        models = {rule.name: GlobalModel(base, stack.enter_context(engine(rule))) for rule in rules}
        federation = Federation(grid, base, models, config, history, 0.1 if simulated else POLL_SECONDS)
        federation.run()
        on_finished(federation)
    return federation


def open_base(spec: str, private: Sequence[str] = ()) -> Base:
    """The base a spec names: a function that builds the model, or a checkpoint.

    Raises:
        ConfigError, FileError: nothing usable there.
    """
    if not spec:
        raise ConfigError(
            "no pretrained model is named",
            where="run config",
            wanted="base",
            do="Name a checkpoint or package.module:function in the key 'base'.",
        )
    if ":" in spec and not Path(spec).exists():
        return Base.from_model(find_function(spec, where="base")(), private)
    return Base.from_checkpoint(spec, private=private)


def save_merged(federation: Federation, folder: Path) -> None:
    """Writes the final merged vector of every rule as ``merged-RULE.safetensors``."""
    for name, model in federation.models.items():
        save(model.merged(), folder / f"merged-{name}.safetensors")


def _options_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Takes a rule's options, ``NAME.OPTION``, out of the settings."""
    keys = [key for key in given if key.startswith(f"{name}.")]
    return {key.removeprefix(f"{name}."): given.pop(key) for key in keys}


def _split(given: Mapping[str, Any], first: type[BaseModel], second: type[BaseModel]) -> tuple[Any, Any]:
    """Settings, in kebab case, validated into two configs; a key of neither is refused."""
    settings = {key.replace("-", "_"): value for key, value in given.items()}
    unknown = sorted(set(settings) - set(first.model_fields) - set(second.model_fields))
    if unknown:
        known = sorted({*first.model_fields, *second.model_fields, "base", "private", "rule", "out"})
        raise ConfigError(
            "unknown run-config key",
            got=unknown,
            wanted=" or ".join(known),
            do=f"A rule's option is written RULE.OPTION; the rules are {', '.join(RULES)}.",
        )
    return tuple(
        validated(kind, {key: value for key, value in settings.items() if key in kind.model_fields})
        for kind in (first, second)
    )  # type: ignore[return-value]


def _log(event: Event) -> None:
    level = logging.WARNING if event["event"] == "failed" else logging.INFO
    logger.log(level, json.dumps(event))
