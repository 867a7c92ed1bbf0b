"""Models by shape: random at any size on any device, or loaded from safetensors.

`load` builds a model, `weights` finds, reads and writes the files, `surgery` finds layers by name, and `kernel` says
which attention kernel really ran. The names are resolved late (PEP 562), so that importing the package costs nothing.
"""

from __future__ import annotations

from llmsys import lazy

_HOMES = {
    "chunk_loss": "chunked_loss",
    "load": "build",
    "resolve_attention": "build",
    "skeleton": "build",
    "unfilled": "build",
    "blocks": "surgery",
    "linear_names": "surgery",
    "recompute_blocks": "surgery",
}

__all__ = [
    "blocks",
    "chunk_loss",
    "linear_names",
    "load",
    "recompute_blocks",
    "resolve_attention",
    "skeleton",
    "unfilled",
]

__getattr__ = lazy.attributes(__name__, _HOMES)
