"""What a check found; :mod:`fedmerge.deploy.doctor` and :mod:`fedmerge.deploy.rehearsal` are the checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fedmerge.common.errors import FedmergeError

Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and what to do unless it is ok."""

    name: str
    verdict: Verdict
    found: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.found}. {self.do}".rstrip(". ")

    @classmethod
    def of(cls, name: str, error: FedmergeError) -> Check:
        """A failure."""
        return cls(name, "FAIL", str(error))


Checks = Iterator[Check]
