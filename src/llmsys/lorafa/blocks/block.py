"""What the families' blocks have in common: the policy that says where to cut the chains, and the change of class.

none      gate and up, and query, key, value and the attention's output are kept
mlp       the MLP keeps its input; gate and up are computed again, down never is
attn+mlp  attention keeps its input too; query, key, value and the scores are computed again
block     the block keeps its input and everything is computed again, by torch's own checkpoint
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.lorafa.pieces.attention import Core
from llmsys.lorafa.pieces.dropout import Dropout
from llmsys.lorafa.pieces.join import run_apart
from llmsys.lorafa.pieces.piece import Chain, Piece, run

log = logging.getLogger(__name__)

POLICIES = ("none", "mlp", "attn+mlp", "block")
WITHIN = ("mlp", "attn+mlp")
"""Cuts within a block, which need to know its family."""


_CLASSES: dict[type, type] = {}


class Fused:
    """Mixed into the class of a transformer's block, whose own modules and their names stay.

    The forward pass reads weights from the block's modules and does not call these: their hooks do not run. Where a
    caller asks for the probabilities of attention (`output_attentions`), which only such hooks deliver, the block runs
    as transformers has it, with its adapted layers one by one. Under `torch.compile` a block is a call into uncompiled
    code, as every piece is.
    """

    policy: str = "none"
    training: bool

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

    def cache(self, given: Any) -> Any:
        """The key-value cache to fill: none in training where attention is computed again, which would fill it twice.
        transformers does the same where it recomputes blocks."""
        if given is not None and self.again_attention and self.training and torch.is_grad_enabled():
            _say_that_there_is_no_cache()
            return None
        return given

    def attend(
        self,
        core: Callable[..., Tensor],
        p: float,
        held: Mapping[str, Any],
        into: Piece,
        out: Piece,
        *inputs: Tensor,
        cut: bool = False,
    ) -> Tensor:
        """out(core(into(inputs), **held)) as one chain under `attn+mlp`; else, or where `cut` says so (a cache is
        filled), with query, key and value kept between them. `p`: of the dropout within `core`."""
        whole: Tensor
        if self.again_attention and not cut:
            middle = Core(core, inputs[0].device, random=p > 0, held=held)
            whole = run(Chain(into, middle, out), *inputs)
        else:
            whole = run(out, core(*run_apart(into, *inputs), **held))
        return whole


@functools.cache
def _say_that_there_is_no_cache() -> None:
    log.warning("recompute=attn+mlp: no key-value cache is filled in training; use_cache=False is right there")


def hidden_dropout(module: Any) -> list[Piece]:
    """A dropout module as a piece, or none where it does nothing."""
    return [Dropout(module.p)] if module.training and module.p else []


def asks_for_attentions(config: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))


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
