"""The aggregation service as the serving loop sees it: away now and then, never asked too often."""

from __future__ import annotations

from collections.abc import Callable

from fedmerge.common.errors import FedmergeError, NotFound
from fedmerge.common.records import AggregationService, VersionRecord, update_id
from fedmerge.server.history import History
from fedmerge.server.peers import Tries

FIRST_WAIT, LONGEST_AWAY = 5.0, 60.0
"""Seconds between two attempts to reach a service that is away."""

PAGE = 100


class Backing:
    """What a service has, looked up again and again, and how it is doing.

    Attributes:
        current: its current version; None until it has answered for the first time.
    """

    def __init__(self, service: AggregationService, history: History, clock: Callable[[], float]) -> None:
        self.service, self._history, self._clock = service, history, clock
        self.current: VersionRecord | None = None
        self._learned: set[tuple[str, str]] = set()
        self._last_seq = 0
        self._tries = Tries(FIRST_WAIT, LONGEST_AWAY)

    @property
    def away(self) -> bool:
        """Whether it is not to be asked now."""
        return self._clock() < self._tries.at

    @property
    def learned(self) -> int:
        """Tasks that it has, counted by site."""
        return len(self._learned)

    def has(self, site: str, task: str) -> bool:
        return (site, task) in self._learned

    def look(self) -> None:
        """Looks up the current version and the updates that are new."""
        if self.away:
            return
        try:
            while page := self.service.updates(self._last_seq, PAGE):
                self._learned |= {(update.site, update.task) for update in page}
                self._last_seq = page[-1].seq
                if len(page) < PAGE:
                    break
            current = self.service.version()
        except FedmergeError as error:
            self.failed(error)
            return
        if self._tries.count:
            self._history.record("reached", failures=self._tries.count)
        self._tries.worked()
        if self.current is None or model_of(current) != model_of(self.current):
            self.current = current
            self._history.record(
                "version",
                version=current.number,
                kind=str(current.kind),
                task=current.task,
                site=current.site,
            )

    def has_update(self, site: str, sha256: str) -> bool:
        """Whether it has acknowledged exactly these bytes; not if it is away."""
        if self.away:
            return False
        try:
            self.service.update(update_id(site, sha256))
        except NotFound:
            return False
        except FedmergeError as error:
            self.failed(error)
            return False
        return True

    def failed(self, error: FedmergeError) -> None:
        """It could not be reached or could not do its work; it is asked again later."""
        self._history.record("failed", site="", task="", phase="aggregator", reason=str(error))
        self._tries.failed(self._clock())


def model_of(record: VersionRecord) -> tuple[int, str]:
    """Number and hash of a version: what a site says that it holds."""
    return record.number, record.sha256
