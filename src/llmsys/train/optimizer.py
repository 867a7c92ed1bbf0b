"""AdamW, with moments of fp32 or of 8 bits, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmsys import schema


def adamw(model: nn.Module, config: schema.Train, lr: float) -> torch.optim.Optimizer:
    """The AdamW of `train.optimizer` over the trained parameters. Weight decay pulls matrices only: on a norm's or a
    bias's vector it does harm.

    torch's fused kernel is element-wise, hence deterministic, and takes one pass over memory instead of about ten.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: dict[tuple[bool, type], list[nn.Parameter]] = {}
    for (
        p
    ) in trained:  # by type too: one kernel call cannot mix DTensors with whole tensors, which tensor parallelism has
        shape = getattr(p, "ds_shape", p.shape)  # DeepSpeed's name for it, once it has cut a weight
        groups.setdefault((len(shape) >= 2, type(p.data)), []).append(p)
    decay = {True: config.weight_decay, False: 0.0}
    made = [{"params": members, "weight_decay": decay[matrix]} for (matrix, _), members in groups.items()]
    if config.optimizer == "adamw_8bit":
        from llmsys.train.adamw_8bit import AdamW8bit

        eight: torch.optim.Optimizer = AdamW8bit(made, lr=lr)
        return eight
    return torch.optim.AdamW(made, lr=lr, fused=True)


def state_of(optimizer: Any, parameter: nn.Parameter) -> Mapping[str, Any]:
    """AdamW's state of a parameter, `exp_avg`, `exp_avg_sq` and `step`, however the optimizer keeps it; {} before a
    step. Of a parameter that is cut, this rank's part or a DTensor of it."""
    unpacked = getattr(optimizer, "unpacked", None)
    found: Mapping[str, Any] = unpacked(parameter) if unpacked else optimizer.state.get(parameter, {})
    return found


def piece_of(optimizer: Any, parameter: nn.Parameter, key: str, start: int, numel: int) -> Tensor:
    """`numel` elements, from `start` on, of a moment of a flat parameter."""
    piece = getattr(optimizer, "piece", None)
    found: Tensor = (
        piece(parameter, key, start, numel) if piece else optimizer.state[parameter][key][start : start + numel]
    )
    return found


def keep(optimizer: Any, parameter: nn.Parameter) -> None:
    """Has the optimizer take over, in its own form, AdamW's state that has been put into `state[parameter]`."""
    pack = getattr(optimizer, "pack", None)
    if pack:
        pack(parameter)


def schedule(config: schema.Train) -> Callable[[int], float]:
    """The factor on the learning rate by finished steps: constant, linear or cosine, after `warmup_steps`.

    A pure function of the step, so there is nothing to save. In numbers transformers' own (a test compares the bits),
    whose import takes a second and a half of every process: with its schedules come peft and bitsandbytes.
    """
    warmup, steps = config.warmup_steps, config.steps

    def factor(step: int) -> float:
        if config.schedule == "constant":
            return 1.0
        if step < warmup:
            return step / max(1, warmup)
        if config.schedule == "constant_with_warmup":
            return 1.0
        if config.schedule == "linear":
            return max(0.0, (steps - step) / max(1, steps - warmup))
        assert config.schedule == "cosine"
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup)))))

    return factor
