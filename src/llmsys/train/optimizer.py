"""AdamW and the learning rate's schedule, as torch and transformers have them."""

from __future__ import annotations

import torch
from torch import nn

from llmsys import schema


def adamw(model: nn.Module, config: schema.Train, lr: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters. Weight decay pulls matrices only: on a norm's or a bias's vector it does harm.

    The fused kernel is element-wise, hence deterministic, and takes one pass over memory instead of about ten.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=True)


def schedule(optimizer: torch.optim.Optimizer, config: schema.Train) -> torch.optim.lr_scheduler.LRScheduler:
    """The factor on the learning rate by step: constant, linear or cosine, after `warmup_steps`."""
    from transformers import get_scheduler

    result: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
    )
    return result
