"""AdamW and the learning rate's schedule, as torch and transformers have them."""

from __future__ import annotations

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

    A pure function of the step, so there is nothing to save. transformers' own, whose scheduler object is not used: it
    wants to watch an optimizer's steps, and an engine's steps are not always those of torch's optimizer.
    """
    from transformers import get_scheduler

    scheduler = get_scheduler(
        config.schedule,
        torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0),
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
