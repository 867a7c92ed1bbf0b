"""Gradient compression that overlaps with the backward pass: S-SGD, Sign-SGD, Top-k, Random-k, Power-SGD and ACP-SGD
(arXiv 2306.08881), behind one protocol.

    from llmsys.compress import CompressConfig, register

    model = DistributedDataParallel(model)
    register(model, CompressConfig(method="acpsgd", r=4))      # then train with any loop and any optimizer

The names are resolved late (PEP 562): importing the package imports not even torch, and using it nothing but torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import lazy

if TYPE_CHECKING:
    from llmsys.compress.aggregate import Aggregator
    from llmsys.compress.codec import Payload, decode, encode
    from llmsys.compress.config import CompressConfig
    from llmsys.compress.hook import HookState, compress_hook, register
    from llmsys.compress.shards import ShardAggregator
    from llmsys.compress.state import CompressionState
    from llmsys.compress.store import load_state, save_state

_HOMES = {
    "Aggregator": "aggregate",
    "CompressConfig": "config",
    "CompressionState": "state",
    "HookState": "hook",
    "Payload": "codec",
    "ShardAggregator": "shards",
    "compress_hook": "hook",
    "decode": "codec",
    "encode": "codec",
    "load_state": "store",
    "register": "hook",
    "save_state": "store",
}
"""Name -> module."""

__all__ = [
    "Aggregator",
    "CompressConfig",
    "CompressionState",
    "HookState",
    "Payload",
    "ShardAggregator",
    "compress_hook",
    "decode",
    "encode",
    "load_state",
    "register",
    "save_state",
]

__getattr__ = lazy.attributes(__name__, _HOMES)
