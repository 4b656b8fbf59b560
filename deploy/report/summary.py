"""A run in one paragraph of plain words, every number of it from the results."""

from __future__ import annotations

from fedmerge.deploy.report import metrics
from fedmerge.deploy.report.console import by_acc
from fedmerge.deploy.report.learning import ceilings, noun, spent
from fedmerge.deploy.report.results import Results
from fedmerge.deploy.report.words import count, format_bytes, percent


def summary(results: Results) -> str:
    """What ran, what ended highest, what was forgotten and what was sent."""
    sentences = [
        _what_ran(results),
        *_who_won(results),
        *_what_was_lost(results),
        _what_was_sent(results),
        *_what_was_hidden(results),
    ]
    if results.failures:
        sentences.append(f"{count(len(results.failures), 'failure')} on the way: see the list below.")
    return " ".join(sentences)


def _what_ran(results: Results) -> str:
    learned = f"{count(results.sites, 'site')} learned {count(len(results.tasks), 'task')}"
    if noun(results) == "method":
        ways = count(len(results.rules), "method")
        return f"On the stream {results.stream}, {learned} by {ways}, each of which led to one merged model."
    return (
        f"On the stream {results.stream}, {learned}, "
        f"and the server merged what arrived into one model under {count(len(results.rules), 'rule')}."
    )


def _who_won(results: Results) -> list[str]:
    measured = [rule for rule in by_acc(results) if results.rules[rule].acc is not None]
    ranked = [rule for rule in measured if not results.rules[rule].joint] or measured
    if not ranked:
        return [f"No {noun(results)} got as far as a measured merge."]
    first, acc = ranked[0], results.rules[ranked[0]].acc or 0.0
    sentence = f"{first} ended with a mean accuracy of {percent(acc)} %"
    if len(ranked) > 1:
        second = results.rules[ranked[1]].acc or 0.0
        lead = percent(acc - second)
        sentence = (
            f"{first} and {ranked[1]} ended level and highest, at {percent(acc)} %"
            if lead == "0.0"
            else f"{first} ended highest, with a mean accuracy of {percent(acc)} %, "
            f"{_points(acc - second)} above {ranked[1]}"
        )
    bounds = _bounds(results)
    return [f"{sentence}; {_listed(bounds)}." if bounds else f"{sentence}."]


def _bounds(results: Results) -> list[str]:
    found = []
    zero = metrics.mean(results.zero_shot.get(task) for task in results.tasks)
    tuned = metrics.mean(results.fine_tuned.get(task) for task in results.tasks)
    if zero is not None:
        found.append(f"the base reaches {percent(zero)} % without any training")
    if tuned is not None:
        found.append(f"models fine-tuned for one task each reach {percent(tuned)} %")
    return found + [
        f"a model that learned all tasks at once ({name}) reaches {percent(results.rules[name].acc)} %"
        for name in ceilings(results)
    ]


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _what_was_lost(results: Results) -> list[str]:
    """The worst single task overall, and under the rule that ended highest."""
    lost = [
        (value, task, rule)
        for rule in by_acc(results)
        for task, value in zip(
            results.tasks,
            metrics.forgetting_by_task(results.rules[rule].accuracy, results.learned(rule)),
            strict=True,
        )
        if value is not None
    ]
    if not lost:
        return ["Forgetting cannot be told, as no task was followed by another."]
    most = max(lost)
    if most[0] <= 0:
        return ["No task lost accuracy to later merges."]
    sentence = f"Forgotten most was {most[1]}: {_points(most[0])} below its best under {most[2]}"
    first = lost[0][2]
    own = max(entry for entry in lost if entry[2] == first)
    if own[2] != most[2]:
        sentence += (
            f"; under {first} the worst was {own[1]}, {_points(own[0])} below its best"
            if own[0] > 0
            else f"; under {first} no task lost accuracy"
        )
    return [f"{sentence}."]


def _what_was_sent(results: Results) -> str:
    up = sum(site.up_bytes for site in results.sites_traffic)
    down = sum(site.down_bytes for site in results.sites_traffic)
    extra = sum(site.statistics_bytes for site in results.sites_traffic)
    share = f" ({format_bytes(extra)} of it statistics)" if extra else ""
    return (
        "Sites sent updates only, task vectors and their statistics, and no training data: "
        f"{format_bytes(up)} up{share} and {format_bytes(down)} down in all."
    )


def _what_was_hidden(results: Results) -> list[str]:
    if results.privacy is None:
        return []
    if not results.privacy["noise"]:
        return ["Updates were clipped but got no noise, which guarantees no privacy."]
    return [f"Updates were clipped and got noise: epsilon of a site's data is {spent(results)} in all."]


def _points(difference: float) -> str:
    text = percent(difference)
    return f"{text} {'point' if text == '1.0' else 'points'}"
