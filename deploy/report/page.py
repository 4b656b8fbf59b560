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

from fedmerge.deploy.report import figures, heatmaps, metrics
from fedmerge.deploy.report.bytes_figure import accuracy_against_bytes, points
from fedmerge.deploy.report.console import by_acc, mean_seconds_per_merge
from fedmerge.deploy.report.learning import ceilings, epsilons, noun, spent, ways
from fedmerge.deploy.report.results import Results
from fedmerge.deploy.report.summary import summary
from fedmerge.deploy.report.words import count, format_bytes, percent, seconds

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
    """One line of the key table, ready to print; ``joint``: all tasks learned at once, a bound."""

    rule: str
    joint: bool
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
            noun=noun(results),
            summary=summary(results),
            lines=_rule_lines(results),
            ceilings=ceilings(results),
            ways=ways(results),
            renamed=any(way.family != way.rule for way in ways(results)),
            compressed=any(way.compress != "none" for way in ways(results)),
            measured=any(way.statistics for way in ways(results)),
            epsilons=epsilons(results),
            spent=spent(results),
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
    environment.filters.update({"percent": percent, "bytes": format_bytes, "seconds": seconds})
    return environment


def _rule_lines(results: Results) -> list[RuleLine]:
    looks = figures.looks(results)
    lines = []
    for rule in by_acc(results):
        result, error = results.rules[rule], results.sampling_error(rule)
        lines.append(
            RuleLine(
                rule=rule,
                joint=result.joint,
                colour=looks[rule].colour,
                acc=percent(result.acc),
                error="" if error is None else f"± {percent(error)}",
                bwt=percent(result.bwt, signed=True),
                forgetting=percent(result.forgetting, signed=True),
                seconds=seconds(mean_seconds_per_merge(result)),
                state=format_bytes(result.state_bytes),
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
        if gaps := ", ".join(f"{count(tasks, 'task')} in {name}" for name, tasks in named if tasks):
            alike.setdefault(gaps, []).append(rule)
    everyone = f"all {noun(results)}s"
    return [
        f"{everyone if len(rules) == len(results.rules) > 1 else ', '.join(rules)}: {gaps}"
        for gaps, rules in alike.items()
    ]


def _matrices(results: Results) -> list[Drawn]:
    captions = {rule: f"Accuracy of every task after every merge under {rule}" for rule in by_acc(results)}
    with mpl.rc_context(SVG_STYLE):
        return [
            as_svg(f"matrix-{n}", heatmaps.accuracy_matrix(results, rule), caption)
            for n, (rule, caption) in enumerate(captions.items(), start=1)
        ]


def _figures(results: Results) -> dict[str, Drawn]:
    with mpl.rc_context(SVG_STYLE):
        drawn = [
            as_svg("acc", figures.accuracy_over_merges(results), "Mean accuracy over merges, by rule"),
            as_svg("final", figures.final_accuracy(results), "Final accuracy of each task, by rule"),
            as_svg("forgetting", heatmaps.forgetting(results), "Forgetting of each task, by rule"),
            as_svg("norms", figures.norms(results), "Norms and lambda over merges, by rule"),
            as_svg("traffic", figures.traffic(results), "Bytes up and down, by site"),
            as_svg("seconds", figures.seconds(results), "Working seconds, by phase"),
        ]
        if points(results):
            title = f"Final accuracy against the bytes of an update, by {noun(results)}"
            drawn.append(as_svg("bytes", accuracy_against_bytes(results), title))
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
