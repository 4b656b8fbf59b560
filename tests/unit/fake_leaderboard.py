"""A made-up leaderboard with the look of a real one, for tests of the report; the same every time."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedmerge.deploy.report.leaderboard import (
    FailedRun,
    Leaderboard,
    Reference,
    RuleFacts,
    RuleRun,
    measured,
)

RULES = (
    "opcm",
    "average",
    "task_arithmetic",
    "ties",
    "dare",
    "magmax",
    "null_space",
    "nufilt",
    "dop",
    "iso_c",
    "tsv_m",
    "wudi",
    "ace",
    "lot",
    "regmean",
    "fisher",
    "pm",
    "holistic",
)
TASKS = ("news", "tweets", "products", "goals", "films")
STATISTICS = {
    "lot": "input_gram",
    "regmean": "input_gram",
    "ace": "input_gram",
    "fisher": "fisher",
    "holistic": "second_moment",
}
ORDERED = ("opcm", "magmax", "null_space", "nufilt", "dop")


def run(
    rule: str,
    accuracy: list[list[float | None]],
    *,
    seed: int = 0,
    order: int = 0,
    stream: str = "text",
    seconds: float = 1.0,
    state_bytes: int = 100,
    statistics_bytes: int = 0,
    tasks: Sequence[str] | None = None,
) -> RuleRun:
    """A run with this accuracy matrix, every merge of which took these seconds, half to absorb."""
    merges = len(accuracy)
    return RuleRun(
        stream=stream,
        rule=rule,
        seed=seed,
        order=order,
        tasks=list(tasks or TASKS[:merges]),
        accuracy=accuracy,
        **measured(accuracy, quick=False),
        absorb_seconds=[seconds / 2] * merges,
        read_seconds=[seconds / 2] * merges,
        state_bytes=state_bytes,
        statistics_bytes=statistics_bytes,
    )


def reference(stream: str = "text", seed: int = 0, tasks: Sequence[str] = TASKS) -> Reference:
    return Reference(
        stream=stream,
        seed=seed,
        base_fingerprint="9c1e" * 16,
        base_bytes=42_000_000,
        vector_bytes=42_000_000 * len(tasks),
        tasks=list(tasks),
        zero_shot=dict.fromkeys(tasks, 0.55),
        fine_tuned=dict.fromkeys(tasks, 0.86),
        test_examples=dict.fromkeys(tasks, 128),
    )


def board(
    runs: Sequence[RuleRun],
    references: Sequence[Reference],
    *,
    streams: Sequence[str] = ("text",),
    failures: Sequence[FailedRun] = (),
) -> Leaderboard:
    """A leaderboard of these runs, its rules and seeds in the order in which they appear."""
    rules = list(dict.fromkeys(found.rule for found in runs))
    return Leaderboard(
        command="fedmerge leaderboard --stream " + ",".join(streams),
        started="2025-11-20T06:44:10+00:00",
        versions={"fedmerge": "0.1.0", "torch": "2.9.1"},
        streams=list(streams),
        seeds=list(dict.fromkeys(found.seed for found in runs)),
        orders=1 + max(found.order for found in runs),
        rows=None,
        quick=False,
        workers=2,
        rules={
            rule: RuleFacts(
                options={"alpha": 0.5, "exact": True},
                needs=[STATISTICS[rule]] if rule in STATISTICS else [],
                order_free=rule not in ORDERED,
            )
            for rule in rules
        },
        references=list(references),
        runs=list(runs),
        failures=list(failures),
        seconds=812.5,
    )


def fake_leaderboard(
    rules: Sequence[str] = RULES, streams: Sequence[str] = ("text", "vision")
) -> Leaderboard:
    """Three seeds and orders of every rule; states of a few sizes, times over two decades."""
    draw = random.Random(len(rules))
    runs = []
    for stream in streams:
        for rule in rules:
            level, state = draw.uniform(0.62, 0.79), draw.choice((1, 1, 1, 2, 2, 4.5))
            seconds = 10 ** draw.uniform(-1.2, 1)
            runs += [
                _made_up(draw, stream, rule, seed, order, level, state, seconds)
                for seed in range(3)
                for order in range(3)
            ]
    references = [reference(stream, seed) for stream in streams for seed in range(3)]
    return board(runs, references, streams=streams)


def _made_up(
    draw: random.Random,
    stream: str,
    rule: str,
    seed: int,
    order: int,
    level: float,
    state: float,
    seconds: float,
) -> RuleRun:
    accuracy: list[list[float | None]] = []
    for merge in range(len(TASKS)):
        seen = [0.85 - (0.85 - level) * (merge - n) / 4 + draw.gauss(0, 0.01) for n in range(merge + 1)]
        accuracy.append([*seen, *[None] * (len(TASKS) - merge - 1)])
    return run(
        rule,
        accuracy,
        seed=seed,
        order=order,
        stream=stream,
        seconds=seconds * draw.uniform(0.9, 1.1),
        state_bytes=int(42_000_000 * state),
        statistics_bytes=60_000_000 if rule in STATISTICS else 0,
    )
