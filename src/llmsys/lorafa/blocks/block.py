"""What the families' blocks have in common: the policy that says where to cut the chains, and the change of class.

none      gate and up, and query, key, value and the attention's output are kept
mlp       the MLP keeps its input; gate and up are computed again, down never is
attn+mlp  attention keeps its input too; query, key, value and the scores are computed again
block     the block keeps its input and everything is computed again, by torch's own checkpoint
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

POLICIES = ("none", "mlp", "attn+mlp", "block")


_CLASSES: dict[type, type] = {}


class Fused:
    """Mixed into the class of a transformer's block, whose own modules and their names stay."""

    policy: str = "none"

    def parameters_read(self: Any) -> Iterator[nn.Parameter]:
        """The weights that `forward` reads from modules which it does not call: an engine that cuts weights over ranks
        and gathers them module by module (ZeRO-3) has to gather these for the block."""
        yield from self.parameters()

    @property
    def again_mlp(self) -> bool:
        return self.policy in ("mlp", "attn+mlp")

    @property
    def again_attention(self) -> bool:
        return self.policy == "attn+mlp"


def fused_class(mixin: type[Fused], plain: type) -> type:
    """The subclass of a block's class whose forward pass is `mixin`'s."""
    if plain not in _CLASSES:
        _CLASSES[plain] = type(f"Fused{plain.__name__}", (mixin, plain), {})
    return _CLASSES[plain]


def fuse(block: Any, mixin: type[Fused], policy: str) -> None:
    """Changes `block`, in place, to run as `mixin` does under `policy`; or only the policy of one that does already."""
    if not isinstance(block, Fused):
        block.__class__ = fused_class(mixin, type(block))
    block.policy = policy


def unfuse(block: Any) -> None:
    """Gives a fused block its own forward pass back, in place."""
    if isinstance(block, Fused):
        plain: Any = next(cls for cls in type(block).__mro__ if not issubclass(cls, Fused))
        block.__class__ = plain
