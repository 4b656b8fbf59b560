"""The report: one HTML file that holds its own styles and figures, and asks nothing of a network."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from fedmerge.deploy.report import figures, metrics
from fedmerge.deploy.report.console import by_acc, mean_seconds_per_merge, percent
from fedmerge.deploy.report.results import Results

SVG_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "svg.hashsalt": "fedmerge",  # equal results, equal bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "hatch.color": "#b0b0b0",
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Drawn:
    """A figure on the page: its anchor, the drawing, and a title for those who cannot see it."""

    name: str
    svg: Markup
    title: str


@dataclass(frozen=True)
class RuleLine:
    """One line of the key table, ready to print."""

    rule: str
    colour: str
    acc: str
    error: str
    bwt: str
    forgetting: str
    seconds: str
    state: str
    needs: str
    options: str


def write_report(results: Results, path: Path | str) -> Path:
    """Writes the whole report of a run as one HTML file; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(results), encoding="utf-8")
    return path


def render(results: Results) -> str:
    """The report as HTML. Names from outside are escaped; the same results give the same page."""
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            results=results,
            summary=summary(results),
            lines=_rule_lines(results),
            left_out=_left_out(results),
            matrices=_matrices(results),
            drawn=_figures(results),
            up_bytes=sum(site.up_bytes for site in results.sites_traffic),
            down_bytes=sum(site.down_bytes for site in results.sites_traffic),
            zero_shot=metrics.mean(results.zero_shot.get(task) for task in results.tasks),
            fine_tuned=metrics.mean(results.fine_tuned.get(task) for task in results.tasks),
            wide=len(results.tasks) > 10,
        )
    )


def templates() -> Environment:
    """The pages' templates: names are escaped, and ``percent``, ``bytes`` and ``seconds`` print numbers."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        {"percent": percent, "bytes": format_bytes, "seconds": lambda s: "–" if s is None else f"{s:,.2f}"}  # noqa: RUF001
    )
    return environment


def summary(results: Results) -> str:
    """The run in one paragraph of plain words, every number of it from the results."""
    sentences = [_what_ran(results), *_who_won(results), *_what_was_lost(results), _what_was_sent(results)]
    if results.failures:
        sentences.append(f"{_count(len(results.failures), 'failure')} on the way: see the list below.")
    return " ".join(sentences)


def format_bytes(size: int) -> str:
    """A size in decimal units, three digits or so: 1.41 GB, 91.2 MB."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:,.{2 if size < 10 * factor else 1}f} {unit}"
    return f"{size} B"


def _what_ran(results: Results) -> str:
    tasks = len(results.tasks)
    return (
        f"On the stream {results.stream}, {_count(results.sites, 'site')} learned {_count(tasks, 'task')}, "
        f"and the server merged what arrived into one model under {_count(len(results.rules), 'rule')}."
    )


def _who_won(results: Results) -> list[str]:
    ranked = [rule for rule in by_acc(results) if results.rules[rule].acc is not None]
    if not ranked:
        return ["No rule got as far as a measured merge."]
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
    bounds = []
    zero = metrics.mean(results.zero_shot.get(task) for task in results.tasks)
    tuned = metrics.mean(results.fine_tuned.get(task) for task in results.tasks)
    if zero is not None:
        bounds.append(f"the base reaches {percent(zero)} % without any training")
    if tuned is not None:
        bounds.append(f"models fine-tuned for one task each reach {percent(tuned)} %")
    return [f"{sentence}; {' and '.join(bounds)}." if bounds else f"{sentence}."]


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
    first = by_acc(results)[0]
    own = max((entry for entry in lost if entry[2] == first), default=most)
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


def _points(difference: float) -> str:
    text = percent(difference)
    return f"{text} {'point' if text == '1.0' else 'points'}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _rule_lines(results: Results) -> list[RuleLine]:
    looks = figures.looks(results)
    lines = []
    for rule in by_acc(results):
        result, final = results.rules[rule], results.final(rule)
        spent = mean_seconds_per_merge(result)
        error = metrics.sampling_error(final, [results.test_examples.get(task, 0) for task in results.tasks])
        lines.append(
            RuleLine(
                rule=rule,
                colour=looks[rule].colour,
                acc=percent(result.acc),
                error="" if error is None else f"± {percent(error)}",
                bwt=percent(result.bwt, signed=True),
                forgetting=percent(result.forgetting, signed=True),
                seconds="–" if spent is None else f"{spent:.2f}",  # noqa: RUF001
                state="–" if result.state_bytes is None else format_bytes(result.state_bytes),  # noqa: RUF001
                needs=", ".join(result.needs) or "nothing else",
                options=", ".join(f"{key} = {value}" for key, value in result.options.items()) or "none",
            )
        )
    return lines


def _left_out(results: Results) -> list[str]:
    """What each mean went without, rules with the same gaps together; empty when nothing is missing."""
    alike: dict[str, list[str]] = {}
    for rule in by_acc(results):
        counts = metrics.left_out(results.rules[rule].accuracy, results.learned(rule))
        named = zip(("ACC", "BWT", "forgetting"), counts, strict=True)
        if gaps := ", ".join(f"{_count(count, 'task')} in {name}" for name, count in named if count):
            alike.setdefault(gaps, []).append(rule)
    everywhere = len(results.rules) > 1
    return [
        f"{'all rules' if everywhere and len(rules) == len(results.rules) else ', '.join(rules)}: {gaps}"
        for gaps, rules in alike.items()
    ]


def _matrices(results: Results) -> list[Drawn]:
    captions = {rule: f"Accuracy of every task after every merge under {rule}" for rule in by_acc(results)}
    with mpl.rc_context(SVG_STYLE):
        return [
            as_svg(f"matrix-{n}", figures.accuracy_matrix(results, rule), caption)
            for n, (rule, caption) in enumerate(captions.items(), start=1)
        ]


def _figures(results: Results) -> dict[str, Drawn]:
    with mpl.rc_context(SVG_STYLE):
        drawn = [
            as_svg("acc", figures.accuracy_over_merges(results), "Mean accuracy over merges, by rule"),
            as_svg("final", figures.final_accuracy(results), "Final accuracy of each task, by rule"),
            as_svg("forgetting", figures.forgetting(results), "Forgetting of each task, by rule"),
            as_svg("norms", figures.norms(results), "Norms and lambda over merges, by rule"),
            as_svg("traffic", figures.traffic(results), "Bytes up and down, by site"),
            as_svg("seconds", figures.seconds(results), "Working seconds, by phase"),
        ]
    return {figure.name: figure for figure in drawn}


def as_svg(name: str, figure: Figure, title: str) -> Drawn:
    """A figure as SVG to stand inside HTML: no prologue, no namespaces, identifiers of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", head)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{name}-", body)
    label = f' role="img" aria-label="{escape(title)}"'
    return Drawn(name=name, svg=Markup(f"{head}{label}>{body}"), title=title)
