"""What a pure function found of a config, kept for the next time it is asked: advice asks about hundreds of configs of
which many differ in nothing that the function reads.

Configs are not hashable, for they can be changed, so a key is the text of what is read. Whoever gets a kept value must
not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Given = TypeVar("Given")
Found = TypeVar("Found")


class Kept(Generic[Given, Found]):
    """`function` of one argument, whose last `most` results are kept by `key`."""

    def __init__(self, function: Callable[[Given], Found], key: Callable[[Given], Hashable], most: int) -> None:
        self._function, self._key, self._most = function, key, most
        self._found: dict[Hashable, Found] = {}

    def __call__(self, given: Given) -> Found:
        key = self._key(given)
        if key in self._found:
            self._found[key] = self._found.pop(key)  # the last one asked for
            return self._found[key]
        if len(self._found) >= self._most:
            del self._found[next(iter(self._found))]
        self._found[key] = found = self._function(given)
        return found
