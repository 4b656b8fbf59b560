"""Does docs/methods.md say of every method and training option what the code says?"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

from fedmerge.common import training
from fedmerge.common.compression import Compression
from fedmerge.common.statistics import Statistic
from fedmerge.common.training import OPTIONS, WITHOUT_ADAPTERS, Correction, LocalTraining, Loop
from fedmerge.server import methods
from fedmerge.server.merge import RULES
from fedmerge.server.methods import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
METHODS = {cells[0]: cells for cells in re.findall(r"^\| `(\w+)` \|" + 5 * r" (.*?) \|" + "$", PAGE, re.M)}
STARTS = {"base": "the base", "merged": "the merged model"}
SENT = {
    "-": frozenset(),
    "diagonal Fisher": {Statistic.FISHER},
    "input Grams": {Statistic.INPUT_GRAM},
    "AdamW's second moments": {Statistic.SECOND_MOMENT},
    "sketches": {Statistic.SKETCH, Statistic.RESIDUAL},
}


def section(title: str) -> str:
    """The text under a heading, down to the next."""
    return re.split(r"^##+ ", PAGE.split(f"# {title}\n")[1], flags=re.M)[0]


def named(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


SETTINGS = {
    cells[0]: cells
    for cells in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", section("Training options"), re.M)
}


def papers_are_those_of(module: ModuleType, cell: str) -> bool:
    return all(number in (module.__doc__ or "") for number in re.findall(r"\[(\d{4}\.\d{5})\]", cell))


def worth(text: str) -> object:
    """A default as the table writes it."""
    if text in ("none", '""'):
        return {"none": None, '""': ""}[text]
    return text if text.isalpha() else float(Fraction(text))


def test_every_method_and_option_has_its_row() -> None:
    assert set(METHODS) == set(PRESETS)
    assert list(SETTINGS) == list(OPTIONS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_tells_what_the_method_is(name: str) -> None:
    _, paper, rule, start, trained, sent = METHODS[name]
    preset = PRESETS[name]
    assert named(rule) == [preset.rule]
    assert start == STARTS[preset.start]
    assert named(trained) == list(preset.options)
    assert SENT[sent] == RULES[preset.rule].needs
    assert papers_are_those_of(methods, paper)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_tells_an_options_settings_and_their_defaults(name: str) -> None:
    _, paper, told = SETTINGS[name]
    fields = type(getattr(LocalTraining.chosen([name]), name)).model_fields
    defaults = {setting: worth(value) for setting, value in re.findall(r"`(\w+)` (\S+?)(?:,|$)", told)}
    assert defaults == {setting: field.default for setting, field in fields.items()}
    for number in re.findall(r"\[(\d{4}\.\d{5})\]", paper):
        assert number in Path(training.__file__).read_text()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_paragraph_explains_every_setting_of_an_option(name: str) -> None:
    (paragraph,) = re.findall(rf"^\*\*`{name}`\*\* .*?\n\n", PAGE, re.M | re.S)
    fields = type(getattr(LocalTraining.chosen([name]), name)).model_fields
    assert set(fields) - {"dropout"} <= set(named(paragraph))


def test_all_settings_of_the_loop_and_of_corrections_are_listed() -> None:
    assert set(Loop.model_fields) <= set(named(section("The loop")))
    (told,) = re.findall(r"^- \*\*`holistic`\*\*.*?\n(?=- )", PAGE, re.M | re.S)
    assert set(Correction.model_fields) <= set(named(told))


def test_the_exceptions_are_told() -> None:
    (row,) = re.findall(r"^\| `lora` with (.*?) \| refused", PAGE, re.M)
    assert set(named(row)) == set(WITHOUT_ADAPTERS)
    uniform = {name for name, preset in PRESETS.items() if preset.weights == "uniform"}
    (told,) = re.findall(r"^- (.*?) count the sites of a task alike", PAGE, re.M)
    assert set(named(told)) == uniform


def test_every_way_to_compress_that_is_listed_is_one() -> None:
    listed = re.findall(r"^\| (`.*?`) \|", section("Smaller updates"), re.M)
    ways = [way.replace(":E", ":0.9") for cell in listed for way in named(cell)]
    assert len(ways) == 6
    for way in ways:
        assert str(Compression.parse(way)) == way
