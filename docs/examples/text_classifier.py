"""A text classifier from Hugging Face, trained with its own Trainer.

    fedmerge simulate --stream docs/examples/text_classifier.py:stream --sites 2
    task = "text_classifier.py:stream"       # in a site's client.toml

The model and its weights are made up, so that this runs anywhere. In yours, ``build_model`` is

    AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)

and ``encode`` calls the tokenizer of the same name, both loaded once.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from zlib import crc32

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig

from fedmerge.client.tasks import Stream, StreamOptions, Task, TrainingConfig

TICKETS = Path(__file__).with_name("tickets.csv")  # columns: department, text, urgent
WORDS, LENGTH = 500, 16


def stream(options: StreamOptions) -> Stream:
    return Stream(
        name="tickets",
        tasks=("support", "sales"),
        load=load,
        build_model=build_model,
        training=TrainingConfig(steps=80, batch_size=16, learning_rate=3e-3, frozen=("bert.embeddings.*",)),
    )


def build_model() -> nn.Module:
    """A tiny BERT with two classes; the same weights at every site."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
            num_labels=2,
        )
        return AutoModelForSequenceClassification.from_config(config)


class Tickets(Dataset):
    """Encoded texts and their labels, as the model takes them."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = self.rows[number]
        return {**encode(row["text"]), "labels": torch.tensor(int(row["urgent"]))}


def encode(text: str) -> dict[str, torch.Tensor]:
    """Stands in for a tokenizer: every word has a number."""
    words = [1 + crc32(word.encode()) % (WORDS - 1) for word in text.lower().split()][:LENGTH]
    ids = torch.tensor(words + [0] * (LENGTH - len(words)))
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@lru_cache
def read() -> list[dict[str, str]]:
    with TICKETS.open(newline="") as file:
        return list(csv.DictReader(file))


def load(name: str) -> Task:
    rows = [row for row in read() if row["department"] == name]
    split = len(rows) * 3 // 4
    return Task(
        name,
        train=Tickets(rows[:split]),
        test=Tickets(rows[split:]),
        loss=lambda model, batch: model(**batch).loss,
        metric=lambda model, batch: (model(**batch).logits.argmax(-1) == batch["labels"]).float(),
        labels=[int(row["urgent"]) for row in rows[:split]],
        fit=fit,
    )


def fit(model: nn.Module, task: Task, config: TrainingConfig, seed: int) -> None:
    """Trains with Hugging Face's Trainer; parameters that are not to move have no gradients already."""
    from transformers import Trainer, TrainingArguments

    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=config.steps if config.epochs is None else -1,
            num_train_epochs=config.epochs or 1,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.learning_rate,
            seed=seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=task.train).train()
