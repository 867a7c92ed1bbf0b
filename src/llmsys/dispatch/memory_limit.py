"""The limit on each rank's memory, `dispatch.memory_gib`, under which running out of it harms nobody else.

It is one of the kernel's, RLIMIT_DATA: on what a process has in the host's memory. On a GPU it would say nothing of the
device, whose own size is the limit there, and would stop the driver, which reserves in the host several times what it
uses; so there it is not set, and the record says so.
"""

from __future__ import annotations

import resource
from typing import Any

NOTE = "dispatch.memory_gib"
"""Under which of a record's notes it is said."""


def gib(config: dict[str, Any]) -> float | None:
    """The limit of each rank of a resolved config; None where there is none, or it is not set."""
    limit: float | None = config["dispatch"]["memory_gib"]
    return None if config["hardware"]["device"] == "cuda" else limit


def ignored(config: dict[str, Any]) -> str:
    """In a line, why a limit that was asked for is not set; "" where it is, or none was."""
    limit = config["dispatch"]["memory_gib"]
    if limit is None or gib(config) is not None:
        return ""
    return f"dispatch.memory_gib={limit:g}: not set: it limits the host's memory, and this run's limit is its GPU's"


def set_here(config: dict[str, Any]) -> None:
    """Limits this process, and what it starts, for good."""
    if (limit := gib(config)) is not None:
        size = int(limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
