"""LoRA-FA (arXiv 2308.03303): low-rank adapters whose down-projection A is frozen, so that the full-rank input of an
adapted layer need not be stored for the backward pass.

    from llmsys.lorafa import LoRAFAConfig, inject, save_adapter

    inject(model, LoRAFAConfig(r=16, alpha=32))      # in place; then train with any loop and any optimizer
    save_adapter(model, "adapter")                   # B, and the seed of A

The names are resolved late (PEP 562): importing the package imports not even torch, using it nothing but torch, and
saving safetensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import lazy

if TYPE_CHECKING:
    from llmsys.lorafa.adapters import delete_adapter, disable_adapter, names, set_adapter, unload
    from llmsys.lorafa.config import LoRAFAConfig
    from llmsys.lorafa.injection import inject
    from llmsys.lorafa.merging import merge, unmerge
    from llmsys.lorafa.peft_format import from_peft, to_peft
    from llmsys.lorafa.plain import traceable
    from llmsys.lorafa.ranks import assert_same_across_ranks, ignore_in_ddp
    from llmsys.lorafa.refreshing import refresh
    from llmsys.lorafa.store import load_adapter, save_adapter

_HOMES = {
    "LoRAFAConfig": "config",
    "assert_same_across_ranks": "ranks",
    "delete_adapter": "adapters",
    "disable_adapter": "adapters",
    "from_peft": "peft_format",
    "ignore_in_ddp": "ranks",
    "inject": "injection",
    "load_adapter": "store",
    "merge": "merging",
    "names": "adapters",
    "refresh": "refreshing",
    "save_adapter": "store",
    "set_adapter": "adapters",
    "to_peft": "peft_format",
    "traceable": "plain",
    "unload": "adapters",
    "unmerge": "merging",
}
"""Name -> module."""

__all__ = [
    "LoRAFAConfig",
    "assert_same_across_ranks",
    "delete_adapter",
    "disable_adapter",
    "from_peft",
    "ignore_in_ddp",
    "inject",
    "load_adapter",
    "merge",
    "names",
    "refresh",
    "save_adapter",
    "set_adapter",
    "to_peft",
    "traceable",
    "unload",
    "unmerge",
]

__getattr__ = lazy.attributes(__name__, _HOMES)
