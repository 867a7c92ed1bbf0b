"""The parent's part in shaping links: a switch for the run, and, when every rank is isolated, a link for each."""

from __future__ import annotations

import dataclasses
import sys

from llmsys import schema
from llmsys.comm.link import Switch
from llmsys.dispatch.child import Child
from llmsys.job import Job


class Links:
    """Sends each child its job (`begin`), and its link when all are isolated. `close` at the end of the run."""

    def __init__(self, job: Job, children: list[Child]) -> None:
        self.job, self.children = job, children
        self.network = schema.Network(**job.config["network"])
        self._switch: Switch | None = None
        self._isolated: set[Child] = set()
        self.fault = ""
        """Why ranks that are isolated already could not be connected."""

    def begin(self) -> None:
        """The first line to each child: what to run, as which rank, and whether on a link of its own.

        Where the kernel forbids that, the ranks run on loopback; the terminal, the log and the record say so.
        """
        unshaped = ""
        if self.network.shape and self.network.up_mbit is not None and len(self.children) > 1:
            try:
                self._switch = Switch()
            except OSError as error:
                unshaped = str(error)
                print(f"network={self.network.name}: {error}; the ranks run on loopback, unshaped", file=sys.stderr)
        for child in self.children:
            child.tell(
                job=dataclasses.asdict(self.job),
                rank=child.rank,
                switch=self._switch.pid if self._switch else None,
                unshaped=unshaped,
            )

    def isolated(self, child: Child) -> None:
        """A child has a namespace of its own; when all have, they are connected and told where they are."""
        self._isolated.add(child)
        if len(self._isolated) < len(self.children):
            return
        assert self._switch is not None
        try:
            links = self._switch.connect([child.pid for child in self.children], self.network)
        except OSError as error:
            self.fault = f"network={self.network.name}: {error}"
            return
        for other, its in zip(self.children, links, strict=True):
            other.tell(link=dataclasses.asdict(its))

    def close(self) -> None:
        """Ends the switch, and with it all links."""
        if self._switch:
            self._switch.close()
