"""Functions that `torch.compile` calls and does not trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """As `torch.compiler.disable`: under `torch.compile` a call into uncompiled code, at which the graph breaks. That
    imports the compiler where it decorates, which takes a second of a process that may never compile; this does not.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        out: R = torch.compiler.disable(function)(*args, **kwargs)  # only ever traced, in the compiler's process
        return out

    return called
