"""Does a leaderboard say of every rule what merging by hand gives, and learn no task twice?"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_leaderboard import RULES, TASKS, board, fake_leaderboard, reference, run
from matplotlib.figure import Figure
from pydantic import ValidationError
from rich.console import Console

from fedmerge.client.site import Site, open_site
from fedmerge.client.tasks import StreamOptions
from fedmerge.common.config import validated
from fedmerge.common.errors import ConfigError, EngineError, FileError
from fedmerge.common.statistics import Statistic, Statistics
from fedmerge.common.taskvector import Dense, LowRank, TaskVector
from fedmerge.common.training import PLAIN, LocalTraining
from fedmerge.common.vectorfile import save as save_vector
from fedmerge.deploy.choices import parse_rules, parse_trained
from fedmerge.deploy.contest import arrival_orders
from fedmerge.deploy.leaderboard import LeaderboardConfig, Listener, leaderboard
from fedmerge.deploy.leaderboard_cli import leaderboard as command
from fedmerge.deploy.learned import Learner, carrying
from fedmerge.deploy.report import leaderboard_figures as figures
from fedmerge.deploy.report.leaderboard import FailedRun, Leaderboard, RuleRun, measured, save
from fedmerge.deploy.report.leaderboard_page import print_standings, render, spread, times
from fedmerge.deploy.report.standings import bounds, overall, save_standings, standings_of
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import RULES as ALL_RULES
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.average import Average
from fedmerge.server.merge.opcm import Opcm

EXAMPLE_TASKS = ("plain", "shuffled", "reversed")


def small(**settings: object) -> LeaderboardConfig:
    given = {"streams": ("example",), "seeds": (0,), "orders": 2, "rows": 40, "workers": 2} | settings
    return validated(LeaderboardConfig, given)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors that the tests of this module share, so that each is learned once."""
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture(scope="module")
def found(cache: Path) -> Leaderboard:
    return leaderboard(small(orders=3, cache=cache), [Opcm(), Average()])


@pytest.fixture(scope="module")
def page() -> str:
    return render(fake_leaderboard(RULES[:6]))


class Greedy(Average):
    """An average that promises nothing about orders, so that every run is scored."""

    name = "greedy"
    order_free = False


class Failing(Average):
    """A rule whose arithmetic breaks down at the second vector."""

    name = "failing"

    def absorb(self, state, prepared, update, context):  # type: ignore[no-untyped-def]
        if context.merges == 1:
            raise EngineError("broke down")
        return super().absorb(state, prepared, update, context)


class TestRuns:
    def test_accuracies_are_those_of_merging_and_scoring_by_hand(
        self, found: Leaderboard, cache: Path
    ) -> None:
        for entry in found.of("example", "opcm"):
            learner = Learner("example", 0, 40, EXAMPLE_TASKS, cache)
            tasks = {task.name: task for task in learner.load()}
            vectors = learner.learn(list(tasks.values()), ())
            with LocalEngine(Opcm(), learner.site.base.layers.values(), workers=1) as engine:
                for row, name in enumerate(entry.tasks):
                    engine.merge(vectors[name])
                    seen = entry.tasks[: row + 1]
                    scores = learner.site.score([tasks[task] for task in seen], engine.merged())
                    assert entry.accuracy[row] == [
                        scores[task].accuracy if task in seen else None for task in entry.tasks
                    ]
                assert entry.state_bytes == engine.state_bytes()

    def test_every_rule_runs_in_every_order_and_the_first_is_the_streams(self, found: Leaderboard) -> None:
        orders = [entry.tasks for entry in found.of("example", "opcm")]
        assert orders[0] == list(EXAMPLE_TASKS)
        assert len({tuple(order) for order in orders}) == 3
        assert orders == [entry.tasks for entry in found.of("example", "average")]

    def test_order_free_rules_are_scored_once_per_set_of_tasks_and_say_the_same(self, cache: Path) -> None:
        result = leaderboard(small(orders=6, cache=cache), [Average(), Greedy()])
        once, each = result.of("example", "average"), result.of("example", "greedy")
        assert [entry.accuracy for entry in once] == [entry.accuracy for entry in each]
        read = [seconds for entry in once for seconds in entry.read_seconds if seconds is not None]
        assert len(read) == 2**3 - 1
        assert all(seconds is not None for entry in each for seconds in entry.read_seconds)

    def test_bounds_are_the_base_and_each_tasks_own_model(self, found: Leaderboard, cache: Path) -> None:
        site = open_site("example", StreamOptions(0, 40))
        tasks = [site.stream.load(name) for name in EXAMPLE_TASKS]
        site.reset()
        zero_shot = site.score(tasks)
        (told,) = found.references
        assert told.zero_shot == {name: score.accuracy for name, score in zero_shot.items()}
        for task in tasks:
            site.learn(task, seed=0, site="by hand")
            assert told.fine_tuned[task.name] == pytest.approx(
                site.score([task])[task.name].accuracy, abs=0.02
            )

    def test_quick_scores_the_diagonal_and_the_last_row(self, found: Leaderboard, cache: Path) -> None:
        result = leaderboard(small(quick=True, cache=cache), [Opcm()])
        quick, full = result.runs[0], found.of("example", "opcm")[0]
        wanted = [[(col == row or row == 2) for col in range(3)] for row in range(3)]
        assert [[a is not None for a in row] for row in quick.accuracy] == wanted
        assert (quick.acc, quick.bwt, quick.forgetting) == (full.acc, full.bwt, None)

    def test_a_run_that_fails_is_told_and_the_others_go_on(self, cache: Path) -> None:
        told: list[FailedRun] = []
        result = leaderboard(small(cache=cache), [Failing(), Average()], Listener(failed=told.append))
        assert [(entry.rule, entry.order, entry.reason) for entry in told] == [
            ("failing", order, "EngineError: broke down") for order in range(2)
        ]
        assert result.failures == told
        assert len(result.of("example", "average")) == 2

    def test_every_seed_is_handed_over_when_it_is_complete(self, cache: Path) -> None:
        told: list[Leaderboard] = []
        leaderboard(
            small(seeds=(0, 1), orders=1, tasks=1, cache=cache), [Average()], Listener(completed=told.append)
        )
        assert [len(board.runs) for board in told] == [1, 2]

    def test_threads_are_as_before(self, cache: Path) -> None:
        torch.set_num_threads(3)
        try:
            leaderboard(small(tasks=1, orders=1, cache=cache), [Average()])
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(1)


class TestSettings:
    @pytest.mark.parametrize(
        "settings",
        [
            {"seeds": ("one",)},
            {"seeds": (-1,)},
            {"seeds": (2**63,)},
            {"seeds": ()},
            {"seeds": (1, 1)},
            {"streams": ("example", "example")},
            {"orders": 0},
            {"workers": 0},
        ],
    )
    def test_what_is_out_of_range_is_refused_by_name(self, settings: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match=rf"setting '{next(iter(settings))}"):
            small(**settings)

    def test_a_folder_that_cannot_be_made_is_told_before_anything_is_learned(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Site, "learn", None)
        (tmp_path / "file").touch()
        with pytest.raises(FileError, match="the folder cannot be made"):
            command(stream="example", rule="average", seeds="0", orders=1, out=tmp_path / "file")

    def test_more_orders_than_tasks_allow_are_refused(self) -> None:
        with pytest.raises(
            ConfigError, match="more orders than there are: got 7, wanted at most 6, of 3 tasks"
        ):
            leaderboard(small(orders=7), [Average()])

    def test_more_tasks_than_the_stream_has_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="more tasks than the stream has"):
            leaderboard(small(tasks=4), [Average()])

    def test_all_means_every_rule_with_its_options(self) -> None:
        rules = parse_rules("all", ["opcm.alpha=0.25"])
        assert [rule.name for rule in rules] == list(ALL_RULES)
        assert rules[list(ALL_RULES).index("opcm")] == make_rule("opcm", {"alpha": 0.25})

    def test_all_beside_a_name_names_each_rule_once(self) -> None:
        assert parse_rules("average,all", [])[0].name == "average"
        assert len(parse_rules("average,all", [])) == len(ALL_RULES)

    def test_an_unknown_rule_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no such merge rule"):
            parse_rules("all,nonsense", [])

    def test_rules_and_the_training_of_their_vectors_are_told_apart(self) -> None:
        settings = ["opcm.alpha=0.25", "lora.rank=2", "loop.steps=5"]
        rules, training = parse_trained("opcm,average", "lora", settings)
        assert rules == [make_rule("opcm", {"alpha": 0.25}), Average()]
        assert training == LocalTraining.chosen(["lora"], {"lora": {"rank": 2}, "loop": {"steps": 5}})
        assert parse_trained("opcm", "", ["alpha=0.25"]) == ([make_rule("opcm", {"alpha": 0.25})], PLAIN)

    @pytest.mark.parametrize(
        ("names", "settings", "said"),
        [
            ("pm", [], "no such merge rule"),
            ("opcm", ["lora.rank=2"], "not in use"),
            ("opcm", ["average.alpha=1"], "not in use"),
            ("opcm", ["privacy.noise=1"], "compared without noise"),
        ],
    )
    def test_what_has_no_place_in_a_comparison_of_rules_is_refused(
        self, names: str, settings: list[str], said: str
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            parse_trained(names, "", settings)

    def test_orders_are_drawn_by_seed_and_differ(self) -> None:
        orders = arrival_orders("abcd", 24, seed=3)
        assert len(set(orders)) == 24
        assert orders[0] == tuple("abcd")
        assert orders == arrival_orders("abcd", 24, seed=3)
        assert orders != arrival_orders("abcd", 24, seed=4)


class TestCache:
    @pytest.fixture
    def learned(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the tasks that were really learned."""
        names: list[str] = []
        learn = Site.learn

        def counted(self: Site, task, **arguments):  # type: ignore[no-untyped-def]
            names.append(task.name)
            return learn(self, task, **arguments)

        monkeypatch.setattr(Site, "learn", counted)
        return names

    def vectors(self, learner: Learner, needs: tuple[str, ...] = ()) -> dict[str, TaskVector]:
        return learner.learn(learner.load(), needs)

    def test_a_second_run_learns_nothing_and_has_the_same_bits(
        self, tmp_path: Path, learned: list[str]
    ) -> None:
        learner = Learner("example", 0, 40, EXAMPLE_TASKS[:2], tmp_path)
        needs = (Statistic.INPUT_GRAM, Statistic.FISHER)
        first, second = self.vectors(learner, needs), self.vectors(learner, needs)
        assert learned == list(EXAMPLE_TASKS[:2])
        for name, vector in first.items():
            for layer, update in vector.items():
                assert torch.equal(update.to_dense(), second[name].read(layer).to_dense())
                for statistic, values in vector.statistics(layer).items():
                    assert torch.equal(values, second[name].statistics(layer)[statistic])

    def test_without_a_folder_nothing_is_kept(self, learned: list[str]) -> None:
        learner = Learner("example", 0, 40, EXAMPLE_TASKS[:1])
        self.vectors(learner)
        self.vectors(learner)
        assert learned == ["plain", "plain"]

    def test_fewer_statistics_will_do_and_more_are_learned_again(
        self, tmp_path: Path, learned: list[str]
    ) -> None:
        learner = Learner("example", 0, 40, EXAMPLE_TASKS[:1], tmp_path)
        self.vectors(learner, (Statistic.FISHER,))
        self.vectors(learner)
        assert learned == ["plain"]
        vectors = self.vectors(learner, (Statistic.FISHER, Statistic.SECOND_MOMENT))
        assert learned == ["plain", "plain"]
        assert set(vectors["plain"].manifest.statistics) == {"fisher", "second_moment"}

    @pytest.mark.parametrize("change", [{"seed": 1}, {"rows": 41}, {"tasks": ("shuffled",)}])
    def test_another_seed_bound_or_task_is_another_file(
        self, tmp_path: Path, change: dict[str, object]
    ) -> None:
        one = Learner("example", 0, 40, ("plain",), tmp_path)
        other = replace(one, **change)  # type: ignore[arg-type]
        assert one.path(one.tasks[0]) != other.path(other.tasks[0])

    def test_other_training_options_are_another_file_and_the_site_is_asked_for_them(
        self, tmp_path: Path, learned: list[str]
    ) -> None:
        plain = Learner("example", 0, 40, ("plain",), tmp_path)
        adapters = replace(plain, training=LocalTraining.chosen(["lora"], {"lora": {"rank": 2}}))
        shorter = replace(plain, training=LocalTraining.chosen([], {"loop": {"steps": 5}}))
        paths = {learner.path("plain") for learner in (plain, adapters, shorter)}
        assert len(paths) == 3
        dense, factors = self.vectors(plain)["plain"], self.vectors(adapters)["plain"]
        assert learned == ["plain", "plain"]
        matrices = [name for name in factors.names if len(plain.site.base.layers[name].shape) > 1]
        assert matrices
        for name in matrices:
            assert isinstance(dense.read(name), Dense)
            update = factors.read(name)
            assert isinstance(update, LowRank)
            assert update.left_MR.shape[1] == 2

    def test_another_base_or_training_is_another_file(self, tmp_path: Path) -> None:
        learner = Learner("example", 0, 40, ("plain",), tmp_path)
        site, before = learner.site, learner.path("plain")
        stream = replace(site.stream, training=replace(site.stream.training, steps=61))
        changed = replace(learner)
        changed.__dict__["site"] = replace(site, stream=stream)
        assert changed.path("plain") != before
        layers = dict(site.base.layers)
        layers.popitem()
        changed.__dict__["site"] = replace(site, base=replace(site.base, layers=layers))
        assert changed.path("plain") != before

    def test_another_version_of_the_stream_or_of_fedmerge_is_another_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = Path(
            sys.modules[open_site("example", StreamOptions()).stream.build_model.__module__].__file__ or ""
        )
        copy = tmp_path / "mine.py"
        copy.write_text(source.read_text())
        learner = Learner(f"{copy}:example", 0, 40, ("plain",), tmp_path)
        before = learner.path("plain")
        copy.write_text(source.read_text() + "\n# changed\n")
        assert learner.path("plain") != before
        copy.write_text(source.read_text())
        assert learner.path("plain") == before
        monkeypatch.setattr("fedmerge.deploy.learned.__version__", "9")
        assert learner.path("plain") != before

    def test_a_folder_that_cannot_be_made_is_a_typed_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(FileError, match="cannot be made"):
            self.vectors(Learner("example", 0, 40, ("plain",), tmp_path / "file" / "cache"))


class TestUpload:
    def test_a_rule_is_given_and_charged_only_what_it_needs(self, tmp_path: Path) -> None:
        site = open_site("example", StreamOptions(0, 40))
        every = tuple(Statistic)
        vector, _ = site.learn(site.stream.load("plain"), seed=0, site="a", needs=every)
        sent = carrying(vector, {Statistic.FISHER})
        bare = carrying(vector, ())
        assert {name for layer in sent.names for name in sent.statistics(layer)} == {"fisher"}
        assert {name for layer in bare.names for name in bare.statistics(layer)} == set()
        assert isinstance(sent.statistics, Statistics)
        numel = sum(math.prod(shape) for shape in vector.shapes.values())
        assert sent.statistics.payload_bytes == 4 * numel
        grown = save_vector(sent, tmp_path / "sent") - save_vector(bare, tmp_path / "bare")
        assert sent.statistics.payload_bytes <= grown <= sent.statistics.payload_bytes + 2000


TWO = [[0.9, None], [0.7, 0.8]]  # ACC 0.75, BWT -0.2, forgetting 0.2
THREE = [[0.9, None, None], [0.95, 0.8, None], [0.7, 0.9, 0.8]]  # ACC 0.8, BWT (-0.2 + 0.1) / 2


class TestNumbers:
    def test_numbers_of_a_matrix_worked_by_hand(self) -> None:
        numbers = measured(THREE, quick=False)
        assert numbers["acc"] == pytest.approx(0.8)
        assert numbers["bwt"] == pytest.approx(-0.05)
        assert numbers["forgetting"] == pytest.approx((0.25 - 0.1) / 2)

    def test_means_go_over_orders_and_then_over_seeds(self) -> None:
        accs = {(0, 0): 0.6, (0, 1): 0.8, (1, 0): 0.9}
        runs = [run("average", [[acc]], seed=seed, order=order) for (seed, order), acc in accs.items()]
        (entry,) = standings_of(board(runs, [reference()]), "text")
        assert entry.acc == pytest.approx((0.7 + 0.9) / 2)
        assert entry.spread == pytest.approx(math.sqrt(2) * 0.1)
        assert entry.order_spread == pytest.approx(math.sqrt(2) * 0.1)

    def test_gain_compares_on_the_same_seed_and_order(self) -> None:
        opcm = {(0, 0): 0.5, (0, 1): 0.6, (1, 0): 0.9}
        runs = [run("opcm", [[acc]], seed=seed, order=order) for (seed, order), acc in opcm.items()]
        runs += [
            run("average", [[opcm[key] + gain]], seed=key[0], order=key[1])
            for key, gain in {(0, 0): 0.02, (0, 1): 0.04, (1, 0): 0.05}.items()
        ]
        average, yardstick = sorted(standings_of(board(runs, [reference()]), "text"), key=lambda s: s.rule)
        assert average.gain == pytest.approx((0.03 + 0.05) / 2)
        assert average.gain_spread == pytest.approx(math.sqrt(2) * 0.01)
        assert yardstick.gain is None

    def test_costs_are_ratios_to_base_vector_and_opcm(self) -> None:
        runs = [
            run("opcm", TWO, seconds=2.0, state_bytes=42_000_000),
            run("regmean", TWO, seconds=6.0, state_bytes=84_000_000, statistics_bytes=2 * 10_500_000),
        ]
        told = board(runs, [reference(tasks=TASKS[:2])])
        entry = next(found for found in standings_of(told, "text") if found.rule == "regmean")
        assert (entry.state_ratio, entry.upload_bytes, entry.upload_ratio) == (2.0, 10_500_000, 0.25)
        assert (entry.seconds, entry.seconds_ratio) == (6.0, 3.0)

    def test_rules_are_ranked_and_streams_count_alike(self) -> None:
        accs = {("a", "opcm"): 0.5, ("a", "average"): 0.6, ("b", "opcm"): 0.9, ("b", "average"): 0.7}
        runs = [run(rule, [[acc]], stream=stream) for (stream, rule), acc in accs.items()]
        told = board(runs, [reference("a"), reference("b")], streams=("a", "b"))
        assert [entry.rule for entry in standings_of(told, "a")] == ["average", "opcm"]
        assert [(entry.rule, entry.acc) for entry in overall(told)] == [
            ("opcm", pytest.approx(0.7)),
            ("average", pytest.approx(0.65)),
        ]
        assert overall(told)[1].gain == pytest.approx(-0.05)

    def test_a_rule_that_failed_on_a_stream_comes_last_overall(self) -> None:
        runs = [
            run("opcm", [[0.5]], stream="a"),
            run("ties", [[0.9]], stream="a"),
            run("opcm", [[0.5]], stream="b"),
        ]
        told = board(runs, [reference("a"), reference("b")], streams=("a", "b"))
        assert [(entry.rule, entry.acc) for entry in overall(told)] == [("opcm", 0.5), ("ties", None)]

    def test_one_seed_and_order_have_no_spread(self) -> None:
        (entry,) = standings_of(board([run("average", TWO)], [reference()]), "text")
        assert (entry.spread, entry.order_spread, entry.gain, entry.seconds_ratio) == (None,) * 4

    def test_bounds_are_means_over_tasks_and_seeds(self) -> None:
        other = reference(seed=1).model_copy(update={"zero_shot": dict.fromkeys(TASKS, 0.35)})
        told = board([run("average", TWO)], [reference(), other])
        assert bounds(told, "text") == (pytest.approx(0.45), pytest.approx(0.86))

    def test_runs_do_not_take_percent(self) -> None:
        with pytest.raises(ValidationError):
            RuleRun.model_validate(run("average", TWO).model_dump() | {"acc": 75.0})


class TestFiles:
    def test_every_number_is_in_the_files(self, tmp_path: Path, found: Leaderboard) -> None:
        path = save(found, tmp_path)
        assert Leaderboard.model_validate(json.loads(path.read_text())) == found
        with (tmp_path / "accuracy.csv").open() as file:
            assert len(list(csv.DictReader(file))) == 2 * 3 * (1 + 2 + 3)
        with (tmp_path / "runs.csv").open() as file:
            assert [float(line["acc"]) for line in csv.DictReader(file)] == [
                entry.acc for entry in found.runs
            ]
        with save_standings(found, tmp_path).open() as file:
            told = {line["rule"]: line for line in csv.DictReader(file)}
        assert float(told["average"]["order_spread"]) == 0.0
        assert told["opcm"]["gain"] == ""


class TestPage:
    def test_every_rule_and_stream_has_its_line_and_figures(self, page: str) -> None:
        assert all(f">{name}<" in page for name in (*RULES[:6], "text", "vision"))
        assert page.count("<svg") == page.count("</svg>") == 2 * 4
        identifiers = re.findall(r'\bid="([^"]*)"', page)
        assert len(set(identifiers)) == len(identifiers)
        assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', page)) <= set(identifiers)

    def test_nothing_is_fetched_or_run(self, page: str) -> None:
        assert not re.search(r"https?:|<script|<link|@import", page)

    def test_markup_in_names_is_text(self) -> None:
        evil = "<script>alert(1)</script>"
        failed = FailedRun(stream="text", rule="average", seed=0, order=0, reason=evil)
        page = render(
            board([run("average", TWO, tasks=(evil, "b"))], [reference(tasks=(evil, "b"))], failures=[failed])
        )
        assert "<script" not in page
        assert "&lt;script" in page

    def test_a_lonely_rule_without_spreads_is_a_page_too(self) -> None:
        page = render(board([run("average", [[0.5]])], [reference()]))
        assert "average" in page
        assert "vs opcm" not in page

    def test_training_that_is_not_the_streams_own_is_told(self) -> None:
        plain = board([run("average", [[0.5]])], [reference()])
        assert "Sites trained with" not in render(plain)
        trained = plain.model_copy(update={"training": {"lora": {"rank": 4}}, "loop": {"steps": 7}})
        assert "Sites trained with lora (rank 4); loop (steps 7)." in render(trained)

    @pytest.mark.parametrize("width", [80, 160])
    def test_the_terminal_shows_every_rule_within_its_width(self, width: int) -> None:
        console = Console(width=width, record=True, file=io.StringIO())
        print_standings(fake_leaderboard(), console)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        assert all(any(line.split()[:1] == [rule] for line in lines) for rule in RULES)

    def test_eighty_columns_are_enough_for_every_name_and_digit(self) -> None:
        accs = {0: 0.998, 1: 0.331}
        runs = [
            run(rule, [[acc, None], [acc / 4, acc]], seed=seed, seconds=4.7e-4, state_bytes=10**9)
            for rule, sign in (("opcm", 1), ("perturb_and_merge", -1), ("least_interference", -1))
            for seed, acc in ((seed, accs[seed if sign > 0 else 1 - seed]) for seed in accs)
        ]
        console = Console(width=80, record=True, file=io.StringIO())
        print_standings(board(runs, [reference()]), console)
        text = console.export_text()
        assert "…" not in text
        assert "least_interference" in text

    @pytest.mark.parametrize("figure", [figures.state_cost, figures.time_cost, figures.balance])
    @pytest.mark.parametrize("rules", [RULES, RULES[:1]])
    def test_names_in_a_figure_do_not_overlap(self, figure, rules) -> None:  # type: ignore[no-untyped-def]
        drawn: Figure = figure(fake_leaderboard(rules), "text")
        drawn.draw_without_rendering()
        texts = [text.get_window_extent() for text in drawn.axes[0].texts if text.get_text()]
        assert len(texts) == len(rules)
        pairs = [(a, b) for n, a in enumerate(texts) for b in texts[n + 1 :]]
        assert not any(a.overlaps(b) for a, b in pairs)

    def test_numbers_are_printed_with_a_few_digits(self) -> None:
        assert [times(ratio) for ratio in (None, 0.256, 2.04, 123.4)] == ["–", "0.26 ×", "2.0 ×", "123 ×"]  # noqa: RUF001
        assert [spread(value) for value in (None, 0.0123)] == ["", "± 1.2"]
