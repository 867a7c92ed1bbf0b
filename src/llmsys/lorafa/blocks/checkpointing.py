"""`recompute=block`: the flags by which transformers computes blocks again, borrowed and given back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

log = logging.getLogger(__name__)

_FLAG, _FUNCTION, _BEFORE = "gradient_checkpointing", "_gradient_checkpointing_func", "_checkpointing_before"


def follow(model: nn.Module, chosen: Sequence[tuple[nn.Module, bool]]) -> None:
    """Makes the `chosen` blocks of a model compute everything again, in place, and those only that somebody else has
    told to besides: these are left so, which the log says."""
    from llmsys.models.surgery import recompute_blocks

    give_back(model)
    elsewhere = [block for block, chosen_here in chosen if getattr(block, _FLAG, False) and not chosen_here]
    if any(chosen_here for _, chosen_here in chosen):
        before = {module: _state(module) for module in model.modules() if hasattr(module, _FLAG)}
        recompute_blocks(model, [chosen_here for _, chosen_here in chosen])
        for module, state in before.items():
            if module in elsewhere:
                _put(module, state)
            elif _state(module) != state:
                vars(module)[_BEFORE] = state
    if elsewhere:
        log.warning(
            "gradient checkpointing is on: %d blocks are computed again whole, whatever recompute is",
            len(elsewhere),
        )


def give_back(model: nn.Module) -> None:
    """What `follow` has changed becomes what it was."""
    for module in model.modules():
        if _BEFORE in vars(module):
            _put(module, vars(module).pop(_BEFORE))


def _state(module: Any) -> tuple[bool, Any]:
    return getattr(module, _FLAG), vars(module).get(_FUNCTION)


def _put(module: Any, state: tuple[bool, Any]) -> None:
    setattr(module, _FLAG, state[0])
    vars(module).pop(_FUNCTION, None)
    if state[1] is not None:
        setattr(module, _FUNCTION, state[1])
