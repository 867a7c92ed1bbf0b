"""How many bytes a broker has passed on or kept, for whom: measured, where providers could say anything."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from llmsys.decentral.events import Began, Committed, Event, Planned


class Traffic:
    """By provider: bytes that it has sent, and bytes of others' copies that it was given to keep, since an event last
    took them along. Those of a step that is given up are no event's."""

    def __init__(self) -> None:
        self._sent = collections.Counter[str]()
        self._copies = collections.Counter[str]()
        self._under_way = False

    def passed(self, head: Mapping[str, Any], nbytes: int) -> None:
        """A frame with this header, which the broker has passed on or taken."""
        self._sent[head["sender"]] += nbytes
        if head["kind"] == "state" and "keep" in head["body"]:
            self._copies[head["to"]] += nbytes

    def taken(self, event: Event, names: frozenset[str]) -> dict[str, list[int]]:
        """What goes with an event: (sent, copies) of those of `names` that have any."""
        if not isinstance(event, Began | Committed | Planned):
            return {}
        given_up = isinstance(event, Planned) and self._under_way
        found = {name: [self._sent[name], self._copies[name]] for name in sorted(names & {*self._sent, *self._copies})}
        self._under_way = isinstance(event, Began)
        self._sent.clear()
        self._copies.clear()
        return {} if given_up else found
