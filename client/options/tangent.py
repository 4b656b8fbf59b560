"""Tangent-space fine-tuning (arXiv 2509.23592): what is trained is the model's linearisation at the base.

The point of linearisation is the base for every task, wherever a run starts from; see
:mod:`fedmerge.client.linearised`. What is trained so is to be scored so. Departure: the whole model is
linearised, where the paper linearises an image encoder under a head that is fixed and linear.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from fedmerge.client.linearised import linearised
from fedmerge.client.options.option import Option, Run
from fedmerge.common.training import Tangent


class Linearisation(Option):
    """Has the model linearised for the length of a run."""

    def __init__(self, run: Run, config: Tangent) -> None:
        super().__init__(run)
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        """
        Raises:
            ConfigError: the base lacks a parameter of the model, such as an adapter's.
        """
        self._model = self._opened.enter_context(linearised(self.run.model, self.run.base))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def after_backward(self) -> None:
        """
        Raises:
            ConfigError: the task's loss does not call the model.
        """
        self._model.require_called()
