"""The sites of a run: who is there, and what each said about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from fedmerge import __version__
from fedmerge.common import wire
from fedmerge.common.errors import BaseMismatch, FedmergeError
from fedmerge.common.wire import Hello
from fedmerge.server.history import History
from fedmerge.server.layout import FederationConfig, Site
from fedmerge.server.mailbox import Mailbox, Reply, Request


@dataclass(frozen=True)
class Greeted:
    """What a hello was for."""


class Roster:
    """Greets every node once and lets in those that merge over the same base with the same software.

    Args:
        base: fingerprint of the pretrained model.
        on_failure: called with a site's label, a task, a phase and a reason.

    Attributes:
        sites: those let in, by node. ``greeted``: nodes that were asked.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        base: str,
        config: FederationConfig,
        history: History,
        on_failure: Callable[[str, str, str, str], None],
    ) -> None:
        self._mailbox, self._base = mailbox, base
        self._history, self._on_failure = history, on_failure
        # A node that never says hello must not hold up a run whose tasks are done.
        self._timeout = min(config.wait_seconds, config.timeout_seconds)
        self.sites: dict[int, Site] = {}
        self.greeted: set[int] = set()

    def label(self, node: int) -> str:
        return self.sites[node].label if node in self.sites else f"node {node}"

    def greet_newcomers(self) -> None:
        """Asks nodes that have not been asked yet."""
        content = RecordDict({wire.JOB: ConfigRecord({"version": __version__})})
        for node in sorted(self._mailbox.nodes() - self.greeted):
            self.greeted.add(node)
            self._mailbox.put(Request(node, wire.HELLO, Greeted(), lambda: content, self._timeout))

    def welcome(self, reply: Reply) -> Site | None:
        """The site that has answered, if it is let in."""
        node = reply.request.node
        if reply.content is None:
            self._on_failure(f"node {node}", "", "hello", reply.reason)
            return None
        try:
            site = self._checked(node, reply.content)
        except FedmergeError as error:
            self._on_failure(f"node {node}", "", "hello", str(error))
            return None
        self.sites[node] = site
        self._history.record("joined", site=site.label, tasks=list(site.tasks))
        return site

    def _checked(self, node: int, content: RecordDict) -> Site:
        hello = wire.unpack_job(Hello, content, where=f"node {node}")
        wire.check_version(hello.version, __version__, where=hello.site)
        if hello.base != self._base:
            raise BaseMismatch(
                "another pretrained model",
                where=hello.site,
                got=hello.base[:12],
                wanted=self._base[:12],
            )
        return Site(node, hello.site, hello.tasks)
