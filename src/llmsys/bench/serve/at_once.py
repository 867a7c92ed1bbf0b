"""A request is written when it is made. Before Python 3.12 aiohttp leaves that to a task, which runs after all that the
event loop has to do by then: of 32 streams that begin together the first tokens came 2 ms later for it."""

from __future__ import annotations

import sys
from collections.abc import Coroutine, Generator
from typing import Any

import aiohttp


class Begun(Coroutine[Any, Any, None]):
    """`rest`, which has run already up to where it has to wait, if it has to."""

    def __init__(self, rest: Coroutine[Any, Any, None]) -> None:
        self._rest, self._waits_for, self._done = rest, None, False
        try:
            self._waits_for = rest.send(None)
        except StopIteration:
            self._done = True

    def send(self, value: Any) -> Any:
        if self._done:
            raise StopIteration
        if self._waits_for is not None:
            given, self._waits_for = self._waits_for, None
            return given
        return self._rest.send(value)

    def throw(self, *error: Any) -> Any:
        if self._done:  # there is nothing left that could be told
            raise error[0]
        return self._rest.throw(*error)

    def close(self) -> None:
        self._rest.close()

    def __await__(self) -> Generator[Any, Any, None]:
        raise NotImplementedError("it is run by a task")


class _AtOnce(aiohttp.ClientRequest):
    def write_bytes(self, *args: Any, **keys: Any) -> Begun:
        return Begun(super().write_bytes(*args, **keys))


REQUEST: type[aiohttp.ClientRequest] = aiohttp.ClientRequest if sys.version_info >= (3, 12) else _AtOnce
