"""Real text for training: read and checked by `open`, turned into tensors by `encode`, visited in the order of `order`.

`open` needs no torch and no tokenizer, so everything that can be wrong with the data is said before a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsys.data.examples import Example, Source
from llmsys.data.sampling import order
from llmsys.data.sources import content_hash, open

if TYPE_CHECKING:
    from llmsys.data.batches import Dataset, Encoded, Split, encode

__all__ = ["Dataset", "Encoded", "Example", "Source", "Split", "content_hash", "encode", "open", "order"]


def __getattr__(name: str) -> Any:
    if name in ("Dataset", "Encoded", "Split", "encode"):  # torch takes 1.7 s to import; PEP 562
        from llmsys.data import batches

        return getattr(batches, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
