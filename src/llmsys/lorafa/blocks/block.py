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

from llmsys.lorafa.layer import Adapted, hooks
from llmsys.lorafa.pieces.attention import Core
from llmsys.lorafa.pieces.dropout import Dropout
from llmsys.lorafa.pieces.join import run_apart
from llmsys.lorafa.pieces.piece import Chain, Piece, run
from llmsys.models.classes import become, derived
from llmsys.models.surgery import is_linear

log = logging.getLogger(__name__)

_CLASSES: dict[type, type] = {}


class Fused:
    """Mixed into the class of a transformer's block, whose own modules and their names stay.

    The forward pass reads weights from the block's modules and does not call these: their hooks do not run. Where a
    caller asks for the probabilities of attention (`output_attentions`), which only such hooks deliver, the block runs
    as transformers has it, with its adapted layers one by one; so it does where `apart` says so. Under `torch.compile`
    a block is a call into uncompiled code, as every piece is.
    """

    policy: str = "none"
    parts: tuple[nn.Module, ...] = ()
    linear: tuple[nn.Module, ...] = ()
    training: bool

    def apart(self: Any) -> bool:
        """Whether the block has to run as transformers has it: where accelerate brings weights that only a call of
        their modules gets, and where a weight without an adapter is trained, which the pieces take as frozen."""
        found = [hook for part in self.parts if "_hf_hook" in part.__dict__ for hook in hooks(part)]
        if found and (any(map(_moves, found)) or len({str(hook.execution_device) for hook in found}) > 1):
            return True
        for layer in self.linear:
            if layer.weight.requires_grad and not (isinstance(layer, Adapted) and layer.adapter is not None):
                _say_that_it_is_trained()
                return True
        return False

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


def _moves(hook: Any) -> bool:
    """Whether a hook does more than to move a call's inputs to where the weights already are."""
    return type(hook).__name__ != "AlignDevicesHook" or bool(hook.offload)


@functools.cache
def _say_that_it_is_trained() -> None:
    log.warning("a weight without an adapter is trained: its block keeps its own forward pass, whatever recompute says")


def hidden_dropout(module: Any) -> list[Piece]:
    """A dropout module as a piece, or none where it does nothing."""
    return [Dropout(module.p)] if module.training and module.p else []


def asks_for_attentions(config: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))


def fused_class(mixin: type[Fused], plain: type) -> type:
    """The subclass of a block's class whose forward pass is `mixin`'s."""
    if plain not in _CLASSES:
        _CLASSES[plain] = derived(fused_class, mixin, plain, bases=(mixin, plain))
    return _CLASSES[plain]


def fuse(block: Any, mixin: type[Fused], policy: str) -> None:
    """Changes `block`, in place, to run as `mixin` does under `policy`; or only the policy of one that does already."""
    if not isinstance(block, Fused):
        become(block, fused_class(mixin, type(block)))
    block.policy, block.parts = policy, tuple(block.modules())[1:]
    block.linear = tuple(part for part in block.parts if is_linear(part))
    watched = sorted({type(part).__name__ for part in block.parts if _watched(part)})
    if watched:
        log.warning("hooks of %s do not run: their block does not call them", ", ".join(watched))


def plain_class(kind: type) -> type:
    """What a fused block's class is made of."""
    return next(cls for cls in kind.__mro__ if not issubclass(cls, Fused))


def is_wrapped(module: nn.Module) -> bool:
    """Whether a fused block's class has been changed since, as FSDP2 does."""
    return isinstance(module, Fused) and type(module) not in _CLASSES.values()


def unfuse(block: Any) -> None:
    """Gives a fused block its own forward pass back, in place."""
    if isinstance(block, Fused):
        become(block, plain_class(type(block)))
        del block.policy, block.parts, block.linear


def _watched(part: Any) -> bool:
    found = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in found)
