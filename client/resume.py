"""Where a training run stands, on disk, so that a restarted client goes on from there.

One safetensors file, ``run.safetensors``: all tensors of the run, and as metadata ``format``, ``key`` (which
run it is of) and ``sha256`` (of the tensors' names and bytes). It is replaced whole, so that a crash leaves
the one before. A file that cannot be used is never an error: training then starts anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedmerge.common.checkpoint import tensor_bytes, tensor_reader
from fedmerge.common.errors import FileError
from fedmerge.common.header import read_header
from fedmerge.common.writing import make_folder, write_checkpoint

FORMAT = "fedmerge.run/1"

logger = logging.getLogger("fedmerge.client")


@dataclass(frozen=True)
class RunCheckpoint:
    """A folder for the state of one run at a time.

    Attributes:
        key: a hash of everything that the run's result depends on and that its settings do not tell: the
            weights it starts from, the data, the software.
        every: steps between two writes, at least 1.
    """

    folder: Path
    key: str
    every: int = 50

    @property
    def path(self) -> Path:
        return self.folder / "run.safetensors"

    def due(self, step: int) -> bool:
        """Whether the state is written after this step."""
        return step % self.every == 0

    def write(self, state: Mapping[str, Tensor], about: str) -> None:
        """Puts a state in place of the one before; says so in the log if the disk refuses.

        Args:
            about: the run's settings, as text.
        """
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}
        metadata = {"format": FORMAT, "key": self._key(about), "sha256": _digest(held)}
        try:
            make_folder(self.folder)
            write_checkpoint(self.path, layout, held.__getitem__, metadata)
        except FileError as error:
            logger.warning("training goes on, but could not be resumed: %s", error)

    def read(self, about: str) -> dict[str, Tensor] | None:
        """The state of exactly this run, on the CPU; None if there is none that can be used."""
        if not self.path.is_file():
            return None
        try:
            header, read = read_header(self.path), tensor_reader(self.path)
            if (header.metadata.get("format"), header.metadata.get("key")) != (FORMAT, self._key(about)):
                logger.info("training starts anew: %s is of another run", self.path)
                return None
            state = {name: read(name) for name in header.layout}
        except FileError as error:
            logger.warning("training starts anew: %s", error)
            return None
        if header.metadata.get("sha256") != _digest(state):
            logger.warning("training starts anew: %s is damaged", self.path)
            return None
        return state

    def finish(self) -> None:
        """Removes the state, once the run's result is safe."""
        self.path.unlink(missing_ok=True)

    def _key(self, about: str) -> str:
        return hashlib.sha256(f"{self.key}\n{about}".encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
