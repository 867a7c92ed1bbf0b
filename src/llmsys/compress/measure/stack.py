"""What is trained where nothing is paced: a stack of linear layers, or one of the models on synthetic tokens.

An iteration is the forward and the backward pass and an update by plain SGD, as in the paper's measurements. The rate
is so small that nothing diverges whatever the gradients become.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.compress.paper_models import PaperModel, Parameter

RATE = 1e-9


class Stack(nn.Module):
    """`layers` times Linear(width) and ReLU; the loss is the mean square of what comes out."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D]; a scalar."""
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.pow(2).mean()


Forward = Callable[[nn.Module], Tensor]
"""The loss of the wrapped model on this rank's batch."""


def stack(task: schema.Iteration, batch: int, device: torch.device, seed: int) -> tuple[nn.Module, Forward]:
    """A fresh stack, alike on all ranks, and its forward pass on examples of this rank's own."""
    torch.manual_seed(0)
    model = Stack(task.layers, task.width).to(device)
    x = torch.randn(batch, task.width, generator=torch.Generator().manual_seed(seed)).to(device)
    return model, lambda wrapped: wrapped(x)


def whole_model(config: schema.Config, batch: int, device: torch.device, seed: int) -> tuple[nn.Module, Forward]:
    """The model of `config.model` with random weights, alike on all ranks, on random tokens of this rank's own."""
    from llmsys import models

    model = models.load(config.model, objective="causal_lm", num_labels=0, device=device, seed=0, folder=None)
    assert isinstance(config.model, schema.Transformer), "`schema.coherence` has said so"
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.model.vocab_size, (batch, config.train.length), generator=draw).to(device)
    return model.train(), lambda wrapped: wrapped(input_ids=tokens, labels=tokens).loss


def as_paper_model(model: nn.Module, tokens: int, batch: int, r: int) -> PaperModel:
    """Its parameters and about how many FLOPs each has: products with matrices alone, of `tokens` in each example."""
    found = [
        Parameter(name, tuple(p.shape), 2.0 * p.numel() * tokens if p.dim() > 1 else 0.0)
        for name, p in model.named_parameters()
    ]
    return PaperModel(title=type(model).__name__, make=lambda: iter(found), batch=batch, r=r)
