"""The first line to each rank: what to run, as which rank, where it meets the others, and over which link.

Where links are shaped there is a switch for the run, and, when every rank is isolated, a link for each.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.comm.link import Switch
from llmsys.dispatch.child import Child
from llmsys.job import Job

if TYPE_CHECKING:
    from llmsys.dispatch.follow import Rank


class Unshaped:
    """Links as they are. `places`: of each rank by its number, what it is told of its machine (`worker.Placed`)."""

    fault = ""
    """Why ranks that are isolated already could not be connected."""

    def __init__(self, job: Job, ranks: Sequence[Rank], places: Sequence[dict[str, Any]]) -> None:
        self.job, self.ranks, self.places = job, ranks, places
        self.network = schema.Network(**job.config["network"])

    @property
    def wanted(self) -> bool:
        """Whether the ranks are to be on links of certain rates."""
        return self.network.shape and self.network.up_mbit is not None and len(self.ranks) > 1

    def begin(self) -> None:
        self._tell("the links between these nodes are as they are" if self.wanted else "", None)

    def _tell(self, unshaped: str, switch: int | None) -> None:
        if unshaped:
            print(f"network={self.network.name}: {unshaped}; the ranks run unshaped", file=sys.stderr)
        for rank in self.ranks:
            rank.tell(
                job=dataclasses.asdict(self.job),
                rank=rank.rank,
                switch=switch,
                unshaped=unshaped,
                placed=self.places[rank.rank],
            )

    def isolated(self, rank: Rank) -> None:
        """A rank has a namespace of its own."""
        raise AssertionError("a rank without a switch is isolated")

    def close(self) -> None:
        """At the end of the run."""


class Links(Unshaped):
    """Of processes on this machine, that are on loopback where nothing is to be shaped."""

    def __init__(self, job: Job, children: Sequence[Child]) -> None:
        super().__init__(job, children, [{}] * len(children))
        self.children = children
        self._switch: Switch | None = None
        self._isolated: set[int] = set()

    def begin(self) -> None:
        """Where the kernel forbids to shape links, the terminal, the log and the record say so."""
        unshaped = ""
        if self.wanted:
            try:
                self._switch = Switch()
            except OSError as error:
                unshaped = str(error)
        self._tell(unshaped, self._switch.pid if self._switch else None)

    def isolated(self, rank: Rank) -> None:
        """When all have a namespace of their own, they are connected and told where they are."""
        self._isolated.add(rank.rank)
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
