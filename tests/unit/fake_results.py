"""A made-up run with the look of a real one, for tests of the report; the same every time."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedmerge.deploy.report.results import Failure, Learning, MergeRow, Results, RuleResults, SiteTraffic

TASKS = (
    "sun397",
    "stanford_cars",
    "resisc45",
    "eurosat",
    "svhn",
    "gtsrb",
    "mnist",
    "dtd",
    "flowers102",
    "pcam",
    "fer2013",
    "oxford_iiit_pet_with_a_very_long_task_name",
    "stl10",
    "cifar100",
    "cifar10",
    "food101",
    "fashion_mnist",
    "emnist_letters",
    "kmnist",
    "rendered_sst2",
)
RULES = (
    "opcm",
    "task_arithmetic",
    "average",
    "ties",
    "magmax",
    "fisher_weighted",
    "regmean",
    "dare_ties",
    "consensus",
    "breadcrumbs",
    "iso_c",
    "tsv_merge",
)


def fake_results(
    tasks: Sequence[str] = TASKS[:8],
    rules: Sequence[str] = RULES[:4],
    *,
    gap: bool = False,
    failures: int = 0,
) -> Results:
    """A run over these tasks and rules.

    Args:
        gap: the second task's site leaves, so its last entries are not measured.
        failures: how many failures to list.
    """
    draw = random.Random(len(tasks) * 100 + len(rules))
    zero = {task: round(draw.uniform(0.15, 0.65), 4) for task in tasks}
    tuned = {task: round(draw.uniform(0.82, 0.99), 4) for task in tasks}
    return Results(
        stream="clip-b32-8",
        seed=7,
        sites=len(tasks),
        rounds=1,
        rows=2000,
        sites_per_task=1,
        partition="iid",
        command=f"fedmerge simulate clip-b32-8 --rules {','.join(rules)} --seed 7",
        started="2025-11-20T06:44:10+00:00",
        base_fingerprint="9c1e3fa0b7d24c55a1e86b1f0f7f3f6e0d0b3b54a1c07a1f2d3c4b5a69788796",
        versions={
            "fedmerge": "0.1.0",
            "torch": "2.9.1",
            "flwr": "1.42.0",
            "ray": "2.51.0",
            "python": "3.11.2",
        },
        threads_per_worker=1,
        actors=2,
        tasks=list(tasks),
        zero_shot=dict(zero),
        fine_tuned=dict(tuned),
        test_examples={task: draw.randrange(400, 2500, 50) for task in tasks},
        rules={
            rule: _rule(tasks, zero, tuned, max(0.78 - 0.04 * place, 0.1), draw, gap)
            for place, rule in enumerate(rules)
        },
        sites_traffic=[
            SiteTraffic(
                site=f"site-{n:02d}",
                tasks=[task],
                up_bytes=91_000_000 + draw.randrange(4_000_000),
                down_bytes=175_600_000 + draw.randrange(2_000_000),
                failures=int(n <= failures),
            )
            for n, task in enumerate(tasks, start=1)
        ],
        seconds={"start": 7.4, "fine-tuning": 412.9, "merging": 38.2, "evaluation": 121.6, "total": 583.3},
        failures=[
            Failure(
                site=f"site-{n:02d}",
                task=tasks[n - 1],
                phase="fine-tuning",
                reason="no reply before the deadline of 120 s",
            )
            for n in range(1, failures + 1)
        ],
    )


PRIVACY = {"clip": 1.0, "noise": 0.3, "delta": 1e-5, "sketch": 2.0}


def fake_methods() -> Results:
    """A run by five methods: a rule, FedProx in three sizes, and all tasks at once."""
    names = ("fedprox+none", "opcm", "fedprox+bf16", "fedprox+int8", "joint")
    results = fake_results(TASKS[:4], names)
    proximal = Learning(
        rule="fedavg",
        start="merged",
        rounds=2,
        sites=3,
        training={"prox": {"mu": 0.01}},
        loop={"epochs": 1},
        updates=48,
        fine_tuned=dict.fromkeys(results.tasks, 0.8),
    )
    learned = {
        "opcm": Learning(
            rule="opcm", updates=48, up_bytes=48 * 6_000_000, fine_tuned=results.fine_tuned, epsilon=4.5
        )
    }
    for compress, sent, cut in (("none", 6, None), ("bf16", 3, 0.002), ("int8", 1.5, 0.004)):
        told = {"compress": compress, "up_bytes": int(48e6 * sent), "cut": cut, "epsilon": 9.25}
        learned[f"fedprox+{compress}"] = proximal.model_copy(update=told)
    rules = {
        name: results.rules[name].model_copy(update={"learning": learning})
        for name, learning in learned.items()
    }
    rules["joint"] = RuleResults.measured(
        results.tasks,
        [[0.99 - 0.01 * n for n in range(len(results.tasks))]],
        results.rules["joint"].merges[:1],
        learning=Learning(rule="average", joint=True, updates=1, up_bytes=6_000_000),
    )
    return results.model_copy(update={"rules": {name: rules[name] for name in names}})


def _rule(
    tasks: Sequence[str],
    zero: dict[str, float],
    tuned: dict[str, float],
    kept: float,
    draw: random.Random,
    gap: bool,
) -> RuleResults:
    """Old tasks fade with every merge towards ``kept`` of what fine-tuning gained."""
    accuracy: list[list[float | None]] = []
    merges = []
    for merge, merged in enumerate(tasks):
        row: list[float | None] = []
        for column, task in enumerate(tasks):
            gained = kept * 0.97 ** (merge - column) if column <= merge else 0.04
            value = zero[task] + gained * (tuned[task] - zero[task]) + draw.gauss(0, 0.012)
            left = gap and column == 1 and merge > 2
            row.append(None if left else round(min(max(value, 0.0), 1.0), 4))
        accuracy.append(row)
        lambda_t = 1.0 if merge == 0 else round((merge + 1) ** (0.6 - 0.2 * kept), 4)
        update_norm = round(2.1 + 0.9 * (hash_of(merged) % 100) / 100, 4)
        merges.append(
            MergeRow(
                version=merge + 1,
                task=merged,
                sites=[f"site-{merge + 1:02d}"],
                examples=2000,
                scale=round(1 / lambda_t, 4),
                lambda_t=lambda_t,
                update_norm=update_norm,
                merged_norm=round(2.4 * (1 + merge) ** (kept - 0.55), 4),
                seconds={
                    "absorb": round(draw.uniform(0.4, 2.2) * kept, 3),
                    "read": round(draw.uniform(0.1, 0.3), 3),
                },
            )
        )
    return RuleResults.measured(tasks, accuracy, merges, {"alpha": round(0.3 + kept / 10, 3), "exact": True})


def hash_of(name: str) -> int:
    """A number for a name that is the same in every process."""
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(name))
