"""Whether the report says everything, in one file that asks nothing of a network."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

import matplotlib as mpl
import pytest
from fake_results import PRIVACY, RULES, TASKS, fake_methods, fake_results
from matplotlib.figure import Figure
from rich.console import Console

from fedmerge.deploy.report import figures, heatmaps
from fedmerge.deploy.report.bytes_figure import accuracy_against_bytes, points
from fedmerge.deploy.report.console import print_summary
from fedmerge.deploy.report.learning import noun, ways
from fedmerge.deploy.report.page import SVG_STYLE, render, write_report
from fedmerge.deploy.report.results import Learning, Results, RuleResults
from fedmerge.deploy.report.summary import summary
from fedmerge.deploy.report.words import format_bytes, percent

FIGURES = ("acc", "final", "forgetting", "norms", "traffic", "seconds")
SIZES = [(1, 1), (1, 12), (2, 1), (8, 4), (20, 8)]


@pytest.fixture(scope="module")
def page() -> str:
    return render(fake_results(gap=True, failures=1))


def _without(results: Results, **changes: object) -> Results:
    return results.model_copy(update=changes)


class TestPage:
    def test_every_rule_task_site_and_figure_is_there(self, page: str) -> None:
        text = html.unescape(page)
        for name in (*RULES[:4], *TASKS[:8], *(f"site-{n:02d}" for n in range(1, 9))):
            assert f">{name}<" in text
        for anchor in (*FIGURES, *(f"matrix-{n}" for n in range(1, 5))):
            assert len(re.findall(rf'<(?:figure|div)[^>]*id="{anchor}"', page)) == 1
        assert page.count("<svg") == page.count("</svg>") == len(FIGURES) + 4

    def test_nothing_is_fetched_or_run(self, page: str) -> None:
        assert "http:" not in page
        assert "https:" not in page
        assert "<script" not in page
        assert "<link" not in page
        assert "@import" not in page
        assert all(target.startswith("data:") for target in re.findall(r'src="([^"]*)"', page))
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
        assert all(target.startswith(("#", "data:")) for target in re.findall(r'href="([^"]*)"', page))

    def test_identifiers_are_unique_and_references_resolve(self, page: str) -> None:
        identifiers = re.findall(r'\bid="([^"]*)"', page)
        assert len(set(identifiers)) == len(identifiers)
        assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', page)) <= set(identifiers)

    def test_markup_in_names_is_text(self) -> None:
        evil = '<script>alert("1")</script> & $x^2$'
        page = render(fake_results((evil, *TASKS[:2]), ("<b>opcm</b>", "ties"), failures=1))
        assert "<script" not in page
        assert "<b>opcm" not in page
        assert html.escape("<script>alert(") in page
        assert "$x^2$" in page

    def test_equal_results_give_equal_pages(self) -> None:
        assert render(fake_results(TASKS[:2])) == render(fake_results(TASKS[:2]))

    def test_failures_are_listed_only_when_there_are_any(self, page: str) -> None:
        assert "no reply before the deadline" in page
        assert 'id="failures"' not in render(fake_results(TASKS[:2]))

    def test_missing_measurements_are_counted(self, page: str) -> None:
        assert "all rules: 1 task in ACC, 1 task in BWT, 1 task in forgetting" in page

    @pytest.mark.parametrize(("tasks", "rules"), SIZES)
    def test_small_and_large_runs_are_written(self, tmp_path: Path, tasks: int, rules: int) -> None:
        path = write_report(fake_results(TASKS[:tasks], RULES[:rules]), tmp_path / "new" / "report.html")
        page = path.read_text(encoding="utf-8")
        assert page.count("<svg") == len(FIGURES) + rules
        assert all(f">{name}<" in page for name in (*TASKS[:tasks], *RULES[:rules]))

    def test_a_run_without_any_merge_is_written(self) -> None:
        results = fake_results(TASKS[:2], RULES[:1])
        bare = RuleResults.measured(results.tasks, [], [])
        page = render(
            _without(results, rules={"opcm": bare}, zero_shot={}, fine_tuned={}, sites_traffic=[], seconds={})
        )
        assert "No rule got as far as a measured merge." in page

    def test_a_run_without_rules_is_written(self) -> None:
        assert "under 0 rules" in render(_without(fake_results(TASKS[:2]), rules={}))


class TestSummary:
    def test_it_names_the_highest_rule_and_its_lead(self) -> None:
        results = fake_results()
        first, second = (results.rules[rule].acc or 0.0 for rule in RULES[:2])
        assert (
            f"opcm ended highest, with a mean accuracy of {100 * first:.1f} %, "
            f"{100 * (first - second):.1f} points above task_arithmetic"
        ) in summary(results)

    def test_a_tie_is_called_level(self) -> None:
        results = fake_results()
        same = _without(results, rules={"a": results.rules["opcm"], "b": results.rules["opcm"]})
        assert "a and b ended level and highest" in summary(same)

    def test_it_says_what_was_lost_most_and_where(self) -> None:
        merges = fake_results(TASKS[:2], RULES[:1]).rules[RULES[0]].merges
        kept = RuleResults.measured(TASKS[:2], [[0.9, 0.1], [0.9, 0.9]], merges)
        lost = RuleResults.measured(TASKS[:2], [[0.9, 0.1], [0.5, 0.9]], merges)
        results = _without(fake_results(TASKS[:2]), rules={"kept": kept, "lost": lost})
        assert "Forgotten most was sun397: 40.0 points below its best under lost" in summary(results)
        assert "under kept no task lost accuracy" in summary(results)
        assert "No task lost accuracy to later merges." in summary(_without(results, rules={"kept": kept}))

    def test_one_task_cannot_be_forgotten(self) -> None:
        assert "Forgetting cannot be told" in summary(fake_results(TASKS[:1], RULES[:1]))

    def test_bytes_are_added_up_over_sites(self) -> None:
        results = fake_results()
        up = sum(site.up_bytes for site in results.sites_traffic)
        assert f"{up / 1e6:.1f} MB up and" in summary(results)

    def test_the_share_of_statistics_is_told_where_there_are_any(self) -> None:
        results = fake_results()
        sites = [
            site.model_copy(update={"statistics_bytes": 1_500_000 * (n < 2)})
            for n, site in enumerate(results.sites_traffic)
        ]
        told = summary(results.model_copy(update={"sites_traffic": sites}))
        assert "MB up (3.00 MB of it statistics) and" in told

    @pytest.mark.parametrize(
        ("size", "text"),
        [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (91_240_000, "91.2 MB"), (2 * 10**12, "2.00 TB")],
    )
    def test_sizes_are_decimal(self, size: int, text: str) -> None:
        assert format_bytes(size) == text


class TestFigures:
    def test_a_rule_has_one_look_and_no_two_are_alike(self) -> None:
        looks = figures.looks(fake_results(TASKS[:1], [f"rule {n}" for n in range(24)]))
        assert len(set(looks.values())) == 24

    @pytest.mark.parametrize(
        "draw",
        [
            lambda results: heatmaps.accuracy_matrix(results, RULES[0]),
            figures.accuracy_over_merges,
            heatmaps.forgetting,
            figures.traffic,
            figures.seconds,
        ],
    )
    def test_both_axes_are_labelled(self, draw: object) -> None:
        figure = draw(fake_results(TASKS[:3]))  # type: ignore[operator]
        assert isinstance(figure, Figure)
        assert figure.axes[0].get_xlabel()
        assert figure.axes[0].get_ylabel()

    @pytest.mark.parametrize("draw", [figures.norms, figures.accuracy_over_merges], ids=["norms", "acc"])
    @pytest.mark.parametrize("rules", [1, 24])
    def test_a_long_legend_fits_and_leaves_the_axes_their_room(self, draw, rules: int) -> None:  # type: ignore[no-untyped-def]
        results = fake_results(TASKS[:3], [f"rule_{n}_with_a_name" for n in range(rules)])
        with mpl.rc_context(SVG_STYLE):
            figure: Figure = draw(results)
            figure.draw_without_rendering()
        (legend,) = figure.legends
        edges, drawn = figure.bbox, legend.get_window_extent()
        assert edges.y0 <= drawn.y0 < drawn.y1 <= edges.y1
        assert sum(ax.get_position().height for ax in figure.axes) > 0.5
        for ax in figure.axes:
            label = ax.yaxis.label.get_window_extent()
            assert edges.y0 <= label.y0 < label.y1 <= edges.y1
            assert ax.get_window_extent().x1 <= drawn.x0

    @pytest.mark.parametrize(("base", "drawn"), [(0.5, True), (0.01, False)])
    def test_a_base_far_below_leaves_the_rules_their_room(self, base: float, drawn: bool) -> None:
        results = fake_results(TASKS[:3])
        results = _without(results, zero_shot=dict.fromkeys(results.tasks, base), fine_tuned={})
        figure = figures.accuracy_over_merges(results)
        low, _ = figure.axes[0].get_ylim()
        assert (low < 100 * base + 1) == drawn
        label = "base, zero-shot" if drawn else f"base, zero-shot: {100 * base:.0f} %, far below"
        assert label in [text.get_text() for text in figure.legends[0].texts]

    def test_matrices_of_all_rules_share_their_colours(self) -> None:
        results = fake_results()
        limits = {heatmaps.accuracy_matrix(results, rule).axes[1].get_ylim() for rule in RULES[:4]}
        assert len(limits) == 1

    def test_tasks_not_merged_yet_are_white_and_unmeasured_cells_hatched(self) -> None:
        cells = heatmaps.accuracy_matrix(fake_results(gap=True), RULES[0]).axes[0].patches
        white = [cell for cell in cells if cell.get_facecolor() == (1, 1, 1, 1)]
        assert len(white) == 8 + 7 * 8 // 2  # the base, and the upper triangle
        assert len([cell for cell in cells if cell.get_hatch()]) == 8 - 3

    @pytest.mark.parametrize(("name", "drawn"), [("mnist", "mnist"), ("a$b$c", r"a\$b\$c"), ("a\nb", "a b")])
    def test_names_are_drawn_as_they_are(self, name: str, drawn: str) -> None:
        assert figures.short(name) == drawn

    def test_a_long_name_keeps_both_ends(self) -> None:
        short = figures.short("oxford_iiit_pet_with_a_very_long_task_name")
        assert len(short) == figures.MAX_NAME
        assert short.startswith("oxford")
        assert short.endswith("_name")


class TestConsole:
    @pytest.mark.parametrize(("tasks", "rules"), SIZES)
    def test_it_fits_eighty_columns_with_every_rule(self, tasks: int, rules: int) -> None:
        out = _printed(fake_results(TASKS[:tasks], RULES[:rules]))
        assert max(map(len, out.splitlines())) <= 80
        assert all(rule in out for rule in RULES[:rules])
        assert all(task[:12] in out for task in TASKS[:tasks])

    def test_markup_in_names_is_text(self) -> None:
        out = _printed(fake_results(("[red]a[/red]", "[/]"), ("[b]r",)))
        assert "[red]a[/red]" in out
        assert "[b]r" in out

    def test_failures_are_mentioned(self) -> None:
        assert "2 failed" in _printed(fake_results(failures=2))

    @pytest.mark.parametrize(
        ("fraction", "text"), [(0.755, "+75.5"), (-0.0301, "-3.0"), (-0.0001, "0.0"), (None, "\N{EN DASH}")]
    )
    def test_points_have_a_sign_and_no_minus_zero(self, fraction: float | None, text: str) -> None:
        assert percent(fraction, signed=True) == text

    def test_names_of_methods_are_readable(self) -> None:
        out = _printed(fake_methods())
        assert max(map(len, out.splitlines())) <= 80
        for name in fake_methods().rules:
            assert sum(name in line for line in out.splitlines()) >= 3, name


def _printed(results: Results) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    print_summary(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


PROX = "prox (mu 0.01); loop (epochs 1)"


@pytest.fixture(scope="module")
def methods() -> Results:
    return fake_methods()


class TestMethods:
    """A run whose methods train in ways of their own, one of which learned all tasks at once."""

    def test_plain_rules_have_no_word_about_learning(self) -> None:
        rules = {
            name: result.model_copy(update={"learning": Learning(rule=name, rounds=2, sites=3)})
            for name, result in fake_results().rules.items()
        }
        results = _without(fake_results(), rules=rules)
        assert ways(results) == []
        assert noun(results) == "rule"
        assert 'id="learning"' not in render(results)
        assert "how each was learned" not in _printed(results)

    def test_the_table_tells_start_rounds_options_and_bytes(self, methods: Results) -> None:
        (row,) = re.findall(r"<tr><td class=\"name\">fedprox\+int8</td>.*?</tr>", render(methods))
        cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        assert cells[1:5] == ["fedavg", "merged model", "2 \N{MULTIPLICATION SIGN} 3", PROX]
        assert cells[5] == 'int8 <span class="error">0.4 %</span>'
        assert cells[6:] == ["48", "1.50 MB", "80.0"]

    def test_a_setting_that_says_nothing_is_left_out(self) -> None:
        training = {"lora": {"rank": 8, "targets": "", "alpha": None}}
        learning = Learning(rule="opcm", training=training)
        rules = {"opcm": fake_results().rules["opcm"].model_copy(update={"learning": learning})}
        (way,) = ways(_without(fake_results(), rules=rules))
        assert way.trained == "lora (rank 8)"

    def test_the_summary_speaks_of_methods_and_ranks_no_ceiling(self, methods: Results) -> None:
        text = summary(methods)
        assert "4 sites learned 4 tasks by 5 methods, each of which led to one merged model" in text
        assert "fedprox+none ended highest" in text
        assert "a model that learned all tasks at once (joint) reaches" in text
        assert "joint ended" not in text

    def test_a_ceiling_alone_is_told_as_it_is(self, methods: Results) -> None:
        alone = _without(methods, rules={"joint": methods.rules["joint"]})
        assert "joint ended with a mean accuracy of" in summary(alone)
        assert render(alone)

    def test_all_tasks_at_once_is_one_merge_of_all_tasks(self, methods: Results) -> None:
        joint = methods.rules["joint"]
        assert methods.learned("joint") == [0] * len(methods.tasks)
        assert joint.accuracy_so_far == [joint.acc]
        assert (joint.bwt, joint.forgetting) == (None, None)
        assert methods.brought("joint") == ["all tasks"]

    def test_all_tasks_at_once_is_drawn_over_the_tasks_of_each_merge(self, methods: Results) -> None:
        (line,) = [
            line
            for line in figures.accuracy_over_merges(methods).axes[0].lines
            if line.get_label() == "joint"
        ]
        final = methods.final("joint")
        means = [100 * sum(final[:n]) / n for n in range(1, len(final) + 1)]  # type: ignore[arg-type]
        assert list(line.get_ydata()) == pytest.approx(means)

    def test_all_tasks_at_once_has_no_forgetting_and_stands_at_the_end(self, methods: Results) -> None:
        labels = [label.get_text() for label in heatmaps.forgetting(methods).axes[0].get_yticklabels()]
        assert labels == [name for name in methods.rules if name != "joint"]
        (line,) = [line for line in figures.norms(methods).axes[0].lines if line.get_label() == "joint"]
        drawn = [place for place, norm in zip(*line.get_data(), strict=True) if norm == norm]
        assert drawn == [len(methods.tasks)]

    def test_the_last_line_of_a_matrix_is_the_sites_own(self, methods: Results) -> None:
        ax = heatmaps.accuracy_matrix(methods, "fedprox+int8").axes[0]
        assert ax.get_yticklabels()[-1].get_text() == "at the sites"
        assert [text.get_text() for text in ax.texts][-len(methods.tasks) :] == ["80"] * len(methods.tasks)
        plain = heatmaps.accuracy_matrix(methods, "opcm").axes[0]
        assert plain.get_yticklabels()[-1].get_text() == "fine-tuned alone"

    def test_without_models_of_single_tasks_there_is_no_word_of_them(self, methods: Results) -> None:
        results = _without(methods, fine_tuned={})
        assert "fine-tuned alone" not in [
            text.get_text() for text in figures.accuracy_over_merges(results).legends[0].texts
        ]
        page = render(results)
        assert "one fine-tuned model per task" not in page
        assert "dashed line" not in page
        assert "fine-tuned for one task each" not in summary(results)


class TestBytes:
    def test_a_point_is_the_mean_update_and_the_final_accuracy(self) -> None:
        results = fake_methods()
        found = {point.name: point for point in points(results)}
        assert set(found) == set(results.rules) - {"joint"}
        point = found["fedprox+int8"]
        assert (point.family, point.compress, point.sent) == ("fedprox", "int8", 1_500_000)
        assert point.acc == pytest.approx(100 * (results.rules["fedprox+int8"].acc or 0))
        assert point.error == pytest.approx(100 * (results.sampling_error("fedprox+int8") or 0))

    def test_sizes_of_one_method_are_joined_and_named(self) -> None:
        ax = accuracy_against_bytes(fake_methods()).axes[0]
        joined = [list(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 3]
        assert joined == [[1_500_000, 3_000_000, 6_000_000]]
        assert [text.get_text() for text in ax.texts] == ["int8", "bf16", "none"]
        assert ax.get_xscale() == "log"

    def test_where_all_send_the_same_there_is_no_figure(self) -> None:
        results = fake_methods()
        same = {name: results.rules[name] for name in ("opcm", "fedprox+none")}
        assert points(_without(results, rules=same)) == []
        assert 'id="bytes"' not in render(_without(results, rules=same))
        assert 'id="bytes"' in render(results)


class TestPrivacy:
    def test_noise_comes_with_its_epsilon(self) -> None:
        results = _without(fake_methods(), privacy=PRIVACY)
        page = render(results)
        assert "clipped to an L2 norm of 1 " in page
        assert "a standard deviation of 0.3 times that bound. Statistics" in page
        assert "a bound for each kind: sketch 2." in page
        assert "at delta = 1e-05" in page
        assert '<th>whole run</th><th class="n">9.25</th>' in page
        assert "docs/privacy.md" in page
        assert "epsilon of a site's data is 9.25" in summary(results)
        assert "epsilon 9.25 at delta 1e-05" in " ".join(_printed(results).split())

    def test_without_noise_there_is_no_guarantee(self) -> None:
        results = _without(fake_methods(), privacy=PRIVACY | {"noise": 0.0})
        assert "No guarantee." in render(results)
        assert "guarantees no privacy" in summary(results)
        assert "no noise: no guarantee" in _printed(results)

    def test_without_privacy_there_is_no_word_of_it(self) -> None:
        results = fake_methods()
        assert 'id="privacy"' not in render(results)
        assert "epsilon" not in summary(results) + _printed(results)
