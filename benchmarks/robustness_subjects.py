"""What `compress_robustness.py` compares, each behind one small adapter: attach, step, save, load.

    acpsgd, powersgd   ours, a hook of DDP
    torch              powerSGD_hook of torch.distributed, by its documentation: a plain all-reduce before
                       start_powerSGD_iter=2, an orthogonalization_epsilon of 1e-8, its state saved by torch.save. Every
                       rank saves its own here; the documentation's example saves rank 0's alone
    epfml              PowerSGD of github.com/epfml/powersgd, whose authors wrote the paper, called after the backward
                       pass (`optimizer_step`); compressing from the first step, as its README does

All have one r, and otherwise their own defaults of what is worth compressing.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

EPFML = "pip install --no-deps git+https://github.com/epfml/powersgd@f07be92"
"""The wheels of powersgd 0.0.1 and 0.0.2 on PyPI hold no module, and ask for torch 1.10."""
Loss = Callable[[nn.Module], Tensor]
"""Of a micro-batch, given the module to call."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """`every`: each matrix is compressed, however little it saves. `bucket_mib`: of DDP; the default is one bucket."""

    r: int = 2
    every: bool = False
    bucket_mib: float = 25.0
    lr: float = 0.05


class Skipping(torch.optim.SGD):
    """Leaves a step out whose gradient is not finite, as GradScaler has it. `applied`: the sum of what was not left
    out, in fp64, by parameter; `left_out`: which steps, from 0."""

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.parameters = list(parameters)
        self.applied = [torch.zeros(p.shape, dtype=torch.float64) for p in self.parameters]
        self.left_out: list[int] = []
        self.steps = 0

    def step(self, closure: Any = None) -> None:
        if all(bool(p.grad.isfinite().all()) for p in self.parameters if p.grad is not None):
            for total, p in zip(self.applied, self.parameters, strict=True):
                total += p.grad.double() if p.grad is not None else 0
            super().step()
        else:
            self.left_out.append(self.steps)
        self.steps += 1


class Subject:
    """A way to exchange gradients, attached to `model`. `resume`: the folder in which `save` left this rank's state."""

    how_saved = ""
    """Where there is no way of its own: what one does by hand."""

    def __init__(self, model: nn.Module, options: Options, resume: Path | None) -> None:
        self.model, self.options = model, options
        self.optimizer = Skipping(list(model.parameters()), options.lr)
        self.attach(resume)

    def attach(self, resume: Path | None) -> None:
        raise NotImplementedError

    def step(self, losses: Sequence[Loss]) -> None:
        """One step of these micro-batches."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def buckets(self) -> int:
        """In how many messages gradients travel."""
        return 1


class Hooked(Subject):
    """What is a communication hook of DDP."""

    def step(self, losses: Sequence[Loss]) -> None:
        with self.ddp.no_sync():
            for loss in losses[:-1]:
                loss(self.ddp).backward()
        losses[-1](self.ddp).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wrap(self) -> None:
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=self.options.bucket_mib)

    def buckets(self) -> int:
        told = self.ddp._get_ddp_logging_data()
        return len(str(told.get("rebuilt_bucket_sizes") or told["bucket_sizes"]).split(","))


class Ours(Hooked):
    method = ""

    def attach(self, resume: Path | None) -> None:
        from llmsys.compress import CompressConfig, load_state, register

        self.wrap()
        rate = {"min_rate": 0.0} if self.options.every else {}
        self.state = register(self.ddp, CompressConfig(method=self.method, r=self.options.r, **rate))
        if resume:
            load_state(self.state, resume)

    def save(self, folder: Path) -> None:
        from llmsys.compress import save_state

        save_state(self.state, folder)


class ACPSGD(Ours):
    method = "acpsgd"


class PowerSGD(Ours):
    method = "powersgd"


class Torch(Hooked):
    def attach(self, resume: Path | None) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

        self.wrap()
        if resume:
            self.state = torch.load(own_file(resume), weights_only=False)
        else:
            self.state = PowerSGDState(
                process_group=None,
                matrix_approximation_rank=self.options.r,
                start_powerSGD_iter=2,
                orthogonalization_epsilon=1e-8,
                **({"min_compression_rate": 0} if self.options.every else {}),
            )
        self.ddp.register_comm_hook(self.state, powerSGD_hook)

    def save(self, folder: Path) -> None:
        torch.save(self.state, own_file(folder))


class Epfml(Subject):
    """Errors lie in `.grad`, so gradients are never set to zero."""

    def attach(self, resume: Path | None) -> None:
        import powersgd

        rate = {"min_compression_rate": 0} if self.options.every else {}
        config = powersgd.Config(rank=self.options.r, start_compressing_after_num_steps=0, **rate)
        self.aggregator = powersgd.PowerSGD(list(self.model.parameters()), config)
        if hasattr(self.aggregator, "state_dict"):
            raise NotImplementedError("it has a state_dict by now, which this adapter does not know")
        self.how_saved = "it has no state_dict: the object pickled, and every .grad beside it"
        if resume:
            self.aggregator, errors = torch.load(own_file(resume), weights_only=False)
            for p, error in zip(self.model.parameters(), errors, strict=True):
                p.grad = error

    def step(self, losses: Sequence[Loss]) -> None:
        import powersgd

        for loss in losses:
            loss(self.model).backward()
        powersgd.optimizer_step(self.optimizer, self.aggregator)

    def save(self, folder: Path) -> None:
        torch.save((self.aggregator, [p.grad for p in self.model.parameters()]), own_file(folder))


SUBJECTS: dict[str, type[Subject]] = {"acpsgd": ACPSGD, "powersgd": PowerSGD, "torch": Torch, "epfml": Epfml}
OURS = ("acpsgd", "powersgd")


def own_file(folder: Path) -> Path:
    return folder / f"peer-rank-{dist.get_rank()}.pt"


def missing(subject: str) -> str:
    """Why it cannot be run here; empty where it can."""
    if subject != "epfml":
        return ""
    try:
        from powersgd import PowerSGD  # noqa: F401
    except ImportError as error:
        there = "".join(d.version for d in importlib.metadata.distributions(name="powersgd"))
        return f"{error}{f', though powersgd {there} is installed' if there else ''}; {EPFML}"
    return ""
