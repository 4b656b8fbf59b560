"""What sites have sent and the aggregator has not acknowledged yet, on disk.

One entry per site and task: ``KEY.safetensors`` and, once that is complete, ``KEY.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedmerge.common.errors import StoreFull
from fedmerge.common.ranges import RangeFile, RangeManifest
from fedmerge.common.writing import replacing


@dataclass(frozen=True)
class Arrived:
    """A complete vector file of a site's task. ``sha256``: of the file."""

    site: str
    task: str
    sha256: str


class Inbox:
    """The folder of arrived and arriving vectors. Raises StoreFull if it cannot be made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreFull("cannot be made", where=folder, got=error.strerror) from error
        self._arrived = {(item.site, item.task): item for item in self._found()}

    def waiting(self) -> list[Arrived]:
        """What is complete and not acknowledged, oldest first."""
        return list(self._arrived.values())

    def holds(self, site: str, task: str) -> bool:
        return (site, task) in self._arrived

    def path(self, site: str, task: str) -> Path:
        key = hashlib.sha256(f"{site}\n{task}".encode()).hexdigest()[:32]
        return self._folder / f"{key}.safetensors"

    def take(self, site: str, task: str, data: bytes) -> None:
        """Puts a vector that came in one message onto the disk. Raises FileError."""
        with replacing(self.path(site, task)) as file:
            file.write(data)
        self._complete(Arrived(site, task, hashlib.sha256(data).hexdigest()))

    def receive(self, site: str, task: str, manifest: RangeManifest) -> RangeFile:
        """The file in which a vector is put together; it goes on where an earlier transfer stopped."""
        return RangeFile(self.path(site, task), manifest)

    def finish(self, site: str, task: str, file: RangeFile) -> None:
        """Verifies a vector that has arrived in ranges. Raises StoreDamaged, MismatchError."""
        file.finish()
        self._complete(Arrived(site, task, file.manifest.sha256))

    def remove(self, item: Arrived) -> None:
        """Forgets what has been acknowledged or refused."""
        path = self.path(item.site, item.task)
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        self._arrived.pop((item.site, item.task), None)

    def _complete(self, item: Arrived) -> None:
        with replacing(self.path(item.site, item.task).with_suffix(".json")) as file:
            file.write(json.dumps(asdict(item)).encode())
        self._arrived[item.site, item.task] = item

    def _found(self) -> Iterator[Arrived]:
        for path in sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
            try:
                item = TypeAdapter(Arrived).validate_json(path.read_bytes())
            except ValidationError:
                continue
            if self.path(item.site, item.task).is_file():
                yield item
