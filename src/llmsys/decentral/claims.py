"""What an owner says of a step that it has computed, before anybody can know who will compute it again.

Of all that other stages have sent it, and of all that it has sent to them, a BLAKE2b hash for each of these stages. Two
neighbours that speak of the same tensors say the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from llmsys.decentral.wire import Array

Hashes = dict[int, dict[str, bytes]]
"""By stage, and by what it is."""


class Claims:
    """Of the step that was begun last, and what has come for the next. Of tensors as they travel."""

    def __init__(self) -> None:
        self.step = 0
        self._came: dict[int, Hashes] = {}
        self._sent: Hashes = {}

    def begin(self, step: int) -> None:
        self.step, self._sent = step, {}
        self._came = {at: own for at, own in self._came.items() if at >= step}

    def give_up(self) -> None:
        """Of the step that was begun last: all of it comes again."""
        self._came = {at: own for at, own in self._came.items() if at < self.step}
        self.step = 0

    def came(self, step: int, stage: int, what: str, array: Array | None) -> None:
        """From that stage; None: it said that there is none."""
        self._came.setdefault(step, {}).setdefault(stage, {})[what] = _hashed(array)

    def sent(self, stage: int, what: str, array: Array | None) -> None:
        """To that stage."""
        self._sent.setdefault(stage, {})[what] = _hashed(array)

    def told(self) -> dict[str, Any]:
        """Hashes by stage, as JSON has it."""
        both = {"came": self._came.get(self.step, {}), "sent": self._sent}
        return {key: {str(stage): _all(own) for stage, own in sorted(each.items())} for key, each in both.items()}


def hashed(state: Mapping[str, Array]) -> str:
    """Of a stage's state."""
    return _all({name: _hashed(array) for name, array in state.items()})


def _hashed(array: Array | None) -> bytes:
    if array is None:
        return b""
    layout = f"{array.dtype} {array.shape} {array.order} {array.expanded} "
    made = hashlib.blake2b(layout.encode(), digest_size=16)
    made.update(array.data)
    return made.digest()


def _all(hashes: Mapping[str, bytes]) -> str:
    made = hashlib.blake2b(digest_size=16)
    for name, each in sorted(hashes.items()):
        made.update(f"{len(name)} {name} {len(each)} ".encode())
        made.update(each)
    return made.hexdigest()
