"""What ranks do in the tests of the hook: train a small model under DDP, with the reference's gradients beside."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmsys.comm.group import group
from llmsys.comm.place import Place
from llmsys.comm.traffic import Traffic
from llmsys.compress import CompressConfig, register
from llmsys.compress.reference import Reference

MANY = 0.002
"""MiB of a bucket, of which `Net` then has several."""


class Net(nn.Module):
    """Matrices of several shapes, vectors, a convolution, and a matrix too small to be compressed; fp64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv1d(3, 8, 3)
        self.body = nn.Sequential(nn.Linear(48, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 40), nn.Tanh())
        self.unused = nn.Linear(24, 20)
        self.head = nn.Linear(40, 2)
        self.double()

    def forward(self, x: Tensor, *, skip: bool = False) -> Tensor:
        y = self.body(self.conv(x).flatten(1))
        if not skip:
            y = y + self.unused(x.flatten(1)[:, :24]).repeat(1, 2)
        out: Tensor = self.head(y)
        return out


def batch(rank: int, step: int, part: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + part)
    return torch.randn(6, 3, 8, generator=generator, dtype=torch.float64)


def loss(y: Tensor) -> Tensor:
    return (y - 0.5).square().mean()


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def against_reference(place: Place, settings: dict[str, Any], steps: int = 8, **ddp: Any) -> dict[str, float]:
    """The largest difference of any gradient from the reference's, and of any weight between ranks; collectives of the
    last step."""
    with group(place, torch.device("cpu")):
        config = CompressConfig(**{"min_rate": 1, **settings})
        model = Net(seed=place.rank)  # DDP makes them equal
        ddp = {"bucket_cap_mb": MANY, "gradient_as_bucket_view": True, **ddp}
        wrapped = DistributedDataParallel(model, **ddp)
        register(wrapped, config)
        torch.manual_seed(place.rank)  # nothing may depend on it
        reference, worst = Reference(config, place.world), 0.0
        named = dict(model.named_parameters())
        for step in range(steps):
            local = torch.autograd.grad(loss(model(batch(place.rank, step))), list(named.values()))
            wanted = reference.step(everywhere(dict(zip(named, local, strict=True))))
            traffic = Traffic()
            with traffic:
                loss(wrapped(batch(place.rank, step))).backward()
            for name, p in named.items():
                assert p.grad is not None
                worst = max(worst, float((p.grad - wanted[name]).abs().max()))
            descend(model)
        whole = everywhere(torch.cat([p.detach().flatten() for p in model.parameters()]))
        apart = max(float((each - whole[0]).abs().max()) for each in whole)
        return {"worst": worst, "apart": apart, **traffic.calls}


def descend(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None and all(map(math.isfinite, p.grad.flatten()[:1].tolist())):
                p -= 0.05 * p.grad
            p.grad = None
