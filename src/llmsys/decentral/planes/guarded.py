"""What a stage's framework raises, as one kind of error: so that it is told from that of a frame that does not fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from llmsys.decentral.planes import Executor

P = ParamSpec("P")
R = TypeVar("R")


class Failed(RuntimeError):
    """A plane cannot do what is its own to do: its device is out of memory, say."""


class Guarded:
    """`own`, but that whatever it raises is `Failed`. `put`'s ValueError is not: a frame does not fit."""

    def __init__(self, own: Executor) -> None:
        self.own = own
        self.put = _guarded(own.put, ValueError)
        self.begin, self.state = _guarded(own.begin), _guarded(own.state)
        self.forward, self.backward = _guarded(own.forward), _guarded(own.backward)
        self.result, self.squares = _guarded(own.result), _guarded(own.squares)
        self.apply, self.forget = _guarded(own.apply), _guarded(own.forget)

    @property
    def missing(self) -> set[str]:
        return self.own.missing


def why(error: Exception) -> str:
    """As others are told of it."""
    return (str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}")[:500]


def _guarded(call: Callable[P, R], *but: type[Exception]) -> Callable[P, R]:
    @functools.wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except but:
            raise
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error

    return called
