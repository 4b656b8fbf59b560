"""A serving loop over a grid in this process, a service in memory and a clock that is moved by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from fake_service import FakeService
from local_grid import FakeClock, Fault, LocalGrid, site

from fedmerge.client.config import SiteConfig
from fedmerge.client.state import SiteState
from fedmerge.common.base import Base
from fedmerge.deploy.streams.example import build_model
from fedmerge.server.history import Event, History
from fedmerge.server.learning import NOTHING_MORE, Teaching
from fedmerge.server.peers import ServingSettings
from fedmerge.server.serving import Serving

STEP_SECONDS = 5.0


@cache
def base() -> Base:
    return Base.from_model(build_model())


class Bench:
    """A server and its sites. Every :meth:`step` is one look at the grid, five seconds after the last.

    Attributes:
        folder: of the server; each site has ``folder / LABEL``. ``service``, ``clock``, ``grid``: as named.
    """

    def __init__(
        self, folder: Path, *faults: Fault, teaching: Teaching = NOTHING_MORE, **settings: object
    ) -> None:
        self.folder, self.clock, self._teaching = folder, FakeClock(), teaching
        self.service = FakeService(base().fingerprint)
        self.grid = LocalGrid({}, faults, clock=self.clock)
        self.settings = ServingSettings(**{"evaluate": False, **settings})
        self.history = History()
        self.server = self.restart()

    def restart(self) -> Serving:
        """Another server in the place of this one, which is not told about it."""
        self.server = Serving(
            self.grid,
            base().fingerprint,
            self.service,
            self.settings,
            self.history,
            self.folder / "server",
            clock=self.clock,
            teaching=self._teaching,
        )
        return self.server

    def join(self, node: int, label: str, *tasks: str, name: str = "", **options: object) -> None:
        self.grid.join(node, site(label, *tasks, state=self.folder / label, **options), name)

    def state(self, label: str) -> SiteState:
        return SiteState(self.folder / label)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.server.step()
            self.clock.now += STEP_SECONDS

    def until(self, true: Callable[[], object], steps: int = 400) -> None:
        """Steps until something holds."""
        for _ in range(steps):
            if true():
                return
            self.step()
        raise AssertionError(f"not within {steps} steps; the last events: {self.history.events[-12:]}")

    def settle(self, steps: int = 40) -> None:
        """Steps for a while, by default longer than any first retry and several hellos."""
        self.step(steps)

    def of(self, event: str, **facts: object) -> list[Event]:
        return [e for e in self.history.of(event) if all(e.get(key) == value for key, value in facts.items())]

    def failures(self, phase: str) -> list[tuple[str, str]]:
        return [(event["site"], event["reason"]) for event in self.of("failed", phase=phase)]

    def learned(self) -> list[tuple[str, str]]:
        """(site, task) of every update the service has, in order."""
        return [(record.site, record.task) for record in self.service.submitted]

    def sent(self, kind: str, node: int | None = None) -> int:
        """How many messages of a type have left, to one node or to all."""
        return sum(
            m.metadata.message_type == kind and node in (None, m.metadata.dst_node_id)
            for m in self.grid.pushed
        )


__all__ = ["STEP_SECONDS", "Bench", "Fault", "SiteConfig", "base"]
