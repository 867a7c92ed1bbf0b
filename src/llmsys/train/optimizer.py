"""AdamW as torch has it, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from llmsys import schema


def adamw(model: nn.Module, config: schema.Train, lr: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters. Weight decay pulls matrices only: on a norm's or a bias's vector it does harm.

    The fused kernel is element-wise, hence deterministic, and takes one pass over memory instead of about ten.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: dict[tuple[bool, type], list[nn.Parameter]] = {}
    for (
        p
    ) in trained:  # by type too: one kernel call cannot mix DTensors with whole tensors, which tensor parallelism has
        groups.setdefault((p.ndim >= 2, type(p.data)), []).append(p)
    decay = {True: config.weight_decay, False: 0.0}
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": decay[matrix]} for (matrix, _), members in groups.items()],
        lr=lr,
        fused=True,
    )


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
