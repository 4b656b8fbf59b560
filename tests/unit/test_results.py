"""Whether results survive the way to disk and back, and bad files are refused by name and field."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_results import PRIVACY, RULES, TASKS, fake_methods, fake_results
from pydantic import ValidationError

from fedmerge.common.errors import ConfigError, FileError
from fedmerge.deploy.report.results import Learning, Results, RuleResults, load, save


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def spoilt(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """A saved file with one thing changed in it."""

    def spoil(change: Callable[[dict[str, Any]], object]) -> Path:
        path = save(fake_results(), tmp_path)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return path

    return spoil


class TestRoundTrip:
    def test_saved_results_load_equal(self, tmp_path: Path) -> None:
        results = fake_results(gap=True, failures=1)
        assert load(save(results, tmp_path / "new" / "folder")) == results

    def test_how_sites_learned_is_kept(self, tmp_path: Path) -> None:
        results = fake_methods().model_copy(update={"privacy": PRIVACY})
        assert load(save(results, tmp_path)) == results

    def test_a_folder_will_do(self, tmp_path: Path) -> None:
        save(fake_results(), tmp_path)
        assert load(tmp_path) == fake_results()

    def test_options_keep_their_types(self, tmp_path: Path) -> None:
        options: dict[str, float | str | int | bool] = {"n": 1, "x": 1.0, "on": True, "how": "svd"}
        first, second = RULES[:2]
        results = fake_results()
        rules = results.rules | {first: results.rules[second].model_copy(update={"options": options})}
        loaded = load(save(results.model_copy(update={"rules": rules}), tmp_path)).rules[first].options
        assert [(key, type(value), value) for key, value in loaded.items()] == [
            (key, type(value), value) for key, value in options.items()
        ]

    def test_equal_results_are_equal_bytes(self, tmp_path: Path) -> None:
        first, second = (save(fake_results(), tmp_path / name).read_bytes() for name in ("a", "b"))
        assert first == second


class TestTables:
    def test_accuracy_has_one_line_per_rule_merge_and_task(self, tmp_path: Path) -> None:
        results = fake_results(gap=True)
        save(results, tmp_path)
        lines = _lines(tmp_path / "accuracy.csv")
        assert len(lines) == 4 * 8 * 8
        assert lines[1] == {
            "rule": RULES[0],
            "merge": "1",
            "merged_task": TASKS[0],
            "task": TASKS[1],
            "accuracy": str(results.rules[RULES[0]].accuracy[0][1]),
        }

    def test_what_was_not_measured_is_empty(self, tmp_path: Path) -> None:
        save(fake_results(gap=True), tmp_path)
        last = [line for line in _lines(tmp_path / "accuracy.csv") if line["merge"] == "8"]
        assert {line["task"] for line in last if line["accuracy"] == ""} == {TASKS[1]}

    def test_merges_has_one_line_per_rule_and_merge(self, tmp_path: Path) -> None:
        results = fake_results()
        save(results, tmp_path)
        lines = _lines(tmp_path / "merges.csv")
        merge = results.rules[RULES[1]].merges[2]
        assert len(lines) == 4 * 8
        assert lines[8 + 2] == {
            "rule": RULES[1],
            "merge": "3",
            "version": "3",
            "task": TASKS[2],
            "sites": "site-03",
            "examples": "2000",
            "scale": str(merge.scale),
            "lambda_t": str(merge.lambda_t),
            "update_norm": str(merge.update_norm),
            "merged_norm": str(merge.merged_norm),
            "seconds_absorb": str(merge.seconds["absorb"]),
            "seconds_read": str(merge.seconds["read"]),
        }


class TestBadFiles:
    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match=r"gone\.json: cannot be read \(No such file"):
            load(tmp_path / "gone.json")

    @pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[1]"])
    def test_not_a_json_object(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "results.json"
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"results\.json: is not (a )?JSON"):
            load(path)

    def test_another_format(self, spoilt: Callable[..., Path]) -> None:
        path = spoilt(lambda content: content.update(format="fedmerge.results/2"))
        with pytest.raises(
            FileError, match=r"got format 'fedmerge\.results/2', wanted 'fedmerge\.results/1'"
        ):
            load(path)

    def test_unknown_field_is_refused_with_a_suggestion(self, spoilt: Callable[..., Path]) -> None:
        path = spoilt(lambda content: content.update(zero_shots={}))
        with pytest.raises(
            ConfigError, match=r"results\.json: field 'zero_shots': .*Did you mean 'zero_shot'\?"
        ):
            load(path)

    def test_missing_field_is_named(self, spoilt: Callable[..., Path]) -> None:
        with pytest.raises(ConfigError, match=r"results\.json: field 'seed': Field required"):
            load(spoilt(lambda content: content.pop("seed")))

    def test_field_deep_inside_is_named(self, spoilt: Callable[..., Path]) -> None:
        path = spoilt(lambda content: content["rules"]["opcm"]["merges"][2].update(examples=-1))
        with pytest.raises(ConfigError, match=r"field 'rules\.opcm\.merges\.2\.examples'"):
            load(path)

    def test_percent_instead_of_fractions_is_refused(self, spoilt: Callable[..., Path]) -> None:
        with pytest.raises(ConfigError, match=r"field 'zero_shot\.sun397'"):
            load(spoilt(lambda content: content["zero_shot"].update(sun397=48.1)))

    def test_unknown_task_is_refused(self, spoilt: Callable[..., Path]) -> None:
        with pytest.raises(ConfigError, match=r"zero_shot names unknown tasks: \['imagenet'\]"):
            load(spoilt(lambda content: content["zero_shot"].update(imagenet=0.5)))

    def test_row_of_another_length_is_refused(self, spoilt: Callable[..., Path]) -> None:
        with pytest.raises(ConfigError, match=r"rules\.ties\.accuracy, merge 2: 7 entries for 8 tasks"):
            load(spoilt(lambda content: content["rules"]["ties"]["accuracy"][1].pop()))

    def test_merge_without_its_row_is_refused(self, spoilt: Callable[..., Path]) -> None:
        with pytest.raises(ConfigError, match=r"field 'rules\.ties': .*accuracy has 7 rows for 8 merges"):
            load(spoilt(lambda content: content["rules"]["ties"]["accuracy"].pop()))

    def test_date_that_is_none_is_refused(self, spoilt: Callable[..., Path]) -> None:
        with pytest.raises(ConfigError, match=r"field 'started'"):
            load(spoilt(lambda content: content.update(started="yesterday")))


class TestResults:
    def test_results_do_not_change(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            fake_results().seed = 3  # type: ignore[misc]

    def test_numbers_come_from_the_matrix(self) -> None:
        merges = fake_results(TASKS[:2], RULES[:1]).rules[RULES[0]].merges
        result = RuleResults.measured(TASKS[:2], [[0.9, 0.1], [0.6, 0.8]], merges)
        assert (result.acc, result.bwt, result.forgetting) == pytest.approx((0.7, -0.3, 0.3))
        assert result.accuracy_so_far == pytest.approx([0.9, 0.7])

    def test_all_tasks_at_once_are_learned_by_one_merge(self) -> None:
        merges = fake_results(TASKS[:2], RULES[:1]).rules[RULES[0]].merges[:1]
        joint = Learning(rule="average", joint=True)
        result = RuleResults.measured(TASKS[:2], [[0.9, 0.5]], merges, learning=joint)
        assert result.learned(TASKS[:2]) == [0, 0]
        assert (result.acc, result.bwt, result.forgetting) == (pytest.approx(0.7), None, None)
        assert result.accuracy_so_far == pytest.approx([0.7])
        plain = RuleResults.measured(TASKS[:2], [[0.9, 0.5]], merges)
        assert (plain.learned(TASKS[:2]), plain.accuracy_so_far) == ([0, None], [0.9])

    @pytest.mark.parametrize(
        "change",
        [
            {"start": "merged"},
            {"joint": True},
            {"training": {"tangent": {}}},
            {"loop": {"epochs": 1}},
            {"compress": "int8"},
        ],
    )
    def test_learning_is_plain_without_any_departure(self, change: dict[str, Any]) -> None:
        assert Learning(rule="opcm", rounds=5, sites=3, epsilon=1.0).plain
        assert not Learning(rule="opcm", **change).plain

    def test_final_is_the_last_row_or_unmeasured(self) -> None:
        results = fake_results(TASKS[:2], RULES[:1])
        empty = results.model_copy(update={"rules": {"none": RuleResults.measured(TASKS[:2], [], [])}})
        assert results.final(RULES[0]) == results.rules[RULES[0]].accuracy[-1]
        assert empty.final("none") == [None, None]

    def test_a_task_named_twice_is_refused(self) -> None:
        content = fake_results(TASKS[:2]).model_dump() | {"tasks": [TASKS[0], TASKS[0]]}
        with pytest.raises(ValidationError, match="tasks named twice"):
            Results.model_validate(content)
