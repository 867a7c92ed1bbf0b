"""Models by shape: random at any size on any device, or loaded from safetensors.

`load` builds a model, `weights` finds, reads and writes the files, `surgery` finds layers by name, and `kernel` says
which attention kernel really ran. The names are resolved late (PEP 562), so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "chunk_loss": "chunked_loss",
    "load": "build",
    "resolve_attention": "build",
    "skeleton": "build",
    "blocks": "surgery",
    "linear_names": "surgery",
    "recompute_blocks": "surgery",
}

__all__ = ["blocks", "chunk_loss", "linear_names", "load", "recompute_blocks", "resolve_attention", "skeleton"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"llmsys.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
