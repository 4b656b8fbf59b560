"""How sites learned, for the report and the terminal: told wherever it was not plain fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedmerge.deploy.report import metrics
from fedmerge.deploy.report.results import Learning, Results, Settings


@dataclass(frozen=True)
class Way:
    """How one method's sites learned, in words and numbers.

    Attributes:
        family: the method's name without its way to compress.
        start: where each task's training began. ``rounds`` and ``sites``: per task, and asked in each.
        trained: options with their settings, and settings of the loop; empty where it was as the stream says.
        options: their names alone.
        sent: bytes of an update, statistics and corrections included. ``statistics``: share of it.
        cut: mean norm of what compression left out, relative to the update's.
        at_sites: mean accuracy of the sites' own models.
    """

    name: str
    family: str
    rule: str
    start: str
    rounds: int
    sites: int
    trained: str
    options: tuple[str, ...]
    compress: str
    updates: int
    sent: float | None
    statistics: float
    cut: float | None
    at_sites: float | None


def ways(results: Results) -> list[Way]:
    """How the sites of every method learned, in the order in which they ran; none where all learned plainly
    and alike."""
    found = {name: result.learning for name, result in results.rules.items() if result.learning is not None}
    if all(learning.plain for learning in found.values()):
        return []
    return [_way(name, learning) for name, learning in found.items()]


def noun(results: Results) -> str:
    """What is compared: methods where names stand for more than a rule, else rules."""
    for name, result in results.rules.items():
        learning = result.learning
        if learning is not None and (learning.start == "merged" or name != learning.rule):
            return "method"
    return "rule"


def family(name: str, learning: Learning) -> str:
    """A method's name without the way to compress that is part of it where several are compared."""
    return name.removesuffix(f"+{learning.compress}")


def per_update(learning: Learning) -> float | None:
    """Bytes that an update took on the way to the server."""
    return learning.up_bytes / learning.updates if learning.updates else None


def ceilings(results: Results) -> list[str]:
    """Methods that learned all tasks at once, as no stream allows."""
    return [name for name, result in results.rules.items() if result.joint]


def epsilons(results: Results) -> dict[str, str]:
    """By method, the most that a site has spent by its end."""
    return {
        name: _epsilon(results, result.learning.epsilon if result.learning is not None else None)
        for name, result in results.rules.items()
    }


def spent(results: Results) -> str:
    """The most that a site has spent in the whole run."""
    known = [result.learning.epsilon for result in results.rules.values() if result.learning is not None]
    return _epsilon(results, max((value for value in known if value is not None), default=None))


def _epsilon(results: Results, value: float | None) -> str:
    if results.privacy is not None and not results.privacy["noise"]:
        return "infinite"
    return "not known" if value is None else f"{value:.2f}"


def _way(name: str, learning: Learning) -> Way:
    return Way(
        name=name,
        family=family(name, learning),
        rule=learning.rule,
        start="base, all tasks at once" if learning.joint else _START[learning.start],
        rounds=learning.rounds,
        sites=learning.sites,
        trained=trained_with(learning.training, learning.loop),
        options=(*learning.training, *(["loop"] if learning.loop else [])),
        compress=learning.compress,
        updates=learning.updates,
        sent=per_update(learning),
        statistics=learning.statistics_bytes / learning.up_bytes if learning.up_bytes else 0.0,
        cut=learning.cut,
        at_sites=metrics.mean(learning.fine_tuned.values()),
    )


_START = {"base": "base", "merged": "merged model"}


def trained_with(training: Mapping[str, Settings], loop: Settings) -> str:
    """The training options in use and the loop's settings, as pages show them; empty without any."""
    options = [*training.items(), *([("loop", loop)] if loop else [])]
    return "; ".join(_option(name, settings) for name, settings in options)


def _option(name: str, settings: Settings) -> str:
    told = ", ".join(f"{key} {_value(value)}" for key, value in settings.items() if value not in (None, ""))
    return f"{name} ({told})" if told else name


def _value(value: float | str | int | bool | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
