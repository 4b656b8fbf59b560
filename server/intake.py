"""Taking updates in: admitted, staged, acknowledged, or refused and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from fedmerge.common.base import Base
from fedmerge.common.errors import Busy, Duplicate, FedmergeError, FileError, MismatchError, StoreError
from fedmerge.common.hashing import SHA256
from fedmerge.common.names import check_site_name
from fedmerge.common.records import Receipt, Refusal, UpdateRecord, UpdateState, update_id
from fedmerge.server.admission import (
    Admitted,
    BaseNorms,
    Limits,
    admit_update,
    check_held,
    check_queue,
    check_quota,
    check_size,
    needs_approval,
)
from fedmerge.server.merge.rule import Rule
from fedmerge.server.store.blobs import Blob, Incoming

if TYPE_CHECKING:
    from fedmerge.server.audit import Audit
    from fedmerge.server.library import Library
    from fedmerge.server.metrics import Metrics
    from fedmerge.server.store.ledger import Ledger

DAY = 86_400.0

MOST_BYTES = 2**63 - 1
"""The largest size that the ledger can hold."""


class Upload:
    """One update on its way in.

    Attributes:
        known: its receipt, if it was acknowledged before; then nothing need be sent.
    """

    def __init__(
        self, intake: Intake, site: str, announced: Blob, known: Receipt | None, incoming: Incoming | None
    ) -> None:
        self.known = known
        self._intake, self._site, self._announced, self._incoming = intake, site, announced, incoming

    def write(self, chunk: bytes | memoryview) -> None:
        """Appends a chunk. Raises TooLarge for more bytes than announced; StoreFull."""
        if self._incoming is not None:
            self._incoming.write(chunk)
            self._intake.metrics.received(memoryview(chunk).nbytes)

    def finish(self) -> Receipt:
        """Admits, stages and acknowledges; when this returns, the update survives a crash.

        Raises:
            FedmergeError: it was refused, or could not be written.
        """
        if self.known is not None:
            return self.known
        assert self._incoming is not None
        return self._intake.take_in(self._site, self._incoming, self._announced)


class Intake:
    """Lets updates in from any thread.

    Args:
        norms: of the base, which updates are measured against. ``rule``: whose statistics they must bring.
        on_staged: called when an update waits to be merged.
    """

    def __init__(
        self,
        base: Base,
        norms: BaseNorms,
        rule: Rule,
        limits: Limits,
        ledger: Ledger,
        library: Library,
        audit: Audit,
        metrics: Metrics,
        clock: Callable[[], float],
        on_staged: Callable[[], None],
    ) -> None:
        self.metrics = metrics
        self._base, self._norms, self._rule, self._limits = base, norms, rule, limits
        self._ledger, self._library, self._audit = ledger, library, audit
        self._clock, self._on_staged = clock, on_staged

    @contextmanager
    def receive(self, site: str, size: int, sha256: str) -> Iterator[Upload]:
        """Takes an update in piece by piece; what is not finished when the block ends leaves no trace."""
        check_site_name(site)
        if not SHA256.fullmatch(sha256):
            raise FileError("not a SHA-256", where=f"update of {site}", wanted="64 hex digits")
        announced = Blob(sha256, size)
        known = self._known(site, sha256)
        if known is not None:
            yield Upload(self, site, announced, known, None)
            return
        with self._refusing(site, announced):
            check_size(size, self._limits, where=f"update of {site}")
            self._check_room(site, size, self._is_held(site))
        with self._library.receive(size) as incoming, self.metrics.upload():
            yield Upload(self, site, announced, None, incoming)

    def take_in(self, site: str, incoming: Incoming, announced: Blob) -> Receipt:
        """Admits, stages and acknowledges what has arrived in full."""
        started = time.perf_counter()
        blob = Blob(incoming.sha256, incoming.size)
        with self._refusing(site, blob) as about:
            if blob != announced:
                raise MismatchError(
                    "not what was announced", where=f"update of {site}", got=blob, wanted=announced
                )
            self._refuse_copy(blob.sha256, site)
            version = self._ledger.current().number
            admitted = admit_update(
                incoming.path,
                self._base,
                self._norms,
                self._limits,
                current_version=version,
                site=site,
                rules=[self._rule],
            )
            about["task"] = admitted.manifest.task
            self.metrics.took("admit", time.perf_counter() - started)
            record, again = self._stage(site, incoming, blob, admitted)
        if not again:
            self._audit.note(
                "admitted", site, update=record.id, task=record.task, bytes=record.size, state=record.state
            )
            self._on_staged()
        self.metrics.acknowledged(again=again, held=record.state is UpdateState.HELD)
        return Receipt(record.id, record.state, record.version, again=again)

    def _known(self, site: str, sha256: str) -> Receipt | None:
        """The receipt of an update that was acknowledged before."""
        found = self._ledger.update(update_id(site, sha256))
        if found is None or found.state is UpdateState.FAILED:
            return None
        self.metrics.acknowledged(again=True)
        return Receipt(found.id, found.state, found.version, again=True)

    def _check_room(self, site: str, size: int, held: bool) -> None:
        """Refuses what would be one too many, of this site or of all."""
        if held:
            check_held(self._ledger.count(UpdateState.HELD), self._limits)
        else:
            check_queue(self._ledger.count(UpdateState.STAGED), self._limits)
        used = self._ledger.site_usage(site, self._clock() - DAY)
        check_quota(*used, size, self._limits, where=f"update of {site}")

    def _is_held(self, site: str) -> bool:
        return needs_approval(self._limits, new_site=not self._ledger.has_merged(site))

    def _stage(
        self, site: str, incoming: Incoming, blob: Blob, admitted: Admitted
    ) -> tuple[UpdateRecord, bool]:
        """The update's row; whether another upload of the same bytes was faster."""
        with self._library.naming:
            found = self._ledger.update(update_id(site, blob.sha256))
            if found is not None and found.state is not UpdateState.FAILED:
                return found, True
            self._refuse_copy(blob.sha256, site)
            held = self._is_held(site)
            self._check_room(site, blob.size, held)
            incoming.seal()
            try:
                if found is not None:
                    return self._ledger.restage(found.id, self._clock()), False
                record = self._ledger.add_update(
                    site,
                    admitted.manifest.task,
                    UpdateState.HELD if held else UpdateState.STAGED,
                    blob.sha256,
                    blob.size,
                    admitted.examples,
                    admitted.manifest.origin_version,
                    admitted.norm,
                    self._clock(),
                )
            except BaseException:
                self._library.discard_unnamed(blob.sha256)
                raise
        return record, False

    def _refuse_copy(self, sha256: str, site: str) -> None:
        found = self._ledger.update_with_content(sha256)
        if found is not None and found.site != site:
            raise Duplicate("an exact copy of another site's update", where=f"update of {site}")

    @contextmanager
    def _refusing(self, site: str, blob: Blob) -> Iterator[dict[str, str]]:
        """Records why an update was not let in; a full queue or disk is no fault of the update."""
        about = {"task": ""}
        try:
            yield about
        except (Busy, StoreError) as error:
            self.metrics.refused(error)
            raise
        except FedmergeError as error:
            kind, reason = type(error).__name__, str(error)
            self.metrics.refused(error)
            refusal = Refusal(
                self._clock(), site, about["task"], blob.sha256, min(blob.size, MOST_BYTES), kind, reason
            )
            with suppress(FedmergeError):
                self._ledger.add_refusal(refusal)
            self._audit.note("refused", site, sha256=blob.sha256, bytes=blob.size, error=kind, reason=reason)
            raise
